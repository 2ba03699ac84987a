"""The same test on every device there is."""

from __future__ import annotations

import pytest


def each_device():
    """Parametrizes a test over `device`."""
    return pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
