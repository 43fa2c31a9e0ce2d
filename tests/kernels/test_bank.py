"""Which bank is live: what ops accept, what a reference picks and sums. The Triton part is tested with each kernel."""

from __future__ import annotations

import pytest
import torch

from adn_kernels.bank import banks, check_flags, flag_stride, flags_kind, per_bank, picked


@pytest.mark.parametrize(("flags", "message"), [
    (torch.zeros(3), "bank is torch.float32; pass int32"),
    (torch.zeros(3, dtype=torch.int64), "pass int32"),
    (torch.zeros(2, dtype=torch.int32), r"one per sample \(3\)"),
    (torch.zeros(3, 1, dtype=torch.int32), r"one per sample \(3\)"),
    (torch.zeros(6, dtype=torch.int32)[::2], r"pass bank.contiguous\(\)"),
    (torch.zeros(3, dtype=torch.int32, device="meta"), "bank is on meta, x on cpu"),
])
def test_bad_flags(flags: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_flags(flags, "bank", 3, torch.device("cpu"))


def test_good_flags() -> None:
    for shape in ((), (1,), (3,)):
        check_flags(torch.zeros(shape, dtype=torch.int32), "bank", 3, torch.device("cpu"))
    check_flags(None, "bank", 3, torch.device("cpu"))


BANK = torch.zeros((), dtype=torch.int32)


def test_banks() -> None:
    x, a, b = torch.zeros(2, 3), torch.zeros(3), torch.zeros(3)
    assert banks(x, 3, None, weight=a, bias=None) == ([a, None], [None, None])
    first, second = banks(x, 3, BANK, weight=(a, b), bias=None, mean=(None, None))
    assert first[0] is a
    assert second[0] is b
    assert first[1:] == second[1:] == [None, None]


@pytest.mark.parametrize(("bank", "weight", "message"), [
    (None, (torch.zeros(3),) * 2, "weight is a pair but no `bank` is given"),
    (None, 1.0, r"weight is a float; pass a tensor of shape \(3,\)"),
    (None, torch.zeros(4), r"pass contiguous floats of shape \(3,\)"),
    (None, torch.zeros(3, dtype=torch.int32), "pass contiguous floats"),
    (None, torch.zeros(6)[::2], "pass contiguous floats"),
    (None, torch.zeros(3, device="meta"), "weight is on meta, x on cpu"),
    (BANK, torch.zeros(3), r"pass weight as a pair \(first, second\)"),
    (BANK, (torch.zeros(3),), "as a pair"),
    (BANK, (torch.zeros(3), None), "as a pair"),
    (BANK, (torch.zeros(3), torch.zeros(2)), r"weight\[1\] is torch.float32 of shape \(2,\)"),
    (BANK, (torch.zeros(3), torch.zeros(3).half()), "pass both in one type"),
])
def test_bad_banks(bank: torch.Tensor | None, weight: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        banks(torch.zeros(2, 3), 3, bank, weight=weight)


@pytest.mark.parametrize(("bank", "kind"), [(None, 0), (BANK, 1), (BANK[None], 1), (torch.zeros(3).int(), 2)])
def test_kinds(bank: torch.Tensor | None, kind: int) -> None:
    assert flags_kind(bank) == kind
    assert flag_stride(bank) == (kind == 2)


@pytest.mark.parametrize("bank", [None, 0, 7, [1], [0, 1, -1]], ids=str)
def test_picked(bank: list[int] | int | None) -> None:
    first, second = torch.randn(4), torch.randn(4)
    flags = None if bank is None else torch.tensor(bank, dtype=torch.int32)
    want = [second if b else first for b in ([0] if bank is None else [bank] if isinstance(bank, int) else bank)]
    assert picked(first, second, flags).equal(torch.stack(want))
    assert picked(first, second, flags, torch.float64).dtype == torch.float64


def test_sums_of_banks() -> None:
    """A part with NaN poisons the gradient of its bank only."""
    parts = torch.randn(3, 4)
    parts[1] = float("nan")
    first, second = per_bank(parts, torch.tensor([0, 1, 0], dtype=torch.int32))
    assert first.equal(parts[0] + parts[2])
    assert second.isnan().all()
    assert per_bank(parts[::2], None)[0].equal(first)
