"""What the benchmarks share: the head of a result file, and where it goes. Importing it lets them run from a plain
copy of the repository, not installed."""

from __future__ import annotations

import contextlib
import csv
import datetime
import math
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import timm
import torch
import triton

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
UNFINISHED = 76  # exit code of a benchmark that had no time for all of its rows
sys.path.insert(0, str(ROOT))


def header(device: torch.device | str = "cpu") -> dict[str, str]:
    """Device, versions, commit, date and the command: without them a number is worth nothing."""
    import adn
    from adn.measure.profile import device_name

    return {
        # Folders of one machine mean nothing on another.
        "command": " ".join(["python", str(Path(sys.argv[0]).resolve().relative_to(ROOT)),
                             *(Path(arg).name if Path(arg).is_absolute() else arg for arg in sys.argv[1:])]),
        "device": device_name(torch.device(device)),
        "driver": _driver() if torch.device(device).type == "cuda" else "none",
        "threads": str(torch.get_num_threads()),
        "adn": f"{adn.__version__} ({_commit() or 'no commit'})",
        "torch": torch.__version__,
        "triton": triton.__version__,
        "timm": timm.__version__,
        "python": platform.python_version(),
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
    }


def _commit() -> str:
    """Of the checkout; where there is only a copy of it, what `ADN_COMMIT` says."""
    if shutil.which("git") is None:
        return os.environ.get("ADN_COMMIT", "")
    described = subprocess.run(["git", "-C", ROOT, "describe", "--always", "--dirty", "--exclude=*"],
                               capture_output=True, text=True, check=False).stdout.strip()
    return described or os.environ.get("ADN_COMMIT", "")


def _driver() -> str:
    if shutil.which("nvidia-smi") is None:
        return "unknown"
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    lines = subprocess.run(query, capture_output=True, text=True, check=False).stdout.split()
    return lines[0] if lines else "unknown"


def write_rows(path: Path, rows: Iterable[Mapping[str, object]], head: Mapping[str, str],
               fields: Sequence[str] | None = None) -> None:
    """A tidy CSV file, one row per measurement, the head before it in lines that begin with `#`.

    Args:
        fields: names of the columns; by default those of the first row.
    """
    rows = list(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")  # what stands in the file is not lost if this is interrupted
    with part.open("w", newline="", encoding="utf-8") as file:
        file.writelines(f"# {key}: {value}\n" for key, value in head.items())
        csv.DictWriter(file, fields or rows[0].keys(), lineterminator="\n").writeheader()
    append_rows(part, rows)
    part.replace(path)
    print(f"written: {path}")


def append_rows(path: Path, rows: Iterable[Mapping[str, object]]) -> None:
    """To a file of `write_rows`."""
    with path.open("a", newline="", encoding="utf-8") as file:
        for row in rows:
            csv.DictWriter(file, row.keys(), lineterminator="\n").writerow(row)


def read_rows(path: Path) -> list[dict[str, str]]:
    """What `write_rows` wrote, as text; a last row that was cut short is left out."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(line for line in file if not line.startswith("#")))
    return [row for row in rows if None not in row.values()]


def failure(error: Exception) -> str:
    """What to write down of it. Raises AcceleratorError if a kernel has left the process without a working device.

    A text, as the exception would keep the tensors of its frames alive, which matters where memory has run out.
    """
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return f"failed: {type(error).__name__}: {' '.join(str(error).split())[:200]}"


class Results:
    """Rows of a file, which a run goes on with: those that are there, and those that it adds, each written as it comes.

    Args:
        path: None = no file.
        key: the columns that say what a row measures.
        device: for the head of a new file.
        seconds: after which nothing more is begun.
        head: more for the head of a new file.
    """

    def __init__(self, path: Path | None, key: Sequence[str], device: torch.device | str,
                 seconds: float = math.inf, **head: str) -> None:
        self.path, self.key, self.device, self.head = path, key, device, head
        self.rows: list[Mapping[str, object]] = list(read_rows(path)) if path and path.exists() else []
        self.done = set(map(self._key, self.rows))
        self.deadline = time.monotonic() + seconds
        self.failed = self.unfinished = False

    def add(self, row: Mapping[str, object]) -> None:
        self.rows.append(row)
        self.done.add(self._key(row))
        if self.path and len(self.rows) == 1:
            write_rows(self.path, self.rows, header(self.device) | self.head)
        elif self.path:
            append_rows(self.path, [row])

    def lacks(self, *keys: Sequence[object]) -> bool:
        """Whether one of these rows is still to be measured, and there is time for it."""
        return not all(tuple(map(str, key)) in self.done for key in keys) and not self.late()

    def late(self) -> bool:
        """To be asked where something is left to be measured: whether the time is over."""
        self.unfinished = self.unfinished or time.monotonic() > self.deadline
        return self.unfinished

    @contextlib.contextmanager
    def attempt(self, *what: object) -> Iterator[None]:
        """Says what failed inside, and goes on: what is measured next does not depend on it."""
        try:
            yield
        except Exception as error:
            print(", ".join(map(str, what)), failure(error), sep=": ", file=sys.stderr, flush=True)
            self.failed = True

    @property
    def code(self) -> int:
        """For the end of the process."""
        return 1 if self.failed or not self.rows else UNFINISHED if self.unfinished else 0

    def _key(self, row: Mapping[str, object]) -> tuple[str, ...]:
        return tuple(str(row[name]) for name in self.key)


def read_head(path: Path) -> dict[str, str]:
    """The head that `write_rows` wrote."""
    with path.open(encoding="utf-8") as file:
        lines = [line[2:].rstrip("\n").partition(": ") for line in file if line.startswith("# ")]
    return {key: value for key, _, value in lines}


def columns(rows: Sequence[Sequence[object]]) -> str:
    """Rows as aligned text."""
    from adn.core.tables import table

    return table([[str(cell) for cell in row] for row in rows])
