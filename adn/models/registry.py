"""Models by name: timm's classifiers, converted, with the prefix `anydepth_`; detectors by names of their own."""

from __future__ import annotations

import difflib
import fnmatch
import functools
import importlib
import pkgutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
from torch import nn

from ..convert import convert
from ..core.deploy import Deploy
from ..core.state import is_any_depth, state_of, unwrap
from ..settings import Settings
from .entry import Adapter, Entry

PREFIX = "anydepth_"

# Models of timm that have nothing to bypass: no residual blocks that keep their shape, or one per stage. All others
# convert, as `tests/test_timm.py` tries.
_EXCLUDED = (
    "convmixer_*", "cspnext_tiny", "darknet17", "densenet*", "dla*", "dpn*", "efficientvim_*",
    "ese_vovnet19b_*", "hgnetv2_b[0-3]", "inception_v[34]", "lcnet_*", "legacy_xception", "mobilenetv1_*",
    "nasnet*", "pnasnet*", "rdnet_*", "resnest14d", "resnet10t", "resnet14t", "rexnet*", "selecsls*", "test_byobnet",
    "test_convnext[23]", "test_efficientnet*", "test_maxvit", "test_nfnet", "test_resnet", "tnt_*", "vgg*", "vovnet*")

# Arguments that say where weights come from, not what the model is: a checkpoint has weights of its own.
_ABOUT_WEIGHTS = {"cache_dir", "checkpoint_path", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay"}


# The models of this library's own, and recipes to train them by. A folder of this package is a kind of model.
ENTRIES: dict[str, Entry] = {}
RECIPES: dict[str, Settings] = {}
# What state dicts look like, of a model of each kind: a pattern of a name in it, and what it is then.
LOOKS: list[tuple[str, str]] = []
_ADAPTERS: list[Adapter] = []
for _kind in pkgutil.iter_modules([str(Path(__file__).parent)]):
    if _kind.ispkg:
        _presets = importlib.import_module(f"{__package__}.{_kind.name}.presets")
        ENTRIES |= _presets.ENTRIES
        RECIPES |= _presets.RECIPES
        LOOKS += getattr(_presets, "LOOKS", ())
        _ADAPTERS += getattr(_presets, "ADAPTERS", ())


def list_models(pattern: str = "*") -> list[str]:
    """Names for `create_model`, those that match a shell-style pattern ("*resnet50*"); nothing is built."""
    return fnmatch.filter(_names(), pattern)


def create_model(name: str, *, num_classes: int | None = None, pretrained: bool = False, twins: str | None = None,
                 **kwargs: Any) -> nn.Module:
    """A classifier of timm, converted; or a detector.

    Args:
        name: one of `list_models()`, such as "anydepth_resnet50"; a timm tag may follow ("anydepth_resnet50.a1_in1k").
            Detectors are of this library: those of one depth, without the prefix, are for `convert`.
        num_classes: size of the head; None = timm's default for the name, 80 for a detector.
        pretrained: start from timm's weights of that name and tag (downloaded).
        twins: how the second norms start, see `convert`. None = "copy"; for a detector "frozen", as in the reference,
            whose checkpoints say what is in them. Pass "copy" for training with a backbone that is not any-depth yet.
        kwargs: passed on to `timm.create_model`, or to the class of the detector. What cannot be written as
            JSON (a layer class) makes `save` store no recipe for the model: `load` then needs the model passed.

    Returns:
        The net at full depth, on the CPU, in training mode. It maps (B, 3, H, W) to logits (B, num_classes); a detector
        to what its class says.

    Raises:
        ValueError: on an unknown name; the message lists close ones.
        OSError: if the pretrained weights cannot be fetched.
    """
    if num_classes is not None:
        kwargs["num_classes"] = num_classes
    if name in ENTRIES:
        return _own(name, pretrained, twins, kwargs)
    if not isinstance(name, str) or name.partition(".")[0] not in _names():
        raise ValueError(_unknown(name))
    timm_name = name.removeprefix(PREFIX)
    try:
        timm.get_pretrained_cfg(timm_name, allow_unregistered=False)
    except RuntimeError as error:
        tags = ", ".join(timm.list_pretrained(f"{timm_name.partition('.')[0]}.*"))
        raise ValueError(f"{error} timm has {tags or 'none'}") from error
    try:
        model = timm.create_model(timm_name, pretrained=pretrained, **kwargs)
    except OSError as error:
        if not pretrained:
            raise
        raise OSError(f"timm's weights of {timm_name} could not be fetched ({error}). Without a connection: download "
                      "them elsewhere, and adn.load_weights(net, FILE), or adn train --weights FILE") from error
    net = convert(model, twins=twins or "copy")
    state_of(net).origin = {"name": name, "kwargs": _about_the_model(kwargs)}
    return net


def source_of(net: nn.Module) -> nn.Module:
    """What a net is: the model without wrappers, any-depth or not; of a deploy form the one that it was made from."""
    if not is_any_depth(net):
        return net
    made_from = state_of(net).made_from
    return unwrap(net if made_from is None else made_from)


def interface_of(net: nn.Module) -> Any:
    """What says of a net how many classes it has, and what else its task asks: the model, `source_of`, or for one of
    another library what stands for it, see `adn.models.entry.Adapter`."""
    model = source_of(net)
    if hasattr(model, "adn_task"):
        return model
    return next(filter(None, (adapter(model) for adapter in _ADAPTERS)), model)


def deploy_of(net: nn.Module) -> Deploy:
    """What the deploy form of a net is made of."""
    interface = interface_of(net)
    return interface.deploy() if hasattr(interface, "deploy") else Deploy()


def task_name(net: nn.Module) -> str:
    """What a net is for, the name of one of `adn.tasks`; "classify" where it does not say."""
    return getattr(interface_of(net), "adn_task", "classify")


def _own(name: str, pretrained: bool, twins: str | None, kwargs: dict[str, Any]) -> nn.Module:
    entry = ENTRIES[name]
    if pretrained:
        raise ValueError(f"this library has no weights of {name} to download; build it and adn.load_weights(net, path)")
    if twins is not None and not entry.any_depth:
        raise ValueError(f"{name} is not any-depth and has no twins: adn.convert(model, twins={twins!r})")
    model = _build(name, kwargs)
    return convert(model, twins=twins or "frozen") if entry.any_depth else model


def _build(name: str, kwargs: dict[str, Any]) -> nn.Module:
    model = ENTRIES[name](**kwargs)
    model.adn_origin = {"name": name, "kwargs": _about_the_model(kwargs)}
    return model


def _about_the_model(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Without arguments that say where weights come from, be they those of the model or of its backbone."""
    return {name: _about_the_model(value) if isinstance(value, Mapping) else value
            for name, value in kwargs.items() if name not in _ABOUT_WEIGHTS}


def build_source(name: str, kwargs: dict[str, Any]) -> nn.Module:
    """The plain model, with fresh weights, that an origin ("anydepth_<timm name>" or a detector's name, and arguments)
    describes.

    Any name of timm's registry will do, since a plan written by hand converts models of no family; a name that
    would make timm download or read a file will not.

    Raises:
        ValueError: on a name timm does not have or arguments that are not about the model.
    """
    if kwargs != _about_the_model(kwargs):
        raise ValueError(f"the arguments of {name!r} say where weights come from; pass none of "
                         f"{', '.join(sorted(_ABOUT_WEIGHTS))}")
    if name in ENTRIES:
        return _build(name, kwargs)
    timm_name = name.removeprefix(PREFIX)
    if not timm.is_model(timm_name):
        raise ValueError(f"timm {timm.__version__} has no model {timm_name!r}")
    return timm.create_model(timm_name, pretrained=False, **kwargs)


@functools.cache
def _names() -> tuple[str, ...]:
    return (*(PREFIX + name for name in timm.list_models(exclude_filters=list(_EXCLUDED))), *ENTRIES)


def _unknown(name: object) -> str:
    if isinstance(name, str) and PREFIX + name.partition(".")[0] in _names():
        return f"unknown model {name!r}; any-depth models have the prefix {PREFIX!r}: pass {PREFIX + name!r}"
    plain = str(name).removeprefix(PREFIX)
    close = difflib.get_close_matches(PREFIX + plain, _names(), n=5)
    hint = f"did you mean {', '.join(close)}? " if close else ""
    extra = "; timm has it, but no run of residual blocks that keep their shape was found in it: if you know one, " \
        "pass adn.convert a plan" if timm.is_model(plain) else ""
    return f"unknown model {name!r}{extra}; {hint}Names are timm's with the prefix {PREFIX!r}, see adn.list_models()"
