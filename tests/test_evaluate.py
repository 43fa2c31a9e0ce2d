"""Accuracy of depths, `adn eval` and `adn predict`."""

from __future__ import annotations

import argparse
import csv
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from conftest import build, randomise
from test_data import damage, write_images
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

import adn
from adn.cli import eval as eval_command
from adn.cli import predict as predict_command
from adn.data.images import collate, eval_transform, open_dataset
from adn.measure.accuracy import Row, chain, choose_depths, evaluate
from adn.models.registry import create_model
from adn.weights.checkpoint import save


@pytest.fixture
def net() -> nn.Module:
    return adn.convert(build("resnet18", num_classes=7))


def batches(sizes: tuple[int, ...] = (5, 3), classes: int = 7) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(3)
    return [(torch.randn(n, 3, 33, 33, generator=generator), torch.randint(classes, (n,), generator=generator))
            for n in sizes]


def test_rows_are_those_of_a_plain_loop(net: nn.Module) -> None:
    data = batches()
    x, y = torch.cat([b[0] for b in data]), torch.cat([b[1] for b in data])
    rows = evaluate(net, [data[0], None, data[1]], progress=False)
    assert [row.depth for row in rows] == adn.depths(net)
    for row in rows:
        with adn.at_depth(net, row.depth), torch.no_grad():
            logits = net(x)
        ranks = logits.argsort(1, descending=True)
        assert row.top1 == pytest.approx(100 * (ranks[:, 0] == y).double().mean().item())
        assert row.top5 == pytest.approx(100 * (ranks[:, :5] == y[:, None]).any(1).double().mean().item())
        assert row.loss == pytest.approx(F.cross_entropy(logits, y).item(), rel=1e-5)
        assert row.images == 8
    assert len({row.loss for row in rows}) == len(rows), "every depth computes something else"


def test_the_data_is_read_once(net: nn.Module) -> None:
    read = []

    def loader():
        for batch in batches():
            read.append(len(batch[0]))
            yield batch

    evaluate(net, loader(), ["super", "TTFF", "base"])
    assert read == [5, 3]


def test_order_and_repetition_of_depths(net: nn.Module) -> None:
    rows = evaluate(net, batches(), ["base", "FFFT", "TTTT", [False] * 4])
    assert [str(row.depth) for row in rows] == ["TTTT", "FFFT", "FFFF"]


def test_mode_and_depth_come_back(net: nn.Module) -> None:
    net.train()
    net.layer1.eval()
    adn.set_depth(net, "TFTF")
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    evaluate(net, batches())
    assert net.training
    assert net.layer2.training
    assert not any(module.training for module in net.layer1.modules())
    assert str(adn.get_depth(net)) == "TFTF"
    assert all(tensor.equal(before[name]) for name, tensor in net.state_dict().items())

    with pytest.raises(ValueError, match="labels"):
        evaluate(net, [(torch.randn(2, 3, 32, 32), torch.tensor([0, 7]))])
    assert net.training
    assert str(adn.get_depth(net)) == "TFTF"


def test_batch_of_one_and_two_classes() -> None:
    net = adn.convert(build("resnet18", num_classes=2))
    rows = evaluate(net, batches((1,), classes=2), ["super"])
    assert rows[0].images == 1
    assert rows[0].top5 == 100


def test_constant_and_broken_outputs_are_not_right() -> None:
    """Ties and NaN must not count as hits."""
    net = adn.convert(build("resnet18", num_classes=7))
    data = [(torch.randn(7, 3, 32, 32), torch.arange(7))]
    for value in (0.0, float("nan")):
        nn.init.constant_(net.fc.weight, value)
        nn.init.zeros_(net.fc.bias)
        assert evaluate(net, data, ["super"])[0].top1 < 20


def test_half_precision(net: nn.Module) -> None:
    data = batches()
    exact = evaluate(net, data, ["super", "base"])
    for rows in (evaluate(net, data, ["super", "base"], amp="bf16"), evaluate(net.bfloat16(), data, ["super", "base"])):
        for row, reference in zip(rows, exact, strict=True):
            assert row.loss == pytest.approx(reference.loss, rel=0.05)
            assert row.loss != reference.loss
    with pytest.raises(ValueError, match="bf16"):
        evaluate(net, data, amp="int4")


def test_wrapped_nets(net: nn.Module) -> None:
    data = batches()
    assert evaluate(torch.compile(net, backend="eager"), data, ["super", "base"]) == evaluate(
        net, data, ["super", "base"])


def test_the_bare_net_runs_inside_ddp(net: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """DDP's own forward communicates, so a process that evaluates alone would wait for the others."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        expected = evaluate(net, batches(), ["base"])
        wrapped = DistributedDataParallel(net)
        monkeypatch.setattr(DistributedDataParallel, "forward", None)
        assert evaluate(wrapped, batches(), ["base"]) == expected
    finally:
        dist.destroy_process_group()


def test_no_image(net: nn.Module, tmp_path: Path) -> None:
    for loader in ([], [None, None]):
        with pytest.raises(ValueError, match="no image to evaluate on: the loader is empty"):
            evaluate(net, loader)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.png").write_text("text")
    data = open_dataset(tmp_path, transform=eval_transform(32))
    with pytest.raises(ValueError, match=r"none of 1 could be read, such as .*x\.png"):
        evaluate(net, DataLoader(data, 2, collate_fn=collate))


def test_classes_must_agree(net: nn.Module, tmp_path: Path) -> None:
    data = open_dataset(write_images(tmp_path / "d", {"a": 1, "b": 1}), transform=eval_transform(32))
    loader = DataLoader(data, 2, collate_fn=collate)
    with pytest.raises(ValueError, match="the data has 2 classes, the net 7"):
        evaluate(net, loader)
    net = adn.convert(build("resnet18", num_classes=2))
    assert evaluate(net, loader, ["super"])[0].images == 2
    net._adn.class_names = ["a", "c"]
    with pytest.raises(ValueError, match="class 1 is 'b' in the data and 'c' in the net"):
        evaluate(net, loader)
    for labels in ([0, -1], [0, 2]):
        with pytest.raises(ValueError, match="labels must be 0 to 1"):
            evaluate(net, [(torch.randn(2, 3, 32, 32), torch.tensor(labels))])


def test_images_of_a_size_the_net_cannot_take() -> None:
    x, y = torch.randn(2, 3, 8, 8), torch.tensor([0, 1])
    for model in (timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=3),
                  torchvision.models.vision_transformer.VisionTransformer(32, 16, 3, 2, 32, 64, num_classes=3)):
        net = adn.convert(model)
        with pytest.raises(ValueError, match=r"\(2, 3, 8, 8\).*made for images of 32 x 32"):
            evaluate(net, [(x, y)])
    valid = adn.convert(build("resnet18", num_classes=3))
    valid.conv1.padding = (0, 0)
    with pytest.raises(ValueError, match=r"\(2, 3, 4, 4\).*224 x 224"):
        evaluate(valid, [(x[..., :4, :4], y)])


def test_features_are_no_logits() -> None:
    net = adn.convert(build("resnet18", num_classes=0, global_pool=""))
    with pytest.raises(ValueError, match="logits"):
        evaluate(net, batches())


def test_choice_of_depths(net: nn.Module) -> None:
    assert list(map(str, chain(net))) == ["FFFF", "TFFF", "TTFF", "TTTF", "TTTT"]
    assert choose_depths(net, None) == choose_depths(net, "chain") == chain(net)
    assert choose_depths(net, "all") == adn.depths(net)
    assert list(map(str, choose_depths(net, "base,FTFT,super"))) == ["TTTT", "FTFT", "FFFF"]
    with pytest.raises(ValueError, match="TTF"):
        choose_depths(net, "TTF")


# ------------------------------------------------------------------------------------------------- command line

# How a checkpoint says it wants its images: unlike the model's own settings in everything.
STORED = {"size": 32, "resize": 36, "interpolation": "nearest", "mean": [0.3, 0.4, 0.5], "std": [0.1, 0.2, 0.3]}


def arguments(command, *args: object) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return parser.parse_args([str(arg) for arg in args])


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return write_images(tmp_path / "photos", {"cat": 3, "dog": 4, "emu": 2})


@pytest.fixture
def checkpoint(tmp_path: Path) -> Callable[..., Path]:
    def write(class_names: list[str] | None = None, num_classes: int = 3) -> Path:
        net = randomise(create_model("anydepth_resnet18", num_classes=num_classes))
        adn.set_depth(net, "TTFF")
        path = tmp_path / "net.safetensors"
        save(net, path, class_names=class_names, extra={"data": STORED})
        return path

    return write


def test_eval_command(photos: Path, checkpoint, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    damage(photos)
    path, table = checkpoint(["cat", "dog", "emu"]), tmp_path / "accuracy.csv"
    code = eval_command.run(arguments(
        eval_command, photos, "--checkpoint", path, "--csv", table, "--workers", 0, "--device", "cpu"))
    out, err = capsys.readouterr()
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()[:6]] == ["depth", "FFFF", "TFFF", "TTFF", "TTTF", "TTTT"]
    assert "9 images" in out
    assert "5 of 16 depths; --depth all" in out
    assert "4 of 13 images could not be read" in err
    assert "text.png" in err

    data = open_dataset(photos, transform=eval_transform(**STORED))
    expected = evaluate(adn.weights.checkpoint.load(path), DataLoader(data, 64, collate_fn=collate), ["FFFF", "TTTT"])
    with open(table, newline="") as file:
        rows = {row["depth"]: row for row in csv.DictReader(file)}
    assert len(rows) == 5
    for row in expected:
        assert float(rows[str(row.depth)]["top1"]) == row.top1
        assert float(rows[str(row.depth)]["loss"]) == pytest.approx(row.loss)
        assert int(rows[str(row.depth)]["images"]) == 9
    assert int(rows["FFFF"]["macs"]) > int(rows["TTTT"]["macs"]) > 1e6


def test_eval_command_all_and_chosen(photos: Path, checkpoint, capsys: pytest.CaptureFixture) -> None:
    common = (photos, "--checkpoint", checkpoint(), "--workers", 0, "--device", "cpu")
    eval_command.run(arguments(eval_command, *common, "--depth", "all"))
    assert len(capsys.readouterr().out.splitlines()) == 1 + 16 + 1
    eval_command.run(arguments(eval_command, *common, "--depth", "super,TTFF", "--size", 40))
    out = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in out] == ["depth", "FFFF", "TTFF", "9"]


@pytest.mark.parametrize(("options", "message"), [
    (["--depth", "TX"], "neither T nor F"),
    (["--split", "val"], "no folder 'val'"),
    (["--device", "cuda:0"], "no CUDA"),
    (["--class-map", "nowhere.txt"], "nowhere.txt"),
])
def test_eval_command_refuses(photos: Path, checkpoint, options: list[str], message: str,
                              monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=message):
        eval_command.run(arguments(eval_command, photos, "--checkpoint", checkpoint(), "--workers", 0, *options))


def test_eval_command_checks_classes(photos: Path, checkpoint, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    common = ("--workers", 0, "--device", "cpu", "--depth", "super")
    with pytest.raises(ValueError, match="the data has 3 classes, the net 5"):
        eval_command.run(arguments(eval_command, photos, "--checkpoint", checkpoint(num_classes=5), *common))
    path = checkpoint(["emu", "dog", "cat"])
    with pytest.raises(ValueError, match="class 0 is 'cat' in the data and 'emu' in the net"):
        eval_command.run(arguments(eval_command, photos, "--checkpoint", path, *common))
    (tmp_path / "classes.txt").write_text("emu\ndog\ncat\n")
    assert eval_command.run(arguments(
        eval_command, photos, "--checkpoint", path, "--class-map", tmp_path / "classes.txt", *common)) == 0


def test_predict_command(photos: Path, checkpoint, capsys: pytest.CaptureFixture) -> None:
    path = checkpoint(["cat", "dog", "emu"])
    image = photos / "emu" / "1.png"
    assert predict_command.run(arguments(
        predict_command, image, "--checkpoint", path, "--depth", "base", "--device", "cpu")) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == str(image)

    net = adn.weights.checkpoint.load(path).eval()
    x = eval_transform(**STORED)(open_dataset(photos)[8][0])[None]
    shown = {}
    for depth in ("TTTT", "TTFF"):
        with adn.at_depth(net, depth), torch.no_grad():
            shares = net(x)[0].softmax(0)
        order = shares.argsort(descending=True).tolist()
        shown[depth] = [f"  {shares[i]:6.1%}  {['cat', 'dog', 'emu'][i]}" for i in order]
    assert lines[1:] == shown["TTTT"]
    # The depth the file was saved at is the default.
    predict_command.run(arguments(predict_command, image, "--checkpoint", path, "--device", "cpu", "--top", 1))
    assert capsys.readouterr().out.splitlines()[1:] == shown["TTFF"][:1]
    assert shown["TTTT"] != shown["TTFF"]


def test_predict_goes_on_after_an_unreadable_image(photos: Path, checkpoint, capsys: pytest.CaptureFixture) -> None:
    damaged = damage(photos)
    good = [photos / "cat" / "0.png", photos / "dog" / "0.png"]
    names = (good[0], *damaged, photos / "none.png", good[1])
    assert predict_command.run(arguments(predict_command, *names, "--checkpoint", checkpoint(), "--device", "cpu")) == 1
    out, err = capsys.readouterr()
    assert [line for line in out.splitlines() if not line.startswith(" ")] == list(map(str, good))
    assert out.count("class 2") == 2
    assert [line.partition(": ")[0] for line in err.splitlines()] == [*damaged, str(photos / "none.png")]


def test_predict_refuses(photos: Path, checkpoint) -> None:
    image, path = photos / "emu" / "1.png", checkpoint()
    for options, message in ((["--depth", "TTTTT"], "5 flags"), (["--top", "0"], "--top"), (["--size", "0"], "crop")):
        with pytest.raises(ValueError, match=message):
            predict_command.run(arguments(predict_command, image, "--checkpoint", path, "--device", "cpu", *options))


def test_rows_are_values() -> None:
    assert Row(adn.Depth("TF"), 1.0, 2.0, 0.5, 4) == Row(adn.Depth("TF"), 1.0, 2.0, 0.5, 4)
