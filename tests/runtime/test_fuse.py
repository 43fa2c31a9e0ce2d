"""The deploy form equals the net at every depth, follows its weights, and makes one call of each convolution."""

from __future__ import annotations

import copy
import itertools
from collections import Counter
from collections.abc import Callable

import pytest
import torch
from conftest import build, few, randomise
from test_convert import IN_CI, MODELS, NAMES, net_and_input, stated_sample
from torch import nn
from torch.nn.utils import prune
from torch.utils._python_dispatch import TorchDispatchMode

import adn
from adn.runtime.fuse import FusedNet, fuse
from adn.runtime.layers import ConvNormAct

# With random norms this one amplifies rounding a billionfold.
UNSTABLE = "efficientnetv2_rw_t"


def converted(name: str, **kwargs: object) -> tuple[nn.Module, torch.Tensor]:
    """A net in which the second norms differ from the first."""
    model, x = net_and_input(name, **kwargs)
    net = adn.convert(model)
    for stage in adn.stages(net):
        for norm in stage.plan.norms:
            randomise(net.get_submodule(f"{norm}.skip"), seed=len(norm))
    return net, x


def difference(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual.double() - expected.double()).abs().max() / expected.double().abs().max()).item()


def forward(net: nn.Module, x: torch.Tensor, depth: adn.Depth | str) -> torch.Tensor:
    with torch.no_grad(), adn.at_depth(net, depth):
        return net(x)


@pytest.mark.parametrize("name", few(NAMES, (set(IN_CI) - {"pvt_v2_b0", "resnetv2_50d"}).__contains__))
def test_every_depth(name: str, table: list) -> None:
    net, x = converted(name)
    net, x = net.double(), x.double()
    fused = fuse(net)
    differences = [difference(forward(fused, x, depth), forward(net, x, depth)) for depth in stated_sample(net)]
    assert max(differences) <= (1e-4 if name == UNSTABLE else 1e-11)
    calls = Counter(type(m).__name__ for segment in fused.segments for m in segment.paths[0].children())
    table.append({"model": name, "depths": len(differences), "difference": f"{max(differences):.1e}",
                  "regions": sum(1 + (s.flag is not None) for s in fused.segments),
                  "convolutions with their norm": calls["ConvNormAct"], "norms alone": calls["NormAct"],
                  "sums with their norm": calls["AddLayerNorm"]})


@pytest.mark.parametrize(("name", "size"), few([
    ("resnet18", (65, 47)), ("resnet18", (32, 32)), ("mobilenetv2_050", (33, 70)), ("regnety_002", (64, 64)),
    ("vit_tiny_patch16_224", (64, 64)), ("convnext_atto", (64, 96))], lambda case: case[0] != "regnety_002"))
@pytest.mark.parametrize(("dtype", "layout"), few(
    itertools.product([torch.float32, torch.bfloat16], [torch.contiguous_format, torch.channels_last]),
    lambda case: (case[0] == torch.float32) == (case[1] == torch.channels_last)))
def test_types_layouts_and_sizes(
    name: str, size: tuple[int, int], dtype: torch.dtype, layout: torch.memory_format
) -> None:
    """Not further from float64 than the net itself, up to a factor."""
    net, _ = converted(name)
    x = torch.randn(3, 3, *size, generator=torch.Generator().manual_seed(0)).to(memory_format=layout)
    exact = copy.deepcopy(net).double()
    net.to(dtype)
    fused = fuse(net)
    for depth in ("super", "base"):
        wanted = forward(exact, x.double(), depth)
        actual = forward(fused, x.to(dtype), depth)
        assert actual.dtype == dtype
        allowed = 2 * difference(forward(net, x.to(dtype), depth), wanted) + 4 * torch.finfo(dtype).eps
        assert difference(actual, wanted) <= allowed


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weights_lie_as_kernels_read_them(dtype: torch.dtype) -> None:
    """Depthwise ones with their taps apart and channels adjacent, also when they are read again; on a CPU that changes
    nothing."""
    net, x = converted("mobilenetv2_050")
    net, x = net.to(dtype), x.to(dtype)
    fused = fuse(net)
    layers = [m for m in fused.modules() if isinstance(m, ConvNormAct) and hasattr(m, "weight")]  # of one norm
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(1.01)
    first = forward(fused, x, "super")
    depthwise = [m.weight for m in layers if m.place[3] > 1]
    assert len(depthwise) >= 17
    for weight in depthwise:
        channels, _, k, _ = weight.shape
        assert weight.stride() == (1, channels, k * channels, channels)
    for layer in layers:
        layer.weight = layer.weight.contiguous(memory_format=torch.channels_last)
        layer.packed = None
    assert difference(forward(fused, x, "super"), first) < 100 * torch.finfo(dtype).eps


class Ops(TorchDispatchMode):
    """Counts what is dispatched."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls[str(func)] += 1
        return func(*args, **(kwargs or {}))


def test_one_call_for_each_convolution() -> None:
    net, x = converted("tv_resnet50")
    fused = fuse(net)
    for depth in ("super", "base"):  # packs the weights
        forward(fused, x, depth)
    for depth in adn.depths(net):
        static = adn.extract(net, depth)
        convolutions = sum(isinstance(m, nn.Conv2d) for m in static.modules())
        with Ops() as count:
            forward(fused, x, depth)
        calls = {name: n for name, n in count.calls.items() if "pointwise" in name}
        assert sum(calls.values()) == convolutions
        # Besides: layout of the input, max pool, mean, flatten, the classifier and views of its weight.
        others = sum(count.calls.values()) - convolutions
        assert others <= 8, count.calls
        with Ops() as plain, torch.no_grad():
            static(x)
        assert sum(plain.calls.values()) > 3 * convolutions


def test_two_regions_for_each_stage_and_two_more() -> None:
    for name, outside in (("resnet18", 2), ("tv_vit_b_32", 2), ("tv_swin_t", 2), ("mobilenetv2_050", 1)):
        net, _ = converted(name)
        segments = fuse(net).segments
        flags = [segment.flag for segment in segments]
        assert sorted(flag for flag in flags if flag is not None) == list(range(len(adn.get_depth(net))))
        assert flags.count(None) == outside


class TestFollowsTheNet:
    @pytest.fixture
    def net(self) -> nn.Module:
        return converted("resnet18")[0]

    x = torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(3))

    def agrees(self, fused: nn.Module, net: nn.Module) -> bool:
        net.eval()
        return all(difference(forward(fused, self.x, depth), forward(net, self.x, depth)) < 1e-5
                   for depth in ("super", "TFTF", "base"))

    def train_step(self, net: nn.Module) -> None:
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        net.train()
        adn.SelfDistillation(net).backward(torch.randn(4, 3, 48, 48), torch.arange(4))
        optimizer.step()

    def test_after_a_training_step(self, net: nn.Module) -> None:
        fused = fuse(net)
        before = forward(fused, self.x, "base")
        self.train_step(net)
        assert self.agrees(fused, net)
        assert difference(before, forward(fused, self.x, "base")) > 1e-3

    def test_a_deploy_form_that_does_not_look_is_caught(self, net: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(FusedNet, "refresh_if_changed", lambda self: None)
        fused = fuse(net)
        self.train_step(net)
        assert not self.agrees(fused, net)

    def test_statistics_alone(self, net: nn.Module) -> None:
        fused = fuse(net)
        with torch.no_grad():
            net.train()(torch.randn(8, 3, 48, 48))
        assert self.agrees(fused, net)

    @pytest.mark.parametrize("assign", [False, True])
    def test_loaded_weights(self, net: nn.Module, assign: bool) -> None:
        fused = fuse(net)
        other = randomise(copy.deepcopy(net), seed=9)
        net.load_state_dict(other.state_dict(), assign=assign)
        assert self.agrees(fused, net)

    def test_memory_stays_where_it_is(self, net: nn.Module) -> None:
        """A captured graph reads it."""
        fused = fuse(net)
        layer = next(m for m in fused.modules() if isinstance(m, ConvNormAct))
        places = layer.weight.data_ptr(), layer.bias.data_ptr()
        self.train_step(net)
        forward(fused, self.x, "super")
        assert (layer.weight.data_ptr(), layer.bias.data_ptr()) == places

    def test_another_dtype(self, net: nn.Module) -> None:
        fused = fuse(net)
        net.double()
        y = forward(fused, self.x.double(), "TFFF")
        assert y.dtype == torch.float64
        assert difference(y, forward(net, self.x.double(), "TFFF")) < 1e-12

    def test_what_is_written_past_autograd_needs_a_word(self, net: nn.Module) -> None:
        fused = fuse(net)
        net.conv1.weight.data.mul_(3)
        fused.refresh()
        assert self.agrees(fused, net)

    def test_parameters_made_in_inference_mode(self) -> None:
        with torch.inference_mode():
            net, _ = converted("resnet18")
        with torch.inference_mode():
            assert self.agrees(fuse(net), net)

    def test_the_mode_of_the_net_does_not_matter_afterwards(self) -> None:
        net = adn.convert(build("resnet18", drop_rate=0.5, drop_path_rate=0.5))
        fused = fuse(net)
        expected = forward(net, self.x, "super")
        net.train()
        assert difference(forward(fused, self.x, "super"), expected) < 1e-5


class TestReplacedModules:
    x = torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(3))

    @pytest.mark.parametrize("change", [
        lambda net: net.reset_classifier(7), lambda net: setattr(net, "fc", nn.Linear(512, 7)),
        lambda net: setattr(net, "act1", nn.Sigmoid()), lambda net: net.to(memory_format=torch.channels_last)])
    def test_are_noticed(self, change: Callable[[nn.Module], object]) -> None:
        net, _ = converted("resnet18")
        fused = fuse(net)
        forward(fused, self.x, "base")
        change(net)
        with torch.no_grad():
            net.layer1[0].bn1.weight.mul_(1.5)
        y, expected = forward(fused, self.x, "super"), forward(net, self.x, "super")
        assert y.shape == expected.shape
        assert difference(y, expected) < 1e-5


class Shared(nn.Module):
    """One head for several maps, as in a pyramid; and a norm that two branches share."""

    def __init__(self) -> None:
        super().__init__()
        self.stage = nn.ModuleList(HandBlock() for _ in range(2))
        self.conv, self.norm, self.layer_norm = nn.Conv2d(5, 5, 3, padding=1), nn.BatchNorm2d(5), nn.LayerNorm(5)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        for block in self.stage:
            x = block(x)
        maps = [torch.relu(self.norm(self.conv(level))) for level in (x, x[:, :, ::2, ::2], -x)]
        tokens = x.flatten(2).transpose(1, 2)
        return [*maps, self.layer_norm(tokens + 1 * tokens), self.layer_norm(tokens * 2 + tokens), self.norm(x) + x]


def test_modules_that_are_called_more_than_once() -> None:
    net = adn.convert(randomise(Shared()).double().eval(), plan=["stage"])
    x = torch.randn(2, 5, 9, 7, dtype=torch.float64)
    fused = fuse(net)
    for depth in ("super", "base"):
        for y, expected in zip(forward(fused, x, depth), forward(net, x, depth), strict=True):
            assert difference(y, expected) < 1e-12
    for depth, flag in (("super", 0), ("base", 1)):
        ys = fused.per_image(x, torch.full((1, 2), flag, dtype=torch.int32))
        assert all(difference(y, expected) < 1e-12 for y, expected in zip(ys, forward(net, x, depth), strict=True))


class TestHooks:
    x = torch.randn(1, 3, 48, 48, generator=torch.Generator().manual_seed(3))

    @pytest.mark.parametrize("name", ["layer1.0.conv1", "layer1.0.bn2", "layer1.1.act1", "maxpool"])
    def test_of_layers_are_called(self, name: str) -> None:
        net, _ = converted("resnet18")
        net.get_submodule(name).register_forward_hook(lambda module, args, output: output * 2)
        assert difference(forward(fuse(net), self.x, "super"), forward(net, self.x, "super")) < 1e-5

    @pytest.mark.parametrize("name", ["layer1.0.conv1", "layer1.0.act1"])
    def test_a_forward_of_the_modules_own_is_called(self, name: str) -> None:
        net, _ = converted("resnet18")
        module = net.get_submodule(name)
        original = module.forward
        module.forward = lambda x: 2 * original(x)
        assert difference(forward(fuse(net), self.x, "super"), forward(net, self.x, "super")) < 1e-5

    @pytest.mark.parametrize("name", ["blocks.0.norm2", "blocks.2.norm1", "blocks.2.norm2"])
    def test_of_layer_norms_are_called(self, name: str) -> None:
        net, x = converted("vit_tiny_patch16_224")
        net.get_submodule(name).register_forward_hook(lambda module, args, output: output * 2)
        assert difference(forward(fuse(net), x, "super"), forward(net, x, "super")) < 1e-5
        flags = torch.zeros(4, 2, dtype=torch.int32)
        assert difference(fuse(net).per_image(x, flags), forward(net, x, "super")) < 1e-5

    @pytest.mark.parametrize("name", ["", "layer1", "layer2.0"])
    def test_of_what_is_taken_apart_are_refused(self, name: str) -> None:
        net, _ = converted("resnet18")
        net.get_submodule(name).register_forward_hook(lambda module, args, output: output * 2)
        with pytest.raises(ValueError, match="has forward hooks"):
            fuse(net)

    def test_weights_made_by_a_hook(self) -> None:
        net, _ = converted("resnet18")
        prune.l1_unstructured(net.layer1[0].conv1, "weight", amount=0.5)
        with pytest.raises(ValueError, match="cannot be copied"):  # one made with a gradient
            fuse(net)
        forward(net.requires_grad_(False), self.x, "base")
        fused = fuse(net)
        with torch.no_grad():
            net.layer1[0].conv1.weight_orig.mul_(2)
        assert difference(forward(fused, self.x, "base"), forward(net, self.x, "base")) < 1e-5


def test_a_subclass_that_acts_in_evaluation_is_kept() -> None:
    class Doubling(nn.Dropout):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * x

    model = build("resnet18", drop_rate=0.1)
    model.layer1[0].drop_block = Doubling()
    net, x = adn.convert(model.eval()), torch.randn(1, 3, 48, 48)
    assert difference(forward(fuse(net), x, "super"), forward(net, x, "super")) < 1e-5


def test_the_net_stays_as_it_was() -> None:
    net, x = converted("mobilenetv2_050")
    modules, state = list(net.modules()), {k: v.clone() for k, v in net.state_dict().items()}
    before = [forward(net, x, depth) for depth in ("super", "base")]
    fused = fuse(net)
    forward(fused, x, "base")
    assert all(a is b for a, b in zip(net.modules(), modules, strict=True))
    assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items())
    assert all(torch.equal(forward(net, x, depth), y) for depth, y in zip(("super", "base"), before))


def test_it_has_a_depth_of_its_own() -> None:
    net, _ = converted("resnet18")
    adn.set_depth(net, "TFTF")
    fused = fuse(net)
    assert adn.get_depth(fused) == adn.Depth("TFTF")
    assert adn.depths(fused) == adn.depths(net)
    adn.set_depth(fused, "base")
    assert adn.get_depth(net) == adn.Depth("TFTF")
    with pytest.raises(ValueError, match="TTFF"):
        adn.set_depth(fused, "TTT")


def test_a_feature_extractor_returns_its_list() -> None:
    net = adn.convert(build("resnet18", features_only=True))
    x = torch.randn(1, 3, 64, 64)
    fused = fuse(net)
    for depth in adn.depths(net):
        features, expected = forward(fused, x, depth), forward(net, x, depth)
        assert isinstance(features, list)
        assert all(difference(a, b) < 1e-5 for a, b in zip(features, expected, strict=True))


class Hand(nn.Module):
    """Blocks in a list, walked by hand; a functional activation; the input, used again after the last stage."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.ModuleList(HandBlock() for _ in range(3))
        self.second = nn.ModuleList(HandBlock() for _ in range(4))

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        h = x
        for block in self.first:
            h = block(h)
        tapped = h
        for block in self.second:
            h = block(h)
        return {"features": tapped, "out": (h + x).mean((2, 3))}


class HandBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(5, 5, (3, 1), padding=(1, 0), bias=True)
        self.norm = nn.BatchNorm2d(5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x + self.norm(self.conv(x)))


def test_a_model_of_ones_own() -> None:
    net = adn.convert(randomise(Hand()).eval(), plan=["first", "second"])
    x = torch.randn(2, 5, 9, 7)
    fused = fuse(net)
    for depth in adn.depths(net):
        y, expected = forward(fused, x, depth), forward(net, x, depth)
        assert set(y) == {"features", "out"}
        assert all(difference(y[key], expected[key]) < 1e-5 for key in y)


class WritesTwice(Hand):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.first:
            x = block(x)
        y = self.first[0].conv(x)
        z = torch.relu_(x)  # reads x before, writes after
        for block in self.second:
            z = block(z)
        return y + z


def test_blocks_without_norms() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3, padding=1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.conv(x).relu()

    torch.manual_seed(0)
    net = adn.convert(nn.Sequential(*(nn.Sequential(*(Block() for _ in range(n))) for n in (3, 2)))).eval()
    fused, x = fuse(net), torch.randn(2, 3, 8, 8)
    outputs = {}
    with torch.inference_mode():
        for depth in adn.depths(net):
            with adn.at_depth(net, depth), adn.at_depth(fused, depth):
                outputs[depth] = net(x)
                torch.testing.assert_close(fused(x), outputs[depth])
        flags = torch.tensor([[True, False], [False, True]])
        found = fused.per_image(x, flags)
        torch.testing.assert_close(found[:1], outputs[adn.Depth([True, False])][:1])
        torch.testing.assert_close(found[1:], outputs[adn.Depth([False, True])][1:])


def test_writes_in_place_keep_their_order() -> None:
    net, x = adn.convert(randomise(WritesTwice()).eval(), plan=["first", "second"]), torch.randn(2, 5, 9, 7)
    for depth in adn.depths(net):
        assert difference(forward(fuse(net), x, depth), forward(net, x, depth)) < 1e-5


def test_a_write_that_is_read_by_another_name_is_refused() -> None:
    class Aliased(Hand):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for block in (*self.first, *self.second):
                x = block(x)
            y = x.flatten(1)
            x += 1
            return x.sum() + y

    with pytest.raises(ValueError, match="writes in place into a tensor that is read again"):
        fuse(adn.convert(Aliased().eval(), plan=["first", "second"]))


def test_copies_are_independent() -> None:
    net, x = converted("resnet18")
    fused = fuse(net)
    expected = forward(fused, x, "base")
    copied = copy.deepcopy(fused)
    with torch.no_grad():
        net.fc.weight.zero_()
        net.layer1[0].bn1.skip.weight.mul_(2)
    assert difference(forward(copied, x, "base"), expected) < 1e-6
    assert difference(forward(fused, x, "base"), expected) > 1e-3


@pytest.mark.parametrize("name", few(["resnet18", "tv_vit_b_32"], lambda name: name == "resnet18"))
def test_compiled(name: str) -> None:
    net, x = converted(name)
    fused = fuse(net)
    torch._dynamo.reset()
    graphs = 0

    def backend(module: torch.fx.GraphModule, inputs: list) -> object:
        nonlocal graphs
        graphs += 1
        return module.forward

    assert adn.compile(fused, backend=backend) is fused
    for sweep in range(2):
        with torch.compiler.set_stance("fail_on_recompile" if sweep else "default"):
            for depth in adn.depths(net):
                assert difference(forward(fused, x, depth), forward(net, x, depth)) < 1e-4
    assert graphs == 2 * len(adn.get_depth(net)) + 2


class TestBadInput:
    def test_training(self) -> None:
        net = adn.convert(build("resnet18"))
        with pytest.raises(ValueError, match=r"net\.eval\(\)"):
            fuse(net.train())
        fused = fuse(net.eval())
        with pytest.raises(RuntimeError, match="cannot be trained"):
            fused.train()
        fused.eval()
        with pytest.raises(RuntimeError, match="no gradients"):
            fused(torch.randn(1, 3, 64, 64, requires_grad=True))

    def test_what_is_no_net(self) -> None:
        with pytest.raises(ValueError, match=r"adn\.convert"):
            fuse(build("resnet18"))
        fused = fuse(adn.convert(build("resnet18")))
        with pytest.raises(ValueError, match="fused already"):
            fuse(fused)

    def test_compiled_for_sizes(self) -> None:
        with pytest.raises(ValueError, match=r"give them to adn\.Engine"):
            adn.compile(fuse(adn.convert(build("resnet18"))), backend="eager", batch_sizes=(1, 2))

    def test_moving(self) -> None:
        with pytest.raises(RuntimeError, match=r"adn\.fuse\(net\.to"):
            fuse(adn.convert(build("resnet18"))).half()

    def test_a_forward_that_depends_on_values(self) -> None:
        class Peeking(Hand):
            def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
                return super().forward(x if x.sum() > 0 else -x)

        net = adn.convert(Peeking().eval(), plan=["first", "second"])
        with pytest.raises(ValueError, match=r"Peeking.*control flow"):
            fuse(net)

    def test_a_value_that_a_bypass_would_lose(self) -> None:
        class Leaking(Hand):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                for block in self.first:
                    x = block(x)
                inner = self.second[3].norm(x)
                for block in self.second:
                    x = block(x)
                return x + inner

        net = adn.convert(Leaking().eval(), plan=["first", "second"])
        x = torch.randn(2, 5, 9, 7)
        assert difference(forward(fuse(net), x, "base"), forward(net, x, "base")) < 1e-5


def test_timm_models_of_all_families_are_covered() -> None:
    assert all(any(name in IN_CI for name in names) for names in MODELS.values())


class TestOtherFunctionsOfTheLibrary:
    @pytest.fixture(scope="class")
    def pair(self) -> tuple[nn.Module, nn.Module]:
        net, _ = converted("resnet18")
        return net, fuse(net)

    def test_profile_counts_the_net(self, pair: tuple[nn.Module, nn.Module]) -> None:
        net, fused = pair
        x = torch.randn(1, 3, 48, 48)
        depths = ["super", "TFTF", "base"]
        ours, expected = (adn.profile(m, x, depths=depths, rounds=1, warmup=0) for m in (fused, net))
        assert [(p.depth, p.macs, p.params) for p in ours] == [(p.depth, p.macs, p.params) for p in expected]

    @pytest.mark.parametrize("what", [
        adn.stages, adn.extract, lambda fused: adn.save(fused, "x.safetensors"), adn.SelfDistillation,
        lambda fused: adn.load_weights(fused, {}), adn.freeze_batch_norm])
    def test_what_needs_its_blocks_says_so(self, pair: tuple[nn.Module, nn.Module], what: object) -> None:
        with pytest.raises(ValueError, match="the net that it was made from"):
            what(pair[1])


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
class TestOnAGpu:
    @pytest.mark.parametrize("name", ["resnet18", "mobilenetv2_050", "regnety_002", "vit_tiny_patch16_224",
                                      "swin_tiny_patch4_window7_224", "convnext_atto"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
    def test_every_depth(self, name: str, dtype: torch.dtype) -> None:
        net, x = converted(name)
        net, x = net.cuda(), x.cuda()
        exact = copy.deepcopy(net).double()
        net, x = net.to(dtype), x.to(dtype)
        fused = fuse(net)
        for depth in stated_sample(net):
            wanted = forward(exact, x.double(), depth)
            allowed = 2 * difference(forward(net, x, depth), wanted) + 4 * torch.finfo(dtype).eps
            assert difference(forward(fused, x, depth), wanted) <= allowed, depth

    def test_one_launch_for_each_convolution(self) -> None:
        net, x = converted("tv_resnet50")
        net, x = net.cuda().half(), x.cuda().half().to(memory_format=torch.channels_last)
        fused = fuse(net)
        for depth in ("super", "TFTF", "base"):
            forward(fused, x, depth)
            convolutions = sum(isinstance(m, nn.Conv2d) for m in adn.extract(net, depth).modules())
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as trace:
                forward(fused, x, depth)
                torch.cuda.synchronize()
            kernels = sum(event.count for event in trace.key_averages()
                          if event.device_type == torch.autograd.DeviceType.CUDA)
            # Besides, max pool, mean, classifier; a convolution of cuDNN's may take a second kernel.
            assert kernels <= 1.5 * convolutions + 8

    def test_follows_the_net(self) -> None:
        net, x = converted("resnet18")
        net, x = net.cuda(), x.cuda()
        fused = fuse(net)
        forward(fused, x, "base")
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.mul_(1.1)
        assert difference(forward(fused, x, "base"), forward(net, x, "base")) < 1e-2
