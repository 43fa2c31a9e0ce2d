"""Routers that learn what the deep route saves, and what routing gains over one depth for all images."""

from __future__ import annotations

import copy
import csv
import dataclasses
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.depth import Depth
from ..core.outputs import logits_of
from ..core.progress import progress_bar
from ..core.tables import table
from ..data.coco import CocoImages
from ..detect.detector import DetectorProtocol
from ..measure.accuracy import check_classes
from ..measure.average_precision import Found, score, to_results
from ..measure.passes import device_of, no_image, run_over
from ..measure.profile import require_matplotlib
from ..models.registry import interface_of, task_name
from ..routers import DifficultyRouter, Router, pooled
from .losses import MedianOffset, advantage_loss, correlation, offset_loss
from .policy import ThresholdPolicy
from .routed import ImageRouter, RoutedNet

SHARES = tuple(i / 10 for i in range(11))


class Seen(NamedTuple):
    """What both routes made of the N images of a loader, in its order.

    Attributes:
        features: for each route, or once where they are of neither: what the router sees, (N, ...) each.
        losses: float64 (N, 2), of the shallow and the deep route.
        right: bool (N, 2), is the label the best guess? None of detectors.
    """

    features: list[list[Tensor]]
    losses: Tensor
    right: Tensor | None

    @property
    def advantages(self) -> Tensor:
        """(N,): how much loss the deep route saves."""
        return self.losses[:, 0] - self.losses[:, 1]

    def part(self, places: Tensor) -> Seen:
        return Seen([[x[places] for x in each] for each in self.features], self.losses[places],
                    None if self.right is None else self.right[places])


@torch.no_grad()
def collect(routed: RoutedNet, loader: Iterable[Any], progress: bool = True) -> Seen:
    """Run a classifier, or a cascade of detectors, at both depths.

    Args:
        routed: whose router, which has not to be trained, says what features are of use.
        loader: batches (images, labels), of a detector (images, targets).

    Raises:
        ValueError: if what single images lose is not known of the net, data and net do not have the same classes, or
            there is no image.
    """
    classifies = task_name(routed.net) == "classify"
    detector = interface_of(routed.net)
    if not classifies and type(detector).losses is DetectorProtocol.losses:
        detector.losses(None, ())  # which says so, before anything runs
    device = device_of(routed, None)
    features: list[list[list[Tensor]]] = [[] for _ in range(2 if routed.taps else 1)]
    losses: list[list[Tensor]] = [[], []]
    right: list[list[Tensor]] = [[], []]

    def noting() -> Iterator[Any]:
        for batch in loader:
            if batch is not None:
                x = batch[0].to(device, next(routed.net.parameters()).dtype)
                for route, found in enumerate(features):
                    found.append([_kept(routed.router, y) for y in routed.features(x, bool(route))])
                yield batch

    def count(route: int, outputs: Any, labels: Any) -> None:
        if not classifies:
            losses[route].append(detector.losses(outputs, labels).double().cpu())
            return
        logits = logits_of(outputs).float()
        if not losses[0]:
            check_classes(routed.net, logits, labels, getattr(loader, "dataset", None))
        labels = labels.to(logits.device)
        losses[route].append(F.cross_entropy(logits, labels, reduction="none").double().cpu())
        right[route].append((logits.argmax(1) == labels).cpu())

    sized = _Sized(noting(), loader)
    run_over(routed.net, sized, routed.depths, count, device, None, progress)
    if not losses[0]:
        raise ValueError(no_image("learn from", loader))
    return Seen([[torch.cat(parts) for parts in zip(*found, strict=True)] for found in features],
                *(torch.stack([torch.cat(parts) for parts in both], 1) if both[0] else None
                  for both in (losses, right)))


class _Sized:
    """An iterator as long as a loader, for progress bars."""

    def __init__(self, batches: Iterator[Any], loader: Iterable[Any]) -> None:
        self.batches, self.loader = batches, loader

    def __iter__(self) -> Iterator[Any]:
        return self.batches

    def __len__(self) -> int:
        return len(self.loader)


def _kept(router: Router, x: Tensor) -> Tensor:
    """What of features has to be kept to train a router: all that it looks at, on the CPU."""
    if isinstance(router, ImageRouter):
        return router.reduced(x).cpu()
    return pooled(x, getattr(router, "grid", None)).cpu()


@dataclasses.dataclass(frozen=True)
class Epoch:
    """Of the training of a router: its loss, and on images that it does not learn from the correlation of scores and
    advantages."""

    epoch: int
    loss: float
    correlation: float


def fit_router(router: Router, seen: Seen, *, epochs: int = 30, lr: float = 1e-3, batch_size: int = 256,
               kind: str | None = None, held_out: float = 0.2, weight_decay: float = 0.0, seed: int = 0,
               progress: bool = True) -> tuple[list[Epoch], Tensor]:
    """Train a router, in place, to predict advantages. Of its states after each epoch the best is kept: that whose
    scores correlate most with the advantages of held-out images.

    Where features are those of a route, each image is taken as one or the other made them, drawn anew for each epoch
    (dynamic depth routing, offline training).

    Args:
        router: on the CPU or a GPU.
        seen: of `collect`: of images that the net has not learnt by heart.
        kind: of `advantage_loss`; "offset" = `offset_loss`, for a `DifficultyRouter`, whose scores lie between 0 and 1
            (DynamicDet, step 2); None = that for such a router, else "mse".
        held_out: share of the images.

    Returns:
        One row per epoch, and the places of the held-out images.

    Raises:
        ValueError: if there are too few images, or a setting makes no sense.
    """
    if not 0 < held_out < 1 or epochs < 1:
        raise ValueError(f"held_out={held_out}, epochs={epochs}; pass a share between 0 and 1, and at least one epoch")
    if kind is None:
        kind = "offset" if isinstance(router, DifficultyRouter) else "mse"
    tracker = MedianOffset()
    count, advantages = len(seen.losses), seen.advantages.float()
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(count, generator=generator)
    held, used = order[: round(held_out * count)], order[round(held_out * count) :]
    if len(held) < 2 or len(used) < 2:
        raise ValueError(f"{count} images are too few to train a router on, and to hold some out: pass some thousand")
    device = next(router.parameters()).device
    optimizer = torch.optim.Adam(router.parameters(), lr, weight_decay=weight_decay)
    rows: list[Epoch] = []
    best: tuple[float, dict[str, Tensor]] | None = None
    bar = progress_bar(range(1, epochs + 1), desc="router", unit="epoch", show=progress)
    for epoch in bar:
        router.train()
        losses = []
        shuffled = used[torch.randperm(len(used), generator=generator)]
        path = torch.randint(len(seen.features), (count,), generator=generator)
        for start in range(0, len(used), batch_size):
            places = shuffled[start : start + batch_size]
            if len(places) < 2:
                continue  # of which no norm has statistics
            found = router(_features(seen, places, path, device), path[places].to(device))
            base, full = seen.losses[places].float().to(device).unbind(1)
            loss = (offset_loss(1 - found, base, full, tracker) if kind == "offset"
                    else advantage_loss(found, base, full, kind))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        scores = scores_of(router, seen.part(held))
        fit = float(correlation(scores, advantages[held]))
        rows.append(Epoch(epoch, float(np.mean(losses)), fit))
        bar.set_postfix_str(f"correlation {fit:.3f}")
        if best is None or fit > best[0]:
            best = fit, copy.deepcopy(router.state_dict())
    router.load_state_dict(best[1])
    router.eval()
    return rows, held


def _features(seen: Seen, places: Tensor, path: Tensor, device: torch.device) -> list[Tensor]:
    """Of each image those of its route."""
    if len(seen.features) == 1:
        return [x[places].to(device) for x in seen.features[0]]
    chosen = path[places].bool()
    return [torch.where(chosen.reshape(-1, *[1] * (a.ndim - 1)), b[places], a[places]).to(device)
            for a, b in zip(*seen.features, strict=True)]


@torch.no_grad()
def scores_of(router: Router, seen: Seen, batch_size: int = 1024) -> Tensor:
    """(N,): of the shallow route's features."""
    router.eval()
    device = next(router.parameters()).device
    return torch.cat([router([x[i : i + batch_size].to(device) for x in seen.features[0]], 0).cpu()
                      for i in range(0, len(seen.losses), batch_size)])


class Outcomes(Protocol):
    """What both routes made of the same N images."""

    def of(self, deep: np.ndarray) -> float:
        """Accuracy in percent if these of the images, bool (N,), take the deep route."""

    def at_random(self, count: int) -> float:
        """If as many, drawn at random, take it."""

    def at_best(self, count: int) -> float | None:
        """If those take it that gain most, which nobody can know; None = not known here either."""


class Guesses:
    """Of a classifier; accuracies are top-1.

    Args:
        right: bool (N, 2), is the label the best guess, of the shallow and of the deep route?
    """

    def __init__(self, right: Tensor) -> None:
        self.right = right.double().numpy()
        self._saved = np.sort(self.right[:, 1] - self.right[:, 0])[::-1]

    def of(self, deep: np.ndarray) -> float:
        return 100 * np.where(deep, self.right[:, 1], self.right[:, 0]).mean()

    def at_random(self, count: int) -> float:
        shallow, deep = 100 * self.right.mean(0)
        return shallow + count / len(self.right) * (deep - shallow)

    def at_best(self, count: int) -> float:
        return 100 * (self.right[:, 0].mean() + self._saved[:count].sum() / len(self._saved))


class Boxes:
    """Of a detector; accuracies are COCO's average precision, at random a mean over some draws.

    Args:
        data: with the objects to find.
        shallow, deep: what was found, of the same images in one order.
        backend: see `adn.measure.average_precision.evaluate_detector`.
    """

    def __init__(self, data: CocoImages, shallow: Found, deep: Found, backend: str = "pycocotools", draws: int = 3
                 ) -> None:
        self.data, self.routes, self.backend, self.draws = data, (shallow, deep), backend, draws
        self.images = list(shallow)

    def of(self, deep: np.ndarray) -> float:
        mixed = {image: self.routes[int(taken)][image] for image, taken in zip(self.images, deep, strict=True)}
        found = score(self.data, to_results(self.data, mixed), mixed, self.backend)["ap"]
        if found is None:
            raise ValueError(f"{self.data.file} has no object to find, so no accuracy can be measured")
        return found

    def at_random(self, count: int) -> float:
        generator, n = np.random.default_rng(0), len(self.images)
        draws = self.draws if 0 < count < n else 1
        return float(np.mean([self.of(generator.permutation(n) < count) for _ in range(draws)]))

    def at_best(self, count: int) -> None:
        return None


@dataclasses.dataclass(frozen=True)
class Gain:
    """What routing reaches with a share of deep routes.

    Attributes:
        share: asked for, of the images that the threshold was chosen by.
        deep: of the images it was measured on.
        routed, random, best: accuracy in percent: of the router; of as many images drawn at random, on average; of as
            many that gain most, None if that is not known.
        cost: of an image on average, in the unit of the costs.
    """

    share: float
    deep: float
    routed: float
    random: float
    best: float | None
    cost: float


def gains(outcomes: Outcomes, scores: Sequence[float], costs: tuple[float, float],
          calibration: Sequence[float] | None = None, shares: Sequence[float] = SHARES) -> list[Gain]:
    """Accuracy against mean cost.

    Args:
        outcomes: of the images that it is measured on.
        scores: (N,), of these images.
        costs: of the shallow and the deep route.
        calibration: scores of other images, by which thresholds are chosen; None = of these.
        shares: of deep routes.
    """
    scores, rows = np.asarray(scores, dtype=np.float64), []
    for share in shares:
        policy = ThresholdPolicy.from_share(scores if calibration is None else calibration, share, costs)
        deep = scores > policy.tau
        reached = outcomes.of(deep), outcomes.at_random(deep.sum()), outcomes.at_best(deep.sum())
        rows.append(Gain(share, float(deep.mean()), *(None if x is None else round(float(x), 4) for x in reached),
                         policy.cost(float(deep.mean()))))
    return rows


def gains_table(rows: Sequence[Gain], unit: str) -> str:
    """As text in columns."""
    return table([("share", "deep (%)", unit, "router (%)", "random (%)", "best possible (%)"), *(
        (f"{row.share:.0%}", f"{100 * row.deep:.1f}", f"{row.cost:.4g}", f"{row.routed:.2f}", f"{row.random:.2f}",
         "" if row.best is None else f"{row.best:.2f}") for row in rows)])


def gains_csv(path: str | os.PathLike[str], rows: Sequence[Gain], depths: Mapping[Depth, tuple[float, float]],
              unit: str, metric: str) -> None:
    """Write what routing gains, and of single depths cost and accuracy, to a file."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["kind", "share", "deep", unit.lower(), metric, "random", "best"])
        writer.writerows(["router", row.share, row.deep, row.cost, row.routed, row.random, row.best] for row in rows)
        writer.writerows([f"depth {depth}", "", "", *of_depth, "", ""] for depth, of_depth in depths.items())


def at_cost(points: Sequence[tuple[float, float]], cost: float) -> float:
    """The accuracy of the best fixed depth that costs no more: of (cost, accuracy).

    Raises:
        ValueError: if all cost more.
    """
    fitting = [accuracy for spent, accuracy in points if spent <= cost * (1 + 1e-9)]
    if not fitting:
        raise ValueError(f"no depth costs {cost:.4g} or less; the cheapest costs {min(points)[0]:.4g}")
    return max(fitting)


def plot_gains(rows: Sequence[Gain], points: Sequence[tuple[float, float]], unit: str, axis: str, path: str) -> None:
    """Draw accuracy against mean cost: of the router, of chance, and of single depths (cost, accuracy).

    Args:
        unit: of costs.
        axis: what the accuracy is called.
        path: of the file.

    Raises:
        ImportError: without matplotlib.
    """
    require_matplotlib(path)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    costs = [row.cost for row in rows]
    axes.plot(*zip(*points, strict=True), "o", color="0.7", markersize=5, label=f"{len(points)} single depths")
    axes.plot(costs, [row.random for row in rows], "--", color="0.45", label="as many images, drawn at random")
    axes.plot(costs, [row.routed for row in rows], "o-", color="tab:blue", label="router")
    axes.set_xlabel(f"mean cost of an image ({unit})")
    axes.set_ylabel(axis)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="0.92")
    axes.set_axisbelow(True)
    axes.margins(0.1)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path)
