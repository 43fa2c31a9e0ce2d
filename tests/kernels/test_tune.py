"""`bench/tune.py`, which writes the tables of measured configurations, with a clock that is made up."""

from __future__ import annotations

import importlib
import json
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from aot import fake_cuda, record

from adn_kernels import launch
from adn_kernels.conv import conv, conv_
from adn_kernels.launch import tuned

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "bench"))

import shapes  # noqa: E402
import tune  # noqa: E402
from tune import Case, Override, Table  # noqa: E402

CPU = torch.device("cpu")
HEADER = {"device": "made up", "torch": "2", "triton": "3", "driver": "1", "date": "today", "command": "tune"}


class Toy:
    """A launcher with two kernels, whose output depends on the configuration only where that is wrong."""

    def __init__(self) -> None:
        self.used: dict[str, dict[str, int]] = {}
        self.timed = 0

    def case(self, op: str = "toy", size: int = 5) -> Case:
        def call() -> torch.Tensor:
            self.used = {
                "first": tuned("first", CPU, {"BLOCK": 64, "num_warps": 4}, size=size),
                "second": tuned("second", CPU, {"BLOCK": 8}, dtype="bf16"),
            }
            block = self.used["first"]["BLOCK"]
            if block > 1024:
                raise RuntimeError("out of resources")
            return torch.full((3,), 1.0 if block >= 32 else 2.0)

        return Case(op, f"size {size}", lambda: call)

    def time(self, call: Callable[[], Any]) -> float:
        """Fastest at a block of 512, eight warps; a block of 16 would be fastest of all but computes something else."""
        self.timed += 1
        call()
        first, second = self.used["first"], self.used["second"]
        away = abs(math.log2(first["BLOCK"] / 512)) + abs(math.log2(first["num_warps"] / 8))
        return 100.0 if first["BLOCK"] < 32 else 100 * (1 + away) + abs(math.log2(second["BLOCK"] / 16))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setattr(launch, "TABLES", tmp_path / "tables")
    launch._table.cache_clear()
    yield tmp_path / "tables"
    launch._table.cache_clear()


def table(folder: Path, header: dict[str, str] = HEADER, fresh: bool = False) -> Table:
    return Table(folder / f"{launch._architecture(None)}.json", header, fresh)


def test_writes_what_tuned_reads(folder: Path) -> None:
    toy = Toy()
    assert tuned("first", CPU, {"BLOCK": 64}, size=5) == {"BLOCK": 64}
    tune.tune([toy.case()], table(folder), toy.time)
    assert tuned("first", CPU, {"BLOCK": 64}, size=5) == {"BLOCK": 512, "num_warps": 8}
    assert tuned("first", CPU, {"BLOCK": 64}, size=6) == {"BLOCK": 64}
    assert launch.override is None
    written = json.loads(next(folder.iterdir()).read_text())
    assert written["header"] == HEADER
    assert [set(row) for row in written["rows"]] == [{"kernel", "key", "config", "time_us", "default_us"}] * 2
    first, _ = written["rows"]
    assert (first["kernel"], first["key"]) == ("first", {"size": 5})
    assert (first["time_us"], first["default_us"]) == (101.0, 501.0)


def test_resumes(folder: Path) -> None:
    toy, second = Toy(), Toy()
    tune.tune([toy.case()], table(folder), toy.time)
    before = json.loads(next(folder.iterdir()).read_text())
    tune.tune([toy.case(), second.case(size=7)], table(folder), second.time)
    after = json.loads(next(folder.iterdir()).read_text())
    assert after["rows"][:2] == before["rows"]
    assert [row["key"] for row in after["rows"][2:]] == [{"size": 7}]
    # What was found before is used while the rest is measured.
    assert toy.used["second"] == tuned("second", CPU, {}, dtype="bf16")
    again = Toy()
    tune.tune([again.case(), again.case(size=7)], table(folder), again.time)
    assert again.timed == 0


def test_an_interruption_loses_nothing(folder: Path) -> None:
    toy = Toy()

    def stopped(call: Callable[[], Any]) -> float:
        taken = toy.time(call)
        if toy.used["second"]["BLOCK"] != 8:  # when it comes to the second kernel
            raise KeyboardInterrupt
        return taken

    with pytest.raises(KeyboardInterrupt):
        tune.tune([toy.case()], table(folder), stopped)
    assert launch.override is None
    (file,) = folder.iterdir()
    assert [row["kernel"] for row in json.loads(file.read_text())["rows"]] == ["first"]


@pytest.mark.parametrize("name", tune.SAME_VERSIONS)
def test_other_versions_start_afresh(folder: Path, capsys: pytest.CaptureFixture, name: str) -> None:
    toy = Toy()
    tune.tune([toy.case()], table(folder), toy.time)
    assert table(folder, HEADER | {"date": "tomorrow"}).rows
    assert not table(folder, HEADER | {name: "another"}).rows
    assert f"2 rows dropped, measured with another {name}" in capsys.readouterr().out
    assert not table(folder, fresh=True).rows


def test_quick_takes_one_step(folder: Path) -> None:
    toy = Toy()
    tune.tune([toy.case()], table(folder), toy.time, quick=True)
    assert tuned("first", CPU, {}, size=5) in ({"BLOCK": 128, "num_warps": 4}, {"BLOCK": 64, "num_warps": 8})


def test_listed_candidates(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listed = [{"BLOCK": block, "num_warps": 2} for block in (16, 256, 4096)]
    monkeypatch.setitem(tune.CANDIDATES, "first", listed)
    toy = Toy()
    tune.tune([toy.case()], table(folder), toy.time)
    assert tuned("first", CPU, {}, size=5) == listed[1]


def test_a_question_of_several_layers(folder: Path) -> None:
    """One answer, by the geometric mean of the times."""
    asked = []

    def case(scale: float) -> Case:
        def call() -> torch.Tensor:
            asked.append((scale, tuned("shared", CPU, {"BLOCK": 4}, channels=8)["BLOCK"]))
            return torch.ones(1)

        return Case("toy", "layer", lambda: call)

    def time(call: Callable[[], Any]) -> float:
        call()
        scale, block = asked[-1]
        return scale * (2 if block == 4 else 1)

    tune.tune([case(10.0), case(1000.0)], table(folder), time, quick=True)
    (row,) = json.loads(next(folder.iterdir()).read_text())["rows"]
    assert (row["time_us"], row["default_us"]) == (100.0, 200.0)


def test_what_fails_is_skipped(folder: Path, capsys: pytest.CaptureFixture) -> None:
    """Out of memory for the tensors of a layer, a default that does not compile: the rest is measured all the same."""
    toy, resumed = Toy(), Toy()

    def no_memory() -> None:
        raise torch.OutOfMemoryError("tried to allocate")

    def broken() -> None:
        tuned("broken", CPU, {"BLOCK": 4}, size=1)
        if launch.override.trial:
            raise RuntimeError("no kernel image")

    given = [Case("toy", "large", no_memory), Case("toy", "broken", lambda: broken), toy.case()]
    tune.tune(given, table(folder), toy.time)
    assert tuned("first", CPU, {}, size=5)["BLOCK"] == 512
    assert tuned("broken", CPU, {}, size=1) == {}
    said = capsys.readouterr().out
    assert "skipped toy of large: OutOfMemoryError: tried to allocate" in said
    assert "skipped broken of {'size': 1}: RuntimeError: no kernel image" in said
    tune.tune([*given[:2], resumed.case(size=7)], table(folder), resumed.time)
    assert tuned("first", CPU, {}, size=7)["BLOCK"] == 512


def test_a_lost_device_is_an_error(folder: Path) -> None:
    def call() -> None:
        tuned("broken", CPU, {"BLOCK": 4}, size=1)
        if launch.override.trial:
            raise torch.AcceleratorError("an illegal memory access was encountered", 700)

    with pytest.raises(torch.AcceleratorError):
        tune.tune([Case("toy", "layer", lambda: call)], table(folder), lambda call: 1.0)
    assert not folder.exists()


@pytest.mark.parametrize(("cudnn", "default", "tried"), [
    (1, "triton", {"cudnn", "triton", "unfused"}), (0, "triton", {"triton", "unfused"}), (0, "unfused", {"unfused"}),
])
def test_backend_of_the_dispatcher(folder: Path, cudnn: int, default: str, tried: set[str]) -> None:
    """One that refuses the layer, for which the op would take its default, is never tried."""
    times, asked = {"triton": 3.0, "cudnn": 1.0, "unfused": 2.0}, []

    def call() -> torch.Tensor:
        asked.append(tuned("conv", CPU, {"backend": default}, n=1, cudnn=cudnn)["backend"])
        tuned("gemm", CPU, {"BM": 64}, pixels=1)
        return torch.ones(1)

    def time(call: Callable[[], Any]) -> float:
        call()
        return times[asked[-1]]

    tune.tune([Case("conv", "layer", lambda: call)], table(folder), time)
    (row,) = json.loads(next(folder.iterdir()).read_text())["rows"]
    assert (row["kernel"], row["config"]) == ("conv", {"backend": "cudnn" if cudnn else "unfused"})
    assert set(asked) == tried


def test_refuses_without_a_gpu(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stopped:
        tune.main(["--quick", "--out", str(folder / "table.json")])
    assert stopped.value.code == 2
    assert "there is no GPU here" in capsys.readouterr().err
    assert not folder.exists()


def test_refuses_unknown_kernels(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        tune.main(["--ops", "attention"])
    assert "invalid choice: 'attention'" in capsys.readouterr().err


KERNELS = {
    "batch_norm": {"batch_norm_moments", "batch_norm_apply", "batch_norm_backward_reduce", "batch_norm_backward_apply"},
    "batch_norm_eval": {"batch_norm_eval", "batch_norm_eval_backward"},
    "layer_norm": {"layer_norm", "layer_norm_backward"},
    "linear": {"gemm"},
    "deformable_attention": {"deformable_attention", "deformable_attention_backward", "deformable_attention_collect"},
    "conv": {"gemm", "depthwise", "conv"},
}


@pytest.mark.parametrize("op", tune.TUNED)
def test_cases_ask(op: str) -> None:
    """The calls fit the launchers, which ask about these kernels and about nothing that a table cannot hold."""
    found, given = {}, list(tune.cases([op], (8,)))
    with torch.no_grad(), Override() as override, fake_cuda():
        record(lambda: found.update(tune.questions(override, given)))
    assert {question.kernel for question in found.values()} == KERNELS[op]
    for identity, question in found.items():
        assert json.loads(json.dumps(question.key)) == question.key
        assert identity == tune.identity(question.kernel, json.loads(json.dumps(question.key)))
        assert all(isinstance(value, int | str) for value in question.key.values())
        # Candidates set what the default sets: a launcher expects no more and no less.
        for config in tune.CANDIDATES.get(question.kernel, ()):
            assert config.keys() == question.default.keys()


def test_dispatcher_is_asked_with_and_without_cudnn() -> None:
    """What the deploy form asks: folded and with norms, in place or not; none of these keys is one the tuner never
    writes."""
    found, given = {}, list(tune.cases(["conv"], (8,), ["resnet50"]))
    with torch.no_grad(), Override() as override, fake_cuda():
        record(lambda: found.update(tune.questions(override, given)))
        first = next(c for c in shapes.layers("resnet50") if isinstance(c, shapes.Conv) and c.kernel == 3)
        case = next(importlib.import_module("bench_conv").dispatched(first, 8, torch.bfloat16))
        x, _, weight, bias, scale, shift, *_ = tune.make_inputs(case, "cuda")
        shape = {"stride": first.stride, "padding": 1, "activation": first.activation}
        override.asked.clear()
        bank = torch.empty(8, dtype=torch.int32, device="cuda")
        record(lambda: [
            conv(x, weight, None, bias, **shape), conv(x, weight, scale, shift, **shape),
            conv(x, weight, (scale, scale), (shift, shift), bank=bank, **shape),
            conv_(torch.empty_like(x), x, weight, bias, **shape)])
    of_dispatcher = {key for key, (kernel, *_) in override.asked.items() if kernel == "conv"}
    assert len(of_dispatcher) == 2
    assert of_dispatcher <= set(found)
