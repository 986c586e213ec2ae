"""The learning-rate range test: it finds the scale of a problem, and leaves everything as it was."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal
from small import GUIDE, MODEL, settings, small_cells, small_fit
from torch import nn

from pyro_velo.batch import Batch, Cells
from pyro_velo.doctor.range_test import BELOW, SMOOTHING, RangeTest, range_test
from pyro_velo.errors import InputError
from pyro_velo.models.base import Model


class Line(Model):
    """x ~ N(mu, 1) with mu a parameter that starts at 0; nothing is latent."""

    def build(self, cells):
        return LineProgram()


class LineProgram(nn.Module):
    def __init__(self):
        super().__init__()
        self.mu = nn.Parameter(torch.zeros(()))

    def forward(self, batch: Batch) -> None:
        pyro.module("line", self)
        with pyro.plate("cells", batch.n_cells, subsample=batch.index, dim=-1):
            pyro.sample("x", dist.Normal(self.mu, 1.0), obs=batch.u[:, 0])


def of_line(distance: float, **options) -> RangeTest:
    x = distance + torch.randn(40, 1)
    found = range_test(Line(), lambda program: lambda batch: None, Cells.of(x, x), settings=settings(), **options)
    return found


def test_a_problem_ten_times_as_large_has_a_rate_ten_times_as_high():
    """Adam's steps are of the size of the rate, so the rates that have to add up to the distance grow with it."""
    near, far = of_line(2.0, highest=100.0), of_line(20.0, highest=100.0)
    assert 5 < far.suggested / near.suggested < 20
    assert near.diverged


def test_the_rate_is_a_quarter_of_the_one_at_which_the_loss_has_fallen():
    found = of_line(5.0, highest=100.0)
    reached = found.rates == found.suggested * BELOW
    assert reached.sum() == 1
    left = (found.smoothed - found.smoothed.min()) / (found.smoothed[0] - found.smoothed.min())
    assert left[reached.argmax()] <= 0.05 < left[: reached.argmax()].min()
    assert_allclose(np.diff(np.log(found.rates)), np.diff(np.log(found.rates))[0])
    assert (found.rates[0], found.rates[-1]) == pytest.approx((1e-5, 100.0))
    # The running mean, from its definition.
    weights = SMOOTHING ** np.arange(30)[::-1]
    assert found.smoothed[29] == pytest.approx((weights * found.losses[:30]).sum() / weights.sum())


def test_what_has_not_diverged_says_so():
    found = of_line(5.0, highest=1e-3, steps=20)
    assert not found.diverged and len(found.losses) == 20


def test_a_test_of_a_model_ends_where_its_loss_is_no_number():
    cells = small_cells()
    found = range_test(MODEL, GUIDE, cells, settings=settings(), highest=1e6, steps=30)
    assert found.diverged and np.isfinite(found.losses).all() and len(found.rates) == len(found.losses) <= 30
    assert 1e-4 < found.suggested < 1


def test_nothing_is_changed_by_it():
    plan, cells = settings(max_epochs=1), small_cells()
    fitted = small_fit(cells, settings=plan)
    pyro.clear_param_store()
    state, best = torch.get_rng_state(), {name: value.clone() for name, value in fitted.training.best.items()}
    one, other = (range_test(MODEL, GUIDE, cells, settings=plan, steps=10) for _ in range(2))
    assert_array_equal(one.losses, other.losses)
    assert torch.equal(state, torch.get_rng_state()) and not list(pyro.get_param_store().keys())
    assert all(torch.equal(value, best[name]) for name, value in fitted.training.best.items())
    with fitted.parameters():
        assert all(torch.equal(v.unconstrained(), best[n]) for n, v in pyro.get_param_store().items())
    # Its own rate is of no account, the schedule and the seed are.
    changed = [
        range_test(MODEL, GUIDE, cells, settings=replace(plan, **{name: value}), steps=10).losses
        for name, value in (("learning_rate", 0.5), ("beta", 9.0), ("seed", 4))
    ]
    assert_array_equal(changed[0], one.losses)
    assert (changed[1] != one.losses).all() and (changed[2] != one.losses).all()


@pytest.mark.parametrize("options", [{"lowest": 0.0}, {"lowest": 1.0, "highest": 0.1}, {"steps": 3}])
def test_rates_that_do_not_rise_are_refused(options):
    with pytest.raises(InputError, match="Expected 0 < lowest < highest and 10 steps or more; got"):
        of_line(1.0, **options)
