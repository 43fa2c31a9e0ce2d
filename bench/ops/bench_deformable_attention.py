"""Deformable attention, against `grid_sample` level by level; its gradients also in the deterministic form."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from cases import BACKWARD, FORWARD, Case, Cost, shape_text
from shapes import Deformable, Layer

from adn_kernels.deformable_attention import deformable_attention, deformable_attention_reference


def cases(layer: Layer, batch: int, dtype: torch.dtype) -> Iterator[Case]:
    if not isinstance(layer, Deformable):
        return
    shapes = [(side, side) for side in layer.sides]
    flat = [side for side in layer.sides for _ in range(2)]
    value_sizes = (batch, sum(side ** 2 for side in layer.sides), layer.heads, layer.dim)
    sizes = (batch, layer.queries, layer.heads, len(shapes), layer.points)

    def inputs():
        """Locations and weights in float32, as autocast leaves them; points around the centre of a box."""
        centres = torch.rand(batch, layer.queries, 1, 1, 1, 2)
        locations = centres + 0.05 * torch.randn(*sizes, 2)
        return torch.randn(value_sizes, dtype=dtype), locations, torch.randn(sizes).flatten(3).softmax(-1).view(sizes)

    def ours(value, locations, weights):
        return deformable_attention(value, shapes, locations, weights, deterministic=False)

    def deterministic(value, locations, weights):
        return deformable_attention(value, shapes, locations, weights, deterministic=True)

    def eager(value, locations, weights):
        return deformable_attention_reference(value, flat, locations, weights)

    points = torch.Size(sizes).numel()
    value = torch.Size(value_sizes).numel() * dtype.itemsize
    read = min(value, points * 4 * layer.dim * dtype.itemsize)  # four pixels for each point
    out = batch * layer.queries * layer.heads * layer.dim * dtype.itemsize
    places = points * 3 * 4  # x, y and weight
    yield Case("deformable_attention", layer.network, layer.name, layer.count, batch, shape_text(*value_sizes), dtype,
               inputs, {"ours": ours, "deterministic": deterministic, "eager": eager},
               {FORWARD: Cost(read + places + out, points * 8 * layer.dim),
                BACKWARD: Cost(read + value + 2 * places + out, points * 16 * layer.dim)}, grads=(0, 1, 2))


@pytest.mark.gpu
def test_deformable_attention(bench) -> None:
    bench()
