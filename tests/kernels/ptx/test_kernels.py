"""Kernels that Triton compiles, executed; and with mistakes planted in what was compiled. `test_ptx.py` runs this in a
process in which the package takes the place of a GPU."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import triton
import triton.language as tl

from . import launch
from .machine import Machine, prepare
from .memory import Fault

pytestmark = [pytest.mark.launcher, pytest.mark.ptx,
              pytest.mark.skipif(os.environ.get("ADN_PTX") != "1", reason="executes PTX")]


@triton.jit
def sum_kernel(x, y, total, n, scale, flag, offset, BLOCK: tl.constexpr):
    """Sums of rows, their cumulative maxima and the transposed block: exchange between warps of every kind."""
    row = tl.program_id(0)
    i = tl.arange(0, BLOCK)
    v = tl.load(x + row * n + i, mask=i < n, other=0.0)
    tl.store(total + row, tl.sum(v) * scale + tl.where(flag, offset, 0).to(tl.float32))
    square = tl.reshape(v, [BLOCK // 32, 32])
    tl.store(y + row * BLOCK + i, tl.reshape(tl.trans(tl.cumsum(square, 0)), [BLOCK]))


@triton.jit
def dot_kernel(a, b, c, M, N, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    m, n, k = tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, BK)
    acc = tl.zeros([BM, BN], tl.float32)
    for start in range(0, K, BK):
        x = tl.load(a + m[:, None] * K + start + k[None, :])
        y = tl.load(b + (start + k)[:, None] * N + n[None, :])
        acc = tl.dot(x, y, acc)
    tl.store(c + m[:, None] * N + n[None, :], acc)


@triton.jit
def claim_kernel(parts, count, total, BLOCK: tl.constexpr, ORDER: tl.constexpr):
    """The last program adds up what all have written."""
    part = tl.program_id(0)
    tl.store(parts + part, part + 1.0)
    if tl.atomic_add(count, 1, sem=ORDER) == tl.num_programs(0) - 1:
        i = tl.arange(0, BLOCK)
        tl.store(total, tl.sum(tl.load(parts + i, mask=i < tl.num_programs(0), other=0.0)))


def sum_case() -> tuple[Any, tuple[int, ...], dict[str, Any], Callable[[], bool]]:
    x, y, total = torch.randn(3, 300), torch.zeros(3, 512), torch.zeros(3)
    arguments = {"x": x, "y": y, "total": total, "n": 300, "scale": 0.5, "flag": True, "offset": 2**40, "BLOCK": 512}

    def right() -> bool:
        padded = torch.nn.functional.pad(x, (0, 212)).view(3, 16, 32)
        return (torch.allclose(total, x.sum(1) * 0.5 + 2.0**40)
                and torch.allclose(y, padded.cumsum(1).transpose(1, 2).reshape(3, 512), atol=1e-5))

    return sum_kernel, (3,), arguments, right


def dot_case() -> tuple[Any, tuple[int, ...], dict[str, Any], Callable[[], bool]]:
    a, b, c = torch.randn(64, 256).bfloat16(), torch.randn(256, 64).bfloat16(), torch.zeros(64, 64)
    arguments = {"a": a, "b": b, "c": c, "M": 64, "N": 64, "K": 256, "BM": 64, "BN": 64, "BK": 64}
    return dot_kernel, (1,), arguments, lambda: torch.allclose(c, a.float() @ b.float(), atol=1e-3)


CASES = {"sum": sum_case, "dot": dot_case}


def compiled(case: str) -> tuple[Any, tuple[int, ...], dict[str, Any], Callable[[], bool]]:
    torch.manual_seed(0)
    kernel, grid, arguments, right = CASES[case]()
    found = kernel[grid](**arguments)
    assert right()
    return found, grid, arguments, right


def execute(kernel: Any, text: str, grid: Sequence[int], arguments: dict[str, Any]) -> None:
    launch.execute(Machine(prepare(text), kernel.metadata.shared), kernel, grid, arguments)


@pytest.mark.parametrize("case", CASES)
def test_a_missing_barrier(case: str) -> None:
    """Each of them is noticed, but for one that is not needed, between copies to two places; Triton 3.9 sets none."""
    kernel, grid, arguments, _ = compiled(case)
    text = kernel.asm["ptx"]
    barriers = list(re.finditer(r"bar\.sync\s+0;", text))
    missed = []
    for i, barrier in enumerate(barriers):
        try:
            execute(kernel, text[:barrier.start()] + text[barrier.end():], grid, arguments)
            missed.append(i)
        except Fault:
            pass
    assert len(barriers) >= 2
    assert missed == [] or (case == "dot" and missed == [0])


def test_copies_not_waited_for() -> None:
    kernel, grid, arguments, _ = compiled("dot")
    text = kernel.asm["ptx"]
    waits = list(re.finditer(r"cp\.async\.wait_group\s+(\d+);", text))
    assert any(int(wait[1]) for wait in waits)
    late = re.sub(r"(cp\.async\.wait_group\s+)(\d+);", lambda wait: f"{wait[1]}{int(wait[2]) + 2};", text)
    with pytest.raises(Fault, match="before its copy"):
        execute(kernel, late, grid, arguments)


def test_products_not_waited_for() -> None:
    kernel, grid, arguments, _ = compiled("dot")
    text = re.sub(r"wgmma\.wait_group\.sync\.aligned\s+\d+;", "", kernel.asm["ptx"])
    assert text != kernel.asm["ptx"]
    with pytest.raises(Fault, match="may still read"):
        execute(kernel, text, grid, arguments)


def test_wrong_descriptors() -> None:
    """The high half of those that Triton writes has the mode and the stride."""
    kernel, grid, arguments, right = compiled("dot")
    text = kernel.asm["ptx"]
    constants = {c for c in re.findall(r"\b\d{16,}\b", text) if int(c) >> 62}
    assert constants
    for change in (1 << 62, 32 << 32, 1 << 49):
        wrong = text
        for constant in constants:
            wrong = wrong.replace(constant, str((int(constant) + change) % 2**63))
        try:
            execute(kernel, wrong, grid, arguments)
        except (Fault, NotImplementedError):
            continue
        assert not right()


@pytest.mark.parametrize("programs", [1, 7, 200])
def test_last_arriver(programs: int) -> None:
    """By the order that `tl.atomic_add` gives by itself; relaxed it is a race."""
    for order in ("acq_rel", "relaxed"):
        parts, count, total = torch.zeros(programs), torch.zeros(1, dtype=torch.int32), torch.zeros(1)
        arguments = (parts, count, total, 256, order)
        if order == "relaxed" and programs > 1:
            with pytest.raises(Fault, match="race"):
                claim_kernel[(programs,)](*arguments)
        else:
            claim_kernel[(programs,)](*arguments)
            assert float(total) == programs * (programs + 1) / 2


def test_variants_are_counted() -> None:
    """By what an argument is specialised for: 16 divides 32 and 48, not 33; 1 is a constant."""
    x, y, total = torch.randn(1, 64), torch.zeros(1, 64), torch.zeros(1)
    name = f"{sum_kernel.__module__}.sum_kernel"
    launch.counts.pop(name, None)
    for n in (32, 48, 33, 1):
        sum_kernel[(1,)](x, y, total, n, 1.0, False, 3, 64)
        assert torch.allclose(total, x[0, :n].sum(), atol=1e-6)
    assert (len(launch.counts[name].variants), launch.counts[name].launches) == (3, 4)


def test_a_seed_gives_the_same_again() -> None:
    """The order of programs and of atomics, and with it the rounding of a sum."""
    def run() -> float:
        total = torch.zeros(1)
        add_kernel[(64,)](torch.arange(64).float().exp2().rsqrt(), total)
        return float(total)

    launch.reseed()
    first = [run() for _ in range(8)]
    launch.reseed()
    assert [run() for _ in range(8)] == first
    assert len(set(first)) > 1


@triton.jit
def add_kernel(x, total):
    tl.atomic_add(total, tl.load(x + tl.program_id(0)))
