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
from ..depth import Depth
from ..export import unwrap_blocks
from ..nn import is_norm, mixing_norm
from ..state import DepthLike, State, state_of, unwrap
from ..switch import Switch
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
from .layers import AddLayerNorm, ConvNormAct, Layer, NormAct, is_plain_conv, split_norm
from .norms import is_layer_norm
from .per_image import (
    BypassedBlock,
    ConvEitherNormAct,
    EitherNorm,
    EitherNormAct,
    checked_flags,
    fastest,
    split_run,
)
from .watch import Watch

FULL, BASE, PER_IMAGE = "full", "base", "per image"


def fuse(net: nn.Module) -> FusedNet:
    """The deploy form of a converted net: for inference, any-depth as before.

    Convolution, norm, activation and residual addition become one call each: oneDNN's on a CPU, cuDNN's or a Triton
    kernel on a GPU. Norms are folded into the weights of the convolutions before them, for both values of their
    flag: the folded essential path is held twice. What is not fused keeps sharing its parameters with the net.

    The result equals the net in evaluation mode within rounding, at every depth. It has a depth of its own, for all
    functions that take a net: `adn.set_depth(fused, "TTFF")`. Changes of the net's parameters, statistics and modules
    are noticed at the next call, which folds them again. Only writes that torch does not count are not: through
    `tensor.data`, by collectives of torch.distributed, into tensors made in inference mode; call `fused.refresh()`
    after those. Feature maps it returns are channels-last. Two threads use two copies, or an `adn.Engine`.

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
        self._compile_options: dict[str, Any] | None = None
        # Not a child: what is fused of it is here.
        self.__dict__["_adn"] = State(
            state.plan, [Switch(switch.skip) for switch in state.switches], state.twins, {}, state.origin,
            state.class_names, made_from=source)
        if any(module.training for module in source.modules()):
            raise ValueError("a deploy form is for inference: call net.eval() first")
        self._build()
        self.training = False

    def forward(self, x: Tensor) -> Any:
        """As the net's own forward of one argument, without gradients.

        Raises:
            RuntimeError: if x requires a gradient.
        """
        switches = self._adn.switches
        return self._run(x, lambda segment, inputs: segment.run(switches[segment.flag].skip, *inputs))

    def per_image(self, x: Tensor, depths: Tensor | Callable[[int, Tensor], Tensor] | Sequence[DepthLike]) -> Any:
        """Every image of a batch at a depth of its own; the depth of the net does not matter.

        Args:
            x: (N, ...).
            depths: int32 (stages, N) on the device of x, 1 where image n bypasses the refinement path of stage k, else
                0: any kernel may have written it, and nothing waits for it. Or a router, called `router(k, features)`
                before what depends on flag k, `features` being its input, for the (N,) of that flag. Or, where the host
                knows, N depths: then the batch is split in every stage or, where that has been measured to be faster,
                run as a whole; the first calls measure.

        Raises:
            ValueError: if a shape, type or device does not fit, or samples of a batch influence each other.
        """
        if self._mixing is not None:
            raise ValueError(f"norm {self._mixing!r} has no running statistics, so samples of a batch influence each "
                             "other: run images of different depths in batches of their own")
        if not (callable(depths) or isinstance(depths, Tensor)):
            pair = self._adn.full, self._adn.base
            table = [Depth.parse(depth, pair) for depth in depths]
            if len(table) != len(x):
                raise ValueError(f"{len(table)} depths for {len(x)} images; pass one for each")
            return self._run(x, lambda segment, inputs: self._split(segment, inputs, [d[segment.flag] for d in table]))
        if isinstance(depths, Tensor):
            flags = checked_flags(depths, (len(self._adn.switches), len(x)), x.device)
            return self._run(x, lambda segment, inputs: segment.per_image(*inputs, flags[segment.flag]))
        found: dict[int, Tensor] = {}

        def routed(segment: Segment, inputs: list[Any]) -> tuple:
            k = segment.flag
            if k not in found:
                found[k] = checked_flags(depths(k, inputs[0]), (len(x),), x.device)
            return segment.per_image(*inputs, found[k])

        return self._run(x, routed)

    def _run(self, x: Tensor, run: Callable[[Segment, list[Any]], tuple]) -> Any:
        """A forward; `run` is asked for those segments that have a flag."""
        if x.requires_grad and torch.is_grad_enabled():
            raise RuntimeError("a deploy form computes no gradients: pass x.detach(), or differentiate the net itself")
        self.refresh_if_changed()
        values: dict[str, Any] = {self.segments[0].takes[0]: self.take(x)}
        with torch.no_grad():
            for segment in self.segments:
                inputs = [values[name] for name in segment.takes]
                for name in segment.last_uses:
                    del values[name]
                outputs = segment.run(False, *inputs) if segment.flag is None else run(segment, inputs)
                values.update(zip(segment.gives, outputs))
        return self.give(values)

    def take(self, x: Tensor) -> Tensor:
        """The input as the first segment wants it."""
        as_it_is = x.ndim != 4 or x.is_contiguous(memory_format=torch.channels_last)
        return x if as_it_is else x.contiguous(memory_format=torch.channels_last)

    def give(self, values: Mapping[str, Any]) -> Any:
        """What the forward returns, of the values that segments gave."""
        return _filled(self._result, values)

    def _split(self, segment: Segment, inputs: list[Any], bypassed: list[bool]) -> tuple:
        """A segment whose flags the host knows, the faster way."""
        count, n = sum(bypassed), len(bypassed)
        if count in (0, n):
            return segment.run(count > 0, *inputs)
        ways = {
            "split": lambda: split_run(segment.run, inputs, bypassed),
            "whole": lambda: segment.per_image(
                *inputs, torch.tensor(bypassed, dtype=torch.int32).to(inputs[0].device, non_blocking=True)),
        }
        # Eighths: so that not every number of images has to be measured.
        key = id(segment), n, 8 * count // n, inputs[0].shape, inputs[0].dtype
        if key not in self._faster:
            self._faster[key] = fastest(ways, inputs[0].device)
        return ways[self._faster[key]]()

    def compile(self, **options: Any) -> None:
        """Compile both paths of every segment, in place, each as one region; `per_image` stays as it is. On a CPU it
        helps nets without batch norm: convolutions are fused already.

        Args:
            options: of `torch.compile`.
        """
        self._compile_options = {"fullgraph": True, **options}
        for segment in self.segments:
            segment.compile(**self._compile_options)

    def refresh(self) -> None:
        """Fold the net's parameters and statistics again, into the memory they are in already."""
        with torch.inference_mode(False):
            for layer in self.modules():
                if isinstance(layer, Layer):
                    layer.refresh()
        self._versions = list(map(_version, self._tensors))

    def refresh_if_changed(self) -> bool:
        """What every call does first: notice changes of the net, and follow them. Were there any?"""
        if self._watch.changed():
            self._build()
            return True
        if any(map(operator.ne, map(_version, self._tensors), self._versions)):
            self.refresh()
            return True
        return False

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
        state_of(self._adn.made_from).check_intact()
        with torch.inference_mode(False):  # what is made here is written to again by `refresh`
            builder = _Builder(self._adn.made_from)
            self.segments = nn.ModuleList(builder.segments())
        self._result = builder.result
        if self._compile_options is not None:
            self.compile(**self._compile_options)
        self._faster: dict[tuple, str] = {}
        source = self._adn.made_from
        self._mixing = mixing_norm(source)
        self._watch = Watch(source)
        # Of counters too: torch's batch norm writes its running statistics without counting a version of them.
        self._tensors = [*source.parameters(), *source.buffers()]
        self._versions = list(map(_version, self._tensors))


class Segment(nn.Module):
    """A part of a forward that depends on one flag at most.

    Attributes:
        flag: its index, None if the segment runs the same way at every depth.
        takes, gives: the names of the values that `run` takes and returns.
        last_uses: those of `takes` that nothing after it needs.
        full, base: the paths for a flag of F and T.
        per_image: the path that takes, after its inputs, int32 (N,), the flag of each image. None without a flag.
    """

    def __init__(self, flag: int | None, takes: Sequence[str], gives: Sequence[str], last_uses: Iterable[str],
                 full: nn.Module, base: nn.Module, per_image: nn.Module | None) -> None:
        super().__init__()
        self.flag = flag
        self.takes, self.gives, self.last_uses = tuple(takes), tuple(gives), tuple(last_uses)
        self.full, self.base, self.per_image = full, base, per_image
        self._calls = full, base

    def run(self, bypassed: bool, *inputs: Any) -> tuple:
        return self._calls[bypassed](*inputs)

    def compile(self, **options: Any) -> None:
        # Of the functions: each has code of its own, for which alone its compilations count.
        paths = {path: torch.compile(path.forward, **options) for path in (self.full, self.base)}
        self._calls = paths[self.full], paths[self.base]

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_calls": (self.full, self.base)}


@dataclasses.dataclass(frozen=True)
class _Value:
    """Stands for a value in what a forward returns."""

    name: str


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
        state, self.twins = detach(model.eval())
        _check_hooks(model)
        self.flags = {norm: k for k, stage in enumerate(state.plan.flagged) for norm in stage.norms}
        self.stages = {block: k for k, stage in enumerate(state.plan.flagged) for block in stage.blocks}
        self.refinement = {block for stage in state.plan.flagged for block in stage.refinement_blocks}
        self.traced: Traced = trace(model, self.stages)
        without_writes(self.traced)
        for node in self.traced.graph.find_nodes(op="call_method", target="view"):
            node.target = "reshape"  # what is channels-last here has other strides than in the model
        self.bypass = {self.traced.calls[block][1]: self.traced.calls[block][0] for block in self.refinement}
        self.layers: dict[tuple, Layer] = {}
        _, *self.nodes, output = self.traced.graph.nodes
        self.cuts = self._cuts()
        self.result = fx.node.map_arg(output.args[0], lambda node: _Value(node.name))

    def segments(self) -> Iterator[Segment]:
        place = {node: i for i, cut in enumerate(self.cuts) for node in cut.nodes}
        for i, cut in enumerate(self.cuts):
            last = [node for node in cut.takes if all(place.get(user, len(self.cuts)) <= i for user in node.users)]
            full = self._path(cut, FULL)
            base, per_image = full, None
            if cut.flag is not None:
                base, per_image = self._path(cut, BASE), self._path(cut, PER_IMAGE)
            names = [[node.name for node in nodes] for nodes in (cut.takes, cut.gives, last)]
            yield Segment(cut.flag, *names, full, base, per_image)

    def _cuts(self) -> list[_Cut]:
        """The nodes in their order, cut where the flag changes they depend on."""
        cuts: list[tuple[int | None, list[fx.Node]]] = []
        pending: list[fx.Node] = []  # depend on no flag
        for node in self.nodes:
            stage = next((self.stages[path] for path in _owners(node) if path in self.stages), None)
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
        graph.lint()

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


def _check_hooks(model: nn.Module) -> None:
    for name, module in model.named_modules():
        has_hooks = module._forward_hooks or module._forward_pre_hooks
        if has_hooks and not is_norm(module) and any(map(is_norm, module.modules())):
            raise CannotTrace(f"{name or type(module).__name__!r} has forward hooks, which a deploy form would not "
                              "call: remove them before adn.fuse")


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


def _version(tensor: Tensor) -> int:
    # Tensors made in inference mode count nothing.
    return 0 if tensor.is_inference() else tensor._version
