"""The convolution that chooses its implementation by a table of measured ones: every 1x1, 3x3, grouped and depthwise
layer, against cuDNN's fused convolution too."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import pytest
import torch
from cases import Case, conv_cases
from shapes import Conv, Layer

from adn_kernels.conv import conv, conv_, cudnn_conv


def cases(layer: Layer, batch: int, dtype: torch.dtype) -> Iterator[Case]:
    if isinstance(layer, Conv) and layer.kernel % 2:
        settings = {"padding": layer.kernel // 2, "groups": layer.groups}
        forward, *_ = conv_cases("conv", functools.partial(conv, **settings), functools.partial(conv_, **settings),
                                 layer, batch, dtype, cudnn=cudnn_conv)
        yield forward


@pytest.mark.gpu
def test_conv(bench) -> None:
    bench()
