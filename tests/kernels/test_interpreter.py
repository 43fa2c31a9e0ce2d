"""Runs the tests of launchers in Triton's interpreter, each file in a process of its own.

The interpreter is chosen by an environment variable when kernels are defined, so it cannot share a process with tests
that compile them. By default a sample of the cases of each test, `-m full` runs all. To run one file by hand:
`TRITON_INTERPRET=1 pytest tests/kernels/test_gemm.py`.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import few

HERE = Path(__file__).parent
FILES = sorted(path.name for path in HERE.glob("test_*.py") if "mark.launcher" in path.read_text()
               and path != Path(__file__))

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU the tests of launchers run there")


def _pytest(*args: str) -> subprocess.CompletedProcess:
    # The workers of a parallel run must not pass for this one's.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    environment |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", *args],
                          env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("sample", few(["--sample=3", "--sample=1000000"], lambda sample: sample == "--sample=3"))
@pytest.mark.parametrize("name", FILES)
def test_launchers(name: str, sample: str) -> None:
    done = _pytest(str(HERE / name), sample)
    assert done.returncode == 0, done.stdout + done.stderr


def test_enough_cases() -> None:
    done = _pytest("--collect-only", *(str(HERE / name) for name in FILES))
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(re.search(r"(\d+) tests collected", done.stdout)[1]) >= 500
