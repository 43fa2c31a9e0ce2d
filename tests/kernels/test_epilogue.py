"""What fused convolutions and linear layers share. Its Triton part is tested with each of their kernels."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from adn_kernels.conv import conv, conv_
from adn_kernels.epilogue import empty_output, fold_norm, write_active
from adn_kernels.linear import linear_


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


# Every public op

# name -> the op in place, the same in torch, shape of the weight for 8 channels in and out
OPS: dict[str, tuple[Callable, Callable, tuple[int, ...]]] = {
    "1x1": (conv_, F.conv2d, (8, 8, 1, 1)),
    "3x3": (partial(conv_, padding=1), partial(F.conv2d, padding=1), (8, 8, 3, 3)),
    "depthwise": (partial(conv_, padding=1, groups=8), partial(F.conv2d, padding=1, groups=8), (8, 1, 3, 3)),
    "grouped": (partial(conv_, padding=1, groups=2), partial(F.conv2d, padding=1, groups=2), (8, 4, 3, 3)),
    "linear": (linear_, F.linear, (8, 8)),
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
    """Types and values as torch's under autocast, into an output of any type."""
    in_place, eager, shape = OPS[name]
    x, weight, bias = image(name), torch.randn(shape), torch.randn(8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, wide = torch.zeros_like(x), torch.zeros_like(x, dtype=torch.float64)
        in_place(out, x, weight, bias)
        in_place(wide, x.double(), weight.double())
    exact = eager(x.bfloat16().double(), weight.bfloat16().double(), bias.double())
    assert_close(out.double(), exact, rtol=1e-5, atol=1e-5)  # in float32, as `out` is
    assert_close(wide, eager(x.double(), weight.double()))  # float64 stays


@pytest.mark.parametrize("backend", [None, "cudnn"])
def test_autocast_of_conv(backend: str | None) -> None:
    x, weight, bias = image("1x1"), torch.randn(8, 8, 1, 1), torch.randn(8)

    def ours(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return conv(x, weight, None, bias, backend=backend)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, want = ours(x, weight, bias), F.conv2d(x, weight, bias)
        compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")(x, weight, bias)
        added = conv(x, weight, residual=torch.zeros_like(y, dtype=torch.float32))
        wide = conv(x.double(), weight.double(), backend=backend)
    assert y.dtype == want.dtype == compiled.dtype == torch.bfloat16
    assert (added.dtype, wide.dtype) == (torch.float32, torch.float64)
    exact = F.conv2d(x.bfloat16().double(), weight.bfloat16().double(), bias.double())
    assert_close(y.double(), exact, rtol=2**-8, atol=1e-6)  # rounded once
    assert compiled.equal(y)


@each_op
def test_weight_kept_in_float32(name: str) -> None:
    in_place, eager, shape = OPS[name]
    x, weight = image(name, dtype=torch.bfloat16), torch.randn(shape)
    assert_close(in_place(torch.zeros_like(x), x, weight), eager(x, weight.bfloat16()))


@each_op
def test_memory_shared_with_the_output(name: str) -> None:
    """Channels of one buffer between which the others lie are memory of their own; what overlaps is refused."""
    in_place, eager, shape = OPS[name]
    buffer, weight = image(name, 24), torch.randn(shape)
    x, out = channels(name, buffer, 0, 8), channels(name, buffer, 16, 24)
    want = eager(x, weight)
    assert_close(in_place(out, x, weight), want)
    with pytest.raises(ValueError, match="x shares memory with the output"):
        in_place(channels(name, buffer, 4, 12), x, weight)
    whole = torch.zeros(out.numel() + weight.numel())
    out = whole[:out.numel()].view(out.shape)
    for shared in ("weight", "shift"):
        given = {"weight": weight, "shift": torch.ones(8)}
        size = given[shared].shape
        in_place(out, x, **given | {shared: whole[out.numel():][:size.numel()].view(size)})  # beside it
        with pytest.raises(ValueError, match=f"{shared} shares memory with the output"):
            in_place(out, x, **given | {shared: whole[:size.numel()].view(size)})
    with pytest.raises(ValueError, match="the output is expanded"):
        in_place(torch.zeros(1, *x.shape[1:]).expand(x.shape), x, weight)


@each_op
def test_only_floats(name: str) -> None:
    in_place, _, shape = OPS[name]
    x, weight = image(name), torch.randn(shape)
    for other in (weight.int(), weight):
        with pytest.raises(ValueError, match=r"x is torch.int32; pass float32, float16 or bfloat16"):
            in_place(x.clone(), x.int(), other)
    with pytest.raises(ValueError, match=r"weight is torch.int32, x is torch.float32; pass both in one dtype"):
        in_place(x.clone(), x, weight.int())
    with pytest.raises(ValueError, match=r"out is torch.int32; pass float32, float16 or bfloat16"):
        in_place(x.int(), x.clone(), weight)
    with pytest.raises(ValueError, match=r"residual is torch.int64; pass float32, float16 or bfloat16"):
        conv(image("1x1"), torch.randn(8, 8, 1, 1), residual=image("1x1").long())
