"""Thresholds that follow what routes really cost, so that a budget holds; numbers alone, without torch."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, Self

import numpy as np

from .policy import checked_costs, checked_scores

UNITS = ("cost", "fps", "rate")
_STATE = ("tau", "integral", "mean", "target")


class BudgetController:
    """Moves the threshold with every image, so that the mean cost becomes the target: proportional and integral
    control, within rails, whose integral does not wind up there.

        controller = BudgetController(c1=12.0, c2=20.0, scores=scores, kp=2.0, ki=0.33, beta=0.85)
        deep = False
        for frame in video:
            cost, score = run(frame, deep)                # measured, of this frame
            controller.update(target=15.0, cost=cost, score=score)
            deep = controller.deep(score)                 # the next frame

    With the mean m of costs, the error e = target - m and its sum I, the threshold is clip(tau0 - kp e - ki I), where
    gains count in thresholds per cost: a cost below the target gives a lower threshold, and more deep routes. What the
    rails cut off is taken back from I (back-calculation). Source: dynamic depth routing on AnyDepth-YOLO, its final
    form; other forms it has had are options here, those of its first live demonstration (an integral that rests at the
    rails, which could lock there) are not.

    Args:
        c1, c2: costs of the shallow and the deep route, in any unit: milliseconds, millijoules; or 0 and 1, with which
            the target is the share of deep routes.
        scores: of images that stand for those to come, for feedforward and for the rails.
        kp, ki: gains, in shares of the span of thresholds per span of costs.
        beta: of the exponential mean of costs: m = beta m + (1 - beta) cost.
        unit: what targets are: "cost"; "fps", images per second at costs in milliseconds; or "rate", these too, where
            the error is m's images per second less the target's, and gains count per span of those.
        feedforward: begin where scores say that the target would be met, not in the middle of the rails.
        jump: forget the integral where the target becomes so much harder at once, in its own unit: costs fall, or
            images per second rise; of a "rate" either way. None = never.
        margin: how far beyond the scores the rails lie.
        rails: lowest and highest threshold, where they are not those of `scores`.
        start: the mean of costs before there is one; None = the first target.
        incremental: add the correction to the last threshold, not to `tau0`.
        anti_windup: take back from the integral what the rails cut off.

    Attributes:
        tau: the threshold in force.
        integral, mean, target: I, m, and the last target, a cost.

    Raises:
        ValueError: if a setting makes no sense.
    """

    def __init__(self, c1: float, c2: float, scores: Sequence[float], kp: float, ki: float, beta: float,
                 feedforward: bool = True, jump: float | None = None, margin: float = 0.03, *, unit: str = "cost",
                 rails: tuple[float, float] | None = None, start: float | None = None, incremental: bool = False,
                 anti_windup: bool = True) -> None:
        checked_costs(c1, c2)
        if unit not in UNITS:
            raise ValueError(f"unit={unit!r}; pass one of {', '.join(map(repr, UNITS))}")
        if unit == "rate" and not c1:
            raise ValueError('unit="rate" with a route that costs nothing; pass costs above 0')
        if not (kp >= 0 and ki >= 0 and 0 <= beta < 1):
            raise ValueError(f"kp={kp}, ki={ki}, beta={beta}; pass gains of at least 0, and a beta of at least 0 and "
                             "below 1")
        if jump is not None and not jump > 0:
            raise ValueError(f"jump={jump}; pass a number above 0, or None")
        self._scores = checked_scores(scores)
        self._settings = {
            "c1": c1, "c2": c2, "scores": self._scores.tolist(), "kp": kp, "ki": ki, "beta": beta,
            "feedforward": feedforward, "jump": jump, "margin": margin, "unit": unit, "rails": rails and list(rails),
            "start": start, "incremental": incremental, "anti_windup": anti_windup}
        low, high = (self._scores.min() - margin, self._scores.max() + margin) if rails is None else rails
        if not low < high:
            raise ValueError(f"rails {low} and {high}; the first must be the lower one: pass rails, or a margin above "
                             "0 where scores are all the same")
        self.c1, self.c2, self.unit = float(c1), float(c2), unit
        self.low, self.high = float(low), float(high)
        span = 1000 / self.c1 - 1000 / self.c2 if unit == "rate" else self.c2 - self.c1
        scale = (self.high - self.low) / span
        self.kp, self.ki, self.beta = kp * scale, ki * scale, beta
        self.feedforward, self.jump, self._start = feedforward, jump, start
        self.incremental, self.anti_windup = incremental, anti_windup
        self.reset()

    @property
    def tau0(self) -> float:
        """In the middle of the rails."""
        return (self.low + self.high) / 2

    def reset(self, target: float | None = None) -> None:
        """Begin anew.

        Args:
            target: the first, at which the mean of costs begins; None = that of the first `update`.
        """
        self.tau, self.integral, self.mean = self.tau0, 0.0, self._start
        self.target: float | None = None
        if target is not None and self.mean is None:
            self.mean = self._cost(target)

    def deep(self, score: float) -> bool:
        """Does an image with this score take the deep route, by the threshold in force?"""
        return score > self.tau

    def update(self, target: float, cost: float, score: float) -> float:
        """After an image.

        Args:
            target: wanted mean, in the unit of `unit`.
            cost: what the image cost.
            score: what the router said of it; only looked at.

        Returns:
            The threshold for the next decision.

        Raises:
            ValueError: on numbers that are not finite, a target of 0 or less; the state is what it was.
        """
        for name, value in {"target": target, "cost": cost, "score": score}.items():
            if not math.isfinite(value):
                raise ValueError(f"{name}={value}: the controller stays as it was. Pass finite numbers, or leave this "
                                 "image out")
        wanted = self._cost(target)
        before = wanted if self.mean is None else self.mean
        mean = self.beta * before + (1 - self.beta) * cost
        integral = 0.0 if self.jump is not None and self.target is not None and self._jumped(wanted) else self.integral
        error = 1000 / mean - 1000 / wanted if self.unit == "rate" else wanted - mean
        integral += error
        start = self.tau if self.incremental else self.tau_ff(wanted)
        unlimited = start - self.kp * error - self.ki * integral
        tau = min(max(unlimited, self.low), self.high)
        if self.anti_windup and self.ki:
            integral += (unlimited - tau) / self.ki
        self.tau, self.integral, self.mean, self.target = tau, integral, mean, wanted
        return tau

    def tau_ff(self, cost: float) -> float:
        """Where the threshold would be without an error, for a target cost."""
        if not self.feedforward:
            return self.tau0
        share = min(max((cost - self.c1) / (self.c2 - self.c1), 0.0), 1.0)
        return min(max(float(np.quantile(self._scores, 1 - share)), self.low), self.high)

    def state_dict(self) -> dict[str, float | None]:
        """What `update` changes; settings are not in it."""
        return {name: getattr(self, name) for name in _STATE}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there.

        Raises:
            ValueError: if it is no state of a controller; the state is what it was.
        """
        if state.keys() != {*_STATE}:
            raise ValueError(f"a state of {', '.join(state) or 'nothing'}; a controller's has {', '.join(_STATE)}")
        for name, value in state.items():
            setattr(self, name, None if value is None else float(value))

    def to_dict(self) -> dict[str, Any]:
        """Settings and state, for JSON."""
        return {"settings": self._settings, "state": self.state_dict()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Of what `to_dict` gave.

        Raises:
            ValueError: on anything else.
        """
        try:
            controller = cls(**values["settings"])
            controller.load_state_dict(values["state"])
        except (KeyError, TypeError) as error:
            raise ValueError(f"{dict(values)} is no controller as to_dict gives it ({error!r})") from error
        return controller

    def _cost(self, target: float) -> float:
        if self.unit == "cost":
            return float(target)
        if not target > 0:
            raise ValueError(f"target={target}; pass images per second, above 0")
        return 1000 / target

    def _jumped(self, wanted: float) -> bool:
        if self.unit == "cost":
            return self.target - wanted > self.jump
        faster = 1000 / wanted - 1000 / self.target
        return (abs(faster) if self.unit == "rate" else faster) > self.jump


class RollingShare:
    """Holds a share of deep routes, or a mean cost, by the scores of the last images alone: the threshold is their
    quantile. It follows scores that drift, not costs that do.

    Args:
        c1, c2: as of `BudgetController`; 0 and 1 = targets are shares.
        window: how many images.
        tau: the threshold before there are scores.
    """

    def __init__(self, c1: float = 0.0, c2: float = 1.0, window: int = 120, tau: float = 0.0) -> None:
        checked_costs(c1, c2)
        if window < 1:
            raise ValueError(f"window={window}; pass at least 1")
        self.c1, self.c2, self.tau = c1, c2, tau
        self._scores: deque[float] = deque(maxlen=window)

    def deep(self, score: float) -> bool:
        return score > self.tau

    def update(self, target: float, cost: float, score: float) -> float:
        """As `BudgetController.update`; costs do not matter."""
        if not (math.isfinite(target) and math.isfinite(score)):
            raise ValueError(f"target={target}, score={score}: the threshold stays as it was. Pass finite numbers")
        self._scores.append(score)
        share = min(max((target - self.c1) / (self.c2 - self.c1), 0.0), 1.0)
        self.tau = float(np.quantile(self._scores, 1 - share))
        return self.tau
