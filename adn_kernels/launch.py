"""What every launcher shares: how a kernel is launched, where its configuration comes from, what no op may be given.

A *launcher* is the part of an op that runs on a GPU: it allocates outputs and calls `launch`. Its sizes may be symbolic
(an op traced for a dynamic batch), so it takes no decision on them that a compiler would have to guard.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import triton
from torch.library import wrap_triton

from .private import is_alias

TABLES = Path(__file__).parent / "tables"

# Programs that a reduction over rows is split into: two for each multiprocessor of an H100 or H200, four for half of
# them. Fixed, so that the order of the sum, and with it every bit of the result, is the same on any device.
SPLITS = 264

# Whether a product and a sum that follows may be contracted to one operation, rounded once; kernels say `tl.fma` where
# they want that. In a reduction the compiler's own contractions give the lanes that hold a sum different last bits, of
# which PTX does not say which is stored. Triton's default is True until 3.9. Inductor has no way to pass another one
# on: there results are as exact, and may differ in the last bit.
FP_FUSION = False


def launch(kernel: Any, grid: Sequence[int], *args: Any, **options: Any) -> None:
    """Run a Triton kernel on the device of its first argument.

    Args:
        kernel: a function made by `triton.jit`.
        grid: up to three numbers of programs, none of them 0.
        args, options: its arguments, constexprs, and `num_warps`, `num_stages`.
    """
    # Only tracing needs the wrapper: it costs time, and modes that do not know of it (those of tests) refuse it.
    if type(args[0]) not in _NOT_TRACED or torch.compiler.is_compiling():
        run = wrap_triton(kernel) if isinstance(kernel, triton.runtime.JITFunction) else kernel
        run[tuple(grid)](*args, **options)
    elif _device_count() > 1:
        with torch.cuda.device(args[0].device):
            kernel[tuple(grid)](*args, enable_fp_fusion=FP_FUSION, **options)
    else:
        kernel[tuple(grid)](*args, enable_fp_fusion=FP_FUSION, **options)


_NOT_TRACED = (torch.Tensor, torch.nn.Parameter)


@functools.cache
def _device_count() -> int:
    return torch.cuda.device_count()


def on_gpu(*tensors: torch.Tensor | None) -> bool:
    """Whether an op runs its kernels: CUDA (or ROCm) and types they compute; any float64 takes the reference."""
    for t in tensors:  # noqa: SIM110, of every call of every op: no frame for a generator
        if t is not None and not (t.is_cuda and t.dtype in _TYPES):
            return False
    return True


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


# While `bench/tune.py` measures: called with (kernel, default, key), returns the configuration to be used.
override: Callable[[str, dict[str, Any], dict[str, Any]], dict[str, Any]] | None = None


def tuned(kernel: str, device: torch.device, default: dict[str, int], **key: Any) -> dict[str, int]:
    """The configuration measured best for `key` on this architecture, or `default`.

    Tables are files of `adn_kernels/tables`, one per architecture, written by `python bench/tune.py`. Nothing is
    timed here. A key with a symbolic size has no entry.

    Args:
        kernel: its name in the table.
        key: what the choice depends on, shapes and dtype.
    """
    if override is not None:
        return override(kernel, default, key)
    table = _table(architecture(device))
    if not table or not all(isinstance(value, int | str) for value in key.values()):
        return default
    return table.get((kernel, *sorted(key.items())), default)


def architecture(device: torch.device) -> str:
    """"sm_90" or "gfx942", for instance; "none" where something is traced without a GPU."""
    return _architecture(device.index)


def stages(device: torch.device, usual: int, more: int) -> int:
    """Of a loop over tiles that few programs run, each for long: how many it loads at once.

    Two such programs on each multiprocessor of a Hopper or Blackwell GPU have 228 KB of shared memory for tiles that
    wait, and take no more registers for it: then `more`.
    """
    return more if architecture(device) in ("sm_90", "sm_100", "sm_103") else usual


@functools.cache
def _architecture(index: int | None) -> str:
    if not torch.cuda.is_available():
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
    if 0 in out.stride() and any(n > 1 and stride == 0 for n, stride in zip(out.shape, out.stride())):
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


def check_eps(eps: float) -> None:
    """Raises ValueError unless it can be added to a variance."""
    if not eps >= 0:
        raise ValueError(f"eps={eps}; pass a number that is not negative")
