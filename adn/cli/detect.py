"""Find objects on images, at a depth of your choice.

Prints for each image its objects: score, class, and the box as left, top, right,
bottom in pixels of the upright picture. --out draws them. A folder stands for the
images in it. An image that cannot be read is reported, the others go on; the exit
status is then 1.

Classes are named as in the checkpoint, or in --classes; 80 classes without a name
are taken for COCO's, as torchvision lists them.

examples:
  adn detect street.jpg --checkpoint detector.safetensors --out drawn
  adn detect photos --checkpoint detector.safetensors --depth base --json objects.json
  adn detect street.jpg --model anydepth_rtdetr_r50vd --weights r50.pth --depth "TTTTT|4"
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from ..core.state import get_depth, set_depth, state_of
from ..data.coco import read_class_names
from ..detect.draw import draw_detections
from ..models.registry import interface_of
from ..tasks import DETECT
from . import common

_QUALITY = 95
_NOT_CLASSES = ("__background__", "N/A")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("images", metavar="IMAGE", nargs="+", type=Path, help="image files, or folders of them")
    common.add_source_arguments(parser)
    parser.add_argument("--classes", metavar="FILE", help="names of the classes: annotations in COCO's format (.json), "
                        "or a text of one name per line")
    parser.add_argument("--depth", help='such as "TTTTT|4", super or base (default: that at which the file was saved, '
                        "or super)")
    parser.add_argument("--threshold", type=float, default=0.5, metavar="T", help="least score to show, from 0 to 1 "
                        "(default: 0.5)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="draw what was found, as JPEG files in this folder")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was found to a file as well")
    parser.add_argument("--size", type=int, metavar="N", help="side of the square the net sees, in pixels, a multiple "
                        "of 32 (default: as it was trained, else 640)")
    common.add_device_argument(parser)


def run(args: argparse.Namespace) -> int:
    if not 0 <= args.threshold <= 1:
        raise ValueError(f"--threshold {args.threshold}; pass a score from 0 to 1")
    sources = common.image_files(args.images)
    targets = _targets(sources, args.out)
    _check_kept(sources, [*filter(None, targets), *([args.json] if args.json else [])])
    common.make_folder(args.json)
    net, names = _load(args)
    if args.depth is not None:
        set_depth(net, args.depth)
    common.warn_if_untrained(net, [get_depth(net)])
    found = []
    for i, image, result in common.each_image(DETECT, net, args, sources, upright=True):
        result = {name: values[result["scores"] >= args.threshold] for name, values in result.items()}
        objects = [{"name": names[label], "label": label, "score": score, "box": box} for score, label, box in zip(
            *(result[key].tolist() for key in ("scores", "labels", "boxes")), strict=True)]
        found.append({"image": str(sources[i]), "width": image.width, "height": image.height, "objects": objects})
        print(sources[i])
        print("\n".join(_lines(objects)) or f"  nothing with a score of {args.threshold:g} or more", flush=True)
        if (target := targets[i]) is not None:
            target.parent.mkdir(parents=True, exist_ok=True)
            draw_detections(image, result, names, args.threshold).save(target, quality=_QUALITY)
    if args.json:
        content = {"depth": str(get_depth(net)), "threshold": args.threshold, "images": found}
        args.json.write_text(json.dumps(content), encoding="utf-8")
    return int(len(found) < len(sources))


def _load(args: argparse.Namespace) -> tuple[nn.Module, Sequence[str]]:
    """The net, and the names of its classes."""
    names = read_class_names(args.classes) if args.classes else None
    net = common.load_net(args, DETECT, len(names) if names else None)
    count = interface_of(net).num_classes
    names = names or state_of(net).class_names or (coco_names() if count == 80 else None)
    if names is None:
        return net, [f"class {label}" for label in range(count)]
    if len(names) != count:
        raise ValueError(f"{args.classes} names {len(names)} classes, the net has {count}")
    return net, names


def coco_names() -> list[str]:
    from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights

    listed = FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
    return [name for name in listed if name not in _NOT_CLASSES]


def _targets(sources: Sequence[Path], out: Path | None) -> list[Path | None]:
    """Where to draw each image: by its name, with a number where several have the same."""
    if out is None:
        return [None] * len(sources)
    targets: dict[Path, None] = {}
    for source in sources:
        target, number = out / f"{source.stem}.jpg", 2
        while target in targets:
            target, number = out / f"{source.stem}-{number}.jpg", number + 1
        targets[target] = None
    return list(targets)


def _check_kept(sources: Iterable[Path], targets: Iterable[Path]) -> None:
    def identity(path: Path) -> tuple[int, int]:
        return path.stat().st_dev, path.stat().st_ino

    known = {identity(source) for source in sources if source.exists()}
    for target in targets:
        if target.exists() and identity(target) in known:
            raise ValueError(f"{target} is one of the images, and would be overwritten; write to another folder")


def _lines(objects: Sequence[dict[str, Any]]) -> Iterator[str]:
    width = max((len(entry["name"]) for entry in objects), default=0)
    for entry in objects:
        box = "  ".join(f"{edge:7.1f}" for edge in entry["box"])
        yield f"  {entry['score']:6.1%}  {entry['name']:<{width}}  {box}"
