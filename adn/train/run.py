"""`train`: from images on the disk to an any-depth net on the disk, whatever the net is for."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset

from ..core.state import state_of
from ..measure.passes import evaluating, of_all_processes, processes, try_forward
from ..models.registry import interface_of
from ..settings import Settings
from ..tasks import CLASSIFY, DETECT, Data, Prepared, Task, task_of
from ..weights.checkpoint import load
from ..weights.foreign import load_weights
from .data import TrainBatches
from .folder import BEST, CONFIG, FINAL, read_config, refuse_overwriting
from .interrupts import ignore_interrupts
from .loop import Result, fit
from .recipes import DEFAULT, DEFAULT_DETECTION, DETECTION_RECIPES, RECIPES, Recipe, recipe_type
from .seeds import seed_all


@dataclasses.dataclass(frozen=True)
class _Run:
    """A training run, as `config.json` keeps it: what those of all tasks have, see `Config`."""

    task: ClassVar[Task]
    starts: ClassVar[tuple[str, ...]]  # settings that say from what to start, of which one may be given

    data: str
    out: str
    recipe: Settings
    checkpoint: str | None = None
    weights: str | None = None
    new_head: bool = False
    train_split: str = "train"
    val_split: str = "val"
    workers: int | None = None
    device: str | None = None
    tensorboard: bool = False

    def to_dict(self) -> dict[str, Any]:
        return {"task": self.task.name, **dataclasses.asdict(self), "recipe": self.recipe.to_dict()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        values = {name: value for name, value in values.items() if name != "task"}
        kind = recipe_type(cls.task.name, values["recipe"].get("model"))
        return cls(**{**values, "recipe": kind.from_dict(values["recipe"])})

    @classmethod
    def of_run(cls, out: str | os.PathLike[str]) -> Self:
        """What the run in a folder was started with.

        Raises:
            ValueError: if there is no run, or one of another task.
        """
        path = Path(out) / CONFIG
        try:
            return cls.from_dict(json.loads(path.read_text()))
        except FileNotFoundError:
            raise ValueError(f"nothing to resume in {os.fspath(out)}: there is no {CONFIG}") from None
        except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
            raise ValueError(f"{path} is not what adn train wrote ({error!r})") from error

    @property
    def start(self) -> str | None:
        """The file to start from, if there is one."""
        return next((path for name in self.starts if isinstance(path := getattr(self, name), str)), None)


@dataclasses.dataclass(frozen=True)
class Config(_Run):
    """A training run of a classifier: the recipe, and where things are.

    Attributes:
        data: a folder with `train` and `val` (or `validation`), each with one sub-folder of images per class; or a
            data set as `adn.data.open_dataset` takes it.
        out: folder for what the run writes, see `fit`.
        recipe: every setting the numbers depend on.
        pretrained: start from timm's weights of the model.
        checkpoint: start from a file of `adn.save` in place of the recipe's model.
        weights: start from these weights, see `adn.load_weights`.
        new_head: with `checkpoint` or `weights` of other classes, begin with a fresh head for those of the data.
        train_split, val_split: names of the two parts of the data.
        download: fetch a named data set that is not there.
        num_classes: of the data, where it does not say itself.
        workers: processes that read images; None = one per core, at most 8. What is drawn at random depends on how many
            there are.
        device: "cpu", "cuda", "cuda:1"; None = a GPU if there is one.
        tensorboard: write the log for TensorBoard too.
    """

    task = CLASSIFY
    starts = ("checkpoint", "weights", "pretrained")

    recipe: Recipe = RECIPES[DEFAULT]
    val_split: str = "validation"
    pretrained: bool = False
    download: bool = False
    num_classes: int | None = None


@dataclasses.dataclass(frozen=True)
class DetectionConfig(_Run):
    """A training run of a detector: the recipe, and where things are. What is not said is as in `Config`.

    Attributes:
        data: a directory in one of the layouts of `adn.data.coco.open_coco`.
        recipe: of the type in the entry of its model, see `adn.models.entry`.
        weights: start from these weights of a whole detector, see `adn.load_weights`.
        backbone: start from these weights of a classifier, whose backbone is the detector's; any-depth or not.
    """

    task = DETECT
    starts = ("checkpoint", "weights", "backbone")

    recipe: Settings = DETECTION_RECIPES[DEFAULT_DETECTION]
    backbone: str | None = None


CONFIGS: dict[str, type[_Run]] = {kind.task.name: kind for kind in (Config, DetectionConfig)}


def task_of_run(out: str | os.PathLike[str]) -> str | None:
    """What the run in a folder trains, the name of a task; None if there is none."""
    config = read_config(out)
    return None if config is None else config.get("task", CLASSIFY.name)


def train(config: Config | DetectionConfig, *, resume: bool = False, overwrite: bool = False, progress: bool = True
          ) -> Result:
    """Train an any-depth net on images; `adn train` from Python.

    Started by `torchrun`, processes share the work: NCCL with GPUs, gloo without.

    Args:
        config: what to do; for a resumed run usually `Config.of_run(out)`, possibly with changes.
        resume, overwrite, progress: see `fit`.

    Raises:
        ValueError: on data without images or objects or with one class, classes that do not fit each other or the
            checkpoint, a model that is for another task, or a net that cannot take the images.
        ImportError: for a detector without the extra `adn[detect]`.
        Otherwise as `fit`.
    """
    task = config.task
    task.require()  # now, not after an epoch
    config = _with_whole_paths(config)
    with _process_group(config.device) as device:
        rank, world = processes()
        talk, recipe = progress and rank == 0, config.recipe
        if rank == 0:
            _check_out(config, resume, overwrite)
        data = task.open_training(config)
        if talk and data.notes:
            print("\n".join(data.notes), flush=True)
        seed_all(recipe.seed)
        net = _start(config, data, resume)
        state = state_of(net)
        kind = recipe_type(task.name, (state.origin or {}).get("name", recipe.model))
        if not isinstance(recipe, kind):
            raise ValueError(f"this {type(net).__name__} is not trained by a {type(recipe).__name__}, but by a "
                             f"{kind.__module__}.{kind.__name__}")
        state.class_names = data.training.class_names or None
        prepared = task.prepare(net, recipe, data)
        net.to(device)
        _try_out(net, task, prepared, data.classes, device)

        workers = min(8, len(os.sched_getaffinity(0))) if config.workers is None else config.workers
        pin = device.type == "cuda"
        batches = TrainBatches(data.training, recipe, data.classes, workers=workers, rank=rank, world=world,
                               pin_memory=pin, collate=task.collate_training)
        loader = DataLoader(_share(data.validation, rank, world), recipe.batch_size, num_workers=workers,
                            collate_fn=task.collate, pin_memory=pin, worker_init_fn=ignore_interrupts)

        def measure(net: nn.Module) -> dict[str, float]:
            rows = task.evaluate(net, loader, ["super", "base"], device, progress=talk, distributed=world > 1)
            numbers = {f"val_{name}_{which}": getattr(row, field) for name, field in task.logged.items()
                       for which, row in zip(("super", "base"), rows, strict=True)}
            every = of_all_processes([*data.training.unreadable, *data.validation.unreadable])
            unreadable = list(dict.fromkeys(itertools.chain(*every)))
            if unreadable and talk:
                print(f"skipped {len(unreadable)} {task.skipped} so far, e.g. {unreadable[0]}", flush=True)
            # Of what there is nothing of, such as objects of a size, there is no accuracy.
            return {name: value for name, value in numbers.items() if value is not None} | {
                "unreadable": len(unreadable)}

        if talk:
            print(_describe(net, config, resume, data, prepared), flush=True)
        return fit(
            net, batches, measure, recipe, out=config.out, resume=resume, overwrite=overwrite,
            loss=task.loss(net, recipe), accuracy=task.score, device=device, config=config.to_dict(),
            extra={"task": task.name, "data": prepared.stored}, tensorboard=config.tensorboard, progress=progress,
        )


_FILES = ("data", "checkpoint", "weights", "backbone")


def _with_whole_paths(config: _Run) -> _Run:
    """A run may be resumed from another folder than it was started in."""
    return dataclasses.replace(config, **{
        name: os.path.abspath(path) for name in _FILES
        if (path := getattr(config, name, None)) is not None and os.path.exists(path)})


def _check_out(config: _Run, resume: bool, overwrite: bool) -> None:
    """Raise ValueError if the folder of the run holds what would be lost."""
    if not (resume or overwrite):
        refuse_overwriting(Path(config.out))
    for name in _FILES[1:]:
        path = getattr(config, name, None)
        if overwrite and path and Path(path).resolve().parent == Path(config.out).resolve():
            raise ValueError(f"{path} lies in the folder that is to be overwritten; choose another --out")


@contextlib.contextmanager
def _process_group(device: str | None) -> Iterator[torch.device]:
    """The device to use; inside the block a process group, if `torchrun` started this."""
    gpu = torch.cuda.is_available() if device is None else torch.device(device).type == "cuda"
    if gpu and not torch.cuda.is_available():
        raise ValueError(f"device={device!r}, but this installation of torch finds no GPU")
    own = "RANK" in os.environ and "WORLD_SIZE" in os.environ and not dist.is_initialized()
    if gpu and own:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    if own:
        dist.init_process_group("nccl" if gpu else "gloo")
    try:
        if gpu and (own or device in (None, "cuda")):
            yield torch.device("cuda", torch.cuda.current_device())
        else:
            yield torch.device(device or "cpu")
    finally:
        if own:
            dist.destroy_process_group()


def _start(config: _Run, data: Data, resume: bool) -> nn.Module:
    """The net before training. A resumed run only needs its structure."""
    recipe, task = config.recipe, config.task
    if sum(bool(getattr(config, name)) for name in config.starts) > 1:
        raise ValueError(f"pass one of {', '.join(f'--{name}' for name in config.starts)}")
    if config.checkpoint is not None:
        net = _load_start(config, resume)
        if task_of(net) is not task:
            raise ValueError(f"{config.checkpoint} holds a {type(net).__name__}, which is no {task.makes}")
        _set_classes(net, config, data, resume)
        return net
    if "num_classes" in recipe.model_kwargs:
        raise ValueError("num_classes does not belong into model_kwargs: the data say how many there are"
                         + (", or --num-classes" if hasattr(config, "num_classes") else ""))
    try:
        net = task.build(config, data.classes, fresh=not resume)
    except TypeError as error:
        raise ValueError(f"{recipe.model} cannot be built with --model-kwargs {json.dumps(recipe.model_kwargs)}: "
                         f"{error}") from error
    if config.weights is not None and not resume:
        _load_weights(net, config, data.classes)
    return net


def _load_weights(net: nn.Module, config: _Run, classes: int) -> None:
    """All weights of the file must fit, but with `new_head` those of heads."""
    report = load_weights(net, config.weights, strict=False)
    heads = config.task.heads(net)
    wrong = [problem for problem in (*report.missing, *report.mismatched, *report.unexpected)
             if not problem.startswith(heads)]
    if wrong:
        raise ValueError(f"{config.weights} does not fit {config.recipe.model} ({report.naming}, {len(report.loaded)} "
                         "entries do):\n" + "\n".join(report.problems()))
    if report.mismatched and not config.new_head:
        raise ValueError(f"{config.weights} is for other classes than the {classes} of the data "
                         f"({report.mismatched[0]}); pass --new-head to begin with fresh heads")
    if not report.complete and not config.new_head:
        raise ValueError(f"{config.weights} does not fit {config.recipe.model}:\n" + "\n".join(report.problems()))


def _load_start(config: _Run, resume: bool) -> nn.Module:
    """The net of `--checkpoint`; of a resumed run whose file is gone, a net of the same structure."""
    written = (Path(config.out) / name for name in (BEST, FINAL))
    if not resume or os.path.exists(config.checkpoint):
        return load(config.checkpoint)
    if (file := next(filter(Path.exists, written), None)) is None:
        raise ValueError(f"the run started from {config.checkpoint}, which is gone: put it back, a resumed run takes "
                         "its structure from it")
    return load(file)


def _set_classes(net: nn.Module, config: _Run, data: Data, resume: bool) -> None:
    """Give a net of `--checkpoint` a fresh head, or see that it has the classes of the data.

    Raises:
        ValueError: if it has others.
    """
    classes, names = data.classes, data.training.class_names
    if config.new_head:
        interface_of(net).reset_classifier(classes)
        return
    count, known = getattr(interface_of(net), "num_classes", classes), state_of(net).class_names
    if count != classes:
        raise ValueError(f"{config.checkpoint} has {count} classes, the data has {classes}; pass --new-head to put a "
                         "fresh classifier on it")
    if known and names and list(known) != list(names) and not resume:
        label = next(i for i, (a, b) in enumerate(zip(known, names)) if a != b)
        raise ValueError(f"{config.checkpoint} names its classes otherwise than the data: class {label} is "
                         f"{known[label]!r} there, {names[label]!r} in the data; pass --new-head to put a fresh "
                         "classifier on it")


def _try_out(net: nn.Module, task: Task, prepared: Prepared, classes: int, device: torch.device) -> None:
    """Run the net once, so that what cannot work is said before anything is written."""
    for size in prepared.sizes:
        try:
            with evaluating(net), torch.inference_mode():
                outputs = try_forward(net, torch.zeros(1, 3, size, size, device=device))
        except ValueError as error:
            raise ValueError(f"{error}{prepared.hint}") from error
        task.check_outputs(outputs, classes)


def _describe(net: nn.Module, config: _Run, resume: bool, data: Data, prepared: Prepared) -> str:
    state, recipe, file = state_of(net), config.recipe, config.start
    millions = sum(p.numel() for p in net.parameters()) / 1e6
    start = ("resumed" if resume else f"from {file}" if file else
             "pretrained" if getattr(config, "pretrained", False) else "from scratch")
    stacks = [f"a {stack.name} of {layers} layers" for stack, layers in
              zip(state.plan.stacks, state.full.layers, strict=True)]
    depths = f"{math.prod(2 if isinstance(entry, bool) else entry for entry in state.full)} depths"
    if stacks and state.full.flags:
        depths = " and ".join([f"{len(state.full.flags)} flags", *stacks])
    warning = None if resume or file else config.task.warning(net)
    return (f"{(state.origin or {}).get('name', recipe.model)}, {millions:.1f} M parameters, {depths}, {start}\n"
            f"{len(data.training)} images to train on, {len(data.validation)} to evaluate, {data.classes} classes; "
            f"{prepared.text}\n"
            f"{recipe.optimizer}, learning rate {recipe.lr:g}, {recipe.schedule}; results in {config.out}"
            + (f"\nwarning: {warning}" if warning else ""))


def _share(data: Dataset, rank: int, world: int) -> Dataset:
    """What one process evaluates. Too few images for all are evaluated by each."""
    if isinstance(data, IterableDataset) or world == 1 or len(data) < world:
        return data
    return Subset(data, range(rank, len(data), world))
