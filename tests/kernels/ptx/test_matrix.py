"""Matrices against the manual's figures: which thread holds which element, and where it lies in shared memory."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from .handwritten import at, execute

pytestmark = pytest.mark.ptx

MATRICES = list(itertools.product(("x1", "x2", "x4"), (False, True), ("shared", "shared::cta")))
TYPES = {"f16": (2, 16), "bf16": (2, 16), "tf32": (4, 8)}  # bytes of an element, k
FORMS = [f"{name}.sync.aligned.m8n8.{n}{'.trans' if trans else ''}.{space}.b16" for name in ("ldmatrix", "stmatrix")
         for n, trans, space in MATRICES]
FORMS += [f"mma.sync.aligned.m16n8k{k}.row.col.f32.{t}.{t}.f32" for t, (_, k) in TYPES.items()]
FORMS += [f"wgmma.mma_async.sync.aligned.m64n{n}k{k}.f32.{t}.{t}" for t, (_, k) in TYPES.items() for n in (8, 64, 256)]
FORMS += [f"wgmma.{name}.sync.aligned" for name in ("fence", "commit_group", "wait_group")]


def drawn(*shape: int, seed: int = 0) -> np.ndarray:
    """Small integers in float32: all products and sums of a test are exact in any type and order."""
    return np.random.default_rng(seed).integers(-8, 9, shape).astype(np.float32)


def packed(matrix: np.ndarray, type: str) -> np.ndarray:
    """The bits of its elements."""
    if type == "f16":
        return matrix.astype(np.float16).view(np.uint16)
    raw = np.ascontiguousarray(matrix).view(np.uint32)
    return (raw >> 16).astype(np.uint16) if type == "bf16" else raw


def to_shared(words: str = "%r20") -> str:
    """Threads copy the second buffer, as many words for each as that register says, to shared memory."""
    return f"""mov.b32 %r21, 0; copy: mad.lo.s32 %r22, %r21, %ntid.x, %r1; mul.wide.u32 %rd30, %r22, 4;
        add.s64 %rd30, %rd30, %rd2; ld.global.b32 %r23, [%rd30]; shl.b32 %r24, %r22, 2; st.shared.b32 [%r24], %r23;
        add.s32 %r21, %r21, 1; setp.lt.u32 %p9, %r21, {words}; @%p9 bra copy; bar.sync 0;"""


@pytest.mark.parametrize(("count", "trans", "space"), MATRICES)
def test_ldmatrix_and_stmatrix(count: str, trans: bool, space: str) -> None:
    """Row r of matrix i lies at the address that lane 8i + r gives; lane l holds elements 2(l % 4) and the next of row
    l // 4, of column l // 4 if transposed."""
    n = int(count[1:])
    rows = np.random.default_rng(1).permutation(32)
    elements = np.arange(32 * 8, dtype=np.uint16).reshape(32, 8)
    to, kept = np.zeros((32, n), np.uint32), np.zeros(128, np.uint32)
    registers = ", ".join(f"%r{40 + i}" for i in range(n))
    stores = "".join(f"st.global.b32 [%rd12+{4 * i}], %r{40 + i};" for i in range(n))
    form = f"sync.aligned.m8n8.{count}{'.trans' if trans else ''}.{space}.b16"
    execute(f"""mov.b32 %r20, 4; {to_shared()} {at(1, 4, 10)} ld.global.b32 %r30, [%rd10];
        shl.b32 %r31, %r30, 4; ldmatrix.{form} {{{registers}}}, [%r31]; {at(3, 4 * n, 12)} {stores} bar.sync 0;
        stmatrix.{form} [%r31 + 512], {{{registers}}}; bar.sync 0; setp.lt.u32 %p2, %r1, {8 * n};
        {at(4, 4, 13)} shl.b32 %r32, %r1, 4; mul.wide.u32 %rd14, %r1, 16; add.s64 %rd14, %rd14, %rd4;
        @%p2 ld.shared.v4.b32 {{%r50, %r51, %r52, %r53}}, [%r31 + 512];
        @%p2 st.global.v4.b32 [%rd14], {{%r50, %r51, %r52, %r53}};""",
            rows.astype(np.uint32), elements.view(np.uint32).reshape(-1), to, kept, shared=1024)
    for lane, i in itertools.product(range(32), range(n)):
        matrix = elements[rows[8 * i:8 * i + 8]]
        matrix = matrix.T if trans else matrix
        low, high = matrix[lane // 4, 2 * (lane % 4):2 * (lane % 4) + 2]
        assert to[lane, i] == int(low) | int(high) << 16
    assert (kept.view(np.uint16).reshape(-1, 8)[:8 * n] == elements[rows[:8 * n]]).all()


def fragment_of_a(matrix: np.ndarray, lane: int, type: str) -> list[int]:
    """Registers of lane (16 x k), by the manual's figures of m16n8k16 and m16n8k8."""
    group, place, raw = lane // 4, lane % 4, packed(matrix, type)
    if type == "tf32":
        return [int(raw[group + 8 * (i % 2), place + 4 * (i // 2)]) for i in range(4)]
    return [int(raw[group + 8 * (i % 2), 2 * place + 8 * (i // 2)])
            | int(raw[group + 8 * (i % 2), 2 * place + 8 * (i // 2) + 1]) << 16 for i in range(4)]


def fragment_of_b(matrix: np.ndarray, lane: int, type: str) -> list[int]:
    """Of a matrix (k x 8)."""
    group, place, raw = lane // 4, lane % 4, packed(matrix, type)
    if type == "tf32":
        return [int(raw[place + 4 * i, group]) for i in range(2)]
    return [int(raw[2 * place + 8 * i, group]) | int(raw[2 * place + 8 * i + 1, group]) << 16 for i in range(2)]


def row_and_column(lane: int, i: int) -> tuple[int, int]:
    """Of register i of an accumulator of 16 rows."""
    return lane // 4 + 8 * (i // 2 % 2), 8 * (i // 4) + 2 * (lane % 4) + i % 2


@pytest.mark.parametrize("type", TYPES)
def test_mma(type: str) -> None:
    k = TYPES[type][1]
    a, b, c = drawn(16, k), drawn(k, 8, seed=1), drawn(16, 8, seed=2)
    given = np.array([
        [*fragment_of_a(a, lane, type), *fragment_of_b(b, lane, type),
         *(int(c[row_and_column(lane, i)].view(np.uint32)) for i in range(4))] for lane in range(32)], np.uint32)
    to = np.zeros((32, 4), np.float32)
    loads = "".join(f"ld.global.b32 %r{40 + i}, [%rd10+{4 * i}];" for i in range(10))
    execute(f"""{at(1, 40, 10)} {loads} mma.sync.aligned.m16n8k{k}.row.col.f32.{type}.{type}.f32
        {{ %r50, %r51, %r52, %r53 }}, {{ %r40, %r41, %r42, %r43 }}, {{ %r44, %r45 }}, {{ %r46, %r47, %r48, %r49 }};
        {at(2, 16, 11)} st.global.v4.b32 [%rd11], {{%r50, %r51, %r52, %r53}};""", given, to)
    want = a @ b + c
    for lane, i in itertools.product(range(32), range(4)):
        assert to[lane, i] == want[row_and_column(lane, i)]


MODE = {128: 1, 64: 2, 32: 3}


def laid_out(matrix: np.ndarray, type: str, line: int, along_rows: bool, room: int) -> tuple[np.ndarray, int, int]:
    """Bytes of a matrix (rows, k) as wgmma reads it, and the leading and the stride offset.

    Lines of `line` bytes, 8 of them an atom; in line i of an atom the piece of 16 bytes at place p lies at p ^ i,
    p ^ i/2 or p ^ i/4 for lines of 128, 64 or 32 bytes. Atoms follow each other first along the lines, then across.
    """
    raw = packed(matrix.T if along_rows else matrix, type)  # lines, elements of a line
    size = raw.dtype.itemsize
    whole = np.zeros((raw.shape[0], -(-raw.shape[1] * size // line) * line), np.uint8)
    whole[:, :raw.shape[1] * size] = np.ascontiguousarray(raw).view(np.uint8)
    out, across = np.full(room, 0xEE, np.uint8), whole.shape[1] // line
    for i, p in itertools.product(range(whole.shape[0]), range(whole.shape[1] // 16)):
        atom, piece = divmod(p * 16, line)
        start = ((i // 8) * across + atom) * 8 * line + i % 8 * line
        start += (piece // 16 ^ i % 8 // (128 // line)) * 16
        out[start:start + 16] = whole[i, 16 * p:16 * p + 16]
    return out, 8 * line, across * 8 * line


def descriptor(start: int, leading: int, stride: int, line: int) -> int:
    return start >> 4 | leading >> 4 << 16 | stride >> 4 << 32 | MODE[line] << 62


def product(type: str, n: int, a: np.ndarray, descriptors: tuple[int | None, int], shared: np.ndarray, flags: str,
            accumulate: bool = True, before: str = "") -> np.ndarray:
    """(64, n) by a warpgroup, of 1 + A B, or of A B without `accumulate`. A is given in registers where its descriptor
    is None. before: what comes between the product and the wait for it."""
    k, count = TYPES[type][1], n // 2
    given = np.array([fragment_of_a(rows, lane, type) for rows in np.split(a, 4) for lane in range(32)], np.uint32)
    to = np.zeros((128, count), np.float32)
    registers = [f"%r{60 + i}" for i in range(count)]
    start = "".join(f"mov.b32 {r}, 0f3F800000;" for r in registers)
    stores = "".join(f"st.global.b32 [%rd12+{4 * i}], {r};" for i, r in enumerate(registers))
    left = "{%r40, %r41, %r42, %r43}" if descriptors[0] is None else "%rd20"
    execute(f"""mov.b32 %r20, {len(shared) // 512}; {to_shared()} {at(1, 16, 10)} {start}
        ld.global.v4.b32 {{%r40, %r41, %r42, %r43}}, [%rd10]; setp.eq.b32 %p1, %r1, {"%r1" if accumulate else -1};
        mov.b64 %rd20, {descriptors[0] or 0}; mov.b64 %rd21, {descriptors[1]}; wgmma.fence.sync.aligned;
        wgmma.mma_async.sync.aligned.m64n{n}k{k}.f32.{type}.{type}
        {{{','.join(registers)}}}, {left}, %rd21, %p1, {flags};
        wgmma.commit_group.sync.aligned; {before} wgmma.wait_group.sync.aligned 0; {at(3, 4 * count, 12)} {stores}""",
            given, shared.view(np.uint32), to, threads=128, shared=len(shared))
    out = np.zeros((64, n), np.float32)
    for t, i in itertools.product(range(128), range(count)):
        row, column = row_and_column(t % 32, i)
        out[16 * (t // 32) + row, column] = to[t, i]
    return out


@pytest.mark.parametrize("line", MODE)
@pytest.mark.parametrize("n", [8, 64, 256])
@pytest.mark.parametrize(("type", "a_along_rows", "b_along_rows"), [
    ("f16", None, 0), ("f16", 0, 0), ("f16", 1, 0), ("f16", 0, 1), ("bf16", 1, 1), ("bf16", None, 1), ("tf32", None, 0),
    ("tf32", 0, 0)])
def test_wgmma(type: str, a_along_rows: int | None, b_along_rows: int, n: int, line: int) -> None:
    k = TYPES[type][1]
    a, b = drawn(64, k), drawn(n, k, seed=1)
    if b_along_rows and n * TYPES[type][0] < line:
        pytest.skip("less than a line")
    first, *offsets_a = laid_out(a, type, line, bool(a_along_rows), 16384)
    second, *offsets_b = laid_out(b, type, line, bool(b_along_rows), 32768)
    shared = np.concatenate([first, second])
    descriptors = (None if a_along_rows is None else descriptor(0, *offsets_a, line),
                   descriptor(16384, *offsets_b, line))
    flags = "1, 1" if type == "tf32" else f"1, 1, {b_along_rows}" if a_along_rows is None else (
        f"1, 1, {a_along_rows}, {b_along_rows}")
    for accumulate in (True, False):
        assert (product(type, n, a, descriptors, shared, flags, accumulate) == a @ b.T + accumulate).all()


def test_products_of_a_line() -> None:
    """Steps along k are steps of the address within a swizzled line."""
    a, b = drawn(64, 64), drawn(8, 64, seed=1)
    first, *offsets = laid_out(a, "f16", 128, False, 16384)
    second, *offsets_b = laid_out(b, "f16", 128, False, 16384)
    shared = np.concatenate([first, second])
    for i in range(4):
        found = product("f16", 8, a, (descriptor(32 * i, *offsets, 128), descriptor(16384 + 32 * i, *offsets_b, 128)),
                        shared, "1, 1, 0, 0", False)
        assert (found == a[:, 16 * i:16 * i + 16] @ b[:, 16 * i:16 * i + 16].T).all()
