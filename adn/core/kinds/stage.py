"""A stage: a run of residual blocks, the last of which can be bypassed; norms of the others have two sets."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator
from typing import ClassVar

from torch import Tensor, nn

from ..behaviours import Bypass, HandsOn, SkipNorm, TakesFirst, is_drop_path, is_norm
from ..dry_run import Call
from ..errors import ConversionError
from . import Follower, Form, Kind, submodule

# Children of a block that hold its shortcut: their norms see the stage's input, which does not depend on the flag.
SHORTCUTS = ("downsample", "shortcut", "short")


def essential_count(blocks: int) -> int:
    """K = min(L - 1, ceil(L / 2)): how many of a stage's L blocks are essential (Adaptive Depth Networks, sec. 3)."""
    return max(1, min(blocks - 1, math.ceil(blocks / 2)))


@dataclasses.dataclass
class StagePlan(Kind):
    """One stage: a run of residual blocks at one resolution, the first `essential` of which always run.

    Attributes:
        name: what the stage is called in tables.
        blocks: module names of its blocks, in the order in which they run. All but the first keep the shape.
        essential: how many always run; None = `essential_count`. Equal to `len(blocks)`: nothing can be bypassed, and
            the stage has a flag only if `flag` and `norms` say so.
        norms: module names of the norms switched by this stage's flag, in or out of the stage; None = every norm in
            its essential blocks outside their shortcuts.
        drop_paths: module names of the stochastic-depth modules switched off while the refinement path is bypassed;
            None = every one in its essential blocks.
        channel_dim: where the channels of the stage's output are: 1 for (B, C, H, W), -1 for (B, T, C), (B, H, W, C).
        flag: stages that name the same flag share it; None = one of its own.
        hands_on: blocks return a tuple of all they are given, of which only the first is new.
        extras: blocks return a tuple of what they make and so many others, which are None where they are bypassed.
    """

    kind: ClassVar[str] = "stage"
    names: ClassVar[tuple[str, ...]] = ("name", "blocks", "norms", "drop_paths")
    name: str
    blocks: list[str]
    essential: int | None = None
    norms: list[str] | None = None
    drop_paths: list[str] | None = None
    channel_dim: int = 1
    flag: str | None = None
    hands_on: bool = False
    extras: int = 0

    @property
    def has_flag(self) -> bool:
        return len(self.blocks) > self._split or (self.flag is not None and bool(self.norms))

    @property
    def essential_blocks(self) -> list[str]:
        return self.blocks[: self._split]

    @property
    def refinement_blocks(self) -> list[str]:
        return self.blocks[self._split :]

    @property
    def _split(self) -> int:
        return essential_count(len(self.blocks)) if self.essential is None else self.essential

    def resolve(self, model: nn.Module) -> StagePlan:
        """The same stage with every default filled in from the model.

        Raises:
            ConversionError: if it names what the model does not have or what cannot be switched.
        """
        here = f"stage {self.name!r}"
        for block in self.blocks:
            submodule(model, block, here)
        if not self.blocks:
            raise ConversionError(f"{here} has no blocks")
        if len(set(self.blocks)) < len(self.blocks):
            raise ConversionError(f"{here} names a block twice: {self.blocks}")
        if type(self._split) is not int or not 1 <= self._split <= len(self.blocks):
            raise ConversionError(f"{here}: {self.essential!r} of {len(self.blocks)} blocks cannot be essential; pass "
                                  f"a number from 1 to {len(self.blocks)}")
        if not self.has_flag:
            return dataclasses.replace(self, essential=len(self.blocks), norms=[], drop_paths=[])
        norms = self.norms if self.norms is not None else self._norms(model)
        for norm in norms:
            if not is_norm(submodule(model, norm, here)):
                raise ConversionError(f"{here}: {norm!r} is {type(model.get_submodule(norm)).__name__}, not a norm")
            if any(is_inside(norm, block) for block in self.refinement_blocks):
                raise ConversionError(f"{here}: {norm!r} lies in a refinement block, which runs in one mode only; "
                                      "after a change of `essential`, list the norms of the new split, or norms=None")
        for block in self.essential_blocks if norms else ():
            if inside(model, [block], is_norm) and not any(is_inside(norm, block) for norm in norms):
                raise ConversionError(f"{here}: no norm of its essential block {block!r} switches; after a change of "
                                      "`essential`, list the norms of the new split, or norms=None")
        drops = self.drop_paths
        if drops is None:
            drops = inside(model, self.essential_blocks, is_drop_path)
        for drop in drops:
            submodule(model, drop, here)
        return dataclasses.replace(self, essential=self._split, norms=list(norms), drop_paths=list(drops))

    def _norms(self, model: nn.Module) -> list[str]:
        return inside(model, self.essential_blocks, is_norm)

    @property
    def base(self) -> bool:
        return True

    @property
    def units(self) -> list[str]:
        return self.blocks

    @property
    def end(self) -> str:
        """The module whose output, where it runs, is the stage's."""
        return self.blocks[-1]

    def last(self, value: bool) -> str:
        """The module whose output leaves the stage."""
        return self.essential_blocks[-1] if value else self.blocks[-1]

    def values(self, model: nn.Module) -> list[bool]:
        return [False, True]

    def form(self, value: bool) -> Form:
        if not value:
            return Form()
        bypassed = tuple(self.refinement_blocks)
        return Form(seconds=tuple(self.norms), bypassed=bypassed, off=tuple(self.drop_paths),
                    handing_on=bypassed if self.hands_on else (), extras=dict.fromkeys(bypassed, self.extras))

    def follow(self) -> Iterator[Follower]:
        yield from (Follower(name, SkipNorm) for name in self.norms)
        yield from (Follower(name, Bypass) for name in (*self.drop_paths, *self.refinement_blocks))
        if self.hands_on or self.extras:
            yield from (Follower(name, how, {"extras": self.extras}) for name in self.refinement_blocks
                        for how in (HandsOn, TakesFirst))


def is_inside(name: str, parent: str) -> bool:
    return name == parent or name.startswith(f"{parent}.")


def inside(model: nn.Module, blocks: Iterable[str], wanted: Callable[[nn.Module], bool]) -> list[str]:
    found = []
    for block in blocks:
        for name, module in model.get_submodule(block).named_modules():
            if wanted(module) and not set(name.split(".")) & set(SHORTCUTS):
                found.append(f"{block}.{name}" if name else block)
    return found


def check_keeps_shape(call: Call | None, name: str, where: str) -> None:
    """Refuse a refinement block that turned what it was given into something of another shape.

    What has not been seen to run (None) is caught at the first forward (`ShapeChecked`).
    """
    if call is None or call.keeps_shape:
        return
    x, y = call.input, call.result
    if isinstance(x, Tensor) and isinstance(y, Tensor) and x.shape != y.shape:
        changed = f"it turns {tuple(x.shape)} into {tuple(y.shape)}; begin a stage with it"
    else:
        changed = "it does not turn one tensor into one tensor and hand on all else that it is given"
    raise ConversionError(f"{where}: {name!r} cannot be bypassed, {changed}")
