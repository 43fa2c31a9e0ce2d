"""Plans: shown, edited, written by hand, refused."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from conftest import build, randomise
from torch import nn

import adn
from adn.core import behaviours


class ShortcutA(nn.Module):
    """Option A of the CIFAR ResNet: every second pixel, new channels padded with zeros; no parameters."""

    def __init__(self, pad: int) -> None:
        super().__init__()
        self.pad = pad

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.pad, self.pad))


class CifarBlock(nn.Module):
    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut = nn.Sequential() if stride == 1 else ShortcutA((width - width_in) // 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + self.shortcut(x))


class CifarResNet(nn.Module):
    """ResNet-20/56 for CIFAR (He et al. 2016, sec. 4.2): no family knows it."""

    def __init__(self, blocks: int = 3, widths: Sequence[int] = (16, 32, 64)) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        width_in = 16
        for k, width in enumerate(widths):
            layer = [CifarBlock(width_in if i == 0 else width, width, 2 if k and i == 0 else 1) for i in range(blocks)]
            setattr(self, f"layer{k + 1}", nn.Sequential(*layer))
            width_in = width
        self.linear = nn.Linear(width_in, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean((2, 3)))


def cifar() -> nn.Module:
    torch.manual_seed(0)
    return randomise(CifarResNet()).eval()


LAYERS = ["layer1", "layer2", "layer3"]
X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def test_prints_as_a_table() -> None:
    text = str(adn.plan(build("resnet50")))
    assert text.splitlines()[0] == "resnet: 4 stages to switch, 16 depths"
    assert "layer3.0 .. 2  layer3.3 .. 5" in text
    assert len(text.splitlines()) == 6


def test_editing_moves_the_split() -> None:
    model = build("resnet50")
    plan = adn.plan(model)
    plan[2].essential = 1
    plan[2].norms = None
    del plan[0]
    net = adn.convert(model, plan=plan)
    assert [(len(s.essential), len(s.refinement)) for s in adn.stages(net)] == [(2, 2), (1, 5), (2, 1)]
    assert not isinstance(net.layer1[0].bn1, behaviours.SkipNorm)
    assert not isinstance(net.layer3[1].bn1, behaviours.SkipNorm)


def test_planning_changes_nothing() -> None:
    model = cifar()
    before = copy.deepcopy(model)
    adn.plan(model)
    adn.Plan.read(model, LAYERS).resolve(model)
    assert [type(m) for m in model.modules()] == [type(m) for m in before.modules()]


@pytest.mark.parametrize("plan", [
    LAYERS,
    {"layer1": 2, "layer2": 2, "layer3": 2},
    [adn.StagePlan(name, [f"{name}.{i}" for i in range(3)]) for name in LAYERS],
    adn.Plan([adn.StagePlan(name, [f"{name}.{i}" for i in range(3)], essential=2) for name in LAYERS]),
])
def test_by_hand(plan) -> None:
    model = cifar()
    source = copy.deepcopy(model)
    net = adn.convert(model, plan=plan)
    outputs = {}
    with torch.inference_mode():
        for depth in adn.depths(net):
            adn.set_depth(net, depth)
            outputs[depth] = net(X)
        assert torch.equal(outputs[adn.Depth("FFF")], source(X))
    assert len({out.numpy().tobytes() for out in outputs.values()}) == 8
    assert adn.stages(net)[0].plan.norms == [f"layer1.{i}.bn{j}" for i in (0, 1) for j in (1, 2)]


def test_round_trip_through_a_dict() -> None:
    plan = adn.plan(build("mobilenetv2_100"))
    again = adn.Plan.from_dict(plan.to_dict())
    assert again == plan
    assert again.family == "mobilenet"


def untouched(model: nn.Module, before: nn.Module) -> None:
    assert [type(m) for m in model.modules()] == [type(m) for m in before.modules()]
    assert model.state_dict().keys() == before.state_dict().keys()
    assert "_adn" not in model.__dict__
    assert not model._load_state_dict_pre_hooks


@pytest.mark.parametrize(("plan", "message"), [
    (["layer1", "layer9"], r"'layer9'.*does not have.*layer1, layer2"),
    ([adn.StagePlan("s", ["layer1.0", "layer1.7"])], r"layer1\.7"),
    ([adn.StagePlan("s", [])], "no blocks"),
    ([], "no stage"),
    ([adn.StagePlan("s", ["layer1.0"])], "no stage .* has a block to bypass"),
    ([adn.StagePlan("s", ["layer1.0", "layer1.0"])], "twice"),
    ([adn.StagePlan("s", ["layer1.0", "layer1.1"], essential=0)], "cannot be essential"),
    ([adn.StagePlan("s", ["layer1.0", "layer1.1"], essential=3)], "cannot be essential"),
    ([adn.StagePlan("s", ["layer1.0", "layer1.1"], norms=["layer1.0.conv1"])], "Conv2d, not a norm"),
    ([adn.StagePlan("s", ["layer1.0", "layer1.1"], norms=["layer1.1.bn1"])], "refinement block"),
    ([adn.StagePlan("a", ["layer1.0", "layer1.1"]), adn.StagePlan("b", ["layer1.1", "layer1.2"])], "belongs to stages"),
    ([adn.StagePlan("a", ["layer1.0", "layer1.1"], norms=["bn1", "layer1.0.bn1"]),
      adn.StagePlan("b", ["layer2.0", "layer2.1"], norms=["bn1", "layer2.0.bn1"])], "'bn1' belongs to stages"),
    ([adn.StagePlan("s", ["layer1.2", "layer2.0"])],
     r"'layer2.0' cannot be .* \(1, 16, 224, 224\) into \(1, 32, 112, 112\)"),
    ([adn.StagePlan("s", ["layer1.0", "conv1"])],
     r"'conv1' .* \(1, 3, 224, 224\) into \(1, 16, 224, 224\); begin a stage with it"),
    ([3], "StagePlans or names of containers"),
    ("layer1", r"pass plan=\['layer1'\]"),
    ({"layer1": "1"}, "cannot be essential"),
    ({"layer1": 2.0}, "cannot be essential"),
    ({"layer1": True}, "cannot be essential"),
])
def test_refused_and_left_untouched(plan, message) -> None:
    model = cifar()
    before = copy.deepcopy(model)
    with pytest.raises(adn.ConversionError, match=message):
        adn.convert(model, plan=plan)
    untouched(model, before)


class Pool(nn.Module):
    """Changes the shape without a module that shows it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[:, :, ::2, ::2]


class Odd(nn.Module):
    """Runs on no usual input: nothing can be seen before it does."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.reshape(len(x), 3, 40, 40)


def test_a_change_of_shape_that_only_running_shows() -> None:
    def model(*first: nn.Module) -> nn.Module:
        return nn.Sequential(*first, nn.Conv2d(3, 8, 3, padding=1), nn.Sequential(nn.BatchNorm2d(8), Pool()))

    with pytest.raises(adn.ConversionError, match=r"\(1, 8, 224, 224\) into \(1, 8, 112, 112\)"):
        adn.convert(model(), plan=["1"])
    net = adn.convert(model(Odd()), plan=["2"])
    with pytest.raises(RuntimeError, match=r"\(2, 8, 40, 40\) into \(2, 8, 20, 20\)"):
        net(torch.randn(2, 3, 40, 40))


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        return self.norm(x), None


def test_a_block_that_returns_something_else() -> None:
    net = adn.convert(nn.Sequential(nn.Sequential(nn.LayerNorm(4), Pair())), plan=["0"])
    with pytest.raises(RuntimeError, match="into tuple"):
        net(torch.randn(2, 4))


def test_a_norm_with_an_attribute_of_the_same_name() -> None:
    model = cifar()
    model.layer1[0].bn1.skip = 1
    with pytest.raises(adn.ConversionError, match="already has an attribute"):
        adn.convert(model, plan=LAYERS)


def test_blocks_called_with_keywords_and_more_arguments() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(4)

        def forward(self, hidden: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
            return hidden + self.norm(hidden) * (1 if mask is None else mask)

    class Stack(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(Block() for _ in range(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for block in self.blocks:
                x = block(hidden=x, mask=torch.ones(()))
            return x

    net = adn.convert(randomise(Stack()), plan=["blocks"])
    x = torch.randn(2, 4)
    by_hand = x
    adn.set_depth(net, "T")
    for block in net.blocks[:2]:
        by_hand = by_hand + block.norm.skip(by_hand)
    torch.testing.assert_close(net(x), by_hand)


class TestEdited:
    def test_stale_norms_are_noticed(self) -> None:
        for essential, message in ((4, "no norm of its essential block 'layer3.3'"), (2, r"'layer3\.2\.bn1' lies in")):
            model = build("resnet50")
            plan = adn.plan(model)
            plan[2].essential = essential
            with pytest.raises(adn.ConversionError, match=f"{message}.*norms=None"):
                adn.convert(model, plan=plan)

    def test_no_norms_at_all_is_a_choice(self) -> None:
        """The ablation without skip-aware norms."""
        model = build("resnet18")
        plan = adn.plan(model)
        for stage in plan:
            stage.norms = []
        net = adn.convert(model, plan=plan)
        assert not any(isinstance(m, behaviours.SkipNorm) for m in net.modules())
        assert len(adn.depths(net)) == 16

    def test_merged_stages_fail_with_a_reason(self) -> None:
        model = build("resnet18")
        plan = adn.plan(model)
        plan[0].blocks += plan.pop(1).blocks
        plan[0].norms = None
        net = adn.convert(model, plan=plan)
        with pytest.raises(RuntimeError, match="only a block that keeps the shape can be bypassed"):
            net(torch.randn(1, 3, 64, 64))

    def test_an_unchanged_plan_is_as_good_as_none(self) -> None:
        net = adn.convert(model := build("resnet18"), plan=adn.plan(model))
        assert not any(isinstance(m, behaviours.ShapeChecked) for m in net.modules())


def test_one_module_in_two_places() -> None:
    model = cifar()
    model.layer2[1] = model.layer1[1]
    before = copy.deepcopy(model)
    with pytest.raises(adn.ConversionError, match="are one module"):
        adn.convert(model, plan=[adn.StagePlan("a", ["layer1.0", "layer1.1"]),
                                 adn.StagePlan("b", ["layer2.0", "layer2.1"])])
    untouched(model, before)


def test_a_replaced_forward_is_refused() -> None:
    model = cifar()
    norm = model.layer1[0].bn1
    norm.forward = lambda x: x
    with pytest.raises(adn.ConversionError, match=r"layer1\.0\.bn1.*convert the model first"):
        adn.convert(model, plan=LAYERS)


def test_an_attribute_called_switch_is_the_users() -> None:
    model = cifar()
    model.layer1[2].switch = nn.ReLU()
    model.layer1[0].bn1.switch = 0.5
    net = adn.convert(model, plan=LAYERS)
    adn.set_depth(net, "TTT")
    net(X)
    assert net.layer1[0].bn1.switch == 0.5
    assert isinstance(adn.extract(net, "super").layer1[2].switch, nn.ReLU)


def test_the_input_of_a_block_by_keyword_after_others() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(4)

        def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            return x + mask * self.norm(x)

    class Stack(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([Block(), Block()])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for block in self.blocks:
                x = block(mask=torch.ones(()), x=x)
            return x

    net = adn.convert(randomise(Stack()), plan=["blocks"])
    adn.set_depth(net, "T")
    x = torch.randn(2, 4)
    torch.testing.assert_close(net(x), x + net.blocks[0].norm.skip(x))


def test_programs_are_refused() -> None:
    for program in (torch.fx.symbolic_trace(cifar()), torch.jit.trace(cifar(), X)):
        with pytest.raises(adn.ConversionError, match="convert the model, then trace it"):
            adn.convert(program, plan=LAYERS)
