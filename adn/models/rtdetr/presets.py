"""RT-DETR and AnyDepth-DETR by name: arguments of `RTDETR`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import nn

from ...families.transformers_detr import is_detr_of_transformers
from ..entry import Entry
from . import STRIDE
from .hf import official_names
from .names import NAMES
from .recipes import RECIPES, DetectionRecipe

__all__ = ["ADAPTERS", "ENTRIES", "LOOKS", "RECIPES"]


def _build(**kwargs: Any) -> nn.Module:
    from .model import RTDETR  # here, as it loads the kernels

    return RTDETR(**kwargs)


def _adapted(model: nn.Module) -> Any:
    if not is_detr_of_transformers(model):
        return None
    from .transformers import TransformersDetector

    return TransformersDetector(model)


ADAPTERS = (_adapted,)
LOOKS = ((r"\bclass_embed\.|\bdecoder_input_proj\.", "a DETR of Hugging Face's transformers"),
         (r"\bdec_score_head\.", "an RT-DETR"))


def _but(args: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments with some changed. Those of the backbone are kept for a backbone of the same family, and added
    to."""
    changed = {**args, **changes}
    own = args.get("backbone_args") if _family(changed) == _family(args) else None
    return changed | {"backbone_args": {**(own or {}), **(changes.get("backbone_args") or {})}}


def _family(args: Mapping[str, Any]) -> str:
    """"resnet" of "resnet50" and "resnet18.a1_in1k"."""
    return re.match("[a-z]*", str(args["backbone"])).group()


entry = partial(Entry, _build, task=DetectionRecipe.task, stride=STRIDE, recipe=DetectionRecipe, names=NAMES,
                rewrites=(("transformers", lambda given, _own: official_names(given)),), but=_but)

_FROZEN = {"freeze_norm": True, "freeze_stem": True}
_LARGE = {"hidden": 384, "feedforward": 2048, **_FROZEN}
_ADN = {"backbone_args": {"avg_down": True}}

ENTRIES = {
    "rtdetr_r18vd": entry({"backbone": "presnet18", "expansion": 0.5, "decoder_layers": 3}),
    "rtdetr_r34vd": entry({"backbone": "presnet34", "expansion": 0.5, "decoder_layers": 4}),
    "rtdetr_r50vd_m": entry({"backbone": "presnet50", "expansion": 0.5, **_FROZEN}),
    "rtdetr_r50vd": entry({"backbone": "presnet50", **_FROZEN}),
    "rtdetr_r101vd": entry({"backbone": "presnet101", **_LARGE}),
    "anydepth_rtdetr_r50vd": entry({"backbone": "resnet50", **_ADN, **_FROZEN}, any_depth=True),
    "anydepth_rtdetr_r101vd": entry({"backbone": "resnet101", **_ADN, **_LARGE}, any_depth=True),
}
