"""What is known of a model of this library by its name, before it is built."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..settings import Settings

# (whose names, family, tables of prefixes to apply in turn), see `adn.weights.foreign`.
Naming = tuple[str, str, tuple[Mapping[str, str], ...]]
# (whose names, from a state dict in these, and the net's own, to one in ours; None of one in others), for what no table
# of prefixes says.
State = Mapping[str, torch.Tensor]
Rewrite = tuple[str, Callable[[State, State], dict[str, torch.Tensor] | None]]

# From a model to what stands for it, see `adn.detect.detector.Detector`; None of models that it does not know.
Adapter = Callable[[nn.Module], Any]


@dataclasses.dataclass(frozen=True)
class Entry:
    """A model by name. Each folder of `adn.models` has a `presets.py` with `ENTRIES`, a dict of these, and `RECIPES`,
    those to train them by; thereby its models are in `adn.list_models()`, and its recipes in `adn train --help`. It may
    have `ADAPTERS`, for objects of other libraries, and `LOOKS`, by which state dicts are told, see the registry.

    Attributes:
        build: from keyword arguments to the plain model with fresh weights; whatever is slow to import it imports when
            called.
        args: the arguments that the name stands for.
        task: what the model is for, the name of one of `adn.tasks`.
        stride: of its coarsest map, in pixels: sides of images must be multiples of it.
        recipe: what a recipe to train it is.
        names: how checkpoints of others call its parts.
        rewrites: the same where more than the beginning of names differs.
        any_depth: `adn.create_model` returns it converted; else it is for `adn.convert`.
        but: the arguments with some changed, where that is more than replacing them.
        background: how many classes it counts that are none of the data's.
        masks: does it learn from outlines of objects?
        of_size: the arguments for images of this size, where it resizes them itself.
    """

    build: Callable[..., nn.Module]
    args: Mapping[str, Any]
    task: str
    stride: int
    recipe: type[Settings]
    names: Sequence[Naming] = ()
    rewrites: Sequence[Rewrite] = ()
    any_depth: bool = False
    but: Callable[[Mapping[str, Any], Mapping[str, Any]], dict[str, Any]] = lambda args, changes: {**args, **changes}
    background: int = 0
    masks: bool = False
    of_size: Callable[[int], Mapping[str, Any]] = lambda size: {}

    def __call__(self, **changes: Any) -> nn.Module:
        """The plain model, with fresh weights."""
        return self.build(**self.but(self.args, changes))
