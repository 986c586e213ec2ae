"""From a decoder's outputs to a distribution: units, links, and numbers that stay finite whatever the counts."""

from __future__ import annotations

import pyro
import pytest
import torch
from tolerances import assert_close
from torch import Tensor

from pyro_velo.emission import STRAIGHT, Emission, straightened_exp
from pyro_velo.encoders import Encoder
from pyro_velo.errors import InputError
from pyro_velo.likelihoods import NB, PROFILE_LIKELIHOODS, ZINB, Bernoulli, Normal, Poisson
from pyro_velo.models.vae import VAE
from pyro_velo.profiles import Profiles

everyone = pytest.mark.parametrize("name", PROFILE_LIKELIHOODS)


def profiles(name: str, n_cells: int = 30, n_genes: int = 4) -> Profiles:
    """Cells such as the likelihood wants."""
    likelihood = PROFILE_LIKELIHOODS[name]
    if likelihood.counts:
        return Profiles.of_counts(torch.poisson(torch.rand(n_cells, n_genes) * 9))
    x = torch.rand(n_cells, n_genes)
    return Profiles((x > 0.4).to(x) if likelihood.binary else x)


def test_the_link_is_the_exponential_and_then_its_tangent(double: None) -> None:
    x = torch.linspace(-20, STRAIGHT, 50)
    assert_close(straightened_exp(x), x.exp())
    edge = torch.tensor([STRAIGHT - 1e-9, STRAIGHT + 1e-9], requires_grad=True)
    (slopes,) = torch.autograd.grad(straightened_exp(edge).sum(), edge)
    assert_close(slopes, torch.tensor(STRAIGHT).exp(), slack=100)
    assert_close(straightened_exp(torch.tensor(1e6)) / 1e6, torch.tensor(STRAIGHT).exp() * (1 + (1 - STRAIGHT) / 1e6))


@everyone
def test_an_output_of_zero_is_the_genes_mean(name: str, double: None) -> None:
    cells = profiles(name)
    emission = Emission(PROFILE_LIKELIHOODS[name](), cells)
    batch = cells.batch(torch.arange(len(cells)))
    mean = emission.mean(torch.zeros(len(cells), cells.n_genes), batch)
    if emission.likelihood.binary:
        # Jeffreys' half a count of each.
        assert_close(mean.sigmoid().mean(0) * (len(cells) + 1), cells.x.sum(0) + 0.5)
    else:
        assert_close(mean.mean(0), cells.x.mean(0))


def test_log_odds_give_probabilities_that_sum_to_one_and_lose_nothing_where_they_round() -> None:
    p = Bernoulli()(torch.tensor([-30.0, -1.0, 0.0, 30.0]), {})
    assert_close(p.log_prob(torch.zeros(4)).exp() + p.log_prob(torch.ones(4)).exp(), 1.0)
    # float32 has no probability between 1 - 2^-24 and 1.
    assert_close(p.log_prob(torch.tensor([1.0, 1, 1, 0])), torch.tensor([-30.0, -1.3132617, -0.6931472, -30.0]))


def test_the_slopes_of_counts_are_those_of_their_density_on_either_side_of_the_straight_line(double: None) -> None:
    cells = profiles("nb")
    emission, batch = Emission(NB(), cells), cells.batch(torch.arange(len(cells)))
    outputs = torch.linspace(-9, STRAIGHT + 5, len(cells) * cells.n_genes).reshape(1, len(cells), cells.n_genes)
    weights, found = torch.linspace(-1, 2, len(cells)), []
    for density in (
        lambda o: emission.log_density_of_cells(o, batch),
        lambda o: emission(o, batch).log_prob(batch.x).sum(-1),
    ):
        o = outputs.clone().requires_grad_()
        value = density(o)
        found.append((value, *torch.autograd.grad((weights * value).sum(), (o, emission.start["dispersion"]))))
    for one, other in zip(*found, strict=True):
        assert_close(one, other, slack=100)


def test_only_of_negative_binomial_counts_are_slopes_known() -> None:
    for name, make in PROFILE_LIKELIHOODS.items():
        assert Emission(make(), profiles(name)).has_slopes == (name == "nb")
    assert not Emission(NB(), profiles("nb"), ("dispersion",)).has_slopes


@everyone
def test_a_decoded_parameter_moves_for_each_cell_and_one_of_zero_not_at_all(name: str, double: None) -> None:
    likelihood, cells = PROFILE_LIKELIHOODS[name](), profiles(name)
    plain, decoded = Emission(likelihood, cells), Emission(likelihood, cells, likelihood.parameters)
    batch, outputs = cells.batch(torch.arange(6)), torch.randn(decoded.heads, 6, 4)
    assert decoded.heads == 1 + len(likelihood.parameters)
    outputs[1:] = 0
    assert_close(decoded(outputs, batch).log_prob(batch.x), plain(outputs[:1], batch).log_prob(batch.x))
    for head in range(1, decoded.heads):
        moved = outputs.clone()
        moved[head, 2] = 0.5
        changed = decoded(moved, batch).log_prob(batch.x) != decoded(outputs, batch).log_prob(batch.x)
        assert changed[2].any() and not changed[[0, 1, 3, 4, 5]].any()


@pytest.mark.parametrize("name", ["poisson", "nb", "zip", "zinb"])
def test_nothing_overflows_in_deep_networks_with_counts_up_to_a_million_and_few_that_are_not_zero(name: str) -> None:
    x = torch.where(torch.rand(8, 60) < 0.05, torch.randint(1, 1_000_000, (8, 60)), 0).float()
    x[0, :2] = 1e6
    cells = Profiles.of_counts(x)
    model = VAE(PROFILE_LIKELIHOODS[name](), hidden=(1000,) * 4)
    assert (x == 0).float().mean() > 0.9
    with pyro.get_param_store().scope(), pyro.validation_enabled(False):
        program = model.build(cells)
        guide = Encoder((1000,) * 4)(program)
        loss = pyro.infer.Trace_ELBO().differentiable_loss(program, guide, cells.batch(torch.arange(8)))
        loss.backward()
    assert loss.isfinite()
    gradients = {n: p.grad for part in (program, guide) for n, p in part.named_parameters()}
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients.values())


@pytest.mark.parametrize("name", ["poisson", "nb", "zip", "zinb"])
@pytest.mark.parametrize("output", [-1e4, -90.0, 90.0, 1e4])
def test_an_output_gone_astray_stays_finite_and_one_too_high_pulls_back(name: str, output: float) -> None:
    """Seed 001, 3.3.1: a product of probabilities underflows at an expected count of 400, their logarithms do not."""
    x = torch.tensor([[0.0, 1.0, 1e6]]).expand(3, 3)
    cells = Profiles.of_counts(x, depth=False)
    emission = Emission(PROFILE_LIKELIHOODS[name](), cells)
    astray = torch.full((1, 3, 3), output, requires_grad=True)
    log_prob = emission(astray, cells.batch(torch.arange(3))).log_prob(x)
    log_prob.sum().backward()
    assert log_prob.isfinite().all() and astray.grad.isfinite().all()
    if output == 1e4:
        # Expected far too high, and the gate explains a zero, if there is one.
        assert (astray.grad[..., 0] <= 0).all() and (astray.grad[..., 1:] < 0).all()


def test_what_does_not_suit_is_refused() -> None:
    counts, shares = Profiles.of_counts(torch.ones(3, 2)), Profiles(torch.rand(3, 2))
    for likelihood, cells, message in (
        (Normal(), counts, "expects profiles without size factors"),
        (NB(), shares, "expects raw counts"),
        (Bernoulli(), shares, "expects zeros and ones"),
        (Normal(), Profiles(torch.ones(3, 2)), "number 0 is the same in every cell"),
    ):
        with pytest.raises(InputError, match=message):
            Emission(likelihood, cells)
    with pytest.raises(InputError, match=r"\(dispersion, gate\); got \['noise'\]"):
        Emission(ZINB(), counts, ("noise",))
    with pytest.raises(InputError, match=r"\(none\)"):
        Emission(Poisson(), counts, ("gate",))


def test_a_gene_without_a_molecule_is_as_one_with_a_single_one() -> None:
    def unit(x: Tensor) -> Tensor:
        return Emission(Poisson(), Profiles.of_counts(x, depth=False)).unit

    assert torch.equal(unit(torch.tensor([[0.0, 2.0], [0.0, 2.0]])), unit(torch.tensor([[1.0, 2.0], [0.0, 2.0]])))
