"""3x3 convolution as an implicit matrix product that ends with norm, residual and activation."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op

from .epilogue import (
    check_epilogue,
    check_inference,
    conv_reference,
    empty_output,
    epilogue,
    flags_kind,
    in_autocast,
    register_backward,
    write_active,
)
from .gemm import (
    GROUP,
    check_conv,
    check_pixels,
    gemm_config,
    in_units,
    out_shape,
    pixel_offset,
    pixel_strides,
    tile_of,
    vector_unit,
)
from .launch import cdiv, dot_precision, launch, on_gpu, tuned


@triton.jit
def conv3x3_kernel(
    x,  # (N, K, H, W)
    weight,  # (C, K, 3, 3)
    scale, shift,  # float32 (C,), or (2, C) with `bank`; or None
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
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BANK: tl.constexpr,  # NONE, SCALAR, PER_SAMPLE of epilogue.py
    ACTIVE: tl.constexpr,
    PRECISION: tl.constexpr,  # of float32 products: "tf32", "ieee"
    UNIT: tl.constexpr,  # of `vector_unit`: K, C and all strides but those of channels are divided by it
    GROUP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """One program computes BM pixels x BN channels, summing over 9 taps x K channels."""
    K *= UNIT
    C *= UNIT
    tile_m, tile_n = tile_of(tl.program_id(0), M, C, BM, BN, GROUP)
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

    # The input pixel under the first tap; it may lie in the padding.
    h = m % OHW // OW * STRIDE - PADDING
    w = m % OHW % OW * STRIDE - PADDING
    channel = tile_n * BN + tl.arange(0, BN)
    channel_mask = channel < C
    k = tl.arange(0, BK)
    # Int64 also along channels, which are far apart in NCHW.
    x_pixel = (n.to(tl.int64) * x_n + h.to(tl.int64) * x_h + w.to(tl.int64) * x_w) * UNIT
    x_at = x + x_pixel[:, None] + k.to(tl.int64)[None, :] * x_k
    weight_at = weight + (channel.to(tl.int64) * weight_c * UNIT)[None, :] + k[:, None] * weight_k
    blocks = tl.cdiv(K, BK)
    acc = tl.zeros([BM, BN], tl.float32)
    # One loop over taps and channels: its loads are pipelined across taps.
    for i in range(0, 9 * blocks):
        tap = i // blocks
        kh = tap // 3
        kw = tap % 3
        k0 = (i % blocks) * BK
        inside = row_mask & (h + kh >= 0) & (h + kh < H) & (w + kw >= 0) & (w + kw < W)
        # Past the end both operands are 0: 0 times whatever lies there could be NaN.
        k_mask = k0 + k < K
        x_step = (kh.to(tl.int64) * x_h + kw.to(tl.int64) * x_w) * UNIT + k0.to(tl.int64) * x_k
        a = tl.load(x_at + x_step, mask=inside[:, None] & k_mask[None, :], other=0.0)
        b = tl.load(weight_at + ((kh * weight_h + kw * weight_w) * UNIT + k0 * weight_k),
                    mask=channel_mask[None, :] & k_mask[:, None], other=0.0)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)

    out_pixel = pixel_offset(m, OHW, OW, out_n, out_h, out_w, UNIT)
    out_at = out + out_pixel[:, None] + channel.to(tl.int64)[None, :] * out_c
    residual_at = residual
    if residual is not None:
        residual_pixel = pixel_offset(m, OHW, OW, residual_n, residual_h, residual_w, UNIT)
        residual_at += residual_pixel[:, None] + channel.to(tl.int64)[None, :] * residual_c
    mask = row_mask[:, None] & channel_mask[None, :]
    epilogue(acc, scale, shift, bank, residual_at, out_at, n, channel, C, channel_mask, mask, ACTIVATION, BANK)


def launch_conv3x3(
    x: Tensor, weight: Tensor, scale: Tensor | None, shift: Tensor | None, residual: Tensor | None,
    bank: Tensor | None, activation: str, stride: int, padding: int,
) -> Tensor:
    y = empty_output(x, out_shape(x, weight, stride, padding), residual)
    _launch(y, x, weight, scale, shift, residual, bank, None, activation, stride, padding)
    return y


def launch_conv3x3_(
    out: Tensor, x: Tensor, weight: Tensor, scale: Tensor | None, shift: Tensor | None, accumulate: bool,
    bank: Tensor | None, active: Tensor | None, activation: str, stride: int, padding: int,
) -> None:
    residual = out if accumulate else None
    _launch(out, x, weight, scale, shift, residual, bank, active, activation, stride, padding)


def _launch(
    out: Tensor, x: Tensor, weight: Tensor, scale: Tensor | None, shift: Tensor | None, residual: Tensor | None,
    bank: Tensor | None, active: Tensor | None, activation: str, stride: int, padding: int,
) -> None:
    if not out.numel():
        return
    n, channels, oh, ow = out.shape
    _, depth, h, w = x.shape
    pixels = n * oh * ow
    check_pixels(pixels)
    x_strides, weight_strides, out_strides = x.stride(), weight.stride(), pixel_strides(oh, ow, out.stride())
    residual_strides = None if residual is None else pixel_strides(oh, ow, residual.stride())
    unit = vector_unit(
        channels, depth, (x, pixel_strides(h, w, x_strides)), (weight, weight_strides), (out, out_strides),
        *([] if residual is None else [(residual, residual_strides)]))
    config = tuned("conv3x3", x.device, gemm_config(pixels, channels, depth, x.dtype, unit),
                   pixels=pixels, channels=channels, depth=depth, stride=stride, unit=unit, dtype=str(x.dtype))
    launch(
        conv3x3_kernel, (cdiv(pixels, config["BM"]) * cdiv(channels, config["BN"]),),
        x, weight, scale, shift, residual, out, bank, active,
        pixels, depth // unit, channels // unit, h, w, oh * ow, ow,
        *in_units(x_strides, unit), *in_units(weight_strides, unit),
        *((None,) * 4 if residual is None else in_units(residual_strides, unit)), *in_units(out_strides, unit),
        STRIDE=stride, PADDING=padding, ACTIVATION=activation, BANK=flags_kind(bank), ACTIVE=flags_kind(active),
        PRECISION=dot_precision(x, "conv"), UNIT=unit, GROUP=GROUP, **config,
    )


def conv3x3_reference(
    x: Tensor, weight: Tensor, scale: Tensor | None, shift: Tensor | None, residual: Tensor | None,
    bank: Tensor | None, activation: str, stride: int, padding: int,
) -> Tensor:
    """`act(conv2d(x, weight) * scale + shift + residual)` in float32; float64 stays."""
    return conv_reference(x, weight, scale, shift, residual, bank, activation, stride, padding)


@triton_op("adn::conv3x3", mutates_args=())
def _conv3x3(
    x: Tensor, weight: Tensor, scale: Tensor | None, shift: Tensor | None, residual: Tensor | None,
    bank: Tensor | None, activation: str, stride: int, padding: int,
) -> Tensor:
    shape = check_conv(x, weight, stride, padding, sizes=(3,))
    check_epilogue(x, weight, shape, scale, shift, bank, residual, activation)
    if not on_gpu(x, residual):
        y = conv3x3_reference(x, weight, scale, shift, residual, bank, activation, stride, padding)
        return empty_output(x, shape, residual).copy_(y)
    return launch_conv3x3(x, weight, scale, shift, residual, bank, activation, stride, padding)


@triton_op("adn::conv3x3_", mutates_args=("out",))
def _conv3x3_(
    out: Tensor, x: Tensor, weight: Tensor, scale: Tensor | None, shift: Tensor | None, accumulate: bool,
    bank: Tensor | None, active: Tensor | None, activation: str, stride: int, padding: int,
) -> None:
    shape = check_conv(x, weight, stride, padding, sizes=(3,))
    check_epilogue(x, weight, shape, scale, shift, bank, None, activation, out, active)
    if not on_gpu(x, out):
        residual = out if accumulate else None
        write_active(
            out, conv3x3_reference(x, weight, scale, shift, residual, bank, activation, stride, padding), active)
    else:
        launch_conv3x3_(out, x, weight, scale, shift, accumulate, bank, active, activation, stride, padding)


register_backward(_conv3x3, lambda x, stride, padding: (stride, padding, 1))


def conv3x3(
    x: Tensor, weight: Tensor, scale: Tensor | None = None, shift: Tensor | None = None, *,
    residual: Tensor | None = None, activation: str = "identity", stride: int = 1, padding: int = 1,
    bank: Tensor | None = None,
) -> Tensor:
    """`act(conv2d(x, weight, stride=stride, padding=padding) * scale + shift + residual)`, rounded once.

    Moves x, the weight, the residual and y once (x is read 9 times, 8 of them from L1 and L2). Limited by the tensor
    cores: 18 * K operations per output value. cuDNN is hard to beat at that; this op is for activations, banks
    and a bypass that cuDNN does not know (`conv` picks).

    Args:
        x: (N, K, H, W), any strides; NHWC is read in 16-byte pieces. fp32 (TF32 as `torch.backends.cudnn.conv` says),
            fp16, bf16; on other devices and in float64 the reference computes. Under `torch.autocast` it is cast to
            its type, as is the input of torch's convolutions.
        weight: (C, K, 3, 3), any strides, fast if channels_last; cast to x's dtype if it has another.
        scale, shift: float32 (C,): an eval-mode norm (see `epilogue.fold_norm`) or a bias. With `bank` (2, C).
        residual: (N, C, OH, OW), any strides.
        bank: int32, one value or one per sample, read on the device: 0 picks the first scale and shift, else the
            second. Without it the live ones are passed, and the others get no gradient.

    Returns:
        (N, C, OH, OW) in the layout of x; its dtype that of `x + residual`. The backward recomputes the convolution and
        is plain PyTorch.

    Raises:
        ValueError: shapes, dtypes or devices do not fit; the message says what to pass.
    """
    x, weight = in_autocast(x, weight)
    return _conv3x3(x, weight, scale, shift, residual, bank, activation, stride, padding)


def conv3x3_(
    out: Tensor, x: Tensor, weight: Tensor, scale: Tensor | None = None, shift: Tensor | None = None, *,
    accumulate: bool = False, activation: str = "identity", stride: int = 1, padding: int = 1,
    bank: Tensor | None = None, active: Tensor | None = None,
) -> Tensor:
    """`conv3x3` written to `out`; with `accumulate`, `out` is the residual as well. No backward.

    Args:
        out: (N, C, OH, OW), any strides and floating dtype; shares no memory with x.
        active: int32, one value or one per sample: where 0 its programs exit before they read anything else, and `out`
            keeps its bits, also where a tile spans many samples.

    Returns:
        out.

    Raises:
        ValueError: as `conv3x3`, and if x shares memory with `out`.
        RuntimeError: a gradient would be needed.
    """
    check_inference("conv3x3_", out, x, weight, scale, shift)
    x, weight = in_autocast(x, weight)
    _conv3x3_(out, x, weight, scale, shift, accumulate, bank, active, activation, stride, padding)
    return out
