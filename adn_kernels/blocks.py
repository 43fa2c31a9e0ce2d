"""Residual blocks as units: fused convolutions one after the other, with no pass over a tensor in between.

Each block has two forms. `bottleneck`, `basic`, `inverted_residual` compute a new tensor and are differentiable. Those
with an underscore are for refinement blocks in inference: they update the residual stream x in place and can be
bypassed, for the whole batch or per sample, by a value on the device (`active`); where it is 0 the block is the
identity, bit for bit, and its programs exit at once.

A block is as limited as its convolutions: it moves its input, each intermediate tensor twice, and its output, 2 bytes
an element in fp16; at batch 1 its time is that of its launches, one for each convolution.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .conv import conv, conv_
from .epilogue import check_inference
from .launch import check_flags, memory_format


class ConvParams(NamedTuple):
    """A convolution and the eval-mode norm after it.

    Attributes:
        weight: (C, K / groups, k, k).
        scale: float32 (C,), see `epilogue.fold_norm`; None if folded into the weight (`conv.fold`).
        shift: as scale. Both are (2, C) in a block with two banks, picked by its `bank`.
    """

    weight: Tensor
    scale: Tensor | None = None
    shift: Tensor | None = None


def _conv(
    x: Tensor, params: ConvParams, bank: Tensor | None, activation: str, stride: int = 1, groups: int = 1,
    residual: Tensor | None = None,
) -> Tensor:
    """Padded so that stride 1 keeps the size."""
    return conv(x, *params, residual=residual, activation=activation, stride=stride,
                padding=params.weight.shape[-1] // 2, groups=groups, bank=_bank_of(params, bank))


def _bank_of(params: ConvParams, bank: Tensor | None) -> Tensor | None:
    """A norm that is not switched (that of a downsample) has one row, whatever the block's bank."""
    switched = any(vector is not None and vector.ndim == 2 for vector in params[1:])
    return bank if switched else None


def _update(
    x: Tensor, steps: list[tuple[ConvParams, str, int]], bank: Tensor | None, active: Tensor | None
) -> Tensor:
    """The convolutions `steps` (parameters, activation, groups) one after the other, the last added to x in place."""
    y = x
    for i, (params, activation, groups) in enumerate(steps):
        last = i == len(steps) - 1
        if active is None and not last:
            y = _conv(y, params, bank, activation, groups=groups)
            continue
        # Where a sample is inactive the intermediate tensors hold whatever they held; nothing reads it.
        n, _, h, w = x.shape
        out = x if last else torch.empty((n, params.weight.shape[0], h, w), dtype=x.dtype, device=x.device,
                                         memory_format=memory_format(x))
        y = conv_(out, y, *params, accumulate=last, activation=activation, padding=params.weight.shape[-1] // 2,
                  groups=groups, bank=_bank_of(params, bank), active=active)
    return y


def _check(x: Tensor, bank: Tensor | None, *convs: ConvParams | None) -> None:
    """Raises ValueError for a bank that is none, or that no norm would be picked by."""
    if x.ndim != 4:
        raise ValueError(f"x has shape {tuple(x.shape)}; pass (N, K, H, W)")
    check_flags(bank, "bank", x.shape[0], x.device)
    if bank is not None and all(params is None or _bank_of(params, bank) is None for params in convs):
        raise ValueError("`bank` is given, but every scale and shift is of one bank: pass some as (2, C) to pick from")


def _check_update(name: str, x: Tensor, bank: Tensor | None, *convs: ConvParams | None) -> None:
    _check(x, bank, *convs)
    check_inference(name, x, *(tensor for params in convs if params is not None for tensor in params))
    last = convs[-1]
    if last.weight.shape[0] != x.shape[1]:
        raise ValueError(f"the block makes {last.weight.shape[0]} channels of {x.shape[1]}; {name} updates x in place, "
                         f"so pass a block that keeps them")


def bottleneck(
    x: Tensor, conv1: ConvParams, conv2: ConvParams, conv3: ConvParams, *, downsample: ConvParams | None = None,
    stride: int = 1, groups: int = 1, activation: str = "relu", bank: Tensor | None = None,
) -> Tensor:
    """`act(conv3(act(conv2(act(conv1(x))))) + shortcut)`, as in ResNet (v1.5): 3 launches, 4 with downsample.

    Args:
        x: (N, K, H, W).
        conv1, conv2, conv3: 1x1, 3x3 (with stride and groups), 1x1.
        downsample: 1x1 convolution of the shortcut; without it the shortcut is x.
        bank: int32, one value or N: picks in every ConvParams whose scale and shift hold two rows; one has to.

    Returns:
        (N, C, H / stride, W / stride), layout and dtype of x.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or there is a bank and nothing to pick; the message says what.
    """
    _check(x, bank, conv1, conv2, conv3, downsample)
    shortcut = x if downsample is None else _conv(x, downsample, bank, "identity", stride)
    y = _conv(x, conv1, bank, activation)
    y = _conv(y, conv2, bank, activation, stride, groups)
    return _conv(y, conv3, bank, activation, residual=shortcut)


def bottleneck_(
    x: Tensor, conv1: ConvParams, conv2: ConvParams, conv3: ConvParams, *, groups: int = 1, activation: str = "relu",
    bank: Tensor | None = None, active: Tensor | None = None,
) -> Tensor:
    """`bottleneck` of a refinement block: x <- block(x), where `active` (int32, one value or N) is not 0. Returns x.

    A grouped conv2 (groups > 1) has no kernel that can be bypassed: it is computed whatever `active` says, and dropped.

    Args:
        x: (N, C, H, W), any strides; the residual stream.
        conv1, conv2, conv3, bank: as for `bottleneck`.
        active: int32, one value or N; without it every sample is computed.

    Raises:
        ValueError: as `bottleneck`, and if the block does not keep the channels.
        RuntimeError: a gradient would be needed.
    """
    _check_update("bottleneck_", x, bank, conv1, conv2, conv3)
    steps = [(conv1, activation, 1), (conv2, activation, groups), (conv3, activation, 1)]
    return _update(x, steps, bank, active)


def basic(
    x: Tensor, conv1: ConvParams, conv2: ConvParams, *, downsample: ConvParams | None = None, stride: int = 1,
    activation: str = "relu", bank: Tensor | None = None,
) -> Tensor:
    """`act(conv2(act(conv1(x))) + shortcut)`, as in ResNet-18: 2 launches, 3 with downsample.

    Args:
        x: (N, K, H, W).
        conv1, conv2: 3x3, the first with stride.
        downsample, bank: as for `bottleneck`.

    Returns:
        (N, C, H / stride, W / stride), layout and dtype of x.

    Raises:
        ValueError: as `bottleneck`.
    """
    _check(x, bank, conv1, conv2, downsample)
    shortcut = x if downsample is None else _conv(x, downsample, bank, "identity", stride)
    y = _conv(x, conv1, bank, activation, stride)
    return _conv(y, conv2, bank, activation, residual=shortcut)


def basic_(
    x: Tensor, conv1: ConvParams, conv2: ConvParams, *, activation: str = "relu", bank: Tensor | None = None,
    active: Tensor | None = None,
) -> Tensor:
    """`basic` of a refinement block: x <- block(x), where `active` is not 0. Returns x.

    Args:
        x: (N, C, H, W), any strides; the residual stream.
        conv1, conv2, bank: as for `basic`. active: as for `bottleneck_`.

    Raises:
        ValueError, RuntimeError: as `bottleneck_`.
    """
    _check_update("basic_", x, bank, conv1, conv2)
    return _update(x, [(conv1, activation, 1), (conv2, activation, 1)], bank, active)


def inverted_residual(
    x: Tensor, expand: ConvParams | None, depthwise: ConvParams, project: ConvParams, *, stride: int = 1,
    activation: str = "relu6", residual: bool | None = None, bank: Tensor | None = None,
) -> Tensor:
    """`project(act(depthwise(act(expand(x))))) (+ x)`, as in MobileNetV2: 3 launches, 2 without expand.

    Args:
        x: (N, K, H, W).
        expand: 1x1, or None. depthwise: k x k with stride. project: 1x1; no activation follows it.
        residual: whether x is added; by default if the shape allows it (stride 1, as many channels).
        bank: as for `bottleneck`.

    Returns:
        (N, C, H / stride, W / stride), layout and dtype of x.

    Raises:
        ValueError: as `bottleneck`.
    """
    _check(x, bank, expand, depthwise, project)
    if residual is None:
        residual = stride == 1 and project.weight.shape[0] == x.shape[1]
    y = x if expand is None else _conv(x, expand, bank, activation)
    y = _conv(y, depthwise, bank, activation, stride, depthwise.weight.shape[0])
    return _conv(y, project, bank, "identity", residual=x if residual else None)


def inverted_residual_(
    x: Tensor, expand: ConvParams | None, depthwise: ConvParams, project: ConvParams, *, activation: str = "relu6",
    bank: Tensor | None = None, active: Tensor | None = None,
) -> Tensor:
    """`inverted_residual` of a refinement block: x <- block(x), where `active` is not 0. Returns x.

    Args:
        x: (N, C, H, W), any strides; the residual stream.
        expand, depthwise, project, bank: as for `inverted_residual`. active: as for `bottleneck_`.

    Raises:
        ValueError, RuntimeError: as `bottleneck_`.
    """
    _check_update("inverted_residual_", x, bank, expand, depthwise, project)
    steps = [] if expand is None else [(expand, activation, 1)]
    steps += [(depthwise, activation, depthwise.weight.shape[0]), (project, "identity", 1)]
    return _update(x, steps, bank, active)
