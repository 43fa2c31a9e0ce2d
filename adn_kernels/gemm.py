"""The convolutions that are matrix products, 1x1 and 3x3, and linear layers: one kernel, ending with an epilogue.

The product has one row per output pixel (M = N * OH * OW of them) and one column per output channel, and is summed over
the taps of the window and the input channels. Moved are x, the weight, the residual and the output, once each (x once
per tap, but for the first from L1 and L2). 1x1 is limited by bandwidth up to about 180 operations per byte on an H200
(256 channels and less), by the tensor cores beyond, as 3x3 is, and for few pixels by the latency of one pass along the
channels.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .bank import flags_kind
from .epilogue import epilogue_value
from .launch import architecture, cdiv, dot_precision, launch, next_power_of_2, tuned
from .view import Strides, in_units, pixel_strides, vector_unit

PROGRAMS = 132  # multiprocessors of an H100 or H200: fewer programs than that leave some of them idle
# Rows and columns of a tile, largest first; small ones occupy the GPU where there are few pixels (batch 1).
TILES = ((128, 64), (64, 64), (64, 32), (32, 32), (16, 32))
# On a Hopper GPU, whose tensor cores take operands from shared memory, accumulators alone need registers: this one fits
# with every epilogue, and reads a third less shared memory for a product than the next. It spills elsewhere.
HOPPER_TILE = (128, 128)
# Rows of tiles that are worked on together: their pixels stay in L2 until all columns have used them.
GROUP = 8


@triton.jit
def _tile_of(program, M, C, BM: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr):
    """Row and column of the tile of a program; see `GROUP`."""
    rows = tl.cdiv(M, BM)
    in_group = GROUP * tl.cdiv(C, BN)
    first = program // in_group * GROUP
    height = tl.minimum(rows - first, GROUP)
    within = program % in_group
    return first + within % height, within // height


@triton.jit
def _pixel_offset(m, OHW, OW, stride_n, stride_h, stride_w, UNIT: tl.constexpr):
    """Where pixel m (int32) of (N, OH, OW) lies, int64; strides are those of `pixel_strides`."""
    if stride_n is None:
        return m.to(tl.int64) * stride_w * UNIT
    else:
        n = m // OHW
        h = m % OHW // OW
        w = m % OHW % OW
        return (n.to(tl.int64) * stride_n + h.to(tl.int64) * stride_h + w.to(tl.int64) * stride_w) * UNIT


@triton.jit
def gemm_kernel(
    x,  # (N, K, H, W), strides below; those of a 1x1 convolution step over the pixels that it does not read
    weight,  # (C, K, TAPS, TAPS)
    scale, shift,  # (C,) of the first or only bank, or None
    scale2, shift2,  # (C,) of the second bank
    residual,  # (N, C, OH, OW) or None; may be `out`
    out,  # (N, C, OH, OW)
    bank, active,  # int32 (1,) or (N,), or None
    M,  # N * OH * OW
    K, C, H, W,
    OHW, OW,  # OH * OW, OW
    x_n, x_k, x_h, x_w,
    weight_c, weight_k, weight_h, weight_w,
    residual_n, residual_c, residual_h, residual_w,
    out_n, out_c, out_h, out_w,
    TAPS: tl.constexpr,  # of a row and of a column of the window: 1 or 3
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BANK: tl.constexpr,  # NONE, SCALAR, PER_SAMPLE of bank.py
    ACTIVE: tl.constexpr,
    PRECISION: tl.constexpr,  # of float32 products: "tf32", "ieee"
    UNIT: tl.constexpr,  # of `vector_unit`: K, C and all strides but those of channels are divided by it
    GROUP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """One program computes BM pixels x BN channels."""
    K *= UNIT
    C *= UNIT
    tile_m, tile_n = _tile_of(tl.program_id(0), M, C, BM, BN, GROUP)
    m = tile_m * BM + tl.arange(0, BM)
    row_mask = m < M
    # Rows past the end repeat the last pixel, so that all of them belong to a sample.
    m = tl.minimum(m, M - 1)
    n = m // OHW
    if ACTIVE == 1:
        if tl.load(active) == 0:
            return
    elif ACTIVE == 2:
        row_mask = row_mask & (tl.load(active + n) != 0)
        if tl.max(row_mask.to(tl.int32), 0) == 0:
            return

    channel = tile_n * BN + tl.arange(0, BN)
    channel_mask = channel < C
    k = tl.arange(0, BK)
    if TAPS == 1:
        x_pixel = _pixel_offset(m, OHW, OW, x_n, x_h, x_w, UNIT)
    else:
        # The input pixel under the first tap; it may lie in the padding.
        h = m % OHW // OW * STRIDE - PADDING
        w = m % OHW % OW * STRIDE - PADDING
        x_pixel = (n.to(tl.int64) * x_n + h.to(tl.int64) * x_h + w.to(tl.int64) * x_w) * UNIT
    # Int64 also along channels, which are far apart in NCHW.
    x_at = x + x_pixel[:, None] + k.to(tl.int64)[None, :] * x_k
    weight_at = weight + (channel.to(tl.int64) * weight_c * UNIT)[None, :] + k[:, None] * weight_k
    blocks = tl.cdiv(K, BK)
    acc = tl.zeros([BM, BN], tl.float32)
    # One loop over taps and channels: its loads are pipelined across taps.
    for i in range(0, TAPS * TAPS * blocks):
        if TAPS == 1:
            k0 = i * BK
            inside = row_mask
            x_step = k0.to(tl.int64) * x_k
            weight_step = k0 * weight_k
        else:
            tap = i // blocks
            kh = tap // TAPS
            kw = tap % TAPS
            k0 = (i % blocks) * BK
            inside = row_mask & (h + kh >= 0) & (h + kh < H) & (w + kw >= 0) & (w + kw < W)
            x_step = (kh.to(tl.int64) * x_h + kw.to(tl.int64) * x_w) * UNIT + k0.to(tl.int64) * x_k
            weight_step = (kh * weight_h + kw * weight_w) * UNIT + k0 * weight_k
        # Past the end both operands are 0: 0 times whatever lies there could be NaN.
        k_mask = k0 + k < K
        a = tl.load(x_at + x_step, mask=inside[:, None] & k_mask[None, :], other=0.0)
        b = tl.load(weight_at + weight_step, mask=channel_mask[None, :] & k_mask[:, None], other=0.0)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)

    out_pixel = _pixel_offset(m, OHW, OW, out_n, out_h, out_w, UNIT)
    out_at = out + out_pixel[:, None] + channel.to(tl.int64)[None, :] * out_c
    residual_at = residual
    if residual is not None:
        residual_pixel = _pixel_offset(m, OHW, OW, residual_n, residual_h, residual_w, UNIT)
        residual_at += residual_pixel[:, None] + channel.to(tl.int64)[None, :] * residual_c
    mask = row_mask[:, None] & channel_mask[None, :]
    y = epilogue_value(
        acc, scale, shift, scale2, shift2, bank, residual_at, n, channel, channel_mask, mask, ACTIVATION, BANK)
    tl.store(out_at, y.to(out.dtype.element_ty), mask=mask)


def _config(pixels: int, channels: int, depth: int, taps: int, dtype: torch.dtype, unit: int, architecture: str
            ) -> dict[str, int]:
    """The default: fits every shape without spilling registers, in tiles small enough to occupy the GPU.

    Args:
        pixels, channels: rows and columns of the product. If `pixels` is symbolic tiles are large.
        depth: input channels, along which it is summed.
        taps: of a row of the window.
        unit: of `vector_unit`.
    """
    # Larger tiles or fewer warps than these spill on some architecture with some epilogue.
    single = dtype == torch.float32
    if unit == 1:  # every element has an address of its own
        return {"BM": 32 if single else 64, "BN": 32, "BK": 32 if depth > 16 else 16, "num_warps": 8, "num_stages": 3}
    tiles = TILES[1:] if single else (HOPPER_TILE, *TILES) if architecture == "sm_90" else TILES
    if isinstance(pixels, int):
        busy = (tile for tile in tiles if cdiv(pixels, tile[0]) * cdiv(channels, tile[1]) >= PROGRAMS)
        bm, bn = next(busy, tiles[-1])
    else:
        bm, bn = tiles[0]
    bn = min(bn, max(32, next_power_of_2(channels)))
    # Along the depth a cache line; two for small tiles, whose loads would not hide the latency of memory.
    small = bm <= 32
    bk = 32 if single else 128 if small else 64
    if taps > 1 and (bm, bn) == TILES[single] and architecture != "sm_90":
        bk //= 2  # the addresses of the taps take the registers
    while bk > 16 and bk >= 2 * depth:
        bk //= 2
    warps = 8 if bm * bn >= (1024 if single else 8192) else 4
    return {"BM": bm, "BN": bn, "BK": bk, "num_warps": warps, "num_stages": 4 if small else 3}


def launch_gemm(
    out: Tensor, x: Tensor, weight: Tensor, scale: Tensor | None, shift: Tensor | None, scale2: Tensor | None,
    shift2: Tensor | None, residual: Tensor | None, bank: Tensor | None, active: Tensor | None, activation: str,
    stride: int = 1, padding: int = 0,
) -> None:
    """Writes `out`: of images (N, K, H, W) and a weight (C, K, k, k), k of 1 (without padding) or 3; or of tokens
    (N, L, K) and a weight (C, K)."""
    tokens = weight.ndim == 2

    def strides_of(t: Tensor) -> Strides:
        """As of (N, channels, H, W). A view of that shape would say the same; making it takes longer than all this."""
        if not tokens:
            return t.stride()
        n, length, channel = t.stride()
        return n, channel, n, length

    n, oh, ow = (out.shape[0], 1, out.shape[1]) if tokens else (out.shape[0], *out.shape[2:])
    h, w = (1, x.shape[1]) if tokens else x.shape[2:]
    channels, depth = weight.shape[:2]
    taps = 1 if tokens else weight.shape[-1]
    pixels = n * oh * ow
    if isinstance(pixels, int) and pixels > 2**31 - 2**10:
        raise ValueError(f"the output has {pixels} pixels; pass fewer than 2^31 at a time")
    of_x, of_weight = strides_of(x), (*weight.stride(), 0, 0)[:4]
    if taps == 1:
        of_x = pixel_strides(oh, ow, (*of_x[:2], stride * of_x[2], stride * of_x[3]))
        read, of_weight = of_x, (*of_weight[:2], 0, 0)
    else:
        read = pixel_strides(h, w, of_x)
    of_out = pixel_strides(oh, ow, strides_of(out))
    of_residual = (None,) * 4 if residual is None else pixel_strides(oh, ow, strides_of(residual))
    unit = vector_unit(channels, depth, (x, read), (weight, of_weight), (out, of_out),
                       *(() if residual is None else ((residual, of_residual),)))
    default = _config(pixels, channels, depth, taps, x.dtype, unit, architecture(x.device))
    config = tuned("gemm", x.device, default, pixels=pixels, channels=channels, depth=depth, taps=taps, stride=stride,
                   unit=unit, dtype=str(x.dtype))
    launch(
        gemm_kernel, (cdiv(pixels, config["BM"]) * cdiv(channels, config["BN"]),),
        x, weight, scale, shift, scale2, shift2, residual, out, bank, active,
        pixels, depth // unit, channels // unit, h, w, oh * ow, ow,
        *in_units(of_x, unit), *in_units(of_weight, unit), *in_units(of_residual, unit), *in_units(of_out, unit),
        TAPS=taps, STRIDE=stride, PADDING=padding, ACTIVATION=activation, BANK=flags_kind(bank),
        ACTIVE=flags_kind(active), PRECISION=dot_precision(x, "matmul" if tokens else "conv"), UNIT=unit, GROUP=GROUP,
        **config,
    )
