"""Any-depth networks: one set of weights, every depth, chosen at run time."""

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

__version__ = "0.1.0"

__all__ = [
    "CheckpointError",
    "ConversionError",
    "Depth",
    "Plan",
    "Profile",
    "SelfDistillation",
    "StagePlan",
    "at_depth",
    "calibrate",
    "convert",
    "convert_sync_batchnorm",
    "create_model",
    "depths",
    "evaluate",
    "extract",
    "fit_budget",
    "freeze_batch_norm",
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
]
