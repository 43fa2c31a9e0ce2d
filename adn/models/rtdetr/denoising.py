"""Contrastive denoising: extra queries that start from objects of the image, moved a little or a lot.

In training a detector also learns to put slightly moved boxes back (positives) and to reject those moved further
(negatives). These queries stand in front of the ordinary ones, in groups; each group holds all objects of an image once
as positives, then once as negatives, padded to the largest number of objects in the batch.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import nn
from torchvision.ops import box_convert

from ...detect.boxes import inverse_sigmoid
from ...detect.targets import Targets, pack


@dataclasses.dataclass(frozen=True)
class Draws:
    """The random numbers of one batch's denoising queries, D per image.

    Attributes:
        u_label: (B, D) uniform in [0, 1): which labels are replaced.
        new_label: (B, D) integers in [0, classes): by what.
        sign01: (B, D, 4) 0 or 1: which way each side of a box moves.
        u_box: (B, D, 4) uniform in [0, 1): how far.
    """

    u_label: torch.Tensor
    new_label: torch.Tensor
    sign01: torch.Tensor
    u_box: torch.Tensor


@dataclasses.dataclass(frozen=True)
class Denoising:
    """Denoising queries, and what the losses must know of them.

    Attributes:
        content: (B, D, dim) the queries.
        box_unact: (B, D, 4) their boxes, before the sigmoid.
        attn_mask: bool (D + Q, D + Q), True where the row's query must not see the column's.
        positives: per image, int64 on the CPU: which queries are positives of an object; the image's objects in their
            order, once for each group.
        groups: how many.
        queries: D = groups * 2 * (largest number of objects).
    """

    content: torch.Tensor
    box_unact: torch.Tensor
    attn_mask: torch.Tensor
    positives: list[torch.Tensor]
    groups: int
    queries: int


def draw(batch: int, queries: int, num_classes: int, generator: torch.Generator | None = None,
         device: torch.device | str | None = None) -> Draws:
    """Random numbers for `queries` denoising queries in each of `batch` images, in the reference's order.

    Args:
        generator: drawn on its device, then moved; None = the global generator of `device`.
    """
    at = device if generator is None else generator.device
    u_label = torch.rand(batch, queries, generator=generator, device=at)
    new_label = torch.randint(num_classes, (batch, queries), generator=generator, device=at)
    sign01 = torch.randint(2, (batch, queries, 4), generator=generator, device=at)
    u_box = torch.rand(batch, queries, 4, generator=generator, device=at)
    return Draws(*(drawn.to(device) for drawn in (u_label, new_label, sign01, u_box)))


def make_queries(
    targets: Targets,
    num_classes: int,
    num_queries: int,
    class_embed: nn.Embedding,
    *,
    num_denoising: int = 100,
    label_noise_ratio: float = 0.5,
    box_noise_scale: float = 1.0,
    draws: Draws | torch.Generator | None = None,
) -> Denoising | None:
    """The denoising queries of a batch, on the device of `class_embed`.

    Labels are replaced by random ones with probability `label_noise_ratio / 2`. Each side of a box moves by up to half
    of the box's width or height, times `box_noise_scale`, if positive, by once to twice as much if negative, and is
    clipped to the image; where opposite sides have passed each other, the width or height is 0.

    Args:
        targets: one dict per image: `labels` int64 (n,), `boxes` (n, 4) cxcywh in 0..1; n may be 0.
        num_queries: Q, of the ordinary queries, for the mask.
        class_embed: (num_classes + 1, dim); its last row is that of places without an object.
        num_denoising: about how many positives an image has: groups = num_denoising div (largest number of objects),
            at least 1.
        draws: random numbers to use, or a generator to draw them from; None = the global one.

    Returns:
        None where there is nothing to denoise: no object in the whole batch, or `num_denoising` is 0.

    Raises:
        ValueError: `draws` do not fit the batch.
    """
    device = class_embed.weight.device
    objects = pack(targets, device, torch.promote_types(class_embed.weight.dtype, torch.float32))
    most = max(objects.counts)
    if most == 0 or num_denoising == 0:
        return None
    groups = max(1, num_denoising // most)
    images, queries = len(targets), 2 * most * groups
    if not isinstance(draws, Draws):
        draws = draw(images, queries, num_classes, draws, device)
    _check(draws, images, queries)

    # Labels out of range are named by the matcher; as an index they would stop a GPU for good.
    label = objects.labels.new_full((images, most), num_classes)
    label[objects.image, objects.slot] = objects.labels.clamp(0, num_classes)
    box = objects.boxes.new_zeros(images, most, 4)
    box[objects.image, objects.slot] = objects.boxes
    label, box = label.repeat(1, 2 * groups), box.repeat(1, 2 * groups, 1)

    replaced = (draws.u_label.to(device) < 0.5 * label_noise_ratio) & (label < num_classes)
    label = torch.where(replaced, draws.new_label.to(device, label.dtype).clamp(0, num_classes - 1), label)

    place = torch.arange(queries, device=device)
    negative = (place // most % 2)[:, None]
    move = (2 * draws.sign01.to(device) - 1) * (draws.u_box.to(box) + negative)
    move = move * box[..., 2:].repeat(1, 1, 2) * (0.5 * box_noise_scale)
    box = (box_convert(box, "cxcywh", "xyxy") + move).clamp(0, 1)
    box = box_convert(box, "xyxy", "cxcywh")

    group = torch.full((queries + num_queries,), groups, device=device)
    group[:queries] = place // (2 * most)
    # Everything sees the ordinary queries and its own group.
    attn_mask = (group[:, None] != group) & (group < groups)
    starts = torch.arange(0, queries, 2 * most)[:, None]
    positives = [(starts + torch.arange(n)).flatten() for n in objects.counts]
    return Denoising(class_embed(label), inverse_sigmoid(box), attn_mask, positives, groups, queries)


def _check(draws: Draws, images: int, queries: int) -> None:
    per_query, per_side = (images, queries), (images, queries, 4)
    for name, wanted in (("u_label", per_query), ("new_label", per_query), ("sign01", per_side), ("u_box", per_side)):
        shape = getattr(draws, name).shape
        if shape != wanted:
            raise ValueError(f"draws have {name} {tuple(shape)}; these targets need {wanted}")
