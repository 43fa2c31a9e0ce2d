"""Run-time depth of a detector: deploy form, compiled, in an engine, per image, exported, accelerated."""

from __future__ import annotations

import copy
import itertools
import logging
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from compilations import count
from conftest import few, randomise
from detr_cases import some_targets
from fake_graphs import FakeGraphs
from test_rtdetr import in_order, tiny
from torch import Tensor, nn
from torch.compiler import set_stance

import adn
from adn.core.behaviours import Swapped
from adn.measure.profile import fit_budget, profile
from adn.models.rtdetr.criterion import DetectionLoss
from adn.runtime import engine as engine_module
from adn.runtime.accelerate import accelerate, fusions, use_kernels
from adn.runtime.compile import compile
from adn.runtime.engine import Engine
from adn.runtime.fuse import fuse
from adn.runtime.layers import NormAct, RepConvNormAct
from adn_kernels import private

NARROW = {"avg_down": True, "channels": (8, 16, 24, 32)}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "presnet18, necks of half width": ("rtdetr_r18vd", {}),
    "presnet50, frozen": ("rtdetr_r50vd", {}),
    "timm, frozen": ("anydepth_rtdetr_r50vd", {"backbone": "resnet18", "backbone_args": NARROW}),
    "timm, two trainings": ("anydepth_rtdetr_r50vd", {
        "backbone": "resnet18", "backbone_args": NARROW, "freeze_norm": False, "expansion": 0.5}),
    "timm, layer norms": ("anydepth_rtdetr_r50vd", {
        "backbone": "convnext_atto", "backbone_args": {"dims": (8, 16, 24, 32), "depths": (2, 2, 3, 2)}}),
    "timm, mobile": ("anydepth_rtdetr_r50vd", {
        "backbone": "mobilenetv2_050", "backbone_args": {}, "freeze_stem": False}),
}
IN_CI = list(KINDS)[:4]


def detector(kind: str = "presnet18, necks of half width", decoder_layers: int = 3, **kwargs: object) -> nn.Module:
    """Any-depth, in evaluation, with second norms that differ from the first."""
    name, args = KINDS[kind]
    net = tiny(name, decoder_layers=decoder_layers, **args | kwargs)
    if not name.startswith("anydepth"):
        adn.convert(net)
    return randomise(net, seed=1).eval()


def images(n: int = 2, h: int = 64, w: int = 96, dtype: torch.dtype = torch.float32, seed: int = 2) -> Tensor:
    return torch.rand(n, 3, h, w, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def forward(net: nn.Module, x: Tensor, depth: Any) -> dict[str, Tensor]:
    with torch.no_grad(), adn.at_depth(net, depth):
        return in_order(net(x))


def agree(found: dict[str, Tensor], expected: dict[str, Tensor], message: object = "", tolerance: float = 1e-4) -> None:
    assert found.keys() == expected.keys()
    assert torch.equal(found["query_index"], expected["query_index"]), message
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=tolerance, atol=tolerance,
                                   msg=lambda m, name=name: f"{message} {name}: {m}")


def every_seventh(net: nn.Module) -> list[adn.Depth]:
    """Some depths, among them both extremes, both states of each flag and every number of decoder layers."""
    every = adn.depths(net)
    return [*every[::7], every[-1]]


# ------------------------------------------------------------------------------------------------------- deploy form


@pytest.mark.parametrize("kind", few(KINDS, IN_CI[3:].__contains__))
def test_deploy_form_at_every_depth(kind: str) -> None:
    net, x = detector(kind).double(), images(dtype=torch.float64)
    fused, seen = fuse(net), set()
    for depth in adn.depths(net):
        expected = forward(net, x, depth)
        agree(forward(fused, x, depth), expected, depth, tolerance=1e-11)
        seen.add(expected["pred_boxes"].sum().item())
    assert len(seen) == len(adn.depths(net)), "every depth computes something else"


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels-last"])
@pytest.mark.parametrize(("dtype", "size"), few(
    itertools.product([torch.float32, torch.bfloat16], [(64, 64), (96, 160), (128, 32)]),
    [(torch.float32, (96, 160)), (torch.bfloat16, (128, 32))].__contains__), ids=str)
def test_deploy_form_in_other_types_layouts_and_sizes(
    dtype: torch.dtype, size: tuple[int, int], layout: torch.memory_format
) -> None:
    """What every query makes of itself; which tokens are chosen is a matter of rounding."""
    net = detector("timm, two trainings")
    x = images(3, *size).to(memory_format=layout)
    exact = copy.deepcopy(net).double()
    net.to(dtype)
    fused = fuse(net)
    for depth in ("super", "TFTF|T|2", "base"):
        wanted, plain, actual = (forward(each, x.to(t), depth) for each, t in (
            (exact, torch.float64), (net, dtype), (fused, dtype)))
        assert actual["pred_logits"].dtype == dtype
        if dtype == torch.float32:
            agree(actual, plain, depth)
            continue

        def error(found: dict[str, Tensor], wanted: dict[str, Tensor] = wanted) -> float:
            return (found["pred_logits"].double().mean(1) - wanted["pred_logits"].mean(1)).abs().max().item()

        assert error(actual) <= 2 * error(plain) + 0.02


def test_deploy_form_is_of_few_calls() -> None:
    """No norm is left alone, and where the neck bypasses there are fewer merged branches."""
    net = detector()
    fused = fuse(net)
    assert [segment.flag for segment in fused.segments] == [None, 0, 1, 2, 3, 4, 5]
    for segment in fused.segments:
        for path in segment.paths:
            assert not any(isinstance(m, NormAct | nn.BatchNorm2d) for m in path.modules())
    neck, decoder = fused.segments[-2:]
    assert [sum(isinstance(m, RepConvNormAct) for m in path.modules()) for path in neck.paths] == [12, 4]
    assert decoder.entries == (1, 2, 3)
    layers = [sum(isinstance(m, nn.MultiheadAttention) for m in path.modules()) for path in decoder.paths]
    assert layers == [1, 2, 3]


@pytest.mark.parametrize("change", ["training", "loading", "assigning"])
def test_deploy_form_follows_the_weights(change: str) -> None:
    net, x = detector("timm, two trainings"), images()
    fused = fuse(net)
    before = {depth: forward(fused, x, depth) for depth in ("super", "base")}
    if change == "training":
        net.train()
        targets = some_targets([2, 1])
        for depth in ("super", "base"):
            with adn.at_depth(net, depth):
                sum(DetectionLoss()(net(x, targets), targets).values()).backward()
        with torch.no_grad():
            for p in net.parameters():
                if p.grad is not None:
                    p -= 0.01 * p.grad.sign()
        net.eval()
    else:
        other = randomise(copy.deepcopy(net), seed=9)
        net.load_state_dict(other.state_dict(), assign=change == "assigning")
    for depth in ("super", "base"):
        found = forward(fused, x, depth)
        agree(found, forward(net, x, depth), depth, tolerance=1e-3)
        assert not torch.allclose(found["pred_logits"], before[depth]["pred_logits"], atol=1e-3)


def test_deploy_form_keeps_its_depth_apart_and_can_be_copied() -> None:
    net, x = detector(), images()
    fused = fuse(net)
    adn.set_depth(fused, "TFFT|T|2")
    assert adn.get_depth(net) == adn.Depth("FFFF|F|3")
    expected = forward(net, x, "TFFT|T|2")
    for each in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused)), copy.deepcopy(copy.deepcopy(fused))):
        assert adn.get_depth(each) == adn.Depth("TFFTT|2")
        agree(forward(each, x, adn.get_depth(each)), expected)
    assert len(adn.depths(fused)) == 96
    with pytest.raises(ValueError, match="4 layers of a stack of 3"):
        adn.set_depth(fused, "FFFFF|4")
    with pytest.raises(ValueError, match="multiples of 32"):
        fused(images(1, 60, 64))


# ------------------------------------------------------------------------------------------------- a depth per image


def some_depths(net: nn.Module) -> list[adn.Depth]:
    return [adn.Depth(depth) for depth in ("FFFFF|3", "TTTTT|2", "FTFTF|1", "TFTFT|3", "FFTTT|1")]


def table_of(depths: list[adn.Depth]) -> Tensor:
    return torch.tensor([[int(entry) for entry in depth] for depth in depths], dtype=torch.int32).T.contiguous()


def alone(net: nn.Module, x: Tensor, depths: list[adn.Depth]) -> dict[str, Tensor]:
    rows = [forward(net, image[None], depth) for image, depth in zip(x, depths, strict=True)]
    return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}


@pytest.mark.parametrize("kind", IN_CI[:3])
def test_each_image_as_if_alone(kind: str) -> None:
    net, x = detector(kind).double(), images(5, dtype=torch.float64)
    depths = some_depths(net)
    fused, table, expected = fuse(net), table_of(depths), alone(net, x, depths)
    asked: list[tuple[int, tuple[int, ...]]] = []

    def router(k: int, features: Tensor, *others: Tensor) -> Tensor:
        asked.append((k, tuple(features.shape)))
        return table[k]

    for given in (table, table, depths, [str(depth) for depth in depths], router):
        agree(in_order(fused.per_image(x, given)), expected, type(given), tolerance=1e-10)
    assert [k for k, _ in asked] == [0, 1, 2, 3, 4, 5], "once for each entry"
    assert all(shape[0] == 5 for _, shape in asked)
    assert torch.equal(table, table_of(depths))


@pytest.mark.parametrize("way", ["split", "whole"])
def test_both_ways_where_the_host_knows(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adn.runtime.fuse.fastest", lambda ways, device: way)
    net, x = detector().double(), images(5, dtype=torch.float64)
    depths = some_depths(net)
    agree(in_order(fuse(net).per_image(x, depths)), alone(net, x, depths), tolerance=1e-10)
    only_decoder = [adn.Depth(f"TFTFT|{n}") for n in (3, 1, 2, 1, 1)]
    agree(in_order(fuse(net).per_image(x, only_decoder)), alone(net, x, only_decoder), tolerance=1e-10)


def test_tables_that_do_not_fit() -> None:
    net, x = detector(), images()
    fused = fuse(net)
    for table, message in ((torch.zeros(5, 2, dtype=torch.int32), r"pass \(6, 2\)"),
                           (torch.zeros(6, 2), "pass int32")):
        with pytest.raises(ValueError, match=message):
            fused.per_image(x, table)
    with pytest.raises(ValueError, match="4 layers of a stack of 3"):
        fused.per_image(x, ["FFFFF|4", "FFFFF|1"])


# ---------------------------------------------------------------------------------------------------------- compiled


@pytest.fixture
def nothing_compiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(logging.getLogger("torch.__trace"), "propagate", False)  # pytest would keep all of it
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=8):
        yield
    torch._dynamo.reset()


def small(kind: str) -> nn.Module:
    """Of a size that compiles quickly: two decoder layers, two bottlenecks in each CSP block."""
    return detector(kind, decoder_layers=2, depth_mult=0.67)


WAYS = {"adn": compile, "torch": torch.compile}


def inside_graphs(graph: torch.fx.GraphModule, inputs: list) -> Callable:
    """A backend that leaves a trace of what runs compiled."""
    def run(*args: Any) -> Any:
        with torch.autograd.profiler.record_function("graph"):
            return graph.forward(*args)
    return run


def operators_outside_graphs(call: Callable[[], object]) -> list[str]:
    with torch.autograd.profiler.profile() as trace:
        call()
    outside = []
    for event in trace.function_events:
        callers, parent = [], event.cpu_parent
        while parent is not None:
            callers.append(parent.name)
            parent = parent.cpu_parent
        if event.name.startswith(("aten::", "adn::")) and "graph" not in callers and not any(
                name.startswith(("aten::", "adn::")) for name in callers):
            outside.append(event.name)
    return outside


@pytest.mark.usefixtures("nothing_compiled")
@pytest.mark.parametrize(("kind", "way"), few(
    zip(IN_CI, itertools.cycle(["adn", "torch"]), strict=False), lambda case: case[0] == IN_CI[0]))
def test_sweep_of_a_compiled_detector(kind: str, way: str) -> None:
    """Two paths of each stage and of the neck, one of the decoder for each number of layers; timm's stem is one too."""
    net, x = small(kind), images()
    expected = {depth: forward(net, x, depth) for depth in adn.depths(net)}
    with torch.no_grad():
        compiled = WAYS[way](net, backend=inside_graphs)
        counts = count(compiled, x, swept := every_seventh(net))
        assert (counts.depths, counts.regions, counts.recompiles) == (
            len(swept), 4 * 2 + 2 + 2 + kind.startswith("timm"), 0)
        assert (counts.given_up, counts.uncompiled) == ((), {})
        with set_stance("fail_on_recompile"):
            for depth, wanted in expected.items():
                agree(forward(compiled, x, depth), wanted, depth)
            for depth in ("super", "FTTF|T|1", "base"):
                adn.set_depth(net, depth)
                assert operators_outside_graphs(lambda: compiled(x)) == []


def step(net: nn.Module, x: Tensor, counts: list[int], depth: str) -> dict[str, Tensor]:
    """Gradients and running statistics after a step on an image for each count of objects."""
    targets = some_targets(counts)
    for target in targets:
        target["boxes"] = target["boxes"].to(x.dtype)
    net.zero_grad()
    with adn.at_depth(net, depth):
        outputs = net(x, targets, torch.Generator().manual_seed(0))
    sum(DetectionLoss()(outputs, targets).values()).backward()
    found = {name: p.grad for name, p in net.named_parameters() if p.grad is not None}
    return found | {name: buffer.clone() for name, buffer in net.named_buffers()}


@pytest.mark.usefixtures("nothing_compiled")
@pytest.mark.parametrize(("way", "backend"), few(
    [("adn", "eager"), ("adn", "aot_eager"), ("torch", "aot_eager")], lambda case: False))
def test_training_a_compiled_detector(way: str, backend: str) -> None:
    """However many objects the images have, and where none has any: the decoder, which gets their denoising queries, is
    compiled once for the first number, once for all numbers and once for none."""
    net = small(IN_CI[0]).double().train()
    eager, x = copy.deepcopy(net), images(dtype=torch.float64)
    compiled = WAYS[way](net, backend=backend)
    compilations = []
    for counts in ([2, 1], [3, 1], [0, 0], [0, 4]):
        done = []
        for depth in ("super", "base"):
            found: dict[str, Tensor] = {}
            done += private.compilations(lambda: found.update(step(compiled, x, counts, depth)))  # noqa: B023
            expected = step(eager, x, counts, depth)
            assert len(found) == len(expected)
            for name, value in expected.items():
                other = found[name if name in found else f"_orig_mod.{name}"]
                torch.testing.assert_close(other, value, rtol=1e-8, atol=1e-10, msg=f"{counts} {depth} {name}")
        assert all(m.fail_type is None for m in done)
        compilations.append(len(done))
    assert compilations[1:] == [1, 1, 0]


@pytest.mark.full
@pytest.mark.usefixtures("nothing_compiled")
@pytest.mark.parametrize("training", [False, True])
def test_images_of_many_sizes_compile_a_few_times(training: bool) -> None:
    """As in training at many scales; sides of 32, whose coarsest map is one token wide, once more."""
    net = small(IN_CI[0]).train(training)
    eager = copy.deepcopy(net)
    compile(net, backend="eager")
    recompiled = []
    for n, h, w in ((2, 64, 96), (2, 96, 96), (2, 96, 128), (2, 128, 128), (2, 64, 64), (2, 160, 160), (2, 192, 96),
                    (2, 64, 160), (3, 96, 96), (4, 64, 96), (5, 96, 64), (6, 128, 64)):
        x, targets, found = images(n, h, w), some_targets([k % 4 for k in range(n)]), {}

        def run(each: nn.Module, x: Tensor = x, targets: list = targets) -> dict[str, Tensor]:
            with torch.no_grad():
                return each(x, targets, torch.Generator().manual_seed(0)) if training else each(x)

        recompiled.append(bool(private.compilations(lambda: found.update(run(net)))))  # noqa: B023
        expected = run(eager)
        torch.testing.assert_close(found["pred_boxes"], expected["pred_boxes"], rtol=1e-4, atol=1e-4)
    assert recompiled[0]
    assert recompiled[1]
    assert sum(recompiled) <= 5


@pytest.mark.usefixtures("nothing_compiled")
def test_a_copy_of_a_compiled_detector_is_a_plain_one() -> None:
    net, x = small(IN_CI[2]), images()
    expected = forward(net, x, "TFFFT|1")
    compile(net, backend="eager")
    agree(forward(net, x, "TFFFT|1"), expected)
    for each in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert not private.compilations(lambda: agree(forward(each, x, "TFFFT|1"), expected))  # noqa: B023
        assert each.state_dict().keys() == net.state_dict().keys()
        with pytest.raises(ValueError, match="3 layers of a stack of 2"):
            adn.set_depth(each, "FFFFF|3")


@pytest.mark.full
@pytest.mark.usefixtures("nothing_compiled")
def test_compiled_deploy_form() -> None:
    net, x = small(IN_CI[0]), images()
    fused = fuse(net)
    compile(fused, backend="eager")
    with torch.no_grad():
        counts = count(fused, x)
    assert (counts.depths, counts.regions + counts.frames, counts.recompiles) == (64, 1 + 4 * 2 + 2 + 2, 0)
    with set_stance("fail_on_recompile"):
        for depth in every_seventh(net):
            agree(forward(fused, x, depth), forward(net, x, depth), depth)


# ----------------------------------------------------------------------------------------------------------- engines


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines capture and replay, on a CPU, in float64: oneDNN's packed weights have no memory to record."""
    monkeypatch.setattr(engine_module, "graphs_on", FakeGraphs)


def sweep(engine: Engine, net: nn.Module) -> None:
    """Batches of several sizes at several depths, read only afterwards."""
    results = []
    for depth in every_seventh(net):
        for n in (1, 3, 2):
            x = images(n, seed=n, dtype=next(net.parameters()).dtype)
            results.append((depth, x, engine(x, depth=depth)))
    for depth, x, result in results:
        agree(in_order(result), forward(net, x, depth), (depth, len(x)))


@pytest.mark.parametrize(("make", "batch_sizes"), few(
    itertools.product([copy.deepcopy, fuse], [None, (1, 4), (2,)]),
    [(copy.deepcopy, (1, 4)), (fuse, (2,))].__contains__))
def test_engine(make: Callable[[nn.Module], nn.Module], batch_sizes: tuple[int, ...] | None) -> None:
    net = detector()
    sweep(Engine(make(net), batch_sizes=batch_sizes), net)


@pytest.mark.usefixtures("graphs")
@pytest.mark.parametrize("max_graphs", few([4, 20], [4].__contains__))  # whole, some dropped; in segments
def test_engine_of_graphs(max_graphs: int) -> None:
    net = detector().double()
    engine = Engine(fuse(net), batch_sizes=(1, 4) if max_graphs == 4 else (4,), max_graphs=max_graphs)
    sweep(engine, net)
    info = engine.info()
    assert info["graphs"] <= max_graphs
    if max_graphs == 4:
        assert info["dropped"] > 0
        assert info["launches"] == info["calls"]
    else:
        assert info["runs"] == "a CUDA graph per segment"
        assert info["graphs"] == 1 + 5 * 2 + 3, "one for each entry of each segment"
        assert info["launches"] == 7 * info["calls"]
    randomise(net, seed=5)
    sweep(engine, net)


@pytest.mark.usefixtures("graphs")
def test_engine_with_a_depth_for_each_image() -> None:
    net, x = detector().double(), images(5, dtype=torch.float64)
    engine = Engine(fuse(net), batch_sizes=(8,))
    depths = some_depths(net)
    for chosen in (depths, depths[::-1], [depths[2]] * 5):
        expected = alone(net, x, chosen)
        agree(in_order(engine.per_image(x, table_of(chosen))), expected)
        agree(in_order(engine.per_image(x, chosen)), expected)
    assert engine.info()["captures"] == 1


def test_engine_by_budget() -> None:
    net, x = detector(), images()
    engine = Engine(fuse(net))
    chosen = ["FFFFF|3", "FFFFF|1", "TTTTT|1"]
    found = engine.profile(x, depths=chosen, rounds=2, warmup=1)
    assert [str(point.depth) for point in found] == chosen
    assert engine.set_budget(ms=1e6) == adn.Depth("FFFFF|3")
    agree(in_order(engine(x)), forward(net, x, "super"))
    with pytest.raises(ValueError, match="no depth runs"):
        engine.set_budget(ms=1e-6)


@pytest.mark.full
def test_profile() -> None:
    """More layers and more blocks cost more, whatever else is set."""
    net, x = detector(decoder_layers=2), images(1)
    found = {point.depth: point for point in profile(net, x, rounds=1, warmup=0)}
    assert list(found) == adn.depths(net)
    for depth, point in found.items():
        for k, entry in enumerate(depth):
            deeper = adn.Depth([*depth[:k], False if isinstance(entry, bool) else min(entry + 1, 2), *depth[k + 1 :]])
            assert deeper == depth or (point.macs < found[deeper].macs and point.params <= found[deeper].params)
    assert fit_budget(list(found.values()), ms=1e6) == adn.Depth("FFFFF|2")


# --------------------------------------------------------------------------------------------- static, and accelerated


@pytest.mark.parametrize(("kind", "depth"), few(
    itertools.product(IN_CI[0:3:2], ["super", "base"]), [(IN_CI[2], "base")].__contains__))
def test_export_of_a_static_detector(kind: str, depth: str) -> None:
    net, x = detector(kind), images()
    static = adn.extract(net, depth)
    assert not any(isinstance(module, Swapped) for module in static.modules())
    exported = torch.export.export(static, (x,), strict=False).module()
    agree(in_order(exported(x)), forward(net, x, depth))
    other = images(seed=4)
    agree(in_order(exported(other)), forward(net, other, depth))


@pytest.mark.parametrize("kind", few(IN_CI, IN_CI[1:3].__contains__))
def test_accelerated(kind: str) -> None:
    """Outputs, gradients and running statistics are those of the plain net."""
    plain = detector(kind).double()
    net = accelerate(copy.deepcopy(plain))
    x = images(dtype=torch.float64)
    with use_kernels(True):
        for depth in every_seventh(net):
            agree(forward(net, x, depth), forward(plain, x, depth), depth, tolerance=1e-9)
        plain.train()
        net.train()
        for depth in ("super", "TFTFF|1", "base"):
            found, expected = (step(each, x, [2, 3], depth) for each in (net, plain))
            assert found.keys() == expected.keys()
            for name, value in expected.items():
                torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-8, msg=f"{depth} {name}")


def test_what_is_accelerated() -> None:
    """Every batch norm that an activation or an addition follows."""
    rows = {row.name: row for row in fusions(accelerate(detector()))}
    assert rows["encoder.fpn_blocks.0.bottlenecks.2"].fused == ("conv1.norm + add + silu", "conv2.norm")
    assert rows["encoder.lateral_convs.1"].fused == rows["encoder.downsample_convs.0"].fused == ("norm + silu",)
    assert rows["backbone.conv1"].fused == tuple(f"conv1_{i}.norm + relu" for i in (1, 2, 3))
    without = {name for name, row in rows.items() if not row.active}
    assert without == {*(f"encoder.input_proj.{i}" for i in range(3)), "encoder.encoder.0", "decoder"}
