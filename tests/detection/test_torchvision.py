"""torchvision's detectors and segmentation nets: converted, distilled, fused, in an engine, trained by the commands."""

from __future__ import annotations

import copy
import csv
import datetime
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torchvision.models.detection as detection
import torchvision.models.segmentation as segmentation
from conftest import few, in_two_processes, randomise
from torch import Tensor, nn
from torch.compiler import set_stance
from torch.nn.parallel import DistributedDataParallel
from torchvision.models import resnet18, resnet50
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops import FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

import adn
from adn.cli import main
from adn.core.errors import CheckpointError, ConversionError
from adn.core.state import state_of
from adn.detect.distill import DetectorDistillation, foreground_level
from adn.measure.cost import count_macs, count_parameters
from adn.models.registry import ENTRIES, interface_of
from adn.models.torchvision_detectors.detector import as_torchvision
from adn.runtime.compile import compile
from adn.runtime.layers import ConvNormAct
from adn.tasks import DETECT, is_detector
from adn.train.recipes import DETECTION_RECIPES
from adn.train.run import DetectionConfig

DETECTORS = ("fasterrcnn_resnet50_fpn", "fasterrcnn_resnet50_fpn_v2", "maskrcnn_resnet50_fpn",
             "maskrcnn_resnet50_fpn_v2", "keypointrcnn_resnet50_fpn", "retinanet_resnet50_fpn",
             "retinanet_resnet50_fpn_v2", "fcos_resnet50_fpn", "fasterrcnn_mobilenet_v3_large_320_fpn",
             "ssdlite320_mobilenet_v3_large")
SEGMENTERS = ("fcn_resnet50", "deeplabv3_resnet50", "deeplabv3_mobilenet_v3_large", "lraspp_mobilenet_v3_large")
IN_CI = ("fasterrcnn_resnet50_fpn_v2", "retinanet_resnet50_fpn", "ssdlite320_mobilenet_v3_large", "fcos_resnet50_fpn",
         "lraspp_mobilenet_v3_large")
SMALL = {"min_size": 64, "max_size": 96}


def built(name: str, **changes: Any) -> nn.Module:
    """Of torchvision, in evaluation, with norms that differ."""
    torch.manual_seed(0)
    maker = getattr(detection, name, None) or getattr(segmentation, name)
    sizes = SMALL if hasattr(detection, name) and not name.startswith("ssdlite") else {}
    return randomise(maker(weights=None, weights_backbone=None, num_classes=5, **sizes, **changes)).eval()


def narrow(kind: str = "fasterrcnn", frozen: bool = False, **changes: Any) -> nn.Module:
    """Of torchvision, with a ResNet-18."""
    torch.manual_seed(0)
    norm = FrozenBatchNorm2d if frozen else nn.BatchNorm2d
    maps = {"returned_layers": [2, 3, 4], "extra_blocks": LastLevelP6P7(256, 256)} if kind == "retinanet" else {}
    backbone = resnet_fpn_backbone(backbone_name="resnet18", weights=None, norm_layer=norm, trainable_layers=5, **maps)
    cls = {"fasterrcnn": detection.FasterRCNN, "maskrcnn": detection.MaskRCNN, "retinanet": detection.RetinaNet}[kind]
    return randomise(cls(backbone, 5, **SMALL, **changes))


def any_depth(model: nn.Module) -> nn.Module:
    """Converted, with second norms that differ from the first."""
    net = adn.convert(model)
    for module in net.modules():
        if "skip" in module._modules:
            randomise(module._modules["skip"], seed=3)
    return net


def images() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.rand(3, 64, 90, generator=generator), torch.rand(3, 70, 61, generator=generator)]


def some_targets(masks: bool = False) -> list[dict[str, Tensor]]:
    found = [{"boxes": torch.tensor([[4.0, 5, 50, 60], [30, 10, 85, 58]]), "labels": torch.tensor([1, 4])},
             {"boxes": torch.tensor([[6.0, 8, 40, 50]]), "labels": torch.tensor([2])}]
    for target, image in zip(found, images(), strict=True):
        if masks:
            target["masks"] = torch.zeros(len(target["boxes"]), *image.shape[-2:], dtype=torch.uint8)
            for mask, (x0, y0, x1, y1) in zip(target["masks"], target["boxes"].int().tolist(), strict=True):
                mask[y0:y1, x0:x1] = 1
    return found


def maps(net: nn.Module, x: Any) -> dict[str, Tensor]:
    """Of the backbone and pyramid, or what a segmentation net gives."""
    with torch.no_grad():
        return dict(net.backbone(net.transform(x)[0].tensors)) if hasattr(net, "transform") else dict(net(x))


def inputs(name: str) -> Any:
    generator = torch.Generator().manual_seed(1)
    return images() if hasattr(detection, name) else torch.rand(2, 3, 65, 81, generator=generator)


def depths_of(net: nn.Module) -> list[adn.Depth]:
    return [*adn.depths(net)[::max(1, len(adn.depths(net)) // 8)], adn.depths(net)[-1]]


# ----------------------------------------------------------------------------------------------------------- converted


@pytest.mark.parametrize("name", few((*DETECTORS, *SEGMENTERS), IN_CI.__contains__))
def test_every_builder(name: str) -> None:
    """Bit-identical at full depth; heads, extra levels and the pyramid are shared; extracted and fused nets compute the
    same maps, and find the same objects."""
    model, x = built(name), inputs(name)
    before = copy.deepcopy(model)
    wanted = maps(model, x)
    net = any_depth(model)
    assert is_detector(net) == (name in DETECTORS)
    assert all(torch.equal(value, wanted[key]) for key, value in maps(net, x).items())
    inside = "backbone.body." if "fpn" in name else "backbone.features." if name in DETECTORS else "backbone."
    assert {key.partition(inside)[0] for key in net.state_dict() if ".skip." in key} == {""}
    fused = adn.fuse(net)
    seen = []
    for depth in depths_of(net):
        adn.set_depth(net, depth)
        found, static = maps(net, x), adn.extract(net, depth)
        assert all(torch.equal(value, found[key]) for key, value in maps(static, x).items())
        seen.append(next(iter(found.values())).flatten()[:50])
        adn.set_depth(fused, depth)
        batch = net.transform(x)[0].tensors if hasattr(net, "transform") else x
        for key, value in fused.run(batch).items():
            scale = found[key].abs().max()
            assert (value - found[key]).abs().max() < 2e-5 * scale, (depth, key)
    assert len({tuple(row.tolist()) for row in seen}) > 1
    adn.set_depth(fused, "super")
    with torch.no_grad():
        expected, output = before(x), fused(x)
    assert isinstance(output, dict if isinstance(expected, dict) else list)


@pytest.mark.parametrize("eps", [0.0, 1e-5])
@pytest.mark.parametrize("twins", ["copy", "fresh", "frozen"])
def test_fixed_norms(twins: str, eps: float) -> None:
    """torchvision's have no `num_features`, and may have no epsilon."""
    model = narrow(frozen=True).eval()
    for module in model.modules():
        if isinstance(module, FrozenBatchNorm2d):
            module.eps = eps
    wanted = maps(model, images())
    net = adn.convert(model, twins=twins)
    assert all(torch.equal(value, wanted[key]) for key, value in maps(net, images()).items())
    pairs = [(m, m._modules["skip"]) for m in net.modules() if "skip" in m._modules]
    assert len(pairs) == 8
    for norm, twin in pairs:
        assert isinstance(norm, FrozenBatchNorm2d)
        assert isinstance(twin, FrozenBatchNorm2d if twins == "frozen" else nn.BatchNorm2d)
        assert twin.eps == eps
        if twins != "fresh":
            assert torch.equal(norm.running_var, twin.running_var)
            assert torch.equal(norm.weight, twin.weight)
    adn.set_depth(net, "base")
    fused = adn.fuse(net)
    adn.set_depth(fused, "base")
    found = maps(net, images())
    for key, value in fused.run(net.transform(images())[0].tensors).items():
        torch.testing.assert_close(value, found[key], rtol=1e-4, atol=1e-4 * float(found[key].abs().max()))
    assert sum(p.requires_grad for n, p in net.named_parameters() if ".skip." in n) == (0 if twins == "frozen" else 16)


def test_backbone_alone() -> None:
    net = adn.convert(resnet_fpn_backbone(backbone_name="resnet18", weights=None))
    assert str(adn.get_depth(net)) == "FFFF"
    x = torch.rand(1, 3, 64, 64)
    adn.set_depth(net.eval(), "base")
    assert len(net(x)) == 5


def test_without_stages() -> None:
    model = built("ssdlite320_mobilenet_v3_large")
    model.backbone.features = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3))
    with pytest.raises(ConversionError, match=r"SSD, of which 'backbone.features' would be converted: no stages"):
        adn.convert(model)
    with torch.device("meta"), pytest.raises(ConversionError, match="SSD, of which 'backbone' would be converted"):
        adn.convert(detection.ssd300_vgg16(weights=None, weights_backbone=None))


def test_costs() -> None:
    """Those of the paper's RetinaNet, at 800 x 800."""
    net = adn.create_model("anydepth_retinanet_resnet50_fpn", score_thresh=0.9).eval()
    x = [torch.rand(3, 800, 800)]
    depths = ["FFFF", "TFFF", "FTFF", "FFTF", "FFFT", "TTTT"]
    full, *others = count_macs(net, x, depths)
    assert round(full / 1e6) == 151_540
    assert [round((full - other) / 1e6) for other in others] == [2785, 5571, 8356, 2785, 19_497]
    assert (count_parameters(net, "super"), count_parameters(net, "base")) == (34_014_999, 25_589_527)


# ------------------------------------------------------------------------------------------------------------ distilled


def gradients(net: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("base", ["own+features", "features"])
@pytest.mark.parametrize("kind", ["fasterrcnn", "maskrcnn", "retinanet"])
def test_both_ways_back(kind: str, base: str) -> None:
    """One backward, or one of each pass: the same losses and gradients, though both draw random numbers."""
    net = any_depth(narrow(kind)).double().train()
    net.transform.min_size = (48, 64, 80)
    x, y = [image.double() for image in images()], some_targets(kind == "maskrcnn")
    kd = DetectorDistillation(net, base=base, weight=3.0)
    torch.manual_seed(5)
    losses = kd(x, y)
    losses["loss"].backward()
    one = gradients(net)
    net.zero_grad()
    torch.manual_seed(5)
    again = kd.backward(x, y)
    assert again.keys() == losses.keys()
    for name, value in losses.items():
        torch.testing.assert_close(again[name], value.detach())
    two = gradients(net)
    assert one.keys() == two.keys()
    for name, gradient in one.items():
        torch.testing.assert_close(two[name], gradient, rtol=1e-7, atol=1e-10)
    levels = {name for name in losses if name.startswith("base.kd_")}
    assert levels == {f"base.kd_{i}" for i in range(4)} if kind != "retinanet" else len(levels) == 1
    assert any(name.startswith("base.loss") or name == "base.classification" for name in losses) == (
        base == "own+features")
    torch.testing.assert_close(losses["loss"], losses["super"] + losses["base"])
    assert str(adn.get_depth(net)) == "FFFF"


def test_both_passes_draw_the_same() -> None:
    """At the size of the images, and of what is sampled: with twins that are copies and nothing bypassed, the two nets
    are one."""
    net = adn.convert(narrow("fasterrcnn")).train()
    net.transform.min_size = (48, 64, 80, 96)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    kd = DetectorDistillation(net)
    sizes = []
    net.backbone.register_forward_pre_hook(lambda module, args: sizes.append(args[0].shape))
    state_of(net).base = adn.Depth("FFFF")  # the base-net is the super-net
    for seed in range(4):
        torch.manual_seed(seed)
        losses = kd(images(), some_targets())
        after = torch.rand(())
        torch.manual_seed(seed)
        kd._run_at(images(), some_targets(), "super")
        assert torch.equal(after, torch.rand(()))  # one pass more leaves no trace
        for name in ("loss_objectness", "loss_classifier", "loss_box_reg", "loss_rpn_box_reg"):
            torch.testing.assert_close(losses[f"super.{name}"], losses[f"base.{name}"])
    assert len(set(sizes)) > 1


def test_foreground_level() -> None:
    """The one with most anchors on objects in the whole batch; of equals, and of none, the finest."""
    areas = {"0": 4, "1": 2, "p6": 1}  # two anchors a cell
    none = torch.full((14,), -1)
    first, second = none.clone(), none.clone()
    first[8:10], second[11] = 0, 2
    assert foreground_level([none, none], areas) == "0"
    assert foreground_level([first, second], areas) == "1"
    second[0:3] = 0
    assert foreground_level([first, second], areas) == "0"
    second[12:14] = 1
    assert foreground_level([none, second[torch.tensor([*range(12, 14), *range(12)])].roll(-2)], areas) == "0"


@pytest.mark.parametrize(("changes", "message"), [
    ({"alpha": 2.0}, "alpha=2.0; pass a weight between 0 and 1"),
    ({"base": "nothing"}, "base='nothing'; pass one of"),
    ({"weight": -1.0}, "weight=-1.0"),
    ({"levels": "foreground"}, "does not match anchors in its head"),
])
def test_settings_out_of_range(changes: dict[str, Any], message: str) -> None:
    net = adn.convert(narrow())
    with pytest.raises(ValueError, match=message):
        DetectorDistillation(net, **changes)


def test_what_cannot_be_distilled() -> None:
    with pytest.raises(ValueError, match="has no `backbone`"):
        DetectorDistillation(adn.convert(torch.nn.Sequential(*[built("lraspp_mobilenet_v3_large").backbone])))
    net = adn.convert(narrow())
    with pytest.raises(ValueError, match=r"no map '9'; this detector has 0, 1, 2, 3, pool"):
        DetectorDistillation(net.train(), levels=["9"])(images(), some_targets())
    with pytest.raises(ValueError, match=r"gives no dict of losses, but list: call net.train\(\)"):
        DetectorDistillation(net.eval())(images(), some_targets())


def test_targets() -> None:
    """From ours, centres in parts of the image and labels from 0 on."""
    image = torch.zeros(3, 40, 80)
    ours = [{"boxes": torch.tensor([[0.5, 0.5, 0.5, 1.0]]), "labels": torch.tensor([0])}]
    one, = as_torchvision([image], ours)
    assert one["boxes"].tolist() == [[20, 0, 60, 40]]
    assert one["labels"].tolist() == [1]


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2,
                            timeout=datetime.timedelta(seconds=120))
    batch = [images()[rank].double()], [some_targets()[rank]]
    net = fixed_norms()
    parallel = DistributedDataParallel(DetectorDistillation(net))
    torch.manual_seed(rank)
    parallel(*batch)["loss"].backward()
    torch.save(gradients(net), f"{folder}/one forward {rank}.pt")
    net = fixed_norms()
    kd = DetectorDistillation(DistributedDataParallel(net, find_unused_parameters=True))
    torch.manual_seed(rank)
    kd.backward(*batch)
    torch.save(gradients(net), f"{folder}/two backwards {rank}.pt")
    dist.destroy_process_group()


def fixed_norms() -> nn.Module:
    """A net in training whose batch norms do not see the batch, so that a process of its own computes the same."""
    net = any_depth(narrow("fasterrcnn")).double().train()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    return net


def test_processes_average_their_gradients(tmp_path: Path) -> None:
    in_two_processes(worker, str(tmp_path))
    expected: dict[str, Tensor] = {}
    for rank in range(2):
        net = fixed_norms()
        torch.manual_seed(rank)
        DetectorDistillation(net)([images()[rank].double()], [some_targets()[rank]])["loss"].backward()
        for name, value in gradients(net).items():
            expected[name] = expected.get(name, 0) + value / 2
    for mode, rank in itertools.product(("one forward", "two backwards"), range(2)):
        found = torch.load(tmp_path / f"{mode} {rank}.pt")
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-7, atol=1e-10)


# -------------------------------------------------------------------------------------------------------------- running


@pytest.mark.parametrize("kind", few(("fasterrcnn", "retinanet", "maskrcnn"), ("fasterrcnn", "retinanet").__contains__))
def test_deploy_form_and_engine(kind: str) -> None:
    """They find what the net finds, at every depth; each image at its own."""
    net = any_depth(narrow(kind, frozen=kind == "retinanet")).eval().double()
    x = [image.double() for image in images()]
    fused = adn.fuse(net)
    engine = adn.Engine(fused)
    singly = {}
    for depth in adn.depths(net):
        adn.set_depth(net, depth)
        adn.set_depth(fused, depth)
        with torch.no_grad():
            expected = singly[str(depth)] = net(x)
        for found in (fused(x), engine(x, depth)):
            for ours, other in zip(found, expected, strict=True):
                assert ours.keys() == other.keys()
                for key, value in other.items():
                    torch.testing.assert_close(ours[key], value, rtol=1e-6, atol=1e-6)
    assert all(any(isinstance(m, ConvNormAct) for m in head.modules()) for head in fused.heads)
    assert len(fused.heads) >= 1
    with torch.no_grad():  # changes of the heads are followed, as those of the backbone are
        for parameter in net.parameters():
            parameter.mul_(1.1)
        adn.set_depth(net, "TFTF")
        for ours, other in zip(engine(x, "TFTF"), net(x), strict=True):
            torch.testing.assert_close(ours["boxes"], other["boxes"], rtol=1e-6, atol=1e-6)
        for parameter in net.parameters():
            parameter.div_(1.1)
    mixed = fused.per_image(x, ["TFTF", "base"])
    for found, expected in ((mixed[0], singly["TFTF"][0]), (mixed[1], singly["TTTT"][1])):
        torch.testing.assert_close(found["boxes"], expected["boxes"], rtol=1e-6, atol=1e-6)
    profile = engine.profile(x, depths=["super", "base"], rounds=1, warmup=0)
    assert profile[0].macs > profile[1].macs
    assert engine.set_budget(1e9) == adn.Depth("FFFF")
    assert adn.profile(net, x, depths=["base"], rounds=1)[0].p50_ms > 0


@pytest.mark.parametrize("name", ["fasterrcnn", "retinanet", "fcn"])
def test_no_recompiles_in_a_second_sweep(name: str) -> None:
    if name == "fcn":
        net, x = any_depth(built("lraspp_mobilenet_v3_large")), inputs("lraspp_mobilenet_v3_large")
    else:
        net, x = any_depth(narrow(name)).eval(), images()
    every = adn.depths(net)
    expected = {}
    with torch.no_grad():
        for depth in every:
            adn.set_depth(net, depth)
            expected[depth] = maps(net, x)
        compiled = compile(net, backend="aot_eager")
        for depth in every:
            adn.set_depth(compiled, depth)
            maps(compiled, x)
        with set_stance("fail_on_recompile"):
            for depth in every:
                adn.set_depth(compiled, depth)
                for key, value in maps(compiled, x).items():
                    torch.testing.assert_close(value, expected[depth][key], rtol=1e-4, atol=1e-4)


# ----------------------------------------------------------------------------------------------------- by the commands


def test_names() -> None:
    for name, entry in ENTRIES.items():
        if "fpn" in name or name.startswith("ssdlite"):
            assert entry.background == 1
            with torch.device("meta"):
                net = adn.create_model(name, num_classes=4)
            assert interface_of(net).num_classes == 3
            assert interface_of(net).masks == ("maskrcnn" in name) == entry.masks
            assert is_detector(net)
            named = [key for key in net.state_dict() if key.startswith(interface_of(net).class_heads)]
            assert named, name


@pytest.mark.parametrize("name", few(
    [name for name in ENTRIES if "fpn" in name or name.startswith("ssdlite")],
    ("maskrcnn_resnet50_fpn", "retinanet_resnet50_fpn", "ssdlite320_mobilenet_v3_large").__contains__))
def test_fresh_heads(name: str) -> None:
    """For other classes; all else stays, and the net can be saved and loaded."""
    with torch.device("meta"):
        wanted = {key: value.shape for key, value in adn.create_model(name, num_classes=8).state_dict().items()}
    net = adn.create_model(name, num_classes=4)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    interface_of(net).reset_classifier(7)
    assert interface_of(net).num_classes == 7
    found = net.state_dict()
    assert {key: value.shape for key, value in found.items()} == wanted
    heads = interface_of(net).class_heads
    assert all(torch.equal(value, before[key]) for key, value in found.items() if not key.startswith(heads))


def test_recipe_of_the_paper() -> None:
    recipe = DETECTION_RECIPES["retinanet-26"]
    assert (recipe.epochs, recipe.milestones, recipe.lr, recipe.momentum, recipe.weight_decay) == (
        26, (16, 22), 0.01, 0.9, 1e-4)
    assert (recipe.alpha, recipe.levels, recipe.base, recipe.kd, recipe.flip, recipe.distort) == (
        0.5, None, "own+features", 1, 0.5, 0)


def scenes(folder: Path, masks: bool) -> Path:
    """Of two classes; outlines are the boxes' ellipses' rectangles."""
    from adn.data.scenes import write_scenes

    write_scenes(folder, 6, 4, 96, seed=0, progress=False)
    for split in ("train", "val"):
        file = next(folder.glob(f"**/*{split}*.json"))
        content = json.loads(file.read_text())
        for entry in content["annotations"]:
            x, y, w, h = entry["bbox"]
            if masks:
                entry["segmentation"] = [[x, y, x + w, y, x + w, y + h, x, y + h]]
        file.write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize("model", few(
    ("maskrcnn_resnet50_fpn", "anydepth_retinanet_resnet50_fpn", "ssdlite320_mobilenet_v3_large"),
    ("maskrcnn_resnet50_fpn",).__contains__))
def test_command_line(model: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    data, out = scenes(tmp_path / "data", "mask" in model), tmp_path / "run"
    assert main(["train", str(data), "--task", "detect", "--model", model, "--out", str(out), "--epochs", "1",
                 "--batch-size", "3", "--size", "64", "--workers", "0"]) == 0
    said = capsys.readouterr().out
    assert "16 depths" in said or "32 depths" in said
    saved = str(out / "model.safetensors")
    table = tmp_path / "ap.csv"
    assert main(["eval", str(data), "--checkpoint", saved, "--depth", "super,base", "--csv", str(table), "--workers",
                 "0"]) == 0
    with table.open() as file:
        rows = list(csv.DictReader(file))
    assert [row["depth"] for row in rows] == ["FFFF", "TTTT"] or len(rows) == 2
    assert ("mask_ap" in rows[0]) == ("mask" in model)
    assert main(["profile", "--checkpoint", saved, "--depth", "super,base", "--rounds", "1"]) == 0
    picture = next((data).glob("**/*.png"), None) or next((data).glob("**/*.jpg"))
    drawn = tmp_path / "drawn"
    assert main(["detect", str(picture), "--checkpoint", saved, "--depth", "base", "--out", str(drawn)]) == 0
    assert list(drawn.iterdir())
    capsys.readouterr()
    assert main(["detect", str(picture), "--checkpoint", saved, "--size", "64"]) != 0
    assert "resizes images itself: leave it out" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------ what is refused


def changed(**entries: Any) -> list[dict[str, Any]]:
    first, *others = some_targets(masks=True)
    return [{name: value for name, value in {**first, **entries}.items() if value is not None}, *others]


@pytest.mark.parametrize(("x", "y", "message"), [
    (torch.rand(2, 3, 64, 90), some_targets(True), r"images are no list of tensors \(3, H, W\); pass list\(batch\)"),
    (images(), None, "no targets to learn from; pass a dict of boxes and labels for each image"),
    (images(), some_targets(True)[:1], "targets of 1 images for a batch of 2"),
    ([images()[0], images()[1][:1]], some_targets(True), "images of 1 and 3 channels in one batch; pass images of 3"),
    (images(), [torch.rand(2, 4), torch.rand(1, 4)], "targets of image 0: Tensor; pass a dict of boxes, labels, masks"),
    (images(), changed(labels=None), "targets of image 0: a dict of boxes, masks; pass a dict of boxes, labels, masks"),
    (images(), some_targets(), "targets of image 0: a dict of boxes, labels; pass a dict of boxes, labels, masks"),
    (images(), changed(labels=torch.tensor([1])), r"boxes \(2, 4\), labels \(1,\) of torch.int64; pass boxes \(n, 4\)"),
    (images(), changed(labels=torch.tensor([1.0, 2.0])), r"labels \(2,\) of torch.float32; .* of int64"),
    (images(), changed(boxes=torch.tensor([[4.0, 5, 50, 60], [30, 10, 30, 58]])),
     r"box \[30.0, 10.0, 30.0, 58.0\] has no area; pass corners"),
    (images(), changed(labels=torch.tensor([0, 2])), "labels 0 to 2; pass labels from 1 to 4, the classes of this net"),
    (images(), changed(labels=torch.tensor([1, 5])), "labels 1 to 5; pass labels from 1 to 4, the classes of this net"),
    (images(), changed(masks=torch.zeros(2, 64, 91)), r"masks \(2, 64, 91\) for 2 objects of an image \(3, 64, 90\)"),
])
def test_bad_batches(x: Any, y: Any, message: str) -> None:
    """What torchvision would answer by an assertion, or not at all."""
    net = adn.convert(narrow("maskrcnn")).train()
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(ValueError, match=message):
        DetectorDistillation(net, classes=4, masks=True)(x, y)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert str(adn.get_depth(net)) == "FFFF"


# ------------------------------------------------------------------------------------------------------------- weights


@pytest.mark.parametrize("name", ["fasterrcnn_resnet50_fpn", "maskrcnn_resnet50_fpn_v2", "retinanet_resnet50_fpn",
                                  "ssdlite320_mobilenet_v3_large"])
def test_heads_for_numbers_of_categories(name: str) -> None:
    """torchvision's weights for COCO count the ten numbers that no category has; in a net for the 80 categories the
    outputs are those of the others, in their order."""
    numbers = [i for i in range(1, 91) if i not in (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)]
    torch.manual_seed(0)
    model = getattr(detection, name)(weights=None, weights_backbone=None).eval()
    net = adn.create_model(name, num_classes=81).eval()
    report = adn.load_weights(net, model.state_dict())
    assert report.naming == "torchvision, numbers of COCO's categories"
    assert report.complete
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        if hasattr(model, "roi_heads"):
            x = torch.rand(4, 256, 7, 7, generator=generator)
            (found, boxes), (wanted, all_boxes) = (
                m.roi_heads.box_predictor(m.roi_heads.box_head(x)) for m in (net, model))
            torch.testing.assert_close(boxes.unflatten(1, (81, 4))[:, 1:], all_boxes.unflatten(1, (91, 4))[:, numbers])
            if "mask" in name:
                outlines, all_outlines = (
                    m.roi_heads.mask_predictor(m.roi_heads.mask_head(x[:, :, :4, :4])) for m in (net, model))
                torch.testing.assert_close(outlines[:, 1:], all_outlines[:, numbers])
        else:
            x = list(model.backbone(torch.rand(1, 3, 320, 320, generator=generator)).values())
            found, wanted = (m.head.classification_head(x) for m in (net, model))
    torch.testing.assert_close(found[..., 1:], wanted[..., numbers])
    assert found.shape[-1] == 81
    adn.load_weights(adn.create_model(name, num_classes=91), model.state_dict())  # as they are


def test_categories_are_the_papers(tmp_path: Path) -> None:
    """A net with heads for the numbers of categories cannot be compared with annotations; it says what to do."""
    from adn.measure.average_precision import _check_classes

    class Data:
        file, class_names = "instances.json", [str(i) for i in range(80)]

    net = built("retinanet_resnet50_fpn")
    with pytest.raises(ValueError, match=r"the net 90 classes\. Its labels are numbers .* num_classes=81"):
        _check_classes(net, 90, Data())
    with pytest.raises(ValueError, match=r"80 categories, the net 4 classes$"):
        _check_classes(net, 4, Data())


def test_weights_of_another_model() -> None:
    """How many names fitted, and what it looks like instead."""
    faster = narrow().state_dict()
    with pytest.raises(CheckpointError, match=r"nothing in .* fits this RTDETR: it has \d+ entries, such as "
                                              r"(.|\n)*Its names are those of a Faster R-CNN of torchvision"):
        adn.load_weights(adn.create_model("rtdetr_r18vd"), faster)
    with pytest.raises(CheckpointError, match=r"\d+ of \d+ entries do(.|\n)*is it another size of the same model"):
        adn.load_weights(adn.create_model("fasterrcnn_resnet50_fpn", num_classes=5), faster)
    with pytest.raises(CheckpointError, match="those of a YOLO"):
        adn.load_weights(narrow(), adn.create_model("yolov12n").state_dict())
    with pytest.raises(CheckpointError, match=r"those of a ResNet$"):
        adn.load_weights(narrow(), narrow().backbone.body.state_dict())


@pytest.mark.parametrize("any_depth_backbone", [False, True])
def test_start_from_a_backbone(any_depth_backbone: bool, tmp_path: Path) -> None:
    """Of a classifier, any-depth or not: the detector has its weights, and second sets its own or copies."""
    classifier = randomise(resnet18(weights=None))
    if any_depth_backbone:
        classifier = any_depth(classifier)
    file = tmp_path / "resnet18.pth"
    torch.save(classifier.state_dict(), file)
    recipe = DETECTION_RECIPES["torchvision-digits"]
    net = DETECT.build(DetectionConfig("", "", recipe, backbone=str(file)), 10, True)
    state, wanted = net.backbone.body.state_dict(), classifier.state_dict()
    for name, value in state.items():
        source = name if any_depth_backbone else name.replace(".skip.", ".")
        assert torch.equal(value, wanted[source]), name
    torch.save(resnet50(weights=None).state_dict(), file)
    with pytest.raises(ValueError, match=r"resnet18.pth does not fit"):
        DETECT.build(DetectionConfig("", "", recipe, backbone=str(file)), 10, True)
