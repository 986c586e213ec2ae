"""Pictures of model checks: what is drawn is what was computed, on the ax that was given."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from numpy.testing import assert_allclose

from pyro_velo.criticism import STATISTICS, PermutationScore, PredictiveCheck, Reliability
from pyro_velo.errors import InputError
from pyro_velo.plots.criticism import OUT, k_hat, permutation, predictive_check, predictive_checks

GENES = [f"${g}_x" for g in range(6)]


@pytest.fixture
def check(rng: np.random.Generator) -> PredictiveCheck:
    shape = (len(STATISTICS), len(GENES))
    mean = np.exp(rng.normal(0, 2, shape))
    observed, p = mean * 1.01, np.full(shape, 0.6)
    observed[4, 2], p[4, 2] = -3.0, 0.01
    return PredictiveCheck(STATISTICS, observed, mean, mean / 10, mean * 0.8, mean * 1.2, p, 100, ())


@pytest.fixture
def score() -> PermutationScore:
    permuted = np.array([[1.0] * 6, [np.nan] * 6])
    observed = permuted * [0.1, 0.9, 0.5, 0.3, 1.2, 0.7]
    return PermutationScore(("many", "alone"), observed, permuted, permuted, permuted)


def test_dots_are_the_statistics_and_the_gene_that_is_off_is_named(check: PredictiveCheck) -> None:
    ax = Figure().subplots()
    assert predictive_check(check, GENES, "covariance", ax=ax) is ax
    assert plt.get_fignums() == []
    sound, out = ax.collections[1], ax.collections[3]
    assert_allclose(sound.get_offsets(), np.delete(np.column_stack((check.observed[4], check.mean[4])), 2, axis=0))
    assert_allclose(out.get_offsets(), [[-3.0, check.mean[4, 2]]])
    assert_allclose(out.get_facecolor()[0], to_rgba(OUT))
    (segment,) = ax.collections[2].get_segments()
    assert_allclose(segment[:, 1], (check.low[4, 2], check.high[4, 2]))
    assert [text.get_text() for text in ax.texts] == ["$2_x"]
    ax.figure.savefig("/dev/null", format="png")


def test_axes_are_logarithmic_only_where_numbers_are_positive(check: PredictiveCheck) -> None:
    scales = [predictive_check(check, GENES, name).get_xscale() for name in ("variance_spliced", "covariance")]
    assert scales == ["log", "linear"]


def test_the_panel_has_an_ax_for_each_statistic(check: PredictiveCheck) -> None:
    figure = predictive_checks(check, GENES)
    drawn = [ax for ax in figure.axes if ax.has_data()]
    assert len(drawn) == len(STATISTICS)
    assert plt.get_fignums() == [figure.number]


def test_cells_above_the_limit_stand_out_and_those_without_a_tail_stand_below() -> None:
    values = np.array([0.9, 0.1, -np.inf, 0.71, 0.6])
    ax = k_hat(Reliability(np.arange(5), values, values))
    sound, bad = ax.collections
    assert_allclose(bad.get_offsets()[:, 1], [0.71, 0.9])
    assert_allclose(sound.get_offsets()[:, 1], [-0.2, 0.1, 0.6])
    assert ax.get_title() == "2 of 5 cells above 0.7"
    with pytest.raises(InputError, match="Expected the k-hat of one cell or more"):
        k_hat(Reliability(np.arange(0), np.empty(0), np.empty(0)))


def test_the_heat_map_has_the_best_genes_first(score: PermutationScore) -> None:
    ax = permutation(score, GENES, n_genes=3)
    assert [text.get_text() for text in ax.get_xticklabels()] == ["$0_x", "$3_x", "$2_x"]
    drawn = ax.collections[0].get_array()
    assert_allclose(drawn[0], [0.9, 0.7, 0.5])
    assert drawn.mask[1].all()
    with pytest.raises(InputError, match="Expected the names of the 6 fitted genes; got 2"):
        permutation(score, GENES[:2])
