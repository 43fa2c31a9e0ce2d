"""Drawn detections: boxes and labels where they belong, of their colours, within the picture."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from adn.detect.draw import draw_detections, label_colour

WHITE = (255, 255, 255)


def result(*found: tuple[float, int, list[float]]) -> dict[str, torch.Tensor]:
    return {"scores": torch.tensor([f[0] for f in found]), "labels": torch.tensor([f[1] for f in found]).long(),
            "boxes": torch.tensor([f[2] for f in found]).reshape(-1, 4)}


def coloured(picture: Image.Image, colour: tuple[int, int, int]) -> tuple[int, int, int, int] | None:
    """Left, top, right, bottom pixel of a colour."""
    rows, columns = np.nonzero((np.asarray(picture) == colour).all(axis=2))
    return (columns.min(), rows.min(), columns.max(), rows.max()) if len(rows) else None


def test_outline() -> None:
    image = Image.new("RGB", (200, 120), WHITE)
    drawn = draw_detections(image, result((0.9, 2, [20.4, 50.4, 150.0, 99.6])), ["a", "b", "cat"])
    colour = label_colour(2)
    assert image.tobytes() == Image.new("RGB", (200, 120), WHITE).tobytes(), "the picture itself is left as it was"
    pixels = np.asarray(drawn)
    for x, y in ((20, 75), (150, 75), (85, 50), (85, 100)):
        assert tuple(pixels[y, x]) == colour
    inside = pixels[52:99, 22:149]
    assert (inside == 255).all()
    left, top, right, bottom = coloured(drawn, colour)
    assert (left, right, bottom) == (20, 150, 100)
    assert 50 - 20 < top < 50 - 5, "the name lies above the box"
    assert (pixels[102:] == 255).all()


def test_threshold_and_nothing_found() -> None:
    image = Image.new("RGB", (100, 100), WHITE)
    found = result((0.49, 0, [10, 20, 30, 40]), (0.5, 1, [50, 50, 90, 90]))
    assert coloured(draw_detections(image, found), label_colour(0)) is None
    assert coloured(draw_detections(image, found), label_colour(1)) is not None
    assert coloured(draw_detections(image, found, threshold=0.4), label_colour(0)) is not None
    for nothing in (result(), result((0.2, 0, [1, 1, 9, 9]))):
        assert draw_detections(image, nothing).tobytes() == image.tobytes()


def test_the_best_lies_on_top() -> None:
    image = Image.new("RGB", (100, 100), WHITE)
    box = [20, 40, 80, 80]
    for order in ([0, 1], [1, 0]):
        found = [(0.6, 0, box), (0.8, 1, box)]
        drawn = draw_detections(image, result(*(found[k] for k in order)))
        assert drawn.getpixel((50, 80)) == label_colour(1)
        assert coloured(drawn, label_colour(0)) is None


@pytest.mark.parametrize("size", [(90, 60), (640, 480), (2000, 1500)])
@pytest.mark.parametrize("box", [[0, 0, 1, 1], [0.9, 0, 1, 0.1], [0.9, 0.9, 1, 1], [-0.5, -0.5, 1.5, 1.5],
                                 [0.6, 0.3, 0.5, 0.2]])
def test_names_and_boxes_stay_within_the_picture(size: tuple[int, int], box: list[float]) -> None:
    """At edges and corners the whole name is seen: as many of its pixels as in the middle."""
    ground = (90, 90, 90)
    middle, there = ([u * side for u, side in zip(b, size * 2, strict=True)] for b in ([0.3, 0.5, 0.32, 0.52], box))
    counts = []
    for where in (middle, there):
        drawn = np.asarray(draw_detections(Image.new("RGB", size, ground), result((1.0, 0, where)), ["dog"]))
        counts.append(((drawn != ground).any(axis=2) & (drawn != label_colour(0)).any(axis=2)).sum())
    assert counts[0] > 50
    assert counts[1] == counts[0]


def test_classes_have_distinct_bright_colours() -> None:
    colours = np.array([label_colour(k) for k in range(80)], dtype=int)
    assert len(set(map(tuple, colours))) == 80
    assert abs(np.diff(colours, axis=0)).sum(axis=1).min() > 100
    assert colours.max(axis=1).min() > 200


def test_labels_without_a_name_and_other_modes() -> None:
    image = Image.new("L", (120, 80), 255)
    named = draw_detections(image, result((0.9, 3, [20, 30, 60, 60])), ["a"])
    assert named.mode == "RGB"
    assert named.tobytes() == draw_detections(image, result((0.9, 3, [20, 30, 60, 60])), ["a", "b", "c", "3"]).tobytes()
    assert named.tobytes() != draw_detections(image, result((0.9, 3, [20, 30, 60, 60])), ["a", "b", "c", "d"]).tobytes()
    assert named.tobytes() != draw_detections(image, result((0.8, 3, [20, 30, 60, 60])), ["a"]).tobytes()
