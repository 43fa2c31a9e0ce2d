"""The objects of a batch in one piece."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

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


def check_pixels(images: Any, targets: Any, classes: int | None = None, masks: bool = False) -> None:
    """Are these a list of images, and of each what its objects are, as torchvision's detectors want them?

    Args:
        images: (3, H, W) each.
        targets: per image `boxes` (n, 4) xyxy in pixels, `labels` int64 (n,), `masks` (n, H, W).
        classes: the largest label; labels begin with 1, as 0 is the background. None = not known.
        masks: does the detector learn from outlines?

    Raises:
        ValueError: if not, saying of which image and what to pass.
    """
    if not isinstance(images, list | tuple) or not all(isinstance(image, torch.Tensor) and image.ndim == 3
                                                       for image in images):
        raise ValueError("images are no list of tensors (3, H, W); pass list(batch) of a batch (B, 3, H, W)")
    if targets is None:
        raise ValueError("no targets to learn from; pass a dict of boxes and labels for each image")
    fitting(targets, len(images))
    if len(channels := {len(image) for image in images}) > 1:
        raise ValueError(f"images of {' and '.join(map(str, sorted(channels)))} channels in one batch; pass images of "
                         "3: .expand(3, -1, -1) of a grey one, [:3] of one with transparency")
    for i, (image, target) in enumerate(zip(images, targets, strict=True)):
        wanted = ("boxes", "labels", "masks") if masks else ("boxes", "labels")
        if not isinstance(target, Mapping) or not target.keys() >= {*wanted}:
            what = f"a dict of {', '.join(target)}" if isinstance(target, Mapping) else type(target).__name__
            raise ValueError(f"targets of image {i}: {what}; pass a dict of {', '.join(wanted)}")
        boxes, labels = target["boxes"], target["labels"]
        if labels.ndim != 1 or boxes.shape != (len(labels), 4) or labels.dtype != torch.int64:
            raise ValueError(f"targets of image {i}: boxes {tuple(boxes.shape)}, labels {tuple(labels.shape)} of "
                             f"{labels.dtype}; pass boxes (n, 4) and labels (n,) of int64")
        if (bad := (boxes[:, 2:] <= boxes[:, :2]).any(1)).any():
            raise ValueError(f"targets of image {i}: box {boxes[bad][0].tolist()} has no area; pass corners x0, y0, "
                             "x1, y1 in pixels")
        if len(labels) and (labels.min() < 1 or (classes is not None and labels.max() > classes)):
            most = "" if classes is None else f" to {classes}, the classes of this net"
            raise ValueError(f"targets of image {i}: labels {int(labels.min())} to {int(labels.max())}; pass labels "
                             f"from 1{most} (0 is the background)")
        if "masks" in target and target["masks"].shape != (len(labels), *image.shape[-2:]):
            raise ValueError(f"targets of image {i}: masks {tuple(target['masks'].shape)} for {len(labels)} objects of "
                             f"an image {tuple(image.shape)}; pass (n, H, W)")


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


class Padded(NamedTuple):
    """Objects by image, as many places for each as the image with most has: labels (B, G), boxes (B, G, 4) xyxy in
    pixels, and which places are filled (B, G)."""

    labels: torch.Tensor
    boxes: torch.Tensor
    filled: torch.Tensor


def padded(objects: Objects, width: int, height: int) -> Padded:
    """From boxes cxcywh in 0..1, of images of this size."""
    images, places = len(objects.counts), max(objects.counts, default=0)
    boxes = objects.boxes.new_zeros(images, places, 4)
    labels = objects.labels.new_zeros(images, places)
    filled = torch.zeros_like(labels, dtype=torch.bool)
    at = objects.image, objects.slot
    centre, half = objects.boxes[:, :2], objects.boxes[:, 2:] / 2
    size = boxes.new_tensor([width, height])
    labels[at], filled[at] = objects.labels, True
    boxes[at] = torch.cat(((centre - half) * size, (centre + half) * size), 1)
    return Padded(labels, boxes, filled)
