"""Augmentation and preparation: boxes against hand-computed ones, pixels that go with them, reproducibility."""

from __future__ import annotations

import json
import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.transforms import v2
from torchvision.tv_tensors import BoundingBoxes

from adn.data import transforms
from adn.data.coco import CocoImages, collate
from adn.data.transforms import draw_size, eval_transform, multi_scale_sizes, rescale, train_transform


def sample(width: int, height: int, boxes: list[list[float]]) -> tuple[Image.Image, dict[str, Any]]:
    """A black picture with a bright rectangle for every box, which must not overlap; labels 0, 1, 2, ..."""
    pixels = np.zeros((height, width, 3), dtype=np.uint8)
    for x0, y0, x1, y1 in boxes:
        pixels[round(y0) : round(y1), round(x0) : round(x1)] = 200
    return Image.fromarray(pixels), {
        "boxes": BoundingBoxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4), format="XYXY",
                               canvas_size=(height, width)),
        "labels": torch.arange(len(boxes)), "image_id": torch.tensor(12), "size": torch.tensor([width, height])}


def only(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """Take all random steps out of the augmentation, except for these."""
    for name in {"RandomPhotometricDistort", "RandomZoomOut", "RandomHorizontalFlip", "RandomApply"} - set(names):
        monkeypatch.setattr(v2, name, lambda *args, **kwargs: v2.Identity())


def always(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    made = getattr(v2, name)
    monkeypatch.setattr(v2, name, lambda *args, **kwargs: made(*args, **kwargs | {"p": 1.0}))


@pytest.mark.parametrize("make", [train_transform, eval_transform])
def test_resized_boxes_and_pixels(monkeypatch: pytest.MonkeyPatch, make) -> None:
    only(monkeypatch)
    image, target = make(64)(*sample(40, 20, [[4, 2, 14, 7], [20, 10, 40, 20]]))
    assert image.shape == (3, 64, 64)
    assert type(image) is type(target["boxes"]) is torch.Tensor
    assert image.dtype == target["boxes"].dtype == torch.float32
    expected = torch.tensor([[9 / 40, 4.5 / 20, 10 / 40, 5 / 20], [30 / 40, 15 / 20, 20 / 40, 10 / 20]])
    torch.testing.assert_close(target["boxes"], expected, rtol=0, atol=1e-6)
    assert target["labels"].tolist() == [0, 1]
    assert (target["image_id"].item(), target["size"].tolist()) == (12, [40, 20])
    assert image[:, 48, 48].tolist() == pytest.approx([200 / 255] * 3)
    assert image[:, 60, 3].tolist() == [0, 0, 0]


def test_pixels_are_those_of_pillow() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (50, 90, 3), dtype=np.uint8)
    image, _ = eval_transform(32)(Image.fromarray(pixels), sample(90, 50, [])[1])
    expected = np.asarray(Image.fromarray(pixels).resize((32, 32), Image.Resampling.BILINEAR))
    assert image.permute(1, 2, 0).mul(255).round().byte().numpy().tolist() == expected.tolist()
    assert 0 <= image.min() < image.max() <= 1


def test_flip(monkeypatch: pytest.MonkeyPatch) -> None:
    only(monkeypatch, "RandomHorizontalFlip")
    always(monkeypatch, "RandomHorizontalFlip")
    image, target = train_transform(64)(*sample(40, 20, [[4, 2, 14, 8]]))
    torch.testing.assert_close(target["boxes"], torch.tensor([[31 / 40, 5 / 20, 10 / 40, 6 / 20]]))
    assert image[0, 16, 50] > 0.7
    assert image[0, 16, 14] == 0


def test_zoom_out(monkeypatch: pytest.MonkeyPatch) -> None:
    only(monkeypatch, "RandomZoomOut")
    monkeypatch.setattr(v2.RandomZoomOut, "make_params", lambda self, inputs: {"padding": [10, 20, 30, 0]})
    always(monkeypatch, "RandomZoomOut")
    image, target = train_transform(64)(*sample(40, 20, [[0, 0, 40, 20]]))
    torch.testing.assert_close(target["boxes"], torch.tensor([[30 / 80, 30 / 40, 40 / 80, 20 / 40]]))
    assert image[0, 30:].max() > 0.7
    assert image[0, :30].max() == 0
    assert image[0, 34:, 10:38].min() > 0.7


def test_iou_crop(monkeypatch: pytest.MonkeyPatch) -> None:
    """One box inside, one cut, one whose centre is cut away, one outside, one cut down to half a pixel."""
    only(monkeypatch, "RandomApply")
    always(monkeypatch, "RandomApply")
    boxes = [[12, 12, 16, 18], [20, 12, 35, 16], [4, 12, 11, 18], [2, 30, 9, 39], [29.5, 20, 30.4, 26]]
    inside = torch.tensor([True, True, False, False, True])
    monkeypatch.setattr(v2.RandomIoUCrop, "make_params", lambda self, inputs: {
        "top": 10, "left": 10, "height": 20, "width": 20, "is_within_crop_area": inside})
    image, target = train_transform(64)(*sample(60, 40, boxes))
    torch.testing.assert_close(target["boxes"], torch.tensor(
        [[4 / 20, 5 / 20, 4 / 20, 6 / 20], [15 / 20, 4 / 20, 10 / 20, 4 / 20]]))
    assert target["labels"].tolist() == [0, 1]
    assert image.shape == (3, 64, 64)


def test_objects_below_a_pixel_are_left_out_before_and_after_resizing(monkeypatch: pytest.MonkeyPatch) -> None:
    only(monkeypatch)
    boxes = [[0, 0, 0.9, 10], [2, 2, 3, 4], [10, 10, 13, 90]]
    small = train_transform(32)(*sample(100, 100, boxes))[1]
    assert small["labels"].tolist() == []
    assert small["boxes"].shape == (0, 4)
    assert train_transform(64)(*sample(100, 100, boxes))[1]["labels"].tolist() == [2]
    assert train_transform(128)(*sample(100, 100, boxes))[1]["labels"].tolist() == [1, 2]
    assert eval_transform(32)(*sample(100, 100, boxes))[1]["labels"].tolist() == [0, 1, 2]


def test_boxes_of_the_whole_image_survive_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32 side * (size / side) is often more than size."""
    only(monkeypatch)
    over = 0
    for side in range(33, 400):
        boxes = [[0, 0, side, side]]
        over += v2.Resize((96, 96))(sample(side, side, boxes)[1]["boxes"]).max().item() > 96
        _, target = train_transform(96)(*sample(side, side, boxes))
        torch.testing.assert_close(target["boxes"], torch.tensor([[0.5, 0.5, 1, 1]]))
    assert over > 10


@pytest.mark.parametrize("boxes", [[], [[0, 0, 1, 1]]])
@pytest.mark.parametrize("size", [(1, 1), (3, 2), (2, 200), (33, 47)])
def test_tiny_images_and_images_without_objects(size: tuple[int, int], boxes: list[list[float]]) -> None:
    torch.manual_seed(0)
    for _ in range(20):
        image, target = train_transform(32)(*sample(*size, boxes))
        assert image.shape == (3, 32, 32)
        assert target["boxes"].shape == (len(target["labels"]), 4)
        assert len(target["boxes"]) <= len(boxes)


def test_whatever_happens_boxes_stay_on_their_rectangles() -> None:
    """Of many random augmentations of bright rectangles on black: inside a box it is bright, beside it black."""
    torch.manual_seed(0)
    transform, kept, changed = train_transform(160), Counter(), 0
    for _ in range(60):
        boxes = [[10, 10, 40, 30], [60, 20, 100, 60], [20, 60, 50, 95]]
        image, target = transform(*sample(120, 100, boxes))
        assert 0 <= image.min() <= image.max() <= 1
        kept[len(target["labels"])] += 1
        bright = image.amax(0) > 0.2
        covered = torch.zeros(160, 160, dtype=torch.bool)
        for cx, cy, w, h in target["boxes"].tolist():
            assert min(cx - w / 2, cy - h / 2) >= -1e-6
            assert max(cx + w / 2, cy + h / 2) <= 1 + 1e-6
            x0, x1, y0, y1 = (160 * v for v in (cx - w / 2, cx + w / 2, cy - h / 2, cy + h / 2))
            inner = bright[int(y0) + 4 : int(y1) - 3, int(x0) + 4 : int(x1) - 3]
            assert inner.all()
            covered[max(0, int(y0) - 3) : int(y1) + 4, max(0, int(x0) - 3) : int(x1) + 4] = True
        if len(target["labels"]) == 3:
            assert not bright[~covered].any()
        changed += not np.allclose(target["boxes"][:1], [[25 / 120, 0.2, 0.25, 0.2]], atol=1e-3)
    assert {1, 2, 3} <= set(kept)
    assert 30 < changed < 60


def test_probabilities(monkeypatch: pytest.MonkeyPatch) -> None:
    """How often each step is taken, in 400 augmentations: within four standard deviations."""
    taken = Counter()

    def counted(kind: type, method: str) -> None:
        inner = getattr(kind, method)

        def outer(self, *args):
            taken[kind.__name__] += 1
            return inner(self, *args)

        monkeypatch.setattr(kind, method, outer)

    counted(v2.RandomZoomOut, "make_params")
    counted(transforms._IoUCrop, "make_params")
    counted(v2.RandomPhotometricDistort, "make_params")
    torch.manual_seed(0)
    transform = train_transform(32)
    flip = next(step for step in transform.transforms if isinstance(step, v2.RandomHorizontalFlip))
    distort = next(step for step in transform.transforms if isinstance(step, v2.RandomPhotometricDistort))
    assert flip.p == distort.p == 0.5
    for _ in range(400):
        transform(*sample(16, 16, [[2, 2, 14, 14]]))
    assert abs(taken["RandomZoomOut"] - 200) < 40
    assert abs(taken["_IoUCrop"] - 320) < 32
    assert taken["RandomPhotometricDistort"] == 400


def test_order_of_the_steps() -> None:
    names = [type(step).__name__ for step in train_transform().transforms]
    assert names == ["RandomPhotometricDistort", "RandomZoomOut", "RandomApply", "SanitizeBoundingBoxes",
                     "RandomHorizontalFlip", "Resize", "ToImage", "ToDtype", "ClampBoundingBoxes",
                     "SanitizeBoundingBoxes", "function"]
    assert pickle.loads(pickle.dumps(train_transform())).transforms[-1] is transforms._as_net_input


# ---------------------------------------------------------------------------------------------------------- seeding


def digest(batches: list[Any]) -> list[list[float]]:
    return [[*images.double().mean((1, 2, 3)).tolist(), *torch.cat([t["boxes"] for t in targets]).flatten().tolist()]
            for images, targets in batches]


@pytest.mark.parametrize("workers", [0, 2])
def test_augmentation_follows_from_the_seeds(tmp_path: Path, workers: int) -> None:
    """As `adn.train` seeds them: the global generator, from which that of the workers follows."""
    described = {"categories": [{"id": 1, "name": "a"}], "images": [], "annotations": []}
    for i in range(6):
        sample(40 + i, 30, [[4, 4, 20, 20]])[0].save(tmp_path / f"{i}.png")
        described["images"].append({"id": i, "file_name": f"{i}.png", "width": 40 + i, "height": 30})
        described["annotations"].append({"image_id": i, "category_id": 1, "bbox": [4, 4, 16, 16]})
    (tmp_path / "a.json").write_text(json.dumps(described))
    data = CocoImages(tmp_path, tmp_path / "a.json", train_transform(32))

    def epoch(seed: int) -> list[list[float]]:
        torch.manual_seed(seed)
        loader = DataLoader(data, 3, num_workers=workers, collate_fn=collate,
                            generator=torch.Generator().manual_seed(seed))
        return digest(list(loader))

    first = epoch(1)
    torch.rand(7)
    np.random.default_rng().random()
    assert epoch(1) == first
    assert epoch(2) != first


# ------------------------------------------------------------------------------------------------------ multi-scale


def test_multi_scale_sizes() -> None:
    assert multi_scale_sizes() == [480, 512, 544, 576, 608, 640, 640, 640, 672, 704, 736, 768, 800]
    assert multi_scale_sizes(256) == [192, 224, 256, 256, 256, 288, 320]
    assert multi_scale_sizes(96) == [96, 96, 96]
    for base in (0, -32, 100, 639):
        with pytest.raises(ValueError, match="must be multiples of 32, such as"):
            multi_scale_sizes(base)


def test_sizes_are_drawn_evenly_and_follow_from_the_generator() -> None:
    sizes, generator = multi_scale_sizes(256), torch.Generator().manual_seed(0)
    drawn = [draw_size(sizes, generator) for _ in range(1400)]
    counts = Counter(drawn)
    assert set(counts) == set(sizes)
    assert abs(counts[256] - 600) < 80
    assert all(abs(counts[size] - 200) < 60 for size in set(sizes) - {256})
    again = torch.Generator().manual_seed(0)
    assert [draw_size(sizes, again) for _ in range(20)] == drawn[:20]
    torch.manual_seed(3)
    first = [draw_size(sizes) for _ in range(20)]
    torch.manual_seed(3)
    assert [draw_size(sizes) for _ in range(20)] == first != drawn[:20]


@pytest.mark.parametrize("size", [64, 96, 160])
def test_rescale(size: int) -> None:
    images = torch.rand(2, 3, 96, 96)
    scaled = rescale(images, size)
    assert scaled.shape == (2, 3, size, size)
    nearest = (torch.arange(size) * 96 // size).tolist()
    assert torch.equal(scaled, images[:, :, nearest][:, :, :, nearest])
    assert torch.equal(scaled, F.interpolate(images, (size, size)))
    assert rescale(torch.rand(1, 3, 64, 96), 64).shape == (1, 3, 64, 64)
