"""A net cut into segments, nothing of it fused: what its modules compute, at every depth and at one for each image."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_fuse import converted, forward
from test_per_image import N, alone, flags_of, random_depths
from torch import Tensor, nn

import adn
from adn.runtime.cut import Segment, cut, filled
from adn.runtime.layers import Layer


def run(segments: list[Segment], result: Any, x: Tensor, one: Callable[[Segment, list[Any]], tuple]) -> Tensor:
    values = {segments[0].takes[0]: x}
    with torch.no_grad():
        for segment in segments:
            inputs = [values[name] for name in segment.takes]
            values.update(zip(segment.gives, one(segment, inputs), strict=True))
    return filled(result, values)


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv2_050", "vit_tiny_patch16_224", "swin_tiny_patch4_window7_224",
                                  "convnext_atto"])
def test_segments_compute_what_the_modules_do(name: str) -> None:
    net, x = converted(name)
    net, x = net.double(), x.double()
    segments, result = cut(net)
    assert not any(isinstance(module, Layer) for segment in segments for module in segment.modules())
    held = {id(parameter) for parameter in net.parameters()}
    assert all(id(parameter) in held for segment in segments for parameter in segment.parameters()), "shared"
    for depth in adn.depths(net):
        y = run(segments, result, x, lambda segment, inputs, depth=depth: segment.run(
            segment.flag is not None and depth[segment.flag], *inputs))
        torch.testing.assert_close(y, forward(net, x, depth))

    x = torch.randn(N, *x.shape[1:], dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    depths = random_depths(net)
    flags = flags_of(depths)
    y = run(segments, result, x, lambda segment, inputs: segment.run(False, *inputs) if segment.flag is None else
            segment.per_image(*inputs, flags[segment.flag]))
    torch.testing.assert_close(y, alone(net, x, depths))


def test_segments_name_what_they_hand_on() -> None:
    net, _ = converted("resnet18")
    segments, _ = cut(net)
    given = {segments[0].takes[0]}
    for segment in segments:
        assert given >= set(segment.takes)
        given |= set(segment.gives)
    assert [segment.flag for segment in segments if segment.flag is not None] == [0, 1, 2, 3]
    assert isinstance(segments[1].paths, nn.ModuleList)
