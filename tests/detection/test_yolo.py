"""YOLOv12 at any depth: the reference's numbers, conversion, losses, training."""

from __future__ import annotations

import copy
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import few, randomise
from torch import nn

import adn
from adn.core.state import is_any_depth
from adn.measure.cost import count_macs, count_parameters
from adn.models.yolov12 import layers
from adn.models.yolov12.criterion import DetectionLoss, DistillationLoss, Predictions, objects_of
from adn.models.yolov12.distill import YOLODistillation
from adn.models.yolov12.head import Distances, decoded
from adn.models.yolov12.postprocess import suppressed

TABLE = torch.arange(16.0)[None, :, None, None]  # of distances, which the fixtures leave out
LEVELS = range(3)
COMPARED = (1, 2, 4, 5, 6)  # of the fixtures' seven features


def of_reference(name: str, golden: Any, seeded: Any, **kwargs: Any) -> tuple[nn.Module, torch.Tensor, dict, dict]:
    manifest, arrays = golden({"yolov12n": "yolov12n_baseline", "yolo12n": "yolo12n_ultralytics"}.get(name, name))
    net = adn.create_model(name.removesuffix("_step"), **kwargs)
    adn.load_weights(net, {**seeded.reference_state(manifest), "model.21.dfl.conv.weight": TABLE})
    return net, seeded.seeded_input(manifest["inputs"]["x"], manifest["seed"]), manifest, arrays


def flat(maps: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([x.flatten(2) for x in maps], 2)


def close(found: torch.Tensor, expected: np.ndarray, atol: float = 1e-5, every: int = 1) -> None:
    np.testing.assert_allclose(found.detach().flatten()[::every].numpy(), expected.reshape(-1), rtol=1e-5, atol=atol)


# ------------------------------------------------------------------------------------------- the reference's numbers


@pytest.mark.parametrize("name", ["yolov12n", "yolo12n"])
def test_static_models_of_the_repository_and_of_the_package(name: str, golden, seeded) -> None:
    net, x, _, arrays = of_reference(name, golden, seeded)
    assert not is_any_depth(net)
    for model in (net, adn.convert(copy.deepcopy(net))):
        with torch.inference_mode():
            outputs = model.eval()(x)
        if name == "yolov12n":
            for i in LEVELS:
                close(outputs["maps"][i], arrays[f"raw{i}"])
        else:
            maps = flat(outputs["maps"])
            close(maps[:, :64], arrays["boxes"])
            close(maps[:, 64:], arrays["scores"])
        close(outputs["decoded"], arrays["decoded"], atol=5e-4)  # pixels


@pytest.mark.parametrize("name", ["anydepth_yolov12n", "anydepth_yolov12s_orig"])
def test_every_configuration_of_the_reference(name: str, golden, seeded) -> None:
    net, x, manifest, arrays = of_reference(name, golden, seeded)
    assert len(adn.get_depth(net)) == 8
    net.eval()
    for i, depth in enumerate(manifest["configs"]):
        with torch.inference_mode(), adn.at_depth(net, depth):
            outputs = net(x)
        close(flat(outputs["maps"]), arrays[f"raw_{i}"], every=manifest["subsample"])
        if f"decoded_{i}" in arrays:
            close(outputs["decoded"], arrays[f"decoded_{i}"], atol=5e-4)


class Holder(nn.Module):
    """A layer alone, as a model has it."""

    def __init__(self, layer: nn.Module, split: str | None) -> None:
        super().__init__()
        self.model, self.split = nn.ModuleList([layer]), split

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model[0](x)


def a_part(kind: str, args: dict[str, Any]) -> nn.Module:
    name, n = kind.removeprefix("Skippable").removeprefix("Switchable"), args.get("n", 1)
    if name == "Conv":
        return layers.Conv(args["c1"], args["c2"], args["k"], args["s"], args["g"])
    if name == "AAttn":
        return layers.AAttn(args["dim"], args["area"])
    if name == "ABlock":
        return layers.ABlock(args["dim"], args["mlp_ratio"], args["area"])
    if name == "A2C2f":
        return layers.A2C2f(args["c1"], args["c2"], n, max(args["area"], 0), args.get("residual", False),
                            args.get("mlp_ratio", 2.0))
    layer = layers.C3k2(args["c1"], args["c2"], n, args.get("c3k", False), args.get("e", 0.5))
    if name == "C2f":
        layer.m = nn.ModuleList(layers.Bottleneck(args["c2"] // 2, expansion=1.0) for _ in range(n))
    return layer


PARTS = ["conv_silu", "switchable_conv_g4", "aattn_area1", "aattn_area4", "ablock_area4", "a2c2f_area4_residual",
         "a2c2f_area1", "a2c2f_c3k", "c3k2_bottleneck", "c3k2_c3k", "skippable_c2f_n3", "skippable_c3k2_n2",
         "skippable_c3k2_n2_c3k", "switchable_c3k2_n2", "switchable_c3k2_n2_c3k", "skippable_a2c2f_n4",
         "skippable_a2c2f_n3", "skippable_a2c2f_n2_c3k"]


@pytest.mark.parametrize("part", PARTS)
def test_single_modules_in_both_modes(part: str, golden, seeded) -> None:
    manifest, arrays = golden("yolov12_parts")
    assert sorted(PARTS) == sorted(manifest["parts"])
    about = manifest["parts"][part]
    split = next((split for kind, split in (("Skippable", "blocks"), ("Switchable", "inside"))
                  if about["type"].startswith(kind)), None)
    net = Holder(a_part(about["type"], about["args"]), split)
    if about["type"] == "SwitchableConv":
        net = adn.convert(net, plan=[adn.StagePlan("conv", ["model.0"], 1, ["model.0.bn"], flag="conv")])
    elif split is not None:
        net = adn.convert(net)
    state = seeded.seeded_state_dict([row for row in about["state"] if row[2] != "int64"], manifest["seed"])
    adn.load_weights(net, {f"model.0.{name}": value for name, value in state.items()})
    x = seeded.seeded_input(manifest["inputs"]["x"], manifest["seed"])
    with torch.inference_mode():
        for mode, depth in (("out", None), ("out_full", "super"), ("out_skip", "base")):
            if mode in about["outputs"]:
                if depth is not None:
                    adn.set_depth(net, depth)
                close(net.eval()(x), arrays[f"{part}.{mode}"], every=manifest["subsample"])


def test_decoding_and_suppression(golden, seeded) -> None:
    manifest, arrays = golden("yolov12_decode_nms")
    maps = [seeded.seeded_input(manifest["inputs"][f"raw{i}"], manifest["seed"]) * manifest["input_scale"]
            for i in LEVELS]
    bins, logits = flat(maps).split((64, 5), 1)
    distances = Distances()(bins)
    close(distances, arrays["dfl"])
    found = decoded(distances, logits, maps)
    close(found, arrays["decoded"], atol=5e-4)
    for i, settings in enumerate(manifest["configs"]):
        results = suppressed(found, conf=settings["conf_thres"], iou=settings["iou_thres"], top=settings["max_det"],
                             multi_label=settings["multi_label"], class_agnostic=settings.get("agnostic", False))
        for b, result in enumerate(results):
            rows = torch.cat((result["boxes"], result["scores"][:, None], result["labels"][:, None]), 1)
            assert rows.shape == arrays[f"nms_{i}_{b}"].shape
            close(rows, arrays[f"nms_{i}_{b}"], atol=5e-4)


def some_targets(rows: dict[str, list], images: int = 2, dtype: torch.dtype = torch.float32
                 ) -> list[dict[str, torch.Tensor]]:
    image = torch.tensor(rows["batch_idx"], dtype=torch.int64)
    labels = torch.tensor(rows["cls"], dtype=torch.int64)
    boxes = torch.tensor(rows["bboxes"], dtype=dtype).reshape(-1, 4)
    return [{"labels": labels[image == i], "boxes": boxes[image == i]} for i in range(images)]


@pytest.mark.parametrize("case", ["two_images", "one_empty_image", "no_objects"])
def test_losses_and_their_gradients(case: str, golden, seeded) -> None:
    manifest, arrays = golden("yolov12_losses")
    given = {name: seeded.seeded_input(about, manifest["seed"]) for name, about in manifest["inputs"].items()}
    expected, every = manifest["cases"][case], manifest["subsample"]
    targets = some_targets(expected["targets"])
    maps = [(given[f"super_raw{i}"] * 1.5).requires_grad_() for i in LEVELS]
    terms = DetectionLoss()({"maps": maps}, targets)
    total = sum(terms.values())
    total.backward()
    assert total.item() == pytest.approx(expected["det_total"], rel=1e-6)
    assert [term.item() / 2 for term in terms.values()] == pytest.approx(expected["det_items"], rel=1e-5)
    close(flat([x.grad for x in maps]), arrays[f"{case}.det_grad"], every=every)

    assigned = Predictions.of(maps).assign(objects_of(maps, targets))
    assert assigned.positive.sum() == expected["fg"]
    if expected["fg"]:
        positive = assigned.positive.numpy()
        assert np.array_equal(positive, arrays[f"{case}.fg_mask"].astype(bool))
        assert np.array_equal(assigned.slot.numpy()[positive], arrays[f"{case}.target_gt_idx"][positive])
        close(assigned.weight, arrays[f"{case}.target_scores"])

    base = [(given[f"super_raw{i}"] * 1.5 + given[f"noise_raw{i}"] * 0.45).requires_grad_() for i in LEVELS]
    features = [(given[f"super_feat{i}"] + 0.5 * given[f"noise_feat{i}"]).requires_grad_() for i in COMPARED]
    of_super = {"maps": [x.detach() for x in maps], "features": [given[f"super_feat{i}"] for i in COMPARED]}
    terms = DistillationLoss()({"maps": base, "features": features}, of_super, targets)
    total = sum(terms.values())
    total.backward()
    assert total.item() == pytest.approx(expected["kd_total"], rel=1e-5)
    assert [term.item() / 2 for term in terms.values()] == pytest.approx(expected["kd_items"], rel=1e-5, abs=1e-7)
    close(flat([x.grad for x in base]), arrays[f"{case}.kd_grad"], every=every)
    widths = [given[f"super_feat{i}"].shape[1] for i in range(7)]
    wanted = np.split(arrays[f"{case}.kd_feat_grad"], np.cumsum(widths)[:-1], axis=1)
    for i, feature in zip(COMPARED, features, strict=True):
        close(feature.grad, wanted[i])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_step_of_distillation(dtype: torch.dtype, golden, seeded) -> None:
    net, x, manifest, arrays = of_reference("anydepth_yolov12n_step", golden, seeded, num_classes=5)
    net = net.to(dtype).train()
    losses = YOLODistillation(net).backward(x.to(dtype), some_targets(manifest["targets"], dtype=dtype))
    double = dtype == torch.float64
    expected = manifest["losses_float64" if double else "losses"]
    assert losses["super"].item() == pytest.approx(expected["loss_super"], rel=3e-6)
    assert losses["base"].item() == pytest.approx(expected["loss_second"], rel=3e-6)
    def ours(name: str) -> str:
        return name.replace("_skip.", ".skip.")

    parameters, buffers = dict(net.named_parameters()), dict(net.named_buffers())
    norms = [np.nan if (p := parameters[ours(name)]).grad is None else p.grad.norm().item()
             for name in manifest["grad_names"]]
    wanted = arrays["grad_norm_float64" if double else "grad_norm"]
    np.testing.assert_allclose(norms, wanted, rtol=2e-6 if double else 1e-4, atol=1e-7 if double else 1e-5)
    means = [buffers[ours(name)].double().mean().item() for name in manifest["buffer_names"]]
    np.testing.assert_allclose(means, arrays["buffer_means"], atol=1e-6)


# ---------------------------------------------------------------------------------------------------------- conversion


class Brought(nn.Module):
    """As the package has it: layers that know their index and their sources."""

    def __init__(self) -> None:
        super().__init__()
        own = adn.create_model("yolo12n", num_classes=5)
        sources = {10: [-1, 6], 13: [-1, 4], 16: [-1, 11], 19: [-1, 8], 21: [14, 17, 20]}
        for i, layer in enumerate(own.model):
            layer.i, layer.f, layer.type = i, sources.get(i, -1), type(layer).__name__
        self.model, self.save = nn.Sequential(*own.model), [4, 6, 8, 11, 14, 17, 20]

    def forward(self, x: torch.Tensor) -> Any:
        kept: list[torch.Tensor | None] = []
        for layer in self.model:
            if layer.f != -1:
                x = [x if i == -1 else kept[i] for i in layer.f]
            x = layer(x)
            kept.append(x if layer.i in self.save else None)
        return x


def test_a_model_that_the_user_brings() -> None:
    """By the names of classes and of attributes alone; equal at full depth."""
    torch.manual_seed(0)
    model = randomise(Brought()).eval()
    x = torch.rand(1, 3, 64, 96)
    with torch.inference_mode():
        expected = flat(model(x)["maps"])
        net = adn.convert(model)
        assert adn.plan(Brought()).family == "yolo"
        assert len(adn.get_depth(net)) == 6
        seen = []
        for depth in ("super", "TTFFFF", "FFTTTF", "base"):
            with adn.at_depth(net, depth):
                seen.append(flat(net(x)["maps"]))
                torch.testing.assert_close(flat(adn.extract(net, depth)(x)["maps"]), seen[-1])
    assert torch.equal(seen[0], expected)
    assert all(not torch.allclose(a, b) for i, a in enumerate(seen) for b in seen[:i])


def test_a_fused_model_is_refused() -> None:
    model = Brought()
    for module in model.modules():
        if isinstance(module, layers.Conv):
            module.bn = nn.Identity()
    with pytest.raises(adn.ConversionError, match=r"'model' have no norms: .*\(fused\)"):
        adn.convert(model)


def test_a_pickled_model_is_not_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the package writes them: the message says how it exports weights."""
    module = types.ModuleType("ultralytics.nn.tasks")
    module.DetectionModel = type("DetectionModel", (), {"__module__": module.__name__})
    for name in ("ultralytics", "ultralytics.nn", module.__name__):
        monkeypatch.setitem(sys.modules, name, module)
    torch.save({"model": module.DetectionModel()}, tmp_path / "yolo.pt")
    with pytest.raises(adn.CheckpointError, match=r"ultralytics.nn.tasks.DetectionModel.*not run.*YOLO\(path\).model"):
        adn.load_weights(adn.create_model("yolo12n"), tmp_path / "yolo.pt")


def test_all_are_listed_and_there_are_256_depths() -> None:
    names = [f"{form}{scale}" for form in ("yolov12", "yolo12") for scale in "nsmlx"]
    names += [f"anydepth_yolov12{scale}{ending}" for scale in "nslx" for ending in ("", "_orig")]
    assert set(names) <= set(adn.list_models())
    with torch.device("meta"):
        assert all(len(adn.depths(adn.create_model(name))) == 256 for name in names if name.startswith("any"))


@pytest.mark.parametrize(("images", "message"), [
    (torch.rand(3, 64, 64), "pass \\(B, 3, H, W\\)"), (torch.zeros(1, 3, 64, 64, dtype=torch.uint8), "uint8"),
    (torch.rand(1, 3, 64, 72), "72 x 64 pixels; both sides must be multiples of 32"),
], ids=["shape", "type", "size"])
def test_images_that_do_not_fit(images: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        adn.create_model("yolov12n", num_classes=5)(images)


# Parameters; GFLOPs (two for each multiply-add) at 640 pixels of the super-net, the base-net, one stage bypassed.
COUNTS: dict[str, tuple[int, dict[str, float]]] = {
    "yolov12n": (2_553_904, {"super": 6.97}),
    "yolov12s": (9_127_424, {"super": 21.40}),
    "yolov12m": (19_670_784, {"super": 63.08}),
    "yolov12l": (26_506_496, {"super": 88.95}),
    "yolov12x": (59_414_176, {"super": 194.42}),
    "yolo12n": (2_602_288, {}),
    "yolo12l": (26_450_784, {}),
    "anydepth_yolov12n": (3_310_944, {
        "super": 8.97, "base": 7.36, "TFFFFFFF": 8.97, "FTFFFFFF": 8.97, "FFTFFFFF": 8.40, "FFFTFFFF": 8.57,
        "FFFFTFFF": 8.80, "FFFFFTFF": 8.80, "FFFFFFTF": 8.80, "FFFFFFFT": 8.85}),
    "anydepth_yolov12s_orig": (7_443_008, {
        "super": 25.51, "base": 17.88, "TFFFFFFF": 24.83, "FTFFFFFF": 24.83, "FFTFFFFF": 22.27, "FFFTFFFF": 24.70,
        "FFFFTFFF": 24.83, "FFFFFTFF": 24.83, "FFFFFFTF": 24.83, "FFFFFFFT": 25.34}),
    "anydepth_yolov12s": (7_443_808, {"super": 25.51, "base": 19.30}),
    "anydepth_yolov12l": (27_349_504, {
        "super": 88.95, "base": 64.75, "TFFFFFFF": 87.06, "FTFFFFFF": 87.06, "FFTFFFFF": 79.53, "FFFTFFFF": 86.59,
        "FFFFTFFF": 86.22, "FFFFFTFF": 86.22, "FFFFFFTF": 86.22, "FFFFFFFT": 88.47}),
    "anydepth_yolov12l_orig": (27_347_712, {"super": 88.95, "base": 62.03}),
}
IN_USE = {"anydepth_yolov12n": (3_290_560, 2_637_120), "anydepth_yolov12s_orig": (7_218_464, 5_234_176),
          "anydepth_yolov12l": (26_506_496, 19_532_288), "anydepth_yolov12l_orig": (26_506_496, 19_145_472)}


@pytest.mark.parametrize("name", few(COUNTS, ["yolov12n", "yolo12n", "anydepth_yolov12n"].__contains__))
def test_parameters_and_operations_are_the_published_ones(name: str) -> None:
    parameters, gflops = COUNTS[name]
    with torch.device("meta"):
        net = adn.create_model(name)
        net = net if is_any_depth(net) else adn.convert(net)
        plain = sum(p.numel() for n, p in net.named_parameters() if name.startswith("any") or ".skip." not in n)
    assert plain == parameters
    net = net.to_empty(device="cpu").eval()
    found = count_macs(net, torch.zeros(1, 3, 640, 640), list(gflops), norms=False)
    assert [round(2 * macs / 1e9, 2) for macs in found] == list(gflops.values())
    if name in IN_USE:
        assert tuple(count_parameters(net, depth) for depth in ("super", "base")) == IN_USE[name]
