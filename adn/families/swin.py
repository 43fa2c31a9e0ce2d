"""Swin transformers, v1 and v2, of timm and torchvision.

`norm1, norm2` of essential blocks switch, and the norm of a patch merging by the flag of the stage it leads into, as
in the reference. Patch embedding and final norm do not switch. Window shifts keep following the block's index.
"""

import timm.models.swin_transformer as timm_v1
import timm.models.swin_transformer_v2 as timm_v2
import torchvision.models.swin_transformer as torchvision_swin
from torch import nn

from ..core.kinds.stage import StagePlan
from . import family, norms_named, runs, transition_norms

BLOCKS = (timm_v1.SwinTransformerBlock, timm_v2.SwinTransformerV2Block, torchvision_swin.SwinTransformerBlock)


@family("swin_transformer", "swin_transformer_v2")
def swin(model: nn.Module) -> list[StagePlan]:
    stages = list(runs(model, BLOCKS, lambda block: True))
    for stage in stages:
        stage.channel_dim = -1
        stage.norms = norms_named(model, stage, ("norm1", "norm2"))
    for norm, before, after in transition_norms(model, stages):
        if before is not None and after is not None and after.has_flag:
            after.norms.append(norm)
    return stages
