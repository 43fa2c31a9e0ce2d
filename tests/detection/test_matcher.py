from __future__ import annotations

import itertools
import pickle
import sys

import pytest
import torch
from detr_cases import a_head, some_targets
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment
from torchvision.ops import box_convert, box_iou, generalized_box_iou

from adn.detect.boxes import inverse_sigmoid, iou_and_giou
from adn.detect.targets import pack
from adn.models.rtdetr.matcher import Matcher


def cost_by_definition(
    outputs: dict, image: int, target: dict, alpha: float = 0.25, gamma: float = 2.0
) -> torch.Tensor:
    """(Q, n)"""
    p = outputs["pred_logits"][image].double().sigmoid()[:, target["labels"]]
    boxes, wanted = outputs["pred_boxes"][image].double(), target["boxes"].double()
    focal = alpha * (1 - p) ** gamma * -(p + 1e-8).log() - (1 - alpha) * p**gamma * -(1 - p + 1e-8).log()
    l1 = torch.cdist(boxes, wanted, p=1)
    giou = generalized_box_iou(box_convert(boxes, "cxcywh", "xyxy"), box_convert(wanted, "cxcywh", "xyxy"))
    return 2 * focal + 5 * l1 - 2 * giou


def least_total(cost: torch.Tensor) -> float:
    """By trying every assignment."""
    rows, columns = cost.shape if cost.shape[0] <= cost.shape[1] else cost.mT.shape
    cost = cost if cost.shape[0] <= cost.shape[1] else cost.mT
    return min(sum(float(cost[r, c]) for r, c in zip(range(rows), chosen))
               for chosen in itertools.permutations(range(columns), rows))


@settings(max_examples=40, deadline=None)
@given(counts=st.lists(st.integers(0, 6), min_size=1, max_size=4), queries=st.integers(1, 5),
       classes=st.integers(1, 4), seed=st.integers(0, 1000))
def test_is_the_cheapest_of_all_assignments(counts: list[int], queries: int, classes: int, seed: int) -> None:
    targets = some_targets(counts, classes, seed)
    outputs = a_head(len(counts), queries, classes, torch.Generator().manual_seed(seed))
    pairs = Matcher().match(outputs, targets)
    assert len(pairs) == len(counts)
    for image, (query, index) in enumerate(pairs):
        assert query.dtype == index.dtype == torch.int64
        assert query.shape == index.shape == (min(counts[image], queries),)
        assert query.tolist() == sorted(set(query.tolist()))
        assert len(set(index.tolist())) == len(index)
        if counts[image]:
            cost = cost_by_definition(outputs, image, targets[image]).detach()
            assert float(cost[query, index].sum()) == pytest.approx(least_total(cost), abs=1e-6)


@pytest.mark.parametrize(("alpha", "gamma"), [(0.25, 2.0), (0.6, 2.0), (0.25, 0.5)])
def test_many_objects(alpha: float, gamma: float) -> None:
    """So many that the assignment depends on each detail of the cost."""
    targets = some_targets([60, 35])
    outputs = a_head(2, 70, 5, torch.Generator().manual_seed(0))
    seen = Matcher(alpha=alpha, gamma=gamma).match(outputs, targets)
    for image, (query, index) in enumerate(seen):
        cost = cost_by_definition(outputs, image, targets[image], alpha, gamma).detach()
        rows, columns = linear_sum_assignment(cost)
        assert query.tolist() == rows.tolist()
        assert index.tolist() == columns.tolist()


def test_weights_are_honoured() -> None:
    """Each cost alone, where the three disagree about which query is best."""
    target = [{"labels": torch.tensor([1]), "boxes": torch.tensor([[0.5, 0.5, 0.1, 0.1]])}]
    outputs = {
        "pred_logits": torch.tensor([[[0.0, 4.0], [0.0, 0.0], [0.0, 0.0]]]),
        # The second is nearer in L1, the third overlaps.
        "pred_boxes": torch.tensor([[[0.1, 0.1, 0.1, 0.1], [0.61, 0.5, 0.1, 0.1], [0.5, 0.5, 0.3, 0.3]]]),
    }
    for weights, expected in (((1, 0, 0), 0), ((0, 1, 0), 1), ((0, 0, 1), 2)):
        [(query, _)] = Matcher(*weights).match(outputs, target)
        assert query.tolist() == [expected], weights


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_floating_type(dtype: torch.dtype) -> None:
    targets = some_targets([3, 0, 2])
    outputs = {k: v.detach().to(dtype) for k, v in a_head(3, 6, 5, torch.Generator().manual_seed(1)).items()}
    exact = {k: v.double() for k, v in outputs.items()}
    matcher = Matcher()
    for (a, b), (c, d) in zip(matcher.match(outputs, targets), matcher.match(exact, targets), strict=True):
        assert torch.equal(a, c)
        assert torch.equal(b, d)


def test_heads_together_are_the_heads_one_by_one() -> None:
    targets = some_targets([3, 0, 9, 1])
    g = torch.Generator().manual_seed(2)
    heads = [a_head(4, 6, 5, g) for _ in range(4)]
    logits, boxes = (torch.stack([h[k] for h in heads]) for k in ("pred_logits", "pred_boxes"))
    matcher = Matcher()
    pairs = matcher.match_heads(logits, boxes, pack(targets, logits.device, boxes.dtype))
    assert pairs.image.tolist() == [0] * 3 + [2] * 6 + [3]
    first = [0, 3, 3, 12]
    for i, head in enumerate(heads):
        alone = matcher.match(head, targets)
        assert torch.equal(pairs.query[i], torch.cat([q for q, _ in alone]))
        assert torch.equal(pairs.object[i], torch.cat([k + first[b] for b, (_, k) in enumerate(alone)]))


@pytest.mark.parametrize("what", ["pred_logits", "pred_boxes"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_predictions_that_are_not_finite(what: str, value: float) -> None:
    targets = some_targets([2, 2])
    g = torch.Generator().manual_seed(0)
    heads = [{k: v.detach() for k, v in a_head(2, 4, 5, g).items()} for _ in range(3)]
    heads[1][what][1, 3] = value
    logits, boxes = (torch.stack([h[k] for h in heads]) for k in ("pred_logits", "pred_boxes"))
    objects = pack(targets, logits.device, boxes.dtype)
    if what == "pred_logits" and value == torch.inf:
        Matcher().match_heads(logits, boxes, objects)  # a probability of one
        return
    with pytest.raises(FloatingPointError, match=r"not finite \(aux_0\)"):
        Matcher().match_heads(logits, boxes, objects, ["last layer", "aux_0", "aux_1"])
    with pytest.raises(FloatingPointError, match="head 0"):
        Matcher().match(heads[1], targets)


@pytest.mark.parametrize("label", [5, -1, 90])
def test_classes_that_the_detector_has_not(label: int) -> None:
    targets = some_targets([2, 2])
    targets[1]["labels"][0] = label
    with pytest.raises(ValueError, match=rf"classes \[{label}\].*0 to 4"):
        Matcher().match(a_head(2, 4, 5, torch.Generator()), targets)


def test_targets_that_are_not_finite_or_do_not_fit() -> None:
    targets = some_targets([2, 2])
    targets[1]["boxes"][1, 2] = torch.nan
    outputs = a_head(2, 4, 5, torch.Generator())
    with pytest.raises(ValueError, match="image 1 have boxes that are not finite"):
        Matcher().match(outputs, targets)
    targets[1]["boxes"] = torch.rand(3, 4)
    with pytest.raises(ValueError, match=r"image 1: labels \(2,\) and boxes \(3, 4\)"):
        Matcher().match(outputs, targets)


@pytest.mark.parametrize("images", [0, 1, 3])
def test_targets_of_other_images(images: int) -> None:
    with pytest.raises(ValueError, match=rf"targets of {images} images for a batch of 2"):
        Matcher().match(a_head(2, 4, 5, torch.Generator()), some_targets([1] * images))
    with pytest.raises(ValueError, match="at least one image"):
        Matcher().match(a_head(0, 4, 5, torch.Generator()), [])


def test_scipy_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(ImportError, match=r'pip install "adn\[detect\]"'):
        Matcher()


def test_can_be_sent_to_another_process() -> None:
    outputs, targets = a_head(1, 4, 5, torch.Generator()), some_targets([2])
    matcher = Matcher(cost_bbox=1.0)
    [(a, _)], [(b, _)] = (m.match(outputs, targets) for m in (matcher, pickle.loads(pickle.dumps(matcher))))
    assert torch.equal(a, b)


class TestBoxes:
    def test_overlaps_are_torchvisions(self) -> None:
        a, b = (torch.rand(50, 4, dtype=torch.float64) * 0.5 for _ in range(2))
        b[:20] = a[:20] + 0.02 * torch.randn(20, 4)
        b = b.clamp(min=0.01)
        a_corners, b_corners = (box_convert(x, "cxcywh", "xyxy") for x in (a, b))
        iou, giou = iou_and_giou(a[:, None], b)
        torch.testing.assert_close(giou, generalized_box_iou(a_corners, b_corners))
        torch.testing.assert_close(iou, box_iou(a_corners, b_corners))
        torch.testing.assert_close(iou.diag(), iou_and_giou(a, b)[0])

    def test_boxes_of_no_area(self) -> None:
        point = torch.tensor([[0.3, 0.3, 0.0, 0.0]], requires_grad=True)
        line = torch.tensor([[0.3, 0.3, 0.2, 0.0]], requires_grad=True)
        box = torch.tensor([[0.6, 0.6, 0.2, 0.2]])
        for a, b, expected in ((point, point.detach(), 0.0), (line, line.detach(), 0.0), (point, box, None),
                               (line, point, None)):
            iou, giou = iou_and_giou(a, b)
            assert iou == 0
            assert -1 <= giou <= 1
            assert expected is None or giou == expected
            [gradient] = torch.autograd.grad(giou.sum(), a)
            assert gradient.isfinite().all()

    def test_gradients(self) -> None:
        a = (torch.rand(6, 4, dtype=torch.float64) * 0.4 + 0.1).requires_grad_()
        b = torch.rand(6, 4, dtype=torch.float64) * 0.4 + 0.1
        assert torch.autograd.gradcheck(lambda a: iou_and_giou(a, b), a)

    def test_inverse_sigmoid(self) -> None:
        x = torch.linspace(0.01, 0.99, 9, dtype=torch.float64)
        torch.testing.assert_close(inverse_sigmoid(x).sigmoid(), x)
        ends = inverse_sigmoid(torch.tensor([-0.5, 0.0, 1.0, 1.5], dtype=torch.float64))
        torch.testing.assert_close(ends, torch.tensor([1e-5, 1e-5, 1e5, 1e5], dtype=torch.float64).log())
