"""What is shown while something takes long."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any, TextIO

from tqdm import tqdm

EVERY_S = 30.0  # where lines cannot be written over: in a log file, in a notebook's console, under a job scheduler


class _Lines:
    """A file that gets a line for each state of a bar."""

    def __init__(self, file: TextIO) -> None:
        self.file = file

    def write(self, text: str) -> None:
        if shown := text.strip("\r\n "):
            self.file.write(f"{shown}\n")

    def flush(self) -> None:
        self.file.flush()


def progress_bar(iterable: Iterable[Any] | None = None, *, show: bool, **options: Any) -> tqdm:
    """A bar on stderr, gone when it is full; a line every half minute where that is no terminal.

    Args:
        show: False for nothing at all.
        options: of tqdm, such as `desc`, `unit` and `total`.
    """
    if show and not sys.stderr.isatty():
        options |= {"file": _Lines(sys.stderr), "mininterval": EVERY_S, "maxinterval": EVERY_S, "delay": EVERY_S,
                    "bar_format": "{desc}: {n_fmt}/{total_fmt} {unit}s, {elapsed}<{remaining}, {rate_fmt}{postfix}"}
    return tqdm(iterable, leave=False, disable=not show, **options)
