"""The losses of YOLOv12, against the objects and, of the base-net, against the super-net."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...detect.boxes import complete_iou, widened
from ...detect.targets import Padded, Targets, fitting, pack, padded
from .assign import Assigned, assign
from .head import BINS, STRIDES, anchors, corners
from .recipes import CLASS_FORMS

Outputs = Mapping[str, Any]


class Predictions(NamedTuple):
    """What the maps of a batch say, cell by cell.

    Attributes:
        bins: (B, A, 4, BINS), logits of distances.
        logits: (B, A, C), of classes.
        boxes: (B, A, 4) xyxy, in units of the strides.
        centres: (A, 2), in units of the strides.
        strides: (A, 1), in pixels.
    """

    bins: Tensor
    logits: Tensor
    boxes: Tensor
    centres: Tensor
    strides: Tensor

    @classmethod
    def of(cls, maps: Sequence[Tensor]) -> Predictions:
        maps = [widened(x) for x in maps]
        flat = torch.cat([x.flatten(2) for x in maps], 2).transpose(1, 2)
        bins = flat[..., : 4 * BINS].unflatten(-1, (4, BINS))
        centres, strides = anchors(maps)
        distances = bins.softmax(-1) @ torch.arange(BINS, dtype=bins.dtype, device=bins.device)
        boxes = corners(distances.transpose(1, 2), centres).transpose(1, 2)
        return cls(bins, flat[..., 4 * BINS :], boxes, centres.T, strides.T)

    def assign(self, objects: Padded) -> Assigned:
        return assign(self.logits.detach().sigmoid(), self.boxes.detach() * self.strides,
                      self.centres * self.strides, objects)


class DetectionLoss(nn.Module):
    """Of classes, boxes and the distributions of their distances; each the sum over the batch's images, as published.

    Args:
        box, classes, distances: weights.
    """

    summed = True

    def __init__(self, box: float = 7.5, classes: float = 0.5, distances: float = 1.5) -> None:
        super().__init__()
        self.box, self.classes, self.distances = box, classes, distances

    def forward(self, outputs: Outputs, targets: Targets) -> dict[str, Tensor]:
        """
        Args:
            outputs: `maps` of the three strides.
            targets: of the images, see `Detector.distillation`.

        Returns:
            `loss_box`, `loss_class`, `loss_distance`, weighted: scalars.
        """
        found = Predictions.of(outputs["maps"])
        return self.of(found, found.assign(objects_of(outputs["maps"], targets)))

    def of(self, found: Predictions, assigned: Assigned) -> dict[str, Tensor]:
        images, total = len(found.logits), assigned.weight.sum().clamp(min=1)
        wanted = torch.zeros_like(found.logits).scatter_(
            2, assigned.labels[..., None], assigned.weight[..., None].to(found.logits.dtype))
        classes = F.binary_cross_entropy_with_logits(found.logits, wanted, reduction="sum") / total
        # Of all cells, those without an object by 0: how many there are, the device alone knows.
        boxes = assigned.boxes / found.strides
        box = ((1 - complete_iou(found.boxes, boxes)) * assigned.weight).sum() / total
        start, end = boxes.chunk(2, -1)
        far = torch.cat((found.centres - start, end - found.centres), -1).clamp(0, BINS - 1.01)
        distance = (_between_bins(found.bins, far).mean(-1) * assigned.weight).sum() / total
        return {"loss_box": images * self.box * box, "loss_class": images * self.classes * classes,
                "loss_distance": images * self.distances * distance}


class DistillationLoss(nn.Module):
    """What the base-net learns from the super-net, where both have an object, or the super-net alone, and not different
    ones: classes, boxes, distributions of distances, and the direction of pooled features. Each is the sum over the
    batch's images, as published.

    Args:
        box, classes, distances, features: weights.
        temperature: of the classes.
        distance_temperature: of the distributions.
        form: of the classes: "softmax", one distribution over all of them, as the published code has it; "sigmoid", the
            sum over two for each of them, as the detector's scores are.
        scaled: multiply the divergence of the distributions by the square of their temperature, as that of classes;
            the published code does not.
    """

    def __init__(self, box: float = 1.2, classes: float = 0.4, distances: float = 0.8, features: float = 0.4,
                 temperature: float = 2.0, distance_temperature: float = 1.0, form: str = "softmax",
                 scaled: bool = False) -> None:
        super().__init__()
        if form not in CLASS_FORMS:
            raise ValueError(f"form={form!r}; pass one of {', '.join(CLASS_FORMS)}")
        self.form, self.scaled = form, scaled
        self.box, self.classes, self.distances, self.features = box, classes, distances, features
        self.temperature, self.distance_temperature = temperature, distance_temperature

    def forward(self, of_base: Outputs, of_super: Outputs, targets: Targets) -> dict[str, Tensor]:
        """
        Returns:
            `kd_box`, `kd_class`, `kd_distance`, `kd_feature`, weighted: scalars.
        """
        base, teacher = Predictions.of(of_base["maps"]), Predictions.of([x.detach() for x in of_super["maps"]])
        objects = objects_of(of_base["maps"], targets)
        return self.of(base, base.assign(objects), teacher, teacher.assign(objects)) | {
            "kd_feature": self.feature_term(of_base["features"], of_super["features"])}

    def of(self, base: Predictions, of_base: Assigned, teacher: Predictions, of_super: Assigned) -> dict[str, Tensor]:
        images, both = len(base.logits), of_super.positive & of_base.positive
        conflict = both & (of_super.slot != of_base.slot)
        weight = of_super.weight.where(~conflict, 0)
        # The box and its distances only if there are some of both anywhere, as that of the classes.
        of_classes, of_boxes = weight.where(of_super.positive, 0), weight.where(both, 0)
        t = self.temperature
        classes = (_kl if self.form == "softmax" else _kl_each)(teacher.logits / t, base.logits / t) * t**2
        box = 1 - complete_iou(base.boxes, teacher.boxes)
        t = self.distance_temperature
        distance = _kl(teacher.bins / t, base.bins / t).mean(-1) * (t**2 if self.scaled else 1)
        return {"kd_box": images * self.box * _mean(box, of_boxes),
                "kd_class": images * self.classes * _mean(classes, of_classes),
                "kd_distance": images * self.distances * _mean(distance, of_boxes)}

    def feature_term(self, of_base: Sequence[Tensor], of_super: Sequence[Tensor]) -> Tensor:
        """Of maps (B, C, h, w), the squared distance of their unit vectors, mean over images and maps."""
        terms = [(_direction(a) - _direction(b.detach())).square().sum(1).mean()
                 for a, b in zip(of_base, of_super, strict=True)]
        return len(of_base[0]) * self.features * torch.stack(terms).mean()


def objects_of(maps: Sequence[Tensor], targets: Targets) -> Padded:
    height, width = (n * STRIDES[0] for n in maps[0].shape[-2:])
    packed = pack(fitting(targets, len(maps[0])), maps[0].device, widened(maps[0]).dtype)
    return padded(packed, width, height)


def _between_bins(bins: Tensor, distances: Tensor) -> Tensor:
    """Cross-entropy with the two bins next to each distance, weighted by how near they are (distribution focal loss).

    Args:
        bins: (..., BINS) logits.
        distances: (...), in 0 to BINS - 1.

    Returns:
        (...).
    """
    lower = distances.long()
    share = lower + 1 - distances
    log = bins.log_softmax(-1)
    first, second = (-log.gather(-1, (lower + i)[..., None])[..., 0] for i in (0, 1))
    return first * share + second * (1 - share)


def _kl(teacher: Tensor, student: Tensor) -> Tensor:
    """Of distributions in the last dimension, from logits."""
    log = teacher.log_softmax(-1)
    return (log.exp() * (log - student.log_softmax(-1))).sum(-1)


def _kl_each(teacher: Tensor, student: Tensor) -> Tensor:
    """The sum over the last dimension, each a distribution of two, from its logit."""
    yes, no = teacher.sigmoid(), (-teacher).sigmoid()
    return (yes * (F.logsigmoid(teacher) - F.logsigmoid(student))
            + no * (F.logsigmoid(-teacher) - F.logsigmoid(-student))).sum(-1)


def _mean(values: Tensor, weight: Tensor) -> Tensor:
    return (values * weight).sum() / weight.sum().clamp(min=1)


def _direction(x: Tensor) -> Tensor:
    return F.normalize(x.flatten(2).mean(2) if x.ndim > 2 else x, dim=1)
