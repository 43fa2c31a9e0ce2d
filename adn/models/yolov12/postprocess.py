"""From the outputs of a YOLOv12 to boxes in pixels: of the boxes that overlap, the best of each class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ...detect.suppression import on_originals, suppressed
from .head import STRIDES


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
    h, w = outputs["maps"][0].shape[-2:]
    return on_originals(suppressed(outputs["decoded"], **settings), (w * STRIDES[0], h * STRIDES[0]), sizes)
