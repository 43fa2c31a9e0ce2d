"""What a step of training a YOLOv12 computes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...detect.targets import Targets
from ...detect.training import Step, prefixed
from ...distill import TwoPass
from . import STRIDE
from .criterion import DetectionLoss, DistillationLoss, Outputs


class YOLODistillation(Step, TwoPass):
    """The training loss of an any-depth YOLOv12: `criterion(super) + alpha criterion(base) + (1 - alpha)
    distillation(base, super)`.

        kd = YOLODistillation(net)
        losses = kd(images, targets)         # runs the super-net, then the base-net, on the same images
        losses["loss"].backward()

    Args:
        net: a converted `YOLOv12`.
        criterion: None = `DetectionLoss()`.
        distillation: None = `DistillationLoss()`.
        alpha: weight of the objects in what the base-net learns, in 0..1.
        multi_scale: sides that images are resized to (nearest neighbour), one drawn for each step; () = as they come.
        generator: of the sizes; None = the global one.

    Returns (of a call):
        A dict of scalars: every weighted term by the name its criterion gives, prefixed `super.` or `base.`; the sums
        `super` and `base`; their sum `loss`.

    Raises:
        ValueError: settings out of range; of a call and of `backward`, targets that do not fit the images.
    """

    def __init__(self, net: nn.Module, criterion: DetectionLoss | None = None,
                 distillation: DistillationLoss | None = None, *, alpha: float = 0.2, multi_scale: Sequence[int] = (),
                 generator: torch.Generator | None = None) -> None:
        super().__init__(net, DetectionLoss() if criterion is None else criterion, STRIDE, multi_scale, generator)
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha={alpha}; pass a weight between 0 and 1")
        self.distillation = DistillationLoss() if distillation is None else distillation
        self.alpha = alpha

    def forward(self, x: Tensor, y: Targets) -> dict[str, Tensor]:
        return super().forward(self._resized(x), y)

    def backward(self, x: Tensor, y: Targets, scaler: Any = None) -> dict[str, Tensor]:
        return super().backward(self._resized(x), y, scaler)

    def _super_terms(self, of_super: Outputs, targets: Targets) -> dict[str, Tensor]:
        return prefixed("super", self.criterion(of_super, targets))

    def _base_terms(self, of_base: Outputs, targets: Targets, of_super: Outputs) -> dict[str, Tensor]:
        of_objects = {name: self.alpha * value for name, value in self.criterion(of_base, targets).items()}
        taught = {name: (1 - self.alpha) * value
                  for name, value in self.distillation(of_base, of_super, targets).items()}
        return prefixed("base", {**of_objects, **taught})

    def _teaching(self, of_super: Outputs) -> dict[str, list[Tensor]]:
        return {name: [x.detach() for x in of_super[name]] for name in ("maps", "features")}
