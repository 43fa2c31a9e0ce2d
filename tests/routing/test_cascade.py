"""Two routes and a router: any-depth nets, at once and as a stream."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from conftest import build, randomise
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import adn
from adn.core.errors import CheckpointError
from adn.core.state import stages
from adn.routers import Router, pooled
from adn.routing import (
    AdvantageRouter,
    BudgetController,
    Cascade,
    DifficultyRouter,
    ImageRouter,
    RoutedNet,
    ThresholdPolicy,
)
from adn.routing.decisions import merge, select
from adn.weights.checkpoint import read_metadata

ALWAYS, NEVER = ThresholdPolicy(-math.inf), ThresholdPolicy(math.inf)


class Given(Router):
    """Scores that stand in the first pixel of an image."""

    def forward(self, features: list[Tensor], path: Any = None) -> Tensor:
        return features[0][:, 0, 0, 0]


def net_and_images(name: str = "resnet18") -> tuple[nn.Module, Tensor]:
    net = adn.convert(randomise(build(name))).eval().double()
    for module in net.modules():
        if "skip" in module._modules:
            randomise(module._modules["skip"], seed=3)
    return net, torch.randn(8, 3, 40, 56, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def alone(net: nn.Module, x: Tensor, depths: list[str]) -> Tensor:
    rows = []
    for image, depth in zip(x, depths, strict=True):
        with adn.at_depth(net, depth), torch.no_grad():
            rows.append(net(image[None]))
    return torch.cat(rows)


@pytest.mark.parametrize("fused", [False, True])
def test_each_image_by_its_route(fused: bool) -> None:
    """A batch with mixed decisions equals its images alone; a route that none takes does not run."""
    net, x = net_and_images()
    x[:, 0, 0, 0] = torch.tensor([0.1, 0.9, 0.5, 0.7, 0.2, 0.51, 0.3, 0.8])
    routed = RoutedNet(adn.fuse(net) if fused else net, Given(), ThresholdPolicy(0.5, costs=(1.0, 3.0)),
                       shallow="TTTF", deep="super")
    wanted = alone(net, x, ["TTTF" if score <= 0.5 else "FFFF" for score in x[:, 0, 0, 0].tolist()])
    calls: list[tuple[int, str]] = []
    inner = routed.net.forward
    routed.net.__dict__["forward"] = lambda batch: calls.append((len(batch), str(adn.get_depth(routed.net)))) or inner(
        batch)
    with torch.no_grad():
        outputs, decision = routed.route(x)
    torch.testing.assert_close(outputs, wanted, rtol=1e-9, atol=1e-9)
    assert decision.deep.tolist() == [False, True, False, True, False, True, False, True]
    assert decision.cost == 2.0
    assert calls == [(4, "TTTF"), (4, "FFFF")]
    calls.clear()
    with torch.no_grad():
        torch.testing.assert_close(torch.cat([routed(image[None]) for image in x]), wanted, rtol=1e-9, atol=1e-9)
    assert [depth for _, depth in calls] == ["FFFF" if deep else "TTTF" for deep in decision.deep]
    for policy, depth in ((ALWAYS, "FFFF"), (NEVER, "TTTF")):
        calls.clear()
        with torch.no_grad():
            outputs, decision = routed.route(x, policy)
        assert calls == [(8, depth)]
        torch.testing.assert_close(outputs, alone(net, x, [depth] * 8), rtol=1e-9, atol=1e-9)


def test_inside_a_forward() -> None:
    """The router sees an early stage of the deploy form, the same features however deep the image will be."""
    net, x = net_and_images()
    fused = adn.fuse(net)
    router = DifficultyRouter([128]).double()
    routed = RoutedNet(fused, router, shallow="TTTT", deep="TTFF", at=2)
    with torch.no_grad():
        scores = routed.score(x)
        policy = ThresholdPolicy.from_share(scores.tolist(), 0.5)
        outputs, decision = routed.route(x, policy)
        with adn.at_depth(net, "TTTT"):
            stage = net.layer2(net.layer1(net.maxpool(net.act1(net.bn1(net.conv1(x))))))
        torch.testing.assert_close(scores, router([stage]), rtol=1e-6, atol=1e-6)  # means are of float64
    assert decision.deep.sum() == 4
    torch.testing.assert_close(decision.score, scores)
    wanted = alone(net, x, ["TTFF" if deep else "TTTT" for deep in decision.deep])
    torch.testing.assert_close(outputs, wanted, rtol=1e-9, atol=1e-9)


def test_scores_of_a_loader() -> None:
    net, x = net_and_images()
    net.float()
    x = x.float()
    routed = RoutedNet(net, ImageRouter(size=24).eval()).train()
    loader = DataLoader(TensorDataset(x, torch.zeros(len(x))), 3)
    scores = routed.scores(loader)
    assert routed.training
    with torch.no_grad():
        torch.testing.assert_close(torch.tensor(scores), routed.eval().score(x), rtol=1e-4, atol=1e-5)
    assert len(set(scores)) == len(x)
    c1, c2 = routed.measure(x[:1], rounds=2, warmup=0)
    assert c1 > 0 < c2


def test_a_stream_is_causal() -> None:
    """Each image runs at the depth that the score of the one before it says, from the features of what ran."""
    net, x = net_and_images()
    names = [stage.name for stage in stages(net)][1:3]
    router = AdvantageRouter({"input": 128, "pred": 256}, grid=None).double().eval()
    seen: list[tuple[list[Tensor], int]] = []
    router.register_forward_pre_hook(lambda module, args: seen.append(args))
    routed = RoutedNet(net, router, decide="next", taps=names)
    scores = []
    for depth in ("TTTT", "FFFF"):  # what the router would say, by the one and by the other depth
        with adn.at_depth(net, depth), torch.no_grad():
            stage2 = net.layer2(net.layer1(net.maxpool(net.act1(net.bn1(net.conv1(x))))))
            maps = [stage2, net.layer3(stage2)]
            scores.append(router([pooled(m) for m in maps], int(depth == "FFFF")).tolist())
    policy = ThresholdPolicy(sorted([*scores[0], *scores[1]])[len(x)])
    seen.clear()
    deep, wanted = False, []
    for t in range(len(x)):
        wanted.append(deep)
        deep = scores[int(deep)][t] > policy.tau
    assert len(set(wanted)) == 2
    for start in range(2):  # a second stream begins shallow, too
        routed.reset()
        for t, image in enumerate(x):
            with torch.no_grad():
                outputs, decision = routed.step(image[None], policy=policy)
            assert decision.deep.item() == wanted[t], (start, t)
            depth = "FFFF" if wanted[t] else "TTTT"
            torch.testing.assert_close(outputs, alone(net, image[None], [depth]), rtol=1e-9, atol=1e-9)
            assert decision.score.item() == pytest.approx(scores[int(wanted[t])][t], abs=1e-9)
    assert len(seen) == 2 * len(x)


def test_a_score_is_read_when_the_next_image_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not while the host could launch something else."""
    net, x = net_and_images()
    routed, reads, item = RoutedNet(net, Given(), ThresholdPolicy(0.0), decide="next"), [], Tensor.item
    monkeypatch.setattr(Tensor, "item", lambda self: reads.append(self.shape) or item(self))
    with torch.no_grad():
        routed.step(x[:1])
        assert not reads
        routed.step(x[1:2])
        assert reads == [(1,)]


def test_a_stream_with_a_budget() -> None:
    """Costs given by the caller, energies say, come to what is asked for."""
    net, _ = net_and_images()
    x = torch.randn(300, 1, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    energy = {False: 10.0, True: 20.0}
    scores = x[:, 0, 0, 0, 0].tolist()
    controller = BudgetController(10, 20, scores, kp=1.0, ki=0.05, beta=0.9)
    routed = RoutedNet(net, Given(), controller, decide="next")
    routed.net.__dict__["forward"] = lambda batch: batch.sum()  # what it computes does not matter
    spent = []
    for image in x:
        spent.append(energy[routed._ahead])
        _, decision = routed.step(image, target=14, cost=lambda: spent[-1])
        assert decision.cost == spent[-1]
    assert sum(spent[100:]) / 200 == pytest.approx(14, rel=0.05)
    with pytest.raises(ValueError, match=r"a BudgetController follows a target: routed\.step\(x, target=\.\.\.\)"):
        routed.step(x[0])


def test_detectors_of_lists_of_images() -> None:
    """Images of any sizes, and a list of what was found in each."""
    torch.manual_seed(0)
    model = torchvision.models.detection.retinanet_resnet50_fpn(
        weights=None, weights_backbone=None, num_classes=3, min_size=64, max_size=96, score_thresh=0.0)
    net = adn.convert(randomise(model)).eval()
    x = [torch.rand(3, 64, 90), torch.rand(3, 70, 61), torch.rand(3, 64, 64)]
    router = ImageRouter(size=16).eval()
    routed = RoutedNet(net, router)
    with torch.no_grad():
        scores = routed.score(x)
        policy = ThresholdPolicy(float(scores.median()) - 1e-9)
        outputs, decision = routed.route(x, policy)
        assert 0 < decision.deep.sum() < 3
        for deep in (False, True):  # in batches of their own, which the net pads to one size
            places = [i for i in range(3) if decision.deep[i] == deep]
            with adn.at_depth(net, "super" if deep else "base"):
                wanted = net([x[i] for i in places])
            for i, one in zip(places, wanted, strict=True):
                assert torch.equal(outputs[i]["boxes"], one["boxes"])


def test_parts_of_batches() -> None:
    batch = {"a": torch.arange(6.0).reshape(3, 2), "b": (torch.arange(3), [torch.ones(3, 1), torch.ones(3, 2)]),
             "each": [{"boxes": torch.zeros(i, 4)} for i in range(3)], "no": None}
    parts = [([2, 0], select(batch, [2, 0], 3)), ([1], select(batch, [1], 3))]
    assert parts[0][1]["a"].tolist() == [[4, 5], [0, 1]]
    assert [len(one["boxes"]) for one in parts[0][1]["each"]] == [2, 0]
    whole = merge(parts)
    assert torch.equal(whole["a"], batch["a"])
    assert torch.equal(whole["b"][0], batch["b"][0])
    assert [tuple(x.shape) for x in whole["b"][1]] == [(3, 1), (3, 2)]
    assert [len(one["boxes"]) for one in whole["each"]] == [0, 1, 2]
    with pytest.raises(TypeError, match="the routes return a set"):
        merge([([0], {1}), ([1], {2})])


@pytest.mark.parametrize("kind", ["image", "inside", "stream"])
def test_through_a_file(kind: str, tmp_path: Path) -> None:
    """A routed net is one file: weights, depths, router and policy."""
    net = adn.create_model("anydepth_resnet18", num_classes=5).eval()
    x = torch.randn(8, 3, 40, 56, generator=torch.Generator().manual_seed(0))
    controller = BudgetController(1.0, 2.0, [0.1, 0.3], 1.0, 0.1, 0.5)
    controller.update(1.5, 1.0, 0.2)
    routed = {
        "image": lambda: RoutedNet(net, ImageRouter(size=24), ThresholdPolicy(-math.inf, costs=(1.0, 2.0))),
        "inside": lambda: RoutedNet(adn.fuse(net), DifficultyRouter([128]), ThresholdPolicy(0.5), shallow="TTTT",
                                    deep="TTFF", at=2),
        "stream": lambda: RoutedNet(net, AdvantageRouter({"input": 128}), controller, decide="next", taps=["layer2"]),
    }[kind]().eval()
    randomise(routed.router)
    file = tmp_path / "routed.safetensors"
    adn.save(routed, file, extra={"data": {"size": 40}})
    again = adn.load(file)
    assert read_metadata(file)["extra"] == {"data": {"size": 40}}
    assert isinstance(again, RoutedNet)
    assert not again.training
    assert repr(again).splitlines()[:2] == repr(routed).splitlines()[:2]
    with torch.no_grad():
        if kind == "stream":
            assert again.policy.to_dict() == routed.policy.to_dict()
            found, wanted = (each.step(x[:1], target=1.4, cost=lambda: 1.0) for each in (again, routed))
        else:
            assert again.policy == routed.policy
            found, wanted = again.route(x), routed.route(x)
    torch.testing.assert_close(found[0], wanted[0])
    torch.testing.assert_close(found[1].score, wanted[1].score)
    routed.policy = object()
    with pytest.raises(ValueError, match="a policy that is a object has no place in a file"):
        adn.save(routed, file)
    with pytest.raises(CheckpointError, match=r"the description of a router cannot be read \(KeyError\('Other'\)\)"):
        RoutedNet.from_dict(net, {**again.routing_to_dict()[1], "router": {"kind": "Other", "settings": {}}}, {})


def test_what_is_refused() -> None:
    net, x = net_and_images()
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(ValueError, match=r"no policy to decide by: routed\.policy = "):
        RoutedNet(net, Given())(x)
    with pytest.raises(ValueError, match="there is no router: train one"):
        RoutedNet(net, policy=ALWAYS)(x)
    with pytest.raises(ValueError, match="both depths are TTTT; pass two"):
        RoutedNet(net, shallow="TTTT", deep="base")
    with pytest.raises(ValueError, match="decide='later'; pass one of"):
        RoutedNet(net, decide="later")
    with pytest.raises(ValueError, match=r"takes a deploy form: RoutedNet\(adn.fuse\(net\)"):
        RoutedNet(net, at=1)
    fused = adn.fuse(net)
    with pytest.raises(ValueError, match=r"at=1, but the depths TTTT and FFFF part at flag 0 already"):
        RoutedNet(fused, at=1)
    with pytest.raises(ValueError, match="at=4; pass the index of a flag, 0 to 3"):
        RoutedNet(fused, at=4)
    with pytest.raises(ValueError, match="no stage 'layer9'; this net has layer1, "):
        RoutedNet(net, decide="next", taps=["layer9"])
    with pytest.raises(ValueError, match="taps are for streams"):
        RoutedNet(fused, decide="next", taps=["layer1"])
    with pytest.raises(ValueError, match="8 images; a stream comes one by one"):
        RoutedNet(net, Given(), ALWAYS, decide="next").step(x)
    with pytest.raises(ValueError, match=r"images of shape \(8, 3, 40, 56\), the router is for \(B, 1, H, W\)"):
        RoutedNet(net, ImageRouter(1), ALWAYS)(x)
    with pytest.raises(ValueError, match="it was made for another net, or for other stages"):
        RoutedNet(fused, DifficultyRouter([64]).double(), ALWAYS, deep="TTFF", at=2)(x)
    assert isinstance(Cascade.from_anydepth(net, "TTTT", "FFFF"), RoutedNet)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
