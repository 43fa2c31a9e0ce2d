"""Write a net to one ONNX file that holds every depth, to run without this library.

The file takes `images` and `depth`: one bool per stage, true where its refinement
path is bypassed; of a net with a stack of layers int32, after the flags how many
layers to run. It is compared with the net at every depth (of more than 64, at 64)
in ONNX Runtime before it is there; a file that differs is not written. Its
properties (adn.stages, adn.depths, adn.classes, adn.data, ...) say what it holds
and how images are prepared.

examples:
  adn export --checkpoint net.safetensors --onnx net.onnx
  adn export --checkpoint net.safetensors --onnx base.onnx --depth base
  adn export --checkpoint net.safetensors --onnx net.onnx --batch 8
"""

from __future__ import annotations

import argparse
import os
import time

from ..core.state import state_of
from ..runtime.onnx import MOST_CHECKED, OPSET, entries_of, export_onnx, require_onnx
from ..tasks import example
from . import common


def add_arguments(parser: argparse.ArgumentParser) -> None:
    common.add_source_arguments(parser)
    parser.add_argument("--onnx", required=True, metavar="FILE", help="the file to write")
    parser.add_argument("--depth", help="write this depth alone, in a file without the second input (default: all)")
    parser.add_argument("--batch", type=int, metavar="N", help="take batches of N images alone (default: of any size)")
    parser.add_argument("--opset", type=int, default=OPSET, help="of ONNX, 18 or later (default: %(default)s)")
    parser.set_defaults(device="cpu")
    common.add_image_arguments(parser)


def run(args: argparse.Namespace) -> int:
    require_onnx()
    if args.batch is not None and args.batch < 1:
        raise ValueError(f"--batch {args.batch}; pass at least 1")
    common.make_folder(args.onnx)
    net = common.load_net(args).eval()
    prepared = common.preparation(args, net)
    images = example(net, prepared["size"], args.batch or 1)
    start = time.perf_counter()
    print("exporting, which takes some ten seconds to minutes", flush=True)
    found = export_onnx(net, args.onnx, images, depth=args.depth, dynamic_batch=args.batch is None, opset=args.opset,
                        extra={"data": prepared})
    checked = f"depth {args.depth}" if args.depth else f"all {len(found)} depths" if len(found) < MOST_CHECKED else (
        f"{len(found)} depths")
    print(f"wrote {args.onnx}: {os.path.getsize(args.onnx) / 1e6:.1f} MB, {time.perf_counter() - start:.0f} s; "
          f"compared at {checked}, the largest difference is {max(found.values()):.1e} of the largest value")
    shape = ", ".join(map(str, images.shape[1:]))
    print(f"images: float32 ({args.batch or 'B'}, {shape})")
    if not args.depth:
        base = entries_of(state_of(net).base)
        print(f"depth:  {base.dtype} {base.shape}, of the base-net {base.tolist()}")
    return 0
