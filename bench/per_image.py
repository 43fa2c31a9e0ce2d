"""A depth for each image of a batch: what is saved when some images bypass the refinement blocks.

`refinement` is what refinement blocks cost, of which a share of the images bypasses all: the time of a forward minus
that of one in which all images do, over the same for one in which none does; 1 - share at best. Both of these are
forwards of the deploy form at one depth for all, so what a way costs by itself counts. Ways: `mask`, decided on the
device, by kernels that exit at once; `split`, where the host knows, into two smaller batches per stage; `auto`, the one
of the two that was measured to be faster.

    python bench/per_image.py --csv bench/results/per_image_cpu.csv
    python bench/per_image.py --device cuda --dtype bfloat16 --batch-size 64 --csv bench/results/per_image_h200.csv
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import timm
import torch
from common import Results, columns
from models import at, randomised, timed, timed_on_gpu

import adn
from adn.runtime.fuse import FusedNet, fuse

MODELS = ("resnet50", "mobilenetv2_100", "vit_base_patch16_224", "swin_tiny_patch4_window7_224")
KEY = ("model", "batch", "dtype", "way", "share_bypassed")


def ways(fused: FusedNet, x: torch.Tensor, shares: Iterable[float]) -> dict[str, Callable[[], object]]:
    """Forwards by "<way> <share>"."""
    stages, n = len(adn.get_depth(fused)), len(x)
    found: dict[str, Callable[[], object]] = {
        f"one depth {share}": partial(at, fused, adn.Depth([share == 1] * stages), x) for share in (0, 1)}
    for share in shares:
        bypassed = [i < round(share * n) for i in range(n)]
        depths = [adn.Depth([flag] * stages) for flag in bypassed]
        flags = torch.tensor([bypassed] * stages, dtype=torch.int32, device=x.device)
        found[f"mask {share}"] = partial(fused.per_image, x, flags)
        if not x.is_cuda:  # only what needs no host can be captured
            found[f"split {share}"] = partial(split_only, fused, x, depths)
            found[f"auto {share}"] = partial(fused.per_image, x, depths)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--size", type=int, default=224, help="side of the images")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--shares", type=float, nargs="+", default=[0.25, 0.5, 0.75], help="of images that bypass")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--csv", type=Path)
    args = parser.parse_args()
    results = Results(args.csv, KEY, args.device)
    for name in args.models:
        key = name, args.batch_size, args.dtype
        if not results.lacks(*((*key, "mask", share) for share in args.shares)):
            continue
        with results.attempt(name):
            dtype = getattr(torch, args.dtype)
            net = adn.convert(randomised(timm.create_model(name).eval())).to(args.device, dtype)
            x = torch.randn(args.batch_size, 3, args.size, args.size, device=args.device, dtype=dtype)
            calls = ways(fuse(net), x, args.shares)
            with torch.inference_mode():
                measured = (timed_on_gpu if x.is_cuda else timed)(calls, args.rounds)
            ms = {call: float(np.median(each)) for call, each in measured.items()}
            full, base = ms["one depth 0"], ms["one depth 1"]
            for call, each in ms.items():
                results.add(dict(zip(KEY, (*key, *call.rsplit(" ", 1)))) | {
                    "p50_ms": round(each, 4), "refinement": round((each - base) / (full - base), 3)})
    if results.rows:
        print(columns([list(results.rows[0]), *(list(row.values()) for row in results.rows)]))
    return results.code


def split_only(fused: FusedNet, x: torch.Tensor, depths: list[adn.Depth]) -> object:
    with mock.patch("adn.runtime.fuse.fastest", return_value="split"), mock.patch.object(fused, "_faster", {}):
        return fused.per_image(x, depths)


if __name__ == "__main__":
    sys.exit(main())
