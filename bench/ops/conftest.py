"""`pytest bench/ops -m gpu -o python_files=bench_*.py`: the cases of each file under pytest-benchmark, a contender at a
time. `bench/kernels.py` measures the same cases without it, against more opponents and on inputs larger than the cache.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

if importlib.util.find_spec("pytest_benchmark") is None:
    collect_ignore_glob = ["bench_*.py"]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "bench" not in metafunc.fixturenames:
        return
    from shapes import BATCHES, NETWORKS, layers

    cases = [case for batch in BATCHES for network in NETWORKS for layer in layers(network)
             for case in metafunc.module.cases(layer, batch, torch.bfloat16)]
    params = [(case, contender, direction) for case in cases for direction in case.costs
              for contender in case.contenders]
    metafunc.parametrize("bench", params, ids=[f"{case}-{direction}-{who}".replace(" ", "-")
                                               for case, who, direction in params], indirect=True)


@pytest.fixture
def bench(request: pytest.FixtureRequest) -> Callable[[], None]:
    """Replays a CUDA graph of one contender; `extra_info` says how many calls that is and what one achieves."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    from timing import Gpu

    benchmark = request.getfixturevalue("benchmark")
    case, contender, direction = request.param

    def run() -> None:
        replay, calls = Gpu().replay(case, contender, direction)
        benchmark.group = f"{case} {direction}"
        benchmark.pedantic(replay, rounds=20, warmup_rounds=3)
        us = 1e6 * benchmark.stats.stats.median / calls
        benchmark.extra_info.update(calls=calls, us=us, gb_s=case.costs[direction].bytes / us / 1e3,
                                    tflop_s=case.costs[direction].flops / us / 1e6)

    return run
