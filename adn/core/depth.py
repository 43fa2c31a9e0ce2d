"""`Depth`: how deep a network runs, as a value."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

_ACCEPTED = (
    'a string such as "TTFF" (T = bypass the refinement path of that stage, F = run it; bars and spaces are '
    'cosmetic, a trailing number cuts a stack of layers: "TTTT|T|4"), "super", "base", or a list of bools such as '
    "[True, True, False, False]"
)


class Depth(tuple):
    """One entry per stage, nearest the input first. Immutable and hashable.

    A `bool` entry is a stage's flag: True bypasses its refinement path. An `int` entry is the number of layers
    to run of a stack that may be cut short (a detector's decoder); it comes after the flags.

    >>> Depth("TTFF")
    Depth('TTFF')
    >>> list(Depth("TT|F|4"))
    [True, True, False, 4]
    """

    __slots__ = ()

    def __new__(cls, value: str | Iterable[bool | int]) -> Depth:
        if isinstance(value, Depth):
            return value
        if isinstance(value, str):
            return super().__new__(cls, _entries_from_text(value))
        try:
            entries = tuple(value)
        except TypeError:
            raise ValueError(f"{value!r} is no depth; pass {_ACCEPTED}") from None
        for i, entry in enumerate(entries):
            # bool is an int; numpy and torch scalars are neither, and reading a tensor could synchronise.
            if not isinstance(entry, (bool, int)):
                raise ValueError(f"entry {i} of {value!r} is a {type(entry).__module__}."
                                 f"{type(entry).__name__}, not a bool; pass {_ACCEPTED}")
            if not isinstance(entry, bool) and entry < 1:
                raise ValueError(f"entry {i} of {value!r} asks for {entry} layers; a stack keeps at least 1")
            if isinstance(entry, bool) and i and not isinstance(entries[i - 1], bool):
                raise ValueError(f"{value!r} has a flag after a number of layers; flags come first")
        if not entries:
            raise ValueError(f"an empty depth; pass {_ACCEPTED}")
        return super().__new__(cls, entries)

    @classmethod
    def parse(cls, value: str | Iterable[bool | int], like: Sequence[Depth] | int | None = None) -> Depth:
        """Read a depth.

        Args:
            value: "TTFF", "TTTT|T|4", a list of bools (then ints), a `Depth`, or "super" / "base".
            like: what the depth is for: the number of stages, or the pair (super, base) of a net. Needed for
                "super" and "base"; when given, length and kind of the entries are checked against it.

        Raises:
            ValueError: on a wrong letter, type or length; the message shows what is accepted.
        """
        if isinstance(like, int):
            like = (cls([False] * like), cls([True] * like))
        if isinstance(value, str) and value.strip().lower() in ("super", "base"):
            if like is None:
                raise ValueError(f"{value!r} depends on the net; pass `like` (its number of stages) or write the flags")
            return like[0] if value.strip().lower() == "super" else like[1]
        depth = cls(value)
        if like is not None:
            full = like[0]
            if len(depth) != len(full) or any(isinstance(a, bool) != isinstance(b, bool)
                                              for a, b in zip(depth, full, strict=True)):
                raise ValueError(
                    f"depth {value!r} has {_describe(depth)}, this net has {_describe(full)}: "
                    f'pass e.g. "{full}" (all of it) or "{like[1]}" (base); accepted is {_ACCEPTED}'
                )
            for i, (entry, most) in enumerate(zip(depth, full, strict=True)):
                if not isinstance(entry, bool) and entry > most:
                    raise ValueError(f"entry {i} of depth {value!r} asks for {entry} layers of a stack of {most}: "
                                     f'pass e.g. "{full}" (all of it) or "{like[1]}" (base)')
        return depth

    @staticmethod
    def every(full: Depth) -> list[Depth]:
        """All depths of a net whose super-net is `full`, counting in binary from FF..F to TT..T."""
        choices = [(False, True) if isinstance(e, bool) else range(e, 0, -1) for e in full]
        return [Depth(entries) for entries in itertools.product(*choices)]

    @property
    def flags(self) -> tuple[bool, ...]:
        return tuple(e for e in self if isinstance(e, bool))

    @property
    def layers(self) -> tuple[int, ...]:
        return tuple(e for e in self if not isinstance(e, bool))

    def __str__(self) -> str:
        flags = "".join("T" if e else "F" for e in self.flags)
        return "|".join(filter(None, [flags, *map(str, self.layers)]))

    def __repr__(self) -> str:
        return f"Depth({str(self)!r})"

    def __getnewargs__(self) -> tuple[tuple[bool | int, ...]]:
        return (tuple(self),)


def _entries_from_text(text: str) -> tuple[bool | int, ...]:
    entries: list[bool | int] = []
    for part in text.replace(" ", "").split("|"):
        if part and set(part) <= {"0", "1"} and (len(part) > 2 or part[0] == "0"):
            letters = part.replace("1", "T").replace("0", "F")
            raise ValueError(f"{text!r}: flags are letters, digits are a number of layers; if 1 is to bypass, {part} "
                             f"is {letters}. Pass {_ACCEPTED}")
        if part.isascii() and part.isdigit() and int(part) > 0:
            entries.append(int(part))
            continue
        for letter in part:
            if letter not in "TFtf":
                raise ValueError(f"{text!r}: {letter!r} is neither T nor F; pass {_ACCEPTED}")
            if entries and not isinstance(entries[-1], bool):
                raise ValueError(f"{text!r} has a flag after a number of layers; flags come first")
            entries.append(letter in "Tt")
    if not entries:
        raise ValueError(f"{text!r} holds no flags; pass {_ACCEPTED}")
    return tuple(entries)


def _describe(depth: Depth) -> str:
    flags, stacks = len(depth.flags), len(depth.layers)
    text = f"{flags} flag{'s' * (flags != 1)}"
    return text if not stacks else f"{text} and {stacks} stack length{'s' * (stacks != 1)}"
