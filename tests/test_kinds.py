"""A kind of choice of the tests' own, in nothing but a class: everything handles it as it handles the library's."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from typing import ClassVar

import pytest
import torch
from compilations import count
from former_nets import Residual
from torch import nn

import adn
from adn.core.behaviours import Follows
from adn.core.kinds import KINDS, Follower, Form, Kind
from adn.core.state import state_of, super_and_base
from adn.measure.cost import count_macs, count_parameters


class Prefix(Follows):
    order = 12

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in list(self.children())[: self._adn_choice.now()]:
            x = block(x)
        return x


@dataclasses.dataclass
class PrefixPlan(Kind):
    """A sequence of blocks of which the first so many run."""

    kind: ClassVar[str] = "prefix of the tests"
    one_forward: ClassVar[bool] = False
    name: str
    base: int

    @property
    def units(self) -> list[str]:
        return []

    @property
    def whole(self) -> str:
        return self.name

    def resolve(self, model: nn.Module) -> PrefixPlan:
        return self

    def values(self, model: nn.Module) -> list[int]:
        return list(range(len(model.get_submodule(self.name)), 0, -1))

    def form(self, value: int) -> Form:
        return Form(lists={self.name: value})

    def follow(self) -> Iterator[Follower]:
        yield Follower(self.name, Prefix)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.stage = nn.Sequential(*(Residual(6) for _ in range(3)))
        self.tail = nn.Sequential(*(Residual(6) for _ in range(3)))
        self.head = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.tail(self.stage(self.stem(x))).mean((2, 3)))


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    net = Net().eval()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.running_mean, 0, 0.3)
    stage = adn.StagePlan("stage", [f"stage.{i}" for i in range(3)])
    return adn.convert(net, plan=adn.Plan([stage], stacks=[PrefixPlan("tail", 1)]))


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(6, 3, 9, 7, generator=torch.Generator().manual_seed(1))


def expected(net: nn.Module, x: torch.Tensor, depth: adn.Depth) -> torch.Tensor:
    bypassed, blocks = depth
    x = net.stem(x)
    for block in list(net.stage.children())[: 2 if bypassed else 3]:
        norm = block.norm.skip if bypassed and hasattr(block.norm, "skip") else block.norm
        y = nn.functional.batch_norm(block.conv(x), norm.running_mean, norm.running_var, norm.weight, norm.bias)
        x = x + y.relu()
    for block in list(net.tail._modules.values())[:blocks]:
        x = block(x)
    return net.head(x.mean((2, 3)))


def test_depths(net: nn.Module, x: torch.Tensor) -> None:
    assert list(map(str, adn.depths(net))) == ["F|3", "F|2", "F|1", "T|3", "T|2", "T|1"]
    assert (str(state_of(net).full), str(state_of(net).base)) == ("F|3", "T|1")
    for depth in adn.depths(net):
        adn.set_depth(net, depth)
        torch.testing.assert_close(net(x), expected(net, x, depth))
        torch.testing.assert_close(adn.extract(net)(x), expected(net, x, depth))


def test_deploy_form(net: nn.Module, x: torch.Tensor) -> None:
    fused, depths = adn.fuse(net), adn.depths(net)
    for depth in depths:
        adn.set_depth(fused, depth)
        torch.testing.assert_close(fused(x), expected(net, x, depth), rtol=1e-4, atol=1e-5)
    rows = torch.tensor([list(map(int, depth)) for depth in depths], dtype=torch.int32).T.contiguous()
    each = torch.cat([expected(net, x[i : i + 1], depth) for i, depth in enumerate(depths)])
    for given in (rows, depths):
        torch.testing.assert_close(fused.per_image(x, given), each, rtol=1e-4, atol=1e-5)


def test_compiled(net: nn.Module, x: torch.Tensor) -> None:
    plain = copy.deepcopy(net)
    adn.compile(net, backend="aot_eager")
    with torch.no_grad():
        for depth in adn.depths(net):
            adn.set_depth(net, depth)
            torch.testing.assert_close(net(x), expected(plain, x, depth), rtol=1e-4, atol=1e-5)
        counts = count(net, x)
    assert (counts.recompiles, counts.given_up, counts.uncompiled) == (0, (), {})


def test_costs(net: nn.Module, x: torch.Tensor) -> None:
    macs = dict(zip(adn.depths(net), count_macs(net, x, adn.depths(net)), strict=True))
    assert len(set(macs.values())) == 4  # a block of the one costs what a block of the other does
    for depth in macs:
        assert count_parameters(net, depth) == sum(p.numel() for p in adn.extract(net, depth).parameters())


def test_saved_and_loaded(net: nn.Module, x: torch.Tensor, tmp_path) -> None:
    adn.save(net, tmp_path / "net.safetensors")
    back = adn.load(tmp_path / "net.safetensors", model=Net()).eval()
    assert [type(kind) for _, kind in state_of(back).plan.parts] == [adn.StagePlan, PrefixPlan]
    for depth in adn.depths(net):
        adn.set_depth(back, depth)
        torch.testing.assert_close(back(x), expected(net, x, depth))


def test_one_forward_only_where_the_kind_can(net: nn.Module, x: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="two forwards"), super_and_base(net, len(x)):
        pass


def test_kinds_are_registered() -> None:
    assert set(KINDS) >= {"stage", "stack", "narrow", "prefix of the tests"}
