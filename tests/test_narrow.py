"""Modules that concatenate what their blocks make: narrowed at every depth, in every form, or refused."""

from __future__ import annotations

import copy

import pytest
import torch
from compilations import count
from conftest import few
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import adn
from adn.core.depth import Depth
from adn.core.kinds.narrow import NarrowPlan, conv_of_first_inputs
from adn.core.state import state_of, super_and_base
from adn.measure.cost import count_macs, count_parameters

CHANNELS = 8


class Conv(nn.Module):
    def __init__(self, inputs: int, outputs: int, size: int = 1, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=1e-3)
        self.act = nn.SiLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(self.bn(self.conv(x)))


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.cv1, self.cv2 = Conv(width, width // 2, 3), Conv(width // 2, width, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.cv2(self.cv1(x))


class Halves(nn.Module):
    """As C3k2: both halves of a convolution's output and what each block makes of the last."""

    def __init__(self, inputs: int, outputs: int, blocks: int, width: int = CHANNELS) -> None:
        super().__init__()
        self.cv1 = Conv(inputs, 2 * width)
        self.m = nn.ModuleList(Block(width) for _ in range(blocks))
        self.cv2 = Conv((2 + blocks) * width, outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = list(self.cv1(x).chunk(2, 1))
        y.extend(m(y[-1]) for m in self.m)
        return self.cv2(torch.cat(y, 1))


class Scaled(nn.Module):
    """As A2C2f: one convolution's output, blocks that are sequences, and a residual scaled per channel."""

    def __init__(self, width: int, blocks: int) -> None:
        super().__init__()
        self.cv1 = Conv(width, width // 2)
        self.m = nn.ModuleList(nn.Sequential(Block(width // 2), Block(width // 2)) for _ in range(blocks))
        self.cv2 = Conv((1 + blocks) * width // 2, width)
        self.gamma = nn.Parameter(torch.full((width,), 0.5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = [self.cv1(x)]
        for m in self.m:
            y.append(m(y[-1]))
        return x + self.gamma.view(-1, 1, 1) * self.cv2(torch.cat(y, dim=1))


class Net(nn.Module):
    def __init__(self, halves: int = 3, scaled: int = 4) -> None:
        super().__init__()
        self.stem = Conv(3, 12, 3, 2)
        self.halves = Halves(12, 16, halves)
        self.down = Conv(16, 16, 3, 2)
        self.scaled = Scaled(16, scaled)
        self.head = nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.scaled(self.down(self.halves(self.stem(x))))
        return self.head(x.mean((2, 3)))


def source(dtype: torch.dtype = torch.float64, **blocks: int) -> Net:
    torch.manual_seed(0)
    net = Net(**blocks).to(dtype).eval()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.2)
            nn.init.normal_(module.running_mean, 0, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return net


def plan(own: bool = False, **settings: int) -> list[NarrowPlan]:
    """With the norm between the two switched by the flag of what follows it, as in YOLOv12."""
    norms = [f"scaled.{name}.bn" for name in ("cv1", "cv2")]
    norms += [f"scaled.m.{i}.{j}.{name}.bn" for i in range(2) for j in range(2) for name in ("cv1", "cv2")]
    return [
        NarrowPlan("halves", [f"halves.m.{i}" for i in range(3)], module="halves", conv="halves.cv2.conv",
                   inputs=4 * CHANNELS, **settings),
        NarrowPlan("scaled", [f"scaled.m.{i}" for i in range(4)], module="scaled", conv="scaled.cv2.conv",
                   inputs=3 * CHANNELS, own=own, norms=["down.bn", *norms]),
    ]


def converted(own: bool = False, dtype: torch.dtype = torch.float64) -> nn.Module:
    """Both sets of norms, and both kernels, differ."""
    net = adn.convert(source(dtype), plan=plan(own))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, tensor in (*net.named_parameters(), *net.named_buffers()):
            if ".skip." in name and tensor.is_floating_point():
                tensor.mul_(1 + 0.4 * torch.rand(tensor.shape, generator=generator).to(tensor))
    return net


def expected(net: nn.Module, x: torch.Tensor, depth: Depth) -> torch.Tensor:
    """Written out."""
    def norm(module: nn.Module, bypassed: bool) -> nn.Module:
        return module.skip if bypassed else module

    def conv(module: Conv, x: torch.Tensor, bypassed: bool, weight: torch.Tensor | None = None) -> torch.Tensor:
        plain = module.conv
        weight = plain.weight if weight is None else weight
        y = torch.nn.functional.conv2d(x, weight, None, plain.stride, plain.padding)
        bn = norm(module.bn, bypassed and hasattr(module.bn, "skip"))
        y = torch.nn.functional.batch_norm(y, bn.running_mean, bn.running_var, bn.weight, bn.bias, eps=bn.eps)
        return torch.nn.functional.silu(y)

    def block(module: nn.Module, x: torch.Tensor, bypassed: bool) -> torch.Tensor:
        for part in module if isinstance(module, nn.Sequential) else [module]:
            x = x + conv(part.cv2, conv(part.cv1, x, bypassed), bypassed)
        return x

    def narrow(module: nn.Module, y: list[torch.Tensor], essential: int, bypassed: bool) -> torch.Tensor:
        blocks = list(module.m._modules.values())
        for child in blocks[:essential] if bypassed else blocks:
            y.append(block(child, y[-1], bypassed))
        y = torch.cat(y, 1)
        kernel = module.cv2.conv
        weight = kernel.skip.weight if bypassed and hasattr(kernel, "skip") else kernel.weight[:, : y.shape[1]]
        return conv(module.cv2, y, bypassed, weight)

    first, second = depth
    x = conv(net.stem, x, False)
    x = narrow(net.halves, list(conv(net.halves.cv1, x, first).chunk(2, 1)), 2, first)
    x = conv(net.down, x, second)
    x = x + net.scaled.gamma.view(-1, 1, 1) * narrow(net.scaled, [conv(net.scaled.cv1, x, second)], 2, second)
    return net.head(x.mean((2, 3)))


def batch(n: int = 3, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(n, 3, 18, 22, generator=torch.Generator().manual_seed(2)).to(dtype)


own_or_not = pytest.mark.parametrize("own", [False, True], ids=["shared kernel", "own kernel"])
layouts = pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["NCHW", "NHWC"])


@own_or_not
@layouts
def test_every_depth(own: bool, layout: torch.memory_format) -> None:
    net, x = converted(own), batch().to(memory_format=layout)
    for depth in adn.depths(net):
        adn.set_depth(net, depth)
        torch.testing.assert_close(net(x), expected(net, x, depth))


@own_or_not
def test_full_depth_is_the_source(own: bool) -> None:
    x = batch()
    torch.testing.assert_close(adn.convert(source(), plan=plan(own))(x), source()(x), rtol=0, atol=0)


def test_kernel_is_not_copied() -> None:
    """A 1x1 convolution reads a part of the kernel where it is: nothing as large as that is made."""
    conv = nn.Conv2d(64, 48, 1, bias=False)
    for x in (torch.randn(1, 40, 1, 2), torch.randn(1, 40, 1, 2).to(memory_format=torch.channels_last)):
        with torch.no_grad(), torch.profiler.profile(profile_memory=True) as profile:
            y = conv_of_first_inputs(x, conv)
        assert max(event.self_cpu_memory_usage for event in profile.events()) < 40 * 48 * 4
        torch.testing.assert_close(y, torch.nn.functional.conv2d(x, conv.weight[:, :40]))


@pytest.mark.parametrize(("size", "stride", "bias"), [(1, 1, True), (3, 1, False), (3, 2, True), (1, 2, True)])
@layouts
def test_first_inputs_of_any_convolution(size: int, stride: int, bias: bool, layout: torch.memory_format) -> None:
    conv = nn.Conv2d(7, 5, size, stride, size // 2, bias=bias).double()
    x = torch.randn(2, 4, 5, 6, dtype=torch.float64).to(memory_format=layout).requires_grad_()
    y = conv_of_first_inputs(x, conv)
    want = torch.nn.functional.conv2d(x, conv.weight[:, :4], conv.bias, stride, size // 2)
    torch.testing.assert_close(y, want)
    assert y.is_contiguous(memory_format=layout)
    grads = [torch.autograd.grad(out.square().sum(), (x, conv.weight)) for out in (y, want)]
    torch.testing.assert_close(*grads)
    assert not grads[0][1][:, 4:].any()


@own_or_not
def test_extract(own: bool) -> None:
    net, x = converted(own), batch()
    for depth in adn.depths(net):
        static = adn.extract(net, depth)
        assert not any("adn" in type(module).__module__.split(".") for module in static.modules())
        torch.testing.assert_close(static(x), expected(net, x, depth))
    assert static.halves.cv2.conv.weight.shape[1] == static.halves.cv2.conv.in_channels == 4 * CHANNELS
    assert static.halves.cv2.conv.weight.untyped_storage().nbytes() == 16 * 4 * CHANNELS * 8
    assert len(static.halves.m) == len(static.scaled.m) == 2


@own_or_not
def test_macs_and_parameters_are_those_of_the_extracted_net(own: bool) -> None:
    net, x = converted(own, torch.float32), batch(1, torch.float32)
    counts = dict(zip(adn.depths(net), count_macs(net, x, adn.depths(net)), strict=True))
    for depth, macs in counts.items():
        static = adn.extract(net, depth)
        with FlopCounterMode(display=False) as counter:
            static(x)
        assert macs == counter.get_total_flops() // 2
        assert count_parameters(net, depth) == sum(p.numel() for p in static.parameters())
    assert len(set(counts.values())) == 4


@own_or_not
def test_deploy_form(own: bool) -> None:
    net = converted(own)
    fused, x = adn.fuse(net), batch()
    for depth in adn.depths(net):
        adn.set_depth(fused, depth)
        torch.testing.assert_close(fused(x), expected(net, x, depth))
    with torch.no_grad():
        net.halves.cv2.conv.weight.mul_(1.5)  # what it shares is noticed
        net.scaled.cv2.bn.skip.bias.add_(0.5)
    for depth in adn.depths(net):
        adn.set_depth(fused, depth)
        torch.testing.assert_close(fused(x), expected(net, x, depth))


@own_or_not
def test_depth_per_image(own: bool) -> None:
    net = converted(own)
    fused, x = adn.fuse(net), batch(4)
    every = adn.depths(net)
    want = torch.cat([expected(net, x[i : i + 1], depth) for i, depth in enumerate(every)])
    flags = torch.tensor([[int(entry) for entry in depth] for depth in every], dtype=torch.int32).T.contiguous()
    torch.testing.assert_close(fused.per_image(x, flags), want)
    torch.testing.assert_close(fused.per_image(x, every), want)
    torch.testing.assert_close(adn.Engine(fused).per_image(x, flags), want)


@pytest.mark.parametrize("own", few([True, False], lambda own: not own), ids=["own kernel", "shared kernel"])
def test_compiled(own: bool) -> None:
    net = converted(own, torch.float32)
    x = batch(dtype=torch.float32)
    plain = copy.deepcopy(net)
    adn.compile(net, backend="aot_eager")
    with torch.no_grad():
        for depth in adn.depths(net):
            adn.set_depth(net, depth)
            torch.testing.assert_close(net(x), expected(plain, x, depth), rtol=1e-4, atol=1e-5)
        counts = count(net, x)
    assert (counts.recompiles, counts.given_up, counts.uncompiled) == (0, (), {})


@own_or_not
def test_training_in_one_forward_is_two_forwards(own: bool) -> None:
    """Gradients and statistics, with blocks checkpointed too."""
    nets = [converted(own).train() for _ in range(3)]
    x = batch(4)
    for net, checkpointed in zip(nets[1:], (False, True), strict=True):
        if checkpointed:
            block = net.scaled.m._modules["0"]
            inner = block.forward
            block.forward = lambda x, inner=inner: checkpoint(inner, x, use_reentrant=False)
        with super_and_base(net, len(x)):
            y = net(x)
        (y[: len(x)].square().sum() + y[len(x) :].sin().sum()).backward()
    two = nets[0]
    y = [two(x) for depth in ("super", "base") if adn.set_depth(two, depth) is None]
    (y[0].square().sum() + y[1].sin().sum()).backward()
    for net in nets[1:]:
        for (name, a), b in zip(net.named_parameters(), two.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad, msg=lambda text, name=name: f"{name}: {text}")
        torch.testing.assert_close(dict(net.named_buffers()), dict(two.named_buffers()))


def test_distillation_compares_the_modules_outputs() -> None:
    losses = [adn.SelfDistillation(converted().train(), features="all", single_pass=single)(
        batch(4), torch.tensor([0, 1, 2, 3])) for single in (False, True)]
    torch.testing.assert_close(*losses)
    features = adn.SelfDistillation(converted().train(), features=[])(batch(4), torch.tensor([0, 1, 2, 3]))
    assert str(features) != str(losses[0])


@own_or_not
def test_hooks_are_called_once(own: bool) -> None:
    net = source()
    calls: list[tuple[int, ...]] = []
    net.scaled.cv2.conv.register_forward_hook(lambda module, args, y: calls.append(tuple(y.shape)))
    net = adn.convert(net, plan=plan(own))
    adn.set_depth(net, "base")
    net(batch())
    assert len(calls) == 1


@own_or_not
def test_saved_and_loaded(own: bool, tmp_path) -> None:
    net, x = converted(own, torch.float32), batch(dtype=torch.float32)
    adn.save(net, tmp_path / "net.safetensors")
    back = adn.load(tmp_path / "net.safetensors", model=Net()).eval()
    assert [type(stage) for stage in state_of(back).plan] == [NarrowPlan, NarrowPlan]
    for depth in adn.depths(net):
        adn.set_depth(net, depth), adn.set_depth(back, depth)
        torch.testing.assert_close(back(x), net(x))


@own_or_not
def test_plain_weights_fill_both_sets(own: bool) -> None:
    net = converted(own)
    net.load_state_dict(source().state_dict())
    fresh = adn.convert(source(), plan=plan(own))
    for key, value in fresh.state_dict().items():
        torch.testing.assert_close(net.state_dict()[key], value)


class TestPlanByHand:
    def test_list_of_concatenated_blocks_is_narrowed(self) -> None:
        net = adn.convert(source(), plan=["halves.m", "scaled.m"])
        first, second = state_of(net).plan
        assert (first.module, first.conv, first.inputs) == ("halves", "halves.cv2.conv", 4 * CHANNELS)
        assert (second.module, second.conv, second.inputs) == ("scaled", "scaled.cv2.conv", 3 * CHANNELS)
        assert "halves.cv1.bn" in first.norms
        assert "halves.m.2.cv1.bn" not in first.norms
        x = batch()
        for depth in adn.depths(net):
            adn.set_depth(net, depth)
            torch.testing.assert_close(net(x), expected(net, x, depth))

    def test_in_another_order_is_refused(self) -> None:
        class Reversed(Halves):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                y = list(self.cv1(x).chunk(2, 1))
                y.extend(m(y[-1]) for m in self.m)
                return self.cv2(torch.cat(y[::-1], 1))

        net = source()
        net.halves = Reversed(12, 16, 3).double()
        with pytest.raises(adn.ConversionError, match="in their order and last"):
            adn.convert(net, plan=["halves.m"])

    def test_read_by_more_than_one_is_refused(self) -> None:
        class Twice(Halves):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                y = list(self.cv1(x).chunk(2, 1))
                y.extend(m(y[-1]) for m in self.m)
                y = torch.cat(y, 1)
                return self.cv2(y) + y.mean()

        net = source()
        net.halves = Twice(12, 16, 3).double()
        with pytest.raises(adn.ConversionError, match="more than one convolution"):
            adn.convert(net, plan=["halves.m"])

    def test_what_cannot_be_traced_is_refused_where_it_may_concatenate(self) -> None:
        class Asks(Halves):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                y = list(self.cv1(x).chunk(2, 1))
                for m in self.m:
                    if y[-1].sum() != 0:
                        y.append(m(y[-1]))
                return self.cv2(torch.cat(y, 1))

        net = source()
        net.halves = Asks(12, 16, 3).double()
        before = {name: type(module) for name, module in net.named_modules()}
        with pytest.raises(adn.ConversionError, match="may concatenate"):
            adn.convert(net, plan=["halves.m"])
        assert before == {name: type(module) for name, module in net.named_modules()}

    def test_last_output_alone_is_concatenated(self) -> None:
        """As C3: what is left out there is the identity."""
        class Last(Halves):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                a, b = self.cv1(x).chunk(2, 1)
                for m in self.m:
                    a = m(a)
                return self.cv2(torch.cat([a, b], 1))

        net = source()
        net.halves = Last(12, 16, 0).double()
        net.halves.m = nn.ModuleList(Block(CHANNELS) for _ in range(3)).double()
        adn.convert(net, plan=["halves.m"])
        assert [type(stage).__name__ for stage in state_of(net).plan] == ["StagePlan"]

    @pytest.mark.parametrize(("change", "message"), [
        ({"inputs": 0}, "inputs=0"), ({"inputs": 40}, "inputs=40"), ({"conv": "halves.cv1.bn"}, "no convolution"),
        ({"conv": "stem.conv"}, "no convolution"), ({"module": "scaled"}, "not those of a list"),
        ({"blocks": ["halves.m.0", "halves.m.2"]}, "name all blocks"), ({"module": "nowhere"}, "nowhere"),
    ])
    def test_wrong_plans(self, change: dict, message: str) -> None:
        net, first = source(), plan()[0]
        for key, value in change.items():
            setattr(first, key, value)
        with pytest.raises(adn.ConversionError, match=message):
            adn.convert(net, plan=[first])
        assert not any("_adn_choice" in vars(module) for module in net.modules())

    def test_width_that_does_not_fit_is_an_error_when_it_runs(self) -> None:
        first = plan()[0]
        first.inputs -= 1
        net = adn.convert(source(), plan=[first])
        adn.set_depth(net, "base")
        with pytest.raises(RuntimeError, match="does not fit"):
            net(batch())
