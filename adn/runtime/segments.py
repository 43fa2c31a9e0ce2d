"""A converted net in eval mode as a list of segments: its traced forward, cut where it depends on another flag.

Each segment has a path for each value of its flag, and one that takes the flag of each image; `fuse.FusedNet` runs
them.
"""

from __future__ import annotations

import copy
import dataclasses
import operator
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import fx, nn

from adn_kernels import private

from ..convert import detach
from ..core.behaviours import is_norm
from ..core.regions import is_one_region, switches_in
from ..export.extract import unwrap_blocks
from .graph import (
    CannotTrace,
    Traced,
    activation_of,
    activation_of_module,
    addition_of,
    hooked,
    nothing_in_eval,
    trace,
    without_writes,
)
from .layers import AddLayerNorm, ConvNormAct, Layer, NormAct, RepConvNormAct, is_plain_conv, split_norm
from .norms import is_layer_norm
from .per_image import BypassedBlock, ConvEitherNormAct, EitherNorm, EitherNormAct

FULL, BASE, PER_IMAGE = "full", "base", "per image"


def segments_of(net: nn.Module) -> tuple[list[Segment], Any]:
    """The segments of a converted net in the order in which they run, and what its forward returns, with a `Value` in
    place of each that a segment gives.

    Raises:
        CannotTrace: saying why.
    """
    builder = _Builder(net)
    return list(builder.segments()), builder.result


class Segment(nn.Module):
    """A part of a forward that depends on one entry of the depth at most.

    Attributes:
        flag: the index of that entry, None if the segment runs the same way at every depth.
        takes, gives: the names of the values that `run` takes and returns.
        last_uses: those of `takes` that nothing after it needs.
        paths: by the entry; False alone if there is none.
        per_image: the path that takes, after its inputs, int32 (N,), the entry of each image. None without a flag.
    """

    def __init__(self, flag: int | None, takes: Sequence[str], gives: Sequence[str], last_uses: Iterable[str],
                 paths: Mapping[bool | int, nn.Module], per_image: nn.Module | None) -> None:
        super().__init__()
        self.flag = flag
        self.takes, self.gives, self.last_uses = tuple(takes), tuple(gives), tuple(last_uses)
        self.entries = tuple(paths)
        self.paths = nn.ModuleList(paths.values())
        self.per_image = per_image
        self._calls = dict(paths)

    def run(self, entry: bool | int, *inputs: Any) -> tuple:
        return self._calls[entry](*inputs)

    def compile(self, **options: Any) -> None:
        # Of the functions: each has code of its own, for which alone its compilations count.
        compiled = {path: torch.compile(path.forward, **options) for path in self.paths}
        self._calls = {entry: compiled[path] for entry, path in zip(self.entries, self.paths)}

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_calls": dict(zip(self.entries, self.paths))}


@dataclasses.dataclass(frozen=True)
class Value:
    """Stands for a value in what a forward returns."""

    name: str


def filled(result: Any, values: Mapping[str, Any]) -> Any:
    """What a forward returns, of the values that segments gave."""
    if isinstance(result, Value):
        return values[result.name]
    if isinstance(result, dict):
        return {key: filled(value, values) for key, value in result.items()}
    if isinstance(result, list | tuple):
        return (list if isinstance(result, list) else tuple)(filled(value, values) for value in result)
    return result


class _Cut(NamedTuple):
    """Consecutive nodes; what they take from others, and what others take from them."""

    flag: int | None
    nodes: list[fx.Node]
    takes: list[fx.Node]
    gives: list[fx.Node]

    @classmethod
    def of(cls, flag: int | None, nodes: list[fx.Node]) -> _Cut:
        inside = set(nodes)
        takes = dict.fromkeys(node for user in nodes for node in user.all_input_nodes if node not in inside)
        return cls(flag, nodes, list(takes), [node for node in nodes if not inside.issuperset(node.users)])


class _Builder:
    """Makes the segments of a net."""

    def __init__(self, source: nn.Module) -> None:
        tensors = {id(t): t for t in (*source.parameters(), *source.buffers())}
        try:
            model = copy.deepcopy(source, tensors)  # shares them
        except RuntimeError as error:
            raise CannotTrace(f"this net cannot be copied: {error}") from error
        unwrap_blocks(model)
        whole = {name: module for name, module in model.named_modules() if is_one_region(module)}
        whole = {name: switches_in(module)[0] for name, module in whole.items()}
        state, self.twins = detach(model.eval())
        _check_hooks(model)
        by_flag = [(k, stage) for k, group in enumerate(state.plan.flags) for stage in group]
        self.flags = {norm: k for k, stage in by_flag for norm in stage.norms}
        self.stages = {block: k for k, stage in by_flag for block in stage.blocks}
        # What lies between stages of one flag, too.
        self.parts = self.stages | {name: state.switches.index(switch) for name, switch in whole.items()}
        self.stacks = {stack.name: (len(state.plan.flags) + i, stack.layers(model))
                       for i, stack in enumerate(state.plan.stacks)}
        self.refinement = {block for _, stage in by_flag for block in stage.refinement_blocks}
        self.traced = _traced(model, self.stages, self.stacks)
        self.bypass = {self.traced.calls[block][1]: self.traced.calls[block][0] for block in self.refinement}
        self.layers: dict[tuple, Layer] = {}
        _, *self.nodes, output = self.traced.graph.nodes
        self.cuts = self._cuts()
        self.result = fx.node.map_arg(output.args[0], lambda node: Value(node.name))

    def segments(self) -> Iterator[Segment]:
        place = {node: i for i, cut in enumerate(self.cuts) for node in cut.nodes}
        for i, cut in enumerate(self.cuts):
            last = [node for node in cut.takes if all(place.get(user, len(self.cuts)) <= i for user in node.users)]
            names = [[node.name for node in nodes] for nodes in (cut.takes, cut.gives, last)]
            stack = self.stacks.get(cut.nodes[0].target)
            if stack is not None:
                name, (_, layers) = cut.nodes[0].target, stack
                paths = {n: self._stack_path(cut, _at(self.traced.root.get_submodule(name), n))
                         for n in range(1, layers + 1)}
                yield Segment(cut.flag, *names, paths, self._stack_path(cut, None))
            elif cut.flag is None:
                yield Segment(None, *names, {False: self._path(cut, FULL)}, None)
            else:
                yield Segment(cut.flag, *names, {False: self._path(cut, FULL), True: self._path(cut, BASE)},
                              self._path(cut, PER_IMAGE))

    def _cuts(self) -> list[_Cut]:
        """The nodes in their order, cut where the flag changes they depend on."""
        cuts: list[tuple[int | None, list[fx.Node]]] = []
        pending: list[fx.Node] = []  # depend on no flag
        for node in self.nodes:
            if node.target in self.stacks:
                # Alone: its paths are traced by themselves.
                cuts += [(None, pending)] * bool(pending) + [(self.stacks[node.target][0], [node])]
                pending = []
                continue
            stage = next((self.parts[path] for path in _owners(node) if path in self.parts), None)
            flag = stage if stage is not None else self.flags.get(node.target)
            if flag is None:
                pending.append(node)
                continue
            if not cuts or cuts[-1][0] != flag:
                # What leads to a switched norm outside of a stage has to be with it, to become one call. Other work
                # must not be in two paths for nothing.
                if stage is not None and any(waiting.op == "call_module" for waiting in pending):
                    cuts.append((None, pending))
                    pending = []
                cuts.append((flag, []))
            cuts[-1][1].extend([*pending, node])
            pending = []
        if pending:
            cuts.append((None, pending))
        return [_Cut.of(flag, nodes) for flag, nodes in cuts]

    def _path(self, cut: _Cut, kind: str) -> fx.GraphModule:
        graph = fx.Graph()
        env = {node: graph.placeholder(node.name) for node in cut.takes}
        flags = graph.placeholder("flags") if kind == PER_IMAGE else None
        modules: dict[str, Any] = {}
        seconds: dict[str, nn.Module] = {}

        def value(node: fx.Node) -> fx.Node:
            while node not in env and node in self.bypass:
                node = self.bypass[node]
            if node not in env:
                raise CannotTrace(f"a value inside a block that can be bypassed is used outside of it ({node.name})")
            return env[node]

        blocks: dict[str, list[fx.Node]] = {}
        for node in cut.nodes:
            block = next(iter(self.refinement & _owners(node)), None)
            if block is not None and kind == BASE:
                continue
            if block is not None and kind == PER_IMAGE:
                nodes = blocks.setdefault(block, [])
                nodes.append(node)
                if node is self.traced.calls[block][1]:
                    env[node] = self._block(graph, modules, block, nodes, value, flags)
                continue
            env[node] = graph.node_copy(node, value)
            if node.op in ("call_module", "get_attr"):
                name = node.target.replace(".", "_")
                modules[name] = _attribute(self.traced.root, node.target)
                if node.target in self.flags and kind == BASE:
                    name += "_skip"
                    modules[name] = self.twins[node.target]
                elif node.target in self.flags and kind == PER_IMAGE:
                    seconds[name] = self.twins[node.target]
                env[node].target = name
        graph.output(tuple(value(node) for node in cut.gives))
        self._fuse(graph, modules, seconds, flags)
        return fx.GraphModule(modules, graph, class_name="Path")

    def _stack_path(self, cut: _Cut, stack: nn.Module | None) -> fx.GraphModule:
        """A path that runs a stack at some number of layers, or takes the number for each image."""
        node, = cut.nodes
        graph = fx.Graph()
        env = {taken: graph.placeholder(taken.name) for taken in cut.takes}
        args = fx.node.map_arg(node.args, env.__getitem__)
        if stack is None:
            args = (*args, graph.placeholder("layers"))
            traced = _traced(self.traced.root.get_submodule(node.target), method="per_image", arguments=len(args))
        else:
            traced = _traced(stack, arguments=len(args))
        inner, modules = fx.Graph(), {}
        output = inner.graph_copy(traced.graph, {})
        for call in inner.nodes:
            private.forget_annotations(call)
            if call.op in ("call_module", "get_attr"):
                value, call.target = _attribute(traced.root, call.target), call.target.replace(".", "_")
                modules[call.target] = value
        inner.output(output)
        self._fuse(inner, modules, {}, None)
        graph.output((graph.call_module("stack", args),))
        return fx.GraphModule({"stack": fx.GraphModule(modules, inner, class_name="Stack")}, graph, class_name="Path")

    def _block(self, graph: fx.Graph, modules: dict[str, Any], block: str, nodes: list[fx.Node],
               value: Callable[[fx.Node], fx.Node], flags: fx.Node) -> fx.Node:
        """A call of a refinement block that leaves samples alone whose flag is set."""
        stream, output = self.traced.calls[block]
        cut = _Cut.of(None, nodes)
        takes = [stream, *(node for node in cut.takes if node is not stream)]
        path = self._path(cut._replace(takes=takes, gives=[output]), FULL)
        name = block.replace(".", "_")
        modules[name] = BypassedBlock(path, in_place=self._is_free(stream, nodes))
        return graph.call_module(name, (flags, *(value(node) for node in takes)))

    def _is_free(self, value: fx.Node, nodes: Sequence[fx.Node]) -> bool:
        """May these nodes, the only ones to do so, overwrite a value, as nobody else reads it, by this or another
        name?"""
        names = set(nodes)
        while names.issuperset(value.users):
            module = self.traced.root.get_submodule(value.target) if value.op == "call_module" else None
            if module is None or not nothing_in_eval(module):
                makes_new = module is not None and (is_norm(module) or isinstance(module, nn.Conv2d | nn.Linear)
                                                    or activation_of_module(module) is not None)
                return (makes_new or addition_of(value) is not None)
            names.add(value)
            value = value.args[0]
        return False

    # ------------------------------------------------------------------------------------------ what becomes one call

    def _fuse(self, graph: fx.Graph, modules: dict[str, Any], seconds: Mapping[str, nn.Module], flags: fx.Node | None
              ) -> None:
        """Replace chains of calls by one call each.

        Args:
            seconds: by the name of a norm its twin, where `flags` picks between them.
        """
        for node in list(graph.nodes):
            if node.op == "call_module" and node.args and nothing_in_eval(modules[node.target]):
                node.replace_all_uses_with(node.args[0])
                graph.erase_node(node)
        for node in list(graph.nodes):
            if node.op != "call_module":
                continue
            module, second = modules[node.target], seconds.get(node.target)
            if len(node.args) != 1 or node.kwargs:
                if second is not None:
                    raise CannotTrace(f"the norm {node.target!r} is not called with its input alone, by position")
                continue
            if split_norm(module) is not None:
                self._fuse_norm(graph, modules, node, second, flags)
            elif is_layer_norm(module) and not hooked(module):
                self._fuse_layer_norm(graph, modules, node, second, flags)
            elif second is not None:
                node.target = self._name(modules, node, EitherNorm(module, second))
                node.kwargs = {"bank": flags}
        for node in list(graph.nodes):
            self._merge_branches(graph, modules, node)
        graph.lint()

    def _merge_branches(self, graph: fx.Graph, modules: dict[str, Any], node: fx.Node) -> None:
        """Two convolutions of one value, added to each other, as one."""
        if node.op != "call_module" or len(node.args) != 2 or type(modules[node.target]) is not ConvNormAct:
            return
        value, other = node.args
        if (other.op != "call_module" or type(modules[other.target]) is not ConvNormAct or other.args != (value,)
                or len(other.users) > 1):
            return
        layer, beside = modules[node.target], modules[other.target]
        if beside.activation == "identity" and RepConvNormAct.fits(layer.source[0], beside.source[0]):
            node.target = self._name(
                modules, node, self._layer(RepConvNormAct, *layer.source, *beside.source, layer.activation))
            node.args = (value,)
            graph.erase_node(other)

    def _fuse_norm(self, graph: fx.Graph, modules: dict[str, Any], norm: fx.Node, second: nn.Module | None,
                   flags: fx.Node | None) -> None:
        """[convolution ->] norm [-> + residual] [-> activation]."""
        chain = [norm]
        activation, residual = split_norm(modules[norm.target]), None
        while len(chain[-1].users) == 1 and activation == "identity":
            user, = chain[-1].users
            summands = addition_of(user)
            found = activation_of(user, modules)
            if found is not None:
                activation = found
            elif summands is not None and residual is None and summands[0] is not summands[1]:
                residual = summands[summands[0] is chain[-1]]
            else:
                break
            chain.append(user)
        before = norm.args[0]
        is_conv = (before.op == "call_module" and len(before.args) == 1 and is_plain_conv(modules[before.target])
                   and len(before.users) == 1
                   and modules[before.target].out_channels == modules[norm.target].num_features)
        if is_conv:
            chain.insert(0, before)
        parts = [modules[node.target] for node in ((before, norm) if is_conv else (norm,))]
        if second is None:
            layer = self._layer(ConvNormAct if is_conv else NormAct, *parts, activation)
            bank = {}
        else:
            layer = self._layer(ConvEitherNormAct if is_conv else EitherNormAct, *parts, second, activation)
            bank = {"bank": flags}
        args = (chain[0].args[0],) if residual is None else (chain[0].args[0], residual)
        name = self._name(modules, norm, layer)
        with graph.inserting_before(chain[-1]):
            new = graph.call_module(name, args, bank)
        chain[-1].replace_all_uses_with(new)
        for node in reversed(chain):
            graph.erase_node(node)

    def _fuse_layer_norm(self, graph: fx.Graph, modules: dict[str, Any], norm: fx.Node, second: nn.Module | None,
                         flags: fx.Node | None) -> None:
        """[+ residual [-> reshape] ->] layer norm."""
        total = addition = norm.args[0]
        kwargs: dict[str, Any] = {} if second is None else {"bank": flags}
        if total.op == "call_method" and total.target == "reshape" and len(total.args[0].users) == 1:
            addition, *shape = total.args
            kwargs["shape"] = tuple(shape)
        summands = addition_of(addition)
        if summands is None or any(node.op == "get_attr" for node in summands):
            if second is None:
                return
            addition, summands = total, (total,)
            kwargs.pop("shape", None)
        name = self._name(modules, norm, self._layer(AddLayerNorm, modules[norm.target], second))
        with graph.inserting_before(norm if len(summands) == 1 else total):
            both = graph.call_module(name, summands, kwargs)
            y, s = (graph.call_function(operator.getitem, (both, i)) for i in range(2))
        norm.replace_all_uses_with(y)
        graph.erase_node(norm)
        if len(summands) == 1:
            graph.erase_node(s)
            return
        total.replace_all_uses_with(s)
        for node in dict.fromkeys((total, addition)):
            graph.erase_node(node)

    @staticmethod
    def _name(modules: dict[str, Any], node: fx.Node, layer: nn.Module) -> str:
        """A name of its own for what replaces a node: the module it calls may be called by others."""
        name = f"{node.name}_fused"
        modules[name] = layer
        return name

    def _layer(self, kind: type[Layer], *args: Any) -> Layer:
        """One for both paths, if it is the same in both."""
        key = (kind, *(id(a) if isinstance(a, nn.Module) else a for a in args))
        if key not in self.layers:
            self.layers[key] = kind(*args)
        return self.layers[key]


def _traced(module: nn.Module, watched: Collection[str] = (), leaves: Collection[str] = (), **options: Any) -> Traced:
    traced = trace(module, watched, leaves, **options)
    without_writes(traced)
    for node in traced.graph.find_nodes(op="call_method", target="view"):
        node.target = "reshape"  # what is channels-last here has other strides than in the model
    return traced


def _at(stack: nn.Module, layers: int) -> nn.Module:
    """A stack that runs some of its layers; shares everything with it."""
    short = copy.copy(stack)
    short.running = lambda: layers
    return short


def _check_hooks(model: nn.Module) -> None:
    for name, module in model.named_modules():
        has_hooks = module._forward_hooks or module._forward_pre_hooks
        if has_hooks and not is_norm(module) and any(map(is_norm, module.modules())):
            raise CannotTrace(f"{name or type(module).__name__!r} has forward hooks, which a deploy form would not "
                              "call: remove them before adn.fuse")


def _owners(node: fx.Node) -> set[str]:
    """The names of the modules in whose forward a node was made."""
    return {path for path, _ in node.meta.get("nn_module_stack", {}).values()}


def _attribute(root: nn.Module, name: str) -> Any:
    for part in name.split("."):
        root = getattr(root, part)
    return root
