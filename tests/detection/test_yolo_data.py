"""Label files in YOLO's format: the same data as in COCO's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from adn.data.coco import CocoImages, open_coco

LABELS = {"train/a": "1 0.5 0.5 0.5 0.25\n\n0 0.125 0.25 0.25 0.5\n", "train/deep/b": "", "val/c": "2 0.5 0.5 1 1\n"}


def write(root: Path, labels: dict[str, str] | None = None, description: str | None = None) -> Path:
    for name, text in (LABELS if labels is None else labels).items():
        image, label = root / "images" / f"{name}.png", root / "labels" / f"{name}.txt"
        for path in (image, label):
            path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 30)).save(image)
        if text:
            label.write_text(text)
    (root / "data.yaml").write_text(description or "train: images/train\nval: images/val\nnames: [ant, bee, cat]\n")
    return root


def boxes_of(data: CocoImages) -> list[tuple[int, list[float]]]:
    return [(int(label), box.tolist()) for _, target in data
            for label, box in zip(target["labels"], target["boxes"], strict=True)]


@pytest.mark.parametrize("description", [
    None, "path: .\ntrain: [images/train]\nvalid: images/val\nnc: 3\nnames: {0: ant, 1: bee, 2: cat}\n",
    "train: ../images/train\nval: ../images/val\nnames: [ant, bee, cat]\n",
    "train: lists/train.txt\nval: images/val\nnames: [ant, bee, cat]\n",
], ids=["usual", "mapping", "from above", "list"])
def test_layouts(tmp_path: Path, description: str | None) -> None:
    root = write(tmp_path, description=description)
    (root / "lists").mkdir()
    (root / "lists" / "train.txt").write_text("../images/train/a.png\n../images/train/deep/b.png\n")
    for where in (root, root / "data.yaml"):
        data = open_coco(where, "train")
        assert data.class_names == ["ant", "bee", "cat"]
        assert len(data) == 2
        assert boxes_of(data) == [(1, [10, 11.25, 30, 18.75]), (0, [0, 0, 10, 15])]
        assert boxes_of(open_coco(where, "val")) == [(2, [0, 0, 40, 30])]


def test_what_training_gets_is_what_the_files_say(tmp_path: Path) -> None:
    data = open_coco(write(tmp_path), "train")
    truth = data.ground_truth()
    assert [row["category_id"] for row in truth["annotations"]] == [1, 0]
    assert data.trainable == 2
    assert data[0][1]["size"].tolist() == [40, 30]
    assert data[1][1]["boxes"].shape == (0, 4)
    assert data[1][1]["labels"].dtype == torch.int64


def test_outlines(tmp_path: Path) -> None:
    root = write(tmp_path, {"train/a": "1 0.25 0.2 0.75 0.2 0.25 0.6\n0 0.5 0.5 0.5 0.4\n"})
    data = open_coco(root, "train", masks=True)
    target = data[0][1]
    assert target["boxes"].tolist() == [[10, 6, 30, 18], [10, 9, 30, 21]]
    triangle, none = target["masks"]
    assert triangle[8, 12]
    assert triangle[16, 11]
    assert not triangle[16, 28]
    assert not triangle[4, 15]
    assert not none.any()
    assert "masks" not in open_coco(root, "train")[0][1]


@pytest.mark.parametrize(("labels", "message"), [
    ("0 0.5 0.5 0.5\n", r"a\.txt, line 1: .*a line is a class, then centre x"),
    ("0 0.5 0.5 0.5 0.5\n1 0.1 0.1 0.2 0.2 0.3\n", r"line 2: .*or x and y of the points of an outline"),
    ("0 0.1 0.1 0.2 0.2 0.3 1.3\n", "places are in parts of the image"),
    ("0 0.5 0.5 0.5 1.5\n", "in parts of the image, from 0 to 1"),
    ("0 20 15 10 10\n", "in parts of the image, from 0 to 1"),
    ("3 0.5 0.5 0.5 0.5\n", "class 3 of 3, which are 0 to 2"),
    ("0.5 0.5 0.5 0.5 0.5\n", "a line is a class"),
    ("ant 0.5 0.5 0.5 0.5\n", "a line is a class"),
    ("0 nan 0.5 0.5 0.5\n", "in parts of the image"),
])
def test_lines_that_are_no_labels(tmp_path: Path, labels: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        open_coco(write(tmp_path, {"train/a": labels}), "train")


@pytest.mark.parametrize(("description", "message"), [
    ("- a\n", "describes no data set"), ("train: images/train\n", "names no classes"),
    ("train: images/train\nnames: [a]\nnc: 2\n", "nc is 2, but there are 1 names"),
    ("val: images/val\nnames: [a, b, c]\n", "no split 'train'; it has val"),
    ("train: elsewhere\nnames: [a, b, c]\n", "'elsewhere' is not there"), ("a: [\n", "cannot be read"),
    ("train: labels\nnames: [a, b, c]\n", "no image in 'labels'"),
])
def test_descriptions_that_will_not_do(tmp_path: Path, description: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        open_coco(write(tmp_path, description=description), "train")
