"""Let a router choose the depth of each image: train one, measure what it gains, hold a latency.

fit        trains a router between two depths of a classifier or a detector (RT-DETR,
           YOLOv12, a cascade such as dyyolov7), on images that the net has not learnt
           by heart, and writes both to one file.
eval       prints accuracy against mean cost: of the router, of as many images drawn at
           random, of single depths.
threshold  times both routes here, and sets the share of images that take the deep one
           so that the mean is what you ask for.

examples:
  adn route fit net.safetensors photos --split val --out routed.safetensors
  adn route fit net.safetensors photos --split val --shallow TTTT --deep TTFF --at 2 --out routed.safetensors
  adn route eval routed.safetensors photos --split test --csv routing.csv --plot routing.png
  adn route threshold routed.safetensors --target-ms 12

In Python the file is a net like any other: adn.load("routed.safetensors")(images).
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader

from ..core.depth import Depth
from ..measure.accuracy import choose_depths, evaluate
from ..measure.average_precision import BACKENDS, detections, images_of, require_backend
from ..measure.cost import count_macs
from ..measure.passes import no_image
from ..measure.profile import profile, require_matplotlib
from ..routers import AdvantageRouter
from ..routing.fit import (
    SHARES,
    Boxes,
    Guesses,
    Outcomes,
    at_cost,
    collect,
    fit_router,
    gains,
    gains_csv,
    gains_table,
    plot_gains,
    scores_of,
)
from ..routing.policy import ThresholdPolicy
from ..routing.routed import ImageRouter, RoutedNet
from ..runtime.fuse import fuse
from ..tasks import example, task_of
from ..weights.checkpoint import load, read_metadata, save
from . import common

_KEPT = 201  # quantiles of scores in a file
_ROUNDS = 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION", help="fit, eval or threshold")

    def action(name: str, summary: str) -> argparse.ArgumentParser:
        return actions.add_parser(name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.",
                                  epilog="adn route --help has examples.")

    fit = action("fit", "train a router between two depths of a net")
    fit.add_argument("checkpoint", metavar="CHECKPOINT", help="an any-depth net, as adn.save writes it")
    fit.add_argument("data", metavar="DATA", help="images that the net has not learnt by heart; see adn eval")
    fit.add_argument("--out", required=True, metavar="FILE", help="file to write: net and router")
    fit.add_argument("--shallow", default="base", metavar="DEPTH", help="of images that are easy (default: base)")
    fit.add_argument("--deep", default="super", metavar="DEPTH", help="of the others (default: super)")
    fit.add_argument("--at", type=int, metavar="FLAG", help="let the router see the input of the stage with this flag, "
                     "counted from 0; the depths must agree on those before it (default: the reduced image)")
    fit.add_argument("--image-size", type=int, default=32, metavar="N", help="to which images are reduced for the "
                     "router, in pixels (default: 32)")
    fit.add_argument("--share", type=float, default=0.5, help="of images that take the deep route, until adn route "
                     "threshold says otherwise (default: 0.5)")
    fit.add_argument("--kind", choices=("mse", "mae", "huber", "corr", "offset"), help="how predictions of what the "
                     "deep route saves are compared with what it saved; offset: by its median (default: mse, of a "
                     "cascade offset)")
    fit.add_argument("--epochs", type=int, default=30, metavar="N", help="over the images (default: 30)")
    fit.add_argument("--lr", type=float, default=1e-3, help="learning rate of Adam (default: 0.001)")
    fit.add_argument("--seed", type=int, default=0, metavar="N", help="of all that is drawn (default: 0)")
    evaluate_ = action("eval", "measure accuracy against mean cost: of a router, of chance, of single depths")
    evaluate_.add_argument("checkpoint", metavar="ROUTED", help="what adn route fit wrote")
    evaluate_.add_argument("data", metavar="DATA", help="images that neither net nor router has seen")
    evaluate_.add_argument("--latency", action="store_true", help="cost in milliseconds, measured here (default: in "
                           "multiply-adds)")
    evaluate_.add_argument("--depth", metavar="DEPTHS", help='single depths to compare with: "all", "chain" or a list '
                           "(default: all; of a detector chain)")
    evaluate_.add_argument("--backend", choices=BACKENDS, default=BACKENDS[0], help="what compares boxes with "
                           f"annotations; the numbers are the same (default: {BACKENDS[0]})")
    evaluate_.add_argument("--csv", metavar="FILE", help="write the tables to a file as well")
    evaluate_.add_argument("--plot", metavar="FILE", help="draw accuracy against cost (png, pdf)")
    threshold = action("threshold", "choose the share of deep routes, by a latency or as it is")
    threshold.add_argument("checkpoint", metavar="ROUTED", help="what adn route fit wrote")
    wanted = threshold.add_mutually_exclusive_group(required=True)
    wanted.add_argument("--target-ms", type=float, metavar="MS", help="mean time of an image, in milliseconds")
    wanted.add_argument("--share", type=float, help="of images that take the deep route, 0 to 1")
    threshold.add_argument("--out", metavar="FILE", help="file to write (default: ROUTED itself)")
    threshold.add_argument("--rounds", type=int, default=_ROUNDS, metavar="N", help="timed forwards of each route "
                           f"(default: {_ROUNDS})")
    for each in (fit, evaluate_):
        common.add_data_arguments(each)
    for each in (fit, evaluate_, threshold):
        common.add_image_arguments(each)
        common.add_device_argument(each)


def run(args: argparse.Namespace) -> int:
    args.device = common.pick_device(args.device)
    return {"fit": _fit, "eval": _evaluate, "threshold": _threshold}[args.action](args)


def _fit(args: argparse.Namespace) -> int:
    common.make_folder(args.out)
    net = load(args.checkpoint).to(args.device).eval()
    if isinstance(net, RoutedNet):
        raise ValueError(f"{args.checkpoint} has a router already; pass the net that it was trained for")
    common.warn_if_untrained(net, choose_depths(net, f"{args.shallow},{args.deep}"))
    data = common.open_images(args.data, args, net, args.split)
    torch.manual_seed(args.seed)
    routed = RoutedNet(net if args.at is None else fuse(net), shallow=args.shallow, deep=args.deep, at=args.at)
    if routed.router is None and args.at is None:
        routed.router = ImageRouter(example(net, 8).shape[1], args.image_size)
    elif args.at is not None:
        features, = routed.features(example(net, common.preparation(args, net)["size"], 2))
        routed.router = AdvantageRouter({"stage": features.shape[1]}, path_width=0, grid=(2, 2))
    routed.router.to(args.device)
    seen = collect(routed, common.make_loader(data, args, task_of(net)))
    rows, held = fit_router(routed.router, seen, epochs=args.epochs, lr=args.lr, kind=args.kind, seed=args.seed)
    others = seen.part(held)
    scores = scores_of(routed.router, others)
    best = max(row.correlation for row in rows)
    print(f"correlation of scores and savings on {len(held)} held-out images: {best:.3f}")
    if not best > 0:
        raise ValueError("the router predicts nothing of these images: the net gains at random from being deep, or has "
                         "learnt them by heart. Pass images that it was not trained on, and more of them")
    if others.right is not None:  # of a detector adn route eval says it
        x = example(net, common.preparation(args, net)["size"])
        costs = tuple(count / 1e6 for count in routed.macs(x))
        print(gains_table(gains(Guesses(others.right), scores.tolist(), costs), "MMACs"))
    routed.policy = ThresholdPolicy.from_share(scores.tolist(), args.share)
    kept = np.quantile(scores.numpy().astype(np.float64), np.linspace(0, 1, _KEPT)).tolist()
    extra = read_metadata(args.checkpoint)["extra"] | {"route": {"scores": kept}}
    save(routed, args.out, extra=extra)
    print(f"wrote {args.out}: {args.share:.0%} of images run at {routed.depths[1]}, the others at {routed.depths[0]}")
    common.report_unreadable(data)
    return 0


def _evaluate(args: argparse.Namespace) -> int:
    common.make_folder(args.csv)
    common.make_folder(args.plot)
    if args.plot:
        require_matplotlib(args.plot)
    routed, extra = _routed(args)
    net = routed.net
    task, metric, way = task_of(net), task_of(net).metric, _WAYS[task_of(net).name]
    data = common.open_images(args.data, args, net, args.split)
    loader = common.make_loader(data, args, task)
    asked = choose_depths(net, args.depth or way.depths)
    every = list(dict.fromkeys([*asked, *routed.depths]))
    outcomes, scores, accuracies = way.measure(routed, loader, every, args)
    x = example(net, common.preparation(args, net)["size"])
    if args.latency:
        spent = {point.depth: point.p50_ms for point in profile(net, x, depths=every, rounds=_ROUNDS, progress=True)}
        costs, unit = routed.measure(x, rounds=_ROUNDS), "ms"
    else:
        unit = way.unit
        spent = dict(zip(every, (count / way.macs for count in count_macs(net, x, every)), strict=True))
        costs = tuple(count / way.macs for count in routed.macs(x))
    found = gains(outcomes, scores, costs, extra["route"]["scores"], way.shares)
    print(gains_table(found, unit))
    print("\nsingle depths: " + ", ".join(f"{depth} {accuracies[depth]:.2f} at {spent[depth]:.4g}" for depth in every))
    points = [(spent[depth], accuracies[depth]) for depth in every]
    for row in found:
        if 0 < row.share < 1 and min(points)[0] <= row.cost:
            fixed = at_cost(points, row.cost)
            print(f"at {row.cost:.4g} {unit}: router {row.routed:.2f}, best single depth {fixed:.2f} "
                  f"({row.routed - fixed:+.2f})")
    if args.csv:
        gains_csv(args.csv, found, {depth: (spent[depth], accuracies[depth]) for depth in every}, unit, metric.name)
    if args.plot:
        plot_gains(found, points, unit, metric.axis, args.plot)
    common.report_unreadable(data)
    return 0


Measured = tuple[Outcomes, list[float], dict[Depth, float]]


def _guesses(routed: RoutedNet, loader: DataLoader, depths: list[Depth], args: argparse.Namespace) -> Measured:
    """Of a classifier: what both routes made of the images, their scores, and accuracy by depth."""
    seen = collect(routed, loader)
    rows = evaluate(routed.net, loader, depths, args.device)
    return Guesses(seen.right), scores_of(routed.router, seen).tolist(), {row.depth: row.top1 for row in rows}


def _boxes(routed: RoutedNet, loader: DataLoader, depths: list[Depth], args: argparse.Namespace) -> Measured:
    """The same of a detector."""
    require_backend(args.backend)
    found = dict(zip(*detections(routed.net, loader, depths, args.device), strict=True))
    shallow, deep = (found[depth] for depth in routed.depths)
    if not shallow:
        raise ValueError(no_image("evaluate on", loader))
    accuracies = {depth: Boxes(images_of(loader), each, each, args.backend).at_random(0)
                  for depth, each in found.items()}
    return Boxes(images_of(loader), shallow, deep, args.backend), routed.scores(loader), accuracies


class _Way(NamedTuple):
    """How routing over a net of a task is measured: by what, at which depths, in how many multiply-adds, at which
    shares of deep routes (each costs a detector some comparisons with the annotations)."""

    measure: Callable[[RoutedNet, DataLoader, list[Depth], argparse.Namespace], Measured]
    depths: str
    macs: float
    unit: str
    shares: Sequence[float]


_WAYS = {"classify": _Way(_guesses, "all", 1e6, "MMACs", SHARES),
         "detect": _Way(_boxes, "chain", 1e9, "GMACs", SHARES[::2])}


def _threshold(args: argparse.Namespace) -> int:
    routed, extra = _routed(args)
    scores = extra["route"]["scores"]
    if args.target_ms is None:
        routed.policy = ThresholdPolicy.from_share(scores, args.share)
    else:
        if not (args.target_ms > 0 and math.isfinite(args.target_ms)):
            raise ValueError(f"--target-ms {args.target_ms:g}; pass milliseconds, more than 0")
        x = example(routed.net, common.preparation(args, routed.net)["size"])
        c1, c2 = routed.measure(x, rounds=args.rounds)
        print(f"{routed.depths[0]} takes {c1:.3g} ms, {routed.depths[1]} {c2:.3g} ms, router included")
        if c1 >= c2:
            raise ValueError(f"{routed.depths[1]} takes no longer here than {routed.depths[0]}: time more forwards "
                             "(--rounds) on a quiet machine, or use the deeper one for all images")
        routed.policy = ThresholdPolicy.from_budget(scores, c1, c2, args.target_ms)
    if routed.policy.note:
        print(routed.policy.note, file=sys.stderr)
    print(f"{routed.policy.share:.1%} of images take the deep route: those with a score above {routed.policy.tau:.4g}")
    out = args.out or args.checkpoint
    common.make_folder(out)
    save(routed, out, extra=extra)
    print(f"wrote {out}")
    return 0


def _routed(args: argparse.Namespace) -> tuple[RoutedNet, dict[str, Any]]:
    routed: nn.Module = load(args.checkpoint, device=args.device)
    if not isinstance(routed, RoutedNet):
        raise ValueError(f"{args.checkpoint} has no router: adn route fit {args.checkpoint} DATA --out FILE trains one")
    extra = read_metadata(args.checkpoint)["extra"]
    if "route" not in extra:
        raise ValueError(f"{args.checkpoint} does not hold the scores that thresholds are chosen by: it was not "
                         "written by adn route fit. Choose one in Python: ThresholdPolicy.from_share("
                         "routed.scores(loader), share)")
    return routed, extra
