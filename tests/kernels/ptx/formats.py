"""Types of PTX: arrays of the bits of registers to arrays of values, and back.

Values of f16 and bf16 are float32 (or float64, until they are rounded); those of f16x2, bf16x2, s16x2 and u16x2 have a
leading dimension of two, low half first.
"""

from __future__ import annotations

import re

import numpy as np

UNSIGNED = {1: np.dtype(np.uint8), 2: np.dtype(np.uint16), 4: np.dtype(np.uint32), 8: np.dtype(np.uint64)}
SIGNED = {1: np.dtype(np.int8), 2: np.dtype(np.int16), 4: np.dtype(np.int32), 8: np.dtype(np.int64)}
NATIVE = {  # types whose values NumPy computes with as they lie in a register
    **{f"{kind}{8 * n}": dtype for n in (1, 2, 4, 8)
       for kind, dtype in (("b", UNSIGNED[n]), ("u", UNSIGNED[n]), ("s", SIGNED[n]))},
    "f32": np.dtype(np.float32), "f64": np.dtype(np.float64), "pred": np.dtype(bool),
}
HALVES = ("f16", "bf16")
PAIRS = ("f16x2", "bf16x2")
INTEGER_PAIRS = ("s16x2", "u16x2")
SIZE = {**{name: dtype.itemsize for name, dtype in NATIVE.items()}, "f16": 2, "bf16": 2, "tf32": 4,
        **dict.fromkeys(PAIRS + INTEGER_PAIRS, 4)}


def is_float(type: str) -> bool:
    return type in ("f32", "f64", "tf32", *HALVES, *PAIRS)


def is_signed(type: str) -> bool:
    return type[0] == "s"


def values(bits: np.ndarray, type: str) -> np.ndarray:
    """Of the bits of registers (n,), which may be wider than the type: (n,), or (2, n) of a pair."""
    size = SIZE[type]
    if bits.dtype.itemsize != size and type != "pred":
        if bits.dtype.itemsize < size:
            raise NotImplementedError(f"a register of {bits.dtype.itemsize} bytes is read as {type}")
        bits = bits.astype(UNSIGNED[size])
    native = NATIVE.get(type)
    if native is not None:
        return bits.view(native)
    if type == "tf32":  # a multiplier reads no more of it
        return (bits & np.uint32(0xFFFFE000)).view(np.float32)
    if type in PAIRS or type in INTEGER_PAIRS:
        bits = np.stack([bits.astype(np.uint16), (bits >> np.uint32(16)).astype(np.uint16)])
    if type in INTEGER_PAIRS:
        return bits.view(NATIVE[type[:3]])
    return from_bf16(bits) if type.startswith("bf16") else bits.view(np.float16).astype(np.float32)


def bits(value: np.ndarray, type: str, size: int) -> np.ndarray:
    """The inverse, rounded to the type and extended by its sign to registers of `size` bytes (0: a predicate)."""
    if size == 0:
        return value
    if type in PAIRS or type in HALVES or type in INTEGER_PAIRS:
        half = (value.view(np.uint16) if type in INTEGER_PAIRS else to_bf16(value) if type.startswith("bf16") else
                value.astype(np.float16).view(np.uint16))
        raw = half if type in HALVES else half[0] | half[1].astype(np.uint32) << np.uint32(16)
    else:
        native = NATIVE["f32" if type == "tf32" else type]
        raw = value if value.dtype == native else value.astype(native)
        if raw.dtype.itemsize < size and is_signed(type):
            raw = raw.astype(SIGNED[size])
        raw = raw.view(UNSIGNED[raw.dtype.itemsize])
    return raw if raw.dtype.itemsize == size else raw.astype(UNSIGNED[size])


def from_bf16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def to_bf16(value: np.ndarray) -> np.ndarray:
    """uint16, rounded to nearest, ties to even; NaN becomes 0x7FFF. From float64 too it is rounded once (unless
    subnormal)."""
    nan = np.isnan(value)
    if value.dtype == np.float64:  # drop 45 of 52 bits first: what is left is exact in float32
        wide = value.view(np.uint64)
        wide = wide + np.uint64((1 << 44) - 1) + ((wide >> np.uint64(45)) & np.uint64(1))
        value = (wide & ~np.uint64((1 << 45) - 1)).view(np.float64).astype(np.float32)
    raw = value.view(np.uint32)
    rounded = ((raw + np.uint32(0x7FFF) + ((raw >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)).astype(np.uint16)
    return np.where(nan, np.uint16(0x7FFF), rounded)


def constant(text: str, type: str) -> np.ndarray:
    """The value of a literal, (1,), or (2, 1) of a pair."""
    if match := re.fullmatch(r"0[fF]([0-9a-fA-F]{8})", text):
        raw = np.array([int(match[1], 16)], np.uint32)
    elif match := re.fullmatch(r"0[dD]([0-9a-fA-F]{16})", text):
        raw = np.array([int(match[1], 16)], np.uint64)
    elif type == "pred":
        return np.array([int(text, 0) != 0])
    else:
        raw = np.array([int(text.rstrip("U"), 0) % 2**64], np.uint64)
    if is_float(type) and raw.dtype.itemsize != SIZE[type] and text[1:2] in "fFdD":
        raise NotImplementedError(f"the constant {text} as {type}")
    return values(raw, type)


def flushed(value: np.ndarray) -> np.ndarray:
    """Subnormal float32 to zero of the same sign (`.ftz`)."""
    return np.where(np.abs(value) < np.float32(2.0**-126), np.copysign(np.float32(0), value), value)


def rounded_to_odd(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a + b of float64, with the last bit set wherever it is not exact: rounded again to a type of fewer than 52 bits,
    it is then rounded once."""
    total = a + b
    rest = total - a
    error = (a - (total - rest)) + (b - rest)
    raw = total.view(np.int64)
    towards = np.where((error > 0) == (total > 0), 1, -1)
    odd = np.where((error != 0) & (raw & 1 == 0) & np.isfinite(total), raw + towards, raw)
    return odd.view(np.float64)
