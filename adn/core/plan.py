"""Where the stages of a model are and how they split: what `convert` carries out.

A plan holds names only, so it can be printed, edited, written by hand, stored in a checkpoint and checked against a
model before anything is changed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence

from torch import nn

from .depth import Depth
from .dry_run import Call, CannotRun, dry_run
from .errors import ConversionError
from .kinds import KINDS, Kind, submodule
from .kinds.narrow import as_it_concatenates
from .kinds.stack import StackPlan
from .kinds.stage import StagePlan, check_keeps_shape
from .tables import table

BY_HAND = "by hand"


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

    def __bool__(self) -> bool:
        """Is there anything to decide about?"""
        return bool(len(self) or self.stacks)

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
                container = submodule(model, entry, "the plan")
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
        by_hand = self.family == BY_HAND
        stages = [stage.resolve(model) for stage in self]
        if by_hand:
            found = [as_it_concatenates(model, stage) for stage in self]
            stages = [new.resolve(model) if new is not stage else done
                      for stage, new, done in zip(self, found, stages, strict=True)]
        resolved = Plan(stages, self.family, (stack.resolve(model) for stack in self.stacks))
        calls = _calls(model) if by_hand else {}
        for stage in resolved if by_hand else ():
            for block in stage.refinement_blocks:
                check_keeps_shape(calls.get(block), block, f"stage {stage.name!r}")
                stage.hands_on |= block in calls and calls[block].hands_on
        if not resolved.flagged and not resolved.stacks:
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

    def renamed(self, rename: Callable[[str], str]) -> Plan:
        """The same, of a model in which modules have other names."""
        return Plan((stage.renamed(rename) for stage in self), self.family,
                    (stack.renamed(rename) for stack in self.stacks))

    @property
    def choices(self) -> list[list[Kind]]:
        """What each entry of the depth decides: stages by flag, then stacks."""
        return [*self.flags, *([stack] for stack in self.stacks)]

    @property
    def parts(self) -> list[tuple[int, Kind]]:
        """Everything there is to decide about, each with the index of its entry of the depth."""
        return [(i, kind) for i, kinds in enumerate(self.choices) for kind in kinds]

    def full(self, model: nn.Module) -> Depth:
        """The depth of the whole of this model."""
        return Depth([kinds[0].values(model)[0] for kinds in self.choices])

    @property
    def base(self) -> Depth:
        return Depth([kinds[0].base for kinds in self.choices])

    def to_dict(self) -> dict:
        return {"family": self.family, "stages": [_stored(stage) for stage in self],
                "stacks": [_stored(stack) for stack in self.stacks]}

    @classmethod
    def from_dict(cls, value: dict) -> Plan:
        # What was stored before there were stacks has none, and before there were kinds no word of them.
        return cls((_read(stage, "stage") for stage in value["stages"]), value["family"],
                   (_read(stack, "stack") for stack in value.get("stacks", ())))

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
        lines = [table(rows, left=True)]
        lines += [f"and {stack.name}, a stack that may be cut short, to {stack.base} layers in the base-net"
                  for stack in self.stacks]
        count = len(self.flags)
        what = f"{count} stages to switch" if count == len(self.flagged) else f"{count} flags"
        depths = "" if self.stacks else f", {2**count} depths"
        return "\n".join([f"{self.family}: {what}{depths}", *lines])

    def __repr__(self) -> str:
        return f"<Plan {self.family!r}, {len(self)} stages, {len(self.flags)} flags>"


def _calls(model: nn.Module) -> dict[str, Call]:
    try:
        return dry_run(model)
    except CannotRun:
        return {}


def _span(blocks: Sequence[str]) -> str:
    if len(blocks) < 2:
        return "".join(blocks)
    return f"{blocks[0]} .. {blocks[-1].rpartition('.')[2]}"


def _stored(kind: Kind) -> dict:
    return {"kind": kind.kind, **dataclasses.asdict(kind)}


def _read(stored: dict, default: str) -> Kind:
    fields = dict(stored)
    return KINDS[fields.pop("kind", default)](**fields)
