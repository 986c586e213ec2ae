"""The special functions are torch's, and their gradients those of what they say."""

from __future__ import annotations

import pytest
import torch
from tolerances import assert_close
from toys import leaf

from pyro_velo.special import log_gamma_and_digamma, normal_log_density


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_log_gamma_and_digamma_are_torchs_with_their_gradients(dtype: torch.dtype) -> None:
    x = leaf(torch.logspace(-3, 5, 2000, dtype=torch.float64).to(dtype))
    exact = leaf(x.double())
    for ours, theirs in zip(log_gamma_and_digamma(x), (torch.lgamma(exact), torch.digamma(exact)), strict=True):
        # Both cross zero, where rounding is that of the terms, about 10 in size: the tolerance is absolute there.
        scale = theirs.detach().abs().clamp_min(1)
        assert_close((ours.detach().double() / scale).to(dtype), (theirs.detach() / scale).to(dtype), slack=5)
        (ours_slope,) = torch.autograd.grad(ours.sum(), x, retain_graph=True)
        (slope,) = torch.autograd.grad(theirs.sum(), exact, retain_graph=True)
        scale = slope.abs().clamp_min(1)
        assert_close((ours_slope.double() / scale).to(dtype), (slope / scale).to(dtype), slack=5)


def test_normal_log_density_is_torchs_with_its_gradients_by_every_argument(double: None) -> None:
    x, mean, scale = leaf(torch.randn(6, 3)), leaf(torch.randn(4, 6, 3)), leaf(0.1 + torch.rand(4, 1, 3))
    assert_close(
        normal_log_density(x, mean, scale).detach(), torch.distributions.Normal(mean, scale).log_prob(x).detach()
    )
    assert torch.autograd.gradcheck(normal_log_density, (x, mean, scale))
    # Broadcast the other way round, too: many values of few means.
    assert torch.autograd.gradcheck(normal_log_density, (leaf(torch.randn(5, 3)), leaf(torch.randn(3)), leaf(scale[0])))
