"""YOLOv7 at three sizes, and two of them in cascade (DynamicDet): an any-depth net of two depths, the first detector
alone, or the second one, which goes on with what the first backbone has found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, fx, nn

from ...detect.detector import Detector, checked
from ...detect.suppression import on_originals, suppressed
from ...detect.training import Supervised, losses_alone, prefixed
from ...routers import DifficultyRouter
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

    def before(self, second: YOLOv7, links: CompositeLinks | None = None) -> YOLOv7Cascade:
        """This detector and another in cascade, of the same weights; `links`: None = fresh ones."""
        return YOLOv7Cascade(self, second, links)

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


class First(nn.Module):
    """The first detector's answer to the maps of its backbone: raw maps (B, 3, h, w, 5 + C)."""

    def __init__(self, detector: YOLOv7) -> None:
        super().__init__()
        self.head = detector.head

    def forward(self, images: Tensor, taps: Sequence[Tensor]) -> list[Tensor]:
        return maps_of(self.head, taps)


class Second(nn.Module):
    """The second detector's answer, from the images and the maps of the first backbone."""

    def __init__(self, detector: YOLOv7, links: CompositeLinks) -> None:
        super().__init__()
        self.links, self.backbone, self.head = links, detector.backbone, detector.head

    def forward(self, images: Tensor, taps: Sequence[Tensor]) -> list[Tensor]:
        links = self.links.forward(taps)  # no call: torch.fx would not look into it, and it gives no tensor
        return maps_of(self.head, features_of(self.backbone, images, links))


class Answer(nn.Module):
    """The last of the routes that are there; in training all of them, one after the other."""

    def __init__(self, *routes: nn.Module) -> None:
        super().__init__()
        self.routes = nn.ModuleList(routes)

    # One by one: torch.fx does not look into a list that it has not made.
    def forward(self, images: Tensor, tap0: Tensor, tap1: Tensor, tap2: Tensor, tap3: Tensor, tap4: Tensor,
                tap5: Tensor | None = None) -> list[Tensor]:
        taps = [tap for tap in (tap0, tap1, tap2, tap3, tap4, tap5) if tap is not None]
        routes = [*self.routes]
        if not self.training:
            return routes[-1](images, taps)
        return [maps for route in routes for maps in route(images, taps)]


class YOLOv7Cascade(Detector):
    """Images and outputs as of `YOLOv7`; in training the raw maps of both, those of the first before those of the
    second. Converted it has two depths, "1", the first detector, and "2", the second, whose first detector's head does
    not run. `adn.routing.RoutedNet` lets the router choose.

    Args:
        first, second: of one table, for the same classes.
        links: from the first to the second; None = fresh ones.
        router: None = a fresh one.

    Raises:
        ValueError: if the detectors are not alike.
    """

    letterbox = True
    postprocess = staticmethod(postprocess)

    def __init__(self, first: YOLOv7, second: YOLOv7, links: CompositeLinks | None = None,
                 router: DifficultyRouter | None = None) -> None:
        super().__init__()
        if first.num_classes != second.num_classes:
            raise ValueError(f"detectors of {first.num_classes} and of {second.num_classes} classes; pass two for the "
                             "same ones")
        if first.stride != second.stride:
            raise ValueError(f"detectors of strides {first.stride} and {second.stride}; pass two of one kind")
        self.num_classes, self.stride = first.num_classes, first.stride
        self.router = DifficultyRouter(first.tap_channels) if router is None else router
        self.backbone = first.backbone
        self.answer = Answer(First(first), Second(second, first.composite_links() if links is None else links))
        self.class_heads = tuple(f"answer.routes.{i}.{name}" for i in range(2) for name in first.class_heads)

    def features(self, images: Tensor) -> list[Tensor]:
        """Maps (B, C, h, w) of the first backbone, which both routes begin with and the router sees."""
        return features_of(self.backbone, checked(images, self.stride))

    def outputs(self, maps: list[Tensor]) -> dict[str, Any]:
        """From the raw maps of one detector to what the net gives in evaluation."""
        return {"decoded": self.answer.routes[0].head[-1].decoded(maps), "maps": maps}

    def forward(self, images: Tensor) -> list[Tensor] | dict[str, Any]:
        maps = self.answer(images, *self.features(images))
        return maps if self.training else self.outputs(maps)

    def losses(self, outputs: Mapping[str, Any], targets: Sequence[Mapping[str, Tensor]]) -> Tensor:
        maps = outputs["maps"]
        size = max(maps[0].shape[2:4]) * STRIDES[0]
        criterion = DetectionLoss(self.answer.routes[0].head[-1].anchor_grid, size=size)
        return losses_alone(criterion, maps, targets)

    def reset_classifier(self, num_classes: int) -> None:
        self.num_classes = num_classes
        for route in self.answer.routes:
            route.head[-1].reset_classifier(num_classes)

    def supervised(self, recipe: YOLOv7Recipe, sizes: Sequence[int]) -> nn.Module:
        """Of what is left of the routes."""
        criterion = DetectionLoss(self.answer.routes[0].head[-1].anchor_grid, recipe.box, recipe.objectness,
                                  recipe.classes, recipe.size)
        return Supervised(self, BothLosses(criterion), self.stride, sizes)

    # Step 1 of the published training: the detectors learn from the objects, jointly.
    distillation = supervised


class BothLosses(nn.Module):
    """The losses of two detectors, each by its own assignment (DynamicDet, step 1): `first.<term>`, `second.<term>`."""

    def __init__(self, criterion: DetectionLoss) -> None:
        super().__init__()
        self.criterion, self.summed = criterion, criterion.summed

    def forward(self, maps: list[Tensor], targets: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        levels = len(self.criterion.anchors)
        terms: dict[str, Tensor] = {}
        for name, own in zip(("first", "second"), (maps[i : i + levels] for i in range(0, len(maps), levels))):
            terms |= {key: value for key, value in prefixed(name, self.criterion(own, targets)).items() if key != name}
        return terms
