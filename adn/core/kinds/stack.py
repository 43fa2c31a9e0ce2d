"""A stack of alike layers, each with heads of its own, of which the first so many run."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import ClassVar

from torch import nn

from ..behaviours import Follows
from ..errors import ConversionError
from . import Follower, Form, Kind, submodule


class Stack(Follows):
    """A module that runs a stack of layers, cut short."""

    order = 12

    def running(self) -> int:
        choice = self._adn_choice
        return super().running() if self.training and not choice.in_training else choice.now()


@dataclasses.dataclass
class StackPlan(Kind):
    """A stack of alike layers that may be cut short, each with heads of its own: the decoder of a detector.

    Attributes:
        name: module name of what runs the layers, a module with a method `running()`: how many of them run.
        lists: module names of the `nn.ModuleList`s that have one entry per layer.
        base: how many layers the base-net runs.
    """

    kind: ClassVar[str] = "stack"
    names: ClassVar[tuple[str, ...]] = ("name", "lists")
    in_training: ClassVar[bool] = False
    one_forward: ClassVar[bool] = False
    name: str
    lists: list[str]
    base: int

    def resolve(self, model: nn.Module) -> StackPlan:
        """Checked against the model; raises `ConversionError`."""
        here = f"stack {self.name!r}"
        if not hasattr(submodule(model, self.name, here), "running"):
            raise ConversionError(f"{here}: a {type(model.get_submodule(self.name)).__name__} has no method running()")
        lengths = {len(submodule(model, name, here)) for name in self.lists}
        if len(lengths) != 1:
            raise ConversionError(f"{here}: {', '.join(self.lists)} are not of one length")
        if not 1 <= self.base <= (most := lengths.pop()):
            raise ConversionError(f"{here}: base={self.base}, but there are {most} layers")
        return self

    @property
    def units(self) -> list[str]:
        return []

    @property
    def whole(self) -> str:
        return self.name

    def values(self, model: nn.Module) -> list[int]:
        return list(range(len(model.get_submodule(self.lists[0])), 0, -1))

    def form(self, value: int) -> Form:
        return Form(lists=dict.fromkeys(self.lists, value))

    def follow(self) -> Iterator[Follower]:
        yield Follower(self.name, Stack)
