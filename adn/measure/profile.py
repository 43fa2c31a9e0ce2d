"""What every depth of a net costs: multiply-adds, parameters, measured latency; and which depth fits a budget."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import datetime
import functools
import operator
import os
import platform
import random
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import nn

from ..core.depth import Depth
from ..core.progress import progress_bar
from ..core.state import DepthLike, set_depth
from ..core.tables import read_table, table
from ..models.registry import task_name
from .accuracy import Row, read_depths
from .cost import count_macs, count_parameters
from .passes import Images, evaluating

if TYPE_CHECKING:
    from .average_precision import DetectionRow

_LEAST_SPAN = 5  # of a figure's accuracy axis, in percentage points
_COLUMNS = {"depth": Depth, "macs": int, "params": int, "p50_ms": float, "p99_ms": float}  # of files


class Metric(NamedTuple):
    """The measure of accuracy of a task: the field of its rows and column in files; what tables and figures call it."""

    name: str
    head: str
    axis: str


# By task.
METRICS = {"classify": Metric("top1", "top-1 (%)", "top-1 accuracy (%)"), "detect": Metric("ap", "AP", "AP (%)")}
_BY_NAME = {metric.name: metric for metric in METRICS.values()}


@dataclasses.dataclass(frozen=True)
class Point:
    """What one depth costs.

    Attributes:
        macs: multiply-adds per image, of convolutions, linear layers and the two products of attention; of norms and
            sampling too, where `profile` was asked for them.
        params: parameters in use: no bypassed block, one set of each skip-aware norm.
        p50_ms, p99_ms: median and 99th percentile of the time of a forward of one batch, in milliseconds.
        top1: accuracy in percent, of a detector its average precision; None if unknown.
    """

    depth: Depth
    macs: int
    params: int
    p50_ms: float
    p99_ms: float
    top1: float | None = None

    @property
    def value(self) -> float:
        """What is bought with time: accuracy if known, else multiply-adds."""
        return self.macs if self.top1 is None else self.top1


class Profile(list[Point]):
    """The cost of every depth; a list of `Point`s that prints as a table.

    Attributes:
        machine: how and on what it was measured: device, threads, dtype, input, versions, date.
        metric: what accuracy is, "top1", or of a detector "ap".
    """

    def __init__(self, points: Iterable[Point] = (), machine: Mapping[str, str] | None = None, metric: str = "top1"
                 ) -> None:
        super().__init__(points)
        self.machine = dict(machine or {})
        self.metric = metric

    def pareto(self) -> list[Point]:
        """The points no other beats in both time (p50) and accuracy (MACs where accuracy is unknown), fastest first."""
        front: list[Point] = []
        for point in sorted(self, key=lambda p: (p.p50_ms, -p.value)):
            if not front or point.value > front[-1].value:
                front.append(point)
        return front

    def to_csv(self, path: str | os.PathLike) -> None:
        """One line per depth; what is known of the machine goes before, in lines that begin with `#`."""
        with open(path, "w", newline="", encoding="utf-8") as file:
            file.writelines(f"# {key}: {value}\n" for key, value in self.machine.items())
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow((*_COLUMNS, self.metric))
            for p in self:
                writer.writerow([getattr(p, name) for name in (*_COLUMNS, "top1")])

    @classmethod
    def from_csv(cls, path: str | os.PathLike) -> Profile:
        """What `to_csv` wrote; raises ValueError on another file."""
        machine, rows = read_table(path, _COLUMNS)
        metric = next((name for name in _BY_NAME if rows and name in rows[0]), "top1")
        return cls([Point(*(kind(row[name]) for name, kind in _COLUMNS.items()),
                          float(row[metric]) if row.get(metric) else None) for row in rows], machine, metric)

    def plot(self, path: str | os.PathLike) -> None:
        """Save a figure (png, pdf or svg by the suffix): accuracy, or MACs if unknown, against latency.

        Raises:
            ImportError: without matplotlib (`pip install "adn[plot]"`).
            ValueError: if there is no point.
        """
        if not self:
            raise ValueError("an empty profile has nothing to plot")
        _draw(self, path)

    def __str__(self) -> str:
        front = {point.depth for point in self.pareto()}
        accurate = any(point.top1 is not None for point in self)
        unit, size = ("GMACs", 1e9) if all(point.macs >= 1e10 for point in self) else ("MMACs", 1e6)
        head = ["depth", unit, "params (M)", "p50 (ms)", "p99 (ms)",
                *([_BY_NAME[self.metric].head] if accurate else []), "Pareto"]
        rows = [
            [str(p.depth), f"{p.macs / size:.1f}", f"{p.params / 1e6:.2f}", f"{p.p50_ms:.2f}", f"{p.p99_ms:.2f}",
             *([f"{p.top1:.2f}"] if accurate else []), "*" if p.depth in front else ""]
            for p in self
        ]
        return table([head, *rows])


def profile(
    net: nn.Module,
    x: Images,
    *,
    depths: Iterable[DepthLike] | None = None,
    run: Callable[..., Any] | None = None,
    rounds: int = 50,
    warmup: int = 5,
    accuracy: Iterable[Row | DetectionRow] | Mapping[Any, float] | None = None,
    norms: bool = False,
    progress: bool = False,
) -> Profile:
    """Count and time a net at several depths.

    Times are those of a forward in evaluation mode without gradients. After the warm-up every round runs every depth
    once, in an order drawn anew, so that a machine that slows down or speeds up does so for all depths alike. On CUDA
    they are taken between events on the device. Depth and mode of the net are afterwards what they were.

    Args:
        net: a converted net, also compiled.
        x: a batch, (B, 3, H, W), on the net's device and of its dtype; for a detector that takes a list of images
            (3, H, W), such a list.
        depths: which; None = every depth of the net.
        run: what is timed, called as `run(x, depth=depth)`, such as an `adn.Engine` of the net; None = the net itself.
        rounds: timed forwards per depth.
        warmup: forwards per depth before that.
        accuracy: top-1 in percent by depth, or what `adn.evaluate` returned; of a detector AP in percent, or what
            `evaluate_detector` returned. It must cover all depths.
        norms: count norms and sampling too, see `count_macs`.
        progress: show a progress bar, if in a terminal.

    Raises:
        ValueError: on a depth the net does not have or without accuracy, or if the net cannot take `x`.
    """
    if rounds < 1 or warmup < 0:
        raise ValueError(f"rounds={rounds}, warmup={warmup}; pass rounds >= 1 and warmup >= 0")
    if not len(x):
        raise ValueError("a batch of 0 images; pass at least 1")
    chosen = read_depths(net, depths)
    metric = METRICS[task_name(net)].name
    if isinstance(accuracy, Mapping):
        top1 = {Depth(depth): percent for depth, percent in accuracy.items()}
    else:
        top1 = {row.depth: getattr(row, metric) for row in accuracy or ()}
    missing = [str(depth) for depth in chosen if depth not in top1]
    if accuracy is not None and missing:
        raise ValueError(f"no accuracy given for {', '.join(missing)}; evaluate these depths or leave them out")
    macs = count_macs(net, x[:1], chosen, norms=norms)
    params = [count_parameters(net, depth) for depth in chosen]
    times = _measure(net, x, chosen, run, rounds, warmup, progress)
    p50, p99 = np.percentile(times, [50, 99], axis=1)
    points = [Point(*values, top1.get(values[0]))
              for values in zip(chosen, macs, params, p50.tolist(), p99.tolist(), strict=True)]
    return Profile(points, _machine(x, rounds, warmup), metric)


def fit_budget(profile: Sequence[Point], *, ms: float, percentile: int = 50) -> Depth:
    """The deepest depth that runs in a given time, the one with the most multiply-adds; of equals the most accurate,
    if known, then the fastest.

    Args:
        ms: time for one forward, in milliseconds, at the batch size of the profile.
        percentile: which of the measured times must fit, 50 or 99.

    Raises:
        ValueError: if none fits; it names the fastest.
    """
    if percentile not in (50, 99):
        raise ValueError(f"percentile={percentile}; a profile holds 50 and 99")
    spent = operator.attrgetter(f"p{percentile}_ms")
    fitting = [point for point in profile if spent(point) <= ms]
    if not fitting:
        if not profile:
            raise ValueError("an empty profile")
        fastest = min(profile, key=spent)
        raise ValueError(f"no depth runs in {ms} ms: the fastest, {fastest.depth}, takes {spent(fastest):.3g} ms "
                         f"(p{percentile})")
    return max(fitting, key=lambda point: (point.macs, point.top1 or 0, -spent(point))).depth


def _measure(net: nn.Module, x: Images, depths: list[Depth], run: Callable[..., Any] | None, rounds: int,
             warmup: int, progress: bool) -> np.ndarray:
    """Milliseconds, (depths, rounds)."""
    times = np.empty((len(depths), rounds))
    clock = clock_of(x[0].device)
    shuffle = random.Random(0).sample
    bar = progress_bar(total=warmup + rounds, desc="profile", unit="round", show=progress)
    with evaluating(net), torch.inference_mode(), bar:
        for step in range(-warmup, rounds):
            for i in shuffle(range(len(depths)), len(depths)):
                set_depth(net, depths[i])
                ms = clock(net if run is None else functools.partial(run, depth=depths[i]), x)
                if step >= 0:
                    times[i, step] = ms
            bar.update()
    return times


def clock_of(device: torch.device) -> Callable[[Callable[..., Any], Images], float]:
    """What gives the milliseconds of `run(x)` there."""
    return _cuda_ms if device.type == "cuda" else _host_ms


def _host_ms(run: Callable[..., Any], x: Images) -> float:
    start = time.perf_counter()
    run(x)
    return (time.perf_counter() - start) * 1e3


def _cuda_ms(run: Callable[..., Any], x: Images) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    device = x[0].device
    torch.cuda.synchronize(device)
    start.record(torch.cuda.current_stream(device))
    run(x)
    end.record(torch.cuda.current_stream(device))
    end.synchronize()
    return start.elapsed_time(end)


def _machine(x: Images, rounds: int, warmup: int) -> dict[str, str]:
    from .. import __version__

    shapes = dict.fromkeys("x".join(map(str, image.shape)) for image in x)

    return {
        "adn": __version__,
        "device": device_name(x[0].device),
        "threads": str(torch.get_num_threads()),
        "dtype": str(x[0].dtype).removeprefix("torch."),
        "batch": str(len(x)),
        "input": ", ".join(shapes),
        "rounds": f"{rounds} after {warmup} of warm-up",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
    }


def device_name(device: torch.device) -> str:
    """What the maker calls a device: "NVIDIA H200", "AMD EPYC 9654 96-Core Processor"."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as file:
        for line in file:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def require_matplotlib(path: str | os.PathLike[str] | None = None) -> None:
    """Before there is a figure: can it be drawn, and written to this file?

    Raises:
        ImportError: without matplotlib; names the extra.
        ValueError: if the name of the file ends in what matplotlib cannot write.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
    except ImportError as error:
        raise ImportError('a figure needs matplotlib: pip install "adn[plot]"') from error
    kinds = sorted(FigureCanvasAgg.get_supported_filetypes())
    if path is not None and Path(path).suffix.removeprefix(".").lower() not in kinds:
        raise ValueError(f"{path}: a figure is written as one of {', '.join(kinds)}, by the ending of its name")


def _draw(profile: Profile, path: str | os.PathLike) -> None:
    require_matplotlib(path)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    accurate = all(point.top1 is not None for point in profile)
    scale = 1 if accurate else 1e-9
    front = profile.pareto()
    # Stages first; of a stack, layers are left out once all stages are.
    most = max(point.depth.layers for point in profile)
    chain = [point for point in profile if list(point.depth.flags) == sorted(point.depth.flags, reverse=True)
             and (point.depth.layers == most or all(point.depth.flags))]
    chain.sort(key=lambda point: (sum(point.depth.flags), -sum(point.depth.layers)))

    def xy(points: Iterable[Point]) -> tuple[list[float], list[float]]:
        points = list(points)
        return [p.p50_ms for p in points], [p.value * scale for p in points]

    # A Figure of its own leaves the state of pyplot, and the choice of a window system, to the user.
    figure = Figure(figsize=(7, 4.5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot(*xy(profile), "o", color="0.75", markersize=5, label=f"{len(profile)} depths", zorder=2)
    axes.plot(*xy(chain), "o-", color="tab:blue", markersize=6, linewidth=1.2, label="one stage less each time",
              zorder=3)
    axes.plot(*xy(front), "o--", color="tab:orange", markerfacecolor="none", markersize=10, markeredgewidth=1.6,
              linewidth=1, label="Pareto front", zorder=4)
    axes.set_xlabel("latency p50 (ms)")
    axes.set_ylabel(_BY_NAME[profile.metric].axis if accurate else "GMACs per image")
    known = [profile.machine[key] for key in ("device", "input") if key in profile.machine]
    known += [f"{what} {profile.machine[what]}" for what in ("batch", "threads") if what in profile.machine]
    axes.set_title(", ".join(known), fontsize=9, color="0.35")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="0.92")
    axes.set_axisbelow(True)
    axes.margins(0.1)
    low, high = axes.get_ylim()
    if accurate and high - low < _LEAST_SPAN:
        # A tenth of a per cent is one image of a thousand: do not draw it as a cliff.
        top = min(max(high, 100.2), (low + high + _LEAST_SPAN) / 2)
        axes.set_ylim(top - _LEAST_SPAN, top)
    axes.legend(frameon=False, fontsize=8)
    _label(figure, axes, front, [point for point in chain if point not in front], profile, scale)
    figure.savefig(path)


def _label(figure: Any, axes: Any, above: list[Point], below: list[Point], every: Iterable[Point], scale: float
           ) -> None:
    """Write the names of depths beside their points where they cover no point and no other name, else nowhere."""
    figure.draw_without_rendering()
    renderer = figure.canvas.get_renderer()
    points = axes.transData.transform([(p.p50_ms, p.value * scale) for p in every])
    taken = [axes.get_legend().get_window_extent(renderer)]
    # Where to: points of the front have room above and left of them, those under it below and right.
    places = [(-7, 7, "right", "bottom"), (0, 9, "center", "bottom"), (-10, 0, "right", "center"),
              (7, 7, "left", "bottom"), (-7, -7, "right", "top"), (10, 0, "left", "center"), (0, -9, "center", "top"),
              (7, -7, "left", "top")]
    for point in (*above, *below):
        for dx, dy, across, up in places if point in above else reversed(places):
            text = axes.annotate(str(point.depth), (point.p50_ms, point.value * scale), (dx, dy), fontsize=8,
                                 textcoords="offset points", ha=across, va=up, family="monospace", zorder=5,
                                 bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.7, "pad": 0.5})
            box = text.get_window_extent(renderer)
            inside = axes.bbox.count_contains([(box.x0, box.y0), (box.x1, box.y1)]) == 2
            if inside and not box.count_contains(points) and not box.count_overlaps(taken):
                taken.append(box)
                break
            text.remove()
