"""Importing is light and touches no device; the public names are pinned."""

from __future__ import annotations

import subprocess
import sys

import adn

PUBLIC = {
    "CheckpointError", "ConversionError", "Depth", "Engine", "FusedNet", "Plan", "Profile", "SelfDistillation",
    "StagePlan", "accelerate", "at_depth", "calibrate", "compile", "convert", "convert_sync_batchnorm", "create_model",
    "depths", "evaluate", "extract", "fit_budget", "freeze_batch_norm", "fuse", "fusions", "fx_leaf_modules",
    "get_depth", "list_models", "load", "load_weights", "plan", "profile", "save", "set_depth", "stages", "use_kernels",
}

PROBE = """
import sys, time
import torch, timm
loaded = set(sys.modules)
before = time.perf_counter()
import adn
took = time.perf_counter() - before
assert not torch.cuda.is_initialized()
optional = {"matplotlib", "sklearn", "tensorboard", "triton"} & set(sys.modules) - loaded
assert not optional, optional
print(took)
"""


def test_public_names() -> None:
    assert set(adn.__all__) == PUBLIC
    assert all(hasattr(adn, name) for name in PUBLIC)
    assert set(dir(adn)) >= PUBLIC
    assert not hasattr(adn, "no_such_thing")


def test_import_is_light() -> None:
    done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    # The bound is the promise made to users, an order of magnitude above what it takes.
    assert float(done.stdout) < 3
