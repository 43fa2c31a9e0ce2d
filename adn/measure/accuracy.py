"""Accuracy of every depth, in one pass over the data."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from ..core.depth import Depth
from ..core.state import DepthLike, at_depth, get_depth, is_any_depth, set_depth, state_of, unwrap
from ..core.state import depths as all_depths

AMP_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclasses.dataclass(frozen=True)
class Row:
    """How well a net does at one depth.

    Attributes:
        top1, top5: percent of the images whose label is the best, one of the five best guesses.
        loss: cross-entropy in nats, mean over the images.
        images: how many were counted.
    """

    depth: Depth
    top1: float
    top5: float
    loss: float
    images: int


def evaluate(
    net: nn.Module,
    loader: Iterable[tuple[torch.Tensor, torch.Tensor] | None],
    depths: Iterable[DepthLike] | None = None,
    device: torch.device | str | None = None,
    amp: torch.dtype | str | None = None,
    progress: bool = True,
) -> list[Row]:
    """Accuracy of a classifier at several depths; every batch is read once and runs at all of them.

    In evaluation mode and without gradients. Depth and mode of the net are afterwards what they were. Inside
    DistributedDataParallel the bare net runs, so a single process may evaluate; each counts what its loader gives.

    Args:
        net: a converted net with logits (B, classes).
        loader: batches (images (B, 3, H, W), labels (B,) integer), None for an empty one. Where its `dataset` has
            `class_names`, they must be those of the net.
        depths: which; None = every depth of the net.
        device: where batches go (their dtype becomes the net's); None = where the net's parameters are.
        amp: run under autocast: "bf16", "fp16" or a dtype.
        progress: show a progress bar, if in a terminal.

    Returns:
        One row per depth, in the order given.

    Raises:
        ValueError: if data and net do not have the same classes, the net cannot take images of this size, or there
            is no image at all.
    """
    chosen = all_depths(net) if depths is None else read_depths(net, depths)
    run = net.module if isinstance(net, DistributedDataParallel) else net
    parameter = next(run.parameters())
    device = torch.device(device) if device is not None else parameter.device
    hits = torch.zeros(len(chosen), 2, dtype=torch.int64, device=device)
    losses = torch.zeros(len(chosen), dtype=torch.float64, device=device)
    images = 0
    bar = tqdm(loader, desc="evaluate", unit="batch", leave=False, disable=None if progress else True)
    with evaluating(net), torch.inference_mode(), autocast(device, amp):
        for batch in bar:
            if batch is None:
                continue
            x, y = batch
            labels = y.to(device, non_blocking=True)
            x = x.to(device, parameter.dtype, non_blocking=True)
            for i, depth in enumerate(chosen):
                set_depth(net, depth)
                logits = run(x).float() if i else try_forward(run, x).float()
                if not i:
                    check_classes(net, logits, y, getattr(loader, "dataset", None))
                best = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
                hits[i, 0] += best[:, 0].sum()
                hits[i, 1] += best.sum()
                losses[i] += F.cross_entropy(logits, labels, reduction="sum")
            images += len(y)
    if not images:
        raise ValueError(no_image("evaluate on", loader))
    percent, mean = (hits.double() * (100 / images)).tolist(), (losses / images).tolist()
    return [Row(depth, top1, top5, loss, images)
            for depth, (top1, top5), loss in zip(chosen, percent, mean, strict=True)]


def chain(net: nn.Module) -> list[Depth]:
    """The depths FF..F, TF..F, TTF..F to TT..T: one stage less each time, from the input on.

    Along it accuracy falls steadily with cost in the reference's results, so it is a good first choice of operating
    points; not every point is on the Pareto front.
    """
    state = state_of(net)
    # A stack too short to cut gives the last one twice.
    return list(dict.fromkeys(Depth([*state.base[:i], *state.full[i:]]) for i in range(len(state.full) + 1)))


def choose_depths(net: nn.Module, text: str | None) -> list[Depth]:
    """Depths as a command line names them: "all", "chain" (also None), or depths with commas between them."""
    if text is None or text == "chain":
        return chain(net)
    return all_depths(net) if text == "all" else read_depths(net, text.split(","))


def read_depths(net: nn.Module, depths: Iterable[DepthLike]) -> list[Depth]:
    """Depths of this net, each once, in the order given; raises ValueError on one it does not have."""
    state = state_of(net)
    return list(dict.fromkeys(Depth.parse(depth, (state.full, state.base)) for depth in depths))


@contextlib.contextmanager
def evaluating(net: nn.Module) -> Iterator[None]:
    """Evaluation mode inside the block; after it every module is in its own former mode and the net, if it has several
    depths, at the one it had."""
    modes = [(module, module.training) for module in net.modules()]
    try:
        with at_depth(net, get_depth(net)) if is_any_depth(net) else contextlib.nullcontext():
            net.eval()
            yield
    finally:
        for module, training in modes:
            module.training = training


def autocast(device: torch.device, amp: torch.dtype | str | None) -> contextlib.AbstractContextManager:
    """Autocast on `device` to "bf16", "fp16" or a dtype; None = none."""
    if amp is None:
        return contextlib.nullcontext()
    if isinstance(amp, str) and amp not in AMP_TYPES:
        raise ValueError(f"amp={amp!r}; pass one of {', '.join(map(repr, AMP_TYPES))}, a dtype, or None")
    return torch.autocast(device.type, dtype=AMP_TYPES.get(amp, amp))


def try_forward(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """`net(x)`; a net that cannot take it gets an error that says what was given and what it expects.

    Raises:
        ValueError: whatever the net raised, except for lack of memory.
    """
    try:
        return net(x)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, AssertionError, ValueError) as error:
        expected = _expected_size(unwrap(net))
        hint = f"; it is made for images of {expected[0]} x {expected[1]}" if expected else ""
        raise ValueError(f"{type(unwrap(net)).__name__} cannot take a batch of shape {tuple(x.shape)}{hint} "
                         f"({error})") from error


def no_image(what: str, loader: Any) -> str:
    """Why a loader gave nothing."""
    unreadable = getattr(getattr(loader, "dataset", None), "unreadable", ())
    if not unreadable:
        return f"no image to {what}: the loader is empty"
    return f"no image to {what}: none of {len(unreadable)} could be read, such as {unreadable[0]}"


def check_classes(net: nn.Module, logits: torch.Tensor, labels: torch.Tensor, data: Any = None) -> None:
    """Refuse data whose classes are not those of the net, as far as `data.class_names` and labels tell.

    Raises:
        ValueError: if the numbers differ, names stored with the net do, or a label is out of range.
    """
    if logits.ndim != 2:
        raise ValueError(f"logits of shape (B, classes) are needed, this net gives {tuple(logits.shape)}")
    names, known = getattr(data, "class_names", None), state_of(net).class_names
    if names and len(names) != logits.shape[1]:
        raise ValueError(f"the data has {len(names)} classes, the net {logits.shape[1]}")
    least, most = int(labels.min()), int(labels.max())
    if not 0 <= least <= most < logits.shape[1]:
        raise ValueError(f"labels from {least} to {most}, but the net has {logits.shape[1]} classes: labels must be 0 "
                         f"to {logits.shape[1] - 1}")
    if names and known and known != names:
        i = next(i for i, (ours, theirs) in enumerate(zip(known, names, strict=True)) if ours != theirs)
        raise ValueError(f"class {i} is {names[i]!r} in the data and {known[i]!r} in the net: the labels do not mean "
                         "the same; open the data with a class map in the order of the net's classes")


def _expected_size(net: nn.Module) -> tuple[int, int] | None:
    """Image size a model was made for, where timm's or torchvision's attributes say so."""
    size = getattr(getattr(net, "patch_embed", None), "img_size", None) or getattr(net, "image_size", None)
    if size is None:
        size = (getattr(net, "pretrained_cfg", None) or {}).get("input_size")
        size = size and size[-2:]
    return (size, size) if isinstance(size, int) else size
