"""Depth that is chosen by the input: two routes, one score, one threshold; for a budget, or a latency to hold.

    router = ...                                             # adn route fit
    net = RoutedNet(adn.fuse(net), router, ThresholdPolicy.from_share(scores, 0.3))
    logits = net(images)                                     # each image at the depth that pays
"""

from ..core.lazy import attach

_WHERE = {
    "AdvantageRouter": "..routers",
    "BudgetController": ".controller",
    "Cascade": ".routed",
    "Decision": ".decisions",
    "DifficultyRouter": "..routers",
    "ImageRouter": ".routed",
    "MedianOffset": ".losses",
    "RollingShare": ".controller",
    "RoutedNet": ".routed",
    "Router": "..routers",
    "ThresholdPolicy": ".policy",
    "advantage_loss": ".losses",
    "offset_loss": ".losses",
}
__all__ = list(_WHERE)

__getattr__, __dir__ = attach(globals(), _WHERE)
