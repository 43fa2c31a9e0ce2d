"""Training images made of several: mosaics, copies of objects, blends.

Whatever is drawn comes from torch's global generator, see `adn.data.transforms`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from PIL import Image, ImageOps
from torchvision.ops import box_area, clip_boxes_to_image
from torchvision.transforms import v2
from torchvision.tv_tensors import BoundingBoxes

from .coco import CocoImages, Target

Item = tuple[Image.Image, Target]

GREY = (114, 114, 114)  # where no image is
_TRIES = 5  # images in a row that cannot be read
# An object stays if so much of it is left, of so many pixels in width and height, and at most so much longer than wide.
_LEAST_AREA, _LEAST_SIDE, _LONGEST = 0.1, 2, 100
_HIDDEN = 0.3  # of an object that is there, by a copy
_EVEN = 32.0  # images are blended by a share of Beta(32, 32), about one half


class Compose:
    """From an image of `data` to one of `size` x `size` pixels, of which other images of `data` may be part.

    First copies of objects are pasted. Then the image, or a mosaic of it and three others around a random point, is put
    onto grey, at a random size and place. At last that may be blended with another one that was made in the same way.
    Objects of which less than a tenth is left, or less than two pixels in width or height, are left out.

    Args:
        data: what further images are drawn from.
        size: side in pixels.
        each: what is done to each image before all else.
        mosaic, blend: probabilities.
        copy_paste: which share of the objects of an image is pasted once more, mirrored with the image, where it hides
            less than 30 % of any other; of those that have an outline (`CocoImages` with `masks`).
        scale: the size changes by a factor of 1 - scale to 1 + scale,
        translate: the place by up to this part of the side, left or right, up or down.
        until: the epoch, counted from 0, from which on nothing is made of several images.
    """

    def __init__(self, data: CocoImages, size: int, each: Callable[..., Item] = v2.Identity(), *,  # noqa: B008
                 mosaic: float = 0.0, blend: float = 0.0, copy_paste: float = 0.0, scale: float = 0.0,
                 translate: float = 0.0, until: float = float("inf")) -> None:
        self.data, self.size, self.each, self.until = data, size, each, until
        self.mosaic, self.blend, self.copy_paste = mosaic, blend, copy_paste
        self.scale, self.translate = scale, translate

    def __call__(self, image: Image.Image, target: Target) -> Item:
        several = self.data.epoch < self.until
        made = self._placed((image, target), several)
        if several and _happens(self.blend) and (other := self._another()) is not None:
            made = _blended(made, self._placed(other, several))
        return made

    def _placed(self, item: Item, several: bool) -> Item:
        size, factor = self.size, 1 + self.scale * _between(-1, 1)
        x, y = (size / 2 + self.translate * size * _between(-1, 1) for _ in range(2))
        if not (several and _happens(self.mosaic)):
            width, height, *_ = fitted(item[0].size, (size, size), factor)
            return _on_grey(size, [(self._prepared(item, several), width, height, x - width / 2, y - height / 2)])
        # The four meet in a point of the middle half of a canvas of twice the size.
        x, y = (at + factor * size / 2 * _between(-1, 1) for at in (x, y))
        parts = []
        for right, below in ((0, 0), (1, 0), (0, 1), (1, 1)):
            one = self._another() if right or below else item
            if one is not None:
                width, height, *_ = fitted(one[0].size, (size, size), factor)
                parts.append((self._prepared(one, several), width, height,
                              x - width * (1 - right), y - height * (1 - below)))
        return _on_grey(size, parts)

    def _prepared(self, item: Item, several: bool) -> Item:
        image, target = self.each(*item)
        masks = target.pop("masks", None)
        return (image, target) if masks is None or not several else _with_copies(image, target, masks, self.copy_paste)

    def _another(self) -> Item | None:
        """Any image that can be read; None if there seems to be none."""
        places = (int(torch.randint(len(self.data), ())) for _ in range(_TRIES))
        return next(filter(None, map(self.data.untransformed, places)), None)


def fitted(image: tuple[int, int], canvas: tuple[int, int], factor: float = 1.0) -> tuple[int, int, int, int]:
    """Where an image is, when it is enlarged or reduced to fit a canvas, and stands in the middle of it.

    Args:
        image, canvas: width and height.
        factor: as large as that in place of 1.

    Returns:
        Width, height, left and top.
    """
    scale = factor * min(side / had for side, had in zip(canvas, image, strict=True))
    size = [max(round(had * scale), 1) for had in image]
    left, top = (round((side - has) / 2 - 0.1) for side, has in zip(canvas, size, strict=True))  # a half, down
    return *size, left, top


def letterbox(image: Image.Image, target: Target | None = None, *, size: int) -> Image.Image | Item:
    """As large as it goes, in the middle of a grey image of `size` x `size` pixels."""
    item = image, target or {"boxes": torch.empty(0, 4), "labels": torch.empty(0, dtype=torch.int64)}
    canvas, placed = _on_grey(size, [(item, *fitted(image.size, (size, size)))], least=0)
    return canvas if target is None else (canvas, placed)


def _on_grey(size: int, parts: list[tuple[Item, int, int, float, float]], least: float = _LEAST_AREA) -> Item:
    """Images, each with its new width and height, left and top, in one; what else the first target says stays."""
    canvas = Image.new("RGB", (size, size), GREY)
    boxes, labels = [], []
    for (image, target), width, height, left, top in parts:
        left, top = round(left), round(top)
        # Not all of it, which may be much larger than the canvas.
        x0, y0, x1, y1 = max(left, 0), max(top, 0), min(left + width, size), min(top + height, size)
        wide, high = image.width / width, image.height / height
        if x1 > x0 and y1 > y0:
            seen = ((x0 - left) * wide, (y0 - top) * high,
                    min((x1 - left) * wide, image.width), min((y1 - top) * high, image.height))
            canvas.paste(image.resize((x1 - x0, y1 - y0), Image.Resampling.BILINEAR, seen), (x0, y0))
        corners = target["boxes"].as_subclass(torch.Tensor)
        boxes.append(corners / corners.new_tensor([wide, high] * 2) + corners.new_tensor([left, top] * 2))
        labels.append(target["labels"])
    whole, label = torch.cat(boxes), torch.cat(labels)
    box = clip_boxes_to_image(whole, (size, size))
    width, height = (box[:, 2:] - box[:, :2]).unbind(1)
    stays = box_area(box) >= least * box_area(whole)
    if least:
        stays &= (torch.minimum(width, height) >= _LEAST_SIDE) & (
            torch.maximum(width, height) <= _LONGEST * torch.minimum(width, height))
    return canvas, parts[0][0][1] | {"boxes": _boxes(box[stays], canvas), "labels": label[stays]}


def _with_copies(image: Image.Image, target: Target, masks: torch.Tensor, share: float) -> Item:
    boxes, labels = target["boxes"].as_subclass(torch.Tensor), target["labels"]
    mirrored = boxes[:, [2, 1, 0, 3]] * torch.tensor([-1, 1, -1, 1]) + torch.tensor([image.width, 0, image.width, 0])
    start, end = torch.maximum(boxes[:, None, :2], mirrored[:, :2]), torch.minimum(boxes[:, None, 2:], mirrored[:, 2:])
    hidden = (end - start).clamp(min=0).prod(-1) / box_area(boxes)[:, None]  # of each object, by each copy
    able = (masks.flatten(1).any(1) & (hidden < _HIDDEN).all(0)).nonzero()[:, 0]
    chosen = able[torch.randperm(len(able))[: round(share * len(able))]]
    if not len(chosen):
        return image, target
    outline = Image.fromarray(masks[chosen].any(0).flip(1).byte().mul(255).numpy())
    image = image.copy()
    image.paste(ImageOps.mirror(image), mask=outline)
    return image, target | {"boxes": _boxes(torch.cat([boxes, mirrored[chosen]]), image),
                            "labels": torch.cat([labels, labels[chosen]])}


def _blended(one: Item, other: Item) -> Item:
    share = torch.distributions.Beta(_EVEN, _EVEN).sample().item()
    image = Image.blend(other[0], one[0], share)
    both = {name: torch.cat([one[1][name].as_subclass(torch.Tensor), other[1][name].as_subclass(torch.Tensor)])
            for name in ("boxes", "labels")}
    return image, one[1] | both | {"boxes": _boxes(both["boxes"], image)}


def _boxes(corners: torch.Tensor, image: Image.Image) -> BoundingBoxes:
    return BoundingBoxes(corners, format="XYXY", canvas_size=(image.height, image.width))


def _between(low: float, high: float) -> float:
    return low + (high - low) * torch.rand(()).item()


def _happens(probability: float) -> bool:
    return bool(torch.rand(()) < probability)
