"""Do detectors learn, at both extremes of the depth? Eight pictures of COCO are learnt by heart. Needs a folder of data
(ADN_DATA)."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, Subset

import adn
from adn.data.coco import collate, open_coco
from adn.data.transforms import eval_transform
from adn.measure.average_precision import evaluate_detector
from adn.models.registry import interface_of
from adn.models.torchvision_detectors.recipes import TorchvisionRecipe

DATA = Path(os.environ.get("ADN_DATA", Path(__file__).parents[3] / "shared" / "data")) / "coco_mini"
FEW = {"channels": 64, "smallest_anchor": 16, "min_size": 128, "max_size": 192}
PROPOSALS = {"box_batch_size_per_image": 24, "rpn_pre_nms_top_n_train": 200, "rpn_post_nms_top_n_train": 100,
             "rpn_pre_nms_top_n_test": 200, "rpn_post_nms_top_n_test": 100}


@pytest.mark.full
@pytest.mark.parametrize(("name", "arguments", "steps", "lr"), [
    ("maskrcnn_resnet18_fpn", PROPOSALS, 120, 1e-3), ("retinanet_resnet18_fpn", {}, 200, 1e-3)])
def test_eight_pictures_by_heart(name: str, arguments: dict[str, int], steps: int, lr: float) -> None:
    """Boxes, and outlines where the detector finds them: a half or more of what there is, at either depth."""
    if not DATA.exists():
        pytest.skip(f"no {DATA} (set ADN_DATA)")
    torch.manual_seed(0)
    masks = "mask" in name
    data = open_coco(DATA, "train", eval_transform(None), masks=masks)
    shown = Subset(data, [i for i in range(len(data)) if len(data[i][1]["labels"]) <= 8][:8])
    net = adn.convert(adn.create_model(name, num_classes=81, **FEW, **arguments)).train()
    loss = interface_of(net).distillation(TorchvisionRecipe(), ())
    optimizer = torch.optim.AdamW(net.parameters(), lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps)
    batch = collate([shown[i] for i in range(8)])
    for _ in range(steps):
        optimizer.zero_grad()
        loss.backward(*batch)
        torch.nn.utils.clip_grad_norm_(net.parameters(), 5.0)
        optimizer.step()
        schedule.step()
    rows = evaluate_detector(net, DataLoader(shown, 4, collate_fn=collate), ["super", "base"])
    for row in rows:
        print(name, row)
        assert row.ap50 > 50
        assert not masks or row.mask_ap50 > 50
