"""`train_detector`: from images with boxes, in COCO's format, to an any-depth detector on the disk."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from ..convert import convert
from ..core.behaviours import FROZEN_NORMS
from ..core.state import state_of
from ..data.coco import CocoImages, collate, open_coco
from ..data.transforms import eval_transform, multi_scale_sizes, train_transform
from ..measure.accuracy import evaluating, try_forward
from ..measure.average_precision import evaluate_detector, require_backend
from ..models.registry import ENTRIES, build_source
from ..models.rtdetr.criterion import DistillationLoss
from ..models.rtdetr.distill import DetectionDistillation
from ..models.rtdetr.model import RTDETR
from ..weights.foreign import load_weights
from .data import TrainBatches
from .interrupts import ignore_interrupts
from .loop import Result, fit
from .recipes import DEFAULT_DETECTION, DETECTION_RECIPES, DetectionRecipe
from .run import check_out, config_of_run, gather, load_start, process_group, set_classes, share, with_whole_paths
from .seeds import seed_all

TASK = "detect"
_HEADS = ("decoder.enc_score_head", "decoder.dec_score_head", "decoder.denoising_class_embed")


@dataclasses.dataclass(frozen=True)
class DetectionConfig:
    """A training run of a detector: the recipe, and where things are.

    Attributes:
        data: a directory in one of the layouts of `adn.data.coco.open_coco`.
        out: folder for what the run writes, see `fit`.
        recipe: every setting the numbers depend on.
        checkpoint: start from a file of `adn.save` in place of the recipe's model.
        weights: start from these weights of a whole detector, see `adn.load_weights`.
        backbone: start from these weights of a classifier, whose backbone is the detector's; any-depth or not.
        new_head: with `checkpoint` or `weights` of other classes, begin with fresh heads for those of the data.
        train_split, val_split: names of the two parts of the data.
        workers: processes that read images; None = one per core, at most 8. What is drawn at random depends on how many
            there are.
        device: "cpu", "cuda", "cuda:1"; None = a GPU if there is one.
        tensorboard: write the log for TensorBoard too.
    """

    data: str
    out: str
    recipe: DetectionRecipe = DETECTION_RECIPES[DEFAULT_DETECTION]
    checkpoint: str | None = None
    weights: str | None = None
    backbone: str | None = None
    new_head: bool = False
    train_split: str = "train"
    val_split: str = "val"
    workers: int | None = None
    device: str | None = None
    tensorboard: bool = False

    def to_dict(self) -> dict[str, Any]:
        return {"task": TASK, **dataclasses.asdict(self), "recipe": self.recipe.to_dict()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> DetectionConfig:
        values = {name: value for name, value in values.items() if name != "task"}
        return cls(**{**values, "recipe": DetectionRecipe.from_dict(values["recipe"])})

    @classmethod
    def of_run(cls, out: str | os.PathLike[str]) -> DetectionConfig:
        """What the run in a folder was started with; raises ValueError if there is none."""
        return config_of_run(cls, out)


def train_detector(
    config: DetectionConfig, *, resume: bool = False, overwrite: bool = False, progress: bool = True
) -> Result:
    """Train an any-depth detector; `adn train --task detect` from Python.

    Started by `torchrun`, processes share the work.

    Args:
        config: what to do; for a resumed run what it was started with, possibly with changes.
        resume, overwrite, progress: see `fit`.

    Raises:
        ValueError: on data without images or objects, classes that do not fit each other or the checkpoint, or a model
            that is no detector.
        ImportError: without the extra `adn[detect]`.
        Otherwise as `fit`.
    """
    require_backend("pycocotools")  # now, not after an epoch
    config = with_whole_paths(config)
    with process_group(config.device) as device:
        rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        talk, recipe = progress and rank == 0, config.recipe
        if rank == 0:
            check_out(config, resume, overwrite)
        training = open_coco(config.data, config.train_split, augmentation(recipe))
        validation = open_coco(config.data, config.val_split, eval_transform(recipe.size))
        _check_data(training, validation, talk)
        seed_all(recipe.seed)
        net = _start(config, training.class_names, resume)
        state_of(net).class_names = training.class_names
        for cut in state_of(net).cuts:
            cut.in_training = recipe.cut_decoder
        net.to(device)
        sizes = multi_scale_sizes(recipe.size) if recipe.multi_scale else ()
        _try_out(net, min((recipe.size, *sizes)), device)

        workers = min(8, len(os.sched_getaffinity(0))) if config.workers is None else config.workers
        pin = device.type == "cuda"
        batches = TrainBatches(training, recipe, workers=workers, rank=rank, world=world, pin_memory=pin,
                               collate=collate)
        loader = DataLoader(share(validation, rank, world), recipe.batch_size, num_workers=workers, collate_fn=collate,
                            pin_memory=pin, worker_init_fn=ignore_interrupts)

        def measure(net: nn.Module) -> dict[str, float]:
            rows = evaluate_detector(net, loader, ["super", "base"], device, progress=talk, distributed=world > 1)
            numbers = {f"val_{name.upper()}_{which}": getattr(row, name)
                       for name in ("ap", "ap50", "aps", "apm", "apl")
                       for which, row in zip(("super", "base"), rows, strict=True)}
            unreadable = gather([*training.unreadable, *validation.unreadable])
            if unreadable and talk:
                print(f"skipped so far: {len(unreadable)} images that cannot be read or have another size than "
                      f"annotated, e.g. {unreadable[0]}", flush=True)
            # Of sizes that no object has there is no accuracy.
            return {name: value for name, value in numbers.items() if value is not None} | {
                "unreadable": len(unreadable)}

        if talk:
            print(_describe(net, config, resume, training, validation), flush=True)
        loss = DetectionDistillation(
            net, distillation=DistillationLoss(class_kl=recipe.class_kl),
            multi_scale=sizes)
        return fit(
            net, batches, measure, recipe, out=config.out, resume=resume, overwrite=overwrite, loss=loss,
            accuracy="AP_", device=device, config=config.to_dict(),
            extra={"task": TASK, "data": {"size": recipe.size}}, tensorboard=config.tensorboard, progress=progress)


def augmentation(recipe: DetectionRecipe) -> v2.Transform:
    """Of training images, see `adn.data.transforms.train_transform`."""
    return train_transform(recipe.size, distort=recipe.distort, zoom_out=recipe.zoom_out, crop=recipe.crop,
                           flip=recipe.flip)


def _check_data(training: CocoImages, validation: CocoImages, talk: bool) -> None:
    if training.class_names != validation.class_names:
        raise ValueError(f"{training.file} and {validation.file} list different categories: labels would not mean the "
                         "same")
    if not training.trainable:
        raise ValueError(f"{training.file} has no object to learn from: {len(training)} images, but no box with area "
                         "in its image that is not a crowd")
    notes = [f"{data.file}: {note}" for data in (training, validation) for note in data.notes]
    if not validation.trainable:
        notes.append(f"{validation.file} has no object to find, so no accuracy can be measured")
    if talk and notes:
        print("\n".join(notes), flush=True)


def _try_out(net: nn.Module, size: int, device: torch.device) -> None:
    """Run the net once, at the smallest size it will be given, so that what cannot work is said before anything is
    written."""
    try:
        with evaluating(net), torch.inference_mode():
            try_forward(net, torch.zeros(1, 3, size, size, device=device))
    except ValueError as error:
        raise ValueError(f"{error} (training would go down to {size} pixels: --size, --no-multi-scale, --model-kwargs "
                         """'{"queries": N}')""") from error


def _start(config: DetectionConfig, names: Sequence[str], resume: bool) -> nn.Module:
    """The net before training. A resumed run only needs its structure."""
    recipe = config.recipe
    if sum(path is not None for path in (config.checkpoint, config.weights, config.backbone)) > 1:
        raise ValueError("pass one of --checkpoint, --weights, --backbone")
    if config.checkpoint is not None:
        net = load_start(config, resume)
        if not isinstance(net, RTDETR):
            raise ValueError(f"{config.checkpoint} holds a {type(net).__name__}, which is no detector")
        set_classes(net, config, len(names), names, resume)
        return net
    if recipe.model not in ENTRIES:
        raise ValueError(f"{recipe.model!r} is no detector; pass one of {', '.join(ENTRIES)}")
    if "num_classes" in recipe.model_kwargs:
        raise ValueError("num_classes does not belong into model_kwargs: the data say how many there are")
    try:
        model = build_source(recipe.model, {**recipe.model_kwargs, "num_classes": len(names)})
    except TypeError as error:
        raise ValueError(f"{recipe.model} cannot be built with --model-kwargs {json.dumps(recipe.model_kwargs)}: "
                         f"{error}") from error
    if config.backbone is not None and not resume:
        _load_backbone(model, config.backbone)
    net = convert(model, twins=recipe.twins)
    if config.backbone is not None and not resume:
        _load_backbone(net, config.backbone)  # with twins now, if it has some
    if config.weights is not None and not resume:
        report = load_weights(net, config.weights, strict=False)
        if wrong := [problem for problem in (*report.missing, *report.mismatched) if not problem.startswith(_HEADS)]:
            raise ValueError(f"{config.weights} does not fit {recipe.model}: {'; '.join(wrong[:4])}")
        if report.mismatched and not config.new_head:
            raise ValueError(f"{config.weights} is for other classes than the {len(names)} of the data "
                             f"({report.mismatched[0]}); pass --new-head to begin with fresh heads")
        if report.unexpected or (report.missing and not config.new_head):
            raise ValueError(f"{config.weights} does not fit {recipe.model}:\n" + "\n".join(report.problems()))
    return net


def _load_backbone(net: nn.Module, path: str) -> None:
    report = load_weights(net.backbone, path, strict=False)
    missing = [name for name in report.missing if ".skip." not in name]
    if missing or report.mismatched:
        raise ValueError(f"{path} does not fit the backbone: {'; '.join([*missing, *report.mismatched][:4])}")


def _describe(net: nn.Module, config: DetectionConfig, resume: bool, training: CocoImages, validation: CocoImages
              ) -> str:
    recipe, file = config.recipe, config.checkpoint or config.weights or config.backbone
    millions = sum(p.numel() for p in net.parameters()) / 1e6
    start = "resumed" if resume else f"from {file}" if file else "from scratch"
    name = (state_of(net).origin or {}).get("name", recipe.model)
    return (f"{name}, {millions:.1f} M parameters, {len(state_of(net).plan.flags)} flags and a decoder of "
            f"{state_of(net).full.layers[0]} layers, {start}\n"
            f"{len(training)} images to train on, {len(validation)} to evaluate, {len(training.class_names)} classes; "
            f"{recipe.size} pixels\n"
            f"{recipe.optimizer}, learning rate {recipe.lr:g}, {recipe.schedule}; results in {config.out}"
            f"{'' if resume or file else _warning(net)}")


def _warning(net: nn.Module) -> str:
    """Of a start from nothing with parts that cannot learn."""
    frozen = sum(not p.requires_grad for p in net.backbone.parameters())
    frozen += sum(isinstance(module, FROZEN_NORMS) for module in net.backbone.modules())
    if not frozen:
        return ""
    return ("\nwarning: parts of the backbone are frozen at the random values they start with; begin with --backbone, "
            "--weights or --checkpoint, or train them, too: --model-kwargs "
            """'{"freeze_norm": false, "freeze_stem": false}'""")
