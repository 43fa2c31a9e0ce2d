"""What tests of several files define: atomics by their rule."""

from __future__ import annotations

from .formats import SIZE
from .handwritten import decoded, encoded, halves


def added(old: int, new: int, type: str) -> int:
    if type.endswith("x2"):
        low, high = (added(a, b, type[:-2]) for a, b in zip(halves(old), halves(new)))
        return low | high << 16
    return encoded(decoded(old, type) + decoded(new, type), type)


UPDATES = {
    "add": added,
    "min": lambda old, new, type: encoded(min(decoded(old, type), decoded(new, type)), type),
    "max": lambda old, new, type: encoded(max(decoded(old, type), decoded(new, type)), type),
    "and": lambda old, new, type: old & new,
    "or": lambda old, new, type: old | new,
    "xor": lambda old, new, type: (old ^ new) % 2 ** (8 * SIZE[type]),
    "exch": lambda old, new, type: new,
}


def chain(first: int, last: int, steps: list[tuple[int, int]]) -> None:
    """Asserts that the steps (old, new) can be put in an order that leads from first to last."""
    now, left = first, list(steps)
    while left:
        here = [step for step in left if step[0] == now]
        assert here, f"nothing goes on from {now}"
        step = next((s for s in here if s[1] == now), here[0])
        left.remove(step)
        now = step[1]
    assert now == last
