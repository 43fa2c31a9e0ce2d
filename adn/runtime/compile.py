"""Compiled nets: every path of every stage a region of its own, so that no depth is a reason to compile again.

Two ways, one mechanism (`adn.core.regions`): `compile` here, in place and loud, and plain `torch.compile(net)`. Without
it, where the compiler traces the flags themselves, each combination of them is a variant of one piece of code, of which
torch.compile keeps 8: of 16 depths 8 run uncompiled, with a warning once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from adn_kernels import private
from adn_kernels.private import pytree

from ..core import regions, taps
from ..core.behaviours import mixing_norm
from ..core.state import state_of, unwrap
from .fuse import FusedNet


def compile(
    net: nn.Module, *, batch_sizes: Sequence[int] | None = None, fullgraph: bool = True, **options: Any
) -> nn.Module:
    """Compile a converted net in place, so that every depth runs compiled code and a change of depth compiles nothing.

    Each stage becomes two regions, its full path and its base path, compiled when first run; what lies between stages
    is compiled too. Depth functions, `state_dict`, saving and wrapping in DDP work as before; compiling does not
    survive `copy.deepcopy` or pickling (as with `nn.Module.compile`): the copy is the plain any-depth net. Training
    and evaluation, with and without gradients, are compiled separately, each on first use.

    A second batch size compiles once more, for any size from then on (except 1, which is compiled by itself).
    `batch_sizes` does without that: only these sizes are compiled, and in evaluation without gradients every batch is
    padded to the next of them, or cut by the largest. In training each size is compiled as it comes: samples of a
    batch share statistics, so nothing is padded.

    Code of the model's own that calls blocks in a loop runs uncompiled, since Dynamo leaves such code alone; the blocks
    are compiled one by one. Hooks count if they are there before the first run. What has to see the net as one graph
    (`torch.compile(fullgraph=True)` of a caller, torch.jit.trace, torch.fx, strict torch.export) wants
    `adn.extract(net, depth)`. With a model's gradient checkpointing set, its forward calls blocks itself and reads
    their flags: right, but for few depths only, and each backward has to come before the next forward.

    Args:
        net: a converted net, or DDP around one; or a deploy form.
        batch_sizes: the sizes to compile for evaluation; None = those that come.
        fullgraph: a block that cannot be compiled whole is an error at its first call; False lets parts of it run
            uncompiled.
        options: of `torch.compile`: backend, mode, dynamic, options.

    Returns:
        The same object.

    Raises:
        ValueError: if the net is wrapped by `torch.compile`, or if samples of a batch influence each other in
            evaluation and `batch_sizes` are given, or they are for a deploy form.
        RuntimeError: if the default backend would need a C++ compiler (for a net on the CPU) and there is none.
    """
    if private.is_wrapped(net):
        raise ValueError("this net is wrapped by torch.compile already; pass the net that adn.convert returned")
    inner = unwrap(net)
    if options.get("backend", "inductor") == "inductor":
        _check_toolchain(inner)
    if isinstance(inner, FusedNet):
        if batch_sizes is not None:
            raise ValueError("a deploy form is compiled for the sizes that come: leave batch_sizes out, or give them "
                             "to adn.Engine")
        inner.compile(fullgraph=fullgraph, **options)
        return net
    compiler = partial(torch.compile, fullgraph=fullgraph, **options)
    if batch_sizes is not None:
        _check_sizes(inner, batch_sizes)
        compiler = partial(_compile_for_sizes, compiler)
    regions.compile_regions(inner, compiler)
    around = None if batch_sizes is None else lambda call: partial(_in_sizes, inner, call, sorted(batch_sizes))
    private.compile_in_place(inner, around, **options)
    return net


def _check_toolchain(net: nn.Module) -> None:
    if any(p.device.type == "cpu" for p in net.parameters()) and (fault := private.cpp_compiler_fault()) is not None:
        raise RuntimeError(
            "compiling for the CPU needs a C++ compiler, and none was found: install one (apt-get install g++), or "
            'name it in the environment variable CXX; backend="eager" runs every region as it is'
        ) from fault


def _check_sizes(net: nn.Module, sizes: Sequence[int]) -> None:
    if not sizes or any(type(size) is not int or size < 1 for size in sizes):
        raise ValueError(f"batch_sizes={sizes!r}; pass whole numbers above 0")
    limit = private.recompile_limit() // 2
    if len(set(sizes)) > limit:
        raise ValueError(f"{len(set(sizes))} batch sizes; torch.compile keeps {private.recompile_limit()} "
                         f"variants of a region, training included: pass at most {limit}")
    if (norm := mixing_norm(net)) is not None:
        raise ValueError(f"norm {norm!r} has no running statistics, so a padded batch would change its results; "
                         "compile without batch_sizes")


def _compile_for_sizes(compiler: regions.Compiler, function: Callable) -> Callable:
    """A region of evaluation, laid when it first runs, for a few sizes; one of training for all that come."""
    return compiler(function) if torch.is_grad_enabled() else compiler(function, dynamic=False)


def _in_sizes(net: nn.Module, call: Callable, sizes: Sequence[int], *args: Any, **kwargs: Any) -> Any:
    """The forward in batches of these sizes."""
    if net.training or torch.is_grad_enabled() or kwargs or len(args) != 1 or not torch.is_tensor(args[0]):
        return call(*args, **kwargs)
    # Who runs both nets in one forward, or waits for outputs of stages, counts samples.
    if taps.listeners or state_of(net).shared.one_forward is not None:
        return call(*args)
    parts = [_padded(call, sizes, part) for part in args[0].split(sizes[-1])]
    return parts[0] if len(parts) == 1 else pytree.tree_map(lambda *tensors: torch.cat(tensors), *parts)


def _padded(call: Callable, sizes: Sequence[int], x: torch.Tensor) -> Any:
    samples = len(x)
    size = next(size for size in sizes if size >= samples)
    # Not by concatenation: that would lose the memory format.
    outputs = call(F.pad(x, (0, 0) * (x.ndim - 1) + (0, size - samples)) if size > samples else x)
    return pytree.tree_map(lambda output: output[:samples], outputs)
