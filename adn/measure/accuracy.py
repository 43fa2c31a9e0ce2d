"""Accuracy of every depth, in one pass over the data."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from ..core.depth import Depth
from ..core.outputs import logits_of
from ..core.state import DepthLike, state_of
from ..core.state import depths as all_depths
from ..core.tables import table
from .passes import device_of, no_image, run_over

ACCURACIES = ("top1", "top5", "loss")  # of a row


@dataclasses.dataclass(frozen=True)
class Row:
    """How well a net does at one depth.

    Attributes:
        top1, top5: percent of the images whose label is the best, one of the five best guesses.
        loss: cross-entropy in nats, mean over the images.
        images: how many were counted.
        macs, latency_ms: multiply-adds per image, and time, where the caller fills them in.
    """

    depth: Depth
    top1: float
    top5: float
    loss: float
    images: int
    macs: int | None = None
    latency_ms: float | None = None


def evaluate(
    net: nn.Module,
    loader: Iterable[tuple[torch.Tensor, torch.Tensor] | None],
    depths: Iterable[DepthLike] | None = None,
    device: torch.device | str | None = None,
    amp: torch.dtype | str | None = None,
    progress: bool = True,
    *,
    distributed: bool = False,
) -> list[Row]:
    """Accuracy of a classifier at several depths; every batch is read once and runs at all of them.

    In evaluation mode and without gradients. Depth and mode of the net are afterwards what they were. Inside
    DistributedDataParallel the bare net runs, so a single process may evaluate; each counts what its loader gives.

    Args:
        net: a converted net with logits (B, classes), or an object that has them as `logits`.
        loader: batches (images (B, 3, H, W), labels (B,) integer), None for an empty one. Where its `dataset` has
            `class_names`, they must be those of the net.
        depths: which; None = every depth of the net.
        device: where batches go (their dtype becomes the net's); None = where the net's parameters are.
        amp: run under autocast: "bf16", "fp16" or a dtype.
        progress: show a progress bar, if in a terminal.
        distributed: all processes of the group call this, each with its share of the images, and get the same rows.
            False = this process stands alone.

    Returns:
        One row per depth, in the order given.

    Raises:
        ValueError: if data and net do not have the same classes, the net cannot take images of this size, or there
            is no image at all.
    """
    chosen = read_depths(net, depths)
    device = device_of(net, device)
    images = torch.zeros((), dtype=torch.int64, device=device)
    hits = torch.zeros(len(chosen), 2, dtype=torch.int64, device=device)  # of the best guess, and the five best
    losses = torch.zeros(len(chosen), dtype=torch.float64, device=device)
    labels: torch.Tensor

    def count(i: int, outputs: torch.Tensor, targets: torch.Tensor) -> None:
        nonlocal labels
        logits = logits_of(outputs).float()
        if not i:  # the first depth of a new batch
            check_classes(net, logits, targets, getattr(loader, "dataset", None))
            images.add_(len(targets))
            labels = targets.to(logits.device, non_blocking=True)
        best = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
        hits[i, 0] += best[:, 0].sum()
        hits[i, 1] += best.sum()
        losses[i] += F.cross_entropy(logits, labels, reduction="sum")

    run_over(net, loader, chosen, count, device, amp, progress)
    if distributed:
        for total in (images, hits, losses):
            dist.all_reduce(total)
    if not images:
        raise ValueError(no_image("evaluate on", loader))
    percent, mean = (hits.double() * (100 / int(images))).tolist(), (losses / images).tolist()
    return [Row(depth, top1, top5, loss, int(images))
            for depth, (top1, top5), loss in zip(chosen, percent, mean, strict=True)]


def accuracy_table(rows: Sequence[Row]) -> str:
    """Rows as text in columns; multiply-adds, in millions, where they are known."""
    return table_of(rows, [("MMACs", "macs", 1e6, 1), ("top-1 (%)", "top1", 1, 2), ("top-5 (%)", "top5", 1, 2),
                           ("loss", "loss", 1, 4)])


def table_of(rows: Sequence[Any], columns: Sequence[tuple[str, str, float, int]]) -> str:
    """Rows of accuracy as text, in columns of (head, field, unit, decimals); "-" is what is not known, and what nobody
    counted or timed has no column."""
    columns = [column for column in columns
               if column[1] not in ("macs", "latency_ms") or any(getattr(row, column[1]) is not None for row in rows)]

    def cell(row: Any, field: str, unit: float, decimals: int) -> str:
        value = getattr(row, field)
        return "-" if value is None else f"{value / unit:.{decimals}f}"

    return table([("depth", *(head for head, *_ in columns)), *(
        (str(row.depth or "-"), *(cell(row, *how) for _, *how in columns)) for row in rows)])


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
    return read_depths(net, None if text == "all" else text.split(","))


def read_depths(net: nn.Module, depths: Iterable[DepthLike] | None) -> list[Depth]:
    """Depths of this net, each once, in the order given; None = every one. Raises ValueError on one it does not
    have."""
    if depths is None:
        return all_depths(net)
    state = state_of(net)
    return list(dict.fromkeys(Depth.parse(depth, (state.full, state.base)) for depth in depths))


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
