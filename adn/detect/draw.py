"""Detections drawn on their picture."""

from __future__ import annotations

import colorsys
from collections.abc import Mapping, Sequence

import torch
from PIL import Image, ImageDraw, ImageFont

# Each hue is this part of the circle further than the last: neighbouring labels differ, and no two are alike.
_GOLDEN = 0.618034


def draw_detections(image: Image.Image, result: Mapping[str, torch.Tensor], class_names: Sequence[str] = (),
                    threshold: float = 0.5) -> Image.Image:
    """A copy of a picture with a box, a name and a score in percent for every detection; the best lie on top.

    Boxes and names are as thick and large as suits the picture, of one colour per class, and names never leave it.

    Args:
        image: the picture that the boxes are for.
        result: of one image, from `postprocess`: `scores` (n,), `labels` (n,), `boxes` (n, 4) xyxy in pixels.
        class_names: by label; a label beyond them is drawn as its number.
        threshold: least score to draw.

    Returns:
        An RGB picture of the same size.
    """
    drawn = image.convert("RGB")
    draw = ImageDraw.Draw(drawn)
    thickness = max(1, round(min(drawn.size) / 240))
    font = ImageFont.load_default(max(10, round(min(drawn.size) / 36)))
    chosen = (result["scores"] >= threshold).nonzero().flatten()
    chosen = chosen[result["scores"][chosen].argsort(stable=True)]
    scores, labels, boxes = (result[key][chosen].tolist() for key in ("scores", "labels", "boxes"))
    for score, label, box in zip(scores, labels, boxes, strict=True):
        left, top, right, bottom = _within(box, drawn.size)
        colour = label_colour(label)
        draw.rectangle((left, top, right, bottom), outline=colour, width=thickness)
        name = class_names[label] if label < len(class_names) else str(label)
        text = f"{name} {100 * score:.0f}%"
        x0, y0, x1, y1 = draw.textbbox((0, 0), text, font, anchor="lt")
        width, height = x1 - x0 + 4, y1 - y0 + 4
        # Above the box if there is room, else within it.
        x = max(0, min(left, drawn.width - width))
        y = top - height if top >= height else min(top, max(0, drawn.height - height))
        draw.rectangle((x, y, x + width - 1, y + height - 1), colour)
        draw.text((x + 2, y + 2), text, _readable_on(colour), font, anchor="lt")
    return drawn


def grid(rows: Sequence[Sequence[Image.Image]], titles: Sequence[str], gap: int = 8) -> Image.Image:
    """Pictures of one size in rows and columns, on white, with a title over each column."""
    width, height = rows[0][0].size
    font = ImageFont.load_default(20)
    top = 20 + 2 * gap
    whole = Image.new("RGB", (len(titles) * (width + gap) + gap, top + len(rows) * (height + gap)), "white")
    draw = ImageDraw.Draw(whole)
    for x, title in enumerate(titles):
        left = gap + x * (width + gap)
        draw.text((left, gap), title, "black", font)
        for y, row in enumerate(rows):
            whole.paste(row[x], (left, top + y * (height + gap)))
    return whole


def label_colour(label: int) -> tuple[int, int, int]:
    """The RGB colour of a class."""
    red, green, blue = colorsys.hsv_to_rgb(label * _GOLDEN % 1, 0.85, 0.95)
    return round(255 * red), round(255 * green), round(255 * blue)


def _readable_on(colour: tuple[int, int, int]) -> str:
    red, green, blue = colour
    return "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 140 else "white"


def _within(box: Sequence[float], size: tuple[int, int]) -> tuple[int, int, int, int]:
    """The pixels of a picture that the edges of a box, xyxy, are drawn on."""
    left, right = (max(0, min(round(x), size[0] - 1)) for x in (box[0], box[2]))
    top, bottom = (max(0, min(round(y), size[1] - 1)) for y in (box[1], box[3]))
    return min(left, right), min(top, bottom), max(left, right), max(top, bottom)
