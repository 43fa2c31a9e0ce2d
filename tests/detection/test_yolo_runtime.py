"""A YOLO of 256 depths at run time: deploy form, compiled, in an engine, per image, extracted, saved."""

from __future__ import annotations

import copy
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from compilations import count
from conftest import few, randomise
from test_detector_runtime import graphs, images, nothing_compiled, table_of  # noqa: F401
from torch import Tensor, nn
from torch.compiler import set_stance
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

import adn
from adn.core.behaviours import original_class
from adn.models.yolov12.layers import A2C2f, AAttn, Bottleneck, C3k, C3k2
from adn.runtime import joining
from adn.runtime.compile import compile
from adn.runtime.engine import Engine
from adn.runtime.fuse import fuse
from adn.runtime.layers import NormAct

TINY = {"num_classes": 3, "depth": 1.0, "width": 0.25, "most": 256, "residual": True}
KINDS: dict[str, dict[str, Any]] = {
    "whole blocks": {"split": "blocks"},
    "inside blocks": {"split": "inside", "c3k": True},
    "of the package, without shortcuts": {"split": "blocks", "packed": True, "residual": False, "depth": 0.75},
}


def detector(kind: str = "whole blocks") -> nn.Module:
    """Any-depth, in evaluation, with second norms that differ from the first."""
    return randomise(adn.create_model("anydepth_yolov12s_orig", **TINY | KINDS[kind]), seed=1).eval()


def forward(net: nn.Module, x: Tensor, depth: Any) -> dict[str, Tensor]:
    with torch.no_grad(), adn.at_depth(net, depth):
        return as_tensors(net(x))


def as_tensors(outputs: dict[str, Any]) -> dict[str, Tensor]:
    return {"decoded": outputs["decoded"], **{f"map {i}": x for i, x in enumerate(outputs["maps"])}}


def agree(found: dict[str, Tensor], expected: dict[str, Tensor], message: object = "", tolerance: float = 1e-4) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        # In parts of the largest: boxes are in pixels.
        scale = value.abs().max().item()
        torch.testing.assert_close(found[name] / scale, value / scale, rtol=0, atol=tolerance,
                                   msg=lambda m, name=name: f"{message} {name}: {m}")


def some(net: nn.Module, number: int = 32) -> list[adn.Depth]:
    """Both extremes, every single stage, and others."""
    every = adn.depths(net)
    assert len(every) == 256
    singles = [depth for depth in every if sum(depth.flags) == 1]
    chosen = dict.fromkeys([every[0], every[-1], *singles])
    return [*chosen, *random.Random(0).sample([depth for depth in every if depth not in chosen], number - len(chosen))]


@pytest.mark.parametrize("kind", few(KINDS, lambda kind: kind == "inside blocks"))
def test_deploy_form(kind: str) -> None:
    net, x = detector(kind).double(), images(dtype=torch.float64)
    fused, seen = fuse(net), set()
    for depth in some(net):
        expected = forward(net, x, depth)
        agree(forward(fused, x, depth), expected, depth, tolerance=1e-11)
        agree(as_tensors(adn.extract(net, depth)(x)), expected, depth, tolerance=1e-11)
        seen.add(expected["decoded"].sum().item())
    assert len(seen) == 32, "every depth computes something else"
    for segment in fused.segments:
        for path in segment.paths:
            assert not any(isinstance(m, NormAct | nn.BatchNorm2d | nn.SiLU) for m in path.modules())


@pytest.mark.parametrize("packed", [False, True])
def test_attention_runs_in_one_kernel(packed: bool) -> None:
    """Of an area, too; without it, tables of scores are written to memory."""
    layer = AAttn(64, area=4, packed=packed).eval()
    x = torch.rand(2, 64, 8, 12).to(memory_format=torch.channels_last)
    with torch.no_grad(), sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        found = layer(x)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        torch.testing.assert_close(found, layer(x))


class Operators(TorchDispatchMode):
    """How often each operator is called."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        self.calls[str(function.overloadpacket).removeprefix("aten.")] += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", few(KINDS, lambda kind: kind != "inside blocks"))
def test_layers_write_where_their_part_of_a_concatenation_is(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: the neck's four concatenations and the head's four copy, those of the layers do not."""
    net, x = detector(kind).double(), images(dtype=torch.float64).to(memory_format=torch.channels_last)
    fused = fuse(net)
    before, after = Operators(), Operators()
    with before:
        forward(fused, x, "super")
    monkeypatch.setattr(joining, "writes", lambda x: True)
    for depth in some(net):
        expected = forward(net, x, depth)
        agree(forward(fused, x, depth), expected, depth, tolerance=1e-11)
    with after:
        forward(fused, x, "super")
    # What bottlenecks give is a sum after its activation: one is copied, several are concatenated as ever.
    joined = written = 0
    for layer in net.modules():
        kind = original_class(layer)
        if kind in (A2C2f, C3k2, C3k):
            sums = sum(original_class(m) is Bottleneck for m in layer.m)
            others = 1 + (0 if kind is C3k else len(layer.m) - sums)
            if kind is C3k or sums < 2:
                joined, written = joined + 1, written + others
    assert before.calls["cat"] - after.calls["cat"] == joined > 10
    assert after.calls["adn.conv_"] == written


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels-last"])
@pytest.mark.parametrize(("dtype", "size"), few(
    [(dtype, size) for dtype in (torch.float32, torch.bfloat16) for size in ((64, 64), (96, 160), (128, 32))],
    [(torch.float32, (96, 160)), (torch.bfloat16, (128, 32))].__contains__), ids=str)
def test_deploy_form_in_other_types_layouts_and_sizes(
    dtype: torch.dtype, size: tuple[int, int], layout: torch.memory_format
) -> None:
    net = detector("inside blocks")
    x = images(3, *size).to(memory_format=layout)
    exact = copy.deepcopy(net).double()
    net.to(dtype)
    fused = fuse(net)
    for depth in ("super", "TFTFTFTF", "FTFFTTFT", "base"):
        wanted, plain, actual = (forward(each, x.to(t), depth) for each, t in (
            (exact, torch.float64), (net, dtype), (fused, dtype)))
        for name in wanted:
            errors = [(found[name].double() - wanted[name]).abs().mean().item() for found in (actual, plain)]
            assert actual[name].dtype == plain[name].dtype
            assert errors[0] <= 2 * errors[1] + 1e-4 * wanted[name].abs().max().item(), (depth, name, errors)


@pytest.mark.usefixtures("nothing_compiled")
@pytest.mark.parametrize("kind", few(KINDS, lambda kind: kind == "whole blocks"))
def test_no_sweep_compiles_twice(kind: str) -> None:
    """Each of eight stages has two paths, and nothing is compiled after each of them has run."""
    net, x = detector(kind), images()
    expected = {depth: forward(net, x, depth) for depth in some(net)}
    with torch.no_grad():
        compiled = compile(net, backend="aot_eager")
        counts = count(compiled, x, expected)
        assert (counts.depths, counts.recompiles, counts.given_up) == (32, 0, ())
        with set_stance("fail_on_recompile"):
            for depth in random.Random(1).sample([*expected], len(expected)):
                agree(forward(compiled, x, depth), expected[depth], depth)


@pytest.mark.usefixtures("graphs")
@pytest.mark.parametrize("make", few([copy.deepcopy, fuse], [fuse].__contains__))
@pytest.mark.parametrize("max_graphs", few([4, 300], [300].__contains__))  # some dropped; all kept
def test_engine_of_graphs(make: Any, max_graphs: int) -> None:
    """Outputs are read when all have run."""
    net = detector().double()
    engine = Engine(make(net), batch_sizes=(1, 4), max_graphs=max_graphs)
    results = []
    for i, depth in enumerate(some(net)):
        x = images(1 + i % 3, seed=i, dtype=torch.float64)
        results.append((depth, x, engine(x, depth=depth)))
    for depth, x, found in results:
        agree(as_tensors(found), forward(net, x, depth), (depth, len(x)), tolerance=1e-10)


@pytest.mark.parametrize("way", ["split", "whole"])
@pytest.mark.parametrize("kind", few(KINDS, lambda kind: kind == "whole blocks"))
def test_each_image_as_if_alone(kind: str, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adn.runtime.fuse.fastest", lambda ways, device: way)
    net = detector(kind).double()
    depths = some(net)[::4]
    fused, x = fuse(net), images(len(depths), dtype=torch.float64)
    rows = [forward(net, image[None], depth) for image, depth in zip(x, depths, strict=True)]
    expected = {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
    table = table_of(depths)
    for given in (depths, table, lambda k, features: table[k]):
        agree(as_tensors(fused.per_image(x, given)), expected, type(given), tolerance=1e-10)


def test_saved_and_loaded(tmp_path: Path) -> None:
    net, x = detector(), images()
    adn.save(net, tmp_path / "net.safetensors")
    again = adn.load(tmp_path / "net.safetensors").eval()
    for depth in ("super", "TFFTTFTF", "base"):
        agree(forward(again, x, depth), forward(net, x, depth), depth, tolerance=0)
