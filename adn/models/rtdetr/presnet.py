"""PResNet "vd", the backbone of the official RT-DETR: a ResNet with a stem of three convolutions, and average pooling
before the projection of a strided shortcut (He et al., Bag of Tricks, arXiv:1812.01187). Official names.
"""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor, nn

from .layers import ConvNorm

BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}


class Block(nn.Module):
    """Base of both kinds: the shortcut."""

    expansion: int

    def __init__(self, channels: int, width: int, stride: int, projects: bool) -> None:
        super().__init__()
        self.act = nn.ReLU(inplace=True)
        self.short: nn.Module | None = None
        if projects:
            project = ConvNorm(channels, width * self.expansion, 1)
            self.short = project if stride == 1 else nn.Sequential(OrderedDict(
                pool=nn.AvgPool2d(2, 2, ceil_mode=True), conv=project))

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.residual(x) + (x if self.short is None else self.short(x)))


class BasicBlock(Block):
    expansion = 1

    def __init__(self, channels: int, width: int, stride: int, projects: bool) -> None:
        super().__init__(channels, width, stride, projects)
        self.branch2a = ConvNorm(channels, width, 3, stride, nn.ReLU(inplace=True))
        self.branch2b = ConvNorm(width, width, 3)

    def residual(self, x: Tensor) -> Tensor:
        return self.branch2b(self.branch2a(x))


class Bottleneck(Block):
    expansion = 4

    def __init__(self, channels: int, width: int, stride: int, projects: bool) -> None:
        super().__init__(channels, width, stride, projects)
        self.branch2a = ConvNorm(channels, width, 1, act=nn.ReLU(inplace=True))
        self.branch2b = ConvNorm(width, width, 3, stride, nn.ReLU(inplace=True))
        self.branch2c = ConvNorm(width, width * 4, 1)

    def residual(self, x: Tensor) -> Tensor:
        return self.branch2c(self.branch2b(self.branch2a(x)))


class Stage(nn.Module):
    def __init__(self, block: type[Block], channels: int, width: int, stride: int, count: int) -> None:
        super().__init__()
        out = width * block.expansion
        self.blocks = nn.Sequential(*(
            block(out if i else channels, width, 1 if i else stride, projects=not i) for i in range(count)))

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x)


class PResNet(nn.Module):
    """Images (B, 3, H, W) to feature maps of strides 8, 16 and 32.

    Args:
        depth: 18, 34 (basic blocks), 50 or 101 (bottlenecks).
        width: channels of the first stage, 64 in the official models; the stem has half of it.

    Attributes:
        channels: of the three maps.
    """

    def __init__(self, depth: int, width: int = 64) -> None:
        super().__init__()
        if depth not in BLOCKS:
            raise ValueError(f"no PResNet of depth {depth}; there are {', '.join(map(str, BLOCKS))}")
        block = BasicBlock if depth < 50 else Bottleneck
        widths = [width * 2**i for i in range(4)]
        sizes = [3, width // 2, width // 2, width]
        self.conv1 = nn.Sequential(OrderedDict(
            (f"conv1_{i + 1}", ConvNorm(sizes[i], sizes[i + 1], 3, 1 if i else 2, nn.ReLU(inplace=True)))
            for i in range(3)))
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        outs = [w * block.expansion for w in widths]
        self.res_layers = nn.ModuleList(
            Stage(block, channels, w, 2 if i else 1, count)
            for i, (channels, w, count) in enumerate(zip([width, *outs], widths, BLOCKS[depth])))
        self.channels = outs[1:]
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> list[Tensor]:
        # No loop: a compiler that cannot look into the stages would give up what is around them.
        stage1, stage2, stage3, stage4 = self.res_layers
        x = stage2(stage1(self.maxpool(self.conv1(x))))
        y = stage3(x)
        return [x, y, stage4(y)]
