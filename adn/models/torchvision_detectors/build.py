"""From a builder's name to the detector, with fresh weights."""

from __future__ import annotations

from typing import Any

import torchvision.models as models
import torchvision.models.detection as detection
from torch import nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.ops import FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

# By kind: the class, and the first stage whose map its pyramid has.
_KINDS = {"fasterrcnn": (detection.FasterRCNN, 1), "maskrcnn": (detection.MaskRCNN, 1),
          "retinanet": (detection.RetinaNet, 2)}
_PARTS = ("layer4", "layer3", "layer2", "layer1", "conv1", "bn1")


def build(builder: str, *, num_classes: int = 91, frozen: bool = False, trainable_backbone_layers: int = 3,
          channels: int = 256, smallest_anchor: int = 32, **kwargs: Any) -> nn.Module:
    """A detector of torchvision, with fresh weights.

    Args:
        builder: its name in `torchvision.models.detection`; or one like it of another ResNet, "retinanet_resnet18_fpn".
        num_classes: with the background, as torchvision counts: labels are 1 to num_classes - 1.
        frozen: fixed norms in the backbone, as in one that was trained on ImageNet.
        trainable_backbone_layers: of a frozen backbone, how many of its last parts learn.
        channels: of the pyramid.
        smallest_anchor: side in pixels; of each further map of the pyramid it is twice that of the one before.
        kwargs: of the class: `min_size`, `max_size`, ...

    Raises:
        ValueError: if only torchvision itself builds this one, so that it has none of the settings after the second.
    """
    kind, _, backbone = builder.removesuffix("_fpn").partition("_")
    as_usual = not frozen and (channels, smallest_anchor) == (256, 32)
    if as_usual and hasattr(detection, builder):
        return getattr(detection, builder)(weights=None, weights_backbone=None, num_classes=num_classes, **kwargs)
    if kind not in _KINDS or not builder.endswith("_fpn") or not hasattr(models, backbone):
        raise ValueError(f"{builder} with frozen={frozen}, channels={channels}, smallest_anchor={smallest_anchor}: "
                         f"these are for {', '.join(_KINDS)} on a ResNet, \"retinanet_resnet50_fpn\"")
    cls, first = _KINDS[kind]
    body = getattr(models, backbone)(norm_layer=FrozenBatchNorm2d if frozen else nn.BatchNorm2d)
    fixed = _PARTS[trainable_backbone_layers:] if frozen and trainable_backbone_layers < 5 else ()
    for name, parameter in body.named_parameters():
        parameter.requires_grad_(not name.startswith(fixed) if fixed else True)
    extra = LastLevelP6P7(channels, channels) if kind == "retinanet" else None
    stages = range(first, 5)
    trunk = BackboneWithFPN(
        body, {f"layer{stage}": str(i) for i, stage in enumerate(stages)},
        [body.inplanes // 2 ** (4 - stage) for stage in stages], channels, extra)
    return cls(trunk, num_classes, **_anchors(kind, smallest_anchor), **kwargs)


def _anchors(kind: str, smallest: int) -> dict[str, AnchorGenerator]:
    sides = [smallest * 2**i for i in range(5)]
    if kind == "retinanet":
        sizes = tuple((side, int(side * 2 ** (1 / 3)), int(side * 2 ** (2 / 3))) for side in sides)
    else:
        sizes = tuple((side,) for side in sides)
    return {"anchor_generator" if kind == "retinanet" else "rpn_anchor_generator":
            AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * len(sizes))}
