"""Where a cascade of two YOLOv7 may be left early."""

from torch import nn

from ...core.kinds.stack import StackPlan
from ...core.plan import Plan
from ...families import family
from .model import YOLOv7Cascade


@family(whole=True)
def yolov7_cascade(model: nn.Module) -> Plan:
    stacks = [StackPlan("answer", ["answer.routes"], base=1)] if isinstance(model, YOLOv7Cascade) else []
    return Plan([], yolov7_cascade.__name__, stacks)
