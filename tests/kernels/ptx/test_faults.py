"""Planted mistakes: each program is right but for one thing, with which it is caught and without which it passes."""

from __future__ import annotations

import re

import numpy as np
import pytest

from .handwritten import at, execute
from .memory import Fault
from .test_matrix import descriptor, drawn, laid_out, product

pytestmark = pytest.mark.ptx


def caught(match: str, right: str, wrong: str, *buffers: np.ndarray, **options: object) -> None:
    execute(right, *buffers, **options)
    with pytest.raises(Fault, match=match):
        execute(wrong, *buffers, **options)


def words(n: int) -> np.ndarray:
    return np.arange(n, dtype=np.uint32)


# Global memory


@pytest.mark.parametrize("access", ["ld.global.b32 %r2, [%rd10+{}];", "st.global.b32 [%rd10+{}], %r1;",
                                    "red.global.gpu.relaxed.add.u32 [%rd10+{}], %r1;",
                                    "cp.async.ca.shared.global [%r1], [%rd10+{}], 0x4;"])
def test_out_of_bounds(access: str) -> None:
    """By one element, at either end; also if only one thread is."""
    if "cp" in access:
        access = "shl.b32 %r2, %r1, 2; " + access.replace("[%r1]", "[%r2]")
    for offset in (4, -4):
        right, wrong = (at(1, 4, 10) + access.format(o) for o in (0, offset))
        caught("out of bounds|before all buffers", right, wrong, words(32), shared=128)


def test_between_two_buffers() -> None:
    """Threads may read from several buffers, but not from what lies between."""
    whole = words(96)
    right = f"""{at(1, 4, 10)} {at(2, 4, 11)} setp.lt.u32 %p1, %r1, 16; selp.b64 %rd12, %rd10, %rd11, %p1;
        ld.global.b32 %r2, [%rd12]; {at(3, 4, 13)} st.global.b32 [%rd13], %r2;"""
    to = words(32)
    caught("out of bounds", right, right.replace("[%rd12]", "[%rd12+64]"), whole[:32], whole[64:], to)
    execute(right, whole[:32], whole[64:], to)
    assert to.tolist() == [i if i < 16 else 64 + i for i in range(32)]


@pytest.mark.parametrize(("width", "vector"), [(4, ""), (8, ".v2"), (16, ".v4")])
def test_misaligned(width: int, vector: str) -> None:
    registers = {4: "%r2", 8: "{%r2, %r3}", 16: "{%r2, %r3, %r4, %r5}"}[width]
    for load in (f"ld.global{vector}.b32 {registers}, [%rd1+OFFSET];", f"ld.shared{vector}.b32 {registers}, [OFFSET];"):
        zero = "{%r6, %r6, %r6, %r6}"
        start = f"mov.b32 %r6, 0; st.shared.v4.b32 [0], {zero}; st.shared.v4.b32 [16], {zero};"
        right, wrong = (start + load.replace("OFFSET", str(offset)) for offset in (0, width // 2))
        caught("misaligned", right, wrong, words(32), shared=64)


def test_wide_loads_of_a_buffer_whose_end_is_not_wide() -> None:
    load = "ld.global.v4.b32 {{%r2, %r3, %r4, %r5}}, [%rd1+{}];"
    caught("out of bounds by 12", load.format(16), load.format(32), words(9))


@pytest.mark.parametrize(("first", "second"), [
    ("st.global.b32 [%rd10], %r2;", "st.global.b32 [%rd10], %r2;"),
    ("ld.global.b32 %r3, [%rd10];", "st.global.b32 [%rd10], %r2;"),
    ("st.global.b32 [%rd10], %r2;", "ld.global.b32 %r3, [%rd10];"),
    ("red.global.gpu.relaxed.add.u32 [%rd10], 1;", "st.global.b32 [%rd10], %r2;"),
    ("red.global.gpu.relaxed.add.u32 [%rd10], 1;", "ld.global.b32 %r3, [%rd10];"),
    ("st.global.b32 [%rd10], %r2;", "red.global.gpu.relaxed.add.u32 [%rd10], 1;"),
])
def test_race_between_ctas(first: str, second: str) -> None:
    """Of two CTAs one does the first, the other the second, to its own or to the other's words, in either order."""
    body = """mov.u32 %r2, %ctaid.x; setp.eq.b32 %p1, %r2, 0; and.b32 %r4, %r2, {}; mad.lo.s32 %r5, %r4, 32, %r1;
        mul.wide.u32 %rd10, %r5, 4; add.s64 %rd10, %rd10, %rd1; @!%p1 bra other;
        FIRST bra.uni end; other: SECOND end:""".replace("FIRST", first).replace("SECOND", second)
    for seed in range(4):
        caught("race", body.format(1), body.format(0), words(64), grid=(2,), seed=seed)


def test_races_are_told_apart_by_elements() -> None:
    """Halves of a word may belong to two CTAs, if the buffer's elements are halves."""
    body = """mov.u32 %r2, %ctaid.x; mad.lo.s32 %r3, %r1, 2, %r2; mul.wide.u32 %rd10, %r3, 2;
        add.s64 %rd10, %rd10, %rd1; cvt.u16.u32 %rs1, %r2; st.global.b16 [%rd10], %rs1;"""
    execute(body, np.zeros(64, np.uint16), grid=(2,))


def test_several_batches_are_one_launch() -> None:
    """A race of CTAs of which one has finished before the other begins."""
    body = """mov.u32 %r2, %ctaid.x; mul.wide.u32 %rd10, %r2, 4; add.s64 %rd10, %rd10, %rd1;
        st.global.b32 [%rd10], %r2;"""
    caught("race", body, body.replace("[%rd10]", "[%rd1]"), words(400), grid=(400,), threads=64)


@pytest.mark.parametrize("seed", range(5))
def test_last_arriver(seed: int) -> None:
    """Each CTA writes a part, then counts itself; the last one adds the parts up. Only what releases and acquires
    orders the parts: a relaxed count, an acquire alone and a release alone do not."""
    n = 9
    body = """mov.u32 %r2, %ctaid.x; add.s32 %r3, %r2, 1; setp.eq.b32 %p1, %r1, 0; mul.wide.u32 %rd10, %r2, 4;
        add.s64 %rd10, %rd10, %rd1; @%p1 st.global.b32 [%rd10], %r3; bar.sync 0; mov.b32 %r4, -1;
        @%p1 atom.global.gpu.{}.add.u32 %r4, [%rd2], 1; mov.u32 %r5, %nctaid.x; add.s32 %r5, %r5, -1;
        setp.ne.b32 %p2, %r4, %r5; @%p2 bra end; mov.b32 %r6, 0; mov.b32 %r7, 0; mov.b64 %rd11, %rd1;
        loop: ld.global.b32 %r8, [%rd11]; add.s64 %rd11, %rd11, 4; add.s32 %r6, %r6, %r8; add.s32 %r7, %r7, 1;
        setp.lt.u32 %p3, %r7, %nctaid.x; @%p3 bra loop; st.global.b32 [%rd3], %r6; end:"""
    for order, right in (("acq_rel", True), ("relaxed", False), ("acquire", False), ("release", False)):
        parts, count, total = np.zeros(n, np.uint32), np.zeros(1, np.uint32), np.zeros(1, np.uint32)
        if right:
            execute(body.format(order), parts, count, total, grid=(n,), seed=seed)
            assert total[0] == n * (n + 1) // 2
        else:
            with pytest.raises(Fault, match="race"):
                execute(body.format(order), parts, count, total, grid=(n,), seed=seed)


def test_what_is_written_after_the_release_is_not_ordered() -> None:
    body = """mov.u32 %r2, %ctaid.x; mul.wide.u32 %rd10, %r2, 4; add.s64 %rd10, %rd10, %rd1; {}
        atom.global.gpu.acq_rel.add.u32 %r4, [%rd2], 1; {} setp.ne.b32 %p2, %r4, 1; @%p2 bra end;
        ld.global.v2.b32 {{%r5, %r6}}, [%rd1]; end:"""
    store = "st.global.b32 [%rd10], %r2;"
    for seed in range(4):
        options = {"grid": (2,), "seed": seed, "threads": 1}
        execute(body.format(store, ""), words(2), np.zeros(1, np.uint32), **options)
        with pytest.raises(Fault, match="race"):
            execute(body.format("", store), words(2), np.zeros(1, np.uint32), **options)


# Shared memory

HALF = """shl.b32 %r2, %r1, 2; xor.b32 %r3, %r2, 128; {} st.shared.b32 [%r2], %r1; {} ld.shared.b32 %r4, [%r3]; {}
    st.shared.b32 [%r2], %r4; """ + at(1, 4, 10) + "st.global.b32 [%rd10], %r4;"
BARRIER = "bar.sync 0;"


def test_unwritten_shared_memory() -> None:
    caught("before it is written", HALF.format("", BARRIER, BARRIER), HALF.format("", BARRIER, BARRIER).replace(
        "st.shared.b32 [%r2], %r1", "@%p1 st.shared.b32 [%r2], %r1"), words(64), threads=64, shared=256)


def test_beyond_shared_memory() -> None:
    body = HALF.format("", BARRIER, BARRIER)
    execute(body, words(64), threads=64, shared=256)
    for size in (252, 128, 0):
        with pytest.raises(Fault, match="shared memory, which has"):
            execute(body, words(64), threads=64, shared=size)


def test_missing_barrier_before_a_read() -> None:
    """Each of two warps reads what the other one has written."""
    caught("missing barrier: shared memory is read", HALF.format("", BARRIER, BARRIER), HALF.format("", "", BARRIER),
           words(64), threads=64, shared=256)


def test_missing_barrier_before_a_write() -> None:
    """Each of two warps writes what the other one reads."""
    caught("missing barrier: shared memory is written", HALF.format("", BARRIER, BARRIER), HALF.format("", BARRIER, ""),
           words(64), threads=64, shared=256)


def test_missing_barrier_between_writes() -> None:
    body = "shl.b32 %r2, %r1, 2; xor.b32 %r3, %r2, 128; st.shared.b32 [%r2], %r1; {} st.shared.b32 [%r3], %r1;"
    caught("missing barrier: shared memory is written", body.format(BARRIER), body.format(""), words(1), threads=64,
           shared=256)


def test_a_barrier_of_a_warp_is_none_of_the_cta() -> None:
    with pytest.raises(Fault, match="missing barrier"):
        execute(HALF.format("", "bar.warp.sync -1;", BARRIER), words(64), threads=64, shared=256)


def test_what_needs_no_barrier() -> None:
    """Within a warp; reads by several; several that write the same; rounds of a loop with one barrier, two places."""
    execute(HALF.format("", "", "").replace("128", "64"), words(64), threads=64, shared=256)
    execute("mov.b32 %r2, 5; st.shared.b32 [0], %r2; bar.sync 0; ld.shared.b32 %r3, [0]; ld.shared.b32 %r3, [0];",
            words(1), threads=128, shared=16)
    execute("""shl.b32 %r2, %r1, 2; xor.b32 %r3, %r2, 128; mov.b32 %r4, 0; loop: st.shared.b32 [%r2], %r4; bar.sync 0;
        ld.shared.b32 %r5, [%r3]; xor.b32 %r2, %r2, 256; xor.b32 %r3, %r3, 256; add.s32 %r4, %r4, 1;
        setp.lt.u32 %p1, %r4, 6; @%p1 bra loop;""", words(1), threads=64, shared=512)


def test_two_values_at_once() -> None:
    """Also by threads of one warp; those alike but for rounding are counted."""
    caught("two threads store different values", "mov.b32 %r2, 3; st.shared.b32 [0], %r2;", "st.shared.b32 [0], %r1;",
           words(1), shared=16)
    machine = execute("add.s32 %r2, %r1, 0f3F800000; st.shared.b32 [0], %r2;", words(1), shared=16)
    assert machine.contested == 31
    assert execute("mov.b32 %r2, 3; st.shared.b32 [0], %r2;", words(1), shared=16).contested == 0


COPY = at(1, 16, 10) + """shl.b32 %r2, %r1, 4; cp.async.cg.shared.global [%r2], [%rd10], 0x10; cp.async.commit_group;
    cp.async.cg.shared.global [%r2+1024], [%rd10], 0x10; cp.async.commit_group; {} ld.shared.b32 %r3, [%r2{}];"""


def test_copies_come_late() -> None:
    """The first of two groups has come when one may be missing; the second, and without waiting each, has not."""
    for first in ("wait_group 1", "wait_group 0", "wait_all"):
        caught("before its copy has been waited for", COPY.format(f"cp.async.{first};", ""), COPY.format("", ""),
               words(256), threads=64, shared=2048)
    caught("before its copy has been waited for", COPY.format("cp.async.wait_group 0;", "+1024"),
           COPY.format("cp.async.wait_group 1;", "+1024"), words(256), threads=64, shared=2048)


def test_copies_of_other_threads_need_a_barrier() -> None:
    other = COPY.format("cp.async.wait_group 0; {} xor.b32 %r2, %r2, 512;", "")
    caught("missing barrier", other.format(BARRIER), other.format(""), words(256), threads=64, shared=2048)


def test_copies_under_way_are_not_overwritten() -> None:
    body = COPY.format("cp.async.wait_group {};", "") + "st.shared.b32 [%r2+1024], %r1;"
    caught("a copy is under way", body.format(0), body.format(1), words(256), threads=64, shared=2048)


def test_groups_are_counted_by_thread() -> None:
    """CTAs that commit more groups than others, in a loop that those have left, wait for their own."""
    body = f"""{at(1, 4, 10)} mov.u32 %r2, %ctaid.x; mov.b32 %r3, 0; shl.b32 %r4, %r1, 2;
        loop: cp.async.ca.shared.global [%r4], [%rd10], 0x4; cp.async.commit_group; add.s32 %r4, %r4, 128;
        add.s32 %r3, %r3, 1; setp.le.u32 %p1, %r3, %r2; @%p1 bra loop; cp.async.wait_group {{}};
        ld.shared.b32 %r5, [%r4+-128];"""
    caught("before its copy", body.format(0), body.format(1), words(32), grid=(4,), shared=512)


# Barriers, warps


def test_a_barrier_that_some_do_not_reach() -> None:
    body = "setp.lt.u32 %p1, %r1, {}; @!%p1 bra end; bar.sync 0; end: {} add.s32 %r2, %r1, 1;"
    caught("barrier that others", body.format(64, ""), body.format(40, "bar.sync 0;"), words(1), threads=64)


def test_those_that_have_returned_are_not_waited_for() -> None:
    execute("setp.lt.u32 %p1, %r1, 32; @%p1 ret; bar.sync 0;", words(1), threads=64)


def test_a_part_of_a_warp() -> None:
    body = "setp.lt.u32 %p1, %r1, {}; @%p1 bra end; shfl.sync.bfly.b32 %r2, %r1, 1, 31, -1; end:"
    caught("a part of 32 threads", body.format(32), body.format(33), words(1), threads=64)


def test_unknown_instructions() -> None:
    for text in ("tcgen05.wait.sync", "add.rz.f32 %r2, %r1, %r1", "add.rn.f32.bf16 %r2, %rs1, %r1",
                 "ld.local.b32 %r2, [0]", "mul.hi.s64 %rd2, %rd1, %rd1", "mov.u32 %r2, %clock",
                 "cvt.rn.satfinite.e4m3x2.f32 %rs1, %r1, %r1"):
        with pytest.raises(NotImplementedError, match=f"%clock|{re.escape(text.split()[0])}"):
            execute(f"{text};", words(1))


# Products


@pytest.fixture
def operands() -> tuple:
    a, b = drawn(64, 16), drawn(64, 16, seed=1)
    first, *of_a = laid_out(a, "f16", 128, False, 8192)
    second, *of_b = laid_out(b, "f16", 128, False, 8192)
    return a, b, np.concatenate([first, second]), (descriptor(0, *of_a, 128), descriptor(8192, *of_b, 128))


@pytest.mark.parametrize(("change", "match"), [
    *((change, "shared memory, which has") for change in (16384 >> 4, 8192 >> 4, 2048 << 32)),
    *((change, "other bits") for change in (1 << 46, 1 << 14, 1 << 49))])
def test_wrong_descriptor(change: int, match: str, operands: tuple) -> None:
    """That of B: an address or offset that leads out of shared memory, bits that mean nothing here."""
    a, b, shared, (left, right) = operands
    assert (product("f16", 64, a, (left, right), shared, "1, 1, 0, 0") == 1 + a @ b.T).all()
    with pytest.raises(Fault, match=match):
        product("f16", 64, a, (left, right + change), shared, "1, 1, 0, 0")


@pytest.mark.parametrize("change", [1 << 62, -(32 << 32), 32 >> 4, -1 << 9])
def test_wrong_descriptor_within_shared_memory(change: int, operands: tuple) -> None:
    """Another mode, offset or address reads something else."""
    a, b, shared, (left, right) = operands
    assert (product("f16", 64, a, (left, right + change), shared, "1, 1, 0, 0") != 1 + a @ b.T).any()


def test_descriptors_that_differ(operands: tuple) -> None:
    a, _, shared, (left, right) = operands
    with pytest.raises(Fault, match="different descriptors"):
        product("f16", 64, a, (left, right), shared, "1, 1, 0, 0", before="""cvt.u64.u32 %rd22, %r1;
            wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16
            {%r200,%r201,%r202,%r203}, %rd20, %rd22, %p1, 1, 1, 0, 0;""")


def test_products_read_what_has_been_written(operands: tuple) -> None:
    """B ends beyond what has been."""
    *_, shared, (left, right) = operands
    body = f"""shl.b32 %r2, %r1, 4; mov.b32 %r3, 0; mov.b32 %r4, 0;
        fill: st.shared.v4.b32 [%r2], {{%r3, %r3, %r3, %r3}}; add.s32 %r2, %r2, 2048; add.s32 %r4, %r4, 1;
        setp.lt.u32 %p1, %r4, COUNT; @%p1 bra fill; bar.sync 0; mov.b64 %rd20, {left}; mov.b64 %rd21, {right};
        wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {{%r200,%r201,%r202,%r203}}, %rd20, %rd21, 0, 1, 1, 0, 0;"""
    caught("before it is written", body.replace("COUNT", "5"), body.replace("COUNT", "4"), words(1), threads=128,
           shared=len(shared))


def test_what_a_product_may_read_is_not_overwritten(operands: tuple) -> None:
    a, _, shared, descriptors = operands
    store = "mov.b32 %r30, -1; st.shared.b32 [0], %r30;"
    with pytest.raises(Fault, match="a wgmma may still read"):
        product("f16", 64, a, descriptors, shared, "1, 1, 0, 0", before=store)
    with pytest.raises(Fault, match="missing barrier"):
        product("f16", 64, a, descriptors, shared, "1, 1, 0, 0", before=f"wgmma.wait_group.sync.aligned 0; {store}")
    product("f16", 64, a, descriptors, shared, "1, 1, 0, 0",
            before=f"wgmma.wait_group.sync.aligned 0; {BARRIER} {store}")


def test_a_product_is_waited_for(operands: tuple) -> None:
    """Before, its accumulators are NaN; a next product goes on with what they will be."""
    a, b, shared, descriptors = operands
    found = product("f16", 64, a, descriptors, shared, "1, 1, 0, 0", before="add.f32 %r60, %r60, 0f00000000;")
    assert np.isfinite(found).all()  # overwritten by the result
    found = product("f16", 64, a, descriptors, shared, "1, 1, 0, 0",
                    before="add.f32 %r200, %r60, 0f00000000; wgmma.wait_group.sync.aligned 0; mov.b32 %r60, %r200;")
    assert np.isnan(found[:, 0]).any()
    registers = ", ".join(f"%r{60 + i}" for i in range(32))
    again = f"""wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 {{{registers}}}, %rd20, %rd21,
        %p1, 1, 1, 0, 0; wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 1;"""
    assert (product("f16", 64, a, descriptors, shared, "1, 1, 0, 0", before=again) == 1 + 2 * (a @ b.T)).all()
    again += "add.f32 %r200, %r60, 0f00000000; wgmma.wait_group.sync.aligned 0; mov.b32 %r60, %r200;"
    assert np.isnan(product("f16", 64, a, descriptors, shared, "1, 1, 0, 0", before=again)[:, 0]).any()
