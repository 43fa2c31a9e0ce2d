"""What the second detector of a cascade gets from the first: the composite links of DynamicDet."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor, nn

from .layers import CBLinear


class Links(NamedTuple):
    """For `YOLOv7.features` of a second detector.

    Attributes:
        added: for each of its layers that halve the size, the finest first, the maps (B, C, h, w) to add, each of that
            size or smaller by a power of two.
        crossed: what one of its convolutions reads in place of its own, see `tables.Table`; None of most.
    """

    added: list[list[Tensor]]
    crossed: Tensor | None


class CompositeLinks(nn.Module):
    """Each map of the first backbone adds to the second one at its own level and at all finer ones (dense higher-level
    composition, as in CBNetV2).

    Args:
        taps: channels of the maps of the first backbone, the finest first; `forward` takes some before these, too.
        widths: channels of the second one at the same levels.
        crossed: pass on the second map given, see `tables.Table`.
    """

    def __init__(self, taps: Sequence[int], widths: Sequence[int], crossed: bool = False) -> None:
        super().__init__()
        self.linears = nn.ModuleList(CBLinear(channels, widths[: i + 1]) for i, channels in enumerate(taps))
        self.crossed = crossed

    def forward(self, taps: Sequence[Tensor]) -> Links:
        """From what `YOLOv7.features` of the first gives."""
        parts = [linear(x) for linear, x in zip(self.linears, taps[-len(self.linears) :], strict=True)]
        added = [[own[level] for own in parts[level:]] for level in range(len(parts))]
        return Links(added, taps[1] if self.crossed else None)
