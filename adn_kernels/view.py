"""How a tensor lies in memory, as kernels see it: samples of pixels of channels, with a stride for each of the three.

Images (N, C, H, W) are NHWC, NCHW or a slice of channels of either, tokens (N, ..., D) have channels last; both are
read in place. Convolutions take images of any strides (`pixel_strides`). Sizes and strides may be symbolic.

Accesses are 16 bytes wide only where the compiler knows that 8 elements of half precision divide sizes and strides. Of
an argument by itself it knows no more than whether 16 does. So kernels get them divided by a unit (`unit_of`), a
constexpr, and multiply again: 24 or 40 channels are then read as fast as 32.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from .private import suggest_memory_format

Strides = tuple[int | None, ...]  # of axes N (or C of a weight), channels, H, W


def memory_format(x: Tensor) -> torch.memory_format:
    """The layout of a 4-D tensor, as torch reads it off the strides: also of slices, which are not contiguous."""
    first, last = x.is_contiguous(), x.is_contiguous(memory_format=torch.channels_last)
    if first != last:  # the usual case, told in a tenth of the time
        return torch.channels_last if last else torch.contiguous_format
    return suggest_memory_format(x)


class View(NamedTuple):
    """`pixels` in a sample, and the strides; `format` that of an image."""

    pixels: int
    sample: int
    pixel: int
    channel: int
    format: torch.memory_format | None = None

    @property
    def channels_last(self) -> bool:
        return self.format == torch.channels_last


def view_of_image(x: Tensor, name: str = "x") -> View:
    """Raises ValueError, saying what to do, for a tensor that is neither NHWC nor NCHW (a slice of channels is)."""
    if x.ndim != 4:
        raise ValueError(f"{name} has shape {tuple(x.shape)}; pass (N, C, H, W), or a view of it with H = W = 1")
    pixels = x.shape[2] * x.shape[3]
    if x.numel() == 0:  # its strides say nothing
        return View(pixels, 0, 0, 1, memory_format(x))
    last, first = stride_in(x, channels_last=True), stride_in(x, channels_last=False)
    # Which layout, where both fit, is torch's to say.
    if last is not None and (first is None or memory_format(x) == torch.channels_last):
        return View(pixels, pixels * last, last, 1, torch.channels_last)
    if first is not None:
        return View(pixels, first, first if pixels == 1 else 1, pixels, torch.contiguous_format)
    raise ValueError(f"{name} of shape {tuple(x.shape)} has strides {x.stride()}, which are neither those of NCHW nor "
                     f"of NHWC: pass {name}.contiguous() or .contiguous(memory_format=torch.channels_last)")


def stride_in(x: Tensor, channels_last: bool) -> int | None:
    """Of an image that lies in this layout the stride of pixels (NHWC) or of samples (NCHW), between which what is
    read is adjacent; else None."""
    n, c, h, w = x.shape
    sn, sc, sh, sw = x.stride()
    # The stride of an axis of one element says nothing.
    if not channels_last:
        fits = (w == 1 or sw == 1) and (h == 1 or sh == w) and (c == 1 or sc == h * w)
        return (sn if n != 1 else c * h * w) if fits else None
    row = sw if w != 1 else sh if h != 1 else sn if n != 1 else c
    fits = ((c == 1 or sc == 1) and (h == 1 or w == 1 or sh == w * sw)
            and (n == 1 or (w == 1 and h == 1) or sn == h * w * row))
    return row if fits else None


def view_of_tokens(x: Tensor, name: str = "x") -> View:
    """Raises ValueError, saying what to do, for strides that are not those of samples, pixels and channels."""
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
    return View(count, sample, row, channel)


def joined(samples: int, parts: int, *views: View | None) -> tuple[int, int, list[tuple[int | None, ...]]]:
    """Samples joined to units of pixels, as few as there are parts if memory allows it.

    Returns:
        Units; pixels in one; for each view the strides of unit, pixel and channel (None for None).
    """
    together = all(v is None or v.sample == v.pixels * v.pixel for v in views)
    units = parts if together else samples
    each = samples // units
    return units, each * views[0].pixels, [
        (None,) * 3 if v is None else (each * v.sample, v.pixel, v.channel) for v in views
    ]


def arguments(
    channels: int, pixels: int, views: list[Strides], tile: int
) -> tuple[int, int, list[int | None], dict[str, Any]]:
    """What kernels that use `tile_at` get.

    Args:
        channels, pixels: of a sample.
        views: of each tensor the strides of sample, pixel and channel.
        tile: pixels in one.

    Returns:
        Channels, pixels and all strides in a row, divided by the unit where `tile_at` multiplies; its constexprs UNIT,
        LAST and FAR.
    """
    views_given = [view for view in views if view[0] is not None]
    near = [isinstance(stride, int) and stride < 2**31 for view in views_given for stride in view[1:]]
    far = not (all(near) and all(tile * pixel + channels * channel < 2**31 for _, pixel, channel in views_given))
    last = all(channel == 1 for *_, channel in views_given)
    whole = 2 if last else 1  # the stride that is not divided
    unit = 1
    if all(near) and (last or all(pixel == 1 for _, pixel, _ in views_given)):
        unit = unit_of(channels if last else pixels, *(
            stride for view in views_given for axis, stride in enumerate(view) if axis != whole))
    flat = [stride if stride is None or axis == whole else stride // unit
            for view in views for axis, stride in enumerate(view)]
    if last:
        channels //= unit
    else:
        pixels //= unit
    return channels, pixels, flat, {"UNIT": unit, "LAST": last, "FAR": far}


@triton.jit
def in_elements(C, P, UNIT: tl.constexpr, LAST: tl.constexpr):
    """Channels and pixels of `arguments`, multiplied again."""
    if LAST:
        C *= UNIT
    else:
        P *= UNIT
    return C, P


@triton.jit
def tile_at(
    x, sample, pixel,  # int32 or int64: where the tile begins
    p, c,  # int32 [PIXELS] from there on, [CHANNELS]
    sample_stride, pixel_stride, channel_stride,  # of `arguments`
    UNIT: tl.constexpr,
    LAST: tl.constexpr,  # channels are adjacent, not pixels
    FAR: tl.constexpr,  # offsets within a tile can pass 2^31
):
    """Pointers [PIXELS, CHANNELS] to a tile."""
    if LAST:
        pixel_stride *= UNIT
    else:
        channel_stride *= UNIT
    x += sample.to(tl.int64) * sample_stride * UNIT + pixel.to(tl.int64) * pixel_stride
    # Within a tile int32 mostly does, and takes half of the registers.
    if FAR:
        p = p.to(tl.int64)
        c = c.to(tl.int64)
    return x + ((p * pixel_stride)[:, None] + (c * channel_stride)[None, :])


def pixel_strides(h: int, w: int, strides: Strides) -> Strides:
    """Strides (N, C, H, W) of an image of h x w pixels, of a convolution.

    Those of N and H are None if all pixels are equally far apart, as in NHWC: then that of W is their distance.
    """
    sn, sc, sh, sw = strides
    # The stride of an axis of one element says nothing.
    step = sw if w != 1 else sh if h != 1 else sn
    if (w == 1 or h == 1 or sh == w * step) and sn == h * w * step:
        return None, sc, None, step
    return strides


def unit_of(*sizes: int | None) -> int:
    """The largest of 8, 4, 2 and 1 that is known to divide all sizes and strides (None: there is none)."""
    known = [size for size in sizes if size is not None]
    if all(isinstance(size, int) for size in known):
        return math.gcd(8, *known)
    return next((unit for unit in (8, 4, 2) if all(statically_known_true(size % unit == 0) for size in known)), 1)


def vector_unit(channels: int, depth: int, *operands: tuple[Tensor, Strides]) -> int:
    """8 if channels can be read and written in blocks of 8, else 1; sizes and strides are then passed `in_units`.

    Args:
        operands: x, weight, output, residual, each with its strides; that of its (input) channels is the second.
    """
    sizes = [channels, depth]
    for tensor, (first, channel, *rest) in operands:
        if channel != 1:
            return 1
        sizes += [tensor.storage_offset(), first, *rest]
    return 8 if unit_of(*sizes) == 8 else 1


def in_units(strides: Strides, unit: int) -> Strides:
    """All but that of channels divided."""
    if unit == 1:
        return strides
    return tuple([stride if stride is None or axis == 1 else stride // unit for axis, stride in enumerate(strides)])
