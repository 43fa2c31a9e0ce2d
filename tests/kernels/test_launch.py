"""What launchers share: shared memory, sizes, precision of products, tables."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch
import triton

from adn_kernels import launch
from adn_kernels.launch import cdiv, check_eps, check_no_alias, dot_precision, next_power_of_2, on_gpu, tuned


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


@pytest.mark.parametrize("kind", [torch.Tensor, torch.nn.Parameter])
def test_on_the_device_of_the_first_tensor(kind: type, monkeypatch: pytest.MonkeyPatch) -> None:
    """And with floating-point contraction as stated, whatever Triton's default is."""
    entered, launched = [], []
    monkeypatch.setattr(launch, "_device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext(entered.append(device)))
    kernel = {(3, 2): lambda *args, **options: launched.append((args, options, list(entered)))}
    x = torch.zeros(2).as_subclass(kind) if kind is torch.Tensor else kind(torch.zeros(2))
    launch.launch(kernel, [3, 2], x, 5, num_warps=4)
    assert launched == [((x, 5), {"num_warps": 4, "enable_fp_fusion": launch.FP_FUSION}, [x.device])]


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
