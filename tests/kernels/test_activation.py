"""Activations and their derivatives, in plain PyTorch and in Triton, against torch's own."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from conv_cases import ACT
from harness import DEVICE, Guards, assert_accurate, max_error

from adn_kernels.activation import ACTIVATIONS, act, act_grad, act_grad_reference, act_reference, check_activation
from adn_kernels.launch import cdiv, launch

KINKS = [-6.0, -3.0, -1.0, -0.0, 0.0, 1.0, 3.0, 6.0, 7.0, -20.0, 20.0, -100.0, 100.0, 1e4, -1e4, 1e30, -1e30]
# Where a derivative is evaluated from z: infinities give inf * 0 in some of torch's own, and so here.
POINTS = torch.cat([torch.tensor(KINKS), torch.linspace(-8, 8, 401), torch.tensor([float("nan"), float("inf")])])


@triton.jit
def apply_kernel(z, out, N, ACTIVATION: tl.constexpr, GRAD: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(z + i, mask=i < N, other=0.0)
    if GRAD:
        tl.store(out + i, act_grad(value, ACTIVATION), mask=i < N)
    else:
        tl.store(out + i, act(value, ACTIVATION), mask=i < N)


def in_triton(z: torch.Tensor, activation: str, grad: bool) -> torch.Tensor:
    with Guards() as guards:
        z = guards.place(z)
        out = torch.empty_like(z)
        launch(apply_kernel, (cdiv(len(z), 64),), z, out, len(z), ACTIVATION=activation, GRAD=grad, BLOCK=64)
    guards.check()
    return out


def derivative(z: torch.Tensor, activation: str) -> torch.Tensor:
    z = z.clone().requires_grad_()
    y = ACT[activation](z)
    return torch.autograd.grad(y.sum(), z)[0] if y is not z else torch.ones_like(z)


@pytest.mark.launcher
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_value(activation: str) -> None:
    z = POINTS.to(DEVICE)
    assert_accurate(activation, in_triton(POINTS, activation, grad=False), ACT[activation](z),
                    ACT[activation](z.double()))
    # Absolute errors hide what happens near 0.
    near = torch.linspace(-1, 1, 101)
    assert max_error(in_triton(near, activation, grad=False), ACT[activation](near.double())) < 5e-7


@pytest.mark.launcher
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_derivative(activation: str) -> None:
    # At large arguments torch's own is inf * 0 for some; what is finite must agree.
    z = POINTS[POINTS.isfinite() & (POINTS.abs() <= 1e4)]
    assert_accurate(activation, in_triton(z, activation, grad=True).cpu(), derivative(z, activation),
                    derivative(z.double(), activation))


@pytest.mark.launcher
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_not_finite(activation: str, value: float) -> None:
    z = torch.tensor([value])
    torch.testing.assert_close(in_triton(z, activation, grad=False).cpu(), ACT[activation](z), equal_nan=True)


@pytest.mark.launcher
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_derivative_of_nan_in_triton(activation: str) -> None:
    z = torch.tensor([float("nan")])
    torch.testing.assert_close(in_triton(z, activation, grad=True).cpu(), derivative(z, activation), equal_nan=True)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_reference(activation: str) -> None:
    for dtype in (torch.float32, torch.float64):
        z = POINTS.to(dtype)
        torch.testing.assert_close(act_reference(z, activation), ACT[activation](z), rtol=0, atol=0, equal_nan=True)
        z = z[z.isfinite() & (z.abs() <= 1e4)]
        torch.testing.assert_close(act_grad_reference(z, activation), derivative(z, activation))
        assert act_grad_reference(z, activation).dtype == dtype


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_derivative_of_nan(activation: str) -> None:
    """NaN reaches the gradient where torch lets it."""
    z = torch.tensor([float("nan")])
    torch.testing.assert_close(act_grad_reference(z, activation), derivative(z, activation), equal_nan=True)


def test_unknown_name() -> None:
    with pytest.raises(ValueError, match="activation='swish'; pass one of 'identity', 'relu', 'relu6'"):
        check_activation("swish")
