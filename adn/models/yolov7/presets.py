"""YOLOv7 by name: arguments of `YOLOv7`."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn

from ..entry import Entry, Naming
from .recipes import RECIPES, YOLOv7Recipe

__all__ = ["ENTRIES", "RECIPES"]

# The first detector of DynamicDet.
NAMES: tuple[Naming, ...] = (("reference", "YOLOv7", ({"model_b": "backbone", "model_h": "head"},)),)


def _build(**kwargs: Any) -> nn.Module:
    from .model import YOLOv7

    return YOLOv7(**kwargs)


entry = partial(Entry, _build, task=YOLOv7Recipe.task, recipe=YOLOv7Recipe, names=NAMES)

ENTRIES = {
    "yolov7": entry({"table": "yolov7"}, stride=32),
    "yolov7x": entry({"table": "yolov7x"}, stride=32),
    "yolov7_w6": entry({"table": "yolov7_w6"}, stride=64),
}
