"""How checkpoints of others call the parts of RT-DETR and of its backbone, see `adn.weights.foreign`."""

from __future__ import annotations

from ..entry import Naming

# The reference's shortcut has no pooling where the stride is 1; timm keeps an identity in its place.
_VD = {"layer1.0.downsample.0": "layer1.0.downsample.1", "layer1.0.downsample.1": "layer1.0.downsample.2"}

# Official names but for the backbone, and for what the official neck has as a sequence.
_WHOLE = {
    **{f"backbone.{old}": f"backbone.{new}" for old, new in _VD.items()},
    **{f"{encoder}input_proj.{i}.{old}": f"{encoder}input_proj.{i}.{new}"
       for encoder in ("encoder.", "") for i in range(3) for old, new in (("conv", 0), ("norm", 1))},
}

NAMES: tuple[Naming, ...] = (("reference", "ResNet vd", (_VD,)), ("reference", "RT-DETR", (_WHOLE,)))
