"""Distillation loss `T^2 KL(softmax(t / T) || softmax(s / T))` over rows of logits, or over pooled feature maps.

With the log-softmaxes p and q of a row, its classes j, and B rows:

    KL = sum_j exp(p_j) (p_j - q_j)
    d loss / d s_j = T / B (exp(q_j) - exp(p_j)),    d loss / d t_j = T / B exp(p_j) (p_j - q_j - KL)

Forward reads each logit once and keeps five numbers per row; backward reads each once more and writes the gradients. No
softmax is ever written to memory. A gather of the top classes happens in the same reads. The pooled form reads each
feature map once, its backward only writes.

Logits of a batch are few: bound by the launches. Forward has two (rows, mean over rows), backward one; of top classes
`torch.topk` comes before, and backward fills each gradient with zeros first. Feature maps are bound by HBM bandwidth:
two launches pool, then two as for logits; backward has one for each gradient.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op

from .launch import SPLITS, cdiv, launch, next_power_of_2, no_second_derivative, on_gpu, tuned

MAX_CLASSES = 16384  # a row of up to this many is held in registers, a longer one is read in blocks
MAX_PARTS = 8  # partial sums of a pooled feature, added up wherever it is read


@triton.jit
def _columns(indices, row, j, mask, indices_row):
    """Which class stands in column j: [1, BC] or, of a gather, [BR, BC]; int64."""
    if indices is not None:
        column = tl.load(indices + row.to(tl.int64)[:, None] * indices_row + j[None, :], mask=mask, other=0)
    else:
        column = j.to(tl.int64)[None, :]
    return column


@triton.jit
def _load(x, parts, row, column, mask, x_row, x_class, x_part):
    """x[row, column], or the sum of its parts; [BR, BC] float32, -inf where masked out."""
    at = row.to(tl.int64)[:, None] * x_row + column * x_class
    if parts is not None:
        v = tl.zeros(mask.shape, tl.float32)
        for i in range(parts):
            v += tl.load(x + at + i * x_part, mask=mask, other=0.0)
        v = tl.where(mask, v, float("-inf"))
    else:
        v = tl.load(x + at, mask=mask, other=float("-inf")).to(tl.float32)
    return v


@triton.jit
def _store_stats(stats, row, B, t_max, t_log_sum, s_max, s_log_sum, kl):
    mask = row < B
    tl.store(stats + row, t_max, mask=mask)
    tl.store(stats + B + row, t_log_sum, mask=mask)
    tl.store(stats + 2 * B + row, s_max, mask=mask)
    tl.store(stats + 3 * B + row, s_log_sum, mask=mask)
    tl.store(stats + 4 * B + row, kl, mask=mask)


@triton.jit
def _gradients(t, s, stats, row, B, temperature, mask):
    """B times the derivatives of the loss by student and teacher, [BR, BC] each."""
    rows = row < B
    t_max = tl.load(stats + row, mask=rows, other=0.0)[:, None]
    t_log_sum = tl.load(stats + B + row, mask=rows, other=0.0)[:, None]
    s_max = tl.load(stats + 2 * B + row, mask=rows, other=0.0)[:, None]
    s_log_sum = tl.load(stats + 3 * B + row, mask=rows, other=0.0)[:, None]
    kl = tl.load(stats + 4 * B + row, mask=rows, other=0.0)[:, None]
    p = (t - t_max) / temperature - t_log_sum
    q = (s - s_max) / temperature - s_log_sum
    of_student = (tl.exp(q) - tl.exp(p)) * temperature
    of_teacher = tl.exp(p) * ((p - q) * temperature - kl / temperature)
    return of_student, of_teacher


@triton.jit
def distillation_kl_kernel(
    teacher, student,  # (B, classes of the model) by their strides; or float32 (B, parts, channels)
    indices,  # int64 (B, C), the classes compared, or None: all
    stats,  # float32 (5, B): maximum and log of the sum of teacher and of student, T^2 KL
    B, C,  # rows, classes compared
    teacher_parts, student_parts,  # how many partial sums an element is given by, or None
    teacher_row, teacher_class, teacher_part,  # strides
    student_row, student_class, student_part,
    indices_row,
    temperature,
    BR: tl.constexpr,
    BC: tl.constexpr,  # at least C
):
    """One program per BR rows, which it holds in registers."""
    row = tl.program_id(0) * BR + tl.arange(0, BR)
    j = tl.arange(0, BC)
    mask = (row < B)[:, None] & (j < C)[None, :]
    column = _columns(indices, row, j, mask, indices_row)
    t = _load(teacher, teacher_parts, row, column, mask, teacher_row, teacher_class, teacher_part)
    s = _load(student, student_parts, row, column, mask, student_row, student_class, student_part)
    t_max = tl.max(t, 1)
    s_max = tl.max(s, 1)
    t = (t - t_max[:, None]) / temperature
    s = (s - s_max[:, None]) / temperature
    t_log_sum = tl.log(tl.sum(tl.exp(t), 1))
    s_log_sum = tl.log(tl.sum(tl.exp(s), 1))
    p = t - t_log_sum[:, None]
    q = s - s_log_sum[:, None]
    # Masked: infinity minus infinity beyond the edge. Within, that is NaN as it is in torch.
    kl = tl.sum(tl.where(mask, tl.exp(p) * (p - q), 0.0), 1)
    _store_stats(stats, row, B, t_max, t_log_sum, s_max, s_log_sum, kl * temperature * temperature)


@triton.jit
def _centre(maximum):
    """What is subtracted before exp: the maximum, but nothing while all seen is -inf."""
    return tl.where(maximum == float("-inf"), 0.0, maximum)


@triton.jit
def distillation_kl_loop_kernel(
    teacher, student, indices, stats, B, C, teacher_parts, student_parts,  # as above
    teacher_row, teacher_class, teacher_part,
    student_row, student_class, student_part,
    indices_row,
    temperature,
    BC: tl.constexpr,
):
    """One program per row, which it reads once in blocks of BC.

    Sums are relative to the maxima so far and are brought along when these grow: sum exp(t), sum exp(s), and
    sum exp(t) (t - s), from which KL = sum exp(t) (t - s) / sum exp(t) - log sum exp(t) + log sum exp(s).
    """
    row = tl.program_id(0) + tl.arange(0, 1)
    t_max = tl.full([1], float("-inf"), tl.float32)
    s_max = tl.full([1], float("-inf"), tl.float32)
    t_sum = tl.zeros([1], tl.float32)
    s_sum = tl.zeros([1], tl.float32)
    weighted = tl.zeros([1], tl.float32)
    for start in range(0, C, BC):
        j = start + tl.arange(0, BC)
        mask = (row < B)[:, None] & (j < C)[None, :]
        column = _columns(indices, row, j, mask, indices_row)
        t = _load(teacher, teacher_parts, row, column, mask, teacher_row, teacher_class, teacher_part)
        s = _load(student, student_parts, row, column, mask, student_row, student_class, student_part)
        t_new = tl.maximum(t_max, tl.max(t, 1))
        s_new = tl.maximum(s_max, tl.max(s, 1))
        # By how much the centres fall; 0 while there is nothing to bring along.
        t_fall = tl.where(t_max == float("-inf"), 0.0, (t_max - t_new) / temperature)
        s_fall = tl.where(s_max == float("-inf"), 0.0, (s_max - s_new) / temperature)
        t_max = t_new
        s_max = s_new
        t = (t - _centre(t_max)[:, None]) / temperature
        s = (s - _centre(s_max)[:, None]) / temperature
        e = tl.exp(t)
        weighted = tl.exp(t_fall) * (weighted + t_sum * (t_fall - s_fall)) + tl.sum(tl.where(mask, e * (t - s), 0.0), 1)
        t_sum = tl.exp(t_fall) * t_sum + tl.sum(e, 1)
        s_sum = tl.exp(s_fall) * s_sum + tl.sum(tl.exp(s), 1)
    t_log_sum = tl.log(t_sum)
    s_log_sum = tl.log(s_sum)
    kl = weighted / t_sum - t_log_sum + s_log_sum
    _store_stats(stats, row, B, t_max, t_log_sum, s_max, s_log_sum, kl * temperature * temperature)


@triton.jit
def distillation_kl_backward_kernel(
    teacher, student, indices, stats,  # as in the forward kernel
    dloss,  # the gradient of the loss, one value
    dteacher, dstudent,  # like teacher and student, each None if not wanted; of a gather only its classes are written
    B, C,
    teacher_row, teacher_class,  # strides
    student_row, student_class,
    dteacher_row, dteacher_class,
    dstudent_row, dstudent_class,
    indices_row,
    temperature,
    BR: tl.constexpr,
    BC: tl.constexpr,
):
    """One program per BR rows and BC classes."""
    blocks = tl.cdiv(C, BC)
    row = tl.program_id(0) // blocks * BR + tl.arange(0, BR)
    j = tl.program_id(0) % blocks * BC + tl.arange(0, BC)
    mask = (row < B)[:, None] & (j < C)[None, :]
    column = _columns(indices, row, j, mask, indices_row)
    t = _load(teacher, None, row, column, mask, teacher_row, teacher_class, 0)
    s = _load(student, None, row, column, mask, student_row, student_class, 0)
    of_student, of_teacher = _gradients(t, s, stats, row, B, temperature, mask)
    scale = tl.load(dloss).to(tl.float32) / B
    row = row.to(tl.int64)[:, None]
    if dstudent is not None:
        at = dstudent + row * dstudent_row + column * dstudent_class
        tl.store(at, (of_student * scale).to(dstudent.dtype.element_ty), mask=mask)
    if dteacher is not None:
        at = dteacher + row * dteacher_row + column * dteacher_class
        tl.store(at, (of_teacher * scale).to(dteacher.dtype.element_ty), mask=mask)


@triton.jit
def _place(C, splits, tiles, BP: tl.constexpr, BC: tl.constexpr):
    """What a program works on: sample (int64), split, first pixel (int64), first channel; channels vary fastest."""
    channel_blocks = tl.cdiv(C, BC)
    block = tl.program_id(0) // channel_blocks
    split = block % splits
    channel = tl.program_id(0) % channel_blocks * BC
    return (block // splits).to(tl.int64), split, split.to(tl.int64) * (tiles * BP), channel


@triton.jit
def feature_pool_kernel(
    x,  # (samples, pixels, C) by its strides
    parts,  # float32 (samples, splits, C): the mean over pixels is their sum over splits
    C, P,  # channels, pixels
    splits, tiles,  # programs that share the pixels, tiles of BP pixels for each
    x_sample, x_channel, x_pixel,  # strides
    BP: tl.constexpr,
    BC: tl.constexpr,
):
    """One program per sample, block of pixels and block of channels."""
    n, split, p0, c0 = _place(C, splits, tiles, BP, BC)
    c = tl.arange(0, BC)
    p = tl.arange(0, BP)
    cmask = c0 + c < C
    x += n * x_sample + c0.to(tl.int64) * x_channel
    total = tl.zeros([BP, BC], tl.float32)
    for _ in range(tiles):
        at = x + p0 * x_pixel + p[:, None] * x_pixel + c[None, :] * x_channel
        total += tl.load(at, mask=(p0 + p < P)[:, None] & cmask[None, :], other=0.0).to(tl.float32)
        p0 += BP
    tl.store(parts + (n * splits + split) * C + c0 + c, tl.sum(total, 0) / P, mask=cmask)


@triton.jit
def feature_kl_backward_kernel(
    teacher, student,  # float32 (samples, parts, C): pooled features
    stats,  # as in the forward kernel
    dloss,  # the gradient of the loss, one value
    dx,  # (samples, pixels, C) by its strides: gradient of the teacher's feature map or of the student's
    B, C, P,
    splits, tiles,
    teacher_parts, student_parts,
    dx_sample, dx_channel, dx_pixel,  # strides
    temperature,
    OF_TEACHER: tl.constexpr,
    BP: tl.constexpr,
    BC: tl.constexpr,
):
    """One program per sample, block of pixels and block of channels: all pixels have the same gradient."""
    n, _, p0, c0 = _place(C, splits, tiles, BP, BC)
    c = tl.arange(0, BC)
    p = tl.arange(0, BP)
    row = n + tl.arange(0, 1)
    mask = (c0 + c < C)[None, :]
    column = (c0 + c).to(tl.int64)[None, :]
    t = _load(teacher, teacher_parts, row, column, mask, teacher_parts * C, 1, C)
    s = _load(student, student_parts, row, column, mask, student_parts * C, 1, C)
    of_student, of_teacher = _gradients(t, s, stats, row, B, temperature, mask)
    g = (of_teacher if OF_TEACHER else of_student) * (tl.load(dloss).to(tl.float32) / B / P)
    g = tl.broadcast_to(g, [BP, BC]).to(dx.dtype.element_ty)
    dx += n * dx_sample + c0.to(tl.int64) * dx_channel
    for _ in range(tiles):
        at = dx + p0 * dx_pixel + p[:, None] * dx_pixel + c[None, :] * dx_channel
        tl.store(at, g, mask=(p0 + p < P)[:, None] & mask)
        p0 += BP


def _launch_rows(
    teacher: Tensor, student: Tensor, indices: Tensor | None, rows: int, classes: int, temperature: float,
    teacher_strides: Sequence[int], student_strides: Sequence[int], parts: tuple[int | None, int | None] = (None, None),
) -> tuple[Tensor, Tensor]:
    """(loss, statistics); strides are those of row, class and part."""
    stats = teacher.new_empty((5, rows), dtype=torch.float32)
    if rows != 0:
        args = (teacher, student, indices, stats, rows, classes, *parts, *teacher_strides, *student_strides,
                indices.stride(0) if indices is not None else 0, temperature)
        if isinstance(classes, int) and classes <= MAX_CLASSES:
            bc = next_power_of_2(classes)
            config = {"BR": max(1, 1024 // bc), "BC": bc, "num_warps": min(16, max(4, bc // 512))}
            config = tuned("distillation_kl", teacher.device, config, classes=classes, dtype=str(teacher.dtype))
            launch(distillation_kl_kernel, (cdiv(rows, config["BR"]),), *args, **config)
        else:
            config = tuned("distillation_kl_loop", teacher.device, {"BC": 4096, "num_warps": 8}, classes=classes,
                           dtype=str(teacher.dtype))
            launch(distillation_kl_loop_kernel, (rows,), *args, **config)
    # Of no rows the mean is NaN, as that of torch.
    return stats[4].mean(), stats


def launch_distillation_kl(
    teacher: Tensor, student: Tensor, indices: Tensor | None, temperature: float
) -> tuple[Tensor, Tensor]:
    """The op on the GPU, arguments and results as there."""
    rows, classes = teacher.shape if indices is None else indices.shape
    return _launch_rows(teacher, student, indices, rows, classes, temperature, (*teacher.stride(), 0),
                        (*student.stride(), 0))


def launch_distillation_kl_backward(
    dloss: Tensor, teacher: Tensor, student: Tensor, indices: Tensor | None, stats: Tensor, temperature: float,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor]:
    """The backward op on the GPU, arguments and results as there."""
    grads = _empty_grads(teacher, student, indices, needs)
    rows, classes = teacher.shape if indices is None else indices.shape
    if rows == 0:
        return grads
    dteacher, dstudent = (grad if need else None for grad, need in zip(grads, needs))
    bc = min(next_power_of_2(classes), 1024) if isinstance(classes, int) else 1024
    config = tuned("distillation_kl_backward", student.device, {"BR": 1024 // bc, "BC": bc, "num_warps": 4},
                   classes=classes, dtype=str(student.dtype))
    launch(
        distillation_kl_backward_kernel, (cdiv(rows, config["BR"]) * cdiv(classes, config["BC"]),),
        teacher, student, indices, stats, dloss, dteacher, dstudent, rows, classes,
        *teacher.stride(), *student.stride(), *(dteacher.stride() if needs[0] else (0, 0)),
        *(dstudent.stride() if needs[1] else (0, 0)), indices.stride(0) if indices is not None else 0,
        temperature, **config,
    )
    return grads


def _pixels(x: Tensor, channel_dim: int, name: str) -> tuple[int, tuple[int, int, int]]:
    """How many, and the strides of sample, channel and pixel, of (N, C, ...) or (N, ..., C)."""
    channel = channel_dim % x.ndim
    pixels, pixel, follows = 1, 1, None
    for i in reversed(range(1, x.ndim)):
        if i == channel or x.shape[i] == 1:
            continue
        if follows is None:
            pixel = x.stride(i)
        elif x.stride(i) != follows:
            raise ValueError(f"{name} of shape {tuple(x.shape)} has strides {x.stride()}: its pixels do not follow "
                             f"each other regularly; pass {name}.contiguous()")
        follows = x.stride(i) * x.shape[i]
        pixels = pixels * x.shape[i]
    return pixels, (x.stride(0), x.stride(channel), pixel)


def _tile(channels: int, pixels: int, adjacent_channels: bool) -> dict[str, int]:
    """2048 elements: two 16-byte accesses of half precision for each of 128 threads."""
    if adjacent_channels:
        bc = min(next_power_of_2(channels), 64)
        return {"BP": 2048 // bc, "BC": bc, "num_warps": 4}
    bp = min(next_power_of_2(pixels), 1024) if isinstance(pixels, int) else 256
    return {"BP": bp, "BC": min(next_power_of_2(channels), 2048 // bp), "num_warps": 4}


def launch_feature_pool(x: Tensor, channel_dim: int, name: str = "x") -> Tensor:
    """The mean over pixels as float32 (N, parts, C), to be added up."""
    n, channels = x.shape[0], x.shape[channel_dim]
    pixels, strides = _pixels(x, channel_dim, name)
    config = tuned("feature_pool", x.device, _tile(channels, pixels, strides[1] == 1), channels=channels,
                   channels_last=int(strides[1] == 1), dtype=str(x.dtype))
    channel_blocks = cdiv(channels, config["BC"])
    # Enough programs for the whole GPU, and few parts.
    splits = MAX_PARTS
    if isinstance(n, int):
        splits = min(splits, cdiv(4 * SPLITS, max(n, 1) * channel_blocks))
    if isinstance(pixels, int):
        splits = min(splits, max(cdiv(pixels, config["BP"]), 1))
    parts = x.new_empty((n, splits, channels), dtype=torch.float32)
    if n != 0:
        launch(feature_pool_kernel, (n * splits * channel_blocks,), x, parts, channels, pixels, splits,
               cdiv(pixels, config["BP"] * splits), *strides, **config)
    return parts


def launch_feature_kl(
    teacher: Tensor, student: Tensor, channel_dim: int, temperature: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The op on the GPU, arguments and results as there."""
    t = launch_feature_pool(teacher, channel_dim, "teacher")
    s = launch_feature_pool(student, channel_dim, "student")
    rows, classes = t.shape[0], t.shape[2]
    loss, stats = _launch_rows(
        t, s, None, rows, classes, temperature, (t.stride(0), 1, t.stride(1)), (s.stride(0), 1, s.stride(1)),
        parts=(t.shape[1], s.shape[1]),
    )
    return loss, t, s, stats


def launch_feature_kl_backward(
    dloss: Tensor, teacher: Tensor, student: Tensor, stats: Tensor, shape: Sequence[int], channel_dim: int,
    adjacent_channels: bool, dtype: torch.dtype, temperature: float, of_teacher: bool,
) -> Tensor:
    """The backward op on the GPU, arguments and result as there."""
    dx = _empty_feature(stats, shape, channel_dim, adjacent_channels, dtype)
    n, channels = shape[0], shape[channel_dim]
    pixels, strides = _pixels(dx, channel_dim, "dx")
    if n == 0 or pixels == 0:
        return dx
    config = tuned("feature_kl_backward", dx.device, _tile(channels, pixels, adjacent_channels), channels=channels,
                   channels_last=int(adjacent_channels), dtype=str(dtype))
    # Several tiles each, for the gradient is computed from scratch by each program.
    tiles = min(8, cdiv(pixels, config["BP"])) if isinstance(pixels, int) else 8
    splits = cdiv(pixels, config["BP"] * tiles)
    launch(
        feature_kl_backward_kernel, (n * splits * cdiv(channels, config["BC"]),),
        teacher, student, stats, dloss, dx, n, channels, pixels, splits, tiles, teacher.shape[1], student.shape[1],
        *strides, temperature, OF_TEACHER=of_teacher, **config,
    )
    return dx


def _empty_grads(teacher: Tensor, student: Tensor, indices: Tensor | None, needs: Sequence[bool]) -> tuple:
    # Classes left out by a gather have no gradient.
    memory = torch.empty_like if indices is None else torch.zeros_like
    return tuple(memory(x) if need else x.new_empty(0) for x, need in zip((teacher, student), needs))


def _empty_feature(
    like: Tensor, shape: Sequence[int], channel_dim: int, adjacent_channels: bool, dtype: torch.dtype
) -> Tensor:
    """Dense memory for a feature map of `shape`, in which channels, or pixels, are adjacent."""
    channel = channel_dim % len(shape)
    spatial = [n for i, n in enumerate(shape) if i not in (0, channel)]
    if adjacent_channels:
        return like.new_empty((shape[0], *spatial, shape[channel]), dtype=dtype).movedim(-1, channel)
    return like.new_empty((shape[0], shape[channel], *spatial), dtype=dtype).movedim(1, channel)


def distillation_kl_reference(
    teacher: Tensor, student: Tensor, indices: Tensor | None, temperature: float
) -> tuple[Tensor, Tensor]:
    """The op in plain PyTorch, in float32, or float64 if an input is."""
    t, s = _gathered(teacher, student, indices)
    t_max, s_max = t.amax(1), s.amax(1)
    t_log_sum = ((t - t_max[:, None]) / temperature).logsumexp(1)
    s_log_sum = ((s - s_max[:, None]) / temperature).logsumexp(1)
    p = (t - t_max[:, None]) / temperature - t_log_sum[:, None]
    q = (s - s_max[:, None]) / temperature - s_log_sum[:, None]
    kl = temperature**2 * (p.exp() * (p - q)).sum(1)
    return kl.mean(), torch.stack([t_max, t_log_sum, s_max, s_log_sum, kl])


def distillation_kl_backward_reference(
    dloss: Tensor, teacher: Tensor, student: Tensor, indices: Tensor | None, stats: Tensor, temperature: float,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor]:
    """The backward op in plain PyTorch."""
    found = _gradients_reference(dloss, *_gathered(teacher, student, indices), stats, temperature)
    grads = _empty_grads(teacher, student, indices, needs)
    for grad, value, need in zip(grads, found, needs):
        if need:
            grad.copy_(value) if indices is None else grad.scatter_(1, indices, value.to(grad.dtype))
    return grads


def feature_kl_reference(
    teacher: Tensor, student: Tensor, channel_dim: int, temperature: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The op in plain PyTorch."""
    wide = _wide(teacher, student)
    t, s = (x.movedim(channel_dim, 1).flatten(2).mean(2, dtype=wide) for x in (teacher, student))
    loss, stats = distillation_kl_reference(t, s, None, temperature)
    return loss, t[:, None], s[:, None], stats


def feature_kl_backward_reference(
    dloss: Tensor, teacher: Tensor, student: Tensor, stats: Tensor, shape: Sequence[int], channel_dim: int,
    adjacent_channels: bool, dtype: torch.dtype, temperature: float, of_teacher: bool,
) -> Tensor:
    """The backward op in plain PyTorch."""
    dx = _empty_feature(stats, shape, channel_dim, adjacent_channels, dtype)
    g = _gradients_reference(dloss, teacher.sum(1), student.sum(1), stats, temperature)[0 if of_teacher else 1]
    pixels = math.prod(shape) // max(shape[0] * shape[channel_dim], 1)
    # The view of (N, C) as it broadcasts against `shape`.
    g = (g / max(pixels, 1)).reshape(*g.shape, *[1] * (len(shape) - 2)).movedim(1, channel_dim)
    return dx.copy_(g)


def _wide(teacher: Tensor, student: Tensor) -> torch.dtype:
    return torch.promote_types(torch.promote_types(teacher.dtype, student.dtype), torch.float32)


def _gathered(teacher: Tensor, student: Tensor, indices: Tensor | None) -> tuple[Tensor, Tensor]:
    if indices is not None:
        teacher, student = teacher.gather(1, indices), student.gather(1, indices)
    wide = _wide(teacher, student)
    return teacher.to(wide), student.to(wide)


def _gradients_reference(dloss: Tensor, t: Tensor, s: Tensor, stats: Tensor, temperature: float) -> tuple:
    """Of teacher and student, both (B, C)."""
    t_max, t_log_sum, s_max, s_log_sum, kl = stats[:, :, None]
    p = (t - t_max) / temperature - t_log_sum
    q = (s - s_max) / temperature - s_log_sum
    scale = dloss / t.shape[0]
    of_teacher = p.exp() * ((p - q) * temperature - kl / temperature)
    return of_teacher * scale, (q.exp() - p.exp()) * temperature * scale


@triton_op("adn::distillation_kl", mutates_args=())
def distillation_kl_op(
    teacher: Tensor, student: Tensor, indices: Tensor | None, temperature: float
) -> tuple[Tensor, Tensor]:
    """(loss, statistics (5, B) for backward); indices (B, k) int64: the classes compared."""
    forward = launch_distillation_kl if on_gpu(teacher, student) else distillation_kl_reference
    return forward(teacher, student, indices, temperature)


@triton_op("adn::distillation_kl_backward", mutates_args=())
def distillation_kl_backward_op(
    dloss: Tensor, teacher: Tensor, student: Tensor, indices: Tensor | None, stats: Tensor, temperature: float,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor]:
    """The gradients of teacher and student; `needs` says which are wanted, the other comes back empty."""
    backward = launch_distillation_kl_backward if on_gpu(teacher, student) else distillation_kl_backward_reference
    return backward(dloss, teacher, student, indices, stats, temperature, needs)


no_second_derivative(distillation_kl_backward_op)


def _kl_setup_context(ctx, inputs, output):
    teacher, student, indices, ctx.temperature = inputs
    _, stats = output
    ctx.mark_non_differentiable(stats)
    # Else zeros would be made for the gradients of what has none.
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(teacher, student, indices, stats)


def _kl_backward(ctx, dloss, _):
    if dloss is None:
        return (None,) * 4
    teacher, student, indices, stats = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:2])
    grads = distillation_kl_backward_op(dloss, teacher, student, indices, stats, ctx.temperature, needs)
    return *(grad if need else None for grad, need in zip(grads, needs)), None, None


distillation_kl_op.register_autograd(_kl_backward, setup_context=_kl_setup_context)


@triton_op("adn::feature_kl", mutates_args=())
def feature_kl_op(
    teacher: Tensor, student: Tensor, channel_dim: int, temperature: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss, pooled teacher and student (B, parts, C), to be added up, statistics (5, B))."""
    forward = launch_feature_kl if on_gpu(teacher, student) else feature_kl_reference
    return forward(teacher, student, channel_dim, temperature)


@triton_op("adn::feature_kl_backward", mutates_args=())
def feature_kl_backward_op(
    dloss: Tensor, teacher: Tensor, student: Tensor, stats: Tensor, shape: Sequence[int], channel_dim: int,
    adjacent_channels: bool, dtype: torch.dtype, temperature: float, of_teacher: bool,
) -> Tensor:
    """The gradient of one of the feature maps.

    Args:
        dloss: the gradient of the loss, one value.
        teacher, student, stats: what forward returned.
        shape, dtype: those of the feature map, which itself is not needed.
        adjacent_channels: whether channels or pixels are adjacent in its memory, and so in the gradient's.
        of_teacher: which of the two.
    """
    backward = launch_feature_kl_backward if on_gpu(stats) else feature_kl_backward_reference
    return backward(dloss, teacher, student, stats, shape, channel_dim, adjacent_channels, dtype, temperature,
                    of_teacher)


no_second_derivative(feature_kl_backward_op)


def _feature_setup_context(ctx, inputs, output):
    *features, ctx.channel_dim, ctx.temperature = inputs
    _, teacher, student, stats = output
    ctx.mark_non_differentiable(teacher, student, stats)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(teacher, student, stats)
    # Not the maps themselves: keeping them would cost memory, and what follows may change them in place.
    ctx.features = [(x.shape, x.stride(ctx.channel_dim) == 1, x.dtype) for x in features]


def _feature_backward(ctx, dloss, *_):
    if dloss is None:
        return (None,) * 4
    if torch.is_grad_enabled():  # of a graph of the gradients, which would miss the maps: the op shall refuse
        dloss = dloss.detach().requires_grad_()
    teacher, student, stats = ctx.saved_tensors
    grads = [
        feature_kl_backward_op(dloss, teacher, student, stats, shape, ctx.channel_dim, adjacent, dtype, ctx.temperature,
                               of_teacher) if need else None
        for need, of_teacher, (shape, adjacent, dtype) in zip(ctx.needs_input_grad, (True, False), ctx.features)
    ]
    return *grads, None, None


feature_kl_op.register_autograd(_feature_backward, setup_context=_feature_setup_context)


def _check(teacher: Tensor, student: Tensor, temperature: float) -> None:
    for name, x in (("teacher", teacher), ("student", student)):
        if not x.is_floating_point():
            raise ValueError(f"{name} is {x.dtype}; pass a floating type")
    if teacher.device != student.device:
        raise ValueError(f"teacher is on {teacher.device}, student on {student.device}; pass both on one device")
    if not temperature > 0:
        raise ValueError(f"temperature={temperature}; pass a number above 0")


def distillation_kl(
    teacher: Tensor, student: Tensor, *, temperature: float = 1.0, top_classes: int | None = None
) -> Tensor:
    """`T^2 KL(softmax(teacher / T) || softmax(student / T))`, summed over classes, mean over rows.

    As `adn.train.distill.distillation_kl` computes it, but the teacher has a gradient if it requires one.

    Bytes: forward teacher + student, backward the same and the gradients. With `top_classes` only those columns, and
    their indices; but `torch.topk` reads all of the teacher, and each gradient is filled with zeros. Bound by the
    launches; with many rows by HBM bandwidth.

    Args:
        teacher, student: (B, C), any strides, float32, float16 or bfloat16 each (float64: plain PyTorch).
        top_classes: only the teacher's largest this many classes per row, both sides renormalised; None = all.

    Returns:
        A scalar, float32 (float64 if an input is). NaN, as in torch, where a teacher's logit is -inf.

    Raises:
        ValueError: if a shape, dtype, device or setting does not fit.
    """
    _check(teacher, student, temperature)
    if teacher.ndim != 2 or teacher.shape != student.shape or teacher.shape[1] == 0:
        raise ValueError(f"teacher has shape {tuple(teacher.shape)}, student {tuple(student.shape)}; pass (B, C) twice")
    if top_classes is not None and top_classes < 1:
        raise ValueError(f"top_classes={top_classes}; pass a number of classes, or None for all")
    indices = None
    if top_classes is not None and top_classes < teacher.shape[1]:
        indices = teacher.detach().topk(top_classes, dim=1, sorted=False).indices
    return distillation_kl_op(teacher, student, indices, temperature)[0]


def feature_kl(teacher: Tensor, student: Tensor, *, channel_dim: int = 1, temperature: float = 1.0) -> Tensor:
    """`distillation_kl` of two feature maps, pooled over everything but batch and channels.

    Pooled means are kept in float32, whatever the type of the maps.

    Bytes: forward reads both maps once, backward writes each gradient that is wanted once. Bound by HBM bandwidth.

    Args:
        teacher, student: (N, C, ...) with `channel_dim=1`, in either layout, or (N, ..., C) with -1; the same N and C,
            pixels may differ; float32, float16 or bfloat16 each (float64: plain PyTorch).

    Returns:
        A scalar, float32 (float64 if an input is).

    Raises:
        ValueError: if a shape, dtype, device, layout or setting does not fit.
    """
    _check(teacher, student, temperature)
    if channel_dim not in (1, -1):
        raise ValueError(f"channel_dim={channel_dim}; pass 1 or -1")
    shapes = [(x.shape[0], x.shape[channel_dim]) if x.ndim >= 3 else () for x in (teacher, student)]
    if shapes[0] != shapes[1] or not shapes[0] or shapes[0][1] == 0:
        raise ValueError(f"teacher has shape {tuple(teacher.shape)}, student {tuple(student.shape)}; pass feature maps "
                         f"of as many samples and channels each (channel_dim={channel_dim})")
    for name, x in (("teacher", teacher), ("student", student)):
        _pixels(x, channel_dim, name)
    return feature_kl_op(teacher, student, channel_dim, temperature)[0]
