"""Tables of text, for people and in CSV files."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable, Sequence


def table(rows: Sequence[Sequence[str]], left: bool = False) -> str:
    """Rows of text in columns, the first flush left, the others flush right, or also left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(width) if i and not left else cell.ljust(width)
                  for i, (cell, width) in enumerate(zip(row, widths, strict=True))).rstrip()
        for row in rows
    )


def read_table(path: str | os.PathLike, columns: Iterable[str]) -> tuple[dict[str, str], list[dict[str, str]]]:
    """A CSV file with `# key: value` lines before it: these, and its rows by column.

    Raises:
        ValueError: if it lacks one of `columns`.
    """
    with open(path, newline="", encoding="utf-8") as file:
        lines = file.read().splitlines()
    comments = [line[1:].partition(":") for line in lines if line.startswith("#")]
    reader = csv.DictReader(line for line in lines if not line.startswith("#"))
    missing = set(columns) - set(reader.fieldnames or ())
    if missing:
        raise ValueError(f"{os.fspath(path)!r} has no column {', '.join(map(repr, sorted(missing)))}: not a file that "
                         "adn wrote")
    return {key.strip(): value.strip() for key, _, value in comments}, list(reader)
