"""From a detector's raw outputs to boxes in pixels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torchvision.ops import box_convert

from ...detect.boxes import widened


def postprocess(outputs: Mapping[str, torch.Tensor], sizes: torch.Tensor | Sequence[torch.Tensor | Sequence[int]],
                top: int = 300) -> list[dict[str, torch.Tensor]]:
    """The `top` best of all (query, class) pairs of each image; a query may appear with several classes.

    Nothing is suppressed and no box is clipped to the image.

    Args:
        outputs: `pred_logits` (B, Q, C) raw, `pred_boxes` (B, Q, 4) cxcywh in 0..1; half precision becomes float32.
        sizes: (B, 2), width and height of each original image in pixels.
        top: how many to keep; all Q * C where that is fewer.

    Returns:
        Per image `scores` (K,) falling, `labels` int64 (K,), `boxes` (K, 4) xyxy in pixels, with K = min(top, Q * C).

    Raises:
        ValueError: sizes do not fit the batch.
    """
    logits, boxes = widened(outputs["pred_logits"]), widened(outputs["pred_boxes"])
    classes = logits.shape[-1]
    # Of the logits: distinct ones may have the same sigmoid.
    best, index = logits.flatten(1).topk(min(top, logits.shape[1] * classes), dim=1)
    sizes = torch.stack([torch.as_tensor(size) for size in sizes]).to(boxes) if len(sizes) else boxes.new_empty(0, 2)
    if sizes.shape != (len(boxes), 2):
        raise ValueError(f"sizes of shape {tuple(sizes.shape)} for a batch of {len(boxes)}; pass (width, height) of "
                         "each image")
    boxes = box_convert(boxes, "cxcywh", "xyxy") * sizes.repeat(1, 2)[:, None]
    boxes = boxes.gather(1, (index // classes)[..., None].expand(-1, -1, 4))
    return [{"scores": s, "labels": c, "boxes": b} for s, c, b in zip(best.sigmoid(), index % classes, boxes)]
