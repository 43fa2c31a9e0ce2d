"""YOLOv12 and AnyDepth-YOLO by name: arguments of `YOLOv12`."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn

from ..entry import Entry
from . import STRIDE
from .recipes import RECIPES, YOLORecipe

__all__ = ["ENTRIES", "LOOKS", "RECIPES"]


def _build(**kwargs: Any) -> nn.Module:
    from .model import YOLOv12

    return YOLOv12(**kwargs)


entry = partial(Entry, _build, task=YOLORecipe.task, stride=STRIDE, recipe=YOLORecipe)

_THICK: dict[str, Any] = {"c3k": True}
_LARGE = {**_THICK, "residual": True, "mlp_ratio": 1.5}
_SCALES: dict[str, dict[str, Any]] = {
    "n": {"depth": 0.5, "width": 0.25},
    "s": {"depth": 0.5, "width": 0.5},
    "m": {"depth": 0.5, "width": 1.0, "most": 512, **_THICK},
    "l": {"depth": 1.0, "width": 1.0, "most": 512, **_LARGE},
    "x": {"depth": 1.0, "width": 1.5, "most": 512, **_LARGE},
}
# Of the any-depth nets, which all have the shortcuts around attention; small ones are deeper.
_ANY_DEPTH: dict[str, dict[str, Any]] = {
    "n": {"depth": 0.75, "width": 0.25, "residual": True},
    "s": {"depth": 1.0, "width": 0.5, "most": 512, "residual": True},
    "l": _SCALES["l"],
    "x": _SCALES["x"],
}

LOOKS = ((r"^(model\.)*\d+\.(cv2|conv)\.", "a YOLO"),)
ENTRIES = {
    **{f"yolov12{scale}": entry(args) for scale, args in _SCALES.items()},
    # The package's large ones have narrower perceptrons: of 1.2, as their number of parameters shows.
    **{f"yolo12{scale}": entry({**args, "packed": True, **({"mlp_ratio": 1.2} if "mlp_ratio" in args else {})})
       for scale, args in _SCALES.items()},
    **{f"anydepth_yolov12{scale}": entry({**args, "split": "inside"}, any_depth=True)
       for scale, args in _ANY_DEPTH.items()},
    **{f"anydepth_yolov12{scale}_orig": entry({**args, "split": "blocks"}, any_depth=True)
       for scale, args in _ANY_DEPTH.items()},
}
