"""A net that no family knows, as it was when `data/former/by_hand.safetensors` was written."""

from __future__ import annotations

import torch
from torch import nn


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.norm(self.conv(x)).relu()


def small_net() -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential()
    net.stem = nn.Conv2d(3, 6, 3, padding=1)
    net.stage1 = nn.Sequential(*(Residual(6) for _ in range(3)))
    net.stage2 = nn.Sequential(*(Residual(6) for _ in range(4)))
    net.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3))
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.normal_(module.running_mean)
    return net
