"""Skip-aware batch norm with fixed statistics (eval mode, frozen), with activation and residual add.

    y = act((x - mean) / sqrt(var + eps) * weight + bias + residual)

Forward reads x (and residual) once and writes y. Backward reads dy, x where the activation or the gradient of the
weight wants it, and residual where the activation does (neither is kept for it elsewhere), and writes dx and the
residual's gradient in the same pass; if the affine parameters train, that pass sums their gradients too. All bound by
HBM bandwidth; at batch 1 by the launch.

A tensor is seen as samples of pixels of channels, with a stride for each of the three, so that both layouts (and
mixtures of them, slower) are read in place. NHWC is one long sample, unless banks or flags differ between samples.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op

from .activation import act, act_grad, act_grad_reference, act_reference, check_activation
from .epilogue import PER_SAMPLE, check_inference, empty_output, flags_kind, per_bank, picked, write_active
from .launch import (
    SPLITS,
    banks,
    cdiv,
    check_eps,
    check_flags,
    check_no_alias,
    launch,
    layout_of,
    memory_format,
    next_power_of_2,
    no_second_derivative,
    on_gpu,
    tuned,
)

Pair = tuple[Tensor | None, Tensor | None]


@triton.jit
def _bank_parameters(weight, bias, mean, var, c, mask, eps):
    m = tl.load(mean + c, mask=mask, other=0.0).to(tl.float32)
    rstd = tl.rsqrt(tl.load(var + c, mask=mask, other=1.0).to(tl.float32) + eps)
    scale = rstd
    if weight is not None:
        scale = rstd * tl.load(weight + c, mask=mask, other=0.0).to(tl.float32)
    shift = tl.zeros_like(rstd)
    if bias is not None:
        shift = tl.load(bias + c, mask=mask, other=0.0).to(tl.float32)
    return m, rstd, scale, shift


@triton.jit
def _parameters(weight, bias, mean, var, weight2, bias2, mean2, var2, bank, c, mask, eps):
    """Of the channels c: mean, 1 / standard deviation, scale, shift, each [BC] float32; `bank` points at one value."""
    if bank is not None:
        if tl.load(bank) == 0:
            m, rstd, scale, shift = _bank_parameters(weight, bias, mean, var, c, mask, eps)
        else:
            m, rstd, scale, shift = _bank_parameters(weight2, bias2, mean2, var2, c, mask, eps)
    else:
        m, rstd, scale, shift = _bank_parameters(weight, bias, mean, var, c, mask, eps)
    return m, rstd, scale, shift


@triton.jit
def _place(C, splits, tiles, BP: tl.constexpr, BC: tl.constexpr):
    """What this program works on: block number (without channels), sample, first pixel (int64), first channel.

    Channels vary fastest, so that programs that run together read adjacent memory.
    """
    channel_blocks = tl.cdiv(C, BC)
    block = tl.program_id(0) // channel_blocks
    pixel = (block % splits).to(tl.int64) * (tiles * BP)
    return block, block // splits, pixel, tl.program_id(0) % channel_blocks * BC


@triton.jit
def batch_norm_eval_kernel(
    x,  # (samples, pixels, C) by its strides
    y,  # like x
    residual,  # like x, or None; may be y itself
    weight, bias, mean, var,  # (C,) of the first or only bank; weight and bias may be None
    weight2, bias2, mean2, var2,  # (C,) of the second bank
    bank,  # int32, one per sample by its stride, or None
    active,  # int32, one per sample by its stride, or None; 0: y keeps its bits
    C, P,  # channels, pixels of a sample
    splits,  # blocks of `tiles` tiles of BP pixels in a sample
    tiles,
    bank_stride, active_stride,  # 0: one value for all samples
    x_sample, x_channel, x_pixel,  # strides
    y_sample, y_channel, y_pixel,
    residual_sample, residual_channel, residual_pixel,
    eps,
    ACTIVATION: tl.constexpr,
    BP: tl.constexpr,
    BC: tl.constexpr,
):
    """One program per block of pixels and block of channels."""
    _, n, p0, c0 = _place(C, splits, tiles, BP, BC)
    if active is not None:
        flag = tl.load(active + n * active_stride)
        if flag == 0:
            return
    n = n.to(tl.int64)
    c = tl.arange(0, BC)
    p = tl.arange(0, BP)
    cmask = c0 + c < C
    if bank is not None:
        bank += n * bank_stride
    mean, _, scale, shift = _parameters(
        weight, bias, mean, var, weight2, bias2, mean2, var2, bank, c0 + c, cmask, eps)
    x += n * x_sample + c0.to(tl.int64) * x_channel
    y += n * y_sample + c0.to(tl.int64) * y_channel
    if residual is not None:
        residual += n * residual_sample + c0.to(tl.int64) * residual_channel
    for _ in range(tiles):
        mask = (p0 + p < P)[:, None] & cmask[None, :]
        at = x + p0 * x_pixel + p[:, None] * x_pixel + c[None, :] * x_channel
        # The mean is subtracted first: folded into the shift, it would cancel where it is large.
        z = tl.fma(tl.load(at, mask=mask, other=0.0).to(tl.float32) - mean[None, :], scale[None, :], shift[None, :])
        if residual is not None:
            at = residual + p0 * residual_pixel + p[:, None] * residual_pixel + c[None, :] * residual_channel
            z += tl.load(at, mask=mask, other=0.0).to(tl.float32)
        at = y + p0 * y_pixel + p[:, None] * y_pixel + c[None, :] * y_channel
        tl.store(at, act(z, ACTIVATION).to(y.dtype.element_ty), mask=mask)
        p0 += BP


@triton.jit
def batch_norm_eval_backward_kernel(
    dy,  # (samples, pixels, C) by its strides
    x,  # like dy; None if neither the activation nor dweight wants it
    residual,  # like dy; None if there is none or the activation is the identity
    dx, dresidual,  # like dy, each None if not wanted
    weight_sums, bias_sums,  # float32 (blocks, C): partial sums of the parameters' gradients; each None if not wanted
    weight, bias, mean, var,  # and all below: as in the forward kernel
    weight2, bias2, mean2, var2,
    bank,
    C, P, splits, tiles,
    bank_stride,
    dy_sample, dy_channel, dy_pixel,
    x_sample, x_channel, x_pixel,
    residual_sample, residual_channel, residual_pixel,
    dx_sample, dx_channel, dx_pixel,
    dresidual_sample, dresidual_channel, dresidual_pixel,
    eps,
    ACTIVATION: tl.constexpr,
    BP: tl.constexpr,
    BC: tl.constexpr,
    STAGES: tl.constexpr,  # of the loop over tiles: loads in flight
):
    """One program per block of pixels and block of channels."""
    block, n, p0, c0 = _place(C, splits, tiles, BP, BC)
    n = n.to(tl.int64)
    c = tl.arange(0, BC)
    p = tl.arange(0, BP)
    cmask = c0 + c < C
    if bank is not None:
        bank += n * bank_stride
    mean, rstd, scale, shift = _parameters(
        weight, bias, mean, var, weight2, bias2, mean2, var2, bank, c0 + c, cmask, eps)
    dy += n * dy_sample + c0.to(tl.int64) * dy_channel
    if x is not None:
        x += n * x_sample + c0.to(tl.int64) * x_channel
    if residual is not None:
        residual += n * residual_sample + c0.to(tl.int64) * residual_channel
    if dx is not None:
        dx += n * dx_sample + c0.to(tl.int64) * dx_channel
    if dresidual is not None:
        dresidual += n * dresidual_sample + c0.to(tl.int64) * dresidual_channel
    weight_sum = tl.zeros([BP, BC], tl.float32)
    bias_sum = tl.zeros([BP, BC], tl.float32)
    for _ in tl.range(tiles, num_stages=STAGES):
        mask = (p0 + p < P)[:, None] & cmask[None, :]
        at = dy + p0 * dy_pixel + p[:, None] * dy_pixel + c[None, :] * dy_channel
        g = tl.load(at, mask=mask, other=0.0).to(tl.float32)
        if x is not None:
            at = x + p0 * x_pixel + p[:, None] * x_pixel + c[None, :] * x_channel
            centred = tl.load(at, mask=mask, other=0.0).to(tl.float32) - mean[None, :]
            if ACTIVATION != "identity":
                z = tl.fma(centred, scale[None, :], shift[None, :])
                if residual is not None:
                    at = residual + p0 * residual_pixel + p[:, None] * residual_pixel + c[None, :] * residual_channel
                    z += tl.load(at, mask=mask, other=0.0).to(tl.float32)
                g *= act_grad(z, ACTIVATION)
            if weight_sums is not None:
                # Masked, for what stands beyond the edge may be infinite parameters, and g NaN.
                weight_sum += tl.where(mask, g * centred, 0.0)
        if bias_sums is not None:
            bias_sum += tl.where(mask, g, 0.0)
        if dresidual is not None:
            at = dresidual + p0 * dresidual_pixel + p[:, None] * dresidual_pixel + c[None, :] * dresidual_channel
            tl.store(at, g.to(dresidual.dtype.element_ty), mask=mask)
        if dx is not None:
            at = dx + p0 * dx_pixel + p[:, None] * dx_pixel + c[None, :] * dx_channel
            tl.store(at, (g * scale[None, :]).to(dx.dtype.element_ty), mask=mask)
        p0 += BP
    at = block.to(tl.int64) * C + c0 + c
    if weight_sums is not None:
        tl.store(weight_sums + at, tl.sum(weight_sum, 0) * rstd, mask=cmask)
    if bias_sums is not None:
        tl.store(bias_sums + at, tl.sum(bias_sum, 0), mask=cmask)


@triton.jit
def batch_norm_eval_sum_kernel(
    sums,  # float32 (blocks, C)
    total, total2,  # (C,) of each bank, either may be None
    bank,  # as in the backward kernel
    C, blocks, splits,
    bank_stride,
    BB: tl.constexpr,
    BC: tl.constexpr,
):
    """The gradient of one parameter of each bank: its partial sums added, always in the same order."""
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    cmask = c < C
    first = tl.zeros([BB, BC], tl.float32)
    second = tl.zeros([BB, BC], tl.float32)
    for start in range(0, blocks, BB):
        b = start + tl.arange(0, BB)
        mask = (b < blocks)[:, None] & cmask[None, :]
        v = tl.load(sums + b.to(tl.int64)[:, None] * C + c[None, :], mask=mask, other=0.0)
        if bank is not None:
            flag = tl.load(bank + (b // splits).to(tl.int64) * bank_stride, mask=b < blocks, other=0)[:, None]
            # Chosen, not multiplied by 0: a NaN of one bank stays out of the other's gradient.
            first += tl.where(flag == 0, v, 0.0)
            second += tl.where(flag == 0, 0.0, v)
        else:
            first += v
    if total is not None:
        tl.store(total + c, tl.sum(first, 0).to(total.dtype.element_ty), mask=cmask)
    if total2 is not None:
        tl.store(total2 + c, tl.sum(second, 0).to(total2.dtype.element_ty), mask=cmask)


def _strides(x: Tensor | None, name: str) -> tuple[int, int, int]:
    """Of sample, channel and pixel, whatever the layout."""
    if x is None:
        return 0, 0, 0
    layout = layout_of(x, name)
    pixels = x.shape[2] * x.shape[3]
    if layout.channels_last:
        return pixels * layout.stride, 1, layout.stride
    return layout.stride, pixels, layout.stride if pixels == 1 else 1


def _flag_stride(flags: Tensor | None) -> int:
    return 1 if flags_kind(flags) == PER_SAMPLE else 0


def _samples(x: Tensor, strides: Sequence[tuple[int, int, int]], per_sample: bool) -> tuple[int, int]:
    """(samples, pixels of each) as the kernels see them: one sample where rows of pixels go on across samples."""
    n, _, h, w = x.shape
    if not per_sample and all(sample == h * w * pixel for sample, _, pixel in strides):
        return 1, n * h * w
    return n, h * w


def _tile(channels: int, pixels: int, adjacent_channels: bool, num_warps: int) -> dict[str, int]:
    """2048 elements: one 16-byte load of a half-precision tensor for each of 256 threads, or two for each of 128.

    Of float32 it is two for each of 256: four for each of 128 would not fit their registers on every architecture.
    """
    if adjacent_channels:
        bc = min(next_power_of_2(channels), 64)
        return {"BP": 2048 // bc, "BC": bc, "num_warps": num_warps}
    bp = min(next_power_of_2(pixels), 1024) if isinstance(pixels, int) else 256
    # A thread has elements of many channels if there are few pixels, and their parameters take registers.
    return {"BP": bp, "BC": min(next_power_of_2(channels), 2048 // bp), "num_warps": 8}


def _split(samples: int, pixels: int, channel_blocks: int, bp: int, sums: bool) -> tuple[int, int]:
    """(blocks per sample, tiles per block)."""
    static = isinstance(pixels, int)
    if sums:
        # A bounded number of partial sums, and yet programs for the whole GPU.
        splits = cdiv(2 * SPLITS, samples * channel_blocks) if isinstance(samples, int) else 1
        if static:
            splits = min(splits, cdiv(pixels, bp))
        return splits, cdiv(pixels, bp * splits)
    # Several tiles, so that parameters are read once for many pixels, unless the GPU would then not be full.
    tiles = min(4, cdiv(pixels, bp)) if static else 4
    if static and isinstance(samples, int) and samples * cdiv(pixels, bp) * channel_blocks <= 16 * SPLITS:
        tiles = 1
    return cdiv(pixels, bp * tiles), tiles


def launch_batch_norm_eval(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, var: Tensor, residual: Tensor | None,
    bank: Tensor | None, weight2: Tensor | None, bias2: Tensor | None, mean2: Tensor | None, var2: Tensor | None,
    activation: str, eps: float, out: Tensor | None = None, active: Tensor | None = None,
) -> Tensor:
    """The op on the GPU, arguments as there; writes into `out` if given."""
    y = empty_output(x, x.shape, residual) if out is None else out
    if x.numel() == 0:
        return y
    strides = [_strides(t, name) for t, name in ((x, "x"), (y, "out"), (residual, "residual"))]
    channels = x.shape[1]
    per_sample = PER_SAMPLE in (flags_kind(bank), flags_kind(active))
    samples, pixels = _samples(x, strides if residual is not None else strides[:2], per_sample)
    adjacent = strides[0][1] == 1
    config = tuned("batch_norm_eval", x.device, _tile(channels, pixels, adjacent, num_warps=2 * x.element_size()),
                   channels=channels, channels_last=int(adjacent), dtype=str(x.dtype))
    bp, channel_blocks = config["BP"], cdiv(channels, config["BC"])
    splits, tiles = _split(samples, pixels, channel_blocks, bp, sums=False)
    launch(
        batch_norm_eval_kernel, (samples * splits * channel_blocks,),
        x, y, residual, weight, bias, mean, var, weight2, bias2, mean2, var2, bank, active,
        channels, pixels, splits, tiles, _flag_stride(bank), _flag_stride(active),
        *strides[0], *strides[1], *strides[2], eps, ACTIVATION=activation, **config,
    )
    return y


def launch_batch_norm_eval_backward(
    dy: Tensor, x: Tensor | None, weight: Tensor | None, bias: Tensor | None, mean: Tensor, var: Tensor,
    residual: Tensor | None, bank: Tensor | None, weight2: Tensor | None, bias2: Tensor | None, mean2: Tensor | None,
    var2: Tensor | None, activation: str, eps: float, needs: Sequence[bool], x_dtype: torch.dtype | None = None,
    channels_last: bool | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The backward op on the GPU, arguments and results as there."""
    if x is not None:
        x_dtype, channels_last = _like(x)
    grads = _empty_grads(dy, residual, weight, bias, weight2, bias2, needs, x_dtype, channels_last)
    if dy.numel() == 0:
        for grad in grads[2:]:
            grad.zero_()
        return grads
    dx, dresidual, dweight, dbias, dweight2, dbias2 = (grad if need else None for grad, need in zip(grads, needs))
    if _expanded_or_other_layout(dy, channels_last):
        # A sum's gradient is expanded, another op's may be of the other layout: one copy, then everything is adjacent.
        dy = dy.contiguous(memory_format=_format(channels_last))
    train_weight, train_bias = needs[2] or needs[4], needs[3] or needs[5]
    read_x = x if activation != "identity" or train_weight else None
    read_residual = residual if activation != "identity" else None
    tensors = (dy, read_x, read_residual, dx, dresidual)
    names = ("dy", "x", "residual", "dx", "dresidual")
    strides = [_strides(t, name) for t, name in zip(tensors, names)]

    channels = dy.shape[1]
    present = [s for s, t in zip(strides, tensors) if t is not None]
    samples, pixels = _samples(dy, present, flags_kind(bank) == PER_SAMPLE)
    sums = train_weight or train_bias
    adjacent = strides[0][1] == 1
    # Long loops of few programs where there are sums: those need loads in flight, others have many programs instead.
    default = _tile(channels, pixels, adjacent, 8 if sums else 2 * x_dtype.itemsize) | {"STAGES": 3 if sums else 1}
    config = tuned("batch_norm_eval_backward", dy.device, default, channels=channels, channels_last=int(adjacent),
                   sums=int(sums), dtype=str(x_dtype))
    bp, channel_blocks = config["BP"], cdiv(channels, config["BC"])
    splits, tiles = _split(samples, pixels, channel_blocks, bp, sums)
    blocks = samples * splits
    weight_sums = dy.new_empty((blocks, channels), dtype=torch.float32) if train_weight else None
    bias_sums = dy.new_empty((blocks, channels), dtype=torch.float32) if train_bias else None
    launch(
        batch_norm_eval_backward_kernel, (blocks * channel_blocks,),
        dy, read_x, read_residual, dx, dresidual, weight_sums, bias_sums,
        weight, bias, mean, var, weight2, bias2, mean2, var2, bank, channels, pixels, splits, tiles, _flag_stride(bank),
        *strides[0], *strides[1], *strides[2], *strides[3], *strides[4], eps, ACTIVATION=activation, **config,
    )
    for partial, total, total2 in ((weight_sums, dweight, dweight2), (bias_sums, dbias, dbias2)):
        if partial is not None:
            launch(batch_norm_eval_sum_kernel, (cdiv(channels, 16),), partial, total, total2, bank, channels, blocks,
                   splits, _flag_stride(bank), BB=64, BC=16, num_warps=4)
    return grads


def _like(x: Tensor) -> tuple[torch.dtype, bool]:
    """Dtype and layout: all that the gradient takes from x itself."""
    return x.dtype, memory_format(x) == torch.channels_last


def _format(channels_last: bool) -> torch.memory_format:
    return torch.channels_last if channels_last else torch.contiguous_format


def _expanded_or_other_layout(dy: Tensor, channels_last: bool) -> bool:
    try:
        return layout_of(dy).channels_last != channels_last
    except ValueError:
        return True


def _empty_grads(
    dy: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, weight2: Tensor | None,
    bias2: Tensor | None, needs: Sequence[bool], x_dtype: torch.dtype, channels_last: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Memory for the gradients, each with dtype and layout of what it is the gradient of; empty where not wanted."""
    def of_map(dtype: torch.dtype, memory: torch.memory_format) -> Tensor:
        return torch.empty(dy.shape, dtype=dtype, device=dy.device, memory_format=memory)

    return (
        of_map(x_dtype, _format(channels_last)) if needs[0] else dy.new_empty(0),
        of_map(residual.dtype, memory_format(residual)) if needs[1] else dy.new_empty(0),
        *(torch.empty_like(t) if need else dy.new_empty(0)
          for t, need in zip((weight, bias, weight2, bias2), needs[2:])),
    )


def _pick(first: Tensor | None, second: Tensor | None, bank: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """One parameter of the live bank as it broadcasts, (1 or N, C, 1, 1)."""
    if first is None:
        return None
    return picked(first.to(dtype) if bank is None else torch.stack([first.to(dtype), second.to(dtype)]), bank)


def _affine(x, weight, bias, mean, var, bank, weight2, bias2, mean2, var2, eps, wide):
    """(x - mean), 1 / standard deviation, scale, and what the residual is added to; the first and the last None
    without x."""
    rstd = torch.rsqrt(_pick(var, var2, bank, wide) + eps)
    scale = rstd if weight is None else rstd * _pick(weight, weight2, bank, wide)
    if x is None:
        return None, rstd, scale, None
    centred = x.to(wide) - _pick(mean, mean2, bank, wide)
    z = centred * scale
    return centred, rstd, scale, z if bias is None else z + _pick(bias, bias2, bank, wide)


def batch_norm_eval_reference(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, var: Tensor, residual: Tensor | None,
    bank: Tensor | None, weight2: Tensor | None, bias2: Tensor | None, mean2: Tensor | None, var2: Tensor | None,
    activation: str, eps: float,
) -> Tensor:
    """The op in plain PyTorch."""
    y = empty_output(x, x.shape, residual)
    wide = torch.promote_types(y.dtype, torch.float32)
    *_, z = _affine(x, weight, bias, mean, var, bank, weight2, bias2, mean2, var2, eps, wide)
    return y.copy_(act_reference(z if residual is None else z + residual, activation))


def batch_norm_eval_backward_reference(
    dy: Tensor, x: Tensor | None, weight: Tensor | None, bias: Tensor | None, mean: Tensor, var: Tensor,
    residual: Tensor | None, bank: Tensor | None, weight2: Tensor | None, bias2: Tensor | None, mean2: Tensor | None,
    var2: Tensor | None, activation: str, eps: float, needs: Sequence[bool], x_dtype: torch.dtype | None = None,
    channels_last: bool | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The backward op in plain PyTorch."""
    if x is not None:
        x_dtype, channels_last = _like(x)
    g = dy.to(torch.promote_types(dy.dtype, torch.float32))
    centred, rstd, scale, z = _affine(x, weight, bias, mean, var, bank, weight2, bias2, mean2, var2, eps, g.dtype)
    if activation != "identity":
        g = g * act_grad_reference(z if residual is None else z + residual, activation)
    dweights = torch.atleast_2d(per_bank((g * centred * rstd).sum((2, 3)), bank)) if needs[2] or needs[4] else [None]
    dbiases = torch.atleast_2d(per_bank(g.sum((2, 3)), bank)) if needs[3] or needs[5] else [None]
    values = (g * scale, g, dweights[0], dbiases[0], dweights[-1], dbiases[-1])
    grads = _empty_grads(dy, residual, weight, bias, weight2, bias2, needs, x_dtype, channels_last)
    return tuple(grad.copy_(value) if need else grad for grad, value, need in zip(grads, values, needs))


@triton_op("adn::batch_norm_eval", mutates_args=())
def batch_norm_eval_op(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, var: Tensor, residual: Tensor | None,
    bank: Tensor | None, weight2: Tensor | None, bias2: Tensor | None, mean2: Tensor | None, var2: Tensor | None,
    activation: str, eps: float,
) -> Tensor:
    forward = launch_batch_norm_eval if on_gpu(x, residual) else batch_norm_eval_reference
    return forward(x, weight, bias, mean, var, residual, bank, weight2, bias2, mean2, var2, activation, eps)


@triton_op("adn::batch_norm_eval_", mutates_args=("out",))
def batch_norm_eval_inplace_op(
    out: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, var: Tensor, accumulate: bool,
    bank: Tensor | None, weight2: Tensor | None, bias2: Tensor | None, mean2: Tensor | None, var2: Tensor | None,
    activation: str, eps: float, active: Tensor | None,
) -> None:
    check_no_alias(out, x=x)
    args = (x, weight, bias, mean, var, out if accumulate else None, bank, weight2, bias2, mean2, var2, activation, eps)
    if on_gpu(x, out):
        launch_batch_norm_eval(*args, out=out, active=active)
    else:
        write_active(out, batch_norm_eval_reference(*args), active)


@triton_op("adn::batch_norm_eval_backward", mutates_args=())
def batch_norm_eval_backward_op(
    dy: Tensor, x: Tensor | None, weight: Tensor | None, bias: Tensor | None, mean: Tensor, var: Tensor,
    residual: Tensor | None, bank: Tensor | None, weight2: Tensor | None, bias2: Tensor | None, mean2: Tensor | None,
    var2: Tensor | None, activation: str, eps: float, needs: Sequence[bool], x_dtype: torch.dtype | None = None,
    channels_last: bool | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of x, residual, weight, bias, weight2, bias2.

    Args:
        dy: (N, C, H, W), the gradient of y; the others are arguments of the forward.
        x: may be None if the activation is the identity and no weight's gradient is wanted.
        residual: may be None if the activation is the identity and its gradient (which is dy) is not wanted.
        needs: for each of the six, whether it is wanted. The others come back empty, and cost nothing.
        x_dtype, channels_last: of x, if it is None.
    """
    backward = launch_batch_norm_eval_backward if on_gpu(dy, x, residual) else batch_norm_eval_backward_reference
    return backward(dy, x, weight, bias, mean, var, residual, bank, weight2, bias2, mean2, var2, activation, eps, needs,
                    x_dtype, channels_last)


no_second_derivative(batch_norm_eval_backward_op)


def _setup_context(ctx, inputs, output):
    x, weight, bias, mean, var, residual, bank, *second, ctx.activation, ctx.eps = inputs
    ctx.x_dtype, ctx.channels_last = _like(x)
    ctx.residual_dtype = None if residual is None else residual.dtype
    # Full-size tensors only where backward reads them.
    if ctx.activation == "identity":
        residual = None
        if not (ctx.needs_input_grad[1] or ctx.needs_input_grad[7]):
            x = None
    # The caller may switch the bank before backward.
    bank = None if bank is None else bank.clone()
    ctx.save_for_backward(x, weight, bias, mean, var, residual, bank, *second)


def _backward(ctx, dy):
    needs = [ctx.needs_input_grad[i] for i in (0, 5, 1, 2, 7, 8)]
    dresidual = None
    if needs[1] and ctx.activation == "identity":
        # No pass over memory: it is the gradient that arrived.
        dresidual, needs[1] = dy.to(ctx.residual_dtype), False
    grads = [None] * 6
    if any(needs):
        found = batch_norm_eval_backward_op(
            dy, *ctx.saved_tensors, ctx.activation, ctx.eps, needs, ctx.x_dtype, ctx.channels_last)
        grads = [grad if need else None for grad, need in zip(found, needs)]
    dx, dr, dweight, dbias, dweight2, dbias2 = grads
    return (dx, dweight, dbias, None, None, dr if dresidual is None else dresidual, None, dweight2, dbias2, None, None,
            None, None)


batch_norm_eval_op.register_autograd(_backward, setup_context=_setup_context)


def _check_like(t: Tensor, name: str, x: Tensor) -> None:
    if t.ndim != 4 or any(a != b for a, b in zip(t.shape, x.shape)) or not t.is_floating_point():
        raise ValueError(f"{name} is {t.dtype} of shape {tuple(t.shape)}; pass floating {tuple(x.shape)} as x")
    if t.device != x.device:
        raise ValueError(f"{name} is on {t.device}, x on {x.device}; pass both on one device")
    layout_of(t, name)


def _prepared(x, weight, bias, running_mean, running_var, bank, activation, eps):
    """The eight parameters, checked: four of the first bank, four of the second."""
    check_activation(activation)
    check_eps(eps)
    if x.ndim != 4 or not x.is_floating_point():
        raise ValueError(f"x is {x.dtype} of shape {tuple(x.shape)}; pass floating (N, C, H, W)")
    layout_of(x)
    check_flags(bank, "bank", x.shape[0], x.device)
    first, second = banks(x, x.shape[1], bank, weight=weight, bias=bias, running_mean=running_mean,
                          running_var=running_var)
    if first[2] is None or first[3] is None:
        raise ValueError(f"running_{'mean' if first[2] is None else 'var'} is None: eval mode needs statistics")
    return first, second


def batch_norm_eval(
    x: Tensor,
    weight: Tensor | Pair | None,
    bias: Tensor | Pair | None,
    running_mean: Tensor | Pair,
    running_var: Tensor | Pair,
    *,
    residual: Tensor | None = None,
    activation: str = "identity",
    eps: float = 1e-5,
    bank: Tensor | None = None,
) -> Tensor:
    """`act((x - running_mean) / sqrt(running_var + eps) * weight + bias + residual)`.

    That is `torch.nn.functional.batch_norm` in eval mode (or `torchvision.ops.FrozenBatchNorm2d`), then the rest.
    Computed in float32 and rounded once. Statistics have no gradient; weight and bias have, if they require one.

    Bytes: forward x + residual + y; backward dy (+ x, + residual where the activation is not the identity; + x for the
    gradient of weight) + dx + dresidual. Bound by HBM bandwidth.

    Args:
        x: (N, C, H, W), NCHW or NHWC, also a slice of channels; float32, float16 or bfloat16 on a GPU (float64 is
            computed by plain PyTorch).
        weight, bias: (C,), any floating dtype, or None.
        running_mean, running_var: (C,), any floating dtype.
        residual: like x, any floating dtype; read fastest in the layout of x.
        bank: int32, one value or one per sample, read on the device: 0 the first bank, else the second. Then each of
            the four parameters is a pair (weight and bias may be None), and both banks have gradients. Without it they
            are those of the live bank.

    Returns:
        (N, C, H, W) in the layout of x; dtype that of x + residual.

    Raises:
        ValueError: if a shape, dtype, device, layout or name does not fit.
    """
    first, second = _prepared(x, weight, bias, running_mean, running_var, bank, activation, eps)
    if residual is not None:
        _check_like(residual, "residual", x)
    return batch_norm_eval_op(x, *first, residual, bank, *second, activation, eps)


def batch_norm_eval_(
    out: Tensor,
    x: Tensor,
    weight: Tensor | Pair | None,
    bias: Tensor | Pair | None,
    running_mean: Tensor | Pair,
    running_var: Tensor | Pair,
    *,
    accumulate: bool = False,
    activation: str = "identity",
    eps: float = 1e-5,
    bank: Tensor | None = None,
    active: Tensor | None = None,
) -> Tensor:
    """`batch_norm_eval` written into `out`, which with `accumulate` is the residual too; can be bypassed.

    Bytes: x + out, with `accumulate` out twice; none for bypassed samples. Bound by HBM bandwidth.

    Args:
        out: like x, any floating dtype; shares no memory with it.
        active: int32, one value or one per sample, read on the device: where 0, `out` keeps its bits.
        Others as in `batch_norm_eval`.

    Returns:
        out.

    Raises:
        ValueError: as `batch_norm_eval`; if x shares memory with out.
        RuntimeError: if autograd would have to follow.
    """
    first, second = _prepared(x, weight, bias, running_mean, running_var, bank, activation, eps)
    check_inference("batch_norm_eval_", out, x, *first[:2], *second[:2])
    _check_like(out, "out", x)
    check_flags(active, "active", x.shape[0], x.device)
    batch_norm_eval_inplace_op(out, x, *first, accumulate, bank, *second, activation, eps, active)
    return out
