"""What the parts of RT-DETR are made of: convolution with norm, perceptron, tables that follow from sizes."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_KEPT_TABLES = 64


class ConvNorm(nn.Module):
    """Convolution without bias, padded to keep the size, batch norm, activation."""

    def __init__(self, channels: int, out_channels: int, kernel: int, stride: int = 1, act: nn.Module | None = None
                 ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, out_channels, kernel, stride, (kernel - 1) // 2, bias=False)
        self.norm = nn.BatchNorm2d(out_channels)
        self.act = nn.Identity() if act is None else act

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(x)))


class MLP(nn.Module):
    """Linear layers with ReLU between them: `layers` of them, hidden ones of one width."""

    def __init__(self, dim: int, hidden: int, out: int, layers: int) -> None:
        super().__init__()
        widths = [dim, *[hidden] * (layers - 1), out]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(widths))

    def forward(self, x: Tensor) -> Tensor:
        *hidden, last = self.layers
        for layer in hidden:
            x = F.relu(layer(x))
        return last(x)


class Tables(nn.Module):
    """Base of modules that give tensors which follow from sizes alone, computed once for each size.

    None is dropped again, since a CUDA graph may hold its address; from the 65th size on they are computed anew in each
    call.
    """

    def __init__(self) -> None:
        super().__init__()
        self._kept: dict[Hashable, tuple[Tensor, ...]] = {}

    def kept(self, key: Hashable, device: torch.device, dtype: torch.dtype, make: Callable[[], tuple[Tensor, ...]]
             ) -> tuple[Tensor, ...]:
        """What `make` returns, on that device; as `dtype` if floating."""
        if torch.compiler.is_compiling():
            return tuple(_as(table, device, dtype) for table in make())
        key = key, device, dtype
        if key in self._kept:
            return self._kept[key]
        with torch.inference_mode(False), torch.no_grad(), torch.device("cpu"):  # gradients may be wanted later
            tables = tuple(_as(table, device, dtype) for table in make())
        if len(self._kept) < _KEPT_TABLES:
            self._kept[key] = tables
        return tables

    def __getstate__(self) -> dict:
        return {**super().__getstate__(), "_kept": {}}


def _as(table: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    return table.to(device, dtype if table.is_floating_point() else table.dtype)
