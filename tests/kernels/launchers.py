"""Runs the tests of launchers without a GPU, in processes of their own: what executes kernels is chosen by the
environment when they are defined, so it cannot share a process with tests that compile them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
RUNNERS = ("test_interpreter.py", "test_ptx.py")
FILES = sorted(path.name for path in HERE.glob("test_*.py")
               if "mark.launcher" in path.read_text() and path.name not in RUNNERS)


def run(environment: dict[str, str], *args: str) -> subprocess.CompletedProcess:
    """pytest with these arguments, of which those that begin with `test_` are files."""
    # The workers of a parallel run must not pass for this one's.
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    args = tuple(str(HERE / arg) if arg.startswith("test_") else arg for arg in args)
    return subprocess.run([sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", *args],
                          env={**inherited, "OMP_NUM_THREADS": "1", **environment}, capture_output=True, text=True,
                          check=False)
