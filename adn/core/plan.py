"""Where the stages of a model are and how they split: what `convert` carries out.

A plan holds names only, so it can be printed, edited, written by hand, stored in a checkpoint and checked against a
model before anything is changed.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence

from torch import nn

from .behaviours import DROP_PATHS, is_norm
from .depth import Depth
from .errors import ConversionError

# Children of a block that hold its shortcut: their norms see the stage's input, which does not depend on the flag.
SHORTCUTS = ("downsample", "shortcut", "short")

BY_HAND = "by hand"


def essential_count(blocks: int) -> int:
    """K = min(L - 1, ceil(L / 2)): how many of a stage's L blocks are essential (Adaptive Depth Networks, sec. 3)."""
    return max(1, min(blocks - 1, math.ceil(blocks / 2)))


@dataclasses.dataclass
class StagePlan:
    """One stage: a run of residual blocks at one resolution, the first `essential` of which always run.

    Attributes:
        name: what the stage is called in tables.
        blocks: module names of its blocks, in the order in which they run. All but the first keep the shape.
        essential: how many always run; None = `essential_count`. Equal to `len(blocks)`: nothing can be bypassed,
            the stage gets no flag.
        norms: module names of the norms switched by this stage's flag, in or out of the stage; None = every norm in
            its essential blocks outside their shortcuts.
        drop_paths: module names of the stochastic-depth modules switched off while the refinement path is bypassed;
            None = every one in its essential blocks.
        channel_dim: where the channels of the stage's output are: 1 for (B, C, H, W), -1 for (B, T, C), (B, H, W, C).
        flag: stages that name the same flag share it; None = one of its own.
    """

    name: str
    blocks: list[str]
    essential: int | None = None
    norms: list[str] | None = None
    drop_paths: list[str] | None = None
    channel_dim: int = 1
    flag: str | None = None

    @property
    def has_flag(self) -> bool:
        return len(self.blocks) > self._split

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
            _get(model, block, here)
        if not self.blocks:
            raise ConversionError(f"{here} has no blocks")
        if len(set(self.blocks)) < len(self.blocks):
            raise ConversionError(f"{here} names a block twice: {self.blocks}")
        if type(self._split) is not int or not 1 <= self._split <= len(self.blocks):
            raise ConversionError(f"{here}: {self.essential!r} of {len(self.blocks)} blocks cannot be essential; pass "
                                  f"a number from 1 to {len(self.blocks)}")
        if not self.has_flag:
            return dataclasses.replace(self, essential=len(self.blocks), norms=[], drop_paths=[])
        norms = self.norms if self.norms is not None else _inside(model, self.essential_blocks, is_norm)
        for norm in norms:
            if not is_norm(_get(model, norm, here)):
                raise ConversionError(f"{here}: {norm!r} is {type(model.get_submodule(norm)).__name__}, not a norm")
            if any(_is_inside(norm, block) for block in self.refinement_blocks):
                raise ConversionError(f"{here}: {norm!r} lies in a refinement block, which runs in one mode only; "
                                      "after a change of `essential`, list the norms of the new split, or norms=None")
        for block in self.essential_blocks if norms else ():
            if _inside(model, [block], is_norm) and not any(_is_inside(norm, block) for norm in norms):
                raise ConversionError(f"{here}: no norm of its essential block {block!r} switches; after a change of "
                                      "`essential`, list the norms of the new split, or norms=None")
        drops = self.drop_paths
        if drops is None:
            drops = _inside(model, self.essential_blocks, lambda m: isinstance(m, DROP_PATHS))
        for drop in drops:
            _get(model, drop, here)
        return dataclasses.replace(self, essential=self._split, norms=list(norms), drop_paths=list(drops))


@dataclasses.dataclass
class StackPlan:
    """A stack of alike layers that may be cut short, each with heads of its own: the decoder of a detector.

    Attributes:
        name: module name of what runs the layers, a module with a method `running()`: how many of them run.
        lists: module names of the `nn.ModuleList`s that have one entry per layer.
        base: how many layers the base-net runs.
    """

    name: str
    lists: list[str]
    base: int

    def resolve(self, model: nn.Module) -> StackPlan:
        """Checked against the model; raises `ConversionError`."""
        here = f"stack {self.name!r}"
        if not hasattr(_get(model, self.name, here), "running"):
            raise ConversionError(f"{here}: a {type(model.get_submodule(self.name)).__name__} has no method running()")
        lengths = {len(_get(model, name, here)) for name in self.lists}
        if len(lengths) != 1:
            raise ConversionError(f"{here}: {', '.join(self.lists)} are not of one length")
        if not 1 <= self.base <= (most := lengths.pop()):
            raise ConversionError(f"{here}: base={self.base}, but there are {most} layers")
        return self

    def layers(self, model: nn.Module) -> int:
        """How many there are."""
        return len(model.get_submodule(self.lists[0]))


class Plan(list[StagePlan]):
    """The stages of a model, nearest the input first. A list: edit it before passing it to `convert`.

    Stages without a refinement path (one block) may be listed; they get no flag.

    Attributes:
        family: who found it.
        stacks: stacks of layers that may be cut short.
    """

    def __init__(self, stages: Iterable[StagePlan] = (), family: str = BY_HAND, stacks: Iterable[StackPlan] = ()
                 ) -> None:
        super().__init__(stages)
        self.family = family
        self.stacks = list(stacks)

    @classmethod
    def read(cls, model: nn.Module, plan: Plan | Sequence[StagePlan | str] | Mapping[str, int]) -> Plan:
        """A plan from what a user may write: a `Plan`, `StagePlan`s, names of containers whose children are the
        blocks of a stage, or a mapping from such names to the number of essential blocks."""
        if isinstance(plan, Plan):
            return plan
        if isinstance(plan, str):
            raise ConversionError(f"a plan is a list; pass plan=[{plan!r}] for the blocks of {plan!r}")
        essential = dict(plan) if isinstance(plan, Mapping) else {}
        stages = []
        for entry in plan:
            if isinstance(entry, StagePlan):
                stages.append(entry)
            elif isinstance(entry, str):
                container = _get(model, entry, "the plan")
                blocks = [f"{entry}.{name}" for name, _ in container.named_children()]
                stages.append(StagePlan(entry, blocks, essential.get(entry)))
            else:
                raise ConversionError(f"a plan holds StagePlans or names of containers, not {entry!r}")
        return cls(stages)

    @property
    def flagged(self) -> list[StagePlan]:
        """The stages that have a flag."""
        return [stage for stage in self if stage.has_flag]

    @property
    def flags(self) -> list[list[StagePlan]]:
        """The stages of each flag, in the order of `Depth`."""
        groups: dict[object, list[StagePlan]] = {}
        for stage in self.flagged:
            groups.setdefault(id(stage) if stage.flag is None else stage.flag, []).append(stage)
        return list(groups.values())

    def resolve(self, model: nn.Module) -> Plan:
        """The same plan, complete and checked against the model; raises `ConversionError`."""
        resolved = Plan((stage.resolve(model) for stage in self), self.family,
                        (stack.resolve(model) for stack in self.stacks))
        if self.family == BY_HAND:
            for stage in resolved:
                for block in stage.refinement_blocks:
                    _check_keeps_shape(model.get_submodule(block), block, f"stage {stage.name!r}")
        if not resolved.flagged:
            raise ConversionError(
                f"no stage of this {type(model).__name__} has a block to bypass (a stage needs at least two residual "
                "blocks, of which all but the first keep the shape)"
            )
        for what in ("blocks", "norms", "drop_paths"):
            seen: dict[int, tuple[str, str]] = {}
            for stage in resolved:
                for name in getattr(stage, what):
                    # By identity: a module may have two names.
                    former, owner = seen.setdefault(id(model.get_submodule(name)), (name, stage.name))
                    if former != name:
                        raise ConversionError(f"{former!r} and {name!r} are one module, which cannot have two places")
                    if owner != stage.name:
                        raise ConversionError(f"{name!r} belongs to stages {owner!r} and {stage.name!r}")
        return resolved

    def full(self, model: nn.Module) -> Depth:
        """The depth of the whole of this model."""
        return Depth([*(False for _ in self.flags), *(stack.layers(model) for stack in self.stacks)])

    @property
    def base(self) -> Depth:
        return Depth([*(True for _ in self.flags), *(stack.base for stack in self.stacks)])

    def to_dict(self) -> dict:
        return {"family": self.family, "stages": [dataclasses.asdict(stage) for stage in self],
                "stacks": [dataclasses.asdict(stack) for stack in self.stacks]}

    @classmethod
    def from_dict(cls, value: dict) -> Plan:
        # What was stored before there were stacks has none.
        return cls((StagePlan(**stage) for stage in value["stages"]), value["family"],
                   (StackPlan(**stack) for stack in value.get("stacks", ())))

    def __str__(self) -> str:
        rows = [("flag", "stage", "blocks", "essential", "refinement", "switched norms")]
        flags = {id(stage): str(k) for k, group in enumerate(self.flags) for stage in group}
        for stage in self:
            rows.append((
                flags.get(id(stage), "-"),
                stage.name,
                str(len(stage.blocks)),
                _span(stage.essential_blocks),
                _span(stage.refinement_blocks) or "-",
                str(len(stage.norms)) if stage.norms is not None else "by default",
            ))
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        lines += [f"and {stack.name}, a stack that may be cut short, to {stack.base} layers in the base-net"
                  for stack in self.stacks]
        count = len(self.flags)
        what = f"{count} stages to switch" if count == len(self.flagged) else f"{count} flags"
        depths = "" if self.stacks else f", {2**count} depths"
        return "\n".join([f"{self.family}: {what}{depths}", *lines])

    def __repr__(self) -> str:
        return f"<Plan {self.family!r}, {len(self)} stages, {len(self.flags)} flags>"


def _get(model: nn.Module, name: str, where: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError:
        top = ", ".join(child for child, _ in model.named_children())
        raise ConversionError(f"{where} names {name!r}, which this {type(model).__name__} does not have "
                              f"(its children: {top})") from None


def _is_inside(name: str, parent: str) -> bool:
    return name == parent or name.startswith(f"{parent}.")


def _inside(model: nn.Module, blocks: Iterable[str], wanted) -> list[str]:
    found = []
    for block in blocks:
        for name, module in model.get_submodule(block).named_modules():
            if wanted(module) and not set(name.split(".")) & set(SHORTCUTS):
                found.append(f"{block}.{name}" if name else block)
    return found


def _check_keeps_shape(block: nn.Module, name: str, where: str) -> None:
    """Refuse what can be seen, without running it, to change resolution or width.

    What cannot be seen here is caught at the first forward (`nn.ShapeChecked`).
    """
    strided = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.modules.pooling._MaxPoolNd, nn.modules.pooling._AvgPoolNd)
    widths_in, widths_out = [], []
    for part_name, part in block.named_modules():
        stride = getattr(part, "stride", 1)
        if isinstance(part, strided) and max(stride if isinstance(stride, tuple) else (stride,)) > 1:
            raise ConversionError(f"{where}: {name!r} cannot be bypassed, it changes the resolution "
                                  f"({part_name or 'itself'} has stride {stride}); begin a stage with it")
        if isinstance(part, nn.modules.conv._ConvNd):
            widths_in.append(part.in_channels)
            widths_out.append(part.out_channels)
        elif isinstance(part, nn.Linear):
            widths_in.append(part.in_features)
            widths_out.append(part.out_features)
    if widths_in and widths_in[0] not in widths_out:
        raise ConversionError(f"{where}: {name!r} cannot be bypassed, it changes the width from {widths_in[0]} to "
                              f"{widths_out[-1]}; begin a stage with it")


def _span(blocks: Sequence[str]) -> str:
    if len(blocks) < 2:
        return "".join(blocks)
    return f"{blocks[0]} .. {blocks[-1].rpartition('.')[2]}"
