"""Reading images: sources, damaged files, batches, preparation."""

from __future__ import annotations

import tarfile
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from adn.data.images import ImageStream, collate, data_config, eval_transform, open_dataset


def write_images(folder: Path, classes: dict[str, int], size: tuple[int, int] = (30, 22)) -> Path:
    """Noise images, of a brightness by class."""
    rng = np.random.default_rng(0)
    for k, (name, count) in enumerate(classes.items()):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            pixels = rng.integers(0, 100, (*size[::-1], 3)) + 50 * k
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{i}.png")
    return folder


def damage(folder: Path) -> list[str]:
    """Four files that are called images: a text, a truncated one, one with a flipped bit, an empty one."""
    whole = (folder / "cat" / "0.png").read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 255
    damaged = {"cat/text.png": b"no image", "cat/truncated.png": whole[: len(whole) // 2],
               "dog/flipped.png": bytes(flipped), "dog/empty.png": b""}
    for name, content in damaged.items():
        (folder / name).write_bytes(content)
    return sorted(str(folder / name) for name in damaged)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return write_images(tmp_path / "photos", {"cat": 3, "dog": 4, "emu": 2})


def test_folder(photos: Path) -> None:
    data = open_dataset(photos, transform=eval_transform(16))
    assert data.class_names == ["cat", "dog", "emu"]
    assert len(data) == 9
    image, label = data[5]
    assert image.shape == (3, 16, 16)
    assert image.dtype == torch.float32
    assert type(label) is int
    assert [data[i][1] for i in range(9)] == [0] * 3 + [1] * 4 + [2] * 2


def test_without_a_transform_items_are_rgb_images(photos: Path) -> None:
    Image.new("LA", (5, 4)).save(photos / "cat" / "0.png")
    image, _ = open_dataset(photos)[0]
    assert image.mode == "RGB"
    assert image.size == (5, 4)


@pytest.mark.parametrize(("largest", "said"), [(4095, "multiply them by 16"), (65535, None)])
def test_few_bits_of_sixteen_are_noticed(tmp_path: Path, largest: int, said: str | None) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
        pixels = np.linspace(0, largest, 1200).astype(np.uint16).reshape(30, 40)
        Image.frombytes("I;16", (40, 30), pixels.tobytes()).save(tmp_path / name / "1.png")
    notes = open_dataset(tmp_path).notes
    assert len(notes) == (said is not None)
    assert said is None or said in notes[0]


def test_classes_in_natural_order_and_by_class_map(tmp_path: Path) -> None:
    photos = write_images(tmp_path / "n", {"10": 1, "9": 1, "2": 1})
    assert open_dataset(photos).class_names == ["2", "9", "10"]
    (tmp_path / "map.txt").write_text("10\n2\n")
    for class_map in (str(tmp_path / "map.txt"), {"10": 0, "2": 1}):
        data = open_dataset(photos, class_map=class_map)
        assert data.class_names == ["10", "2"]
        assert sorted(data[i][1] for i in range(len(data))) == [0, 1]
    assert open_dataset(photos, class_map={"10": 0, "2": 2}).class_names == ["10", "", "2"]


def test_splits(tmp_path: Path) -> None:
    write_images(tmp_path / "d" / "train", {"a": 2, "b": 2})
    write_images(tmp_path / "d" / "val", {"a": 1, "b": 1})
    assert len(open_dataset(tmp_path / "d", "train")) == 4
    assert len(open_dataset(tmp_path / "d", "val")) == len(open_dataset(tmp_path / "d", "validation")) == 2
    with pytest.raises(ValueError, match="no folder 'test'"):
        open_dataset(tmp_path / "d", "test")


def test_tar_and_torchvision_sources(photos: Path, tmp_path: Path) -> None:
    archive = tmp_path / "photos.tar"
    with tarfile.open(archive, "w") as tar:
        tar.add(photos, "photos")
    expected = [np.asarray(image).sum() for image, _ in map(open_dataset(photos).__getitem__, range(9))]
    for root in (str(archive), f"torch/image_folder:{photos}"):
        data = open_dataset(root)
        assert data.class_names == ["cat", "dog", "emu"]
        assert [np.asarray(data[i][0]).sum() for i in range(9)] == expected


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_unreadable_images_are_left_out_and_remembered(photos: Path, workers: int, batch_size: int) -> None:
    damaged = damage(photos)
    data = open_dataset(photos, transform=eval_transform(16))
    assert data.unreadable == []
    loader = DataLoader(data, batch_size, num_workers=workers, collate_fn=collate)
    batches = [*loader, *loader]
    assert (None in [batch if batch is None else 0 for batch in batches]) == (batch_size == 1)
    labels = torch.cat([batch[1] for batch in batches if batch is not None])
    assert labels.dtype == torch.int64
    assert labels.bincount().tolist() == [6, 8, 4]
    assert sorted(data.unreadable) == damaged  # once each, though read twice


def test_errors_of_the_transform_are_no_unreadable_images(photos: Path) -> None:
    def broken(image: Image.Image) -> None:
        raise ValueError("a mistake")

    data = open_dataset(photos, transform=broken)
    with pytest.raises(ValueError, match="a mistake"):
        data[0]
    assert data.unreadable == []


def test_collate() -> None:
    assert collate([None, None]) is None
    images, labels = collate([(torch.zeros(3, 2, 2), 4), None, (torch.ones(3, 2, 2), 1)])
    assert images.shape == (2, 3, 2, 2)
    assert labels.tolist() == [4, 1]


@pytest.mark.parametrize(("make", "message"), [
    (lambda p: p / "nowhere", "does not exist"),
    (lambda p: (p / "empty").mkdir() or p / "empty", "no images"),
    (lambda p: (p / "file.png").write_bytes(b"") or p / "file.png", "is a file"),
    (lambda p: (p / "x.tar").write_bytes(b"no archive") and p / "x.tar", "no images"),
    (lambda p: "torch/cifar10", "torch/cifar10:FOLDER"),
    (lambda p: f"torch/nosuchset:{p}", "nosuchset"),
    (lambda p: f"torch/cifar10:{p}", "not found"),
])
def test_nothing_to_open(tmp_path: Path, make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        open_dataset(make(tmp_path))


def test_an_empty_tar_is_an_error(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "e.tar", "w"):
        pass
    with pytest.raises(ValueError, match="no images"):
        open_dataset(tmp_path / "e.tar")


def test_one_class(tmp_path: Path) -> None:
    write_images(tmp_path / "one", {"cat": 2})
    assert open_dataset(tmp_path / "one").class_names == ["cat"]
    with pytest.raises(ValueError, match=r"1 class .*sub-folder"):
        open_dataset(tmp_path / "one", need_classes=2)


def test_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def create(*args: object, **kwargs: object) -> None:
        raise ModuleNotFoundError("No module named 'datasets'", name="datasets")

    monkeypatch.setattr(timm.data, "create_dataset", create)
    with pytest.raises(ImportError, match="pip install datasets"):
        open_dataset("hfds/some/set")


def test_streams() -> None:
    class Source(IterableDataset):
        def __iter__(self):
            yield from ((Image.new("RGB", (20, 20)), label) for label in (0, 2, 1))

        def __len__(self) -> int:
            return 3

    data = ImageStream(Source(), ["a", "b", "c"], eval_transform(8))
    images, labels = next(iter(DataLoader(data, 3, collate_fn=collate)))
    assert images.shape == (3, 3, 8, 8)
    assert labels.tolist() == [0, 2, 1]
    assert len(data.unreadable) == 0


def test_eval_transform_values() -> None:
    image = Image.new("RGB", (40, 20), (255, 0, 51))
    x = eval_transform(8, resize=10, mean=(0.5, 0.5, 0.2), std=(0.5, 0.25, 1.0))(image)
    assert x.shape == (3, 8, 8)
    torch.testing.assert_close(x.mean((1, 2)), torch.tensor([1.0, -2.0, 0.0]))
    # The centre of a picture whose left half is black and right half white is half and half.
    half = Image.new("RGB", (40, 20))
    half.paste((255, 255, 255), (20, 0, 40, 20))
    x = eval_transform(20, resize=20, mean=(0, 0, 0), std=(1, 1, 1))(half)
    assert x[:, :, :10].max() == 0
    assert x[:, :, 10:].min() == 1


@pytest.mark.parametrize(("size", "resize"), [(0, None), (32, 31)])
def test_eval_transform_refuses(size: int, resize: int | None) -> None:
    with pytest.raises(ValueError, match="crop of"):
        eval_transform(size, resize)


def test_data_config() -> None:
    plain = data_config(nn.Linear(1, 1))
    assert (plain["size"], plain["resize"], plain["interpolation"]) == (224, None, "bilinear")
    net = timm.create_model("vit_tiny_patch16_224")
    config = data_config(net)
    assert config["size"] == 224
    assert config["resize"] == int(224 / net.pretrained_cfg["crop_pct"])
    assert config["mean"] == net.pretrained_cfg["mean"]
    stored = {"size": 28, "resize": 32, "mean": [0.1, 0.2, 0.3], "unknown": 1}
    assert data_config(net, stored, size=None)["resize"] == 32
    assert data_config(net, stored)["mean"] == [0.1, 0.2, 0.3]
    assert "unknown" not in data_config(net, stored)
    # Another size does not go with the stored resize.
    assert data_config(net, stored, size=64) | {"mean": 0} == data_config(net, stored) | {
        "size": 64, "resize": None, "mean": 0}
    eval_transform(**config)


def test_both_parts_of_a_data_set_are_not_mixed(tmp_path: Path) -> None:
    for split in ("train", "val"):
        write_images(tmp_path / split, {"cat": 2, "dog": 2})
    with pytest.raises(ValueError, match=r"lies too deep.*--split train"):
        open_dataset(tmp_path)
    assert len(open_dataset(tmp_path, "val")) == 4


def test_folders_in_folders_are_no_classes(tmp_path: Path) -> None:
    for animal in ("cat", "dog"):
        write_images(tmp_path / animal, {"p1": 1, "p2": 1})
    with pytest.raises(ValueError, match=r"lies too deep: images lie directly in one sub-folder per class\.$"):
        open_dataset(tmp_path)


def test_an_image_beside_the_class_folders(photos: Path) -> None:
    Image.new("RGB", (4, 4)).save(photos / "thumb.png")
    with pytest.raises(ValueError, match=r"'thumb\.png' .* has no class"):
        open_dataset(photos)
