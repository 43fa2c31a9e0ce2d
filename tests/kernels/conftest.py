"""Settings of all tests of kernels."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def exact_products(ieee: None) -> None:
    """What error is allowed depends on that of eager PyTorch."""
