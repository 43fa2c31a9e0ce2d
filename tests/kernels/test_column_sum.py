"""The second stage of sums over rows, of each bank. With their first stages it is tested by the norms."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
import torch
from harness import DEVICE, Guards, assert_caught, plant
from torch.testing import assert_close

import adn_kernels.column_sum as module

pytestmark = pytest.mark.launcher


def check(
    blocks: tuple[int, int], channels: int, bank: list[int] | int | None, of: ModuleType = module,
    dtype: torch.dtype = torch.float32,
) -> None:
    """`blocks`: values of the bank, sums for each."""
    torch.manual_seed(0)
    parts, splits = blocks
    sums = torch.randn(parts, splits, channels)
    flags = None if bank is None else torch.tensor(bank, dtype=torch.int32)
    second = torch.zeros(parts, dtype=torch.bool) if bank is None else (flags != 0).expand(parts)
    sums[second, 0, 0] = float("nan")  # stays in its bank
    with Guards() as guards:
        placed, totals = guards.place(sums), [guards.place(torch.zeros(channels, dtype=dtype)) for _ in range(2)]
        of.launch_column_sum(placed, totals[0], None if bank is None else totals[1], guards.place(flags), splits)
    guards.check()
    for total, chosen in zip(totals[:1 if bank is None else 2], (~second, second)):
        assert_close(total.cpu(), sums[chosen].double().sum((0, 1)).to(dtype), equal_nan=True)


@pytest.mark.parametrize("bank", [None, 0, 1, [0, 1, 1], [1, 0, -3]], ids=str)
@pytest.mark.parametrize("channels", [1, 16, 37])
@pytest.mark.parametrize("splits", [1, 30, 88])
def test_sums(splits: int, channels: int, bank: list[int] | int | None) -> None:
    check((3, splits), channels, bank)


def test_in_half() -> None:
    check((2, 9), 24, [0, 1], dtype=torch.float16)


@pytest.mark.skipif(DEVICE == "cuda", reason="mistakes may read anywhere")
@pytest.mark.parametrize(("right", "wrong"), [
    ("second += tl.where(flag == 0, 0.0, v)", "second += v"), ("(b // splits)", "(b // 7)"),
    ("(b < blocks)[:, None]", "(b < blocks - 1)[:, None]"), ("cmask = c < C", "cmask = c < C - 1"),
    ("bank_stride, mask", "0, mask"), ("for start in range(0, blocks, BB)", "for start in range(0, BB, BB)"),
])
def test_mistakes_are_noticed(right: str, wrong: str, tmp_path: Path) -> None:
    check((3, 30), 37, [0, 1, 1])
    assert_caught(lambda of: check((3, 30), 37, [0, 1, 1], of), plant(module, tmp_path, (right, wrong)))
