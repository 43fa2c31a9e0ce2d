"""Modules that depend on an entry of the depth: what all kinds of choices have in common, see `adn.core.kinds`.

A module of the user's model is not replaced: its class is swapped for a subclass (behaviour below, then the
module's own class), so that parameters, names, `isinstance`, deepcopy, pickle and everything timm or torchvision
do with the module keep working. `swap` and `unswap` are the only ways in and out.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Iterator
from typing import Any

import timm.layers
import torch
import torchvision
from torch import nn
from torch.fx import Proxy

from .choice import Both, Choice, recomputing

BATCH_NORMS = (nn.modules.batchnorm._BatchNorm,)
FROZEN_NORMS = (torchvision.ops.FrozenBatchNorm2d, timm.layers.FrozenBatchNormAct2d)
NORMS = (
    nn.modules.batchnorm._NormBase,  # batch and instance norm, synchronised and with activation too
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
    *(cls for cls in vars(timm.layers.norm).values() if isinstance(cls, type) and issubclass(cls, nn.Module)),
    *(getattr(timm.layers, f"EvoNorm2d{kind}") for kind in ("B0", "B1", "B2", "S0", "S1", "S2")),
    timm.layers.FilterResponseNormAct2d,
    timm.layers.FilterResponseNormTlu2d,
    *FROZEN_NORMS,
)
EVO_BATCH_NORMS = tuple(getattr(timm.layers, f"EvoNorm2d{kind}") for kind in ("B0", "B1", "B2"))
_DROP_PATHS = (timm.layers.DropPath, torchvision.ops.StochasticDepth)
# What to do where super-net and base-net cannot run in one forward.
TWO_PASSES = "use SelfDistillation with single_pass=False"


class Swapped:
    """Base of the behaviours: rebuilds the generated class when a module is copied or unpickled.

    Attributes:
        order: where it stands among those of one module; the first is called first.
        fx_leaf: torch.fx must not look inside: the flag read there would be frozen into the graph.
        per_module: each module gets a class of its own, with `members` of it.
    """

    order: int
    fx_leaf = True
    per_module = False

    def __reduce_ex__(self, protocol: int) -> tuple:
        return _rebuild, (behaviours(self), original_class(self)), self.__getstate__()


class Follows(Swapped):
    """Base of those that depend on an entry of the depth, `_adn_choice`, and on nothing else that is set."""


class SkipNorm(Follows):
    """A skip-aware norm: the module's own parameters and statistics, and a second set in its child `skip`.

    The second set is used while the refinement path of the stage is bypassed. Only the set in use sees the
    input: the other one gets no gradient and its statistics do not move.
    """

    order = 15

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        skip = self._adn_choice.now()
        if skip:
            return self._modules["skip"](x, *args, **kwargs)
        if isinstance(skip, Both):
            a, b = halves(x, skip.samples)
            return torch.cat([super().forward(a, *args, **kwargs), self._modules["skip"](b, *args, **kwargs)])
        return super().forward(x, *args, **kwargs)


class Bypass(Follows):
    """The identity while the refinement path is bypassed; hooks and children are not called then.

    Put on refinement blocks, and on the DropPath of essential blocks (the base-net is the student of a
    deterministic forward, as in the reference).
    """

    order = 10

    def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        skip = self._adn_choice.now()
        if skip:
            x = input_of(self, args, kwargs)
            # While torch.fx traces, the module is always called, so that it stays in the graph as a leaf and goes on
            # following its choice there.
            if not isinstance(x, Proxy):
                return x
        elif isinstance(skip, Both):
            a, b = halves(input_of(self, args, kwargs), skip.samples)
            args, kwargs = with_input(self, a, args, kwargs)
            return torch.cat([super().__call__(*args, **kwargs), b])
        return super().__call__(*args, **kwargs)


class HandsOn(Swapped):
    """A block that returns a tuple: of all it is given, of which only the first is new (MViTv2: tokens, and the height
    and width of their grid); or of what it makes and `_adn_extras` others that nobody needs (Swin of transformers:
    weights of attention), for which it gives None. Between this and `TakesFirst` it is one that turns a tensor into a
    tensor."""

    order = 0

    def __call__(self, x: torch.Tensor, *others: Any, **kwargs: Any) -> Any:
        y = super().__call__(x, *others, **kwargs)
        if isinstance(y, Proxy):  # that of a call, which will return the tuple
            return y
        return (y, *([None] * self._adn_extras if self._adn_extras else others))


class TakesFirst(Swapped):
    """See `HandsOn`."""

    order = 25

    def forward(self, x: torch.Tensor, *others: Any, **kwargs: Any) -> torch.Tensor:
        return super().forward(x, *others, **kwargs)[0]


class Fork(Swapped):
    """The block at whose entry super-net and base-net part, where one forward runs both: doubles the batch.

    Put on the first block that differs between the two: inside it, its shortcut has to be doubled too. A switched norm
    that comes before all blocks doubles the batch itself.
    """

    order = 11
    fx_leaf = False  # no forward that is traced runs both

    def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        samples = self._adn_choice.both()
        if samples:
            a, b = halves(input_of(self, args, kwargs), samples)
            if a is b:
                args, kwargs = with_input(self, torch.cat([a, b]), args, kwargs)
        return super().__call__(*args, **kwargs)


class ShapeChecked(Swapped):
    """A refinement block of a hand-written plan: refuses to change the shape, without which it cannot be bypassed."""

    order = 13

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        y = super().forward(x, *args, **kwargs)
        if not torch.is_tensor(y) or y.shape != x.shape:
            result = tuple(y.shape) if torch.is_tensor(y) else type(y).__name__
            raise RuntimeError(
                f"a refinement block ({original_class(self).__name__}) turned {tuple(x.shape)} into {result}; only a "
                "block that keeps the shape can be bypassed. Move it into the essential path of the plan"
            )
        return y


class SharedNorm(Swapped):
    """A norm that both nets run and that has one set, whose statistics are those of the batch.

    Where one forward runs both nets, each half of the batch has its own statistics, and the running ones move as two
    forwards would move them: by the super-net, then by the base-net; before the two part, twice by the same batch.
    """

    order = 16

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        samples = self._adn_choice.both()
        if not samples or not (self.training or getattr(self, "running_mean", x) is None):
            return super().forward(x, *args, **kwargs)
        a, b = halves(x, samples)
        if a is not b:
            return torch.cat([super().forward(a, *args, **kwargs), super().forward(b, *args, **kwargs)])
        if not self.training or recomputing():
            return super().forward(x, *args, **kwargs)
        counter = getattr(self, "num_batches_tracked", None)
        if counter is None or not isinstance(self, BATCH_NORMS):
            with torch.no_grad():
                super().forward(x, *args, **kwargs)
            return super().forward(x, *args, **kwargs)
        # Twice by the same batch, at once.
        momentum = self.momentum
        self.momentum = 2 / (float(counter) + 2) if momentum is None else 1 - (1 - momentum) ** 2
        counter.add_(1)
        try:
            return super().forward(x, *args, **kwargs)
        finally:
            self.momentum = momentum


class Rerouted(Swapped):
    """A module whose forward may be taken by another route through its children, see `adn.runtime.accelerate`.

    The route is laid for the module as it is: a copy gets its own, and changing an attribute afterwards closes it.
    """

    order = 14
    fx_leaf = False  # traced, it takes its own forward

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self._adn_route.is_open(args, kwargs):
            return self._adn_route.take(self, *args)
        return super().forward(*args, **kwargs)

    def __setattr__(self, name: str, value: Any) -> None:
        former = getattr(self, name, value)
        super().__setattr__(name, value)
        # Of a norm everything is read at each call. What was not there before, as Dynamo's marks, has no part in it.
        if former is not value and name not in ("training", "__class__") and not is_norm(self):
            self._adn_route.close()

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self._adn_route.lay(self)


class Paired(Swapped):
    """A batch norm of which there are two sets, either of them. Whoever resets statistics to average them anew, as
    torch's `update_bn`, runs the net at one depth, and fills one."""

    order = 18
    fx_leaf = False

    def reset_running_stats(self) -> None:
        super().reset_running_stats()
        if self.track_running_stats:
            swap(self, Unfilled)


class Unfilled(Swapped):
    """One whose statistics were reset, until a forward in training fills them."""

    order = 19
    fx_leaf = False

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if not self.training and not torch.compiler.is_compiling():
            check_filled(self)
        y = super().forward(x, *args, **kwargs)
        if self.training and not torch.compiler.is_compiling():
            swap(self, Unfilled, away=True)
        return y


def check_filled(module: nn.Module) -> None:
    """Raises RuntimeError for one of two sets that was reset and not filled again, while the other was."""
    if not isinstance(module, Unfilled):
        return
    count, other = (each.num_batches_tracked for each in (module, module._adn_partner))
    # If neither was, it is a net to be trained from the start.
    if count is not None and other is not None and count == 0 and other > 0:
        raise RuntimeError("the statistics of batch norms were reset, and those of one depth never filled again: what "
                           "did so (torch.optim.swa_utils.update_bn?) ran the net at another. Average the super-net's "
                           "and the base-net's anew: adn.update_bn(net, loader)")


class CountOnce(Swapped):
    """Batch norm whose statistics move once per training forward, also under gradient checkpointing.

    Recomputation during backward normalises with the batch's statistics but leaves the running ones alone.
    """

    order = 17

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if not (self.training and recomputing() and self.num_batches_tracked is not None):
            return super().forward(x, *args, **kwargs)
        # The op must get its running statistics, since checkpointing compares what the two forwards saved: average
        # the batch in with weight 0, and let another counter count.
        counter, momentum = self.num_batches_tracked, self.momentum
        self.num_batches_tracked, self.momentum = torch.zeros_like(counter), 0.0
        try:
            return super().forward(x, *args, **kwargs)
        finally:
            self.num_batches_tracked, self.momentum = counter, momentum


def _subclass(mixins: tuple[type, ...], base: type) -> type:
    members = [mixin.members(base) for mixin in mixins if mixin.per_module]
    return _new_subclass(mixins, base, members[0]) if members else _shared_subclass(mixins, base)


@functools.cache
def _shared_subclass(mixins: tuple[type, ...], base: type) -> type:
    cls = _new_subclass(mixins, base, {})
    if any(mixin.fx_leaf for mixin in mixins):
        timm.layers.register_notrace_module(cls)
    return cls


def _new_subclass(mixins: tuple[type, ...], base: type, members: dict[str, Any]) -> type:
    # One of its own counts as the module's class to whoever prints it.
    name = "".join(mixin.__name__ for mixin in mixins if not mixin.per_module) + base.__name__
    # By this name torch.fx, and so torchvision's feature extraction, knows what not to look into.
    leaf = any(mixin.fx_leaf for mixin in mixins)
    return type(name, (*mixins, base), {"__module__": f"torch.nn.{__name__}" if leaf else __name__, **members})


@functools.cache
def _input_name(cls: type) -> str:
    """What a module class calls the input of its forward."""
    return list(inspect.signature(cls.forward).parameters)[1]


def input_of(module: nn.Module, args: tuple, kwargs: dict) -> torch.Tensor:
    return args[0] if args else kwargs[_input_name(original_class(module))]


def with_input(module: nn.Module, x: torch.Tensor, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """The same arguments with another input."""
    return ((x, *args[1:]), kwargs) if args else ((), {**kwargs, _input_name(original_class(module)): x})


def halves(x: torch.Tensor, samples: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What the super-net and what the base-net has of a tensor, in a forward that runs both (`Choice.both`).

    Args:
        x: (samples, ...) before the two part: then it belongs to both, and the results are x itself; else
            (2 * samples, ...), the super-net's first.

    Raises:
        RuntimeError: if the first dimension is neither.
    """
    if x.shape[0] == samples:
        return x, x
    if x.shape[0] == 2 * samples:
        return x.chunk(2)
    raise RuntimeError(f"super-net and base-net of {samples} samples run at once, but a norm or block got a tensor "
                       f"{tuple(x.shape)}, whose first dimension is not theirs; {TWO_PASSES}")


def shared_norms(module: nn.Module) -> Iterator[nn.Module]:
    """The norms in a module that super-net and base-net share and that use statistics of the batch."""
    for child in module._modules.values():
        if child is None or isinstance(child, (SkipNorm, Bypass)):
            continue  # those in there belong to one of the two
        if _uses_batch(child):
            yield child
        yield from shared_norms(child)


def _uses_batch(module: nn.Module) -> bool:
    if isinstance(module, nn.modules.instancenorm._InstanceNorm):
        return module.track_running_stats
    return isinstance(module, (*BATCH_NORMS, *EVO_BATCH_NORMS))


def mixing_norm(net: nn.Module) -> str | None:
    """The name of a norm by which samples of a batch influence each other in evaluation mode too; None without one."""
    return next((name for name, module in net.named_modules()
                 if isinstance(module, (*BATCH_NORMS, *EVO_BATCH_NORMS)) and module.running_var is None), None)


def _rebuild(mixins: tuple[type, ...], base: type) -> nn.Module:
    cls = _subclass(mixins, base)
    return cls.__new__(cls)


def behaviours(module: nn.Module) -> tuple[type, ...]:
    """The behaviours swapped into a module, () for a plain one."""
    return tuple(cls for cls in type(module).__mro__
                 if issubclass(cls, Swapped) and isinstance(vars(cls).get("order"), int))


def original_class(module: nn.Module) -> type:
    if not isinstance(module, Swapped):
        return type(module)
    return next(c for c in type(module).__mro__ if not issubclass(c, Swapped))


def swap(module: nn.Module, behaviour: type[Swapped], choice: Choice | None = None, away: bool = False) -> None:
    """Add a behaviour to a module in place, or take one `away`. `choice` is what it follows, if it follows one."""
    others = {each for each in behaviours(module) if each is not behaviour}
    wanted = sorted(others if away else {*others, behaviour}, key=lambda b: b.order)
    module.__class__ = _subclass(tuple(wanted), original_class(module))
    if choice is not None:
        module.__dict__["_adn_choice"] = choice


def unswap(module: nn.Module) -> None:
    """Give a module its own class back."""
    module.__class__ = original_class(module)
    for name in [name for name in vars(module) if name.startswith("_adn_")]:
        del module.__dict__[name]


def is_norm(module: nn.Module) -> bool:
    return isinstance(module, NORMS) or is_frozen(module)


def is_frozen(module: nn.Module) -> bool:
    """Is it a batch norm with fixed statistics and parameters: of torchvision, timm, or, by its name, of who copied it?
    """
    return isinstance(module, FROZEN_NORMS) or (
        original_class(module).__name__.endswith("FrozenBatchNorm2d") and "running_var" in module._buffers)


def is_drop_path(module: nn.Module) -> bool:
    """Stochastic depth of a block: of timm, torchvision, or, by its name, of others."""
    return isinstance(module, _DROP_PATHS) or original_class(module).__name__.endswith("DropPath")


TWINS = ("copy", "fresh", "frozen")
_USUAL_EPS = 1e-5  # of norms that do not say


def twin_of(norm: nn.Module, twins: str = "copy") -> nn.Module:
    """A second parameter set for `norm`, one of `TWINS`; hooks are not copied.

    A copy of a norm with fixed statistics and parameters could never become another one: its twin is one that learns,
    except if "frozen" twins are wanted.
    """
    twin = copy.deepcopy(norm)
    for module in twin.modules():
        for name, value in module.__dict__.items():
            if name.endswith("_hooks") or name.startswith(("_forward_hooks_", "_forward_pre_hooks_")):
                value.clear()
    if twins != "frozen" and is_frozen(twin):
        twin = _learning(twin).train(norm.training)
    if twins == "fresh":
        reset_norm(twin)
    return twin


def _learning(frozen: nn.Module) -> nn.Module:
    if isinstance(frozen, timm.layers.FrozenBatchNormAct2d):
        return timm.layers.unfreeze_batch_norm_2d(frozen)
    # timm's function asks others for attributes that only those have which timm froze.
    eps = getattr(frozen, "eps", _USUAL_EPS)
    norm = nn.BatchNorm2d(frozen.weight.numel(), eps, device=frozen.weight.device, dtype=frozen.weight.dtype)
    norm.load_state_dict(frozen.state_dict(), strict=False)  # all but the counter
    return norm


def reset_norm(norm: nn.Module) -> None:
    """Scale 1 (`v` in EvoNorm too), shift 0, running mean 0, running variance 1, counter 0."""
    with torch.no_grad():
        for name, tensor in (*norm.named_parameters(recurse=False), *norm.named_buffers(recurse=False)):
            tensor.fill_(1 if name in ("weight", "v", "running_var") else 0)


def fx_leaf_modules() -> list[type]:
    """Classes that torch.fx must treat as leaves so that a traced graph keeps following the depth.

    Tracers of torch.fx, torchvision and timm know them already, blocks that are an `nn.Sequential` themselves excepted:
    `torchvision.models.feature_extraction.create_feature_extractor(net, nodes,
    tracer_kwargs={"leaf_modules": adn.fx_leaf_modules()})`.
    """
    return [c for c in timm.layers.get_notrace_modules() if issubclass(c, Swapped)]
