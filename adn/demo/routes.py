"""Depth chosen by the input: digits, half of them under clutter, one any-depth net, and a router that chooses which
run deep."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from ..core.depth import Depth
from ..core.state import depths
from ..detect.draw import grid
from ..measure.accuracy import evaluate
from ..measure.cost import count_macs
from ..measure.profile import METRICS, require_matplotlib
from ..routing.fit import Gain, Guesses, collect, fit_router, gains, gains_csv, plot_gains, scores_of
from ..routing.policy import ThresholdPolicy
from ..routing.routed import ImageRouter, RoutedNet
from ..train import fit
from ..weights.checkpoint import save
from . import is_demo
from .digits import RECIPE, SIZE, Digits, new

CHANNELS = [16, 32, 64, 128]  # of the net: one for which the task is hard
FOR_ROUTER = 500  # of the digits to learn from, which the net does not see
VERSIONS = 10  # of each digit, with clutter of its own, for the router and for what is measured
CLUTTERED = 0.5
_ROUTER_EPOCHS = 10
_SHIFT = 12  # of that digit, in pixels, at most
_BATCH = 300
_SHOWN, _SIDE = 6, 384  # digits in a row; pixels


@dataclasses.dataclass(frozen=True)
class RouteDemo:
    """What the demo gives.

    Attributes:
        routed: net, router and threshold, half of the images deep.
        gains: by share of deep routes; costs in millions of multiply-adds, router included.
        depths: cost and accuracy in percent of every single depth.
        cluttered: what part of the deep images has clutter, at that threshold.
    """

    routed: RoutedNet
    gains: list[Gain]
    depths: dict[Depth, tuple[float, float]]
    cluttered: float


def clutter(x: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """Half of some images (N, C, H, W) under another one of them, moved, and noise; bool (N,), which."""
    count = len(x)
    hard = torch.rand(count, generator=generator) < CLUTTERED
    moved = torch.randint(-_SHIFT, _SHIFT + 1, (2,), generator=generator).tolist()
    others = x[torch.randperm(count, generator=generator)].roll(moved, (2, 3))
    under = torch.maximum(x, others) + torch.randn(count, 1, *x.shape[2:], generator=generator)
    return torch.where(hard[:, None, None, None], under, x), hard


def run(out: str | Path, *, seed: int = 0, epochs: int = RECIPE.epochs, progress: bool = True) -> RouteDemo:
    """Train net and router, measure what routing gains; write both, table, figure and a picture of what runs deep to
    `out`.

    Args:
        out: folder; an earlier demo in it is replaced, another run is not.
        seed: of weights, order, shifts and clutter. The same seed gives the same numbers.
        epochs: passes over the digits that the net learns from.
        progress: show it.

    Raises:
        ImportError: without scikit-learn or matplotlib, `pip install "adn[demo]"`.
        ValueError: if `out` holds a run that is not a demo.
    """
    require_matplotlib()
    digits, out = Digits.load(), Path(out)
    again = is_demo(out)
    learnt = dataclasses.replace(digits, x=digits.x[:-FOR_ROUTER], y=digits.y[:-FOR_ROUTER])
    recipe = RECIPE.but(seed=seed, epochs=epochs, model_kwargs={"channels": CHANNELS})
    net = new(recipe)
    extra = {"data": digits.preparation}
    fit(net, lambda epoch: ((clutter(x)[0], y) for x, y in learnt.batches(epoch)), None, recipe, out=out,
        overwrite=again, progress=progress, config={"demo": True, "recipe": recipe.to_dict()}, extra=extra)
    net.eval()

    generator = torch.Generator().manual_seed(seed)
    of_router, _ = _versions(digits.x[-FOR_ROUTER:], digits.y[-FOR_ROUTER:], generator)
    held_out, hard = _versions(digits.held_out_x, digits.held_out_y, generator)
    routed = RoutedNet(net, ImageRouter(size=SIZE // 2, width=8))
    seen = collect(routed, of_router, progress)
    _, others = fit_router(routed.router, seen, epochs=_ROUTER_EPOCHS, seed=seed, progress=progress)
    calibration = scores_of(routed.router, seen.part(others)).tolist()
    measured = collect(routed, held_out, progress)
    scores = scores_of(routed.router, measured)
    costs = tuple(count / 1e6 for count in routed.macs(digits.x[:1]))
    rows = gains(Guesses(measured.right), scores.tolist(), costs, calibration)
    routed.policy = ThresholdPolicy.from_share(calibration, 0.5, costs)

    every = depths(net)
    spent = [count / 1e6 for count in count_macs(net, digits.x[:1], every)]
    points = {row.depth: (cost, row.top1)
              for cost, row in zip(spent, evaluate(net, held_out, every, progress=progress), strict=True)}
    save(routed, out / "routed.safetensors", extra=extra | {"route": {"scores": calibration}})
    metric = METRICS["classify"]
    gains_csv(out / "routing.csv", rows, points, "MMACs", metric.name)
    plot_gains(rows, [*points.values()], "MMACs", metric.axis, str(out / "routing.png"))
    deep = scores > routed.policy.tau
    grey = (torch.cat([x for x, _ in held_out])[:, 0] * digits.std + digits.mean).clamp(0, 1)
    _picture(grey[~deep][:: VERSIONS], grey[deep][:: VERSIONS]).save(out / "routes.png")
    return RouteDemo(routed, rows, points, 100 * hard[deep].float().mean().item() if deep.any() else 0.0)


def _versions(x: Tensor, y: Tensor, generator: torch.Generator) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
    """Batches of several versions of each image, and which of all have clutter."""
    versions, hard = zip(*(clutter(x, generator) for _ in range(VERSIONS)), strict=True)
    batches = zip(torch.cat(versions).split(_BATCH), y.repeat(VERSIONS).split(_BATCH), strict=True)
    return list(batches), torch.cat(hard)


def _picture(shallow: Tensor, deep: Tensor) -> Image.Image:
    """Some of the grey images (N, H, W), 0 to 1, of either route."""
    def tile(images: Tensor) -> Image.Image:
        shown = images[: _SHOWN**2]
        blank = torch.ones(_SHOWN**2 - len(shown), SIZE, SIZE)
        rows = torch.cat((shown, blank)).unflatten(0, (_SHOWN, _SHOWN)).permute(0, 2, 1, 3).flatten(2).flatten(0, 1)
        return Image.fromarray(rows.mul(255).byte().numpy()).resize(2 * (_SIDE,)).convert("RGB")

    return grid([[tile(shallow), tile(deep)]], ("run shallow", "run deep"))
