"""Trained networks on real pictures: conversion keeps every prediction. Needs a folder of data (ADN_DATA)."""

from __future__ import annotations

import copy
import io
import itertools
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from safetensors.torch import load_file
from test_plan import LAYERS, CifarResNet
from torch import nn

import adn

DATA = Path(os.environ.get("ADN_DATA", Path(__file__).parents[2] / "shared" / "data"))


def need(*parts: str) -> Path:
    path = DATA.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"no {'/'.join(parts)} in {DATA} (set ADN_DATA)")
    return path


@torch.inference_mode()
def test_mobilenetv2_on_photographs() -> None:
    weights = load_file(need("weights", "mobilenet_v2_imagenet_fp16.safetensors"))
    pictures = sorted(need("coco_mini", "images", "val").glob("*.jpg"))
    prepare = torchvision.transforms.v2.Compose([
        torchvision.transforms.v2.Resize((224, 224)), torchvision.transforms.v2.PILToTensor()])
    pixels = torch.stack([prepare(Image.open(p).convert("RGB")) for p in pictures])
    x = (pixels / 127.5 - 1).flip(2, 3)  # the convention of these weights, stated beside them

    source = torchvision.models.mobilenet_v2().eval()
    source.load_state_dict({k: v.float() for k, v in weights.items()}, strict=False)
    net = adn.convert(copy.deepcopy(source))
    loaded = adn.convert(torchvision.models.mobilenet_v2()).eval()
    report = adn.load_weights(loaded, weights)
    assert len(report.loaded) == len(weights)
    expected = source(x)
    assert expected.softmax(1).amax(1).mean() > 0.3, "these weights are trained: the network is sure of something"
    assert torch.equal(net(x), expected)
    assert torch.equal(loaded(x), expected)
    with adn.at_depth(net, "base"):
        assert not torch.equal(net(x).argmax(1), expected.argmax(1)), "nobody trained the base-net yet"


@torch.inference_mode()
def test_resnet56_with_a_plan_by_hand_on_cifar10() -> None:
    weights = load_file(need("weights", "cifar_resnet56.safetensors"))
    with np.load(need("cifar10", "cifar10_test.npz")) as file:
        head, tails, offsets = file["header"].tobytes(), file["tails"], file["offsets"][:501]
        y = torch.from_numpy(file["labels"][:500]).long()
    pixels = np.stack([np.asarray(Image.open(io.BytesIO(head + tails[a:b].tobytes())).convert("RGB"))
                       for a, b in itertools.pairwise(offsets)])
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    x = ((torch.from_numpy(pixels).float() / 255 - mean) / std).permute(0, 3, 1, 2)

    source = CifarResNet(blocks=9).eval()
    missing, unexpected = source.load_state_dict(weights, strict=False)
    assert not unexpected
    assert all(name.endswith("num_batches_tracked") for name in missing)
    expected = source(x)
    accuracy = (expected.argmax(1) == y).float().mean().item()
    assert accuracy > 0.75, f"{accuracy:.1%}: these weights reach about 83 % on all of these images"
    net: nn.Module = adn.convert(source, plan=LAYERS)
    assert [(len(s.essential), len(s.refinement)) for s in adn.stages(net)] == [(5, 4)] * 3
    assert torch.equal(net(x), expected)
