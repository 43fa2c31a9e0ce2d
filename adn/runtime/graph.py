"""A module's forward as a graph of calls, the ground on which neighbouring calls are fused.

Traced symbolically (torch.fx), so shapes stay open. Leaves of the graph are norms and whatever holds no norm: the
code of attention, of an MLP, of squeeze-excite is not looked into.
"""

from __future__ import annotations

import dataclasses
import inspect
import operator
from collections.abc import Collection, Mapping

import timm.layers
import torch
import torch.nn.functional as F
import torchvision
from torch import fx, nn

from ..nn import is_norm, original_class

# Modules and functions by the name their activation has in `adn_kernels.ops.ACTIVATIONS`.
_ACTIVATION_MODULES: dict[type, str] = {
    nn.Identity: "identity",
    nn.ReLU: "relu",
    nn.ReLU6: "relu6",
    nn.SiLU: "silu",
    timm.layers.Swish: "silu",
    nn.GELU: "gelu",
    timm.layers.GELU: "gelu",
    nn.Hardswish: "hardswish",
    timm.layers.HardSwish: "hardswish",
}
_ACTIVATION_FUNCTIONS = {
    F.relu: "relu", torch.relu: "relu", F.relu6: "relu6", F.silu: "silu", F.gelu: "gelu", F.hardswish: "hardswish",
}
_ADDITIONS = (operator.add, operator.iadd, torch.add)
_NOTHING_IN_EVAL = (nn.Identity, nn.Dropout, nn.Dropout2d, nn.Dropout3d, timm.layers.DropPath,
                    torchvision.ops.StochasticDepth)


@dataclasses.dataclass
class Traced:
    """The forward of a module as a graph.

    Attributes:
        root: the module.
        graph: its only placeholder is the first argument of the forward.
        calls: for each module asked for, by name: (input, output), the nodes its only call takes and makes.
    """

    root: nn.Module
    graph: fx.Graph
    calls: dict[str, tuple[fx.Node, fx.Node]]


class CannotTrace(ValueError):
    """The forward of a module depends on values, or does something else that has no place in a graph."""


class _Proxy(fx.Proxy):
    """Knows of additions in place, of which torch.fx makes others: who holds the same tensor would not see them."""

    def __iadd__(self, other: object) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", operator.iadd, (self, other), {})

    def __isub__(self, other: object) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", operator.isub, (self, other), {})

    def __imul__(self, other: object) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", operator.imul, (self, other), {})

    def __itruediv__(self, other: object) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", operator.itruediv, (self, other), {})


class _Tracer(fx.Tracer):
    def __init__(self, watched: Collection[str]) -> None:
        super().__init__(autowrap_functions=tuple(timm.layers.get_notrace_functions()))
        self.watched = set(watched)
        self.calls: dict[str, tuple[fx.Node, fx.Node]] = {}

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return is_norm(module) or not any(is_norm(child) for child in module.modules())

    def call_module(self, module: nn.Module, forward, args: tuple, kwargs: dict):
        result = super().call_module(module, forward, args, kwargs)
        name = self.path_of_module(module)
        if name in self.watched:
            if name in self.calls:
                raise CannotTrace(f"{name!r} is called twice")
            if not (args and isinstance(args[0], fx.Proxy) and isinstance(result, fx.Proxy)):
                raise CannotTrace(f"{name!r} does not turn one tensor into one tensor")
            self.calls[name] = args[0].node, result.node
        return result


def trace(module: nn.Module, watched: Collection[str] = ()) -> Traced:
    """The forward of a module, of its first argument; others keep their defaults.

    What the forward asks of Python (`self.training`, whether a child is None) is answered now, once and for all.

    Args:
        watched: names of submodules whose input and output the caller wants to know.

    Raises:
        CannotTrace: it says why.
    """
    tracer = _Tracer(watched)
    own, swapped = original_class(module), type(module)
    parameters = list(inspect.signature(own.forward).parameters.values())[2:]
    # Without a default they would be placeholders, and the code would run as if they were given.
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    given = {p.name: p.default for p in parameters if p.kind not in kinds}
    required = [name for name, default in given.items() if default is inspect.Parameter.empty]
    if required:
        raise CannotTrace(f"{own.__name__} takes more than one argument: {', '.join(required)}")
    module.__class__ = own  # how it is called is not what it computes
    try:
        graph = tracer.trace(module, concrete_args=given)
    except Exception as error:
        raise CannotTrace(f"{own.__name__}: {error}") from error
    finally:
        module.__class__ = swapped
    for node in graph.find_nodes(op="placeholder")[1:]:
        # Those with a value of their own: torch.fx leaves a check of it behind.
        _erase_with_users(graph, node)
    return Traced(module, graph, tracer.calls)


def _erase_with_users(graph: fx.Graph, node: fx.Node) -> None:
    for user in list(node.users):
        _erase_with_users(graph, user)
    graph.erase_node(node)


def activation_of(node: fx.Node, modules: Mapping[str, nn.Module]) -> str | None:
    """The name in `adn_kernels.ops.ACTIVATIONS` of the activation that a node computes; None if it computes none.

    Args:
        modules: by the names that nodes call them by.
    """
    if node.op == "call_module":
        return activation_of_module(modules[node.target])
    if node.op == "call_function" and len(node.args) == 1:
        if node.target is F.gelu and node.kwargs.get("approximate", "none") != "none":
            return None
        return _ACTIVATION_FUNCTIONS.get(node.target)
    return None


def activation_of_module(module: nn.Module) -> str | None:
    """As `activation_of`, for a module."""
    if isinstance(module, nn.GELU) and module.approximate != "none":
        return None
    return _ACTIVATION_MODULES.get(original_class(module))


def addition_of(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """The two summands, where a node adds two values; else None."""
    is_add = node.op == "call_function" and node.target in _ADDITIONS
    if not is_add or len(node.args) != 2 or node.kwargs:
        return None
    a, b = node.args
    return (a, b) if isinstance(a, fx.Node) and isinstance(b, fx.Node) else None


def nothing_in_eval(module: nn.Module) -> bool:
    """Does a module return its input in evaluation mode?"""
    return isinstance(module, _NOTHING_IN_EVAL)
