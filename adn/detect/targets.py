"""The objects of a batch in one piece."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

Targets = Sequence[Mapping[str, torch.Tensor]]


class Objects(NamedTuple):
    """The objects of all images of a batch, image after image.

    Attributes:
        counts: how many each image has.
        image: (T,) int64, the image of each object.
        slot: (T,) int64, its place among the objects of that image.
        labels: (T,) int64.
        boxes: (T, 4) cxcywh.
    """

    counts: list[int]
    image: torch.Tensor
    slot: torch.Tensor
    labels: torch.Tensor
    boxes: torch.Tensor


def fitting(targets: Targets, images: int) -> Targets:
    """The targets, of a batch of so many images.

    Raises:
        ValueError: there are fewer or more, or no image.
    """
    if len(targets) != images or not images:
        raise ValueError(f"targets of {len(targets)} images for a batch of {images}; pass one dict for each image, and "
                         "at least one image")
    return targets


def pack(targets: Targets, device: torch.device, dtype: torch.dtype) -> Objects:
    """The objects of `targets` on `device`, boxes as `dtype`; waits for no work of the device.

    Args:
        targets: one dict per image: `labels` (n,) and `boxes` (n, 4); n may be 0.

    Raises:
        ValueError: where labels and boxes of an image do not fit each other.
    """
    for i, target in enumerate(targets):
        labels, boxes = target["labels"].shape, target["boxes"].shape
        if len(labels) != 1 or boxes != (*labels, 4):
            raise ValueError(f"targets of image {i}: labels {tuple(labels)} and boxes {tuple(boxes)}; pass labels (n,) "
                             "and boxes (n, 4)")
    counts = [len(target["labels"]) for target in targets]
    per_image = torch.tensor(counts, dtype=torch.int64)
    image = torch.repeat_interleave(per_image)
    slot = torch.arange(len(image)) - (per_image.cumsum(0) - per_image)[image]
    queue = device.type != "cpu"  # a copy to the host must be complete when it is used
    image, slot = torch.stack((image, slot)).to(device, non_blocking=queue)
    labels = torch.cat([target["labels"] for target in targets]).to(device, torch.int64, non_blocking=queue)
    boxes = torch.cat([target["boxes"] for target in targets]).to(device, dtype, non_blocking=queue)
    return Objects(counts, image, slot, labels, boxes)
