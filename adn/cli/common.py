"""What several commands share: options of one name mean one thing, nets and data are opened in one way."""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from ..convert import convert
from ..core.depth import Depth
from ..core.state import depths as all_depths
from ..core.state import only_converted, state_of
from ..data import images
from ..models.registry import ENTRIES, create_model
from ..tasks import TASKS, Task, task_of
from ..weights.checkpoint import load, read_metadata
from ..weights.foreign import load_weights

NAMED_UNREADABLE = 5
# What there is for nets of each task.
COMMANDS = {"classify": ("predict", "eval", "calibrate", "profile"), "detect": ("detect", "eval", "profile")}


def make_folder(file: str | Path | None) -> None:
    """Make the folder of a file to write, now and not after the work that it is the result of."""
    if file:
        Path(file).parent.mkdir(parents=True, exist_ok=True)


def add_source_arguments(parser: argparse.ArgumentParser) -> None:
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--checkpoint", metavar="FILE", help="a net, as adn.save writes it")
    source.add_argument("--model", metavar="NAME", help="a detector by name, such as rtdetr_r50vd, for --weights")
    parser.add_argument("--weights", metavar="FILE", help="weights for --model, such as the authors'")


def add_task_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--task", choices=tuple(COMMANDS), help="be sure that the net does this (what it does "
                        "is known without)")


def check_task(args: argparse.Namespace, task: Task) -> None:
    if args.task not in (None, task.name):
        raise ValueError(f"--task {args.task}, but {args.checkpoint or args.model} is made to {task.name}")


def add_depth_argument(parser: argparse.ArgumentParser, default: str = "chain") -> None:
    parser.add_argument(
        "--depth", metavar="DEPTHS",
        help='which depths: "all", "chain" (FFFF, TFFF, TTFF to TTTT), or a list such as super,TTFF,base or '
             f'"TTFFF|6,base" (default: {default})',
    )


def add_data_arguments(parser: argparse.ArgumentParser, batch_size: str = "64", split: str = "DATA itself") -> None:
    group = parser.add_argument_group("data")
    group.add_argument("--split", default="", help=f"the sub-folder or split of DATA to open (default: {split})")
    group.add_argument("--class-map", default="", metavar="FILE", help="text file of class names, one per line, in the "
                       "order of their labels (default: the names of the sub-folders, sorted)")
    group.add_argument("--batch-size", type=int, metavar="N", help=f"images per batch (default: {batch_size})")
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
    if name:
        try:
            torch.device(name)
        except RuntimeError:
            raise ValueError(f"--device {name}: there is no such kind of device; pass cpu, cuda or cuda:1") from None
    if name and name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"--device {name}: this torch ({torch.__version__}) finds no CUDA device")
    return name or ("cuda" if torch.cuda.is_available() else "cpu")


def load_net(args: argparse.Namespace, task: Task | None = None, num_classes: int | None = None) -> nn.Module:
    """The net of `--checkpoint`, or the detector of `--model` with `--weights`, on `--device` (which is filled in).

    Raises:
        ValueError: if it is not for this task; None = any will do.
    """
    weights = getattr(args, "weights", None)
    if args.checkpoint and weights:
        raise ValueError("--weights are for a detector of --model; a checkpoint has its own")
    if not args.checkpoint and not weights:
        raise ValueError(f"--model {args.model} alone has random weights: pass --weights, or --checkpoint instead")
    args.device = pick_device(args.device)
    if args.checkpoint:
        net = load(args.checkpoint)
        if read_metadata(args.checkpoint)["routing"] is not None:
            raise ValueError(f"{args.checkpoint} has a router, which chooses depths by itself: adn route eval, or "
                             "adn route threshold")
    else:
        net = build(args.model, num_classes)
        load_weights(net, weights)
    if task is not None and (found := task_of(net)) is not task:
        raise ValueError(f"{args.checkpoint} holds a {found.makes}, and this is for {task.makes}s; for {found.makes}s "
                         f"there are {', '.join(f'adn {command}' for command in COMMANDS[found.name])}")
    return net.to(args.device).eval()


def preparation(args: argparse.Namespace, net: nn.Module) -> dict[str, Any]:
    """How a net wants its images: as the options say, else as its file does, else as it is usual."""
    given = {key: getattr(args, key, None) for key in ("size", "resize", "interpolation", "mean", "std")}
    stored = read_metadata(args.checkpoint)["extra"].get("data") if args.checkpoint else None
    return task_of(net).preparation(net, stored, **given)


def task_of_model(name: str) -> Task:
    """What a model of this library is for."""
    if name not in ENTRIES:
        raise ValueError(f"no detector {name!r}; there are {', '.join(ENTRIES)}. A classifier comes as a file of "
                         "adn.save: --checkpoint")
    return TASKS[ENTRIES[name].task]


def build(name: str, num_classes: int | None = None) -> nn.Module:
    """A model of this library by name, converted if it is not any-depth."""
    task_of_model(name)  # which raises the error of a name that is none
    net = create_model(name, num_classes=num_classes and num_classes + ENTRIES[name].background)
    return net if ENTRIES[name].any_depth else convert(net)


def open_images(root: str, args: argparse.Namespace, net: nn.Module, split: str = "", known: bool = True) -> Dataset:
    """Images of a classifier, prepared as it wants them; with `known`, labels are those of its classes."""
    task = task_of(net)
    data = task.open(root, split, args.class_map, state_of(net).class_names if known else None, False)
    data.transform = task.transform(**preparation(args, net))
    return data


def make_loader(data: Dataset, args: argparse.Namespace, task: Task, **options: Any) -> DataLoader:
    size = task.batch_size if args.batch_size is None else args.batch_size
    return DataLoader(data, size, num_workers=args.workers, collate_fn=task.collate,
                      pin_memory=args.device.startswith("cuda"), **options)


def image_files(paths: Iterable[Path]) -> list[Path]:
    """The files, and of folders the images in them."""
    endings = {ending for ending, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    found: list[Path] = []
    for path in paths:
        images = [path]
        if path.is_dir():
            images = sorted(file for file in path.iterdir() if file.suffix.lower() in endings)
            if not images:
                raise ValueError(f"no image in the folder {path}")
        found += images
    return found


def each_image(task: Task, net: nn.Module, args: argparse.Namespace, sources: Sequence[Path], upright: bool
               ) -> Iterator[tuple[int, Image.Image, dict[str, Tensor]]]:
    """The index of each image, the image and what the net finds on it; a line to stderr for one that cannot be read."""
    prepared = preparation(args, net)
    for note in images.notes_of_range(functools.partial(Image.open, source) for source in sources):
        print(note, file=sys.stderr)
    for i, source in enumerate(sources):
        try:
            with Image.open(source) as file:
                image = images.to_rgb(images.upright(file) if upright else file)
        except images.UNREADABLE as error:
            print(f"{source}: cannot be read ({error})", file=sys.stderr)
        else:
            yield i, image, task.find(net, image, prepared)


def warn_if_untrained(net: nn.Module, depths: Iterable[Depth]) -> None:
    if any(depth != state_of(net).full for depth in depths) and only_converted(net):
        print("this net was converted and never trained as an any-depth net: only its full depth is of use before adn "
              "train --checkpoint (or adn.SelfDistillation) has taught it the others", file=sys.stderr)


def report_others(net: nn.Module, shown: int) -> None:
    every = len(all_depths(net))
    if shown < every:
        print(f"{shown} of {every} depths; --depth all measures every one")


def report_unreadable(data: Dataset) -> None:
    names: Sequence[str] = data.unreadable
    if names:
        more = f" and {len(names) - NAMED_UNREADABLE} more" if len(names) > NAMED_UNREADABLE else ""
        print(f"{len(names)} of {len(data)} images could not be read and were left out: "
              f"{', '.join(names[:NAMED_UNREADABLE])}{more}", file=sys.stderr)
