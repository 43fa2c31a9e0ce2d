"""The convolution that chooses its implementation by a table of measured ones, on weights that the norm is folded into.
Where it chooses a Triton kernel, that is timed as `conv1x1`, `conv3x3` or `depthwise`, and not a second time here."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import pytest
import torch
from cases import Case, conv_cases, image
from shapes import Conv, Layer

from adn_kernels.conv import choose, conv, conv_, cudnn_conv


def cases(layer: Layer, batch: int, dtype: torch.dtype) -> Iterator[Case]:
    if isinstance(layer, Conv) and layer.kernel % 2 and chosen(layer, batch, dtype) != "triton":
        settings = {"padding": layer.kernel // 2, "groups": layer.groups}
        forward, *_ = conv_cases("conv", functools.partial(conv, **settings), functools.partial(conv_, **settings),
                                 layer, batch, dtype, cudnn=cudnn_conv, folded=True)
        yield forward


def chosen(layer: Conv, batch: int, dtype: torch.dtype) -> str:
    """What the op chooses for the layer, by the table of the GPU at hand."""
    with torch.device("meta"):
        x = image(batch, layer.inputs, layer.side, dtype)
        weight = torch.empty(layer.channels, layer.inputs // layer.groups, layer.kernel, layer.kernel, dtype=dtype)
        residual = image(batch, layer.channels, layer.out_side, dtype) if layer.residual else None
    return choose(x, weight, None, residual, None, layer.activation, layer.stride, layer.kernel // 2, layer.groups,
                  backend=None)


@pytest.mark.gpu
def test_conv(bench) -> None:
    bench()
