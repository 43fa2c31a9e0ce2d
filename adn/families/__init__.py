"""Where the stages of known models are: one short file per family.

A family is a function from a model to its `StagePlan`s (none if the model is of another family), or to a `Plan` where
there are stacks too, registered by `@family`. Files of this package are imported when it is, so a new family is a new
file and nothing else; that of a model of this library's own is `family.py` beside it. Stages are found by structure
(containers and block classes), not by the class of the model, so feature extractors built from the same blocks convert
too.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import pkgutil
from collections.abc import Callable, Iterable, Iterator

from torch import nn

from ..core.behaviours import is_norm
from ..core.dry_run import CannotRun
from ..core.errors import ConversionError
from ..core.kinds.stage import StagePlan
from ..core.plan import Plan

Finder = Callable[[nn.Module], list[StagePlan] | Plan]


@dataclasses.dataclass(frozen=True)
class Family:
    """Attributes:
        timm_modules: the modules of `timm.models` it treats.
        whole: its plan is all that there is to convert, whatever else other families know of inside.
    """

    name: str
    find: Finder
    timm_modules: tuple[str, ...]
    whole: bool


FAMILIES: dict[str, Family] = {}


def family(*timm_modules: str, whole: bool = False) -> Callable[[Finder], Finder]:
    """Register a finder under its function's name; see `Family`."""

    def register(find: Finder) -> Finder:
        name = find.__name__
        FAMILIES[name] = Family(name, find, timm_modules, whole)
        return find

    return register


def find_plan(model: nn.Module) -> Plan:
    """The plan of the families that know the model's blocks. Of other models what running them shows (`residual`), of
    timm's also where a family knows a part of them only.

    Raises:
        ConversionError: if there are no stages; it says what was looked for and what to pass.
    """
    _import_own(model)
    for known in FAMILIES.values():
        if known.whole and (plan := known.find(model)):
            return plan.resolve(model)
    found = _together(model, [Plan(stages, known.name, getattr(stages, "stacks", ()))
                              for known in FAMILIES.values() if (stages := known.find(model))])
    module = type(model).__module__.removeprefix("timm.models.")
    if found is not None and (module == type(model).__module__ or module.startswith("_") or any(
            module in known.timm_modules for known in FAMILIES.values())):
        return found.resolve(model)
    residual = importlib.import_module(f"{__name__}.residual")
    try:
        seen_to_be = Plan(residual.residual(model), residual.NAME)
        if found is not None and len(found.flags) >= len(seen_to_be.flags):
            return found.resolve(model)
        if seen_to_be:
            return seen_to_be.resolve(model)
        seen = " and, by running it without values, for runs of residual blocks that keep their shape"
    except CannotRun as error:
        if found is not None:
            return found.resolve(model)
        seen = f"; others are found by running the model without values, but it does not run ({error})"
    blocks = ", ".join(name for name, known in FAMILIES.items() if not known.whole)
    raise ConversionError(
        f"no stages to bypass found in this {type(model).__name__}: looked for the blocks of {blocks} "
        f"(timm and torchvision){seen}. If it has such runs, say where they are: adn.convert(model, plan=[name of "
        "each stage's container])")


def _together(model: nn.Module, plans: list[Plan]) -> Plan | None:
    """Of plans of several families that with the most flags and stacks, and what others know of the rest of the model:
    a ViT on top of a ResNet is of two."""
    plans = sorted(plans, key=lambda plan: -len(plan.choices))
    if len(plans) < 2:
        return plans[0] if plans else None
    taken: set[nn.Module] = set()
    chosen: list[Plan] = []
    for plan in plans:
        inside = {m for stage in plan for block in stage.blocks for m in model.get_submodule(block).modules()}
        if not taken & inside:
            chosen.append(plan)
            taken |= inside
    order = {name: i for i, (name, _) in enumerate(model.named_modules())}
    stages = sorted((stage for plan in chosen for stage in plan), key=lambda stage: order[stage.blocks[0]])
    return Plan(stages, " + ".join(plan.family for plan in chosen), (s for plan in chosen for s in plan.stacks))


def _import_own(model: nn.Module) -> None:
    """The families of models of this library, of which a part may be all that there is."""
    own = {".".join(cls.__module__.split(".")[:3]) for module in model.modules() for cls in type(module).__mro__
           if cls.__module__.startswith(_OWN_MODELS)}
    for package in own:
        if importlib.util.find_spec(f"{package}.family") is not None:
            importlib.import_module(f"{package}.family")


_OWN_MODELS = f"{__name__.partition('.')[0]}.models."


# ---------------------------------------------------------------------------------------------- tools for families


def runs(model: nn.Module, blocks: tuple[type, ...], keeps_shape: Callable[[nn.Module], bool]
         ) -> Iterator[StagePlan]:
    """Stages as runs of neighbouring blocks in one container: a stage begins at each block that changes the shape."""
    for container, module in model.named_modules():
        run: list[str] = []
        children = list(module.named_children())
        for name, child in children:
            is_block = isinstance(child, blocks)
            if run and not (is_block and keeps_shape(child)):
                yield stage_of(container, run, len(children))
                run = []
            if is_block:
                run.append(name)
        if run:
            yield stage_of(container, run, len(children))


def stage_of(container: str, run: list[str], children: int) -> StagePlan:
    """The stage of some of the `children` of a container, named after it if it is all of them."""
    prefix = f"{container}." if container else ""
    name = container if len(run) == children else f"{prefix}{run[0]}-{run[-1]}" if len(run) > 1 else prefix + run[0]
    return StagePlan(name, [prefix + block for block in run])


GROUP = 3  # blocks of a transformer without stages of its own (Adaptive Depth Networks)


def in_groups(run: StagePlan, size: int = GROUP) -> Iterator[StagePlan]:
    """Stages of `size` neighbouring blocks each, the last of which is refinement; a last incomplete group is essential
    as a whole."""
    for first in range(0, len(run.blocks), size):
        blocks = run.blocks[first : first + size]
        name = f"{run.name}[{first}:{first + len(blocks)}]"
        yield StagePlan(name, blocks, essential=min(len(blocks), size - 1))


def csp_stages(model: nn.Module, csp: Iterable[str], norms: Iterable[str]) -> Iterator[StagePlan]:
    """The runs of bottlenecks of the CSP blocks of a neck with these names ("": the model), under one flag. Of the
    neck's norms each has those of its block, the first also those that lie in none."""
    prefixes, norms = [f"{name}." if name else "" for name in csp], list(norms)
    loose = [norm for norm in norms if not norm.startswith(tuple(prefixes))]
    for prefix in prefixes:
        count = len(model.get_submodule(f"{prefix}bottlenecks"))
        blocks = [f"{prefix}bottlenecks.{i}" for i in range(count)]
        essential = min(count, max(1, (count + 1) // 2 - 1))
        skipped = tuple(f"{name}." for name in blocks[essential:])
        own = [norm for norm in norms if norm.startswith(prefix) and not norm.startswith(skipped)]
        yield StagePlan(f"{prefix}bottlenecks", blocks, essential, [*loose, *own],
                        flag="neck" if count > essential else None)
        loose = []


def norms_named(model: nn.Module, stage: StagePlan, names: Iterable[str]) -> list[str]:
    """The norms of a stage's essential blocks whose own name is one of `names`."""
    wanted = set(names)
    return [f"{block}.{name}" for block in stage.essential_blocks
            for name, module in model.get_submodule(block).named_modules()
            if is_norm(module) and name.rpartition(".")[2] in wanted]


def transition_norms(
    model: nn.Module, stages: list[StagePlan]
) -> Iterator[tuple[str, StagePlan | None, StagePlan | None]]:
    """(norm, stage before it, stage after it) for every norm outside the blocks of these stages, in the model's
    order."""
    owner = {block: stage for stage in stages for block in stage.blocks}
    ahead = list(stages)
    before: StagePlan | None = None
    for name, module in model.named_modules():
        stage = owner.get(name)
        if stage is not None:
            before = stage
            if stage in ahead:
                ahead.remove(stage)
        elif is_norm(module) and not any(name.startswith(f"{block}.") for block in owner):
            yield name, before, (ahead[0] if ahead else None)


for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
