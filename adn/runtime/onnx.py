"""One ONNX file for every depth.

The cut net is exported once with all paths in it, one after the other, and `Where` between what they give; in the file
each of these becomes an `If`, into whose branches go the nodes that nothing else uses. Weights stay outside of the
branches, each stored once.

Where a segment switches batch norms, its branches are its two paths: runtimes fold the norms into the convolutions of
each when they load the file. Where it switches other norms, its essential path is there once, with the parameters of
its norms chosen by `Where`, and there are branches around refinement blocks alone: matrix products in branches would
not be packed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import random
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from adn_kernels.deformable_attention import deformable_attention_reference
from adn_kernels.private import pytree

from ..core.behaviours import check_filled
from ..core.depth import Depth
from ..core.files import atomic_write
from ..core.progress import progress_bar
from ..core.state import DepthLike, at_depth, stages, state_of, unwrap
from ..core.state import depths as all_depths
from ..core.trace import CannotTrace
from ..export.extract import extract
from ..measure.passes import evaluating
from ..models.registry import deploy_of, interface_of
from .cut import Segment, cut, filled
from .per_image import BypassedBlock, EitherNorm

DEPTH = "depth"  # the second input of a file
OPSET = 20
MOST_CHECKED = 64
# Ops of this library that nets call themselves, which the exporter does not know.
_IN_PLAIN_PYTORCH = {
    torch.ops.adn.deformable_attention.default: lambda *args: deformable_attention_reference(*args[:4])}
# A difference up to this is none, in parts of the largest value of an output, or absolute where that is below 1.
_TOLERANCE = 1e-4
_LARGEST = 2**31  # bytes of a file without others
_EXTRA = 'pip install "adn[onnx]"'


def export_onnx(net: nn.Module, path: str | os.PathLike[str], example: Tensor, *, depth: DepthLike | None = None,
                dynamic_batch: bool = True, opset: int = OPSET, extra: Mapping[str, Any] | None = None,
                progress: bool = True) -> dict[Depth, float]:
    """Write a net to an ONNX file that holds every depth, and compare it with the net at each of them, in ONNX Runtime.

    The file has two inputs: `images`, and `depth`, bool (flags,), True where the refinement path of a stage is
    bypassed; of a net with a stack of layers int32 (flags + stacks,), its last entries after how many layers to end.
    A depth is thus chosen with every run. Its properties `adn.depths`, `adn.stages`, `adn.classes`, ... say what it
    holds, as JSON.

    Args:
        net: a converted net in evaluation mode, on the CPU.
        path: of the file; it is there once it has been checked, and what was there before stays if that fails.
        example: images (B, ...), of which 0 < B; what is checked, and the size that the file is for.
        depth: write this one alone, without the second input.
        dynamic_batch: take batches of any size; else of that of the example.
        opset: of ONNX, 18 or later.
        extra: further properties, such as the `data` of a checkpoint; values become JSON.
        progress: show how many depths have been compared.

    Returns:
        By depth the largest difference, of all, or of 64 of them where there are more.

    Raises:
        ImportError: without onnx, onnxscript and onnxruntime.
        ValueError: if the net is not any-depth, in training mode or not on the CPU, has not this depth, cannot be
            traced, or differs from its file; on an example or an opset that does not fit.
        OSError: if the file cannot be written.
    """
    require_onnx()
    model, chosen = unwrap(net), None if depth is None else Depth.parse(depth, (state_of(net).full, state_of(net).base))
    _check(model, example, opset)
    form = deploy_of(model)
    if form.part:
        raise ValueError(f"a {type(model).__name__} cannot be written to ONNX by this library: what it does depends on "
                         "values; export its deploy form's parts by hand, or use adn.Engine")
    source = model if form.model is None else form.model
    try:
        inside = extract(source, chosen).eval() if chosen is not None else _Everything(source)
    except CannotTrace as error:
        raise ValueError(f"{error}. What torch.fx does not follow torch.export may: write each depth to a file of its "
                         "own, depth=") from error
    names = _names_of(source, example)
    file = _exported(inside, example, None if chosen is not None else _entries(state_of(source).full), names,
                     dynamic_batch, opset)
    if chosen is None:
        _branch(file)
    _store_once(file)
    _describe(file, net, source, example, chosen, extra or {})
    with atomic_write(path) as temporary:
        _write(file, temporary)
        return _compare(temporary, source, example, [chosen] if chosen is not None else all_depths(source), names,
                        chosen is None, dynamic_batch, progress)


def require_onnx() -> None:
    """Raise ImportError, saying what to install, where files can neither be written nor compared."""
    for package in ("onnx", "onnxscript", "onnxruntime"):
        try:
            __import__(package)
        except ImportError as error:
            raise ImportError(f"ONNX files need {package}: {_EXTRA}") from error


def entries_of(depth: Depth) -> Any:
    """What the input `depth` of a file takes for a depth, a numpy array."""
    return _entries(depth).numpy()


def _entries(depth: Depth) -> Tensor:
    whole = any(not isinstance(entry, bool) for entry in depth)
    return torch.tensor([int(entry) for entry in depth] if whole else [*depth],
                        dtype=torch.int32 if whole else torch.bool)


def _check(model: nn.Module, example: Tensor, opset: int) -> None:
    if any(module.training for module in model.modules()):
        raise ValueError("an ONNX file is for inference: call net.eval() first")
    for module in model.modules():
        check_filled(module)
    if not isinstance(example, Tensor) or example.ndim < 2 or not len(example):
        raise ValueError("pass a batch of images as the example, (B, 3, H, W) with at least one")
    if devices := {p.device.type for p in model.parameters()} - {"cpu"}:
        raise ValueError(f"the net is on {devices.pop()}; files are written on the CPU: net.cpu()")
    if opset < 18:
        raise ValueError(f"opset={opset}; pass 18 or later")


# ---------------------------------------------------------------------------------------------------------- the program


class _Everything(nn.Module):
    """All paths of a cut net, one after the other."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        segments, self.result = cut(net)
        self.segments = nn.ModuleList(segments)
        self.once = [_essential_once(segment) for segment in segments]
        self.eval()

    def forward(self, images: Tensor, depth: Tensor) -> Any:
        values: dict[str, Any] = {self.segments[0].takes[0]: images}
        for segment, once in zip(self.segments, self.once, strict=True):
            inputs = [values[name] for name in segment.takes]
            if segment.flag is None:
                outputs = segment.run(False, *inputs)
            elif once:
                outputs = segment.per_image(*inputs, depth[segment.flag].to(torch.bool))
            else:
                outputs = _chosen(segment, depth[segment.flag], inputs)
            values.update(zip(segment.gives, outputs, strict=True))
        return filled(self.result, values)


def _chosen(segment: Segment, entry: Tensor, inputs: Sequence[Any]) -> Any:
    """Of all paths what that of the entry gives."""
    *others, last = segment.entries
    if isinstance(last, bool):
        others, last = [True], False
    found = segment.run(last, *inputs)
    for value in reversed(others):
        wanted = entry.to(torch.bool) if isinstance(value, bool) else entry <= value
        found = pytree.tree_map(lambda a, b, wanted=wanted: torch.where(wanted, a, b), segment.run(value, *inputs),
                                found)
    return found


def _essential_once(segment: Segment) -> bool:
    """Make the path for each image of a segment one for an entry of all, if that is the better form."""
    path = segment.per_image
    if segment.flag is None or not isinstance(path, fx.GraphModule):
        return False
    children = dict(path.named_children())
    norms = [child for child in children.values() if isinstance(child, EitherNorm)]
    blocks = [child for child in children.values() if isinstance(child, BypassedBlock)]
    if not blocks or any(dict(norm.norm.named_buffers()) for norm in norms):
        return False
    for name, child in children.items():
        if isinstance(child, EitherNorm):
            setattr(path, name, _EitherParameters(child))
        elif isinstance(child, BypassedBlock):
            setattr(path, name, _Skipped(child.block))
    return True


class _EitherParameters(nn.Module):
    """One norm, with the parameters of one or the other of two."""

    def __init__(self, either: EitherNorm) -> None:
        super().__init__()
        self.norm, self.second = either.norm, either.second

    def forward(self, x: Tensor, *, bank: Tensor) -> Tensor:
        others = dict(self.second.named_parameters())
        parameters = {name: torch.where(bank, others[name], own) for name, own in self.norm.named_parameters()}
        return torch.func.functional_call(self.norm, parameters, (x,))


class _Skipped(nn.Module):
    """A refinement block that may be left out."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, bypass: Tensor, x: Tensor, *others: Any) -> Tensor:
        y, = self.block(x, *others)
        return torch.where(bypass, x, y)


def _names_of(net: nn.Module, example: Tensor) -> dict[str, Any]:
    """What outputs are called in the file, by how to find them in what the net gives."""
    with evaluating(net), torch.no_grad():
        found = net(example)
    if isinstance(found, Tensor):
        return {"logits": ()}
    names: dict[str, Any] = {}

    def look(value: Any, place: tuple) -> None:
        if isinstance(value, Tensor):
            names["_".join(map(str, place))] = place
        elif isinstance(value, Mapping | list | tuple):
            for key in value if isinstance(value, Mapping) else range(len(value)):
                look(value[key], (*place, key))

    look(found, ())
    return names


def _at(value: Any, place: tuple) -> Tensor:
    for key in place:
        value = value[key]
    return value


def _exported(module: nn.Module, example: Tensor, entries: Tensor | None, names: Mapping[str, Any],
              dynamic_batch: bool, opset: int) -> Any:
    """As a model of onnx, its constants folded."""
    import onnxscript.optimizer

    # One is a size of its own to torch.export.
    batch = torch.cat((example, example)) if dynamic_batch and len(example) == 1 else example
    shapes = {0: torch.export.Dim("batch")} if dynamic_batch else None
    inputs = {"images": batch} if entries is None else {"images": batch, DEPTH: entries}
    try:
        with torch.no_grad(), _quiet():
            traced = torch.export.export(module, tuple(inputs.values()), strict=False,
                                         dynamic_shapes=(shapes, *(() if entries is None else (None,))))
            program = torch.onnx.export(
                traced.run_decompositions(_IN_PLAIN_PYTORCH), dynamo=True, opset_version=opset, input_names=[*inputs],
                output_names=[*names], optimize=False, verbose=False)
            onnxscript.optimizer.fold_constants(program.model)
    except Exception as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(f"this net cannot be exported: {reason[0]}. Is it the size of the batch? Then pass "
                         "dynamic_batch=False") from error
    return program.model_proto


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what the exporters note and warn of."""
    loggers = {logger: logger.level for logger in map(logging.getLogger, ("torch.onnx", "onnxscript"))}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in loggers.items():
                logger.setLevel(level)


# ------------------------------------------------------------------------------------------------------------- the file


def _branch(file: Any) -> None:
    """Make `If` of each `Where` whose condition is an entry of the depth, and which is between what was computed."""
    graph = file.graph
    _drop_unused(graph)
    constant = {initializer.name for initializer in graph.initializer}
    chosen_by: dict[str, str] = {}  # values that are made of the depth alone
    groups: dict[str, list[set[str]]] = {}  # by condition; of those none is made of another
    after: dict[str, set[str]] = {}  # which of them a value is made of
    for node in graph.node:
        if constant.issuperset(filter(None, node.input)):
            constant.update(node.output)
        elif all(name in constant or name in chosen_by or name == DEPTH for name in node.input if name) and any(
                name == DEPTH or name in chosen_by for name in node.input):
            chosen_by.update(dict.fromkeys(node.output, DEPTH))
        before = set().union(*(after.get(name, ()) for name in node.input))
        if node.op_type == "Where" and node.input[0] in chosen_by and not constant.issuperset(node.input[1:]):
            own = groups.setdefault(node.input[0], [])
            if not own or not own[-1].isdisjoint(before):
                own.append(set())
            own[-1].add(node.output[0])
            before.add(node.output[0])
        if before:
            after.update(dict.fromkeys(node.output, before))
    for condition, own in groups.items():
        for outputs in own:
            _make_if(graph, condition, [node for node in graph.node if outputs.issuperset(node.output)])


def _drop_unused(graph: Any) -> None:
    needed, kept = {output.name for output in graph.output}, []
    for node in reversed(graph.node):
        if not needed.isdisjoint(node.output):
            needed.update(_reads(node))
            kept.append(node)
    del graph.node[:]
    graph.node.extend(reversed(kept))


def _make_if(graph: Any, condition: str, wheres: Sequence[Any]) -> None:
    from onnx import helper

    outputs = {output.name for output in graph.output}
    users: dict[str, list[Any]] = {}
    for node in graph.node:
        for name in _reads(node):
            users.setdefault(name, []).append(node)
    branches = []
    for place in (1, 2):
        last = {id(where) for where in wheres}
        mine: dict[int, Any] = {}
        ends = {where.input[place] for where in wheres}

        def inside(name: str, last: set[int] = last, mine: dict[int, Any] = mine, ends: set[str] = ends,
                   place: int = place) -> bool:
            """Does nothing but this branch use it?"""
            return name not in outputs and all(
                id(user) in mine or (id(user) in last and name in ends and name not in (user.input[0],
                                                                                        user.input[3 - place]))
                for user in users.get(name, ()))

        for node in reversed(graph.node):
            if id(node) not in last and all(map(inside, node.output)):
                mine[id(node)] = node
        branches.append([node for node in graph.node if id(node) in mine])
    bodies = []
    for place, nodes in zip((1, 2), branches, strict=True):
        made = {name for node in nodes for name in node.output}
        body, results = [*nodes], []
        for where in wheres:
            name = where.input[place]
            if name not in made or name in results:  # a branch may only give what is made in it, and once
                body.append(helper.make_node("Identity", [name], [f"{where.output[0]}_{place}"]))
                name = f"{where.output[0]}_{place}"
            results.append(name)
        bodies.append(helper.make_graph(body, f"{wheres[0].output[0]}_{place}", [], [
            helper.make_empty_tensor_value_info(name) for name in results]))
    chosen = helper.make_node("If", [condition], [where.output[0] for where in wheres], name=f"{wheres[0].name}_if",
                              then_branch=bodies[0], else_branch=bodies[1])
    gone = {id(node) for nodes in branches for node in nodes} | {id(where) for where in wheres}
    kept, end = [], id(wheres[-1])
    for node in graph.node:
        if id(node) == end:
            kept.append(chosen)
        elif id(node) not in gone:
            kept.append(node)
    del graph.node[:]
    graph.node.extend(kept)


def _reads(node: Any) -> list[str]:
    """All values that a node uses, those of its branches included."""
    found = [*node.input]
    for attribute in node.attribute:
        if attribute.HasField("g"):
            made = {name for inner in attribute.g.node for name in inner.output}
            found += [name for inner in attribute.g.node for name in _reads(inner) if name not in made]
            found += [output.name for output in attribute.g.output if output.name not in made]
    return found


def _store_once(file: Any) -> None:
    """Of equal constants one; those that nothing uses go, as does what the exporter notes of where nodes come from."""
    graph, first, names = file.graph, {}, {}
    for initializer in graph.initializer:
        content = initializer.raw_data or initializer.SerializeToString()
        key = initializer.data_type, tuple(initializer.dims), hashlib.sha256(content).digest()
        names[initializer.name] = first.setdefault(key, initializer.name)

    def rename(nodes: Any) -> None:
        for node in nodes:
            node.ClearField("metadata_props")
            node.ClearField("doc_string")
            for i, name in enumerate(node.input):
                node.input[i] = names.get(name, name)
            for attribute in node.attribute:
                if attribute.HasField("g"):
                    rename(attribute.g.node)

    rename(graph.node)
    used = {name for node in graph.node for name in _reads(node)}
    kept = [initializer for initializer in graph.initializer if initializer.name in used]
    del graph.initializer[:]
    graph.initializer.extend(kept)
    del graph.value_info[:]


def _describe(file: Any, net: nn.Module, source: nn.Module, example: Tensor, chosen: Depth | None,
              extra: Mapping[str, Any]) -> None:
    from .. import __version__

    state = state_of(net)
    values = {
        "version": __version__, "model": type(source).__name__, "classes": state.class_names,
        "input": [*example.shape[1:]], "stages": [stage.name for stage in stages(net)],
        "depths": [str(chosen)] if chosen is not None else [str(state.full), str(state.base)], **extra}
    for name, value in values.items():
        entry = file.metadata_props.add()
        entry.key, entry.value = f"adn.{name}", json.dumps(value)


def _write(file: Any, path: Path) -> None:
    import onnx

    if file.ByteSize() >= _LARGEST:
        raise ValueError(f"the file would have {file.ByteSize() / 1e9:.1f} GB, of which protobuf allows 2")
    onnx.save(file, os.fspath(path))


def _compare(path: Path, net: nn.Module, example: Tensor, depths: Sequence[Depth], names: Mapping[str, Any],
             takes_depth: bool, dynamic_batch: bool, progress: bool) -> dict[Depth, float]:
    """The largest difference at each depth, of the example, and of its first image alone."""
    import onnxruntime

    onnxruntime.set_default_logger_severity(3)
    interface = interface_of(net)
    session = onnxruntime.InferenceSession(os.fspath(path), providers=["CPUExecutionProvider"])
    if len(depths) > MOST_CHECKED:
        depths = [depths[0], *random.Random(0).sample(depths[1:-1], MOST_CHECKED - 2), depths[-1]]
    batches = [example] if not dynamic_batch else [torch.cat((example, example.flip(0))), example[:1]]
    found: dict[Depth, float] = {}
    for depth in progress_bar(depths, desc="compare", unit="depth", show=progress):
        worst = 0.0
        for batch in batches:
            inputs = {"images": batch.numpy()} | ({DEPTH: entries_of(depth)} if takes_depth else {})
            given = dict(zip(names, map(torch.from_numpy, session.run([*names], inputs)), strict=True))
            with evaluating(net), at_depth(net, depth), torch.no_grad():
                outputs = net(batch)
            wanted = {name: _at(outputs, place) for name, place in names.items()}
            if hasattr(interface, "comparable"):
                given, wanted = interface.comparable(given, wanted)
            for name, reference in wanted.items():
                difference = (given[name].double() - reference.double()).abs().max().item()
                worst = max(worst, difference / max(1.0, reference.abs().max().item()))
        if not worst <= _TOLERANCE:
            raise ValueError(f"the file gives something else than the net at depth {depth}: a difference of {worst:.2g}"
                             f" of the largest value, where {_TOLERANCE:g} is allowed. It has not been written")
        found[depth] = worst
    return found
