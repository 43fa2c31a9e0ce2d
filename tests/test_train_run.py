"""`train` and `adn train`: from folders of images to files on the disk."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

from adn.cli import main
from adn.core.state import state_of
from adn.models.registry import create_model
from adn.train import RECIPES, Config, recipe, train
from adn.train.interrupts import ignore_interrupts
from adn.train.recipes import DetectionRecipe, Recipe
from adn.weights.checkpoint import load, read_metadata, save

KWARGS = {"channels": [8, 8, 16, 16], "zero_init_last": False}
SMALL = recipe("default", model="resnet18", model_kwargs=KWARGS, epochs=2, batch_size=8, train_size=16, lr=5e-3,
               warmup_epochs=0, label_smoothing=0.0, min_area=0.5, augment=None)
CLASSES = {"amber": (230, 150, 20), "blue": (20, 60, 220), "green": (30, 200, 60)}


def draw(folder: Path, colour: tuple[int, int, int], count: int, seed: int) -> None:
    folder.mkdir(parents=True)
    rng = random.Random(seed)
    for i in range(count):
        shade = tuple(max(0, min(255, c + rng.randint(-30, 30))) for c in colour)
        Image.new("RGB", (rng.randint(17, 30), rng.randint(17, 30)), shade).save(folder / f"{i}.png")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("images")
    for k, (name, colour) in enumerate(CLASSES.items()):
        draw(root / "train" / name, colour, 9, k)
        draw(root / "val" / name, colour, 4, 10 + k)
    return root


def config(images: Path, out: Path, recipe: Recipe = SMALL, **changes: object) -> Config:
    return Config(str(images), str(out), recipe, **({"workers": 0} | changes))


def last(out: Path) -> dict:
    return torch.load(out / "last.pt", weights_only=True)


def log(out: Path) -> list[dict[str, str]]:
    with (out / "log.csv").open() as file:
        return [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)]


def assert_same(a: dict, b: dict) -> None:
    assert all(torch.equal(value, b["net"][name]) for name, value in a["net"].items())
    for index, values in a["optimizer"]["state"].items():
        assert all(torch.equal(value, b["optimizer"]["state"][index][name]) for name, value in values.items())


def test_a_folder_of_images(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    result = train(config(images, tmp_path, SMALL.but(epochs=15)))
    assert result.history[-1]["val_top1_super"] >= 90
    assert result.history[-1]["val_top1_base"] >= 90
    net = load(tmp_path / "model.safetensors")
    assert state_of(net).class_names == list(CLASSES)
    assert read_metadata(tmp_path / "model.safetensors")["extra"]["data"]["size"] == 16
    said = capsys.readouterr().out
    assert "anydepth_resnet18" in said
    assert "27 images to train on, 12 to evaluate, 3 classes; crops of 16 and 16 pixels" in said
    assert Config.of_run(tmp_path) == config(images, tmp_path, SMALL.but(epochs=15))


def test_bit_exact_with_workers_and_every_augmentation(images: Path, tmp_path: Path) -> None:
    full = SMALL.but(schedule="constant", mixup=0.2, cutmix=1.0, erase=0.5, augment="rand", repeats=2, epochs=3,
                     label_smoothing=0.1)
    train(config(images, tmp_path / "whole", full, workers=2), progress=False)
    train(config(images, tmp_path / "parts", full.but(epochs=1), workers=2), progress=False)
    torch.rand(3)
    train(config(images, tmp_path / "parts", full, workers=2), resume=True, progress=False)
    assert_same(last(tmp_path / "whole"), last(tmp_path / "parts"))
    assert log(tmp_path / "whole") == log(tmp_path / "parts")
    train(config(images, tmp_path / "again", full.but(epochs=1, seed=1), workers=2), progress=False)
    assert log(tmp_path / "again")[0] != log(tmp_path / "whole")[0]


def test_unreadable_images_are_skipped_and_counted(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    root = tmp_path / "damaged"
    shutil.copytree(images, root)
    (root / "train" / "blue" / "text.png").write_text("no image")
    (root / "val" / "blue" / "0.png").write_bytes((root / "val" / "blue" / "0.png").read_bytes()[:30])
    train(config(root, tmp_path / "out", SMALL.but(epochs=1), workers=1))
    said = capsys.readouterr().out
    assert "skipped 2 unreadable images so far" in said
    assert log(tmp_path / "out")[0]["unreadable"] == "2"


def test_folders_that_will_not_do(images: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        train(config(tmp_path / "nowhere", tmp_path / "out"))
    with pytest.raises(ValueError, match="folders train and val"):
        train(config(images / "train", tmp_path / "out"))
    (tmp_path / "empty" / "train").mkdir(parents=True)
    with pytest.raises(ValueError, match="no images"):
        train(config(tmp_path / "empty", tmp_path / "out"))
    for split in ("train", "validation"):
        draw(tmp_path / "one" / split / "only", (1, 2, 3), 2, 0)
    with pytest.raises(ValueError, match="at least 2"):
        train(config(tmp_path / "one", tmp_path / "out"))
    draw(tmp_path / "one" / "train" / "other", (1, 2, 3), 2, 0)
    draw(tmp_path / "one" / "validation" / "third", (1, 2, 3), 2, 0)
    with pytest.raises(ValueError, match="classes of 'validation' that 'train' does not have: third"):
        train(config(tmp_path / "one", tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_class_without_validation_images_shifts_no_labels(images: Path, tmp_path: Path) -> None:
    root = tmp_path / "part"
    for name in CLASSES:
        (root / "train").mkdir(parents=True, exist_ok=True)
        (root / "train" / name).symlink_to(images / "train" / name)
    draw(root / "val" / "green", CLASSES["green"], 4, 1)
    result = train(config(root, tmp_path / "out", SMALL.but(epochs=15)), progress=False)
    assert result.history[-1]["val_top1_super"] == 100


@pytest.mark.parametrize(("changes", "said"), [
    ({"model": "vit_tiny_patch16_224", "train_size": 32}, "made for images of 224 x 224"),
    ({"model": "resnet1"}, "unknown model"),
    ({"features": ("layer9",)}, "no stage 'layer9'"),
])
def test_nets_that_will_not_do(images: Path, tmp_path: Path, changes: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        train(config(images, tmp_path / "out", SMALL.but(**changes)), progress=False)
    assert not (tmp_path / "out").exists()


def test_starting_from_a_checkpoint(images: Path, tmp_path: Path) -> None:
    for classes in (3, 5):
        save(create_model("anydepth_resnet18", num_classes=classes, **KWARGS), tmp_path / f"{classes}.safetensors")
    still = SMALL.but(epochs=1, lr=0.0, weight_decay=0.0)
    train(config(images, tmp_path / "a", still, checkpoint=str(tmp_path / "3.safetensors")), progress=False)
    before, after = load(tmp_path / "3.safetensors"), load(tmp_path / "a" / "model.safetensors")
    assert all(torch.equal(p, dict(after.named_parameters())[name]) for name, p in before.named_parameters())

    five = str(tmp_path / "5.safetensors")
    with pytest.raises(ValueError, match=r"has 5 classes, the data has 3; pass --new-head"):
        train(config(images, tmp_path / "b", still, checkpoint=five), progress=False)
    train(config(images, tmp_path / "b", still, checkpoint=five, new_head=True), progress=False)
    after = load(tmp_path / "b" / "model.safetensors")
    assert after.fc.weight.shape == (3, 16)
    assert torch.equal(after.conv1.weight, load(five).conv1.weight)
    with pytest.raises(ValueError, match="one of --checkpoint, --weights, --pretrained"):
        train(config(images, tmp_path / "c", still, checkpoint=five, pretrained=True), progress=False)


def test_starting_from_weights(images: Path, tmp_path: Path) -> None:
    source = create_model("anydepth_resnet18", num_classes=5, **KWARGS)
    torch.save(source.state_dict(), tmp_path / "5.pth")
    still = SMALL.but(epochs=1, lr=0.0, weight_decay=0.0)
    with pytest.raises(ValueError, match=r"other classes than the 3 of the data \(fc.*pass --new-head"):
        train(config(images, tmp_path / "a", still, weights=str(tmp_path / "5.pth")), progress=False)
    train(config(images, tmp_path / "a", still, weights=str(tmp_path / "5.pth"), new_head=True), progress=False)
    after = load(tmp_path / "a" / "model.safetensors")
    assert torch.equal(after.layer1[0].conv1.weight, source.layer1[0].conv1.weight)
    other = still.but(model_kwargs={"channels": [8, 8, 16, 32]})
    with pytest.raises(ValueError, match=r"does not fit resnet18 .*\n\d+ of other shape: layer4"):
        train(config(images, tmp_path / "b", other, weights=str(tmp_path / "5.pth"), new_head=True), progress=False)
    deeper = still.but(model="resnet34")
    with pytest.raises(ValueError, match=r"(?s)does not fit resnet34 .*\d+ missing: layer1\.1"):
        train(config(images, tmp_path / "b", deeper, weights=str(tmp_path / "5.pth"), new_head=True), progress=False)


@pytest.mark.parametrize("coco", [True, False])
def test_boxes_are_not_for_classifiers(tmp_path: Path, coco: bool) -> None:
    (tmp_path / "annotations").mkdir()
    file = tmp_path / "annotations" / "instances_train.json" if coco else tmp_path / "data.yaml"
    file.write_text("{}")
    with pytest.raises(ValueError, match="has images with boxes: pass --task detect"):
        train(config(tmp_path, tmp_path / "out", SMALL), progress=False)


def test_image_settings_of_the_model_itself(images: Path, tmp_path: Path) -> None:
    """The default recipe takes mean, deviation and proportion from the model, a published one has its own."""
    own = SMALL.but(model="vit_tiny_patch16_224", epochs=1, model_kwargs={
        "img_size": 16, "patch_size": 8, "depth": 3, "embed_dim": 12, "num_heads": 2})
    train(config(images, tmp_path / "own", own), progress=False)
    stored = read_metadata(tmp_path / "own" / "model.safetensors")["extra"]["data"]
    assert (stored["size"], stored["mean"], stored["interpolation"]) == (16, [0.5, 0.5, 0.5], "bicubic")
    published = RECIPES["resnet50-150"]
    train(config(images, tmp_path / "b", own.but(mean=published.mean, std=published.std, eval_resize=20,
                                                 interpolation="bilinear")), progress=False)
    stored = read_metadata(tmp_path / "b" / "model.safetensors")["extra"]["data"]
    assert (stored["resize"], stored["mean"], stored["interpolation"]) == (20, list(published.mean), "bilinear")


# ---------------------------------------------------------------------------------------------------------- the command


def arguments(images: Path, out: Path, *more: str) -> list[str]:
    return ["train", str(images), "--out", str(out), "--model", "resnet18", "--model-kwargs", json.dumps(KWARGS),
            "--train-size", "16", "--workers", "0", "--warmup-epochs", "0", "--batch-size", "8",
            "--augment", "none", *more]


def test_every_setting_is_an_option(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr("adn.train.train", lambda config, **how: seen.append((config, how)))
    assert main(["train", "data", "--out", "x"]) == 0
    assert seen.pop() == (Config("data", "x"), {"resume": False, "overwrite": False})
    assert main(["train", "data", "--out", "x", "--recipe", "swin-t-300", "--lr", "0.1", "--milestones", "3,7",
                 "--clip", "none", "--no-ema", "--features", "layer2,3", "--top-classes", "none", "--mean", "0,0.5,1",
                 "--amp", "none", "--model-kwargs", '{"a": 1}', "--overwrite", "--workers", "3", "--pretrained"]) == 0
    expected = RECIPES["swin-t-300"].but(lr=0.1, milestones=(3, 7), clip=None, ema=False, features=("layer2", "3"),
                                         top_classes=None, mean=(0.0, 0.5, 1.0), amp=None, model_kwargs={"a": 1})
    expected = Config("data", "x", expected, workers=3, pretrained=True)
    assert seen.pop() == (expected, {"resume": False, "overwrite": True})


@pytest.mark.parametrize(("given", "said"), [
    (["--epochs", "many"], "'many' cannot be read as int"), (["--clip", "x"], "'x' cannot be read as float"),
    (["--milestones", "1,b"], "cannot be read as"), (["--model-kwargs", "{"], "cannot be read as JSON"),
])
def test_options_that_cannot_be_read(given: list[str], said: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        main(["train", "data", "--out", "x", *given])
    assert said in capsys.readouterr().err


def test_help_names_every_setting_with_its_default(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    text = capsys.readouterr().out
    for field in (*dataclasses.fields(Recipe), *dataclasses.fields(DetectionRecipe)):
        assert f"--{field.name.replace('_', '-')}" in text
    assert "[0.0005, to detect 0.0001]" in " ".join(text.split())


def test_command_resume_and_extend(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "run"
    assert main(arguments(images, out, "--epochs", "1")) == 0
    assert main(arguments(images, out, "--epochs", "1")) == 2
    assert "holds a run already" in capsys.readouterr().err
    assert main(["train", "--out", str(out), "--resume", "--epochs", "2"]) == 0
    assert Config.of_run(out).recipe.epochs == 2
    assert len(log(out)) == 2
    assert main(["train", "--out", str(out), "--resume", "--pretrained"]) == 2
    assert "--pretrained is how a run begins" in capsys.readouterr().err
    assert main(["train", "--out", str(out), "--resume", "--optimizer", "momentum", "--epochs", "3"]) == 2
    assert "another optimizer" in capsys.readouterr().err
    assert main(["train", "--out", str(tmp_path / "none"), "--resume"]) == 2
    assert "nothing to resume" in capsys.readouterr().err
    assert main(["train", "--out", str(out)]) == 2
    assert "pass DATA" in capsys.readouterr().err
    (out / "config.json").write_text("{")
    assert main(["train", "--out", str(out), "--resume"]) == 2
    assert "is not what adn train wrote" in capsys.readouterr().err


def test_workers_leave_the_end_to_the_main_process(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
                                                   ) -> None:
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    before = signal.getsignal(signal.SIGINT)
    try:
        ignore_interrupts(0)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
    sys.excepthook(ConnectionResetError, ConnectionResetError("lost"), None)
    assert capsys.readouterr().err == ""
    sys.excepthook(KeyError, KeyError("shown"), None)
    assert "shown" in capsys.readouterr().err


def test_ctrl_c(images: Path, tmp_path: Path) -> None:
    """The real thing: a process with workers gets the signal, says how to go on, and going on changes nothing."""
    command = [sys.executable, "-m", "adn"]
    out = tmp_path / "run"
    given = arguments(images, out, "--epochs", "200", "--schedule", "constant", "--workers", "1")
    process = subprocess.Popen([*command, *given], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               env=os.environ | {"OMP_NUM_THREADS": "1"})
    deadline = time.monotonic() + 120
    while not (out / "log.csv").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert f"adn train --out {out} --resume" in errors
    # Python itself shows, and drops, an interrupt that comes while a worker is forked; the engine has noted it.
    shown = re.sub(r"Exception ignored in.*?\nKeyboardInterrupt: ?\n", "", errors, flags=re.DOTALL)
    assert "Traceback" not in shown, errors
    done = last(out)["epoch"]
    assert 1 <= done < 200
    assert main(["train", "--out", str(out), "--resume", "--epochs", str(done + 1), "--workers", "0"]) == 0
    whole = tmp_path / "whole"
    given = arguments(images, whole, "--epochs", str(done), "--schedule", "constant", "--workers", "1")
    # In a process of its own too: sums differ with the number of threads.
    subprocess.run([*command, *given], check=True, capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert log(out)[:done] == log(whole)
    assert len(log(out)) == done + 1


def test_torchrun(images: Path, tmp_path: Path) -> None:
    given = arguments(images, tmp_path / "run", "--epochs", "1", "--model-kwargs", json.dumps(KWARGS))
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", "-m", "adn", *given],
        capture_output=True, text=True, timeout=240, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("epoch 1/1") == 1
    (row,) = log(tmp_path / "run")
    assert row["steps"] == "2"  # 27 images, 14 for each process, batches of 8
    assert last(tmp_path / "run")["world"] == 2
    correct = float(row["val_top1_super"]) * 12 / 100
    assert correct == pytest.approx(round(correct), abs=1e-3)  # every image counted once


@pytest.mark.parametrize(("options", "message"), [
    (["--model-kwargs", '{"foo": 1}'], "--model-kwargs.*foo"),
    (["--model-kwargs", '{"num_classes": 5}'], "num_classes does not belong"),
    (["--augment", "rand", "--magnitude", "99"], "RandAugment knows 0 to 30"),
    (["--checkpoint", "net.safetensors", "--model", "resnet18"], "leave out --model"),
])
def test_options_that_cannot_be(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture, options: list[str],
                                message: str) -> None:
    assert main(["train", str(images), "--out", str(tmp_path / "run"), *options]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "run").exists()


def test_the_start_is_not_overwritten(images: Path, tmp_path: Path) -> None:
    train(config(images, tmp_path / "a", SMALL.but(epochs=1)))
    start = tmp_path / "a" / "model.safetensors"
    before = start.read_bytes()
    with pytest.raises(ValueError, match="lies in the folder that is to be overwritten"):
        train(config(images, tmp_path / "a", checkpoint=str(start)), overwrite=True)
    assert start.read_bytes() == before


def test_resuming_from_another_folder(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(images.parent)
    started = SMALL.but(epochs=1, model_kwargs={**KWARGS, "channels": (8, 8, 16, 16)})
    train(config(Path(images.name), tmp_path / "a", started))
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--out", "a", "--resume", "--epochs", "2"]) == 0
    assert last(tmp_path / "a")["epoch"] == 2


def test_eval_where_a_class_has_no_images(images: Path, tmp_path: Path) -> None:
    train(config(images, tmp_path / "a", SMALL.but(epochs=15)))
    shutil.copytree(images / "val", tmp_path / "val")
    shutil.rmtree(tmp_path / "val" / "blue")
    options = ["--workers", "0", "--csv", str(tmp_path / "t"), "--depth", "super"]
    net = str(tmp_path / "a" / "model.safetensors")
    assert main(["eval", str(tmp_path / "val"), "--checkpoint", net, *options]) == 0
    with (tmp_path / "t").open() as file:
        row, = csv.DictReader(file)
    assert row["images"] == "8"
    assert float(row["top1"]) > 60, "the labels of green were not shifted onto blue"
