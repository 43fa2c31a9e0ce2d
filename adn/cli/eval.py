"""Measure the accuracy of a net at several depths, in one pass over the data.

Prints one line per depth: its name, multiply-adds per image (in millions), top-1
and top-5 accuracy in percent, and cross-entropy.

DATA is a folder with one sub-folder of images per class, a .tar of one, or a
data set by name: torch/cifar10:FOLDER, hfds/NAME, tfds/NAME:FOLDER, wds/NAME:FOLDER.
Images that cannot be read are left out, counted and named.

examples:
  adn eval photos/val --checkpoint net.safetensors
  adn eval photos --split val --checkpoint net.safetensors --depth all --csv accuracy.csv
  adn eval photos/val --checkpoint net.safetensors --depth super,TTFF,base --amp bf16
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn
    from torch.utils.data import DataLoader, Dataset

    from ..data import ImageData

NAMED_UNREADABLE = 5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", metavar="DATA", help="images with labels")
    parser.add_argument("--checkpoint", required=True, metavar="FILE", help="a net, as adn.save writes it")
    add_depth_argument(parser)
    parser.add_argument("--csv", metavar="FILE", help="write the table to a file as well")
    parser.add_argument("--amp", choices=("bf16", "fp16"), help="mixed precision (default: off)")
    add_data_arguments(parser)
    add_image_arguments(parser)
    add_device_argument(parser)


def run(args: argparse.Namespace) -> int:
    from ..evaluate import choose_depths, evaluate
    from ..profile import count_macs, table
    from ..state import depths as all_depths

    net, config = load_net(args)
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
    every = len(all_depths(net))
    if args.depth is None and len(rows) < every:
        print(f"{len(rows)} of {every} depths; --depth all measures every one")
    return 0


def add_depth_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--depth", metavar="DEPTHS",
        help='which depths: "all", "chain" (FFFF, TFFF, TTFF to TTTT; the default), or a list such as super,TTFF,base',
    )


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("data")
    group.add_argument("--split", default="", help="the sub-folder or split of DATA to open (default: DATA itself)")
    group.add_argument("--class-map", default="", metavar="FILE", help="text file of class names, one per line, in the "
                       "order of their labels (default: the names of the sub-folders, sorted)")
    group.add_argument("--batch-size", type=int, default=64, metavar="N", help="images per batch (default: 64)")
    group.add_argument("--workers", type=int, default=2, metavar="N", help="processes that read images (default: 2)")


def add_image_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("preparing images", "By default as the net was trained, where known.")
    group.add_argument("--size", type=int, metavar="N", help="side of the square the net sees, in pixels")
    group.add_argument("--resize", type=int, metavar="N", help="length of the shorter side before it is cut out")
    group.add_argument("--interpolation", choices=("nearest", "bilinear", "bicubic"), help="how images are resized")
    group.add_argument("--mean", type=float, nargs=3, metavar="M", help="of each channel, for values from 0 to 1")
    group.add_argument("--std", type=float, nargs=3, metavar="S", help="of each channel, for values from 0 to 1")


def add_device_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", help="such as cpu, cuda or cuda:1 (default: cuda if there is one)")


def pick_device(name: str | None) -> str:
    import torch

    if name and name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"--device {name}: this torch ({torch.__version__}) finds no CUDA device")
    return name or ("cuda" if torch.cuda.is_available() else "cpu")


def load_net(args: argparse.Namespace) -> tuple[nn.Module, dict[str, Any]]:
    """The net of `--checkpoint` on `--device` (which is filled in), and how it wants its images."""
    from ..checkpoint import load, read_metadata
    from ..data import data_config

    args.device = pick_device(args.device)
    net = load(args.checkpoint, device=args.device).eval()
    stored = read_metadata(args.checkpoint)["extra"].get("data")
    given = {key: getattr(args, key, None) for key in ("size", "resize", "interpolation", "mean", "std")}
    return net, data_config(net, stored, **given)


def open_images(root: str, args: argparse.Namespace, config: dict[str, Any], split: str = "",
                net: nn.Module | None = None) -> ImageData:
    from ..data import eval_transform, open_dataset
    from ..state import state_of

    data = open_dataset(root, split, transform=eval_transform(**config), class_map=args.class_map)
    known = state_of(net).class_names if net is not None else None
    if known and not args.class_map and len(data.class_names) < len(known) and set(data.class_names) <= set(known):
        # A class without images must not shift the labels of those after it.
        class_map = {name: i for i, name in enumerate(known)}
        data = open_dataset(root, split, transform=data.transform, class_map=class_map)
    return data


def make_loader(data: Dataset, args: argparse.Namespace, **options: Any) -> DataLoader:
    from torch.utils.data import DataLoader

    from ..data import collate

    return DataLoader(data, args.batch_size, num_workers=args.workers, collate_fn=collate,
                      pin_memory=args.device.startswith("cuda"), **options)


def open_loader(root: str, args: argparse.Namespace, config: dict[str, Any], net: nn.Module) -> DataLoader:
    return make_loader(open_images(root, args, config, args.split, net), args)


def example(net: nn.Module, size: int, batch: int = 1) -> Any:
    """Random images (batch, channels of the net, size, size) of the net's device and dtype."""
    import torch
    from torch import nn

    parameter = next(net.parameters())
    channels = next((m.in_channels for m in net.modules() if isinstance(m, nn.Conv2d)), 3)
    generator = torch.Generator().manual_seed(0)
    return torch.randn(batch, channels, size, size, generator=generator).to(parameter.device, parameter.dtype)


def report_unreadable(data: ImageData) -> None:
    names: Sequence[str] = data.unreadable
    if names:
        more = f" and {len(names) - NAMED_UNREADABLE} more" if len(names) > NAMED_UNREADABLE else ""
        print(f"{len(names)} of {len(data)} images could not be read and were left out: "
              f"{', '.join(names[:NAMED_UNREADABLE])}{more}", file=sys.stderr)
