"""What several commands share: options of one name mean one thing, nets and data are opened in one way."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn
    from torch.utils.data import DataLoader, Dataset

    from ..data.images import ImageData

NAMED_UNREADABLE = 5
DETECTOR_SIZE = 640  # of published detectors
BATCH_SIZE = 64  # of classifiers


def make_folder(file: str | None) -> None:
    """Make the folder of a file to write, now and not after the work that it is the result of."""
    if file:
        Path(file).parent.mkdir(parents=True, exist_ok=True)


def add_source_arguments(parser: argparse.ArgumentParser) -> None:
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--checkpoint", metavar="FILE", help="a net, as adn.save writes it")
    source.add_argument("--model", metavar="NAME", help="a detector by name, such as rtdetr_r50vd, for --weights")
    parser.add_argument("--weights", metavar="FILE", help="weights for --model, such as the authors'")


def add_task_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--task", choices=("classify", "detect"), help="be sure that the net does this (what it does "
                        "is known without)")


def check_task(args: argparse.Namespace, detects: bool) -> None:
    task = "detect" if detects else "classify"
    if args.task not in (None, task):
        raise ValueError(f"--task {args.task}, but {args.checkpoint or args.model} is made to {task}")


def add_depth_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--depth", metavar="DEPTHS",
        help='which depths: "all", "chain" (FFFF, TFFF, TTFF to TTTT; the default), or a list such as super,TTFF,base '
             'or "TTFFF|6,base"',
    )


def add_data_arguments(parser: argparse.ArgumentParser, batch_size: str = str(BATCH_SIZE), split: str = "DATA itself"
                       ) -> None:
    group = parser.add_argument_group("data")
    group.add_argument("--split", default="", help=f"the sub-folder or split of DATA to open (default: {split})")
    group.add_argument("--class-map", default="", metavar="FILE", help="text file of class names, one per line, in the "
                       "order of their labels (default: the names of the sub-folders, sorted)")
    group.add_argument("--batch-size", type=int, default=BATCH_SIZE, metavar="N",
                       help=f"images per batch (default: {batch_size})")
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
    """The classifier of `--checkpoint` on `--device` (which is filled in), and how it wants its images."""
    from ..models.registry import is_detector

    net = load_checkpoint(args)
    if is_detector(net):
        raise ValueError(f"{args.checkpoint} holds a detector, and this is for classifiers; for detectors there are "
                         "adn detect, adn eval and adn profile")
    return net, image_config(args, net)


def load_checkpoint(args: argparse.Namespace) -> nn.Module:
    """The net of `--checkpoint`, of whatever kind, on `--device` (which is filled in)."""
    from ..weights.checkpoint import load

    if getattr(args, "weights", None):
        raise ValueError("--weights are for a detector of --model; a checkpoint has its own")
    args.device = pick_device(args.device)
    return load(args.checkpoint, device=args.device).eval()


def image_config(args: argparse.Namespace, net: nn.Module) -> dict[str, Any]:
    """How a classifier wants its images."""
    from ..data.images import data_config

    given = {key: getattr(args, key, None) for key in ("size", "resize", "interpolation", "mean", "std")}
    return data_config(net, _stored(args), **given)


def detector_size(args: argparse.Namespace) -> int:
    """Side of the images that a detector gets."""
    from ..models.registry import ENTRIES
    from ..weights.checkpoint import read_metadata

    if args.size is None:
        return (_stored(args) or {}).get("size", DETECTOR_SIZE)
    name = (read_metadata(args.checkpoint)["origin"] or {}).get("name") if args.checkpoint else args.model
    stride = ENTRIES[name].stride if name in ENTRIES else 1
    if args.size < stride or args.size % stride:
        raise ValueError(f"--size {args.size}; {name or 'a detector'} takes multiples of {stride}, such as "
                         f"{DETECTOR_SIZE}")
    return args.size


def _stored(args: argparse.Namespace) -> dict[str, Any] | None:
    from ..weights.checkpoint import read_metadata

    return read_metadata(args.checkpoint)["extra"].get("data") if args.checkpoint else None


def build_detector(name: str, num_classes: int | None = None) -> nn.Module:
    """A detector by name, converted if it is not any-depth."""
    from ..convert import convert
    from ..models.registry import ENTRIES, create_model

    if name not in ENTRIES:
        raise ValueError(f"no detector {name!r}; there are {', '.join(ENTRIES)}. A classifier comes as a file of "
                         "adn.save: --checkpoint")
    net = create_model(name, num_classes=num_classes)
    return net if ENTRIES[name].any_depth else convert(net)


def load_weights_of(args: argparse.Namespace, num_classes: int | None) -> nn.Module:
    """The detector of `--model` with `--weights` on `--device` (which is filled in)."""
    from ..weights.foreign import load_weights

    if not args.weights:
        raise ValueError(f"--model {args.model} alone has random weights: pass --weights, or --checkpoint instead")
    args.device = pick_device(args.device)
    net = build_detector(args.model, num_classes)
    load_weights(net, args.weights)
    return net.to(args.device).eval()


def default_depths(args: argparse.Namespace) -> str:
    """Of a model that is not any-depth by itself, the only depth that its weights were trained at."""
    from ..models.registry import ENTRIES

    return "super" if args.model and not ENTRIES[args.model].any_depth else "chain"


def open_images(root: str, args: argparse.Namespace, config: dict[str, Any], split: str = "",
                net: nn.Module | None = None) -> ImageData:
    from ..core.state import state_of
    from ..data.images import eval_transform, open_dataset

    data = open_dataset(root, split, transform=eval_transform(**config), class_map=args.class_map)
    known = state_of(net).class_names if net is not None else None
    if known and not args.class_map and len(data.class_names) < len(known) and set(data.class_names) <= set(known):
        # A class without images must not shift the labels of those after it.
        class_map = {name: i for i, name in enumerate(known)}
        data = open_dataset(root, split, transform=data.transform, class_map=class_map)
    return data


def make_loader(data: Dataset, args: argparse.Namespace, **options: Any) -> DataLoader:
    from torch.utils.data import DataLoader

    from ..data.images import collate

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


def report_others(net: nn.Module, shown: int) -> None:
    from ..core.state import depths as all_depths

    every = len(all_depths(net))
    if shown < every:
        print(f"{shown} of {every} depths; --depth all measures every one")


def report_unreadable(data: ImageData) -> None:
    names: Sequence[str] = data.unreadable
    if names:
        more = f" and {len(names) - NAMED_UNREADABLE} more" if len(names) > NAMED_UNREADABLE else ""
        print(f"{len(names)} of {len(data)} images could not be read and were left out: "
              f"{', '.join(names[:NAMED_UNREADABLE])}{more}", file=sys.stderr)
