"""Times every op of `adn_kernels` on the layers of five networks, against eager PyTorch (cuDNN, channels last),
`torch.compile` of the same expression, and for blocks max-autotune.

    python bench/kernels.py --csv bench/results/kernels_h200.csv [--seconds 240] [--ops conv blocks]
    python bench/kernels.py --summary bench/results/kernels_h200.csv    # which targets are met, by how much
    python bench/kernels.py --dry-run                                   # without a GPU: everything but the timing
    python bench/kernels.py --small                                     # small layers, against exact results

Measured is what fits into the time, beginning with one layer of every op, direction, batch and network; what targets
speak of comes most often. Half of the time goes to comparisons with `torch.compile`, the last part to max-autotune. A
second run goes on with what is missing in the file, if device, versions and code are the same (`--fresh`: begins anew).

Each row is written as it comes; what was not measured is named too. The process that measures is a child: a kernel that
crashes it, or hangs, costs its own case. What compiles can be compiled ahead, by several processes and while the GPU
does something else (`--precompile`).
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import importlib
import math
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from cases import FORWARD, NONE_ACTIVE, Case, dtype_name
from common import RESULTS, ROOT, UNFINISHED, append_rows, failure, header, read_head, read_rows, write_rows
from kernels_summary import numel, summary
from shapes import BATCHES, NETWORKS, Deformable, Layer, layers
from timing import Dry, Gpu, Measurement, allowed, check, make_inputs, results, set_up

sys.path[:0] = [str(Path(__file__).parent / "ops"), str(ROOT / "tests" / "kernels")]

OPS = ("batch_norm", "conv", "blocks", "layer_norm", "batch_norm_eval", "linear", "deformable_attention")
FIELDS = ("op", "network", "layer", "count", "batch", "shape", "dtype", "direction", "clock", "contender", "p20_us",
          "p50_us", "p80_us", "bytes", "flops", "gb_s", "tflop_s", "bound", "fraction", "ratio", "error", "status")
UNMEASURED, CRASHED = "not measured: ", "failed: the process "  # how a status begins
# What `torch.compile` is told by the name of the contender.
MODES = {"compile": None, "max-autotune": "max-autotune-no-cudagraphs"}
SILENT_S = 120  # after which a child without a new row is taken for hung
OVERTIME_S = 15  # after the end of the time, for a case that has begun
CRASHES = 12
CRASHES_OF_OP = 2  # in one direction, after which no more of its cases are tried
RESTART = 75  # exit code of a child that has written all it measured and wants to be started again
WORKERS = min(4, os.cpu_count() or 1)
# Of the head of a result file: if one of these differs, its numbers do not belong with new ones.
SAME = ("device", "driver", "torch", "triton", "code")

Key = tuple[str, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Job:
    """A case and, of `MODES`, the opponent to be compared with; or, if that is "", all that need no compiler. They are
    apart as compiling takes long and may fail: by then the others have been written down."""

    case: Case
    opponent: str = ""

    @property
    def name(self) -> str:
        return f"{self.case.key} {self.opponent}".rstrip()

    @property
    def keys(self) -> set[Key]:
        """Of the rows that it writes, one per direction; that of ours stands for all contenders."""
        return {key_of(row) for row in unmeasured(self, "")}

    def contenders(self) -> dict[str, Any]:
        if not self.opponent:
            return dict(self.case.contenders)
        torch._dynamo.reset()  # of one code object only a few compilations are kept
        eager = self.case.contenders["eager"]
        compiled = torch.compile(eager, dynamic=False, mode=MODES[self.opponent])
        return {"ours": self.case.contenders["ours"], "eager": eager, self.opponent: compiled}


def cases_of(ops: Iterable[str], networks: Iterable[str], batch: int, dtype: torch.dtype,
             change: Callable[[Layer], Layer] = lambda layer: layer) -> Iterator[Case]:
    """The cases of ops on every layer of networks, each changed by `change` if given."""
    for op in ops:
        module = importlib.import_module(f"bench_{op}")
        for network in networks:
            for layer in layers(network):
                yield from module.cases(change(layer), batch, dtype)


def of_target(case: Case) -> bool:
    """Whether a target speaks of it: norms of large tensors, 1x1 and depthwise convolutions, blocks."""
    if case.op == "blocks":
        return case.batch == (1 if FORWARD in case.costs else 64)
    return FORWARD in case.costs and case.batch != 8 and (
        case.op in ("conv1x1", "linear", "depthwise") or (case.batch == 64 and "norm" in case.op))


def in_order(cases: Iterable[Case]) -> list[Case]:
    """First one case of every op, direction, batch and network, then more of them, those of targets most often; each
    time the one with most elements in its network."""
    groups: dict[tuple, list[Case]] = defaultdict(list)
    for case in cases:
        groups[case.op, *case.costs, case.batch, case.network].append(case)
    ranked = []
    for group in groups.values():
        group.sort(key=lambda case: -case.count * numel(case.shape))
        every = 1 if of_target(group[0]) else 4 if group[0].batch == 8 or NONE_ACTIVE in group[0].costs else 3
        ranked += [((rank * every, every), case) for rank, case in enumerate(group)]
    return [case for _, case in sorted(ranked, key=lambda pair: pair[0])]


def jobs_of(cases: Sequence[Case]) -> list[Job]:
    """For cases in order; of those compared with compiled opponents what targets speak of comes first."""
    compared = sorted((case for case in cases if "eager" in case.contenders), key=lambda case: not of_target(case))
    tuned = sorted((case for case in cases if case.autotune), key=lambda case: case.batch)
    return [*map(Job, cases), *(Job(case, "compile") for case in compared),
            *(Job(case, "max-autotune") for case in tuned)]


def shrunk(layer: Layer) -> Layer:
    """The same layer of a smaller image."""
    if isinstance(layer, Deformable):
        return dataclasses.replace(layer, queries=9, sides=(8, 4, 2))
    sizes = {"side": 8, "rows": 9}
    return dataclasses.replace(layer, **{name: min(getattr(layer, name), most) for name, most in sizes.items()
                                         if hasattr(layer, name)})


def row_of(case: Case, found: Measurement, ours: float | None, ceilings: tuple[float, float]) -> dict[str, Any]:
    """A row of the result file."""
    cost = case.costs[found.direction]
    row: dict[str, Any] = dict.fromkeys(FIELDS, "")
    row |= {"op": case.op, "network": case.network, "layer": case.layer, "count": case.count, "batch": case.batch,
            "shape": case.shape, "dtype": dtype_name(case.dtype), "direction": found.direction, "clock": found.clock,
            "contender": found.contender, "bytes": cost.bytes, "flops": cost.flops, "status": found.status}
    if found.error is not None:
        row["error"] = f"{found.error:.3g}"
    if found.us is not None:
        p20, p50, p80 = found.us
        memory_us, compute_us = 1e6 * cost.bytes / ceilings[0], 1e6 * cost.flops / ceilings[1]
        row |= {"p20_us": f"{p20:.3f}", "p50_us": f"{p50:.3f}", "p80_us": f"{p80:.3f}",
                "gb_s": f"{cost.bytes / p50 / 1e3:.1f}", "tflop_s": f"{cost.flops / p50 / 1e6:.2f}",
                "bound": "memory" if memory_us >= compute_us else "compute",
                "fraction": f"{max(memory_us, compute_us) / p50:.3f}",
                "ratio": "" if ours is None else f"{p50 / ours:.3f}"}
    return row


def measured_rows(case: Case, contenders: dict[str, Any], measure: Callable, ceilings: tuple[float, float]
                  ) -> list[dict[str, Any]]:
    found = list(measure(case, contenders))
    ours = {(m.direction, m.clock): m.us[1] for m in found if m.contender == "ours" and m.us is not None}
    return [row_of(case, m, ours.get((m.direction, m.clock)), ceilings) for m in found]


def unmeasured(job: Job, status: str) -> list[dict[str, Any]]:
    """A row for each direction of the case."""
    return [row_of(job.case, Measurement(direction, job.opponent or "all", status=status), None, (1.0, 1.0))
            for direction in job.case.costs]


def ceiling_rows(ceilings: tuple[float, float]) -> list[dict[str, Any]]:
    copy, product = (dict.fromkeys(FIELDS, "") | {"op": "ceiling", "dtype": "bfloat16", "status": "measured"}
                     for _ in range(2))
    return [copy | {"layer": "copy", "gb_s": f"{ceilings[0] / 1e9:.1f}"},
            product | {"layer": "matrix product", "tflop_s": f"{ceilings[1] / 1e12:.1f}"}]


def key_of(row: dict[str, Any]) -> Key:
    contender = "ours" if row["contender"] == "all" else row["contender"]
    return *(str(row[name]) for name in ("op", "network", "layer", "batch", "dtype", "direction")), contender


def recorded(rows: Iterable[dict[str, str]]) -> set[Key]:
    """What is not to be tried again."""
    return {key_of(row) for row in rows if not row["status"].startswith(UNMEASURED)}


def code_hash() -> str:
    """A name for what decides the numbers: the ops, their tables, how they are measured."""
    bench = Path(__file__).parent
    paths = [*(ROOT / "adn_kernels").glob("*.py"), *(ROOT / "adn_kernels").glob("tables/*.json"),
             *(bench / name for name in ("cases.py", "shapes.py", "timing.py")), *bench.glob("ops/bench_*.py")]
    return hashlib.sha256(b"".join(path.read_bytes() for path in sorted(paths))).hexdigest()[:12]


def kept_rows(path: Path, head: dict[str, str]) -> list[dict[str, str]]:
    """Those of an earlier run that this one goes on from."""
    if not path.exists():
        return []
    before = read_head(path)
    return read_rows(path) if all(before.get(name) == head[name] for name in SAME) else []


def begin(args: argparse.Namespace, jobs: list[Job], head: dict[str, str]) -> None:
    """Write the result file's head, and again what an earlier run has measured."""
    rows = [] if args.fresh else kept_rows(args.csv, head)
    if args.csv.exists() and not rows:
        args.csv.replace(args.csv.with_suffix(".old.csv"))
    if rows:
        print(f"going on with {args.csv}", flush=True)
        before = read_head(args.csv)
        head = head | {"begun": before.get("begun", before["date"])}
    keys = set().union(*(job.keys for job in jobs))
    write_rows(args.csv, (row for row in rows if key_of(row) not in keys or not row["status"].startswith(UNMEASURED)),
               head, FIELDS)


def first_of_each(cases: Iterable[Case], most: int) -> list[Case]:
    """At most so many of each op and direction."""
    counts: Counter = Counter()
    chosen = []
    for case in cases:
        counts[case.op, *case.costs] += 1
        if counts[case.op, *case.costs] <= most:
            chosen.append(case)
    return chosen


def take_turns(queues: Sequence[deque[Job]], deadline: float, do: Callable[[Job], None]) -> None:
    """Do the next of the queue that has had least time, until all are empty or the time is over."""
    spent = [0.0] * len(queues)
    while any(queues) and (start := time.monotonic()) < deadline:
        i = min((i for i, queue in enumerate(queues) if queue), key=spent.__getitem__)
        do(queues[i].popleft())
        spent[i] += time.monotonic() - start


def run(args: argparse.Namespace, jobs: list[Job], bench: Gpu | Dry, deadline: float) -> None:
    """Measure what is not yet in the file, until `time.monotonic()` says so. What is in hand stands in `<csv>.case`."""
    rows = read_rows(args.csv)
    done = recorded(rows)
    crashes = Counter((row["op"], row["direction"]) for row in rows if row["status"].startswith(CRASHED))
    ceilings = bench.ceilings()
    append_rows(args.csv, ceiling_rows(ceilings))

    def is_due(job: Job) -> bool:
        return not job.keys & done and crashes[job.case.op, next(iter(job.case.costs))] < CRASHES_OF_OP

    def measure(job: Job) -> None:
        args.csv.with_suffix(".case").write_text(job.name)
        try:
            rows = measured_rows(job.case, job.contenders(), bench.measure, ceilings)
            if job.opponent:
                rows = [row for row in rows if row["contender"] == job.opponent]
        except Exception as error:
            rows = unmeasured(job, failure(error))
        append_rows(args.csv, rows)
        for row in rows:
            if row["status"] != "measured":
                print(f"{job.name} {row['direction']} {row['contender']}: {row['status']}", flush=True)
        if bench.spoiled:
            raise SystemExit(RESTART)

    plain, compiled, tuned = (deque(job for job in jobs if job.opponent == opponent and is_due(job))
                              for opponent in ("", *MODES))
    for_tuned = min(args.autotune_seconds, (deadline - time.monotonic()) / 4)
    take_turns([plain, compiled], deadline - for_tuned, measure)
    take_turns([tuned], deadline, measure)
    take_turns([plain, compiled], deadline, measure)


def supervise(args: argparse.Namespace, jobs: list[Job]) -> None:
    """Run the child that measures, and start it again, after the case that ended it, until all is done; then write down
    what was not measured."""
    begin(args, jobs, header(args.device) | {"code": code_hash()})
    deadline, current = time.monotonic() + args.seconds, args.csv.with_suffix(".case")
    by_name = {job.name: job for job in jobs}
    child, why = None, "too many crashes"
    try:
        for _ in range(CRASHES):
            current.unlink(missing_ok=True)
            child = subprocess.Popen([sys.executable, *sys.argv, "--csv", str(args.csv), "--child", str(deadline)])
            code = wait(child, args.csv, deadline + OVERTIME_S)
            if code == 0 or time.monotonic() > deadline:
                why = "out of time"
                break
            if code == RESTART:
                continue
            job = by_name.get(current.read_text()) if current.exists() else None
            if job is None:
                why = f"the process that measures ended with code {code}"
                break
            status = CRASHED + ("hung" if code is None else f"ended with code {code}")
            print(f"{job.name}: {status}", flush=True)
            append_rows(args.csv, unmeasured(job, status))
    except KeyboardInterrupt:
        why = "interrupted"
    finally:
        if child is not None:
            child.kill()
        current.unlink(missing_ok=True)
        done = recorded(read_rows(args.csv))
        append_rows(args.csv, [row for job in jobs if not job.keys & done for row in unmeasured(job, UNMEASURED + why)])


def wait(child: subprocess.Popen, csv: Path, deadline: float) -> int | None:
    """For its end. None, and it is killed, if it writes nothing for `SILENT_S` or goes on after the deadline."""
    code, size, since = None, 0, time.monotonic()
    while code is None and time.monotonic() < min(since + SILENT_S, deadline):
        time.sleep(0.2)
        code = child.poll()
        if csv.stat().st_size != size:
            size, since = csv.stat().st_size, time.monotonic()
    if code is None:
        child.kill()
        child.wait()
    return code


def precompile() -> None:
    """Fill the caches of Triton and `torch.compile` by several processes."""
    environment = os.environ | {"TORCHINDUCTOR_COMPILE_THREADS": "1"}
    command = [sys.executable, *(arg for arg in sys.argv if arg != "--precompile"), "--worker"]
    workers = [subprocess.Popen([*command, f"{i}/{WORKERS}"], env=environment) for i in range(WORKERS)]
    for worker in workers:
        worker.wait()


def work(args: argparse.Namespace, jobs: list[Job]) -> None:
    """Run every n-th of the jobs once, but for max-autotune."""
    import torch._inductor.config

    i, n = map(int, args.worker.split("/"))
    set_up()
    # Which of its configurations is fastest is not to be found out while the GPU does something else.
    torch._inductor.config.autotune_local_cache = False

    def call(job: Job) -> None:
        try:
            results(job.contenders()[job.opponent or "ours"], make_inputs(job.case, args.device), job.case)
        except Exception as error:
            print(f"{job.name}: {failure(error)}", flush=True)
        torch.cuda.empty_cache()

    done = recorded(kept_rows(args.csv, header(args.device) | {"code": code_hash()}))
    queues = [deque([job for job in jobs if job.opponent == opponent and not job.keys & done][i::n])
              for opponent in ("", "compile")]
    take_turns(queues, time.monotonic() + args.seconds, call)


def small(args: argparse.Namespace) -> int:
    """Small layers only, each contender compared with exact results; without a GPU an op computes its reference. With
    `--alone` ours runs alone, for a sanitizer to watch."""
    set_up()
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    different = {(case.op, case.shape, *case.costs.items()): case
                 for case in cases_of(args.ops, args.networks, 2, dtype, shrunk)}
    cases = first_of_each(different.values(), args.cases)
    wrong = 0
    for case in cases:
        inputs = make_inputs(case, args.device)
        if args.alone:
            found = results(case.contenders["ours"], inputs, case)
            errors, limit = {"ours": 0.0 if all(bool(y.isfinite().all()) for y in found) else math.inf}, 0.0
        else:
            errors = check(case, case.contenders, inputs)
            eager = errors.get("eager")
            limit = allowed(case, eager if isinstance(eager, float) else None)
        for name, error in errors.items():
            if not isinstance(error, float) or error > limit:
                print(f"{case} {name}: {error!r}, allowed {limit:.2g}", flush=True)
                wrong += 1
    print(f"{len(cases)} small cases, {wrong} wrong")
    return bool(wrong)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", type=Path, help="result file; by default in bench/results, named by the device")
    parser.add_argument("--ops", nargs="+", default=OPS, choices=OPS, metavar="OP", help=" ".join(OPS))
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=NETWORKS, metavar="NETWORK",
                        help=" ".join(NETWORKS))
    parser.add_argument("--batches", nargs="+", type=int, default=BATCHES)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--seconds", type=float, default=240, help="time limit")
    parser.add_argument("--autotune-seconds", type=float, default=45, help="of it, at the end, for max-autotune")
    parser.add_argument("--fresh", action="store_true", help="do not go on with an earlier run's result file")
    parser.add_argument("--targets", action="store_true", help="only what targets speak of")
    parser.add_argument("--cases", type=int, default=sys.maxsize, help="at most so many of each op and direction")
    parser.add_argument("--dry-run", action="store_true",
                        help="without a GPU; the result file, if --csv names none, goes to a temporary folder")
    parser.add_argument("--alone", action="store_true", help="of --small: run only ours, compare with nothing")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--summary", type=Path, metavar="CSV", help="read a result file instead of measuring")
    mode.add_argument("--small", action="store_true")
    mode.add_argument("--precompile", action="store_true", help="only fill the caches of compilers")
    mode.add_argument("--child", type=float, metavar="DEADLINE", help=argparse.SUPPRESS)
    mode.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.summary:
        if not args.summary.is_file():
            parser.error(f"there is no file {args.summary}; --csv writes one")
        print(summary(read_rows(args.summary)))
        return 0
    on_gpu = torch.cuda.is_available() and not args.dry_run
    args.device = "cuda" if on_gpu else "cpu"
    if args.small:
        return small(args)
    if not on_gpu and not args.dry_run:
        parser.error("no CUDA device; --dry-run and --small need none")
    # On a CPU what compiles ahead has no time for large layers.
    change = shrunk if args.worker and args.dry_run else lambda layer: layer
    cases = in_order(case for batch in args.batches
                     for case in cases_of(args.ops, args.networks, batch, getattr(torch, args.dtype), change))
    if args.targets:
        cases = [case for case in cases if of_target(case) or NONE_ACTIVE in case.costs]
    jobs = jobs_of(first_of_each(cases, args.cases))
    with tempfile.TemporaryDirectory() as folder:
        name = torch.cuda.get_device_name().lower().replace(" ", "_") if on_gpu else "none"
        args.csv = (args.csv or (RESULTS if on_gpu else Path(folder)) / f"kernels_{name}.csv").absolute()
        if args.worker:
            work(args, jobs)
        elif args.precompile:
            precompile()
        elif args.child:
            run(args, jobs, dry() if args.dry_run else Gpu(), args.child)
        else:
            return measure(args, jobs)
    return 0


def measure(args: argparse.Namespace, jobs: list[Job]) -> int:
    """The exit code."""
    supervise(args, jobs)
    rows = read_rows(args.csv)
    print(summary(rows))
    failed = [row for row in rows if row["contender"] in ("ours", "all")
              and row["status"].startswith(("failed", "wrong"))]
    print(f"{len(jobs)} jobs, {len(rows)} rows, {len(failed)} failed")
    unfinished = any(row["status"].startswith(UNMEASURED) for row in rows)
    return 1 if failed else UNFINISHED if unfinished else 0


def dry() -> Dry:
    import aot

    return Dry(aot.record, aot.fake_cuda)


if __name__ == "__main__":
    sys.exit(main())
