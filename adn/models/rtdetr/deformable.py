"""Multi-scale deformable attention (Deformable DETR, arXiv 2010.04159) as a module; the sampling is a fused op."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from adn_kernels import ops


class DeformableAttention(nn.Module):
    """Each query looks at a few points of each level, around its reference, and adds up what it finds there.

    Names of parameters are those of the references. Heads are contiguous slices of channels; of what `sampling_offsets`
    and `attention_weights` return, heads come first, then levels, then points.

    Attributes:
        heads, levels, points: points are those of each head on each level.
    """

    def __init__(self, dim: int, heads: int = 8, levels: int = 3, points: int = 4) -> None:
        """
        Raises:
            ValueError: if `dim` is no multiple of `heads`.
        """
        super().__init__()
        if dim % heads != 0:
            raise ValueError(f"dim={dim} is no multiple of heads={heads}; each head takes an equal slice of channels")
        self.heads, self.levels, self.points = heads, levels, points
        self.value_proj = nn.Linear(dim, dim)
        self.sampling_offsets = nn.Linear(dim, heads * levels * points * 2)
        self.attention_weights = nn.Linear(dim, heads * levels * points)
        self.output_proj = nn.Linear(dim, dim)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """As published: each head looks in a direction of its own, its n-th point n steps away, whatever the query is;
        all points count the same."""
        angles = torch.arange(self.heads, dtype=torch.float32) * (2 * math.pi / self.heads)
        rays = torch.stack([angles.cos(), angles.sin()], -1)
        rays = rays / rays.abs().amax(-1, keepdim=True)  # onto the edge of a square, as pixels lie
        steps = torch.arange(1, self.points + 1)[:, None]
        offsets = (rays[:, None, None, :] * steps).expand(-1, self.levels, -1, -1)
        nn.init.zeros_(self.sampling_offsets.weight)
        self.sampling_offsets.bias.copy_(offsets.flatten())
        nn.init.zeros_(self.attention_weights.weight)
        nn.init.zeros_(self.attention_weights.bias)
        for projection in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(projection.weight)
            nn.init.zeros_(projection.bias)

    def forward(self, query: Tensor, reference: Tensor, value: Tensor, shapes: Sequence[tuple[int, int]]) -> Tensor:
        """
        Args:
            query: (B, Q, dim).
            reference: (B, Q, levels or 1, 4), boxes (cx, cy, w, h), or (B, Q, levels or 1, 2), points; fractions of the
                image. An offset counts in halves of the box divided by the number of points; without a box in pixels.
            value: (B, tokens, dim), the tokens of all levels in turn, each row by row.
            shapes: (height, width) of each level, plain ints.

        Returns:
            (B, Q, dim).

        Raises:
            ValueError: if a reference has neither 2 nor 4 coordinates, or `shapes` does not fit.
        """
        if len(shapes) != self.levels:
            raise ValueError(f"shapes={tuple(shapes)}; this attention was built for {self.levels} levels")
        if reference.shape[-1] not in (2, 4):
            raise ValueError(f"reference has shape {tuple(reference.shape)}; pass boxes (.., 4) or points (.., 2)")
        value = self.value_proj(value).unflatten(-1, (self.heads, -1))
        offsets = self.sampling_offsets(query).unflatten(-1, (self.heads, self.levels, self.points, 2))
        weights = self.attention_weights(query).unflatten(-1, (self.heads, self.levels * self.points)).softmax(-1)
        weights = weights.unflatten(-1, (self.levels, self.points))
        # Half precision is too coarse for places in a large map.
        wide = torch.promote_types(offsets.dtype, torch.float32)
        offsets, reference = offsets.to(wide), reference.to(wide)[:, :, None, :, None]
        if reference.shape[-1] == 4:
            locations = reference[..., :2] + offsets / self.points * reference[..., 2:] * 0.5
        else:
            # Filled in on the device: a copy of a list would make the host wait.
            sizes = torch.stack([offsets.new_full((), n) for height, width in shapes for n in (width, height)])
            locations = reference + offsets / sizes.view(-1, 1, 2)
        return self.output_proj(ops.deformable_attention(value, shapes, locations, weights))

    def extra_repr(self) -> str:
        return f"heads={self.heads}, levels={self.levels}, points={self.points}"
