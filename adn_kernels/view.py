"""How a tensor lies in memory, as kernels see it: samples of pixels of channels, with a stride for each of the three.

Images (N, C, H, W) are NHWC, NCHW or a slice of channels of either, tokens (N, ..., D) have channels last; both are
read in place. Convolutions take images of any strides (`pixel_strides`). Sizes and strides may be symbolic.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
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
