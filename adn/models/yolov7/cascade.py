"""Two YOLOv7 in cascade (DynamicDet), as an any-depth net of two depths: the first detector alone, or the second one,
which goes on with what the first backbone has found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, fx, nn

from ...detect.detector import Detector, checked
from ...detect.training import Supervised, prefixed
from ...routing.routers import DifficultyRouter
from .criterion import DetectionLoss
from .layers import STRIDES
from .links import CompositeLinks
from .model import YOLOv7, features_of, maps_of, postprocess
from .recipes import YOLOv7Recipe

fx.wrap("checked")


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
        return criterion.of_each(maps, targets)

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
