"""From the outputs of a YOLOv12 to boxes in pixels: of the boxes that overlap, the best of each class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torchvision.ops import batched_nms, box_convert

from ...data.mosaic import fitted
from ...detect.boxes import widened
from .head import STRIDES

MOST = 30_000  # candidates of an image


def suppressed(decoded: Tensor, *, conf: float = 0.001, iou: float = 0.7, top: int = 300, multi_label: bool = True,
               class_agnostic: bool = False) -> list[dict[str, Tensor]]:
    """Non-maximum suppression.

    Args:
        decoded: (B, 4 + C, A), centre x, centre y, width, height in pixels, scores of classes.
        conf: scores must be above.
        iou: of two boxes of a class that overlap by more, the better stays.
        top: boxes of an image, at most.
        multi_label: a cell may have several classes; else its best.
        class_agnostic: boxes of different classes suppress each other too.

    Returns:
        Per image `scores` (K,) falling, `labels` int64 (K,), `boxes` (K, 4) xyxy in the pixels of `decoded`.
    """
    found = []
    for image in widened(decoded):
        boxes, scores = box_convert(image[:4].T, "cxcywh", "xyxy"), image[4:].T
        if multi_label:
            cell, label = (scores > conf).nonzero(as_tuple=True)
            score = scores[cell, label]
        else:
            score, label = scores.max(1)
            cell = (score > conf).nonzero()[:, 0]
            score, label = score[cell], label[cell]
        if len(score) > MOST:
            score, best = score.topk(MOST)
            cell, label = cell[best], label[best]
        boxes = boxes[cell]
        kept = batched_nms(boxes, score, torch.zeros_like(label) if class_agnostic else label, iou)[:top]
        found.append({"scores": score[kept], "labels": label[kept], "boxes": boxes[kept]})
    return found


def postprocess(outputs: Mapping[str, Any], sizes: Sequence[Tensor | Sequence[int]], **settings: Any
                ) -> list[dict[str, Tensor]]:
    """What is found on images that were fitted into the net's input, as `adn.data.transforms.eval_transform` does with
    `letterbox`.

    Args:
        outputs: of a net in evaluation.
        sizes: (B, 2), width and height of each original image in pixels.
        settings: of `suppressed`; by default those of validation.

    Raises:
        ValueError: sizes do not fit the batch.
    """
    decoded, (h, w) = outputs["decoded"], outputs["maps"][0].shape[-2:]
    if len(sizes) != len(decoded):
        raise ValueError(f"{len(sizes)} sizes for a batch of {len(decoded)}; pass (width, height) of each image")
    found = suppressed(decoded, **settings)
    for result, size in zip(found, sizes, strict=True):
        width, height = map(int, size)
        new_width, new_height, left, top = fitted((width, height), (w * STRIDES[0], h * STRIDES[0]))
        of_image = result["boxes"] - result["boxes"].new_tensor([left, top, left, top])
        result["boxes"] = of_image * of_image.new_tensor([width / new_width, height / new_height] * 2)
    return found
