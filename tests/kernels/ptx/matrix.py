"""The table: matrices in registers and in shared memory, and their products."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from .formats import SIZE, values
from .memory import MANY_WARPS, Fault, Shared
from .program import Instruction, Operand, Register
from .table import Form, Mask, address_reader, instruction, reader, vector

if TYPE_CHECKING:
    from .machine import Machine

Run = Callable[["Machine", Mask], None]
Read = Callable[["Machine"], np.ndarray]
LANE = np.arange(32)
# Every fragment of a matrix in registers is made of 8x8 parts, of which lane i has row i // 4 and columns 2 * (i % 4)
# and the next.
ROW, COLUMN = LANE // 4, LANE % 4 * 2


def _counted(form: Form) -> int:
    return int(form.one_of("x1", "x2", "x4")[1:])


@instruction("ldmatrix", ("b16",), "sync aligned m8n8 x1 x2 x4 trans shared shared::cta")
def ldmatrix(instruction: Instruction, form: Form) -> Run:
    """8x8 matrices of 16 bits; the row addresses of matrix i are those of lanes 8i to 8i + 7."""
    text, n = instruction.text, _counted(form)
    registers, addresses = vector(instruction.operands[0]), address_reader(instruction.operands[1], "u32")

    def run(machine: Machine, mask: Mask) -> None:
        warps = machine.whole(mask, 32, text)
        lanes = np.arange(machine.threads).reshape(-1, 32)[warps][:, :8 * n].reshape(-1)
        rows = machine.shared.load(lanes, addresses(machine)[lanes], 16, text)
        matrices = rows.view(np.uint16).reshape(-1, n, 8, 8)
        if "trans" in form.modifiers:
            matrices = matrices.swapaxes(2, 3)
        pairs = np.stack([matrices[:, :, ROW, COLUMN], matrices[:, :, ROW, COLUMN + 1]], -1)  # warps, n, 32, 2
        found = np.empty((machine.threads // 32, 32, n), np.uint32)
        found[warps] = pairs.view(np.uint32)[..., 0].swapaxes(1, 2)
        for i, register in enumerate(registers):
            machine.write(register, found[:, :, i].reshape(-1), mask)

    return run


@instruction("stmatrix", ("b16",), "sync aligned m8n8 x1 x2 x4 trans shared shared::cta")
def stmatrix(instruction: Instruction, form: Form) -> Run:
    """The opposite."""
    text, n = instruction.text, _counted(form)
    addresses = address_reader(instruction.operands[0], "u32")
    read = [reader(source, "b32") for source in vector(instruction.operands[1])]

    def run(machine: Machine, mask: Mask) -> None:
        warps = machine.whole(mask, 32, text)
        lanes = np.arange(machine.threads).reshape(-1, 32)[warps][:, :8 * n].reshape(-1)
        given = np.stack([machine.every(r(machine)).reshape(-1, 32)[warps] for r in read], 1)  # warps, n, 32
        matrices = np.empty((*given.shape[:2], 8, 8), np.uint16)
        matrices[:, :, ROW, COLUMN] = given.astype(np.uint16)
        matrices[:, :, ROW, COLUMN + 1] = (given >> np.uint32(16)).astype(np.uint16)
        if "trans" in form.modifiers:
            matrices = np.ascontiguousarray(matrices.swapaxes(2, 3))
        items = matrices.reshape(-1, 8).view(np.dtype((np.void, 16)))[:, 0]
        machine.shared.store(lanes, addresses(machine)[lanes], items, text)

    return run


def _fragment(machine: Machine, read: list[Read], parts: list[tuple[int, int]], shape: tuple[int, int], type: str,
              transposed: bool = False) -> np.ndarray:
    """Float32 (warps, *shape) of the registers that each hold an 8x8 (of 32 bits: 8x4) part that begins at `parts`.

    transposed: lane i has column i // 4, as in the right-hand side of a product.
    """
    out = np.empty((machine.threads // 32, *shape), np.float32)
    if transposed:
        out = out.swapaxes(1, 2)
    for r, (row, column) in zip(read, parts, strict=True):
        held = machine.every(r(machine))
        if SIZE[type] == 4:
            out[:, row + ROW, column + LANE % 4] = values(held, type).reshape(-1, 32)
        else:
            for i, half in enumerate(values(held, f"{type}x2")):
                out[:, row + ROW, column + COLUMN + i] = half.reshape(-1, 32)
    return out.swapaxes(1, 2) if transposed else out


def _parts_of_a(type: str) -> list[tuple[int, int]]:
    """Where the four registers of a left-hand side (16 rows) begin."""
    step = 4 if SIZE[type] == 4 else 8
    return [(0, 0), (8, 0), (0, step), (8, step)]


@instruction("mma", ("f32", "f16 bf16 tf32", "f16 bf16 tf32", "f32"), "sync aligned m16n8k16 m16n8k8 row col")
def mma(instruction: Instruction, form: Form) -> Run:
    """D = A B + C of a warp; D and C lie in registers as a 16x8 matrix whose parts have 8 rows."""
    text, type, k = instruction.text, form.types[1], 8 if "m16n8k8" in form.modifiers else 16
    if form.types[2] != type or k != 32 // SIZE[type]:
        raise NotImplementedError(text)
    d = instruction.operands[0]
    a, b, c = ([reader(one, of) for one in operand] for operand, of in zip(
        instruction.operands[1:], ("b32", "b32", "f32")))
    step = k // 2

    def run(machine: Machine, mask: Mask) -> None:
        machine.whole(mask, 32, text)
        left = _fragment(machine, a, _parts_of_a(type), (16, k), type)
        right = _fragment(machine, b, [(0, 0), (0, step)], (k, 8), type, transposed=True)
        product = left @ right
        for i, (register, added) in enumerate(zip(d, c)):
            part = product[:, 8 * (i // 2) + ROW, COLUMN + i % 2].reshape(-1)
            machine.write(register, (part + added(machine)).view(np.uint32), mask)

    return run


SWIZZLED = {1: 128, 2: 64, 3: 32}  # bytes of a line of each mode of a descriptor


class Descriptor:
    """Of a matrix in shared memory, 64 bits: bits 0-13 its address, 16-29 and 32-45 the leading and the stride offset,
    each divided by 16, 62-63 the mode; 49-51, the offset of its pattern, and all others are zero."""

    def __init__(self, bits: np.ndarray, text: str) -> None:
        """bits: (warpgroups,) uint64"""
        known = np.uint64(0x3FFF | 0x3FFF << 16 | 0x3FFF << 32 | 3 << 62)
        if (bits & ~known).any():
            raise Fault(f"a descriptor with other bits than those of its fields: {text}")
        self.start, self.leading, self.stride = (
            (bits >> np.uint64(at) & np.uint64(0x3FFF)).astype(np.int64) * 16 for at in (0, 16, 32))
        mode = np.unique(bits >> np.uint64(62))
        if len(mode) > 1 or int(mode[0]) not in SWIZZLED:
            raise NotImplementedError(f"a descriptor without swizzling, or several modes: {text}")
        self.line = SWIZZLED[int(mode[0])]

    def chunks(self, rows: int, k: int, size: int, along_rows: bool) -> np.ndarray:
        """Addresses of its pieces of 16 bytes, (warpgroups, lines, chunks of a line).

        Lines lie along k, one for each row, or along the rows, one for each k: 8 of them are an atom, `stride` bytes
        from the next one. An atom along the rows has as many of them as fit into a line; the next is `leading` bytes
        away. Address bits 4 to 6 are changed by bits 7 to 9, as far as the mode says.
        """
        lines, length = (k, rows * size) if along_rows else (rows, k * size)
        line, at = np.arange(lines)[:, None], np.arange(0, length, 16)
        atom = (line // 8)[None] * self.stride[:, None, None]
        if along_rows:
            atom = atom + (at // self.line)[None, None] * self.leading[:, None, None]
            at = at % self.line
        plain = self.start[:, None, None] + atom + (line % 8 * self.line + at)[None]
        return plain ^ ((plain >> 7) & (self.line // 16 - 1)) << 4


PRODUCTS = " ".join(f"m64n{n}k{k}" for n in range(8, 257, 8) for k in (8, 16))


@instruction("wgmma", None, f"mma_async fence commit_group wait_group sync aligned {PRODUCTS}")
def wgmma(instruction: Instruction, form: Form) -> Run:
    text = instruction.text
    if "fence" in form.modifiers:
        return lambda machine, mask: machine.whole(mask, 128, text) and None
    if "commit_group" in form.modifiers:
        return lambda machine, mask: machine.products.commit(machine.whole(mask, 128, text))
    if "wait_group" in form.modifiers:
        return _wait(text, int(instruction.operands[0].text))
    n, k = map(int, re.fullmatch(r"m64n(\d+)k(\d+)", form.one_of(*PRODUCTS.split())).groups())
    type = form.types[1]
    if form.types != ("f32", type, type) or type not in ("f16", "bf16", "tf32") or k != 32 // SIZE[type]:
        raise NotImplementedError(text)
    return _multiply(instruction, type, n, k)


def _multiply(instruction: Instruction, type: str, n: int, k: int) -> Run:
    """D = A B + C of a warpgroup, C being D or 0; A (64 x k) in registers or shared memory, B (k x n) in shared memory.

    What it reads and writes is its own until it has been waited for.
    """
    text = instruction.text
    d, a, b, accumulate, *flags = instruction.operands
    flags = [int(flag.text) for flag in flags]
    if flags[:2] != [1, 1]:
        raise NotImplementedError(f"negated: {text}")
    transposed = flags[2:] or [0, 0]
    accumulate = reader(accumulate, "pred")
    in_registers = isinstance(a, tuple)
    left = [reader(one, "b32") for one in a] if in_registers else _matrix(a, 64, k, type, transposed[0], text)
    right = _matrix(b, n, k, type, transposed[-1], text)

    def run(machine: Machine, mask: Mask) -> None:
        groups = np.arange(machine.threads // 128)[machine.whole(mask, 128, text)]
        if in_registers:
            x = _fragment(machine, left, _parts_of_a(type), (16, k), type).reshape(-1, 64, k)[groups]
            read = []
        else:
            x, at = left(machine, groups)
            read = [at]
        y, at = right(machine, groups)
        product = np.zeros((machine.threads // 128, 64, n), np.float32)
        product[groups] = x @ y.swapaxes(1, 2)
        warps = product.reshape(-1, 16, n)
        keep = machine.every(accumulate(machine))
        for i, register in enumerate(d):
            before = machine.accumulators.get(register.index, machine.registers[register.index]).view(np.float32)
            part = warps[:, 8 * (i // 2 % 2) + ROW, 8 * (i // 4) + COLUMN + i % 2].reshape(-1)
            coming = (part + np.where(keep, before, np.float32(0))).view(np.uint32)
            machine.accumulators[register.index] = coming if mask is None else np.where(
                mask, coming, before.view(np.uint32))
            machine.write(register, np.full(1, 0xFFFFFFFF, np.uint32), mask)  # NaN until it is complete
        machine.products.begin(groups, d, np.concatenate([*read, at], 1))

    return run


def _wait(text: str, left: int) -> Run:
    def run(machine: Machine, mask: Mask) -> None:
        waits = np.zeros(machine.threads // 128, bool)
        waits[machine.whole(mask, 128, text)] = True
        complete = machine.products.wait(waits, left)
        for groups, registers, (at,) in complete:
            me = np.repeat(machine.shared.me[::128][groups] | np.uint32(MANY_WARPS), at.shape[1])
            machine.shared.has_read(at.reshape(-1), me, 16)
            written = np.zeros(machine.threads // 128, bool)
            written[groups] = True
            written[machine.products.pending_of(registers)] = False  # a later product goes on with them
            if written.any():
                for register in registers:
                    machine.write(register, machine.accumulators[register.index], np.repeat(written, 128))

    return run


def _matrix(descriptor: Operand, rows: int, k: int, type: str, along_rows: int, text: str) -> Callable:
    """What reads (float32 (groups, rows, k), where its pieces are) of warpgroups whose descriptor is in a register."""
    assert isinstance(descriptor, Register)
    read, size = reader(descriptor, "u64"), SIZE[type]

    def load(machine: Machine, groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        of_thread = machine.every(read(machine)).reshape(-1, 128)[groups]
        if (of_thread != of_thread[:, :1]).any():
            raise Fault(f"threads of a warpgroup give different descriptors: {text}")
        chunks = Descriptor(of_thread[:, 0], text).chunks(rows, k, size, bool(along_rows))
        shared: Shared = machine.shared
        each = chunks[0].size
        base, me = (np.repeat(of[::128][groups], each) for of in (shared.base, shared.me | np.uint32(MANY_WARPS)))
        items, at = shared.load_as(base, me, chunks.reshape(-1), 16, text, reading=True)
        bits = items.view(f"u{size}").reshape(*chunks.shape[:2], -1)
        if along_rows:
            bits = bits.swapaxes(1, 2)
        return values(np.ascontiguousarray(bits), type), at.reshape(len(groups), each)

    return load
