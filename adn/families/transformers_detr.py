"""RT-DETR, RT-DETRv2 and D-FINE of Hugging Face's `transformers`, known by their structure: nothing of it is imported.

As for RT-DETR of this library: the stages of the backbone, those of the neck under one flag with every norm of it that
always runs, and the decoder as a stack. That of D-FINE runs whole: each layer corrects the distributions of the one
before, and which of them is read is fixed (`eval_idx`).
"""

import math
from collections.abc import Callable, Iterator

from torch import nn

from ..core.behaviours import is_norm
from ..core.errors import ConversionError
from ..core.kinds.stack import StackPlan
from ..core.kinds.stage import StagePlan
from ..core.plan import Plan
from . import csp_stages, family, runs

_DECODER = ("layers", "class_embed", "bbox_embed")


@family(whole=True)
def transformers_detr(model: nn.Module) -> Plan:
    where = next((name for name in ("model", "") if _is_detr(_part(model, name))), None)
    if where is None:
        return Plan()
    prefix = f"{where}." if where else ""
    inner = model.get_submodule(where)
    kinds, keeps_shape = _blocks(inner.backbone)
    if not kinds:
        raise ConversionError(f"no stages to bypass found in the backbone of this {type(model).__name__}, a "
                              f"{type(inner.backbone.model).__name__}: its blocks are not those of a ResNet or HGNet")
    backbone = [stage.renamed(f"{prefix}backbone.{{}}".format) for stage in runs(inner.backbone, kinds, keeps_shape)]
    neck = [stage.renamed(f"{prefix}{{}}".format) for stage in _neck(inner)]
    stacks = []
    if not hasattr(inner.decoder, "eval_idx"):
        lists = [f"{prefix}decoder.{name}" for name in _DECODER]
        stacks = [StackPlan(f"{prefix}decoder", lists, math.ceil(2 * len(inner.decoder.layers) / 3))]
    return Plan([*backbone, *neck], transformers_detr.__name__, stacks)


def is_detr_of_transformers(model: nn.Module) -> bool:
    """Is it one with heads: an object with a `config`, and such a model in it?"""
    return hasattr(model, "config") and _is_detr(getattr(model, "model", None))


def _part(model: nn.Module, name: str) -> nn.Module | None:
    return getattr(model, name, None) if name else model


def _is_detr(model: nn.Module | None) -> bool:
    """Backbone, hybrid encoder and decoder by the names that they have there."""
    def has(path: str) -> bool:
        owner = model
        for name in path.split("."):
            owner = getattr(owner, name, None)
        return isinstance(owner, nn.Module)

    return model is not None and all(map(has, (
        "backbone.model", "encoder.fpn_blocks", "encoder.pan_blocks", "encoder_input_proj",
        *(f"decoder.{name}" for name in _DECODER))))


def _blocks(backbone: nn.Module) -> tuple[tuple[type, ...], Callable[[nn.Module], bool]]:
    """The classes of its residual blocks, and whether one keeps the shape: of a ResNet with a `layer` that is a
    sequence, and a `shortcut`, the identity where it stays; of an HGNet those that say that they are `residual`."""
    def classes(*names: str) -> tuple[type, ...]:
        return tuple({type(m) for m in backbone.modules() if all(hasattr(m, name) for name in names)
                      and isinstance(getattr(m, names[0]), nn.Sequential)})

    if found := classes("layer", "shortcut"):
        return found, lambda block: isinstance(block.shortcut, nn.Identity)
    return classes("aggregation", "residual"), lambda block: block.residual


def _neck(model: nn.Module) -> Iterator[StagePlan]:
    csp = [name for name, module in model.named_modules() if hasattr(module, "bottlenecks")
           and name.startswith(("encoder.fpn_blocks.", "encoder.pan_blocks."))]
    norms = [name for name, module in model.named_modules()
             if name.startswith(("encoder.", "encoder_input_proj.")) and is_norm(module)]
    return csp_stages(model, csp, norms)
