"""What a depth of a net costs on paper: multiply-adds, and parameters in use."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ..core.depth import Depth
from ..core.state import DepthLike, set_depth, state_of, unwrap
from ..models.registry import source_of
from .passes import Images, evaluating, try_forward


def count_macs(net: nn.Module, x: Images, depths: Iterable[DepthLike], *, norms: bool = False) -> list[int]:
    """Multiply-adds of a forward of `x` at each depth: torch's FLOP counter, which counts two per multiply-add, halved.

    Args:
        norms: count by the rule of fvcore, which published numbers of detectors follow: for each element also 2 in a
            batch norm (frozen ones: none), 5 in a layer norm, 4 in a sampled value, 1 in an up-sampled map.

    Raises:
        ValueError: if the net cannot take `x`.
    """
    net = source_of(net)
    counts = []
    with evaluating(net):
        for depth in depths:
            set_depth(net, depth)
            counts.append(macs_of(lambda: try_forward(net, x), norms=norms))
    return counts


def macs_of(call: Callable[[], object], *, norms: bool = False) -> int:
    """Multiply-adds of a call, without gradients; see `count_macs`."""
    # A counter is a dispatch mode, in which compiled code does not run.
    with torch.inference_mode(), _visible_attention(), torch.compiler.set_stance("force_eager"), \
            FlopCounterMode(display=False, custom_mapping=_per_element() if norms else None) as counter:
        call()
    return counter.get_total_flops() // 2


def _per_element() -> dict[Any, Callable[..., int]]:
    """FLOPs, two for what `count_macs` counts, by the op."""
    def of_output(factor: int) -> Callable[..., int]:
        return lambda *args, out_shape, **kwargs: 2 * factor * math.prod(out_shape)

    def of_samples(value: torch.Size, shapes: Sequence, locations: torch.Size, *args: Any, **kwargs: Any) -> int:
        return 2 * 4 * math.prod(locations[:-1]) * value[-1]

    rules = {torch.ops.aten.batch_norm: of_output(2), torch.ops.aten.layer_norm: of_output(5),
             torch.ops.aten.grid_sampler: of_output(4), torch.ops.aten.upsample_nearest2d: of_output(1)}
    if hasattr(torch.ops.adn, "deformable_attention"):  # known once kernels are imported
        rules[torch.ops.adn.deformable_attention] = of_samples
    # Of overloads too, or older counters take them apart before they look.
    return rules | {getattr(op, name): rule for op, rule in rules.items() for name in op.overloads()}


def count_parameters(net: nn.Module, depth: DepthLike) -> int:
    """How many parameters a net uses at one depth: no bypassed block, one set of each skip-aware norm, of a convolution
    that reads its first channels only the part of the kernel that meets them."""
    net = source_of(net)  # folded layers of a deploy form are none that a counter knows
    share = _shares(net, depth)
    parameters = net.named_parameters(remove_duplicate=False)
    return round(sum({id(p): share(name) * p.numel() for name, p in parameters if share(name)}.values()))


def in_use(net: nn.Module, depth: DepthLike) -> Callable[[str], bool]:
    """For names of parameters and buffers of a net: is it used at this depth?"""
    share = _shares(net, depth)
    return lambda name: share(name) > 0


def _shares(net: nn.Module, depth: DepthLike) -> Callable[[str], float]:
    """For names of parameters and buffers of a net: how much of it is used at this depth?"""
    state = state_of(net)
    depth = Depth.parse(depth, (state.full, state.base))
    shares = {"": 1.0}  # by the name of a module or tensor; the longest that fits counts
    for index, kind in state.plan.parts:
        form = kind.form(depth[index])
        shares |= {f"{name}.skip": 0.0 for name in kind.seconds}
        for name in form.seconds:
            shares |= {name: 0.0, f"{name}.skip": 1.0}
        shares |= dict.fromkeys(form.bypassed, 0.0)
        for name, count in form.lists.items():
            children = unwrap(net).get_submodule(name)._modules
            shares |= {f"{name}.{child}": 0.0 for child in list(children)[count:]}
        for name, inputs in form.inputs.items():
            shares[f"{name}.weight"] = inputs / unwrap(net).get_submodule(name).in_channels

    def share(name: str) -> float:
        while name not in shares:
            name = name.rpartition(".")[0]
        return shares[name]

    return share


@contextlib.contextmanager
def _visible_attention() -> Iterator[None]:
    """Attention as matrix products, which the FLOP counter sees: nn.MultiheadAttention's fused path in evaluation mode
    is one operator to it and would count as nothing."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
