"""Two gloo processes against one."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import build, few, in_two_processes
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP

import adn

STEPS = 2


def a_net(norm: str) -> nn.Module:
    if norm == "layer":
        return adn.convert(build("vit_tiny_patch16_224", img_size=32, depth=6, num_classes=10)).double().train()
    return adn.convert(build("resnet18", num_classes=10)).double().train()


def a_batch() -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(5)
    return torch.randn(8, 3, 32, 32, generator=g).double(), torch.randint(0, 10, (8,), generator=g)


def train(net: nn.Module, step) -> None:
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
    for _ in range(STEPS):
        optimizer.zero_grad()
        step()
        optimizer.step()


def worker(rank: int, folder: str, norm: str, mode: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    net = a_net(norm)
    x, y = (t[rank * 4 : rank * 4 + 4] for t in a_batch())
    if mode in ("one forward", "one pass"):
        # No search for unused parameters: SelfDistillation's forward uses all of them.
        kd = adn.SelfDistillation(net, features="all", single_pass=mode == "one pass")
        wrapped = DDP(kd, broadcast_buffers=False)
        train(net, lambda: wrapped(x, y)["loss"].backward())
    elif mode == "one pass of a net in DDP":
        kd = adn.SelfDistillation(DDP(net, broadcast_buffers=False), features="all", single_pass=True)
        train(net, lambda: kd.backward(x, y))
    elif mode == "two backwards":
        kd = adn.SelfDistillation(DDP(net, broadcast_buffers=False, find_unused_parameters=True), features="all")
        train(net, lambda: kd.backward(x, y))
    else:
        kd = adn.SelfDistillation(DDP(net))
        try:
            kd.backward(x, y)
        except ValueError as error:
            Path(folder, f"error{rank}").write_text(str(error))
    torch.save(net.state_dict(), f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def spawn(folder: Path, norm: str, mode: str) -> list[dict]:
    in_two_processes(worker, str(folder), norm, mode)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize(
    "mode", few(["one forward", "two backwards", "one pass of a net in DDP"], lambda mode: "DDP" in mode))
def test_layer_norm_equals_one_process(tmp_path: Path, mode: str) -> None:
    both = spawn(tmp_path, "layer", mode)
    net = a_net("layer")
    kd = adn.SelfDistillation(net, features="all")
    train(net, lambda: kd(*a_batch())["loss"].backward())
    for got in both:
        for name, value in net.state_dict().items():
            torch.testing.assert_close(got[name], value, rtol=1e-7, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("mode", few(["one forward", "two backwards", "one pass"], lambda m: m == "two backwards"))
def test_batch_norm_equals_the_average_of_two_half_batches(tmp_path: Path, mode: str) -> None:
    both = spawn(tmp_path, "batch", mode)
    x, y = a_batch()
    halves = [a_net("batch"), None]
    halves[1] = copy.deepcopy(halves[0])
    optimizers = [torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9) for net in halves]
    for _ in range(STEPS):
        for rank, net in enumerate(halves):
            net.zero_grad()
            part = slice(rank * 4, rank * 4 + 4)
            adn.SelfDistillation(net, features="all")(x[part], y[part])["loss"].backward()
        for a, b in zip(halves[0].parameters(), halves[1].parameters(), strict=True):
            a.grad = b.grad = (a.grad + b.grad) / 2
        for optimizer in optimizers:
            optimizer.step()
    for got, net in zip(both, halves, strict=True):
        for name, value in net.state_dict().items():
            torch.testing.assert_close(got[name], value, rtol=1e-7, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


def test_two_backwards_without_the_search_is_refused(tmp_path: Path) -> None:
    spawn(tmp_path, "layer", "refused")
    for rank in range(2):
        assert "find_unused_parameters=True" in (tmp_path / f"error{rank}").read_text()


def test_depth_reaches_through_ddp(tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        net = a_net("batch")
        wrapped = DDP(net)
        adn.set_depth(wrapped, "TFFT")
        assert str(adn.get_depth(net)) == "TFFT"
        with pytest.raises(adn.ConversionError, match=r"convert the model first|already"):
            adn.convert(wrapped)
        with pytest.raises(adn.ConversionError, match="convert the model first"):
            adn.convert(DDP(build("resnet18")))
    finally:
        dist.destroy_process_group()


