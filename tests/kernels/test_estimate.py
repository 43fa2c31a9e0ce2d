"""The model of time against arithmetic by hand; and that it says what it is."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
import torch
from harness import INTERPRETED

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "bench"), str(ROOT / "bench" / "ops")]

if INTERPRETED:
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

import common  # noqa: E402
import estimate  # noqa: E402
import shapes  # noqa: E402
from cases import Case  # noqa: E402

CODE = estimate.Code(registers=128, spills=0, shared=70_000, straight=500, loop=100, loaded=96, loaded_in_loop=32,
                     mma="HGMMA.64x64x16.F32.BF16")


def case(op: str, layer: shapes.Layer, batch: int = 64) -> Case:
    return next(importlib.import_module(f"bench_{op}").cases(layer, batch, torch.bfloat16))


@pytest.fixture
def conv(monkeypatch: pytest.MonkeyPatch) -> estimate.Launch:
    """3x3, 64 to 64 channels, 64 images of 56 x 56 pixels, in tiles of 128 x 64."""
    monkeypatch.setattr(estimate, "code", lambda launch: CODE)
    launch = estimate.product(case("conv", shapes.Conv("net", "a", 1, 64, 64, 56, 3, activation="silu")))
    return estimate.with_tile(launch, {"BM": 128, "BN": 64, "BK": 64, "num_warps": 8, "num_stages": 3})


def test_bytes_of_shared_memory() -> None:
    """Of a step: written once, each operand read by each instruction."""
    def clocks(bm: int, bn: int, instruction: int) -> float:
        a = {"x": torch.empty(0, dtype=torch.bfloat16), "BM": bm, "BN": bn, "BK": 64}
        return estimate.shared_bytes(a, f"HGMMA.64x{instruction}x16.F32.BF16") / estimate.SHARED_BYTES

    assert clocks(128, 64, 64) == 192 + 128 + 128
    assert clocks(128, 128, 128) == 256 + 128 + 256
    assert clocks(128, 256, 256) == 384 + 128 + 512


def test_limits_of_a_product(conv: estimate.Launch) -> None:
    pixels = 64 * 56 * 56
    node = estimate.node(conv)
    assert node.flops == 2 * pixels * 64 * 64 * 9
    assert node.bytes == 2 * (2 * pixels * 64 + 9 * 64 * 64) + 2 * 64  # x, out, weight, bias
    assert node.programs == pixels // 128 == 1568
    assert node.programs_per_sm == 2  # by registers: 2 x 256 x 128 of 65536
    assert node.instructions == 500 + 9 * 100
    most = 12  # of 132 multiprocessors
    assert node.limits["shared"] == pytest.approx(most * 9 * 448 / 1830)
    assert node.limits["issue"] == pytest.approx(most * 8 * 1400 / 4 / 1830)
    assert node.limits["tensor"] == pytest.approx(1e6 * node.flops / 790e12)
    assert node.limits["latency"] == pytest.approx(6 * 0.8 * (1 + (96 + 8 * 32) / 96))
    assert node.limits["memory"] == pytest.approx(1e6 * node.bytes / 4.3e12)
    assert node.estimate == max(node.limits.values()) + 1.6
    assert node.floor == pytest.approx(max(node.limits["memory"], 1e6 * node.flops / 790e12))


def test_of_a_strided_product_every_other_pixel_is_read() -> None:
    launch = estimate.product(case("conv", shapes.Conv("net", "a", 1, 64, 128, 56, 1, stride=2)))
    assert estimate.cost(launch)[0] == 2 * (64 * 28 * 28 * (64 + 128) + 64 * 128) + 2 * 128


def test_a_larger_tile_has_fewer_programs(conv: estimate.Launch) -> None:
    assert estimate.with_tile(conv, {**estimate.TILES[0], "BM": 256, "BN": 32}).grid == (64 * 56 * 56 // 256 * 2,)


def test_compiled_code_is_read() -> None:
    launch = estimate.product(case("conv", shapes.Conv("net", "a", 1, 64, 256, 56, 1, activation="relu")))
    found = estimate.code(launch)
    assert found.mma.startswith("HGMMA.64x")
    assert 0 < found.loop < found.straight
    # Tiles of x and the weight, one for each stage: in the loop one of them.
    warps, stages = launch.options["num_warps"], launch.options["num_stages"]
    a = launch.args
    tile = 2 * a["BK"] * (a["BM"] + a["BN"])
    assert found.loaded_in_loop * 32 * warps == tile
    assert found.loaded * 32 * warps >= stages * tile
    assert (found.spills, found.shared >= (stages - 1) * tile) == (0, True)
    # What compilers do not know makes no difference.
    other = estimate.product(case("conv", shapes.Conv("net", "b", 1, 64, 256, 28, 1, activation="relu")))
    assert other.args["M"] != a["M"]
    assert estimate.code(other) is found


def test_an_op_has_a_row_for_each_direction(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimate, "code", lambda launch: CODE)
    forward, backward = estimate.of_case(case("batch_norm", shapes.Norm("net", "a", 1, 64, 56, "relu", False)),
                                          common.Results(None, estimate.KEY, "cpu"))
    assert list(forward) == list(backward) == list(estimate.FIELDS)
    tensor = 64 * 64 * 56 * 56 * 2
    assert (forward["bytes"], backward["bytes"]) == (3 * tensor, 5 * tensor)
    assert forward["floor_us"] == f"{1e6 * 3 * tensor / 4.3e12:.2f}"
    assert forward["launches"] >= 2
    assert float(forward["estimate_us"]) > float(forward["floor_us"])
    assert forward["measured_us"] == ""


def test_launches_of_a_whole_net(monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
                                 capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(estimate, "code", lambda launch: CODE)
    monkeypatch.setattr(common, "header", lambda _: {})
    monkeypatch.setattr(sys, "argv", ["estimate.py", "--ops", "--nets", "resnet18", "--batches", "2", "--csv",
                                      str(tmp_path / "a.csv")])
    estimate.main()
    assert "\nestimate, nothing was measured\n" in capsys.readouterr().out
    assert common.read_head(tmp_path / "a.csv")["values"] == "estimate, nothing was measured"
    rows = {row["layer"]: row for row in common.read_rows(tmp_path / "a.csv")}
    assert len(rows) == 16
    monkeypatch.setattr(estimate, "recorded", None)
    estimate.main()  # has nothing left to do
    # 20 convolutions, ReLU after the first, which no kernel fuses; the largest of windows, mean, classifier.
    assert int(rows["FFFF"]["launches"]) == 20 + 4
    assert int(rows["TTTT"]["launches"]) == 20 + 4 - 8
    flops = sum(2 * m.weight.numel() * y for m, y in outputs_of_resnet18())
    assert int(rows["FFFF"]["flops"]) == 2 * flops


def outputs_of_resnet18() -> list[tuple[torch.nn.Module, int]]:
    """Layers with weights and how many places each is applied at."""
    import timm

    found = []
    with torch.device("meta"):
        net = timm.create_model("resnet18").eval()
        for module in net.modules():
            if isinstance(module, torch.nn.Conv2d | torch.nn.Linear):
                module.register_forward_hook(lambda module, _, y: found.append((module, y[0, 0].numel())))
        net(torch.empty(1, 3, 224, 224))
    return found


def test_what_spills_is_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = shapes.Conv("net", "a", 1, 256, 256, 28, 3, activation="silu")
    monkeypatch.setattr(estimate, "cases_of", lambda *_: [case("conv", layer)])

    def compiled(launch: estimate.Launch) -> estimate.Code:
        spills = launch.args["BM"] * launch.args["BN"] > 64 * 64
        return estimate.Code(64, int(spills), 50_000, 500, 100, 96, 32, "HGMMA.64x64x16.F32.BF16")

    monkeypatch.setattr(estimate, "code", compiled)
    row, = estimate.tiles([64], ["net"])
    assert row["best"].startswith(("64x64", "64x32", "32x32", "16x32"))
    assert row["128x128x64_us"] == "nan"
    assert row["measured_us"] == ""


def test_trips() -> None:
    for arguments, trips in (
        ({"TAPS": 3, "K": 9, "UNIT": 8, "BK": 64}, 9 * 2), ({"rows_per_part": 100, "BM": 32, "STAGES": 3}, 4),
        ({"rows": 100, "BM": 8, "STAGES": 3}, 5), ({"rows_per_program": 128, "BM": 32}, 4), ({"tiles": 3}, 3),
    ):
        assert estimate.trips(estimate.Launch(None, (3, 1), arguments)) == trips
