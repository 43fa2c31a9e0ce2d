"""Cost of every depth: multiply-adds, parameters, times, the front, the budget, files, the command."""

from __future__ import annotations

import argparse
import builtins
import pickle
import sys
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from conftest import build, randomise
from PIL import Image
from torch import nn

import adn
from adn.cli import profile as command
from adn.core.tables import read_table
from adn.measure.accuracy import Row
from adn.measure.cost import count_macs, count_parameters, in_use
from adn.measure.profile import Point, Profile, fit_budget, profile
from adn.models.registry import create_model
from adn.weights.checkpoint import save

# Specification of the reference, at 224: GMAC of the super-net, saved by each stage, base-net; parameters of the
# base-net (torchvision models).
GMACS = {
    "resnet50": (4.0892, (0.2184, 0.4367, 0.6551, 0.2184), 2.5606),
    "resnet101": (7.8014, (0.2184, 0.4367, 2.4020, 0.2184), 4.5259),
    "mobilenet_v2": (0.3008, (0.0258, 0.0110, 0.0206, 0.0227, 0.0155), 0.2053),
    "vit_b_16": (17.5638, (1.4539, 1.4539, 1.4539, 1.4539), 11.7480),
    "vit_b_32": (4.4092, (0.3577, 0.3577, 0.3577, 0.3577), 2.9782),
    "swin_t": (4.4906, (0.3764, 0.3616, 1.0626, 0.3505), 2.3396),
}
BASE_PARAMETERS = {"resnet50": 17_112_360, "resnet101": 27_167_016, "mobilenet_v2": 2_934_376,
                   "vit_b_16": 58_216_168, "vit_b_32": 59_872_744, "swin_t": 15_308_725}
SUPER_PARAMETERS = {"resnet50": 25_557_032, "resnet101": 44_549_160, "mobilenet_v2": 3_504_872,
                    "vit_b_16": 86_567_656, "vit_b_32": 88_224_232, "swin_t": 28_288_354}


@pytest.fixture(scope="module", params=GMACS)
def reference(request: pytest.FixtureRequest) -> tuple[str, nn.Module]:
    with torch.device("meta"):
        return request.param, adn.convert(torchvision.models.get_model(request.param))


@pytest.fixture
def net() -> nn.Module:
    return adn.convert(build("resnet18", num_classes=5))


def small_vit() -> nn.Module:
    return torchvision.models.vision_transformer.VisionTransformer(32, 8, 6, 4, 64, 128, num_classes=5)


def test_macs_of_the_reference(reference: tuple[str, nn.Module]) -> None:
    name, net = reference
    full, saved, base = GMACS[name]
    x = torch.empty(1, 3, 224, 224, device="meta")
    n = len(saved)
    alone = [adn.Depth([i == k for i in range(n)]) for k in range(n)]
    counts = [count / 1e9 for count in count_macs(net, x, ["super", *alone, "base"])]
    # The specification has four decimals: within 0.1 %, or the last decimal where that is coarser.
    assert counts[0] == pytest.approx(full, rel=1e-3)
    assert counts[-1] == pytest.approx(base, rel=1e-3)
    for count, part in zip(counts[1:-1], saved, strict=True):
        assert counts[0] - count == pytest.approx(part, rel=1e-3, abs=6e-5)
    assert sum(counts[0] - count for count in counts[1:-1]) == pytest.approx(counts[0] - counts[-1], rel=1e-9)


def test_parameters_of_the_reference(reference: tuple[str, nn.Module]) -> None:
    name, net = reference
    assert count_parameters(net, "base") == BASE_PARAMETERS[name]
    assert count_parameters(net, "super") == SUPER_PARAMETERS[name]


@pytest.mark.parametrize("make", [
    lambda: timm.create_model("resnet18", num_classes=3),
    lambda: timm.create_model("swin_tiny_patch4_window7_224", embed_dim=24, num_heads=(1, 2, 4, 8)),
    small_vit,
])
def test_parameters_and_names_in_use_are_those_of_the_extracted_net(make) -> None:
    net = adn.convert(make())
    for depth in adn.depths(net):
        static = adn.extract(net, depth)
        assert count_parameters(net, depth) == sum(p.numel() for p in static.parameters())
        used = in_use(net, depth)
        kept = {name.replace(".skip.", ".") for name in net.state_dict() if used(name)}
        assert kept == set(static.state_dict())


def test_shared_parameters_count_once(net: nn.Module) -> None:
    net.layer1[1].conv1.weight = net.layer1[0].conv1.weight  # refinement and essential block share
    size = net.layer1[0].conv1.weight.numel()
    plain = adn.convert(build("resnet18", num_classes=5))
    assert count_parameters(net, "super") == count_parameters(plain, "super") - size
    assert count_parameters(net, "base") == count_parameters(plain, "base")


def test_macs_by_hand() -> None:
    """A net small enough to count on paper: a 1x1 convolution on each of 6 x 5 pixels, and the head."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(4, 4, 1, bias=False), nn.BatchNorm2d(4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.norm(self.conv(x))

    model = nn.Sequential(nn.Sequential(Block(), Block(), Block()), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                          nn.Linear(4, 10))
    net = adn.convert(model, plan=["0"])
    assert count_macs(net, torch.randn(1, 4, 6, 5), ["F", "T"]) == [3 * 16 * 30 + 40, 2 * 16 * 30 + 40]


def test_attention_is_counted_on_a_real_device() -> None:
    """nn.MultiheadAttention has a fused path in evaluation mode on the CPU, which the counter cannot look into."""
    net = adn.convert(small_vit()).eval()
    with torch.device("meta"):
        shadow = adn.convert(small_vit())
    before = torch.backends.mha.get_fastpath_enabled()
    x = torch.randn(1, 3, 32, 32)
    counts = count_macs(net, x, adn.depths(net))
    assert counts == count_macs(shadow, x.to("meta"), adn.depths(shadow))
    tokens, width, mlp, blocks = 17, 64, 128, 6
    block = tokens * width * (4 * width + 2 * mlp) + 2 * tokens * tokens * width
    assert counts[0] == blocks * block + 16 * 3 * 8 * 8 * width + width * 5
    assert counts[0] - counts[-1] == 2 * block
    assert torch.backends.mha.get_fastpath_enabled() is before


def test_profile_of_all_depths(net: nn.Module) -> None:
    net.train()
    net.layer1.eval()
    adn.set_depth(net, "TFTF")
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    x = torch.randn(2, 3, 40, 32)
    result = profile(net, x, rounds=3, warmup=1)
    assert [point.depth for point in result] == adn.depths(net)
    assert [point.macs for point in result] == count_macs(net, x[:1], adn.depths(net)), "per image"
    assert [point.params for point in result] == [count_parameters(net, depth) for depth in adn.depths(net)]
    assert all(0 < point.p50_ms <= point.p99_ms for point in result)
    assert all(point.top1 is None for point in result)
    assert result.machine["batch"] == "2"
    assert result.machine["input"] == "3x40x32"
    assert result.machine["dtype"] == "float32"
    assert result.machine["torch"] == torch.__version__
    assert net.training
    assert net.layer2.training
    assert not net.layer1.training
    assert str(adn.get_depth(net)) == "TFTF"
    assert all(tensor.equal(before[name]) for name, tensor in net.state_dict().items())


def test_rounds_are_interleaved_in_changing_order(net: nn.Module) -> None:
    ran: list[str] = []
    net.register_forward_pre_hook(lambda *_: ran.append(str(adn.get_depth(net))))
    chosen = ["FFFF", "TFFF", "TTTT", "FTFT"]
    profile(net, torch.randn(1, 3, 32, 32), depths=chosen, rounds=4, warmup=2)
    counted, timed = ran[:4], ran[4:]
    assert counted == chosen
    rounds = [timed[i : i + 4] for i in range(0, len(timed), 4)]
    assert len(rounds) == 6
    assert all(sorted(order) == sorted(chosen) for order in rounds)
    assert len({tuple(order) for order in rounds}) > 1


def test_profile_of_a_compiled_net(net: nn.Module) -> None:
    x = torch.randn(1, 3, 32, 32)
    compiled = profile(torch.compile(net, backend="eager"), x, depths=["super", "base"], rounds=1, warmup=1)
    assert [p.macs for p in compiled] == count_macs(net, x, ["super", "base"])


def test_accuracy_is_joined_by_depth(net: nn.Module) -> None:
    x = torch.randn(1, 3, 32, 32)
    rows = [Row(adn.Depth(d), top1, 99.0, 0.1, 10) for d, top1 in (("TTTT", 70.0), ("FFFF", 80.0), ("FTFT", 75.0))]
    expected = {"FFFF": 80.0, "TTTT": 70.0}
    for accuracy in (rows, expected, {adn.Depth(d): v for d, v in expected.items()}):
        result = profile(net, x, depths=["FFFF", "TTTT"], rounds=1, warmup=0, accuracy=accuracy)
        assert {str(p.depth): p.top1 for p in result} == expected
    with pytest.raises(ValueError, match="no accuracy given for TFFF"):
        profile(net, x, depths=["FFFF", "TFFF"], rounds=1, accuracy=rows)


def test_profile_refuses(net: nn.Module) -> None:
    x = torch.randn(1, 3, 32, 32)
    for settings, message in (({"rounds": 0}, "rounds"), ({"warmup": -1}, "warmup"), ({"depths": ["TF"]}, "2 flags")):
        with pytest.raises(ValueError, match=message):
            profile(net, x, **settings)
    with pytest.raises(ValueError, match="batch of 0"):
        profile(net, x[:0])
    with pytest.raises(ValueError, match=r"\(1, 3, 8, 8\).*32 x 32"):
        profile(adn.convert(small_vit()), x[..., :8, :8])
    with pytest.raises(ValueError, match="not any-depth"):
        profile(build("resnet18"), x)


def test_names_of_the_package() -> None:
    assert adn.profile is profile
    assert adn.fit_budget is fit_budget
    point = made()[0]
    assert pickle.loads(pickle.dumps(point)) == point


# ------------------------------------------------------------------------------------------- a profile as a value


def made(accuracy: dict[str, float] | None = None) -> Profile:
    times = {"FFFF": (10.0, 12.0), "TFFF": (9.0, 15.0), "FTFF": (9.5, 9.9), "TTFF": (9.2, 9.4), "TTTT": (5.0, 8.0)}
    macs = {"FFFF": 100, "TFFF": 90, "FTFF": 90, "TTFF": 80, "TTTT": 50}
    return Profile([Point(adn.Depth(d), macs[d], macs[d] * 10, *times[d], (accuracy or {}).get(d)) for d in times],
                   {"device": "a: machine", "batch": "1", "threads": "1", "input": "3x8x8"})


ACCURACY = {"FFFF": 80.0, "TFFF": 79.5, "FTFF": 81.0, "TTFF": 79.0, "TTTT": 60.0}


def names(points: list[Point]) -> list[str]:
    return [str(point.depth) for point in points]


def test_pareto() -> None:
    assert names(made().pareto()) == ["TTTT", "TFFF", "FFFF"]
    assert names(made(ACCURACY).pareto()) == ["TTTT", "TFFF", "FTFF"]
    tied = Profile([Point(adn.Depth(d), macs, 1, 5.0, 5.0) for d, macs in (("T", 1), ("F", 2))])
    assert names(tied.pareto()) == ["F"]
    assert Profile().pareto() == []


def test_fit_budget() -> None:
    assert str(fit_budget(made(), ms=1000)) == "FFFF"
    assert str(fit_budget(made(), ms=10)) == "FFFF", "a budget is met by equality"
    assert str(fit_budget(made(), ms=9.99)) == "TFFF", "of equals the fastest"
    assert str(fit_budget(made(), ms=8.9)) == "TTTT"
    assert str(fit_budget(made(), ms=10, percentile=99)) == "FTFF"
    assert str(fit_budget(made(ACCURACY), ms=1000)) == "FFFF", "the deepest, also where another is more accurate"
    assert str(fit_budget(made(ACCURACY), ms=9.6)) == "FTFF", "of equals the most accurate"
    with pytest.raises(ValueError, match=r"4 ms: the fastest, TTTT, takes 5 ms \(p50\)"):
        fit_budget(made(), ms=4)
    with pytest.raises(ValueError, match=r"TTTT, takes 8 ms \(p99\)"):
        fit_budget(made(), ms=4, percentile=99)
    with pytest.raises(ValueError, match="percentile"):
        fit_budget(made(), ms=4, percentile=90)
    with pytest.raises(ValueError, match="empty"):
        fit_budget(Profile(), ms=4)


def test_fit_budget_of_a_real_profile_sets_the_net(net: nn.Module) -> None:
    result = adn.profile(net, torch.randn(1, 3, 32, 32), depths=["super", "base"], rounds=2, warmup=0)
    adn.set_depth(net, adn.fit_budget(result, ms=1e6))
    assert str(adn.get_depth(net)) == "FFFF"


def test_table() -> None:
    lines = str(made()).splitlines()
    assert [line.split()[0] for line in lines] == ["depth", "FFFF", "TFFF", "FTFF", "TTFF", "TTTT"]
    assert [line.endswith("*") for line in lines[1:]] == [True, True, False, False, True]
    assert "top-1" not in lines[0]
    assert "81.00" in str(made(ACCURACY))


@pytest.mark.parametrize("accuracy", [None, ACCURACY])
def test_csv_round_trip(tmp_path: Path, accuracy: dict[str, float] | None) -> None:
    original = made(accuracy)
    original.to_csv(tmp_path / "p.csv")
    text = (tmp_path / "p.csv").read_text().splitlines()
    assert text[0] == "# device: a: machine"
    assert text[4] == "depth,macs,params,p50_ms,p99_ms,top1"
    again = Profile.from_csv(tmp_path / "p.csv")
    assert list(again) == list(original)
    assert again.machine == original.machine


def test_foreign_csv(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("depth,colour\nFFFF,red\n")
    with pytest.raises(ValueError, match="no column 'macs'"):
        Profile.from_csv(tmp_path / "x.csv")
    (tmp_path / "x.csv").write_text("")
    with pytest.raises(ValueError, match="no column"):
        read_table(tmp_path / "x.csv", ["depth"])


@pytest.mark.parametrize("accuracy", [None, ACCURACY])
def test_plot(tmp_path: Path, accuracy: dict[str, float] | None) -> None:
    pytest.importorskip("matplotlib")
    made(accuracy).plot(tmp_path / "p.png")
    with Image.open(tmp_path / "p.png") as image:
        assert image.size == (1050, 675)
        assert len(image.convert("RGB").getcolors(1 << 24)) > 50
    Profile(made()[:1]).plot(tmp_path / "p.svg")
    assert b"<svg" in (tmp_path / "p.svg").read_bytes()
    assert "matplotlib.pyplot" not in sys.modules, "nothing of the user's is touched"
    with pytest.raises(ValueError, match="empty"):
        Profile().plot(tmp_path / "e.png")


def test_labels_do_not_overlap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figure = pytest.importorskip("matplotlib.figure")
    generator = torch.Generator().manual_seed(0)
    depths = adn.Depth.every(adn.Depth([False] * 6))
    jitter = torch.rand(len(depths), generator=generator).tolist()
    crowd = Profile([Point(depth, 100 - 10 * sum(depth), 1, 9 - sum(depth) + late, 9.0)
                     for depth, late in zip(depths, jitter, strict=True)])
    figures = []
    save_figure = figure.Figure.savefig
    monkeypatch.setattr(figure.Figure, "savefig", lambda self, path: (figures.append(self), save_figure(self, path)))
    crowd.plot(tmp_path / "crowd.png")
    axes = figures[0].axes[0]
    boxes = [text.get_window_extent() for text in axes.texts]
    shown = {text.get_text() for text in axes.texts}
    assert {"FFFFFF", "TTTTTT"} <= shown
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


def test_plot_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def refuse(name: str, *args: object) -> object:
        if name.startswith("matplotlib"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, *args)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ImportError, match=r'pip install "adn\[plot\]"'):
        made().plot(tmp_path / "p.png")


# ------------------------------------------------------------------------------------------------- command line


def arguments(*args: object) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return parser.parse_args([*map(str, args), "--device", "cpu"])


def test_command_of_a_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    net = randomise(create_model("anydepth_resnet18", num_classes=3))
    save(net, tmp_path / "n.safetensors", extra={"data": {"size": 40}})
    (tmp_path / "accuracy.csv").write_text("depth,macs,top1\nTTTT,1,50.5\nFFFF,2,60.5\nTFFF,3,60.0\n")
    assert command.run(arguments(
        "--checkpoint", tmp_path / "n.safetensors", "--accuracy", tmp_path / "accuracy.csv", "--rounds", 2,
        "--csv", tmp_path / "p.csv", "--plot", tmp_path / "p.png", "--budget", 1e6)) == 0
    out = capsys.readouterr().out
    assert [line.split()[0] for line in out.splitlines()[:4]] == ["depth", "TTTT", "FFFF", "TFFF"]
    assert "FFFF fits 1e+06 ms (p50)" in out
    result = Profile.from_csv(tmp_path / "p.csv")
    assert {str(p.depth): p.top1 for p in result} == {"TTTT": 50.5, "FFFF": 60.5, "TFFF": 60.0}
    assert result.machine["input"] == "3x40x40"
    assert (tmp_path / "p.png").exists()


@pytest.mark.parametrize("name", ["resnet18", "anydepth_resnet18"])
def test_command_of_a_model(name: str, capsys: pytest.CaptureFixture) -> None:
    threads = torch.get_num_threads()
    try:
        command.run(arguments("--model", name, "--size", 32, "--batch-size", 2, "--depth", "chain", "--rounds", 1,
                              "--threads", 1))
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(threads)
    out = capsys.readouterr().out
    assert [line.split()[0] for line in out.splitlines()[1:6]] == ["FFFF", "TFFF", "TTFF", "TTTF", "TTTT"]
    assert "batch 2, input 3x32x32" in out


def test_command_shows_the_chain_of_nets_with_many_depths(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(command, "MOST_BY_DEFAULT", 15)
    command.run(arguments("--model", "resnet18", "--size", 32, "--rounds", 1))
    out = capsys.readouterr().out
    assert [line.split()[0] for line in out.splitlines()[1:6]] == ["FFFF", "TFFF", "TTFF", "TTTF", "TTTT"]
    assert "5 of 16 depths" in out


def test_command_refuses(tmp_path: Path) -> None:
    common = ("--model", "resnet18", "--size", 32, "--rounds", 1)
    with pytest.raises(ValueError, match="no depth runs in"):
        command.run(arguments(*common, "--depth", "base", "--budget", 1e-6))
    (tmp_path / "a.csv").write_text("depth,macs,top1\nTTTT,1,50.5\n")
    with pytest.raises(ValueError, match="no accuracy given for FFFF"):
        command.run(arguments(*common, "--depth", "super,base", "--accuracy", tmp_path / "a.csv"))
    with pytest.raises(ValueError, match="nosuchmodel"):
        command.run(arguments("--model", "nosuchmodel"))
    with pytest.raises(ValueError, match="batch of 0"):
        command.run(arguments(*common, "--batch-size", 0))
