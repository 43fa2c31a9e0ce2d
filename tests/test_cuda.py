"""What only a GPU can show: `pytest -m cuda`."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import build

import adn

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

NAMES = ["resnet50", "mobilenetv2_100", "efficientnet_b0", "vit_tiny_patch16_224", "swin_tiny_patch4_window7_224",
         "convnext_atto", "regnety_002"]


@pytest.fixture(autouse=True)
def exact(ieee):
    """TF32 off and deterministic kernels: bit equality is asked for."""
    before = torch.backends.cudnn.deterministic
    torch.backends.cudnn.deterministic = True
    yield
    torch.backends.cudnn.deterministic = before


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_every_depth(name: str, dtype: torch.dtype) -> None:
    source = build(name, num_classes=10).cuda().to(dtype)
    x = torch.randn(4, 3, 224, 224, device="cuda", dtype=dtype)
    net = adn.convert(copy.deepcopy(source))
    with torch.inference_mode():
        assert torch.equal(net(x), source(x))
        for depth in adn.depths(net):
            static = adn.extract(net, depth)
            with adn.at_depth(net, depth):
                assert torch.equal(net(x), static(x)), depth


def test_a_change_of_depth_neither_synchronises_nor_allocates() -> None:
    net = adn.convert(build("resnet50")).cuda()
    every = adn.depths(net)
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    torch.cuda.set_sync_debug_mode("error")
    try:
        for depth in every:
            adn.set_depth(net, depth)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before


@pytest.mark.parametrize("checkpointing", [False, True])
def test_mixed_precision_step(checkpointing: bool) -> None:
    net = adn.convert(build("resnet18", num_classes=10)).cuda().train().to(memory_format=torch.channels_last)
    net.set_grad_checkpointing(checkpointing)
    kd = adn.SelfDistillation(net, features="all")
    scaler = torch.amp.GradScaler("cuda")
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
    x = torch.randn(32, 3, 64, 64, device="cuda").contiguous(memory_format=torch.channels_last)
    y = torch.randint(0, 10, (32,), device="cuda")
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        with torch.autocast("cuda", dtype=torch.float16):
            terms = kd.backward(x, y, scaler)
        scaler.step(optimizer)
        scaler.update()
        losses.append(terms["loss"].item())
    assert losses[-1] < losses[0]
    assert net.layer1[0].bn1.num_batches_tracked == net.layer1[0].bn1.skip.num_batches_tracked == 20
    assert net.bn1.num_batches_tracked == 40


def test_checkpointed_gradients() -> None:
    plain = adn.convert(build("resnet18", num_classes=10)).cuda().double().train()
    checked = copy.deepcopy(plain)
    checked.set_grad_checkpointing(True)
    x = torch.randn(4, 3, 64, 64, device="cuda", dtype=torch.double)
    y = torch.randint(0, 10, (4,), device="cuda")
    for net in (plain, checked):
        adn.SelfDistillation(net)(x, y)["loss"].backward()
    for (key, p), q in zip(plain.named_parameters(), checked.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-9, atol=1e-12, msg=lambda m, key=key: f"{key}: {m}")
    for p, q in zip(plain.buffers(), checked.buffers(), strict=True):
        assert torch.equal(p, q)


def test_profile_save_and_load(tmp_path) -> None:
    net = adn.create_model("anydepth_resnet50", num_classes=10).cuda()
    points = adn.profile(net, torch.randn(8, 3, 224, 224, device="cuda"), rounds=5)
    assert len(points) == 16
    assert all(point.p50_ms > 0 for point in points)
    adn.save(net, tmp_path / "net.safetensors")
    again = adn.load(tmp_path / "net.safetensors", device="cuda")
    assert next(again.parameters()).is_cuda
    for key, value in net.state_dict().items():
        assert torch.equal(again.state_dict()[key], value)
