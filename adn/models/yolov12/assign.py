"""Which cells learn which objects: task-aligned assignment (TOOD, Feng et al., ICCV 2021)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...detect.boxes import complete_iou
from ...detect.targets import Padded

TOP = 10  # cells of an object
SCORE_POWER, OVERLAP_POWER = 0.5, 6.0
_EPS = 1e-9


class Assigned(NamedTuple):
    """What the cells of a batch learn, A of each image.

    Attributes:
        positive: (B, A) bool, which have an object.
        slot: (B, A) int64, its place among the objects of the image; 0 where there is none.
        labels: (B, A) int64, its class; 0 where there is none.
        boxes: (B, A, 4), its box in pixels, xyxy.
        weight: (B, A), what the score of the class is to be, in 0..1; 0 where there is no object.
    """

    positive: Tensor
    slot: Tensor
    labels: Tensor
    boxes: Tensor
    weight: Tensor


@torch.no_grad()
def assign(scores: Tensor, boxes: Tensor, centres: Tensor, objects: Padded) -> Assigned:
    """
    Args:
        scores: (B, A, C) in 0..1.
        boxes: (B, A, 4) in pixels, xyxy.
        centres: (A, 2) in pixels.
        objects: of the images.
    """
    images, cells, _ = scores.shape
    places = objects.labels.shape[1]
    if not places:
        empty = objects.labels.new_zeros(images, cells)
        return Assigned(empty.bool(), empty, empty, boxes.new_zeros(boxes.shape), boxes.new_zeros(images, cells))
    # (B, G, A) from here on: may a cell learn an object, how well do the two overlap, how well does it do already?
    start, end = objects.boxes[:, :, None].chunk(2, -1)
    within = torch.cat((centres - start, end - centres), -1).amin(-1) > _EPS
    candidates = within & objects.filled[..., None]
    overlap = complete_iou(objects.boxes[:, :, None], boxes[:, None]).clamp(min=0).where(candidates, 0)
    score = scores.transpose(1, 2).gather(1, objects.labels[..., None].expand(-1, -1, cells))
    metric = (score**SCORE_POWER * overlap**OVERLAP_POWER).where(candidates, 0)
    best = metric.topk(min(TOP, cells), -1).indices
    chosen = torch.zeros_like(candidates).scatter_(2, best, True) & candidates
    # A cell that several want goes to the one it overlaps most.
    closest = torch.zeros_like(chosen).scatter_(1, overlap.argmax(1, keepdim=True), True)
    chosen = torch.where((chosen.sum(1) > 1)[:, None], closest, chosen)
    positive, slot = chosen.any(1), chosen.int().argmax(1)
    metric, overlap = metric.where(chosen, 0), overlap.where(chosen, 0)
    weight = (metric * overlap.amax(-1, True) / (metric.amax(-1, True) + _EPS)).amax(1)
    return Assigned(positive, slot, objects.labels.gather(1, slot).where(positive, 0),
                    objects.boxes.gather(1, slot[..., None].expand(-1, -1, 4)), weight)
