"""Recipes: every setting of a training run, with the published ones by name."""

from __future__ import annotations

import dataclasses
import functools
import types
import typing
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import timm.data
import timm.optim

from ..core.behaviours import TWINS
from ..data.transforms import multi_scale_sizes
from ..distill import VARIANTS
from ..models.rtdetr.criterion import CLASS_KL

DEFAULT = "default"
_INTERPOLATIONS = ("nearest", "bilinear", "bicubic")


def setting(group: str, default: Any, text: str, choices: tuple[str, ...] = ()) -> Any:
    return dataclasses.field(default=default, metadata={"group": group, "help": text, "choices": choices})


# The least value of settings, and which are shares of a whole.
_LEAST = {"epochs": 1, "batch_size": 1, "repeats": 1, "ema_every": 1, "train_size": 1, "eval_size": 1, "eval_resize": 1,
          "lr": 0, "lr_min": 0, "warmup_epochs": 0, "weight_decay": 0, "norm_decay": 0, "bias_decay": 0,
          "table_decay": 0, "mixup": 0, "cutmix": 0, "magnitude": 0, "seed": 0, "ema_ramp": 0, "backbone_lr": 0}
_SHARES = ("erase", "flip", "distort", "zoom_out", "crop", "min_area", "warmup_factor", "ema_decay", "label_smoothing",
           "alpha", "momentum")


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

    model: str = setting("model", "", "name of the model")
    model_kwargs: dict[str, Any] = dataclasses.field(default_factory=dict, metadata={
        "group": "model", "help": 'arguments of the model, as JSON: {"drop_path_rate": 0.1}', "choices": ()})
    twins: str = setting("model", "copy", "how the second norms start", TWINS)

    epochs: int = setting("optimisation", 150, "passes over the data")
    batch_size: int = setting("optimisation", 64, "images per step and process; the learning rate does not follow it")
    optimizer: str = setting(
        "optimisation", "momentum",
        "timm's name of an optimizer; momentum is plain SGD with momentum (timm's sgd adds Nesterov), adamw AdamW")
    lr: float = setting("optimisation", 0.1, "learning rate after warm-up")
    momentum: float = setting("optimisation", 0.9, "momentum, for optimizers that have one")
    weight_decay: float = setting("optimisation", 1e-4, "weight decay")
    norm_decay: float | None = setting("optimisation", None, "weight decay of norms, twins included; none = the same")
    bias_decay: float | None = setting("optimisation", None, "weight decay of parameters called bias; none = the same")
    table_decay: float | None = setting(
        "optimisation", None,
        "weight decay of class tokens, position embeddings and position bias tables; none = the same")
    clip: float | None = setting("optimisation", None, "largest norm of the gradient of both losses; none = no limit")
    amp: str | None = setting("optimisation", None, "mixed precision; none = float32", ("bf16", "fp16"))
    channels_last: bool = setting("optimisation", False, "keep images channels-last in memory")
    accelerate: bool = setting(
        "optimisation", False, "norm, activation and addition of blocks as one kernel, on a GPU; see adn.accelerate")
    compile: bool = setting("optimisation", False, "compile the net; the first steps of each mode take minutes")
    sync_bn: bool = setting("optimisation", False, "batch statistics over all processes")
    seed: int = setting("optimisation", 0, "of every random number: initial weights, order of images, augmentation")

    schedule: str = setting("schedule", "steps", "how the learning rate goes down", ("steps", "cosine", "constant"))
    milestones: tuple[int, ...] = setting(
        "schedule", (), "epochs after warm-up from which the rate is multiplied by gamma: 60,100,140")
    gamma: float = setting("schedule", 0.1, "factor at each milestone")
    lr_min: float = setting("schedule", 0.0, "where the cosine ends")
    warmup_epochs: int = setting("schedule", 0, "epochs of linear warm-up")
    warmup_factor: float = setting("schedule", 0.01, "share of the learning rate at which warm-up starts")

    ema: bool = setting(
        "averaging", False, "average the weights over time; the average is evaluated and saved. Made for long runs: it "
        "takes thousands of steps to forget its start, or warm-up")
    ema_decay: float = setting("averaging", 0.99998, "decay, before it is adapted to batch size and epochs")
    ema_every: int = setting("averaging", 32, "steps between updates")
    ema_ramp: int = setting(
        "averaging", 0, "updates n over which the decay rises, as ema_decay * (1 - exp(-n / ema_ramp)), whatever batch "
        "size and epochs; 0 = it does not")

    @property
    def rates(self) -> dict[str, float]:
        """Learning rates of their own, by the names that parameters begin with."""
        return {}

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value, choices = getattr(self, field.name), field.metadata["choices"]
            none = is_optional(type(self), field.name)
            if choices and value not in choices and not (value is None and none):
                raise ValueError(f"{field.name}={value!r}; pass one of {', '.join(choices)}{', or none' * none}")
        for name, least in _LEAST.items():
            value = getattr(self, name, None)
            if value is not None and value < least:
                raise ValueError(f"{name}={value}; pass {least} or more")
        for name in _SHARES:
            if not 0 <= getattr(self, name, 0) <= 1:
                raise ValueError(f"{name}={getattr(self, name)}; pass a number from 0 to 1")
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
class Recipe(Settings):
    """Every setting of the training of a classifier that its numbers depend on. `Recipe()` holds the reference's
    defaults.

    Raises:
        ValueError: if a setting is out of range; the message says what to pass.
    """

    model: str = setting("model", "resnet50", "timm model, with or without the prefix anydepth_")
    single_pass: bool = setting(
        "optimisation", False, "super-net and base-net in one forward and backward: faster, with the memory of both")
    label_smoothing: float = setting("loss", 0.0, "label smoothing")
    alpha: float = setting("loss", 0.5, "weight of the super-net's loss; the base-net's has 1 - alpha")
    temperature: float = setting("loss", 1.0, "temperature of distillation")
    top_classes: int | None = setting("loss", 500, "the super-net's largest so many classes are distilled; none = all")
    features: tuple[str, ...] = setting(
        "loss", (), "stages whose features are distilled too, by name or number: layer2,layer3; or all")
    variant: str = setting("loss", "neurips", "form of the loss, see adn.SelfDistillation", VARIANTS)

    mixup: float = setting("augmentation", 0.0, "alpha of mixup, 0 = off; with cutmix too, one of them per batch")
    cutmix: float = setting("augmentation", 0.0, "alpha of cutmix, 0 = off")
    augment: str | None = setting("augmentation", None, "TrivialAugmentWide or RandAugment", ("trivial", "rand"))
    magnitude: int = setting("augmentation", 9, "magnitude of RandAugment")
    erase: float = setting("augmentation", 0.0, "probability of erasing a rectangle")
    flip: float = setting("augmentation", 0.5, "probability of a horizontal flip")
    min_area: float = setting("augmentation", 0.08, "smallest share of the image a random crop shows")
    repeats: int = setting("augmentation", 1, "repeated augmentation: how often an image comes in a row, 1 = off")

    train_size: int | None = setting("images", 224, "side of training crops; none = what the model was made for")
    eval_size: int | None = setting("images", 224, "side of the evaluated centre crop; none = train_size")
    eval_resize: int | None = setting("images", 256, "shorter side before that crop; none = in the model's proportion")
    interpolation: str | None = setting("images", "bilinear", "of resizing; none = the model's own", _INTERPOLATIONS)
    mean: tuple[float, ...] | None = setting(
        "images", timm.data.IMAGENET_DEFAULT_MEAN, "per channel, for values in [0, 1]; none = the model's own")
    std: tuple[float, ...] | None = setting(
        "images", timm.data.IMAGENET_DEFAULT_STD, "per channel; none = the model's own")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.magnitude > 30:
            raise ValueError(f"magnitude={self.magnitude}; RandAugment knows 0 to 30")


@dataclasses.dataclass(frozen=True)
class DetectionRecipe(Settings):
    """Every setting of the training of a detector that its numbers depend on. `DetectionRecipe()` holds the published
    values of AnyDepth-DETR R50, but for what four processes share.

    Raises:
        ValueError: if a setting is out of range; the message says what to pass.
    """

    bias_ending: ClassVar[str] = "bias"
    whole_norms: ClassVar[bool] = True

    model: str = setting("model", "anydepth_rtdetr_r50vd", "a detector of adn.list_models()")
    epochs: int = setting("optimisation", 72, "passes over the data")
    batch_size: int = setting("optimisation", 4, "images per step and process")
    optimizer: str = setting("optimisation", "adamw", "timm's name of an optimizer")
    lr: float = setting("optimisation", 1e-4, "learning rate")
    backbone_lr: float | None = setting("optimisation", 1e-5, "learning rate of a detector's backbone; none = the same")
    norm_decay: float | None = setting("optimisation", 0.0, "weight decay of norms, twins included; none = the same")
    bias_decay: float | None = setting("optimisation", 0.0, "weight decay of biases; none = the same")
    clip: float | None = setting("optimisation", 0.1, "largest norm of the gradient of both losses; none = no limit")
    schedule: str = setting("schedule", "constant", "how the learning rate goes down", ("steps", "cosine", "constant"))
    ema: bool = setting("averaging", True, "average the weights over time; the average is evaluated and saved")
    ema_decay: float = setting("averaging", 0.9999, "decay of the average")
    ema_every: int = setting("averaging", 1, "steps between updates")
    ema_ramp: int = setting("averaging", 2000, "updates over which the decay of the average rises")

    class_kl: str = setting("loss", "softmax-mean", "how the super-net's classes are distilled, see "
                             "adn.models.rtdetr.criterion.DistillationLoss", CLASS_KL)
    cut_decoder: bool = setting(
        "loss", False, "train the base-net's decoder at the number of layers it has, not at all of them; measured on "
        "scenes of digits, this costs accuracy at every depth")

    distort: float = setting("augmentation", 0.5, "probability of each part of the photometric distortion")
    zoom_out: float = setting("augmentation", 0.5, "probability of zooming out, onto black")
    crop: float = setting("augmentation", 0.8, "probability of a crop with a least overlap with its objects")
    flip: float = setting("augmentation", 0.5, "probability of a horizontal flip")

    size: int = setting("images", 640, "side of images, a multiple of 32")
    multi_scale: bool = setting(
        "images", True, "train at sizes of 3/4 to 5/4 of that, drawn for each step, for super-net and base-net apart")

    def __post_init__(self) -> None:
        super().__post_init__()
        multi_scale_sizes(self.size)

    @property
    def rates(self) -> dict[str, float]:
        return {} if self.backbone_lr is None else {"backbone.": self.backbone_lr}


def setting_type(recipe: type[Settings], name: str) -> Any:
    """The type of a setting, as written."""
    return _hints(recipe)[name]


def is_optional(recipe: type[Settings], name: str) -> bool:
    """May this setting be None?"""
    kind = setting_type(recipe, name)
    return isinstance(kind, types.UnionType) and type(None) in typing.get_args(kind)


@functools.cache
def _hints(recipe: type[Settings]) -> dict[str, Any]:
    return typing.get_type_hints(recipe)


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


DEFAULT_DETECTION = "detector"

DETECTION_RECIPES: dict[str, DetectionRecipe] = {
    # For people's own images, best with weights to start from; not from the papers.
    DEFAULT_DETECTION: DetectionRecipe(epochs=50),
    # As published, for 4 processes.
    "rtdetr-r50-72": DetectionRecipe(twins="frozen", sync_bn=True),
    "rtdetr-r101-72": DetectionRecipe(model="anydepth_rtdetr_r101vd", twins="frozen", sync_bn=True, batch_size=8,
                                      lr=2e-4, backbone_lr=2e-6, weight_decay=2e-4, bias_decay=None),
    # A tiny detector for the scenes of `adn scenes`, on a CPU: without augmentation, as scenes differ enough, and in
    # small batches, as the number of steps counts.
    "digits": DetectionRecipe(
        model="rtdetr_r18vd", epochs=9, batch_size=8, lr=2.5e-3, backbone_lr=None, distort=0.0, zoom_out=0.0, crop=0.0,
        flip=0.0, size=128, multi_scale=False, ema_every=5, ema_decay=0.99, ema_ramp=40, schedule="cosine",
        model_kwargs={
            "backbone_args": {"width": 16}, "hidden": 64, "decoder_hidden": 64, "heads": 4, "feedforward": 128,
            "decoder_feedforward": 128, "decoder_layers": 3, "queries": 50, "num_denoising": 50}),
}


def recipe(name: str, **changes: Any) -> Recipe:
    """A recipe by name, with some settings changed.

    Raises:
        ValueError: if there is none of that name.
    """
    if name not in RECIPES:
        raise ValueError(f"no recipe {name!r}; pass one of {', '.join(RECIPES)}")
    return RECIPES[name].but(**changes)
