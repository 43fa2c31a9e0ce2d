"""Training a YOLO: its recipes, and from images on the disk to files on the disk."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

import adn
from adn.cli import main
from adn.data.coco import collate, open_coco
from adn.data.scenes import write_scenes
from adn.data.transforms import eval_transform
from adn.detect.training import Supervised
from adn.measure.average_precision import evaluate_detector
from adn.models.registry import build_source
from adn.models.yolov12 import recipes
from adn.models.yolov12.criterion import DetectionLoss, DistillationLoss, Predictions, objects_of
from adn.tasks import DETECT
from adn.train import DetectionConfig, train
from adn.train.optim import parameter_groups
from adn.train.recipes import DETECTION_RECIPES, default_recipe

KWARGS = {"width": 0.25, "most": 256}
COCO_MINI = Path(os.environ.get("ADN_COCO_MINI", Path(__file__).parents[3] / "shared" / "data" / "coco_mini"))


def test_published_recipes() -> None:
    """Numbers of the committed scripts, for 4 processes."""
    coco, tuning = DETECTION_RECIPES["yolo-l-600"], DETECTION_RECIPES["yolo-finetune"]
    assert (coco.model, coco.epochs, 4 * coco.batch_size, coco.nominal_batch, coco.size) == (
        "anydepth_yolov12l", 600, 64, 256, 640)
    assert (coco.optimizer, coco.momentum, coco.weight_decay, coco.norm_decay, coco.bias_decay, coco.clip) == (
        "nesterov", 0.937, 5e-4, 0, 0, 10)
    assert (coco.lr, coco.lr_min, coco.schedule, coco.each_step) == (0.01, 1e-4, "linear", True)
    assert (coco.warmup_epochs, coco.warmup_factor, coco.warmup_momentum) == (3, 0, 0.8)
    assert (coco.ema_decay, coco.ema_ramp, coco.ema_every) == (0.9999, 2000, 1)
    assert (coco.mosaic, coco.plain_epochs, coco.scale, coco.blend, coco.copy_paste, coco.translate, coco.flip) == (
        1, 10, 0.9, 0.15, 0.5, 0.1, 0.5)
    assert (coco.hue, coco.saturation, coco.brightness) == (0.015, 0.7, 0.4)
    assert (coco.alpha, coco.kd_box, coco.kd_classes, coco.kd_distances, coco.kd_features) == (0.2, 1.2, 0.4, 0.8, 0.4)
    assert (coco.temperature, coco.distance_temperature) == (2, 1)
    assert (tuning.kd_box, tuning.kd_classes, tuning.kd_distances, tuning.kd_features) == (7.5, 0.5, 1.5, 0.1)
    assert (tuning.temperature, tuning.distance_temperature) == (2, 10)
    assert (tuning.lr, tuning.momentum, tuning.mosaic, tuning.blend, tuning.copy_paste) == (1e-3, 0.9, 0, 0, 0)
    for form in ("", "_orig"):
        assert default_recipe("detect", f"anydepth_yolov12s{form}") is DETECTION_RECIPES["yolo"]


@pytest.mark.parametrize(("name", "sizes"), [("anydepth_yolov12l", (341, 232, 347)),
                                             ("anydepth_yolov12s_orig", (302, 212, 308))])
def test_groups_of_the_optimizer(name: str, sizes: tuple[int, int, int]) -> None:
    """As many tensors as the logs of the authors have: weights of norms, decayed weights, biases; but for the frozen
    table of distances, which is among their second."""
    with torch.device("meta"):
        net = adn.create_model(name)
    groups = parameter_groups(net, recipes.YOLORecipe())
    found = sorted((group["weight_decay"], len(group["params"])) for group in groups)
    norms, weights, biases = sizes
    assert found == sorted([(0, norms), (0, biases), (5e-4, weights - 1)])


# ------------------------------------------------------------------------------------------------------- distillation


def predictions(seed: int) -> Predictions:
    generator = torch.Generator().manual_seed(seed)
    return Predictions.of([2 * torch.randn(2, 64 + 4, 64 // stride, 64 // stride, generator=generator,
                                           dtype=torch.float64) for stride in (8, 16, 32)])


def test_forms_of_distillation() -> None:
    teacher, student = predictions(0), predictions(1)
    targets = [{"labels": torch.tensor([1, 3]), "boxes": torch.tensor([[.3, .4, .3, .4], [.7, .6, .4, .5]])}] * 2
    maps = [torch.zeros(2, 68, 64 // stride, 64 // stride, dtype=torch.float64) for stride in (8, 16, 32)]
    objects = objects_of(maps, targets)
    of_super, of_base = teacher.assign(objects), student.assign(objects)

    def terms(**settings: object) -> dict[str, torch.Tensor]:
        loss = DistillationLoss(temperature=3.0, distance_temperature=2.0, **settings)
        return loss.of(student, of_base, teacher, of_super)

    usual, corrected = terms(), terms(form="sigmoid", scaled=True)
    assert corrected["kd_box"] == usual["kd_box"]
    assert corrected["kd_distance"].item() == pytest.approx(4 * usual["kd_distance"].item())
    conflict = of_super.positive & of_base.positive & (of_super.slot != of_base.slot)
    weight = torch.where(of_super.positive & ~conflict, of_super.weight, 0)
    p = (teacher.logits / 3).sigmoid()
    divergence = (F.binary_cross_entropy_with_logits(student.logits / 3, p, reduction="none")
                  - F.binary_cross_entropy_with_logits(teacher.logits / 3, p, reduction="none")).sum(-1)
    wanted = 9 * (divergence * weight).sum() / weight.sum().clamp(min=1) * 0.4 * 2
    assert weight.sum() > 0
    assert corrected["kd_class"].item() == pytest.approx(wanted.item(), rel=1e-9)
    assert abs(corrected["kd_class"] - usual["kd_class"]) > 1e-3
    with pytest.raises(ValueError, match="pass one of softmax, sigmoid"):
        DistillationLoss(form="tanh")
    with pytest.raises(ValueError, match="kd_form='kl'; pass one of softmax, sigmoid"):
        recipes.YOLORecipe(kd_form="kl")


def test_a_plain_one_learns_from_objects_alone() -> None:
    model = build_source("yolov12n", {"num_classes": 3} | KWARGS)
    step = DETECT.loss(model, DETECTION_RECIPES["yolo-digits"])
    assert isinstance(step, Supervised)
    assert step.summed
    targets = [{"labels": torch.tensor([1]), "boxes": torch.tensor([[.5, .5, .5, .5]])}, {
        "labels": torch.zeros(0, dtype=torch.int64), "boxes": torch.zeros(0, 4)}]
    x = torch.rand(2, 3, 64, 64)
    terms = step(x, targets)
    expected = DetectionLoss()(model(x), targets)
    assert terms["loss"].item() == pytest.approx(sum(expected.values()).item(), rel=1e-4)
    assert {*terms} == {*expected, "loss"}


# -------------------------------------------------------------------------------------------------------------- runs


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("scenes") / "digits"
    write_scenes(root, images=8, val_images=3, size=64, seed=0)
    return root


def last(out: Path) -> dict:
    return torch.load(out / "last.pt", weights_only=True)


def test_command_line(scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """The recipe for people's own images, interrupted between mosaics and plain images."""
    options = ["--task", "detect", "--model", "anydepth_yolov12n", "--model-kwargs", json.dumps(KWARGS), "--size", "64",
               "--batch-size", "2", "--nominal-batch", "4", "--workers", "0", "--device", "cpu", "--warmup-epochs", "1",
               "--plain-epochs", "1", "--lr", "0.002"]
    out = tmp_path / "run"
    assert main(["train", str(scenes), "--out", str(out), *options, "--epochs", "2"]) == 0
    assert main(["train", "--out", str(out), "--resume", "--epochs", "3"]) == 0
    printed = capsys.readouterr().out
    assert "going on with epoch 3" in printed
    with (out / "log.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["steps"]) for row in rows] == [4, 4, 4]
    for name in ("train_super.loss_box", "train_super.loss_distance", "train_base.loss_class", "train_base.kd_feature",
                 "val_AP_super", "val_AP50_base"):
        assert float(rows[-1][name]) >= 0, name
    net = adn.load(out / "model.safetensors").eval()
    with torch.inference_mode(), adn.at_depth(net, "TFTFFTFT"):
        assert net(torch.rand(1, 3, 64, 96))["decoded"].shape == (1, 14, 8 * 12 + 4 * 6 + 2 * 3)
    assert main(["eval", str(scenes), "--checkpoint", str(out / "model.safetensors"), "--depth", "chain",
                 "--workers", "0"]) == 0


def test_a_resumed_run_is_the_same_run(scenes: Path, tmp_path: Path) -> None:
    recipe = DETECTION_RECIPES["yolo"].but(
        model="yolov12n", model_kwargs=KWARGS, epochs=3, batch_size=2, nominal_batch=4, size=64, warmup_epochs=2,
        plain_epochs=1, schedule="constant", ema_ramp=3)

    def run(name: str, **changes: object) -> DetectionConfig:
        return DetectionConfig(str(scenes), str(tmp_path / name), recipe.but(**changes), workers=0)

    train(run("one"), progress=False)
    train(run("two", epochs=1, plain_epochs=0), progress=False)
    train(run("two"), resume=True, progress=False)
    one, two = last(tmp_path / "one"), last(tmp_path / "two")
    for part in ("net", "ema"):
        assert all(torch.equal(value, two[part][name]) for name, value in one[part].items()), part
    assert one["ema_updates"] == two["ema_updates"] == 6  # a step for two batches


def test_images_fitted_for_another_detector(scenes: Path) -> None:
    net = adn.create_model("anydepth_yolov12n", num_classes=10, **KWARGS)
    data = open_coco(scenes, "val", eval_transform(64))
    with pytest.raises(ValueError, match=r"prepare them by eval_transform\(size, letterbox=True\)"):
        evaluate_detector(net, DataLoader(data, 3, collate_fn=collate), ["base"])
    data.transform = eval_transform(64, letterbox=True)
    assert evaluate_detector(net, DataLoader(data, 3, collate_fn=collate), ["base"])[0].images == 3


@pytest.mark.skipif(not COCO_MINI.is_dir(), reason="no mini COCO; ADN_COCO_MINI says where")
def test_copies_of_photographed_objects(tmp_path: Path) -> None:
    """The published recipe's augmentation reads masks."""
    recipe = recipes.YOLORecipe(model="yolov12n", model_kwargs=KWARGS, epochs=12, size=64, batch_size=4)
    config = DetectionConfig(str(COCO_MINI), str(tmp_path), recipe)
    data = DETECT.open_training(config)
    assert data.training.masks
    assert not data.validation.masks
    net = DETECT.build(config, data.classes, True)
    DETECT.prepare(net, recipe, data)
    torch.manual_seed(0)
    image, target = data.training[0]
    assert image.shape == (3, 64, 64)
    assert "masks" not in target
    assert isinstance(net, nn.Module)
    assert len(open_coco(COCO_MINI, "train", masks=True)[0][1]["masks"])
