"""Laws of the loop: the prior is the model's, a posterior that is the prior is calibrated, and runs go on."""

from __future__ import annotations

import json
import shutil
from copy import copy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal
from scipy.stats import kstest, norm
from small import GUIDE, MODEL, settings, small_adata, small_fit
from tolerances import STANDARD_ERRORS
from torch import nn

import pyro_velo as pv
from pyro_velo import calibrating, kinetics, prior_draws
from pyro_velo.batch import Batch
from pyro_velo.calibrating import (
    CalibrationSettings,
    calibrate,
    calibrate_file,
    coverage_of,
)
from pyro_velo.calibration import Calibration
from pyro_velo.errors import FitError, InputError
from pyro_velo.fitting import fit
from pyro_velo.likelihoods import LIKELIHOODS
from pyro_velo.models.velocity import C_K, RATES, Explained
from pyro_velo.options import FitOptions
from pyro_velo.plots import calibration as pictures
from pyro_velo.posterior import stream
from pyro_velo.prior_draws import draw_from_prior, typical_cells, with_fixed_priors
from pyro_velo.tallies import Tally, tally
from pyro_velo.times import TIMES, from_time
from pyro_velo.truth import Truth, _Asked, measure

QUICK = CalibrationSettings(settings(max_epochs=1, batch_size=64))


class PriorGuide:
    """A guide that has not looked at the data: its rates are the prior's, with logarithms `shrink` times as spread."""

    def __init__(self, shrink: float = 1.0) -> None:
        self.shrink = shrink

    def __call__(self, program: nn.Module) -> nn.Module:
        return PriorGuideProgram(program, self.shrink)

    def __repr__(self) -> str:
        return f"PriorGuide({self.shrink})"


class PriorGuideProgram(nn.Module):
    def __init__(self, program: Any, shrink: float) -> None:
        super().__init__()
        narrow = copy(program)
        priors, start = program.recipe.priors, program.start.sites()
        means = {name: priors.of(name, start).base_dist.loc for name in ("alpha", "beta", "gamma")}
        rates = {name: dist.LogNormal(mean, shrink) for name, mean in means.items()}
        narrow.recipe = replace(program.recipe, priors=replace(priors, **rates))
        # Not a submodule: its parameters are the model's.
        self.program = [narrow]

    def forward(self, batch: Batch) -> None:
        program = self.program[0]
        genes = pyro.plate("genes", program.n_genes, dim=-1)
        with genes:
            program.sample_genes()
        with pyro.plate("cells", batch.n_cells, subsample=batch.index, dim=-2):
            pyro.sample("z", dist.Normal(torch.zeros(program.recipe.n_latent), 1.0).to_event(1))
            with genes:
                program.recipe.states.posterior(torch.zeros(4, *batch.u.shape))


# The prior


@pytest.fixture(scope="module")
def shared():
    """Many genes in many cells, on one clock."""
    model = with_fixed_priors(replace(MODEL, times=TIMES["shared"]()), typical_cells(300, 200))
    return model, draw_from_prior(model, (300, 200), seed=1)


def test_rates_are_the_priors(shared) -> None:
    model, found = shared
    assert set(found.values) == {*RATES, "onset", "noise_unspliced", "noise_spliced"}
    for name, value in found.values.items():
        prior = getattr(model.priors, name.partition("_")[0] if name.startswith("noise") else name)
        # Each number's place in its own prior is uniform.
        assert kstest(prior.cdf(value).numpy(), "uniform").pvalue > 1e-4, name


def test_a_prior_on_data_is_centred_once(shared) -> None:
    _, found = shared
    logs = {name: found.values[name].log() for name in ("alpha", "beta", "gamma")}
    for name, value in logs.items():
        assert abs(value.mean() - np.log(0.2)) < 0.3 + STANDARD_ERRORS / np.sqrt(200), name
        assert value.std() == pytest.approx(1, abs=STANDARD_ERRORS / np.sqrt(400))
    # Once it is fixed, other data do not move it.
    model, other = shared[0], typical_cells(50, 200)
    assert with_fixed_priors(model, replace(other, molecules=7 * other.molecules)).priors == model.priors


def test_the_truth_is_on_the_curve_of_a_shared_clock(shared) -> None:
    _, found = shared
    rates = kinetics.Rates(*(found.values[name].double() for name in RATES))
    time, state = found.time.double(), found.state
    assert_allclose(found.time, found.time[:, :1].expand_as(found.time), rtol=1e-6)
    assert kstest(time[:, 0].numpy() / kinetics.T_MAX, "uniform").pvalue > 1e-4
    since = time - found.values["onset"]
    # At any time a gene may be empty.
    on = since <= rates.switch_time
    assert on[state == 0].all() and not on[state == 2].any() and not (state == 1).any()
    moving = (state == 0) | (state == 2)
    for mine, exact in zip((found.u, found.s), kinetics.trajectory(rates, since.clamp_min(0)), strict=True):
        assert_allclose(mine[moving], exact[moving], rtol=1e-3, atol=1e-4)
    velocity = kinetics.velocity(rates, found.u.double(), found.s.double())
    assert_allclose(found.velocity[moving], velocity[moving], rtol=1e-3, atol=1e-4)
    assert (found.velocity[(state == 1) | (state == 3)] == 0).all()


@pytest.mark.parametrize("likelihood", ["normal", "nb"])
def test_states_have_the_posterior_that_the_model_gives_them_at_the_truth(likelihood: str) -> None:
    """Among cells and genes whose probability of a state is p, a share p is in it: simulation and density are one."""
    times = TIMES["shared"]()
    model = replace(MODEL, times=times, likelihood=LIKELIHOODS[likelihood]())
    like = typical_cells(200, 60, counts=model.likelihood.counts)
    found = draw_from_prior(model, like, seed=7)
    program, n = model.build(like), len(like)
    timed = from_time(found.time[:, :1], found.values["onset"], found.values["switch_time"], times.elsewhere)
    program.times = prior_draws._Known(timed._replace(shared=found.time[:, :1]))
    given = found.values | {"z": torch.zeros(n, 1, 2), "pi": torch.ones(n, 60, 4)}
    with torch.no_grad():
        told = program.explain(given, found.cells.batch(torch.arange(n)))
    for k, p in enumerate(torch.softmax(torch.stack(told.log_joint).double(), 0)):
        inside = (found.state == k).double()
        for low in (0.0, 0.2, 0.4, 0.6, 0.8):
            some = (p >= low) & (p <= low + 0.2)
            error = (p * (1 - p))[some].sum().sqrt() + 1
            assert abs((inside - p)[some].sum()) < STANDARD_ERRORS * error, (k, low)


def test_genes_leave_the_clock_as_their_loadings_say() -> None:
    """The probits of a cell's times are its own number, and features of it that all genes share, times the loadings."""
    found = draw_from_prior(replace(MODEL, times=TIMES["hierarchical"]()), (200, 40), seed=8)
    time, loadings = found.time.double().numpy() / kinetics.T_MAX, found.values["deviation"].double().numpy()
    probits = norm.ppf(time[((time > 0.01) & (time < 0.99)).all(1)])
    assert loadings.shape == (40, 10) and len(probits) > 20 and probits.std(1).mean() > 0.2
    told = np.column_stack([np.ones(40), loadings])
    assert_allclose(told @ np.linalg.lstsq(told, probits.T, rcond=None)[0], probits.T, atol=1e-3)


def test_without_a_clock_states_are_equally_likely_and_times_uniform_within_them() -> None:
    found = draw_from_prior(MODEL, (300, 40), seed=2)
    counts = np.bincount(found.state.ravel(), minlength=4) / found.state.numel()
    assert_allclose(counts, 0.25, atol=STANDARD_ERRORS * np.sqrt(0.25 * 0.75 / 12_000))
    switch = found.values["switch_time"].expand_as(found.time)
    on, off = found.state == 0, found.state == 2
    assert kstest((found.time / switch)[on][::20].numpy(), "uniform").pvalue > 1e-4
    assert kstest(((found.time - switch) / (kinetics.T_MAX - switch))[off][::20].numpy(), "uniform").pvalue > 1e-4
    assert_array_equal(found.time[found.state == 1], switch[found.state == 1])


@pytest.mark.parametrize("likelihood", ["normal", "tobit"])
def test_the_noise_is_the_likelihoods_and_nothing_is_rescaled(likelihood: str) -> None:
    model = replace(MODEL, times=TIMES["shared"](), likelihood=LIKELIHOODS[likelihood]())
    found = draw_from_prior(model, (300, 20), seed=1)
    scale = torch.tensor(C_K)[found.state]
    assert found.cells.ratio == 1 and found.cells.counts is None
    for name, measured, mean in (("unspliced", found.cells.u, found.u), ("spliced", found.cells.s, found.s)):
        place = torch.special.ndtr(((measured - mean) / (scale * found.values[f"noise_{name}"])).double()).numpy()
        assert (measured < 0).any() == (likelihood == "normal") and (measured == 0).any() == (likelihood == "tobit")
        # A censored zero: the noise may have been anything below it.
        place = np.where(measured.numpy() != 0, place, place * np.random.default_rng(0).random(place.shape))
        assert set(found.state.unique().tolist()) == {0, 2, 3}
        for state in found.state.unique().tolist():
            assert kstest(place[(found.state == state).numpy()], "uniform").pvalue > 1e-4, (name, state)


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("times", TIMES)
def test_every_likelihood_and_clock_can_be_drawn_from(likelihood: str, times: str) -> None:
    model = replace(MODEL, likelihood=LIKELIHOODS[likelihood](), times=TIMES[times]())
    found, again = (draw_from_prior(model, (30, 4), seed=3) for _ in range(2))
    assert torch.equal(found.cells.molecules, again.cells.molecules)
    assert not torch.equal(found.cells.molecules, draw_from_prior(model, (30, 4), seed=4).cells.molecules)
    assert ((found.time >= 0) & (found.time <= kinetics.T_MAX)).all() and (found.u >= 0).all() and (found.s >= 0).all()
    if model.likelihood.counts:
        assert_array_equal(found.cells.molecules, found.cells.molecules.round())
        assert (found.cells.molecules >= 0).all() and found.cells.counts is not None


def test_counts_have_the_mean_that_the_model_gives_them() -> None:
    model = replace(MODEL, likelihood=LIKELIHOODS["poisson"]())
    found = draw_from_prior(model, (400, 6), seed=5)
    counts = found.cells.counts
    means = counts.size_factors * (counts.zero + counts.unit * torch.stack((found.u, found.s)))
    z = ((found.cells.molecules - means) / means.sqrt()).double()
    assert abs(z.mean()) < STANDARD_ERRORS / z.numel() ** 0.5
    # A Poisson's fourth moment is 3 + 1/mean.
    assert abs((z**2).mean() - 1) < STANDARD_ERRORS * ((2 + 1 / means).mean() / z.numel()) ** 0.5


def test_drawing_leaves_the_generator_alone() -> None:
    before = torch.get_rng_state()
    draw_from_prior(MODEL, (20, 3), seed=6)
    with_fixed_priors(MODEL, typical_cells(20, 3))
    assert torch.equal(before, torch.get_rng_state())


# The loop


@pytest.fixture(scope="module")
def untaught() -> Calibration:
    """Fits whose posterior of the rates is the prior."""
    return calibrate(MODEL, PriorGuide(), (20, 72), fits=5, draws=19, settings=QUICK, progress=False)


def test_a_posterior_that_is_the_prior_is_calibrated_for_the_rates(untaught: Calibration) -> None:
    for name in (*RATES, "gamma/beta"):
        found = untaught.totals[name]
        assert found.n == 5 * 72
        # Beyond the outermost of 19 draws there is no 95 %.
        for level in (0.5, 0.8, 0.9):
            share = found.coverage[level]
            assert abs(share - level) < STANDARD_ERRORS * np.sqrt(level * (1 - level) / found.n), (name, level)
        assert abs(((found.ranks - 18) ** 2 / 18).sum() - 19) < STANDARD_ERRORS * np.sqrt(2 * 19), name
        assert abs(found.bias) < STANDARD_ERRORS / np.sqrt(found.n) and abs(found.shrinkage) < 0.4


def test_a_prior_that_is_too_narrow_is_found_out() -> None:
    found = calibrate(MODEL, PriorGuide(0.5), (20, 72), fits=2, draws=19, settings=QUICK, progress=False)
    for name in ("alpha", "beta", "gamma"):
        assert found.coverage(name, 0.9)[0] < 0.75 and found.totals[name].overconfidence > 1.5
    assert found.coverage("switch_time", 0.9)[0] > 0.75


def test_the_same_seed_gives_the_same_and_more_fits_begin_with_it(untaught: Calibration) -> None:
    again = calibrate(MODEL, PriorGuide(), (20, 72), fits=1, draws=19, settings=QUICK, progress=False)
    assert again.records[0].to_plain() == untaught.records[0].to_plain() != untaught.records[1].to_plain()


def interrupt_at(monkeypatch: pytest.MonkeyPatch, number: int, error: BaseException) -> list[int]:
    """Let the fit of that number, counted from 0, fail so."""
    calls: list[int] = []
    train = calibrating.train

    def failing(*arguments: Any, **options: Any) -> Any:
        calls.append(len(calls))
        if len(calls) == number + 1:
            raise error
        return train(*arguments, **options)

    monkeypatch.setattr(calibrating, "train", failing)
    return calls


SMALL = {"fits": 3, "draws": 2, "settings": QUICK, "progress": False}


def test_ctrl_c_keeps_what_is_done_and_the_folder_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = calibrate(MODEL, GUIDE, (20, 3), **SMALL)
    with monkeypatch.context() as patch:
        interrupt_at(patch, 2, KeyboardInterrupt())
        stopped = calibrate(MODEL, GUIDE, (20, 3), folder=tmp_path / "fits", **SMALL)
    assert stopped.interrupted and len(stopped.records) == 2 and "Interrupted" in str(stopped)
    names = sorted(path.name for path in (tmp_path / "fits").iterdir())
    assert names == ["about.json", "fit_0000.json", "fit_0001.json"]
    calls = interrupt_at(monkeypatch, -1, KeyboardInterrupt())
    resumed = calibrate(MODEL, GUIDE, (20, 3), folder=tmp_path / "fits", **SMALL)
    assert len(calls) == 1 and not resumed.interrupted
    assert [each.to_plain() for each in resumed.records] == [each.to_plain() for each in whole.records]
    (tmp_path / "fits" / "fit_0001.json").write_text("{")
    with pytest.raises(InputError, match=r"fit_0001\.json can't be read"):
        calibrate(MODEL, GUIDE, (20, 3), folder=tmp_path / "fits", **SMALL)


def test_a_folder_of_another_calibration_is_refused(tmp_path: Path) -> None:
    calibrate(MODEL, GUIDE, (20, 3), folder=tmp_path, **(SMALL | {"fits": 1}))
    with pytest.raises(InputError, match=r"Expected the draws of the calibration in .*, 2; got 6"):
        calibrate(MODEL, GUIDE, (20, 3), folder=tmp_path, **(SMALL | {"draws": 6}))
    # A name does not show a prior's numbers, but what it draws does.
    priors = [pv.Priors(beta=dist.LogNormal(mean, 0.5)) for mean in (0.0, 1.0)]
    other = tmp_path / "other"
    calibrate(replace(MODEL, priors=priors[0]), GUIDE, (20, 3), folder=other, **(SMALL | {"fits": 1}))
    with pytest.raises(InputError, match="first_simulation"):
        calibrate(replace(MODEL, priors=priors[1]), GUIDE, (20, 3), folder=other, **(SMALL | {"fits": 1}))


def test_a_failed_fit_is_told_and_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt_at(monkeypatch, 1, FitError("NaN at step 3,\ngene 2."))
    found = calibrate(MODEL, GUIDE, (20, 3), **SMALL)
    assert len(found.records) == 2 and found.failed == ("fit 1: NaN at step 3, gene 2.",)


def test_ctrl_c_before_the_first_fit_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt_at(monkeypatch, 0, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        calibrate(MODEL, GUIDE, (20, 3), **SMALL)


@pytest.mark.parametrize(
    ("model", "size", "options", "match"),
    [
        (MODEL, (20, 3), {"draws": 1}, "2 draws or more"),
        (MODEL, (20, 3), {"fits": 0}, "1 fit or more; got 0"),
        (MODEL, (3, 3), {}, "4 cells and 1 gene or more; got 3 and 3"),
        (replace(MODEL, priors=pv.Priors.flat()), (20, 3), {}, "one that is flat"),
        (replace(MODEL, likelihood=LIKELIHOODS["nb"]()), typical_cells(20, 3), {}, "expects raw counts"),
        ("velocity", (20, 3), {}, "Expected a VelocityModel"),
    ],
)
def test_bad_input_is_refused(model: Any, size: Any, options: dict[str, Any], match: str) -> None:
    with pytest.raises(InputError, match=match):
        calibrate(model, GUIDE, size, **(SMALL | options))


# One fit


@pytest.fixture(scope="module")
def simulated():
    adata = small_adata(60, 6)
    found = fit(
        MODEL, GUIDE, adata, settings=settings(max_epochs=2), progress=False, data=pv.velocity_data(adata, as_is=True)
    )
    return adata, found


def test_counting_by_batches_is_counting_all_at_once(simulated, monkeypatch: pytest.MonkeyPatch) -> None:
    _, found = simulated
    rng = np.random.default_rng(0)
    values = {name: rng.lognormal(size=6) for name in RATES}
    truth = Truth(values, rng.normal(size=(60, 6)), 20 * rng.random((60, 6)))
    whole = measure(found.fitted, found.data.cells, truth, draws=9, seed=4, progress=False)
    # As many batches as cells: the same cells, each drawn alone, have other latent vectors.
    kept = np.empty((9, 60, 6))

    def keep(index, drawn) -> None:
        kept[:, index] = drawn.velocities.numpy()

    monkeypatch.setattr("pyro_velo.posterior.CELLS_GENES_AT_ONCE", 7 * 6)
    parts = measure(found.fitted, found.data.cells, truth, draws=9, seed=4, progress=False)
    stream(found.fitted, found.data.cells, keep, draws=9, seed=4, over_states="drawn", progress=False)
    expected, counted = tally(truth.velocity, kept, np.random.default_rng(0)), parts.tallies["velocity"]
    assert whole.tallies["velocity"].n == counted.n == 360
    same_draws(counted, expected)
    assert whole.tallies["beta"].to_plain() == parts.tallies["beta"].to_plain()


@pytest.mark.parametrize("seed", range(3))
def test_the_rank_is_that_of_a_gene_whose_truth_is_known(simulated, seed: int) -> None:
    """Where lineages differ, a gene has no switching time that is true of all cells."""
    _, found = simulated
    rng = np.random.default_rng(0)
    values = {name: rng.lognormal(size=6) for name in RATES}
    values["switch_time"] = np.where(np.arange(6) == 2, values["switch_time"], np.nan)
    truth = Truth(values, rng.normal(size=(60, 6)), 20 * rng.random((60, 6)))
    record = measure(found.fitted, found.data.cells, truth, draws=9, seed=seed, progress=False)
    assert record.tallies["switch_time"].n == 1
    assert record.ranks["switch_time"] == record.tallies["switch_time"].ranks.argmax()
    assert "switch_time" in str(Calibration((record,), 9))


def test_times_are_those_of_the_posterior(simulated) -> None:
    _, found = simulated
    means = []
    stream(found.fitted, found.data.cells, lambda index, drawn: means.append(drawn.mean["t"]), draws=30, progress=False)
    asked = replace(found.fitted, program=_Asked(found.fitted.program, time=True))
    times = []
    stream(asked, found.data.cells, lambda index, drawn: times.append(drawn.velocities), draws=30, progress=False)
    assert_allclose(torch.cat(times, 1).mean(0), torch.cat(means), rtol=1e-4)


def test_a_program_that_is_asked_for_times_says_everything_else_as_before() -> None:
    told = Explained(*(tuple(torch.rand(20, 10) for _ in range(4)) for _ in range(5)))
    program = SimpleNamespace(recipe=None, explain=lambda values, batch: told)
    asked = _Asked(program, time=True).explain({}, None)
    assert asked.log_joint is told.log_joint and asked.velocity is told.t
    assert _Asked(program, time=False).explain({}, None) is told


def test_coverage_is_that_of_the_velocities_that_a_fit_gives_out(simulated) -> None:
    adata, found = simulated
    kept = np.empty((20, 60, 6))

    def keep(index, velocities) -> None:
        kept[:, index] = velocities

    found.velocities(keep, draws=20, over_states="drawn", progress=False)
    told = coverage_of(found, adata, draws=20, progress=False).totals
    same_draws(told["velocity"], tally(adata.layers["true_velocity"], kept, np.random.default_rng(0)))
    assert list(told) == ["alpha", "beta", "gamma", "gamma/beta", "switch_time", "time", "velocity"]
    assert told["alpha"].truth == pytest.approx(np.log(adata.var["true_alpha"]).sum())


def same_draws(one: Tally, other: Tally) -> None:
    """Equal, but for how ties are broken."""
    for name, value in vars(one).items():
        assert_allclose(value, getattr(other, name), rtol=1e-6, err_msg=name)


def test_the_unit_of_the_layer_matters_to_no_coverage(simulated) -> None:
    adata, found = simulated
    by_seven = adata.copy()
    for name in ("true_velocity",):
        by_seven.layers[name] = 7 * by_seven.layers[name]
    by_seven.var["true_alpha"] *= 7
    scaling = replace(found.data.scaling, s_unit=7 * found.data.scaling.s_unit)
    other = replace(found, data=replace(found.data, scaling=scaling))
    one, seven = (coverage_of(*each, draws=19, progress=False).totals for each in ((found, adata), (other, by_seven)))
    for name in one:
        assert one[name].coverage == seven[name].coverage
    assert seven["velocity"].mean_crps == pytest.approx(7 * one["velocity"].mean_crps, rel=1e-5)
    assert seven["alpha"].mean_crps == pytest.approx(one["alpha"].mean_crps, rel=1e-4)


def test_without_a_truth_there_is_no_coverage(simulated) -> None:
    adata, found = simulated
    bare = adata.copy()
    del bare.layers["true_velocity"]
    with pytest.raises(InputError, match="'true_velocity' is missing"):
        coverage_of(found, bare)
    branching = adata.copy()
    branching.var["true_t_"] = np.nan
    assert "switch_time" not in coverage_of(found, branching, draws=5, progress=False).totals


# Files and pictures


def test_from_options_to_files(tmp_path: Path) -> None:
    options = FitOptions(max_epochs=1, draws=5, seed=1, save=tmp_path / "fits", likelihood="poisson")
    paths = {"json": tmp_path / "told.json", "picture": tmp_path / "picture.png"}
    found = calibrate_file(options, cells=20, genes=3, fits=1, **paths)
    told = json.loads(paths["json"].read_text())
    assert told["fits"] == 1 and told["about"]["cells"] == 20 and told["about"]["genes"] == 3
    assert told["quantities"]["beta"]["90%"] == found.coverage("beta")[0]
    assert plt.imread(paths["picture"]).shape[2] == 4 and len(list((tmp_path / "fits").iterdir())) == 2
    with pytest.raises(InputError, match="exists already"):
        calibrate_file(options, cells=20, genes=3, fits=1, **paths)
    shutil.rmtree(tmp_path / "fits")
    with pytest.raises(InputError, match="two files"):
        calibrate_file(options, cells=20, genes=3, json=tmp_path / "a.png", picture=tmp_path / "a.png")
    with pytest.raises(InputError, match=r"\.txt"):
        calibrate_file(options, cells=20, genes=3, picture=tmp_path / "a.txt")
    assert not (tmp_path / "fits").exists()


def test_the_coverage_is_drawn_at_its_level(untaught: Calibration) -> None:
    ax = pictures.coverage(untaught)
    lines = {line.get_label(): line.get_xydata() for line in ax.lines[1:]}
    assert list(lines) == list(untaught.totals)
    for name, points in lines.items():
        assert_allclose(points[:, 1], list(untaught.totals[name].coverage.values()))
        assert_allclose(points[:, 0], [0.5, 0.8, 0.9, 0.95], atol=0.02)
    _, other = plt.subplots()
    assert pictures.coverage(untaught, ax=other) is other


def test_the_ranks_are_drawn_in_their_band(untaught: Calibration) -> None:
    ax, found = pictures.ranks(untaught, "beta"), untaught.ecdf("beta")
    line = next(line for line in ax.lines if line.get_label() == "one a fit").get_xydata()
    assert_allclose(line[1:-1], np.column_stack([found.points, found.difference]))
    assert_array_equal(line[[0, -1]], [[0, 0], [1, 0]])
    assert ax.get_title() == f"beta: {'inside' if found.inside else 'outside'}"
    with pytest.raises(InputError, match="got 'speed'"):
        pictures.ranks(untaught, "speed")


def test_the_crps_is_drawn_in_units_of_the_truth(untaught: Calibration) -> None:
    ax = pictures.crps(untaught)
    dots = [line.get_xydata()[0] for line in ax.lines if line.get_marker() == "o"]
    assert_allclose([dot[0] for dot in dots], [each.skill for each in untaught.totals.values()])
    assert len(pictures.calibration_panels(untaught).get_axes()) == 2 + 8


def test_a_fitted_guide_runs_through_the_same_loop() -> None:
    cells = typical_cells(40, 5)
    truth = draw_from_prior(with_fixed_priors(MODEL, cells), cells, seed=0)
    found = measure(
        small_fit(truth.cells), truth.cells, truth.truth, draws=9, seed=0, over_states="drawn", progress=False
    )
    assert found.tallies["velocity"].n == 200 and set(found.ranks) == set(found.tallies)
    # A truth in a steady state is 0, and so is a draw: ties.
    assert (truth.velocity == 0).float().mean() > 0.3
