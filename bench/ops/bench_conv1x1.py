"""1x1 convolution and linear layer, with the norm (or bias), residual and activation after it; where cuDNN has a fused
one, that is an opponent."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from cases import FORWARD, NONE_ACTIVE, Case, Cost, conv_cases, none_active, shape_text, vectors
from shapes import Conv, Layer, Linear

from adn_kernels.activation import act_reference
from adn_kernels.conv import cudnn_conv
from adn_kernels.conv1x1 import conv1x1, conv1x1_, linear, linear_


def cases(layer: Layer, batch: int, dtype: torch.dtype) -> Iterator[Case]:
    if isinstance(layer, Conv) and layer.kernel == 1 and layer.groups == 1:
        yield from conv_cases("conv1x1", conv1x1, conv1x1_, layer, batch, dtype, cudnn=cudnn_conv)
    elif isinstance(layer, Linear):
        yield from _linear(layer, batch, dtype)


def _linear(layer: Linear, batch: int, dtype: torch.dtype) -> Iterator[Case]:
    sizes = (batch, layer.rows, layer.inputs)
    weights, rows = layer.inputs * layer.channels, batch * layer.rows
    moved = rows * (layer.inputs + layer.channels * (2 if layer.residual else 1)) + weights
    what = ("linear", layer.network, layer.name, layer.count, batch, shape_text(*sizes), dtype)

    def inputs():
        weight = (torch.randn(layer.channels, layer.inputs) * layer.inputs ** -0.5).to(dtype)
        bias = vectors(layer.channels)[1]
        residual = torch.randn(batch, layer.rows, layer.channels, dtype=dtype) if layer.residual else None
        return torch.randn(sizes, dtype=dtype), weight, bias, bias.to(dtype), residual

    def ours(x, weight, bias, _, residual):
        return linear(x, weight, None, bias, residual=residual, activation=layer.activation)

    def eager(x, weight, _, bias, residual):
        z = F.linear(x, weight, bias)
        return act_reference(z if residual is None else z + residual, layer.activation)

    yield Case(*what, inputs, {"ours": ours, "eager": eager},
               {FORWARD: Cost(moved * dtype.itemsize, 2 * rows * weights)})

    def bypassed_inputs():
        x, weight, bias, _, residual = inputs()
        out = torch.randn(batch, layer.rows, layer.channels, dtype=dtype) if residual is None else residual
        return out, x, weight, bias, none_active(batch)

    def bypassed(out, x, weight, bias, active):
        return linear_(out, x, weight, None, bias, accumulate=layer.residual, activation=layer.activation,
                       active=active)

    yield Case(*what, bypassed_inputs, {"ours": bypassed}, {NONE_ACTIVE: Cost(4 * batch)},
               reference=lambda out, *_: out)


@pytest.mark.gpu
def test_conv1x1(bench) -> None:
    bench()
