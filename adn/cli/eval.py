"""Measure the accuracy of a net at several depths, in one pass over the data.

A classifier: prints one line per depth, with its name, multiply-adds per image (in
millions), top-1 and top-5 accuracy in percent, and cross-entropy. DATA is a folder
with one sub-folder of images per class, a .tar of one, or a data set by name:
torch/cifar10:FOLDER, hfds/NAME, tfds/NAME:FOLDER, wds/NAME:FOLDER.

A detector: prints COCO's average precisions and average recall in percent, and
multiply-adds in billions. DATA is a folder with images and annotations in COCO's
format, such as adn scenes writes. With --model and --weights a model of one depth
(rtdetr_r50vd) is converted, and evaluated at full depth unless --depth asks for
others, which its weights were not trained for.

Images that cannot be read are left out, counted and named.

examples:
  adn eval photos/val --checkpoint net.safetensors
  adn eval photos --split val --checkpoint net.safetensors --depth all --csv accuracy.csv
  adn eval photos/val --checkpoint net.safetensors --depth super,TTFF,base --amp bf16
  adn eval digits --checkpoint detector.safetensors --csv accuracy.csv --latency
  adn eval coco --model rtdetr_r50vd --weights rtdetr_r50vd_6x_coco.pth
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING

from .common import (
    BATCH_SIZE,
    add_data_arguments,
    add_depth_argument,
    add_device_argument,
    add_image_arguments,
    add_source_arguments,
    add_task_argument,
    check_task,
    default_depths,
    detector_size,
    example,
    image_config,
    load_checkpoint,
    load_weights_of,
    make_folder,
    open_loader,
    report_others,
    report_unreadable,
)

if TYPE_CHECKING:
    from torch import nn

_LATENCY_ROUNDS = 20
_DETECTOR_BATCH_SIZE = 8
_OF_CLASSIFIERS = ("class_map", "resize", "interpolation", "mean", "std")
_OF_DETECTORS = ("results_dir", "backend", "latency")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", metavar="DATA", help="images with labels, or with boxes")
    add_source_arguments(parser)
    add_task_argument(parser)
    add_depth_argument(parser)
    parser.add_argument("--csv", metavar="FILE", help="write the table to a file as well")
    parser.add_argument("--amp", choices=("bf16", "fp16"), help="mixed precision (default: off)")
    group = parser.add_argument_group("detectors")
    group.add_argument("--results-dir", metavar="DIR", help="write all detections there, a file in COCO's results "
                       "format for each depth")
    group.add_argument("--backend", choices=("pycocotools", "faster_coco_eval"), help="what compares them with the "
                       "annotations; the numbers are the same (default: pycocotools)")
    group.add_argument("--latency", action="store_true", help="time a forward of one image at each depth")
    add_data_arguments(parser, f"{BATCH_SIZE}, or {_DETECTOR_BATCH_SIZE} for a detector", "DATA itself; of a detector "
                       "val")
    add_image_arguments(parser)
    add_device_argument(parser)
    parser.set_defaults(batch_size=None)


def run(args: argparse.Namespace) -> int:
    from ..models.registry import is_detector

    make_folder(args.csv)
    net = load_checkpoint(args) if args.model is None else None
    check_task(args, net is None or is_detector(net))
    if net is None or is_detector(net):
        return _run_detector(args, net)
    return _run_classifier(args, net)


def _run_classifier(args: argparse.Namespace, net: nn.Module) -> int:
    from ..core.tables import table
    from ..measure.accuracy import choose_depths, evaluate
    from ..measure.cost import count_macs

    _refuse(args, _OF_DETECTORS, f"{args.checkpoint} holds a classifier")
    args.batch_size = BATCH_SIZE if args.batch_size is None else args.batch_size
    config = image_config(args, net)
    depths = choose_depths(net, args.depth)
    loader = open_loader(args.data, args, config, net)
    rows = evaluate(net, loader, depths, args.device, args.amp)
    macs = count_macs(net, example(net, config["size"]), depths)
    print(table([
        ("depth", "MMACs", "top-1 (%)", "top-5 (%)", "loss"),
        *((str(row.depth), f"{count / 1e6:.1f}", f"{row.top1:.2f}", f"{row.top5:.2f}", f"{row.loss:.4f}")
          for row, count in zip(rows, macs, strict=True)),
    ]))
    print(f"{rows[0].images} images")
    if args.csv:
        with open(args.csv, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(("depth", "macs", "top1", "top5", "loss", "images"))
            writer.writerows((row.depth, count, row.top1, row.top5, row.loss, row.images)
                             for row, count in zip(rows, macs, strict=True))
    report_unreadable(loader.dataset)
    if args.depth is None:
        report_others(net, len(rows))
    return 0


def _run_detector(args: argparse.Namespace, net: nn.Module | None) -> int:
    import torch
    from torch.utils.data import DataLoader

    from ..data.coco import collate, open_coco
    from ..data.transforms import eval_transform
    from ..measure.accuracy import autocast, choose_depths
    from ..measure.average_precision import ACCURACIES, detection_table, evaluate_detector
    from ..measure.cost import count_macs
    from ..measure.profile import profile

    _refuse(args, _OF_CLASSIFIERS, f"{args.checkpoint or args.model} is a detector")
    size = detector_size(args)
    data = open_coco(args.data, args.split or "val", eval_transform(size))
    for note in data.notes:
        print(f"{data.file}: {note}", file=sys.stderr)
    if net is None:
        net = load_weights_of(args, len(data.class_names))
    depths = choose_depths(net, args.depth or default_depths(args))
    loader = DataLoader(data, _DETECTOR_BATCH_SIZE if args.batch_size is None else args.batch_size,
                        num_workers=args.workers, collate_fn=collate, pin_memory=args.device.startswith("cuda"))
    rows = evaluate_detector(net, loader, depths, args.device, amp=args.amp, results_dir=args.results_dir,
                             backend=args.backend or "pycocotools")
    x = example(net, size)
    if args.latency:
        with autocast(torch.device(args.device), args.amp):
            timed = profile(net, x, depths=depths, rounds=_LATENCY_ROUNDS, norms=True, progress=True)
        rows = [dataclasses.replace(row, macs=point.macs, latency_ms=point.p50_ms)
                for row, point in zip(rows, timed, strict=True)]
    else:
        rows = [dataclasses.replace(row, macs=count)
                for row, count in zip(rows, count_macs(net, x, depths, norms=True), strict=True)]
    print(detection_table(rows))
    print(f"{rows[0].images} images")
    if args.csv:
        columns = ("depth", "macs", *ACCURACIES, "images", *(["latency_ms"] if args.latency else []))
        with open(args.csv, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(columns)
            writer.writerows([getattr(row, column) for column in columns] for row in rows)
    report_unreadable(data)
    if args.depth is None:
        report_others(net, len(rows))
    return 0


def _refuse(args: argparse.Namespace, options: Iterable[str], why: str) -> None:
    if given := [name for name in options if getattr(args, name)]:
        raise ValueError(f"{why}, which has no use for --{given[0].replace('_', '-')}")
