"""Detectors by name: arguments of `adn.detection.RTDETR`. Importing this imports nothing else of the package."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

STRIDE = 32  # of the coarsest map: sides of images are multiples of it


@dataclasses.dataclass(frozen=True)
class Preset:
    """A model by name: arguments of `RTDETR`, and whether it is any-depth from the start."""

    args: Mapping[str, Any]
    any_depth: bool = False

    def but(self, **changes: Any) -> dict[str, Any]:
        """The arguments with some changed. Those of the backbone are kept for a backbone of the same family, and added
        to."""
        args = {**self.args, **changes}
        own = self.args.get("backbone_args") if _family(args) == _family(self.args) else None
        return args | {"backbone_args": {**(own or {}), **(changes.get("backbone_args") or {})}}


def _family(args: Mapping[str, Any]) -> str:
    """"resnet" of "resnet50" and "resnet18.a1_in1k"."""
    return re.match("[a-z]*", str(args["backbone"])).group()


_FROZEN = {"freeze_norm": True, "freeze_stem": True}
_LARGE = {"hidden": 384, "feedforward": 2048, **_FROZEN}
_ADN = {"backbone_args": {"avg_down": True}}

PRESETS = {
    "rtdetr_r18vd": Preset({"backbone": "presnet18", "expansion": 0.5, "decoder_layers": 3}),
    "rtdetr_r34vd": Preset({"backbone": "presnet34", "expansion": 0.5, "decoder_layers": 4}),
    "rtdetr_r50vd_m": Preset({"backbone": "presnet50", "expansion": 0.5, **_FROZEN}),
    "rtdetr_r50vd": Preset({"backbone": "presnet50", **_FROZEN}),
    "rtdetr_r101vd": Preset({"backbone": "presnet101", **_LARGE}),
    "anydepth_rtdetr_r50vd": Preset({"backbone": "resnet50", **_ADN, **_FROZEN}, any_depth=True),
    "anydepth_rtdetr_r101vd": Preset({"backbone": "resnet101", **_ADN, **_LARGE}, any_depth=True),
}
