"""Norm statistics for a depth in between, where those of the two extremes are not good enough.

Nets run at every depth as they are: each stage takes the set of statistics that its own flag picks. In between, a
stage may see inputs a little unlike those its set was learnt on. Averaging the statistics anew over some images at
that very depth mends this, at the price of a net made for one depth.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from itertools import islice

import torch
from torch import nn
from tqdm import tqdm

from ..core.behaviours import BATCH_NORMS
from ..core.state import DepthLike, set_depth, unwrap
from .cost import in_use
from .passes import device_of, evaluating, no_image, try_forward


def calibrate(
    net: nn.Module,
    loader: Iterable[tuple[torch.Tensor, torch.Tensor] | None],
    depth: DepthLike,
    *,
    batches: int | None = None,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> nn.Module:
    """A copy of a net whose batch norms have the statistics of one depth.

    Every batch norm that runs at that depth normalises by the batch's own mean and variance, and keeps their average
    over the batches; dropout and stochastic depth are off, weights do not move. Norms that do not run at it stay.

    The copy is any-depth still, so that `save`, `evaluate`, `profile` and `extract(copy, depth)` take it, and is set to
    `depth`, but it is meant for that depth alone: norms shared with other depths (stem, shortcuts, stages with the
    same flag) have changed with it. The net itself keeps both its sets as they are.

    Args:
        net: a converted net with batch norms.
        loader: batches (images (B, 3, H, W), anything), None for an empty one; the images training saw, prepared as
            for evaluation. Larger batches give better statistics.
        depth: what to calibrate for.
        batches: how many to use; None = all.
        device: where batches go; None = where the net's parameters are.
        progress: show a progress bar, if in a terminal.

    Raises:
        ValueError: if no batch norm with running statistics runs at that depth, or there is no image.
    """
    calibrated = copy.deepcopy(unwrap(net))
    set_depth(calibrated, depth)
    used = in_use(calibrated, depth)
    norms = [module for name, module in calibrated.named_modules()
             if isinstance(module, BATCH_NORMS) and module.track_running_stats and used(f"{name}.running_mean")]
    if not norms:
        raise ValueError(f"this {type(calibrated).__name__} has no batch norm with running statistics, so there is "
                         "nothing to calibrate: it runs at every depth as it is")
    device, dtype = device_of(calibrated, device), next(calibrated.parameters()).dtype
    momenta = [norm.momentum for norm in norms]
    seen = 0
    bar = tqdm(islice(loader, batches), desc="calibrate", unit="batch", leave=False, total=batches,
               disable=None if progress else True)
    with evaluating(calibrated), torch.no_grad():
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # the mean of all batches, not an exponential one
            norm.training = True
        for batch in bar:
            if batch is not None:
                try_forward(calibrated, batch[0].to(device, dtype, non_blocking=True))
                seen += 1
    if not seen:
        raise ValueError(no_image("calibrate on", loader))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return calibrated
