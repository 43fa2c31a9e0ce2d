"""What a training run sets, whatever is trained: optimisation, schedule, averaging; and what recipes are made of."""

from __future__ import annotations

import dataclasses
import functools
import typing
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import timm.optim

from .core.behaviours import TWINS


def setting(group: str, default: Any, text: str, choices: tuple[str, ...] = (), *, least: float | None = None,
            share: bool = False) -> Any:
    """A field of a recipe.

    Args:
        group, text: where `adn train --help` has it, and what it says.
        choices: all values that it may have.
        least: the least value.
        share: it is a number from 0 to 1.
    """
    about = {"group": group, "help": text, "choices": choices, "least": least, "share": share}
    start = {"default_factory": dict} if default == {} else {"default": default}
    return dataclasses.field(**start, metadata=about)


@dataclasses.dataclass(frozen=True)
class Settings:
    """What every training run sets: optimisation, schedule, averaging. What each field means is in its metadata
    (`help`), from which `adn train --help` is made.

    Raises:
        ValueError: if a setting is out of range; the message says what to pass.
    """

    # What ends with it counts as a bias, as the projections of attention have some; of a norm, does its bias?
    bias_ending: ClassVar[str] = ".bias"
    whole_norms: ClassVar[bool] = False
    task: ClassVar[str] = "classify"  # what is trained, see `adn.tasks`

    model: str = setting("model", "", "name of the model")
    model_kwargs: dict[str, Any] = setting(  # noqa: RUF009
        "model", {}, 'arguments of the model, as JSON: {"drop_path_rate": 0.1}')
    twins: str = setting("model", "copy", "how the second norms start", TWINS)

    epochs: int = setting("optimisation", 150, "passes over the data", least=1)
    batch_size: int = setting("optimisation", 64, "images per step and process; the learning rate does not follow it",
                              least=1)
    optimizer: str = setting(
        "optimisation", "momentum",
        "timm's name of an optimizer; momentum is plain SGD with momentum (timm's sgd adds Nesterov), adamw AdamW")
    lr: float = setting("optimisation", 0.1, "learning rate after warm-up", least=0)
    momentum: float = setting("optimisation", 0.9, "momentum, for optimizers that have one", share=True)
    weight_decay: float = setting("optimisation", 1e-4, "weight decay", least=0)
    norm_decay: float | None = setting("optimisation", None, "weight decay of norms, twins included; none = the same",
                                       least=0)
    bias_decay: float | None = setting("optimisation", None, "weight decay of parameters called bias; none = the same",
                                       least=0)
    table_decay: float | None = setting(
        "optimisation", None,
        "weight decay of class tokens, position embeddings and position bias tables; none = the same", least=0)
    nominal_batch: int | None = setting(
        "optimisation", None, "images of a step of the optimizer, over all processes: as many batches as come nearest; "
        "none = one batch", least=1)
    clip: float | None = setting("optimisation", None, "largest norm of the gradient of both losses; none = no limit")
    amp: str | None = setting("optimisation", None, "mixed precision; none = float32", ("bf16", "fp16"))
    channels_last: bool = setting("optimisation", False, "keep images channels-last in memory")
    accelerate: bool = setting(
        "optimisation", False, "norm, activation and addition of blocks as one kernel, on a GPU; see adn.accelerate")
    compile: bool = setting("optimisation", False, "compile the net; the first steps of each mode take minutes")
    sync_bn: bool = setting("optimisation", False, "batch statistics over all processes")
    seed: int = setting("optimisation", 0, "of every random number: initial weights, order of images, augmentation",
                        least=0)

    schedule: str = setting("schedule", "steps", "how the learning rate goes down",
                            ("steps", "cosine", "linear", "constant"))
    each_step: bool = setting("schedule", False, "the learning rate changes with every batch, not with every epoch")
    milestones: tuple[int, ...] = setting(
        "schedule", (), "epochs after warm-up from which the rate is multiplied by gamma: 60,100,140")
    gamma: float = setting("schedule", 0.1, "factor at each milestone")
    lr_min: float = setting("schedule", 0.0, "where the cosine or the line ends", least=0)
    warmup_epochs: int = setting("schedule", 0, "epochs of linear warm-up", least=0)
    warmup_factor: float = setting("schedule", 0.01, "share of the learning rate at which warm-up starts", share=True)

    warmup_momentum: float | None = setting(
        "schedule", None, "momentum at which warm-up starts, for optimizers that have one; none = where it stays",
        share=True)

    ema: bool = setting(
        "averaging", False, "average the weights over time; the average is evaluated and saved. Made for long runs: it "
        "takes thousands of steps to forget its start, or warm-up")
    ema_decay: float = setting("averaging", 0.99998, "decay, before it is adapted to batch size and epochs", share=True)
    ema_every: int = setting("averaging", 32, "steps between updates", least=1)
    ema_ramp: int = setting(
        "averaging", 0, "updates n over which the decay rises, as ema_decay * (1 - exp(-n / ema_ramp)), whatever batch "
        "size and epochs; 0 = it does not", least=0)

    @property
    def rates(self) -> dict[str, float]:
        """Learning rates of their own, by the names that parameters begin with."""
        return {}

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            name, value, about = field.name, getattr(self, field.name), about_setting(type(self), field.name)
            choices, least, none = about["choices"], about["least"], is_optional(type(self), name)
            if value is None and none:
                continue
            if choices and value not in choices:
                raise ValueError(f"{name}={value!r}; pass one of {', '.join(choices)}{', or none' * none}")
            if None not in (least, value) and value < least:
                raise ValueError(f"{name}={value}; pass {least} or more")
            if about["share"] and not 0 <= value <= 1:
                raise ValueError(f"{name}={value}; pass a number from 0 to 1")
        if self.clip is not None and not self.clip > 0:
            raise ValueError(f"clip={self.clip}; pass a number above 0, or none for no limit")
        if list(self.milestones) != sorted(self.milestones):
            raise ValueError(f"milestones={self.milestones}; pass epochs in ascending order")
        known = timm.optim.list_optimizers()
        if self.optimizer not in known:
            raise ValueError(f"optimizer={self.optimizer!r} is none of timm's: {', '.join(known)}")

    def but(self, **changes: Any) -> Self:
        """The same recipe with some settings changed. Another model starts without the arguments of this one's."""
        if changes.get("model", self.model) != self.model:
            changes = {"model_kwargs": {}, **changes}
        unknown = set(changes) - {field.name for field in dataclasses.fields(self)}
        if unknown:
            raise ValueError(f"a recipe has no setting {', '.join(sorted(unknown))}")
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as JSON gives them back."""
        return {name: list(value) if isinstance(value, tuple) else value
                for name, value in dataclasses.asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        return cls().but(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})


@dataclasses.dataclass(frozen=True)
class DetectorSettings(Settings):
    """What the training of any detector sets: images and their augmentation. The recipe of a kind of detector adds the
    settings of its loss."""

    task: ClassVar[str] = "detect"

    distort: float = setting("augmentation", 0.5, "probability of each part of the photometric distortion",
                             share=True)
    zoom_out: float = setting("augmentation", 0.5, "probability of zooming out, onto black", share=True)
    crop: float = setting("augmentation", 0.8, "probability of a crop with a least overlap with its objects",
                          share=True)
    flip: float = setting("augmentation", 0.5, "probability of a horizontal flip", share=True)

    hue: float = setting("augmentation", 0.0, "change of hue, in parts of a full turn", share=True)
    saturation: float = setting("augmentation", 0.0, "change of saturation, in parts of it", share=True)
    brightness: float = setting("augmentation", 0.0, "change of brightness, in parts of it", share=True)
    mosaic: float = setting("augmentation", 0.0, "probability of a mosaic of four images", share=True)
    blend: float = setting("augmentation", 0.0, "probability of a blend of two images (mixup)", share=True)
    copy_paste: float = setting(
        "augmentation", 0.0, "share of the objects with outlines that are pasted once more, mirrored", share=True)
    scale: float = setting("augmentation", 0.0, "change of the size of images and objects, in parts of it", share=True)
    translate: float = setting("augmentation", 0.0, "change of their place, in parts of the side", share=True)
    plain_epochs: int = setting("augmentation", 0, "last epochs without mosaics, blends and copies", least=0)

    size: int = setting("images", 640, "side of images, a multiple of the model's stride: 32")
    multi_scale: bool = setting(
        "images", True, "train at sizes of 3/4 to 5/4 of that, drawn for each step, for super-net and base-net apart")


def about_setting(recipe: type[Settings], name: str) -> Mapping[str, Any]:
    """What is said of a setting where it is first made, or anew: `group`, `help`, `choices`, `least`, `share`. A plain
    default changes no more than that."""
    fields = (kind.__dict__.get("__dataclass_fields__", {}).get(name) for kind in recipe.__mro__)
    return next(field.metadata for field in fields if field is not None and field.metadata)


@functools.cache
def setting_types(recipe: type[Settings]) -> dict[str, Any]:
    """The type of each setting."""
    return typing.get_type_hints(recipe)


def is_optional(recipe: type[Settings], name: str) -> bool:
    """May this setting be None?"""
    return type(None) in typing.get_args(setting_types(recipe)[name])
