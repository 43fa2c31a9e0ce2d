"""Models that no family knows: their residual blocks are found by running them without values."""

from __future__ import annotations

import copy
import functools
import io
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import randomise
from test_plan import LAYERS, CifarResNet, Odd, X, cifar
from torch import nn

import adn
from adn.core.dry_run import CannotRun, dry_run, is_residual


class Branch(nn.Module):
    """A residual block of the kind asked for."""

    def __init__(self, width: int, kind: str = "plain", stride: int = 1) -> None:
        super().__init__()
        self.kind = kind
        self.norm = nn.BatchNorm2d(width // stride)
        self.conv = nn.Conv2d(width // stride, width, 3, stride, 1)
        self.scale = nn.Parameter(torch.full((width, 1, 1), 0.5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.kind == "normed":
            x = self.norm(x)  # RepViT, RepVGG, Xception: what goes on is normed too
            return x + self.conv(x)
        y = self.conv(self.norm(x))
        if self.kind == "no residual":
            return y
        if self.kind == "of the input's square":
            return x * x + y
        if y.shape != x.shape:
            x = F.interpolate(torch.cat([x, x], 1), scale_factor=0.5)
        y = x + self.scale * y
        return F.silu(y) if self.kind == "activated" else y


def chain(*kinds: str) -> nn.Module:
    torch.manual_seed(0)
    blocks = nn.Sequential(*(Branch(8, kind) for kind in kinds))
    return randomise(nn.Sequential(nn.Conv2d(3, 8, 3), blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)))


def stages_of(model: nn.Module) -> list[tuple[list[str], int]]:
    return [(stage.blocks, stage.essential) for stage in adn.plan(model) if stage.has_flag]


def test_the_cifar_resnet_needs_no_plan() -> None:
    """The same plan as by hand, and every depth computes what that does."""
    found, by_hand = adn.convert(cifar()), adn.convert(cifar(), plan=LAYERS)
    assert adn.plan(cifar()).family == "residual"
    with torch.inference_mode():
        for depth in adn.depths(by_hand):
            with adn.at_depth(found, depth), adn.at_depth(by_hand, depth):
                assert torch.equal(found(X), by_hand(X)), depth


@pytest.mark.parametrize("kind", ["plain", "activated", "normed"])
def test_blocks_are_told_by_what_they_compute(kind: str) -> None:
    assert stages_of(chain(kind, kind)) == [(["1.0", "1.1"], 1)]
    mixed = chain("no residual", kind, kind, "of the input's square", kind, kind)
    assert stages_of(mixed) == [(["1.0", "1.1", "1.2"], 2), (["1.3", "1.4", "1.5"], 2)]


@pytest.mark.parametrize("kind", ["no residual", "of the input's square"])
def test_others_keep_the_shape_and_are_no_residual_blocks(kind: str) -> None:
    model = chain(kind, kind, kind)
    with pytest.raises(adn.ConversionError, match="no stages to bypass found"):
        adn.plan(model)
    calls = dry_run(model)
    assert calls["1.1"].keeps_shape
    assert not is_residual(calls["1.1"])


def test_a_forward_that_may_hold_the_model_is_not_run() -> None:
    model = chain("plain", "plain").train()
    forward = model.forward
    model.forward = lambda x: forward(x)
    with pytest.raises(CannotRun, match="forward of the model was replaced by a function"):
        dry_run(model)
    model.forward = functools.partial(type(model).forward, model)  # as Accelerate does it
    assert stages_of(model) == [(["1.0", "1.1"], 1)]
    assert all(m.num_batches_tracked == 0 for m in model.modules() if isinstance(m, nn.BatchNorm2d))


def test_norms_alone_are_no_blocks() -> None:
    with pytest.raises(adn.ConversionError, match="no stages to bypass found"):
        adn.plan(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Sequential(*(nn.BatchNorm2d(8) for _ in range(4)))))


def test_a_run_ends_at_what_is_no_block_and_begins_with_one_that_changes_the_shape() -> None:
    torch.manual_seed(0)
    body = nn.Sequential(Branch(8), Branch(8), nn.Conv2d(8, 8, 1), Branch(8), Branch(16, stride=2), Branch(16),
                         Branch(16))
    model = nn.Sequential(nn.Conv2d(3, 8, 3), body)
    assert stages_of(model) == [(["1.0", "1.1"], 1), (["1.4", "1.5", "1.6"], 2)]


class Around(nn.Module):
    """Its forward decides what becomes of its blocks."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.stem = nn.Conv2d(3, 8, 3)
        self.blocks = nn.ModuleList(Branch(8) for _ in range(3))
        self.last = nn.Conv2d(8 if how != "concatenated" else 32, 8, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        if self.how == "side by side":
            return self.last(sum(block(x) for block in self.blocks))
        if self.how == "twice":
            for block in (*self.blocks, *self.blocks):
                x = block(x)
            return self.last(x)
        if self.how == "backwards":
            for block in reversed(self.blocks):
                x = block(x)
            return self.last(x)
        if self.how == "by keyword":
            for block in self.blocks:
                x = block(x=x)
            return self.last(x)
        outputs = [x]
        for block in self.blocks:
            outputs.append(block(outputs[-1]))
        return self.last(torch.cat(outputs, 1) if self.how == "concatenated" else outputs[-1])


@pytest.mark.parametrize("how", ["side by side", "twice", "backwards"])
def test_blocks_that_do_not_run_in_turn_are_no_stage(how: str) -> None:
    with pytest.raises(adn.ConversionError, match="no stages to bypass found"):
        adn.plan(Around(how))


def test_blocks_that_are_given_their_input_by_keyword() -> None:
    assert stages_of(Around("by keyword")) == [(["blocks.0", "blocks.1", "blocks.2"], 2)]
    assert len(adn.depths(adn.convert(Around("by keyword"), plan=["blocks"]))) == 2


def test_blocks_whose_outputs_are_concatenated_become_narrow() -> None:
    model = nn.Sequential(randomise(Around("concatenated"))).eval()
    expected = model(X)
    net = adn.convert(model)
    assert torch.equal(net(X), expected)
    (stage,) = adn.plan(nn.Sequential(Around("concatenated")))
    assert stage.kind == "narrow"
    with adn.at_depth(net, "base"):
        assert not torch.allclose(net(X), expected)


class Tokens(nn.Module):
    """A ViT of somebody's: blocks are given a mask too."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.q_norm, self.linear = nn.LayerNorm(12), nn.LayerNorm(12), nn.Linear(12, 12)

        def forward(self, x: torch.Tensor, mask: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
            return x + scale * mask * self.linear(self.q_norm(self.norm(x)))

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 8, 8)
        self.blocks = nn.ModuleList(self.Block() for _ in range(7))
        self.head = nn.Linear(12, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x).flatten(2).transpose(1, 2)
        mask = torch.ones(x.shape[1], 1, device=x.device)
        for block in self.blocks:
            x = block(x, mask, scale=0.7)
        return self.head(x.mean(1))


def test_a_model_of_one_width_is_in_groups_of_three_as_a_vit() -> None:
    torch.manual_seed(0)
    model = randomise(Tokens()).eval()
    plan = adn.plan(model)
    assert [(len(stage.blocks), stage.has_flag, stage.channel_dim) for stage in plan] == [
        (3, True, -1), (3, True, -1), (1, False, -1)]
    assert plan[0].norms == ["blocks.0.norm", "blocks.1.norm"]
    net = adn.convert(model)
    for depth in adn.depths(net):
        static = adn.extract(net, depth)
        assert not any("adn" in type(m).__module__.split(".") for m in static.modules())
        for each in (static, copy.deepcopy(static), torch.load(save(static), weights_only=False)):
            with torch.no_grad(), adn.at_depth(net, depth):
                assert torch.equal(each(X), net(X)), depth


class Grids(nn.Module):
    """As MViTv2: blocks are given the size of the grid with the tokens, and return both; one halves the grid."""

    class Block(nn.Module):
        def __init__(self, pool: bool, honest: bool) -> None:
            super().__init__()
            self.norm, self.linear, self.pool, self.honest = nn.LayerNorm(12), nn.Linear(12, 12), pool, honest

        def forward(self, x: torch.Tensor, grid: list[int]) -> tuple[torch.Tensor, list[int]]:
            x = x + self.linear(self.norm(x)).relu()
            if self.pool:
                x = F.avg_pool2d(x.transpose(1, 2).unflatten(2, grid), 2).flatten(2).transpose(1, 2)
                return x, [n // 2 for n in grid]
            return x, list(grid) if self.honest else [n + 1 for n in grid]

    def __init__(self, honest: bool = True) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 8, 8)
        self.blocks = nn.ModuleList(self.Block(honest and i == 3, honest) for i in range(7))
        self.head = nn.Linear(12, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        grid = list(x.shape[2:])
        x = x.flatten(2).transpose(1, 2)
        for block in self.blocks:
            x, grid = block(x, grid)
        return self.head(x.mean(1))


@pytest.mark.parametrize("plan", [None, [adn.StagePlan("a", ["blocks.0", "blocks.1", "blocks.2"], channel_dim=-1),
                                         adn.StagePlan("b", [f"blocks.{i}" for i in range(3, 6)], channel_dim=-1)]],
                         ids=["found", "by hand"])
def test_blocks_that_hand_on_more_than_their_stream(plan: list[adn.StagePlan] | None, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = randomise(Grids()).eval()
    assert stages_of(model) == [(["blocks.0", "blocks.1", "blocks.2"], 2),
                                (["blocks.3", "blocks.4", "blocks.5"], 2)]
    by_hand, source = copy.deepcopy(model), copy.deepcopy(model)
    expected = model(X)
    net = adn.convert(model, plan=plan)
    adn.save(net, tmp_path / "net.safetensors")
    loaded = adn.load(tmp_path / "net.safetensors", model=copy.deepcopy(source)).eval()
    compiled = adn.compile(copy.deepcopy(net), backend="eager")
    for depth in adn.depths(net):
        by_hand.blocks = nn.ModuleList(block for i, block in enumerate(source.blocks)
                                       if not ((i == 2 and depth[0]) or (i == 5 and depth[1])))
        with torch.no_grad(), adn.at_depth(net, depth), adn.at_depth(loaded, depth):
            assert torch.equal(net(X), by_hand(X)), depth
            assert torch.equal(loaded(X), net(X)), depth
            assert torch.equal(adn.extract(net, depth)(X), net(X)), depth
            adn.set_depth(compiled, depth)
            torch.testing.assert_close(compiled(X), net(X))
    assert torch.equal(net(X), expected)
    net.train()
    y = torch.arange(len(X)) % 5
    both = [adn.SelfDistillation(net, features="all", single_pass=single)(X, y)["loss"] for single in (False, True)]
    torch.testing.assert_close(*both)


def test_blocks_that_change_what_they_hand_on_cannot_be_bypassed() -> None:
    with pytest.raises(adn.ConversionError, match="no stages to bypass found"):
        adn.plan(Grids(honest=False))
    with pytest.raises(adn.ConversionError, match=r"'blocks.2' cannot be bypassed, it does not .* hand on all"):
        adn.convert(Grids(honest=False), plan=[adn.StagePlan("a", ["blocks.0", "blocks.1", "blocks.2"])])


def save(model: nn.Module) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return file


def test_nothing_is_changed_and_nothing_left_behind() -> None:
    model = cifar().train()
    model.layer1[0].eval()
    seen: list[torch.Tensor] = []
    model.layer1[0].register_forward_hook(lambda *_: seen.append(1))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes = [m.training for m in model.modules()]
    adn.plan(model)
    assert not seen, "a hook of the user's is not for a run without values"
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(p.device.type == "cpu" and p.requires_grad for p in model.parameters())


def test_a_model_on_the_meta_device() -> None:
    with torch.device("meta"):
        assert stages_of(CifarResNet()) == stages_of(CifarResNet())
    assert stages_of(cifar()) == [([f"{layer}.{i}" for i in range(3)], 2) for layer in LAYERS]


def test_a_model_that_does_not_run_says_why() -> None:
    model = nn.Sequential(Odd(), chain("plain", "plain"))
    with pytest.raises(CannotRun, match=r"\(1, 3, 224, 224\)"):
        dry_run(model)
    with pytest.raises(adn.ConversionError, match=r"does not run \(RuntimeError for an input .*plan=\[name"):
        adn.plan(model)
    assert len(adn.depths(adn.convert(model, plan=["1.1"]))) == 2


def test_no_suggestion_that_has_not_been_tried() -> None:
    """A refusal used to name containers, most of which were refused when pasted."""
    model = nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU()))
    with pytest.raises(adn.ConversionError) as caught:
        adn.plan(model)
    assert "'0'" not in str(caught.value)
    assert "runs of residual blocks that keep their shape" in str(caught.value)


def test_by_name_saved_and_loaded(tmp_path: Path) -> None:
    name = "anydepth_pvt_v2_b0"
    assert name in adn.list_models()
    net = randomise(adn.create_model(name, num_classes=3)).eval()
    adn.save(net, tmp_path / "net.safetensors")
    again = adn.load(tmp_path / "net.safetensors").eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        for depth in ("super", "TFTF", "base"):
            with adn.at_depth(net, depth), adn.at_depth(again, depth):
                assert torch.equal(net(x), again(x)), depth


def test_a_model_of_two_families_is_converted_as_a_whole() -> None:
    """A ViT on top of a ResNet, of which the blocks of one family only were found."""
    model = timm.create_model("vit_base_r50_s16_224", embed_dim=48, depth=6, num_heads=2, img_size=64)
    plan = adn.plan(model)
    assert plan.family == "resnetv2 + vit"
    assert [stage.name for stage in plan] == [
        *(f"patch_embed.backbone.stages.{i}.blocks" for i in range(3)), "blocks[0:3]", "blocks[3:6]"]
    net = adn.convert(randomise(model).eval())
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        outputs = {depth: run(net, depth, x) for depth in adn.depths(net)}
    assert len({y.numpy().tobytes() for y in outputs.values()}) == 32


def run(net: nn.Module, depth: adn.Depth, x: torch.Tensor) -> torch.Tensor:
    with adn.at_depth(net, depth):
        return net(x)


def test_blocks_around_those_of_a_family_are_found_too() -> None:
    """MobileViT has a ViT's blocks inside of others."""
    names = [stage.name for stage in adn.plan(timm.create_model("mobilevit_xxs"))]
    assert names == ["stages.1", *(f"stages.{i}.1.transformer" for i in (2, 3, 4))]
