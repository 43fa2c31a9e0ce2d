"""Fused convolution by whichever implementation is fastest: cuDNN's fused one, the Triton kernels, or separate ops.

Which, is a table of measured choices per shape (kernel "conv" of `launch.tuned`). Where nothing was measured:

- 3x3 ReLU convolutions on folded weights (`fold`): cuDNN.
- 1x1, 3x3 and depthwise convolutions otherwise: Triton. It alone leaves out work on a device's flag, so with `active`
  it is taken whatever was measured.
- Anything else, as grouped convolutions: separate ops.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import custom_op, triton_op

from .conv1x1 import launch_conv1x1, launch_conv1x1_
from .conv3x3 import launch_conv3x3, launch_conv3x3_
from .depthwise import KERNEL_SIZES, launch_depthwise, launch_depthwise_
from .epilogue import (
    check_epilogue,
    check_inference,
    conv_act_backward,
    conv_reference,
    empty_output,
    epilogue_reference,
    in_autocast,
    register_backward,
    write_active,
)
from .gemm import check_conv
from .launch import memory_format, on_gpu, tuned

BACKENDS = ("cudnn", "triton", "unfused")


def fold(weight: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """The deploy form of a convolution and the norm that follows: call it once, and `conv` with the result.

    Args:
        weight: (C, K, k, k). scale, shift: (C,), see `epilogue.fold_norm`.

    Returns:
        `weight * scale`, computed in at least float32, in the strides of weight; and shift; both in weight's dtype.
    """
    wide = torch.promote_types(weight.dtype, torch.float32)
    folded = weight.to(wide) * scale.to(wide)[:, None, None, None]
    return torch.empty_like(weight).copy_(folded), shift.to(weight.dtype)


# cuDNN


def _cudnn_refusal(x: Tensor, residual: Tensor | None, activation: str) -> str | None:
    """Why cuDNN does not compute this; None if it does."""
    if torch.version.hip:
        return "there is no cuDNN on ROCm"
    if activation not in ("identity", "relu"):
        return f"cuDNN fuses no {activation}, only relu"
    format = memory_format(x)
    for name, tensor in (("x", x), ("residual", residual)):
        if tensor is not None and not tensor.is_contiguous(memory_format=format):
            return f"{name} has strides {tuple(tensor.stride())}, of which cuDNN would make a {format} copy"
    if residual is not None and residual.dtype != x.dtype:
        return f"residual is {residual.dtype}, x is {x.dtype}"
    return None


def _check_cudnn(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, activation: str, stride: int, padding: int,
    groups: int,
) -> tuple[int, int, int, int]:
    shape = check_conv(x, weight, stride, padding, groups)
    check_epilogue(x, weight, shape, None, bias, None, residual, activation)
    if bias is not None and bias.dtype != x.dtype:
        raise ValueError(f"bias is {bias.dtype}, x is {x.dtype}; pass both in one dtype")
    if refusal := _cudnn_refusal(x, residual, activation):
        raise ValueError(refusal)
    return shape


def launch_cudnn_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, activation: str, stride: int, padding: int,
    groups: int,
) -> Tensor:
    # In any other layout cuDNN would bring x to that of the weight. No copy if the weight is kept in x's.
    weight = weight.contiguous(memory_format=memory_format(x))
    geometry = ([stride] * 2, [padding] * 2, [1, 1], groups)
    if activation == "relu" and residual is not None:
        y = torch.ops.aten.cudnn_convolution_add_relu(x, weight, residual, 1.0, bias, *geometry)
    elif activation == "relu":
        y = torch.ops.aten.cudnn_convolution_relu(x, weight, bias, *geometry)
    else:
        y = F.conv2d(x, weight, bias, *geometry)
        if residual is not None:
            y = y.add_(residual)
    # A copy only where a layout is ambiguous (H = W = 1) and cuDNN read another one off the strides.
    return y.contiguous(memory_format=memory_format(x))


@custom_op("adn::cudnn_conv", mutates_args=())
def _cudnn_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, activation: str, stride: int, padding: int,
    groups: int,
) -> Tensor:
    # Not a `triton_op`, as cuDNN's fused convolutions have no meta kernels to trace it with.
    shape = _check_cudnn(x, weight, bias, residual, activation, stride, padding, groups)
    if on_gpu(x) and x.shape[0]:
        return launch_cudnn_conv(x, weight, bias, residual, activation, stride, padding, groups)
    y = conv_reference(x, weight, None, bias, residual, None, activation, stride, padding, groups)
    return empty_output(x, shape, None).copy_(y)


@_cudnn_conv.register_fake
def _(x, weight, bias, residual, activation, stride, padding, groups):
    return empty_output(x, _check_cudnn(x, weight, bias, residual, activation, stride, padding, groups), None)


def _setup_context_cudnn(ctx, inputs, output):
    *tensors, ctx.activation, ctx.stride, ctx.padding, ctx.groups = inputs
    ctx.save_for_backward(*tensors)


def _backward_cudnn(ctx, dy):
    x, weight, bias, residual = ctx.saved_tensors
    of_x, of_weight, of_bias, of_residual = ctx.needs_input_grad[:4]
    needs = (of_x, of_weight, False, of_bias, of_residual)
    dx, dw, _, dbias, dresidual = conv_act_backward(dy, x, weight, None, bias, residual, None, ctx.activation,
                                                    ctx.stride, ctx.padding, ctx.groups, needs)
    grads = zip((dx, dw, dbias, dresidual), ctx.needs_input_grad)
    return *(grad if need else None for grad, need in grads), None, None, None, None


_cudnn_conv.register_autograd(_backward_cudnn, setup_context=_setup_context_cudnn)


# The dispatcher


def _kind(x: Tensor, weight: Tensor, stride: int, padding: int, groups: int) -> str | None:
    """Which Triton op computes this convolution; None if none does."""
    channels, _, kh, kw = weight.shape
    if groups == 1 and kh == kw == 1 and padding == 0:
        return "conv1x1"
    if groups == 1 and kh == kw == 3:
        return "conv3x3"
    if groups == channels == x.shape[1] and kh == kw and kh in KERNEL_SIZES and stride in (1, 2):
        return "depthwise"
    return None


def _refusal(
    backend: str, x: Tensor, weight: Tensor, scale: Tensor | None, residual: Tensor | None, bank: Tensor | None,
    activation: str, stride: int, padding: int, groups: int, in_place: bool,
) -> str | None:
    """Why this backend does not compute it; None if it does."""
    if backend == "cudnn":
        if scale is not None:
            return "scale is given: fold it into the weight, see `fold`"
        if bank is not None:
            return "cuDNN picks no bank on the device"
        if in_place:
            return "cuDNN writes to no given output"
        return _cudnn_refusal(x, residual, activation)
    if backend == "triton" and _kind(x, weight, stride, padding, groups) is None:
        return (f"there is no Triton kernel for groups={groups}, stride={stride}, padding={padding} and a weight of "
                f"shape {tuple(weight.shape)}")
    return None


def choose(
    x: Tensor, weight: Tensor, scale: Tensor | None, residual: Tensor | None, bank: Tensor | None, activation: str,
    stride: int, padding: int, groups: int, backend: str | None, in_place: bool = False, bypassed: bool = False,
) -> str:
    """The backend that computes a convolution: the one asked for, the measured one, or the default of this module.

    Args:
        in_place: whether it is `conv_` that asks. bypassed: whether with `active`; then nothing measured is asked, for
            it was measured doing all the work.

    Raises:
        ValueError: `backend` does not compute it.
    """
    call = (x, weight, scale, residual, bank, activation, stride, padding, groups, in_place)
    if backend is not None:
        if backend not in BACKENDS:
            raise ValueError(f"backend={backend!r}; pass None or one of {', '.join(map(repr, BACKENDS))}")
        if refusal := _refusal(backend, *call):
            raise ValueError(f"backend={backend!r}: {refusal}")
        return backend
    kind = _kind(x, weight, stride, padding, groups)
    default = "triton" if kind else "unfused"
    if bypassed:
        return default
    by_cudnn = _refusal("cudnn", *call) is None
    if kind == "conv3x3" and activation == "relu" and by_cudnn:
        default = "cudnn"
    n, depth, h, w = x.shape
    channels, _, kh, kw = weight.shape
    # Scale, bank and an output given say no more than that cuDNN is not among the candidates.
    measured = tuned(
        "conv", x.device, {"backend": default}, n=n, depth=depth, h=h, w=w, channels=channels, kh=kh, kw=kw,
        stride=stride, padding=padding, groups=groups, activation=activation, dtype=str(x.dtype),
        residual=int(residual is not None), cudnn=int(by_cudnn),
        channels_last=int(x.stride(1) == 1),
    )["backend"]
    return measured if _refusal(measured, *call) is None else default


def _unfused(
    x: Tensor, weight: Tensor, scale: Tensor | None, shift: Tensor | None, residual: Tensor | None,
    bank: Tensor | None, activation: str, stride: int, padding: int, groups: int,
) -> Tensor:
    """One op after the other, as eager PyTorch would."""
    # The output has the layout of x if the weight has; no copy if it is kept so.
    weight = weight.contiguous(memory_format=memory_format(x))
    is_bias = scale is None and bank is None and shift is not None
    z = F.conv2d(x, weight, shift.to(x.dtype) if is_bias else None, stride, padding, 1, groups)
    y = epilogue_reference(z, scale, None if is_bias else shift, bank, residual, activation)
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    return y.to(dtype, memory_format=memory_format(x))


def launch_conv(
    x: Tensor, weight: Tensor, scale: Tensor | None, shift: Tensor | None, residual: Tensor | None,
    bank: Tensor | None, activation: str, stride: int, padding: int, groups: int, backend: str,
) -> Tensor:
    """`backend` is what `choose` returned."""
    if backend == "cudnn":
        # A launch more than it need be, unless shift is of x's dtype as `fold` returns it.
        bias = None if shift is None else shift.to(x.dtype)
        return _cudnn_conv(x, weight, bias, residual, activation, stride, padding, groups)
    if backend == "unfused":
        return _unfused(x, weight, scale, shift, residual, bank, activation, stride, padding, groups)
    common = (x, weight, scale, shift, residual, bank, activation, stride)
    kind = _kind(x, weight, stride, padding, groups)
    if kind == "conv1x1":
        return launch_conv1x1(*common)
    return launch_conv3x3(*common, padding) if kind == "conv3x3" else launch_depthwise(*common, padding)


def launch_conv_(
    out: Tensor, x: Tensor, weight: Tensor, scale: Tensor | None, shift: Tensor | None, accumulate: bool,
    bank: Tensor | None, active: Tensor | None, activation: str, stride: int, padding: int, groups: int, backend: str,
) -> None:
    """`backend` is what `choose` returned."""
    if backend == "unfused":
        residual = out if accumulate else None
        y = _unfused(x, weight, scale, shift, residual, bank, activation, stride, padding, groups)
        return write_active(out, y, active)
    common = (out, x, weight, scale, shift, accumulate, bank, active, activation, stride)
    kind = _kind(x, weight, stride, padding, groups)
    if kind == "conv1x1":
        return launch_conv1x1_(*common)
    return launch_conv3x3_(*common, padding) if kind == "conv3x3" else launch_depthwise_(*common, padding)


# An op, not a function that calls ops: a compiler would trace into the reading of the table.
@triton_op("adn::conv", mutates_args=())
def _conv(
    x: Tensor, weight: Tensor, scale: Tensor | None, shift: Tensor | None, residual: Tensor | None,
    bank: Tensor | None, activation: str, stride: int, padding: int, groups: int, backend: str | None,
) -> Tensor:
    shape = check_conv(x, weight, stride, padding, groups)
    check_epilogue(x, weight, shape, scale, shift, bank, residual, activation)
    backend = choose(x, weight, scale, residual, bank, activation, stride, padding, groups, backend)
    if not on_gpu(x, residual):
        y = conv_reference(x, weight, scale, shift, residual, bank, activation, stride, padding, groups)
        return empty_output(x, shape, residual).copy_(y)
    return launch_conv(x, weight, scale, shift, residual, bank, activation, stride, padding, groups, backend)


@triton_op("adn::conv_", mutates_args=("out",))
def _conv_(
    out: Tensor, x: Tensor, weight: Tensor, scale: Tensor | None, shift: Tensor | None, accumulate: bool,
    bank: Tensor | None, active: Tensor | None, activation: str, stride: int, padding: int, groups: int,
    backend: str | None,
) -> None:
    shape = check_conv(x, weight, stride, padding, groups)
    check_epilogue(x, weight, shape, scale, shift, bank, None, activation, out, active)
    residual = out if accumulate else None
    backend = choose(x, weight, scale, residual, bank, activation, stride, padding, groups, backend, in_place=True,
                     bypassed=active is not None)
    if not on_gpu(x, out):
        y = conv_reference(x, weight, scale, shift, residual, bank, activation, stride, padding, groups)
        write_active(out, y, active)
    else:
        launch_conv_(out, x, weight, scale, shift, accumulate, bank, active, activation, stride, padding, groups,
                     backend)


register_backward(_conv, lambda x, stride, padding, groups, backend: (stride, padding, groups))


def cudnn_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, residual: Tensor | None = None,
    activation: str = "identity", stride: int = 1, padding: int = 0, groups: int = 1,
) -> Tensor:
    """`act(conv2d(x, weight, bias) + residual)` by cuDNN: in one kernel with ReLU, else add and convolution apart.

    Moves x, the weight, the residual and y once (with `identity` y three times if there is a residual); limited by the
    tensor cores at 3x3.

    Args:
        x: (N, K, H, W), NHWC or NCHW, no slices. Cast by `torch.autocast`, see `conv`.
        weight: (C, K / groups, kh, kw), a norm folded in (`fold`); in x's layout and dtype it is not copied.
        bias: (C,), cast like the weight.
        residual: (N, C, OH, OW), of x's dtype and layout.
        activation: "identity" or "relu".

    Returns:
        (N, C, OH, OW) of x's dtype and layout. The backward recomputes the convolution and is plain PyTorch.

    Raises:
        ValueError: for anything cuDNN does not fuse or would copy first; the message says what.
    """
    x, weight = in_autocast(x, weight)
    if bias is not None:
        x, bias = in_autocast(x, bias)
    return _cudnn_conv(x, weight, bias, residual, activation, stride, padding, groups)


def conv(
    x: Tensor, weight: Tensor, scale: Tensor | None = None, shift: Tensor | None = None, *,
    residual: Tensor | None = None, activation: str = "identity", stride: int = 1, padding: int = 0, groups: int = 1,
    bank: Tensor | None = None, backend: str | None = None,
) -> Tensor:
    """`act(conv2d(x, weight, ...) * scale + shift + residual)` by the fastest backend, see the head of this module.

    Bytes and limits are those of `cudnn_conv`, `conv1x1`, `conv3x3` and `depthwise`; the unfused form moves the output
    once more for each of scale and shift, residual, activation, twice if it reads and writes it.

    Args:
        x: (N, K, H, W). Under `torch.autocast` it is cast to its type, as is the input of torch's convolutions.
        weight: (C, K / groups, kh, kw), cast to x's dtype if it has another; fastest in x's layout, depthwise as
            `tap_major` lays it out.
        scale: float32 (C,), or (2, C) with `bank`; None for folded weights, the only ones cuDNN takes.
        shift: as scale; or of x's dtype, as `fold` returns it.
        residual: (N, C, OH, OW).
        bank: int32, one value or N; picks the row of scale and shift on the device.
        backend: "cudnn", "triton" or "unfused" instead of the measured choice.

    Returns:
        (N, C, OH, OW) in the layout of x; its dtype that of `x + residual`.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or `backend` does not compute this.
    """
    x, weight = in_autocast(x, weight)
    return _conv(x, weight, scale, shift, residual, bank, activation, stride, padding, groups, backend)


def conv_(
    out: Tensor, x: Tensor, weight: Tensor, scale: Tensor | None = None, shift: Tensor | None = None, *,
    accumulate: bool = False, activation: str = "identity", stride: int = 1, padding: int = 0, groups: int = 1,
    bank: Tensor | None = None, active: Tensor | None = None, backend: str | None = None,
) -> Tensor:
    """`conv` written to `out`; with `accumulate`, `out` is the residual as well. No backward.

    Args:
        out: (N, C, OH, OW), any strides and floating dtype; shares no memory with x.
        active: int32, one value or one per sample: where 0, `out` keeps its bits. The Triton kernels leave the work
            out; the unfused form computes it and drops it.

    Returns:
        out.

    Raises:
        ValueError: as `conv`, and if x shares memory with `out`.
        RuntimeError: a gradient would be needed.
    """
    check_inference("conv_", out, x, weight, scale, shift)
    x, weight = in_autocast(x, weight)
    _conv_(out, x, weight, scale, shift, accumulate, bank, active, activation, stride, padding, groups, backend)
    return out
