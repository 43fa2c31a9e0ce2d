"""The second stage of a sum over rows, for gradients of parameters: what each program has summed, in a fixed order."""

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor

from .bank import flag_stride
from .launch import cdiv, launch
from .view import unit_of


@triton.jit
def column_sum_kernel(
    sums,  # float32 (blocks, C)
    total, total2,  # (C,), of the blocks of each bank; either may be None
    bank,  # int32, one for `splits` blocks by its stride, or None
    C,  # divided by UNIT
    blocks, splits,
    bank_stride,
    UNIT: tl.constexpr,  # of `unit_of`
    BB: tl.constexpr,
    BC: tl.constexpr,
):
    C *= UNIT
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


def launch_column_sum(
    sums: Tensor, total: Tensor | None, total2: Tensor | None, bank: Tensor | None, splits: int
) -> None:
    """Writes the totals of sums (..., C), `splits` of them in a row for each value of `bank`."""
    *rows, channels = sums.shape
    unit = unit_of(channels)
    launch(column_sum_kernel, (cdiv(channels, 16),), sums, total, total2, bank, channels // unit, math.prod(rows),
           splits, flag_stride(bank), UNIT=unit, BB=64, BC=16, num_warps=4)
