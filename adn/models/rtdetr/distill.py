"""What a step of training a detector computes: the detectors' `adn.SelfDistillation`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ...detect.targets import Targets
from ...detect.training import Step, Supervised, prefixed
from ...distill import TwoPass
from . import STRIDE
from .criterion import DetectionLoss, DistillationLoss, Outputs


class _Step(Step):
    """How a pass through an RT-DETR is drawn."""

    def __init__(self, net: nn.Module, criterion: DetectionLoss | None = None, *, multi_scale: Sequence[int] = (),
                 generator: torch.Generator | None = None) -> None:
        super().__init__(net, DetectionLoss() if criterion is None else criterion, STRIDE, multi_scale, generator)

    def _run(self, images: torch.Tensor, targets: Targets) -> Outputs:
        """One pass, at a size and with denoising queries of its own."""
        return self.net(self._resized(images), targets, draws=self.generator)

    def _reaching_all(self, loss: torch.Tensor, outputs: Outputs) -> torch.Tensor:
        """The loss, so that several processes can average gradients.

        Without denoising queries (no object in a process's batch, or none asked for) their parameters have no gradient;
        DistributedDataParallel waits for one of every parameter.
        """
        alone = not (dist.is_available() and dist.is_initialized())
        if alone or "dn_aux_outputs" in outputs:
            return loss
        return loss + 0 * sum(p.sum() for p in self.net.parameters() if p.requires_grad)


class DetectionSupervised(_Step, Supervised):
    """The training loss of a plain detector, the counterpart of `DetectionDistillation`.

        step = DetectionSupervised(net)
        step(images, targets)["loss"].backward()

    Args, and what images and targets are: as for `DetectionDistillation`; what a call returns: see `Supervised`.
    """


class DetectionDistillation(_Step, TwoPass):
    """The training loss of an any-depth detector: `loss = criterion(super) + distillation(base, super)`.

        kd = DetectionDistillation(net)
        losses = kd(images, targets)         # runs the super-net, then the base-net
        losses["loss"].backward()

    The two passes differ in the size of the images, if `multi_scale`, and in the random numbers of the denoising
    queries. For many GPUs wrap this module, not the net, in DistributedDataParallel. `backward` is the way with a lower
    peak of memory.

    Args:
        net: a converted detector: `net(images, targets, draws=...)` in training returns what `DistillationLoss` takes.
            How many layers of its decoder run in training is its own setting.
        criterion: of the super-net; None = `DetectionLoss()`.
        distillation: of the base-net; None = `DistillationLoss()`.
        multi_scale: sides that images are resized to (nearest neighbour), one drawn for each pass; `multi_scale_sizes`
            gives the published ones. () = as they come.
        generator: of the sizes and the denoising queries; None = the global ones. May be changed at any time.

    Returns (of a call):
        A dict of scalars: every weighted term by the name its criterion gives, prefixed `super.` or `base.`; the sums
        `super` and `base`; their sum `loss`.

    Raises:
        ValueError: sizes that are no multiples of 32; of a call and of `backward`, targets that do not fit the net.
        FloatingPointError: of these, if predictions are not finite.
    """

    def __init__(self, net: nn.Module, criterion: DetectionLoss | None = None,
                 distillation: DistillationLoss | None = None, *, multi_scale: Sequence[int] = (),
                 generator: torch.Generator | None = None) -> None:
        super().__init__(net, criterion, multi_scale=multi_scale, generator=generator)
        self.distillation = DistillationLoss() if distillation is None else distillation

    def _super_terms(self, of_super: Outputs, targets: Targets) -> dict[str, torch.Tensor]:
        return prefixed("super", self.criterion(of_super, targets))

    def _base_terms(self, of_base: Outputs, targets: Targets, of_super: Outputs) -> dict[str, torch.Tensor]:
        return prefixed("base", self.distillation(of_base, targets, of_super))

    def _teaching(self, of_super: Outputs) -> dict[str, Any]:
        kept = {name: of_super[name].detach() for name in ("pred_logits", "pred_boxes")}
        return kept | {name: [map.detach() for map in of_super[name]]
                       for name in ("backbone_features", "encoder_features") if name in of_super}
