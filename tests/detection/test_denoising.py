from __future__ import annotations

import dataclasses

import pytest
import torch
from detr_cases import Golden, some_targets
from torch import nn
from torchvision.ops import box_convert

from adn.detect.boxes import inverse_sigmoid
from adn.models.rtdetr.denoising import Draws, draw, make_queries

CLASSES, QUERIES = 5, 6


def an_embedding(classes: int = CLASSES) -> nn.Embedding:
    """Its rows tell which class they are of."""
    embedding = nn.Embedding(classes + 1, 2, padding_idx=classes)
    with torch.no_grad():
        embedding.weight.copy_(torch.arange(classes + 1)[:, None].expand(-1, 2))
    return embedding


def test_is_the_references(golden, seeded) -> None:
    manifest, arrays = golden("rtdetr_denoising")
    [config] = manifest["configs"]
    embedding = nn.Embedding(81, 8, padding_idx=80)
    embedding.load_state_dict(seeded.reference_state(manifest))
    case = Golden(seeded, manifest["seed"], dtype=torch.float32)
    draws = Draws(*(torch.from_numpy(arrays[f"draws/{field.name}"]) for field in dataclasses.fields(Draws)))
    got = make_queries(case.targets(manifest["targets_per_image"]), config["num_classes"], config["num_queries"],
                       embedding, num_denoising=config["num_denoising"],
                       label_noise_ratio=config["label_noise_ratio"], box_noise_scale=config["box_noise_scale"],
                       draws=draws)
    assert got.groups == manifest["dn_num_group"]
    assert [got.queries, config["num_queries"]] == manifest["dn_num_split"]
    for name, value in {"class_embed": got.content, "box_unact": got.box_unact, "attn_mask": got.attn_mask,
                        **{f"positive_idx/{i}": index for i, index in enumerate(got.positives)}}.items():
        torch.testing.assert_close(value.detach(), torch.from_numpy(arrays[name]), **manifest["tolerance"],
                                   msg=lambda m, name=name: f"{name}: {m}")


def by_definition(targets: list[dict], most: int, groups: int, draws: Draws, label_noise: float, box_noise: float):
    """Labels and boxes, one query after the other."""
    labels = torch.full((len(targets), 2 * most * groups), CLASSES)
    boxes = torch.zeros(len(targets), 2 * most * groups, 4)
    for b, target in enumerate(targets):
        for d in range(labels.shape[1]):
            slot, negative = d % most, d // most % 2 == 1
            if slot >= len(target["labels"]):
                continue
            labels[b, d] = target["labels"][slot]
            if draws.u_label[b, d] < label_noise / 2:
                labels[b, d] = draws.new_label[b, d]
            cx, cy, w, h = target["boxes"][slot].tolist()
            sides = [cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2]
            for k, reach in enumerate((w, h, w, h)):
                sign = 1 if draws.sign01[b, d, k] else -1
                step = float(draws.u_box[b, d, k]) + negative
                sides[k] = min(max(sides[k] + sign * step * reach / 2 * box_noise, 0), 1)
            boxes[b, d] = box_convert(torch.tensor(sides), "xyxy", "cxcywh")
    return labels, boxes


@pytest.mark.parametrize("counts", [[3, 1], [0, 2, 5], [1], [4, 4]])
@pytest.mark.parametrize(("label_noise", "box_noise"), [(0.5, 1.0), (1.0, 0.4), (0.0, 0.0)])
def test_is_the_definition(counts: list[int], label_noise: float, box_noise: float) -> None:
    targets = some_targets(counts, CLASSES)
    targets[-1]["boxes"][0] = torch.tensor([0.95, 0.02, 0.3, 0.3])  # reaches over the edge
    most = max(counts)
    groups = 12 // most
    draws = draw(len(counts), 2 * most * groups, CLASSES, torch.Generator().manual_seed(3))
    got = make_queries(targets, CLASSES, QUERIES, an_embedding(), num_denoising=12, label_noise_ratio=label_noise,
                       box_noise_scale=box_noise, draws=draws)
    labels, boxes = by_definition(targets, most, groups, draws, label_noise, box_noise)
    assert (got.groups, got.queries) == (groups, 2 * most * groups)
    assert torch.equal(got.content, labels[..., None].expand(-1, -1, 2).float())
    torch.testing.assert_close(got.box_unact, inverse_sigmoid(boxes), atol=1e-5, rtol=1e-5)
    assert got.box_unact.isfinite().all()
    for n, positives in zip(counts, got.positives, strict=True):
        assert positives.tolist() == [2 * most * g + k for g in range(groups) for k in range(n)]


def test_who_sees_whom() -> None:
    got = make_queries(some_targets([2, 1]), CLASSES, QUERIES, an_embedding(), num_denoising=6)
    assert (got.groups, got.queries) == (3, 12)
    for row in range(18):
        for column in range(18):
            seen = column >= 12 or (row < 12 and row // 4 == column // 4)
            assert got.attn_mask[row, column] == (not seen), (row, column)


def test_more_objects_than_denoising_queries() -> None:
    got = make_queries(some_targets([7, 150]), CLASSES, QUERIES, an_embedding())
    assert (got.groups, got.queries) == (1, 300)
    assert [len(p) for p in got.positives] == [7, 150]


@pytest.mark.parametrize(("counts", "num_denoising"), [([0, 0], 100), ([3, 1], 0)])
def test_nothing_to_denoise(counts: list[int], num_denoising: int) -> None:
    embedding = an_embedding()
    before = torch.get_rng_state()
    assert make_queries(some_targets(counts), CLASSES, QUERIES, embedding, num_denoising=num_denoising) is None
    assert torch.equal(torch.get_rng_state(), before)


def test_where_randomness_comes_from() -> None:
    embedding = an_embedding()

    def queries(draws: Draws | torch.Generator | None) -> torch.Tensor:
        return make_queries(some_targets([3, 2]), CLASSES, QUERIES, embedding, num_denoising=9, draws=draws).box_unact

    a, b = queries(torch.Generator().manual_seed(1)), queries(torch.Generator().manual_seed(1))
    assert torch.equal(a, b)
    torch.manual_seed(1)
    assert torch.equal(queries(None), a)
    assert not torch.equal(queries(None), a)
    g = torch.Generator().manual_seed(1)
    assert torch.equal(queries(draw(2, 18, CLASSES, g)), a)


def test_order_and_range_of_draws() -> None:
    got = draw(2, 500, CLASSES, torch.Generator().manual_seed(4))
    g = torch.Generator().manual_seed(4)
    assert torch.equal(got.u_label, torch.rand(2, 500, generator=g))
    assert torch.equal(got.new_label, torch.randint(CLASSES, (2, 500), generator=g))
    assert torch.equal(got.sign01, torch.randint(2, (2, 500, 4), generator=g))
    assert torch.equal(got.u_box, torch.rand(2, 500, 4, generator=g))


def test_draws_for_another_batch_are_refused() -> None:
    with pytest.raises(ValueError, match=r"u_label \(2, 10\).*\(2, 18\)"):
        make_queries(some_targets([3, 2]), CLASSES, QUERIES, an_embedding(), num_denoising=9,
                     draws=draw(2, 10, CLASSES))


@pytest.mark.parametrize("field", ["u_label", "new_label", "sign01", "u_box"])
def test_every_draw_must_fit(field: str) -> None:
    draws = draw(2, 18, CLASSES)
    with pytest.raises(ValueError, match=rf"{field} \(1, 18"):
        make_queries(some_targets([3, 2]), CLASSES, QUERIES, an_embedding(), num_denoising=9,
                     draws=dataclasses.replace(draws, **{field: getattr(draws, field)[:1]}))


def test_gradients_reach_the_classes_but_not_the_padding() -> None:
    embedding = an_embedding()
    draws = draw(2, 6, CLASSES, torch.Generator().manual_seed(0))
    got = make_queries(some_targets([3, 1]), CLASSES, QUERIES, embedding, num_denoising=3, draws=draws,
                       label_noise_ratio=0)
    got.content.sum().backward()
    # Each object twice: as a positive and as a negative.
    counted = torch.cat([t["labels"] for t in some_targets([3, 1])]).bincount(minlength=CLASSES + 1) * 2.0
    assert torch.equal(embedding.weight.grad[:, 0], counted)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_types(dtype: torch.dtype) -> None:
    got = make_queries(some_targets([2]), CLASSES, QUERIES, an_embedding().to(dtype), num_denoising=4)
    assert got.content.dtype == dtype
    assert got.box_unact.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert got.box_unact.isfinite().all()
