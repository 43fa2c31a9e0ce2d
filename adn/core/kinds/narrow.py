"""A module that concatenates what its blocks make, one after the other, and convolves it (C3k2, A2C2f of YOLOv12):
bypassed, the first blocks run, and the convolution reads as many channels as they make."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import fx, nn

from adn_kernels.private import not_traced

from ..behaviours import Follows, halves, input_of, is_norm, original_class, twin_of, with_input
from ..choice import Both
from ..errors import ConversionError
from ..taps import hand_out, unheard
from ..trace import CannotTrace, trace
from . import Follower, Form, of_first_inputs, submodule
from .stage import StagePlan, inside, is_inside

_CONCATENATIONS = (torch.cat, torch.concat, torch.concatenate, torch.stack)


class Parted(Follows):
    """A module of which, in a forward of both nets, each runs by itself: their insides are of different widths."""

    order = 0

    @not_traced
    def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        both = self._adn_shared.now()
        if not isinstance(both, Both):
            return super().__call__(*args, **kwargs)
        outputs = []
        with unheard(self):
            for bypassed, x in zip((False, True), halves(input_of(self, args, kwargs), both.samples), strict=True):
                own, named = with_input(self, x, args, kwargs)
                with self._adn_choice.held_at(bypassed):
                    outputs.append(super().__call__(*own, **named))
        y = torch.cat(outputs)
        hand_out(self, y)
        return y


class Shortened(Follows):
    """A list of blocks that ends early while the refinement path is bypassed, for the forward that goes through it."""

    order = 18

    def _running(self) -> list[nn.Module]:
        modules = list(self._modules.values())
        return modules[: self._adn_kept] if self._adn_choice.now() else modules

    def __iter__(self) -> Iterator[nn.Module]:
        return iter(self._running())

    def __len__(self) -> int:
        return len(self._running())

    def __getitem__(self, index: int | slice) -> Any:
        return self._running()[index]


class FirstInputs(Follows):
    """A convolution that reads its first channels only while the refinement path is bypassed: with as much of its
    kernel, or with its child `skip`, which has a kernel of its own."""

    order = 19

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self._adn_choice.now():
            return super().forward(x)
        own = self._modules.get("skip")
        if own is not None:
            return own(x)
        if x.shape[1] != self._adn_inputs:
            raise RuntimeError(f"with its last blocks bypassed, a convolution that should read {self._adn_inputs} "
                               f"channels got {x.shape[1]}: the plan (`inputs`) does not fit this module")
        return conv_of_first_inputs(x, self)


def conv_of_first_inputs(x: torch.Tensor, conv: nn.Conv2d) -> torch.Tensor:
    """`conv`, on fewer channels than it reads, with the first part of its kernel.

    A 1x1 kernel is not copied for it: it is a matrix, of whose rows a product can read a part.

    Args:
        x: (B, K, H, W), K at most `conv.in_channels`.

    Returns:
        (B, C, H', W'), in the memory format of x.
    """
    weight = conv.weight[:, : x.shape[1]]
    if conv.kernel_size != (1, 1) or conv.stride != (1, 1) or conv.padding != (0, 0):
        return F.conv2d(x, weight, conv.bias, conv.stride, conv.padding, conv.dilation)
    matrix = weight.flatten(1)
    if x.is_contiguous(memory_format=torch.channels_last):
        return F.linear(x.permute(0, 2, 3, 1), matrix, conv.bias).permute(0, 3, 1, 2)
    y = torch.bmm(matrix.expand(len(x), -1, -1), x.flatten(2)).unflatten(2, x.shape[2:])
    return y if conv.bias is None else y + conv.bias[:, None, None]


@dataclasses.dataclass
class NarrowPlan(StagePlan):
    """A module that concatenates what its blocks make; the last of them are left out when bypassed.

    Its blocks lie in one list, which the module goes through; each turns the output of the one before into another of
    the same shape. Their outputs come last in what is concatenated.

    Attributes:
        module: name of the module.
        conv: name of the convolution that reads the concatenation, one without groups.
        inputs: how many channels it reads when bypassed: those that come before what the last blocks make.
        own: does it have a kernel of its own for them? Else they share the first part of the one there is.
        norms: None = every norm in the module outside of the blocks that can be bypassed.
    """

    kind: ClassVar[str] = "narrow"
    names: ClassVar[tuple[str, ...]] = (*StagePlan.names, "module", "conv")
    module: str = ""
    conv: str = ""
    inputs: int = 0
    own: bool = False

    def resolve(self, model: nn.Module) -> NarrowPlan:
        here = f"stage {self.name!r}"
        conv = submodule(model, self.conv, here)
        if not self.blocks or not is_inside(self._list, self.module):
            raise ConversionError(f"{here}: its blocks {self.blocks} are not those of a list in {self.module!r}")
        blocks = submodule(model, self._list, here)
        if not isinstance(blocks, (nn.ModuleList, nn.Sequential)) or (
                [f"{self._list}.{name}" for name, _ in blocks.named_children()] != self.blocks):
            raise ConversionError(f"{here}: name all blocks of {self._list!r}, in their order")
        if not isinstance(conv, nn.Conv2d) or conv.groups != 1 or not is_inside(self.conv, self.module):
            raise ConversionError(f"{here}: {self.conv!r} is no convolution without groups in {self.module!r}")
        resolved = super().resolve(model)
        if resolved.has_flag and not 0 < self.inputs < conv.in_channels:
            raise ConversionError(f"{here}: inputs={self.inputs} of {self.conv!r}, which reads {conv.in_channels} "
                                  "channels; pass how many it reads when the last blocks are left out")
        return resolved

    def _norms(self, model: nn.Module) -> list[str]:
        return [norm for norm in inside(model, [self.module], is_norm)
                if not any(is_inside(norm, block) for block in self.refinement_blocks)]

    @property
    def _list(self) -> str:
        return self.blocks[0].rpartition(".")[0]

    @property
    def units(self) -> list[str]:
        return [self.module]

    @property
    def whole(self) -> str:
        return self.module

    @property
    def end(self) -> str:
        return self.module

    def last(self, value: bool) -> str:
        return self.module

    def form(self, value: bool) -> Form:
        if not value:
            return Form()
        seconds = (*self.norms, self.conv) if self.own else self.norms
        return Form(tuple(seconds), off=tuple(self.drop_paths), lists={self._list: len(self.essential_blocks)},
                    inputs={} if self.own else {self.conv: self.inputs})

    def follow(self) -> Iterator[Follower]:
        yield from (follower for follower in super().follow() if follower.name not in self.refinement_blocks)
        yield Follower(self.module, Parted)
        yield Follower(self._list, Shortened, {"kept": len(self.essential_blocks)})
        yield Follower(self.conv, FirstInputs, {"inputs": self.inputs})

    def twin(self, module: nn.Module, twins: str) -> nn.Module:
        if not isinstance(module, nn.Conv2d):
            return super().twin(module, twins)
        twin = of_first_inputs(twin_of(module), self.inputs)
        twin.weight = nn.Parameter(twin.weight.detach().clone(), twin.weight.requires_grad)
        return twin


def as_it_concatenates(model: nn.Module, stage: StagePlan) -> StagePlan:
    """A stage that somebody wrote by hand: a `NarrowPlan` if the outputs of its blocks are concatenated, which leaving
    blocks out would otherwise do to copies, unnoticed.

    Raises:
        ConversionError: if they are, or seem to be, in a way that cannot be narrowed.
    """
    if isinstance(stage, NarrowPlan) or not stage.has_flag:
        return stage
    blocks = [submodule(model, name, f"stage {stage.name!r}") for name in stage.blocks]
    name = ".".join(_common([block.split(".")[:-1] for block in stage.blocks]))
    while (owner := model.get_submodule(name)) is not model and original_class(owner).forward is nn.Module.forward:
        name = name.rpartition(".")[0]
    if original_class(owner).forward is nn.Sequential.forward:
        return stage  # nobody sees what is between its children
    prefix, what = f"{name}." if name else "", f"stage {stage.name!r}: {name or type(model).__name__!r}"
    inner = [block.removeprefix(prefix) for block in stage.blocks]
    try:
        traced = trace(owner, inner, inner)
    except CannotTrace as error:
        if not _may_concatenate(owner, blocks):
            return stage
        raise ConversionError(f"{what} may concatenate what its blocks make, which cannot be seen ({error}): describe "
                              "it by an adn.core.kinds.narrow.NarrowPlan") from error
    outputs = [traced.calls[block][1] for block in inner if block in traced.calls]
    readers = list(dict.fromkeys(user for output in outputs for user in output.users if user.target in _CONCATENATIONS
                                 and len(set(outputs).intersection(user.all_input_nodes)) > 1))
    if not readers:
        return stage
    conv = _conv_of(readers[0], owner) if len(readers) == 1 else None
    if conv is None:
        fault = "what becomes of that is more than one convolution without groups"
    elif list(readers[0].args[0])[-len(inner):] != outputs:
        fault = "but not each once, in their order and last"
    elif not isinstance(model.get_submodule(stage.blocks[0].rpartition(".")[0]), nn.ModuleList):
        fault = "which are not in an nn.ModuleList"
    else:
        inputs = owner.get_submodule(conv).in_channels
        made = len(stage.refinement_blocks) * (_width(blocks[0]) or inputs)
        return NarrowPlan(**dataclasses.asdict(stage), module=name, conv=prefix + conv, inputs=inputs - made)
    raise ConversionError(f"{what} concatenates what its blocks make, {fault}: leave this stage out of the plan")


def _common(paths: list[list[str]]) -> list[str]:
    """What they begin with."""
    same = itertools.takewhile(lambda parts: len(set(parts)) == 1, zip(*paths))
    return [parts[0] for parts in same]


def _conv_of(node: fx.Node, owner: nn.Module) -> str | None:
    """The name of the convolution that alone reads a concatenation along the channels."""
    axis = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    user = next(iter(node.users)) if len(node.users) == 1 else None
    if node.target is torch.stack or axis not in (1, -3) or user is None or user.op != "call_module":
        return None
    module = owner.get_submodule(user.target)
    return user.target if isinstance(module, nn.Conv2d) and module.groups == 1 else None


def _width(block: nn.Module) -> int:
    """How many channels a block that keeps the shape makes: as many as it reads first. 0 if it has no convolution."""
    return next((m.in_channels for m in block.modules() if isinstance(m, nn.Conv2d)), 0)


def _may_concatenate(owner: nn.Module, blocks: list[nn.Module]) -> bool:
    """Does the code of a forward concatenate, and is there a convolution of as many channels?"""
    forward = getattr(original_class(owner).forward, "__code__", None)
    if forward is None or {f.__name__ for f in _CONCATENATIONS}.isdisjoint(forward.co_names):
        return False
    inside_blocks = {module for block in blocks for module in block.modules()}
    widths = {(len(blocks) + extra) * _width(block) for block in blocks for extra in range(4)}
    return any(isinstance(module, nn.Conv2d) and module not in inside_blocks and module.in_channels in widths
               for module in owner.modules())
