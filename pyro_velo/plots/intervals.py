"""From a posterior mean and sd of a positive rate to an interval: the LogNormal that has both."""

from __future__ import annotations

from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pyro_velo.errors import InputError


def lognormal(mean: ArrayLike, sd: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    r"""Location and scale of the logarithm, $\sigma^2 = \log(1 + sd^2/mean^2)$, $\mu = \log mean - \sigma^2/2$.

    Shapes: mean, sd broadcast; mean > 0. An sd of zero or NaN (a point estimate) gives sigma = 0.

    >>> mu, sigma = lognormal(2.0, 0.0)
    >>> float(np.exp(mu)), float(sigma)
    (2.0, 0.0)
    """
    mean, sd = np.asarray(mean, dtype=np.float64), np.nan_to_num(np.asarray(sd, dtype=np.float64))
    variance = np.log1p(np.square(sd / mean))
    return np.log(mean) - variance / 2, np.sqrt(variance)


def interval(mean: ArrayLike, sd: ArrayLike, level: float = 0.9) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The central interval of that LogNormal which holds `level` of it."""
    if not 0 < level < 1:
        raise InputError(f"Expected a level between 0 and 1, got {level}. Use 0.9 for a 90 % interval.")
    mu, sigma = lognormal(mean, sd)
    reach = NormalDist().inv_cdf((1 + level) / 2) * sigma
    return np.exp(mu - reach), np.exp(mu + reach)
