"""Depthwise convolution of 3x3, 5x5 or 7x7 that ends with norm, residual and activation.

Bound by HBM bandwidth: reads x (and residual) and writes y once each; a program of BLOCK_A x BLOCK_B pixels fetches
`(BLOCK_A + k - 1) (BLOCK_B + k - 1) / (BLOCK_A BLOCK_B)` times its part of x from L2 (stride 1), and its threads
`k (BLOCK_B + k - 1) / BLOCK_B` times from L1: for 16 x 7 pixels 1.4 and 3.9 times at 3x3, 2.6 and 13 at 7x7.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from .bank import flag_stride
from .epilogue import epilogue_value
from .launch import SPLITS, cdiv, launch, next_power_of_2, tuned
from .view import in_units, vector_unit

KERNEL_SIZES = (3, 5, 7)


@triton.jit
def depthwise_kernel(
    x,  # (N, C, A_IN, B_IN), strides below; A and B are H and W, or W and H, see `launch_depthwise`
    weight,  # (C, 1, KERNEL, KERNEL)
    scale, shift,  # (C,) of the first or only bank, or None
    scale2, shift2,  # (C,) of the second bank
    residual,  # (N, C, A_OUT, B_OUT) or None; may be `out`
    out,  # (N, C, A_OUT, B_OUT)
    bank, active,  # int32 (1,) or (N,), or None
    bank_n, active_n,  # 1 if they hold one value per sample, else 0
    C, A_IN, B_IN, A_OUT, B_OUT,  # C in units of ALIGN, and so strides but those of channels
    x_n, x_c, x_a, x_b,
    weight_c, weight_a, weight_b,
    residual_n, residual_c, residual_a, residual_b,
    out_n, out_c, out_a, out_b,
    rows,  # KERNEL once more: a number the compiler does not know
    ACTIVATION: tl.constexpr,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One program computes BLOCK_A x BLOCK_B pixels of one sample x BLOCK_C channels.

    A thread holds BLOCK_B neighbours, so that what it loads serves up to KERNEL of them.
    """
    C *= ALIGN
    blocks_c = tl.cdiv(C, BLOCK_C)
    blocks_b = tl.cdiv(B_OUT, BLOCK_B)
    blocks_a = tl.cdiv(A_OUT, BLOCK_A)
    tile = tl.program_id(0) // blocks_c
    n = (tile // blocks_b // blocks_a).to(tl.int64)
    if active is not None:  # noqa: SIM102 (`and` would load from None)
        if tl.load(active + n * active_n) == 0:
            return

    channel = tl.program_id(0) % blocks_c * BLOCK_C + tl.arange(0, BLOCK_C)
    channel_mask = channel < C
    a = tile // blocks_b % blocks_a * BLOCK_A + tl.arange(0, BLOCK_A)
    b = tl.full([BLOCK_A], tile % blocks_b * BLOCK_B, tl.int32)
    # Int64 also along channels, which are far apart in NCHW.
    wide_channel = channel.to(tl.int64)[None, :]
    x_at = x + n * x_n * ALIGN + wide_channel * x_c
    weight_at = weight + channel * weight_c
    acc = ()
    for _ in tl.static_range(BLOCK_B):
        acc += (tl.zeros([BLOCK_A, BLOCK_C], tl.float32),)
    # Unrolled along B only: with all taps of a 7x7 in a row, as a known number of rows leads to, registers spill.
    for i in range(rows):
        a_in = a * STRIDE + (i - PADDING)
        in_a = (a_in >= 0) & (a_in < A_IN)
        at_a = a_in.to(tl.int64) * x_a * ALIGN
        taps = ()
        for j in tl.static_range(KERNEL):
            tap = tl.load(weight_at + (i * weight_a + j * weight_b), mask=channel_mask, other=0.0)
            taps += (tap.to(tl.float32)[None, :],)
        for j in tl.static_range((BLOCK_B - 1) * STRIDE + KERNEL):
            b_in = b * STRIDE + (j - PADDING)
            mask = (in_a & (b_in >= 0) & (b_in < B_IN))[:, None] & channel_mask[None, :]
            at = at_a + b_in.to(tl.int64) * x_b * ALIGN
            pixel = tl.load(x_at + at[:, None], mask=mask, other=0.0).to(tl.float32)
            summed = ()
            for p in tl.static_range(BLOCK_B):
                if j >= p * STRIDE and j < p * STRIDE + KERNEL:
                    summed += (tl.fma(pixel, taps[j - p * STRIDE], acc[p]),)
                else:
                    summed += (acc[p],)
            acc = summed

    if bank is not None:
        bank += n * bank_n
    out_at = out + n * out_n * ALIGN + wide_channel * out_c
    results = ()
    for p in tl.static_range(BLOCK_B):
        mask = ((a < A_OUT) & (b + p < B_OUT))[:, None] & channel_mask[None, :]
        residual_at = residual
        if residual is not None:
            at = (a.to(tl.int64) * residual_a + (b + p).to(tl.int64) * residual_b) * ALIGN
            residual_at += n * residual_n * ALIGN + wide_channel * residual_c + at[:, None]
        results += (epilogue_value(acc[p], scale, shift, scale2, shift2, bank, residual_at, n, channel, channel_mask,
                                   mask, ACTIVATION, 0 if bank is None else 1),)
    for p in tl.static_range(BLOCK_B):
        mask = ((a < A_OUT) & (b + p < B_OUT))[:, None] & channel_mask[None, :]
        at = (a.to(tl.int64) * out_a + (b + p).to(tl.int64) * out_b) * ALIGN
        tl.store(out_at + at[:, None], results[p].to(out.dtype.element_ty), mask=mask)


def _config(
    n: int, channels: int, a: int, b: int, stride: int, itemsize: int, vector: bool, channels_last: bool
) -> dict[str, int]:
    """The default tile. Sizes may be symbolic; `vector` is whether channels are read 16 bytes at a time."""
    # 16 bytes for each of 128 threads; or 4 elements where each needs an address of its own, in registers.
    elements = 2048 // itemsize if vector else 512
    if channels_last:
        block_c = 64 if channels % 64 == 0 or channels > 256 else 32 if channels > 16 else 16
        if isinstance(a, int) and a <= 8:
            block_c = min(elements // 8, max(block_c, next_power_of_2(channels)))
        block_a = elements // block_c
    else:
        block_a = min(64, max(8, next_power_of_2(a))) if isinstance(a, int) else 32
        block_c = elements // block_a
    # 7 divides the maps of 224 x 224 images. With stride 2 neighbours share less than they cost in registers; and so do
    # the addresses of channels that 16 does not divide.
    block_b = 3 if stride == 2 else 7 if isinstance(b, int) and b % 7 == 0 and channels % 16 == 0 else 4
    if all(isinstance(size, int) for size in (n, a, b)):
        programs = n * cdiv(a, block_a) * cdiv(b, block_b) * cdiv(channels, block_c)
        # Few, as at batch 1: more, smaller ones to occupy the GPU.
        block_b = block_b if programs >= SPLITS or stride == 2 else 2
    return {"BLOCK_A": block_a, "BLOCK_B": block_b, "BLOCK_C": block_c, "num_warps": 4}


def launch_depthwise(
    out: Tensor, x: Tensor, weight: Tensor, scale: Tensor | None, shift: Tensor | None, scale2: Tensor | None,
    shift2: Tensor | None, residual: Tensor | None, bank: Tensor | None, active: Tensor | None, activation: str,
    stride: int, padding: int,
) -> None:
    """Writes `out` of a weight (C, 1, k, k), k of `KERNEL_SIZES`; stride of 1 or 2."""
    channels_last = x.stride(1) == 1

    def axes(sizes: Sequence[int]) -> Sequence[int]:
        """Lanes lie along the axis of adjacent elements: channels, or W. The neighbours in registers along another."""
        n, c, h, w = sizes
        return (n, c, h, w) if channels_last else (n, c, w, h)

    n, channels, a_out, b_out = axes(out.shape)
    *_, a_in, b_in = axes(x.shape)
    x_strides, out_strides = axes(x.stride()), axes(out.stride())
    weight_c, _, *weight_taps = axes(weight.stride())
    operands = [(x, x_strides), (out, out_strides)]
    if residual is not None:
        operands.append((residual, axes(residual.stride())))
    align = vector_unit(channels, channels, *operands) if channels_last else 1
    of_x, of_out, *of_residual = (in_units(strides, align) for _, strides in operands)

    size, vector = weight.shape[-1], align > 1
    config = tuned(
        "depthwise", x.device, _config(n, channels, a_out, b_out, stride, x.element_size(), vector, channels_last),
        n=n, channels=channels, a=a_out, b=b_out, size=size, stride=stride, channels_last=int(channels_last),
        vector=int(vector), dtype=str(x.dtype),
    )
    programs = (n * cdiv(a_out, config["BLOCK_A"]) * cdiv(b_out, config["BLOCK_B"])
                * cdiv(channels, config["BLOCK_C"]))
    launch(
        depthwise_kernel, (programs,),
        x, weight, scale, shift, scale2, shift2, residual, out, bank, active,
        flag_stride(bank), flag_stride(active),
        channels // align, a_in, b_in, a_out, b_out,
        *of_x, weight_c, *weight_taps, *(of_residual[0] if of_residual else (None,) * 4), *of_out, size,
        ACTIVATION=activation, KERNEL=size, STRIDE=stride, PADDING=padding, ALIGN=align, **config,
    )
