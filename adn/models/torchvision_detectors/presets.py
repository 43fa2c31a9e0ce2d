"""torchvision's detectors by name, plain and any-depth: arguments of their builders."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn

from ..entry import Entry, Naming
from .recipes import RECIPES, TorchvisionRecipe

__all__ = ["ADAPTERS", "ENTRIES", "RECIPES"]

# The authors' RetinaNet holds its backbone's body in one more module.
NAMES: tuple[Naming, ...] = (("reference", "RetinaNet-ADN", ({"backbone.body.model": "backbone.body"},)),)


def _build(**kwargs: Any) -> nn.Module:
    from .build import build

    return build(**kwargs)


def _adapted(model: nn.Module) -> Any:
    from ...families.torchvision_dense import DETECTORS

    if not isinstance(model, DETECTORS):
        return None
    from .detector import TorchvisionDetector

    return TorchvisionDetector(model)


ADAPTERS = (_adapted,)


def _of_size(size: int) -> dict[str, Any]:
    """The shorter side, and the longer one at most: as 800 and 1333."""
    return {"min_size": size, "max_size": size * 5 // 3}


entry = partial(Entry, _build, task=TorchvisionRecipe.task, stride=1, recipe=TorchvisionRecipe, names=NAMES,
                background=1, of_size=_of_size)

_FPN = {f"{kind}_resnet50_fpn{version}": {"builder": f"{kind}_resnet50_fpn{version}"}
        for kind, versions in (("fasterrcnn", ("", "_v2")), ("maskrcnn", ("", "_v2")), ("retinanet", ("", "_v2")),
                               ("fcos", ("",))) for version in versions}
_MOBILE = {f"fasterrcnn_mobilenet_v3_large{size}_fpn": {"builder": f"fasterrcnn_mobilenet_v3_large{size}_fpn"}
           for size in ("", "_320")}
_FROZEN = ("fasterrcnn", "maskrcnn", "retinanet")

ENTRIES = {
    **{name: entry(args, masks="maskrcnn" in name) for name, args in {**_FPN, **_MOBILE}.items()},
    "ssdlite320_mobilenet_v3_large": entry({"builder": "ssdlite320_mobilenet_v3_large"}, of_size=lambda size: {}),
    # As published: fixed norms, second ones too, a stem and a first stage that do not learn.
    **{f"anydepth_{kind}_resnet50_fpn": entry({"builder": f"{kind}_resnet50_fpn", "frozen": True}, any_depth=True,
                                              masks=kind == "maskrcnn") for kind in _FROZEN},
}
