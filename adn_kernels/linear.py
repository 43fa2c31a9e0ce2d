"""A linear layer whose work can be left out by a value on the device."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import triton_op

from .bank import banks
from .epilogue import check_epilogue, check_inference, check_same_kind, in_autocast, no_autocast, write_active
from .gemm import launch_gemm
from .launch import on_gpu


def linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`x @ weight.T + bias` in float32; float64 stays."""
    wide = torch.promote_types(x.dtype, torch.float32)
    with no_autocast(x):
        y = F.linear(x.to(wide), weight.to(wide))
    return y if bias is None else y + bias


def launch_linear(out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, active: Tensor | None) -> None:
    """The op on a GPU."""
    if out.numel():
        launch_gemm(out, x, weight, None, bias, None, None, None, None, active, "identity")


@triton_op("adn::linear_", mutates_args=("out",))
def linear_inplace_op(out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, active: Tensor | None) -> None:
    if weight.ndim != 2 or weight.shape[1] != x.shape[2]:
        raise ValueError(f"weight has shape {tuple(weight.shape)}; pass (C, {x.shape[2]}) for rows of x of that length")
    check_same_kind(x, weight)
    check_epilogue(x, (*x.shape[:2], weight.shape[0]), None, "identity", out=out, active=active, weight=weight,
                   shift=bias)
    if on_gpu(x, out):
        launch_linear(out, x, weight, bias, active)
    else:
        write_active(out, linear_reference(x, weight, bias), active)


def linear_(
    out: Tensor, x: Tensor, weight: Tensor, shift: Tensor | None = None, *, active: Tensor | None = None
) -> Tensor:
    """`x @ weight.T + shift` written to `out`. No backward. Bytes and limits are those of 1x1 convolutions (`gemm.py`).

    Args:
        out: (N, ..., C), viewable as x is, any floating dtype; shares no memory with x.
        x: (N, ..., K), N samples; axes between the first and the last must be viewable as one (no copy is made).
            fp32 (TF32 as `torch.backends.cuda.matmul` says), fp16, bf16; on other devices and in float64 the reference
            computes. Under `torch.autocast` it is cast to its type, as is the input of torch's linear layers.
        weight: (C, K), cast to x's dtype, a pass over it, if it has another.
        shift: (C,), any floating dtype: the bias.
        active: int32, one value or one per sample: where 0 its programs exit before they read anything else, and `out`
            keeps its bits.

    Returns:
        out.

    Raises:
        ValueError: shapes, strides, dtypes or devices do not fit, or x shares memory with `out`; the message says what
            to pass.
        RuntimeError: a gradient would be needed.
    """
    x, weight = in_autocast(x, weight)
    shape = (*x.shape[:-1], *weight.shape[:1])
    rows, target = _rows(x, "x"), _rows(out, "out", shape)
    (shift,), _ = banks(x, shape[-1], None, shift=shift)
    check_inference("linear_", out, x, weight, shift)
    linear_inplace_op(target, rows, weight, shift, active)
    return out


def _rows(x: Tensor, name: str, shape: tuple[int, ...] | None = None) -> Tensor:
    """(N, ..., K) viewed as (N, L, K); raises ValueError if it cannot be, or has another than the given shape."""
    if shape is not None and x.shape != shape:
        raise ValueError(f"{name} has shape {tuple(x.shape)}; the output has {tuple(shape)}")
    if x.ndim == 3:
        return x
    if x.ndim < 2:
        raise ValueError(f"{name} has shape {tuple(x.shape)}; pass (N, ..., channels)")
    sizes, strides = x.shape[1:-1], x.stride()[1:-1]
    for i in range(len(sizes) - 1):
        if sizes[i] != 1 and strides[i] != sizes[i + 1] * strides[i + 1]:
            raise ValueError(f"the axes of {name} between the first and the last cannot be viewed as one: shape "
                             f"{tuple(x.shape)}, strides {x.stride()}; pass {name}.contiguous()")
    return x.view(x.shape[0], math.prod(sizes), x.shape[-1])
