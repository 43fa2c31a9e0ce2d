"""The fused convolution: what it picks, that every backend computes the same, what it refuses."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from aot import fake_cuda, record
from conftest import few
from conv_cases import MIXTURES, bits, conv_case
from conv_cases import Conv as Case
from harness import DTYPES, Guards, assert_accurate, assert_caught, layouts, plant
from op_checks import check_compile, check_export, check_fake_gpu
from torch import Tensor
from torch.testing import assert_close

import adn_kernels.conv as module
from adn_kernels.activation import ACTIVATIONS
from adn_kernels.conv import choose, conv, conv_, fold, lay_out
from adn_kernels.epilogue import empty_output, fold_norm


@pytest.fixture
def nothing_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "tuned", lambda kernel, device, default, **key: default)


# kernel, input channels, channels, groups
KINDS = {
    "1x1": (1, 12, 20, 1), "3x3": (3, 12, 20, 1), "depthwise": (5, 12, 12, 12), "grouped": (3, 12, 20, 4),
    "7x7": (7, 12, 20, 1),
}


def make(
    kind: str = "3x3", *, n: int = 2, hw: tuple[int, int] = (5, 6), stride: int = 1, layout: int = 1,
    dtype: torch.dtype = torch.float32, activation: str = "relu", residual: bool = False, folded: bool = False,
    bank: list[int] | None = None, inputs: int | None = None,
) -> Case:
    k, depth, channels, groups = KINDS[kind]
    inputs = inputs or depth
    case = conv_case(n, inputs, *hw, channels, k, dtype=dtype, bank=bank, residual=residual, groups=groups,
                     activation=activation, stride=stride, padding=k // 2)
    case.x = layouts(case.x)[layout]
    if residual:
        case.residual = layouts(case.residual)[layout]
    return replace(case, scale=None, scale2=None) if folded else case


def by_op(case: Case, **kwargs: Any) -> Tensor:
    return conv(case.x, case.weight, *case.pairs, residual=case.residual, activation=case.activation, bank=case.bank,
                stride=case.stride, padding=case.padding, groups=case.groups, **kwargs)


def chosen(case: Case, backend: str | None = None, **kwargs: Any) -> str:
    return choose(case.x, case.weight, case.scale, case.residual, case.bank, case.activation, case.stride, case.padding,
                  case.groups, backend, **kwargs)


# Launchers


def check_launch(case: Case, backend: str, of: ModuleType = module) -> None:
    with Guards() as guards:
        placed = case.placed(guards)
        y = of.launch_conv(*placed.arguments, backend)
    guards.check()
    assert_accurate(f"conv by {backend}", y, placed.torch(), case.double().torch())
    assert y.stride() == empty_output(case.x, y.shape, None).stride()


def check_inplace(
    case: Case, backend: str, accumulate: bool, active: list[int] | None, of: ModuleType = module
) -> None:
    """Active samples as computed; inactive ones keep their bits, and their NaN stays where it is."""
    on = torch.ones(case.x.shape[0], dtype=torch.bool) if active is None else torch.tensor(active) != 0
    flags = None if active is None else torch.tensor(active, dtype=torch.int32)
    out = torch.randn_like(empty_output(case.x, case.shape, None))
    want = replace(case, residual=out if accumulate else None)
    eager, exact = want.placed(Guards()).torch(), want.double().torch()
    case.x[~on] = float("nan")
    out[~on, ::2] = float("nan")
    with Guards() as guards:
        given, placed = case.placed(guards), guards.place(out)
        given.residual = placed if accumulate else None
        y = of.launch_conv(*given.arguments, backend, placed, guards.place(flags))
    guards.check()
    assert y is placed
    y = y.cpu()
    assert bits(y[~on]).equal(bits(out[~on])), "an inactive sample was written"
    assert_accurate(f"conv_ by {backend}", y[on], eager.cpu()[on], exact[on])


LAUNCHES = [(kind, backend) for kind in KINDS for backend in ("triton", "unfused")
            if backend == "unfused" or kind in ("1x1", "3x3", "depthwise")]


@pytest.mark.launcher
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", range(4))
@pytest.mark.parametrize(("kind", "backend"), LAUNCHES)
def test_launch(kind: str, backend: str, layout: int, dtype: torch.dtype) -> None:
    check_launch(make(kind, stride=2, layout=layout, dtype=dtype, activation="silu", residual=True), backend)


@pytest.mark.launcher
@pytest.mark.parametrize("folded", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("kind", "backend"), [("grouped", "unfused"), ("depthwise", "triton")])
def test_launch_epilogue(kind: str, backend: str, activation: str, folded: bool) -> None:
    check_launch(make(kind, activation=activation, bank=[0, 1], folded=folded), backend)


@pytest.mark.launcher
@pytest.mark.parametrize(("kind", "backend"), LAUNCHES)
def test_launch_of_a_deployed_form(kind: str, backend: str) -> None:
    """Shift in x's dtype, as `fold` returns it."""
    case = make(kind, folded=True, dtype=torch.float16)
    check_launch(replace(case, shift=case.shift.half()), backend)


@pytest.mark.launcher
@pytest.mark.parametrize("accumulate", [True, False])
@pytest.mark.parametrize("active", [None, [0, 0, 0], [1, 0, 1], [0, 2, 0]], ids=str)
@pytest.mark.parametrize(("kind", "backend"), LAUNCHES)
def test_bypass(kind: str, backend: str, active: list[int] | None, accumulate: bool) -> None:
    check_inplace(make(kind, n=3, hw=(3, 3), bank=[0, 1, 0]), backend, accumulate, active)


@pytest.mark.launcher
@pytest.mark.parametrize(("change", "inplace"), [
    (("z, scale, shift, None, None, residual,", "z, scale, None, None, None, residual,"), False),
    (("kernel(y, x, weight, *vectors, residual,", "kernel(y, x, weight, *vectors, None,"), False),
    (("vectors = scale, shift,", "vectors = None, shift,"), False),
    (("bank, active, activation, stride, padding)\n    return y",
      "bank, None, activation, stride, padding)\n    return y"), True),
    (("write_active(out, y, active)\n        return", "write_active(out, y, None)\n        return"), True),
], ids=["bias", "residual", "scale", "active", "active unfused"])
def test_mistakes_are_noticed(change: tuple[str, str], inplace: bool, tmp_path: Path) -> None:
    def check(of: ModuleType) -> None:
        for backend in ("triton", "unfused"):
            if inplace:
                check_inplace(make("1x1"), backend, True, [1, 0], of)
            else:
                check_launch(make("1x1", residual=True), backend, of)
                check_launch(make("1x1", folded=True), backend, of)

    check(module)
    assert_caught(check, plant(module, tmp_path, change))


# What is picked


@pytest.mark.usefixtures("nothing_measured")
def test_default_choice() -> None:
    assert chosen(make("3x3", folded=True)) == "cudnn"
    assert chosen(make("3x3", folded=True, residual=True, layout=0)) == "cudnn"
    kinds = [{}, {"folded": True, "activation": "silu"}, {"folded": True, "layout": 3},
             {"folded": True, "bank": [0, 1]}]
    for case in (*(make("3x3", inputs=16, **kind) for kind in kinds), make("1x1"), make("1x1", folded=True),
                 make("depthwise", folded=True)):
        assert chosen(case) == "triton"
    assert chosen(make("3x3", folded=True, inputs=16), in_place=True) == "triton"
    for inputs, backend in ((3, "unfused"), (12, "unfused"), (24, "triton")):  # of 3 channels, as stems
        for kind in kinds:
            assert chosen(make("3x3", inputs=inputs, **kind)) == backend
        assert chosen(make("3x3", inputs=inputs, folded=True), in_place=True, bypassed=True) == "triton"
    assert chosen(make("grouped", folded=True)) == chosen(make("7x7", folded=True)) == "unfused"
    assert chosen(replace(make("1x1"), padding=1)) == "unfused"
    assert chosen(replace(make("depthwise"), stride=3)) == "unfused"


def test_measured_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    """The table decides, unless it says what this call cannot have."""
    keys = []

    def tuned(kernel: str, device: torch.device, default: dict, **key: int | str) -> dict[str, str]:
        assert kernel == "conv"
        assert default == {"backend": "triton"}
        keys.append(key)
        return {"backend": "cudnn"}

    monkeypatch.setattr(module, "tuned", tuned)
    assert chosen(make("1x1", folded=True)) == "cudnn"
    assert chosen(make("1x1")) == "triton"
    assert chosen(make("1x1", folded=True, activation="silu")) == "triton"
    assert keys[0] == {
        "n": 2, "depth": 12, "h": 5, "w": 6, "channels": 20, "kh": 1, "kw": 1, "stride": 1, "padding": 0, "groups": 1,
        "activation": "relu", "dtype": "torch.float32", "residual": 0, "cudnn": 1, "channels_last": 1,
    }


def test_measured_choice_is_for_all_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two rows, with and without cuDNN as a candidate, the second serves scale, banks and outputs given; none serves
    a call that may be bypassed, which only the kernels leave out."""
    monkeypatch.setattr(module, "tuned", lambda *_, **key: {"backend": "cudnn" if key["cudnn"] else "unfused"})
    assert chosen(make("1x1", folded=True)) == "cudnn"
    for case in (make("1x1"), make("1x1", bank=[0, 1]), make("1x1", bank=[0, 1], folded=True)):
        assert chosen(case) == "unfused"
    assert chosen(make("1x1", folded=True), in_place=True) == "unfused"
    for case in (make("1x1"), make("3x3", folded=True), make("depthwise", bank=[0, 1])):
        assert chosen(case, in_place=True, bypassed=True) == "triton"
    assert chosen(make("7x7"), in_place=True, bypassed=True) == "unfused"


@pytest.mark.parametrize(("case", "backend", "message"), [
    (make("3x3"), "cudnn", "fold it into the weight"),
    (make("3x3", folded=True, bank=[0, 1]), "cudnn", "no bank"),
    (make("3x3", folded=True, activation="gelu"), "cudnn", "no gelu"),
    (make("3x3", folded=True, layout=2), "cudnn", "would make"),
    (make("grouped"), "triton", "no Triton kernel for groups=4"),
    (make("7x7"), "triton", "no Triton kernel"),
    (make("3x3"), "cutlass", "'cudnn', 'triton', 'unfused'"),
])
def test_request_that_cannot_be_met(case: Case, backend: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        by_op(case, backend=backend)


def test_in_place_is_not_for_cudnn() -> None:
    case = make(folded=True)
    with pytest.raises(ValueError, match="no given output"):
        conv_(torch.zeros(case.shape), case.x, case.weight, activation="relu", padding=1, backend="cudnn")


# cuDNN


def aten(x: Tensor, weight: Tensor, bias: Tensor | None, stride: list, padding: list, dilation: list, groups: int) \
        -> Tensor:
    return F.relu(F.conv2d(x, weight, bias, stride, padding, dilation, groups))


def aten_add(x: Tensor, weight: Tensor, z: Tensor, alpha: float, bias: Tensor | None, *geometry: Any) -> Tensor:
    return F.relu(F.conv2d(x, weight, bias, *geometry) + alpha * z)


@pytest.mark.parametrize("layout", [0, 1])
@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("activation", ["identity", "relu"])
def test_what_cudnn_is_asked(activation: str, residual: bool, layout: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its fused convolutions stood in for, checked against their schemas; both operands come in one layout."""
    case = make(stride=2, layout=layout, activation=activation, residual=residual, folded=True)
    calls = []

    def stand_in(name: str, function: Callable) -> Callable:
        schema = getattr(torch.ops.aten, name).default._schema

        def call(*args: Any) -> Tensor:
            assert len(args) == len(schema.arguments)
            for value, argument in zip(args, schema.arguments):
                kind = str(argument.type)
                assert isinstance(value, Tensor) if kind == "Tensor" else True
                assert isinstance(value, list) == kind.startswith("List")
            format = torch.channels_last if layout else torch.contiguous_format
            assert all(t.is_contiguous(memory_format=format) for t in args[:2])
            calls.append(name)
            return function(*args)

        return call

    for name, function in (("cudnn_convolution_relu", aten), ("cudnn_convolution_add_relu", aten_add)):
        monkeypatch.setattr(torch.ops.aten, name, stand_in(name, function))
    y = module.launch_conv_cudnn(case.x, case.weight, case.shift, case.residual, activation, 2, 1, 1)
    assert_close(y, case.torch())
    assert y.stride() == empty_output(case.x, y.shape, None).stride()
    fused = ["cudnn_convolution_add_relu" if residual else "cudnn_convolution_relu"]
    assert calls == (fused if activation == "relu" else [])


# The op, on the CPU


@pytest.mark.parametrize("backend", [None, *module.BACKENDS])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_reference(kind: str, dtype: torch.dtype, backend: str | None) -> None:
    for layout, activation in itertools.product((0, 1), ("relu", "gelu")):
        case = make(kind, layout=layout, residual=True, folded=True, stride=2, dtype=dtype, activation=activation)
        if (backend == "triton" and kind in ("grouped", "7x7")) or (backend == "cudnn" and activation == "gelu"):
            continue
        y = by_op(case, backend=backend)
        assert_accurate("conv", y, case.torch(), case.double().torch())
        assert y.is_contiguous(memory_format=torch.channels_last if layout else torch.contiguous_format)
        if backend != "cudnn":
            out = case.residual.clone()
            assert conv_(out, case.x, case.weight, case.shift, accumulate=True, activation=activation, stride=2,
                         padding=case.padding, groups=case.groups, active=torch.tensor([1, 0], dtype=torch.int32),
                         backend=backend) is out
            assert_close(out, torch.stack([y[0], case.residual[1]]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("residual", [False, True, torch.float32], ids=str)
@pytest.mark.parametrize("size", [1, 3])
def test_op_equals_torch(size: int, residual: bool | torch.dtype, dtype: torch.dtype) -> None:
    for layout, stride, padding, bank in itertools.product(range(4), (1, 2), (0, size // 2), (None, 1, [0, 1, 0])):
        case = conv_case(3, 6, 5, 4, 7, size, dtype=dtype, stride=stride, padding=padding, bank=bank, residual=residual,
                         activation="gelu")
        case = replace(case, x=layouts(case.x)[layout])
        y = by_op(case, backend="triton")
        assert_accurate("conv", y, case.torch(), case.double().torch())
        assert y.is_contiguous(memory_format=torch.channels_last if layout % 2 else torch.contiguous_format)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("bank", [None, [1], [0, 1]], ids=str)
@pytest.mark.parametrize("folded", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_epilogue(kind: str, folded: bool, bank: list[int] | None, activation: str) -> None:
    case = make(kind, activation=activation, bank=bank, residual=True, folded=folded)
    assert_accurate("conv", by_op(case), case.torch(), case.double().torch())


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("active", MIXTURES, ids=str)
@pytest.mark.parametrize("kind", ["1x1", "3x3", "depthwise", "grouped"])
def test_in_place_op(kind: str, active: list[int] | None, accumulate: bool) -> None:
    case = make(kind, n=6, activation="silu", folded=True)
    flags = None if active is None else torch.tensor(active, dtype=torch.int32)
    on = torch.ones(6, dtype=torch.bool) if active is None else (flags != 0).expand(6)
    before = torch.randn(case.shape)
    before[~on, 0] = float("nan")
    out = before.clone()
    result = conv_(out, case.x, case.weight, case.shift, accumulate=accumulate, activation="silu",
                   padding=case.padding, groups=case.groups, active=flags)
    assert result is out
    assert torch.equal(bits(out[~on]), bits(before[~on]))
    assert_close(out[on], replace(case, residual=before if accumulate else None).torch()[on])


@pytest.mark.parametrize("kind", ["1x1", "3x3", "depthwise", "grouped"])
@pytest.mark.parametrize("layout", [0, 1])
def test_channels_of_a_larger_tensor(kind: str, layout: int) -> None:
    """Written while others of its channels are the residual; all else keeps its bits."""
    case = make(kind, n=3, activation="silu", folded=True)
    channels = case.shape[1]
    whole = layouts(torch.randn(3, 2 * channels + 3, *case.shape[2:]))[layout]
    before, out, residual = whole.clone(), whole[:, 2 : 2 + channels], whole[:, 2 + channels : 2 + 2 * channels]
    conv_(out, case.x, case.weight, case.shift, residual=residual, activation="silu", padding=case.padding,
          groups=case.groups)
    assert_close(out, replace(case, residual=residual).torch())
    assert torch.equal(whole[:, :2], before[:, :2])
    assert torch.equal(whole[:, 2 + channels :], before[:, 2 + channels :])


@pytest.mark.launcher
@pytest.mark.parametrize("kind", ["1x1", "3x3", "depthwise"])
def test_launch_to_channels_of_a_larger_tensor(kind: str) -> None:
    case = make(kind, n=3, activation="silu", folded=True, layout=1)
    channels = case.shape[1]
    whole = layouts(torch.randn(3, 3 * channels, *case.shape[2:]))[1]
    want = replace(case, residual=whole[:, :channels]).torch()
    guards = Guards()
    given, placed = case.placed(guards), guards.place(whole)
    module.launch_conv(*replace(given, residual=placed[:, :channels]).arguments, "triton",
                       placed[:, channels : 2 * channels])
    guards.check()
    assert_close(placed[:, channels : 2 * channels], want)
    for part in (placed[:, :channels], placed[:, 2 * channels :]):
        start = 0 if part.data_ptr() == placed.data_ptr() else 2 * channels
        assert torch.equal(part, whole[:, start : start + channels])


def test_folded_norm() -> None:
    torch.manual_seed(0)
    layer, norm = torch.nn.Conv2d(5, 9, 1), torch.nn.BatchNorm2d(9)
    for tensor in (norm.weight, norm.running_mean, norm.running_var, norm.bias):
        tensor.data.uniform_(0.5, 1.5)
    norm.eval()
    x = torch.randn(2, 5, 4, 4)
    with torch.no_grad():
        scale, shift = fold_norm(norm.weight, norm.bias, norm.running_mean, norm.running_var, norm.eps, layer.bias)
        assert_close(conv(x, layer.weight, scale, shift, activation="relu6"), F.relu6(norm(layer(x))))


def test_fold() -> None:
    for kind in KINDS:
        case = make(kind)
        for weight in (case.weight, case.weight.to(memory_format=torch.channels_last)):
            folded, shift = fold(weight, case.scale, case.shift)
            assert folded.stride() == weight.stride()
            assert_close(replace(case, weight=folded, scale=None, shift=shift).torch(), case.torch())
    folded, shift = fold(case.weight.half(), case.scale, case.shift)
    assert folded.dtype == shift.dtype == torch.float16
    assert_close(folded.float(), case.weight * case.scale[:, None, None, None], rtol=1e-3, atol=1e-3)
    weight = lay_out(make("depthwise").weight, 12)
    assert fold(weight, torch.ones(12), torch.ones(12))[0].stride() == weight.stride()


@pytest.mark.parametrize(("kind", "strides"), [
    ("depthwise", (1, 12, 60, 12)), ("1x1", (12, 1, 1, 1)), ("3x3", (108, 1, 36, 12)), ("grouped", (27, 1, 9, 3)),
])
def test_lay_out(kind: str, strides: tuple[int, ...]) -> None:
    """Channels adjacent: of the output in a depthwise weight, of the input in any other. All else is as it was."""
    case = make(kind)
    weight = lay_out(case.weight, case.groups)
    assert weight.equal(case.weight)
    assert weight.stride() == strides
    for backend in ("unfused", *(() if kind == "grouped" else ("triton",))):
        assert_close(by_op(replace(case, weight=weight), backend=backend), case.torch())


@pytest.mark.parametrize("name", ["x", "weight", "scale", "residual"])
def test_refuses_gradients(name: str) -> None:
    case = make(residual=True)
    getattr(case, name).requires_grad_()
    message = r"is for inference and has no backward: call it under torch.no_grad\(\)"
    with pytest.raises(RuntimeError, match=f"conv {message}"):
        by_op(case)
    with torch.no_grad():
        by_op(case)
    if name in ("x", "weight"):
        with pytest.raises(RuntimeError, match=f"conv_ {message}"):
            conv_(torch.zeros(case.shape), case.x, case.weight, padding=1)


def test_opcheck() -> None:
    for case in (make(residual=True, folded=True), make("depthwise", bank=[0, 1]), make("1x1", activation="silu")):
        torch.library.opcheck(torch.ops.adn.conv, (*case.arguments, None))
    case = make(residual=True, folded=True)
    # What runs it is cuDNN; here its shapes are checked.
    torch.library.opcheck(torch.ops.adn.conv_cudnn, (case.x, case.weight, case.shift, None, "identity", 1, 1, 1))
    torch.library.opcheck(torch.ops.adn.conv_, (
        case.residual, case.x, case.weight, case.shift, None, True, torch.tensor([0, 1], dtype=torch.int32), "relu", 1,
        1, 1, None))
    torch.library.opcheck(torch.ops.adn.conv_, (
        case.residual + 1, case.x, case.weight, case.shift, case.residual, False, None, "relu", 1, 1, 1, None))


def functional(kind: str, backend: str | None, activation: str) -> Callable:
    k, _, _, groups = KINDS[kind]
    common = {"activation": activation, "padding": k // 2, "groups": groups, "backend": backend}

    def forward(x: Tensor, weight: Tensor, shift: Tensor, residual: Tensor) -> Tensor:
        return conv(x, weight, None, shift, residual=residual, **common)

    return forward


def with_banks(kind: str, backend: str | None, activation: str) -> Callable:
    k, _, _, groups = KINDS[kind]

    def forward(x: Tensor, weight: Tensor, shift: Tensor, residual: Tensor) -> Tensor:
        bank = torch.ones((), dtype=torch.int32, device=x.device)
        return conv(x, weight, (shift, 2 * shift), (shift, 3 * shift), residual=residual, bank=bank,
                    activation=activation, padding=k // 2, groups=groups, backend=backend)

    return forward


def inplace(kind: str, backend: str | None, activation: str) -> Callable:
    k, _, _, groups = KINDS[kind]
    common = {"activation": activation, "padding": k // 2, "groups": groups, "backend": backend}

    def forward(x: Tensor, weight: Tensor, shift: Tensor, residual: Tensor) -> Tensor:
        active = torch.ones((), dtype=torch.int32, device=x.device)
        return conv_(residual + 1, x, weight, shift, accumulate=True, active=active, **common)

    return forward


@pytest.mark.parametrize("layout", few([0, 1], bool))
@pytest.mark.parametrize(("form", "kind", "backend", "activation"), [
    (functional, "1x1", None, "silu"), (functional, "3x3", "triton", "relu"), (functional, "3x3", "cudnn", "relu"),
    (functional, "depthwise", None, "relu6"), (functional, "grouped", None, "relu"), (with_banks, "1x1", None, "silu"),
    (with_banks, "depthwise", None, "silu"), (inplace, "3x3", None, "relu"), (inplace, "1x1", None, "relu"),
    (inplace, "depthwise", None, "relu"), (inplace, "grouped", None, "relu"),
])
def test_compile_and_export(form: Callable, kind: str, backend: str | None, activation: str, layout: int) -> None:
    function = form(kind, backend, activation)

    def make_args(n: int) -> list[Tensor]:
        case = make(kind, n=n, layout=layout, residual=True, folded=True)
        return [case.x, case.weight, case.shift, case.residual]

    check_compile(function, make_args)
    check_export(function, make_args, dynamic=(0, 3))
    check_fake_gpu(function, make_args(5), dynamic=(0, 3))


def test_empty_batch() -> None:
    for backend in module.BACKENDS:
        case = make(n=0, folded=True)
        assert by_op(case, backend=backend).shape == (0, 20, 5, 6)
    x, weight, *_ = case.arguments
    assert torch.ops.adn.conv_cudnn(x, weight, None, None, "relu", 1, 1, 1).shape == (0, 20, 5, 6)
    assert conv_(torch.empty(0, 20, 5, 6), case.x, case.weight, padding=1).shape == (0, 20, 5, 6)


@pytest.mark.launcher
@pytest.mark.parametrize("kind", ["1x1", "3x3", "depthwise"])
def test_empty_is_not_launched(kind: str) -> None:
    assert module.launch_conv(*make(kind, n=0).placed(Guards()).arguments, "triton").shape[0] == 0


X, W, OUT = torch.randn(2, 3, 4, 4), torch.randn(5, 3, 3, 3), torch.randn(2, 5, 4, 4)
S, FLAGS = torch.randn(5), torch.zeros(2, dtype=torch.int32)


@pytest.mark.parametrize(("call", "message"), [
    (lambda: conv(X[0], W), r"x has shape \(3, 4, 4\); pass \(N, K, H, W\)"),
    (lambda: conv(X, W[:, :2]), r"weight has shape \(5, 2, 3, 3\); pass \(C, 3, kh, kw\)"),
    (lambda: conv(X, W, groups=5), r"pass \(C divisible by 5, 3 / 5, kh, kw\)"),
    (lambda: conv(X, torch.tensor(1.0)), r"weight has shape \(\); pass \(C, 3, kh, kw\)"),
    (lambda: module.conv_op(X, W.double(), *[None] * 6, "relu", 1, 1, 1, None),
     "weight is torch.float64, x is torch.float32; pass both in one dtype"),
    (lambda: conv(X, W, stride=0), "stride=0, padding=0; pass a stride of 1 or more"),
    (lambda: conv(X, W, padding=-1), "stride=1, padding=-1; pass a stride of 1 or more, a padding of 0 or more"),
    (lambda: conv(X[:, :, :2], W), r"x of shape \(2, 3, 2, 4\) with padding 0 is smaller than the 3x3 weight"),
    (lambda: conv(X, W, S[:4]), r"scale is .* of shape \(4,\) .* pass contiguous floats of shape \(5,\)"),
    (lambda: conv(X, W, S, bank=FLAGS), r"`bank` is given: pass scale as a pair \(first, second\), or None"),
    (lambda: conv(X, W, (S, S)), "scale is a pair but no `bank` is given"),
    (lambda: conv(X, W, bank=FLAGS), "`bank` is given but neither scale nor shift"),
    (lambda: conv(X, W, None, (S, S.half()), bank=FLAGS), "the banks of shift are"),
    (lambda: conv(X, W, S.int()), "pass contiguous floats"),
    (lambda: conv(X, W, activation="tanh"), "activation='tanh'; pass one of"),
    (lambda: conv(X, W, residual=X, padding=1),
     r"residual has shape \(2, 3, 4, 4\); the output has \(2, 5, 4, 4\)"),
    (lambda: conv(X, W, (S, S), bank=FLAGS.long()), "bank is torch.int64; pass int32"),
    (lambda: conv(X, W, (S, S), bank=torch.zeros(3).int()), r"bank has shape \(3,\); pass one value, or"),
    (lambda: conv(X, W, (S, S), bank=torch.zeros(4).int()[::2]), r"bank has strides \(2,\)"),
    (lambda: conv_(OUT, X, W, padding=1, active=torch.zeros(2)), "active is torch.float32; pass int32"),
    (lambda: conv_(OUT[:, :4], X, W, padding=1), r"out has shape \(2, 4, 4, 4\); the output has \(2, 5, 4, 4\)"),
    (lambda: conv_(X, X, torch.randn(3, 3, 1, 1)), "x shares memory with the output"),
    (lambda: conv_(OUT, X, W, padding=1, residual=OUT), "residual shares memory with the output"),
    (lambda: conv_(OUT, X, W, padding=1, residual=OUT + 1, accumulate=True), "pass one of them"),
    (lambda: conv_(OUT, X, W, padding=1, residual=X), "residual has shape"),
    (lambda: conv_(torch.zeros(2, 3, 4, 4), X, W[:3], (S[:3], S[:3]), padding=1), "shift is a pair"),
])
def test_bad_input(call: Callable[[], Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(("changes", "message"), [
    ({"activation": "silu"}, "only relu"),
    ({"residual": torch.zeros(2, 20, 5, 6)}, "residual has strides"),
    ({"residual": torch.zeros(2, 20, 5, 6).to(torch.float64, memory_format=torch.channels_last)}, "residual is"),
    ({"x": layouts(torch.zeros(2, 12, 5, 6))[3]}, "x has strides"),
])
def test_what_cudnn_does_not_compute(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        by_op(replace(make(folded=True), **changes), backend="cudnn")


# Ahead of time the kernels are compiled by the tests of their own ops.


@pytest.mark.usefixtures("nothing_measured")
@pytest.mark.parametrize("bare", [False, True])
@pytest.mark.parametrize(("kind", "kernel"), [
    ("1x1", "gemm_kernel"), ("3x3", "gemm_kernel"), ("depthwise", "depthwise_kernel"),
    ("grouped", "batch_norm_eval_kernel"), ("stem", "batch_norm_eval_kernel")])
def test_launches(kind: str, kernel: str, bare: bool) -> None:
    """On a GPU, one launch of ours for what Triton computes, one for all that follows torch's convolution, if any."""
    case = make("3x3", inputs=3) if kind == "stem" else make(kind, inputs=16 if kind == "3x3" else None)
    if bare:
        case = replace(case, scale=None, shift=None, activation="identity")
    with fake_cuda():
        placed = [torch.empty_strided(a.shape, a.stride(), dtype=a.dtype, device="cuda") if isinstance(a, Tensor) else a
                  for a in case.arguments]
        recorded = record(lambda: module.conv_op._init_fn(*placed, None))
    assert [launch.name for launch in recorded] == ([] if bare and "norm" in kernel else [kernel])
