"""Times cases on a GPU, and checks first that what is timed is right.

Times are those of the device: the calls of one contender, one per set of inputs, are captured in a CUDA graph, whose
replays are timed by events. The sets together are larger than the L2 cache, so that no call finds its inputs there
(but for inputs so small that `MOST_SETS` fit into it), and the outputs of a round stay alive, so that none is written
over another's. Contenders are replayed in turns: a clock that drifts does so for all of them. Rates a time is compared
with, of a copy and of a matrix product, are measured in the same way in the same process.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from cases import BACKWARD, Case, Function
from common import failure
from torch import Tensor

Call = Callable[[], Any]

QUANTILES = (0.2, 0.5, 0.8)
LEAST_ROUNDS, ROUNDS = 5, 20
ROUNDS_US = 150_000.0  # of all rounds of all contenders, after `LEAST_ROUNDS`
GRAPH_US = 500.0  # of one replay, at least: a graph's launch costs some microseconds
MOST_SETS, MOST_CALLS = 256, 1024
WALL_CALLS = 20


@dataclasses.dataclass(frozen=True)
class Measurement:
    """One contender in one direction; `clock` is "graph" or "wall", `us` the quantiles if it was timed."""

    direction: str
    contender: str
    clock: str = "graph"
    us: tuple[float, ...] | None = None
    error: float | None = None
    status: str = "measured"


def set_up() -> None:
    """Settings under which all contenders run."""
    torch.backends.cudnn.benchmark = True
    # A backward is captured, and so run, many times.
    torch._functorch.config.donated_buffer = False
    # Not by `fp32_precision` of each: that of convolutions alone, or even with that of recurrent nets, leaves a state
    # in which reading `cudnn.allow_tf32` raises, as Inductor does under max-autotune.
    for backend in (torch.backends.cudnn, torch.backends.cuda.matmul):
        backend.allow_tf32 = False


def make_inputs(case: Case, device: str = "cuda") -> list[Tensor | None]:
    """Fresh ones; with gradients required where the case takes them."""
    with torch.device(device):
        args = list(case.inputs())
    for i in case.grads:
        args[i].requires_grad_()
    return args


def as_tuple(value: Any) -> tuple[Tensor, ...]:
    return value if isinstance(value, tuple) else (value,)


def results(function: Function, args: Sequence[Tensor | None], case: Case, wide: torch.dtype | None = None
            ) -> list[Tensor]:
    """Outputs and gradients of a function of copies of `args`, in the type `wide` if given."""
    def copied(t: Tensor | None) -> Tensor | None:
        if t is None:
            return None
        t = t.detach().clone()
        return t.to(wide) if wide is not None and t.is_floating_point() else t

    args = [copied(t) for t in args]
    with torch.set_grad_enabled(bool(case.grads)):
        for i in case.grads:
            args[i].requires_grad_()
        outputs = as_tuple(function(*args))
        if not case.grads:
            return list(outputs)
        gradients = torch.autograd.grad(outputs, [args[i] for i in case.grads], _output_gradients(outputs, case.dtype))
    return [*(y.detach() for y in outputs), *gradients]


def _output_gradients(outputs: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Random, in the layout of each output; the same ones, up to its type, for whoever computed it."""
    found = []
    for i, y in enumerate(outputs):
        generator = torch.Generator(y.device).manual_seed(i)
        grad = torch.randn(y.shape, generator=generator, dtype=dtype, device=y.device)
        found.append(torch.empty_like(y).copy_(grad))
    return found


def deviation(actual: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """Largest ratio of norms, of the difference and of the exact result; infinite for NaN."""
    worst = 0.0
    for a, e in zip(actual, exact, strict=True):
        if a.shape != e.shape:
            return math.inf
        size = torch.linalg.vector_norm(e).clamp_min(1e-30)
        ratio = float(torch.linalg.vector_norm(a.to(e.dtype) - e) / size)
        worst = max(worst, math.inf if math.isnan(ratio) else ratio)
    return worst


def check(case: Case, contenders: Mapping[str, Function], args: Sequence[Tensor | None]
          ) -> dict[str, float | str]:
    """By contender: how far from the exact result, which is computed in a wider type, or its `failure`."""
    wide = torch.float64 if case.dtype == torch.float32 else torch.float32
    search, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, False
    exact = results(case.exact, args, case, wide)
    torch.backends.cudnn.benchmark = search
    found: dict[str, float | str] = {}
    for name, function in contenders.items():
        try:
            found[name] = deviation(results(function, args, case), exact)
        except Exception as error:
            found[name] = failure(error)
    return found


def allowed(case: Case, eager: float | None) -> float:
    """Twice the deviation of eager PyTorch, where the case has it; else what rounding alone explains."""
    return 1e-4 + (2 * eager if eager is not None else 4 * torch.finfo(case.dtype).eps)


class Gpu:
    """Measures cases on the current CUDA device.

    Attributes:
        spoiled: whether a capture that failed has left torch's random numbers or allocator in the state of one: only a
            new process can measure more.
    """

    def __init__(self) -> None:
        set_up()
        self.spoiled = False
        self.stream = torch.cuda.Stream()
        self.cache = torch.cuda.get_device_properties().L2_cache_size

    def ceilings(self) -> tuple[float, float]:
        """Bytes per second of a copy, read and written, and operations per second of a bf16 product, random data."""
        random = {"dtype": torch.bfloat16, "device": "cuda"}
        with torch.cuda.stream(self.stream), torch.no_grad():
            a, b = (torch.randn(2 ** 29, **random) for _ in range(2))
            m, n = (torch.randn(8192, 8192, **random) for _ in range(2))
            out = torch.empty_like(m)
            times = self._times({"copy": self._capture([lambda: b.copy_(a)]),
                                 "product": self._capture([lambda: torch.mm(m, n, out=out)])})
        return 4 * a.numel() / (times["copy"][1] * 1e-6), 2 * 8192 ** 3 / (times["product"][1] * 1e-6)

    def measure(self, case: Case, contenders: Mapping[str, Function]) -> Iterator[Measurement]:
        """Every direction of a case; a contender that raises, is wrong, cannot be captured or finds no memory is not
        timed and does not stop the others."""
        torch.manual_seed(0)
        with torch.cuda.stream(self.stream), torch.set_grad_enabled(bool(case.grads)):
            first = make_inputs(case)
            errors = check(case, contenders, first)
            eager = errors.get("eager")
            limit = allowed(case, eager if isinstance(eager, float) else None)
            right = {name: f for name, f in contenders.items()
                     if isinstance(errors[name], float) and errors[name] <= limit}
            size = sum(t.numel() * t.element_size() for t in first if t is not None)
            count = min(max(2, math.ceil(3 * self.cache / size)), MOST_SETS)
            sets = [first, *(_copies(first) for _ in range(count - 1))]
            for direction in case.costs:
                calls, graphs, failed = {}, {}, {}
                for name, function in right.items():
                    try:
                        calls[name] = self._calls(function, sets, case, direction)
                        graphs[name] = self._capture(calls[name])
                    except Exception as error:
                        calls.pop(name, None)
                        failed[name] = failure(error)
                        self.spoiled = self.spoiled or not self._works()
                times = self._times(graphs)
                walls = self._wall_times(calls) if case.wall else {}
                for name, error in errors.items():
                    if name in times:
                        yield Measurement(direction, name, "graph", times[name], error)
                    elif name in failed:
                        yield Measurement(direction, name, error=error, status=failed[name])
                    elif isinstance(error, float):
                        yield Measurement(direction, name, error=error, status=f"wrong: allowed {limit:.2g}")
                    else:
                        yield Measurement(direction, name, status=error)
                for name, us in walls.items():
                    yield Measurement(direction, name, "wall", us, errors[name])

    def times(self, calls: Sequence[Call]) -> tuple[float, ...]:
        """Quantiles of the microseconds of one of some calls."""
        with torch.cuda.stream(self.stream):
            return self._times({"": self._capture(calls)})[""]

    def replay(self, case: Case, contender: str, direction: str) -> tuple[Call, int]:
        """For a benchmark runner: what replays the graph of one contender and waits, and how many calls that is."""
        with torch.cuda.stream(self.stream), torch.set_grad_enabled(bool(case.grads)):
            sets = [make_inputs(case) for _ in range(8)]
            calls = self._calls(case.contenders[contender], sets, case, direction)
            graph, count = self._capture(calls)

        def run() -> None:
            graph.replay()
            torch.cuda.synchronize()

        return run, count

    def _works(self) -> bool:
        """Whether this process can still make inputs and capture."""
        try:
            x = torch.randn(1, device="cuda")
            self._capture([lambda: x + x])
        except Exception:
            return False
        return True

    @staticmethod
    def _calls(function: Function, sets: Sequence[Sequence[Tensor | None]], case: Case, direction: str) -> list[Call]:
        if direction != BACKWARD:
            return [lambda args=args: function(*args) for args in sets]

        def backward(args: Sequence[Tensor | None]) -> Call:
            outputs = as_tuple(function(*args))
            wanted, dys = [args[i] for i in case.grads], _output_gradients(outputs, case.dtype)
            return lambda: torch.autograd.grad(outputs, wanted, dys, retain_graph=True)

        return [backward(args) for args in sets]

    def _capture(self, calls: Sequence[Call]) -> tuple[torch.cuda.CUDAGraph, int]:
        """A graph of the calls, repeated until its replay takes long enough; and how many they are."""
        for call in calls[:2]:  # compiles, and lets cuDNN choose
            call()

        def capture(repeats: int) -> torch.cuda.CUDAGraph:
            graph, kept = torch.cuda.CUDAGraph(), [None] * len(calls)
            with torch.cuda.graph(graph, stream=self.stream):
                for _ in range(repeats):
                    for i, call in enumerate(calls):
                        kept[i] = call()
            return graph

        graph = capture(1)
        us = self._replays({"": graph}, 3)[""][-1]
        repeats = min(math.ceil(GRAPH_US / us), MOST_CALLS // len(calls))
        if repeats > 1:
            graph = None  # its memory, before more is taken
            graph = capture(repeats)
        return graph, max(repeats, 1) * len(calls)

    def _times(self, captured: Mapping[str, tuple[torch.cuda.CUDAGraph, int]]) -> dict[str, tuple[float, ...]]:
        """Of one call of each; rounds are as many as fit into `ROUNDS_US`."""
        graphs = {name: graph for name, (graph, _) in captured.items()}
        round_us = sum(each[-1] for each in self._replays(graphs, 2).values())
        rounds = min(max(LEAST_ROUNDS, int(ROUNDS_US / max(round_us, 1))), ROUNDS)
        times = self._replays(graphs, rounds)
        return {name: _quantiles([t / captured[name][1] for t in each]) for name, each in times.items()}

    def _replays(self, graphs: Mapping[str, torch.cuda.CUDAGraph], rounds: int) -> dict[str, list[float]]:
        """Microseconds of each replay."""
        events: dict[str, list] = {name: [] for name in graphs}
        for _ in range(rounds):
            for name, graph in graphs.items():
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record(self.stream)
                graph.replay()
                end.record(self.stream)
                events[name].append((start, end))
        self.stream.synchronize()
        return {name: [1e3 * start.elapsed_time(end) for start, end in pairs] for name, pairs in events.items()}

    def _wall_times(self, calls: Mapping[str, Sequence[Call]]) -> dict[str, tuple[float, ...]]:
        """Of calls from Python, one after another and waiting only for the last: what the host is slow at shows."""
        times: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(ROUNDS):
            for name, each in calls.items():
                self.stream.synchronize()
                start = time.perf_counter()
                for call in each[:WALL_CALLS]:
                    call()
                self.stream.synchronize()
                times[name].append(1e6 * (time.perf_counter() - start) / len(each[:WALL_CALLS]))
        return {name: _quantiles(each) for name, each in times.items()}


def _copies(args: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The same inputs in other memory."""
    return [None if t is None else t.detach().clone().requires_grad_(t.requires_grad) for t in args]


def _quantiles(values: Sequence[float]) -> tuple[float, ...]:
    return tuple(np.quantile(values, QUANTILES).tolist())


class Dry:
    """Stands in for `Gpu` where there is none: the op runs on fake CUDA tensors up to its launches, times are made up.

    Args:
        record: `aot.record` of the tests: launches of a function, none of which runs.
        fake_cuda: `aot.fake_cuda`.
    """

    spoiled = False

    def __init__(self, record: Callable, fake_cuda: Callable) -> None:
        self.record, self.fake_cuda = record, fake_cuda

    def ceilings(self) -> tuple[float, float]:
        return 4e12, 8e14

    def measure(self, case: Case, contenders: Mapping[str, Function]) -> Iterator[Measurement]:
        """Raises what the op raises, and AssertionError if it launches nothing or its result is not like eager's."""
        with self.fake_cuda(), torch.set_grad_enabled(bool(case.grads)):
            args = make_inputs(case)
            outputs: list[Tensor] = []
            launches = self.record(lambda: outputs.extend(as_tuple(contenders["ours"](*args))))
            assert launches or case.op == "conv", f"{case}: no launch"
            expected = as_tuple(case.exact(*args))
            assert [y.shape for y in outputs] == [y.shape for y in expected], f"{case}: {outputs}, {expected}"
            if BACKWARD in case.costs:
                # Without a device there is no engine that would call it.
                node = outputs[0].grad_fn
                rest = [None] * (len(node._input_metadata) - 1)
                with torch.no_grad():
                    launches = self.record(lambda: node.apply(torch.empty_like(outputs[0]), *rest))
                assert launches, f"{case}: no launch in the backward"
        for direction in case.costs:
            for clock in ("graph", "wall") if case.wall else ("graph",):
                for name in contenders:
                    yield Measurement(direction, name, clock, (1.0, 1.0, 1.0), 0.0)
