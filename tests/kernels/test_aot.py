"""Every kernel compiled ahead of time for four architectures, without any of them: spills, vector widths, tensor cores.

Each `test_<op>.py` lists its launches in `AOT` and what they must show in `AOT_EXPECT`. By default each kernel is
compiled with one activation, for the first launch it is in in bfloat16 for every architecture and in float32 for
sm_90; its other launches in bfloat16 for sm_90. `pytest -m full` compiles the full product. `--results DIR`
writes a table: of each kernel, dtype and architecture the activation that takes most registers.
"""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from aot import BANDWIDTH, RATE, TARGETS, Launch, compile_launch, fake_cuda, record
from conftest import few
from harness import INTERPRETED, PTX

from adn_kernels.activation import ACTIVATIONS

if INTERPRETED or PTX:
    pytest.skip("these processes compile nothing to the end", allow_module_level=True)

MODULES = {path.stem: importlib.import_module(path.stem) for path in sorted(Path(__file__).parent.glob("test_*.py"))
           if "\nAOT" in path.read_text()}
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
Job = tuple[torch.dtype, str, str]  # dtype, activation, target
FULL = list(itertools.product(DTYPES, ACTIVATIONS, TARGETS))
SOME = [job for job in FULL if job[1] == "silu" and (
    job[0] == torch.bfloat16 or (job[0] == torch.float32 and job[2] == "sm_90"))]
ONE = (torch.bfloat16, "silu", "sm_90")


def launches(module: str, case: str, dtype: torch.dtype, activation: str, target: str) -> tuple[list[Launch], int, int]:
    """Those of a case, the bytes they must move at least and their operations."""
    cost = []
    with fake_cuda(target):
        found = record(lambda: cost.append(MODULES[module].AOT[case](dtype, activation)))
    assert found
    return found, *cost[0]


def cases() -> Iterator[Any]:
    """(module, case, names of the kernels that no case of the module before had)"""
    for module, tests in MODULES.items():
        seen = set()
        for case in tests.AOT:
            names = {launch.name for launch in launches(module, case, *ONE)[0]}
            yield pytest.param(module, case, names - seen, id=f"{module.removeprefix('test_')}-{case}")
            seen |= names


CASES = list(cases())


def check(module: str, case: str, jobs: Callable[[str], list[Job]], table: list[dict[str, Any]]) -> None:
    """Compile the launches of a case for the jobs of their kernels, given by name; those that are alike once."""
    seen, found, rows = set(), [], []
    wanted = set().union(*(jobs(launch.name) for launch in launches(module, case, *ONE)[0]))
    for dtype, activation, target in (job for job in FULL if job in wanted):
        for launch in (some := launches(module, case, dtype, activation, target))[0]:
            if (dtype, activation, target) not in jobs(launch.name) or (key := (target, *_key(launch))) in seen:
                continue
            seen.add(key)
            _, moved, operations = some
            row = {
                "op": module.removeprefix("test_"), "case": case, "dtype": str(dtype).removeprefix("torch."),
                "activation": activation, **compile_launch(launch, target), "bytes": moved, "flops": operations,
                "floor_us_h200": round(1e6 * max(moved / BANDWIDTH, operations / RATE), 1),
            }
            rows.append(row)
            print(" ".join(f"{name}={value}" for name, value in row.items()))
            expected = MODULES[module].AOT_EXPECT[launch.name]
            found += [f"{launch.name} {row['dtype']} {activation} {target}: {what}" for what in problems(row, expected)]
    table += worst(rows)
    assert not found, "\n".join(found)


def worst(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of rows that differ in the activation only, the one that spills or takes most registers, and their number."""
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["kernel"], row["target"], row["dtype"]), []).append(row)
    return [{**max(group, key=lambda row: (row["spills"], row["registers"])), "compiled": len(group)}
            for group in groups.values()]


def _key(launch: Launch) -> tuple:
    """What a compilation depends on."""
    def of(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value.dtype, value.storage_offset() * value.element_size() % 16
        return value

    return launch.name, *sorted((k, str(of(v))) for k, v in {**launch.args, **launch.options}.items())


def problems(row: dict[str, Any], expected: set[str]) -> list[str]:
    found = [f"spills {row['spills']} bytes or instructions"] if row["spills"] else []
    if row["target"] != "gfx942":
        found += [f"{what} {row[what]} (bytes wide: count) without 16-byte ones"
                  for what in ("loads", "stores") if f"wide_{what}" in expected and 16 not in row[what]]
    if "dot" in expected and row["dtype"] != "float32" and not row["mma"]:
        found.append("no tensor-core instruction")
    return found


@pytest.mark.parametrize(("module", "case", "new"), CASES)
def test_compiles(module: str, case: str, new: set[str], table: list[dict[str, Any]]) -> None:
    check(module, case, lambda kernel: SOME if kernel in new else [ONE], table)


@pytest.mark.full
@pytest.mark.parametrize(("module", "case", "new"), CASES)
def test_compiles_all(module: str, case: str, new: set[str], table: list[dict[str, Any]]) -> None:
    check(module, case, lambda _: FULL, table)


# Of what they read little: float32 sums of few channels a program, or each pixel by itself.
NARROW = ("batch_norm_finalize_kernel", "batch_norm_combine_kernel", "batch_norm_backward_finalize_kernel",
          "deformable_attention_collect_kernel")


@pytest.mark.parametrize("channels", few([24, 40], lambda c: c == 24))
@pytest.mark.parametrize("module", MODULES)
def test_wide_accesses(module: str, channels: int) -> None:
    """Where 8 divides the channels and 16 does not, Triton by itself would access them 2 bytes at a time."""
    seen = set()
    for case in MODULES[module].AOT_OF_CHANNELS(channels):
        with fake_cuda("sm_90"):
            found = record(case, torch.bfloat16, "relu")
        for launch in found:
            row = compile_launch(launch, "sm_90")
            seen.add(launch.name)
            assert launch.name in NARROW or 16 in row["loads"], row
            assert "wide_stores" not in MODULES[module].AOT_EXPECT[launch.name] or 16 in row["stores"], row
    assert seen == set(MODULES[module].AOT_EXPECT)


@pytest.mark.parametrize(("module", "case"), [
    ("test_batch_norm", "forward"), ("test_batch_norm", "backward"),
    ("test_layer_norm", "vit_768_backward_residual_banks")])
def test_loads_in_flight(module: str, case: str) -> None:
    """Of programs that each reduce over many tiles, two a multiprocessor of an H200: together 64 KB."""
    found = [launch for launch in launches(module, case, *ONE)[0] if "STAGES" in launch.args]
    assert found
    for launch in found:
        assert 2 * compile_launch(launch, "sm_90")["shared"] >= 64 * 1024, launch.name


def test_problems_are_found() -> None:
    good = {"spills": 0, "target": "sm_90", "loads": {16: 2}, "stores": {16: 1}, "mma": 1, "dtype": "float16"}
    assert not problems(good, {"dot", "wide_loads", "wide_stores"})
    for bad in ({"spills": 8}, {"loads": {2: 9}}, {"stores": {4: 1}}, {"mma": 0}):
        assert problems({**good, **bad}, {"dot", "wide_loads", "wide_stores"})
