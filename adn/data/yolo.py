"""Images with label files in YOLO's format, as the content of a file in COCO's.

Beside a folder `images` stands one `labels`, with a text file for each image that has objects: per object a line of its
class and its box, centre x, centre y, width and height in parts of the image, or its outline, x and y of three points
or more. A `data.yaml` names the classes and says where the splits are.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

from .images import UNREADABLE

NAMES = ("data.yaml", "data.yml", "dataset.yaml")
_ENDINGS = {ending for ending, kind in Image.registered_extensions().items() if kind in Image.OPEN}


def find(root: str | os.PathLike[str]) -> Path | None:
    """The description of a data set: the file itself, or that in a folder."""
    root = Path(root)
    if root.suffix in (".yaml", ".yml") and root.is_file():
        return root
    return next((root / name for name in NAMES if (root / name).is_file()), None)


def read(description: Path, splits: Sequence[str]) -> tuple[Path, dict[str, list[dict[str, Any]]]]:
    """The folder that file names are relative to, and images, annotations and categories as COCO has them.

    Args:
        splits: names of the split, the first that is there counts.

    Raises:
        ValueError: if it is no such description, has no such split or no image; on label files with lines of another
            number of columns, classes that are not listed, and places outside of 0..1.
    """
    about = _load(description)
    names = _names(description, about)
    split = next((split for split in splits if about.get(split)), None)
    if split is None:
        raise ValueError(f"{description} has no split {splits[0]!r}; it has "
                         f"{', '.join(k for k in ('train', 'val', 'valid', 'test') if about.get(k)) or 'none'}")
    root = (description.parent / str(about.get("path") or "")).resolve()
    paths = sorted(set(_images(description, root, about[split])))
    if not paths:
        raise ValueError(f"{description}: no image in {about[split]!r} of {root}")
    images: list[dict[str, Any]] = []
    objects: list[dict[str, Any]] = []
    for path in paths:
        try:
            with Image.open(path) as file:
                width, height = file.size
        except UNREADABLE:  # left out, and named, when it is asked for
            width, height = 1, 1
        images.append({"id": len(images), "file_name": os.path.relpath(path, root), "width": width, "height": height})
        for label, values in _labels(_label_file(path), names):
            (left, top, right, bottom), outline = _corners(values), []
            if len(values) > 4:
                outline = [[value * side for value, side in zip(values, itertools.cycle((width, height)))]]
            objects.append({
                "image_id": len(images) - 1, "category_id": label, "segmentation": outline,
                "bbox": [left * width, top * height, (right - left) * width, (bottom - top) * height]})
    return root, {"images": images, "annotations": objects,
                  "categories": [{"id": i, "name": name} for i, name in sorted(names.items())]}


def _load(path: Path) -> dict[str, Any]:
    try:
        about = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not isinstance(about, dict):
        raise ValueError(f"{path} describes no data set: it has no names and splits")
    return about


def _names(path: Path, about: dict[str, Any]) -> dict[int, str]:
    names = about.get("names")
    if isinstance(names, list):
        names = dict(enumerate(names))
    if not isinstance(names, dict) or not names or not all(type(i) is int and i >= 0 for i in names):
        raise ValueError(f"{path} names no classes: names must be a list, or a mapping from numbers")
    if about.get("nc") not in (None, len(names)):
        raise ValueError(f"{path}: nc is {about['nc']}, but there are {len(names)} names")
    return {i: str(name) for i, name in names.items()}


def _images(description: Path, root: Path, where: Any) -> Iterator[Path]:
    """Of a folder, of a text file that lists images, or of several of these."""
    for entry in where if isinstance(where, list) else [where]:
        # Some tools write paths relative to the folder above.
        places = [root / str(entry), description.parent / str(entry), root / str(entry).removeprefix("../")]
        path = next((place for place in places if place.exists()), None)
        if path is None:
            raise ValueError(f"{description}: {entry!r} is not there; looked for "
                             f"{', '.join(map(str, dict.fromkeys(places)))}")
        if path.is_dir():
            yield from (file.resolve() for file in path.rglob("*") if file.suffix.lower() in _ENDINGS)
        else:
            yield from ((path.parent / line.strip()).resolve() for line in path.read_text(encoding="utf-8").splitlines()
                        if line.strip())


def _corners(values: list[float]) -> tuple[float, float, float, float]:
    if len(values) > 4:
        return min(values[::2]), min(values[1::2]), max(values[::2]), max(values[1::2])
    x, y, w, h = values
    return x - w / 2, y - h / 2, x + w / 2, y + h / 2


def _label_file(image: Path) -> Path:
    parts = list(image.parts)
    for i in reversed(range(len(parts) - 1)):
        if parts[i] == "images":
            return Path(*parts[:i], "labels", *parts[i + 1 :]).with_suffix(".txt")
    return image.with_suffix(".txt")


def _labels(file: Path, names: dict[int, str]) -> Iterator[tuple[int, list[float]]]:
    if not file.is_file():
        return
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        where, words = f"{file}, line {number}", line.split()
        try:
            values = [float(word) for word in words]
        except ValueError:
            values = []
        if not (len(values) == 5 or (len(values) >= 7 and len(values) % 2)) or not values[0].is_integer():
            raise ValueError(f"{where}: {line.strip()[:60]!r}; a line is a class, then centre x, centre y, width and "
                             "height, or x and y of the points of an outline")
        if int(values[0]) not in names:
            raise ValueError(f"{where}: class {int(values[0])} of {len(names)}, which are {min(names)} to {max(names)}")
        if not all(0 <= value <= 1 for value in values[1:]):
            raise ValueError(f"{where}: {line.strip()[:60]!r}; places are in parts of the image, from 0 to 1")
        yield int(values[0]), values[1:]
