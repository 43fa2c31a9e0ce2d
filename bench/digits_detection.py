"""A tiny any-depth detector on scenes of handwritten digits, against a base network trained separately.

RT-DETR or, by `--recipe`, YOLOv12 or Faster R-CNN. Same recipe, same number of epochs, several seeds. Scenes are made
from scikit-learn's digits by `adn scenes`, those to evaluate from other digits than those to train on. AP50 is the mean
over ten classes, in percent; nothing but the last evaluation sees the validation scenes.

    python bench/digits_detection.py --csv bench/results/digits_detection_cpu.csv
    python bench/digits_detection.py --recipe yolo-digits --images 1000 --csv bench/results/digits_yolo_cpu.csv
    python bench/digits_detection.py --recipe torchvision-digits --images 1000 --csv \\
        bench/results/digits_fasterrcnn_cpu.csv
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from common import columns, header, write_rows
from torch.utils.data import DataLoader

import adn
from adn.data.coco import collate, open_coco
from adn.data.scenes import write_scenes
from adn.measure.accuracy import chain
from adn.measure.average_precision import evaluate_detector
from adn.settings import DetectorSettings
from adn.tasks import DETECT, Data
from adn.train import TrainBatches, fit
from adn.train.recipes import DETECTION_RECIPES
from adn.train.run import DetectionConfig

NETWORKS = ("any-depth", "separate base")
BETWEEN = ("TFTF|F|3", "FTFT|T|2", "FFFF|T|2", "FFFF|F|1")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", choices=("digits", "yolo-digits", "torchvision-digits"), default="digits")
    parser.add_argument("--data", type=Path, metavar="DIR", help="scenes of `adn scenes` (default: made anew)")
    parser.add_argument("--images", type=int, default=2000, help="scenes to train on")
    parser.add_argument("--epochs", type=int, help="default: those of the recipe")
    parser.add_argument("--cut-decoder", action="store_true",
                        help="of RT-DETR, train the base-net's decoder at its own depth")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=NETWORKS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--csv", type=Path)
    args = parser.parse_args()
    recipe = DETECTION_RECIPES[args.recipe]
    changes = {"epochs": args.epochs} if args.epochs else {}
    if args.cut_decoder:
        changes["cut_decoder"] = True
    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as made:
        data = args.data
        if data is None:
            data = Path(made, "digits")
            write_scenes(data, images=args.images, val_images=200, size=recipe.size, seed=0)
        for seed in args.seeds:
            for what in args.networks:
                rows += run(what, recipe.but(seed=seed, **changes), data, args)
                if args.csv:
                    write_rows(args.csv, rows, header(args.device) | {"recipe": str(recipe.to_dict())})
    table = [("network", "depth", "AP50 mean", "lowest", "highest", "AP mean", "minutes")]
    for key in dict.fromkeys((row["network"], row["depth"]) for row in rows):
        of_key = [row for row in rows if (row["network"], row["depth"]) == key]
        ap50, ap, seconds = ([row[name] for row in of_key] for name in ("ap50", "ap", "train_seconds"))
        table.append((*key, f"{np.mean(ap50):.1f}", f"{min(ap50):.1f}", f"{max(ap50):.1f}", f"{np.mean(ap):.1f}",
                      f"{np.mean(seconds) / 60:.1f}"))
    print(columns(table))


def run(what: str, recipe: DetectorSettings, data: Path, args: argparse.Namespace) -> list[dict[str, object]]:
    device = torch.device(args.device)
    torch.manual_seed(recipe.seed)
    train = open_coco(data, "train")
    net = DETECT.build(DetectionConfig(str(data), "", recipe), len(train.class_names), True)
    validation = open_coco(data, "val")
    DETECT.prepare(net, recipe, Data(train, validation, len(train.class_names), []))
    if what == "separate base":
        net = adn.extract(net, "base")
    loss = DETECT.loss(net.to(device), recipe)
    batches = TrainBatches(train, recipe, workers=args.workers, collate=collate)
    start = time.perf_counter()
    net = fit(net, batches, None, recipe, loss=loss).net
    seconds = round(time.perf_counter() - start, 1)
    loader = DataLoader(validation, 50, collate_fn=collate)
    depths = None if what == "separate base" else [*chain(net), *(BETWEEN if args.recipe == "digits" else ())]
    found = evaluate_detector(net, loader, depths, device)
    print(f"seed {recipe.seed}, {what}: {seconds:.0f} s, AP50 " + ", ".join(
        f"{row.depth or 'base'} {row.ap50:.1f}" for row in found), flush=True)
    return [{"seed": recipe.seed, "network": what, "train_seconds": seconds,
             **{name: str(value) if name == "depth" else value for name, value in dataclasses.asdict(row).items()
                if name not in ("macs", "latency_ms")}} for row in found]


if __name__ == "__main__":
    main()
