"""Arithmetic of boxes that torchvision has no form of."""

from __future__ import annotations

import torch

# A hundredth of a pixel in an image of 1000 x 1000: two boxes of no area overlap by 0, not by NaN.
_SMALLEST_AREA = 1e-8


def iou_and_giou(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Intersection over union and its generalised form, of boxes a and b in the same places.

    Args:
        a, b: cxcywh, 0..1, shapes (..., 4) that broadcast.

    Returns:
        Two tensors (...): IoU in 0..1, GIoU in -1..1.
    """
    (al, at, ar, ab, a_area), (bl, bt, br, bb, b_area) = _sides(a), _sides(b)
    intersection = _extent(al.maximum(bl), ar.minimum(br)) * _extent(at.maximum(bt), ab.minimum(bb))
    union = a_area + b_area - intersection
    hull = _extent(al.minimum(bl), ar.maximum(br)) * _extent(at.minimum(bt), ab.maximum(bb))
    iou = intersection / union.clamp(min=_SMALLEST_AREA)
    return iou, iou - (hull - union) / hull.clamp(min=_SMALLEST_AREA)


def _sides(boxes: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Left, top, right, bottom, area: one tensor each, as sums over a last dimension of 4 are slow."""
    x, y, w, h = boxes.unbind(-1)
    half_w, half_h = 0.5 * w, 0.5 * h
    return x - half_w, y - half_h, x + half_w, y + half_h, w * h


def _extent(start: torch.Tensor, end: torch.Tensor) -> torch.Tensor:
    return (end - start).clamp(min=0)


def inverse_sigmoid(x: torch.Tensor, eps: float = 1e-5) -> torch.Tensor:
    """`log(x / (1 - x))` of x clipped to 0..1, both x and 1 - x taken as at least `eps`."""
    x = x.clamp(0, 1)
    return torch.log(x.clamp(min=eps) / (1 - x).clamp(min=eps))
