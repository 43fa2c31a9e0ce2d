"""A tiny cascade of two YOLOv7 (DynamicDet) on scenes of handwritten digits, trained in two steps: both detectors, then
the router. Average precision at five shares of images on the second route, against as many images drawn at random.

Thresholds are chosen by scores of scenes that the router has not learnt from; all of it is measured on scenes of digits
that neither detectors nor router have seen. Costs are billions of multiply-adds, router included.

    python bench/routing_digits.py --csv bench/results/routing_digits_cpu.csv
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from common import columns, header, write_rows
from torch.utils.data import DataLoader

from adn.data.coco import collate, open_coco
from adn.data.scenes import write_scenes
from adn.measure.average_precision import detections, images_of
from adn.routing import RoutedNet
from adn.routing.fit import Boxes, collect, fit_router, gains, scores_of
from adn.tasks import DETECT, Data
from adn.train import TrainBatches, fit
from adn.train.recipes import DETECTION_RECIPES
from adn.train.run import DetectionConfig

RECIPE = DETECTION_RECIPES["dyyolov7-digits"]
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=2400, help="scenes to train on")
    parser.add_argument("--held-out", type=int, default=400, help="scenes to measure on")
    parser.add_argument("--epochs", type=int, default=RECIPE.epochs, help="of step 1")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--csv", type=Path)
    args = parser.parse_args()
    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as made:
        write_scenes(Path(made), args.images, args.held_out, RECIPE.size, seed=0)
        for seed in args.seeds:
            rows += run(seed, made, args)
            if args.csv:
                write_rows(args.csv, rows, header(args.device) | {
                    "scenes": f"{args.images} and {args.held_out}", "recipe": str(RECIPE.to_dict())})
    names = ("seed", "share", "deep", "gmacs", "ap", "random", "correlation")
    print(columns([names, *(tuple(str(row[name]) for name in names) for row in rows)]))


def run(seed: int, data: str, args: argparse.Namespace) -> list[dict[str, object]]:
    recipe = RECIPE.but(seed=seed, epochs=args.epochs)
    torch.manual_seed(seed)
    train, held_out = (open_coco(data, split) for split in ("train", "val"))
    net = DETECT.build(DetectionConfig(data, "", recipe), len(train.class_names), True)
    DETECT.prepare(net, recipe, Data(train, held_out, len(train.class_names), []))
    loss = DETECT.loss(net.to(args.device), recipe)
    net = fit(net, TrainBatches(train, recipe, collate=collate), None, recipe, loss=loss).net.eval()
    train.transform = held_out.transform
    learnt_from, measured_on = (DataLoader(each, 50, collate_fn=collate) for each in (train, held_out))
    routed = RoutedNet(net)
    seen = collect(routed, learnt_from)
    fitted, others = fit_router(routed.router, seen, seed=seed)
    calibration = scores_of(routed.router, seen.part(others)).tolist()
    _, (shallow, deep) = detections(net, measured_on, routed.depths)
    costs = tuple(count / 1e9 for count in routed.macs(torch.zeros(1, 3, recipe.size, recipe.size, device=args.device)))
    found = gains(Boxes(images_of(measured_on), shallow, deep), routed.scores(measured_on), costs, calibration, SHARES)
    return [{"seed": seed, "share": row.share, "deep": round(row.deep, 4), "gmacs": round(row.cost, 4),
             "ap": row.routed, "random": row.random, "correlation": round(max(e.correlation for e in fitted), 4)}
            for row in found]


if __name__ == "__main__":
    main()
