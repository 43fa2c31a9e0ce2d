"""Two routes through a net, and a router that chooses one for each image."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from ..measure.passes import evaluating, moved
from ..measure.profile import clock_of
from ..routers import Router
from .policy import ThresholdPolicy

TIMES = ("within", "next")


class Policy(Protocol):
    """What decides by a score: `ThresholdPolicy`, or a controller, whose `update` moves the threshold."""

    tau: float

    def deep(self, score: float) -> bool: ...


class Decision(NamedTuple):
    """Of a batch.

    Attributes:
        score: (B,), larger where the deep route is worth more.
        deep: bool (B,), did the image take it?
        cost: mean cost of an image, by the costs of the policy; None if it knows none.
    """

    score: Tensor
    deep: Tensor
    cost: float | None


class TwoRoutes(nn.Module):
    """Two routes through a net, a shallow and a deep one, and a router whose score says which is worth it.

        routed.policy = ThresholdPolicy.from_budget(routed.scores(loader), *routed.measure(x), budget=10)
        outputs = routed(images)
        outputs, decision = routed.route(images)

    Images of a batch take routes of their own: each route runs once, on those that take it, and a route that none takes
    does not run. Outputs are in the order of the images, and equal to those of each image alone.

    Args:
        router: scores of features, see `adn.routers`; None = in training, or where only one route is asked for.
        policy: what decides; None = given with each call.
        decide: when the score is known: "within" the image, before the routes part; or after it, for the "next" one of
            a stream (`step`).

    Raises:
        ValueError: on another `decide`.
    """

    def __init__(self, router: Router | None = None, policy: Policy | None = None, *, decide: str = "within") -> None:
        super().__init__()
        if decide not in TIMES:
            raise ValueError(f"decide={decide!r}; pass one of {', '.join(map(repr, TIMES))}")
        self.router, self.policy, self.decide = router, policy, decide
        self._ahead = False  # of a stream: does the next image take the deep route?

    # ------------------------------------------------------------------------------------ what the kinds of routes say

    def begin(self, x: Any) -> tuple[Sequence[Tensor], Any]:
        """What both routes share of a batch: features for the router, and whatever they go on with."""
        raise NotImplementedError

    def shallow(self, x: Any, shared: Any) -> Any:
        """What the shallow route makes of a batch."""
        raise NotImplementedError

    def deep(self, x: Any, shared: Any) -> Any:
        """What the deep route makes of a batch."""
        raise NotImplementedError

    # ------------------------------------------------------------------------------------------------------ one batch

    def forward(self, x: Any) -> Any:
        """Of each image what its route makes of it."""
        return self.route(x)[0]

    def route(self, x: Any, policy: Policy | None = None) -> tuple[Any, Decision]:
        """The outputs of a batch, and the decisions.

        Args:
            x: (B, ...), or a list of images where the net takes such.
            policy: in place of its own.

        Raises:
            ValueError: without a policy or a router, or where the router was made for other features.
        """
        policy = self._policy(policy)
        features, shared = self.begin(x)
        score = self._score(features)
        deep = score > policy.tau
        return self._both(x, shared, deep), Decision(score, deep, cost_of(policy, deep))

    def score(self, x: Any) -> Tensor:
        """(B,): what the router says of a batch, whose routes do not run."""
        return self._score(self.begin(x)[0])

    def scores(self, loader: Iterable[Any]) -> list[float]:
        """Of all images of a loader, in its order; for `ThresholdPolicy.from_share`."""
        device = next(self.parameters()).device
        found: list[float] = []
        with evaluating(self), torch.no_grad():
            for batch in loader:
                x = batch[0] if isinstance(batch, tuple | list) else batch
                found += self.score(moved(x, device)).tolist()
        return found

    def measure(self, x: Any, rounds: int = 20, warmup: int = 3) -> tuple[float, float]:
        """What the whole shallow and the whole deep route cost, router included: medians in milliseconds, measured in
        turn.

        Args:
            x: a batch as will come; of several images the time is of all of them.
        """
        clock = clock_of(x[0].device)
        routes = [ThresholdPolicy(float("inf")), ThresholdPolicy(float("-inf"))]
        times: list[list[float]] = [[], []]
        with evaluating(self), torch.no_grad():
            for step in range(-warmup, rounds):
                for each, policy in zip(times, routes, strict=True):
                    ms = clock(lambda images, policy=policy: self.route(images, policy), x)
                    if step >= 0:
                        each.append(ms)
        shallow, deep = (sorted(each)[len(each) // 2] for each in times)
        return shallow, deep

    def _both(self, x: Any, shared: Any, deep: Tensor) -> Any:
        """Each image by its route. One read of the decisions: the host has to know what to launch."""
        chosen = deep.tolist()
        if not any(chosen):
            return self.shallow(x, shared)
        if all(chosen):
            return self.deep(x, shared)
        parts = []
        for route, value in ((self.shallow, False), (self.deep, True)):
            places = [i for i, taken in enumerate(chosen) if taken is value]
            parts.append((places, route(select(x, places, len(chosen)), select(shared, places, len(chosen)))))
        return merge(parts)

    # -------------------------------------------------------------------------------------------------------- a stream

    def reset(self) -> None:
        """A stream begins: its first image takes the shallow route."""
        self._ahead = False

    def step(self, x: Any, *, target: float | None = None, cost: Callable[[], float] | None = None,
             policy: Policy | None = None) -> tuple[Any, Decision]:
        """The next image of a stream; the score that is made of it decides over the one after it.

        Args:
            x: a batch of one image.
            target: what it should cost on average, for a policy that follows one (`BudgetController`).
            cost: called once the image is done, gives what it cost, in the unit of the controller's costs (millijoules,
                say); None = milliseconds, measured here, which waits for the device.
            policy: in place of its own.

        Returns:
            What the route made of it, and the decision over this image (its score is that for the next).

        Raises:
            ValueError: as `route`; with more images than one, or a controller without a target.
        """
        policy = self._policy(policy)
        if len(x) != 1:
            raise ValueError(f"{len(x)} images; a stream comes one by one: routed.step(x[i : i + 1])")
        follows = hasattr(policy, "update")
        if follows and target is None:
            raise ValueError(f"a {type(policy).__name__} follows a target: routed.step(x, target=...)")
        deep, start = self._ahead, time.perf_counter()
        outputs, features = self.run(x, deep)
        score = self._score(features, int(deep))
        if follows:
            value = score.item()  # waits for all that was launched
            spent = (time.perf_counter() - start) * 1e3 if cost is None else cost()
            policy.update(target, spent, value)
        self._ahead = policy.deep(score.item())
        return outputs, Decision(score, torch.tensor([deep], device=score.device), spent if follows else None)

    def run(self, x: Any, deep: bool) -> tuple[Any, Sequence[Tensor]]:
        """A batch by one route, and what the router sees of it."""
        features, shared = self.begin(x)
        return (self.deep if deep else self.shallow)(x, shared), features

    # ---------------------------------------------------------------------------------------------------------- inside

    def _policy(self, policy: Policy | None) -> Policy:
        policy = self.policy if policy is None else policy
        if policy is None:
            raise ValueError("no policy to decide by: routed.policy = ThresholdPolicy.from_share("
                             "routed.scores(loader), share), or pass one with the call")
        return policy

    def _score(self, features: Sequence[Tensor], path: int | None = None) -> Tensor:
        if self.router is None:
            raise ValueError("there is no router: train one (adn route fit), or load weights that have one")
        return self.router(features, path)


def cost_of(policy: Policy, deep: Tensor) -> float | None:
    costs = getattr(policy, "costs", None)
    return None if costs is None else policy.cost(float(deep.float().mean()))


def select(value: Any, places: Sequence[int], count: int) -> Any:
    """Some images of a batch of `count`: of tensors (B, ...), in lists, dicts and named tuples; a list of that many
    images that is no tensors of a batch each is taken apart."""
    if torch.is_tensor(value):
        return value[torch.tensor(places, device=value.device)] if value.ndim and len(value) == count else value
    if isinstance(value, Mapping):
        return {key: select(part, places, count) for key, part in value.items()}
    if isinstance(value, list | tuple):
        if _per_image(value, count):
            return [value[i] for i in places]
        parts = [select(part, places, count) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return value


def merge(parts: Sequence[tuple[Sequence[int], Any]]) -> Any:
    """Outputs of parts of a batch, put together: of each its places in the batch, and what came out."""
    count = sum(len(places) for places, _ in parts)
    first = parts[0][1]
    if torch.is_tensor(first):
        joined = torch.cat([value for _, value in parts])
        order = torch.tensor([i for places, _ in parts for i in places], device=joined.device)
        whole = torch.empty_like(joined)
        whole[order] = joined
        return whole
    if isinstance(first, list | tuple):
        if all(_per_image(value, len(places)) for places, value in parts):
            whole: list[Any] = [None] * count
            for places, value in parts:
                for i, one in zip(places, value, strict=True):
                    whole[i] = one
            return whole
        columns = [merge([(places, value[i]) for places, value in parts]) for i in range(len(first))]
        return type(first)(*columns) if hasattr(first, "_fields") else type(first)(columns)
    if isinstance(first, Mapping):
        merged = {key: merge([(places, value[key]) for places, value in parts]) for key in first}
        return merged if isinstance(first, dict) and type(first) is dict else type(first)(**merged)
    if first is None or isinstance(first, bool | int | float | str):
        return first
    raise TypeError(f"the routes return a {type(first).__name__}, which cannot be put together: return tensors, "
                    "tuples, lists or dicts")


def _per_image(value: Sequence[Any], count: int) -> bool:
    """Is it a list of images, or of what was found in each, and not of tensors of the whole batch?"""
    if len(value) != count or isinstance(value, tuple):
        return False
    return all(isinstance(one, Mapping) or (torch.is_tensor(one) and one.ndim == 3) for one in value)
