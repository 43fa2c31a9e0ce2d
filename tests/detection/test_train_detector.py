"""Training a detector, from a COCO directory to files on the disk."""

from __future__ import annotations

import csv
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from test_coco import COCO_MINI
from test_rtdetr import TINY
from torch import nn
from torch.utils.data import DataLoader, Subset

import adn
from adn.cli import main
from adn.core import behaviours
from adn.core.state import state_of
from adn.data.coco import collate, open_coco
from adn.data.scenes import write_scenes
from adn.data.transforms import eval_transform
from adn.measure.average_precision import evaluate_detector
from adn.models.rtdetr.distill import DetectionDistillation
from adn.train import DetectionConfig, Diverged, fit, train
from adn.train.optim import WeightAverage, parameter_groups
from adn.train.recipes import DETECTION_RECIPES, DetectionRecipe
from adn.weights.checkpoint import read_metadata

KWARGS = {key: value for key, value in TINY.items() if key != "num_classes"} | {
    "backbone_args": {"width": 8}, "decoder_layers": 2, "queries": 10}
SMALL = DETECTION_RECIPES["digits"].but(
    model_kwargs=KWARGS, epochs=2, batch_size=3, size=64, ema_every=1, ema_ramp=2, lr=1e-3)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("scenes") / "digits"
    write_scenes(root, images=7, val_images=3, size=64, seed=0)
    return root


def config(scenes: Path, out: Path, recipe: DetectionRecipe = SMALL, **changes: object) -> DetectionConfig:
    return DetectionConfig(str(scenes), str(out), recipe, **({"workers": 0} | changes))


def last(out: Path) -> dict:
    return torch.load(out / "last.pt", weights_only=True)


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def trained(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "run"
    train(config(scenes, out), progress=False)
    return out


def test_what_is_on_the_disk(trained: Path) -> None:
    with (trained / "log.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["1", "2"]
    for name in ("train_super.loss_vfl", "train_base.loss_vfl_kd", "train_base.loss_features_encoder_kd",
                 "train_super.loss_giou_dn_1", "val_AP_super", "val_AP50_base"):
        assert float(rows[-1][name]) >= 0, name
    assert float(rows[1]["train_loss"]) < float(rows[0]["train_loss"])
    net = adn.load(trained / "model.safetensors").eval()
    assert state_of(net).class_names == [str(digit) for digit in range(10)]
    extra = read_metadata(trained / "model.safetensors")["extra"]
    assert (extra["task"], extra["data"]) == ("detect", {"size": 64})
    with torch.inference_mode():
        outputs = net(torch.rand(1, 3, 64, 64))
    assert outputs["pred_logits"].shape == (1, 10, 10)
    assert same(net.state_dict(), last(trained)["ema"])  # the average is what is saved


def test_a_resumed_run_is_the_same_run(scenes: Path, trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    train(config(scenes, out, SMALL.but(epochs=1, schedule="cosine")), progress=False)
    train(config(scenes, out, SMALL.but(epochs=2)), resume=True, progress=False)
    for part in ("net", "ema"):
        a, b = last(out)[part], last(trained)[part]
        assert a.keys() == b.keys()
        assert all(torch.allclose(a[name].float(), b[name].float(), atol=1e-6) for name in a), part
    assert last(out)["ema_updates"] == last(trained)["ema_updates"] == 6


def test_command_line(scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "run"
    options = ["--model-kwargs", json.dumps(KWARGS), "--size", "64", "--batch-size", "4", "--workers", "0", "--device",
               "cpu"]
    assert main(["train", str(scenes), "--out", str(out), "--recipe", "digits", "--epochs", "1", *options]) == 0
    assert "super 0.00 %" in capsys.readouterr().out
    assert json.loads((out / "config.json").read_text())["task"] == "detect"
    assert main(["train", "--out", str(out), "--resume", "--epochs", "2", "--lr", "1e-4"]) == 0
    assert "going on with epoch 2" in capsys.readouterr().out
    assert last(out)["recipe"]["lr"] == 1e-4
    for extra, message in (
            (["--mixup", "1"], "--mixup has no meaning when training to detect"), (["--size", "60"], "multiples of 32"),
            (["--pretrained"], "--pretrained has no meaning"), (["--recipe", "resnet50-150"], "not one to detect"),
            (["--model", "resnet50"], "no detector")):
        assert main(["train", str(scenes), "--task", "detect", "--out", str(tmp_path / "no"), *extra]) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "no").exists()
    assert main(["train", str(scenes), "--out", str(tmp_path / "no"), "--class-kl", "softmax"]) == 2
    assert "no meaning when training to classify" in capsys.readouterr().err


def test_other_classes(scenes: Path, trained: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(scenes, data)
    for file in (path for path in data.rglob("*.json") if "images" in json.loads(path.read_text())):
        content = json.loads(file.read_text())
        content["categories"] = content["categories"][:4]
        known = {category["id"] for category in content["categories"]}
        content["annotations"] = [a for a in content["annotations"] if a["category_id"] in known]
        file.write_text(json.dumps(content))
    start = {"checkpoint": str(trained / "model.safetensors")}
    with pytest.raises(ValueError, match="has 10 classes, the data has 4; pass --new-head"):
        train(config(data, tmp_path / "a", **start), progress=False)
    result = train(config(data, tmp_path / "a", SMALL.but(epochs=1), new_head=True, **start), progress=False)
    assert result.net.num_classes == 4
    assert adn.load(tmp_path / "a" / "model.safetensors").decoder.dec_score_head[0].out_features == 4
    # Weights of a static model, without a description.
    static = adn.extract(adn.load(trained / "model.safetensors"), "super")
    torch.save({"model": static.state_dict()}, tmp_path / "w.pth")
    start = {"weights": str(tmp_path / "w.pth")}
    with pytest.raises(ValueError, match=r"for other classes than the 4 of the data .*pass --new-head"):
        train(config(data, tmp_path / "b", **start), progress=False)
    result = train(config(data, tmp_path / "b", SMALL.but(epochs=1), new_head=True, **start), progress=False)
    assert result.net.num_classes == 4


@pytest.mark.parametrize("any_depth", [False, True])
def test_backbone_of_a_classifier(any_depth: bool, scenes: Path, tmp_path: Path) -> None:
    """Its weights, and twins if it has some; those it lacks are copies."""
    channels = {"channels": [8, 8, 16, 16]}
    torch.manual_seed(1)
    classifier = adn.create_model("anydepth_resnet18", num_classes=3, **channels)
    with torch.no_grad():
        for name, p in classifier.named_parameters():
            p.add_(0.1 if ".skip." in name else 0.0)
    if any_depth:
        adn.save(classifier, file := tmp_path / "classifier.safetensors")
    else:
        torch.save(adn.extract(classifier, "super").state_dict(), file := tmp_path / "classifier.pth")
    kwargs = {**KWARGS, "backbone": "resnet18", "backbone_args": channels, "freeze_norm": True}
    recipe = SMALL.but(model_kwargs=kwargs, lr=0.0, epochs=1, ema=False, twins="frozen")
    net = train(config(scenes, tmp_path / "run", recipe, backbone=str(file)), progress=False).net
    ours, theirs = net.backbone.state_dict(), classifier.state_dict()
    for name, tensor in ours.items():
        source = name if any_depth else name.replace(".skip.", ".")
        assert torch.equal(tensor, theirs[source]), name
    torch.save({"conv1.weight": theirs["conv1.weight"]}, tmp_path / "part.pth")
    with pytest.raises(ValueError, match="does not fit the backbone"):
        train(config(scenes, tmp_path / "no", recipe, backbone=str(tmp_path / "part.pth")), progress=False)


def test_a_loss_that_is_not_finite_stops_the_run(scenes: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    with pytest.raises(Diverged, match=r"not finite.*last.pt holds the state before the first epoch"):
        train(config(scenes, out, SMALL.but(lr=1e30, clip=None)), progress=False)
    assert all(torch.isfinite(value).all() for value in last(out)["net"].values() if value.is_floating_point())


def test_data_that_does_not_fit(scenes: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no COCO split 'train'"):
        train(config(tmp_path, tmp_path / "run"), progress=False)
    data = tmp_path / "data"
    shutil.copytree(scenes, data)
    file = next(path for path in data.rglob("*val*.json"))
    content = json.loads(file.read_text())
    content["categories"][0]["name"] = "zero"
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="list different categories"):
        train(config(data, tmp_path / "run"), progress=False)
    assert not (tmp_path / "run").exists()


def changed(scenes: Path, data: Path, change: Callable[[dict], None], split: str = "*") -> Path:
    """A copy of the scenes with other annotations."""
    shutil.copytree(scenes, data)
    for file in data.glob(f"instances_{split}.json"):
        content = json.loads(file.read_text())
        change(content)
        file.write_text(json.dumps(content))
    return data


def test_nothing_to_learn_from(scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    def crowds(content: dict) -> None:
        for entry in content["annotations"]:
            entry["iscrowd"] = 1

    data = changed(scenes, tmp_path / "crowds", crowds)
    with pytest.raises(ValueError, match=r"instances_train.json has no object to learn from: 7 images"):
        train(config(data, tmp_path / "run"), progress=False)
    assert not (tmp_path / "run").exists()
    data = changed(scenes, tmp_path / "val", lambda content: content.update(annotations=[]), "val")
    train(config(data, tmp_path / "run", SMALL.but(epochs=1)))
    assert "instances_val.json has no object to find" in capsys.readouterr().out


def test_classes_of_other_names(scenes: Path, trained: Path, tmp_path: Path) -> None:
    def rename(content: dict) -> None:
        content["categories"][3]["name"] = "drei"

    data = changed(scenes, tmp_path / "data", rename)
    shutil.copytree(trained, tmp_path / "run")
    with pytest.raises(ValueError, match="was for other classes than those of the data now"):
        train(config(data, tmp_path / "run", SMALL.but(epochs=3)), resume=True, progress=False)
    start = {"checkpoint": str(trained / "model.safetensors")}
    with pytest.raises(ValueError, match="class 3 is '3' there, 'drei' in the data; pass --new-head"):
        train(config(data, tmp_path / "new", **start), progress=False)
    train(config(data, tmp_path / "new", SMALL.but(epochs=1), new_head=True, **start), progress=False)


def test_a_run_goes_on_without_the_file_it_began_with(scenes: Path, trained: Path, tmp_path: Path) -> None:
    shutil.copy(trained / "model.safetensors", tmp_path / "start.safetensors")
    run = config(scenes, tmp_path / "run", SMALL.but(epochs=1), checkpoint=str(tmp_path / "start.safetensors"))
    train(run, progress=False)
    (tmp_path / "start.safetensors").unlink()
    run = config(scenes, tmp_path / "run", SMALL.but(epochs=2), checkpoint=str(tmp_path / "start.safetensors"))
    assert len(train(run, resume=True, progress=False).history) == 2
    for name in ("best.safetensors", "model.safetensors"):
        (tmp_path / "run" / name).unlink(missing_ok=True)
    with pytest.raises(ValueError, match=r"start.safetensors, which is gone: put it back"):
        train(run, resume=True, progress=False)


def test_the_smallest_of_many_sizes_is_tried_first(scenes: Path, tmp_path: Path) -> None:
    recipe = SMALL.but(size=128, multi_scale=True, model_kwargs=KWARGS | {"queries": 300})
    with pytest.raises(ValueError, match=r"96 x 96 pixels have 189 places for 300 queries.*--no-multi-scale"):
        train(config(scenes, tmp_path / "run", recipe), progress=False)
    assert not (tmp_path / "run").exists()


def test_frozen_random_values_are_warned_of(scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    recipe = SMALL.but(epochs=1, model_kwargs=KWARGS | {"freeze_norm": True})
    train(config(scenes, tmp_path / "a", recipe))
    assert "warning: parts of the backbone are frozen at the random values" in capsys.readouterr().out
    train(config(scenes, tmp_path / "b", SMALL.but(epochs=1)))
    assert "warning" not in capsys.readouterr().out


def test_a_checkpoint_says_what_it_is(scenes: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture
                                      ) -> None:
    """Its name, and at which size it was trained."""
    assert main(["train", str(scenes), "--task", "detect", "--out", str(tmp_path / "run"), "--checkpoint",
                 str(trained / "model.safetensors"), "--epochs", "1", "--device", "cpu", "--workers", "0",
                 "--no-multi-scale"]) == 0
    out = capsys.readouterr().out
    assert "rtdetr_r18vd, 0." in out
    assert "10 classes; 64 pixels" in out


@pytest.mark.parametrize("package", ["pycocotools", "scipy.optimize"])
def test_a_missing_package_is_named_before_anything_is_done(
        package: str, scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=r"adn\[detect\]"):
        train(config(scenes, tmp_path / "run"), progress=False)
    assert not (tmp_path / "run").exists()


def test_parameters_have_rates_and_decays_of_their_own() -> None:
    net = adn.create_model("anydepth_rtdetr_r50vd", backbone="resnet18", **KWARGS | {"backbone_args": {}})
    recipe = DetectionRecipe(lr=1e-3, backbone_lr=1e-5, weight_decay=0.1)
    names = {id(p): name for name, p in net.named_parameters()}
    seen = set()
    for group in parameter_groups(net, recipe):
        for p in group["params"]:
            name = names[id(p)]
            seen.add(name)
            assert group["lr"] == (1e-5 if name.startswith("backbone.") else 1e-3), name
            is_norm = behaviours.is_norm(net.get_submodule(name.rpartition(".")[0]))
            assert group["weight_decay"] == (0 if is_norm or name.endswith("bias") else 0.1), name
    assert seen == {name for name, p in net.named_parameters() if p.requires_grad}
    r101 = DETECTION_RECIPES["rtdetr-r101-72"]  # of its biases only those of norms have none
    decays = {names[id(p)]: group["weight_decay"] for group in parameter_groups(net, r101) for p in group["params"]}
    assert decays["decoder.enc_output.1.bias"] == decays["encoder.encoder.0.layers.0.norm1.weight"] == 0
    assert decays["decoder.enc_score_head.bias"] == decays["decoder.enc_score_head.weight"] == 2e-4
    assert not any(name.startswith("backbone.conv1") for name in seen)  # the stem is frozen


def test_average_rises_as_that_of_rtdetr() -> None:
    """Every floating entry: e <- d e + (1 - d) w, d = 0.9999 (1 - exp(-n / 2000)), n from 1."""
    net = nn.Sequential(nn.Linear(1, 1, bias=False), nn.BatchNorm1d(1))
    average = WeightAverage(net, DetectionRecipe(), 1)
    expected = {name: value.double().clone() for name, value in net.state_dict().items() if value.is_floating_point()}
    for n in range(1, 40):
        with torch.no_grad():
            for value in (*net.parameters(), net[1].running_mean):
                value.add_(0.1 * n)
        average.update_in(0, net)
        d = 0.9999 * (1 - torch.exp(torch.tensor(-n / 2000, dtype=torch.float64)))
        for name, value in expected.items():
            expected[name] = d * value + (1 - d) * net.state_dict()[name]
    for name, value in expected.items():
        torch.testing.assert_close(average.module.state_dict()[name].double(), value, rtol=1e-5, atol=1e-6)


def test_a_whole_batch_without_objects(scenes: Path) -> None:
    net = adn.convert(adn.create_model("rtdetr_r18vd", **KWARGS, num_classes=10)).train()
    none = {"labels": torch.zeros(0, dtype=torch.int64), "boxes": torch.zeros(0, 4)}
    losses = DetectionDistillation(net).backward(torch.rand(2, 3, 64, 64), [none, none])
    assert torch.isfinite(losses["loss"])
    assert all(torch.isfinite(p.grad).all() for p in net.parameters() if p.grad is not None)


def test_two_passes_in_one_loss_are_those_of_two(scenes: Path) -> None:
    """`loss.backward()` of a call, and `backward`: the same gradients."""
    torch.manual_seed(0)
    net = adn.convert(adn.create_model("rtdetr_r18vd", **KWARGS, num_classes=10)).double().train()
    kd = DetectionDistillation(net, multi_scale=(64, 96), generator=torch.Generator())
    x = torch.rand(2, 3, 64, 64, dtype=torch.float64)
    targets = [{"labels": torch.tensor([1, 2]), "boxes": torch.full((2, 4), 0.4)},
               {"labels": torch.tensor([3]), "boxes": torch.full((1, 4), 0.3)}]
    grads = []
    for way in ("call", "backward"):
        net.zero_grad()
        kd.generator.manual_seed(3)
        if way == "call":
            losses = kd(x, targets)
            losses["loss"].backward()
        else:
            losses = kd.backward(x, targets)
        grads.append({name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None})
        assert adn.get_depth(net) == state_of(net).full
        assert len([name for name in losses if "." in name]) == 15 + 17  # two decoder layers
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        torch.testing.assert_close(grad, grads[1][name], rtol=1e-8, atol=1e-10)


@pytest.mark.full
@pytest.mark.skipif(not COCO_MINI.is_dir(), reason=f"no images at {COCO_MINI} (set ADN_COCO_MINI)")
def test_overfits_eight_real_images() -> None:
    """The path of `train`, without augmentation: in 150 steps both nets find what is in them."""
    eight = Subset(open_coco(COCO_MINI, "train", eval_transform(128)), range(8))
    recipe = DETECTION_RECIPES["digits"].but(epochs=150, batch_size=8, lr=2e-3, warmup_epochs=5, ema=False)
    kwargs = recipe.model_kwargs | {"queries": 60, "num_denoising": 60}
    torch.manual_seed(0)
    net = adn.convert(adn.create_model(recipe.model, num_classes=80, **kwargs))
    batches = DataLoader(eight, 8, collate_fn=collate)
    fit(net, lambda _epoch: batches, None, recipe, loss=DetectionDistillation(net), progress=False)
    for row in evaluate_detector(net, batches, ["super", "base"]):
        assert row.ap50 > 80, row
