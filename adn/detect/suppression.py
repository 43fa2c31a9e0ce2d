"""Of the boxes that overlap, the best; and where they are on the images as they were before they were letterboxed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.ops import batched_nms, box_convert

from ..data.mosaic import fitted
from .boxes import widened

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


def on_originals(found: list[dict[str, Tensor]], canvas: tuple[int, int], sizes: Sequence[Tensor | Sequence[int]]
                 ) -> list[dict[str, Tensor]]:
    """What is found on images that were fitted into the net's input, as `adn.data.transforms.eval_transform` does with
    `letterbox`, with boxes on the original images.

    Args:
        found: per image, as `suppressed` gives it; boxes are changed.
        canvas: width and height of the net's input in pixels.
        sizes: (B, 2), width and height of each original image in pixels.

    Raises:
        ValueError: sizes do not fit the batch.
    """
    if len(sizes) != len(found):
        raise ValueError(f"{len(sizes)} sizes for a batch of {len(found)}; pass (width, height) of each image")
    for result, size in zip(found, sizes, strict=True):
        width, height = map(int, size)
        new_width, new_height, left, top = fitted((width, height), canvas)
        of_image = result["boxes"] - result["boxes"].new_tensor([left, top, left, top])
        result["boxes"] = of_image * of_image.new_tensor([width / new_width, height / new_height] * 2)
    return found
