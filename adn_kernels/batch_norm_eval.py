"""Skip-aware batch norm with fixed statistics (eval mode, frozen), with activation and residual add.

    y = act((x - mean) / sqrt(var + eps) * weight + bias + residual)

Forward reads x (and residual) once and writes y. Backward reads dy, x where the activation or the gradient of the
weight wants it, and residual where the activation does (neither is kept for it elsewhere), and writes dx and the
residual's gradient in the same pass; if the affine parameters train, that pass sums their gradients too. All bound by
HBM bandwidth; at batch 1 by the launch.

Both layouts (and mixtures of them, slower) are read in place, see `view.py`. NHWC is one long sample, unless banks
differ between samples.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op

from .activation import act, act_grad, act_grad_reference, act_reference, check_activation
from .bank import PER_SAMPLE, Vectors, banks, check_flags, flag_stride, flags_kind, of_bank, per_bank, picked
from .column_sum import launch_column_sum
from .epilogue import empty_output
from .launch import (
    SPLITS,
    cdiv,
    check_eps,
    launch,
    next_power_of_2,
    no_second_derivative,
    on_gpu,
    stages,
    tuned,
)
from .view import Strides, View, arguments, in_elements, joined, memory_format, tile_at, view_of_image


@triton.jit
def _parameters(weight, bias, mean, var, weight2, bias2, mean2, var2, bank, c, mask, eps):
    """Of the channels c: mean, 1 / standard deviation, scale, shift, each [BC] float32; `bank` points at one value."""
    is_second = False
    if bank is not None:
        is_second = tl.load(bank) != 0
    m = tl.zeros(c.shape, tl.float32)
    rstd = tl.full(c.shape, 1.0, tl.float32)
    if mean is not None:
        m = of_bank(mean, mean2, is_second, c, mask)
        rstd = tl.rsqrt(tl.where(mask, of_bank(var, var2, is_second, c, mask), 1.0) + eps)
    scale = rstd
    if weight is not None:
        scale = rstd * of_bank(weight, weight2, is_second, c, mask)
    shift = tl.zeros_like(rstd)
    if bias is not None:
        shift = of_bank(bias, bias2, is_second, c, mask)
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
    residual,  # like x, or None
    weight, bias, mean, var,  # (C,) of the first or only bank; weight and bias may be None, mean and var together
    weight2, bias2, mean2, var2,  # (C,) of the second bank
    bank,  # int32, one per sample by its stride, or None
    C, P,  # channels, pixels of a sample
    splits,  # blocks of `tiles` tiles of BP pixels in a sample
    tiles,
    bank_stride,  # 0: one value for all samples
    x_sample, x_pixel, x_channel,  # strides
    y_sample, y_pixel, y_channel,
    residual_sample, residual_pixel, residual_channel,
    eps,
    ACTIVATION: tl.constexpr,
    BP: tl.constexpr,
    BC: tl.constexpr,
    UNIT: tl.constexpr, LAST: tl.constexpr, FAR: tl.constexpr,  # of `tile_at`
):
    """One program per block of pixels and block of channels."""
    C, P = in_elements(C, P, UNIT, LAST)
    _, n, p0, c0 = _place(C, splits, tiles, BP, BC)
    c = c0 + tl.arange(0, BC)
    p = tl.arange(0, BP)
    cmask = c < C
    if bank is not None:
        bank += n.to(tl.int64) * bank_stride
    mean, _, scale, shift = _parameters(
        weight, bias, mean, var, weight2, bias2, mean2, var2, bank, c, cmask, eps)
    for _ in range(tiles):
        mask = (p0 + p < P)[:, None] & cmask[None, :]
        at = tile_at(x, n, p0, p, c, x_sample, x_pixel, x_channel, UNIT, LAST, FAR)
        # The mean is subtracted first: folded into the shift, it would cancel where it is large.
        z = tl.fma(tl.load(at, mask=mask, other=0.0).to(tl.float32) - mean[None, :], scale[None, :], shift[None, :])
        if residual is not None:
            at = tile_at(residual, n, p0, p, c, residual_sample, residual_pixel, residual_channel, UNIT, LAST, FAR)
            z += tl.load(at, mask=mask, other=0.0).to(tl.float32)
        at = tile_at(y, n, p0, p, c, y_sample, y_pixel, y_channel, UNIT, LAST, FAR)
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
    dy_sample, dy_pixel, dy_channel,
    x_sample, x_pixel, x_channel,
    residual_sample, residual_pixel, residual_channel,
    dx_sample, dx_pixel, dx_channel,
    dresidual_sample, dresidual_pixel, dresidual_channel,
    eps,
    ACTIVATION: tl.constexpr,
    BP: tl.constexpr,
    BC: tl.constexpr,
    STAGES: tl.constexpr,  # of the loop over tiles: loads in flight
    UNIT: tl.constexpr, LAST: tl.constexpr, FAR: tl.constexpr,
):
    """One program per block of pixels and block of channels."""
    C, P = in_elements(C, P, UNIT, LAST)
    block, n, p0, c0 = _place(C, splits, tiles, BP, BC)
    c = c0 + tl.arange(0, BC)
    p = tl.arange(0, BP)
    cmask = c < C
    if bank is not None:
        bank += n.to(tl.int64) * bank_stride
    mean, rstd, scale, shift = _parameters(
        weight, bias, mean, var, weight2, bias2, mean2, var2, bank, c, cmask, eps)
    weight_sum = tl.zeros([BP, BC], tl.float32)
    bias_sum = tl.zeros([BP, BC], tl.float32)
    for _ in tl.range(tiles, num_stages=STAGES):
        mask = (p0 + p < P)[:, None] & cmask[None, :]
        at = tile_at(dy, n, p0, p, c, dy_sample, dy_pixel, dy_channel, UNIT, LAST, FAR)
        g = tl.load(at, mask=mask, other=0.0).to(tl.float32)
        if x is not None:
            at = tile_at(x, n, p0, p, c, x_sample, x_pixel, x_channel, UNIT, LAST, FAR)
            centred = tl.load(at, mask=mask, other=0.0).to(tl.float32) - mean[None, :]
            if ACTIVATION != "identity":
                z = tl.fma(centred, scale[None, :], shift[None, :])
                if residual is not None:
                    at = tile_at(
                        residual, n, p0, p, c, residual_sample, residual_pixel, residual_channel, UNIT, LAST, FAR)
                    z += tl.load(at, mask=mask, other=0.0).to(tl.float32)
                g *= act_grad(z, ACTIVATION)
            if weight_sums is not None:
                # Masked, for what stands beyond the edge may be infinite parameters, and g NaN.
                weight_sum += tl.where(mask, g * centred, 0.0)
        if bias_sums is not None:
            bias_sum += tl.where(mask, g, 0.0)
        if dresidual is not None:
            at = tile_at(dresidual, n, p0, p, c, dresidual_sample, dresidual_pixel, dresidual_channel, UNIT, LAST, FAR)
            tl.store(at, g.to(dresidual.dtype.element_ty), mask=mask)
        if dx is not None:
            at = tile_at(dx, n, p0, p, c, dx_sample, dx_pixel, dx_channel, UNIT, LAST, FAR)
            tl.store(at, (g * scale[None, :]).to(dx.dtype.element_ty), mask=mask)
        p0 += BP
    at = block.to(tl.int64) * C + c
    if weight_sums is not None:
        tl.store(weight_sums + at, tl.sum(weight_sum, 0) * rstd, mask=cmask)
    if bias_sums is not None:
        tl.store(bias_sums + at, tl.sum(bias_sum, 0), mask=cmask)


def _tile(
    channels: int, pixels: int, adjacent_channels: bool, num_warps: int, elements: int = 2048
) -> dict[str, int]:
    """2048 elements: one 16-byte load of a half-precision tensor for each of 256 threads, or two for each of 128.

    Of float32 it is two for each of 256: four for each of 128 would not fit their registers on every architecture.
    Backward has room for one: 1024 elements.
    """
    if adjacent_channels:
        bc = min(next_power_of_2(channels), 64)
        return {"BP": elements // bc, "BC": bc, "num_warps": num_warps}
    bp = min(next_power_of_2(pixels), 1024) if isinstance(pixels, int) else 256
    # A thread has elements of many channels if there are few pixels, and their parameters take registers.
    return {"BP": bp, "BC": min(next_power_of_2(channels), elements // bp), "num_warps": 8}


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
    x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor | None, var: Tensor | None,
    residual: Tensor | None, bank: Tensor | None, weight2: Tensor | None, bias2: Tensor | None, mean2: Tensor | None,
    var2: Tensor | None, activation: str, eps: float,
) -> Tensor:
    """The op on the GPU, arguments as there; without mean and var `act(x * weight + bias + residual)`."""
    y = empty_output(x, x.shape, residual)
    if x.numel() == 0:
        return y
    view = view_of_image(x)
    samples, pixels, strides = _joined(x, bank, view, view_of_image(y), _view(residual, "residual"))
    channels, adjacent = x.shape[1], view.channel == 1
    config = tuned("batch_norm_eval", x.device, _tile(channels, pixels, adjacent, num_warps=2 * x.element_size()),
                   channels=channels, channels_last=int(adjacent), dtype=str(x.dtype))
    bp, channel_blocks = config["BP"], cdiv(channels, config["BC"])
    splits, tiles = _split(samples, pixels, channel_blocks, bp, sums=False)
    channels, pixels, strides, form = arguments(channels, pixels, strides, bp)
    launch(
        batch_norm_eval_kernel, (samples * splits * channel_blocks,),
        x, y, residual, weight, bias, mean, var, weight2, bias2, mean2, var2, bank,
        channels, pixels, splits, tiles, flag_stride(bank), *strides, eps, ACTIVATION=activation, **form, **config,
    )
    return y


def _view(x: Tensor | None, name: str) -> View | None:
    return None if x is None else view_of_image(x, name)


def _joined(x: Tensor, bank: Tensor | None, *views: View | None) -> tuple[int, int, list[Strides]]:
    """As `joined`: units of samples with one bank."""
    return joined(x.shape[0], x.shape[0] if flags_kind(bank) == PER_SAMPLE else 1, *views)


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
    view = view_of_image(dy, "dy")
    samples, pixels, strides = _joined(dy, bank, view, *(_view(t, name) for t, name in (
        (read_x, "x"), (read_residual, "residual"), (dx, "dx"), (dresidual, "dresidual"))))
    channels, adjacent = dy.shape[1], view.channel == 1
    sums = train_weight or train_bias
    # Long loops of few programs where there are sums: those need loads in flight, others have many programs instead.
    default = _tile(channels, pixels, adjacent, num_warps=8 if sums else 2 * x_dtype.itemsize,
                    elements=4096 // x_dtype.itemsize) | {"STAGES": stages(dy.device, 3, 5) if sums else 1}
    config = tuned("batch_norm_eval_backward", dy.device, default, channels=channels, channels_last=int(adjacent),
                   sums=int(sums), dtype=str(x_dtype))
    bp, channel_blocks = config["BP"], cdiv(channels, config["BC"])
    splits, tiles = _split(samples, pixels, channel_blocks, bp, sums)
    blocks = samples * splits
    weight_sums = dy.new_empty((blocks, channels), dtype=torch.float32) if train_weight else None
    bias_sums = dy.new_empty((blocks, channels), dtype=torch.float32) if train_bias else None
    channels, pixels, strides, form = arguments(channels, pixels, strides, bp)
    launch(
        batch_norm_eval_backward_kernel, (blocks * channel_blocks,),
        dy, read_x, read_residual, dx, dresidual, weight_sums, bias_sums,
        weight, bias, mean, var, weight2, bias2, mean2, var2, bank, channels, pixels, splits, tiles, flag_stride(bank),
        *strides, eps, ACTIVATION=activation, **form, **config,
    )
    for partial, total, total2 in ((weight_sums, dweight, dweight2), (bias_sums, dbias, dbias2)):
        if partial is not None:
            launch_column_sum(partial, total, total2, bank, splits)
    return grads


def _like(x: Tensor) -> tuple[torch.dtype, bool]:
    """Dtype and layout: all that the gradient takes from x itself."""
    return x.dtype, memory_format(x) == torch.channels_last


def _format(channels_last: bool) -> torch.memory_format:
    return torch.channels_last if channels_last else torch.contiguous_format


def _expanded_or_other_layout(dy: Tensor, channels_last: bool) -> bool:
    try:
        return view_of_image(dy).channels_last != channels_last
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


def _affine(x, weight, bias, mean, var, bank, weight2, bias2, mean2, var2, eps, wide):
    """(x - mean), 1 / standard deviation, scale, and what the residual is added to; the first and the last None
    without x."""
    def vector(first, second):
        return picked(first, second, bank, wide)[..., None, None]

    rstd = torch.rsqrt(vector(var, var2) + eps)
    scale = rstd if weight is None else rstd * vector(weight, weight2)
    if x is None:
        return None, rstd, scale, None
    centred = x.to(wide) - vector(mean, mean2)
    z = centred * scale
    return centred, rstd, scale, z if bias is None else z + vector(bias, bias2)


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
    none = None, None
    dweight, dweight2 = per_bank((g * centred * rstd).sum((2, 3)), bank) if needs[2] or needs[4] else none
    dbias, dbias2 = per_bank(g.sum((2, 3)), bank) if needs[3] or needs[5] else none
    values = (g * scale, g, dweight, dbias, dweight2, dbias2)
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


def batch_norm_eval(
    x: Tensor,
    weight: Vectors,
    bias: Vectors,
    running_mean: Vectors,
    running_var: Vectors,
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
    check_activation(activation)
    check_eps(eps)
    if x.ndim != 4 or not x.is_floating_point():
        raise ValueError(f"x is {x.dtype} of shape {tuple(x.shape)}; pass floating (N, C, H, W)")
    view_of_image(x)
    check_flags(bank, "bank", x.shape[0], x.device)
    first, second = banks(x, x.shape[1], bank, weight=weight, bias=bias, running_mean=running_mean,
                          running_var=running_var)
    if first[2] is None or first[3] is None:
        raise ValueError(f"running_{'mean' if first[2] is None else 'var'} is None: eval mode needs statistics")
    if residual is not None:
        if residual.ndim != 4 or any(a != b for a, b in zip(residual.shape, x.shape)) or (
                not residual.is_floating_point()):
            raise ValueError(f"residual is {residual.dtype} of shape {tuple(residual.shape)}; pass floating "
                             f"{tuple(x.shape)} as x")
        if residual.device != x.device:
            raise ValueError(f"residual is on {residual.device}, x on {x.device}; pass both on one device")
        view_of_image(residual, "residual")
    return batch_norm_eval_op(x, *first, residual, bank, *second, activation, eps)
