"""Measures which configuration of each kernel is fastest on the GPU at hand, and writes the table `launch.tuned` reads.

    python -m adn_kernels.tune                                   # everything: adn_kernels/tables/<architecture>.json
    python -m adn_kernels.tune --kernels conv1x1 conv --networks resnet50 --quick

Every launcher asks `tuned(kernel, device, default, **key)` for its configuration. Here `launch.override` answers: first
with defaults, to learn what is asked for the layers of real networks (ResNet-50, MobileNetV2, Swin-T at 224x224,
RT-DETR-R50, YOLOv12-L at 640x640; batch 1, 8, 64, bf16, NHWC), then, question by question, with one candidate after the
other. Candidates are what the op's file lists in `TUNE: dict[kernel, list of configurations]`; else neighbours of the
best so far, each size halved and doubled, until none is faster. One that computes something else than the default, or
does not compile, is dropped; where the default itself fails (out of memory), the question is skipped.

Times are of a CUDA graph of repeated calls: no launch latency, and small tensors are in L2, as they are in a network.
A question that several layers ask (layer norm's, whatever the batch) is answered by the geometric mean of their times.

The table has a header (device, versions, date, command) and rows of kernel, key, config, time_us (of the whole
launcher) and default_us. It is written after each row; a second run goes on where one was stopped, unless versions have
changed.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from tqdm import tqdm
from triton.runtime.errors import TritonError

from . import (
    batch_norm,
    batch_norm_eval,
    conv,
    conv1x1,
    conv3x3,
    deformable_attention,
    depthwise,
    launch,
    layer_norm,
    private,
)

Config = dict[str, Any]
Call = Callable[..., Any]

LAYERS = Path(__file__).parent / "layers.json"  # by network; written by bench/tuned_layers.py
NETWORKS = ("resnet50", "mobilenetv2", "swin_t", "rtdetr_r50", "yolov12_l")
BATCHES = (1, 8, 64)
DTYPE = torch.bfloat16
# In this order: "conv" chooses among kernels that are tuned by then.
OPS = ("batch_norm", "batch_norm_eval", "layer_norm", "conv1x1", "linear", "conv3x3", "depthwise",
       "deformable_attention", "conv")
MODULES = (batch_norm, batch_norm_eval, layer_norm, conv1x1, conv3x3, depthwise, deformable_attention, conv)
CANDIDATES = {"conv": [{"backend": backend} for backend in conv.BACKENDS]} | {
    kernel: configs for module in MODULES for kernel, configs in getattr(module, "TUNE", {}).items()}
FASTER = 0.98  # what a candidate's time has to be of the best one's; less is noise
FAILURES = (TritonError, RuntimeError, ValueError)
SAME_VERSIONS = ("device", "torch", "triton", "driver")


# The layers of real networks


@dataclasses.dataclass(frozen=True)
class Conv:
    """A convolution with the norm, residual and activation after it; `side` is that of its input."""

    inputs: int
    channels: int
    side: int
    kernel: int = 1
    stride: int = 1
    groups: int = 1
    activation: str = "identity"
    residual: bool = False

    @property
    def op(self) -> str | None:
        """The Triton op for it; None if there is none."""
        if self.groups > 1:
            return "depthwise" if self.groups == self.inputs == self.channels else None
        return {1: "conv1x1", 3: "conv3x3"}.get(self.kernel)


@dataclasses.dataclass(frozen=True)
class Norm:
    """A batch norm."""

    channels: int
    side: int
    activation: str
    residual: bool


@dataclasses.dataclass(frozen=True)
class Tokens:
    """A layer norm over (rows, inputs) per image; or, with `channels`, a linear layer."""

    rows: int
    inputs: int
    channels: int = 0
    activation: str = "identity"
    residual: bool = False


def layers(networks: Iterable[str]) -> list[Conv | Norm | Tokens]:
    """Every distinct layer of these networks."""
    read = json.loads(LAYERS.read_text())
    return list(dict.fromkeys(
        KINDS[kind](*fields) for network in networks for layer in read[network] for kind, fields in layer.items()))


KINDS = {kind.__name__: kind for kind in (Conv, Norm, Tokens)}


# What is measured


@dataclasses.dataclass(frozen=True)
class Case:
    """One launcher on one layer: `make()` allocates its tensors and returns the call."""

    op: str
    name: str
    make: Callable[[], Call]


def cases(
    ops: Iterable[str], batches: Sequence[int], networks: Iterable[str] = NETWORKS, device: str = "cuda"
) -> Iterator[Case]:
    """Every distinct layer of the networks, at every batch size, forward and where there is one backward."""
    found = layers(networks)
    convs = [layer for layer in found if isinstance(layer, Conv)]
    norms = [layer for layer in found if isinstance(layer, Norm)]
    tokens = [layer for layer in found if isinstance(layer, Tokens)]
    for op in ops:
        for n in batches:
            if op == "conv":
                for c in convs:
                    yield from (Case(op, f"{c}, batch {n}", partial(_conv, c, n, folded, device))
                                for folded in (True, False))
                continue
            if op == "deformable_attention":
                makes = [partial(_deformable, n), *(partial(_deformable_backward, n, each) for each in (False, True))]
                yield from (Case(op, f"{op}, batch {n}", partial(make, device)) for make in makes)
                continue
            makes, of_op = {
                "batch_norm": ((_batch_norm, _batch_norm_backward), norms),
                "batch_norm_eval": ((_batch_norm_eval, _batch_norm_eval_backward), norms),
                "layer_norm": ((_layer_norm, _layer_norm_backward), [t for t in tokens if not t.channels]),
                "linear": ((_linear,), [t for t in tokens if t.channels]),
            }.get(op, ((_kernel_of,), [c for c in convs if c.op == op]))
            yield from (Case(op, f"{layer}, batch {n}", partial(make, layer, n, device))
                        for make in makes for layer in of_op)


def _image(n: int, channels: int, side: int, device: str) -> Tensor:
    return torch.randn(n, channels, side, side, dtype=DTYPE, device=device).contiguous(
        memory_format=torch.channels_last)


def _vectors(count: int, channels: int, device: str) -> list[Tensor]:
    return [torch.rand(channels, device=device) + 0.5 for _ in range(count)]


def _operands(c: Conv, n: int, device: str) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """x, weight, scale, shift, residual."""
    shape = c.channels, c.inputs // c.groups, c.kernel, c.kernel
    weight = torch.randn(shape, dtype=DTYPE, device=device) * math.prod(shape[1:]) ** -0.5
    weight = depthwise.tap_major(weight) if c.groups > 1 else weight.contiguous(memory_format=torch.channels_last)
    residual = _image(n, c.channels, (c.side - 1) // c.stride + 1, device) if c.residual else None
    return _image(n, c.inputs, c.side, device), weight, *_vectors(2, c.channels, device), residual


def _kernel_of(c: Conv, n: int, device: str) -> Call:
    x, weight, scale, shift, residual = _operands(c, n, device)
    launcher = {"conv1x1": conv1x1.launch_conv1x1, "conv3x3": conv3x3.launch_conv3x3,
                "depthwise": depthwise.launch_depthwise}[c.op]
    padding = () if c.op == "conv1x1" else (c.kernel // 2,)
    return partial(launcher, x, weight, scale, shift, residual, None, c.activation, c.stride, *padding)


def _conv(c: Conv, n: int, folded: bool, device: str) -> Call:
    x, weight, scale, shift, residual = _operands(c, n, device)
    vectors = (None, shift.to(DTYPE)) if folded else (scale, shift)
    return partial(conv.conv, x, weight, *vectors, residual=residual, activation=c.activation,
                   stride=c.stride, padding=c.kernel // 2, groups=c.groups)


def _linear(t: Tokens, n: int, device: str) -> Call:
    x, weight = (torch.randn(*shape, t.inputs, dtype=DTYPE, device=device) for shape in ((n, t.rows), (t.channels,)))
    residual = torch.randn(n, t.rows, t.channels, dtype=DTYPE, device=device) if t.residual else None
    (bias,) = _vectors(1, t.channels, device)
    return partial(conv1x1.launch_linear, x, weight * t.inputs ** -0.5, None, bias, residual, None, t.activation)


def _norm_operands(norm: Norm, n: int, device: str) -> tuple[Tensor, Tensor | None, list[Tensor]]:
    x, residual = (_image(n, norm.channels, norm.side, device) for _ in range(2))
    return x, residual if norm.residual else None, _vectors(4, norm.channels, device)


def _batch_norm(norm: Norm, n: int, device: str) -> Call:
    x, residual, vectors = _norm_operands(norm, n, device)
    parameters = batch_norm.Parameters(*vectors)
    return partial(batch_norm.launch_batch_norm, x, residual, parameters, None, 1, norm.activation, 0.1, 1e-5)


def _batch_norm_backward(norm: Norm, n: int, device: str) -> Call:
    x, residual, (weight, bias, *_) = _norm_operands(norm, n, device)
    _, stats, *_ = _batch_norm(norm, n, device)()
    return partial(batch_norm.launch_batch_norm_backward, torch.randn_like(x), x, residual, stats, weight.dtype,
                   bias.dtype, False, norm.activation)


def _batch_norm_eval(norm: Norm, n: int, device: str) -> Call:
    x, residual, vectors = _norm_operands(norm, n, device)
    return partial(batch_norm_eval.launch_batch_norm_eval, x, *vectors, residual, *[None] * 5, norm.activation, 1e-5)


def _batch_norm_eval_backward(norm: Norm, n: int, device: str) -> Call:
    x, residual, vectors = _norm_operands(norm, n, device)
    needs = (True, residual is not None, True, True, False, False)
    return partial(batch_norm_eval.launch_batch_norm_eval_backward, torch.randn_like(x), x, *vectors, residual,
                   *[None] * 5, norm.activation, 1e-5, needs)


def _layer_norm(t: Tokens, n: int, device: str) -> Call:
    x, residual = (torch.randn(n, t.rows, t.inputs, dtype=DTYPE, device=device) for _ in range(2))
    return partial(layer_norm.launch_layer_norm, x, *_vectors(2, t.inputs, device), None, None,
                   residual if t.residual else None, None, 1e-6)


def _layer_norm_backward(t: Tokens, n: int, device: str) -> Call:
    x, dy, dtotal = (torch.randn(n, t.rows, t.inputs, dtype=DTYPE, device=device) for _ in range(3))
    return partial(layer_norm.launch_layer_norm_backward, dy, dtotal if t.residual else None, x,
                   *_vectors(2, t.inputs, device), None, None, None, 1e-6, DTYPE, DTYPE, True)


def _sampling(n: int, device: str) -> tuple[Tensor, list[int], Tensor, Tensor]:
    """Of RT-DETR: 8 heads of 32 channels, 300 queries, 4 points on each of 3 levels."""
    sides = (80, 40, 20)
    value = torch.randn(n, sum(side ** 2 for side in sides), 8, 32, dtype=DTYPE, device=device)
    centres = torch.rand(n, 300, 1, 1, 1, 2, device=device)
    locations = centres + 0.05 * torch.randn(n, 300, 8, len(sides), 4, 2, device=device)
    return value, [side for side in sides for _ in range(2)], locations, torch.rand_like(locations[..., 0])


def _deformable(n: int, device: str) -> Call:
    return partial(deformable_attention.launch_deformable_attention, *_sampling(n, device))


def _deformable_backward(n: int, deterministic: bool, device: str) -> Call:
    value, *rest = _sampling(n, device)
    dout = torch.randn(n, 300, 256, dtype=DTYPE, device=device)
    return partial(deformable_attention.launch_deformable_attention_backward, dout, value, *rest, deterministic,
                   (True, True, True))


def device_time(call: Call) -> float:
    """Microseconds of `call()` on the GPU: the median of replays of a graph of many calls."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        calls = max(5, min(200, int(5.0 / start.elapsed_time(end))))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for _ in range(calls):
                call()
        times = []
        for _ in range(7):
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end))
    return 1000 * statistics.median(times) / calls


# The search


@dataclasses.dataclass
class Question:
    """One set of arguments of `tuned`, and who asked."""

    kernel: str
    key: Config
    default: Config
    cases: list[Case]


class Override:
    """`launch.override`: notes each question and answers it with the trial, else the best known, else the default."""

    def __init__(self) -> None:
        self.asked: dict[tuple, tuple[str, Config, Config]] = {}
        self.best: dict[tuple, Config] = {}
        self.trial: tuple[tuple, Config] | None = None

    def __call__(self, kernel: str, default: Config, key: Config) -> Config:
        question = identity(kernel, key)
        self.asked[question] = kernel, key, default
        if self.trial is not None and self.trial[0] == question:
            return self.trial[1]
        return self.best.get(question, default)

    def __enter__(self) -> Override:
        launch.override = self
        return self

    def __exit__(self, *_: object) -> None:
        launch.override = None


def identity(kernel: str, key: Config) -> tuple:
    return kernel, *sorted(key.items())


def questions(override: Override, given: Iterable[Case]) -> dict[tuple, Question]:
    """What the launchers of the cases ask, in the order of the cases."""
    found: dict[tuple, Question] = {}
    for case in tqdm(list(given), "finding what is to be tuned", unit="layer"):
        override.asked.clear()
        with skipping(f"{case.op} of {case.name}"):
            case.make()()
        for question, (kernel, key, default) in override.asked.items():
            # The dispatcher's kernels are tuned by their own cases.
            if (kernel == "conv") == (case.op == "conv"):
                found.setdefault(question, Question(kernel, key, default, [])).cases.append(case)
    return found


@contextlib.contextmanager
def skipping(what: str) -> Iterator[None]:
    """Says what failed inside, and goes on; but not if nothing can run any more."""
    try:
        yield
    except torch.AcceleratorError:
        raise
    except FAILURES as error:
        tqdm.write(f"skipped {what}: {type(error).__name__}: {error}")


def neighbours(config: Config) -> list[Config]:
    """Each value halved and doubled, a number of stages one less and one more."""
    found = []
    for name, value in config.items():
        others = (value - 1, value + 1) if name in ("num_stages", "STAGES") else (value // 2, value * 2)
        limit = {"num_warps": 16, "num_stages": 6, "STAGES": 6}.get(name, math.inf)
        found += [{**config, name: other} for other in others if 1 <= other <= limit]
    return found


def search(
    question: Question, override: Override, time: Callable[[Call], float], quick: bool = False
) -> tuple[Config, float, float]:
    """The best configuration, its time and that of the default, in microseconds. Raises what the default raises."""
    calls = [case.make() for case in question.cases]
    expected: list[list[Tensor]] = []

    def measured(config: Config) -> float:
        override.trial = identity(question.kernel, question.key), config
        try:
            times = []
            for i, call in enumerate(calls):
                # Named outright, so that a backend which would refuse the layer does.
                call = partial(call, **config) if question.kernel == "conv" else call
                outputs = _tensors(call())
                if len(expected) == i:
                    expected.append(outputs)
                elif not all(map(_agree, outputs, expected[i])):
                    return math.inf
                times.append(time(call))
            return statistics.geometric_mean(times)
        finally:
            override.trial = None

    def attempt(config: Config) -> float:
        try:
            return measured(config)
        except torch.AcceleratorError:
            raise  # nothing can run any more
        except FAILURES:
            return math.inf  # too large for the GPU, or not to be compiled

    times = {_frozen(question.default): measured(question.default)}
    best = question.default
    default_time = best_time = times[_frozen(best)]
    listed = CANDIDATES.get(question.kernel)
    while True:
        faster = None
        for config in listed or neighbours(best):
            if _frozen(config) in times:
                continue
            taken = times[_frozen(config)] = attempt(config)
            if taken < FASTER * best_time:
                faster, best_time = config, taken
        best = faster or best
        if faster is None or listed or quick:
            return best, best_time, default_time


def _frozen(config: Config) -> tuple:
    return tuple(sorted(config.items()))


def _tensors(value: Any) -> list[Tensor]:
    return [t for t in private.pytree.tree_leaves(value) if isinstance(t, Tensor)]


def _agree(actual: Tensor, expected: Tensor) -> bool:
    """Equal up to rounding in another order."""
    if actual.shape != expected.shape or actual.numel() == 0:
        return actual.shape == expected.shape
    actual, expected = actual.float(), expected.float()
    return bool((actual - expected).abs().max() <= 0.02 * expected.abs().max() + 1e-6)


# The table


class Table:
    """The rows of one architecture, in a file."""

    def __init__(self, path: Path, header: dict[str, str], fresh: bool = False) -> None:
        self.path, self.header, self.rows = path, header, {}
        if path.exists() and not fresh:
            old = json.loads(path.read_text())
            changed = [name for name in SAME_VERSIONS if old["header"][name] != header[name]]
            if changed:
                print(f"{path}: {len(old['rows'])} rows dropped, measured with another {', '.join(changed)}")
            else:
                self.rows = {identity(row["kernel"], row["key"]): row for row in old["rows"]}

    def add(self, question: Question, config: Config, time_us: float, default_us: float) -> None:
        self.rows[identity(question.kernel, question.key)] = {
            "kernel": question.kernel, "key": question.key, "config": config, "time_us": round(time_us, 2),
            "default_us": round(default_us, 2)}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        rows = ",\n".join(json.dumps(row) for row in self.rows.values())
        text = f'{{"header": {json.dumps(self.header, indent=1)},\n"rows": [\n{rows}\n]}}\n'
        # Whole or not at all, also if interrupted.
        partial_file = self.path.with_suffix(".part")
        partial_file.write_text(text)
        os.replace(partial_file, self.path)
        launch._table.cache_clear()


def tune(
    given: Iterable[Case], table: Table, time: Callable[[Call], float] = device_time, quick: bool = False
) -> None:
    """Measure what the cases ask and the table does not have yet."""
    with torch.no_grad(), Override() as override:
        found = questions(override, given)
        override.best.update({question: row["config"] for question, row in table.rows.items()})
        missing = {question: asked for question, asked in found.items() if question not in table.rows}
        progress = tqdm(missing.items(), f"tuning ({len(found) - len(missing)} known)", unit="shape")
        for question, asked in progress:
            progress.set_postfix_str(asked.kernel)
            with skipping(f"{asked.kernel} of {asked.key}"):
                config, time_us, default_us = search(asked, override, time, quick)
                override.best[question] = config
                table.add(asked, config, time_us, default_us)


def header(arguments: Sequence[str]) -> dict[str, str]:
    return {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "driver": _driver(),
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        # Folders of one machine mean nothing on another.
        "command": " ".join(["python -m adn_kernels.tune", *(Path(a).name if a.startswith("/") else a
                                                             for a in arguments)]),
    }


def _driver() -> str:
    if shutil.which("nvidia-smi") is None:
        return "unknown"
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    lines = subprocess.run(query, capture_output=True, text=True, check=False).stdout.split()
    return lines[0] if lines else "unknown"


def main(arguments: Sequence[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser("python -m adn_kernels.tune", description=__doc__.partition("\n")[0])
    parser.add_argument("--kernels", nargs="+", choices=OPS, default=OPS, metavar="OP", help=f"of {', '.join(OPS)}")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=NETWORKS, metavar="NETWORK",
                        help=f"whose layers, of {', '.join(NETWORKS)}")
    parser.add_argument("--quick", action="store_true", help="batch 64 only, and only neighbours of the defaults")
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: the table that the kernels read")
    parser.add_argument("--force", action="store_true", help="measure everything anew, drop what the table has")
    chosen = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.error("there is no GPU here; the table holds only what was measured on one")
    path = chosen.out or launch.TABLES / f"{launch._architecture(torch.cuda.current_device())}.json"
    ops = [op for op in OPS if op in chosen.kernels]
    tune(cases(ops, BATCHES[-1:] if chosen.quick else BATCHES, chosen.networks),
         Table(path, header(arguments), chosen.force), quick=chosen.quick)
    print(f"{path}: takes effect in processes started from now on")


if __name__ == "__main__":
    main()
