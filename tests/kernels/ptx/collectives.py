"""The table: what the threads of a warp do together, and fences, which do nothing here."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from .formats import bits
from .program import Instruction, Operand
from .table import Form, Mask, instruction, reader

if TYPE_CHECKING:
    from .machine import Machine

Run = Callable[["Machine", Mask], None]
LANE = np.arange(32)


def _whole_warps(instruction: Instruction, members: Operand) -> Run:
    """A check that all threads of a warp execute it, and that it names them all."""
    named = reader(members, "b32")

    def check(machine: Machine, mask: Mask) -> None:
        machine.whole(mask, 32, instruction.text)
        if (machine.every(named(machine))[machine.lanes(mask)] != 0xFFFFFFFF).any():
            raise NotImplementedError(f"members other than all: {instruction.text}")

    return check


@instruction("shfl", ("b32",), "sync bfly idx up down")
def shfl(instruction: Instruction, form: Form) -> Run:
    """By the manual's rule of segments and bounds; a thread whose source is outside of them keeps its own value."""
    destination, *sources, members = instruction.operands
    check = _whole_warps(instruction, members)
    value, step, control = (reader(source, "b32") for source in sources)
    result, inside = destination if isinstance(destination, tuple) else (destination, None)
    mode = form.one_of("bfly", "idx", "up", "down")

    def run(machine: Machine, mask: Mask) -> None:
        check(machine, mask)
        b = machine.every(step(machine)).reshape(-1, 32).astype(np.int64) & 31
        c = machine.every(control(machine)).reshape(-1, 32).astype(np.int64)
        segment, clamp = (c >> 8) & 31, c & 31
        bound = (LANE & segment) | (clamp & ~segment)
        lowest = LANE & segment
        source = {"up": LANE - b, "down": LANE + b, "bfly": LANE ^ b, "idx": lowest | (b & ~segment)}[mode]
        valid = source >= bound if mode == "up" else source <= bound
        source = np.where(valid, source, LANE)
        read = np.take_along_axis(machine.every(value(machine)).reshape(-1, 32), source, 1)
        machine.write(result, read.reshape(-1), mask)
        machine.write(inside, valid.reshape(-1), mask)

    return run


REDUCTIONS = {"add": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and, "or": np.bitwise_or,
              "xor": np.bitwise_xor}


@instruction("redux", ("s32 u32 b32",), f"sync {' '.join(REDUCTIONS)}")
def redux(instruction: Instruction, form: Form) -> Run:
    destination, source, members = instruction.operands
    type, read, check = form.types[0], reader(source, form.types[0]), _whole_warps(instruction, members)
    reduce = REDUCTIONS[form.one_of(*REDUCTIONS)].reduce

    def run(machine: Machine, mask: Mask) -> None:
        check(machine, mask)
        found = reduce(machine.every(read(machine)).reshape(-1, 32), axis=1)
        machine.write(destination, np.repeat(bits(found, type, 4), 32), mask)

    return run


@instruction("vote", ("pred b32",), "sync any all ballot")
def vote(instruction: Instruction, form: Form) -> Run:
    destination, source, members = instruction.operands
    read, check, kind = reader(source, "pred"), _whole_warps(instruction, members), form.one_of("any", "all", "ballot")

    def run(machine: Machine, mask: Mask) -> None:
        check(machine, mask)
        of_warp = machine.every(read(machine)).reshape(-1, 32)
        if kind == "ballot":
            found = (of_warp.astype(np.uint32) << LANE.astype(np.uint32)).sum(1, dtype=np.uint32)
        else:
            found = getattr(of_warp, kind)(1)
        machine.write(destination, np.repeat(found, 32), mask)

    return run


@instruction("bar", (), "warp sync")
def bar(instruction: Instruction, form: Form) -> Run:
    """bar.warp.sync; that of a CTA is the machine's own."""
    return _whole_warps(instruction, instruction.operands[0])


def _nothing(instruction: Instruction, form: Form) -> Run:
    return lambda machine, mask: None


instruction("fence", (), "acq_rel sc cta gpu sys proxy async global shared::cta async::global async::shared::cta")(
    _nothing)
instruction("membar", (), "cta gl sys")(_nothing)

