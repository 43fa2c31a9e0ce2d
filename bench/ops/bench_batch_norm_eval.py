"""Batch norm with fixed statistics, with residual and activation."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from cases import BACKWARD, FORWARD, Case, Cost, image, shape_text, vectors
from shapes import Layer, Norm

from adn_kernels.activation import act_reference
from adn_kernels.batch_norm_eval import batch_norm_eval


def cases(layer: Layer, batch: int, dtype: torch.dtype) -> Iterator[Case]:
    if not isinstance(layer, Norm):
        return
    sizes = (batch, layer.channels, layer.side, layer.side)
    tensor = torch.Size(sizes).numel() * dtype.itemsize
    what = ("batch_norm_eval", layer.network, layer.name, layer.count, batch, shape_text(*sizes), dtype)
    cost = Cost((3 if layer.residual else 2) * tensor)

    def inputs():
        weight, bias = vectors(layer.channels)
        running_var, running_mean = vectors(layer.channels)
        x = image(batch, layer.channels, layer.side, dtype)
        return x, weight, bias, running_mean, running_var, torch.randn_like(x) if layer.residual else None

    def ours(x, weight, bias, running_mean, running_var, residual):
        return batch_norm_eval(x, weight, bias, running_mean, running_var, residual=residual,
                               activation=layer.activation)

    def eager(x, weight, bias, running_mean, running_var, residual):
        z = F.batch_norm(x, running_mean, running_var, weight, bias)
        return act_reference(z if residual is None else z + residual, layer.activation)

    contenders = {"ours": ours, "eager": eager}
    yield Case(*what, inputs, contenders, {FORWARD: cost})
    # Of a norm that is frozen in training: dy and x are read, dx is written, and so with the residual.
    yield Case(*what, inputs, contenders, {BACKWARD: Cost((5 if layer.residual else 3) * tensor)},
               grads=(0, 1, 2, 5) if layer.residual else (0, 1, 2))


@pytest.mark.gpu
def test_batch_norm_eval(bench) -> None:
    bench()
