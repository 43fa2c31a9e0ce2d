"""Adapt the norm statistics of a net to one depth in between, into a file of its own.

Averages batch-norm statistics over images at that depth, and prints the accuracy
before and after on images not used for it: those of --val, else one in five of DATA.
The file is meant for that depth alone, and is set to it; the original stays.

examples:
  adn calibrate photos/train --val photos/val --checkpoint net.safetensors --depth TFFT --out tfft.safetensors
"""

from __future__ import annotations

import argparse
import os

import torch
from torch.utils.data import IterableDataset, random_split

from ..core.state import get_depth, set_depth
from ..core.tables import table
from ..measure.accuracy import evaluate
from ..measure.calibrate import calibrate
from ..tasks import CLASSIFY
from ..weights.checkpoint import read_metadata, save
from . import common


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", metavar="DATA", help="images like those of training; see adn eval")
    parser.add_argument("--checkpoint", required=True, metavar="FILE", help="a net, as adn.save writes it")
    parser.add_argument("--depth", required=True, help="the depth to calibrate for, such as TFFT")
    parser.add_argument("--out", required=True, metavar="FILE", help="file to write")
    parser.add_argument("--batches", type=int, default=100, metavar="N", help="at most how many batches (default: 100)")
    parser.add_argument("--val", metavar="DATA", help="labelled images to measure the effect on")
    common.add_data_arguments(parser)
    common.add_image_arguments(parser)
    common.add_device_argument(parser)


def run(args: argparse.Namespace) -> int:
    if args.batches < 1:
        raise ValueError(f"--batches {args.batches}; pass 1 or more")
    if args.batch_size is None:
        args.batch_size = CLASSIFY.batch_size
    if os.path.realpath(args.out) == os.path.realpath(args.checkpoint):
        raise ValueError("--out names the checkpoint itself, which serves all depths; pass a file of its own")
    net = common.load_net(args, CLASSIFY)
    set_depth(net, args.depth)
    depth = get_depth(net)
    data = common.open_images(args.data, args, net, args.split, known=False)
    sources = [data]
    if args.val:
        used, held_out = data, common.open_images(args.val, args, net)
        sources.append(held_out)
    elif isinstance(data, IterableDataset):
        raise ValueError(f"images of {args.data!r} come in turn and cannot be divided; pass --val")
    else:
        used, held_out = random_split(data, (0.8, 0.2), torch.Generator().manual_seed(0))
        held_out.class_names = data.class_names
    # Folders are in order of class: the first batches of a sorted list would hold few of them.
    order = {} if isinstance(used, IterableDataset) else {
        "shuffle": True, "generator": torch.Generator().manual_seed(0), "drop_last": len(used) > args.batch_size}
    loader = common.make_loader(used, args, CLASSIFY, **order)
    held_out_loader = common.make_loader(held_out, args, CLASSIFY)
    calibrated = calibrate(net, loader, depth, batches=args.batches, device=args.device)
    before, = evaluate(net, held_out_loader, [depth], args.device)
    after, = evaluate(calibrated, held_out_loader, [depth], args.device)
    extra = read_metadata(args.checkpoint)["extra"] | {"calibrated": {
        "depth": str(depth), "top1_before": before.top1, "top1_after": after.top1, "held_out_images": after.images}}
    save(calibrated, args.out, extra=extra)
    print(table([("", "top-1 (%)", "top-5 (%)", "loss"), *(
        (f"{depth} {when}", f"{row.top1:.2f}", f"{row.top5:.2f}", f"{row.loss:.4f}")
        for when, row in (("as it was", before), ("calibrated", after)))]))
    if after.loss > before.loss:
        print("worse than before: this depth needs no calibration, or these images are not like those of training")
    print(f"{after.images} images not used for calibration; wrote {args.out}, for depth {depth} alone")
    for source in sources:
        common.report_unreadable(source)
    return 0
