"""Any other model of runs of residual blocks, found by running it without values (`adn.core.dry_run`), not by class.

A stage is a run of neighbouring blocks of one container that are residual and keep the shape, begun by the block
before them if that is of the same class. Where a model has one width from end to end, as a ViT, a stage is a group of
three. Every norm of an essential block switches except those of queries and keys.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import nn

from ..core.dry_run import Call, dry_run, is_residual
from ..core.errors import ConversionError
from ..core.kinds.narrow import as_it_concatenates
from ..core.kinds.stage import StagePlan
from . import GROUP, in_groups, stage_of

NAME = "residual"  # of the family, in plans
CONTAINERS = (nn.Sequential, nn.ModuleList)
OF_ATTENTION = ("q_norm", "k_norm", "norm_q", "norm_k")


def residual(model: nn.Module) -> list[StagePlan]:
    """The stages of a model, none if it has none.

    Raises:
        CannotRun: if the model could not be run.
    """
    calls = dry_run(model)
    found = [run for run in _runs(model, "", _Judge(calls)) if len(run.blocks) > 1]
    found.sort(key=lambda run: _position(calls, run))
    dims = [_channel_dim(calls[run.blocks[-1]]) for run in found]
    widths = {calls[run.blocks[-1]].result.shape[dim] for run, dim in zip(found, dims, strict=True)}
    stages = []
    for run, dim in zip(found, dims, strict=True):
        for stage in in_groups(run) if len(widths) == 1 and len(run.blocks) > GROUP else [run]:
            stage.channel_dim = dim
            stage.hands_on = calls[stage.blocks[-1]].hands_on
            try:
                stage = as_it_concatenates(model, stage).resolve(model)
            except ConversionError:  # the net would concatenate copies
                continue
            stage.norms = [norm for norm in stage.norms if norm.rpartition(".")[2] not in OF_ATTENTION]
            stages.append(stage)
    return stages


class _Judge:
    """Which modules are residual blocks; of those that are alike one is run."""

    def __init__(self, calls: Mapping[str, Call]) -> None:
        self.calls = calls
        self.known: dict[tuple, bool] = {}

    def __call__(self, name: str) -> bool:
        call = self.calls.get(name)
        if call is None or not call.keeps_shape or next(call.module.parameters(), None) is None:
            return False
        key = _looks(call.module), repr((call.args, call.kwargs))
        if key not in self.known:
            self.known[key] = is_residual(call)
        return self.known[key]

    def follows(self, name: str, former: str) -> bool:
        """Does a block take what the other, which runs before it, may have made?"""
        a, b = self.calls.get(former), self.calls.get(name)
        if a is None or b is None or a.input is b.input:
            return False
        return getattr(a.result, "shape", None) == getattr(b.input, "shape", ()) and a.number < b.number


def _looks(module: nn.Module) -> str:
    """All of a module but its tensors: its submodules, and the settings that each keeps as attributes."""
    return repr([(name, type(part), [(key, value) for key, value in vars(part).items()
                                     if isinstance(value, bool | int | float | str | tuple | None)])
                 for name, part in module.named_modules()]) + repr(module)


def _runs(module: nn.Module, name: str, is_block: _Judge) -> Iterator[StagePlan]:
    """Those of a module, at any depth; blocks of a run are not looked into."""
    prefix = f"{name}." if name else ""
    inside = {child: list(_runs(part, f"{prefix}{child}", is_block)) for child, part in module.named_children()}
    taken: set[str] = set()
    if isinstance(module, CONTAINERS):
        for run in _runs_of(module, prefix, is_block):
            # A sequence of residual blocks is residual itself.
            longest = max((len(inner.blocks) for child in run if type(module._modules[child]) in CONTAINERS
                           for inner in inside[child]), default=0)
            if len(run) > 1 and longest <= len(run):
                taken.update(run)
                yield stage_of(name, run, len(inside))
    for child, found in inside.items():
        if child not in taken:
            yield from found


def _runs_of(module: nn.Module, prefix: str, is_block: _Judge) -> Iterator[list[str]]:
    run: list[str] = []
    former: str | None = None
    for child, part in module.named_children():
        if is_block(prefix + child):
            goes_on = former is not None and is_block.follows(prefix + child, prefix + former)
            if not (run and goes_on):
                if run:
                    yield run
                # A block that changes the shape begins the stage whose others keep it.
                first = goes_on and not run and type(module._modules[former]) is type(part)
                run = [former] if first else []
            run.append(child)
        elif run:
            yield run
            run = []
        former = child
    if run:
        yield run


def _position(calls: Mapping[str, Call], run: StagePlan) -> int:
    return calls[run.blocks[-1]].number


def _channel_dim(call: Call) -> int:
    """By the shape of what a block makes of a square image."""
    shape = call.result.shape
    if len(shape) != 4:
        return -1 if len(shape) == 3 else 1
    return -1 if shape[1] == shape[2] != shape[3] else 1
