"""Converted nets in other people's trainers: Accelerate, Lightning, PEFT, safetensors.

Each with the library's own classes, where it is installed: pip install accelerate pytorch-lightning peft
"""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import safetensors.torch
import torch
from conftest import build
from torch import nn

import adn
from adn.core.depth import Depth

CLASSES = 4
X, Y = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0)), torch.arange(8) % CLASSES


def learner(model: str = "resnet18", **kwargs: int) -> adn.SelfDistillation:
    return adn.SelfDistillation(adn.convert(build(model, num_classes=CLASSES, **kwargs)))


def at_every_depth(net: nn.Module) -> dict[Depth, torch.Tensor]:
    net.eval()
    found = {}
    with torch.inference_mode():
        for depth in adn.depths(net):
            with adn.at_depth(net, depth):
                found[depth] = net(X).clone()
    return found


def agree(found: dict[Depth, torch.Tensor], wanted: dict[Depth, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    assert len(wanted) > 4
    for depth, expected in wanted.items():
        torch.testing.assert_close(found[depth], expected, msg=str(depth))


def step(kd: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    kd.train()
    kd(X, Y)["loss"].backward()
    optimizer.step()
    optimizer.zero_grad()


def test_a_checkpoint_of_safetensors(tmp_path: Path) -> None:
    """What trainers write holds the learner alone; a module with the net as well has each tensor under two names."""
    kd = learner()
    step(kd, torch.optim.SGD(kd.parameters(), 0.1))
    safetensors.torch.save_file(kd.state_dict(), tmp_path / "kd.safetensors")
    other = learner()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    other.load_state_dict(safetensors.torch.load_file(tmp_path / "kd.safetensors"))
    agree(at_every_depth(other.net), at_every_depth(kd.net))

    with pytest.raises(RuntimeError, match="share memory"):
        safetensors.torch.save_file(nn.ModuleDict({"net": kd.net, "kd": kd}).state_dict(), tmp_path / "b.safetensors")


def test_accelerate(tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    kd = learner()
    accelerator = accelerate.Accelerator(cpu=True)
    prepared, optimizer = accelerator.prepare(kd, torch.optim.SGD(kd.parameters(), 0.1))
    for _ in range(2):
        prepared.train()
        accelerator.backward(prepared(X, Y)["loss"])
        optimizer.step()
        optimizer.zero_grad()
    accelerator.save_state(tmp_path / "state")
    accelerator.save_model(prepared, tmp_path / "model")
    wanted = at_every_depth(kd.net)

    step(kd, torch.optim.SGD(kd.parameters(), 0.1))
    accelerator.load_state(tmp_path / "state")
    agree(at_every_depth(kd.net), wanted)
    other = learner()
    accelerate.load_checkpoint_in_model(other, str(tmp_path / "model"))
    agree(at_every_depth(other.net), wanted)


def test_lightning(tmp_path: Path) -> None:
    lightning = pytest.importorskip("pytorch_lightning")

    class Learner(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.kd = learner()

        def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], _: int) -> torch.Tensor:
            return self.kd(*batch)["loss"]

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), 0.1)

    module, before = Learner(), at_every_depth(learner().net)
    trainer = lightning.Trainer(max_epochs=2, accelerator="cpu", logger=False, enable_progress_bar=False,
                                enable_model_summary=False, default_root_dir=tmp_path)
    trainer.fit(module, torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X, Y), 4))
    wanted = at_every_depth(module.kd.net)
    assert all(not torch.allclose(wanted[depth], before[depth]) for depth in wanted)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    found = Learner.load_from_checkpoint(tmp_path / "a.ckpt")
    agree(at_every_depth(found.kd.net), wanted)


def test_lora(tmp_path: Path) -> None:
    """Adapters of the layers, and the second norms trained beside them: "modules_to_save" takes them by name."""
    peft = pytest.importorskip("peft")
    kd = learner("vit_tiny_patch16_224", img_size=32, patch_size=8)
    wanted = at_every_depth(kd.net)
    config = peft.LoraConfig(target_modules=["qkv", "fc1"], modules_to_save=["skip", "head"], r=2)
    net = peft.get_peft_model(copy.deepcopy(kd.net), config)
    agree(at_every_depth(net), wanted)
    step(adn.SelfDistillation(net), torch.optim.SGD([p for p in net.parameters() if p.requires_grad], 1.0))
    adapted = at_every_depth(net)
    assert all(not torch.allclose(adapted[depth], wanted[depth]) for depth in wanted)
    net.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(copy.deepcopy(kd.net), tmp_path)
    agree(at_every_depth(again), adapted)
    merged = net.merge_and_unload()
    agree(at_every_depth(merged), adapted)
    adn.save(merged, tmp_path / "net.safetensors")
    plain = build("vit_tiny_patch16_224", num_classes=CLASSES, img_size=32, patch_size=8)
    agree(at_every_depth(adn.load(tmp_path / "net.safetensors", model=plain)), adapted)
