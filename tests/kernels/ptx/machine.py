"""Threads in lockstep: all of many CTAs execute one instruction, then the next."""

from __future__ import annotations

import numpy as np

from . import collectives, instructions, matrix, movement  # noqa: F401, they fill the table
from .formats import UNSIGNED
from .memory import Fault, Global, Groups, Shared
from .program import Instruction, Program, Register
from .table import Mask, bind

THREADS = 1 << 13  # of a batch of CTAs: enough to hide what an instruction costs in Python, few enough for a cache
NEVER = np.int64(1 << 40)
WARP = 32
WARPGROUP = 128


def prepare(text: str) -> Program:
    """A program whose instructions are bound to the table, but for those that `Machine` follows itself."""
    program = Program(text)
    for instruction in program.code:
        if not _is_control(instruction):
            bind(instruction)
    return program


def _is_control(instruction: Instruction) -> bool:
    return instruction.opcode in ("bra", "ret", "exit") or _is_barrier(instruction)


def _is_barrier(instruction: Instruction) -> bool:
    """Of a whole CTA."""
    return instruction.opcode in ("bar", "barrier") and "warp" not in instruction.parts


class Machine:
    """Executes one launch.

    Attributes, of the batch of CTAs that is being executed, with T threads:
        registers: by index their bits, (T,), or (1,) if all threads have the same. Arrays are replaced, never changed.
        cta: (T,) the number of each thread's CTA in the grid.
        memory, shared: what loads and stores go to.
        copies, products: cp.async of each thread, wgmma of each warpgroup, that have begun.
        accumulators: what registers will hold once the products to them are complete.
    """

    def __init__(self, program: Program, shared: int, seed: object = 0) -> None:
        """shared: bytes of shared memory of a CTA."""
        self.program, self.size = program, shared
        self.random = np.random.default_rng(seed)
        self.granule = min((w for w in map(movement.shared_width, program.code) if w), default=16)
        self.executed = 0  # instructions, each counted once for each thread
        self.contested = 0  # see `Shared`

    def run(self, grid: tuple[int, ...], parameters: list[float], memory: Global) -> None:
        """parameters: numbers, for pointers addresses. CTAs run in batches, in an order drawn at random.

        Raises Fault for what no program may do."""
        self.grid = (*grid, 1, 1)[:3]
        self.memory = memory
        self.parameters = np.concatenate([np.empty(0, np.uint8), *(
            _parameter(type, value) for type, value in zip(self.program.parameters.values(), parameters, strict=True))])
        order = self.random.permutation(int(np.prod(self.grid)))
        batch = max(1, THREADS // self.program.threads)
        with np.errstate(all="ignore"):
            for first in range(0, len(order), batch):
                self._start(order[first:first + batch])
                self._run_batch()
                self.contested += self.shared.contested
        memory.check()

    def _start(self, ctas: np.ndarray) -> None:
        per_cta = self.program.threads
        self.ctas, self.threads = len(ctas), len(ctas) * per_cta
        self.cta = np.repeat(ctas, per_cta)
        thread = np.tile(np.arange(per_cta, dtype=np.uint32), len(ctas))
        zero = np.zeros(1, np.uint32)
        special = {"%tid.x": thread, "%tid.y": zero, "%tid.z": zero, "%laneid": thread % WARP,
                   "%ntid.x": zero + np.uint32(per_cta)}
        ids = np.unravel_index(self.cta, self.grid, order="F")
        for axis, index, n in zip("xyz", ids, self.grid):
            special[f"%ctaid.{axis}"] = index.astype(np.uint32)
            special[f"%nctaid.{axis}"] = zero + np.uint32(n)
        never_written = {size: np.full(1, -1).astype(dtype) for size, dtype in UNSIGNED.items()}  # NaN as a float
        never_written[0] = np.zeros(1, bool)
        self.registers = [never_written[size] for size in self.program.sizes]
        for name, register in self.program.special.items():
            if name not in special:
                raise NotImplementedError(name)
            self.registers[register.index] = special[name]
        self.shared = Shared(self.ctas, per_cta, self.size, self.granule)
        self.copies, self.products = Groups(self.threads), Groups(self.threads // WARPGROUP)
        self.accumulators: dict[int, np.ndarray] = {}

    def write(self, register: Register | None, bits: np.ndarray, mask: Mask) -> None:
        """bits: (T,) or (1,), of the register's width."""
        if register is None:
            return
        if mask is not None:
            bits = np.where(mask, bits, self.registers[register.index])
        self.registers[register.index] = bits

    def every(self, bits: np.ndarray) -> np.ndarray:
        """(T,)"""
        return bits if len(bits) == self.threads else np.broadcast_to(bits, (self.threads,))

    def lanes(self, mask: Mask) -> np.ndarray | slice:
        """Index of the threads that execute an instruction."""
        return slice(None) if mask is None else np.flatnonzero(mask)

    def whole(self, mask: Mask, size: int, text: str) -> np.ndarray | slice:
        """Index of the warps (of 32 threads) or warpgroups (128) that execute an instruction made for all of their
        threads. Raises Fault if some lack a part."""
        if mask is None:
            return slice(None)
        groups = mask.reshape(-1, size)
        some = groups.any(1)
        if (some != groups.all(1)).any():
            raise Fault(f"executed by a part of {size} threads: {text}")
        return np.flatnonzero(some)

    def _run_batch(self) -> None:
        """The threads at the lowest instruction go first, until they meet others or wait for them at a barrier."""
        end = len(self.program.code)
        self.at = np.zeros(self.threads, np.int64)  # each thread's next instruction; `end` after the last
        self.waiting = np.zeros(self.threads, bool)  # at the barrier there
        while True:
            free = np.where(self.waiting, NEVER, self.at)
            now = int(free.min())
            if now >= end:
                if self.waiting.any():
                    raise Fault("threads wait at a barrier that others of their CTA do not reach")
                return
            active = free == now
            if active.all():
                self._run_some(now, end, None, self.threads)
            else:
                self._run_some(now, int(free[~active].min()), active, int(active.sum()))

    def _run_some(self, now: int, stop: int, active: Mask, count: int) -> None:
        """Executes from an instruction on with the active threads, until they part, wait, or come to `stop`."""
        code, registers = self.program.code, self.registers
        while now < stop:
            instruction = code[now]
            self.executed += count
            mask, nobody = active, False
            if instruction.guard is not None:
                register, value = instruction.guard
                guard = registers[register.index]
                mask = guard if value else ~guard
                if active is not None:
                    mask = mask & active
                nobody = not mask.any()
                mask = None if mask.all() else self.every(mask)
            if instruction.run is not None:
                if not nobody:
                    instruction.run(self, mask)
                now += 1
            elif nobody:
                now += 1
            elif instruction.opcode == "bra" and (mask is None or mask is active):
                now = instruction.target
            elif instruction.opcode == "bra" or instruction.opcode in ("ret", "exit"):
                self._move(active, now + 1)
                self._move(mask, instruction.target if instruction.opcode == "bra" else len(code))
                return
            else:
                self._barrier(now, active, mask)
                if active is not None or mask is not None:
                    return
                now += 1
        self._move(active, now)

    def _move(self, threads: Mask, to: int) -> None:
        self.at[slice(None) if threads is None else threads] = to

    def _barrier(self, now: int, active: Mask, mask: Mask) -> None:
        """Threads of a CTA wait until all that have not returned are at the same barrier."""
        if active is None and mask is None:
            self.shared.barrier(None)
            return
        self._move(active, now + 1)
        self._move(mask, now)
        self.waiting |= np.ones(self.threads, bool) if mask is None else mask
        here = self.waiting & (self.at == now)
        arrived = (here | (self.at >= len(self.program.code))).reshape(self.ctas, -1).all(1)
        passes = here & np.repeat(arrived, self.program.threads)
        self.waiting &= ~passes
        self.at[passes] = now + 1
        self.shared.barrier(passes)


def _parameter(type: str, value: float) -> np.ndarray:
    """(8,) bytes"""
    if type == "f32":
        value = int(np.float32(value).view(np.uint32))
    elif type[0] not in "bus":
        raise NotImplementedError(f"a parameter of type {type}")
    return np.frombuffer((int(value) % 2**64).to_bytes(8, "little"), np.uint8)
