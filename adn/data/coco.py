"""Images with boxes: any file in COCO's instances format beside a folder of images."""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import ExifTags, Image
from torch.utils.data import Dataset
from torchvision.tv_tensors import BoundingBoxes, Mask

from . import yolo
from .images import LOOKED_AT, UNREADABLE, notes_of_range, to_rgb, upright

Target = dict[str, torch.Tensor]
Transform = Callable[[Image.Image, Target], tuple[Any, Target]]

# COCO's own layout, the same with names of one's own, the one that `adn.data.scenes` writes, and Roboflow's export.
_LAYOUTS = (
    ("annotations/instances_{split}2017.json", "{split}2017"),
    ("annotations/instances_{split}2017.json", "images/{split}2017"),
    ("annotations/instances_{split}.json", "{split}"),
    ("annotations/instances_{split}.json", "images/{split}"),
    ("instances_{split}.json", "images/{split}"),
    ("{split}/_annotations.coco.json", "{split}"),
)
_VALIDATION = ("val", "valid", "validation")
# Boxes are often written with rounding: to be called outside, one must reach over the edge by more than this (pixels).
_SLACK = 0.5
# Numbers in the file stay below this, so that areas are finite.
_LARGEST = 1e15


class Category(NamedTuple):
    """What a label stands for: the category's id in the file, and its name."""

    id: int
    name: str


class CocoImages(Dataset):
    """Images with the boxes of their objects; items are `transform(image, target)`.

    Untransformed, `image` is an RGB `PIL.Image` and `target` holds `boxes`, tv_tensors `BoundingBoxes` (n, 4) float32,
    xyxy in pixels and within the image; `labels` (n,) int64; `image_id`, int64 scalar; `size` (2,) int64, width and
    height in pixels. Images without objects have n = 0.

    Labels 0..C-1 follow ascending category id, whatever gaps the ids have. Targets leave out crowds and boxes that have
    no area within the image; `ground_truth`, which evaluation compares with, has every annotation as the file has it.

    Pixels are taken as stored: like the COCO tools, this ignores an orientation in the EXIF data, unless turning the
    image by it gives the width and height that the annotations are for, and the stored pixels do not.

    With `masks`, targets have `masks`, tv_tensors `Mask` (n, height, width) bool, too; all False is that of an object
    without outline.

    An image that is missing, cannot be decoded or is of another size than annotated gives None instead of an item,
    which `collate` drops, and is remembered. Annotations are kept in a few arrays, about 50 bytes for an object and,
    with `masks`, what the file says of its outline, shared by processes that are forked.

    Attributes:
        categories: by label, id in the file and name.
        class_names: by label.
        image_ids: by index.
        trainable: how many objects a detector can learn from: those with area in their image that are no crowd.
        notes: what was put right or left out, one sentence each; empty if the file is in order.
        transform: what turns image and target into an item; None leaves them as they are.
        epoch: of training, counted from 0, for transforms that change with it.
    """

    epoch = 0

    def __init__(self, images: str | os.PathLike[str], annotations: str | os.PathLike[str],
                 transform: Transform | None = None, content: Mapping[str, list[Any]] | None = None, *,
                 masks: bool = False) -> None:
        """Read the annotations.

        Args:
            images: the folder that the file names in `annotations` are relative to.
            annotations: a json file with lists `images`, `annotations` and `categories`.
            content: the same, if it has been read already; `annotations` is then what messages call it.
            masks: keep the outlines of objects, which are polygons or run lengths.

        Raises:
            ValueError: if the file is missing, cut short or of another format, contradicts itself (the same id or
                file twice, annotations of unknown images or categories), has boxes in parts of the image instead of
                pixels, or none of its images is in the folder.
            ImportError: with `masks`, if pycocotools is not installed.
        """
        self.folder, self.file, self.transform = os.fspath(images), os.fspath(annotations), transform
        self.masks = masks
        if masks:
            _decoder()
        content = _read_json(self.file, masks) if content is None else content
        self.categories = _categories(self.file, content["categories"])
        self.class_names = [category.name for category in self.categories]
        self._take_images(content["images"])
        self._take_objects(content["annotations"])
        self._look_over_boxes()
        self._look_at_first()
        # In shared memory: the processes of a DataLoader write here what the main process reads.
        self._failed = torch.zeros(len(self), dtype=torch.bool).share_memory_()

    def __len__(self) -> int:
        return len(self.image_ids)

    def __getitem__(self, index: int) -> tuple[Any, Target] | None:
        item = self.untransformed(index)
        return item if item is None or self.transform is None else self.transform(*item)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def untransformed(self, index: int) -> tuple[Image.Image, Target] | None:
        """Image and target, see above."""
        index = range(len(self))[index]
        size = self._size(index)
        try:
            with Image.open(self._path(index)) as file:
                image = to_rgb(file if file.size == size else upright(file))
        except UNREADABLE:
            image = None
        if image is None or image.size != size:
            self._failed[index] = True
            return None
        return image, self._target(index)

    @property
    def unreadable(self) -> list[str]:
        """Paths of the images that could not be read so far, or had another size than annotated, in any process of a
        DataLoader; each once."""
        return [self._path(index) for index in self._failed.nonzero().flatten().tolist()]

    def ground_truth(self, image_ids: Iterable[int] | None = None) -> dict[str, list[dict[str, Any]]]:
        """Images, annotations and categories in COCO's format, for evaluation: crowds included, nothing clipped.

        Annotations are numbered from 1 on, for the COCO tools take a match with number 0 for none. Where the file does
        not say so, an object is no crowd and has the area of its box. With `masks`, it has its outline, else that of
        its box.

        Args:
            image_ids: which images; None = all.
        """
        wanted = None if image_ids is None else set(image_ids)
        chosen = [i for i, image_id in enumerate(self.image_ids.tolist()) if wanted is None or image_id in wanted]
        images, objects = [], []
        for i in chosen:
            image_id = int(self.image_ids[i])
            width, height = self._size(i)
            images.append({"id": image_id, "file_name": self._name(i), "width": width, "height": height})
            part = slice(self._start[i], self._start[i + 1])
            for label, box, area, crowd in zip(self._labels[part].tolist(), self._boxes[part].tolist(),
                                               self._areas[part].tolist(), self._crowd[part].tolist(), strict=True):
                objects.append({"id": len(objects) + 1, "image_id": image_id, "category_id": self.categories[label].id,
                                "bbox": box, "area": area, "iscrowd": int(crowd)})
            for number, one in zip(range(part.start, part.stop), objects[len(objects) - (part.stop - part.start) :]
                                   if self.masks else ()):
                one["segmentation"] = json.loads(self._outlines[number]) or [_outline_of(one["bbox"])]
        return {"images": images, "annotations": objects, "categories": [c._asdict() for c in self.categories]}

    def _take_images(self, entries: Sequence[Any]) -> None:
        if not entries:
            raise ValueError(f"{self.file} lists no image")
        ids, names, widths, heights = (
            _column(self.file, "images", entries, name, what) for name, what in (
                ("id", "an integer"), ("file_name", "a text"), ("width", _SIDE), ("height", _SIDE)))
        _refuse_repeated(ids, f"{self.file}: image id")
        _refuse_repeated(list(map(os.path.normpath, names)), f"{self.file}: image file")
        self.image_ids = np.array(ids, dtype=np.int64)
        self._sizes = np.array([widths, heights], dtype=np.int64).T
        self._names = _Texts(names)

    def _take_objects(self, entries: Sequence[Any]) -> None:
        image_ids, category_ids, boxes, crowd, areas = (
            _column(self.file, "annotations", entries, name, what, default) for name, what, default in (
                ("image_id", "an integer", None), ("category_id", "an integer", None), ("bbox", _BOX, None),
                ("iscrowd", "0 or 1", 0), ("area", "a finite number", math.nan)))
        index = {image_id: i for i, image_id in enumerate(self.image_ids.tolist())}
        label = {category.id: i for i, category in enumerate(self.categories)}
        for known, ids, what in ((index, image_ids, "image"), (label, category_ids, "category")):
            if unknown := [i for i in ids if i not in known]:
                raise ValueError(f"{self.file} has annotations of an unlisted {what}, id {unknown[0]} "
                                 f"({len(unknown)} in all): leave them out, or complete the list")
        images = np.array([index[i] for i in image_ids], dtype=np.int64)
        order = images.argsort(kind="stable")
        self._start = np.searchsorted(images[order], np.arange(len(self) + 1))
        self._labels = np.array([label[i] for i in category_ids], dtype=np.int64)[order]
        self._boxes = np.array(boxes, dtype=np.float64).reshape(-1, 4)[order]  # xywh, as in the file
        self._crowd = np.array(crowd, dtype=bool)[order]
        if self.masks:
            outlines = _column(self.file, "annotations", entries, "segmentation", _OUTLINE, [])
            for i, (outline, image) in enumerate(zip(outlines, images, strict=True)):
                if isinstance(outline, dict) and list(outline["size"]) != self._sizes[image][::-1].tolist():
                    raise ValueError(f"{self.file}: segmentation of annotations[{i}] has a size of {outline['size']}, "
                                     f"its image a height and width of {self._sizes[image][::-1].tolist()}")
            self._outlines = _Texts([json.dumps(outlines[i]) for i in order])
        areas = np.array(areas, dtype=np.float64)[order]
        self._areas = np.where(np.isnan(areas), self._boxes[:, 2] * self._boxes[:, 3], areas)

    def _look_at_first(self) -> None:
        """Raise ValueError if the folder holds none of the images, or others than annotated; complete `notes`."""
        there = (index for index in range(len(self)) if os.path.exists(self._path(index)))
        first = list(itertools.islice(there, LOOKED_AT))
        if not first:
            raise ValueError(f"none of the {len(self)} images of {self.file} is in {self.folder!r}, the first would be "
                             f"{self._path(0)}: pass the folder that the file names are relative to")
        sizes = []
        for index in first:
            with contextlib.suppress(*UNREADABLE), Image.open(self._path(index)) as file:
                sizes.append((file.size, self._size(index), self._path(index)))
        if sizes and not any(sorted(found) == sorted(wanted) for found, wanted, _ in sizes):
            (width, height), (w, h), path = sizes[0]
            raise ValueError(f"{path} has {width} x {height} pixels, but {self.file} is for {w} x {h}, "
                             f"and so on for {len(sizes)} images: images and annotations do not belong together, or "
                             "one of them was resized alone")
        self.notes += notes_of_range(functools.partial(Image.open, self._path(index)) for index in first)
        self._look_for_turned(first)

    def _look_for_turned(self, first: Sequence[int]) -> None:
        """Note images that are to be shown turned but were measured as stored: of which were the boxes drawn?"""
        owner = np.repeat(np.arange(len(self)), np.diff(self._start))
        corners = _corners(self._boxes)
        over = _reaches_over(corners, self._sizes[owner])
        not_turned = _reaches_over(corners, self._sizes[owner][:, ::-1])
        # Their boxes fit the image only if it is turned.
        suspects = np.setdiff1d(owner[over], owner[not_turned])[:LOOKED_AT].tolist()
        turned = {index for index in {*first, *suspects} if self._is_to_be_turned(index)}
        if wrong := sorted(turned.intersection(suspects)):
            self.notes.append(
                f"boxes of {self._path(wrong[0])} reach over its edge, and would not if it were turned as its EXIF "
                f"data say ({len(wrong)} such images seen): they were drawn on the turned picture, but width and "
                "height are those of the stored one. Turn the images (PIL.ImageOps.exif_transpose), or write the width "
                "and height of the turned pictures")
        elif turned:
            self.notes.append(
                f"{self._path(min(turned))} is to be shown turned, as its EXIF data say ({len(turned)} such images "
                f"among {len({*first, *suspects})}), and is taken as stored, which is what its width and height are "
                "of. If boxes were drawn on the turned pictures, turn the images (PIL.ImageOps.exif_transpose)")

    def _is_to_be_turned(self, index: int) -> bool:
        """By its EXIF data, where stored pixels have the annotated size."""
        with contextlib.suppress(*UNREADABLE), Image.open(self._path(index)) as file:
            return file.size == self._size(index) and file.getexif().get(ExifTags.Base.Orientation, 1) != 1
        return False

    def _look_over_boxes(self) -> None:
        """Set `trainable` and `notes`.

        Raises:
            ValueError: if there are boxes and all are within 0..1.
        """
        self.notes = []
        names = Counter(self.class_names)
        for name in (name for name, count in names.items() if count > 1):
            ids = [category.id for category in self.categories if category.name == name]
            counts = [int((self._labels == i).sum()) for i, other in enumerate(self.class_names) if other == name]
            self.notes.append(f"categories {_listed(ids)} are all called {name!r} and are classes of their own, with "
                              f"{_listed(counts)} objects: if one is meant, give its objects one category_id")
        if len(self._boxes) and 0 < self._boxes.max() <= 1 and self._boxes.min() >= 0:
            raise ValueError(f"{self.file}: no number of its {len(self._boxes)} boxes is above 1, the first is "
                             f"{self._boxes[0].tolist()}; boxes are left, top, width and height in pixels: multiply "
                             "those in parts of the image by its width and height")
        sizes = np.repeat(self._sizes, np.diff(self._start), axis=0)
        corners = _corners(self._boxes)
        clipped = _clip(corners, sizes)
        usable = _has_area(clipped) & ~self._crowd
        empty = ~usable & ~self._crowd
        moved = _reaches_over(corners, sizes) & usable
        self.trainable = int(usable.sum())
        if moved.any():
            self.notes.append(f"boxes that reach over the edge of their image, and are clipped: {moved.sum()}")
        if empty.any():
            self.notes.append(f"boxes without area in their image, which are not trained on: {empty.sum()}")

    def _target(self, index: int) -> Target:
        part = slice(self._start[index], self._start[index + 1])
        boxes = _clip(_corners(self._boxes[part]), self._sizes[index])
        chosen = _has_area(boxes) & ~self._crowd[part]
        width, height = self._size(index)
        masks = {}
        if self.masks:
            outlines = (json.loads(self._outlines[part.start + i]) for i in np.flatnonzero(chosen))
            filled = np.array([_filled(outline, height, width) for outline in outlines], dtype=bool)
            masks["masks"] = Mask(torch.from_numpy(filled.reshape(-1, height, width)))
        return {
            "boxes": BoundingBoxes(torch.from_numpy(boxes[chosen]).float(), format="XYXY", canvas_size=(height, width)),
            "labels": torch.from_numpy(self._labels[part][chosen]),
            "image_id": torch.tensor(int(self.image_ids[index])),
            "size": torch.tensor([width, height]), **masks,
        }

    def _size(self, index: int) -> tuple[int, int]:
        return tuple(self._sizes[index].tolist())

    def _name(self, index: int) -> str:
        return self._names[index]

    def _path(self, index: int) -> str:
        return os.path.join(self.folder, self._name(index))


class _Texts:
    """Many texts in one: looking at one of 100,000 would unshare, by its reference count, a page between forked
    processes."""

    def __init__(self, texts: Sequence[str]) -> None:
        self._all = "".join(texts)
        self._ends = np.cumsum([len(text) for text in texts], dtype=np.int64)

    def __getitem__(self, index: int) -> str:
        return self._all[self._ends[index - 1] if index else 0 : self._ends[index]]


def _decoder() -> Any:
    try:
        from pycocotools import mask
    except ImportError as error:
        raise ImportError('outlines of objects need pycocotools: pip install "adn[detect]"') from error
    return mask


def _outline_of(box: Sequence[float]) -> list[float]:
    x, y, width, height = box
    return [x, y, x + width, y, x + width, y + height, x, y + height]


def _filled(outline: Any, height: int, width: int) -> np.ndarray:
    """bool (height, width), of polygons or run lengths as COCO's files have them."""
    tools = _decoder()
    if not outline:
        return np.zeros((height, width), dtype=bool)
    if isinstance(outline, dict) and isinstance(outline["counts"], str):
        return tools.decode(outline).astype(bool)
    runs = tools.frPyObjects(outline, height, width)
    return tools.decode(tools.merge(runs) if isinstance(runs, list) else runs).astype(bool)


def open_coco(root: str | os.PathLike[str], split: str, transform: Transform | None = None, *, masks: bool = False
              ) -> CocoImages:
    """Open one split of a folder in one of the usual layouts, or of YOLO's label files (a `data.yaml`, see
    `adn.data.yolo`).

    These are `ROOT/annotations/instances_SPLIT2017.json` with images in `ROOT/SPLIT2017` or `ROOT/images/SPLIT2017`,
    the same without 2017, `ROOT/instances_SPLIT.json` with `ROOT/images/SPLIT`, and `ROOT/SPLIT/_annotations.coco.json`
    with the images beside it.

    Args:
        root: the folder.
        split: "train", "val", ...; "val", "valid" and "validation" find each other.
        transform, masks: see `CocoImages`.

    Raises:
        ValueError: if there is no such layout, saying what was looked for; otherwise as `CocoImages`.
    """
    places = _places(split)
    for file, folder in places:
        if Path(root, file).is_file() and Path(root, folder).is_dir():
            return CocoImages(Path(root, folder), Path(root, file), transform, masks=masks)
    if (description := yolo.find(root)) is not None:
        folder, content = yolo.read(description, _named(split))
        return CocoImages(folder, description, transform, content, masks=masks)
    if without := [(file, folder) for file, folder in places if Path(root, file).is_file()]:
        raise ValueError(f"{Path(root, without[0][0])} is there, but no folder with its images: looked for "
                         f"{', '.join(str(Path(root, folder)) for _, folder in without)}")
    looked = "; ".join(f"{file} with images in {folder}" for file, folder in places[: len(_LAYOUTS)])
    raise ValueError(f"{os.fspath(root)!r} {'has' if Path(root).is_dir() else 'is no folder, so it has'} no COCO split "
                     f"{split!r}. Looked for {looked}")


def has_boxes(root: str | os.PathLike[str], split: str) -> bool:
    """Are there annotations where `open_coco` looks for them?"""
    return yolo.find(root) is not None or any(Path(root, file).is_file() for file, _ in _places(split))


def _places(split: str) -> list[tuple[str, str]]:
    return [tuple(part.format(split=name) for part in layout) for name in _named(split) for layout in _LAYOUTS]


def _named(split: str) -> list[str]:
    return list(dict.fromkeys((split, *(_VALIDATION if split in _VALIDATION else ()))))


def read_class_names(path: str | os.PathLike[str]) -> list[str]:
    """Class names by label: of annotations in COCO's format if the name ends in .json, else of a text, one per line.

    Raises:
        ValueError: if the file is missing, or of another format.
    """
    path = os.fspath(path)
    if path.lower().endswith(".json"):
        return [category.name for category in _categories(path, _read_json(path)["categories"])]
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ValueError(f"no class names in {path}: {error.strerror}") from error
    return [line.strip() for line in lines if line.strip()]


def collate(batch: Sequence[tuple[torch.Tensor, Target] | None]
            ) -> tuple[torch.Tensor | list[torch.Tensor], list[Target]] | None:
    """For a DataLoader: the readable items as a batch.

    Returns:
        Images (B, 3, H, W), of different sizes as a list of (3, H, W), and the targets as a list; None if no item was
        readable.
    """
    items = [item for item in batch if item is not None]
    if not items:
        return None
    images, targets = zip(*items, strict=True)
    alike = len({image.shape for image in images}) == 1
    return torch.stack(images) if alike else list(images), list(targets)


def _read_json(path: str, masks: bool = False) -> dict[str, list[Any]]:
    try:
        with open(path, "rb") as file:
            content = json.load(file, object_hook=None if masks else _without_mask)
    except OSError as error:
        raise ValueError(f"no annotations in {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:  # also bytes that are no text
        raise ValueError(f"{path} is no json file, or cut short ({error}): copy or download it again") from error
    if not isinstance(content, dict):
        content = {}
    if lacking := [name for name in ("images", "annotations", "categories") if not isinstance(content.get(name), list)]:
        raise ValueError(f"{path} is not in COCO's instances format: it has no list of {' and '.join(lacking)}")
    return content


def _categories(path: str, entries: Sequence[Any]) -> list[Category]:
    ids = _column(path, "categories", entries, "id", "an integer")
    names = _column(path, "categories", entries, "name", "a text")
    _refuse_repeated(ids, f"{path}: category id")
    if not ids:
        raise ValueError(f"{path} lists no category")
    return sorted(map(Category, ids, (" ".join(name.split()) for name in names)))  # a line break cannot be drawn


def _without_mask(entry: dict[str, Any]) -> dict[str, Any]:
    # While reading, since the masks are nine tenths of COCO's files.
    entry.pop("segmentation", None)
    return entry


def _number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < _LARGEST


def _is_polygon(value: Any) -> bool:
    return type(value) is list and len(value) >= 6 and len(value) % 2 == 0 and all(map(_number, value))


# What a field can be, as messages call it.
_SIDE, _BOX = "a positive integer", "four finite numbers, x, y, width, height"
_OUTLINE = "polygons of three points or more, or run lengths with their size"
_IS: dict[str, Callable[[Any], bool]] = {
    "an integer": lambda value: type(value) is int and abs(value) < 2**63,
    _SIDE: lambda value: type(value) is int and 0 < value < 2**63,
    "a finite number": _number,
    "0 or 1": lambda value: value in (0, 1),
    "a text": lambda value: type(value) is str and value != "",
    _BOX: lambda value: type(value) is list and len(value) == 4 and all(map(_number, value)),
    _OUTLINE: lambda value: all(map(_is_polygon, value)) if type(value) is list else (
        type(value) is dict and {"counts", "size"} <= value.keys()),
}


def _column(path: str, kind: str, entries: Sequence[Any], name: str, what: str, default: Any = None) -> list[Any]:
    """One field of all entries of a list in the file; raises ValueError on the first that is not what it should be."""
    values = []
    for i, entry in enumerate(entries):
        value = entry.get(name) if isinstance(entry, Mapping) else entry
        if value is None and default is not None:  # absent, or null
            value = default
        elif type(value) is float and value.is_integer() and what.endswith("integer"):
            value = int(value)
        elif not isinstance(entry, Mapping) or not _IS[what](value):
            raise ValueError(f"{path}: {name} of {kind}[{i}] must be {what}, found {repr(value)[:80]}")
        values.append(value)
    return values


def _refuse_repeated(values: Sequence[Any], what: str) -> None:
    if repeated := [value for value, count in Counter(values).items() if count > 1]:
        raise ValueError(f"{what} {repeated[0]!r} is listed more than once: every one may occur once only")


def _corners(boxes: np.ndarray) -> np.ndarray:
    """xywh to xyxy."""
    return np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)


def _clip(corners: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """xyxy (n, 4) within images of width and height (2,) or (n, 2)."""
    return corners.clip(0, np.concatenate([sizes, sizes], axis=-1))


def _reaches_over(corners: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    return (abs(_clip(corners, sizes) - corners) > _SLACK).any(axis=1)


def _listed(values: Sequence[int]) -> str:
    return ", ".join(map(str, values[:-1])) + f" and {values[-1]}"


def _has_area(corners: np.ndarray) -> np.ndarray:
    return (corners[:, 2:] > corners[:, :2]).all(axis=1)
