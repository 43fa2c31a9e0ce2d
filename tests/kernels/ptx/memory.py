"""Global and shared memory, and what no program may do to them."""

from __future__ import annotations

import bisect
import ctypes
from dataclasses import dataclass, field

import numpy as np


class Fault(AssertionError):
    """What no program may do; an assertion, so that tests of planted mistakes count it as noticed."""


def of_width(array: np.ndarray, width: int) -> np.ndarray:
    """A view of bytes as items of that many, without an incomplete last one: gathered and scattered whole."""
    return array[:len(array) // width * width].view(np.dtype((np.void, width)))


@dataclass
class Buffer:
    """Memory of the host that a kernel was given.

    Attributes:
        start: its address, a multiple of 16.
        data: (bytes,).
        granule: bytes of its smallest element: what races are told apart by.
        writer: (granules,) the CTA that has written it, else NOBODY. Made when it is first written.
        stamp: (granules,) the state of `Order` when it did.
        atomic: (granules,) the CTA that has changed it by atomics, MANY or NOBODY. Made as `writer`.
        reads: of all loads (stamp, granules (lanes, n), CTAs (lanes,), text); those of atomics are in `updates`.
    """

    start: int
    data: np.ndarray
    granule: int
    writer: np.ndarray | None = None
    stamp: np.ndarray | None = None
    atomic: np.ndarray | None = None
    reads: list[tuple] = field(default_factory=list)
    updates: list[tuple] = field(default_factory=list)


NOBODY, MANY = -1, -2


class Order:
    """Which CTAs know of what others have done: vector clocks, moved on by releases and acquires of atomics.

    `known[a, b]` is the last release of b that a has acquired; `known[a, a]` counts the releases of a. Each state is
    kept under its number, the stamp.
    """

    def __init__(self, ctas: int) -> None:
        self.ctas = ctas
        self.states: list[np.ndarray] = []
        self.released: dict[int, np.ndarray] = {}  # by address

    @property
    def stamp(self) -> int:
        return max(len(self.states) - 1, 0)

    def atomics(self, addresses: np.ndarray, ctas: np.ndarray, acquire: bool, release: bool) -> None:
        """Those of one instruction, one after the other."""
        known = self.states[-1].copy() if self.states else np.eye(self.ctas, dtype=np.int32)
        if not self.states:
            self.states.append(known.copy())
        for address, cta in zip(addresses.tolist(), ctas.tolist()):
            there = self.released.get(address)
            if acquire and there is not None:
                known[cta] = np.maximum(known[cta], there)
            if release:
                self.released[address] = known[cta].copy() if there is None else np.maximum(there, known[cta])
                known[cta, cta] += 1
        self.states.append(known)

    def before(self, cta: np.ndarray, stamp: np.ndarray, other: np.ndarray, later: np.ndarray) -> np.ndarray:
        """Whether what a CTA did at a stamp happened before what another did at a later one."""
        if not self.states:
            return np.zeros(np.broadcast(cta, other).shape, bool)
        known = np.stack(self.states)
        return known[later, other, cta] >= known[stamp, cta, cta]


class Global:
    """All buffers of a launch. Accesses of CTAs that nothing orders, at least one of them a plain write, are races.

    Writes are noted as they come; reads are kept and looked at in the end, and only those of buffers that were written.
    """

    def __init__(self, ctas: int) -> None:
        self.starts: list[int] = []
        self.buffers: list[Buffer] = []
        self.order = Order(ctas)

    def add(self, start: int, size: int, granule: int) -> None:
        """Memory at an address of the host; what overlaps must be of the same storage."""
        if not size:
            return
        if start in self.starts:
            buffer = self.buffers[self.starts.index(start)]
            buffer.granule = min(buffer.granule, granule)
            return
        assert start % 16 == 0, "a storage that is not aligned"
        at = bisect.bisect(self.starts, start)
        self.starts.insert(at, start)
        self.buffers.insert(at, Buffer(start, np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(start)),
                                       granule))

    def _find(
        self, addresses: np.ndarray, width: int, text: str
    ) -> list[tuple[Buffer, np.ndarray | slice, np.ndarray]]:
        """(buffer, which of the addresses, their offsets) of each buffer that they are in."""
        if (addresses & np.int64(width - 1)).any():
            raise Fault(f"misaligned access of {width} bytes: {text}")
        found, rest = [], slice(None)
        while True:
            left = addresses[rest]
            at = bisect.bisect(self.starts, int(left[0])) - 1
            if at < 0:
                raise Fault(f"address {int(left[0]):#x} is before all buffers: {text}")
            buffer = self.buffers[at]
            offset = left - buffer.start
            inside = (offset >= 0) & (offset <= len(buffer.data) - width)
            if inside.all():
                found.append((buffer, rest, offset))
                return found
            if not inside[0]:
                end = buffer.start + len(buffer.data)
                raise Fault(f"out of bounds by {int(left[0]) + width - end} bytes: {text}")
            index = np.arange(len(addresses)) if isinstance(rest, slice) else rest
            found.append((buffer, index[inside], offset[inside]))
            rest = index[~inside]

    def load(self, addresses: np.ndarray, width: int, ctas: np.ndarray, text: str) -> np.ndarray:
        """addresses, ctas: (lanes,). Items of `width` bytes (lanes,)."""
        out = np.empty(len(addresses), np.dtype((np.void, width)))
        for buffer, lanes, offset in self._find(addresses, width, text):
            out[lanes] = of_width(buffer.data, width)[offset // width]
            buffer.reads.append((self.order.stamp, offset, width, ctas[lanes], text))
        return out

    def store(self, addresses: np.ndarray, items: np.ndarray, ctas: np.ndarray, text: str) -> None:
        """addresses, items, ctas: (lanes,)."""
        width = items.dtype.itemsize
        for buffer, lanes, offset in self._find(addresses, width, text):
            self._mark_written(buffer, offset, width, ctas[lanes], text)
            of_width(buffer.data, width)[offset // width] = items[lanes]

    def _mark_written(self, buffer: Buffer, offset: np.ndarray, width: int, ctas: np.ndarray, text: str) -> None:
        _make_marks(buffer)
        at, cta, now = _granules(buffer, offset, width), ctas[:, None], self.order.stamp
        before = buffer.writer[at]
        if (before != cta).any():
            others = (before != cta) & (before != NOBODY)
            if others.any() and not self.order.before(before, buffer.stamp[at], cta, now)[others].all():
                raise Fault(f"race: what another CTA has written is written again: {text}")
            buffer.writer[at] = cta
            if (buffer.writer[at] != cta).any():
                raise Fault(f"race: two CTAs write to one place: {text}")
        if now:
            buffer.stamp[at] = now
        if not _only(buffer.atomic[at], cta):
            raise Fault(f"race: what another CTA changes by atomics is written: {text}")

    def atomic(self, addresses: np.ndarray, width: int, ctas: np.ndarray, text: str,
               acquire: bool = False, release: bool = False) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Notes them, in the order of the lanes, and gives of each buffer (its data, lanes, offsets) to be changed."""
        if acquire or release:
            self.order.atomics(addresses, ctas, acquire, release)
        parts = []
        for buffer, lanes, offset in self._find(addresses, width, text):
            _make_marks(buffer)
            at, cta = _granules(buffer, offset, width), ctas[lanes, None]
            before = buffer.atomic[at]
            buffer.atomic[at] = np.where((before == NOBODY) | (before == cta), cta, MANY)
            again = buffer.atomic[at]
            buffer.atomic[at] = np.where(again == cta, again, MANY)
            buffer.updates.append((self.order.stamp, offset, width, ctas[lanes], text))
            parts.append((buffer.data, np.arange(len(addresses))[lanes], offset))
        return parts

    def check(self) -> None:
        """At the end of the launch: raises Fault if something was read that another CTA has written or will."""
        for buffer in self.buffers:
            if buffer.writer is None:
                continue
            for kind, log in (("read", buffer.reads), ("changed by atomics", buffer.updates)):
                for stamp, offset, width, ctas, text in log:
                    at, cta = _granules(buffer, offset, width), ctas[:, None]
                    writer = buffer.writer[at]
                    others = (writer != cta) & (writer != NOBODY)
                    if others.any():
                        written = buffer.stamp[at]
                        ordered = (self.order.before(writer, written, cta, stamp)
                                   | self.order.before(cta, stamp, writer, written))
                        if not ordered[others].all():
                            raise Fault(f"race: what another CTA writes is {kind}: {text}")
                    if kind == "read" and not _only(buffer.atomic[at], cta):
                        raise Fault(f"race: what another CTA changes by atomics is read: {text}")


def _make_marks(buffer: Buffer) -> None:
    if buffer.writer is None:
        n = -(-len(buffer.data) // buffer.granule)
        buffer.writer, buffer.atomic = np.full(n, NOBODY, np.int32), np.full(n, NOBODY, np.int32)
        buffer.stamp = np.zeros(n, np.int32)


def _granules(buffer: Buffer, offset: np.ndarray, width: int) -> np.ndarray:
    """(lanes, n) of accesses to bytes offset .. offset + width."""
    return (offset // buffer.granule)[:, None] + np.arange(max(width // buffer.granule, 1))


def _only(marks: np.ndarray, cta: np.ndarray) -> bool:
    return bool(((marks == NOBODY) | (marks == cta)).all())


# Marks of shared memory: what has last happened to a granule, as 64 * epoch + warp (of MANY_WARPS: several). The epoch
# counts the barriers that a CTA has passed, from 1. Two warps in one epoch have no barrier between them.
UNWRITTEN, COMING = 0, 1  # nothing has written it; a copy to it is under way
MANY_WARPS = 63
READING = 0xFFFFFFFF  # a wgmma that is under way may read it


class Shared:
    """Shared memory of all CTAs of a batch.

    Each has `size` bytes from its own address 0. Per granule (the smallest access of the program) it is noted who has
    last written it and who has read it since which barrier; from that follows what is missing a barrier: an access in
    the same epoch as another warp's, one of them a write that changes it. `contested` counts threads whose value was
    not the one of several, alike but for rounding, that one instruction stored to one place: which one is stored is
    undefined, here the last.
    """

    def __init__(self, ctas: int, threads: int, size: int, granule: int) -> None:
        self.size, self.granule, self.threads = size, granule, threads
        self.stride = -(-max(size, 16) // 16) * 16
        self.data = np.full(ctas * self.stride, 0xFF, np.uint8)  # NaN in any type
        self.base = np.repeat(np.arange(ctas) * self.stride, threads)
        self.written = np.full(ctas * self.stride // granule, UNWRITTEN, np.uint32)
        self.read = np.zeros_like(self.written)
        self.contested = 0
        self.me = np.tile(64 + np.arange(threads, dtype=np.uint32) // 32, ctas)  # of each thread now

    def barrier(self, threads: np.ndarray | None) -> None:
        """Passed by these threads, whole CTAs (None: all)."""
        self.me += np.uint32(64) if threads is None else np.where(threads, np.uint32(64), np.uint32(0))

    def _at(self, base: np.ndarray, address: np.ndarray, width: int, text: str) -> np.ndarray:
        """Which item of `width` bytes of all memory."""
        if (address & (width - 1)).any():
            raise Fault(f"misaligned access of {width} bytes to shared memory: {text}")
        low, high = int(address.min()), int(address.max()) + width
        if low < 0 or high > self.size:
            raise Fault(f"bytes {low} to {high} of shared memory, which has {self.size}: {text}")
        return (base + address) // width

    def _marks(self, of: np.ndarray, at: np.ndarray, width: int) -> np.ndarray:
        """(lanes, n)"""
        return of_width(of.view(np.uint8), 4 * width // self.granule)[at].view(np.uint32).reshape(len(at), -1)

    def _mark(self, of: np.ndarray, at: np.ndarray, width: int, marks: np.ndarray) -> None:
        """marks: (lanes, n)"""
        wide = 4 * width // self.granule
        marks = np.ascontiguousarray(np.broadcast_to(marks, (len(at), width // self.granule)), np.uint32)
        of_width(of.view(np.uint8), wide)[at] = marks.view(np.dtype((np.void, wide)))[:, 0]

    def load(self, lanes: np.ndarray | slice, address: np.ndarray, width: int, text: str) -> np.ndarray:
        """By threads, whose addresses (lanes,) are given. Items of `width` bytes (lanes,)."""
        return self.load_as(self.base[lanes], self.me[lanes], address, width, text)[0]

    def load_as(
        self, base: np.ndarray, me: np.ndarray, address: np.ndarray, width: int, text: str, reading: bool = False
    ) -> tuple[np.ndarray, np.ndarray]:
        """By whoever `me` (lanes,) says. Items (lanes,) and where they are; with `reading` the caller goes on reading
        until it calls `has_read` with that."""
        at = self._at(base, address, width, text)
        me = me[:, None]
        marks = self._marks(self.written, at, width)
        if (marks <= COMING).any():
            raise Fault(f"shared memory is read before {'it is written' if (marks == UNWRITTEN).any() else 'its copy'}"
                        f"{'' if (marks == UNWRITTEN).any() else ' has been waited for'}: {text}")
        if _conflict(marks, me).any():
            raise Fault(f"missing barrier: shared memory is read that another warp has just written: {text}")
        if reading:
            self._mark(self.read, at, width, READING)
        else:
            self._mark_read(at, width, me)
        return of_width(self.data, width)[at], at

    def has_read(self, at: np.ndarray, me: np.ndarray, width: int) -> None:
        self._mark(self.read, at, width, me[:, None])

    def _mark_read(self, at: np.ndarray, width: int, me: np.ndarray) -> None:
        before = self._marks(self.read, at, width)
        marks = np.maximum(before, np.where(_conflict(before, me), me | np.uint32(MANY_WARPS), me))
        self._mark(self.read, at, width, marks)
        conflict = _conflict(self._marks(self.read, at, width), me).any(1)
        if conflict.any():  # of several warps in this instruction the last one stands there
            self._mark(self.read, at[conflict], width, marks[conflict] | np.uint32(MANY_WARPS))

    def store(self, lanes: np.ndarray | slice, address: np.ndarray, items: np.ndarray, text: str) -> None:
        """address, items: (lanes,)."""
        width, me = items.dtype.itemsize, self.me[lanes][:, None]
        at = self._at(self.base[lanes], address, width, text)
        memory = of_width(self.data, width)
        self._check_writable(at, width, me, text, memory[at] != items)
        memory[at] = items
        self._mark(self.written, at, width, me)
        lost = memory[at] != items
        if lost.any():
            if not _alike(memory[at[lost]], items[lost]):
                raise Fault(f"two threads store different values to one place: {text}")
            self.contested += int(lost.sum())

    def _check_writable(self, at: np.ndarray, width: int, me: np.ndarray, text: str, changes: np.ndarray) -> None:
        written, read = self._marks(self.written, at, width), self._marks(self.read, at, width)
        if (read == READING).any():
            raise Fault(f"shared memory is written that a wgmma may still read: {text}")
        if (written == COMING).any():
            raise Fault(f"shared memory is written to which a copy is under way: {text}")
        conflict = _conflict(written, me).any(1) | _conflict(read, me).any(1)
        if (conflict & changes).any():
            raise Fault(f"missing barrier: shared memory is written that another warp has just used: {text}")

    def copy(self, lanes: np.ndarray, address: np.ndarray, width: int, text: str) -> None:
        """A copy to there begins; until `copied` it may or may not have come."""
        at, me = self._at(self.base[lanes], address, width, text), self.me[lanes][:, None]
        self._check_writable(at, width, me, text, np.ones(len(at), bool))
        of_width(self.data, width)[at] = np.void(b"\xff" * width)
        self._mark(self.written, at, width, COMING)

    def copied(self, lanes: np.ndarray, address: np.ndarray, items: np.ndarray) -> None:
        width = items.dtype.itemsize
        at = (self.base[lanes] + address) // width
        of_width(self.data, width)[at] = items
        self._mark(self.written, at, width, self.me[lanes][:, None])


def _conflict(marks: np.ndarray, me: np.ndarray) -> np.ndarray:
    """Whether a mark is of the epoch of `me` and of another warp."""
    return (marks ^ me) - np.uint32(1) < np.uint32(63)


def _alike(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether items are the same but for the rounding of float32.

    Triton lets all threads store what they hold of one reduced element. Where the compiler has contracted the first
    step of the reduction into a fused multiply-add, that is fma(x, x, y * y) in one and fma(y, y, x * x) in another.
    """
    if a.dtype.itemsize % 4:
        return False
    a, b = a.view(np.float32), b.view(np.float32)
    return bool((np.abs(a - b) <= np.float32(1e-3) * np.abs(b).max()).all())


class Groups:
    """Asynchronous operations, in groups that their agents (threads or warpgroups) commit and wait for."""

    def __init__(self, agents: int) -> None:
        self.committed = np.zeros(agents, np.int64)
        self.pending: list[tuple[np.ndarray, np.ndarray, object, tuple[np.ndarray, ...]]] = []

    def begin(self, agents: np.ndarray, what: object, *arrays: np.ndarray) -> None:
        """arrays: each (agents, ...)."""
        self.pending.append((agents, self.committed[agents], what, arrays))

    def commit(self, agents: np.ndarray | slice) -> None:
        self.committed[agents] += 1

    def wait(self, waits: np.ndarray, left: int) -> list[tuple[np.ndarray, object, tuple[np.ndarray, ...]]]:
        """Those (agents, what, arrays) that have to be complete once `waits` (bool of each agent) have waited until at
        most `left` of their groups are not."""
        complete, pending = [], []
        for agents, group, what, arrays in self.pending:
            done = waits[agents] & (group < self.committed[agents] - left)
            if done.any():
                complete.append((agents[done], what, tuple(a[done] for a in arrays)))
            if not done.all():
                pending.append((agents[~done], group[~done], what, tuple(a[~done] for a in arrays)))
        self.pending = pending
        return complete

    def pending_of(self, what: object) -> np.ndarray:
        """The agents that have begun such an operation which is not complete."""
        of_it = [agents for agents, _, other, _ in self.pending if other == what]
        return np.concatenate([np.empty(0, np.int64), *of_it])
