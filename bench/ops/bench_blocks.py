"""Residual blocks as the deploy form runs them: one launch per convolution and nothing between; the refinement form in
place on the residual stream, with all, half or none of the samples active."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from cases import FORWARD, NONE_ACTIVE, Case, Cost, conv_norm_act, epilogue_inputs, filters, image, shape_text
from shapes import Block, Layer
from torch import Tensor

from adn_kernels.conv import conv, conv_, fold, lay_out

# kernel, inputs, channels, groups, stride
Filter = tuple[int, int, int, int, int]


def cases(layer: Layer, batch: int, dtype: torch.dtype) -> Iterator[Case]:
    if not isinstance(layer, Block):
        return
    bottlenecked = layer.kind == "bottleneck"
    k, m, c = layer.inputs, layer.hidden, layer.channels
    convs: list[Filter] = [(1, k, m, 1, 1), (3, m, m, 1 if bottlenecked else m, layer.stride), (1, m, c, 1, 1)]
    if layer.shortcut == "conv":
        convs.append((1, k, c, 1, layer.stride))
    sizes, side = (batch, k, layer.side, layer.side), layer.side // layer.stride
    what = ("blocks", layer.network, layer.name, layer.count, batch, shape_text(*sizes), dtype)

    def inputs(branch: float = 1.0) -> list[Tensor]:
        """x, then of each convolution weight, scale, shift, mean, var, and at the end of each the deployed weight and
        bias; `branch` scales what is added to the stream."""
        found = [image(batch, k, layer.side, dtype)]
        for kernel, inputs, channels, groups, _ in convs:
            found += [filters(channels, inputs // groups, kernel, dtype), *epilogue_inputs(channels, True)]
        found[12] *= branch
        found[13] *= branch
        for i, (*_, groups, _) in enumerate(convs):
            weight, bias = fold(*found[5 * i + 1:5 * i + 4])
            found += [lay_out(weight, groups), bias]
        return found

    def deployed(p: Sequence[Tensor], i: int) -> tuple[Tensor, dict[str, Any]]:
        """Weight and settings of a convolution of the deploy form."""
        kernel, _, _, groups, _ = convs[i]
        weight, bias = p[5 * len(convs) + 2 * i:][:2]
        last = "identity" if i == 3 else layer.activation if bottlenecked or i < 2 else "identity"
        return weight, {"shift": bias, "activation": last, "padding": kernel // 2, "groups": groups}

    def ours(x: Tensor, *p: Tensor) -> Tensor:
        def fused(i: int, z: Tensor, residual: Tensor | None = None) -> Tensor:
            weight, settings = deployed(p, i)
            return conv(z, weight, residual=residual, stride=convs[i][-1], **settings)

        shortcut = {"identity": lambda: x, "conv": lambda: fused(3, x), "none": lambda: None}[layer.shortcut]()
        return fused(2, fused(1, fused(0, x)), shortcut)

    def inplace(x: Tensor, *p: Any) -> Tensor:
        """As `adn.runtime.per_image` runs a refinement block."""
        *p, active = p
        y = x
        for i, (_, _, channels, _, _) in enumerate(convs):
            out = x if i == 2 else torch.empty((batch, channels, layer.side, layer.side), dtype=dtype, device=x.device,
                                               memory_format=torch.channels_last)
            weight, settings = deployed(p, i)
            y = conv_(out, y, weight, accumulate=i == 2, active=active, **settings)
        return y

    def eager(x: Tensor, *p: Tensor) -> Tensor:
        def conv(i: int, z: Tensor, residual: Tensor | None, activation: str) -> Tensor:
            kernel, _, _, groups, stride = convs[i]
            return conv_norm_act(z, *p[5 * i:5 * i + 5], residual, activation, stride, kernel // 2, groups)

        shortcut = {"identity": lambda: x, "conv": lambda: conv(3, x, None, "identity"), "none": lambda: None}
        z = conv(1, conv(0, x, None, layer.activation), None, layer.activation)
        return conv(2, z, shortcut[layer.shortcut](), layer.activation if bottlenecked else "identity")

    def half(x: Tensor, *p: Any) -> Tensor:
        *p, active = p
        return torch.where(active.reshape(-1, 1, 1, 1) != 0, eager(x, *p).to(x.dtype), x)

    def least(samples: int) -> Cost:
        return cost(convs, samples, layer.side, side, dtype, layer.shortcut != "none")

    yield Case(*what, inputs, {"ours": ours, "eager": eager}, {FORWARD: least(batch)}, wall=batch == 1, autotune=True)
    if layer.shortcut != "identity":
        return
    for name, pattern in {"all active": [1], "half active": [0, 1], NONE_ACTIVE: [0]}.items():
        if batch % len(pattern):
            continue

        def flagged(pattern: Sequence[int] = pattern) -> list[Tensor]:
            # The block adds next to nothing, so that the stream is the same after any number of replays.
            return [*inputs(1e-3), torch.tensor(pattern * (batch // len(pattern)), dtype=torch.int32)]

        running = batch * sum(pattern) // len(pattern)
        yield Case(*what, flagged, {"ours": inplace}, {name: least(running) if running else Cost(4 * batch)},
                   reference=half)


def cost(convs: Sequence[Filter], batch: int, side: int, out_side: int, dtype: torch.dtype, residual: bool) -> Cost:
    """Of the convolutions one after the other: each reads and writes its tensors once; the third reads the shortcut."""
    moved = flops = 0
    for i, (kernel, inputs, channels, groups, _) in enumerate(convs):
        before, after = (side if i in (0, 1) else out_side), (side if i == 0 else out_side)
        weights = channels * inputs // groups * kernel ** 2
        moved += batch * (inputs * before ** 2 + channels * after ** 2 * (2 if residual and i == 2 else 1)) + weights
        flops += 2 * batch * weights * after ** 2
    return Cost(moved * dtype.itemsize, flops)


@pytest.mark.gpu
def test_blocks(bench) -> None:
    bench()
