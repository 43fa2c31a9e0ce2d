"""Convolutions as the deploy form has them, their norm folded in: by the Triton kernels ("conv1x1", "conv3x3",
"depthwise"), in place and bypassed, against eager PyTorch and cuDNN's fused one; and by what the op chooses ("conv"),
where that is something else."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from cases import (
    FORWARD,
    NONE_ACTIVE,
    Case,
    Cost,
    conv_norm_act,
    epilogue_inputs,
    filters,
    image,
    none_active,
    shape_text,
)
from shapes import Conv, Layer

from adn_kernels.conv import choose, conv, conv_, fold, lay_out


def cases(layer: Layer, batch: int, dtype: torch.dtype) -> Iterator[Case]:
    if not isinstance(layer, Conv) or not layer.kernel % 2:
        return
    name = "depthwise" if layer.depthwise else f"conv{layer.kernel}x{layer.kernel}" if layer.groups == 1 else ""
    if name in ("conv1x1", "conv3x3", "depthwise"):
        yield from _cases(name, "triton", layer, batch, dtype)
    if chosen(layer, batch, dtype) != "triton":
        yield next(_cases("conv", None, layer, batch, dtype))


def dispatched(layer: Layer, batch: int, dtype: torch.dtype) -> Iterator[Case]:
    """What asks the op to choose: with cuDNN as a candidate where it computes the layer, and without."""
    if isinstance(layer, Conv):
        yield from _cases("conv", None, layer, batch, dtype)


def chosen(layer: Conv, batch: int, dtype: torch.dtype) -> str:
    """What the op chooses for the layer, by the table of the GPU at hand."""
    with torch.device("meta"):
        x = image(batch, layer.inputs, layer.side, dtype)
        weight = torch.empty(layer.channels, layer.inputs // layer.groups, layer.kernel, layer.kernel, dtype=dtype)
        residual = image(batch, layer.channels, layer.out_side, dtype) if layer.residual else None
    return choose(x, weight, None, residual, None, layer.activation, layer.stride, layer.kernel // 2, layer.groups,
                  backend=None)


def _cases(op: str, backend: str | None, layer: Conv, batch: int, dtype: torch.dtype) -> Iterator[Case]:
    """Forward; in place, with no sample active; or, of the op that chooses, in place."""
    padding, side = layer.kernel // 2, layer.out_side
    sizes, out_sizes = (batch, layer.inputs, layer.side, layer.side), (batch, layer.channels, side, side)
    # Of a 1x1 convolution with stride 2 the pixels between are not read.
    read = batch * layer.inputs * (layer.side if layer.kernel >= layer.stride else side) ** 2
    written = torch.Size(out_sizes).numel()
    cost = Cost(dtype.itemsize * (read + layer.weights + written * (2 if layer.residual else 1)),
                2 * layer.weights * batch * side ** 2)
    what = (op, layer.network, layer.name, layer.count, batch, shape_text(*sizes), dtype)
    settings = {"activation": layer.activation, "stride": layer.stride, "padding": padding, "groups": layer.groups}

    def inputs():
        x = image(batch, layer.inputs, layer.side, dtype)
        weight = filters(layer.channels, layer.inputs // layer.groups, layer.kernel, dtype)
        scale, shift, mean, var = epilogue_inputs(layer.channels, layer.norm)
        deployed, bias = (weight, shift.to(dtype)) if scale is None else fold(weight, scale, shift)
        residual = image(*out_sizes[:3], dtype) if layer.residual else None
        return x, weight, lay_out(deployed, layer.groups), bias, scale, shift, mean, var, residual

    def ours(x, _weight, deployed, bias, *rest: Any, by: str | None = backend):
        return conv(x, deployed, None, bias, residual=rest[-1], backend=by, **settings)

    def eager(x, weight, _deployed, bias, scale, shift, mean, var, residual):
        return conv_norm_act(x, weight, scale, bias if scale is None else shift, mean, var, residual, layer.activation,
                             layer.stride, padding, layer.groups)

    contenders = {"ours": ours, "eager": eager}
    if layer.activation in ("identity", "relu"):
        contenders["cudnn"] = partial(ours, by="cudnn")
    yield Case(*what, inputs, contenders, {FORWARD: cost})

    def inplace_inputs():
        x, _, deployed, bias, *_, residual = inputs()
        out = image(*out_sizes[:3], dtype) if residual is None else residual
        return out, x, deployed, bias, *([] if backend is None else [none_active(batch)])

    def inplace(out, x, deployed, bias, active=None):
        return conv_(out, x, deployed, bias, accumulate=layer.residual, active=active, backend=backend, **settings)

    bypassed = {FORWARD: cost} if backend is None else {NONE_ACTIVE: Cost(4 * batch)}
    yield Case(*what, inplace_inputs, {"ours": inplace}, bypassed, reference=lambda out, *_: out)


@pytest.mark.gpu
def test_conv(bench) -> None:
    bench()
