"""Adapt the norm statistics of a net to one depth in between, into a file of its own.

Averages batch-norm statistics over images at that depth, and prints the accuracy
before and after on images not used for it: those of --val, else one in five of DATA.
The file is meant for that depth alone, and is set to it; the original stays.

examples:
  adn calibrate photos/train --val photos/val --checkpoint net.safetensors --depth TFFT --out tfft.safetensors
"""

from __future__ import annotations

import argparse

from .eval import add_data_arguments, add_device_argument, add_image_arguments, load_net, make_loader, open_images, \
    report_unreadable


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", metavar="DATA", help="images like those of training (see adn eval); labels are not used")
    parser.add_argument("--checkpoint", required=True, metavar="FILE", help="a net, as adn.save writes it")
    parser.add_argument("--depth", required=True, help="the depth to calibrate for, such as TFFT")
    parser.add_argument("--out", required=True, metavar="FILE", help="file to write")
    parser.add_argument("--batches", type=int, default=100, metavar="N", help="at most how many batches (default: 100)")
    parser.add_argument("--val", metavar="DATA", help="labelled images to measure the effect on")
    add_data_arguments(parser)
    add_image_arguments(parser)
    add_device_argument(parser)


def run(args: argparse.Namespace) -> int:
    import torch
    from torch.utils.data import IterableDataset, random_split

    from ..calibrate import calibrate
    from ..checkpoint import read_metadata, save
    from ..evaluate import evaluate
    from ..state import get_depth, set_depth
    from ..profile import table

    net, config = load_net(args)
    set_depth(net, args.depth)
    depth = get_depth(net)
    data = open_images(args.data, args, config, args.split)
    if args.val:
        used, held_out, names = data, open_images(args.val, args, config), None
    elif isinstance(data, IterableDataset):
        raise ValueError("pass --val: data read in turn cannot be divided")
    else:
        used, held_out = random_split(data, (0.8, 0.2), torch.Generator().manual_seed(0))
        held_out.class_names = data.class_names
    ...
    return 0
