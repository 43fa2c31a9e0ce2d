"""`train`: from a folder of images to an any-depth net on the disk."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset

from ..core.state import state_of
from ..data.images import ImageData, ImageStream, collate, data_config, eval_transform, open_dataset
from ..measure.accuracy import evaluate, evaluating, try_forward
from ..models.registry import PREFIX, create_model
from ..weights.checkpoint import load
from ..weights.foreign import load_weights
from .data import TrainBatches, train_transform
from .folder import BEST, CONFIG, FINAL, refuse_overwriting
from .interrupts import ignore_interrupts
from .loop import Result, fit
from .recipes import RECIPES, Recipe
from .seeds import seed_all

Images = ImageData | ImageStream
C = TypeVar("C", bound="Config")


@dataclasses.dataclass(frozen=True)
class Config:
    """A training run: the recipe, and where things are.

    Attributes:
        data: a folder with `train` and `val` (or `validation`), each with one sub-folder of images per class; or a
            data set as `adn.data.open_dataset` takes it.
        out: folder for what the run writes, see `fit`.
        recipe: every setting the numbers depend on.
        pretrained: start from timm's weights of the model.
        checkpoint: start from a file of `adn.save` in place of the recipe's model.
        weights: start from these weights, see `adn.load_weights`.
        new_head: with `checkpoint`, put a fresh classifier for the classes of the data on the net.
        train_split, val_split: names of the two parts of the data.
        download: fetch a named data set that is not there.
        num_classes: of the data, where it does not say itself.
        workers: processes that read images; None = one per core, at most 8. What is drawn at random depends on how many
            there are.
        device: "cpu", "cuda", "cuda:1"; None = a GPU if there is one.
        tensorboard: write the log for TensorBoard too.
    """

    data: str
    out: str
    recipe: Recipe = RECIPES["default"]
    pretrained: bool = False
    checkpoint: str | None = None
    weights: str | None = None
    new_head: bool = False
    train_split: str = "train"
    val_split: str = "validation"
    download: bool = False
    num_classes: int | None = None
    workers: int | None = None
    device: str | None = None
    tensorboard: bool = False

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"recipe": self.recipe.to_dict()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Config:
        return cls(**{**values, "recipe": Recipe.from_dict(values["recipe"])})

    @classmethod
    def of_run(cls, out: str | os.PathLike[str]) -> Config:
        """What the run in a folder was started with.

        Raises:
            ValueError: if there is no run.
        """
        return config_of_run(cls, out)


def config_of_run(kind: type[C], out: str | os.PathLike[str]) -> C:
    path = Path(out) / CONFIG
    try:
        return kind.from_dict(json.loads(path.read_text()))
    except FileNotFoundError:
        raise ValueError(f"nothing to resume in {os.fspath(out)}: there is no {CONFIG}") from None
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not what adn train wrote ({error!r})") from error


def task_of_run(out: str | os.PathLike[str]) -> str | None:
    """What the run in a folder trains: "classify" or "detect"; None if there is none."""
    try:
        return json.loads((Path(out) / CONFIG).read_text()).get("task", "classify")
    except (OSError, ValueError, AttributeError):
        return None


def train(config: Config, *, resume: bool = False, overwrite: bool = False, progress: bool = True) -> Result:
    """Train an any-depth net on images; `adn train` from Python.

    Started by `torchrun`, processes share the work: NCCL with GPUs, gloo without.

    Args:
        config: what to do; for a resumed run usually `Config.of_run(out)`, possibly with changes.
        resume, overwrite, progress: see `fit`.

    Raises:
        ValueError: on data without images or with one class, classes that do not fit each other or the checkpoint, or
            a net that cannot take the images.
        Otherwise as `fit`.
    """
    config = with_whole_paths(config)
    with process_group(config.device) as device:
        rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        talk, recipe = progress and rank == 0, config.recipe
        if rank == 0:
            check_out(config, resume, overwrite)
        training, validation = _open(config)
        classes = _count_classes(config, training)
        seed_all(recipe.seed)
        net = _start(config, classes, training.class_names or None, resume)
        state_of(net).class_names = training.class_names or None
        sizes = _data_configs(net, recipe)
        training.transform = train_transform(recipe, sizes["train"])
        validation.transform = eval_transform(**sizes["eval"])
        net.to(device)
        _try_out(net, classes, {config["size"] for config in sizes.values()}, device)

        workers = min(8, len(os.sched_getaffinity(0))) if config.workers is None else config.workers
        pin = device.type == "cuda"
        batches = TrainBatches(training, recipe, classes, workers=workers, rank=rank, world=world, pin_memory=pin)
        loader = DataLoader(share(validation, rank, world), recipe.batch_size, num_workers=workers, collate_fn=collate,
                            pin_memory=pin, worker_init_fn=ignore_interrupts)

        def measure(net: nn.Module) -> dict[str, float]:
            rows = evaluate(net, loader, ["super", "base"], device, progress=talk)
            metrics = {f"val_{key}_{name}": _mean(getattr(row, key), row.images, device)
                       for key in ("top1", "top5", "loss") for name, row in zip(("super", "base"), rows, strict=True)}
            unreadable = gather([*training.unreadable, *validation.unreadable])
            if unreadable and talk:
                print(f"skipped {len(unreadable)} unreadable images so far, e.g. {unreadable[0]}", flush=True)
            return metrics | {"unreadable": len(unreadable)}

        if talk:
            start = "resumed" if resume else _source(config)
            print(_describe(net, config, start, training, validation, sizes), flush=True)
        return fit(
            net, batches, measure, recipe, out=config.out, resume=resume, overwrite=overwrite, device=device,
            config=config.to_dict(), extra={"data": sizes["eval"]}, tensorboard=config.tensorboard, progress=progress,
        )


_FILES = ("data", "checkpoint", "weights", "backbone")


def with_whole_paths(config: C) -> C:
    """A run may be resumed from another folder than it was started in."""
    return dataclasses.replace(config, **{
        name: os.path.abspath(path) for name in _FILES
        if (path := getattr(config, name, None)) is not None and os.path.exists(path)})


def check_out(config: C, resume: bool, overwrite: bool) -> None:
    """Raise ValueError if the folder of the run holds what would be lost."""
    if not (resume or overwrite):
        refuse_overwriting(Path(config.out))
    for name in _FILES[1:]:
        path = getattr(config, name, None)
        if overwrite and path and Path(path).resolve().parent == Path(config.out).resolve():
            raise ValueError(f"{path} lies in the folder that is to be overwritten; choose another --out")


@contextlib.contextmanager
def process_group(device: str | None) -> Iterator[torch.device]:
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


def _open(config: Config) -> tuple[Images, Images]:
    """Training and validation images, with the same labels."""
    training = _open_split(config, config.train_split, need_classes=2, training=True)
    validation = _open_split(config, config.val_split)
    names, others = training.class_names, validation.class_names
    if names and others and names != others:
        if unknown := sorted(set(others) - set(names)):
            raise ValueError(f"classes of {config.val_split!r} that {config.train_split!r} does not have: "
                             f"{', '.join(unknown[:5])}; the two must have the same classes")
        # A class without validation images must not shift the labels of those after it.
        validation = _open_split(config, config.val_split, class_map={name: i for i, name in enumerate(names)})
    return training, validation


def _open_split(config: Config, split: str, **settings: Any) -> Images:
    try:
        return open_dataset(config.data, split, download=config.download, **settings)
    except ValueError as error:
        if not os.path.isdir(config.data):
            raise
        raise ValueError(f"{error}. Training reads the folders train and val of DATA (other names: --train-split, "
                         "--val-split), each with one sub-folder of images per class") from error


def _count_classes(config: Config, training: Images) -> int:
    known = len(training.class_names) or None
    if config.num_classes is not None and known not in (None, config.num_classes):
        raise ValueError(f"num_classes={config.num_classes}, but the data has {known} classes")
    if (count := known or config.num_classes) is None:
        raise ValueError(f"{config.data!r} does not say how many classes it has; pass --num-classes")
    return count


def _start(config: Config, classes: int, names: Sequence[str] | None, resume: bool) -> nn.Module:
    """The net before training. A resumed run only needs its structure."""
    recipe = config.recipe
    if config.checkpoint is not None:
        if config.weights or config.pretrained:
            raise ValueError("pass one of --checkpoint, --weights, --pretrained")
        net = load_start(config, resume)
        set_classes(net, config, classes, names, resume)
        return net
    name = recipe.model if recipe.model.startswith(PREFIX) else PREFIX + recipe.model
    if "num_classes" in recipe.model_kwargs:
        raise ValueError("num_classes does not belong into model_kwargs: the data say how many there are, or "
                         "--num-classes")
    try:
        net = create_model(name, num_classes=classes, pretrained=config.pretrained and not resume, twins=recipe.twins,
                           **recipe.model_kwargs)
    except TypeError as error:
        raise ValueError(f"{name} cannot be built with --model-kwargs {json.dumps(recipe.model_kwargs)}: {error}"
                         ) from error
    if config.weights is not None and not resume:
        report = load_weights(net, config.weights, strict=not config.new_head)
        head = tuple(f"{part}." for part in _head_names(net))
        if wrong := [problem for problem in (*report.missing, *report.mismatched) if not problem.startswith(head)]:
            raise ValueError(f"{config.weights} does not fit {name}: {'; '.join(wrong[:4])}")
    return net


def load_start(config: C, resume: bool) -> nn.Module:
    """The net of `--checkpoint`; of a resumed run whose file is gone, a net of the same structure."""
    written = (Path(config.out) / name for name in (BEST, FINAL))
    if not resume or os.path.exists(config.checkpoint):
        return load(config.checkpoint)
    if (file := next(filter(Path.exists, written), None)) is None:
        raise ValueError(f"the run started from {config.checkpoint}, which is gone: put it back, a resumed run takes "
                         "its structure from it")
    return load(file)


def set_classes(net: nn.Module, config: C, classes: int, names: Sequence[str] | None, resume: bool) -> None:
    """Give a net of `--checkpoint` a fresh head, or see that it has the classes of the data.

    Raises:
        ValueError: if it has others.
    """
    if config.new_head:
        net.reset_classifier(classes)
        return
    count, known = getattr(net, "num_classes", classes), state_of(net).class_names
    if count != classes:
        raise ValueError(f"{config.checkpoint} has {count} classes, the data has {classes}; pass --new-head to put a "
                         "fresh classifier on it")
    if known and names and list(known) != list(names) and not resume:
        label = next(i for i, (a, b) in enumerate(zip(known, names)) if a != b)
        raise ValueError(f"{config.checkpoint} names its classes otherwise than the data: class {label} is "
                         f"{known[label]!r} there, {names[label]!r} in the data; pass --new-head to put a fresh "
                         "classifier on it")


def _head_names(net: nn.Module) -> tuple[str, ...]:
    names = net.pretrained_cfg["classifier"]
    return (names,) if isinstance(names, str) else tuple(names)


def _data_configs(net: nn.Module, recipe: Recipe) -> dict[str, dict[str, Any]]:
    """How images are prepared, for training and for evaluation: arguments of `adn.data.eval_transform`."""
    common = {"interpolation": recipe.interpolation, "mean": recipe.mean, "std": recipe.std}
    return {
        "train": data_config(net, size=recipe.train_size, **common),
        "eval": data_config(net, size=recipe.eval_size or recipe.train_size, resize=recipe.eval_resize, **common),
    }


def _try_out(net: nn.Module, classes: int, sizes: set[int], device: torch.device) -> None:
    """Run the net once, so that what cannot work is said before anything is written."""
    for size in sizes:
        with evaluating(net), torch.inference_mode():
            logits = try_forward(net, torch.zeros(1, 3, size, size, device=device))
        if logits.shape != (1, classes):
            raise ValueError(f"logits of shape (1, {classes}) are needed, this net gives {tuple(logits.shape)}")


def _source(config: Config) -> str:
    file = config.checkpoint or config.weights
    return f"from {file}" if file else "pretrained" if config.pretrained else "from scratch"


def _describe(net: nn.Module, config: Config, start: str, training: Images, validation: Images,
              sizes: dict[str, dict[str, Any]]) -> str:
    state, recipe = state_of(net), config.recipe
    millions = sum(p.numel() for p in net.parameters()) / 1e6
    return (f"{(state.origin or {}).get('name', type(net).__name__)}, {millions:.1f} M parameters, "
            f"{2 ** len(state.full)} depths, {start}\n"
            f"{len(training)} images to train on, {len(validation)} to evaluate, {net.num_classes} classes; crops of "
            f"{sizes['train']['size']} and {sizes['eval']['size']} pixels\n"
            f"{recipe.optimizer}, learning rate {recipe.lr:g}, {recipe.schedule}; results in {config.out}")


def share(data: Images, rank: int, world: int) -> Dataset:
    """What one process evaluates. Too few images for all are evaluated by each."""
    if isinstance(data, IterableDataset) or world == 1 or len(data) < world:
        return data
    return Subset(data, range(rank, len(data), world))


def _mean(value: float, weight: int, device: torch.device) -> float:
    """Weighted mean over the processes."""
    if not dist.is_initialized():
        return value
    total = torch.tensor([value * weight, weight], dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return (total[0] / total[1]).item()


def gather(names: list[str]) -> list[str]:
    """Of all processes, each once."""
    if not dist.is_initialized():
        return names
    every: list[list[str]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(every, names)
    return sorted(set().union(*every))
