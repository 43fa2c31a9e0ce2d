"""Residual blocks as units against those of torchvision and timm; how many launches they are; their bypass."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import timm.models.resnet
import torch
import torch.nn.functional as F
import torchvision
from aot import fake_cuda, record
from harness import DEVICE, DTYPES, INTERPRETED, Guards, assert_accurate, assert_caught, layouts, plant
from op_checks import check_compile, check_export, check_fake_gpu
from torch import Tensor, nn
from torch.testing import assert_close

import adn_kernels.blocks as module
import adn_kernels.conv
from adn_kernels.activation import act_reference
from adn_kernels.blocks import ConvParams, basic, basic_, bottleneck, bottleneck_, inverted_residual
from adn_kernels.conv import fold
from adn_kernels.epilogue import fold_norm

# block -> kernel, input channels, channels, groups of its convolutions; a refinement block, of 12 channels
SHAPES = {
    "bottleneck": ((1, 12, 8, 1), (3, 8, 8, 1), (1, 8, 12, 1)),
    "grouped bottleneck": ((1, 12, 8, 1), (3, 8, 8, 2), (1, 8, 12, 1)),
    "basic": ((3, 12, 12, 1), (3, 12, 12, 1)),
    "inverted_residual": ((1, 12, 24, 1), (5, 24, 24, 24), (1, 24, 12, 1)),
    "inverted_residual without expand": ((3, 12, 12, 12), (1, 12, 12, 1)),
}


@pytest.fixture
def bodies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ops called as the functions they are made of, so that guards see what they allocate; by kernels everywhere."""
    for name in ("_conv", "_conv_"):
        monkeypatch.setattr(adn_kernels.conv, name, getattr(adn_kernels.conv, name)._init_fn)
    monkeypatch.setattr(adn_kernels.conv, "tuned", lambda kernel, device, default, **key: default)
    if INTERPRETED:
        monkeypatch.setattr(adn_kernels.conv, "on_gpu", lambda *_: True)


def make_convs(block: str, dtype: torch.dtype = torch.float32, banks: bool = False, seed: int = 0) -> list[ConvParams]:
    torch.manual_seed(seed)
    convs = []
    for k, inputs, channels, groups in SHAPES[block]:
        vectors = (2, channels) if banks else (channels,)
        weight = torch.randn(channels, inputs // groups, k, k) * (inputs // groups * k * k) ** -0.5
        convs.append(ConvParams(weight.to(dtype), torch.rand(vectors) + 0.5, torch.randn(vectors)))
    return convs


def call(of: ModuleType, block: str, x: Tensor, convs: list[ConvParams], suffix: str = "", **kwargs: object) -> Tensor:
    kind, _, variant = block.rpartition("grouped ")[2].partition(" ")
    if kind == "bottleneck":
        kwargs["groups"] = SHAPES[block][1][-1]
    function = getattr(of, kind + suffix)
    return function(x, *([None] if variant else []), *convs, **kwargs)


def plain(
    block: str, x: Tensor, convs: list[ConvParams], activation: str, bank: Tensor | None, dtype: torch.dtype,
    device: str = "cpu",
) -> Tensor:
    """The block in plain PyTorch, in one dtype."""
    x = y = x.to(device, dtype)
    for i, (params, (k, _, _, groups)) in enumerate(zip(convs, SHAPES[block])):
        weight, scale, shift = (p.to(device, dtype) for p in params)
        if bank is not None:
            scale, shift = (v[(bank != 0).long()] for v in (scale, shift))
        z = F.conv2d(y, weight, None, 1, k // 2, 1, groups)
        z = z * scale.reshape(-1, z.shape[1], 1, 1) + shift.reshape(-1, z.shape[1], 1, 1)
        last = i == len(convs) - 1
        z = z + x if last else z
        y = act_reference(z, "identity" if last and block.startswith("inverted") else activation)
    return y


def flags(values: list[int] | None) -> Tensor | None:
    """One value is a scalar."""
    return None if values is None else torch.tensor(values[0] if len(values) == 1 else values, dtype=torch.int32)


def place(guards: Guards, convs: list[ConvParams]) -> list[ConvParams]:
    return [ConvParams(*map(guards.place, params)) for params in convs]


def image(n: int, layout: int, dtype: torch.dtype) -> Tensor:
    return layouts(torch.randn(n, 12, 4, 3).to(dtype))[layout]


def check_block(block: str, layout: int, dtype: torch.dtype, bank: list[int] | None, of: ModuleType = module) -> None:
    convs = make_convs(block, dtype, bank is not None)
    x = image(3, layout, dtype)
    with Guards() as guards:
        y = call(of, block, guards.place(x), place(guards, convs), activation="silu", bank=guards.place(flags(bank)))
    guards.check()
    eager = plain(block, x, convs, "silu", flags(bank), dtype, DEVICE)
    exact = plain(block, x, convs, "silu", flags(bank), torch.float64)
    assert_accurate(block, y, eager, exact)


@pytest.mark.launcher
@pytest.mark.usefixtures("bodies")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bank", [None, [1], [0, 1, 0]], ids=str)
@pytest.mark.parametrize("layout", [0, 1])
@pytest.mark.parametrize("block", SHAPES)
def test_block(block: str, layout: int, bank: list[int] | None, dtype: torch.dtype) -> None:
    check_block(block, layout, dtype, bank)


def check_update(
    block: str, layout: int, dtype: torch.dtype, active: list[int] | None, bank: list[int] | None,
    of: ModuleType = module,
) -> None:
    """Intermediate tensors are full of NaN where nothing is written, and so are inactive samples of the stream."""
    convs = make_convs(block, dtype, bank is not None)
    x = image(3, layout, dtype)
    on = (torch.tensor([1] if active is None else active) != 0).expand(3)
    eager = plain(block, x, convs, "relu", flags(bank), dtype, DEVICE).cpu()
    exact = plain(block, x, convs, "relu", flags(bank), torch.float64)
    x[~on, ::2] = float("nan")
    with Guards() as guards:
        stream = guards.place(x)
        y = call(of, block, stream, place(guards, convs), "_", activation="relu", bank=guards.place(flags(bank)),
                 active=guards.place(flags(active)))
    guards.check()
    assert y is stream
    y = y.cpu()
    as_int = torch.int32 if dtype == torch.float32 else torch.int16
    assert y[~on].view(as_int).equal(x[~on].view(as_int)), "an inactive sample was written"
    assert_accurate(block, y[on], eager[on], exact[on])


@pytest.mark.launcher
@pytest.mark.usefixtures("bodies")
@pytest.mark.parametrize("layout", [0, 1])
@pytest.mark.parametrize("active", [None, [0], [1], [0, 0, 0], [1, 0, 1], [0, 0, 3]], ids=str)
@pytest.mark.parametrize("block", SHAPES)
def test_update(block: str, active: list[int] | None, layout: int) -> None:
    check_update(block, layout, torch.float16, active, [0, 1, 1])


@pytest.mark.launcher
@pytest.mark.usefixtures("bodies")
@pytest.mark.parametrize(("block", "change"), [
    ("bottleneck", ("active=active)\n    return y", "active=None)\n    return y")),
    ("basic", ("accumulate=last", "accumulate=False")),
    ("basic", ("bank=_bank_of(params, bank), active", "bank=bank * 0, active")),
    ("inverted_residual", ('(project, "identity", 1)', "(project, activation, 1)")),
    ("bottleneck", ("out = x if last else", "out = x if i else")),
], ids=["active", "residual", "bank", "activation", "stream"])
def test_mistakes_in_update_are_noticed(block: str, change: tuple[str, str], tmp_path: Path) -> None:
    def check(of: ModuleType) -> None:
        try:
            check_update(block, 1, torch.float32, [1, 0, 1], [0, 1, 1], of)
        except ValueError as error:  # refused by a check of the convolutions
            raise AssertionError from error

    check(module)
    assert_caught(check, plant(module, tmp_path, change))


@pytest.mark.launcher
@pytest.mark.usefixtures("bodies")
@pytest.mark.parametrize(("block", "change"), [
    ("bottleneck", ("residual=shortcut", "residual=None")),
    ("inverted_residual", ("residual=x if residual else None", "residual=None")),
    ("basic", ("bank=_bank_of(params, bank))", "bank=bank * 0)")),
], ids=["shortcut", "x", "bank"])
def test_mistakes_are_noticed(block: str, change: tuple[str, str], tmp_path: Path) -> None:
    check_block(block, 1, torch.float32, [0, 1, 0])
    assert_caught(lambda of: check_block(block, 1, torch.float32, [0, 1, 0], of), plant(module, tmp_path, change))


# Against libraries


def randomise(block: nn.Module, seed: int) -> nn.Module:
    """Random affine parameters and statistics of its norms."""
    generator = torch.Generator().manual_seed(seed)
    for norm in block.modules():
        if isinstance(norm, nn.BatchNorm2d):
            for tensor in (norm.weight.data, norm.running_var):
                tensor.uniform_(0.5, 1.5, generator=generator)
            for tensor in (norm.bias.data, norm.running_mean):
                tensor.normal_(generator=generator)
    return block.eval()


def params_of(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> ConvParams:
    return ConvParams(conv.weight.detach(),
                      *fold_norm(norm.weight, norm.bias, norm.running_mean, norm.running_var, norm.eps))


def params_of_resnet(block: nn.Module, convs: int) -> tuple[list[ConvParams], ConvParams | None]:
    found = [params_of(getattr(block, f"conv{i}"), getattr(block, f"bn{i}")) for i in range(1, convs + 1)]
    return found, None if block.downsample is None else params_of(*block.downsample)


def both(first: list[ConvParams], second: list[ConvParams]) -> list[ConvParams]:
    """One set of weights, both banks."""
    return [ConvParams(a.weight, torch.stack([a.scale, b.scale]), torch.stack([a.shift, b.shift]))
            for a, b in zip(first, second)]


def folded(convs: list[ConvParams]) -> list[ConvParams]:
    return [ConvParams(*(fold(*params)[:1]), None, fold(*params)[1]) for params in convs]


def downsampling(inputs: int, channels: int, stride: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(inputs, channels, 1, stride, bias=False), nn.BatchNorm2d(channels))


def check_library(
    function: Callable[..., Tensor], library: Callable[[int], nn.Module], params: Callable[[nn.Module], tuple],
    x: Tensor, **kwargs: object,
) -> None:
    """One bank, folded and not; then both banks picked per sample: the second has other norms and the same weights."""
    first, second = library(1), library(2)
    weights = {name: p for name, p in first.state_dict().items() if "conv" in name and p.ndim == 4}
    second.load_state_dict({**second.state_dict(), **{n: p for n, p in first.state_dict().items() if p.ndim == 4}})
    assert weights or isinstance(first, torchvision.models.mobilenetv2.InvertedResidual)
    (convs, downsample), (others, _) = params(first), params(second)
    extra = {} if downsample is None else {"downsample": downsample}
    with torch.no_grad():
        want = first(x)
        assert_close(function(x, *convs, **extra, **kwargs), want, rtol=1e-4, atol=1e-4)
        assert_close(function(x, *folded(convs), **extra, **kwargs), want, rtol=1e-4, atol=1e-4)
        if downsample is not None:  # its norm is not switched
            second.downsample.load_state_dict(first.downsample.state_dict())
        bank = torch.arange(x.shape[0], dtype=torch.int32) % 2
        want = torch.where(bank.reshape(-1, 1, 1, 1) == 0, want, second(x))
        assert_close(function(x, *both(convs, others), **extra, bank=bank, **kwargs), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("library", [torchvision.models.resnet, timm.models.resnet], ids=["torchvision", "timm"])
def test_bottleneck(library: ModuleType, groups: int, stride: int) -> None:
    def build(seed: int) -> nn.Module:
        torch.manual_seed(0)
        width = {"base_width": 32} if groups > 1 else {}
        name = "groups" if library is torchvision.models.resnet else "cardinality"
        downsample = downsampling(24, 32, stride) if stride > 1 else None
        block = library.Bottleneck(24 if stride > 1 else 32, 8, stride, downsample, **{name: groups}, **width)
        return randomise(block, seed)

    x = torch.randn(3, 24 if stride > 1 else 32, 9, 8).to(memory_format=torch.channels_last)
    check_library(bottleneck, build, lambda block: params_of_resnet(block, 3), x, stride=stride, groups=groups)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("library", [torchvision.models.resnet, timm.models.resnet], ids=["torchvision", "timm"])
def test_basic(library: ModuleType, stride: int) -> None:
    def build(seed: int) -> nn.Module:
        torch.manual_seed(0)
        downsample = downsampling(24, 32, stride) if stride > 1 else None
        return randomise(library.BasicBlock(24 if stride > 1 else 32, 32, stride, downsample), seed)

    x = torch.randn(3, 24 if stride > 1 else 32, 9, 8)
    check_library(basic, build, lambda block: params_of_resnet(block, 2), x, stride=stride)


@pytest.mark.parametrize(("inputs", "channels", "stride", "expansion"), [(8, 8, 1, 6), (8, 12, 2, 6), (8, 12, 1, 1)])
def test_inverted_residual(inputs: int, channels: int, stride: int, expansion: int) -> None:
    def build(seed: int) -> nn.Module:
        torch.manual_seed(0)
        return randomise(torchvision.models.mobilenetv2.InvertedResidual(inputs, channels, stride, expansion), seed)

    def params(block: nn.Module) -> tuple[list[ConvParams], None]:
        *activated, conv, norm = block.conv
        return [params_of(m[0], m[1]) for m in activated] + [params_of(conv, norm)], None

    def function(x: Tensor, *convs: ConvParams, **kwargs: object) -> Tensor:
        return inverted_residual(x, *([None] if expansion == 1 else []), *convs, stride=stride, **kwargs)

    check_library(function, build, params, torch.randn(3, inputs, 9, 8))


@pytest.mark.parametrize("block", SHAPES)
def test_update_is_the_block(block: str) -> None:
    """The forms in place compute what the others do, and the identity where inactive."""
    convs, x = make_convs(block, banks=True), image(3, 1, torch.float32)
    bank, active = flags([0, 1, 1]), flags([1, 0, 1])
    want = call(module, block, x, convs, bank=bank)
    want[1] = x[1]
    stream = x.clone()
    assert call(module, block, stream, convs, "_", bank=bank, active=active) is stream
    assert_close(stream, want)
    assert stream[1].equal(x[1])


@pytest.mark.parametrize("block", SHAPES)
def test_gradients(block: str) -> None:
    """Against autograd of plain PyTorch in float64."""
    def leaves(convs: list[ConvParams]) -> list[ConvParams]:
        return [ConvParams(*(p.double().clone().requires_grad_() for p in params)) for params in convs]

    actual, wanted = leaves(make_convs(block)), leaves(make_convs(block))
    xs = [image(2, 1, torch.float64).requires_grad_()]
    xs.append(xs[0].detach().clone().requires_grad_())
    y = call(module, block, xs[0], actual, activation="silu")
    want = plain(block, xs[1], wanted, "silu", None, torch.float64)
    dy = torch.randn_like(want)
    y.backward(dy)
    want.backward(dy)
    assert_close(xs[0].grad, xs[1].grad)
    for a, b in zip(actual, wanted):
        assert_close([p.grad for p in a], [p.grad for p in b])


# Launches


def on_fake_gpu(convs: list[ConvParams]) -> list[ConvParams]:
    return [ConvParams(*(None if p is None else torch.empty(p.shape, dtype=p.dtype, device="cuda") for p in params))
            for params in convs]


@pytest.mark.usefixtures("bodies")
@pytest.mark.parametrize(("block", "downsample", "launches"), [
    ("bottleneck", False, 3), ("bottleneck", True, 4), ("basic", False, 2), ("basic", True, 3),
    ("inverted_residual", False, 3), ("inverted_residual without expand", False, 2),
])
def test_launches(block: str, downsample: bool, launches: int) -> None:
    """A launch for each convolution and no other operation on the device but the allocation of its output."""
    with fake_cuda():
        x = torch.empty(8, 12, 4, 4, device="cuda", memory_format=torch.channels_last)
        convs = on_fake_gpu(make_convs(block))
        extra = {"downsample": on_fake_gpu([ConvParams(torch.empty(12, 12, 1, 1), torch.ones(12), torch.ones(12))])[0]}
        with Operations() as operations:
            forward = record(lambda: call(module, block, x, convs, **(extra if downsample else {})))
            active = torch.empty(8, dtype=torch.int32, device="cuda")
            update = record(lambda: call(module, block, x, convs, "_", active=active))
    assert len(forward) == launches
    assert len(update) == len(convs)
    assert operations.names <= {"aten::empty", "aten::slice", "aten::promote_types"}


class Operations(torch.utils._python_dispatch.TorchDispatchMode):
    """Notes the names of operations."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func._schema.name)
        return func(*args, **(kwargs or {}))


# Compilers


def functional(x: Tensor, bank: Tensor, *flat: Tensor) -> Tensor:
    return call(module, "bottleneck", x, [ConvParams(*flat[i:i + 3]) for i in (0, 3, 6)], bank=bank)


def in_place(x: Tensor, bank: Tensor, *flat: Tensor) -> Tensor:
    with torch.no_grad():
        active = torch.ones((), dtype=torch.int32, device=x.device)
        return call(module, "bottleneck", x + 1, [ConvParams(*flat[i:i + 3]) for i in (0, 3, 6)], "_", bank=bank,
                    active=active)


@pytest.mark.parametrize("function", [functional, in_place])
def test_compile_and_export(function: Callable) -> None:
    def make_args(n: int) -> list[Tensor]:
        torch.manual_seed(0)
        convs = make_convs("bottleneck", banks=True)
        bank = torch.arange(n, dtype=torch.int32) % 2
        return [image(n, 1, torch.float32), bank, *(p for params in convs for p in params)]

    check_compile(function, make_args)
    check_export(function, make_args, dynamic=(0, 1))
    check_fake_gpu(function, make_args(5), dynamic=(0, 1))


# Refusals


def test_update_refuses() -> None:
    convs, x = make_convs("bottleneck"), image(2, 1, torch.float32)
    with pytest.raises(ValueError, match="makes 20 channels of 12"):
        bottleneck_(x, *convs[:2], ConvParams(torch.randn(20, 8, 1, 1)))
    convs[1].weight.requires_grad_()
    with pytest.raises(RuntimeError, match=r"bottleneck_ writes in place .* use bottleneck"):
        bottleneck_(x, *convs)
    with pytest.raises(ValueError, match="as no `bank` is given"):
        basic_(x, *make_convs("basic", banks=True))


@pytest.mark.parametrize("suffix", ["", "_"])
@pytest.mark.parametrize("block", SHAPES)
def test_refuses(block: str, suffix: str) -> None:
    """A wrong bank also where no norm has two rows."""
    convs, x = make_convs(block), image(2, 1, torch.float32)
    for bank, message in (
        (torch.zeros(2, dtype=torch.int64), "bank is torch.int64; pass int32"),
        (flags([0, 1, 0]), r"bank has shape \(3,\); pass one value, or one per sample \(2\)"),
        (flags([0, 1]), "every scale and shift is of one bank"),
    ):
        with pytest.raises(ValueError, match=message):
            call(module, block, x, convs, suffix, bank=bank)
    with pytest.raises(ValueError, match=r"x has shape \(12, 4, 3\); pass \(N, K, H, W\)"):
        call(module, block, x[0], convs, suffix)
