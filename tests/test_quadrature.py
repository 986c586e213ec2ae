"""Points of quadrature have the moments that they say, and give those of what is nearly Normal."""

from __future__ import annotations

import math

import pytest
import torch
from torch.distributions import MultivariateNormal

from pyro_velo.quadrature import NODES, adaptive, moments


@pytest.mark.parametrize("n", [1, 2])
def test_points_have_the_moments_of_a_normal(n: int) -> None:
    points = adaptive(n)
    weights = (points.log_weights - points.at.square().sum(-1) / 2).exp() / (2 * math.pi) ** (n / 2)
    for k in range(n):
        for power in range(2 * NODES[k]):
            expected = 0 if power % 2 else math.prod(range(power - 1, 0, -2))
            assert float(weights @ points.at[:, k] ** power) == pytest.approx(expected, abs=1e-5, rel=1e-9)


def test_densities_that_are_no_standard_normals_have_their_own_moments() -> None:
    points = adaptive(2)
    covariance = torch.tensor([[[1.3, 0.4], [0.4, 0.9]], [[0.8, -0.2], [-0.2, 1.2]]], dtype=torch.float64)
    true = MultivariateNormal(torch.tensor([[0.3, -0.2], [0.0, 0.5]], dtype=torch.float64), covariance)
    found = moments(points, true.log_prob(points.at[:, None]) + torch.tensor([1e4, -1e4]))
    torch.testing.assert_close(found.mean, true.mean, atol=5e-3, rtol=0)
    torch.testing.assert_close(found.covariance, covariance, atol=0.02, rtol=0)


def test_a_skew_density_has_its_own_mean_and_variance() -> None:
    points, shape = adaptive(1), 30.0
    # The logarithm of a gamma variable, in units of its sd about its mode, as an expected count is known from a count.
    log_x = math.log(shape) + points.at / math.sqrt(shape)
    found = moments(points, shape * log_x - log_x.exp())
    digamma, trigamma = (float(torch.special.polygamma(k, torch.tensor(shape))) for k in (0, 1))
    assert float(found.mean) == pytest.approx((digamma - math.log(shape)) * math.sqrt(shape), abs=1e-5)
    assert float(found.covariance) == pytest.approx(trigamma * shape, rel=1e-4)
