"""The engine: on a CPU with graphs that record and replay there, under which memory behaves as in a shared pool; and
on a GPU."""

from __future__ import annotations

import contextlib
import copy
import functools
import random
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from conftest import build, randomise
from fake_graphs import FakeGraphs
from torch import Tensor, nn

import adn
from adn.measure.profile import Point, Profile
from adn.runtime import engine as engine_module
from adn.runtime.engine import Engine
from adn.runtime.fuse import fuse
from adn.runtime.staged import Place
from adn.runtime.watch import Watch


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines capture and replay, on a CPU."""
    monkeypatch.setattr(engine_module, "graphs_on", FakeGraphs)


# ------------------------------------------------------------------------------------------------------------- nets


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.relu_(self.norm(self.conv(x)))


class Tiny(nn.Module):
    """Four stages, 16 depths."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        self.s1, self.s2, self.s3, self.s4 = (nn.Sequential(Block(), Block()) for _ in range(4))
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Any:
        return self.head(self.s4(self.s3(self.s2(self.s1(self.stem(x))))).mean((2, 3)))


class Segment:
    def __init__(self, flag: int | None, takes: str, gives: str, run: Callable) -> None:
        self.flag, self.takes, self.gives = flag, takes.split(), gives.split()
        self.run = run


class TinyInSegments(Tiny):
    """Its segments exchange tensors, a tuple of tensors and a number; one writes into its input."""

    @property
    def segments(self) -> list[Segment]:
        def stem(bypassed: bool, x: Tensor) -> tuple:
            return self.stem(x.mul_(2) / 2), 4

        def stage(i: int, bypassed: bool, h: Tensor, count: int) -> tuple:
            self._adn.choices[i].set(bypassed)
            h = self.get_submodule(f"s{i + 1}")(h)
            return ((h, h.mean((2, 3))),) if i == 3 else (h,)

        return [
            Segment(None, "x", "h0 count", stem),
            *(Segment(i, f"h{i} count", f"h{i + 1}", functools.partial(stage, i)) for i in range(4)),
            Segment(None, "h4", "logits", lambda bypassed, h4: (self.head(h4[1]),)),
        ]

    def take(self, x: Tensor) -> Tensor:
        return x.contiguous(memory_format=torch.channels_last)

    def give(self, values: dict[str, Any]) -> Tensor:
        return values["logits"]


def tiny(cls: type[Tiny] = Tiny) -> nn.Module:
    torch.manual_seed(0)
    net = randomise(cls()).eval()
    net = adn.convert(net, plan=["s1", "s2", "s3", "s4"])
    with torch.no_grad():  # the second norms are others
        for name, tensor in net.named_parameters():
            if ".skip." in name:
                tensor.add_(0.3)
    return net


def images(*batches: int, size: int = 7, like: nn.Module | None = None) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    where = next(like.parameters()) if like is not None else torch.zeros(())
    return [torch.randn(n, 3, size, size, generator=generator).to(where.device, where.dtype) for n in batches]


def expected(net: nn.Module, x: Tensor, depth: Any, padded: int | None = None) -> Any:
    if padded is not None:
        x = torch.cat([x, x.new_zeros(padded - len(x), *x.shape[1:])])
    with torch.inference_mode(), adn.at_depth(net, depth):
        return net(x.clone())


def close(result: Tensor, right: Tensor) -> None:
    """Not equal: segments have a layout of their own, a GPU more than one way to compute a convolution."""
    torch.testing.assert_close(result, right, rtol=1e-4, atol=1e-4)


def kinds() -> list[tuple[type[Tiny], int]]:
    """(net, max_graphs): whole graphs that fit, ones of which some are dropped, and segments."""
    return [(Tiny, 64), (Tiny, 3), (Tiny, 1), (TinyInSegments, 10), (TinyInSegments, 12)]


each_kind = pytest.mark.parametrize(("cls", "max_graphs"), kinds(), ids=lambda v: getattr(v, "__name__", str(v)))

# ------------------------------------------------------------------------------------------------- what it computes


def storm(engine: Engine, calls: int = 60, padded: Callable[[int], int | None] = lambda n: None) -> None:
    """Random depths and batches, results read only afterwards; every one must be that of the net."""
    net, pick = copy.deepcopy(engine.net), random.Random(0)
    depths, batches = adn.depths(net), images(1, 2, 3, like=net)
    wanted = {(depth, i): expected(net, x, depth, padded(len(x)))
              for depth in depths for i, x in enumerate(batches)}
    before = [x.clone() for x in batches]
    results = []
    for _ in range(calls):
        depth, i = pick.choice(depths), pick.randrange(len(batches))
        results.append((depth, i, engine(batches[i], depth=depth)))
    for depth, i, result in results:
        n = len(batches[i])
        close(result, wanted[depth, i][:n])
    assert all(torch.equal(x, y) for x, y in zip(batches, before)), "inputs are the caller's"


@each_kind
def test_storm(graphs, cls: type[Tiny], max_graphs: int) -> None:
    engine = Engine(tiny(cls), max_graphs=max_graphs)
    storm(engine)
    info = engine.info()
    assert info["calls"] == 60
    assert info["graphs"] <= max_graphs
    assert info["invalidations"] == 0
    if cls is TinyInSegments:
        assert info["launches"] == 60 * 6
    else:
        assert info["launches"] == 60
    if max_graphs == 64:
        assert info["dropped"] == 0
        assert info["captures"] == info["graphs"] == len(set(engine._captured)) > 30


def test_storm_without_graphs() -> None:
    engine = Engine(tiny())
    storm(engine, 20)
    assert engine.info()["runs"] == "the net itself"
    assert engine.memory() == {"graphs": 0, "pool_bytes": 0, "buffer_bytes": 0}


def test_depths_differ() -> None:
    """Else all of these tests could pass with a wrong depth."""
    net, (x,) = tiny(), images(2)
    results = [expected(net, x, depth) for depth in adn.depths(net)]
    assert all((a - b).abs().max() > 1e-3 for i, a in enumerate(results) for b in results[:i])


@each_kind
def test_storm_with_padding(graphs, cls: type[Tiny], max_graphs: int) -> None:
    engine = Engine(tiny(cls), max_graphs=max_graphs, batch_sizes=(4, 2, 4))
    storm(engine, 40, padded=lambda n: 2 if n <= 2 else 4)
    assert "batch sizes 2, 4" in engine.info()["inputs"]


@contextlib.contextmanager
def planted(mistake: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def keep_first(self: Place, x: Tensor, fill: Callable = Place.fill) -> None:
        if self._filled == 0:
            fill(self, x)

    def leave_in_pool(self: Place, names: Iterable[str], values: Iterable[Any]) -> None:
        self._values.update(zip(names, values))

    def fill_without_zeros(self: Place, x: Tensor) -> None:
        self.x[: len(x)].copy_(x)

    def not_cut(tensor: Tensor, **_: Any) -> Tensor:
        return tensor.clone()

    def replay_first(self: Engine, form, depth, x, original: Callable = Engine._graphs_of) -> list:
        original(self, form, depth, x)
        return [next(iter(self._captured.values()))]

    with monkeypatch.context() as patch:
        match mistake:
            case "input not copied":
                patch.setattr(Place, "fill", keep_first)
            case "output not copied":
                patch.setattr(engine_module, "_own", lambda tensor, *, n, **_: tensor[:n])
            case "values left in the pool":
                patch.setattr(Place, "leave", leave_in_pool)
            case "padding from the batch before":
                patch.setattr(Place, "fill", fill_without_zeros)
            case "output not cut":
                patch.setattr(engine_module, "_own", not_cut)
            case "graph of another depth":
                patch.setattr(Engine, "_graphs_of", replay_first)
            case _:
                raise ValueError(mistake)
        yield


@pytest.mark.parametrize("mistake", ["input not copied", "output not copied", "output not cut",
                                     "graph of another depth"])
def test_storm_would_notice(graphs, monkeypatch: pytest.MonkeyPatch, mistake: str) -> None:
    with planted(mistake, monkeypatch), pytest.raises(AssertionError):
        storm(Engine(tiny(), batch_sizes=(3,)), padded=lambda n: 3)


def test_storm_of_segments_would_notice(graphs, monkeypatch: pytest.MonkeyPatch) -> None:
    with planted("values left in the pool", monkeypatch), pytest.raises(AssertionError):
        storm(Engine(tiny(TinyInSegments), max_graphs=10))


def test_padding_is_zero(graphs, monkeypatch: pytest.MonkeyPatch) -> None:
    """A net that sees its whole batch tells what is in it."""
    class Summed(Tiny):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + x.sum()

    def check() -> None:
        engine = Engine(tiny(Summed), batch_sizes=(4,))
        for x in images(4, 2, 3, 1, 4, 1):
            assert torch.equal(engine(x), expected(engine.net, x, "super", 4)[: len(x)])

    check()
    with planted("padding from the batch before", monkeypatch), pytest.raises(AssertionError):
        check()


@pytest.mark.parametrize("captured", [False, True])
def test_a_batch_larger_than_all(monkeypatch: pytest.MonkeyPatch, captured: bool) -> None:
    if captured:
        monkeypatch.setattr(engine_module, "graphs_on", FakeGraphs)
    engine = Engine(tiny(), batch_sizes=(1, 3), copy_output=False)
    x, = images(8)
    result = engine(x, depth="TFTT")
    parts = [expected(engine.net, part, "TFTT", 3)[: len(part)] for part in x.split(3)]
    assert torch.equal(result, torch.cat(parts))
    engine(images(3)[0])
    assert torch.equal(result, torch.cat(parts)), "put together anew, so nobody overwrites it"


@pytest.mark.parametrize("captured", [False, True])
def test_trees_of_outputs(monkeypatch: pytest.MonkeyPatch, captured: bool) -> None:
    class Detector(Tiny):
        def forward(self, x: Tensor) -> dict[str, Any]:
            h = self.s1(self.stem(x))
            return {"boxes": (h, [h.mean((2, 3)), None]), "stride": 8, "input": x}

    if captured:
        monkeypatch.setattr(engine_module, "graphs_on", FakeGraphs)
    engine = Engine(tiny(Detector), batch_sizes=(3,))
    first, second = images(2, 7)
    results = [engine(x, depth=depth) for x in (first, second) for depth in ("FFFF", "TTTT")]
    for result, (x, depth) in zip(results, [(x, d) for x in (first, second) for d in ("FFFF", "TTTT")]):
        parts = [expected(engine.net, part, depth, 3) for part in x.split(3)]
        h = torch.cat([part["boxes"][0][: len(sub)] for part, sub in zip(parts, x.split(3))])
        assert result["stride"] == 8
        assert isinstance(result["boxes"], tuple)
        assert result["boxes"][1][1] is None
        assert torch.equal(result["boxes"][0], h)
        assert torch.equal(result["boxes"][1][0], torch.cat(
            [part["boxes"][1][0][: len(sub)] for part, sub in zip(parts, x.split(3))]))
        assert torch.equal(result["input"], x)


def test_static_output_on_request(graphs) -> None:
    engine = Engine(tiny(), copy_output=False)
    x, = images(2)
    first = engine(x, depth="FFFF")
    kept = first.clone()
    assert torch.equal(kept, expected(engine.net, x, "FFFF"))
    again = engine(2 * x, depth="FFFF")
    assert again.data_ptr() == first.data_ptr()
    engine(x, depth="TTTT")
    assert first.isnan().all(), "the next call overwrites it, as documented"


def test_input_in_any_layout(graphs) -> None:
    engine = Engine(tiny())
    x, = images(2)
    wanted = expected(engine.net, x, "super")
    for given in (x, x.contiguous(memory_format=torch.channels_last), x.flip(3).flip(3), x.transpose(2, 3).transpose(
            2, 3), torch.cat([x, x], 3)[..., :7]):
        assert torch.equal(engine(given), wanted)
    engine = Engine(tiny())
    engine.warm(x.contiguous(memory_format=torch.channels_last), depths=["super"])
    place, = engine._places.values()
    assert place.x.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(engine(x), wanted)


# -------------------------------------------------------------------------------------------------------- its depth


@pytest.mark.parametrize("captured", [False, True])
def test_depth(monkeypatch: pytest.MonkeyPatch, captured: bool) -> None:
    if captured:
        monkeypatch.setattr(engine_module, "graphs_on", FakeGraphs)
    net, (x,) = tiny(), images(1)
    adn.set_depth(net, "FTFF")
    wanted = {str(depth): expected(net, x, depth) for depth in adn.depths(net)}
    engine = Engine(net)
    assert engine.depth == adn.Depth("FTFF")
    assert torch.equal(engine(x), wanted["FTFF"])
    assert torch.equal(engine(x, depth="base"), wanted["TTTT"])
    assert engine.depth == adn.Depth("FTFF"), "of that call only"
    engine.set_depth([True, False, False, False])
    assert torch.equal(engine(x), wanted["TFFF"])
    adn.set_depth(net, "TTTT")
    assert torch.equal(engine(x), wanted["TFFF"]), "the engine has its own"
    with pytest.raises(ValueError, match="2 flags"):
        engine.set_depth("TF")
    with pytest.raises(ValueError, match="2 flags"):
        engine(x, depth="TF")
    assert engine.depth == adn.Depth("TFFF")


def points() -> Profile:
    cost = {"FFFF": (9.0, 20.0), "TFFF": (7.0, 8.0), "TTTT": (4.0, 6.0)}
    return Profile([Point(adn.Depth(depth), 100 - i, 1, *ms) for i, (depth, ms) in enumerate(cost.items())])


def test_budget() -> None:
    engine = Engine(tiny(), profile=points())
    assert str(engine.set_budget(ms=9)) == "FFFF" == str(engine.depth)
    assert str(engine.set_budget(ms=9, percentile=99)) == "TFFF" == str(engine.depth)
    assert str(engine.set_budget(ms=5)) == "TTTT"
    with pytest.raises(ValueError, match=r"TTTT, takes 4 ms \(p50\)"):
        engine.set_budget(ms=3)
    assert str(engine.depth) == "TTTT"
    with pytest.raises(ValueError, match="percentile"):
        engine.set_budget(ms=3, percentile=90)
    with pytest.raises(RuntimeError, match=r"engine.profile\(x\)"):
        Engine(tiny()).set_budget(ms=3)
    with pytest.raises(ValueError, match="5 flags"):
        Engine(tiny(), profile=Profile([Point(adn.Depth("TTTTT"), 1, 1, 1.0, 1.0)])).set_budget(ms=3)


@pytest.mark.parametrize("captured", [False, True])
def test_profile_of_itself(monkeypatch: pytest.MonkeyPatch, captured: bool) -> None:
    if captured:
        monkeypatch.setattr(engine_module, "graphs_on", FakeGraphs)
    engine = Engine(tiny(), batch_sizes=(2, 4))
    adn.set_depth(engine.net, "TTFF")
    x, = images(3)
    result = engine.profile(x, rounds=3, warmup=1)
    assert [point.depth for point in result] == adn.depths(engine.net)
    assert result[0].macs > result[-1].macs
    assert engine.info()["calls"] == 16 * 4, "what is timed is the engine"
    if captured:
        assert engine.info()["captures"] == 16
    assert str(engine.set_budget(ms=1e9)) == "FFFF"
    chosen = engine.profile(x, depths=iter(["TTTT", "base", "TFTT"]), rounds=1)
    assert [str(point.depth) for point in chosen] == ["TTTT", "TFTT"]
    assert str(adn.Depth(engine.set_budget(ms=1e9))) == "TFTT"


# ------------------------------------------------------------------------------------------------------ what it keeps


def test_least_recently_used_goes(graphs) -> None:
    engine = Engine(tiny(), max_graphs=3)
    x, = images(1)
    for depth in ("FFFF", "TFFF", "TTFF", "FFFF", "TTTT"):
        engine(x, depth=depth)
    assert [str(depth) for _, depth in engine._captured] == ["TTFF", "FFFF", "TTTT"]
    assert engine.info()["captures"] == 4
    assert engine.info()["dropped"] == 1
    assert engine.memory()["graphs"] == 3
    assert engine.memory()["pool_bytes"] == 3000
    assert engine.memory()["buffer_bytes"] == x.nbytes
    engine(x, depth="TTFF")
    assert engine.info()["captures"] == 4
    engine(x, depth="TFFF")
    assert engine.info()["captures"] == 5


def test_buffers_go_with_their_graphs(graphs) -> None:
    engine = Engine(tiny(), max_graphs=2)
    batches = images(1, 2, 3, 4, 5)
    for x in batches:
        assert torch.equal(engine(x), expected(engine.net, x, "super"))
    assert engine.memory()["buffer_bytes"] == sum(x.nbytes for x in batches[-2:])
    assert engine.memory()["graphs"] == 2
    engine.reset()
    assert engine.memory() == {"graphs": 0, "pool_bytes": 0, "buffer_bytes": 0}
    assert torch.equal(engine(images(1, size=9)[0]), expected(engine.net, images(1, size=9)[0], "super"))


def test_segments_only_where_depths_do_not_fit(graphs) -> None:
    x, = images(2)
    for cls, max_graphs, launches in ((TinyInSegments, 16, 1), (TinyInSegments, 15, 6), (TinyInSegments, 10, 6),
                                      (TinyInSegments, 9, 1), (Tiny, 15, 1)):
        engine = Engine(tiny(cls), max_graphs=max_graphs)
        engine(x)
        assert engine.info()["launches"] == launches, (cls, max_graphs)
        assert f"per {'depth' if launches == 1 else 'segment'}" in engine.info()["runs"]


def test_graphs_of_segments_are_shared(graphs) -> None:
    """2 for each stage, 1 for each part that depends on none."""
    engine = Engine(tiny(TinyInSegments), max_graphs=10)
    engine.warm((2, 3, 7, 7))
    assert engine.memory()["graphs"] == engine.info()["captures"] == 2 * 4 + 2
    assert engine.memory()["buffer_bytes"] == 4 * 2 * (3 * 7 * 7 + 5 * 4 * 5 * 5 + 4 + 5)
    place, = engine._places.values()
    assert place.x.is_contiguous(memory_format=torch.channels_last), "as the segments want it"
    with pytest.raises(ValueError, match=r"20 graphs.*only 10"):
        Engine(tiny(TinyInSegments), max_graphs=10, batch_sizes=(1, 2)).warm((2, 3, 7, 7))


def test_failed_capture_leaves_nothing(graphs) -> None:
    engine = Engine(tiny())
    first, second = images(1, 2)
    engine(first)
    before = engine.memory()
    engine._graphs.fail_with = RuntimeError("it reads a value")
    with pytest.raises(RuntimeError, match="reads a value"):
        engine(second)
    assert engine.memory() == before
    with pytest.raises(RuntimeError, match="reads a value"):
        Engine.warm(engine, images(1, size=9)[0])
    engine._graphs.fail_with = None
    with pytest.raises(ValueError, match=r"\(B, 3, 7, 7\)"):
        engine(images(1, size=9)[0])
    assert torch.equal(engine(second), expected(engine.net, second, "super"))


def test_warm(graphs) -> None:
    engine = Engine(tiny(), batch_sizes=(1, 4), max_graphs=32)
    engine.warm((3, 3, 7, 7))
    assert engine.info()["captures"] == 32
    assert engine.info()["calls"] == 0
    storm(engine, 20, padded=lambda n: 1 if n == 1 else 4)
    assert engine.info()["captures"] == 32
    with pytest.raises(ValueError, match=r"32 graphs.*only 31"):
        Engine(tiny(), batch_sizes=(1, 4), max_graphs=31).warm((3, 3, 7, 7))
    engine = Engine(tiny())
    engine.warm(images(2)[0], depths=["super", "TFTT", "FFFF"])
    assert engine.info()["captures"] == 2
    engine.warm((1, 3, 9, 9), depths=["super"])
    for x in (*images(2), *images(1, size=9)):
        assert torch.equal(engine(x), expected(engine.net, x, "super"))
    assert engine.info()["captures"] == 3
    engine.net.double()
    engine.warm((2, 3, 7, 7), depths=["super"])
    assert engine(images(2)[0].double()).dtype == torch.float64
    assert engine.info()["captures"] == 4


# ------------------------------------------------------------------------------------------------ when the net changes


def change(net: nn.Module, what: str) -> None:
    state = {name: tensor * 1.5 if tensor.is_floating_point() else tensor for name, tensor in net.state_dict().items()}
    match what:
        case "assign":
            net.load_state_dict(state, assign=True)
        case "load":
            net.load_state_dict(state)
        case "data":
            net.head.weight.data = net.head.weight.data * 2
        case "parameter":
            net.s2[0].conv.weight = nn.Parameter(net.s2[0].conv.weight * 2)
        case "buffer":
            net.s1[0].norm.skip.running_mean = net.s1[0].norm.skip.running_mean + 1
            net.s1[0].norm.running_mean = net.s1[0].norm.running_mean + 1
        case "module":
            net.head = nn.Linear(4, 6)
        case "double":
            net.double()
        case _:
            raise ValueError(what)


CHANGES = ["assign", "load", "data", "parameter", "buffer", "module", "double"]


@pytest.mark.parametrize("captured", [False, True])
@pytest.mark.parametrize("what", CHANGES)
def test_change_of_the_net(monkeypatch: pytest.MonkeyPatch, what: str, captured: bool) -> None:
    if captured:
        monkeypatch.setattr(engine_module, "graphs_on", FakeGraphs)
    engine = Engine(tiny())
    x, = images(2)
    before = {depth: engine(x, depth=depth) for depth in ("FFFF", "TFTT")}
    change(engine.net, what)
    if what == "double":
        x = x.double()
    for depth, outdated in before.items():
        wanted = expected(engine.net, x, depth)
        assert wanted.shape != outdated.shape or not torch.equal(wanted, outdated)
        assert torch.equal(engine(x, depth=depth), wanted)
    if captured:
        assert engine.info()["invalidations"] == (what != "load"), "what is written in place needs no new graph"
        assert engine.memory()["graphs"] == 2


def test_change_would_be_noticed(graphs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Watch, "changed", lambda self: False)
    for what in set(CHANGES) - {"load", "double"}:
        engine = Engine(tiny())
        x, = images(2)
        before = engine(x)
        change(engine.net, what)
        assert torch.equal(engine(x), before), "this one did not notice"


@pytest.mark.parametrize("change", [
    lambda net: net.s1[0].norm.register_buffer("extra", torch.zeros(1)),
    lambda net: net.s3.append(nn.Identity()),
    lambda net: delattr(net, "head"),
    lambda net: delattr(net.head, "bias"),
    lambda net: setattr(net.s2[1].norm, "running_var", net.s2[1].norm.running_var.clone()),
    lambda net: setattr(net.s2[1].norm.weight, "data", net.s2[1].norm.weight.data.clone()),
])
def test_watch(change: Callable[[nn.Module], None]) -> None:
    net = tiny()
    watch = Watch(net)
    net(images(1)[0])
    net.head.weight.data.fill_(1)
    assert not watch.changed()
    change(net)
    assert watch.changed()


def test_memory_is_held_until_a_change_is_noticed() -> None:
    """A graph may be launched once more before the change is seen; what it reads must not be another tensor by then."""
    net = tiny()
    address = net.head.weight.data_ptr()
    watch = Watch(net)
    net.head.weight.data = net.head.weight.data.clone()
    assert address in [tensor.data_ptr() for tensor in watch._memory]
    assert watch.changed()


def test_a_net_that_went_to_another_device(graphs) -> None:
    engine = Engine(tiny())
    x, = images(2)
    engine(x)
    engine.net.to("meta")
    with pytest.raises(ValueError, match=r"on cpu; accepted: .*on meta"):
        engine(x)


class Derived(Tiny):
    """A net that holds what it computed from another, as the deploy form does."""

    source = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.scale

    def refresh_if_changed(self) -> bool:
        if self.scale.item() == self.source:
            return False
        assert not torch.is_inference_mode_enabled()
        self.scale.fill_(self.source)
        return True


def test_a_net_that_follows_another(graphs) -> None:
    engine = Engine(tiny(Derived))
    x, = images(1)
    plain = engine(x)
    engine.net.source = 3.0
    assert torch.equal(engine(x), plain * 3)
    assert torch.equal(engine(x), plain * 3)
    assert engine.info()["invalidations"] == 0
    assert engine.info()["launches"] == 4, "one call ran twice"


def test_a_net_that_never_stays_the_same(graphs) -> None:
    class Restless(Tiny):
        def forward(self, x: Tensor) -> Tensor:
            self.head.weight = nn.Parameter(self.head.weight.detach().clone())
            return super().forward(x)

    with pytest.raises(RuntimeError, match="whenever it runs"):
        Engine(tiny(Restless))(images(1)[0])


# ----------------------------------------------------------------------------------------------------------- threads


def hammer(engine: Engine) -> None:
    net = copy.deepcopy(engine.net)
    depths, batches = adn.depths(net), images(*[2] * 16, like=net)
    wanted = [expected(net, x, depth) for x, depth in zip(batches, depths)]
    together = threading.Barrier(len(depths))

    def work(i: int) -> list[Tensor]:
        together.wait()
        if not batches[i].is_cuda:
            return [engine(batches[i], depth=depths[i]) for _ in range(4)]
        with torch.cuda.stream(torch.cuda.Stream()) as stream:
            stream.wait_stream(torch.cuda.default_stream())
            results = [engine(batches[i], depth=depths[i]) for _ in range(20)]
            torch.cuda.current_stream().synchronize()
            return results

    with ThreadPoolExecutor(len(depths)) as pool:
        results = list(pool.map(work, range(len(depths))))
    for of_thread, right in zip(results, wanted):
        for result in of_thread:
            close(result, right)


@each_kind
def test_threads(graphs, cls: type[Tiny], max_graphs: int) -> None:
    hammer(Engine(tiny(cls), max_graphs=max_graphs))


class SlowlySwitched(Tiny):
    def forward(self, x: Tensor) -> Tensor:
        time.sleep(0.001)
        return super().forward(x)


def test_threads_without_graphs() -> None:
    hammer(Engine(tiny(SlowlySwitched)))


@pytest.mark.parametrize("captured", [False, True])
def test_threads_would_notice(monkeypatch: pytest.MonkeyPatch, captured: bool) -> None:
    if captured:
        monkeypatch.setattr(engine_module, "graphs_on", FakeGraphs)
    engine = Engine(tiny(SlowlySwitched))
    engine.warm((2, 3, 7, 7))
    engine._lock = contextlib.nullcontext()
    with pytest.raises(AssertionError):
        hammer(engine)


# ---------------------------------------------------------------------------------------------------- what it refuses


@pytest.mark.parametrize("captured", [False, True])
def test_refuses_inputs(monkeypatch: pytest.MonkeyPatch, captured: bool) -> None:
    if captured:
        monkeypatch.setattr(engine_module, "graphs_on", FakeGraphs)
    engine = Engine(tiny(), batch_sizes=(2,))
    x, = images(2)
    engine(x)
    for wrong, message in (
        (images(2, size=8)[0], r"\(2, 3, 8, 8\).*accepted: \(B, 3, 7, 7\) of torch.float32 on cpu.*batch sizes 2"),
        (x.double(), r"torch.float64; accepted: .*torch.float32.*engine.warm"),
        (x[0], r"\(3, 7, 7\)"),
        (x.to("meta"), "on meta; accepted: .*on cpu"),
        (x[:0], "batch of 0"),
        (x.tolist(), "list is no tensor"),
        (x.clone().requires_grad_(), "no gradients"),
    ):
        with pytest.raises(ValueError, match=message):
            engine(wrong)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(RuntimeError, match="under autocast"):
        engine(x)
    assert torch.equal(engine(x), expected(engine.net, x, "super"))


@pytest.mark.parametrize("captured", [False, True])
def test_refuses_training_mode(monkeypatch: pytest.MonkeyPatch, captured: bool) -> None:
    if captured:
        monkeypatch.setattr(engine_module, "graphs_on", FakeGraphs)
    engine = Engine(tiny())
    x, = images(2)
    for warm in (False, True):
        if warm:
            engine(x)
        engine.net.train()
        for call in (engine, engine.warm, engine.profile):
            with pytest.raises(RuntimeError, match="training mode"):
                call(x)
        engine.net.eval()
        engine.net.s2[1].norm.train()
        with pytest.raises(RuntimeError, match="training mode"):
            engine(x)
        engine.net.eval()
    assert torch.equal(engine(x), expected(engine.net, x, "super"))
    assert engine(x).is_inference()


def test_refuses_settings() -> None:
    with pytest.raises(ValueError, match="not any-depth"):
        Engine(Tiny())
    for settings, message in (({"batch_sizes": ()}, "positive"), ({"batch_sizes": (0, 1)}, "positive"),
                              ({"batch_sizes": (1.5,)}, "positive"), ({"max_graphs": 0}, "max_graphs")):
        with pytest.raises(ValueError, match=message):
            Engine(tiny(), **settings)


@pytest.mark.parametrize("captured", [False, True])
def test_refuses_outputs(monkeypatch: pytest.MonkeyPatch, captured: bool) -> None:
    class Boxed(Tiny):
        def forward(self, x: Tensor) -> Any:
            box = type("Box", (), {})()
            box.tensor = super().forward(x)
            return box

    class Total(Tiny):
        def forward(self, x: Tensor) -> Any:
            return super().forward(x).sum(0)

    if captured:
        monkeypatch.setattr(engine_module, "graphs_on", FakeGraphs)
    x, = images(2)
    with pytest.raises(TypeError, match="returns a Box"):
        Engine(tiny(Boxed))(x)
    assert Engine(tiny(Total))(x).shape == (5,)
    for size in (1, 3):
        with pytest.raises(ValueError, match="without the batch in front"):
            Engine(tiny(Total), batch_sizes=(size,))(x)
    assert Engine(tiny(Total), batch_sizes=(2,))(x).shape == (5,)


def test_within_a_capture_of_the_user(graphs) -> None:
    engine = Engine(tiny(), max_graphs=2)
    x, = images(2)
    engine.warm(x, depths=["FFFF"])
    engine._graphs.user_captures = True
    with pytest.raises(RuntimeError, match=r"depth TTTT at batch size 2 has not been captured.*engine.warm\(x\)"):
        engine(x, depth="TTTT")
    launches = engine.info()["launches"]
    assert torch.equal(engine(x, depth="FFFF"), expected(engine.net, x, "FFFF"))
    change(engine.net, "assign")
    assert torch.equal(engine(x, depth="FFFF"), expected(engine.net, x, "FFFF"))
    assert engine.info()["launches"] == launches, "no graph in a graph"


def test_it_prints(graphs) -> None:
    engine = Engine(tiny(), batch_sizes=(1, 2))
    engine(images(1)[0])
    text = repr(engine)
    for line in ("net            Tiny", "depth          FFFF", "runs           a CUDA graph per depth",
                 "graphs         1", "accepted: (B, 3, 7, 7) of torch.float32 on cpu, run at batch sizes 1, 2"):
        assert line in text


@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224"])
def test_models(graphs, name: str) -> None:
    settings = {"num_classes": 5} | ({"img_size": 32, "depth": 6, "embed_dim": 48} if "vit" in name else {})
    net = adn.convert(build(name, **settings))
    engine, x = Engine(net), torch.randn(2, 3, 32, 32)
    for depth in adn.depths(net):
        assert torch.equal(engine(x, depth=depth), expected(net, x, depth))
    for depth in adn.depths(net):
        assert torch.equal(engine(-x, depth=depth), expected(net, -x, depth))


def test_compiled_net() -> None:
    net = tiny()
    engine, (x,) = Engine(torch.compile(net, backend="eager"), batch_sizes=(2,)), images(2)
    for depth in ("FFFF", "TFTF"):
        close(engine(x, depth=depth), expected(net, x, depth))
    assert engine.info()["net"] == "Tiny"


def follows_its_source(source: nn.Module, x: Tensor, **settings: Any) -> Engine:
    net = fuse(source)
    engine = Engine(net, **settings)
    for scale in (1, 1.1):
        with torch.no_grad():
            for parameter in source.parameters():
                parameter.mul_(scale)
        for depth in adn.depths(net):
            result = engine(x, depth=depth)
            torch.testing.assert_close(result, expected(net, x, depth), rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(result, expected(source, x, depth), rtol=1e-3, atol=1e-3)
    assert engine.info()["invalidations"] == 0
    return engine


def test_fused_net() -> None:
    follows_its_source(adn.convert(build("resnet18", num_classes=5)), torch.randn(2, 3, 32, 32))


@pytest.mark.parametrize("max_graphs", [15, 64], ids=["segments", "whole"])
def test_graphs_of_a_fused_net(graphs, max_graphs: int) -> None:
    """Of one whose weights are not packed by oneDNN: a recorded call would hold the old ones."""
    source = adn.convert(build("vit_tiny_patch16_224", num_classes=5, img_size=32, depth=12, embed_dim=48))
    engine = follows_its_source(source, torch.randn(2, 3, 32, 32), max_graphs=max_graphs)
    assert ("per segment" in engine.info()["runs"]) == (max_graphs < 16)


def vit_in_deploy_form() -> nn.Module:
    return fuse(adn.convert(build("vit_tiny_patch16_224", num_classes=5, img_size=32, depth=12, embed_dim=48)))


@pytest.mark.parametrize("captured", [False, True])
@pytest.mark.parametrize("sizes", [None, (4,)])
def test_a_depth_for_each_image(monkeypatch: pytest.MonkeyPatch, captured: bool, sizes: tuple[int, ...] | None) -> None:
    if captured:
        monkeypatch.setattr(engine_module, "graphs_on", FakeGraphs)
    net = vit_in_deploy_form()
    engine = Engine(net, batch_sizes=sizes)
    for seed in range(4):
        x = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(seed))
        flags = torch.randint(0, 2, (4, 3), dtype=torch.int32, generator=torch.Generator().manual_seed(seed))
        wanted = torch.cat([expected(net, image[None], [bool(f) for f in own]) for image, own in zip(x, flags.T)])
        for given in (flags, [[bool(f) for f in own] for own in flags.T], lambda k, features, flags=flags: flags[k]):
            torch.testing.assert_close(engine.per_image(x, given), wanted, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(engine(x, depth="TFTF"), expected(net, x, "TFTF"), rtol=1e-4, atol=1e-5)
    if captured:
        assert engine.info()["captures"] == 2, "one for all flags, one for the depth"


def test_a_depth_for_each_image_is_checked(graphs) -> None:
    x = torch.randn(3, 3, 32, 32)
    with pytest.raises(ValueError, match=r"takes a deploy form: adn\.Engine\(adn\.fuse\(net\)\)"):
        Engine(tiny()).per_image(images(2)[0], torch.zeros(4, 2, dtype=torch.int32))
    engine = Engine(vit_in_deploy_form(), batch_sizes=(2,))
    with pytest.raises(ValueError, match="pass at most 2 at once"):
        engine.per_image(x, torch.zeros(4, 3, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"shape \(4, 3\); pass \(4, 2\)"):
        engine.per_image(x[:2], torch.zeros(4, 3, dtype=torch.int32))
    engine._graphs.user_captures = True
    with pytest.raises(RuntimeError, match="call it once before"):
        engine.per_image(x[:2], torch.zeros(4, 2, dtype=torch.int32))


# -------------------------------------------------------------------------------------------------------- on a GPU

cuda = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
        pytest.mark.usefixtures("ieee")]


def on_gpu(*decorators: pytest.MarkDecorator) -> Callable:
    def mark(test: Callable) -> Callable:
        return functools.reduce(lambda test, decorator: decorator(test), [*cuda, *decorators], test)

    return mark


def real(**settings: Any) -> Engine:
    """Of a net whose convolutions are those of cuDNN, and whose last layer is one of cuBLAS."""
    return Engine(adn.convert(build("resnet18", num_classes=500)).cuda(), **settings)


@on_gpu(each_kind)
def test_storm_on_a_gpu(cls: type[Tiny], max_graphs: int) -> None:
    engine = Engine(tiny(cls).cuda(), max_graphs=max_graphs)
    storm(engine, 200)
    assert engine.info()["graphs"] <= max_graphs
    assert engine.info()["dropped"] == max(0, engine.info()["captures"] - engine.info()["graphs"])


@on_gpu(pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str))
def test_every_depth_on_a_gpu(dtype: torch.dtype) -> None:
    engine = real(batch_sizes=(1, 4))
    net = engine.net.to(dtype)
    x = torch.randn(3, 3, 64, 64, device="cuda", dtype=dtype)
    results = [engine(sign * x, depth=depth) for depth in adn.depths(net) for sign in (1, -1)]
    wanted = [expected(net, sign * x, depth, 4)[:3] for depth in adn.depths(net) for sign in (1, -1)]
    assert not torch.allclose(wanted[0], wanted[-1], rtol=0.1)
    tolerance = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.05}
    for result, right in zip(results, wanted):
        torch.testing.assert_close(result, right, **tolerance)
    assert engine.info()["captures"] == 16


@on_gpu()
def test_dropping_leaves_other_graphs_alone() -> None:
    """Also what cuBLAS works in."""
    engine = real(max_graphs=2)
    x, = images(64, size=64, like=engine.net)
    for _ in range(3):
        for depth in ("FFFF", "TTTT", "FFFF", "TFFF", "FFFF", "TTFF", "FFFF"):
            result = engine(x, depth=depth)
            scratch = [torch.full((1 << 24,), torch.nan, device="cuda") for _ in range(4)]  # takes what is free
            close(result, expected(engine.net, x, depth))
            close(engine(x, depth="FFFF"), expected(engine.net, x, "FFFF"))
            del scratch
    assert engine.info()["dropped"] > 6


@on_gpu()
def test_one_launch_per_call() -> None:
    engine = real()
    x, = images(2, size=64, like=engine.net)
    engine.warm(x)
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        for depth in adn.depths(engine.net):
            engine(x, depth=depth)
        torch.cuda.synchronize()
    names = [event.name for event in profiler.events()]
    assert names.count("cudaGraphLaunch") == 16
    # The input in, the output out.
    assert sum(name.startswith(("cudaLaunchKernel", "cuLaunchKernel", "cudaMemcpy")) for name in names) <= 2 * 16
    assert not any("Synchronize" in name for name in names[: names.index("cudaGraphLaunch") + 1])


@on_gpu()
def test_no_synchronisation() -> None:
    engine = real(batch_sizes=(2, 4))
    x, = images(3, size=64, like=engine.net)
    engine.warm(x)
    torch.cuda.set_sync_debug_mode("error")
    try:
        results = [engine(x, depth=depth) for depth in adn.depths(engine.net)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(results) == 16


@on_gpu()
def test_memory_on_a_gpu() -> None:
    engine = real()
    x, = images(16, size=128, like=engine.net)
    engine.warm(x, depths=["FFFF"])
    one = engine.memory()["pool_bytes"]
    engine.warm(x)
    assert 0 < one <= engine.memory()["pool_bytes"] < 3 * one, "16 graphs share their memory"
    engine = real(max_graphs=4)
    pick, held = random.Random(0), []
    for step in range(90):
        engine(x, depth=pick.choice(adn.depths(engine.net)))
        if step % 30 == 29:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            held.append(torch.cuda.memory_reserved())
    assert engine.info()["dropped"] > 40
    assert held[2] <= held[0] + (32 << 20)
    engine.reset()
    assert engine.memory() == {"graphs": 0, "pool_bytes": 0, "buffer_bytes": 0}
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() < held[0]


@on_gpu(each_kind)
def test_threads_on_a_gpu(cls: type[Tiny], max_graphs: int) -> None:
    """Each with a stream of its own."""
    hammer(Engine(tiny(cls).cuda(), max_graphs=max_graphs))


@on_gpu(pytest.mark.parametrize("what", CHANGES))
def test_change_of_the_net_on_a_gpu(what: str) -> None:
    engine = Engine(tiny().cuda())
    x, = images(2, like=engine.net)
    engine.warm(x)
    change(engine.net.cpu(), what)
    engine.net.cuda()
    x, = images(2, like=engine.net)
    for depth in adn.depths(engine.net):
        close(engine(x, depth=depth), expected(engine.net, x, depth))
    assert engine.info()["invalidations"] == 1
    with torch.no_grad():
        engine.net.head.weight.mul_(2)
    close(engine(x), expected(engine.net, x, "super"))
    assert engine.info()["invalidations"] == 1


@on_gpu()
def test_moving_away_and_back() -> None:
    engine = Engine(tiny().cuda())
    for device in ("cuda", "cpu", "cuda"):
        engine.net.to(device)
        x, = images(2, like=engine.net)
        close(engine(x, depth="TFTF"), expected(engine.net, x, "TFTF"))
        with pytest.raises(ValueError, match=f"accepted: .* on {device}"):
            engine(x.to("cpu" if device == "cuda" else "cuda"))


@on_gpu()
def test_within_a_capture_of_the_user_on_a_gpu() -> None:
    engine = Engine(tiny().cuda())
    x, = images(2, like=engine.net)
    engine.warm(x, depths=["TFFF"])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = engine(x, depth="TFFF") * 2
        with pytest.raises(RuntimeError, match=r"call engine.warm\(x\) before"):
            engine(x, depth="TTTT")
    engine.reset()
    x.neg_()
    graph.replay()
    close(result, expected(engine.net, x, "TFFF") * 2)


@on_gpu()
def test_what_cannot_be_captured() -> None:
    class Asks(Tiny):
        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            return y if y.sum().item() > 0 else -y

    x, = images(2, like=tiny().cuda())
    before = torch.cuda.current_stream()
    with pytest.raises(RuntimeError, match="cannot be captured in a CUDA graph"):
        Engine(tiny(Asks).cuda())(x)
    assert torch.cuda.current_stream() == before
    engine = Engine(tiny().cuda())
    close(engine(x), expected(engine.net, x, "super"))


@on_gpu()
def test_profile_on_a_gpu() -> None:
    engine = real()
    result = engine.profile(images(8, size=64, like=engine.net)[0], rounds=5)
    assert len(result) == 16
    assert engine.set_budget(ms=1e6) == adn.Depth("FFFF")


@on_gpu(pytest.mark.parametrize("max_graphs", [15, 64], ids=["segments", "whole"]))
def test_fused_net_on_a_gpu(max_graphs: int) -> None:
    source = adn.convert(build("resnet18", num_classes=5)).cuda()
    follows_its_source(source, torch.randn(2, 3, 64, 64, device="cuda"), max_graphs=max_graphs)
