"""The benchmarks of kernels run without a GPU, but for their timing: so that they run when there is one."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import importlib
import importlib.util
import math
import os
import subprocess
import sys
import tarfile
import time
import types
from collections import Counter, deque
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "bench"))

import common  # noqa: E402
import conftest  # noqa: E402
import gpu as gpu_command  # noqa: E402
import kernels  # noqa: E402
import shapes  # noqa: E402
import timing  # noqa: E402
from cases import Case  # noqa: E402
from kernels_summary import summary  # noqa: E402

CONVS = ("conv1x1", "conv3x3", "depthwise")  # what `bench_conv.py` measures besides what the op chooses


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
    assert {case.op for case in cases} == {*kernels.OPS, *CONVS}


def test_order_begins_with_everything_once(cases: list[Case]) -> None:
    def kinds(cases: list[Case]) -> Counter:
        return Counter((case.op, *case.costs, case.batch, case.network) for case in cases)

    once = len(kinds(cases))
    assert once < 200
    assert set(kinds(cases[:once]).values()) == {1}
    assert sum(map(kernels.of_target, cases[once:2 * once])) > once // 2


def test_dispatcher_is_timed_where_it_chooses_no_triton_kernel(cases: list[Case]) -> None:
    layers = {(layer.network, layer.name): layer for layer in shapes.of(shapes.Conv)}
    chosen = [layers[case.network, case.layer] for case in cases if case.op == "conv"]
    assert {layer.kernel for layer in chosen if layer.groups == 1 and layer.activation == "relu"} == {3, 7}
    assert any(layer.groups > 1 for layer in chosen)
    assert not any(layer.kernel == 1 or layer.depthwise for layer in chosen)
    case = next(importlib.import_module("bench_conv").dispatched(
        shapes.Conv("net", "a", 1, 16, 16, 4, 3, activation="relu"), 1, torch.float32))
    errors = timing.check(case, case.contenders, timing.make_inputs(case, "cpu"))
    assert max(errors.values()) <= timing.allowed(case, errors["eager"])


def test_jobs_that_compile_are_apart(cases: list[Case]) -> None:
    jobs = kernels.jobs_of(cases)
    compiled = [job for job in jobs if job.opponent == "compile"]
    assert [job.case for job in jobs if not job.opponent] == cases
    assert {job.case.op for job in compiled} == {case.op for case in cases if "eager" in case.contenders}
    assert kernels.of_target(compiled[0].case)
    assert [job.case.batch for job in jobs if job.opponent == "max-autotune"] == [1] * 24 + [8] * 24 + [64] * 24
    assert len({key for job in jobs for key in job.keys}) == sum(len(job.keys) for job in jobs)


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


@pytest.mark.parametrize("error", [RuntimeError("not while capturing"), torch.OutOfMemoryError("no memory")])
@pytest.mark.parametrize("spoiled", [False, True])
@pytest.mark.parametrize("wall", [False, True])
def test_what_cannot_be_captured_does_not_stop_others(
        gpu: timing.Gpu, monkeypatch: pytest.MonkeyPatch, error: Exception, spoiled: bool, wall: bool) -> None:
    layer = shapes.Norm("net", "a", 1, 16, 4, "relu", False)
    case = next(importlib.import_module("bench_batch_norm_eval").cases(layer, 2, torch.float32))
    capturing = []

    @contextlib.contextmanager
    def graph(*_: object, **__: object):
        capturing.append(True)
        try:
            yield
        finally:
            capturing.pop()

    def fails(*args: torch.Tensor) -> torch.Tensor:
        if capturing:
            raise error
        return case.contenders["eager"](*args)

    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(gpu, "_works", lambda: not spoiled)
    case = dataclasses.replace(case, wall=wall)
    found = list(gpu.measure(case, {"ours": fails, "eager": case.contenders["eager"]}))
    ours, eager, *walls = found
    assert ours.status == f"failed: {type(error).__name__}: {error}"
    assert ours.us is None
    assert eager.us is not None
    assert [m.contender for m in walls] == ["eager"] * wall
    assert gpu.spoiled == spoiled


# What stands in a file and goes on


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch) -> list[kernels.Job]:
    """Six, of three blocks; nothing of them needs a GPU but measuring them."""
    head = dict.fromkeys((*kernels.SAME[:-1], "date"), "of the test")
    monkeypatch.setattr(kernels, "header", lambda _: dict(head))
    layers = [shapes.Block("net", name, 1, "bottleneck", 16, 8, 16, 4, 1, "conv", "relu") for name in "abc"]
    blocks = importlib.import_module("bench_blocks")
    cases = [case for layer in layers for case in blocks.cases(layer, 8, torch.float32)]
    return [job for job in kernels.jobs_of(cases) if job.opponent != "max-autotune"]


@pytest.fixture
def args(tmp_path: Path) -> argparse.Namespace:
    return argparse.Namespace(csv=tmp_path / "kernels.csv", seconds=100.0, fresh=False, autotune_seconds=0.0,
                              device="cpu")


def supervised(args: argparse.Namespace, jobs: list[kernels.Job], monkeypatch: pytest.MonkeyPatch,
               child: Callable[[], int | None]) -> list[dict[str, str]]:
    """Rows of the file, where each process that measures does and ends as `child` says."""
    monkeypatch.setattr(kernels.subprocess, "Popen", lambda *_, **__: types.SimpleNamespace(kill=lambda: None))
    monkeypatch.setattr(kernels, "wait", lambda *_: child())
    kernels.supervise(args, jobs)
    return kernels.read_rows(args.csv)


def test_crashes_cost_their_case_and_all_others_are_named(
        args: argparse.Namespace, jobs: list[kernels.Job], monkeypatch: pytest.MonkeyPatch) -> None:
    ends = iter([(jobs[0], -11), (jobs[4], None)])

    def child() -> int | None:
        job, code = next(ends)
        args.csv.with_suffix(".case").write_text(job.name)
        return code

    monkeypatch.setattr(kernels, "CRASHES", 2)
    rows = supervised(args, jobs, monkeypatch, child)
    assert {(row["layer"], row["contender"]): row["status"] for row in rows} == {
        ("a", "all"): "failed: the process ended with code -11", ("b", "compile"): "failed: the process hung"} | {
        (job.case.layer, job.opponent or "all"): "not measured: too many crashes"
        for job in jobs if job not in (jobs[0], jobs[4])}
    assert not args.csv.with_suffix(".case").exists()


def test_a_child_that_cannot_start_is_not_started_again(
        args: argparse.Namespace, jobs: list[kernels.Job], monkeypatch: pytest.MonkeyPatch) -> None:
    codes = iter([1])
    rows = supervised(args, jobs, monkeypatch, lambda: next(codes))
    assert {row["status"] for row in rows} == {"not measured: the process that measures ended with code 1"}
    assert len(rows) == len(jobs)


class Bench:
    """Measures one microsecond each, and remembers of what; captures of layer `spoils` fail."""

    def __init__(self, spoils: str = "") -> None:
        self.spoils, self.spoiled, self.seen = spoils, False, []

    def ceilings(self) -> tuple[float, float]:
        return 4e12, 8e14

    def measure(self, case: Case, contenders: dict[str, Callable]) -> Iterator[timing.Measurement]:
        self.seen.append((case.layer, *contenders))
        self.spoiled = case.layer == self.spoils
        yield from (timing.Measurement("forward", name, us=(1.0, 1.0, 1.0)) for name in contenders)


def test_a_second_run_goes_on_with_what_is_missing(
        args: argparse.Namespace, jobs: list[kernels.Job], monkeypatch: pytest.MonkeyPatch) -> None:
    def measured_by(bench: Bench, deadline: float, jobs: list[kernels.Job] = jobs) -> list[dict[str, str]]:
        def child() -> int:
            kernels.run(args, jobs, bench, deadline)
            return 0

        return supervised(args, jobs, monkeypatch, child)

    measured_by(Bench(), math.inf, jobs[:2])
    rows = measured_by(Bench(), 0.0)
    assert [row["status"] for row in rows if row["layer"] == "c"] == ["not measured: out of time"] * 2
    second = Bench()
    rows = measured_by(second, math.inf)
    assert sorted(second.seen) == sorted([
        ("c", "ours", "eager"), *((layer, "ours", "eager", "compile") for layer in "abc")])
    assert {row["status"] for row in rows} == {"measured"}
    assert Counter(row["contender"] for row in rows if row["op"] == "blocks") == {"ours": 3, "eager": 3, "compile": 3}
    assert "begun" in common.read_head(args.csv)
    monkeypatch.setattr(kernels, "code_hash", lambda: "another")
    anew = Bench()
    assert len(measured_by(anew, math.inf)) < len(rows)
    assert len(anew.seen) == len(jobs)
    assert common.read_rows(args.csv.with_suffix(".old.csv")) == rows


def test_a_spoiled_process_is_started_again_and_nothing_is_measured_twice(
        args: argparse.Namespace, jobs: list[kernels.Job], monkeypatch: pytest.MonkeyPatch) -> None:
    benches = [Bench("b"), Bench("b"), Bench()]

    def child(left: list[Bench] = [*benches]) -> int:  # noqa: B006
        with pytest.raises(SystemExit) if left[0].spoils else contextlib.nullcontext():
            kernels.run(args, jobs, left[0], math.inf)
        return kernels.RESTART if left.pop(0).spoils else 0

    supervised(args, jobs, monkeypatch, child)
    seen = [each for bench in benches for each in bench.seen]
    assert len(seen) == len(set(seen)) == len(jobs)
    assert all(len(bench.seen) for bench in benches)


def test_an_error_of_a_case_is_written_down(args: argparse.Namespace, jobs: list[kernels.Job]) -> None:
    class Fails(Bench):
        def measure(self, case: Case, contenders: dict[str, Callable]) -> Iterator[timing.Measurement]:
            raise torch.OutOfMemoryError("no memory")

    kernels.begin(args, jobs, kernels.header("cuda") | {"code": ""})
    kernels.run(args, jobs, Fails(), math.inf)
    rows = [row for row in kernels.read_rows(args.csv) if row["op"] != "ceiling"]
    assert {row["status"] for row in rows} == {"failed: OutOfMemoryError: no memory"}
    assert len(rows) == len(jobs)


def test_an_op_that_crashes_every_time_leaves_time_for_others(
        args: argparse.Namespace, jobs: list[kernels.Job]) -> None:
    bench = Bench()
    kernels.begin(args, jobs, kernels.header("cuda") | {"code": ""})
    common.append_rows(args.csv, kernels.unmeasured(jobs[0], kernels.CRASHED + "hung"))
    kernels.run(args, jobs[:2], bench, math.inf)
    assert bench.seen == [("b", "ours", "eager")]
    common.append_rows(args.csv, kernels.unmeasured(jobs[2], kernels.CRASHED + "hung"))
    kernels.run(args, jobs, bench, math.inf)
    assert len(bench.seen) == 1


def test_queues_share_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[int] = []
    monkeypatch.setattr(kernels, "time", types.SimpleNamespace(monotonic=lambda: sum(done)))
    queues = [deque([1] * 12), deque([4] * 3)]
    kernels.take_turns(queues, 17, done.append)
    assert done == [1, 4, 1, 1, 1, 1, 4, 1, 1, 1, 1]
    assert list(map(len, queues)) == [3, 1]
    kernels.take_turns(queues, 100, done.append)
    assert not any(queues)


def test_waiting_for_a_child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a"
    file.touch()

    def code(text: str, deadline: float = math.inf) -> int | None:
        return kernels.wait(subprocess.Popen([sys.executable, "-c", text]), file, deadline)

    assert code("raise SystemExit(3)") == 3
    monkeypatch.setattr(kernels, "SILENT_S", 0.5)
    assert code("import time; time.sleep(60)") is None
    assert code("import time; time.sleep(60)", time.monotonic()) is None


def test_dry_run(tmp_path: Path) -> None:
    path = tmp_path / "kernels.csv"
    few = ("--cases", "1", "--networks", "rtdetr_r50")
    assert " 0 failed" in run("bench/kernels.py", "--dry-run", *few, "mobilenetv2", "--csv", str(path))
    assert " 0 wrong" in run("bench/kernels.py", "--small", *few)
    text = path.read_text()
    for key in ("command", "device", "driver", "torch", "triton", "adn", "date"):
        assert f"# {key}: " in text
    rows = kernels.read_rows(path)
    assert set(rows[0]) == set(kernels.FIELDS)
    assert {row["op"] for row in rows} == {*kernels.OPS, *CONVS, "ceiling"}
    assert not path.with_suffix(".case").exists()


def test_files_are_written_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    common.write_rows(path, [{"a": 1, "b": 2}], {"device": "none: at all"})
    common.append_rows(path, [{"a": 3, "b": 4}])
    with path.open("a") as file:
        file.write("5")
    assert common.read_rows(path) == [{"a": "1", "b": "2"}, {"a": "3", "b": "4"}]
    assert common.read_head(path) == {"device": "none: at all"}
    assert [each.name for each in tmp_path.iterdir()] == ["a.csv"]


def test_head_of_a_checkout_behind_a_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    link = tmp_path / "link"
    link.symlink_to(ROOT)
    spec = importlib.util.spec_from_file_location("linked_common", link / "bench" / "common.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setattr(sys, "path", [*sys.path])
    spec.loader.exec_module(module)
    monkeypatch.setattr(sys, "argv", [str(link / "bench" / "kernels.py"), "--csv", str(tmp_path / "a.csv")])
    assert module.header()["command"] == "python bench/kernels.py --csv a.csv"


def options(step: gpu_command.Step) -> set[str]:
    return {each for each in [*step.command, *(step.beside or [])] if each.startswith("--")}


def test_steps_of_the_gpu_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(gpu_command.shutil, "which", lambda name: f"/bin/{name}")
    real, dry = (list(gpu_command.steps(tmp_path, tmp_path / "passed", each)) for each in (False, True))
    assert [step.name for step in real] == [step.name for step in dry]
    assert sum(step.share for step in real) <= 540
    # What a GPU is told has been understood before, but for sizes and for sanitizers' own.
    for step, tried in zip(real, dry):
        assert options(step) - {"--tool", "--error-exitcode"} <= options(tried), step.name
        assert options(tried) - options(step) <= {"--dry-run", "--cases", "--networks", "--sample"}, step.name
        assert [each for each in step.command if each.startswith("bench/")] == [
            each for each in tried.command if each.startswith("bench/")]
    kernels = next(step for step in real if step.name == "kernels")
    assert {"--targets", "--csv"} <= options(kernels)
    assert next(step for step in real if step.name == "memcheck").environment == {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}


def test_time_of_a_step() -> None:
    def step(share: float, measures: bool = False) -> gpu_command.Step:
        return gpu_command.Step("a", share, ["a"], measures=measures)

    assert gpu_command.in_time(step(60), 540, 480) == (["a"], 60)
    assert gpu_command.in_time(step(60), 500, 400) == (["a"], 100)  # what others have left over
    assert gpu_command.in_time(step(60), 40, 400) == (["a"], 40)
    assert gpu_command.in_time(step(0), 90, 0) == (["a"], 90)
    assert gpu_command.in_time(step(60, True), 540, 480) == (["a", "--seconds", "35"], 60)
    assert gpu_command.in_time(step(10, True), 540, 540) == (["a", "--seconds", "5"], 10)


def test_a_step_out_of_time_can_say_what_it_has_done(tmp_path: Path) -> None:
    log = tmp_path / "log"

    def how(text: str, limit: float = 60.0, beside: str | None = None) -> str:
        step = gpu_command.Step("a", limit, [sys.executable, "-c", text], {"WHAT": "said"},
                                beside=beside and [sys.executable, "-c", beside])
        return gpu_command.run(step, limit, 0, log)

    assert how("import os; print(os.environ['WHAT'])", beside="import time; time.sleep(60)") == "passed"
    assert how("raise SystemExit(1)") == "failed"
    assert how(f"raise SystemExit({common.UNFINISHED})") == "out of time"
    waits = "try:\n  import time; time.sleep(60)\nexcept KeyboardInterrupt:\n  print('in the end')"
    assert how(waits, 3.0) == "out of time"
    assert how("print('never')", 0.0) == "out of time"
    assert log.read_text() == "said\nin the end\n"


def test_gpu_command_leaves_what_it_found_and_goes_on(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    out, called = tmp_path / "out", tmp_path / "called"
    common.write_rows(tmp_path / "rows", [row("ours", 100)], {})
    commands = {
        "tests": "print('PASSED tests/a.py::c[1 - 2]\\nFAILED tests/a.py::b - no'); raise SystemExit(1)",
        "kernels": f"import shutil; shutil.copy({str(tmp_path / 'rows')!r}, {str(out / 'kernels.csv')!r}); "
                   "print('a row')",
        "others": f"import pathlib, sys; file = pathlib.Path({str(called)!r}); "
                  "file.write_text(file.read_text() + 'x' if file.exists() else 'x')"}
    monkeypatch.setattr(gpu_command, "steps", lambda *_: [gpu_command.Step(
        name, 20, [sys.executable, "-c", text, *(["pytest"] if name == "tests" else [])])
        for name, text in commands.items()])

    def call(*more: str) -> list[tuple[str, str, str]]:
        monkeypatch.setattr(sys, "argv", ["bench/gpu.py", "--dry-run", "--out", str(out), *more])
        assert gpu_command.main() == 1
        return [(row["step"], row["result"], row["said"]) for row in common.read_rows(out / "gpu.csv")]

    expected = [("tests", "failed", "tests/a.py::b"), ("kernels", "passed", "a row"), ("others", "passed", "")]
    with mock.patch.dict(os.environ):
        assert call() == expected
        assert "batch_norm forward" in capsys.readouterr().out
        assert "FAILED tests/a.py::b - no" in (out / "gpu.log").read_text()
        with tarfile.open(out / "results.tar.gz") as archive:
            assert archive.getnames() == ["gpu.csv", "gpu.log", "kernels.csv"]
        assert call() == expected
        assert called.read_text() == "x"
        assert (out / "gpu.log").read_text().count("FAILED") == 2
        assert call("--again") == expected
        assert called.read_text() == "xx"
        assert (out / "gpu.log").read_text().count("FAILED") == 1


@pytest.mark.full
def test_gpu_command_without_a_gpu(tmp_path: Path) -> None:
    """Every step of it, and a second call, that has nothing left to do."""
    run("bench/gpu.py", "--dry-run", "--out", str(tmp_path))
    rows = common.read_rows(tmp_path / "gpu.csv")
    assert {row["result"] for row in rows} == {"passed"}
    found = {path.name for path in tmp_path.iterdir()}
    assert len(found) <= 8
    with tarfile.open(tmp_path / "results.tar.gz") as archive:
        assert {*archive.getnames(), "results.tar.gz"} == found
    assert "===" not in run("bench/gpu.py", "--dry-run", "--out", str(tmp_path))
    assert common.read_rows(tmp_path / "gpu.csv") == rows


def test_names_of_tests() -> None:
    output = """\
[gw3] [ 12%] PASSED tests/kernels/test_conv.py::test_a[1]
[gw3] [ 12%] FAILED tests/kernels/test_conv.py::test_b[(1, 2)-torch.bfloat16] \n\
tests/test_cuda.py::test_c ERROR                             [ 50%]
tests/test_cuda.py::test_e[a b] PASSED
FAILED tests/kernels/test_conv.py::test_b[(1, 2)-torch.bfloat16] - AssertionError: 3
FAILED tests/kernels/test_conv.py::test_d - ValueError
"""
    assert gpu_command.tests_that("FAILED|ERROR", output) == [
        f"tests/{name}" for name in ("kernels/test_conv.py::test_b[(1, 2)-torch.bfloat16]", "test_cuda.py::test_c",
                                     "kernels/test_conv.py::test_d")]
    assert gpu_command.tests_that("PASSED", output) == ["tests/kernels/test_conv.py::test_a[1]",
                                                        "tests/test_cuda.py::test_e[a b]"]


def test_gpu_command_wants_a_folder(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "file").write_text("kept")
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--dry-run", "--out", str(tmp_path / "file")])
    with pytest.raises(SystemExit):
        gpu_command.main()
    assert "is a file; pass a folder" in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "kept"


def test_tests_that_passed_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "passed").write_text("tests/a.py::test[1]\ntests/other.py::test")
    config = types.SimpleNamespace(getoption={"--but": tmp_path / "passed", "--sample": None}.__getitem__)
    items = [mock.Mock(nodeid=f"tests/a.py::test[{i}]", get_closest_marker=lambda name: None) for i in range(3)]
    chosen = [*items]
    for _ in conftest.pytest_collection_modifyitems(config, chosen):
        pass
    assert chosen == [items[0], items[2]]


def test_settings_of_tf32_can_be_read_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    """As Inductor does."""
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)  # to be put back
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True  # the fixture of all tests undoes it
    with torch._functorch.config.patch(donated_buffer=False):  # which monkeypatch would delete
        timing.set_up()
    assert not torch.backends.cudnn.allow_tf32
    assert not torch.backends.cuda.matmul.allow_tf32
    assert all(backend.fp32_precision != "tf32" for backend in (
        torch.backends.cudnn.conv, torch.backends.cudnn.rnn, torch.backends.cuda.matmul))


def test_results_say_what_is_missing(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(common, "header", lambda _: {})
    path = tmp_path / "a.csv"
    results = common.Results(path, ("a", "b"), "cpu", seconds=60)
    assert results.code == 1  # nothing
    results.add({"a": 1, "b": "x", "ms": 2})
    assert common.read_rows(path) == [{"a": "1", "b": "x", "ms": "2"}]
    assert results.code == 0
    again = common.Results(path, ("a", "b"), "cpu", seconds=-1)
    assert not again.lacks((1, "x"))
    assert again.code == 0
    assert not again.lacks((1, "x"), (2, "x"))
    assert again.code == common.UNFINISHED
    with again.attempt("net", 3):
        raise ValueError("no such depth")
    assert again.code == 1
    assert "net, 3: failed: ValueError: no such depth" in capsys.readouterr().err


@pytest.mark.full
def test_probe() -> None:
    assert "NaN in 0 of 24 convolutions" in run("bench/probe.py")


def test_detectors(tmp_path: Path) -> None:
    path = tmp_path / "detectors.csv"
    common.write_rows(path, [
        {"model": "anydepth_yolov12n", "dtype": "float32", "batch": 1, "depth": "T" * 8, "contender": name,
         "p50_ms": 1.0, "p99_ms": 1.0, "error": 0.0} for name in ("engine", "static, eager")], {})
    output = run("bench/detectors.py", "--models", "anydepth_yolov12n", "--size", "96", "--batch-sizes", "1",
                 "--rounds", "1", "--contenders", "static, eager", "engine", "engine, processed", "--depths", "super",
                 "base", "--csv", str(path))
    assert output.splitlines()[-1].count("x") == 3
    rows = common.read_rows(path)
    depths = ("T" * 8, "F" * 8)
    assert {(row["depth"], row["contender"]) for row in rows} == {
        (depth, name) for depth in depths for name in ("engine", "static, eager", "engine, processed")}
    assert all(float(row["p50_ms"]) > 0 and float(row["error"]) < 1e-4 for row in rows)


@pytest.mark.full
def test_host_cost(tmp_path: Path) -> None:
    path = tmp_path / "host_cost.csv"
    assert "aten.add" in run("bench/host_cost.py", "--calls", "1", "--rounds", "1", "--csv", str(path))
    assert {row["op"] for row in common.read_rows(path)} == {*kernels.OPS, *CONVS, "aten.add"}


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


def test_summary_names_every_target_without_a_single_row() -> None:
    heads = [line.partition(":")[0] for line in summary([]).splitlines() if "NOT MEASURED" in line]
    for what in ("batch_norm forward", "batch_norm backward", "batch_norm_eval forward", "layer_norm forward",
                 "layer_norm backward", "conv1x1", "linear", "depthwise", "block on the device",
                 "block called from Python", "layer_norm bypassed", "conv1x1 bypassed",
                 "linear bypassed", "conv3x3 bypassed", "depthwise bypassed", "refinement block"):
        assert what in heads
    assert summary([]).count("(python bench/kernels.py --ops ") == 6


def test_summary_ignores_small_tensors() -> None:
    rows = [row("ours", 100, shape="1x64x56x56", fraction=0.1)]
    assert lines(rows, "batch_norm forward")[0].endswith("NOT MEASURED")


def test_summary_takes_the_better_opponent_of_memory_bound_layers() -> None:
    rows = [row("ours", 100, op="conv1x1"), row("eager", 200, op="conv1x1"), row("compile", 95, op="conv1x1"),
            row("ours", 100, op="conv1x1", layer="b", bound="compute"),
            row("eager", 50, op="conv1x1", layer="b", bound="compute")]
    line = lines(rows, "conv1x1: times the better")[0]
    assert "MISSED on 1 of 1" in line
    assert "0.95" in line
    assert "5% from the target" in line


def test_summary_claims_nothing_of_layers_without_all_opponents() -> None:
    rows = [row("ours", 100, op="conv1x1"), row("eager", 200, op="conv1x1")]
    what = "conv1x1: times the better"
    assert lines(rows, what)[0].endswith("NOT MEASURED (on any of 1 layers)")
    rows += [row(who, us, op="conv1x1", layer="b") for who, us in (("ours", 100), ("eager", 200), ("compile", 150))]
    assert "met on all 1 layers (of 2; others lack an opponent)" in lines(rows, what)[0]


@pytest.mark.parametrize(("us", "state"), [(1.4, "met on all 1"), (1.8, "MISSED on 1 of 1"), (1.8, "20% from")])
def test_summary_judges_bypassed_ops(us: float, state: str) -> None:
    assert state in lines([row("ours", us, op="layer_norm", direction="none active", shape="64x49x768")],
                          "layer_norm bypassed")[0]


@pytest.mark.parametrize(("half", "state"), [(55, "met on all 1"), (70, "MISSED on 1 of 1")])
def test_summary_compares_half_of_the_samples_with_all(half: float, state: str) -> None:
    rows = [row("ours", 100, op="blocks", direction="all active"),
            row("ours", half, op="blocks", direction="half active")]
    assert state in lines(rows, "refinement block: time saved")[0]


def test_summary_names_what_was_not_measured() -> None:
    rows = [row("ours", 100), row("compile", 0, p50_us="", status="not measured: out of time")]
    assert "not timed, not measured: compile: 1 rows" in summary(rows)
