"""What deploy forms are made of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import nn


class Deploy(NamedTuple):
    """What a deploy form is made of, where that is not the whole model as it is.

    Attributes:
        part: the name of the module that becomes segments; all around it runs as it is. "" = the whole model.
        heads: names of modules of one input around it whose calls are put together, too.
        model: made into segments in its place.
        finish: what becomes of that one's outputs.
    """

    part: str = ""
    heads: tuple[str, ...] = ()
    model: nn.Module | None = None
    finish: Callable[[Any], Any] | None = None
