"""How images and boxes are prepared: augmentation, evaluation, and sizes that vary by step.

Whatever is drawn comes from torch's global generator, which `adn.train.fit` and the workers of a DataLoader seed from
(seed, epoch, process), or from a generator that is passed: a run repeats its epochs exactly.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.ops import box_convert
from torchvision.transforms import v2

from . import mosaic
from .coco import Target


class _IoUCrop(v2.RandomIoUCrop):
    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        # torchvision divides by the height of the crop, which is cut down to 0 in images of up to 3 pixels.
        return super().make_params(flat_inputs) if min(v2.query_size(flat_inputs)) * self.min_scale >= 1 else {}


class _Colours(v2.Transform):
    """Hue, saturation and brightness, each by a part of its own of up to so much of its range, or of itself."""

    _transformed_types = (Image.Image,)

    def __init__(self, hue: float, saturation: float, brightness: float) -> None:
        super().__init__()
        self.most = torch.tensor([hue, saturation, brightness])

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        return {"by": ((2 * torch.rand(3) - 1) * self.most).tolist()}

    def transform(self, image: Image.Image, params: dict[str, Any]) -> Image.Image:
        hue, *others = params["by"]
        tables = [[round(i + 255 * hue) % 256 for i in range(256)],
                  *([min(round(i * (1 + by)), 255) for i in range(256)] for by in others)]
        return image.convert("HSV").point(functools.reduce(operator.iadd, tables, [])).convert("RGB")


def train_transform(size: int | None = 640, *, distort: float = 0.5, zoom_out: float = 0.5, crop: float = 0.8,
                    flip: float = 0.5, hue: float = 0.0, saturation: float = 0.0,
                    brightness: float = 0.0, compose: mosaic.Compose | None = None) -> v2.Transform:
    """Augmentation for `CocoImages`.

    Of each image photometric distortion, zoom-out onto black and IoU crop, as RT-DETR has them; then, if asked for, one
    of several, see `compose`; changes of hue, saturation and brightness, as YOLO has them; horizontal flip; resizing
    without keeping the aspect ratio. Objects whose centre is cropped away, or of less than a pixel in width or height
    before or after resizing, are left out.

    Args:
        size: side of the images that the net gets, in pixels; None = images keep their size.
        distort: probability of each part of the distortion.
        zoom_out, crop, flip: probabilities.
        hue: by up to which part of a full turn it changes.
        saturation, brightness: by up to which part of themselves they change.
        compose: of `size`, as it keeps the aspect ratio; what it does to each image alone is set here.

    Returns:
        From (`PIL.Image`, target of `CocoImages`) to the image (3, size, size) float32 in 0..1, and the target with
        `boxes` (n, 4) float32 cxcywh, in 0..1 of the augmented image.
    """
    each = [
        v2.RandomPhotometricDistort(p=distort),
        v2.RandomZoomOut(fill=0, p=zoom_out),
        v2.RandomApply([_IoUCrop()], p=crop),
        v2.SanitizeBoundingBoxes(min_size=1),
    ]
    if compose is not None:
        compose.each = v2.Compose(each)
        each = [compose]
    return v2.Compose([
        *each,
        *([_Colours(hue, saturation, brightness)] if hue or saturation or brightness else []),
        v2.RandomHorizontalFlip(p=flip),
        *_resize(size),
        # Rounding may put an edge a hair outside of the resized image, for which the box would be taken out.
        v2.ClampBoundingBoxes(),
        v2.SanitizeBoundingBoxes(min_size=1),
        _as_net_input,
    ])


def eval_transform(size: int | None = 640, letterbox: bool = False) -> v2.Transform:
    """Resizing (Pillow's bilinear filter, smoothed when shrinking).

    Args:
        size: side of the images that the net gets, in pixels; None = images keep their size.
        letterbox: keep the aspect ratio, with grey above and below or on both sides; else it changes.

    Returns:
        As `train_transform`; it takes an RGB `PIL.Image` alone, too. It has `letterbox` as an attribute.
    """
    fit = [functools.partial(mosaic.letterbox, size=size)] if letterbox else []
    transform = v2.Compose([*fit, *_resize(size), _as_net_input])
    transform.letterbox = letterbox
    return transform


def multi_scale_sizes(base: int = 640, stride: int = 32) -> list[int]:
    """Sizes to draw from in training: from 3/4 to 5/4 of `base` in steps of `stride`, `base` itself three times.

    >>> multi_scale_sizes(256)
    [192, 224, 256, 256, 256, 288, 320]

    Raises:
        ValueError: if `base` is not a multiple of `stride`.
    """
    if base <= 0 or base % stride:
        raise ValueError(f"images of {base} x {base}: sides must be multiples of {stride}, such as "
                         f"{max(1, round(base / stride)) * stride}")
    reach = base // 4 // stride
    return sorted([base, base, *(base + stride * k for k in range(-reach, reach + 1))])


def draw_size(sizes: Sequence[int], generator: torch.Generator | None = None) -> int:
    """One of `sizes`, all equally likely; None = from torch's global generator."""
    device = "cpu" if generator is None else generator.device
    return sizes[int(torch.randint(len(sizes), (), generator=generator, device=device))]


def rescale(images: torch.Tensor, size: int) -> torch.Tensor:
    """Images (B, 3, H, W) as (B, 3, size, size), by the nearest pixel as in the reference.

    Boxes relative to the image remain what they are. A training step draws a size for the super-net and another one,
    independently, for the base-net.
    """
    return images if images.shape[-2:] == (size, size) else F.interpolate(images, size=(size, size))


def _resize(size: int | None) -> list[v2.Transform]:
    return [*([v2.Resize((size, size))] if size else []), v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]


def _as_net_input(image: torch.Tensor, target: Target | None = None) -> torch.Tensor | tuple[torch.Tensor, Target]:
    if target is None:
        return image.as_subclass(torch.Tensor)
    boxes = target["boxes"]
    height, width = boxes.canvas_size
    corners = boxes.as_subclass(torch.Tensor)
    relative = box_convert(corners, "xyxy", "cxcywh") / torch.tensor([width, height, width, height])
    return image.as_subclass(torch.Tensor), {**target, "boxes": relative}
