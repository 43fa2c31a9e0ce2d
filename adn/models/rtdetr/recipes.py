"""How RT-DETR is trained: its settings, and the published ones by name."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from ...data.transforms import multi_scale_sizes
from ...settings import DetectorSettings, setting
from . import STRIDE

CLASS_KL = ("softmax-mean", "softmax", "sigmoid")


@dataclasses.dataclass(frozen=True)
class DetectionRecipe(DetectorSettings):
    """Every setting of the training of an RT-DETR that its numbers depend on. `DetectionRecipe()` holds the published
    values of AnyDepth-DETR R50, but for what four processes share."""

    bias_ending: ClassVar[str] = "bias"
    whole_norms: ClassVar[bool] = True

    model: str = "anydepth_rtdetr_r50vd"
    epochs: int = 72
    batch_size: int = 4
    optimizer: str = "adamw"
    lr: float = 1e-4
    backbone_lr: float | None = setting("optimisation", 1e-5, "learning rate of a detector's backbone; none = the same",
                                        least=0)
    norm_decay: float | None = 0.0
    bias_decay: float | None = 0.0
    clip: float | None = 0.1
    schedule: str = "constant"
    ema: bool = True
    ema_decay: float = 0.9999
    ema_every: int = 1
    ema_ramp: int = 2000

    class_kl: str = setting("loss", "softmax-mean", "how the super-net's classes are distilled, see "
                             "adn.models.rtdetr.criterion.DistillationLoss", CLASS_KL)
    cut_decoder: bool = setting(
        "loss", False, "train the base-net's decoder at the number of layers it has, not at all of them; measured on "
        "scenes of digits, this costs accuracy at every depth")

    def __post_init__(self) -> None:
        super().__post_init__()
        multi_scale_sizes(self.size, STRIDE)

    @property
    def rates(self) -> dict[str, float]:
        return {} if self.backbone_lr is None else {"backbone.": self.backbone_lr}


RECIPES: dict[str, DetectionRecipe] = {
    # For people's own images, best with weights to start from; not from the papers.
    "detector": DetectionRecipe(epochs=50),
    # As published, for 4 processes.
    "rtdetr-r50-72": DetectionRecipe(twins="frozen", sync_bn=True),
    "rtdetr-r101-72": DetectionRecipe(model="anydepth_rtdetr_r101vd", twins="frozen", sync_bn=True, batch_size=8,
                                      lr=2e-4, backbone_lr=2e-6, weight_decay=2e-4, bias_decay=None),
    # A tiny detector for the scenes of `adn scenes`, on a CPU: without augmentation, as scenes differ enough, and in
    # small batches, as the number of steps counts.
    "digits": DetectionRecipe(
        model="rtdetr_r18vd", epochs=9, batch_size=8, lr=2.5e-3, backbone_lr=None, distort=0.0, zoom_out=0.0, crop=0.0,
        flip=0.0, size=128, multi_scale=False, ema_every=5, ema_decay=0.99, ema_ramp=40, schedule="cosine",
        model_kwargs={
            "backbone_args": {"width": 16}, "hidden": 64, "decoder_hidden": 64, "heads": 4, "feedforward": 128,
            "decoder_feedforward": 128, "decoder_layers": 3, "queries": 50, "num_denoising": 50}),
}
