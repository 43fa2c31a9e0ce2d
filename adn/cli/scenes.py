"""Write scenes of real handwritten digits with their boxes, to train a detector on.

OUT becomes a folder in COCO's format: scikit-learn's 8 x 8 digits, enlarged, in
various sizes and colours, partly hiding each other, on backgrounds with lines,
blobs and pieces of digits. The digits of the validation scenes occur in no
training scene. No download; the same seed gives the same scenes.

examples:
  adn scenes digits
  adn scenes digits --images 500 --size 128 --seed 1
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from ..data.scenes import SPLITS, write_scenes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("out", metavar="OUT", type=Path, help="the folder to make")
    parser.add_argument("--images", type=int, default=2000, metavar="N", help="scenes to train on (default: 2000)")
    parser.add_argument("--val-images", type=int, metavar="N", help="scenes to evaluate on (default: a fifth of that)")
    parser.add_argument("--size", type=int, default=256, metavar="N", help="their side in pixels (default: 256)")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same scenes (default: 0)")


def run(args: argparse.Namespace) -> int:
    out = write_scenes(args.out, args.images, args.val_images, args.size, args.seed)
    for split in SPLITS:
        content = json.loads((out / f"instances_{split}.json").read_text(encoding="utf-8"))
        print(f"{split}: {len(content['images'])} images, {len(content['annotations'])} digits")
    print(f"written: {out}")
    return 0
