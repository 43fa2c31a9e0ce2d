"""First of all on a new GPU: what a copy and a matrix product reach, and whether cuDNN's convolution with ReLU gives
NaN where the memory of its output held NaN before.

PyTorch passes the new output, which nobody has written yet, as the tensor to be added, times 0. Where cuDNN computes
that product, NaN that another tensor has left there stays NaN. On other devices the op computes its reference.

    python bench/probe.py
    python bench/probe.py --device cuda
"""

from __future__ import annotations

import argparse
import itertools
import sys

import torch
from cases import filters, image
from models import reach

from adn_kernels.conv import conv, lay_out, out_shape

# Input channels, output channels, size of the window, stride.
CONVS = ((3, 64, 7, 2), (64, 64, 3, 1), (128, 128, 3, 2), (64, 256, 1, 1))
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def nan_left(dtype: torch.dtype, inputs: int, channels: int, kernel: int, stride: int) -> tuple[int, bool]:
    """How many elements of the output are NaN; and whether memory like its was found full of NaN just before."""
    x, weight = image(4, inputs, 56, dtype), lay_out(filters(channels, inputs, kernel, dtype), 1)
    bias = torch.zeros(channels, dtype=dtype)
    like = torch.empty(out_shape(x, weight, stride, kernel // 2), dtype=dtype, memory_format=torch.channels_last)
    # As large as the output, of which the allocator then returns one; and as large as what algorithms work in.
    full = [torch.full_like(like, torch.nan) for _ in range(8)]
    full += [torch.full((2**size,), torch.nan) for size in (20, 22, 24)]
    del full
    found = bool(torch.empty_like(like).isnan().all())
    y = conv(x, weight, None, bias, activation="relu", stride=stride, padding=kernel // 2, backend="cudnn")
    return int(y.isnan().sum()), found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    probes = list(itertools.product((False, True), DTYPES, CONVS))
    bad = seen = 0
    with torch.device(args.device), torch.inference_mode():
        for search, dtype, shape in probes:
            torch.backends.cudnn.benchmark = search
            count, found = nan_left(dtype, *shape)
            seen += found
            if count:
                bad += 1
                print(f"{count} NaN: {dtype}, {shape}, cudnn.benchmark={search}")
        copied, multiplied = reach(torch.device(args.device), torch.bfloat16)
    print(f"copy {copied / 1e12:.3g} TB/s, bf16 product {multiplied / 1e12:.3g} TFLOP/s, "
          f"NaN in {bad} of {len(probes)} convolutions ({seen} in memory that was full of it)")
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main())
