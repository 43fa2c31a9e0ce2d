"""Batch norm with fixed statistics, activation and residual add: kernels, reference, op."""

from __future__ import annotations

import functools
import importlib
import itertools
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
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
    layouts,
    plant,
    traffic,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from op_checks import check_compile, check_export, check_fake_gpu
from torch.testing import assert_close

from adn_kernels.activation import ACTIVATIONS, act_reference
from adn_kernels.batch_norm_eval import batch_norm_eval

module = importlib.import_module("adn_kernels.batch_norm_eval")  # the package has a function of that name
EPS = 1e-3
LAYOUTS = ("nchw", "nhwc", "slice of nchw", "slice of nhwc")
BANKS = (None, 0, 1, (0, 1, 1), (1, 0, 7))
GRADIENTS = ("x", "residual", "weight", "bias", "weight2", "bias2")


def int32(values: int | tuple[int, ...] | None) -> torch.Tensor | None:
    return None if values is None else torch.tensor(values, dtype=torch.int32)


def random(shape: tuple[int, ...], layout: str = "nchw", dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return layouts(torch.randn(shape).to(dtype))[LAYOUTS.index(layout)]


def parameters(channels: int, dtype: torch.dtype = torch.float32, affine: bool = True) -> list[torch.Tensor | None]:
    """Weight, bias, mean, var of one bank."""
    weight, bias = torch.randn(channels).to(dtype), torch.randn(channels).to(dtype)
    return [weight if affine else None, bias if affine else None, torch.randn(channels), torch.rand(channels) + 0.2]


def operands(
    shape: tuple[int, ...], layout: str = "nchw", dtype: torch.dtype = torch.float32,
    residual: torch.dtype | None = None, bank: int | tuple[int, ...] | None = None, affine: bool = True,
    affine_dtype: torch.dtype = torch.float32, residual_layout: str | None = None,
) -> tuple:
    """The arguments of the op up to `var2`."""
    return (
        random(shape, layout, dtype), *parameters(shape[1], affine_dtype, affine),
        None if residual is None else random(shape, residual_layout or layout, residual), int32(bank),
        *(parameters(shape[1], affine_dtype, affine) if bank is not None else [None] * 4),
    )


def in_torch(args: tuple, activation: str, double: bool = False) -> torch.Tensor:
    """The same by `F.batch_norm`, each sample with its bank; in float64, or in the types of the arguments."""
    x, w, b, m, v, residual, bank, w2, b2, m2, v2 = (
        t.double() if double and t is not None and t.is_floating_point() else t for t in args)
    # torch wants parameters of x's type, or float32 ones where x is of half precision.
    kind = torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype

    def norm(x, w, b, m, v):
        w, b, m, v = (t if t is None else t.to(kind) for t in (w, b, m, v))
        return F.batch_norm(x, m, v, w, b, False, 0.0, EPS)

    if bank is None:
        y = norm(x, w, b, m, v)
    else:
        banks = bank.reshape(-1).expand(x.shape[0]).tolist()
        y = torch.cat([norm(x[i:i + 1], w, b, m, v) if which == 0 else norm(x[i:i + 1], w2, b2, m2, v2)
                       for i, which in enumerate(banks)])
    return act_reference(y if residual is None else y + residual, activation)


def gradients_in_torch(args: tuple, dy: torch.Tensor, activation: str, double: bool = False) -> list:
    args = tuple(t.detach().double() if double and t is not None and t.is_floating_point() else t for t in args)
    wanted = [args[i] for i in (0, 5, 1, 2, 7, 8)]
    leaves = [None if t is None else t.detach().requires_grad_() for t in wanted]
    args = (leaves[0], *leaves[2:4], *args[3:5], leaves[1], args[6], *leaves[4:], *args[9:])
    given = [leaf for leaf in leaves if leaf is not None]
    found = iter(torch.autograd.grad(in_torch(args, activation), given, dy.double() if double else dy,
                                     allow_unused=True, materialize_grads=True))
    return [None if leaf is None else next(found) for leaf in leaves]


def check_forward(module: ModuleType, args: tuple, activation: str) -> None:
    with Guards() as guards:
        placed = [guards.place(t) for t in args]
        y = module.launch_batch_norm_eval(*placed, activation, EPS)
        guards.check()
    assert_accurate("y", y, in_torch(args, activation), in_torch(args, activation, double=True))
    if y.is_contiguous() == y.is_contiguous(memory_format=torch.channels_last):
        return
    assert y.is_contiguous(memory_format=torch.channels_last) == (args[0].stride(1) == 1)


def check_backward(
    module: ModuleType, args: tuple, activation: str, needs: tuple[bool, ...] | None = None, dy_layout: str = "nchw"
) -> None:
    dtype = args[0].dtype if args[5] is None else torch.promote_types(args[0].dtype, args[5].dtype)
    dy = random(tuple(args[0].shape), dy_layout, dtype)
    given = [args[i] is not None for i in (0, 5, 1, 2, 7, 8)]
    needs = [a and b for a, b in zip(given, needs or (True,) * 6)]
    with Guards() as guards:
        placed = [guards.place(t) for t in args]
        found = module.launch_batch_norm_eval_backward(guards.place(dy), *placed, activation, EPS, needs)
        guards.check()
    eager = gradients_in_torch(args, dy, activation)
    exact = gradients_in_torch(args, dy, activation, double=True)
    for name, need, a, e, x in zip(GRADIENTS, needs, found, eager, exact):
        if not need:
            assert a.numel() == 0
            continue
        # Parameters' gradients are sums: eager's error there is luck of one order of summation.
        assert_accurate(f"gradient of {name}", a, e, x, atol=1e-6 if a.ndim == 4 else 5e-6)


@pytest.mark.launcher
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_forward(dtype: torch.dtype, residual: bool, activation: str, layout: str) -> None:
    torch.manual_seed(0)
    args = operands((3, 21, 5, 7), layout, dtype, residual=dtype if residual else None)
    check_forward(module, args, activation)


@pytest.mark.launcher
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_backward(dtype: torch.dtype, activation: str, layout: str) -> None:
    torch.manual_seed(0)
    check_backward(module, operands((3, 21, 5, 7), layout, dtype, residual=dtype), activation, dy_layout=layout)


@pytest.mark.launcher
@pytest.mark.parametrize("bank", BANKS[1:], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS[:2])
@pytest.mark.parametrize("shape", [(3, 21, 5, 7), (3, 70, 1, 1), (3, 1, 9, 4)], ids=str)
def test_banks(shape: tuple[int, ...], layout: str, bank: int | tuple[int, ...]) -> None:
    torch.manual_seed(0)
    args = operands(shape, layout, residual=torch.float32, bank=bank)
    check_forward(module, args, "silu")
    check_backward(module, args, "silu", dy_layout=layout)


@pytest.mark.launcher
@pytest.mark.parametrize("bank", [None, 1, (0, 1, 1)], ids=str)
@pytest.mark.parametrize("activation", ["identity", "relu"])
@pytest.mark.parametrize(
    "wanted", [("x",), ("residual",), ("x", "residual"), ("weight", "weight2"), ("bias", "bias2"), ("x", "bias"),
               ("weight2",)], ids=str)
def test_only_wanted_gradients(wanted: tuple[str, ...], activation: str, bank: int | tuple[int, ...] | None) -> None:
    if bank is None and wanted == ("weight2",):
        wanted = ("x",)
    torch.manual_seed(0)
    args = operands((3, 18, 5, 3), "nhwc", residual=torch.float32, bank=bank)
    check_backward(module, args, activation, tuple(name in wanted for name in GRADIENTS), dy_layout="nhwc")


@pytest.mark.launcher
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("dtype", "residual"), [
    (torch.float32, None), (torch.float16, None), (torch.float16, torch.float32), (torch.float32, torch.float16)],
    ids=str)
def test_backward_without_x(dtype: torch.dtype, residual: torch.dtype | None, layout: str) -> None:
    """Identity, frozen: as with x, of whose type and layout dx is all the same, whatever dy is."""
    torch.manual_seed(0)
    args = operands((3, 18, 5, 3), layout, dtype, residual=residual, bank=(0, 1, 1))
    dy = random((3, 18, 5, 3), "nhwc", dtype if residual is None else torch.promote_types(dtype, residual))
    channels_last = layout.endswith("nhwc")
    with Guards() as guards:
        x, *rest = (guards.place(t) for t in args)
        rest[4] = None
        call = functools.partial(module.launch_batch_norm_eval_backward, guards.place(dy))
        needs = (True, False, False, True, False, True)
        found = call(None, *rest, "identity", EPS, needs, dtype, channels_last)
        with_x = call(x, *rest, "identity", EPS, needs)
        guards.check()
    assert found[0].is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    assert found[0].dtype == dtype
    assert all(torch.equal(a, b) for a, b in zip(found, with_x))
    exact = gradients_in_torch(args, dy, "identity", double=True)
    assert_accurate("dx", found[0], gradients_in_torch(args, dy, "identity")[0], exact[0])


@pytest.mark.launcher
@pytest.mark.parametrize("bank", [None, 1], ids=str)
def test_without_affine_parameters(bank: int | None) -> None:
    torch.manual_seed(0)
    args = operands((2, 7, 3, 3), residual=torch.float32, bank=bank, affine=False)
    check_forward(module, args, "gelu")
    check_backward(module, args, "gelu")


@pytest.mark.launcher
@pytest.mark.parametrize("which", ["weight", "bias"])
def test_without_one_affine_parameter(which: str) -> None:
    torch.manual_seed(0)
    args = list(operands((2, 7, 3, 3)))
    args[1 if which == "weight" else 2] = None
    check_forward(module, tuple(args), "relu6")
    check_backward(module, tuple(args), "relu6")


@pytest.mark.launcher
@pytest.mark.parametrize("affine", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("residual", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mixed_types(dtype: torch.dtype, residual: torch.dtype, affine: torch.dtype) -> None:
    torch.manual_seed(0)
    args = operands((2, 19, 4, 3), "nhwc", dtype, residual=residual, affine_dtype=affine)
    check_forward(module, args, "relu")
    check_backward(module, args, "relu")


@pytest.mark.launcher
@pytest.mark.parametrize("residual_layout", LAYOUTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_may_differ(layout: str, residual_layout: str) -> None:
    torch.manual_seed(0)
    args = operands((2, 19, 4, 3), layout, residual=torch.float32, residual_layout=residual_layout)
    check_forward(module, args, "relu")
    check_backward(module, args, "relu", dy_layout=residual_layout)


@pytest.mark.launcher
@pytest.mark.parametrize("layout", LAYOUTS[:2])
def test_expanded_gradient(layout: str) -> None:
    """As a sum has: no stride at all."""
    torch.manual_seed(0)
    args = operands((2, 5, 3, 4), layout)
    placed = [None if t is None else t.to(DEVICE) for t in args]
    dy = torch.ones((), device=DEVICE).expand(2, 5, 3, 4)
    found = module.launch_batch_norm_eval_backward(dy, *placed, "silu", EPS, (True, False, True, True, False, False))
    exact = gradients_in_torch(args, dy.cpu(), "silu", double=True)
    for i in (0, 2, 3):
        assert_close(found[i].cpu(), exact[i].float(), rtol=1e-5, atol=1e-5)


@pytest.mark.launcher
@settings(max_examples=examples(40), deadline=None, derandomize=True)
@given(
    shape=st.tuples(st.integers(1, 4), st.integers(1, 80), st.integers(1, 12), st.integers(1, 12)),
    layout=st.sampled_from(LAYOUTS), per_sample=st.booleans(),
)
def test_shapes(shape: tuple[int, int, int, int], layout: str, per_sample: bool) -> None:
    torch.manual_seed(0)
    bank = tuple(i % 2 for i in range(shape[0])) if per_sample else None
    args = operands(shape, layout, residual=torch.float32, bank=bank)
    check_forward(module, args, "hardswish")
    check_backward(module, args, "hardswish", dy_layout=layout)


@pytest.mark.launcher
@pytest.mark.parametrize("layout", LAYOUTS[:2])
@pytest.mark.parametrize("shape", [(2, 3, 67, 70), (16, 64, 6, 6)], ids=str)
def test_many_tiles(shape: tuple[int, ...], layout: str) -> None:
    torch.manual_seed(0)
    args = operands(shape, layout, bank=1)
    check_forward(module, args, "relu")
    check_backward(module, args, "relu", dy_layout=layout)


@pytest.mark.launcher
def test_4096_channels() -> None:
    torch.manual_seed(0)
    args = operands((1, 4096, 1, 2), "nhwc")
    check_forward(module, args, "relu")
    check_backward(module, args, "relu", (True,) + (False,) * 5, dy_layout="nhwc")


@pytest.mark.launcher
@pytest.mark.parametrize("layout", LAYOUTS[:2])
def test_several_tiles_per_program(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As large tensors have."""
    monkeypatch.setattr(module, "SPLITS", 1)
    torch.manual_seed(0)
    args = operands((2, 5, 39, 37), layout, residual=torch.float32, bank=(0, 1))
    check_forward(module, args, "silu")
    check_backward(module, args, "silu", dy_layout=layout)
    check_backward(module, args, "silu", (True, True, False, False, False, False), dy_layout=layout)


@pytest.mark.launcher
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nan_stays_where_it_is(activation: str) -> None:
    """One in x gives one in y, and in the gradients of its channel."""
    torch.manual_seed(0)
    args = operands((2, 6, 3, 3), "nhwc", residual=torch.float32, bank=(0, 1))
    args[0][1, 2, 0, 1] = float("nan")
    placed = [None if t is None else t.to(DEVICE) for t in args]
    y = module.launch_batch_norm_eval(*placed, activation, EPS)
    assert y.isnan().nonzero().tolist() == [[1, 2, 0, 1]]
    grads = module.launch_batch_norm_eval_backward(torch.ones_like(y), *placed, activation, EPS, (True,) * 6)
    assert not torch.cat(grads[2:4]).isnan().any()
    assert grads[4].isnan().nonzero().tolist() == [[2]]


@pytest.mark.launcher
def test_statistics_far_from_zero() -> None:
    """Where folding the mean into the shift would lose digits."""
    torch.manual_seed(0)
    args = list(operands((2, 16, 5, 5), "nhwc"))
    args[3] = args[3] + 1e4
    args[0] = args[0] + 1e4
    check_forward(module, tuple(args), "identity")


@pytest.mark.launcher
@pytest.mark.parametrize("layout", LAYOUTS[:2])
def test_deterministic(layout: str) -> None:
    torch.manual_seed(0)
    args = operands((3, 21, 9, 7), layout, residual=torch.float32, bank=(0, 1, 0))
    placed = [None if t is None else t.to(DEVICE) for t in args]
    dy = torch.randn(3, 21, 9, 7, device=DEVICE)
    first, second = (
        [module.launch_batch_norm_eval(*placed, "gelu", EPS),
         *module.launch_batch_norm_eval_backward(dy, *placed, "gelu", EPS, (True,) * 6)] for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


@pytest.mark.launcher
@pytest.mark.parametrize("shape", [(0, 5, 3, 3), (2, 5, 0, 3)], ids=str)
def test_empty(shape: tuple[int, ...]) -> None:
    args = [None if t is None else t.to(DEVICE) for t in operands(shape)]
    y = module.launch_batch_norm_eval(*args, "relu", EPS)
    assert y.shape == shape
    dx, _, dweight, dbias, *_ = module.launch_batch_norm_eval_backward(
        y, *args, "relu", EPS, (True, False, True, True, False, False))
    assert dx.shape == shape
    assert dweight.tolist() == dbias.tolist() == [0] * 5


@pytest.mark.launcher
@pytest.mark.interpreter
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize(("layout", "splits", "allowed"), [("nchw", 1, 1.05), ("nhwc", 1, 1.05), ("nhwc", 264, 1.13)])
def test_bytes_moved(
    layout: str, splits: int, allowed: float, residual: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """x, residual and y once each. The rest are parameters: 16 bytes per channel for 128 pixels of NHWC, or for 32
    where the tensor is so small (less than 4224 tiles of 4 KB) that programs have one tile each."""
    monkeypatch.setattr(module, "SPLITS", splits)
    args = operands((4, 64, 28, 28), layout, torch.float16, residual=torch.float16 if residual else None)
    with traffic() as counts:
        y = module.launch_batch_norm_eval(*args, "relu", EPS)
    size = args[0].numel() * 2
    assert bytes_of(counts["read"], args[0]) == bytes_of(counts["written"], y) == size
    total = bytes_of(counts["read"]) + bytes_of(counts["written"])
    assert total <= allowed * (3 if residual else 2) * size


@pytest.mark.launcher
@pytest.mark.interpreter
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("affine", [False, True])
def test_bytes_moved_backward(layout: str, affine: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """dy, x, residual, dx and dresidual once each, with the gradients of weight and bias too; 1.05 times that."""
    monkeypatch.setattr(module, "SPLITS", 1)
    args = operands((4, 64, 28, 28), layout, torch.float16, residual=torch.float16)
    dy = random((4, 64, 28, 28), layout, torch.float16)
    with traffic() as counts:
        grads = module.launch_batch_norm_eval_backward(
            dy, *args, "relu", EPS, (True, True, affine, affine, False, False))
    size = args[0].numel() * 2
    for t in (dy, args[0], args[5]):
        assert bytes_of(counts["read"], t) == size
    assert bytes_of(counts["written"], grads[0]) == bytes_of(counts["written"], grads[1]) == size
    assert bytes_of(counts["read"]) + bytes_of(counts["written"]) <= 1.05 * 5 * size


@pytest.mark.launcher
@pytest.mark.interpreter
def test_reads_only_what_it_needs() -> None:
    """Frozen, identity: dx takes dy alone."""
    args = operands((4, 32, 4, 4), "nhwc", residual=torch.float32)
    dy = random((4, 32, 4, 4), "nhwc")
    with traffic() as counts:
        module.launch_batch_norm_eval_backward(dy, *args, "identity", EPS, (True,) + (False,) * 5)
    assert bytes_of(counts["read"], args[0], args[5]) == 0


@pytest.mark.launcher
@pytest.mark.interpreter
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_more_than_2_to_the_31_elements(layout: str) -> None:
    shape = (3, 64, 3360, 3360)
    memory = torch.channels_last if layout == "nhwc" else torch.contiguous_format
    x, dy = (torch.empty(shape, dtype=torch.float16, memory_format=memory) for _ in range(2))
    assert x.numel() > 2**31
    tail = torch.randn(64).half()
    x[-1, :, -1, -1] = tail
    dy[-1, :, -1, -1] = 1.0
    weight, bias, mean, var = parameters(64)
    args = (x, weight, bias, mean, var, None, None, None, None, None, None)
    with last_programs():
        y = module.launch_batch_norm_eval(*args, "identity", EPS)
        dx, *_ = module.launch_batch_norm_eval_backward(dy, *args, "silu", EPS, (True,) + (False,) * 5)
    small = (tail[None, :, None, None], *args[1:])
    # The last program of NCHW has two channels.
    last = slice(-2, None) if layout == "nchw" else slice(None)
    eager, exact = in_torch(small, "identity"), in_torch(small, "identity", double=True)
    assert_accurate("y", y[-1, last, -1, -1], eager.flatten()[last], exact.flatten()[last])
    one = torch.ones(1, 64, 1, 1).half()
    eager, exact = (gradients_in_torch(small, one, "silu", double)[0].flatten()[last] for double in (False, True))
    assert_accurate("dx", dx[-1, last, -1, -1], eager, exact)


MISTAKES = {
    "swapped bank": ("is_second = tl.load(bank) != 0", "is_second = tl.load(bank) == 0"),
    "bank of the first sample": ("bank += n.to(tl.int64) * bank_stride", "bank += 0 * bank_stride"),
    # By one, not by more: beyond the guards lies the memory of others.
    "one pixel too many": ("p0 + p < P)", "p0 + p < P + 1)"),
    "one channel too few": ("cmask = c < C", "cmask = c < C - 1"),
    "no mean": (".to(tl.float32) - mean[None, :]", ".to(tl.float32)"),
    "residual of the first sample": ("tile_at(residual, n,", "tile_at(residual, n * 0,"),
    "unrelated gradient of the residual": ("tl.store(at, g.to(dresidual", "tl.store(at, (g * scale).to(dresidual"),
    "no derivative of the activation": ("g *= act_grad(z, ACTIVATION)", "g *= 1.0"),
    "gradient of the other bank": ("partial, total, total2, bank, splits", "partial, total2, total, bank, splits"),
    "sum without rstd": ("tl.sum(weight_sum, 0) * rstd", "tl.sum(weight_sum, 0)"),
    "first tile again": ("        p0 += BP\n", "        p0 += 0\n"),
}


def check_all(module: ModuleType) -> None:
    """Several tiles per program, several samples, both banks."""
    for layout in ("nhwc", "nchw"):
        torch.manual_seed(0)
        args = operands((3, 5, 29, 37), layout, residual=torch.float32, bank=(0, 1, 1))
        check_forward(module, args, "silu")
        check_backward(module, args, "silu", dy_layout=layout)


@pytest.mark.launcher
@pytest.mark.skipif(DEVICE == "cuda", reason="mistakes may read anywhere")
def test_notices_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SPLITS", 1)
    check_all(module)


@pytest.mark.launcher
@pytest.mark.skipif(DEVICE == "cuda", reason="mistakes may read anywhere")
@pytest.mark.parametrize("mistake", MISTAKES)
def test_notices(mistake: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planted = plant(module, tmp_path, MISTAKES[mistake])
    monkeypatch.setattr(planted, "SPLITS", 1)
    assert_caught(check_all, planted)


# The op, on the CPU: its reference.


def banked(args: tuple) -> tuple:
    """(x, weight, bias, mean, var) as the function takes them, and its keywords."""
    x, *first, residual, bank = args[:7]
    if bank is not None:
        first = list(zip(first, args[7:]))
    return (x, *first), {"residual": residual, "bank": bank, "eps": EPS}


@pytest.mark.parametrize("bank", BANKS, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_op_is_torch(activation: str, bank: int | tuple[int, ...] | None) -> None:
    torch.manual_seed(0)
    args = operands((3, 6, 4, 5), "nhwc", torch.float64, residual=torch.float64, bank=bank, affine_dtype=torch.float64)
    positional, keywords = banked(args)
    for i in (0, 1, 2, 5, 7, 8):
        if args[i] is not None:
            args[i].requires_grad_()
    y = batch_norm_eval(*positional, activation=activation, **keywords)
    assert_close(y, in_torch(args, activation))
    assert y.stride() == args[0].stride()
    dy = torch.randn_like(y)
    leaves = [t for i, t in enumerate(args) if i in (0, 5, 1, 2, 7, 8) and t is not None]
    found = torch.autograd.grad(y, leaves, dy)
    exact = torch.autograd.grad(in_torch(args, activation), leaves, dy, allow_unused=True, materialize_grads=True)
    assert_close(found, exact)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_reference_is_accurate(dtype: torch.dtype, layout: str) -> None:
    torch.manual_seed(0)
    args = operands((3, 6, 4, 5), layout, dtype, residual=torch.float32)
    y = module.batch_norm_eval_reference(*args, "gelu", EPS)
    assert_accurate("y", y, in_torch(args, "gelu"), in_torch(args, "gelu", double=True))
    dy = torch.randn(3, 6, 4, 5)
    needs = (True,) * 4 + (False,) * 2
    found = module.batch_norm_eval_backward_reference(dy, *args, "gelu", EPS, needs)
    for a, e, x in zip(found[:4], gradients_in_torch(args, dy, "gelu"), gradients_in_torch(args, dy, "gelu", True)):
        assert_accurate("gradient", a, e, x, atol=5e-6)


@pytest.mark.parametrize("activation", ["silu", "gelu", "identity"])
def test_gradcheck(activation: str) -> None:
    torch.manual_seed(0)
    args = operands((2, 3, 2, 2), dtype=torch.float64, residual=torch.float64, bank=(0, 1), affine_dtype=torch.float64)
    leaves = [args[i].requires_grad_() for i in (0, 5, 1, 2, 7, 8)]

    def function(x, residual, weight, bias, weight2, bias2):
        return module.batch_norm_eval_op(x, weight, bias, *args[3:5], residual, args[6], weight2, bias2, *args[9:],
                                         activation, EPS)

    assert torch.autograd.gradcheck(function, leaves)


def test_frozen_parameters_have_no_gradient() -> None:
    """Buffers only: dx and dresidual come, nothing else."""
    args = operands((2, 3, 2, 2), residual=torch.float32)
    x, residual = args[0].requires_grad_(), args[5].requires_grad_()
    batch_norm_eval(*args[:5], residual=residual, activation="relu").sum().backward()
    assert [t.grad is None for t in (x, residual, *args[1:5])] == [False, False, True, True, True, True]


def test_residual_of_identity_gets_the_gradient_itself() -> None:
    args = operands((2, 3, 2, 2), residual=torch.float16)
    residual = args[5].requires_grad_()
    batch_norm_eval(*args[:5], residual=residual).backward(torch.full((2, 3, 2, 2), 1.5))
    assert_close(residual.grad, torch.full((2, 3, 2, 2), 1.5, dtype=torch.float16))


@pytest.mark.parametrize(("activation", "trained", "kept"), [
    ("identity", (), ()), ("identity", ("bias", "bias2"), ()), ("identity", ("weight",), ("x",)),
    ("identity", ("weight2",), ("x",)), ("relu", (), ("x", "residual")),
], ids=str)
def test_keeps_only_what_backward_reads(activation: str, trained: tuple, kept: tuple) -> None:
    args = operands((2, 3, 2, 2), residual=torch.float32, bank=(0, 1))
    named = dict(zip(GRADIENTS, (args[i] for i in (0, 5, 1, 2, 7, 8))))
    for name in ("x", "residual", *trained):
        named[name].requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        positional, keywords = banked(args)
        y = batch_norm_eval(*positional, activation=activation, **keywords)
    maps = [t for t in saved if t.numel() >= args[0].numel()]
    assert [t.data_ptr() for t in maps] == [named[name].data_ptr() for name in kept]
    dy = torch.randn_like(y)
    leaves = [t for t in named.values() if t.requires_grad]
    assert_close(torch.autograd.grad(y, leaves, dy), torch.autograd.grad(in_torch(args, activation), leaves, dy))


@pytest.mark.parametrize("bank", [0, (0, 0)], ids=str)
def test_bank_may_change_before_backward(bank: int | tuple[int, ...]) -> None:
    """Self-distillation: the super-net, then the base net, then one backward for both."""
    args = operands((2, 3, 2, 2), bank=bank)
    x, flags = args[0], args[6]
    for i in (1, 2, 7, 8):
        args[i].requires_grad_()
    positional, keywords = banked(args)
    y = batch_norm_eval(*positional, activation="relu", **keywords)
    expected = in_torch(args, "relu").sum()
    flags.fill_(1)
    y2 = batch_norm_eval(*positional, activation="relu", **keywords)
    expected = expected + in_torch(args, "relu").sum()
    leaves = [args[i] for i in (1, 2, 7, 8)]
    assert_close(torch.autograd.grad(y.sum() + y2.sum(), leaves), torch.autograd.grad(expected, leaves))
    assert x.grad is None


def test_banks_without_affine_parameters() -> None:
    args = operands((2, 3, 2, 2), bank=(0, 1), affine=False)
    y = batch_norm_eval(args[0], None, None, (args[3], args[9]), (args[4], args[10]), bank=args[6], eps=EPS)
    assert_close(y, in_torch(args, "identity"))


def test_no_second_derivative() -> None:
    args = operands((2, 3, 2, 2))
    x = args[0].requires_grad_()
    dx, = torch.autograd.grad(batch_norm_eval(*args[:5], activation="silu").sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="adn::batch_norm_eval_backward has no second derivative"):
        dx.sum().backward()


def test_bank_that_is_not_live_gets_no_gradient() -> None:
    """The live-bank form is given one bank; with both, the other's gradient is zero."""
    args = operands((2, 3, 2, 2), bank=0)
    for i in (1, 2, 7, 8):
        args[i].requires_grad_()
    batch_norm_eval(*args[:5]).sum().backward()
    assert (args[1].grad is None, args[7].grad is None) == (False, True)
    positional, keywords = banked(args)
    batch_norm_eval(*positional, **keywords).sum().backward()
    assert args[7].grad.tolist() == args[8].grad.tolist() == [0] * 3


def test_two_steps_in_a_row() -> None:
    """Statistics never start to require a gradient."""
    args = operands((2, 3, 2, 2))
    for _ in range(2):
        y = batch_norm_eval(args[0], args[1].requires_grad_(), *args[2:5])
        y.sum().backward()
    assert (args[3].requires_grad, args[4].requires_grad) == (False, False)


def test_empty_batch() -> None:
    args = operands((0, 5, 2, 2))
    x = args[0].requires_grad_()
    weight = args[1].requires_grad_()
    batch_norm_eval(x, weight, *args[2:5]).sum().backward()
    assert x.grad.shape == (0, 5, 2, 2)
    assert weight.grad.tolist() == [0] * 5


@pytest.mark.parametrize(("bank", "layout"), few(
    itertools.product([None, 1, (0, 1, 0)], LAYOUTS[:2]), [(None, LAYOUTS[0]), ((0, 1, 0), LAYOUTS[1])].__contains__),
    ids=str)
def test_opcheck(bank: int | tuple[int, ...] | None, layout: str) -> None:
    args = operands((3, 4, 3, 2), layout, residual=torch.float32, bank=bank)
    for i in (0, 1, 2, 5):
        args[i].requires_grad_()
    torch.library.opcheck(module.batch_norm_eval_op, (*args, "silu", EPS))
    plain = [t.detach() if isinstance(t, torch.Tensor) else t for t in args]
    needs = [True] * 4 + [bank is not None] * 2
    torch.library.opcheck(module.batch_norm_eval_backward_op, (torch.randn(3, 4, 3, 2), *plain, "silu", EPS, needs))
    torch.library.opcheck(module.batch_norm_eval_backward_op, (
        torch.randn(3, 4, 3, 2), None, *plain[1:5], None, *plain[6:], "identity", EPS,
        [True, False, False, True, False, False], torch.float16, layout == "nhwc"))


@pytest.mark.parametrize("layout", LAYOUTS[:2])
def test_compile(layout: str) -> None:
    def make(batch: int) -> list:
        torch.manual_seed(0)
        args = operands((batch, 6, 4, 3), layout, residual=torch.float32)
        return [t.requires_grad_(i in (0, 1, 2, 5)) for i, t in enumerate(args[:6])]

    def function(x, weight, bias, mean, var, residual):
        return batch_norm_eval(x, weight, bias, mean, var, residual=residual, activation="silu")

    check_compile(function, make)


def test_compile_with_banks_per_sample() -> None:
    def make(batch: int) -> list:
        torch.manual_seed(0)
        args = operands((batch, 6, 4, 3), bank=tuple(i % 2 for i in range(batch)))
        return [t.requires_grad_(i in (0, 1, 2, 7, 8)) for i, t in enumerate(args) if i != 5 for t in [t]]

    def function(x, weight, bias, mean, var, bank, weight2, bias2, mean2, var2):
        return batch_norm_eval(x, (weight, weight2), (bias, bias2), (mean, mean2), (var, var2), bank=bank)

    check_compile(function, make)


def test_export() -> None:
    def function(x, weight, bias, mean, var, residual):
        return batch_norm_eval(x, weight, bias, mean, var, residual=residual, activation="relu")

    check_export(function, lambda batch: operands((batch, 6, 4, 3), residual=torch.float32)[:6], dynamic=(0, 5))


@pytest.mark.parametrize("layout", LAYOUTS[:2])
@pytest.mark.parametrize("bank", [None, 1, (0, 1, 0, 1)], ids=str)
def test_gpu_branch_traces(bank: int | tuple[int, ...] | None, layout: str) -> None:
    def function(x, weight, bias, mean, var, residual, bank, weight2, bias2, mean2, var2, dy):
        args = (x, weight, bias, mean, var, residual, bank, weight2, bias2, mean2, var2, "silu", EPS)
        grads = module.batch_norm_eval_backward_op(dy, *args, [True] * 4 + [bank is not None] * 2)
        return module.batch_norm_eval_op(*args), *grads

    shape = (4, 6, 4, 3)
    args = (*operands(shape, layout, torch.float16, torch.float16, bank), random(shape, layout, torch.float16))
    check_fake_gpu(function, args, dynamic=(0, 5, 11, *([6] if isinstance(bank, tuple) else [])))


@pytest.mark.parametrize(("change", "message"), [
    ({"x": torch.zeros(2, 4)}, r"pass floating \(N, C, H, W\)"),
    ({"x": torch.zeros(2, 4, 3, 3, dtype=torch.int32)}, "x is torch.int32"),
    ({"x": torch.zeros(2, 4, 3, 6)[..., ::2]}, "neither those of NCHW nor of NHWC"),
    ({"weight": torch.ones(3)}, r"weight is .* of shape \(3,\).*pass contiguous floats of shape \(4,\)"),
    ({"bias": torch.ones(8)[::2]}, "bias is .* strides"),
    ({"weight": torch.ones(4, dtype=torch.int64)}, "weight is torch.int64"),
    ({"weight": torch.ones(4, device="meta")}, "weight is on meta, x on cpu"),
    ({"running_mean": None}, "running_mean is None: eval mode needs statistics"),
    ({"running_var": None}, "running_var is None: eval mode needs statistics"),
    ({"weight": (torch.ones(4), torch.ones(4))}, "weight is a pair but no `bank` is given"),
    ({"bank": torch.zeros((), dtype=torch.int32)}, "`bank` is given: pass weight as a pair"),
    ({"residual": torch.zeros(2, 4, 3, 2)}, r"residual is .* of shape \(2, 4, 3, 2\); pass floating \(2, 4, 3, 3\)"),
    ({"residual": torch.zeros(2, 4, 3, 6)[..., ::2]}, "residual of shape .* neither"),
    ({"residual": torch.zeros(2, 4, 3, 3, device="meta")}, "residual is on meta"),
    ({"activation": "mish"}, "activation='mish'; pass one of"),
    ({"eps": -1.0}, "eps=-1.0; pass a number that is not negative"),
])
def test_bad_input(change: dict, message: str) -> None:
    good = {"x": torch.zeros(2, 4, 3, 3), "weight": torch.ones(4), "bias": torch.ones(4),
            "running_mean": torch.zeros(4), "running_var": torch.ones(4)}
    with pytest.raises(ValueError, match=message):
        batch_norm_eval(**(good | change))


@pytest.mark.parametrize(("bank", "message"), [
    (torch.zeros(2, dtype=torch.int64), "bank is torch.int64; pass int32"),
    (torch.zeros(3, dtype=torch.int32), r"bank has shape \(3,\); pass one value, or one per sample \(2\)"),
])
def test_bad_bank(bank: torch.Tensor, message: str) -> None:
    pairs = [(torch.ones(4), torch.ones(4))] * 4
    with pytest.raises(ValueError, match=message):
        batch_norm_eval(torch.zeros(2, 4, 3, 3), *pairs, bank=bank)


# ResNet-50 at batch 64: the first stage, NHWC; the third, NCHW.


def _launch(
    dtype: torch.dtype, activation: str, *, backward: bool = False, shape: tuple[int, ...] = (64, 256, 56, 56),
    nhwc: bool = True, bank: int | None = None, affine: bool = True,
) -> tuple[int, int]:
    memory = torch.channels_last if nhwc else torch.contiguous_format
    x, residual, other = (torch.empty(shape, dtype=dtype, device="cuda", memory_format=memory) for _ in range(3))
    vectors = [torch.empty(shape[1], device="cuda") for _ in range(4)]
    flags = None if bank is None else torch.empty(bank, dtype=torch.int32, device="cuda")
    args = (x, *vectors, residual, flags, *([None] * 4 if bank is None else vectors), activation, EPS)
    size = x.numel() * x.element_size()
    if backward:
        needs = (True, True, affine, affine, affine and bank is not None, affine and bank is not None)
        module.launch_batch_norm_eval_backward(other, *args, needs)
        return 5 * size, 0
    module.launch_batch_norm_eval(*args)
    return 3 * size, 0


AOT = {
    "forward": _launch,
    "forward_nchw": functools.partial(_launch, nhwc=False),
    "forward_per_sample": functools.partial(_launch, bank=64),
    "backward": functools.partial(_launch, backward=True),
    "backward_frozen": functools.partial(_launch, backward=True, affine=False),
    "backward_frozen_nchw": functools.partial(_launch, backward=True, affine=False, nhwc=False),
    "backward_per_sample": functools.partial(_launch, backward=True, bank=64),
}
AOT_EXPECT = {
    "batch_norm_eval_kernel": {"wide_loads", "wide_stores"},
    "batch_norm_eval_backward_kernel": {"wide_loads", "wide_stores"},
    "column_sum_kernel": {"wide_loads"},
}

def AOT_OF_CHANNELS(c: int) -> list[Callable]:
    return [functools.partial(_launch, shape=(64, c, 56, 56), **kwargs) for kwargs in (
        {}, {"nhwc": False}, {"backward": True}, {"backward": True, "affine": False})]
