"""A small detector of three layers stands in for RT-DETR."""

from __future__ import annotations

import datetime
from typing import Any

import pytest
import torch
import torch.distributed as dist
from conftest import build, in_two_processes
from detr_cases import some_targets
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import adn
from adn.models.rtdetr.criterion import DetectionLoss, DistillationLoss
from adn.models.rtdetr.denoising import make_queries
from adn.models.rtdetr.distill import DetectionDistillation, DetectionSupervised

CLASSES, QUERIES, DIM = 5, 6, 8


class Detector(nn.Module):
    """Its queries look at nothing but the mean of the coarsest map."""

    def __init__(self, layers: int = 3) -> None:
        super().__init__()
        self.num_denoising = 8
        self.module = adn.convert(build("resnet18", features_only=True, out_indices=(2, 3, 4)))
        self.neck = nn.ModuleList(nn.Conv2d(c, DIM, 1) for c in (128, 256, 512))
        self.queries = nn.Embedding(QUERIES, DIM)
        self.classes = nn.Embedding(CLASSES + 1, DIM, padding_idx=CLASSES)
        self.score = nn.ModuleList(nn.Linear(DIM, CLASSES) for _ in range(layers + 1))
        self.box = nn.ModuleList(nn.Linear(DIM, 4) for _ in range(layers + 1))
        self.seen: list[dict[str, Any]] = []

    def forward(self, images: torch.Tensor, targets: list | None = None, draws: Any = None) -> dict[str, Any]:
        features = self.module(images)
        maps = [project(feature) for project, feature in zip(self.neck, features, strict=True)]
        context = maps[-1].mean((2, 3))[:, None]
        meta = make_queries(targets, CLASSES, QUERIES, self.classes, num_denoising=self.num_denoising,
                            draws=draws)
        self.seen.append({"size": images.shape[2:], "depth": str(adn.get_depth(self)),
                          "boxes": None if meta is None else meta.box_unact})
        content = self.queries.weight.expand(len(images), -1, -1)
        heads = [self._head(i, context + content) for i in range(len(self.score))]
        outputs = {**heads[-2], "aux_outputs": [*heads[:-2], heads[-1]], "backbone_features": features,
                   "encoder_features": maps}
        if meta is not None:
            known = [self._head(i, context + meta.content, meta.box_unact) for i in range(len(self.score) - 1)]
            outputs |= {"dn_aux_outputs": known, "dn_meta": meta}
        return outputs

    def _head(self, i: int, x: torch.Tensor, start: torch.Tensor | float = 0.0) -> dict[str, torch.Tensor]:
        return {"pred_logits": self.score[i](x), "pred_boxes": torch.sigmoid(self.box[i](x) + start)}


def a_net() -> Detector:
    torch.manual_seed(0)
    return Detector().train()


def a_batch(counts: tuple[int, ...] = (2, 0, 3), size: int = 64) -> tuple[torch.Tensor, list]:
    return torch.rand(len(counts), 3, size, size, generator=torch.Generator().manual_seed(1)), some_targets(
        list(counts), CLASSES)


def gradients(net: nn.Module) -> dict[str, torch.Tensor | None]:
    return {name: None if p.grad is None else p.grad.clone() for name, p in net.named_parameters()}


def assert_same_gradients(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    for name, value in a.items():
        if value is None or b[name] is None:  # one backward or two: no gradient, or none that is not zero
            assert value is b[name] or not (b[name] if value is None else value).any(), name
        else:
            torch.testing.assert_close(value, b[name], atol=2e-5, rtol=1e-4, msg=lambda m, name=name: f"{name}: {m}")


def test_is_super_then_base() -> None:
    images, targets = a_batch()
    net, other = a_net(), a_net()
    generator = torch.Generator().manual_seed(7)
    losses = DetectionDistillation(net, generator=generator)(images, targets)
    losses["loss"].backward()

    generator.manual_seed(7)
    with adn.at_depth(other, "super"):
        of_super = other(images, targets, draws=generator)
    with adn.at_depth(other, "base"):
        of_base = other(images, targets, draws=generator)
    terms = {f"super.{k}": v for k, v in DetectionLoss()(of_super, targets).items()}
    terms |= {f"base.{k}": v for k, v in DistillationLoss()(of_base, targets, of_super).items()}
    sums = {part: sum(v for k, v in terms.items() if k.startswith(f"{part}.")) for part in ("super", "base")}
    expected = {**terms, **sums, "loss": sums["super"] + sums["base"]}
    expected["loss"].backward()
    assert losses.keys() == expected.keys()
    assert len(terms) == 3 * (1 + 3 + 3) + 5 + 3 * (3 + 3)
    for name, value in losses.items():
        torch.testing.assert_close(value, expected[name], msg=lambda m, name=name: f"{name}: {m}")
    assert_same_gradients(gradients(net), gradients(other))
    assert [seen["depth"] for seen in net.seen] == ["FFFF", "TTTT"]
    assert not torch.equal(net.seen[0]["boxes"], net.seen[1]["boxes"])


@pytest.mark.parametrize("counts", [(2, 0, 3), (0, 0)])
def test_two_backwards_equal_one(counts: tuple[int, ...]) -> None:
    images, targets = a_batch(counts)
    one, two = a_net(), a_net()
    sizes = (32, 64, 96)
    a = DetectionDistillation(one, multi_scale=sizes, generator=torch.Generator().manual_seed(7))(images, targets)
    a["loss"].backward()
    b = DetectionDistillation(two, multi_scale=sizes, generator=torch.Generator().manual_seed(7)).backward(
        images, targets)
    assert a.keys() == b.keys()
    for name, value in b.items():
        assert not value.requires_grad
        torch.testing.assert_close(value, a[name].detach(), msg=lambda m, name=name: f"{name}: {m}")
    assert_same_gradients(gradients(one), gradients(two))
    for p, q in zip(one.buffers(), two.buffers(), strict=True):
        assert torch.equal(p, q)


def test_the_teacher_is_constant() -> None:
    """What the base-net learns does not reach what only the super-net has."""
    images, targets = a_batch()
    net = a_net()
    DetectionDistillation(net)(images, targets)["base"].backward()
    for stage in adn.stages(net):
        assert all(p.grad is None for block in stage.refinement for p in block.parameters())
    for head in (*net.score, *net.box):
        assert head.weight.grad.any()


def test_scaled_backward() -> None:
    images, targets = a_batch()
    one, two = a_net(), a_net()
    DetectionDistillation(one, generator=torch.Generator().manual_seed(7)).backward(images, targets)
    DetectionDistillation(two, generator=torch.Generator().manual_seed(7)).backward(
        images, targets, torch.amp.GradScaler("cpu", init_scale=8.0))
    assert_same_gradients({k: None if v is None else 8 * v for k, v in gradients(one).items()}, gradients(two))


def test_sizes_are_drawn_for_each_pass() -> None:
    images, targets = a_batch()
    net = a_net()
    kd = DetectionDistillation(net, multi_scale=(32, 64, 64), generator=torch.Generator().manual_seed(0))
    for _ in range(6):
        kd(images, targets)
    pairs = {tuple(seen["size"][0] for seen in net.seen[i : i + 2]) for i in range(0, 12, 2)}
    assert {side for pair in pairs for side in pair} == {32, 64}
    assert any(a != b for a, b in pairs)
    drawn = [tuple(seen["size"]) for seen in net.seen]
    net.seen.clear()
    kd.generator = torch.Generator().manual_seed(0)
    for _ in range(6):
        kd(images, targets)
    assert [tuple(seen["size"]) for seen in net.seen] == drawn


def test_resizing_is_to_the_nearest() -> None:
    images, targets = a_batch(size=64)
    got, expected = a_net(), a_net()
    DetectionSupervised(got, multi_scale=(32,), generator=torch.Generator().manual_seed(0))(images, targets)[
        "loss"].backward()
    generator = torch.Generator().manual_seed(0)
    torch.randint(1, (), generator=generator)
    DetectionSupervised(expected, generator=generator)(images[:, :, ::2, ::2], targets)["loss"].backward()
    assert_same_gradients(gradients(got), gradients(expected))


def test_published_sizes() -> None:
    with pytest.raises(ValueError, match=r"\[100, 0\].*multiples of 32"):
        DetectionDistillation(a_net(), multi_scale=(100, 64, 0))


def test_supervised() -> None:
    images, targets = a_batch()
    net, other = a_net(), a_net()
    losses = DetectionSupervised(net, generator=torch.Generator().manual_seed(7))(images, targets)
    terms = DetectionLoss()(other(images, targets, draws=torch.Generator().manual_seed(7)), targets)
    assert losses.keys() == {*terms, "loss"}
    torch.testing.assert_close(losses["loss"], sum(terms.values()))
    assert losses["loss"].requires_grad


def test_criteria_of_ones_own() -> None:
    images, targets = a_batch()
    net = a_net()
    adn.set_depth(net, "TFFF")
    losses = DetectionDistillation(
        net, DetectionLoss(weights={"vfl": 0, "bbox": 0, "giou": 0}),
        DistillationLoss(kd_weights={"features_backbone": 0}, ground_truth=True))(images, targets)
    assert losses["super"] == 0
    assert "base.loss_vfl" in losses
    assert "base.loss_features_backbone_kd" not in losses
    assert str(adn.get_depth(net)) == "TFFF"


def test_autocast() -> None:
    images, targets = a_batch()
    net = a_net()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = DetectionDistillation(net).backward(images, targets)
    assert all(value.dtype == torch.float32 for value in losses.values())
    assert all(p.grad is None or p.grad.isfinite().all() for p in net.parameters())


def test_diverged_predictions_are_an_error() -> None:
    images, targets = a_batch()
    net = a_net()
    with torch.no_grad():
        net.box[1].bias.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match=r"not finite \(aux_1\)"):
        DetectionDistillation(net)(images, targets)
    assert str(adn.get_depth(net)) == "FFFF"


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2,
                            timeout=datetime.timedelta(seconds=60))
    for counts in (FULL, ONE_EMPTY):
        images, targets = shares(counts)[rank]
        net = a_net().eval()  # batch norm would see its own process's images
        parallel = DistributedDataParallel(a_step(net))
        parallel(images, targets)["loss"].backward()
        torch.save(gradients(net), f"{folder}/one forward {counts} {rank}.pt")
        net = a_net().eval()
        a_step(DistributedDataParallel(net, find_unused_parameters=True)).backward(images, targets)
        torch.save(gradients(net), f"{folder}/two backwards {counts} {rank}.pt")
    with pytest.raises(ValueError, match="find_unused_parameters"):
        a_step(DistributedDataParallel(a_net())).backward(images, targets)
    for make in (DetectionSupervised, DetectionDistillation):  # without denoising, and each step needs every gradient
        net = a_net()
        net.num_denoising = 0
        parallel = DistributedDataParallel(make(net))
        for _ in range(2):
            parallel(*shares(FULL)[rank])["loss"].backward()
    dist.destroy_process_group()


FULL, ONE_EMPTY = (2, 1, 3, 2), (0, 0, 3, 1)


def a_step(net: nn.Module) -> DetectionDistillation:
    return DetectionDistillation(net, generator=torch.Generator().manual_seed(0))


def shares(counts: tuple[int, ...]) -> list[tuple[torch.Tensor, list]]:
    images, targets = a_batch(counts)
    return [(images[:2], targets[:2]), (images[2:], targets[2:])]


def test_processes_average_their_gradients(tmp_path) -> None:
    in_two_processes(worker, str(tmp_path))
    for counts in (FULL, ONE_EMPTY):
        expected: dict = {}
        for images, targets in shares(counts):
            net = a_net().eval()
            losses = a_step(net)(images, targets)
            of_features = sum(value for name, value in losses.items() if "features" in name)
            # A process alone divides by the number of its own objects.
            objects = max(1, sum(len(target["labels"]) for target in targets))
            counted = (losses["loss"] - of_features) * objects / (sum(counts) / 2)
            (counted + of_features).backward()
            for name, value in gradients(net).items():
                other = expected.get(name)
                expected[name] = value if other is None else other if value is None else other + value
        expected = {name: None if value is None else value / 2 for name, value in expected.items()}
        for mode in ("one forward", "two backwards"):
            for rank in range(2):
                assert_same_gradients(torch.load(tmp_path / f"{mode} {counts} {rank}.pt"), expected)
