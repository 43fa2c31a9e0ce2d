"""The paths of a cut net with chains of calls put together, each as one layer of the deploy form."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

from torch import fx, nn

from ..core.trace import addition_of, hooked, nothing_in_eval
from .cut import Segment
from .joining import join
from .layers import AddLayerNorm, ConvNormAct, Layer, NormAct, RepConvNormAct, is_plain_conv, split_norm
from .match import chain_of, sum_before
from .norms import is_layer_norm
from .per_image import BypassedBlock, EitherNorm


def fuse_calls(segments: Iterable[Segment]) -> None:
    """Of all paths, in place: convolution, norm, addition and activation become one call; so do an addition and the
    layer norm of the sum."""
    fusing = _Fusing()
    for segment in segments:
        for path in (*segment.paths, segment.per_image):
            if path is not None:
                fusing.fuse(path)


class _Fusing:
    def __init__(self) -> None:
        self.layers: dict[tuple, Layer] = {}
        self.done: set[nn.Module] = set()

    def fuse(self, path: fx.GraphModule, joins: bool = True) -> None:
        if path in self.done:
            return
        self.done.add(path)
        for child in path.children():
            if isinstance(child, BypassedBlock):
                self.fuse(child.block, joins=False)  # layers that may leave samples out write elsewhere
                child.leave_out_work()
            elif isinstance(child, fx.GraphModule):
                self.fuse(child)
        graph = path.graph
        for node in self._calls(path):
            if node.args and nothing_in_eval(getattr(path, node.target)):
                node.replace_all_uses_with(node.args[0])
                graph.erase_node(node)
        for node in self._calls(path):
            module, second = getattr(path, node.target), None
            if isinstance(module, EitherNorm):
                module, second = module.norm, module.second
            if len(node.args) != 1 or (node.kwargs and second is None):
                continue
            if split_norm(module) is not None:
                self._fuse_norm(path, node, module, second)
            elif is_layer_norm(module) and not hooked(module):
                self._fuse_layer_norm(path, node, module, second)
        for node in self._calls(path):
            if is_plain_conv(module := getattr(path, node.target)) and len(node.args) == 1 and not node.kwargs:
                self._fuse_activation(path, node, module)
        for node in self._calls(path):
            self._merge_branches(path, node)
        if joins:
            join(path)
        graph.lint()
        path.delete_all_unused_submodules()
        path.recompile()

    @staticmethod
    def _calls(path: fx.GraphModule) -> list[fx.Node]:
        return list(path.graph.find_nodes(op="call_module"))

    def _fuse_norm(self, path: fx.GraphModule, norm: fx.Node, module: nn.Module, second: nn.Module | None) -> None:
        """[convolution ->] norm [-> + residual] [-> activation]."""
        modules = dict(path.named_children())
        chain = chain_of(norm, split_norm(module), modules, writes=False)
        x, before = norm.args[0], None
        if x.op == "call_module" and len(x.args) == 1 and len(x.users) == 1:
            conv = modules[x.target]
            if is_plain_conv(conv) and conv.out_channels == module.running_mean.numel():
                before, x = x, x.args[0]
        parts = (module,) if before is None else (modules[before.target], module)
        layer = self._layer(NormAct if before is None else ConvNormAct, *parts, chain.activation, second)
        args = (x,) if chain.residual is None else (x, chain.residual)
        with path.graph.inserting_before(chain.nodes[-1]):
            chain.replace(path.graph, path.graph.call_module(_add(path, norm, layer), args, norm.kwargs))
        if before is not None:
            path.graph.erase_node(before)

    def _fuse_activation(self, path: fx.GraphModule, conv: fx.Node, module: nn.Conv2d) -> None:
        """convolution [-> + residual] -> activation."""
        chain = chain_of(conv, "identity", dict(path.named_children()), writes=False)
        if chain.activation == "identity":
            return
        layer = self._layer(ConvNormAct, module, None, chain.activation)
        args = conv.args if chain.residual is None else (*conv.args, chain.residual)
        with path.graph.inserting_before(chain.nodes[-1]):
            chain.replace(path.graph, path.graph.call_module(_add(path, conv, layer), args))

    def _fuse_layer_norm(self, path: fx.GraphModule, norm: fx.Node, module: nn.Module, second: nn.Module | None
                         ) -> None:
        """[+ residual [-> reshape] ->] layer norm."""
        graph, found = path.graph, sum_before(norm)
        if found is not None and any(node.op == "get_attr" for node in addition_of(found.addition)):
            found = None
        if found is None and second is None:
            return
        name = _add(path, norm, self._layer(AddLayerNorm, module, second))
        if found is not None:
            kwargs = norm.kwargs if found.shape is None else {**norm.kwargs, "shape": found.shape}
            with graph.inserting_before(found.total):
                both = graph.call_module(name, addition_of(found.addition), kwargs)
            found.replace(graph, both)
            return
        with graph.inserting_before(norm):
            both = graph.call_module(name, norm.args, norm.kwargs)
            y = graph.call_function(operator.getitem, (both, 0))
        norm.replace_all_uses_with(y)
        graph.erase_node(norm)

    def _merge_branches(self, path: fx.GraphModule, node: fx.Node) -> None:
        """Two convolutions of one value, added to each other, as one."""
        if len(node.args) != 2 or node.kwargs or type(layer := getattr(path, node.target)) is not ConvNormAct:
            return
        value, other = node.args
        if (other.op != "call_module" or type(beside := getattr(path, other.target)) is not ConvNormAct
                or other.args != (value,) or len(other.users) > 1):
            return
        (conv, norm, _), (conv1x1, norm1x1, _) = layer.source, beside.source
        if (norm is not None and norm1x1 is not None and beside.activation == "identity"
                and RepConvNormAct.fits(conv, conv1x1)):
            node.target = _add(path, node, self._layer(
                RepConvNormAct, *layer.source[:2], *beside.source[:2], layer.activation))
            node.args = (value,)
            path.graph.erase_node(other)

    def _layer(self, kind: type[Layer], *args: Any) -> Layer:
        """One for all paths in which it is the same."""
        key = (kind, *(id(a) if isinstance(a, nn.Module) else a for a in args))
        if key not in self.layers:
            self.layers[key] = kind(*args)
        return self.layers[key]


def _add(path: fx.GraphModule, node: fx.Node, layer: nn.Module) -> str:
    """A name of its own for what replaces a node: the module it calls may be called by others."""
    name = f"{node.name}_fused"
    setattr(path, name, layer)
    return name
