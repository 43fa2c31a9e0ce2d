"""What every fused convolution ends with: scale and shift of the live norm bank, residual, activation.

`y = act(conv(x, w) * scale + shift + residual)`, computed in float32 and rounded once. Scale and shift are an eval-mode
norm (or a bias, scale left out), see `fold_norm`. They are float32, of shape (C,) for one bank, or (2, C) for both:
then `bank`, an int32 tensor of one value or one per sample, picks on the device (0 the first, else the second).

`active`, int32, one value or one per sample, bypasses: where it is 0 the output keeps what it held, bit for bit. Only
the in-place forms of ops (`conv1x1_` ...) take it, for only they have an output that holds something.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.library import custom_op

from .activation import act, act_grad_reference, act_reference, check_activation
from .launch import check_flags, check_no_alias, memory_format, no_second_derivative

# How many of something an int32 `bank` or `active` holds, as kernels are told it.
NONE, SCALAR, PER_SAMPLE = 0, 1, 2


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


def flags_kind(flags: Tensor | None) -> int:
    """`NONE`, `SCALAR` or `PER_SAMPLE`."""
    if flags is None:
        return NONE
    return SCALAR if flags.ndim == 0 or flags.shape[0] == 1 else PER_SAMPLE


def check_epilogue(
    x: Tensor, weight: Tensor, out_shape: Sequence[int], scale: Tensor | None, shift: Tensor | None,
    bank: Tensor | None, residual: Tensor | None, activation: str, out: Tensor | None = None,
    active: Tensor | None = None,
) -> None:
    """Raises ValueError for anything an epilogue cannot take; works on symbolic sizes without guarding them.

    Args:
        x, weight: checked already (`gemm.check_conv`). out_shape: (N, C, OH, OW).
        residual, out: of that shape. The other arguments are those of the op.
    """
    check_activation(activation)
    channels = out_shape[1]
    for name, vector in (("scale", scale), ("shift", shift)):
        if vector is None:
            continue
        want = (channels,) if bank is None else (2, channels)
        if tuple(vector.shape) != want:
            raise ValueError(f"{name} has shape {tuple(vector.shape)}; pass {want}"
                             + (" (one bank, as no `bank` is given)" if bank is None else " (both banks)"))
        # Of x's dtype: a bias as cuDNN takes it, see `conv.fold`.
        if vector.dtype not in (torch.float32, x.dtype) or not vector.is_contiguous():
            raise ValueError(f"{name} is {vector.dtype} with strides {vector.stride()}; pass contiguous float32")
        if vector.device != x.device:
            raise ValueError(f"{name} is on {vector.device}, x on {x.device}; pass both on one device")
    if bank is not None and scale is None and shift is None:
        raise ValueError("`bank` is given but neither scale nor shift to choose from")
    check_flags(bank, "bank", x.shape[0], x.device)
    check_flags(active, "active", x.shape[0], x.device)
    for name, tensor in (("residual", residual), ("out", out)):
        if tensor is None:
            continue
        if tensor.ndim != 4 or any(a != b for a, b in zip(tensor.shape, out_shape)):
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; the output has {tuple(out_shape)}")
        if tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device}, x on {x.device}; pass both on one device")
        if not tensor.is_floating_point():
            raise ValueError(f"{name} is {tensor.dtype}; pass float32, float16 or bfloat16")
    if out is not None:
        check_no_alias(out, x=x, weight=weight, scale=scale, shift=shift)


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
    """Raises RuntimeError if autograd is on and would have to follow an in-place op."""
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        raise RuntimeError(f"{name} writes in place and has no backward: call it under torch.no_grad(), or use "
                           f"{name.removesuffix('_')}")


def empty_output(x: Tensor, shape: Sequence[int], residual: Tensor | None) -> Tensor:
    """Memory for an output (N, C, H, W): in x's layout; its dtype that of `conv + residual` in torch."""
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    return torch.empty(shape, dtype=dtype, device=x.device, memory_format=memory_format(x))


def picked(vector: Tensor, bank: Tensor | None) -> Tensor:
    """Scale or shift as it broadcasts against (N, C, H, W): (1 or N, C, 1, 1)."""
    if bank is None:
        return vector[None, :, None, None]
    # Not vector[bank]: indexing by a 0-d tensor synchronises.
    return vector.index_select(0, (bank != 0).long().reshape(-1))[:, :, None, None]


def epilogue_reference(
    z: Tensor, scale: Tensor | None, shift: Tensor | None, bank: Tensor | None, residual: Tensor | None, activation: str
) -> Tensor:
    """`act(z * scale + shift + residual)`, z (N, C, H, W) of float32 or float64, and so the result."""
    if scale is not None:
        z = z * picked(scale, bank)
    if shift is not None:
        z = z + picked(shift, bank)
    if residual is not None:
        z = z + residual
    return act_reference(z, activation)


def conv_reference(
    x: Tensor, weight: Tensor, scale: Tensor | None, shift: Tensor | None, residual: Tensor | None,
    bank: Tensor | None, activation: str, stride: int, padding: int = 0, groups: int = 1,
) -> Tensor:
    """`act(conv2d(x, weight, ...) * scale + shift + residual)`, computed and returned in float32 (float64 stays)."""
    wide = torch.promote_types(x.dtype, torch.float32)
    with no_autocast(x):
        z = F.conv2d(x.to(wide), weight.to(wide), None, stride, padding, 1, groups)
    return epilogue_reference(z, scale, shift, bank, residual, activation)


def write_active(out: Tensor, y: Tensor, active: Tensor | None) -> None:
    """Reference of the bypass: out[i] = y[i] where active, NaN and all; elsewhere out keeps its bits."""
    if active is None:
        out.copy_(y)
    else:
        out.copy_(torch.where((active != 0).reshape(-1, *[1] * (out.ndim - 1)), y.to(out.dtype), out))


@triton.jit
def epilogue(
    acc,  # [BM, BN] float32: the convolution, one row per output pixel
    scale, shift,  # float32 (C,) or (2, C), or None
    bank,  # int32 (1,) or (N,)
    residual_at,  # pointers [BM, BN], or None
    out_at,  # pointers [BM, BN]
    n,  # [BM] sample of each row; a valid one also where the row is masked out
    channel,  # [BN]
    C,
    channel_mask,  # [BN]
    mask,  # [BM, BN] what to store
    ACTIVATION: tl.constexpr,
    BANK: tl.constexpr,  # none, scalar, per sample
):
    """`epilogue_reference` on the tile of a convolution; stores it."""
    y = epilogue_value(acc, scale, shift, bank, residual_at, n, channel, C, channel_mask, mask, ACTIVATION, BANK)
    tl.store(out_at, y.to(out_at.dtype.element_ty), mask=mask)


@triton.jit
def epilogue_value(
    acc, scale, shift, bank, residual_at, n, channel, C, channel_mask, mask, ACTIVATION: tl.constexpr,
    BANK: tl.constexpr,
):
    """What `epilogue` stores, float32: for kernels of several tiles, which have to load for all before they store."""
    if BANK == 2:
        # Rows of a tile nearly always share their bank. If so one pair of vectors is read, not a [BM, BN] gather.
        b = (tl.load(bank + n) != 0).to(tl.int32)
        low = tl.min(b, 0)
        high = tl.max(b, 0)
        z = _affine(acc, scale, shift, low * C + channel, channel_mask)
        if low != high:
            z = tl.where((b == low)[:, None], z, _affine(acc, scale, shift, high * C + channel, channel_mask))
    elif BANK == 1:
        b = (tl.load(bank) != 0).to(tl.int32)
        z = _affine(acc, scale, shift, b * C + channel, channel_mask)
    else:
        z = _affine(acc, scale, shift, channel, channel_mask)
    if residual_at is not None:
        z += tl.load(residual_at, mask=mask, other=0.0).to(tl.float32)
    return act(z, ACTIVATION)


@triton.jit
def _affine(acc, scale, shift, at, channel_mask):
    z = acc
    if scale is not None and shift is not None:
        s = tl.load(scale + at, mask=channel_mask, other=0.0).to(tl.float32)[None, :]
        z = tl.fma(z, s, tl.load(shift + at, mask=channel_mask, other=0.0).to(tl.float32)[None, :])
    elif scale is not None:
        z = z * tl.load(scale + at, mask=channel_mask, other=0.0).to(tl.float32)[None, :]
    elif shift is not None:
        z = z + tl.load(shift + at, mask=channel_mask, other=0.0).to(tl.float32)[None, :]
    return z


@custom_op("adn::conv_act_backward", mutates_args=())
def conv_act_backward(
    dy: Tensor, x: Tensor, weight: Tensor, scale: Tensor | None, shift: Tensor | None, residual: Tensor | None,
    bank: Tensor | None, activation: str, stride: int, padding: int, groups: int, needs: Sequence[bool],
) -> list[Tensor]:
    """Backward of every fused convolution, in plain PyTorch: the convolution is recomputed, nothing else was saved.

    Args:
        dy: (N, C, OH, OW), the gradient of y; the other arguments are those of the forward.
        needs: for each of x, weight, scale, shift, residual, whether its gradient is wanted.

    Returns:
        The five gradients, each with dtype and layout of what it is the gradient of; an empty tensor where not wanted.
    """
    with no_autocast(x):
        conv = F.conv2d(x, weight, None, stride, padding, 1, groups)
    dconv, dscale, dshift, dresidual = epilogue_backward(dy, conv, scale, shift, residual, bank, activation, needs)
    dx = dw = None
    if needs[0] or needs[1]:
        dx, dw, _ = torch.ops.aten.convolution_backward(
            dconv.to(x.dtype), x, weight, None, [stride] * 2, [padding] * 2, [1, 1], False, [0, 0], groups,
            [needs[0], needs[1], False],
        )
    return gradients((x, weight, scale, shift, residual), needs, (dx, dw, dscale, dshift, dresidual))


@conv_act_backward.register_fake
def _(dy, x, weight, scale, shift, residual, bank, activation, stride, padding, groups, needs):
    return empty_gradients((x, weight, scale, shift, residual), needs)


no_second_derivative(conv_act_backward)


def register_backward(op: Any, geometry: Callable[..., tuple[int, int, int]]) -> None:
    """Registers `conv_act_backward` for an op of arguments (x, weight, scale, shift, residual, bank, activation, ...).

    Args:
        geometry: x and the arguments after `activation` -> (stride, padding, groups).
    """

    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        *tensors, bank, activation = inputs[:7]
        ctx.arguments = activation, *geometry(inputs[0], *inputs[7:])
        ctx.save_for_backward(*tensors, kept(bank))

    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad[:5]
        grads = conv_act_backward(dy, *ctx.saved_tensors, *ctx.arguments, needs)
        others = len(ctx.needs_input_grad) - 5
        return *(grad if need else None for grad, need in zip(grads, needs)), *[None] * others

    op.register_autograd(backward, setup_context=setup_context)


def kept(bank: Tensor | None) -> Tensor | None:
    """For the backward. A copy: the model may write the next depth's bank into the same memory before it runs."""
    return None if bank is None else bank.clone()


def epilogue_backward(
    dy: Tensor, conv: Tensor, scale: Tensor | None, shift: Tensor | None, residual: Tensor | None,
    bank: Tensor | None, activation: str, needs: Sequence[bool],
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
    """Gradients of `epilogue_reference` at `conv`, in at least float32: of conv, scale, shift, residual.

    Args:
        dy, conv: (N, C, H, W).
        needs: as for `conv_act_backward`; scale and shift have None where theirs is not wanted.
    """
    conv = conv.to(torch.promote_types(conv.dtype, torch.float32))
    z = conv
    if scale is not None:
        z = z * picked(scale, bank)
    if shift is not None:
        z = z + picked(shift, bank)
    if residual is not None:
        z = z + residual
    g = dy.to(z.dtype) * act_grad_reference(z, activation)
    dscale = per_bank((g * conv).sum((2, 3)), bank) if needs[2] else None
    dshift = per_bank(g.sum((2, 3)), bank) if needs[3] else None
    return g if scale is None else g * picked(scale, bank), dscale, dshift, g


def gradients(
    given: Sequence[Tensor | None], needs: Sequence[bool], grads: Sequence[Tensor | None]
) -> list[Tensor]:
    """What a backward op returns: each gradient with dtype and layout of its tensor; empty where not wanted."""
    return [empty.copy_(grad) if need else empty for empty, need, grad in zip(
        empty_gradients(given, needs), needs, grads)]


def empty_gradients(given: Sequence[Tensor | None], needs: Sequence[bool]) -> list[Tensor]:
    """Memory for `gradients`."""
    return [torch.empty_like(t) if need else given[0].new_empty(0) for t, need in zip(given, needs)]


def per_bank(per_sample: Tensor, bank: Tensor | None) -> Tensor:
    """(N, C) summed over the samples of each bank: (C,), or (2, C) if there are two."""
    if bank is None:
        return per_sample.sum(0)
    second = (bank != 0).reshape(-1, 1)
    # Chosen, not multiplied by 0: a NaN in a sample of one bank stays out of the other's gradient.
    return torch.stack([torch.where(second, 0, per_sample).sum(0), torch.where(second, per_sample, 0).sum(0)])
