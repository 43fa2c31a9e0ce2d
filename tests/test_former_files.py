"""Checkpoints and run folders that adn 0.1.0 wrote (commit 1dfa961, `data/former`) go on loading and resuming."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from former_nets import small_net
from PIL import Image

import adn
from adn.cli import main

FORMER = Path(__file__).parent / "data" / "former"
OUTPUTS = json.loads((FORMER / "outputs.json").read_text())


def noise(*shape: int, uniform: bool = False) -> torch.Tensor:
    return (torch.rand if uniform else torch.randn)(shape, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_classifier() -> None:
    net = adn.load(FORMER / "classify" / "model.safetensors").eval()
    assert len(OUTPUTS["classify"]) == 16
    for depth, expected in OUTPUTS["classify"].items():
        with adn.at_depth(net, depth):
            torch.testing.assert_close(net(noise(1, 3, 32, 32))[0], torch.tensor(expected), rtol=1e-4, atol=2e-6)


@torch.no_grad()
def test_detector() -> None:
    net = adn.load(FORMER / "detect" / "model.safetensors").eval()
    for depth, expected in OUTPUTS["detect"].items():
        with adn.at_depth(net, depth):
            found = net(noise(1, 3, 64, 64, uniform=True))
        for name in ("logits", "boxes"):
            # Sums over the queries, whose order is that of nearly equal scores.
            torch.testing.assert_close(found[f"pred_{name}"][0].sum(0), torch.tensor(expected[name]), rtol=1e-4,
                                       atol=1e-4)


@torch.no_grad()
def test_plan_by_hand() -> None:
    net = adn.load(FORMER / "by_hand.safetensors", model=small_net()).eval()
    assert str(adn.get_depth(net)) == "TF"
    for depth, expected in OUTPUTS["by_hand"].items():
        with adn.at_depth(net, depth):
            torch.testing.assert_close(net(noise(1, 3, 8, 8))[0], torch.tensor(expected), rtol=1e-4, atol=2e-6)


def write_images(folder: Path) -> None:
    rng = np.random.default_rng(0)
    for split, images in (("train", 4), ("val", 2)):
        for name in ("cat", "dog"):
            (folder / split / name).mkdir(parents=True)
            for i in range(images):
                Image.fromarray(rng.integers(0, 255, (40, 40, 3), np.uint8)).save(folder / split / name / f"{i}.png")


@pytest.mark.parametrize("task", ["classify", "detect"])
def test_run_resumes(task: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    images, run = tmp_path / "images", tmp_path / "run"
    if task == "detect":
        assert main(["scenes", str(images), "--images", "6", "--val-images", "3", "--size", "64"]) == 0
    else:
        write_images(images)
    shutil.copytree(FORMER / task, run)
    first = (run / "log.csv").read_text().splitlines()
    assert main(["train", str(images), "--out", str(run), "--resume", "--epochs", "2"]) == 0, capsys.readouterr().err
    log = (run / "log.csv").read_text().splitlines()
    assert len(log) == 3
    assert log[1] == first[1]
    net = adn.load(run / "model.safetensors")
    before = adn.load(FORMER / task / "model.safetensors").state_dict()
    assert any(not torch.equal(value, before[name]) for name, value in net.state_dict().items())
