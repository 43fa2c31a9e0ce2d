"""1x1 convolution and linear layer: a matrix product that ends with norm, residual and activation."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.library import custom_op, triton_op

from .epilogue import (
    check_epilogue,
    check_inference,
    conv_reference,
    empty_gradients,
    empty_output,
    epilogue,
    epilogue_backward,
    epilogue_reference,
    flags_kind,
    gradients,
    in_autocast,
    kept,
    no_autocast,
    register_backward,
    write_active,
)
from .gemm import (
    GROUP,
    Strides,
    check_conv,
    check_pixels,
    check_same_kind,
    gemm_config,
    in_units,
    out_shape,
    pixel_offset,
    pixel_strides,
    tile_of,
    vector_unit,
)
from .launch import cdiv, dot_precision, launch, no_second_derivative, on_gpu, tuned


@triton.jit
def conv1x1_kernel(
    x,  # (N, K, OH, OW), strides below: of a convolution with stride 2, every second pixel
    weight,  # (C, K)
    scale, shift,  # float32 (C,), or (2, C) with `bank`; or None
    residual,  # (N, C, OH, OW) or None; may be `out`
    out,  # (N, C, OH, OW)
    bank, active,  # int32 (1,) or (N,), or None
    M,  # N * OH * OW
    K, C,
    OHW, OW,  # OH * OW, OW
    x_n, x_k, x_h, x_w,
    weight_c, weight_k,
    residual_n, residual_c, residual_h, residual_w,
    out_n, out_c, out_h, out_w,
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
    """One program computes BM pixels x BN channels."""
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

    channel = tile_n * BN + tl.arange(0, BN)
    channel_mask = channel < C
    k = tl.arange(0, BK)
    # Int64 also along channels, which are far apart in NCHW.
    x_at = x + pixel_offset(m, OHW, OW, x_n, x_h, x_w, UNIT)[:, None] + k.to(tl.int64)[None, :] * x_k
    x_step = tl.full([], BK, tl.int64) * x_k
    weight_at = weight + (channel.to(tl.int64) * weight_c * UNIT)[None, :] + k[:, None] * weight_k
    acc = tl.zeros([BM, BN], tl.float32)
    for k0 in range(0, K, BK):
        # Past the end both operands are 0: 0 times whatever lies there could be NaN.
        k_mask = k0 + k < K
        a = tl.load(x_at, mask=row_mask[:, None] & k_mask[None, :], other=0.0)
        b = tl.load(weight_at, mask=channel_mask[None, :] & k_mask[:, None], other=0.0)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
        x_at += x_step
        weight_at += BK * weight_k

    out_pixel = pixel_offset(m, OHW, OW, out_n, out_h, out_w, UNIT)
    out_at = out + out_pixel[:, None] + channel.to(tl.int64)[None, :] * out_c
    residual_at = residual
    if residual is not None:
        residual_pixel = pixel_offset(m, OHW, OW, residual_n, residual_h, residual_w, UNIT)
        residual_at += residual_pixel[:, None] + channel.to(tl.int64)[None, :] * residual_c
    mask = row_mask[:, None] & channel_mask[None, :]
    epilogue(acc, scale, shift, bank, residual_at, out_at, n, channel, C, channel_mask, mask, ACTIVATION, BANK)


def _launch_gemm(
    out: Tensor, x: Tensor, weight: Tensor, scale: Tensor | None, shift: Tensor | None, residual: Tensor | None,
    bank: Tensor | None, active: Tensor | None, activation: str, precision: str, sizes: tuple[int, int, int],
    x_strides: Strides, out_strides: Strides, residual_strides: Strides | None,
) -> None:
    """weight (C, K) or (C, K, 1, 1); the others as (N, channels, OH, OW) with these strides and N, OH, OW in `sizes`.

    Views of that shape would say the same; making them takes longer than all the rest.
    """
    n, oh, ow = sizes
    channels, depth = weight.shape[:2]
    pixels = n * oh * ow
    check_pixels(pixels)
    operands = [(t, pixel_strides(oh, ow, strides)) for t, strides in ((x, x_strides), (out, out_strides))]
    weight_strides = weight.stride()[:2]
    if residual is not None:
        operands.append((residual, pixel_strides(oh, ow, residual_strides)))
    unit = vector_unit(channels, depth, (weight, weight_strides), *operands)
    config = tuned("conv1x1", x.device, gemm_config(pixels, channels, depth, x.dtype, unit),
                   pixels=pixels, channels=channels, depth=depth, unit=unit, dtype=str(x.dtype))
    of_x, of_out, *of_residual = (in_units(strides, unit) for _, strides in operands)
    launch(
        conv1x1_kernel, (cdiv(pixels, config["BM"]) * cdiv(channels, config["BN"]),),
        x, weight, scale, shift, residual, out, bank, active,
        pixels, depth // unit, channels // unit, oh * ow, ow,
        *of_x, *in_units(weight_strides, unit), *(of_residual[0] if of_residual else (None,) * 4), *of_out,
        ACTIVATION=activation, BANK=flags_kind(bank), ACTIVE=flags_kind(active), PRECISION=precision, UNIT=unit,
        GROUP=GROUP, **config,
    )


def launch_conv1x1(
    x: Tensor, weight: Tensor, scale: Tensor | None, shift: Tensor | None, residual: Tensor | None,
    bank: Tensor | None, activation: str, stride: int,
) -> Tensor:
    y = empty_output(x, out_shape(x, weight, stride, 0), residual)
    _launch_conv(y, x, weight, scale, shift, residual, bank, None, activation, stride)
    return y


def launch_conv1x1_(
    out: Tensor, x: Tensor, weight: Tensor, scale: Tensor | None, shift: Tensor | None, accumulate: bool,
    bank: Tensor | None, active: Tensor | None, activation: str, stride: int,
) -> None:
    residual = out if accumulate else None
    _launch_conv(out, x, weight, scale, shift, residual, bank, active, activation, stride)


def _launch_conv(
    out: Tensor, x: Tensor, weight: Tensor, scale: Tensor | None, shift: Tensor | None, residual: Tensor | None,
    bank: Tensor | None, active: Tensor | None, activation: str, stride: int,
) -> None:
    if not out.numel():
        return
    n, _, oh, ow = out.shape
    sn, sk, sh, sw = x.stride()
    _launch_gemm(out, x, weight, scale, shift, residual, bank, active, activation, dot_precision(x, "conv"),
                 (n, oh, ow), (sn, sk, stride * sh, stride * sw), out.stride(),
                 None if residual is None else residual.stride())


def launch_linear(
    x: Tensor, weight: Tensor, scale: Tensor | None, shift: Tensor | None, residual: Tensor | None,
    bank: Tensor | None, activation: str,
) -> Tensor:
    y = _empty_linear(x, weight, residual)
    _launch_linear(y, x, weight, scale, shift, residual, bank, None, activation)
    return y


def launch_linear_(
    out: Tensor, x: Tensor, weight: Tensor, scale: Tensor | None, shift: Tensor | None, accumulate: bool,
    bank: Tensor | None, active: Tensor | None, activation: str,
) -> None:
    _launch_linear(out, x, weight, scale, shift, out if accumulate else None, bank, active, activation)


def _launch_linear(
    out: Tensor, x: Tensor, weight: Tensor, scale: Tensor | None, shift: Tensor | None, residual: Tensor | None,
    bank: Tensor | None, active: Tensor | None, activation: str,
) -> None:
    if not out.numel():
        return

    def strides(tokens: Tensor) -> Strides:
        n, length, channel = tokens.stride()
        return n, channel, n, length

    _launch_gemm(out, x, weight, scale, shift, residual, bank, active, activation, dot_precision(x, "matmul"),
                 (out.shape[0], 1, out.shape[1]), strides(x), strides(out),
                 None if residual is None else strides(residual))


def _pixels(x: Tensor | None) -> Tensor | None:
    """(N, L, K) seen as (N, K, 1, L)."""
    return None if x is None else x.transpose(1, 2).unsqueeze(2)


def _tokens(x: Tensor | None) -> Tensor | None:
    """(N, K, 1, L) seen as (N, L, K)."""
    return None if x is None else x.squeeze(2).transpose(1, 2)


def _empty_linear(x: Tensor, weight: Tensor, residual: Tensor | None) -> Tensor:
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    return x.new_empty((x.shape[0], x.shape[1], weight.shape[0]), dtype=dtype)


def conv1x1_reference(
    x: Tensor, weight: Tensor, scale: Tensor | None, shift: Tensor | None, residual: Tensor | None,
    bank: Tensor | None, activation: str, stride: int,
) -> Tensor:
    """`act(conv2d(x, weight) * scale + shift + residual)` in float32; float64 stays."""
    return conv_reference(x, weight, scale, shift, residual, bank, activation, stride)


def linear_reference(
    x: Tensor, weight: Tensor, scale: Tensor | None, shift: Tensor | None, residual: Tensor | None,
    bank: Tensor | None, activation: str,
) -> Tensor:
    """`act(x @ weight.T * scale + shift + residual)` in float32 (float64 stays); x (N, L, K), result (N, L, C)."""
    wide = torch.promote_types(x.dtype, torch.float32)
    with no_autocast(x):
        z = _pixels(F.linear(x.to(wide), weight.to(wide)))
    return _tokens(epilogue_reference(z, scale, shift, bank, _pixels(residual), activation))


@triton_op("adn::conv1x1", mutates_args=())
def _conv1x1(
    x: Tensor, weight: Tensor, scale: Tensor | None, shift: Tensor | None, residual: Tensor | None,
    bank: Tensor | None, activation: str, stride: int,
) -> Tensor:
    shape = check_conv(x, weight, stride, 0, sizes=(1,))
    check_epilogue(x, weight, shape, scale, shift, bank, residual, activation)
    if not on_gpu(x, residual):
        y = conv1x1_reference(x, weight, scale, shift, residual, bank, activation, stride)
        return empty_output(x, shape, residual).copy_(y)
    return launch_conv1x1(x, weight, scale, shift, residual, bank, activation, stride)


@triton_op("adn::conv1x1_", mutates_args=("out",))
def _conv1x1_(
    out: Tensor, x: Tensor, weight: Tensor, scale: Tensor | None, shift: Tensor | None, accumulate: bool,
    bank: Tensor | None, active: Tensor | None, activation: str, stride: int,
) -> None:
    shape = check_conv(x, weight, stride, 0, sizes=(1,))
    check_epilogue(x, weight, shape, scale, shift, bank, None, activation, out, active)
    if not on_gpu(x, out):
        residual = out if accumulate else None
        write_active(out, conv1x1_reference(x, weight, scale, shift, residual, bank, activation, stride), active)
    else:
        launch_conv1x1_(out, x, weight, scale, shift, accumulate, bank, active, activation, stride)


@triton_op("adn::linear", mutates_args=())
def _linear(
    x: Tensor, weight: Tensor, scale: Tensor | None, shift: Tensor | None, residual: Tensor | None,
    bank: Tensor | None, activation: str,
) -> Tensor:
    shape = _check_linear(x, weight)
    check_epilogue(x, weight, shape, scale, shift, bank, _pixels(residual), activation)
    if not on_gpu(x, residual):
        y = linear_reference(x, weight, scale, shift, residual, bank, activation)
        return _empty_linear(x, weight, residual).copy_(y)
    return launch_linear(x, weight, scale, shift, residual, bank, activation)


@triton_op("adn::linear_", mutates_args=("out",))
def _linear_(
    out: Tensor, x: Tensor, weight: Tensor, scale: Tensor | None, shift: Tensor | None, accumulate: bool,
    bank: Tensor | None, active: Tensor | None, activation: str,
) -> None:
    shape = _check_linear(x, weight)
    check_epilogue(x, weight, shape, scale, shift, bank, None, activation, _pixels(out), active)
    if not on_gpu(x, out):
        residual = out if accumulate else None
        write_active(_pixels(out), _pixels(linear_reference(x, weight, scale, shift, residual, bank, activation)),
                     active)
    else:
        launch_linear_(out, x, weight, scale, shift, accumulate, bank, active, activation)


def _check_linear(x: Tensor, weight: Tensor) -> tuple[int, int, int, int]:
    """The shape of the output as (N, C, 1, L); raises ValueError if there is none."""
    if weight.ndim != 2 or weight.shape[1] != x.shape[2]:
        raise ValueError(f"weight has shape {tuple(weight.shape)}; pass (C, {x.shape[2]}) for rows of x of that length")
    check_same_kind(x, weight)
    return x.shape[0], weight.shape[0], 1, x.shape[1]


@custom_op("adn::linear_act_backward", mutates_args=())
def linear_act_backward(
    dy: Tensor, x: Tensor, weight: Tensor, scale: Tensor | None, shift: Tensor | None, residual: Tensor | None,
    bank: Tensor | None, activation: str, needs: Sequence[bool],
) -> list[Tensor]:
    """`conv_act_backward` by matrix products, whose precision is set apart from that of convolutions.

    Args:
        dy: (N, L, C), the gradient of y; the other arguments are those of the forward.
        needs: for each of x, weight, scale, shift, residual, whether its gradient is wanted.
    """
    with no_autocast(x):
        z = _pixels(F.linear(x, weight))
        dz, *rest = epilogue_backward(_pixels(dy), z, scale, shift, _pixels(residual), bank, activation, needs)
        dz = _tokens(dz).to(x.dtype)
        dx = dz @ weight if needs[0] else None
        dw = dz.flatten(0, 1).T @ x.flatten(0, 1) if needs[1] else None
    dscale, dshift, dresidual = rest
    return gradients((x, weight, scale, shift, residual), needs, (dx, dw, dscale, dshift, _tokens(dresidual)))


@linear_act_backward.register_fake
def _(dy, x, weight, scale, shift, residual, bank, activation, needs):
    return empty_gradients((x, weight, scale, shift, residual), needs)


no_second_derivative(linear_act_backward)


def _setup_context_linear(ctx, inputs, output):
    *tensors, bank, ctx.activation = inputs
    ctx.save_for_backward(*tensors, kept(bank))


def _backward_linear(ctx, dy):
    needs = ctx.needs_input_grad[:5]
    grads = linear_act_backward(dy, *ctx.saved_tensors, ctx.activation, needs)
    return *(grad if need else None for grad, need in zip(grads, needs)), None, None


_linear.register_autograd(_backward_linear, setup_context=_setup_context_linear)
register_backward(_conv1x1, lambda x, stride: (stride, 0, 1))


def conv1x1(
    x: Tensor, weight: Tensor, scale: Tensor | None = None, shift: Tensor | None = None, *,
    residual: Tensor | None = None, activation: str = "identity", stride: int = 1, bank: Tensor | None = None,
) -> Tensor:
    """`act(conv2d(x, weight, stride=stride) * scale + shift + residual)`, rounded once.

    Moves x and the weight once, the residual and y once: 2 bytes each in fp16. With K channels in and C out it computes
    2 * K * C operations per pixel, so it is limited by bandwidth up to about 180 operations per byte on an H200 (K and
    C of 256 and less), by the tensor cores beyond, and for few pixels by the latency of one pass along K.

    Args:
        x: (N, K, H, W), any strides; NHWC is read in 16-byte pieces. fp32 (TF32 as `torch.backends.cudnn.conv` says),
            fp16, bf16; on other devices and in float64 the reference computes. Under `torch.autocast` it is cast to
            its type, as is the input of torch's convolutions.
        weight: (C, K, 1, 1); cast to x's dtype, a pass over it, if it has another.
        scale, shift: float32 (C,): an eval-mode norm (see `epilogue.fold_norm`) or a bias. With `bank` (2, C).
        residual: (N, C, OH, OW), any strides.
        bank: int32, one value or one per sample, read on the device: 0 picks the first scale and shift, else the
            second. Without it the live ones are passed, and the others get no gradient.

    Returns:
        (N, C, OH, OW) with OH = ceil(H / stride), in the layout of x; its dtype that of `x + residual`. The backward
        recomputes the convolution and is plain PyTorch.

    Raises:
        ValueError: shapes, dtypes or devices do not fit; the message says what to pass.
    """
    x, weight = in_autocast(x, weight)
    return _conv1x1(x, weight, scale, shift, residual, bank, activation, stride)


def conv1x1_(
    out: Tensor, x: Tensor, weight: Tensor, scale: Tensor | None = None, shift: Tensor | None = None, *,
    accumulate: bool = False, activation: str = "identity", stride: int = 1, bank: Tensor | None = None,
    active: Tensor | None = None,
) -> Tensor:
    """`conv1x1` written to `out`; with `accumulate`, `out` is the residual as well. No backward.

    Args:
        out: (N, C, OH, OW), any strides and floating dtype; shares no memory with x.
        active: int32, one value or one per sample: where 0 its programs exit before they read anything else, and `out`
            keeps its bits, also where a tile spans many samples.

    Returns:
        out.

    Raises:
        ValueError: as `conv1x1`, and if x shares memory with `out`.
        RuntimeError: a gradient would be needed.
    """
    check_inference("conv1x1_", out, x, weight, scale, shift)
    x, weight = in_autocast(x, weight)
    _conv1x1_(out, x, weight, scale, shift, accumulate, bank, active, activation, stride)
    return out


def linear(
    x: Tensor, weight: Tensor, scale: Tensor | None = None, shift: Tensor | None = None, *,
    residual: Tensor | None = None, activation: str = "identity", bank: Tensor | None = None,
) -> Tensor:
    """`act(x @ weight.T * scale + shift + residual)`: `conv1x1` for channels on the last axis; same bytes and limits.

    Args:
        x: (N, ..., K), N samples; axes between the first and the last must be viewable as one (no copy is made).
            In fp32 TF32 is used as `torch.backends.cuda.matmul` says.
        weight: (C, K), cast like that of `conv1x1`.
        scale, shift, bank: as for `conv1x1`; a plain bias is `shift`.
        residual: (N, ..., C), viewable likewise.

    Returns:
        (N, ..., C), contiguous; its dtype that of `x + residual`.

    Raises:
        ValueError: shapes, strides, dtypes or devices do not fit; the message says what to pass.
    """
    x, weight = in_autocast(x, weight)
    shape = (*x.shape[:-1], *weight.shape[:1])
    y = _linear(_rows(x, "x"), weight, scale, shift, _rows(residual, "residual", shape), bank, activation)
    return y.view(shape)


def linear_(
    out: Tensor, x: Tensor, weight: Tensor, scale: Tensor | None = None, shift: Tensor | None = None, *,
    accumulate: bool = False, activation: str = "identity", bank: Tensor | None = None, active: Tensor | None = None,
) -> Tensor:
    """`linear` written to `out` (N, ..., C) as `conv1x1_` does it."""
    check_inference("linear_", out, x, weight, scale, shift)
    x, weight = in_autocast(x, weight)
    shape = (*x.shape[:-1], *weight.shape[:1])
    _linear_(_rows(out, "out", shape), _rows(x, "x"), weight, scale, shift, accumulate, bank, active, activation)
    return out


def _rows(x: Tensor | None, name: str, shape: tuple[int, ...] | None = None) -> Tensor | None:
    """(N, ..., K) viewed as (N, L, K); raises ValueError if it cannot be, or has another than the given shape."""
    if x is not None and shape is not None and x.shape != shape:
        raise ValueError(f"{name} has shape {tuple(x.shape)}; the output has {tuple(shape)}")
    if x is None or x.ndim == 3:
        return x
    if x.ndim < 2:
        raise ValueError(f"{name} has shape {tuple(x.shape)}; pass (N, ..., channels)")
    sizes, strides = x.shape[1:-1], x.stride()[1:-1]
    for i in range(len(sizes) - 1):
        if sizes[i] != 1 and strides[i] != sizes[i + 1] * strides[i + 1]:
            raise ValueError(f"the axes of {name} between the first and the last cannot be viewed as one: shape "
                             f"{tuple(x.shape)}, strides {x.stride()}; pass {name}.contiguous()")
    return x.view(x.shape[0], math.prod(sizes), x.shape[-1])
