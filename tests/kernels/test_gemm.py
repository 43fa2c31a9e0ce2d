"""The kernel of 1x1 and 3x3 convolutions and of linear layers against plain PyTorch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from aot import fake_cuda, record
from conv_cases import CONFIGS, MIXTURES, Conv, bits, configured, conv_case
from harness import (
    DEVICE,
    DTYPES,
    Guards,
    assert_accurate,
    assert_caught,
    bytes_of,
    examples,
    last_programs,
    layouts,
    plant,
    traffic,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from adn_kernels import gemm as module
from adn_kernels.activation import ACTIVATIONS
from adn_kernels.epilogue import empty_output

launcher = pytest.mark.launcher
both_sizes = pytest.mark.parametrize("size", [1, 3])
NHWC = torch.channels_last


def launch(case: Conv, module: ModuleType = module, config: dict | None = None) -> torch.Tensor:
    """What the launcher computes of `case`, between guards."""
    with Guards() as guards, configured(module, config):
        case = case.placed(guards)
        y = empty_output(case.x, case.shape, case.residual)
        module.launch_gemm(y, case.x, case.weight, *case.vectors, case.residual, case.bank, None, case.activation,
                           case.stride, case.padding)
    guards.check()
    return y


def check(case: Conv, module: ModuleType = module, config: dict | None = None) -> None:
    on_device = dataclasses.replace(case) if DEVICE == "cpu" else case.placed(Guards())
    assert_accurate("gemm", launch(case, module, config), on_device.torch(), case.double().torch())


@launcher
@pytest.mark.parametrize(("k", "c"), [(4096, 24), (24, 4096)])
def test_4096_channels(k: int, c: int) -> None:
    check(conv_case(1, k, 2, 1, c, 1, dtype=torch.float16, activation="relu", residual=True))


@launcher
def test_tf32() -> None:
    """Ten bits of mantissa, if torch is set so (in the interpreter all of them)."""
    case = conv_case(2, 300, 4, 4, 40, 1)
    torch.backends.cudnn.allow_tf32 = True  # what the fixture of all tests undoes
    torch.testing.assert_close(launch(case).cpu().double(), case.double().torch(), rtol=2**-8, atol=2**-8)


# N, K, H, W, C: ones, primes, just below, at and above tiles, an SE block's 1x1 map
SHAPES = [
    (1, 1, 1, 1, 1), (2, 3, 5, 7, 2), (3, 17, 4, 4, 31), (2, 64, 7, 7, 33), (5, 15, 1, 1, 16), (1, 65, 3, 11, 130),
    (4, 24, 6, 5, 40), (7, 128, 2, 2, 8),
]


@launcher
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("stride", [1, 2])
def test_shapes_and_layouts(shape: tuple[int, ...], stride: int, dtype: torch.dtype) -> None:
    n, k, h, w, c = shape
    case = conv_case(n, k, h, w, c, 1, dtype=dtype, stride=stride, activation="silu", residual=True)
    for i, x in enumerate(layouts(case.x)):
        check(dataclasses.replace(case, x=x, residual=layouts(case.residual)[(i + 1) % 4]))


# The smallest maps, primes, just below, at and above tiles
SHAPES_3X3 = [
    (1, 1, 3, 3, 1), (2, 3, 5, 7, 2), (2, 17, 4, 4, 31), (1, 33, 7, 5, 34), (3, 16, 3, 4, 24), (1, 64, 6, 3, 8)]


@launcher
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES_3X3, ids=str)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("padding", [0, 1])
def test_shapes_and_layouts_3x3(shape: tuple[int, ...], stride: int, padding: int, dtype: torch.dtype) -> None:
    n, k, h, w, c = shape
    case = conv_case(n, k, h, w, c, 3, dtype=dtype, stride=stride, padding=padding, activation="silu", residual=True)
    # Half of the layouts each, all of them with every stride and every padding
    for i in ((0, 1), (2, 3))[(stride + padding) % 2]:
        weight = case.weight.contiguous(memory_format=NHWC) if i else case.weight
        residual = layouts(case.residual)[(i + 1) % 4]
        check(dataclasses.replace(case, x=layouts(case.x)[i], weight=weight, residual=residual))


@launcher
@pytest.mark.parametrize("padding", [1, 2])
@pytest.mark.parametrize("side", [1, 2])
def test_maps_smaller_than_the_window(side: int, padding: int) -> None:
    for stride in (1, 2):
        case = conv_case(3, 8, side, side, 16, 3, stride=stride, padding=padding, activation="relu")
        if side + 2 * padding >= 3:
            for x in layouts(case.x):
                check(dataclasses.replace(case, x=x, weight=case.weight.contiguous(memory_format=NHWC)))


@launcher
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c['BM']}x{c['BN']}x{c['BK']}")
@both_sizes
def test_tiles(size: int, config: dict, dtype: torch.dtype) -> None:
    for n, k, h, w, c in (((2, 40, 5, 5, 40), (3, 35, 3, 5, 34), (70, 16, 1, 1, 24)) if size == 1 else
                          ((2, 40, 3, 5, 34), (40, 16, 1, 1, 24))):
        case = conv_case(n, k, h, w, c, size, dtype=dtype, padding=size // 2, activation="relu", residual=True,
                         bank=[i % 3 for i in range(n)])
        check(case, config=config)
        check(dataclasses.replace(case, x=layouts(case.x)[1], weight=layouts(case.weight)[1]), config=config)


@launcher
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("residual", [False, True, torch.float32])
@both_sizes
def test_activations(size: int, activation: str, residual: bool | torch.dtype, dtype: torch.dtype) -> None:
    check(conv_case(2, 19, 5, 3, 37, size, dtype=dtype, padding=size // 2, activation=activation, residual=residual))


@launcher
@pytest.mark.parametrize("bank", [None, 0, 1, [1], [0, 1, 0, 0, 5], [1, 1, 1, 1, 1]], ids=str)
@pytest.mark.parametrize("part", ["scale", "shift", "both"])
@both_sizes
def test_banks(size: int, bank: list[int] | int | None, part: str) -> None:
    case = conv_case(5, 8, 3, 3, 24, size, padding=size // 2, bank=bank, activation="gelu")
    if part != "both":
        out = "shift" if part == "scale" else "scale"
        case = dataclasses.replace(case, **{out: None, f"{out}2": None})
    for config in (CONFIGS[0], CONFIGS[-1]):
        check(case, config=config)


@launcher
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_banks_of_any_type(dtype: torch.dtype) -> None:
    case = conv_case(2, 8, 3, 3, 24, 1, bank=[0, 1])
    check(dataclasses.replace(case, **{name: getattr(case, name).to(dtype)
                                       for name in ("scale", "shift", "scale2", "shift2")}))


@launcher
@both_sizes
def test_without_epilogue(size: int) -> None:
    check(conv_case(2, 19, 5, 3, 37, size, affine=False))


@launcher
@settings(max_examples=examples(50), deadline=None, derandomize=True)
@given(
    n=st.integers(1, 5), k=st.integers(1, 40), h=st.integers(1, 8), w=st.integers(1, 8), c=st.integers(1, 50),
    size=st.sampled_from([1, 3]), stride=st.integers(1, 3), padding=st.integers(1, 2),
    activation=st.sampled_from(ACTIVATIONS), residual=st.booleans(), banks=st.booleans(), x_layout=st.integers(0, 3),
    weight_layout=st.integers(0, 3), residual_layout=st.integers(0, 3), config=st.sampled_from([None, *CONFIGS]),
)
def test_any(n, k, h, w, c, size, stride, padding, activation, residual, banks, x_layout, weight_layout,
             residual_layout, config) -> None:
    case = conv_case(n, k, h, w, c, size, stride=stride, padding=padding if size == 3 else 0, activation=activation,
                     residual=residual, bank=[i % 2 for i in range(n)] if banks else None, seed=n * k + c)
    case = dataclasses.replace(case, x=layouts(case.x)[x_layout], weight=layouts(case.weight)[weight_layout])
    if residual:
        case = dataclasses.replace(case, residual=layouts(case.residual)[residual_layout])
    check(case, config=config)


@launcher
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@both_sizes
def test_not_finite_stays_in_its_window(size: int, value: float) -> None:
    case = conv_case(2, 17, 3, 3, 20, size, padding=size // 2, activation="relu")
    case.x[1, 4, 2, 0] = value
    check(case)
    y = launch(case)
    assert bool(y[0].isfinite().all())


def check_in_place(
    case: Conv, active: torch.Tensor | None, accumulate: bool, module: ModuleType = module, config: dict | None = None,
    out_dtype: torch.dtype | None = None, layout: int = 1,
) -> None:
    """Active samples are computed; all others keep their bits, NaN in them and in x included."""
    n = len(case.x)
    flags = torch.ones(n, dtype=torch.bool) if active is None else (active != 0).expand(n)
    before = torch.randn(case.shape, generator=torch.Generator().manual_seed(5)).to(out_dtype or case.x.dtype)
    before = layouts(before)[layout]
    x = case.x.clone(memory_format=torch.preserve_format)
    x[~flags] = float("nan")
    before[~flags, ..., 0] = float("nan")
    case = dataclasses.replace(case, x=x, residual=before if accumulate else None)
    with Guards() as guards, configured(module, config):
        given, out = case.placed(guards), guards.place(before)
        module.launch_gemm(out, given.x, given.weight, *given.vectors, out if accumulate else None, given.bank,
                           guards.place(active), given.activation, given.stride, given.padding)
    guards.check()
    assert torch.equal(bits(out.cpu()[~flags]), bits(before[~flags]))
    eager = given.torch().to(before.dtype).cpu()[flags]
    assert_accurate("gemm in place", out.cpu()[flags], eager, case.double().torch()[flags])


@launcher
@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("active", MIXTURES, ids=str)
@pytest.mark.parametrize("side", [1, 7])
@both_sizes
def test_bypass(size: int, side: int, active: list[int] | None, accumulate: bool) -> None:
    """Tiles of 128 pixels span many samples, those of 32 end inside one."""
    flags = None if active is None else torch.tensor(active, dtype=torch.int32)
    for config, bank in ((CONFIGS[0], [0, 1, 1, 0, 0, 1]), (CONFIGS[3], None)):
        case = conv_case(6, 24, side, side, 40, size, padding=size // 2, bank=bank, activation="silu")
        check_in_place(case, flags, accumulate, config=config)


@launcher
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", [0, 1, 2, 3])
@both_sizes
def test_bypass_layouts(size: int, layout: int, dtype: torch.dtype) -> None:
    active = torch.tensor([1, 0, 1], dtype=torch.int32)
    case = conv_case(3, 8, 4, 6, 16, size, dtype=dtype, padding=size // 2, activation="relu", stride=2)
    check_in_place(case, active, True, layout=layout)
    check_in_place(case, active, False, out_dtype=torch.float32, layout=layout)
    check_in_place(case, torch.tensor(0, dtype=torch.int32), True, layout=layout)


@launcher
@pytest.mark.interpreter
@both_sizes
def test_bypassed_programs_read_nothing(size: int) -> None:
    case = conv_case(4, 32, 4, 4, 32, size, padding=size // 2)
    for active in (torch.tensor([0], dtype=torch.int32), torch.zeros(4, dtype=torch.int32)):
        out = torch.randn(4, 32, 4, 4)
        with traffic() as counts:
            module.launch_gemm(out, case.x, case.weight, *case.vectors, out, None, active, "relu", 1, case.padding)
        assert not bytes_of(counts["read"], out, case.x, case.weight, case.scale, case.shift)
        assert not bytes_of(counts["written"])


@launcher
@both_sizes
def test_deterministic(size: int) -> None:
    case = conv_case(4, 70, 7, 7, 90, size, activation="silu", bank=[0, 1, 1, 0], residual=True)
    assert torch.equal(bits(launch(case)), bits(launch(case)))


@launcher
@pytest.mark.interpreter
@pytest.mark.parametrize("stride", [1, 2])
def test_traffic(stride: int) -> None:
    """With all channels in one column of tiles x, residual and y are moved once; the weight once per row of tiles."""
    case = conv_case(4, 64, 32, 32, 64, 1, dtype=torch.float16, residual=True, stride=stride)
    x, residual = (t.contiguous(memory_format=NHWC) for t in (case.x, case.residual))
    y = torch.empty_like(residual)
    with traffic() as counts, configured(module, CONFIGS[0]):
        module.launch_gemm(y, x, case.weight, *case.vectors, residual, None, None, "relu", stride)
    rows = y[:, 0].numel() // CONFIGS[0]["BM"]
    assert bytes_of(counts["read"], x) == x.numel() * 2 / stride**2
    assert bytes_of(counts["read"], residual) == residual.numel() * 2
    assert bytes_of(counts["read"], case.weight) == rows * case.weight.numel() * 2
    assert bytes_of(counts["written"]) == y.numel() * 2
    # From HBM, the weight and the vectors read once (they stay in L2):
    minimum = 2 * (x.numel() / stride**2 + residual.numel() + y.numel() + case.weight.numel()) + 2 * 64 * 4
    rest = bytes_of(counts["read"], case.weight, case.scale, case.shift) * (1 - 1 / rows)
    assert bytes_of(counts["read"]) + bytes_of(counts["written"]) - rest <= 1.05 * minimum


@launcher
@pytest.mark.interpreter
def test_traffic_3x3() -> None:
    """y and the residual are moved once, the weight once per row of tiles, x once per tap less what is padding."""
    n, k, side, c = 2, 64, 16, 64
    case = conv_case(n, k, side, side, c, 3, dtype=torch.float16, padding=1, residual=True)
    x, weight, residual = (t.contiguous(memory_format=NHWC) for t in (case.x, case.weight, case.residual))
    y = torch.empty_like(residual)
    with traffic() as counts, configured(module, CONFIGS[0]):
        module.launch_gemm(y, x, weight, *case.vectors, residual, None, None, "relu", 1, 1)
    windows = n * (3 * side - 2) ** 2  # pixels of x under the 9 taps of all windows
    assert bytes_of(counts["read"], x) == windows * k * 2
    assert bytes_of(counts["read"], residual) == bytes_of(counts["written"]) == y.numel() * 2
    assert bytes_of(counts["read"], weight) == n * side**2 // CONFIGS[0]["BM"] * weight.numel() * 2


@launcher
@pytest.mark.interpreter
@pytest.mark.parametrize("channels_last", [False, True])
@both_sizes
def test_beyond_2_31_elements(size: int, channels_last: bool) -> None:
    """In a sample. Memory is committed where the last tile touches it. x is a crop, whose samples have a stride."""
    n, k, side, c = 2, 64, 6000, 64
    layout = NHWC if channels_last else torch.contiguous_format
    x = torch.empty(n, k, side, side, dtype=torch.float16, memory_format=layout)[..., 1:]
    assert x[0].numel() > 2**31
    case = conv_case(1, k, 1, 1, c, size, dtype=torch.float16, activation="relu", padding=size // 2)
    last = torch.randn(k, 2, 256).half()
    x[-1, :, -2:, -256:] = last
    y = empty_output(x, (n, c, *x.shape[2:]), None)
    with last_programs():
        module.launch_gemm(y, x, case.weight.contiguous(memory_format=layout), *case.vectors, None, None, None, "relu",
                           1, case.padding)
    z = F.conv2d(last.double()[None], case.weight.double(), padding=case.padding)
    exact = F.relu(z * case.scale.double()[:, None, None] + case.shift.double()[:, None, None])
    # The last tile: 32 of the channels at least.
    got, exact = y[-1:, -32:, -1:, -16:], exact[:, -32:, -1:, -16:]
    assert_accurate("gemm", got, exact.half(), exact)


def check_1x1(module: ModuleType = module) -> None:
    config = CONFIGS[-1]
    case = conv_case(3, 21, 3, 4, 19, 1, activation="silu", residual=True, bank=[0, 1, 0])
    check(case, module, config)
    check(dataclasses.replace(case, residual=layouts(case.residual)[3]), module, config)
    check(conv_case(1, 8, 4, 4, 16, 1, stride=2), module, config)


def check_3x3(module: ModuleType = module) -> None:
    case = conv_case(2, 17, 3, 4, 19, 3, padding=1, activation="silu", residual=True, bank=[0, 1])
    check(dataclasses.replace(case, residual=layouts(case.residual)[3]), module, CONFIGS[-1])


def check_bypass(module: ModuleType = module) -> None:
    case = conv_case(6, 24, 3, 3, 40, 1, activation="silu")
    check_in_place(case, torch.tensor([1, 0, 0, 1, 0, 1], dtype=torch.int32), True, module, CONFIGS[0])
    check_in_place(case, torch.tensor(0, dtype=torch.int32), True, module, CONFIGS[0])


@launcher
@pytest.mark.parametrize("check", [check_1x1, check_3x3, check_bypass])
def test_without_a_mistake(check: Callable[[], None]) -> None:
    check()


@launcher
@pytest.mark.skipif(DEVICE == "cuda", reason="mistakes may read anywhere")
@pytest.mark.parametrize(("check", "right", "wrong"), [
    (check_1x1, "k_mask = k0 + k < K", "k_mask = k0 + k < K + 1"),
    (check_1x1, "mask=inside[:, None] & k_mask[None, :], other=0.0", "mask=inside[:, None], other=0.0"),
    (check_1x1, "n = m // OHW", "n = m // (OHW + 1)"),
    (check_1x1, "row_mask = m < M", "row_mask = m < M - 1"),
    (check_1x1, "channel_mask = channel < C", "channel_mask = channel <= C"),
    (check_1x1, "residual_at, n, channel", "residual_at, n * 0, channel"),
    (check_1x1, "x_n, x_h, x_w, UNIT)\n", "x_n, x_w, x_h, UNIT)\n"),
    (check_1x1, "residual_n, residual_h, residual_w, UNIT)", "out_n, out_h, out_w, UNIT)"),
    (check_1x1, "stride * of_x[2], stride * of_x[3]", "stride * of_x[2], of_x[3]"),
    (check_1x1, "acc = tl.dot(a, b, acc,", "acc = tl.dot(a, b, acc * 0,"),
    (check_1x1, "weight_step = k0 * weight_k", "weight_step = 0"),
    (check_1x1, "scale, shift, scale2, shift2, bank,", "scale, shift, scale2, shift, bank,"),
    (check_3x3, "k_mask = k0 + k < K", "k_mask = k0 + k < K + 1"),
    (check_3x3, "(h + kh >= 0)", "(h + kh >= -1)"),
    (check_3x3, "(h + kh < H)", "(h + kh <= H)"),
    (check_3x3, "(w + kw >= 0)", "(w + kw > 0)"),
    (check_3x3, "(w + kw < W)", "(w + kw < W + 1)"),
    (check_3x3, "kw * weight_w)", "(2 - kw) * weight_w)"),
    (check_3x3, "* STRIDE - PADDING", "* STRIDE"),
    (check_3x3, "kh * weight_h + kw * weight_w", "kw * weight_h + kh * weight_w"),
    (check_3x3, "residual_at, n, channel", "residual_at, n * 0, channel"),
    (check_3x3, "TAPS * TAPS * blocks)", "TAPS * TAPS * blocks - 1)"),
    (check_bypass, "row_mask & (tl.load(active + n) != 0)", "row_mask & (tl.load(active + n) >= 0)"),
    (check_bypass, "(tl.load(active + n) != 0)", "(tl.load(active + n + 1) != 0)"),
    (check_bypass, "if tl.load(active) == 0:", "if tl.load(active) == 1:"),
    (check_bypass, "row_mask[:, None] & channel_mask[None, :]", "(m < M)[:, None] & channel_mask[None, :]"),
])
def test_planted_mistake_is_caught(tmp_path, check: Callable[[ModuleType], None], right: str, wrong: str) -> None:
    def checked(module: ModuleType) -> None:
        try:
            check(module)
        except (TypeError, ValueError) as error:  # a mistake may also make shapes not fit
            raise AssertionError from error

    assert_caught(checked, plant(module, tmp_path, (right, wrong)))


def aot(kind: str, dtype: torch.dtype, activation: str, n: int, k: int, side: int, c: int, size: int = 1,
        stride: int = 1, per_sample: bool = False) -> tuple[int, int]:
    """One launch on fake tensors: bytes it must move, operations."""
    def image(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="cuda", memory_format=NHWC)

    small = -(-side // stride)
    vectors = [torch.empty(c, device="cuda") if per_sample or i < 2 else None for i in range(4)]
    flags = torch.empty(n, dtype=torch.int32, device="cuda") if per_sample else None
    x, weight, out = image(n, k, side, side), image(c, k, size, size), image(n, c, small, small)
    if kind == "linear":
        x, weight, out = (t.permute(0, 2, 3, 1).flatten(1, 2) for t in (x, weight, out))
        weight, vectors = weight[:, 0], [None, vectors[1], None, None]
    residual = out if kind == "in place" else None if size == 3 or kind == "linear" else torch.empty_like(out)
    module.launch_gemm(out, x, weight, *vectors, residual, flags, flags if kind == "in place" else None,
                       "identity" if kind == "linear" else activation, stride, size // 2)
    moved = n * small * small * size**2 * k if size == 1 else x.numel()
    return (moved + (1 if residual is None else 2) * out.numel() + weight.numel()) * dtype.itemsize, (
        2 * n * small * small * size**2 * k * c)


def case(kind: str, *args: int, **kwargs: int) -> Callable[[torch.dtype, str], tuple[int, int]]:
    return lambda dtype, activation: aot(kind, dtype, activation, *args, **kwargs)


@pytest.mark.parametrize("architecture", ["sm_90", "sm_80", "none"])
def test_tiles_of_large_products(architecture: str) -> None:
    with fake_cuda(architecture):
        (launch,) = record(lambda: case("linear", 64, 384, 14, 1536)(torch.bfloat16, "silu"))
    assert (launch.args["BM"], launch.args["BN"]) == ((128, 128) if architecture == "sm_90" else (128, 64))


AOT = {
    "plain": case("conv", 64, 256, 56, 64),
    "bank per sample": case("conv", 64, 1024, 14, 256, per_sample=True),
    "stride 2": case("conv", 64, 256, 56, 512, stride=2),
    "in place, active per sample": case("in place", 64, 64, 56, 256, per_sample=True),
    "24 channels": case("in place", 64, 144, 56, 24, per_sample=True),
    "batch 8": case("in place", 8, 512, 14, 256, per_sample=True),
    "linear": case("linear", 64, 384, 14, 1536),
    "3x3": case("conv", 64, 64, 56, 64, size=3),
    "3x3 stride 2, bank per sample": case("conv", 64, 128, 56, 128, size=3, stride=2, per_sample=True),
    "3x3 in place, active per sample": case("in place", 64, 256, 14, 256, size=3, per_sample=True),
    "3x3 batch 8": case("in place", 8, 512, 14, 256, size=3, per_sample=True),
}
AOT_EXPECT = {"gemm_kernel": {"dot", "wide_loads", "wide_stores"}}

def AOT_OF_CHANNELS(c: int) -> list[Callable]:
    return [case("conv", 64, c, 56, c), case("in place", 64, 144, 56, c), case("conv", 64, c, 56, c, size=3),
            case("linear", 64, c, 14, c)]
