"""Skip-aware layer norm over the last axis, alone or with the residual add before it: ViT, Swin, ConvNeXt.

    total = x + residual
    y = (total - mean(total)) / sqrt(var(total) + eps) * weight + bias

Bytes: forward reads x (and residual) once and writes y (and total) once; backward reads the normalised tensor and the
gradients that arrive once and writes one gradient. Everything is bound by HBM bandwidth; at batch 1 by the launch.

A tensor (N, ..., D) is seen as N samples of rows of D channels, with a stride for each of the three. Either channels
are adjacent (the usual layout of tokens) or rows are (NCHW seen as (N, H, W, C), tokens of a flattened feature map):
both are read in place, neighbouring threads on neighbouring memory. A program works on a tile of rows with all their
channels in registers: mean, then variance are two passes over registers and one over memory.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op

from .epilogue import check_inference, write_active
from .launch import SPLITS, cdiv, check_flags, check_no_alias, launch, on_gpu, tuned

MAX_CHANNELS = 4096  # a row has to fit into the registers of one program

# Candidates of `python -m adn_kernels.tune`: how many rows fit in registers depends on the number of channels.
TUNE = {
    "layer_norm": [{"ROWS": rows, "num_warps": warps} for rows in (1, 2, 4, 8, 16, 32) for warps in (2, 4, 8, 16)],
    "layer_norm_backward": [{"ROWS": rows, "num_warps": warps, "num_stages": stages}
                            for rows in (1, 2, 4, 8, 16, 32) for warps in (4, 8, 16) for stages in (1, 2)],
}


@triton.jit
def _offsets(unit, row, channel, unit_stride, row_stride, channel_stride):
    """[ROWS, CHANNELS] int64."""
    rows = row.to(tl.int64) * row_stride
    return unit.to(tl.int64) * unit_stride + rows[:, None] + (channel.to(tl.int64) * channel_stride)[None, :]


@triton.jit
def _of_bank(first, second, use_second, channel, mask):
    """Weight or bias [CHANNELS] float32 of one of two banks."""
    if use_second:
        vector = tl.load(second + channel, mask=mask, other=0.0).to(tl.float32)
    else:
        vector = tl.load(first + channel, mask=mask, other=0.0).to(tl.float32)
    return vector


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
    total,  # like x, receives x + residual; None without residual; may be residual itself
    y,  # like x
    weight, bias,  # (D,), of the first or only bank; each may be None
    weight2, bias2,  # (D,), of the second bank
    bank,  # int32, one for `units_per_bank` units, or None
    active,  # int32, one for `units_per_flag` units, or None; 0: total and y keep their bits
    rows, tiles,  # of one unit; a tile has ROWS rows
    D, units_per_bank, units_per_flag,
    x_unit, x_row, x_channel,  # strides
    residual_unit, residual_row, residual_channel,
    total_unit, total_row, total_channel,
    y_unit, y_row, y_channel,
    eps,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,  # D, rounded up to a power of two
):
    """One program per tile; tiles end where units do, so that each has one bank and one flag."""
    unit = tl.program_id(0) // tiles
    if active is not None and tl.load(active + unit // units_per_flag) == 0:
        return
    row = tl.program_id(0) % tiles * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, CHANNELS)
    channel_mask = channel < D
    mask = (row < rows)[:, None] & channel_mask[None, :]
    v = tl.load(x + _offsets(unit, row, channel, x_unit, x_row, x_channel), mask=mask, other=0.0).to(tl.float32)
    if residual is not None:
        at = residual + _offsets(unit, row, channel, residual_unit, residual_row, residual_channel)
        rounded = (v + tl.load(at, mask=mask, other=0.0).to(tl.float32)).to(total.dtype.element_ty)
        tl.store(total + _offsets(unit, row, channel, total_unit, total_row, total_channel), rounded, mask=mask)
        # What was stored is normalised, for it is all that backward has.
        v = rounded.to(tl.float32)
    z, _ = _normalised(v, mask, D, eps)
    if bank is not None:
        use_second = tl.load(bank + unit // units_per_bank) != 0
        if weight is not None:
            z = z * _of_bank(weight, weight2, use_second, channel, channel_mask)[None, :]
        if bias is not None:
            z = z + _of_bank(bias, bias2, use_second, channel, channel_mask)[None, :]
    else:
        if weight is not None:
            z = z * tl.load(weight + channel, mask=channel_mask, other=0.0).to(tl.float32)[None, :]
        if bias is not None:
            z = z + tl.load(bias + channel, mask=channel_mask, other=0.0).to(tl.float32)[None, :]
    at = y + _offsets(unit, row, channel, y_unit, y_row, y_channel)
    tl.store(at, z.to(y.dtype.element_ty), mask=mask)


@triton.jit
def layer_norm_backward_kernel(
    dy,  # (units, rows, D)
    dtotal,  # like dy: the gradient that arrives for x + residual, or None
    total,  # like dy: what was normalised
    dx,  # like dy
    dresidual,  # like dy and same values as dx, where their types differ, else None
    weight, weight2,  # (D,), or None
    bank,  # int32 (parts,), or None
    dweight, dbias,  # float32 (parts, splits, D): sums over the rows of each program; or None
    rows, tiles,  # of one unit
    D, units_per_part,
    splits,  # programs per part
    tiles_per_program,
    total_unit, total_row, total_channel,  # strides
    d_unit, d_row, d_channel,  # of all gradients
    eps,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    SUM_ROWS: tl.constexpr,  # add up the rows of each tile, not only at the end
    STAGES: tl.constexpr,  # tiles being loaded at once
):
    """Program (part, split) takes `tiles_per_program` tiles in a row, all of one bank; statistics are computed anew."""
    part = tl.program_id(0) // splits
    first = tl.program_id(0) % splits * tiles_per_program
    channel = tl.arange(0, CHANNELS)
    channel_mask = channel < D
    if weight is not None:
        if bank is not None:
            w = _of_bank(weight, weight2, tl.load(bank + part) != 0, channel, channel_mask)
        else:
            w = tl.load(weight + channel, mask=channel_mask, other=0.0).to(tl.float32)
    # Where the rows of a tile lie in one thread or warp, adding them up at once is cheap and saves registers.
    if SUM_ROWS:
        sum_w = tl.zeros([CHANNELS], tl.float32)
        sum_b = tl.zeros([CHANNELS], tl.float32)
    else:
        sum_w = tl.zeros([ROWS, CHANNELS], tl.float32)
        sum_b = tl.zeros([ROWS, CHANNELS], tl.float32)
    for i in tl.range(tiles_per_program, num_stages=STAGES):
        tile = first + i
        unit = part * units_per_part + tile // tiles
        row = tile % tiles * ROWS + tl.arange(0, ROWS)
        # The last programs may have fewer tiles, or none.
        mask = (row < tl.where(tile < units_per_part * tiles, rows, 0))[:, None] & channel_mask[None, :]
        at = _offsets(unit, row, channel, d_unit, d_row, d_channel)
        v = tl.load(total + _offsets(unit, row, channel, total_unit, total_row, total_channel), mask=mask, other=0.0)
        g = tl.load(dy + at, mask=mask, other=0.0).to(tl.float32)
        z, rstd = _normalised(v.to(tl.float32), mask, D, eps)
        if dweight is not None:
            sum_w += tl.sum(g * z, 0) if SUM_ROWS else g * z
        if dbias is not None:
            sum_b += tl.sum(g, 0) if SUM_ROWS else g
        if weight is not None:
            g = g * w[None, :]
        g = g - (tl.sum(g, 1) / D)[:, None] - z * (tl.sum(g * z, 1) / D)[:, None]
        g = g * rstd[:, None]
        if dtotal is not None:
            g += tl.load(dtotal + at, mask=mask, other=0.0).to(tl.float32)
        tl.store(dx + at, g.to(dx.dtype.element_ty), mask=mask)
        if dresidual is not None:
            tl.store(dresidual + at, g.to(dresidual.dtype.element_ty), mask=mask)
    at = tl.program_id(0) * D + channel
    if dweight is not None:
        tl.store(dweight + at, sum_w if SUM_ROWS else tl.sum(sum_w, 0), mask=channel_mask)
    if dbias is not None:
        tl.store(dbias + at, sum_b if SUM_ROWS else tl.sum(sum_b, 0), mask=channel_mask)


@triton.jit
def layer_norm_sum_kernel(
    partial,  # float32 (parts, splits, D)
    bank,  # int32 (parts,), or None
    first, second,  # (D,): sums over the parts of each bank; `second` None without `bank`
    count,  # parts * splits
    splits, D,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,  # of one program
):
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    channel_mask = channel < D
    sum_first = tl.zeros([ROWS, CHANNELS], tl.float32)
    sum_second = tl.zeros([ROWS, CHANNELS], tl.float32)
    for start in range(0, count, ROWS):
        row = start + tl.arange(0, ROWS)
        mask = (row < count)[:, None] & channel_mask[None, :]
        v = tl.load(partial + row[:, None].to(tl.int64) * D + channel[None, :], mask=mask, other=0.0)
        if bank is not None:
            of_second = (tl.load(bank + row // splits, mask=row < count, other=0) != 0)[:, None]
            sum_first += tl.where(of_second, 0.0, v)
            sum_second += tl.where(of_second, v, 0.0)
        else:
            sum_first += v
    tl.store(first + channel, tl.sum(sum_first, 0).to(first.dtype.element_ty), mask=channel_mask)
    if second is not None:
        tl.store(second + channel, tl.sum(sum_second, 0).to(second.dtype.element_ty), mask=channel_mask)


class Rows(NamedTuple):
    """A tensor (N, ..., D) as N samples of rows of D channels: how many rows, and the three strides."""

    rows: int
    sample: int
    row: int
    channel: int


def rows_of(x: Tensor, name: str) -> Rows:
    """Raises ValueError, saying what to do, for strides that are not those of samples, rows and channels."""
    *sizes, channels = x.shape
    *strides, channel = x.stride()
    count, row = 1, None
    for size, stride in zip(sizes[:0:-1], strides[:0:-1]):
        if size == 1:
            continue
        if row is None:
            row = stride
        elif stride != row * count:
            row = 0  # not to be expressed by one stride; 0 is refused below
            break
        count *= size
    sample = strides[0] if sizes and sizes[0] != 1 else None
    if row is None:
        row = channels if sample is None else sample
    # The stride of an axis of one element says nothing.
    if sample is None:
        sample = count * row
    if channels == 1:
        channel = 1
    if (row == 0 and count != 1) or (channel != 1 and row != 1):
        raise ValueError(f"{name} of shape {tuple(x.shape)} has strides {x.stride()}; its rows must be evenly spaced, "
                         f"and channels (the last axis) or rows adjacent in memory: pass {name}.contiguous()")
    return Rows(count, sample, row, channel)


def _units(samples: int, parts: int, *tensors: Rows | None) -> tuple[int, int, list[tuple[int, int, int] | tuple]]:
    """Samples joined to units, as few as there are parts if memory allows it.

    Returns:
        Units; rows in one; for each tensor the strides of unit, row and channel (None for None).
    """
    joined = all(t is None or t.sample == t.rows * t.row for t in tensors)
    units = parts if joined else samples
    each = samples // units
    return units, each * tensors[0].rows, [
        (None,) * 3 if t is None else (each * t.sample, t.row, t.channel) for t in tensors
    ]


def _size(flags: Tensor | None) -> int:
    return 1 if flags is None else flags.numel()


def _config(kernel: str, x: Tensor, layout: Rows, **key: int) -> dict[str, int]:
    channels = triton.next_power_of_2(x.shape[-1])
    adjacent, backward = layout.channel == 1, kernel == "layer_norm_backward"
    if adjacent:
        rows = min(64, max(2048 // channels, min(4, 4096 // channels), 1))
    else:  # at least a sector of 32 bytes at a time, as far as registers reach
        budget = 16384 if not backward else 4096 if channels > 2048 else 16384 // x.element_size()
        rows = min(32, max(32 // x.element_size(), 4096 // channels), budget // channels)
    # Backward holds more tiles, so fewer elements of each per thread.
    each = 1024 if not backward else 256 if channels > 2048 else 512
    default = {"ROWS": rows, "num_warps": min(16, max(4, rows * channels // each))}
    if backward:  # loads of the next tile wait in shared memory, of which some GPUs have 64 KB
        default["num_stages"] = 2 if rows * channels * x.element_size() <= 16384 else 1
    return tuned(kernel, x.device, default, channels=x.shape[-1], dtype=str(x.dtype).removeprefix("torch."),
                 channels_adjacent=int(adjacent), **key)


def _launch_forward(
    y: Tensor, total: Tensor | None, x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None,
    weight2: Tensor | None, bias2: Tensor | None, bank: Tensor | None, active: Tensor | None, eps: float,
) -> None:
    if x.numel() == 0:
        return
    samples = x.shape[0] if x.ndim > 1 else 1
    layout = rows_of(x, "x")
    layouts = [layout] + [None if t is None else rows_of(t, name) for name, t in (
        ("residual", residual), ("total", total), ("y", y))]
    parts = samples if _size(active) != 1 else _size(bank)
    units, rows, strides = _units(samples, parts, *layouts)
    config = _config("layer_norm", x, layout, residual=int(residual is not None))
    tiles = cdiv(rows, config["ROWS"])
    launch(
        layer_norm_kernel, (units * tiles,), x, residual, total, y, weight, bias, weight2, bias2, bank, active, rows,
        tiles, x.shape[-1], units // _size(bank), units // _size(active), *(s for three in strides for s in three), eps,
        CHANNELS=triton.next_power_of_2(x.shape[-1]), **config,
    )


def launch_layer_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, weight2: Tensor | None, bias2: Tensor | None,
    residual: Tensor | None, bank: Tensor | None, eps: float,
) -> tuple[Tensor, Tensor]:
    """The op `adn::layer_norm` on a GPU: y, and the sum, empty without a residual."""
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    y = torch.empty_like(x, dtype=dtype)
    total = None if residual is None else torch.empty_like(y)
    _launch_forward(y, total, x, residual, weight, bias, weight2, bias2, bank, None, eps)
    return y, x.new_empty(0) if total is None else total


def launch_layer_norm_(
    out: Tensor, stream: Tensor | None, x: Tensor, weight: Tensor | None, bias: Tensor | None, weight2: Tensor | None,
    bias2: Tensor | None, bank: Tensor | None, active: Tensor | None, eps: float,
) -> None:
    """The op `adn::layer_norm_` on a GPU."""
    _launch_forward(out, stream, x, stream, weight, bias, weight2, bias2, bank, active, eps)


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
    # A gradient may come expanded or transposed; the kernel reads all of them with the strides of dx.
    dy = _like(dy, dx)
    dtotal = None if dtotal is None else _like(dtotal, dx)
    samples, channels = dx.shape[0] if dx.ndim > 1 else 1, dx.shape[-1]
    layout = rows_of(total, "total")
    parts = _size(bank)
    units, rows, (total_strides, d_strides) = _units(samples, parts, layout, rows_of(dx, "dx"))
    config = _config("layer_norm_backward", dx, layout, residual=int(dtotal is not None))
    tiles = cdiv(rows, config["ROWS"])
    splits = cdiv(SPLITS, parts)
    sums = [None if t is None else dx.new_empty((parts, splits, channels), dtype=torch.float32)
            for t in (dweight, dbias)]
    launch(
        layer_norm_backward_kernel, (parts * splits,), dy, dtotal, total, dx, dresidual, weight, weight2, bank, *sums,
        rows, tiles, channels, units // parts, splits, cdiv(units // parts * tiles, splits), *total_strides, *d_strides,
        eps, CHANNELS=triton.next_power_of_2(channels), SUM_ROWS=layout.channel != 1 or channels > 512,
        STAGES=config["num_stages"], **config,
    )
    for partial, first, second in ((sums[0], dweight, dweight2), (sums[1], dbias, dbias2)):
        if partial is not None:
            launch(layer_norm_sum_kernel, (cdiv(channels, 16),), partial, bank, first, second, parts * splits, splits,
                   channels, ROWS=64, CHANNELS=16, num_warps=4)
    return results


def _like(gradient: Tensor, x: Tensor) -> Tensor:
    """The gradient in the layout of x, copied if it has another."""
    return gradient if gradient.stride() == x.stride() else torch.empty_like(x, dtype=gradient.dtype).copy_(gradient)


def _affine(first: Tensor, second: Tensor | None, bank: Tensor | None, x: Tensor) -> Tensor:
    """Weight or bias as it broadcasts against x (N, ..., D)."""
    if bank is None or x.numel() == 0:  # of an empty batch `bank` may be empty too
        return first.to(x.dtype)
    both = torch.stack([first.to(x.dtype), second.to(x.dtype)])
    # Not both[bank]: indexing by a 0-d tensor synchronises.
    rows = both.index_select(0, (bank != 0).long().reshape(-1))
    if x.ndim == 1:
        return rows[0]
    each = x.shape[0] // rows.shape[0]
    return rows[:, None].expand(-1, each, -1).reshape(-1, *[1] * (x.ndim - 2), x.shape[-1])


def _in_layout(y: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(x, dtype=dtype).copy_(y)


def layer_norm_reference(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, weight2: Tensor | None, bias2: Tensor | None,
    residual: Tensor | None, bank: Tensor | None, eps: float,
) -> tuple[Tensor, Tensor]:
    """The op in plain PyTorch, in at least float32."""
    total = x if residual is None else _in_layout(x + residual, x, torch.promote_types(x.dtype, residual.dtype))
    z = F.layer_norm(total.to(torch.promote_types(total.dtype, torch.float32)), x.shape[-1:], eps=eps)
    if weight is not None:
        z = z * _affine(weight, weight2, bank, z)
    if bias is not None:
        z = z + _affine(bias, bias2, bank, z)
    return _in_layout(z, x, total.dtype), x.new_empty(0) if residual is None else total


def layer_norm_backward_reference(
    dy: Tensor, dtotal: Tensor | None, total: Tensor, weight: Tensor | None, bias: Tensor | None,
    weight2: Tensor | None, bias2: Tensor | None, bank: Tensor | None, eps: float, x_dtype: torch.dtype,
    residual_dtype: torch.dtype, affine: bool,
) -> list[Tensor]:
    """The backward op in plain PyTorch, in at least float32."""
    v = total.to(torch.promote_types(total.dtype, torch.float32))
    g = dy.to(v.dtype)
    var, mean = torch.var_mean(v, -1, correction=0, keepdim=True)
    rstd = torch.rsqrt(var + eps)
    z = (v - mean) * rstd
    dparameters = [_sum_of_banks(terms, like, like2, bank) if affine else (None, None)
                   for terms, like, like2 in ((g * z, weight, weight2), (g, bias, bias2))]
    if weight is not None:
        g = g * _affine(weight, weight2, bank, v)
    dx = (g - g.mean(-1, keepdim=True) - z * (g * z).mean(-1, keepdim=True)) * rstd
    if dtotal is not None:
        dx = dx + dtotal
    (dweight, dweight2), (dbias, dbias2) = dparameters
    dresidual = None if residual_dtype == x_dtype else _in_layout(dx, total, residual_dtype)
    rest = (dresidual, dweight, dbias, dweight2, dbias2)
    return [_in_layout(dx, total, x_dtype), *(total.new_empty(0, dtype=x_dtype) if t is None else t for t in rest)]


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
    second = (bank != 0).reshape(-1, 1)
    # Chosen, not multiplied by 0: a NaN in one bank's part stays out of the other's gradient.
    return (torch.where(second, 0, terms).sum(0).to(like.dtype), torch.where(second, terms, 0).sum(0).to(like2.dtype))


def _on_gpu(x: Tensor, other: Tensor | None) -> bool:
    return on_gpu(x) and (other is None or on_gpu(other))


@triton_op("adn::layer_norm", mutates_args=())
def _layer_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, weight2: Tensor | None, bias2: Tensor | None,
    residual: Tensor | None, bank: Tensor | None, eps: float,
) -> tuple[Tensor, Tensor]:
    if not _on_gpu(x, residual):
        return layer_norm_reference(x, weight, bias, weight2, bias2, residual, bank, eps)
    return launch_layer_norm(x, weight, bias, weight2, bias2, residual, bank, eps)


@triton_op("adn::layer_norm_", mutates_args=("out", "stream"))
def _layer_norm_(
    out: Tensor, stream: Tensor | None, x: Tensor, weight: Tensor | None, bias: Tensor | None, weight2: Tensor | None,
    bias2: Tensor | None, bank: Tensor | None, active: Tensor | None, eps: float,
) -> None:
    check_no_alias(out, x=x, stream=stream)
    if stream is not None:
        check_no_alias(stream, x=x)
    if _on_gpu(x, stream):
        launch_layer_norm_(out, stream, x, weight, bias, weight2, bias2, bank, active, eps)
        return
    total = x if stream is None else (x + stream).to(stream.dtype)
    y, _ = layer_norm_reference(total, weight, bias, weight2, bias2, None, bank, eps)
    if stream is not None:
        write_active(stream, total, active)
    write_active(out, y, active)


@triton_op("adn::layer_norm_backward", mutates_args=())
def _layer_norm_backward(
    dy: Tensor, dtotal: Tensor | None, total: Tensor, weight: Tensor | None, bias: Tensor | None,
    weight2: Tensor | None, bias2: Tensor | None, bank: Tensor | None, eps: float, x_dtype: torch.dtype,
    residual_dtype: torch.dtype, affine: bool,
) -> list[Tensor]:
    """dx, dresidual (empty if it would equal dx), and the gradients of weight, bias, weight2, bias2, or empty ones."""
    run = launch_layer_norm_backward if _on_gpu(total, None) else layer_norm_backward_reference
    return run(dy, dtotal, total, weight, bias, weight2, bias2, bank, eps, x_dtype, residual_dtype, affine)


def _setup_context(ctx, inputs, output) -> None:
    x, weight, bias, weight2, bias2, residual, bank, eps = inputs
    _, total = output
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
    dx, dresidual, *dparameters = _layer_norm_backward(
        dy, dtotal, total, *parameters, bank, ctx.eps, ctx.x_dtype, ctx.residual_dtype, affine)
    dparameters = [d if need else None for d, need in zip(dparameters, ctx.needs_input_grad[1:5])]
    need_residual = ctx.needs_input_grad[5]
    return (dx, *dparameters, (dx if ctx.residual_dtype == ctx.x_dtype else dresidual) if need_residual else None,
            None, None)


_layer_norm.register_autograd(_backward, setup_context=_setup_context)

Affine = Tensor | tuple[Tensor | None, Tensor | None] | None


def _banks(
    name: str, value: Affine, channels: int, x: Tensor, bank: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Weight or bias of the first and of the second bank."""
    if bank is None:
        if isinstance(value, tuple | list):
            raise ValueError(f"{name} is a pair but no `bank` is given to choose by; pass the live bank's tensor")
        pair = (value, None)
    else:
        if not (value is None or (isinstance(value, tuple | list) and len(value) == 2)):
            raise ValueError(f"`bank` is given: pass {name} as a pair (first bank, second bank)")
        pair = (None, None) if value is None else tuple(value)
        if (pair[0] is None) != (pair[1] is None):
            raise ValueError(f"{name} of one bank is None; pass both, or None for both")
    for vector in pair:
        if vector is None:
            continue
        if tuple(vector.shape) != (channels,) or not vector.is_contiguous() or not vector.is_floating_point():
            raise ValueError(f"{name} is {vector.dtype} of shape {tuple(vector.shape)} and strides {vector.stride()}; "
                             f"pass contiguous floats of shape ({channels},)")
        if vector.device != x.device:
            raise ValueError(f"{name} is on {vector.device}, x on {x.device}; pass both on one device")
    return pair


def _check(
    x: Tensor, weight: Affine, bias: Affine, bank: Tensor | None, active: Tensor | None = None,
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
        rows_of(tensor, name)
    rows_of(x, "x")
    samples = x.shape[0] if x.ndim > 1 else 1
    if bank is not None:
        parts = bank.numel()
        check_flags(bank, "bank", parts, x.device)
        if samples != 0 and (parts == 0 or samples % parts != 0):
            raise ValueError(f"bank has {parts} values; the first axis, of {samples}, must be as many equal parts")
    check_flags(active, "active", samples, x.device)
    (weight, weight2), (bias, bias2) = (
        _banks(name, value, x.shape[-1], x, bank) for name, value in (("weight", weight), ("bias", bias)))
    return [weight, bias, weight2, bias2]


def layer_norm(
    x: Tensor, weight: Affine, bias: Affine, *, residual: Tensor | None = None, eps: float = 1e-6,
    bank: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Layer norm of x, or of x + residual, over the last axis (Ba et al., 2016, arXiv 1607.06450).

    Mean and variance (biased) are of float32 and two-pass. y has the dtype of x, promoted with residual, whatever the
    parameters are: under autocast torch's own layer norm gives float32 for half-precision x, this one keeps x's type.
    y and the sum have x's strides where x is dense. float64 and CPU tensors take the plain-PyTorch reference.

    Moves 2 tensors (4 with residual), backward 3 (one more for a gradient that arrives for the sum), bound by HBM.

    Args:
        x: (..., D), D up to 4096. Channels adjacent in memory, or rows, as in `nchw.permute(0, 2, 3, 1)`.
        weight, bias: (D,) or None, any float dtype; with `bank` pairs (first bank, second bank).
        residual: like x, its strides may differ; the sum is rounded to its dtype before it is normalised.
        bank: int32 on the device, 0 for the first bank, else the second: one value, or B, one for each of B equal
            parts in a row of the first axis (groups in training, samples in eval).

    Returns:
        y; with residual (y, x + residual).

    Raises:
        ValueError: shapes, dtypes, devices or strides that are not as above.
    """
    parameters = _check(x, weight, bias, bank, residual=residual)
    y, total = _layer_norm(x, *parameters, residual, bank, eps)
    return y if residual is None else (y, total)


def layer_norm_(
    out: Tensor, x: Tensor, weight: Affine, bias: Affine, *, stream: Tensor | None = None, eps: float = 1e-6,
    bank: Tensor | None = None, active: Tensor | None = None,
) -> Tensor:
    """In place, for inference: out <- layer norm of x, or stream <- stream + x and out <- layer norm of stream.

    Moves 2 tensors (4 with stream), none of an inactive sample.

    Args:
        out, stream: like x, of any float dtypes and strides of their own; no memory shared with x or each other.
        active: int32 on the device, one value or one per sample (first axis); where 0, out and stream keep their bits.
        Others: as for `layer_norm`.

    Returns:
        out.

    Raises:
        ValueError: as `layer_norm`; shared memory, also within `out` or `stream`.
        RuntimeError: autograd would have to follow.
    """
    parameters = _check(x, weight, bias, bank, active, out=out, stream=stream)
    check_inference("layer_norm_", out, x, stream, *parameters)
    _layer_norm_(out, stream, x, *parameters, bank, active, eps)
    return out
