r"""Forwards of detectors: each depth of one any-depth net against the static network of that depth.

Contenders, for every model, type, batch size and depth, to what the net gives (of a YOLO decoded boxes):

- `engine`: `adn.Engine(adn.fuse(net))` called at that depth, with its copies of input and output; on a CPU, where there
  is no graph to launch, `adn.fuse(net)` itself.
- `fused, compiled`: `adn.compile(adn.fuse(net))`, at that depth.
- `adn.compile`: the any-depth net, compiled in place.
- `static, eager`: the extracted static network, channels last.
- `static, compiled`: `torch.compile` of it; on a GPU in mode max-autotune.
- `engine, processed`, `static, compiled, processed`: the same to what is found, of a YOLO by non-maximum suppression.

On a GPU all but the engine, which does so itself, are captured in CUDA graphs, and what is timed, between events, is
their replay; processing comes after it. Rounds interleave the contenders in an order drawn anew. `error` is the largest
difference of the best scores of an image's queries or cells, in their order, from those of the float64 network.

Static models (`rtdetr_r50vd`) are converted. Besides names of this library `--models` takes `torchvision:NAME`, a
segmentation net, and `transformers:rt-detr-r50`, of which the object is converted. Those of torchvision that resize
images get a list of them, and all of their forward is timed, suppression included. By default there are two depths
between the extremes, with either half of the stages at their base. The summary also has the ratio of the slowest to the
fastest depth, which is published as 1.82 for RT-DETR-R101.

    python bench/detectors.py --csv bench/results/detectors_cpu.csv --batch-sizes 1 --rounds 10
    python bench/detectors.py --models fasterrcnn_resnet50_fpn_v2 anydepth_retinanet_resnet50_fpn \
        torchvision:deeplabv3_resnet50 transformers:rt-detr-r50 --batch-sizes 1 --rounds 5 --contenders engine \
        "static, eager" "static, compiled" --csv bench/results/detectors_others_cpu.csv
    python bench/detectors.py --device cuda --dtypes bfloat16 float32 --csv bench/results/detectors_h200.csv

Every depth is first measured without what takes minutes to compile, then with everything; of two rows the later one
counts. A run with a file that exists goes on with what is missing in it.
"""

from __future__ import annotations

import argparse
import copy
import functools
import itertools
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from common import Results, columns
from models import at, randomised, timed, timed_on_gpu
from torch import Tensor, nn
from tqdm import tqdm

import adn
from adn.core.state import is_converted
from adn.measure.accuracy import read_depths
from adn.models.registry import interface_of
from adn.runtime.compile import compile as compile_net
from adn.runtime.cuda_graphs import CudaGraphs
from adn.runtime.engine import Engine
from adn.runtime.fuse import fuse

MODELS = ("anydepth_rtdetr_r50vd", "rtdetr_r50vd", "anydepth_yolov12l", "anydepth_yolov12s")
CONTENDERS = ("engine", "fused, compiled", "adn.compile", "static, eager", "static, compiled")
PROCESSED = ", processed"
ALL = (*CONTENDERS, *(name + PROCESSED for name in CONTENDERS))
QUICK = ("engine", "static, eager")
RATIOS = (("engine", "static, eager"), ("engine", "static, compiled"), ("fused, compiled", "static, compiled"))
KEY = ("model", "dtype", "batch", "depth", "contender")


def detector(name: str) -> nn.Module:
    library, _, name = name.rpartition(":")
    if library == "torchvision":
        from torchvision.models import segmentation

        model = getattr(segmentation, name)(weights=None, weights_backbone=None)
    elif library == "transformers":
        model = rtdetr_of_transformers()
    else:
        model = adn.create_model(name)
    if not is_converted(model):
        adn.convert(model)
    return randomised(model).eval()


def rtdetr_of_transformers() -> nn.Module:
    """That with a ResNet-50."""
    import transformers

    backbone = transformers.RTDetrResNetConfig(depths=[3, 4, 6, 3], out_features=["stage2", "stage3", "stage4"])
    return transformers.RTDetrForObjectDetection(transformers.RTDetrConfig(backbone_config=backbone))


def usual_depths(net: nn.Module) -> list[adn.Depth]:
    """Both extremes, and between them those with the first or the second half of the stages at their base."""
    full, base = read_depths(net, ["super", "base"])
    half = len(full.flags) // 2
    flags = ([i < half for i in range(len(full.flags))], [i >= half for i in range(len(full.flags))])
    return [full, base, *(adn.Depth([*each, *full.layers]) for each in flags)]


class Case:
    """A net at one type and batch size, and what is made of it once for all depths.

    Args:
        exact: the same net in float64.
        batch: images (B, 3, H, W).
    """

    def __init__(self, net: nn.Module, exact: nn.Module, batch: Tensor) -> None:
        self.net, self.exact, self.batch = net, exact, batch
        self.x: Any = list(batch) if getattr(interface_of(net), "resizes", False) else batch
        # Captured like all others, so not in the mode that captures by itself.
        self.options = {"mode": "max-autotune-no-cudagraphs"} if batch.is_cuda else {}

    @functools.cached_property
    def ours(self) -> Callable[[Tensor, adn.Depth], object]:
        fused = fuse(self.net)
        # A graph for each depth that is measured, not for each segment.
        return Engine(fused, max_graphs=len(adn.depths(fused))) if self.batch.is_cuda else (
            lambda x, depth: at(fused, depth, x))

    @functools.cached_property
    def compiled(self) -> nn.Module:
        return compile_net(copy.deepcopy(self.net), **self.options)

    @functools.cached_property
    def fused_compiled(self) -> nn.Module:
        return compile_net(fuse(self.net), **self.options)

    def contender(self, name: str, depth: adn.Depth) -> Callable[[], object]:
        if name == "engine":
            return functools.partial(self.ours, self.x, depth)
        if name in ("adn.compile", "fused, compiled"):
            return functools.partial(at, self.compiled if name == "adn.compile" else self.fused_compiled, depth, self.x)
        static = adn.extract(self.net, depth).to(memory_format=torch.channels_last)
        if name == "static, compiled":
            static = torch.compile(static, **self.options)
        return functools.partial(static, self.x)

    def processed(self, call: Callable[[], object], captured: bool) -> Callable[[], object]:
        """To what is found on images of the size of the input."""
        sizes = [self.batch.shape[:1:-1]] * len(self.batch)
        if not captured:
            return lambda: self.net.postprocess(call(), sizes)
        graph = CudaGraphs(self.x.device).capture(call)
        return lambda: (graph.replay(), self.net.postprocess(graph.outputs, sizes))

    def rows(self, depth: adn.Depth, names: Iterable[str], rounds: int) -> Iterator[dict[str, object]]:
        with adn.at_depth(self.exact, depth):
            first = self.batch[:1].double()
            wanted = best_scores(self.exact([*first] if isinstance(self.x, list) else first))
        calls, errors, launching = {}, {}, {"engine"}
        for name in names:
            kind = name.removesuffix(PROCESSED)
            calls[name] = self.contender(kind, depth)
            errors[name] = difference(best_scores(calls[name]()), wanted)
            if kind != name:
                calls[name] = self.processed(calls[name], captured=self.batch.is_cuda and kind not in launching)
                launching.add(name)
        times = timed_on_gpu(calls, rounds, launching) if self.batch.is_cuda else timed(calls, rounds)
        for name, each in times.items():
            p50, p99 = np.percentile(each, [50, 99])
            yield {"depth": str(depth), "contender": name, "p50_ms": round(p50, 5), "p99_ms": round(p99, 5),
                   "error": f"{errors[name]:.1e}"}


def best_scores(outputs: Any) -> Tensor:
    """Of the first image, the best of each query, cell, object that was found or pixel, in descending order."""
    if isinstance(outputs, list):
        scores = outputs[0]["scores"][:, None]
    elif "decoded" in outputs:
        scores = outputs["decoded"][0, 4:].T
    elif "out" in outputs:
        scores = outputs["out"][0].flatten(1).T.softmax(-1)
    else:
        scores = outputs["pred_logits" if "pred_logits" in outputs else "logits"][0].sigmoid()
    return scores.double().amax(-1).sort(descending=True).values


def difference(found: Tensor, wanted: Tensor) -> float:
    """The largest; scores that only one of them has count whole."""
    longest = max(len(found), len(wanted))
    a, b = (F.pad(each, (0, longest - len(each))) for each in (found, wanted))
    return (a - b).abs().max().item() if longest else 0.0


def summary(rows: list[dict]) -> str:
    """Milliseconds of each contender, ours over theirs at the same depth; then the slowest depth over the fastest."""
    cases: dict[tuple, dict[str, float]] = {}
    for row in rows:
        cases.setdefault(tuple(str(row[name]) for name in KEY[:4]), {})[row["contender"]] = float(row["p50_ms"])
    seen = {row["contender"] for row in rows}
    names = [name for name in ALL if name in seen]
    lines = [[*KEY[:4], *(f"{name} (ms)" for name in names), *(" / ".join(pair) for pair in RATIOS)]]
    by_net: dict[tuple, dict[str, list[float]]] = {}
    for key, ms in cases.items():
        ratios = [f"{ms[ours] / ms[theirs]:.2f}" if {ours, theirs} <= ms.keys() else "-" for ours, theirs in RATIOS]
        lines.append([*key, *(f"{ms[name]:.3f}" if name in ms else "-" for name in names), *ratios])
        for name, value in ms.items():
            by_net.setdefault(key[:3], {}).setdefault(name, []).append(value)
    extremes = [[*KEY[:3], *names]]
    for key, each in by_net.items():
        extremes.append([*key, *(f"{max(each[name]) / min(each[name]):.2f}x" if name in each else "-"
                                 for name in names)])
    return f"{columns(lines)}\n\nslowest depth / fastest\n{columns(extremes)}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--size", type=int, default=640, help="side of the images")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--dtypes", nargs="+", default=["float32"], choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--depths", nargs="+", help="default: both extremes and two between")
    parser.add_argument("--contenders", nargs="+", default=CONTENDERS, choices=ALL, metavar="NAME",
                        help="of " + "; ".join(ALL))
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no further depth after this")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--csv", type=Path)
    args = parser.parse_args()
    device = torch.device(args.device)
    results = Results(args.csv, KEY, device, args.seconds)
    torch._dynamo.config.recompile_limit = 64
    cases = list(itertools.product(args.dtypes, args.batch_sizes, args.models))
    with torch.inference_mode(), tqdm(cases, disable=None, leave=False) as bar:
        for dtype, batch, name in bar:
            bar.set_postfix_str(f"{name}, {dtype}, batch {batch}")
            if results.late():
                break
            with results.attempt(name, dtype, f"batch {batch}"):
                net = detector(name)
                depths = read_depths(net, args.depths) if args.depths else usual_depths(net)
                x = torch.rand(batch, 3, args.size, args.size, device=device, dtype=getattr(torch, dtype))
                case = Case(copy.deepcopy(net).to(device, x.dtype), net.double().to(device),
                            x.contiguous(memory_format=torch.channels_last))
                for names, depth in itertools.product((QUICK, args.contenders), depths):
                    chosen = [each for each in names if each in args.contenders]
                    if results.lacks(*((name, dtype, batch, depth, each) for each in chosen)):
                        for row in case.rows(depth, chosen, args.rounds):
                            results.add({"model": name, "dtype": dtype, "batch": batch} | row)
            torch._dynamo.reset()
    print(summary([row for row in results.rows if row["model"] in args.models]))
    return results.code


if __name__ == "__main__":
    sys.exit(main())
