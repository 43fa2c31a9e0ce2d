"""Classifiers of Hugging Face's `transformers`, which return objects with `logits`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import randomise
from torch import nn

import adn
from adn.core.behaviours import Bypass

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

_VIT = {"hidden_size": 32, "num_hidden_layers": 6, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
_SWIN = {"image_size": 32, "patch_size": 2, "embed_dim": 12, "depths": [2, 3], "num_heads": [2, 2], "window_size": 4,
         "drop_path_rate": 0.3}
NETS: dict[str, tuple[dict[str, Any], int]] = {
    "ViT": ({**_VIT, "intermediate_size": 64}, 4),
    "DeiT": ({**_VIT, "intermediate_size": 64}, 4),
    "Dinov2": ({**_VIT, "drop_path_rate": 0.3}, 4),
    "Swin": (_SWIN, 4),
    "Swinv2": (_SWIN, 4),
    "ResNet": ({"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [2, 3], "layer_type": "basic"}, 4),
    "ConvNext": ({"hidden_sizes": [8, 16], "depths": [2, 3], "num_stages": 2, "drop_path_rate": 0.3}, 4),
}


def built(name: str) -> nn.Module:
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(num_labels=5, **NETS[name][0])
    model = randomise(getattr(transformers, f"{name}ForImageClassification")(config))
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "layer_scale" in key or "lambda" in key:
                parameter.uniform_(0.5, 1.5)
    return model.double()


@pytest.mark.parametrize("name", NETS)
def test_every_depth(name: str) -> None:
    model, x, y = built(name).eval(), torch.rand(4, 3, 32, 32, dtype=torch.float64), torch.arange(4)
    with torch.no_grad():
        before = model(x).logits
    net = adn.convert(model)
    for module in net.modules():
        if "skip" in module._modules:
            randomise(module._modules["skip"], seed=3)
    found = {}
    for depth in adn.depths(net):
        adn.set_depth(net, depth)
        with torch.no_grad():
            found[depth] = net(pixel_values=x).logits
            assert torch.equal(adn.extract(net, depth)(x).logits, found[depth])
    assert len(found) == NETS[name][1]
    assert torch.equal(found[adn.Depth("FF")], before)
    assert all((found[depth] - before).abs().max() > 1e-4 for depth in [*found][1:])
    rows = adn.evaluate(net, [(x, y)], progress=False)
    for row, logits in zip(rows, found.values(), strict=True):
        assert row.top1 == 25 * (logits.argmax(1) == y).sum().item()
    losses = adn.SelfDistillation(net.train(), features="all").backward(x, y)
    assert losses["kl_logits"] > 0
    gradients = [p.grad is not None for key, p in net.named_parameters() if p.requires_grad and "mask_token" not in key]
    assert all(gradients)


@pytest.mark.parametrize("name", ["Dinov2", "Swin", "ConvNext"])
def test_base_is_deterministic(name: str) -> None:
    """Their stochastic depth is known by its name."""
    net, x = adn.convert(built(name)).train(), torch.rand(8, 3, 32, 32, dtype=torch.float64)
    followers = [m for m in net.modules() if isinstance(m, Bypass) and "DropPath" in type(m).__name__]
    assert followers
    with torch.no_grad():
        assert not torch.equal(net(x).logits, net(x).logits)
        adn.set_depth(net, "base")
        assert torch.equal(net(x).logits, net(x).logits)


def test_no_deploy_form() -> None:
    with pytest.raises(ValueError, match=r"code of transformers, which cannot be traced .*; adn.compile\(net\) runs"):
        adn.fuse(adn.convert(built("ViT")).eval())


def test_lora() -> None:
    """A net in a wrapper of PEFT is found, and learns."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    net = adn.convert(built("ViT"))
    wrapped = peft.get_peft_model(net, peft.LoraConfig(target_modules=["q_proj", "v_proj"], modules_to_save=["skip"]))
    adn.set_depth(wrapped, "base")
    assert str(adn.get_depth(net)) == "TT"
    x, y = torch.rand(2, 3, 32, 32, dtype=torch.float64), torch.tensor([0, 1])
    adn.SelfDistillation(wrapped).backward(x, y)
    learnt = {key for key, p in wrapped.named_parameters() if p.grad is not None}
    assert any("lora_" in key for key in learnt)
    assert any(".skip." in key for key in learnt)
