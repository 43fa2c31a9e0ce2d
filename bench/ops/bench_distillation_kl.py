"""The KL terms of self-distillation: over logits, with the teacher's largest 500 of 1000 classes, and over pooled
features; both ways."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from cases import BACKWARD, FORWARD, Case, Cost, image, shape_text
from shapes import Feature, Layer, Logits

import adn.distill
from adn_kernels.distillation_kl import distillation_kl, feature_kl


def cases(layer: Layer, batch: int, dtype: torch.dtype) -> Iterator[Case]:
    if isinstance(layer, Logits):
        sizes = (batch * layer.rows, layer.classes)
        settings = {"temperature": 2.0, "top_classes": 500 if layer.classes == 1000 else None}

        def inputs():
            return torch.randn(sizes, dtype=dtype), torch.randn(sizes, dtype=dtype)

        def ours(teacher, student):
            return distillation_kl(teacher, student, **settings)

        def eager(teacher, student):
            return adn.distill.distillation_kl(teacher, student, **settings)
    elif isinstance(layer, Feature):
        sizes = (batch, layer.channels, layer.side, layer.side)

        def inputs():
            return image(*sizes[:3], dtype), image(*sizes[:3], dtype)

        def ours(teacher, student):
            return feature_kl(teacher, student)

        def eager(teacher, student):
            return adn.distill.distillation_kl(adn.distill.pool_features(teacher, 1),
                                               adn.distill.pool_features(student, 1))
    else:
        return
    tensor = torch.Size(sizes).numel() * dtype.itemsize
    # Backward writes the student's gradient; of logits both inputs are read again, of features a value per channel.
    backward = Cost(3 * tensor if isinstance(layer, Logits) else tensor)
    yield Case("distillation_kl", layer.network, layer.name, layer.count, batch, shape_text(*sizes), dtype, inputs,
               {"ours": ours, "eager": eager}, {FORWARD: Cost(2 * tensor), BACKWARD: backward}, grads=(1,))


@pytest.mark.gpu
def test_distillation_kl(bench) -> None:
    bench()
