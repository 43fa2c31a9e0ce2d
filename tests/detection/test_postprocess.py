from __future__ import annotations

import pytest
import torch
from detr_cases import Golden, a_head

from adn.models.rtdetr.postprocess import postprocess


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_is_the_references(dtype: torch.dtype, golden, seeded) -> None:
    manifest, arrays = golden("rtdetr_postprocess")
    [config] = manifest["configs"]
    outputs = Golden(seeded, manifest["seed"], dtype=dtype).head("full", 2, 30)
    sizes = torch.tensor(config["orig_target_sizes_wh"])
    rows = postprocess(outputs, sizes, config["num_top_queries"])
    assert len(rows) == 2
    for i, row in enumerate(rows):
        for name, value in row.items():
            torch.testing.assert_close(value, torch.from_numpy(arrays[f"{name}/{i}"]), **manifest["tolerance"],
                                       check_dtype=dtype == torch.float32, msg=lambda m, at=(i, name): f"{at}: {m}")


@pytest.mark.parametrize(("queries", "classes", "top"), [(4, 3, 5), (4, 3, 12), (4, 3, 100), (4, 1, 3), (1, 1, 300)])
def test_is_the_definition(queries: int, classes: int, top: int) -> None:
    outputs = {k: v.detach() for k, v in a_head(2, queries, classes, torch.Generator().manual_seed(0)).items()}
    sizes = [(640, 480), (33, 500)]
    got = postprocess(outputs, sizes, top)
    for i, ((width, height), row) in enumerate(zip(sizes, got, strict=True)):
        every = sorted(((outputs["pred_logits"][i, q, c].sigmoid().item(), q, c) for q in range(queries)
                        for c in range(classes)), reverse=True)[:top]
        assert row["scores"].tolist() == pytest.approx([score for score, _, _ in every])
        assert row["labels"].tolist() == [c for _, _, c in every]
        assert row["labels"].dtype == torch.int64
        for box, (_, q, _) in zip(row["boxes"], every, strict=True):
            x, y, w, h = outputs["pred_boxes"][i, q].tolist()
            expected = [(x - w / 2) * width, (y - h / 2) * height, (x + w / 2) * width, (y + h / 2) * height]
            assert box.tolist() == pytest.approx(expected)


def test_sizes_in_any_form() -> None:
    outputs = a_head(2, 4, 3, torch.Generator().manual_seed(0))
    expected = postprocess(outputs, torch.tensor([[640, 480], [33, 500]]))
    for sizes in ([[640, 480], [33, 500]], [torch.tensor([640, 480]), torch.tensor([33, 500])],
                  torch.tensor([[640, 480], [33, 500]], dtype=torch.int32)):
        for a, b in zip(postprocess(outputs, sizes), expected, strict=True):
            assert torch.equal(a["boxes"], b["boxes"])


def test_sizes_that_do_not_fit() -> None:
    outputs = a_head(2, 4, 3, torch.Generator().manual_seed(0))
    for sizes in ([(640, 480)], (640, 480), torch.zeros(3, 2), []):
        with pytest.raises(ValueError, match="for a batch of 2"):
            postprocess(outputs, sizes)
    assert postprocess(a_head(0, 4, 3, torch.Generator()), []) == []


def test_half_precision_scores_in_float32() -> None:
    outputs = {k: v.detach().half() for k, v in a_head(1, 4, 3, torch.Generator().manual_seed(0)).items()}
    [row] = postprocess(outputs, [(5000, 4001)])
    [wide] = postprocess({k: v.float() for k, v in outputs.items()}, [(5000, 4001)])
    for name, value in row.items():
        assert torch.equal(value, wide[name])
