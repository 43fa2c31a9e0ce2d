"""What the threads of a warp do together, against the manual's pseudocode, lane by lane."""

from __future__ import annotations

import random

import pytest

from .handwritten import decoded, encoded, evaluate, execute

pytestmark = pytest.mark.ptx

MODES = ("up", "down", "bfly", "idx")
REDUCTIONS = [(name, type) for name in ("add", "min", "max") for type in ("s32", "u32")]
REDUCTIONS += [(name, "b32") for name in ("and", "or", "xor")]
FENCES = ["fence.acq_rel.gpu", "fence.sc.cta", "fence.acq_rel.sys", "membar.cta", "membar.gl", "membar.sys",
          "fence.proxy.async", *(f"fence.proxy.async.{space}" for space in (
              "global", "shared::cta", "async::global", "async::shared::cta"))]
FORMS = [f"shfl.sync.{mode}.b32" for mode in MODES] + [f"redux.sync.{name}.{type}" for name, type in REDUCTIONS]
FORMS += ["vote.sync.any.pred", "vote.sync.all.pred", "vote.sync.ballot.b32", "bar.warp.sync", *FENCES]


def source_lane(mode: str, lane: int, b: int, c: int) -> tuple[int, bool]:
    """The manual's section on shfl.sync, its pseudocode line by line: the lane, and whether it is inside."""
    bval, cval, segmask = b & 31, c & 31, c >> 8 & 31
    maxlane = (lane & segmask) | (cval & ~segmask & 31)
    minlane = lane & segmask
    j = {"up": lane - bval, "down": lane + bval, "bfly": lane ^ bval, "idx": minlane | (bval & ~segmask & 31)}[mode]
    inside = j >= maxlane if mode == "up" else j <= maxlane
    return (j if inside else lane), inside


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("control", [0, 31, 0x1F1F, 0x1C03, 0x181F, 0x1800, 0x100F])
def test_shfl(mode: str, control: int) -> None:
    random_ = random.Random(control)
    values = [random_.randrange(2**32) for _ in range(64)]
    steps = [random_.randrange(32) for _ in range(64)]
    found, inside = evaluate(f"shfl.sync.{mode}.b32", ("b32", "pred"), [("b32", values), ("b32", steps)],
                             f", {control:#x}, -1")
    for i in range(64):
        lane, valid = source_lane(mode, i % 32, steps[i], control)
        assert (found[i], inside[i]) == (values[i // 32 * 32 + lane], valid), i


@pytest.mark.parametrize(("name", "type"), REDUCTIONS)
def test_redux(name: str, type: str) -> None:
    random_ = random.Random(0)
    values = [random_.randrange(2**32) for _ in range(64)]
    (found,) = evaluate(f"redux.sync.{name}.{type}", (type,), [(type, values)], ", 0xffffffff")
    for warp in range(2):
        numbers = [decoded(v, type) for v in values[32 * warp:32 * warp + 32]]
        total = numbers[0]
        for n in numbers[1:]:
            total = {"add": total + n, "min": min(total, n), "max": max(total, n), "and": total & n, "or": total | n,
                     "xor": total ^ n}[name]
        assert found[32 * warp:32 * warp + 32] == [encoded(total, type)] * 32


def test_vote() -> None:
    flags = [0] * 32 + [1] * 32 + [int(i % 5 == 0) for i in range(32)]
    ballots = [sum(flags[32 * w + i] << i for i in range(32)) for w in range(3)]
    assert evaluate("vote.sync.any.pred", ("pred",), [("pred", flags)], ", -1") == [[0] * 32 + [1] * 64]
    assert evaluate("vote.sync.all.pred", ("pred",), [("pred", flags)], ", -1") == [[0] * 32 + [1] * 32 + [0] * 32]
    assert evaluate("vote.sync.ballot.b32", ("b32",), [("pred", flags)], ", -1") == [
        [ballots[i // 32] for i in range(96)]]


@pytest.mark.parametrize("fence", [*FENCES, "bar.warp.sync -1"])
def test_what_does_nothing(fence: str) -> None:
    execute(f"{fence};")


def test_only_whole_warps() -> None:
    for members in ("1", "%r1"):
        with pytest.raises(NotImplementedError, match="members other than all"):
            execute(f"shfl.sync.idx.b32 %r2, %r1, 0, 31, {members};")
