"""Backbone and head of a YOLOv7, made of its table. Layers have the numbers of published checkpoints."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from ..yolov12.layers import Conv
from .layers import SPPCSPC, Cat, IDetect, ReOrg, Rep, fused
from .tables import Elan, Table


class Part(nn.ModuleList):
    """Layers that read what others before them give. Layers go by their numbers, inputs by -1, -2, ..., so that the
    first layer follows the first input.

    Args:
        inputs: channels of each.
        width: of published numbers of channels, which part, rounded up to multiples of 8.

    Attributes:
        channels: of all that is given, by number.
        reads: of every layer, what it reads.
        outputs: what a call returns.
    """

    outputs: tuple[int, ...]

    def __init__(self, inputs: Sequence[int], width: float) -> None:
        super().__init__()
        self.width = width
        self.channels = {-1 - i: count for i, count in enumerate(inputs)}
        self.reads: list[tuple[int, ...]] = []

    def forward(self, inputs: Sequence[Tensor], added: Mapping[int, Sequence[Tensor]] | None = None,
                instead: Mapping[int, Tensor] | None = None) -> list[Tensor]:
        """
        Args:
            added: by number of a layer, maps to add to what it gives, see `fused`.
            instead: by number of a layer, what it reads in place of its own.
        """
        added, instead = added or {}, instead or {}
        last_reader = {source: i for i, sources in enumerate(self.reads) for source in sources}
        made = {-1 - i: x for i, x in enumerate(inputs)}
        for i, (layer, sources) in enumerate(zip(self, self.reads)):
            read = (instead[i],) if i in instead else [made[source] for source in sources]
            made[i] = fused(layer(*read), added.get(i, ()))
            for source in {*sources}.difference(self.outputs):
                if last_reader[source] == i:
                    del made[source]  # or all maps would take memory to the end
        return [made[i] for i in self.outputs]

    @property
    def last(self) -> int:
        return len(self) - 1

    def scaled(self, channels: int) -> int:
        return math.ceil(channels * self.width / 8) * 8

    def add(self, layer: nn.Module, channels: int, *sources: int) -> int:
        """A layer that gives so many channels, from the one before it or from others; its number, as of all below."""
        self.reads.append(sources or (self.last,))
        self.append(layer)
        self.channels[self.last] = channels
        return self.last

    def conv(self, channels: int, kernel: int = 1, stride: int = 1, source: int | None = None) -> int:
        source, channels = self.last if source is None else source, self.scaled(channels)
        return self.add(Conv(self.channels[source], channels, kernel, stride), channels, source)

    def cat(self, *sources: int) -> int:
        return self.add(Cat(), sum(self.channels[source] for source in sources), *sources)

    def elan(self, block: Elan) -> int:
        x = self.last
        aside = self.conv(block.hidden)
        made = [self.conv(block.hidden, source=x)]
        made += [self.conv(block.chain, 3) for _ in range(block.convs)]
        self.cat(*made[::-block.every], aside)
        return self.conv(block.outputs)

    def down(self, channels: int, *joined: int) -> int:
        """Half the size, by pooling and by a convolution, and other maps of that size."""
        x = self.last
        self.add(nn.MaxPool2d(2), self.channels[x])
        pooled = self.conv(channels)
        self.conv(channels, source=x)
        strided = self.conv(channels, 3, 2)
        return self.cat(strided, pooled, *joined)


class Backbone(Part):
    """From images to maps, the finest first.

    Attributes:
        halving: layers that give maps of half the size of those before; a second backbone adds to these.
        crossing: the convolution of a second one that reads a map of the first, if there is one, see `Table`.
    """

    def __init__(self, table: Table, width: float) -> None:
        super().__init__((3,), width)
        self.halving: list[int] = []
        if table.reorg:
            self.add(ReOrg(), 4 * 3)
        for channels, stride in table.stem:
            self.conv(channels, 3, stride)
            if stride == 2:
                self.halving.append(self.last)
        outputs, downs = [self.last], []
        for channels, block in table.stages:
            if table.pooled and len(outputs) > 1:
                downs.append(self.down(channels))
                self.halving.append(self.last)
            else:
                self.halving.append(self.conv(channels, 3, 2))
            outputs.append(self.elan(block))
        self.outputs = tuple(outputs)
        # Such a block ends with this convolution, a strided one and what is concatenated.
        self.crossing = downs[0] - 2 if table.crossed else None


class Head(Part):
    """From maps of a backbone, the coarsest first, to raw ones of boxes and classes, the finest first.

    Args:
        inputs: channels of these.
    """

    def __init__(self, table: Table, inputs: Sequence[int], width: float, num_classes: int) -> None:
        super().__init__(inputs, width)
        channels = self.scaled(table.pyramid)
        made = [self.add(SPPCSPC(inputs[0], channels), channels)]
        for i, block in enumerate(table.top_down, 1):
            self.conv(block.outputs)
            up = self.add(nn.Upsample(scale_factor=2), self.channels[self.last])
            lateral = self.conv(block.outputs, source=-1 - i)
            self.cat(lateral, up)
            made.append(self.elan(block))
        ends = [made.pop()]
        for strided, block in table.bottom_up:
            if table.pooled:
                self.down(strided, made.pop())
            else:
                self.cat(self.conv(strided, 3, 2), made.pop())
            ends.append(self.elan(block))
        last = []
        for channels, source in zip(table.ends, ends, strict=True):
            if table.rep:
                outputs = self.scaled(channels)
                last.append(self.add(Rep(self.channels[source], outputs), outputs, source))
            else:
                last.append(self.conv(channels, 3, source=source))
        detect = IDetect([self.channels[source] for source in last], num_classes, table.anchors)
        self.outputs = (self.add(detect, 0, *last),)
