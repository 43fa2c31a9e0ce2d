"""Counts, not times: what a sweep over all depths compiles, and what one forward launches at each depth.

First table, for every way to compile: pieces of code compiled in a first sweep over all depths, compilations in a
second one, and at how many depths operators then run outside of compiled code. `torch.compile, flags traced` is what
the compiler does where it meets the flags, as in a net that was not cut along its stages. Compiled with a backend that
runs what it is given, so this takes no C++ compiler.

Second table: launches of one forward at each depth, of the extracted static network, of the converted net, of that with
`adn.accelerate`, and of the deploy form. On a GPU they are kernels; elsewhere calls of operators that write memory.

Third: megabytes of weights of a converted net, a deploy form beside it, and static networks for all depths.

    python bench/counts.py --csv bench/results/counts_cpu.csv
    python bench/counts.py --device cuda --csv bench/results/counts_h200.csv
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from unittest import mock

import timm
import torch
from common import columns, header, write_rows
from compilations import count
from models import randomised
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

import adn
from adn.runtime.accelerate import accelerate, use_kernels
from adn.runtime.compile import compile as compile_net
from adn.runtime.fuse import fuse

MODELS = ("resnet50", "mobilenetv2_100", "vit_tiny_patch16_224", "swin_tiny_patch4_window7_224")


def compiled(build: Callable[[], nn.Module], x: Tensor) -> Iterator[dict[str, object]]:
    """Rows of the first table."""

    def naive() -> nn.Module:
        with mock.patch("adn.convert.install"):
            return torch.compile(build(), backend="eager")

    def deploy() -> nn.Module:
        fused = fuse(build())
        fused.compile(backend="eager")
        return fused

    ways = {
        "torch.compile, flags traced": naive,
        "torch.compile": lambda: torch.compile(build(), backend="eager"),
        "adn.compile": lambda: compile_net(build(), backend="eager"),
        "adn.fuse, compiled": deploy,
    }
    for way, make in ways.items():
        torch._dynamo.reset()
        counts = count(make(), x)
        yield {"way": way, "depths": counts.depths, "compiled": counts.regions + counts.frames,
               "compiled_again": counts.recompiles, "given_up": len(counts.given_up),
               "depths_not_compiled": len(counts.uncompiled)}
    torch._dynamo.reset()


class _Writes(TorchDispatchMode):
    """Counts operators that return memory of their own or write to what they were given."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += not func.is_view and func._schema.name not in ("aten::detach", "aten::empty", "aten::new_empty")
        return func(*args, **(kwargs or {}))


def launches(call: Callable[[], object], device: torch.device) -> int:
    call()  # what is done once: packing weights, choosing algorithms
    if device.type != "cuda":
        with _Writes() as writes:
            call()
        return writes.count
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        call()
        torch.cuda.synchronize()
    return sum(event.count for event in trace.key_averages() if event.device_type == torch.autograd.DeviceType.CUDA)


def launched(net: nn.Module, x: Tensor) -> Iterator[dict[str, object]]:
    """Rows of the second table."""
    fused, fast = fuse(net), accelerate(copy.deepcopy(net))
    for depth in adn.depths(net):
        for each in (net, fused, fast):
            adn.set_depth(each, depth)
        with use_kernels(True):
            accelerated = launches(partial(fast, x), x.device)
        yield {"depth": str(depth), "static": launches(partial(adn.extract(net, depth), x), x.device),
               "converted": launches(partial(net, x), x.device), "accelerated": accelerated,
               "deploy_form": launches(partial(fused, x), x.device)}


def megabytes(*nets: nn.Module) -> float:
    """Of all their parameters and buffers; what they share counts once."""
    tensors = {t.data_ptr(): t.nbytes for net in nets for t in (*net.parameters(), *net.buffers())}
    return round(sum(tensors.values()) / 1e6, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--size", type=int, default=224, help="side of the images")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--csv", type=Path)
    args = parser.parse_args()
    rows: list[dict[str, object]] = []

    def add(model: str, table: str, key: str, what: str, value: object) -> None:
        rows.append({"model": model, "table": table, "case": key, "what": what, "value": value})

    for name in args.models:
        def build(name: str = name) -> nn.Module:
            return adn.convert(randomised(timm.create_model(name).eval())).to(args.device)

        x = torch.randn(2, 3, args.size, args.size, device=args.device).to(memory_format=torch.channels_last)
        net = build()
        with torch.no_grad():
            tables = {"compiled": list(compiled(build, x)), "launches": list(launched(net, x))}
        static = sum(megabytes(adn.extract(net, depth)) for depth in adn.depths(net))
        tables["megabytes"] = [{"net": "weights", "converted": megabytes(net), "with a deploy form": megabytes(
            net, fuse(net)), "static networks": round(static, 1)}]
        for table, lines in tables.items():
            text = columns([list(lines[0]), *(list(line.values()) for line in lines)])
            print(f"\n{name}, {table}\n{text}", flush=True)
            for line in lines:
                (_, key), *cells = line.items()
                for what, value in cells:
                    add(name, table, str(key), what, value)
    if args.csv:
        write_rows(args.csv, rows, header(args.device))


if __name__ == "__main__":
    main()
