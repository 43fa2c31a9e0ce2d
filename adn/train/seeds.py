"""Seeds made of several integers, so that neighbouring runs, epochs and processes share no random numbers."""

from __future__ import annotations

import random

import numpy as np
import torch


def mixed_seed(*key: int) -> int:
    """One 63-bit seed from several integers, e.g. (seed, epoch, process)."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> np.uint64(1))


def seed_all(*key: int) -> None:
    """Seed the global generators of Python, NumPy and torch (all devices)."""
    seed = mixed_seed(*key)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
