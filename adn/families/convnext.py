"""ConvNeXt v1 and v2 of timm, v1 of torchvision.

The papers do not treat them; by the same rule stages are the four runs of blocks, the norm of essential blocks
switches, and the norm of a down-sampling layer by the flag of the stage it leads into (as Swin's patch merging). Stem,
head and global response norm (v2; a part of the MLP, not a norm layer) do not switch.
"""

import timm.models.convnext
import torchvision.models.convnext
from torch import nn

from ..core.kinds.stage import StagePlan
from . import family, runs, transition_norms

BLOCKS = (timm.models.convnext.ConvNeXtBlock, torchvision.models.convnext.CNBlock)


def _keeps_shape(block: nn.Module) -> bool:
    shortcut = getattr(block, "shortcut", None)
    return shortcut is None or isinstance(shortcut, nn.Identity)


@family("convnext")
def convnext(model: nn.Module) -> list[StagePlan]:
    stages = [stage.resolve(model) for stage in runs(model, BLOCKS, _keeps_shape)]
    for norm, before, after in transition_norms(model, stages):
        if before is not None and after is not None and after.has_flag:
            after.norms.append(norm)
    return stages
