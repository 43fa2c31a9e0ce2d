"""Names for scripts, by which detection was once imported; what they name is in `adn.models.rtdetr`, `adn.detect`,
`adn.data` and `adn.measure`. Nothing in this library imports it.

    net = adn.create_model("anydepth_rtdetr_r50vd")
    data = open_coco("coco", "val", eval_transform(640))
    rows = evaluate_detector(net, DataLoader(data, 8, collate_fn=collate), ["super", "base"])
    found = postprocess(net.eval()(images), sizes)
"""

from __future__ import annotations

import importlib
import sys

from ..data.coco import CocoImages, collate, open_coco
from ..data.scenes import write_scenes
from ..data.transforms import eval_transform, train_transform
from ..detect.distill import DetectorDistillation
from ..detect.draw import draw_detections
from ..measure.average_precision import detection_table, evaluate_detector
from ..models.rtdetr.criterion import DetectionLoss, DistillationLoss
from ..models.rtdetr.distill import DetectionDistillation, DetectionSupervised
from ..models.rtdetr.model import RTDETR
from ..models.rtdetr.postprocess import postprocess
from ..tasks import is_detector

__all__ = [
    "RTDETR", "CocoImages", "DetectionDistillation", "DetectionLoss", "DetectionSupervised", "DetectorDistillation",
    "DistillationLoss", "collate", "detection_table", "draw_detections", "eval_transform", "evaluate_detector",
    "is_detector", "open_coco", "postprocess", "train_transform", "write_scenes",
]

for _name, _module in {
    "boxes": "detect.boxes", "matcher": "models.rtdetr.matcher", "criterion": "models.rtdetr.criterion",
    "decoder": "models.rtdetr.decoder", "deformable": "models.rtdetr.deformable",
    "denoising": "models.rtdetr.denoising", "encoder": "models.rtdetr.encoder", "rtdetr": "models.rtdetr.model",
}.items():
    globals()[_name] = sys.modules[f"{__name__}.{_name}"] = importlib.import_module(f"adn.{_module}")
