"""Batch norm in training, with residual and activation: one pass for the statistics, one to apply them; both ways."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from cases import BACKWARD, FORWARD, Case, Cost, image, shape_text, vectors
from shapes import Layer, Norm

from adn_kernels.activation import act_reference
from adn_kernels.batch_norm import batch_norm


def cases(layer: Layer, batch: int, dtype: torch.dtype) -> Iterator[Case]:
    if not isinstance(layer, Norm):
        return
    sizes = (batch, layer.channels, layer.side, layer.side)
    tensor = torch.Size(sizes).numel() * dtype.itemsize

    def inputs():
        weight, bias = vectors(layer.channels)
        running_var, running_mean = vectors(layer.channels)
        x = image(batch, layer.channels, layer.side, dtype)
        return x, weight, bias, running_mean, running_var, torch.randn_like(x) if layer.residual else None

    def ours(x, weight, bias, running_mean, running_var, residual):
        return batch_norm(x, weight, bias, running_mean, running_var, residual=residual, activation=layer.activation)[0]

    def eager(x, weight, bias, running_mean, running_var, residual):
        z = F.batch_norm(x, running_mean, running_var, weight, bias, training=True)
        return act_reference(z if residual is None else z + residual, layer.activation)

    # A tensor beyond the cache has to be read twice, for its statistics and to be normalised; so have its gradient
    # and it in the backward, which writes the residual's gradient in its first pass and reads that in its second.
    yield Case(
        "batch_norm", layer.network, layer.name, layer.count, batch, shape_text(*sizes), dtype, inputs,
        {"ours": ours, "eager": eager},
        {FORWARD: Cost((4 if layer.residual else 3) * tensor), BACKWARD: Cost((7 if layer.residual else 5) * tensor)},
        grads=(0, 1, 2, 5) if layer.residual else (0, 1, 2))


@pytest.mark.gpu
def test_batch_norm(bench) -> None:
    bench()
