"""Has a net been given other tensors?"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

_END = object()


class Watch:
    """Notices if a parameter, buffer or module of a net is another, or elsewhere, than when it began to watch.

    What is written into a tensor does not count. Asked at every forward, so all loops over the tensors run in C: 65 us
    for a ResNet-50 with 455 of them, on one slow core.
    """

    def __init__(self, net: nn.Module) -> None:
        self._slots = [slots for module in net.modules()
                       for slots in (module._parameters, module._buffers, module._modules) if slots]
        self._held = list(self._now())
        # Others (sparse ones, packed by oneDNN) have no address, and cannot be given another.
        self._tensors = [held for held in self._held if torch.is_tensor(held) and held.layout == torch.strided]
        self._addresses = [tensor.data_ptr() for tensor in self._tensors]
        # `parameter.data = ...` lets go of the memory, which a graph may still read: hold it until that is noticed.
        self._memory = [tensor.detach() for tensor in self._tensors]

    def _now(self) -> Iterator[Any]:
        # With an end that shows if there are more or fewer than there were.
        return itertools.chain(itertools.chain.from_iterable(map(dict.values, self._slots)), (_END,))

    def changed(self) -> bool:
        return not (all(map(operator.is_, self._now(), self._held))
                    and all(map(operator.eq, map(Tensor.data_ptr, self._tensors), self._addresses)))
