"""ResNets of timm and torchvision: basic and bottleneck blocks; plain, d, ResNeXt, wide, squeeze-excite, anti-aliased.

Stages are `layer1..4`. `bn1..3` of essential blocks switch; the stem and the shortcuts' norms do not, as in the
reference (Adaptive Depth Networks), whose checkpoints depend on it.
"""

import timm.models.resnet
import torchvision.models.resnet
from torch import nn

from ..core.kinds.stage import StagePlan
from . import family, runs

BLOCKS = (
    timm.models.resnet.BasicBlock,
    timm.models.resnet.Bottleneck,
    torchvision.models.resnet.BasicBlock,
    torchvision.models.resnet.Bottleneck,
)


@family("resnet")
def resnet(model: nn.Module) -> list[StagePlan]:
    return list(runs(model, BLOCKS, lambda block: block.downsample is None and block.stride == 1))
