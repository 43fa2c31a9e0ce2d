"""What every fused convolution ends with: scale and shift of the live norm bank, residual, activation.

`y = act(conv(x, w) * scale + shift + residual)`, computed in float32 and rounded once. Scale and shift are an eval-mode
norm (or a bias, scale left out), see `fold_norm`; of the live bank, or pairs with a `bank` to choose (`bank.py`).

`active`, int32, one value or one per sample, bypasses: where it is 0 the output keeps what it held, bit for bit. Only
the in-place forms of ops (`conv_` ...) take it, for only they have an output that holds something.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from .activation import act, act_reference, check_activation
from .bank import check_flags, of_bank, picked
from .launch import check_no_alias
from .view import memory_format


def fold_norm(
    weight: Tensor | None, bias: Tensor | None, running_mean: Tensor, running_var: Tensor, eps: float,
    conv_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """An eval-mode batch norm as scale and shift: `w / sqrt(var + eps)` and `b + (conv_bias - mean) * scale`.

    All arguments and both results are (C,); computed in float64, returned in float32 (statistics in float64: so too).
    """
    scale = torch.rsqrt(running_var.double() + eps)
    if weight is not None:
        scale = scale * weight.double()
    mean = running_mean.double() if conv_bias is None else running_mean.double() - conv_bias.double()
    shift = -mean * scale
    if bias is not None:
        shift = shift + bias.double()
    dtype = torch.promote_types(running_var.dtype, torch.float32)
    return scale.to(dtype), shift.to(dtype)


def check_epilogue(
    x: Tensor, out_shape: Sequence[int], residual: Tensor | None, activation: str, bank: Tensor | None = None,
    out: Tensor | None = None, active: Tensor | None = None, **read: Tensor | None,
) -> None:
    """Raises ValueError for anything an epilogue cannot take; works on symbolic sizes without guarding them.

    Args:
        x: checked already. out_shape: (N, C, OH, OW), or of tokens (N, L, C).
        residual, out: of that shape. The other arguments are those of the op.
        read: what else is read while `out` is written, by name.
    """
    check_activation(activation)
    check_flags(bank, "bank", x.shape[0], x.device)
    check_flags(active, "active", x.shape[0], x.device)
    for name, tensor in (("residual", residual), ("out", out)):
        if tensor is None:
            continue
        if tuple(tensor.shape) != tuple(out_shape):
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; the output has {tuple(out_shape)}")
        if tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device}, x on {x.device}; pass both on one device")
        if not tensor.is_floating_point():
            raise ValueError(f"{name} is {tensor.dtype}; pass float32, float16 or bfloat16")
    if out is not None:
        check_no_alias(out, x=x, residual=residual, **read)


def check_same_kind(x: Tensor, weight: Tensor) -> None:
    """Raises ValueError unless both have one floating dtype and one device."""
    if not x.is_floating_point():
        raise ValueError(f"x is {x.dtype}; pass float32, float16 or bfloat16")
    if weight.dtype != x.dtype:
        raise ValueError(f"weight is {weight.dtype}, x is {x.dtype}; pass both in one dtype")
    if weight.device != x.device:
        raise ValueError(f"weight is on {weight.device}, x on {x.device}; pass both on one device")


def in_autocast(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """What `torch.autocast` does to the arguments of a convolution: x in its type; and the weight in that of x.

    A weight kept in float32 costs a pass over it each time. Float64 stays; what is not floating the op refuses.
    """
    kind = x.device.type
    if kind != "meta" and torch.is_autocast_enabled(kind) and x.is_floating_point() and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(kind))
    if weight.dtype != x.dtype and weight.is_floating_point() and x.is_floating_point():
        weight = weight.to(x.dtype)
    return x, weight


def no_autocast(x: Tensor) -> contextlib.AbstractContextManager:
    """Ops are told types by their arguments; inside them autocast would still be on."""
    return contextlib.nullcontext() if x.device.type == "meta" else torch.autocast(x.device.type, enabled=False)


def check_inference(name: str, *tensors: Tensor | None) -> None:
    """Raises RuntimeError if autograd is on and would have to follow an op that it cannot."""
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        raise RuntimeError(f"{name} is for inference and has no backward: call it under torch.no_grad()")


def empty_output(x: Tensor, shape: Sequence[int], residual: Tensor | None) -> Tensor:
    """Memory for an output (N, C, H, W): in x's layout; its dtype that of `conv + residual` in torch."""
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    return torch.empty(shape, dtype=dtype, device=x.device, memory_format=memory_format(x))


def epilogue_reference(
    z: Tensor, scale: Tensor | None, shift: Tensor | None, scale2: Tensor | None, shift2: Tensor | None,
    residual: Tensor | None, bank: Tensor | None, activation: str,
) -> Tensor:
    """`act(z * scale + shift + residual)`, z (N, C, H, W) of float32 or float64, and so the result."""
    if scale is not None:
        z = z * picked(scale, scale2, bank)[..., None, None]
    if shift is not None:
        z = z + picked(shift, shift2, bank)[..., None, None]
    if residual is not None:
        z = z + residual
    return act_reference(z, activation)


def conv_reference(
    x: Tensor, weight: Tensor, scale: Tensor | None, shift: Tensor | None, scale2: Tensor | None,
    shift2: Tensor | None, residual: Tensor | None, bank: Tensor | None, activation: str, stride: int, padding: int,
    groups: int,
) -> Tensor:
    """`act(conv2d(x, weight, ...) * scale + shift + residual)`, computed and returned in float32 (float64 stays)."""
    wide = torch.promote_types(x.dtype, torch.float32)
    with no_autocast(x):
        z = F.conv2d(x.to(wide), weight.to(wide), None, stride, padding, 1, groups)
    return epilogue_reference(z, scale, shift, scale2, shift2, residual, bank, activation)


def write_active(out: Tensor, y: Tensor, active: Tensor | None) -> None:
    """Reference of the bypass: out[i] = y[i] where active, NaN and all; elsewhere out keeps its bits."""
    if active is None:
        out.copy_(y)
    else:
        out.copy_(torch.where((active != 0).reshape(-1, *[1] * (out.ndim - 1)), y.to(out.dtype), out))


@triton.jit
def epilogue_value(
    acc,  # [BM, BN] float32, of a convolution
    scale, shift,  # (C,) of the first or only bank, or None
    scale2, shift2,  # (C,) of the second bank
    bank,  # int32 (1,) or (N,)
    residual_at,  # pointers [BM, BN], or None
    n,  # [BM] sample of each row; a valid one also where the row is masked out
    channel,  # [BN]
    channel_mask,  # [BN]
    mask,  # [BM, BN] what will be stored
    ACTIVATION: tl.constexpr,
    BANK: tl.constexpr,  # none, scalar, per sample
):
    """`epilogue_reference` on a tile, float32. The caller stores it: one of several tiles has to load for all first."""
    if BANK == 2:
        # Rows of a tile nearly always share their bank. If so one pair of vectors is read, not a [BM, BN] gather.
        b = (tl.load(bank + n) != 0).to(tl.int32)
        low = tl.min(b, 0)
        high = tl.max(b, 0)
        z = _affine(acc, scale, shift, scale2, shift2, low != 0, channel, channel_mask)
        if low != high:
            z = tl.where(
                (b == low)[:, None], z, _affine(acc, scale, shift, scale2, shift2, high != 0, channel, channel_mask))
    elif BANK == 1:
        z = _affine(acc, scale, shift, scale2, shift2, tl.load(bank) != 0, channel, channel_mask)
    else:
        z = _affine(acc, scale, shift, None, None, False, channel, channel_mask)
    if residual_at is not None:
        z += tl.load(residual_at, mask=mask, other=0.0).to(tl.float32)
    return act(z, ACTIVATION)


@triton.jit
def _affine(acc, scale, shift, scale2, shift2, is_second, channel, channel_mask):
    z = acc
    if scale is not None and shift is not None:
        s = of_bank(scale, scale2, is_second, channel, channel_mask)[None, :]
        z = tl.fma(z, s, of_bank(shift, shift2, is_second, channel, channel_mask)[None, :])
    elif scale is not None:
        z = z * of_bank(scale, scale2, is_second, channel, channel_mask)[None, :]
    elif shift is not None:
        z = z + of_bank(shift, shift2, is_second, channel, channel_mask)[None, :]
    return z
