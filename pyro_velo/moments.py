"""Components of a Gaussian mixture that become one: which are nearest, and what they are together."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def nearest(weights: Array, means: Array) -> list[int]:
    """The two components that lose the least sum of squares as one (Ward 1963), of shares (K,) and means (K, d)."""
    a, b = np.triu_indices(len(weights), 1)
    gap = (weights[a] * weights[b] / (weights[a] + weights[b])) * ((means[a] - means[b]) ** 2).sum(1)
    return [int(a[gap.argmin()]), int(b[gap.argmin()])]


def as_one(weights: Array, means: Array, covariances: Array) -> tuple[Array, Array]:
    """Mean (d,) and covariance (d, d) of a mixture of shares (K,), means (K, d) and covariances (K, d, d)."""
    share = weights / weights.sum()
    mean = share @ means
    away = means - mean
    return mean, np.einsum("k,kij->ij", share, covariances + away[:, :, None] * away[:, None])
