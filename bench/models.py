"""Forwards of whole nets: each depth of ours against the static network of that depth, and against physics.

Contenders, for every model, type, batch size and depth:

- `fused`: `adn.fuse(net)` at that depth. `fused, compiled`: with its paths compiled, for nets without batch norm.
- `eager`: the extracted static network, channels last.
- `compiled`: `torch.compile` of it. `max-autotune`: the same in that mode, by default on a GPU only.
- `floor`: no program, but what to compare with: for each convolution and linear layer the time its bytes (input,
  output, weight) or its products take, whichever is more, at what a copy of large tensors and a large matrix product
  (on a CPU: convolution) reach in the same process. Tensors that stay in a cache may be faster.

On a GPU all are captured in CUDA graphs, and what is timed, between events, is their replay. Rounds interleave the
contenders in an order drawn anew. `error` is the largest difference from the float64 network, over its largest value.

    python bench/models.py --csv bench/results/models_cpu.csv --models resnet50 mobilenetv2_100 --batch-sizes 1 8
    python bench/models.py --device cuda --dtypes bfloat16 float16 --csv bench/results/models_h200.csv --seconds 300
    python bench/models.py --models resnet50 --depths all --plot bench/results/latency_by_depth.png

Each depth is first measured without what compiles, then with it, and last with what compiles for minutes; of two rows
the later one counts. A run with a file that exists goes on with what is missing in it.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import functools
import itertools
import platform
import random
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path

import numpy as np
import timm
import torch
from common import Results, columns
from torch import Tensor, nn
from tqdm import tqdm

import adn
from adn.measure.accuracy import choose_depths
from adn.measure.profile import device_name, require_matplotlib
from adn.runtime.cuda_graphs import CudaGraphs
from adn.runtime.fuse import FusedNet, fuse
from adn.runtime.layers import ConvNormAct

MODELS = ("resnet50", "mobilenetv2_100", "vit_base_patch16_224", "swin_tiny_patch4_window7_224")
# In the order of the time they take to compile.
CONTENDERS = ("fused", "eager", "compiled", "fused, compiled", "max-autotune")
PASSES = tuple(CONTENDERS[:n] for n in (2, 3, 5))
KEY = ("model", "dtype", "batch", "depth", "contender")
ROUND_US = 200_000  # of replays in a row
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's mallopt
TUNED = "max-autotune-no-cudagraphs"  # captured like all others, so not in the mode that captures by itself


def randomised(model: nn.Module) -> nn.Module:
    """With norms that are not the identity and residual branches that are not zero, as after training."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for module in model.modules():
            if adn.core.behaviours.is_norm(module):
                for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
                    if tensor.is_floating_point():
                        low, high = (0.5, 1.5) if name in ("weight", "running_var") else (-0.1, 0.1)
                        tensor.uniform_(low, high, generator=generator)
    return model


def reach(device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """Bytes per second of a copy, read and written, and operations per second of products."""
    on_gpu = device.type == "cuda"
    a = torch.randn(2**28 if on_gpu else 2**24, device=device, dtype=dtype)
    b = torch.empty_like(a)
    if on_gpu:
        size = 8192
        m, n = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
        product, operations = (lambda: m @ n), 2 * size**3
    else:
        conv = nn.Conv2d(256, 256, 3, padding=1, dtype=dtype).eval().to(memory_format=torch.channels_last)
        x = torch.randn(4, 256, 28, 28, dtype=dtype).to(memory_format=torch.channels_last)
        product, operations = (lambda: conv(x)), 2 * x.numel() * 256 * 9

    def best(call: Callable[[], object]) -> float:
        times, until = [], time.perf_counter() + 1
        while time.perf_counter() < until:
            start = time.perf_counter()
            call()
            if on_gpu:
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        return min(times)

    return 2 * a.nbytes / best(lambda: b.copy_(a)), operations / best(product)


def floor_ms(static: nn.Module, x: Tensor, speeds: tuple[float, float]) -> float:
    """Layer by layer, at the speeds that `reach` found."""
    total = 0.0

    def add(layer: nn.Module, args: tuple, y: Tensor) -> None:
        nonlocal total
        moved = sum(t.nbytes for t in (args[0], y, layer.weight))
        products = 2 * y.numel() * layer.weight[0].numel()
        total += max(moved / speeds[0], products / speeds[1])

    hooks = [m.register_forward_hook(add) for m in static.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    static(x)
    for hook in hooks:
        hook.remove()
    return 1e3 * total


def at(fused: FusedNet, depth: adn.Depth, x: Tensor) -> Tensor:
    adn.set_depth(fused, depth)
    return fused(x)


def contenders(net: nn.Module, x: Tensor, depth: adn.Depth, fused: FusedNet, compiled: FusedNet, names: Iterable[str]
               ) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    static = adn.extract(net, depth).to(memory_format=torch.channels_last)
    made = {
        "fused": functools.partial(at, fused, depth, x),
        "fused, compiled": functools.partial(at, compiled, depth, x),
        "eager": functools.partial(static, x),
        "compiled": functools.partial(torch.compile(copy.deepcopy(static)), x),
        "max-autotune": functools.partial(torch.compile(copy.deepcopy(static), mode=TUNED), x),
    }
    yield from ((name, made[name]) for name in names)


def timed(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, np.ndarray]:
    """Milliseconds of each round.

    Memory that a call frees stays with the process: else glibc returns it, and what is called next pays for its pages.
    """
    if sys.platform == "linux" and platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    times = {name: np.empty(rounds) for name in calls}
    order = random.Random(0)
    for step in range(-3, rounds):
        for name in order.sample(list(calls), len(calls)):
            start = time.perf_counter()
            calls[name]()
            if step >= 0:
                times[name][step] = (time.perf_counter() - start) * 1e3
    return times


def timed_on_gpu(calls: dict[str, Callable[[], object]], rounds: int, launching: Collection[str] = ()
                 ) -> dict[str, np.ndarray]:
    """The same of CUDA graphs of the calls; of calls themselves that launch such graphs, or have begun with one."""
    graphs = CudaGraphs(torch.device("cuda", torch.cuda.current_device()))
    replays = {name: call if name in launching else graphs.capture(call).replay for name, call in calls.items()}
    repeats = {}
    for name, replay in replays.items():
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        for event in events:
            event.record()
            replay()
        torch.cuda.synchronize()
        repeats[name] = max(1, min(100, int(ROUND_US / rounds / max(1e3 * events[0].elapsed_time(events[1]), 1))))
    times = {name: np.empty(rounds) for name in calls}
    order = random.Random(0)
    for step in range(-3, rounds):
        for name in order.sample(list(calls), len(calls)):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(repeats[name]):
                replays[name]()
            end.record()
            end.synchronize()
            if step >= 0:
                times[name][step] = start.elapsed_time(end) / repeats[name]
    return times


def measure(net: nn.Module, exact: nn.Module, x: Tensor, depth: adn.Depth, fused: FusedNet, compiled: FusedNet,
            names: Iterable[str], rounds: int, speeds: tuple[float, float]) -> Iterator[dict[str, object]]:
    """Rows of one depth, without what is the same in all of its model."""
    compiled.compile(**({"mode": TUNED} if x.is_cuda else {}))
    with adn.at_depth(exact, depth):
        wanted = exact(x[:1].double())
    calls, errors = {}, {}
    for name, call in contenders(net, x, depth, fused, compiled, names):
        y = call()[:1].double()
        calls[name], errors[name] = call, ((y - wanted).abs().max() / wanted.abs().max()).item()
    times = (timed_on_gpu if x.is_cuda else timed)(calls, rounds)
    floor = floor_ms(adn.extract(net, depth), x, speeds)
    row = {"depth": str(depth)}
    yield {**row, "contender": "floor", "p50_ms": round(floor, 5), "p99_ms": "", "error": ""}
    for name, each in times.items():
        p50, p99 = np.percentile(each, [50, 99])
        yield {**row, "contender": name, "p50_ms": round(p50, 5), "p99_ms": round(p99, 5),
               "error": f"{errors[name]:.1e}"}
    torch._dynamo.reset()


def choose(net: nn.Module, text: str) -> list[adn.Depth]:
    try:
        return choose_depths(net, text)
    except ValueError:
        return choose_depths(net, "super,base")


def summary(rows: list[dict]) -> str:
    """Per model, type, batch and depth: milliseconds of each contender, and ours over theirs."""
    cases: dict[tuple, dict[str, float]] = {}
    for row in rows:
        cases.setdefault(tuple(str(row[name]) for name in KEY[:4]), {})[row["contender"]] = float(row["p50_ms"])
    lines = [[*KEY[:4], *(f"{name} (ms)" for name in CONTENDERS), "ours / eager", "ours / compiled", "ours / floor"]]
    for key, ms in cases.items():
        ours = min(ms.get(name, float("inf")) for name in ("fused", "fused, compiled"))
        ratios = [f"{ours / ms[name]:.2f}" if name in ms else "-" for name in ("eager", "compiled", "floor")]
        lines.append([*key, *(f"{ms[name]:.3f}" if name in ms else "-" for name in CONTENDERS), *ratios])
    return columns(lines)


def plot(rows: list[dict], path: Path, machine: str) -> None:
    """Latency by depth of the first model, type and batch size in the rows."""
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    first = [rows[0][name] for name in KEY[:3]]
    ms: dict[str, dict[str, float]] = {}
    for row in rows:
        if [row[name] for name in KEY[:3]] == first:
            ms.setdefault(row["contender"], {})[str(row["depth"])] = float(row["p50_ms"])
    labels = {"eager": ("static networks, eager", "C7", "s"),
              "compiled": ("static networks, torch.compile", "C1", "^"),
              "fused": ("one any-depth net, adn.fuse", "C0", "o")}
    depths = sorted(ms["fused"], key=ms["fused"].__getitem__)
    figure = Figure(figsize=(7.5, 4.2), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for name, (label, colour, marker) in labels.items():
        if name in ms:
            axes.plot(depths, [ms[name][depth] for depth in depths], marker, color=colour, label=label, linestyle="-",
                      linewidth=0.8, markersize=5)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("latency (ms)")
    axes.set_title(f"{first[0]}, {first[1]}, batch {first[2]}, {machine}", fontsize=9)
    axes.tick_params(axis="x", rotation=60)
    axes.grid(axis="y", alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path)
    print(f"written: {path}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--size", type=int, default=224, help="side of the images")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--dtypes", nargs="+", default=["float32"], choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--depths", default="FFFF,TTFF,TTTT",
                        help='"all", "chain", or depths with commas between them; of nets with another number of '
                        "stages their super-net and base-net")
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS)
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no further depth after this")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--plot", type=Path, help="figure of latency by depth, of the first model")
    args = parser.parse_args()
    device = torch.device(args.device)
    wanted = args.contenders or CONTENDERS[:None if device.type == "cuda" else -1]
    results = Results(args.csv, KEY, device, args.seconds)
    torch._dynamo.config.recompile_limit = 64
    cases = list(itertools.product(args.dtypes, args.batch_sizes, args.models))
    with torch.inference_mode(), tqdm(cases, disable=None, leave=False) as bar:
        speeds = {}
        for dtype, batch, name in bar:
            bar.set_postfix_str(f"{name}, {dtype}, batch {batch}")
            if results.late():
                break
            with results.attempt(name, dtype, f"batch {batch}"):
                model = randomised(timm.create_model(name).eval())
                exact = adn.convert(copy.deepcopy(model).double()).to(device)
                net = adn.convert(model).to(device, getattr(torch, dtype))
                x = torch.randn(batch, 3, args.size, args.size, device=device, dtype=getattr(torch, dtype))
                x = x.contiguous(memory_format=torch.channels_last)
                if dtype not in speeds:
                    speeds[dtype] = reach(device, x.dtype)
                fused, compiled = fuse(net), fuse(net)
                folded = any(isinstance(layer, ConvNormAct) for layer in fused.modules())
                for each, depth in itertools.product(PASSES, choose(net, args.depths)):
                    names = [who for who in each if who in wanted and not (folded and who == "fused, compiled")]
                    key = name, dtype, batch, depth
                    if results.lacks(*((*key, who) for who in (*names, "floor"))):
                        for row in measure(net, exact, x, depth, fused, compiled, names, args.rounds, speeds[dtype]):
                            results.add(dict(zip(KEY, key)) | row)
    rows = [row for row in results.rows if row["model"] in args.models]
    print(summary(rows))
    if args.plot:
        plot(rows, args.plot, device_name(device))
    return results.code


if __name__ == "__main__":
    sys.exit(main())
