"""The losses of YOLOv7."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import box_convert

from ...detect.boxes import complete_iou, widened
from ...detect.targets import Targets, fitting, pack, padded
from .assign import assign, candidates
from .layers import ANCHORS, STRIDES, boxes_of

# Of the objectness of each map, by their number.
BALANCE = {3: (4.0, 1.0, 0.4), 4: (4.0, 1.0, 0.25, 0.06)}


class DetectionLoss(nn.Module):
    """Of boxes, objectness and classes: means over the batch, times the number of its images, as published.

    Args:
        anchors: (levels, 3, 2), width and height of boxes in pixels; dimensions of 1 between these do not matter.
        box, objectness, classes: weights at three maps, images of 640 pixels, 80 classes.
        size: side of the images in pixels.
    """

    summed = True
    anchors: Tensor

    def __init__(self, anchors: Tensor, box: float = 0.05, objectness: float = 0.7, classes: float = 0.3,
                 size: int = 640) -> None:
        super().__init__()
        self.register_buffer("anchors", anchors.detach().reshape(-1, 1, ANCHORS, 1, 1, 2).clone(), persistent=False)
        share = 3 / len(anchors)
        self.box, self.objectness, self.classes = box * share, objectness * share * (size / 640) ** 2, classes * share

    def forward(self, maps: Sequence[Tensor], targets: Targets) -> dict[str, Tensor]:
        """
        Args:
            maps: raw ones, of a net in training.
            targets: of the images, see `Detector.distillation`.

        Returns:
            `box`, `obj`, `cls`, weighted: scalars.

        Raises:
            ValueError: targets do not fit the images.
        """
        maps = [widened(x) for x in maps]
        height, width = (n * STRIDES[0] for n in maps[0].shape[2:4])
        objects = padded(pack(fitting(targets, len(maps[0])), maps[0].device, maps[0].dtype), width, height)
        found = candidates(objects, self.anchors, [x.shape[2:4] for x in maps])
        boxes = _at(found.cell, [box_convert(x, "cxcywh", "xyxy") for x in boxes_of(maps, self.anchors)])
        logits = _at(found.cell, [x[..., 4:] for x in maps])
        assigned = assign(logits, boxes, found, objects)
        # Of all candidates, those without an object by 0: how many there are, the device alone knows.
        positive = assigned.positive.to(boxes.dtype)
        overlap = complete_iou(boxes, assigned.boxes) * positive
        wanted = torch.zeros_like(logits[..., 1:]).scatter_(2, assigned.labels[..., None], 1)
        classes = F.binary_cross_entropy_with_logits(logits[..., 1:], wanted, reduction="none").mean(-1) * positive
        # A cell that learns several objects is to be as sure as it overlaps the one that it overlaps most.
        sure = maps[0].new_zeros(len(boxes), sum(x[0, ..., 0].numel() for x in maps)).scatter_reduce_(
            1, found.cell, overlap.detach().clamp(min=0), "amax")
        parts = sure.split([x[0, ..., 0].numel() for x in maps], 1)
        objectness = torch.stack([F.binary_cross_entropy_with_logits(x[..., 4].flatten(1), part)
                                  for x, part in zip(maps, parts)])
        # By map: of cells with an object their number, and the sums over them.
        of_levels = len(maps), found.cell.shape[1] // len(maps)
        count, box, entropy = (x.unflatten(1, of_levels).sum((0, 2)) for x in (positive, positive - overlap, classes))
        count, images = count.clamp(min=1), len(maps[0])
        return {"box": images * self.box * (box / count).sum(),
                "obj": images * self.objectness * (objectness.new_tensor(BALANCE[len(maps)]) * objectness).sum(),
                "cls": images * self.classes * wanted.shape[-1] / 80 * (entropy / count).sum()}


def _at(cells: Tensor, maps: Sequence[Tensor]) -> Tensor:
    """(B, K, C): of maps (B, 3, h, w, C), what cells (B, K) have, see `assign.Candidates`."""
    flat = torch.cat([x.flatten(1, 3) for x in maps], 1)
    return flat.gather(1, cells[..., None].expand(-1, -1, flat.shape[-1]))
