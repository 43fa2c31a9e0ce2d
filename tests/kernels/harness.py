"""How kernels are tested, on a GPU or, without one, by Triton's interpreter and by executing their PTX.

A test marked `launcher` calls launchers, never ops: on CPU tensors an op is its reference and would be compared with
itself. With a GPU such a test runs there. Without one `TRITON_INTERPRET=1 pytest tests/kernels` runs it in Triton's
interpreter and `ADN_PTX=1 pytest tests/kernels` compiles for sm_90 and executes the result in that of the package `ptx`
(`test_interpreter.py` and `test_ptx.py` do so in processes of their own).
"""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
PTX = os.environ.get("ADN_PTX") == "1"
DEVICE = "cpu" if INTERPRETED or PTX or not torch.cuda.is_available() else "cuda"
# Triton's interpreter computes bfloat16 wrongly without an error.
DTYPES = (torch.float32, torch.float16, torch.bfloat16) if PTX or DEVICE == "cuda" else (torch.float32, torch.float16)
GUARD = 64  # elements before and after every buffer


def examples(count: int) -> int:
    """How many of these examples a test with random ones tries: with ADN_EXAMPLES no more than that."""
    return min(count, int(os.environ.get("ADN_EXAMPLES", count)))


def _loop_to_arguments() -> None:
    """Lets `range` take a kernel's argument with Triton 3.6 and NumPy 2.4, where an array of one is no index."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patch_also(tensor: type, scope: Any) -> None:
        patch(tensor, scope)  # `scope` undoes both
        tensor.__index__ = lambda self: self.handle.data.item()

    interpreter._patch_lang_tensor = patch_also


if INTERPRETED:
    _loop_to_arguments()


class Guards(TorchDispatchMode):
    """While active, whatever is allocated empty is full of NaN and lies between guard bands of NaN.

    Reading beyond a buffer then poisons the result, an element never written stays NaN, and `check` finds a write
    beyond a buffer. The interpreter and a GPU both let such accesses pass in silence.
    """

    EMPTY = (
        torch.ops.aten.empty.memory_format, torch.ops.aten.empty_like.default, torch.ops.aten.new_empty.default,
        torch.ops.aten.empty_strided.default, torch.ops.aten.new_empty_strided.default,
    )

    def __init__(self) -> None:
        super().__init__()
        self.buffers: list[tuple[torch.Tensor, torch.Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        # The interpreter makes empty tensors to set to the memory of its arguments.
        if func in self.EMPTY and result.device.type == DEVICE and result.numel():
            return self._between_guards(result)
        return result

    def place(self, x: torch.Tensor | None) -> torch.Tensor | None:
        """A copy of x, same shape and strides, on the device under test, between guards, gaps of a slice too."""
        if x is None:
            return None
        with _disable_current_modes():
            placed = self._between_guards(torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=DEVICE))
            return placed.copy_(x)

    def _between_guards(self, like: torch.Tensor) -> torch.Tensor:
        extent = sum((n - 1) * s for n, s in zip(like.shape, like.stride())) + 1 if like.numel() else 0
        whole = torch.full((extent + 2 * GUARD,), _poison(like.dtype), dtype=like.dtype, device=like.device)
        view = whole.as_strided(like.shape, like.stride(), GUARD)
        self.buffers.append((view, whole))
        return view

    def check(self) -> None:
        """Raises AssertionError if anything was written outside a buffer."""
        with _disable_current_modes():
            for view, whole in self.buffers:
                inside = torch.zeros(whole.shape, dtype=torch.bool, device=whole.device)
                inside.as_strided(view.shape, view.stride(), GUARD).fill_(True)
                outside = whole[~inside]
                intact = outside.isnan() if outside.is_floating_point() else outside == _poison(outside.dtype)
                assert bool(intact.all()), f"wrote outside a buffer of shape {tuple(view.shape)}"


def _poison(dtype: torch.dtype) -> float | int:
    return float("nan") if dtype.is_floating_point else torch.iinfo(dtype).max if dtype != torch.bool else True


def max_error(actual: torch.Tensor, exact: torch.Tensor) -> float:
    """Largest absolute difference; infinite if one has a NaN or infinity where the other has not the same."""
    a, b = actual.detach().cpu().double(), exact.detach().cpu().double()
    assert a.shape == b.shape, f"shape {tuple(a.shape)}, expected {tuple(b.shape)}"
    same = (a == b) | (a.isnan() & b.isnan())
    diff = torch.where(same, 0.0, (a - b).abs())
    diff = torch.where(diff.isnan(), float("inf"), diff)
    return float(diff.max()) if diff.numel() else 0.0


def assert_accurate(
    name: str, actual: torch.Tensor, eager: torch.Tensor, exact: torch.Tensor, atol: float = 1e-6
) -> None:
    """The error bound of every kernel: at most twice that of eager PyTorch in the same type, plus `atol`.

    Args:
        actual: what the kernel computed.
        eager: the same expression in eager PyTorch, same dtypes.
        exact: the same in float64.
        atol: relative to the largest finite magnitude of `exact` (at least 1).
    """
    assert actual.dtype == eager.dtype, f"{name}: {actual.dtype}, eager gives {eager.dtype}"
    finite = exact.detach().double()[exact.detach().isfinite()]
    size = max(1.0, float(finite.abs().max()) if finite.numel() else 1.0)
    error, allowed = max_error(actual, exact), 2 * max_error(eager, exact) + atol * size
    assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g} (largest value {size:.3g})"


@contextlib.contextmanager
def traffic() -> Iterator[dict[str, Counter]]:
    """Counts, in the interpreter, the bytes every load and store really touches: {"read", "written"} by tensor.

    The key is a storage's address; use `bytes_of`. Masked lanes do not count; what is read twice counts twice.
    """
    from triton.runtime import interpreter

    counts = {"read": Counter(), "written": Counter()}
    builder = interpreter.InterpreterBuilder
    load, store = builder.create_masked_load, builder.create_masked_store

    def note(kind: str, pointers: Any, mask: Any) -> None:
        lanes = pointers.data[np.broadcast_to(mask.data, pointers.data.shape)]
        if lanes.size:
            size = pointers.get_element_ty().primitive_bitwidth // 8
            counts[kind][int(lanes.min())] += lanes.size * size

    def counted_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        note("read", pointers, mask)
        return load(self, pointers, mask, *rest)

    def counted_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        note("written", pointers, mask)
        return store(self, pointers, value, mask, *rest)

    builder.create_masked_load, builder.create_masked_store = counted_load, counted_store
    try:
        yield counts
    finally:
        builder.create_masked_load, builder.create_masked_store = load, store


def bytes_of(counts: Counter, *tensors: torch.Tensor) -> int:
    """Bytes of a `traffic` counter that fell into these tensors; all of them if none is named."""
    if not tensors:
        return sum(counts.values())
    spans = [(t.data_ptr(), t.data_ptr() + (sum((n - 1) * s for n, s in zip(t.shape, t.stride())) + 1)
              * t.element_size()) for t in tensors]
    return sum(n for address, n in counts.items() if any(a <= address < b for a, b in spans))


@contextlib.contextmanager
def last_programs(count: int = 1, first: str | None = None) -> Iterator[None]:
    """In the interpreter: of every grid only the last `count` programs of each axis run, under their own ids; of
    kernels whose name has `first` in it, which go backwards, the first.

    With memory that is only committed where it is touched, this shows what happens beyond 2^31 elements.
    """
    from triton.runtime import interpreter

    builder, executor = interpreter.interpreter_builder, interpreter.GridExecutor
    call, restore = executor.__call__, executor._restore_args_dev
    set_dim, set_idx = builder.set_grid_dim, builder.set_grid_idx

    def call_last(self: Any, *args: Any, **kwargs: Any) -> None:
        real = (*self.grid, 1, 1)[:3]
        self.grid = tuple(min(n, count) for n in real)
        offset = [0 if first and first in self.fn.__name__ else n - m for n, m in zip(real, self.grid)]
        builder.set_grid_dim = lambda *_: set_dim(*real)
        builder.set_grid_idx = lambda *ids: set_idx(*(i + o for i, o in zip(ids, offset)))
        try:
            call(self, *args, **kwargs)
        finally:
            del builder.set_grid_dim, builder.set_grid_idx

    executor.__call__ = call_last
    # Copies the memory onto itself, which would commit all of it.
    executor._restore_args_dev = lambda *_: None
    try:
        yield
    finally:
        executor.__call__, executor._restore_args_dev = call, restore


_planted = itertools.count()


def plant(module: ModuleType, tmp_path: Path, *changes: tuple[str, str]) -> ModuleType:
    """A copy of a kernel module with a mistake in its source: each (right, wrong) replaced where it stands.

    Tests show with it that they would notice.
    """
    source = Path(module.__file__).read_text()
    for right, wrong in changes:
        assert source.count(right) >= 1, f"{right!r} is not in {module.__name__}"
        source = source.replace(right, wrong)
    number = next(_planted)
    stem = module.__name__.rpartition(".")[2]
    path = tmp_path / f"planted{number}_{stem}.py"
    # Its ops must not collide with the real ones.
    path.write_text(source.replace('"adn::', f'"planted{number}_{os.getpid()}::'))
    spec = importlib.util.spec_from_file_location(f"adn_kernels.planted{number}_{stem}", path)
    planted = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = planted
    spec.loader.exec_module(planted)
    return planted


def assert_caught(check: Callable[[ModuleType], None], planted: ModuleType) -> None:
    """`check(module)` passes for the real module and must fail, by an assertion, for the planted one."""
    try:
        check(planted)
    except AssertionError:
        return
    raise AssertionError("the planted mistake went unnoticed")


def layouts(x: torch.Tensor) -> Sequence[torch.Tensor]:
    """A 4-D tensor as NCHW, NHWC, and as a slice of channels of either."""
    wide = torch.cat([x, x.new_full(x.shape, 3.0)], 1)
    return (x.contiguous(), x.contiguous(memory_format=torch.channels_last), wide[:, :x.shape[1]],
            wide.contiguous(memory_format=torch.channels_last)[:, :x.shape[1]])
