"""Runs the tests of launchers in Triton's interpreter.

By default one case of each test, `-m full` runs all. What watches this interpreter (bytes moved, the last programs of
a large grid) runs here alone, the rest in `test_ptx.py` too. To run one file by hand:
`TRITON_INTERPRET=1 pytest tests/kernels/test_gemm.py`.
"""

from __future__ import annotations

import re

import pytest
import torch
from conftest import few
from launchers import FILES, run

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU the tests of launchers run there")
INTERPRETER = {"TRITON_INTERPRET": "1"}


@pytest.mark.parametrize("sample", few(["--sample=1", "--sample=1000000"], lambda sample: sample == "--sample=1"))
@pytest.mark.parametrize("name", FILES)
def test_launchers(name: str, sample: str) -> None:
    done = run(INTERPRETER, name, sample)
    assert done.returncode == 0, done.stdout + done.stderr


def test_enough_cases() -> None:
    done = run(INTERPRETER, "--collect-only", *FILES)
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(re.search(r"(\d+) tests collected", done.stdout)[1]) >= 500
