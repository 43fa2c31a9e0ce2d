from __future__ import annotations

import copy

import pytest
import torch
from conftest import build, few

import adn
from adn.core import behaviours


@pytest.mark.parametrize("name", [
    *few(["seresnet50", "resnetv2_50", "efficientnet_b0", "regnety_002", "tv_swin_t", "mobilenetv2_100",
          "tv_mobilenet_v2", "swin_tiny_patch4_window7_224"], lambda name: False),
    "resnet18", "vit_tiny_patch16_224", "convnext_atto"])
def test_extract_equals_the_net_at_every_depth(name: str) -> None:
    sized = {"img_size": 64} if name.startswith(("vit", "swin")) else {}
    model = build(name, num_classes=10, **sized)
    source = copy.deepcopy(model)
    net = adn.convert(model)
    for m in net.modules():
        if isinstance(m, behaviours.SkipNorm):
            m.skip.weight.data.mul_(1.2)
    x = torch.randn(2, 3, 64, 64)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    for depth in adn.depths(net):
        static = adn.extract(net, depth)
        assert not any("adn" in c.__module__.split(".") for m in static.modules() for c in type(m).__mro__)
        assert not any("adn" in type(h).__module__ or "adn" in str(getattr(h, "hook", ""))
                       for h in static._load_state_dict_pre_hooks.values())
        assert not any(k.startswith("_adn") for m in static.modules() for k in m.__dict__)
        with torch.inference_mode(), adn.at_depth(net, depth):
            assert torch.equal(static(x), net(x)), depth
        assert set(static.state_dict()) <= set(source.state_dict()), "the source's names"
    assert str(adn.get_depth(net)) == str(adn.depths(net)[0])
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    full = adn.extract(net, "super")
    assert full.state_dict().keys() == source.state_dict().keys()


def test_smaller_and_independent() -> None:
    net = adn.convert(build("resnet50"))
    base = adn.extract(net, "base")
    assert sum(p.numel() for p in base.parameters()) == 17_112_360  # specified for the reference's base-net
    with torch.no_grad():
        base.fc.weight.zero_()
    assert net.fc.weight.any()


def test_the_depth_that_is_set_is_the_default() -> None:
    net = adn.convert(build("resnet18"))
    adn.set_depth(net, "TFFF")
    x = torch.randn(1, 3, 64, 64)
    static = adn.extract(net)
    assert torch.equal(static(x), net(x))
    adn.convert(adn.extract(net, "super"))


def test_training_flag_is_kept() -> None:
    assert adn.extract(adn.convert(build("resnet18")).train(), "base").layer1[0].bn1.training


@pytest.mark.parametrize("depth", ["TT", "TTTX", 4])
def test_wrong_depth(depth) -> None:
    with pytest.raises(ValueError, match="TTTT"):
        adn.extract(adn.convert(build("resnet18")), depth)


def test_not_converted() -> None:
    with pytest.raises(ValueError, match="not any-depth"):
        adn.extract(build("resnet18"))


def test_wrapped_blocks_are_found() -> None:
    """A wrapper forwards what is read from it, not what is written into it."""
    net = adn.convert(build("resnet18", num_classes=10))
    for m in net.modules():
        if isinstance(m, behaviours.SkipNorm):
            m.skip.weight.data.mul_(1.2)
    for layer in (net.layer1, net.layer2):
        for i in range(2):
            layer[i] = torch.compile(layer[i], backend="eager")
    x = torch.randn(1, 3, 64, 64)
    for depth in ("FFFF", "TTTT", "TFTF"):
        with torch.inference_mode(), adn.at_depth(net, depth):
            assert torch.equal(adn.extract(net)(x), net(x)), depth


def test_blocks_that_are_handed_a_mask() -> None:
    net = adn.convert(build("vit_tiny_patch16_224", img_size=32, num_classes=10))
    adn.set_depth(net, "TFTF")
    x, mask = torch.randn(2, 3, 32, 32), torch.zeros(5, 5)
    static = adn.extract(net, remove=True)
    assert len(static.blocks) == 10
    with torch.inference_mode():
        assert torch.equal(static(x, attn_mask=mask), net(x, attn_mask=mask))
    assert set(static.state_dict()) <= set(net.state_dict())
    torch.jit.script(static)
    with pytest.raises(ValueError, match="RegStage"):
        adn.extract(adn.convert(build("regnety_002")), "base", remove=True)


@pytest.mark.parametrize("change", [adn.convert_sync_batchnorm, adn.freeze_batch_norm])
def test_after_a_change_of_norms(change) -> None:
    net = change(adn.convert(build("resnet18", num_classes=10)))
    x = torch.randn(2, 3, 64, 64)
    for depth in ("FFFF", "TTTT", "TFTF"):
        with torch.inference_mode(), adn.at_depth(net, depth):
            assert torch.equal(adn.extract(net)(x), net(x)), depth
