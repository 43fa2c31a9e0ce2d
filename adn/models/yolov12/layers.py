"""What YOLOv12 is made of. Names of parts are those of published checkpoints."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HEAD_WIDTH = 32  # channels of a head of attention
BatchNorm2d = functools.partial(nn.BatchNorm2d, eps=1e-3, momentum=0.03)


class Conv(nn.Module):
    """Convolution without bias, batch norm, SiLU (or nothing); the size stays, but for the stride."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 1, stride: int = 1, groups: int = 1, act: bool = True
                 ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
        self.bn = BatchNorm2d(outputs)
        self.act = nn.SiLU() if act else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x)))


class Bottleneck(nn.Module):
    """Two 3x3 convolutions with a shortcut; `expansion` is the width between them."""

    def __init__(self, width: int, expansion: float = 0.5) -> None:
        super().__init__()
        hidden = int(width * expansion)
        self.cv1 = Conv(width, hidden, 3)
        self.cv2 = Conv(hidden, width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.cv2(self.cv1(x))


class C3k(nn.Module):
    """Bottlenecks on one half of the width, nothing on the other."""

    def __init__(self, width: int, blocks: int = 2) -> None:
        super().__init__()
        half = width // 2
        self.cv1 = Conv(width, half)
        self.cv2 = Conv(width, half)
        self.cv3 = Conv(2 * half, width)
        self.m = nn.Sequential(*(Bottleneck(half, expansion=1.0) for _ in range(blocks)))

    def forward(self, x: Tensor) -> Tensor:
        return self.cv3(torch.cat((self.m(self.cv1(x)), self.cv2(x)), 1))


class C3k2(nn.Module):
    """Blocks, each on what the one before made; all that they make is concatenated and convolved.

    Args:
        c3k: blocks are `C3k`s, not bottlenecks.
        expansion: of the width inside.
    """

    def __init__(self, inputs: int, outputs: int, blocks: int, c3k: bool, expansion: float = 0.5) -> None:
        super().__init__()
        width = int(outputs * expansion)
        self.cv1 = Conv(inputs, 2 * width)
        self.cv2 = Conv((2 + blocks) * width, outputs)
        self.m = nn.ModuleList(C3k(width) if c3k else Bottleneck(width) for _ in range(blocks))

    def forward(self, x: Tensor) -> Tensor:
        made = list(self.cv1(x).chunk(2, 1))
        for block in self.m:
            made.append(block(made[-1]))
        return self.cv2(torch.cat(made, 1))


class AAttn(nn.Module):
    """Area attention: of each pixel to those of its area, one of `area` parts that follow each other row by row.

    In the form of the repository, queries and keys are made by one convolution and values by another; `packed`, the
    form of the package, all three by one, head by head, and the positional convolution is 7x7, not 5x5.
    """

    def __init__(self, width: int, area: int, packed: bool = False) -> None:
        super().__init__()
        self.heads, self.area = width // HEAD_WIDTH, area
        if packed:
            self.qkv = Conv(width, 3 * width, act=False)
        else:
            self.qk = Conv(width, 2 * width, act=False)
            self.v = Conv(width, width, act=False)
        self.proj = Conv(width, width, act=False)
        self.pe = Conv(width, width, 7 if packed else 5, groups=width, act=False)
        self.packed = packed

    def forward(self, x: Tensor) -> Tensor:
        b, _, h, w = x.shape
        if self.packed:
            q, k, v = self.qkv(x).unflatten(1, (self.heads, 3, HEAD_WIDTH)).unbind(2)
        else:
            q, k = self.qk(x).unflatten(1, (2, self.heads, HEAD_WIDTH)).unbind(1)
            v = self.v(x).unflatten(1, (self.heads, HEAD_WIDTH))
        y = F.scaled_dot_product_attention(*(self._areas(t) for t in (q, k, v)))
        # (B * area, heads, tokens, d) to (B, heads * d, H, W)
        y = y.unflatten(0, (b, self.area)).permute(0, 2, 4, 1, 3).reshape(b, -1, h, w)
        return self.proj(y + self.pe(v.flatten(1, 2)))

    def _areas(self, x: Tensor) -> Tensor:
        """(B, heads, d, H, W) to (B * area, heads, tokens, d): fused kernels of attention take no fifth dimension."""
        return x.flatten(3).unflatten(3, (self.area, -1)).permute(0, 3, 1, 4, 2).flatten(0, 1)


class ABlock(nn.Module):
    """Area attention and a perceptron, with a shortcut each."""

    def __init__(self, width: int, mlp_ratio: float, area: int, packed: bool = False) -> None:
        super().__init__()
        hidden = int(width * mlp_ratio)
        self.attn = AAttn(width, area, packed)
        self.mlp = nn.Sequential(Conv(width, hidden), Conv(hidden, width, act=False))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.trunc_normal_(module.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(x)
        return x + self.mlp(x)


class A2C2f(nn.Module):
    """As `C3k2`, of pairs of `ABlock`s (`area` > 0) or of `C3k`s; with a scaled shortcut around it if `residual`."""

    def __init__(self, inputs: int, outputs: int, blocks: int, area: int = 0, residual: bool = False,
                 mlp_ratio: float = 2.0, packed: bool = False) -> None:
        super().__init__()
        width = outputs // 2
        if width % HEAD_WIDTH:
            raise ValueError(f"attention of {width} channels; pass a multiple of {HEAD_WIDTH}")
        self.cv1 = Conv(inputs, width)
        self.cv2 = Conv((1 + blocks) * width, outputs)
        self.gamma = nn.Parameter(torch.full((outputs,), 0.01)) if area and residual else None
        self.m = nn.ModuleList(
            nn.Sequential(*(ABlock(width, mlp_ratio, area, packed) for _ in range(2))) if area else C3k(width)
            for _ in range(blocks))

    def forward(self, x: Tensor) -> Tensor:
        made = [self.cv1(x)]
        for block in self.m:
            made.append(block(made[-1]))
        y = self.cv2(torch.cat(made, 1))
        return y if self.gamma is None else x + self.gamma[:, None, None] * y
