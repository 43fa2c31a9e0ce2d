from __future__ import annotations

import math
import warnings

import pytest
import torch
import torch.distributed as dist
from conftest import in_two_processes
from detr_cases import Golden, leaves, some_outputs, some_targets
from torchvision.ops import box_convert, box_iou, generalized_box_iou

from adn.models.rtdetr.criterion import DetectionLoss, DistillationLoss, pooled_feature_kl
from adn.models.rtdetr.denoising import Denoising
from adn.models.rtdetr.matcher import Matcher

NONE = torch.empty(0)


class TestReference:
    """The fixture was computed in float64 and stored as float32."""

    @pytest.fixture(params=[torch.float64, torch.float32], ids=str)
    def case(self, request: pytest.FixtureRequest, golden, seeded) -> tuple[dict, dict, Golden]:
        manifest, arrays = golden("anydepth_rtdetr_criterion")
        return manifest, arrays, Golden(seeded, manifest["seed"], manifest["num_classes"], request.param)

    @staticmethod
    def outputs(manifest: dict, of: Golden, tag: str) -> dict:
        batch, queries, counts = manifest["batch"], manifest["queries"], manifest["targets_per_image"]
        period = 2 * max(counts)
        positives = [torch.tensor([period * g + k for g in range(manifest["dn_groups"]) for k in range(n)])
                     for n in counts]
        shapes = {"backbone": [(6, 8, 8), (12, 4, 4), (24, 2, 2)], "encoder": [(8, 8, 8), (8, 4, 4), (8, 2, 2)]}
        return {
            **of.head(tag, batch, queries, grad=True),
            "aux_outputs": [of.head(f"{tag}.aux{i}", batch, queries, grad=True) for i in range(manifest["n_aux"])],
            "dn_aux_outputs": [of.head(f"{tag}.dn{i}", batch, manifest["dn_queries"], grad=True)
                               for i in range(manifest["n_dn"])],
            "dn_meta": Denoising(NONE, NONE, NONE, positives, manifest["dn_groups"], manifest["dn_queries"]),
            **{f"{part}_features": [of.of(f"{tag}.{part}{i}", batch, *shape).to(of.dtype).requires_grad_()
                                    for i, shape in enumerate(shapes[part])] for part in shapes},
        }

    @staticmethod
    def compare(terms: dict, outputs: dict, arrays: dict, tolerance: dict, tag: str) -> None:
        expected = {name.removeprefix(f"{tag}/loss/"): value for name, value in arrays.items()
                    if name.startswith(f"{tag}/loss/")}
        assert terms.keys() == expected.keys()
        total = sum(terms.values())
        total.backward()
        found = leaves(outputs)
        got = {f"{tag}/loss/{name}": value for name, value in terms.items()} | {f"{tag}/total": total}
        for key in arrays:
            if key.startswith(f"{tag}/") and "/grad_" in key:
                of_head = {"aux0": "aux_outputs0.", "dn0": "dn_aux_outputs0."}.get(key.split("/")[1], "")
                what = key.rsplit("grad_", 1)[1]
                name = {"logits": "pred_logits", "boxes": "pred_boxes"}.get(what, f"{what[:-1]}_features{what[-1]}")
                got[key] = found[of_head + name].grad
        assert len(got) >= len(expected) + 7
        for key, value in got.items():
            torch.testing.assert_close(value.float(), torch.from_numpy(arrays[key]), **tolerance,
                                       msg=lambda m, key=key: f"{key}: {m}")

    def test_plain(self, case: tuple[dict, dict, Golden]) -> None:
        manifest, arrays, of = case
        outputs, targets = self.outputs(manifest, of, "full"), of.targets(manifest["targets_per_image"])
        self.compare(DetectionLoss()(outputs, targets), outputs, arrays, manifest["tolerance"], "full")

    def test_distillation(self, case: tuple[dict, dict, Golden]) -> None:
        manifest, arrays, of = case
        base, teacher = (self.outputs(manifest, of, tag) for tag in ("base", "full"))
        terms = DistillationLoss()(base, of.targets(manifest["targets_per_image"]), teacher)
        self.compare(terms, base, arrays, manifest["tolerance"], "kd")
        assert all(leaf.grad is None for leaf in leaves(teacher).values())

    @pytest.mark.parametrize(("tag", "key"), [("full", "full/match"), ("base", "kd/match_base")])
    def test_matching(self, tag: str, key: str, case: tuple[dict, dict, Golden]) -> None:
        manifest, arrays, of = case
        pairs = Matcher().match(self.outputs(manifest, of, tag), of.targets(manifest["targets_per_image"]))
        for i, (query, index) in enumerate(pairs):
            assert query.tolist() == arrays[f"{key}_query/{i}"].tolist()
            assert index.tolist() == arrays[f"{key}_target/{i}"].tolist()

    @pytest.mark.parametrize("part", ["backbone", "encoder"])
    def test_features_of_a_batch_of_one(self, part: str, case: tuple[dict, dict, Golden]) -> None:
        """The reference divides by the number of channels there; the mean over the batch is what is meant."""
        manifest, arrays, of = case
        base, teacher = ([map[:1] for map in self.outputs(manifest, of, tag)[f"{part}_features"]]
                         for tag in ("base", "full"))
        got = pooled_feature_kl(teacher, base)
        channels = sum(map.shape[1] for map in base)
        t, s = (torch.cat([map.mean((2, 3)) for map in maps], 1).softmax(1) for maps in (teacher, base))
        torch.testing.assert_close(got, (t * (t / s).log()).sum())
        torch.testing.assert_close(got / channels, torch.tensor(
            arrays[f"kd_batch1_reference/loss_features_{part}_kd"], dtype=of.dtype), **manifest["tolerance"])


def head_by_definition(head: dict, pairs: list, targets: list[dict], num_boxes: float) -> dict[str, torch.Tensor]:
    """Weighted terms of a head, one pair after the other."""
    logits, boxes = head["pred_logits"], head["pred_boxes"]
    quality = torch.zeros_like(logits)
    weight = 0.75 * logits.sigmoid() ** 2
    l1 = giou = torch.zeros((), dtype=boxes.dtype)
    for b, (query, index) in enumerate(pairs):
        for q, k in zip(query.tolist(), index.tolist(), strict=True):
            wanted = targets[b]["boxes"][k].to(boxes)
            corners = [box_convert(x[None], "cxcywh", "xyxy") for x in (boxes[b, q], wanted)]
            label = targets[b]["labels"][k]
            quality[b, q, label] = weight[b, q, label] = box_iou(*corners)
            l1 = l1 + (boxes[b, q] - wanted).abs().sum()
            giou = giou + 1 - generalized_box_iou(*corners).sum()
    p, quality, weight = logits.sigmoid(), quality.detach(), weight.detach()
    vfl = -(weight * (quality * p.log() + (1 - quality) * (1 - p).log())).sum()
    return {"vfl": vfl / num_boxes, "bbox": 5 * l1 / num_boxes, "giou": 2 * giou / num_boxes}


def ground_truth_by_definition(outputs: dict, targets: list[dict]) -> dict[str, torch.Tensor]:
    num_boxes = max(1, sum(len(t["labels"]) for t in targets))
    heads = {"": outputs} | {f"_aux_{i}": head for i, head in enumerate(outputs["aux_outputs"])}
    terms = {}
    for suffix, head in heads.items():
        pairs = Matcher().match(head, targets)
        terms |= {f"loss_{k}{suffix}": v for k, v in head_by_definition(head, pairs, targets, num_boxes).items()}
    for i, head in enumerate(outputs.get("dn_aux_outputs", ())):
        meta = outputs["dn_meta"]
        pairs = [(p, torch.arange(len(t["labels"])).repeat(meta.groups))
                 for p, t in zip(meta.positives, targets, strict=True)]
        of_head = head_by_definition(head, pairs, targets, num_boxes * meta.groups)
        terms |= {f"loss_{k}_dn_{i}": v for k, v in of_head.items()}
    return terms


def assert_same(got: dict, expected: dict, outputs: dict) -> None:
    """Terms, and gradients of their sum."""
    assert got.keys() == expected.keys()
    for name, value in got.items():
        assert value.ndim == 0
        torch.testing.assert_close(value, expected[name], msg=lambda m, name=name: f"{name}: {m}")
    found = leaves(outputs)
    gradients = [torch.autograd.grad(sum(t.values()), list(found.values()), allow_unused=True, retain_graph=True)
                 for t in (got, expected)]
    for name, a, b in zip(found, *gradients, strict=True):
        if a is not None or b is not None:
            a, b = (torch.zeros_like(found[name]) if g is None else g for g in (a, b))
            torch.testing.assert_close(a, b, msg=lambda m, name=name: f"gradient of {name}: {m}")


@pytest.mark.parametrize("counts", [[3, 1], [0, 4, 2], [9, 2, 12], [0, 0]], ids=str)
@pytest.mark.parametrize("layers", [0, 1, 3])
def test_plain_is_the_definition(counts: list[int], layers: int) -> None:
    targets = some_targets(counts)
    outputs = some_outputs(targets, queries=7, layers=layers)
    got = DetectionLoss()(outputs, targets)
    assert len(got) == 3 * (1 + layers + (layers if any(counts) else 0))
    assert_same(got, ground_truth_by_definition(outputs, targets), outputs)


def distillation_by_definition(base: dict, targets: list[dict], teacher: dict, class_kl: str) -> dict:
    num_boxes = max(1, sum(len(t["labels"]) for t in targets))
    queries, classes = base["pred_logits"].shape[1:]
    terms = {name: torch.zeros(()).double() for name in ("loss_vfl_kd", "loss_bbox_kd", "loss_giou_kd")}
    owners = [[{k: q for q, k in zip(query.tolist(), index.tolist(), strict=True)} for query, index in
               Matcher().match(outputs, targets)] for outputs in (base, teacher)]
    for b, (of_base, of_teacher) in enumerate(zip(*owners, strict=True)):
        for k in of_base.keys() & of_teacher.keys():
            (s, s_box), (t, t_box) = ((outputs["pred_logits"][b, q], outputs["pred_boxes"][b, q])
                                      for outputs, q in ((base, of_base[k]), (teacher, of_teacher[k])))
            t, t_box = t.detach(), t_box.detach()
            if class_kl == "sigmoid":
                kl = sum(p * (p / q).log() for p, q in ((t.sigmoid(), s.sigmoid()), (1 - t.sigmoid(), 1 - s.sigmoid())))
                kl = kl.sum()
            else:
                kl = (t.softmax(0) * (t.softmax(0) / s.softmax(0)).log()).sum()
                kl = kl * queries / classes if class_kl == "softmax-mean" else kl
            corners = [box_convert(x[None], "cxcywh", "xyxy") for x in (s_box, t_box)]
            terms["loss_vfl_kd"] = terms["loss_vfl_kd"] + kl / num_boxes
            terms["loss_bbox_kd"] = terms["loss_bbox_kd"] + 5 * (s_box - t_box).abs().sum() / num_boxes
            terms["loss_giou_kd"] = (terms["loss_giou_kd"]
                                     + 2 * (1 - generalized_box_iou(*corners).sum()) / num_boxes)
    for part in ("backbone_features", "encoder_features"):
        t, s = (torch.cat([map.mean((2, 3)) for map in outputs[part]], 1).softmax(1) for outputs in (teacher, base))
        terms[f"loss_{'_'.join(reversed(part.split('_')))}_kd"] = (
            t.detach() * (t.detach() / s).log()).sum(1).mean()
    return terms


@pytest.mark.parametrize("class_kl", ["softmax-mean", "softmax", "sigmoid"])
@pytest.mark.parametrize("counts", [[3, 1], [0, 4, 2], [9, 2, 12], [0, 0], [2]], ids=str)
def test_distillation_is_the_definition(counts: list[int], class_kl: str) -> None:
    targets = some_targets(counts)
    base, teacher = some_outputs(targets, seed=1), some_outputs(targets, seed=2)
    got = DistillationLoss(class_kl=class_kl)(base, targets, teacher)
    expected = ground_truth_by_definition(base, targets)
    last = {name: expected.pop(name) for name in ("loss_vfl", "loss_bbox", "loss_giou")}
    distilled = distillation_by_definition(base, targets, teacher, class_kl)
    assert_same(got, distilled | expected, base)
    # An optional part: the last layer's own losses.
    got = DistillationLoss(class_kl=class_kl, ground_truth=True)(base, targets, teacher)
    assert_same(got, distilled | last | expected, base)


def test_pairs_are_of_the_same_object_where_queries_are_fewer() -> None:
    """Five objects, three queries: the nets leave out different objects."""
    boxes = torch.tensor([[0.1 + 0.2 * i, 0.5, 0.1, 0.1] for i in range(5)], dtype=torch.float64)
    targets = [{"labels": torch.arange(5), "boxes": boxes}]
    logits = torch.full((1, 3, 5), -3.0).double()
    base = {"pred_logits": logits, "pred_boxes": boxes[None, [2, 0, 1]]}
    teacher = {"pred_logits": logits + torch.randn(1, 3, 5), "pred_boxes": boxes[None, [4, 2, 3]] + 0.01}
    terms = DistillationLoss(kd_weights={"features_backbone": 0, "features_encoder": 0})(base, targets, teacher)
    # Object 2 alone is owned in both; its boxes differ by 0.01 four times.
    assert float(terms["loss_bbox_kd"]) == pytest.approx(5 * 0.04 / 5)


def test_counts_of_terms_of_six_layers() -> None:
    targets = some_targets([2, 1])
    outputs = some_outputs(targets, layers=6)
    assert len(DetectionLoss()(outputs, targets)) == 39
    assert len(DistillationLoss()(outputs, targets, outputs)) == 41


def test_nothing_to_distil_from_oneself() -> None:
    targets = some_targets([2, 3])
    outputs = some_outputs(targets)
    for class_kl in ("softmax-mean", "softmax", "sigmoid"):
        terms = DistillationLoss(class_kl=class_kl)(outputs, targets, some_outputs(targets))
        assert all(value.abs() < 1e-12 for name, value in terms.items() if name.endswith("_kd"))


def test_a_base_of_fewer_layers() -> None:
    targets = some_targets([2, 3])
    base, teacher = some_outputs(targets, layers=2), some_outputs(targets, layers=5, seed=1)
    terms = DistillationLoss()(base, targets, teacher)
    assert len(terms) == 5 + 3 * 2 + 3 * 2


def test_images_of_the_teacher_of_another_size() -> None:
    targets = some_targets([2, 3])
    base, teacher = some_outputs(targets), some_outputs(targets, seed=1)
    larger = dict(teacher)
    for part in ("backbone_features", "encoder_features"):
        larger[part] = [map.repeat_interleave(2, 2) for map in teacher[part]]
    a, b = (DistillationLoss()(base, targets, t) for t in (teacher, larger))
    for name in a:
        torch.testing.assert_close(a[name], b[name])


def test_weights() -> None:
    targets = some_targets([2, 3])
    base, teacher = some_outputs(targets), some_outputs(targets, seed=1)
    default = DistillationLoss()(base, targets, teacher)
    other = DistillationLoss(weights={"bbox": 10}, kd_weights={"vfl": 3, "features_backbone": 0})(
        base, targets, teacher)
    assert default.keys() - other.keys() == {"loss_features_backbone_kd"}
    for name, value in other.items():
        factor = 2 if name.startswith("loss_bbox_aux") or name.startswith("loss_bbox_dn") else (
            3 if name == "loss_vfl_kd" else 1)
        torch.testing.assert_close(value, factor * default[name])
    del base["backbone_features"], teacher["backbone_features"]
    DistillationLoss(kd_weights={"features_backbone": 0})(base, targets, teacher)


def test_refused() -> None:
    with pytest.raises(ValueError, match=r"\['l1'\].*'bbox'"):
        DetectionLoss(weights={"l1": 2})
    with pytest.raises(ValueError, match="features_encoder"):
        DistillationLoss(kd_weights={"features": 2})
    with pytest.raises(ValueError, match="'softmax-mean'"):
        DistillationLoss(class_kl="mean")


def test_targets_of_other_images() -> None:
    targets = some_targets([2, 1, 3])
    outputs = some_outputs(targets)
    with pytest.raises(ValueError, match="targets of 2 images for a batch of 3"):
        DetectionLoss()(outputs, targets[:2])
    with pytest.raises(ValueError, match="targets of 2 images for a batch of 3"):
        DistillationLoss()(outputs, targets[:2], outputs)


def test_no_object_in_the_whole_batch() -> None:
    targets = some_targets([0, 0, 0])
    base, teacher = some_outputs(targets), some_outputs(targets, seed=1)
    for terms in (DetectionLoss()(base, targets), DistillationLoss()(base, targets, teacher)):
        for name, value in terms.items():
            assert (value > 0) == ("vfl" in name.replace("vfl_kd", "") or "features" in name), name
        assert not any("dn" in name for name in terms)
        gradients = torch.autograd.grad(sum(terms.values()), list(leaves(base).values()), allow_unused=True)
        assert all(g is None or g.isfinite().all() for g in gradients)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    targets = some_targets([3, 1])
    base, teacher = (some_outputs(targets, seed=s, dtype=torch.float32) for s in (1, 2))

    def to(value: object, dtype: torch.dtype) -> object:
        if torch.is_tensor(value):
            return value.detach().to(dtype)
        if isinstance(value, list):
            return [to(v, dtype) for v in value]
        return {k: to(v, dtype) for k, v in value.items()} if isinstance(value, dict) else value

    half = [to(outputs, dtype) for outputs in (base, teacher)]
    wide = [to(outputs, torch.float32) for outputs in half]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = DistillationLoss()(half[0], targets, half[1]) | DetectionLoss()(half[0], targets)
    expected = DistillationLoss()(wide[0], targets, wide[1]) | DetectionLoss()(wide[0], targets)
    for name, value in got.items():
        assert value.dtype == torch.float32
        assert torch.equal(value, expected[name]), name


def test_certain_logits_stay_finite() -> None:
    targets = some_targets([2])
    outputs = some_outputs(targets, dtype=torch.float32)
    with torch.no_grad():
        outputs["pred_logits"][0, ::2] = 200
        outputs["pred_logits"][0, 1::2] = -200
    teacher = dict(outputs, pred_logits=-outputs["pred_logits"])
    for class_kl in ("softmax-mean", "sigmoid"):
        terms = DetectionLoss()(outputs, targets) | DistillationLoss(class_kl=class_kl)(outputs, targets, teacher)
        assert all(value.isfinite() for value in terms.values())
        [gradient] = torch.autograd.grad(sum(terms.values()), outputs["pred_logits"])
        assert gradient.isfinite().all()


def test_gradients_are_the_derivatives() -> None:
    """What the losses hold constant (IoU as a score, the weights of background) is not, for differences."""
    targets = some_targets([2, 1], classes=3)
    base, teacher = some_outputs(targets, queries=4, classes=3, layers=1), some_outputs(targets, 4, 3, 1, seed=1)
    found = {k: v for k, v in leaves(base).items() if "aux" not in k}

    def distilled(*inputs: torch.Tensor) -> torch.Tensor:
        outputs = dict(base, **{k: v for k, v in zip(found, inputs) if "features" not in k})
        for part in ("backbone_features", "encoder_features"):
            outputs[part] = [v for k, v in zip(found, inputs) if k.startswith(part)]
        terms = DistillationLoss(class_kl="sigmoid")(outputs, targets, teacher)
        return sum(value for name, value in terms.items() if name.endswith("_kd"))

    assert torch.autograd.gradcheck(distilled, list(found.values()))

    def boxes(pred_boxes: torch.Tensor) -> torch.Tensor:
        terms = DetectionLoss()(dict(base, pred_boxes=pred_boxes), targets)
        return terms["loss_bbox"] + terms["loss_giou"]

    assert torch.autograd.gradcheck(boxes, base["pred_boxes"])


def test_diverged_predictions_name_the_head() -> None:
    targets = some_targets([2, 1])
    base, teacher = some_outputs(targets), some_outputs(targets, seed=1)
    with torch.no_grad():
        base["aux_outputs"][1]["pred_boxes"][0] = math.nan
    with pytest.raises(FloatingPointError, match=r"\(aux_1\)"):
        DetectionLoss()(base, targets)
    with pytest.raises(FloatingPointError, match=r"\(aux_1\)"):
        DistillationLoss()(base, targets, teacher)
    with pytest.raises(FloatingPointError, match="super-net"):
        DistillationLoss()(teacher, targets, dict(teacher, pred_logits=teacher["pred_logits"] * math.nan))


def processes(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    targets = some_targets([4, 1] if rank else [0, 2])
    outputs = some_outputs(targets)
    terms = DetectionLoss()(outputs, targets) | DistillationLoss()(outputs, targets, some_outputs(targets, seed=3))
    torch.save(({name: value.detach() for name, value in terms.items()}), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_objects_are_counted_over_processes(tmp_path) -> None:
    """5 and 2 objects: 3.5 each."""
    in_two_processes(processes, str(tmp_path))
    for rank, (counts, own) in enumerate((([0, 2], 2), ([4, 1], 5))):
        targets = some_targets(counts)
        outputs = some_outputs(targets)
        alone = DetectionLoss()(outputs, targets) | DistillationLoss()(outputs, targets, some_outputs(targets, seed=3))
        got = torch.load(tmp_path / f"{rank}.pt")
        for name, value in got.items():
            factor = 1 if "features" in name else own / 3.5
            torch.testing.assert_close(value, factor * alone[name].detach(), msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu() -> None:
    """What the CPU computes; the host waits once, for the costs of all heads."""
    targets = some_targets([3, 0, 9])
    base, teacher = some_outputs(targets), some_outputs(targets, seed=1)

    def there(value: object) -> object:
        if torch.is_tensor(value):
            return value.detach().cuda().requires_grad_()
        if isinstance(value, list):
            return [there(v) for v in value]
        return {k: there(v) for k, v in value.items()} if isinstance(value, dict) else value

    losses = (lambda a, b: DetectionLoss()(a, targets), lambda a, b: DistillationLoss()(a, targets, b))
    for loss in losses:
        on_gpu, of_super = there(base), there(teacher)
        with warnings.catch_warnings(record=True) as waits:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            terms = loss(on_gpu, of_super)
            torch.cuda.set_sync_debug_mode("default")
        assert sum("synchroniz" in str(w.message) for w in waits) == 1
        expected = loss(base, teacher)
        for name, value in terms.items():
            torch.testing.assert_close(value.cpu(), expected[name])
        sum(terms.values()).backward()
        gradients = torch.autograd.grad(sum(expected.values()), list(leaves(base).values()), allow_unused=True)
        for value, gradient in zip(leaves(on_gpu).values(), gradients, strict=True):
            if gradient is not None:
                torch.testing.assert_close(value.grad.cpu(), gradient)
