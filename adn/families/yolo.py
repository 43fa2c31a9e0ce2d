"""YOLOv12, this library's and others': layers that concatenate what their blocks make, told by the names of classes.

Each such layer is a stage; a convolution between two of them switches its norm with the next. Where a layer has some
blocks, the last are left out and what comes after reads fewer channels; else, or where the model says so (`split`),
each is shortened: a C3k by its last bottlenecks, a pair of attention blocks by the second.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from ..core.behaviours import is_norm
from ..core.errors import ConversionError
from ..core.kinds.narrow import NarrowPlan
from ..core.kinds.stage import StagePlan, is_inside
from . import family

# Layers of blocks, and how many tensors they concatenate besides the blocks' outputs.
LAYERS = {"C3k2": 2, "A2C2f": 1}
OWN_KERNEL = 4  # blocks of a layer of attention, from which on what reads fewer channels has a kernel of its own


@family()
def yolo(model: nn.Module) -> list[StagePlan]:
    found: list[StagePlan] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Sequential | nn.ModuleList) and any(map(_is_layer, module)):
            if not any(map(is_norm, module.modules())):
                raise ConversionError(f"the layers of {name or 'this model'!r} have no norms: they have been folded "
                                      "into the convolutions (fused). Convert the model as it is before that")
            owner = model.get_submodule(name.rpartition(".")[0])
            found += _stages(model, name, module, getattr(owner, "split", None))
    return found


def _is_layer(module: nn.Module) -> bool:
    return type(module).__name__ in LAYERS and isinstance(getattr(module, "m", None), nn.ModuleList)


def _stages(model: nn.Module, container: str, layers: nn.Module, split: str | None) -> Iterator[StagePlan]:
    between: list[str] = []  # norms of convolutions since the last layer of blocks
    begun = False
    for index, layer in layers.named_children():
        name = f"{container}.{index}" if container else index
        if not _is_layer(layer):
            if begun and type(layer).__name__ == "Conv":
                between += _norms(model, name)
            continue
        stages = _of_layer(model, name, layer, split)
        if stages:
            stages[0].norms = [*between, *stages[0].norms]
        yield from stages
        between, begun = [], True


def _of_layer(model: nn.Module, name: str, layer: nn.Module, split: str | None) -> list[StagePlan]:
    """The stages of a layer, of one flag; none if nothing in it can be left out, unless the model says how to split."""
    kind, blocks = type(layer).__name__, [f"{name}.m.{i}" for i in range(len(layer.m))]
    essential = _half(blocks)
    if essential < len(blocks) and not (kind == "C3k2" and split == "inside"):
        read, conv = layer.cv2.conv.in_channels, f"{name}.cv2.conv"
        made = read // (LAYERS[kind] + len(blocks))
        return [NarrowPlan(
            name, blocks, essential, _norms(model, name, but=blocks[essential:]), flag=name, module=name, conv=conv,
            inputs=read - made * (len(blocks) - essential), own=kind == "A2C2f" and len(blocks) >= OWN_KERNEL)]
    stages = []
    for block in blocks:
        inner = _inner(model, block)
        essential = _half(inner)
        if essential < len(inner):
            stages.append(StagePlan(block, inner, essential, _norms(model, block, but=inner[essential:]), flag=name))
    if stages:
        stages[0].norms = [*_norms(model, name, but=blocks), *stages[0].norms]
    elif split is not None:  # nothing is saved, but norms switch
        stages = [StagePlan(name, blocks, len(blocks), _norms(model, name), flag=name)]
    return stages


def _half(blocks: list[str]) -> int:
    return (len(blocks) + 1) // 2


def _inner(model: nn.Module, block: str) -> list[str]:
    """The residual blocks that a block runs one after the other."""
    module = model.get_submodule(block)
    if type(module).__name__ == "C3k":
        return [f"{block}.m.{i}" for i in range(len(module.m))]
    return [f"{block}.{i}" for i in range(len(module))] if isinstance(module, nn.Sequential) else []


def _norms(model: nn.Module, name: str, but: list[str] | tuple[str, ...] = ()) -> list[str]:
    return [f"{name}.{inner}" for inner, module in model.get_submodule(name).named_modules() if is_norm(module)
            and not any(is_inside(f"{name}.{inner}", other) for other in but)]
