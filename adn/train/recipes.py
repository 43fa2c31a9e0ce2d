"""Recipes: every setting of a training run, with the published ones by name. Those of detectors are beside their
models."""

from __future__ import annotations

import dataclasses
from typing import Any

import timm.data

from ..distill import VARIANTS
from ..models.registry import ENTRIES
from ..models.registry import RECIPES as DETECTION_RECIPES
from ..settings import DetectorSettings, Settings, setting

DEFAULT, DEFAULT_DETECTION = "default", "detector"
_INTERPOLATIONS = ("nearest", "bilinear", "bicubic")


@dataclasses.dataclass(frozen=True)
class Recipe(Settings):
    """Every setting of the training of a classifier that its numbers depend on. `Recipe()` holds the reference's
    defaults."""

    model: str = setting("model", "resnet50", "timm model, with or without the prefix anydepth_; to detect, one of the "
                         "detectors in adn.list_models()")
    single_pass: bool = setting(
        "optimisation", False, "super-net and base-net in one forward and backward: faster, with the memory of both")
    label_smoothing: float = setting("loss", 0.0, "label smoothing", share=True)
    alpha: float = setting("loss", 0.5, "weight of the super-net's loss; the base-net's has 1 - alpha", share=True)
    temperature: float = setting("loss", 1.0, "temperature of distillation")
    top_classes: int | None = setting("loss", 500, "the super-net's largest so many classes are distilled; none = all")
    features: tuple[str, ...] = setting(
        "loss", (), "stages whose features are distilled too, by name or number: layer2,layer3; or all")
    variant: str = setting("loss", "neurips", "form of the loss, see adn.SelfDistillation", VARIANTS)

    mixup: float = setting("augmentation", 0.0, "alpha of mixup, 0 = off; with cutmix too, one of them per batch",
                           least=0)
    cutmix: float = setting("augmentation", 0.0, "alpha of cutmix, 0 = off", least=0)
    augment: str | None = setting("augmentation", None, "TrivialAugmentWide or RandAugment", ("trivial", "rand"))
    magnitude: int = setting("augmentation", 9, "magnitude of RandAugment", least=0)
    erase: float = setting("augmentation", 0.0, "probability of erasing a rectangle", share=True)
    flip: float = setting("augmentation", 0.5, "probability of a horizontal flip", share=True)
    min_area: float = setting("augmentation", 0.08, "smallest share of the image a random crop shows", share=True)
    repeats: int = setting("augmentation", 1, "repeated augmentation: how often an image comes in a row, 1 = off",
                           least=1)

    train_size: int | None = setting("images", 224, "side of training crops; none = what the model was made for",
                                     least=1)
    eval_size: int | None = setting("images", 224, "side of the evaluated centre crop; none = train_size", least=1)
    eval_resize: int | None = setting("images", 256, "shorter side before that crop; none = in the model's proportion",
                                      least=1)
    interpolation: str | None = setting("images", "bilinear", "of resizing; none = the model's own", _INTERPOLATIONS)
    mean: tuple[float, ...] | None = setting(
        "images", timm.data.IMAGENET_DEFAULT_MEAN, "per channel, for values in [0, 1]; none = the model's own")
    std: tuple[float, ...] | None = setting(
        "images", timm.data.IMAGENET_DEFAULT_STD, "per channel; none = the model's own")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.magnitude > 30:
            raise ValueError(f"magnitude={self.magnitude}; RandAugment knows 0 to 30")


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

# That of the default one.
DetectionRecipe: type[DetectorSettings] = type(DETECTION_RECIPES[DEFAULT_DETECTION])


# By task, what is set where no recipe is named.
_DEFAULTS: dict[str, Settings] = {each.task: each for each in (RECIPES[DEFAULT], DETECTION_RECIPES[DEFAULT_DETECTION])}


def recipe_type(task: str, model: str | None = None) -> type[Settings]:
    """What a recipe to train a model for a task is; models that are not known are as the default one."""
    if model in ENTRIES and ENTRIES[model].task == task:
        return ENTRIES[model].recipe
    return type(_DEFAULTS[task])


def default_recipe(task: str, model: str | None = None) -> Settings:
    """The recipe to train a model by where none is named."""
    kind = recipe_type(task, model)
    usual = (each for each in (_DEFAULTS[task], *DETECTION_RECIPES.values()) if type(each) is kind)
    return next(usual, None) or kind()


def recipe(name: str, **changes: Any) -> Recipe:
    """A recipe by name, with some settings changed.

    Raises:
        ValueError: if there is none of that name.
    """
    if name not in RECIPES:
        raise ValueError(f"no recipe {name!r}; pass one of {', '.join(RECIPES)}")
    return RECIPES[name].but(**changes)
