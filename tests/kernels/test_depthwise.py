"""Depthwise convolution: the kernel against plain PyTorch, its traffic, its bypass. Its op is tested with `conv`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from aot import fake_cuda, record
from conv_cases import Conv as Case
from conv_cases import bits, conv_case
from harness import (
    DEVICE,
    DTYPES,
    Guards,
    assert_accurate,
    assert_caught,
    bytes_of,
    examples,
    last_programs,
    layouts,
    plant,
    traffic,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import adn_kernels.depthwise as module
from adn_kernels.activation import ACTIVATIONS
from adn_kernels.conv import lay_out
from adn_kernels.epilogue import empty_output

LAYOUTS = range(4)  # of `harness.layouts`


def make(
    n: int = 2, c: int = 13, h: int = 5, w: int = 3, k: int = 3, *, stride: int = 1, padding: int | None = None,
    layout: int = 1, dtype: torch.dtype = torch.float32, activation: str = "silu", residual: bool = False,
    bank: list[int] | None = None, seed: int = 0,
) -> Case:
    """Random values; `bank` of one value is a scalar."""
    case = conv_case(
        n, c, h, w, c, k, groups=c, stride=stride, padding=k // 2 if padding is None else padding, dtype=dtype,
        activation=activation, residual=residual, bank=bank[0] if bank is not None and len(bank) == 1 else bank,
        seed=seed)
    case.x = layouts(case.x)[layout]
    if residual:
        case.residual = layouts(case.residual)[layout]
    return case


def launched(case: Case, of: ModuleType = module) -> Tensor:
    """What the launcher computes, all buffers between guards."""
    with Guards() as guards:
        placed = case.placed(guards)
        y = empty_output(placed.x, case.shape, placed.residual)
        of.launch_depthwise(y, placed.x, placed.weight, *placed.vectors, placed.residual, placed.bank, None,
                            case.activation, case.stride, case.padding)
    guards.check()
    return y


def check(case: Case, of: ModuleType = module) -> None:
    y = launched(case, of)
    assert_accurate("depthwise", y, case.torch(), case.double().torch())


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
@settings(max_examples=examples(20), deadline=None, derandomize=True)
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
def test_weight_laid_out(layout: int) -> None:
    case = make(2, 16, k=5, layout=layout)
    check(replace(case, weight=lay_out(case.weight, case.groups)))


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
    assert_accurate("depthwise", y, case.torch(), case.double().torch())


@pytest.mark.launcher
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nan_and_infinity_pass(activation: str) -> None:
    case = make(activation=activation, residual=True)
    case.x[0, 2, 4, 2] = float("nan")
    case.x[1, 3, 0, 0] = float("inf")
    case.residual[0, 5, 1, 1] = float("nan")
    torch.testing.assert_close(launched(case).cpu(), case.torch(), equal_nan=True)


def run_inplace(case: Case, out: Tensor, accumulate: bool, active: list[int] | None, of: ModuleType = module) -> Tensor:
    """What `out` holds after the in-place launcher; `active` of one value is a scalar."""
    flags = None if active is None else torch.tensor(active[0] if len(active) == 1 else active, dtype=torch.int32)
    with Guards() as guards:
        given, placed = case.placed(guards), guards.place(out)
        of.launch_depthwise(placed, given.x, given.weight, *given.vectors, placed if accumulate else None, given.bank,
                            guards.place(flags), case.activation, case.stride, case.padding)
    guards.check()
    return placed.cpu()


def check_inplace(case: Case, accumulate: bool, active: list[int] | None, of: ModuleType = module) -> None:
    """Active samples as computed; inactive ones keep their bits, and their NaN stays where it is."""
    on = torch.ones(case.x.shape[0], dtype=torch.bool) if active is None else torch.tensor(active) != 0
    on = on.expand(case.x.shape[0])
    out = torch.randn_like(empty_output(case.x, case.shape, None))
    want = replace(case, residual=out if accumulate else None)
    eager, exact = want.torch(), want.double().torch()
    case.x[~on] = float("nan")
    out[~on, ::2] = float("nan")
    y = run_inplace(case, out, accumulate, active, of)
    assert bits(y[~on]).equal(bits(out[~on])), "an inactive sample was written"
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
    out = torch.randn(case.shape)
    y = run_inplace(case, out, True, None)
    want = replace(case, residual=out)
    assert_accurate("depthwise_", y, want.torch(), want.double().torch())


@pytest.mark.launcher
def test_deterministic() -> None:
    case = make(k=5, residual=True)
    assert launched(case).equal(launched(case))


@pytest.mark.launcher
@pytest.mark.interpreter
@pytest.mark.parametrize(("k", "stride", "factor"), [(3, 1, 3.9), (5, 1, 7.9), (7, 1, 13), (3, 2, 1.9)])
@pytest.mark.parametrize("layout", [0, 1])
def test_traffic(layout: int, k: int, stride: int, factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reads of x by threads, which L1 and L2 serve all but once: `k (BLOCK_B + k - 1) / BLOCK_B` of each output.

    Unshared they would be k * k. Output written once, residual read once.
    """
    monkeypatch.setattr(module, "SPLITS", 0)  # tiles as for a large batch
    case = make(1, 32, 14, 14, k, stride=stride, layout=layout, residual=True, dtype=torch.float16)
    with traffic() as counts:
        y = torch.empty_like(case.residual)
        module.launch_depthwise(y, case.x, case.weight, *case.vectors, case.residual, None, None, "silu", stride,
                                case.padding)
    assert bytes_of(counts["written"]) == bytes_of(counts["written"], y) == y.nbytes
    assert bytes_of(counts["read"], case.residual) == case.residual.nbytes
    read = bytes_of(counts["read"], case.x) / case.x.nbytes
    assert 1 <= read <= factor, f"x is read {read:.2f} times"


@pytest.mark.launcher
@pytest.mark.interpreter
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
        module.launch_depthwise(out, x, weight, *[None] * 4, out, None, None, "identity", 1, 1)
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


# Ahead of time


def _aot(k: int, stride: int, c: int, hw: int, *, channels_last: bool = True, inference: bool = False) -> Callable:
    """Batch 64; `inference`: in place, both banks, bypass and bank per sample."""
    def launch(dtype: torch.dtype, activation: str) -> tuple[int, int]:
        format = torch.channels_last if channels_last else torch.contiguous_format
        x = torch.empty(64, c, hw, hw, dtype=dtype, device="cuda", memory_format=format)
        weight = torch.empty(k, k, 1, c, dtype=dtype, device="cuda").permute(3, 2, 0, 1)
        vectors = [torch.empty(c, device="cuda") if inference or i < 2 else None for i in range(4)]
        flags = torch.empty(64, dtype=torch.int32, device="cuda") if inference else None
        out = -(-hw // stride)
        y = torch.empty(64, c, out, out, dtype=dtype, device="cuda", memory_format=format)
        module.launch_depthwise(y, x, weight, *vectors, y if inference else None, flags, flags, activation, stride,
                                k // 2)
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

def AOT_OF_CHANNELS(c: int) -> list[Callable]:
    return [_aot(3, 1, c, 56), _aot(3, 2, c, 56), _aot(7, 1, c, 14, inference=True)]


def test_one_launch() -> None:
    with fake_cuda():
        for case in AOT.values():
            assert len(record(case, torch.bfloat16, "silu")) == 1
