"""What a step of training a detector computes, whatever the detector is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..data.transforms import draw_size, rescale
from .targets import Targets


class Step(nn.Module):
    """A detector, its losses against the objects, and sizes to run it at.

    Attributes:
        summed: the losses are sums over the images of a batch, as the criterion says; else means.
    """

    def __init__(self, net: nn.Module, criterion: nn.Module, stride: int, multi_scale: Sequence[int] = (),
                 generator: torch.Generator | None = None) -> None:
        super().__init__()
        if bad := [size for size in multi_scale if size < stride or size % stride]:
            raise ValueError(f"multi_scale has {bad}; pass multiples of {stride}")
        self.net, self.criterion = net, criterion
        self.summed: bool = getattr(criterion, "summed", False)
        self.multi_scale, self.generator = tuple(multi_scale), generator

    def _resized(self, images: Tensor) -> Tensor:
        return rescale(images, draw_size(self.multi_scale, self.generator)) if self.multi_scale else images

    def _run(self, images: Tensor, _targets: Targets) -> Any:
        """One pass."""
        return self.net(images)

    def _reaching_all(self, loss: Tensor, _outputs: Any) -> Tensor:
        return loss


class Supervised(Step):
    """A detector that learns from the objects alone: the loss of a plain one.

    Returns (of a call):
        A dict of scalars: every weighted term of the criterion, and their sum `loss`.
    """

    def forward(self, images: Tensor, targets: Targets) -> dict[str, Tensor]:
        outputs = self._run(images, targets)
        terms = self.criterion(outputs, targets)
        return {**terms, "loss": self._reaching_all(total(terms), outputs)}


def losses_alone(criterion: Callable[[Any, Targets], dict[str, Tensor]], outputs: Any, targets: Targets) -> Tensor:
    """(B,): of each image the loss that it would have as a batch of its own; what routers learn from.

    Args:
        criterion: gives the weighted terms.
        outputs: of a batch, as the criterion takes them: tensors (B, ...), in lists and dicts.
    """
    def of_image(value: Any, i: int) -> Any:
        if isinstance(value, Mapping):
            return {name: of_image(part, i) for name, part in value.items()}
        return value[i : i + 1] if isinstance(value, Tensor) else [of_image(part, i) for part in value]

    return torch.stack([total(criterion(of_image(outputs, i), [target])) for i, target in enumerate(targets)])


def prefixed(net: str, terms: dict[str, Tensor]) -> dict[str, Tensor]:
    """The terms by names that say of which net they are, and under its name their sum."""
    return {**{f"{net}.{name}": value for name, value in terms.items()}, net: total(terms)}


def total(terms: dict[str, Tensor]) -> Tensor:
    return torch.stack([*terms.values()]).sum()
