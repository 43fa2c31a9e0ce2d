"""Batch norm with the statistics of the batch, residual and activation in one op, forward and backward.

    y = act((x - mean) * (weight / sqrt(var + eps)) + bias + residual)

A tensor (N, C, H, W) is read where it lies, as rows of adjacent `columns`: in NHWC a row is a pixel with C columns, in
NCHW a sample with C*H*W. `inner` columns in a row have one channel: 1 in NHWC, H*W in NCHW. The batch consists of
`groups` contiguous equal parts, each with statistics of its own; all counts of rows are those of one group.

Statistics are float32, found in two stages in a fixed order without atomics: the GPU is filled with programs that each
take the moments of some rows (Welford's recurrence in every lane; Chan, Golub and LeVeque 1983 to combine), then few
programs combine those, look up the bank and write `stats`, all that the apply kernel needs. Passes over the tensor:
3 forward (4 with a residual), 5 backward (7 with a residual and an activation). The backward recomputes z, what the
activation is applied to, so that besides x only the residual is saved, and no activation needs to be invertible; the
residual is not if there is no activation: its gradient is dy. If in NHWC the rows are few and their number is known,
one kernel, each program owning some channels, does it all in 2 (3) and 3 (5) passes.

All of it is bound by HBM bandwidth, for small tensors by the latency of the launches.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op

from .activation import act, act_grad, act_grad_reference, act_reference, check_activation
from .bank import Vectors, banks, check_flags, of_bank, picked
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
from .view import stride_in, unit_of, view_of_image

# Rows (values per channel) that one program holds in registers.
FEW = 512


# Kernels. Sizes and strides called "per VEC" are passed divided by the constexpr VEC, see the head of `view.py`.
# Strides, and sizes of a whole row, are int64 from there on: those of slices may pass 2^31.
#
# stats: float32 (6, groups, C), what is known of every channel once its rows have been read, all that the apply kernel
# and the backward need besides tensors:
#   0 mean, 1 rstd = 1 / sqrt(var + eps), 2 scale = rstd * weight, 3 bias, 4 count of values, 5 bank (0 or 1).
# The mean stays apart: x * scale + (bias - mean * scale) would cancel where the mean is large.


@triton.jit
def _wide(per_vec, VEC: tl.constexpr):
    return tl.full([], VEC, tl.int64) * per_vec


@triton.jit
def _combine(mean, m2, count):
    """Mean, sum of squared differences from it and count of the union of P sets, each [P, C] (count also [P, 1])."""
    n = tl.sum(count, 0)
    share = count / tl.maximum(n, 1.0)[None, :]
    centre = tl.sum(mean * share, 0)
    # Once more from the first result: a mean far from 0 loses no digits.
    centre += tl.sum((mean - centre[None, :]) * share, 0)
    d = mean - centre[None, :]
    return centre, tl.sum(m2 + count * d * d, 0), n + tl.zeros_like(centre)


@triton.jit
def _store_moments(moments, part, g, groups, c, C, mask, mean, m2, count):
    at = moments + (part * groups + g) * 3 * C + c
    tl.store(at, mean, mask=mask)
    tl.store(at + C, m2, mask=mask)
    tl.store(at + 2 * C, count, mask=mask)


@triton.jit
def batch_norm_moments_kernel(
    x,  # NHWC
    moments,  # float32 (parts, groups, 3, C): mean, sum of squared differences, count
    rows,
    groups,
    C,  # per VEC
    stride,  # of a row; per VEC
    VEC: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A part is every `parts`-th tile of BM rows."""
    part, g = tl.program_id(0), tl.program_id(2)
    parts = tl.num_programs(0)
    C = C * VEC
    stride = _wide(stride, VEC)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    mask = (c < C)[None, :]
    lane = tl.arange(0, BM)
    start = x + (g.to(tl.int64) * rows + part * BM) * stride
    tile = lane.to(tl.int64)[:, None] * stride + c[None, :]
    step = parts * BM * stride
    mean = tl.zeros([BM, BC], tl.float32)
    m2 = tl.zeros([BM, BC], tl.float32)
    tiles = rows // BM
    full = (tiles - part + parts - 1) // parts
    for i in tl.range(0, full, num_stages=STAGES):
        v = tl.load(start + i * step + tile, mask=mask, other=0.0).to(tl.float32)
        d = v - mean
        mean = tl.fma(d, 1.0 / (i + 1), mean)
        m2 = tl.fma(d, v - mean, m2)
    # What is left, less than BM rows, is whose turn it is: only the lanes that have one go on.
    left = tl.where(part == tiles % parts, rows - tiles * BM, 0)
    count = (full + (lane < left)).to(tl.float32)[:, None]
    mask &= (lane < left)[:, None]
    v = tl.load(start + full * step + tile, mask=mask, other=0.0).to(tl.float32)
    d = tl.where(mask, v - mean, 0.0)
    mean += d / tl.maximum(count, 1.0)
    m2 += tl.where(mask, d * (v - mean), 0.0)
    mean, m2, count = _combine(mean, m2, count)
    _store_moments(moments, part, g, groups, c, C, c < C, mean, m2, count)


@triton.jit
def batch_norm_moments_planes_kernel(
    x,  # NCHW
    moments,  # as above, parts = sample parts * plane parts
    rows,
    groups,
    C,
    inner,  # per VEC
    stride,  # of a sample; per VEC
    plane_parts,
    rows_per_part,  # a multiple of BM
    blocks_per_part,  # of BI columns
    VEC: tl.constexpr, BM: tl.constexpr, BI: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    part, c, g = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    inner = inner * VEC
    stride = _wide(stride, VEC)
    lane, i = tl.arange(0, BM), tl.arange(0, BI)
    first = (part // plane_parts).to(tl.int64) * rows_per_part
    length = tl.maximum(tl.minimum(rows - first, rows_per_part), 0).to(tl.int32)
    block = (part % plane_parts) * blocks_per_part
    blocks = tl.maximum(tl.minimum(tl.cdiv(inner, BI) - block, blocks_per_part), 0)
    start = x + (g.to(tl.int64) * rows + first) * stride + c.to(tl.int64) * inner
    steps = tl.cdiv(length, BM)  # over the samples, for each block of the plane
    # How often each row of lanes has a sample. Only the last block of a plane may be partial, and is the last here, so
    # until then the counts of the lanes of a row are equal: no count per lane, no division per element.
    hits = tl.maximum((length - lane + BM - 1) // BM, 0)[:, None]
    mean = tl.zeros([BM, BI], tl.float32)
    m2 = tl.zeros([BM, BI], tl.float32)
    for step in tl.range(0, steps * blocks, num_stages=STAGES):
        b, r = step // steps, step % steps
        at = (block + b) * BI + i
        mask = (lane < length - r * BM)[:, None] & (at < inner)[None, :]
        row = (r * BM + lane).to(tl.int64)[:, None] * stride
        v = tl.load(start + row + at[None, :], mask=mask, other=0.0).to(tl.float32)
        d = tl.where(mask, v - mean, 0.0)
        mean = tl.fma(d, 1.0 / (b * hits + r + 1), mean)
        m2 += tl.where(mask, d * (v - mean), 0.0)
    partial = ((block + blocks - 1) * BI + i < inner)[None, :] & (blocks > 0)
    count = (hits * (tl.maximum(blocks - 1, 0) + partial)).to(tl.float32)
    mean, m2, count = _combine(
        tl.reshape(mean, [BM * BI, 1]), tl.reshape(m2, [BM * BI, 1]), tl.reshape(count, [BM * BI, 1]))
    c += tl.arange(0, 1)
    _store_moments(moments, part, g, groups, c, C, c < C, mean, m2, count)


@triton.jit
def _load_moments(moments, parts, g, groups, c, C, mask, BP: tl.constexpr):
    p = tl.arange(0, BP)
    at = moments + (p * groups + g)[:, None] * 3 * C + c[None, :]
    mask = (p < parts)[:, None] & mask[None, :]
    mean = tl.load(at, mask=mask, other=0.0)
    m2 = tl.load(at + C, mask=mask, other=0.0)
    return _combine(mean, m2, tl.load(at + 2 * C, mask=mask, other=0.0))


@triton.jit
def batch_norm_combine_kernel(
    moments,  # float32 (parts, groups, 3, C)
    combined,  # float32 (groups, 3, C)
    parts, groups, C,
    BP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    g = tl.program_id(1)
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    mean, m2, count = _load_moments(moments, parts, g, groups, c, C, c < C, BP)
    _store_moments(combined, 0, g, groups, c, C, c < C, mean, m2, count)


@triton.jit
def _is_second(bank, g):
    """Whether a group takes the second bank."""
    if bank is not None:
        return tl.load(bank + g) != 0
    else:
        return g < 0


@triton.jit
def _store_stats(
    stats, weight, bias, weight2, bias2, is_second, mean, m2, count, eps, g, groups, c, C, mask
):  # fmt: skip
    """Writes the stats of a group; returns scale and bias."""
    rstd = tl.div_rn(1.0, tl.sqrt_rn(m2 / tl.maximum(count, 1.0) + eps))
    scale = rstd
    shift = tl.zeros_like(rstd)
    if weight is not None:
        scale = rstd * of_bank(weight, weight2, is_second, c, mask)
    if bias is not None:
        shift = of_bank(bias, bias2, is_second, c, mask)
    at = stats + g * C + c
    tl.store(at, mean, mask=mask)
    tl.store(at + groups * C, rstd, mask=mask)
    tl.store(at + 2 * groups * C, scale, mask=mask)
    tl.store(at + 3 * groups * C, shift, mask=mask)
    tl.store(at + 4 * groups * C, count, mask=mask)
    tl.store(at + 5 * groups * C, tl.zeros_like(rstd) + is_second.to(tl.float32), mask=mask)
    return scale, shift


@triton.jit
def _copy_running(running_mean, running_var, new_mean, new_var, c, mask):
    if running_mean is not None:
        tl.store(new_mean + c, tl.load(running_mean + c, mask=mask, other=0.0), mask=mask)
        tl.store(new_var + c, tl.load(running_var + c, mask=mask, other=0.0), mask=mask)


@triton.jit
def _move_running(running_mean, new_mean, new_var, is_second, mean, m2, count, momentum, c, C, mask):
    """Moves the new running values of a group's bank; var is the unbiased one, of which there is none for one value.

    They wait in memory for their group: those of two banks, held in every thread, are what spills first.
    """
    if running_mean is not None:
        tl.debug_barrier()  # what was stored last may be another thread's
        at = is_second.to(tl.int32) * C + c
        moves = mask & (count > 1)
        old_mean = tl.load(new_mean + at, mask=moves, other=0.0).to(tl.float32)
        old_var = tl.load(new_var + at, mask=moves, other=0.0).to(tl.float32)
        mean = (1.0 - momentum) * old_mean + momentum * mean
        var = (1.0 - momentum) * old_var + momentum * (m2 / (count - 1.0))
        tl.store(new_mean + at, mean.to(new_mean.dtype.element_ty), mask=moves)
        tl.store(new_var + at, var.to(new_var.dtype.element_ty), mask=moves)


@triton.jit
def batch_norm_finalize_kernel(
    moments,  # float32 (parts, groups, 3, C)
    stats,  # float32 (6, groups, C)
    weight, bias, running_mean, running_var,  # (C,) of any floating type, or None: the live bank, or the first
    weight2, bias2, running_mean2, running_var2,  # the second, if there is `bank`
    new_mean, new_var,  # (C,), with `bank` (2, C)
    bank,  # int32 (groups,): 0 the first, else the second; or None
    parts, groups, C, momentum, eps,
    BP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    mask = c < C
    _copy_running(running_mean, running_var, new_mean, new_var, c, mask)
    _copy_running(running_mean2, running_var2, new_mean + C, new_var + C, c, mask)
    for g in range(groups):
        is_second = _is_second(bank, g)
        mean, m2, count = _load_moments(moments, parts, g, groups, c, C, mask, BP)
        _store_stats(stats, weight, bias, weight2, bias2, is_second, mean, m2, count, eps, g, groups, c, C, mask)
        _move_running(running_mean, new_mean, new_var, is_second, mean, m2, count, momentum, c, C, mask)


@triton.jit
def _per_column(vector, start, columns, inner, C, BN: tl.constexpr, PLANES: tl.constexpr):
    """Of a vector (C,) the value of each column from `start` (int64) on: [1, BN]."""
    lane = tl.arange(0, BN)
    channel = start // inner
    offset = (start - channel * inner).to(tl.int32)
    if PLANES:
        low, high = tl.load(vector + channel), tl.load(vector + tl.minimum(channel + 1, C - 1))
        return tl.where(offset + lane < inner, low, high)[None, :]
    # No 64-bit division per column.
    return tl.load(vector + channel + (offset + lane) // inner, mask=lane < columns - start, other=0.0)[None, :]


@triton.jit
def _backwards(groups):
    """Block of rows and columns, and group, of a program of an apply kernel, beginning with the last.

    In NHWC those that reduce go through all groups at once, from the first row to the last: the end is left in L2.
    """
    last = tl.num_programs(0) - 1 - tl.program_id(0)
    return last // groups, last % groups


@triton.jit
def batch_norm_apply_kernel(
    x, residual,  # residual may be None
    y,
    stats,
    rows, groups, C, inner,
    columns,  # C * inner; per VEC
    x_stride, residual_stride, y_stride,  # of a row; per VEC
    rows_per_program,  # a multiple of BM
    VEC: tl.constexpr, ACTIVATION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    PLANES: tl.constexpr,  # inner is at least BN, so a block of columns has one or two channels
):  # fmt: skip
    p, g = _backwards(groups)
    blocks = tl.cdiv(columns, BN // VEC)
    columns = _wide(columns, VEC)
    x_stride, residual_stride, y_stride = _wide(x_stride, VEC), _wide(residual_stride, VEC), _wide(y_stride, VEC)
    column = (p % blocks).to(tl.int64) * BN
    mean = _per_column(stats + g * C, column, columns, inner, C, BN, PLANES)
    scale = _per_column(stats + (2 * groups + g) * C, column, columns, inner, C, BN, PLANES)
    bias = _per_column(stats + (3 * groups + g) * C, column, columns, inner, C, BN, PLANES)
    first = (p // blocks).to(tl.int64) * rows_per_program
    lane = tl.arange(0, BN)[None, :]
    for i in range(0, rows_per_program, BM):
        r = first + i + tl.arange(0, BM)[:, None]
        mask = (r < rows) & (lane < columns - column)
        r += g.to(tl.int64) * rows
        v = tl.load(x + column + r * x_stride + lane, mask=mask, other=0.0).to(tl.float32)
        z = tl.fma(v - mean, scale, bias)
        if residual is not None:
            z += tl.load(residual + column + r * residual_stride + lane, mask=mask, other=0.0).to(tl.float32)
        tl.store(y + column + r * y_stride + lane, act(z, ACTIVATION).to(y.dtype.element_ty), mask=mask)


@triton.jit
def batch_norm_few_kernel(
    x, residual,  # rows of channels (inner is 1); residual may be None
    y, stats,
    weight, bias, running_mean, running_var,  # as in batch_norm_finalize_kernel
    weight2, bias2, running_mean2, running_var2,
    new_mean, new_var,
    bank,
    rows, groups,
    C,  # per VEC
    x_stride, residual_stride, y_stride,  # of a row; per VEC
    momentum, eps,
    VEC: tl.constexpr, ACTIVATION: tl.constexpr,
    BM: tl.constexpr,  # at least rows
    BC: tl.constexpr,
):  # fmt: skip
    """The whole forward: a program owns BC channels and holds all their values of a group."""
    C = C * VEC
    x_stride, residual_stride, y_stride = _wide(x_stride, VEC), _wide(residual_stride, VEC), _wide(y_stride, VEC)
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    c_mask = c < C
    row = tl.arange(0, BM)[:, None]
    column = c[None, :]
    mask = (row < rows) & c_mask[None, :]
    count = tl.full([BC], rows, tl.int32).to(tl.float32)
    _copy_running(running_mean, running_var, new_mean, new_var, c, c_mask)
    _copy_running(running_mean2, running_var2, new_mean + C, new_var + C, c, c_mask)
    for g in range(groups):
        is_second = _is_second(bank, g)
        r = g * rows + row
        v = tl.load(x + r * x_stride + column, mask=mask, other=0.0).to(tl.float32)
        mean = tl.sum(v, 0) / count
        mean += tl.sum(tl.where(mask, v - mean[None, :], 0.0), 0) / count
        d = tl.where(mask, v - mean[None, :], 0.0)
        m2 = tl.sum(d * d, 0)
        scale, shift = _store_stats(
            stats, weight, bias, weight2, bias2, is_second, mean, m2, count, eps, g, groups, c, C, c_mask)
        _move_running(running_mean, new_mean, new_var, is_second, mean, m2, count, momentum, c, C, c_mask)
        z = tl.fma(v - mean[None, :], scale[None, :], shift[None, :])
        if residual is not None:
            z += tl.load(residual + r * residual_stride + column, mask=mask, other=0.0).to(tl.float32)
        tl.store(y + r * y_stride + column, act(z, ACTIVATION).to(y.dtype.element_ty), mask=mask)


# Backward. With dz = dy * act'(z), the gradient before the activation (and that of the residual), in each group:
#   dbias = sum dz,  dweight = rstd * sum dz (x - mean),  dx = scale * (dz - a - k (x - mean)),
#   a = sum dz / count,  k = rstd^2 * sum dz (x - mean) / count.
# a + k (x - mean) is the least-squares line of dz over x: `line`, float32 (2, groups, C), holds a and k.
# Where there is a residual, dz is rounded to the type of y and written, and the sums are those of the rounded values.


@triton.jit
def _load_affine(stats, g, groups, c, C, mask):
    """Mean, scale and bias of a group."""
    at = stats + g * C + c
    return (tl.load(at, mask=mask, other=0.0), tl.load(at + 2 * groups * C, mask=mask, other=0.0),
            tl.load(at + 3 * groups * C, mask=mask, other=0.0))


@triton.jit
def _load_dz(
    dy, x, residual, dz, r, dy_stride, x_stride, residual_stride, dz_stride, column, mean, scale, bias, mask,
    ACTIVATION: tl.constexpr
):  # fmt: skip
    """x - mean and dz of a tile of rows r and columns; writes dz if there is a residual."""
    d = tl.load(x + r * x_stride + column, mask=mask, other=0.0).to(tl.float32) - mean
    grad = tl.load(dy + r * dy_stride + column, mask=mask, other=0.0).to(tl.float32)
    z = tl.fma(d, scale, bias)
    if residual is not None:
        z += tl.load(residual + r * residual_stride + column, mask=mask, other=0.0).to(tl.float32)
    grad *= act_grad(z, ACTIVATION)
    if residual is not None:
        rounded = grad.to(dz.dtype.element_ty)
        tl.store(dz + r * dz_stride + column, rounded, mask=mask)
        grad = rounded.to(tl.float32)
    return d, grad


@triton.jit
def batch_norm_backward_reduce_kernel(
    dy, x, residual,  # NHWC; residual may be None
    dz,  # written if there is a residual
    stats,
    sums,  # float32 (parts, groups, 2, C): of dz, of dz (x - mean)
    rows,
    groups,
    C,  # per VEC
    dy_stride, x_stride, residual_stride, dz_stride,  # of a row; per VEC
    VEC: tl.constexpr, ACTIVATION: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    part, g = tl.program_id(0), tl.program_id(2)
    parts = tl.num_programs(0)
    C = C * VEC
    dy_stride, x_stride = _wide(dy_stride, VEC), _wide(x_stride, VEC)
    residual_stride, dz_stride = _wide(residual_stride, VEC), _wide(dz_stride, VEC)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    mask = c < C
    mean, scale, bias = _load_affine(stats, g, groups, c, C, mask)
    first = g.to(tl.int64) * rows
    sum_dz = tl.zeros([BM, BC], tl.float32)
    sum_dzx = tl.zeros([BM, BC], tl.float32)
    for tile in tl.range(part, tl.cdiv(rows, BM), parts, num_stages=STAGES):
        row = tile * BM + tl.arange(0, BM)[:, None]
        d, grad = _load_dz(
            dy, x, residual, dz, first + row, dy_stride, x_stride, residual_stride, dz_stride, c[None, :],
            mean[None, :], scale[None, :], bias[None, :], (row < rows) & mask[None, :], ACTIVATION)
        sum_dz += grad
        sum_dzx = tl.fma(grad, d, sum_dzx)
    at = sums + (part * groups + g) * 2 * C + c
    tl.store(at, tl.sum(sum_dz, 0), mask=mask)
    tl.store(at + C, tl.sum(sum_dzx, 0), mask=mask)


@triton.jit
def batch_norm_backward_reduce_planes_kernel(
    dy, x, residual,  # NCHW; residual may be None
    dz,
    stats,
    sums,
    rows,
    groups,
    C,
    inner,  # per VEC
    dy_stride, x_stride, residual_stride, dz_stride,  # of a sample; per VEC
    plane_parts,
    rows_per_part,  # a multiple of BM
    blocks_per_part,  # of BI columns
    VEC: tl.constexpr, ACTIVATION: tl.constexpr, BM: tl.constexpr, BI: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    part, c, g = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    inner = inner * VEC
    dy_stride, x_stride = _wide(dy_stride, VEC), _wide(x_stride, VEC)
    residual_stride, dz_stride = _wide(residual_stride, VEC), _wide(dz_stride, VEC)
    mean, scale, bias = _load_affine(stats, g, groups, c, C, c < C)
    first = (part // plane_parts).to(tl.int64) * rows_per_part
    length = tl.maximum(tl.minimum(rows - first, rows_per_part), 0).to(tl.int32)
    first += g.to(tl.int64) * rows
    block = (part % plane_parts) * blocks_per_part
    blocks = tl.maximum(tl.minimum(tl.cdiv(inner, BI) - block, blocks_per_part), 0)
    plane = c.to(tl.int64) * inner
    steps = tl.cdiv(length, BM)
    sum_dz = tl.zeros([BM, BI], tl.float32)
    sum_dzx = tl.zeros([BM, BI], tl.float32)
    for step in tl.range(0, steps * blocks, num_stages=STAGES):
        lane = step % steps * BM + tl.arange(0, BM)[:, None]
        column = (block + step // steps) * BI + tl.arange(0, BI)[None, :]
        d, grad = _load_dz(
            dy, x, residual, dz, first + lane, dy_stride, x_stride, residual_stride, dz_stride, plane + column,
            mean, scale, bias, (lane < length) & (column < inner), ACTIVATION)
        sum_dz += grad
        sum_dzx = tl.fma(grad, d, sum_dzx)
    at = sums + (part * groups + g) * 2 * C + c
    tl.store(at, tl.sum(tl.sum(sum_dz, 1), 0))
    tl.store(at + C, tl.sum(tl.sum(sum_dzx, 1), 0))


@triton.jit
def _line(stats, sum_dz, sum_dzx, g, groups, c, C, mask):
    """a, k, the group's part of dweight, and whether it took the second bank."""
    rstd = tl.load(stats + (groups + g) * C + c, mask=mask, other=0.0)
    # Alike for all channels, so one value is read: a vector of them would take as many registers as the channels do.
    count = tl.maximum(tl.load(stats + (4 * groups + g) * C), 1.0)
    is_second = tl.load(stats + (5 * groups + g) * C) != 0
    return sum_dz / count, sum_dzx / count * rstd * rstd, sum_dzx * rstd, is_second


@triton.jit
def _add_to_bank(first, second, value, is_second):
    """Chosen, not multiplied by 0: a NaN in the group of one bank stays out of the other's gradient."""
    return first + tl.where(is_second, 0.0, value), second + tl.where(is_second, value, 0.0)


@triton.jit
def _store_parameter_gradient(grad, first, second, c, C, mask, TWO_BANKS: tl.constexpr):
    if grad is not None:
        tl.store(grad + c, first.to(grad.dtype.element_ty), mask=mask)
        if TWO_BANKS:
            tl.store(grad + C + c, second.to(grad.dtype.element_ty), mask=mask)


@triton.jit
def batch_norm_backward_finalize_kernel(
    sums,  # float32 (parts, groups, 2, C)
    stats,
    line,
    dweight, dbias,  # (C,), of two banks (2, C); either may be None
    parts, groups, C,
    TWO_BANKS: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    mask = c < C
    p = tl.arange(0, BP)
    part_mask = (p < parts)[:, None] & mask[None, :]
    dweight1 = tl.zeros([BC], tl.float32)
    dweight2 = tl.zeros([BC], tl.float32)
    dbias1 = tl.zeros([BC], tl.float32)
    dbias2 = tl.zeros([BC], tl.float32)
    for g in range(groups):
        at = sums + (p * groups + g)[:, None] * 2 * C + c[None, :]
        sum_dz = tl.sum(tl.load(at, mask=part_mask, other=0.0), 0)
        sum_dzx = tl.sum(tl.load(at + C, mask=part_mask, other=0.0), 0)
        a, k, of_weight, is_second = _line(stats, sum_dz, sum_dzx, g, groups, c, C, mask)
        tl.store(line + g * C + c, a, mask=mask)
        tl.store(line + (groups + g) * C + c, k, mask=mask)
        dweight1, dweight2 = _add_to_bank(dweight1, dweight2, of_weight, is_second)
        dbias1, dbias2 = _add_to_bank(dbias1, dbias2, sum_dz, is_second)
    _store_parameter_gradient(dweight, dweight1, dweight2, c, C, mask, TWO_BANKS)
    _store_parameter_gradient(dbias, dbias1, dbias2, c, C, mask, TWO_BANKS)


@triton.jit
def batch_norm_backward_apply_kernel(
    dy,  # or dz, with ACTIVATION "identity"
    x,
    dx,
    stats,
    line,
    rows, groups, C, inner,
    columns,  # C * inner; per VEC
    dy_stride, x_stride, dx_stride,  # of a row; per VEC
    rows_per_program,  # a multiple of BM
    VEC: tl.constexpr, ACTIVATION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    PLANES: tl.constexpr,  # inner is at least BN, so a block of columns has one or two channels
):  # fmt: skip
    p, g = _backwards(groups)
    blocks = tl.cdiv(columns, BN // VEC)
    columns = _wide(columns, VEC)
    dy_stride, x_stride, dx_stride = _wide(dy_stride, VEC), _wide(x_stride, VEC), _wide(dx_stride, VEC)
    column = (p % blocks).to(tl.int64) * BN
    mean = _per_column(stats + g * C, column, columns, inner, C, BN, PLANES)
    scale = _per_column(stats + (2 * groups + g) * C, column, columns, inner, C, BN, PLANES)
    if ACTIVATION != "identity":
        bias = _per_column(stats + (3 * groups + g) * C, column, columns, inner, C, BN, PLANES)
    a = _per_column(line + g * C, column, columns, inner, C, BN, PLANES)
    k = _per_column(line + (groups + g) * C, column, columns, inner, C, BN, PLANES)
    first = (p // blocks).to(tl.int64) * rows_per_program
    lane = tl.arange(0, BN)[None, :]
    for i in range(0, rows_per_program, BM):
        r = first + i + tl.arange(0, BM)[:, None]
        mask = (r < rows) & (lane < columns - column)
        r += g.to(tl.int64) * rows
        d = tl.load(x + column + r * x_stride + lane, mask=mask, other=0.0).to(tl.float32) - mean
        dz = tl.load(dy + column + r * dy_stride + lane, mask=mask, other=0.0).to(tl.float32)
        if ACTIVATION != "identity":
            dz *= act_grad(tl.fma(d, scale, bias), ACTIVATION)
        grad = scale * (dz - tl.fma(d, k, a))
        tl.store(dx + column + r * dx_stride + lane, grad.to(dx.dtype.element_ty), mask=mask)


@triton.jit
def batch_norm_backward_few_kernel(
    dy, x, residual,  # rows of channels (inner is 1); residual may be None
    dx,
    dz,  # written if there is a residual
    stats, dweight, dbias,
    rows, groups,
    C,  # per VEC
    dy_stride, x_stride, residual_stride, dx_stride, dz_stride,  # of a row; per VEC
    TWO_BANKS: tl.constexpr, VEC: tl.constexpr, ACTIVATION: tl.constexpr,
    BM: tl.constexpr,  # at least rows
    BC: tl.constexpr,
):  # fmt: skip
    """The whole backward: a program owns BC channels and holds all their values of a group."""
    C = C * VEC
    dy_stride, x_stride, dx_stride = _wide(dy_stride, VEC), _wide(x_stride, VEC), _wide(dx_stride, VEC)
    residual_stride, dz_stride = _wide(residual_stride, VEC), _wide(dz_stride, VEC)
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    c_mask = c < C
    row = tl.arange(0, BM)[:, None]
    mask = (row < rows) & c_mask[None, :]
    dweight1 = tl.zeros([BC], tl.float32)
    dweight2 = tl.zeros([BC], tl.float32)
    dbias1 = tl.zeros([BC], tl.float32)
    dbias2 = tl.zeros([BC], tl.float32)
    for g in range(groups):
        r = g * rows + row
        mean, scale, bias = _load_affine(stats, g, groups, c, C, c_mask)
        d, grad = _load_dz(
            dy, x, residual, dz, r, dy_stride, x_stride, residual_stride, dz_stride, c[None, :], mean[None, :],
            scale[None, :], bias[None, :], mask, ACTIVATION)
        sum_dz = tl.sum(grad, 0)
        a, k, of_weight, is_second = _line(stats, sum_dz, tl.sum(grad * d, 0), g, groups, c, C, c_mask)
        grad = scale[None, :] * (grad - tl.fma(d, k[None, :], a[None, :]))
        tl.store(dx + r * dx_stride + c[None, :], grad.to(dx.dtype.element_ty), mask=mask)
        dweight1, dweight2 = _add_to_bank(dweight1, dweight2, of_weight, is_second)
        dbias1, dbias2 = _add_to_bank(dbias1, dbias2, sum_dz, is_second)
    _store_parameter_gradient(dweight, dweight1, dweight2, c, C, c_mask, TWO_BANKS)
    _store_parameter_gradient(dbias, dbias1, dbias2, c, C, c_mask, TWO_BANKS)


# Launchers.


class _Rows:
    """How kernels see x: rows of columns (see the top of the file), their number that of one group."""

    def __init__(self, x: Tensor, groups: int) -> None:
        n, self.channels, h, w = self.shape = x.shape
        self.device, self.dtype, self.groups = x.device, x.dtype, groups
        self.channels_last = view_of_image(x).channels_last
        # Images of one pixel are NHWC, whatever their strides are called.
        self.inner = 1 if self.channels_last else h * w
        self.rows = n // groups * (h * w if self.channels_last else 1)
        self.columns = self.channels * self.inner

    def strides(self, *tensors: Tensor | None) -> list[int]:
        """From row to row; all tensors have the shape and layout of x."""
        return [0 if t is None else stride_in(t, self.channels_last) or 0 for t in tensors]  # none of an empty one

    def per_vec(self, size: int, *tensors: Tensor | None) -> tuple[int, list[int]]:
        """VEC, the unit (`view.unit_of`) of a size and the strides of tensors; and those, divided by it."""
        sizes = [size, *self.strides(*tensors)]
        vec = unit_of(*sizes)
        return vec, [n // vec for n in sizes]

    def reduced(self, kernel: Any, kernel_of_planes: Any, *tensors: Tensor | None) -> tuple[Any, int, list[int]]:
        """Which kernel reduces over the rows, its VEC, its sizes and strides of the tensors."""
        if self.inner == 1:
            return kernel, *self.per_vec(self.channels, *tensors)
        vec, sizes = self.per_vec(self.inner, *tensors)
        return kernel_of_planes, vec, [self.channels, *sizes]

    def empty(self, dtype: torch.dtype | None = None) -> Tensor:
        """Memory for a tensor like x, dense."""
        form = torch.channels_last if self.channels_last else torch.contiguous_format
        return torch.empty(self.shape, dtype=dtype or self.dtype, device=self.device, memory_format=form)

    def few(self) -> bool:
        return self.inner == 1 and isinstance(self.rows, int) and 0 < self.rows <= FEW

    def tuned(self, kernel: str, default: dict[str, int]) -> dict[str, int]:
        return tuned(kernel, self.device, default, rows=self.rows, channels=self.channels, inner=self.inner,
                     dtype=str(self.dtype).removeprefix("torch."))


def _power_of_2(n: int, most: int) -> int:
    """The next power of 2 of n, at least 1 and no more than `most`; `most` if n is symbolic."""
    return min(next_power_of_2(n), most) if isinstance(n, int) else most


def _at_most(n: int, most: int) -> int:
    """The smaller of both, at least 1; n if `most` is symbolic."""
    return max(1, min(n, most)) if isinstance(most, int) else n


def _split(name: str, elements: int, rows: _Rows) -> tuple[tuple[int, int, int], tuple[int, ...], dict[str, int]]:
    """How a reduction over rows is split: its grid (parts first), arguments that say so, configuration.

    Args:
        elements: in the tile of a program, unless a table has something better.
    """
    if rows.inner == 1:
        width = _power_of_2(rows.channels, 64)
        config = rows.tuned(
            name, {"BM": elements // width, "BC": width, "STAGES": stages(rows.device, 3, 5), "num_warps": 8})
        blocks = cdiv(rows.channels, config["BC"])
        parts = _at_most(max(1, SPLITS // (blocks * rows.groups)), cdiv(rows.rows, config["BM"]))
        return (parts, blocks, rows.groups), (), config
    height = _power_of_2(rows.rows, elements // _power_of_2(rows.inner, 512))
    config = rows.tuned(
        name, {"BM": height, "BI": _power_of_2(rows.inner, elements // height), "STAGES": stages(rows.device, 3, 5),
               "num_warps": 8})
    parts = max(1, SPLITS // (rows.channels * rows.groups))
    row_parts = _at_most(parts, cdiv(rows.rows, config["BM"]))
    blocks = cdiv(rows.inner, config["BI"])
    plane_parts = _at_most(parts // row_parts, blocks)
    rows_per_part = cdiv(cdiv(rows.rows, row_parts), config["BM"]) * config["BM"]
    arguments = (plane_parts, rows_per_part, cdiv(blocks, plane_parts))
    return (row_parts * plane_parts, rows.channels, rows.groups), arguments, config


def _walk(name: str, rows: _Rows) -> tuple[tuple[int], int, dict[str, int]]:
    """How an apply kernel is split: grid, rows per program, configuration."""
    height = _power_of_2(rows.rows, 2048 // _power_of_2(rows.columns, 64 if rows.inner == 1 else 512))
    width = _power_of_2(rows.columns, 64 if rows.inner == 1 else 2048 // height)
    # 128 rows make the vectors of the channels cheap; but first there have to be programs for the whole GPU.
    walk = 128
    if isinstance(rows.rows * rows.columns, int):
        walk = min(walk, next_power_of_2(rows.rows * cdiv(rows.columns, width) * rows.groups // (4 * SPLITS)))
        walk = max(height, min(walk, next_power_of_2(rows.rows)))
    # 16 bytes twice for each tensor in a thread; more of float32 would not fit the registers of every architecture.
    warps = 2 * rows.dtype.itemsize
    config = dict(rows.tuned(name, {"BM": height, "BN": width, "rows": walk, "num_warps": warps}))
    walk = config.pop("rows")
    config["PLANES"] = isinstance(rows.inner, int) and rows.inner >= config["BN"]
    return (cdiv(rows.columns, config["BN"]) * cdiv(rows.rows, walk) * rows.groups,), walk, config


def _few_config(rows: _Rows) -> dict[str, int]:
    """The grid is one of blocks of 16 channels, at least 32 bytes of each row; of 8 where rows are many."""
    height = next_power_of_2(rows.rows)
    width = _power_of_2(rows.channels, 16 if height <= 128 else 8)
    # 8 elements of each tensor in a thread: with 16, and two groups, registers spill.
    return {"BM": height, "BC": width, "num_warps": max(4, min(height * width // 256, 16))}


def _combine_config(parts: int) -> dict[str, int]:
    """Of the kernels that add up parts, of which a program holds all at once. More warps spill with some Tritons."""
    return {"BP": next_power_of_2(parts), "BC": 8, "num_warps": 4}


def _result_dtype(x: Tensor, residual: Tensor | None) -> torch.dtype:
    return x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)


def _in_layout_of(x: Tensor, dy: Tensor) -> Tensor:
    # Autograd may hand over an expanded gradient, of a sum for instance, or one in another layout: it is copied.
    rows = _Rows(x, 1)
    if stride_in(dy, rows.channels_last) is None:
        return rows.empty(dy.dtype).copy_(dy)
    return dy


def _empty_per_bank(rows: _Rows, dtype: torch.dtype | None, two_banks: bool) -> Tensor:
    """Memory for what there is once for each bank: (C,) or (2, C); nothing if `dtype` is None."""
    c = rows.channels
    return torch.empty(0 if dtype is None else (2, c) if two_banks else c, dtype=dtype, device=rows.device)


class Parameters(NamedTuple):
    """Of the live bank, each (C,) or None; with `bank` those of the second one too."""

    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    weight2: Tensor | None = None
    bias2: Tensor | None = None
    running_mean2: Tensor | None = None
    running_var2: Tensor | None = None


def _launch_parts(x: Tensor, rows: _Rows) -> Tensor:
    """Moments of each part of the rows, (parts, groups, 3, C)."""
    grid, split, config = _split("batch_norm_moments", 4096, rows)
    moments = torch.empty(grid[0], rows.groups, 3, rows.channels, device=x.device)
    kernel, vec, sizes = rows.reduced(batch_norm_moments_kernel, batch_norm_moments_planes_kernel, x)
    launch(kernel, grid, x, moments, rows.rows, rows.groups, *sizes, *split, VEC=vec, **config)
    return moments


def launch_batch_norm_moments(x: Tensor, groups: int) -> Tensor:
    """Mean, sum of squared differences from it and count: float32 (groups, 3, C)."""
    parts = _launch_parts(x, _Rows(x, groups))
    combined = torch.empty_like(parts[0])
    c = x.shape[1]
    config = _combine_config(parts.shape[0])
    launch(batch_norm_combine_kernel, (cdiv(c, config["BC"]), groups), parts, combined, len(parts), groups, c, **config)
    return combined


def launch_batch_norm_finish(
    x: Tensor, residual: Tensor | None, moments: Tensor, parameters: Parameters, bank: Tensor | None, groups: int,
    activation: str, momentum: float, eps: float, rows: _Rows | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, stats and new running values from moments (parts, groups, 3, C), whosever rows those are of."""
    rows = rows or _Rows(x, groups)
    c, parts = rows.channels, moments.shape[0]
    y, stats, *running = _outputs(x, residual, parameters, bank, rows)
    config = _combine_config(parts)
    launch(batch_norm_finalize_kernel, (cdiv(c, config["BC"]),), moments, stats, *parameters, *running, bank, parts,
           groups, c, momentum, eps, **config)
    if x.numel() != 0:
        grid, walk, config = _walk("batch_norm_apply", rows)
        vec, sizes = rows.per_vec(rows.columns, x, residual, y)
        launch(batch_norm_apply_kernel, grid, x, residual, y, stats, rows.rows, groups, c, rows.inner, *sizes, walk,
               VEC=vec, ACTIVATION=activation, **config)
    return y, stats, *running


def _outputs(
    x: Tensor, residual: Tensor | None, parameters: Parameters, bank: Tensor | None, rows: _Rows
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    stats = torch.empty(6, rows.groups, rows.channels, device=x.device)
    running = [_empty_per_bank(rows, None if r is None else r.dtype, bank is not None)
               for r in (parameters.running_mean, parameters.running_var)]
    return rows.empty(_result_dtype(x, residual)), stats, *running


def launch_batch_norm(
    x: Tensor, residual: Tensor | None, parameters: Parameters, bank: Tensor | None, groups: int, activation: str,
    momentum: float, eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See the op."""
    rows = _Rows(x, groups)
    if not rows.few():
        moments = _launch_parts(x, rows)
        return launch_batch_norm_finish(
            x, residual, moments, parameters, bank, groups, activation, momentum, eps, rows)
    y, stats, *running = _outputs(x, residual, parameters, bank, rows)
    vec, sizes = rows.per_vec(rows.channels, x, residual, y)
    config = _few_config(rows)
    launch(batch_norm_few_kernel, (cdiv(rows.channels, config["BC"]),), x, residual, y, stats, *parameters, *running,
           bank, rows.rows, groups, *sizes, momentum, eps, VEC=vec, ACTIVATION=activation, **config)
    return y, stats, *running


def launch_batch_norm_backward_reduce(
    dy: Tensor, x: Tensor, residual: Tensor | None, stats: Tensor, weight: torch.dtype | None,
    bias: torch.dtype | None, two_banks: bool, activation: str, rows: _Rows | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dz (nothing without a residual), line (2, groups, C), dweight and dbias."""
    groups, c = stats.shape[1:]
    rows = rows or _Rows(x, groups)
    dz = None if residual is None else rows.empty(_result_dtype(x, residual))
    grid, split, config = _split("batch_norm_backward_reduce", 2048, rows)
    sums = torch.empty(grid[0], groups, 2, c, device=x.device)
    kernel, vec, sizes = rows.reduced(
        batch_norm_backward_reduce_kernel, batch_norm_backward_reduce_planes_kernel, dy, x, residual, dz)
    launch(kernel, grid, dy, x, residual, dz, stats, sums, rows.rows, groups, *sizes, *split, VEC=vec,
           ACTIVATION=activation, **config)
    line = torch.empty(2, groups, c, device=x.device)
    dweight, dbias = _empty_per_bank(rows, weight, two_banks), _empty_per_bank(rows, bias, two_banks)
    config = _combine_config(grid[0])
    launch(batch_norm_backward_finalize_kernel, (cdiv(c, config["BC"]),), sums, stats, line,
           None if weight is None else dweight, None if bias is None else dbias, grid[0], groups, c,
           TWO_BANKS=two_banks, **config)
    return x.new_empty(0) if dz is None else dz, line, dweight, dbias


def launch_batch_norm_backward_apply(
    dy: Tensor, x: Tensor, stats: Tensor, line: Tensor, activation: str, rows: _Rows | None = None
) -> Tensor:
    """dx from dy; from dz if `activation` is "identity"."""
    groups, c = stats.shape[1:]
    rows = rows or _Rows(x, groups)
    dx = rows.empty()
    if x.numel() != 0:
        grid, walk, config = _walk("batch_norm_backward_apply", rows)
        vec, sizes = rows.per_vec(rows.columns, dy, x, dx)
        launch(batch_norm_backward_apply_kernel, grid, dy, x, dx, stats, line, rows.rows, groups, c, rows.inner,
               *sizes, walk, VEC=vec, ACTIVATION=activation, **config)
    return dx


def launch_batch_norm_backward(
    dy: Tensor, x: Tensor, residual: Tensor | None, stats: Tensor, weight: torch.dtype | None,
    bias: torch.dtype | None, two_banks: bool, activation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx, dz, dweight, dbias; dy in the layout of x."""
    groups, c = stats.shape[1:]
    rows = _Rows(x, groups)
    if not rows.few():
        dz, line, dweight, dbias = launch_batch_norm_backward_reduce(
            dy, x, residual, stats, weight, bias, two_banks, activation, rows)
        given = (dy, activation) if residual is None else (dz, "identity")
        return launch_batch_norm_backward_apply(given[0], x, stats, line, given[1], rows), dz, dweight, dbias
    dx, dz = rows.empty(), None if residual is None else rows.empty(_result_dtype(x, residual))
    dweight, dbias = _empty_per_bank(rows, weight, two_banks), _empty_per_bank(rows, bias, two_banks)
    vec, sizes = rows.per_vec(c, dy, x, residual, dx, dz)
    config = _few_config(rows)
    launch(batch_norm_backward_few_kernel, (cdiv(c, config["BC"]),), dy, x, residual, dx, dz, stats,
           None if weight is None else dweight, None if bias is None else dbias, rows.rows, groups, *sizes,
           TWO_BANKS=two_banks, VEC=vec, ACTIVATION=activation, **config)
    return dx, x.new_empty(0) if dz is None else dz, dweight, dbias


# Plain PyTorch, at least in float32. What kernels see as rows is split here into (groups, samples, C, H, W).


def _grouped(x: Tensor, groups: int, dtype: torch.dtype) -> Tensor:
    n, c, h, w = x.shape
    return x.to(dtype).reshape(groups, n // groups, c, h, w)


def _per_channel(vectors: Tensor) -> Tensor:
    """(..., groups, C) as it broadcasts against `_grouped`."""
    return vectors[..., None, :, None, None]


def batch_norm_moments_reference(x: Tensor, groups: int) -> Tensor:
    xs = _grouped(x, groups, torch.promote_types(x.dtype, torch.float32))
    count = xs.shape[1] * xs.shape[3] * xs.shape[4]
    mean = xs.sum((1, 3, 4)) / torch.sym_max(count, 1)
    m2 = (xs - _per_channel(mean)).square().sum((1, 3, 4))
    return torch.stack([mean, m2, torch.full_like(mean, count)], 1)


def batch_norm_finish_reference(
    x: Tensor, residual: Tensor | None, moments: Tensor, parameters: Parameters, bank: Tensor | None, groups: int,
    activation: str, momentum: float, eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    weight, bias, running_mean, running_var, weight2, bias2, running_mean2, running_var2 = parameters
    means, m2s, counts = moments.unbind(2)
    count = counts.sum(0)
    mean = (means * counts).sum(0) / count.clamp(min=1)
    m2 = (m2s + counts * (means - mean).square()).sum(0)
    rstd = (m2 / count.clamp(min=1) + eps).rsqrt()
    scale = rstd if weight is None else rstd * picked(weight, weight2, bank)
    shift = torch.zeros_like(rstd) if bias is None else picked(bias, bias2, bank).expand_as(rstd)
    is_second = torch.zeros_like(rstd) if bank is None else (bank != 0)[:, None].expand_as(rstd)
    stats = torch.stack([v.to(moments.dtype) for v in (mean, rstd, scale, shift, count, is_second)])

    centred = _grouped(x, groups, moments.dtype) - _per_channel(mean)
    z = (centred * _per_channel(stats[2]) + _per_channel(stats[3])).reshape(x.shape)
    y = _Rows(x, groups).empty(_result_dtype(x, residual))
    y.copy_(act_reference(z if residual is None else z + residual, activation))

    def moved(first: Tensor | None, second: Tensor | None, batch: Tensor) -> Tensor:
        if first is None:
            return x.new_empty(0)
        value = first if bank is None else torch.stack([first, second])
        result = value.to(moments.dtype)
        for g in range(groups):
            moves = count[g] > 1
            if bank is not None:
                moves = moves & (is_second[g] == torch.arange(2, device=x.device)[:, None].bool())
            result = torch.where(moves, (1 - momentum) * result + momentum * batch[g], result)
        return result.to(value.dtype, copy=True)

    return y, stats, moved(running_mean, running_mean2, mean), moved(running_var, running_var2, m2 / (count - 1))


def batch_norm_reference(
    x: Tensor, residual: Tensor | None, parameters: Parameters, bank: Tensor | None, groups: int, activation: str,
    momentum: float, eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    moments = batch_norm_moments_reference(x, groups)[None]
    return batch_norm_finish_reference(x, residual, moments, parameters, bank, groups, activation, momentum, eps)


def batch_norm_backward_reduce_reference(
    dy: Tensor, x: Tensor, residual: Tensor | None, stats: Tensor, weight: torch.dtype | None,
    bias: torch.dtype | None, two_banks: bool, activation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    groups = stats.shape[1]
    mean, rstd, scale, shift, count, second = stats.unbind(0)
    centred = _grouped(x, groups, stats.dtype) - _per_channel(mean)
    z = (centred * _per_channel(scale) + _per_channel(shift)).reshape(x.shape)
    dz = dy * act_grad_reference(z if residual is None else z + residual, activation)
    written = x.new_empty(0)
    if residual is not None:
        dz = written = _Rows(x, groups).empty(_result_dtype(x, residual)).copy_(dz)
    dzs = _grouped(dz, groups, stats.dtype)
    sum_dz, sum_dzx = dzs.sum((1, 3, 4)), (dzs * centred).sum((1, 3, 4))
    line = torch.stack([sum_dz, sum_dzx * rstd * rstd]) / count.clamp(min=1)

    def of_bank(dtype: torch.dtype | None, per_group: Tensor) -> Tensor:
        if dtype is None:
            return x.new_empty(0)
        if not two_banks:
            return per_group.sum(0).to(dtype)
        # Chosen, not multiplied by 0: a NaN in the group of one bank stays out of the other's gradient.
        first = second == 0
        return torch.stack([torch.where(first, per_group, 0), torch.where(first, 0, per_group)]).sum(1).to(dtype)

    return written, line, of_bank(weight, sum_dzx * rstd), of_bank(bias, sum_dz)


def batch_norm_backward_apply_reference(dy: Tensor, x: Tensor, stats: Tensor, line: Tensor, activation: str) -> Tensor:
    groups = stats.shape[1]
    mean, _, scale, shift, *_ = _per_channel(stats).unbind(0)
    a, k = _per_channel(line).unbind(0)
    centred = _grouped(x, groups, stats.dtype) - mean
    dz = _grouped(dy, groups, stats.dtype) * act_grad_reference(centred * scale + shift, activation)
    return _Rows(x, groups).empty().copy_((scale * (dz - a - k * centred)).reshape(x.shape))


def batch_norm_backward_reference(
    dy: Tensor, x: Tensor, residual: Tensor | None, stats: Tensor, weight: torch.dtype | None,
    bias: torch.dtype | None, two_banks: bool, activation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dz, line, dweight, dbias = batch_norm_backward_reduce_reference(
        dy, x, residual, stats, weight, bias, two_banks, activation)
    given = (dy, activation) if residual is None else (dz, "identity")
    return batch_norm_backward_apply_reference(given[0], x, stats, line, given[1]), dz, dweight, dbias


# Operators. x or residual of float64 take the reference; parameters of float64 the kernels, which compute in float32.


@triton_op("adn::batch_norm", mutates_args=())
def batch_norm_op(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, running_mean: Tensor | None,
    running_var: Tensor | None, weight2: Tensor | None, bias2: Tensor | None, running_mean2: Tensor | None,
    running_var2: Tensor | None, bank: Tensor | None, groups: int, activation: str, momentum: float, eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, stats (see the kernels), new running mean and variance: (C,), with `bank` (2, C), empty if there are none."""
    parameters = Parameters(
        weight, bias, running_mean, running_var, weight2, bias2, running_mean2, running_var2)
    run = launch_batch_norm if on_gpu(x, residual) else batch_norm_reference
    return run(x, residual, parameters, bank, groups, activation, momentum, eps)


@triton_op("adn::batch_norm_backward", mutates_args=())
def batch_norm_backward_op(
    dy: Tensor, x: Tensor, residual: Tensor | None, stats: Tensor, weight: torch.dtype | None,
    bias: torch.dtype | None, two_banks: bool, activation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx, dz (empty without a residual), dweight and dbias: (C,), of two banks (2, C), empty if there are none.

    Args:
        dy: in the layout of x.
        weight, bias: their types; None if there are none.
    """
    run = launch_batch_norm_backward if on_gpu(dy, x, residual) else batch_norm_backward_reference
    return run(dy, x, residual, stats, weight, bias, two_banks, activation)


# The same in pieces, between which processes exchange moments (groups, 3, C) and lines (2, groups, C).


@triton_op("adn::batch_norm_moments", mutates_args=())
def batch_norm_moments_op(x: Tensor, groups: int) -> Tensor:
    run = launch_batch_norm_moments if on_gpu(x) else batch_norm_moments_reference
    return run(x, groups)


@triton_op("adn::batch_norm_finish", mutates_args=())
def batch_norm_finish_op(
    x: Tensor, residual: Tensor | None, moments: Tensor, weight: Tensor | None, bias: Tensor | None,
    running_mean: Tensor | None, running_var: Tensor | None, weight2: Tensor | None, bias2: Tensor | None,
    running_mean2: Tensor | None, running_var2: Tensor | None, bank: Tensor | None, groups: int, activation: str,
    momentum: float, eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    parameters = Parameters(
        weight, bias, running_mean, running_var, weight2, bias2, running_mean2, running_var2)
    run = launch_batch_norm_finish if on_gpu(x, residual) else batch_norm_finish_reference
    return run(x, residual, moments, parameters, bank, groups, activation, momentum, eps)


@triton_op("adn::batch_norm_backward_reduce", mutates_args=())
def batch_norm_backward_reduce_op(
    dy: Tensor, x: Tensor, residual: Tensor | None, stats: Tensor, weight: torch.dtype | None,
    bias: torch.dtype | None, two_banks: bool, activation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    run = launch_batch_norm_backward_reduce if on_gpu(dy, x, residual) else batch_norm_backward_reduce_reference
    return run(dy, x, residual, stats, weight, bias, two_banks, activation)


@triton_op("adn::batch_norm_backward_apply", mutates_args=())
def batch_norm_backward_apply_op(dy: Tensor, x: Tensor, stats: Tensor, line: Tensor, activation: str) -> Tensor:
    run = launch_batch_norm_backward_apply if on_gpu(dy, x) else batch_norm_backward_apply_reference
    return run(dy, x, stats, line, activation)


no_second_derivative(batch_norm_backward_op)
no_second_derivative(batch_norm_backward_reduce_op)
no_second_derivative(batch_norm_backward_apply_op)


def _save(
    ctx: Any, x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, bank: Tensor | None,
    activation: str, outputs: tuple[Tensor, ...],
) -> None:
    """Neither parameters nor bank are kept, which others may write to before the backward: stats have their values."""
    _, stats, new_mean, new_var = outputs
    ctx.save_for_backward(x, None if activation == "identity" else residual, stats)
    ctx.affine = *(None if p is None else p.dtype for p in (weight, bias)), bank is not None, activation
    ctx.residual_dtype = None if residual is None else residual.dtype
    # Otherwise running values would require grad from the first step on, and the second step would fail.
    ctx.mark_non_differentiable(stats, new_mean, new_var)
    # Nor are zeros written as their gradients.
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, dy: Tensor, dx: Tensor, dz: Tensor, dweight: Tensor, dbias: Tensor) -> tuple:
    """For x, residual and the eight parameters, and None for the five other arguments."""
    weight, bias, two_banks, activation = ctx.affine

    def of_banks(dtype: torch.dtype | None, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        if dtype is None:
            return None, None
        return (grad[0], grad[1]) if two_banks else (grad, None)

    dresidual = None
    if ctx.residual_dtype is not None:
        dresidual = (dy if activation == "identity" else dz).to(ctx.residual_dtype)
    (weight, weight2), (bias, bias2) = of_banks(weight, dweight), of_banks(bias, dbias)
    return dx, dresidual, weight, bias, None, None, weight2, bias2, None, None, *[None] * 5


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, residual, weight, bias, *_, bank, _, activation, _, _ = inputs
    _save(ctx, x, residual, weight, bias, bank, activation, output)


def _backward(ctx: Any, dy: Tensor | None, *_: Any) -> tuple:
    if dy is None:
        return (None,) * 15
    x, residual, stats = ctx.saved_tensors
    dy = _in_layout_of(x, dy)
    return _gradients(ctx, dy, *batch_norm_backward_op(dy, x, residual, stats, *ctx.affine))


batch_norm_op.register_autograd(_backward, setup_context=_setup_context)


class _AcrossProcesses(torch.autograd.Function):
    """The op with statistics of the batches of all processes, which may be of any sizes.

    As in `nn.SyncBatchNorm`, gradients of weight and bias are those of the local batch.
    """

    @staticmethod
    def forward(
        ctx: Any, process_group: dist.ProcessGroup, x: Tensor, residual: Tensor | None, *rest: Any
    ) -> tuple[Tensor, ...]:
        *parameters, bank, groups, activation, momentum, eps = rest
        moments = batch_norm_moments_op(x, groups)
        gathered = moments.new_empty(dist.get_world_size(process_group) * groups, *moments.shape[1:])
        dist.all_gather_into_tensor(gathered, moments, group=process_group)
        outputs = batch_norm_finish_op(
            x, residual, gathered.unflatten(0, (-1, groups)), *parameters, bank, groups, activation, momentum, eps)
        _save(ctx, x, residual, *parameters[:2], bank, activation, outputs)
        ctx.process_group = process_group
        return outputs

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, *_: Any) -> tuple:
        x, residual, stats = ctx.saved_tensors
        # The other processes wait for this one's sums, also if it has no gradient.
        dy = torch.zeros_like(x) if dy is None else _in_layout_of(x, dy)
        dz, line, dweight, dbias = batch_norm_backward_reduce_op(dy, x, residual, stats, *ctx.affine)
        # Each process divided its sums by the count of all: what is left to do is to add.
        dist.all_reduce(line, group=ctx.process_group)
        given = (dy, ctx.affine[-1]) if residual is None else (dz, "identity")
        dx = batch_norm_backward_apply_op(given[0], x, stats, line, given[1])
        return None, *_gradients(ctx, dy, dx, dz, dweight, dbias)


# What others call.


def _check(
    x: Tensor, residual: Tensor | None, bank: Tensor | None, groups: int, activation: str, momentum: float, eps: float
) -> None:
    check_activation(activation)
    check_eps(eps)
    if momentum is None or not 0 <= momentum <= 1:
        raise ValueError(f"momentum={momentum}; pass a number in [0, 1]; for a cumulative average "
                         "1 / (num_batches_tracked + 1)")
    channels_last = view_of_image(x).channels_last
    n = x.shape[0]
    for name, value in (("x", x), ("residual", residual)):
        if value is not None and not value.is_floating_point():
            raise ValueError(f"{name} is {value.dtype}; pass a floating type")
    if groups < 1 or n % groups != 0:
        raise ValueError(f"a batch of {n} cannot be split into {groups} equal groups")
    if bank is not None and tuple(bank.shape) != (groups,):
        raise ValueError(f"bank has shape {tuple(bank.shape)}; pass one value for each of the {groups} groups")
    check_flags(bank, "bank", groups, x.device)
    if residual is not None:
        if residual.device != x.device:
            raise ValueError(f"residual is on {residual.device}, x on {x.device}; pass both on one device")
        if residual.ndim != 4 or any(a != b for a, b in zip(residual.shape, x.shape)):
            raise ValueError(f"residual has shape {tuple(residual.shape)}, x has {tuple(x.shape)}; pass the same")
        if residual.numel() != 0 and stride_in(residual, channels_last) is None:
            name = "torch.channels_last" if channels_last else "torch.contiguous_format"
            raise ValueError(f"residual has strides {residual.stride()}, x has {x.stride()}: pass it in the layout of "
                             f"x, residual.contiguous(memory_format={name})")


def batch_norm(
    x: Tensor,
    weight: Vectors,
    bias: Vectors,
    running_mean: Vectors,
    running_var: Vectors,
    *,
    residual: Tensor | None = None,
    activation: str = "identity",
    momentum: float = 0.1,
    eps: float = 1e-5,
    groups: int = 1,
    bank: Tensor | None = None,
    process_group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, Vectors, Vectors]:
    """Batch norm with the statistics of the batch, residual and activation: `y = act(bn(x) + residual)`.

    Forward 3 passes over HBM (x, x, y; 4 with a residual), backward 5 (dy, x, dy, x, dx; 7 with a residual and an
    activation, which wants z and dz), which bind it; in NHWC 2 (3) and 3 (5) up to 512 values per channel, where
    launches do. x is read twice because its statistics must be complete before the first value of y. Same bits in every
    run. For the backward only x is saved, and the residual if there is an activation: parameters and `bank` may change.

    Args:
        x: (N, C, H, W), float32, float16 or bfloat16 (float64, also of the residual, in plain PyTorch); NHWC, NCHW or a
            slice of channels of either.
        weight, bias: (C,) of the live norm bank, any floating type, or None.
        running_mean, running_var: (C,), any floating type, or None; not written.
        residual: of the shape and layout of x, any floating type; added before the activation.
        activation: one of `ACTIVATIONS`.
        momentum: share of the batch in the new running values. As in torch, var in them is the unbiased one.
        groups: the batch consists of this many contiguous equal parts with statistics of their own. Running values
            move once for each, in this order: a concatenated batch is what its parts one after the other are.
        bank: int32 (groups,), read on the device: which bank a group takes, 0 the first, else the second. Then weight,
            bias, running_mean and running_var are pairs (first, second); both get a gradient, that of the one no group
            takes is 0.
        process_group: take statistics over the batches of all its processes, as `nn.SyncBatchNorm`: one all_gather
            forward, one all_reduce backward. Batches may differ in size; all processes must take part.

    Returns:
        y in the layout of x, its dtype that of `x + residual`; new running mean and variance, like those passed. An
        empty batch moves nothing.

    Raises:
        ValueError: for one value per channel (in a group), and for anything else it cannot take. With `process_group`
            only the device knows their number over all processes: if it is one, running values do not move.
        RuntimeError: for a second derivative.
    """
    _check(x, residual, bank, groups, activation, momentum, eps)
    firsts, seconds = banks(
        x, x.shape[1], bank, weight=weight, bias=bias, running_mean=running_mean, running_var=running_var)
    parameters = Parameters(*firsts, *seconds)
    if (parameters.running_mean is None) != (parameters.running_var is None):
        raise ValueError("pass running_mean and running_var, or neither")
    arguments = (x, residual, *parameters, bank, groups, activation, momentum, eps)
    if process_group is not None and dist.get_world_size(process_group) > 1:
        y, _, *running = _AcrossProcesses.apply(process_group, *arguments)
    else:
        if x.shape[2] * x.shape[3] == 1 and x.shape[0] == groups:
            raise ValueError(f"Expected more than 1 value per channel when training, got input size {x.shape}"
                             + (f" in {groups} groups" if groups > 1 else ""))
        y, _, *running = batch_norm_op(*arguments)
    if parameters.running_mean is None:
        return y, None, None
    return y, *(value if bank is None else (value[0], value[1]) for value in running)
