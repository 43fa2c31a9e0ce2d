"""Overlap of boxes, also of very small ones, and the inverse of the sigmoid."""

from __future__ import annotations

import pytest
import torch
from torchvision.ops import box_convert, box_iou, generalized_box_iou

from adn.detect.boxes import inverse_sigmoid, iou_and_giou


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_against_torchvision(dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(0)
    a, b = (torch.rand(n, 4, generator=g, dtype=dtype) * torch.tensor([1, 1, 0.4, 0.4], dtype=dtype) for n in (40, 50))
    corners = [box_convert(boxes, "cxcywh", "xyxy") for boxes in (a, b)]
    iou, giou = iou_and_giou(a[:, None], b)
    torch.testing.assert_close(iou, box_iou(*corners), rtol=0, atol=1e-6)
    torch.testing.assert_close(giou, generalized_box_iou(*corners), rtol=0, atol=1e-6)


@pytest.mark.parametrize("side", [1e-5, 1e-4, 1e-3, 0.1, 1.0])
def test_a_box_overlaps_itself_wholly(side: float) -> None:
    box = torch.tensor([0.37, 0.61, side, 0.7 * side])
    iou, giou = iou_and_giou(box, box)
    assert iou == giou == 1


def test_boxes_of_no_area_overlap_by_nothing() -> None:
    point = torch.tensor([0.5, 0.5, 0.0, 0.0], requires_grad=True)
    for other in (point, torch.tensor([0.5, 0.5, 0.2, 0.2])):
        iou, giou = iou_and_giou(point, other)
        assert iou == 0
        assert -1 <= giou <= 0
        (iou + giou).backward()
    assert point.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_inverse_sigmoid(dtype: torch.dtype) -> None:
    x = torch.tensor([-0.5, 0.0, 1e-3, 0.25, 0.5, 0.75, 1.0, 1.5], dtype=dtype)
    got = inverse_sigmoid(x)
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(got.double(), torch.logit(x.double(), 1e-5), rtol=1e-4, atol=1e-5)
