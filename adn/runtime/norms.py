"""A norm with what follows it as one op, for the bank that is live: what the rewritten forward of a block calls.

Each function gets the norm's module and reads everything from it at the call, so copies, loading and changes of mode
need no care. What no op can do (a shape, strides, a cumulative average) runs as the module would.
"""

from __future__ import annotations

import timm.layers
import torch
import torch.distributed as dist
import torchvision
from torch import Tensor, nn

from adn_kernels import ops
from adn_kernels.activation import act_reference
from adn_kernels.layer_norm import MAX_CHANNELS

from ..nn import FROZEN_NORMS, Rerouted, SkipNorm, original_class
from ..switch import recomputing
from .graph import activation_of_module

_WITH_ACTIVATION = (timm.layers.BatchNormAct2d, timm.layers.SyncBatchNormAct, timm.layers.FrozenBatchNormAct2d)
# Exactly these: a subclass may compute something else.
_BATCH_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm, torchvision.ops.FrozenBatchNorm2d, *_WITH_ACTIVATION)
_LAYER_NORMS = (nn.LayerNorm, timm.layers.LayerNorm)
_HALVES = (torch.float16, torch.bfloat16)

# Norms that a forward has moved, each with its new running mean and variance.
Moved = list[tuple[nn.Module, Tensor, Tensor]]


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
    live = _live(norm)
    if live is None or not _computable(live, x):
        return _rest(_plain(norm, x), residual, "identity" if activation_in(norm) != "identity" else activation)
    rest = None
    if residual is not None and not _like(residual, x):
        rest, residual, activation = (residual, activation), None, "identity"
    arguments = {"residual": residual, "activation": activation, "eps": live.eps}
    if _fixed(live):
        y = ops.batch_norm_eval(x, live.weight, live.bias, live.running_mean, live.running_var, **arguments)
    else:
        moves = live.training and live.track_running_stats
        y, mean, var = ops.batch_norm(
            x, live.weight, live.bias, live.running_mean if moves else None, live.running_var if moves else None,
            momentum=live.momentum or 0.0, process_group=_process_group(live), **arguments)
        # A recomputed forward must not move them again (`adn.nn.CountOnce`).
        if moves and not recomputing():
            moved.append((live, mean, var))
    return y if rest is None else _rest(y, *rest)


def write(moved: Moved) -> None:
    """Move running statistics and counters, of all norms in two launches."""
    if not moved:
        return
    with torch.no_grad():
        torch._foreach_copy_([old for norm, _, _ in moved for old in (norm.running_mean, norm.running_var)],
                             [new for _, mean, var in moved for new in (mean, var)])
        counters = [norm.num_batches_tracked for norm, _, _ in moved if norm.num_batches_tracked is not None]
        if counters:
            torch._foreach_add_(counters, 1)


def sum_and_layer_norm(norm: nn.Module, a: Tensor, b: Tensor, shape: tuple | None = None) -> tuple[Tensor, Tensor]:
    """The layer norm of a + b, and the sum; as one op where there is one for it.

    Args:
        norm: one for which `is_layer_norm` holds.
        a, b: (..., D), or what can be reshaped to it.
        shape: what the sum is reshaped to before the norm, as the arguments of `reshape`.
    """
    live = _live(norm)
    if a.shape == b.shape:
        if shape is not None:
            a, b = a.reshape(*shape), b.reshape(*shape)
        if live is not None and _summable(a, b):
            if not a.is_contiguous():
                a, b = b, a  # the sum gets the strides of the first
            return ops.layer_norm(a, live.weight, live.bias, residual=b, eps=live.eps)
        shape = None
    total = a + b
    if shape is not None:
        total = total.reshape(*shape)
    return _plain(norm, total), total


def _live(norm: nn.Module) -> nn.Module | None:
    """The bank that sees the input, None if there is not one only."""
    switch = norm.__dict__.get("_adn_switch")
    skip = False if switch is None else switch.bypassed()
    if skip is True:
        return norm._modules["skip"] if isinstance(norm, SkipNorm) else norm
    return norm if skip is False else None


def _plain(norm: nn.Module, x: Tensor) -> Tensor:
    # From within its own forward, a norm that is rerouted by itself is not to be called.
    return super(Rerouted, norm).forward(x) if isinstance(norm, Rerouted) else norm(x)


def _rest(y: Tensor, residual: Tensor | None, activation: str) -> Tensor:
    return act_reference(y if residual is None else y + residual, activation)


def _fixed(norm: nn.Module) -> bool:
    """Does it normalise with its running statistics?"""
    return isinstance(norm, FROZEN_NORMS) or not (norm.training or norm.running_mean is None)


def _computable(norm: nn.Module, x: Tensor) -> bool:
    if x.ndim != 4 or not (x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)):
        return False
    if _fixed(norm):
        return True
    if norm.momentum is None and norm.training and norm.track_running_stats:
        return False  # a cumulative average: its weight is on the device
    # torch refuses to synchronise on a CPU, and says so.
    return x.is_cuda or not _synchronised(norm)


def _like(residual: Tensor, x: Tensor) -> bool:
    layout = torch.contiguous_format if x.is_contiguous() else torch.channels_last
    return residual.shape == x.shape and residual.is_contiguous(memory_format=layout)


def _synchronised(norm: nn.Module) -> bool:
    return isinstance(norm, nn.SyncBatchNorm) and norm.training and dist.is_available() and dist.is_initialized()


def _process_group(norm: nn.Module) -> dist.ProcessGroup | None:
    return (norm.process_group or dist.group.WORLD) if _synchronised(norm) else None


def _summable(a: Tensor, b: Tensor) -> bool:
    if not (_evenly_spaced(a) and _evenly_spaced(b)):
        return False
    # Under autocast torch's layer norm makes float32 of half precision, the op does not. Where one of the two is
    # float32, as in the residual stream of an embedding that adds parameters, they agree.
    return not (a.dtype in _HALVES and b.dtype in _HALVES and torch.is_autocast_enabled(a.device.type))


def _evenly_spaced(x: Tensor) -> bool:
    return x.is_contiguous() or (x.ndim == 3 and x.stride(2) == 1 and x.stride(1) > 0 and x.stride(0) > 0)
