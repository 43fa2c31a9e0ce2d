"""DynamicDet: two YOLOv7 in cascade, as an any-depth net of two depths, and with its router."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from compilations import count
from conftest import randomise
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import adn
from adn.models.yolov7.model import YOLOv7, YOLOv7Cascade
from adn.models.yolov7.recipes import YOLOv7Recipe
from adn.routing import Cascade, RoutedNet, ThresholdPolicy
from adn.tasks import DETECT, is_detector

PARAMETERS = {"dyyolov7": 80_621_333, "dyyolov7x": 151_093_149, "dyyolov7_w6": 147_364_049}
ALWAYS, NEVER = ThresholdPolicy(-math.inf), ThresholdPolicy(math.inf)


def narrow(name: str = "dyyolov7", classes: int = 4) -> nn.Module:
    torch.manual_seed(0)
    return randomise(adn.create_model(name, width=0.1, num_classes=classes)).eval()


def images(count: int = 8) -> torch.Tensor:
    return torch.rand(count, 3, 64, 96, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters(name: str) -> None:
    with torch.device("meta"):
        net = adn.create_model(name)
    assert sum(p.numel() for p in net.parameters()) == PARAMETERS[name]
    assert list(map(str, adn.depths(net))) == ["2", "1"]
    assert is_detector(net)


def test_is_the_reference(golden, dynamic) -> None:
    """Weights by the original's names; maps and boxes of both routes, scores, on three images."""
    manifest, arrays = golden("dynamicdet_dyyolov7")
    arrays = {name: np.asarray(value) for name, value in arrays.items()}
    kept = {name: torch.from_numpy(arrays[f"keep.{name}"]) for name in manifest["keep"]}
    net = adn.create_model("dyyolov7").eval()
    report = adn.load_weights(net, {**dynamic.fixture_state(manifest), **kept})
    assert report.complete
    assert report.naming.startswith("reference DynamicDet")
    routed = RoutedNet(net)

    def agree(found: torch.Tensor, name: str) -> None:
        wanted = arrays[name]
        assert np.abs(found.flatten()[:: manifest["every"]].numpy() - wanted).max() < 1e-4 * np.abs(wanted).max(), name

    for key in manifest["inputs"]:
        x = dynamic.fixture_input(manifest, key)
        for route, policy, depth in (("first", NEVER, "1"), ("second", ALWAYS, "2")):
            with torch.no_grad():
                outputs, decision = routed.route(x, policy)
            np.testing.assert_allclose(1 - decision.score, arrays[f"{key}.score"].flatten(), rtol=0, atol=1e-5)
            agree(outputs["decoded"], f"{key}.{route}.pred")
            for level, maps in enumerate(outputs["maps"]):
                agree(maps, f"{key}.{route}.map{level}")
            with adn.at_depth(net, depth), torch.no_grad():
                assert torch.equal(net(x)["decoded"], outputs["decoded"])


@pytest.mark.parametrize("name", ["dyyolov7", "dyyolov7x", "dyyolov7_w6"])
def test_names_of_the_original(name: str) -> None:
    """All of a published file finds its place: links, backbones whose numbers shift, heads, the router."""
    net = narrow(name)
    shift = 4 if "w6" in name else 5
    fusions = {"dyyolov7": (7, 10, 24, 38, 52), "dyyolov7x": (7, 10, 26, 42, 58), "dyyolov7_w6": (7, 17, 27, 37, 47)}
    numbers = [i for i in range(5, 100) if i not in fusions[name]]
    theirs = {}
    for key, value in net.state_dict().items():
        for ours, their in (("backbone.", "model_b."), ("answer.routes.0.head.", "model_h."),
                            ("answer.routes.1.head.", "model_h2."), ("answer.routes.1.links.linears.", "model_b2.")):
            if key.startswith(ours):
                theirs[their + key.removeprefix(ours)] = value
        if key.startswith("answer.routes.1.backbone."):
            number, _, rest = key.removeprefix("answer.routes.1.backbone.").partition(".")
            theirs[f"model_b2.{numbers[int(number) - (5 - shift)]}.{rest}"] = value
        if key.startswith("router."):
            theirs[key] = value
    assert len(theirs) == len(net.state_dict())
    fresh = adn.create_model(name, width=0.1, num_classes=4).eval()
    assert adn.load_weights(fresh, theirs).complete
    assert all(torch.equal(value, net.state_dict()[key]) for key, value in fresh.state_dict().items())


@pytest.mark.parametrize("fused", [False, True])
def test_a_batch_is_its_images_alone(fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mixed decisions; what is not taken does not run, and the first backbone runs once. Of the deploy form, too."""
    net, x = narrow(), images()
    routed = RoutedNet(adn.fuse(net) if fused else net)
    with torch.no_grad():
        scores = RoutedNet(net).score(x)
        torch.testing.assert_close(routed.score(x), scores, rtol=1e-4, atol=1e-5)
    policy = ThresholdPolicy.from_share(scores.tolist(), 0.5)
    calls: dict[str, list[int]] = {"backbone": [], "first": [], "second": []}

    def counted(name: str, run: Any) -> Any:
        def call(*inputs: Any) -> Any:
            calls[name].append(len(inputs[0][0] if isinstance(inputs[0], list) else inputs[0]))
            return run(*inputs)

        return call

    if fused:
        before, answer, _ = routed.net.segments
        before._calls[False] = counted("backbone", before._calls[False])
        for entry, name in ((1, "first"), (2, "second")):
            answer._calls[entry] = counted(name, answer._calls[entry])
        monkeypatch.setattr("adn.runtime.fuse.fastest", lambda ways, device: "split")
    else:
        first, second = net.answer.routes
        for name, module in (("backbone", net.backbone), ("first", first), ("second", second)):
            module.register_forward_pre_hook(lambda _module, args, name=name: counted(name, lambda *_: None)(*args))
    with torch.no_grad():
        outputs, decision = routed.route(x, policy)
        assert decision.deep.tolist() == [policy.deep(score) for score in scores.tolist()]
        assert decision.deep.sum() == 4
        assert calls == {"backbone": [8], "first": [4], "second": [4]}
        for i, image in enumerate(x):
            alone, one = routed.route(image[None], policy)
            assert one.deep.item() == decision.deep[i]
            torch.testing.assert_close(outputs["decoded"][i : i + 1], alone["decoded"], rtol=1e-4, atol=1e-4)
            for maps, own in zip(outputs["maps"], alone["maps"], strict=True):
                torch.testing.assert_close(maps[i : i + 1], own, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(outputs["decoded"][i : i + 1], RoutedNet(net).route(image[None], policy)[0][
                "decoded"], rtol=1e-4, atol=1e-3)
        calls["second"].clear()
        routed.route(x, NEVER)
        assert not calls["second"]
        calls["first"].clear()
        routed.route(x, ALWAYS)
        assert not calls["first"]
    assert len(routed.postprocess(outputs, [(96, 64)] * 8)) == 8


@pytest.mark.parametrize("name", ["dyyolov7", "dyyolov7x", "dyyolov7_w6"])
def test_every_form(name: str) -> None:
    """At both depths: extracted and fused nets compute the same; in training both detectors answer."""
    net = narrow(name).double()
    x = torch.rand(2, 3, 64, 128, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    fused = adn.fuse(net)
    seen = []
    for depth in adn.depths(net):
        adn.set_depth(net, depth)
        adn.set_depth(fused, depth)
        with torch.no_grad():
            outputs = net(x)
            assert torch.equal(adn.extract(net, depth)(x)["decoded"], outputs["decoded"])
            torch.testing.assert_close(fused(x)["decoded"], outputs["decoded"], rtol=1e-9, atol=1e-9)
        seen.append(outputs["maps"])
    net.train()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    with torch.no_grad():
        both = net(x)
    assert all(torch.equal(a, b) for a, b in zip(both, [*seen[1], *seen[0]], strict=True))


def test_both_detectors_learn() -> None:
    """The sum of both losses, each by its own assignment (step 1); the router has no part in it."""
    net, x = narrow().train(), images(2)
    targets = [{"labels": torch.tensor([1]), "boxes": torch.tensor([[0.5, 0.5, 0.4, 0.6]])},
               {"labels": torch.zeros(0, dtype=torch.int64), "boxes": torch.zeros(0, 4)}]
    recipe = YOLOv7Recipe(model="dyyolov7", size=64, multi_scale=False)
    loss = DETECT.loss(net, recipe)
    terms = loss(x, targets)
    assert {name for name in terms if name != "loss"} == {
        f"{which}.{term}" for which in ("first", "second") for term in ("box", "obj", "cls")}
    torch.testing.assert_close(terms["loss"], sum(value for name, value in terms.items() if name != "loss"))
    terms["loss"].backward()
    without = {name.partition(".")[0] for name, p in net.named_parameters() if p.grad is None}
    assert without == {"router"}
    levels = len(net(x)) // 2
    maps = net.eval().train()(x)
    torch.testing.assert_close(loss.criterion.criterion(maps[:levels], targets)["box"],
                               loss.criterion(maps, targets)["first.box"])


def test_both_ways_of_a_batch_agree() -> None:
    """The deploy form picks from what both detectors made of all images, or parts them."""
    net, x = narrow().double(), images(3).double()
    fused, entries = adn.fuse(net), [2, 1, 2]
    with torch.no_grad():
        wanted = [fused(x)["decoded"] for adn_depth in ("1", "2") if adn.set_depth(fused, adn_depth) is None]
        for given in (torch.tensor(entries, dtype=torch.int32), entries):
            found = fused.per_image(x, lambda k, *inputs, given=given: given)
            for i, entry in enumerate(entries):
                torch.testing.assert_close(found["decoded"][i], wanted[entry - 1][i], rtol=1e-9, atol=1e-9)


def test_a_stream_of_the_deploy_form() -> None:
    """Decided for the next image: the score is that of the net, and what is not decided for does not run."""
    net, x = narrow().double(), images(4).double()
    scores = RoutedNet(net)
    with torch.no_grad():
        scores = scores.score(x)
        policy = ThresholdPolicy(float(scores.median()))
        routed = RoutedNet(adn.fuse(net), policy=policy, decide="next")
        ahead = False
        for image, score in zip(x, scores, strict=True):
            outputs, decision = routed.step(image[None])
            assert decision.deep.item() is ahead
            torch.testing.assert_close(decision.score.item(), score.item(), rtol=1e-6, atol=1e-6)
            with adn.at_depth(net, "2" if ahead else "1"):
                torch.testing.assert_close(outputs["decoded"], net(image[None])["decoded"], rtol=1e-9, atol=1e-9)
            ahead = policy.deep(score.item())


def test_through_a_file(tmp_path: Path) -> None:
    net, x = narrow(), images(2)
    with torch.no_grad():
        scores = RoutedNet(net).score(x)
    routed = RoutedNet(net, policy=ThresholdPolicy(float(scores.mean()), costs=(1.0, 2.0)))
    adn.save(routed, tmp_path / "routed.safetensors")
    again = adn.load(tmp_path / "routed.safetensors")
    assert again.policy == routed.policy
    with torch.no_grad():
        (found, one), (wanted, other) = again.route(x), routed.route(x)
    assert torch.equal(found["decoded"], wanted["decoded"])
    assert torch.equal(one.deep, other.deep)
    adn.save(net, tmp_path / "net.safetensors")
    assert isinstance(adn.load(tmp_path / "net.safetensors"), YOLOv7Cascade)


def test_of_two_detectors() -> None:
    torch.manual_seed(0)
    first, second = (YOLOv7(width=0.1, num_classes=3).eval() for _ in range(2))
    routed = Cascade.from_detectors(first, second).eval()
    with torch.no_grad():
        torch.testing.assert_close(routed.route(images(2), NEVER)[0]["decoded"], first(images(2))["decoded"])
    with pytest.raises(ValueError, match="detectors of 3 and of 4 classes; pass two for the same ones"):
        Cascade.from_detectors(first, YOLOv7(width=0.1, num_classes=4))
    with pytest.raises(ValueError, match="detectors of strides 32 and 64"):
        Cascade.from_detectors(first, YOLOv7("yolov7_w6", width=0.1, num_classes=3))
    with pytest.raises(ValueError, match="a Linear does not give its maps to another detector"):
        Cascade.from_detectors(nn.Linear(1, 1), second)


def test_a_depth_change_compiles_nothing() -> None:
    """Neither of the net, nor of routing over it, once both routes have run."""
    torch._dynamo.reset()
    net, x = narrow(), images(4)
    with torch.no_grad():
        expected = {}
        for depth in adn.depths(net):
            with adn.at_depth(net, depth):
                expected[depth] = net(x)["decoded"]
        compiled = adn.compile(net, backend="aot_eager")
        counts = count(compiled, x, expected)
        assert (counts.depths, counts.recompiles, counts.given_up) == (2, 0, ())
        with torch.compiler.set_stance("fail_on_recompile"):
            for depth in ("1", "2", "1"):
                with adn.at_depth(compiled, depth):
                    torch.testing.assert_close(compiled(x)["decoded"], expected[adn.Depth(depth)], rtol=1e-4, atol=1e-3)
    torch._dynamo.reset()


@pytest.mark.parametrize("fused", [False, True])
def test_in_an_engine(fused: bool) -> None:
    net, x = narrow().double(), images(3).double()
    engine = adn.Engine(adn.fuse(net) if fused else net, batch_sizes=(1, 4))
    for depth in ("2", "1", "2"):
        with torch.no_grad(), adn.at_depth(net, depth):
            torch.testing.assert_close(engine(x, depth=depth)["decoded"], net(x)["decoded"], rtol=1e-9, atol=1e-9)


# GFLOPs at 10, 50, 90 and 100 % of images on the second route, as published (DynamicDet, on COCO).
PUBLISHED = {"dyyolov7": (640, 104.7, (112.4, 143.2, 174.0, 181.7)),
             "dyyolov7x": (640, 189.9, (201.7, 248.9, 296.1, 307.9)),
             "dyyolov7_w6": (1280, 360.0, (384.2, 480.8, 577.4, 601.6))}


@pytest.mark.parametrize("name", PUBLISHED)
def test_operations_are_the_published_ones(name: str) -> None:
    """Of the deploy form, whose first route is the published one to the digit where additions of biases count, too.
    The published second route counts some of them, so that of it, and of mixtures, 0.15 % are left open."""
    size, first, mixed = PUBLISHED[name]
    with torch.device("meta"):
        fused, x = adn.fuse(adn.create_model(name).eval()), torch.zeros(1, 3, size, size)
    gflops, additions = [], []
    for depth in ("1", "2"):
        adn.set_depth(fused, depth)
        biases = Outputs()
        with FlopCounterMode(display=False) as counter, biases:
            fused(x)
        gflops.append(counter.get_total_flops() / 1e9)
        additions.append(2 * biases.count / 1e9)
    assert gflops[0] + additions[0] == pytest.approx(first, abs=0.06 if size == 640 else 0.2)
    policy = ThresholdPolicy(0.0, costs=(gflops[0] + additions[0], gflops[1] + additions[0]))
    for share, wanted in zip((0.1, 0.5, 0.9, 1.0), mixed, strict=True):
        assert policy.cost(share) == pytest.approx(wanted, rel=1.5e-3)
    exact = ThresholdPolicy(0.0, costs=(first, mixed[-1]))
    assert [round(exact.cost(share), 1) for share in (0.1, 0.5, 0.9, 1.0)] == list(mixed)


class Outputs(TorchDispatchMode):
    """Counts the elements that convolutions give."""

    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = function(*args, **(kwargs or {}))
        if function.overloadpacket is torch.ops.aten.convolution:
            self.count += out.numel()
        return out
