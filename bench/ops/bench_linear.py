"""Linear layer with its bias, written in place; and bypassed."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from cases import FORWARD, NONE_ACTIVE, Case, Cost, none_active, shape_text, vectors
from shapes import Layer, Linear

from adn_kernels.linear import linear_


def cases(layer: Layer, batch: int, dtype: torch.dtype) -> Iterator[Case]:
    if not isinstance(layer, Linear):
        return
    sizes = (batch, layer.rows, layer.inputs)
    weights, rows = layer.inputs * layer.channels, batch * layer.rows
    what = ("linear", layer.network, layer.name, layer.count, batch, shape_text(*sizes), dtype)
    moved = (rows * (layer.inputs + layer.channels) + weights) * dtype.itemsize

    def inputs():
        weight = (torch.randn(layer.channels, layer.inputs) * layer.inputs ** -0.5).to(dtype)
        out = torch.empty(batch, layer.rows, layer.channels, dtype=dtype)
        return out, torch.randn(sizes, dtype=dtype), weight, vectors(layer.channels)[1].to(dtype)

    def eager(_, x, weight, bias):
        return F.linear(x, weight, bias)

    yield Case(*what, inputs, {"ours": linear_, "eager": eager}, {FORWARD: Cost(moved, 2 * rows * weights)})

    def bypassed_inputs():
        out, *given = inputs()
        return torch.randn_like(out), *given, none_active(batch)

    def bypassed(out, x, weight, bias, active):
        return linear_(out, x, weight, bias, active=active)

    yield Case(*what, bypassed_inputs, {"ours": bypassed}, {NONE_ACTIVE: Cost(4 * batch)},
               reference=lambda out, *_: out)


@pytest.mark.gpu
def test_linear(bench) -> None:
    bench()
