"""torchvision's detectors by name, plain and any-depth: arguments of their builders."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn

from ..entry import Entry, Naming, State
from .recipes import RECIPES, TorchvisionRecipe

__all__ = ["ADAPTERS", "ENTRIES", "LOOKS", "RECIPES"]

# The authors' RetinaNet holds its backbone's body in one more module.
NAMES: tuple[Naming, ...] = (("reference", "RetinaNet-ADN", ({"backbone.body.model": "backbone.body"},)),)

# The numbers that COCO's categories have, and 0 of the background.
_CATEGORIES = [i for i in range(91) if i not in (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)]


def _of_categories(given: State, own: State) -> dict[str, torch.Tensor] | None:
    """Of heads for 91 numbers of categories, as torchvision trained them on COCO, those of the 80 that there are, in a
    net for these; None of others."""
    found, count = {}, len(_CATEGORIES)
    for name, tensor in given.items():
        rows, wanted = len(tensor) if tensor.ndim else 0, len(own[name]) if name in own and own[name].ndim else 0
        if rows == wanted or rows % 91 or wanted * 91 != rows * count:
            continue
        # Boxes: of each class its four; all else: of each anchor its classes.
        by_class = (91, -1) if "bbox_pred" in name else (-1, 91)
        parts = tensor.unflatten(0, by_class)
        found[name] = (parts[_CATEGORIES] if by_class[0] == 91 else parts[:, _CATEGORIES]).flatten(0, 1)
    return {**given, **found} if found else None


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
LOOKS = ((r"\broi_heads\.mask_predictor\.", "a Mask R-CNN of torchvision"),
         (r"\broi_heads\.", "a Faster R-CNN of torchvision"),
         (r"\bhead\.classification_head\.", "a RetinaNet, FCOS or SSD of torchvision"))


def _of_size(size: int) -> dict[str, Any]:
    """The shorter side, and the longer one at most: as 800 and 1333."""
    return {"min_size": size, "max_size": size * 5 // 3}


entry = partial(Entry, _build, task=TorchvisionRecipe.task, stride=1, recipe=TorchvisionRecipe, names=NAMES,
                rewrites=(("torchvision, numbers of COCO's categories", _of_categories),),
                background=1, of_size=_of_size)

_FPN = {f"{kind}_resnet50_fpn{version}": {"builder": f"{kind}_resnet50_fpn{version}"}
        for kind, versions in (("fasterrcnn", ("", "_v2")), ("maskrcnn", ("", "_v2")), ("retinanet", ("", "_v2")),
                               ("fcos", ("",))) for version in versions}
_MOBILE = {f"fasterrcnn_mobilenet_v3_large{size}_fpn": {"builder": f"fasterrcnn_mobilenet_v3_large{size}_fpn"}
           for size in ("", "_320")}
_SMALL = {f"{kind}_resnet18_fpn": {"builder": f"{kind}_resnet18_fpn"}
          for kind in ("fasterrcnn", "maskrcnn", "retinanet")}
_FROZEN = ("fasterrcnn", "maskrcnn", "retinanet")

ENTRIES = {
    **{name: entry(args, masks="maskrcnn" in name) for name, args in {**_FPN, **_SMALL, **_MOBILE}.items()},
    "ssdlite320_mobilenet_v3_large": entry({"builder": "ssdlite320_mobilenet_v3_large"}, of_size=lambda size: {}),
    # As published: fixed norms, second ones too, a stem and a first stage that do not learn.
    **{f"anydepth_{kind}_resnet50_fpn": entry({"builder": f"{kind}_resnet50_fpn", "frozen": True}, any_depth=True,
                                              masks=kind == "maskrcnn") for kind in _FROZEN},
}
