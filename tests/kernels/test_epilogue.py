"""What fused convolutions share: folding of norms, bypass, backward. Its Triton part is tested with each of them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from adn_kernels.activation import ACTIVATIONS
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
