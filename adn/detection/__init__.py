"""Detection: RT-DETR at any depth, its losses, COCO data and evaluation.

    net = adn.create_model("anydepth_rtdetr_r50vd")
    data = adn.detection.open_coco("coco", "val")
"""

from __future__ import annotations

import sys

from torch import nn

from ..state import is_any_depth, unwrap


def is_detector(net: nn.Module) -> bool:
    """Is it a detector, any-depth or of one depth, and not a classifier?"""
    # Importing the class would bring the kernels; who holds a detector has imported it.
    known = sys.modules.get(f"{__name__}.rtdetr")
    return known is not None and isinstance(unwrap(net) if is_any_depth(net) else net, known.RTDETR)
