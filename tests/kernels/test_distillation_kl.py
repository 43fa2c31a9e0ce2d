"""Distillation KL: the kernels against plain PyTorch, their traffic; the ops' behaviour on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from aot import fake_cuda, record
from harness import (
    DEVICE,
    DTYPES,
    Guards,
    assert_accurate,
    assert_caught,
    bytes_of,
    last_programs,
    plant,
    traffic,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from op_checks import check_compile, check_export, check_fake_gpu
from torch import Tensor
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

import adn.distill
import adn_kernels.distillation_kl as module
from adn_kernels.distillation_kl import distillation_kl, feature_kl


@dataclass
class Case:
    """Arguments of either form, on the CPU. `channel_dim` None: logits (B, C)."""

    teacher: Tensor
    student: Tensor
    temperature: float = 1.0
    indices: Tensor | None = None
    channel_dim: int | None = None


def logits(
    rows: int = 5, classes: int = 13, *, dtype: torch.dtype = torch.float32, temperature: float = 2.0,
    top: int | None = None, scale: float = 3.0, seed: int = 0,
) -> Case:
    torch.manual_seed(seed)
    teacher, student = (torch.randn(rows, classes).mul(scale).to(dtype) for _ in range(2))
    indices = None if top is None else teacher.topk(top, 1, sorted=False).indices
    return Case(teacher, student, temperature, indices)


LAYOUTS = ("nchw", "nhwc", "tokens", "slice")


def features(
    n: int = 2, c: int = 13, h: int = 5, w: int = 7, *, layout: str = "nhwc", dtype: torch.dtype = torch.float32,
    temperature: float = 1.0, seed: int = 0,
) -> Case:
    """`tokens`: (N, H*W, C); `slice`: some channels of a wider NHWC map."""
    torch.manual_seed(seed)

    def one() -> Tensor:
        channels = c + 3 if layout == "slice" else c
        # Each channel with a mean of its own: pooling leaves something to compare.
        x = (torch.randn(n, channels, h, w) + 2 * torch.randn(n, channels, 1, 1)).to(dtype)
        if layout == "nchw":
            return x
        if layout == "tokens":
            return x.flatten(2).transpose(1, 2).contiguous()
        return x.contiguous(memory_format=torch.channels_last)[:, :c]

    return Case(one(), one(), temperature, None, -1 if layout == "tokens" else 1)


def plain(case: Case, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, and gradients of teacher and student for a gradient of 3 of the loss, by autograd.

    Without `dtype`, as eager PyTorch does it with half precision: softmax in float32, results in the inputs' type.
    """
    inputs = [t.detach().cpu().to(dtype or t.dtype).requires_grad_() for t in (case.teacher, case.student)]
    t, s = inputs
    if dtype is None:
        t, s = t.float(), s.float()
    if case.channel_dim is not None:
        t, s = (adn.distill.pool_features(x, case.channel_dim) for x in (t, s))
    if case.indices is not None:
        t, s = t.gather(1, case.indices), s.gather(1, case.indices)
    temperature = case.temperature
    loss = temperature**2 * F.kl_div(
        F.log_softmax(s / temperature, 1), F.log_softmax(t / temperature, 1), log_target=True, reduction="batchmean")
    (3 * loss).backward()
    return loss.detach(), inputs[0].grad, inputs[1].grad


def launched(
    case: Case, of: ModuleType = module, needs: Sequence[bool] = (True, True)
) -> tuple[Tensor, Tensor, Tensor]:
    """The same by the launchers, all buffers between guards."""
    with Guards() as guards:
        teacher, student = guards.place(case.teacher), guards.place(case.student)
        indices = guards.place(case.indices)
        dloss = guards.place(torch.tensor(3.0))
        if case.channel_dim is None:
            loss, stats = of.launch_distillation_kl(teacher, student, indices, case.temperature)
            grads = of.launch_distillation_kl_backward(
                dloss, teacher, student, indices, stats, case.temperature, needs)
        else:
            dim = case.channel_dim
            loss, t, s, stats = of.launch_feature_kl(teacher, student, dim, case.temperature)
            grads = [of.launch_feature_kl_backward(dloss, t, s, stats, x.shape, dim, x.stride(dim) == 1, x.dtype,
                                                   case.temperature, of_teacher)
                     for x, of_teacher in ((teacher, True), (student, False))]
    guards.check()
    return loss, *grads


def check(case: Case, of: ModuleType = module) -> None:
    names = ("loss", "gradient of the teacher", "gradient of the student")
    exact, eager = plain(case, torch.float64), plain(case)
    # Rounding of the logits counts 1 / temperature as much.
    atol = 1e-6 * max(1.0, 1 / case.temperature)
    for name, kernel, e, x in zip(names, launched(case, of), eager, exact):
        assert_accurate(name, kernel, e, x, atol=atol if kernel.dtype == torch.float32 else 1e-4)


# Rows of logits


@pytest.mark.launcher
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
@pytest.mark.parametrize(("rows", "classes"), [
    (1, 1), (1, 2), (3, 7), (17, 10), (130, 16), (2, 100), (4, 1000), (3, 1024), (1, 1031), (2, 4099), (0, 5),
])
def test_logits(rows: int, classes: int, temperature: float, dtype: torch.dtype) -> None:
    case = logits(rows, classes, temperature=temperature, dtype=dtype)
    if rows:
        check(case)
    else:
        assert launched(case)[0].isnan()


@pytest.mark.launcher
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("classes", "top"), [(10, 1), (10, 3), (100, 50), (1000, 500), (37, 36), (37, 37)])
def test_top_classes(classes: int, top: int, dtype: torch.dtype) -> None:
    check(logits(6, classes, top=top, dtype=dtype))


@pytest.mark.launcher
@pytest.mark.parametrize(("dtypes", "top"), [
    ((torch.float32, torch.float16), None), ((torch.float16, torch.float32), 5),
], ids=str)
def test_mixed_dtypes(dtypes: tuple[torch.dtype, torch.dtype], top: int | None) -> None:
    case = logits(top=top)
    case.teacher, case.student = case.teacher.to(dtypes[0]), case.student.to(dtypes[1])
    check(case)


@pytest.mark.launcher
@pytest.mark.parametrize("top", [None, 4])
def test_any_strides(top: int | None) -> None:
    """A column-major teacher, a student that is every second class of a wider one."""
    case = logits(top=top)
    case.teacher = case.teacher.T.contiguous().T
    case.student = torch.randn(5, 30)[:, 1:27:2]
    check(case)


@pytest.mark.launcher
@pytest.mark.parametrize("shift", [1e4, -1e4])
def test_far_from_zero(shift: float) -> None:
    """Softmax is taken relative to the maximum: nothing overflows."""
    case = logits(4, 50)
    case.teacher, case.student = case.teacher + shift, case.student - shift
    check(case)


@pytest.mark.launcher
@settings(max_examples=25, deadline=None, derandomize=True)
@given(rows=st.integers(1, 40), classes=st.integers(1, 70), share=st.floats(0, 1), seed=st.integers(0, 9),
       temperature=st.floats(0.25, 8), scale=st.sampled_from([0.0, 0.1, 3.0, 30.0]))
def test_any_rows(rows: int, classes: int, share: float, seed: int, temperature: float, scale: float) -> None:
    top = max(1, round(share * classes))
    check(logits(rows, classes, temperature=temperature, top=top if top < classes else None, scale=scale, seed=seed))


@pytest.fixture
def looped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows too long for registers, without their length."""
    monkeypatch.setattr(module, "MAX_CLASSES", 0)


@pytest.mark.launcher
@pytest.mark.usefixtures("looped")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("classes", "top"), [(1, None), (50, None), (4096, None), (4097, 4096), (9000, None),
                                              (9000, 5000)])
def test_long_rows(classes: int, top: int | None, dtype: torch.dtype) -> None:
    check(logits(3, classes, top=top, dtype=dtype))


@pytest.mark.launcher
@pytest.mark.usefixtures("looped")
def test_long_rows_that_rise() -> None:
    """The maximum grows in every block, that of teacher and student at different times."""
    case = logits(2, 20000)
    case.teacher += torch.linspace(-50, 50, 20000)
    case.student += torch.linspace(50, -50, 20000)
    check(case)


@pytest.mark.launcher
@pytest.mark.parametrize("loop", [False, True])
@pytest.mark.parametrize(("side", "value"), [
    ("teacher", float("nan")), ("student", float("nan")), ("teacher", float("inf")), ("student", float("inf")),
    ("teacher", float("-inf")), ("student", float("-inf")),
])
def test_nan_and_infinity(side: str, value: float, loop: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in torch; rows without one keep their gradients."""
    if loop:
        monkeypatch.setattr(module, "MAX_CLASSES", 0)
    case = logits(3, 5000)
    getattr(case, side)[1, 3] = value
    loss, dteacher, dstudent = (t.cpu() for t in launched(case))
    expected = plain(case)
    assert_close(loss, expected[0], equal_nan=True)
    for grad, want in ((dteacher, expected[1]), (dstudent, expected[2])):
        assert_close(grad[[0, 2]], want[[0, 2]], rtol=1e-4, atol=1e-6)
    assert dstudent[1].isnan().any() == expected[2][1].isnan().any()


@pytest.mark.launcher
@pytest.mark.parametrize("top", [None, 3])
@pytest.mark.parametrize("needs", [(True, False), (False, True)])
def test_only_gradients_wanted(needs: tuple[bool, bool], top: int | None) -> None:
    case = logits(top=top)
    grads, expected = launched(case, needs=needs)[1:], plain(case)[1:]
    for grad, want, need in zip(grads, expected, needs):
        if need:
            assert_close(grad.cpu(), want)
        else:
            assert grad.numel() == 0


# Feature maps


@pytest.mark.launcher
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("sizes", [
    (2, 13, 5, 7), (1, 1, 1, 1), (3, 64, 1, 1), (1, 200, 3, 3), (2, 5, 31, 33), (5, 17, 2, 1),
], ids=str)
def test_features(sizes: tuple[int, int, int, int], layout: str, dtype: torch.dtype) -> None:
    check(features(*sizes, layout=layout, dtype=dtype))


@pytest.mark.launcher
@pytest.mark.parametrize("layout", LAYOUTS)
def test_features_of_two_resolutions(layout: str) -> None:
    case = features(layout=layout, temperature=3.0)
    case.student = features(h=3, w=2, layout=layout, seed=1).student
    check(case)


@pytest.mark.launcher
def test_features_of_two_layouts_and_types() -> None:
    case = features(layout="nchw", dtype=torch.float16)
    case.student = features(layout="nhwc", seed=1).student
    check(case)


@pytest.mark.launcher
@settings(max_examples=20, deadline=None, derandomize=True)
@given(n=st.integers(1, 4), c=st.integers(1, 70), h=st.integers(1, 12), w=st.integers(1, 12),
       layout=st.sampled_from(LAYOUTS), temperature=st.floats(0.25, 8), seed=st.integers(0, 9))
def test_any_features(n: int, c: int, h: int, w: int, layout: str, temperature: float, seed: int) -> None:
    check(features(n, c, h, w, layout=layout, temperature=temperature, seed=seed))


@pytest.mark.launcher
def test_nan_of_a_feature() -> None:
    """A sample with NaN has NaN for a gradient, the others have theirs."""
    case = features(3)
    clean = launched(case)[2].cpu()
    case.student[1, 2, 3, 3] = float("nan")
    loss, _, grad = (t.cpu() for t in launched(case))
    assert loss.isnan()
    assert grad[1].isnan().all()
    assert_close(grad[[0, 2]], clean[[0, 2]])


@pytest.mark.launcher
def test_no_samples() -> None:
    loss, *grads = launched(features(0))
    assert loss.isnan()
    assert [grad.shape for grad in grads] == [(0, 13, 5, 7)] * 2


@pytest.mark.launcher
@pytest.mark.parametrize("case", [logits(5, 300, top=70), features(3, 33, layout="nchw")], ids=["logits", "features"])
def test_deterministic(case: Case) -> None:
    for a, b in zip(launched(case), launched(case)):
        assert a.equal(b)


@pytest.mark.launcher
@pytest.mark.skipif(DEVICE == "cuda", reason="counted by the interpreter")
@pytest.mark.parametrize("loop", [False, True])
@pytest.mark.parametrize("top", [None, 500])
def test_traffic_of_logits(top: int | None, loop: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each logit compared is read once forward and once backward; 5 numbers per row are kept."""
    if loop:
        monkeypatch.setattr(module, "MAX_CLASSES", 0)
    case = logits(8, 1000, top=top)
    compared = 8 * (top or 1000) * 4
    with traffic() as counts:
        _, stats = module.launch_distillation_kl(case.teacher, case.student, case.indices, 1.0)
    assert bytes_of(counts["read"], case.teacher) == bytes_of(counts["read"], case.student) == compared
    assert bytes_of(counts["written"]) == 5 * 8 * 4
    with traffic() as counts:
        grads = module.launch_distillation_kl_backward(
            torch.ones(()), case.teacher, case.student, case.indices, stats, 1.0, (False, True))
    assert bytes_of(counts["read"], case.teacher) == bytes_of(counts["read"], case.student) == compared
    assert bytes_of(counts["written"]) == bytes_of(counts["written"], grads[1]) == compared
    # Everything else, statistics and indices: little.
    indices = 0 if top is None else 2 * compared
    assert bytes_of(counts["read"]) - 2 * compared - indices <= 0.05 * compared


@pytest.mark.launcher
@pytest.mark.skipif(DEVICE == "cuda", reason="counted by the interpreter")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_traffic_of_features(layout: str) -> None:
    """Forward reads each map once, backward writes once and reads pooled features only."""
    case = features(2, 64, 28, 28, layout=layout)
    dim, size = case.channel_dim, case.teacher.numel() * 4
    with traffic() as counts:
        _, t, s, stats = module.launch_feature_kl(case.teacher, case.student, dim, 1.0)
    assert bytes_of(counts["read"], case.teacher) == bytes_of(counts["read"], case.student) == size
    assert bytes_of(counts["read"]) + bytes_of(counts["written"]) <= 1.05 * 2 * size
    with traffic() as counts:
        dx = module.launch_feature_kl_backward(
            torch.ones(()), t, s, stats, case.student.shape, dim, case.student.stride(dim) == 1, torch.float32, 1.0,
            False)
    assert bytes_of(counts["written"]) == bytes_of(counts["written"], dx) == size
    assert bytes_of(counts["read"]) <= 0.15 * size


@pytest.mark.launcher
@pytest.mark.skipif(DEVICE == "cuda", reason="the interpreter can run single programs")
def test_logits_beyond_2_31_elements() -> None:
    rows, classes = 2**21 + 7, 1030
    teacher = torch.empty(rows, classes, dtype=torch.float16)
    teacher[-1] = torch.randn(classes).half()
    student = torch.empty(rows, classes, dtype=torch.float16)
    student[-1] = torch.randn(classes).half()
    assert student.numel() > 2**31
    with last_programs():
        _, stats = module.launch_distillation_kl(teacher, student, None, 1.0)
        _, grad = module.launch_distillation_kl_backward(
            torch.ones(()), teacher, student, None, stats, 1.0, (False, True))
    t, s = teacher[-1:].double(), student[-1:].double()
    kl = F.kl_div(s.log_softmax(1), t.log_softmax(1), log_target=True, reduction="batchmean")
    assert_close(stats[4, -1].double(), kl, rtol=1e-5, atol=1e-6)
    # Only the last block of classes was written.
    want = ((s.softmax(1) - t.softmax(1)) / rows)[0, 1024:].half()
    assert_close(grad[-1, 1024:], want, rtol=1e-2, atol=6e-8)


@pytest.mark.launcher
@pytest.mark.skipif(DEVICE == "cuda", reason="the interpreter can run single programs")
@pytest.mark.parametrize("channels_last", [True, False])
def test_features_beyond_2_31_elements(channels_last: bool) -> None:
    n = 2**21 + 3
    format = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.empty(n, 64, 4, 5, dtype=torch.float16, memory_format=format)
    assert x.numel() > 2**31
    torch.manual_seed(0)
    x[-1] = torch.randn(64, 4, 5)
    t, s = torch.empty(n, 1, 64), torch.empty(n, 1, 64)
    t[-1], s[-1] = torch.randn(2, 1, 64)
    with last_programs():
        parts = module.launch_feature_pool(x, 1)
        _, stats = module._launch_rows(t, s, None, n, 64, 1.0, (64, 1, 64), (64, 1, 64), (1, 1))
        dx = module.launch_feature_kl_backward(
            torch.ones(()), t, s, stats, x.shape, 1, channels_last, x.dtype, 1.0, False)
    assert_close(parts[-1].sum(0)[-8:], x[-1].float().mean((1, 2))[-8:])
    want = (s[-1, 0].softmax(0) - t[-1, 0].softmax(0)) / n / 20
    assert_close(dx[-1, -8:].float(), want[-8:, None, None].expand(8, 4, 5), rtol=1e-2, atol=6e-8)


@pytest.mark.launcher
@pytest.mark.skipif(DEVICE == "cuda", reason="mistakes may read anywhere")
@pytest.mark.parametrize("change", [
    ("tl.where(mask, tl.exp(p) * (p - q), 0.0), 1)", "tl.where(mask, tl.exp(q) * (q - p), 0.0), 1)"),
    ("t_log_sum, s_max, s_log_sum, kl * temperature * temperature)", "t_log_sum, s_max, s_log_sum, kl)"),
    ("(j < C)[None, :]", "(j < C + 1)[None, :]"),
    ("- kl / temperature)", "- kl)"),
    ("(tl.exp(q) - tl.exp(p))", "(tl.exp(p) - tl.exp(q))"),
    ("indices + row.to(tl.int64)[:, None] * indices_row", "indices + 0 * row.to(tl.int64)[:, None] * indices_row"),
], ids=range(6))
def test_mistakes_with_logits_are_noticed(change: tuple[str, str], tmp_path: Path) -> None:
    case = logits(6, 13, temperature=3.0, top=5)
    check(case)
    assert_caught(lambda of: check(case, of), plant(module, tmp_path, change))


@pytest.mark.launcher
@pytest.mark.skipif(DEVICE == "cuda", reason="mistakes may read anywhere")
@pytest.mark.usefixtures("looped")
@pytest.mark.parametrize("change", [
    ("tl.exp(t_fall) * t_sum", "t_sum"), ("tl.exp(s_fall) * s_sum", "s_sum"),
    ("weighted + t_sum * (t_fall - s_fall)", "weighted"),
])
def test_mistakes_with_long_rows_are_noticed(change: tuple[str, str], tmp_path: Path) -> None:
    def check_looped(of: ModuleType) -> None:
        of.MAX_CLASSES = 0
        check(case, of)

    case = logits(2, 9000)
    case.teacher[:, 5000] = 40
    case.student[:, 4500] = 50
    check_looped(module)
    assert_caught(check_looped, plant(module, tmp_path, change))


@pytest.mark.launcher
@pytest.mark.skipif(DEVICE == "cuda", reason="mistakes may read anywhere")
@pytest.mark.parametrize("change", [
    ("(p0 + p < P)[:, None] & cmask[None, :], other=0.0", "cmask[None, :], other=0.0"),
    ("tl.sum(total, 0) / P", "tl.sum(total, 0)"), ("/ B / P)", "/ B)"),
    ("(of_teacher if OF_TEACHER else of_student)", "of_student"),
    ("x += n * x_sample", "x += 0 * n * x_sample"),
])
def test_mistakes_with_features_are_noticed(change: tuple[str, str], tmp_path: Path) -> None:
    case = features(2, 5, 9, 31, layout="nchw", temperature=0.2)
    check(case)
    assert_caught(lambda of: check(case, of), plant(module, tmp_path, change))


# The ops, on the CPU


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("top", [None, 3, 13, 99])
def test_logits_as_the_loss_computes_them(top: int | None, dtype: torch.dtype) -> None:
    case = logits(dtype=dtype)
    ours, theirs = (case.student.clone().requires_grad_() for _ in range(2))
    loss = distillation_kl(case.teacher, ours, temperature=2.0, top_classes=top)
    expected = adn.distill.distillation_kl(case.teacher, theirs, 2.0, top)
    assert_close(loss, expected)
    (3 * loss).backward()
    (3 * expected).backward()
    assert_close(ours.grad, theirs.grad)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_features_as_the_loss_computes_them(layout: str) -> None:
    case = features(layout=layout, temperature=0.5)
    ours, theirs = (case.student.clone().requires_grad_() for _ in range(2))
    loss = feature_kl(case.teacher, ours, channel_dim=case.channel_dim, temperature=0.5)
    expected = adn.distill.distillation_kl(
        adn.distill.pool_features(case.teacher, case.channel_dim),
        adn.distill.pool_features(theirs, case.channel_dim), 0.5)
    assert_close(loss, expected)
    loss.backward()
    expected.backward()
    assert_close(ours.grad, theirs.grad)
    assert ours.grad.stride() == ours.stride() or layout == "slice"


@pytest.mark.parametrize("top", [None, 3])
def test_gradcheck_of_logits(top: int | None) -> None:
    case = logits(3, 6, dtype=torch.float64, scale=1.0)
    torch.autograd.gradcheck(lambda t, s: distillation_kl(t, s, temperature=2.0, top_classes=top),
                             (case.teacher.requires_grad_(), case.student.requires_grad_()))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradcheck_of_features(layout: str) -> None:
    case = features(2, 3, 2, 3, layout=layout, dtype=torch.float64)
    torch.autograd.gradcheck(lambda t, s: feature_kl(t, s, channel_dim=case.channel_dim, temperature=2.0),
                             (case.teacher.requires_grad_(), case.student.requires_grad_()))


def test_two_training_steps() -> None:
    case = logits()
    weight = torch.eye(13, requires_grad=True)
    losses = []
    for _ in range(2):
        loss = distillation_kl(case.teacher, case.student @ weight)
        grad, = torch.autograd.grad(loss, weight)
        weight = (weight.detach() - 0.1 * grad).requires_grad_()
        losses.append(loss.item())
    assert losses[1] < losses[0]


def test_feature_maps_may_be_written_afterwards() -> None:
    case = features()
    student = case.student.clone().requires_grad_()
    loss = feature_kl(case.teacher, h := student * 1.0)
    with torch.no_grad():
        h.relu_()
        case.teacher.zero_()
    loss.backward()
    assert student.grad.isfinite().all()


CALLS = {"logits": (logits(3, 6), distillation_kl), "features": (features(), feature_kl)}


@pytest.mark.parametrize("form", CALLS)
def test_no_second_derivative(form: str) -> None:
    case, function = CALLS[form]
    student = case.student.clone().requires_grad_()
    grad, = torch.autograd.grad(function(case.teacher, student), student, create_graph=True)
    with pytest.raises(RuntimeError, match="_kl_backward has no second derivative"):
        grad.sum().backward()


class Zeros(TorchDispatchMode):
    """Notes the shape of whatever is allocated and filled with zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[torch.Size] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func._schema.name in ("aten::zeros", "aten::zeros_like", "aten::new_zeros"):
            self.shapes.append(result.shape)
        return result


@pytest.mark.parametrize("form", CALLS)
def test_no_zeros_for_what_has_no_gradient(form: str) -> None:
    case, function = CALLS[form]
    with Zeros() as zeros:
        function(case.teacher, case.student.clone().requires_grad_()).backward()
    assert zeros.shapes == []


class Dropped(torch.autograd.Function):
    """The identity; no gradient comes back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> None:
        return None


@pytest.mark.parametrize("form", CALLS)
def test_no_gradient_of_the_loss(form: str) -> None:
    case, function = CALLS[form]
    student = case.student.clone().requires_grad_()
    Dropped.apply(function(case.teacher, student)).backward()
    assert student.grad is None


@pytest.mark.parametrize("top", [None, 3])
def test_opcheck_of_logits(top: int | None) -> None:
    case = logits(top=top)
    torch.library.opcheck(module.distillation_kl_op, (
        case.teacher.requires_grad_(), case.student.requires_grad_(), case.indices, 2.0))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck_of_features(layout: str) -> None:
    case = features(layout=layout)
    torch.library.opcheck(module.feature_kl_op, (
        case.teacher.requires_grad_(), case.student.requires_grad_(), case.channel_dim, 2.0))


def _logits_args(n: int) -> list[Tensor]:
    case = logits(n, 100)
    return [case.teacher, case.student.requires_grad_()]


@pytest.mark.parametrize("top", [None, 30])
def test_compile_and_export_of_logits(top: int | None) -> None:
    def function(teacher: Tensor, student: Tensor) -> Tensor:
        return distillation_kl(teacher, student, temperature=2.0, top_classes=top)

    check_compile(function, _logits_args)
    check_export(function, _logits_args, dynamic=(0, 1))
    check_fake_gpu(function, _logits_args(5), dynamic=(0, 1))


@pytest.mark.parametrize("layout", ["nchw", "nhwc", "tokens"])
def test_compile_and_export_of_features(layout: str) -> None:
    dim = -1 if layout == "tokens" else 1

    def make_args(n: int) -> list[Tensor]:
        case = features(n, 16, layout=layout)
        return [case.teacher, case.student.requires_grad_()]

    def function(teacher: Tensor, student: Tensor) -> Tensor:
        return feature_kl(teacher, student, channel_dim=dim)

    check_compile(function, make_args)
    check_export(function, make_args, dynamic=(0, 1))
    check_fake_gpu(function, make_args(5), dynamic=(0, 1))


@pytest.mark.parametrize(("teacher", "student", "settings", "message"), [
    ((3, 4), (3, 5), {}, r"pass \(B, C\) twice"),
    ((3, 4, 1), (3, 4, 1), {}, r"pass \(B, C\) twice"),
    ((3, 0), (3, 0), {}, r"pass \(B, C\) twice"),
    ((3, 4), (3, 4), {"temperature": 0.0}, "above 0"),
    ((3, 4), (3, 4), {"temperature": float("nan")}, "above 0"),
    ((3, 4), (3, 4), {"top_classes": 0}, "pass a number of classes"),
])
def test_bad_logits(teacher: tuple, student: tuple, settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        distillation_kl(torch.zeros(teacher), torch.zeros(student), **settings)


@pytest.mark.parametrize(("teacher", "student", "settings", "message"), [
    ((3, 4), (3, 4), {}, "pass feature maps"),
    ((3, 4, 2), (3, 5, 2), {}, "pass feature maps"),
    ((3, 4, 2), (2, 4, 2), {}, "pass feature maps"),
    ((3, 0, 2), (3, 0, 2), {}, "pass feature maps"),
    ((3, 4, 2, 2), (3, 4, 2, 2), {"channel_dim": 2}, "pass 1 or -1"),
    ((3, 4, 2, 2), (3, 4, 2, 2), {"temperature": -1.0}, "above 0"),
])
def test_bad_features(teacher: tuple, student: tuple, settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        feature_kl(torch.zeros(teacher), torch.zeros(student), **settings)


def test_bad_dtype_and_layout() -> None:
    with pytest.raises(ValueError, match=r"student is torch.int64; pass a floating type"):
        distillation_kl(torch.zeros(3, 4), torch.zeros(3, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"teacher of shape .* pass teacher.contiguous\(\)"):
        feature_kl(torch.zeros(3, 4, 5, 5)[:, :, 1:4, 1:4], torch.zeros(3, 4, 5, 5))


# Ahead of time


def _aot_logits(rows: int, classes: int, top: int | None = None) -> Callable:
    def launch(dtype: torch.dtype, activation: str) -> tuple[int, int]:
        teacher, student = (torch.empty(rows, classes, dtype=dtype, device="cuda") for _ in range(2))
        indices = None if top is None else torch.empty(rows, top, dtype=torch.int64, device="cuda")
        _, stats = module.launch_distillation_kl(teacher, student, indices, 2.0)
        module.launch_distillation_kl_backward(torch.empty((), device="cuda"), teacher, student, indices, stats, 2.0,
                                               (False, True))
        return 5 * rows * (top or classes) * dtype.itemsize, 0

    return launch


def _aot_features(shape: Sequence[int], channels_last: bool) -> Callable:
    def launch(dtype: torch.dtype, activation: str) -> tuple[int, int]:
        format = torch.channels_last if channels_last else torch.contiguous_format
        x = torch.empty(shape, dtype=dtype, device="cuda", memory_format=format)
        _, t, s, stats = module.launch_feature_kl(x, x, 1, 1.0)
        module.launch_feature_kl_backward(torch.empty((), device="cuda"), t, s, stats, x.shape, 1, channels_last, dtype,
                                          1.0, False)
        return 3 * x.numel() * dtype.itemsize, 0

    return launch


AOT = {
    "1000 classes": _aot_logits(64, 1000),
    "500 of 1000 classes": _aot_logits(64, 1000, 500),
    "21841 classes": _aot_logits(64, 21841),
    "features NHWC": _aot_features((64, 256, 56, 56), True),
    "features NCHW": _aot_features((64, 256, 56, 56), False),
}
# Rows of logits may start anywhere, and they are few.
AOT_EXPECT = {
    "distillation_kl_kernel": set(), "distillation_kl_loop_kernel": set(), "distillation_kl_backward_kernel": set(),
    "feature_pool_kernel": {"wide_loads"}, "feature_kl_backward_kernel": {"wide_stores"},
}


def test_launches() -> None:
    """Of logits one forward, one backward; of feature maps three and one. The mean over rows is torch's."""
    with fake_cuda():
        for name, case in AOT.items():
            assert len(record(case, torch.bfloat16, "identity")) == (4 if "features" in name else 2)
