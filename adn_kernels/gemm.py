"""What the convolutions that are matrix products (`conv1x1`, `conv3x3`) share: operands, tiles, configurations.

The product has one row per output pixel (M = N * OH * OW of them) and one column per output channel.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from .launch import cdiv

PROGRAMS = 132  # multiprocessors of an H100 or H200: fewer programs than that leave some of them idle
# Rows and columns of a tile, largest first; small ones occupy the GPU where there are few pixels (batch 1).
TILES = ((128, 64), (64, 64), (64, 32), (32, 32), (16, 32))
# Rows of tiles that are worked on together: their pixels stay in L2 until all columns have used them.
GROUP = 8

Strides = tuple[int | None, ...]  # of axes N (or C of a weight), channels, H, W


def out_shape(x: Tensor, weight: Tensor, stride: int, padding: int) -> tuple[int, int, int, int]:
    """The shape of a convolution's output; unchecked, see `check_conv`."""
    n, _, h, w = x.shape
    channels, _, kh, kw = weight.shape
    return n, channels, (h + 2 * padding - kh) // stride + 1, (w + 2 * padding - kw) // stride + 1


def check_conv(
    x: Tensor, weight: Tensor, stride: int, padding: int, groups: int | None = 1, sizes: Sequence[int] | None = None
) -> tuple[int, int, int, int]:
    """The shape of a convolution's output; raises ValueError if there is none. Guards no symbolic size.

    Args:
        x: (N, K, H, W). weight: (C, K / groups, kh, kw), of x's dtype.
        groups: None for a depthwise convolution: as many as channels, of x and of the output.
        sizes: what kh and kw, equal, may be; None for anything.
    """
    if x.ndim != 4:
        raise ValueError(f"x has shape {tuple(x.shape)}; pass (N, K, H, W)")
    depth = x.shape[1]
    count = depth if groups is None else groups
    if (weight.ndim != 4 or count < 1 or weight.shape[1] * count != depth or weight.shape[0] % count
            or (groups is None and weight.shape[0] != depth)
            or (sizes is not None and (weight.shape[2] not in sizes or weight.shape[3] != weight.shape[2]))):
        channels = depth if groups is None else "C" if groups == 1 else f"C divisible by {groups}"
        each = 1 if groups is None else depth if groups == 1 else f"{depth} / {groups}"
        window = "kh, kw" if sizes is None else " or ".join(f"{size}, {size}" for size in sizes)
        raise ValueError(f"weight has shape {tuple(weight.shape)}; pass ({channels}, {each}, {window}) "
                         f"for x of shape {tuple(x.shape)}")
    check_same_kind(x, weight)
    if stride < 1 or padding < 0:
        raise ValueError(f"stride={stride}, padding={padding}; pass a stride of 1 or more, a padding of 0 or more")
    shape = out_shape(x, weight, stride, padding)
    if any(isinstance(size, int) and size < 1 for size in shape[2:]):
        raise ValueError(f"x of shape {tuple(x.shape)} with padding {padding} is smaller than the "
                         f"{weight.shape[2]}x{weight.shape[3]} weight")
    return shape


def check_same_kind(x: Tensor, weight: Tensor) -> None:
    """Raises ValueError unless both have one floating dtype and one device."""
    if not x.is_floating_point():
        raise ValueError(f"x is {x.dtype}; pass float32, float16 or bfloat16")
    if weight.dtype != x.dtype:
        raise ValueError(f"weight is {weight.dtype}, x is {x.dtype}; pass both in one dtype")
    if weight.device != x.device:
        raise ValueError(f"weight is on {weight.device}, x on {x.device}; pass both on one device")


def check_pixels(pixels: int) -> None:
    """Raises ValueError for more output pixels than the kernels can number (elements may be more)."""
    if isinstance(pixels, int) and pixels > 2**31 - 2**10:
        raise ValueError(f"the output has {pixels} pixels; pass fewer than 2^31 at a time")


def pixel_strides(h: int, w: int, strides: Strides) -> Strides:
    """Strides (N, C, H, W) of an image of h x w pixels for `pixel_offset`.

    Those of N and H are None if all pixels are equally far apart, as in NHWC: then that of W is their distance.
    """
    sn, sc, sh, sw = strides
    # The stride of an axis of one element says nothing.
    step = sw if w != 1 else sh if h != 1 else sn
    if (w == 1 or h == 1 or sh == w * step) and sn == h * w * step:
        return None, sc, None, step
    return strides


def vector_unit(channels: int, depth: int, *operands: tuple[Tensor, Strides]) -> int:
    """8 if channels can be read and written in blocks of 8, else 1.

    Kernels get sizes and strides divided by it (`in_units`) and multiply again: so the compiler knows of the common
    divisor also where it is 8, as with 24 channels. Of arguments by themselves it only knows whether 16 divides them.

    Args:
        operands: x, weight, output, residual, each with its strides; that of its (input) channels is the second.
    """
    if channels % 8 or depth % 8:
        return 1
    for tensor, (first, channel, *rest) in operands:
        if channel != 1 or tensor.storage_offset() % 8:
            return 1
        for stride in (first, *rest):
            if not (stride is None or statically_known_true(stride % 8 == 0)):
                return 1
    return 8


def in_units(strides: Strides, unit: int) -> Strides:
    """All but that of channels divided."""
    if unit == 1:
        return strides
    return tuple([stride if stride is None or axis == 1 else stride // unit for axis, stride in enumerate(strides)])


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
