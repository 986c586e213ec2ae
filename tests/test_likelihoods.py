"""Laws of the likelihoods, one table for all of them, and of the mixture that gives both molecules one state."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from itertools import pairwise

import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import TorchDistribution
from tolerances import STANDARD_ERRORS, assert_close, assert_mean
from torch import Tensor
from toys import leaf

from pyro_velo.errors import InputError
from pyro_velo.likelihoods import LIKELIHOODS, NB, ZINB, ZIP, Likelihood, Normal, Poisson, StudentT, Tobit
from pyro_velo.mixture import JointMixture
from pyro_velo.priors import Priors

MEANS = (0.05, 0.4, 3.0)
RANGES = {"noise": (0.1, 0.4), "dispersion": (0.6, 5.0), "gate": (-2.0, 0.5)}
everyone = pytest.mark.parametrize("make", LIKELIHOODS.values(), ids=LIKELIHOODS.keys())


def uncensored(make: type[Likelihood]) -> Callable[[], Likelihood]:
    """The likelihood without a lump at zero, which a grid of points does not see; it has a test of its own."""
    return Normal if make is Tobit else make


def parameters_of(likelihood: Likelihood, n_genes: int = 3) -> dict[str, Tensor]:
    """One value per gene for each parameter."""
    return {name: leaf(torch.linspace(*RANGES[name], n_genes)) for name in likelihood.parameters}


def an_example(make: Callable[[], Likelihood]) -> TorchDistribution:
    """Of three genes, without gradients."""
    likelihood = make()
    return likelihood(torch.tensor(MEANS), {name: each.detach() for name, each in parameters_of(likelihood).items()})


def grid(p: TorchDistribution) -> tuple[Tensor, Tensor]:
    """Points (n, 1) that cover all but a negligible share of any of our distributions, and each one's probability."""
    if p.support.is_discrete:
        x = torch.arange(400.0)[:, None]
        return x, p.log_prob(x).exp()
    # x = sinh(t) reaches out to where Student's tails end, and the trapezoid rule in t is exact for smooth densities.
    t = torch.linspace(-25, 25, 100_001)[:, None]
    return t.sinh(), p.log_prob(t.sinh()).exp() * t.cosh() * (t[1] - t[0])


@everyone
def test_probabilities_sum_to_one_with_the_mean_and_variance_that_it_states(
    make: type[Likelihood], double: None
) -> None:
    p = an_example(uncensored(make))
    x, share = grid(p)
    assert_close(share.sum(0), 1.0)
    assert_close((share * x).sum(0), p.mean)
    # Beyond the grid, at 3e10, Student's t of df = 4 has a share of 1e-21 of its variance.
    assert_close((share * (x - p.mean) ** 2).sum(0), p.variance, slack=10)


@everyone
def test_its_mean_is_the_mean_that_it_was_given(make: type[Likelihood], double: None) -> None:
    # Of the counts that the gate leaves, where there is one.
    kept = torch.sigmoid(-parameters_of(make()).get("gate", torch.tensor(-torch.inf))).detach()
    assert_close(an_example(uncensored(make)).mean, kept * torch.tensor(MEANS))


@everyone
def test_the_mean_and_every_parameter_get_a_gradient(make: type[Likelihood], double: None) -> None:
    likelihood = make()
    mean, parameters = leaf(torch.tensor(MEANS)), parameters_of(likelihood)
    likelihood(mean, parameters).log_prob(torch.tensor([1.0, 2.0, 5.0])).sum().backward()
    for name, value in {"mean": mean, **parameters}.items():
        assert value.grad is not None and value.grad.isfinite().all() and (value.grad != 0).all(), name


@everyone
def test_gradients_are_those_of_the_density(make: type[Likelihood], double: None) -> None:
    likelihood = make()
    mean, parameters = leaf(3 * torch.rand(4, 5, 3)), parameters_of(likelihood)
    value = torch.poisson(2 * torch.rand(5, 3))

    def log_prob(mean: Tensor, *values: Tensor) -> Tensor:
        return likelihood(mean, dict(zip(parameters, values, strict=True))).log_prob(value)

    assert torch.autograd.gradcheck(log_prob, (mean, *parameters.values()))


@everyone
def test_every_parameter_has_a_prior_and_a_start(make: type[Likelihood]) -> None:
    likelihood = make()
    assert all(hasattr(Priors(), name) for name in likelihood.parameters)
    start = {name: torch.tensor([likelihood.starts[name]]) for name in likelihood.parameters}
    assert likelihood(torch.ones(2, 1), start).log_prob(torch.tensor([[0.0], [3.0]])).isfinite().all()


@everyone
def test_it_takes_counts_if_it_says_so(make: type[Likelihood]) -> None:
    assert an_example(make).support.is_discrete == make.counts


@everyone
def test_it_is_called_the_same_in_every_process(make: type[Likelihood]) -> None:
    assert repr(make()) == repr(make()) and make() == make()
    assert re.fullmatch(r"\w+\((\w+=[\d.]+)?\)", repr(make()))


@everyone
def test_scale_multiplies_the_spread_but_of_counts_which_has_the_means(make: type[Likelihood], double: None) -> None:
    likelihood = uncensored(make)()
    mean, parameters = torch.tensor(MEANS), parameters_of(likelihood)
    factor = 1.0 if likelihood.counts else 0.1
    one, tenth = likelihood(mean, parameters), likelihood(mean, parameters, 0.1)
    assert_close(tenth.stddev.detach(), factor * one.stddev.detach())
    each = likelihood(mean.expand(4, 2, 3), parameters, torch.tensor([1.0, 1.0, 1.0, 0.1])[:, None, None])
    assert each.batch_shape == (4, 2, 3)
    assert_close(each.stddev[3].detach(), tenth.stddev.detach().expand(2, 3))
    assert_close(each.stddev[0].detach(), one.stddev.detach().expand(2, 3))


@everyone
def test_samples_match_the_density(make: type[Likelihood], double: None) -> None:
    p = an_example(uncensored(make))
    draws, (x, share) = p.sample((20_000,)), grid(p)
    assert draws.shape == (20_000, 3)
    assert_mean(draws, p.mean)
    # By quantiles, not by moments: Student's fourth is infinite.
    for limit in (-0.5, 0.0, 0.3, 1.0, 4.0):
        below = (share * (x <= limit)).sum(0).clamp_max(1)
        allowed = STANDARD_ERRORS * (below * (1 - below) / len(draws)).sqrt() + 1e-6
        assert (((draws <= limit).double().mean(0) - below).abs() <= allowed).all()


@everyone
def test_samples_may_be_of_one_gene_for_many_cells(make: type[Likelihood]) -> None:
    p = an_example(make).expand(torch.Size((4, 3)))
    assert p.batch_shape == (4, 3) and p.sample().shape == (4, 3) and p.sample((7, 2)).shape == (7, 2, 4, 3)
    assert p.mean.shape == p.variance.shape == (4, 3)
    value = torch.ones(4, 3)
    assert_close(p.log_prob(value), an_example(make).log_prob(value))


@pytest.mark.parametrize("df", [0.0, -1.0, math.nan])
def test_student_t_refuses_degrees_of_freedom_that_there_are_not(df: float) -> None:
    with pytest.raises(InputError, match=r"Expected degrees of freedom df > 0; got"):
        StudentT(df)


@pytest.mark.parametrize(
    ("special", "general", "limit"),
    [
        (Normal(), StudentT(1e7), {}),
        (Poisson(), NB(), {"dispersion": 1e12}),
        (Poisson(), ZIP(), {"gate": -torch.inf}),
        (NB(), ZINB(), {"gate": -torch.inf}),
        (ZIP(), ZINB(), {"dispersion": 1e12}),
        (Poisson(), ZINB(), {"dispersion": 1e12, "gate": -torch.inf}),
    ],
    ids=str,
)
def test_one_is_the_limit_of_the_other(
    special: Likelihood, general: Likelihood, limit: dict[str, float], double: None
) -> None:
    mean, x = torch.tensor(MEANS), torch.arange(6.0)[:, None]
    parameters = {**parameters_of(general), **{name: torch.full((3,), value) for name, value in limit.items()}}
    limit_of, expected = (each(mean, parameters).log_prob(x).detach() for each in (general, special))
    # They differ by d^4 / (4 df), d up to 2 where the density is not 0, and by mean^2 / dispersion.
    assert_close(limit_of.exp(), expected.exp(), slack=10_000)


def test_a_tobit_is_a_normal_with_all_that_is_below_zero_at_zero(double: None) -> None:
    noise = {"noise": torch.tensor([0.3, 1.0, 2.0])}
    p, base = (make()(torch.tensor([0.0, 0.5, 3.0]), noise) for make in (Tobit, Normal))
    x = torch.linspace(0, 30, 300_001)[1:, None]
    share = base.log_prob(x).exp() * (x[1] - x[0])
    zero = p.log_prob(torch.zeros(1)).exp()
    assert_close(zero, base.cdf(torch.zeros(3)))
    assert torch.equal(p.log_prob(x), base.log_prob(x))
    # Riemann's sum without its first point, half of which is missing.
    torch.testing.assert_close(zero + share.sum(0), torch.ones(3), rtol=0, atol=1e-4)
    torch.testing.assert_close((share * x).sum(0), p.mean, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close((share * x**2).sum(0) - p.mean**2, p.variance, rtol=1e-6, atol=1e-6)
    draws = p.sample((20_000,))
    assert (draws >= 0).all()
    assert_mean(draws, p.mean)
    assert_mean((draws == 0).double(), zero)


def test_zero_inflation_adds_zeros_alone(double: None) -> None:
    p, base, x = an_example(ZINB), an_example(NB), torch.arange(6.0)[:, None]
    gate = torch.sigmoid(parameters_of(ZINB())["gate"]).detach()
    expected = (1 - gate) * base.log_prob(x).exp() + gate * (x == 0)
    assert_close(p.log_prob(x).exp(), expected)


def test_an_outlier_moves_student_t_less_than_normal(double: None) -> None:
    slopes = []
    for likelihood in (Normal(), StudentT()):
        mean = leaf(torch.zeros(1))
        likelihood(mean, {"noise": torch.tensor([0.1])}).log_prob(torch.tensor([[0.1], [10.0]])).sum(1)[1].backward()
        slopes.append(mean.grad.item())
    assert slopes[0] == pytest.approx(1000) and slopes[1] == pytest.approx(5 / 10, rel=1e-2)


CELLS, GENES, K = 5, 3, 4


def random_mixture(weights: Tensor | None = None, make: Callable[[], Likelihood] = Normal) -> JointMixture:
    weights, likelihood = torch.rand(K, CELLS, GENES) if weights is None else weights, make()
    parameters = {name: each.detach() for name, each in parameters_of(likelihood, GENES).items()}
    u, s = (likelihood(3 * torch.rand(K, CELLS, GENES), parameters) for _ in range(2))
    return JointMixture(weights.log(), u, s)


def random_molecules(*shape: int) -> Tensor:
    """Small counts, which any likelihood takes."""
    return torch.poisson(2 * torch.rand(*shape, 2))


def normalised() -> Tensor:
    return dist.Dirichlet(torch.ones(K)).sample((CELLS, GENES)).movedim(-1, 0)


@everyone
def test_the_mixture_is_the_sum_over_states(make: type[Likelihood], double: None) -> None:
    make = uncensored(make)
    mixture, value, likelihood = random_mixture(normalised(), make), random_molecules(CELLS, GENES), make()
    log_prob = mixture.log_prob(value)
    assert log_prob.shape == (CELLS, GENES)
    parameters = {name: each.detach() for name, each in parameters_of(likelihood, GENES).items()}
    # The means that were given: a gate's mixture has smaller ones.
    kept = torch.sigmoid(-parameters["gate"]) if "gate" in parameters else torch.ones(GENES)
    for n in range(CELLS):
        for g in range(GENES):
            own, total = {name: each[g : g + 1] for name, each in parameters.items()}, 0.0
            for k in range(K):
                u, s = (each.mean[k, n, g : g + 1] / kept[g] for each in (mixture.unspliced, mixture.spliced))
                p_u, p_s = (
                    likelihood(mean, own).log_prob(x) for mean, x in zip((u, s), value[n, g].unbind(), strict=True)
                )
                total += math.exp(mixture.log_weights[k, n, g] + p_u + p_s)
            assert log_prob[n, g].item() == pytest.approx(math.log(total), rel=1e-10)


@everyone
def test_the_states_are_its_log_joint(make: type[Likelihood], double: None) -> None:
    mixture, value = random_mixture(normalised(), make), random_molecules(CELLS, GENES)
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


@everyone
def test_samples_have_the_moments_of_the_mixture(make: type[Likelihood], double: None) -> None:
    weights = normalised()
    mixture = random_mixture(weights, make)
    draws = mixture.sample((20_000,))
    u, s = mixture.unspliced, mixture.spliced
    assert_mean(draws[..., 0], (weights * u.mean).sum(0))
    assert_mean(draws[..., 1], (weights * s.mean).sum(0))
    if make is not StudentT:  # whose squares have no variance
        assert_mean(draws[..., 0] ** 2, (weights * (u.mean**2 + u.variance)).sum(0))
    # Within a state the molecules are independent; across states they are not.
    assert_mean(draws.prod(-1), (weights * u.mean * s.mean).sum(0))


@everyone
def test_expand_repeats_the_density(make: type[Likelihood], double: None) -> None:
    mixture, value = random_mixture(normalised(), make), random_molecules(CELLS, GENES)
    wide = mixture.expand(torch.Size((6, CELLS, GENES)))
    # States lead, so a new dimension stands between them and the cells.
    assert (wide.batch_shape, wide.event_shape) == ((6, CELLS, GENES), (2,))
    assert_close(wide.log_prob(value), mixture.log_prob(value).expand(6, CELLS, GENES))
    assert wide.sample((2,)).shape == (2, 6, CELLS, GENES, 2)
    assert wide.support.check(wide.sample()).all()


@everyone
def test_values_may_have_more_leading_dimensions_than_the_mixture(make: type[Likelihood], double: None) -> None:
    # As many values as states, so that a mixture that lines the two up is caught, too.
    mixture, value = random_mixture(normalised(), make), random_molecules(K, CELLS, GENES)
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


@pytest.mark.parametrize("make", [make for make in LIKELIHOODS.values() if make.counts])
def test_an_empty_state_is_ruled_out_by_a_molecule_with_finite_gradients(make: type[Likelihood]) -> None:
    mean, likelihood = leaf(torch.tensor([1.0, 0.0])[:, None, None].expand(2, 3, GENES)), make()
    parameters = parameters_of(likelihood, GENES)
    p = likelihood(mean, parameters)
    mixture = JointMixture(torch.full((2, 1, 1), 0.5).log(), p, p)
    value = torch.tensor([0.0, 1.0, 1e6])[:, None, None].expand(3, GENES, 2)
    states = mixture.log_joint(value).softmax(0)
    assert (states[1, 0] > 0.5).all() and (states[1, 1] < 1e-20).all()
    mixture.log_prob(value).sum().backward()
    assert all(each.grad.isfinite().all() for each in (mean, *parameters.values()))


def test_better_values_are_more_likely(double: None) -> None:
    likelihood = LIKELIHOODS["normal"]()
    p = likelihood(torch.tensor([1.0]), {"noise": torch.tensor([0.1])})
    away = [p.log_prob(torch.tensor([1.0 + step])).item() for step in (0.0, 0.1, 0.3, 1.0)]
    assert all(near > far for near, far in pairwise(away))
