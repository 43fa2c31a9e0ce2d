"""The deploy form of a converted net: every depth at the speed of a network built for it alone.

The forward is traced once and cut into segments, each of which depends on one flag at most: a stage, or what lies
between two stages. A segment has two paths, one for each value of its flag, in which bypassed blocks do not occur and
every convolution + norm + activation (+ residual) is one call. A forward runs one path of each segment.
"""

from __future__ import annotations

import collections
import copy
import dataclasses
import functools
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from adn_kernels import private

from ..core.behaviours import check_filled, mixing_norm
from ..core.deploy import Deploy
from ..core.depth import Depth
from ..core.state import DepthLike, State, get_depth, set_depth, state_of, unwrap
from ..models.registry import deploy_of
from .cut import Segment, cut, filled, one_path
from .fusing import fuse_calls
from .layers import Layer
from .per_image import checked_flags, fastest, split_run
from .watch import Watch

# A router inside a forward, see `FusedNet.per_image`.
Asked = Callable[..., Tensor | list[bool | int]]


def fuse(net: nn.Module) -> FusedNet:
    """The deploy form of a converted net: for inference, any-depth as before.

    Convolution, norm, activation and residual addition become one call each: oneDNN's on a CPU, cuDNN's or a Triton
    kernel on a GPU. Norms are folded into the weights of the convolutions before them, for both values of their
    flag: the folded essential path is held twice. What is not fused keeps sharing its parameters with the net. Of a
    detector of torchvision the backbone with its pyramid and the layers of the heads are fused; all that depends on
    values (resizing, anchors, suppression) runs as it is. An RT-DETR of `transformers` becomes one of this library,
    with its weights as they are now.

    The result equals the net in evaluation mode within rounding, at every depth. It has a depth of its own, for all
    functions that take a net: `adn.set_depth(fused, "TTFF")`. Changes of the net's parameters, statistics and modules
    are noticed at the next call, which folds them again. Only writes that torch does not count are not: through
    `tensor.data`, by collectives of torch.distributed, into tensors made in inference mode; call `fused.refresh()`
    after those. Feature maps it returns are channels-last. Two threads use two copies, or an `adn.Engine`.

    Args:
        net: a converted net in evaluation mode, on the device and of the dtype it is to run at. It is not changed.

    Raises:
        ValueError: if the net is not any-depth or in training mode, or if its forward cannot be traced (it then says
            why: usually because it depends on values).
        RuntimeError: if other code has replaced modules that follow the depth.
    """
    form = deploy_of(unwrap(net))
    if form.model is None:
        return FusedNet(net, form)
    fused = FusedNet(form.model, form)
    set_depth(fused, get_depth(net))
    return fused


class FusedNet(nn.Module):
    """What `fuse` returns.

    Attributes:
        segments: in the order in which they run.
        heads: segments without a flag, for modules around them.
        form: what they are made of.
    """

    def __init__(self, net: nn.Module, form: Deploy) -> None:
        super().__init__()
        self.form = form
        source, state = unwrap(net), state_of(net)
        if isinstance(source, FusedNet):
            raise ValueError("this net is fused already")
        self._compile_options: dict[str, Any] | None = None
        # Not a child: what is fused of it is here.
        self.__dict__["_adn"] = State(
            state.plan, [copy.copy(choice) for choice in state.choices], state.full, state.base, state.twins, {},
            state.origin, state.class_names, made_from=source)
        if any(module.training for module in source.modules()):
            raise ValueError("a deploy form is for inference: call net.eval() first")
        for module in source.modules():
            check_filled(module)
        self._build()
        self.training = False

    def forward(self, x: Any) -> Any:
        """As the net's own forward of one argument, without gradients.

        Raises:
            RuntimeError: if x requires a gradient.
        """
        return self.around(x, self.run)

    def run(self, x: Tensor) -> Any:
        """What the segments make of their input, at the depth that is set: of a net as a whole, its forward."""
        choices = self._adn.choices
        return self._run(x, lambda segment, inputs: segment.run(choices[segment.flag].entry, *inputs))

    def around(self, x: Any, run: Callable[[Tensor], Any]) -> Any:
        """The forward of the net with `run` for its `part`."""
        if not self.form.part:
            return run(x) if self.form.finish is None else self.form.finish(run(x))
        heads = {name: functools.partial(self._run_head, head) for name, head in zip(self.form.heads, self.heads)}
        with torch.no_grad():
            return _with_calls(self._adn.made_from, {self.form.part: run, **heads})(x)

    def _run_head(self, head: Segment, x: Tensor) -> Tensor:
        return head.run(False, self.take(x))[0]

    def per_image(self, x: Tensor, depths: Tensor | Asked | Sequence[DepthLike]) -> Any:
        """Every image of a batch at a depth of its own; the depth of the net does not matter.

        Args:
            x: (N, ...), or what else the net takes.
            depths: int32 (flags and stacks, N) on the device of x, 1 where image n bypasses the refinement path of flag
                k, else 0, and in the row of a stack after how many of its layers n is done (they all run): any kernel
                may have written it, and nothing waits for it. Or, where the host knows, N depths: then the batch is
                split in every stage or, where that has been measured to be faster, run as a whole; the first calls
                measure. Or a router, called `router(k, *inputs)` before what depends on flag k, with what that takes,
                features first, for the column of that flag: (N,) on the device, or a list of N.

        Raises:
            ValueError: if a shape, type or device does not fit, or samples of a batch influence each other.
        """
        return self.around(x, lambda batch: self.run_per_image(batch, depths))

    def run_per_image(self, x: Tensor, depths: Tensor | Asked | Sequence[DepthLike]) -> Any:
        """As `per_image`, of the segments alone."""
        if self._mixing is not None:
            raise ValueError(f"norm {self._mixing!r} has no running statistics, so samples of a batch influence each "
                             "other: run images of different depths in batches of their own")
        if not (callable(depths) or isinstance(depths, Tensor)):
            pair = self._adn.full, self._adn.base
            table = [Depth.parse(depth, pair) for depth in depths]
            if len(table) != len(x):
                raise ValueError(f"{len(table)} depths for {len(x)} images; pass one for each")
            return self._run(x, lambda segment, inputs: self._split(segment, inputs, [d[segment.flag] for d in table]))
        if isinstance(depths, Tensor):
            flags = checked_flags(depths, (len(self._adn.full), len(x)), x.device, len(self._adn.full.layers))
            return self._run(x, lambda segment, inputs: segment.per_image(*inputs, flags[segment.flag]))
        found: dict[int, Tensor | list[bool | int]] = {}

        def routed(segment: Segment, inputs: list[Any]) -> tuple:
            k = segment.flag
            if k not in found:
                found[k] = depths(k, *inputs)
                if not isinstance(found[k], list):
                    counts = 0 if isinstance(self._adn.full[k], bool) else len(x)
                    found[k] = checked_flags(found[k], (len(x),), x.device, counts)
                elif len(found[k]) != len(x) or not set(found[k]) <= set(segment.entries):
                    raise ValueError(f"of flag {k} the router gave {found[k]} for {len(x)} images; pass one of "
                                     f"{', '.join(map(str, segment.entries))} for each")
            if isinstance(found[k], list):
                return self._split(segment, inputs, found[k])
            return segment.per_image(*inputs, found[k])

        return self._run(x, routed)

    def _run(self, x: Tensor, run: Callable[[Segment, list[Any]], tuple]) -> Any:
        """A forward; `run` is asked for those segments that have a flag."""
        if x.requires_grad and torch.is_grad_enabled():
            raise RuntimeError("a deploy form computes no gradients: pass x.detach(), or differentiate the net itself")
        self.refresh_if_changed()
        values: dict[str, Any] = {self.segments[0].takes[0]: self.take(x)}
        with torch.no_grad():
            for segment in self.segments:
                inputs = [values[name] for name in segment.takes]
                for name in segment.last_uses:
                    del values[name]
                outputs = segment.run(False, *inputs) if segment.flag is None else run(segment, inputs)
                values.update(zip(segment.gives, outputs))
        return self.give(values)

    def take(self, x: Tensor) -> Tensor:
        """The input as the first segment wants it."""
        as_it_is = x.ndim != 4 or x.is_contiguous(memory_format=torch.channels_last)
        return x if as_it_is else x.contiguous(memory_format=torch.channels_last)

    def give(self, values: Mapping[str, Any]) -> Any:
        """What the forward returns, of the values that segments gave."""
        return filled(self._result, values)

    def _split(self, segment: Segment, inputs: list[Any], entries: list[bool | int]) -> tuple:
        """A segment whose entries of the depth the host knows, the faster way."""
        n, counts = len(entries), collections.Counter(entries)
        if len(counts) == 1:
            return segment.run(entries[0], *inputs)
        ways = {
            "split": lambda: split_run(segment.run, inputs, entries),
            "whole": lambda: segment.per_image(
                *inputs, torch.tensor(entries, dtype=torch.int32).to(inputs[0].device, non_blocking=True)),
        }
        # Eighths: so that not every number of images has to be measured.
        eighths = tuple(sorted((entry, 8 * count // n) for entry, count in counts.items()))
        key = id(segment), n, eighths, inputs[0].shape, inputs[0].dtype
        if key not in self._faster:
            self._faster[key] = fastest(ways, inputs[0].device)
        return ways[self._faster[key]]()

    def compile(self, **options: Any) -> None:
        """Compile both paths of every segment, in place, each as one region; `per_image` stays as it is. On a CPU it
        helps nets without batch norm; others less, whose convolutions are fused already.

        Args:
            options: of `torch.compile`.
        """
        self._compile_options = {"fullgraph": True, **options}
        for segment in self.segments:
            segment.compile(**self._compile_options)

    def refresh(self) -> None:
        """Fold the net's parameters and statistics again, into the memory they are in already."""
        with torch.inference_mode(False):
            for layer in self.modules():
                if isinstance(layer, Layer):
                    layer.refresh()
        self._versions = list(map(private.version, self._tensors))

    def refresh_if_changed(self) -> bool:
        """What every call does first: notice changes of the net, and follow them. Were there any?"""
        if self._watch.changed():
            self._build()
            return True
        if any(map(operator.ne, map(private.version, self._tensors), self._versions)):
            self.refresh()
            return True
        return False

    def train(self, mode: bool = True) -> FusedNet:
        """Refuses training mode with a RuntimeError."""
        if mode:
            raise RuntimeError("a deploy form cannot be trained: train the net it was made from, and call adn.fuse "
                               "again (or this one: it follows the net's weights)")
        return self

    def _apply(self, fn: Callable, recurse: bool = True) -> FusedNet:
        raise RuntimeError("a deploy form shares parameters with its net: move or cast the net, "
                           "adn.fuse(net.to(...))")

    def _build(self) -> None:
        state_of(self._adn.made_from).check_intact()
        with torch.inference_mode(False):  # what is made here is written to again by `refresh`
            source = self._adn.made_from
            segments, self._result = cut(_part(source, self.form.part))
            heads = [one_path(source.get_submodule(name)) for name in self.form.heads]
            fuse_calls([*segments, *heads])
        self.segments, self.heads = nn.ModuleList(segments), nn.ModuleList(heads)
        if self._compile_options is not None:
            self.compile(**self._compile_options)
        self._faster: dict[tuple, str] = {}
        self._mixing = mixing_norm(source)
        self._watch = Watch(source)
        # Of counters too: torch's batch norm writes its running statistics without counting a version of them.
        self._tensors = [t for t in (*source.parameters(), *source.buffers()) if not t.is_inference()]
        self._versions = list(map(private.version, self._tensors))


class _Calls(nn.Module):
    def __init__(self, run: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.__dict__["forward"] = run
        self.training = False


def _with_calls(net: nn.Module, calls: Mapping[str, Callable[[Any], Any]]) -> nn.Module:
    """The same net, in which some modules are others that call these."""
    shells = {"": _shell(net)}
    for name, call in calls.items():
        parent, at = shells[""], ""
        *owners, last = name.split(".")
        for owner in owners:
            at = f"{at}.{owner}" if at else owner
            if at not in shells:
                shells[at] = parent._modules[owner] = _shell(parent._modules[owner])
            parent = shells[at]
        parent._modules[last] = _Calls(call)
    return shells[""]


def _shell(module: nn.Module) -> nn.Module:
    """The same module, in which children may be replaced without its noticing."""
    shell = copy.copy(module)
    shell.__dict__["_modules"] = dict(module._modules)
    return shell


def _part(net: nn.Module, name: str) -> nn.Module:
    """A part of a converted net as one of its own, in which every choice is made."""
    if not name:
        return net
    state, prefix = state_of(net), f"{name}."
    part = _shell(net.get_submodule(name))
    placed = {key.removeprefix(prefix): value for key, value in state.placed.items()}
    part.__dict__["_adn"] = dataclasses.replace(
        state, plan=state.plan.renamed(lambda key: key.removeprefix(prefix)), placed=placed)
    return part
