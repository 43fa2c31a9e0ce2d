"""Every kernel compiled ahead of time for four architectures, without any of them: spills, vector widths, tensor cores.

Each `test_<op>.py` lists its launches in `AOT` and what they must show in `AOT_EXPECT`. By default each launch is
compiled for every dtype and architecture with one activation, and with every activation for sm_90; `pytest -m full`
compiles the full product. `--results DIR` writes what was found to a table.
"""

from __future__ import annotations

import importlib
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from aot import TARGETS, Launch, compile_launch, fake_cuda, record

from adn_kernels.activation import ACTIVATIONS

MODULES = {path.stem: importlib.import_module(path.stem) for path in sorted(Path(__file__).parent.glob("test_*.py"))
           if "\nAOT" in path.read_text()}
CASES = [pytest.param(module, case, id=f"{module.removeprefix('test_')}-{case}")
         for module, tests in MODULES.items() for case in tests.AOT]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Of an H200: bytes per second of a copy, operations per second of a bf16 product. What a kernel should take at best.
BANDWIDTH, RATE = 4.3e12, 790e12


def check(module: str, case: str, jobs: list[tuple[torch.dtype, str, str]], table: list[dict[str, Any]]) -> None:
    """Compile the launches of a case for each (dtype, activation, target), those that are alike once."""
    tests, seen, found = MODULES[module], set(), []
    for dtype, activation, target in jobs:
        cost = []
        with fake_cuda():
            launches = record(lambda d=dtype, a=activation, c=cost: c.append(tests.AOT[case](d, a)))
        assert launches
        for launch in launches:
            if (key := (target, *_key(launch))) in seen:
                continue
            seen.add(key)
            result = compile_launch(launch, target)
            moved, operations = cost[0]
            row = {
                "op": module.removeprefix("test_"), "case": case, "dtype": str(dtype).removeprefix("torch."),
                "activation": activation, **result, "bytes": moved, "flops": operations,
                "floor_us_h200": round(1e6 * max(moved / BANDWIDTH, operations / RATE), 1),
            }
            table.append(row)
            print(" ".join(f"{name}={value}" for name, value in row.items()))
            expected = tests.AOT_EXPECT[launch.name]
            found += [f"{launch.name} {row['dtype']} {activation} {target}: {what}" for what in problems(row, expected)]
    assert not found, "\n".join(found)


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


@pytest.mark.parametrize(("module", "case"), CASES)
def test_compiles(module: str, case: str, table: list[dict[str, Any]]) -> None:
    jobs = [(dtype, "silu", target) for dtype, target in itertools.product(DTYPES, TARGETS)]
    jobs += [(torch.bfloat16, activation, "sm_90") for activation in ACTIVATIONS if activation != "silu"]
    check(module, case, jobs, table)


@pytest.mark.full
@pytest.mark.parametrize(("module", "case"), CASES)
def test_compiles_all(module: str, case: str, table: list[dict[str, Any]]) -> None:
    check(module, case, list(itertools.product(DTYPES, ACTIVATIONS, TARGETS)), table)


def test_problems_are_found() -> None:
    good = {"spills": 0, "target": "sm_90", "loads": {16: 2}, "stores": {16: 1}, "mma": 1, "dtype": "float16"}
    assert not problems(good, {"dot", "wide_loads", "wide_stores"})
    for bad in ({"spills": 8}, {"loads": {2: 9}}, {"stores": {4: 1}}, {"mma": 0}):
        assert problems({**good, **bad}, {"dot", "wide_loads", "wide_stores"})
