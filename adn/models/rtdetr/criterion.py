"""The losses of RT-DETR, and of its any-depth form that learns from itself.

All heads of one kind are computed at once, stacked in a first dimension.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from ...detect.boxes import iou_and_giou, widened
from ...detect.targets import Objects, Targets, fitting, pack
from ...distill import distillation_kl, pool_features
from .denoising import Denoising
from .matcher import Matcher, Pairs
from .recipes import CLASS_KL

Outputs = Mapping[str, Any]

WEIGHTS = {"vfl": 1.0, "bbox": 5.0, "giou": 2.0}
DISTILLATION_WEIGHTS = {**WEIGHTS, "features_backbone": 1.0, "features_encoder": 1.0}


class _Criterion(nn.Module):
    """The ground-truth losses of any heads."""

    def __init__(self, matcher: Matcher | None = None, weights: Mapping[str, float] | None = None,
                 alpha: float = 0.75, gamma: float = 2.0) -> None:
        super().__init__()
        self.matcher = Matcher() if matcher is None else matcher
        self.weights = _weights(WEIGHTS, weights)
        self.alpha, self.gamma = alpha, gamma

    def _ground_truth(self, logits: torch.Tensor, boxes: torch.Tensor, pairs: Pairs, objects: Objects,
                      num_boxes: torch.Tensor | float, suffixes: Sequence[str]) -> dict[str, torch.Tensor]:
        """Weighted terms of all heads: logits (heads, B, Q, C), boxes (heads, B, Q, 4), a suffix for each."""
        at = torch.arange(len(logits), device=logits.device)[:, None], pairs.image, pairs.query
        matched, wanted = boxes[at], objects.boxes[pairs.object]
        iou, giou = iou_and_giou(matched, wanted)
        terms = {
            "vfl": self._varifocal(logits, (*at, objects.labels[pairs.object]), iou.detach()),
            "bbox": (matched - wanted).abs().sum((1, 2)),
            "giou": (1 - giou).sum(1),
        }
        terms = {name: (self.weights[name] / num_boxes * of_heads).unbind() for name, of_heads in terms.items()}
        return {f"loss_{name}{suffix}": terms[name][i] for i, suffix in enumerate(suffixes) for name in terms}

    def _varifocal(self, logits: torch.Tensor, at: tuple[torch.Tensor, ...], quality: torch.Tensor) -> torch.Tensor:
        """Of each head: the wanted score is `quality` (its IoU) at the class of a matched object, else 0."""
        score = torch.zeros_like(logits)
        weight = self.alpha * logits.detach().sigmoid() ** self.gamma
        score[at] = weight[at] = quality
        return F.binary_cross_entropy_with_logits(logits, score, weight, reduction="none").sum((1, 2, 3))

    def _denoising(self, outputs: Outputs, objects: Objects, num_boxes: torch.Tensor | float
                   ) -> dict[str, torch.Tensor]:
        """Terms of the denoising heads, whose queries belong to objects by construction."""
        if not outputs.get("dn_aux_outputs"):
            return {}
        meta: Denoising = outputs["dn_meta"]
        logits, boxes = _stacked(outputs["dn_aux_outputs"])
        pairs = _denoising_pairs(meta, objects.counts, len(logits)).to(logits.device)
        suffixes = [f"_dn_{i}" for i in range(len(logits))]
        return self._ground_truth(logits, boxes, pairs, objects, num_boxes * meta.groups, suffixes)


class DetectionLoss(_Criterion):
    """Losses against the ground truth: varifocal, L1 and generalised IoU, of every head.

        loss = DetectionLoss()
        terms = loss(net(images, targets), targets)
        sum(terms.values()).backward()

    With N = number of objects, averaged over the processes of a process group, at least 1, the terms of a head are

        vfl   sum of weight * BCE(logit, q) / N: q = IoU at the class of a matched query's object, else 0;
              weight = q there, else alpha * sigmoid(logit)^gamma; both constant
        bbox  sum over matched queries of |box - object| / N, cxcywh
        giou  sum over matched queries of (1 - GIoU) / N

    Heads: the last decoder layer; `aux_outputs`, each matched anew (suffix `_aux_0`, ...); `dn_aux_outputs` (`_dn_0`,
    ...), matched by construction, with N times the number of groups. Six decoder layers give 39 terms. Half precision
    is computed in float32.

    Args:
        matcher: None = `Matcher()`.
        weights: of `vfl`, `bbox`, `giou`, in place of 1, 5, 2; what is left out keeps its own.
        alpha, gamma: of the varifocal loss.

    Raises:
        ImportError: without SciPy, `pip install "adn[detect]"`.
        ValueError: unknown name of a weight.
    """

    def forward(self, outputs: Outputs, targets: Targets) -> dict[str, torch.Tensor]:
        """Weighted terms by name, scalars.

        Args:
            outputs: of a detector in training: `pred_logits` (B, Q, C) and `pred_boxes` (B, Q, 4) cxcywh 0..1;
                `aux_outputs`, `dn_aux_outputs` lists of such dicts, the latter with `dn_meta`, a `Denoising`.
            targets: one dict per image: `labels` int64 (n,), `boxes` (n, 4) cxcywh 0..1; n may be 0.

        Raises:
            FloatingPointError, ValueError: as `Matcher.match`.
        """
        suffixes = ["", *_aux_suffixes(outputs)]
        logits, boxes = _stacked([outputs, *outputs.get("aux_outputs", ())])
        objects = pack(fitting(targets, logits.shape[1]), logits.device, boxes.dtype)
        pairs = self.matcher.match_heads(logits, boxes, objects, _head_names(suffixes)).to(logits.device)
        num_boxes = _num_boxes(objects)
        return {**self._ground_truth(logits, boxes, pairs, objects, num_boxes, suffixes),
                **self._denoising(outputs, objects, num_boxes)}


class DistillationLoss(_Criterion):
    """Losses of the base-net, whose last layer learns from the super-net's, all other heads from the ground truth.

        loss = DistillationLoss()
        terms = loss(base_outputs, targets, super_outputs)

    Queries of the two nets that own the same object make a pair. With N as in `DetectionLoss`, s and t the outputs of
    base and super, the terms of the last layer are

        vfl_kd   sum over pairs of KL(softmax t || softmax s) / N * Q / C, by `class_kl`
        bbox_kd  sum over pairs of |box s - box t| / N
        giou_kd  sum over pairs of (1 - GIoU(box s, box t)) / N
        features_backbone_kd, features_encoder_kd
                 `pooled_feature_kl` of the three maps of each

    Aux and denoising heads: as in `DetectionLoss`. Six decoder layers give 41 terms. The super-net's outputs are
    constants, and may come from images of another size.

    The reference's `features_*_kd` of a batch of one image are these divided by the number of channels, a defect that
    is not repeated.

    Args:
        matcher: None = `Matcher()`.
        weights: of `vfl`, `bbox`, `giou` of aux and denoising heads, in place of 1, 5, 2.
        kd_weights: of `vfl`, `bbox`, `giou`, `features_backbone`, `features_encoder`, in place of 1, 5, 2, 1, 1. What
            has weight 0 is left out, and need not be among the outputs.
        class_kl: how classes are compared. "softmax-mean": as published, where a mean that was meant to go over queries
            goes over classes, hence the factor Q / C (300 / 80 = 3.75). "softmax": without that factor. "sigmoid":
            sum over classes of KL(sigmoid t || sigmoid s), each class by itself as the heads are trained.
        ground_truth: give the last layer the losses of `DetectionLoss` too (the published results do not).
        alpha, gamma: of the varifocal loss.

    Raises:
        ImportError: without SciPy, `pip install "adn[detect]"`.
        ValueError: unknown `class_kl`, or name of a weight.
    """

    def __init__(self, matcher: Matcher | None = None, weights: Mapping[str, float] | None = None,
                 kd_weights: Mapping[str, float] | None = None, class_kl: str = "softmax-mean",
                 ground_truth: bool = False, alpha: float = 0.75, gamma: float = 2.0) -> None:
        super().__init__(matcher, weights, alpha, gamma)
        if class_kl not in CLASS_KL:
            raise ValueError(f"class_kl={class_kl!r}; pass one of {', '.join(map(repr, CLASS_KL))}")
        self.kd_weights = _weights(DISTILLATION_WEIGHTS, kd_weights)
        self.class_kl = class_kl
        self.ground_truth = ground_truth

    def forward(self, base: Outputs, targets: Targets, teacher: Outputs) -> dict[str, torch.Tensor]:
        """Weighted terms by name, scalars.

        Args:
            base: outputs of the base-net in training, as for `DetectionLoss`, with `backbone_features` and
                `encoder_features`, lists of maps (B, channels, H, W).
            targets: as for `DetectionLoss`.
            teacher: outputs of the super-net on the same images: the last layer and features are used.

        Raises:
            FloatingPointError, ValueError: as `Matcher.match`.
        """
        suffixes = ["", *_aux_suffixes(base)]
        last_of_teacher = {name: teacher[name].detach() for name in ("pred_logits", "pred_boxes")}
        logits, boxes = _stacked([base, *base.get("aux_outputs", ()), last_of_teacher])
        objects = pack(fitting(targets, logits.shape[1]), logits.device, boxes.dtype)
        pairs = self.matcher.match_heads(logits, boxes, objects, [*_head_names(suffixes), "of the super-net"])
        num_boxes = _num_boxes(objects)
        terms = self._last_layer(logits, boxes, pairs, num_boxes) | self._features(base, teacher)
        learning = slice(0 if self.ground_truth else 1, -1)
        if suffixes[learning.start :]:
            terms |= self._ground_truth(
                logits[learning], boxes[learning],
                Pairs(pairs.image, pairs.query[learning], pairs.object[learning]).to(logits.device), objects,
                num_boxes, suffixes[learning.start :])
        return terms | self._denoising(base, objects, num_boxes)

    def _last_layer(self, logits: torch.Tensor, boxes: torch.Tensor, pairs: Pairs, num_boxes: torch.Tensor | float
                    ) -> dict[str, torch.Tensor]:
        image, of_base, of_teacher = _owners_of_the_same(pairs).to(logits.device, non_blocking=True)
        s, t = logits[0, image, of_base], logits[-1, image, of_teacher]
        s_box, t_box = boxes[0, image, of_base], boxes[-1, image, of_teacher]
        terms = {
            "vfl": self._class_kl(t, s, queries=logits.shape[2]),
            "bbox": (s_box - t_box).abs().sum(),
            "giou": (1 - iou_and_giou(s_box, t_box)[1]).sum(),
        }
        return {f"loss_{name}_kd": self.kd_weights[name] / num_boxes * value for name, value in terms.items()
                if self.kd_weights[name]}

    def _class_kl(self, teacher: torch.Tensor, student: torch.Tensor, queries: int) -> torch.Tensor:
        """Sum over pairs; teacher and student (pairs, C)."""
        if self.class_kl == "sigmoid":
            difference = teacher.sigmoid() * (teacher - student)
            return (difference + F.softplus(student) - F.softplus(teacher)).sum()
        kl = F.kl_div(student.log_softmax(1), teacher.log_softmax(1), log_target=True, reduction="sum")
        return kl if self.class_kl == "softmax" else kl * (queries / student.shape[1])

    def _features(self, base: Outputs, teacher: Outputs) -> dict[str, torch.Tensor]:
        return {f"loss_features_{part}_kd": weight * pooled_feature_kl(
                    teacher[f"{part}_features"], base[f"{part}_features"])
                for part in ("backbone", "encoder") if (weight := self.kd_weights[f"features_{part}"])}


def pooled_feature_kl(teacher: Sequence[torch.Tensor], student: Sequence[torch.Tensor]) -> torch.Tensor:
    """`KL(softmax t || softmax s)`, mean over the batch, t and s the concatenated channel means of all maps.

    Args:
        teacher: maps (B, C_i, H_i, W_i), detached here; half precision is computed in float32.
        student: maps with the same B and C_i, of any sizes.

    Returns:
        A scalar.
    """
    t, s = (torch.cat([pool_features(widened(x), 1) for x in maps], 1) for maps in (teacher, student))
    return distillation_kl(t, s)


def _weights(defaults: Mapping[str, float], weights: Mapping[str, float] | None) -> dict[str, float]:
    if unknown := set(weights or ()) - set(defaults):
        raise ValueError(f"no loss {sorted(unknown)} to weight; pass some of {list(defaults)}")
    return {**defaults, **(weights or {})}


def _aux_suffixes(outputs: Outputs) -> list[str]:
    return [f"_aux_{i}" for i in range(len(outputs.get("aux_outputs", ())))]


def _head_names(suffixes: Sequence[str]) -> list[str]:
    return [suffix.lstrip("_") or "last layer" for suffix in suffixes]


def _stacked(heads: Sequence[Outputs]) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (heads, B, Q, C) and boxes (heads, B, Q, 4), half precision as float32."""
    return (torch.stack([widened(head["pred_logits"]) for head in heads]),
            torch.stack([widened(head["pred_boxes"]) for head in heads]))


def _num_boxes(objects: Objects) -> torch.Tensor | float:
    """How many objects a process has on average, at least 1."""
    if not (dist.is_available() and dist.is_initialized()):
        return max(1.0, len(objects.labels))
    total = objects.boxes.new_tensor(len(objects.labels))
    dist.all_reduce(total)
    return (total / dist.get_world_size()).clamp(min=1)


def _denoising_pairs(meta: Denoising, counts: Sequence[int], heads: int) -> Pairs:
    per_image = torch.tensor(counts)
    first = (per_image.cumsum(0) - per_image).tolist()
    image = torch.repeat_interleave(per_image * meta.groups)
    query = torch.cat(meta.positives)
    index = torch.cat([(start + torch.arange(n)).repeat(meta.groups) for start, n in zip(first, counts)])
    return Pairs(image, query.expand(heads, -1), index.expand(heads, -1))


def _owners_of_the_same(pairs: Pairs) -> torch.Tensor:
    """(3, pairs): image, query of the first head, query of the last, where both have the same object.

    All objects, but where there are more of them than queries, and each head leaves out others.
    """
    of_first, of_last = pairs.object[0].argsort(), pairs.object[-1].argsort()
    a, b = pairs.object[0, of_first], pairs.object[-1, of_last]
    of_first, of_last = of_first[torch.isin(a, b)], of_last[torch.isin(b, a)]
    return torch.stack((pairs.image[of_first], pairs.query[0, of_first], pairs.query[-1, of_last]))
