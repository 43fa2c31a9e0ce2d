"""Train an any-depth classifier or detector on your images by self-distillation.

DATA is a folder with the folders train and val (or validation), each with one
sub-folder of images per class; or a data set of timm's factory by name, with the
folder it is stored in (torch/cifar10:FOLDER, hfds/NAME, tfds/NAME:FOLDER).
With --task detect it is a COCO directory: annotations/instances_train2017.json
with images in train2017, and the same for val2017 (other layouts are found too).

One set of weights learns to run at every depth: per batch the whole net (super)
learns from the labels, then the net at its shallowest (base) from the whole net.
Both are evaluated after every epoch. The folder --out gets

  model.safetensors  the net after the last epoch, for adn eval, predict, profile
  best.safetensors   after the epoch with the best mean of super and base accuracy
                     (top-1, or average precision)
  log.csv            a line per epoch
  last.pt            what --resume needs
  config.json        the settings

Ctrl-C stops after the step at hand; --resume starts the interrupted epoch again.

examples:
  adn train flowers --out runs/flowers --model resnet50 --pretrained
  adn train flowers --out runs/small --model mobilenetv2_100 --epochs 60 --train-size 160
  adn train --out runs/flowers --resume --epochs 40
  adn train imagenet --out runs/r50 --recipe resnet50-150
  torchrun --nproc-per-node 4 -m adn train imagenet --out runs/swin --recipe swin-t-300
  adn train coco --task detect --out runs/detr --weights rtdetr_r50vd.pth --model rtdetr_r50vd
  adn train signs --task detect --out runs/signs --weights rtdetr.pth --new-head --model rtdetr_r18vd
  adn scenes digits --size 128 && adn train digits --task detect --recipe digits --out runs/digits

The recipes, but for "default", "detector" and "digits", are those published with
Adaptive Depth Networks (NeurIPS 2024) and AnyDepth-DETR (2026), for 4 processes:
with another number, scale --lr with the batch. In brackets below is what
"default" says, and "detector" where it differs.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
import shlex
import sys
import types
import typing
from typing import Any

from ..settings import Settings, about_setting, is_optional, setting_types
from ..train.recipes import DETECTION_RECIPES, RECIPES, default_recipe

_START = ("pretrained", "checkpoint", "weights", "backbone", "new_head")
_RECIPES: dict[str, Settings] = {**RECIPES, **DETECTION_RECIPES}
# By task, the recipe that the help has in brackets; and what recipes there are, the more special first.
_DEFAULTS = {task: default_recipe(task) for task in dict.fromkeys(recipe.task for recipe in _RECIPES.values())}
_KINDS = tuple(dict.fromkeys(map(type, reversed(_RECIPES.values()))))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    # What is not given stays absent here: a resumed run takes it from its folder.
    parser.argument_default, before = argparse.SUPPRESS, parser.argument_default
    parser.usage = "adn train [DATA] --out DIR [--task detect] [--recipe NAME] [--resume] [options]"
    parser.add_argument("data", nargs="?", metavar="DATA", help="images; may be left out with --resume")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder of the run; made if it is not there")
    parser.add_argument("--task", choices=tuple(_DEFAULTS), help="what to train (default: classify, or what the "
                        "recipe is for)")
    parser.add_argument("--recipe", choices=tuple(_RECIPES), metavar="NAME",
                        help="settings to start from: " + "; ".join(
                            f"to {task}, {', '.join(_of_task(task))}" for task in _DEFAULTS)
                        + " (default: the first, or for another kind of model its own)")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out, with its own settings; "
                        "those given replace them")
    parser.add_argument("--overwrite", action="store_true", help="replace the run in --out")

    group = parser.add_argument_group("start")
    group.add_argument("--pretrained", action="store_true", help="start from timm's weights of the model (downloaded)")
    group.add_argument("--checkpoint", metavar="FILE", help="start from a net of adn.save, in place of --model")
    group.add_argument("--weights", metavar="FILE", help="start from weights of timm, torchvision, RT-DETR or the "
                       "reference implementations, for --model")
    group.add_argument("--backbone", metavar="FILE", help="start a detector's backbone from weights of a classifier")
    group.add_argument("--new-head", action="store_true", help="with --checkpoint or --weights of other classes: start "
                       "with a fresh classifier")

    group = parser.add_argument_group("data and machine")
    group.add_argument("--train-split", metavar="NAME", help="folder or split to train on (default: train)")
    group.add_argument("--val-split", metavar="NAME", help="the one to evaluate on (default: validation, or val)")
    group.add_argument("--num-classes", type=int, metavar="N", help="for data that does not say")
    group.add_argument("--download", action="store_true", help="fetch a named data set that is not there")
    group.add_argument("--workers", type=int, metavar="N", help="processes that read images (default: one per core, at "
                       "most 8)")
    group.add_argument("--device", help="cpu, cuda or cuda:N (default: a GPU if there is one)")
    group.add_argument("--tensorboard", action="store_true", help="write the log for TensorBoard too, under --out")

    groups: dict[str, Any] = {}
    fields = {field.name: (kind, field) for kind in _KINDS for field in dataclasses.fields(kind)}
    for name, (kind, field) in fields.items():
        title = about_setting(kind, name)["group"]
        if title not in groups:
            groups[title] = parser.add_argument_group(f"recipe: {title}")
        tasks = {kind.task for kind in _KINDS if name in _names(kind)}
        _add_setting(groups[title], kind, field, only=None if tasks == set(_DEFAULTS) else " or ".join(sorted(tasks)))
    parser.argument_default = before


def run(args: argparse.Namespace) -> int:
    from ..train import Interrupted, train
    from ..train.run import CONFIGS, task_of_run

    given = vars(args)
    resume = "resume" in given
    named = _RECIPES.get(given.get("recipe"))
    task = given.get("task") or (named.task if named else resume and task_of_run(args.out)) or "classify"
    if named is not None and named.task != task:
        raise ValueError(f"--recipe {given['recipe']} is not one to {task}; pass one of {', '.join(_of_task(task))}")
    if not resume and "checkpoint" in given and (
            clash := [name for name in ("model", "model_kwargs", "twins") if name in given]):
        raise ValueError(f"--checkpoint says what the net is; leave out --{clash[0].replace('_', '-')}")
    kind = CONFIGS[task]
    config = kind.of_run(args.out) if resume else None
    model, size = _described(given["checkpoint"]) if "checkpoint" in given else (given.get("model"), None)
    recipe = named or (config.recipe if resume else default_recipe(task, model))
    settings = set().union(*map(_names, _KINDS)) & given.keys()
    others = set().union(*map(_names, CONFIGS.values())) & given.keys()
    for names, of in ((settings, type(recipe)), (others, kind)):
        if wrong := names - _names(of):
            raise ValueError(f"--{min(wrong).replace('_', '-')} has no meaning when training to {task}")
    settings, others = ({name: given[name] for name in names} for names in (settings, others - {"recipe"}))
    if resume:
        if changed := [name for name in _START if name in others]:
            raise ValueError(f"--{changed[0].replace('_', '-')} is how a run begins; it cannot change by --resume")
        config = dataclasses.replace(config, **others, recipe=recipe.but(**settings))
    elif "data" not in given:
        raise ValueError("no images to train on: pass DATA, or --resume to go on with the run in --out")
    else:
        if size and "size" in _names(type(recipe)):
            settings.setdefault("size", size)
        config = kind(**others, recipe=recipe.but(**settings))
    try:
        train(config, resume=resume, overwrite="overwrite" in given)
    except Interrupted as stop:
        if os.environ.get("RANK", "0") == "0":
            processes = os.environ.get("LOCAL_WORLD_SIZE")
            start = f"torchrun --nproc-per-node {processes} -m adn" if processes else "adn"
            print(f"{stop}:\n{start} train --out {shlex.quote(args.out)} --resume", file=sys.stderr)
        return 130
    return 0


def _described(checkpoint: str) -> tuple[str | None, int | None]:
    """Of a stored net, the name of its model and the side of the images that it was trained on."""
    from ..weights.checkpoint import read_metadata

    found = read_metadata(checkpoint)
    return (found["origin"] or {}).get("name"), (found["extra"].get("data") or {}).get("size")


def _names(kind: type) -> set[str]:
    return {field.name for field in dataclasses.fields(kind)}


def _of_task(task: str) -> list[str]:
    return [name for name, recipe in _RECIPES.items() if recipe.task == task]


def _add_setting(group: argparse._ArgumentGroup, recipe: type[Settings], field: dataclasses.Field, only: str | None
                 ) -> None:
    option, kind = f"--{field.name.replace('_', '-')}", setting_types(recipe)[field.name]
    about = about_setting(recipe, field.name)
    mark = "" if only is None else f"; to {only} only"
    shown = {task: _shown(getattr(default, field.name)) for task, default in _DEFAULTS.items()
             if hasattr(default, field.name)}
    default = ", to detect ".join(dict.fromkeys(shown.values()))
    text = f"{about['help']}{mark} [{default}]".replace("%", "%%")
    if kind is bool:
        group.add_argument(option, action=argparse.BooleanOptionalAction, help=text)
        return
    optional = is_optional(recipe, field.name)
    metavar = "|".join([*about["choices"], *(["none"] if optional else [])]) if about["choices"] else "X"
    group.add_argument(option, type=functools.partial(_value, kind), metavar=metavar, help=text)


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _value(kind: Any, text: str) -> Any:
    """What an option's text means for a setting of this type."""
    if isinstance(kind, types.UnionType):
        if text.lower() == "none":
            return None
        kind = next(part for part in typing.get_args(kind) if part is not type(None))
    try:
        if typing.get_origin(kind) is tuple:
            element = typing.get_args(kind)[0]
            return tuple(element(part.strip()) for part in text.split(",") if part.strip())
        if typing.get_origin(kind) is dict:
            return dict(json.loads(text))
        return kind(text)
    except (ValueError, TypeError):
        name = "JSON" if typing.get_origin(kind) is dict else getattr(kind, "__name__", "a list")
        raise argparse.ArgumentTypeError(f"{text!r} cannot be read as {name}") from None
