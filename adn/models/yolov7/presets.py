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


def _of_cascade(fusions: tuple[int, ...], offset: int, layers: int) -> Naming:
    """Names of all of it. Of its second backbone the first five entries are links, and those that add what links give
    have numbers of their own.

    Args:
        fusions: these.
        offset: the number of the second backbone's first layer, less that of the same layer of the first one.
        layers: of the second backbone, with all these.
    """
    table = {"model_b": "backbone", "model_h": "answer.routes.0.head", "model_h2": "answer.routes.1.head"}
    table |= {f"model_b2.{i}": f"answer.routes.1.links.linears.{i}" for i in range(5)}
    number = 5 - offset
    for i in range(5, layers):
        if i not in fusions:
            table[f"model_b2.{i}"] = f"answer.routes.1.backbone.{number}"
            number += 1
    return "reference", f"DynamicDet of {layers} layers", (table,)


CASCADES: dict[str, Naming] = {
    "yolov7": _of_cascade((7, 10, 24, 38, 52), 5, 61), "yolov7x": _of_cascade((7, 10, 26, 42, 58), 5, 69),
    "yolov7_w6": _of_cascade((7, 17, 27, 37, 47), 4, 56)}


def _build(**kwargs: Any) -> nn.Module:
    from .model import YOLOv7

    return YOLOv7(**kwargs)


def _build_cascade(**kwargs: Any) -> nn.Module:
    from .model import YOLOv7, YOLOv7Cascade

    return YOLOv7Cascade(YOLOv7(**kwargs), YOLOv7(**kwargs))


entry = partial(Entry, _build, task=YOLOv7Recipe.task, recipe=YOLOv7Recipe, names=NAMES)

ENTRIES = {
    "yolov7": entry({"table": "yolov7"}, stride=32),
    "yolov7x": entry({"table": "yolov7x"}, stride=32),
    "yolov7_w6": entry({"table": "yolov7_w6"}, stride=64),
    **{f"dy{table}": Entry(_build_cascade, {"table": table}, task=YOLOv7Recipe.task, stride=64 if "w6" in table else 32,
                           recipe=YOLOv7Recipe, names=(names,), any_depth=True) for table, names in CASCADES.items()},
}
