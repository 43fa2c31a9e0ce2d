"""What routers learn from."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

ADVANTAGES = ("mse", "mae", "huber", "corr")
_TINY = 1e-8  # added to the denominator of a correlation


class MedianOffset(nn.Module):
    """The median of how much loss the deep route saved so far, of all images of a run (DynamicDet, step 2).

    Args:
        refresh_until: it is computed anew at every call before this one (the first is call 1), ...
        refresh_every: ... and then at every call whose number is a multiple of this.

    Attributes:
        offset: the median in force; 0.0 before the first call.
    """

    def __init__(self, refresh_until: int = 10_000, refresh_every: int = 1000) -> None:
        super().__init__()
        if refresh_until < 1 or refresh_every < 1:
            raise ValueError(f"refresh_until={refresh_until}, refresh_every={refresh_every}; pass at least 1")
        self.refresh_until, self.refresh_every = refresh_until, refresh_every
        self.offset = 0.0
        self._saved: list[float] = []

    def forward(self, saved: float) -> float:
        """The median with this image in it.

        Raises:
            ValueError: if `saved`, the loss of the shallow route less that of the deep one, is not finite; nothing is
                kept of it.
        """
        if not np.isfinite(saved):
            raise ValueError(f"the losses of the routes differ by {saved}: one of them is not finite")
        self._saved.append(float(saved))
        calls = len(self._saved)
        if calls < self.refresh_until or calls % self.refresh_every == 0:
            self.offset = float(np.median(self._saved))
        return self.offset

    def get_extra_state(self) -> dict[str, object]:
        return {"offset": self.offset, "saved": torch.tensor(self._saved, dtype=torch.float64)}

    def set_extra_state(self, state: dict[str, object]) -> None:
        self.offset, self._saved = float(state["offset"]), state["saved"].tolist()


def offset_loss(easiness: Tensor, loss1: Tensor, loss2: Tensor, tracker: MedianOffset) -> Tensor:
    """The router's loss: s (L1 - offset / 2) + (1 - s) (L2 + offset / 2), so that images of which the deep route saves
    more than the median are sent there, and the data is parted in halves (DynamicDet, step 2).

    Args:
        easiness: (B,), s, in (0, 1): of the shallow route.
        loss1, loss2: (B,) of the shallow and the deep route; no gradient goes there.
        tracker: of the run; it takes in the images in their order, and the offset of each counts for it.

    Returns:
        (), the mean over the batch.

    Raises:
        ValueError: if shapes differ, or a loss is not finite.
    """
    if not easiness.shape == loss1.shape == loss2.shape or easiness.ndim != 1:
        raise ValueError(f"scores {tuple(easiness.shape)}, losses {tuple(loss1.shape)} and {tuple(loss2.shape)}; pass "
                         "(B,) of each")
    loss1, loss2 = loss1.detach(), loss2.detach()
    offsets = easiness.new_tensor([tracker(saved) for saved in (loss1 - loss2).tolist()])
    return (easiness * (loss1 - offsets / 2) + (1 - easiness) * (loss2 + offsets / 2)).mean()


def advantage_loss(pred: Tensor, loss_base: Tensor, loss_super: Tensor, kind: str = "mse", delta: float = 0.1
                   ) -> Tensor:
    """How far a predicted advantage is from the real one, how much loss the deep route saves (dynamic depth routing).

    Args:
        pred: (B,).
        loss_base, loss_super: (B,) of the routes; no gradient goes there.
        kind: "mse", "mae", "huber" (quadratic up to `delta`), or "corr", 1 - Pearson's correlation.

    Returns:
        (), the mean over the batch.

    Raises:
        ValueError: if shapes differ, or on another kind.
    """
    if kind not in ADVANTAGES:
        raise ValueError(f"kind={kind!r}; pass one of {', '.join(map(repr, ADVANTAGES))}")
    if not pred.shape == loss_base.shape == loss_super.shape or pred.ndim != 1:
        raise ValueError(f"predictions {tuple(pred.shape)}, losses {tuple(loss_base.shape)} and "
                         f"{tuple(loss_super.shape)}; pass (B,) of each")
    real = (loss_base - loss_super).detach()
    if kind == "mse":
        return F.mse_loss(pred, real)
    if kind == "mae":
        return F.l1_loss(pred, real)
    if kind == "huber":
        return F.huber_loss(pred, real, delta=delta)
    return 1 - correlation(pred, real)


def correlation(a: Tensor, b: Tensor) -> Tensor:
    """Pearson's, of (N,) and (N,)."""
    a, b = a - a.mean(), b - b.mean()
    return (a * b).sum() / (a.norm() * b.norm() + _TINY)
