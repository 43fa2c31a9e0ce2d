"""What it costs to be any-depth: a converted net at a fixed depth against the static network extracted from it.

Both run the same operations; the difference is the Python that looks the depth up. Forwards of the two are
interleaved, in an order drawn anew each round, and the ratio is that of the medians.

    python bench/conversion_overhead.py --csv bench/results/conversion_overhead_cpu.csv
"""

from __future__ import annotations

import argparse
import random
import time
from pathlib import Path

import numpy as np
import timm
import torch
from common import columns, header, write_rows

import adn

MODELS = ("resnet18", "resnet50", "mobilenetv2_100", "efficientnet_b0", "vit_tiny_patch16_224",
          "swin_tiny_patch4_window7_224", "convnext_atto")


def measure(nets: list[torch.nn.Module], x: torch.Tensor, rounds: int) -> np.ndarray:
    """Milliseconds, (nets, rounds)."""
    times = np.empty((len(nets), rounds))
    order = random.Random(0)
    with torch.inference_mode():
        for step in range(-5, rounds):
            for i in order.sample(range(len(nets)), len(nets)):
                if x.is_cuda:
                    torch.cuda.synchronize()
                start = time.perf_counter()
                nets[i](x)
                if x.is_cuda:
                    torch.cuda.synchronize()
                if step >= 0:
                    times[i, step] = (time.perf_counter() - start) * 1e3
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--size", type=int, default=224, help="side of the images")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--csv", type=Path)
    args = parser.parse_args()
    rows = []
    for name in args.models:
        net = adn.convert(timm.create_model(name)).eval().to(args.device)
        x = torch.randn(args.batch_size, 3, args.size, args.size, device=args.device)
        for depth in ("super", "base"):
            adn.set_depth(net, depth)
            static = adn.extract(net)
            times = measure([net, static], x, args.rounds)
            median = np.median(times, axis=1)
            rows.append({"model": name, "depth": str(adn.get_depth(net)), "batch": args.batch_size,
                         "any_depth_ms": round(median[0], 4), "static_ms": round(median[1], 4),
                         "ratio": round(median[0] / median[1], 4)})
            print(columns([list(rows[-1].values())]), flush=True)
    print(columns([list(rows[0]), *(list(row.values()) for row in rows)]))
    print(f"median ratio {np.median([row['ratio'] for row in rows]):.4f}, "
          f"highest {max(row['ratio'] for row in rows):.4f}")
    if args.csv:
        write_rows(args.csv, rows, header(args.device))


if __name__ == "__main__":
    main()
