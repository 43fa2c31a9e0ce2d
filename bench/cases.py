"""What the kernel benchmarks measure: one expression on one layer, who computes it, and the least it must cost.

`bench/ops/bench_<op>.py` makes the cases of an op, `timing.py` times them, `kernels.py` is the command.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from common import ROOT  # noqa: F401  (puts the checkout on sys.path)
from torch import Tensor

from adn_kernels.activation import act_reference

Function = Callable[..., Any]

FORWARD, BACKWARD = "forward", "backward"
# Of an in-place op: how many of its samples `active` lets through.
NONE_ACTIVE = "none active"
EPS = 1e-5


@dataclasses.dataclass(frozen=True)
class Cost:
    """The least that a direction of an op must do: bytes through device memory, multiplications and additions."""

    bytes: int
    flops: int = 0


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """One expression on one layer.

    Attributes:
        op: the stem of the op's module.
        network, layer, count: which layer, and how often its network has it.
        shape: of the input, as text.
        inputs: makes fresh random inputs, tensors or None, on the default device.
        contenders: name -> function of the inputs, returning a tensor or a tuple of them; "ours" comes first. "eager"
            is the expression in PyTorch, which `torch.compile` is given too.
        costs: direction -> `Cost`. With a "backward" there, gradients of the inputs `grads` are taken.
        reference: what the result is compared with, called on float32 inputs; by default "eager".
        wall: also time plain calls, as they come from Python, without a CUDA graph.
        autotune: whether max-autotune is an opponent.
    """

    op: str
    network: str
    layer: str
    count: int
    batch: int
    shape: str
    dtype: torch.dtype
    inputs: Callable[[], Sequence[Tensor | None]]
    contenders: dict[str, Function]
    costs: dict[str, Cost]
    grads: Sequence[int] = ()
    reference: Function | None = None
    wall: bool = False
    autotune: bool = False

    @property
    def exact(self) -> Function:
        return self.reference or self.contenders["eager"]

    @property
    def key(self) -> str:
        """Names it in a result file."""
        return " ".join((self.op, self.network, self.layer, str(self.batch), dtype_name(self.dtype), *self.costs))

    def __str__(self) -> str:
        return self.key


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def shape_text(*sizes: int) -> str:
    return "x".join(map(str, sizes))


def image(batch: int, channels: int, side: int, dtype: torch.dtype) -> Tensor:
    """(N, C, H, W), channels last."""
    return torch.randn(batch, side, side, channels, dtype=dtype).permute(0, 3, 1, 2)


def vectors(channels: int) -> tuple[Tensor, Tensor]:
    """A positive and any vector, float32 as autocast keeps parameters: weight and bias, variance and mean, or scale and
    shift."""
    return torch.rand(channels) + 0.5, torch.randn(channels) * 0.1


def filters(channels: int, inputs: int, kernel: int, dtype: torch.dtype) -> Tensor:
    """(C, K, k, k), channels last, scaled to keep the variance of what it is applied to."""
    size = (inputs * kernel ** 2) ** -0.5
    return (torch.randn(channels, kernel, kernel, inputs) * size).to(dtype).permute(0, 3, 1, 2)


def none_active(batch: int) -> Tensor:
    return torch.zeros(batch, dtype=torch.int32)


def conv_norm_act(
    x: Tensor, weight: Tensor, scale: Tensor | None, shift: Tensor, mean: Tensor | None, var: Tensor | None,
    residual: Tensor | None, activation: str, stride: int, padding: int, groups: int,
) -> Tensor:
    """The expression of a fused convolution in eager PyTorch, as a network in eval mode runs it: the norm is an op of
    its own; without one (scale None) the shift is the convolution's bias, of x's dtype."""
    if scale is None:
        z = F.conv2d(x, weight, shift, stride, padding, 1, groups)
    else:
        z = F.batch_norm(F.conv2d(x, weight, None, stride, padding, 1, groups), mean, var, scale, shift, eps=EPS)
    return act_reference(z if residual is None else z + residual, activation)


def epilogue_inputs(channels: int, norm: bool) -> tuple[Tensor | None, ...]:
    """scale, shift, mean, var: a norm of mean 0 and variance 1 - eps: scale and shift are its weight and bias."""
    scale, shift = vectors(channels)
    if not norm:
        return None, shift, None, None
    return scale, shift, torch.zeros(channels), torch.full((channels,), 1 - EPS)
