"""How YOLOv12 is trained: its settings, and the published ones by name."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from ...data.transforms import multi_scale_sizes
from ...settings import DetectorSettings, setting
from . import STRIDE

CLASS_FORMS = ("softmax", "sigmoid")


@dataclasses.dataclass(frozen=True)
class YOLORecipe(DetectorSettings):
    """Every setting of the training of a YOLOv12 that its numbers depend on. `YOLORecipe()` holds the published values
    of AnyDepth-YOLO L, but for what four processes share."""

    bias_ending: ClassVar[str] = ".bias"
    whole_norms: ClassVar[bool] = False

    model: str = "anydepth_yolov12l"
    epochs: int = 600
    batch_size: int = 16
    optimizer: str = "nesterov"
    lr: float = 0.01
    lr_min: float = 1e-4
    momentum: float = 0.937
    weight_decay: float = 5e-4
    norm_decay: float | None = 0.0
    bias_decay: float | None = 0.0
    nominal_batch: int | None = 256
    clip: float | None = 10.0
    schedule: str = "linear"
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
    copy_paste: float = 0.5
    scale: float = 0.9
    translate: float = 0.1
    plain_epochs: int = 10
    multi_scale: bool = False

    box: float = setting("loss", 7.5, "weight of boxes", least=0)
    classes: float = setting("loss", 0.5, "weight of classes", least=0)
    distances: float = setting("loss", 1.5, "weight of the distributions of distances", least=0)
    alpha: float = setting("loss", 0.2, "weight of the objects in what the base-net learns; the rest is distillation",
                           share=True)
    kd_box: float = setting("loss", 1.2, "weight of boxes in distillation", least=0)
    kd_classes: float = setting("loss", 0.4, "weight of classes in distillation", least=0)
    kd_distances: float = setting("loss", 0.8, "weight of the distributions of distances in distillation", least=0)
    kd_features: float = setting("loss", 0.4, "weight of pooled features in distillation", least=0)
    temperature: float = setting("loss", 2.0, "of the classes in distillation", least=0)
    distance_temperature: float = setting("loss", 1.0, "of the distributions of distances in distillation", least=0)
    kd_form: str = setting(
        "loss", "softmax", "how classes are distilled: as one distribution, as published, or each by itself, as the "
        "detector scores them", CLASS_FORMS)
    kd_scaled: bool = setting("loss", False, "the distances' divergence by the square of its temperature, as that of "
                              "classes has it; published without")

    def __post_init__(self) -> None:
        super().__post_init__()
        multi_scale_sizes(self.size, STRIDE)


RECIPES: dict[str, YOLORecipe] = {
    # For people's own images, the first; not from the papers.
    "yolo": YOLORecipe(model="anydepth_yolov12n", epochs=100, nominal_batch=64, blend=0.0, copy_paste=0.0),
    # As published, for 4 processes: on COCO, and from its weights on images of driving.
    "yolo-l-600": YOLORecipe(),
    "yolo-finetune": YOLORecipe(
        epochs=30, lr=1e-3, lr_min=1e-5, momentum=0.9, mosaic=0.0, blend=0.0, copy_paste=0.0, plain_epochs=0,
        kd_box=7.5, kd_classes=0.5, kd_distances=1.5, kd_features=0.1, distance_temperature=10.0),
    # A tiny detector for the scenes of `adn scenes`, on a CPU, see `adn demo --task detect`.
    "yolo-digits": YOLORecipe(
        model="anydepth_yolov12n", model_kwargs={"width": 0.25, "most": 256, "depth": 0.34}, epochs=5, batch_size=8,
        lr=0.02, nominal_batch=None, warmup_epochs=1, size=128, hue=0.0, saturation=0.0, brightness=0.0, mosaic=0.0,
        blend=0.0, copy_paste=0.0, scale=0.0, translate=0.0, flip=0.0, plain_epochs=0, ema_decay=0.99, ema_ramp=40,
        schedule="cosine"),
}
