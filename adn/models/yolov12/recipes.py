"""How YOLOv12 is trained: its settings, and the published ones by name."""

from __future__ import annotations

import dataclasses

from ...settings import DetectorSettings


@dataclasses.dataclass(frozen=True)
class YOLORecipe(DetectorSettings):
    """Every setting of the training of a YOLOv12 that its numbers depend on."""

    model: str = "anydepth_yolov12l"


RECIPES: dict[str, YOLORecipe] = {}
