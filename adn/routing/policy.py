"""When is the deep route worth it? One score per image, one threshold; numbers alone, without torch."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Self

import numpy as np


@dataclasses.dataclass(frozen=True)
class ThresholdPolicy:
    """Takes the deep route of images whose score is above a threshold.

        policy = ThresholdPolicy.from_budget(scores, c1=8.8, c2=12.1, budget=10)      # milliseconds
        policy.deep(0.7)

    Attributes:
        tau: the threshold; -inf = always deep, inf = always shallow.
        share: of images that took the deep route when it was chosen; None if it was not chosen by scores.
        costs: of the whole shallow and the whole deep route, router included, in the caller's unit; None if not known.
        note: what became of a budget that no threshold meets; "" if one does.
    """

    tau: float
    share: float | None = None
    costs: tuple[float, float] | None = None
    note: str = ""

    def __post_init__(self) -> None:
        if math.isnan(self.tau):
            raise ValueError("tau is not a number; pass a threshold, or inf or -inf")
        if self.costs is not None:
            checked_costs(*self.costs)

    @classmethod
    def from_share(cls, scores: Sequence[float], share: float, costs: tuple[float, float] | None = None) -> Self:
        """That which sends such a share of images like these to the deep route: the (1 - share) quantile of their
        scores, between two of them by linear interpolation (DynamicDet, variable-speed inference).

        Args:
            scores: of images that stand for those to come.
            share: 0 = none, 1 = all, whatever their score.

        Raises:
            ValueError: if there are no scores, some are not finite, all are the same while a part is asked for, or the
                share is out of range.
        """
        values = checked_scores(scores)
        if not 0 <= share <= 1:
            raise ValueError(f"share={share}; pass a number between 0 and 1")
        if share in (0, 1):
            return cls(-math.inf if share else math.inf, float(share), costs)
        if values.min() == values.max():
            raise ValueError(f"all {len(values)} scores are {values[0]}: no threshold parts them, so that only the "
                             "shares 0 and 1 can be had; train the router, or pass it the right features")
        tau = float(np.quantile(values, 1 - share))
        return cls(tau, float((values > tau).mean()), costs)

    @classmethod
    def from_budget(cls, scores: Sequence[float], c1: float, c2: float, budget: float) -> Self:
        """That whose mean cost is the budget: of the deep route the share (budget - c1) / (c2 - c1).

        Args:
            c1, c2: what the shallow and the deep route cost as a whole, in the unit of the budget.
            budget: mean cost of an image. Outside of c1 to c2 it is the nearer of them, and `note` says so.

        Raises:
            ValueError: as `from_share`, or if the costs are not positive and ascending.
        """
        checked_costs(c1, c2)
        if not math.isfinite(budget):
            raise ValueError(f"budget={budget}; pass a mean cost, {c1:.4g} to {c2:.4g}")
        share = min(max((budget - c1) / (c2 - c1), 0.0), 1.0)
        policy = cls.from_share(scores, share, (float(c1), float(c2)))
        if c1 <= budget <= c2:
            return policy
        limit, route = (c1, "shallow") if budget < c1 else (c2, "deep")
        where = "below" if budget < c1 else "above"
        return dataclasses.replace(policy, note=f"a budget of {budget:.4g} is {where} what the {route} route costs "
                                                f"({limit:.4g}): every image takes that one")

    def deep(self, score: float) -> bool:
        """Does an image with this score take the deep route? Not if it is on the threshold."""
        return score > self.tau

    def cost(self, share: float | None = None) -> float:
        """The mean cost of an image where such a share takes the deep route; None = `share`.

        Raises:
            ValueError: if costs or share are not known.
        """
        share = self.share if share is None else share
        if self.costs is None or share is None:
            raise ValueError("what the routes cost has not been measured: RoutedNet.measure(x), or pass costs=(c1, c2)")
        return self.costs[0] + share * (self.costs[1] - self.costs[0])

    def to_dict(self) -> dict[str, Any]:
        """For JSON, which has no infinities: these are text."""
        values = dataclasses.asdict(self)
        return values if math.isfinite(self.tau) else {**values, "tau": str(self.tau)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Of what `to_dict` gave.

        Raises:
            ValueError: on anything else.
        """
        try:
            costs = values["costs"]
            return cls(float(values["tau"]), values["share"], costs and (float(costs[0]), float(costs[1])),
                       str(values["note"]))
        except (KeyError, TypeError, IndexError) as error:
            raise ValueError(f"{dict(values)} is no policy as to_dict gives it ({error!r})") from error


def checked_scores(scores: Sequence[float]) -> np.ndarray:
    """As float64 (N,); raises ValueError if there are none, or some are not finite."""
    values = np.asarray(scores, dtype=np.float64).reshape(-1)
    if not len(values):
        raise ValueError("no scores; collect those of some hundred images: RoutedNet.scores(loader)")
    if bad := int((~np.isfinite(values)).sum()):
        raise ValueError(f"{bad} of {len(values)} scores are not finite: the router, or what it is given, is broken")
    return values


def checked_costs(c1: float, c2: float) -> None:
    if not (math.isfinite(c1) and math.isfinite(c2) and 0 <= c1 < c2):
        raise ValueError(f"costs {c1} and {c2}; the shallow route must cost less than the deep one, and neither less "
                         "than 0")
