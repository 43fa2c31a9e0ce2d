"""Skip-aware layer norm over the last axis, alone or with the residual add before it: ViT, Swin, ConvNeXt.

    total = x + residual
    y = (total - mean(total)) / sqrt(var(total) + eps) * weight + bias

Bytes: forward reads x (and residual) once and writes y (and total) once; backward reads the normalised tensor and the
gradients that arrive once and writes one gradient. Everything is bound by HBM bandwidth; at batch 1 by the launch.

A tensor (N, ..., D) is seen as N samples of rows of D channels (the pixels of `view.py`). Either channels are adjacent
(the usual layout of tokens) or rows are (NCHW seen as (N, H, W, C), tokens of a flattened feature map): both are read
in place, neighbouring threads on neighbouring memory. y has adjacent channels either way, as the linear layer that
follows wants it, and its gradient comes so; the sum and the gradient of x lie as x does. A program works on a tile of
rows with all their channels in registers: mean, then variance are two passes over registers and one over memory.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op

from .bank import Vectors, banks, check_flags, of_bank, per_bank, picked
from .column_sum import launch_column_sum
from .epilogue import check_inference, write_active
from .launch import (
    SPLITS,
    cdiv,
    check_eps,
    check_no_alias,
    launch,
    next_power_of_2,
    no_second_derivative,
    on_gpu,
    stages,
    tuned,
)
from .view import View, arguments, in_elements, joined, tile_at, view_of_tokens

MAX_CHANNELS = 4096  # a row has to fit into the registers of one program


@triton.jit
def _normalised(v, mask, D, eps):
    """Rows [ROWS, CHANNELS] with mean 0 and variance 1, 0 where masked out; and 1 / standard deviation [ROWS]."""
    centred = tl.where(mask, v - (tl.sum(v, 1) / D)[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, 1) / D + eps)
    # Masked again: with eps = 0 the rstd of a row of padding is infinite.
    return tl.where(mask, centred * rstd[:, None], 0.0), rstd


@triton.jit
def layer_norm_kernel(
    x,  # (units, rows, D)
    residual,  # like x, or None
    total,  # like x, receives x + residual; None without residual
    y,  # like x
    weight, bias,  # (D,), of the first or only bank; each may be None
    weight2, bias2,  # (D,), of the second bank
    bank,  # int32, one for `units_per_bank` units, or None
    active,  # int32, one for `units_per_flag` units, or None; 0: y keeps its bits
    rows, tiles,  # of one unit; a tile has ROWS rows
    D, units_per_bank, units_per_flag,
    x_unit, x_row, x_channel,  # strides
    residual_unit, residual_row, residual_channel,
    total_unit, total_row, total_channel,
    y_unit, y_row, y_channel,
    eps,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,  # D, rounded up to a power of two
    UNIT: tl.constexpr, LAST: tl.constexpr, FAR: tl.constexpr,  # of `tile_at`
):
    """One program per tile; tiles end where units do, so that each has one bank and one flag."""
    unit = tl.program_id(0) // tiles
    if active is not None and tl.load(active + unit // units_per_flag) == 0:
        return
    D, rows = in_elements(D, rows, UNIT, LAST)
    first = tl.program_id(0) % tiles * ROWS
    row = tl.arange(0, ROWS)
    channel = tl.arange(0, CHANNELS)
    channel_mask = channel < D
    mask = (first + row < rows)[:, None] & channel_mask[None, :]
    at = tile_at(x, unit, first, row, channel, x_unit, x_row, x_channel, UNIT, LAST, FAR)
    v = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    if residual is not None:
        at = tile_at(
            residual, unit, first, row, channel, residual_unit, residual_row, residual_channel, UNIT, LAST, FAR)
        rounded = (v + tl.load(at, mask=mask, other=0.0).to(tl.float32)).to(total.dtype.element_ty)
        at = tile_at(total, unit, first, row, channel, total_unit, total_row, total_channel, UNIT, LAST, FAR)
        tl.store(at, rounded, mask=mask)
        # What was stored is normalised, for it is all that backward has.
        v = rounded.to(tl.float32)
    z, _ = _normalised(v, mask, D, eps)
    is_second = False
    if bank is not None:
        is_second = tl.load(bank + unit // units_per_bank) != 0
    if weight is not None and bias is not None:
        w = of_bank(weight, weight2, is_second, channel, channel_mask)[None, :]
        z = tl.fma(z, w, of_bank(bias, bias2, is_second, channel, channel_mask)[None, :])
    elif weight is not None:
        z = z * of_bank(weight, weight2, is_second, channel, channel_mask)[None, :]
    elif bias is not None:
        z = z + of_bank(bias, bias2, is_second, channel, channel_mask)[None, :]
    at = tile_at(y, unit, first, row, channel, y_unit, y_row, y_channel, UNIT, LAST, FAR)
    tl.store(at, z.to(y.dtype.element_ty), mask=mask)


@triton.jit
def layer_norm_backward_kernel(
    dy,  # (units, rows, D)
    dtotal,  # like dy: the gradient that arrives for x + residual, or None
    total,  # like dy: what was normalised
    dx,  # like dy
    dresidual,  # like dx with its strides and values, where their types differ, else None
    weight, weight2,  # (D,), or None
    bank,  # int32 (parts,), or None
    dweight, dbias,  # float32 (parts, splits, D): sums over the rows of each program; or None
    rows, tiles,  # of one unit
    D, units_per_part,
    splits,  # programs per part
    tiles_per_program,
    dy_unit, dy_row, dy_channel,  # strides
    dtotal_unit, dtotal_row, dtotal_channel,
    total_unit, total_row, total_channel,
    dx_unit, dx_row, dx_channel,
    eps,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    SUM_ROWS: tl.constexpr,  # add up the rows of each tile, not only at the end
    STAGES: tl.constexpr,  # tiles being loaded at once
    UNIT: tl.constexpr, LAST: tl.constexpr, FAR: tl.constexpr,
):
    """Program (part, split) takes `tiles_per_program` tiles in a row, all of one bank; statistics are computed anew."""
    D, rows = in_elements(D, rows, UNIT, LAST)
    part = tl.program_id(0) // splits
    first_tile = tl.program_id(0) % splits * tiles_per_program
    row = tl.arange(0, ROWS)
    channel = tl.arange(0, CHANNELS)
    channel_mask = channel < D
    is_second = False
    if bank is not None:
        is_second = tl.load(bank + part) != 0
    if weight is not None:
        w = of_bank(weight, weight2, is_second, channel, channel_mask)
    # Where no two warps share a channel, adding up the rows of a tile at once is cheap and saves registers.
    if SUM_ROWS:
        sum_w = tl.zeros([CHANNELS], tl.float32)
        sum_b = tl.zeros([CHANNELS], tl.float32)
    else:
        sum_w = tl.zeros([ROWS, CHANNELS], tl.float32)
        sum_b = tl.zeros([ROWS, CHANNELS], tl.float32)
    for i in tl.range(tiles_per_program, num_stages=STAGES):
        tile = first_tile + i
        unit = part * units_per_part + tile // tiles
        first = tile % tiles * ROWS
        # The last programs may have fewer tiles, or none.
        last = tl.where(tile < units_per_part * tiles, rows, 0)
        mask = (first + row < last)[:, None] & channel_mask[None, :]
        at = tile_at(total, unit, first, row, channel, total_unit, total_row, total_channel, UNIT, LAST, FAR)
        v = tl.load(at, mask=mask, other=0.0)
        at = tile_at(dy, unit, first, row, channel, dy_unit, dy_row, dy_channel, UNIT, LAST, FAR)
        g = tl.load(at, mask=mask, other=0.0).to(tl.float32)
        z, rstd = _normalised(v.to(tl.float32), mask, D, eps)
        if dweight is not None:
            sum_w += tl.sum(g * z, 0) if SUM_ROWS else g * z
        if dbias is not None:
            sum_b += tl.sum(g, 0) if SUM_ROWS else g
        if weight is not None:
            # Chosen, so that in compiled code too the product is rounded before the mean is subtracted: contracted to
            # one operation, what should cancel (of one channel all) would leave the product's rounding, times rstd.
            g = tl.where(mask, g * w[None, :], 0.0)
        g = g - (tl.sum(g, 1) / D)[:, None] - z * (tl.sum(g * z, 1) / D)[:, None]
        g = g * rstd[:, None]
        if dtotal is not None:
            at = tile_at(dtotal, unit, first, row, channel, dtotal_unit, dtotal_row, dtotal_channel, UNIT, LAST, FAR)
            g += tl.load(at, mask=mask, other=0.0).to(tl.float32)
        at = tile_at(dx, unit, first, row, channel, dx_unit, dx_row, dx_channel, UNIT, LAST, FAR)
        tl.store(at, g.to(dx.dtype.element_ty), mask=mask)
        if dresidual is not None:
            at = tile_at(dresidual, unit, first, row, channel, dx_unit, dx_row, dx_channel, UNIT, LAST, FAR)
            tl.store(at, g.to(dresidual.dtype.element_ty), mask=mask)
    at = tl.program_id(0) * D + channel
    if dweight is not None:
        tl.store(dweight + at, sum_w if SUM_ROWS else tl.sum(sum_w, 0), mask=channel_mask)
    if dbias is not None:
        tl.store(dbias + at, sum_b if SUM_ROWS else tl.sum(sum_b, 0), mask=channel_mask)


def _size(flags: Tensor | None) -> int:
    return 1 if flags is None else flags.numel()


def _config(kernel: str, x: Tensor, layout: View, **key: int) -> dict[str, int]:
    channels = next_power_of_2(x.shape[-1])
    adjacent, backward = layout.channel == 1, kernel == "layer_norm_backward"
    wide = adjacent or (isinstance(layout.channel, int) and layout.channel % 16 == 0)  # loads of 16 bytes
    if adjacent:
        elements = 1024 if backward and x.element_size() == 4 else 2048  # as far as registers reach
        rows = min(64, max(elements // channels, min(4, 2 * elements // channels), 1))
    else:  # at least a sector of 32 bytes at a time, in backward a load of 16, as far as registers reach
        piece, reach = (32, 16384) if not backward else (16, 8192 if wide and channels <= 1024 else 4096)
        rows = min(32, max(piece // x.element_size(), 4096 // channels), reach // channels)
    if not backward:
        warps = rows * channels // 1024
    elif adjacent:
        warps = channels // 256  # side by side: sums over rows need no exchange between them
    else:  # the addresses of narrow loads take many registers, which 8 warps have and 16 have not
        warps = rows * channels // (256 if wide or channels > 2048 else 512)
    default = {"ROWS": rows, "num_warps": min(16, max(4, warps))}
    if backward:
        # Loads of the next tile wait in shared memory, of which some GPUs have 64 KB; narrow ones in registers.
        most = 16384 if adjacent else 8192 if wide else 0
        default["num_stages"] = stages(x.device, 2, 4) if rows * channels * x.element_size() <= most else 1
    return tuned(kernel, x.device, default, channels=x.shape[-1], dtype=str(x.dtype).removeprefix("torch."),
                 channels_adjacent=int(adjacent), **key)


def _empty_output(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Memory for y: dense, with adjacent channels; where those of x are, its strides in x's order."""
    return torch.empty_like(x, dtype=dtype) if x.stride(-1) == 1 else x.new_empty(x.shape, dtype=dtype)


def launch_layer_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, weight2: Tensor | None, bias2: Tensor | None,
    residual: Tensor | None, bank: Tensor | None, eps: float, out: Tensor | None = None, active: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The op on a GPU: y, and the sum, empty without a residual. Writes y to `out` if given."""
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    y = _empty_output(x, dtype) if out is None else out
    total = None if residual is None else torch.empty_like(x, dtype=dtype)
    results = y, x.new_empty(0) if total is None else total
    if x.numel() == 0:
        return results
    samples, channels = x.shape[0] if x.ndim > 1 else 1, x.shape[-1]
    view = view_of_tokens(x, "x")
    views = [view] + [None if t is None else view_of_tokens(t, name) for name, t in (
        ("residual", residual), ("total", total), ("y", y))]
    parts = samples if _size(active) != 1 else _size(bank)
    units, rows, strides = joined(samples, parts, *views)
    config = _config("layer_norm", x, view, residual=int(residual is not None))
    tiles = cdiv(rows, config["ROWS"])
    width = next_power_of_2(channels)
    channels, rows, strides, form = arguments(channels, rows, strides, config["ROWS"])
    launch(
        layer_norm_kernel, (units * tiles,), x, residual, total, y, weight, bias, weight2, bias2, bank, active, rows,
        tiles, channels, units // _size(bank), units // _size(active), *strides, eps, CHANNELS=width, **form, **config,
    )
    return results


def launch_layer_norm_backward(
    dy: Tensor, dtotal: Tensor | None, total: Tensor, weight: Tensor | None, bias: Tensor | None,
    weight2: Tensor | None, bias2: Tensor | None, bank: Tensor | None, eps: float, x_dtype: torch.dtype,
    residual_dtype: torch.dtype, affine: bool,
) -> list[Tensor]:
    """The op `adn::layer_norm_backward` on a GPU."""
    dx = torch.empty_like(total, dtype=x_dtype)
    dresidual = None if residual_dtype == x_dtype else torch.empty_like(dx, dtype=residual_dtype)
    dweight, dbias, dweight2, dbias2 = (
        torch.empty_like(t) if affine and t is not None else None for t in (weight, bias, weight2, bias2)
    )
    results = [dx, *(dx.new_empty(0) if t is None else t for t in (dresidual, dweight, dbias, dweight2, dbias2))]
    if dx.numel() == 0:
        for gradient in results[2:]:
            gradient.zero_()
        return results
    (dy, dy_rows), (dtotal, dtotal_rows) = _readable(dy, "dy"), _readable(dtotal, "dtotal")
    samples, channels = dx.shape[0] if dx.ndim > 1 else 1, dx.shape[-1]
    layout = view_of_tokens(total, "total")
    parts = _size(bank)
    layouts = (dy_rows, dtotal_rows, layout, view_of_tokens(dx, "dx"))
    units, rows, strides = joined(samples, parts, *layouts)
    config = _config("layer_norm_backward", dx, layout, residual=int(dtotal is not None))
    tiles = cdiv(rows, config["ROWS"])
    splits = cdiv(SPLITS, parts)
    width = next_power_of_2(channels)
    # Of adjacent channels a warp loads up to 256: all warps lie along a row if it has as many for each.
    sum_rows = layout.channel != 1 or width >= 256 * config["num_warps"]
    sums = [None if t is None else dx.new_empty((parts, splits, channels), dtype=torch.float32)
            for t in (dweight, dbias)]
    channels, rows, strides, form = arguments(channels, rows, strides, config["ROWS"])
    launch(
        layer_norm_backward_kernel, (parts * splits,), dy, dtotal, total, dx, dresidual, weight, weight2, bank, *sums,
        rows, tiles, channels, units // parts, splits, cdiv(units // parts * tiles, splits), *strides, eps,
        CHANNELS=width, SUM_ROWS=sum_rows, STAGES=config["num_stages"], **form, **config,
    )
    for partial, first, second in ((sums[0], dweight, dweight2), (sums[1], dbias, dbias2)):
        if partial is not None:
            launch_column_sum(partial, first, second, bank, splits)
    return results


def _readable(gradient: Tensor | None, name: str) -> tuple[Tensor | None, View | None]:
    """A gradient that arrives and its strides; copied if it is expanded or otherwise of no order the kernel reads."""
    if gradient is None:
        return None, None
    try:
        return gradient, view_of_tokens(gradient, name)
    except ValueError:
        gradient = gradient.contiguous()
        return gradient, view_of_tokens(gradient, name)


def _affine(first: Tensor, second: Tensor | None, bank: Tensor | None, x: Tensor) -> Tensor:
    """Weight or bias as it broadcasts against x (N, ..., D)."""
    if bank is None or x.numel() == 0:  # of an empty batch `bank` may be empty too
        return first.to(x.dtype)
    rows = picked(first, second, bank, x.dtype)
    if x.ndim == 1:
        return rows[0]
    each = x.shape[0] // rows.shape[0]
    return rows[:, None].expand(-1, each, -1).reshape(-1, *[1] * (x.ndim - 2), x.shape[-1])


def layer_norm_reference(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, weight2: Tensor | None, bias2: Tensor | None,
    residual: Tensor | None, bank: Tensor | None, eps: float,
) -> tuple[Tensor, Tensor]:
    """The op in plain PyTorch, in at least float32."""
    total = x if residual is None else torch.empty_like(
        x, dtype=torch.promote_types(x.dtype, residual.dtype)).copy_(x + residual)
    z = F.layer_norm(total.to(torch.promote_types(total.dtype, torch.float32)), x.shape[-1:], eps=eps)
    if weight is not None:
        z = z * _affine(weight, weight2, bank, z)
    if bias is not None:
        z = z + _affine(bias, bias2, bank, z)
    return _empty_output(x, total.dtype).copy_(z), x.new_empty(0) if residual is None else total


def layer_norm_backward_reference(
    dy: Tensor, dtotal: Tensor | None, total: Tensor, weight: Tensor | None, bias: Tensor | None,
    weight2: Tensor | None, bias2: Tensor | None, bank: Tensor | None, eps: float, x_dtype: torch.dtype,
    residual_dtype: torch.dtype, affine: bool,
) -> list[Tensor]:
    """The backward op in plain PyTorch, in at least float32."""
    v = total.to(torch.promote_types(total.dtype, torch.float32))
    g = dy.to(v.dtype)
    centred = v - v.mean(-1, keepdim=True)
    rstd = torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    z = centred * rstd
    dparameters = [_sum_of_banks(terms, like, like2, bank) if affine else (None, None)
                   for terms, like, like2 in ((g * z, weight, weight2), (g, bias, bias2))]
    if weight is not None:
        g = g * _affine(weight, weight2, bank, v)
    dx = (g - g.mean(-1, keepdim=True) - z * (g * z).mean(-1, keepdim=True)) * rstd
    if dtotal is not None:
        dx = dx + dtotal
    (dweight, dweight2), (dbias, dbias2) = dparameters
    dresidual = None if residual_dtype == x_dtype else torch.empty_like(total, dtype=residual_dtype).copy_(dx)
    results = [torch.empty_like(total, dtype=x_dtype).copy_(dx), dresidual, dweight, dbias, dweight2, dbias2]
    return [total.new_empty(0, dtype=x_dtype) if t is None else t for t in results]


def _sum_of_banks(
    terms: Tensor, like: Tensor | None, like2: Tensor | None, bank: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Terms (N, ..., D) summed over all rows (of each bank); the sums in the dtypes of `like` and `like2`."""
    if like is None:
        return None, None
    if bank is None:
        return terms.reshape(-1, terms.shape[-1]).sum(0).to(like.dtype), None
    if terms.numel() == 0:
        return torch.zeros_like(like), torch.zeros_like(like2)
    terms = terms.reshape(bank.numel(), math.prod(terms.shape[:-1]) // bank.numel(), terms.shape[-1]).sum(1)
    first, second = per_bank(terms, bank)
    return first.to(like.dtype), second.to(like2.dtype)


@triton_op("adn::layer_norm", mutates_args=())
def layer_norm_op(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, weight2: Tensor | None, bias2: Tensor | None,
    residual: Tensor | None, bank: Tensor | None, eps: float,
) -> tuple[Tensor, Tensor]:
    if not on_gpu(x, residual):
        return layer_norm_reference(x, weight, bias, weight2, bias2, residual, bank, eps)
    return launch_layer_norm(x, weight, bias, weight2, bias2, residual, bank, eps)


@triton_op("adn::layer_norm_", mutates_args=("out",))
def layer_norm_inplace_op(
    out: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, active: Tensor | None, eps: float
) -> None:
    check_no_alias(out, x=x)
    arguments = x, weight, bias, None, None, None, None, eps
    if on_gpu(x, out):
        launch_layer_norm(*arguments, out, active)
    else:
        write_active(out, layer_norm_reference(*arguments)[0], active)


@triton_op("adn::layer_norm_backward", mutates_args=())
def layer_norm_backward_op(
    dy: Tensor, dtotal: Tensor | None, total: Tensor, weight: Tensor | None, bias: Tensor | None,
    weight2: Tensor | None, bias2: Tensor | None, bank: Tensor | None, eps: float, x_dtype: torch.dtype,
    residual_dtype: torch.dtype, affine: bool,
) -> list[Tensor]:
    """dx, dresidual (empty if it would equal dx), and the gradients of weight, bias, weight2, bias2, or empty ones."""
    run = launch_layer_norm_backward if on_gpu(total) else layer_norm_backward_reference
    return run(dy, dtotal, total, weight, bias, weight2, bias2, bank, eps, x_dtype, residual_dtype, affine)


no_second_derivative(layer_norm_backward_op)


def _setup_context(ctx, inputs, output) -> None:
    x, weight, bias, weight2, bias2, residual, bank, eps = inputs
    _, total = output
    # The bank is copied: the caller may switch it before backward.
    bank = None if bank is None else bank.clone()
    ctx.save_for_backward(x if residual is None else total, weight, bias, weight2, bias2, bank)
    ctx.eps, ctx.x_dtype = eps, x.dtype
    ctx.residual_dtype = x.dtype if residual is None else residual.dtype
    if residual is None:
        ctx.mark_non_differentiable(total)
    # A gradient of zeros for a sum nobody used would have to be written and read.
    ctx.set_materialize_grads(False)


def _backward(ctx, dy, dtotal):
    total, *parameters, bank = ctx.saved_tensors
    if dy is None:
        if dtotal is None:
            return (None,) * 8
        return (dtotal.to(ctx.x_dtype), None, None, None, None, dtotal.to(ctx.residual_dtype), None, None)
    affine = any(ctx.needs_input_grad[1:5])
    dx, dresidual, *dparameters = layer_norm_backward_op(
        dy, dtotal, total, *parameters, bank, ctx.eps, ctx.x_dtype, ctx.residual_dtype, affine)
    dparameters = [d if need else None for d, need in zip(dparameters, ctx.needs_input_grad[1:5])]
    need_residual = ctx.needs_input_grad[5]
    return (dx, *dparameters, (dx if ctx.residual_dtype == ctx.x_dtype else dresidual) if need_residual else None,
            None, None)


layer_norm_op.register_autograd(_backward, setup_context=_setup_context)


def _check(
    x: Tensor, weight: Vectors, bias: Vectors, eps: float, bank: Tensor | None, active: Tensor | None = None,
    **others: Tensor | None,
) -> list[Tensor | None]:
    """Raises ValueError for anything the op cannot take; returns weight, bias, weight2, bias2."""
    if x.ndim == 0 or not x.is_floating_point():
        raise ValueError(f"x is {x.dtype} of shape {tuple(x.shape)}; pass floats of shape (..., D)")
    if x.shape[-1] > MAX_CHANNELS:
        raise ValueError(f"x has {x.shape[-1]} channels; at most {MAX_CHANNELS} are supported")
    for name, tensor in others.items():
        if tensor is None:
            continue
        if tensor.ndim != x.ndim or any(a != b for a, b in zip(tensor.shape, x.shape)):
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, x {tuple(x.shape)}; pass the same")
        if not tensor.is_floating_point() or tensor.device != x.device:
            raise ValueError(f"{name} is {tensor.dtype} on {tensor.device}; pass floats on {x.device}, where x is")
        view_of_tokens(tensor, name)
    view_of_tokens(x, "x")
    samples = x.shape[0] if x.ndim > 1 else 1
    if bank is not None:
        parts = bank.numel()
        check_flags(bank, "bank", parts, x.device)
        if samples != 0 and (parts == 0 or samples % parts != 0):
            raise ValueError(f"bank has {parts} values; the first axis, of {samples}, must be as many equal parts")
    check_flags(active, "active", samples, x.device)
    check_eps(eps)
    first, second = banks(x, x.shape[-1], bank, weight=weight, bias=bias)
    return [*first, *second]


def layer_norm(
    x: Tensor, weight: Vectors, bias: Vectors, *, residual: Tensor | None = None, eps: float = 1e-6,
    bank: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Layer norm of x, or of x + residual, over the last axis (Ba et al., 2016, arXiv 1607.06450).

    Mean and variance (biased) are of float32 and two-pass. y has the dtype of x, promoted with residual, whatever the
    parameters are: under autocast torch's own layer norm gives float32 for half-precision x, this one keeps x's type.
    y is dense, with adjacent channels; the sum has x's strides where x is dense, and so has the gradient of x. float64
    and CPU tensors take the plain-PyTorch reference.

    Bytes: forward x + y (with residual both, the sum and y); backward x (or the sum), dy, dx, where it arrives the
    gradient of the sum, and, where types of x and residual differ, the residual's own gradient. A gradient that arrives
    expanded (or otherwise of no regular strides) is copied before. Bound by HBM bandwidth; at batch 1 by the launch.

    Args:
        x: (..., D), D up to 4096. Channels adjacent in memory, or rows, as in `nchw.permute(0, 2, 3, 1)`.
        weight, bias: (D,) or None, any float dtype; with `bank` pairs (first bank, second bank).
        residual: like x, its strides may differ. The sum is rounded to the promoted dtype of both before it is
            normalised, as torch would.
        bank: int32 on the device, 0 for the first bank, else the second: one value, or B, one for each of B equal
            parts in a row of the first axis (groups in training, samples in eval).

    Returns:
        y; with residual (y, x + residual).

    Raises:
        ValueError: shapes, dtypes, devices or strides that are not as above.
    """
    parameters = _check(x, weight, bias, eps, bank, residual=residual)
    y, total = layer_norm_op(x, *parameters, residual, bank, eps)
    return y if residual is None else (y, total)


def layer_norm_(
    out: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, *, eps: float = 1e-6,
    active: Tensor | None = None,
) -> Tensor:
    """`layer_norm` of x written to `out`, for inference.

    Bytes: x + out; of an inactive sample none. Bound by HBM bandwidth; at batch 1, and with few active samples, by the
    launch.

    Args:
        out: like x, of any float dtype and strides of its own; no memory shared with x.
        active: int32 on the device, one value or one per sample (first axis); where 0, out keeps its bits.
        Others: as for `layer_norm`.

    Returns:
        out.

    Raises:
        ValueError: as `layer_norm`; shared memory, also within `out`.
        RuntimeError: autograd would have to follow.
    """
    weight, bias, *_ = _check(x, weight, bias, eps, None, active, out=out)
    check_inference("layer_norm_", out, x, weight, bias)
    layer_norm_inplace_op(out, x, weight, bias, active, eps)
    return out
