"""Any-depth networks: one set of weights, every depth, chosen at run time."""

from typing import TYPE_CHECKING

from .convert import convert, convert_sync_batchnorm, freeze_batch_norm, plan
from .core import lazy
from .core.behaviours import fx_leaf_modules
from .core.depth import Depth
from .core.errors import CheckpointError, ConversionError
from .core.kinds.stage import StagePlan
from .core.plan import Plan
from .core.state import at_depth, depths, get_depth, set_depth, stages
from .distill import SelfDistillation
from .export.extract import extract
from .measure.accuracy import evaluate
from .measure.calibrate import calibrate, update_bn
from .measure.profile import Profile, fit_budget, profile
from .models.registry import create_model, list_models
from .weights.checkpoint import load, save
from .weights.foreign import load_weights

if TYPE_CHECKING:
    from .runtime.accelerate import accelerate, fusions, use_kernels
    from .runtime.compile import compile
    from .runtime.engine import Engine
    from .runtime.fuse import FusedNet, fuse
    from .runtime.onnx import export_onnx

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
    "export_onnx",
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
    "update_bn",
    "use_kernels",
]

__getattr__, __dir__ = lazy.attach(globals(), {
    "Engine": ".runtime.engine",
    "FusedNet": ".runtime.fuse",
    "accelerate": ".runtime.accelerate",
    "compile": ".runtime.compile",
    "export_onnx": ".runtime.onnx",
    "fuse": ".runtime.fuse",
    "fusions": ".runtime.accelerate",
    "use_kernels": ".runtime.accelerate",
})
