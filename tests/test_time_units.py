"""The unit of genes' own times: open by a symmetry of the model, told by priors and by the clock that genes share."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from scipy.stats import truncnorm
from small import GUIDE, MODEL, differing, settings, small_adata, small_cells
from tolerances import assert_close, assert_mean
from torch import Tensor

import pyro_velo as pv
from pyro_velo import time_units
from pyro_velo.consensus import Consensus, Sightings
from pyro_velo.curve_information import Looked, _of_times, looked_at
from pyro_velo.fitting import Fit
from pyro_velo.kinetics import POWERS, T_MAX
from pyro_velo.posterior import draw_rates
from pyro_velo.rescaled_rates import FAR, Marginal, RescaledRates, Shape
from pyro_velo.time_units import (
    LAMBDAS,
    PriorShape,
    applies,
    in_common_unit,
    log_density,
    medians,
    moderated,
    shape_of,
)
from pyro_velo.train import Fitted, train

SITES = ("alpha", "beta", "gamma", "switch_time")


@pytest.fixture(scope="module")
def before() -> Fitted:
    return train(MODEL, GUIDE, small_cells(), settings=settings(), progress=False)


@pytest.fixture(scope="module")
def after(before: Fitted) -> Fitted:
    return in_common_unit(before, small_cells())


def explained(fitted: Fitted, values: dict[str, Tensor]):
    batch = small_cells().batch(torch.arange(40))
    with fitted.parameters(), torch.no_grad():
        z = fitted.guide.encode(batch).mean
        drawn = poutine.trace(fitted.guide.cells).get_trace(batch, pyro.distributions.Delta(z, event_dim=1))
        return fitted.program.explain({**values, "z": z, "pi": drawn.nodes["pi"]["value"]}, batch)


def test_another_unit_is_the_same_curve_with_all_velocities_faster(before: Fitted, after: Fitted) -> None:
    with before.parameters(), torch.no_grad(), torch.random.fork_rng():
        # The medians that the fit's own units are told at: the same seed.
        torch.manual_seed(0)
        values = medians(before, small_cells())
    unit = torch.linspace(-0.3, 0.4, 5)
    faster = {name: value * torch.exp(POWERS.get(name, 0) * unit) for name, value in values.items()}
    one, other = explained(before, values), explained(after, faster)
    for state in range(4):
        assert_close(other.u[state], one.u[state], slack=100)
        assert_close(other.s[state], one.s[state], slack=100)
        assert_close(other.log_joint[state], one.log_joint[state], slack=1000)
        assert_close(torch.as_tensor(other.t[state]), one.t[state] * (-unit).exp(), slack=100)
    for state in (0, 2):
        assert_close(other.velocity[state], one.velocity[state] * unit.exp(), slack=100)


def test_cells_tell_nothing_of_the_unit(before: Fitted) -> None:
    with before.parameters(), torch.no_grad(), pyro.validation_enabled(False):
        values = medians(before, small_cells())
        seen, information = looked_at(before, small_cells(), torch.arange(40), values, SITES)
    assert seen.time.shape == seen.precision.shape == seen.probability.shape == (40, 5, 2)
    powers = torch.tensor([1.0, 1.0, 1.0, -1.0], dtype=torch.float64)
    largest = torch.linalg.eigvalsh(information)[:, -1]
    along = torch.einsum("i,gij,j->g", powers, information, powers)
    assert (along >= -1e-9 * largest).all() and (along < 1e-3 * largest).all()
    assert ((seen.low <= seen.time) & (seen.time <= seen.high)).all()
    # Of the ratio of gamma and beta they do.
    ratio = torch.tensor([0.0, -1.0, 1.0, 0.0], dtype=torch.float64)
    assert (torch.einsum("i,gij,j->g", ratio, information, ratio) > 1e-2 * largest).all()


def test_a_silent_gene_is_in_the_state_whose_times_it_fits_longest() -> None:
    fits = tuple(torch.full((3, 2), value) for value in (-1.0, -math.inf, -1.0, -math.inf))
    sd = torch.tensor([[0.2, 2.0], [1.0, 1.0], [0.2, math.inf]])
    found = _of_times(fits, (sd**-2)[:, None].expand(3, 2, 2))
    width = (math.sqrt(2 * math.pi) * sd / T_MAX).clamp_max(1)
    assert_close(found[:, 0], width / width.sum(-1, keepdim=True), slack=10)
    # A gene that is as well empty has all times for that.
    found = _of_times((*fits[:3], fits[0]), (sd**-2)[:, None].expand(3, 2, 2))
    assert_close(found[:, 0], width / (1 + width.sum(-1, keepdim=True)), slack=10)


def silent(n_genes: int) -> Consensus:
    """No gene tells the time."""
    ones = torch.ones(n_genes)
    return Consensus(torch.zeros(40), ones, ones * math.inf, torch.zeros(()))


def test_without_a_clock_the_unit_has_the_priors_density(before: Fitted) -> None:
    with before.parameters(), torch.no_grad(), pyro.validation_enabled(False):
        values = {name: value for name, value in medians(before, small_cells()).items() if name in SITES}
        found = log_density(before.program, values, silent(5)).double()
    start = before.program.start.rates
    # Three LogNormals of sd 1 around the start values and a uniform switching time: completed squares.
    mean = sum((getattr(start, name) / values[name]).log() for name in SITES[:3]).double() / 3 - 1 / 3
    expected = -1.5 * (LAMBDAS - mean[:, None]) ** 2
    end = (values["switch_time"].double() / T_MAX).log()[:, None]
    assert not found[end - 0.01 > LAMBDAS].isfinite().any()
    gap = (found - expected).masked_fill(end + 0.01 > LAMBDAS, math.nan)
    assert np.nanmax(gap.numpy(), 1) - np.nanmin(gap.numpy(), 1) == pytest.approx(np.zeros(5), abs=1e-3)


def test_a_clock_that_is_sure_decides(before: Fitted) -> None:
    pace = torch.tensor([0.8, 0.9, 1.0, 1.1, 1.2])
    # An sd of .02, of a t of eight degrees of freedom, two times four.
    told = silent(5)._replace(pace=pace, variation=torch.full((5,), 0.02 / math.sqrt(8 / 6)))
    with before.parameters(), torch.no_grad(), pyro.validation_enabled(False):
        values = medians(before, small_cells())
        # Early enough that no prior's end is near.
        values["switch_time"] = torch.full((5,), 5.0)
        units = Marginal.of(LAMBDAS.float(), log_density(before.program, values, told))
    draws = torch.stack([units.at(torch.full((5,), level)) for level in (0.05, 0.5, 0.95)])
    assert_close(draws[1], pace.log(), slack=3e3)
    assert draws[2] - draws[0] == pytest.approx(2 * 1.645 * 0.02 * torch.ones(5), rel=0.05)


def test_quantiles_of_a_grid_are_those_of_its_density() -> None:
    centre = torch.tensor([-0.5, 0.25])
    units = Marginal.of(LAMBDAS.float(), -0.5 * ((LAMBDAS - centre[:, None]) / 0.1) ** 2)
    for level in (0.01, 0.3, 0.5, 0.99):
        expected = centre + 0.1 * torch.special.ndtri(torch.tensor(level))
        assert_close(units.at(torch.full((2,), level)), expected, slack=3e3)


def test_half_of_an_error_is_the_median_genes() -> None:
    found = moderated(torch.tensor([0.0, 0.1, 0.3, math.inf])) / math.sqrt(8 / 6)
    assert_close(found, torch.tensor([0.005**0.5, 0.1, 0.05**0.5, math.inf]))
    assert moderated(torch.full((2,), math.inf)).isinf().all()


def test_draws_have_the_density_that_the_guide_says(after: Fitted) -> None:
    batch = small_cells().batch(torch.arange(1))
    # Without the end of switching times, of which `test_a_normal_ends_where_the_prior_does` knows.
    shape = after.guide.rates.shape._replace(most=torch.full((4,), math.inf))
    # Faster, so that all switch before the end.
    units = Marginal.of(LAMBDAS.float(), (-0.5 * ((LAMBDAS - 1) / 0.1) ** 2).expand(5, -1))
    rates = RescaledRates(after.guide.rates.base, shape, units, torch.tensor(0.1))
    with after.parameters(), torch.no_grad():
        trace = poutine.trace(rates).get_trace(batch)
    trace.compute_log_prob()
    unit = trace.nodes["time_unit"]["value"]
    powers = torch.tensor([float(POWERS[name]) for name in shape.sites])
    normal = torch.distributions.MultivariateNormal(shape.loc + powers * unit[:, None], scale_tril=shape.root)
    x = torch.stack([trace.nodes[name]["value"].log() for name in shape.sites], -1)
    assert (unit > 0).all()
    total = sum(trace.nodes[name]["log_prob"] for name in (*shape.sites, "shape_unconstrained"))
    assert_close(total, normal.log_prob(x) - x.sum(-1), slack=1e3)


def test_draws_are_spread_as_shape_and_unit_say(after: Fitted) -> None:
    cells = small_cells()
    with after.parameters(), torch.no_grad(), pyro.validation_enabled(False):
        drawn = draw_rates(after, cells, 2000)
    beta = torch.stack([each["beta"] for each in drawn]).log()
    gamma = torch.stack([each["gamma"] for each in drawn]).log()
    shape = after.guide.rates.shape
    covariance = shape.root @ shape.root.mT
    of_ratio = covariance[:, 2, 2] + covariance[:, 1, 1] - 2 * covariance[:, 1, 2]
    squares = (gamma - beta - (shape.loc[:, 2] - shape.loc[:, 1])) ** 2
    assert_mean(squares, of_ratio)
    # The unit is in all rates alike: it moves beta and leaves the ratio.
    assert (beta.std(0) > 0.02).all()
    assert all(set(each) == set(drawn[0]) >= {*SITES, "noise_unspliced", "noise_spliced"} for each in drawn)


INFORMATION = torch.tensor([400.0, 100.0, 25.0, 900.0], dtype=torch.float64)
"""Of four sites, which know nothing of each other."""


def test_a_shape_is_known_as_well_as_cells_and_priors_tell() -> None:
    empty, values = torch.zeros(600, 2, 2), {name: torch.ones(2) for name in SITES}
    seen = Looked(Sightings(empty, empty, empty, empty[0], empty[0]), torch.diag(INFORMATION).expand(2, 4, 4))
    others = [0, 2, 3]
    for n_cells, prior in ((600, 1.0), (600, 100.0), (1200, 1.0)):
        told = PriorShape(torch.full((2, 4), prior), torch.full((4,), math.inf))
        root = shape_of(seen, n_cells, told, values, SITES).root
        found = (root @ root.mT)[0].diag().double()
        expected = 1 / (INFORMATION * n_cells / 600 + prior)
        assert torch.allclose(found[others], expected[others], rtol=1e-3)
        # Beta is what tells the unit.
        assert found[1] < 2 * time_units.FIXED**2


def test_priors_are_as_sharp_as_they_are(before: Fitted) -> None:
    model = replace(MODEL, priors=pv.Priors(gamma=dist.LogNormal(-1.0, 0.1)))
    program = model.build(small_cells())
    values = {name: torch.full((5,), 0.5) for name in SITES}
    values |= {f"noise_{molecule}": torch.full((5,), 0.1) for molecule in ("unspliced", "spliced")}
    with pyro.validation_enabled(False):
        found = PriorShape.of(program, values, SITES)
    assert_close(found.precision[:, :3], torch.tensor([1.0, 1.0, 100.0]).expand(5, 3), slack=3e3)
    # The logarithm of a uniform number has the variance 1.
    assert torch.allclose(found.precision[:, 3], torch.ones(5), atol=0.15)
    assert found.most.tolist() == [math.inf] * 3 + [pytest.approx(math.log(T_MAX))]


def test_a_normal_ends_where_the_prior_does() -> None:
    loc, sd, most = torch.tensor([[0.5, 0.5, 3.0]]).double(), 1.5, torch.tensor([1.0, math.inf, 1.0]).double()
    shape = Shape(("a", "b", "c"), loc, sd * torch.eye(3).double()[None], most)
    level = ((torch.arange(1000) + 0.5) / 1000).double()
    x = (loc + sd * torch.special.ndtri(level)[:, None]).requires_grad_()
    moved, slope = shape.within(x)
    (by_autograd,) = torch.autograd.grad(moved.sum(), x)
    assert torch.allclose(slope.exp(), by_autograd, rtol=1e-6)
    # As scipy has them, level by level; without an end, or one that is far, nothing moves.
    for k in (0, 2):
        expected = truncnorm.ppf(level.numpy(), -np.inf, (1.0 - loc[0, k]) / sd, loc[0, k], sd)
        assert np.allclose(moved[:, k].detach(), expected)
    assert torch.equal(moved[:, 1], x[:, 1]) and (moved[:, [0, 2]] <= 1).all()
    far = shape._replace(most=loc[0] + (FAR + 0.1) * sd)
    assert torch.equal(far.within(x)[0], x)


def test_switching_times_that_nothing_is_known_of_end_where_the_prior_does(before: Fitted) -> None:
    cells = small_cells()
    with before.parameters(), torch.no_grad(), pyro.validation_enabled(False):
        values = medians(before, cells)
        prior = PriorShape.of(before.program, values, SITES)
        n = len(values["beta"])
        none = torch.zeros(600, n, 2)
        looked = Looked(Sightings(none, none, none, none[0], none[0]), torch.zeros(n, 4, 4).double())
        shape = shape_of(looked, 600, prior, values, SITES)
        torch.manual_seed(0)
        x = shape.loc + (shape.root @ torch.randn(4000, n, 4, 1)).squeeze(-1)
        times = torch.stack([shape.within(each)[0] for each in x])[..., SITES.index("switch_time")].exp()
    assert (times <= T_MAX * (1 + 1e-6)).all()
    assert (times.mean(0) < T_MAX).all() and (times.std(0) > 1).all()


def test_the_same_seed_gives_the_same_units_and_the_fit_stays(before: Fitted, after: Fitted) -> None:
    again = in_common_unit(before, small_cells())
    assert torch.equal(after.guide.rates.units.cumulative, again.guide.rates.units.cumulative)
    assert torch.equal(after.guide.rates.shape.root, again.guide.rates.shape.root)
    assert not isinstance(before.guide.rates, RescaledRates) and before.program.times.reference is None
    assert differing(before.training, after.training) == []


def test_applies_where_genes_have_times_of_their_own_and_rates_a_spread(before: Fitted, after: Fitted) -> None:
    assert applies(before) and not applies(after)
    assert in_common_unit(after, small_cells()) is after
    others = (
        (replace(MODEL, times=pv.times.Shared()), GUIDE),
        (replace(MODEL, times=pv.times.PerGene(common_unit=False)), GUIDE),
        (MODEL, replace(GUIDE, rates=pv.rates.Point())),
    )
    for model, guide in others:
        fitted = train(model, guide, small_cells(), settings=settings(max_epochs=1), progress=False)
        assert in_common_unit(fitted, small_cells()) is fitted


@pytest.mark.parametrize("rates", [pv.rates.PerGene(), pv.rates.LowRank(rank=2)], ids=["per-gene", "low-rank"])
@pytest.mark.parametrize(
    "parts",
    [
        {"transcription": pv.transcription.TimeDependent()},
        {"states": pv.states.Dirichlet()},
        {"priors": pv.Priors.flat()},
        {"likelihood": pv.likelihoods.StudentT()},
    ],
    ids=["time-dependent", "dirichlet", "flat", "student"],
)
def test_every_part_can_be_told_its_unit(parts: dict, rates: pv.rates.RateGuide) -> None:
    data = pv.velocity_data(small_adata(), as_is=True)
    model, guide = replace(MODEL, **parts), replace(GUIDE, rates=rates)
    fitted = train(model, guide, data.cells, settings=settings(max_epochs=1), progress=False)
    fit = Fit(in_common_unit(fitted, data.cells), data, "")
    posterior = fit.posterior(draws=5)
    assert np.isfinite(posterior.velocity_sd).all() and (posterior.rates_sd["beta"] > 0).all()
    assert isinstance(fit.fitted.guide.rates, RescaledRates)


def test_a_sample_of_cells_stands_for_all(before: Fitted, monkeypatch: pytest.MonkeyPatch) -> None:
    cells, every = small_cells(), torch.arange(40)
    with before.parameters(), torch.no_grad(), pyro.validation_enabled(False):
        values = medians(before, cells)
        whole, half = (looked_at(before, cells, index, values, SITES) for index in (every, every[::2]))
        monkeypatch.setattr("pyro_velo.curve_information.CELLS_GENES_AT_ONCE", 5 * 7)
        parts = looked_at(before, cells, every, values, SITES)
    assert_close(parts.information, whole.information, slack=1e6)
    assert_close(parts.seen.precision, whole.seen.precision, slack=100)
    assert_close(half.seen.time, whole.seen.time[::2], slack=100)
    diagonal = half.information.diagonal(dim1=1, dim2=2) / whole.information.diagonal(dim1=1, dim2=2)
    assert float(diagonal.median()) == pytest.approx(0.5, abs=0.15)


def test_cells_on_the_disk_have_the_units_of_those_in_memory(before: Fitted, after: Fitted, tmp_path: Path) -> None:
    small_adata().write_h5ad(tmp_path / "cells.h5ad")
    cells = pv.velocity_data_on_disk(tmp_path / "cells.h5ad", as_is=True).cells
    found = in_common_unit(before, cells)
    assert_close(found.guide.rates.units.cumulative, after.guide.rates.units.cumulative, slack=1e3)


@pytest.mark.parametrize("df", [0.8, 1.5])
def test_tails_without_moments_have_units_too(df: float) -> None:
    model = replace(MODEL, likelihood=pv.likelihoods.StudentT(df=df))
    fitted = train(model, GUIDE, small_cells(), settings=settings(max_epochs=1), progress=False)
    rates = in_common_unit(fitted, small_cells()).guide.rates
    assert rates.shape.root.isfinite().all() and rates.units.cumulative.isfinite().all()


@pytest.mark.slow
def test_intervals_of_velocities_come_to_cover_the_truth() -> None:
    adata = small_adata(300, 40)
    model = pv.VelocityModel(likelihood=pv.likelihoods.Tobit())
    fit = pv.fit(model, None, adata, data=pv.velocity_data(adata, as_is=True))
    covered = pv.coverage_of(fit, adata, progress=False).records[0].tallies["velocity"].coverage
    assert 0.75 < covered[0.9] <= 1.0 and 0.35 < covered[0.5] < 0.8


def test_a_fit_as_trained_draws_in_its_own_units(before: Fitted) -> None:
    data = pv.velocity_data(small_adata(), as_is=True)
    fit = Fit(before, data, "")
    trained = fit.as_trained()
    assert trained.told is before and isinstance(fit.told.guide.rates, RescaledRates)
    assert trained.posterior(draws=20).rates_sd["beta"].max() < fit.posterior(draws=20).rates_sd["beta"].min()
