"""Pre-activation ResNets of timm (ResNetV2, BiT), with batch norm or group norm.

The papers do not treat them; by the same rule stages are `stages.k.blocks`, and the norms of essential blocks switch
(activation included). The final norm sits after the last addition and does not switch, like a ViT's.
"""

import timm.models.resnetv2
from torch import nn

from ..core.kinds.stage import StagePlan
from . import family, runs

BLOCKS = (
    timm.models.resnetv2.PreActBasic,
    timm.models.resnetv2.PreActBottleneck,
    timm.models.resnetv2.Bottleneck,
)


@family("resnetv2")
def resnetv2(model: nn.Module) -> list[StagePlan]:
    return list(runs(model, BLOCKS, lambda block: block.downsample is None))
