"""Detection: RT-DETR at any depth, its losses, COCO data and evaluation.

    net = adn.create_model("anydepth_rtdetr_r50vd")
    data = open_coco("coco", "val", eval_transform(640))
    rows = evaluate_detector(net, DataLoader(data, 8, collate_fn=collate), ["super", "base"])
"""

from __future__ import annotations

import importlib

from torch import nn

from ..state import is_any_depth, unwrap

# By the module that has them; loaded when first asked for, as some bring the kernels.
_LATER = {
    "CocoImages": "coco", "collate": "coco", "open_coco": "coco",
    "DetectionLoss": "criterion", "DistillationLoss": "criterion",
    "DetectionDistillation": "distill", "DetectionSupervised": "distill",
    "draw_detections": "draw",
    "detection_table": "evaluate", "evaluate_detector": "evaluate",
    "RTDETR": "rtdetr",
    "write_scenes": "scenes",
    "eval_transform": "transforms", "train_transform": "transforms",
}

__all__ = [*_LATER, "is_detector"]


def is_detector(net: nn.Module) -> bool:
    """Is it a detector, any-depth or of one depth, and not a classifier?"""
    # Not by its class, whose import would bring the kernels.
    return getattr(unwrap(net) if is_any_depth(net) else net, "adn_task", "classify") == "detect"


def __getattr__(name: str) -> object:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(f".{_LATER[name]}", __name__), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LATER})
