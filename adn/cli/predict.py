"""Name what is on images, at a depth of your choice.

Prints the most probable classes of each image with their probabilities. An image
that cannot be read is reported, the others go on; the exit status is then 1.

examples:
  adn predict cat.jpg --checkpoint net.safetensors
  adn predict *.png --checkpoint net.safetensors --depth TTFF --top 1
"""

from __future__ import annotations

import argparse
import sys

from .common import add_device_argument, add_image_arguments, load_net


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("images", metavar="IMAGE", nargs="+", help="image files")
    parser.add_argument("--checkpoint", required=True, metavar="FILE", help="a net, as adn.save writes it")
    parser.add_argument("--depth", help='such as TTFF, "super" or "base" (default: the depth the file was saved at)')
    parser.add_argument("--top", type=int, default=5, metavar="N", help="how many classes to name (default: 5)")
    add_image_arguments(parser)
    add_device_argument(parser)


def run(args: argparse.Namespace) -> int:
    import torch
    from PIL import Image

    from ..core.state import set_depth, state_of
    from ..data.images import UNREADABLE, eval_transform, to_rgb
    from ..measure.accuracy import try_forward

    if args.top < 1:
        raise ValueError(f"--top {args.top}; pass 1 or more")
    net, config = load_net(args)
    if args.depth is not None:
        set_depth(net, args.depth)
    transform = eval_transform(**config)
    names = state_of(net).class_names
    dtype = next(net.parameters()).dtype
    unread = 0
    for path in args.images:
        try:
            with Image.open(path) as file:
                image = to_rgb(file)
        except UNREADABLE as error:
            print(f"{path}: cannot be read ({error})", file=sys.stderr)
            unread += 1
            continue
        with torch.inference_mode():
            logits = try_forward(net, transform(image)[None].to(args.device, dtype))
        best = logits[0].float().softmax(0).topk(min(args.top, logits.shape[1]))
        print(path)
        for share, label in zip(best.values.tolist(), best.indices.tolist(), strict=True):
            print(f"  {share:6.1%}  {names[label] if names else f'class {label}'}")
    return 1 if unread else 0
