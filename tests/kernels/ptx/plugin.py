"""Of pytest, loaded where ADN_PTX=1: kernels are executed by this package, and what tests execute is counted.

With ADN_PTX_REPORT=FILE the counts are written there as JSON when all tests have run.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from . import launch

launch.install()

_cases: Counter[str] = Counter()  # tests, by the kernels that they launched
_failures: Counter[str] = Counter()
_before = pytest.StashKey[dict[str, int]]()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    launch.reseed()
    item.stash[_before] = {name: count.launches for name, count in launch.counts.items()}


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo) -> Any:
    if call.when == "call":
        launched = [name for name, count in launch.counts.items() if count.launches > item.stash[_before].get(name, 0)]
        _cases.update(launched)
        if call.excinfo is not None and not call.excinfo.errisinstance(pytest.skip.Exception):
            _failures.update(launched)
    return (yield)


def report() -> dict[str, dict[str, Any]]:
    """By kernel of the library; without those of modules with a planted mistake."""
    return {
        name: {"variants": sorted(count.variants), "cases": _cases[name], "launches": count.launches,
               "instructions": count.instructions, "contested": count.contested, "failures": _failures[name]}
        for name, count in sorted(launch.counts.items())
        if name.startswith("adn_kernels.") and ".planted" not in name}


def pytest_sessionfinish() -> None:
    if path := os.environ.get("ADN_PTX_REPORT"):
        Path(path).write_text(json.dumps(report()))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    for name, row in report().items():
        numbers = ", ".join(f"{len(v) if isinstance(v, list) else v} {key}" for key, v in row.items())
        terminalreporter.write_line(f"{name}: {numbers}")
