"""A depth for each image of a batch, decided on the device: nothing is compacted, nothing waits for the host.

Where a norm has two sets, each sample takes its own. A refinement block leaves samples alone that bypass it: its
convolutions, linear layers and layer norms skip their work, and what they leave in memory there nobody uses.
"""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import timm.layers
import timm.models.swin_transformer
import timm.models.swin_transformer_v2
import timm.models.vision_transformer
import torch
import torchvision
from torch import Tensor, fx, nn

from adn_kernels import ops
from adn_kernels.epilogue import write_active
from adn_kernels.private import pytree
from adn_kernels.view import memory_format

from ..core.trace import hooked
from .layers import ConvNormAct, conv_shape, is_plain_conv, is_square
from .norms import is_layer_norm


def checked_flags(flags: Tensor, shape: tuple[int, ...], device: torch.device, stacks: int = 0) -> Tensor:
    """Flags as int32 of the given shape, the last `stacks` rows numbers of layers; raises ValueError for anything else.
    """
    if not isinstance(flags, Tensor):
        raise ValueError(f"flags are a {type(flags).__name__}; pass an int32 tensor of shape {shape}")
    if tuple(flags.shape) != shape:
        raise ValueError(f"flags have shape {tuple(flags.shape)}; pass {shape}: one for each "
                         + ("stage and image" if len(shape) == 2 else "image"))
    if flags.device != device:
        raise ValueError(f"flags are on {flags.device}, the images on {device}; where the host knows, pass a list of "
                         "depths instead, one for each image")
    if flags.dtype not in (torch.int32, torch.bool):
        raise ValueError(f"flags are {flags.dtype}; pass int32 or bool")
    entries = (flags != 0).to(torch.int32)
    if stacks:
        entries[-stacks:] = flags[-stacks:]
    return entries.contiguous()


def split_run(run: Callable[..., tuple], inputs: Sequence[Any], entries: Sequence[bool | int]) -> tuple:
    """`run(entry, *inputs)` for the samples of each entry by themselves, and the results in the order of the samples.

    Tensors have the samples in their first axis; other values go to all.
    """
    n = len(entries)
    indices, results = [], []
    device = next(value.device for value in inputs if isinstance(value, Tensor))
    for entry in sorted(set(entries)):
        index = torch.tensor([i for i, own in enumerate(entries) if own == entry]).to(device, non_blocking=True)
        part = []
        for value in inputs:
            if isinstance(value, Tensor) and len(value) != n:
                raise ValueError(f"a batch of {n} images cannot be split: the net hands a tensor of shape "
                                 f"{tuple(value.shape)} from one stage to the next")
            part.append(value[index] if isinstance(value, Tensor) else value)
        indices.append(index)
        results.append(run(entry, *part))

    def merge(first: Any, *others: Any) -> Any:
        if not isinstance(first, Tensor):
            return first
        out = first.new_empty((n, *first.shape[1:]))
        if first.ndim == 4 and first.is_contiguous(memory_format=torch.channels_last):
            out = out.to(memory_format=torch.channels_last)
        for index, part in zip(indices, (first, *others)):
            out[index] = part
        return out

    return pytree.tree_map(merge, *results)


def picked(picks: Tensor, values: Sequence[int], *outputs: Any) -> Any:
    """For each sample the output that belongs to its value.

    Args:
        picks: int32 (N,).
        values: as many as outputs, each a tensor (N, ...) or several in lists. What is none of them counts as the last.
    """
    def pick(*of_values: Tensor) -> Tensor:
        result = of_values[-1]
        for value, output in zip(values[:-1], of_values[:-1], strict=True):
            result = torch.where(_of_samples(picks == value, output), output, result)
        return result

    return pytree.tree_map(pick, *outputs)


def fastest(ways: Mapping[str, Callable[[], object]], device: torch.device, rounds: int = 3) -> str:
    """The name of the one that takes the least time, best of some rounds."""
    best = dict.fromkeys(ways, float("inf"))
    for step in range(-1, rounds):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if step >= 0:
                best[name] = min(best[name], time.perf_counter() - start)
    return min(best, key=best.__getitem__)


class EitherNorm(nn.Module):
    """For each sample one of two norms of any kind; both are computed."""

    def __init__(self, norm: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.norm, self.second = norm, second

    def forward(self, x: Tensor, *, bank: Tensor) -> Tensor:
        return torch.where(_of_samples(bank != 0, x), self.second(x), self.norm(x))


class BypassedBlock(nn.Module):
    """A refinement block that leaves samples alone whose flag is set, bit for bit.

    Args:
        block: the block, (x, ...) -> (y,).
        in_place: whether x may be overwritten.
    """

    def __init__(self, block: fx.GraphModule, in_place: bool) -> None:
        super().__init__()
        self.mask = _Mask()
        self.block = block
        self.in_place = in_place

    def leave_out_work(self) -> None:
        """Let its layers compute those samples only that run it, where they can; once all of them are in place."""
        block, graph = self.block, self.block.graph
        stream = next(iter(graph.nodes))
        result = graph.output_node().args[0][0]
        of_samples = {stream}  # samples lead in these
        for node in graph.nodes:
            if not of_samples.isdisjoint(node.all_input_nodes) and not _moves_samples(node):
                of_samples.add(node)
                module = getattr(block, node.target) if node.op == "call_module" else None
                # Those put in place of layers know no names of arguments.
                if module is not None and (not node.kwargs or isinstance(module, _WITH_LAYERS_ON_SAMPLES)):
                    setattr(block, node.target, _mask(module, self.mask))
        last = getattr(block, result.target) if result.op == "call_module" else None
        if (isinstance(last, _MaskedConv) and len(result.args) == 2 and result.args[1] is stream
                and result.args[0] is not stream):
            # It adds to the stream, which it does not convolve and nothing reads after it.
            last.accumulates = True

    def forward(self, flags: Tensor, x: Tensor, *others: Any) -> Tensor:
        active = self.mask.active = 1 - flags
        out = x if self.in_place else x.clone()
        try:
            y, = self.block(out, *others)
        finally:
            self.mask.active = None
        if y is not out:
            write_active(out, y, active)
        return out


# Modules whose children that are linear layers or convolutions all work on the samples, in their order; others may
# have some that work on a table of positions.
_WITH_LAYERS_ON_SAMPLES = (
    timm.layers.Mlp,
    timm.layers.GlobalResponseNormMlp,
    timm.models.vision_transformer.Attention,
    timm.models.swin_transformer.WindowAttention,
    timm.models.swin_transformer_v2.WindowAttention,
    torchvision.ops.MLP,
)


class _Mask(threading.local):
    """Tells the layers of one block which samples have to be computed, while it runs, in the thread that runs it."""

    active: Tensor | None = None

    def __reduce__(self) -> tuple:
        return _Mask, ()


class _MaskedConv(nn.Module):
    """A fused convolution, or one alone, that computes active samples only."""

    def __init__(self, layer: ConvNormAct | nn.Conv2d, mask: _Mask) -> None:
        super().__init__()
        self.layer = layer
        self.mask = mask
        self.accumulates = False  # into the residual; for a layer that comes last

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        layer = self.layer
        activation = layer.activation if isinstance(layer, ConvNormAct) else "identity"
        conv = layer.source[0] if isinstance(layer, ConvNormAct) else layer
        shape = conv_shape(x, layer.weight, conv.stride, conv.padding, conv.dilation)
        adds = self.accumulates and tuple(residual.shape) == shape
        if len(x) != len(self.mask.active) or (residual is not None and not adds):
            return layer(x) if residual is None else layer(x, residual)
        out = residual if adds else torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=memory_format(x))
        return ops.conv_(out, x, layer.weight, shift=layer.bias, accumulate=adds, activation=activation,
                         stride=conv.stride[0], padding=conv.padding[0], groups=conv.groups, active=self.mask.active)


class _MaskedLinear(nn.Linear):
    """A linear layer that computes active samples only. (Attention may also read its weight directly.)"""

    def __init__(self, linear: nn.Linear, mask: _Mask) -> None:
        self.__dict__.update(linear.__dict__)
        self.mask = mask

    def forward(self, x: Tensor) -> Tensor:
        n = len(self.mask.active)
        if len(x) % n:
            return super().forward(x)
        # Windows of one image are neighbours in the first axis.
        rows = x.reshape(n, -1, x.shape[-1])
        out = x.new_empty((*rows.shape[:-1], self.out_features))
        ops.linear_(out, rows, self.weight, shift=self.bias, active=self.mask.active)
        return out.reshape(*x.shape[:-1], -1)


class _MaskedLayerNorm(nn.Module):
    """A layer norm that computes active samples only."""

    def __init__(self, norm: nn.LayerNorm, mask: _Mask) -> None:
        super().__init__()
        self.norm = norm
        self.mask = mask

    def forward(self, x: Tensor) -> Tensor:
        n = len(self.mask.active)
        if len(x) % n:
            return self.norm(x)
        x = x.contiguous()  # heads of attention are not evenly spaced
        rows = x.reshape(n, -1, x.shape[-1])
        out = torch.empty_like(rows)
        ops.layer_norm_(out, rows, self.norm.weight, self.norm.bias, eps=self.norm.eps, active=self.mask.active)
        return out.reshape(x.shape)


def _mask(module: nn.Module, mask: _Mask) -> nn.Module:
    """A module that computes what `module` does, for active samples; what it cannot leave out it computes for all."""
    if isinstance(module, ConvNormAct) or is_plain_conv(module):
        conv = module.source[0] if isinstance(module, ConvNormAct) else module
        return _MaskedConv(module, mask) if is_square(conv) else module
    if type(module) is nn.Linear and not hooked(module):
        return _MaskedLinear(module, mask)
    if is_layer_norm(module) and not hooked(module):
        return _MaskedLayerNorm(module, mask)
    if isinstance(module, _WITH_LAYERS_ON_SAMPLES):
        module = copy.deepcopy(module, {id(t): t for t in (*module.parameters(), *module.buffers())})
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear or is_plain_conv(child):
                setattr(module, name, _mask(child, mask))
    return module


def _moves_samples(node: fx.Node) -> bool:
    """Does a node give the first axis another place?"""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    axes = node.args[1:] or tuple(node.kwargs.values())
    if axes and isinstance(axes[0], list | tuple):
        axes = tuple(axes[0])
    if name == "permute":
        return axes[0] != 0
    return name in ("transpose", "swapaxes", "movedim", "t", "T") and (0 in axes or not axes)


def _of_samples(flags: Tensor, x: Tensor) -> Tensor:
    """(N,) as it broadcasts against x, (N, ...)."""
    return flags.reshape(-1, *[1] * (x.ndim - 1))
