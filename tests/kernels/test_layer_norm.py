"""Layer norm over the last axis, forward and backward: tokens, NCHW seen as (N, H, W, C), banks, residual, bypass."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
import triton
from aot import compile_launch, fake_cuda, record
from conftest import few
from harness import (
    DEVICE,
    DTYPES,
    Guards,
    assert_accurate,
    assert_caught,
    bytes_of,
    examples,
    last_programs,
    plant,
    traffic,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from op_checks import check_compile, check_export, check_fake_gpu
from torch import Tensor

from adn_kernels import layer_norm as ln
from adn_kernels.layer_norm import layer_norm, layer_norm_

EPS = 1e-6
TOKENS = [(1, 1, 1), (7,), (5, 17), (3, 7, 5), (2, 13, 16), (2, 49, 96), (2, 3, 4, 33), (3, 2, 129)]
IMAGES = [(2, 5, 3, 7), (1, 1, 2, 1), (3, 17, 1, 1), (2, 24, 7, 7), (1, 130, 2, 3)]  # NCHW
# residual; values of bank (None: the live one's parameters alone); what there is of the parameters
CASES = {
    "plain": (False, None, "wb"),
    "residual": (True, None, "wb"),
    "one_bank": (False, [1], "wb"),
    "banks": (True, [1, 0], "wb"),
    "bare": (False, None, ""),
    "weight": (True, None, "w"),
    "bias": (False, [0, 1], "b"),
}


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed + 1000 * len(shape) + sum(shape))
    return (torch.randn(shape, generator=generator) * 2 + 0.5).to(dtype)


def tokens(shape: Sequence[int], seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return randn(*shape, seed=seed, dtype=dtype)


def pixels(shape: Sequence[int], seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """(N, H, W, C) that lies as NCHW `shape`."""
    return randn(*shape, seed=seed, dtype=dtype).permute(0, 2, 3, 1)


def parameters(channels: int, kinds: str, dtype: torch.dtype) -> list[Tensor | None]:
    """weight, bias, weight2, bias2."""
    return [randn(channels, seed=i + 1, dtype=dtype) if kind in kinds else None for i, kind in enumerate("wbwb")]


def plain(
    x: Tensor, params: Sequence[Tensor | None], residual: Tensor | None, bank: Sequence[int] | None, eps: float = EPS
) -> tuple[Tensor, Tensor]:
    """y and the sum in plain PyTorch; where types are mixed, computed as autocast does and rounded to the sum's."""
    total = x if residual is None else x + residual
    first = total if total.ndim > 1 else total[None]
    weight, bias, weight2, bias2 = params
    outputs = []
    for part, b in zip(first.chunk(len(bank or [0])), bank or [0]):
        w, s = (weight2, bias2) if b else (weight, bias)
        if any(p is not None and p.dtype != part.dtype for p in (w, s)):
            wide = torch.promote_types(part.dtype, torch.float32)
            y = F.layer_norm(part.to(wide), part.shape[-1:], *(None if p is None else p.to(wide) for p in (w, s)), eps)
        else:
            y = F.layer_norm(part, part.shape[-1:], w, s, eps)
        outputs.append(y.to(total.dtype))
    return torch.cat(outputs).reshape(total.shape), total


def double(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.double() for t in tensors]


def fitting(bank: list[int] | None, shape: Sequence[int]) -> list[int] | None:
    """One value for all where the first axis cannot be split."""
    return bank if bank is None or (len(shape) > 1 and shape[0] % len(bank) == 0) else bank[:1]


def int32(values: Sequence[int] | None) -> Tensor | None:
    return None if values is None else torch.tensor(values, dtype=torch.int32)


def output_strides(x: Tensor) -> tuple[int, ...]:
    """Of y: x's own where its channels are adjacent, else those of a contiguous tensor."""
    return torch.empty_like(x, memory_format=torch.preserve_format if x.stride(-1) == 1 else torch.contiguous_format
                            ).stride()


def check_forward(
    module: ModuleType, x: Tensor, params: Sequence[Tensor | None], residual: Tensor | None = None,
    bank: Sequence[int] | None = None, eps: float = EPS,
) -> tuple[Tensor, Tensor]:
    """The launcher of `module` against plain PyTorch, NaN around all buffers."""
    given = params if bank is not None else [*params[:2], None, None]
    eager = plain(x, params, residual, bank, eps)
    exact = plain(*double(x), double(*params), *double(residual), bank, eps)
    with Guards() as guards:
        placed = [guards.place(t) for t in (x, *given, residual, int32(bank))]
        y, total = module.launch_layer_norm(*placed, eps)
    guards.check()
    assert_accurate("y", y, eager[0], exact[0])
    assert y.stride() == output_strides(x)
    if residual is not None:
        assert_accurate("sum", total, eager[1], exact[1])
        assert total.stride() == torch.empty_like(x).stride()
    return y.cpu(), total.cpu()


def check_backward(
    module: ModuleType, x: Tensor, params: Sequence[Tensor | None], residual: Tensor | None = None,
    bank: Sequence[int] | None = None, dtotal: bool = True, swapped: bool = False,
) -> list[Tensor]:
    """The launcher of the backward against autograd; gradients arrive as y and the sum lie, or the other way round."""

    def autograd(x: Tensor, params: Sequence[Tensor | None], residual: Tensor | None) -> list[Tensor | None]:
        leaves = [None if t is None else t.detach().clone().requires_grad_() for t in (x, residual, *params)]
        y, total = plain(leaves[0], leaves[2:], leaves[1], bank)
        loss = (y.to(torch.float64) * dy.double()).sum()
        if residual is not None and dtotal:
            loss = loss + (total.double() * ds.double()).sum()
        wanted = [t for t in leaves if t is not None]
        found = iter(torch.autograd.grad(loss, wanted, allow_unused=True))
        return [None if t is None else next(found) for t in leaves]

    given = params if bank is not None else [*params[:2], None, None]
    sum_type = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    dy, ds = (randn(*x.shape, seed=seed, dtype=sum_type) for seed in (8, 9))
    eager = autograd(x, params, residual)
    exact = autograd(*double(x), double(*params), *double(residual))
    total = x if residual is None else torch.empty_like(x, dtype=sum_type).copy_(x + residual)
    with Guards() as guards:
        as_x = torch.empty_like(x, dtype=sum_type)
        arriving = (as_x.copy_(dy), ds) if swapped else (dy, as_x.copy_(ds))
        placed = [guards.place(t) for t in (*arriving, total, *given, int32(bank))]
        if residual is None or not dtotal:
            placed[1] = None
        other = x.dtype if residual is None else residual.dtype
        results = module.launch_layer_norm_backward(*placed, EPS, x.dtype, other, True)
    guards.check()
    dx, dresidual, *rest = results
    assert_accurate("dx", dx, eager[0], exact[0])
    assert dx.stride() == torch.empty_like(x).stride()
    if other != x.dtype:
        assert_accurate("dresidual", dresidual, eager[1], exact[1])
    for name, actual, e, f in zip(("dweight", "dbias", "dweight2", "dbias2"), rest, eager[2:], exact[2:]):
        if e is not None:
            # A sum over rows: what is rounded is of the size of its largest term.
            assert_accurate(name, actual, e, f, atol=4e-6)
    return [t.cpu() for t in results]


@pytest.fixture
def few_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter takes milliseconds for a program, and most of them are empty in small tests."""
    monkeypatch.setattr(ln, "SPLITS", 4)


# Launchers


@pytest.mark.launcher
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("shape", TOKENS, ids=str)
def test_forward_tokens(shape: tuple, case: str, dtype: torch.dtype) -> None:
    residual, bank, kinds = CASES[case]
    bank = fitting(bank, shape)
    check_forward(ln, tokens(shape, 0, dtype), parameters(shape[-1], kinds, dtype),
                  tokens(shape, 5, dtype) if residual else None, bank)


@pytest.mark.launcher
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", ["plain", "banks"])
@pytest.mark.parametrize("shape", IMAGES, ids=str)
def test_forward_pixels(shape: tuple, case: str, dtype: torch.dtype) -> None:
    residual, bank, kinds = CASES[case]
    bank = fitting(bank, shape)
    check_forward(ln, pixels(shape, 0, dtype), parameters(shape[1], kinds, dtype),
                  pixels(shape, 5, dtype) if residual else None, bank)


@pytest.mark.launcher
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", ["plain", "residual", "one_bank", "banks", "weight", "bias"])
@pytest.mark.parametrize("shape", TOKENS, ids=str)
def test_backward_tokens(few_splits: None, shape: tuple, case: str, dtype: torch.dtype) -> None:
    residual, bank, kinds = CASES[case]
    bank = fitting(bank, shape)
    check_backward(ln, tokens(shape, 0, dtype), parameters(shape[-1], kinds, dtype),
                   tokens(shape, 5, dtype) if residual else None, bank)


@pytest.mark.launcher
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", ["plain", "banks"])
@pytest.mark.parametrize("shape", IMAGES, ids=str)
def test_backward_pixels(few_splits: None, shape: tuple, case: str, dtype: torch.dtype) -> None:
    residual, bank, kinds = CASES[case]
    bank = fitting(bank, shape)
    check_backward(ln, pixels(shape, 0, dtype), parameters(shape[1], kinds, dtype),
                   pixels(shape, 5, dtype) if residual else None, bank)


def unusual(n: int, rows: int, d: int, seed: int = 0) -> dict[str, Tensor]:
    """Tensors (n, rows, d) or (n, a, b, d) that are neither contiguous nor whole NCHW ones."""
    wide = randn(n, rows + 1, d + 3, seed=seed)
    return {
        "patches": wide[:, 1:, :d],  # without the class token, a slice of channels
        "flattened": randn(n, d, rows, seed=seed).transpose(1, 2),  # flatten(2).transpose(1, 2)
        "sequence_first": randn(rows, n, d, seed=seed).transpose(0, 1),
        "sliced_nchw": randn(n, d + 2, rows, 3, seed=seed)[:, :d].permute(0, 2, 3, 1),
        "channels_last": randn(n, d, rows, 3, seed=seed).contiguous(
            memory_format=torch.channels_last).permute(0, 2, 3, 1),
    }


@pytest.mark.launcher
@pytest.mark.parametrize("bank", [None, [1, 0]], ids=["live", "banks"])
@pytest.mark.parametrize("name", unusual(1, 1, 1))
def test_strides(few_splits: None, name: str, bank: list[int] | None) -> None:
    x, residual = unusual(4, 5, 19)[name], unusual(4, 5, 19, seed=3)[name]
    params = parameters(19, "wb", torch.float32)
    check_forward(ln, x, params, residual, bank)
    check_backward(ln, x, params, residual, bank)
    # A residual that lies otherwise is read in place as well.
    check_forward(ln, x, params, residual.contiguous(), bank)
    check_backward(ln, x, params, residual, bank, swapped=True)


@pytest.mark.launcher
def test_expanded() -> None:
    x, params = tokens((1, 5, 19)), parameters(19, "wb", torch.float32)
    with Guards() as guards:
        one, weight, bias, _, _ = (guards.place(t) for t in (x, *params))
        y, _ = ln.launch_layer_norm(one.expand(4, -1, -1), weight, bias, None, None, None, None, EPS)
    guards.check()
    exact, _ = plain(*double(x), double(*params), None, None)
    assert_accurate("y", y, plain(x, params, None, None)[0].expand(4, -1, -1), exact.expand(4, -1, -1))


def backward_with(dy: Tensor, dtotal: Tensor | None, x: Tensor, params: Sequence[Tensor | None]) -> list[Tensor]:
    args = [None if t is None else t.to(DEVICE) for t in (dy, dtotal, x, *params[:2])]
    return ln.launch_layer_norm_backward(*args, None, None, None, EPS, x.dtype, x.dtype, True)


@pytest.mark.launcher
@pytest.mark.parametrize("x", [randn(3, 5, 8), randn(3, 8, 5).transpose(1, 2)], ids=["tokens", "flattened"])
@pytest.mark.parametrize("axes", [(0, 1), (0,), (0, 1, 2)], ids=str)
def test_expanded_gradients(few_splits: None, axes: tuple[int, ...], x: Tensor) -> None:
    """Of a sum over some axes: as if they were not."""
    params = parameters(8, "wb", torch.float32)
    dy, ds = (randn(*(1 if i in axes else n for i, n in enumerate(x.shape)), seed=i).expand(x.shape) for i in (1, 2))
    torch.testing.assert_close(
        backward_with(dy, ds, x, params), backward_with(dy.contiguous(), ds.contiguous(), x, params))


@pytest.mark.launcher
@pytest.mark.interpreter
@pytest.mark.parametrize("make", [tokens, pixels])
def test_gradients_are_not_copied(few_splits: None, make: Callable) -> None:
    """Contiguous ones, whatever lies how in x, and any stride of an axis of one element."""
    x, params = make((1, 6, 8) if make is tokens else (1, 8, 2, 3)), parameters(8, "wb", torch.float32)
    dy, ds = (randn(*x.shape, seed=i).as_strided(x.shape, (777, *x[0].contiguous().stride())) for i in (1, 2))
    with traffic() as counts:
        backward_with(dy, ds, x, params)
    assert [bytes_of(counts["read"], t) for t in (dy, ds)] == [4 * x.numel()] * 2


@pytest.mark.launcher
@settings(deadline=None, derandomize=True, max_examples=examples(25))
@given(st.integers(1, 5), st.integers(1, 9), st.integers(1, 70), st.booleans(), st.booleans(), st.data())
def test_any_shape(n: int, rows: int, d: int, as_pixels: bool, residual: bool, data: st.DataObject) -> None:
    parts = data.draw(st.sampled_from([p for p in range(1, n + 1) if n % p == 0]))
    bank = data.draw(st.none() | st.lists(st.integers(0, 1), min_size=parts, max_size=parts))
    make, shape = (pixels, (n, d, rows, 2)) if as_pixels else (tokens, (n, rows, d))
    check_forward(ln, make(shape), parameters(d, "wb", torch.float32), make(shape, 4) if residual else None, bank)


@pytest.mark.launcher
@pytest.mark.parametrize(("x_type", "residual_type", "parameter_type"), [
    (torch.float16, None, torch.float32), (torch.float16, torch.float32, torch.float32),
    (torch.float32, torch.float16, torch.float16), (torch.float16, torch.float16, torch.float32),
])
def test_mixed_types(few_splits: None, x_type, residual_type, parameter_type) -> None:
    x, params = tokens((2, 9, 20), 0, x_type), parameters(20, "wb", parameter_type)
    residual = None if residual_type is None else tokens((2, 9, 20), 3, residual_type)
    check_forward(ln, x, params, residual, [0, 1])
    check_backward(ln, x, params, residual, [0, 1])


@pytest.mark.launcher
def test_all_splits() -> None:
    """As many programs as on any GPU, the last of them empty."""
    check_backward(ln, tokens((2, 45, 6)), parameters(6, "wb", torch.float32), None, [1, 0])


@pytest.mark.launcher
@pytest.mark.parametrize("bank", [[0, 1, 1], [1, 1, 1]], ids=str)
def test_more_parts_than_splits(monkeypatch: pytest.MonkeyPatch, bank: list[int]) -> None:
    monkeypatch.setattr(ln, "SPLITS", 2)
    check_backward(ln, tokens((3, 4, 6)), parameters(6, "wb", torch.float32), None, bank)


@pytest.mark.launcher
def test_gradient_of_sum_only_where_it_arrives(few_splits: None) -> None:
    x, residual = tokens((2, 6, 10)), tokens((2, 6, 10), 1)
    check_backward(ln, x, parameters(10, "wb", torch.float32), residual, dtotal=False)


@pytest.mark.launcher
def test_no_parameter_gradients(few_splits: None) -> None:
    x, params = tokens((2, 6, 10)), parameters(10, "wb", torch.float32)
    with Guards() as guards:
        args = [guards.place(t) for t in (tokens((2, 6, 10), 2), None, x, *params, int32([0, 1]))]
        both = [ln.launch_layer_norm_backward(*args, EPS, x.dtype, x.dtype, affine) for affine in (True, False)]
    assert torch.equal(both[0][0], both[1][0])
    assert [t.numel() for t in both[1][1:]] == [0] * 5


@pytest.mark.launcher
@pytest.mark.parametrize("make", [tokens, pixels])
def test_large_mean(make: Callable) -> None:
    """A variance of E[x^2] - E[x]^2 would be lost."""
    shape = (2, 40, 33) if make is tokens else (2, 33, 5, 8)
    check_forward(ln, make(shape) + 3000, parameters(33, "wb", torch.float32))


@pytest.mark.launcher
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_stays_in_its_row(few_splits: None, value: float) -> None:
    x, params = tokens((2, 9, 20)), parameters(20, "wb", torch.float32)
    x[1, 3, 7] = value
    y, _ = check_forward(ln, x, params)
    assert y.isnan().any(-1).nonzero().tolist() == [[1, 3]]
    # A NaN in one bank's part stays out of the other's gradient.
    x, dy = x.to(DEVICE), tokens((2, 9, 20), 2).to(DEVICE)
    results = ln.launch_layer_norm_backward(
        dy, None, x, *(p.to(DEVICE) for p in params), int32([0, 1]).to(DEVICE), EPS, x.dtype, x.dtype, True)
    dx, _, dweight, dbias, dweight2, _ = results
    assert dx.isnan().any(-1).nonzero().tolist() == [[1, 3]]
    assert dweight2.isnan().all()
    assert bool(dweight.isfinite().all())
    assert bool(dbias.isfinite().all())


@pytest.mark.launcher
def test_eps_zero(few_splits: None) -> None:
    """Rows of padding in a tile have variance 0: without eps their NaN must not reach the sums."""
    x, params = tokens((1, 5, 6)), parameters(6, "wb", torch.float32)
    check_forward(ln, x, params, eps=0.0)
    args = [t.to(DEVICE) for t in (tokens((1, 5, 6), 2), x, *params[:2])]
    dy, x, weight, bias = args
    results = ln.launch_layer_norm_backward(dy, None, x, weight, bias, None, None, None, 0.0, x.dtype, x.dtype, True)
    assert all(bool(t.isfinite().all()) for t in results)


@pytest.mark.launcher
@pytest.mark.parametrize("shape", [(0, 3, 4), (3, 0, 4), (3, 2, 0)], ids=str)
def test_empty(shape: tuple) -> None:
    x, params = tokens(shape).to(DEVICE), [p.to(DEVICE) for p in parameters(shape[-1], "wb", torch.float32)]
    for bank in (None, int32([1]), int32([])):
        both = [*params[:2], None, None] if bank is None else params
        bank = None if bank is None else bank.to(DEVICE)
        y, total = ln.launch_layer_norm(x, *both, x, bank, EPS)
        assert y.shape == total.shape == shape
        results = ln.launch_layer_norm_backward(y, None, x, *both, bank, EPS, x.dtype, x.dtype, True)
        assert results[0].shape == shape
        assert all(bool((t == 0).all()) for t in results[2:])


@pytest.mark.launcher
@pytest.mark.parametrize("active", [None, [0], [1], [1, 0, 0, 1], [0, 0, 0, 0]], ids=str)
@pytest.mark.parametrize("make", [tokens, pixels])
def test_in_place(make: Callable, active: list[int] | None) -> None:
    check_in_place(ln, make, active)


def check_in_place(module: ModuleType, make: Callable, active: list[int] | None) -> None:
    """Active samples are those of `launch_layer_norm`; the others keep every bit, and their NaN to themselves."""
    shape = (4, 9, 19) if make is tokens else (4, 19, 3, 3)
    x, params = make(shape), parameters(19, "wb", torch.float32)
    flags = torch.tensor(active if active is not None else [1], dtype=torch.bool).expand(4)
    for i in (~flags).nonzero():
        x[i] = math.nan
    with Guards() as guards:
        placed = [guards.place(t) for t in (x, *params[:2], int32(active))]
        out = guards.place(make(shape, 9))
        before = out.clone()
        y, _ = module.launch_layer_norm(*placed[:3], None, None, None, None, EPS, out, placed[3])
    guards.check()
    assert y is out
    want, exact = plain(x, params, None, None)[0], plain(*double(x), double(*params), None, None)[0]
    assert_accurate("active", out[flags], want[flags], exact[flags])
    assert torch.equal(out[~flags].view(torch.int32), before[~flags].view(torch.int32))


@pytest.mark.launcher
def test_in_place_into_another_type() -> None:
    x, params = tokens((2, 5, 8), 0, torch.float16), parameters(8, "wb", torch.float32)
    with Guards() as guards:
        out = guards.place(torch.zeros(2, 5, 8))
        ln.launch_layer_norm(*(guards.place(t) for t in (x, *params[:2])), None, None, None, None, EPS, out)
    guards.check()
    exact, _ = plain(*double(x), double(*params), None, None)
    assert_accurate("out", out, plain(x.float(), params, None, None)[0], exact)


@pytest.mark.launcher
def test_in_place_within_a_buffer() -> None:
    """`out` and x are different channels of one buffer."""
    params = parameters(8, "wb", torch.float32)
    buffer = tokens((2, 5, 32)).to(DEVICE)
    before = buffer.clone()
    out, x = buffer[..., :8], buffer[..., 24:]
    ln.launch_layer_norm(x, *(p.to(DEVICE) for p in params[:2]), None, None, None, None, EPS, out)
    given = before[..., 24:].cpu()
    exact, _ = plain(*double(given), double(*params), None, None)
    assert_accurate("out", out, plain(given, params, None, None)[0], exact)
    assert torch.equal(buffer[..., 8:], before[..., 8:])


@pytest.mark.launcher
@pytest.mark.parametrize("make", [tokens, pixels])
def test_deterministic(few_splits: None, make: Callable) -> None:
    shape = (2, 30, 40) if make is tokens else (2, 40, 5, 6)
    x, residual, params = make(shape), make(shape, 1), parameters(40, "wb", torch.float32)
    for check in (check_forward, check_backward):
        first, second = (check(ln, x, params, residual, [1, 0]) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, second))


@pytest.mark.launcher
@pytest.mark.interpreter
@pytest.mark.parametrize("make", [tokens, pixels])
def test_traffic(make: Callable) -> None:
    """Each tensor is touched once. Every program reads the parameters, but they are small and stay in the cache."""
    shape = (4, 48, 96) if make is tokens else (4, 96, 6, 8)
    x, residual, (weight, bias, *_) = make(shape), make(shape, 1), parameters(96, "wb", torch.float32)
    size, programs = x.numel() * 4, 12 if make is tokens else 8
    with traffic() as counts:
        y, total = ln.launch_layer_norm(x, weight, bias, None, None, residual, None, EPS)
    assert [bytes_of(counts["read"], t) for t in (x, residual)] == [size, size]
    assert [bytes_of(counts["written"], t) for t in (y, total)] == [size, size]
    assert bytes_of(counts["read"], weight, bias) == programs * 2 * 96 * 4
    assert [sum(counts[kind].values()) for kind in ("read", "written")] == [
        2 * size + programs * 2 * 96 * 4, 2 * size]


@pytest.mark.launcher
@pytest.mark.interpreter
@pytest.mark.parametrize("make", [tokens, pixels])
def test_traffic_backward(few_splits: None, make: Callable) -> None:
    """Three passes, four with a gradient of the sum, and the sums of each program.

    Those of 264 programs, written and read, are 5.6 % of the three passes over 64 x 197 tokens of 768 in bf16.
    """
    shape = (4, 48, 96) if make is tokens else (4, 96, 6, 8)
    x, dy, ds, (weight, bias, *_) = make(shape), make(shape, 1), make(shape, 2), parameters(96, "wb", torch.float32)
    size = x.numel() * 4
    with traffic() as counts:
        dx, *_ = ln.launch_layer_norm_backward(dy, ds, x, weight, bias, None, None, None, EPS, x.dtype, x.dtype, True)
    assert [bytes_of(counts["read"], t) for t in (x, dy, ds)] == [size] * 3
    assert bytes_of(counts["written"], dx) == size
    partial = 4 * 96 * 4
    assert sum(counts["written"].values()) == size + 2 * partial + 2 * 96 * 4
    assert sum(counts["read"].values()) == 3 * size + 2 * partial + 4 * 96 * 4  # the weight, by each program


@pytest.mark.launcher
@pytest.mark.interpreter
@pytest.mark.parametrize("make", ["tokens", "pixels", "one_sample"])
def test_beyond_2_31_elements(monkeypatch: pytest.MonkeyPatch, make: str) -> None:
    """`one_sample`: a tile of its own goes that far."""
    n, rows = (1, 2**25 + 64) if make == "one_sample" else (2**31 // (64 * 8192) + 1, 8192)
    x = torch.empty(n, rows, 64, dtype=torch.float16) if make == "tokens" else torch.empty(
        n, 64, rows, dtype=torch.float16).transpose(1, 2)
    assert x.numel() > 2**31
    last = x[-1, -64:]
    last.copy_(randn(64, 64))
    weight, bias, *_ = parameters(64, "wb", torch.float32)
    with last_programs():
        y, _ = ln.launch_layer_norm(x, weight, bias, None, None, None, None, EPS)
    want, _ = plain(last[-8:], [weight, bias, None, None], None, None)
    torch.testing.assert_close(y[-1, -8:], want)
    monkeypatch.setattr(ln, "SPLITS", n * rows // 32)  # a tile for each, so that the last has the last one
    with last_programs():
        dx, *_ = ln.launch_layer_norm_backward(
            x, None, x, weight, None, None, None, None, EPS, x.dtype, x.dtype, False)
    leaf = last[-1:].float().requires_grad_()
    F.layer_norm(leaf, (64,), weight, None, EPS).backward(last[-1:].float())
    torch.testing.assert_close(dx[-1, -1:].float(), leaf.grad, rtol=2e-3, atol=2e-3)


def planted_forward(module: ModuleType) -> None:
    check_forward(module, tokens((2, 5, 12)), parameters(12, "wb", torch.float32), tokens((2, 5, 12), 1), [1, 0])


def planted_backward(module: ModuleType) -> None:
    module.SPLITS = 6
    check_backward(module, tokens((2, 70, 12)), parameters(12, "wb", torch.float32), tokens((2, 70, 12), 1), [1, 0])


def planted_pixels(module: ModuleType) -> None:
    module.SPLITS = 6
    check_backward(module, pixels((2, 12, 3, 5)), parameters(12, "wb", torch.float32), pixels((2, 12, 3, 5), 1))


def planted_in_place(module: ModuleType) -> None:
    check_in_place(module, tokens, [1, 0, 0, 1])


@pytest.mark.launcher
@pytest.mark.parametrize(("check", "right", "wrong"), [
    (planted_forward, "is_second = tl.load(bank + unit // units_per_bank) != 0",
     "is_second = tl.load(bank + unit // units_per_bank) == 0"),
    (planted_forward, "is_second = tl.load(bank + unit // units_per_bank) != 0", "is_second = tl.load(bank) != 0"),
    (planted_forward, "centred = tl.where(mask, v - (tl.sum(v, 1) / D)[:, None], 0.0)",
     "centred = v - (tl.sum(v, 1) / D)[:, None]"),
    (planted_forward, "mask = (first + row < rows)[:, None] & channel_mask[None, :]\n    at = tile_at(x",
     "mask = (first + row < rows)[:, None] & (channel < CHANNELS)[None, :]\n    at = tile_at(x"),
    (planted_pixels, "dy, unit, first, row, channel, dy_unit, dy_row, dy_channel,",
     "dy, unit, first, row, channel, dx_unit, dx_row, dx_channel,"),
    (planted_forward, "v = rounded.to(tl.float32)", "v = v"),
    (planted_in_place, "active + unit // units_per_flag", "active"),
    (planted_backward, "tl.where(tile < units_per_part * tiles, rows, 0)",
     "tl.where(tile < units_per_part * tiles - 1, rows, 0)"),
    (planted_backward, "partial, first, second, bank, splits", "partial, second, first, bank, splits"),
    (planted_backward, "- z * (tl.sum(g * z, 1) / D)[:, None]", ""),
    (planted_backward, "unit = part * units_per_part + tile // tiles", "unit = tile // tiles"),
    (planted_backward, "g += tl.load(at, mask=mask, other=0.0).to(tl.float32)", "g = g"),
], ids=range(12))
def test_planted_mistakes(few_splits: None, tmp_path: Path, check: Callable, right: str, wrong: str) -> None:
    check(ln)
    assert_caught(check, plant(ln, tmp_path, (right, wrong)))


# The op: reference, registration, backward


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("make", [tokens, pixels])
def test_reference(make: Callable, case: str, dtype: torch.dtype) -> None:
    residual, bank, kinds = CASES[case]
    shape = (4, 7, 12) if make is tokens else (4, 12, 3, 3)
    x, params = make(shape, 0, dtype), parameters(12, kinds, dtype)
    leaves = [None if t is None else t.requires_grad_() for t in (x, make(shape, 5, dtype) if residual else None)]
    for p in params:
        if p is not None:
            p.requires_grad_()
    weight, bias = (params[0], params[1]) if bank is None else (
        tuple(params[0::2]) if "w" in kinds else None, tuple(params[1::2]) if "b" in kinds else None)
    y = layer_norm(leaves[0], weight, bias, residual=leaves[1], bank=int32(bank))
    outputs = list(y) if residual else [y]
    wanted = [t for t in (*leaves, *params) if t is not None]
    grads = [torch.randn(o.shape, generator=torch.Generator().manual_seed(i)).to(o) for i, o in enumerate(outputs)]
    actual = torch.autograd.grad(outputs, wanted, grads, allow_unused=True)
    references = []
    for kind in (dtype, torch.float64):
        copies = [None if t is None else t.detach().to(kind).requires_grad_() for t in (*leaves, *params)]
        expected = list(plain(copies[0], copies[2:], copies[1], bank))[:len(outputs)]
        found = torch.autograd.grad(expected, [t for t in copies if t is not None], [g.to(kind) for g in grads],
                                    allow_unused=True)
        references.append((expected, found))
    (eager, eager_grads), (exact, exact_grads) = references
    for a, e, f, strides in zip(outputs, eager, exact, (output_strides(x), x.stride())):
        assert_accurate("output", a, e, f)
        assert a.stride() == strides
    assert actual[0].stride() == x.stride()
    for a, e, f in zip(actual, eager_grads, exact_grads):
        if e is not None:
            assert_accurate("gradient", a, e, f, atol=4e-6)
        else:  # of a bank that the device did not choose
            assert a is None or not a.any()


def test_gradcheck() -> None:
    params = [p.double().requires_grad_() for p in parameters(5, "wb", torch.float32)]
    x, residual = (randn(4, 3, 5, seed=i).double().requires_grad_() for i in (0, 1))

    def function(x, residual, weight, bias, weight2, bias2):
        return layer_norm(x, (weight, weight2), (bias, bias2), residual=residual, bank=int32([1, 0]))

    assert torch.autograd.gradcheck(function, (x, residual, *params))


@pytest.mark.parametrize("values", [1, 2])
def test_bank_may_change_before_backward(values: int) -> None:
    """Self-distillation: the super-net, then the base net, then one backward for both."""
    params = [p.requires_grad_() for p in parameters(5, "wb", torch.float32)]
    x, bank = randn(4, 3, 5), torch.zeros(values, dtype=torch.int32)
    total = 0
    for which in (0, 1):
        bank.fill_(which)
        total = total + layer_norm(x, tuple(params[0::2]), tuple(params[1::2]), bank=bank).square().sum()
    expected = sum(plain(x, params, None, [which])[0].square().sum() for which in (0, 1))
    torch.testing.assert_close(torch.autograd.grad(total, params), torch.autograd.grad(expected, params))


def test_no_second_derivative() -> None:
    x = tokens((2, 3, 4)).requires_grad_()
    dx, = torch.autograd.grad(layer_norm(x, torch.ones(4), None).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="adn::layer_norm_backward has no second derivative"):
        dx.sum().backward()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("bank", [None, [], [1]], ids=str)
@pytest.mark.parametrize("shape", [(0, 3, 4), (3, 0, 4), (0, 4)], ids=str)
def test_empty_op(shape: tuple[int, ...], bank: list[int] | None) -> None:
    if bank == [] and shape[0] != 0:
        bank = [0] * shape[0]
    x, params = tokens(shape).requires_grad_(), parameters(4, "wb", torch.float32)
    params = [p.requires_grad_() for p in params[:2 if bank is None else 4]]
    weight, bias = params if bank is None else (tuple(params[0::2]), tuple(params[1::2]))
    y, total = layer_norm(x, weight, bias, residual=x * 2, bank=int32(bank))
    assert y.shape == total.shape == shape
    (y.sum() + total.sum()).backward()
    assert x.grad.shape == shape
    assert all(p.grad.tolist() == [0] * 4 for p in params)


def test_gradient_of_the_sum_alone() -> None:
    x, residual = (tokens((2, 3, 4), seed).requires_grad_() for seed in (0, 1))
    _, total = layer_norm(x, torch.ones(4), None, residual=residual)
    total.backward(torch.full_like(total, 2.0))
    assert bool((x.grad == 2).all())
    assert bool((residual.grad == 2).all())


def test_other_bank_gets_no_gradient() -> None:
    live, other = torch.nn.LayerNorm(6), torch.nn.LayerNorm(6)
    for _ in range(2):
        layer_norm(tokens((2, 3, 6)), live.weight, live.bias).sum().backward()
    assert live.weight.grad is not None
    assert other.weight.grad is None


@pytest.mark.parametrize("make", [tokens, pixels])
def test_in_place_op(make: Callable) -> None:
    shape = (4, 7, 12) if make is tokens else (4, 12, 3, 3)
    x, params = make(shape), parameters(12, "wb", torch.float32)
    out, want = torch.zeros_like(x), layer_norm(x, params[0], params[1])
    assert layer_norm_(out, x, params[0], params[1], active=int32([1, 0, 1, 0])) is out
    assert torch.equal(out[::2], want[::2])
    assert not out[1::2].any()
    layer_norm_(out, x, params[0], params[1])
    assert torch.equal(out, want)
    buffer = torch.zeros(*x.shape[:-1], 24)
    buffer[..., :12] = x
    layer_norm_(buffer[..., 12:], buffer[..., :12], params[0], params[1])
    assert torch.equal(buffer[..., :12], x)
    assert torch.equal(buffer[..., 12:], out)


def test_two_steps() -> None:
    torch.manual_seed(0)
    norms = [torch.nn.LayerNorm(8, eps=EPS) for _ in range(2)]
    norms[1].load_state_dict(norms[0].state_dict())
    optimizers = [torch.optim.SGD(norm.parameters(), 0.1) for norm in norms]
    for step in range(2):
        x = tokens((2, 3, 8), step)
        for optimizer, y in zip(optimizers, (norms[0](x), layer_norm(x, norms[1].weight, norms[1].bias))):
            optimizer.zero_grad()
            y.square().mean().backward()
            optimizer.step()
    torch.testing.assert_close(*(dict(norm.named_parameters()) for norm in norms))


def op_args(make: Callable, residual: bool, bank: list[int] | None, grad: bool = True) -> tuple:
    shape = (4, 7, 12) if make is tokens else (4, 12, 3, 3)
    params = parameters(12, "wb", torch.float32)
    if bank is None:
        params[2:] = None, None
    x, r = make(shape), make(shape, 1) if residual else None
    tensors = [x, *params, r]
    return (*(t.requires_grad_() if grad and t is not None else t for t in tensors), int32(bank), EPS)


@pytest.mark.parametrize(("make", "residual", "bank"), few(
    [(tokens, False, None), (tokens, True, [1, 0]), (pixels, False, None), (pixels, True, [1, 0])],
    lambda case: case[1] == (case[0] is pixels)))
def test_opcheck(make: Callable, residual: bool, bank: list[int] | None) -> None:
    args = op_args(make, residual, bank)
    torch.library.opcheck(ln.layer_norm_op, args)
    x, weight, bias, weight2, bias2, r, bank_values, eps = (
        t.detach() if isinstance(t, Tensor) else t for t in args)
    dy = torch.randn_like(x)
    torch.library.opcheck(ln.layer_norm_backward_op, (
        dy, r, x, weight, bias, weight2, bias2, bank_values, eps, x.dtype, torch.float64, True))
    torch.library.opcheck(ln.layer_norm_inplace_op, (
        torch.zeros_like(x), x, weight, bias, int32([1, 0, 0, 1]), eps))


def one_bank(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return layer_norm(x, weight, bias)


def with_residual(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    return layer_norm(x, weight, bias, residual=residual)


def two_banks(
    x: Tensor, weight: Tensor, bias: Tensor, weight2: Tensor, bias2: Tensor, residual: Tensor, bank: Tensor
) -> tuple[Tensor, Tensor]:
    return layer_norm(x, (weight, weight2), (bias, bias2), residual=residual, bank=bank)


def in_place(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return layer_norm_(torch.zeros_like(x), x, weight, bias)


def arguments(function: Callable, make: Callable, grad: bool = True) -> Callable[[int], tuple]:
    def make_args(batch: int) -> tuple:
        shape = (batch, 7, 16) if make is tokens else (batch, 16, 3, 3)
        weight, bias, weight2, bias2 = parameters(16, "wb", torch.float32)
        x, residual = make(shape), make(shape, 1)
        args = {
            one_bank: (x, weight, bias), with_residual: (x, weight, bias, residual),
            two_banks: (x, weight, bias, weight2, bias2, residual, int32([1, 0])),
            in_place: (x, weight, bias),
        }[function]
        return tuple(t.requires_grad_() if grad and t.is_floating_point() else t for t in args)

    return make_args


@pytest.mark.parametrize("make", [tokens, pixels])
@pytest.mark.parametrize("function", [one_bank, two_banks])
def test_compile(function: Callable, make: Callable) -> None:
    check_compile(function, arguments(function, make))


@pytest.mark.parametrize("make", [tokens, pixels])
def test_compile_in_place(make: Callable) -> None:
    check_compile(in_place, arguments(in_place, make, grad=False))


@pytest.mark.parametrize("function", [one_bank, two_banks])
def test_export(function: Callable) -> None:
    check_export(function, arguments(function, tokens, grad=False), (0,) if function is one_bank else (0, 5))


@pytest.mark.parametrize("make", [tokens, pixels])
def test_fake_gpu(make: Callable) -> None:
    check_fake_gpu(one_bank, arguments(one_bank, make)(6))
    check_fake_gpu(with_residual, arguments(with_residual, make)(6), (0, 3))
    check_fake_gpu(in_place, arguments(in_place, make, grad=False)(6), (0, 3))
    # One value of `bank` per sample.
    *args, _ = arguments(two_banks, make)(6)
    check_fake_gpu(two_banks, (*args, int32([1, 0, 1, 0, 1, 1])), (0, 5, 6))


def backward_of(x: Tensor, weight: Tensor, bias: Tensor, dy: Tensor) -> list[Tensor]:
    return ln.layer_norm_backward_op(dy, None, x, weight, bias, None, None, None, EPS, x.dtype, x.dtype, True)


@pytest.mark.parametrize("make", [tokens, pixels])
def test_fake_gpu_backward(make: Callable) -> None:
    check_fake_gpu(backward_of, arguments(with_residual, make, grad=False)(6), (0, 3))


BAD = {
    "integers": (lambda x, w: layer_norm(x.long(), w, w), "pass floats of shape"),
    "scalar": (lambda x, w: layer_norm(x[0, 0, 0], w, w), "pass floats of shape"),
    "wide": (lambda x, w: layer_norm(torch.zeros(2, 4097), None, None), "at most 4096"),
    "strides": (lambda x, w: layer_norm(torch.zeros(2, 3, 8)[..., ::2], w, w), r"pass x.contiguous\(\)"),
    "rows": (lambda x, w: layer_norm(torch.zeros(2, 3, 9, 4)[:, :, :7], w, w), r"pass x.contiguous\(\)"),
    "residual_shape": (lambda x, w: layer_norm(x, w, w, residual=x[:1]), "residual has shape"),
    "residual_strides": (lambda x, w: layer_norm(x, w, w, residual=torch.zeros(2, 3, 8)[..., ::2]),
                         r"pass residual.contiguous\(\)"),
    "residual_type": (lambda x, w: layer_norm(x, w, w, residual=x.long()), "residual is torch.int64"),
    "weight_shape": (lambda x, w: layer_norm(x, w[:3], w), r"weight .* pass contiguous floats of shape \(4,\)"),
    "bias_strides": (lambda x, w: layer_norm(x, w, torch.zeros(8)[::2]), "bias .* pass contiguous floats"),
    "weight_device": (lambda x, w: layer_norm(x, w.to("meta"), w), "weight is on meta, x on cpu"),
    "residual_device": (lambda x, w: layer_norm(x, w, w, residual=x.to("meta")), "residual is .* on meta"),
    "pair": (lambda x, w: layer_norm(x, (w, w), w), "no `bank` is given"),
    "no_pair": (lambda x, w: layer_norm(x, w, (w, w), bank=int32([1])), "pass weight as a pair"),
    "half_pair": (lambda x, w: layer_norm(x, (w, None), (w, w), bank=int32([1])), "pass weight as a pair"),
    "number": (lambda x, w: layer_norm(x, 1.0, None), "weight is a float; pass a tensor of shape"),
    "eps": (lambda x, w: layer_norm(x, w, w, eps=-1.0), "eps=-1.0; pass a number that is not negative"),
    "slices": (lambda x, w: layer_norm_((b := torch.zeros(2, 3, 8))[..., :4], b[..., 3:7], w, w), "x shares memory"),
    "bank_type": (lambda x, w: layer_norm(x, (w, w), (w, w), bank=torch.tensor([1])), "bank is torch.int64"),
    "bank_parts": (lambda x, w: layer_norm(x, (w, w), (w, w), bank=int32([1, 0, 1])), "as many equal parts"),
    "active_shape": (lambda x, w: layer_norm_(x.clone(), x, w, w, active=int32([1, 0, 1])), "one per sample"),
    "out_shape": (lambda x, w: layer_norm_(x[:1].clone(), x, w, w), "out has shape"),
    "out_is_x": (lambda x, w: layer_norm_(x, x, w, w), "x shares memory with the output"),
    "out_expanded": (lambda x, w: layer_norm_(x[:1].clone().expand(2, 3, 4), x, w, w), "the output is expanded"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str) -> None:
    call, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        call(tokens((2, 3, 4)), torch.ones(4))


def test_in_place_refuses_autograd() -> None:
    x, weight = tokens((2, 3, 4)), torch.ones(4, requires_grad=True)
    with pytest.raises(RuntimeError, match="layer_norm_ is for inference and has no backward"):
        layer_norm_(torch.empty_like(x), x, weight, None)
    with torch.no_grad():
        layer_norm_(torch.empty_like(x), x, weight, None)


# Ahead-of-time compilation

AOT_EXPECT = {
    "layer_norm_kernel": {"wide_loads", "wide_stores"},
    "layer_norm_backward_kernel": {"wide_loads", "wide_stores"},
    "column_sum_kernel": {"wide_loads"},
}

def AOT_OF_CHANNELS(c: int) -> list[Callable]:
    return [_aot_forward((64, 56, 56, c)), _aot_backward((64, 56, 56, c), residual=True)]


def _aot_forward(
    shape: tuple[int, ...], as_pixels: bool = False, residual: bool = False, banks: bool = False, active: bool = False
) -> Callable[[torch.dtype, str], tuple[int, int]]:
    def launch(dtype: torch.dtype, activation: str) -> tuple[int, int]:
        x, r, out = (_aot_tensor(shape, as_pixels, dtype) for _ in range(3))
        params = [torch.empty(shape[-1], device="cuda") if i < 2 or banks else None for i in range(4)]
        bank = torch.empty(shape[0], dtype=torch.int32, device="cuda") if banks else None
        if active:
            flags = torch.empty(shape[0], dtype=torch.int32, device="cuda")
            ln.launch_layer_norm(x, *params, None, None, EPS, out, flags)
        else:
            ln.launch_layer_norm(x, *params, r if residual else None, bank, EPS)
        return (4 if residual else 2) * x.nbytes, 0

    return launch


def _aot_backward(
    shape: tuple[int, ...], as_pixels: bool = False, residual: bool = False, banks: bool = False
) -> Callable[[torch.dtype, str], tuple[int, int]]:
    def launch(dtype: torch.dtype, activation: str) -> tuple[int, int]:
        x, ds = (_aot_tensor(shape, as_pixels, dtype) for _ in range(2))
        dy = _aot_tensor(shape, False, dtype)
        params = [torch.empty(shape[-1], device="cuda") if i < 2 or banks else None for i in range(4)]
        bank = torch.empty(2, dtype=torch.int32, device="cuda") if banks else None
        ln.launch_layer_norm_backward(dy, ds if residual else None, x, *params, bank, EPS, dtype, dtype, True)
        return (4 if residual else 3) * x.nbytes, 0

    return launch


def _aot_tensor(shape: tuple[int, ...], as_pixels: bool, dtype: torch.dtype) -> Tensor:
    if as_pixels:
        n, h, w, c = shape
        return torch.empty(n, c, h, w, dtype=dtype, device="cuda").permute(0, 2, 3, 1)
    return torch.empty(shape, dtype=dtype, device="cuda")


AOT = {
    "swin_96": _aot_forward((64, 56, 56, 96)),
    "vit_768_residual_banks": _aot_forward((64, 197, 768), residual=True, banks=True),
    "vit_1024_in_place": _aot_forward((64, 197, 1024), active=True),
    "tokens_4096": _aot_forward((64, 197, 4096), residual=True),
    "convnext_96": _aot_forward((64, 56, 56, 96), as_pixels=True),
    "convnext_384_residual_banks": _aot_forward((64, 28, 28, 384), as_pixels=True, residual=True, banks=True),
    "swin_96_backward": _aot_backward((64, 56, 56, 96)),
    "vit_768_backward_residual_banks": _aot_backward((64, 197, 768), residual=True, banks=True),
    "tokens_2048_backward": _aot_backward((64, 197, 2048), residual=True),
    "convnext_96_backward": _aot_backward((64, 56, 56, 96), as_pixels=True, residual=True, banks=True),
    "convnext_768_backward": _aot_backward((64, 28, 28, 768), as_pixels=True, residual=True, banks=True),
}


@pytest.mark.parametrize(("channels", "dtype"), [
    (384, torch.bfloat16), (768, torch.bfloat16), (768, torch.float32), (2048, torch.float16), (4096, torch.bfloat16),
], ids=str)
def test_sums_stay_within_a_warp(channels: int, dtype: torch.dtype) -> None:
    """Where backward adds up the rows of each tile, all warps lie along a row: none waits for another to add."""
    with fake_cuda("sm_90"):
        kernel, *_ = record(_aot_backward((64, 197, channels), residual=True, banks=True), dtype, "identity")
    binaries, compile = [], triton.compile
    with mock.patch.object(triton, "compile", lambda *a, **k: binaries.append(compile(*a, **k)) or binaries[-1]):
        found = compile_launch(kernel, "sm_90")
    assert not found["spills"]
    warps = set(re.findall(r"warpsPerCTA = \[(\d+), (\d+)\]", binaries[0].asm["ttgir"]))
    assert kernel.args["SUM_ROWS"] == (channels >= 768)
    if kernel.args["SUM_ROWS"]:
        assert warps == {("1", str(kernel.options["num_warps"]))}
