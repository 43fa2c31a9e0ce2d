"""A module's forward as a graph of calls, the ground on which neighbouring calls are fused.

Traced symbolically (torch.fx), so shapes stay open. Leaves of the graph are norms and whatever holds no norm: the
code of attention, of an MLP, of squeeze-excite is not looked into.
"""

from __future__ import annotations

import dataclasses
import inspect
import operator
from collections.abc import Collection, Iterator, Mapping

import timm.layers
import torch
import torch.nn.functional as F
import torchvision
from torch import fx, nn

from .behaviours import is_norm, original_class

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
# From lists to lists, which a leaf of a graph does not give.
_MANY_TO_MANY = (torchvision.ops.feature_pyramid_network.ExtraFPNBlock,)


_IN_PLACE = {
    operator.iadd: operator.add, operator.isub: operator.sub, operator.imul: operator.mul,
    operator.itruediv: operator.truediv, F.relu_: F.relu, torch.relu_: torch.relu,
}
# Methods and functions whose result may be a view of their first argument.
_VIEWS = frozenset((
    "chunk", "contiguous", "detach", "expand", "expand_as", "flatten", "movedim", "narrow", "permute", "reshape",
    "select", "split", "squeeze", "swapaxes", "t", "to", "transpose", "unbind", "unflatten", "unsqueeze", "view",
    "view_as",
))


@dataclasses.dataclass
class Traced:
    """The forward of a module as a graph.

    Attributes:
        root: the module.
        graph: its placeholders are the arguments of the forward that were asked for.
        calls: for each module asked for, by name: (input, output), the nodes its only call takes and makes.
    """

    root: nn.Module
    graph: fx.Graph
    calls: dict[str, tuple[fx.Node, fx.Node]]


class CannotTrace(ValueError):
    """The forward of a module depends on values, or does something else that has no place in a graph."""


class _Proxy(fx.Proxy):
    """Knows of additions in place, of which torch.fx makes others: who holds the same tensor would not see them. And of
    what it is made of."""

    @property
    def parts(self) -> int | None:
        """How many tensors it is made of, where the call says so: torch.fx would look into the bytecode only, and so
        not allow `list(x.chunk(2, 1))`."""
        name = self.node.target if isinstance(self.node.target, str) else getattr(self.node.target, "__name__", "")
        arguments = {**self.node.kwargs, **dict(zip((None, "parts"), self.node.args))}
        parts = next((arguments[key] for key in ("parts", "chunks", "split_size") if key in arguments), None)
        if name == "chunk" and isinstance(parts, int):
            return parts
        return len(parts) if name.startswith("split") and isinstance(parts, list | tuple) else None

    def __len__(self) -> int:
        return super().__len__() if self.parts is None else self.parts

    def __iadd__(self, other: object) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", operator.iadd, (self, other), {})

    def __isub__(self, other: object) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", operator.isub, (self, other), {})

    def __imul__(self, other: object) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", operator.imul, (self, other), {})

    def __itruediv__(self, other: object) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", operator.itruediv, (self, other), {})


class _Tracer(fx.Tracer):
    def __init__(self, watched: Collection[str], leaves: Collection[str], method: str, sequences: bool) -> None:
        super().__init__(autowrap_functions=tuple(timm.layers.get_notrace_functions()))
        self.traced_func_name = method
        self.watched = set(watched)
        self.leaves = set(leaves)
        self.sequences = sequences
        self.calls: dict[str, tuple[fx.Node, fx.Node]] = {}

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def iter(self, obj: fx.Proxy) -> Iterator[fx.Proxy]:
        return super().iter(obj) if obj.parts is None else (obj[i] for i in range(obj.parts))

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        if name in self.leaves or is_norm(module):
            return True
        looked_into = any(is_norm(child) for child in module.modules()) or isinstance(module, _MANY_TO_MANY)
        if self.sequences and original_class(module).forward is nn.Sequential.forward and not hooked(module):
            looked_into = True
        return not (looked_into or any(watched.startswith(f"{name}.") for watched in self.watched))

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


def trace(module: nn.Module, watched: Collection[str] = (), leaves: Collection[str] = (), method: str = "forward",
          arguments: int = 1, sequences: bool = False) -> Traced:
    """The forward of a module, of its first arguments; others keep their defaults.

    What the forward asks of Python (`self.training`, whether a child is None) is answered now, once and for all.

    Args:
        watched: names of submodules whose input and output the caller wants to know.
        leaves: names of further submodules that are not looked into.
        method: what to trace in place of the forward.
        arguments: how many.
        sequences: look into `nn.Sequential` even where it holds no norm.

    Raises:
        CannotTrace: it says why.
    """
    tracer = _Tracer(watched, leaves, method, sequences)
    own, swapped = original_class(module), type(module)
    parameters = list(inspect.signature(getattr(own, method)).parameters.values())[1 + arguments :]
    # Without a default they would be placeholders, and the code would run as if they were given.
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    given = {p.name: p.default for p in parameters if p.kind not in kinds}
    required = [name for name, default in given.items() if default is inspect.Parameter.empty]
    if required:
        raise CannotTrace(f"{own.__name__} takes more than {arguments} argument{'s' * (arguments > 1)}: "
                          f"{', '.join(required)}")
    module.__class__ = own  # how it is called is not what it computes
    try:
        graph = tracer.trace(module, concrete_args=given)
    except Exception as error:  # the model's own code, which may raise anything at a value it does not expect
        why = str(error)
        if own.__module__.startswith("transformers."):
            why = f"code of transformers, which cannot be traced ({error}); adn.compile(net) runs it fast"
        raise CannotTrace(f"{own.__name__}: {why}") from error
    finally:
        module.__class__ = swapped
    for node in graph.find_nodes(op="placeholder")[arguments:]:
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
    """As `activation_of`, for a module; None too if there are hooks on it."""
    if hooked(module):
        return None
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
    """Does a module return its input in evaluation mode? (A subclass may do more, and so may a hook.)"""
    return original_class(module) in _NOTHING_IN_EVAL and not hooked(module)


def hooked(module: nn.Module) -> bool:
    """Does calling a module do more, or something else, than the forward of its class?"""
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__)


def without_writes(traced: Traced) -> None:
    """Replace calls that write into what they are given by those that make a tensor of their own.

    Order then matters no more: a call may be moved behind another that read the same tensor. Modules of the root are
    changed too (`inplace`).

    Raises:
        CannotTrace: if what was written is read later by another name.
    """
    position = {node: i for i, node in enumerate(traced.graph.nodes)}
    root = {}  # of each value that may be a view of another, that other
    for node in position:
        if _may_be_view(node, traced):
            root[node] = node.args[0]
    for node in position:
        written = _written(node, traced)
        if written is not None:
            _check_not_read_later(node, written, position, root)
    for node in position:
        if _written(node, traced) is not None:
            _make_new(node)
    for module in traced.root.modules():
        if getattr(module, "inplace", False) is True:
            module.inplace = False


def _written(node: fx.Node, traced: Traced) -> fx.Node | None:
    """The value that a node writes into."""
    if not node.args or not isinstance(node.args[0], fx.Node):
        return None
    if "out" in node.kwargs:
        raise CannotTrace(f"{node.name} writes into a tensor given as `out`")
    if node.op == "call_module":
        writes = getattr(traced.root.get_submodule(node.target), "inplace", False) is True
    elif node.op == "call_method":
        writes = node.target.endswith("_") and not node.target.startswith("_")
    else:
        writes = node.op == "call_function" and (
            node.target in _IN_PLACE or node.kwargs.get("inplace", False) is True
            or (node.target in _ACTIVATION_FUNCTIONS and len(node.args) > 1 and node.args[-1] is True))
    return node.args[0] if writes else None


def _make_new(node: fx.Node) -> None:
    if node.op == "call_method":
        node.target = node.target.removesuffix("_")
    elif node.op == "call_function":
        node.target = _IN_PLACE.get(node.target, node.target)
        node.kwargs = {key: value for key, value in node.kwargs.items() if key != "inplace"}
        if node.target in _ACTIVATION_FUNCTIONS and node.args[-1] is True:
            node.args = node.args[:-1]


def _may_be_view(node: fx.Node, traced: Traced) -> bool:
    if not node.args or not isinstance(node.args[0], fx.Node):
        return False
    if node.op == "call_method":
        return node.target in _VIEWS or node.target.endswith("_")
    if node.op == "call_function":
        return node.target is operator.getitem or getattr(node.target, "__name__", "") in _VIEWS or (
            _written(node, traced) is not None)
    if node.op != "call_module":
        return False
    module = traced.root.get_submodule(node.target)
    return nothing_in_eval(module) or isinstance(module, (nn.Flatten, nn.Unflatten, torchvision.ops.Permute)) or (
        getattr(module, "inplace", False) is True)


def _check_not_read_later(node: fx.Node, written: fx.Node, position: Mapping[fx.Node, int],
                          root: Mapping[fx.Node, fx.Node]) -> None:
    def names_of(value: fx.Node) -> list[fx.Node]:
        chain = [value]
        while chain[-1] in root:
            chain.append(root[chain[-1]])
        return chain

    memory = names_of(written)[-1]
    for value in position:
        chain = names_of(value)
        if chain[-1] is memory and node not in chain and any(position[user] > position[node] for user in value.users):
            raise CannotTrace(f"{node.name} writes in place into a tensor that is read again after it; write "
                              "x = x + y instead of x += y there, or inplace=False")
