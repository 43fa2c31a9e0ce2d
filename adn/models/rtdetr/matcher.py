"""Which query answers for which object: the assignment of least total cost, exact."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch

from ...detect.boxes import iou_and_giou, widened
from ...detect.targets import Objects, Targets, fitting, pack


class Pairs(NamedTuple):
    """Matched queries and objects of several heads. Every head has as many pairs in an image: one per object or query,
    whichever are fewer.

    Attributes:
        image: (K,) int64, the image of each pair.
        query: (heads, K) int64, the query in that image.
        object: (heads, K) int64, the object, counted over the whole batch.
    """

    image: torch.Tensor
    query: torch.Tensor
    object: torch.Tensor

    def to(self, device: torch.device) -> Pairs:
        """Copied in one piece."""
        image, query, index = self
        if device.type == "cpu":
            return self
        both = torch.cat((image[None], query, index)).to(device, non_blocking=True)
        return Pairs(both[0], *both[1:].chunk(2))


class Matcher:
    """The Hungarian matching of RT-DETR.

    The cost of a query for an object is `cost_class * class + cost_bbox * L1 - cost_giou * GIoU`, where `class` is,
    of p = sigmoid(logit of the object's class), `alpha (1-p)^gamma (-log p) - (1-alpha) p^gamma (-log(1-p))`. Of all
    assignments of queries to the objects of an image, the one of least total cost is found (`scipy`).

    Raises:
        ImportError: without SciPy, `pip install "adn[detect]"`.
    """

    def __init__(self, cost_class: float = 2.0, cost_bbox: float = 5.0, cost_giou: float = 2.0, alpha: float = 0.25,
                 gamma: float = 2.0) -> None:
        self.cost_class, self.cost_bbox, self.cost_giou = cost_class, cost_bbox, cost_giou
        self.alpha, self.gamma = alpha, gamma
        try:
            from scipy.optimize import linear_sum_assignment
        except ImportError as error:
            raise ImportError('the losses of a detector need SciPy: pip install "adn[detect]"') from error
        self._assign = linear_sum_assignment

    def match(self, outputs: Mapping[str, torch.Tensor], targets: Targets) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Match one head.

        Args:
            outputs: `pred_logits` (B, Q, C) and `pred_boxes` (B, Q, 4) cxcywh, any floating type (half precision is
                computed in float32).
            targets: one dict per image: `labels` int64 (n,), `boxes` (n, 4) cxcywh.

        Returns:
            Per image the indices of queries, rising, and of the objects they got: int64 (min(n, Q),), on the CPU.

        Raises:
            FloatingPointError: what an image with objects predicts gives no finite cost.
            ValueError: targets do not fit the batch, are not finite, or have a class that the detector does not.
        """
        logits, boxes = widened(outputs["pred_logits"]), widened(outputs["pred_boxes"])
        objects = pack(fitting(targets, len(boxes)), boxes.device, boxes.dtype)
        pairs = self.match_heads(logits[None], boxes[None], objects)
        kept = [min(n, logits.shape[1]) for n in objects.counts]
        first = np.cumsum([0, *objects.counts])
        return [(query, index - int(start)) for query, index, start in
                zip(pairs.query[0].split(kept), pairs.object[0].split(kept), first)]

    @torch.no_grad()
    def match_heads(self, logits: torch.Tensor, boxes: torch.Tensor, objects: Objects,
                    names: Sequence[str] | None = None) -> Pairs:
        """Match every head by itself, with one copy from the device for all.

        Args:
            logits: (heads, B, Q, C), float32 or float64.
            boxes: (heads, B, Q, 4) cxcywh.
            names: what to call the heads in messages.

        Returns:
            Pairs on the CPU, by image and then by query.

        Raises:
            As `match`.
        """
        heads, _, queries, _ = logits.shape
        cost = self._cost(logits, boxes, objects).to("cpu", torch.float64).numpy()
        if not np.isfinite(cost).all():
            _explain(cost, logits.shape[-1], objects, names or [f"head {i}" for i in range(heads)])
        image = np.repeat(np.arange(len(objects.counts)), np.minimum(objects.counts, queries))
        query, index = np.empty((2, heads, len(image)), np.int64)
        start = at = 0
        for n in objects.counts:
            for head in range(heads if n else 0):
                rows, columns = self._assign(cost[head, start : start + n])
                order = columns.argsort()
                query[head, at : at + len(order)] = columns[order]
                index[head, at : at + len(order)] = rows[order] + start
            start, at = start + n, at + min(n, queries)
        return Pairs(*map(torch.from_numpy, (image, query, index)))

    def _cost(self, logits: torch.Tensor, boxes: torch.Tensor, objects: Objects) -> torch.Tensor:
        """(heads, T, Q): only queries of an object's own image. NaN where the object's class is not one."""
        # An index out of range would stop a GPU for good, and to ask first would wait for it.
        labels = objects.labels.clamp(0, logits.shape[-1] - 1)
        p = logits.mT[:, objects.image, labels].sigmoid()
        positive = self.alpha * (1 - p) ** self.gamma * -(p + 1e-8).log()
        negative = (1 - self.alpha) * p**self.gamma * -(1 - p + 1e-8).log()
        # The four numbers of a box apart in memory: much faster on a CPU.
        of_image = boxes.movedim(-1, 0).contiguous()[:, :, objects.image].movedim(0, -1)
        wanted = objects.boxes[:, None]
        cost = self.cost_class * (positive - negative)
        for mine, yours in zip(of_image.unbind(-1), wanted.unbind(-1)):
            cost += self.cost_bbox * (mine - yours).abs()
        cost -= self.cost_giou * iou_and_giou(of_image, wanted)[1]
        return cost.masked_fill_((labels != objects.labels)[:, None], torch.nan)


def _explain(cost: np.ndarray, classes: int, objects: Objects, names: Sequence[str]) -> None:
    """Raise the error that says why a cost is not finite."""
    bad = [int(label) for label in objects.labels.unique() if not 0 <= label < classes]
    if bad:
        raise ValueError(f"targets have classes {bad}, this detector has 0 to {classes - 1}: pass contiguous labels, "
                         "or build the detector with another num_classes")
    if not objects.boxes.isfinite().all():
        image = int(objects.image[~objects.boxes.isfinite().all(1)][0])
        raise ValueError(f"targets of image {image} have boxes that are not finite")
    where = ", ".join(name for name, of_head in zip(names, cost, strict=True) if not np.isfinite(of_head).all())
    raise FloatingPointError(f"the predictions are not finite ({where}): training has diverged, or the input is not "
                             "finite")
