"""What a result file of `kernels.py` says about the targets of the fused kernels; nothing but the file is looked at."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence

Row = Mapping[str, str]
Named = list[tuple[float, str]]

COPY_FRACTION, EAGER_RATIO = 0.85, 1.5
BYPASS_US, HALF_SAVING, BLOCK_RATIO = 1.5, 0.4, 2.0
LARGE = 64e6
BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
NORMS = (("batch_norm", "forward"), ("batch_norm", "backward"), ("batch_norm_eval", "forward"),
         ("layer_norm", "forward"), ("layer_norm", "backward"))
BYPASSED = ("layer_norm", "conv1x1", "linear", "conv3x3", "depthwise")


def summary(rows: Sequence[Row]) -> str:
    """Of each target the command that measures it, and for each of its parts met or missed, by how much, over how many
    layers; at the end what was not measured. A layer counts for a part if all its opponents were timed."""
    ceilings = {row["layer"]: row["gb_s"] or row["tflop_s"] for row in rows if row["op"] == "ceiling"}
    cases: dict[tuple[str, ...], dict[str, Row]] = defaultdict(dict)
    for row in rows:
        if row["p50_us"] and row["ratio"]:
            cases[case_of(row)][row["contender"]] = row

    def ours(op: str, direction: str, chosen: Callable[[Row], bool] = lambda _: True) -> list[Mapping[str, Row]]:
        return [case for case in cases.values() if "ours" in case and chosen(case["ours"])
                and (case["ours"]["op"], case["ours"]["direction"]) == (op, direction)]

    lines = [f"copy {ceilings.get('copy', '?')} GB/s, bf16 product {ceilings.get('matrix product', '?')} TFLOP/s"]

    lines += target("norm and activation of tensors over 64 MB", "--ops batch_norm batch_norm_eval layer_norm")
    for op, direction in NORMS:
        large = ours(op, direction, lambda row: tensor_bytes(row) > LARGE)
        what = f"{op} {direction}"
        lines.append(verdict(f"{what}: fraction of copy bandwidth", at_least(COPY_FRACTION), fractions(large)))
        for opponent, least in (("eager", EAGER_RATIO), ("compile", 1.0)):
            lines.append(verdict(f"{what}: times {opponent}", at_least(least), *ratios(large, opponent)))

    lines += target("1x1 and depthwise convolutions bound by memory", "--ops conv linear")
    for op in ("conv1x1", "linear", "depthwise"):
        bound = ours(op, "forward", lambda row: row["bound"] == "memory")
        lines.append(verdict(f"{op}: times the better of eager and compile", at_least(1.0),
                             *ratios(bound, "eager", "compile")))

    lines += target("block as a unit at batch 1", "--ops blocks --batches 1")
    for clock, what in (("graph", "on the device"), ("wall", "called from Python")):
        blocks = ours("blocks", "forward", lambda row, clock=clock: (row["batch"], row["clock"]) == ("1", clock))
        lines.append(verdict(f"block {what}: times eager", at_least(BLOCK_RATIO), *ratios(blocks, "eager")))
        lines += [verdict(f"block {what}: times {opponent}", None, *ratios(blocks, opponent))
                  for opponent in ("compile", "max-autotune")]

    lines += target("bypassed op in a graph", "--ops layer_norm conv linear")
    for op in BYPASSED:
        times = [(float(case["ours"]["p50_us"]), name(case["ours"])) for case in ours(op, "none active")]
        lines.append(verdict(f"{op} bypassed: microseconds", at_most(BYPASS_US), times))

    lines += target("refinement block at batch 64, half of the samples bypassed", "--ops blocks --batches 64")
    lines.append(verdict("refinement block: time saved", at_least(HALF_SAVING), savings(cases)))

    lines += target("fused convolutions of cuDNN, no target", "--ops conv")
    lines += [verdict(f"{op}: times cuDNN's", None, *ratios(ours(op, "forward"), "cudnn"))
              for op in ("conv1x1", "conv3x3", "conv")]

    lines += ["", *(f"not timed, {status}: {count} rows" for status, count in counted(rows))]
    return "\n".join(lines)


def target(what: str, options: str) -> list[str]:
    return ["", f"{what} (python bench/kernels.py {options})"]


def case_of(row: Row) -> tuple[str, ...]:
    return tuple(row[key] for key in ("op", "network", "layer", "batch", "dtype", "direction", "clock"))


def name(row: Row) -> str:
    return f"{row['network']} {row['layer']} {row['shape']}"


def tensor_bytes(row: Row) -> int:
    return BYTES[row["dtype"]] * numel(row["shape"])


def numel(shape: str) -> int:
    return math.prod(map(int, shape.split("x")))


def fractions(cases: Iterable[Mapping[str, Row]]) -> Named:
    return [(float(case["ours"]["fraction"]), name(case["ours"])) for case in cases]


def ratios(cases: Sequence[Mapping[str, Row]], *opponents: str) -> tuple[Named, int]:
    """Time of the best of the opponents over ours, of the cases that have all of them; and how many cases there are."""
    return [(min(float(case[opponent]["ratio"]) for opponent in opponents), name(case["ours"])) for case in cases
            if all(opponent in case for opponent in opponents)], len(cases)


def savings(cases: Mapping[tuple[str, ...], Mapping[str, Row]]) -> Named:
    found = []
    for key, case in cases.items():
        if key[0] == "blocks" and key[3] == "64" and key[5] == "half active":
            whole = cases.get((*key[:5], "all active", key[6]), {})
            if "ours" in whole and "ours" in case:
                half = float(case["ours"]["p50_us"]) / float(whole["ours"]["p50_us"])
                found.append((1 - half, name(case["ours"])))
    return found


def at_least(target: float) -> tuple[str, float, Callable[[float], bool]]:
    return "at least", target, lambda value: value >= target


def at_most(target: float) -> tuple[str, float, Callable[[float], bool]]:
    return "at most", target, lambda value: value <= target


def verdict(
    what: str, target: tuple[str, float, Callable[[float], bool]] | None, values: Named, layers: int | None = None,
) -> str:
    """`what`: target; met or missed; median and the layer furthest from the target. Without a target, the lowest.

    Args:
        layers: how many there are, with those that lack an opponent and so have no value.
    """
    words, number, met = target or ("no target", 0.0, lambda _: True)
    head = f"{what}: {words} {number:g}: " if target else f"{what}: {words}; "
    if not values:
        return f"{head}NOT MEASURED" + (f" (on any of {layers} layers)" if layers else "")
    worst = (max if words == "at most" else min)(values)
    passed = sum(met(value) for value, _ in values)
    count = f"{len(values)} layers"
    if layers not in (None, len(values)):
        count += f" (of {layers}; others lack an opponent)"
    if target is not None:
        count = ("met on all " if passed == len(values) else f"MISSED on {len(values) - passed} of ") + count
    away = "" if met(worst[0]) else f", {abs(worst[0] - number) / number:.0%} from the target"
    return (f"{head}{count}; median {statistics.median(v for v, _ in values):.3g}, "
            f"{'worst' if target else 'lowest'} {worst[0]:.3g} ({worst[1]}){away}")


def counted(rows: Iterable[Row]) -> list[tuple[str, int]]:
    counts: dict[str, int] = defaultdict(int)
    for row in rows:
        if row["status"] != "measured":
            counts[row["status"].partition(": ")[0] + ": " + row["contender"]] += 1
    return sorted(counts.items())
