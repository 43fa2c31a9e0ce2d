"""Train an any-depth classifier on your images by self-distillation.

DATA is a folder with the folders train and val (or validation), each with one
sub-folder of images per class; or a data set of timm's factory by name, with the
folder it is stored in (torch/cifar10:FOLDER, hfds/NAME, tfds/NAME:FOLDER).

One set of weights learns to run at every depth: per batch the whole net (super)
learns from the labels, then the net at its shallowest (base) from the whole net.
Both are evaluated after every epoch. The folder --out gets

  model.safetensors  the net after the last epoch, for adn eval, predict, profile
  best.safetensors   after the epoch with the best mean of super and base accuracy
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

The recipes, but for "default", are those published with Adaptive Depth Networks
(NeurIPS 2024), for 4 processes: with another number, scale --lr with the batch.
In brackets below is what "default" says.
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

from ..train.recipes import DEFAULT, HINTS, RECIPES, Recipe, is_optional

_START = ("pretrained", "checkpoint", "weights", "new_head")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    # What is not given stays absent here: a resumed run takes it from its folder.
    parser.argument_default, before = argparse.SUPPRESS, parser.argument_default
    parser.usage = "adn train [DATA] --out DIR [--recipe NAME] [--resume] [options]"
    parser.add_argument("data", nargs="?", metavar="DATA", help="images; may be left out with --resume")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder of the run; made if it is not there")
    parser.add_argument("--recipe", choices=RECIPES, help=f"settings to start from (default: {DEFAULT})")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out, with its own settings; "
                        "those given replace them")
    parser.add_argument("--overwrite", action="store_true", help="replace the run in --out")

    group = parser.add_argument_group("start")
    group.add_argument("--pretrained", action="store_true", help="start from timm's weights of the model (downloaded)")
    group.add_argument("--checkpoint", metavar="FILE", help="start from a net of adn.save, in place of --model")
    group.add_argument("--weights", metavar="FILE", help="start from weights of timm, torchvision or the reference "
                       "implementation, for --model")
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
    for field in dataclasses.fields(Recipe):
        title = field.metadata["group"]
        if title not in groups:
            groups[title] = parser.add_argument_group(f"recipe: {title}")
        _add_setting(groups[title], field)
    parser.argument_default = before


def run(args: argparse.Namespace) -> int:
    from ..train import Config, Interrupted, train

    given = vars(args)
    settings = {field.name: given[field.name] for field in dataclasses.fields(Recipe) if field.name in given}
    others = {field.name: given[field.name] for field in dataclasses.fields(Config)
              if field.name in given and field.name != "recipe"}
    resume = "resume" in given
    if resume:
        config = Config.of_run(args.out)
        if changed := [name for name in _START if name in others]:
            raise ValueError(f"--{changed[0].replace('_', '-')} is how a run begins; it cannot change by --resume")
        base = RECIPES[given["recipe"]] if "recipe" in given else config.recipe
        config = dataclasses.replace(config, **others, recipe=base.but(**settings))
    elif "data" not in given:
        raise ValueError("no images to train on: pass DATA, or --resume to go on with the run in --out")
    else:
        if "checkpoint" in given and (clash := [name for name in ("model", "model_kwargs", "twins") if name in given]):
            raise ValueError(f"--checkpoint says what the net is; leave out --{clash[0].replace('_', '-')}")
        config = Config(**others, recipe=RECIPES[given.get("recipe", DEFAULT)].but(**settings))
    try:
        train(config, resume=resume, overwrite="overwrite" in given)
    except Interrupted as stop:
        if os.environ.get("RANK", "0") == "0":
            print(f"{stop}:\nadn train --out {shlex.quote(args.out)} --resume", file=sys.stderr)
        return 130
    return 0


def _add_setting(group: argparse._ArgumentGroup, field: dataclasses.Field) -> None:
    option, kind, choices = f"--{field.name.replace('_', '-')}", HINTS[field.name], field.metadata["choices"]
    text = f"{field.metadata['help']} [{_shown(getattr(RECIPES[DEFAULT], field.name))}]".replace("%", "%%")
    if kind is bool:
        group.add_argument(option, action=argparse.BooleanOptionalAction, help=text)
        return
    metavar = "|".join([*choices, *(["none"] if is_optional(field.name) else [])]) if choices else "X"
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
