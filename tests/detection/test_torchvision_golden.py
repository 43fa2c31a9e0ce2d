"""Any-depth RetinaNet, Faster R-CNN and Mask R-CNN against fixtures of the reference (the R-CNNs' are derived)."""

from __future__ import annotations

import re

import numpy as np
import torch
from torch import nn
from torchvision.models.detection.image_list import ImageList

import adn
from adn.detect.distill import DetectorDistillation

_ARGUMENTS = ("num_classes", "min_size", "max_size", "score_thresh", "nms_thresh", "detections_per_img",
              "topk_candidates", "trainable_backbone_layers", "rpn_batch_size_per_image", "box_batch_size_per_image",
              "rpn_pre_nms_top_n_train", "rpn_post_nms_top_n_train")


def a_case(name: str, kind: str, golden, seeded, dtype: torch.dtype) -> tuple[nn.Module, dict, dict, list]:
    manifest, arrays = golden(name)
    arguments = {key: value for key, value in manifest["build"].items() if key in _ARGUMENTS}
    torch.manual_seed(0)
    net = adn.create_model(f"anydepth_{kind}_resnet50_fpn", **arguments)
    report = adn.load_weights(net, seeded.reference_state(manifest), strict=False)
    assert report.missing == manifest.get("keep", []), report
    assert not report.unexpected, report
    assert not report.mismatched, report
    images = [seeded.seeded_input(spec, seed=manifest["seed"]).to(dtype) for spec in manifest["inputs"].values()]
    return net.to(dtype), manifest, arrays, images


def targets_of(manifest: dict, images: list) -> list[dict]:
    targets = []
    for image, boxes, labels in zip(images, manifest["boxes"], manifest["labels"], strict=True):
        target = {"boxes": torch.tensor(boxes, dtype=image.dtype), "labels": torch.tensor(labels)}
        if "masks" in manifest:
            target["masks"] = torch.zeros(len(boxes), *image.shape[-2:], dtype=torch.uint8)
            for mask, (x0, y0, x1, y1) in zip(target["masks"], boxes, strict=True):
                mask[y0:y1, x0 : (x0 + x1) // 2] = 1
        targets.append(target)
    return targets


def every(x: torch.Tensor, step: int) -> np.ndarray:
    return x.detach().double().flatten()[::step].numpy()


def close(found: np.ndarray, wanted: np.ndarray, rtol: float, atol: float) -> None:
    np.testing.assert_allclose(found, wanted, rtol=rtol, atol=atol)


def maps_and_body(net: nn.Module, x: torch.Tensor) -> tuple[dict, dict]:
    body = net.backbone.body(x)
    return net.backbone.fpn(dict(body)), body


def test_retinanet_at_every_depth(golden, seeded) -> None:
    net, manifest, arrays, images = a_case("anydepth_retinanet_r50", "retinanet", golden, seeded, torch.float32)
    net.eval()
    steps = manifest["steps"]
    for depth in manifest["configs"]:
        adn.set_depth(net, depth)
        with torch.no_grad():
            x, _ = net.transform(images)
            maps, body = maps_and_body(net, x.tensors)
            outputs = net.head(list(maps.values()))
            for name in ("cls_logits", "bbox_regression"):
                close(every(outputs[name], steps[name]), arrays[f"{depth}/{name}"], 1e-4, 2e-4)
            for i, value in enumerate(maps.values(), 3):
                step = 122 if value.numel() > 20_000 else 14
                close(every(value, step), arrays[f"{depth}/p{i}"], 1e-4, 2e-4)
            for i, value in enumerate(body.values(), 3):
                close(every(value, steps["c"]), arrays[f"{depth}/c{i}"], 1e-4, 2e-4)
            if depth not in ("FFFF", "TTTT"):
                continue
            for i, found in enumerate(net(images)):
                wanted = {key: torch.from_numpy(arrays[f"{depth}/det{i}/{key}"]) for key in found}
                assert len(found["boxes"]) == len(wanted["boxes"])
                # Scores that are nearly the same may swap.
                distance = (found["boxes"][:, None] - wanted["boxes"]).abs().amax(-1) + 1e3 * (
                    found["labels"][:, None] != wanted["labels"])
                nearest, pair = distance.min(1)
                assert nearest.max() < 0.02
                assert len(set(pair.tolist())) == len(pair)
                assert (found["scores"] - wanted["scores"][pair]).abs().max() < 1e-4


def test_faster_rcnn_at_every_depth(golden, seeded) -> None:
    net, manifest, arrays, images = a_case("anydepth_fasterrcnn_r50", "fasterrcnn", golden, seeded, torch.float32)
    net.eval()
    steps, proposals = manifest["steps"], [torch.tensor(boxes).float() for boxes in manifest["proposals"]]
    for depth in manifest["configs"]:
        adn.set_depth(net, depth)
        with torch.no_grad():
            x: ImageList = net.transform(images)[0]
            maps = net.backbone(x.tensors)
            objectness, deltas = net.rpn.head(list(maps.values()))
            boxes = net.roi_heads.box_head(net.roi_heads.box_roi_pool(maps, proposals, x.image_sizes))
            logits, regression = net.roi_heads.box_predictor(boxes)
            found = {"objectness": torch.cat([o.flatten(1) for o in objectness], 1),
                     "rpn_deltas": torch.cat([d.flatten(1) for d in deltas], 1),
                     "class_logits": logits, "box_regression": regression}
        for name, value in found.items():
            close(every(value, steps[name]), arrays[f"{depth}/{name}"], 2e-4, 2e-4)
        for i in range(2, 6):
            value = maps[str(i - 2)]
            step = steps["p"] if value.numel() > 20_000 else 14
            close(every(value, step), arrays[f"{depth}/p{i}"], 2e-4, 2e-4)


def gradient_norms(net: nn.Module, names: list[str]) -> np.ndarray:
    parameters = dict(net.named_parameters())
    ours = [re.sub(r"_skip\.", ".skip.", name.replace("backbone.body.model.", "backbone.body.")) for name in names]
    return np.array([np.nan if parameters[name].grad is None else parameters[name].grad.double().norm().item()
                     for name in ours])


def norms_of(net: nn.Module, loss: torch.Tensor, names: list[str]) -> np.ndarray:
    net.zero_grad()
    loss.backward(retain_graph=True)
    return gradient_norms(net, names)


def compared(found: np.ndarray, wanted: np.ndarray, rtol: float, atol: float) -> None:
    assert np.array_equal(np.isnan(found), np.isnan(wanted))
    np.testing.assert_allclose(found, wanted, rtol=rtol, atol=atol, equal_nan=True)


def test_the_published_step_of_retinanet(golden, seeded) -> None:
    net, manifest, arrays, images = a_case("anydepth_retinanet_r50_step", "retinanet", golden, seeded, torch.float64)
    targets, tolerance, names = targets_of(manifest, images), manifest["tolerance"], manifest["gradnorm_names"]
    net.train()
    kd = DetectorDistillation(net)
    of_super, of_base = kd._run_at(images, targets, "super"), kd._run_at(images, targets, "base")
    for which, one in (("super", of_super), ("base", of_base)):
        for name in ("classification", "bbox_regression"):
            close(one.losses[name].item(), arrays[f"{which}/{name}"], tolerance["losses_rtol"], 0)
        compared(norms_of(net, sum(one.losses.values()), names), arrays[f"gradnorm/{which}"],
                 tolerance["gradnorm_rtol"], tolerance["gradnorm_atol"])
    everything = DetectorDistillation(net, levels="all", base="features")
    terms = everything._base_terms(of_base, targets, of_super)
    levels = [2 * terms[f"base.kd_{name}"].item() for name in of_super.pooled]  # weighted by 1 - alpha
    close(levels, arrays["kd_levels"], **tolerance["kd"])
    compared(norms_of(net, 2 * terms["base"], names), arrays["gradnorm/kd_sum"], **{
        key: tolerance["gradnorm_kd"][key] for key in ("rtol", "atol")})
    alone = DetectorDistillation(net, base="features")._base_terms(of_base, targets, of_super)
    assert list(alone) == [f"base.kd_{list(of_super.pooled)[manifest['chosen_level']]}", "base"]
    compared(norms_of(net, 2 * alone["base"], names), arrays["gradnorm/kd"], **{
        key: tolerance["gradnorm_kd"][key] for key in ("rtol", "atol")})
    for way in ("at once", "in two"):
        net.zero_grad()
        losses = kd(images, targets) if way == "at once" else kd.backward(images, targets)
        if way == "at once":
            losses["loss"].backward()
        close(losses["loss"].item(), arrays["exp1/total"], tolerance["losses_rtol"], 0)
        compared(gradient_norms(net, names), arrays["gradnorm/total"], tolerance["gradnorm_rtol"],
                 tolerance["gradnorm_atol"])


def test_a_step_of_mask_rcnn(golden, seeded) -> None:
    net, manifest, arrays, images = a_case("anydepth_maskrcnn_r50_step", "maskrcnn", golden, seeded, torch.float64)
    targets, tolerance, names = targets_of(manifest, images), manifest["tolerance"], manifest["gradnorm_names"]
    net.train()
    kd = DetectorDistillation(net)
    of_super, of_base = kd._run_at(images, targets, "super"), kd._run_at(images, targets, "base")
    for which, one in (("super", of_super), ("base", of_base)):
        assert len(one.losses) == 5
        for name, value in one.losses.items():
            close(value.item(), arrays[f"{which}/{name}"], tolerance["losses_rtol"], 0)
        compared(norms_of(net, sum(one.losses.values()), names), arrays[f"gradnorm/{which}"],
                 tolerance["gradnorm_rtol"], tolerance["gradnorm_atol"])
    terms = DetectorDistillation(net, base="features")._base_terms(of_base, targets, of_super)
    close([2 * terms[f"base.kd_{level}"].item() for level in "0123"], arrays["kd_levels"][:4], **tolerance["kd"])
    assert "base.kd_pool" not in terms
    compared(norms_of(net, 2 * terms["base"], names), arrays["gradnorm/kd"], **{
        key: tolerance["gradnorm_kd"][key] for key in ("rtol", "atol")})


def test_costs_are_the_published() -> None:
    net = adn.create_model("anydepth_retinanet_resnet50_fpn")
    assert sum(p.numel() for p in net.parameters()) == 34_014_999
    twins = sum(b.numel() for name, b in net.named_buffers() if ".skip." in name)
    assert twins == 52_224
