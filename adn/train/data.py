"""What training reads: augmented images in an order that follows from (seed, epoch), mixed within the batch."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import timm.data.distributed_sampler
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler
from torch.utils.data.distributed import DistributedSampler
from torchvision.transforms import v2

from ..data.images import collate
from ..settings import Settings
from .interrupts import ignore_interrupts
from .recipes import Recipe
from .seeds import mixed_seed


def mixing(recipe: Recipe, classes: int) -> Callable[..., tuple[torch.Tensor, torch.Tensor]] | None:
    """Mixup, cutmix, or one of the two drawn per batch; partners are the batch rolled by one.

    Returns:
        (images (B, 3, H, W), labels (B,)) to mixed images and rows (B, classes) float32; None if both are off.
    """
    chosen = [kind(alpha=alpha, num_classes=classes) for kind, alpha in
              ((v2.MixUp, recipe.mixup), (v2.CutMix, recipe.cutmix)) if alpha]
    return v2.RandomChoice(chosen) if chosen else None


class TrainBatches:
    """For `fit`: the batches of an epoch. Order, augmentation and mixing follow from (seed, epoch, process).

    Args:
        classes: of images with labels, to be mixed as the recipe says.
        collate: for other data, what makes a batch of items.
    """

    def __init__(self, data: Dataset, recipe: Settings, classes: int | None = None, *, workers: int = 0, rank: int = 0,
                 world: int = 1, pin_memory: bool = False, collate: Callable[[list[Any]], Any] | None = None) -> None:
        self.data, self.recipe, self.workers, self.rank, self.world = data, recipe, workers, rank, world
        self.pin_memory = pin_memory
        self.with_labels = collate is None
        self.collate = collate or functools.partial(_mixed, mix=mixing(recipe, classes), alone=world == 1)
        if getattr(recipe, "repeats", 1) > 1 and isinstance(data, IterableDataset):
            raise ValueError("images that are read in turn cannot be repeated; pass --repeats 1")

    def __call__(self, epoch: int) -> DataLoader:
        seed, size = self.recipe.seed, self.recipe.batch_size
        sampler = None
        in_turn = isinstance(self.data, IterableDataset)
        source = getattr(self.data, "source", None) if in_turn else self.data
        if hasattr(source, "set_epoch"):
            source.set_epoch(epoch)
        if not in_turn:
            sampler = train_sampler(self.data, self.recipe, epoch, self.rank, self.world)
        return DataLoader(
            self.data, size, sampler=sampler, num_workers=self.workers, collate_fn=self.collate,
            pin_memory=self.pin_memory, worker_init_fn=ignore_interrupts,
            # A batch of one teaches batch norm nothing, and at 1x1 makes it fail: the last one may be left out.
            drop_last=self.with_labels and sampler is not None and size > 1 and len(sampler) % size == 1,
            generator=torch.Generator().manual_seed(mixed_seed(seed, epoch, self.rank, 1)),
        )


def train_sampler(data: Dataset, recipe: Settings, epoch: int, rank: int, world: int) -> Sampler[int]:
    """The indices of one process in one epoch, in an order that follows from (seed, epoch).

    Repeated augmentation as in the reference: every index `repeats` times in a row in a shuffled list, of which each
    process takes every `world`-th, `floor(images / 256) * 256 / world` of them (all, of fewer than 256 images).
    """
    if getattr(recipe, "repeats", 1) > 1:  # of a detector's there are none
        sampler = timm.data.distributed_sampler.RepeatAugSampler(data, world, rank, num_repeats=recipe.repeats,
                                                                   selected_round=256 if len(data) >= 256 else 0)
        sampler.set_epoch(mixed_seed(recipe.seed, epoch))
        return sampler
    return DistributedSampler(data, world, rank, shuffle=True, seed=mixed_seed(recipe.seed, epoch))


def _mixed(items: list[Any], mix: Callable[..., Any] | None, alone: bool) -> tuple[torch.Tensor, torch.Tensor] | None:
    batch = collate(items)
    if batch is None or (alone and len(batch[1]) == 1 < len(items)):
        return None
    return batch if mix is None else mix(*batch)
