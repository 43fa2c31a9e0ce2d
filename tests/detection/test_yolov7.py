"""YOLOv7 and the links between two of them: the reference's numbers, losses, what a detector has to do."""

from __future__ import annotations

import copy
import math
import weakref
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import randomise
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import adn
from adn.core.state import is_any_depth
from adn.data.mosaic import fitted
from adn.detect.boxes import complete_iou
from adn.detect.training import Supervised, losses_alone, total
from adn.models.registry import ENTRIES, RECIPES
from adn.models.yolov7.criterion import DetectionLoss
from adn.models.yolov7.layers import SPPCSPC, CBLinear, Conv, IDetect, ReOrg, Rep, fused
from adn.models.yolov7.links import Links
from adn.models.yolov7.model import YOLOv7
from adn.models.yolov7.tables import TABLES
from adn.train.recipes import default_recipe

NAMES = ["yolov7", "yolov7x", "yolov7_w6"]
TOLERANCE = 1e-4  # of the largest value of a map


def tiny(name: str = "yolov7", seed: int = 0, **kwargs: Any) -> nn.Module:
    torch.manual_seed(seed)
    return randomise(adn.create_model(name, **{"num_classes": 3, "width": 0.125, **kwargs}))


def some_objects(*counts: int, num_classes: int = 3, dtype: torch.dtype = torch.float32, seed: int = 0
                 ) -> list[dict[str, torch.Tensor]]:
    """Targets of images with so many objects."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for count in counts:
        size = 0.1 + 0.4 * torch.rand(count, 2, generator=generator)
        centre = size / 2 + (1 - size) * torch.rand(count, 2, generator=generator)
        labels = torch.randint(num_classes, (count,), generator=generator)
        found.append({"labels": labels, "boxes": torch.cat((centre, size), 1).to(dtype)})
    return found


# ------------------------------------------------------------------------------------------- the reference's numbers


def test_single_blocks(golden, dynamic) -> None:
    manifest, arrays = golden("dynamicdet_blocks")
    about = manifest["configs"]
    net = nn.ModuleDict({
        "conv1": Conv(6, 8), "conv3": Conv(6, 8, 3), "conv3s2": Conv(6, 8, 3, 2), "sppcspc": SPPCSPC(6, 12),
        "rep_id": Rep(6, 6), "rep": Rep(6, 8), "cblinear_a": CBLinear(6, about["cblinear_a"]),
        "cblinear_b": CBLinear(10, about["cblinear_b"]),
        "detect": IDetect((6, 8, 10), about["detect"]["nc"], about["detect"]["anchors"])}).eval()
    for name in manifest["keep"]:
        np.testing.assert_allclose(net.state_dict()[name], arrays[f"keep.{name}"], rtol=1e-6)
    missing, unexpected = net.load_state_dict(dynamic.fixture_state(manifest), strict=False)
    assert (missing, unexpected) == (manifest["keep"], [])
    x = {name: dynamic.fixture_input(manifest, name) for name in manifest["inputs"]}
    with torch.inference_mode():
        found = {name: net[name](x["a"]) for name in ("conv1", "conv3", "conv3s2", "sppcspc", "rep_id", "rep")}
        found |= {"mp": nn.MaxPool2d(2)(x["a"]), "reorg": ReOrg()(x["a"])}
        a, b = net["cblinear_a"](x["a"]), net["cblinear_b"](x["b"])
        found |= {f"cblinear_{name}.{i}": part for name, parts in (("a", a), ("b", b)) for i, part in enumerate(parts)}
        found["cbfuse"] = fused(x["c"], (a[1], b[1]))
        maps = net["detect"](x["p3"], x["p4"], x["p5"])
        found |= {f"detect.map{i}": part for i, part in enumerate(maps)}
        found["detect.pred"] = net["detect"].decoded(maps)
    assert found.keys() == {name for name in arrays if not name.startswith("keep")}
    for name, value in found.items():
        np.testing.assert_allclose(value, arrays[name], rtol=1e-5, atol=2e-6 * np.abs(arrays[name]).max(), err_msg=name)


def of_second(name: str, fusions: list[int], count: int) -> str:
    """What the reference's second backbone, or its head, is called in ours: links come first, and fusions are layers
    among the others."""
    part, number, rest = name.split(".", 2)
    i = int(number)
    if part == "model_h2":
        return f"second.head.{i}.{rest}"
    return f"links.linears.{i}.{rest}" if i < count else \
        f"second.backbone.{i - count - sum(fusion < i for fusion in fusions)}.{rest}"


@pytest.fixture(scope="module")
def cascade(golden, dynamic) -> tuple[nn.ModuleDict, dict, dict]:
    manifest, arrays = golden("dynamicdet_dyyolov7")
    first, second = (adn.create_model("yolov7").eval() for _ in range(2))
    net = nn.ModuleDict({"second": second, "links": first.composite_links().eval()})
    state = dynamic.fixture_state(manifest)
    state |= {name: torch.as_tensor(arrays[f"keep.{name}"]) for name in manifest["keep"]}
    own = first.state_dict()
    for name in ("anchors", "anchor_grid"):
        torch.testing.assert_close(own[f"head.54.{name}"], state[f"model_h.54.{name}"])
    # Names of the reference's are found by themselves.
    report = adn.load_weights(first, {name: value for name, value in state.items()
                                      if name.startswith(("model_b.", "model_h."))})
    assert report.complete
    assert report.naming == "reference YOLOv7"
    adn.load_weights(net, {of_second(name, manifest["cbfuse_layers"], 5): value for name, value in state.items()
                           if name.startswith(("model_b2.", "model_h2."))})
    return nn.ModuleDict({"first": first, **net}), manifest, arrays


def same(found: torch.Tensor, expected: np.ndarray, every: int, largest: float | None = None) -> None:
    largest = np.abs(expected).max() if largest is None else largest
    np.testing.assert_allclose(found.flatten()[::every], expected, rtol=0, atol=TOLERANCE * largest)


def same_outputs(outputs: dict[str, Any], arrays: dict, name: str, shapes: list, every: int) -> None:
    found = {"pred": outputs["decoded"], **{f"map{i}": x for i, x in enumerate(outputs["maps"])}}
    assert [list(x.shape) for x in found.values()] == shapes
    for part, x in found.items():
        mean, deviation, largest = arrays[f"{name}.{part}_stats"]
        same(x, arrays[f"{name}.{part}"], every, largest)
        assert [x.mean().item(), x.std().item()] == pytest.approx([mean, deviation], abs=TOLERANCE * largest)


@pytest.mark.parametrize("given", ["x", "x2", "x3"])
def test_both_routes_of_a_cascade(given: str, cascade, dynamic) -> None:
    net, manifest, arrays = cascade
    first, second, links = (net[name] for name in ("first", "second", "links"))
    x = dynamic.fixture_input(manifest, given)
    kept: dict[int, torch.Tensor] = {}
    # What a fusion gives is what the next layer reads.
    hooks = [second.backbone[i + 1].register_forward_pre_hook(
        lambda _, args, number=number: kept.__setitem__(number, args[0]))
        for i, number in zip(second.backbone.halving, manifest["cbfuse_layers"], strict=True)]
    with torch.inference_mode():
        taps = first.features(x)
        for number, tap in zip(manifest["router_ins"], taps, strict=True):
            same(tap.mean((2, 3)), arrays[f"{given}.tap{number}_gap"].reshape(-1), 1)
        same_outputs(first(x), arrays, f"{given}.first", manifest["shapes"][f"{given}.first"], manifest["every"])
        own = second.features(x, links(taps))
        kept |= dict(zip(manifest["b2_save"], own[2:], strict=True))
        outputs = second.outputs(second.heads(own))
    for hook in hooks:
        hook.remove()
    stored = [int(name.rpartition("_")[2]) for name in arrays if name.startswith(f"{given}.b2_")]
    assert sorted(kept) == stored
    for number in stored:
        name = f"{given}.b2_{number}"
        same(kept[number], arrays[name], manifest["b2_every"][name])
    same_outputs(outputs, arrays, f"{given}.second", manifest["shapes"][f"{given}.second"], manifest["every"])
    assert first.tap_channels == manifest["router_channels"]
    assert manifest["b1_save"] == list(first.backbone.outputs)


def test_losses_of_single_images(golden, dynamic) -> None:
    manifest, arrays = golden("dynamicdet_offset_loss")
    about = manifest["configs"]
    loss = DetectionLoss(torch.tensor(about["anchors"]).float().view(3, 3, 2))
    rows = torch.tensor(arrays["targets"])
    target = {"labels": rows[:, 1].long(), "boxes": rows[:, 2:]}

    def maps(i: int, detector: int) -> list[torch.Tensor]:
        return [dynamic.fixture_input(manifest, f"p{i}_{detector}_{level}") for level in range(3)]

    for i, (difference, score, _, value, gradient, offset, _) in enumerate(arrays["full"]):
        one, two = (losses_alone(loss, maps(i, detector), [target]).item() for detector in (1, 2))
        assert one - two == pytest.approx(difference, abs=1e-6)
        assert one - two - offset == pytest.approx(gradient, abs=1e-6)
        assert score * (one - offset / 2) + (1 - score) * (two + offset / 2) == pytest.approx(value, abs=1e-6)
    # Of a batch: each image as alone, the objectness a mean over all cells.
    both = [torch.cat(x) for x in zip(maps(0, 1), maps(1, 1))]
    each = [total(loss(maps(i, 1), [target])).item() for i in (0, 1)]
    assert losses_alone(loss, both, [target] * 2).tolist() == pytest.approx(each, abs=1e-6)
    assert loss(both, [target] * 2)["obj"].item() == pytest.approx(
        sum(loss(maps(i, 1), [target])["obj"].item() for i in (0, 1)), abs=1e-5)


# First and second backbone (with links), head; of a cascade with its router; GFLOPs of both routes (two for each
# multiply-add of convolutions). Those of the second route of yolov7x are published as 307.7, which is 189.7 + 118.0.
COUNTS = {
    "yolov7": ((13_371_808, 16_672_736, 24_250_874), 80_621_333, 640, (105.8, 183.0)),
    "yolov7x": ((20_275_272, 25_431_832, 51_072_122), 151_093_149, 640, (189.7, 307.6)),
    "yolov7_w6": ((35_988_608, 40_598_272, 34_441_208), 147_364_049, 1280, (359.7, 601.7)),
}


def counted(part: nn.Module) -> int:
    return sum(p.numel() for p in part.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_parameters_and_operations_are_the_published_ones(name: str) -> None:
    parts, total, size, gflops = COUNTS[name]
    with torch.device("meta"):
        first, second = (adn.create_model(name).eval() for _ in range(2))
        links, x = first.composite_links(), torch.zeros(1, 3, size, size)
    found = (counted(first.backbone), counted(second.backbone) + counted(links), counted(first.head))
    assert found == parts
    pooled = sum(first.tap_channels)
    router = (pooled + 1) * (pooled // 4) + pooled // 4 + 1
    assert sum(found) + counted(second.head) + router == total
    with FlopCounterMode(display=False) as of_first:
        taps = first.features(x)
        first.heads(taps)
    with FlopCounterMode(display=False) as of_second:
        second.heads(second.features(x, links(first.features(x))))
    flops = of_first.get_total_flops(), of_second.get_total_flops()
    assert tuple(round(flop / 1e9, 1) for flop in flops) == gflops


# What layers read, by the numbers of the specification; negative ones are maps of the backbone, the coarsest first.
WIRES: dict[str, dict[str, dict[int, tuple[int, ...]]]] = {
    "yolov7": {
        "backbone": {0: (-1,), 5: (3,), 10: (9, 7, 5, 4), 12: (11,), 14: (11,), 16: (15, 13), 49: (48, 46, 44, 43)},
        "head": {0: (-1,), 3: (-2,), 4: (3, 2), 11: (10, 9, 8, 7, 6, 5), 15: (-3,), 16: (15, 14), 25: (24,), 27: (24,),
                 29: (28, 26, 12), 42: (41, 39, 0), 51: (24,), 52: (37,), 53: (50,), 54: (51, 52, 53)}},
    "yolov7x": {
        "backbone": {12: (11, 9, 7, 5, 4), 16: (13,), 18: (17, 15), 57: (56, 54, 52, 50, 49)},
        "head": {3: (-2,), 4: (3, 2), 13: (12, 10, 8, 6, 5), 17: (-3,), 33: (32, 30, 14), 48: (47, 45, 0), 59: (28,),
                 60: (43,), 61: (58,), 62: (59, 60, 61)}},
    "yolov7_w6": {
        "backbone": {1: (0,), 2: (1,), 9: (8, 6, 4, 3), 45: (44, 42, 40, 39)},
        "head": {3: (-2,), 4: (3, 2), 11: (10, 9, 8, 7, 6, 5), 15: (-3,), 27: (-4,), 28: (27, 26), 37: (36,),
                 38: (37, 24), 48: (47, 12), 58: (57, 0), 67: (36,), 68: (46,), 69: (56,), 70: (66,),
                 71: (67, 68, 69, 70)}},
}
TAPS = {"yolov7": (2, 11, 24, 37, 50), "yolov7x": (2, 13, 28, 43, 58), "yolov7_w6": (1, 10, 19, 28, 37, 46)}
# Of the second backbone as published: how many layers come before, less those that it has not got (links are five; w6
# reads what the first has regrouped); fusions, which are layers, too; what the head gets.
SECOND = {"yolov7": (5, (7, 10, 24, 38, 52), (32, 46, 60)), "yolov7x": (5, (7, 10, 26, 42, 58), (36, 52, 68)),
          "yolov7_w6": (4, (7, 17, 27, 37, 47), (25, 35, 45, 55))}


@pytest.mark.parametrize("name", NAMES)
def test_layers_read_what_they_should(name: str) -> None:
    with torch.device("meta"):
        net = adn.create_model(name)
    for part, wires in WIRES[name].items():
        layers = getattr(net, part)
        assert {number: layers.reads[number] for number in wires} == wires
    assert net.backbone.outputs == TAPS[name]
    before, fusions, outputs = SECOND[name]
    assert tuple(i + before + place for place, i in enumerate(net.backbone.halving, 1)) == fusions
    assert net.backbone.outputs[-len(outputs):] == tuple(
        i - before - sum(fusion < i for fusion in fusions) for i in outputs)


def reading(layer: nn.Module) -> list[torch.Tensor]:
    """What a layer reads from now on."""
    found: list[torch.Tensor] = []
    layer.register_forward_pre_hook(lambda _, args: found.append(args[0]))
    return found


@pytest.mark.parametrize("name", NAMES)
@torch.inference_mode()
def test_a_second_detector_reads_the_first(name: str) -> None:
    first, second = tiny(name).eval(), tiny(name, seed=1).eval()
    links = first.composite_links()
    x = torch.rand(1, 3, first.stride, 2 * first.stride)
    taps = first.features(x)
    made = links(taps)
    assert [len(sources) for sources in made.added] == [5, 4, 3, 2, 1]
    # What comes after a fusion reads, by hand, each source enlarged to the size of the finest.
    after = [reading(second.backbone[i + 1]) for i in second.backbone.halving]
    nothing = [[] for _ in made.added]
    second.features(x, Links(nothing, made.crossed))
    for level, (sources, seen) in enumerate(zip(made.added, after, strict=True)):
        parts = [linear.conv(tap).split(linear.widths, 1)[level] for linear, tap in
                 list(zip(links.linears, taps[-5:], strict=True))[level:]]
        total = sum(part.repeat_interleave(2**i, 2).repeat_interleave(2**i, 3) for i, part in enumerate(parts))
        second.features(x, Links([*nothing[:level], sources, *nothing[level + 1 :]], made.crossed))
        torch.testing.assert_close(seen[-1], seen[0] + total)
        assert total.abs().max() > 1e-3
    # Each level changes what comes from it on.
    plain = second.features(x)
    for level in range(5):
        found = second.features(x, Links([*nothing[:level], made.added[level], *nothing[level + 1 :]], None))
        before = level + len(taps) - 5
        assert [torch.equal(a, b) for a, b in zip(found, plain, strict=True)] == [i < before for i in range(len(taps))]


@torch.inference_mode()
def test_one_layer_reads_the_wrong_detector() -> None:
    """As published, in the second YOLOv7-X alone."""
    assert [adn.create_model(name, width=0.1).composite_links().crossed for name in NAMES] == [False, True, False]
    first, second = tiny("yolov7x").eval(), tiny("yolov7x", seed=1).eval()
    x = torch.rand(1, 3, 64, 64)
    taps = first.features(x)
    made = first.composite_links()(taps)
    crossed, beside = reading(second.backbone[16]), reading(second.backbone[14])
    second.features(x, made)
    assert crossed[0] is taps[1]
    assert not torch.allclose(beside[0], taps[1])
    second.features(x)
    assert crossed[1] is beside[1]


# ------------------------------------------------------------------------------------------------- models by name


@pytest.mark.parametrize("name", NAMES)
def test_names_and_sizes(name: str) -> None:
    assert name in adn.list_models()
    entry = ENTRIES[name]
    with torch.device("meta"):
        net = adn.create_model(name)
    assert not is_any_depth(net)
    assert (net.num_classes, net.stride, net.letterbox, net.adn_task) == (80, entry.stride, True, "detect")
    assert net.warning() is None
    state = net.state_dict()
    assert {key.split(".")[0] for key in state} == {"backbone", "head"}
    assert [key for key in state if key.startswith(net.class_heads)] == [
        f"head.{len(net.head) - 1}.{part}" for part in
        [f"m.{i}.{end}" for i in range(len(TABLES[name].ends)) for end in ("weight", "bias")]
        + [f"im.{i}.implicit" for i in range(len(TABLES[name].ends))]]
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert (module.eps, module.momentum) == (1e-3, 0.03)


def test_names_of_the_state_are_those_of_the_reference(golden) -> None:
    manifest, _ = golden("dynamicdet_dyyolov7")
    with torch.device("meta"):
        own = {name: list(value.shape) for name, value in adn.create_model("yolov7").state_dict().items()}
    rows = {name: shape for name, shape, _ in manifest["state"]}
    rows |= {name: own["head" + name.removeprefix("model_h")] for name in manifest["keep"] if "_h." in name}
    expected = {name.replace("model_b.", "backbone.").replace("model_h.", "head."): shape
                for name, shape in rows.items() if name.startswith(("model_b.", "model_h."))}
    assert own == expected


@pytest.mark.parametrize(("name", "width", "sides"), [
    ("yolov7", 0.125, (64, 96)), ("yolov7", 0.3, (32, 32)), ("yolov7x", 0.125, (96, 32)),
    ("yolov7_w6", 0.125, (64, 192))])
def test_outputs_in_both_modes(name: str, width: float, sides: tuple[int, int]) -> None:
    net = tiny(name, width=width, num_classes=5)
    assert all(count % 8 == 0 for count in net.tap_channels)
    published = adn.create_model(name).tap_channels if width == 0.3 else None
    if published:
        assert net.tap_channels == [math.ceil(0.3 * count / 8) * 8 for count in published]
    x = torch.rand(2, 3, *sides)
    shapes = [(2, 3, sides[0] // stride, sides[1] // stride, 10) for stride in (8, 16, 32, 64)[: len(net.head[-1].m)]]
    assert [tuple(y.shape) for y in net(x)] == shapes
    net.eval()
    with torch.inference_mode():
        outputs = net(x)
        alone = net(x[1:])
        again = copy.deepcopy(net)(x)
    assert [tuple(y.shape) for y in outputs["maps"]] == shapes
    assert outputs["decoded"].shape == (2, sum(math.prod(shape[1:4]) for shape in shapes), 10)
    assert torch.equal(outputs["decoded"], again["decoded"])
    torch.testing.assert_close(outputs["decoded"][1:], alone["decoded"])
    # Of one cell by hand: of the second map, its last anchor.
    anchor, row, column = 2, 0, shapes[1][3] - 1
    z = outputs["maps"][1][0, anchor, row, column].sigmoid()
    number = math.prod(shapes[0][1:4]) + (anchor * shapes[1][2] + row) * shapes[1][3] + column
    sizes = torch.tensor(TABLES[name].anchors[1][4:])
    wanted = torch.cat(((2 * z[:2] - 0.5 + torch.tensor([column, row])) * 16, (2 * z[2:4]) ** 2 * sizes, z[4:]))
    torch.testing.assert_close(outputs["decoded"][0, number], wanted)


@torch.inference_mode()
def test_maps_are_kept_no_longer_than_they_are_read() -> None:
    net = tiny().eval()
    made: dict[str, weakref.ref] = {}
    for part in (net.backbone, net.head):
        for i, layer in enumerate(part):
            layer.register_forward_hook(lambda _, args, output, name=f"{part is net.head}{i}": made.__setitem__(
                name, weakref.ref(output)) if torch.is_tensor(output) else None)
    alive: list[int] = []
    net.backbone[50].register_forward_pre_hook(lambda *_: alive.append(sum(y() is not None for y in made.values())))
    net.head[54].register_forward_pre_hook(lambda *_: alive.append(sum(y() is not None for y in made.values())))
    net(torch.rand(1, 3, 64, 64))
    # Four taps and what the last layer reads; five taps and the three maps of the last layer.
    assert len(made) == 105
    assert alive == [5, 8]


@pytest.mark.parametrize(("images", "message"), [
    (torch.rand(3, 64, 64), "pass \\(B, 3, H, W\\)"), (torch.zeros(1, 3, 64, 64, dtype=torch.uint8), "uint8"),
    (torch.rand(1, 3, 96, 64), "64 x 96 pixels; both sides must be multiples of 64"),
], ids=["shape", "type", "size"])
def test_images_that_do_not_fit(images: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny("yolov7_w6")(images)


def test_tables_that_there_are_not() -> None:
    with pytest.raises(ValueError, match="pass one of yolov7, yolov7x, yolov7_w6"):
        YOLOv7("yolov7e6")


def test_how_a_head_starts() -> None:
    """As sure as that eight objects are in an image of 640 pixels; of no class."""
    detect = IDetect((64, 128), 3, ((10,) * 6, (20,) * 6))
    for conv, stride in zip(detect.m, (8, 16)):
        bias = conv.bias.view(3, -1)
        assert (bias[:, 4] - math.log(8 / (640 / stride) ** 2)).abs().max() < 0.13
        assert (bias[:, 5:] - math.log(0.6 / 2.01)).abs().max() < 0.13
    assert detect.ia[1].implicit.std() < 0.03
    assert (detect.im[1].implicit - 1).abs().max() < 0.1


def test_fresh_heads() -> None:
    net = tiny().double()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    net.reset_classifier(7)
    assert net.num_classes == 7
    found = net.state_dict()
    assert {name: value.shape for name, value in found.items()} == {
        name: value.shape for name, value in tiny(num_classes=7).state_dict().items()}
    kept = [name for name in before if not name.startswith(net.class_heads)]
    assert all(torch.equal(found[name], before[name]) for name in kept)
    assert len(before) - len(kept) == 9
    assert net(torch.rand(2, 3, 64, 64, dtype=torch.float64))[0].shape[-1] == 12


def test_what_is_found_is_on_the_original_images() -> None:
    maps = [torch.zeros(2, 3, 64 // stride, 96 // stride, 8) for stride in (8, 16, 32)]
    decoded = torch.zeros(2, 378, 8)
    # Two that overlap, of one class and of two; one of another place; objectness and classes are both needed.
    decoded[0, :4] = torch.tensor([[40, 32, 20, 20, 0.9, 0.8, 0.0, 0.0], [41, 32, 20, 20, 0.8, 0.8, 0.0, 0.0],
                                   [40, 33, 20, 20, 0.5, 0.0, 0.0, 0.9], [70, 20, 10, 8, 1.0, 0.0, 0.3, 0.0]])
    sizes = [(192, 64), (48, 96)]
    found, none = tiny().postprocess({"decoded": decoded, "maps": maps}, sizes)
    assert none["scores"].shape == (0,)
    assert none["boxes"].shape == (0, 4)
    assert found["scores"].tolist() == pytest.approx([0.72, 0.45, 0.3])
    assert found["labels"].tolist() == [0, 2, 1]
    new_width, new_height, left, top = fitted(sizes[0], (96, 64))
    scale = torch.tensor([192 / new_width, 64 / new_height] * 2)
    corners = torch.tensor([[30., 22, 50, 42], [30, 23, 50, 43], [65, 16, 75, 24]])
    torch.testing.assert_close(found["boxes"], (corners - torch.tensor([left, top] * 2)) * scale)
    assert (new_height, top) == (32, 16)
    outputs = {"decoded": decoded, "maps": maps}
    assert len(tiny().postprocess(outputs, sizes, conf=0.4)[0]["scores"]) == 2
    assert len(tiny().postprocess(outputs, sizes, iou=0.95)[0]["scores"]) == 4
    with pytest.raises(ValueError, match="1 sizes for a batch of 2"):
        tiny().postprocess(outputs, sizes[:1])


# ------------------------------------------------------------------------------------------------------------ losses


def raw(images: int, classes: int = 3, sides: tuple[int, int] = (64, 128), levels: int = 3, seed: int = 0
        ) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(images, 3, sides[0] // stride, sides[1] // stride, 5 + classes, generator=generator,
                        dtype=torch.float64) for stride in (8, 16, 32, 64)[:levels]]


def by_hand(maps: list[torch.Tensor], target: dict[str, torch.Tensor], anchors: torch.Tensor, balance: list[float]
            ) -> tuple[float, float, float]:
    """Terms of one image, cell by cell: box, objectness, classes, without their weights."""
    sides = torch.tensor([maps[0].shape[3] * 8, maps[0].shape[2] * 8])
    centres, sizes = target["boxes"][:, :2] * sides, target["boxes"][:, 2:] * sides
    wanted = torch.cat((centres - sizes / 2, centres + sizes / 2), 1)
    cells: list[tuple[int, int, int, int]] = []
    for level, x in enumerate(maps):
        stride, (h, w) = 8 * 2**level, x.shape[2:4]
        proposed: list[list[tuple[int, int]]] = []
        for centre in (centres / stride).tolist():
            column, row = min(int(centre[0]), w - 1), min(int(centre[1]), h - 1)
            proposed.append([(row, column), (row, column + (-1 if centre[0] - column < 0.5 else 1)),
                             (row + (-1 if centre[1] - row < 0.5 else 1), column)])
        for near in range(3):
            for anchor in range(3):
                for (row, column), size in zip((each[near] for each in proposed), sizes):
                    ratio = size / anchors[level, anchor]
                    if torch.maximum(ratio, 1 / ratio).max() < 4 and 0 <= row < h and 0 <= column < w:
                        cells.append((level, anchor, row, column))
    logits = torch.stack([maps[level][0, anchor, row, column] for level, anchor, row, column in cells])
    z = logits.sigmoid()
    stride = torch.tensor([8.0 * 2**level for level, *_ in cells])[:, None]
    centre = (2 * z[:, :2] - 0.5 + torch.tensor([[column, row] for _, _, row, column in cells])) * stride
    size = (2 * z[:, 2:4]) ** 2 * torch.stack([anchors[level, anchor] for level, anchor, *_ in cells])
    boxes = torch.cat((centre - size / 2, centre + size / 2), 1)
    start, end = (f(wanted[:, None, part], boxes[None, :, part]) for f, part in (
        (torch.maximum, slice(2)), (torch.minimum, slice(2, 4))))
    shared = (end - start).clamp(min=0).prod(-1)
    overlap = shared / (sizes.prod(-1)[:, None] + size.prod(-1) - shared)
    score = (z[:, 4:5] * z[:, 5:]).sqrt()
    aims = F.one_hot(target["labels"], score.shape[-1]).double()
    cost = F.binary_cross_entropy(score.expand(len(aims), -1, -1), aims[:, None].expand(-1, len(cells), -1),
                                  reduction="none").sum(-1) - 3 * torch.log(overlap + 1e-8)
    claims: dict[int, list[int]] = {}
    for i in range(len(aims)):
        count = max(int(overlap[i].topk(min(10, len(cells))).values.sum()), 1)
        for cell in sorted(range(len(cells)), key=lambda cell: cost[i, cell].item())[:count]:
            claims.setdefault(cell, []).append(i)
    learnt = {cell: own[0] if len(own) == 1 else int(cost[:, cell].argmin()) for cell, own in claims.items()}
    box = objectness = classes = 0.0
    for level, x in enumerate(maps):
        here = [cell for cell in sorted(learnt) if cells[cell][0] == level]
        sure = torch.zeros(x.shape[1:4], dtype=x.dtype)
        overlaps, entropies = [], []
        for cell in here:
            own = learnt[cell]
            overlaps.append(complete_iou(boxes[cell], wanted[own]).item())
            entropies.append(F.binary_cross_entropy_with_logits(logits[cell, 5:], aims[own]).item())
            sure[cells[cell][1:]] = max(overlaps[-1], sure[cells[cell][1:]].item())
        box += 1 - np.mean(overlaps) if here else 0
        classes += np.mean(entropies) if here else 0
        objectness += balance[level] * F.binary_cross_entropy_with_logits(x[0, ..., 4], sure).item()
    return box, objectness, classes


ANCHORS = torch.tensor(TABLES["yolov7"].anchors, dtype=torch.float64).view(3, 3, 2)


@pytest.mark.parametrize("seed", range(4))
def test_losses_are_those_that_loops_find(seed: int) -> None:
    maps, targets = raw(1, seed=seed), some_objects(2 + 3 * seed, dtype=torch.float64, seed=seed)
    box, objectness, classes = by_hand(maps, targets[0], ANCHORS, [4, 1, 0.4])
    terms = {name: term.item() for name, term in DetectionLoss(ANCHORS)(maps, targets).items()}
    assert terms == pytest.approx({"box": 0.05 * box, "obj": 0.7 * objectness, "cls": 0.3 * 3 / 80 * classes},
                                  rel=1e-6)
    assert box > 0


def test_an_image_without_objects_in_a_batch() -> None:
    loss, maps, targets = DetectionLoss(ANCHORS), raw(3), some_objects(4, 0, 2, dtype=torch.float64)
    each = losses_alone(loss, maps, targets)
    alone = [loss([x[i : i + 1] for x in maps], targets[i : i + 1]) for i in range(3)]
    torch.testing.assert_close(each, torch.stack([sum(terms.values()) for terms in alone]))
    assert alone[1]["box"] == alone[1]["cls"] == 0
    of_batch = loss(maps, targets)
    torch.testing.assert_close(of_batch["obj"], sum(terms["obj"] for terms in alone))
    # Means over the cells of all images, not of each.
    assert of_batch["box"] > 0
    assert not torch.isclose(of_batch["box"], sum(terms["box"] for terms in alone))
    for x in maps:
        x.requires_grad_()
    # How sure a cell is to be is given to it, and does not teach its box.
    of_objectness = torch.autograd.grad(loss(maps, targets)["obj"], maps)
    assert all(x[..., 4].any() and not x[..., :4].any() and not x[..., 5:].any() for x in of_objectness)
    sum(loss(maps, targets).values()).backward()
    assert all(x.grad.isfinite().all() for x in maps)
    assert all(x.grad[1, ..., :4].abs().max() == x.grad[1, ..., 5:].abs().max() == 0 for x in maps)
    assert all(x.grad[1, ..., 4].abs().min() > 0 for x in maps)
    # No object at all.
    nothing = some_objects(0, 0, 0, dtype=torch.float64)
    entropy = [F.softplus(x[..., 4]).mean().item() for x in maps]
    assert sum(loss(maps, nothing).values()).item() == pytest.approx(
        3 * 0.7 * (4 * entropy[0] + entropy[1] + 0.4 * entropy[2]))
    assert losses_alone(loss, maps, nothing).sum().item() == pytest.approx(sum(loss(maps, nothing).values()).item())


def test_weights_follow_the_number_of_maps_and_the_size() -> None:
    maps = raw(1, levels=4, sides=(64, 64))
    anchors = torch.tensor(TABLES["yolov7_w6"].anchors, dtype=torch.float64).view(4, 3, 2)
    loss = DetectionLoss(anchors, objectness=0.5, size=1280)
    entropy = [F.softplus(x[..., 4]).mean().item() for x in maps]
    nothing = some_objects(0, dtype=torch.float64)
    balance = (4, 1, 0.25, 0.06)
    assert loss(maps, nothing)["obj"].item() == pytest.approx(
        0.5 * 4 * 3 / 4 * sum(a * b for a, b in zip(balance, entropy)))
    targets = some_objects(3, dtype=torch.float64)
    box, _, classes = by_hand(maps, targets[0], anchors, list(balance))
    terms = loss(maps, targets)
    assert [terms["box"].item(), terms["cls"].item()] == pytest.approx(
        [0.05 * 3 / 4 * box, 0.3 * 3 / 4 * 3 / 80 * classes], rel=1e-6)


def test_targets_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="targets of 1 images for a batch of 2"):
        DetectionLoss(ANCHORS)(raw(2), some_objects(1))


# ---------------------------------------------------------------------------------------------------------- training


def test_recipe() -> None:
    recipe = default_recipe("detect", "yolov7x")
    assert recipe is RECIPES["dyyolov7"]
    assert (recipe.model, recipe.epochs, recipe.optimizer, recipe.lr, recipe.momentum, recipe.weight_decay) == (
        "dyyolov7", 300, "nesterov", 0.01, 0.937, 5e-4)
    assert (recipe.schedule, recipe.lr_min, recipe.warmup_epochs, recipe.ema) == ("cosine", 1e-3, 3, True)
    assert (recipe.mosaic, recipe.blend, recipe.box, recipe.objectness, recipe.classes) == (1, 0.15, 0.05, 0.7, 0.3)
    with pytest.raises(ValueError, match="multiples of 32"):
        recipe.but(size=100)


def test_it_is_of_one_depth() -> None:
    with pytest.raises(ValueError, match="of one depth"):
        tiny().distillation(RECIPES["dyyolov7"], ())


@pytest.mark.parametrize("name", ["yolov7", "yolov7_w6"])
def test_every_parameter_learns(name: str) -> None:
    net = tiny(name)
    recipe = RECIPES["dyyolov7"].but(model=name, size=128)
    step = net.supervised(recipe, ())
    assert isinstance(step, Supervised)
    assert step.summed
    x, targets = torch.rand(2, 3, 128, 128), some_objects(3, 0)
    losses = step(x, targets)
    assert {*losses} == {"box", "obj", "cls", "loss"}
    losses["loss"].backward()
    for key, parameter in net.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key
        assert parameter.grad.any(), key
    with torch.no_grad():
        terms = DetectionLoss(net.head[-1].anchor_grid, size=128)(net(x), targets)
    assert losses["loss"].item() == pytest.approx(sum(terms.values()).item(), rel=1e-4)
    assert step.criterion.anchors.shape == (len(TABLES[name].ends), 1, 3, 1, 1, 2)
    with pytest.raises(ValueError, match="multiples of"):
        net.supervised(recipe, (48,))


def test_both_detectors_of_a_cascade_learn() -> None:
    first, second = tiny("yolov7x"), tiny("yolov7x", seed=1)
    links = first.composite_links()
    x, targets = torch.rand(2, 3, 64, 64), some_objects(2, 1)
    loss = DetectionLoss(first.head[-1].anchor_grid)
    sum(loss(second.heads(second.features(x, links(first.features(x)))), targets).values()).backward()
    for part in (links, second, first.backbone):
        assert all(parameter.grad is not None and parameter.grad.any() for parameter in part.parameters())
    assert all(parameter.grad is None for parameter in first.head.parameters())


def test_it_learns_two_images() -> None:
    net = tiny()
    step = net.supervised(RECIPES["dyyolov7"].but(size=64), ())
    x, targets = torch.rand(2, 3, 64, 64), some_objects(2, 1)
    optimizer = torch.optim.Adam(net.parameters(), 5e-3)
    losses = []
    for _ in range(25):
        terms = step(x, targets)
        optimizer.zero_grad()
        terms["loss"].backward()
        optimizer.step()
        losses.append({name: value.item() for name, value in terms.items()})
    assert losses[-1]["loss"] < 0.5 * losses[0]["loss"]
    assert losses[-1]["box"] < 0.6 * losses[0]["box"]
