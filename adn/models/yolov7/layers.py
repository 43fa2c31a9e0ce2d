"""What YOLOv7 is made of. Names of parts are those of published checkpoints."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from ...detect.boxes import widened
from ..yolov12.layers import BatchNorm2d, Conv

STRIDES = (8, 16, 32, 64)  # of the maps, in pixels; a detector of three has no last one
ANCHORS = 3  # of a cell


class Cat(nn.Module):
    """Channels of several maps, one map after the other."""

    def forward(self, *maps: Tensor) -> Tensor:
        return torch.cat(maps, 1)


class ReOrg(nn.Module):
    """(B, C, H, W) to (B, 4C, H / 2, W / 2): pixels of even rows and columns, of odd rows, of odd columns, of both."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x[..., row::2, column::2] for column in (0, 1) for row in (0, 1)], 1)


class SPPCSPC(nn.Module):
    """Spatial pyramid pooling, of one of two branches."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.cv1 = Conv(inputs, outputs)
        self.cv2 = Conv(inputs, outputs)
        self.cv3 = Conv(outputs, outputs, 3)
        self.cv4 = Conv(outputs, outputs)
        self.cv5 = Conv(4 * outputs, outputs)
        self.cv6 = Conv(outputs, outputs, 3)
        self.cv7 = Conv(2 * outputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        p = self.cv4(self.cv3(self.cv1(x)))
        pooled = [F.max_pool2d(p, size, 1, size // 2) for size in (5, 9, 13)]
        q = self.cv6(self.cv5(torch.cat((p, *pooled), 1)))
        return self.cv7(torch.cat((q, self.cv2(x)), 1))


class Rep(nn.Module):
    """The sum of a 3x3 convolution, a 1x1 one and, where the channels stay, the input, each with a norm; then SiLU."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.rbr_identity = BatchNorm2d(inputs) if inputs == outputs else None
        self.rbr_dense = nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), BatchNorm2d(outputs))
        self.rbr_1x1 = nn.Sequential(nn.Conv2d(inputs, outputs, 1, bias=False), BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = self.rbr_dense(x) + self.rbr_1x1(x)
        return F.silu(y if self.rbr_identity is None else y + self.rbr_identity(x))


class CBLinear(nn.Module):
    """A 1x1 convolution; its channels in parts of so many each."""

    def __init__(self, inputs: int, widths: Sequence[int]) -> None:
        super().__init__()
        self.widths = tuple(widths)
        self.conv = nn.Conv2d(inputs, sum(widths), 1)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.conv(x).split(self.widths, 1)


def fused(own: Tensor, sources: Sequence[Tensor]) -> Tensor:
    """A map (B, C, h, w) plus others of any size, each resized to its own (nearest pixel): DynamicDet's CBFuse."""
    for source in sources:
        own = own + F.interpolate(source, own.shape[-2:])
    return own


class Implicit(nn.Module):
    """One number for each channel, whatever the image (YOLOR, Wang et al., 2021)."""

    def __init__(self, channels: int, mean: float) -> None:
        super().__init__()
        self.implicit = nn.Parameter(torch.empty(1, channels, 1, 1))
        nn.init.normal_(self.implicit, mean, 0.02)


class IDetect(nn.Module):
    """Of maps (B, C, h, w), that of stride 8 first, raw ones (B, 3, h, w, 5 + classes): for each anchor of a cell the
    logits of its box, of its objectness and of the classes.

    Args:
        channels: of the maps.
        anchors: of each, width and height of three boxes in pixels.
    """

    def __init__(self, channels: Sequence[int], num_classes: int, anchors: Sequence[Sequence[int]]) -> None:
        super().__init__()
        self.channels = tuple(channels)
        # Both of these are in published checkpoints: in units of the strides, and in pixels.
        pixels = torch.tensor(anchors, dtype=torch.float32).reshape(-1, ANCHORS, 2)
        self.register_buffer("anchors", pixels / torch.tensor(STRIDES[: len(pixels)])[:, None, None])
        self.register_buffer("anchor_grid", pixels[:, None, :, None, None])
        self.ia = nn.ModuleList(Implicit(count, 0) for count in channels)
        self.reset_classifier(num_classes)

    def reset_classifier(self, num_classes: int) -> None:
        """Fresh convolutions for so many classes: one convolution makes boxes and classes."""
        outputs = ANCHORS * (5 + num_classes)
        self.m = nn.ModuleList(nn.Conv2d(count, outputs, 1) for count in self.channels)
        self.im = nn.ModuleList(Implicit(outputs, 1) for _ in self.channels)
        for conv, stride in zip(self.m, STRIDES):
            with torch.no_grad():
                bias = conv.bias.view(ANCHORS, -1)
                bias[:, 4] += math.log(8 / (640 / stride) ** 2)  # eight objects in an image of 640 pixels
                bias[:, 5:] += math.log(0.6 / (num_classes - 0.99))
        self.to(self.ia[0].implicit)

    def forward(self, *maps: Tensor) -> list[Tensor]:
        found = (_scaled(x, conv, ia.implicit, im.implicit) for x, ia, conv, im in zip(maps, self.ia, self.m, self.im))
        return [x.unflatten(1, (ANCHORS, -1)).permute(0, 1, 3, 4, 2) for x in found]

    def decoded(self, maps: Sequence[Tensor]) -> Tensor:
        """Raw maps to (B, N, 5 + classes): centre x, centre y, width and height in pixels, objectness, scores of the
        classes; map by map, anchor by anchor, row by row."""
        return decode(maps, self.anchor_grid)


def _scaled(x: Tensor, conv: nn.Conv2d, before: Tensor, after: Tensor) -> Tensor:
    """after * conv(x + before), of a 1x1 convolution and what is the same at all places of a map: on its weights, which
    are fewer than the places of a map."""
    bias = conv.bias + (conv.weight * before).sum((1, 2, 3))
    return F.conv2d(x, conv.weight * after.transpose(0, 1), after.flatten() * bias)


@fx.wrap
def decode(maps: Sequence[Tensor], anchors: Tensor) -> Tensor:
    """See `IDetect.decoded`; `anchors` as of `boxes_of`."""
    rows = [torch.cat((box, widened(x[..., 4:]).sigmoid()), -1).flatten(1, 3)
            for x, box in zip(maps, boxes_of(maps, anchors))]
    return torch.cat(rows, 1)


def boxes_of(maps: Sequence[Tensor], anchors: Tensor) -> list[Tensor]:
    """The boxes of raw maps (B, 3, h, w, 5 + classes): (B, 3, h, w, 4), centre x, centre y, width and height in pixels.

    Args:
        anchors: (levels, 1, 3, 1, 1, 2), in pixels.
    """
    found = []
    for x, anchor, stride in zip(maps, anchors, STRIDES):
        shift, size = (2 * widened(x[..., :4]).sigmoid()).chunk(2, -1)
        down, across = (torch.arange(n, dtype=shift.dtype, device=x.device) for n in x.shape[2:4])
        cells = torch.stack((across.expand(len(down), -1), down[:, None].expand(-1, len(across))), -1)
        found.append(torch.cat(((shift - 0.5 + cells) * stride, size**2 * anchor), -1))
    return found
