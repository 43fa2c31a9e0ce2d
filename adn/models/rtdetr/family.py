"""Where the stages of RT-DETR are: those of its backbone, its neck under one flag, its decoder as a stack.

The neck's CSP blocks bypass their last bottlenecks together; every norm of the neck that always runs switches. The
decoder's norms do not.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from torch import nn

from ...core.behaviours import is_norm
from ...core.kinds.stack import StackPlan
from ...core.kinds.stage import StagePlan
from ...core.plan import Plan
from ...families import FAMILIES, csp_stages, family, runs
from .decoder import Decoder
from .encoder import CSPRepLayer, HybridEncoder
from .presnet import Block


@family()
def presnet(model: nn.Module) -> list[StagePlan]:
    return list(runs(model, (Block,), lambda block: block.short is None))


@family()
def hybrid_encoder(model: nn.Module) -> list[StagePlan]:
    return list(_neck(model)) if isinstance(model, HybridEncoder | CSPRepLayer) else []


@family()
def rtdetr(model: nn.Module) -> list[StagePlan] | Plan:
    if not (isinstance(getattr(model, "encoder", None), HybridEncoder)
            and isinstance(getattr(model, "decoder", None), Decoder)):
        return []
    stages = next(filter(None, (known.find(model.backbone) for known in FAMILIES.values())), [])
    backbone = [stage.renamed("backbone.{}".format) for stage in stages]
    # The base-net runs two thirds of the decoder's layers, as published for six.
    decoder = StackPlan("decoder", ["decoder.decoder.layers", "decoder.dec_score_head", "decoder.dec_bbox_head"],
                        math.ceil(2 * len(model.decoder.decoder.layers) / 3))
    return Plan([*backbone, *_neck(model, "encoder")], "rtdetr", [decoder])


def _neck(model: nn.Module, where: str = "") -> Iterator[StagePlan]:
    named = [(name, m) for name, m in model.named_modules() if not where or name.startswith(f"{where}.")]
    return csp_stages(model, [name for name, block in named if isinstance(block, CSPRepLayer)],
                      [name for name, module in named if is_norm(module)])
