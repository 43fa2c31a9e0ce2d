"""Where a net is cut so that compilers never meet a flag: every path of every stage is code of its own.

torch.compile keeps what it compiled per code object, guarded by what that code read, at most 8 times; then it runs the
code uncompiled, silently. Flags read inside compiled code would make a variant per depth. Here they are read between
compiled regions, in frames that Dynamo leaves alone, and each region runs at one state of its flags only:

- `Paths`, a container that calls its children one after the other, calls them in runs, each through a function of
  its own for each state of the flags in it: for a stage, the full path and the base path. `Features` is one that also
  keeps the outputs of some.
- `Region`, for what a forward calls by itself (blocks in a loop of the model's own, norms between stages that follow
  a flag), does the same for one module.
- `OwnCode`, for the modules around those, gives a module its own copy of its class's functions, so that neither the
  stages of a net nor several nets of one class use up one limit together.

Without a compiler these are a few Python calls. While torch.fx traces, and while gradient checkpointing recomputes,
modules run as they always did: blocks and norms know their own choice.
"""

from __future__ import annotations

import itertools
import types
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any

import timm.models.regnet
import torch
from torch import fx, nn

from adn_kernels.private import not_traced, unseen

from .behaviours import Bypass, Follows, Swapped, input_of, original_class, swap
from .choice import Both, Choice, recomputing
from .kinds.narrow import Parted
from .plan import Plan
from .taps import StageEnd, hand_out, stage_end

Compiler = Callable[[Callable], Callable]

_numbers = itertools.count()


def own_code(function: types.FunctionType) -> types.FunctionType:
    """The same function with another code object, whose name no other has: Dynamo keeps by the object what it compiled
    and by file, line and name which sizes it has seen change."""
    code = function.__code__
    number = next(_numbers)
    code = code.replace(co_name=f"{code.co_name}_{number}", co_qualname=f"{code.co_qualname}_{number}")
    own = types.FunctionType(code, function.__globals__, function.__name__, function.__defaults__,
                             function.__closure__)
    for name in ("__kwdefaults__", "__annotations__", "__doc__", "__qualname__", "__module__"):
        setattr(own, name, getattr(function, name))
    own.__dict__.update(function.__dict__)
    return own


def only_calls(forward: types.FunctionType) -> types.FunctionType:
    """Of a forward that does nothing but call modules: in a converted net Dynamo looks neither at it nor at what it is
    given."""
    forward._adn_only_calls = True
    return forward


# A bypassed block that is called outside of regions.
for _function in (recomputing, Choice.now, Bypass.__call__, input_of):
    unseen(_function)


# ---------------------------------------------------------------------------------------------- templates of regions


def path(blocks: Sequence[nn.Module], x: torch.Tensor) -> torch.Tensor:
    for block in blocks:
        x = block(x)
    return x


def region(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
    return super(Region, module).__call__(*args, **kwargs)


# -------------------------------------------------------------------------------------------------------- behaviours


class _Dispatch(Swapped):
    """Base of those that choose a region by the state of flags. Regions are not copied with the module."""

    fx_leaf = False

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        for name in ("_adn_regions", "_adn_compiler"):
            state.pop(name, None)
        return state


class Paths(_Dispatch):
    """A container that calls its children one after the other, in runs; see above."""

    order = 1

    @not_traced
    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs or not isinstance(x, torch.Tensor) or recomputing() or vars(self).get("grad_checkpointing"):
            return super().forward(x, *args, **kwargs)
        for part, _ in _parts(self):
            x = part(x)
        return x


class Features(_Dispatch):
    """timm's container of a model with `features_only`: calls its children likewise, and returns what some return."""

    order = 1

    @not_traced
    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor] | list[torch.Tensor]:
        if not isinstance(x, torch.Tensor) or recomputing() or self.grad_checkpointing:
            return super().forward(x)
        kept = {}
        for part, last in _parts(self):
            x = part(x)
            if last in self.return_layers:
                several = isinstance(x, tuple | list)
                kept[self.return_layers[last]] = x if not several else torch.cat(x, 1) if self.concat else x[0]
        return list(kept.values()) if isinstance(self, timm.models.FeatureListNet) else kept


class Region(_Dispatch):
    """A module called by a forward that is not ours, compiled by itself; see above."""

    order = 2

    @not_traced
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if recomputing() or (isinstance(self, Bypass) and self._adn_choice.state is True):
            return super().__call__(*args, **kwargs)
        regions = vars(self).get("_adn_regions")
        if regions is None:
            regions = _lay_regions(self)
        state = regions.state(self.training)
        run = regions.get(state)
        if run is None:
            run = regions[state] = regions.lay(region)
        y = run_region(run, self, args, kwargs)
        hand_out(self, y)
        return y


class OwnCode(Swapped):
    """A module with its own copy of the functions of its class, as they were at conversion."""

    order = 4
    fx_leaf = False
    per_module = True

    @staticmethod
    def members(base: type) -> dict[str, types.FunctionType]:
        first: dict[str, tuple[type, Any]] = {}
        for cls in base.__mro__:
            for name, value in vars(cls).items():
                first.setdefault(name, (cls, value))
        # Only what the class itself would call: not what a property, a mixin or a decorated function stands before.
        return {
            name: not_traced(own_code(function)) if hasattr(function, "_adn_only_calls") else own_code(function)
            for name, (cls, function) in first.items()
            if isinstance(function, types.FunctionType) and not name.startswith("__")
            and issubclass(cls, nn.Module) and not cls.__module__.startswith("torch.nn.")
            and not hasattr(function, "_torchdynamo_disable")
        }


class _Regions(dict):
    """The compiled regions of one piece of a net, by the state of the choices that it follows and by the mode: so that
    code has to be compiled again for shapes only."""

    def __init__(self, choices: Sequence[Choice], compiler: Compiler | None) -> None:
        super().__init__()
        self.choices = choices
        self.compiler = compiler

    @unseen
    def state(self, training: bool) -> tuple:
        state: list[Any] = [
            training, torch.is_grad_enabled(), torch.is_inference_mode_enabled(),
            torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu"),
            torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda"),
        ]
        for choice in self.choices:
            if training and not choice.in_training:
                continue
            # Of a forward that runs both nets only the fact: how many samples each has is a size like others.
            state.append(Both if isinstance(choice.state, Both) else choice.state)
        return tuple(state)

    @torch.compiler.disable
    def lay(self, template: types.FunctionType) -> Callable:
        function = own_code(template)
        return function if self.compiler is None else self.compiler(function)


class _Run:
    """A run of children that follow the same choices, and its regions."""

    def __init__(self, blocks: list[nn.Module], choices: Sequence[Choice], compiler: Compiler | None) -> None:
        self.blocks = blocks
        self.regions = _Regions(choices, compiler)
        self.end = stage_end(blocks[-1])

    @unseen
    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        state = self.regions.state(self.blocks[0].training)
        run = self.regions.get(state)
        if run is None:
            run = self.regions[state] = self.lay()
        x = run_region(run, x)
        if self.end is not None:
            hand_out(self.end, x)
        return x

    @torch.compiler.disable
    def lay(self) -> Callable[[torch.Tensor], torch.Tensor]:
        """The path at the present state of the choices."""
        blocks = [b for b in self.blocks if not (isinstance(b, Bypass) and b._adn_choice.state is True)]
        return partial(self.regions.lay(path), blocks) if blocks else _identity


@unseen
def run_region(run: Callable, *args: Any) -> Any:
    """The one place from which regions are called."""
    return run(*args)


@unseen
def _identity(x: torch.Tensor) -> torch.Tensor:
    return x


_Part = tuple[Callable[[torch.Tensor], torch.Tensor], str]  # what runs a segment, and the name of its last child


@unseen
def _parts(container: Paths | Features) -> list[_Part]:
    children = dict(container._modules)
    known = vars(container).get("_adn_regions")
    # Somebody may have wrapped a block, or taken one away.
    if known is None or known[0] != children:
        parts = _runs(children, vars(container).get("_adn_compiler"), getattr(container, "return_layers", ()))
        known = container.__dict__["_adn_regions"] = children, parts
    return known[1]


@torch.compiler.disable
def _runs(children: Mapping[str, nn.Module], compiler: Compiler | None, kept: Collection[str]) -> list[_Part]:
    """Children in runs. A run ends with its stage, after a child whose output is kept, and where the next child follows
    other choices; what dispatches by itself stays alone."""
    runs: list[tuple[list[str], list[Choice] | None]] = []
    ended = True
    for name, child in children.items():
        alone = any(isinstance(module, (_Dispatch, OwnCode)) for module in child.modules())
        choices = None if alone else choices_in(child)
        if ended or alone or runs[-1][1] != choices:
            runs.append(([], choices))
        runs[-1][0].append(name)
        ended = name in kept or stage_end(child) is not None
    return [(children[names[0]] if choices is None else
             _Run([children[name] for name in names], choices, compiler), names[-1]) for names, choices in runs]


@torch.compiler.disable
def _lay_regions(module: Region) -> _Regions:
    regions = module.__dict__["_adn_regions"] = _Regions(choices_in(module), vars(module).get("_adn_compiler"))
    return regions


def choices_in(module: nn.Module) -> list[Choice]:
    """What modules in this one follow."""
    return list(dict.fromkeys(m._adn_choice for m in module.modules() if isinstance(m, Follows)))


# ----------------------------------------------------------------------------------------------------------- install


def compile_regions(net: nn.Module, compiler: Compiler) -> None:
    """Hand every region of a net to `compiler`, before it first runs."""
    for module in net.modules():
        if isinstance(module, _Dispatch):
            module.__dict__["_adn_compiler"] = compiler
            module.__dict__.pop("_adn_regions", None)


def install(model: nn.Module, plan: Plan) -> None:
    """Cut a model, whose blocks and norms follow their choices already, so that no compiled code meets a flag."""
    for kind in plan.flagged:
        swap(model.get_submodule(kind.end), StageEnd)
    units = {model.get_submodule(unit) for kind in plan for unit in kind.units}
    _install(model, {module for module in model.modules() if not units.isdisjoint(list(module.modules())[1:])})


def _install(module: nn.Module, around: set[nn.Module]) -> None:
    container = _container(module)
    if container is not None:
        swap(module, container)
    elif original_class(module).forward is not nn.Module.forward and not isinstance(module, fx.GraphModule):
        swap(module, OwnCode)
    for child in module.children():
        if child in around and not is_one_region(child):
            _install(child, around)
        elif choices_in(child) and (container is None or isinstance(child, Parted)):
            swap(child, Region)


def is_one_region(module: nn.Module) -> bool:
    """Do several stages in a module, and all else in it, follow one flag? Then it has two paths as a whole."""
    return len(choices_in(module)) == 1 and sum(isinstance(m, StageEnd) for m in module.modules()) > 1


def _container(module: nn.Module) -> type[Swapped] | None:
    """What a module becomes whose forward calls its children one after the other; None for any other."""
    cls = original_class(module)
    if cls in (timm.models.FeatureListNet, timm.models.FeatureDictNet):
        return Features
    in_turn = cls is timm.models.regnet.RegStage or (
        isinstance(module, nn.Sequential) and cls.forward is nn.Sequential.forward)
    return Paths if in_turn else None
