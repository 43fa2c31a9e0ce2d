"""Show the method on real handwritten digits: one net, many depths. No download.

  --task classify   a ResNet-18 from timm, sixteen depths, 1,797 digits; under a
                    minute on two cores
  --task detect     an any-depth YOLO, 256 depths of which nine are shown, on
                    scenes of these digits; some four minutes on two cores
  --task route      depth chosen by the input: half of the digits are under
                    clutter, and a small router chooses which run deep

A net is trained by self-distillation between its deepest and its shallowest
self, and then evaluated and timed at depths of which it was trained at two.

Writes to the folder --out:
  model.safetensors   the net; adn eval, predict or detect, and profile read it,
                      adn.load too
  depths.csv          the table
  depths.png          the figure
  detections.png      of a detector: what super-net and base-net find
  routed.safetensors, routing.csv, routing.png, routes.png
                      of routing, in place of the table and the figure: net
                      with router, accuracy against mean cost, what runs deep
  log.csv, last.pt    the training run

examples:
  adn demo
  adn demo --compare               also train the two extreme networks separately
  adn demo --seed 3 --out runs/3
  adn demo --task detect
  adn demo --task route
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--task", choices=("classify", "detect", "route"), default="classify",
                        help="default: %(default)s")
    parser.add_argument("--out", type=Path, metavar="DIR",
                        help="where the results go (default: adn-demo, or adn-demo-TASK)")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same accuracies (default: 0)")
    parser.add_argument("--compare", action="store_true",
                        help="train the full and the base network separately too, by the same recipe")
    parser.add_argument("--epochs", type=int, default=None, help=argparse.SUPPRESS)


def run(args: argparse.Namespace) -> int:
    from ..demo import digits, scenes

    start = time.perf_counter()
    out = args.out or Path("adn-demo" if args.task == "classify" else f"adn-demo-{args.task}")
    settings = {} if args.epochs is None else {"epochs": args.epochs}
    if args.task == "route":
        if args.compare:
            raise ValueError("--compare trains the extremes separately, which says nothing of routing: leave it out")
        _route(out, args.seed, settings)
        print(f"{time.perf_counter() - start:.0f} s")
        return 0
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


def _route(out: Path, seed: int, settings: dict[str, int]) -> None:
    from ..demo import routes
    from ..routing.fit import at_cost, gains_table

    print(f"{1437 - routes.FOR_ROUTER} digits for a ResNet-18 to learn from, {routes.FOR_ROUTER} for its router, 360 "
          f"held out, in {routes.VERSIONS} versions each; {routes.CLUTTERED:.0%} of all under clutter", flush=True)
    result = routes.run(out, seed=seed, **settings)
    shallow, deep = result.routed.depths
    print(f"\naccuracy on the held-out digits, by the share of images that run at {deep}, the others at {shallow}:\n")
    print(gains_table(result.gains, "MMACs"))
    half = next(row for row in result.gains if row.share == 0.5)
    fixed = at_cost([*result.depths.values()], half.cost)
    print(f"\nof the images that run deep {result.cluttered:.0f} % have clutter, where half of all are to")
    print(f"at {half.cost:.3g} MMACs: router {half.routed:.2f} %, as many at random {half.random:.2f} %, best single "
          f"depth {fixed:.2f} %")
    print(f"written: {out / 'routed.safetensors'}, routing.csv, routing.png, routes.png")
    print(f"next:    adn route threshold {out / 'routed.safetensors'} --share 0.3")
