"""Count and time a net at every depth, and pick one for a time budget.

Prints one line per depth: its name, multiply-adds per image (in millions, of
large nets in billions), parameters in use, median and 99th percentile of the
measured time of a forward, and a star if no other depth is both faster and
better (more accurate where accuracy is given, else more multiply-adds). For a
detector multiply-adds include norms and sampling, as published numbers do.

examples:
  adn profile --model resnet50 --threads 1
  adn profile --checkpoint net.safetensors --accuracy accuracy.csv --plot profile.png
  adn profile --checkpoint net.safetensors --budget 20 --percentile 99
  adn profile --model anydepth_rtdetr_r50vd --device cuda
"""

from __future__ import annotations

import argparse

import torch

from ..core.state import depths as all_depths
from ..core.tables import read_table
from ..measure.accuracy import choose_depths
from ..measure.profile import fit_budget, profile, require_matplotlib
from ..models.registry import ENTRIES, PREFIX, create_model
from ..tasks import example, task_of
from . import common

# A net of more depths than this is profiled along its chain unless all are asked for: time doubles with every stage.
MOST_BY_DEFAULT = 64


def add_arguments(parser: argparse.ArgumentParser) -> None:
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", metavar="NAME", help="a model of timm, converted, or a detector such as "
                        "rtdetr_r50vd, with random weights")
    source.add_argument("--checkpoint", metavar="FILE", help="a net, as adn.save writes it")
    common.add_task_argument(parser)
    parser.add_argument("--size", type=int, metavar="N", help="side of the images in pixels (default: the net's own)")
    parser.add_argument("--batch-size", type=int, default=1, metavar="N", help="images per forward (default: 1)")
    common.add_depth_argument(parser, f"all, or if more than {MOST_BY_DEFAULT} the chain; with --accuracy, those in "
                              "that file")
    parser.add_argument("--accuracy", metavar="FILE", help="what adn eval --csv wrote, to be joined by depth")
    parser.add_argument("--rounds", type=int, default=50, metavar="N", help="timed forwards per depth (default: 50)")
    parser.add_argument("--csv", metavar="FILE", help="write the table to a file as well")
    parser.add_argument("--plot", metavar="FILE", help="draw accuracy, or MACs if unknown, against latency (png, pdf)")
    parser.add_argument("--budget", type=float, metavar="MS", help="name the deepest depth that runs in this time")
    parser.add_argument("--percentile", type=int, choices=(50, 99), default=50,
                        help="of the times that must fit the budget (default: 50)")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: torch's choice)")
    common.add_device_argument(parser)


def run(args: argparse.Namespace) -> int:
    for file in (args.csv, args.plot):
        common.make_folder(file)
    if args.plot:
        require_matplotlib(args.plot)
    if args.budget is not None and not args.budget > 0:
        raise ValueError(f"--budget {args.budget:g}; pass milliseconds, more than 0")
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    if args.checkpoint:
        net = common.load_net(args)
    else:
        args.device = common.pick_device(args.device)
        net = common.build(args.model) if args.model in ENTRIES else create_model(
            PREFIX + args.model.removeprefix(PREFIX))
        net.to(args.device).eval()
    task = task_of(net)
    common.check_task(args, task)
    size = common.preparation(args, net)["size"]
    accuracy = None
    if args.accuracy:
        column = task.metric.name
        _, rows = read_table(args.accuracy, ("depth", column))
        accuracy = {row["depth"]: float(row[column]) for row in rows if row[column]}
        if not accuracy:
            raise ValueError(f"{args.accuracy} has no accuracy in it: its column {column} is empty")
    every = len(all_depths(net))
    if args.depth is None and accuracy:
        depths = list(accuracy)
    else:
        depths = choose_depths(net, args.depth or ("all" if every <= MOST_BY_DEFAULT else "chain"))
    result = profile(net, example(net, size, args.batch_size), depths=depths, rounds=args.rounds, accuracy=accuracy,
                     norms=task.norms, progress=True)
    print(result)
    print(", ".join(f"{key} {value}" for key, value in result.machine.items()))
    if args.depth is None and accuracy is None:
        common.report_others(net, len(result))
    if args.csv:
        result.to_csv(args.csv)
    if args.plot:
        result.plot(args.plot)
    if args.budget is not None:
        print(f"{fit_budget(result, ms=args.budget, percentile=args.percentile)} fits {args.budget:g} ms "
              f"(p{args.percentile})")
    return 0
