"""Norm, activation and residual addition of every block as one op, forward and backward.

The blocks of timm and torchvision call these one after the other, each a pass over memory. `accelerate` gives a block
another route: its forward is traced (`graph`), what one op can do is put together, and the result is generated as
Python code of its own, which looks its modules up in the block it is given. Parameters, names and modules stay as they
are, and so does the block's own forward, which is taken whenever the route is not open.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import linecache
from collections.abc import Callable, Iterator

import torch
from torch import fx, nn
from torch.nn.modules import module as nn_module

from ..core.behaviours import Rerouted, is_norm, original_class, swap
from ..core.plan import Plan
from ..core.state import state_of, unwrap
from ..core.tables import table
from ..core.trace import CannotTrace, addition_of, hooked, trace
from . import norms
from .match import chain_of, sum_before

_enabled: bool | None = None


class use_kernels:
    """Whether accelerated nets run fused ops, in the whole process from now on, or inside a `with` block.

    Args:
        enabled: None (at first): for CUDA tensors only; elsewhere results are those of the plain modules, bit for bit.
            True: for any; where there is no kernel, ops run as plain PyTorch. False: for none, which a second
            derivative needs.

    Raises:
        ValueError: for anything else.
    """

    def __init__(self, enabled: bool | None) -> None:
        global _enabled
        if enabled not in (None, True, False):
            raise ValueError(f"use_kernels({enabled!r}): pass True, False, or None for CUDA tensors only")
        self._before, _enabled = _enabled, enabled

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        global _enabled
        _enabled = self._before


def accelerate(net: nn.Module) -> nn.Module:
    """Run norm, activation and residual addition of a converted net as one op each, for the norm bank that is live.

    In place, for every block of the plan and for what holds norms outside of them, in training and in evaluation; see
    `fusions` for what is fused. By default only CUDA tensors take the ops (`use_kernels`). Call it after `convert`,
    `convert_sync_batchnorm` and `freeze_batch_norm` (which undo it), before wrapping in DDP or `torch.compile`, and
    again after changing modules of a block: one that changed runs its own forward.

    A block also runs its own forward while a module that the ops stand for has hooks, and when it is called with more
    than its input. The running statistics of a block move at its end. Compiled code asks for hooks when it is compiled;
    transforms of torch.func and second derivatives want `use_kernels(False)`.

    Args:
        net: a converted net, or a wrapper around it.

    Returns:
        `net`.
    """
    for _, module in _parts(unwrap(net), state_of(net).plan):
        route = Route()
        if route.lay(module):
            swap(module, Rerouted)
            module.__dict__["_adn_route"] = route
        elif isinstance(module, Rerouted):
            module._adn_route.close()
    return net


@dataclasses.dataclass(frozen=True)
class Fusion:
    """What `accelerate` does with a block, or with a part of the net outside the blocks.

    Attributes:
        name, kind: of the module and its class.
        fused: each op by what it stands for, "bn3 + add + relu".
        reason: why there is none; "" where there are some.
        active: whether the module is rerouted now.
    """

    name: str
    kind: str
    fused: tuple[str, ...]
    reason: str
    active: bool


class Fusions(list[Fusion]):
    """One row for each block; prints as a table."""

    def __str__(self) -> str:
        rows = [("module", "class", "active", "ops")]
        rows += [(f.name, f.kind, "yes" if f.active else "no", ", ".join(f.fused) or f"none: {f.reason}") for f in self]
        return table(rows, left=True)


def fusions(net: nn.Module) -> Fusions:
    """What `accelerate` fuses in a converted net, and where it does not why; whether it has been called or not."""
    rows = Fusions()
    for name, module in _parts(unwrap(net), state_of(net).plan):
        fused, reason = (), ""
        try:
            fused = tuple(_rewrite(module).fused)
        except CannotTrace as error:
            reason = str(error)
        active = isinstance(module, Rerouted) and module._adn_route.is_intact()
        rows.append(Fusion(name, original_class(module).__name__, fused, reason, active))
    return rows


class Route:
    """Another way through a module: its forward with norms fused, and the conditions on which that does the same."""

    def __init__(self) -> None:
        self.close()

    def close(self) -> None:
        """Never take it again."""
        self._rewritten: _Rewritten | None = None
        self.is_intact: Callable[[], bool] = lambda: False

    def lay(self, module: nn.Module) -> bool:
        """Lay it anew, for the module as it is now; False if there is nothing to fuse, and then it is closed."""
        self.close()
        try:
            self._rewritten = _rewrite(module)
        except CannotTrace:
            return False
        self.is_intact = _check(self._rewritten.replaced)
        return True

    def is_open(self, args: tuple, kwargs: dict) -> bool:
        """May it be taken by a call of the module with these arguments?"""
        if self._rewritten is None or len(args) != 1 or kwargs or not isinstance(args[0], torch.Tensor):
            return False
        return (args[0].is_cuda if _enabled is None else _enabled) and self.is_intact()

    def take(self, module: nn.Module, x: torch.Tensor) -> torch.Tensor:
        moved: norms.Moved = []
        y = self._rewritten.forward(module, x, moved)
        norms.write(moved)
        return y

    def __reduce__(self) -> tuple:
        return Route, ()  # made for one module: `Rerouted` lays that of a copy


def _check(replaced: list[tuple[nn.Module, str, nn.Module]]) -> Callable[[], bool]:
    """A function that tells whether (parent, name, module) are still so, and nobody waits for the modules' calls."""

    def is_intact() -> bool:
        if nn_module._has_any_global_hook():
            return False
        return all(parent._modules.get(name) is child and not _is_hooked(child) for parent, name, child in replaced)

    # What torch.compiler.assume_constant_result sets: to compiled code, hooks are what they were when it was compiled,
    # as torch has it for all modules. Hundreds of guards for each block would be the alternative.
    is_intact._dynamo_marked_constant = True
    return is_intact


def _is_hooked(module: nn.Module) -> bool:
    return hooked(module) or bool(module._backward_hooks or module._backward_pre_hooks)


def _parts(net: nn.Module, plan: Plan) -> Iterator[tuple[str, nn.Module]]:
    """The blocks of the plan, and outside of them the largest modules that hold norms but no block, and are called."""
    blocks = {net.get_submodule(name): name for stage in plan for name in stage.blocks}
    for module, name in blocks.items():
        compiled = module._modules.get("_orig_mod")
        yield name, module if compiled is None else compiled

    def outside(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
        for name, child in module.named_children():
            inside = set(child.modules())
            if child in blocks or not any(map(is_norm, inside)):
                continue
            if inside.isdisjoint(blocks) and original_class(child).forward is not nn.Module.forward:
                yield prefix + name, child
            else:
                yield from outside(child, f"{prefix}{name}.")

    yield from outside(net, "")


@dataclasses.dataclass
class _Rewritten:
    """A module's forward with norms fused.

    Attributes:
        forward: of the module, its input, and a list that gets the norms it moves.
        fused: what each op stands for.
        replaced: (parent, name, module) of every module inside that it does not call.
    """

    forward: Callable[[nn.Module, torch.Tensor, norms.Moved], torch.Tensor]
    fused: list[str]
    replaced: list[tuple[nn.Module, str, nn.Module]]


def _rewrite(module: nn.Module) -> _Rewritten:
    """Raises CannotTrace, with the reason, if the module cannot be traced or there is nothing to fuse."""
    if "forward" in module.__dict__:
        raise CannotTrace("its forward was replaced on the module itself")
    if is_norm(module):
        return _rewrite_norm(module)
    graph = _graph_of(module)
    modules = dict(module.named_modules())
    x = next(iter(graph.nodes))
    with graph.inserting_after(x):
        moved = graph.placeholder("moved")
    calls = collections.Counter(node.target for node in graph.nodes if node.op == "call_module")
    fused: list[list[str]] = []
    for node in list(graph.nodes):
        if node.op != "call_module" or len(node.args) != 1 or node.kwargs:
            continue
        # The second call of a norm would have to see what the first one has moved.
        if calls[node.target] > 1 or "forward" in modules[node.target].__dict__:
            continue
        if norms.activation_in(modules[node.target]) is not None:
            fused.append(_fuse_batch_norm(graph, node, modules, moved))
        elif norms.is_layer_norm(modules[node.target]):
            fused.append(_fuse_layer_norm(graph, node))
    if not any(len(parts) > 1 for parts in fused):
        raise CannotTrace("no norm with an activation or an addition next to it")
    labels = [" + ".join(parts) for parts in fused if parts]
    forward = _generate(graph, original_class(module).__name__)
    return _Rewritten(forward, labels, _not_called(module, graph, modules))


def _rewrite_norm(norm: nn.Module) -> _Rewritten:
    activation = norms.activation_in(norm)
    if activation in (None, "identity"):
        raise CannotTrace("a norm alone")
    everything = [(parent, name, child) for parent in norm.modules() for name, child in parent.named_children()]
    return _Rewritten(lambda norm, x, moved: norms.batch_norm(norm, x, None, activation, moved),
                      [f"norm + {activation}"], everything)


def _not_called(
    module: nn.Module, graph: fx.Graph, modules: dict[str, nn.Module]
) -> list[tuple[nn.Module, str, nn.Module]]:
    called = {child for node in graph.nodes if node.op == "call_module" for child in modules[node.target].modules()}
    return [(parent, name, child) for parent in module.modules() if parent not in called
            for name, child in parent.named_children() if child not in called]


def _graph_of(module: nn.Module) -> fx.Graph:
    """The forward of a module, where it is the same in training and in evaluation."""
    modes = {child: child.training for child in module.modules()}
    attributes = dict(module.__dict__)
    graphs = []
    try:
        for training in (True, False):
            for child in modes:
                child.training = training
            graphs.append(trace(module).graph)
    finally:
        for child, training in modes.items():
            child.training = training
        # torch.fx keeps a tensor made in the forward on the module.
        made = [name for name, value in module.__dict__.items() if attributes.get(name, module) is not value]
        for name in made:
            del module.__dict__[name]
        module.__dict__.update(attributes)
    if made:
        raise CannotTrace("its forward makes a tensor, or sets an attribute")
    if str(graphs[0]) != str(graphs[1]):
        raise CannotTrace("its forward in training is another than in evaluation")
    return graphs[0]


def _fuse_batch_norm(graph: fx.Graph, norm: fx.Node, modules: dict[str, nn.Module], moved: fx.Node) -> list[str]:
    """Put one call where a norm and what follows it were; returns what that is."""
    chain = chain_of(norm, norms.activation_in(modules[norm.target]), modules, writes=True)
    with graph.inserting_before(chain.addition or norm):
        call = graph.call_function(
            norms.batch_norm, (graph.get_attr(norm.target), norm.args[0], chain.residual, chain.activation, moved))
    chain.replace(graph, call)
    return chain.parts


def _fuse_layer_norm(graph: fx.Graph, norm: fx.Node) -> list[str]:
    """Put one call where an addition and the norm of the sum were; returns what that is, [] if there is none."""
    found = sum_before(norm)
    if found is None:
        return []
    with graph.inserting_before(found.total):
        both = graph.call_function(
            norms.sum_and_layer_norm, (graph.get_attr(norm.target), *addition_of(found.addition), found.shape))
    found.replace(graph, both)
    return ["add", norm.target]


def _generate(graph: fx.Graph, name: str) -> Callable[..., torch.Tensor]:
    """A graph as a function with a code object of its own, of the module whose forward it is."""
    code = graph.python_code("self")
    scope = dict(code.globals)
    file = f"<adn.accelerate: {name} {next(_numbers)}>"
    linecache.cache[file] = len(code.src), None, code.src.splitlines(keepends=True), file  # for tracebacks
    exec(compile(code.src, file, "exec"), scope)
    return scope["forward"]


_numbers = itertools.count()
