"""Recipes: every setting of a training run, with the published ones by name."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any

import timm.data
import timm.optim

from ..distill import VARIANTS

DEFAULT = "default"
_INTERPOLATIONS = ("nearest", "bilinear", "bicubic")


def _setting(group: str, default: Any, text: str, choices: tuple[str, ...] = ()) -> Any:
    return dataclasses.field(default=default, metadata={"group": group, "help": text, "choices": choices})


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Every setting of a training run that its numbers depend on. `Recipe()` holds the reference's defaults.

    What each field means is in its metadata (`help`), from which `adn train --help` is made.

    Raises:
        ValueError: if a setting is out of range; the message says what to pass.
    """

    model: str = _setting("model", "resnet50", "timm model, with or without the prefix anydepth_")
    model_kwargs: dict[str, Any] = dataclasses.field(default_factory=dict, metadata={
        "group": "model", "help": 'arguments of the model, as JSON: {"drop_path_rate": 0.1}', "choices": ()})
    twins: str = _setting("model", "copy", "how the second norms start", ("copy", "fresh"))

    epochs: int = _setting("optimisation", 150, "passes over the data")
    batch_size: int = _setting("optimisation", 64, "images per step and process; the learning rate does not follow it")
    optimizer: str = _setting(
        "optimisation", "momentum",
        "timm's name of an optimizer; momentum is plain SGD with momentum (timm's sgd adds Nesterov), adamw AdamW")
    lr: float = _setting("optimisation", 0.1, "learning rate after warm-up")
    momentum: float = _setting("optimisation", 0.9, "momentum, for optimizers that have one")
    weight_decay: float = _setting("optimisation", 1e-4, "weight decay")
    norm_decay: float | None = _setting("optimisation", None, "weight decay of norms, twins included; none = the same")
    bias_decay: float | None = _setting("optimisation", None, "weight decay of parameters called bias; none = the same")
    table_decay: float | None = _setting(
        "optimisation", None,
        "weight decay of class tokens, position embeddings and position bias tables; none = the same")
    clip: float | None = _setting("optimisation", None, "largest norm of the gradient of both losses; none = no limit")
    amp: str | None = _setting("optimisation", None, "mixed precision; none = float32", ("bf16", "fp16"))
    channels_last: bool = _setting("optimisation", False, "keep images channels-last in memory")
    single_pass: bool = _setting(
        "optimisation", False, "super-net and base-net in one forward and backward: faster, with the memory of both")
    accelerate: bool = _setting(
        "optimisation", False, "norm, activation and addition of blocks as one kernel, on a GPU; see adn.accelerate")
    compile: bool = _setting("optimisation", False, "compile the net; the first steps of each mode take minutes")
    sync_bn: bool = _setting("optimisation", False, "batch statistics over all processes")
    seed: int = _setting("optimisation", 0, "of every random number: initial weights, order of images, augmentation")

    schedule: str = _setting("schedule", "steps", "how the learning rate goes down", ("steps", "cosine", "constant"))
    milestones: tuple[int, ...] = _setting(
        "schedule", (), "epochs after warm-up from which the rate is multiplied by gamma: 60,100,140")
    gamma: float = _setting("schedule", 0.1, "factor at each milestone")
    lr_min: float = _setting("schedule", 0.0, "where the cosine ends")
    warmup_epochs: int = _setting("schedule", 0, "epochs of linear warm-up")
    warmup_factor: float = _setting("schedule", 0.01, "share of the learning rate at which warm-up starts")

    label_smoothing: float = _setting("loss", 0.0, "label smoothing")
    alpha: float = _setting("loss", 0.5, "weight of the super-net's loss; the base-net's has 1 - alpha")
    temperature: float = _setting("loss", 1.0, "temperature of distillation")
    top_classes: int | None = _setting("loss", 500, "the super-net's largest so many classes are distilled; none = all")
    features: tuple[str, ...] = _setting(
        "loss", (), "stages whose features are distilled too, by name or number: layer2,layer3; or all")
    variant: str = _setting("loss", "neurips", "form of the loss, see adn.SelfDistillation", VARIANTS)

    mixup: float = _setting("augmentation", 0.0, "alpha of mixup, 0 = off; with cutmix too, one of them per batch")
    cutmix: float = _setting("augmentation", 0.0, "alpha of cutmix, 0 = off")
    augment: str | None = _setting("augmentation", None, "TrivialAugmentWide or RandAugment", ("trivial", "rand"))
    magnitude: int = _setting("augmentation", 9, "magnitude of RandAugment")
    erase: float = _setting("augmentation", 0.0, "probability of erasing a rectangle")
    flip: float = _setting("augmentation", 0.5, "probability of a horizontal flip")
    min_area: float = _setting("augmentation", 0.08, "smallest share of the image a random crop shows")
    repeats: int = _setting("augmentation", 1, "repeated augmentation: how often an image comes in a row, 1 = off")

    train_size: int | None = _setting("images", 224, "side of training crops; none = what the model was made for")
    eval_size: int | None = _setting("images", 224, "side of the evaluated centre crop; none = train_size")
    eval_resize: int | None = _setting("images", 256, "shorter side before that crop; none = in the model's proportion")
    interpolation: str | None = _setting("images", "bilinear", "of resizing; none = the model's own", _INTERPOLATIONS)
    mean: tuple[float, ...] | None = _setting(
        "images", timm.data.IMAGENET_DEFAULT_MEAN, "per channel, for values in [0, 1]; none = the model's own")
    std: tuple[float, ...] | None = _setting(
        "images", timm.data.IMAGENET_DEFAULT_STD, "per channel; none = the model's own")

    ema: bool = _setting(
        "averaging", False, "average the weights over time; the average is evaluated and saved. Made for long runs: it "
        "takes thousands of steps to forget its start, or warm-up")
    ema_decay: float = _setting("averaging", 0.99998, "decay, before it is adapted to batch size and epochs")
    ema_every: int = _setting("averaging", 32, "steps between updates")

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value, choices = getattr(self, field.name), field.metadata["choices"]
            if choices and value not in choices and not (value is None and is_optional(field.name)):
                none = ", or none" if is_optional(field.name) else ""
                raise ValueError(f"{field.name}={value!r}; pass one of {', '.join(choices)}{none}")
        for name, least in (("epochs", 1), ("batch_size", 1), ("repeats", 1), ("ema_every", 1), ("train_size", 1),
                            ("eval_size", 1), ("eval_resize", 1), ("lr", 0), ("lr_min", 0), ("warmup_epochs", 0),
                            ("weight_decay", 0), ("norm_decay", 0), ("bias_decay", 0), ("table_decay", 0), ("mixup", 0),
                            ("cutmix", 0), ("magnitude", 0), ("seed", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name}={value}; pass {least} or more")
        for name in ("erase", "flip", "min_area", "warmup_factor", "ema_decay", "label_smoothing", "alpha", "momentum"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)}; pass a number from 0 to 1")
        if self.magnitude > 30:
            raise ValueError(f"magnitude={self.magnitude}; RandAugment knows 0 to 30")
        if self.clip is not None and not self.clip > 0:
            raise ValueError(f"clip={self.clip}; pass a number above 0, or none for no limit")
        if list(self.milestones) != sorted(self.milestones):
            raise ValueError(f"milestones={self.milestones}; pass epochs in ascending order")
        known = timm.optim.list_optimizers()
        if self.optimizer not in known:
            raise ValueError(f"optimizer={self.optimizer!r} is none of timm's: {', '.join(known)}")

    def but(self, **changes: Any) -> Recipe:
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
    def from_dict(cls, values: Mapping[str, Any]) -> Recipe:
        return cls().but(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})


HINTS = typing.get_type_hints(Recipe)


def is_optional(name: str) -> bool:
    """May this setting be None?"""
    return isinstance(HINTS[name], types.UnionType) and type(None) in typing.get_args(HINTS[name])


# The published commands (Adaptive Depth Networks, NeurIPS 2024), for 4 GPUs; the batch size is that of one.
_RESNET50 = Recipe(
    model="resnet50", model_kwargs={"zero_init_last": False}, epochs=150, batch_size=64, optimizer="momentum", lr=0.1,
    weight_decay=1e-4, norm_decay=0.0, bias_decay=0.0, schedule="steps", milestones=(60, 100, 140),
)

RECIPES: dict[str, Recipe] = {
    # For people's own images, with or without pretrained weights; not from the papers.
    DEFAULT: Recipe(
        model="resnet18", epochs=30, batch_size=64, optimizer="adamw", lr=5e-4, weight_decay=0.05, norm_decay=0.0,
        bias_decay=0.0, table_decay=0.0, schedule="cosine", warmup_epochs=3, label_smoothing=0.1, augment="trivial",
        clip=1.0, train_size=None, eval_size=None, eval_resize=None, interpolation=None, mean=None, std=None,
    ),
    "resnet50-150": _RESNET50,
    "resnet50-600": _RESNET50.but(
        epochs=600, batch_size=256, lr=0.5, weight_decay=2e-5, schedule="cosine", milestones=(), warmup_epochs=5,
        warmup_factor=0.01, mixup=0.2, cutmix=1.0, augment="trivial", erase=0.1, repeats=4, amp="fp16", ema=True,
        train_size=176, eval_resize=232,
    ),
    "mobilenetv2-300": Recipe(
        model="mobilenetv2_100", model_kwargs={"drop_rate": 0.2}, epochs=300, batch_size=64, optimizer="momentum",
        lr=0.1, weight_decay=1e-5, norm_decay=0.0, bias_decay=0.0, schedule="steps", milestones=(150, 225, 285),
    ),
    "swin-t-300": Recipe(
        model="swin_tiny_patch4_window7_224", model_kwargs={"drop_path_rate": 0.1}, epochs=300, batch_size=256,
        optimizer="adamw", lr=1e-3, weight_decay=0.05, norm_decay=0.0, bias_decay=0.0, table_decay=0.0,
        schedule="cosine", lr_min=1e-5, warmup_epochs=20, warmup_factor=0.01, label_smoothing=0.1, mixup=0.8,
        cutmix=1.0, augment="trivial", erase=0.25, interpolation="bicubic", repeats=4, clip=5.0, amp="fp16", ema=True,
        eval_resize=224,
    ),
    "vit-b16-300": Recipe(
        model="vit_base_patch16_224", epochs=300, batch_size=256, optimizer="adamw", lr=7.5e-4, weight_decay=0.2,
        schedule="cosine", warmup_epochs=30, warmup_factor=0.033, label_smoothing=0.11, mixup=0.2, cutmix=1.0,
        augment="rand", magnitude=9, repeats=3, clip=1.0, amp="fp16", ema=True,
    ),
}


def recipe(name: str, **changes: Any) -> Recipe:
    """A recipe by name, with some settings changed.

    Raises:
        ValueError: if there is none of that name.
    """
    if name not in RECIPES:
        raise ValueError(f"no recipe {name!r}; pass one of {', '.join(RECIPES)}")
    return RECIPES[name].but(**changes)
