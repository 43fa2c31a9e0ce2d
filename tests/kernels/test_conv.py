"""The dispatcher of convolutions: what it picks, that every backend computes the same; cuDNN's fused convolution."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from aot import fake_cuda, record
from harness import DEVICE, DTYPES, Guards, assert_accurate, assert_caught, layouts, plant
from op_checks import check_compile, check_export, check_fake_gpu
from torch import Tensor
from torch.testing import assert_close

import adn_kernels.conv as module
from adn_kernels.activation import ACTIVATIONS, act_reference
from adn_kernels.conv import choose, conv, conv_, cudnn_conv, fold
from adn_kernels.depthwise import tap_major
from adn_kernels.epilogue import empty_output


@pytest.fixture
def nothing_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "tuned", lambda kernel, device, default, **key: default)


@dataclass
class Case:
    """Arguments of a convolution, on the CPU."""

    x: Tensor
    weight: Tensor
    scale: Tensor | None = None
    shift: Tensor | None = None
    residual: Tensor | None = None
    bank: Tensor | None = None
    activation: str = "relu"
    stride: int = 1
    padding: int = 0
    groups: int = 1

    def forward(self) -> tuple:
        """As the op and the launcher take them, but for the backend."""
        return (self.x, self.weight, self.scale, self.shift, self.residual, self.bank, self.activation, self.stride,
                self.padding, self.groups)


# kernel, input channels, channels, groups
KINDS = {
    "1x1": (1, 12, 20, 1), "3x3": (3, 12, 20, 1), "depthwise": (5, 12, 12, 12), "grouped": (3, 12, 20, 4),
    "7x7": (7, 12, 20, 1),
}


def make(
    kind: str = "3x3", *, n: int = 2, hw: tuple[int, int] = (5, 6), stride: int = 1, layout: int = 1,
    dtype: torch.dtype = torch.float32, activation: str = "relu", residual: bool = False, folded: bool = False,
    bank: list[int] | None = None, seed: int = 0,
) -> Case:
    torch.manual_seed(seed)
    k, inputs, channels, groups = KINDS[kind]
    x = layouts(torch.randn(n, inputs, *hw).to(dtype))[layout]
    size = (inputs // groups * k * k) ** -0.5
    weight = (torch.randn(channels, inputs // groups, k, k) * size).to(dtype)
    vectors = (channels,) if bank is None else (2, channels)
    case = Case(x, weight, None if folded else torch.rand(vectors) + 0.5, torch.randn(vectors), None, None, activation,
                stride, k // 2, groups)
    if residual:
        case.residual = layouts(torch.randn(shape(case)).to(dtype))[layout]
    if bank is not None:
        case.bank = torch.tensor(bank, dtype=torch.int32)
    return case


def shape(case: Case) -> tuple[int, ...]:
    return tuple(F.conv2d(case.x, case.weight, None, case.stride, case.padding, 1, case.groups).shape)


def plain(case: Case, dtype: torch.dtype | None = None, device: str = "cpu") -> Tensor:
    """The case in plain PyTorch, in `dtype` or in that of x."""
    kind = {"dtype": dtype or case.x.dtype, "device": device}
    z = F.conv2d(case.x.to(**kind), case.weight.to(**kind), None, case.stride, case.padding, 1, case.groups)
    for i, vector in enumerate((case.scale, case.shift)):
        if vector is not None:
            if case.bank is not None:
                vector = vector[(case.bank != 0).long()]
            vector = vector.to(**kind).reshape(-1, z.shape[1], 1, 1)
            z = z * vector if i == 0 else z + vector
    return act_reference(z if case.residual is None else z + case.residual.to(**kind), case.activation)


def chosen(case: Case, backend: str | None = None, **kwargs: Any) -> str:
    return choose(case.x, case.weight, case.scale, case.residual, case.bank, case.activation, case.stride, case.padding,
                  case.groups, backend, **kwargs)


# Launchers


def check_launch(case: Case, backend: str, of: ModuleType = module) -> None:
    with Guards() as guards:
        y = of.launch_conv(*(guards.place(a) if isinstance(a, Tensor) else a for a in case.forward()), backend)
    guards.check()
    assert_accurate(f"conv by {backend}", y, plain(case, device=DEVICE), plain(case, torch.float64))
    assert y.stride() == empty_output(case.x, y.shape, None).stride()


def check_inplace(
    case: Case, backend: str, accumulate: bool, active: list[int] | None, of: ModuleType = module
) -> None:
    """Active samples as computed; inactive ones keep their bits, and their NaN stays where it is."""
    on = torch.ones(case.x.shape[0], dtype=torch.bool) if active is None else torch.tensor(active) != 0
    flags = None if active is None else torch.tensor(active, dtype=torch.int32)
    out = torch.randn_like(empty_output(case.x, shape(case), None))
    want = replace(case, residual=out if accumulate else None)
    eager, exact = plain(want, device=DEVICE), plain(want, torch.float64)
    case.x[~on] = float("nan")
    out[~on, ::2] = float("nan")
    with Guards() as guards:
        x, weight, scale, shift, _, bank, *rest = case.forward()
        placed, *tensors = (guards.place(a) for a in (out, x, weight, scale, shift))
        of.launch_conv_(placed, *tensors, accumulate, guards.place(bank), guards.place(flags), *rest, backend)
    guards.check()
    y = placed.cpu()
    as_int = torch.int32 if out.dtype == torch.float32 else torch.int16
    assert y[~on].view(as_int).equal(out[~on].view(as_int)), "an inactive sample was written"
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
    (("shift.to(x.dtype) if is_bias else None", "None"), False),
    (("launch_conv1x1(*common)", "launch_conv1x1(*common[:4], None, *common[5:])"), False),
    (("common = (x, weight, scale,", "common = (x, weight, None,"), False),
    (("x, weight, scale, shift, accumulate, bank, active, activation, stride)\n    kind",
      "x, weight, scale, shift, accumulate, bank, None, activation, stride)\n    kind"), True),
    (("write_active(out, y, active)\n    common", "write_active(out, y, None)\n    common"), True),
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
    for case in (
        make("3x3"), make("3x3", folded=True, activation="silu"), make("3x3", folded=True, layout=3),
        make("3x3", bank=[0, 1], folded=True), make("1x1"), make("1x1", folded=True), make("depthwise", folded=True),
    ):
        assert chosen(case) == "triton"
    assert chosen(make("3x3", folded=True), in_place=True) == "triton"
    assert chosen(make("3x3", folded=True), in_place=True, bypassed=True) == "triton"
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
        torch.ops.adn.conv(*case.forward(), backend)


def test_in_place_is_not_for_cudnn() -> None:
    case = make(folded=True)
    with pytest.raises(ValueError, match="no given output"):
        conv_(torch.zeros(shape(case)), case.x, case.weight, activation="relu", padding=1, backend="cudnn")


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
    y = module.launch_cudnn_conv(case.x, case.weight, case.shift, case.residual, activation, 2, 1, 1)
    assert_close(y, plain(case))
    assert y.stride() == empty_output(case.x, y.shape, None).stride()
    fused = ["cudnn_convolution_add_relu" if residual else "cudnn_convolution_relu"]
    assert calls == (fused if activation == "relu" else [])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", [0, 1])
def test_cudnn_reference(kind: str, layout: int, dtype: torch.dtype) -> None:
    case = make(kind, layout=layout, residual=True, folded=True, dtype=dtype)
    case.shift = case.shift.to(dtype)
    y = cudnn_conv(case.x, case.weight, case.shift, residual=case.residual, activation="relu", padding=case.padding,
                   groups=case.groups)
    assert_accurate("cudnn_conv", y, plain(case), plain(case, torch.float64))


@pytest.mark.parametrize(("changes", "message"), [
    ({"activation": "silu"}, "only relu"),
    ({"bias": torch.zeros(12)}, r"pass \(20,\)"),
    ({"residual": torch.zeros(2, 20, 5, 6)}, "residual has strides"),
    ({"residual": torch.zeros(2, 20, 5, 6).to(torch.float64, memory_format=torch.channels_last)}, "residual is"),
    ({"x": layouts(torch.zeros(2, 12, 5, 6))[3]}, "x has strides"),
    ({"groups": 5}, r"pass \(C divisible by 5, 12 / 5, kh, kw\)"),
    ({"x": torch.zeros(2, 12, 5)}, r"pass \(N, K, H, W\)"),
    ({"stride": 0}, "a stride of 1 or more"),
    ({"x": torch.zeros(2, 12, 1, 1), "padding": 0}, "smaller than the 3x3 weight"),
])
def test_bad_input(changes: dict[str, Any], message: str) -> None:
    case = make(folded=True)
    arguments = {"x": case.x, "weight": case.weight, "bias": case.shift, "padding": 1, **changes}
    with pytest.raises(ValueError, match=message):
        cudnn_conv(arguments.pop("x"), arguments.pop("weight"), arguments.pop("bias"), **arguments)


def test_half_bias_is_wanted() -> None:
    case = make(dtype=torch.float16)
    with pytest.raises(ValueError, match=r"bias is torch.float32, x is torch.float16; pass both in one dtype"):
        torch.ops.adn.cudnn_conv(case.x, case.weight, case.shift, None, "relu", 1, 1, 1)
    y = cudnn_conv(case.x, case.weight.float(), case.shift, padding=1, activation="relu")  # cast
    assert_close(y, torch.ops.adn.cudnn_conv(case.x, case.weight, case.shift.half(), None, "relu", 1, 1, 1))


# The ops, on the CPU


@pytest.mark.parametrize("backend", [None, "triton", "unfused", "cudnn"])
@pytest.mark.parametrize("kind", KINDS)
def test_reference(kind: str, backend: str | None) -> None:
    for layout in (0, 1):
        case = make(kind, layout=layout, residual=True, folded=True, stride=2)
        if backend == "triton" and kind in ("grouped", "7x7"):
            continue
        y = torch.ops.adn.conv(*case.forward(), backend)
        assert_accurate("conv", y, plain(case), plain(case, torch.float64))
        if backend != "cudnn":
            out = case.residual.clone()
            x, weight, scale, shift, _, bank, *rest = case.forward()
            active = torch.tensor([1, 0], dtype=torch.int32)
            torch.ops.adn.conv_(out, x, weight, scale, shift, True, bank, active, *rest, backend)
            assert_close(out, torch.stack([y[0], case.residual[1]]))


def test_fold() -> None:
    for kind in KINDS:
        case = make(kind)
        for weight in (case.weight, case.weight.to(memory_format=torch.channels_last)):
            folded, shift = fold(weight, case.scale, case.shift)
            assert folded.stride() == weight.stride()
            assert_close(plain(replace(case, weight=folded, scale=None, shift=shift)), plain(case))
    folded, shift = fold(case.weight.half(), case.scale, case.shift)
    assert folded.dtype == shift.dtype == torch.float16
    assert_close(folded.float(), case.weight * case.scale[:, None, None, None], rtol=1e-3, atol=1e-3)
    weight = tap_major(make("depthwise").weight)
    assert fold(weight, torch.ones(12), torch.ones(12))[0].stride() == weight.stride()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bank", [None, [0, 1]], ids=str)
def test_gradients(kind: str, bank: list[int] | None) -> None:
    """Against autograd of plain PyTorch in float64."""
    case = make(kind, dtype=torch.float64, activation="silu", residual=True, bank=bank)
    actual, wanted = differentiable(case), differentiable(case)
    y, want = torch.ops.adn.conv(*actual.forward(), None), plain(wanted, torch.float64)
    dy = torch.randn(want.shape, dtype=torch.float64)
    y.backward(dy)
    want.backward(dy)
    for part in PARTS:
        assert_close(getattr(actual, part).grad, getattr(wanted, part).grad, rtol=1e-6, atol=1e-6, msg=part)


@pytest.mark.parametrize("activation", ["identity", "relu"])
def test_cudnn_gradients(activation: str) -> None:
    case = make(dtype=torch.float64, activation=activation, residual=True, folded=True)
    case.shift = case.shift.double()
    actual, wanted = differentiable(case), differentiable(case)
    y = cudnn_conv(actual.x, actual.weight, actual.shift, residual=actual.residual, activation=activation, padding=1)
    want = plain(wanted, torch.float64)
    dy = torch.randn(want.shape, dtype=torch.float64)
    y.backward(dy)
    want.backward(dy)
    for part in ("x", "weight", "shift", "residual"):
        assert_close(getattr(actual, part).grad, getattr(wanted, part).grad, rtol=1e-6, atol=1e-6, msg=part)


PARTS = ("x", "weight", "scale", "shift", "residual")


def differentiable(case: Case) -> Case:
    parts = {name: getattr(case, name) for name in PARTS}
    return replace(case, **{name: v if v is None else v.detach().clone().requires_grad_()
                            for name, v in parts.items()})


def test_opcheck() -> None:
    case = differentiable(make(residual=True, folded=True))
    torch.library.opcheck(torch.ops.adn.conv, (*case.forward(), None))
    torch.library.opcheck(torch.ops.adn.cudnn_conv,
                          (case.x, case.weight, case.shift, case.residual, "relu", 1, 1, 1))
    x, weight, scale, shift, residual, *rest = (a.detach() if isinstance(a, Tensor) else a for a in case.forward())
    torch.library.opcheck(torch.ops.adn.conv_, (
        residual, x, weight, scale, shift, True, rest[0], torch.tensor([0, 1], dtype=torch.int32), *rest[1:], None))


def functional(kind: str, backend: str | None, activation: str) -> Callable:
    k, _, _, groups = KINDS[kind]
    common = {"activation": activation, "padding": k // 2, "groups": groups, "backend": backend}

    def forward(x: Tensor, weight: Tensor, shift: Tensor, residual: Tensor) -> Tensor:
        return conv(x, weight, None, shift, residual=residual, **common)

    return forward


def inplace(kind: str, backend: str | None, activation: str) -> Callable:
    k, _, _, groups = KINDS[kind]
    common = {"activation": activation, "padding": k // 2, "groups": groups, "backend": backend}

    def forward(x: Tensor, weight: Tensor, shift: Tensor, residual: Tensor) -> Tensor:
        with torch.no_grad():
            active = torch.ones((), dtype=torch.int32, device=x.device)
            return conv_(residual + 1, x, weight, None, shift, accumulate=True, active=active, **common)

    return forward


def direct(kind: str, backend: str | None, activation: str) -> Callable:
    k, _, _, groups = KINDS[kind]

    def forward(x: Tensor, weight: Tensor, shift: Tensor, residual: Tensor) -> Tensor:
        return cudnn_conv(x, weight, shift, residual=residual, activation=activation, padding=k // 2, groups=groups)

    return forward


@pytest.mark.parametrize("layout", [0, 1])
@pytest.mark.parametrize(("form", "kind", "backend", "activation"), [
    (functional, "1x1", None, "silu"), (functional, "3x3", "triton", "relu"), (functional, "3x3", "cudnn", "relu"),
    (functional, "depthwise", None, "relu6"), (functional, "grouped", None, "relu"), (inplace, "3x3", None, "relu"),
    (inplace, "grouped", None, "relu"), (direct, "3x3", None, "relu"), (direct, "1x1", None, "identity"),
])
def test_compile_and_export(form: Callable, kind: str, backend: str | None, activation: str, layout: int) -> None:
    function = form(kind, backend, activation)

    def make_args(n: int) -> list[Tensor]:
        case = differentiable(make(kind, n=n, layout=layout, residual=True, folded=True))
        return [case.x, case.weight, case.shift, case.residual]

    check_compile(function, make_args)
    check_export(function, make_args, dynamic=(0, 3))
    with torch.no_grad():
        check_fake_gpu(function, make_args(5), dynamic=(0, 3))


def test_bank_not_live_gets_no_gradient() -> None:
    case = make()
    banks = [(case.scale.clone().requires_grad_(), case.shift.clone().requires_grad_()) for _ in range(2)]
    conv(case.x, case.weight, *banks[1], padding=1).sum().backward()
    assert banks[0][0].grad is None
    assert banks[1][0].grad is not None


def test_inplace_refuses() -> None:
    case = differentiable(make())
    with pytest.raises(RuntimeError, match="no backward"):
        conv_(torch.zeros(shape(case)), case.x, case.weight, padding=1)
    x = torch.zeros(2, 12, 5, 6)
    with pytest.raises(ValueError, match="x shares memory"):
        conv_(x, x, torch.zeros(12, 12, 3, 3), padding=1)


def test_empty_batch() -> None:
    for backend in ("triton", "unfused", "cudnn"):
        case = make(n=0, folded=True)
        assert torch.ops.adn.conv(*case.forward(), backend).shape == (0, 20, 5, 6)


# Ahead of time the kernels are compiled by the tests of their own ops.


@pytest.mark.usefixtures("nothing_measured")
@pytest.mark.parametrize(("kind", "launches"), [("1x1", 1), ("3x3", 1), ("depthwise", 1), ("grouped", 0)])
def test_launches(kind: str, launches: int) -> None:
    """On a GPU, one launch of ours for what Triton computes, none for the rest."""
    case = make(kind)
    with fake_cuda():
        placed = [torch.empty_strided(a.shape, a.stride(), dtype=a.dtype, device="cuda") if isinstance(a, Tensor) else a
                  for a in case.forward()]
        recorded = record(lambda: module._conv._init_fn(*placed, None))
    assert len(recorded) == launches
