"""Fused convolution by whichever implementation is fastest: cuDNN's fused one, the Triton kernels, or in two passes.

Which, is a table of measured choices per shape (kernel "conv" of `launch.tuned`). Where nothing was measured:

- 3x3 ReLU convolutions on folded weights (`fold`): "cudnn".
- 3x3 convolutions of a number of channels that 8 does not divide, as of an image: "unfused". The Triton kernel would
  load each element by an address of its own, for three useful ones of sixteen in a product.
- 1x1, 3x3 (`gemm.py`) and depthwise (`depthwise.py`) convolutions otherwise: "triton". It alone leaves out work on a
  device's flag, so with `active` it is taken whatever was measured.
- Anything else, as grouped convolutions: "unfused", torch's convolution and then one pass for all that follows.

All are for inference: nothing here has a backward.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import custom_op, triton_op

from .bank import Vectors, banks
from .batch_norm_eval import launch_batch_norm_eval
from .depthwise import KERNEL_SIZES, launch_depthwise
from .epilogue import (
    check_epilogue,
    check_inference,
    check_same_kind,
    conv_reference,
    empty_output,
    in_autocast,
    write_active,
)
from .gemm import launch_gemm
from .launch import on_gpu, tuned
from .view import memory_format, stride_in

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


def lay_out(weight: Tensor, groups: int) -> Tensor:
    """The same weight (C, K / groups, kh, kw) with the strides that NHWC is read by fastest. A copy, to be made once;
    any other strides are right as well, and slower.

    Channels of the input are adjacent, as in channels_last; those of the output in a depthwise weight, which has only
    one of the input: the taps of a block of channels are then read 16 bytes at a time.
    """
    if weight.shape[1] == 1 and weight.shape[0] == groups and weight.shape[-1] in KERNEL_SIZES:
        return weight.permute(2, 3, 1, 0).contiguous().permute(3, 2, 0, 1)
    return weight.contiguous(memory_format=torch.channels_last)


def out_shape(x: Tensor, weight: Tensor, stride: int, padding: int) -> tuple[int, int, int, int]:
    """The shape of a convolution's output; unchecked, see `check_conv`."""
    n, _, h, w = x.shape
    channels, _, kh, kw = weight.shape
    return n, channels, (h + 2 * padding - kh) // stride + 1, (w + 2 * padding - kw) // stride + 1


def check_conv(x: Tensor, weight: Tensor, stride: int, padding: int, groups: int) -> tuple[int, int, int, int]:
    """The shape of a convolution's output; raises ValueError if there is none. Guards no symbolic size.

    Args:
        x: (N, K, H, W). weight: (C, K / groups, kh, kw), of x's dtype.
    """
    if x.ndim != 4:
        raise ValueError(f"x has shape {tuple(x.shape)}; pass (N, K, H, W)")
    depth = x.shape[1]
    if weight.ndim != 4 or groups < 1 or weight.shape[1] * groups != depth or weight.shape[0] % groups:
        channels, each = ("C", depth) if groups == 1 else (f"C divisible by {groups}", f"{depth} / {groups}")
        raise ValueError(f"weight has shape {tuple(weight.shape)}; pass ({channels}, {each}, kh, kw) "
                         f"for x of shape {tuple(x.shape)}")
    check_same_kind(x, weight)
    if stride < 1 or padding < 0:
        raise ValueError(f"stride={stride}, padding={padding}; pass a stride of 1 or more, a padding of 0 or more")
    shape = out_shape(x, weight, stride, padding)
    *_, height, width = shape
    if (isinstance(height, int) and height < 1) or (isinstance(width, int) and width < 1):
        raise ValueError(f"x of shape {tuple(x.shape)} with padding {padding} is smaller than the "
                         f"{weight.shape[2]}x{weight.shape[3]} weight")
    return shape


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


def launch_conv_cudnn(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, activation: str, stride: int, padding: int,
    groups: int,
) -> Tensor:
    """In one kernel with ReLU; else convolution and addition apart."""
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


# An op of its own, and not a `triton_op`, as cuDNN's fused convolutions have no meta kernels to trace `conv` with.
@custom_op("adn::conv_cudnn", mutates_args=())
def conv_cudnn_op(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, activation: str, stride: int, padding: int,
    groups: int,
) -> Tensor:
    if not x.shape[0]:  # which cuDNN refuses
        return empty_output(x, out_shape(x, weight, stride, padding), None)
    return launch_conv_cudnn(x, weight, bias, residual, activation, stride, padding, groups)


@conv_cudnn_op.register_fake
def _(x, weight, bias, residual, activation, stride, padding, groups):
    return empty_output(x, out_shape(x, weight, stride, padding), None)


# The dispatcher


def _kind(x: Tensor, weight: Tensor, stride: int, padding: int, groups: int) -> str | None:
    """Which Triton kernel computes this convolution; None if none does."""
    channels, _, kh, kw = weight.shape
    if groups == 1 and kh == kw and (kh == 3 or (kh == 1 and padding == 0)):
        return "gemm"
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
    channels, _, kh, kw = weight.shape
    n, depth, h, w = x.shape
    if kind == "gemm" and kh == 3:
        if activation == "relu" and by_cudnn:
            default = "cudnn"
        elif depth % 8:
            default = "unfused"
    # Scale, bank and an output given say no more than that cuDNN is not among the candidates.
    measured = tuned(
        "conv", x.device, {"backend": default}, n=n, depth=depth, h=h, w=w, channels=channels, kh=kh, kw=kw,
        stride=stride, padding=padding, groups=groups, activation=activation, dtype=str(x.dtype),
        residual=int(residual is not None), cudnn=int(by_cudnn),
        channels_last=int(x.stride(1) == 1),
    )["backend"]
    return measured if _refusal(measured, *call) is None else default


def _unfused(
    x: Tensor, weight: Tensor, scale: Tensor | None, shift: Tensor | None, scale2: Tensor | None,
    shift2: Tensor | None, residual: Tensor | None, bank: Tensor | None, activation: str, stride: int, padding: int,
    groups: int,
) -> Tensor:
    """Torch's convolution, rounded, and one pass over it."""
    # The output has the layout of x if the weight has; no copy if it is kept so.
    form = memory_format(x)
    # Without a bias, which would be a pass of its own. A copy only where cuDNN reads an ambiguous layout otherwise.
    z = F.conv2d(x, weight.contiguous(memory_format=form), None, stride, padding, 1, groups).contiguous(
        memory_format=form)
    if activation == "identity" and scale is shift is residual is None:
        return z
    if residual is not None and residual.numel() and stride_in(residual, form == torch.channels_last) is None:
        residual = residual.contiguous(memory_format=form)
    return launch_batch_norm_eval(
        z, scale, shift, None, None, residual, bank, scale2, shift2, None, None, activation, 0.0)


def launch_conv(
    x: Tensor, weight: Tensor, scale: Tensor | None, shift: Tensor | None, scale2: Tensor | None,
    shift2: Tensor | None, residual: Tensor | None, bank: Tensor | None, activation: str, stride: int, padding: int,
    groups: int, backend: str, out: Tensor | None = None, active: Tensor | None = None,
) -> Tensor:
    """The op on a GPU; `backend` is what `choose` returned. Writes to `out` if given."""
    vectors = scale, shift, scale2, shift2
    if backend == "cudnn":
        # A launch more than it need be, unless shift is of x's dtype as `fold` returns it.
        bias = None if shift is None else shift.to(x.dtype)
        return conv_cudnn_op(x, weight, bias, residual, activation, stride, padding, groups)
    if backend == "unfused":
        y = _unfused(x, weight, *vectors, residual, bank, activation, stride, padding, groups)
        if out is None:
            return y
        write_active(out, y, active)
        return out
    y = empty_output(x, out_shape(x, weight, stride, padding), residual) if out is None else out
    if y.numel():
        kernel = launch_gemm if _kind(x, weight, stride, padding, groups) == "gemm" else launch_depthwise
        kernel(y, x, weight, *vectors, residual, bank, active, activation, stride, padding)
    return y


# An op, not a function that calls ops: a compiler would trace into the reading of the table.
@triton_op("adn::conv", mutates_args=())
def conv_op(
    x: Tensor, weight: Tensor, scale: Tensor | None, shift: Tensor | None, scale2: Tensor | None,
    shift2: Tensor | None, residual: Tensor | None, bank: Tensor | None, activation: str, stride: int, padding: int,
    groups: int, backend: str | None,
) -> Tensor:
    shape = check_conv(x, weight, stride, padding, groups)
    check_epilogue(x, shape, residual, activation, bank)
    backend = choose(x, weight, scale, residual, bank, activation, stride, padding, groups, backend)
    arguments = (x, weight, scale, shift, scale2, shift2, residual, bank, activation, stride, padding, groups)
    if on_gpu(x, residual):
        return launch_conv(*arguments, backend)
    return empty_output(x, shape, residual).copy_(conv_reference(*arguments))


@triton_op("adn::conv_", mutates_args=("out",))
def conv_inplace_op(
    out: Tensor, x: Tensor, weight: Tensor, shift: Tensor | None, residual: Tensor | None, accumulate: bool,
    active: Tensor | None, activation: str, stride: int, padding: int, groups: int, backend: str | None,
) -> None:
    if accumulate and residual is not None:
        raise ValueError("residual is given and accumulate, which makes `out` the residual: pass one of them")
    shape = check_conv(x, weight, stride, padding, groups)
    check_epilogue(x, shape, residual, activation, None, out, active, weight=weight, shift=shift)
    residual = out if accumulate else residual
    backend = choose(x, weight, None, residual, None, activation, stride, padding, groups, backend, in_place=True,
                     bypassed=active is not None)
    arguments = (x, weight, None, shift, None, None, residual, None, activation, stride, padding, groups)
    if on_gpu(x, out):
        launch_conv(*arguments, backend, out, active)
    else:
        write_active(out, conv_reference(*arguments), active)


def conv(
    x: Tensor, weight: Tensor, scale: Vectors = None, shift: Vectors = None, *, residual: Tensor | None = None,
    activation: str = "identity", stride: int = 1, padding: int = 0, groups: int = 1, bank: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """`act(conv2d(x, weight, ...) * scale + shift + residual)` by the fastest backend, see the head of this module.

    Sums float32, rounded once (unfused: twice). Bytes and limits of the kernels are in the heads of `gemm.py` and
    `depthwise.py`; cuDNN moves as much with ReLU, and without it the output three times if there is a residual; the
    unfused form reads and writes the output once more if anything follows the convolution.

    Args:
        x: (N, K, H, W), any strides; NHWC is read in 16-byte pieces. fp32 (TF32 as `torch.backends.cudnn.conv` says),
            fp16, bf16; on other devices and in float64 the reference computes. Under `torch.autocast` it is cast to its
            type, as is the input of torch's convolutions.
        weight: (C, K / groups, kh, kw), cast to x's dtype, a pass over it, if it has another; fastest as `lay_out` lays
            it out.
        scale: (C,), any floating dtype: an eval-mode norm, see `fold_norm`; None for folded weights, the only ones
            cuDNN takes.
        shift: as scale, or a bias; fastest for cuDNN in x's dtype, as `fold` returns it.
        residual: (N, C, OH, OW), any strides and floating dtype.
        bank: int32, one value or one per sample, read on the device: 0 the first bank, else the second. Then scale and
            shift are pairs (first, second), each of them or both.
        backend: "cudnn", "triton" or "unfused" instead of the measured choice.

    Returns:
        (N, C, OH, OW) in the layout of x; its dtype that of `x + residual`.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or `backend` does not compute this; the message says what.
        RuntimeError: a gradient would be needed.
    """
    x, weight = in_autocast(x, weight)
    first, second = banks(x, weight.shape[0] if weight.ndim else 0, bank, scale=scale, shift=shift)
    if bank is not None and all(vector is None for vector in first):
        raise ValueError("`bank` is given but neither scale nor shift to choose from")
    check_inference("conv", x, weight, *first, *second, residual)
    return conv_op(x, weight, *first, *second, residual, bank, activation, stride, padding, groups, backend)


def conv_(
    out: Tensor, x: Tensor, weight: Tensor, shift: Tensor | None = None, *, residual: Tensor | None = None,
    accumulate: bool = False, activation: str = "identity", stride: int = 1, padding: int = 0, groups: int = 1,
    active: Tensor | None = None, backend: str | None = None,
) -> Tensor:
    """`conv` of a folded weight written to `out`; with `accumulate`, `out` is the residual as well.

    Args:
        out: (N, C, OH, OW), any strides and floating dtype; shares no memory with what is read, though it may be some
            channels of a tensor of which others are read.
        residual: as that of `conv`.
        active: int32, one value or one per sample: where 0, `out` keeps its bits. Programs of the Triton kernels exit
            before they read anything else, also where a tile spans many samples; the unfused form computes and drops.

    Returns:
        out.

    Raises:
        ValueError: as `conv`, and if what is read shares memory with `out`, or with both residual and accumulate.
        RuntimeError: a gradient would be needed.
    """
    x, weight = in_autocast(x, weight)
    (shift,), _ = banks(x, weight.shape[0] if weight.ndim else 0, None, shift=shift)
    check_inference("conv_", out, x, weight, shift, residual)
    conv_inplace_op(out, x, weight, shift, residual, accumulate, active, activation, stride, padding, groups, backend)
    return out
