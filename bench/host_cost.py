"""What a call of an op costs the host, next to the same expression in aten, on tensors so small that nothing else does.

    python bench/host_cost.py --csv bench/results/host_cost_cpu.csv
    python bench/host_cost.py --device cuda

A call is checks of its arguments, dispatch (schema, autograd, device) and the op's body, its launcher. On a CPU the
launchers run too, on memory of the CPU, with nothing in place of the kernels: what is missing is Triton's own part of
each launch. Aten's op computes, which for such tensors takes little.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import itertools
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from cases import Case
from common import append_rows, columns, failure, header, write_rows
from kernels import OPS
from shapes import Block, Conv, Deformable, Layer, LayerNorm, Linear, Norm
from timing import make_inputs, set_up
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode

from adn_kernels.conv import out_shape

TINY: tuple[Layer, ...] = (
    Norm("tiny", "norm", 1, 16, 2, "relu", False), LayerNorm("tiny", "layer norm", 1, 4, 16, False),
    Conv("tiny", "1x1", 1, 16, 16, 2, 1, activation="relu"), Conv("tiny", "3x3", 1, 16, 16, 2, 3, activation="relu"),
    Conv("tiny", "depthwise", 1, 16, 16, 2, 3, groups=16, activation="relu"),
    Linear("tiny", "linear", 1, 4, 16, 16, "gelu"), Block("tiny", "bottleneck", 1, "bottleneck", 16, 16, 16, 2, 1,
                                                         "identity", "relu"),
    Deformable("tiny", "deformable attention", 1, 4, 2, 8, 2, (2, 1)),
)
FIELDS = ("op", "layer", "direction", "ops", "call_us", "checks_us", "dispatch_us", "body_us", "aten_us")


class Recorder(TorchDispatchMode):
    """Notes the calls of this package's ops."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple, dict]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "adn":
            self.calls.append((func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def without_kernels() -> Iterator[None]:
    """On a CPU: ops call their launchers, which launch nothing."""
    with contextlib.ExitStack() as stack:
        for name, module in list(sys.modules.items()):
            if name.startswith("adn_kernels."):
                for function, stub in (("on_gpu", lambda *tensors: True), ("launch", lambda *args, **options: None),
                                       ("launch_conv_cudnn", lambda x, weight, bias, *rest: x.new_empty(
                                           out_shape(x, weight, *rest[2:4])))):
                    if hasattr(module, function):
                        stack.enter_context(mock.patch.object(module, function, stub))
        yield


def microseconds(calls: Sequence[Callable[[], Any]], args: argparse.Namespace) -> list[float]:
    """Of each, the least over rounds of the mean of some calls: whatever makes it more is not its own cost. On CUDA the
    calls of a round are few enough for the queue of launches."""
    least = [float("inf")] * len(calls)
    for _ in range(args.rounds):
        for i, call in enumerate(calls):
            start = time.perf_counter()
            for _ in range(args.calls):
                call()
            least[i] = min(least[i], 1e6 * (time.perf_counter() - start) / args.calls)
            if args.device == "cuda":
                torch.cuda.synchronize()
    return least


def measure(case: Case, recorded: bool, args: argparse.Namespace) -> dict[str, Any]:
    """One row; `recorded`: by autograd."""
    inputs = [t if t is None or recorded else t.detach() for t in make_inputs(case, args.device)]
    ours, eager = case.contenders["ours"], case.contenders.get("eager", lambda *_: None)
    with torch.set_grad_enabled(recorded):
        ours(*inputs)
        with Recorder() as recorder:
            ours(*inputs)
        ops = [(OPDEFS[f"{func.namespace}::{func._opname}"], func, a, k) for func, a, k in recorder.calls]

        def bodies() -> None:
            with torch.no_grad():
                for op, _, a, k in ops:
                    op._init_fn(*a, **k)

        whole, dispatched, body, aten = microseconds([
            lambda: ours(*inputs), lambda: [func(*a, **k) for _, func, a, k in ops], bodies, lambda: eager(*inputs)],
            args)
    return {
        "op": case.op, "layer": case.layer, "direction": "forward, recorded" if recorded else next(iter(case.costs)),
        "ops": len(ops), "call_us": f"{whole:.1f}", "checks_us": f"{whole - dispatched:.1f}",
        "dispatch_us": f"{dispatched - body:.1f}", "body_us": f"{body:.1f}",
        "aten_us": f"{aten:.1f}" if "eager" in case.contenders else "",
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--calls", type=int, default=20, help="per round")
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--csv", type=Path)
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device; --device cpu needs none")
    set_up()
    x = torch.randn(16, device=args.device)
    add, = microseconds([lambda: x + x], args)
    rows = [dict.fromkeys(FIELDS, "") | {"op": "aten.add", "layer": "16 elements", "aten_us": f"{add:.1f}"}]
    if args.csv:
        write_rows(args.csv, rows, header(args.device), FIELDS)
    failed = False
    for op, layer in itertools.product(OPS, TINY):
        for case in importlib.import_module(f"bench_{op}").cases(layer, 1, torch.float32):
            for recorded in (False, True) if case.grads else (False,):
                try:
                    with contextlib.nullcontext() if args.device == "cuda" else without_kernels():
                        rows.append(measure(case, recorded, args))
                except Exception as error:
                    print(f"{case}: {failure(error)}", flush=True)
                    failed = True
                    continue
                if args.csv:
                    append_rows(args.csv, rows[-1:])
    print(columns([FIELDS, *(list(row.values()) for row in rows)]))
    return failed


if __name__ == "__main__":
    sys.exit(main())
