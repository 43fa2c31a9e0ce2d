"""What the convolutions that are matrix products (`conv1x1`, `conv3x3`) share: operands, tiles, configurations.

The product has one row per output pixel (M = N * OH * OW of them) and one column per output channel.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import cdiv

PROGRAMS = 132  # multiprocessors of an H100 or H200: fewer programs than that leave some of them idle
# Rows and columns of a tile, largest first; small ones occupy the GPU where there are few pixels (batch 1).
TILES = ((128, 64), (64, 64), (64, 32), (32, 32), (16, 32))
# Rows of tiles that are worked on together: their pixels stay in L2 until all columns have used them.
GROUP = 8


def conv_shape(x: Tensor, weight: Tensor, size: int, stride: int, padding: int) -> tuple[int, int, int, int]:
    """The shape of a convolution's output.

    Raises ValueError unless x is (N, K, H, W) and weight (C, K, size, size), of one dtype and device, and they fit.
    """
    if x.ndim != 4:
        raise ValueError(f"x has shape {tuple(x.shape)}; pass (N, K, H, W)")
    if weight.ndim != 4 or weight.shape[1] != x.shape[1] or tuple(weight.shape[2:]) != (size, size):
        raise ValueError(f"weight has shape {tuple(weight.shape)}; pass (C, {x.shape[1]}, {size}, {size}) "
                         f"for x of shape {tuple(x.shape)}")
    check_same_kind(x, weight)
    if stride < 1 or padding < 0:
        raise ValueError(f"stride={stride}, padding={padding}; pass a stride of 1 or more, a padding of 0 or more")
    n, _, h, w = x.shape
    if h + 2 * padding < size or w + 2 * padding < size:
        raise ValueError(f"x of shape {tuple(x.shape)} with padding {padding} is smaller than the {size}x{size} weight")
    return n, weight.shape[0], (h + 2 * padding - size) // stride + 1, (w + 2 * padding - size) // stride + 1


def check_same_kind(x: Tensor, weight: Tensor) -> None:
    """Raises ValueError unless both have one dtype and one device."""
    if weight.dtype != x.dtype:
        raise ValueError(f"weight is {weight.dtype}, x is {x.dtype}; pass both in one dtype")
    if weight.device != x.device:
        raise ValueError(f"weight is on {weight.device}, x on {x.device}; pass both on one device")


def check_pixels(pixels: int) -> None:
    """Raises ValueError for more output pixels than the kernels can number (elements may be more)."""
    if isinstance(pixels, int) and pixels > 2**31 - 2**10:
        raise ValueError(f"the output has {pixels} pixels; pass fewer than 2^31 at a time")


def pixel_strides(x: Tensor, unit: int = 1) -> tuple[int | None, int, int | None, int]:
    """Strides of x (N, C, H, W) for `pixel_offset`, in this order; all but that of C in units.

    Those of N and H are None if all pixels are equally far apart, as in NHWC: then that of W is their distance.
    """
    _, _, h, w = x.shape
    sn, sc, sh, sw = x.stride()
    # The stride of an axis of one element says nothing.
    step = sw if w != 1 else sh if h != 1 else sn
    if (w == 1 or h == 1 or sh == w * step) and sn == h * w * step:
        return None, sc, None, step // unit
    return sn // unit, sc, sh // unit, sw // unit


def vector_unit(weight: Tensor, *images: Tensor | None) -> int:
    """8 if channels can be read and written in blocks of 8, else 1.

    Kernels get sizes and strides divided by it and multiply again: so the compiler knows of the common divisor also
    where it is 8, as with 24 channels. Of arguments by themselves it only knows whether 16 divides them.

    Args:
        weight: (C, K, ...).
        images: x, output, residual as (N, channels, H, W).
    """
    channels, depth, *_ = weight.shape
    given = [image for image in images if image is not None]
    if channels % 8 or depth % 8 or any(t.stride(1) != 1 for t in (weight, *given)):
        return 1
    strides = [stride for axis, stride in enumerate(weight.stride()) if axis != 1 and weight.shape[axis] != 1]
    for image in given:
        n, _, h, w = pixel_strides(image)
        strides += [w] if n is None else [n, h, w]
    aligned = all(t.storage_offset() % 8 == 0 for t in (weight, *given))
    return 8 if aligned and all(stride % 8 == 0 for stride in strides) else 1


def gemm_config(pixels: int, channels: int, depth: int, dtype: torch.dtype, unit: int) -> dict[str, int]:
    """The default: fits every shape without spilling registers, in tiles small enough to occupy the GPU.

    Args:
        pixels, channels: rows and columns of the product. If `pixels` is symbolic tiles are large.
        depth: input channels, along which it is summed.
        unit: of `vector_unit`.
    """
    # Larger tiles or fewer warps than these spill on some architecture with some epilogue.
    single = dtype == torch.float32
    if unit == 1:  # every element has an address of its own
        return {"BM": 32 if single else 64, "BN": 32, "BK": 32 if depth > 16 else 16, "num_warps": 8, "num_stages": 3}
    tiles = TILES[1:] if single else TILES
    if isinstance(pixels, int):
        busy = (tile for tile in tiles if cdiv(pixels, tile[0]) * cdiv(channels, tile[1]) >= PROGRAMS)
        bm, bn = next(busy, tiles[-1])
    else:
        bm, bn = tiles[0]
    bn = bn if channels > 32 else 32
    # Along the depth a cache line; two for small tiles, whose loads would not hide the latency of memory.
    small = bm <= 32
    bk = 32 if single else 128 if small else 64
    while bk > 16 and bk >= 2 * depth:
        bk //= 2
    warps = 8 if bm * bn >= (1024 if single else 8192) else 4
    return {"BM": bm, "BN": bn, "BK": bk, "num_warps": warps, "num_stages": 4 if small else 3}


@triton.jit
def tile_of(program, M, C, BM: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr):
    """Row and column of the tile of a program; see `GROUP`."""
    rows = tl.cdiv(M, BM)
    in_group = GROUP * tl.cdiv(C, BN)
    first = program // in_group * GROUP
    height = tl.minimum(rows - first, GROUP)
    within = program % in_group
    return first + within % height, within // height


@triton.jit
def pixel_offset(m, OHW, OW, stride_n, stride_h, stride_w, UNIT: tl.constexpr):
    """Where pixel m (int32) of (N, OH, OW) lies, int64; strides are those of `pixel_strides`."""
    if stride_n is None:
        return m.to(tl.int64) * stride_w * UNIT
    else:
        n = m // OHW
        h = m % OHW // OW
        w = m % OHW % OW
        return (n.to(tl.int64) * stride_n + h.to(tl.int64) * stride_h + w.to(tl.int64) * stride_w) * UNIT
