"""What the detection task asks of a detector, for one of torchvision's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.ops import box_convert

from ...core.deploy import Deploy
from ...detect.detector import DetectorProtocol
from ...detect.distill import DetectorDistillation
from ...detect.targets import Targets, check_pixels
from ...detect.training import total
from ..registry import ENTRIES, interface_of
from .recipes import TorchvisionRecipe


class TorchvisionDetector(DetectorProtocol):
    """A detector of torchvision as the detection task sees one: labels from 0 on, where it has the background."""

    stride = 1
    resizes = True

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.adn_origin = getattr(model, "adn_origin", None)

    @property
    def num_classes(self) -> int:
        """Without the background."""
        if hasattr(self.model, "roi_heads"):
            return self.model.roi_heads.box_predictor.cls_score.out_features - 1
        head = self.model.head.classification_head
        return (head.num_columns if hasattr(head, "num_columns") else head.num_classes) - 1

    @property
    def size(self) -> int:
        """Of an image that it resizes, the shorter side, or both."""
        transform = self.model.transform
        return transform.min_size[-1] if transform.fixed_size is None else min(transform.fixed_size)

    @property
    def masks(self) -> bool:
        return getattr(getattr(self.model, "roi_heads", None), "mask_predictor", None) is not None

    @property
    def class_heads(self) -> tuple[str, ...]:
        if hasattr(self.model, "roi_heads"):
            return ("roi_heads.box_predictor", "roi_heads.mask_predictor.mask_fcn_logits")
        return ("head.classification_head.cls_logits", "head.classification_head.module_list")

    def reset_classifier(self, num_classes: int) -> None:
        """Fresh heads for so many classes, background apart; all else stays.

        Raises:
            ValueError: if it was not built by `adn.create_model`, so that nobody knows how its heads are made.
        """
        if self.adn_origin is None:
            raise ValueError(f"this {type(self.model).__name__} was not built by name (adn.create_model), so fresh "
                             "heads have to be put on it by who built it")
        self.adn_origin["kwargs"]["num_classes"] = num_classes + 1
        fresh = ENTRIES[self.adn_origin["name"]](**self.adn_origin["kwargs"])
        names = {name for name, _ in fresh.named_modules()}.intersection(self.class_heads)
        for name in names:
            parent, _, child = name.rpartition(".")
            owner, made_anew = self.model.get_submodule(parent), fresh.get_submodule(name)
            owner._modules[child] = made_anew.to(next(self.model.parameters())).train(owner.training)
            # What the head says of itself: of a RetinaNet and FCOS, and of an SSD.
            vars(owner).update({key: value for key, value in vars(fresh.get_submodule(parent)).items()
                                if key in ("num_classes", "num_columns")})

    def postprocess(self, outputs: Sequence[Mapping[str, Tensor]], sizes: Sequence[Tensor | Sequence[int]]
                    ) -> list[dict[str, Tensor]]:
        """As it comes, but for labels; `masks` (K, 1, H, W), the probability of each pixel, where it makes them."""
        if len(sizes) != len(outputs):
            raise ValueError(f"{len(sizes)} sizes for a batch of {len(outputs)}; pass (width, height) of each image")
        return [{**found, "labels": found["labels"] - 1} for found in outputs]

    def deploy(self) -> Deploy:
        """The backbone with its pyramid, and of the heads every sequence of layers."""
        return Deploy("backbone", tuple(_sequences(self.model)))

    def distillation(self, recipe: TorchvisionRecipe, sizes: Sequence[int]) -> nn.Module:
        return _Distillation(self.model, alpha=recipe.alpha, levels=recipe.levels, base=recipe.base, weight=recipe.kd,
                             temperature=recipe.temperature, classes=self.num_classes, masks=self.masks)

    def supervised(self, recipe: TorchvisionRecipe, sizes: Sequence[int]) -> nn.Module:
        return _Supervised(self.model)


def _sequences(model: nn.Module) -> Iterator[str]:
    """The names of outermost sequences of layers beside the backbone."""
    inside: str | None = None
    for name, module in model.named_modules():
        if name.startswith("backbone.") or (inside is not None and name.startswith(inside)):
            continue
        if isinstance(module, nn.Sequential) and any(isinstance(m, nn.Conv2d) for m in module.modules()):
            inside = f"{name}."
            yield name


class _Distillation(DetectorDistillation):
    def _run(self, images: Any, targets: Targets) -> Any:
        return super()._run(list(images), as_torchvision(images, targets))


class _Supervised(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, images: Any, targets: Targets) -> dict[str, Tensor]:
        wanted = as_torchvision(images, targets)
        check_pixels(list(images), wanted, interface_of(self.net).num_classes, interface_of(self.net).masks)
        terms = self.net(list(images), wanted)
        return {**terms, "loss": total(terms)}


def as_torchvision(images: Sequence[Tensor], targets: Targets) -> list[dict[str, Tensor]]:
    """Targets of our data (`boxes` cxcywh in 0..1, `labels` from 0 on) as torchvision's detectors want them."""
    wanted = []
    for image, target in zip(images, targets, strict=True):
        height, width = image.shape[-2:]
        boxes = target["boxes"].to(image)
        one = {"boxes": box_convert(boxes, "cxcywh", "xyxy") * boxes.new_tensor([width, height] * 2),
               "labels": target["labels"].to(image.device) + 1}
        if "masks" in target:
            one["masks"] = target["masks"].as_subclass(torch.Tensor).to(image.device, torch.uint8)
        wanted.append(one)
    return wanted
