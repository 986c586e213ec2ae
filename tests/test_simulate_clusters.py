"""Simulated clusters: their means, shares and conditions are those that were asked for."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from pyro_velo.errors import InputError
from pyro_velo.simulate import (
    ClusterSettings,
    LibrarySize,
    Poisson,
    ZeroInflatedNegativeBinomial,
    simulate_clusters,
    simulate_poisson,
)

STANDARD_ERRORS = 5.0


def test_counts_scatter_around_the_mean_of_their_cluster_and_condition() -> None:
    noise = Poisson(library_size=LibrarySize(depth=20.0, sd=0.5))
    found = simulate_clusters(4000, 6, settings=ClusterSettings(clusters=2, conditions=2, noise=noise), seed=1)
    for k, c in np.ndindex(2, 2):
        cells = (found.label == k) & (found.condition == c)
        expected = found.library[cells].sum() * np.exp(found.log_mean[k, c])
        miss = found.counts[cells].sum(0) - expected
        assert (np.abs(miss) < STANDARD_ERRORS * np.sqrt(expected)).all()


def test_effects_are_as_large_as_asked_and_the_first_condition_has_none() -> None:
    settings = ClusterSettings(
        clusters=8, conditions=3, separation=0.7, markers=0.4, effect=0.3, interaction=0.2, spread=0.5
    )
    mean = simulate_clusters(2, 5000, settings=settings, seed=2).log_mean
    reference = mean[:, 0]
    marker = reference.std(0) > 1e-12
    assert marker.mean() == 0.4
    assert_allclose(reference[:, marker].std(0, ddof=1).mean(), 0.7 * 0.965, rtol=0.03)
    fold = mean[:, 1:] - reference[:, None]
    assert_allclose(fold.std(), np.hypot(0.3, 0.2), rtol=0.03)
    assert_allclose(fold.mean(0).std(), np.hypot(0.3, 0.2 / 8**0.5), rtol=0.03)
    assert_allclose(np.exp(reference[:, ~marker]).mean(), 1, rtol=0.05)


def test_a_null_has_one_cluster_and_no_markers() -> None:
    found = simulate_clusters(50, 20, settings=ClusterSettings(clusters=1), seed=0)
    assert set(found.label) == {0} and set(found.condition) == {0}
    spread = simulate_clusters(50, 20, settings=ClusterSettings(clusters=1, separation=9.0), seed=0)
    assert_array_equal(found.log_mean, spread.log_mean)


def test_equal_shares_and_others() -> None:
    equal = simulate_clusters(20_000, 1, settings=ClusterSettings(clusters=4, concentration=np.inf), seed=0)
    assert_allclose(np.bincount(equal.label) / 20_000, 0.25, atol=0.02)
    uneven = simulate_clusters(2000, 1, settings=ClusterSettings(clusters=4, concentration=1.0), seed=0)
    assert np.bincount(uneven.label, minlength=4).std() > 100


def test_zeros_are_added_where_the_noise_loses_counts() -> None:
    noise = ZeroInflatedNegativeBinomial(gate=0.4, library_size=LibrarySize(depth=200.0))
    found = simulate_clusters(3000, 10, settings=ClusterSettings(clusters=2, spread=0.0, noise=noise), seed=0)
    assert_allclose((found.counts == 0).mean(), 0.4, atol=0.03)


def test_the_synthetic_poisson_of_the_seed() -> None:
    counts = simulate_poisson(seed=1)
    assert counts.shape == (2000, 10)
    rate = np.arange(1, 11)
    assert (np.abs(counts.mean(0) - rate) < STANDARD_ERRORS * np.sqrt(rate / 2000)).all()
    assert_allclose(counts.var(0), rate, rtol=0.2)
    correlation = np.corrcoef(counts.T)[np.triu_indices(10, 1)]
    assert np.abs(correlation).max() < STANDARD_ERRORS / 2000**0.5


def test_the_same_seed_gives_the_same_cells_and_another_does_not() -> None:
    one, other = (simulate_clusters(30, 5, seed=3).counts for _ in range(2))
    assert_array_equal(one, other)
    assert (one != simulate_clusters(30, 5, seed=4).counts).any()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"clusters": 0}, "clusters to be a whole number >= 1"),
        ({"conditions": 1.5}, "conditions to be a whole number"),
        ({"markers": 1.2}, r"markers to be a number in \[0, 1\]"),
        ({"separation": -1}, "separation to be a number"),
        ({"concentration": 0}, "concentration to be a number"),
        ({"noise": "nb"}, "noise to be a Noise"),
    ],
)
def test_settings_out_of_range_are_refused(wrong: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        ClusterSettings(**wrong)
