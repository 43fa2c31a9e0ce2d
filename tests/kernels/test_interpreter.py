"""Runs the tests of launchers in Triton's interpreter.

By default what watches this interpreter (bytes moved, the last programs of a large grid), as the rest is in
`test_ptx.py` too; `-m full` runs all. To run one file by hand: `TRITON_INTERPRET=1 pytest tests/kernels/test_gemm.py`.
"""

from __future__ import annotations

import re

import pytest
import torch
from launchers import FILES, run

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU the tests of launchers run there")
INTERPRETER = {"TRITON_INTERPRET": "1"}


def test_what_only_it_shows() -> None:
    done = run(INTERPRETER, "--sample=1", "-m", "interpreter and not full", *FILES)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.full
@pytest.mark.parametrize("name", FILES)
def test_launchers(name: str) -> None:
    done = run(INTERPRETER, name)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.full
def test_enough_cases() -> None:
    done = run(INTERPRETER, "--collect-only", *FILES)
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(re.search(r"(\d+) tests collected", done.stdout)[1]) >= 500
