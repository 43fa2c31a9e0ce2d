"""Linear layer whose samples can be bypassed, against plain PyTorch. Its kernel is tested in `test_gemm.py`."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from conv_cases import MIXTURES, bits
from harness import DEVICE, DTYPES, Guards, assert_accurate
from op_checks import check_compile, check_export, check_fake_gpu
from torch import Tensor
from torch.library import opcheck

from adn_kernels import linear as module
from adn_kernels.linear import linear_


def check(x: Tensor, weight: Tensor, bias: Tensor | None, active: Tensor | None) -> None:
    """Active samples are computed; all others keep their bits, NaN in them and in x included."""
    n, length, _ = x.shape
    on = torch.ones(n, dtype=torch.bool) if active is None else (active != 0).expand(n)
    before = torch.randn(n, length, len(weight)).to(x.dtype)
    exact = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    eager = F.linear(x, weight)
    eager = eager if bias is None else (eager + bias).to(x.dtype)
    if 0 not in x.stride():
        x = x.clone(memory_format=torch.preserve_format)
        x[~on] = float("nan")
    before[~on, 0] = float("nan")
    with Guards() as guards:
        out, *given = (t.to(DEVICE) if t is not None and 0 in t.stride() else guards.place(t)
                       for t in (before, x, weight, bias, active))
        module.launch_linear(out, *given)
    guards.check()
    assert torch.equal(bits(out.cpu()[~on]), bits(before[~on]))
    assert_accurate("linear_", out.cpu()[on], eager[on], exact[on])


@pytest.mark.launcher
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 7, 19, 23), (3, 1, 40, 16), (5, 4, 64, 72)], ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_launch(shape: tuple[int, ...], bias: bool, dtype: torch.dtype) -> None:
    n, length, k, c = shape
    torch.manual_seed(0)
    x, weight = torch.randn(n, length, k).to(dtype), (torch.randn(c, k) / k**0.5).to(dtype)
    vector = torch.randn(c) if bias else None
    check(x, weight, vector, None)
    # Transposed, sliced, expanded
    check(x.mT.contiguous().mT, weight.T.contiguous().T, vector, None)
    check(torch.cat([x, x], 1)[:, :length], weight, vector, None)
    check(x[:1].expand(n, length, k), weight, vector, None)


@pytest.mark.launcher
@pytest.mark.parametrize("active", MIXTURES, ids=str)
def test_bypass(active: list[int] | None) -> None:
    torch.manual_seed(0)
    flags = None if active is None else torch.tensor(active, dtype=torch.int32)
    check(torch.randn(6, 3, 16), torch.randn(24, 16), torch.randn(24), flags)


@pytest.mark.launcher
def test_empty_is_not_launched() -> None:
    out, x, weight = (torch.empty(shape, device=DEVICE) for shape in ((0, 3, 5), (0, 3, 4), (5, 4)))
    module.launch_linear(out, x, weight, None, None)


# The op, on the CPU


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(4, 3), (4, 2, 3), (2, 4, 5, 3), (2, 2, 3, 2, 3)], ids=str)
def test_equals_torch(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, weight, bias = (torch.randn(s).to(dtype) for s in (shape, (5, 3), (5,)))
    out = torch.full((*shape[:-1], 5), float("nan"), dtype=dtype)
    assert linear_(out, x, weight, bias) is out
    assert_accurate("linear_", out, F.linear(x, weight, bias), F.linear(x.double(), weight.double(), bias.double()))
    before = out.clone()
    x, odd = 2 * x, slice(1, None, 2)
    linear_(out, x, weight, active=torch.arange(shape[0], dtype=torch.int32) % 2)
    assert torch.equal(out[::2], before[::2])
    assert_accurate("linear_", out[odd], F.linear(x, weight)[odd], F.linear(x.double(), weight.double())[odd])


def test_of_nchw() -> None:
    """(N, H, W, C) views of NCHW have pixels in one row: viewed, not copied."""
    x, weight = torch.randn(2, 3, 4, 5).permute(0, 2, 3, 1), torch.randn(7, 3)
    torch.testing.assert_close(linear_(torch.empty(2, 4, 5, 7), x, weight), F.linear(x, weight))


def test_empty() -> None:
    assert linear_(torch.empty(0, 4, 5), torch.randn(0, 4, 3), torch.randn(5, 3)).shape == (0, 4, 5)


def test_opcheck() -> None:
    x, weight, bias, active = torch.randn(3, 6, 4), torch.randn(5, 4), torch.randn(5), torch.tensor([1, 0, 1]).int()
    opcheck(module.linear_inplace_op, (torch.randn(3, 6, 5), x, weight, bias, active))
    opcheck(module.linear_inplace_op, (torch.randn(3, 6, 5), x, weight, None, None))


def test_compile_export_and_gpu_branch() -> None:
    def function(out: Tensor, x: Tensor, weight: Tensor, bias: Tensor, active: Tensor) -> Tensor:
        return linear_(out.clone(), x, weight, bias, active=active)

    def args(n: int) -> tuple[Tensor, ...]:
        torch.manual_seed(0)
        return (torch.randn(n, 6, 5), torch.randn(n, 6, 3), torch.randn(5, 3), torch.randn(5),
                (torch.arange(n) % 3 == 1).int())

    check_compile(function, args)
    check_export(function, args, dynamic=(0, 1, 4))
    check_fake_gpu(function, args(4), dynamic=(0, 1, 4))


X, W, OUT = torch.randn(2, 3, 4, 4), torch.randn(5, 4), torch.randn(2, 3, 4, 5)


@pytest.mark.parametrize(("call", "message"), [
    (lambda: linear_(OUT, W[0], W), r"x has shape \(4,\); pass \(N, ..., channels\)"),
    (lambda: linear_(OUT, X, W[:, :3]), r"weight has shape \(5, 3\); pass \(C, 4\)"),
    (lambda: linear_(OUT, X, W[..., None]), r"weight has shape \(5, 4, 1\)"),
    (lambda: linear_(torch.randn(2, 2, 3, 5), torch.randn(2, 2, 6, 4)[:, :, :3], W),
     r"the axes of x between the first and the last cannot be viewed as one: .* pass x.contiguous\(\)"),
    # As many pixels in another order
    (lambda: linear_(torch.randn(2, 12, 5), X, W), r"out has shape \(2, 12, 5\); the output has \(2, 3, 4, 5\)"),
    (lambda: linear_(OUT, X, torch.tensor(1.0)), r"out has shape \(2, 3, 4, 5\); the output has \(2, 3, 4\)"),
    (lambda: linear_(OUT, X, W, W[:, 0]), r"shift is .* pass contiguous floats of shape \(5,\)"),
    (lambda: linear_(OUT, X, W, active=torch.zeros(3).int()), r"active has shape \(3,\)"),
    (lambda: linear_(OUT, X.int(), W.int()), "x is torch.int32; pass float32"),
    (lambda: linear_(X, X, torch.randn(4, 4)), "x shares memory with the output"),
    (lambda: linear_(OUT, X, W, OUT[0, 0, 0]), "shift shares memory with the output"),
])
def test_bad_input(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_refuses_gradients() -> None:
    with pytest.raises(RuntimeError, match="linear_ is for inference and has no backward: call it under"):
        linear_(OUT.clone(), X, W.clone().requires_grad_())
