"""Show the method on real handwritten digits: one net, many depths. No download.

  --task classify   a ResNet-18 from timm, sixteen depths, 1,797 digits; under a
                    minute on two cores
  --task detect     an any-depth YOLO, 256 depths of which nine are shown, on
                    scenes of these digits; some four minutes on two cores

A net is trained by self-distillation between its deepest and its shallowest
self, and then evaluated and timed at depths of which it was trained at two.

Writes to the folder --out:
  model.safetensors   the net; adn eval, predict or detect, and profile read it,
                      adn.load too
  depths.csv          the table
  depths.png          the figure
  detections.png      of a detector: what super-net and base-net find
  log.csv, last.pt    the training run

examples:
  adn demo
  adn demo --compare               also train the two extreme networks separately
  adn demo --seed 3 --out runs/3
  adn demo --task detect
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--task", choices=("classify", "detect"), default="classify", help="default: %(default)s")
    parser.add_argument("--out", type=Path, metavar="DIR",
                        help="where the results go (default: adn-demo, to detect adn-demo-detect)")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same accuracies (default: 0)")
    parser.add_argument("--compare", action="store_true",
                        help="train the full and the base network separately too, by the same recipe")
    parser.add_argument("--epochs", type=int, default=None, help=argparse.SUPPRESS)


def run(args: argparse.Namespace) -> int:
    from ..demo import digits, scenes

    start = time.perf_counter()
    out = args.out or Path("adn-demo" if args.task == "classify" else "adn-demo-detect")
    settings = {} if args.epochs is None else {"epochs": args.epochs}
    if args.task == "classify":
        demo, unit, held_out, pictures = digits, "%", "digits", ""
        print("1,437 digits to learn from, 360 held out; ResNet-18 with 4 stages to switch, 16 depths", flush=True)
    else:
        demo, unit, held_out, pictures = scenes, "AP", "scenes", ", detections.png"
        print(f"{scenes.IMAGES:,} scenes to learn from, {scenes.HELD_OUT} held out; YOLOv12 with 8 stages to switch, "
              "256 depths", flush=True)
    result = demo.run(out, seed=args.seed, compare=args.compare, **settings)
    machine = result.profile.machine
    print(f"\naccuracy on the held-out {held_out}, and time of one image on {machine['device']} ({machine['threads']} "
          "threads):\n")
    print(result.profile)
    if result.separate:
        print()
        # The super-net is first and the base-net last.
        for point, (which, alone) in zip((result.profile[0], result.profile[-1]), result.separate.items(), strict=True):
            print(f"{which}-net {point.depth}: {point.top1:.2f} {unit}, trained separately: {alone:.2f} {unit}")
    worst = min(result.profile, key=lambda point: point.top1)
    print(f"\nevery depth has at least {worst.top1:.2f} {unit} ({worst.depth}); {time.perf_counter() - start:.0f} s")
    print(f"written: {out / 'model.safetensors'}, depths.csv, depths.png{pictures}")
    middle = result.profile[len(result.profile) // 2].p50_ms
    print(f"next:    adn profile --checkpoint {out / 'model.safetensors'} --budget {math.ceil(10 * middle) / 10}")
    return 0
