"""The deploy form of a converted net: every depth at the speed of a network built for it alone.

The forward is traced once and cut into segments, each of which depends on one flag at most: a stage, or what lies
between two stages. A segment has two paths, one for each value of its flag, in which bypassed blocks do not occur and
every convolution + norm + activation (+ residual) is one call. A forward runs one path of each segment.
"""

from __future__ import annotations

import copy
import dataclasses
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from ..convert import detach
from ..export import unwrap_blocks
from ..state import State, state_of, unwrap
from ..switch import Switch
from .graph import CannotTrace, Traced, activation_of, addition_of, nothing_in_eval, trace
from .layers import LAYER_NORMS, AddLayerNorm, ConvNormAct, Layer, NormAct, is_plain_conv, split_norm


def fuse(net: nn.Module) -> FusedNet:
    """The deploy form of a converted net: for inference, any-depth as before.

    Convolution, norm, activation and residual addition become one call each: oneDNN's on a CPU, cuDNN's or a Triton
    kernel on a GPU. Norms are folded into the weights of the convolutions before them, for both values of their
    flag: the folded essential path is held twice. What is not fused keeps sharing its parameters with the net.

    The result equals the net in evaluation mode within rounding, at every depth. It has a depth of its own, for all
    functions that take a net: `adn.set_depth(fused, "TTFF")`. Changes of the net's parameters and statistics are
    noticed at the next call, which folds them again; only writes through `tensor.data` are not: call
    `fused.refresh()` after them.

    Args:
        net: a converted net in evaluation mode, on the device and of the dtype it is to run at. It is not changed.

    Raises:
        ValueError: if the net is not any-depth or in training mode, or if its forward cannot be traced (it then says
            why: usually because it depends on values).
        RuntimeError: if other code has replaced modules that follow the depth.
    """
    return FusedNet(net)


class FusedNet(nn.Module):
    """What `fuse` returns.

    Attributes:
        segments: in the order in which they run.
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        source, state = unwrap(net), state_of(net)
        if isinstance(source, FusedNet):
            raise ValueError("this net is fused already")
        # Not a child: what is fused of it is here.
        self.__dict__["source"] = source
        self.__dict__["_adn"] = State(
            state.plan, [Switch(switch.skip) for switch in state.switches], state.twins, {}, state.origin,
            state.class_names)
        if source.training:
            raise ValueError("a deploy form is for inference: call net.eval() first")
        self._build()
        self.training = False

    def forward(self, x: Tensor) -> Any:
        """As the net's own forward of one argument, without gradients.

        Raises:
            RuntimeError: if x requires a gradient.
        """
        if x.requires_grad and torch.is_grad_enabled():
            raise RuntimeError("a deploy form computes no gradients: pass x.detach(), or differentiate the net itself")
        self.refresh_if_changed()
        if x.ndim == 4:
            x = x.contiguous(memory_format=torch.channels_last)
        switches = self._adn.switches
        values: dict[str, Any] = {self.segments[0].takes[0]: x}
        with torch.no_grad():
            for segment in self.segments:
                bypassed = segment.flag is not None and switches[segment.flag].skip
                inputs = [values[name] for name in segment.takes]
                for name in segment.last_uses:
                    del values[name]
                values.update(zip(segment.gives, segment.run(bypassed, *inputs)))
        return _filled(self._result, values)

    def refresh(self) -> None:
        """Fold the net's parameters and statistics again, into the memory they are in already."""
        for layer in self.modules():
            if isinstance(layer, Layer):
                layer.refresh()
        self._watched = list(_tensors(self.source))
        self._versions = [_version(tensor) for _, _, tensor in self._watched]

    def refresh_if_changed(self) -> None:
        """What every call does first: notice changes of the net, and follow them."""
        if any(slots.get(key) is not tensor for slots, key, tensor in self._watched):
            self._build()
        elif any(_version(tensor) != version for (*_, tensor), version in zip(self._watched, self._versions)):
            self.refresh()

    def train(self, mode: bool = True) -> FusedNet:
        """Refuses training mode with a RuntimeError."""
        if mode:
            raise RuntimeError("a deploy form cannot be trained: train the net it was made from, and call adn.fuse "
                               "again (or this one: it follows the net's weights)")
        return self

    def _apply(self, fn: Callable, recurse: bool = True) -> FusedNet:
        raise RuntimeError("a deploy form shares parameters with its net: move or cast the net, "
                           "adn.fuse(net.to(...))")

    def _build(self) -> None:
        state_of(self.source).check_intact()
        builder = _Builder(self.source)
        self.segments = nn.ModuleList(builder.segments())
        self._result = builder.result
        self._watched = list(_tensors(self.source))
        self._versions = [_version(tensor) for _, _, tensor in self._watched]


class Segment(nn.Module):
    """A part of a forward that depends on one flag at most.

    Attributes:
        flag: its index, None if the segment runs the same way at every depth.
        takes, gives: the names of the values that `run` takes and returns.
        last_uses: those of `takes` that nothing after it needs.
        full, base: the paths for a flag of F and T.
    """

    def __init__(self, flag: int | None, takes: Sequence[str], gives: Sequence[str], last_uses: Iterable[str],
                 full: nn.Module, base: nn.Module) -> None:
        super().__init__()
        self.flag = flag
        self.takes, self.gives, self.last_uses = tuple(takes), tuple(gives), tuple(last_uses)
        self.full, self.base = full, base

    def run(self, bypassed: bool, *inputs: Any) -> tuple:
        return (self.base if bypassed else self.full)(*inputs)


@dataclasses.dataclass(frozen=True)
class _Value:
    """Stands for a value in what a forward returns."""

    name: str


class _Cut(NamedTuple):
    """The nodes of a segment."""

    flag: int | None
    nodes: list[fx.Node]


class _Builder:
    """Makes the segments of a net."""

    def __init__(self, source: nn.Module) -> None:
        tensors = {id(t): t for _, _, t in _tensors(source)}
        model = copy.deepcopy(source, tensors)  # shares them
        unwrap_blocks(model)
        state, self.twins = detach(model.eval())
        self.flags = {norm: k for k, stage in enumerate(state.plan.flagged) for norm in stage.norms}
        self.stages = {block: k for k, stage in enumerate(state.plan.flagged) for block in stage.blocks}
        self.refinement = {block for stage in state.plan.flagged for block in stage.refinement_blocks}
        self.traced: Traced = trace(model, self.stages)
        self.bypass = {self.traced.calls[block][1]: self.traced.calls[block][0] for block in self.refinement}
        self.layers: dict[tuple, Layer] = {}
        _, *self.nodes, output = self.traced.graph.nodes
        self.result = fx.node.map_arg(output.args[0], lambda node: _Value(node.name))

    def segments(self) -> Iterator[Segment]:
        cuts = self._cuts()
        place = {node: i for i, cut in enumerate(cuts) for node in cut.nodes}
        for i, cut in enumerate(cuts):
            takes = dict.fromkeys(node for user in cut.nodes for node in user.all_input_nodes if place.get(node) != i)
            gives = [node for node in cut.nodes if any(place.get(user) != i for user in node.users)]
            last = [node for node in takes if all(place.get(user, len(cuts)) <= i for user in node.users)]
            full = self._path(cut, takes, gives, bypassed=False)
            base = full if cut.flag is None else self._path(cut, takes, gives, bypassed=True)
            names = [[node.name for node in nodes] for nodes in (takes, gives, last)]
            yield Segment(cut.flag, *names, full, base)

    def _cuts(self) -> list[_Cut]:
        """The nodes in their order, cut where the flag changes they depend on."""
        cuts: list[_Cut] = []
        pending: list[fx.Node] = []  # depend on no flag
        for node in self.nodes:
            stage = next((self.stages[path] for path in _owners(node) if path in self.stages), None)
            flag = stage if stage is not None else self.flags.get(node.target)
            if flag is None:
                pending.append(node)
                continue
            if not cuts or cuts[-1].flag != flag:
                # What leads to a switched norm outside of a stage has to be with it, to become one call. Other work
                # must not be in two paths for nothing.
                if stage is not None and any(waiting.op == "call_module" for waiting in pending):
                    cuts.append(_Cut(None, pending))
                    pending = []
                cuts.append(_Cut(flag, []))
            cuts[-1].nodes.extend([*pending, node])
            pending = []
        return [*cuts, _Cut(None, pending)] if pending else cuts

    def _path(self, cut: _Cut, takes: Iterable[fx.Node], gives: Iterable[fx.Node], bypassed: bool) -> fx.GraphModule:
        graph = fx.Graph()
        env = {node: graph.placeholder(node.name) for node in takes}
        modules: dict[str, Any] = {}

        def value(node: fx.Node) -> fx.Node:
            while node not in env and node in self.bypass:
                node = self.bypass[node]
            if node not in env:
                raise CannotTrace(f"a value inside a block that can be bypassed is used outside of it ({node.name})")
            return env[node]

        for node in cut.nodes:
            if bypassed and not self.refinement.isdisjoint(_owners(node)):
                continue
            env[node] = graph.node_copy(node, value)
            if node.op in ("call_module", "get_attr"):
                second = bypassed and node.target in self.flags
                name = env[node].target = node.target.replace(".", "_") + ("_skip" if second else "")
                modules[name] = self.twins[node.target] if second else _attribute(self.traced.root, node.target)
        graph.output(tuple(value(node) for node in gives))
        self._fuse(graph, modules)
        return fx.GraphModule(modules, graph, class_name="Path")

    # ------------------------------------------------------------------------------------------ what becomes one call

    def _fuse(self, graph: fx.Graph, modules: dict[str, Any]) -> None:
        for node in list(graph.nodes):
            if node.op == "call_module" and nothing_in_eval(modules[node.target]):
                node.replace_all_uses_with(node.args[0])
                graph.erase_node(node)
        for node in list(graph.nodes):
            if node.op == "call_module" and split_norm(modules[node.target]) is not None:
                self._fuse_norm(graph, modules, node)
        for node in list(graph.nodes):
            if node.op == "call_module" and type(modules[node.target]) in LAYER_NORMS:
                self._fuse_layer_norm(graph, modules, node)
        graph.lint()

    def _fuse_norm(self, graph: fx.Graph, modules: dict[str, Any], norm: fx.Node) -> None:
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
        is_conv = (before.op == "call_module" and is_plain_conv(modules[before.target]) and len(before.users) == 1
                   and modules[before.target].out_channels == modules[norm.target].num_features)
        if is_conv:
            chain.insert(0, before)
        parts = [modules[node.target] for node in ((before, norm) if is_conv else (norm,))]
        layer = self._layer(ConvNormAct if is_conv else NormAct, *parts, activation)
        args = (chain[0].args[0],) if residual is None else (chain[0].args[0], residual)
        self._replace(graph, modules, chain, norm.target, layer, args)

    def _fuse_layer_norm(self, graph: fx.Graph, modules: dict[str, Any], norm: fx.Node) -> None:
        """+ residual -> layer norm."""
        total = norm.args[0]
        summands = addition_of(total)
        if summands is None or any(node.op == "get_attr" for node in summands):
            return
        layer = self._layer(AddLayerNorm, modules[norm.target])
        with graph.inserting_before(total):
            modules[norm.target] = layer
            both = graph.call_module(norm.target, summands)
            y, s = (graph.call_function(operator.getitem, (both, i)) for i in range(2))
        norm.replace_all_uses_with(y)
        graph.erase_node(norm)
        total.replace_all_uses_with(s)
        graph.erase_node(total)

    def _layer(self, kind: type[Layer], *args: Any) -> Layer:
        """One for both paths, if it is the same in both."""
        key = (kind, *(id(a) if isinstance(a, nn.Module) else a for a in args))
        if key not in self.layers:
            self.layers[key] = kind(*args)
        return self.layers[key]

    @staticmethod
    def _replace(graph: fx.Graph, modules: dict[str, Any], chain: Sequence[fx.Node], name: str, layer: Layer,
                 args: tuple) -> None:
        modules[name] = layer
        with graph.inserting_before(chain[-1]):
            new = graph.call_module(name, args)
        chain[-1].replace_all_uses_with(new)
        for node in reversed(chain):
            graph.erase_node(node)


def _filled(result: Any, values: Mapping[str, Any]) -> Any:
    if isinstance(result, _Value):
        return values[result.name]
    if isinstance(result, dict):
        return {key: _filled(value, values) for key, value in result.items()}
    if isinstance(result, list | tuple):
        return (list if isinstance(result, list) else tuple)(_filled(value, values) for value in result)
    return result


def _owners(node: fx.Node) -> set[str]:
    """The names of the modules in whose forward a node was made."""
    return {path for path, _ in node.meta.get("nn_module_stack", {}).values()}


def _attribute(root: nn.Module, name: str) -> Any:
    for part in name.split("."):
        root = getattr(root, part)
    return root


def _tensors(net: nn.Module) -> Iterator[tuple[Mapping[str, Tensor | None], str, Tensor]]:
    """(where it is held, under which key, tensor) of every parameter and buffer but counters."""
    for module in net.modules():
        for slots in (module._parameters, module._buffers):
            for key, tensor in slots.items():
                if tensor is not None and key != "num_batches_tracked":
                    yield slots, key, tensor


def _version(tensor: Tensor) -> int:
    # Tensors made in inference mode count nothing.
    return 0 if tensor.is_inference() else tensor._version
