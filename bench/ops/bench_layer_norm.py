"""Layer norm, of tokens or of the sum of a residual stream and a branch; both ways; in place, and bypassed."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from cases import BACKWARD, FORWARD, NONE_ACTIVE, Case, Cost, none_active, shape_text, vectors
from shapes import Layer, LayerNorm

from adn_kernels.layer_norm import layer_norm, layer_norm_


def cases(layer: Layer, batch: int, dtype: torch.dtype) -> Iterator[Case]:
    if not isinstance(layer, LayerNorm):
        return
    sizes = (batch, layer.rows, layer.channels)
    tensor = torch.Size(sizes).numel() * dtype.itemsize
    what = ("layer_norm", layer.network, layer.name, layer.count, batch, shape_text(*sizes), dtype)

    def inputs():
        # Of x's dtype: F.layer_norm takes no other.
        weight, bias = (t.to(dtype) for t in vectors(layer.channels))
        x = torch.randn(sizes, dtype=dtype)
        return x, weight, bias, torch.randn_like(x) if layer.residual else None

    def ours(x, weight, bias, residual):
        return layer_norm(x, weight, bias, residual=residual)

    def eager(x, weight, bias, residual):
        if residual is None:
            return F.layer_norm(x, weight.shape, weight, bias, 1e-6)
        total = x + residual
        return F.layer_norm(total, weight.shape, weight, bias, 1e-6), total

    # With a residual the sum is written as well, and the gradient that comes for it is read.
    yield Case(*what, inputs, {"ours": ours, "eager": eager},
               {FORWARD: Cost((4 if layer.residual else 2) * tensor),
                BACKWARD: Cost((4 if layer.residual else 3) * tensor)},
               grads=(0, 1, 2, 3) if layer.residual else (0, 1, 2))

    def bypassed_inputs():
        x, weight, bias, _ = inputs()
        return torch.randn_like(x), x, weight, bias, none_active(batch)

    def bypassed(out, x, weight, bias, active):
        return layer_norm_(out, x, weight, bias, active=active)

    yield Case(*what, bypassed_inputs, {"ours": bypassed}, {NONE_ACTIVE: Cost(4 * batch)},
               reference=lambda out, *_: out)


@pytest.mark.gpu
def test_layer_norm(bench) -> None:
    bench()
