"""The depth of a converted net: set it, read it, list all.

`convert` leaves a `State` on the net. Every function here takes the net itself or a wrapper around it
(`torch.compile`, `DistributedDataParallel`).
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from .behaviours import TWO_PASSES, SharedNorm, original_class, shared_norms
from .choice import Both, Choice
from .depth import Depth
from .kinds.stage import StagePlan
from .plan import Plan

DepthLike = Depth | str | Iterable[bool | int]


@dataclasses.dataclass
class State:
    """What `convert` knows of a net.

    Attributes:
        plan: the resolved plan it was converted by.
        choices: what the entries of the depth are set on.
        full, base: the depth of all of it, and of the base-net.
        twins: "copy" or "fresh": how twins absent from a state dict are filled.
        placed: by name, (parent, child name, module) of every module that follows a choice and of every twin; their
            place does not change if somebody wraps a block.
        origin: what `create_model` was called with, so that `load` can call it again; None if unknown.
        class_names: the labels of the classes, where known.
        shared: for what has no flag but differs while super-net and base-net run at once; no depth changes it.
        made_from: for a deploy form, in which the plan's modules are not found any more, the net that it was made from.
    """

    plan: Plan
    choices: list[Choice]
    full: Depth
    base: Depth
    twins: str
    placed: dict[str, tuple[nn.Module, str, nn.Module]]
    origin: dict[str, Any] | None = None
    class_names: list[str] | None = None
    shared: Choice = dataclasses.field(default_factory=Choice)
    made_from: nn.Module | None = None

    def check_intact(self) -> None:
        """Raise RuntimeError if other code has replaced a module that follows the depth.

        A wrapper around it (torch.compile, a checkpoint wrapper) goes on following; a substitute does not, and going
        on would silently compute, or save, something else. A copy of a twin (which PEFT puts in its place when it
        merges) is as good as the twin, and becomes it.
        """
        for name, (parent, child, module) in self.placed.items():
            current = parent._modules.get(child)
            if current is module or (current is not None and any(m is module for m in current.modules())):
                continue
            if child == "skip" and type(current) is type(module):
                self.placed[name] = parent, child, current
                continue
            now = "is gone" if current is None else f"has become {type(current).__name__}"
            raise RuntimeError(
                f"{original_class(module).__name__} {name!r}, which follows the depth, {now}: something replaced it "
                "after conversion. Use adn.convert_sync_batchnorm / adn.freeze_batch_norm instead of torch's or "
                "timm's, or do it before adn.convert"
            )

    @property
    def cuts(self) -> list[Choice]:
        """Those of numbers of layers."""
        return [choice for choice, entry in zip(self.choices, self.full) if not isinstance(entry, bool)]


@dataclasses.dataclass(frozen=True)
class Stage:
    """A stage of a converted net that has a flag: its plan, and the modules themselves. The output of `end` is the
    stage's, where that runs."""

    index: int
    plan: StagePlan
    essential: tuple[nn.Module, ...]
    refinement: tuple[nn.Module, ...]
    end: nn.Module
    choice: Choice

    @property
    def name(self) -> str:
        return self.plan.name

    @property
    def last_block(self) -> nn.Module:
        """The block whose output leaves the stage at the depth that is set."""
        blocks = dict(zip((*self.plan.blocks, self.plan.end), (*self.essential, *self.refinement, self.end)))
        return blocks[self.plan.last(self.choice.entry)]


# What the wrappers of torch.compile, DDP and averages, and PEFT call the net that they hold.
_HELD_AS = ("_orig_mod", "module", "base_model", "model")


def unwrap(net: nn.Module) -> nn.Module:
    """The converted net inside wrappers, see `_HELD_AS`."""
    inner = net
    while "_adn" not in inner.__dict__:
        # Plain attribute access would see a user's own submodule called `module` as a wrapper only if it leads to a
        # converted net, which is what is asked for.
        child = next((inner._modules[name] for name in _HELD_AS if name in inner._modules), None)
        if child is None:
            raise ValueError(f"this {type(net).__name__} is not any-depth: pass the net that adn.convert returned")
        inner = child
    return inner


def only_converted(net: nn.Module) -> bool:
    """Are all second sets still the copies that `convert` made? Then no depth but the full one has been trained."""
    state = state_of(net)
    pairs = [(state.placed[f"{name}.skip"][0], state.placed[f"{name}.skip"][2])
             for _, kind in state.plan.parts for name in kind.seconds if f"{name}.skip" in state.placed]
    return bool(pairs) and all(
        value.shape == other.shape and torch.equal(value, other) for module, twin in pairs
        for name, value in twin.state_dict().items() if (other := module.state_dict().get(name)) is not None)


def state_of(net: nn.Module) -> State:
    return unwrap(net).__dict__["_adn"]


def state_with_modules(net: nn.Module) -> State:
    """`state_of`, for those who look for the plan's modules in the net; raises ValueError for a deploy form."""
    state = state_of(net)
    if state.made_from is not None:
        raise ValueError("this is a deploy form, in which stages, blocks and norms are not found any more: pass the "
                         "net that it was made from")
    return state


def is_converted(net: nn.Module) -> bool:
    return "_adn" in net.__dict__


def is_any_depth(net: nn.Module) -> bool:
    """Is it a converted net, or a wrapper around one?"""
    try:
        unwrap(net)
    except ValueError:
        return False
    return True


def set_depth(net: nn.Module, depth: DepthLike) -> None:
    """Run at `depth` from now on.

    Costs a few Python assignments: nothing is allocated, compiled or synchronised. Depth is state of the net: two
    threads that want two depths use two copies.

    Raises:
        ValueError: on a depth this net does not have; the net keeps the one it had.
        RuntimeError: if other code has replaced modules that follow the depth.
    """
    state = state_of(net)
    depth = Depth.parse(depth, (state.full, state.base))
    state.check_intact()
    for choice, entry in zip(state.choices, depth, strict=True):
        choice.set(entry)


def get_depth(net: nn.Module) -> Depth:
    """The depth the net runs at."""
    return Depth([choice.entry for choice in state_of(net).choices])


@contextlib.contextmanager
def at_depth(net: nn.Module, depth: DepthLike) -> Iterator[nn.Module]:
    """Run at `depth` inside the block, at the former depth after it, whatever happens inside."""
    before = get_depth(net)
    set_depth(net, depth)
    try:
        yield net
    finally:
        set_depth(net, before)


@contextlib.contextmanager
def super_and_base(net: nn.Module, samples: int) -> Iterator[nn.Module]:
    """Forwards inside the block run the super-net and the base-net at once; at the former depth after it.

    Whatever comes before the first switched norm or block runs once; from there on tensors hold the super-net's
    samples, then the base-net's: (samples, ...) gives (2 * samples, ...). Statistics move as in a forward of the
    super-net followed by one of the base-net.

    Args:
        samples: size of the batch that these forwards get.

    Raises:
        RuntimeError: if other code has replaced modules that follow the depth, or added a batch norm, which would mix
            the samples of the two.
        ValueError: if the net has a stack that may be cut short.
    """
    inner, state = unwrap(net), state_of(net)
    if not all(kind.one_forward for _, kind in state.plan.parts):
        raise ValueError("a net with a stack of layers to cut runs one depth at a time: use two forwards")
    state.check_intact()
    if not torch.compiler.is_compiling():
        _check_shared(inner)
    before = get_depth(net)
    both = Both(samples)
    for choice in (state.shared, *state.choices):
        choice.set(both)
    try:
        yield net
    finally:
        state.shared.set(False)
        set_depth(net, before)


def _check_shared(net: nn.Module) -> None:
    for norm in shared_norms(net):
        if not isinstance(norm, SharedNorm):
            name = next(name for name, module in net.named_modules() if module is norm)
            raise RuntimeError(
                f"{type(norm).__name__} {name!r} was put into the net after conversion, so it would mix the statistics "
                f"of super-net and base-net: put it there before adn.convert, or {TWO_PASSES}"
            )


def depths(net: nn.Module) -> list[Depth]:
    """Every depth of the net, from FF..F (all of it) to TT..T, counting in binary; where it has a stack, at each number
    of its layers.

    Raises:
        ValueError: if there are more than a million.
    """
    full = state_of(net).full
    if len(full.flags) > 20:
        raise ValueError(f"this net has {len(full.flags)} flags, too many to list all depths; choose among them")
    return Depth.every(full)


def stages(net: nn.Module) -> list[Stage]:
    """The stages that have a flag, in the order of the flags; those that share one have the same index."""
    inner, state = unwrap(net), state_with_modules(net)
    return [
        Stage(i, plan, tuple(map(inner.get_submodule, plan.essential_blocks)),
              tuple(map(inner.get_submodule, plan.refinement_blocks)), inner.get_submodule(plan.end), choice)
        for i, (group, choice) in enumerate(zip(state.plan.flags, state.choices)) for plan in group
    ]
