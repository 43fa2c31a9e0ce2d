"""Loads, stores, atomics and copies against what they must leave in memory."""

from __future__ import annotations

import itertools
import math
import random

import numpy as np
import pytest

from .formats import SIZE
from .handwritten import REGISTER, at, decoded, encoded, evaluate, execute, halves

pytestmark = pytest.mark.ptx

TYPES = [f"{kind}{bits}" for kind in "bus" for bits in (8, 16, 32, 64)] + ["f32", "f64"]
VECTORS = [("", 1), (".v2", 2), (".v4", 4)]
SPACES = ["global", "shared", "shared::cta"]
ACCESSES = [(space, vector, n, type) for space, (vector, n), type in itertools.product(SPACES, VECTORS, TYPES)
            if SIZE[type] * n <= 16]
UPDATED = [(name, type) for name in ("add", "min", "max") for type in ("u32", "u64", "s32", "s64")]
UPDATED += [(name, type) for name in ("and", "or", "xor", "exch") for type in ("b32", "b64")]
UPDATED += [("add", "f32"), ("add", "f64"), ("add.noftz", "f16"), ("add.noftz", "bf16"), ("add.noftz", "f16x2"),
            ("add.noftz", "bf16x2")]
ORDERS = ["relaxed", "acquire", "release", "acq_rel"]
PARTS = [("b32", "b16", 2), ("b64", "b32", 2), ("b64", "b16", 4)]
FORMS = [f"{name}.{space}{vector}.{type}" for name in ("ld", "st") for space, vector, _, type in ACCESSES]
FORMS += [f"ld.param.{type}" for type in TYPES] + ["ld.global.nc.b32"]
FORMS += [f"{op}.global.gpu.{order}.{name}.{type}" for op in ("atom", "red") for name, type in UPDATED
          for order in ORDERS]
FORMS += [f"{op}.global.gpu.relaxed.add.v{n}.f32" for op in ("atom", "red") for n in (2, 4)]
FORMS += ["atom.global.gpu.relaxed.cas.b32", "red.global.gpu.relaxed.cas.b32"]
FORMS += ["cp.async.ca.shared.global", "cp.async.cg.shared.global", "cp.async.cg.shared::cta.global",
          "cp.async.commit_group", "cp.async.wait_group", "cp.async.wait_all"]
FORMS += [f"mov.{type}" for type in ("pred", *TYPES) if SIZE[type] != 1 or type == "pred"]
FORMS += ["cvta.to.global.u64", "cvta.global.u64", "createpolicy.fractional.L2::evict_first.b64"]


def drawn(n: int, size: int, seed: int = 0) -> np.ndarray:
    return np.frombuffer(random.Random(seed).randbytes(n * size), f"u{size}").copy()


def names(size: int, n: int) -> str:
    found = ", ".join(f"{REGISTER[size]}{20 + i}" for i in range(n))
    return f"{{{found}}}" if n > 1 else found


@pytest.mark.parametrize(("space", "vector", "n", "type"), ACCESSES)
def test_load_and_store(space: str, vector: str, n: int, type: str) -> None:
    """From global memory, by way of shared memory if the form is of that, and back: 64 threads, reversed."""
    size, registers = SIZE[type], names(SIZE[type], n)
    source, to = drawn(64 * n, size), np.zeros(64 * n, f"u{size}")
    wide = size * n
    there = f"sub.s32 %r2, 63, %r1; mul.lo.s32 %r3, %r2, {wide}; cvt.u64.u32 %rd11, %r3; add.s64 %rd11, %rd11, %rd2;"
    if space == "global":
        body = f"{at(1, wide, 10)} ld.global{vector}.{type} {registers}, [%rd10]; {there}" \
               f"st.global{vector}.{type} [%rd11], {registers};"
    else:
        loads = "".join(f"ld.global.b{8 * size} {REGISTER[size]}{20 + i}, [%rd10+{i * size}];" for i in range(n))
        stores = "".join(f"st.global.b{8 * size} [%rd11+{i * size}], {REGISTER[size]}{20 + i};" for i in range(n))
        body = f"""{at(1, wide, 10)} {loads} mul.lo.s32 %r4, %r1, {wide}; mov.b32 %r5, global_smem;
            add.s32 %r5, %r5, %r4; st.{space}{vector}.{type} [%r5+{wide}], {registers}; bar.sync 0;
            ld.{space}{vector}.{type} {registers}, [%r5 + {wide}]; {there} {stores}"""
    execute(body, source, to, threads=64, shared=65 * wide)
    assert (to.reshape(64, n) == source.reshape(64, n)[::-1]).all()


@pytest.mark.parametrize("type", ["b8", "u8", "s8", "u16", "s16", "b16", "u32", "s32", "b32"])
def test_load_into_wider_registers(type: str) -> None:
    source, to = drawn(32, SIZE[type]), np.zeros(32, np.uint64)
    execute(f"{at(1, SIZE[type], 10)} ld.global.{type} %rd11, [%rd10]; {at(2, 8, 10)} st.global.b64 [%rd10], %rd11;",
            source, to)
    assert to.tolist() == [decoded(int(bits), type) % 2**64 for bits in source]


def test_masked_lanes_are_left_alone() -> None:
    source, to = np.arange(32, dtype=np.uint32), np.full(32, 7, np.uint32)
    execute(f"""{at(1, 4, 10)} {at(2, 4, 11)} setp.lt.u32 %p1, %r1, 9; mov.b32 %r2, 5;
        @%p1 ld.global.nc.b32 %r2, [%rd10]; @!%p1 add.s32 %r2, %r2, 100; setp.lt.u32 %p2, %r1, 20;
        @%p2 st.global.b32 [%rd11], %r2;""", source, to)
    assert to.tolist() == list(range(9)) + [105] * 11 + [7] * 12


@pytest.mark.parametrize("wide", [False, True])
def test_parameters_by_address(wide: bool) -> None:
    """One that differs between threads, in a register of 32 or of 64 bits."""
    first, second = np.zeros(32, np.uint64), np.zeros(32, np.uint64)
    r, bits = ("%rd", 64) if wide else ("%r", 32)
    execute(f"""mov.b{bits} {r}20, p0; mov.b{bits} {r}21, p1; setp.lt.u32 %p1, %r1, 8;
        selp.b{bits} {r}22, {r}20, {r}21, %p1; ld.param.b64 %rd23, [{r}22]; {at(1, 8, 10)}
        st.global.b64 [%rd10], %rd23;""", first, second)
    assert first.tolist() == [first.ctypes.data] * 8 + [second.ctypes.data] * 24


def test_a_register_too_narrow_is_refused() -> None:
    """And not read with its neighbours'."""
    with pytest.raises(NotImplementedError, match="a register of 4 bytes is read as u64"):
        execute(f"{at(1, 8, 10)} st.global.b32 [%r10], %r9;", np.zeros(32, np.uint64))


@pytest.mark.parametrize("type", TYPES)
def test_parameters(type: str) -> None:
    """The lower bytes of an address."""
    wide, size = np.zeros(32, np.uint64), SIZE[type]
    register = {1: "%r", 2: "%r"}.get(size, REGISTER[size])
    back = f"{'cvt.u64.u32 %rd9, %r9' if register == '%r' else 'mov.b64 %rd9, %rd8'};"
    execute(f"""ld.param.{type} {register}{8 if size == 8 else 9}, [p0]; {back} {at(1, 8, 10)}
        st.global.b64 [%rd10], %rd9;""", wide)
    assert set(wide.tolist()) == {decoded(wide.ctypes.data % 2**(8 * size), type if type[0] != "f" else f"b{8 * size}")
                                  % 2**(64 if size == 8 else 32)}


def added(old: int, new: int, type: str) -> int:
    if type.endswith("x2"):
        low, high = (added(a, b, type[:-2]) for a, b in zip(halves(old), halves(new)))
        return low | high << 16
    return encoded(decoded(old, type) + decoded(new, type), type)


UPDATES = {
    "add": added,
    "min": lambda old, new, type: encoded(min(decoded(old, type), decoded(new, type)), type),
    "max": lambda old, new, type: encoded(max(decoded(old, type), decoded(new, type)), type),
    "and": lambda old, new, type: old & new,
    "or": lambda old, new, type: old | new,
    "xor": lambda old, new, type: (old ^ new) % 2 ** (8 * SIZE[type]),
    "exch": lambda old, new, type: new,
}


def chain(first: int, last: int, steps: list[tuple[int, int]]) -> None:
    """Asserts that the steps (old, new) can be put in an order that leads from first to last."""
    now, left = first, list(steps)
    while left:
        here = [step for step in left if step[0] == now]
        assert here, f"nothing goes on from {now}"
        step = next((s for s in here if s[1] == now), here[0])
        left.remove(step)
        now = step[1]
    assert now == last


@pytest.mark.parametrize("op", ["atom", "red"])
@pytest.mark.parametrize(("name", "type"), UPDATED)
@pytest.mark.parametrize("order", ORDERS)
def test_atomics(order: str, name: str, type: str, op: str) -> None:
    """64 threads in 2 CTAs at 4 places: what each saw is a chain from what was there to what is there."""
    size, register = SIZE[type], REGISTER[SIZE[type]]
    value = [random.Random(i).randrange(1, 9) for i in range(64)] if name[:3] == "add" else drawn(64, size).tolist()
    if type in ("f32", "f64", "f16", "bf16", "f16x2", "bf16x2"):  # of small numbers sums are exact
        value = [encoded(float(v), type.removesuffix("x2")) * (0x10001 if type.endswith("x2") else 1) for v in value]
    source, places, seen = np.array(value, f"u{size}"), np.zeros(4, f"u{size}"), np.zeros(64, f"u{size}")
    if op == "atom":
        act = f"""{op}.global.gpu.{order}.{name}.{type} {register}22, [%rd11], {register}21;
            st.global.b{8 * size} [%rd13], {register}22;"""
    else:
        act = f"{op}.global.gpu.{order}.{name}.{type} [%rd11], {register}21;"
    execute(f"""mov.u32 %r2, %ctaid.x; shl.b32 %r3, %r2, 5; add.s32 %r1, %r1, %r3; {at(1, size, 10)} {at(3, size, 13)}
        ld.global.b{8 * size} {register}21, [%rd10]; and.b32 %r4, %r1, 3; mul.wide.u32 %rd11, %r4, {size};
        add.s64 %rd11, %rd11, %rd2; {act}""", source, places, seen, grid=(2,), seed=3)
    update = UPDATES[name.removesuffix(".noftz")]
    for i in range(4):
        given, saw = value[i::4], seen.tolist()[i::4]
        if op == "atom":
            chain(0, int(places[i]), [(old, update(old, v, type)) for old, v in zip(saw, given)])
        elif name != "exch":
            total = 0
            for v in given:
                total = update(total, v, type)
            assert int(places[i]) == total
        else:
            assert int(places[i]) in given


@pytest.mark.parametrize("op", ["atom", "red"])
@pytest.mark.parametrize("n", [2, 4])
def test_vectors_of_atomics(n: int, op: str) -> None:
    places = np.zeros(2 * n, np.float32)
    registers = ", ".join(f"%r{10 + i}" for i in range(n))
    values = "".join(f"cvt.rn.f32.u32 %r{10 + i}, %r1; add.f32 %r{10 + i}, %r{10 + i}, {float_constant(i)};"
                     for i in range(n))
    results = f"{{{', '.join(f'%r{30 + i}' for i in range(n))}}}, " if op == "atom" else ""
    execute(f"""{values} and.b32 %r2, %r1, 1; mul.wide.u32 %rd10, %r2, {4 * n}; add.s64 %rd10, %rd10, %rd1;
        {op}.global.gpu.relaxed.add.v{n}.f32 {results}[%rd10], {{{registers}}};""", places)
    assert places.tolist() == [sum(range(start, 32, 2)) + 16 * i for start in range(2) for i in range(n)]


def float_constant(value: float) -> str:
    return f"0f{encoded(float(value), 'f32'):08X}"


def test_compare_and_swap() -> None:
    """Of all threads one finds what it compares with."""
    place, seen = np.array([7], np.uint32), np.zeros(32, np.uint32)
    execute(f"""add.s32 %r2, %r1, 100; atom.global.gpu.relaxed.cas.b32 %r3, [%rd1], 7, %r2; {at(2, 4, 10)}
        st.global.b32 [%rd10], %r3;""", place, seen)
    winner = seen.tolist().index(7)
    assert place[0] == 100 + winner
    assert seen.tolist() == [7 if i == winner else 100 + winner for i in range(32)]
    execute("red.global.gpu.relaxed.cas.b32 [%rd1], 5, 6;", place)
    assert place[0] == 100 + winner


@pytest.mark.parametrize(("cache", "size"), [("ca", 4), ("ca", 8), ("ca", 16), ("cg", 16)])
@pytest.mark.parametrize("wait", ["wait_group 0", "wait_all"])
def test_copies(cache: str, size: int, wait: str) -> None:
    """Of the odd threads, whose source has no bytes to give, zeros."""
    source, to = drawn(32 * size // 4, 4), np.ones(32 * size // 4, np.uint32)
    commit = "cp.async.commit_group;" if "group" in wait else ""
    back = "".join(f"ld.shared.b32 %r9, [%r5+{i}]; st.global.b32 [%rd11+{i}], %r9;" for i in range(0, size, 4))
    space = "shared::cta" if wait == "wait_all" else "shared"
    execute(f"""{at(1, size, 10)} {at(2, size, 11)} mul.lo.s32 %r5, %r1, {size}; and.b32 %r6, %r1, 1;
        setp.eq.b32 %p1, %r6, 0; selp.b32 %r7, {size}, 0, %p1;
        cp.async.{cache}.{space}.global [ %r5 + 0 ], [ %rd10 + 0 ], {size:#x}, %r7; {commit} cp.async.{wait}; {back}""",
            source, to, shared=32 * size)
    want = source.reshape(32, -1).copy()
    want[1::2] = 0
    assert (to.reshape(32, -1) == want).all()


@pytest.mark.parametrize("type", [t for t in TYPES if SIZE[t] > 1])
def test_mov(type: str) -> None:
    bits = drawn(32, SIZE[type]).tolist()
    assert evaluate(f"mov.{type}", (f"b{8 * SIZE[type]}",), [(f"b{8 * SIZE[type]}", bits)]) == [bits]


def test_mov_of_predicates_and_constants() -> None:
    flags = [i % 3 == 0 for i in range(32)]
    assert evaluate("mov.pred", ("pred",), [("pred", list(map(int, flags)))]) == [list(map(int, flags))]
    to = np.zeros((32, 4), np.uint32)
    execute(f"""mov.pred %p1, -1; mov.pred %p2, 0; selp.b32 %r2, 3, 4, %p1; selp.b32 %r3, 3, 4, %p2; {at(1, 16, 10)}
        mov.b32 %r4, 0fBF800000; mov.b64 %rd12, 0d3FF0000000000000; cvt.rn.f32.f64 %r5, %rd12;
        st.global.v4.b32 [%rd10], {{%r2, %r3, %r4, %r5}};""", to)
    assert (to == [3, 4, encoded(-1.0, "f32"), encoded(1.0, "f32")]).all()


@pytest.mark.parametrize(("whole", "part", "n"), PARTS)
def test_parts_of_registers(whole: str, part: str, n: int) -> None:
    """Taken apart, the first lowest, and put together the other way round."""
    source, to = drawn(32, SIZE[whole]), np.zeros(32, f"u{SIZE[whole]}")
    parts = [f"{REGISTER[SIZE[part]]}{20 + i}" for i in range(n)]
    a, b = (f"{REGISTER[SIZE[whole]]}{30 + i}" for i in range(2))
    execute(f"""{at(1, SIZE[whole], 10)} ld.global.{whole} {a}, [%rd10]; mov.{whole} {{{', '.join(parts)}}}, {a};
        mov.{whole} {b}, {{{', '.join(parts[::-1])}}}; {at(2, SIZE[whole], 10)} st.global.{whole} [%rd10], {b};""",
            source, to)
    assert (to.view(f"u{SIZE[part]}").reshape(32, n) == source.view(f"u{SIZE[part]}").reshape(32, n)[:, ::-1]).all()


def test_special_registers() -> None:
    grid, threads = (3, 2, 4), 64
    to = np.zeros((math.prod(grid), threads, 8), np.uint32)
    execute("""mov.u32 %r2, %ctaid.x; mov.u32 %r3, %ctaid.y; mov.u32 %r4, %ctaid.z; mov.u32 %r5, %nctaid.x;
        mov.u32 %r6, %nctaid.y; mov.u32 %r7, %ntid.x; mov.u32 %r8, %laneid; mov.u32 %r9, %tid.y;
        mad.lo.s32 %r10, %r4, %r6, %r3; mad.lo.s32 %r10, %r10, %r5, %r2; mad.lo.s32 %r10, %r10, %r7, %r1;
        mul.wide.u32 %rd10, %r10, 32; add.s64 %rd10, %rd10, %rd1; mov.u32 %r11, %nctaid.z;
        st.global.v4.b32 [%rd10], {%r2, %r3, %r4, %r5}; st.global.v4.b32 [%rd10+16], {%r6, %r7, %r8, %r11};""",
            to, grid=grid, threads=threads)
    for z, y, x, t in itertools.product(range(4), range(2), range(3), range(threads)):
        assert to[(z * 2 + y) * 3 + x, t].tolist() == [x, y, z, 3, 2, threads, t % 32, 4]


def test_addresses() -> None:
    values = [5, 2**40]
    for form in ("cvta.to.global.u64", "cvta.global.u64"):
        assert evaluate(form, ("b64",), [("b64", values)]) == [values]
    execute("createpolicy.fractional.L2::evict_first.b64 %rd5, 0f3F800000;")
