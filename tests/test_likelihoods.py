"""Laws of the likelihoods, one table for all of them, and of the mixture that gives both molecules one state."""

from __future__ import annotations

import math
from itertools import pairwise

import pyro.distributions as dist
import pytest
import torch
from tolerances import assert_close, assert_mean
from torch import Tensor
from toys import leaf

from pyro_velo.likelihoods import LIKELIHOODS, JointMixture, Likelihood
from pyro_velo.priors import Priors

MEANS = (0.05, 0.4, 3.0)
everyone = pytest.mark.parametrize("make", LIKELIHOODS.values(), ids=LIKELIHOODS.keys())


def parameters_of(likelihood: Likelihood, n_genes: int = 3) -> dict[str, Tensor]:
    """One positive value per gene for each parameter."""
    return {name: leaf(torch.linspace(0.1, 0.4, n_genes)) for name in likelihood.parameters}


def grid(support: dist.constraints.Constraint) -> Tensor:
    """Points that cover all but a negligible share of any of our densities."""
    return torch.arange(400.0) if support.is_discrete else torch.linspace(-8, 12, 400_001)


@everyone
def test_density_integrates_to_one(make: type[Likelihood], double: None) -> None:
    likelihood = make()
    p = likelihood(torch.tensor(MEANS), parameters_of(likelihood))
    x = grid(p.support)
    density = p.log_prob(x[:, None]).exp()
    total = density.sum(0) if p.support.is_discrete else torch.trapezoid(density, x, dim=0)
    assert_close(total.detach(), 1.0, slack=100)


@everyone
def test_its_mean_is_the_mean_that_it_was_given(make: type[Likelihood], double: None) -> None:
    likelihood = make()
    p = likelihood(torch.tensor(MEANS), parameters_of(likelihood))
    assert_close(p.mean.detach(), torch.tensor(MEANS))


@everyone
def test_the_mean_and_every_parameter_get_a_gradient(make: type[Likelihood], double: None) -> None:
    likelihood = make()
    mean, parameters = leaf(torch.tensor(MEANS)), parameters_of(likelihood)
    likelihood(mean, parameters).log_prob(torch.tensor([1.0, 2.0, 5.0])).sum().backward()
    for name, value in {"mean": mean, **parameters}.items():
        assert value.grad is not None and value.grad.isfinite().all() and (value.grad != 0).all(), name


@everyone
def test_every_parameter_has_a_prior(make: type[Likelihood]) -> None:
    assert all(hasattr(Priors(), name) for name in make.parameters)


@everyone
def test_scale_multiplies_the_spread(make: type[Likelihood], double: None) -> None:
    likelihood = make()
    mean, parameters = torch.tensor(MEANS), parameters_of(likelihood)
    one, tenth = likelihood(mean, parameters), likelihood(mean, parameters, 0.1)
    assert_close(tenth.stddev.detach(), 0.1 * one.stddev.detach())
    each = likelihood(mean.expand(4, 2, 3), parameters, torch.tensor([1.0, 1.0, 1.0, 0.1])[:, None, None])
    assert each.batch_shape == (4, 2, 3)
    assert_close(each.stddev[3].detach(), tenth.stddev.detach().expand(2, 3))
    assert_close(each.stddev[0].detach(), one.stddev.detach().expand(2, 3))


@everyone
def test_samples_match_the_density(make: type[Likelihood], double: None) -> None:
    likelihood = make()
    p = likelihood(torch.tensor(MEANS), parameters_of(likelihood))
    draws = p.sample((20_000,))
    assert_mean(draws, p.mean.detach())
    assert_mean((draws - p.mean).detach() ** 2, p.variance.detach())


CELLS, GENES, K = 5, 3, 4


def random_mixture(weights: Tensor | None = None) -> JointMixture:
    weights = torch.rand(K, CELLS, GENES) if weights is None else weights
    u = dist.Normal(3 * torch.rand(K, CELLS, GENES), 0.2 + torch.rand(GENES))
    s = dist.Normal(3 * torch.rand(K, CELLS, GENES), 0.2 + torch.rand(GENES))
    return JointMixture(weights.log(), u, s)


def normalised() -> Tensor:
    return dist.Dirichlet(torch.ones(K)).sample((CELLS, GENES)).movedim(-1, 0)


def test_the_mixture_is_the_sum_over_states(double: None) -> None:
    mixture, value = random_mixture(normalised()), 3 * torch.rand(CELLS, GENES, 2)
    log_prob = mixture.log_prob(value)
    assert log_prob.shape == (CELLS, GENES)
    for n in range(CELLS):
        for g in range(GENES):
            u, s = value[n, g].tolist()
            total = 0.0
            for k in range(K):
                at = (k, n, g)
                p_u = dist.Normal(mixture.unspliced.mean[at], mixture.unspliced.stddev[at]).log_prob(torch.tensor(u))
                p_s = dist.Normal(mixture.spliced.mean[at], mixture.spliced.stddev[at]).log_prob(torch.tensor(s))
                total += math.exp(mixture.log_weights[at] + p_u + p_s)
            assert log_prob[n, g].item() == pytest.approx(math.log(total), rel=1e-10)


def test_the_states_are_its_log_joint(double: None) -> None:
    mixture, value = random_mixture(normalised()), 3 * torch.rand(CELLS, GENES, 2)
    joint = mixture.log_joint(value)
    assert joint.shape == (K, CELLS, GENES)
    assert_close(joint.exp().sum(0), mixture.log_prob(value).exp())


def test_both_molecules_share_one_state(double: None) -> None:
    # States far apart: (0, 0) and (9, 9) are likely; (0, 9) is as good as impossible, which mixing apart would allow.
    at = torch.tensor([0.0, 9.0])[:, None]
    mixture = JointMixture(torch.full((2, 1), 0.5).log(), dist.Normal(at, 0.5), dist.Normal(at, 0.5))
    together, apart = mixture.log_prob(torch.tensor([[9.0, 9.0]])), mixture.log_prob(torch.tensor([[0.0, 9.0]]))
    assert together - apart > 100
    draws = mixture.sample((2000,))[:, 0]
    assert ((draws[:, 0] > 4.5) == (draws[:, 1] > 4.5)).all()


def test_the_mixture_integrates_to_one(double: None) -> None:
    at = torch.tensor([0.5, 1.0, 2.0, 0.0])[:, None, None]
    mixture = JointMixture(normalised()[:, :1, :1].log(), dist.Normal(at, 0.3), dist.Normal(at.flip(0), 0.2))
    axis = torch.linspace(-3, 5, 801)
    density = mixture.log_prob(torch.cartesian_prod(axis, axis)[:, None]).exp().reshape(801, 801)
    total = torch.trapezoid(torch.trapezoid(density, axis, dim=-1), axis, dim=-1)
    assert_close(total, 1.0)


def test_weights_that_do_not_sum_to_one_are_taken_as_they_are(double: None) -> None:
    weights, value = normalised(), torch.rand(CELLS, GENES, 2)
    mixture = random_mixture(weights)
    bound = JointMixture(weights.log() - 2.5, mixture.unspliced, mixture.spliced)
    assert_close(bound.log_prob(value), mixture.log_prob(value) - 2.5)


def test_a_value_is_unspliced_then_spliced(double: None) -> None:
    one = torch.zeros(1, CELLS, GENES)
    mixture = JointMixture(one, dist.Normal(one + 1, 0.1), dist.Normal(one + 2, 0.3))
    assert (mixture.batch_shape, mixture.event_shape) == ((CELLS, GENES), (2,))
    u, s = torch.rand(CELLS, GENES), torch.rand(CELLS, GENES)
    expected = dist.Normal(1.0, 0.1).log_prob(u) + dist.Normal(2.0, 0.3).log_prob(s)
    assert_close(mixture.log_prob(torch.stack((u, s), -1)), expected)
    assert mixture.sample().shape == (CELLS, GENES, 2)
    assert mixture.sample((7, 2)).shape == (7, 2, CELLS, GENES, 2)


def test_samples_have_the_moments_of_the_mixture(double: None) -> None:
    weights = normalised()
    mixture = random_mixture(weights)
    draws = mixture.sample((20_000,))
    u, s = mixture.unspliced, mixture.spliced
    assert_mean(draws[..., 0], (weights * u.mean).sum(0))
    assert_mean(draws[..., 1], (weights * s.mean).sum(0))
    assert_mean(draws[..., 0] ** 2, (weights * (u.mean**2 + u.variance)).sum(0))
    # Within a state the molecules are independent; across states they are not.
    assert_mean(draws.prod(-1), (weights * u.mean * s.mean).sum(0))


def test_expand_repeats_the_density(double: None) -> None:
    mixture, value = random_mixture(normalised()), torch.rand(CELLS, GENES, 2)
    wide = mixture.expand(torch.Size((6, CELLS, GENES)))
    # States lead, so a new dimension stands between them and the cells.
    assert (wide.batch_shape, wide.event_shape) == ((6, CELLS, GENES), (2,))
    assert_close(wide.log_prob(value), mixture.log_prob(value).expand(6, CELLS, GENES))


def test_values_may_have_more_leading_dimensions_than_the_mixture(double: None) -> None:
    # As many values as states, so that a mixture that lines the two up is caught, too.
    mixture, value = random_mixture(normalised()), torch.rand(K, CELLS, GENES, 2)
    assert_close(mixture.log_prob(value), torch.stack([mixture.log_prob(one) for one in value]))


def test_expand_broadcasts_one_cell_to_many(double: None) -> None:
    one = JointMixture(normalised()[:, :1].log(), dist.Normal(torch.rand(K, 1, GENES), 0.3), dist.Normal(1.0, 0.3))
    value = torch.rand(CELLS, GENES, 2)
    assert_close(one.expand(torch.Size((CELLS, GENES))).log_prob(value), one.log_prob(value))


def test_far_away_values_keep_a_finite_gradient() -> None:
    mean = leaf(torch.tensor([0.1, 0.2, 0.3, 0.0])[:, None])
    mixture = JointMixture(torch.zeros(4, 1), dist.Normal(mean, 1e-3), dist.Normal(mean, 1e-3))
    mixture.log_prob(torch.tensor([[50.0, 80.0]])).sum().backward()
    assert mean.grad.isfinite().all() and mean.grad.abs().sum() > 0


def test_better_values_are_more_likely(double: None) -> None:
    likelihood = LIKELIHOODS["normal"]()
    p = likelihood(torch.tensor([1.0]), {"noise": torch.tensor([0.1])})
    away = [p.log_prob(torch.tensor([1.0 + step])).item() for step in (0.0, 0.1, 0.3, 1.0)]
    assert all(near > far for near, far in pairwise(away))
