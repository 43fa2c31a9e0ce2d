"""The head of YOLOv12: per map, bins of distances to the four sides and logits of classes; and boxes from them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, fx, nn

from .layers import Conv

STRIDES = (8, 16, 32)
BINS = 16  # of a distance, in units of the stride: 0 to 15


class Distances(nn.Module):
    """The mean of a distribution over `BINS` distances (distribution focal loss, Li et al., NeurIPS 2020)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(BINS, 1, 1, bias=False).requires_grad_(False)
        with torch.no_grad():
            self.conv.weight.copy_(torch.arange(BINS)[None, :, None, None])

    def forward(self, bins: Tensor) -> Tensor:
        """(B, 4 * BINS, A) to (B, 4, A): left, top, right, bottom."""
        return self.conv(bins.unflatten(1, (4, BINS)).transpose(1, 2).softmax(1)).squeeze(1)


class Detect(nn.Module):
    """Per map of C channels one of 4 * BINS + `num_classes` (boxes first); in evaluation their boxes and scores too.

    Args:
        channels: of the maps, that of stride 8 first.
        box_bias: what the last bias of boxes starts with.
    """

    def __init__(self, channels: Sequence[int], num_classes: int, box_bias: float = 1.0) -> None:
        super().__init__()
        self.channels = tuple(channels)
        box = max(16, channels[0] // 4, 4 * BINS)
        self.cv2 = nn.ModuleList(
            nn.Sequential(Conv(c, box, 3), Conv(box, box, 3), nn.Conv2d(box, 4 * BINS, 1)) for c in channels)
        for of_box in self.cv2:
            nn.init.constant_(of_box[-1].bias, box_bias)
        self.reset_classifier(num_classes)
        self.dfl = Distances()

    def reset_classifier(self, num_classes: int) -> None:
        """Fresh branches for so many classes, whose width depends on it."""
        self.num_classes = num_classes
        width = max(self.channels[0], min(num_classes, 100))
        self.cv3 = nn.ModuleList(
            nn.Sequential(nn.Sequential(Conv(c, c, 3, groups=c), Conv(c, width)),
                          nn.Sequential(Conv(width, width, 3, groups=width), Conv(width, width)),
                          nn.Conv2d(width, num_classes, 1)) for c in self.channels)
        for of_classes, stride in zip(self.cv3, STRIDES, strict=True):
            # As many objects, of all classes, as five in an image of 640 pixels.
            nn.init.constant_(of_classes[-1].bias, math.log(5 / num_classes / (640 / stride) ** 2))
        self.to(self.cv2[0][-1].bias)

    def forward(self, maps: Sequence[Tensor]) -> dict[str, list[Tensor] | Tensor]:
        found = [torch.cat((of_box(x), of_classes(x)), 1) for x, of_box, of_classes in zip(maps, self.cv2, self.cv3)]
        if self.training:
            return {"maps": found}
        flat = torch.cat([x.flatten(2) for x in found], 2)
        bins, logits = flat.split((4 * BINS, self.num_classes), 1)
        return {"maps": found, "decoded": decoded(self.dfl(bins), logits, found)}


def anchors(maps: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Centres of the cells of maps (B, C, h, w), in units of their strides, map by map and row by row.

    Returns:
        x and y (2, A), and strides (1, A).
    """
    centres, strides = [], []
    for x, stride in zip(maps, STRIDES, strict=True):
        h, w = x.shape[-2:]
        across, down = (torch.arange(n, dtype=x.dtype, device=x.device) + 0.5 for n in (w, h))
        centres.append(torch.stack((across.expand(h, w), down[:, None].expand(h, w))).flatten(1))
        strides.append(x.new_full((1, h * w), stride))
    return torch.cat(centres, 1), torch.cat(strides, 1)


def corners(distances: Tensor, centres: Tensor) -> Tensor:
    """Distances (B, 4, A) to left, top, right and bottom of centres (2, A) to x1, y1, x2, y2 (B, 4, A)."""
    start, end = distances.chunk(2, 1)
    return torch.cat((centres - start, centres + end), 1)


@fx.wrap
def decoded(distances: Tensor, logits: Tensor, maps: Sequence[Tensor]) -> Tensor:
    """(B, 4 + C, A): centre x, centre y, width and height of boxes in pixels, then scores of classes.

    Args:
        distances: (B, 4, A), in units of the strides.
        logits: (B, C, A).
        maps: of which these are, for their sizes.
    """
    centres, strides = anchors(maps)
    start, end = corners(distances, centres).chunk(2, 1)
    return torch.cat(((start + end) / 2 * strides, (end - start) * strides, logits.sigmoid()), 1)
