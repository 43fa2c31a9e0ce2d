"""How torchvision's detectors are trained: settings, and the published ones by name."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from ...detect.distill import BASES
from ...settings import DetectorSettings, setting

LEVELS = ("foreground", "all")


@dataclasses.dataclass(frozen=True)
class TorchvisionRecipe(DetectorSettings):
    """Every setting of the training of a detector of torchvision that its numbers depend on. `TorchvisionRecipe()`
    holds those of the any-depth RetinaNet's step, for people's own images."""

    bias_ending: ClassVar[str] = ".bias"
    whole_norms: ClassVar[bool] = False

    model: str = "fasterrcnn_resnet50_fpn_v2"
    epochs: int = 26
    batch_size: int = 4
    optimizer: str = "momentum"
    lr: float = 0.01
    schedule: str = "steps"
    milestones: tuple[int, ...] = (16, 22)
    warmup_epochs: int = 1
    warmup_factor: float = 0.001
    each_step: bool = True

    distort: float = 0.0
    zoom_out: float = 0.0
    crop: float = 0.0
    size: int = setting("images", 800, "shorter side of images; the longer one is 5/3 of it at most", least=32)
    multi_scale: bool = False

    alpha: float = setting("loss", 0.5, "weight of the super-net; the rest is the base-net's", share=True)
    levels: str | None = setting(
        "loss", None, "which maps of the pyramid are compared: that with most anchors on objects, or all; none = the "
        "first where the detector tells, else all", LEVELS)
    base: str = setting("loss", "own+features", "what the base-net learns from: its own losses and the super-net's "
                        "maps, or the maps alone", BASES)
    kd: float = setting("loss", 1.0, "weight of the maps in what the base-net learns", least=0)
    temperature: float = setting("loss", 1.0, "of the maps in distillation", least=0)


RECIPES: dict[str, TorchvisionRecipe] = {
    # For people's own images, best with weights to start from; not from the papers.
    "torchvision": TorchvisionRecipe(epochs=26),
    # As published, for 4 processes: 26 epochs on COCO, from an any-depth backbone.
    "retinanet-26": TorchvisionRecipe(model="anydepth_retinanet_resnet50_fpn", twins="frozen"),
    # A small detector for the scenes of `adn scenes`, on a CPU: without augmentation, as scenes differ enough.
    "torchvision-digits": TorchvisionRecipe(
        model="fasterrcnn_resnet18_fpn", epochs=4, lr=0.02, clip=5.0, schedule="cosine", flip=0.0, size=128,
        model_kwargs={"channels": 64, "smallest_anchor": 12, "box_batch_size_per_image": 64,
                      "rpn_pre_nms_top_n_train": 400, "rpn_post_nms_top_n_train": 200, "rpn_pre_nms_top_n_test": 200,
                      "rpn_post_nms_top_n_test": 100}),
}
