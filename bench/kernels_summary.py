"""What a result file of `kernels.py` says about the targets of the fused kernels; nothing but the file is looked at."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence

Row = Mapping[str, str]
Named = list[tuple[float, str]]

COPY_FRACTION, EAGER_RATIO = 0.85, 1.5
BYPASS_US, HALF_SAVING, BLOCK_RATIO = 1.5, 0.4, 2.0
LARGE = 64e6
BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}


def summary(rows: Sequence[Row]) -> str:
    """One paragraph per target: met or missed and by how much, over how many layers; what was not measured."""
    ceilings = {row["layer"]: row["gb_s"] or row["tflop_s"] for row in rows if row["op"] == "ceiling"}
    timed = [row for row in rows if row["p50_us"]]
    cases: dict[tuple[str, ...], dict[str, Row]] = defaultdict(dict)
    for row in timed:
        cases[case_of(row)][row["contender"]] = row
    lines = [f"copy {ceilings.get('copy', '?')} GB/s, bf16 product {ceilings.get('matrix product', '?')} TFLOP/s"]

    for op, direction in (("batch_norm", "forward"), ("batch_norm", "backward"), ("batch_norm_eval", "forward")):
        large = [case for case in cases.values() if "ours" in case and is_a(case["ours"], op, direction)
                 and tensor_bytes(case["ours"]) > LARGE]
        what = f"{op} {direction}, tensors over 64 MB"
        lines.append(verdict(f"{what}: fraction of copy bandwidth", at_least(COPY_FRACTION), fractions(large)))
        for opponent, least in (("eager", EAGER_RATIO), ("compile", 1.0)):
            lines.append(verdict(f"{what}: times {opponent}", at_least(least), ratios(large, opponent)))
    for op in ("conv1x1", "linear", "depthwise"):
        bound = [case for case in cases.values() if "ours" in case and is_a(case["ours"], op, "forward")
                 and case["ours"]["bound"] == "memory"]
        lines.append(verdict(f"{op}, memory-bound: times the better of eager and compile", at_least(1.0),
                             ratios(bound, "eager", "compile")))
    for op in ("conv1x1", "conv3x3", "conv"):
        of_op = [case for case in cases.values() if "ours" in case and is_a(case["ours"], op, "forward")]
        lines.append(verdict(f"{op}: times cuDNN's fused convolution", None, ratios(of_op, "cudnn")))
    blocks = [case for case in cases.values() if "ours" in case and is_a(case["ours"], "blocks", "forward")
              and case["ours"]["batch"] == "1"]
    for clock, what in (("graph", "on the device"), ("wall", "called from Python")):
        chosen = [case for case in blocks if case["ours"]["clock"] == clock]
        lines.append(verdict(f"block at batch 1 {what}: times eager", at_least(BLOCK_RATIO), ratios(chosen, "eager")))
    lines.append(verdict("block at batch 1 on the device: times max-autotune", None, ratios(
        [case for case in blocks if case["ours"]["clock"] == "graph"], "max-autotune")))
    for op in sorted({row["op"] for row in timed if row["direction"] == "none active"}):
        bypassed = [(float(row["p50_us"]), name(row)) for row in timed
                    if is_a(row, op, "none active") and row["contender"] == "ours"]
        if op != "blocks":  # a block is three
            lines.append(verdict(f"{op} bypassed, microseconds in a graph", at_most(BYPASS_US), bypassed))
    lines.append(verdict("refinement block at batch 64, half of the samples bypassed: time saved",
                         at_least(HALF_SAVING), savings(cases)))

    lines += [f"not timed, {status}: {count} rows" for status, count in counted(rows)]
    return "\n".join(lines)


def case_of(row: Row) -> tuple[str, ...]:
    return tuple(row[key] for key in ("op", "network", "layer", "batch", "dtype", "direction", "clock"))


def name(row: Row) -> str:
    return f"{row['network']} {row['layer']} {row['shape']}"


def is_a(row: Row, op: str, direction: str) -> bool:
    return (row["op"], row["direction"]) == (op, direction)


def tensor_bytes(row: Row) -> int:
    size = BYTES[row["dtype"]]
    for n in row["shape"].split("x"):
        size *= int(n)
    return size


def fractions(cases: Iterable[Mapping[str, Row]]) -> Named:
    return [(float(case["ours"]["fraction"]), name(case["ours"])) for case in cases]


def ratios(cases: Iterable[Mapping[str, Row]], *opponents: str) -> Named:
    """Time of the best of the opponents that was measured, over ours."""
    found = []
    for case in cases:
        times = [float(row["ratio"]) for contender, row in case.items() if contender in opponents]
        if times:
            found.append((min(times), name(case["ours"])))
    return found


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


def verdict(what: str, target: tuple[str, float, Callable[[float], bool]] | None, values: Named) -> str:
    """`what`: target; met or missed; median and the layer furthest from the target. Without a target, the lowest."""
    if target is None:
        if not values:
            return f"{what}: NOT MEASURED"
        median = statistics.median(value for value, _ in values)
        return (f"{what}: no target; {len(values)} layers, median {median:.3g}, lowest {min(values)[0]:.3g} "
                f"({min(values)[1]})")
    words, number, met = target
    head = f"{what}: {words} {number:g}: "
    if not values:
        return head + "NOT MEASURED"
    worst = (min if words == "at least" else max)(values)
    passed = sum(met(value) for value, _ in values)
    state = "met on all" if passed == len(values) else f"MISSED on {len(values) - passed} of"
    away = "" if met(worst[0]) else f", {abs(worst[0] - number) / number:.0%} from the target"
    return (f"{head}{state} {len(values)} layers; median {statistics.median(v for v, _ in values):.3g}, "
            f"worst {worst[0]:.3g} ({worst[1]}){away}")


def counted(rows: Iterable[Row]) -> list[tuple[str, int]]:
    counts: dict[str, int] = defaultdict(int)
    for row in rows:
        if row["status"] != "measured":
            counts[row["status"].partition(": ")[0] + ": " + row["contender"]] += 1
    return sorted(counts.items())
