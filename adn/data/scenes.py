"""Scenes of real handwritten digits with their boxes: data for a detector that needs no download; see `adn scenes`."""

from __future__ import annotations

import colorsys
import dataclasses
import json
import os
import secrets
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from ..core.progress import progress_bar

CLASSES = tuple("0123456789")  # categories 1 to 10
SPLITS = ("train", "val")
SMALLEST_SIZE = 64
HELD_OUT = 360  # digits, for validation scenes and the evaluation of `adn demo`

_FORMAT = 1  # of what a seed means
_MOST = 12  # objects in a scene
_SMALLEST, _LARGEST = 12, 0.44  # height of a digit: in pixels; as a share of the scene's
_VISIBLE = 0.75  # of each digit's pixels, at least
_CONTRAST = 50  # least difference in brightness of a digit and what it lies on, of 255
_TRIES = 10
_QUALITY = 92


@dataclasses.dataclass(frozen=True)
class Scene:
    """A picture and what is in it.

    Attributes:
        image: RGB.
        labels: the digits, farthest at the back first.
        owner: int16 (H, W), at every pixel the index in `labels` of the digit that is seen there; -1 = none.
    """

    image: Image.Image
    labels: list[int]
    owner: np.ndarray

    @property
    def boxes(self) -> list[tuple[int, int, int, int]]:
        """x, y, width, height of what is visible of each digit, in whole pixels."""
        edges = (_edges(self.owner == index) for index in range(len(self.labels)))
        return [(left, top, right - left, bottom - top) for left, top, right, bottom in edges]


def write_scenes(out: str | os.PathLike[str], images: int = 2000, val_images: int | None = None, size: int = 256,
                 seed: int = 0, progress: bool = True) -> Path:
    """Write a folder of scenes that `open_coco` reads: `images/train`, `images/val`, and their `instances_*.json`.

    A scene has up to twelve digits of 12 pixels to 0.44 of its side in height, each with at least three quarters of its
    pixels visible. Boxes are tight round what is visible, as in COCO; `area` is that of the box. Categories are "0" to
    "9" with ids 1 to 10. The folder appears when it is complete; where one of the same settings is, it remains.

    Args:
        out: the folder to make.
        images: scenes to train on.
        val_images: scenes to evaluate on; None = a fifth of `images`, but at least one.
        size: side of the scenes in pixels, at least 64.
        seed: not negative. A scene follows from seed, split and its number, so more of them change none.
        progress: show a progress bar, if in a terminal.

    Returns:
        The folder.

    Raises:
        ImportError: without scikit-learn, `pip install "adn[demo]"`.
        ValueError: on settings that make no sense, or if there is something else at `out`.
    """
    val_images = max(1, images // 5) if val_images is None else val_images
    if images < 1 or val_images < 1 or size < SMALLEST_SIZE or seed < 0:
        raise ValueError(f"images={images}, val_images={val_images}, size={size}, seed={seed}; pass at least one image "
                         f"of each kind, a size of {SMALLEST_SIZE} or more, and a seed of 0 or more")
    out = Path(os.path.abspath(out))
    info = {"description": "adn digit scenes", "format": _FORMAT, "size": size, "seed": seed, "images": images,
            "val_images": val_images}
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        if _info(out) != info:
            raise ValueError(f"{out} holds something else than the scenes asked for; choose another folder, or remove "
                             "it")
        return out
    glyphs, digits, held_out = load_digits()
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.name}.{secrets.token_hex(4)}.tmp")
    bar = progress_bar(total=images + val_images, desc="scenes", unit="image", show=progress)
    try:
        with bar:
            for number, (split, count) in enumerate(zip(SPLITS, (images, val_images), strict=True)):
                chosen = held_out == (split == "val")
                content: dict[str, Any] = {"info": info, "images": [], "annotations": [], "categories": [
                    {"id": i, "name": name, "supercategory": "digit"} for i, name in enumerate(CLASSES, 1)]}
                folder = temporary / "images" / split
                folder.mkdir(parents=True)
                for index in range(1, count + 1):
                    scene = make_scene(np.random.default_rng([seed, number, index]), glyphs[chosen], digits[chosen],
                                       size)
                    name = f"{index:06}.jpg"
                    scene.image.save(folder / name, quality=_QUALITY)
                    _describe(content, index, name, scene)
                    bar.update()
                (temporary / f"instances_{split}.json").write_text(json.dumps(content), encoding="utf-8")
        temporary.rename(out)  # also onto an empty folder
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return out


def read_digits() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """scikit-learn's digits (Alpaydin and Kaynak 1998, test part).

    Returns:
        Grey values float64 (1797, 8, 8), 0 = paper to 16 = ink; digits int64 (1797,); an order int64 (1797,), in which
        the first `HELD_OUT` are those that nothing is learnt from.

    Raises:
        ImportError: without scikit-learn, `pip install "adn[demo]"`.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError('handwritten digits need scikit-learn: pip install "adn[demo]"') from error
    import torch

    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(len(data.target)))
    return data.images, data.target.astype(np.int64), order.numpy()


def load_digits() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of `read_digits`: grey values uint8 (1797, 8, 8), 0 = paper to 255 = ink; digits int64 (1797,); bool (1797,),
    which are for validation scenes."""
    grey, digits, order = read_digits()
    held_out = np.zeros(len(order), dtype=bool)
    held_out[order[:HELD_OUT]] = True
    return (grey * (255 / 16)).round().astype(np.uint8), digits, held_out


def make_scene(rng: np.random.Generator, glyphs: np.ndarray, digits: np.ndarray, size: int) -> Scene:
    """One scene.

    Args:
        rng: everything is drawn from it.
        glyphs: to choose from, uint8 (N, 8, 8), 0 = paper.
        digits: which they are, (N,).
        size: side in pixels.
    """
    canvas = _background(rng, glyphs, size)
    owner = np.full((size, size), -1, dtype=np.int16)
    labels: list[int] = []
    pixels: list[int] = []  # of each digit, also where it is hidden
    for _ in range(rng.integers(_MOST + 1)):
        which = rng.integers(len(glyphs))
        ink = _enlarge(rng, glyphs[which], _draw_height(rng, size))
        mask = ink >= 0.5
        height, width = mask.shape
        for _ in range(_TRIES):
            y, x = rng.integers(size - height + 1), rng.integers(size - width + 1)
            place = np.s_[y : y + height, x : x + width]
            hidden = np.bincount(owner[place][mask] + 1, minlength=len(labels) + 1)[1:]
            visible = np.array([(owner == i).sum() for i in np.flatnonzero(hidden)])
            if (visible - hidden[hidden > 0] >= _VISIBLE * np.array(pixels)[hidden > 0]).all():
                break
        else:
            continue
        colour = _contrasting(rng, canvas[place][mask].mean(axis=0))
        canvas[place] += (colour - canvas[place]) * ink[..., None]
        owner[place][mask] = len(labels)
        labels.append(int(digits[which]))
        pixels.append(int(mask.sum()))
    canvas += rng.standard_normal(canvas.shape, dtype=np.float32) * rng.uniform(0, 12)
    return Scene(Image.fromarray(canvas.clip(0, 255).round().astype(np.uint8)), labels, owner)


def _background(rng: np.random.Generator, glyphs: np.ndarray, size: int) -> np.ndarray:
    """float32 (size, size, 3), 0..255: a blotched colour with lines, blobs and pieces of digits."""
    blotches = _colour(rng) + rng.normal(0, rng.uniform(0, 30), (5, 5, 3))
    image = Image.fromarray(blotches.clip(0, 255).astype(np.uint8)).resize((size, size), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(image)
    for _ in range(rng.integers(7)):
        ends = rng.uniform(0, size, 4).tolist()
        draw.line(ends, tuple(_colour(rng).astype(int)), int(rng.integers(1, max(3, size // 50))))
    for _ in range(rng.integers(5)):
        x, y = rng.uniform(0, size, 2)
        w, h = rng.uniform(0.02, 0.12, 2) * size
        draw.ellipse((x - w, y - h, x + w, y + h), tuple(_colour(rng).astype(int)))
    canvas = np.asarray(image, dtype=np.float32).copy()
    for _ in range(rng.integers(5)):
        piece = glyphs[rng.integers(len(glyphs))]
        piece = piece if rng.random() < 0.5 else piece.T
        start = rng.integers(6)
        ink = _enlarge(rng, piece[start : start + 3], _draw_height(rng, size) // 2)
        height, width = (min(side, size) for side in ink.shape)
        y, x = rng.integers(size - height + 1), rng.integers(size - width + 1)
        place = np.s_[y : y + height, x : x + width]
        canvas[place] += (_colour(rng) - canvas[place]) * ink[:height, :width, None]
    return canvas


def _draw_height(rng: np.random.Generator, size: int) -> int:
    return round(float(np.exp(rng.uniform(np.log(_SMALLEST), np.log(_LARGEST * size)))))


def _enlarge(rng: np.random.Generator, glyph: np.ndarray, height: int) -> np.ndarray:
    """Ink, float32 (H, W), 0 to 1, of a glyph of about `height` pixels, tilted and stretched, without empty margins."""
    padded = Image.fromarray(np.pad(glyph, 1))
    cell = height / glyph.shape[0]
    width = max(1, round(padded.width * cell * rng.uniform(0.8, 1.2)))
    large = padded.resize((width, max(1, round(padded.height * cell))), Image.Resampling.BICUBIC)
    large = large.rotate(rng.uniform(-12, 12), Image.Resampling.BILINEAR, expand=True)
    # Steeper edges than interpolation gives.
    ink = ((np.asarray(large, dtype=np.float32) / 255 - 0.25) / 0.35).clip(0, 1)
    left, top, right, bottom = _edges(ink >= 0.5) or (0, 0, *ink.shape[::-1])
    return ink[top:bottom, left:right]


def _edges(mask: np.ndarray) -> tuple[int, int, int, int] | None:
    """Left, top, right, bottom of what is set; None if nothing is."""
    return Image.fromarray(mask.astype(np.uint8)).getbbox()


def _colour(rng: np.random.Generator) -> np.ndarray:
    """float32 (3,), 0 to 255."""
    return np.array(colorsys.hsv_to_rgb(rng.random(), rng.uniform(0, 0.9), rng.random()), dtype=np.float32) * 255


def _contrasting(rng: np.random.Generator, ground: np.ndarray) -> np.ndarray:
    while True:
        colour = _colour(rng)
        if abs(_brightness(colour) - _brightness(ground)) >= _CONTRAST:
            return colour


def _brightness(colour: np.ndarray) -> float:
    return float(colour @ (0.299, 0.587, 0.114))


def _describe(content: dict[str, Any], image_id: int, name: str, scene: Scene) -> None:
    width, height = scene.image.size
    content["images"].append({"id": image_id, "file_name": name, "width": width, "height": height})
    for label, box in zip(scene.labels, scene.boxes, strict=True):
        content["annotations"].append({"id": len(content["annotations"]) + 1, "image_id": image_id, "bbox": box,
                                       "category_id": label + 1, "area": box[2] * box[3], "iscrowd": 0})


def _info(out: Path) -> dict[str, Any] | None:
    try:
        return json.loads((out / "instances_train.json").read_text(encoding="utf-8"))["info"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
