"""Posterior collapse: on a program whose information is known, and what it says of states and KL weights."""

from __future__ import annotations

import math

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from linear import LENGTHS, NOISE, capacity, linear
from numpy.testing import assert_allclose, assert_array_equal
from small import small_cells, small_fit
from tolerances import STANDARD_ERRORS, assert_close

from pyro_velo.doctor import collapse as module
from pyro_velo.doctor.balance import balance
from pyro_velo.doctor.collapse import StateUse, collapse, log_mixture, state_use
from pyro_velo.errors import InputError
from pyro_velo.posterior import summarise

exact = pytest.mark.usefixtures("double")


@pytest.fixture
def many(monkeypatch: pytest.MonkeyPatch) -> int:
    """Enough cells for a mean to be near its expectation."""
    for name in ("MIXTURE_CELLS", "SHUFFLED_CELLS"):
        monkeypatch.setattr(module, name, 2000)
    return 2000


@exact
def test_the_mixture_is_the_mean_of_its_components_densities() -> None:
    z, loc, scale = torch.randn(7, 3), 50 + 3 * torch.randn(5, 3), torch.rand(5, 3) + 0.1
    each = dist.Normal(loc, scale).log_prob(z[:, None] + 50).sum(-1)
    assert_close(log_mixture(z + 50, loc, scale), each.logsumexp(1) - math.log(5), slack=100)


@exact
def test_the_kl_is_the_information_and_what_all_cells_miss_of_the_prior(many: int) -> None:
    fitted, cells = linear(many)
    found = collapse(fitted, cells)
    assert found.mean_kl == pytest.approx(found.information + found.gap, rel=1e-12)
    # The exact posterior: all cells together are the prior, and what is left is the channel's capacity.
    assert found.information == pytest.approx(capacity(), abs=0.05)
    assert abs(found.gap) < 0.05
    # One draw's KL has a variance of d / 2 at most beside what cells differ by.
    assert found.kl.sum() == pytest.approx(found.mean_kl, abs=STANDARD_ERRORS * (3 / 2 / 4 / many) ** 0.5)
    signal = np.square(LENGTHS) / NOISE**2
    # A variance of N numbers has an sd of sqrt(2 / N) of itself.
    assert_allclose(found.activity, signal / (1 + signal), rtol=STANDARD_ERRORS * (2 / many) ** 0.5)
    assert_array_equal(found.active, [True, True, False])


@exact
def test_information_is_at_most_the_logarithm_of_the_cells() -> None:
    fitted, cells = linear(20, width=0.01)
    found = collapse(fitted, cells)
    assert math.log(20) - 0.01 < found.information <= math.log(20) + 1e-9
    assert found.gap > 0


@exact
def test_a_guide_that_is_the_prior_says_nothing() -> None:
    found = collapse(*linear(200, blind=True))
    assert_allclose(found.kl, 0, atol=1e-12)
    assert_allclose([found.information, found.gap, found.mean_kl], 0, atol=1e-12)
    assert not found.active.any() and not found.activity.any()


@exact
def test_what_a_dimension_carries_is_what_another_cells_would_cost(many: int) -> None:
    fitted, cells = linear(many)
    found = collapse(fitted, cells)
    # Of the exact posterior the residual is noise, and z_d - z_d' has a variance of 2.
    cost = np.square(LENGTHS) / NOISE**2
    # (z_d - z_d')^2 has an sd of sqrt(2) of its mean; neighbours in the cycle share a cell.
    error = STANDARD_ERRORS * 2 * cost / many**0.5
    assert (np.abs(found.use - cost) <= error + 0.02 * cost).all()
    assert found.use[2] == 0
    assert found.use_all == pytest.approx(cost.sum(), rel=0.2)
    assert_allclose(found.share_used, found.use / found.use_all)


def test_the_same_seed_gives_the_same_and_changes_nothing() -> None:
    cells = small_cells()
    fitted = small_fit(cells)
    kept = {name: value.clone() for name, value in fitted.training.best.items()}
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one, other = collapse(fitted, cells, seed=1), collapse(fitted, cells, seed=2)
    balance(fitted, cells)
    assert torch.equal(before, torch.get_rng_state())
    assert_array_equal(one.use, collapse(fitted, cells, seed=1).use)
    assert (one.use != other.use).any()
    assert all(torch.equal(kept[name], value) for name, value in fitted.training.best.items())
    with fitted.parameters():
        assert {name: torch.equal(value.grad, value) for name, value in kept.items() if value.grad is not None} == {}


def test_one_cell_is_too_few() -> None:
    fitted, cells = linear(1)
    with pytest.raises(InputError, match="Expected 2 cells or more to tell what z says of them; got 1"):
        collapse(fitted, cells)


# States


def test_entropy_and_dead_states_of_known_use() -> None:
    use = StateUse(np.array([[0.25, 1.0, 0.5], [0.25, 0.0, 0.5], [0.25, 0.0, 0.0], [0.25, 0.0, 0.0]]))
    assert_allclose(use.entropy, [math.log(4), 0, math.log(2)])
    assert_allclose(use.dead, [0, 0.75, 0.5])
    assert_allclose(use.overall.sum(), 1)


def test_the_states_use_is_that_of_the_posterior() -> None:
    cells = small_cells()
    fitted = small_fit(cells)
    found = state_use(fitted, cells)
    assert found is not None
    assert_allclose(found.share.sum(0), 1, rtol=1e-6)
    expected = summarise(fitted, cells, draws=50, progress=False).state_use
    # Means over 40 cells of 4 and of 50 draws.
    assert_allclose(found.share, expected, atol=0.05)


def test_a_program_without_states_has_no_use_of_them() -> None:
    assert state_use(*linear()) is None


# The KL's weight


@exact
@pytest.mark.parametrize("beta", [0.5, 1.0, 4.0, 20.0])
def test_the_optimum_tells_the_weight_of_its_kl(beta: float) -> None:
    found = balance(*linear(1000, beta=beta), draws=40)
    assert found.error < 0.1 * beta
    assert abs(found.weight - beta) < STANDARD_ERRORS * found.error + 0.02 * beta


@exact
def test_where_q_is_the_prior_no_weight_can_be_told() -> None:
    assert all(map(math.isnan, balance(*linear(200, blind=True))))
