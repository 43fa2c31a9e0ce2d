"""A converted net in eval mode as a list of segments: its traced forward, cut where it depends on another flag.

Each segment has a path for each value of its flag, and one that takes the flag of each image. They compute what the
modules of the net do, call by call: what can be one call `fusing` puts together, and `fuse.FusedNet` runs the result.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import fx, nn

from adn_kernels import private

from ..convert import detach
from ..core.behaviours import is_norm
from ..core.kinds import part_in_form
from ..core.regions import choices_in, is_one_region
from ..core.trace import (
    CannotTrace,
    Traced,
    activation_of,
    activation_of_module,
    addition_of,
    nothing_in_eval,
    trace,
    without_writes,
)
from ..export.extract import unwrap_blocks
from .per_image import BypassedBlock, EitherNorm, picked

FULL, BASE, PER_IMAGE = "full", "base", "per image"


def cut(net: nn.Module) -> tuple[list[Segment], Any]:
    """The segments of a converted net in the order in which they run, and what its forward returns, with a `Value` in
    place of each that a segment gives. They share the parameters of the net.

    Raises:
        CannotTrace: saying why.
    """
    builder = _Builder(net)
    return list(builder.segments()), builder.result


def one_path(module: nn.Module) -> Segment:
    """A module of one input that depends on no depth, as a segment; it shares the parameters.

    Raises:
        CannotTrace: saying why.
    """
    _check_hooks(module)
    return Segment(None, ["x"], ["y"], ["x"], {False: _part(_Returning(module))}, None)


class _Returning(nn.Module):
    """What a module gives, as what a segment does."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.training = False

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
        return self.module(x),


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


class _Piece(NamedTuple):
    """Consecutive nodes; what they take from others, and what others take from them."""

    flag: int | None
    nodes: list[fx.Node]
    takes: list[fx.Node]
    gives: list[fx.Node]

    @classmethod
    def of(cls, flag: int | None, nodes: list[fx.Node]) -> _Piece:
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
        regions = {name: choices_in(module)[0] for name, module in model.named_modules() if is_one_region(module)}
        state, self.twins = detach(model.eval())
        _check_hooks(model)
        parts = state.plan.parts
        self.wholes = {kind.whole: (k, kind) for k, kind in parts if kind.whole}
        self.flags = {name: k for k, kind in parts for name in kind.seconds}
        stages = {unit: k for k, kind in parts for unit in kind.units if unit not in self.wholes}
        # What lies between stages of one flag, too.
        self.inside = stages | {name: state.choices.index(choice) for name, choice in regions.items()}
        self.refinement = {name for _, kind in parts for name in kind.form(kind.base).bypassed}
        self.traced = _traced(model, stages, self.wholes)
        self.bypass = {self.traced.calls[block][1]: self.traced.calls[block][0] for block in self.refinement}
        self.modules = dict(self.traced.root.named_modules())
        _, *self.nodes, output = self.traced.graph.nodes
        self.pieces = self._pieces()
        self.result = fx.node.map_arg(output.args[0], lambda node: Value(node.name))

    def segments(self) -> Iterator[Segment]:
        place = {node: i for i, piece in enumerate(self.pieces) for node in piece.nodes}
        for i, piece in enumerate(self.pieces):
            last = [node for node in piece.takes if all(place.get(user, len(self.pieces)) <= i for user in node.users)]
            names = [[node.name for node in nodes] for nodes in (piece.takes, piece.gives, last)]
            if piece.nodes[0].target in self.wholes:
                yield Segment(piece.flag, *names, *self._whole(piece))
            elif piece.flag is None:
                yield Segment(None, *names, {False: self._path(piece, FULL)}, None)
            else:
                yield Segment(piece.flag, *names, {False: self._path(piece, FULL), True: self._path(piece, BASE)},
                              self._path(piece, PER_IMAGE))

    def _pieces(self) -> list[_Piece]:
        """The nodes in their order, cut where the flag changes they depend on."""
        pieces: list[tuple[int | None, list[fx.Node]]] = []
        pending: list[fx.Node] = []  # depend on no flag
        for node in self.nodes:
            if node.target in self.wholes:
                # Alone: its paths are traced by themselves.
                pieces += [(None, pending)] * bool(pending) + [(self.wholes[node.target][0], [node])]
                pending = []
                continue
            stage = next((self.inside[path] for path in _owners(node) if path in self.inside), None)
            flag = stage if stage is not None else self.flags.get(node.target)
            if flag is None and not pending and pieces and self._follows(node, pieces[-1][1][-1]):
                pieces[-1][1].append(node)
                continue
            if flag is None:
                pending.append(node)
                continue
            if not pieces or pieces[-1][0] != flag:
                # What leads to a switched norm outside of a stage has to be with it, to become one call. Other work
                # must not be in two paths for nothing.
                if stage is not None and any(waiting.op == "call_module" for waiting in pending):
                    pieces.append((None, pending))
                    pending = []
                pieces.append((flag, []))
            pieces[-1][1].extend([*pending, node])
            pending = []
        if pending:
            pieces.append((None, pending))
        return [_Piece.of(flag, nodes) for flag, nodes in pieces]

    def _follows(self, node: fx.Node, last: fx.Node) -> bool:
        """Is it the activation after a switched norm, with which it becomes one call?"""
        return (last.target in self.flags and node.all_input_nodes == [last] and len(last.users) == 1
                and activation_of(node, self.modules) is not None)

    def _path(self, piece: _Piece, which: str) -> fx.GraphModule:
        graph = fx.Graph()
        env = {node: graph.placeholder(node.name) for node in piece.takes}
        flags = graph.placeholder("flags") if which == PER_IMAGE else None
        modules: dict[str, Any] = {}

        def value(node: fx.Node) -> fx.Node:
            while node not in env and node in self.bypass:
                node = self.bypass[node]
            if node not in env:
                raise CannotTrace(f"a value inside a block that can be bypassed is used outside of it ({node.name})")
            return env[node]

        blocks: dict[str, list[fx.Node]] = {}
        for node in piece.nodes:
            block = next(iter(self.refinement & _owners(node)), None)
            if block is not None and which == BASE:
                continue
            if block is not None and which == PER_IMAGE:
                nodes = blocks.setdefault(block, [])
                nodes.append(node)
                if node is self.traced.calls[block][1]:
                    modules[name := block.replace(".", "_")] = self._block(block, nodes)
                    env[node] = graph.call_module(name, (flags, *map(value, self._block_takes(block, nodes))))
                continue
            copied = env[node] = _copy(node, graph, value, self.traced.root, modules)
            twin = self.twins[node.target] if node.target in self.flags and which != FULL else None
            if twin is not None and which == BASE:
                copied.target += "_skip"
                modules[copied.target] = twin
            elif twin is not None:
                if len(node.args) != 1 or node.kwargs:
                    raise CannotTrace(f"the norm {node.target!r} is not called with its input alone, by position")
                modules[copied.target] = EitherNorm(modules[copied.target], twin)
                copied.kwargs = {"bank": flags}
        graph.output(tuple(value(node) for node in piece.gives))
        return fx.GraphModule(modules, graph, class_name="Path")

    def _block(self, block: str, nodes: list[fx.Node]) -> BypassedBlock:
        """A refinement block that leaves samples alone whose flag is set."""
        stream, output = self.traced.calls[block]
        path = self._path(_Piece(None, nodes, self._block_takes(block, nodes), [output]), FULL)
        return BypassedBlock(path, in_place=self._is_free(stream, nodes))

    def _block_takes(self, block: str, nodes: list[fx.Node]) -> list[fx.Node]:
        """The residual stream first."""
        stream = self.traced.calls[block][0]
        return [stream, *(node for node in _Piece.of(None, nodes).takes if node is not stream)]

    def _whole(self, piece: _Piece) -> tuple[dict[bool | int, fx.GraphModule], fx.GraphModule]:
        """The paths of a part whose own forward depends on its choice, and that which takes the value for each image:
        by the part's method `per_image` if it has one, else by running it at all of them."""
        node, = piece.nodes
        kind = self.wholes[node.target][1]
        whole, *fewer = kind.values(self.traced.root)
        variants = {value: part_in_form(self.traced.root, node.target, kind.form(value), self.twins)
                    for value in sorted((whole, *fewer))}
        count = len(node.args)
        parts = {value: _part(variant, arguments=count) for value, variant in variants.items()}
        paths = {value: self._call(piece, [part]) for value, part in parts.items()}
        if hasattr(variants[whole], "per_image"):
            each = _part(variants[whole], method="per_image", arguments=count + 1)
            return paths, self._call(piece, [each], takes_picks=True)
        return paths, self._call(piece, list(parts.values()), tuple(map(int, parts)))

    def _call(self, piece: _Piece, parts: list[fx.GraphModule], values: tuple[int, ...] = (), takes_picks: bool = False
              ) -> fx.GraphModule:
        """A path of one call: of a part, or of all, from which the value for each image picks."""
        node, = piece.nodes
        graph = fx.Graph()
        env = {taken: graph.placeholder(taken.name) for taken in piece.takes}
        args = fx.node.map_arg(node.args, env.__getitem__)
        picks = (graph.placeholder("picks"),) if values or takes_picks else ()
        outputs = [graph.call_module(f"part{i}", (*args, *picks) if takes_picks else args) for i in range(len(parts))]
        if values:
            outputs = [graph.call_function(picked, (*picks, values, *outputs))]
        graph.output((outputs[0],))
        return fx.GraphModule({f"part{i}": part for i, part in enumerate(parts)}, graph, class_name="Path")

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


def _part(module: nn.Module, **options: Any) -> fx.GraphModule:
    traced = _traced(module, **options)
    graph, env, modules = fx.Graph(), {}, {}
    for node in traced.graph.nodes:
        private.forget_annotations(node)
        env[node] = _copy(node, graph, env.__getitem__, traced.root, modules)
    return fx.GraphModule(modules, graph, class_name="Part")


def _copy(node: fx.Node, graph: fx.Graph, value: Callable[[fx.Node], fx.Node], root: nn.Module, modules: dict[str, Any]
          ) -> fx.Node:
    """A node in another graph, which finds what it calls or reads among `modules`."""
    copied = graph.node_copy(node, value)
    if node.op in ("call_module", "get_attr"):
        copied.target = node.target.replace(".", "_")
        modules[copied.target] = _attribute(root, node.target)
    return copied


def _traced(module: nn.Module, watched: Collection[str] = (), leaves: Collection[str] = (), **options: Any) -> Traced:
    traced = trace(module, watched, leaves, sequences=True, **options)
    without_writes(traced)
    for node in traced.graph.find_nodes(op="call_method", target="view"):
        node.target = "reshape"  # what is channels-last here has other strides than in the model
    return traced


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
