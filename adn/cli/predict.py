"""Name what is on images, at a depth of your choice.

Prints the most probable classes of each image with their probabilities. An image
that cannot be read is reported, the others go on; the exit status is then 1.

examples:
  adn predict cat.jpg --checkpoint net.safetensors
  adn predict *.png --checkpoint net.safetensors --depth TTFF --top 1
"""

from __future__ import annotations

import argparse

from .common import add_device_argument, add_image_arguments, each_image, load_net


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("images", metavar="IMAGE", nargs="+", help="image files")
    parser.add_argument("--checkpoint", required=True, metavar="FILE", help="a net, as adn.save writes it")
    parser.add_argument("--depth", help='such as TTFF, "super" or "base" (default: the depth the file was saved at)')
    parser.add_argument("--top", type=int, default=5, metavar="N", help="how many classes to name (default: 5)")
    add_image_arguments(parser)
    add_device_argument(parser)


def run(args: argparse.Namespace) -> int:
    from ..core.state import set_depth, state_of
    from ..tasks import CLASSIFY

    if args.top < 1:
        raise ValueError(f"--top {args.top}; pass 1 or more")
    net = load_net(args, CLASSIFY)
    if args.depth is not None:
        set_depth(net, args.depth)
    names, unread = state_of(net).class_names, 0
    for found in each_image(CLASSIFY, net, args, args.images, upright=False):
        if found is None:
            unread += 1
            continue
        i, _, result = found
        print(args.images[i])
        best = (result[name][: args.top].tolist() for name in ("scores", "labels"))
        for share, label in zip(*best, strict=True):
            print(f"  {share:6.1%}  {names[label] if names else f'class {label}'}")
    return 1 if unread else 0
