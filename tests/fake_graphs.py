"""CUDA graphs that record and replay on a CPU, under which memory behaves as in a shared pool."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map


class Tape(TorchDispatchMode):
    """Records calls of operators, with the tensors they were made on."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Callable, tuple, dict, Any]] = []
        self.made: list[Tensor] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        # A graph knows addresses, not parameters: one that is given other memory is read at the old address.
        at = tree_map(lambda t: t.detach() if torch.is_tensor(t) else t, (args, kwargs))
        self.calls.append((func, *at, out))
        inputs = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if torch.is_tensor(t)}
        self.made += [t for t in tree_leaves(out)
                      if torch.is_tensor(t) and t.untyped_storage().data_ptr() not in inputs]
        return out


class FakeGraph:
    """Runs what was recorded on the same tensors, and writes the results into the same tensors."""

    def __init__(self, owner: FakeGraphs, tape: Tape, outputs: Any) -> None:
        self.owner, self.tape, self.outputs = owner, tape, outputs
        self.alive = True

    def replay(self) -> None:
        assert self.alive, "replay of a graph that was dropped"
        time.sleep(0.0005)  # another thread's turn
        made = {id(t) for t in self.tape.made}
        for func, args, kwargs, out in self.tape.calls:
            result = func(*args, **kwargs)
            for to, source in zip(tree_leaves(out), tree_leaves(result)):
                if id(to) in made:
                    to.copy_(source)
        for graph in self.owner.graphs:
            if graph is not self:
                graph.poison()

    def poison(self) -> None:
        """The pool is shared: any other graph may have worked in this memory."""
        for tensor in self.tape.made:
            if tensor.is_floating_point():
                tensor.fill_(torch.nan)


class FakeGraphs:
    """Stands in for `CudaGraphs`."""

    def __init__(self, device: torch.device) -> None:
        self.graphs: list[FakeGraph] = []
        self.user_captures = False
        self.fail_with: Exception | None = None

    def capturing(self) -> bool:
        return self.user_captures

    def follow(self, buffers: Callable[[], Iterable[Tensor]]) -> None:
        assert all(torch.is_tensor(buffer) for buffer in buffers())

    def capture(self, run: Callable[[], Any]) -> FakeGraph:
        assert not self.user_captures, "a capture within a capture"
        if self.fail_with is not None:
            raise self.fail_with
        run()
        tape = Tape()
        with tape:
            outputs = run()
        self.graphs.append(FakeGraph(self, tape, outputs))
        return self.graphs[-1]

    @torch.inference_mode()
    def drop(self, graphs: Iterable[FakeGraph]) -> None:
        for graph in graphs:
            graph.poison()
            graph.alive = False
            self.graphs.remove(graph)

    def pool_bytes(self) -> int:
        return 1000 * len(self.graphs)
