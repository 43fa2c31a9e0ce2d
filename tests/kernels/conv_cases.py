"""Inputs of fused convolutions, and what plain PyTorch makes of them."""

from __future__ import annotations

import contextlib
import dataclasses
from types import ModuleType
from unittest import mock

import torch
import torch.nn.functional as F
from harness import Guards

from adn_kernels.activation import ACTIVATIONS
from adn_kernels.conv import out_shape
from adn_kernels.gemm import HOPPER_TILE, TILES

ACT = {"identity": lambda z: z, "relu": F.relu, "relu6": F.relu6, "silu": F.silu, "gelu": F.gelu,
       "hardswish": F.hardswish}
assert set(ACT) == set(ACTIVATIONS)

# Every tile an op may use, for tests whose few pixels would always get the smallest.
CONFIGS = [
    *({"BM": bm, "BN": bn, "BK": bk, "num_warps": 8, "num_stages": 3}
      for (bm, bn), bk in zip((HOPPER_TILE, *TILES), (64, 64, 32, 32, 16, 32))),
    {"BM": 16, "BN": 16, "BK": 16, "num_warps": 4, "num_stages": 3},
]
# `active` of six samples
MIXTURES = [None, [0], [1], [0, 0, 0, 0, 0, 0], [1, 0, 0, 1, 0, 1], [0, 0, 1, 0, 0, 0], [-1, 0, 7, 0, 1, 1]]


@dataclasses.dataclass
class Conv:
    """Arguments of a fused convolution; None where left out. The second bank's vectors are there with `bank`."""

    x: torch.Tensor
    weight: torch.Tensor
    scale: torch.Tensor | None = None
    shift: torch.Tensor | None = None
    scale2: torch.Tensor | None = None
    shift2: torch.Tensor | None = None
    residual: torch.Tensor | None = None
    bank: torch.Tensor | None = None
    activation: str = "identity"
    stride: int = 1
    padding: int = 0
    groups: int = 1

    def placed(self, guards: Guards) -> Conv:
        """On the device under test, between guard bands."""
        return self._map(guards.place)

    def double(self) -> Conv:
        return self._map(lambda t: t.double() if t is not None and t.is_floating_point() else t)

    def _map(self, f) -> Conv:
        names = ("x", "weight", *VECTORS, "residual", "bank")
        return dataclasses.replace(self, **{name: f(getattr(self, name)) for name in names})

    def torch(self) -> torch.Tensor:
        """What separate layers of PyTorch compute, each rounding to the type of x."""
        kind = self.x.dtype
        z = F.conv2d(self.x, self.weight, None, self.stride, self.padding, 1, self.groups)
        if self.scale is not None:
            z = (z * self._picked(self.scale, self.scale2)).to(kind)
        if self.shift is not None:
            z = (z + self._picked(self.shift, self.shift2)).to(kind)
        if self.residual is not None:
            z = z + self.residual
        return ACT[self.activation](z)

    def _picked(self, first: torch.Tensor, second: torch.Tensor | None) -> torch.Tensor:
        if self.bank is None:
            return first[:, None, None]
        return torch.stack([second if b else first for b in self.bank.reshape(-1)])[:, :, None, None]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the output."""
        return out_shape(self.x, self.weight, self.stride, self.padding)

    @property
    def vectors(self) -> tuple[torch.Tensor | None, ...]:
        """As launchers take them."""
        return tuple(getattr(self, name) for name in VECTORS)

    @property
    def pairs(self) -> tuple:
        """Scale and shift as ops take them."""
        if self.bank is None:
            return self.scale, self.shift
        pairs = (self.scale, self.scale2), (self.shift, self.shift2)
        return tuple(None if first is None else (first, second) for first, second in pairs)

    @property
    def arguments(self) -> tuple:
        """As the op and the launcher take them, but for the backend."""
        return (self.x, self.weight, *self.vectors, self.residual, self.bank, self.activation, self.stride,
                self.padding, self.groups)


VECTORS = ("scale", "shift", "scale2", "shift2")


def conv_case(
    n: int, k: int, h: int, w: int, c: int, size: int, *, dtype: torch.dtype = torch.float32, affine: bool = True,
    bank: list[int] | int | None = None, residual: bool | torch.dtype = False, seed: int = 0, groups: int = 1, **kwargs,
) -> Conv:
    """Random values, NCHW; `bank` makes scale and shift of both banks."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int, kind: torch.dtype = dtype) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(kind)

    depth = k // groups
    case = Conv(random(n, k, h, w), (random(c, depth, size, size) / (depth * size * size) ** 0.5).to(dtype),
                groups=groups, **kwargs)
    if affine:
        for name in VECTORS[:2 if bank is None else 4]:
            setattr(case, name, random(c, kind=torch.float32))
    if bank is not None:
        case.bank = torch.tensor(bank, dtype=torch.int32)
    if residual:
        case.residual = random(*case.shape, kind=dtype if residual is True else residual)
    return case


def bits(x: torch.Tensor) -> torch.Tensor:
    """For comparisons in which NaN equals itself and -0 differs from 0."""
    return x.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


def configured(module: ModuleType, config: dict | None) -> contextlib.AbstractContextManager:
    """Within, launchers use this configuration instead of their default."""
    if config is None:
        return contextlib.nullcontext()
    return mock.patch.object(module, "_config", return_value=config)
