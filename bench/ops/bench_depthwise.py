"""Depthwise convolution with the norm and activation after it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from cases import Case, conv_cases
from shapes import Conv, Layer

from adn_kernels.depthwise import depthwise, depthwise_, tap_major


def cases(layer: Layer, batch: int, dtype: torch.dtype) -> Iterator[Case]:
    if isinstance(layer, Conv) and layer.depthwise:
        yield from conv_cases("depthwise", depthwise, depthwise_, layer, batch, dtype, prepare=tap_major)


@pytest.mark.gpu
def test_depthwise(bench) -> None:
    bench()
