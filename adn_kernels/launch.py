"""What every launcher shares: how a kernel is launched, where its configuration comes from, what inputs may look like.

A *launcher* is the part of an op that runs on a GPU: it allocates outputs and calls `launch`. Its sizes may be symbolic
(an op traced for a dynamic batch), so it takes no decision on them that a compiler would have to guard.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import triton
from torch.library import wrap_triton

from .private import is_alias, suggest_memory_format

TABLES = Path(__file__).parent / "tables"

# Programs that a reduction over rows is split into: two for each multiprocessor of an H100 or H200, four for half of
# them. Fixed, so that the order of the sum, and with it every bit of the result, is the same on any device.
SPLITS = 264


def launch(kernel: Any, grid: Sequence[int], *args: Any, **options: Any) -> None:
    """Run a Triton kernel on the device of its first argument.

    Args:
        kernel: a function made by `triton.jit`.
        grid: up to three numbers of programs, none of them 0.
        args, options: its arguments, constexprs, and `num_warps`, `num_stages`.
    """
    # Only tracing needs the wrapper: it costs time, and modes that do not know of it (those of tests) refuse it.
    plain = type(args[0]) is torch.Tensor and not torch.compiler.is_compiling()
    run = (kernel if plain or not isinstance(kernel, triton.runtime.JITFunction) else wrap_triton(kernel))[tuple(grid)]
    if plain and _device_count() > 1:
        with torch.cuda.device(args[0].device):
            run(*args, **options)
    else:
        run(*args, **options)


@functools.cache
def _device_count() -> int:
    return torch.cuda.device_count()


def on_gpu(*tensors: torch.Tensor | None) -> bool:
    """Whether an op runs its kernels: CUDA (or ROCm) and types they compute; any float64 takes the reference."""
    return all(t is None or (t.device.type == "cuda" and t.dtype in _TYPES) for t in tensors)


_TYPES = (torch.float32, torch.float16, torch.bfloat16)


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up; symbolic sizes stay symbolic."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """As `triton.next_power_of_2`, which takes two microseconds."""
    return 1 << (n - 1).bit_length() if n > 1 else 1


def no_second_derivative(backward: Any) -> None:
    """Registers, for a backward op, a clear error in place of a derivative of its own."""

    def refuse(ctx: Any, *_: Any) -> None:
        raise RuntimeError(f"{backward._qualname} has no second derivative; for that compute in plain PyTorch")

    backward.register_autograd(refuse)


# While `adn_kernels.tune` measures: called with (kernel, default, key), returns the configuration to be used.
override: Callable[[str, dict[str, Any], dict[str, Any]], dict[str, Any]] | None = None


def tuned(kernel: str, device: torch.device, default: dict[str, int], **key: Any) -> dict[str, int]:
    """The configuration measured best for `key` on this architecture, or `default`.

    Tables are files of `adn_kernels/tables`, one per architecture, written by `python -m adn_kernels.tune`. Nothing is
    timed here. A key with a symbolic size has no entry.

    Args:
        kernel: its name in the table.
        key: what the choice depends on, shapes and dtype.
    """
    if override is not None:
        return override(kernel, default, key)
    table = _table(_architecture(device.index))
    if not table or not all(isinstance(value, int | str) for value in key.values()):
        return default
    return table.get((kernel, *sorted(key.items())), default)


@functools.cache
def _architecture(index: int | None) -> str:
    if not torch.cuda.is_available():  # tracing with fake tensors
        return "none"
    if torch.version.hip:
        return torch.cuda.get_device_properties(index).gcnArchName.split(":")[0]
    return "sm_{}{}".format(*torch.cuda.get_device_capability(index))


@functools.cache
def _table(architecture: str) -> dict[tuple, dict[str, int]]:
    path = TABLES / f"{architecture}.json"
    if not path.exists():
        return {}
    rows = json.loads(path.read_text())["rows"]
    return {(row["kernel"], *sorted(row["key"].items())): row["config"] for row in rows}


def dot_precision(x: torch.Tensor, kind: str) -> str:
    """`input_precision` of a float32 product as torch itself is set: "tf32" or "ieee".

    Args:
        kind: "conv" (by default TF32) or "matmul" (by default IEEE); each has its own setting in `torch.backends`.
    """
    backend = torch.backends.cudnn.conv if kind == "conv" else torch.backends.cuda.matmul
    return "tf32" if x.dtype == torch.float32 and backend.fp32_precision == "tf32" else "ieee"


def check_no_alias(out: torch.Tensor, **inputs: torch.Tensor | None) -> None:
    """Raises ValueError if an input shares memory with `out`: its programs would read what others have written; or if
    elements of `out` share memory with each other. To be called in the body of an op: Dynamo cannot trace it."""
    if any(n > 1 and stride == 0 for n, stride in zip(out.shape, out.stride())):
        raise ValueError(f"the output is expanded (strides {out.stride()}); pass memory of its own to write to")
    for name, tensor in inputs.items():
        if tensor is not None and is_alias(out, tensor) and _overlap(out, tensor):
            raise ValueError(f"{name} shares memory with the output, which is written while it is read; "
                             f"pass a tensor of its own, {name}.clone() if nothing else")


def _overlap(a: torch.Tensor, b: torch.Tensor) -> bool:
    (a0, a1), (b0, b1) = _extent(a), _extent(b)
    return a0 < b1 and b0 < a1 and not (a.dtype == b.dtype and _interleaved(a, b))


def _extent(x: torch.Tensor) -> tuple[int, int]:
    """First and last byte, within its storage."""
    size = x.element_size()
    start = x.storage_offset() * size
    return start, start + (sum((n - 1) * s for n, s in zip(x.shape, x.stride())) + 1) * size


def _interleaved(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether they are different channels of one buffer: runs of adjacent elements, between which the others' lie."""
    period, runs = 0, []
    for x in (a, b):
        run = 1
        for stride, n in sorted(zip(x.stride(), x.shape)):
            if n > 1 and stride == run:
                run *= n
            elif n > 1:
                period = math.gcd(period, stride)
        runs.append(run)
    if period == 0:
        return False
    (first, length), (second, other) = sorted(zip((x.storage_offset() % period for x in (a, b)), runs))
    return first + length <= second and second + other <= period


def check_flags(flags: torch.Tensor | None, name: str, samples: int, device: torch.device) -> None:
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
    x: torch.Tensor, channels: int, bank: torch.Tensor | None, **parameters: Any
) -> tuple[list[torch.Tensor | None], list[torch.Tensor | None]]:
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
            if not isinstance(vector, torch.Tensor):
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


def check_eps(eps: float) -> None:
    """Raises ValueError unless it can be added to a variance."""
    if not eps >= 0:
        raise ValueError(f"eps={eps}; pass a number that is not negative")


def memory_format(x: torch.Tensor) -> torch.memory_format:
    """The layout of a 4-D tensor, as torch reads it off the strides: also of slices, which are not contiguous."""
    first, last = x.is_contiguous(), x.is_contiguous(memory_format=torch.channels_last)
    if first != last:  # the usual case, told in a tenth of the time
        return torch.channels_last if last else torch.contiguous_format
    return suggest_memory_format(x)


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a 4-D tensor (N, C, H, W) lies in memory, for kernels that know two layouts.

    `channels_last`: N*H*W rows of C adjacent channels, `stride` apart (more than C in a slice of channels).
    Otherwise: N samples of C*H*W adjacent elements, `stride` apart.
    """

    channels_last: bool
    stride: int


def layout_of(x: torch.Tensor, name: str = "x") -> Layout:
    """Raises ValueError, saying what to do, for a tensor that is neither NHWC nor NCHW (a slice of channels is)."""
    if x.ndim != 4:
        raise ValueError(f"{name} has shape {tuple(x.shape)}; pass (N, C, H, W), or a view of it with H = W = 1")
    if x.numel() == 0:  # its strides say nothing
        return Layout(memory_format(x) == torch.channels_last, 0)
    last, first = stride_in(x, channels_last=True), stride_in(x, channels_last=False)
    # Which layout, where both fit, is torch's to say.
    if last is not None and (first is None or memory_format(x) == torch.channels_last):
        return Layout(True, last)
    if first is not None:
        return Layout(False, first)
    raise ValueError(f"{name} of shape {tuple(x.shape)} has strides {x.stride()}, which are neither those of NCHW nor "
                     f"of NHWC: pass {name}.contiguous() or .contiguous(memory_format=torch.channels_last)")


def stride_in(x: torch.Tensor, channels_last: bool) -> int | None:
    """`Layout.stride` of a 4-D tensor read in this layout, or None if it does not lie so."""
    n, c, h, w = x.shape
    sn, sc, sh, sw = x.stride()
    # The stride of an axis of one element says nothing.
    if not channels_last:
        fits = (w == 1 or sw == 1) and (h == 1 or sh == w) and (c == 1 or sc == h * w)
        return (sn if n != 1 else c * h * w) if fits else None
    row = sw if w != 1 else sh if h != 1 else sn if n != 1 else c
    fits = ((c == 1 or sc == 1) and (h == 1 or w == 1 or sh == w * sw)
            and (n == 1 or (w == 1 and h == 1) or sn == h * w * row))
    return row if fits else None
