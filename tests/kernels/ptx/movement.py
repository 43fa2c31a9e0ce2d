"""The table: parameters, loads, stores, atomics, asynchronous copies, and what moves bits between registers."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from .formats import NATIVE, SIZE, UNSIGNED, bits, values
from .memory import of_width
from .program import Instruction, Register
from .table import Form, Mask, address_reader, instruction, reader, vector

if TYPE_CHECKING:
    from .machine import Machine

Run = Callable[["Machine", Mask], None]
ANY = "b8 b16 b32 b64 u8 u16 u32 u64 s8 s16 s32 s64 f32 f64"
VECTORS = "v2 v4"


def _width(form: Form) -> int:
    return SIZE[form.types[-1]] * int((form.one_of(*VECTORS.split()) or "v1")[1:])


def shared_width(instruction: Instruction) -> int:
    """Bytes of an access to shared memory that are not a multiple of 16; 0 if there is none."""
    if instruction.opcode in ("ld", "st") and any(part.startswith("shared") for part in instruction.parts):
        types = tuple(part for part in instruction.parts if part in SIZE)
        return min(16, _width(Form("", "", frozenset(instruction.parts), types)))
    return int(instruction.operands[2].text, 0) if instruction.opcode == "cp" and instruction.operands[2:] else 0


def _is_shared(form: Form) -> bool:
    return form.one_of("shared", "shared::cta") is not None


def _joined(machine: Machine, read: list[Callable], lanes: np.ndarray | slice, size: int) -> np.ndarray:
    """Items (lanes,) of the elements, of `size` bytes, that vectors of registers hold."""
    elements = np.stack([machine.every(r(machine))[lanes] for r in read], 1)
    return np.ascontiguousarray(elements).view(np.dtype((np.void, size * len(read))))[:, 0]


@instruction("ld", (ANY,), f"{VECTORS} param global shared shared::cta nc L1::evict_first L1::evict_last "
             "L1::no_allocate L1::evict_normal L2::cache_hint L2::evict_first L2::evict_last")
def ld(instruction: Instruction, form: Form) -> Run:
    type, text = form.types[0], instruction.text
    registers, address = vector(instruction.operands[0]), instruction.operands[1]
    if "param" in form.modifiers:
        narrow = isinstance(address.base, Register) and address.base.size == 4
        return _ld_param(registers[0], reader(address.base, "u32" if narrow else "u64"), address.offset, type)
    if form.one_of("global", "shared", "shared::cta") is None:
        raise NotImplementedError(text)
    shared, width = _is_shared(form), _width(form)
    addresses = address_reader(address, "u32" if shared else "u64")

    def run(machine: Machine, mask: Mask) -> None:
        lanes = machine.lanes(mask)
        at = addresses(machine)[lanes]
        if shared:
            items = machine.shared.load(lanes, at, width, text)
        else:
            items = machine.memory.load(at, width, machine.cta[lanes], text)
        elements = items.view(NATIVE[type]).reshape(len(items), -1)
        for i, register in enumerate(registers):
            if register is None:
                continue
            loaded = bits(elements[:, i], type, register.size)
            if mask is not None:
                loaded, some = np.empty(machine.threads, loaded.dtype), loaded
                loaded[lanes] = some
            machine.write(register, np.ascontiguousarray(loaded), mask)

    return run


def _ld_param(register: Register, read: Callable, offset: int, type: str) -> Run:
    each = np.arange(SIZE[type]) + offset

    def run(machine: Machine, mask: Mask) -> None:
        raw = machine.parameters[read(machine).astype(np.int64)[:, None] + each]
        machine.write(register, bits(raw.view(NATIVE[type])[:, 0], type, register.size), mask)

    return run


@instruction("st", (ANY,), f"{VECTORS} global shared shared::cta L1::evict_first L1::evict_last L1::no_allocate "
             "L2::cache_hint")
def st(instruction: Instruction, form: Form) -> Run:
    text, size, shared = instruction.text, SIZE[form.types[0]], _is_shared(form)
    if not shared and "global" not in form.modifiers:
        raise NotImplementedError(text)
    addresses = address_reader(instruction.operands[0], "u32" if shared else "u64")
    read = [reader(source, f"b{8 * size}") for source in vector(instruction.operands[1])]

    def run(machine: Machine, mask: Mask) -> None:
        lanes = machine.lanes(mask)
        at, items = addresses(machine)[lanes], _joined(machine, read, lanes, size)
        if shared:
            machine.shared.store(lanes, at, items, text)
        else:
            machine.memory.store(at, items, machine.cta[lanes], text)

    return run


UPDATES = {
    "add": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and, "or": np.bitwise_or,
    "xor": np.bitwise_xor, "exch": lambda old, new: new,
    "cas": lambda old, compare, new: np.where(old == compare, new, old),
}
ATOMIC = f"global gpu relaxed acquire release acq_rel noftz {VECTORS} {' '.join(UPDATES)}"
ATOMIC_TYPES = "b32 b64 u32 u64 s32 s64 f32 f64 f16 bf16 f16x2 bf16x2"


def _atomic(instruction: Instruction, form: Form, with_result: bool) -> Run:
    type, text, name = form.types[0], instruction.text, form.one_of(*UPDATES)
    if "global" not in form.modifiers or form.one_of("relaxed", "acquire", "release", "acq_rel") is None:
        raise NotImplementedError(text)
    operands = list(instruction.operands)
    results = vector(operands.pop(0)) if with_result else ()
    addresses = address_reader(operands[0], "u64")
    sources = [[reader(one, f"b{8 * SIZE[type]}") for one in vector(source)] for source in operands[1:]]
    size, width = SIZE[type], _width(form)
    acquire, release = form.one_of("acquire", "acq_rel"), form.one_of("release", "acq_rel")

    def update(old: np.ndarray, *given: np.ndarray) -> np.ndarray:
        return bits(UPDATES[name](values(old, type), *(values(g, type) for g in given)), type, size)

    def run(machine: Machine, mask: Mask) -> None:
        lanes = machine.random.permutation(np.arange(machine.threads)[machine.lanes(mask)])
        at = addresses(machine)[lanes]
        given = [np.stack([machine.every(r(machine))[lanes] for r in source], 1) for source in sources]
        before = np.empty((len(lanes), width // size), UNSIGNED[size])
        for data, which, offset in machine.memory.atomic(
                at, width, machine.cta[lanes], text, acquire is not None, release is not None):
            memory = of_width(data, size).view(UNSIGNED[size])
            for turn in _turns(offset):
                index = (offset[turn] // size)[:, None] + np.arange(width // size)
                who = which[turn]
                before[who] = memory[index]
                new = update(memory[index].reshape(-1), *(g[who].reshape(-1) for g in given))
                memory[index] = new.reshape(index.shape)
        for i, register in enumerate(results):
            if register is not None:
                old = np.empty(machine.threads, UNSIGNED[size])
                old[lanes] = before[:, i]
                machine.write(register, bits(values(old, f"b{8 * size}"), f"b{8 * size}", register.size), mask)

    return run


def _turns(offset: np.ndarray) -> list[np.ndarray]:
    """Of lanes in order, those that go first at their place, those that go second, ..."""
    order = np.argsort(offset, kind="stable")
    same = offset[order]
    first = np.searchsorted(same, same)
    turn = np.empty(len(offset), np.int64)
    turn[order] = np.arange(len(offset)) - first
    by_turn = np.argsort(turn, kind="stable")
    return np.split(by_turn, np.searchsorted(turn[by_turn], np.arange(1, turn.max() + 1)))


@instruction("atom", (ATOMIC_TYPES,), ATOMIC)
def atom(instruction: Instruction, form: Form) -> Run:
    return _atomic(instruction, form, with_result=True)


@instruction("red", (ATOMIC_TYPES,), ATOMIC)
def red(instruction: Instruction, form: Form) -> Run:
    return _atomic(instruction, form, with_result=False)


@instruction("cp", (), "async ca cg shared shared::cta global commit_group wait_group wait_all L2::cache_hint")
def cp(instruction: Instruction, form: Form) -> Run:
    text, operands = instruction.text, instruction.operands
    if "commit_group" in form.modifiers:
        return lambda machine, mask: machine.copies.commit(machine.lanes(mask))
    if form.one_of("wait_group", "wait_all"):
        left = int(operands[0].text) if "wait_group" in form.modifiers else -1

        def wait(machine: Machine, mask: Mask) -> None:
            waits = np.ones(machine.threads, bool) if mask is None else mask
            for lanes, _, arrays in machine.copies.wait(waits, left):
                machine.shared.copied(lanes, *arrays)

        return wait
    if form.one_of("shared", "shared::cta") is None or form.one_of("ca", "cg") is None or len(operands) not in (3, 4):
        raise NotImplementedError(text)
    to, source, width = address_reader(operands[0], "u32"), address_reader(operands[1], "u64"), int(operands[2].text, 0)
    given = reader(operands[3], "u32") if operands[3:] else None

    def run(machine: Machine, mask: Mask) -> None:
        lanes = np.arange(machine.threads)[machine.lanes(mask)]
        items = np.zeros(len(lanes), np.dtype((np.void, width)))  # what is not read is zero
        reads = np.full(len(lanes), True)
        if given is not None:
            n = machine.every(given(machine))[lanes]
            reads = n == width
            if (~reads & (n != 0)).any():
                raise NotImplementedError(f"a part of the bytes: {text}")
        if reads.any():
            items[reads] = machine.memory.load(source(machine)[lanes[reads]], width, machine.cta[lanes[reads]], text)
        at = to(machine)[lanes]
        machine.shared.copy(lanes, at, width, text)
        machine.copies.begin(lanes, None, at, items)

    return run


@instruction("mov", ("pred b16 b32 b64 u16 u32 u64 s16 s32 s64 f32 f64",))
def mov(instruction: Instruction, form: Form) -> Run:
    """Also from and to vectors of registers, the first one lowest."""
    destination, source = instruction.operands
    type = form.types[0]
    if isinstance(destination, tuple):
        part = SIZE[type] // len(destination)
        read = reader(source, f"u{8 * SIZE[type]}")

        def unpack(machine: Machine, mask: Mask) -> None:
            whole = read(machine)
            for i, register in enumerate(destination):
                if register is not None:
                    shifted = whole >> whole.dtype.type(8 * part * i)
                    machine.write(register, shifted.astype(UNSIGNED[part]), mask)

        return unpack
    if isinstance(source, tuple):
        part = SIZE[type] // len(source)
        parts = [reader(one, f"u{8 * part}") for one in source]
        wide = UNSIGNED[SIZE[type]]

        def pack(machine: Machine, mask: Mask) -> None:
            whole = sum(r(machine).astype(wide) << wide.type(8 * part * i) for i, r in enumerate(parts))
            machine.write(destination, whole, mask)

        return pack
    read, size = reader(source, type), destination.size
    return lambda machine, mask: machine.write(destination, bits(read(machine), type, size), mask)


@instruction("cvta", ("u64",), "to global")
def cvta(instruction: Instruction, form: Form) -> Run:
    """Addresses of global memory are the same as generic ones here."""
    destination, read = instruction.operands[0], reader(instruction.operands[1], "u64")
    if "global" not in form.modifiers:
        raise NotImplementedError(instruction.text)
    return lambda machine, mask: machine.write(destination, read(machine), mask)


@instruction("createpolicy", ("b64",), "fractional L2::evict_first L2::evict_last")
def createpolicy(instruction: Instruction, form: Form) -> Run:
    """Of caches, which are not there."""
    return lambda machine, mask: machine.write(instruction.operands[0], np.zeros(1, np.uint64), mask)
