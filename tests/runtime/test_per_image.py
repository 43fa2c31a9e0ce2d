"""A depth for each image: every sample as if it had run alone at its depth."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from conftest import build
from test_convert import NAMES
from test_fuse import IN_CI, UNSTABLE, converted, difference
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

import adn
from adn.runtime import per_image
from adn.runtime.fuse import FusedNet, fuse
from adn.runtime.per_image import BypassedBlock

N = 5
ONE_OF_EACH = ["resnet18", "mobilenetv2_050", "vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"]


def prepared(name: str) -> tuple[nn.Module, FusedNet, Tensor]:
    net, x = converted(name)
    net = net.double()
    x = torch.randn(N, *x.shape[1:], dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    return net, fuse(net), x


def random_depths(net: nn.Module, n: int = N, seed: int = 0) -> list[adn.Depth]:
    draw = random.Random(seed)
    return [adn.Depth([draw.random() < 0.5 for _ in adn.get_depth(net)]) for _ in range(n)]


def flags_of(depths: list[adn.Depth]) -> Tensor:
    return torch.tensor([list(depth) for depth in depths], dtype=torch.int32).T.contiguous()


def alone(net: nn.Module, x: Tensor, depths: list[adn.Depth]) -> Tensor:
    """The reference: each image by itself at its depth."""
    rows = []
    for image, depth in zip(x, depths, strict=True):
        with adn.at_depth(net, depth), torch.no_grad():
            rows.append(net(image[None]))
    return torch.cat(rows)


@pytest.mark.parametrize("name", [
    name if name in IN_CI else pytest.param(name, marks=pytest.mark.full) for name in NAMES])
def test_each_image_as_if_alone(name: str) -> None:
    net, fused, x = prepared(name)
    before = x.clone()
    tolerance = 1e-4 if name == UNSTABLE else 1e-11
    depths = random_depths(net)
    flags, expected = flags_of(depths), alone(net, x, depths)
    for _ in range(2):  # a second time, as blocks write into what they are given
        assert difference(fused.per_image(x, flags), expected) < tolerance
    assert difference(fused.per_image(x, depths), expected) < tolerance
    assert difference(fused.per_image(x, lambda k, features: flags[k]), expected) < tolerance
    assert torch.equal(x, before)


def test_all_combinations_of_two_images() -> None:
    net, fused, x = prepared("resnet18")
    for first in adn.depths(net):
        for second in ("FFFF", "TFTT"):
            depths = [first, adn.Depth(second)]
            expected = alone(net, x[:2], depths)
            assert difference(fused.per_image(x[:2], flags_of(depths)), expected) < 1e-11
            assert difference(fused.per_image(x[:2], [str(depth) for depth in depths]), expected) < 1e-11


def test_features_that_leave_before_they_are_refined() -> None:
    """What somebody else reads is not overwritten."""
    net = adn.convert(build("resnet18", features_only=True)).double()
    x = torch.randn(3, 3, 64, 64, dtype=torch.float64)
    depths = random_depths(net, 3)
    features = fuse(net).per_image(x, flags_of(depths))
    for i, depth in enumerate(depths):
        with adn.at_depth(net, depth), torch.no_grad():
            for ours, expected in zip(features, net(x[i : i + 1]), strict=True):
                assert difference(ours[i : i + 1], expected) < 1e-11


class Forked(nn.Module):
    """The input of the refinement block is used again after it."""

    def __init__(self) -> None:
        super().__init__()
        self.stage = nn.ModuleList(self.Block() for _ in range(2))

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(self.norm(self.conv(x)) + x)

    def forward(self, x: Tensor) -> Tensor:
        essential = self.stage[0](x)
        return self.stage[1](essential) - essential


def test_a_value_used_again_is_not_overwritten(monkeypatch: pytest.MonkeyPatch) -> None:
    net = adn.convert(Forked().double().eval(), plan=["stage"])
    x = torch.randn(4, 4, 6, 5, dtype=torch.float64)
    depths = [adn.Depth(d) for d in "TFFT"]
    expected = alone(net, x, depths)
    assert difference(fuse(net).per_image(x, flags_of(depths)), expected) < 1e-12
    # And if it were:
    careless = fuse(net)
    for block in careless.modules():
        if isinstance(block, BypassedBlock):
            assert not block.in_place
            block.in_place = True
    assert difference(careless.per_image(x, flags_of(depths)), expected) > 1e-3


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_bypassed_samples_keep_their_bits(name: str) -> None:
    """Whatever the block computes for them."""
    _, fused, x = prepared(name)
    seen = []

    def hook(block: BypassedBlock, args: tuple, output: Tensor) -> None:
        flags = args[0]
        seen.append(torch.equal(output[flags == 1], kept.pop()[flags == 1]))

    def before(block: BypassedBlock, args: tuple) -> None:
        kept.append(args[1].clone())

    kept: list[Tensor] = []
    blocks = [m for m in fused.modules() if isinstance(m, BypassedBlock)]
    for block in blocks:
        block.register_forward_pre_hook(before)
        block.register_forward_hook(hook)
    flags = torch.tensor([[0, 1, 1, 0, 1]] * len(fused._adn.switches), dtype=torch.int32)
    fused.per_image(x, flags)
    assert len(seen) == len(blocks)
    assert all(seen)


@pytest.mark.parametrize(("name", "layers"), [
    ("resnet50", (nn.Conv2d,)), ("mobilenetv2_050", (nn.Conv2d,)), ("vit_tiny_patch16_224", (nn.Linear, nn.LayerNorm)),
    ("swin_tiny_patch4_window7_224", (nn.Linear, nn.LayerNorm)), ("convnext_atto", (nn.Conv2d, nn.Linear))])
def test_the_layers_of_a_refinement_block_leave_samples_out(name: str, layers: tuple[type, ...]) -> None:
    """All of them, but a layer norm that takes a sum in with it."""
    net, fused, _ = prepared(name)
    wanted = sum(type(m) in layers for stage in adn.stages(net) for block in stage.refinement for m in block.modules()
                 if not any(True for _ in m.children()))
    masked = [m for m in fused.modules() if type(m).__name__.startswith("_Masked")]
    sums = sum(type(m).__name__ == "AddLayerNorm" for block in fused.modules() if isinstance(block, BypassedBlock)
               for m in block.modules())
    # timm's LayerNorm2d and LayerNorm of ConvNeXt are norms of other classes.
    assert len(masked) >= wanted - sums > 0


def test_a_table_of_positions_has_no_samples() -> None:
    """Swin v2 computes its position bias with linear layers, on a table."""
    _, fused, _ = prepared("swinv2_tiny_window8_256")
    for block in fused.modules():
        if isinstance(block, BypassedBlock):
            masked = [n for n, m in block.named_modules() if isinstance(m, per_image._MaskedLinear)]
            assert masked
            assert not any("cpb_mlp" in n for n in masked)


@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224"])
def test_nothing_asks_the_host(name: str) -> None:
    """With tensors that have no values, whatever had to read one would raise."""
    net, _, x = prepared(name)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
        fused = fuse(net)
        fake, flags = mode.from_tensor(x), mode.from_tensor(flags_of(random_depths(net)))
        assert fused.per_image(fake, flags).shape == (N, 10)
        assert fused.per_image(fake, lambda k, features: (features.flatten(1).mean(1) > 0)).shape == (N, 10)


class TestWhereTheHostKnows:
    @pytest.mark.parametrize("way", ["split", "whole"])
    def test_both_ways(self, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
        net, fused, x = prepared("mobilenetv2_050")
        monkeypatch.setattr("adn.runtime.fuse.fastest", lambda ways, device: way)
        depths = random_depths(net)
        assert difference(fused.per_image(x, depths), alone(net, x, depths)) < 1e-11

    def test_the_faster_way_is_taken_and_measured_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        _, fused, x = prepared("resnet18")
        measured = []

        def fastest(ways: dict[str, Callable], device: torch.device) -> str:
            measured.append(set(ways))
            return "split"

        monkeypatch.setattr("adn.runtime.fuse.fastest", fastest)
        depths = [adn.Depth("TFTF"), adn.Depth("FFTT")]
        for _ in range(3):
            fused.per_image(x[:2], depths)
        assert measured == [{"split", "whole"}] * 2, "only where the two differ, and once each"

    def test_fastest(self) -> None:
        def slow() -> None:
            torch.linalg.svd(torch.ones(300, 300))

        assert per_image.fastest({"a": slow, "b": lambda: None}, torch.device("cpu")) == "b"

    def test_one_depth_for_all(self) -> None:
        net, fused, x = prepared("resnet18")
        for depth in ("super", "TFTF"):
            assert difference(fused.per_image(x, [depth] * N), alone(net, x, [depth] * N)) < 1e-11


class TestRouter:
    def test_sees_the_features_before_each_stage(self) -> None:
        _, fused, x = prepared("resnet18")
        shapes = {}

        def router(stage: int, features: Tensor) -> Tensor:
            shapes[stage] = tuple(features.shape)
            return (features.mean((1, 2, 3)) > features.mean()).int()

        y = fused.per_image(x, router)
        assert shapes == {0: (N, 64, 16, 16), 1: (N, 64, 16, 16), 2: (N, 128, 8, 8), 3: (N, 256, 4, 4)}
        assert y.shape == (N, 10)


class TestBadInput:
    @pytest.fixture(scope="class")
    def net(self) -> tuple[FusedNet, Tensor]:
        return fuse(adn.convert(build("resnet18"))), torch.randn(3, 3, 64, 64)

    @pytest.mark.parametrize(("flags", "message"), [
        (torch.zeros(4, 2, dtype=torch.int32), r"shape \(4, 2\); pass \(4, 3\)"),
        (torch.zeros(3, dtype=torch.int32), r"shape \(3,\); pass \(4, 3\)"),
        (torch.zeros(4, 3), "float32; pass int32"),
        (torch.zeros(4, 3, dtype=torch.int32, device="meta"), "flags are on meta, the images on cpu"),
        (lambda k, features: torch.zeros(2, dtype=torch.int32), r"shape \(2,\); pass \(3,\)"),
        (lambda k, features: [0, 1, 0], "list; pass an int32 tensor"),
        (["TTFF"], "1 depths for 3 images"),
        (["TTFF", "TT", "FFFF"], "TT"),
    ])
    def test_flags(self, net: tuple[FusedNet, Tensor], flags: object, message: str) -> None:
        fused, x = net
        with pytest.raises(ValueError, match=message):
            fused.per_image(x, flags)

    def test_bool_flags_and_strided_ones(self, net: tuple[FusedNet, Tensor]) -> None:
        fused, x = net
        flags = torch.tensor([[True, False, True, True], [False] * 4, [True] * 4])
        expected = fused.per_image(x, flags.T.int().contiguous())
        assert torch.equal(fused.per_image(x, flags.T), expected)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_one_captured_graph_without_synchronisation(name: str) -> None:
    net, x = converted(name)
    net, x = net.cuda().half(), torch.randn(8, *x.shape[1:], device="cuda", dtype=torch.half)
    fused = fuse(net)
    depths = random_depths(net, 8)
    flags = flags_of(depths).cuda()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(2):
            fused.per_image(x, flags)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.graph(graph, stream=stream):
            y = fused.per_image(x, flags)
        for seed in range(3):
            depths = random_depths(net, 8, seed)
            flags.copy_(flags_of(depths).pin_memory(), non_blocking=True)
            graph.replay()
            actual = y.clone()
            torch.cuda.set_sync_debug_mode("default")
            exact = alone(net.double(), x.double(), depths)
            eager = alone(net.half(), x, depths)
            assert difference(actual, exact) <= 2 * difference(eager, exact) + 1e-3
            torch.cuda.set_sync_debug_mode("error")
    finally:
        torch.cuda.set_sync_debug_mode("default")
