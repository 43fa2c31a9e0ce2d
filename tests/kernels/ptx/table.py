"""How an entry of the instruction table is made, and an instruction bound to its entry."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from .formats import SIZE, bits, constant, flushed, values
from .program import Address, Constant, Instruction, Operand, Register

if TYPE_CHECKING:
    from .machine import Machine

Mask = np.ndarray | None  # (threads,) bool: which execute an instruction; None: all
WIDE = {"s16": "s32", "u16": "u32", "s32": "s64", "u32": "u64"}


@dataclass(frozen=True)
class Form:
    """Of an instruction, sorted: `cvt.rn.ftz.f32.s32` has modifiers {rn, ftz} and types (f32, s32)."""

    name: str
    opcode: str
    modifiers: frozenset[str]
    types: tuple[str, ...]

    def one_of(self, *modifiers: str) -> str | None:
        """The one that the instruction has."""
        return next((m for m in modifiers if m in self.modifiers), None)


@dataclass(frozen=True)
class Entry:
    """Of the table.

    Attributes:
        bind: makes of an instruction and its form what executes it: run(machine, mask).
        types: those allowed, one set for each that stands in the instruction; None: all.
        modifiers: all that are allowed.
    """

    bind: Callable[[Instruction, Form], Callable[[Machine, Mask], None]]
    types: tuple[frozenset[str], ...] | None
    modifiers: frozenset[str]


TABLE: dict[str, Entry] = {}


def bind(instruction: Instruction) -> None:
    """Sets its `run`. Raises NotImplementedError unless the table has exactly this form."""
    form = _form(instruction.opcode, instruction.parts)
    if form is None:
        raise NotImplementedError(instruction.text)
    instruction.run = TABLE[form.opcode].bind(instruction, form)


@functools.cache
def _form(opcode: str, parts: tuple[str, ...]) -> Form | None:
    """None if it is not in the table."""
    types = tuple(part for part in parts if part in SIZE)
    modifiers = frozenset(part for part in parts if part not in SIZE)
    entry = TABLE.get(opcode)
    if entry is None or not modifiers <= entry.modifiers or (entry.types is not None and (
            len(types) != len(entry.types) or not all(t in allowed for t, allowed in zip(types, entry.types)))):
        return None
    return Form(".".join((opcode, *parts)), opcode, modifiers, types)


def instruction(opcode: str, types: tuple[str, ...] | None = None, modifiers: str = "") -> Callable:
    """Adds a function that binds an instruction to the table: whatever is not a function of values alone."""
    def add(function: Callable) -> Callable:
        allowed = None if types is None else tuple(frozenset(t.split()) for t in types)
        TABLE[opcode] = Entry(function, allowed, frozenset(modifiers.split()))
        return function

    return add


def scalar(opcode: str, operands: str, types: str | tuple[str, ...], modifiers: str = "") -> Callable:
    """Adds a function `f(form, *sources) -> result` of the values (threads,) that each thread has.

    Args:
        operands: the type of the result, then those of the sources, each a type, or T, D: the instruction's last and
            first type, or W: as T, but of `.wide` twice as wide. A last one with a star: any number of those.
        types: allowed, for each type of the instruction.
        modifiers: allowed; `ftz` is dealt with here.
    """
    def add(function: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
        def bind_scalar(instruction: Instruction, form: Form) -> Callable[[Machine, Mask], None]:
            destination, *sources = instruction.operands
            result_type, *source_types = _operand_types(operands, form, len(instruction.operands))
            if len(source_types) != len(sources):
                raise NotImplementedError(instruction.text)
            read = [reader(source, type) for source, type in zip(sources, source_types)]
            compute = _flushing(function) if "ftz" in form.modifiers else function
            if isinstance(destination, tuple):  # p|q of setp: q is the opposite
                first, second = destination

                def run_pair(machine: Machine, mask: Mask) -> None:
                    result = compute(form, *[r(machine) for r in read])
                    machine.write(first, result, mask)
                    machine.write(second, ~result, mask)

                return run_pair
            size = destination.size

            def run(machine: Machine, mask: Mask) -> None:
                machine.write(destination, bits(compute(form, *[r(machine) for r in read]), result_type, size), mask)

            return run

        instruction(opcode, (types,) if isinstance(types, str) else types, modifiers)(bind_scalar)
        return function

    return add


def _operand_types(operands: str, form: Form, count: int) -> list[str]:
    last = form.types[-1]
    letters = {"T": last, "D": form.types[0], "W": WIDE.get(last, "") if "wide" in form.modifiers else last}
    names = operands.split()
    if names[-1].endswith("*"):
        names[-1:] = [names[-1][:-1]] * (count - len(names) + 1)
    return [letters.get(name, name) for name in names]


def _flushing(function: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
    def flush(value: np.ndarray) -> np.ndarray:
        return flushed(value) if value.dtype == np.float32 else value

    return lambda form, *sources: flush(function(form, *map(flush, sources)))


def reader(operand: Operand, type: str) -> Callable[[Machine], np.ndarray]:
    """What reads the values of an operand: (threads,), or (1,) if all have the same."""
    if isinstance(operand, Constant):
        value = constant(operand.text, type)
        return lambda machine: value
    assert isinstance(operand, Register), operand
    index = operand.index
    return lambda machine: values(machine.registers[index], type)


def address_reader(operand: Address, type: str) -> Callable[[Machine], np.ndarray]:
    """What reads the addresses of a memory operand, "u64" or, of shared memory, "u32": int64 (threads,)."""
    read = reader(operand.base, type)
    offset = np.int64(operand.offset)

    def addresses(machine: Machine) -> np.ndarray:
        return np.broadcast_to(read(machine).astype(np.int64) + offset, (machine.threads,))

    return addresses


def vector(operand: Any) -> tuple[Any, ...]:
    return operand if isinstance(operand, tuple) else (operand,)
