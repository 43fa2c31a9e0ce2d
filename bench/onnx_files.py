"""One ONNX file for every depth: its largest difference to the net, its size, and its speed in ONNX Runtime against a
static file of the same depth.

Weights are random, norms' too. Rounds of both files alternate in one process; times are medians, in milliseconds, of
one image. `size_ratio` is the file's to the parameters and buffers of the any-depth net.

    python bench/onnx_files.py --csv bench/results/onnx_cpu.csv
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import onnxruntime
import timm
import torch
from common import columns, header, write_rows
from models import randomised
from torch import nn

import adn
from adn.core.state import is_any_depth, state_of
from adn.runtime.onnx import entries_of

CLASSIFIERS = ("resnet50", "mobilenetv2_100", "vit_base_patch16_224", "swin_tiny_patch4_window7_224", "convnext_tiny",
               "regnety_032")
DETECTORS = {"rtdetr_r18vd": 640, "rtdetr_r50vd": 640, "anydepth_yolov12n": 640}
FIELDS = ("model", "depths", "largest_difference", "export_seconds", "mb", "size_ratio", "super_ms",
          "super_static_ms", "super_ratio", "base_ms", "base_static_ms", "base_ratio")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=[*CLASSIFIERS, *DETECTORS])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--csv", type=Path)
    args = parser.parse_args()
    rows = []
    for name in args.models:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(row_of(name, Path(folder), args.rounds))
        print(" ".join(f"{key}={value}" for key, value in rows[-1].items()), flush=True)
        if args.csv:
            write_rows(args.csv, rows, header() | {"onnxruntime": onnxruntime.__version__}, FIELDS)
    print(columns([FIELDS, *(tuple(str(row[field]) for field in FIELDS) for row in rows)]))


def row_of(name: str, folder: Path, rounds: int) -> dict[str, object]:
    torch.manual_seed(0)
    if name in DETECTORS:
        net: nn.Module = adn.create_model(name)
        net = net if is_any_depth(net) else adn.convert(net)
    else:
        net = adn.convert(timm.create_model(name))
    net = randomised(net).eval()
    size = DETECTORS.get(name, 224)
    x = torch.rand(1, 3, size, size)
    start = time.perf_counter()
    differences = adn.export_onnx(net, folder / "net.onnx", x)
    seconds = time.perf_counter() - start
    held = sum(value.numel() * value.element_size() for value in net.state_dict().values())
    row = {"model": name, "depths": len(differences), "largest_difference": f"{max(differences.values()):.1e}",
           "export_seconds": round(seconds, 1), "mb": round((folder / "net.onnx").stat().st_size / 1e6, 1),
           "size_ratio": round((folder / "net.onnx").stat().st_size / held, 3)}
    every, state = session_of(folder / "net.onnx"), state_of(net)
    for which, depth in (("super", state.full), ("base", state.base)):
        adn.export_onnx(net, folder / "static.onnx", x, depth=depth)
        static = session_of(folder / "static.onnx")
        inputs = {"images": x.numpy()}
        runs = [(every, inputs | {"depth": entries_of(depth)}), (static, inputs)]
        times: list[list[float]] = [[], []]
        for step in range(-3, rounds):
            for (session, given), own in zip(runs, times, strict=True):
                start = time.perf_counter()
                session.run(None, given)
                if step >= 0:
                    own.append(1e3 * (time.perf_counter() - start))
        ours, theirs = map(np.median, times)
        row |= {f"{which}_ms": round(ours, 2), f"{which}_static_ms": round(theirs, 2),
                f"{which}_ratio": round(ours / theirs, 3)}
    return row


def session_of(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


if __name__ == "__main__":
    main()
