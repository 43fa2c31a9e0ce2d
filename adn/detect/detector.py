"""What a detector says of itself, and nothing else knows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import fx, nn

from ..core.deploy import Deploy
from ..core.regions import unseen
from ..settings import Settings


class DetectorProtocol:
    """What the detection task asks of a model, or of what stands for one of another library; all else about it, the
    form of its outputs included, is its own affair.

    Attributes:
        adn_task: the task.
        adn_origin: what `adn.create_model` was called with, if it was.
        num_classes: labels are 0 to num_classes - 1.
        stride: sides of images must be multiples of it.
        resizes: it takes a list of images (3, H, W) of any sizes, and resizes them itself, to `size`.
        masks: it finds the outlines of objects, too.
        letterbox: images keep their aspect ratio, on grey, see `adn.data.transforms.eval_transform`; what `postprocess`
            gives is for the images without it.
        class_heads: what names of parts begin with that depend on the number of classes.
    """

    adn_task: ClassVar[str] = "detect"
    adn_origin: dict[str, Any] | None = None
    letterbox: ClassVar[bool] = False
    resizes: ClassVar[bool] = False
    masks: bool = False
    num_classes: int
    stride: int
    class_heads: tuple[str, ...]

    def reset_classifier(self, num_classes: int) -> None:
        """Fresh heads for so many classes; all else stays."""
        raise NotImplementedError

    def postprocess(self, outputs: Any, sizes: Sequence[torch.Tensor | Sequence[int]]) -> list[dict[str, torch.Tensor]]:
        """What was found, from the outputs in evaluation.

        Args:
            outputs: of a batch.
            sizes: (B, 2), width and height of each original image in pixels.

        Returns:
            Per image `scores` (K,) falling, `labels` int64 (K,), `boxes` (K, 4) xyxy in pixels.
        """
        raise NotImplementedError

    def distillation(self, recipe: Settings, sizes: Sequence[int]) -> nn.Module:
        """What a step of training this net, converted, computes: a module around it, called with images (B, 3, H, W)
        and a target for each (`labels` int64 (n,), `boxes` (n, 4) cxcywh in 0..1), that gives a dict of scalars with
        `loss`; see `adn.distill.TwoPass`.

        Args:
            recipe: of the type in its entry.
            sizes: sides to draw from for each pass; () = images as they come.
        """
        raise NotImplementedError

    def supervised(self, recipe: Settings, sizes: Sequence[int]) -> nn.Module:
        """The same for a net of one depth, which learns from the objects alone; see `adn.detect.training`."""
        raise NotImplementedError

    def losses(self, outputs: Any, targets: Sequence[Mapping[str, torch.Tensor]]) -> torch.Tensor:
        """(B,): of each image the loss that it would have as a batch of its own, from the outputs in evaluation; what
        routers learn from.

        Raises:
            ValueError: if that is not known of this detector.
        """
        raise ValueError("what single images lose is not known of this detector: a router can be trained "
                         "for classifiers, RT-DETR, YOLOv12 and cascades of detectors (dyyolov7)")

    def comparable(self, given: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor]
                   ) -> tuple[Mapping[str, torch.Tensor], Mapping[str, torch.Tensor]]:
        """The outputs of two forms of this net by name, in one order, where rounding may have changed it."""
        return given, wanted

    def deploy(self) -> Deploy:
        """What its deploy form is made of."""
        return Deploy()

    def warning(self) -> str | None:
        """Why training from nothing would go wrong, and what to do; None if it would not."""
        return None


class Detector(DetectorProtocol, nn.Module):
    """A detector of this library."""


@fx.wrap
@unseen
def checked(images: torch.Tensor, stride: int) -> torch.Tensor:
    """The images, if a detector can take them.

    Raises:
        ValueError: if not, saying what to pass.
    """
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images of shape {tuple(images.shape)}; pass (B, 3, H, W)")
    if not images.is_floating_point():
        raise ValueError(f"images of {images.dtype}; pass floating numbers in 0..1, such as images.float() / 255")
    h, w = images.shape[-2:]
    if h % stride or w % stride or not h or not w:
        raise ValueError(f"images of {w} x {h} pixels; both sides must be multiples of {stride}")
    return images
