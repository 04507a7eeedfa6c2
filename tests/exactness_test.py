"""Kernels and numpy come to the same bits."""

import numpy as np

from graphswap import elementwise, exactness


def test_numpy_computes_what_kernels_compute():
    assert exactness.is_numpy_exact()


def test_what_differs_in_the_last_bit_is_seen(monkeypatch):
    """Eigen's reciprocal of 32 bits is an estimate that is made better once."""
    monkeypatch.setattr(elementwise, "FUNCTIONS", {**elementwise.FUNCTIONS, "Reciprocal": np.reciprocal})
    assert not exactness.is_numpy_exact.__wrapped__()
