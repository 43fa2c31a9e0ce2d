"""Show the method: 1,797 real handwritten digits, one net, sixteen depths.

A ResNet-18 from timm is converted, trained by self-distillation between its
deepest and its shallowest self, and then evaluated and timed at all of its
sixteen depths, fourteen of which it was never trained at. No download; under a
minute on two cores.

Writes to the folder --out:
  model.safetensors   the net; adn eval, predict and profile read it, adn.load too
  depths.csv          the table
  depths.png          the figure
  log.csv, last.pt    the training run

examples:
  adn demo
  adn demo --compare               also train the two extreme networks separately
  adn demo --seed 3 --out runs/3
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=Path("adn-demo"), metavar="DIR",
                        help="where the results go (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same accuracies (default: 0)")
    parser.add_argument("--compare", action="store_true",
                        help="train the full and the base network separately too, by the same recipe")
    parser.add_argument("--epochs", type=int, default=None, help=argparse.SUPPRESS)


def run(args: argparse.Namespace) -> int:
    from .. import demo

    start = time.perf_counter()
    print("1,437 digits to learn from, 360 held out; ResNet-18 with 4 stages to switch, 16 depths", flush=True)
    settings = {} if args.epochs is None else {"epochs": args.epochs}
    result = demo.run(args.out, seed=args.seed, compare=args.compare, **settings)
    print(f"\naccuracy on the held-out digits, and time of one image on {result.profile.machine['device']}"
          f" ({result.profile.machine['threads']} threads):\n")
    print(result.profile)
    if result.separate:
        print()
        # All depths, counted in binary: the super-net is first and the base-net last.
        for point, (which, alone) in zip((result.profile[0], result.profile[-1]), result.separate.items(), strict=True):
            print(f"{which}-net {point.depth}: {point.top1:.2f} %, trained separately: {alone:.2f} %")
    worst = min(result.profile, key=lambda point: point.top1)
    print(f"\nevery depth is right on at least {worst.top1:.2f} % ({worst.depth}); {time.perf_counter() - start:.0f} s")
    print(f"written: {args.out / 'model.safetensors'}, depths.csv, depths.png")
    print(f"next:    adn profile --checkpoint {args.out / 'model.safetensors'} --budget 2")
    return 0
