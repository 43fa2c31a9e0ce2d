"""Everything a GPU is needed for, in one command and under ten minutes: its tests, then its benchmarks.

    python bench/gpu.py [--only tests kernels models] [--data DIR_OF_CIFAR10]

Tests: all marked `cuda`, then every op under compute-sanitizer where that is installed. Kernels: `host_cost.py` and
`kernels.py`, whose opponents are compiled while the tests run. Models: `conversion_overhead.py`, `adn profile`. Each
step has a time limit of its own and of what is left of the whole; a step that fails or runs out of time does not stop
the others, and the exit code says whether all of them passed. Result files are written as results come, and carry
device, versions, commit and date; `gpu_<device>.csv` says how the steps ended. Tuned configurations have a command of
their own, `python -m adn_kernels.tune --quick`.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from common import RESULTS, ROOT, header, write_rows

HERE = Path(__file__).parent
GROUPS = ("tests", "kernels", "models")
SLACK = 35  # seconds between the end of a benchmark's time and its step's: starting, the last case


@dataclasses.dataclass(frozen=True)
class Step:
    """One command; `limit` in seconds. It fails by exit code or by running out of time."""

    group: str
    name: str
    limit: float
    command: list[str]


def steps(out: Path, tag: str, kernel_seconds: float, data: Path | None) -> Iterator[Step]:
    """In the order in which they run."""
    python = sys.executable

    def script(name: str, *args: str) -> list[str]:
        return [python, f"bench/{name}.py", *args]

    parallel = ["-n", "8"] if importlib.util.find_spec("xdist") else []
    yield Step("tests", "tests", 240, [python, "-m", "pytest", "-m", "cuda and not full", *parallel, "tests"])
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is not None:
        for tool in ("racecheck", "memcheck"):
            yield Step("tests", tool, 60, [sanitizer, "--tool", tool, "--error-exitcode", "1",
                                           *script("kernels", "--small", "--cases", "1")])
    yield Step("kernels", "host cost", 30, script("host_cost", "--device", "cuda", "--csv",
                                                  f"{out}/host_cost_{tag}.csv"))
    yield Step("kernels", "kernels", kernel_seconds + SLACK, script(
        "kernels", "--csv", f"{out}/kernels_{tag}.csv", "--seconds", str(kernel_seconds)))
    yield Step("models", "overhead of conversion", 90, script(
        "conversion_overhead", "--device", "cuda", "--rounds", "50", "--csv", f"{out}/conversion_overhead_{tag}.csv"))
    for model in ("resnet50", "mobilenetv2_100", "vit_base_patch16_224", "swin_tiny_patch4_window7_224"):
        for batch in (1, 64):
            yield Step("models", f"profile {model}, batch {batch}", 60, [
                python, "-m", "adn", "profile", "--model", model, "--batch-size", str(batch), "--device", "cuda",
                "--csv", f"{out}/profile_{model}_batch{batch}_{tag}.csv"])
    if data is not None:
        yield Step("models", "CIFAR-10, one seed", 240, script(
            "cifar10", "--data", str(data), "--full", "--device", "cuda", "--epochs", "10", "--seeds", "0", "--csv",
            f"{out}/cifar10_10epochs_{tag}.csv"))


def start(command: list[str]) -> subprocess.Popen:
    """In a process group of its own, from the root of the repository, which need not be installed."""
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    return subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True)


def stop(process: subprocess.Popen) -> None:
    """With all that it started: what is left over would hold the GPU."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def run(step: Step, left: float) -> str:
    """How it ended: "passed", "failed" or "out of time"."""
    process = start(step.command)
    try:
        code = process.wait(min(step.limit, left))
    except subprocess.TimeoutExpired:
        return "out of time"
    finally:
        stop(process)
    return "failed" if code else "passed"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="DIR")
    parser.add_argument("--only", nargs="+", choices=GROUPS, default=GROUPS)
    parser.add_argument("--seconds", type=float, default=585, help="time limit of the whole")
    parser.add_argument("--kernel-seconds", type=float, default=180, help="of it, for the benchmarks of kernels")
    parser.add_argument("--data", type=Path, metavar="DIR", help="folder of CIFAR-10, for bench/cifar10.py")
    parser.add_argument("--dry-run", action="store_true", help="only show the commands")
    args = parser.parse_args()
    tag = "cuda"
    if not args.dry_run:
        if not torch.cuda.is_available():
            parser.error("no CUDA device; --dry-run shows the commands")
        tag = torch.cuda.get_device_name().lower().replace(" ", "_")
    out = args.out.absolute()
    chosen = [step for step in steps(out, tag, args.kernel_seconds, args.data) if step.group in args.only]
    if args.dry_run:
        for step in chosen:
            print(f"{step.group:8} {step.limit:4.0f} s  {' '.join(step.command)}")
        return 0
    out.mkdir(parents=True, exist_ok=True)
    # Beside the tests, or before the benchmarks if there are none.
    compiling = start([sys.executable, "bench/kernels.py", "--precompile", "--seconds", "60"]) \
        if "kernels" in args.only else None
    deadline, rows = time.monotonic() + args.seconds, []
    for step in chosen:
        if compiling is not None and step.group != "tests":
            with contextlib.suppress(subprocess.TimeoutExpired):
                compiling.wait(0 if "tests" in args.only else 75)
            stop(compiling)
            compiling = None
        print(f"\n=== {step.name}", flush=True)
        begin = time.monotonic()
        how = run(step, deadline - begin) if deadline > begin else "out of time"
        rows.append({"step": step.name, "result": how, "seconds": round(time.monotonic() - begin, 1)})
        print(f"=== {step.name}: {how}, {rows[-1]['seconds']:.0f} s", flush=True)
        write_rows(out / f"gpu_{tag}.csv", rows, header("cuda"))
    if compiling is not None:
        stop(compiling)
    bad = [f"{row['step']} ({row['result']})" for row in rows if row["result"] != "passed"]
    print("\nall passed" if not bad else f"\nnot passed: {', '.join(bad)}")
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main())
