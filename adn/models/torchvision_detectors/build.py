"""From a builder's name to the detector, with fresh weights."""

from __future__ import annotations

from typing import Any

import torchvision.models.detection as detection
from torch import nn
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops import FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

# By kind: the class, and which maps its pyramid has where they are not all four and a sampled one.
_KINDS = {
    "fasterrcnn": (detection.FasterRCNN, {}),
    "maskrcnn": (detection.MaskRCNN, {}),
    "retinanet": (detection.RetinaNet, {"returned_layers": [2, 3, 4]}),
}


def build(builder: str, *, num_classes: int = 91, frozen: bool = False, trainable_backbone_layers: int = 3,
          **kwargs: Any) -> nn.Module:
    """A detector of torchvision, with fresh weights.

    Args:
        builder: its name in `torchvision.models.detection`.
        num_classes: with the background, as torchvision counts: labels are 1 to num_classes - 1.
        frozen: fixed norms in the backbone, as in one that was trained on ImageNet.
        trainable_backbone_layers: of a frozen backbone, how many of its last parts learn.
        kwargs: of the class: `min_size`, `max_size`, ...
    """
    if not frozen:
        return getattr(detection, builder)(weights=None, weights_backbone=None, num_classes=num_classes, **kwargs)
    cls, maps = _KINDS[builder.partition("_")[0]]
    extra = {"extra_blocks": LastLevelP6P7(256, 256)} if maps else {}
    backbone = resnet_fpn_backbone(backbone_name="resnet50", weights=None, norm_layer=FrozenBatchNorm2d,
                                   trainable_layers=trainable_backbone_layers, **maps, **extra)
    return cls(backbone, num_classes, **kwargs)
