"""Which cells learn which objects: SimOTA (YOLOX, Ge et al., 2021), among anchors that have about their shape."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import box_convert

from ...detect.boxes import iou_and_giou
from ...detect.targets import Padded
from .layers import ANCHORS, STRIDES

RATIO = 4.0  # of the sides of an object and an anchor, the longer to the shorter: less than that
TOP = 10  # overlaps that say how many cells an object gets; so many at most
OVERLAP = 3.0  # weight of the overlap in the cost of a cell
_EPS = 1e-8
_LEAST_LOG = -100.0


class Candidates(NamedTuple):
    """Cells that objects propose, K in each image: its own and the two nearest ones, of all maps and anchors. Any
    object of the image may get them. What several propose is there several times, as published.

    Attributes:
        cell: (B, K) int64, which, among all of an image: map by map, anchor by anchor, row by row. As many of each map.
        valid: (B, K) bool, is it one?
    """

    cell: Tensor
    valid: Tensor


class Assigned(NamedTuple):
    """What candidates learn.

    Attributes:
        positive: (B, K) bool, which have an object.
        labels: (B, K) int64, its class; of those without one, any.
        boxes: (B, K, 4), its box in pixels, xyxy; of those without one, any.
    """

    positive: Tensor
    labels: Tensor
    boxes: Tensor


def candidates(objects: Padded, anchors: Tensor, sizes: Sequence[torch.Size]) -> Candidates:
    """
    Args:
        objects: of the images.
        anchors: (levels, 1, 3, 1, 1, 2) in pixels.
        sizes: height and width of the maps.
    """
    start, end = objects.boxes.chunk(2, -1)
    centre, extent = (start + end) / 2, end - start  # (B, G, 2)
    cells, valid, before = [], [], 0
    for (h, w), stride, anchor in zip(sizes, STRIDES, anchors):
        most = centre.new_tensor([w - 1, h - 1])
        own = (centre / stride).floor().clamp(min=0).minimum(most)
        side = torch.where(centre / stride - own < 0.5, -1, 1)
        # (B, 3, G, 2): the cell itself, the nearest one beside it, the nearest one above or below.
        near = own[:, None] + side[:, None] * side.new_tensor([[0, 0], [1, 0], [0, 1]])[:, None]
        x, y = near.clamp(min=0).minimum(most).long()[:, :, None].unbind(-1)
        # (B, 3, 3, G): these of the three anchors.
        cells.append((before + (torch.arange(ANCHORS, device=x.device)[:, None] * h + y) * w + x).flatten(1))
        ratio = extent[:, None] / anchor.reshape(ANCHORS, 1, 2)
        fits = torch.maximum(ratio, 1 / ratio).amax(-1) < RATIO
        inside = ((near >= 0) & (near <= most)).all(-1)
        valid.append((inside[:, :, None] & fits[:, None] & objects.filled[:, None, None]).flatten(1))
        before += ANCHORS * h * w
    return Candidates(torch.cat(cells, 1), torch.cat(valid, 1))


@torch.no_grad()
def assign(logits: Tensor, boxes: Tensor, found: Candidates, objects: Padded) -> Assigned:
    """
    Args:
        logits: (B, K, 1 + C), of objectness and classes.
        boxes: (B, K, 4) in pixels, xyxy.
        found: which candidates these are.
        objects: of the images.
    """
    count = found.cell.shape[1]
    if not count:
        return Assigned(found.valid, found.cell, boxes)
    # (B, G, K) from here on: how well do a cell and an object overlap, what does it cost to have the one learn the
    # other? Scores are square roots of objectness times class; all other classes are to be 0.
    may = found.valid[:, None] & objects.filled[..., None]
    overlap, _ = iou_and_giou(*(box_convert(x, "xyxy", "cxcywh") for x in (objects.boxes[:, :, None], boxes[:, None])))
    overlap = overlap.where(may, 0)
    labels = objects.labels[..., None].expand(-1, -1, count)
    yes = (F.logsigmoid(logits[..., 1:]) + F.logsigmoid(logits[..., :1])) / 2
    no = (-torch.expm1(yes)).log().clamp(min=_LEAST_LOG)
    classes = no.mT.gather(1, labels) - yes.mT.gather(1, labels) - no.sum(-1)[:, None]
    cost = (classes - OVERLAP * (overlap + _EPS).log()).where(may, torch.inf)
    wanted = overlap.topk(min(TOP, count), -1).values.sum(-1, keepdim=True).long().clamp(min=1)
    # Of a cell that is there twice, both cost the same: the first goes first, whatever the device.
    best = cost.sort(dim=-1, stable=True).indices[..., :TOP]
    taken = torch.arange(best.shape[-1], device=best.device) < wanted
    chosen = torch.zeros_like(may).scatter_(2, best, taken) & may
    claims = chosen.sum(1)
    # What several claim goes to the one to which it costs least, even if that has enough.
    slot = torch.where(claims > 1, cost.argmin(1), chosen.int().argmax(1))
    return Assigned(claims > 0, objects.labels.gather(1, slot),
                    objects.boxes.gather(1, slot[..., None].expand(-1, -1, 4)))
