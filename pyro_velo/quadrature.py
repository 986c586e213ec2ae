"""Points at which a function of a standard Normal is looked at, for its mean; and of what is nearly one."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

NODES = (9, 5)
"""Of the first and the second coordinate of `adaptive`."""


def cubature(n: int) -> list[tuple[tuple[float, ...], float, float]]:
    """Points of n coordinates, 1 or 2, whose weighted mean is a standard Normal's, of polynomials of degree 5.

    Each with a sign, opposite for mirror images, and its weight; the centre is there with either sign (Stroud 1971).

    >>> sum(weight * point[0] ** 4 for point, _, weight in cubature(2))
    3.0
    """
    centre, axis, corner = 2 / (n + 2), (4 - n) / (2 * (n + 2) ** 2), 1 / (n + 2) ** 2
    along = [tuple(math.sqrt(n + 2) * (i == k) for i in range(n)) for k in range(n)]
    found = [((0.0,) * n, 1.0, centre / 2), *((point, 1.0, axis) for point in along)]
    if n == 2:
        far = math.sqrt((n + 2) / 2)
        found += [((far, far), 1.0, corner), ((far, -far), 1.0, corner)]
    return found + [(tuple(-x for x in point), -sign, weight) for point, sign, weight in found]


class Points(NamedTuple):
    """`at` (P, n), and the logarithms of the weights (P,) by which a density there is multiplied; float64."""

    at: Tensor
    log_weights: Tensor


def adaptive(n: int) -> Points:
    """Gauss-Hermite points of n coordinates, 1 or 2, which integrate any density that resembles a standard Normal.

    Exact for a standard Normal times a polynomial of degree 17 in the first coordinate, and of 9 in the second.

    Reference: Naylor and Smith 1982; Liu and Pierce 1994.

    >>> points = adaptive(1)
    >>> density = torch.exp(-(points.at[:, 0] ** 2) / 8) / math.sqrt(8 * math.pi)
    >>> round(float((points.log_weights.exp() * density).sum()), 2)
    0.99
    """
    axes = [np.polynomial.hermite_e.hermegauss(k) for k in NODES[:n]]
    at, weights = (
        np.stack([each.ravel() for each in np.meshgrid(*parts, indexing="ij")], -1) for parts in zip(*axes, strict=True)
    )
    return Points(torch.from_numpy(at), torch.from_numpy(np.log(weights).sum(-1) + (at**2).sum(-1) / 2))


class Moments(NamedTuple):
    """`mean` (B, n) and `covariance` (B, n, n)."""

    mean: Tensor
    covariance: Tensor


def moments(points: Points, log_density: Tensor) -> Moments:
    """Of B densities, not normalised, whose logarithms at the `points` are (P, B)."""
    at = points.at.to(log_density)
    weights = torch.softmax(log_density + points.log_weights.to(log_density)[:, None], 0)
    mean = weights.mT @ at
    off = at - mean[:, None]
    return Moments(mean, torch.einsum("pb,bpi,bpj->bij", weights, off, off))
