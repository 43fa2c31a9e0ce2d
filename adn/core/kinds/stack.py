"""A stack of alike layers, each with heads of its own, of which the first so many run."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import ClassVar

from torch import nn

from ..behaviours import Follows
from ..errors import ConversionError
from . import Follower, Form, Kind, submodule


class FirstLayers(Follows):
    """The list of layers of a stack, for a forward that goes through it."""

    order = 12

    def _running(self) -> list[nn.Module]:
        modules, choice = list(self._modules.values()), self._adn_choice
        return modules if self.training and not choice.in_training else modules[: choice.now()]

    def __iter__(self) -> Iterator[nn.Module]:
        return iter(self._running())

    def __len__(self) -> int:
        return len(self._running())


@dataclasses.dataclass
class StackPlan(Kind):
    """A stack of alike layers that may be cut short, each with heads of its own: the decoder of a detector.

    Attributes:
        name: module name of what runs the layers: it has a method `running()`, how many of them run; or goes through
            the first of the lists.
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
        submodule(model, self.name, here)
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
        yield Follower(self.lists[0], FirstLayers)
