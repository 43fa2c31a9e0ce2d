"""Images made of several: objects stay where their pixels are, and what is drawn can be repeated."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from adn.data import mosaic
from adn.data.coco import CocoImages, collate
from adn.data.mosaic import Compose, letterbox
from adn.data.transforms import eval_transform, train_transform
from adn.models.yolov12.postprocess import postprocess
from adn.settings import DetectorSettings
from adn.tasks import augmentation
from adn.train import TrainBatches

SIZE = 96
# Width, height, boxes xywh: each a rectangle of a colour of its own on black.
IMAGES = [(80, 60, [[10, 12, 30, 20], [50, 30, 18, 25]]), (60, 90, [[5, 50, 25, 30]]), (64, 64, []),
          (120, 40, [[4, 4, 20, 30], [90, 10, 24, 20]]), (50, 50, [[6, 8, 14, 30]])]
COLOURS = [(250, 40, 40), (40, 250, 40), (40, 40, 250), (250, 250, 40), (40, 250, 250), (250, 40, 250)]


@pytest.fixture
def data(tmp_path: Path) -> CocoImages:
    return write(tmp_path)


def write(root: Path, outlines: bool = False, **settings: Any) -> CocoImages:
    content: dict[str, Any] = {"images": [], "annotations": [],
                               "categories": [{"id": i, "name": str(i)} for i in range(len(COLOURS))]}
    for i, (width, height, boxes) in enumerate(IMAGES):
        pixels = np.zeros((height, width, 3), dtype=np.uint8)
        for x, y, w, h in boxes:
            label = len(content["annotations"])
            pixels[y : y + h, x : x + w] = COLOURS[label]
            outline = [[x, y, x + w, y, x + w, y + h, x, y + h]] if outlines else []
            content["annotations"].append({"id": label + 1, "image_id": i, "category_id": label, "bbox": [x, y, w, h],
                                           "segmentation": outline})
        Image.fromarray(pixels).save(root / f"{i}.png")
        content["images"].append({"id": i, "file_name": f"{i}.png", "width": width, "height": height})
    (root / "a.json").write_text(json.dumps(content))
    return CocoImages(root, root / "a.json", **settings)


def edges(image: Image.Image, label: int) -> list[float] | None:
    """Of the pixels of an object's colour."""
    near = (abs(np.asarray(image).astype(int) - COLOURS[label]) < 60).all(-1)
    if not near.any():
        return None
    (rows,), (columns,) = near.any(1).nonzero(), near.any(0).nonzero()
    return [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]


def check(item: tuple[Image.Image, dict[str, Any]]) -> int:
    """Boxes are round their pixels; how many there were."""
    image, target = item
    assert image.size == (SIZE, SIZE)
    assert len(target["boxes"]) == len(target["labels"])
    alone = [label for label in target["labels"].tolist() if target["labels"].tolist().count(label) == 1]
    for label, box in zip(target["labels"].tolist(), target["boxes"].tolist(), strict=True):
        assert 0 <= box[0] < box[2] <= SIZE
        assert 0 <= box[1] < box[3] <= SIZE
        if label in alone and min(box[2] - box[0], box[3] - box[1]) > 5:
            assert edges(image, label) == pytest.approx(box, abs=2)
    return len(target["labels"])


@pytest.mark.parametrize("settings", [
    {}, {"scale": 0.9, "translate": 0.1}, {"mosaic": 1.0}, {"mosaic": 1.0, "scale": 0.9, "translate": 0.1},
], ids=["alone", "moved", "mosaic", "mosaic moved"])
def test_boxes_are_where_their_pixels_are(data: CocoImages, settings: dict[str, float]) -> None:
    torch.manual_seed(0)
    compose = Compose(data, SIZE, **settings)
    objects = [check(compose(*data[i % len(data)])) for i in range(40)]
    assert sum(objects) > (80 if "mosaic" in settings else 30)
    if "mosaic" in settings:
        assert max(objects) > 3


def test_alone_is_letterbox(data: CocoImages) -> None:
    image, target = Compose(data, SIZE)(*data[0])
    assert target["boxes"].tolist() == [[12, pytest.approx(12 + 14.4), 48, pytest.approx(12 + 38.4)],
                                        [60, 48, pytest.approx(81.6), 78]]
    assert image.getpixel((50, 11)) == image.getpixel((50, 84)) == mosaic.GREY
    assert image.getpixel((50, 12)) == (0, 0, 0)
    assert target["image_id"] == 0
    assert target["size"].tolist() == [80, 60]
    other = letterbox(*data[0], size=SIZE)
    assert np.array_equal(np.asarray(image), np.asarray(other[0]))
    assert torch.equal(target["boxes"], other[1]["boxes"])


@pytest.mark.parametrize("index", range(len(IMAGES)))
def test_evaluation_finds_its_way_back(data: CocoImages, index: int) -> None:
    """What is found on the letterboxed image is given for the original."""
    data.transform = eval_transform(SIZE, letterbox=True)
    image, target = data[index]
    assert image.shape == (3, SIZE, SIZE)
    decoded = torch.cat([target["boxes"].T * SIZE, torch.full((1, len(target["boxes"])), 0.9)])[None]
    maps = [torch.zeros(1, 65, SIZE // stride, SIZE // stride) for stride in (8, 16, 32)]
    found, = postprocess({"decoded": decoded, "maps": maps}, [target["size"]])
    expected = [[x, y, x + w, y + h] for x, y, w, h in IMAGES[index][2]]
    assert sorted(found["boxes"].tolist()) == [pytest.approx(box, abs=1e-3) for box in sorted(expected)]


def test_objects_of_which_little_is_left(data: CocoImages) -> None:
    target = {"boxes": torch.tensor([[0.0, 0, 10, 10], [20, 20, 22, 21], [0, 30, 40, 30.2]]),
              "labels": torch.arange(3)}
    image = Image.new("RGB", (48, 48))
    assert mosaic._on_grey(SIZE, [((image, target), 96, 96, 0, 0)])[1]["labels"].tolist() == [0, 1]
    assert mosaic._on_grey(SIZE, [((image, target), 96, 96, -10, -10)])[1]["labels"].tolist() == [0, 1]
    assert mosaic._on_grey(SIZE, [((image, target), 96, 96, -15, -15)])[1]["labels"].tolist() == [1]
    assert mosaic._on_grey(SIZE, [((image, target), 48, 48, 0, 0)])[1]["labels"].tolist() == [0]
    assert mosaic._on_grey(SIZE, [((image, target), 96, 96, 200, 0)])[1]["labels"].tolist() == []


def test_blend(data: CocoImages) -> None:
    torch.manual_seed(1)
    compose = Compose(data, SIZE, blend=1.0)
    seen = [compose(*data[0])[1]["labels"].tolist() for _ in range(20)]
    assert all(labels[:2] == [0, 1] for labels in seen)
    assert {tuple(labels[2:]) for labels in seen} > {(2,), (3, 4), (5,), ()}
    image, target = mosaic._blended((Image.new("RGB", (8, 8), (200, 0, 0)), data[0][1]),
                                    (Image.new("RGB", (8, 8), (0, 200, 0)), data[3][1]))
    red, green, _ = image.getpixel((4, 4))
    assert red + green == pytest.approx(200, abs=2)
    assert 50 < red < 150
    assert target["boxes"].canvas_size == (8, 8)


def test_copies(tmp_path: Path) -> None:
    data = write(tmp_path, outlines=True, masks=True)
    torch.manual_seed(0)
    # Each, mirrored, would hide more than 30 % of the other.
    assert Compose(data, SIZE, copy_paste=1.0)(*data[3])[1]["labels"].tolist() == [3, 4]
    assert sorted(Compose(data, SIZE, copy_paste=1.0)(*data[0])[1]["labels"].tolist()) == [0, 0, 1, 1]
    assert len(Compose(data, SIZE, copy_paste=0.5)(*data[0])[1]["labels"]) == 3
    image, target = Compose(data, SIZE, copy_paste=1.0)(*data[1])
    assert target["labels"].tolist() == [2, 2]
    (x, y, right, bottom), (x2, y2, right2, bottom2) = target["boxes"].tolist()
    assert (x + right2, right + x2) == pytest.approx((SIZE, SIZE))
    assert (y, bottom) == (y2, bottom2)
    assert image.getpixel((round(x2) + 3, round(y2) + 3)) == COLOURS[2]
    assert "masks" not in target
    assert Compose(data, SIZE)(*data[1])[1]["labels"].tolist() == [2]
    without = write(tmp_path, masks=True)
    assert Compose(without, SIZE, copy_paste=1.0)(*without[1])[1]["labels"].tolist() == [2]


def test_last_epochs_are_plain(data: CocoImages) -> None:
    recipe = DetectorSettings(epochs=5, plain_epochs=2, mosaic=1.0, size=SIZE, batch_size=2, distort=0, zoom_out=0,
                              crop=0, flip=0)
    data.transform = augmentation(recipe, data, letterbox=True)
    batches = TrainBatches(data, recipe, collate=collate)
    for epoch in range(5):
        torch.manual_seed(0)
        objects = sum(len(target["labels"]) for _, targets in batches(epoch) for target in targets)
        assert (objects == len(COLOURS)) == (epoch >= 3)


def test_an_unreadable_image_leaves_its_place_grey(data: CocoImages, tmp_path: Path) -> None:
    for i in range(1, len(IMAGES)):
        (tmp_path / f"{i}.png").write_bytes(b"no image")
    torch.manual_seed(0)
    _image, target = Compose(data, SIZE, mosaic=1.0, blend=1.0)(*data[0])
    assert set(target["labels"].tolist()) <= {0, 1}
    assert len(data.unreadable) == 4


def test_seeds_repeat(data: CocoImages) -> None:
    compose = Compose(data, SIZE, mosaic=0.5, blend=0.5, scale=0.5, translate=0.1)
    transform = train_transform(SIZE, compose=compose, hue=0.1, saturation=0.7, brightness=0.4)

    def draw(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return torch.stack([transform(*data[0])[0] for _ in range(4)])

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))


def test_colours_change_as_they_should(data: CocoImages) -> None:
    plain = {"distort": 0, "zoom_out": 0, "crop": 0, "flip": 0}
    base = eval_transform(64)(*data[2])[0]
    image = Image.new("RGB", (64, 64), (200, 100, 50))
    item = (image, data[2][1])
    values = torch.stack([train_transform(64, brightness=0.4, **plain)(*item)[0][:, 5, 5] for _ in range(60)])
    assert values[:, 0].min() < 0.6
    assert values[:, 0].max() > 0.95
    torch.testing.assert_close(values[:, 1] / values[:, 0], torch.full((60,), 0.5), atol=0.02, rtol=0)
    hues = torch.stack([train_transform(64, hue=0.5, **plain)(*item)[0][:, 5, 5] for _ in range(60)])
    torch.testing.assert_close(hues.amax(1), torch.full((60,), 200 / 255), atol=0.01, rtol=0)
    assert {int(i) for i in hues.argmax(1)} == {0, 1, 2}
    assert train_transform(64, **plain)(*data[2])[0].equal(base)
