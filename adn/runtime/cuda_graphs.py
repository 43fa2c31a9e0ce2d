"""Capture and replay of CUDA graphs that share one memory pool."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

_WARM_UP = 3  # runs before a capture: compilation, autotuning and lazy initialisation cannot be captured

# A process may capture one graph at a time, and must not destroy one meanwhile.
_captures = threading.RLock()


@dataclasses.dataclass(eq=False)
class Graph:
    """What was captured.

    Attributes:
        outputs: what the function returned; every replay writes these tensors. They lie in the pool: see `CudaGraphs`.
    """

    graph: torch.cuda.CUDAGraph
    outputs: Any

    def replay(self) -> None:
        """Launch it on the current stream."""
        self.graph.replay()


class CudaGraphs:
    """Graphs of one device, in one pool.

    What graphs of one pool hold of each other. The allocator hands a graph any memory of the pool that is free while
    the graph is captured, and that is all it knows: a graph captured early works in memory in which the *output* of a
    later one may lie, whether or not somebody holds that output. Replayed in the order of their capture they would
    do each other no harm; depths come in any order. So:

    - Replays never overlap: whoever replays holds a lock, and `follow` orders the streams they are launched on.
    - Nothing in the pool is expected to survive the replay of another graph. Inputs, and what one graph leaves for
      the next, are allocated outside it, before the capture; `outputs` are copied before anything else is replayed.

    Warm-up and capture have a stream each. Nothing but captures ever runs on the second, so that the workspace which
    cuBLAS keeps for a stream is allocated in the pool, as one more piece of scratch memory. (One allocated before
    would lie outside, and versions of torch after 2.11 free it when *any* graph of that stream is destroyed: issue
    193402 of pytorch.)
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        with torch.cuda.device(device):
            self._warm_up, self._capture = torch.cuda.Stream(), torch.cuda.Stream()
            self._latest = torch.cuda.current_stream()
        self._pool: tuple[int, int] | None = None
        self._alive = 0

    def capturing(self) -> bool:
        """Is the current stream being captured?"""
        with torch.cuda.device(self.device):
            return torch.cuda.is_current_stream_capturing()

    def follow(self, buffers: Callable[[], Iterable[Tensor]]) -> None:
        """Run what is launched next after all that was launched before, on whichever stream that was.

        Args:
            buffers: says what graphs read and write outside the pool.
        """
        stream = torch.cuda.current_stream(self.device)
        if stream == self._latest:
            return
        stream.wait_stream(self._latest)
        self._latest = stream
        for buffer in buffers():
            buffer.record_stream(stream)

    def capture(self, run: Callable[[], Any]) -> Graph:
        """Run a function a few times, then capture it.

        Raises:
            RuntimeError: if what it does cannot be captured, such as reading a value on the host.
        """
        with _captures, torch.cuda.device(self.device):
            current = torch.cuda.current_stream()
            self._warm_up.wait_stream(current)
            try:
                with torch.cuda.stream(self._warm_up):
                    for _ in range(_WARM_UP):
                        run()
            finally:
                current.wait_stream(self._warm_up)
            if not self._alive:
                # A pool cannot be used again once its last graph is gone.
                self._pool = torch.cuda.graph_pool_handle()
            graph = torch.cuda.CUDAGraph()
            try:
                # The outer context brings the caller's stream back where a capture fails, which torch 2.11 forgets.
                # Other threads may go on allocating.
                with torch.cuda.stream(self._capture), torch.cuda.graph(
                        graph, self._pool, self._capture, capture_error_mode="thread_local"):
                    outputs = run()
            except RuntimeError as error:
                raise RuntimeError("this forward runs, but cannot be captured in a CUDA graph: it must not read a "
                                   f"value on the host nor depend on one ({error})") from error
            self._alive += 1
            return Graph(graph, outputs)

    def drop(self, graphs: Iterable[Graph]) -> None:
        """Give the memory of graphs back, once they have run."""
        with _captures:
            torch.cuda.synchronize(self.device)
            for graph in graphs:
                graph.outputs = None
                graph.graph.reset()
                self._alive -= 1

    def pool_bytes(self) -> int:
        """What the pool has taken from the device."""
        if not self._alive:
            return 0
        segments = torch.cuda.memory_snapshot(mempool_id=self._pool, include_traces=False)
        return sum(segment["total_size"] for segment in segments)
