"""Name what is on images, at a depth of your choice.

Prints the most probable classes of each image with their probabilities. A folder
stands for the images in it. An image that cannot be read is reported, the others
go on; the exit status is then 1.

examples:
  adn predict cat.jpg --checkpoint net.safetensors
  adn predict *.png --checkpoint net.safetensors --depth TTFF --top 1
"""

from __future__ import annotations

import argparse
from pathlib import Path

from ..core.state import get_depth, set_depth, state_of
from ..tasks import CLASSIFY
from . import common


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("images", metavar="IMAGE", nargs="+", type=Path, help="image files, or folders of them")
    parser.add_argument("--checkpoint", required=True, metavar="FILE", help="a net, as adn.save writes it")
    parser.add_argument("--depth", help='such as TTFF, "super" or "base" (default: the depth the file was saved at)')
    parser.add_argument("--top", type=int, default=5, metavar="N", help="how many classes to name (default: 5)")
    common.add_image_arguments(parser)
    common.add_device_argument(parser)


def run(args: argparse.Namespace) -> int:
    if args.top < 1:
        raise ValueError(f"--top {args.top}; pass 1 or more")
    sources = common.image_files(args.images)
    net = common.load_net(args, CLASSIFY)
    if args.depth is not None:
        set_depth(net, args.depth)
    common.warn_if_untrained(net, [get_depth(net)])
    names, shown = state_of(net).class_names, 0
    for i, _, result in common.each_image(CLASSIFY, net, args, sources, upright=False):
        shown += 1
        print(sources[i])
        best = (result[name][: args.top].tolist() for name in ("scores", "labels"))
        for share, label in zip(*best, strict=True):
            print(f"  {share:6.1%}  {names[label] if names else f'class {label}'}")
    return int(shown < len(sources))
