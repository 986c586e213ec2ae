"""Laws of the calibration: an exact posterior passes, one that is too sure fails, and parts add up to the whole."""

from __future__ import annotations

import json

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from scipy.stats import norm
from tolerances import STANDARD_ERRORS

from pyro_velo import metrics, tallies
from pyro_velo.calibration import Calibration, Record
from pyro_velo.errors import InputError
from pyro_velo.tallies import LEVELS, Tally, band, crps, ecdf, ranks, tally

DRAWS = 99


def toy(rng: np.random.Generator, n: int, draws: int = DRAWS, shrink: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """A Normal mean with one observation of sd 0.7: the truth (n,), draws of its exact posterior (draws, n).

    With `shrink` the posterior's sd is that many times what it ought to be.
    """
    truth = rng.normal(size=n)
    x = truth + 0.7 * rng.normal(size=n)
    variance = 1 / (1 + 1 / 0.49)
    return truth, variance / 0.49 * x + shrink * np.sqrt(variance) * rng.normal(size=(draws, n))


def calibration_of(rng: np.random.Generator, fits: int, shrink: float = 1.0, n: int = 50) -> Calibration:
    """Fits of `n` values each."""
    records = []
    for _ in range(fits):
        truth, draws = toy(rng, n, shrink=shrink)
        rank = int(ranks(truth[0], draws[:, 0], rng))
        records.append(Record({"mean": tally(truth, draws, rng)}, {"mean": rank}))
    return Calibration(tuple(records), DRAWS, {"mean": "m"})


# An exact posterior


@pytest.mark.parametrize("draws", [39, 99])
def test_an_exact_posterior_covers_what_it_says(rng: np.random.Generator, draws: int) -> None:
    n = 20_000
    found = tally(*toy(rng, n, draws), rng)
    assert found.n == n and found.ranks.sum() == n
    for level, share in found.coverage.items():
        assert abs(share - level) < STANDARD_ERRORS * np.sqrt(level * (1 - level) / n), level
    # All of the ranks are equally likely.
    expected = n / (draws + 1)
    assert abs(((found.ranks - expected) ** 2 / expected).sum() - draws) < STANDARD_ERRORS * np.sqrt(2 * draws)
    assert abs(found.bias) < STANDARD_ERRORS / np.sqrt(n)
    # A t with draws - 1 degrees of freedom, and the mean of the draws is off by its own error.
    rms = np.sqrt((1 + 1 / draws) * (draws - 1) / (draws - 3))
    assert found.overconfidence == pytest.approx(rms, abs=STANDARD_ERRORS / np.sqrt(2 * n))


def test_half_the_sd_covers_less_and_by_the_amount_that_theory_says(rng: np.random.Generator) -> None:
    n = 20_000
    found = tally(*toy(rng, n, shrink=0.5), rng)
    for level, share in found.coverage.items():
        expected = 2 * norm.cdf(0.5 * norm.ppf((1 + level) / 2)) - 1
        assert share == pytest.approx(expected, abs=0.025) and share < level - 0.1
    assert found.overconfidence == pytest.approx(2, rel=0.05)


def test_sharpness_and_shrinkage_are_those_of_the_posterior(rng: np.random.Generator) -> None:
    found, sd = tally(*toy(rng, 10_000, 199), rng), np.sqrt(0.49 / 1.49)
    for level, width in found.widths.items():
        assert width == pytest.approx(2 * norm.ppf((1 + level) / 2) * sd, rel=0.02)
    assert found.shrinkage == pytest.approx(1 - sd**2, abs=0.03)
    # The mean CRPS of a calibrated Normal is its sd / sqrt(pi).
    assert found.mean_crps == pytest.approx(sd / np.sqrt(np.pi), rel=0.03)
    prior = tally(rng.normal(size=10_000), rng.normal(size=(99, 10_000)), rng)
    assert prior.skill == pytest.approx(1 / np.sqrt(np.pi), rel=0.03) and abs(prior.shrinkage) < 0.05


# Ranks and their band


def test_the_band_holds_uniform_ranks_as_often_as_it_says(rng: np.random.Generator) -> None:
    samples = 1000
    for n, size in ((20, 100), (200, 40)):
        inside = [ecdf(np.bincount(rng.integers(size, size=n), minlength=size)).inside for _ in range(samples)]
        # Counts are whole numbers: the band is the narrowest that holds 95 % or more.
        assert -STANDARD_ERRORS * np.sqrt(0.95 * 0.05 / samples) < np.mean(inside) - 0.95 < 0.035


def test_the_probability_of_staying_is_that_of_a_simulation(rng: np.random.Generator) -> None:
    n, z, samples = 30, np.array([0.1, 0.35, 0.5, 0.9]), 20_000
    low, high = np.array([0, 6, 11, 24]), np.array([6, 15, 20, 29])
    counts = (rng.random((samples, n))[:, :, None] <= z).sum(1)
    simulated = ((low <= counts) & (counts <= high)).all(1).mean()
    exact = tallies._stays(n, z, low, high)
    assert abs(exact - simulated) < STANDARD_ERRORS * np.sqrt(exact * (1 - exact) / samples)
    free = tallies._stays(n, z, np.zeros(4, int), np.full(4, n))
    assert free == pytest.approx(1, abs=1e-12)


def test_at_one_point_the_band_is_the_binomial_interval() -> None:
    low, high = band(100, (0.5,), 0.95)
    assert (low.tolist(), high.tolist()) == ([40], [60])


def test_ranks_of_an_exact_posterior_are_inside_and_those_of_half_the_sd_outside(rng: np.random.Generator) -> None:
    samples, fits, inside = 300, 60, {}
    for shrink in (1.0, 0.5):
        truth, draws = toy(rng, samples * fits, shrink=shrink)
        each = ranks(truth, draws, rng).reshape(samples, fits)
        inside[shrink] = np.mean([ecdf(np.bincount(some, minlength=DRAWS + 1)).inside for some in each])
    assert abs(inside[1.0] - 0.95) < STANDARD_ERRORS * np.sqrt(0.95 * 0.05 / samples)
    assert inside[0.5] < 0.1


def test_too_sure_ranks_are_at_both_ends_and_shifted_ones_at_one(rng: np.random.Generator) -> None:
    sure = ecdf(tally(*toy(rng, 1000, shrink=0.5), rng).ranks)
    assert sure.difference[0] > sure.high[0] and sure.difference[-1] < sure.low[-1]
    truth, draws = toy(rng, 1000)
    high = ecdf(tally(truth, draws + 0.3, rng).ranks)
    assert (high.difference > 0).all() and not high.inside


def test_ties_are_broken_uniformly(rng: np.random.Generator) -> None:
    assert set(ranks(np.zeros(500), np.zeros((4, 500)), rng)) == set(range(5))
    # Whole numbers, so that most draws tie with the truth.
    n = 20_000
    truth, draws = rng.poisson(0.7, n), rng.poisson(0.7, (19, n))
    found = ranks(truth, draws, rng)
    assert ((draws < truth).sum(0) <= found).all() and (found <= (draws <= truth).sum(0)).all()
    counts = np.bincount(found, minlength=20)
    assert abs(((counts - n / 20) ** 2 / (n / 20)).sum() - 19) < STANDARD_ERRORS * np.sqrt(2 * 19)


# CRPS


def test_the_crps_of_a_point_is_the_absolute_error(rng: np.random.Generator) -> None:
    truth, point = rng.normal(size=(2, 7, 3))
    assert_allclose(crps(truth, np.tile(point, (5, 1, 1))), np.abs(truth - point), rtol=1e-12)


def test_the_crps_equals_its_definition(rng: np.random.Generator) -> None:
    truth, draws = rng.normal(size=6), rng.normal(size=(11, 6))
    pairs = np.abs(draws[:, None] - draws[None]).sum((0, 1))
    assert_allclose(crps(truth, draws), np.abs(draws - truth).mean(0) - pairs / (2 * 11 * 10), rtol=1e-12)


def test_the_crps_of_normal_draws_is_on_average_the_closed_form(rng: np.random.Generator) -> None:
    for y in (0.0, 0.8, -2.5):
        closed = y * (2 * norm.cdf(y) - 1) + 2 * norm.pdf(y) - 1 / np.sqrt(np.pi)
        # Fair, so that few draws have its mean as many do.
        for n in (2, 5, 200):
            each = crps(np.full(4000, y), rng.normal(size=(n, 4000)))
            assert abs(each.mean() - closed) < STANDARD_ERRORS * each.std() / np.sqrt(4000)


# Parts and the whole


def same(one: Tally, other: Tally) -> None:
    for name, value in vars(one).items():
        assert_allclose(value, getattr(other, name), rtol=1e-12, err_msg=name)


def test_parts_add_up_to_the_whole(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    truth, draws = rng.poisson(2.0, (60, 7)).astype(float), rng.poisson(2.0, (19, 60, 7)).astype(float)
    whole = tally(truth, draws, np.random.default_rng(1))
    breaks, total = np.random.default_rng(1), Tally.empty(19)
    for part in np.array_split(np.arange(60), 4):
        total += tally(truth[part], draws[:, part], breaks)
    same(total, whole)
    monkeypatch.setattr(tallies, "NUMBERS_AT_ONCE", 190)
    same(tally(truth, draws, np.random.default_rng(1)), whole)


def test_the_tally_is_what_numpy_says_of_all_values_at_once(rng: np.random.Generator) -> None:
    truth, draws = rng.normal(size=(8, 5)), rng.normal(size=(30, 8, 5)).astype(np.float32)
    found = tally(truth, draws, rng)
    for level, share in found.coverage.items():
        low, high = np.quantile(draws.astype(float), [(1 - level) / 2, (1 + level) / 2], axis=0, method="weibull")
        assert share == metrics.coverage(truth, low, high)
        assert found.widths[level] == pytest.approx((high - low).mean())
    assert_array_equal(found.ranks, np.bincount((draws < truth).sum(0).ravel(), minlength=31))
    assert found.mean_crps == pytest.approx(crps(truth, draws).mean())
    assert found.sd == pytest.approx(truth.std())
    assert found.bias == pytest.approx(((truth - draws.mean(0)) / draws.std(0, ddof=1)).mean(), rel=1e-5)


def test_what_is_not_known_is_left_out_and_a_point_has_no_z_score(rng: np.random.Generator) -> None:
    truth, draws = toy(rng, 40)
    holes = np.where(np.arange(40) < 10, np.nan, truth)
    found = tally(holes, draws, rng)
    assert found.n == 30 and found.coverage[0.9] == tally(truth[10:], draws[:, 10:], rng).coverage[0.9]
    point = tally(truth, np.zeros((5, 40)), rng)
    assert point.spread == 0 and np.isnan(point.overconfidence) and point.shrinkage == 1 and point.coverage[0.95] == 0


# The result


def test_the_error_is_the_one_between_fits(rng: np.random.Generator) -> None:
    found = calibration_of(rng, 12)
    each = [record.tallies["mean"].coverage[0.8] for record in found.records]
    mean, error = found.coverage("mean", 0.8)
    assert mean == pytest.approx(np.mean(each)) and error == pytest.approx(np.std(each, ddof=1) / np.sqrt(12))
    assert mean == pytest.approx(found.totals["mean"].coverage[0.8])
    assert found.crps("mean")[0] == pytest.approx(found.totals["mean"].skill)


def test_a_record_comes_back_from_json_to_the_bit(rng: np.random.Generator) -> None:
    record = calibration_of(rng, 1).records[0]
    again = Record.from_plain(json.loads(json.dumps(record.to_plain())))
    assert again.ranks == record.ranks
    for name, value in vars(record.tallies["mean"]).items():
        assert_array_equal(value, getattr(again.tallies["mean"], name))


def test_table_and_json_say_the_same(rng: np.random.Generator) -> None:
    found = calibration_of(rng, 12)
    told, (share, error) = json.loads(found.to_json()), found.coverage("mean", 0.9)
    assert told["fits"] == 12 and told["quantities"]["mean"]["90%"] == share
    assert f"{share:.3f} ± {error:.3f}" in str(found) and str(found).splitlines()[-1].split()[-1] == "m"
    assert str(found).splitlines()[-1].split()[-2] == ("inside" if found.ecdf("mean").inside else "outside")
    one = Calibration(found.records[:1], DRAWS, failed=("fit 3: NaN",), interrupted=True)
    assert "±" not in str(one) and json.loads(one.to_json())["quantities"]["mean"]["90% error"] is None
    assert "Left out, because it failed: fit 3: NaN" in str(one) and "Interrupted" in str(one)


def test_bad_input_is_refused(rng: np.random.Generator) -> None:
    for draws in (np.zeros((1, 3)), np.zeros((5, 4)), np.zeros(3)):
        with pytest.raises(InputError, match="Expected draws of shape"):
            tally(np.zeros(3), draws, rng)
    with pytest.raises(InputError, match="one rank or more"):
        ecdf(np.zeros(5))
    with pytest.raises(InputError, match="one fit or more"):
        Calibration((), DRAWS)
    with pytest.raises(InputError, match="among mean; got 'velocity'"):
        calibration_of(rng, 1).coverage("velocity", LEVELS[0])
