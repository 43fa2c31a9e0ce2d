"""`plan` and `convert`: find the stages of a model, show them, rebuild them in place."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence

import timm.layers
import torch
from torch import nn

from adn_kernels import private

from .core.behaviours import (
    BATCH_NORMS,
    TWINS,
    CountOnce,
    Fork,
    Paired,
    ShapeChecked,
    SharedNorm,
    Swapped,
    is_norm,
    reset_norm,
    shared_norms,
    swap,
    unswap,
)
from .core.choice import Choice
from .core.errors import ConversionError
from .core.kinds.narrow import Parted
from .core.kinds.stage import StagePlan
from .core.plan import Plan
from .core.regions import install
from .core.state import State, is_converted, state_of, state_with_modules, unwrap
from .families import FAMILIES, find_plan

PlanLike = Plan | Sequence[StagePlan | str] | Mapping[str, int]


def plan(model: nn.Module) -> Plan:
    """What `convert` would do to a model: its stages, how they split, which norms switch.

    Prints as a table; edit it and pass it as `convert(model, plan=...)`. The model is not changed.

    Raises:
        ConversionError: if no family knows the model's blocks.
    """
    _check_source(model)
    return find_plan(model)


def convert(
    model: nn.Module, *, plan: PlanLike | None = None, twins: str = "copy", inplace: bool = True
) -> nn.Module:
    """Make a network any-depth: one set of weights, every depth, chosen at run time.

    Refinement blocks learn to be bypassed and the norms of essential blocks get a second set of parameters, used
    while they are; nothing else changes. Names, shapes and classes stay, and at full depth (the default) the net
    computes bit for bit what the model computed. Convert after `torch.nn.SyncBatchNorm.convert_sync_batchnorm`,
    before wrapping in DDP or `torch.compile`.

    Converting teaches nothing: until the net has been trained (`adn.SelfDistillation`), only full depth is of use.

    Args:
        model: a classifier or feature extractor of timm or torchvision; or any model of runs of residual blocks, with
            a plan.
        plan: how to convert; None = `adn.plan(model)`. By hand: the names of the containers whose children are a
            stage's blocks (`["layer1", "layer2"]`), a mapping from them to the number of essential blocks, or
            `StagePlan`s.
        twins: how the second norms start: "copy" of the first, or "fresh" (scale 1, shift 0, mean 0, variance 1) as
            in the reference implementation. Also how they are filled when a state dict without them is loaded. Where a
            norm has fixed statistics and parameters (`FrozenBatchNorm2d`, as in detectors), its twin is one that
            learns; "frozen" is "copy" with fixed twins of fixed norms, for weights that have been trained elsewhere.
        inplace: False converts a deep copy and leaves the model alone.

    Returns:
        The same object, any-depth, at full depth; see `set_depth`.

    Raises:
        ConversionError: if the model or the plan cannot be converted; the model is left untouched.
    """
    if twins not in TWINS:
        raise ValueError(f"twins={twins!r}; pass one of {', '.join(map(repr, TWINS))}")
    _check_source(model)
    resolved = find_plan(model) if plan is None else Plan.read(model, plan).resolve(model)
    for name in (name for _, kind in resolved.parts for name in kind.seconds):
        module = model.get_submodule(name)
        what = "norm" if is_norm(module) else type(module).__name__
        if hasattr(module, "skip"):
            raise ConversionError(f"{what} {name!r} already has an attribute `skip`, where its twin would go")
        if "forward" in vars(module):
            raise ConversionError(f"the forward of {what} {name!r} was replaced on the module itself (by a library "
                                  "that hooks into models?), so it could not follow the depth; convert the model first")
    if not inplace:
        model = copy.deepcopy(model)
    pairs = {name: kind.twin(model.get_submodule(name), twins)
             for _, kind in resolved.parts for name in kind.seconds}
    edited = plan is not None and _is_edited(model, resolved)
    _attach(model, resolved, twins, pairs).origin = getattr(model, "adn_origin", None)
    if edited:
        for name in (block for stage in resolved.flagged for block in stage.refinement_blocks):
            swap(model.get_submodule(name), ShapeChecked)
    return model


def convert_sync_batchnorm(net: nn.Module, process_group: object = None) -> nn.Module:
    """Make every batch norm of a converted net synchronised, twins included, in place; returns the net.

    torch's and timm's own converters drop the second set of a skip-aware norm (`set_depth` then raises). With a net
    not yet converted, use either and convert afterwards: the result is the same. Undoes `accelerate` and `compile`.
    """
    return _with_plain_norms(net, lambda m: timm.layers.convert_sync_batchnorm(m, process_group))


def freeze_batch_norm(net: nn.Module) -> nn.Module:
    """Turn every batch norm of a converted net, twins included, into one with fixed statistics and no parameters
    (torchvision's FrozenBatchNorm2d), in place; returns the net. Undoes `accelerate` and `compile`."""
    return _with_plain_norms(net, timm.layers.freeze_batch_norm_2d)


def detach(net: nn.Module) -> tuple[State, dict[str, nn.Module]]:
    """Undo `convert` in place: the plain model at full depth remains.

    Returns:
        What `convert` knew, and the second norms by the names of the first.
    """
    state = state_with_modules(net)
    state.check_intact()
    twins = {name: state.placed[name][2]._modules.pop("skip") for _, kind in state.plan.parts for name in kind.seconds}
    for root in (net, *twins.values()):
        for module in root.modules():
            if isinstance(module, Swapped):
                unswap(module)
    del net.__dict__["_adn"]
    for key, hook in list(net._load_state_dict_pre_hooks.items()):
        if getattr(hook, "hook", hook) is _fill_twins:
            del net._load_state_dict_pre_hooks[key]
    return state, twins


def _attach(
    model: nn.Module, plan: Plan, twins: str, pairs: dict[str, nn.Module], choices: list[Choice] | None = None
) -> State:
    full = plan.full(model)
    if choices is None:
        choices = [Choice(entry, kinds[0].in_training) for entry, kinds in zip(full, plan.choices, strict=True)]
    state = State(plan, choices, full, plan.base, twins, {})

    def place(name: str, behaviour: type[Swapped], choice: Choice) -> nn.Module:
        module = model.get_submodule(name)
        swap(module, behaviour, choice)
        parent, _, child = name.rpartition(".")
        state.placed[name] = model.get_submodule(parent), child, module
        return module

    for index, kind in plan.parts:
        for name, behaviour, settings in kind.follow():
            module = place(name, behaviour, choices[index])
            vars(module).update({f"_adn_{key}": value for key, value in settings.items()})
        for name in kind.seconds:
            module = model.get_submodule(name)
            module.add_module("skip", pairs[name])
            if isinstance(module, BATCH_NORMS) and module.track_running_stats:
                for one, other in ((module, pairs[name]), (pairs[name], module)):
                    swap(one, Paired)
                    vars(one)["_adn_partner"] = other
            state.placed[f"{name}.skip"] = module, "skip", pairs[name]
    for module in model.modules():
        if isinstance(module, BATCH_NORMS) and module.track_running_stats:
            swap(module, CountOnce)
    apart: dict[nn.Module, Choice] = {}  # what lies in a module that each of the two nets runs by itself
    for module in model.modules():
        if isinstance(module, Parted):
            module.__dict__["_adn_shared"] = state.shared
            apart |= dict.fromkeys(module.modules(), module._adn_choice)
    for module in shared_norms(model):
        swap(module, SharedNorm, apart.get(module, state.shared))
    followers = [name for _, kind in plan.parts for name, behaviour, _ in kind.follow()]
    units = (unit for kind in plan for unit in kind.units)
    first = next((unit for unit in units if any(name.startswith(f"{unit}.") for name in followers)), None)
    if first is not None and not isinstance(model.get_submodule(first), Parted):
        place(first, Fork, state.shared)
    install(model, plan)
    # Not through __setattr__: the state holds modules that must not become children of the net.
    model.__dict__["_adn"] = state
    model.register_load_state_dict_pre_hook(_fill_twins)
    return state


def _is_edited(model: nn.Module, plan: Plan) -> bool:
    """Is this another plan than that of the family it names?"""
    known = FAMILIES.get(plan.family)
    if known is None:
        return True
    found = known.find(model)
    return [stage.resolve(model) for stage in found] != list(plan) or list(getattr(found, "stacks", ())) != plan.stacks


def _with_plain_norms(net: nn.Module, change: Callable[[nn.Module], nn.Module]) -> nn.Module:
    inner = unwrap(net)
    if inner is not net:
        raise ValueError(f"pass the converted net itself, before it is wrapped in {type(net).__name__}")
    state, twins = detach(net)
    changed = change(net)
    assert changed is net, "a converted net has blocks, so it is no norm itself"
    new = _attach(net, state.plan, state.twins, {name: change(twin) for name, twin in twins.items()}, state.choices)
    new.origin, new.class_names = state.origin, state.class_names
    private.forget_compiled(net)  # regions are gone; it is for the caller to compile again
    return net


def _check_source(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise ConversionError(f"{type(model).__name__} is no torch.nn.Module")
    if isinstance(model, (torch.fx.GraphModule, torch.jit.ScriptModule)):
        raise ConversionError(f"a {type(model).__name__} is a program already, in which blocks cannot be bypassed: "
                              "convert the model, then trace it")
    if any(is_converted(m) for m in model.modules()):
        raise ConversionError(f"this {type(model).__name__} is any-depth already; convert a model once")
    if "_orig_mod" in model._modules or isinstance(model, nn.parallel.DistributedDataParallel):
        raise ConversionError(f"convert the model first, then wrap it in {type(model).__name__}")


def _fill_twins(net: nn.Module, state_dict: dict, prefix: str, *_: object) -> None:
    """Before loading: a state dict of the plain model fills the twins too. One with some twins is left as it is,
    and a strict load reports those it lacks."""
    state = state_of(net)
    names = [name for _, kind in state.plan.parts for name in kind.seconds]
    if any(f"{prefix}{name}.skip." in key for name in names for key in state_dict):
        return
    for name in names:
        twin = state.placed[f"{name}.skip"][2]
        own = twin.state_dict()
        plain = {key: state_dict[f"{prefix}{name}.{key}"] for key in own if f"{prefix}{name}.{key}" in state_dict}
        # A part of a norm (strict=False) says nothing about its twin.
        if any(tensor.is_floating_point() and key not in plain for key, tensor in own.items()):
            continue
        if state.twins == "fresh" and is_norm(twin):
            reset_norm(twin)
            plain = {key: own[key] for key in plain}
        for key, value in plain.items():
            # The kernel of a narrow convolution is the first part of the other.
            part = tuple(map(slice, own[key].shape)) if value.ndim == own[key].ndim else ()
            state_dict[f"{prefix}{name}.skip.{key}"] = value[part].detach().clone()
