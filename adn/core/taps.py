"""Outputs of the stages, for whoever waits for them: once a forward, at every depth."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from adn_kernels.private import unseen

from .behaviours import Swapped

listeners = 0  # how many outputs of stages, of any net, are waited for


class StageEnd(Swapped):
    """What a stage ends with, its last refinement block: whoever wants the stage's output gets it here, whether or not
    the block runs.

    Compiled code does not look: the region's caller hands the output out.
    """

    fx_leaf = False
    order = 3

    @unseen
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        y = super().__call__(*args, **kwargs)
        if not torch.compiler.is_compiling():
            hand_out(self, y)
        return y


@unseen
def hand_out(end: nn.Module, output: torch.Tensor) -> None:
    listener = vars(end).get("_adn_listener")
    if listener is not None:
        listener(output)


@contextlib.contextmanager
def unheard(end: nn.Module) -> Iterator[None]:
    """Inside the block, outputs of `end` are parts of one that comes after it."""
    listener = vars(end).pop("_adn_listener", None)
    try:
        yield
    finally:
        if listener is not None:
            end.__dict__["_adn_listener"] = listener


def stage_end(block: nn.Module) -> nn.Module | None:
    """The end of a stage, if this is it or a wrapper around it."""
    return next((part for part in block.modules() if isinstance(part, StageEnd)), None)


@contextlib.contextmanager
def listening(block: nn.Module, listener: Callable[[torch.Tensor], None]) -> Iterator[None]:
    """While inside, the output of the stage that ends with `block` (or with what that wraps) goes to `listener`, at
    every depth: once a forward."""
    global listeners
    last: torch.Tensor | None = None

    def once(output: torch.Tensor) -> None:
        nonlocal last
        # A block that is not compiled hands out, and then so does who called it.
        if output is not last:
            last = output
            listener(output)

    end = stage_end(block)
    if end is None:
        raise RuntimeError("this net does not say where its stages end: an older version of this library converted it. "
                           "Save its state dict, convert a new model, and load it there")
    listeners += 1
    end.__dict__["_adn_listener"] = torch.compiler.disable(once)
    try:
        yield
    finally:
        listeners -= 1
        del end.__dict__["_adn_listener"]
