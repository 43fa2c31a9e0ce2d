"""Take a static network away."""

from __future__ import annotations

import copy

from torch import nn

from ..convert import detach
from ..core.depth import Depth
from ..core.kinds import freeze
from ..core.state import DepthLike, get_depth, state_with_modules, unwrap


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

    def place(name: str) -> tuple[nn.Module, str]:
        if name in state.placed:
            return state.placed[name][:2]
        parent, _, child = name.rpartition(".")
        return model.get_submodule(parent), child

    for index, kind in state.plan.parts:
        form = kind.form(depth[index])
        freeze(form, twins, place, remove)
        for name in form.inputs:
            conv = model.get_submodule(name)
            conv.weight = nn.Parameter(conv.weight.detach().clone(), conv.weight.requires_grad)
    return model


def unwrap_blocks(model: nn.Module) -> None:
    """Blocks that torch.compile wraps would go on calling what they were compiled from."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is not None and "_orig_mod" in child._modules:
                parent._modules[name] = child._modules["_orig_mod"]
