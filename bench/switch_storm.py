"""What it costs to change depth: an engine of a deploy form at a random depth on every call, against a fixed depth.

A latency is what the caller waits: from the call until the result is there. In every round each depth is called several
times in both ways: among calls at all other depths in random order (storm), and in a row after one call that is not
counted (fixed). Nothing is captured meanwhile, or the run fails.

    python bench/switch_storm.py --csv bench/results/switch_storm_cpu.csv
    python bench/switch_storm.py --device cuda --size 224 --dtype bfloat16 --rounds 200 --models resnet50
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from pathlib import Path

import numpy as np
import timm
import torch
from common import Results, columns
from tqdm import tqdm

import adn
from adn.measure.accuracy import choose_depths

KEY = ("model", "dtype", "batch", "size", "depth")
IN_A_ROW = 5  # counted calls of a depth in a round, in either way


def latency(engine: adn.Engine, x: torch.Tensor, depth: adn.Depth) -> float:
    """Milliseconds."""
    start = time.perf_counter()
    engine(x, depth=depth)
    if x.is_cuda:
        torch.cuda.synchronize()
    return (time.perf_counter() - start) * 1e3


def measure(engine: adn.Engine, x: torch.Tensor, depths: list[adn.Depth], rounds: int) -> dict[str, np.ndarray]:
    """Milliseconds by "storm" and "fixed", (depths, calls)."""
    times: dict[str, list[list[float]]] = {way: [[] for _ in depths] for way in ("storm", "fixed")}
    order = random.Random(0)
    for _ in tqdm(range(rounds), leave=False, disable=None):
        for i in order.sample(range(len(depths)), len(depths)):
            latency(engine, x, depths[i])
            times["fixed"][i] += [latency(engine, x, depths[i]) for _ in range(IN_A_ROW)]
        calls = [i for i in range(len(depths)) for _ in range(IN_A_ROW)]
        order.shuffle(calls)
        for i in calls:
            times["storm"][i].append(latency(engine, x, depths[i]))
    return {way: np.array(per_depth) for way, per_depth in times.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["resnet18"])
    parser.add_argument("--size", type=int, default=64, help="side of the images")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--depths", default="chain", help='"all", "chain", or depths with commas between them')
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--csv", type=Path)
    args = parser.parse_args()
    results = Results(args.csv, KEY, args.device)
    for name in args.models:
        with results.attempt(name):
            dtype = getattr(torch, args.dtype)
            net = adn.convert(timm.create_model(name)).eval().to(args.device, dtype, memory_format=torch.channels_last)
            depths = choose_depths(net, args.depths)
            key = name, args.dtype, args.batch_size, args.size
            if not results.lacks(*((*key, depth) for depth in depths)):
                continue
            x = torch.randn(args.batch_size, 3, args.size, args.size, device=args.device, dtype=dtype)
            engine = adn.Engine(adn.fuse(net))
            engine.warm(x, depths=depths)
            captured = engine.info()["captures"]
            times = measure(engine, x, depths, args.rounds)
            if engine.info()["captures"] != captured:
                raise RuntimeError("a depth was captured while calls were timed")
            print(engine)
            for i, depth in enumerate(depths):
                row = dict(zip(KEY, (*key, str(depth)))) | {"calls": times["storm"].shape[1]}
                for percentile in (50, 99):
                    storm, fixed = (np.percentile(times[way][i], percentile) for way in ("storm", "fixed"))
                    row |= {f"fixed_p{percentile}_ms": round(fixed, 4), f"storm_p{percentile}_ms": round(storm, 4),
                            f"p{percentile}_ratio": round(storm / fixed, 4)}
                results.add(row)
    if results.rows:
        print(columns([list(results.rows[0]), *(list(row.values()) for row in results.rows)]))
        for percentile in (50, 99):
            ratios = [float(row[f"p{percentile}_ratio"]) for row in results.rows]
            print(f"p{percentile}, storm / fixed: median {np.median(ratios):.4f}, highest {max(ratios):.4f}")
    return results.code


if __name__ == "__main__":
    sys.exit(main())
