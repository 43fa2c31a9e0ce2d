"""What decides over two routes, what was decided, and batches that are parted and put together for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

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


def cost_of(policy: Policy, deep: Tensor) -> float | None:
    """The mean cost of an image of a batch, if the policy knows what routes cost."""
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
