"""Gradient checkpointing: recomputation under the depth of its forward, statistics moved once."""

from __future__ import annotations

import copy
import itertools
import threading

import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import build, few
from torch import nn
from torch.utils.checkpoint import checkpoint

import adn
from adn.core import choice

MODELS = {
    "resnet18": {},
    "resnet50d": {"layers": (2, 2, 2, 2)},
    "vit_tiny_patch16_224": {"img_size": 64},
    "swin_tiny_patch4_window7_224": {"depths": (2, 2, 2), "embed_dim": 24, "num_heads": (1, 2, 2), "img_size": 64},
    "mobilenetv2_050": {},
    "convnext_atto": {},
}


@pytest.fixture
def reentrant(request):
    before = timm.layers.use_reentrant_ckpt()
    timm.layers.set_reentrant_ckpt(request.param)
    yield request.param
    timm.layers.set_reentrant_ckpt(before)


@pytest.mark.parametrize(("name", "reentrant"), few(
    itertools.product(MODELS, [False, True]), [("resnet18", True), ("vit_tiny_patch16_224", True), (
        "swin_tiny_patch4_window7_224", False), ("mobilenetv2_050", False)].__contains__),
    indirect=["reentrant"])
def test_gradients_and_statistics(name: str, reentrant: bool) -> None:
    plain = adn.convert(build(name, num_classes=10, **MODELS[name])).double().train()
    checked = copy.deepcopy(plain)
    checked.set_grad_checkpointing(True)
    x = torch.randn(4, 3, 64, 64, dtype=torch.double, requires_grad=True)
    y = torch.randint(0, 10, (4,))
    for net in (plain, checked):
        torch.manual_seed(3)  # Swin draws stochastic depth
        adn.SelfDistillation(net)(x, y)["loss"].backward()
        # A loop of one's own: the depth has moved on, twice, when backward runs.
        losses = []
        for i, _ in enumerate(adn.stages(net)):
            adn.set_depth(net, [i == k for k in range(len(adn.stages(net)))])
            losses.append(F.cross_entropy(net(x), y))
        adn.set_depth(net, "super")
        sum(losses).backward()
    for (key, p), q in zip(plain.named_parameters(), checked.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-9, atol=1e-12, msg=lambda m, key=key: f"{key}: {m}")
    for (key, p), q in zip(plain.named_buffers(), checked.named_buffers(), strict=True):
        assert torch.equal(q[1], p), key


def test_a_checkpoint_of_ones_own() -> None:
    plain = adn.convert(build("resnet18", num_classes=10)).double().train()
    checked = copy.deepcopy(plain)
    x = torch.randn(2, 3, 64, 64, dtype=torch.double, requires_grad=True)
    for net, run in ((plain, lambda f, x: f(x)), (checked, lambda f, x: checkpoint(f, x, use_reentrant=False))):
        outputs = []
        for depth in ("TFTF", "FTFT"):
            adn.set_depth(net, depth)
            outputs.append(run(net, x).square().mean())
        sum(outputs).backward()
    for p, q in zip(plain.parameters(), checked.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-9, atol=1e-12)
    for p, q in zip(plain.buffers(), checked.buffers(), strict=True):
        assert torch.equal(p, q)


def test_a_cumulative_average_counts_once() -> None:
    nets = []
    for checked in (False, True):
        net = adn.convert(build("resnet18", num_classes=10)).train()
        for m in net.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.momentum = None
        net.set_grad_checkpointing(checked)
        for seed in range(2):
            net(torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(seed))).sum().backward()
        nets.append(net)
    for a, b in zip(nets[0].buffers(), nets[1].buffers(), strict=True):
        assert torch.equal(a, b)
    assert all(m.momentum is None for m in nets[1].modules() if isinstance(m, nn.BatchNorm2d))


def test_too_long_ago_is_an_error_and_not_a_guess(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "_REMEMBERED_CHANGES", 8)
    net = adn.convert(build("resnet18", num_classes=10)).train()
    net.set_grad_checkpointing(True)
    loss = net(torch.randn(2, 3, 64, 64)).sum()
    for _ in range(8):
        adn.set_depth(net, "base")
        adn.set_depth(net, "super")
    with pytest.raises(RuntimeError, match="call backward sooner"):
        loss.backward()


def test_a_checkpoint_inside_a_reentrant_one_is_refused() -> None:
    net = adn.convert(build("resnet18", num_classes=10)).train()
    net.set_grad_checkpointing(True)
    x = torch.randn(2, 3, 64, 64, requires_grad=True)
    for outer in (False, True):
        losses = []
        for depth in ("super", "base"):
            adn.set_depth(net, depth)
            losses.append(checkpoint(net, x, use_reentrant=outer).sum())
        if outer:
            with pytest.raises(RuntimeError, match="use_reentrant=False to the outer one"):
                sum(losses).backward()
        else:
            sum(losses).backward()


def test_features_in_a_reentrant_checkpoint_are_refused() -> None:
    net = adn.convert(build("resnet18", num_classes=10)).train()
    kd = adn.SelfDistillation(net, features="all")
    inner = net.layer2.forward
    net.layer2.forward = lambda x: checkpoint(inner, x, use_reentrant=True)
    with pytest.raises(RuntimeError, match="no gradient inside a reentrant checkpoint"):
        kd(torch.randn(2, 3, 64, 64, requires_grad=True), torch.zeros(2, dtype=torch.long))


def test_another_thread_counts_anew() -> None:
    nets = [adn.convert(build("resnet18", num_classes=10)).double().train() for _ in range(2)]
    nets[1].set_grad_checkpointing(True)
    x = torch.randn(2, 3, 64, 64, dtype=torch.double, requires_grad=True)
    for _ in range(3):
        with adn.at_depth(nets[1], "base"), torch.no_grad():
            nets[1](x)
    for name, tensor in nets[0].state_dict().items():
        nets[1].state_dict()[name].copy_(tensor)

    def work(net: nn.Module) -> None:
        adn.SelfDistillation(net)(x, torch.tensor([1, 2]))["loss"].backward()

    for net in nets:
        thread = threading.Thread(target=work, args=(net,))
        thread.start()
        thread.join()
    for p, q in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-9, atol=1e-12)
