"""What compiling a net costs: regions, other frames, what was given up, what runs uncompiled."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Iterable
from typing import Any
from unittest import mock

import torch
from torch import nn

from adn.core import regions
from adn.core.state import DepthLike, at_depth
from adn.core.state import depths as all_depths
from adn_kernels import private

_DEPTH, _REGION = "adn depth ", "adn region"
_OPERATORS = ("aten::", "adn::", "torchvision::")


@dataclasses.dataclass(frozen=True)
class Counts:
    """What a sweep over depths made torch.compile do, and a second sweep.

    Attributes:
        depths: how many were swept.
        regions: paths and modules of `adn.core.regions` that were compiled in the first sweep.
        frames: other pieces of code that were compiled in it: what lies around the stages.
        given_up: names of functions that could not be compiled and run uncompiled.
        graph_breaks: how often code was cut because something in it is not traced; the dispatch of stages is.
        recompiles: compilations in the second sweep.
        uncompiled: by depth, how many operators ran outside of compiled code in the second sweep; only where any did.
            What a compiled function calls after a cut is not told apart from it: `given_up`, `graph_breaks` show that.
    """

    depths: int
    regions: int
    frames: int
    given_up: tuple[str, ...]
    graph_breaks: int
    recompiles: int
    uncompiled: dict[str, int]


def count(net: nn.Module, x: torch.Tensor, depths: Iterable[DepthLike] | None = None) -> Counts:
    """Count what compiling a net costs, by two sweeps over its depths.

    Runs forwards as the net is, in training mode with its side effects, and in the caller's gradient mode. Compilations
    of code that has run before do not show: count first.

    Args:
        net: a net that `compile` or `torch.compile` was applied to.
        x: its input.
        depths: which; None = all.
    """
    swept = list(all_depths(net)) if depths is None else list(depths)
    before = private.graph_breaks()
    first = private.compilations(lambda: [_forward(net, x, depth) for depth in swept])
    breaks = private.graph_breaks() - before
    done = [m for m in first if m.fail_type is None]
    laid = [m for m in done if m.co_filename == regions.__file__]

    def sweep() -> None:
        for depth in swept:
            with torch.autograd.profiler.record_function(f"{_DEPTH}{depth}"):
                _forward(net, x, depth)

    @private.unseen
    def marked(run: Callable, *args: Any) -> Any:
        with torch.autograd.profiler.record_function(_REGION):
            return run(*args)

    with mock.patch.object(regions, "run_region", marked), torch.autograd.profiler.profile() as profile:
        recompiles = len(private.compilations(sweep))
    uncompiled = collections.Counter(filter(None, map(_uncompiled_at, profile.function_events)))
    given_up = tuple(m.co_name for m in first if m.fail_type is not None)
    return Counts(len(swept), len(laid), len(done) - len(laid), given_up, breaks, recompiles, dict(uncompiled))


def _forward(net: nn.Module, x: torch.Tensor, depth: DepthLike) -> None:
    with at_depth(net, depth):
        net(x)


def _uncompiled_at(event: Any) -> str | None:
    """The depth at which an operator ran, called by nothing compiled and by no other operator; else None."""
    if not event.name.startswith(_OPERATORS):
        return None
    in_region = False
    while (event := event.cpu_parent) is not None:
        # What a compiled frame calls counts as within it, and so would a region that is not compiled.
        if event.name.startswith(_OPERATORS) or (event.name.startswith("Torch-Compiled Region") and not in_region):
            return None
        in_region = in_region or event.name == _REGION
        if event.name.startswith(_DEPTH):
            return event.name.removeprefix(_DEPTH)
    return None
