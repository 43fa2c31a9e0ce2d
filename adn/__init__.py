"""Any-depth networks: one set of weights, every depth, chosen at run time."""

import importlib
from typing import TYPE_CHECKING

from .calibrate import calibrate
from .checkpoint import load, save
from .convert import convert, convert_sync_batchnorm, freeze_batch_norm, plan
from .depth import Depth
from .distill import SelfDistillation
from .errors import CheckpointError, ConversionError
from .evaluate import evaluate
from .export import extract
from .models import create_model, list_models
from .nn import fx_leaf_modules
from .plan import Plan, StagePlan
from .profile import Profile, fit_budget, profile
from .state import at_depth, depths, get_depth, set_depth, stages
from .weights import load_weights

if TYPE_CHECKING:
    from .runtime.accelerate import accelerate, fusions, use_kernels
    from .runtime.compile import compile
    from .runtime.engine import Engine
    from .runtime.fuse import FusedNet, fuse

__version__ = "0.1.0"

__all__ = [
    "CheckpointError",
    "ConversionError",
    "Depth",
    "Engine",
    "FusedNet",
    "Plan",
    "Profile",
    "SelfDistillation",
    "StagePlan",
    "accelerate",
    "at_depth",
    "calibrate",
    "compile",
    "convert",
    "convert_sync_batchnorm",
    "create_model",
    "depths",
    "evaluate",
    "extract",
    "fit_budget",
    "freeze_batch_norm",
    "fuse",
    "fusions",
    "fx_leaf_modules",
    "get_depth",
    "list_models",
    "load",
    "load_weights",
    "plan",
    "profile",
    "save",
    "set_depth",
    "stages",
    "use_kernels",
]

# Imported when first asked for, as they bring the kernels and a compiler, which take seconds.
_LATER = {
    "Engine": "engine",
    "FusedNet": "fuse",
    "accelerate": "accelerate",
    "compile": "compile",
    "fuse": "fuse",
    "fusions": "accelerate",
    "use_kernels": "accelerate",
}


def __getattr__(name: str) -> object:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(f".runtime.{_LATER[name]}", __name__), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LATER})
