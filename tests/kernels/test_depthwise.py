"""Depthwise convolution: the kernel against plain PyTorch, its traffic, its bypass; the op's behaviour on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from aot import fake_cuda, record
from harness import (
    DEVICE,
    DTYPES,
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
from torch import Tensor
from torch.testing import assert_close

import adn_kernels.depthwise as module
from adn_kernels.activation import ACTIVATIONS, act_reference
from adn_kernels.depthwise import depthwise, depthwise_, tap_major

LAYOUTS = range(4)  # of `harness.layouts`


@dataclass
class Case:
    """Arguments of a depthwise convolution, on the CPU."""

    x: Tensor
    weight: Tensor
    scale: Tensor | None
    shift: Tensor | None
    residual: Tensor | None = None
    bank: Tensor | None = None
    activation: str = "identity"
    stride: int = 1
    padding: int = 1

    def forward(self) -> tuple:
        """As ops and launchers take them."""
        return (self.x, self.weight, self.scale, self.shift, self.residual, self.bank, self.activation, self.stride,
                self.padding)


def make(
    n: int = 2, c: int = 13, h: int = 5, w: int = 3, k: int = 3, *, stride: int = 1, padding: int | None = None,
    layout: int = 1, dtype: torch.dtype = torch.float32, activation: str = "silu", residual: bool = False,
    bank: list[int] | None = None, seed: int = 0,
) -> Case:
    """Random values; `bank` of one value is a scalar."""
    torch.manual_seed(seed)
    padding = k // 2 if padding is None else padding
    x = layouts(torch.randn(n, c, h, w).to(dtype))[layout]
    weight = (torch.randn(c, 1, k, k) / k).to(dtype)
    vectors = (c,) if bank is None else (2, c)
    case = Case(x, weight, torch.rand(vectors) + 0.5, torch.randn(vectors), None, None, activation, stride, padding)
    if residual:
        case.residual = layouts(torch.randn(shape(case)).to(dtype))[layout]
    if bank is not None:
        case.bank = torch.tensor(bank[0] if len(bank) == 1 else bank, dtype=torch.int32)
    return case


def shape(case: Case) -> tuple[int, int, int, int]:
    n, c, h, w = case.x.shape
    k = case.weight.shape[-1]
    return n, c, (h + 2 * case.padding - k) // case.stride + 1, (w + 2 * case.padding - k) // case.stride + 1


def plain(case: Case, dtype: torch.dtype | None = None) -> Tensor:
    """The case in plain PyTorch, in `dtype` or in the types of its tensors."""
    def to(tensor: Tensor | None) -> Tensor | None:
        return tensor if tensor is None else tensor.cpu().to(dtype or case.x.dtype)

    def vector(tensor: Tensor) -> Tensor:
        if case.bank is not None:
            tensor = tensor[(case.bank.cpu() != 0).long()]
        return to(tensor).reshape(-1, tensor.shape[-1], 1, 1)

    z = F.conv2d(to(case.x), to(case.weight), None, case.stride, case.padding, 1, case.x.shape[1])
    if case.scale is not None:
        z = z * vector(case.scale)
    if case.shift is not None:
        z = z + vector(case.shift)
    if case.residual is not None:
        z = z + (case.residual if dtype is None else to(case.residual)).cpu()
    return act_reference(z, case.activation)


def launched(case: Case, of: ModuleType = module) -> Tensor:
    """What the launcher computes, all buffers between guards."""
    with Guards() as guards:
        placed = [guards.place(a) if isinstance(a, Tensor) else a for a in case.forward()]
        y = of.launch_depthwise(*placed)
    guards.check()
    return y


def check(case: Case, of: ModuleType = module) -> None:
    y = launched(case, of)
    assert_accurate("depthwise", y, plain(case), plain(case, torch.float64))
    assert y.stride() == module.empty_output(case.x, y.shape, None).stride()


@pytest.mark.launcher
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("k", [3, 5, 7])
def test_kernel(k: int, stride: int, layout: int, dtype: torch.dtype) -> None:
    # Few programs, for each takes the interpreter long: two blocks along the axis held in registers
    h, w = (5, 3) if layout % 2 else (3, 5)
    check(make(2 if k == 3 else 1, h=h, w=w, k=k, stride=stride, layout=layout, dtype=dtype))


@pytest.mark.launcher
@pytest.mark.parametrize("bank", [None, [0], [1], [0, 1], [1, 1], [-3, 0]], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_epilogue(activation: str, bank: list[int] | None) -> None:
    check(make(activation=activation, bank=bank, residual=True, dtype=torch.float16))


@pytest.mark.launcher
def test_4096_channels() -> None:
    check(make(1, 4096, 2, 1, dtype=torch.float16, residual=True))


@pytest.mark.launcher
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("sizes", [
    (1, 1, 1, 1), (2, 3, 1, 1), (1, 16, 1, 7), (3, 17, 7, 1), (1, 1, 3, 17), (2, 24, 4, 7), (1, 97, 5, 3),
    (1, 8, 17, 2), (1, 136, 4, 4),
], ids=str)
def test_odd_shapes(sizes: tuple[int, int, int, int], layout: int) -> None:
    check(make(*sizes, layout=layout, residual=True))


@pytest.mark.launcher
@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    n=st.integers(1, 2), c=st.integers(1, 20), h=st.integers(1, 6), w=st.integers(1, 6), k=st.sampled_from([3, 5, 7]),
    stride=st.sampled_from([1, 2]), padding=st.integers(3, 4), layout=st.sampled_from(LAYOUTS), residual=st.booleans(),
    seed=st.integers(0, 9),
)
def test_any_shape(n: int, c: int, h: int, w: int, k: int, stride: int, padding: int, layout: int, residual: bool,
                   seed: int) -> None:
    check(make(n, c, h, w, k, stride=stride, padding=padding, layout=layout, residual=residual, seed=seed))


@pytest.mark.launcher
@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_padding(layout: int) -> None:
    check(make(h=6, w=7, k=5, padding=0, layout=layout))


@pytest.mark.launcher
@pytest.mark.parametrize("scale", [True, False])
@pytest.mark.parametrize("shift", [True, False])
def test_parts_left_out(scale: bool, shift: bool) -> None:
    case = make()
    check(replace(case, scale=case.scale if scale else None, shift=case.shift if shift else None))


@pytest.mark.launcher
@pytest.mark.parametrize("layout", LAYOUTS)
def test_tap_major_weight(layout: int) -> None:
    case = make(2, 16, k=5, layout=layout)
    check(replace(case, weight=tap_major(case.weight)))


@pytest.mark.launcher
def test_strides_of_their_own() -> None:
    """Residual in another layout than x; x a crop of a larger image."""
    case = make(2, 16, 9, 9)
    crop = case.x[:, :, 2:7, 1:7]
    check(replace(case, x=crop, residual=torch.randn(2, 16, 5, 6)))


@pytest.mark.launcher
def test_residual_of_another_dtype() -> None:
    case = make(residual=True, dtype=torch.float16)
    case.residual = case.residual.float()
    y = launched(case)
    assert y.dtype == torch.float32
    assert_accurate("depthwise", y, plain(case), plain(case, torch.float64))


@pytest.mark.launcher
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nan_and_infinity_pass(activation: str) -> None:
    case = make(activation=activation, residual=True)
    case.x[0, 2, 4, 2] = float("nan")
    case.x[1, 3, 0, 0] = float("inf")
    case.residual[0, 5, 1, 1] = float("nan")
    torch.testing.assert_close(launched(case).cpu(), plain(case), equal_nan=True)


def run_inplace(case: Case, out: Tensor, accumulate: bool, active: list[int] | None, of: ModuleType = module) -> Tensor:
    """What `out` holds after the in-place launcher; `active` of one value is a scalar."""
    flags = None if active is None else torch.tensor(active[0] if len(active) == 1 else active, dtype=torch.int32)
    with Guards() as guards:
        x, weight, scale, shift, _, bank, *rest = case.forward()
        placed = [guards.place(a) for a in (out, x, weight, scale, shift)]
        of.launch_depthwise_(*placed, accumulate, guards.place(bank), guards.place(flags), *rest)
    guards.check()
    return placed[0].cpu()


def check_inplace(case: Case, accumulate: bool, active: list[int] | None, of: ModuleType = module) -> None:
    """Active samples as computed; inactive ones keep their bits, and their NaN stays where it is."""
    on = torch.ones(case.x.shape[0], dtype=torch.bool) if active is None else torch.tensor(active) != 0
    on = on.expand(case.x.shape[0])
    out = torch.randn_like(module.empty_output(case.x, shape(case), None))
    want = replace(case, residual=out if accumulate else None)
    eager, exact = plain(want), plain(want, torch.float64)
    case.x[~on] = float("nan")
    out[~on, ::2] = float("nan")
    y = run_inplace(case, out, accumulate, active, of)
    as_int = torch.int32 if out.dtype == torch.float32 else torch.int16
    assert y[~on].view(as_int).equal(out[~on].view(as_int)), "an inactive sample was written"
    assert_accurate("depthwise_", y[on], eager[on], exact[on])


@pytest.mark.launcher
@pytest.mark.parametrize("accumulate", [True, False])
@pytest.mark.parametrize("layout", [0, 1])
@pytest.mark.parametrize("active", [None, [0], [1], [-1], [0, 0, 0], [1, 1, 1], [0, 1, 0], [2, 0, 1]], ids=str)
def test_bypass(active: list[int] | None, layout: int, accumulate: bool) -> None:
    check_inplace(make(3, 5, 4, 4, layout=layout, bank=[1, 0, 1], dtype=torch.float16), accumulate, active)


@pytest.mark.launcher
def test_output_of_another_dtype_and_layout() -> None:
    case = make(dtype=torch.float16)
    out = torch.randn(shape(case))
    y = run_inplace(case, out, True, None)
    want = replace(case, residual=out)
    assert_accurate("depthwise_", y, plain(want), plain(want, torch.float64))


@pytest.mark.launcher
def test_empty_batch() -> None:
    assert launched(make(0)).shape == (0, 13, 5, 3)


@pytest.mark.launcher
def test_deterministic() -> None:
    case = make(k=5, residual=True)
    assert launched(case).equal(launched(case))


@pytest.mark.launcher
@pytest.mark.skipif(DEVICE == "cuda", reason="counted by the interpreter")
@pytest.mark.parametrize(("k", "stride", "factor"), [(3, 1, 3.9), (5, 1, 7.9), (7, 1, 13), (3, 2, 1.9)])
@pytest.mark.parametrize("layout", [0, 1])
def test_traffic(layout: int, k: int, stride: int, factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reads of x by threads, which L1 and L2 serve all but once: `k (BLOCK_B + k - 1) / BLOCK_B` of each output.

    Unshared they would be k * k. Output written once, residual read once.
    """
    monkeypatch.setattr(module, "SPLITS", 0)  # tiles as for a large batch
    case = make(1, 32, 14, 14, k, stride=stride, layout=layout, residual=True, dtype=torch.float16)
    with traffic() as counts:
        y = module.launch_depthwise(*case.forward())
    assert bytes_of(counts["written"]) == bytes_of(counts["written"], y) == y.nbytes
    assert bytes_of(counts["read"], case.residual) == case.residual.nbytes
    read = bytes_of(counts["read"], case.x) / case.x.nbytes
    assert 1 <= read <= factor, f"x is read {read:.2f} times"


@pytest.mark.launcher
@pytest.mark.skipif(DEVICE == "cuda", reason="the interpreter can run single programs")
@pytest.mark.parametrize("layout", [0, 1])
def test_beyond_2_31_elements(layout: int) -> None:
    """In a sample. Memory is committed where the last program touches it."""
    c, side = 64, 6000
    format = torch.channels_last if layout == 1 else torch.contiguous_format
    x, out = (torch.empty(2, c, side, side, dtype=torch.float16, memory_format=format) for _ in range(2))
    assert x[0].numel() > 2**31
    corner, before = torch.randn(1, c, 70, 70).half(), torch.randn(1, c, 70, 70).half()
    x[-1:, :, -70:, -70:] = corner
    out[-1:, :, -70:, -70:] = before
    weight = torch.randn(c, 1, 3, 3).half()
    with last_programs():
        module.launch_depthwise_(out, x, weight, None, None, True, None, None, "identity", 1, 1)
    exact = F.conv2d(corner.double(), weight.double(), None, 1, 1, 1, c) + before.double()
    actual = out[-1:, -8:, -4:, -4:]
    assert_accurate("depthwise", actual, exact.half()[:, -8:, -4:, -4:], exact[:, -8:, -4:, -4:])


@pytest.mark.launcher
@pytest.mark.skipif(DEVICE == "cuda", reason="mistakes may read anywhere")
@pytest.mark.parametrize("changes", [
    [("bank += n * bank_n", "bank += 0 * bank_n")],
    [("taps[j - p * STRIDE]", "taps[KERNEL - 1 - j + p * STRIDE]")],
    [("(i * weight_a + j * weight_b)", "(j * weight_a + i * weight_b)")],
    [(" & (b_in < B_IN)", "")],
    [("(a_in >= 0) & ", "")],
    [("channel_mask = channel < C", "channel_mask = channel < C - 1")],
    [("n * residual_n * ALIGN", "n * residual_n * 0")],
    [(" & (b + p < B_OUT)", "")],
    [("a * STRIDE + (i - PADDING)", "a + (i - PADDING)")],
], ids=lambda changes: changes[0][0].strip())
def test_mistakes_are_noticed(changes: list[tuple[str, str]], tmp_path: Path) -> None:
    assert_caught(check_some, plant(module, tmp_path, *changes))


def check_some(of: ModuleType = module) -> None:
    check(make(2, 5, 7, 7, stride=2, bank=[0, 1], residual=True), of)


def check_some_in_place(of: ModuleType = module) -> None:
    check_inplace(make(2), True, [1, 0], of)


@pytest.mark.launcher
@pytest.mark.parametrize("check", [check_some, check_some_in_place])
def test_without_mistakes(check: Callable[[], None]) -> None:
    check()


@pytest.mark.launcher
@pytest.mark.skipif(DEVICE == "cuda", reason="mistakes may read anywhere")
@pytest.mark.parametrize("change", [
    ("tl.load(active + n * active_n) == 0", "tl.load(active + n * active_n) == 7"),
    ("tl.load(active + n * active_n) == 0", "tl.load(active) == 0"),
], ids=["ignored", "of the first sample"])
def test_bypass_mistakes_are_noticed(change: tuple[str, str], tmp_path: Path) -> None:
    assert_caught(check_some_in_place, plant(module, tmp_path, change))


# The op, on the CPU


@pytest.mark.parametrize("bank", [None, [1], [0, 1, 1]], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_reference(activation: str, bank: list[int] | None) -> None:
    for layout in LAYOUTS:
        case = make(3, k=5, stride=2, activation=activation, bank=bank, residual=True, layout=layout)
        y = torch.ops.adn.depthwise(*case.forward())
        assert_accurate("depthwise", y, plain(case), plain(case, torch.float64))
        out = torch.randn(shape(case))
        x, weight, scale, shift, _, flags, *rest = case.forward()
        want = plain(replace(case, residual=out), torch.float64)
        active = torch.tensor([1, 0, 1], dtype=torch.int32)
        want[1] = out[1]
        torch.ops.adn.depthwise_(out, x, weight, scale, shift, True, flags, active, *rest)
        assert_close(out, want.float())


def differentiable(case: Case) -> Case:
    parts = {f: getattr(case, f) for f in ("x", "weight", "scale", "shift", "residual")}
    return replace(case, **{f: v if v is None else v.detach().clone().requires_grad_() for f, v in parts.items()})


@pytest.mark.parametrize("bank", [None, [1], [0, 1]], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients(activation: str, bank: list[int] | None) -> None:
    """Against autograd of plain PyTorch in float64."""
    case = make(dtype=torch.float64, stride=2, activation=activation, bank=bank, residual=True)
    actual, wanted = differentiable(case), differentiable(case)
    y, want = torch.ops.adn.depthwise(*actual.forward()), plain(wanted, torch.float64)
    dy = torch.randn(want.shape[::-1], dtype=torch.float64).permute(3, 2, 1, 0)
    y.backward(dy)
    want.backward(dy)
    for part in ("x", "weight", "scale", "shift", "residual"):
        assert_close(getattr(actual, part).grad, getattr(wanted, part).grad, rtol=1e-6, atol=1e-6, msg=part)


def test_gradcheck() -> None:
    case = make(1, 3, 5, 4, dtype=torch.float64, residual=True)
    x, weight, *_ = case.forward()
    scale, shift, residual = case.scale.double(), case.shift.double(), case.residual
    inputs = [t.clone().requires_grad_() for t in (x, weight, scale, shift, residual)]
    torch.autograd.gradcheck(
        lambda x, w, a, b, r: depthwise(x, w, a, b, residual=r, activation="gelu", stride=2, padding=2), [
            *inputs[:4], torch.randn(1, 3, 4, 3, dtype=torch.float64, requires_grad=True)])


def test_bank_not_live_gets_no_gradient() -> None:
    case = make()
    banks = [(case.scale.clone().requires_grad_(), case.shift.clone().requires_grad_()) for _ in range(2)]
    depthwise(case.x, case.weight, *banks[1]).sum().backward()
    assert banks[0][0].grad is None
    assert banks[0][1].grad is None
    assert banks[1][0].grad is not None


@pytest.mark.parametrize("bank", [None, [1, 0]], ids=str)
@pytest.mark.parametrize("layout", [0, 1])
def test_opcheck(layout: int, bank: list[int] | None) -> None:
    case = differentiable(make(2, 4, 5, 5, layout=layout, bank=bank, residual=True))
    torch.library.opcheck(torch.ops.adn.depthwise, case.forward())
    x, weight, scale, shift, residual, *rest = (a.detach() if isinstance(a, Tensor) else a for a in case.forward())
    active = torch.tensor([0, 1], dtype=torch.int32)
    torch.library.opcheck(torch.ops.adn.depthwise_,
                          (residual, x, weight, scale, shift, True, rest[0], active, *rest[1:]))


def with_batch(layout: int) -> Callable:
    def make_args(n: int) -> list[Tensor]:
        case = differentiable(make(n, 16, layout=layout, residual=True))
        return [case.x, case.weight, case.scale, case.shift, case.residual]

    return make_args


def forward(x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor, residual: Tensor) -> Tensor:
    return depthwise(x, weight, scale, shift, residual=residual, activation="silu")


def in_place(x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor, residual: Tensor) -> Tensor:
    with torch.no_grad():
        out = torch.zeros_like(residual) + residual
        active = torch.ones((), dtype=torch.int32, device=x.device)
        return depthwise_(out, x, weight, scale, shift, accumulate=True, activation="silu", active=active)


@pytest.mark.parametrize("layout", [0, 1])
@pytest.mark.parametrize("function", [forward, in_place])
def test_compile_and_export(function: Callable, layout: int) -> None:
    check_compile(function, with_batch(layout))
    check_export(function, with_batch(layout), dynamic=(0, 4))
    check_fake_gpu(function, with_batch(layout)(5), dynamic=(0, 4))


def test_inplace_refuses_autograd() -> None:
    case = differentiable(make())
    with pytest.raises(RuntimeError, match="no backward"):
        depthwise_(torch.zeros(shape(case)), case.x, case.weight)


def test_inplace_returns_out() -> None:
    case = make()
    out = torch.zeros(shape(case))
    assert depthwise_(out, case.x, case.weight, case.scale, case.shift, activation="silu") is out
    assert_close(out, plain(case))


@pytest.mark.parametrize(("changes", "message"), [
    ({"x": torch.zeros(2, 13, 5)}, r"pass \(N, K, H, W\)"),
    ({"weight": torch.zeros(13, 1, 4, 4)}, r"pass \(13, 1, 3, 3 or 5, 5 or 7, 7\)"),
    ({"weight": torch.zeros(13, 1, 3, 5)}, r"pass \(13, 1, 3, 3 or"),
    ({"weight": torch.zeros(12, 1, 3, 3)}, r"pass \(13, 1, 3, 3 or"),
    ({"weight": torch.zeros(26, 1, 3, 3)}, r"pass \(13, 1, 3, 3 or"),
    ({"weight": torch.zeros(13, 1, 3, 3, dtype=torch.float16)}, "one dtype"),
    ({"stride": 3}, "pass 1 or 2"),
    ({"padding": -1}, "a padding of 0 or more"),
    ({"x": torch.zeros(2, 13, 1, 1), "padding": 0}, "smaller than the 3x3 weight"),
    ({"scale": torch.zeros(12)}, r"pass \(13,\)"),
    ({"shift": torch.zeros(13, dtype=torch.float64)}, "contiguous float32"),
    ({"residual": torch.zeros(2, 13, 5, 5)}, "residual has shape"),
    ({"bank": torch.zeros((), dtype=torch.int32)}, "both banks"),
    ({"activation": "tanh"}, "activation='tanh'"),
])
def test_bad_input(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        torch.ops.adn.depthwise(*replace(make(), **changes).forward())


def test_weight_of_no_axes_is_refused() -> None:
    with pytest.raises(ValueError, match=r"weight has shape \(\); pass \(13, 1,"):
        depthwise(make().x, torch.tensor(1.0))


def test_alias_is_refused() -> None:
    case = make(activation="identity")
    with pytest.raises(ValueError, match="x shares memory"):
        depthwise_(case.x, case.x, case.weight)


@pytest.mark.parametrize(("active", "message"), [
    (torch.ones(2), "pass int32"), (torch.ones(3, dtype=torch.int32), r"one per sample \(2\)"),
])
def test_bad_active(active: Tensor, message: str) -> None:
    case = make()
    with pytest.raises(ValueError, match=message):
        depthwise_(torch.zeros(shape(case)), case.x, case.weight, active=active)


# Ahead of time


def _aot(k: int, stride: int, c: int, hw: int, *, channels_last: bool = True, inference: bool = False) -> Callable:
    """Batch 64; `inference`: in place, both banks, bypass and bank per sample."""
    def launch(dtype: torch.dtype, activation: str) -> tuple[int, int]:
        format = torch.channels_last if channels_last else torch.contiguous_format
        x = torch.empty(64, c, hw, hw, dtype=dtype, device="cuda", memory_format=format)
        weight = torch.empty(k, k, 1, c, dtype=dtype, device="cuda").permute(3, 2, 0, 1)
        vector = torch.empty((2, c) if inference else (c,), device="cuda")
        flags = torch.empty(64, dtype=torch.int32, device="cuda")
        if inference:
            y = torch.empty_like(x)
            module.launch_depthwise_(y, x, weight, vector, vector, True, flags, flags, activation, stride, k // 2)
        else:
            y = module.launch_depthwise(x, weight, vector, vector, None, None, activation, stride, k // 2)
        moved = (x.numel() + y.numel() * (1 + inference)) * x.element_size()
        return moved, 2 * k * k * y.numel()

    return launch


AOT = {
    "3x3": _aot(3, 1, 144, 56),
    "3x3 stride 2": _aot(3, 2, 96, 112),
    "5x5": _aot(5, 1, 240, 28),
    "7x7": _aot(7, 1, 256, 20),
    "3x3 in place": _aot(3, 1, 576, 14, inference=True),
    "7x7 in place": _aot(7, 1, 384, 14, inference=True),
    "3x3, C of 72": _aot(3, 1, 72, 28),
}
AOT_EXPECT = {"depthwise_kernel": {"wide_loads", "wide_stores"}}


def test_one_launch() -> None:
    with fake_cuda():
        for case in AOT.values():
            assert len(record(case, torch.bfloat16, "silu")) == 1
