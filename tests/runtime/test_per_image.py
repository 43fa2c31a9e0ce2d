"""A depth for each image: every sample as if it had run alone at its depth."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable

import pytest
import torch
from conftest import build, few, randomise
from test_convert import IN_CI, NAMES
from test_fuse import UNSTABLE, converted, difference
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

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


@pytest.mark.parametrize("name", few(NAMES, (set(IN_CI) - {"resnetv2_50d", "tv_swin_v2_t", "pvt_v2_b0"}).__contains__))
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
    flags = torch.tensor([[0, 1, 1, 0, 1]] * len(fused._adn.choices), dtype=torch.int32)
    fused.per_image(x, flags)
    assert len(seen) == len(blocks)
    assert all(seen)


@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224"])
def test_one_trace_serves_all_flags(name: str) -> None:
    """Which blocks run is a value in memory: written again, it changes what a net does that is not traced again, and in
    an engine what a graph does that is not captured again (`test_engine.py`)."""
    net, fused, x = prepared(name)
    flags = torch.zeros(len(fused._adn.choices), N, dtype=torch.int32)
    traced = make_fx(lambda x, flags: fused.per_image(x, flags))(x, flags)
    called = {node.target for node in traced.graph.nodes if node.op == "call_function"}
    ours = {target for target in called if getattr(target, "namespace", "") == "adn"}
    assert {str(op) for op in ours} & {"adn.conv_.default", "adn.linear_.default"}
    results = []
    for seed in range(2):
        depths = random_depths(net, seed=seed)
        flags.copy_(flags_of(depths))
        results.append(traced(x, flags))
        assert difference(results[-1], alone(net, x, depths)) < 1e-11
    assert not torch.equal(*results)


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


class Own(nn.Module):
    """A stage of blocks written by hand: `forward` of a block is given."""

    class Block(nn.Module):
        def __init__(self, forward: Callable[[nn.Module, Tensor], Tensor], kernel: int) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(6, 6, kernel, padding=kernel // 2), nn.BatchNorm2d(6)
            self.linear, self.layer_norm = nn.Linear(6, 6), nn.LayerNorm(6)
            self.scale = nn.Parameter(torch.randn(1, 6, 1, 1))
            self.relu = nn.ReLU(inplace=True)
            self.drop, self.run = nn.Dropout(0.5), forward

        def forward(self, x: Tensor) -> Tensor:
            return self.run(self, x)

    def __init__(self, forward: Callable[[nn.Module, Tensor], Tensor], kernel: int = 3) -> None:
        super().__init__()
        self.stage = nn.ModuleList(self.Block(forward, kernel) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.stage:
            x = block(x)
        return x


def added_in_place(block: nn.Module, x: Tensor) -> Tensor:
    x += block.drop(block.norm(block.conv(x)))
    return x


def added_by_method(block: nn.Module, x: Tensor) -> Tensor:
    return x.add_(block.norm(block.conv(x)))


def rectified_before(block: nn.Module, x: Tensor) -> Tensor:
    return block.norm(block.conv(torch.relu_(1 * x))) + x


def pooled(block: nn.Module, x: Tensor) -> Tensor:
    return x + block.norm(block.conv(nn.functional.adaptive_avg_pool2d(x, 1)))


def shifted(block: nn.Module, x: Tensor) -> Tensor:
    return torch.relu(block.norm(block.conv(x)) + block.scale) + x


def kept_by_another_name(block: nn.Module, x: Tensor) -> Tensor:
    kept = nn.functional.dropout(x, training=False)
    return block.norm(block.conv(x)) + x - 0.1 * kept


def called_by_keyword(block: nn.Module, x: Tensor) -> Tensor:
    return x + block.drop(input=block.norm(block.conv(input=x)))


def in_sequence_first(block: nn.Module, x: Tensor) -> Tensor:
    tokens = block.norm(block.conv(x)).flatten(2).permute(2, 0, 1)
    return x + block.linear(tokens).permute(1, 2, 0).reshape(x.shape)


def with_norms_of_heads(block: nn.Module, x: Tensor) -> Tensor:
    heads = block.norm(block.conv(x)).flatten(2).reshape(x.shape[0], 2, 3, -1).repeat(1, 1, 2, 1).transpose(2, 3)
    return x + block.layer_norm(heads).transpose(2, 3)[:, :, :3].reshape(x.shape)


def viewed(block: nn.Module, x: Tensor) -> Tensor:
    return x + block.norm(block.conv(x)).view(x.shape[0], -1).view(x.shape)


@pytest.mark.parametrize("forward", [
    added_in_place, added_by_method, rectified_before, pooled, shifted, kept_by_another_name, called_by_keyword,
    in_sequence_first, with_norms_of_heads, viewed])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_blocks_of_ones_own(forward: Callable, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    kernel = 1 if forward is pooled else 3
    net = adn.convert(randomise(Own(forward, kernel)).to(dtype).eval(), plan=["stage"])
    for norm in adn.stages(net)[0].plan.norms:
        randomise(net.get_submodule(f"{norm}.skip"), seed=3)
    fused, x = fuse(net), torch.randn(4, 6, 5, 4, dtype=dtype)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    depths = [adn.Depth(d) for d in "TFFT"]
    expected = torch.cat([run(net, image, depth) for image, depth in zip(x, depths)])
    for depth in ("F", "T"):
        every = torch.cat([run(net, image, depth) for image in x])
        with adn.at_depth(fused, depth):
            assert difference(fused(x.clone()), every) < tolerance
    for given in (flags_of(depths), flags_of(depths), depths):
        assert difference(fused.per_image(x.clone(), given), expected) < tolerance


def run(net: nn.Module, image: Tensor, depth: adn.Depth | str) -> Tensor:
    with torch.no_grad(), adn.at_depth(net, depth):
        return net(image[None].clone())


def test_queries_and_keys_with_norms() -> None:
    net = adn.convert(build("vit_tiny_patch16_224", img_size=32, num_classes=10, qk_norm=True)).double()
    x = torch.randn(N, 3, 32, 32, dtype=torch.float64)
    depths = random_depths(net)
    assert difference(fuse(net).per_image(x, flags_of(depths)), alone(net, x, depths)) < 1e-11


def test_threads() -> None:
    """Flags are of one call, not of the net."""
    net, fused, x = prepared("resnet18")
    cases = [(flags_of(depths), alone(net, x, depths)) for depths in (random_depths(net, seed=s) for s in range(4))]
    wrong = []

    def work(flags: Tensor, expected: Tensor) -> None:
        for _ in range(5):
            wrong.append(difference(fused.per_image(x, flags), expected) > 1e-11)

    threads = [threading.Thread(target=work, args=case) for case in cases]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(wrong) == 20
    assert not any(wrong)


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

    def test_may_answer_on_the_host(self) -> None:
        net, fused, x = prepared("resnet18")
        depths = ["TTFF" if i % 2 else "TTTF" for i in range(N)]
        found = fused.per_image(x, lambda k, features: [depth[k] == "T" for depth in depths])
        assert difference(found, alone(net, x, depths)) < 1e-11
        with pytest.raises(ValueError, match=r"of flag 0 the router gave \[True\] for \d+ images; pass one of F"):
            fused.per_image(x, lambda k, features: [True])
        with pytest.raises(ValueError, match="pass one of False, True for each"):
            fused.per_image(x, lambda k, features: [3] * N)


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
        (lambda k, features: (0, 1, 0), "tuple; pass an int32 tensor"),
        (["TTFF"], "1 depths for 3 images"),
        (["TTFF", "TT", "FFFF"], "TT"),
    ])
    def test_flags(self, net: tuple[FusedNet, Tensor], flags: object, message: str) -> None:
        fused, x = net
        with pytest.raises(ValueError, match=message):
            fused.per_image(x, flags)

    def test_any_flag_but_zero_bypasses(self, net: tuple[FusedNet, Tensor]) -> None:
        fused, x = net
        flags = torch.tensor([[0, 1, 1]] * 4, dtype=torch.int32)
        assert torch.equal(fused.per_image(x, flags * torch.tensor([1, -1, 2], dtype=torch.int32)),
                           fused.per_image(x, flags))

    def test_samples_that_influence_each_other(self) -> None:
        model = build("resnet18")
        model.bn1.running_mean = model.bn1.running_var = None
        with pytest.raises(ValueError, match="'bn1' has no running statistics"):
            fuse(adn.convert(model)).per_image(torch.randn(2, 3, 32, 32), torch.zeros(4, 2, dtype=torch.int32))

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
