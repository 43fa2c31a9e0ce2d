"""The tests with every PyTorch this library says it supports, each in an environment of its own.

    python tests/versions.py --list              what the registry offers, and what the table has
    python tests/versions.py                     the last patch of every release, oldest first
    python tests/versions.py --torch 2.11 newest
    python tests/versions.py --torch newest -- tests/test_private.py   the first to read when a release breaks something

A torch comes with the Triton it asks for and the torchvision that pip takes beside it. What is tested is the last
commit, in a clone of its own: go on working meanwhile. The row of a version is written when its tests end, so a run may
be stopped and goes on where it was; a version that has a row of this commit is left out unless `--again`. Rows of less
than the whole test command are not written. Takes about 20 minutes and 6 GB of disk, freed after, for each version.

Exit status: 0 if nothing failed.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from xml.etree import ElementTree

from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
TABLE = ROOT / "bench" / "results" / "versions.csv"


@dataclass
class Row:
    torch: str
    triton: str
    torchvision: str
    timm: str
    numpy: str
    python: str
    passed: int
    failed: int
    skipped: int
    minutes: float
    cores: int
    commit: str
    date: str


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch", nargs="+", metavar="VERSION", help='such as 2.11, 2.12.0, "newest", or "all" for '
                        "every patch (default: the last patch of every release)")
    parser.add_argument("--list", action="store_true", help="print what there is and stop")
    parser.add_argument("--again", action="store_true", help="also those that have a row of this commit")
    parser.add_argument("--table", type=Path, default=TABLE, help=f"default: {TABLE.relative_to(ROOT)}")
    parser.add_argument("--logs", type=Path, metavar="DIR",
                        help="where to keep what pytest prints, and its report (default: nowhere)")
    parser.add_argument("pytest", nargs="*", metavar="-- ARGUMENTS", help="of pytest, in place of the whole")
    chosen = parser.parse_args()

    commit = git("rev-parse", "--short", "HEAD")
    if git("status", "--porcelain", "--untracked-files=no"):
        print(f"uncommitted changes are not tested: this is about {commit}", file=sys.stderr)
    rows = read(chosen.table)
    try:
        versions = select(offered(), chosen.torch)
    except ValueError as error:
        parser.error(str(error))
    if chosen.list:
        for torch in versions:
            done = [f"{row.failed} failed, {row.passed} passed at {row.commit}" for row in rows if row.torch == torch]
            print(f"torch {torch}: {done[0] if done else 'not tested'}")
        return 0
    failed = False
    for torch in versions:
        if not chosen.pytest and not chosen.again and any((row.torch, row.commit) == (torch, commit) for row in rows):
            print(f"torch {torch}: tested at this commit already (--again tests it once more)")
            continue
        try:
            row, reasons = test(torch, commit, chosen.pytest, chosen.logs)
        except subprocess.CalledProcessError as error:
            print(f"torch {torch}: {' '.join(map(str, error.cmd[:6]))} ... failed:\n{error.stderr[-2000:]}")
            failed = True
            continue
        print(f"torch {row.torch}, triton {row.triton}, torchvision {row.torchvision}: {row.passed} passed, "
              f"{row.failed} failed, {row.skipped} skipped in {row.minutes} minutes", *reasons, sep="\n  ", flush=True)
        failed = failed or row.failed > 0
        if not chosen.pytest:
            rows = sorted([other for other in rows if other.torch != torch] + [row], key=lambda r: Version(r.torch))
            write(chosen.table, rows)
    return int(failed)


def git(*args: str) -> str:
    return subprocess.run(["git", "-C", ROOT, *args], capture_output=True, text=True, check=True).stdout.strip()


def offered() -> list[str]:
    """The torch that the registry has for this Python and pyproject.toml allows, oldest first."""
    needed = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    supported = next(r.specifier for r in map(Requirement, needed) if r.name == "torch")
    listed = re.search(r"Available versions: (.*)", pip("index", "versions", "torch"))[1]
    return [str(v) for v in sorted(map(Version, listed.split(", "))) if v in supported and not v.local]


def select(versions: list[str], wanted: list[str] | None) -> list[str]:
    last = {".".join(torch.split(".")[:2]): torch for torch in versions}  # the last patch stays
    names = {"newest": versions[-1:], "all": versions} | {name: [name] for name in versions} | {
        name: [torch] for name, torch in last.items()}
    if unknown := set(wanted or ()) - set(names):
        raise ValueError(f"--torch {' '.join(sorted(unknown))}: there is {', '.join(versions)}, newest and all")
    chosen = {torch for name in wanted or last for torch in names[name]}
    return [torch for torch in versions if torch in chosen]


def pip(*args: str, python: str | Path = sys.executable) -> str:
    """What it prints. A machine's own constraints do not hold: which versions are installed is what this is about."""
    environment = {**os.environ, "PIP_CONSTRAINT": os.devnull, "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    return subprocess.run([python, "-m", "pip", *args], capture_output=True, text=True, check=True,
                          env=environment).stdout


def test(torch: str, commit: str, arguments: list[str], logs: Path | None) -> tuple[Row, list[str]]:
    """The row, and for each failure its name and reason."""
    with tempfile.TemporaryDirectory(prefix="adn-versions-") as folder:
        clone, venv, report = Path(folder, "adn"), Path(folder, "venv"), Path(folder, "report.xml")
        git("clone", "-q", "--no-checkout", str(ROOT), str(clone))
        git("-C", str(clone), "checkout", "-q", commit)  # the one that the row names, whatever was committed since
        subprocess.run([sys.executable, "-m", "venv", venv], capture_output=True, text=True, check=True)
        python = venv / "bin" / "python"
        print(f"torch {torch}: installing", flush=True)
        # Three signs: two would also take a build of that version with something behind a plus.
        pip("install", "-q", f"torch==={torch}", "-e", f"{clone}[test]", python=python)
        names = ("torch", "triton", "torchvision", "timm", "numpy")
        found = subprocess.run(
            [python, "-c", f"from importlib.metadata import version\nfor name in {names}: print(version(name))"],
            capture_output=True, text=True, check=True).stdout.split()

        print(f"torch {torch}: testing", flush=True)
        # Fixtures beside the repository, which tests look for from where they lie.
        beside = ROOT.parent / "shared"
        environment = {"ADN_GOLDEN": str(beside / "golden"), "ADN_DATA": str(beside / "data"), **os.environ,
                       "VIRTUAL_ENV": str(venv), "PATH": f"{venv / 'bin'}{os.pathsep}{os.environ['PATH']}"}
        start = time.monotonic()
        done = subprocess.run([python, "-m", "pytest", *(arguments or ("-n", "2")), f"--junit-xml={report}"], cwd=clone,
                              env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
        minutes = (time.monotonic() - start) / 60
        if logs is not None:
            logs.mkdir(parents=True, exist_ok=True)
            (logs / f"torch-{torch}.log").write_text(done.stdout)
            if report.exists():
                shutil.copy(report, logs / f"torch-{torch}.xml")
        if not report.exists():
            raise subprocess.CalledProcessError(done.returncode, ["pytest"], stderr=done.stdout)
        suite = ElementTree.parse(report).getroot().find("testsuite")
        count = {name: int(suite.get(name)) for name in ("tests", "failures", "errors", "skipped")}
        failed = count["failures"] + count["errors"]
        row = Row(*found, ".".join(map(str, sys.version_info[:3])), count["tests"] - failed - count["skipped"], failed,
                  count["skipped"], round(minutes, 1), os.cpu_count(), commit, str(datetime.date.today()))
        return row, list(reasons(suite))


def reasons(suite: ElementTree.Element) -> Iterator[str]:
    for case in suite.iter("testcase"):
        for fault in (*case.findall("failure"), *case.findall("error")):
            reason = (fault.get("message") or "").strip().partition("\n")[0]
            yield f"{case.get('classname')}::{case.get('name')}: {reason[:300]}"


def read(table: Path) -> list[Row]:
    if not table.exists():
        return []
    with table.open(newline="") as file:
        rows = csv.DictReader(file)
        return [Row(**{f.name: {"int": int, "float": float}.get(f.type, str)(row[f.name]) for f in fields(Row)})
                for row in rows]


def write(table: Path, rows: list[Row]) -> None:
    with table.open("w", newline="") as file:
        writer = csv.DictWriter(file, [f.name for f in fields(Row)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(map(asdict, rows))


if __name__ == "__main__":
    sys.exit(main())
