"""Everything a GPU is needed for, in one command and under ten minutes: its tests, then its benchmarks.

    python bench/gpu.py [--only tests kernels models] [--data DIR_OF_CIFAR10]

Tests: all marked `cuda`; last of all, every op under compute-sanitizer where that is installed. Kernels: `kernels.py`,
for whose cases compilers run while the tests do, and `host_cost.py`. Models: `models.py`, `detectors.py`,
`switch_storm.py`, `per_image.py`, `counts.py`, `training_step.py`, `conversion_overhead.py`.
Each step has a time limit of its own and of what is left of the whole; a step that fails or runs out of time does not
stop the others, and the exit code says whether all of them passed.

Result files are written as results come, and carry device, versions, commit and date. A second run (with `--only`, all
of its time is for that) goes on with what is missing in `kernels_<device>.csv`, `models_<device>.csv` and
`detectors_<device>.csv`; `kernels_<device>.txt` says which targets are met. `gpu_<device>.csv` says how the steps ended
and which tests failed, `gpu_<device>.log` holds all output. Tuned configurations have a command of their own,
`python bench/tune.py --quick`.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from common import RESULTS, ROOT, header, read_rows, write_rows
from kernels_summary import summary

GROUPS = ("tests", "kernels", "models")
SLACK = 35  # seconds between the end of a benchmark's time and its step's: starting, the last case
SHOWN = 4000  # characters of a step's output, the last ones; all are in the log


@dataclasses.dataclass(frozen=True)
class Step:
    """One command. It fails by exit code or by running out of time.

    Attributes:
        limit, usual: seconds it may take, and those it takes if all is well.
        environment: variables set for it.
        measures: it takes `--seconds`, and gets what the steps after it leave over.
    """

    group: str
    name: str
    limit: float
    usual: float
    command: list[str]
    environment: dict[str, str] | None = None
    measures: bool = False


def script(name: str, *args: str) -> list[str]:
    return [sys.executable, f"bench/{name}.py", *args]


def steps(out: Path, tag: str, data: Path | None) -> Iterator[Step]:
    """In the order in which they run."""
    python = sys.executable
    parallel = ["-n", "8"] if importlib.util.find_spec("xdist") else []
    yield Step("tests", "tests", 210, 210, [
        python, "-m", "pytest", "-m", "cuda and not full", "-vv", "-rfE", "--tb=short", *parallel, "tests"])
    yield Step("kernels", "kernels", 450, 450, script("kernels", "--csv", f"{out}/kernels_{tag}.csv"), measures=True)
    yield Step("kernels", "host cost", 60, 10, script("host_cost", "--device", "cuda", "--csv",
                                                      f"{out}/host_cost_{tag}.csv"))
    yield Step("models", "models", 450, 65, script(
        "models", "--device", "cuda", "--dtypes", "bfloat16", "float16", "--csv", f"{out}/models_{tag}.csv"),
        measures=True)
    yield Step("models", "detectors", 450, 60, script(
        "detectors", "--device", "cuda", "--dtypes", "bfloat16", "--contenders", "engine", "static, eager",
        "static, compiled", "--csv", f"{out}/detectors_{tag}.csv"), measures=True)
    nets = ("resnet50", "mobilenetv2_100", "vit_base_patch16_224", "swin_tiny_patch4_window7_224")
    on_gpu = ("--device", "cuda", "--dtype", "bfloat16")
    yield Step("models", "switch storm", 60, 15, script(
        "switch_storm", *on_gpu, "--size", "224", "--rounds", "200", "--models", *nets, "--csv",
        f"{out}/switch_storm_{tag}.csv"))
    yield Step("models", "a depth for each image", 60, 15, script(
        "per_image", *on_gpu, "--batch-size", "64", "--csv", f"{out}/per_image_{tag}.csv"))
    yield Step("models", "counts", 90, 15, script("counts", "--device", "cuda", "--csv", f"{out}/counts_{tag}.csv"))
    yield Step("models", "training step", 150, 30, script(
        "training_step", "--device", "cuda", "--csv", f"{out}/training_step_{tag}.csv"))
    yield Step("models", "overhead of conversion", 60, 10, script(
        "conversion_overhead", "--device", "cuda", "--rounds", "50", "--csv", f"{out}/conversion_overhead_{tag}.csv"))
    if data is not None:
        yield Step("models", "CIFAR-10, one seed", 240, 240, script(
            "cifar10", "--data", str(data), "--full", "--device", "cuda", "--epochs", "10", "--seeds", "0", "--csv",
            f"{out}/cifar10_10epochs_{tag}.csv"))
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is not None:
        # Within a block of torch's cache an access out of a tensor's bounds is none to memcheck.
        for tool, environment in {"memcheck": {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}, "racecheck": None}.items():
            yield Step("tests", tool, 120, 25, [sanitizer, "--tool", tool, "--error-exitcode", "1",
                                                *script("kernels", "--small", "--cases", "1")], environment)


def in_time(step: Step, left: float, after: float) -> tuple[list[str], float]:
    """A step's command and limit, with `left` seconds of the whole, of which later steps usually take `after`."""
    if not step.measures:
        return step.command, min(step.limit, left)
    limit = max(30 + SLACK, min(step.limit, left - after))
    return [*step.command, "--seconds", f"{limit - SLACK:.0f}"], limit


def start(command: list[str], log: Path, environment: dict[str, str] | None = None) -> subprocess.Popen:
    """In a process group of its own, from the root of the repository, which need not be installed; output to `log`."""
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))} | (environment or {})
    with log.open("ab") as file:
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT,
                                start_new_session=True)


def stop(process: subprocess.Popen) -> None:
    """With all that it started: what is left over would hold the GPU."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def run(command: list[str], limit: float, log: Path, environment: dict[str, str] | None) -> str:
    """How it ended: "passed", "failed" or "out of time"."""
    process = start(command, log, environment)
    try:
        code = process.wait(limit)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)  # pytest then says what has failed, a benchmark what it has not measured
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(10)
        return "out of time"
    finally:
        stop(process)
    return "failed" if code else "passed"


def failed_tests(output: str) -> list[str]:
    """Names of tests, from lines of pytest as they come (`-vv`) or from its summary."""
    names = re.findall(r"\b(?:FAILED|ERROR) (tests/\S+)", output) + re.findall(r"(tests/\S+) (?:FAILED|ERROR)", output)
    return list(dict.fromkeys(names))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="DIR")
    parser.add_argument("--only", nargs="+", choices=GROUPS, default=GROUPS)
    parser.add_argument("--seconds", type=float, default=585, help="time limit of the whole")
    parser.add_argument("--data", type=Path, metavar="DIR", help="folder of CIFAR-10, for bench/cifar10.py")
    parser.add_argument("--dry-run", action="store_true", help="only show the commands")
    args = parser.parse_args()
    tag = "cuda"
    if not args.dry_run:
        if not torch.cuda.is_available():
            parser.error("no CUDA device; --dry-run shows the commands")
        tag = torch.cuda.get_device_name().lower().replace(" ", "_")
    out = args.out.absolute()
    chosen = [step for step in steps(out, tag, args.data) if step.group in args.only]
    if args.dry_run:
        for step in chosen:
            print(f"{step.group:8} {step.limit:4.0f} s  {' '.join(step.command)}")
        return 0
    out.mkdir(parents=True, exist_ok=True)
    # Shells ignore it for what runs in the background; steps, which inherit that, are to hear when time is up.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    kernels, log = out / f"kernels_{tag}.csv", out / f"gpu_{tag}.log"
    log.write_bytes(b"")
    deadline, rows = time.monotonic() + args.seconds, []
    with contextlib.ExitStack() as stack:
        compiling = None
        if "kernels" in args.only:  # beside the tests, or before the benchmarks if there are none
            seconds = chosen[0].limit if "tests" in args.only else 60
            compiling = start(script("kernels", "--precompile", "--csv", str(kernels), "--seconds", str(seconds)), log)
            stack.callback(stop, compiling)
        for i, step in enumerate(chosen):
            if compiling is not None and step.group != "tests":
                with contextlib.suppress(subprocess.TimeoutExpired):
                    compiling.wait(0 if "tests" in args.only else 75)
                stop(compiling)
                compiling = None
            print(f"\n=== {step.name}", flush=True)
            begin, size = time.monotonic(), log.stat().st_size
            command, limit = in_time(step, deadline - begin, sum(step.usual for step in chosen[i + 1:]))
            how = run(command, limit, log, step.environment) if limit > 0 else "out of time"
            output = log.read_bytes()[size:].decode(errors="replace")
            failed = failed_tests(output) if step.name == "tests" else []
            rows.append({"step": step.name, "result": how, "seconds": round(time.monotonic() - begin, 1),
                         "failed": " ".join(failed)})
            print(f"{output[-SHOWN:]}\n=== {step.name}: {how}, {rows[-1]['seconds']:.0f} s", flush=True)
            write_rows(out / f"gpu_{tag}.csv", rows, header("cuda"))
            if step.name == "kernels" and kernels.exists():
                kernels.with_suffix(".txt").write_text(summary(read_rows(kernels)) + "\n")
    if "kernels" in args.only and kernels.with_suffix(".txt").exists():
        print(f"\n{kernels.with_suffix('.txt').read_text()}")
    bad = [row for row in rows if row["result"] != "passed"]
    print("\n".join(f"{row['step']}: {row['result']} {row['failed']}" for row in bad) or "all passed")
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main())
