"""Which of two norm banks is live: how ops take both, how kernels read one, what a reference makes of them.

`bank` is int32 on the device: 0 the first bank, else the second; one value, or one for each of several equal parts of a
batch (samples, groups). With it every parameter of a norm is a pair (first, second) of vectors (C,); without it, the
vector of the live bank. Ops get the first and the second of each as arguments of their own, for schemas know no pairs.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

Vectors = Tensor | tuple[Tensor | None, Tensor | None] | None

# How many of something an int32 `bank` or `active` holds, as kernels are told it.
NONE, SCALAR, PER_SAMPLE = 0, 1, 2


def flags_kind(flags: Tensor | None) -> int:
    """`NONE`, `SCALAR` or `PER_SAMPLE`."""
    if flags is None:
        return NONE
    return SCALAR if flags.ndim == 0 or flags.shape[0] == 1 else PER_SAMPLE


def flag_stride(flags: Tensor | None) -> int:
    """From the flag of a sample to that of the next: 0 if one value is for all."""
    return int(flags_kind(flags) == PER_SAMPLE)


def check_flags(flags: Tensor | None, name: str, samples: int, device: torch.device) -> None:
    """Raises ValueError unless `flags` (`bank`, `active`) is None or int32 of one element or one per sample."""
    if flags is None:
        return
    if flags.dtype != torch.int32:
        raise ValueError(f"{name} is {flags.dtype}; pass int32")
    if flags.device != device:
        raise ValueError(f"{name} is on {flags.device}, x on {device}; pass both on one device")
    if flags.ndim > 1 or (flags.ndim == 1 and flags.shape[0] not in (1, samples)):
        raise ValueError(f"{name} has shape {tuple(flags.shape)}; pass one value, or one per sample ({samples})")
    if not flags.is_contiguous():
        raise ValueError(f"{name} has strides {flags.stride()}; pass {name}.contiguous()")


def banks(
    x: Tensor, channels: int, bank: Tensor | None, **parameters: Any
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """The first and the second bank of each parameter of a norm, checked.

    Args:
        parameters: by name; without `bank` the live bank's tensor (channels,) of any floating type, or None; with it a
            pair (first, second) of those, of one type, or None. Without `bank` all of the second are None.
    """
    pairs = []
    for name, value in parameters.items():
        if bank is None:
            if isinstance(value, tuple | list):
                raise ValueError(f"{name} is a pair but no `bank` is given to choose by; pass the live bank's tensor")
            pair = (value, None)
        else:
            pair = (None, None) if value is None else value
            if not isinstance(pair, tuple | list) or len(pair) != 2 or (pair[0] is None) != (pair[1] is None):
                raise ValueError(f"`bank` is given: pass {name} as a pair (first, second), or None")
        for i, vector in enumerate(pair):
            if vector is None:
                continue
            label = name if bank is None else f"{name}[{i}]"
            if not isinstance(vector, Tensor):
                raise ValueError(f"{label} is a {type(vector).__name__}; pass a tensor of shape ({channels},), or None")
            if tuple(vector.shape) != (channels,) or not vector.is_floating_point() or not vector.is_contiguous():
                raise ValueError(f"{label} is {vector.dtype} of shape {tuple(vector.shape)} and strides "
                                 f"{vector.stride()}; pass contiguous floats of shape ({channels},)")
            if vector.device != x.device:
                raise ValueError(f"{label} is on {vector.device}, x on {x.device}; pass both on one device")
        if pair[1] is not None and pair[0].dtype != pair[1].dtype:
            raise ValueError(f"the banks of {name} are {pair[0].dtype} and {pair[1].dtype}; pass both in one type")
        pairs.append(pair)
    return [first for first, _ in pairs], [second for _, second in pairs]


@triton.jit
def of_bank(first, second, is_second, c, mask):
    """The values of channels c in the live one of two vectors, or in the only one (`second` None); float32."""
    if second is not None:
        # Chosen before it is read: the other bank takes no registers.
        first = tl.where(is_second, second, first)
    return tl.load(first + c, mask=mask, other=0.0).to(tl.float32)


def picked(first: Tensor, second: Tensor | None, bank: Tensor | None, dtype: torch.dtype | None = None) -> Tensor:
    """The vector of each value of `bank`, (1 or N, C): the reference of `of_bank`.

    Args:
        dtype: of the result; by default that of the vectors.
    """
    first = first if dtype is None else first.to(dtype)
    if bank is None:
        return first[None]
    both = torch.stack([first, second.to(first.dtype)])
    # Not both[bank]: indexing by a 0-d tensor synchronises.
    return both.index_select(0, (bank != 0).long().reshape(-1))


def per_bank(parts: Tensor, bank: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """(parts, C) summed over those of each bank: the gradients of two vectors, or of the only one."""
    if bank is None:
        return parts.sum(0), None
    second = (bank != 0).reshape(-1, 1)
    # Chosen, not multiplied by 0: a NaN in a part of one bank stays out of the other's gradient.
    return torch.where(second, 0, parts).sum(0), torch.where(second, parts, 0).sum(0)
