"""The seam: what a net is for, and a detector with outputs, a loss and a stride of its own that nothing else knows."""

from __future__ import annotations

import csv
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.ops import batched_nms, box_convert

import adn
from adn.cli import main
from adn.detect.detector import Detector
from adn.distill import TwoPass
from adn.models.entry import Entry
from adn.models.registry import ENTRIES
from adn.settings import DetectorSettings, Settings, setting
from adn.tasks import CLASSIFY, DETECT, TASKS, is_detector, task_of
from adn.train import Config, DetectionConfig, train
from adn.train.recipes import DETECTION_RECIPES, RECIPES
from adn.weights.checkpoint import read_metadata

pytest.importorskip("pycocotools", reason='needs pycocotools: pip install "adn[detect]"')


class Grid(Detector):
    """A box and a class for each cell of the coarsest map: in training `maps` (B, 4 + C, h, w), in evaluation `decoded`
    (B, h w, 4 + C), xyxy in shares of the image and scores."""

    stride = 16
    class_heads = ("head",)

    def __init__(self, num_classes: int = 80, width: int = 8) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.body = timm.create_model("resnet18", features_only=True, out_indices=(3,),
                                      channels=(width, width, 2 * width, 2 * width))
        self.head = nn.Conv2d(2 * width, 4 + num_classes, 1)

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        maps = self.head(self.body(images)[-1])
        if self.training:
            return {"maps": maps}
        cells = maps.flatten(2).mT.sigmoid()
        return {"decoded": torch.cat((box_convert(cells[..., :4], "cxcywh", "xyxy"), cells[..., 4:]), -1)}

    def reset_classifier(self, num_classes: int) -> None:
        self.num_classes = num_classes
        self.head = nn.Conv2d(self.head.in_channels, 4 + num_classes, 1)

    def postprocess(self, outputs: dict[str, torch.Tensor], sizes: Sequence) -> list[dict[str, torch.Tensor]]:
        found = []
        for cells, size in zip(outputs["decoded"], sizes, strict=True):
            scores, labels = cells[:, 4:].max(1)
            boxes = cells[:, :4] * torch.as_tensor(size).to(cells).repeat(2)
            kept = batched_nms(boxes, scores, labels, 0.5)
            found.append({"scores": scores[kept], "labels": labels[kept], "boxes": boxes[kept]})
        return found

    def distillation(self, recipe: GridRecipe, sizes: Sequence[int]) -> nn.Module:
        return GridStep(self, recipe.box_gain, sizes)


class GridStep(TwoPass):
    def __init__(self, net: nn.Module, gain: float, sizes: Sequence[int]) -> None:
        super().__init__()
        self.net, self.gain, self.sizes = net, gain, tuple(sizes)

    def _run(self, x: torch.Tensor, _y: Any) -> torch.Tensor:
        return self.net(x)["maps"]

    def _super_terms(self, of_super: torch.Tensor, y: Any) -> dict[str, torch.Tensor]:
        means = of_super.mean((2, 3))
        boxes = torch.stack([target["boxes"].mean(0) if len(target["boxes"]) else means.new_full((4,), 0.5)
                             for target in y])
        terms = {"box": self.gain * F.mse_loss(means[:, :4].sigmoid(), boxes), "score": means[:, 4:].square().mean()}
        return {**terms, "super": sum(terms.values())}

    def _base_terms(self, of_base: torch.Tensor, _y: Any, of_super: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"base": F.mse_loss(of_base, of_super.detach())}

    def _teaching(self, of_super: torch.Tensor) -> torch.Tensor:
        return of_super.detach()


@dataclasses.dataclass(frozen=True)
class GridRecipe(DetectorSettings):
    model: str = "grid"
    epochs: int = 1
    batch_size: int = 3
    lr: float = 0.01
    size: int = 48
    multi_scale: bool = False
    box_gain: float = setting("loss", 2.0, "weight of boxes")


@pytest.fixture(autouse=True)
def grid(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a folder of `adn.models` would bring it."""
    monkeypatch.setitem(ENTRIES, "grid", Entry(Grid, {}, "detect", 16, GridRecipe))


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("sklearn", reason='needs scikit-learn: pip install "adn[demo]"')
    root = tmp_path_factory.mktemp("data") / "digits"
    assert main(["scenes", str(root), "--images", "6", "--val-images", "3", "--size", "64"]) == 0
    return root


def test_what_a_net_is_for() -> None:
    net = adn.create_model("anydepth_resnet18", num_classes=3)
    detector = adn.convert(adn.create_model("grid", num_classes=3))
    assert [task_of(each) for each in (net, detector, nn.Linear(2, 2))] == [CLASSIFY, DETECT, CLASSIFY]
    assert task_of(torch.compile(detector, backend="eager")) is DETECT
    assert task_of(adn.fuse(detector.eval())) is DETECT
    assert [is_detector(each) for each in (net, detector)] == [False, True]
    assert [CLASSIFY.metric.name, DETECT.metric.name] == ["top1", "ap"]
    assert {recipe.task for recipe in (*RECIPES.values(), *DETECTION_RECIPES.values())} == set(TASKS)


def test_another_detector_takes_the_same_way(scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Trained, resumed, evaluated, drawn and timed by the commands, which know nothing of its outputs."""
    run, net = tmp_path / "run", str(tmp_path / "run" / "model.safetensors")
    begin = ["train", str(scenes), "--task", "detect", "--model", "grid", "--model-kwargs", '{"width": 4}', "--out",
             str(run), "--workers", "0", "--device", "cpu"]
    assert main(begin) == 0, capsys.readouterr().err
    assert "grid, 0.0 M parameters, 8 depths, from scratch" in capsys.readouterr().out
    assert DetectionConfig.of_run(run).recipe == GridRecipe(model_kwargs={"width": 4})
    assert main(["train", "--out", str(run), "--resume", "--epochs", "2"]) == 0, capsys.readouterr().err
    with (run / "log.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["1", "2"]
    assert {"train_box", "train_super", "train_base", "val_AP_super", "val_AP50_base", "unreadable"} <= rows[0].keys()
    assert read_metadata(net)["extra"]["data"] == {"size": 48}

    capsys.readouterr()
    table = tmp_path / "ap.csv"
    common = ["--workers", "0", "--device", "cpu", "--csv", str(table)]
    assert main(["eval", str(scenes), "--checkpoint", net, *common]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[1:6]] == [
        "FFF", "TFF", "TTF", "TTT", "3"]
    assert main(["profile", "--checkpoint", net, "--rounds", "1", "--device", "cpu", "--accuracy", str(table), "--csv",
                 str(tmp_path / "p.csv")]) == 0
    assert (tmp_path / "p.csv").read_text().splitlines()[-5].endswith("p99_ms,ap")
    picture = next((scenes / "images" / "val").iterdir())
    assert main(["detect", str(picture), "--checkpoint", net, "--depth", "base", "--threshold", "0", "--device", "cpu",
                 "--json", str(tmp_path / "found.json"), "--out", str(tmp_path / "drawn")]) == 0
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["depth"] == "TTT"
    assert 1 <= len(found["images"][0]["objects"]) <= 9  # of 3 x 3 cells, what is not suppressed
    assert (tmp_path / "drawn" / f"{picture.stem}.jpg").exists()
    assert main(["detect", str(picture), "--checkpoint", net, "--size", "40"]) == 2
    assert "--size 40; grid takes multiples of 16" in capsys.readouterr().err
    assert main(["train", str(scenes), "--task", "detect", "--checkpoint", net, "--out", str(tmp_path / "more"),
                 "--workers", "0", "--device", "cpu"]) == 0, capsys.readouterr().err
    assert "48 pixels" in capsys.readouterr().out


def test_what_does_not_fit_the_model(scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    begin = ["train", str(scenes), "--task", "detect", "--out", str(tmp_path / "run"), "--workers", "0"]
    for given, message in (
            (["--model", "grid", "--class-kl", "softmax"], "--class-kl has no meaning"),
            (["--model", "grid", "--size", "40"], "multiples of 16"),
            (["--model", "grid", "--backbone", "net.pth"], "a Grid has no backbone to load"),
            (["--model", "grid", "--recipe", "digits", "--model-kwargs", "{}"], "not trained by a DetectionRecipe")):
        assert main([*begin, *given]) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "run").exists()


def test_a_net_for_something_else(scenes: Path, tmp_path: Path) -> None:
    adn.save(adn.create_model("anydepth_resnet18", num_classes=10), tmp_path / "c.safetensors")
    adn.save(adn.convert(adn.create_model("grid", num_classes=10)), tmp_path / "d.safetensors")
    for config, what in ((DetectionConfig(str(scenes), str(tmp_path / "run"), GridRecipe(), workers=0,
                                          checkpoint=str(tmp_path / "c.safetensors")), "ResNet, which is no detector"),
                         (Config(str(scenes / "images"), str(tmp_path / "run"), workers=0, num_classes=10,
                                 checkpoint=str(tmp_path / "d.safetensors")), "Grid, which is no classifier")):
        if config.task is CLASSIFY:
            for split in ("train", "val"):
                for image in (scenes / "images" / split).iterdir():
                    (tmp_path / "images" / split / image.stem[-1]).mkdir(parents=True, exist_ok=True)
                    (tmp_path / "images" / split / image.stem[-1] / image.name).symlink_to(image)
            config = dataclasses.replace(config, data=str(tmp_path / "images"), num_classes=None)
        with pytest.raises(ValueError, match=what):
            train(config, progress=False)
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", [
    Settings, DetectorSettings, *dict.fromkeys(map(type, DETECTION_RECIPES.values()))])
def test_ranges_of_settings(kind: type[Settings]) -> None:
    for values, message in (({"epochs": 0}, "epochs=0; pass 1 or more"), ({"momentum": 2}, "momentum=2; pass a number"),
                            ({"twins": "no"}, "twins='no'; pass one of"), ({"norm_decay": -1}, "pass 0 or more")):
        with pytest.raises(ValueError, match=message):
            kind(**values)
    assert kind(norm_decay=None).norm_decay is None
