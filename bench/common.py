"""What the benchmarks share: the head of a result file, and where it goes."""

from __future__ import annotations

import csv
import datetime
import platform
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import timm
import torch

import adn
from adn.profile import device_name

RESULTS = Path(__file__).parent / "results"


def header(device: torch.device | str = "cpu") -> dict[str, str]:
    """Device, versions, commit, date and the command: without them a number is worth nothing."""
    root = Path(__file__).parents[1]
    commit = subprocess.run(["git", "-C", root, "describe", "--always", "--dirty", "--exclude=*"],
                            capture_output=True, text=True, check=False).stdout.strip()
    return {
        # Folders of one machine mean nothing on another.
        "command": " ".join(["python", str(Path(sys.argv[0]).resolve().relative_to(root)),
                             *(Path(arg).name if Path(arg).is_absolute() else arg for arg in sys.argv[1:])]),
        "device": device_name(torch.device(device)),
        "threads": str(torch.get_num_threads()),
        "adn": f"{adn.__version__} ({commit or 'no commit'})",
        "torch": torch.__version__,
        "timm": timm.__version__,
        "python": platform.python_version(),
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
    }


def write_rows(path: Path, rows: Iterable[Mapping[str, object]], head: Mapping[str, str]) -> None:
    """A tidy CSV file, one row per measurement, the head before it in lines that begin with `#`."""
    rows = list(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        file.writelines(f"# {key}: {value}\n" for key, value in head.items())
        writer = csv.DictWriter(file, rows[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    print(f"written: {path}")


def columns(rows: Sequence[Sequence[object]]) -> str:
    """Rows as aligned text."""
    from adn.profile import table

    return table([[str(cell) for cell in row] for row in rows])
