"""The run-time state of one entry of a depth: is the refinement path of a stage bypassed, how many layers of a stack
run, or does one forward do both super-net and base-net?

Changing it writes Python attributes and nothing else: no allocation on a device, no compilation, no
synchronisation.

Gradient checkpointing runs a block's forward a second time during backward, when the depth may have moved on
(self-distillation runs the super-net, then the base-net, then one backward). Every autograd node carries a number
drawn from a per-thread counter when it is created, so a choice that remembers the counter's value at each change can
tell which state was live when the node being differentiated was made, whoever calls the checkpoint and however.
Two limits: the forward and the changes of depth must happen in one thread, and a checkpoint inside a reentrant one is
refused, since its nodes are made during backward.
"""

from __future__ import annotations

import bisect
import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import torch

from adn_kernels.private import autograd_node, constant, graph_task, in_reentrant_checkpoint, next_sequence_number

# A backward whose forward lies more changes of depth back than this cannot be served (and says so).
_REMEMBERED_CHANGES = 4096


@constant  # compiled forwards are not recomputed by Python, and every norm of every forward asks
def recomputing() -> bool:
    """Is this forward running inside a backward pass, i.e. repeated by gradient checkpointing?"""
    return graph_task() != -1


class Both:
    """State of every choice while one forward runs the super-net and the base-net.

    From where they part, tensors hold `samples` samples of the super-net, then as many of the base-net. False as the
    state of a refinement path: it does run, on the first half.
    """

    __slots__ = ("_sized",)

    def __init__(self, samples: int) -> None:
        # As the size of a tensor: torch.compile would take a number that it finds in a module for a constant.
        self._sized = torch.empty(samples, 0, device="cpu")

    @property
    def samples(self) -> int:
        return self._sized.shape[0]

    def __bool__(self) -> bool:
        return False


class _History:
    """What something was set to, by the number that the next autograd node had at each change."""

    __slots__ = ("_numbers", "_states", "_thread")

    def __init__(self, state: Any) -> None:
        self._forget(state)

    def _forget(self, state: Any) -> None:
        self._numbers, self._states, self._thread = [-1], [state], threading.get_ident()

    def note(self, state: Any) -> None:
        if self._thread != threading.get_ident():
            self._forget(self._states[-1])  # another thread counts from its own start
        if state == self._states[-1]:
            return
        self._numbers.append(next_sequence_number())
        self._states.append(state)
        if len(self._numbers) > _REMEMBERED_CHANGES:
            del self._numbers[: _REMEMBERED_CHANGES // 2], self._states[: _REMEMBERED_CHANGES // 2]

    def at_forward(self) -> Any:
        """During a backward: what was set when the forward ran of which it is."""
        node = autograd_node()
        if node is None:
            return self._states[-1]
        if in_reentrant_checkpoint():
            raise RuntimeError(
                "a checkpoint inside a reentrant checkpoint: which depth its forward ran at is not known any more. "
                "Pass use_reentrant=False to the outer one"
            )
        i = bisect.bisect_right(self._numbers, node._sequence_nr()) - 1
        if i < 0:
            raise RuntimeError(
                f"a checkpointed forward is being recomputed after more than {_REMEMBERED_CHANGES // 2} changes of "
                "depth; call backward sooner"
            )
        return self._states[i]


class Choice:
    """Shared by everything that depends on one entry of the depth.

    Attributes:
        state: what is set: bool (is the refinement path bypassed?), int (how many layers run?), or `Both`.
        one_forward: the same while it is `Both`, else None. By itself, so that compiled code which asks nothing else
            does not depend on `state`.
        in_training: does it hold in training too? If not, all runs there.
    """

    __slots__ = ("_forced", "_history", "in_training", "one_forward", "state")

    def __init__(self, state: bool | int | Both = False, in_training: bool = True) -> None:
        self.in_training = in_training
        self._history = _History(state)
        self._forced = False
        self.set(state, noted=False)

    def set(self, state: bool | int | Both, noted: bool = True) -> None:
        if noted:
            self._history.note(state)
        self.state = state
        self.one_forward = state if isinstance(state, Both) else None

    @property
    def entry(self) -> bool | int:
        """Its entry in the depth of the net."""
        return False if isinstance(self.state, Both) else self.state

    def now(self) -> bool | int | Both:
        """What holds in the forward that is running."""
        return self._history.at_forward() if recomputing() and not self._forced else self.state

    def both(self) -> int:
        """How many samples each net has in a forward that runs super-net and base-net at once; 0 in any other."""
        state = self._history.at_forward() if recomputing() and not self._forced else self.one_forward
        return state.samples if isinstance(state, Both) else 0

    @contextlib.contextmanager
    def held_at(self, state: bool) -> Iterator[None]:
        """Inside the block it is so, also where a forward is repeated by gradient checkpointing."""
        before = self.state, self._forced
        noted = not recomputing()  # a backward may run in a thread of its own, of which there is no history
        self.set(state, noted)
        self._forced = True
        try:
            yield
        finally:
            self.set(before[0], noted)
            self._forced = before[1]

    def __reduce__(self) -> tuple:
        return Choice, (self.entry, self.in_training)  # a copy made while one forward runs both begins as any other
