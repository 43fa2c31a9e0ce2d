"""What fused convolutions share: folding of norms, bypass, backward. Its Triton part is tested with each of them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from adn_kernels.activation import ACTIVATIONS
from adn_kernels.conv import conv, conv_, cudnn_conv
from adn_kernels.conv1x1 import conv1x1, conv1x1_, linear, linear_
from adn_kernels.conv3x3 import conv3x3, conv3x3_
from adn_kernels.depthwise import depthwise, depthwise_
from adn_kernels.epilogue import (
    conv_act_backward,
    conv_reference,
    empty_output,
    fold_norm,
    write_active,
)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("conv_bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_fold_norm(dtype: torch.dtype, conv_bias: bool, affine: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 9, 3, 4, dtype=torch.float64)
    mean, var = torch.randn(9).to(dtype), (torch.rand(9) + 0.1).to(dtype)
    weight, bias = (torch.randn(9).to(dtype), torch.randn(9).to(dtype)) if affine else (None, None)
    before = torch.randn(9).to(dtype) if conv_bias else None
    scale, shift = fold_norm(weight, bias, mean, var, 1e-3, before)
    assert scale.dtype == shift.dtype == torch.float32
    shifted = x if before is None else x + before.double()[:, None, None]
    want = F.batch_norm(shifted, mean.double(), var.double(), None if weight is None else weight.double(),
                        None if bias is None else bias.double(), False, 0.0, 1e-3)
    assert_close(x * scale[:, None, None] + shift[:, None, None], want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("active", [[0, 0, 0], [1, 1, 1], [0, -3, 0], [1], [0]], ids=str)
def test_write_active_keeps_bits(active: list[int]) -> None:
    """Also those of NaN with a payload; and NaN of inactive results goes nowhere."""
    flags = torch.tensor(active, dtype=torch.int32)
    on = (flags != 0).expand(3)
    before = torch.full((3, 2, 2, 2), 0x7FC12345, dtype=torch.int32).view(torch.float32)
    y = torch.randn(3, 2, 2, 2)
    y[~on] = float("nan")
    out = before.clone()
    write_active(out, y, flags)
    assert out[~on].view(torch.int32).equal(before[~on].view(torch.int32))
    assert out[on].equal(y[on])


@pytest.mark.parametrize("residual", [None, torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_output_is_like_eager(format: torch.memory_format, residual: torch.dtype | None) -> None:
    x = torch.randn(2, 4, 5, 6).half().contiguous(memory_format=format)
    r = None if residual is None else torch.randn(2, 3, 5, 6).to(residual)
    out = empty_output(x, (2, 3, 5, 6), r)
    assert out.is_contiguous(memory_format=format)
    assert out.dtype == (x[:, :3] if r is None else x[:, :3] + r).dtype


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("bank", [None, [1], [0, 1, 1]], ids=str)
def test_backward_of_a_grouped_convolution(bank: list[int] | None, activation: str) -> None:
    """All five gradients in float64 against autograd; those not wanted are empty."""
    torch.manual_seed(0)
    vectors = (6,) if bank is None else (2, 6)
    given = [torch.randn(3, 4, 5, 5), torch.randn(6, 2, 3, 3), torch.rand(vectors) + 0.5, torch.randn(vectors),
             torch.randn(3, 6, 3, 3)]
    given = [t.double().requires_grad_() for t in given]
    flags = None if bank is None else torch.tensor(bank, dtype=torch.int32)
    y = conv_reference(*given, flags, activation, 2, 1, 2)
    dy = torch.randn_like(y)
    want = torch.autograd.grad(y, given, dy)
    leaves = [t.detach() for t in given]
    grads = conv_act_backward(dy, *leaves, flags, activation, 2, 1, 2, [True] * 5)
    assert_close(grads, list(want), rtol=1e-6, atol=1e-6)
    for i in range(5):
        needs = [j == i for j in range(5)]
        alone = conv_act_backward(dy, *leaves, flags, activation, 2, 1, 2, needs)
        assert [g.numel() > 0 for g in alone] == needs
        assert_close(alone[i], want[i], rtol=1e-6, atol=1e-6)


def test_nan_stays_in_its_bank() -> None:
    """A sample with NaN poisons the gradients of its bank only."""
    x = torch.randn(2, 3, 4, 4)
    x[0] = float("nan")
    vectors = torch.rand(2, 3) + 0.5
    *_, dscale, dshift, _ = conv_act_backward(
        torch.ones(2, 3, 4, 4), x, torch.randn(3, 3, 1, 1), vectors, vectors, None,
        torch.tensor([0, 1], dtype=torch.int32), "silu", 1, 0, 1, [False, False, True, True, False])
    for grad in (dscale, dshift):
        assert grad[0].isnan().all()
        assert grad[1].isfinite().all()


# Every public op

# name -> op, its form in place, the same in torch, shape of the weight for 8 channels in and out
OPS: dict[str, tuple[Callable, Callable, Callable, tuple[int, ...]]] = {
    "conv1x1": (conv1x1, conv1x1_, F.conv2d, (8, 8, 1, 1)),
    "linear": (linear, linear_, F.linear, (8, 8)),
    "conv3x3": (conv3x3, conv3x3_, lambda *args: F.conv2d(*args, padding=1), (8, 8, 3, 3)),
    "depthwise": (depthwise, depthwise_, lambda *args: F.conv2d(*args, padding=1, groups=8), (8, 1, 3, 3)),
    "conv": (conv, conv_, F.conv2d, (8, 8, 1, 1)),
}
each_op = pytest.mark.parametrize("name", OPS)


def image(name: str, channels: int = 8, dtype: torch.dtype = torch.float32) -> Tensor:
    """NHWC; tokens for the linear layer."""
    torch.manual_seed(0)
    x = torch.randn(3, 4, 5, channels).to(dtype)
    return x.flatten(1, 2) if name == "linear" else x.permute(0, 3, 1, 2)


def channels(name: str, x: Tensor, start: int, stop: int) -> Tensor:
    return x[..., start:stop] if name == "linear" else x[:, start:stop]


@each_op
def test_autocast(name: str) -> None:
    """Types and values as torch's convolutions under autocast; gradients in the types of the leaves."""
    op, in_place, eager, shape = OPS[name]
    x, weight, bias = image(name), torch.randn(shape), torch.randn(8)
    leaves = [[t.clone().requires_grad_() for t in (x, weight, bias)] for _ in range(2)]

    def ours(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return op(x, weight, shift=bias)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, want = ours(*leaves[0]), eager(*leaves[1])
        compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")(x, weight, bias)
        added = op(x, weight, residual=torch.zeros_like(y, dtype=torch.float32))
        out = torch.zeros_like(x)
        in_place(out, x, weight, shift=bias)
        wide = op(x.double(), weight.double())
    assert y.dtype == want.dtype == compiled.dtype == torch.bfloat16
    assert (added.dtype, wide.dtype) == (torch.float32, torch.float64)
    exact = eager(x.bfloat16().double(), weight.bfloat16().double(), bias.double())
    assert_close(y.double(), exact, rtol=2**-8, atol=1e-6)  # rounded once
    assert_close(out.double(), exact, rtol=1e-5, atol=1e-5)  # in float32, as `out` is
    assert compiled.equal(y)
    y.sum().backward()
    want.sum().backward()
    for ours_, theirs in zip(*leaves):
        assert ours_.grad.dtype == theirs.grad.dtype == torch.float32
        assert_close(ours_.grad, theirs.grad, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("residual", [False, True])
def test_autocast_of_cudnn(residual: bool) -> None:
    x, weight, bias = image("conv"), torch.randn(8, 8, 1, 1), torch.randn(8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = cudnn_conv(x, weight, bias, residual=x.bfloat16() if residual else None)
        want = F.conv2d(x, weight, bias)
    assert y.dtype == want.dtype
    assert_close(y, want + x.bfloat16() if residual else want, rtol=2e-2, atol=2e-2)


@each_op
def test_weight_kept_in_float32(name: str) -> None:
    op, in_place, eager, shape = OPS[name]
    x, weight = image(name, dtype=torch.bfloat16), torch.randn(shape, requires_grad=True)
    y = op(x, weight)
    want = eager(x, weight.bfloat16())
    assert y.dtype == want.dtype
    assert_close(y, want)
    y.sum().backward()
    assert weight.grad.dtype == torch.float32
    with torch.no_grad():
        assert_close(in_place(torch.zeros_like(x), x, weight), want)


@each_op
def test_bank_is_kept_for_the_backward(name: str) -> None:
    """One tensor holds the bank of each depth in turn; gradients go to the bank of the forward."""
    op, _, _, shape = OPS[name]
    x, weight, bank = image(name), torch.randn(shape), torch.zeros((), dtype=torch.int32)
    shift = torch.zeros(2, 8, requires_grad=True)
    first = op(x, weight, shift=shift, bank=bank)
    bank.fill_(1)
    second = op(x, weight, shift=shift, bank=bank)
    (first.sum() + 2 * second.sum()).backward()
    pixels = x.numel() / 8
    assert_close(shift.grad, torch.tensor([[pixels], [2 * pixels]]).expand(2, 8))


@each_op
def test_no_second_derivative(name: str) -> None:
    op, _, _, shape = OPS[name]
    x = image(name).requires_grad_()
    grad, = torch.autograd.grad(op(x, torch.randn(shape), activation="silu").sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="act_backward has no second derivative"):
        grad.sum().backward()


@each_op
def test_memory_shared_with_the_output(name: str) -> None:
    """Channels of one buffer between which the others lie are memory of their own; what overlaps is refused."""
    _, in_place, eager, shape = OPS[name]
    buffer, weight = image(name, 24), torch.randn(shape)
    x, out = channels(name, buffer, 0, 8), channels(name, buffer, 16, 24)
    want = eager(x, weight)
    assert_close(in_place(out, x, weight), want)
    with pytest.raises(ValueError, match="x shares memory with the output"):
        in_place(channels(name, buffer, 4, 12), x, weight)
    whole = torch.zeros(out.numel() + weight.numel())
    out = whole[:out.numel()].view(out.shape)
    for shared in ("weight", "scale", "shift"):
        given = {"weight": weight, "scale": torch.ones(8), "shift": torch.ones(8)}
        size = given[shared].shape
        in_place(out, x, **given | {shared: whole[out.numel():][:size.numel()].view(size)})  # beside it
        with pytest.raises(ValueError, match=f"{shared} shares memory with the output"):
            in_place(out, x, **given | {shared: whole[:size.numel()].view(size)})
    with pytest.raises(ValueError, match="the output is expanded"):
        in_place(torch.zeros(1, *x.shape[1:]).expand(x.shape), x, weight)


@each_op
def test_only_floats(name: str) -> None:
    op, in_place, _, shape = OPS[name]
    x, weight = image(name), torch.randn(shape)
    with pytest.raises(ValueError, match=r"x is torch.int32; pass float32, float16 or bfloat16"):
        op(x.int(), weight.int())
    with pytest.raises(ValueError, match=r"x is torch.int32; pass"):
        op(x.int(), weight)
    with pytest.raises(ValueError, match=r"weight is torch.int32, x is torch.float32; pass both in one dtype"):
        op(x, weight.int())
    with pytest.raises(ValueError, match=r"residual is torch.int64; pass float32, float16 or bfloat16"):
        op(x, weight, residual=x.long())
    with pytest.raises(ValueError, match=r"out is torch.int32; pass float32, float16 or bfloat16"):
        in_place(x.int(), x.clone(), weight)
