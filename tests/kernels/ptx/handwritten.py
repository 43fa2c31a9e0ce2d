"""Small PTX programs for the tests of this package: written, executed, and defined once more in exact arithmetic."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np

from .formats import SIZE
from .machine import Machine, prepare
from .memory import Global

REGISTER = {0: "%p", 1: "%rs", 2: "%rs", 4: "%r", 8: "%rd"}  # by size


def program(body: str, parameters: int, threads: int = 32) -> str:
    """With `parameters` pointers, of which %rd1 and on hold the addresses, and %r1 the thread."""
    head = ", ".join(f".param .u64 p{i}" for i in range(parameters))
    loads = "".join(f"ld.param.b64 %rd{i + 1}, [p{i}];\n" for i in range(parameters))
    return f""".version 8.8
.target sm_90a
.address_size 64
.extern .shared .align 16 .b8 global_smem[];
.visible .entry test({head})
.reqntid {threads}
{{
.reg .pred %p<40>; .reg .b16 %rs<80>; .reg .b32 %r<300>; .reg .b64 %rd<80>;
mov.u32 %r1, %tid.x;
{loads}{body}
ret;
}}"""


def execute(body: str, *buffers: np.ndarray, threads: int = 32, grid: tuple[int, ...] = (1,), shared: int = 0,
            seed: int = 0) -> Machine:
    """Buffers may be changed."""
    memory = Global(math.prod(grid))
    for buffer in buffers:
        memory.add(buffer.ctypes.data, buffer.nbytes, buffer.itemsize)
    machine = Machine(prepare(program(body, len(buffers), threads)), shared, seed)
    machine.run(grid, [buffer.ctypes.data for buffer in buffers], memory)
    return machine


def at(pointer: int, size: int, to: int) -> str:
    """%rd<to> = %rd<pointer> + thread * size"""
    return f"mad.wide.u32 %rd{to}, %r1, {size}, %rd{pointer};\n"


def evaluate(
    text: str, results: tuple[str, ...], sources: list[tuple[str, list[int]]], rest: str = ""
) -> list[list[int]]:
    """Of an instruction like "add.s32" the results (bits) of each thread.

    Args:
        results: their types.
        sources: the type and, of each thread, the bits of each.
        rest: what follows the sources.
    """
    threads = -(-len(sources[0][1]) // 32) * 32
    body, names, buffers = "", [], []
    for i, (type, given) in enumerate(sources):
        size = max(SIZE[type], 1)
        name = f"{REGISTER[0 if type == 'pred' else size]}{10 + i}"
        buffers.append(np.array(given + [0] * (threads - len(given)), f"u{size}"))
        body += at(i + 1, size, 40)
        if type == "pred":
            body += f"ld.global.b8 %rs{30 + i}, [%rd40]; setp.ne.b16 {name}, %rs{30 + i}, 0;\n"
        else:
            body += f"ld.global.b{8 * size} {name}, [%rd40];\n"
        names.append(name)
    registers = [f"{REGISTER[0 if type == 'pred' else SIZE[type]]}{30 + i}" for i, type in enumerate(results)]
    body += f"{text} {'|'.join(registers)}, {', '.join(names)}{rest};\n"
    for i, (type, name) in enumerate(zip(results, registers)):
        size = max(SIZE[type], 1)
        buffers.append(np.zeros(threads, f"u{size}"))
        body += at(len(sources) + i + 1, size, 41)
        if type == "pred":
            body += f"selp.b16 %rs50, 1, 0, {name};\n"
            name = "%rs50"
        body += f"st.global.b{8 * size} [%rd41], {name};\n"
    execute(body, *buffers, threads=threads)
    return [buffer[:len(sources[0][1])].tolist() for buffer in buffers[len(sources):]]


# Exact arithmetic: numbers are int, bool, or float, which is exact for all types up to f64.

FIELDS = {"f16": (5, 10), "bf16": (8, 7), "f32": (8, 23), "f64": (11, 52)}  # bits of exponent and of fraction


def decoded(bits: int, type: str) -> int | float | bool:
    if type == "pred":
        return bool(bits)
    if type in FIELDS:
        exponent_bits, fraction_bits = FIELDS[type]
        sign = -1.0 if bits >> (exponent_bits + fraction_bits) else 1.0
        exponent = bits >> fraction_bits & (1 << exponent_bits) - 1
        fraction = bits & (1 << fraction_bits) - 1
        if exponent == (1 << exponent_bits) - 1:
            return math.copysign(math.nan if fraction else math.inf, sign)
        bias = (1 << exponent_bits - 1) - 1
        whole = fraction + (1 << fraction_bits) if exponent else fraction
        return sign * math.ldexp(whole, max(exponent, 1) - bias - fraction_bits)
    size = 8 * SIZE[type]
    return bits - (1 << size) if type[0] == "s" and bits >> (size - 1) else bits


def encoded(value: int | float | bool | Fraction, type: str) -> int:
    """Bits; a number is rounded to nearest, ties to even; NaN becomes the canonical one."""
    if type not in FIELDS:
        return int(value) % (1 << 8 * max(SIZE[type], 1))
    exponent_bits, fraction_bits = FIELDS[type]
    infinity = ((1 << exponent_bits) - 1) << fraction_bits
    if value != value:
        return infinity | 1 << (fraction_bits - 1)
    negative = math.copysign(1, value) < 0 if isinstance(value, float) else value < 0
    sign = int(negative) << (exponent_bits + fraction_bits)
    if isinstance(value, float) and math.isinf(value):
        return sign | infinity
    size = abs(Fraction(value))
    if size == 0:
        return sign
    bias = (1 << exponent_bits - 1) - 1
    exponent = size.numerator.bit_length() - size.denominator.bit_length()
    exponent -= size < Fraction(2) ** exponent
    exponent = max(exponent, 1 - bias)
    whole = round(size / Fraction(2) ** (exponent - fraction_bits))  # Python's rounds ties to even
    return sign | min(whole + ((exponent + bias - 1) << fraction_bits), infinity)


def is_nan(bits: int, type: str) -> bool:
    return type in FIELDS and decoded(bits, type) != decoded(bits, type)


def halves(bits: int) -> tuple[int, int]:
    return bits & 0xFFFF, bits >> 16
