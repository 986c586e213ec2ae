"""How tight the bound is: on a program whose evidence is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from linear import LENGTHS, linear, log_evidence
from numpy.testing import assert_allclose, assert_array_equal
from small import small_cells, small_fit
from tolerances import STANDARD_ERRORS

from pyro_velo.criticism import importance
from pyro_velo.doctor.tightness import tightness
from pyro_velo.errors import InputError

D = len(LENGTHS)
exact = pytest.mark.usefixtures("double")


def mean_error(values: np.ndarray) -> tuple[float, float]:
    return values.mean(), values.std(ddof=1) / len(values) ** 0.5


@exact
def test_with_the_exact_posterior_every_bound_is_the_evidence() -> None:
    fitted, cells = linear()
    found = tightness(fitted, cells)
    truth = log_evidence(fitted, cells)[found.index].numpy()
    for bound in found.bound:
        assert_allclose(bound, truth, rtol=1e-9)
    assert_allclose(found.gap, 0, atol=1e-9)
    assert_allclose(found.variance, 0, atol=1e-9)
    assert (found.k_hat == -np.inf).all() and found.unreliable == found.without_mean == 0


@exact
@pytest.mark.parametrize("width", [0.5, 1.5])
def test_the_bounds_rise_with_k_in_every_cell_up_to_the_evidence(width: float) -> None:
    fitted, cells = linear(200, width=width)
    found = tightness(fitted, cells, max_cells=100)
    assert (np.diff(found.bound, axis=0) >= 0).all() and (found.gap > 0).all()
    truth = log_evidence(fitted, cells)[found.index].numpy()
    # KL(q || exact) of a Normal that is so many times too wide, and the variance of its log-weights.
    kl = D * ((width**2 - 1) / 2 - np.log(width))
    mean, error = mean_error(found.bound[0] - truth)
    assert abs(mean + kl) < STANDARD_ERRORS * error
    mean, error = mean_error(found.variance)
    assert abs(mean - D * (1 - width**2) ** 2 / 2) < STANDARD_ERRORS * error
    mean, error = mean_error(found.bound[-1] - truth)
    # 500 samples close most of the gap; of a narrow q, whose weights have heavy tails, less.
    assert -0.25 * kl < mean < STANDARD_ERRORS * error


@exact
def test_a_guide_that_is_too_narrow_has_heavy_tails_and_a_wide_one_has_none() -> None:
    by_width = {width: tightness(*linear(60, width=width)) for width in (1.5, 0.7, 0.3)}
    wide, narrower, narrow = (np.median(each.k_hat) for each in by_width.values())
    assert wide < narrower < narrow
    # Weights of a wide q are bounded; of a narrow one their tail index is 1 - width^2 = 0.91 in one dimension alone.
    assert wide < 0 and narrow > 0.7
    assert by_width[1.5].unreliable == 0 and by_width[0.3].unreliable > 0.5


def test_k_hat_is_that_of_the_same_weights_elsewhere() -> None:
    cells = small_cells(80)
    fitted = small_fit(cells)
    found = tightness(fitted, cells, particles=(1, 200), draws=5, seed=3)
    same = importance(fitted, cells, particles=200, draws=5, seed=3)
    assert_array_equal(found.index, same.index)
    assert_allclose(found.k_hat, same.k_hat)


def test_the_same_seed_gives_the_same_and_leaves_the_generator_alone() -> None:
    cells = small_cells()
    fitted = small_fit(cells)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one, other = tightness(fitted, cells, seed=1), tightness(fitted, cells, seed=2)
    assert torch.equal(before, torch.get_rng_state())
    assert_array_equal(one.bound, tightness(fitted, cells, seed=1).bound)
    assert (one.bound != other.bound).all()
    assert len(tightness(fitted, cells, max_cells=3).k_hat) == 3


@pytest.mark.parametrize("particles", [(), (5, 50), (1, 5, 7), (1, 5, 5), (1, 50, 5)])
def test_particles_that_do_not_nest_are_refused(particles: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match="Expected particles such as 1, 5, 50, each dividing the next; got"):
        tightness(*linear(), particles=particles)


def test_too_few_weights_and_cells_are_refused() -> None:
    with pytest.raises(InputError, match="Expected 25 weights or more a cell; got 20"):
        tightness(*linear(), particles=(1, 10))
    with pytest.raises(InputError, match="Expected 2 held-out cells or more to score; got 0"):
        tightness(*linear(held_out=0.0))
