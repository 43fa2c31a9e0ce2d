"""Vision transformers: ViT and DeiT of timm, ViT of torchvision.

A stage is a group of 3 encoder blocks, the last of which is refinement; a last incomplete group has no refinement
block and no flag. The two norms of essential blocks switch; query/key norms and the final norm do not.
"""

import timm.models.vision_transformer as timm_vit
import torchvision.models.vision_transformer as torchvision_vit
from torch import nn

from ..core.kinds.stage import StagePlan
from . import family, in_groups, norms_named, runs

BLOCKS = (
    timm_vit.Block,
    timm_vit.ResPostBlock,
    timm_vit.ParallelScalingBlock,
    timm_vit.ParallelThingsBlock,
    torchvision_vit.EncoderBlock,
)
SWITCHED = ("norm1", "norm2", "ln_1", "ln_2", "in_norm", "norm")


@family("vision_transformer", "deit")
def vit(model: nn.Module) -> list[StagePlan]:
    stages = []
    for run in runs(model, BLOCKS, lambda block: True):
        for stage in in_groups(run):
            stage.channel_dim = -1
            stage.norms = norms_named(model, stage, SWITCHED)
            stages.append(stage)
    return stages
