"""A norm with what follows it as one op, for the bank that is live: what the rewritten forward of a block calls.

Each function gets the norm's module and reads everything from it at the call, so copies, loading and changes of mode
need no care. What no op can do (a shape, strides, a cumulative average) runs as the module would.
"""

from __future__ import annotations

from typing import NamedTuple

import timm.layers
import torch
import torch.distributed as dist
import torchvision
from torch import Tensor, nn

from adn_kernels import ops, private
from adn_kernels.activation import act_reference
from adn_kernels.layer_norm import MAX_CHANNELS

from ..core.behaviours import FROZEN_NORMS, Rerouted, SkipNorm, check_filled, original_class
from ..core.choice import recomputing
from ..core.trace import activation_of_module

_WITH_ACTIVATION = (timm.layers.BatchNormAct2d, timm.layers.SyncBatchNormAct, timm.layers.FrozenBatchNormAct2d)
# Exactly these: a subclass may compute something else.
_BATCH_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm, torchvision.ops.FrozenBatchNorm2d, *_WITH_ACTIVATION)
_LAYER_NORMS = (nn.LayerNorm, timm.layers.LayerNorm)
_HALVES = (torch.float16, torch.bfloat16)

# Norms that a forward has moved, each with its new running mean and variance and how often it moved.
Moved = list[tuple[nn.Module, Tensor, Tensor, int]]


def activation_in(norm: nn.Module) -> str | None:
    """The activation that a batch norm ends with, "identity" if with none; None for any other module, and for a norm
    that `batch_norm` cannot compute."""
    if original_class(norm) not in _BATCH_NORMS:
        return None
    if not isinstance(norm, _WITH_ACTIVATION):
        return "identity"
    # timm's conversion to synchronised norms adds them only where there were some.
    drop, act = getattr(norm, "drop", None), getattr(norm, "act", None)
    if drop is not None and type(drop) is not nn.Identity:
        return None
    return "identity" if act is None else activation_of_module(act)


def is_layer_norm(norm: nn.Module) -> bool:
    """Can `sum_and_layer_norm` compute it?"""
    # timm's fast norm computes in half precision under autocast.
    return (original_class(norm) in _LAYER_NORMS and len(norm.normalized_shape) == 1
            and norm.normalized_shape[0] <= MAX_CHANNELS and not getattr(norm, "_fast_norm", False))


def batch_norm(norm: nn.Module, x: Tensor, residual: Tensor | None, activation: str, moved: Moved) -> Tensor:
    """`act(norm(x) + residual)`, as one op where there is one for it.

    As with torch's batch norm, the result has the type of x, promoted with the residual: autocast changes nothing.
    That holds for frozen norms too, where torchvision's and timm's modules widen half precision to their parameters'.

    Args:
        norm: one for which `activation_in` names an activation.
        x: (N, C, H, W).
        residual: added before the activation, or None.
        activation: in `ops.ACTIVATIONS`; that of the norm itself, if it has one.
        moved: gets the norm, if its running statistics move; `write` moves them.
    """
    live = _live(norm, x)
    if live is None or not _computable(live, x):
        return _rest(_plain(norm, x), residual, "identity" if activation_in(norm) != "identity" else activation)
    rest = None
    if residual is not None and not _like(residual, x):
        rest, residual, activation = (residual, activation), None, "identity"
    first, second, groups = live
    parameters = live.of("weight"), live.of("bias")
    arguments = {"residual": residual, "activation": activation, "eps": first.eps}
    if _fixed(first):
        check_filled(first)
        y = ops.batch_norm_eval(x, *parameters, first.running_mean, first.running_var, **arguments)
    else:
        moves = first.training and first.track_running_stats
        statistics = (live.of("running_mean"), live.of("running_var")) if moves else (None, None)
        y, mean, var = ops.batch_norm(
            x, *parameters, *statistics, momentum=first.momentum or 0.0, groups=groups, bank=live.bank(x),
            process_group=_process_group(first), **arguments)
        # A recomputed forward must not move them again (`adn.core.behaviours.CountOnce`).
        if moves and not recomputing():
            if second is None:
                moved.append((first, mean, var, groups))
            else:
                moved += [(bank, mean[i], var[i], 1) for i, bank in enumerate((first, second))]
    return y if rest is None else _rest(y, *rest)


def write(moved: Moved) -> None:
    """Move running statistics and counters, of all norms in two launches."""
    if not moved:
        return
    with torch.no_grad():
        private.copy_all([old for norm, *_ in moved for old in (norm.running_mean, norm.running_var)],
                             [new for _, mean, var, _ in moved for new in (mean, var)])
        counts = [(norm.num_batches_tracked, times) for norm, *_, times in moved]
        counts = [(counter, times) for counter, times in counts if counter is not None]
        if counts:
            private.add_all(*map(list, zip(*counts)))


def sum_and_layer_norm(norm: nn.Module, a: Tensor, b: Tensor, shape: tuple | None = None) -> tuple[Tensor, Tensor]:
    """The layer norm of a + b, and the sum; as one op where there is one for it.

    Args:
        norm: one for which `is_layer_norm` holds.
        a, b: (..., D), or what can be reshaped to it.
        shape: what the sum is reshaped to before the norm, as the arguments of `reshape`.
    """
    if a.shape == b.shape:
        if shape is not None:
            a, b = a.reshape(*shape), b.reshape(*shape)
        live = _live(norm, a)
        if live is not None and _alike(live) and _summable(a, b):
            if not a.is_contiguous():
                a, b = b, a  # the sum gets the strides of the first
            return ops.layer_norm(
                a, live.of("weight"), live.of("bias"), residual=b, eps=live.first.eps, bank=live.bank(a))
        shape = None
    total = a + b
    if shape is not None:
        total = total.reshape(*shape)
    return _plain(norm, total), total


class _Live(NamedTuple):
    """What of a norm sees an input: one bank; or, in a forward that runs both nets, for each half of the input one.

    Attributes:
        first, second: the banks; no second if both halves take the first.
        groups: how many parts of the input have statistics of their own.
    """

    first: nn.Module
    second: nn.Module | None = None
    groups: int = 1

    def of(self, name: str) -> Tensor | tuple[Tensor | None, Tensor | None] | None:
        """A parameter or buffer, as the ops take it."""
        value = getattr(self.first, name)
        return value if self.second is None else (value, getattr(self.second, name))

    def bank(self, x: Tensor) -> Tensor | None:
        """Which bank each half takes, on the device of x."""
        return None if self.second is None else torch.arange(2, dtype=torch.int32, device=x.device)


def _live(norm: nn.Module, x: Tensor) -> _Live | None:
    """None if the norm has more to do than an op: to double the batch, or to move statistics twice by one batch."""
    choice = norm.__dict__.get("_adn_choice")
    if choice is None:
        return _Live(norm)
    samples, skips = choice.both(), isinstance(norm, SkipNorm)
    if not samples:
        return _Live(norm._modules["skip"] if skips and choice.now() else norm)
    if x.shape[0] != 2 * samples:
        return None
    return _Live(norm, norm._modules["skip"] if skips else None, groups=2)


def _alike(live: _Live) -> bool:
    names = ("eps", "momentum", "training")
    first, second, _ = live
    return second is None or all(getattr(first, name, None) == getattr(second, name, None) for name in names)


def _plain(norm: nn.Module, x: Tensor) -> Tensor:
    # From within its own forward, a norm that is rerouted by itself is not to be called.
    return super(Rerouted, norm).forward(x) if isinstance(norm, Rerouted) else norm(x)


def _rest(y: Tensor, residual: Tensor | None, activation: str) -> Tensor:
    return act_reference(y if residual is None else y + residual, activation)


def _fixed(norm: nn.Module) -> bool:
    """Does it normalise with its running statistics?"""
    return isinstance(norm, FROZEN_NORMS) or not (norm.training or norm.running_mean is None)


def _computable(live: _Live, x: Tensor) -> bool:
    first = live.first
    if x.ndim != 4 or not (x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)):
        return False
    if _fixed(first):
        return live.second is None
    if first.momentum is None and first.training and first.track_running_stats:
        return False  # a cumulative average: its weight is on the device
    # torch refuses to synchronise on a CPU, and says so.
    return _alike(live) and (x.is_cuda or not _synchronised(first))


def _like(residual: Tensor, x: Tensor) -> bool:
    layout = torch.contiguous_format if x.is_contiguous() else torch.channels_last
    return residual.shape == x.shape and residual.is_contiguous(memory_format=layout)


def _synchronised(norm: nn.Module) -> bool:
    return isinstance(norm, nn.SyncBatchNorm) and norm.training and dist.is_available() and dist.is_initialized()


def _process_group(norm: nn.Module) -> dist.ProcessGroup | None:
    return (norm.process_group or dist.group.WORLD) if _synchronised(norm) else None


def _summable(a: Tensor, b: Tensor) -> bool:
    if not (evenly_spaced(a) and evenly_spaced(b)):
        return False
    # Under autocast torch's layer norm makes float32 of half precision, the op does not. Where one of the two is
    # float32, as in the residual stream of an embedding that adds parameters, they agree.
    return not (a.dtype in _HALVES and b.dtype in _HALVES and torch.is_autocast_enabled(a.device.type))


def evenly_spaced(x: Tensor) -> bool:
    """Does the op of a layer norm surely take the strides of x?"""
    return x.is_contiguous() or (x.ndim == 3 and x.stride(2) == 1 and x.stride(1) > 0 and x.stride(0) > 0)
