"""How YOLOv7 is trained: its settings, and the published ones by name."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from ...data.transforms import multi_scale_sizes
from ...settings import DetectorSettings, setting

_STRIDE = 32  # of the smaller ones; the largest one asks for twice as much itself


@dataclasses.dataclass(frozen=True)
class YOLOv7Recipe(DetectorSettings):
    """Every setting of the training of a YOLOv7 that its numbers depend on. `YOLOv7Recipe()` holds the published
    values, but for what eight processes share, and two things: weights decay by the 5e-4 whatever the batch, not by
    1e-3 at 128 images, and no objects of other images are pasted in."""

    bias_ending: ClassVar[str] = ".bias"
    whole_norms: ClassVar[bool] = False

    model: str = "dyyolov7"
    epochs: int = 300
    batch_size: int = 16
    optimizer: str = "nesterov"
    lr: float = 0.01
    lr_min: float = 1e-3
    momentum: float = 0.937
    weight_decay: float = 5e-4
    norm_decay: float | None = 0.0
    bias_decay: float | None = 0.0
    nominal_batch: int | None = 64
    schedule: str = "cosine"
    each_step: bool = True
    warmup_epochs: int = 3
    warmup_factor: float = 0.0
    warmup_momentum: float | None = 0.8
    ema: bool = True
    ema_decay: float = 0.9999
    ema_every: int = 1
    ema_ramp: int = 2000

    distort: float = 0.0
    zoom_out: float = 0.0
    crop: float = 0.0
    hue: float = 0.015
    saturation: float = 0.7
    brightness: float = 0.4
    mosaic: float = 1.0
    blend: float = 0.15
    scale: float = 0.9
    translate: float = 0.2
    multi_scale: bool = False

    box: float = setting("loss", 0.05, "weight of boxes", least=0)
    objectness: float = setting("loss", 0.7, "weight of objectness", least=0)
    classes: float = setting("loss", 0.3, "weight of classes", least=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        multi_scale_sizes(self.size, _STRIDE)


RECIPES: dict[str, YOLOv7Recipe] = {
    # Step 1 of the published training of a cascade; step 2 is `adn route fit`.
    "dyyolov7": YOLOv7Recipe(),
    # A cascade of scenes of digits, small enough for a CPU; objectness, which is scaled by the size of the images, and
    # classes count more than published.
    "dyyolov7-digits": YOLOv7Recipe(
        model="dyyolov7", model_kwargs={"width": 0.25}, size=128, epochs=12, batch_size=8, optimizer="adamw", lr=2e-3,
        lr_min=2e-5, nominal_batch=None, warmup_epochs=1, ema_decay=0.99, ema_ramp=40, flip=0.0, hue=0.0,
        saturation=0.0, brightness=0.0, mosaic=0.0, blend=0.0, scale=0.0, translate=0.0, objectness=10.0, classes=2.4),
}
