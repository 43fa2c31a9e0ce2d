"""Measures which configuration of each kernel is fastest on the GPU at hand, and writes the table `launch.tuned` reads.

    python bench/tune.py                                   # everything: adn_kernels/tables/<architecture>.json
    python bench/tune.py --ops linear conv --networks resnet50 --quick

Every launcher asks `tuned(kernel, device, default, **key)` for its configuration. Here `launch.override` answers: first
with defaults, to learn what is asked for the layers of `shapes.py` (batch 1, 8, 64, bf16, NHWC; the cases of `ops/`),
then, question by question, with one candidate after the other. Candidates are those of `CANDIDATES`; else neighbours of
the best so far, each size halved and doubled, until none is faster. One that computes something else than the default,
or does not compile, is dropped; where the default itself fails (out of memory), the question is skipped.

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
import importlib
import itertools
import json
import math
import os
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from cases import BACKWARD, NONE_ACTIVE
from cases import Case as Layer
from common import header
from kernels import OPS, cases_of
from shapes import BATCHES, NETWORKS, layers
from timing import Gpu, as_tuple, make_inputs
from torch import Tensor
from tqdm import tqdm
from triton.runtime.errors import TritonError

from adn_kernels import conv, launch

Config = dict[str, Any]
Call = Callable[..., Any]

# "conv" last, for it chooses among kernels that are tuned by then.
TUNED = (*(op for op in OPS if op not in ("blocks", "conv")), "conv")
CANDIDATES = {
    "conv": [{"backend": backend} for backend in conv.BACKENDS],
    # How many rows fit in registers depends on the number of channels.
    "layer_norm": [{"ROWS": rows, "num_warps": warps} for rows in (1, 2, 4, 8, 16, 32) for warps in (2, 4, 8, 16)],
    "layer_norm_backward": [{"ROWS": rows, "num_warps": warps, "num_stages": stages}
                            for rows in (1, 2, 4, 8, 16, 32) for warps in (4, 8, 16) for stages in (1, 2)],
} | {
    kernel: [{"SAMPLES": samples, "ROWS": rows, "num_warps": warps}
             for samples in (4, 8, 16) for rows in (2, 4, 8, 16) for warps in (2, 4, 8)]
    for kernel in ("deformable_attention", "deformable_attention_backward")
}
FASTER = 0.98  # what a candidate's time has to be of the best one's; less is noise
FAILURES = (TritonError, RuntimeError, ValueError)
SAME_VERSIONS = ("device", "torch", "triton", "driver")


@dataclasses.dataclass(frozen=True)
class Case:
    """One launcher on one layer: `make()` allocates its tensors and returns the call."""

    op: str
    name: str
    make: Callable[[], Call]


def cases(
    ops: Iterable[str], batches: Sequence[int], networks: Iterable[str] = tuple(NETWORKS), device: str = "cuda"
) -> Iterator[Case]:
    """Every distinct layer of the networks, at every batch size, forward and where there is one backward."""
    for op in ops:
        for batch in batches:
            for layer in cases_of([op], networks, batch, torch.bfloat16):
                if layer.op == "conv" or NONE_ACTIVE in layer.costs:
                    continue
                for direction, who in itertools.product(layer.costs, layer.contenders):
                    if who not in ("eager", "cudnn"):
                        yield Case(layer.op, f"{layer} {direction}", partial(call_of, layer, who, direction, device))
        if op == "conv":
            dispatched = importlib.import_module("bench_conv").dispatched
            yield from (Case("conv", str(case), partial(call_of, case, "ours", next(iter(case.costs)), device))
                        for batch in batches for network in networks for layer in layers(network)
                        for case in dispatched(layer, batch, torch.bfloat16))


def call_of(layer: Layer, who: str, direction: str, device: str) -> Call:
    """A contender on fresh inputs; backward, what its op has registered, called as the engine of autograd would."""
    inputs = make_inputs(layer, device)
    if direction != BACKWARD:
        return partial(layer.contenders[who], *(t if t is None else t.detach() for t in inputs))
    with torch.enable_grad():
        outputs = as_tuple(layer.contenders[who](*inputs))
    node = outputs[0].grad_fn
    grads: list[Tensor | None] = [None] * len(node._input_metadata)
    for y in outputs:
        grads[y.output_nr] = torch.randn_like(y)
    return lambda: node.apply(*grads)


def device_time(gpu: Gpu, call: Call) -> float:
    """Microseconds of `call()` on the GPU: the median of replays of a graph of many calls."""
    return gpu.times([call])[1]


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
    if question.kernel == "conv":  # without those that would refuse the layer, for which the op takes its default
        refused = {"cudnn": not question.key["cudnn"], "triton": question.default["backend"] == "unfused"}
        listed = [config for config in listed if not refused.get(config["backend"])]
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
    return [t for t in torch.utils._pytree.tree_leaves(value) if isinstance(t, Tensor)]


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
    given: Iterable[Case], table: Table, time: Callable[[Call], float], quick: bool = False
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


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python bench/tune.py", description=__doc__.partition("\n")[0])
    parser.add_argument("--ops", nargs="+", choices=TUNED, default=TUNED, metavar="OP", help=f"of {', '.join(TUNED)}")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=tuple(NETWORKS), metavar="NETWORK",
                        help=f"whose layers, of {', '.join(NETWORKS)}")
    parser.add_argument("--quick", action="store_true", help="batch 64 only, and only neighbours of the defaults")
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: the table that the kernels read")
    parser.add_argument("--force", action="store_true", help="measure everything anew, drop what the table has")
    chosen = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.error("there is no GPU here; the table holds only what was measured on one")
    path = chosen.out or launch.TABLES / f"{launch._architecture(torch.cuda.current_device())}.json"
    ops = [op for op in TUNED if op in chosen.ops]
    tune(cases(ops, BATCHES[-1:] if chosen.quick else BATCHES, chosen.networks),
         Table(path, header("cuda"), chosen.force), partial(device_time, Gpu()), chosen.quick)
    print(f"{path}: takes effect in processes started from now on")


if __name__ == "__main__":
    sys.exit(main())
