"""Take a static network away."""

from __future__ import annotations

import copy

from torch import nn

from ..convert import detach
from ..core.depth import Depth
from ..core.state import DepthLike, State, get_depth, state_with_modules, unwrap


def extract(net: nn.Module, depth: DepthLike | None = None, *, remove: bool = False) -> nn.Module:
    """A plain module that computes what the net computes at one depth, with no trace of this library in it.

    A copy: the net is not changed. Bypassed blocks become `nn.Identity`, so that the names and positions of all
    others stay; norms hold the parameters of the set in use, under the source model's names. Stacks of layers are cut.

    Args:
        net: a converted net.
        depth: which depth; None = the one that is set.
        remove: take bypassed blocks out of their containers instead. For a net that hands its blocks more than
            their input (an attention mask), which `nn.Identity` does not accept, and for torch.jit.script; the
            positions of later blocks, which features are picked by, then move up. Names stay either way.

    Raises:
        ValueError: on a depth this net does not have, or `remove` of a block that is not in an `nn.Sequential`.
        RuntimeError: if other code has replaced modules that follow the depth.
    """
    inner, state = unwrap(net), state_with_modules(net)
    depth = get_depth(net) if depth is None else Depth.parse(depth, (state.full, state.base))
    model = copy.deepcopy(inner)
    unwrap_blocks(model)
    state, twins = detach(model)
    entries = list(depth)
    for group in state.plan.flags:
        if not entries.pop(0):
            continue
        for stage in group:
            for name in stage.norms:
                _put(state, name, twins[name])
            for name in stage.drop_paths:
                _put(state, name, nn.Identity())
            for name in stage.refinement_blocks:
                _bypass(state, name, remove)
    for stack, layers in zip(state.plan.stacks, entries, strict=True):
        for name in stack.lists:
            del model.get_submodule(name)[layers:]
    return model


def unwrap_blocks(model: nn.Module) -> None:
    """Blocks that torch.compile wraps would go on calling what they were compiled from."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is not None and "_orig_mod" in child._modules:
                parent._modules[name] = child._modules["_orig_mod"]


def _bypass(state: State, name: str, remove: bool) -> None:
    parent, child, _ = state.placed[name]
    if not remove:
        _put(state, name, nn.Identity())
    elif isinstance(parent, nn.Sequential):
        del parent._modules[child]
    else:
        raise ValueError(f"{name!r} is in a {type(parent).__name__}, not in an nn.Sequential, and may be called by "
                         "name: it cannot be removed")


def _put(state: State, name: str, module: nn.Module) -> None:
    parent, child, former = state.placed[name]
    module.train(former.training)
    parent._modules[child] = module
