"""1x1 convolution and linear layer against plain PyTorch."""

from __future__ import annotations

import dataclasses
import itertools
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from conv_cases import ACT, CONFIGS, MIXTURES, Conv, bits, configured, conv_case
from harness import (
    DEVICE,
    DTYPES,
    INTERPRETED,
    Guards,
    assert_accurate,
    assert_caught,
    bytes_of,
    last_programs,
    layouts,
    plant,
    traffic,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from op_checks import check_compile, check_export, check_fake_gpu
from torch.library import opcheck

from adn_kernels import conv1x1 as module
from adn_kernels.activation import ACTIVATIONS
from adn_kernels.conv1x1 import conv1x1, conv1x1_, linear, linear_
from adn_kernels.epilogue import fold_norm

launcher = pytest.mark.launcher


def launch(case: Conv, module: ModuleType = module, config: dict | None = None) -> torch.Tensor:
    """What the launcher computes of `case`, between guards."""
    with Guards() as guards, configured(module, config):
        case = case.placed(guards)
        y = module.launch_conv1x1(case.x, case.weight, *case.epilogue, case.stride)
    guards.check()
    return y


def check(case: Conv, module: ModuleType = module, config: dict | None = None) -> None:
    on_device = dataclasses.replace(case) if DEVICE == "cpu" else case.placed(Guards())
    assert_accurate("conv1x1", launch(case, module, config), on_device.torch(), case.double().torch())


@launcher
@pytest.mark.parametrize(("k", "c"), [(4096, 24), (24, 4096)])
def test_4096_channels(k: int, c: int) -> None:
    check(conv_case(1, k, 2, 1, c, 1, dtype=torch.float16, activation="relu", residual=True))


@launcher
def test_tf32() -> None:
    """Ten bits of mantissa, if torch is set so (in the interpreter all of them)."""
    case = conv_case(2, 300, 4, 4, 40, 1)
    torch.backends.cudnn.allow_tf32 = True  # what the fixture of all tests undoes
    torch.testing.assert_close(launch(case).cpu().double(), case.double().torch(), rtol=2**-8, atol=2**-8)


# N, K, H, W, C: ones, primes, just below, at and above tiles, an SE block's 1x1 map
SHAPES = [
    (1, 1, 1, 1, 1), (2, 3, 5, 7, 2), (3, 17, 4, 4, 31), (2, 64, 7, 7, 33), (5, 15, 1, 1, 16), (1, 65, 3, 11, 130),
    (4, 24, 6, 5, 40), (7, 128, 2, 2, 8),
]


@launcher
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("stride", [1, 2])
def test_shapes_and_layouts(shape: tuple[int, ...], stride: int, dtype: torch.dtype) -> None:
    n, k, h, w, c = shape
    case = conv_case(n, k, h, w, c, 1, dtype=dtype, stride=stride, activation="silu", residual=True)
    for i, x in enumerate(layouts(case.x)):
        check(dataclasses.replace(case, x=x, residual=layouts(case.residual)[(i + 1) % 4]))


@launcher
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c['BM']}x{c['BN']}x{c['BK']}")
def test_tiles(config: dict, dtype: torch.dtype) -> None:
    for shape in ((2, 40, 5, 5, 40), (3, 35, 3, 5, 34), (70, 16, 1, 1, 24)):
        n, k, h, w, c = shape
        case = conv_case(n, k, h, w, c, 1, dtype=dtype, activation="relu", residual=True,
                         bank=[i % 3 for i in range(n)])
        for x in layouts(case.x)[:2]:
            check(dataclasses.replace(case, x=x), config=config)


@launcher
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("residual", [False, True, torch.float32])
def test_activations(activation: str, residual: bool | torch.dtype, dtype: torch.dtype) -> None:
    check(conv_case(2, 19, 5, 3, 37, 1, dtype=dtype, activation=activation, residual=residual))


@launcher
@pytest.mark.parametrize("bank", [None, 0, 1, [1], [0, 1, 0, 0, 5], [1, 1, 1, 1, 1]], ids=str)
@pytest.mark.parametrize("part", ["scale", "shift", "both"])
def test_banks(bank: list[int] | int | None, part: str) -> None:
    case = conv_case(5, 8, 3, 3, 24, 1, bank=bank, activation="gelu")
    if part != "both":
        case = dataclasses.replace(case, **{"shift" if part == "scale" else "scale": None})
    for config in (CONFIGS[0], CONFIGS[-1]):
        check(case, config=config)


@launcher
def test_without_epilogue() -> None:
    check(conv_case(2, 19, 5, 3, 37, 1, affine=False))


@launcher
@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    n=st.integers(1, 6), k=st.integers(1, 40), h=st.integers(1, 9), w=st.integers(1, 9), c=st.integers(1, 70),
    stride=st.integers(1, 3), activation=st.sampled_from(ACTIVATIONS), residual=st.booleans(), banks=st.booleans(),
    x_layout=st.integers(0, 3), residual_layout=st.integers(0, 3), config=st.sampled_from([None, *CONFIGS]),
)
def test_any(n, k, h, w, c, stride, activation, residual, banks, x_layout, residual_layout, config) -> None:
    case = conv_case(n, k, h, w, c, 1, stride=stride, activation=activation, residual=residual,
                     bank=[i % 2 for i in range(n)] if banks else None, seed=n * k + c)
    case = dataclasses.replace(case, x=layouts(case.x)[x_layout])
    if residual:
        case = dataclasses.replace(case, residual=layouts(case.residual)[residual_layout])
    check(case, config=config)


@launcher
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_not_finite_stays_in_its_pixel(value: float) -> None:
    case = conv_case(2, 17, 3, 3, 20, 1, activation="relu")
    case.x[1, 4, 2, 0] = value
    check(case)
    y = launch(case)
    assert bool(y[0].isfinite().all())


def check_in_place(
    case: Conv, active: torch.Tensor | None, accumulate: bool, module: ModuleType = module, config: dict | None = None,
    out_dtype: torch.dtype | None = None, layout: int = 1,
) -> None:
    """Active samples are computed; all others keep their bits, NaN in them and in x included."""
    n = len(case.x)
    flags = torch.ones(n, dtype=torch.bool) if active is None else (active != 0).expand(n)
    shape = case.torch().shape
    before = torch.randn(shape, generator=torch.Generator().manual_seed(5)).to(out_dtype or case.x.dtype)
    before = layouts(before)[layout]
    x = case.x.clone(memory_format=torch.preserve_format)
    x[~flags] = float("nan")
    before[~flags, ..., 0] = float("nan")
    case = dataclasses.replace(case, x=x, residual=before if accumulate else None)
    with Guards() as guards, configured(module, config):
        given, out = case.placed(guards), guards.place(before)
        module.launch_conv1x1_(out, given.x, given.weight, given.scale, given.shift, accumulate, given.bank,
                               guards.place(active), given.activation, given.stride)
    guards.check()
    assert torch.equal(bits(out.cpu()[~flags]), bits(before[~flags]))
    eager = given.torch().to(before.dtype).cpu()[flags]
    assert_accurate("conv1x1_", out.cpu()[flags], eager, case.double().torch()[flags])


@launcher
@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("active", MIXTURES, ids=str)
@pytest.mark.parametrize("side", [1, 7])
def test_bypass(side: int, active: list[int] | None, accumulate: bool) -> None:
    """Tiles of 128 pixels span many samples, those of 32 end inside one."""
    flags = None if active is None else torch.tensor(active, dtype=torch.int32)
    for config, bank in ((CONFIGS[0], [0, 1, 1, 0, 0, 1]), (CONFIGS[3], None)):
        case = conv_case(6, 24, side, side, 40, 1, bank=bank, activation="silu")
        check_in_place(case, flags, accumulate, config=config)


@launcher
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", [0, 1, 2, 3])
def test_bypass_layouts(layout: int, dtype: torch.dtype) -> None:
    active = torch.tensor([1, 0, 1], dtype=torch.int32)
    case = conv_case(3, 8, 4, 6, 16, 1, dtype=dtype, activation="relu", stride=2)
    check_in_place(case, active, True, layout=layout)
    check_in_place(case, active, False, out_dtype=torch.float32, layout=layout)
    check_in_place(case, torch.tensor(0, dtype=torch.int32), True, layout=layout)


@launcher
@pytest.mark.skipif(not INTERPRETED, reason="counts loads in the interpreter")
def test_bypassed_programs_read_nothing() -> None:
    case = conv_case(4, 32, 4, 4, 32, 1)
    for active in (torch.tensor([0], dtype=torch.int32), torch.zeros(4, dtype=torch.int32)):
        out = torch.randn(4, 32, 4, 4)
        with traffic() as counts:
            module.launch_conv1x1_(out, case.x, case.weight, case.scale, case.shift, True, None, active, "relu", 1)
        assert not bytes_of(counts["read"], out, case.x, case.weight, case.scale, case.shift)
        assert not bytes_of(counts["written"])


def check_linear(
    x: torch.Tensor, weight: torch.Tensor, scale, shift, residual, bank, activation: str, module: ModuleType = module
) -> None:
    def eager(x, weight, scale, shift, residual):
        z = F.linear(x, weight)
        if bank is not None:
            scale, shift = (v[(bank != 0).long()][:, None] for v in (scale, shift))
        z = ((z * scale).to(z.dtype) + shift).to(z.dtype)
        return ACT[activation](z if residual is None else z + residual)

    with Guards() as guards:
        given = [t.to(DEVICE) if t is not None and 0 in t.stride() else guards.place(t)
                 for t in (x, weight, scale, shift, residual, bank)]
        y = module.launch_linear(*given, activation)
    guards.check()
    bank = given[-1]
    same = eager(*given[:-1])
    bank = None if bank is None else bank.cpu()
    exact = eager(*(None if t is None else t.double() for t in (x, weight, scale, shift, residual)))
    assert_accurate("linear", y, same, exact)
    assert y.stride() == same.stride()


@launcher
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 7, 19, 23), (3, 1, 40, 16), (5, 4, 64, 72)], ids=str)
@pytest.mark.parametrize("banks", [False, True])
def test_linear(shape: tuple[int, ...], banks: bool, dtype: torch.dtype) -> None:
    n, length, k, c = shape
    torch.manual_seed(0)
    x, weight, residual = torch.randn(n, length, k), torch.randn(c, k) / k**0.5, torch.randn(n, length, c)
    scale, shift = (torch.randn(2, c) if banks else torch.randn(c) for _ in range(2))
    bank = torch.arange(n, dtype=torch.int32) % 2 if banks else None
    x, weight, residual = x.to(dtype), weight.to(dtype), residual.to(dtype)
    check_linear(x, weight, scale, shift, residual, bank, "gelu")
    # Transposed, sliced, expanded
    check_linear(x.mT.contiguous().mT, weight.T.contiguous().T, scale, shift, residual, bank, "relu")
    check_linear(torch.cat([x, x], 1)[:, :length], weight, scale, shift, None, bank, "relu")
    check_linear(x[:1].expand(n, length, k), weight, scale, shift, None, bank, "identity")


@launcher
@pytest.mark.parametrize("accumulate", [False, True])
def test_linear_bypass(accumulate: bool) -> None:
    torch.manual_seed(0)
    x, weight, before = torch.randn(5, 3, 16), torch.randn(24, 16), torch.randn(5, 3, 24)
    active = torch.tensor([0, 1, 0, 0, 1], dtype=torch.int32)
    on = active != 0
    x[~on], before[~on, 0] = float("nan"), float("nan")
    with Guards() as guards:
        out, x_, weight_, active_ = (guards.place(t) for t in (before, x, weight, active))
        module.launch_linear_(out, x_, weight_, None, None, accumulate, None, active_, "silu")
    guards.check()
    assert torch.equal(bits(out.cpu()[~on]), bits(before[~on]))
    z = F.linear(x, weight) + (before if accumulate else 0)
    exact = F.linear(x.double(), weight.double()) + (before.double() if accumulate else 0)
    assert_accurate("linear_", out.cpu()[on], F.silu(z)[on], F.silu(exact)[on])


@launcher
def test_deterministic() -> None:
    case = conv_case(4, 70, 7, 7, 90, 1, activation="silu", bank=[0, 1, 1, 0], residual=True)
    assert torch.equal(bits(launch(case)), bits(launch(case)))


@launcher
@pytest.mark.skipif(not INTERPRETED, reason="counts loads in the interpreter")
@pytest.mark.parametrize("stride", [1, 2])
def test_traffic(stride: int) -> None:
    """With all channels in one column of tiles x, residual and y are moved once; the weight once per row of tiles."""
    case = conv_case(4, 64, 32, 32, 64, 1, dtype=torch.float16, residual=True, stride=stride)
    x = case.x.contiguous(memory_format=torch.channels_last)
    residual = case.residual.contiguous(memory_format=torch.channels_last)
    with traffic() as counts, configured(module, CONFIGS[0]):
        y = module.launch_conv1x1(x, case.weight, case.scale, case.shift, residual, None, "relu", stride)
    rows = y[:, 0].numel() // CONFIGS[0]["BM"]
    assert bytes_of(counts["read"], x) == x.numel() * 2 / stride**2
    assert bytes_of(counts["read"], residual) == residual.numel() * 2
    assert bytes_of(counts["read"], case.weight) == rows * case.weight.numel() * 2
    assert bytes_of(counts["written"]) == y.numel() * 2
    # From HBM, the weight and the vectors read once (they stay in L2):
    minimum = 2 * (x.numel() / stride**2 + residual.numel() + y.numel() + case.weight.numel()) + 2 * 64 * 4
    rest = bytes_of(counts["read"], case.weight, case.scale, case.shift) * (1 - 1 / rows)
    assert bytes_of(counts["read"]) + bytes_of(counts["written"]) - rest <= 1.05 * minimum


@launcher
@pytest.mark.skipif(not INTERPRETED, reason="runs the last programs only")
@pytest.mark.parametrize("channels_last", [False, True])
def test_beyond_2_31_elements(channels_last: bool) -> None:
    """In a sample. Memory is committed where the last tile touches it. x is a crop, whose samples have a stride."""
    n, k, side, c = 2, 64, 6000, 64
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.empty(n, k, side, side, dtype=torch.float16, memory_format=layout)[..., 1:]
    assert x[0].numel() > 2**31
    case = conv_case(1, k, 1, 1, c, 1, dtype=torch.float16, activation="relu")
    last = torch.randn(k, 256).half()
    x[-1, :, -1, -256:] = last
    with last_programs():
        y = module.launch_conv1x1(x, case.weight, case.scale, case.shift, None, None, "relu", 1)
    z = F.conv2d(last.double()[None, :, None], case.weight.double())
    exact = F.relu(z * case.scale.double()[:, None, None] + case.shift.double()[:, None, None])
    # The last tile: 32 of the channels at least.
    got, exact = y[-1:, -32:, -1:, -16:], exact[:, -32:, :, -16:]
    assert_accurate("conv1x1", got, exact.half(), exact)


@launcher
@pytest.mark.skipif(DEVICE == "cuda", reason="mistakes may read anywhere")
@pytest.mark.parametrize(("right", "wrong"), [
    ("k_mask = k0 + k < K", "k_mask = k0 + k < K + 1"),
    ("mask=row_mask[:, None] & k_mask[None, :], other=0.0", "mask=row_mask[:, None], other=0.0"),
    ("n = m // OHW", "n = m // (OHW + 1)"),
    ("row_mask = m < M", "row_mask = m < M - 1"),
    ("channel_mask = channel < C", "channel_mask = channel <= C"),
    ("out_at, n, channel", "out_at, n * 0, channel"),
    ("x_n, x_h, x_w, UNIT)[:, None]", "x_n, x_w, x_h, UNIT)[:, None]"),
    ("residual_n, residual_h, residual_w, UNIT)", "out_n, out_h, out_w, UNIT)"),
    ("stride * sh, stride * sw", "stride * sh, sw"),
    ("acc = tl.dot(a, b, acc,", "acc = tl.dot(a, b, acc * 0,"),
])
def test_planted_mistake_is_caught(tmp_path, right: str, wrong: str) -> None:
    def checks(module: ModuleType) -> None:
        try:
            config = CONFIGS[-1]
            case = conv_case(3, 21, 3, 4, 19, 1, activation="silu", residual=True, bank=[0, 1, 0])
            check(case, module, config)
            check(dataclasses.replace(case, residual=layouts(case.residual)[3]), module, config)
            check(conv_case(1, 8, 4, 4, 16, 1, stride=2), module, config)
        except (TypeError, ValueError) as error:  # a mistake may also make shapes not fit
            raise AssertionError from error

    checks(module)
    assert_caught(checks, plant(module, tmp_path, (right, wrong)))


@launcher
@pytest.mark.skipif(DEVICE == "cuda", reason="mistakes may read anywhere")
@pytest.mark.parametrize(("right", "wrong"), [
    ("row_mask = row_mask & (tl.load(active + n) != 0)", "row_mask = row_mask & (tl.load(active + n) >= 0)"),
    ("row_mask = row_mask & (tl.load(active + n) != 0)", "row_mask = row_mask & (tl.load(active + n + 1) != 0)"),
    ("if tl.load(active) == 0:", "if tl.load(active) == 1:"),
    ("mask = row_mask[:, None] & channel_mask[None, :]", "mask = (m < M)[:, None] & channel_mask[None, :]"),
    ("out if accumulate else None", "None"),
])
def test_planted_bypass_is_caught(tmp_path, right: str, wrong: str) -> None:
    def checks(module: ModuleType) -> None:
        case = conv_case(6, 24, 3, 3, 40, 1, activation="silu")
        check_in_place(case, torch.tensor([1, 0, 0, 1, 0, 1], dtype=torch.int32), True, module, CONFIGS[0])
        check_in_place(case, torch.tensor(0, dtype=torch.int32), True, module, CONFIGS[0])

    checks(module)
    assert_caught(checks, plant(module, tmp_path, (right, wrong)))


# What follows runs on the CPU: the op is its reference there.


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("residual", [False, True, torch.float32])
def test_op_equals_torch(dtype: torch.dtype, residual: bool | torch.dtype) -> None:
    for layout, stride, bank in itertools.product(range(4), (1, 2), (None, 1, [0, 1, 0])):
        case = conv_case(3, 6, 5, 4, 7, 1, dtype=dtype, stride=stride, bank=bank, residual=residual, activation="gelu")
        case = dataclasses.replace(case, x=layouts(case.x)[layout])
        y = conv1x1(case.x, case.weight, case.scale, case.shift, residual=case.residual, activation="gelu",
                    stride=stride, bank=case.bank)
        assert_accurate("conv1x1", y, case.torch(), case.double().torch())
        assert y.is_contiguous(memory_format=torch.channels_last if layout % 2 else torch.contiguous_format)


def test_folded_norm() -> None:
    torch.manual_seed(0)
    conv, norm = torch.nn.Conv2d(5, 9, 1), torch.nn.BatchNorm2d(9)
    for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
        tensor.data.uniform_(0.5, 1.5)
    norm.eval()
    x = torch.randn(2, 5, 4, 4)
    scale, shift = fold_norm(norm.weight, norm.bias, norm.running_mean, norm.running_var, norm.eps, conv.bias)
    torch.testing.assert_close(conv1x1(x, conv.weight, scale, shift, activation="relu6"), F.relu6(norm(conv(x))))


def grads(y: torch.Tensor, inputs: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(y.dtype)
    return torch.autograd.grad(y, inputs, dy)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("bank", [None, 1, [0, 1, 0]], ids=str)
def test_gradients(activation: str, bank) -> None:
    case = conv_case(3, 4, 5, 4, 6, 1, stride=2, bank=bank, residual=True, activation=activation).double()
    inputs = [t.requires_grad_() for t in (case.x, case.weight, case.scale, case.shift, case.residual)]
    y = conv1x1(*inputs[:4], residual=inputs[4], activation=activation, stride=2, bank=case.bank)
    torch.testing.assert_close(grads(y, inputs), grads(case.torch(), inputs))


@pytest.mark.parametrize("activation", ["silu", "gelu", "identity"])
def test_gradcheck(activation: str) -> None:
    case = conv_case(2, 3, 3, 2, 4, 1, bank=[0, 1], residual=True, activation=activation).double()
    inputs = [t.requires_grad_() for t in (case.x, case.weight, case.scale, case.shift, case.residual)]
    assert torch.autograd.gradcheck(
        lambda x, w, s, t, r: conv1x1(x, w, s, t, residual=r, activation=activation, bank=case.bank), inputs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_gradients_in_their_types(dtype: torch.dtype) -> None:
    case = conv_case(3, 8, 5, 4, 6, 1, dtype=dtype, residual=torch.float32, activation="silu")
    case.x = layouts(case.x)[3]
    given = (case.x, case.weight, case.scale, case.shift, case.residual)
    inputs = [t.requires_grad_() for t in given]
    y = conv1x1(*inputs[:4], residual=inputs[4], activation="silu")
    # dy of another layout, with stride 0 along the batch
    dy = torch.randn(1, 6, 5, 4).expand_as(y)
    got, eager = torch.autograd.grad(y, inputs, dy), torch.autograd.grad(case.torch(), inputs, dy)
    exact = case.double()
    wide = [t.detach().requires_grad_() for t in (exact.x, exact.weight, exact.scale, exact.shift, exact.residual)]
    exact = Conv(*wide, activation="silu")
    expected = torch.autograd.grad(exact.torch(), wide, dy.double())
    for name, t, *three in zip(("x", "weight", "scale", "shift", "residual"), given, got, eager, expected):
        assert three[0].dtype == t.dtype
        assert_accurate(f"gradient of {name}", *three)
    assert got[0].is_contiguous(memory_format=torch.channels_last)


def test_bank_that_is_not_live_gets_no_gradient() -> None:
    case = conv_case(2, 3, 4, 4, 5, 1)
    live = torch.randn(5, requires_grad=True)
    other = torch.randn(5, requires_grad=True)
    conv1x1(case.x, case.weight, live, None).sum().backward()
    assert live.grad is not None
    assert other.grad is None
    # Given both, the one that no sample picked gets zeros.
    both = torch.randn(2, 5, requires_grad=True)
    conv1x1(case.x, case.weight, both, None, bank=torch.tensor(1, dtype=torch.int32)).sum().backward()
    assert not both.grad[0].any()
    assert both.grad[1].all()


def test_only_wanted_gradients() -> None:
    case = conv_case(2, 3, 4, 4, 5, 1, residual=True)
    weight = case.weight.requires_grad_()
    y = conv1x1(case.x, weight, case.scale, case.shift, residual=case.residual)
    y.sum().backward()
    assert weight.grad is not None
    assert case.x.grad is None


OPS = {
    "conv1x1": (lambda x, w, s, t, r, b: conv1x1(x, w, s, t, residual=r, activation="silu", stride=2, bank=b)),
    "linear": (lambda x, w, s, t, r, b: linear(x, w, s, t, residual=r, activation="silu", bank=b)),
}


def op_args(name: str, n: int, channels_last: bool = True, requires_grad: bool = True) -> tuple:
    torch.manual_seed(0)
    bank = torch.arange(n, dtype=torch.int32) % 2
    scale, shift = torch.randn(2, 5), torch.randn(2, 5)
    if name == "linear":
        given = (torch.randn(n, 6, 3), torch.randn(5, 3), scale, shift, torch.randn(n, 6, 5))
    else:
        layout = torch.channels_last if channels_last else torch.contiguous_format
        given = (torch.randn(n, 3, 5, 4).contiguous(memory_format=layout), torch.randn(5, 3, 1, 1), scale, shift,
                 torch.randn(n, 5, 3, 2).contiguous(memory_format=layout))
    return *(t.requires_grad_(requires_grad) for t in given), bank


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("name", OPS)
def test_compile_export_and_gpu_branch(name: str, channels_last: bool) -> None:
    op = OPS[name]
    check_compile(op, lambda n: op_args(name, n, channels_last))
    check_export(op, lambda n: op_args(name, n, channels_last, requires_grad=False), dynamic=(0, 4, 5))
    check_fake_gpu(op, op_args(name, 4, channels_last, requires_grad=False), dynamic=(0, 4, 5))


@pytest.mark.parametrize("name", ["conv1x1_", "linear_"])
def test_in_place_compile_and_gpu_branch(name: str) -> None:
    def op(out, x, w, s, t, b, a):
        function = conv1x1_ if name == "conv1x1_" else linear_
        more = {"stride": 2} if name == "conv1x1_" else {}
        return function(out, x, w, s, t, accumulate=True, activation="relu", bank=b, active=a, **more)

    def args(n: int) -> tuple:
        x, w, s, t, out, bank = op_args(name.rstrip("_"), n, requires_grad=False)
        return out, x, w, s, t, bank, (torch.arange(n) % 3 == 1).int()

    check_compile(op, args)
    check_fake_gpu(op, args(4), dynamic=(0, 1, 5, 6))


def test_opcheck() -> None:
    x, w, s, t, r, bank = op_args("conv1x1", 3)
    opcheck(module._conv1x1, (x, w, s, t, r, bank, "silu", 2))
    opcheck(module._conv1x1, (x, w, None, None, None, None, "relu", 1))
    inference = tuple(a.detach() for a in (x, w, s, t, r, bank))
    opcheck(module._conv1x1_, (inference[4].clone(), *inference[:4], True, bank, (bank != 0).int(), "silu", 2))
    x, w, s, t, r, bank = op_args("linear", 3)
    opcheck(module._linear, (x, w, s, t, r, bank, "gelu"))
    opcheck(module.linear_act_backward, (r.detach(), x.detach(), w.detach(), s.detach(), t.detach(), None, bank, "gelu",
                                         [True, True, True, False, False]))
    inference = tuple(a.detach() for a in (x, w, s, t, r, bank))
    opcheck(module._linear_, (inference[4].clone(), *inference[:4], True, bank, (bank != 0).int(), "silu"))


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("active", MIXTURES, ids=str)
def test_in_place_op(active: list[int] | None, accumulate: bool) -> None:
    case = conv_case(6, 5, 3, 3, 7, 1, activation="silu", bank=[0, 1, 1, 0, 0, 1])
    flags = None if active is None else torch.tensor(active, dtype=torch.int32)
    on = torch.ones(6, dtype=torch.bool) if active is None else (flags != 0).expand(6)
    before = torch.randn(6, 7, 3, 3)
    before[~on, 0] = float("nan")
    out = before.clone()
    result = conv1x1_(out, case.x, case.weight, case.scale, case.shift, accumulate=accumulate, activation="silu",
                      bank=case.bank, active=flags)
    assert result is out
    assert torch.equal(bits(out[~on]), bits(before[~on]))
    expected = dataclasses.replace(case, residual=before if accumulate else None).torch()
    torch.testing.assert_close(out[on], expected[on])


@pytest.mark.parametrize("shape", [(4, 3), (4, 2, 3), (2, 4, 5, 3), (2, 2, 3, 2, 3)], ids=str)
def test_linear_equals_torch(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(shape, dtype=torch.float64), torch.randn(5, 3).double(), torch.randn(5).double()
    inputs = [t.requires_grad_() for t in (x, weight, bias)]
    y, expected = linear(x, weight, shift=bias, activation="gelu"), F.gelu(F.linear(x, weight, bias))
    torch.testing.assert_close(y, expected)
    assert y.stride() == expected.stride()
    torch.testing.assert_close(grads(y, inputs), grads(expected, inputs))
    out = torch.randn(y.shape, dtype=torch.float64)
    before = out.clone()
    with torch.no_grad():
        linear_(out, x, weight, shift=bias, accumulate=True)
        torch.testing.assert_close(out, before + F.linear(x, weight, bias))


def test_linear_of_nchw() -> None:
    """(N, H, W, C) views of NCHW have pixels in one row: viewed, not copied."""
    x, weight = torch.randn(2, 3, 4, 5), torch.randn(7, 3)
    torch.testing.assert_close(linear(x.permute(0, 2, 3, 1), weight), F.linear(x.permute(0, 2, 3, 1), weight))


def test_empty() -> None:
    weight = torch.randn(5, 3, 1, 1, requires_grad=True)
    x = torch.randn(0, 3, 4, 4, requires_grad=True)
    y = conv1x1(x, weight, activation="relu")
    assert y.shape == (0, 5, 4, 4)
    y.sum().backward()
    assert x.grad.shape == x.shape
    assert not weight.grad.any()
    assert linear(torch.randn(0, 4, 3), torch.randn(5, 3)).shape == (0, 4, 5)
    with torch.no_grad():
        assert conv1x1_(torch.empty(0, 5, 4, 4), torch.empty(0, 3, 4, 4), weight).shape == (0, 5, 4, 4)


@launcher
def test_empty_is_not_launched() -> None:
    x, weight = torch.empty(0, 3, 4, 4, device=DEVICE), torch.empty(5, 3, 1, 1, device=DEVICE)
    assert module.launch_conv1x1(x, weight, None, None, None, None, "relu", 1).shape == (0, 5, 4, 4)
    assert module.launch_linear(x[:, :, 0], weight[:, :1, 0, 0].expand(5, 4), None, None, None, None, "relu").shape == (
        0, 3, 5)


X, W = torch.randn(2, 3, 4, 4), torch.randn(5, 3, 1, 1)
S = torch.randn(5)
FLAGS = torch.zeros(2, dtype=torch.int32)


@pytest.mark.parametrize(("call", "message"), [
    (lambda: conv1x1(X[0], W), r"x has shape \(3, 4, 4\); pass \(N, K, H, W\)"),
    (lambda: conv1x1(X, W[:, :2]), r"weight has shape \(5, 2, 1, 1\); pass \(C, 3, 1, 1\)"),
    (lambda: conv1x1(X, torch.randn(5, 3, 3, 3)), r"weight has shape \(5, 3, 3, 3\); pass \(C, 3, 1, 1\)"),
    (lambda: module._conv1x1(X.half(), W, None, None, None, None, "relu", 1),
     "weight is torch.float32, x is torch.float16; pass both in one dtype"),
    (lambda: conv1x1(X, W, stride=0), "stride=0, padding=0; pass a stride of 1 or more"),
    (lambda: conv1x1(X[:, :, :0], W), r"x of shape \(2, 3, 0, 4\) with padding 0 is smaller than the 1x1 weight"),
    (lambda: conv1x1(X, W, S[:4]), r"scale has shape \(4,\); pass \(5,\) \(one bank"),
    (lambda: conv1x1(X, W, S, bank=FLAGS), r"scale has shape \(5,\); pass \(2, 5\) \(both banks\)"),
    (lambda: conv1x1(X, W, bank=FLAGS), "`bank` is given but neither scale nor shift"),
    (lambda: conv1x1(X, W, S.half()), "scale is torch.float16 .* pass contiguous float32"),
    (lambda: conv1x1(X, W, S.double()), "scale is torch.float64 .* pass contiguous float32"),
    (lambda: conv1x1(X, W, S, S.expand(2, 5), bank=FLAGS), r"scale has shape"),
    (lambda: conv1x1(X, W, None, S.expand(2, 5), bank=FLAGS), r"shift is torch.float32 with strides \(0, 1\)"),
    (lambda: conv1x1(X, W, S, activation="tanh"), "activation='tanh'; pass one of"),
    (lambda: conv1x1(X, W, residual=X), r"residual has shape \(2, 3, 4, 4\); the output has \(2, 5, 4, 4\)"),
    (lambda: conv1x1(X, W, torch.randn(2, 5), bank=FLAGS.long()), "bank is torch.int64; pass int32"),
    (lambda: conv1x1(X, W, torch.randn(2, 5), bank=torch.zeros(3).int()), r"bank has shape \(3,\); pass one value, or"),
    (lambda: conv1x1(X, W, torch.randn(2, 5), bank=torch.zeros(1).int().expand(2)), r"bank has strides \(0,\)"),
    (lambda: conv1x1(X, W, torch.randn(2, 5), bank=torch.zeros(4).int()[::2]), r"bank has strides \(2,\)"),
    (lambda: conv1x1_(torch.randn(2, 5, 4, 4), X, W, active=torch.zeros(2)), "active is torch.float32; pass int32"),
    (lambda: conv1x1_(torch.randn(2, 4, 4, 4), X, W), r"out has shape \(2, 4, 4, 4\); the output has \(2, 5, 4, 4\)"),
    (lambda: conv1x1_(X, X, torch.randn(3, 3, 1, 1)), "x shares memory with the output"),
    (lambda: linear(S, W[:, :, 0, 0]), r"x has shape \(5,\); pass \(N, ..., channels\)"),
    (lambda: linear(X, W[:, :, 0, 0]), r"weight has shape \(5, 3\); pass \(C, 4\)"),
    (lambda: linear(X, W), r"weight has shape \(5, 3, 1, 1\)"),
    (lambda: linear(torch.randn(2, 4, 4, 3)[:, :, ::2], W[:, :, 0, 0]), None),
    (lambda: linear(torch.randn(2, 4, 4, 3)[:, :, :3], W[:, :, 0, 0]),
     r"the axes of x between the first and the last cannot be viewed as one: .* pass x.contiguous\(\)"),
    (lambda: linear(X, torch.randn(5, 4), residual=X), r"residual has shape"),
    # As many pixels in another order
    (lambda: linear(torch.randn(2, 3, 4, 6), torch.randn(5, 6), residual=torch.randn(2, 4, 3, 5)),
     r"residual has shape \(2, 4, 3, 5\); the output has \(2, 3, 4, 5\)"),
    (lambda: linear_(torch.randn(2, 12, 5), torch.randn(2, 3, 4, 6), torch.randn(5, 6)),
     r"out has shape \(2, 12, 5\); the output has \(2, 3, 4, 5\)"),
    (lambda: linear(X, torch.tensor(1.0)), r"weight has shape \(\)"),
    (lambda: linear_(X, X, torch.randn(4, 4)), "x shares memory with the output"),
])
def test_bad_input(call, message: str | None) -> None:
    if message is None:  # evenly strided axes are viewed
        call()
        return
    with pytest.raises(ValueError, match=message):
        call()


def test_in_place_refuses_gradients() -> None:
    weight = W.clone().requires_grad_()
    with pytest.raises(RuntimeError, match=r"conv1x1_ writes in place .* torch.no_grad\(\), or use conv1x1$"):
        conv1x1_(torch.randn(2, 5, 4, 4), X, weight)
    with pytest.raises(RuntimeError, match=r"or use linear$"):
        linear_(torch.randn(2, 3, 4, 5), X, torch.randn(5, 4, requires_grad=True))
    with torch.no_grad():
        conv1x1_(torch.randn(2, 5, 4, 4), X, weight)


def aot(kind: str, dtype: torch.dtype, activation: str, n: int, k: int, side: int, c: int, stride: int = 1,
        per_sample: bool = False, precision: str | None = None) -> tuple[int, int]:
    """One launch on fake tensors: bytes it must move, operations."""
    def image(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="cuda", memory_format=torch.channels_last)

    small = -(-side // stride)
    vectors = [torch.empty(2, c, device="cuda") if per_sample else torch.empty(c, device="cuda") for _ in range(2)]
    flags = torch.empty(n, dtype=torch.int32, device="cuda") if per_sample else None
    if kind == "linear":
        x, weight = (torch.empty(*s, dtype=dtype, device="cuda") for s in ((n, side * side, k), (c, k)))
        out = torch.empty(n, side * side, c, dtype=dtype, device="cuda")
        module.launch_linear(x, weight, *vectors, out, flags, activation)
    else:
        x, weight, out = image(n, k, side, side), image(c, k, 1, 1), image(n, c, small, small)
        if kind == "in place":
            module.launch_conv1x1_(out, x, weight, *vectors, True, flags, flags, activation, stride)
        else:
            module.launch_conv1x1(x, weight, *vectors, out, flags, activation, stride)
    pixels = n * small * small
    return (pixels * (k + 2 * c) + k * c) * dtype.itemsize, 2 * pixels * k * c


AOT = {
    "plain": lambda dtype, act: aot("conv", dtype, act, 64, 256, 56, 64),
    "bank per sample": lambda dtype, act: aot("conv", dtype, act, 64, 1024, 14, 256, per_sample=True),
    "stride 2": lambda dtype, act: aot("conv", dtype, act, 64, 256, 56, 512, stride=2),
    "in place, active per sample": lambda dtype, act: aot("in place", dtype, act, 64, 64, 56, 256, per_sample=True),
    "24 channels": lambda dtype, act: aot("in place", dtype, act, 64, 144, 56, 24, per_sample=True),
    "batch 8": lambda dtype, act: aot("in place", dtype, act, 8, 512, 14, 256, per_sample=True),
    "linear": lambda dtype, act: aot("linear", dtype, act, 64, 384, 14, 1536),
}
AOT_EXPECT = {"conv1x1_kernel": {"dot", "wide_loads", "wide_stores"}}
