"""Small networks that say of an image whether the deep route is worth it: a score, larger where it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Router(nn.Module):
    """Base: called with features, and by some with the route that made them, gives (B,) scores.

    Attributes:
        settings: the arguments that it was built with, for files.
    """

    settings: dict[str, Any]

    def forward(self, features: Sequence[Tensor], path: Tensor | int | None = None) -> Tensor:
        raise NotImplementedError


class DifficultyRouter(Router):
    """Of an image's features, by their means: two layers and a sigmoid (DynamicDet, the adaptive router).

    Args:
        channels: of each map.
        reduction: the first layer has a so many times smaller width than the maps together.

    Shape:
        features: (B, C, H, W) each, of any sizes, or (B, T, C) tokens; returns (B,) in (0, 1), the difficulty.
    """

    def __init__(self, channels: Sequence[int], reduction: int = 4) -> None:
        super().__init__()
        if not channels or sum(channels) < reduction or reduction < 1:
            raise ValueError(f"channels={list(channels)}, reduction={reduction}; pass the channels of each map, "
                             "together at least as many as the reduction")
        self.settings = {"channels": list(channels), "reduction": reduction}
        self.channels = tuple(channels)
        width = sum(channels)
        self.layer1 = nn.Conv2d(width, width // reduction, 1)
        self.layer2 = nn.Conv2d(width // reduction, 1, 1)

    def easiness(self, features: Sequence[Tensor], path: Tensor | int | None = None) -> Tensor:
        """(B,): 1 - difficulty, as the published code counts."""
        checked_features(features, self.channels)
        means = torch.cat([pooled(x) for x in features], 1)[:, :, None, None]
        return self.layer2(self.layer1(means).relu()).flatten().sigmoid()

    def forward(self, features: Sequence[Tensor], path: Tensor | int | None = None) -> Tensor:
        return 1 - self.easiness(features)


class AdvantageRouter(Router):
    """Predicts how much loss the deep route would save, from features of the route that ran and which that was
    (dynamic depth routing on AnyDepth-YOLO).

    Args:
        channels: of each group of features, by name: {"input": 768, "pred": 640}.
        width: of the vector that a group becomes.
        hidden: of the head.
        path_width: of the embedding of the route; 0 = without, where features do not depend on it.
        grid: rows and columns of the means that are taken of maps; None = one mean of each.

    Shape:
        features: of each group, in their order, maps (B, C, H, W) or, without a grid, vectors (B, C); path: int64 (B,),
        or one number for all, 0 = shallow, 1 = deep; returns (B,), the advantage, positive and negative.
    """

    def __init__(self, channels: Mapping[str, int], width: int = 64, hidden: int = 64, path_width: int = 8,
                 grid: Sequence[int] | None = (2, 2)) -> None:
        super().__init__()
        if not channels:
            raise ValueError("no group of features; pass their channels by name")
        self.settings = {"channels": dict(channels), "width": width, "hidden": hidden, "path_width": path_width,
                         "grid": grid and list(grid)}
        self.channels, self.grid = dict(channels), None if grid is None else (grid[0], grid[1])
        project = _OfVectors if grid is None else _OfGrids
        for name, count in channels.items():
            self.add_module(f"{name}_proj", project(count, width))
        self.path_embed = nn.Embedding(2, path_width) if path_width else None
        self.head = nn.Sequential(nn.Linear(width * len(channels) + path_width, hidden), nn.ReLU(),
                                  nn.Linear(hidden, 1))

    def forward(self, features: Sequence[Tensor], path: Tensor | int | None = None) -> Tensor:
        checked_features(features, tuple(self.channels.values()))
        vectors = [self.get_submodule(f"{name}_proj")(pooled(x, self.grid))
                   for name, x in zip(self.channels, features, strict=True)]
        if self.path_embed is not None:
            if path is None:
                raise ValueError("which route made the features? pass path, 0 = shallow, 1 = deep")
            if not torch.is_tensor(path):
                path = torch.full((len(features[0]),), int(path), device=features[0].device)
            vectors.append(self.path_embed(path.long()))
        return self.head(torch.cat(vectors, 1)).flatten()


class _OfGrids(nn.Module):
    """(B, C, h, w) to (B, width)."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels)
        self.point = nn.Conv2d(channels, width, 1)
        self.depth = nn.Conv2d(width, width, 3, padding=1, groups=width)

    def forward(self, x: Tensor) -> Tensor:
        return self.depth(self.point(self.norm(x)).relu()).relu().mean((2, 3))


class _OfVectors(nn.Module):
    """(B, C) to (B, width)."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(channels)
        self.fc = nn.Linear(channels, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.norm(x)).relu()


def pooled(x: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
    """Means of a map (B, C, H, W): of all of it (B, C), or of the cells of a grid (B, C, *grid), in float32; of tokens
    (B, T, C), and of vectors (B, C), the former."""
    x = x if x.dtype == torch.float64 else x.float()
    if grid is not None:
        return F.adaptive_avg_pool2d(x, grid)
    return x.mean((2, 3)) if x.ndim == 4 else x.mean(1) if x.ndim == 3 else x


def checked_features(features: Sequence[Tensor], channels: Sequence[int]) -> None:
    """Raise ValueError where they are not those that a router was built for."""
    found = [x.shape[-1] if x.ndim == 3 else x.shape[1] for x in features]
    if found != [*channels]:
        raise ValueError(f"features of {found} channels, the router is for {[*channels]}: it was made for another net, "
                         "or for other stages of it")
