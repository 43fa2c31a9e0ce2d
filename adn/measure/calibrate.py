"""Norm statistics averaged anew: of both extremes, or for a depth in between, where theirs are not good enough.

Nets run at every depth as they are: each stage takes the set of statistics that its own flag picks. In between, a
stage may see inputs a little unlike those its set was learnt on. Averaging the statistics anew over some images at
that very depth mends this, at the price of a net made for one depth.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from itertools import islice

import torch
from torch import nn

from ..core.behaviours import BATCH_NORMS
from ..core.progress import progress_bar
from ..core.state import DepthLike, set_depth, unwrap
from .cost import in_use
from .passes import device_of, evaluating, moved, no_image, try_forward


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
    _average(calibrated, loader, [depth], batches, device, progress, "calibrate on")
    set_depth(calibrated, depth)
    return calibrated


def update_bn(
    net: nn.Module,
    loader: Iterable[tuple[torch.Tensor, torch.Tensor] | torch.Tensor | None],
    *,
    batches: int | None = None,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> nn.Module:
    """Average the statistics of all batch norms anew, in place, both those of the super-net and those of the base-net:
    what `torch.optim.swa_utils.update_bn` does for a net of one depth. After averaging weights, for instance.

    Every batch runs at full depth and as the base-net. Batch norms normalise by its own mean and variance, and keep the
    average; dropout and stochastic depth are off, weights do not move, and the depth that is set stays set.

    Args:
        net: a converted net with batch norms, or a wrapper such as `torch.optim.swa_utils.AveragedModel`.
        loader: batches (images (B, 3, H, W), anything), or images alone; None for an empty one. Prepared as for
            training, or as for evaluation.
        batches, device, progress: as for `calibrate`.

    Returns:
        The net.

    Raises:
        ValueError: if no batch norm has running statistics, or there is no image; the net is as it was.
    """
    _average(unwrap(net), loader, ["super", "base"], batches, device, progress, "average over")
    return net


def _average(net: nn.Module, loader: Iterable[tuple[torch.Tensor, torch.Tensor] | None], depths: Sequence[DepthLike],
             batches: int | None, device: torch.device | str | None, progress: bool, what: str) -> None:
    """Statistics of the batch norms that run at one of these depths, over batches that run at all of them."""
    used = [in_use(net, depth) for depth in depths]
    norms = [module for name, module in net.named_modules()
             if isinstance(module, BATCH_NORMS) and module.track_running_stats and any(
                 at(f"{name}.running_mean") for at in used)]
    if not norms:
        raise ValueError(f"this {type(net).__name__} has no batch norm with running statistics, so there is "
                         "nothing to average: it runs at every depth as it is")
    device, dtype = device_of(net, device), next(net.parameters()).dtype
    former = [(norm.momentum, {name: buffer.clone() for name, buffer in norm.named_buffers(recurse=False)})
              for norm in norms]
    seen = 0
    bar = progress_bar(islice(loader, batches), desc=what.partition(" ")[0], unit="batch", total=batches,
                            show=progress)
    try:
        with evaluating(net), torch.no_grad():
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum = None  # the mean of all batches, not an exponential one
                norm.training = True
            for batch in bar:
                if batch is not None:
                    images = batch if isinstance(batch, torch.Tensor) else batch[0]
                    images = moved(images, device, dtype)
                    for depth in depths:
                        set_depth(net, depth)
                        try_forward(net, images)
                    seen += 1
            if not seen:
                raise ValueError(no_image(what, loader))
    except BaseException:
        for norm, (_, statistics) in zip(norms, former, strict=True):
            for name, value in statistics.items():
                getattr(norm, name).copy_(value)
        raise
    finally:
        for norm, (momentum, _) in zip(norms, former, strict=True):
            norm.momentum = momentum
