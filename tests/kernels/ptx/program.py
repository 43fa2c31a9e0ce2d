"""PTX text to instructions whose operands are resolved."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

SHARED = "global_smem"  # the only variable of Triton's programs: all of shared memory, at its address 0


@dataclass(frozen=True)
class Register:
    """One of the program's; `size` in bytes, 0 for a predicate."""

    index: int
    size: int


@dataclass(frozen=True)
class Constant:
    text: str


@dataclass(frozen=True)
class Address:
    """[base + offset]"""

    base: Register | Constant
    offset: int


# A tuple is a vector {a, b} or a pair a|b; None is `_`, a result that is not wanted.
Operand = Register | Constant | Address | tuple | None


@dataclass
class Instruction:
    text: str
    opcode: str
    parts: tuple[str, ...]  # what follows the opcode, between dots
    operands: list[Operand]
    guard: tuple[Register, bool] | None  # with the value for which it is executed
    target: int = -1  # of a branch
    run: Callable[..., None] | None = field(default=None, repr=False)  # set by `table.bind`


class Program:
    """The one entry of a PTX text.

    Attributes:
        code: its instructions; a branch's target is an index of it.
        parameters: {name: type}, and in `offsets` where each of them lies in their memory.
        threads: of a CTA.
        sizes: of each register in bytes, 0 for a predicate.
        special: the registers, by name, that hold what is special (%tid.x).
    """

    def __init__(self, text: str) -> None:
        text = re.sub(r"//[^\n]*", "", text)
        text = re.sub(r"^\s*\.(loc|file|pragma)\b[^\n]*", "", text, flags=re.MULTILINE)
        entries = list(re.finditer(r"\.entry\s+[\w$]+\s*\((.*?)\)([^{]*)\{", text, re.DOTALL))
        if len(entries) != 1 or re.search(r"\.func\b", text):
            raise NotImplementedError("more than one entry, or functions")
        head, directives = entries[0].groups()
        declared = re.findall(r"\.param\s+\.(\w+)[^,]*?([\w$]+)\s*(?:,|$)", head)
        self.parameters: dict[str, str] = {name: type for type, name in declared}
        self.offsets: dict[str, int] = {name: 8 * i for i, name in enumerate(self.parameters)}
        self.threads = int(re.search(r"\.(?:req|max)ntid\s+(\d+)", directives)[1])
        self.code: list[Instruction] = []
        self.sizes: list[int] = []
        self.special: dict[str, Register] = {}
        self._names: list[dict[str, Register]] = [{}]  # by scope, the innermost last
        self._widths: list[dict[str, int]] = [{}]  # of registers declared by the number, by prefix
        labels: dict[str, int] = {}
        for kind, what in self._statements(text[entries[0].end():]):
            if kind == "{":
                self._names.append({})
                self._widths.append({})
            elif kind == "}":
                self._names.pop()
                self._widths.pop()
            elif kind == "label":
                labels[what] = len(self.code)
            elif what.startswith(".reg"):
                self._declare(what)
            elif what.startswith("."):
                raise NotImplementedError(what)
            else:
                self.code.append(self._instruction(what))
        for instruction in self.code:
            if instruction.opcode == "bra":
                instruction.target = labels[instruction.operands[0].text]

    @staticmethod
    def _statements(body: str) -> Any:
        """(kind, text) of each up to the end of the entry: "{", "}", "label", "statement"."""
        pattern = re.compile(r"\s*(?:([$\w]+):(?!:)|([{}])|([^;]+);)", re.DOTALL)
        depth, at = 1, 0
        while depth:
            match = pattern.match(body, at)
            label, brace, statement = match.groups()
            at = match.end()
            if brace:
                depth += 1 if brace == "{" else -1
                if depth:
                    yield brace, ""
            elif label:
                yield "label", label
            else:
                yield "statement", " ".join(statement.split())

    def _declare(self, text: str) -> None:
        """.reg .b32 %r<691>, or .reg .pred name, name"""
        type, names = re.fullmatch(r"\.reg \.(\w+) (.*)", text).groups()
        size = 0 if type == "pred" else int(type.lstrip("bfsu")) // 8
        for name in names.split(","):
            prefix, count = re.fullmatch(r"\s*(%?\w+)(?:<(\d+)>)?\s*", name).groups()
            if count:
                self._widths[-1][prefix] = size
            else:
                self._names[-1][prefix] = self._new(size)

    def _new(self, size: int) -> Register:
        self.sizes.append(size)
        return Register(len(self.sizes) - 1, size)

    def _instruction(self, text: str) -> Instruction:
        match = re.fullmatch(r"(?:@(!?)([%\w]+) )?([\w.:]+)(?: (.*))?", text)
        if match is None:
            raise NotImplementedError(text)
        negated, guard, name, rest = match.groups()
        opcode, *parts = name.split(".")
        operands = [self._operand(one.strip()) for one in re.findall(r"(?:\{[^}]*\}|\[[^\]]*\]|[^,])+", rest or "")]
        return Instruction(text, opcode, tuple(parts), operands,
                           None if guard is None else (self._register(guard), negated == ""))

    def _operand(self, text: str) -> Operand:
        if text[0] == "{":
            return tuple(self._operand(one.strip()) for one in text[1:-1].split(","))
        if text[0] == "[":
            base, offset = re.fullmatch(r"\[\s*([%\w$.]+)\s*(?:\+\s*(-?\w+)\s*)?\]", text).groups()
            return Address(self._operand(base), int(offset or "0", 0))
        if "|" in text:
            return tuple(self._operand(one.strip()) for one in text.split("|"))
        if text == "_":
            return None
        if text in self.offsets:
            return Constant(str(self.offsets[text]))
        return Constant("0") if text == SHARED else self._register(text) or Constant(text)

    def _register(self, name: str) -> Register | None:
        """None if it is not the name of one."""
        for names, widths in zip(reversed(self._names), reversed(self._widths)):
            if name in names:
                return names[name]
            prefix = re.fullmatch(r"(%[a-z]+)\d+", name)
            if prefix and prefix[1] in widths:
                return names.setdefault(name, self._new(widths[prefix[1]]))
        if name[0] == "%":
            if name not in self.special:
                self.special[name] = self._names[0][name] = self._new(4)
            return self.special[name]
        return None
