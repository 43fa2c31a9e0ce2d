"""The table: functions of the values of each thread. Names and definitions as in the manual's section 9.7."""

from __future__ import annotations

import numpy as np

from .formats import HALVES, PAIRS, SIGNED, SIZE, UNSIGNED, is_float, rounded_to_odd
from .table import Form, scalar

SMALL = "s16 u16 s32 u32"
INTEGERS = f"{SMALL} s64 u64"
FLOATS = "f32 f64 f16 bf16 f16x2 bf16x2"
BITS = "b16 b32 b64"


def of_bits(value: np.ndarray) -> np.ndarray:
    return value.view(UNSIGNED[value.dtype.itemsize])


def saturated(form: Form, value: np.ndarray) -> np.ndarray:
    """`.sat` of floats: to 0 .. 1, NaN and -0 to 0."""
    if "sat" not in form.modifiers:
        return value
    if value.dtype.kind != "f":
        raise NotImplementedError(form.name)
    return np.where(value > 0, np.minimum(value, value.dtype.type(1)), value.dtype.type(0))


# Arithmetic


@scalar("add", "T T T", f"{INTEGERS} {FLOATS} s16x2 u16x2", "rn ftz sat")
def add(form: Form, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return saturated(form, a + b)


@scalar("sub", "T T T", f"{INTEGERS} {FLOATS}", "rn ftz sat")
def sub(form: Form, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return saturated(form, a - b)


@scalar("mul", "W T T", f"{INTEGERS} {FLOATS}", "lo hi wide rn ftz sat")
def mul(form: Form, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    if form.one_of("hi", "wide") is None:
        return saturated(form, a * b)
    return _high(form, a, b)


@scalar("mad", "W T T W", INTEGERS, "lo hi wide")
def mad(form: Form, a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    return (a * b if "lo" in form.modifiers else _high(form, a, b)) + c


def _high(form: Form, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The whole product, or its upper half."""
    size = SIZE[form.types[0]]
    if size == 8:
        raise NotImplementedError(form.name)
    wide = (SIGNED if form.types[0][0] == "s" else UNSIGNED)[2 * size]
    product = a.astype(wide) * b.astype(wide)
    return product if "wide" in form.modifiers else product >> wide.type(8 * size)


@scalar("fma", "T T T T", FLOATS.replace("f64 ", ""), "rn ftz sat")
def fma(form: Form, a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """Rounded once: in float64 the product of two float32 is exact."""
    product, c = a.astype(np.float64) * b, c.astype(np.float64)
    if form.types[0] != "f32":
        return saturated(form, rounded_to_odd(product, c))
    total = product + c
    # Rounding again matters halfway between two float32, and where they are subnormal.
    halfway = (total.view(np.uint64) & np.uint64((1 << 29) - 1)) == np.uint64(1 << 28)
    if (halfway | ((np.abs(total) < 2.0**-126) & (total != 0))).any():
        total = rounded_to_odd(product, c)
    return saturated(form, total.astype(np.float32))


@scalar("div", "T T T", f"{INTEGERS} f32 f64", "rn full approx ftz")
def div(form: Form, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Integers towards zero; by zero all ones, which the manual leaves open."""
    if a.dtype.kind == "f":
        return a / b
    zero = b == 0
    return np.where(zero, a.dtype.type(0) - a.dtype.type(1), _towards_zero(a, np.where(zero, a.dtype.type(1), b)))


@scalar("rem", "T T T", INTEGERS)
def rem(form: Form, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    zero = b == 0
    divisor = np.where(zero, a.dtype.type(1), b)
    return np.where(zero, a.dtype.type(0) - a.dtype.type(1), a - _towards_zero(a, divisor) * divisor)


def _towards_zero(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    quotient = a // b
    return quotient + ((quotient < 0) & (quotient * b != a)).astype(a.dtype) if a.dtype.kind == "i" else quotient


@scalar("neg", "T T", f"s16 s32 s64 {FLOATS}", "ftz")
def neg(form: Form, a: np.ndarray) -> np.ndarray:
    return -a


@scalar("abs", "T T", f"s16 s32 s64 {FLOATS}", "ftz")
def abs_(form: Form, a: np.ndarray) -> np.ndarray:
    return np.abs(a)


@scalar("min", "T T T*", f"{INTEGERS} {FLOATS}", "ftz NaN relu")
def min_(form: Form, a: np.ndarray, b: np.ndarray, c: np.ndarray | None = None) -> np.ndarray:
    return _extreme(form, np.minimum, np.fmin, np.bitwise_or, a, b, c)


@scalar("max", "T T T*", f"{INTEGERS} {FLOATS}", "ftz NaN relu")
def max_(form: Form, a: np.ndarray, b: np.ndarray, c: np.ndarray | None = None) -> np.ndarray:
    return _extreme(form, np.maximum, np.fmax, np.bitwise_and, a, b, c)


def _extreme(form: Form, of: np.ufunc, of_numbers: np.ufunc, of_zeros: np.ufunc, a: np.ndarray, b: np.ndarray,
             c: np.ndarray | None) -> np.ndarray:
    """Of floats a NaN only if all are, or with `.NaN` if one is; -0 is less than +0. `.relu`: not below 0."""
    if a.dtype.kind != "f":
        found = of(a, b)
    else:
        found = (of if "NaN" in form.modifiers else of_numbers)(a, b)
        zeros = (a == b) & (found == 0)
        if zeros.any():
            found = np.where(zeros, of_zeros(of_bits(a), of_bits(b)).view(a.dtype), found)
    if c is not None:
        return _extreme(form, of, of_numbers, of_zeros, found, c, None)
    return np.where(found > 0, found, found.dtype.type(0)) if "relu" in form.modifiers else found


@scalar("sqrt", "T T", "f32 f64", "rn approx ftz")
def sqrt(form: Form, a: np.ndarray) -> np.ndarray:
    return np.sqrt(a)


@scalar("rsqrt", "T T", "f32", "approx ftz")
def rsqrt(form: Form, a: np.ndarray) -> np.ndarray:
    return (1 / np.sqrt(a.astype(np.float64))).astype(a.dtype)


@scalar("rcp", "T T", "f32", "rn approx ftz")
def rcp(form: Form, a: np.ndarray) -> np.ndarray:
    return np.float32(1) / a


@scalar("ex2", "T T", "f32", "approx ftz")
def ex2(form: Form, a: np.ndarray) -> np.ndarray:
    return np.exp2(a.astype(np.float64)).astype(a.dtype)


@scalar("lg2", "T T", "f32", "approx ftz")
def lg2(form: Form, a: np.ndarray) -> np.ndarray:
    return np.log2(a.astype(np.float64)).astype(a.dtype)


@scalar("tanh", "T T", "f32", "approx")
def tanh(form: Form, a: np.ndarray) -> np.ndarray:
    return np.tanh(a.astype(np.float64)).astype(a.dtype)


@scalar("copysign", "T T T", "f32 f64")
def copysign(form: Form, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The sign of a and the magnitude of b."""
    return np.copysign(b, a)


# Comparison and choice


RELATIONS = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal}
UNSIGNED_RELATIONS = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}
UNORDERED = tuple(f"{name}u" for name in RELATIONS)


@scalar("setp", "pred T T pred*", f"{BITS} {INTEGERS} f32 f64 f16 bf16",
        " ".join([*RELATIONS, *UNSIGNED_RELATIONS, *UNORDERED, "num nan and or xor ftz"]))
def setp(form: Form, a: np.ndarray, b: np.ndarray, c: np.ndarray | None = None) -> np.ndarray:
    found = _compared(form.one_of(*RELATIONS, *UNSIGNED_RELATIONS, *UNORDERED, "num", "nan"), a, b)
    if c is None:
        return found
    combine = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}
    return combine[form.one_of(*combine)](found, c)


def _compared(relation: str, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """With a NaN only `ne` of NumPy's relations holds, of the manual's only the unordered ones."""
    if a.dtype.kind != "f":
        return RELATIONS[UNSIGNED_RELATIONS.get(relation, relation)](a, b)
    nan = np.isnan(a) | np.isnan(b)
    if relation in ("num", "nan"):
        return nan if relation == "nan" else ~nan
    if relation in UNORDERED:
        return RELATIONS[relation[:-1]](a, b) | nan
    return RELATIONS[relation](a, b) & ~nan


@scalar("selp", "T T T pred", f"{BITS} {INTEGERS} f32 f64")
def selp(form: Form, a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    return np.where(c, a, b)


# Logic


@scalar("and", "T T T", f"pred {BITS}")
def and_(form: Form, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return a & b


@scalar("or", "T T T", f"pred {BITS}")
def or_(form: Form, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return a | b


@scalar("xor", "T T T", f"pred {BITS}")
def xor(form: Form, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return a ^ b


@scalar("not", "T T", f"pred {BITS}")
def not_(form: Form, a: np.ndarray) -> np.ndarray:
    return ~a


@scalar("shl", "T T u32", BITS)
def shl(form: Form, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    width = np.uint32(8 * a.dtype.itemsize)
    return np.where(b < width, a << np.minimum(b, width - np.uint32(1)).astype(a.dtype), a.dtype.type(0))


@scalar("shr", "T T u32", f"{BITS} {INTEGERS}")
def shr(form: Form, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """What comes in on the left is the sign of a signed one."""
    width = np.uint32(8 * a.dtype.itemsize)
    shifted = a >> np.minimum(b, width - np.uint32(1)).astype(a.dtype)
    return shifted if a.dtype.kind == "i" else np.where(b < width, shifted, a.dtype.type(0))


@scalar("shf", "T T T u32", "b32", "l r clamp wrap")
def shf(form: Form, a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """Of the 64 bits b:a the upper half after a shift to the left, or the lower one after one to the right."""
    n = (np.minimum(c, np.uint32(32)) if "clamp" in form.modifiers else c & np.uint32(31)).astype(np.uint64)
    whole = b.astype(np.uint64) << np.uint64(32) | a
    return whole << n >> np.uint64(32) if "l" in form.modifiers else whole >> n


@scalar("bfe", "T T u32 u32", "u32 s32 u64 s64")
def bfe(form: Form, a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """c bits of a from bit b on; of a signed one above them the sign bit of the field, or of a if it ends before."""
    width = 8 * a.dtype.itemsize
    at, count = (np.broadcast_to((n & np.uint32(255)).astype(np.int64), np.broadcast(a, b, c).shape) for n in (b, c))
    raw = of_bits(a).astype(np.uint64)
    field = np.where(at < width, raw >> np.minimum(at, 63).astype(np.uint64), np.uint64(0)) & _ones(count)
    if a.dtype.kind == "i":
        sign = raw >> np.clip(at + count - 1, 0, width - 1).astype(np.uint64) & np.uint64(1)
        field = np.where((sign == 1) & (count > 0), field | ~_ones(np.clip(width - at, 0, count)), field)
    return field.astype(UNSIGNED[a.dtype.itemsize]).view(a.dtype)


@scalar("bfi", "T T T u32 u32", "b32 b64")
def bfi(form: Form, a: np.ndarray, b: np.ndarray, c: np.ndarray, d: np.ndarray) -> np.ndarray:
    """b with the d lowest bits of a from bit c on."""
    at = np.minimum(c & np.uint32(255), np.uint32(64)).astype(np.int64)
    there = np.where(at < 64, _ones((d & np.uint32(255)).astype(np.int64)) << np.minimum(at, 63).astype(np.uint64),
                     np.uint64(0))
    moved = a.astype(np.uint64) << np.minimum(at, 63).astype(np.uint64)
    return (moved & there | b.astype(np.uint64) & ~there).astype(a.dtype)


def _ones(count: np.ndarray) -> np.ndarray:
    """uint64 whose lowest bits, 64 at most, are set."""
    some = (np.uint64(1) << np.minimum(count, 63).astype(np.uint64)) - np.uint64(1)
    return np.where(count < 64, some, ~np.uint64(0))


@scalar("prmt", "T T T u32", "b32")
def prmt(form: Form, a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """Each byte of the result is the one of b:a that 3 bits of c name, or with a fourth bit its sign, repeated."""
    whole = b.astype(np.uint64) << np.uint64(32) | a
    result = np.uint32(0)
    for i in range(4):
        choice = c >> np.uint32(4 * i)
        byte = (whole >> ((choice & np.uint32(7)).astype(np.uint64) * np.uint64(8))).astype(np.uint32) & np.uint32(255)
        sign = np.where(byte & np.uint32(128), np.uint32(255), np.uint32(0))
        result = result | np.where(choice & np.uint32(8), sign, byte) << np.uint32(8 * i)
    return result


@scalar("lop3", "T T T T u32", "b32")
def lop3(form: Form, a: np.ndarray, b: np.ndarray, c: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Each bit is that bit of the table which the bits of a, b and c name."""
    result = np.uint32(0)
    for i in range(8):
        if int(table[0]) >> i & 1:
            result = result | (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
    return result | np.zeros_like(a)


# Conversion


TO_INTEGRAL = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}
CONVERTED = "u8 s8 u16 s16 u32 s32 u64 s64 f16 bf16 f32 f64"


@scalar("cvt", "D T*", (f"{CONVERTED} tf32 f16x2 bf16x2", CONVERTED), f"rn rna ftz sat {' '.join(TO_INTEGRAL)}")
def cvt(form: Form, a: np.ndarray, b: np.ndarray | None = None) -> np.ndarray:
    """To an integer what is too large becomes the nearest one, NaN 0. To a pair, a becomes its upper half."""
    to, integral = form.types[0], form.one_of(*TO_INTEGRAL)
    if (to in PAIRS) != (b is not None) or (to in PAIRS and form.types[1] != "f32"):
        raise NotImplementedError(form.name)
    if b is not None:
        return np.stack(np.broadcast_arrays(b, a))
    if to == "tf32":
        return _to_tf32(form, a)
    if a.dtype.kind != "f":
        if "sat" in form.modifiers:
            raise NotImplementedError(form.name)
        return a.astype(_float(to) if is_float(to) else _integer(to))
    if integral:
        a = TO_INTEGRAL[integral](a)
    if is_float(to):
        return saturated(form, a if to in HALVES else a.astype(_float(to)))
    if integral is None:
        raise NotImplementedError(form.name)
    return _to_integer(a.astype(np.float64), _integer(to))


def _to_tf32(form: Form, a: np.ndarray) -> np.ndarray:
    """To nearest, ties away from zero."""
    if "rna" not in form.modifiers:
        raise NotImplementedError(form.name)
    return ((of_bits(a) + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(np.float32)


def _to_integer(a: np.ndarray, to: np.dtype) -> np.ndarray:
    low, high = np.iinfo(to).min, np.iinfo(to).max
    inside = (a > float(low)) & (a < float(high))
    limit = np.where(a > 0, to.type(high), to.type(low))
    return np.where(inside | np.isnan(a), np.where(inside, a, 0).astype(to), limit)


def _float(type: str) -> type:
    """To round from: to halves from as many bits as there are."""
    return np.float64 if type in ("f64", *HALVES) else np.float32


def _integer(type: str) -> np.dtype:
    return (SIGNED if type[0] == "s" else UNSIGNED)[SIZE[type]]


