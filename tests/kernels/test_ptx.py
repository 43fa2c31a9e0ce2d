"""Runs the tests of launchers on what Triton compiles for a Hopper GPU, executed on the CPU by the package `ptx`.

By default one case of each test; `-m full` runs all on all CPUs, for more than an hour of one. With `--results DIR` a
table tells of each kernel how many variants of it were compiled and how much of them was executed. To run one file by
hand: `ADN_PTX=1 pytest tests/kernels/test_gemm.py`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from launchers import FILES, HERE, run

pytestmark = [pytest.mark.ptx,
              pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU the tests of launchers run there")]
NOTHING_LAUNCHED = {"test_activation.py"}  # kernels of the test's own, not of the library
Counts = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def counts(table: list[dict[str, Any]]) -> Iterator[Counts]:
    """What the processes report, by kernel; becomes the table."""
    found: Counts = {}
    yield found
    for name, row in sorted(found.items()):
        _, module, kernel = name.split(".")
        table.append({"op": module, "kernel": kernel, **row, "variants": len(row["variants"])})


def add(counts: Counts, report: Counts) -> None:
    for name, row in report.items():
        known = counts.setdefault(name, {key: [] if key == "variants" else 0 for key in row})
        for key, value in row.items():
            known[key] = sorted({*known[key], *value}) if key == "variants" else known[key] + value


def execute(report: Path, names: Sequence[str], *args: str, **environment: str) -> tuple[Counts, str]:
    """What a process reports, and what is wrong about it."""
    done = run({"ADN_PTX": "1", "ADN_PTX_REPORT": str(report), **environment}, *args, *names)
    found = json.loads(report.read_text()) if report.exists() else {}
    if done.returncode:
        return found, done.stdout + done.stderr
    if not found and set(names) != NOTHING_LAUNCHED:
        return found, f"{names}: nothing was launched"
    return found, "".join(f"{name}: which of several sums is stored is left open\n"
                          for name, row in found.items() if row["contested"])


@pytest.mark.parametrize("names", [FILES[i::3] for i in range(3)], ids=" ".join)
def test_some_launchers(names: list[str], counts: Counts, tmp_path: Path) -> None:
    found, wrong = execute(tmp_path / "report.json", names, "--sample=1", ADN_EXAMPLES="1")
    add(counts, found)
    assert not wrong, wrong


@pytest.mark.full
def test_launchers(counts: Counts, tmp_path: Path) -> None:
    """A process for each CPU, the file that takes longest first."""
    names = sorted(FILES, key=lambda name: name != "test_gemm.py")
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = list(pool.map(lambda name: execute(tmp_path / f"{name}.json", [name]), names))
    for found, _ in results:
        add(counts, found)
    assert not any(wrong for _, wrong in results), "\n".join(wrong for _, wrong in results)


def test_kernels_of_their_own() -> None:
    """What Triton compiles, with mistakes planted in it."""
    done = run({"ADN_PTX": "1"}, str(HERE / "ptx" / "test_kernels.py"))
    assert done.returncode == 0, done.stdout + done.stderr


WRONG = """
import pytest, torch
from adn_kernels.column_sum import launch_column_sum

@pytest.mark.launcher
@pytest.mark.parametrize("wrong", [False, True])
def test_sum(wrong):
    total = torch.zeros(4)
    launch_column_sum(torch.ones(2, 3, 4), total, None, None, 3)
    assert total.tolist() == [6.0 + wrong] * 4
"""


def test_a_failure_is_reported(tmp_path: Path) -> None:
    """A test that fails makes its process fail, and stands in the report."""
    report, test = tmp_path / "report.json", tmp_path / "test_wrong.py"
    test.write_text(WRONG)
    path = os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    done = run({"ADN_PTX": "1", "ADN_PTX_REPORT": str(report), "PYTHONPATH": path}, "-p", "conftest", str(test))
    assert done.returncode == 1
    row = json.loads(report.read_text())["adn_kernels.column_sum.column_sum_kernel"]
    assert (len(row["variants"]), row["cases"], row["launches"], row["failures"]) == (1, 2, 2, 1)
    assert row["instructions"] > 0


def test_reports_are_added() -> None:
    row = {"variants": ["a", "b"], "cases": 2, "launches": 3, "instructions": 10, "contested": 0, "failures": 0}
    other = {"variants": ["b", "c"], "cases": 1, "launches": 1, "instructions": 5, "contested": 2, "failures": 1}
    counts: Counts = {}
    add(counts, {"adn_kernels.gemm.gemm_kernel": row})
    add(counts, {"adn_kernels.gemm.gemm_kernel": other, "adn_kernels.conv.kernel": row})
    assert counts["adn_kernels.gemm.gemm_kernel"] == {
        "variants": ["a", "b", "c"], "cases": 3, "launches": 4, "instructions": 15, "contested": 2, "failures": 1}
    assert counts["adn_kernels.conv.kernel"] == row
