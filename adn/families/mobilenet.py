"""Inverted residuals: MobileNetV2 (timm, torchvision), MobileNetV3, EfficientNet and their kin.

A stage is a run of blocks with one residual shape. Every norm outside a refinement block switches: those before the
first stage by its flag, those after a stage by that stage's flag. For MobileNetV2 this is the reference's rule (stem
and 16-channel block by the first flag; 320-channel block and last convolution by the last); for the others the same.
"""

import timm.models._efficientnet_blocks as efficientnet_blocks
import torchvision.models.efficientnet
import torchvision.models.mobilenetv2
import torchvision.models.mobilenetv3
from torch import nn

from ..core.kinds.stage import StagePlan
from . import family, runs, transition_norms

TIMM_BLOCKS = (
    efficientnet_blocks.ConvBnAct,
    efficientnet_blocks.DepthwiseSeparableConv,
    efficientnet_blocks.InvertedResidual,
    efficientnet_blocks.UniversalInvertedResidual,
    efficientnet_blocks.MobileAttention,
    efficientnet_blocks.EdgeResidual,
)
TORCHVISION_BLOCKS = (
    torchvision.models.mobilenetv2.InvertedResidual,
    torchvision.models.mobilenetv3.InvertedResidual,
    torchvision.models.efficientnet.MBConv,
    torchvision.models.efficientnet.FusedMBConv,
)


def _keeps_shape(block: nn.Module) -> bool:
    return block.has_skip if isinstance(block, TIMM_BLOCKS) else block.use_res_connect


@family("efficientnet", "mobilenetv3")
def mobilenet(model: nn.Module) -> list[StagePlan]:
    # Two runs of one container are two stages even where a stage of the model's own holds both.
    stages = [stage.resolve(model) for stage in runs(model, TIMM_BLOCKS + TORCHVISION_BLOCKS, _keeps_shape)]
    for norm, before, after in transition_norms(model, [stage for stage in stages if stage.has_flag]):
        stage = before or after
        if stage is not None:
            stage.norms.append(norm)
    return stages
