"""Inference with a depth per call: a CUDA graph for each depth, captured when it is first asked for."""

from __future__ import annotations

import functools
import itertools
import operator
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adn_kernels.private import pytree

from ..core.behaviours import BATCH_NORMS, mixing_norm
from ..core.depth import Depth
from ..core.state import DepthLike, get_depth, set_depth, state_of, unwrap
from ..core.state import depths as all_depths
from ..measure.accuracy import read_depths
from ..measure.profile import Profile, device_name, fit_budget, profile
from .cuda_graphs import CudaGraphs, Graph
from .cut import Segment
from .fuse import FusedNet
from .per_image import checked_flags
from .staged import Batch, Place, map_tensors, staged, zeros
from .watch import Watch

_ATTEMPTS = 3  # at a call whose net has changed; one that changes with every forward is no static program


class Engine:
    """Runs a net for inference at a depth chosen per call.

        engine = adn.Engine(net.eval().cuda(), batch_sizes=(1, 8, 64))
        logits = engine(x, depth="TTFF")

    On a GPU every depth is captured in a CUDA graph, at every batch size, when it is first asked for: the call after
    that copies `x` to where the graph reads it, launches the graph, and copies the result out. Graphs share one pool
    of memory, so that all of them together need little more than the largest. The least recently used are dropped
    beyond `max_graphs`. A net with more depths than that, whose forward comes in segments (`Staged`), is captured
    segment by segment, one launch each, with its features copied between them. On another device the same class runs
    the net itself; all that is said below holds there too.

    **Input.** One tensor (B, ...), on the net's device, without gradient; of the deploy form of a detector that takes a
    list of images, such a list, of which what follows is said once it has resized them. The shape of an image and the
    dtype are those of the first call; `warm` declares others. Depths and batch sizes are captured as they come; another
    shape, dtype or device is an error, not a capture that takes a second and stays unnoticed.

    **Batch sizes.** `batch_sizes` are all the net ever sees: a smaller batch is padded with zeros to the next of them
    and the result cut, a larger one is run in parts. This takes the samples of a batch not to depend on each other,
    as they do not in evaluation mode, and every tensor of the output to have the batch first. None: every batch size
    that comes is run, and captured, as it is.

    **Output.** Whatever the net returns: tensors in tuples, lists, dicts. They are the caller's own, in memory
    nothing else writes. `copy_output=False` saves that copy: on a GPU the result is then the memory the graph writes,
    and **the next call, at whatever depth and from whatever thread, overwrites it**; read or copy it before.

    **Weights** are read in place: what an optimizer or `load_state_dict` writes counts at the next call. Where
    parameters, buffers or modules were replaced or moved (`net.half()`, `load_state_dict(assign=True)`), graphs are
    dropped and captured anew. What a forward does beyond that was captured: after a change of its code, hooks or
    settings call `reset()`. A net in training mode is refused.

    **Threads** may share an engine: calls run one after the other, each at its depth. Depth is state of a net, so
    leave the net itself alone meanwhile. CUDA streams may differ from call to call; what a call returns is ready on
    the stream it was made on. Called while that stream is being captured, a depth that has been warmed up goes into
    the caller's graph as the net itself would.

    Args:
        net: a converted net in evaluation mode, also compiled or fused.
        batch_sizes: see above.
        max_graphs: how many graphs are kept at once.
        copy_output: see above.
        profile: what depths cost, for `set_budget`; or let `Engine.profile` measure it.

    Raises:
        ValueError: if the net is not any-depth, or a setting makes no sense.

    Attributes:
        net: the net.
    """

    def __init__(
        self,
        net: nn.Module,
        *,
        batch_sizes: Iterable[int] | None = None,
        max_graphs: int = 64,
        copy_output: bool = True,
        profile: Profile | None = None,
    ) -> None:
        self._depth = get_depth(net)
        self._depths: dict[str, Depth] = {}  # as they were written
        self._sizes = _read_sizes(batch_sizes)
        if max_graphs < 1:
            raise ValueError(f"max_graphs={max_graphs}; pass at least 1")
        self.net = net
        self._max_graphs = max_graphs
        self._copy_output = copy_output
        self._profile = profile
        self._lock = threading.RLock()
        self._counts = Counter(dict.fromkeys(("calls", "captures", "launches", "dropped", "invalidations"), 0))
        self._captured: OrderedDict[tuple, Graph] = OrderedDict()
        self._places: dict[Batch, Place] = {}
        self._graphs: CudaGraphs | None = None
        self._look_at_net()

    # ---------------------------------------------------------------------------------------------------- what it runs

    def __call__(self, x: Tensor, depth: DepthLike | None = None) -> Any:
        """What the net computes of a batch.

        Args:
            x: (B, ...).
            depth: of this call only; None = the one that `set_depth` or `set_budget` chose.

        Returns:
            As the net; made in inference mode, so not for autograd.

        Raises:
            ValueError: on an input or a depth that is not accepted; it says what is.
            RuntimeError: if the net is in training mode, autocast is on, the forward cannot be captured, or the
                current CUDA stream is being captured and this depth has not been before.
        """
        with self._lock, torch.inference_mode():
            depth = self._depth if depth is None else self._read_depth(depth)
            return self._around(x, functools.partial(self._call, depth=depth))

    def per_image(self, x: Tensor, depths: Any) -> Any:
        """What a deploy form computes of a batch, each image at a depth of its own; see `FusedNet.per_image`.

        Flags in a tensor are copied to where one graph for all of them reads them: which images run how deep is
        decided on the device and costs no capture. Depths in a list, and routers, run the deploy form itself.

        Args:
            x: (B, ...).
            depths: int32 (stages, B), 1 where an image bypasses, a list of B depths, or a router.

        Raises:
            ValueError: without a deploy form, for a batch larger than all `batch_sizes`, or as a call.
            RuntimeError: as a call.
        """
        if not isinstance(self._inner, FusedNet):
            raise ValueError("a depth for each image takes a deploy form: adn.Engine(adn.fuse(net))")
        with self._lock, torch.inference_mode():
            return self._around(x, functools.partial(self._call_per_image, depths=depths))

    @property
    def depth(self) -> Depth:
        """What calls without a depth run at."""
        return self._depth

    def set_depth(self, depth: DepthLike) -> None:
        """Run calls without a depth at `depth` from now on; that of the net itself does not count.

        Raises:
            ValueError: on a depth the net does not have.
        """
        self._depth = self._read_depth(depth)

    def set_budget(self, ms: float, percentile: int = 50) -> Depth:
        """Run calls without a depth at the deepest depth that takes at most `ms` milliseconds from now on.

        By the profile the engine was given or has measured, at the batch size of that.

        Args:
            percentile: which of the measured times must fit, 50 or 99.

        Returns:
            The depth.

        Raises:
            ValueError: if none fits; it names the fastest.
            RuntimeError: without a profile.
        """
        if self._profile is None:
            raise RuntimeError("what depths cost is not known: call engine.profile(x), or pass profile= to the engine")
        self.set_depth(fit_budget(self._profile, ms=ms, percentile=percentile))
        return self._depth

    def profile(self, x: Tensor, *, depths: Iterable[DepthLike] | None = None, **settings: Any) -> Profile:
        """Measure calls of this engine with `x` at every depth, or at `depths`, and keep it for `set_budget`.

        Args:
            settings: those of `adn.profile`.

        Raises:
            ValueError: as `adn.profile` and `warm`.
        """
        with self._lock, torch.inference_mode():
            chosen = self._read_depths(depths)
            self._around(x, functools.partial(self._warm_batch, depths=chosen))
            self._profile = profile(self.net, x, depths=chosen, run=self, **settings)
            return self._profile

    def warm(self, x: Tensor | Sequence[int], *, depths: Iterable[DepthLike] | None = None) -> None:
        """Capture ahead, so that no call has to; also declares another shape or dtype of input.

        Args:
            x: a batch as will come; or its shape, (B, ...), of the dtype of the net (of a detector that resizes images
                itself: of what it makes of them). With `batch_sizes`, all of these are captured, else B.
            depths: which; None = every depth of the net.

        Raises:
            ValueError: if that would be more graphs than are kept, or the net cannot take `x`.
        """
        with self._lock, torch.inference_mode():
            chosen = self._read_depths(depths)
            if not torch.is_tensor(x) and all(map(torch.is_tensor, x)):
                self._around(x, functools.partial(self._warm_batch, depths=chosen))
                return
            if not torch.is_tensor(x):
                if self._watch.changed():
                    self._invalidate()
                x = torch.zeros(tuple(x), device=self._device, dtype=self._dtype)
            self._check(x)
            self._warm([x] if self._sizes is None else [zeros((n, *x.shape[1:]), x) for n in self._sizes], chosen)

    def reset(self) -> None:
        """Drop all graphs and forget the shapes of inputs; what comes next is captured anew."""
        with self._lock:
            self._drop(list(self._captured))
            self._places.clear()
            self._look_at_net()

    # -------------------------------------------------------------------------------------------------- what it tells

    def memory(self) -> dict[str, int]:
        """`graphs`: how many are kept. `pool_bytes`: device memory the pool of all graphs has taken; the driver's own
        for a graph's nodes is not counted. `buffer_bytes`: inputs, and features between segments."""
        with self._lock:
            return {
                "graphs": len(self._captured),
                "pool_bytes": self._graphs.pool_bytes() if self._graphs is not None else 0,
                "buffer_bytes": sum(tensor.nbytes for tensor in self._buffers()),
            }

    def info(self) -> dict[str, Any]:
        """How it runs, what it accepts, and what it has done so far."""
        with self._lock:
            how = "the net itself" if self._graphs is None else (
                "a CUDA graph per segment" if self._staged else "a CUDA graph per depth")
            return {
                "net": type(self._inner).__name__,
                "depth": str(self._depth),
                "device": device_name(self._device),
                "runs": how,
                "inputs": self._accepted(),
                **self._counts,
                **self.memory(),
            }

    def __repr__(self) -> str:
        rows = [f"{key.replace('_', ' '):15}{value}" for key, value in self.info().items()]
        return "\n".join(["Engine", *rows])

    # ------------------------------------------------------------------------------------------------- checks of a call

    def _check(self, x: Tensor) -> None:
        if not torch.is_tensor(x):
            raise ValueError(f"{type(x).__name__} is no tensor; {self._accepted()}")
        if x.requires_grad:
            raise ValueError("an engine computes no gradients: pass x.detach(), or call the net itself")
        if x.ndim < 1 or not len(x):
            raise ValueError("a batch of 0 images; pass at least 1")
        if x.device != self._device and self._watch.changed():
            self._invalidate()
        if x.device != self._device:
            raise ValueError(f"a batch on {x.device}; {self._accepted()}")
        if self._inner.training or any(map(operator.attrgetter("training"), self._batch_norms)):
            raise RuntimeError("the net is in training mode: call net.eval() first")
        if torch.is_autocast_enabled(self._device.type):
            raise RuntimeError("under autocast every call would cast every weight: convert the net once instead, "
                               "net.to(torch.bfloat16)")

    def _check_kind(self, x: Tensor) -> None:
        if self._kinds and _kind(x) not in self._kinds and self._watch.changed():
            self._invalidate()
        if self._kinds and _kind(x) not in self._kinds:
            raise ValueError(f"a batch {tuple(x.shape)} of {x.dtype}; {self._accepted()}. engine.warm(x) declares "
                             "another shape or dtype")

    def _accepted(self) -> str:
        kinds = [f"(B, {', '.join(map(str, shape))}) of {dtype}" for shape, dtype in self._kinds]
        sizes = "" if self._sizes is None else f", run at batch sizes {', '.join(map(str, self._sizes))}"
        what = " (of images, once the net has resized them)" if self._is_part else ""
        return f"accepted: {' or '.join(kinds) or 'batches (B, ...)'} on {self._device}{sizes}{what}"

    def _read_depth(self, depth: DepthLike) -> Depth:
        known = self._depths.get(depth) if isinstance(depth, str) else None
        if known is not None:
            return known
        state = state_of(self.net)
        parsed = Depth.parse(depth, (state.full, state.base))
        if isinstance(depth, str):
            self._depths[depth] = parsed
        return parsed

    def _read_depths(self, depths: Iterable[DepthLike] | None) -> list[Depth]:
        return all_depths(self.net) if depths is None else read_depths(self.net, depths)

    # ---------------------------------------------------------------------------------------------------- one forward

    def _around(self, x: Any, call: Callable[[Tensor], Any]) -> Any:
        """The forward of the net, of which a deploy form may hold a part only."""
        return self._inner.around(x, call) if isinstance(self._inner, FusedNet) else call(x)

    def _call(self, x: Tensor, depth: Depth) -> Any:
        self._check(x)
        self._check_kind(x)
        self._counts["calls"] += 1
        if self._sizes is None or len(x) <= self._sizes[-1]:
            result = self._run(x, depth, copy=self._copy_output)
        else:
            parts = [self._run(part, depth, copy=True, is_part=True) for part in x.split(self._sizes[-1])]
            result = pytree.tree_map(lambda *leaves: torch.cat(leaves) if torch.is_tensor(leaves[0]) else leaves[0],
                                     *parts)
        self._kinds.add(_kind(x))
        return result

    def _call_per_image(self, x: Tensor, depths: Any) -> Any:
        self._check(x)
        self._check_kind(x)
        if self._sizes is not None and len(x) > self._sizes[-1]:
            raise ValueError(f"{len(x)} images, each with a depth; pass at most {self._sizes[-1]} at once")
        self._counts["calls"] += 1
        if torch.is_tensor(depths):
            flags = checked_flags(depths, (len(self._depth), len(x)), x.device, len(self._depth.layers))
            result = self._run(x, flags, copy=self._copy_output)
        else:
            result = self._inner.run_per_image(x, depths)
        self._kinds.add(_kind(x))
        return result

    def _warm(self, batches: Sequence[Tensor], depths: Sequence[Depth]) -> None:
        keys = {key for x in batches for depth in depths for key, _ in self._pieces(self._form(x), depth)}
        if self._graphs is not None and len(keys) > self._max_graphs:
            raise ValueError(f"{len(depths)} depths take {len(keys)} graphs at these batch sizes, and only "
                             f"{self._max_graphs} are kept: choose fewer depths, or a larger max_graphs")
        for x, depth in itertools.product(batches, depths):
            self._run(x, depth, copy=False)
            self._kinds.add(_kind(x))

    def _warm_batch(self, x: Tensor, depths: Sequence[Depth]) -> Any:
        """Of such a batch; what the net makes of it."""
        self._check(x)
        self._warm([x] if self._sizes is None else list(x.split(self._sizes[-1])), depths)
        # What is around a part goes on with it.
        return self._call(x, depths[0]) if self._is_part else None

    def _form(self, x: Tensor) -> Batch:
        """What a batch is run as, padded."""
        n = len(x)
        size = n if self._sizes is None else next(size for size in self._sizes if size >= n)
        return Batch((size, *x.shape[1:]), x.dtype)

    def _run(self, x: Tensor, depth: Depth | Tensor, *, copy: bool, is_part: bool = False) -> Any:
        """At one depth for all images, or by the flags of each."""
        form, n = self._form(x), len(x)
        size = form.shape[0]
        own = functools.partial(_own, n=n, size=size, per_sample=is_part or n < size)
        if self._graphs is not None:
            if not self._graphs.capturing():
                return self._replay(x, form, depth, functools.partial(own, copy=copy))
            # A graph cannot be launched into a capture: the net itself goes into the caller's graph. A forward that
            # has never run cannot (it may compile, tune, or allocate what outlives the capture).
            if any(key not in self._captured for key, _ in self._pieces(form, depth)):
                what, how = f"depth {depth}", "call engine.warm(x) before"
                if torch.is_tensor(depth):
                    what, how = "a depth for each image", "call it once before"
                raise RuntimeError(f"{what} at batch size {size} has not been captured, and cannot be while the "
                                   f"current stream is being captured: {how}")
        if n < size:
            x = torch.cat([x, x.new_zeros(size - n, *x.shape[1:])])
        if torch.is_tensor(depth):
            y = self._inner.run_per_image(x, F.pad(depth, (0, size - n)))
        else:
            set_depth(self.net, depth)
            y = self._runs(x)
        memory = x.untyped_storage().data_ptr()
        return map_tensors(lambda t: own(t, copy=t.untyped_storage().data_ptr() == memory), y)

    def _replay(self, x: Tensor, form: Batch, depth: Depth | Tensor, own: Callable[[Tensor], Tensor]) -> Any:
        self._graphs.follow(self._buffers)
        for _ in range(_ATTEMPTS):
            graphs = self._graphs_of(form, depth, x)
            place = self._places[form]
            place.fill(x)
            if torch.is_tensor(depth):
                place.flags[:, : len(x)].copy_(depth)
            for graph in graphs:
                graph.replay()
            result = map_tensors(own, place.result(graphs))
            self._counts["launches"] += len(graphs)
            # While the device works: what the graphs read is held, so nothing worse than an outdated result comes of
            # having launched them.
            if not self._net_changed():
                return result
            self._check(x)
        raise RuntimeError("the net replaces parameters, buffers or modules whenever it runs, so it cannot be captured")

    def _buffers(self) -> list[Tensor]:
        """All that graphs read and write outside the pool."""
        return [tensor for place in self._places.values() for tensor in place.tensors()]

    def _net_changed(self) -> bool:
        """Has it since the graphs were captured? If so those that are outdated are gone."""
        refresh = getattr(self._inner, "refresh_if_changed", None)
        with torch.inference_mode(False):
            refreshed = refresh is not None and refresh()
        if self._watch.changed():
            self._invalidate()
            return True
        return refreshed

    def _graphs_of(self, form: Batch, depth: Depth | Tensor, x: Tensor) -> list[Graph]:
        pieces = dict(self._pieces(form, depth))
        if not pieces.keys() <= self._captured.keys():
            self._capture(form, x, pieces)
        for key in pieces:
            self._captured.move_to_end(key)
        return [self._captured[key] for key in pieces]

    def _pieces(self, form: Batch, depth: Depth | Tensor) -> Iterator[tuple[tuple, Callable[[], Any]]]:
        """What a forward is captured as: for each graph, its key and what runs in it."""
        if torch.is_tensor(depth):
            yield (form, "per image"), functools.partial(self._run_per_image, form)
            return
        if self._staged is None:
            yield (form, depth), functools.partial(self._run_net, form, depth)
            return
        for i, segment in enumerate(self._staged.segments):
            entry = segment.flag is not None and depth[segment.flag]
            yield (form, i, entry), functools.partial(self._run_segment, form, segment, entry)

    def _run_net(self, form: Batch, depth: Depth) -> Any:
        set_depth(self.net, depth)
        return map_tensors(lambda tensor: tensor, self._runs(self._places[form].x))

    def _run_per_image(self, form: Batch) -> Any:
        place = self._places[form]
        if place.flags is None:
            # A run of warm-up, not yet the capture: outside the pool.
            place.flags = torch.zeros(len(self._depth), form.shape[0], dtype=torch.int32, device=self._device)
        return map_tensors(lambda tensor: tensor, self._inner.run_per_image(place.x, place.flags))

    def _run_segment(self, form: Batch, segment: Segment, entry: bool | int) -> None:
        self._places[form].leave(segment.gives, segment.run(entry, *self._places[form].take(segment.takes)))

    def _capture(self, form: Batch, x: Tensor, pieces: dict[tuple, Callable[[], Any]]) -> None:
        if form not in self._places:
            self._places[form] = Place(zeros(form.shape, x), self._staged)
        try:
            for key in pieces.keys() & self._captured.keys():
                self._captured.move_to_end(key)  # not these to make room
            for key, run in pieces.items():
                if key not in self._captured:
                    self._drop(list(self._captured)[: max(0, len(self._captured) + 1 - self._max_graphs)])
                    self._captured[key] = self._graphs.capture(run)
                    self._counts["captures"] += 1
        finally:
            self._forget_unused_places()

    # ----------------------------------------------------------------------------------------- when the net has changed

    def _look_at_net(self) -> None:
        net = self._inner = unwrap(self.net)
        self._is_part = isinstance(net, FusedNet) and bool(net.form.part)
        self._runs = net.run if isinstance(net, FusedNet) and net is self.net else self.net
        self._watch = Watch(net)
        self._batch_norms = [module for module in net.modules() if isinstance(module, BATCH_NORMS)]
        first = next(itertools.chain(net.parameters(), net.buffers()))
        device = torch.device(first.device)
        if self._graphs is None or self._device != device:
            self._graphs = graphs_on(device)
        self._device = device
        tensors = itertools.chain(net.parameters(), net.buffers())
        self._dtype = next((t.dtype for t in tensors if t.is_floating_point()), torch.get_default_dtype())
        if self._sizes is not None and (norm := mixing_norm(net)) is not None:
            raise ValueError(f"norm {norm!r} has no running statistics, so a padded batch would change its results: "
                             "leave batch_sizes out")
        self._kinds: set[tuple[torch.Size, torch.dtype]] = set()
        self._staged = staged(net, self._max_graphs)

    def _invalidate(self) -> None:
        kinds, before = self._kinds, (self._device, self._dtype)
        self.reset()
        if before == (self._device, self._dtype):
            self._kinds = kinds
        self._counts["invalidations"] += 1

    def _drop(self, keys: Sequence[tuple]) -> None:
        if keys:
            self._graphs.drop([self._captured.pop(key) for key in keys])
            self._counts["dropped"] += len(keys)

    def _forget_unused_places(self) -> None:
        used = {key[0] for key in self._captured}
        self._places = {form: place for form, place in self._places.items() if form in used}


def graphs_on(device: torch.device) -> CudaGraphs | None:
    """What captures on a device; None where nothing can."""
    return CudaGraphs(device) if device.type == "cuda" else None


def _kind(x: Tensor) -> tuple[torch.Size, torch.dtype]:
    return x.shape[1:], x.dtype


def _own(tensor: Tensor, *, n: int, size: int, per_sample: bool, copy: bool) -> Tensor:
    """What goes to the caller of one tensor that the net returned for a batch of `size`, of which `n` are the caller's.

    Raises:
        ValueError: if it must have the batch in front and does not.
    """
    if per_sample and (tensor.ndim < 1 or len(tensor) != size):
        raise ValueError(f"the net returns a tensor {tuple(tensor.shape)} for a batch of {size}: without the batch in "
                         "front it can neither be cut nor put together. Leave batch_sizes out")
    if n < size:
        tensor = tensor[:n]
    return tensor.clone() if copy else tensor


def _read_sizes(sizes: Iterable[int] | None) -> tuple[int, ...] | None:
    if sizes is None:
        return None
    chosen = tuple(sorted(set(sizes)))
    if not chosen or any(not isinstance(size, int) or size < 1 for size in chosen):
        raise ValueError(f"batch_sizes={sizes!r}; pass positive integers, or None to run every batch as it comes")
    return chosen
