"""Take a static network away."""

from __future__ import annotations

import copy

from torch import nn

from .convert import detach
from .depth import Depth
from .state import DepthLike, get_depth, state_of, unwrap


def extract(net: nn.Module, depth: DepthLike | None = None) -> nn.Module:
    """A plain module that computes what the net computes at one depth, with no trace of this library in it.

    A copy: the net is not changed. Bypassed blocks become `nn.Identity`, so that the names and positions of all
    others stay; norms hold the parameters of the set in use, under the source model's names.

    Args:
        net: a converted net.
        depth: which depth; None = the one that is set.

    Raises:
        ValueError: on a depth this net does not have.
    """
    inner, state = unwrap(net), state_of(net)
    depth = get_depth(net) if depth is None else Depth.parse(depth, (state.full, state.base))
    model = copy.deepcopy(inner)
    state, twins = detach(model)
    for stage, bypassed in zip(state.plan.flagged, depth, strict=True):
        if bypassed:
            for name in stage.norms:
                _put(model, name, twins[name])
            for name in (*stage.drop_paths, *stage.refinement_blocks):
                _put(model, name, nn.Identity())
    return model


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    module.train(model.get_submodule(name).training)
    model.get_submodule(parent)._modules[child] = module
