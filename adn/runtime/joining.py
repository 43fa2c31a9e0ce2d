"""Concatenations without copies: what a layer gives is written where its part of the whole is.

Only where a Triton kernel computes the layer, as it writes to any strides; elsewhere all is concatenated as ever.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, fx, nn

from adn_kernels.view import memory_format

from .layers import ConvNormAct, conv_shape


class Room(nn.Module):
    """Memory for several values side by side in the channels, of the size that one of the layers gives; None where
    layers cannot write to it."""

    def __init__(self, layer: ConvNormAct, channels: int) -> None:
        super().__init__()
        self.__dict__["layer"] = layer
        self.channels = channels

    def forward(self, x: Tensor) -> Tensor | None:
        if not writes(x):
            return None
        n, _, h, w = conv_shape(x, self.layer.source[0].weight, *self.layer.place[:3])
        return torch.empty(n, self.channels, h, w, dtype=x.dtype, device=x.device, memory_format=memory_format(x))


def writes(x: Tensor) -> bool:
    """A compiler lays out concatenations by itself; under autocast layers give another type than they take."""
    return x.is_cuda and not torch.compiler.is_compiling() and not torch.is_autocast_enabled("cuda")


class Joined(nn.Module):
    """The concatenation of the parts, of which some may be where they belong."""

    def forward(self, room: Tensor | None, parts: Sequence[Tensor]) -> Tensor:
        if room is None:
            return torch.cat(list(parts), 1)
        start = 0
        for part in parts:
            own = room.narrow(1, start, part.shape[1])
            if own.data_ptr() != part.data_ptr() or own.stride() != part.stride():
                own.copy_(part)
            start += part.shape[1]
        return room


class _Part(NamedTuple):
    """Consecutive operands of a concatenation.

    Attributes:
        producer: the call of the layer whose output they are; None of what nothing is known.
        channels: of them together; None if not known.
    """

    producer: fx.Node | None
    channels: int | None


def join(path: fx.GraphModule) -> None:
    """Of a path whose calls are fused, in place: layers write to their part of what is concatenated."""
    taken: set[fx.Node] = set()
    order = {node: i for i, node in enumerate(path.graph.nodes)}
    for cat in path.graph.find_nodes(op="call_function", target=torch.cat):
        operands, dim = (*cat.args, *cat.kwargs.values(), 0)[:2]
        layer = next((m for m in (_layer(path, user) for user in cat.users) if m is not None), None)
        if dim != 1 or layer is None or not isinstance(operands, list | tuple):
            continue
        total = layer.source[0].in_channels
        parts = _parts(path, operands)
        unknown = [part for part in parts if part.channels is None]
        rest = total - sum(part.channels or 0 for part in parts)
        if len(unknown) > 1 or rest < 0 or (rest == 0) != (not unknown):
            continue
        starts, start = [], 0
        for part in parts:
            starts.append(start)
            start += rest if part.channels is None else part.channels
        able = [(part.producer, at) for part, at in zip(parts, starts, strict=True)
                if part.producer is not None and part.producer not in taken]
        if not able:
            continue
        first = min((producer for producer, _ in able), key=order.__getitem__)
        name = f"{cat.name}_room"
        setattr(path, name, Room(_layer(path, first), total))
        with path.graph.inserting_before(first):
            room = path.graph.call_module(name, first.args[:1])
        for producer, at in able:
            taken.add(producer)
            producer.kwargs = {**producer.kwargs, "into": (room, at)}
        setattr(path, f"{cat.name}_joined", Joined())
        with path.graph.inserting_before(cat):
            cat.replace_all_uses_with(path.graph.call_module(f"{cat.name}_joined", (room, operands)))
        path.graph.erase_node(cat)


def _layer(path: fx.GraphModule, node: fx.Node) -> ConvNormAct | None:
    module = getattr(path, node.target) if node.op == "call_module" else None
    return module if isinstance(module, ConvNormAct) and "bank" not in node.kwargs else None


def _parts(path: fx.GraphModule, operands: Sequence[fx.Node]) -> list[_Part]:
    """Operands, with all parts of a split layer as one where they stand in their order."""
    parts: list[_Part] = []
    rest = list(operands)
    while rest:
        layer = _layer(path, rest[0])
        if layer is not None:
            parts.append(_Part(rest.pop(0), layer.source[0].out_channels))
            continue
        split = rest[0].args[0] if rest[0].target is operator.getitem else None
        whole = split.args[0] if split is not None and split.target in ("chunk", "split", torch.chunk) else None
        if isinstance(whole, fx.Node) and (layer := _layer(path, whole)) is not None:
            pieces = sorted((user for user in split.users if user.target is operator.getitem), key=lambda n: n.args[1])
            if rest[: len(pieces)] == pieces and [n.args[1] for n in pieces] == [*range(len(pieces))]:
                parts.append(_Part(whole, layer.source[0].out_channels))
                del rest[: len(pieces)]
                continue
        parts.append(_Part(None, None))
        rest.pop(0)
    return parts
