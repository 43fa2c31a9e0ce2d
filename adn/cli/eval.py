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
  adn eval photos/val --checkpoint runs/photos/best.safetensors
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

import torch

from ..core.state import only_converted, state_of
from ..measure.accuracy import choose_depths
from ..measure.cost import count_macs
from ..measure.passes import autocast
from ..measure.profile import profile
from ..models.registry import ENTRIES, interface_of
from ..tasks import example, task_of
from . import common

_LATENCY_ROUNDS = 20
# Options that only nets of one task have a use for, and those of them that evaluation itself takes.
_OPTIONS = {"classify": ("class_map", "resize", "interpolation", "mean", "std"),
            "detect": ("results_dir", "backend", "latency")}
_PASSED = {"detect": ("results_dir", "backend")}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", metavar="DATA", help="images with labels, or with boxes")
    common.add_source_arguments(parser)
    common.add_task_argument(parser)
    common.add_depth_argument(parser)
    parser.add_argument("--csv", metavar="FILE", help="write the table to a file as well")
    parser.add_argument("--amp", choices=("bf16", "fp16"), help="mixed precision (default: off)")
    group = parser.add_argument_group("detectors")
    group.add_argument("--results-dir", metavar="DIR", help="write all detections there, a file in COCO's results "
                       "format for each depth")
    group.add_argument("--backend", choices=("pycocotools", "faster_coco_eval"), help="what compares them with the "
                       "annotations; the numbers are the same (default: pycocotools)")
    group.add_argument("--latency", action="store_true", help="time a forward of one image at each depth")
    common.add_data_arguments(parser, "64, or 8 for a detector", "DATA itself; of a detector val")
    common.add_image_arguments(parser)
    common.add_device_argument(parser)


def run(args: argparse.Namespace) -> int:
    common.make_folder(args.csv)
    net = common.load_net(args) if args.checkpoint else None
    task = common.task_of_model(args.model) if net is None else task_of(net)
    common.check_task(args, task)
    for other, options in _OPTIONS.items():
        if other != task.name and (given := [name for name in options if getattr(args, name)]):
            what = f"{args.checkpoint} holds" if args.checkpoint else f"{args.model} is"
            raise ValueError(f"{what} a {task.makes}, which has no use for --{given[0].replace('_', '-')}")
    known = None if net is None else state_of(net).class_names
    outlines = ENTRIES[args.model].masks if net is None else getattr(interface_of(net), "masks", False)
    data = task.open(args.data, args.split, args.class_map, known, outlines)
    for note in task.notes(data):
        print(note, file=sys.stderr)
    if net is None:
        net = common.load_net(args, num_classes=len(data.class_names))
    prepared = common.preparation(args, net)
    data.transform = task.transform(**prepared)
    # Of a model that is not any-depth by itself, the only depth that its weights were trained at.
    default = "super" if args.model and not ENTRIES[args.model].any_depth else "chain"
    depths = choose_depths(net, args.depth or default)
    common.warn_if_untrained(net, depths)
    options = {name: getattr(args, name) for name in _PASSED.get(task.name, ()) if getattr(args, name)}
    rows = task.evaluate(net, common.make_loader(data, args, task), depths, args.device, amp=args.amp, **options)
    x = example(net, prepared["size"])
    if args.latency:
        with autocast(torch.device(args.device), args.amp):
            timed = profile(net, x, depths=depths, rounds=_LATENCY_ROUNDS, norms=task.norms, progress=True)
        costs = [{"macs": point.macs, "latency_ms": point.p50_ms} for point in timed]
    else:
        costs = [{"macs": count} for count in count_macs(net, x, depths, norms=task.norms)]
    rows = [dataclasses.replace(row, **cost) for row, cost in zip(rows, costs, strict=True)]
    print(task.table(rows))
    print(f"{rows[0].images} images")
    if (lost := task.untrained(rows, len(data.class_names) or 1000)) and not only_converted(net):
        print(f"{'these depths do' if len(lost) > 1 else 'this depth does'} no better than guessing and may never have "
              f"been trained: {', '.join(str(row.depth) for row in lost)}; adn train --checkpoint teaches a net every "
              "depth", file=sys.stderr)
    if args.csv:
        more = (name for name in task.more_columns if any(getattr(row, name) is not None for row in rows))
        columns = ("depth", "macs", *task.columns, *more, "images", *(["latency_ms"] if args.latency else []))
        with open(args.csv, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(columns)
            writer.writerows([getattr(row, column) for column in columns] for row in rows)
    common.report_unreadable(data)
    if args.depth is None:
        common.report_others(net, len(rows))
    return 0
