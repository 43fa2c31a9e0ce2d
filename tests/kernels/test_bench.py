"""The benchmarks of kernels run without a GPU, but for their timing: so that they run when there is one."""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import subprocess
import sys
import time
import types
from collections import Counter
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "bench"))

import kernels  # noqa: E402
import shapes  # noqa: E402
import timing  # noqa: E402
from cases import Case  # noqa: E402
from kernels_summary import summary  # noqa: E402


def run(*command: str) -> str:
    """From the root of the repository, as `bench/gpu.py` runs it; without an installed package in reach."""
    process = subprocess.run([sys.executable, *command], cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"},
                             capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stdout + process.stderr
    return process.stdout


def parameters(network: str) -> int:
    """Of all its layers."""
    total = 0
    for layer in shapes.layers(network):
        if isinstance(layer, shapes.Conv):
            total += layer.count * (layer.weights + (2 if layer.norm else 1) * layer.channels)
        elif isinstance(layer, shapes.Linear):
            total += layer.count * (layer.inputs + 1) * layer.channels
        elif isinstance(layer, shapes.LayerNorm):
            total += layer.count * 2 * layer.channels
    return total


def test_layers_written_down_are_all() -> None:
    # Besides: scales of two residuals and the table of distances.
    assert parameters("yolov12_l") + 2 * 512 + 16 == 26_506_496
    # Besides: the embedding of classes. Norms of the backbone are buffers.
    frozen = sum(2 * layer.count * layer.channels for layer in shapes.layers("rtdetr_r50")
                 if isinstance(layer, shapes.Conv) and layer.name.startswith("backbone"))
    switched = 12_800
    assert parameters("rtdetr_r50") - frozen + 81 * 256 + switched == 42_885_068


def test_layers_read_off_models_are_all() -> None:
    # All but the classifiers.
    assert parameters("resnet50") == 25_557_032 - 2049 * 1000
    assert parameters("mobilenetv2") == 3_504_872 - 1281 * 1000


@pytest.fixture(scope="module")
def cases() -> list[Case]:
    return kernels.in_order(case for batch in shapes.BATCHES
                            for case in kernels.cases_of(kernels.OPS, shapes.NETWORKS, batch, torch.bfloat16))


def test_cases_have_names_of_their_own(cases: list[Case]) -> None:
    counts = Counter(case.key for case in cases)
    assert not [key for key, count in counts.items() if count > 1]
    assert {case.op for case in cases} == {*kernels.OPS, "linear"}


def test_order_begins_with_every_op_and_network(cases: list[Case]) -> None:
    assert {case.op for case in cases[:2 * len(kernels.OPS)]} >= set(kernels.OPS) - {"linear"}
    assert {case.network for case in cases[:100]} == set(shapes.NETWORKS)
    assert {case.batch for case in cases[:300]} == {1, 64}


class StandIn:
    """For CUDA's streams, events and graphs: what is captured runs at once, a replay takes 2 ms."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def record(self, stream: object) -> None:
        self.time = time.perf_counter()

    def elapsed_time(self, later: StandIn) -> float:
        return 1e3 * (later.time - self.time)

    def replay(self) -> None:
        time.sleep(0.002)

    def synchronize(self) -> None:
        pass


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> timing.Gpu:
    for name in ("Stream", "Event", "CUDAGraph"):
        monkeypatch.setattr(torch.cuda, name, StandIn)
    for name in ("stream", "graph"):
        monkeypatch.setattr(torch.cuda, name, lambda *_, **__: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda: types.SimpleNamespace(L2_cache_size=1000))
    monkeypatch.setattr(timing, "set_up", lambda: None)
    monkeypatch.setattr(timing, "make_inputs", functools.partial(timing.make_inputs, device="cpu"))
    return timing.Gpu()


@pytest.mark.parametrize(("op", "layer"), [
    ("batch_norm", shapes.Norm("net", "a", 1, 16, 4, "relu", True)),
    ("blocks", shapes.Block("net", "b", 1, "bottleneck", 16, 8, 16, 4, 1, "identity", "relu"))])
def test_measuring_on_a_stand_in(gpu: timing.Gpu, op: str, layer: shapes.Layer) -> None:
    for case in importlib.import_module(f"bench_{op}").cases(layer, 1, torch.float32):
        found = list(gpu.measure(case, case.contenders))
        assert {m.status for m in found} == {"measured"}
        assert {m.direction for m in found} == set(case.costs)
        assert {m.clock for m in found} == ({"graph", "wall"} if case.wall else {"graph"})
        assert all(0 < m.us[0] <= m.us[1] <= m.us[2] for m in found)
        row, *_ = kernels.measured_rows(case, case.contenders, gpu.measure, (4e12, 8e14))
        assert list(row) == list(kernels.FIELDS)
        assert float(row["ratio"]) == 1


def test_what_is_wrong_or_fails_is_not_timed(gpu: timing.Gpu) -> None:
    layer = shapes.Norm("net", "a", 1, 16, 4, "relu", False)
    case = next(importlib.import_module("bench_batch_norm_eval").cases(layer, 2, torch.float32))

    def fails(*_: object) -> None:
        raise ValueError("no such shape")

    eager = case.contenders["eager"]
    contenders = {"ours": lambda *args: eager(*args) * 1.01, "eager": eager, "nan": lambda *args: eager(*args) / 0,
                  "compile": fails}
    found = {m.contender: m for m in gpu.measure(case, contenders)}
    assert found["eager"].us is not None
    assert [found[name].us for name in ("ours", "nan", "compile")] == [None] * 3
    assert found["ours"].status.startswith("wrong")
    assert found["nan"].error == float("inf")
    assert found["compile"].status == "failed: ValueError: no such shape"


def test_dry_run(tmp_path: Path) -> None:
    path = tmp_path / "kernels.csv"
    output = run("bench/kernels.py", "--dry-run", "--cases", "1", "--csv", str(path))
    assert " 0 failed" in output
    assert " 0 wrong" in output
    text = path.read_text()
    for key in ("command", "device", "driver", "torch", "triton", "adn", "date"):
        assert f"# {key}: " in text
    rows = kernels.read_rows(path)
    assert set(rows[0]) == set(kernels.FIELDS)
    assert {row["op"] for row in rows} == {*kernels.OPS, "linear", "ceiling"}
    assert not path.with_suffix(".case").exists()


def test_gpu_command_shows_its_steps() -> None:
    output = run("bench/gpu.py", "--dry-run")
    for what in ("-m pytest", "bench/kernels.py --csv", "bench/host_cost.py", "conversion_overhead", "adn profile"):
        assert what in output
    assert "pytest" not in run("bench/gpu.py", "--dry-run", "--only", "kernels")


def test_host_cost() -> None:
    assert "aten.add" in run("bench/host_cost.py", "--calls", "1", "--rounds", "1")


def row(contender: str, p50: float, **fields: object) -> dict[str, str]:
    base = dict.fromkeys(kernels.FIELDS, "") | {
        "op": "batch_norm", "network": "net", "layer": "a", "batch": "64", "shape": "64x256x56x56", "dtype": "bfloat16",
        "direction": "forward", "clock": "graph", "contender": contender, "p50_us": str(p50), "fraction": "0.9",
        "ratio": str(p50 / 100), "bound": "memory", "status": "measured"}
    return base | {name: str(value) for name, value in fields.items()}


def lines(rows: list[dict[str, str]], start: str) -> list[str]:
    return [line for line in summary(rows).splitlines() if line.startswith(start)]


def test_summary_judges_targets() -> None:
    rows = [row("ours", 100), row("eager", 160), row("compile", 90)]
    fraction, eager, compiled = lines(rows, "batch_norm forward")
    assert "met on all 1" in fraction
    assert "met on all 1" in eager
    assert "MISSED on 1 of 1" in compiled
    assert "10% from the target" in compiled
    assert all(line.endswith("NOT MEASURED") for line in lines(rows, "batch_norm backward"))


def test_summary_ignores_small_tensors() -> None:
    rows = [row("ours", 100, shape="1x64x56x56", fraction=0.1)]
    assert lines(rows, "batch_norm forward")[0].endswith("NOT MEASURED")


def test_summary_takes_the_better_opponent_of_memory_bound_layers() -> None:
    rows = [row("ours", 100, op="conv1x1"), row("eager", 200, op="conv1x1"), row("compile", 95, op="conv1x1"),
            row("ours", 100, op="conv1x1", layer="b", bound="compute"),
            row("eager", 50, op="conv1x1", layer="b", bound="compute")]
    line, _ = lines(rows, "conv1x1")
    assert "MISSED on 1 of 1" in line
    assert "0.95" in line


@pytest.mark.parametrize(("half", "state"), [(55, "met on all 1"), (70, "MISSED on 1 of 1")])
def test_summary_compares_half_of_the_samples_with_all(half: float, state: str) -> None:
    rows = [row("ours", 100, op="blocks", direction="all active"),
            row("ours", half, op="blocks", direction="half active")]
    assert state in lines(rows, "refinement block")[0]


def test_summary_names_what_was_not_measured() -> None:
    rows = [row("ours", 100), row("compile", 0, p50_us="", status="not measured: out of time")]
    assert "not timed, not measured: compile: 1 rows" in summary(rows)
