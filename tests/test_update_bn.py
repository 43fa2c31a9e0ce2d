"""Statistics of both extremes averaged anew, and what other libraries' ways of doing that leave behind."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from conftest import build
from test_calibrate import batches, buffers, changed
from torch import nn
from torch.optim.swa_utils import AveragedModel, update_bn

import adn
from adn.core.behaviours import SkipNorm, behaviours
from adn.runtime.accelerate import use_kernels


@pytest.fixture
def net() -> nn.Module:
    """Statistics that fit no data at all."""
    return adn.convert(build("resnet18", num_classes=5, drop_rate=0.5, drop_path_rate=0.5))


def batch_norms(net: nn.Module) -> dict[str, nn.Module]:
    return {name: m for name, m in net.named_modules() if isinstance(m, nn.BatchNorm2d)}


def test_both_sets_are_those_of_their_extreme(net: nn.Module) -> None:
    """Of norms that only one of the two runs, as `calibrate` to it would find them; of shared ones, the mean of what
    both see."""
    adn.set_depth(net, "TFFT")
    net.layer2.train()
    modes = [m.training for m in net.modules()]
    wanted = {which: adn.calibrate(net, batches(), which) for which in ("super", "base")}
    norms, names = batch_norms(net), [name for name, m in net.named_modules() if isinstance(m, SkipNorm)]
    assert adn.update_bn(net, batches()) is net
    for name, norm in norms.items():
        both = [batch_norms(wanted[which])[name] for which in ("super", "base")]
        if name in names or any(name.startswith(block) for stage in adn.stages(net)
                                for block in stage.plan.refinement_blocks):
            expected, count = both[0].running_mean, 3
        elif name.endswith(".skip"):
            expected, count = both[1].running_mean, 3
        else:
            expected, count = (both[0].running_mean + both[1].running_mean) / 2, 6
        torch.testing.assert_close(norm.running_mean, expected, rtol=1e-4, atol=1e-5, msg=name)
        assert norm.num_batches_tracked == count, name
        assert norm.momentum == 0.1
    assert str(adn.get_depth(net)) == "TFFT"
    assert [m.training for m in net.modules()] == modes


def test_weights_do_not_move(net: nn.Module) -> None:
    before = buffers(net)
    adn.update_bn(net, batches())
    assert all("running_" in name or "num_batches" in name for name in changed(before, net))


def test_images_alone_are_batches_too(net: nn.Module) -> None:
    other = copy.deepcopy(net)
    adn.update_bn(net, batches())
    adn.update_bn(other, [images for images, _ in batches()])
    assert not changed(buffers(net), other)


@pytest.mark.parametrize("loader", [[], [None], [*batches(), (torch.zeros(2, 5, 8, 8), 0)]],
                         ids=["empty", "none", "bad"])
def test_what_cannot_be_averaged_loses_nothing(net: nn.Module, loader: list) -> None:
    before = buffers(net)
    with pytest.raises((ValueError, RuntimeError)):
        adn.update_bn(net, loader)
    assert not changed(before, net)
    assert all(m.momentum == 0.1 for m in batch_norms(net).values())


def test_a_net_without_batch_norms_is_refused() -> None:
    with pytest.raises(ValueError, match="no batch norm"):
        adn.update_bn(adn.convert(build("vit_tiny_patch16_224", img_size=32)), batches())


RESETS = {
    "torch's update_bn": lambda net: update_bn([x for x, _ in batches()], net),
    "a loop": lambda net: [m.reset_running_stats() for m in net.modules() if isinstance(m, nn.BatchNorm2d)] + [
        net.train()(x) for x, _ in batches()] + [net.eval()],
}


@pytest.mark.parametrize("depth", ["super", "base"])
@pytest.mark.parametrize("reset", RESETS)
def test_a_set_left_empty_says_so(net: nn.Module, reset: str, depth: str) -> None:
    """That of the extreme at which the net was not when statistics were averaged."""
    x, other = torch.randn(2, 3, 48, 40), {"super": "base", "base": "super"}[depth]
    adn.set_depth(net, depth)
    RESETS[reset](net)
    net.eval()(x)
    for each in (net, copy.deepcopy(net), torch.load(saved(net), weights_only=False)):
        with adn.at_depth(each, other), pytest.raises(RuntimeError, match=r"adn\.update_bn\(net, loader\)"):
            each(x)
    with pytest.raises(RuntimeError, match=r"adn\.update_bn\(net, loader\)"):
        adn.fuse(net)
    fast = adn.accelerate(copy.deepcopy(net))
    with use_kernels(True), adn.at_depth(fast, other), torch.no_grad(), pytest.raises(RuntimeError, match="update_bn"):
        fast(x)
    adn.update_bn(net, batches())
    adn.fuse(net)
    with adn.at_depth(net, other):
        assert net(x).isfinite().all()
    assert not any("Unfilled" in b.__name__ for m in net.modules() for b in behaviours(m))


def saved(net: nn.Module) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    return file


def test_training_fills_a_set_that_was_reset(net: nn.Module) -> None:
    RESETS["a loop"](net)
    x, y = torch.randn(4, 3, 48, 40), torch.arange(4)
    adn.SelfDistillation(net.train()).backward(x, y)
    with adn.at_depth(net.eval(), "base"):
        assert net(x).isfinite().all()


def test_a_net_reset_as_a_whole_is_one_to_train(net: nn.Module) -> None:
    for m in batch_norms(net).values():
        m.reset_parameters()
    with adn.at_depth(net, "base"):
        assert net(torch.randn(2, 3, 48, 40)).isfinite().all()


def test_averaged_weights(net: nn.Module) -> None:
    """Stochastic weight averaging, with torch's own class."""
    averaged = AveragedModel(net)
    for seed in range(2):
        torch.manual_seed(seed)
        with torch.no_grad():
            for p in net.parameters():
                p += 0.1 * torch.randn_like(p) * p.abs().mean()
        averaged.update_parameters(net)
    assert adn.update_bn(averaged, batches()) is averaged
    for depth in ("super", "base"):
        wanted = adn.calibrate(averaged.module, batches(), depth)
        x = torch.randn(4, 3, 48, 40)
        with torch.no_grad(), adn.at_depth(averaged, depth):
            found, expected = averaged.eval()(x), wanted(x)
        # Shared norms average both.
        assert torch.nn.functional.cosine_similarity(found, expected).min() > 0.9
