"""Arithmetic of boxes that torchvision has no form of."""

from __future__ import annotations

import math

import torch

# Two boxes of no area overlap by 0, not by NaN.
_SMALLEST_AREA = 1e-12


def widened(x: torch.Tensor) -> torch.Tensor:
    """As float32 where it is of half precision, which is too coarse for boxes: bfloat16 has 1/256 of the image."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


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
    left, top, right, bottom = x - half_w, y - half_h, x + half_w, y + half_h
    # Not w * h: rounded otherwise than the intersection, a small box would overlap itself by more than 1.
    return left, top, right, bottom, (right - left) * (bottom - top)


def _extent(start: torch.Tensor, end: torch.Tensor) -> torch.Tensor:
    return (end - start).clamp(min=0)


def inverse_sigmoid(x: torch.Tensor, eps: float = 1e-5) -> torch.Tensor:
    """`log(x / (1 - x))` of x clipped to 0..1, both x and 1 - x taken as at least `eps`; half precision as float32."""
    x = widened(x).clamp(0, 1)
    return torch.log(x.clamp(min=eps) / (1 - x).clamp(min=eps))


def complete_iou(a: torch.Tensor, b: torch.Tensor, eps: float = 1e-7) -> torch.Tensor:
    """Intersection over union, less the squared distance of the centres in diagonals of the hull and a term for shapes
    that differ (complete IoU, Zheng et al., AAAI 2020). The weight of the last has no gradient.

    Args:
        a, b: xyxy in one unit of length, shapes (..., 4) that broadcast.
        eps: added to heights, union and squared diagonal, as in the published detectors.

    Returns:
        (...), at most 1.
    """
    (al, at, ar, ab), (bl, bt, br, bb) = a.unbind(-1), b.unbind(-1)
    aw, ah, bw, bh = ar - al, ab - at + eps, br - bl, bb - bt + eps
    intersection = _extent(al.maximum(bl), ar.minimum(br)) * _extent(at.maximum(bt), ab.minimum(bb))
    iou = intersection / (aw * ah + bw * bh - intersection + eps)
    diagonal = (ar.maximum(br) - al.minimum(bl)) ** 2 + (ab.maximum(bb) - at.minimum(bt)) ** 2 + eps
    distance = ((bl + br - al - ar) ** 2 + (bt + bb - at - ab) ** 2) / 4
    shape = 4 / math.pi**2 * (torch.atan(bw / bh) - torch.atan(aw / ah)) ** 2
    with torch.no_grad():
        weight = shape / (shape - iou + 1 + eps)
    return iou - (distance / diagonal + shape * weight)
