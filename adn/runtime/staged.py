"""A forward whole, or in segments; and the memory around it that stays where it is."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from adn_kernels.private import pytree

from ..core.state import state_of
from .cuda_graphs import Graph
from .cut import Segment

_CONSTANTS = (bool, int, float, str, type(None))


class Staged(Protocol):
    """A net whose forward comes in segments: `take` the input, run the segments one after the other on values by name,
    `give` the output. The input has the name of what the first segment takes first."""

    segments: Sequence[Segment]

    def take(self, x: Tensor) -> Tensor:
        """The input in the layout that the segments want; not a copy if it has it."""

    def give(self, values: Mapping[str, Any]) -> Any:
        """What the forward returns."""


def staged(net: nn.Module, max_graphs: int) -> Staged | None:
    """The net if it is to be captured segment by segment: where it can be, and graphs of its segments can be kept but
    not those of all depths. Else None."""
    ways = [2 if isinstance(entry, bool) else entry for entry in state_of(net).full]
    if math.prod(ways) <= max_graphs or not all(hasattr(net, name) for name in ("segments", "take", "give")):
        return None
    return net if sum(1 if s.flag is None else ways[s.flag] for s in net.segments) <= max_graphs else None


class Batch(NamedTuple):
    """What the net is run with: the shape of a whole batch, and its dtype."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class Place:
    """Where graphs find the input of one form, and where a segment leaves what others take: outside the pool."""

    def __init__(self, x: Tensor, net: Staged | None) -> None:
        self.x = x = x if net is None else net.take(x)
        self.flags: Tensor | None = None  # of each image, where it has a depth of its own
        self._filled = 0
        self._net = net
        self._values: dict[str, Any] = {} if net is None else {net.segments[0].takes[0]: x}

    def fill(self, x: Tensor) -> None:
        self.x[: len(x)].copy_(x)
        if self._filled > len(x):
            self.x[len(x) : self._filled].zero_()
        self._filled = len(x)

    def take(self, names: Iterable[str]) -> list[Any]:
        return [self._values[name] for name in names]

    def leave(self, names: Iterable[str], values: Iterable[Any]) -> None:
        for name, value in zip(names, values, strict=True):
            if name not in self._values:
                # A run of warm-up, not yet the capture.
                holds_tensors = any(map(torch.is_tensor, pytree.tree_leaves(value)))
                self._values[name] = map_tensors(torch.empty_like, value) if holds_tensors else value
            if any(map(torch.is_tensor, pytree.tree_leaves(value))):
                pytree.tree_map(
                    lambda to, source: to.copy_(source) if torch.is_tensor(to) else to, self._values[name], value)

    def result(self, graphs: Sequence[Graph]) -> Any:
        """What the forward returns: of one graph that is all of it, or of those of its segments, which return nothing.
        """
        return graphs[-1].outputs if graphs[-1].outputs is not None else self._net.give(self._values)

    def tensors(self) -> list[Tensor]:
        """The input, and all that segments leave."""
        leaves = [self.flags, *pytree.tree_leaves(self._values)]
        return [self.x, *(leaf for leaf in leaves if torch.is_tensor(leaf) and leaf is not self.x)]


def zeros(shape: Sequence[int], like: Tensor) -> Tensor:
    """In the type and memory layout of an image batch `like`."""
    channels_last = (like.ndim == 4 and like.is_contiguous(memory_format=torch.channels_last)
                     and not like.is_contiguous())
    return torch.empty(tuple(shape), dtype=like.dtype, device=like.device,
                       memory_format=torch.channels_last if channels_last else torch.contiguous_format).zero_()


def map_tensors(function: Callable[[Tensor], Tensor], tree: Any) -> Any:
    """Of every tensor of an output; others that may be in it stay.

    Raises:
        TypeError: on what could hold tensors unseen.
    """
    def leaf(value: Any) -> Any:
        if torch.is_tensor(value):
            return function(value)
        if isinstance(value, _CONSTANTS):
            return value
        raise TypeError(f"the net returns a {type(value).__name__}, in which an engine does not see the tensors: "
                        "return tensors, tuples, lists or dicts, or register it with torch.utils._pytree")

    return leaf(tree) if torch.is_tensor(tree) else pytree.tree_map(leaf, tree)
