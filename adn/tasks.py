"""What a net is for: a `Task` is all that training, evaluation and the commands need to know of it, and the only place
that tells one kind of net from another.

    task = task_of(net)
    rows = task.evaluate(net, loader)
    print(task.table(rows))

A new detector is an entry of `adn.models`, and nothing here. A new task is a value like the two below, in `TASKS`; how
its accuracy is called stands in `adn.measure.profile.METRICS`, what a run of it is told in `adn.train.run.CONFIGS`.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import nn
from torch.utils.data import Dataset
from torchvision.ops import clip_boxes_to_image

from .convert import convert
from .core.outputs import logits_of
from .core.state import is_converted
from .data import coco, images, mosaic, transforms
from .distill import SelfDistillation, Supervised
from .measure import accuracy, average_precision
from .measure.passes import try_forward
from .measure.profile import METRICS, Metric
from .models.registry import ENTRIES, PREFIX, build_source, create_model, interface_of, source_of, task_name
from .settings import Settings
from .weights.foreign import load_weights


class Data(NamedTuple):
    """What a run reads: data sets with `class_names`, `unreadable` and a `transform` that can be set.

    Attributes:
        classes: how many there are.
        notes: what the user should know of the data, one sentence each.
    """

    training: Dataset
    validation: Dataset
    classes: int
    notes: Sequence[str] = ()


class Prepared(NamedTuple):
    """How images are prepared in a run.

    Attributes:
        stored: of evaluation, to be kept with the net, see `Task.preparation`.
        sizes: sides of images that the net must be able to take.
        text: what to tell the user.
        hint: what to change where the net cannot take them.
    """

    stored: dict[str, Any]
    sizes: Iterable[int]
    text: str
    hint: str = ""


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Task:
    """A kind of net, and what is done with it.

    Attributes:
        name: as `--task` has it.
        makes: what a net of it is called.
        logged: accuracies in the log of training: by their name there the field of a row of `evaluate`.
        score: the name there of that which decides which epoch is best.
        columns: accuracies of a row that `adn eval --csv` writes.
        more_columns: those that it writes where they were measured.
        batch_size: in evaluation, where none is asked for.
        norms: multiply-adds are counted with norms, see `adn.measure.cost.count_macs`.
        skipped: what images are called that are left out.

        require: raises ImportError, saying what to install, where nothing could be evaluated.
        open_training: the config of a run to its `Data`; raises ValueError where nothing can be learnt from them.
        build: (config, classes, fresh) to the any-depth net of the run's recipe; not fresh is that of a resumed run,
            which only needs its structure. Raises ValueError if it is for another task, or does not fit its start.
        heads: what names of a net's parts begin with that depend on the number of classes.
        prepare: (net, recipe, data): set how the images of a run are prepared; what was set.
        check_outputs: (outputs of one image, classes): raise ValueError if they are not for so many.
        warning: why training a net from nothing would go wrong; None if it would not.
        loss: (net, recipe) to what a step computes, see `adn.train.fit`.
        collate: for a DataLoader, from items to a batch (images (B, 3, H, W), targets); None if no item was readable.
        collate_training: the same in training; None = with labels mixed as the recipe says, see `TrainBatches`.

        open: (root, split, file of class names, class names of the net, with outlines?) to untransformed data to
            evaluate on.
        notes: what the user should know of them.
        chance: of so many classes, the score of a net that guesses.
        preparation: (net, what is stored with it, size=, ...): how it wants its images, as arguments of the two that
            follow: as given, else as stored, else as is usual.
        transform: from these to a transform of the items of `open`, and of an RGB image alone, to (3, size, size).
        evaluate: accuracy at several depths, as `adn.evaluate`; with `distributed`, of all processes.
        table: its rows as text.
        postprocess: (net, outputs, width and height of each image in pixels): per image `scores` (K,) falling and
            `labels` (K,), of a detector `boxes` (K, 4) xyxy in pixels, too.
    """

    name: str
    makes: str
    logged: Mapping[str, str]
    score: str
    columns: tuple[str, ...]
    more_columns: tuple[str, ...]
    batch_size: int
    norms: bool
    skipped: str

    open_training: Callable[[Any], Data]
    build: Callable[[Any, int, bool], nn.Module]
    heads: Callable[[nn.Module], tuple[str, ...]]
    prepare: Callable[[nn.Module, Settings, Data], Prepared]
    loss: Callable[[nn.Module, Settings], nn.Module]
    collate: Callable[[list[Any]], Any]
    open: Callable[[str, str, str, Sequence[str] | None, bool], Dataset]
    preparation: Callable[..., dict[str, Any]]
    transform: Callable[..., Callable[..., Any]]
    evaluate: Callable[..., Sequence[Any]]
    table: Callable[[Sequence[Any]], str]
    postprocess: Callable[[nn.Module, Any, Sequence[Sequence[int]]], list[dict[str, torch.Tensor]]]

    require: Callable[[], None] = lambda: None
    collate_training: Callable[[list[Any]], Any] | None = None
    check_outputs: Callable[[Any, int], None] = lambda outputs, classes: None
    warning: Callable[[nn.Module], str | None] = lambda net: None
    notes: Callable[[Any], list[str]] = lambda data: []
    chance: Callable[[int], float] = lambda classes: 0.0

    @property
    def metric(self) -> Metric:
        return METRICS[self.name]

    def untrained(self, rows: Sequence[Any], classes: int) -> list[Any]:
        """Rows of `evaluate` of which the score is that of guessing, where the best is not."""
        chance, scores = self.chance(classes), [getattr(row, self.logged[self.score]) for row in rows]
        least = chance + (max(scores) - chance) / 20
        return [row for row, score in zip(rows, scores, strict=True) if score <= least < max(scores)]

    def find(self, net: nn.Module, image: Image.Image, preparation: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """What the net says of an RGB image, see `postprocess`; on the CPU."""
        parameter = next(net.parameters())
        x = self.transform(**preparation)(image)[None].to(parameter.device, parameter.dtype)
        with torch.inference_mode():
            result, = self.postprocess(net, try_forward(net, x), [image.size])
        return {name: value.cpu() for name, value in result.items()}


def task_of(net: nn.Module) -> Task:
    """What a net is for: any-depth or of one depth, in a wrapper or not, or a deploy form."""
    return TASKS[task_name(net)]


def is_detector(net: nn.Module) -> bool:
    """Is it a detector, any-depth or of one depth, and not a classifier?"""
    return task_of(net) is DETECT


def example(net: nn.Module, size: int | None, batch: int = 1) -> torch.Tensor:
    """Random images (batch, channels of the net, size, size) of the net's device and dtype; None = the size that it
    resizes images to."""
    size = interface_of(net).size if size is None else size
    parameter = next(net.parameters())
    convs = () if is_detector(net) else (m for m in net.modules() if isinstance(m, nn.Conv2d))
    channels = next((conv.in_channels for conv in convs), 3)
    generator = torch.Generator().manual_seed(0)
    return torch.randn(batch, channels, size, size, generator=generator).to(parameter.device, parameter.dtype)


# ------------------------------------------------------------------------------------------------------------- classify


def _open_labelled(config: Any) -> Data:
    training = _open_split(config, config.train_split, need_classes=2, training=True)
    validation = _open_split(config, config.val_split)
    names, others = training.class_names, validation.class_names
    if names and others and names != others:
        if unknown := sorted(set(others) - set(names)):
            raise ValueError(f"classes of {config.val_split!r} that {config.train_split!r} does not have: "
                             f"{', '.join(unknown[:5])}; the two must have the same classes")
        # A class without validation images must not shift the labels of those after it.
        validation = _open_split(config, config.val_split, class_map={name: i for i, name in enumerate(names)})
    known = len(names) or None
    if config.num_classes is not None and known not in (None, config.num_classes):
        raise ValueError(f"num_classes={config.num_classes}, but the data has {known} classes")
    if (classes := known or config.num_classes) is None:
        raise ValueError(f"{config.data!r} does not say how many classes it has; pass --num-classes")
    notes = [f"{split}: {note}" for split, data in ((config.train_split, training), (config.val_split, validation))
             for note in data.notes]
    return Data(training, validation, classes, notes)


def _open_split(config: Any, split: str, **settings: Any) -> images.ImageData | images.ImageStream:
    try:
        return images.open_dataset(config.data, split, download=config.download, **settings)
    except ValueError as error:
        if not os.path.isdir(config.data):
            raise
        if coco.has_boxes(config.data, split):
            raise ValueError(f"{config.data} has images with boxes: pass --task detect to train a detector on them"
                             ) from error
        raise ValueError(f"{error}. Training reads the folders train and val of DATA (other names: --train-split, "
                         "--val-split), each with one sub-folder of images per class") from error


def _build_classifier(config: Any, classes: int, fresh: bool) -> nn.Module:
    recipe = config.recipe
    return create_model(PREFIX + recipe.model.removeprefix(PREFIX), num_classes=classes, twins=recipe.twins,
                        pretrained=config.pretrained and fresh, **recipe.model_kwargs)


def _heads(net: nn.Module) -> tuple[str, ...]:
    names = net.pretrained_cfg["classifier"]
    return (names,) if isinstance(names, str) else tuple(names)


def _prepare_labelled(net: nn.Module, recipe: Settings, data: Data) -> Prepared:
    common = {"interpolation": recipe.interpolation, "mean": recipe.mean, "std": recipe.std}
    train = images.data_config(net, size=recipe.train_size, **common)
    evaluation = images.data_config(net, size=recipe.eval_size or recipe.train_size, resize=recipe.eval_resize,
                                    **common)
    data.training.transform = images.train_transform(recipe, train)
    data.validation.transform = images.eval_transform(**evaluation)
    return Prepared(evaluation, {train["size"], evaluation["size"]},
                    f"crops of {train['size']} and {evaluation['size']} pixels")


def _check_logits(outputs: Any, classes: int) -> None:
    logits = logits_of(outputs)
    if logits.shape != (1, classes):
        raise ValueError(f"logits of shape (1, {classes}) are needed, this net gives {tuple(logits.shape)}")


def default_loss(net: nn.Module, recipe: Settings) -> nn.Module:
    """Of classifiers: self-distillation for a converted net, cross-entropy for a plain one, with the recipe's
    settings."""
    criterion = nn.CrossEntropyLoss(label_smoothing=recipe.label_smoothing)
    if not is_converted(net):
        return Supervised(net, criterion)
    features = "all" if recipe.features == ("all",) else [
        int(name) if name.lstrip("-").isdigit() else name for name in recipe.features]
    return SelfDistillation(
        net, criterion, alpha=recipe.alpha, temperature=recipe.temperature, top_classes=recipe.top_classes,
        features=features, variant=recipe.variant, single_pass=recipe.single_pass,
    )


def _open_images(root: str, split: str, class_map: str, known: Sequence[str] | None, _outlines: bool
                 ) -> images.ImageData | images.ImageStream:
    data = images.open_dataset(root, split, class_map=class_map)
    if known and not class_map and len(data.class_names) < len(known) and set(data.class_names) <= set(known):
        # A class without images must not shift the labels of those after it.
        data = images.open_dataset(root, split, class_map={name: i for i, name in enumerate(known)})
    return data


def _best_classes(_net: nn.Module, outputs: Any, _sizes: Any) -> list[dict[str, torch.Tensor]]:
    best = logits_of(outputs).float().softmax(1).sort(1, descending=True)
    return [{"scores": scores, "labels": labels} for scores, labels in zip(*best, strict=True)]


CLASSIFY = Task(
    "classify", "classifier", logged={name: name for name in accuracy.ACCURACIES}, score="top1",
    columns=accuracy.ACCURACIES, more_columns=(), batch_size=64, norms=False, skipped="unreadable images",
    open_training=_open_labelled, build=_build_classifier, heads=_heads, prepare=_prepare_labelled,
    check_outputs=_check_logits, loss=default_loss, collate=images.collate, open=_open_images,
    preparation=images.data_config, transform=images.eval_transform, evaluate=accuracy.evaluate,
    table=accuracy.accuracy_table, postprocess=_best_classes, notes=lambda data: list(data.notes),
    chance=lambda classes: 100 / classes,
)

# --------------------------------------------------------------------------------------------------------------- detect

_USUAL_SIZE = 640  # of published detectors


def _open_boxes(config: Any) -> Data:
    recipe = config.recipe
    outlines = recipe.model in ENTRIES and ENTRIES[recipe.model].masks
    training = coco.open_coco(config.data, config.train_split, masks=outlines or recipe.copy_paste > 0)
    validation = coco.open_coco(config.data, config.val_split, masks=outlines)
    if training.class_names != validation.class_names:
        raise ValueError(f"{training.file} and {validation.file} list different categories: labels would not mean the "
                         "same")
    if not training.trainable:
        raise ValueError(f"{training.file} has no object to learn from: {len(training)} images, but no box with area "
                         "in its image that is not a crowd")
    notes = [*_notes(training), *_notes(validation)]
    if not validation.trainable:
        notes.append(f"{validation.file} has no object to find, so no accuracy can be measured")
    return Data(training, validation, len(training.class_names), notes)


def _notes(data: coco.CocoImages) -> list[str]:
    return [f"{data.file}: {note}" for note in data.notes]


def _build_detector(config: Any, classes: int, fresh: bool) -> nn.Module:
    recipe, backbone = config.recipe, config.backbone if fresh else None
    known = [name for name, entry in ENTRIES.items() if entry.task == DETECT.name]
    if recipe.model not in known:
        raise ValueError(f"{recipe.model!r} is no detector; pass one of {', '.join(known)}")
    entry = ENTRIES[recipe.model]
    model = build_source(recipe.model, {**entry.of_size(recipe.size), **recipe.model_kwargs,
                                        "num_classes": classes + entry.background})
    if backbone is not None:
        _load_backbone(model, backbone)
    net = convert(model, twins=recipe.twins)
    if backbone is not None:
        _load_backbone(net, backbone)  # with twins now, if it has some
    return net


def _load_backbone(net: nn.Module, path: str) -> None:
    backbone = getattr(net, "backbone", None)
    if backbone is None:
        raise ValueError(f"a {type(net).__name__} has no backbone to load: leave out --backbone")
    report = load_weights(getattr(backbone, "body", backbone), path, strict=False)
    missing = [name for name in report.missing if ".skip." not in name]
    if missing or report.mismatched:
        raise ValueError(f"{path} does not fit the backbone: {'; '.join([*missing, *report.mismatched][:4])}")


def _prepare_boxes(net: nn.Module, recipe: Settings, data: Data) -> Prepared:
    letterbox, resizes = (model := interface_of(net)).letterbox, model.resizes
    data.training.transform = augmentation(recipe, data.training, letterbox, resizes)
    data.validation.transform = transforms.eval_transform(None if resizes else recipe.size, letterbox)
    smallest = min((recipe.size, *_sizes(net, recipe)))
    return Prepared({} if resizes else {"size": recipe.size}, (smallest,), f"{recipe.size} pixels",
                    f" (training would go down to {smallest} pixels: --size, --no-multi-scale, --model-kwargs)")


def augmentation(recipe: Settings, data: coco.CocoImages, letterbox: bool = False, resizes: bool = False
                 ) -> Callable[..., Any]:
    """Of a detector's training images, see `adn.data.transforms.train_transform`; of one that `resizes` itself they
    keep their size."""
    moves = {name: getattr(recipe, name) for name in ("mosaic", "blend", "copy_paste", "scale", "translate")}
    compose = mosaic.Compose(data, recipe.size, until=recipe.epochs - recipe.plain_epochs, **moves)
    others = ("distort", "zoom_out", "crop", "flip", "hue", "saturation", "brightness")
    return transforms.train_transform(
        None if resizes else recipe.size, compose=compose if letterbox or any(moves.values()) else None,
        **{name: getattr(recipe, name) for name in others})


def _sizes(net: nn.Module, recipe: Settings) -> Sequence[int]:
    """Sides of images that a detector is trained at, if there are several; raises ValueError if it takes none such."""
    sizes = transforms.multi_scale_sizes(recipe.size, interface_of(net).stride)
    return sizes if recipe.multi_scale else ()


def _detector_loss(net: nn.Module, recipe: Settings) -> nn.Module:
    model = interface_of(net)
    return (model.distillation if is_converted(net) else model.supervised)(recipe, _sizes(net, recipe))


def _detector_size(net: nn.Module, stored: Mapping[str, Any] | None = None, *, size: int | None = None, **_: Any
                   ) -> dict[str, Any]:
    model = interface_of(net)
    if model.resizes:
        if size is not None:
            raise ValueError(f"--size {size}; this {type(source_of(net)).__name__} resizes images itself: leave it out")
        return {"size": None, "letterbox": False}
    if size is not None and (size < model.stride or size % model.stride):
        name = (model.adn_origin or {}).get("name", "a detector")
        raise ValueError(f"--size {size}; {name} takes multiples of {model.stride}, such as {_USUAL_SIZE}")
    return {"size": (stored or {}).get("size", _USUAL_SIZE) if size is None else size, "letterbox": model.letterbox}


def _objects(net: nn.Module, outputs: Any, sizes: Sequence[Sequence[int]]) -> list[dict[str, torch.Tensor]]:
    """Boxes end where the image does."""
    return [{**found, "boxes": clip_boxes_to_image(found["boxes"], (height, width))}
            for found, (width, height) in zip(interface_of(net).postprocess(outputs, sizes), sizes, strict=True)]


DETECT = Task(
    "detect", "detector", logged={name.upper(): name for name in ("ap", "ap50", "aps", "apm", "apl")}, score="AP",
    columns=average_precision.ACCURACIES, more_columns=average_precision.OF_MASKS, batch_size=8, norms=True,
    skipped="images that cannot be read or have another size than annotated",
    require=functools.partial(average_precision.require_backend, "pycocotools"),
    open_training=_open_boxes, build=_build_detector, prepare=_prepare_boxes,
    heads=lambda net: interface_of(net).class_heads, warning=lambda net: interface_of(net).warning(),
    loss=_detector_loss,
    collate=coco.collate, collate_training=coco.collate, notes=_notes,
    open=lambda root, split, _map, _known, outlines: coco.open_coco(root, split or "val", masks=outlines),
    preparation=_detector_size, transform=transforms.eval_transform, evaluate=average_precision.evaluate_detector,
    table=average_precision.detection_table, postprocess=_objects,
)

TASKS = {task.name: task for task in (CLASSIFY, DETECT)}
