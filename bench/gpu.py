"""Everything a GPU is needed for, in one command of nine minutes, most valuable first.

    python bench/gpu.py [--out DIR] [--seconds 540]
    python bench/gpu.py --dry-run      # on a CPU: every step, with tiny sizes

Steps, in order: what the GPU reaches and whether cuDNN is safe (`probe.py`); tests of the engine, the deploy form and
whole nets, and one small case of every kernel against exact results, while compilers run for the cases of `kernels.py`;
whole nets and detectors, fused against eager, then ResNet-50 against compiled forms; kernels that have targets; YOLOs
against compiled forms; changes of depth, a depth for each image, training steps; every op under compute-sanitizer where
that is installed; then, in what time is left, all other tests, all other cases of the kernels, and what calls cost the
host.

Each step has a share of the time and gets what those before it have left over; one that fails or runs out of time does
not stop the others. The exit code says whether all passed.

`--out`, a folder of its own, is at all times worth keeping: rows are written as they come, and after each step all is
packed into `results.tar.gz`; it holds eight files at most. `gpu.csv` says how the steps ended, which tests failed, or
the last line of output; all output is in `gpu.log`. A second call with the same folder goes on with what is missing:
steps that passed are not repeated (but with `--again`), tests that passed are not, rows that are there are not. Tuned
configurations have a command of their own, `python bench/tune.py --quick`.
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
import tarfile
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, ROOT, UNFINISHED, columns, header, read_rows, write_rows
from kernels_summary import summary

SLACK = 25  # seconds between the end of a benchmark's time and its step's: starting, the last case
SHOWN = 2000  # characters of a step's output, the last ones; all are in the log
ARCHIVE = "results.tar.gz"


@dataclasses.dataclass(frozen=True)
class Step:
    """One command. It fails by exit code or by running out of time.

    Attributes:
        share: seconds of the whole that are kept for it; 0: it gets what is left.
        environment: variables set for it.
        measures: it takes `--seconds`.
        beside: a command that runs meanwhile, for as long: then nothing is timed.
    """

    name: str
    share: float
    command: list[str]
    environment: dict[str, str] = dataclasses.field(default_factory=dict)
    measures: bool = False
    beside: list[str] | None = None


def script(name: str, *args: str) -> list[str]:
    return [sys.executable, f"bench/{name}.py", *args]


def steps(out: Path, passed: Path, dry: bool) -> Iterator[Step]:
    """In the order in which they run.

    Args:
        passed: file of the names of tests that have passed.
        dry: with sizes for a CPU, all else being the same.
    """
    def pick(full: str, tiny: str) -> list[str]:
        return (tiny if dry else full).split()

    device, dtype = pick("cuda", "cpu"), pick("bfloat16", "float32")
    parallel = pick("-n 8", "-n 0") if importlib.util.find_spec("xdist") else []
    models, rows = ["--csv", f"{out}/models.csv"], ["--csv", f"{out}/kernels.csv"]
    on = ["--device", *device, "--dtype", *dtype]
    whole = ["--device", *device, "--dtypes", *dtype, "--batch-sizes", *pick("64 1", "1")]
    nets = pick("resnet50 mobilenetv2_100 vit_base_patch16_224 swin_tiny_patch4_window7_224",
                "mobilenetv2_035 test_convnext")
    size, rounds = ["--size", *pick("224", "64")], ["--rounds", *pick("50", "1")]
    tests = [sys.executable, "-m", "pytest", *parallel, "-vv", "-rfE", "--tb=short"]
    kernels = script("kernels", *rows, *pick("", "--dry-run --cases 1 --networks rtdetr_r50"))
    small = script("kernels", "--small", "--cases", "1", *pick("", "--networks rtdetr_r50"))

    yield Step("probe", 25, script("probe", "--device", *device))
    compiling = [*kernels, "--targets", "--precompile"]
    yield Step("tests of nets", 55, [*tests, "-m", "cuda and not full", "tests/test_cuda.py", *pick(
        "tests/runtime tests/detection", "")], beside=compiling)
    yield Step("a case of every kernel", 40, small, beside=compiling)

    yield Step("models", 50, script("models", *whole, *models, *size, *rounds, "--models", *nets, "--contenders",
                                    "fused", "eager"), measures=True)
    yield Step("detectors", 40, script(
        "detectors", *whole, *models, *rounds, "--size", *pick("640", "128"), "--models",
        *pick("anydepth_rtdetr_r50vd rtdetr_r50vd", "rtdetr_r18vd"), "--depths", *pick("super base", "base"),
        "--contenders", "engine", "static, eager"), measures=True)
    yield Step("compiled", 70, script(
        "models", *whole, *models, *size, *rounds, "--models", *pick("resnet50", "test_convnext"), "--depths",
        *pick("FFFF", "TTT"), "--contenders", "fused", "eager", "compiled", "max-autotune"), measures=True)

    yield Step("kernels", 100, [*kernels, "--targets"], measures=True)

    yield Step("YOLO", 50, script(
        "detectors", "--device", *device, "--dtypes", *pick("bfloat16 float16", "float32"), "--batch-sizes",
        *pick("1 8", "1"), *models, *rounds, "--size", *pick("640", "128"), "--models",
        *pick("anydepth_yolov12l anydepth_yolov12s", "anydepth_yolov12n"), "--contenders", "engine", "static, compiled",
        "engine, processed", "static, compiled, processed"), measures=True)
    yield Step("switch storm", 15, script("switch_storm", *on, *size, *rounds, "--models", *nets,
                                          "--csv", f"{out}/switch_storm.csv"))
    yield Step("a depth for each image", 15, script(
        "per_image", *on, *size, *rounds, "--batch-size", *pick("64", "4"), "--models", *nets,
        "--csv", f"{out}/per_image.csv"))
    yield Step("training step", 30, script(
        "training_step", *on, *size, "--rounds", *pick("10", "1"), "--batch-size", *pick("64", "2"), "--models",
        *pick("resnet50 swin_tiny_patch4_window7_224", "test_convnext"), "--variants", "one pass",
        "one pass, accelerated", "--csv", f"{out}/training_step.csv"))

    sanitizer = shutil.which("compute-sanitizer")
    for tool, environment in {
        # Within a block of torch's cache an access out of a tensor's bounds is none to memcheck.
        "memcheck": {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}, "racecheck": {},
    }.items():
        if sanitizer or dry:
            watched = [] if dry else [sanitizer, "--tool", tool, "--error-exitcode", "1"]
            yield Step(tool, 25, [*watched, *small, "--alone"], environment)

    # Without a GPU the interpreter runs kernels; it knows no bfloat16, and of the others -k float16 leaves one.
    yield Step("other tests", 0, [*tests, "--but", str(passed), *(
        ("-m", "launcher", "-k", "float16", "--sample", "1", "tests/kernels/test_gemm.py", "tests/kernels/test_conv.py")
        if dry else ("-m", "cuda and not full", "tests"))], {"TRITON_INTERPRET": "1"} if dry else {})
    yield Step("other kernels", 0, kernels, measures=True)
    yield Step("host cost", 0, script("host_cost", "--device", *device, *rounds))


def in_time(step: Step, left: float, kept: float) -> tuple[list[str], float]:
    """A step's command and limit, with `left` seconds of the whole, of which `kept` are shares of later steps."""
    limit = min(left, max(step.share, left - kept))
    seconds = ["--seconds", f"{max(limit - SLACK, 5):.0f}"] if step.measures else []
    return [*step.command, *seconds], limit


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


def run(step: Step, left: float, kept: float, log: Path) -> str:
    """How it ended: "passed", "failed" or "out of time"."""
    command, limit = in_time(step, left, kept)
    if limit <= 0:
        return "out of time"
    with contextlib.ExitStack() as stack:
        if step.beside:
            stack.callback(stop, start([*step.beside, "--seconds", f"{limit:.0f}"], log, step.environment))
        process = start(command, log, step.environment)
        stack.callback(stop, process)
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)  # pytest then says what has failed, a benchmark what it has not measured
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
            return "out of time"
    return {0: "passed", UNFINISHED: "out of time"}.get(code, "failed")


def tests_that(how: str, output: str) -> list[str]:
    """Names of tests that have PASSED, FAILED or ended in an ERROR, from lines of pytest as they come (`-vv`, of one
    process or several) or from its summary."""
    lines = re.findall(rf"^(?:\[gw\d+\] \[ *\d+%\] (?:{how}) (tests/.+?)|(tests/.+?) (?:{how})(?: +\[ *\d+%\])?"
                       rf"|(?:{how}) (tests/.+?)(?: - .*)?) *$", output, re.MULTILINE)
    return list(dict.fromkeys("".join(groups) for groups in lines))


def said(step: Step, output: str) -> str:
    """Which tests failed; of other steps the last line."""
    if "pytest" in step.command:
        return " ".join(tests_that("FAILED|ERROR", output))
    return (output.strip().splitlines() or [""])[-1]


def pack(out: Path) -> None:
    """All of the folder, into a file that is whole at any time."""
    part = out / f"{ARCHIVE}.part"
    with tarfile.open(part, "w:gz") as archive:
        for path in sorted(out.iterdir()):
            if path not in (part, out / ARCHIVE):
                archive.add(path, path.name)
    part.replace(out / ARCHIVE)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, metavar="DIR", help="by default in bench/results, named by the device; of "
                        "a dry run a temporary one")
    parser.add_argument("--seconds", type=float, help="time limit of the whole, by default 540, of a dry run 3600")
    parser.add_argument("--again", action="store_true", help="repeat steps that passed; rows that are there stay")
    parser.add_argument("--dry-run", action="store_true")
    args = parser.parse_args()
    if not args.dry_run and not torch.cuda.is_available():
        parser.error("no CUDA device; --dry-run needs none")
    if args.out and args.out.exists() and not args.out.is_dir():
        parser.error(f"--out {args.out} is a file; pass a folder, which need not exist")
    # Shells ignore it for what runs in the background; steps, which inherit that, are to hear when time is up.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if args.dry_run:
        os.environ |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}  # for so little, threads only wait
    with tempfile.TemporaryDirectory() as folder:
        passed = Path(folder) / "passed"
        out = args.out or (Path(folder) / "out" if args.dry_run else
                           RESULTS / torch.cuda.get_device_name().lower().replace(" ", "_"))
        out.mkdir(parents=True, exist_ok=True)
        return walk(list(steps(out.absolute(), passed, args.dry_run)), out.absolute(), passed, args)


def walk(chosen: list[Step], out: Path, passed: Path, args: argparse.Namespace) -> int:
    ends, log = out / "gpu.csv", out / "gpu.log"
    if args.again:
        for path in (ends, log):
            path.unlink(missing_ok=True)
    log.touch()
    rows: dict[str, dict[str, Any]] = {row["step"]: row for row in (read_rows(ends) if ends.exists() else [])}
    chosen = [step for step in chosen if rows.get(step.name, {}).get("result") != "passed"]
    deadline = time.monotonic() + (args.seconds or (3600 if args.dry_run else 540))
    for i, step in enumerate(chosen):
        print(f"\n=== {step.name}", flush=True)
        passed.write_text("\n".join(tests_that("PASSED", log.read_text(errors="replace"))))
        begin, size = time.monotonic(), log.stat().st_size
        how = run(step, deadline - begin, sum(later.share for later in chosen[i + 1:]), log)
        output = log.read_bytes()[size:].decode(errors="replace")
        rows[step.name] = {"step": step.name, "result": how, "seconds": f"{time.monotonic() - begin:.1f}",
                           "said": said(step, output)}
        print(f"{output[-SHOWN:]}\n=== {step.name}: {how}, {rows[step.name]['seconds']} s", flush=True)
        write_rows(ends, rows.values(), header("cpu" if args.dry_run else "cuda"))
        pack(out)
    if (out / "kernels.csv").exists():
        print(f"\n{summary(read_rows(out / 'kernels.csv'))}")
    print("\n" + columns([[row["step"], row["result"], row["seconds"], row["said"][:200]] for row in rows.values()]))
    return any(row["result"] != "passed" for row in rows.values())


if __name__ == "__main__":
    sys.exit(main())
