"""What of a traced forward one op can do: a norm with what follows it, and a layer norm with the sum before it."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Mapping

from torch import fx, nn

from ..core.trace import activation_of, addition_of


@dataclasses.dataclass
class Chain:
    """A norm and the calls after it whose work its op does.

    Attributes:
        nodes: the norm first.
        activation: by its name in `adn_kernels.ops.ACTIVATIONS`.
        addition: the node that adds `residual`; None if nothing is added.
        parts: what it stands for, as text: "bn2", "add", "relu".
    """

    nodes: list[fx.Node]
    activation: str
    addition: fx.Node | None
    residual: fx.Node | None
    parts: list[str]

    def replace(self, graph: fx.Graph, call: fx.Node) -> None:
        """Put `call` in their place."""
        self.nodes[-1].replace_all_uses_with(call)
        for node in reversed(self.nodes):
            graph.erase_node(node)


def chain_of(norm: fx.Node, activation: str, modules: Mapping[str, nn.Module], writes: bool) -> Chain:
    """A norm [+ residual] [-> activation].

    Args:
        norm: the call of a batch norm, which ends with `activation` itself ("identity" if with none).
        modules: by the names that nodes call them by.
        writes: may calls write into what they are given? Then less can be moved.
    """
    parts = [norm.target] if activation == "identity" else [norm.target, activation]
    residual = addition = None
    nodes, end = [norm], 1  # calls that do no work are in only if one that does comes after
    while activation == "identity" and len(nodes[-1].users) == 1:
        following = next(iter(nodes[-1].users))
        name = activation_of(following, modules)
        if residual is None and _can_add(following, nodes[-1], norm.args[0], writes):
            a, b = following.args
            residual, addition = (b if a is nodes[-1] else a), following
            parts.append("add")
        elif name is None:
            break
        elif name != "identity":
            activation = name
            parts.append(name)
        nodes.append(following)
        if name != "identity":
            end = len(nodes)
    return Chain(nodes[:end], activation, addition, residual, parts)


def _can_add(node: fx.Node, branch: fx.Node, x: fx.Node, writes: bool) -> bool:
    """Is a node the addition of something to `branch`, which the op of the norm of x could do?"""
    summands = addition_of(node)
    if summands is None or summands[0] is summands[1]:
        return False
    # The op stands where the addition stood: nobody may have written to x in between. Nor may others see what an
    # addition in place has written.
    return not writes or (len(x.users) == 1 and (node.target is not operator.iadd or summands[0] is branch))


@dataclasses.dataclass
class SumBefore:
    """The sum that a layer norm is of.

    Attributes:
        norm: the call of the norm.
        total: what it is called with: the addition, or a reshape of it.
        addition: a + b.
        shape: of the reshape, as its arguments; None without.
    """

    norm: fx.Node
    total: fx.Node
    addition: fx.Node
    shape: tuple | None

    def replace(self, graph: fx.Graph, both: fx.Node) -> None:
        """Put a call that returns the norm of the sum and the sum in place of all."""
        with graph.inserting_after(both):
            results = [graph.call_function(operator.getitem, (both, i)) for i in (1, 0)]
        for node, result in zip((self.total, self.norm), results):
            node.replace_all_uses_with(result)
            graph.erase_node(node)
        if self.addition is not self.total:
            graph.erase_node(self.addition)


def sum_before(norm: fx.Node) -> SumBefore | None:
    """None if it is of no sum, or of one that others see being written."""
    total = addition = norm.args[0]
    shape = None
    if total.op == "call_method" and total.target in ("reshape", "view") and len(total.args[0].users) == 1:
        addition, *shape = total.args
    if addition_of(addition) is None or addition.target is operator.iadd:
        return None
    return SumBefore(norm, total, addition, None if shape is None else tuple(shape))
