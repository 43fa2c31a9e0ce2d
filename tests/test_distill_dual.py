"""Super-net and base-net in one forward: equal to two passes in losses, gradients, statistics and counts."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import build, few
from test_convert import MODELS, OWN_SIZE, SIZED
from torch import nn
from torch.utils.checkpoint import checkpoint

import adn
from adn.core.behaviours import SharedNorm, halves
from adn.core.state import super_and_base
from adn.runtime.accelerate import accelerate, use_kernels
from adn_kernels import ops

# Nets of every family, with stochastic depth where they have it.
NETS = {
    "resnet18": {}, "resnet26d": {"drop_path_rate": 0.3}, "resnetv2_18d": {}, "mobilenetv2_050": {},
    "mobilenetv3_small_075": {"drop_path_rate": 0.3}, "tv_mobilenet_v3_small": {"dropout": 0.0},
    "tv_efficientnet_b0": {"dropout": 0.0}, "vit_tiny_patch16_224": {"drop_path_rate": 0.3, "depth": 6},
    "deit_tiny_distilled_patch16_224": {"depth": 6},
    "swin_tiny_patch4_window7_224": {"drop_path_rate": 0.3, "embed_dim": 48},
    "swinv2_tiny_window8_256": {"embed_dim": 48}, "convnext_atto": {"drop_path_rate": 0.3}, "convnextv2_atto": {},
    "regnetx_002": {}, "tv_regnet_y_400mf": {},
}
IN_CI = ("resnet18", "tv_mobilenet_v3_small", "regnetx_002")
OTHERS = [name for names in MODELS.values() for name in names if name not in (*NETS, *OWN_SIZE)]
NOT_AT_ONCE = ("pvt_v2_b0", "twins_svt_small")  # they read the size of the batch before the two part


def a_net(name: str = "resnet18", **kwargs: object) -> nn.Module:
    if name == "resnet18":
        kwargs["channels"] = (16, 32, 48, 64)
    elif name.startswith("tv_vit"):
        kwargs["image_size"] = 64
    elif name.startswith(SIZED) and not name.startswith("tv_"):
        kwargs["img_size"] = 64
    return adn.convert(build(name, num_classes=10, **kwargs)).double().train()


def a_batch(step: int = 0, n: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(step)
    return torch.randn(n, 3, 64, 64, generator=g).double(), torch.randint(0, 10, (n,), generator=g)


def train(net: nn.Module, single_pass: bool, steps: int = 2, **settings: object) -> list[dict[str, torch.Tensor]]:
    """Losses of some steps."""
    kd = adn.SelfDistillation(net, single_pass=single_pass, **settings)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
    torch.manual_seed(3)
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        losses.append(kd(*a_batch(step)))
        losses[-1]["loss"].backward()
        optimizer.step()
    return losses


def assert_close(name: str, got: torch.Tensor, expected: torch.Tensor, rtol: float, atol: float) -> None:
    torch.testing.assert_close(got, expected, rtol=rtol, atol=atol, msg=lambda message: f"{name}: {message}")


def assert_same(two: nn.Module, one: nn.Module, rtol: float = 1e-9) -> None:
    """Gradients, parameters, statistics, counters."""
    # Those that are zero but for rounding (of a bias before a batch norm) are known to a part of the largest.
    scale = max(p.grad.abs().max().item() for p in two.parameters() if p.grad is not None)
    for (name, p), q in zip(two.named_parameters(), one.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        if p.grad is not None:
            assert_close(name, q.grad, p.grad, rtol, rtol / 10 * scale)
        assert_close(name, q, p, rtol, rtol / 100)
    for (name, p), q in zip(two.named_buffers(), one.buffers(), strict=True):
        if p.is_floating_point():
            assert_close(name, q, p, rtol, rtol / 100)
        else:
            assert torch.equal(q, p), name


def compare(net: nn.Module, rtol: float = 1e-9, **settings: object) -> tuple[nn.Module, nn.Module]:
    """The net trained by two passes, a copy by one."""
    two, one = net, copy.deepcopy(net)
    expected, got = train(two, False, **settings), train(one, True, **settings)
    for a, b in zip(expected, got, strict=True):
        assert list(a) == list(b)
        for key, value in a.items():
            assert_close(key, b[key], value, rtol, rtol / 100)
    assert_same(two, one, rtol)
    return two, one


@pytest.mark.parametrize("name", few(NETS, lambda name: "drop_path_rate" in NETS[name] or name in IN_CI))
def test_equals_two_passes(name: str) -> None:
    net = a_net(name, **NETS[name])
    drops = [m for m in net.modules() if type(m).__name__.endswith(("DropPath", "StochasticDepth"))]
    assert drops or "drop_path_rate" not in NETS[name]
    compare(net, features="all")


@pytest.mark.full
@pytest.mark.parametrize("name", OTHERS)
def test_every_model_equals_two_passes(name: str) -> None:
    net = a_net(name)
    if name in NOT_AT_ONCE:
        with pytest.raises(ValueError, match="cannot run super-net and base-net in one forward"):
            adn.SelfDistillation(net, single_pass=True)
        return
    for module in net.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    compare(net, 1e-6 if "evos" in name else 1e-9, features="all")  # EvoNorm computes variances in float32


@pytest.mark.parametrize("settings", [
    {}, {"variant": "eq8"}, {"variant": "labels"}, {"features": ["layer3", "layer1"], "alpha": 0.3, "temperature": 2.0,
                                                    "top_classes": 4},
], ids=str)
def test_settings(settings: dict) -> None:
    compare(a_net(), **settings)


def of_norms(change: Callable[[nn.Module], None]) -> Callable[[nn.Module], None]:
    def apply(net: nn.Module) -> None:
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                change(module)

    return apply


def untracked(norm: nn.Module) -> None:
    norm.track_running_stats = False
    norm.running_mean = norm.running_var = norm.num_batches_tracked = None


@pytest.mark.parametrize("change", [
    of_norms(lambda norm: setattr(norm, "momentum", None)), of_norms(lambda norm: norm.eval()),
    lambda net: net.eval(), lambda net: net.bn1.eval(), lambda net: net.layer2[0].downsample[1].eval(),
    lambda net: net.layer1[1].eval(), adn.freeze_batch_norm, of_norms(lambda norm: setattr(norm, "momentum", 0.3)),
], ids=["cumulative average", "all norms fixed", "eval", "stem fixed", "shortcut fixed", "block fixed", "frozen",
        "other momentum"])
def test_modes_of_norms(change: Callable) -> None:
    net = a_net()
    change(net)
    compare(net)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_norms_without_running_statistics(training: bool) -> None:
    model = build("resnet18", num_classes=10, channels=(16, 32, 48, 64)).double()
    of_norms(untracked)(model)
    compare(adn.convert(model).train(training))


def test_counts_are_the_references() -> None:
    net = a_net()
    x, y = a_batch()
    adn.set_depth(net, "TFFF")
    adn.SelfDistillation(net, single_pass=True)(x, y)
    assert str(adn.get_depth(net)) == "TFFF"
    assert net.bn1.num_batches_tracked == 2
    assert net.layer2[0].downsample[1].num_batches_tracked == 2
    assert net.layer1[0].bn1.num_batches_tracked == 1
    assert net.layer1[0].bn1.skip.num_batches_tracked == 1
    assert net.layer1[1].bn1.num_batches_tracked == 1


def test_what_comes_before_runs_once_and_refinement_on_one_half() -> None:
    net = a_net()
    seen: dict[str, list[int]] = {}
    for name in ("conv1", "layer1.0", "layer1.0.conv1", "layer1.1", "layer1.1.conv1", "layer3.0.downsample.1", "fc"):
        net.get_submodule(name).register_forward_hook(
            lambda _m, _a, out, name=name: seen.setdefault(name, []).append(len(out)))
    adn.SelfDistillation(net, single_pass=True)(*a_batch())
    assert seen == {"conv1": [3], "layer1.0": [6], "layer1.0.conv1": [6], "layer1.1": [3], "layer1.1.conv1": [3],
                    "layer3.0.downsample.1": [6], "fc": [6]}


def test_a_switched_stem_parts_the_two() -> None:
    """MobileNetV2's first norm belongs to the first flag: the convolution before it runs once."""
    net = a_net("mobilenetv2_050")
    seen = []
    for name in ("conv_stem", "bn1"):
        net.get_submodule(name).register_forward_hook(lambda _m, _a, out: seen.append(len(out)))
    adn.SelfDistillation(net, single_pass=True)(*a_batch())
    assert seen == [3, 6]


@pytest.mark.parametrize("n", [1, 2, 5])
def test_batch_sizes(n: int) -> None:
    two = a_net("vit_tiny_patch16_224", depth=6)
    one = copy.deepcopy(two)
    for net, single_pass in ((two, False), (one, True)):
        adn.SelfDistillation(net, single_pass=single_pass)(*a_batch(n=n))["loss"].backward()
    assert_same(two, one)


def test_one_value_per_channel_is_refused_as_in_two_passes() -> None:
    kd = adn.SelfDistillation(a_net(), single_pass=True)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        kd(torch.randn(1, 3, 32, 32).double(), torch.tensor([1]))
    assert str(adn.get_depth(kd.net)) == "FFFF"
    assert kd.net(a_batch()[0]).shape == (3, 10)


def test_backward_and_scaler() -> None:
    two, one = a_net(), a_net()
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    expected = adn.SelfDistillation(two, features="all").backward(*a_batch(), scaler)
    got = adn.SelfDistillation(one, features="all", single_pass=True).backward(*a_batch(), scaler)
    for key, value in expected.items():
        torch.testing.assert_close(got[key], value)
        assert not got[key].requires_grad
    assert_same(two, one)


@pytest.mark.parametrize("name", few(["resnet18", "swin_tiny_patch4_window7_224"], lambda name: name == "resnet18"))
def test_autocast(name: str) -> None:
    two = a_net(name).float()
    one = copy.deepcopy(two)
    x, y = a_batch()
    losses = []
    for net, single_pass in ((two, False), (one, True)):
        torch.manual_seed(3)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            losses.append(adn.SelfDistillation(net, features="all", single_pass=single_pass)(x.float(), y))
        losses[-1]["loss"].backward()
    for key, value in losses[0].items():
        torch.testing.assert_close(losses[1][key], value, rtol=0.02, atol=0.02)
    for p, q in zip(two.parameters(), one.parameters(), strict=True):
        assert F.cosine_similarity(p.grad.flatten(), q.grad.flatten(), dim=0) > 0.98 or p.grad.norm() < 1e-2


@pytest.fixture
def reentrant(request: pytest.FixtureRequest):
    before = timm.layers.use_reentrant_ckpt()
    timm.layers.set_reentrant_ckpt(request.param)
    yield request.param
    timm.layers.set_reentrant_ckpt(before)


@pytest.mark.parametrize("reentrant", [False, True], indirect=True, ids=["saved_tensors", "reentrant"])
@pytest.mark.parametrize("name", few(["resnet18", "mobilenetv2_050", "swin_tiny_patch4_window7_224"],
                                     lambda name: name != "mobilenetv2_050"))
def test_gradient_checkpointing(name: str, reentrant: bool) -> None:
    """A forward of both, then others with another depth and batch size, before all are recomputed."""
    two = a_net(name, **({"embed_dim": 48} if "swin" in name else {}))
    one = copy.deepcopy(two)
    one.set_grad_checkpointing(True)
    for net, single_pass in ((two, False), (one, True)):
        torch.manual_seed(3)
        kd = adn.SelfDistillation(net, single_pass=single_pass)
        x, y = a_batch()
        losses = [kd(x.requires_grad_(), y)["loss"], kd(a_batch(1, n=6)[0].requires_grad_(), y.repeat(2))["loss"]]
        adn.set_depth(net, "base")
        losses.append(net(x).square().mean())
        adn.set_depth(net, "super")
        sum(losses).backward()
    assert_same(two, one)


def test_a_checkpoint_around_the_whole_net() -> None:
    two = a_net()
    one = copy.deepcopy(two)
    forward = one.forward
    one.forward = lambda x: checkpoint(forward, x, use_reentrant=False)
    for net, single_pass in ((two, False), (one, True)):
        adn.SelfDistillation(net, single_pass=single_pass).backward(*a_batch())
    assert_same(two, one)


def test_copies_are_independent() -> None:
    net = a_net()
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        with adn.core.state.super_and_base(net, 3):
            assert other(a_batch()[0]).shape == (3, 10)
        assert net(a_batch()[0]).shape == (3, 10)
        compare(other)


class Plain(nn.Module):
    """Stages with and without a flag, norms of both nets before, between and after, and ones of other kinds."""

    def __init__(self, norm: type[nn.Module] = nn.BatchNorm2d) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2), norm(8), nn.ReLU())
        self.single = nn.Sequential(Block(8))
        self.first = nn.Sequential(*(Block(8) for _ in range(3)))
        self.between = nn.Sequential(Block(8))
        self.second = nn.Sequential(*(Block(8) for _ in range(2)))
        self.end = nn.InstanceNorm2d(8, affine=True, track_running_stats=True)
        self.last = norm(8)
        self.head = nn.Sequential(nn.Linear(8, 10), nn.BatchNorm1d(10))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for stage in (self.single, self.first, self.between, self.second):
            for block in stage:
                x = block(x=x)
        return self.head(self.last(self.end(x)).relu().mean((2, 3)))


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.norm(self.conv(x)).relu()


def test_a_plan_by_hand() -> None:
    torch.manual_seed(0)
    net = adn.convert(Plain(), plan=["single", "first", "between", "second"]).double().train()
    two, _ = compare(net, features="all")
    assert two.stem[1].num_batches_tracked == two.between[0].norm.num_batches_tracked == 4
    assert two.single[0].norm.num_batches_tracked == two.head[1].num_batches_tracked == 4
    assert two.first[2].norm.num_batches_tracked == two.first[0].norm.num_batches_tracked == 2


@pytest.mark.parametrize("kind", ["B0", "B1", "B2"])
def test_other_norms_with_statistics_of_the_batch(kind: str) -> None:
    torch.manual_seed(0)
    net = adn.convert(Plain(getattr(timm.layers, f"EvoNorm2d{kind}")), plan=["first", "second"]).double().train()
    compare(net, rtol=1e-5)  # they compute variances in float32


def test_without_switched_norms() -> None:
    """The two part where the first refinement block is bypassed."""
    torch.manual_seed(0)
    plan = [adn.StagePlan(name, [f"{name}.{i}" for i in range(n)], norms=[])
            for name, n in (("first", 3), ("second", 2))]
    net = adn.convert(Plain(), plan=plan).double().train()
    two, _ = compare(net, features="all")
    assert two.first[0].norm.num_batches_tracked == 4


def test_a_norm_added_after_conversion_is_refused() -> None:
    net = a_net()
    kd = adn.SelfDistillation(net, single_pass=True)
    net.fc = nn.Sequential(nn.Linear(64, 10), nn.BatchNorm1d(10)).double()
    with pytest.raises(ValueError, match=r"BatchNorm1d 'fc.1'.*before adn.convert"):
        adn.SelfDistillation(net, single_pass=True)
    with pytest.raises(RuntimeError, match=r"BatchNorm1d 'fc.1'.*before adn.convert"):
        kd(*a_batch())
    adn.SelfDistillation(net)(*a_batch())


def test_samples_elsewhere_are_refused() -> None:
    class SequenceFirst(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.Sequential(*(Block(3) for _ in range(2)))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.blocks(x.transpose(0, 2)).transpose(0, 2).mean((2, 3))

    net = adn.convert(SequenceFirst(), plan=["blocks"])
    with pytest.raises(ValueError, match=r"SequenceFirst cannot run .* first dimension is not theirs"):
        adn.SelfDistillation(net, single_pass=True)
    adn.SelfDistillation(net)(torch.randn(3, 3, 8, 8), torch.tensor([0, 1, 2]))


@pytest.mark.parametrize("pool", [True, False], ids=["seen", "unseen"])
def test_a_batch_size_read_before_the_two_part_is_refused(pool: bool) -> None:
    """Both nets' pixels would silently become one sample's. Without a module that sees it, the logits tell."""
    class Late(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(Block(3) for _ in range(2))
            self.pool = nn.AdaptiveAvgPool2d(1) if pool else None

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            b, w = x.shape[0], x.shape[-1]
            for block in self.blocks:
                x = block(x)
            x = x.reshape(b, 3, -1, w)
            return self.pool(x).flatten(1) if pool else x.mean((2, 3))

    net = adn.convert(Late(), plan=["blocks"])
    if pool:
        with pytest.raises(ValueError, match=r"'pool' computes \(5, 3, 448, 224\) for both and \(5, 3, 224, 224\)"):
            adn.SelfDistillation(net, single_pass=True)
    else:
        with pytest.raises(RuntimeError, match="3 samples ran at once, but there are logits of 3"):
            adn.SelfDistillation(net, single_pass=True)(torch.randn(3, 3, 8, 8), torch.tensor([0, 1, 2]))


@pytest.mark.parametrize("name", ["pvt_v2_b0", "hrnet_w18_small"])
def test_models_whose_nets_do_not_stay_apart_are_refused(name: str) -> None:
    """One reads the size of the batch before the two part; in the other, one of parallel branches parts first."""
    net = adn.convert(build(name, num_classes=10))
    with pytest.raises(ValueError, match="cannot run super-net and base-net in one forward") as refused:
        adn.SelfDistillation(net, single_pass=True)
    assert str(refused.value).count("single_pass=False") == 1


def test_halves() -> None:
    x = torch.arange(6)
    a, b = halves(x, 6)
    assert a is b is x
    a, b = halves(x, 3)
    assert (a.tolist(), b.tolist()) == ([0, 1, 2], [3, 4, 5])
    with pytest.raises(RuntimeError, match="4 samples"):
        halves(x, 4)


def test_norms_of_both() -> None:
    """Stem and shortcuts; not those of refinement blocks, which see the super-net's half only."""
    net = a_net()
    shared = [name for name, module in net.named_modules() if isinstance(module, SharedNorm)]
    assert shared == ["bn1", "layer1.0.downsample.1", "layer2.0.downsample.1", "layer3.0.downsample.1",
                      "layer4.0.downsample.1"]
    assert not any(isinstance(module, SharedNorm) for module in adn.extract(net).modules())


@pytest.mark.parametrize("name", few(
    ["resnet18", "mobilenetv2_050", "convnext_atto", "vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"],
    ["mobilenetv2_050", "convnext_atto"].__contains__))
def test_accelerated(name: str) -> None:
    two = a_net(name, **NETS[name])
    one = accelerate(copy.deepcopy(two))
    expected = train(two, False, features="all")
    with use_kernels(True):
        got = train(one, True, features="all")
    for a, b in zip(expected, got, strict=True):
        for key, value in a.items():
            assert_close(key, b[key], value, 1e-8, 1e-10)
    assert_same(two, one, 1e-8)


def test_accelerated_norms_take_both_halves_in_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, bool]] = []
    op = ops.batch_norm
    monkeypatch.setattr(ops, "batch_norm", lambda x, *args, groups, bank, **kwargs: (
        calls.append((groups, bank is not None)), op(x, *args, groups=groups, bank=bank, **kwargs))[1])
    net = accelerate(a_net())
    with use_kernels(True):
        adn.SelfDistillation(net, single_pass=True)(*a_batch())
    # Of each stage's two blocks, each with two norms; four shortcuts. The stem moves its statistics twice by itself.
    assert sorted(calls) == sorted(4 * [(2, True)] * 2 + 4 * [(1, False)] * 2 + 4 * [(2, False)])


@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224"])
@pytest.mark.full  # of losses and gradients of a step, `test_compile.py` compares as much
def test_compiled(name: str) -> None:
    """Every region once, and once more when it is seen that batches vary in size."""
    torch.compiler.reset()
    two = a_net(name, **({"depth": 6} if "vit" in name else {}))
    one = copy.deepcopy(two)
    one.compile(backend="aot_eager")
    for step, (n, known) in enumerate([(3, False), (3, True), (5, False), (4, True)]):
        two.zero_grad()
        one.zero_grad()
        adn.SelfDistillation(two, features="all").backward(*a_batch(step, n))
        with torch.compiler.set_stance("fail_on_recompile" if known else "default"):
            adn.SelfDistillation(one, features="all", single_pass=True).backward(*a_batch(step, n))
        assert_same(two, one)


def test_a_copy_made_meanwhile_is_a_net_like_others() -> None:
    net = adn.convert(build("resnet18", num_classes=5))
    with super_and_base(net, 2):
        copied = copy.deepcopy(net)
    assert copied(torch.randn(2, 3, 32, 32)).shape == (2, 5)
