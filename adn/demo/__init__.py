"""The method on real data that needs no download, a module for each task."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from torch import nn

from ..measure.profile import Profile
from ..train.folder import holds_run, read_config


@dataclasses.dataclass(frozen=True)
class Demo:
    """What a demo gives: the net, accuracy and cost of its depths, and with `compare` the accuracies (percent) of
    networks trained separately, by what they are comparable to: "super" and "base"."""

    net: nn.Module
    profile: Profile
    separate: dict[str, float]


def is_demo(out: Path) -> bool:
    """Does the folder hold an earlier demo, which may be replaced?

    Raises:
        ValueError: if it holds another run.
    """
    again = bool((read_config(out) or {}).get("demo"))
    if not again and holds_run(out):
        raise ValueError(f"{out} holds another run; choose another folder with --out")
    return again
