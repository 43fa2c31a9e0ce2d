"""RegNets (X, Y, Z, V) of timm and torchvision.

The papers do not treat them; by the same rule stages are `s1..s4` (`block1..4`), and the norms of essential blocks
switch; the stem's and the shortcuts' do not, as in a ResNet.
"""

import timm.models.regnet
import torchvision.models.regnet
from torch import nn

from ..core.kinds.stage import StagePlan
from . import family, runs

BLOCKS = (
    timm.models.regnet.Bottleneck,
    timm.models.regnet.PreBottleneck,
    torchvision.models.regnet.ResBottleneckBlock,
)


def _keeps_shape(block: nn.Module) -> bool:
    if isinstance(block, torchvision.models.regnet.ResBottleneckBlock):
        return block.proj is None
    return block.downsample is None or isinstance(block.downsample, nn.Identity)


@family("regnet")
def regnet(model: nn.Module) -> list[StagePlan]:
    stages = [stage.resolve(model) for stage in runs(model, BLOCKS, _keeps_shape)]
    for stage in stages:
        # torchvision calls the shortcut `proj`.
        stage.norms = [norm for norm in stage.norms if "proj" not in norm.split(".")]
    return stages
