"""Compiled nets: every depth equal to eager, nothing compiled by a change of depth, nothing silently uncompiled."""

from __future__ import annotations

import copy
import io
import itertools
import pickle
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torch.utils.checkpoint
from compilations import Counts, count
from conftest import build, few, randomise
from torch import nn
from torch.compiler import set_stance
from torch.nn.parallel import DistributedDataParallel as DDP

import adn
from adn.core import taps
from adn.runtime.compile import compile

Way = Callable[..., nn.Module]
WAYS: dict[str, Way] = {"adn": compile, "torch": torch.compile}


@pytest.fixture(autouse=True)
def nothing_compiled() -> Iterator[None]:
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=8):  # timm.optim raises it
        yield
    torch._dynamo.reset()


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + F.relu(self.norm(self.conv(x)))


class Loop(nn.Module):
    """A net that calls the blocks of both of its stages in a loop of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 2)
        self.blocks = nn.ModuleList(Block(8) for _ in range(6))
        self.head = nn.Linear(8, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((2, 3)))


def loop() -> nn.Module:
    torch.manual_seed(0)
    plan = [adn.StagePlan(f"half{i}", [f"blocks.{3 * i + k}" for k in range(3)]) for i in range(2)]
    return adn.convert(randomise(Loop()).eval(), plan=plan)


def in_turn() -> nn.Module:
    """The same net of containers only; the root is one too."""
    torch.manual_seed(0)
    stages = [nn.Sequential(*(Block(8) for _ in range(3))) for _ in range(2)]
    model = nn.Sequential(nn.Conv2d(3, 8, 3, 2), *stages, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))
    return adn.convert(randomise(model).eval(), plan=["1", "2"])


def one_stage() -> nn.Module:
    """For images (n, 4, h, w)."""
    torch.manual_seed(0)
    blocks = nn.Sequential(Block(4), Block(4))
    return adn.convert(randomise(nn.Sequential(blocks, nn.Flatten())).eval(), plan=["0"])


def a_net(name: str) -> nn.Module:
    if name in ("loop", "in_turn"):
        return {"loop": loop, "in_turn": in_turn}[name]()
    kwargs = {"num_classes": 10}
    if name.startswith("swin"):
        kwargs |= {"img_size": 64, "embed_dim": 24, "depths": (2, 2, 2, 2), "num_heads": (1, 2, 2, 2)}
    elif name.startswith("vit"):
        kwargs |= {"img_size": 32, "embed_dim": 48}
    elif name.startswith("tv_vit"):
        kwargs |= {"image_size": 64}
    elif name == "tv_mobilenet_v2":
        kwargs |= {"width_mult": 0.25}
    return adn.convert(build(name, **kwargs))


def images(name: str, n: int = 2, dtype: torch.dtype = torch.float) -> torch.Tensor:
    size = 64 if name.startswith(("swin", "tv_vit")) else 32
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(1), dtype=dtype)


def outputs(net: nn.Module, x: torch.Tensor) -> dict[adn.Depth, torch.Tensor]:
    result = {}
    for depth in adn.depths(net):
        with adn.at_depth(net, depth):
            result[depth] = net(x)
    return result


def assert_same(found: dict, expected: dict, tolerance: float = 1e-5) -> None:
    assert len({y.detach().numpy().tobytes() for y in expected.values()}) == len(expected)
    for depth, y in expected.items():
        torch.testing.assert_close(found[depth], y, rtol=tolerance, atol=tolerance, msg=lambda m, d=depth: f"{d}: {m}")


# Regions: two paths of each stage with a flag; one of others in a container; two of each norm outside that follows a
# flag, or of a run of blocks that does.
SWEEPS = {
    "resnet18": (16, 8),
    "tv_resnet18": (16, 8),
    "mobilenetv2_050": (32, 10 + 2 * 4),  # stem's norm, first block, last block, last norm
    "tv_mobilenet_v2": (32, 10 + 2),  # what comes before the first stage joins it, what comes after the last does not
    "vit_tiny_patch16_224": (16, 8),
    "tv_vit_b_32": (16, 8),
    "swin_tiny_patch4_window7_224": (16, 8 + 2 * 3),  # mergings
    "convnext_atto": (16, 8 + 2 * 3),
    "regnetx_002": (4, 4 + 2),
    "in_turn": (4, 4 + 2),
    "loop": (4, 2 * (2 * 2 + 1)),  # block by block; a bypassed one needs none
}


# Both ways for small nets, one for the others.
SMALL = ("in_turn", "loop")
IN_CI = {(name, way) for name in SMALL for way in WAYS} | {
    ("vit_tiny_patch16_224", "adn")}


@pytest.mark.parametrize(("name", "way"), few(itertools.product(SWEEPS, WAYS), IN_CI.__contains__))
def test_sweep(name: str, way: str) -> None:
    net, x = a_net(name), images(name)
    with torch.no_grad():
        expected = outputs(net, x)
        compiled = WAYS[way](net, backend="eager")
        counts = count(compiled, x)
        depths, regions = SWEEPS[name]
        assert (counts.depths, counts.regions, counts.recompiles) == (depths, regions, 0)
        if name == "loop":  # code with a loop that is cut runs uncompiled: stem, pooling and head do
            assert counts.given_up == ("forward",) or counts.given_up[0].startswith("forward_")
            assert set(counts.uncompiled) == set(map(str, adn.depths(net)))
            assert len(set(counts.uncompiled.values())) == 1, "no block is among it"
        else:
            assert counts.given_up == ()
            assert counts.uncompiled == {}
        with set_stance("fail_on_recompile"):
            assert_same(outputs(compiled, x), expected)
    assert adn.get_depth(net) == adn.Depth([False] * len(adn.stages(net)))


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("name", few(["in_turn", "loop", "resnet18", "tv_mobilenet_v2"], SMALL.__contains__))
def test_training(name: str, way: Way) -> None:
    """Outputs, gradients and running statistics, at each depth."""
    eager = a_net(name).double().train()
    if name == "tv_mobilenet_v2":
        eager.classifier[0].p = 0.0
    net = copy.deepcopy(eager)
    x = images(name, 4, torch.double)
    compiled = way(net, backend="aot_eager")
    depths = adn.depths(net)
    depths = depths if len(depths) <= 16 else depths[::3]
    for sweep in range(2):
        with set_stance("fail_on_recompile" if sweep else "default"):
            for depth in depths:
                for each in (eager, compiled):
                    each.zero_grad()
                    with adn.at_depth(each, depth):
                        F.mse_loss(each(x), torch.ones(4, 10).double()).backward()
                for (key, p), q in zip(eager.named_parameters(), net.parameters(), strict=True):
                    assert (p.grad is None) == (q.grad is None), (depth, key)
                    if p.grad is not None:
                        torch.testing.assert_close(q.grad, p.grad, rtol=1e-8, atol=1e-10, msg=f"{depth} {key}")
                for (key, p), q in zip(eager.named_buffers(), net.buffers(), strict=True):
                    torch.testing.assert_close(q, p, rtol=1e-8, atol=1e-10, msg=f"{depth} {key}")


@pytest.mark.full
def test_what_naive_compilation_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flags read inside compiled code: half of the depths run uncompiled, and a check for recompiles passes."""
    monkeypatch.setattr(sys.modules["adn.convert"], "install", lambda *_: None)
    net = a_net("resnet18")
    with torch.no_grad():
        counts = count(torch.compile(net, backend="eager"), images("resnet18"))
    assert (counts.regions, counts.frames, counts.recompiles) == (0, 8, 0)
    assert len(counts.uncompiled) == 8


@pytest.mark.full
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_nets_of_one_class_in_every_mode(way: Way) -> None:
    """Three nets of each, in training and in evaluation with and without gradients: no limit is shared."""
    x = images("in_turn")
    counts: list[Counts] = []
    for name in ("in_turn",) * 3 + ("loop",) * 2:
        net = way(a_net(name), backend="eager")
        for training, context in ((True, torch.enable_grad), (True, torch.no_grad), (False, torch.enable_grad),
                                  (False, torch.no_grad), (False, torch.inference_mode)):
            net.train(training)
            with context():
                counts.append(count(net, x, ["super", "base"]))
        if name != "loop":
            assert all(c.uncompiled == {} and c.given_up == () for c in counts), name
        assert all(c.recompiles == 0 for c in counts)
        assert all(c.regions >= 4 for c in counts[-5:]), "each mode compiles the paths, for itself"


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("name", few(["in_turn", "resnet18", "swin_tiny_patch4_window7_224"], SMALL.__contains__))
def test_another_batch_size_compiles_once_more(name: str, way: Way) -> None:
    net = way(a_net(name), backend="eager")
    with torch.no_grad():
        counts = [count(net, images(name, n), ["super", "base"]) for n in (4, 6, 3, 9, 1, 2)]
        # 1 is compiled by itself; no depth is a reason to.
        assert [c.regions > 0 for c in counts] == [True, True, False, False, True, False]
        assert all(c.uncompiled == {} and c.recompiles == 0 for c in counts)
        found = outputs(net, images(name, 5))
        torch._dynamo.reset()
        assert_same(found, outputs(a_net(name), images(name, 5)))


class TestBatchSizes:
    def test_in_evaluation_no_other_size_is_compiled(self) -> None:
        net = a_net("in_turn")
        sizes: list[int] = []

        def backend(graph: torch.fx.GraphModule, inputs: list) -> Callable:
            sizes.extend(t.shape[0] for t in inputs if t.ndim == 4 and t.shape[1:] == (3, 32, 32))
            return graph.forward

        x = images("in_turn", 19).to(memory_format=torch.channels_last)
        expected = outputs(net, x)
        assert compile(net, batch_sizes=(8, 1, 4), backend=backend) is net
        with torch.no_grad():
            for n in (8, 1, 4):
                net(x[:n])
            for n in (1, 2, 4, 5, 7, 8, 9, 16, 19):
                found = outputs(net, x[:n])
                assert_same(found, {depth: y[:n] for depth, y in expected.items()})
        assert set(sizes) == {1, 4, 8}
        assert count_of(net, x[:3]) == 0

    def test_training_is_not_padded(self) -> None:
        net, x = a_net("in_turn").train(), images("in_turn", 3)
        eager = copy.deepcopy(net)
        compile(net, batch_sizes=(4,), backend="eager")
        torch.testing.assert_close(net(x), eager(x))
        for a, b in zip(net.buffers(), eager.buffers(), strict=True):
            torch.testing.assert_close(a, b)

    def test_every_output_is_cut(self) -> None:
        net = adn.convert(build("resnet18", features_only=True))
        x = images("resnet18", 5)
        with torch.no_grad():
            expected = net(x)
            compile(net, batch_sizes=(2, 4), backend="eager")
            found = net(x)
        assert isinstance(found, list)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("single_pass", [False, True])
    @pytest.mark.parametrize("batch", [2, 4, 7])
    def test_distillation_loss_of_a_batch_of_another_size(self, single_pass: bool, batch: int) -> None:
        """Nothing of a padded batch is taken for the base-net's half, or pooled with the images' features."""
        plain, net = a_net("in_turn"), compile(a_net("in_turn"), batch_sizes=(4,), backend="eager")
        x, y = images("in_turn", batch), torch.arange(batch) % 10
        with torch.no_grad():
            expected, found = (adn.SelfDistillation(m, features="all", single_pass=single_pass)(x, y)
                               for m in (plain, net))
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5, msg=name)

    @pytest.mark.parametrize("sizes", [(), (0,), (2.0,), (-1, 2), (1, 2, 3, 4, 5)])
    def test_bad_sizes(self, sizes: tuple) -> None:
        with pytest.raises(ValueError, match="batch"):
            compile(a_net("in_turn"), batch_sizes=sizes, backend="eager")

    def test_samples_that_influence_each_other(self) -> None:
        net = a_net("in_turn")
        norm = net[1][2].norm
        norm.running_mean = norm.running_var = None
        with pytest.raises(ValueError, match=r"1\.2\.norm"):
            compile(net, batch_sizes=(4,), backend="eager")


def count_of(net: nn.Module, x: torch.Tensor) -> int:
    with torch.no_grad():
        counts = count(net, x)
    return counts.regions + counts.frames + counts.recompiles


def test_every_mode_is_code_of_its_own() -> None:
    """More modes of one net than torch.compile keeps variants of a piece of code."""
    net = compile(one_stage(), backend="eager")
    contexts = [torch.enable_grad, torch.no_grad, torch.inference_mode]
    for training, context, amp in itertools.product((True, False), contexts, (False, True)):
        net.train(training)
        with context(), torch.autocast("cpu", enabled=amp):
            for depth in ("super", "base"):
                with adn.at_depth(net, depth):
                    net(torch.randn(2, 4, 6, 6))


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_what_is_not_compiled_inside_of_what_is_shows(way: Way) -> None:
    net = a_net("in_turn")
    options = {"fullgraph": False} if way is compile else {}
    for block in (net[1][0], net[2][2]):
        block.forward = torch.compiler.disable(block.forward)
    with torch.no_grad():
        counts = count(way(net, backend="eager", **options), images("in_turn"))
    assert counts.given_up
    assert set(counts.uncompiled) == {"FF", "TF"}, "where the block that is the last of its path runs"


def test_profile_of_a_compiled_net() -> None:
    net, x = a_net("resnet18"), images("resnet18")
    expected = [(p.macs, p.params) for p in adn.profile(net, x, rounds=1, warmup=0)]
    compile(net, backend="eager")
    assert [(p.macs, p.params) for p in adn.profile(net, x, rounds=1, warmup=0)] == expected


class TestTheNetStaysTheNet:
    def test_same_object_names_and_class(self) -> None:
        net = a_net("resnet18")
        names = list(net.state_dict())
        assert compile(net, backend="eager") is net
        assert list(net.state_dict()) == names
        assert isinstance(net, timm.models.resnet.ResNet)
        assert type(net).__name__ == "ResNet"

    def test_weights_may_change(self) -> None:
        net, x = a_net("in_turn"), images("in_turn")
        other = randomise(copy.deepcopy(net), seed=3)
        compile(net, backend="aot_eager")
        with torch.no_grad():
            outputs(net, x)
            net.load_state_dict(other.state_dict())
            with set_stance("fail_on_recompile"):
                assert_same(outputs(net, x), outputs(other, x))

    @pytest.mark.parametrize("name", few(["in_turn", "loop", "regnetx_002"], lambda name: name == "in_turn"))
    def test_copies_are_plain_and_independent(self, name: str) -> None:
        net, x = a_net(name), images(name)
        compile(net, backend="eager")
        with torch.no_grad():
            expected = outputs(net, x)
            buffer = io.BytesIO()
            torch.save(net, buffer)
            buffer.seek(0)
            for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net)),
                          torch.load(buffer, weights_only=False)):
                assert_same(outputs(other, x), expected)
                compile(other, backend="eager")
                assert count(other, x).regions == SWEEPS[name][1], "regions of its own"
                for p in other.parameters():
                    p.zero_()
                with set_stance("fail_on_recompile"):
                    assert_same(outputs(net, x), expected)

    def test_save_and_load(self, tmp_path: Path) -> None:
        net = compile(adn.create_model("anydepth_resnet18", num_classes=10).eval(), backend="eager")
        x = images("resnet18")
        with torch.no_grad(), adn.at_depth(net, "TFTF"):
            expected = net(x)
            adn.save(net, tmp_path / "net.safetensors")
            torch.testing.assert_close(adn.load(tmp_path / "net.safetensors").eval()(x), expected)

    def test_a_block_wrapped_or_replaced_afterwards(self) -> None:
        net, x = a_net("in_turn"), images("in_turn")
        compile(net, backend="eager")
        with torch.no_grad():
            outputs(net, x)
            expected = outputs(copy.deepcopy(net), x)
            seen = []
            net[1][2] = Wrapper(net[1][2], seen)
            net[2][0] = Wrapper(net[2][0], seen)
            assert_same(outputs(net, x), expected)
            assert len(seen) == 2 * 4
            net[2][2] = Block(8).eval()
            with pytest.raises(RuntimeError, match="follows the depth"):
                outputs(net, x)

    def test_extract_and_accelerators_see_plain_modules(self) -> None:
        net, x = a_net("resnet18"), images("resnet18")
        compile(net, backend="eager")
        static = adn.extract(net, "TFFT")
        assert not any("_adn" in key for module in static.modules() for key in vars(module))
        assert type(static) is timm.models.resnet.ResNet
        with torch.no_grad(), adn.at_depth(net, "TFFT"):
            torch.testing.assert_close(static(x), net(x), rtol=1e-5, atol=1e-5)

    def test_a_container_cut_in_two(self) -> None:
        net, x = a_net("in_turn"), torch.randn(2, 8, 5, 5)
        first, rest = net[1][:2], net[1][2:]
        with torch.no_grad():
            for depth in adn.depths(net):
                with adn.at_depth(net, depth):
                    torch.testing.assert_close(rest(first(x)), net[1](x))

    def test_hooks_of_ones_own(self) -> None:
        net, x = compile(a_net("in_turn"), backend="eager"), images("in_turn")
        seen = []
        net[1][1].register_forward_hook(lambda *_: seen.append("block"))
        net[1].register_forward_hook(lambda *_: seen.append("container"))
        net.register_forward_hook(lambda *_: seen.append("net"))
        with torch.no_grad():
            net(x)
        assert seen == ["block", "container", "net"]


class Wrapper(nn.Module):
    def __init__(self, block: nn.Module, seen: list) -> None:
        super().__init__()
        self.block = block
        self.seen = seen

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.append(1)
        return self.block(x)


class TestSelfDistillation:
    @pytest.mark.parametrize("single_pass", [False, True], ids=["two_passes", "single_pass"])
    @pytest.mark.parametrize(("name", "way"), few(
        itertools.product(["resnet18", "in_turn", "loop"], ["adn", "torch", "torch_outside"]),
        [("in_turn", "adn")].__contains__))
    def test_step(self, name: str, way: str, single_pass: bool) -> None:
        """With features of the stages: losses, gradients; nothing compiled from the second step on."""
        x, y = images(name, 4, torch.double), torch.tensor([1, 2, 3, 4])
        eager = adn.SelfDistillation(a_net(name).double().train(), features="all", single_pass=single_pass)
        kd = copy.deepcopy(eager)
        run = kd
        if way == "adn":
            compile(kd.net, backend="aot_eager")
        elif way == "torch":
            kd.net = torch.compile(kd.net, backend="aot_eager")
        else:
            run = torch.compile(kd, backend="aot_eager")
        for step in range(3):
            for each in (eager, kd):
                each.zero_grad()
            with set_stance("fail_on_recompile" if step else "default"):
                found = run(x, y)
                found["loss"].backward()
            expected = eager(x, y)
            expected["loss"].backward()
            for key, value in expected.items():
                torch.testing.assert_close(found[key], value, rtol=1e-8, atol=1e-10, msg=key)
            for (key, p), q in zip(eager.named_parameters(), kd.parameters(), strict=True):
                torch.testing.assert_close(q.grad, p.grad, rtol=1e-8, atol=1e-10, msg=key)
            for (key, p), q in zip(eager.named_buffers(), kd.buffers(), strict=True):
                torch.testing.assert_close(q, p, rtol=1e-8, atol=1e-10, msg=key)

    @pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
    def test_features_of_uncompiled_and_compiled_depths(self, way: Way) -> None:
        """What is handed out is the stage's output, once a forward, at every depth."""
        net, x = a_net("in_turn"), images("in_turn")
        for each in (net, way(copy.deepcopy(net), backend="eager")):
            for depth in adn.depths(net):
                outputs: list[torch.Tensor] = []
                first = adn.stages(each)[0]
                expected = adn.extract(net, depth)
                with torch.no_grad(), adn.at_depth(each, depth), taps.listening(first.end, outputs.append):
                    each(x)
                    torch.testing.assert_close(outputs, [expected[1](expected[0](x))])

    def test_no_output_seen_is_an_error(self) -> None:
        net = a_net("resnet18").train()
        net.set_grad_checkpointing(True)
        kd = adn.SelfDistillation(torch.compile(net, backend="eager"), features="all")
        with pytest.raises(RuntimeError, match=r"no output of stage 'layer1'"):
            kd(images("resnet18"), torch.tensor([1, 2]))

    @pytest.mark.parametrize("outside", ["net", "kd"])
    def test_in_ddp(self, outside: str, tmp_path: Path) -> None:
        dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
        try:
            net = a_net("in_turn").train()
            x, y = images("in_turn", 4), torch.tensor([1, 2, 3, 4])
            expected = adn.SelfDistillation(copy.deepcopy(net), features="all").backward(x, y)
            compile(net, backend="aot_eager")
            if outside == "kd":
                kd = DDP(adn.SelfDistillation(net, features="all"))
                losses = kd(x, y)
                losses["loss"].backward()
            else:
                kd = adn.SelfDistillation(DDP(net, find_unused_parameters=True), features="all")
                losses = kd.backward(x, y)
            torch.testing.assert_close(losses["loss"].detach(), expected["loss"])
            assert all(p.grad is not None for p in net.parameters())
            with set_stance("fail_on_recompile"):
                kd(x, y)
        finally:
            dist.destroy_process_group()


@pytest.mark.parametrize("way", few(WAYS, lambda way: way == "adn"))
def test_gradient_checkpointing_of_the_librarys(way: str) -> None:
    """It walks the blocks by itself, past the container: fewer depths fit, but what runs is right."""
    eager = a_net("resnet18").double().train()
    net = copy.deepcopy(eager)
    net.set_grad_checkpointing(True)
    compiled = WAYS[way](net, backend="aot_eager")
    x = images("resnet18", 2, torch.double)
    for each in (eager, compiled):
        for depth in ("super", "base"):
            with adn.at_depth(each, depth):
                each(x).square().mean().backward()
    for (key, p), q in zip(eager.named_parameters(), net.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-8, atol=1e-10, msg=key)
    for (key, p), q in zip(eager.named_buffers(), net.buffers(), strict=True):
        torch.testing.assert_close(q, p, rtol=1e-8, atol=1e-10, msg=key)


def test_a_checkpoint_around_a_compiled_container() -> None:
    """Recomputed uncompiled, under the depth of its forward, which is not that of now."""
    eager = a_net("in_turn").double().train()
    net = compile(copy.deepcopy(eager), backend="aot_eager")
    x = images("in_turn", 2, torch.double).requires_grad_()
    for each in (eager, net):
        inner = each[1].forward
        if each is net:
            each[1].forward = lambda x, inner=inner: torch.utils.checkpoint.checkpoint(inner, x, use_reentrant=True)
        losses = []
        for depth in ("TF", "FT"):
            with adn.at_depth(each, depth):
                losses.append(each(x).square().mean())
        sum(losses).backward()
    for (key, p), q in zip(eager.named_parameters(), net.named_parameters(), strict=True):
        torch.testing.assert_close(q[1].grad, p.grad, rtol=1e-8, atol=1e-10, msg=key)
    for (key, p), q in zip(eager.named_buffers(), net.buffers(), strict=True):
        torch.testing.assert_close(q, p, rtol=1e-8, atol=1e-10, msg=key)


def test_inductor() -> None:
    net, x = one_stage(), torch.randn(2, 4, 6, 6)
    with torch.no_grad():
        expected = outputs(net, x)
        compile(net)
        counts = count(net, x)
        assert (counts.regions, counts.recompiles, counts.uncompiled) == (3, 0, {})
        with set_stance("fail_on_recompile"):
            assert_same(outputs(net, x), expected, 1e-5)


class TestBadInput:
    def test_no_cpp_compiler(self) -> None:
        from torch._inductor import config

        net, x = a_net("in_turn"), images("in_turn")
        with (config.patch({"cpp.cxx": ("no-such-compiler",)}),
              pytest.raises(RuntimeError, match=r"C\+\+ compiler.*g\+\+.*eager")):
            compile(net)
        with torch.no_grad():
            assert compile(net, backend="eager")(x).shape == (2, 10)

    def test_wrapped_already(self) -> None:
        with pytest.raises(ValueError, match="already"):
            compile(torch.compile(a_net("in_turn"), backend="eager"), backend="eager")

    def test_not_converted(self) -> None:
        with pytest.raises(ValueError, match="not any-depth"):
            compile(nn.Sequential(Block(8)), backend="eager")

    def test_what_cannot_be_compiled_whole(self) -> None:
        net, x = a_net("in_turn"), images("in_turn")
        net[1][0].register_forward_hook(lambda *_: torch._dynamo.graph_break())
        with torch.no_grad():
            expected = outputs(net, x)
            compile(net, backend="eager", fullgraph=False)
            assert_same(outputs(net, x), expected)
            compile(net, backend="eager")
            with pytest.raises(torch._dynamo.exc.Unsupported):
                net(x)
