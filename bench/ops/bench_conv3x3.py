"""3x3 convolution with the norm, residual and activation after it; where cuDNN has a fused one, that is an opponent."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from cases import Case, conv_cases
from shapes import Conv, Layer

from adn_kernels.conv import cudnn_conv
from adn_kernels.conv3x3 import conv3x3, conv3x3_


def cases(layer: Layer, batch: int, dtype: torch.dtype) -> Iterator[Case]:
    if isinstance(layer, Conv) and layer.kernel == 3 and layer.groups == 1:
        yield from conv_cases("conv3x3", conv3x3, conv3x3_, layer, batch, dtype, cudnn=cudnn_conv)


@pytest.mark.gpu
def test_conv3x3(bench) -> None:
    bench()
