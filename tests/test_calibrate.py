"""Statistics for a depth in between: what changes, what must not, and the command."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import torch
from conftest import build, randomise
from test_data import damage, write_images
from torch import nn

import adn
from adn.cli import calibrate as command
from adn.measure.calibrate import calibrate
from adn.models.registry import create_model
from adn.weights.checkpoint import load, read_metadata, save

DEPTH = "TFFT"


@pytest.fixture
def net() -> nn.Module:
    """Statistics that fit no data at all, so that calibration shows."""
    return adn.convert(build("resnet18", num_classes=5, drop_rate=0.5, drop_path_rate=0.5))


def batches(sizes: tuple[int, ...] = (6, 6, 6)) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(n, 3, 48, 40, generator=generator), torch.zeros(n, dtype=torch.int64)) for n in sizes]


def buffers(net: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in net.state_dict().items()}


def changed(before: dict[str, torch.Tensor], after: nn.Module) -> set[str]:
    return {name for name, tensor in after.state_dict().items() if not tensor.equal(before[name])}


def test_the_net_does_not_change(net: nn.Module) -> None:
    net.train()
    net.layer1.eval()
    adn.set_depth(net, "FTTF")
    before, modes = buffers(net), [m.training for m in net.modules()]
    calibrate(net, batches(), DEPTH)
    assert not changed(before, net)
    assert [m.training for m in net.modules()] == modes
    assert str(adn.get_depth(net)) == "FTTF"


def test_only_statistics_in_use_change(net: nn.Module) -> None:
    before = buffers(net)
    copy = calibrate(net, batches(), DEPTH)
    assert str(adn.get_depth(copy)) == DEPTH
    moved = changed(before, copy)
    # By hand: stages 1 and 4 use the second sets and bypass their last block, 2 and 3 use the first sets and run all.
    norms = ["bn1"]
    for stage, bypassed in enumerate((True, False, False, True), start=1):
        norms += [f"layer{stage}.0.bn{i}{'.skip' if bypassed else ''}" for i in (1, 2)]
        norms += [] if bypassed else [f"layer{stage}.1.bn{i}" for i in (1, 2)]
        norms += [f"layer{stage}.0.downsample.1"] if stage > 1 else []
    assert moved == {f"{n}.{b}" for n in norms for b in ("running_mean", "running_var", "num_batches_tracked")}
    assert {module.momentum for module in copy.modules() if isinstance(module, nn.BatchNorm2d)} == {0.1}
    assert not any(module.training for module in copy.modules()), "the mode of the net"


@pytest.mark.parametrize("depth", ["FFFF", "TTTT", DEPTH])
def test_statistics_are_the_mean_over_batches(net: nn.Module, depth: str) -> None:
    """Against a static net at that depth, each norm measured by hooks, layer after layer."""
    data = batches((6, 4))
    static = adn.extract(net, depth).eval()
    sums: dict[str, list[torch.Tensor]] = {}

    def measure(name: str):
        def hook(norm: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            x = inputs[0].transpose(0, 1).flatten(1)
            sums.setdefault(name, []).append(torch.stack([x.mean(1), x.var(1)]))

        return hook

    for name, module in static.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            module.training = True
            module.register_forward_pre_hook(measure(name))
    with torch.no_grad():
        for x, _ in data:
            static(x)
    calibrated = adn.extract(calibrate(net, data, depth), depth)
    assert len(sums) > 8
    for name, found in sums.items():
        mean, var = sum(found) / len(found)
        norm = calibrated.get_submodule(name)
        torch.testing.assert_close(norm.running_mean, mean, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(norm.running_var, var, rtol=1e-4, atol=1e-5)


def test_calibration_brings_eval_near_batch_statistics(net: nn.Module) -> None:
    (x, _), = batches((24,))
    copy = calibrate(net, [(x, x)], DEPTH).eval()
    reference = adn.extract(net, DEPTH).eval()
    for module in reference.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.training = True
    with torch.no_grad(), adn.at_depth(net.eval(), DEPTH):
        target, before, after = reference(x), net(x), copy(x)
    assert (after - target).abs().max() < 0.05 * (before - target).abs().max()


def test_number_of_batches_and_empty_ones(net: nn.Module) -> None:
    data = batches()
    a, b = calibrate(net, data, DEPTH, batches=2), calibrate(net, [data[0], None, data[1]], DEPTH)
    assert not changed(buffers(a), b)
    assert a.bn1.num_batches_tracked == 2
    for loader, count in (([], None), ([None], None), (data, 0)):
        with pytest.raises(ValueError, match="no image"):
            calibrate(net, loader, DEPTH, batches=count)


def test_not_a_number_in_old_statistics_does_not_stay(net: nn.Module) -> None:
    net.bn1.running_mean.fill_(float("nan"))
    assert calibrate(net, batches(), DEPTH).bn1.running_mean.isfinite().all()


def test_nets_without_batch_norm() -> None:
    net = adn.convert(build("convnext_atto", num_classes=2))
    with pytest.raises(ValueError, match="ConvNeXt has no batch norm"):
        calibrate(net, batches(), DEPTH)


def test_single_images_are_refused_with_the_reason(net: nn.Module) -> None:
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        calibrate(net, [(torch.randn(1, 3, 32, 32), None)], DEPTH)


def test_wrong_depth_and_plain_nets(net: nn.Module) -> None:
    with pytest.raises(ValueError, match="3 flags"):
        calibrate(net, batches(), "TFF")
    with pytest.raises(ValueError, match="not any-depth"):
        calibrate(build("resnet18"), batches(), DEPTH)


# ------------------------------------------------------------------------------------------------- command line


def arguments(*args: object) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return parser.parse_args([*map(str, args), "--workers", "0", "--device", "cpu"])


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    net = randomise(create_model("anydepth_resnet18", num_classes=3))
    save(net, tmp_path / "net.safetensors", class_names=["a", "b", "c"], extra={"data": {"size": 32}, "note": "kept"})
    return tmp_path / "net.safetensors"


@pytest.mark.parametrize("own_validation", [True, False])
def test_command(checkpoint: Path, tmp_path: Path, own_validation: bool, capsys: pytest.CaptureFixture) -> None:
    train = write_images(tmp_path / "train", {"a": 10, "b": 10, "c": 10})
    val = write_images(tmp_path / "val", {"a": 3, "b": 2, "c": 2})
    out = tmp_path / "tfft.safetensors"
    original = checkpoint.read_bytes()
    code = command.run(arguments(train, "--checkpoint", checkpoint, "--depth", DEPTH, "--out", out, "--batch-size", 8,
                                 *(["--val", val] if own_validation else [])))
    shown = capsys.readouterr().out
    assert code == 0
    assert checkpoint.read_bytes() == original
    assert "TFFT as it was" in shown
    assert "TFFT calibrated" in shown
    assert f"{7 if own_validation else 6} images not used" in shown
    metadata = read_metadata(out)
    assert metadata["depth"] == DEPTH
    assert metadata["class_names"] == ["a", "b", "c"]
    assert metadata["extra"]["note"] == "kept"
    assert metadata["extra"]["calibrated"]["depth"] == DEPTH
    before, after = load(checkpoint), load(out)
    moved = changed(buffers(before), after)
    assert "layer1.0.bn1.skip.running_mean" in moved
    assert "layer1.0.bn1.running_mean" not in moved
    # The images are divided or read in full batches: 24 of them either way.
    assert after.bn1.num_batches_tracked == 3


def test_command_reports_unreadable_images(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    train = write_images(tmp_path / "train", {"cat": 6, "dog": 6, "emu": 6})
    damage(train)
    (tmp_path / "classes.txt").write_text("cat\ndog\nemu\n")
    net = load(checkpoint)
    net._adn.class_names = None
    save(net, checkpoint)
    command.run(arguments(train, "--checkpoint", checkpoint, "--depth", DEPTH, "--out", tmp_path / "o", "--size", 32))
    assert "4 of 22 images could not be read" in capsys.readouterr().err


def test_command_refuses(checkpoint: Path, tmp_path: Path) -> None:
    train = write_images(tmp_path / "train", {"a": 3, "b": 3, "c": 3})
    common = (train, "--checkpoint", checkpoint)
    with pytest.raises(ValueError, match="a file of its own"):
        command.run(arguments(*common, "--depth", DEPTH, "--out", checkpoint))
    with pytest.raises(ValueError, match="5 flags"):
        command.run(arguments(*common, "--depth", "TTTTT", "--out", tmp_path / "o"))
    with pytest.raises(OSError, match="nowhere"):
        command.run(arguments(*common, "--depth", DEPTH, "--out", tmp_path / "nowhere" / "o"))
