"""Whatever both packages use of PyTorch that is not public, or that differs between the versions supported.

Nothing else in `adn` and `adn_kernels` names a private function of torch. Each is listed with what it is taken to do;
`tests/test_private.py` has a test of every such assumption, with the reason in its message, so that a new version of
torch fails there first:

    python tests/versions.py --torch newest -- tests/test_private.py

Fields of `nn.Module` that wrappers and tools have always read (`_modules`, `_buffers`, `_forward_hooks`) are not here.

| differs | versions | what is done |
|---|---|---|
| oneDNN cannot tell the layout of a residual of one pixel | torch 2.11 | `conv_pointwise` adds it by itself |
| annotations of a traced graph cannot be pickled | torch 2.11 | `forget_annotations` |
| a failed capture leaves its stream current | torch 2.11 | `runtime/cuda_graphs.py`: a context around it |
| the workspace of cuBLAS goes with the first graph | torch 2.12 or later | the same: a stream that only captures |
| fused steps of SGD with a gradient scaler give NaN | seen in 2.15, CPU | `train/optim.py`: not fused under fp16 |
| `range` takes no argument of a kernel in the interpreter | triton 3.6 | `tests/kernels/harness.py` |
"""

from __future__ import annotations

import operator
import sys
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._prims_common import suggest_memory_format
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import CheckpointFunction

__all__ = ["pytree", "suggest_memory_format"]

# ---------------------------------------------------------------------------------------------------------- autograd

# The backward that this thread is in, -1 outside of any.
graph_task: Callable[[], int] = torch._C._current_graph_task_id
# The node it is at, or None; its `_sequence_nr()` is the number below as it was when the node was made.
autograd_node: Callable[[], Any] = torch._C._current_autograd_node
# Counts the nodes that this thread makes.
next_sequence_number: Callable[[], int] = torch._C._autograd._get_sequence_nr

_BACKWARD = torch.autograd.backward.__code__
_REENTRANT_BACKWARD = CheckpointFunction.backward.__code__


def in_reentrant_checkpoint() -> bool:
    """Is a backward running that the backward of a reentrant checkpoint (`use_reentrant=True`) started?"""
    frame = sys._getframe(1)
    while frame is not None:
        caller = frame.f_back
        if frame.f_code is _BACKWARD and caller is not None and caller.f_code is _REENTRANT_BACKWARD:
            return True
        frame = caller
    return False


# How often a tensor was written to in place, by operators that count it; those made in inference mode do not, and raise
# RuntimeError. Asked of all tensors of a net at every call of its deploy form, so without a call in Python.
version = operator.attrgetter("_version")


def is_alias(a: Tensor, b: Tensor) -> bool:
    """Whether both are views of one storage; also of fake tensors."""
    return torch._C._is_alias_of(a, b)


# -------------------------------------------------------------------------------------------------------- many at once


def copy_all(to: list[Tensor], source: list[Tensor]) -> None:
    """`a.copy_(b)` for all, in few launches."""
    torch._foreach_copy_(to, source)


def add_all(to: list[Tensor], numbers: list[float]) -> None:
    """`a.add_(n)` for all, in few launches."""
    torch._foreach_add_(to, numbers)


def lerp_all(to: list[Tensor], source: list[Tensor], weight: float) -> None:
    """`a.lerp_(b, weight)` for all, in few launches."""
    torch._foreach_lerp_(to, source, weight=weight)


# ------------------------------------------------------------------------------------------------------ torch.compile
# Dynamo is imported when first asked for.


def constant(function: Callable) -> Callable:
    """As `torch.compiler.assume_constant_result`, without importing the compiler: Dynamo asks once, while it traces."""
    function._dynamo_marked_constant = True
    return function


def not_traced(function: Callable) -> Callable:
    """Dynamo traces neither this function nor what it calls, but may compile what that calls when it runs."""
    from torch._dynamo.decorators import skip

    return skip(function)


def unseen(function: types.FunctionType) -> types.FunctionType:
    """Dynamo does not compile this function where it is called from Python; called by what it traces, it traces it."""
    from torch._dynamo.eval_frame import skip_code

    skip_code(function.__code__)
    return function


def is_wrapped(net: object) -> bool:
    """Is it what `torch.compile(net)` returns? That holds the net as `_orig_mod`."""
    return isinstance(net, torch._dynamo.OptimizedModule)


def compile_in_place(net: nn.Module, around: Callable[[Callable], Callable] | None = None, **options: Any) -> None:
    """As `nn.Module.compile`.

    Args:
        around: what it returns for the compiled call is called in its place.
        options: of `torch.compile`.
    """
    call = torch.compile(net._call_impl, **options)
    net._compiled_call_impl = call if around is None else around(call)


def forget_compiled(net: nn.Module) -> None:
    """Undo `compile_in_place`."""
    net._compiled_call_impl = None


def recompile_limit() -> int:
    """How often torch.compile compiles one piece of code; then it runs it uncompiled."""
    return torch._dynamo.config.recompile_limit


def cpp_compiler_fault() -> Exception | None:
    """Why Inductor cannot compile for the CPU, None if it can."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        return error
    return None


def graph_breaks() -> int:
    """How many there have been in this process."""
    from torch._dynamo import utils

    return utils.counters["graph_break"].total()


def compilations(run: Callable[[], object]) -> list[Any]:
    """What Dynamo records of each compilation that it tries meanwhile: `co_name`, `co_filename`, `fail_type`."""
    from torch._dynamo import utils

    limit = utils._compilation_metrics.maxlen
    before = len(utils.get_compilation_metrics())
    utils.set_compilation_metrics_limit(before + 100_000)
    try:
        run()
        # Backwards are recorded too, without a function.
        return [m for m in utils.get_compilation_metrics()[before:] if m.co_name is not None]
    finally:
        utils.set_compilation_metrics_limit(limit)


def forget_annotations(node: fx.Node) -> None:
    """Of a node of a traced graph: as text (`from __future__ import annotations`) torch 2.11 cannot pickle them."""
    node.type = None


# ------------------------------------------------------------------------------------------------------------- oneDNN

_ATTRIBUTES: dict[str, tuple[str, list, str]] = {  # of an activation: name, scalars, algorithm
    "identity": ("none", [], ""),
    "relu": ("relu", [], ""),
    "relu6": ("hardtanh", [0.0, 6.0], ""),
    "silu": ("swish", [], ""),
    "gelu": ("gelu", [], "none"),
    "hardswish": ("hardswish", [], ""),
}
_AFTER_ADDITION = ("identity", "relu")  # what it applies after it has added something


def pack_weight(
    weight: Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int,
    input_shape: Sequence[int],
) -> Tensor | bool:
    """In the layout that oneDNN wants for such an input; without it every call would bring the weight into it. False
    where there is no oneDNN."""
    if not torch.backends.mkldnn.is_available():
        return False
    return torch.ops.mkldnn._reorder_convolution_weight(weight, padding, stride, dilation, groups, list(input_shape))


def conv_pointwise(
    x: Tensor, packed: Tensor, bias: Tensor | None, place: tuple, residual: Tensor | None, activation: str
) -> tuple[Tensor, str]:
    """Convolution, + residual, activation, of float32 on a CPU.

    Args:
        packed: of `pack_weight`.
        place: stride, padding, dilation, groups.
        residual: of the shape of the result, or None.
        activation: one of `adn_kernels.activation.ACTIVATIONS` that oneDNN has.

    Returns:
        the result, and what of the activation is left to do: itself, or "identity".
    """
    stride, padding, dilation, groups = place
    args = packed, bias, padding, stride, dilation, groups
    if residual is None:
        return torch.ops.mkldnn._convolution_pointwise(x, *args, *_ATTRIBUTES[activation]), "identity"
    if residual.shape[2:].numel() == 1:  # see above
        return torch.ops.mkldnn._convolution_pointwise(x, *args, *_ATTRIBUTES["identity"]).add_(residual), activation
    inside = activation if activation in _AFTER_ADDITION else "identity"
    y = torch.ops.mkldnn._convolution_pointwise.binary(
        x, residual, *args, "add", None, None if inside == "identity" else inside, [], "")
    return y, "identity" if inside == activation else activation
