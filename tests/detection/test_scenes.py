"""Scenes of digits: what is written is what is seen, follows from the seed, and appears whole or not at all."""

from __future__ import annotations

import hashlib
import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("sklearn", reason='needs scikit-learn: pip install "adn[demo]"')

from adn.cli import main
from adn.data import scenes
from adn.data.coco import open_coco
from adn.data.scenes import load_digits, make_scene, write_scenes
from adn.demo.digits import Digits


def digest(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(folder.rglob("*")) if path.is_file()}


def a_scene(index: int, size: int = 128) -> scenes.Scene:
    glyphs, digits, _ = load_digits()
    return make_scene(np.random.default_rng([7, index]), glyphs, digits, size)


def test_digits_are_split_for_good() -> None:
    glyphs, digits, held_out = load_digits()
    assert glyphs.shape == (1797, 8, 8)
    assert (glyphs.min(), glyphs.max()) == (0, 255)
    assert held_out.sum() == 360
    assert np.bincount(digits[held_out]).min() > 25
    assert np.bincount(digits[held_out]).tolist() == Digits.load().held_out_y.bincount().tolist()
    assert hashlib.sha256(np.packbits(held_out).tobytes()).hexdigest()[:8] == "8a3f1682"


@pytest.mark.parametrize("size", [64, 128, 200])
def test_boxes_are_tight_round_what_is_visible(size: int) -> None:
    seen = 0
    for index in range(15):
        scene = a_scene(index, size)
        assert scene.image.size == (size, size)
        assert set(np.unique(scene.owner)) - {-1} == set(range(len(scene.labels)))
        for k, (x, y, w, h) in enumerate(scene.boxes):
            mask = scene.owner == k
            assert mask.sum() == mask[y : y + h, x : x + w].sum() > 0
            assert all(edge.any() for edge in (mask[y], mask[y + h - 1], mask[:, x], mask[:, x + w - 1]))
            seen += 1
    assert seen > 15


def test_digits_stand_out_from_what_surrounds_them() -> None:
    """Of most digits the brightness differs, all over, from that of the pixels around their box."""
    differences = []
    for index in range(20):
        scene = a_scene(index, 160)
        grey = np.asarray(scene.image.convert("L"), dtype=float)
        for k, (x, y, w, h) in enumerate(scene.boxes):
            around = np.s_[max(0, y - 2) : y + h + 2, max(0, x - 2) : x + w + 2]
            ground = grey[around][scene.owner[around] == -1]
            differences.append(abs(np.median(grey[scene.owner == k]) - np.median(ground)))
    assert len(differences) > 60
    assert np.mean(np.array(differences) > 35) > 0.9


def test_at_most_a_quarter_of_a_digit_is_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the masks with which the digits were painted."""
    painted, placed = [], []
    enlarge, contrasting = scenes._enlarge, scenes._contrasting

    def paint(*args):
        ink = enlarge(*args)
        painted.append(int((ink >= 0.5).sum()))
        return ink

    def place(*args):  # called once a digit has found its place
        placed.append(painted[-1])
        return contrasting(*args)

    monkeypatch.setattr(scenes, "_enlarge", paint)
    monkeypatch.setattr(scenes, "_contrasting", place)
    visible = []
    for index in range(40):
        scene = a_scene(index, 96)
        visible += [int((scene.owner == k).sum()) for k in range(len(scene.labels))]
    shares = np.array(visible) / placed
    assert 0.75 <= shares.min() < 0.8
    assert 0.1 < (shares < 1).mean() < 0.7


def test_variety() -> None:
    counts, sides = [], []
    for index in range(60):
        scene = a_scene(index, 256)
        counts.append(len(scene.labels))
        sides += [max(w, h) for _, _, w, h in scene.boxes]
    assert min(counts) == 0
    assert max(counts) >= 11
    assert min(sides) < 16
    assert max(sides) > 90


def test_the_same_seed_gives_the_same_files_and_more_images_change_none(tmp_path: Path) -> None:
    first = write_scenes(tmp_path / "a", 6, 2, size=64, seed=3, progress=False)
    assert digest(write_scenes(tmp_path / "b", 6, 2, size=64, seed=3, progress=False)) == digest(first)
    more = digest(write_scenes(tmp_path / "c", 9, 3, size=64, seed=3, progress=False))
    pictures = {name: value for name, value in digest(first).items() if name.endswith(".jpg")}
    assert len(pictures) == 8
    assert pictures.items() <= more.items()
    other = digest(write_scenes(tmp_path / "d", 6, 2, size=64, seed=4, progress=False))
    assert not set(other.values()) & set(digest(first).values())
    assert len(set(more.values())) == len(more)


def test_what_is_written_is_what_was_made(tmp_path: Path) -> None:
    out = write_scenes(tmp_path / "scenes", 8, size=96, seed=1, progress=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["scenes"]
    glyphs, digits, held_out = load_digits()
    for number, (split, count) in enumerate((("train", 8), ("val", 1))):
        data = open_coco(out, split)
        assert len(data) == count
        assert data.notes == []
        assert [tuple(c) for c in data.categories] == [(i + 1, str(i)) for i in range(10)]
        truth = {image["id"]: [] for image in data.ground_truth()["images"]}
        for annotation in data.ground_truth()["annotations"]:
            x, y, w, h = annotation["bbox"]
            assert annotation["area"] == w * h > 0
            assert annotation["iscrowd"] == 0
            truth[annotation["image_id"]].append((annotation["category_id"] - 1, (x, y, w, h)))
        chosen = held_out == bool(number)
        for index, (image, _) in enumerate(data, 1):
            scene = make_scene(np.random.default_rng([1, number, index]), glyphs[chosen], digits[chosen], 96)
            assert truth[index] == list(zip(scene.labels, scene.boxes, strict=True))
            coded = io.BytesIO()
            scene.image.save(coded, "JPEG", quality=92)
            assert image.tobytes() == Image.open(coded).tobytes()


def test_no_digit_of_training_scenes_is_in_a_validation_scene(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    used: dict[int, set[bytes]] = {}
    inner = scenes.make_scene

    def remember(rng, glyphs, digits, size):
        used.setdefault(len(glyphs), set()).update(glyph.tobytes() for glyph in glyphs)
        return inner(rng, glyphs, digits, size)

    monkeypatch.setattr(scenes, "make_scene", remember)
    write_scenes(tmp_path / "a", 2, 2, size=64, progress=False)
    assert sorted(used) == [360, 1437]
    assert not used[360] & used[1437]


def test_a_folder_that_is_there(tmp_path: Path) -> None:
    out = write_scenes(tmp_path / "a", 2, 1, size=64, progress=False)
    (out / "images" / "train" / "000001.jpg").write_bytes(b"mine")
    assert write_scenes(out, 2, 1, size=64, progress=False) == out
    assert (out / "images" / "train" / "000001.jpg").read_bytes() == b"mine"
    before = digest(out)
    for settings in ({"images": 3}, {"val_images": 2}, {"size": 65}, {"seed": 1}):
        with pytest.raises(ValueError, match="holds something else"):
            write_scenes(out, **{"images": 2, "val_images": 1, "size": 64, "progress": False} | settings)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="holds something else"):
        write_scenes(tmp_path / "file", 1, 1, size=64)
    assert digest(out) == before
    (tmp_path / "empty").mkdir()
    assert write_scenes(tmp_path / "empty", 1, 1, size=64, progress=False).is_dir()


def test_an_interrupted_run_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    inner = scenes.make_scene

    def interrupted(*args):
        made.append(1)
        if len(made) == 3:
            raise KeyboardInterrupt
        return inner(*args)

    monkeypatch.setattr(scenes, "make_scene", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_scenes(tmp_path / "sub" / "a", 4, 1, size=64, progress=False)
    assert len(made) == 3
    assert list((tmp_path / "sub").iterdir()) == []


@pytest.mark.parametrize("settings", [{"images": 0}, {"val_images": 0}, {"size": 63}, {"seed": -1}])
def test_bad_settings(tmp_path: Path, settings: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="pass at least one image"):
        write_scenes(tmp_path / "a", **settings)
    assert not (tmp_path / "a").exists()


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)  # which may be loaded already
    with pytest.raises(ImportError, match=r'pip install "adn\[demo\]"'):
        write_scenes(tmp_path / "a", 1)
    assert list(tmp_path.iterdir()) == []


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["scenes", str(tmp_path / "a"), "--images", "5", "--size", "64", "--seed", "2"]) == 0
    counts = [len(json.loads((tmp_path / "a" / f"instances_{split}.json").read_text())["annotations"])
              for split in ("train", "val")]
    assert capsys.readouterr().out.splitlines() == [
        f"train: 5 images, {counts[0]} digits", f"val: 1 images, {counts[1]} digits", f"written: {tmp_path / 'a'}"]
