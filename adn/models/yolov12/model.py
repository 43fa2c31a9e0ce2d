"""YOLOv12 in the form of its repository and in that of the package."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from ...core.regions import only_calls
from ...detect.detector import Detector, checked
from ...detect.targets import Targets
from ...detect.training import Supervised, losses_alone
from . import STRIDE
from .criterion import DetectionLoss, DistillationLoss
from .distill import YOLODistillation
from .head import Detect
from .layers import A2C2f, C3k2, Conv
from .postprocess import postprocess
from .recipes import YOLORecipe

AREAS = 4  # of the attention at stride 16
# Layers of the backbone whose maps the neck reads again, and those of the neck; its last three are the head's.
LATERAL, NECK = (6, 4), (11, 14, 17, 20)
# Layers whose outputs the loss of distillation compares.
COMPARED = (6, 8, 14, 17, 20)


class Concat(nn.Module):
    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        return torch.cat(maps, 1)


class YOLOv12(Detector):
    """A detector: images (B, 3, H, W), RGB in 0..1, sides multiples of 32, to maps of boxes and classes.

    In evaluation a dict: `maps`, per stride (8, 16, 32) a tensor (B, 64 + C, h, w), 16 bins for each of the distances
    to the left, top, right and bottom, then logits of classes; `decoded` (B, 4 + C, A), for all cells, map by map and
    row by row, the centre, width and height of a box in pixels and the scores of the classes. In training `maps`, and
    `features`, the five maps that distillation compares.

    Args:
        num_classes: C.
        depth: of the published numbers of blocks, which part.
        width: of the published numbers of channels, which part, rounded up to multiples of 8.
        most: channels before that, at most.
        c3k: blocks at strides 4 and 8 are made of three convolutions and two bottlenecks, not of a bottleneck.
        residual: layers of attention have a scaled shortcut around them.
        mlp_ratio: of the perceptrons.
        packed: the form of the package: one convolution for queries, keys and values, a positional one of 7x7, no
            groups in the first layers.
        split: how a converted net shortens the layers of C3k blocks at strides 4, 8 and 32: "blocks", by leaving out
            the last of them, or "inside", each by its last bottleneck; None = "blocks" where there are several.
    """

    stride = STRIDE
    letterbox = True
    postprocess = staticmethod(postprocess)
    class_heads = tuple(f"model.21.cv3.{i}" for i in range(3))

    def __init__(
        self, *, num_classes: int = 80, depth: float = 1.0, width: float = 1.0, most: int = 1024, c3k: bool = False,
        residual: bool = False, mlp_ratio: float = 2.0, packed: bool = False, split: str | None = None,
    ) -> None:
        super().__init__()
        self.num_classes, self.split = num_classes, split

        def channels(count: int) -> int:
            return math.ceil(min(count, most) * width / 8) * 8

        def blocks(count: int) -> int:
            return max(round(count * depth), 1)

        c64, c128, c256, c512, c1024 = map(channels, (64, 128, 256, 512, 1024))
        two, four = blocks(2), blocks(4)
        attention: dict[str, Any] = {"residual": residual, "mlp_ratio": mlp_ratio, "packed": packed}
        self.model = nn.ModuleList([
            Conv(3, c64, 3, 2),
            Conv(c64, c128, 3, 2, groups=1 if packed else 2),
            C3k2(c128, c256, two, c3k, expansion=0.25),
            Conv(c256, c256, 3, 2, groups=1 if packed else 4),
            C3k2(c256, c512, two, c3k, expansion=0.25),
            Conv(c512, c512, 3, 2),
            A2C2f(c512, c512, four, area=AREAS, **attention),
            Conv(c512, c1024, 3, 2),
            A2C2f(c1024, c1024, four, area=1, **attention),
            nn.Upsample(scale_factor=2), Concat(),
            A2C2f(c1024 + c512, c512, two),
            nn.Upsample(scale_factor=2), Concat(),
            A2C2f(2 * c512, c256, two),
            Conv(c256, c256, 3, 2), Concat(),
            A2C2f(c256 + c512, c512, two),
            Conv(c512, c512, 3, 2), Concat(),
            C3k2(c512 + c1024, c1024, two, c3k=True),
            Detect((c256, c512, c1024), num_classes, box_bias=2.0 if packed else 1.0),
        ])

    @only_calls
    def forward(self, images: Tensor) -> dict[str, Any]:
        x = checked(images, STRIDE)
        kept: dict[int, Tensor] = {}
        for i, layer in enumerate(self.model[:-1]):
            x = layer([x, kept[_JOINED[i]]] if i in _JOINED else x)
            kept[i] = x
        outputs = self.model[-1]([kept[i] for i in NECK[1:]])
        return outputs | {"features": [kept[i] for i in COMPARED]} if self.training else outputs

    def reset_classifier(self, num_classes: int) -> None:
        self.num_classes = num_classes
        self.model[-1].reset_classifier(num_classes)

    def losses(self, outputs: Mapping[str, Any], targets: Targets) -> Tensor:
        return losses_alone(DetectionLoss(), {"maps": outputs["maps"]}, targets)

    def supervised(self, recipe: YOLORecipe, sizes: Sequence[int]) -> nn.Module:
        return Supervised(self, DetectionLoss(recipe.box, recipe.classes, recipe.distances), STRIDE, sizes)

    def distillation(self, recipe: YOLORecipe, sizes: Sequence[int]) -> nn.Module:
        return YOLODistillation(
            self, DetectionLoss(recipe.box, recipe.classes, recipe.distances),
            DistillationLoss(recipe.kd_box, recipe.kd_classes, recipe.kd_distances, recipe.kd_features,
                             recipe.temperature, recipe.distance_temperature, recipe.kd_form, recipe.kd_scaled),
            alpha=recipe.alpha, multi_scale=sizes)


fx.wrap("checked")

# What layers concatenate with the output of the one before.
_JOINED = {10: 6, 13: 4, 16: 11, 19: 8}
