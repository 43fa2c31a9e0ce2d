"""3x3 convolution against plain PyTorch."""

from __future__ import annotations

import dataclasses
import itertools
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from conv_cases import CONFIGS, MIXTURES, Conv, bits, configured, conv_case
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

from adn_kernels import conv3x3 as module
from adn_kernels.activation import ACTIVATIONS
from adn_kernels.conv3x3 import conv3x3, conv3x3_

launcher = pytest.mark.launcher
NHWC = torch.channels_last


def launch(case: Conv, module: ModuleType = module, config: dict | None = None) -> torch.Tensor:
    """What the launcher computes of `case`, between guards."""
    with Guards() as guards, configured(module, config):
        case = case.placed(guards)
        y = module.launch_conv3x3(case.x, case.weight, *case.epilogue, case.stride, case.padding)
    guards.check()
    return y


def check(case: Conv, module: ModuleType = module, config: dict | None = None) -> None:
    on_device = case if DEVICE == "cpu" else case.placed(Guards())
    assert_accurate("conv3x3", launch(case, module, config), on_device.torch(), case.double().torch())


# N, K, H, W, C: the smallest maps, primes, just below, at and above tiles
SHAPES = [(1, 1, 3, 3, 1), (2, 3, 5, 7, 2), (2, 17, 4, 4, 31), (1, 33, 7, 5, 34), (3, 16, 3, 4, 24), (1, 64, 6, 3, 8)]


@launcher
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("padding", [0, 1])
def test_shapes_and_layouts(shape: tuple[int, ...], stride: int, padding: int, dtype: torch.dtype) -> None:
    n, k, h, w, c = shape
    case = conv_case(n, k, h, w, c, 3, dtype=dtype, stride=stride, padding=padding, activation="silu", residual=True)
    # Half of the layouts each, all of them with every stride and every padding
    for i in ((0, 1), (2, 3))[(stride + padding) % 2]:
        weight = case.weight.contiguous(memory_format=NHWC) if i else case.weight
        residual = layouts(case.residual)[(i + 1) % 4]
        check(dataclasses.replace(case, x=layouts(case.x)[i], weight=weight, residual=residual))


@launcher
@pytest.mark.parametrize("padding", [1, 2])
@pytest.mark.parametrize("side", [1, 2])
def test_maps_smaller_than_the_window(side: int, padding: int) -> None:
    for stride in (1, 2):
        case = conv_case(3, 8, side, side, 16, 3, stride=stride, padding=padding, activation="relu")
        if side + 2 * padding >= 3:
            for x in layouts(case.x):
                check(dataclasses.replace(case, x=x, weight=case.weight.contiguous(memory_format=NHWC)))


@launcher
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c['BM']}x{c['BN']}x{c['BK']}")
def test_tiles(config: dict, dtype: torch.dtype) -> None:
    for n, k, h, w, c in ((2, 40, 3, 5, 34), (40, 16, 1, 1, 24)):
        case = conv_case(n, k, h, w, c, 3, dtype=dtype, padding=1, activation="relu", residual=True,
                         bank=[i % 3 for i in range(n)])
        check(case, config=config)
        check(dataclasses.replace(case, x=layouts(case.x)[1], weight=layouts(case.weight)[1]), config=config)


@launcher
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("residual", [False, True, torch.float32])
def test_activations(activation: str, residual: bool | torch.dtype, dtype: torch.dtype) -> None:
    check(conv_case(2, 9, 4, 3, 17, 3, dtype=dtype, padding=1, activation=activation, residual=residual))


@launcher
@pytest.mark.parametrize("bank", [None, 0, 1, [1], [0, 1, 0, 0, 5], [1, 1, 1, 1, 1]], ids=str)
def test_banks(bank: list[int] | int | None) -> None:
    case = conv_case(5, 8, 3, 3, 24, 3, padding=1, bank=bank, activation="gelu")
    for config in (CONFIGS[0], CONFIGS[-1]):
        check(case, config=config)


@launcher
@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    n=st.integers(1, 4), k=st.integers(1, 24), h=st.integers(1, 7), w=st.integers(1, 7), c=st.integers(1, 40),
    stride=st.integers(1, 3), padding=st.integers(1, 2), activation=st.sampled_from(ACTIVATIONS),
    residual=st.booleans(), banks=st.booleans(), x_layout=st.integers(0, 3), weight_layout=st.integers(0, 3),
    config=st.sampled_from([None, *CONFIGS]),
)
def test_any(n, k, h, w, c, stride, padding, activation, residual, banks, x_layout, weight_layout, config) -> None:
    case = conv_case(n, k, h, w, c, 3, stride=stride, padding=padding, activation=activation, residual=residual,
                     bank=[i % 2 for i in range(n)] if banks else None, seed=n * k + c)
    check(dataclasses.replace(case, x=layouts(case.x)[x_layout], weight=layouts(case.weight)[weight_layout]),
          config=config)


@launcher
def test_not_finite_stays_in_its_window() -> None:
    case = conv_case(2, 5, 6, 6, 8, 3, padding=1, activation="relu")
    case.x[1, 4, 2, 0] = float("nan")
    check(case)


def check_in_place(
    case: Conv, active: torch.Tensor | None, accumulate: bool, module: ModuleType = module, config: dict | None = None,
    out_dtype: torch.dtype | None = None, layout: int = 1,
) -> None:
    """Active samples are computed; all others keep their bits, NaN in them and in x included."""
    n = len(case.x)
    flags = torch.ones(n, dtype=torch.bool) if active is None else (active != 0).expand(n)
    before = torch.randn(case.torch().shape, generator=torch.Generator().manual_seed(5)).to(out_dtype or case.x.dtype)
    before = layouts(before)[layout]
    x = case.x.clone(memory_format=torch.preserve_format)
    x[~flags] = float("nan")
    before[~flags, ..., 0] = float("nan")
    case = dataclasses.replace(case, x=x, residual=before if accumulate else None)
    with Guards() as guards, configured(module, config):
        given, out = case.placed(guards), guards.place(before)
        module.launch_conv3x3_(out, given.x, given.weight, given.scale, given.shift, accumulate, given.bank,
                               guards.place(active), given.activation, given.stride, given.padding)
    guards.check()
    assert torch.equal(bits(out.cpu()[~flags]), bits(before[~flags]))
    eager = given.torch().to(before.dtype).cpu()[flags]
    assert_accurate("conv3x3_", out.cpu()[flags], eager, case.double().torch()[flags])


@launcher
@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("active", MIXTURES, ids=str)
@pytest.mark.parametrize("side", [1, 5])
def test_bypass(side: int, active: list[int] | None, accumulate: bool) -> None:
    """Tiles of 128 pixels span many samples, those of 32 end inside one."""
    flags = None if active is None else torch.tensor(active, dtype=torch.int32)
    for config, bank in ((CONFIGS[0], [0, 1, 1, 0, 0, 1]), (CONFIGS[3], None)):
        case = conv_case(6, 16, side, side, 24, 3, padding=1, bank=bank, activation="silu")
        check_in_place(case, flags, accumulate, config=config)


@launcher
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", [0, 1, 2, 3])
def test_bypass_layouts(layout: int, dtype: torch.dtype) -> None:
    active = torch.tensor([1, 0, 1], dtype=torch.int32)
    case = conv_case(3, 8, 4, 6, 16, 3, dtype=dtype, padding=1, activation="relu", stride=2)
    check_in_place(case, active, True, layout=layout)
    check_in_place(case, active, False, out_dtype=torch.float32, layout=layout)
    check_in_place(case, torch.tensor(0, dtype=torch.int32), True, layout=layout)


@launcher
@pytest.mark.skipif(not INTERPRETED, reason="counts loads in the interpreter")
def test_bypassed_programs_read_nothing() -> None:
    case = conv_case(4, 16, 4, 4, 16, 3, padding=1)
    for active in (torch.tensor([0], dtype=torch.int32), torch.zeros(4, dtype=torch.int32)):
        out = torch.randn(4, 16, 4, 4)
        with traffic() as counts:
            module.launch_conv3x3_(out, case.x, case.weight, case.scale, case.shift, True, None, active, "relu", 1, 1)
        assert not bytes_of(counts["read"], out, case.x, case.weight, case.scale, case.shift)
        assert not bytes_of(counts["written"])


@launcher
def test_deterministic() -> None:
    case = conv_case(2, 35, 5, 5, 40, 3, padding=1, activation="silu", bank=[0, 1], residual=True)
    assert torch.equal(bits(launch(case)), bits(launch(case)))


@launcher
@pytest.mark.skipif(not INTERPRETED, reason="counts loads in the interpreter")
def test_traffic() -> None:
    """y and the residual are moved once, the weight once per row of tiles, x once per tap less what is padding."""
    n, k, side, c = 2, 64, 16, 64
    case = conv_case(n, k, side, side, c, 3, dtype=torch.float16, padding=1, residual=True)
    x, weight, residual = (t.contiguous(memory_format=NHWC) for t in (case.x, case.weight, case.residual))
    with traffic() as counts, configured(module, CONFIGS[0]):
        y = module.launch_conv3x3(x, weight, case.scale, case.shift, residual, None, "relu", 1, 1)
    windows = n * (3 * side - 2) ** 2  # pixels of x under the 9 taps of all windows
    assert bytes_of(counts["read"], x) == windows * k * 2
    assert bytes_of(counts["read"], residual) == bytes_of(counts["written"]) == y.numel() * 2
    assert bytes_of(counts["read"], weight) == n * side**2 // CONFIGS[0]["BM"] * weight.numel() * 2


@launcher
@pytest.mark.skipif(not INTERPRETED, reason="runs the last programs only")
@pytest.mark.parametrize("channels_last", [False, True])
def test_beyond_2_31_elements(channels_last: bool) -> None:
    """In a sample. Memory is committed where the last tile touches it."""
    n, k, side, c = 2, 64, 6000, 64
    layout = NHWC if channels_last else torch.contiguous_format
    x = torch.empty(n, k, side, side, dtype=torch.float16, memory_format=layout)
    assert x[0].numel() > 2**31
    case = conv_case(1, k, 1, 1, c, 3, dtype=torch.float16, activation="relu")
    last = torch.randn(k, 2, 256).half()
    x[-1, :, -2:, -256:] = last
    with last_programs():
        y = module.launch_conv3x3(x, case.weight.contiguous(memory_format=layout), case.scale, case.shift, None, None,
                                  "relu", 1, 1)
    z = F.conv2d(last.double()[None], case.weight.double(), padding=1)
    exact = F.relu(z * case.scale.double()[:, None, None] + case.shift.double()[:, None, None])
    # The last tile: 32 of the channels at least.
    got, exact = y[-1:, -32:, -1:, -16:], exact[:, -32:, -1:, -16:]
    assert_accurate("conv3x3", got, exact.half(), exact)


@launcher
@pytest.mark.skipif(DEVICE == "cuda", reason="mistakes may read anywhere")
@pytest.mark.parametrize(("right", "wrong"), [
    ("k_mask = k0 + k < K", "k_mask = k0 + k < K + 1"),
    ("(h + kh >= 0)", "(h + kh >= -1)"),
    ("(h + kh < H)", "(h + kh <= H)"),
    ("(w + kw >= 0)", "(w + kw > 0)"),
    ("(w + kw < W)", "(w + kw < W + 1)"),
    ("kw * weight_w)", "(2 - kw) * weight_w)"),
    ("* STRIDE - PADDING", "* STRIDE"),
    ("channel_mask = channel < C", "channel_mask = channel <= C"),
    ("kh * weight_h + kw * weight_w", "kw * weight_h + kh * weight_w"),
    ("out_at, n, channel", "out_at, n * 0, channel"),
    ("residual_n, residual_h, residual_w, UNIT)", "out_n, out_h, out_w, UNIT)"),
    ("range(0, 9 * blocks)", "range(0, 9 * blocks - 1)"),
])
def test_planted_mistake_is_caught(tmp_path, right: str, wrong: str) -> None:
    assert_caught(check_some, plant(module, tmp_path, (right, wrong)))


def check_some(module: ModuleType = module) -> None:
    case = conv_case(2, 17, 3, 4, 19, 3, padding=1, activation="silu", residual=True, bank=[0, 1])
    check(dataclasses.replace(case, residual=layouts(case.residual)[3]), module, CONFIGS[-1])


def check_some_in_place(module: ModuleType = module) -> None:
    case = conv_case(6, 8, 3, 3, 16, 3, padding=1, activation="silu")
    check_in_place(case, torch.tensor([1, 0, 0, 1, 0, 1], dtype=torch.int32), True, module, CONFIGS[0])
    check_in_place(case, torch.tensor(0, dtype=torch.int32), True, module, CONFIGS[0])


@launcher
@pytest.mark.parametrize("check", [check_some, check_some_in_place])
def test_without_a_mistake(check) -> None:
    check()


@launcher
@pytest.mark.skipif(DEVICE == "cuda", reason="mistakes may read anywhere")
@pytest.mark.parametrize(("right", "wrong"), [
    ("row_mask = row_mask & (tl.load(active + n) != 0)", "row_mask = row_mask & (tl.load(active + n) >= 0)"),
    ("if tl.load(active) == 0:", "if tl.load(active) == 1:"),
    ("mask = row_mask[:, None] & channel_mask[None, :]", "mask = (m < M)[:, None] & channel_mask[None, :]"),
    ("out if accumulate else None", "None"),
])
def test_planted_bypass_is_caught(tmp_path, right: str, wrong: str) -> None:
    assert_caught(check_some_in_place, plant(module, tmp_path, (right, wrong)))


@launcher
def test_empty_is_not_launched() -> None:
    x, weight = torch.empty(0, 3, 4, 4, device=DEVICE), torch.empty(5, 3, 3, 3, device=DEVICE)
    assert module.launch_conv3x3(x, weight, None, None, None, None, "relu", 2, 0).shape == (0, 5, 1, 1)


# What follows runs on the CPU: the op is its reference there.


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("residual", [False, True, torch.float32])
def test_op_equals_torch(dtype: torch.dtype, residual: bool | torch.dtype) -> None:
    for layout, stride, padding, bank in itertools.product(range(4), (1, 2), (0, 1), (None, [0, 1, 0])):
        case = conv_case(3, 6, 5, 4, 7, 3, dtype=dtype, stride=stride, padding=padding, bank=bank, residual=residual,
                         activation="gelu")
        case = dataclasses.replace(case, x=layouts(case.x)[layout])
        y = conv3x3(case.x, case.weight, case.scale, case.shift, residual=case.residual, activation="gelu",
                    stride=stride, padding=padding, bank=case.bank)
        assert_accurate("conv3x3", y, case.torch(), case.double().torch())
        assert y.is_contiguous(memory_format=NHWC if layout % 2 else torch.contiguous_format)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("bank", [None, 1, [0, 1, 0]], ids=str)
@pytest.mark.parametrize(("stride", "padding"), [(1, 1), (2, 0)])
def test_gradients(activation: str, bank, stride: int, padding: int) -> None:
    case = conv_case(3, 4, 5, 4, 6, 3, stride=stride, padding=padding, bank=bank, residual=True,
                     activation=activation).double()
    inputs = [t.requires_grad_() for t in (case.x, case.weight, case.scale, case.shift, case.residual)]
    y = conv3x3(*inputs[:4], residual=inputs[4], activation=activation, stride=stride, padding=padding, bank=case.bank)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    torch.testing.assert_close(torch.autograd.grad(y, inputs, dy), torch.autograd.grad(case.torch(), inputs, dy))


def test_bank_that_is_not_live_gets_no_gradient() -> None:
    case = conv_case(2, 3, 4, 4, 5, 3)
    live, other = (torch.randn(5, requires_grad=True) for _ in range(2))
    conv3x3(case.x, case.weight, live, None).sum().backward()
    assert live.grad is not None
    assert other.grad is None
    both = torch.randn(2, 5, requires_grad=True)
    conv3x3(case.x, case.weight, both, None, bank=torch.tensor(1, dtype=torch.int32)).sum().backward()
    assert not both.grad[0].any()
    assert both.grad[1].all()


def op(x, w, s, t, r, b):
    return conv3x3(x, w, s, t, residual=r, activation="silu", stride=2, bank=b)


def op_args(n: int, channels_last: bool = True, requires_grad: bool = True) -> tuple:
    torch.manual_seed(0)
    layout = NHWC if channels_last else torch.contiguous_format
    given = (torch.randn(n, 3, 5, 4), torch.randn(5, 3, 3, 3), torch.randn(2, 5), torch.randn(2, 5),
             torch.randn(n, 5, 3, 2))
    given = [t.contiguous(memory_format=layout) if t.ndim == 4 else t for t in given]
    return *(t.requires_grad_(requires_grad) for t in given), torch.arange(n, dtype=torch.int32) % 2


@pytest.mark.parametrize("channels_last", [False, True])
def test_compile_export_and_gpu_branch(channels_last: bool) -> None:
    check_compile(op, lambda n: op_args(n, channels_last))
    check_export(op, lambda n: op_args(n, channels_last, requires_grad=False), dynamic=(0, 4, 5))
    check_fake_gpu(op, op_args(4, channels_last, requires_grad=False), dynamic=(0, 4, 5))


def test_in_place_compile_and_gpu_branch() -> None:
    def op_(out, x, w, s, t, b, a):
        return conv3x3_(out, x, w, s, t, accumulate=True, activation="relu", stride=2, bank=b, active=a)

    def args(n: int) -> tuple:
        x, w, s, t, out, bank = op_args(n, requires_grad=False)
        return out, x, w, s, t, bank, (torch.arange(n) % 3 == 1).int()

    check_compile(op_, args)
    check_fake_gpu(op_, args(4), dynamic=(0, 1, 5, 6))


def test_opcheck() -> None:
    x, w, s, t, r, bank = op_args(3)
    opcheck(module._conv3x3, (x, w, s, t, r, bank, "silu", 2, 1))
    x, w, s, t, r = (a.detach() for a in (x, w, s, t, r))
    opcheck(module._conv3x3_, (r.clone(), x, w, s, t, True, bank, (bank != 0).int(), "silu", 2, 1))


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("active", MIXTURES, ids=str)
def test_in_place_op(active: list[int] | None, accumulate: bool) -> None:
    case = conv_case(6, 5, 3, 3, 7, 3, padding=1, activation="silu", bank=[0, 1, 1, 0, 0, 1])
    flags = None if active is None else torch.tensor(active, dtype=torch.int32)
    on = torch.ones(6, dtype=torch.bool) if active is None else (flags != 0).expand(6)
    before = torch.randn(6, 7, 3, 3)
    before[~on, 0] = float("nan")
    out = before.clone()
    result = conv3x3_(out, case.x, case.weight, case.scale, case.shift, accumulate=accumulate, activation="silu",
                      bank=case.bank, active=flags)
    assert result is out
    assert torch.equal(bits(out[~on]), bits(before[~on]))
    expected = dataclasses.replace(case, residual=before if accumulate else None).torch()
    torch.testing.assert_close(out[on], expected[on])


def test_empty() -> None:
    x, weight = torch.randn(0, 3, 4, 4, requires_grad=True), torch.randn(5, 3, 3, 3, requires_grad=True)
    y = conv3x3(x, weight, activation="relu")
    assert y.shape == (0, 5, 4, 4)
    y.sum().backward()
    assert x.grad.shape == x.shape
    assert not weight.grad.any()


X, W = torch.randn(2, 3, 4, 4), torch.randn(5, 3, 3, 3)


@pytest.mark.parametrize(("call", "message"), [
    (lambda: conv3x3(X[0], W), r"x has shape \(3, 4, 4\); pass \(N, K, H, W\)"),
    (lambda: conv3x3(X, W[:, :2]), r"weight has shape \(5, 2, 3, 3\); pass \(C, 3, 3, 3\)"),
    (lambda: conv3x3(X, W[..., :1, :1]), r"weight has shape \(5, 3, 1, 1\); pass \(C, 3, 3, 3\)"),
    (lambda: module._conv3x3(X, W.double(), None, None, None, None, "relu", 1, 1),
     "weight is torch.float64, x is torch.float32; pass both in one dtype"),
    (lambda: conv3x3(X, W, stride=0), "stride=0, padding=1; pass a stride of 1 or more"),
    (lambda: conv3x3(X, W, padding=-1), "stride=1, padding=-1; pass a stride of 1 or more, a padding of 0 or more"),
    (lambda: conv3x3(X[:, :, :2], W, padding=0), r"x of shape \(2, 3, 2, 4\) with padding 0 is smaller than the 3x3"),
    (lambda: conv3x3(X, W, torch.randn(4)), r"scale has shape \(4,\); pass \(5,\)"),
    (lambda: conv3x3(X, W, residual=X), r"residual has shape \(2, 3, 4, 4\); the output has \(2, 5, 4, 4\)"),
    (lambda: conv3x3(X, W, activation="tanh"), "activation='tanh'; pass one of"),
    (lambda: conv3x3_(X, X, torch.randn(3, 3, 3, 3)), "x shares memory with the output"),
    (lambda: conv3x3_(torch.randn(2, 5, 4, 4), X, W, active=torch.zeros(3).int()), r"active has shape \(3,\)"),
])
def test_bad_input(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_in_place_refuses_gradients() -> None:
    with pytest.raises(RuntimeError, match=r"conv3x3_ writes in place .* or use conv3x3$"):
        conv3x3_(torch.randn(2, 5, 4, 4), X, W.clone().requires_grad_())


def aot(dtype: torch.dtype, activation: str, n: int, k: int, side: int, c: int, stride: int = 1, in_place: bool = False,
        per_sample: bool = False) -> tuple[int, int]:
    """One launch on fake tensors: bytes it must move, operations."""
    def image(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="cuda", memory_format=NHWC)

    small = -(-side // stride)
    vectors = [torch.empty(2, c, device="cuda") if per_sample else torch.empty(c, device="cuda") for _ in range(2)]
    flags = torch.empty(n, dtype=torch.int32, device="cuda") if per_sample else None
    x, weight, out = image(n, k, side, side), image(c, k, 3, 3), image(n, c, small, small)
    if in_place:
        module.launch_conv3x3_(out, x, weight, *vectors, True, flags, flags, activation, stride, 1)
    else:
        module.launch_conv3x3(x, weight, *vectors, None, flags, activation, stride, 1)
    pixels = n * small * small
    moved = (x.numel() + weight.numel() + (2 if in_place else 1) * out.numel()) * dtype.itemsize
    return moved, 18 * pixels * k * c


AOT = {
    "plain": lambda dtype, act: aot(dtype, act, 64, 64, 56, 64),
    "stride 2, bank per sample": lambda dtype, act: aot(dtype, act, 64, 128, 56, 128, stride=2, per_sample=True),
    "in place, active per sample": lambda dtype, act: aot(dtype, act, 64, 256, 14, 256, in_place=True, per_sample=True),
    "batch 8": lambda dtype, act: aot(dtype, act, 8, 512, 14, 256, in_place=True, per_sample=True),
}
AOT_EXPECT = {"conv3x3_kernel": {"dot", "wide_loads", "wide_stores"}}
