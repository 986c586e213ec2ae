"""P(directional): what genes agree on, the null that it is held against, and what becomes of noise and of dynamics."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from pathlib import Path

import anndata
import matplotlib.pyplot as plt
import numpy as np
import pytest
from anndata import AnnData
from numpy.testing import assert_allclose, assert_array_equal
from scipy import sparse
from scipy.optimize import isotonic_regression
from sklearn.neighbors import kneighbors_graph
from small import GUIDE, MODEL

import pyro_velo as pv
from pyro_velo import futures, simulate
from pyro_velo.data import anndata_keys as keys
from pyro_velo.directional import CAUTION, Directional, agreement_of_genes, directional, false_discoveries
from pyro_velo.errors import InputError
from pyro_velo.fitting import Fit
from pyro_velo.plots import directional as pictures
from pyro_velo.train import TrainSettings
from pyro_velo.transitions import Receiver, Stream

DRAWS, FLIPS = 4, 199


def streamed(draws: np.ndarray, size: int = 37) -> Stream:
    """Hands over draws (draws, cells, genes) in batches."""

    def stream(receive: Receiver) -> None:
        for start in range(0, draws.shape[1], size):
            cells = np.arange(start, min(start + size, draws.shape[1]))
            receive(cells, draws[:, cells])

    return stream


def found(velocity: np.ndarray, x: np.ndarray, *, k: int = 10, seed: int = 0, spread: float = 0.01) -> Directional:
    """Of velocities (cells, genes), with a few draws about them, on the k nearest neighbours of `x`."""
    noise = np.random.default_rng(seed).normal(0, spread * velocity.std(), (DRAWS, *velocity.shape))
    return directional(streamed(velocity + noise), x, kneighbors_graph(x, k), flips=FLIPS, seed=seed)


def line(n_cells: int = 150, n_genes: int = 24, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.random.Generator]:
    """Cells along a line through the space of genes, a little off it: x (cells, genes), and the line's direction."""
    rng = np.random.default_rng(seed)
    along = rng.normal(size=n_genes)
    return rng.uniform(0, 5, n_cells)[:, None] * along + rng.normal(0, 0.3, (n_cells, n_genes)), along, rng


# The statistic


def one_cell(n_genes: int = 6, seed: int = 1) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A flow (genes,), the cells around it (9, genes), and draws (5, genes)."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=n_genes), rng.normal(size=(9, n_genes)), rng.normal(size=(5, n_genes))


def test_the_statistic_is_what_half_the_genes_say_of_where_the_other_half_leads() -> None:
    flow, spread, draws = one_cell()
    x = spread - spread.mean(axis=0)
    halves = []
    for chosen in product((False, True), repeat=len(flow)):
        a = np.array(chosen)
        weights = x[:, a] @ flow[a]
        halves.append(weights @ (x[:, ~a] @ flow[~a]))
    towards = np.array([sum(flow[h] * x[:, h] @ x[:, g] for h in range(6) if h != g) for g in range(6)])
    assert_allclose(4 * np.mean(halves), flow @ towards, rtol=1e-10)
    variance = np.square(flow * towards).sum() + np.var(draws @ towards)
    (statistic,), agreement = agreement_of_genes(flow, spread, draws, np.ones((6, 1)))
    assert_allclose(statistic, flow @ towards / np.sqrt(variance), rtol=1e-10)
    assert agreement == np.mean(draws @ towards > 0)


def test_a_flip_is_that_of_a_genes_velocity_in_flow_and_draws() -> None:
    flow, spread, draws = one_cell()
    signs = np.random.default_rng(0).choice((-1.0, 1.0), (6, 20))
    together, _ = agreement_of_genes(flow, spread, draws, signs)
    one = np.ones((6, 1))
    each = [agreement_of_genes(flow * sign, spread, draws * sign, one)[0][0] for sign in signs.T]
    assert_allclose(together, each, rtol=1e-10)


def test_units_and_the_place_of_the_cells_change_nothing() -> None:
    flow, spread, draws = one_cell()
    one = np.ones((6, 1))
    expected, _ = agreement_of_genes(flow, spread, draws, one)
    moved, _ = agreement_of_genes(7 * flow, 3 * spread + 5, 7 * draws, one)
    assert_allclose(moved, expected, rtol=1e-10)


def test_one_gene_alone_agrees_with_nobody() -> None:
    flow, spread, draws = one_cell(1)
    assert_array_equal(agreement_of_genes(flow, spread, 0 * draws, np.ones((1, 1)))[0], 0)


# The rates


def test_rates_are_those_of_their_definition() -> None:
    rng = np.random.default_rng(0)
    null, t = rng.normal(size=(99, 40)), np.append(rng.normal(size=15), rng.normal(3, 1, 25))
    pool = np.vstack((t, null))
    rates = false_discoveries(t, null)
    every = [(pool >= c).sum() / 100 / (t >= c).sum() for c in t]
    tail = [min(1, *(f for f, c in zip(every, t, strict=True) if c <= mine)) for mine in t]
    upper = np.quantile(pool, 0.95, axis=1)
    assert_allclose(rates.q, np.maximum(tail, CAUTION * np.mean(upper >= upper[0])), rtol=1e-12)
    values = np.concatenate((t, pool.ravel()))
    cells = np.append(np.ones(40), np.zeros(pool.size))
    order = np.lexsort((-cells, values))
    weights = np.where(cells[order] == 1, 1, 1 / 100)
    shares = isotonic_regression(cells[order], weights=weights).x[np.argsort(order)][:40]
    below = (pool <= np.median(pool)).sum(axis=1)
    nulls = min(1, (below[0] + 1) / np.quantile(below, 0.05))
    assert nulls < 1
    assert_allclose(rates.local, np.maximum(np.minimum(nulls * (1 / shares - 1), 1), rates.q), rtol=1e-9)


def test_rates_fall_as_the_evidence_rises_whatever_the_order_of_the_cells() -> None:
    rng = np.random.default_rng(3)
    null, t = rng.normal(size=(199, 60)), rng.normal(1, 2, 60)
    rates, order = false_discoveries(t, null), np.argsort(t)
    again = false_discoveries(t[order], null[:, order])
    for values, sorted_ in zip(rates, again, strict=True):
        assert (np.diff(values[order]) <= 1e-12).all() and (values >= 0).all() and (values <= 1).all()
        assert_allclose(sorted_, values[order], rtol=1e-12)
    assert (rates.local >= rates.q).all()


def test_a_chance_that_all_cells_share_is_rarely_taken_for_evidence() -> None:
    """Cells that all have one statistic: of a hundred null data sets, one should be called and five must not."""
    rng = np.random.default_rng(0)
    called = [(false_discoveries(*_shared(rng)).local < 0.05).mean() for _ in range(300)]
    assert 0 < np.mean(called) < 0.03


def _shared(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    pool = np.repeat(rng.normal(size=(200, 1)), 30, axis=1) + rng.normal(0, 0.01, (200, 30))
    return pool[0], pool[1:]


# Noise


def test_genes_that_point_at_random_are_not_directional() -> None:
    """Whatever direction each gene takes, all cells share it."""
    shares = []
    for seed in range(30):
        x, along, rng = line(60, 12, seed)
        signs = rng.choice((-1.0, 1.0), 12)
        shares.append(found(np.tile(signs * along, (60, 1)), x, seed=seed).share)
    assert np.mean(shares) < 0.05


def test_of_the_cells_that_are_called_few_are_wrong() -> None:
    """Two kinds of cells: on one line genes agree, on the other they point at random."""
    wrong, right = [], []
    for seed in range(20):
        x, along, rng = line(120, 24, seed)
        signs = np.where(np.arange(120)[:, None] < 60, 1, rng.choice((-1.0, 1.0), 24))
        x[60:] += 50 * rng.normal(size=24)
        called = found(signs * along + 0.5 * rng.normal(size=x.shape), x, seed=seed).called
        wrong.append(called[60:].sum() / max(1, called.sum()))
        right.append(called[:60].mean())
    assert np.mean(wrong) <= 0.05 and np.mean(right) > 0.5


def test_noise_that_neighbours_share_is_no_direction() -> None:
    """u and s without dynamics, smoothed over the same neighbours: a cell's own u - s leads it back from its noise."""
    for seed in range(3):
        rng = np.random.default_rng(seed)
        u, s = rng.normal(size=(2, 250, 60))
        graph = kneighbors_graph(s, 12, include_self=True)
        x, velocity = graph @ s / 12, graph @ (u - s) / 12
        around, one = sparse.csr_matrix(graph @ graph), np.ones((60, 1))
        own = [agreement_of_genes(velocity[i], x[around[i].indices], velocity[[i]], one)[0][0] for i in range(250)]
        assert np.median(own) > 2.5
        result = directional(streamed(np.stack((velocity, velocity))), x, kneighbors_graph(s, 12), flips=FLIPS)
        assert result.share <= 0.05 and np.median(result.statistic) < np.median(own)


def test_depth_is_no_direction() -> None:
    """All genes of a cell are higher or lower together, and all velocities are up."""
    rng = np.random.default_rng(0)
    x = rng.normal(0, 2, (120, 1)) + rng.normal(0, 0.3, (120, 20))
    up = 1 + 0.1 * rng.normal(size=x.shape)
    assert found(up, x).share <= 0.05


# Dynamics


def test_cells_that_follow_a_line_are_directional() -> None:
    x, along, rng = line()
    result = found(along + rng.normal(size=x.shape), x)
    assert result.share > 0.95
    assert_array_equal(result.called, result.probability > 0.95)
    assert (result.q[result.called] < 0.05).all()
    assert (result.probability <= 1 - CAUTION / (FLIPS + 1) + 1e-12).all()


def test_a_cell_is_as_directional_as_its_own_draws() -> None:
    """Some cells go against the flow, and of others every second draw does."""
    x, along, rng = line()
    draws = np.tile(along + 0.3 * rng.normal(size=x.shape), (DRAWS, 1, 1))
    draws[:, :10] *= -1
    draws[::2, 10:20] *= -1
    result = directional(streamed(draws), x, kneighbors_graph(x, 10), flips=FLIPS)
    assert_array_equal(result.agreement[:10], 0)
    assert_array_equal(result.agreement[10:20], 0.5)
    assert (result.probability[10:20] <= 0.5).all() and (result.probability[20:] > 0.9).mean() > 0.9


def test_the_same_seed_gives_the_same_and_batches_change_nothing() -> None:
    x, along, rng = line(80)
    draws = np.stack([along + rng.normal(size=x.shape) for _ in range(3)])
    graph = kneighbors_graph(x, 8)
    before = draws.copy(), x.copy()
    one, other = (directional(streamed(draws, size), x, graph, flips=FLIPS, seed=5) for size in (7, 80))
    assert_array_equal(one.probability, other.probability)
    assert_array_equal(one.null, other.null)
    assert not np.array_equal(directional(streamed(draws), x, graph, flips=FLIPS, seed=6).null, one.null)
    assert_array_equal(before[0], draws)
    assert_array_equal(before[1], x)


def test_a_unit_rescales_velocity_and_expression_alike() -> None:
    x, along, rng = line(80)
    draws = np.stack([along + rng.normal(size=x.shape) for _ in range(3)])
    unit = rng.uniform(0.5, 2, x.shape[1])
    graph = kneighbors_graph(x, 8)
    one = directional(streamed(draws), x, graph, unit=unit, flips=FLIPS)
    other = directional(streamed(draws * unit), x * unit, graph, flips=FLIPS)
    assert_allclose(one.statistic, other.statistic, rtol=1e-4, atol=1e-5)


def test_a_cell_without_neighbours_points_nowhere() -> None:
    x, along, rng = line(80)
    graph = sparse.lil_matrix(kneighbors_graph(x, 8))
    graph[3] = 0
    result = directional(streamed(np.stack([along + rng.normal(size=x.shape)] * 2)), x, graph, flips=FLIPS)
    assert result.statistic[3] == 0 and result.probability[3] == 0


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"fdr": 0.0}, "Expected a false discovery rate between 0 and 1; got 0"),
        ({"flips": 50}, "Expected 100 flips or more for a rate of 0.05; got 50"),
        ({"flips": 10**6}, "Expected 21 genes or more, for 1000000 flips that differ; got 12"),
        ({"velocity": np.full((2, 60, 12), np.nan)}, "finite velocities"),
        ({"velocity": np.ones((1, 60, 12))}, "Expected 2 or more draws"),
        ({"velocity": np.ones((2, 50, 12))}, "Expected a stream of the velocities of all cells; got fewer"),
    ],
)
def test_bad_input_is_told(change: dict, match: str) -> None:
    x, along, _ = line(60, 12)
    velocity = change.pop("velocity", np.stack([np.tile(along, (60, 1))] * 2))
    with pytest.raises(InputError, match=match):
        directional(streamed(velocity), x, kneighbors_graph(x, 5), **change)


# Fits


def simulated(stationary: bool, steps: int = 120) -> tuple[AnnData, Fit]:
    """Cells with or without dynamics, and a hasty fit of them."""
    parts = simulate.Settings(kinetics=simulate.LogNormalRates(drop=0), stationary=stationary)
    adata = pv.to_anndata(simulate.simulate(200, 60, settings=parts, seed=0))
    adata.obsp["distances"] = kneighbors_graph(adata.layers["spliced"], 20, mode="distance")
    rng = np.random.default_rng(0)
    adata.obsm["X_umap"] = np.column_stack((adata.obs[keys.TRUE_TIME], rng.normal(size=200))).astype(np.float32)
    training = TrainSettings(max_steps=steps)
    data = pv.velocity_data(adata, as_is=True)
    return adata, pv.fit(MODEL, GUIDE, adata, data=data, settings=training, progress=False)


@pytest.fixture(scope="module")
def still() -> tuple[AnnData, Fit]:
    return simulated(stationary=True)


@pytest.fixture(scope="module")
def moving() -> tuple[AnnData, Fit]:
    return simulated(stationary=False)


def written(made: tuple[AnnData, Fit]) -> tuple[AnnData, Directional]:
    adata = made[0].copy()
    return adata, futures.directional(adata, made[1], draws=10, flips=FLIPS, progress=False)


def test_cells_that_stand_still_are_not_called_and_cells_that_move_are(
    still: tuple[AnnData, Fit], moving: tuple[AnnData, Fit]
) -> None:
    assert written(still)[1].share <= 0.05
    assert written(moving)[1].share > 0.5


@pytest.mark.slow
def test_most_cells_of_a_simulated_process_are_called() -> None:
    adata = pv.to_anndata(simulate.simulate(300, 60, seed=0))
    adata.obsp["distances"] = kneighbors_graph(adata.layers["spliced"], 30, mode="distance")
    data = pv.velocity_data(adata, as_is=True)
    fit = pv.fit(None, None, adata, data=data, settings=TrainSettings(max_steps=800), progress=False)
    assert futures.directional(adata, fit, draws=30, progress=False).share > 0.8


@pytest.mark.slow
@pytest.mark.parametrize(("permuted", "low", "high"), [(True, 0.0, 0.05), (False, 0.35, 1.0)])
def test_a_pancreas_is_directional_until_its_molecules_are_permuted_within_clusters(
    pancreas_path: Path, permuted: bool, low: float, high: float
) -> None:
    """u and s of each gene, each by itself, among the cells of a cluster: clusters stay, and what joins genes goes."""
    rng = np.random.default_rng(0)
    whole = anndata.read_h5ad(pancreas_path)
    adata = whole[np.sort(rng.choice(whole.n_obs, 1000, replace=False))].copy()
    labels = adata.obs["clusters"].astype(str)
    for name in (keys.SPLICED, keys.UNSPLICED) if permuted else ():
        counts = sparse.csr_matrix(adata.layers[name]).toarray()
        for cluster in labels.unique():
            rows = np.flatnonzero(labels == cluster)
            counts[rows] = rng.permuted(counts[rows], axis=0)
        adata.layers[name] = sparse.csr_matrix(counts)
    pv.pp.prepare(adata, pv.pp.PrepareSettings(umap=False))
    fit = pv.fit(None, None, adata, settings=TrainSettings(max_steps=800), progress=False)
    assert low <= futures.directional(adata, fit, draws=30, progress=False).share <= high


def test_what_is_found_stands_in_the_anndata_and_survives_a_file(moving: tuple[AnnData, Fit], tmp_path: Path) -> None:
    before, fit = moving
    adata, result = written(moving)
    assert set(adata.obs) - set(before.obs) == {"velocity_p_directional", "velocity_directional_q"}
    assert_allclose(adata.obs["velocity_p_directional"], result.probability, atol=1e-7)
    assert_allclose(adata.obs["velocity_directional_q"], result.q, atol=1e-7)
    assert {str(adata.obs[key].dtype) for key in keys.DIRECTIONAL_OBS} == {"float32"}
    assert adata.obs[before.obs.columns].equals(before.obs) and adata.layers.keys() == before.layers.keys()
    pv.data.write_whole(adata, tmp_path / "directional.h5ad")
    about = anndata.read_h5ad(tmp_path / "directional.h5ad").uns[keys.UNS]["directional"]
    assert about["share"] == pytest.approx(result.called.mean()) and about["threshold"] == 0.95
    assert (about["fdr"], about["draws"], about["flips"], about["seed"]) == (0.05, 10, FLIPS, 0)
    drawn = np.empty((10, *fit.data.cells.scaled[1].shape))

    def keep(cells, values) -> None:
        drawn[:, cells] = values

    fit.as_trained().velocities(keep, draws=10, over_states="expected", progress=False)
    measured = adata.layers["spliced"][:, fit.data.genes].astype(np.float64)
    unit = 1 / np.ptp(measured, axis=0)
    direct = directional(streamed(drawn), measured, adata.obsp["distances"], unit=unit, flips=FLIPS)
    assert_allclose(direct.statistic, result.statistic, rtol=1e-3, atol=1e-3)


def test_what_is_there_is_not_overwritten_unasked(moving: tuple[AnnData, Fit]) -> None:
    adata, _ = written(moving)
    with pytest.raises(InputError, match=r"velocity_p_directional'\], obs\['velocity_directional_q'\].*overwrite"):
        futures.directional(adata, moving[1])
    strict = futures.directional(adata, moving[1], draws=5, fdr=0.03, overwrite=True, progress=False)
    assert adata.uns[keys.UNS]["directional"]["threshold"] == pytest.approx(0.97) and strict.threshold == 0.97


def without_graph(adata: AnnData) -> AnnData:
    del adata.obsp["distances"]
    return adata


@pytest.mark.parametrize(
    ("spoil", "match"),
    [
        (lambda adata: adata[:40].copy(), "Expected the AnnData that was fitted"),
        (without_graph, r"obsp\['distances'\] is missing"),
    ],
)
def test_another_anndata_is_told(spoil: Callable, match: str, moving: tuple[AnnData, Fit]) -> None:
    with pytest.raises(InputError, match=match):
        futures.directional(spoil(moving[0].copy()), moving[1])


# Pictures


def test_cells_wear_their_probability(moving: tuple[AnnData, Fit]) -> None:
    adata, result = written(moving)
    _, (one, _) = plt.subplots(1, 2)
    assert pictures.p_directional(adata, ax=one) is one
    cells = one.collections[0]
    where = {tuple(point): value for point, value in zip(cells.get_offsets(), cells.get_array(), strict=True)}
    for point, value in zip(adata.obsm["X_umap"], result.probability, strict=True):
        assert where[tuple(point.astype(float))] == pytest.approx(value, abs=1e-6)
    assert (cells.norm.vmin, cells.norm.vmax) == (0, 1)
    assert one.get_title() == f"{result.share:.0%} of 200 cells directional"


def test_evidence_and_null_are_densities(moving: tuple[AnnData, Fit]) -> None:
    result = written(moving)[1]
    ax = pictures.directional_null(result)
    null, called, everyone = (patch.get_data() for patch in ax.patches)
    for curve, mass in ((null, 1.0), (called, result.share), (everyone, 1.0)):
        assert np.sum(curve.values * np.diff(curve.edges)) == pytest.approx(mass, abs=2.1e-3)
    assert [text.get_text() for text in ax.get_legend().get_texts()][-1] == f"called directional, {result.share:.0%}"


@pytest.mark.parametrize(
    ("spoil", "match"),
    [
        (lambda adata: adata.obs.pop("velocity_p_directional"), "Expected 'velocity_p_directional' in adata.obs"),
        (lambda adata: adata.uns[keys.UNS].pop("directional"), "Expected 'directional' in adata.uns"),
        (lambda adata: adata.obsm.pop("X_umap"), "Expected 'X_umap' in adata.obsm"),
    ],
)
def test_a_missing_key_is_told(spoil: Callable, match: str, moving: tuple[AnnData, Fit]) -> None:
    adata, _ = written(moving)
    spoil(adata)
    with pytest.raises(InputError, match=match):
        pictures.p_directional(adata)
    assert plt.get_fignums() == []
