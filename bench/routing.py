"""A router on an any-depth ResNet for CIFAR-10: accuracy at the mean cost of 25, 50 and 75 % deep images.

Against as many deep images drawn at random, and the best single depth that costs no more. The net is trained as by
`bench/cifar10.py`, small, on 30,000 images; routers on other ones (`--router-images`), as on those that a net has
learnt by heart its losses say little; all of it is measured on the test images. Costs are multiply-adds, of routes
with the router's. Thresholds are chosen on held-out images of the router.

    python bench/routing.py --data DIR --csv bench/results/routing_cifar10_cpu.csv
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from pathlib import Path

import numpy as np
import torch
from cifar10 import OPTIMIZERS, Images, resnet18, top1
from common import columns, header, write_rows
from torch import nn

import adn
from adn.measure.cost import count_macs
from adn.routing import AdvantageRouter, ImageRouter, RoutedNet
from adn.routing.fit import Guesses, at_cost, collect, fit_router, gains, scores_of
from adn.train import Recipe, fit

SHARES = (0.25, 0.5, 0.75)


def routed_nets(net: nn.Module) -> dict[str, RoutedNet]:
    """By what the router sees: the image, or the input of the second or third stage."""
    found = {"image": RoutedNet(net, ImageRouter(size=32, width=8), shallow="TTTT", deep="FFFF")}
    fused = adn.fuse(net)
    for at in (1, 2):  # stages before it are the same for both depths: those of the super-net
        routed = RoutedNet(fused, shallow="F" * at + "T" * (4 - at), deep="FFFF", at=at)
        features, = routed.features(torch.zeros(1, 3, 32, 32, device=next(net.parameters()).device))
        routed.router = AdvantageRouter({"stage": features.shape[1]}, path_width=0, grid=(2, 2))
        found[f"input of stage {at + 1}"] = routed
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, metavar="DIR")
    parser.add_argument("--images", type=int, default=30_000, help="that the net is trained on")
    parser.add_argument("--router-images", type=int, default=20_000, help="that routers are trained on, after these")
    parser.add_argument("--test-images", type=int, default=10_000)
    parser.add_argument("--epochs", type=int, default=12, help="of the net")
    parser.add_argument("--router-epochs", type=int, default=30)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--csv", type=Path)
    args = parser.parse_args()
    device = torch.device(args.device)
    every = Images.load(args.data / "cifar10_train.npz", args.images + args.router_images, device)
    train = Images(every.x[: args.images], every.y[: args.images])
    others = list(zip(every.x[args.images :].split(500), every.y[args.images :].split(500), strict=True))
    test = Images.load(args.data / "cifar10_test.npz", args.test_images, device)
    tests = list(zip(test.x.split(500), test.y.split(500), strict=True))
    recipe = Recipe(**OPTIMIZERS["adamw"], epochs=args.epochs, batch_size=64, norm_decay=0.0, bias_decay=0.0,
                    schedule="cosine", warmup_epochs=2, warmup_factor=0.1)
    rows: list[dict[str, object]] = []
    for seed in args.seeds:
        torch.manual_seed(seed)
        net = adn.convert(resnet18(width=16, stride=2)).to(device)
        start = time.perf_counter()
        fit(net, lambda _epoch: train.batches(64), None, recipe.but(seed=seed), progress=False)
        net.eval()
        print(f"seed {seed}: net trained in {time.perf_counter() - start:.0f} s", flush=True)
        costs = dict(zip(adn.depths(net), (n / 1e6 for n in count_macs(net, test.x[:1], adn.depths(net))), strict=True))
        points = []
        for depth in adn.depths(net):
            with adn.at_depth(net, depth):
                points.append((costs[depth], top1(net, test)))
            rows.append({"seed": seed, "router": "", "depth": str(depth), "mmacs": costs[depth], "top1": points[-1][1]})
        for what, routed in routed_nets(net).items():
            torch.manual_seed(seed)
            routed.router.to(device)
            seen = collect(routed, others, progress=False)
            fitted, held = fit_router(routed.router, seen, epochs=args.router_epochs, seed=seed, progress=False)
            calibration = scores_of(routed.router, seen.part(held)).tolist()
            measured = collect(routed, tests, progress=False)
            pair = tuple(n / 1e6 for n in routed.macs(test.x[:1]))
            scores = scores_of(routed.router, measured).tolist()
            for gain in gains(Guesses(measured.right), scores, pair, calibration, SHARES):
                rows.append({
                    "seed": seed, "router": what, "share": gain.share, "deep": round(gain.deep, 4),
                    "depth": " or ".join(map(str, routed.depths)), "mmacs": round(gain.cost, 4), "top1": gain.routed,
                    "random": gain.random, "best_single_depth": at_cost(points, gain.cost), "best_possible": gain.best,
                    "correlation": round(max(row.correlation for row in fitted), 4)})
            print(f"seed {seed}, {what}: correlation {max(row.correlation for row in fitted):.3f}", flush=True)
        if args.csv:
            names = ("seed", "router", "share", "deep", "depth", "mmacs", "top1", "random", "best_single_depth",
                     "best_possible", "correlation")
            write_rows(args.csv, [{name: row.get(name, "") for name in names} for row in rows], header(device) | {
                "recipe": str(dataclasses.asdict(recipe)), "images": str(args.images),
                "router images": str(args.router_images), "test images": str(len(test.y))})
    print(summary(rows))


def summary(rows: list[dict[str, object]]) -> str:
    """Means over seeds."""
    table = [("router sees", "share", "MMACs", "router", "random", "best single depth", "best possible")]
    rows = [row for row in rows if row["router"]]
    for key in dict.fromkeys((row["router"], row["share"]) for row in rows):
        of_key = [row for row in rows if (row["router"], row["share"]) == key]
        table.append((key[0], f"{key[1]:.0%}", *(f"{np.mean([row[name] for row in of_key]):.2f}" for name in (
            "mmacs", "top1", "random", "best_single_depth", "best_possible"))))
    return columns(table)


if __name__ == "__main__":
    main()
