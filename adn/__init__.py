"""Any-depth networks: one set of weights, every depth, chosen at run time."""

from .convert import convert, convert_sync_batchnorm, freeze_batch_norm, plan
from .depth import Depth
from .distill import SelfDistillation
from .errors import CheckpointError, ConversionError
from .export import extract
from .nn import fx_leaf_modules
from .plan import Plan, StagePlan
from .state import at_depth, depths, get_depth, set_depth, stages

__version__ = "0.1.0"
