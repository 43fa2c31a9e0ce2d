"""What launchers share: layouts, shared memory, banks and flags, precision of products."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import triton
from harness import layouts
from torch._prims_common import suggest_memory_format
from torch.testing import assert_close

from adn_kernels import launch
from adn_kernels.launch import (
    Layout,
    banks,
    cdiv,
    check_eps,
    check_flags,
    check_no_alias,
    dot_precision,
    layout_of,
    memory_format,
    next_power_of_2,
    on_gpu,
    tuned,
)


def read(x: torch.Tensor, layout: Layout) -> torch.Tensor:
    """x as a kernel that knows `layout` reads it."""
    n, c, h, w = x.shape
    if layout.channels_last:
        rows = x.as_strided((n * h * w, c), (layout.stride, 1))
        return rows.reshape(n, h, w, c).permute(0, 3, 1, 2)
    return x.as_strided((n, c * h * w), (layout.stride, 1)).reshape(n, c, h, w)


@pytest.mark.parametrize("sizes", [
    (2, 3, 4, 5), (1, 1, 1, 1), (1, 3, 4, 5), (2, 1, 4, 5), (2, 3, 1, 1), (2, 3, 1, 5), (2, 3, 4, 1), (1, 3, 1, 1),
    (1, 1, 1, 5), (5, 1, 1, 1),
], ids=str)
def test_layout(sizes: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    for i, x in enumerate(layouts(torch.randn(sizes))):
        assert memory_format(x) == suggest_memory_format(x)
        layout = layout_of(x)
        assert_close(read(x, layout), x, rtol=0, atol=0)
        if min(sizes) > 1:
            assert layout.channels_last == (i % 2 == 1)


@pytest.mark.parametrize("x", [
    torch.zeros(2, 3, 8, 8)[:, :, 1:5], torch.zeros(2, 3, 8, 8)[..., ::2], torch.zeros(2, 8, 4, 4)[:, ::2],
    torch.zeros(2, 3, 4, 5).transpose(2, 3), torch.zeros(1, 3, 4, 1).expand(1, 3, 4, 4),
    torch.zeros(2, 3, 4, 5).permute(1, 0, 2, 3),
], ids=["rows", "every second", "channels", "transposed", "expanded", "permuted"])
def test_no_layout(x: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"neither those of NCHW nor of NHWC: pass it.contiguous\(\)"):
        layout_of(x, "it")


def test_layout_of_other_things() -> None:
    layout_of(torch.zeros(0, 3, 4, 5))
    layout_of(torch.zeros(2, 3, 0, 5))
    with pytest.raises(ValueError, match=r"pass \(N, C, H, W\)"):
        layout_of(torch.zeros(2, 3, 4))


@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_channels_of_one_buffer_are_apart(format: torch.memory_format) -> None:
    buffer = torch.zeros(2, 16, 4, 4).contiguous(memory_format=format)
    for a, b in (((0, 8), (8, 16)), ((8, 16), (0, 8)), ((9, 16), (2, 6)), ((0, 1), (1, 2))):
        check_no_alias(buffer[:, slice(*a)], x=buffer[:, slice(*b)])
    check_no_alias(buffer[:1], x=buffer[1:])
    for a, b in (((0, 9), (8, 16)), ((0, 16), (0, 1)), ((3, 4), (3, 4))):
        with pytest.raises(ValueError, match="x shares memory with the output"):
            check_no_alias(buffer[:, slice(*a)], x=buffer[:, slice(*b)])


@pytest.mark.parametrize(("out", "x"), [
    (lambda b: b, lambda b: b), (lambda b: b[1:], lambda b: b[:-1]), (lambda b: b[::2], lambda b: b),
    (lambda b: b, lambda b: b.view(torch.int32)), (lambda b: b[:8].reshape(4, 2), lambda b: b[2:10].reshape(2, 4)),
])
def test_shared_memory(out, x) -> None:
    buffer = torch.zeros(16)
    with pytest.raises(ValueError, match="x shares memory"):
        check_no_alias(out(buffer), x=x(buffer))


def test_apart() -> None:
    buffer = torch.zeros(16)
    check_no_alias(buffer[:8], x=buffer[8:], y=None, z=torch.zeros(16))
    check_no_alias(buffer[::2], x=buffer[1::2])
    with pytest.raises(ValueError, match="the output is expanded"):
        check_no_alias(torch.zeros(1, 4).expand(3, 4))


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


@pytest.mark.parametrize("eps", [-1e-5, float("nan")])
def test_bad_eps(eps: float) -> None:
    with pytest.raises(ValueError, match="not negative"):
        check_eps(eps)


def test_sizes() -> None:
    for n in range(1, 5000):
        assert next_power_of_2(n) == triton.next_power_of_2(n)
        assert cdiv(n, 7) == triton.cdiv(n, 7)
    assert next_power_of_2(0) == 1


def test_which_tensors_run_kernels() -> None:
    with torch._subclasses.fake_tensor.FakeTensorMode():
        half, double = (torch.empty(2, device="cuda", dtype=dtype) for dtype in (torch.float16, torch.float64))
    assert on_gpu(half)
    assert on_gpu(half, None, half)
    assert not on_gpu(half, double)
    assert not on_gpu(torch.zeros(2))


@pytest.fixture
def precision() -> Iterator[None]:
    backends = torch.backends.cudnn.conv, torch.backends.cuda.matmul
    before = [backend.fp32_precision for backend in backends]
    yield
    for backend, value in zip(backends, before):
        backend.fp32_precision = value


@pytest.mark.usefixtures("precision")
def test_precision_is_that_of_torch() -> None:
    single, half = torch.zeros(1), torch.zeros(1).half()
    for kind, backend in (("conv", torch.backends.cudnn.conv), ("matmul", torch.backends.cuda.matmul)):
        backend.fp32_precision = "tf32"
        assert dot_precision(single, kind) == "tf32"
        assert dot_precision(half, kind) == "ieee"
        backend.fp32_precision = "ieee"
        assert dot_precision(single, kind) == "ieee"


def test_tables(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sm_90.json").write_text(
        '{"rows": [{"kernel": "k", "key": {"rows": 4, "dtype": "float16"}, "config": {"BM": 32}}]}')
    monkeypatch.setattr(launch, "TABLES", tmp_path)
    monkeypatch.setattr(launch, "_architecture", lambda index: "sm_90")
    launch._table.cache_clear()
    try:
        device, default = torch.device("cuda", 0), {"BM": 16}
        assert tuned("k", device, default, rows=4, dtype="float16") == {"BM": 32}
        assert tuned("k", device, default, dtype="float16", rows=4) == {"BM": 32}
        assert tuned("k", device, default, rows=5, dtype="float16") is default
        assert tuned("other", device, default, rows=4, dtype="float16") is default
        monkeypatch.setattr(launch, "_architecture", lambda index: "sm_80")
        assert tuned("k", device, default, rows=4, dtype="float16") is default
    finally:
        launch._table.cache_clear()
