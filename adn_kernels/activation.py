"""The activations an op can end with, each with its derivative: for plain PyTorch and for Triton.

All follow torch in what they do with NaN (it passes through) and at their kinks (the derivative of ReLU at 0 is 0).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

ACTIVATIONS = ("identity", "relu", "relu6", "silu", "gelu", "hardswish")

_FORWARD = {
    "identity": lambda z: z,
    "relu": F.relu,
    "relu6": F.relu6,
    "silu": F.silu,
    "gelu": F.gelu,
    "hardswish": F.hardswish,
}


def check_activation(activation: str) -> None:
    """Raises ValueError for a name that is not in `ACTIVATIONS`."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation={activation!r}; pass one of {', '.join(map(repr, ACTIVATIONS))}")


def act_reference(z: torch.Tensor, activation: str) -> torch.Tensor:
    """The activation of z, any shape; `gelu` is the exact one (erf)."""
    return _FORWARD[activation](z)


def act_grad_reference(z: torch.Tensor, activation: str) -> torch.Tensor:
    """Its derivative at z, same shape and dtype."""
    if activation == "relu":
        return torch.where(z <= 0, 0.0, 1.0).to(z.dtype)
    if activation == "relu6":
        return torch.where((z <= 0) | (z >= 6), 0.0, 1.0).to(z.dtype)
    if activation == "silu":
        s = torch.sigmoid(z)
        return s * (1 + z * (1 - s))
    if activation == "gelu":
        return 0.5 * (1 + torch.erf(z * math.sqrt(0.5))) + z * torch.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)
    if activation == "hardswish":
        return torch.where(z <= -3, 0.0, torch.where(z < 3, z / 3 + 0.5, 1.0)).to(z.dtype)
    return torch.ones_like(z)


@triton.jit
def act(z, ACTIVATION: tl.constexpr):
    """`act_reference` on a float32 block."""
    if ACTIVATION == "relu":
        return tl.maximum(z, 0.0, propagate_nan=tl.PropagateNan.ALL)
    elif ACTIVATION == "relu6":
        # Not by comparing, whose predicates ptxas may spill where no register is short.
        above = tl.maximum(z, 0.0, propagate_nan=tl.PropagateNan.ALL)
        return tl.minimum(above, 6.0, propagate_nan=tl.PropagateNan.ALL)
    elif ACTIVATION == "silu":
        return z * tl.sigmoid(z)
    elif ACTIVATION == "gelu":
        return 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))
    elif ACTIVATION == "hardswish":
        return z * tl.minimum(tl.maximum(z + 3.0, 0.0), 6.0) * (1.0 / 6.0)
    else:
        return z


@triton.jit
def act_grad(z, ACTIVATION: tl.constexpr):
    """`act_grad_reference` on a float32 block."""
    if ACTIVATION == "relu":
        return tl.where(z <= 0, 0.0, 1.0)
    elif ACTIVATION == "relu6":
        return tl.where((z <= 0) | (z >= 6.0), 0.0, 1.0)
    elif ACTIVATION == "silu":
        s = tl.sigmoid(z)
        return s * (1.0 + z * (1.0 - s))
    elif ACTIVATION == "gelu":
        cdf = 0.5 * (1.0 + tl.erf(z * 0.7071067811865476))
        return cdf + z * 0.3989422804014327 * tl.exp(-0.5 * z * z)
    elif ACTIVATION == "hardswish":
        return tl.where(z <= -3.0, 0.0, tl.where(z < 3.0, z * (1.0 / 3.0) + 0.5, 1.0))
    else:
        return tl.full(z.shape, 1.0, tl.float32)
