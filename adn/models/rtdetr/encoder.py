"""The hybrid encoder of RT-DETR, its neck: attention within the coarsest map, then fusion of the three maps, top-down
and bottom-up, by CSP blocks. Official names.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layers import ConvNorm, Tables

_TEMPERATURE = 10000.0  # of the sines that tell a token its place


class RepVGGBlock(nn.Module):
    """SiLU(norm(conv3x3 x) + norm(conv1x1 x)): one 3x3 convolution, once its norms are folded."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = ConvNorm(channels, channels, 3)
        self.conv2 = ConvNorm(channels, channels, 1)
        self.act = nn.SiLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.conv1(x) + self.conv2(x))


class CSPRepLayer(nn.Module):
    """conv3(bottlenecks(conv1 x) + conv2 x), in `expansion` times as many channels as come out."""

    def __init__(self, channels: int, out_channels: int, blocks: int, expansion: float) -> None:
        super().__init__()
        width = int(out_channels * expansion)
        self.conv1 = ConvNorm(channels, width, 1, act=nn.SiLU(inplace=True))
        self.conv2 = ConvNorm(channels, width, 1, act=nn.SiLU(inplace=True))
        self.bottlenecks = nn.Sequential(*(RepVGGBlock(width) for _ in range(blocks)))
        self.conv3 = nn.Identity() if width == out_channels else ConvNorm(
            width, out_channels, 1, act=nn.SiLU(inplace=True))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv3(self.bottlenecks(self.conv1(x)) + self.conv2(x))


class AttentionLayer(nn.Module):
    """A post-norm transformer layer."""

    def __init__(self, dim: int, heads: int, feedforward: int) -> None:
        super().__init__()
        self.self_attn = nn.MultiheadAttention(dim, heads, batch_first=True)
        self.linear1 = nn.Linear(dim, feedforward)
        self.linear2 = nn.Linear(feedforward, dim)
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)

    def forward(self, x: Tensor, position: Tensor) -> Tensor:
        """(B, T, dim) and a table (1, T, dim) that queries and keys are told their place by."""
        q = x + position
        x = self.norm1(x + self.self_attn(q, q, x, need_weights=False)[0])
        return self.norm2(x + self.linear2(F.gelu(self.linear1(x))))


class AttentionStack(nn.Module):
    def __init__(self, layers: int, dim: int, heads: int, feedforward: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(AttentionLayer(dim, heads, feedforward) for _ in range(layers))

    def forward(self, x: Tensor, position: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x, position)
        return x


class PositionTable(Tables):
    """Sines and cosines of the place of each token: (1, H * W, dim) for a map (B, C, H, W).

    As in the official code, on whose order trained weights depend: entry n stands for x = n // H, y = n % H, though
    tokens come row by row (y = n // W). On a square map that swaps x and y; on others it is neither.

    Args:
        by_rows: as in Hugging Face's code: x and y are swapped on all maps; on square ones that is the same.
    """

    def __init__(self, dim: int, by_rows: bool = False) -> None:
        super().__init__()
        if dim % 4:
            raise ValueError(f"a width of {dim}; sines and cosines of x and y need a multiple of 4")
        self.dim, self.by_rows = dim, by_rows

    def forward(self, feature: Tensor) -> Tensor:
        h, w = feature.shape[-2:]
        return self.kept((h, w), feature.device, feature.dtype, lambda: (self.table(h, w),))[0]

    def table(self, h: int, w: int) -> Tensor:
        x, y = (torch.arange(side, dtype=torch.float32) for side in ((h, w) if self.by_rows else (w, h)))
        x, y = torch.meshgrid(x, y, indexing="ij")
        omega = torch.arange(self.dim // 4, dtype=torch.float32) / (self.dim // 4)
        omega = 1.0 / _TEMPERATURE**omega
        x, y = x.flatten()[:, None] * omega, y.flatten()[:, None] * omega
        return torch.cat([x.sin(), x.cos(), y.sin(), y.cos()], dim=1)[None]


class HybridEncoder(nn.Module):
    """Three maps of strides 8, 16, 32 to three of `hidden` channels each.

    Args:
        channels: of the three maps that come in.
        hidden: of those that go out.
        heads, feedforward: of the attention within the coarsest map.
        expansion: width of the CSP blocks, of `hidden`.
        depth_mult: times 3 RepVGG blocks in each CSP block.
        positions_by_rows: see `PositionTable`.
    """

    def __init__(self, channels: Sequence[int], hidden: int = 256, heads: int = 8, feedforward: int = 1024,
                 expansion: float = 1.0, depth_mult: float = 1.0, positions_by_rows: bool = False) -> None:
        super().__init__()
        self.input_proj = nn.ModuleList(
            nn.Sequential(nn.Conv2d(c, hidden, 1, bias=False), nn.BatchNorm2d(hidden)) for c in channels)
        self.encoder = nn.ModuleList([AttentionStack(1, hidden, heads, feedforward)])
        self.position = PositionTable(hidden, positions_by_rows)
        blocks, steps = max(1, round(3 * depth_mult)), len(channels) - 1

        def act() -> nn.Module:
            return nn.SiLU(inplace=True)

        self.lateral_convs = nn.ModuleList(ConvNorm(hidden, hidden, 1, act=act()) for _ in range(steps))
        self.fpn_blocks = nn.ModuleList(CSPRepLayer(2 * hidden, hidden, blocks, expansion) for _ in range(steps))
        self.downsample_convs = nn.ModuleList(ConvNorm(hidden, hidden, 3, 2, act()) for _ in range(steps))
        self.pan_blocks = nn.ModuleList(CSPRepLayer(2 * hidden, hidden, blocks, expansion) for _ in range(steps))

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        maps = [project(maps[i]) for i, project in enumerate(self.input_proj)]
        coarse = maps[-1]
        tokens = self.encoder[0](coarse.flatten(2).transpose(1, 2), self.position(coarse))
        inner = [tokens.transpose(1, 2).reshape(coarse.shape)]
        for low, lateral, block in zip(maps[-2::-1], self.lateral_convs, self.fpn_blocks):
            inner[0] = lateral(inner[0])
            up = F.interpolate(inner[0], scale_factor=2.0, mode="nearest")
            inner.insert(0, block(torch.cat([up, low], dim=1)))
        out = [inner[0]]
        for high, down, block in zip(inner[1:], self.downsample_convs, self.pan_blocks):
            out.append(block(torch.cat([down(out[-1]), high], dim=1)))
        return out
