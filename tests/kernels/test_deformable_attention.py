"""Deformable attention: the kernels against plain PyTorch, their traffic; the op's behaviour on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from aot import compile_launch, fake_cuda, record
from harness import (
    DEVICE,
    DTYPES,
    Guards,
    assert_accurate,
    assert_caught,
    bytes_of,
    examples,
    last_programs,
    max_error,
    plant,
    traffic,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from op_checks import check_compile, check_export, check_fake_gpu
from torch import Tensor
from torch.testing import assert_close

import adn_kernels.deformable_attention as module
from adn_kernels.deformable_attention import deformable_attention

SHAPES = ((5, 7), (3, 4), (1, 2))
FORMS = pytest.mark.parametrize("deterministic", [False, True], ids=["atomics", "deterministic"])


@dataclass
class Case:
    """Arguments and the gradient of the output, on the CPU."""

    value: Tensor
    shapes: Sequence[tuple[int, int]]
    locations: Tensor
    weights: Tensor
    dout: Tensor

    @property
    def flat(self) -> list[int]:
        return [n for shape in self.shapes for n in shape]


def build(
    batch: int = 2, queries: int = 3, heads: int = 2, dim: int = 8, points: int = 2, *,
    shapes: Sequence[tuple[int, int]] = SHAPES, dtype: torch.dtype = torch.float32,
    places: torch.dtype | None = torch.float32, margin: float = 0.2, seed: int = 0,
) -> Case:
    """Locations lie up to `margin` beyond the maps and have, like weights, the type `places`, by default float32."""
    torch.manual_seed(seed)
    tokens = sum(height * width for height, width in shapes)
    sizes = (batch, queries, heads, len(shapes), points)
    locations = torch.rand(*sizes, 2) * (1 + 2 * margin) - margin
    weights = torch.randn(sizes).flatten(3).softmax(-1).view(sizes)
    value = torch.randn(batch, tokens, heads, dim)
    dout = torch.randn(batch, queries, heads * dim)
    places = dtype if places is None else places
    return Case(value.to(dtype), shapes, locations.to(places), weights.to(places), dout.to(dtype))


def plain(value: Tensor, shapes: Sequence[tuple[int, int]], locations: Tensor, weights: Tensor) -> Tensor:
    """As the papers' repositories write it, in the type of the inputs."""
    batch, _, heads, dim = value.shape
    total = 0
    for i, (height, width) in enumerate(shapes):
        start = sum(h * w for h, w in shapes[:i])
        maps = value[:, start:start + height * width].permute(0, 2, 3, 1).reshape(-1, dim, height, width)
        grid = 2 * locations[:, :, :, i].transpose(1, 2).flatten(0, 1) - 1
        sampled = F.grid_sample(maps, grid, align_corners=False)
        total = total + torch.einsum("ndqp,nqp->nqd", sampled, weights[:, :, :, i].transpose(1, 2).flatten(0, 1))
    return total.unflatten(0, (batch, heads)).transpose(1, 2).flatten(2)


NAMES = ("out", "dvalue", "dlocations", "dweights")


def expected(case: Case, dtype: torch.dtype) -> list[Tensor]:
    """Output and gradients by autograd, computed in `dtype`, in the types of the case if that is float32."""
    leaves = [t.detach().clone().to(dtype).requires_grad_() for t in (case.value, case.locations, case.weights)]
    out = plain(leaves[0], case.shapes, *leaves[1:])
    out.backward(case.dout.to(dtype))
    found = [out.detach(), *(leaf.grad for leaf in leaves)]
    if dtype == torch.float32:
        found = [t.to(like.dtype) for t, like in zip(found, (case.value, case.value, case.locations, case.weights))]
    return found


def launched(
    case: Case, of: ModuleType = module, deterministic: bool = False, needs: Sequence[bool] = (True, True, True)
) -> list[Tensor]:
    """The same by the launchers, all buffers between guards."""
    with Guards() as guards:
        value, locations, weights, dout = map(guards.place, (case.value, case.locations, case.weights, case.dout))
        out = of.launch_deformable_attention(value, case.flat, locations, weights)
        grads = of.launch_deformable_attention_backward(
            dout, value, case.flat, locations, weights, deterministic, needs)
    guards.check()
    return [out, *grads]


def check(case: Case, of: ModuleType = module, deterministic: bool = False) -> None:
    exact, eager = expected(case, torch.float64), expected(case, torch.float32)
    for name, kernel, e, x in zip(NAMES, launched(case, of, deterministic), eager, exact):
        assert_accurate(name, kernel, e, x, atol=2e-6 if kernel.dtype == torch.float32 else 1e-4)


@pytest.mark.launcher
@FORMS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("sizes", "shapes"), [
    ((2, 3, 2, 8, 2), SHAPES),
    ((1, 9, 8, 32, 4), ((8, 6), (4, 3), (2, 2))),  # as in RT-DETR
    ((1, 1, 1, 1, 1), ((1, 1),)),
    ((3, 2, 3, 5, 3), ((2, 9), (7, 1))),
    ((1, 5, 1, 33, 1), ((3, 3),)),
    ((1, 2, 2, 64, 5), ((4, 4), (3, 3), (2, 2), (1, 1), (1, 3))),
    ((2, 1, 1, 130, 2), ((2, 3), (2, 1))),
], ids=str)
def test_sizes(sizes: tuple[int, ...], shapes: Sequence[tuple[int, int]], dtype: torch.dtype, deterministic: bool
               ) -> None:
    check(build(*sizes, shapes=shapes, dtype=dtype), deterministic=deterministic)


@pytest.mark.launcher
@settings(max_examples=examples(20), deadline=None, derandomize=True)
@given(batch=st.integers(1, 2), queries=st.integers(1, 5), heads=st.integers(1, 3), dim=st.integers(1, 20),
       points=st.integers(1, 5), margin=st.sampled_from([0.0, 0.5, 3.0]), deterministic=st.booleans(),
       shapes=st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=8),
       seed=st.integers(0, 9))
def test_any_sizes(
    batch: int, queries: int, heads: int, dim: int, points: int, margin: float, deterministic: bool,
    shapes: list[tuple[int, int]], seed: int,
) -> None:
    check(build(batch, queries, heads, dim, points, shapes=shapes, margin=margin, seed=seed),
          deterministic=deterministic)


@pytest.mark.launcher
@FORMS
@pytest.mark.parametrize("types", [
    (torch.float16, torch.float16), (torch.float32, torch.float16), (torch.float16, torch.float32),
], ids=str)
def test_mixed_dtypes(types: tuple[torch.dtype, torch.dtype], deterministic: bool) -> None:
    check(build(dtype=types[0], places=types[1]), deterministic=deterministic)


@pytest.mark.launcher
@FORMS
@pytest.mark.parametrize("layout", ["slice", "channels apart", "heads before tokens"])
def test_strides_of_the_value(layout: str, deterministic: bool) -> None:
    case = build()
    if layout == "slice":  # of the values of several layers, projected at once
        case.value = torch.randn(2, case.value.shape[1], 3, 2, 8)[:, :, 1]
    elif layout == "channels apart":
        case.value = case.value.permute(0, 3, 2, 1).contiguous().permute(0, 3, 2, 1)
    else:
        case.value = case.value.transpose(1, 2).contiguous().transpose(1, 2)
    check(case, deterministic=deterministic)


@pytest.mark.launcher
@FORMS
def test_strides_of_all_else(deterministic: bool) -> None:
    """Locations and weights in slices of wider tensors or of axes in another order; so is the gradient."""
    case = build()
    case.locations = torch.cat([case.locations] * 2, -1)[..., :2]
    case.weights = case.weights.transpose(0, 1).contiguous().transpose(0, 1)
    case.dout = case.dout.transpose(1, 2).contiguous().transpose(1, 2)
    check(case, deterministic=deterministic)


@pytest.mark.launcher
@FORMS
@pytest.mark.parametrize("place", ["centres", "edges", "far", "one pixel"])
def test_special_places(place: str, deterministic: bool) -> None:
    """Centres of pixels, where a gradient of the location is one-sided; outer edges; numbers no int can hold."""
    case = build(queries=4, shapes=((4, 8), (2, 2)), dim=4)
    if place == "centres":
        case.locations[..., 0] = 0.5625
        case.locations[..., 1] = 0.625
    elif place == "edges":
        case.locations = case.locations.round().clamp(0, 1)
    elif place == "far":
        case.locations[:, 0] *= 1e9
        case.locations[:, 1] *= -1e30
        case.locations[:, 2, :, :, :, 0] = 4e3
    else:
        case.locations[:] = 0.4
    check(case, deterministic=deterministic)


@pytest.mark.launcher
@FORMS
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
def test_locations_that_are_no_numbers(number: float, axis: int, deterministic: bool) -> None:
    """That head of that query is NaN, the gradients of that weight and location are; nothing else is."""
    case = build()
    clean = launched(case, deterministic=deterministic)
    case.locations[1, 2, 0, 1, 1, axis] = number
    out, dvalue, dlocations, dweights = launched(case, deterministic=deterministic)
    for t in (out := out.unflatten(-1, (2, 8)), dlocations, dweights):
        assert t[1, 2, 0].isnan().any()
    assert out[1, 2, 0].isnan().all()
    assert dlocations[1, 2, 0, 1, 1].isnan().all()
    assert [int(t.isnan().sum()) for t in (out, dlocations, dweights, dvalue)] == [8, 2, 1, 0]
    others = torch.ones(2, 3, 2, dtype=torch.bool)
    others[1, 2, 0] = False
    assert_close(out[others], clean[0].unflatten(-1, (2, 8))[others])
    # What the reference does, but for the other axis of the location.
    case.shapes = tuple(case.shapes)
    leaves = [t.clone().requires_grad_() for t in (case.value, case.locations, case.weights)]
    theirs = module.deformable_attention_reference(leaves[0], case.flat, *leaves[1:])
    theirs.backward(case.dout)
    assert theirs.unflatten(-1, (2, 8))[1, 2, 0].isnan().all()
    assert leaves[1].grad[1, 2, 0, 1, 1].isnan().any()
    assert leaves[2].grad[1, 2, 0, 1, 1].isnan()
    assert_close(dvalue.cpu(), leaves[0].grad)


@pytest.mark.launcher
@pytest.mark.parametrize("needs", [(True, False, False), (False, True, False), (False, False, True)], ids=str)
@FORMS
def test_only_gradients_wanted(needs: tuple[bool, ...], deterministic: bool) -> None:
    case = build()
    _, *grads = launched(case, deterministic=deterministic, needs=needs)
    for grad, want, need in zip(grads, expected(case, torch.float32)[1:], needs):
        if need:
            assert_close(grad.cpu(), want, rtol=1e-4, atol=1e-5)
        else:
            assert grad.numel() == 0


@pytest.mark.launcher
@FORMS
@pytest.mark.parametrize("sizes", [(0, 3), (2, 0)], ids=["no images", "no queries"])
def test_nothing_to_do(sizes: tuple[int, int], deterministic: bool) -> None:
    out, dvalue, dlocations, dweights = launched(case := build(*sizes), deterministic=deterministic)
    assert out.shape == case.dout.shape
    assert dvalue.shape == case.value.shape
    assert not dvalue.any()
    assert (dlocations.shape, dweights.shape) == (case.locations.shape, case.weights.shape)


@pytest.mark.launcher
def test_deterministic() -> None:
    """All queries meet in one pixel; on a GPU the order in which programs end differs."""
    case = build(1, 100 if DEVICE == "cuda" else 5, shapes=((1, 1),), margin=0.0)
    first = launched(case, deterministic=True)
    for _ in range(20 if DEVICE == "cuda" else 1):
        for a, b in zip(first, launched(case, deterministic=True)):
            assert a.equal(b)


@pytest.mark.launcher
@FORMS
def test_more_samples_than_are_taken_at_once(deterministic: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    config = {"ROWS": 2, "num_warps": 4}
    monkeypatch.setattr(module, "tuned", lambda kernel, device, default, **key: default | config | (
        {"SAMPLES": 4} if "SAMPLES" in default else {}))
    check(build(points=3), deterministic=deterministic)


@pytest.mark.launcher
@pytest.mark.interpreter
def test_traffic() -> None:
    """Four pixels for each point inside, locations and weights once; nothing but the output is written."""
    case = build(2, 4, 2, 16, margin=0.0)
    case.locations = 0.3 + 0.4 * case.locations  # no corner outside but of the smallest map
    case.shapes = ((8, 9), (6, 5), (4, 4))
    case.value = torch.randn(2, 72 + 30 + 16, 2, 16)
    size = case.value.element_size()
    gathered = case.weights.numel() * 4 * 16 * size
    with traffic() as counts:
        out = module.launch_deformable_attention(case.value, case.flat, case.locations, case.weights)
    assert bytes_of(counts["read"], case.value) == gathered
    assert bytes_of(counts["read"], case.locations) == case.locations.nbytes
    assert bytes_of(counts["read"], case.weights) == case.weights.nbytes
    assert bytes_of(counts["written"]) == bytes_of(counts["written"], out) == out.nbytes
    arguments = (case.dout, case.value, case.flat, case.locations, case.weights, True)
    with traffic() as counts:
        dvalue, dlocations, dweights = module.launch_deformable_attention_backward(*arguments, (True, True, True))
    assert bytes_of(counts["read"], case.value) == gathered
    assert bytes_of(counts["read"], case.dout) == case.dout.nbytes + gathered
    results = dvalue.nbytes + dlocations.nbytes + dweights.nbytes
    assert bytes_of(counts["written"]) == results + 8 * 4 * case.weights.numel()
    with traffic() as counts:
        module.launch_deformable_attention_backward(*arguments, (True, False, False))
    assert bytes_of(counts["read"], case.value) == 0


@pytest.mark.launcher
@pytest.mark.interpreter
def test_value_beyond_2_31_elements() -> None:
    """The last token is a level of its own; the point in the other level lies outside."""
    height, dim = 2**21 + 7, 1030
    case = build(1, 1, 1, dim, 1, shapes=((height, 1), (1, 1))[1:], dtype=torch.float16)
    value = torch.empty(1, height + 1, 1, dim, dtype=torch.float16)
    assert value.numel() > 2**31
    value[:, -1] = case.value[:, 0]
    locations = torch.tensor([5.0, 0.5]).reshape(1, 1, 1, 2, 1, 1).repeat(1, 1, 1, 1, 1, 2)
    arguments = value, (height, 1, 1, 1), locations, torch.tensor([0.5, 0.25]).reshape(1, 1, 1, 2, 1)
    out = module.launch_deformable_attention(*arguments)
    assert_close(out, 0.25 * case.value[:, 0])
    with last_programs():
        dvalue, dlocations, dweights = module.launch_deformable_attention_backward(
            case.dout, *arguments, True, (True, True, True))
    assert_close(dvalue[:, -1, 0], 0.25 * case.dout[0])
    product = (case.value.flatten().double() * case.dout.flatten().double()).sum().float()
    assert_close(dweights.flatten(), torch.stack([product * 0, product]), rtol=1e-4, atol=1e-4)
    # Both corners there are of the gradient to the right of the centre and of that below; all else is outside.
    assert_close(dlocations[..., 1, 0, :].flatten(), -0.25 * torch.stack([product] * 2), rtol=1e-4, atol=1e-4)


@pytest.mark.launcher
@pytest.mark.interpreter
def test_locations_beyond_2_31_elements() -> None:
    queries = 2**30 + 3
    value = torch.tensor([2.0]).half().reshape(1, 1, 1, 1)
    locations = torch.empty(1, queries, 1, 1, 1, 2, dtype=torch.float16)
    weights = torch.empty(1, queries, 1, 1, 1, dtype=torch.float16)
    dout = torch.empty(1, queries, 1, dtype=torch.float16)
    assert locations.numel() > 2**31
    locations[:, -8:], weights[:, -8:], dout[:, -8:] = 0.75, 0.5, 3.0
    with last_programs():
        out = module.launch_deformable_attention(value, (1, 1), locations, weights)
        _, dlocations, dweights = module.launch_deformable_attention_backward(
            dout, value, (1, 1), locations, weights, False, (False, True, True))
    # A quarter from the centre along both axes.
    assert out[0, -1].item() == 0.5 * 0.75**2 * 2
    assert dweights.flatten()[-1].item() == 0.75**2 * 2 * 3
    assert dlocations.flatten()[-2:].tolist() == [-0.5 * 0.75 * 2 * 3] * 2


@pytest.mark.launcher
@pytest.mark.skipif(DEVICE == "cuda", reason="mistakes may read anywhere")
@pytest.mark.parametrize("change", [
    ("location * size - 0.5", "location * size"),
    ("inside < size + 1.0, inside, size + 1.0", "inside < size - 1.0, inside, size - 1.0"),
    ("at > -2.0, at, -2.0", "at > 0.0, at, 0.0"),
    ("(x < width)", "(x <= width)"),
    ("(y >= 0)", "(y > 0)"),
    ("first + y * width + x", "first + y * height + x"),
    ("tl.where(here, tokens, first)", "tl.where(here, 0, first)"),
    ("share_x = 1 - beyond_x", "share_x = beyond_x"),
    ("mask=exists[:, :, None]", "mask=mask[:, :, None]"),
    ("channel < D", "channel < CHANNELS"),
    ("row < rows", "row < rows - 1"),
    ("(sample < LEVELS * POINTS)", "(sample < LEVELS * POINTS + 1)"),
    ("(row % heads).to(tl.int64) * value_head", "(row // heads % 2).to(tl.int64) * value_head"),
    ("weight * width * dx", "weight * dx"),
    ("weight * height * dy", "weight * width * dy"),
    ("(share_x if corner // 2 == 1 else -share_x)", "(share_x if corner % 2 == 1 else -share_x)"),
    ("dweight += share_x", "dweight += weight * share_x"),
], ids=range(17))
def test_mistakes_are_noticed(change: tuple[str, str], tmp_path: Path) -> None:
    case = build(1, 5, 2, 6, 3)
    check(case)
    assert_caught(lambda of: check(case, of), plant(module, tmp_path, change))


@pytest.mark.launcher
@pytest.mark.skipif(DEVICE == "cuda", reason="mistakes may read anywhere")
@pytest.mark.parametrize("change", [
    ("tl.where(exists, token, tokens)", "token"),
    ("tl.where(exists, head[None, :], 0)", "0"),
    ("shares + 4 * at + corner, share,", "shares + 4 * at + corner, share_x,"),
    ("mask = entry < end", "mask = entry < end - 1"),
    ("which += image * entries", "which += 0 * entries"),
    ("which // entries_per_row", "which // (entries_per_row + 1)"),
    ("+ pixel + 1, mask", "+ pixel, mask"),
], ids=range(7))
def test_mistakes_of_the_deterministic_form_are_noticed(change: tuple[str, str], tmp_path: Path) -> None:
    case = build(2, 3, 2, 6, 3)
    check(case, deterministic=True)
    assert_caught(lambda of: check(case, of, True), plant(module, tmp_path, change))


# The op, on the CPU


def call(case: Case, value: Tensor, locations: Tensor, weights: Tensor, **settings: Any) -> Tensor:
    return deformable_attention(value, case.shapes, locations, weights, **settings)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("places", [torch.float32, None], ids=["float32 places", "same"])
def test_as_the_repositories_compute_it(dtype: torch.dtype, places: torch.dtype | None) -> None:
    """In float32 where the type is half, and no less exact than that."""
    case = build(dtype=dtype, places=places, dim=5, points=3)
    leaves = [t.clone().requires_grad_() for t in (case.value, case.locations, case.weights)]
    out = call(case, *leaves)
    out.backward(case.dout)
    for name, ours, want in zip(NAMES, (out.detach(), *(t.grad for t in leaves)), expected(case, torch.float64)):
        assert ours.dtype == (dtype if name in ("out", "dvalue") or places is None else places)
        assert max_error(ours, want) <= 2 * torch.finfo(ours.dtype).eps * max(1.0, float(want.abs().max())) * (
            8 if ours.dtype in (torch.float32, torch.float64) else 1)
    assert [t.grad.stride() for t in leaves] == [t.stride() for t in leaves]


def test_reference_can_be_differentiated() -> None:
    case = build(dtype=torch.float64, places=None)
    found = []
    for function in (module.deformable_attention_op, module.deformable_attention_reference):
        leaves = [t.clone().requires_grad_() for t in (case.value, case.locations, case.weights)]
        settings = (False,) if function is module.deformable_attention_op else ()
        out = function(leaves[0], case.flat, *leaves[1:], *settings)
        out.backward(case.dout)
        found.append([out.detach(), *(t.grad for t in leaves)])
    assert_close(*found)


def test_gradcheck() -> None:
    case = build(1, 2, 2, 3, dtype=torch.float64, places=None)
    torch.autograd.gradcheck(lambda *leaves: call(case, *leaves), tuple(
        t.requires_grad_() for t in (case.value, case.locations, case.weights)))


@pytest.mark.parametrize("wanted", [0, 1, 2])
def test_only_one_gradient(wanted: int) -> None:
    case = build()
    leaves = [case.value, case.locations, case.weights]
    leaves[wanted].requires_grad_()
    call(case, *leaves).backward(case.dout)
    assert [t.grad is not None for t in leaves] == [i == wanted for i in range(3)]
    assert_close(leaves[wanted].grad, expected(case, torch.float32)[1 + wanted], rtol=1e-4, atol=1e-5)


def test_strides_of_gradients() -> None:
    """Those of the value where it is dense, as for any op of torch."""
    case = build()
    value = case.value.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    call(case, value, case.locations, case.weights).sum().backward()
    assert value.grad.stride() == value.stride()


@pytest.mark.parametrize("sizes", [(0, 3), (2, 0)], ids=["no images", "no queries"])
def test_nothing_to_do_on_the_cpu(sizes: tuple[int, int]) -> None:
    case = build(*sizes)
    leaves = [t.requires_grad_() for t in (case.value, case.locations, case.weights)]
    out = call(case, *leaves)
    assert out.shape == case.dout.shape
    out.sum().backward()
    assert [t.grad.shape for t in leaves] == [t.shape for t in leaves]
    assert not case.value.grad.any()


def test_far_places_on_the_cpu() -> None:
    case = build()
    case.locations[0] *= 1e30
    assert not call(case, case.value, case.locations, case.weights)[0].any()


def test_no_second_derivative() -> None:
    case = build()
    weights = case.weights.requires_grad_()
    grad, = torch.autograd.grad(call(case, case.value, case.locations, weights).square().sum(), weights,
                                create_graph=True)
    with pytest.raises(RuntimeError, match="deformable_attention_backward has no second derivative"):
        grad.sum().backward()


@pytest.mark.parametrize(("asked", "globally", "given"), [
    (None, False, False), (None, True, True), (False, True, False), (True, False, True)])
def test_deterministic_by_argument_or_global(
    asked: bool | None, globally: bool, given: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    monkeypatch.setattr(module, "deformable_attention_op", lambda *arguments: seen.append(arguments[-1]))
    torch.use_deterministic_algorithms(globally)
    try:
        case = build()
        call(case, case.value, case.locations, case.weights, deterministic=asked)
    finally:
        torch.use_deterministic_algorithms(False)
    assert seen == [given]


def test_more_levels_than_kernels_take() -> None:
    """Plain PyTorch computes them, on a GPU too."""
    case = build(shapes=((2, 2),) * 9)
    assert_close(call(case, case.value, case.locations, case.weights), expected(case, torch.float32)[0])
    assert module._has_kernel(case.flat[:16])
    assert not module._has_kernel(case.flat)


@FORMS
def test_opcheck(deterministic: bool) -> None:
    case = build()
    leaves = [t.requires_grad_() for t in (case.value, case.locations, case.weights)]
    torch.library.opcheck(module.deformable_attention_op, (leaves[0], case.flat, *leaves[1:], deterministic))


@FORMS
def test_compile_and_export(deterministic: bool) -> None:
    def make_args(n: int) -> list[Tensor]:
        case = build(n)
        return [t.requires_grad_() for t in (case.value, case.locations, case.weights)]

    def function(value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
        return deformable_attention(value, SHAPES, locations, weights, deterministic=deterministic)

    def gradients(*leaves: Tensor) -> list[Tensor]:
        dout = leaves[0].new_ones(()).expand(leaves[2].shape[0], 3, 16)
        return list(module.deformable_attention_backward_op(
            dout, leaves[0], [n for shape in SHAPES for n in shape], *leaves[1:], deterministic, [True] * 3))

    check_compile(function, make_args)
    check_export(function, make_args, dynamic=(0, 1, 2))
    check_fake_gpu(function, make_args(5), dynamic=(0, 1, 2))
    check_fake_gpu(gradients, [t.detach() for t in make_args(5)], dynamic=(0, 1, 2))


@pytest.mark.parametrize(("change", "message"), [
    ({"value": torch.zeros(2, 59, 12)}, r"pass \(B, tokens, heads, dim\)"),
    ({"shapes": ()}, r"shapes=\[\]; pass \(height, width\)"),
    ({"shapes": ((5, 7), (3, 0))}, "each at least 1"),
    ({"shapes": ((5, 7), (3, 4))}, "maps of 5x7, 3x4 have 47; pass the shapes"),
    ({"weights": torch.zeros(2, 3, 2, 2, 2)}, r"pass \(B, Q, heads, levels, points\), here \(2, Q, 2, 3, points\)"),
    ({"weights": torch.zeros(2, 3, 2, 6)}, r"pass \(B, Q, heads, levels, points\)"),
    ({"locations": torch.zeros(2, 3, 2, 3, 2)}, "pass one x and y for every weight"),
    ({"locations": torch.zeros(2, 3, 2, 3, 2, 2, dtype=torch.int64)}, "locations is torch.int64; pass a floating"),
    ({"weights": torch.zeros(2, 3, 2, 3, 2, device="meta")}, "weights is on meta, value on cpu"),
])
def test_bad_arguments(change: dict[str, Any], message: str) -> None:
    case = build()
    arguments = {name: getattr(case, name) for name in ("value", "shapes", "locations", "weights")} | change
    with pytest.raises(ValueError, match=message):
        deformable_attention(**arguments)


# Ahead of time


def _aot(batch: int, queries: int, heads: int, dim: int, points: int, shapes: Sequence[tuple[int, int]],
         deterministic: bool = False) -> Callable:
    def launch(dtype: torch.dtype, activation: str) -> tuple[int, int]:
        sizes = (batch, queries, heads, len(shapes), points)
        flat = [n for shape in shapes for n in shape]
        value = torch.empty(batch, sum(h * w for h, w in shapes), heads, dim, dtype=dtype, device="cuda")
        locations, weights = (torch.empty(size, device="cuda") for size in ((*sizes, 2), sizes))
        out = module.launch_deformable_attention(value, flat, locations, weights)
        module.launch_deformable_attention_backward(out, value, flat, locations, weights, deterministic, [True] * 3)
        return 2 * value.nbytes + 4 * locations.nbytes + 3 * weights.nbytes, 8 * 4 * dim * weights.numel()

    return launch


RTDETR = ((80, 80), (40, 40), (20, 20))
AOT = {
    "RT-DETR": _aot(8, 300, 8, 32, 4, RTDETR),
    "RT-DETR, deterministic": _aot(8, 300, 8, 32, 4, RTDETR, True),
    "heads of 64": _aot(8, 300, 8, 64, 4, RTDETR),
    "heads of 8": _aot(8, 300, 8, 8, 4, RTDETR),
    "five levels": _aot(8, 300, 8, 32, 4, (*RTDETR, (10, 10), (5, 5))),
    "odd": _aot(2, 300, 3, 33, 3, ((80, 81), (41, 40), (20, 1), (7, 9), (3, 3)), True),
}
AOT_EXPECT = {
    "deformable_attention_kernel": set(), "deformable_attention_backward_kernel": set(),
    "deformable_attention_collect_kernel": set(),
}

def AOT_OF_CHANNELS(c: int) -> list[Callable]:
    return [_aot(8, 300, 8, c, 4, RTDETR), _aot(8, 300, 8, c, 4, RTDETR, True)]


def test_gathers_are_wide() -> None:
    """Of RT-DETR's heads, whose channels are known to be aligned; nothing in `AOT_EXPECT` can say it of one case."""
    with fake_cuda("sm_90"):
        launches = record(AOT["RT-DETR"], torch.bfloat16, "identity")
    for launch in launches:
        assert 16 in compile_launch(launch, "sm_90")["loads"]


def test_launches() -> None:
    with fake_cuda():
        for name, case in AOT.items():
            assert len(record(case, torch.bfloat16, "identity")) == (3 if name in ("RT-DETR, deterministic", "odd")
                                                                     else 2)
