"""YOLOv7 at three sizes, and as the first or second detector of a cascade."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, fx, nn

from ...detect.detector import Detector, checked
from ...detect.suppression import on_originals, suppressed
from ...detect.training import Supervised
from .criterion import DetectionLoss
from .layers import STRIDES
from .links import CompositeLinks, Links
from .parts import Backbone, Head
from .recipes import YOLOv7Recipe
from .tables import TABLES

fx.wrap("checked")


def postprocess(outputs: Mapping[str, Any], sizes: Sequence[Tensor | Sequence[int]], *, iou: float = 0.65,
                **settings: Any) -> list[dict[str, Tensor]]:
    """What is found on images that were fitted into the net's input, as `adn.data.transforms.eval_transform` does with
    `letterbox`. Scores are objectness times that of the class.

    Args:
        outputs: of a net in evaluation.
        sizes: (B, 2), width and height of each original image in pixels.
        iou, settings: of `suppressed`; by default those of validation.

    Raises:
        ValueError: sizes do not fit the batch.
    """
    boxes, objectness, classes = outputs["decoded"].tensor_split((4, 5), -1)
    h, w = outputs["maps"][0].shape[2:4]
    found = suppressed(torch.cat((boxes, objectness * classes), -1).mT, iou=iou, **settings)
    return on_originals(found, (w * STRIDES[0], h * STRIDES[0]), sizes)


def features_of(backbone: Backbone, images: Tensor, links: Links | None = None) -> list[Tensor]:
    """See `YOLOv7.features`."""
    if links is None:
        return backbone([images])
    instead = {} if links.crossed is None else {backbone.crossing: links.crossed}
    return backbone([images], dict(zip(backbone.halving, links.added, strict=True)), instead)


def maps_of(head: Head, features: Sequence[Tensor]) -> list[Tensor]:
    """See `YOLOv7.heads`."""
    (maps,) = head(features[::-1])
    return maps


class YOLOv7(Detector):
    """A detector: images (B, 3, H, W), RGB in 0..1, sides multiples of `stride`, to boxes and classes.

    In training a list of raw maps (B, 3, h, w, 5 + C), for strides from 8 on: for each anchor of a cell the logits of
    its box, of its objectness, of the classes. In evaluation a dict: those `maps`, and `decoded` (B, N, 5 + C), centre
    x, centre y, width and height in pixels, objectness, scores of the classes.

    In a cascade (DynamicDet) there are two of a kind, of which the second reads what the first has found out:

        taps = first.features(images)
        easy = first.outputs(first.heads(taps))
        hard = second.outputs(second.heads(second.features(images, links(taps))))    # links = first.composite_links()

    Args:
        table: "yolov7", "yolov7x" or "yolov7_w6".
        num_classes: C.
        width: of published numbers of channels, which part, rounded up to multiples of 8.

    Attributes:
        tap_channels: of what `features` gives.

    Raises:
        ValueError: there is no such table.
    """

    letterbox = True
    postprocess = staticmethod(postprocess)

    def __init__(self, table: str = "yolov7", *, num_classes: int = 80, width: float = 1.0) -> None:
        super().__init__()
        if table not in TABLES:
            raise ValueError(f"table={table!r}; pass one of {', '.join(TABLES)}")
        about = TABLES[table]
        self.num_classes = num_classes
        self.stride = STRIDES[len(about.ends) - 1]
        self.backbone = Backbone(about, width)
        self.tap_channels = [self.backbone.channels[i] for i in self.backbone.outputs]
        self.head = Head(about, self.tap_channels[: -len(about.ends) - 1 : -1], width, num_classes)
        self.class_heads = tuple(f"head.{self.head.last}.{name}" for name in ("m", "im"))

    def features(self, images: Tensor, links: Links | None = None) -> list[Tensor]:
        """Maps (B, C, h, w) of the backbone, one of each stride that it has convolutions at, the finest first.

        Args:
            links: what the first detector of a cascade gives this one, the second.
        """
        return features_of(self.backbone, images, links)

    def heads(self, features: Sequence[Tensor]) -> list[Tensor]:
        """From the maps of the backbone to raw ones (B, 3, h, w, 5 + C)."""
        return maps_of(self.head, features)

    def outputs(self, maps: list[Tensor]) -> dict[str, Any]:
        """From raw maps to what the net gives in evaluation."""
        return {"decoded": self.head[-1].decoded(maps), "maps": maps}

    def forward(self, images: Tensor) -> list[Tensor] | dict[str, Any]:
        maps = self.heads(self.features(checked(images, self.stride)))
        return maps if self.training else self.outputs(maps)

    def composite_links(self) -> CompositeLinks:
        """Fresh links from this detector, the first of a cascade, to a second one like it."""
        widths = [self.backbone.channels[i] for i in self.backbone.halving]
        return CompositeLinks(self.tap_channels[-len(widths) :], widths, self.backbone.crossing is not None)

    def reset_classifier(self, num_classes: int) -> None:
        self.num_classes = num_classes
        self.head[-1].reset_classifier(num_classes)

    def supervised(self, recipe: YOLOv7Recipe, sizes: Sequence[int]) -> nn.Module:
        criterion = DetectionLoss(self.head[-1].anchor_grid, recipe.box, recipe.objectness, recipe.classes, recipe.size)
        return Supervised(self, criterion, self.stride, sizes)

    def distillation(self, recipe: YOLOv7Recipe, sizes: Sequence[int]) -> NoReturn:
        """
        Raises:
            ValueError: there is no shallower net in this one that could learn from it.
        """
        raise ValueError("a YOLOv7 is of one depth, so that there is no base-net to distil into; train it by "
                         "`supervised`")
