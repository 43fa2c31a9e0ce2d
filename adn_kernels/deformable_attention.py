"""Multi-scale deformable attention: a weighted sum of points sampled from feature maps (arXiv 2010.04159).

For every query and head, over the points p of all levels, with `sample` bilinear between the centres of pixels and zero
beyond the map (`grid_sample` with `align_corners=False`):

    out = sum_p weight_p sample(value of the level of p, width x_p - 1/2, height y_p - 1/2)

Forward reads of each point four pixels of one head, each a run of `dim` adjacent channels, and writes the sum: no
sampled value goes through memory. Backward reads the same pixels again; from their products with the gradient of the
output follow those of location and weight. What it adds to the gradient of the value it adds with float32 atomics, in
any order; or, if the result shall be the same in every run, it writes which pixel is to receive how much, this is
sorted by pixel, and a second kernel adds up what each pixel receives, in the order of the queries.

A program works on a few rows, a row being a head of a query, with all their points at once: neighbouring threads on the
channels of a pixel, then on rows. Bound by the gathers, which mostly hit the L2 cache; at batch 1 by the launch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op

from .launch import cdiv, launch, next_power_of_2, no_second_derivative, on_gpu, tuned
from .view import unit_of

MAX_LEVELS = 8  # of kernels; more take plain PyTorch


@triton.jit
def _level_of(sample, heights, widths, LEVELS: tl.constexpr, POINTS: tl.constexpr):
    """Height and width of the map that each sample is taken from, and its first token; int32 like `sample`."""
    level = sample // POINTS
    height = tl.zeros_like(sample)
    width = tl.zeros_like(sample)
    first = tl.zeros_like(sample)
    tokens = 0
    for i in tl.static_range(LEVELS):
        here = level == i
        height = tl.where(here, heights[i], height)
        width = tl.where(here, widths[i], width)
        first = tl.where(here, tokens, first)
        tokens += heights[i] * widths[i]
    return height, width, first


@triton.jit
def _axis(location, size):
    """Of normalised locations: the pixel before each, the way beyond its centre (0 to 1), and NaN if not finite, or 0.

    All that is beyond the map comes out just beyond it, so that any number can be cast.
    """
    at = location * size - 0.5
    inside = tl.where(at > -2.0, at, -2.0)  # so is NaN
    inside = tl.where(inside < size + 1.0, inside, size + 1.0)
    before = tl.floor(inside)
    return before.to(tl.int32), inside - before, at - at


@triton.jit
def _corner(corner: tl.constexpr, x, y, beyond_x, beyond_y, height, width, first, mask):
    """One of the four pixels around each location: its token, whether it exists, its share along x and along y."""
    if corner % 2 == 1:
        x = x + 1
        share_x = beyond_x
    else:
        share_x = 1 - beyond_x
    if corner // 2 == 1:
        y = y + 1
        share_y = beyond_y
    else:
        share_y = 1 - beyond_y
    exists = mask & (x >= 0) & (x < width) & (y >= 0) & (y < height)
    return first + y * width + x, exists, share_x, share_y


@triton.jit
def deformable_attention_kernel(
    value,  # (B, tokens, heads, D) by its strides
    locations,  # (rows, LEVELS, POINTS, 2), x and y; a row is a head of a query
    weights,  # (rows, LEVELS, POINTS)
    out,  # (rows, D)
    rows, rows_per_image, heads,
    value_batch, value_token, value_head,  # strides, divided by UNIT
    value_channel,
    height0, height1, height2, height3, height4, height5, height6, height7,  # of the levels, 0 of those not there
    width0, width1, width2, width3, width4, width5, width6, width7,
    LEVELS: tl.constexpr,
    POINTS: tl.constexpr,
    SAMPLES: tl.constexpr,  # taken at once
    ROWS: tl.constexpr,
    D: tl.constexpr,
    CHANNELS: tl.constexpr,  # D, rounded up to a power of two
    UNIT: tl.constexpr,  # see `view.py`
):
    """One program per ROWS rows."""
    heights = (height0, height1, height2, height3, height4, height5, height6, height7)
    widths = (width0, width1, width2, width3, width4, width5, width6, width7)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, CHANNELS)
    row_mask = row < rows
    channel_mask = channel < D
    base = (row // rows_per_image).to(tl.int64) * value_batch + (row % heads).to(tl.int64) * value_head
    at_channel = value + base[None, :, None] * UNIT + (channel * value_channel)[None, None, :]
    total = tl.zeros([ROWS, CHANNELS], tl.float32)
    for start in range(0, LEVELS * POINTS, SAMPLES):
        sample = start + tl.arange(0, SAMPLES)
        height, width, first = _level_of(sample[:, None], heights, widths, LEVELS, POINTS)
        mask = (sample < LEVELS * POINTS)[:, None] & row_mask[None, :]
        at = row.to(tl.int64)[None, :] * (LEVELS * POINTS) + sample[:, None]
        weight = tl.load(weights + at, mask=mask, other=0.0).to(tl.float32)
        x, beyond_x, poison_x = _axis(tl.load(locations + 2 * at, mask=mask, other=0.0).to(tl.float32), width)
        y, beyond_y, poison_y = _axis(tl.load(locations + 2 * at + 1, mask=mask, other=0.0).to(tl.float32), height)
        weight += poison_x + poison_y
        added = tl.zeros([SAMPLES, ROWS, CHANNELS], tl.float32)
        for corner in tl.static_range(4):
            token, exists, share_x, share_y = _corner(corner, x, y, beyond_x, beyond_y, height, width, first, mask)
            v = tl.load(at_channel + (token.to(tl.int64) * value_token)[:, :, None] * UNIT,
                        mask=exists[:, :, None] & channel_mask[None, None, :], other=0.0).to(tl.float32)
            added = tl.fma((weight * (share_x * share_y))[:, :, None], v, added)
        total += tl.sum(added, 0)
    tl.store(out + row.to(tl.int64)[:, None] * D + channel[None, :], total.to(out.dtype.element_ty),
             mask=row_mask[:, None] & channel_mask[None, :])


@triton.jit
def deformable_attention_backward_kernel(
    value, locations, weights,  # as in the forward kernel
    dout,  # (rows, D)
    dvalue,  # float32, zeros, like value with its own strides: is added to; or None
    pixels,  # int32 (rows, LEVELS * POINTS, 4): token * heads + head of each corner, or tokens * heads; or None
    shares,  # float32, like pixels: how much of `dout` that pixel receives
    dlocations, dweights,  # like locations and weights, each None if not wanted
    rows, rows_per_image, tokens, heads,
    value_batch, value_token, value_head,  # strides, divided by UNIT
    value_channel,
    dvalue_batch, dvalue_token, dvalue_head,
    dvalue_channel,
    height0, height1, height2, height3, height4, height5, height6, height7,
    width0, width1, width2, width3, width4, width5, width6, width7,
    LEVELS: tl.constexpr,
    POINTS: tl.constexpr,
    SAMPLES: tl.constexpr,
    ROWS: tl.constexpr,
    D: tl.constexpr,
    CHANNELS: tl.constexpr,
    UNIT: tl.constexpr,
):
    """One program per ROWS rows."""
    heights = (height0, height1, height2, height3, height4, height5, height6, height7)
    widths = (width0, width1, width2, width3, width4, width5, width6, width7)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, CHANNELS)
    row_mask = row < rows
    channel_mask = channel < D
    image = (row // rows_per_image).to(tl.int64)
    head = row % heads
    base = image * value_batch + head.to(tl.int64) * value_head
    at_channel = value + base[None, :, None] * UNIT + (channel * value_channel)[None, None, :]
    if dvalue is not None:
        base = image * dvalue_batch + head.to(tl.int64) * dvalue_head
        at_dchannel = dvalue + base[None, :, None] * UNIT + (channel * dvalue_channel)[None, None, :]
    g = tl.load(dout + row.to(tl.int64)[:, None] * D + channel[None, :],
                mask=row_mask[:, None] & channel_mask[None, :], other=0.0).to(tl.float32)
    for start in range(0, LEVELS * POINTS, SAMPLES):
        sample = start + tl.arange(0, SAMPLES)
        height, width, first = _level_of(sample[:, None], heights, widths, LEVELS, POINTS)
        mask = (sample < LEVELS * POINTS)[:, None] & row_mask[None, :]
        at = row.to(tl.int64)[None, :] * (LEVELS * POINTS) + sample[:, None]
        weight = tl.load(weights + at, mask=mask, other=0.0).to(tl.float32)
        x, beyond_x, poison_x = _axis(tl.load(locations + 2 * at, mask=mask, other=0.0).to(tl.float32), width)
        y, beyond_y, poison_y = _axis(tl.load(locations + 2 * at + 1, mask=mask, other=0.0).to(tl.float32), height)
        dweight = poison_x + poison_y
        dx = poison_x + poison_y
        dy = poison_x + poison_y
        for corner in tl.static_range(4):
            token, exists, share_x, share_y = _corner(corner, x, y, beyond_x, beyond_y, height, width, first, mask)
            share = weight * (share_x * share_y)
            of_token = exists[:, :, None] & channel_mask[None, None, :]
            if dvalue is not None:
                tl.atomic_add(at_dchannel + (token.to(tl.int64) * dvalue_token)[:, :, None] * UNIT,
                              share[:, :, None] * g[None, :, :], mask=of_token, sem="relaxed")
            if pixels is not None:
                tl.store(pixels + 4 * at + corner, tl.where(exists, token, tokens) * heads
                         + tl.where(exists, head[None, :], 0), mask=mask)
                tl.store(shares + 4 * at + corner, share, mask=mask)
            if dlocations is not None or dweights is not None:
                at_token = at_channel + (token.to(tl.int64) * value_token)[:, :, None] * UNIT
                v = tl.load(at_token, mask=of_token, other=0.0)
                product = tl.sum(v.to(tl.float32) * g[None, :, :], 2)
                dweight += share_x * share_y * product
                dx += (share_y if corner % 2 == 1 else -share_y) * product
                dy += (share_x if corner // 2 == 1 else -share_x) * product
        if dweights is not None:
            tl.store(dweights + at, dweight.to(dweights.dtype.element_ty), mask=mask)
        if dlocations is not None:
            tl.store(dlocations + 2 * at, (weight * width * dx).to(dlocations.dtype.element_ty), mask=mask)
            tl.store(dlocations + 2 * at + 1, (weight * height * dy).to(dlocations.dtype.element_ty), mask=mask)


@triton.jit
def deformable_attention_collect_kernel(
    dout,  # (rows of the backward kernel, D)
    shares,  # float32 (B, entries): how much of `dout` each corner of each sample receives
    order,  # int64 (B, entries): the entries of an image, sorted by pixel
    ends,  # int32 (B, pixels + 1): how many of them come before each pixel
    dvalue,  # (B, pixels // heads, heads, D) by its strides
    rows, pixels, heads,  # rows: B * pixels
    entries, entries_per_row,
    dvalue_batch, dvalue_token, dvalue_head,  # strides, divided by UNIT
    dvalue_channel,
    ROWS: tl.constexpr,
    D: tl.constexpr,
    CHANNELS: tl.constexpr,
    UNIT: tl.constexpr,
):
    """One program per ROWS pixels, a pixel being a head of a token: adds what each receives, always in the same
    order."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, CHANNELS)
    row_mask = row < rows
    channel_mask = channel < D
    image = row // pixels
    pixel = row % pixels
    entry = tl.load(ends + image * (pixels + 1) + pixel, mask=row_mask, other=0)
    end = tl.load(ends + image * (pixels + 1) + pixel + 1, mask=row_mask, other=0)
    total = tl.zeros([ROWS, CHANNELS], tl.float32)
    left = tl.max(end - entry, 0)
    while left > 0:
        mask = entry < end
        which = tl.load(order + image * entries + entry, mask=mask, other=0)
        which += image * entries
        share = tl.load(shares + which, mask=mask, other=0.0)
        g = tl.load(dout + (which // entries_per_row)[:, None] * D + channel[None, :],
                    mask=mask[:, None] & channel_mask[None, :], other=0.0).to(tl.float32)
        total += share[:, None] * g
        entry += 1
        left -= 1
    at = image * dvalue_batch + (pixel // heads) * dvalue_token + (pixel % heads) * dvalue_head
    tl.store(dvalue + at[:, None] * UNIT + (channel * dvalue_channel)[None, :], total.to(dvalue.dtype.element_ty),
             mask=row_mask[:, None] & channel_mask[None, :])


def _sizes(shapes: Sequence[int]) -> list[int]:
    """Heights, then widths, each filled up to `MAX_LEVELS`."""
    filled = [0] * (MAX_LEVELS - len(shapes) // 2)
    return [*shapes[::2], *filled, *shapes[1::2], *filled]


def _in_units(*values: Tensor) -> tuple[int, list[int]]:
    """The unit of `view.py` of tensors (B, tokens, heads, D) in a row; and their strides, divided by it."""
    strides = [stride for value in values for stride in value.stride()]
    unit = unit_of(values[0].shape[-1], *(stride for axis, stride in enumerate(strides) if axis % 4 != 3))
    if any(value.stride(-1) != 1 for value in values):
        unit = 1
    return unit, [stride if axis % 4 == 3 else stride // unit for axis, stride in enumerate(strides)]


def _config(kernel: str, value: Tensor, unit: int, **key: int) -> dict[str, int]:
    """`D`, `CHANNELS`, `UNIT` and what is tuned; with levels and points in `key` also how many samples are taken at
    once."""
    dim = value.shape[-1]
    channels = next_power_of_2(dim)
    default = {"ROWS": max(1, min(8, 128 // channels)), "num_warps": 4}
    if key:
        # Backward holds the addresses it adds to, of narrow loads every one is held: that takes registers.
        half = kernel == "deformable_attention_backward" or value.element_size() == 4
        most = 512 if unit < 8 else 1024 if half else 2048
        default["SAMPLES"] = max(1, min(next_power_of_2(key["levels"] * key["points"]),
                                        most // (default["ROWS"] * channels)))
    config = tuned(kernel, value.device, default, dim=dim, dtype=str(value.dtype), **key)
    return {"D": dim, "CHANNELS": channels, "UNIT": unit, **config}


def launch_deformable_attention(value: Tensor, shapes: Sequence[int], locations: Tensor, weights: Tensor) -> Tensor:
    """The op on the GPU, arguments and result as there."""
    batch, _, heads, dim = value.shape
    queries, _, levels, points = weights.shape[1:]
    out = value.new_empty((batch, queries, heads * dim))
    if out.numel() == 0:
        return out
    unit, strides = _in_units(value)
    config = _config("deformable_attention", value, unit, levels=levels, points=points)
    rows = batch * queries * heads
    launch(
        deformable_attention_kernel, (cdiv(rows, config["ROWS"]),),
        value, locations.contiguous(), weights.contiguous(), out, rows, queries * heads, heads, *strides,
        *_sizes(shapes), LEVELS=levels, POINTS=points, **config,
    )
    return out


def launch_deformable_attention_backward(
    dout: Tensor, value: Tensor, shapes: Sequence[int], locations: Tensor, weights: Tensor, deterministic: bool,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """The backward op on the GPU, arguments and results as there."""
    batch, tokens, heads, _ = value.shape
    queries, _, levels, points = weights.shape[1:]
    dlocations, dweights = (x.new_empty(x.shape if need else 0) for x, need in zip((locations, weights), needs[1:]))
    if dout.numel() == 0:
        return torch.zeros_like(value) if needs[0] else value.new_empty(0), dlocations, dweights
    dout, locations, weights = dout.contiguous(), locations.contiguous(), weights.contiguous()
    rows, entries_per_row = batch * queries * heads, levels * points * 4
    dvalue, pixels, shares = value.new_empty(0), None, None
    if needs[0] and deterministic:
        pixels = value.new_empty((batch, queries * heads * entries_per_row), dtype=torch.int32)
        shares = torch.empty_like(pixels, dtype=torch.float32)
    elif needs[0]:
        dvalue = torch.empty_like(value, dtype=torch.float32).zero_()
    added = dvalue if needs[0] and not deterministic else None
    unit, strides = _in_units(*((value,) if added is None else (value, added)))
    config = _config("deformable_attention_backward", value, unit, levels=levels, points=points)
    launch(
        deformable_attention_backward_kernel, (cdiv(rows, config["ROWS"]),),
        value, locations, weights, dout, added, pixels, shares, dlocations if needs[1] else None,
        dweights if needs[2] else None, rows, queries * heads, tokens, heads, *strides,
        *((0,) * 4 if added is None else ()), *_sizes(shapes), LEVELS=levels, POINTS=points, **config,
    )
    if pixels is not None:
        dvalue = torch.empty_like(value)
        count = tokens * heads
        # Stable, so that equal pixels keep the order of their entries.
        found, order = torch.sort(pixels, dim=1, stable=True)
        edges = torch.arange(count + 1, dtype=torch.int32, device=value.device).repeat(batch, 1)
        ends = torch.searchsorted(found, edges, out_int32=True)
        unit, strides = _in_units(dvalue)
        config = _config("deformable_attention_collect", value, unit)
        launch(
            deformable_attention_collect_kernel, (cdiv(batch * count, config["ROWS"]),),
            dout, shares, order, ends, dvalue, batch * count, count, heads, queries * heads * entries_per_row,
            entries_per_row, *strides, **config,
        )
    return dvalue.to(value.dtype), dlocations, dweights


def _maps(value: Tensor, shapes: Sequence[int], locations: Tensor, wide: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    """What `grid_sample` takes, of each level: maps (B * heads, dim, H, W) and points (B * heads, Q, points, 2)."""
    batch, _, heads, dim = value.shape
    sizes = list(zip(shapes[::2], shapes[1::2]))
    values = value.to(wide).split([height * width for height, width in sizes], 1)
    grids = (2 * locations.to(wide) - 1).permute(3, 0, 2, 1, 4, 5).flatten(1, 2)
    return [(v.permute(0, 2, 3, 1).reshape(batch * heads, dim, *size), grid)
            for v, size, grid in zip(values, sizes, grids)]


def _sample(maps: Tensor, grid: Tensor) -> Tensor:
    return F.grid_sample(maps, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def _wide(*tensors: Tensor) -> torch.dtype:
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def deformable_attention_reference(
    value: Tensor, shapes: Sequence[int], locations: Tensor, weights: Tensor
) -> Tensor:
    """The op in plain PyTorch, in float32, or float64 if an input is; autograd can follow it."""
    batch, _, heads, dim = value.shape
    queries = weights.shape[1]
    wide = _wide(value, locations, weights)
    sampled = torch.cat([_sample(*level) for level in _maps(value, shapes, locations, wide)], -1)
    weights = weights.to(wide).transpose(1, 2).reshape(batch * heads, 1, queries, sampled.shape[-1])
    total = (sampled * weights).sum(-1).view(batch, heads * dim, queries)
    return total.transpose(1, 2).to(value.dtype).contiguous()


def deformable_attention_backward_reference(
    dout: Tensor, value: Tensor, shapes: Sequence[int], locations: Tensor, weights: Tensor, deterministic: bool,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """The backward op in plain PyTorch."""
    batch, _, heads, dim = value.shape
    queries, _, _, points = weights.shape[1:]
    wide = _wide(value, locations, weights)
    g = dout.to(wide).transpose(1, 2).reshape(batch * heads, dim, queries, 1)
    dvalues, dgrids, dweights = [], [], []
    for (maps, grid), weight in zip(_maps(value, shapes, locations, wide), weights.to(wide).unbind(3)):
        weight = weight.transpose(1, 2).reshape(batch * heads, 1, queries, points)
        dmaps, dgrid = torch.ops.aten.grid_sampler_2d_backward(
            g * weight, maps, grid, 0, 0, False, [needs[0], needs[1]])
        if needs[0]:
            dvalues.append(dmaps.flatten(2).unflatten(0, (batch, heads)).permute(0, 3, 1, 2))
        if needs[1]:
            dgrids.append(dgrid.unflatten(0, (batch, heads)).transpose(1, 2))
        if needs[2]:
            dweights.append((_sample(maps, grid) * g).sum(1).unflatten(0, (batch, heads)).transpose(1, 2))
    return (
        torch.empty_like(value).copy_(torch.cat(dvalues, 1)) if needs[0] else value.new_empty(0),
        # The points of `grid_sample` lie between -1 and 1.
        (2 * torch.stack(dgrids, 3)).to(locations.dtype).contiguous() if needs[1] else locations.new_empty(0),
        torch.stack(dweights, 3).to(weights.dtype).contiguous() if needs[2] else weights.new_empty(0),
    )


def _has_kernel(shapes: Sequence[int], *tensors: Tensor) -> bool:
    return on_gpu(*tensors) and len(shapes) <= 2 * MAX_LEVELS


@triton_op("adn::deformable_attention", mutates_args=())
def deformable_attention_op(
    value: Tensor, shapes: Sequence[int], locations: Tensor, weights: Tensor, deterministic: bool
) -> Tensor:
    """(B, Q, heads * dim); `shapes` is height and width of each level in turn, `deterministic` is of backward."""
    kernel = _has_kernel(shapes, value, locations, weights)
    forward = launch_deformable_attention if kernel else deformable_attention_reference
    return forward(value, shapes, locations, weights)


@triton_op("adn::deformable_attention_backward", mutates_args=())
def deformable_attention_backward_op(
    dout: Tensor, value: Tensor, shapes: Sequence[int], locations: Tensor, weights: Tensor, deterministic: bool,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of value, locations and weights; `needs` says which are wanted, others come back empty."""
    kernel = _has_kernel(shapes, dout, value, locations, weights)
    backward = launch_deformable_attention_backward if kernel else deformable_attention_backward_reference
    return backward(dout, value, shapes, locations, weights, deterministic, needs)


no_second_derivative(deformable_attention_backward_op)


def _setup_context(ctx, inputs, output) -> None:
    value, ctx.shapes, locations, weights, ctx.deterministic = inputs
    ctx.save_for_backward(value, locations, weights)
    ctx.set_materialize_grads(False)


def _backward(ctx, dout):
    if dout is None:
        return (None,) * 5
    value, locations, weights = ctx.saved_tensors
    needs = [ctx.needs_input_grad[i] for i in (0, 2, 3)]
    grads = deformable_attention_backward_op(dout, value, ctx.shapes, locations, weights, ctx.deterministic, needs)
    dvalue, dlocations, dweights = (grad if need else None for grad, need in zip(grads, needs))
    return dvalue, None, dlocations, dweights, None


deformable_attention_op.register_autograd(_backward, setup_context=_setup_context)


def _check(value: Tensor, shapes: Sequence[tuple[int, int]], locations: Tensor, weights: Tensor) -> None:
    if value.ndim != 4 or 0 in value.shape[2:]:
        raise ValueError(f"value has shape {tuple(value.shape)}; pass (B, tokens, heads, dim)")
    if not shapes or any(len(shape) != 2 or min(shape) < 1 for shape in shapes):
        raise ValueError(f"shapes={shapes}; pass (height, width) of every level, each at least 1")
    tokens = sum(height * width for height, width in shapes)
    if tokens != value.shape[1]:
        raise ValueError(f"value has {value.shape[1]} tokens, maps of {', '.join(f'{h}x{w}' for h, w in shapes)} have "
                         f"{tokens}; pass the shapes that the tokens come from")
    if tokens * value.shape[2] >= 2**31:
        raise ValueError(f"value has {tokens} tokens of {value.shape[2]} heads; less than 2^31 pixels are supported")
    sizes = (value.shape[0], weights.shape[1] if weights.ndim == 5 else None, value.shape[2], len(shapes),
             weights.shape[4] if weights.ndim == 5 else None)
    if weights.ndim != 5 or tuple(weights.shape) != sizes or weights.shape[4] == 0:
        raise ValueError(f"weights has shape {tuple(weights.shape)}; pass (B, Q, heads, levels, points), here "
                         f"({sizes[0]}, Q, {sizes[2]}, {sizes[3]}, points)")
    if tuple(locations.shape) != (*sizes, 2):
        raise ValueError(f"locations has shape {tuple(locations.shape)}, weights {tuple(weights.shape)}; pass one x "
                         "and y for every weight")
    for name, x in (("value", value), ("locations", locations), ("weights", weights)):
        if not x.is_floating_point():
            raise ValueError(f"{name} is {x.dtype}; pass a floating type")
        if x.device != value.device:
            raise ValueError(f"{name} is on {x.device}, value on {value.device}; pass all on one device")


def deformable_attention(
    value: Tensor, shapes: Sequence[tuple[int, int]], locations: Tensor, weights: Tensor, *,
    deterministic: bool | None = None,
) -> Tensor:
    """The sum over levels and points of `weight * value at location`, of each query and head (Deformable DETR).

    Computed in float32 whatever the types, which may be mixed: keep locations in float32 where values are of half
    precision (bfloat16 tells no more than three places in a pixel of a map 80 wide). float64, CPU tensors and more than
    8 levels take the plain-PyTorch reference, `grid_sample` level by level.

    Points beyond the map count as zero, however far. A location that is NaN or infinite makes that head of that query
    NaN; no pixel receives a gradient of it.

    Bytes: forward reads locations and weights, writes the output, and gathers four runs of `dim` channels for each
    point; backward gathers the same and adds as many values, into float32 which is filled with zeros before and, for
    half precision, cast after. Deterministic: eight bytes for each corner of each point written, sorted and read, and
    the gradient of the output read once for each corner. Bound by gathers in the L2 cache, at batch 1 by the launch.

    Args:
        value: (B, tokens, heads, dim), any strides, of which adjacent channels are fast; tokens are those of all
            levels in turn, each row by row.
        shapes: (height, width) of each level, plain ints.
        locations: (B, Q, heads, levels, points, 2), x and y as fractions of width and height, 0 and 1 the outer edges
            of the map. Copied if not contiguous.
        weights: (B, Q, heads, levels, points), those of a query and head usually with sum 1. Copied if not contiguous.
        deterministic: whether the gradient of the value is to be the same, bit by bit, in every run, at the cost of a
            sort; None: as `torch.are_deterministic_algorithms_enabled()` says at this call. Everything else always is,
            and so is all of it on a CPU. torch's `grid_sample` on a GPU (float64, more than 8 levels) never is.

    Returns:
        (B, Q, heads * dim), of the type of value.

    Raises:
        ValueError: if a shape, dtype or device does not fit.
    """
    shapes = [(int(h), int(w)) for h, w in shapes]  # torch.jit.trace records sizes as tensors
    _check(value, shapes, locations, weights)
    if deterministic is None:
        deterministic = torch.are_deterministic_algorithms_enabled()
    return deformable_attention_op(value, [n for shape in shapes for n in shape], locations, weights, deterministic)
