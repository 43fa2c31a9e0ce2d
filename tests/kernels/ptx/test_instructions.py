"""Every form of the table of scalar instructions against its definition, in Python's integers and fractions."""

from __future__ import annotations

import itertools
import math
import operator
import random
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest

from . import test_collectives, test_matrix, test_movement
from .formats import SIZE
from .handwritten import FIELDS, decoded, encoded, evaluate, halves, is_nan
from .table import TABLE

pytestmark = pytest.mark.ptx

Number = int | float | Fraction | bool
SIGNED, UNSIGNED = ("s16", "s32", "s64"), ("u16", "u32", "u64")
INTEGERS, FLOATS, BITS = SIGNED + UNSIGNED, ("f32", "f64", "f16", "bf16"), ("b16", "b32", "b64")
PAIRS, INTEGER_PAIRS = ("f16x2", "bf16x2"), ("s16x2", "u16x2")
THREADS = 160
WIDE = {"s16": "s32", "u16": "u32", "s32": "s64", "u32": "u64"}


def samples(type: str, n: int, seed: int) -> list[int]:
    """Bits: ends, powers of two and their neighbours, special floats, and whatever is drawn."""
    random_ = random.Random(f"{type} {seed}")
    if type == "pred":
        return [random_.randrange(2) for _ in range(n)]
    if type in PAIRS + INTEGER_PAIRS:
        low, high = (samples(type[:-2], n, 2 * seed + i) for i in range(2))
        return [a | b << 16 for a, b in zip(low, high)]
    width = 8 * SIZE[type]
    values = [0, 1, 2, 3, 2**width - 1, 2**width - 2, 2**(width - 1), 2**(width - 1) - 1]
    if type in FIELDS:
        exponent, fraction = FIELDS[type]
        infinity = ((1 << exponent) - 1) << fraction
        one = ((1 << exponent - 1) - 1) << fraction
        smallest = 1 << fraction
        values = [0, one, one + 1, one - 1, smallest, smallest - 1, 1, infinity, infinity - 1,
                  infinity | 1 << fraction - 1, one + (1 << fraction), one - (3 << fraction)]
        values += [value | 1 << (width - 1) for value in values]
        # Of like size, so that sums do not lose one of them
        values += [one + random_.randrange(-(3 << fraction), 3 << fraction) for _ in range(n // 3)]
    else:
        values += [random_.randrange(2**random_.randrange(1, width)) for _ in range(n // 3)]
    values += [random_.randrange(2**width) for _ in range(n // 8)]
    return [random_.choice(values) for _ in range(n)]


def exactly(of_fractions: Callable, of_floats: Callable, *numbers: Number) -> Number:
    """The exact result; what is not finite, and the sign of zero, as float arithmetic has it."""
    if all(math.isfinite(n) for n in numbers):
        result = of_fractions(*map(Fraction, numbers))
        if result != 0:
            return result
    return of_floats(*numbers)


def divided(a: float, b: float) -> Number:
    if b == 0:
        return math.nan if a == 0 or a != a else math.copysign(math.inf, a) * math.copysign(1, b)
    return exactly(operator.truediv, operator.truediv, a, b)


def towards_zero(a: int, b: int) -> int:
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def extreme(modifiers: frozenset, largest: bool, *numbers: float) -> float:
    nans = [n for n in numbers if n != n]
    if nans and ("NaN" in modifiers or len(nans) == len(numbers)):
        return math.nan
    found = (max if largest else min)((n for n in numbers if n == n), key=lambda n: (n, math.copysign(1, n)))
    return max(found, 0) if "relu" in modifiers else found


def high(modifiers: frozenset, type: str, product: int) -> int:
    return product >> 8 * SIZE[type] if "hi" in modifiers else product


def compared(relation: str, a: Number, b: Number) -> bool:
    unordered = a != a or b != b
    if relation in ("num", "nan"):
        return unordered == (relation == "nan")
    if unordered:
        return relation.endswith("u") and relation[:-1] in ("eq", "ne", "lt", "le", "gt", "ge")
    name = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}.get(relation, relation[:2])
    return getattr(operator, name)(a, b)


def field(type: str, a: int, b: int, c: int) -> int:
    """bfe, bit by bit as the manual writes it."""
    width = 8 * SIZE[type]
    position, length, raw = b & 255, c & 255, a % 2**width
    sign = 0 if type[0] == "u" or length == 0 else raw >> min(position + length - 1, width - 1) & 1
    return sum((raw >> position + i & 1 if i < length and position + i < width else sign) << i for i in range(width))


def inserted(type: str, a: int, b: int, c: int, d: int) -> int:
    found, position = b, c & 255
    for i in range(d & 255):
        if position + i < 8 * SIZE[type]:
            found = found & ~(1 << position + i) | (a >> i & 1) << position + i
    return found


def permuted(a: int, b: int, c: int) -> int:
    source, found = (b << 32 | a).to_bytes(8, "little"), []
    for i in range(4):
        choice = c >> 4 * i & 15
        byte = source[choice & 7]
        found.append((255 if byte & 128 else 0) if choice & 8 else byte)
    return int.from_bytes(found, "little")


def funnel(modifiers: frozenset, a: int, b: int, c: int) -> int:
    n = min(c, 32) if "clamp" in modifiers else c & 31
    return (b << n | a >> 32 - n if "l" in modifiers else b << 32 - n | a >> n) & 0xFFFFFFFF


def looked_up(a: int, b: int, c: int) -> int:
    return sum((0x6A >> ((a >> i & 1) << 2 | (b >> i & 1) << 1 | c >> i & 1) & 1) << i for i in range(32))


ROUND = {"rni": round, "rzi": math.trunc, "rmi": math.floor, "rpi": math.ceil}


def converted(modifiers: frozenset, to: str, source: str, a: Number) -> Number:
    rounding = next((ROUND[m] for m in ROUND if m in modifiers), None)
    if to in FIELDS:
        if rounding and math.isfinite(a):
            rounded = rounding(Fraction(a))
            return rounded if rounded else math.copysign(0.0, a)
        return a
    if source in FIELDS:
        bits = 8 * SIZE[to]
        low, top = (-(1 << bits - 1), (1 << bits - 1) - 1) if to[0] == "s" else (0, (1 << bits) - 1)
        if a != a:
            return 0
        return low if a == -math.inf else top if a == math.inf else min(max(rounding(Fraction(a)), low), top)
    return a


def approximately(function: Callable[[float], float]) -> Callable[[float], float]:
    def of(a: float) -> float:
        try:
            return function(a)
        except (ValueError, ZeroDivisionError):
            return math.copysign(math.inf, a) if a == 0 else math.nan
        except OverflowError:
            return math.inf
    return of


APPROXIMATE = {
    "rsqrt": lambda a: math.inf * math.copysign(1, a) if a == 0 else 1 / math.sqrt(a),
    "ex2": lambda a: 2.0**a,
    "lg2": lambda a: -math.inf if a == 0 else math.log2(a),
    "tanh": math.tanh,
    "sqrt": math.sqrt,
    "rcp": lambda a: 1 / a,
}


def define(opcode: str, modifiers: frozenset, types: tuple[str, ...], a: Any, b: Any = None, c: Any = None,
           d: Any = None) -> Number:
    """The value, or the bits, of the result."""
    type, last = types[0], types[-1]
    floating = last in FIELDS
    width = 8 * SIZE[last]
    match opcode:
        case "add" | "sub" | "mul" if floating:
            of = {"add": operator.add, "sub": operator.sub, "mul": operator.mul}[opcode]
            return exactly(of, of, a, b)
        case "fma":
            return exactly(lambda x, y, z: x * y + z, lambda x, y, z: x * y + z, a, b, c)
        case "add":
            return a + b
        case "sub":
            return a - b
        case "mul":
            return high(modifiers, type, a * b)
        case "mad":
            return high(modifiers, type, a * b) + c
        case "div" if floating:
            return divided(a, b)
        case "div":
            return -1 if b == 0 else towards_zero(a, b)
        case "rem":
            return -1 if b == 0 else a - towards_zero(a, b) * b
        case "neg":
            return -a
        case "abs":
            return math.fabs(a) if floating else abs(a)
        case "min" | "max" if floating:
            return extreme(modifiers, opcode == "max", *(n for n in (a, b, c) if n is not None))
        case "min" | "max":
            found = (max if opcode == "max" else min)(n for n in (a, b, c) if n is not None)
            return max(found, 0) if "relu" in modifiers else found
        case "copysign":
            return math.copysign(math.fabs(b), a)
        case "setp":
            found = compared(next(m for m in modifiers if m not in ("ftz", "and", "or", "xor")), a, b)
            return found if c is None else getattr(operator, {"and": "and_", "or": "or_", "xor": "xor"}[
                next(m for m in ("and", "or", "xor") if m in modifiers)])(found, c)
        case "selp":
            return a if c else b
        case "and":
            return a & b
        case "or":
            return a | b
        case "xor":
            return a ^ b
        case "not":
            return not a if type == "pred" else ~a
        case "shl":
            return a << b if b < width else 0
        case "shr":
            return a >> min(b, width)
        case "shf":
            return funnel(modifiers, a, b, c)
        case "bfe":
            return field(type, a, b, c)
        case "bfi":
            return inserted(type, a, b, c, d)
        case "prmt":
            return permuted(a, b, c)
        case "lop3":
            return looked_up(a, b, c)
        case "cvt":
            return converted(modifiers, type, last, a)
        case _:
            return approximately(APPROXIMATE[opcode])(a)


def forms() -> list[tuple[str, str, tuple[str, ...]]]:
    """(instruction, type of the result, types of the sources)"""
    found = []

    def add(text: str, result: str, *sources: str) -> None:
        found.append((text, result, sources))

    for t in INTEGERS:
        for name in ("add", "sub", "mul.lo", "div", "rem", "min", "max"):
            add(f"{name}.{t}", t, t, t)
        add(f"mad.lo.{t}", t, t, t, t)
        add(f"shr.{t}", t, t, "u32")
        add(f"selp.{t}", t, t, t, "pred")
        for relation in ("eq", "ne", "lt", "le", "gt", "ge", *(("lo", "ls", "hi", "hs") if t[0] == "u" else ())):
            add(f"setp.{relation}.{t}", "pred", t, t)
        if t in WIDE:
            add(f"mul.hi.{t}", t, t, t)
            add(f"mad.hi.{t}", t, t, t, t)
            add(f"mul.wide.{t}", WIDE[t], t, t)
            add(f"mad.wide.{t}", WIDE[t], t, t, WIDE[t])
        if SIZE[t] > 2:
            add(f"bfe.{t}", t, t, "u32", "u32")
    for t in INTEGER_PAIRS:
        add(f"add.{t}", t, t, t)
    for t in SIGNED:
        for name in ("neg", "abs"):
            add(f"{name}.{t}", t, t)
    add("min.relu.s32", "s32", "s32", "s32")
    add("max.relu.s32", "s32", "s32", "s32")
    for t in FLOATS + PAIRS:
        rn = "rn." if t != "f32" else ""
        for name in ("add", "sub", "mul"):
            add(f"{name}.{rn}{t}", t, t, t)
        for name in ("neg", "abs"):
            add(f"{name}.{t}", t, t)
        for name in ("min", "max"):
            add(f"{name}.{t}", t, t, t)
            if t != "f64":
                add(f"{name}.NaN.{t}", t, t, t)
        if t != "f64":
            add(f"fma.rn.{t}", t, t, t, t)
    for t in ("f32", "f64", "f16", "bf16"):
        for relation in ("eq", "ne", "lt", "le", "gt", "ge", "equ", "neu", "ltu", "leu", "gtu", "geu", "num", "nan"):
            add(f"setp.{relation}.{t}", "pred", t, t)
    for combine in ("and", "or", "xor"):
        add(f"setp.lt.{combine}.f32", "pred", "f32", "f32", "pred")
    add("setp.lt.ftz.f32", "pred", "f32", "f32")
    for name in ("add", "sub", "mul"):
        for more in ("ftz", "sat", "ftz.sat"):
            add(f"{name}.{more}.f32", "f32", "f32", "f32")
    add("fma.rn.ftz.f32", "f32", "f32", "f32", "f32")
    add("fma.rn.sat.f32", "f32", "f32", "f32", "f32")
    for name in ("min", "max"):
        add(f"{name}.ftz.f32", "f32", "f32", "f32")
        add(f"{name}.f32", "f32", "f32", "f32", "f32")
    for name in ("neg", "abs", "sqrt.rn", "sqrt.approx", "rsqrt.approx", "rcp.rn", "rcp.approx", "ex2.approx",
                 "lg2.approx"):
        if name not in ("neg", "abs"):
            add(f"{name}.f32", "f32", "f32")
        add(f"{name}.ftz.f32", "f32", "f32")
    add("tanh.approx.f32", "f32", "f32")
    add("sqrt.rn.f64", "f64", "f64")
    for rounding in ("rn", "full", "approx", "rn.ftz"):
        add(f"div.{rounding}.f32", "f32", "f32", "f32")
    add("div.rn.f64", "f64", "f64", "f64")
    for t in ("f32", "f64"):
        add(f"copysign.{t}", t, t, t)
        add(f"selp.{t}", t, t, t, "pred")
    for t in BITS:
        add(f"selp.{t}", t, t, t, "pred")
        add(f"shl.{t}", t, t, "u32")
        add(f"shr.{t}", t, t, "u32")
        for relation in ("eq", "ne"):
            add(f"setp.{relation}.{t}", "pred", t, t)
    for t in ("pred", *BITS):
        for name in ("and", "or", "xor"):
            add(f"{name}.{t}", t, t, t)
        add(f"not.{t}", t, t)
    for t in ("b32", "b64"):
        add(f"bfi.{t}", t, t, t, "u32", "u32")
    for direction, end in itertools.product("lr", ("clamp", "wrap")):
        add(f"shf.{direction}.{end}.b32", "b32", "b32", "b32", "u32")
    add("prmt.b32", "b32", "b32", "b32", "u32")
    add("lop3.b32", "b32", "b32", "b32", "b32")
    small = ("u8", "s8", *INTEGERS)
    for to, source in itertools.product(small, small):
        add(f"cvt.{to}.{source}", to, source)
    for t in FLOATS:
        for whole in small:
            add(f"cvt.rn.{t}.{whole}", t, whole)
            for rounding in ROUND:
                add(f"cvt.{rounding}.{whole}.{t}", whole, t)
    for to, source in (("f16", "f32"), ("bf16", "f32"), ("f32", "f64"), ("f16", "f64"), ("bf16", "f64")):
        add(f"cvt.rn.{to}.{source}", to, source)
        add(f"cvt.{source}.{to}", source, to)
    for rounding in ROUND:
        add(f"cvt.{rounding}.f32.f32", "f32", "f32")
        add(f"cvt.{rounding}.ftz.f32.f32", "f32", "f32")
    add("cvt.sat.f32.f32", "f32", "f32")
    return found


FORMS = forms()


def parsed(text: str) -> tuple[str, frozenset[str], tuple[str, ...]]:
    opcode, *parts = text.split(".")
    return opcode, frozenset(p for p in parts if p not in SIZE), tuple(p for p in parts if p in SIZE)


def flush(value: Number) -> Number:
    """Of f32."""
    small = math.isfinite(value) and abs(Fraction(value)) < Fraction(2) ** -126
    return math.copysign(0.0, value) if small else value


def expected(text: str, result: str, sources: tuple[str, ...], given: tuple[int, ...]) -> int:
    """Bits, from the bits of the sources."""
    opcode, modifiers, types = parsed(text)
    if result in PAIRS + INTEGER_PAIRS:
        return sum(expected(text.replace("x2", ""), result[:-2], tuple(s[:-2] for s in sources),
                            tuple(halves(bits)[i] for bits in given)) << 16 * i for i in range(2))
    numbers = [decoded(bits, type) for bits, type in zip(given, sources)]
    if "ftz" in modifiers:
        numbers = [flush(n) if type == "f32" else n for n, type in zip(numbers, sources)]
    value = define(opcode, modifiers, types, *numbers)
    if "sat" in modifiers:
        value = min(value, 1.0) if value > 0 else 0.0
    bits = encoded(value, result)
    if "ftz" in modifiers and result == "f32":
        bits = encoded(flush(decoded(bits, result)), result)
    return bits


@pytest.mark.parametrize(("text", "result", "sources"), FORMS, ids=[f"{t}-{len(s)}" for t, _, s in FORMS])
def test_form(text: str, result: str, sources: tuple[str, ...]) -> None:
    given = [(type, samples(type, THREADS, i)) for i, type in enumerate(sources)]
    if text.split(".")[0] in ("shl", "shr", "bfe", "bfi", "shf"):  # counts near what there is to count
        given = [(type, bits if i < (2 if text[:3] in ("bfi", "shf") else 1) else [b % 80 for b in bits])
                 for i, (type, bits) in enumerate(given)]
    (found,) = evaluate(text, (result,), given, ", 0x6A" if text.startswith("lop3") else "")
    for got, *bits in zip(found, *(bits for _, bits in given)):
        want = expected(text, result, sources, tuple(bits))
        assert equal(got, want, result, text), (
            f"{text} of {[hex(b) for b in bits]}: {got:#x}, expected {want:#x}")


def equal(got: int, want: int, type: str, text: str) -> bool:
    if type in PAIRS:
        return all(equal(a, b, type[:-2], text) for a, b in zip(halves(got), halves(want)))
    if is_nan(want, type) or is_nan(got, type):
        return is_nan(want, type) and is_nan(got, type)
    if "approx" in text:  # where Python's function rounds otherwise
        return abs(got - want) <= 1
    return got == want


def test_pairs_from_two_numbers() -> None:
    for half in ("f16", "bf16"):
        a, b = samples("f32", THREADS, 0), samples("f32", THREADS, 1)
        (found,) = evaluate(f"cvt.rn.{half}x2.f32", (f"{half}x2",), [("f32", a), ("f32", b)])
        for got, high_, low in zip(found, a, b):
            want = encoded(decoded(low, "f32"), half) | encoded(decoded(high_, "f32"), half) << 16
            assert equal(got, want, f"{half}x2", "")


def test_tf32() -> None:
    a = samples("f32", THREADS, 0)
    (found,) = evaluate("cvt.rna.tf32.f32", ("b32",), [("f32", a)])
    for got, bits in zip(found, a):
        value = decoded(bits, "f32")
        if math.isfinite(value):
            sign, rest = bits >> 31, bits & 0x7FFFFFFF
            assert got == sign << 31 | (rest + 0x1000 & ~0x1FFF), hex(bits)
            assert abs(decoded(got, "f32") - value) <= abs(value) * 2.0**-11 or rest < 1 << 23 or rest > 0x7F7FEFFF


def test_both_predicates_of_setp() -> None:
    a, b = samples("s32", THREADS, 0), samples("s32", THREADS, 1)
    first, second = evaluate("setp.lt.s32", ("pred", "pred"), [("s32", a), ("s32", b)])
    assert first == [decoded(x, "s32") < decoded(y, "s32") for x, y in zip(a, b)]
    assert second == [1 - p for p in first]


def test_halfway_is_rounded_once() -> None:
    """The exact a * b + c is just beside halfway between two float32, and halfway once it is rounded to float64; also
    where they are subnormal."""
    above = encoded(1 + 2.0**-23, "f32"), encoded(2.0**-24 * (1 + 2.0**-23), "f32")  # 2^-24 + 2^-46 + 2^-70
    below = encoded(1 + 2.0**-23, "f32"), encoded(2.0**-24 * (1 - 2.0**-23), "f32")  # 2^-24 - 2^-70
    tiny = encoded(2.0**-75, "f32"), encoded(2.0**-75, "f32")
    for (a, b), c in ((above, 1.0), (below, 1.0), (above, -1.0), (below, -1.0), (tiny, 2.0**-126), (tiny, 0.0)):
        given = a, b, encoded(c, "f32")
        ((got,),) = evaluate("fma.rn.f32", ("f32",), [("f32", [bits]) for bits in given])
        assert got == expected("fma.rn.f32", "f32", ("f32",) * 3, given)


def test_every_entry_is_tested() -> None:
    """Each opcode with all of its modifiers and types, but for the many sizes of products and hints to caches."""
    texts = [text for text, *_ in FORMS] + [
        "cvt.rn.f16x2.f32", "cvt.rn.bf16x2.f32", "cvt.rna.tf32.f32",
        *test_movement.FORMS, *test_collectives.FORMS, *test_matrix.FORMS]
    assert {text.split(".")[0] for text in texts} == set(TABLE)
    for opcode, entry in TABLE.items():
        tried = [parsed(text) for text in texts if text.split(".")[0] == opcode]
        missing = entry.modifiers - frozenset().union(*(modifiers for _, modifiers, _ in tried))
        missing = {m for m in missing if not m.startswith(("L1::", "L2::", "m64"))}
        assert not missing, f"{opcode}: {missing}"
        for place, allowed in enumerate(entry.types or ()):
            missing = allowed - {types[place] for _, _, types in tried}
            assert not missing, f"{opcode}: {missing}"
