"""How long kernels and whole nets should take on an H200, by counting: nothing here is measured, and all tables say so.

Each launch is recorded without a GPU, compiled for sm_90 and read: registers and shared memory say how many programs a
multiprocessor holds, the machine code how many instructions each executes, what its loads bring in flight, and which
tensor-core instruction it uses. Of these limits the highest counts, and a graph's node is added:

- memory: the tensors of the launch, once each, at the speed of a copy
- tensor, shared, issue: clocks of the multiprocessor that has most programs; products, bytes into and out of shared
  memory for products, instructions
- latency: what a program loads, divided by what it has in flight, times `LATENCY_US`

The floor is memory, or products on all tensor cores.
What is not ours (cuDNN, cuBLAS, aten) counts as at its floor. The L2 cache, clocks that drop and compilers' schedules
do not appear.

    python bench/estimate.py --csv bench/results/estimate_h200.csv      # ops on all layers, nets at all depths
    python bench/estimate.py --tiles                                    # tiles that the model would choose

A run with a file that exists goes on with what is missing in it; Triton keeps what it has compiled.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from cases import BACKWARD, FORWARD, Case, dtype_name
from common import Results, columns
from detectors import detector, usual_depths
from kernels import OPS, cases_of, in_order
from shapes import NETWORKS
from timing import as_tuple, make_inputs
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from tqdm import tqdm

import adn
from adn.models.registry import ENTRIES
from adn.runtime.fuse import fuse
from adn_kernels.launch import cdiv, next_power_of_2

sys.path.append(str(Path(__file__).parents[1] / "tests" / "kernels"))
import aot
from aot import BANDWIDTH, RATE, Launch

LABEL = "estimate, nothing was measured"
# Of an H200's data sheet and NVIDIA's tuning guide for Hopper: multiprocessors; of each registers, bytes of shared
# memory (1024 of a program are taken by the system), threads and programs; products of the tensor cores, bytes of
# shared memory and instructions a clock; and the clock at which 989 TFLOP/s are those products.
SMS, REGISTERS, SHARED, THREADS, PROGRAMS = 132, 65536, 228 * 1024, 2048, 32
FLOPS, SHARED_BYTES, ISSUED, CLOCK_MHZ = 4096, 128, 4, 1830
# Assumed: from a load to its value while memory is busy; of a node of a graph, between the 1.2 and 2 that are usual.
LATENCY_US, NODE_US = 0.8, 1.6
NETS = ("resnet50", "mobilenetv2_100", "swin_tiny_patch4_window7_224", "anydepth_rtdetr_r50vd")
FIELDS = ("op", "network", "layer", "count", "batch", "shape", "dtype", "direction", "launches", "bytes", "flops",
          "floor_us", "limit", "programs", "programs_per_sm", "registers", "in_flight_kb", "instructions",
          "estimate_us", "measured_us")
KEY = ("op", "network", "layer", "batch", "direction")
# Tried by `--tiles`: rows and columns, depth, warps, stages.
TILES = [dict(zip(("BM", "BN", "BK", "num_warps", "num_stages"), tile)) for tile in (
    (16, 32, 128, 4, 4), (32, 32, 128, 4, 4), (64, 32, 64, 4, 3), (64, 32, 64, 4, 4), (64, 64, 64, 4, 3),
    (64, 64, 64, 4, 4), (128, 64, 64, 8, 3), (128, 64, 64, 4, 3), (128, 64, 64, 4, 4), (64, 128, 64, 4, 3),
    (64, 128, 64, 4, 4), (128, 128, 64, 8, 3), (128, 128, 64, 8, 4), (256, 64, 64, 8, 3), (128, 256, 64, 8, 3),
    (256, 128, 64, 8, 3))]
LARGE = TILES[11]


@dataclasses.dataclass(frozen=True)
class Code:
    """What was compiled of a launch.

    Attributes:
        registers: of a thread. spills, shared: bytes of a thread, of a program.
        straight, loop: instructions outside and inside of the main loop.
        loaded, loaded_in_loop: bytes that a thread's loads from global memory ask for, each executed once.
        mma: the tensor-core instruction, "" if there is none.
    """

    registers: int
    spills: int
    shared: int
    straight: int
    loop: int
    loaded: int
    loaded_in_loop: int
    mma: str


def read(launch: Launch) -> Code:
    binary = aot.binary_of(launch, "sm_90")
    sass, usage = aot.dumped(binary, "-sass"), aot.dumped(binary, "--dump-resource-usage")
    found = re.findall(r"/\*([0-9a-f]{4,})\*/ +(?:@!?U?P\w+ +)?([A-Z][\w.]*) *([^;]*);", sass)
    lines = [(int(address, 16), name, rest) for address, name, rest in found if name != "NOP"]
    loops = [(int(rest.split()[-1], 16), address) for address, name, rest in lines
             if name == "BRA" and int(rest.split()[-1], 16) < address]

    def within(loop: tuple[int, int]) -> list[tuple[int, str, str]]:
        return [line for line in lines if loop[0] <= line[0] <= loop[1]]

    # Of several the one with products, else the longest.
    main = max(map(within, loops), key=lambda body: (any("MMA" in name for _, name, _ in body), len(body)), default=[])
    mma = next((name for _, name, _ in lines if name.startswith(("HGMMA", "HMMA"))), "")
    registers, stack, local = (int(re.search(rf"{what}:(\d+)", usage)[1]) for what in ("REG", "STACK", "LOCAL"))
    return Code(registers, stack + local, binary.metadata.shared, len(lines) - len(main), len(main),
                *(sum(map(_width, (name for _, name, _ in some))) for some in (lines, main)), mma)


def _width(name: str) -> int:
    """Bytes that an instruction loads from global memory."""
    if not name.startswith(("LDG.", "LDGSTS.")):
        return 0
    size = re.search(r"\.(128|64|[US]16|[US]8)\b", name)
    return {"128": 16, "64": 8, "16": 2, "8": 1}[size[1].lstrip("US")] if size else 4


_codes: dict[tuple, Code] = {}


def code(launch: Launch) -> Code:
    """Compiled once for all launches that differ in nothing that a compiler knows."""
    known = {p.name for p in launch.kernel.params if p.is_constexpr}

    def kind(name: str, value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.dtype, value.storage_offset() * value.element_size() % 16 == 0
        if name in known or value is None:
            return value
        return ("one",) if value == 1 else (type(value), value % 16 == 0 if isinstance(value, int) else None)

    key = launch.name, str({name: kind(name, value) for name, value in launch.args.items()}), str(launch.options)
    if key not in _codes:
        _codes[key] = read(launch)
    return _codes[key]


def trips(launch: Launch) -> int:
    """Of the main loop of a kernel, by its arguments."""
    a = launch.args
    if "TAPS" in a:
        return a["TAPS"] ** 2 * cdiv(a["K"] * a["UNIT"], a["BK"])
    if "KERNEL" in a:
        return a["KERNEL"]  # rows of the window
    if "POINTS" in a:
        return cdiv(a["LEVELS"] * a["POINTS"], a["SAMPLES"])
    if "STAGES" in a and "BM" in a and "rows_per_part" not in a:  # each of the programs takes every so many-th tile
        return cdiv(cdiv(a["rows"], a["BM"]), launch.grid[0])
    for many, step in (("rows_per_part", "BM"), ("rows_per_program", "BM"), ("blocks", "BB")):
        if many in a and step in a:
            return cdiv(a[many], a[step])
    return a.get("tiles_per_program", a.get("tiles", 1))


@dataclasses.dataclass
class Node:
    """A launch, ours or not.

    Attributes:
        bytes, flops: of the tensors once each, of the products.
        limits: microseconds by name.
    """

    bytes: int
    flops: int
    limits: dict[str, float]
    programs: int = 0
    programs_per_sm: int = 0
    registers: int = 0
    in_flight: int = 0
    instructions: int = 0

    @property
    def floor(self) -> float:
        return 1e6 * max(self.bytes / BANDWIDTH, self.flops / RATE)

    @property
    def limit(self) -> str:
        return max(self.limits, key=self.limits.__getitem__)

    @property
    def estimate(self) -> float:
        return max(self.limits.values()) + NODE_US


def library(moved: int, flops: int = 0) -> Node:
    """Somebody else's kernel, at its floor."""
    return Node(moved, flops, {"memory": 1e6 * moved / BANDWIDTH, "tensor": 1e6 * flops / RATE})


def cost(launch: Launch) -> tuple[int, int]:
    """Bytes of the tensors, once each, and floating-point operations of products."""
    a = launch.args
    moved = sum(t.numel() * t.element_size() for t in a.values() if isinstance(t, Tensor))
    if "TAPS" in a:
        if a["TAPS"] == 1:  # of x, with stride 2, only these pixels
            moved += (a["M"] * a["K"] * a["UNIT"] - a["x"].numel()) * a["x"].element_size()
        return moved, 2 * a["M"] * a["C"] * a["K"] * a["UNIT"] ** 2 * a["TAPS"] ** 2
    if "KERNEL" in a:
        return moved, 2 * a["out"].numel() * a["KERNEL"] ** 2
    return moved, 0


def shared_bytes(a: Mapping[str, Any], mma: str) -> int:
    """Of one step of a product: written to shared memory once, read for every instruction that needs them."""
    size = a["x"].element_size()
    rows, columns = a["BM"] * a["BK"] * size, a["BN"] * a["BK"] * size
    wide = re.match(r"HGMMA\.64x(\d+)", mma)
    if wide:
        return rows + columns + rows * a["BN"] // int(wide[1]) + columns * a["BM"] // 64
    return 3 * (rows + columns)  # by two pairs of warps each


def node(launch: Launch, made: Code | None = None) -> Node:
    """Of a launch of ours; `made`: compiled of one like it."""
    a, made, steps = launch.args, made or code(launch), trips(launch)
    warps = launch.options.get("num_warps", 4)
    programs = functools.reduce(int.__mul__, launch.grid, 1)
    each = 256 * cdiv(made.registers * 32, 256) * warps  # registers are given in units of 256 a warp
    held = min(REGISTERS // each, SHARED // (made.shared + 1024), THREADS // (32 * warps), PROGRAMS)
    most = cdiv(programs, SMS)  # of a multiprocessor
    instructions = made.straight + made.loop * steps
    loaded = made.loaded + made.loaded_in_loop * (steps - 1)
    moved, flops = cost(launch)
    limits = {
        "memory": 1e6 * moved / BANDWIDTH,
        "issue": most * warps * instructions / ISSUED / CLOCK_MHZ,
        "latency": cdiv(most, held) * LATENCY_US * (1 + loaded / max(made.loaded, 1)),
    }
    if "TAPS" in a:
        done = 2 * a["BM"] * a["BN"] * a["BK"] * steps
        rate = FLOPS if made.mma.startswith("HGMMA") else FLOPS / 2
        # At the rate that a large product reaches, where clocks are not what they are else.
        limits["tensor"] = max(1e6 * done * programs / RATE / (rate / FLOPS), most * done / rate / CLOCK_MHZ)
        limits["shared"] = most * steps * shared_bytes(a, made.mma) / SHARED_BYTES / CLOCK_MHZ
    return Node(moved, flops, limits, programs, held, made.registers, min(most, held) * made.loaded * 32 * warps,
                instructions)


# Recording


class Noting(aot.FakeMode):
    """A mode for `fake_cuda` that notes what is not ours: operators that write memory of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.nodes: list[Node] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = super().__torch_dispatch__(func, types, args, kwargs)
        name = str(func).rpartition(".")[0]
        if name in CONVS and args[0].stride(1) == 1:  # as cuDNN's are; a torch without it thinks otherwise
            out = out.new_empty(out.shape).as_strided_(out.shape, _dense(out.shape))
        ours = func.namespace == "adn" and name != "adn.conv_cudnn"
        if ours or name in FREE or func.is_view or func.namespace == "prim":
            return out
        inputs, outputs = ([t for t in tree_leaves(each) if isinstance(t, Tensor)] for each in ((args, kwargs), out))
        if not any(t.is_cuda for t in outputs):
            return out
        flops = 0
        if name in CONVS:
            flops = 2 * outputs[0].numel() * args[1][0].numel()
        elif (packet := getattr(func, "overloadpacket", None)) in flop_registry:
            flops = flop_registry[packet](*args, **(kwargs or {}), out_val=out)
        self.nodes.append(library(sum(t.numel() * t.element_size() for t in (*inputs, *outputs)), flops))
        return out


def _dense(shape: torch.Size) -> tuple[int, ...]:
    """Strides of channels last."""
    _, c, h, w = shape
    return c * h * w, 1, w * c, c


class Attention(TorchFunctionMode):
    """Attention as one kernel, as on a GPU; without one it is taken apart."""

    def __init__(self, mode: Noting) -> None:
        super().__init__()
        self.mode = mode

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        q, k, v = args[:3]
        out = q.new_empty((*q.shape[:-1], v.shape[-1]))
        tensors = [t for t in (*tree_leaves((args, kwargs)), out) if isinstance(t, Tensor)]
        flops = 2 * q[..., 0].numel() * k.shape[-2] * (k.shape[-1] + v.shape[-1])
        self.mode.nodes.append(library(sum(t.numel() * t.element_size() for t in tensors), flops))
        return out


CONVS = ("aten.conv2d", "aten.convolution", "adn.conv_cudnn")
# They move nothing, or only where they must; then `_to_copy` or `clone` comes as well.
FREE = {f"aten.{name}" for name in (
    "empty", "empty_like", "empty_strided", "new_empty", "to", "promote_types", "detach", "as_strided_", "reshape",
    "contiguous", "flatten", "_unsafe_view", "unflatten", "linear", "matmul", "type_as")}


def recorded(call: Callable[[], object], mode: Noting) -> list[Node]:
    """What a forward inside the mode launches."""
    mode.nodes.clear()
    with Attention(mode):
        launches = aot.record(call)
    others = list(mode.nodes)
    return [*map(node, launches), *others]


def in_fakes(net: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The same net, in place, of fake CUDA tensors of a type; inside a fake mode."""
    def fake(t: Tensor) -> Tensor:
        return torch.empty_strided(t.shape, t.stride(), dtype=dtype if t.is_floating_point() else t.dtype,
                                   device="cuda")

    for module in net.modules():
        module._parameters.update({name: nn.Parameter(fake(p), requires_grad=False)
                                   for name, p in module._parameters.items() if p is not None})
        module._buffers.update({name: fake(b) for name, b in module._buffers.items() if b is not None})
    return net


def row(nodes: list[Node], **what: object) -> dict[str, object]:
    """Of launches one after the other; counts are those of the longest."""
    longest = max(nodes, key=lambda each: each.estimate)
    return dict.fromkeys(FIELDS, "") | what | {
        "launches": len(nodes), "bytes": sum(each.bytes for each in nodes), "flops": sum(each.flops for each in nodes),
        "floor_us": f"{sum(each.floor for each in nodes):.2f}", "limit": longest.limit, "programs": longest.programs,
        "programs_per_sm": longest.programs_per_sm, "registers": longest.registers,
        "in_flight_kb": round(longest.in_flight / 1024, 1), "instructions": longest.instructions,
        "estimate_us": f"{sum(each.estimate for each in nodes):.2f}"}


def of_case(case: Case, results: Results) -> Iterator[dict[str, object]]:
    """A row for each direction, with the floor of the benchmark; unless they are there."""
    what = {"op": case.op, "network": case.network, "layer": case.layer, "count": case.count, "batch": case.batch,
            "shape": case.shape, "dtype": dtype_name(case.dtype)}
    wanted = {FORWARD, BACKWARD} & case.costs.keys()
    if not results.lacks(*([(what | {"direction": direction})[name] for name in KEY] for direction in wanted)):
        return
    with aot.fake_cuda("sm_90", mode := Noting()), torch.set_grad_enabled(bool(case.grads)):
        args, outputs = make_inputs(case), []
        nodes = recorded(lambda: outputs.extend(as_tuple(case.contenders["ours"](*args))), mode)
        if BACKWARD in case.costs:
            graph = outputs[0].grad_fn  # without a device there is no engine that would call it
            rest = [None] * (len(graph._input_metadata) - 1)
            with torch.no_grad():
                back = recorded(lambda: graph.apply(torch.empty_like(outputs[0]), *rest), mode)
    for direction, some in ((FORWARD, nodes), (BACKWARD, back if BACKWARD in case.costs else [])):
        if least := case.costs.get(direction):
            floor = 1e6 * max(least.bytes / BANDWIDTH, least.flops / RATE)
            yield row(some, **what, direction=direction) | {
                "bytes": least.bytes, "flops": least.flops, "floor_us": f"{floor:.2f}"}


def of_net(name: str, batch: int, results: Results) -> Iterator[dict[str, object]]:
    """A row for each depth of the deploy form, of detectors for those that are measured; unless they are there."""
    net, side = (detector(name), 640) if "detr" in name else (adn.convert(timm.create_model(name).eval()), 224)
    with aot.fake_cuda("sm_90", mode := Noting()), torch.no_grad():
        fused = fuse(in_fakes(net, torch.bfloat16))
        x = torch.empty(batch, side, side, 3, dtype=torch.bfloat16, device="cuda").permute(0, 3, 1, 2)
        depths = usual_depths(fused) if name in ENTRIES else adn.depths(fused)
        depths = [depth for depth in depths if results.lacks(("net", name, depth, batch, "forward"))]
        for again, depth in itertools.product((False, True), depths):
            adn.set_depth(fused, depth)
            if not again:  # what is done once, as folding norms
                aot.record(lambda: fused(x))
                continue
            nodes = recorded(lambda: fused(x), mode)
            yield row(nodes, op="net", network=name, layer=str(depth), count=1, batch=batch,
                      shape=f"{batch}x3x{side}x{side}", dtype="bfloat16", direction="forward")


# Tiles


def with_tile(launch: Launch, tile: Mapping[str, int]) -> Launch:
    """The same product in other tiles."""
    sizes = {name: tile[name] for name in ("BM", "BN", "BK")}
    options = {name: tile[name] for name in ("num_warps", "num_stages")}
    a = launch.args
    grid = cdiv(a["M"], tile["BM"]) * cdiv(a["C"] * a["UNIT"], tile["BN"])
    return dataclasses.replace(launch, grid=(grid,), args={**a, **sizes}, options=options)


def product(case: Case) -> Launch | None:
    """The launch of a product, of a case that is one."""
    with aot.fake_cuda("sm_90"), torch.no_grad():
        args = make_inputs(case)
        launches = aot.record(lambda: case.contenders["ours"](*args))
    return launches[0] if [launch.name for launch in launches] == ["gemm_kernel"] else None


def tiles(batches: Iterable[int], networks: Iterable[str]) -> Iterator[dict[str, object]]:
    """For each class of products the tile that the model finds fastest for all of them together, and the defaults; none
    that spills. Classes are of taps, residual, pixels and channels.

    What is compiled of a tile is the same for all products with as many taps, with or without a residual: with SiLU,
    the longest epilogue. `channels_to`: 256 and more.
    """
    likes: dict[tuple, Launch] = {}
    classes: dict[tuple, dict[tuple, dict[str, Node]]] = {}
    for batch in batches:
        for case in cases_of(["conv", "linear"], networks, batch, torch.bfloat16):
            if case.op not in ("conv1x1", "conv3x3", "linear") or FORWARD not in case.costs:
                continue
            launch = product(case)
            if launch is None or launch.args["UNIT"] == 1:
                continue
            a = launch.args
            kind, channels = (a["TAPS"], a["residual"] is not None), a["C"] * a["UNIT"]
            like = likes.setdefault(kind, dataclasses.replace(launch, args={**a, "ACTIVATION": "silu"}))
            default = {name: {**a, **launch.options}[name] for name in TILES[0]}
            tried = {"default": default} | {text(tile): tile for tile in TILES}
            made = {name: (with_tile(launch, tile), code(with_tile(like, tile))) for name, tile in tried.items()}
            group = *kind, 10 ** (len(str(a["M"])) - 1), min(next_power_of_2(channels), 256)
            classes.setdefault(group, {})[a["M"], channels, a["K"]] = {
                name: node(*each) for name, each in made.items() if not each[1].spills}
    for (taps, residual, pixels, channels), products in sorted(classes.items()):
        common = set.intersection(*(set(nodes) for nodes in products.values()))
        totals = {name: sum(nodes[name].estimate for nodes in products.values()) for name in common}
        best = min(totals.keys() - {"default"}, key=totals.__getitem__)
        longest = max((nodes[best] for nodes in products.values()), key=lambda each: each.estimate)
        yield {"taps": taps, "residual": int(residual), "pixels_from": pixels, "channels_to": channels,
               "products": len(products), "floor_us": f"{sum(nodes[best].floor for nodes in products.values()):.1f}",
               "default_us": f"{totals['default']:.1f}" if "default" in totals else "spills",
               "128x128x64_us": f"{totals.get(text(LARGE), float('nan')):.1f}", "best": best,
               "best_us": f"{totals[best]:.1f}", "limit": longest.limit, "measured_us": ""}


def text(tile: Mapping[str, int]) -> str:
    return "{BM}x{BN}x{BK}, {num_warps} warps, {num_stages} stages".format(**tile)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ops", nargs="*", default=OPS, choices=OPS, metavar="OP", help=" ".join(OPS))
    parser.add_argument("--networks", nargs="+", default=("resnet50", "mobilenetv2", "swin_t", "rtdetr_r50"),
                        choices=NETWORKS, metavar="NETWORK", help="whose layers, of " + " ".join(NETWORKS))
    parser.add_argument("--nets", nargs="*", default=NETS, help="whole nets")
    parser.add_argument("--batches", nargs="+", type=int, default=(1, 64))
    parser.add_argument("--tiles", action="store_true", help="instead, tiles of products that the model would choose")
    parser.add_argument("--csv", type=Path)
    args = parser.parse_args()
    warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
    results = Results(None if args.tiles else args.csv, () if args.tiles else KEY, "cpu", values=LABEL,
                      target="sm_90, H200")
    if args.tiles:
        found = tiles(args.batches, args.networks)
    else:
        cases = in_order(case for batch in args.batches
                         for case in cases_of(args.ops, args.networks, batch, torch.bfloat16))
        found = itertools.chain(
            *(of_net(net, batch, results) for net, batch in itertools.product(args.nets, args.batches)),
            *(of_case(case, results) for case in cases if {FORWARD, BACKWARD} & case.costs.keys()))
    for each in tqdm(found, disable=None):
        results.add(each)
    shown = [list(row.values()) for row in results.rows if args.tiles or row["op"] == "net"]
    print(f"{LABEL}\n{columns([list(results.rows[0]), *shown])}")


if __name__ == "__main__":
    main()
