"""Self-distillation of a detector that computes its own losses: torchvision's, and others with their contract."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..core.state import unwrap
from ..distill import TwoPass, distillation_kl, pool_features
from .targets import check_pixels
from .training import prefixed

BASES = ("own+features", "features")
# A map that is another one, sampled: it teaches nothing of its own.
_SAMPLED = ("pool",)


class DetectorDistillation(TwoPass):
    """The training loss of an any-depth detector that gives a dict of losses when called with images and targets.

    `loss = alpha * (losses of the super-net) + (1 - alpha) * (losses of the base-net + weight * KD)`, where KD compares
    maps of the pyramid, averaged over their area: the sum over levels of `distillation_kl(super, base)`.

        kd = DetectorDistillation(net)       # net: a converted Faster R-CNN, Mask R-CNN, RetinaNet, FCOS, ...
        losses = kd(images, targets)         # runs the super-net, then the base-net
        losses["loss"].backward()

    Both passes draw the same random numbers (sizes, samples of anchors and proposals). By default it is the step by
    which the any-depth RetinaNet was trained; of the R-CNNs no code is public. For many GPUs wrap this module, not the
    net, in DistributedDataParallel. `backward` is the way with a lower peak of memory: of the super-net's maps it
    keeps averages only.

    Args:
        net: a converted detector. `net(images, targets)` in training gives a dict of scalars; `net.backbone` gives a
            dict of maps (B, C, H, W).
        alpha: weight of the super-net, in [0, 1].
        levels: which maps are compared: names of them; "all" but those that are sampled from others; or "foreground",
            the one with most anchors on objects in the batch, of equals the finest, as of the published RetinaNet.
            None = "foreground" where the detector matches anchors in its head (RetinaNet, FCOS), else "all".
        base: what the base-net learns from: "own+features", or "features" alone, in which case heads learn from the
            super-net's losses only.
        weight: of KD.
        temperature: T of KD.
        classes: the largest label that the net knows, so that others are refused; None = all pass.
        masks: refuse targets without outlines.

    Returns (of a call):
        A dict of scalars: the losses of both by the names that the detector gives, prefixed `super.` and `base.`, and
        `base.kd_<level>`, all weighted; the sums `super` and `base`; their sum `loss`.

    Raises:
        ValueError: if the net is not any-depth, has no `backbone`, or a setting is out of range; of a call, if images
            or targets are not as torchvision's detectors want them (it says of which image and what to pass), the net
            gives no dict of losses, or `levels` are not there.
    """

    def __init__(self, net: nn.Module, *, alpha: float = 0.5, levels: str | Sequence[str] | None = None,
                 base: str = "own+features", weight: float = 1.0, temperature: float = 1.0,
                 classes: int | None = None, masks: bool = False) -> None:
        super().__init__()
        inner = unwrap(net)
        if not hasattr(inner, "backbone"):
            raise ValueError(f"a {type(inner).__name__} has no `backbone`, of which maps could be compared")
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha={alpha}; pass a weight between 0 and 1")
        if weight < 0 or not temperature > 0:
            raise ValueError(f"weight={weight}, temperature={temperature}; pass a weight of at least 0, and a "
                             "temperature above 0")
        if base not in BASES:
            raise ValueError(f"base={base!r}; pass one of {', '.join(map(repr, BASES))}")
        matches = hasattr(getattr(inner, "head", None), "compute_loss") and hasattr(inner, "anchor_generator")
        if levels == "foreground" and not matches:
            raise ValueError(f"a {type(inner).__name__} does not match anchors in its head: levels=\"foreground\" is "
                             'for RetinaNet and FCOS, pass "all" or names of maps')
        self.net = net
        self.alpha, self.weight, self.temperature, self.base = alpha, weight, temperature, base
        self.classes, self.masks = classes, masks
        self.levels = ("foreground" if matches else "all") if levels is None else levels
        self._random: list[Tensor] = []

    def extra_repr(self) -> str:
        return (f"alpha={self.alpha}, levels={self.levels!r}, base={self.base!r}, weight={self.weight}, "
                f"temperature={self.temperature}")

    def _run_at(self, images: Any, targets: Any, depth: str) -> _Pass:
        device = next(self.net.parameters()).device
        if depth == "super":
            self._random = _random_state(device)
            return super()._run_at(images, targets, depth)
        with _as_before(self._random, device):
            return super()._run_at(images, targets, depth)

    def _run(self, images: Any, targets: Any) -> _Pass:
        inner = unwrap(self.net)
        check_pixels(images, targets, self.classes, self.masks)
        with _maps_of(inner.backbone) as maps, _matched_by(getattr(inner, "head", None)) as matched:
            losses = self.net(images, targets)
        if not isinstance(losses, Mapping) or not losses:
            raise ValueError(f"{type(inner).__name__} gives no dict of losses, but {type(losses).__name__}: call "
                             "net.train() first")
        return _Pass(dict(losses), {name: pool_features(x, 1) for name, x in maps.items()},
                     {name: x.shape[-2] * x.shape[-1] for name, x in maps.items()}, matched)

    def _super_terms(self, of_super: _Pass, _targets: Any) -> dict[str, Tensor]:
        return prefixed("super", {name: self.alpha * loss for name, loss in of_super.losses.items()})

    def _base_terms(self, of_base: _Pass, _targets: Any, of_super: _Pass) -> dict[str, Tensor]:
        terms = dict(of_base.losses) if self.base == "own+features" else {}
        for level in self._chosen(of_super):
            kl = distillation_kl(of_super.pooled[level], of_base.pooled[level], self.temperature)
            terms[f"kd_{level}"] = self.weight * kl
        return prefixed("base", {name: (1 - self.alpha) * term for name, term in terms.items()})

    def _chosen(self, of_super: _Pass) -> list[str]:
        known = list(of_super.pooled)
        if self.levels == "all":
            return [name for name in known if name not in _SAMPLED]
        if self.levels == "foreground":
            return [foreground_level(of_super.matched, of_super.areas)]
        wanted = [self.levels] if isinstance(self.levels, str) else list(self.levels)
        if unknown := [name for name in wanted if name not in known]:
            raise ValueError(f"no map {unknown[0]!r}; this detector has {', '.join(known)}")
        return wanted

    def _teaching(self, of_super: _Pass) -> _Pass:
        return _Pass({}, {name: x.detach() for name, x in of_super.pooled.items()}, of_super.areas, of_super.matched)


class _Pass(NamedTuple):
    """Of one net: its losses; its maps, averaged, (B, C), and their areas in cells, by name; and per image which object
    each anchor is for, level after level, negative for none, where that is known."""

    losses: dict[str, Tensor]
    pooled: dict[str, Tensor]
    areas: dict[str, int]
    matched: list[Tensor]


def foreground_level(matched: Sequence[Tensor], areas: Mapping[str, int]) -> str:
    """The level with most anchors on objects in a batch, of equals the first.

    Args:
        matched: per image, (A,) of all levels one after the other, negative where an anchor is for no object.
        areas: by level, its cells; each has as many anchors as any other.
    """
    on_objects = torch.stack([of_image >= 0 for of_image in matched]).sum(0)
    per_cell = len(on_objects) // sum(areas.values())
    counts = torch.stack([part.sum() for part in on_objects.split([per_cell * cells for cells in areas.values()])])
    return list(areas)[int(counts.argmax())]


@contextlib.contextmanager
def _maps_of(trunk: nn.Module) -> Iterator[dict[str, Tensor]]:
    """The maps that a backbone gives inside the block, by name."""
    found: dict[str, Tensor] = {}

    def note(_module: nn.Module, _args: Any, output: Any) -> None:
        found.update(output.items() if isinstance(output, Mapping) else {"0": output})

    handle = trunk.register_forward_hook(note)
    try:
        yield found
    finally:
        handle.remove()


@contextlib.contextmanager
def _matched_by(head: nn.Module | None) -> Iterator[list[Tensor]]:
    """Which object each anchor is for, per image, as the detector itself tells its head inside the block."""
    found: list[Tensor] = []
    if not hasattr(head, "compute_loss"):
        yield found
        return
    compute: Callable[..., Any] = head.compute_loss

    def noting(targets: Any, outputs: Any, anchors: Any, matched: list[Tensor]) -> Any:
        found.extend(matched)
        return compute(targets, outputs, anchors, matched)

    head.__dict__["compute_loss"] = noting
    try:
        yield found
    finally:
        del head.__dict__["compute_loss"]


def _random_state(device: torch.device) -> list[Tensor]:
    """Of the generators that a detector on this device draws from."""
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]


@contextlib.contextmanager
def _as_before(state: list[Tensor], device: torch.device) -> Iterator[None]:
    """Inside the block, draw what was drawn from that state on; afterwards go on where we are."""
    now = _random_state(device)
    _restore(state, device)
    try:
        yield
    finally:
        _restore(now, device)


def _restore(state: list[Tensor], device: torch.device) -> None:
    torch.set_rng_state(state[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(state[1], device)
