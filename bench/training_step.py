"""One training step of self-distillation: super-net and base-net in one pass against two.

A step is forwards, backwards and the optimizer's update. Each variant has a net of its own; their steps are
interleaved, in an order drawn anew each round, and the ratio is the median over rounds of that to the eager two-pass
step of the same round. Accelerated nets run fused kernels on a GPU only.

    python bench/training_step.py                       # CPU: ResNet-18
    python bench/training_step.py --device cuda --csv bench/results/training_step_gpu.csv
"""

from __future__ import annotations

import argparse
import copy
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import timm
import torch
from common import Results, columns

import adn

# Name: (one pass, accelerated, compiled). The first is what the others are compared with.
VARIANTS = {
    "two passes": (False, False, False),
    "one pass": (True, False, False),
    "one pass, accelerated": (True, True, False),
    "one pass, accelerated, compiled": (True, True, True),
    "one pass, compiled": (True, False, True),
}
KEY = ("model", "size", "batch", "dtype", "variant")
CPU = {"models": ["resnet18"], "size": 64, "batch_size": 16, "variants": ["one pass"], "dtype": "float32"}
CUDA = {"models": ["resnet50", "vit_base_patch16_224", "swin_tiny_patch4_window7_224"], "size": 224, "batch_size": 64,
        "variants": list(VARIANTS)[1:], "dtype": "bfloat16"}


def a_step(net: torch.nn.Module, variant: str, x: torch.Tensor, y: torch.Tensor, dtype: torch.dtype
           ) -> Callable[[], None]:
    """A training step of a copy of the net."""
    single_pass, accelerated, compiled = VARIANTS[variant]
    net = copy.deepcopy(net)
    if accelerated:
        adn.accelerate(net)
    if compiled:
        adn.compile(net)
    kd = adn.SelfDistillation(net, single_pass=single_pass)
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(x.device.type, dtype, dtype != torch.float32):
            kd.backward(x, y)
        optimizer.step()

    return step


def measure(steps: list[Callable[[], None]], device: torch.device, rounds: int) -> tuple[np.ndarray, list[float]]:
    """Milliseconds, (steps, rounds); and what each step allocates at its peak, in MiB, 0 on a CPU."""
    peaks = []
    for step in steps:
        for _ in range(3):  # the first compiles, the second makes the optimizer's state
            step()
        peaks.append(_peak(step) if device.type == "cuda" else 0.0)
    times = np.empty((len(steps), rounds))
    order = random.Random(0)
    for i in range(rounds):
        for k in order.sample(range(len(steps)), len(steps)):
            start = _now(device)
            steps[k]()
            times[k, i] = (_now(device) - start) * 1e3
    return times, peaks


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def _peak(step: Callable[[], None]) -> float:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--models", nargs="+")
    parser.add_argument("--size", type=int, help="side of the images")
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="of autocast")
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS)[1:], help="beside two passes")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--csv", type=Path)
    parser.set_defaults(**(CUDA if torch.device(parser.parse_known_args()[0].device).type == "cuda" else CPU))
    args = parser.parse_args()
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    variants = [next(iter(VARIANTS)), *args.variants]
    results = Results(args.csv, KEY, device)
    for name in args.models:
        key = name, args.size, args.batch_size, args.dtype
        if not results.lacks(*((*key, variant) for variant in variants)):
            continue
        with results.attempt(name):
            sized = {"img_size": args.size} if name.startswith(("vit", "deit", "swin")) else {}
            net = adn.convert(timm.create_model(name, **sized)).train().to(device)
            x = torch.randn(args.batch_size, 3, args.size, args.size, device=device)
            if device.type == "cuda":
                net, x = (t.to(memory_format=torch.channels_last) for t in (net, x))
            y = torch.randint(0, 1000, (args.batch_size,), device=device)
            times, peaks = measure([a_step(net, variant, x, y, dtype) for variant in variants], device, args.rounds)
            for variant, ms, peak in zip(variants, times, peaks, strict=True):
                row = dict(zip(KEY, (*key, variant))) | {
                    "step_ms": round(np.median(ms), 2), "ratio": round(np.median(ms / times[0]), 3),
                    "peak_mib": round(peak)}
                results.add(row)
                print(columns([list(row.values())]), flush=True)
    if results.rows:
        print(columns([list(results.rows[0]), *(list(row.values()) for row in results.rows)]))
    return results.code


if __name__ == "__main__":
    sys.exit(main())
