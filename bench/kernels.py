"""Times every op of `adn_kernels` on the layers of five networks, against eager PyTorch (cuDNN, channels last),
`torch.compile` of the same expression, and for blocks max-autotune.

    python bench/kernels.py --csv bench/results/kernels_h200.csv [--seconds 240] [--ops conv1x1 blocks]
    python bench/kernels.py --summary bench/results/kernels_h200.csv    # which targets are met, by how much
    python bench/kernels.py --dry-run                                   # without a GPU: everything but the timing
    python bench/kernels.py --small                                     # small layers, for sanitizers

Measured is what fits into the time, in this order: ops in turns; of an op, batch 64 and 1 before 8, networks in turns;
of a network the layers that move most first. `torch.compile` is slow to compile, so only the first cases have it for an
opponent. Each row is written as it comes; what was not measured is named too. The process that measures is a child: a
kernel that crashes it, or hangs, costs its own case.

What compiles can be compiled ahead, by several processes and while the GPU does something else (`--precompile`).
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import itertools
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from cases import FORWARD, Case, dtype_name
from common import RESULTS, ROOT, append_rows, header, read_rows, write_rows
from kernels_summary import summary
from shapes import BATCHES, NETWORKS, Layer, layers
from timing import Dry, Gpu, Measurement, allowed, check, make_inputs, results, set_up

sys.path[:0] = [str(Path(__file__).parent / "ops"), str(ROOT / "tests" / "kernels")]

OPS = ("batch_norm", "conv1x1", "blocks", "depthwise", "layer_norm", "conv3x3", "batch_norm_eval", "conv",
       "distillation_kl")
FIELDS = ("op", "network", "layer", "count", "batch", "shape", "dtype", "direction", "clock", "contender", "p20_us",
          "p50_us", "p80_us", "bytes", "flops", "gb_s", "tflop_s", "bound", "fraction", "ratio", "error", "status")
SILENT_S = 120  # after which a child without a new row is taken for hung
CRASHES = 8


def cases_of(ops: Iterable[str], networks: Iterable[str], batch: int, dtype: torch.dtype,
             change: Callable[[Layer], Layer] = lambda layer: layer) -> Iterator[Case]:
    """The cases of ops on every layer of networks, each changed by `change` if given."""
    for op in ops:
        module = importlib.import_module(f"bench_{op}")
        for network in networks:
            for layer in layers(network):
                yield from module.cases(change(layer), batch, dtype)


def in_turns(lists: Iterable[Sequence[Any]]) -> list[Any]:
    """The first of each, then the second of each, ..."""
    return [item for step in itertools.zip_longest(*lists) for item in step if item is not None]


def in_order(cases: Iterable[Case]) -> list[Case]:
    """The most informative first, see the top of this file."""
    by_op: dict[str, dict[bool, dict[tuple, list[Case]]]] = defaultdict(lambda: {False: {}, True: {}})
    for case in cases:
        groups = by_op[case.op][case.batch == 8]
        groups.setdefault((-case.batch, tuple(case.costs), case.network), []).append(case)
    ordered = []
    for halves in by_op.values():
        queue = []
        for groups in halves.values():
            for group in groups.values():
                group.sort(key=lambda case: -case.count * max(cost.bytes for cost in case.costs.values()))
            queue += in_turns(groups[key] for key in sorted(groups, key=lambda key: key[0]))
        ordered.append(queue)
    return in_turns(ordered)


def shrunk(layer: Layer) -> Layer:
    """The same layer of a smaller image."""
    sizes = {"side": 8, "rows": 9}
    return dataclasses.replace(layer, **{name: min(getattr(layer, name), most) for name, most in sizes.items()
                                         if hasattr(layer, name)})


def opponent(case: Case, name: str) -> Any:
    """The case's eager expression, compiled."""
    torch._dynamo.reset()  # of one code object only a few compilations are kept
    mode = {"compile": None, "max-autotune": "max-autotune-no-cudagraphs"}[name]
    return torch.compile(case.contenders["eager"], dynamic=False, mode=mode)


def compiled_cases(cases: Sequence[Case], count: int) -> list[Case]:
    """Those compared with `torch.compile`: the first ones that have an eager expression; not of batch 8."""
    return [case for case in cases if FORWARD in case.costs and case.batch != 8][:count]


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


def unmeasured(case: Case, contender: str, status: str) -> list[dict[str, Any]]:
    """A row for each direction of the case."""
    return [row_of(case, Measurement(direction, contender, status=status), None, (1.0, 1.0))
            for direction in case.costs]


def ceiling_rows(ceilings: tuple[float, float]) -> list[dict[str, Any]]:
    copy, product = (dict.fromkeys(FIELDS, "") | {"op": "ceiling", "dtype": "bfloat16", "status": "measured"}
                     for _ in range(2))
    return [copy | {"layer": "copy", "gb_s": f"{ceilings[0] / 1e9:.1f}"},
            product | {"layer": "matrix product", "tflop_s": f"{ceilings[1] / 1e12:.1f}"}]


def seen(path: Path) -> set[tuple[str, ...]]:
    return {key for row in read_rows(path) if row["op"] != "ceiling" for key in [_key(row)]}


def _key(row: dict[str, Any]) -> tuple[str, ...]:
    return tuple(str(row[name]) for name in ("op", "network", "layer", "batch", "dtype", "direction"))


def is_in(case: Case, keys: set[tuple[str, ...]]) -> bool:
    return any(_key(row) in keys for row in unmeasured(case, "", ""))


def run(args: argparse.Namespace, cases: list[Case], bench: Gpu | Dry) -> None:
    """Measure what is not yet in the file, until the time is over. What is being measured stands in `<csv>.case`."""
    ceilings = bench.ceilings()
    done, deadline = seen(args.csv), time.monotonic() + args.seconds
    if not done:
        append_rows(args.csv, ceiling_rows(ceilings))
    to_compile = set(map(id, compiled_cases(cases, args.compiled)))
    to_tune = set(map(id, [case for case in cases if case.autotune and case.batch != 8][:args.autotuned]))
    compiling, late = 0.0, "not measured: out of time"
    for case in cases:
        if is_in(case, done):
            continue
        if time.monotonic() > deadline:
            append_rows(args.csv, unmeasured(case, "all", late))
            continue
        args.csv.with_suffix(".case").write_text(case.key)
        start, contenders, rows = time.monotonic(), dict(case.contenders), []
        if "eager" in contenders:
            if id(case) not in to_compile:
                rows += unmeasured(case, "compile", "not measured: not one of the cases chosen")
            elif compiling > args.seconds / 2:
                rows += unmeasured(case, "compile", late)
            else:
                contenders["compile"] = opponent(case, "compile")
        if id(case) in to_tune:
            if deadline - start > 60:
                contenders["max-autotune"] = opponent(case, "max-autotune")
            else:
                rows += unmeasured(case, "max-autotune", late)
        try:
            rows = measured_rows(case, contenders, bench.measure, ceilings) + rows
        except torch.AcceleratorError:  # nothing works after it in this process
            raise
        except Exception as error:
            traceback.print_exc()
            rows += unmeasured(case, "all", f"failed: {type(error).__name__}: {' '.join(str(error).split())[:200]}")
        if "compile" in contenders:
            compiling += time.monotonic() - start
        append_rows(args.csv, rows)
        for row in rows:
            if row["status"] != "measured" and not row["status"].startswith("not"):
                print(f"{case} {row['direction']} {row['contender']}: {row['status']}", flush=True)


def supervise(args: argparse.Namespace, cases: list[Case]) -> None:
    """Run the child that measures, and start it again, after the case that ended it, until all is done."""
    write_rows(args.csv, [], header("cuda"), FIELDS)
    deadline, current = time.monotonic() + args.seconds, args.csv.with_suffix(".case")
    by_key = {case.key: case for case in cases}
    for _ in range(CRASHES):
        command = [sys.executable, *sys.argv, "--csv", str(args.csv), "--child", "--seconds",
                   str(deadline - time.monotonic())]
        child = subprocess.Popen(command)
        code, size, since = None, 0, time.monotonic()
        while code is None and time.monotonic() - since < SILENT_S and time.monotonic() < deadline + SILENT_S:
            time.sleep(0.2)
            code = child.poll()
            if args.csv.stat().st_size != size:
                size, since = args.csv.stat().st_size, time.monotonic()
        if code == 0:
            break
        child.kill()
        child.wait()
        case = by_key.get(current.read_text()) if current.exists() else None
        if case is None:
            raise SystemExit(f"the process that measures ended with code {code} before the first case")
        status = "failed: hung" if code is None else f"failed: ended its process with code {code}"
        print(f"{case}: {status}", flush=True)
        append_rows(args.csv, unmeasured(case, "all", status))
    current.unlink(missing_ok=True)


def precompile() -> None:
    """Fill the caches of `torch.compile` by several processes."""
    count = min(8, max(1, (os.cpu_count() or 1) // 2))
    environment = os.environ | {"TORCHINDUCTOR_COMPILE_THREADS": "1"}
    command = [sys.executable, *(arg for arg in sys.argv if arg != "--precompile"), "--worker"]
    workers = [subprocess.Popen([*command, f"{i}/{count}"], env=environment) for i in range(count)]
    for worker in workers:
        worker.wait()


def work(args: argparse.Namespace, cases: list[Case]) -> None:
    """Compile every n-th of the cases compared with `torch.compile`."""
    i, n = map(int, args.worker.split("/"))
    deadline = time.monotonic() + args.seconds
    set_up()
    for case in compiled_cases(cases, args.compiled)[i::n]:
        if time.monotonic() > deadline:
            break
        results(opponent(case, "compile"), make_inputs(case), case)


def small(args: argparse.Namespace, device: str) -> int:
    """Small layers only. Without a GPU, ops (which then compute their references) and eager expressions are compared
    with exact results; on a GPU ours runs alone, for a sanitizer to watch."""
    set_up()
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    wrong = done = 0
    known: dict[tuple, int] = defaultdict(int)
    for case in cases_of(args.ops, args.networks, 2, dtype, shrunk):
        kind, key = (case.op, *case.costs), (case.op, case.shape, *case.costs.items())
        if known[key] or (args.cases and known[kind] >= args.cases):
            continue
        known[key] += 1
        known[kind] += 1
        inputs = make_inputs(case, device)
        if device == "cuda":
            found = results(case.contenders["ours"], inputs, case)
            errors, limit = {"ours": 0.0 if all(bool(y.isfinite().all()) for y in found) else float("inf")}, 0.0
        else:
            errors = check(case, {name: f for name, f in case.contenders.items() if name != "cudnn"}, inputs)
            eager = errors.get("eager")
            limit = allowed(case, eager if isinstance(eager, float) else None)
        for name, error in errors.items():
            if not isinstance(error, float) or error > limit:
                print(f"{case} {name}: {error!r}, allowed {limit:.2g}")
                wrong += 1
        done += 1
    print(f"{done} small cases, {wrong} wrong")
    return bool(wrong)


def dry_run(args: argparse.Namespace, cases: list[Case]) -> int:
    """Everything but the timing, without a GPU: see `Dry` and `small`; the result file goes to a temporary folder."""
    import aot

    if args.cases:
        chosen = defaultdict(list)
        for case in cases:
            chosen[case.op, tuple(case.costs)].append(case)
        cases = [case for group in chosen.values() for case in group[:args.cases]]
    with tempfile.TemporaryDirectory() as folder:
        args.csv, args.compiled, args.seconds = args.csv or Path(folder) / "kernels.csv", 0, float("inf")
        write_rows(args.csv, [], header(), FIELDS)
        run(args, cases, Dry(aot.record, aot.fake_cuda))
        args.csv.with_suffix(".case").unlink(missing_ok=True)
        rows = read_rows(args.csv)
        print(summary(rows))
    failed = [row for row in rows if row["status"].startswith("failed")]
    print(f"{len(cases)} cases, {len(rows)} rows, {len(failed)} failed")
    return small(args, "cpu") or bool(failed)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", type=Path, help="result file; by default in bench/results, named by the device")
    parser.add_argument("--ops", nargs="+", default=OPS, choices=OPS, metavar="OP", help=" ".join(OPS))
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=NETWORKS, metavar="NETWORK",
                        help=" ".join(NETWORKS))
    parser.add_argument("--batches", nargs="+", type=int, default=BATCHES)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--seconds", type=float, default=240, help="time limit; a case that has begun is finished")
    parser.add_argument("--compiled", type=int, default=100, help="cases to compare with torch.compile")
    parser.add_argument("--autotuned", type=int, default=3, help="blocks to compare with max-autotune")
    parser.add_argument("--cases", type=int, help="of --dry-run and --small: at most so many per op")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--summary", type=Path, metavar="CSV", help="read a result file instead of measuring")
    mode.add_argument("--dry-run", action="store_true")
    mode.add_argument("--small", action="store_true")
    mode.add_argument("--precompile", action="store_true", help="only fill the caches of torch.compile")
    mode.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    mode.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.summary:
        print(summary(read_rows(args.summary)))
        return 0
    dtype = getattr(torch, args.dtype)
    if args.small:
        return small(args, "cuda" if torch.cuda.is_available() else "cpu")
    cases = in_order(case for batch in args.batches for case in cases_of(args.ops, args.networks, batch, dtype))
    if args.dry_run:
        return dry_run(args, cases)
    if not torch.cuda.is_available():
        parser.error("no CUDA device; --dry-run and --small need none")
    if args.worker:
        work(args, cases)
    elif args.precompile:
        precompile()
    elif args.child:
        run(args, cases, Gpu())
    else:
        name = torch.cuda.get_device_name().lower().replace(" ", "_")
        args.csv = (args.csv or RESULTS / f"kernels_{name}.csv").absolute()
        supervise(args, cases)
        rows = read_rows(args.csv)
        print(summary(rows))
        return any(row["status"].startswith(("failed", "wrong")) for row in rows if row["contender"] in ("ours", "all"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
