"""Fused norms: everything a net computes and keeps is what the plain net computes and keeps, in fewer ops."""

from __future__ import annotations

import collections
import copy
import functools
import itertools
import pickle
from collections.abc import Iterator

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from conftest import build, few, randomise
from test_convert import stated_sample
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import adn
from adn.core import behaviours
from adn.runtime import norms
from adn.runtime.accelerate import accelerate, fusions, use_kernels

# One or two nets of every family, cut down; with odd sizes of input where a net allows.
MODELS = {
    "resnet18": {"layers": (2, 1, 2, 1)},
    "resnet50d": {"layers": (2, 2, 1, 1)},
    "tv_resnet18": {},
    "resnetv2_50": {"layers": (2, 2, 1, 1), "channels": (32, 64, 64, 64), "stem_chs": 8},
    "mobilenetv2_050": {"act_layer": "silu"},
    "tv_mobilenet_v3_small": {},
    "vit_tiny_patch16_224": {"depth": 6, "embed_dim": 48, "img_size": 64},
    "tv_vit": {"image_size": 64, "patch_size": 16, "num_layers": 6, "num_heads": 2, "hidden_dim": 48, "mlp_dim": 96},
    "swin_tiny_patch4_window7_224": {"depths": (2, 2, 2), "embed_dim": 24, "num_heads": (1, 2, 2), "img_size": 64},
    "convnext_atto": {"depths": (2, 2, 1, 1), "dims": (16, 24, 32, 40)},
    "regnety_002": {},
    "tv_regnet_x_400mf": {},
}
SECOND = "tv_resnet18", "tv_mobilenet_v3_small", "tv_regnet_x_400mf"
NAMES = few(MODELS, lambda name: name not in SECOND)


@functools.cache
def converted(name: str) -> nn.Module:
    """To be copied."""
    kwargs = {"num_classes": 10, **MODELS[name]}
    if name == "tv_vit":
        torch.manual_seed(0)
        return adn.convert(randomise(torchvision.models.VisionTransformer(**kwargs)).eval())
    return adn.convert(build(name, **kwargs))


def pair(name: str, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, nn.Module, torch.Tensor]:
    """A converted net, the same accelerated, and an input."""
    plain = copy.deepcopy(converted(name)).to(dtype)
    net = accelerate(copy.deepcopy(plain))
    size = MODELS[name].get("img_size", MODELS[name].get("image_size", 37))
    return plain, net, torch.randn(3, 3, size, size, dtype=dtype, generator=torch.Generator().manual_seed(1))


class Ops(TorchDispatchMode):
    """Counts ops by name; views and metadata, which launch nothing, left out."""

    def __init__(self) -> None:
        super().__init__()
        self.count: collections.Counter[str] = collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func.is_view and func is not torch.ops.aten.detach.default:
            self.count[func._schema.name] += 1
        return func(*args, **kwargs or {})

    @property
    def fused(self) -> int:
        return sum(n for name, n in self.count.items() if name.startswith("adn::"))


@pytest.fixture(autouse=True)
def kernels() -> Iterator[None]:
    with use_kernels(True):
        yield


def assert_same_state(plain: nn.Module, net: nn.Module, **tolerance: float) -> None:
    """Gradients of all parameters, running statistics, counters."""
    assert list(plain.state_dict()) == list(net.state_dict())
    for (name, p), q in zip(plain.named_parameters(), net.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        if p.grad is not None:
            scale = tolerance.get("atol", 1e-9) * max(1.0, p.grad.abs().max().item())
            torch.testing.assert_close(q.grad, p.grad, rtol=0, atol=scale, msg=lambda m, name=name: f"{name}: {m}")
    for (name, b), c in zip(plain.named_buffers(), net.named_buffers(), strict=True):
        if b.dtype == torch.long:
            assert torch.equal(b, c[1]), name
        else:
            torch.testing.assert_close(c[1], b, rtol=tolerance.get("rtol", 1e-10), atol=tolerance.get("atol", 1e-10))
        assert not c[1].requires_grad, name


def chosen(net: nn.Module) -> list[adn.Depth]:
    """Every depth, or where there are 32 a third of them."""
    depths = stated_sample(net)
    return depths if len(depths) <= 16 else [*depths[::3], depths[-1]]


def labels(x: torch.Tensor) -> torch.Tensor:
    return torch.arange(len(x)) % 10


def step(net: nn.Module, x: torch.Tensor, **settings: object) -> dict[str, torch.Tensor]:
    torch.manual_seed(3)  # stochastic depth
    losses = adn.SelfDistillation(net, **settings)(x, labels(x))
    losses["loss"].backward()
    return losses


@pytest.mark.parametrize("name", NAMES)
def test_every_depth_in_evaluation(name: str) -> None:
    plain, net, x = pair(name)
    for depth in chosen(net):
        adn.set_depth(plain, depth)
        adn.set_depth(net, depth)
        with torch.inference_mode(), Ops() as ops:
            y = net(x)
            fused = ops.fused
            torch.testing.assert_close(y, plain(x), rtol=1e-10, atol=1e-10)
        assert (fused > 0) == any(row.active for row in fusions(net))


@pytest.mark.parametrize("name", NAMES)
def test_training(name: str) -> None:
    plain, net, x = pair(name)
    for each in (plain, net):
        each.train()
        n = len(adn.get_depth(each))
        for depth in ("super", "base", [i % 2 == 0 for i in range(n)], "super"):
            adn.set_depth(each, depth)
            torch.manual_seed(3)
            F.cross_entropy(each(x), labels(x)).backward()
    assert_same_state(plain, net)


@pytest.mark.parametrize("single_pass", [False, True], ids=["two passes", "one pass"])
@pytest.mark.parametrize("name", ["resnet18", "mobilenetv2_050", "tv_vit", "swin_tiny_patch4_window7_224"])
def test_self_distillation(name: str, single_pass: bool) -> None:
    plain, net, x = pair(name)
    expected = step(plain.train(), x)
    for key, value in step(net.train(), x, single_pass=single_pass).items():
        torch.testing.assert_close(value, expected[key], rtol=1e-9, atol=1e-10)
    assert_same_state(plain, net)


def test_one_op_for_both_nets() -> None:
    """Where super-net and base-net run in one forward, a norm is still one op."""
    _, net, x = pair("resnet18")
    with Ops() as ops, torch.no_grad():
        adn.SelfDistillation(net.train(), single_pass=True)(x, labels(x))
    assert ops.count["adn::batch_norm"] == sum(len(row.fused) for row in fusions(net)) == 15


@pytest.fixture
def reentrant(request: pytest.FixtureRequest) -> Iterator[None]:
    before = timm.layers.use_reentrant_ckpt()
    timm.layers.set_reentrant_ckpt(request.param)
    yield
    timm.layers.set_reentrant_ckpt(before)


@pytest.mark.parametrize("reentrant", [False, True], indirect=True, ids=["saved_tensors", "reentrant"])
@pytest.mark.parametrize("name", few(["resnet18", "mobilenetv2_050", "vit_tiny_patch16_224"],
                                     lambda name: name != "mobilenetv2_050"))
def test_gradient_checkpointing(name: str, reentrant: None) -> None:
    plain, net, x = pair(name)
    net.set_grad_checkpointing(True)
    step(plain.train(), x)
    with Ops() as ops:
        step(net.train(), x.requires_grad_())
    assert ops.count["adn::batch_norm"] + ops.count["adn::layer_norm"] > 0
    assert_same_state(plain, net)


@pytest.mark.parametrize("name", ["resnet50d", "mobilenetv2_050"])
def test_channels_last(name: str) -> None:
    plain, net, x = pair(name)
    x = x.contiguous(memory_format=torch.channels_last)
    outputs = {}
    for each in (plain, net):
        each.to(memory_format=torch.channels_last).train()
        blocks = [b for stage in adn.stages(each) for b in (*stage.essential, *stage.refinement)]
        for i, block in enumerate(blocks):
            block.register_forward_hook(
                lambda _m, _a, y, i=i, each=each: outputs.setdefault(i, []).append(y.stride()))
        step(each, x)
    assert all(len(set(strides)) == 1 for strides in outputs.values())
    assert_same_state(plain, net)


def assert_no_worse(results: list[list[torch.Tensor]]) -> None:
    """Of [exact, plain, accelerated]: how far the last two are from the first."""
    exact, *others = [torch.cat([t.double().flatten() for t in tensors]) for tensors in results]
    plain, accelerated = ((other - exact).norm() / exact.norm() for other in others)
    assert accelerated < 2 * plain + 1e-7


@pytest.mark.parametrize("name", few(["resnet18", "mobilenetv2_050", "swin_tiny_patch4_window7_224"],
                                     lambda name: name != "mobilenetv2_050"))
def test_float32(name: str) -> None:
    """Gradients and statistics are as exact as the plain net's."""
    plain, net, x = pair(name, torch.float32)
    results = []
    for each in (copy.deepcopy(plain).double(), plain, net):
        step(each.train(), x.to(next(each.parameters()).dtype))
        results.append([p.grad for p in each.parameters()] + [b for b in each.buffers() if b.is_floating_point()])
    assert_no_worse(results)


@pytest.mark.parametrize("name", few(["resnet18", "mobilenetv2_050", "vit_tiny_patch16_224",
                                      "swin_tiny_patch4_window7_224", "convnext_atto"],
                                     ["resnet18", "swin_tiny_patch4_window7_224", "convnext_atto"].__contains__))
def test_autocast(name: str) -> None:
    """Blocks return what they return without kernels, in the same type."""
    plain, net, x = pair(name, torch.float32)
    results, types = [], []
    for each, dtype in ((copy.deepcopy(plain), None), (plain, torch.bfloat16), (net, torch.bfloat16)):
        seen: list[torch.Tensor] = []
        for stage in adn.stages(each):
            for block in (*stage.essential, *stage.refinement):
                block.register_forward_hook(lambda _m, _a, y, seen=seen: seen.append(y))
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            for depth in ("super", "base"):
                adn.set_depth(each, depth)
                torch.manual_seed(3)
                each.train()(x).float().square().mean().backward()
        results.append(seen + [p.grad for p in each.parameters() if p.grad is not None])
        types.append([tensor.dtype for tensor in results[-1]])
    assert types[1] == types[2]
    assert_no_worse(results)


def test_off_is_bit_for_bit_the_plain_net() -> None:
    plain, net, x = pair("resnet18", torch.float32)
    for enabled in (False, None):
        with use_kernels(enabled), Ops() as ops:
            for each in (plain, net):
                step(each.train(), x)
        assert ops.fused == 0
        for (name, a), b in zip(plain.state_dict().items(), net.state_dict().values(), strict=True):
            assert torch.equal(a, b), name
        for p, q in zip(plain.parameters(), net.parameters(), strict=True):
            assert p.grad is q.grad is None or torch.equal(p.grad, q.grad)


class TestSwitch:
    def test_restored_after_an_error(self) -> None:
        net = accelerate(adn.convert(build("resnet18")))
        x = torch.randn(1, 64, 8, 8)

        def runs_fused() -> bool:
            with Ops() as ops, torch.no_grad():
                net.layer1[0](x)
            return ops.fused > 0

        assert runs_fused()
        with pytest.raises(ZeroDivisionError), use_kernels(False):
            1 / (not runs_fused() and 0)
        assert runs_fused()
        use_kernels(None)
        assert not runs_fused()
        use_kernels(True)
        assert runs_fused()

    @pytest.mark.parametrize("value", ["on", 2, "none"])
    def test_refuses_anything_else(self, value: object) -> None:
        with pytest.raises(ValueError, match="True, False, or None"):
            use_kernels(value)


class TestCompiled:
    @pytest.mark.parametrize(("name", "block", "shape"), [
        ("resnet50d", "layer2.0", (2, 256, 7, 9)), ("vit_tiny_patch16_224", "blocks.0", (2, 5, 48))])
    def test_a_block_has_no_graph_break(self, name: str, block: str, shape: tuple[int, ...]) -> None:
        torch._dynamo.reset()
        plain, net, _ = pair(name)
        x = torch.randn(shape, dtype=torch.double)
        run = torch.compile(net.get_submodule(block), backend="aot_eager", fullgraph=True)
        for training, depth in ((True, "super"), (True, "base"), (False, "base")):
            for each, call in ((plain, plain.get_submodule(block)), (net, run)):
                each.train(training)
                adn.set_depth(each, depth)
                call(x).square().sum().backward()
        assert_same_state(plain, net)

    @pytest.mark.full
    @pytest.mark.parametrize("name", few(["resnet18", "mobilenetv2_050", "vit_tiny_patch16_224", "regnety_002"],
                                         ["vit_tiny_patch16_224", "regnety_002"].__contains__))
    def test_a_net(self, name: str) -> None:
        torch._dynamo.reset()
        plain, net, x = pair(name)
        run = torch.compile(net, backend="aot_eager")
        for training, depth in ((True, "super"), (True, "base"), (False, "base")):
            for each, call in ((plain, plain), (net, run)):
                each.train(training)
                adn.set_depth(each, depth)
                call(x).square().sum().backward()
        assert_same_state(plain, net)

    def test_the_switch_is_seen(self) -> None:
        torch._dynamo.reset()
        _, net, _ = pair("resnet18", torch.float32)
        block, x = net.layer1[0].eval(), torch.randn(1, 64, 5, 5)
        seen = []

        def backend(graph: torch.fx.GraphModule, _: list) -> torch.fx.GraphModule:
            seen.append(any("batch_norm_eval" in str(node.target) for node in graph.graph.nodes))
            return graph

        run = torch.compile(block, backend=backend)
        with torch.no_grad():
            run(x)
            with use_kernels(False):
                run(x)
        assert seen == [True, False]


class TestCopies:
    def test_of_a_net_run_their_own_modules(self) -> None:
        _, net, x = pair("mobilenetv2_050")
        adn.set_depth(net, "TFFTF")
        expected = net(x)
        for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
            with Ops() as ops:
                assert torch.equal(other(x), expected)
            assert ops.fused > 0
            with torch.no_grad():
                for m in other.modules():
                    if isinstance(m, nn.BatchNorm2d):
                        m.weight.zero_()
            assert not torch.equal(other(x), expected)
            assert torch.equal(net(x), expected)
            other.train()(x).sum().backward()
            assert all(p.grad is None for p in net.parameters())
        assert all(row.active for row in fusions(other))

    def test_own_code(self) -> None:
        """Dynamo keeps what it compiled per code object, a few times for each."""
        net = accelerate(adn.convert(build("resnet18")))
        nets = net, copy.deepcopy(net)
        routes = [m._adn_route for n in nets for m in n.modules() if isinstance(m, behaviours.Rerouted)]
        assert len({id(route._rewritten.forward.__code__) for route in routes}) == len(routes) == 16

    @pytest.mark.parametrize("depth", ["super", "base"])
    def test_extract_leaves_no_trace(self, depth: str) -> None:
        plain, net, x = pair("resnet18")
        static = adn.extract(net, depth)
        assert not any(isinstance(m, behaviours.Swapped) or "_adn_route" in m.__dict__ for m in static.modules())
        assert torch.equal(static(x), adn.extract(plain, depth)(x))

    def test_undone_by_changes_of_all_norms(self) -> None:
        plain, net, x = pair("resnet18")
        adn.freeze_batch_norm(net)
        adn.freeze_batch_norm(plain)
        assert not any(row.active for row in fusions(net))
        assert torch.equal(net(x), plain(x))
        accelerate(net)
        with Ops() as ops:
            torch.testing.assert_close(net.train()(x), plain(x), rtol=1e-10, atol=1e-10)
        assert ops.count["adn::batch_norm_eval"] > 0

    def test_twice_is_once(self) -> None:
        plain, net, x = pair("resnet18")
        assert accelerate(net) is net
        step(net.train(), x)
        step(plain.train(), x)
        assert_same_state(plain, net)

    def test_state_dict(self) -> None:
        plain, net, x = pair("resnet18")
        with torch.no_grad():
            for p in net.parameters():
                p.add_(0.1)
        net.load_state_dict(plain.state_dict())
        torch.testing.assert_close(net(x), plain(x), rtol=1e-10, atol=1e-10)


class TestOwnForward:
    """What makes a block go its own way, for as long as it holds."""

    @pytest.fixture
    def nets(self) -> tuple[nn.Module, nn.Module, torch.Tensor]:
        plain, net, _ = pair("resnet50d")
        for m in (*plain.modules(), *net.modules()):
            if isinstance(m, nn.ReLU):
                m.inplace = False  # else torch refuses backward hooks next to it
        return plain, net, torch.randn(2, 64, 7, 9, dtype=torch.double)

    @staticmethod
    def fused(block: nn.Module, *args: object, **kwargs: object) -> int:
        with Ops() as ops, torch.no_grad():
            block(*args, **kwargs)
        return ops.fused

    @pytest.mark.parametrize(("child", "kind"), few(
        itertools.product(["bn1", "bn1.skip", "act1", "drop_block", "act3", "downsample", "downsample.2"],
                          ["forward", "forward_pre", "full_backward", "full_backward_pre"]),
        lambda case: case[0] == "bn1.skip" or case[1] == "forward"))
    def test_hooks(self, nets: tuple, child: str, kind: str) -> None:
        _, net, x = nets
        block, called = net.layer1[0], []
        register = getattr(block.get_submodule(child), f"register_{kind}_hook")
        handle = register(lambda *_: called.append(child))
        adn.set_depth(net, "base")
        assert self.fused(block, x) == 0
        block(x.requires_grad_()).sum().backward()
        assert called
        handle.remove()
        assert self.fused(block, x) > 0

    def test_hooks_of_all_modules(self, nets: tuple) -> None:
        _, net, x = nets
        called = []
        handle = nn.modules.module.register_module_forward_hook(lambda m, *_: called.append(m))
        try:
            assert self.fused(net.layer1[0], x) == 0
        finally:
            handle.remove()
        assert net.layer1[0].bn1 in called

    def test_hooks_of_what_is_still_called(self, nets: tuple) -> None:
        _, net, x = nets
        called = []
        net.layer1[0].register_forward_hook(lambda *_: called.append("block"))
        net.layer1[0].conv2.register_forward_hook(lambda *_: called.append("conv"))
        assert self.fused(net.layer1[0], x) > 0
        assert called == ["conv", "block"]

    def test_another_module_in_its_place(self, nets: tuple) -> None:
        plain, net, _ = nets
        changed = {"layer1.0": 64, "layer2.0": 256, "layer2.1": 512}
        for each in (plain.train(), net.train()):
            each.layer1[0].act1 = nn.GELU()
            each.layer2[0].downsample[2] = nn.Identity()
            each.layer2[1].drop_path = nn.Dropout(0.5)  # None until now
        assert {row.name for row in fusions(net) if row.fused and not row.active} == set(changed)
        for again in (False, True):
            if again:
                accelerate(net)
            for name, channels in changed.items():
                block = net.get_submodule(name)
                x = torch.randn(2, channels, 6, 6, dtype=torch.double)
                assert (self.fused(copy.deepcopy(block) if again else block, x) > 0) == again
                torch.manual_seed(0)
                expected = plain.get_submodule(name)(x)
                torch.manual_seed(0)
                torch.testing.assert_close(block(x), expected, rtol=1e-10, atol=1e-10)

    def test_new_attributes_and_modes_change_nothing(self, nets: tuple) -> None:
        _, net, x = nets
        net.layer1[0].note = "mine"
        net.train().eval().float().double().requires_grad_(False)
        assert self.fused(net.layer1[0], x) > 0

    def test_a_norm_deep_inside(self) -> None:
        plain, net, x = pair("regnety_002")
        for each in (plain, net):
            each.s4.b1.conv1.bn = nn.Identity()
        assert not next(row for row in fusions(net) if row.name == "s4.b1").active
        torch.testing.assert_close(net(x), plain(x), rtol=1e-10, atol=1e-10)

    def test_more_arguments(self) -> None:
        plain, net, _ = pair("vit_tiny_patch16_224")
        x, mask = torch.randn(2, 5, 48, dtype=torch.double), torch.randn(5, 5, dtype=torch.double)
        assert self.fused(net.blocks[0], x) == 1
        assert self.fused(net.blocks[0], x, mask) == 0
        assert self.fused(net.blocks[0], x, attn_mask=mask) == 0
        assert torch.equal(net.blocks[0](x, attn_mask=mask), plain.blocks[0](x, attn_mask=mask))

    def test_a_forward_of_its_own(self) -> None:
        net = adn.convert(build("resnet18"))
        net.layer1[0].forward = lambda x: x
        row = fusions(accelerate(net))[0]
        assert not row.active
        assert "replaced" in row.reason


VARIANTS = {
    "cumulative": lambda m: setattr(m, "momentum", None),
    "momentum": lambda m: setattr(m, "momentum", 0.3),
    "eps": lambda m: setattr(m, "eps", 0.1),
    "evaluation in a training net": lambda m: m.eval(),
    "no running statistics": lambda m: [setattr(m, "track_running_stats", False)] + [
        setattr(m, name, None) for name in ("running_mean", "running_var", "num_batches_tracked")],
    "statistics kept but not tracked": lambda m: setattr(m, "track_running_stats", False),
    "no counter": lambda m: setattr(m, "num_batches_tracked", None),
    "no affine parameters": lambda m: [setattr(m, "weight", None), setattr(m, "bias", None)],
    "frozen parameters": lambda m: m.requires_grad_(False),
}


class TestNorms:
    @pytest.mark.parametrize("variant", VARIANTS)
    @pytest.mark.parametrize(("name", "training"), few(
        itertools.product(["resnet18", "mobilenetv2_050"], [True, False]), lambda case: case[1] == ("res" in case[0])))
    def test_settings(self, name: str, training: bool, variant: str) -> None:
        plain, net, _ = pair(name)
        for each in (plain, net):
            each.train(training)
            stage, channels = (each.layer1, 64) if name == "resnet18" else (each.blocks[1], 8)
            x = torch.randn(3, channels, 7, 5, dtype=torch.double, generator=torch.Generator().manual_seed(2))
            for m in each.modules():
                if isinstance(m, nn.BatchNorm2d):
                    VARIANTS[variant](m)
            for depth in ("super", "base"):
                adn.set_depth(each, depth)
                stage(x.requires_grad_()).square().mean().backward()
        assert_same_state(plain, net)

    def test_one_that_trains_in_a_net_that_does_not(self) -> None:
        plain, net, x = pair("resnet18")
        for each in (plain, net):
            for m in list(each.modules())[::3]:
                m.training = True
            each(x).square().mean().backward()
        assert any(m.num_batches_tracked > 0 for m in net.modules() if isinstance(m, nn.BatchNorm2d))
        assert_same_state(plain, net)

    @pytest.mark.parametrize("name", ["resnet18", "mobilenetv2_050"])
    @pytest.mark.parametrize("change", [adn.convert_sync_batchnorm, adn.freeze_batch_norm])
    def test_other_classes(self, name: str, change) -> None:
        plain, _, x = pair(name)
        change(plain)
        net = accelerate(copy.deepcopy(plain))
        with Ops() as ops:
            step(net.train(), x)
        step(plain.train(), x)
        assert ops.fused > 0
        assert_same_state(plain, net)

    def test_a_subclass_may_compute_something_else(self) -> None:
        class Doubled(nn.BatchNorm2d):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return 2 * super().forward(x)

        net = adn.convert(build("resnet18", norm_layer=Doubled))
        assert not any(row.fused for row in fusions(net))

    @pytest.mark.parametrize("x", [
        torch.randn(2, 66, 9, 5)[:, 1:65], torch.randn(2, 64, 5, 9).transpose(2, 3), torch.randn(1, 64, 9, 5),
        torch.randn(2, 64, 9, 5).contiguous(memory_format=torch.channels_last)])
    def test_strides(self, x: torch.Tensor) -> None:
        plain, net, _ = pair("resnet18", torch.float32)
        for each in (plain.train(), net.train()):
            each.layer1[0](x).square().mean().backward()
        assert_same_state(plain, net, atol=1e-5, rtol=1e-5)

    def test_a_norm_called_twice_in_a_block(self) -> None:
        class Block(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.conv, self.norm, self.last = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.BatchNorm2d(4)

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return x + self.last(self.norm(self.conv(F.relu(self.norm(x)))))

        torch.manual_seed(0)
        plain = adn.convert(nn.Sequential(nn.Sequential(Block(), Block())), plan=["0"]).double().train()
        net = accelerate(copy.deepcopy(plain))
        assert fusions(net)[0].fused == ("last + add",)
        for each in (plain, net):
            each(torch.ones(2, 4, 3, 3, dtype=torch.double).cumsum(0)).sum().backward()
        assert_same_state(plain, net)

    @pytest.mark.parametrize("x", [torch.randn(2, 6, 9, 5)[:, 1:5], torch.randn(2, 4, 5, 9).transpose(2, 3)])
    @pytest.mark.parametrize("training", [True, False])
    def test_strides_that_no_op_reads(self, x: torch.Tensor, training: bool) -> None:
        norm, moved = randomise(nn.BatchNorm2d(4)).train(training), []
        expected = F.relu(copy.deepcopy(norm)(x) + x)
        torch.testing.assert_close(norms.batch_norm(norm, x, x, "relu", moved), expected)

    def test_a_sum_of_half_precision_under_autocast(self) -> None:
        """On a GPU torch widens it, and what follows may be the residual stream: the op must not take it."""
        norm, x = randomise(nn.LayerNorm(8)), torch.randn(2, 3, 8)
        half = x.bfloat16()
        for a, b, fused in ((half, half, 0), (half, x, 1), (x, half, 1)):
            with torch.autocast("cpu", torch.bfloat16), Ops() as ops:
                y, total = norms.sum_and_layer_norm(norm, a, b)
                assert ops.fused == fused
                torch.testing.assert_close((y, total), (norm(a + b), a + b))
        with Ops() as ops:
            norms.sum_and_layer_norm(norm.bfloat16(), half, half)
        assert ops.fused == 1

    def test_a_sum_lies_as_the_stream_does(self) -> None:
        norm, x = randomise(nn.LayerNorm(8)), torch.randn(2, 3, 8)
        with Ops() as ops:
            y, total = norms.sum_and_layer_norm(norm, torch.randn(3, 2, 8).transpose(0, 1), x)
            assert ops.fused == 1
        assert total.is_contiguous()
        torch.testing.assert_close(y, norm(total))
        y, total = norms.sum_and_layer_norm(norm, x, x[:1], (6, 8))  # to be broadcast: no op for that
        torch.testing.assert_close(total, (x + x[:1]).reshape(6, 8))
        torch.testing.assert_close(y, norm(total))

    def test_a_second_step(self) -> None:
        plain, net, x = pair("resnet18")
        for _ in range(2):
            step(plain.train(), x)
            step(net.train(), x)
        assert_same_state(plain, net)


class Strange(nn.Module):
    """A block, all of whose additions and activations are traps."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn1, self.bn2 = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.bn3, self.bn4 = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.bn1(self.conv(x))
        y = y + y  # one value, twice
        z = self.bn2(y)
        z = self.relu(z) * z  # used twice, the second time after the activation has been written over it
        c = self.conv(z)
        w = self.bn3(c)
        c.mul_(2)  # written between the norm and the addition
        w = w + c
        v = self.bn4(self.conv(w))
        first = last = x * 1
        last += v  # in place, on what is used again
        return last + F.leaky_relu(first)


class Refused(Strange):
    """What a graph would freeze."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.calls = kind, 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.relu(self.bn1(x))
        if self.kind == "mode":
            return F.dropout(y, 0.5, self.training)
        if self.kind == "value":
            return y if y.sum() > 0 else x
        if self.kind == "tensor":
            return y + torch.arange(5)[:, None].to(y)
        self.calls += 1
        return y


@pytest.mark.parametrize(("kind", "reason"), [
    ("mode", "training is another"), ("value", "control flow"), ("tensor", "makes a tensor"),
    ("attribute", "sets an attribute")])
def test_refused(kind: str, reason: str) -> None:
    net = adn.convert(nn.Sequential(nn.Sequential(Refused(kind), Refused(kind))), plan=["0"])
    before = {m: dict(vars(m)) for m in net.modules()}
    row = fusions(accelerate(net))[0]
    assert not row.active
    assert reason in row.reason
    assert {m: dict(vars(m)) for m in net.modules()} == before


def test_traps() -> None:
    torch.manual_seed(0)
    plain = adn.convert(nn.Sequential(nn.Sequential(Strange(), Strange())), plan=["0"]).double().train()
    net = accelerate(copy.deepcopy(plain))
    x = torch.randn(2, 4, 5, 3, dtype=torch.double)
    with torch.no_grad():
        for depth in ("F", "T"):
            adn.set_depth(plain, depth)
            adn.set_depth(net, depth)
            torch.testing.assert_close(net(x), plain(x), rtol=1e-10, atol=1e-10)
    assert_same_state(plain, net)


@pytest.mark.parametrize(("name", "expected"), [
    ("resnet50d", {"layer1.0": ("bn1 + relu", "bn2 + relu", "bn3 + add + relu", "downsample.2"),
                   "layer1.1": ("bn1 + relu", "bn2 + relu", "bn3 + add + relu"), "conv1": ("1 + relu", "4 + relu")}),
    ("resnetv2_50", {"stages.0.blocks.0": ("norm1 + relu", "norm2 + relu", "norm3 + relu"), "norm": ("norm + relu",)}),
    ("mobilenetv2_050", {"blocks.1.1": ("bn1 + silu", "bn2 + silu", "bn3 + add"), "bn1": ("norm + silu",)}),
    ("vit_tiny_patch16_224", {"blocks.0": ("add + norm2",), "norm": ()}),
    ("tv_vit", {"encoder.layers.encoder_layer_0": ("add + ln_2",)}),
    ("swin_tiny_patch4_window7_224", {"layers.0.blocks.1": ("add + norm2",)}),
    ("convnext_atto", {"stages.0.blocks.0": ()}),
    ("regnety_002", {"s4.b2": ("conv1.bn + relu", "conv2.bn + relu", "conv3.bn + add + relu"),
                     "stem": ("bn + relu",)}),
    ("tv_resnet18", {"layer1.0": ("bn1 + relu", "bn2 + add + relu"), "bn1": ()}),
])
def test_report(name: str, expected: dict[str, tuple[str, ...]]) -> None:
    net = copy.deepcopy(converted(name))
    assert not any(row.active for row in fusions(net))
    before = {m: m.training for m in net.modules()}
    rows = {row.name: row for row in fusions(accelerate(net))}
    assert {m: m.training for m in net.modules()} == before
    assert all(row.active == bool(row.fused) == (not row.reason) for row in rows.values())
    assert {key: rows[key].fused for key in expected} == expected
    printed = str(fusions(net)).splitlines()
    assert len(printed) == len(rows) + 1
    assert all(", ".join(row.fused) in line for row, line in zip(rows.values(), printed[1:], strict=True))


COUNTED = ["resnet50d", "mobilenetv2_050", "vit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "regnety_002"]


@pytest.mark.parametrize("name", COUNTED)
def test_ops_per_forward(name: str, table: list) -> None:
    plain, net, x = pair(name, torch.float32)
    for training in (True, False):
        for depth in chosen(net):
            counts = []
            for each in (plain, net):
                each.train(training)
                with adn.at_depth(each, depth), torch.no_grad(), Ops() as ops:
                    each(x)
                counts.append(ops.count)
            before, after = (sum(count.values()) for count in counts)
            assert after < before
            table.append({"model": name, "mode": "training" if training else "evaluation", "depth": str(depth),
                          "plain": before, "accelerated": after, "fused": sum(
                              n for op, n in counts[1].items() if op.startswith("adn::"))})


def test_ops_of_a_bottleneck() -> None:
    plain, net, _ = pair("resnet50d", torch.float32)
    x = torch.randn(2, 256, 6, 6)
    with Ops() as ops, torch.no_grad():
        net.train().layer1[1](x)
    assert ops.count == {"aten::convolution": 3, "adn::batch_norm": 3, "aten::_foreach_copy_": 1,
                         "aten::_foreach_add_": 1}
    with Ops() as ops, torch.no_grad():
        plain.train().layer1[1](x)
    assert ops.count == {"aten::convolution": 3, "aten::native_batch_norm": 3, "aten::relu_": 3,
                         "aten::add_": 4,  # 3 counters, 1 residual
                         "aten::empty": 3}
    with Ops() as ops, torch.no_grad():
        net.eval().layer1[1](x)
    assert ops.count == {"aten::convolution": 3, "adn::batch_norm_eval": 3}
