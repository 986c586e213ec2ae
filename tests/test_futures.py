"""From a fit to fates and uncertainty: the numbers are those of its draws, and land where they are looked for."""

from __future__ import annotations

from collections.abc import Callable

import anndata
import matplotlib.pyplot as plt
import numpy as np
import pytest
from anndata import AnnData
from matplotlib.colors import to_rgba
from numpy.testing import assert_allclose, assert_array_equal
from scipy import sparse
from sklearn.neighbors import kneighbors_graph
from small import GUIDE, MODEL, settings

import pyro_velo as pv
from pyro_velo import embedding, fates, flow, futures, simulate
from pyro_velo.data import anndata_keys as keys
from pyro_velo.errors import InputError
from pyro_velo.fitting import Fit
from pyro_velo.plots import fates as pictures
from pyro_velo.transitions import Transitions

DRAWS = 6
Fitted = tuple[AnnData, Fit]


@pytest.fixture(scope="module")
def fitted() -> Fitted:
    """A fit of two lineages, written into its AnnData."""
    parts = simulate.Settings(kinetics=simulate.LogNormalRates(drop=0), lineages=simulate.Lineages(2))
    adata = pv.to_anndata(simulate.simulate(70, 8, settings=parts, seed=0))
    late = adata.obs[keys.TRUE_TIME] > 12
    adata.obs["clusters"] = np.where(late, adata.obs["lineage"].astype(str), "early")
    adata.obsm["X_umap"] = np.column_stack([adata.obs[keys.TRUE_TIME], np.arange(70) % 9]).astype(np.float32)
    adata.obsp["distances"] = kneighbors_graph(adata.layers["spliced"], 10, mode="distance")
    data = pv.velocity_data(adata, as_is=True)
    fit = pv.fit(MODEL, GUIDE, adata, data=data, settings=settings(), progress=False)
    fit.write(adata, draws=DRAWS)
    return adata, fit


def with_fates(fitted: Fitted, **options: object) -> tuple[AnnData, fates.Fates]:
    """A copy with the fates of both lineages in it."""
    adata = fitted[0].copy()
    options = {"terminal": ["lineage_1", "lineage_2"], "draws": DRAWS, "progress": False} | options
    return adata, futures.fates(adata, fitted[1], **options)


def either_way(adata: AnnData) -> sparse.csr_matrix:
    """A cell's neighbours, and those whose neighbour it is."""
    return adata.obsp["distances"] + adata.obsp["distances"].T


def two_sides() -> tuple[AnnData, Transitions]:
    """Cells on a line, in groups of ten, and a chain that drifts from the middle to both of its ends."""
    x = np.linspace(-1, 1, 80)[:, None]
    graph = kneighbors_graph(x, 4)
    towards = np.sign((x.T - x) * np.sign(x))[graph.nonzero()]
    adata = AnnData(np.zeros((80, 1), np.float32), obs={"clusters": [f"part {i // 10}" for i in range(80)]})
    pattern = sparse.csr_matrix(graph, dtype=bool)
    cosines = np.tile(0.2 * towards, (3, 1)).astype(np.float32)
    return adata, Transitions(pattern, cosines, np.ones((3, 80), np.float32), np.ones(pattern.nnz, np.float32))


def test_transitions_are_those_of_the_velocities_that_a_fit_draws(fitted: Fitted) -> None:
    adata, fit = fitted
    drawn = np.empty((DRAWS, adata.n_obs, len(fit.data.gene_names)))

    def keep(cells, values) -> None:
        drawn[:, cells] = values

    fit.velocities(keep, draws=DRAWS, over_states="expected", progress=False)
    _, _, expression = flow.units_of_range(adata)
    span = np.ptp(adata.layers["spliced"][:, fit.data.genes].astype(np.float64), axis=0)
    for steps in (1, 2):
        chain = futures.transitions(adata, fit, draws=DRAWS, steps=steps, progress=False)
        for i, values in enumerate(drawn):
            expected = embedding.cosine_correlations(
                values / span, expression[:, fit.data.genes], either_way(adata), steps=steps
            )
            assert_array_equal(chain.graph.indices, expected.indices)
            assert_allclose(chain.cosines[i], expected.data, atol=2e-5)


def test_fates_are_the_means_of_their_draws_and_stand_in_the_anndata(fitted: Fitted) -> None:
    adata, found = with_fates(fitted)
    assert found.draws.shape == (DRAWS, 70, 2) and found.states == ("lineage_1", "lineage_2")
    assert_allclose(found.draws.sum(axis=2), 1, atol=1e-6)
    assert_allclose(found.mean, found.draws.mean(axis=0), atol=1e-6)
    written = (adata.obsm[f"fate_probabilities{suffix}"] for suffix in ("", "_q05", "_q95"))
    for values, expected in zip(written, (found.mean, found.low, found.high), strict=True):
        assert_allclose(values, expected, atol=1e-6)
    chain = futures.transitions(adata, fitted[1], draws=DRAWS, progress=False)
    _, free = with_fates(fitted, balance=False, resample=False)
    for i in (0, DRAWS - 1):
        expected, _ = fates.absorption(chain.matrix(i), found.terminal)
        assert_allclose(free.draws[i], expected, atol=1e-6)
    assert_allclose((free.matrix - chain.mean()).data, 0, atol=1e-12)
    assert_allclose(np.asarray(found.matrix.sum(axis=1)).ravel(), 1, rtol=1e-12)
    ends = adata.obs[keys.FATE_TERMINAL]
    for k, name in enumerate(found.states):
        assert_array_equal(ends == name, adata.obs["clusters"] == name)
        assert_array_equal(adata.obsm["fate_probabilities"][ends == name, k], 1)
    assert list(adata.uns[keys.UNS]["fates"]["states"]) == list(found.states)
    assert (adata.obs[keys.FATE_REACHED] > 0.99).all()


def test_names_masks_and_numbers_say_the_same(fitted: Fitted) -> None:
    _, named = with_fates(fitted)
    clusters = fitted[0].obs["clusters"]
    masks = {name: (clusters == name).to_numpy() for name in named.states}
    numbers = {name: np.flatnonzero(mask) for name, mask in masks.items()}
    for terminal in (masks, numbers):
        assert_array_equal(with_fates(fitted, terminal=terminal)[1].draws, named.draws)


def test_nothing_but_the_keys_is_changed(fitted: Fitted) -> None:
    before = fitted[0]
    adata, _ = with_fates(fitted)
    futures.uncertainty(adata, fitted[1], draws=DRAWS, progress=False)
    new = {keys.FATE_REACHED, keys.FATE_TERMINAL, keys.VELOCITY_UNCERTAINTY_EXTRINSIC}
    assert set(adata.obs) - set(before.obs) == new
    assert adata.obs[before.obs.columns].equals(before.obs) and adata.var.equals(before.var)
    assert set(adata.obsm) - set(before.obsm) == {f"fate_probabilities{suffix}" for suffix in ("", "_q05", "_q95")}
    for name in before.layers:
        assert_array_equal(adata.layers[name], before.layers[name])
    assert (adata.obsp["distances"] != before.obsp["distances"]).nnz == 0
    assert set(adata.uns[keys.UNS]) - set(before.uns[keys.UNS]) == {"fates"}


def test_intrinsic_uncertainty_is_what_the_fit_has_written(fitted: Fitted) -> None:
    adata = fitted[0].copy()
    found = futures.uncertainty(adata, fitted[1], draws=DRAWS, progress=False)
    assert_allclose(found.intrinsic.variance, adata.obs[keys.VELOCITY_UNCERTAINTY], rtol=1e-3, atol=1e-6)
    assert_allclose(adata.obs["velocity_uncertainty_extrinsic"], found.extrinsic.variance, rtol=1e-6)
    for each in found:
        assert (np.abs(each.mean) <= 1).all() and (each.low <= each.high).all() and (each.variance >= 0).all()
        assert ((each.angle >= 0) & (each.angle <= 180)).all()


def test_terminal_states_that_are_found_are_named_after_their_cells() -> None:
    adata, chain = two_sides()
    # Groups as large as the terminal states: of smaller ones several would have all their cells in one.
    adata.obs["clusters"] = ["left"] * 30 + ["middle"] * 20 + ["right"] * 30
    found = futures.fates(adata, chain, 2, balance=False, resample=False)
    assert sorted(found.states) == ["left", "right"]
    left = found.states.index("left")
    assert_allclose(found.mean[:25, left], 1, atol=1e-3)
    assert_allclose(found.mean[-25:, left], 0, atol=1e-3)
    assert_allclose(found.mean[:, left], 1 - found.mean[::-1, left], atol=1e-6)
    adata.obs["clusters"] = "same"
    assert futures.fates(adata, chain, 2, overwrite=True).states == ("same", "same 2")
    del adata.obs["clusters"]
    assert futures.fates(adata, chain, 2, overwrite=True).states == ("1", "2")


def test_fates_survive_a_file(fitted: Fitted, tmp_path) -> None:
    adata, found = with_fates(fitted)
    pv.data.write_whole(adata, tmp_path / "fates.h5ad")
    again = anndata.read_h5ad(tmp_path / "fates.h5ad")
    assert_array_equal(again.obsm["fate_probabilities"], adata.obsm["fate_probabilities"])
    assert pictures._states(again) == list(found.states)


def other_cells(adata: AnnData) -> AnnData:
    return adata[:40].copy()


def without_graph(adata: AnnData) -> AnnData:
    adata = adata.copy()
    del adata.obsp["distances"]
    return adata


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda a, f: futures.transitions(other_cells(a), f), "Expected the AnnData that was fitted"),
        (lambda a, f: futures.transitions(without_graph(a), f), r"obsp\['distances'\] is missing"),
        (lambda a, f: futures.transitions(a, f, draws=1), "Expected 2 draws or more"),
        (lambda a, f: futures.uncertainty(without_graph(a), f), r"obsp\['distances'\] is missing"),
        (lambda a, f: futures.fates(a, f, ["Beta"]), r"obs\['clusters'\] 'Beta' isn't there, expected one of: 'early'"),
        (lambda a, f: futures.fates(a, f, ["early"], clusters="celltype"), "'celltype' isn't there"),
        (lambda a, f: futures.fates(a, two_sides()[1], ["early"]), "Expected transitions of 70 cells; got 80"),
    ],
)
def test_bad_input_is_told(call: Callable, match: str, fitted: Fitted) -> None:
    before = fitted[0].copy()
    with pytest.raises(InputError, match=match):
        call(*fitted)
    assert fitted[0].obs.equals(before.obs) and fitted[0].obsm.keys() == before.obsm.keys()


def test_what_is_there_is_not_overwritten_unasked(fitted: Fitted) -> None:
    adata, _ = with_fates(fitted)
    with pytest.raises(InputError, match=r"none of these keys; got obsm\['fate_probabilities'\], .*overwrite=True"):
        futures.fates(adata, fitted[1], ["early"])
    futures.fates(adata, fitted[1], ["early"], draws=DRAWS, overwrite=True, progress=False)
    assert adata.obsm["fate_probabilities"].shape == (70, 1)
    adata.obs[keys.VELOCITY_UNCERTAINTY_EXTRINSIC] = 0.0
    with pytest.raises(InputError, match="velocity_uncertainty_extrinsic"):
        futures.uncertainty(adata, fitted[1])


# Pictures


def test_cells_wear_their_fate(fitted: Fitted) -> None:
    adata, found = with_fates(fitted)
    adata.obsm["fate_probabilities"][:5] = np.nan
    axes = pictures.fate_probabilities(adata)
    assert [ax.get_title() for ax in axes] == list(found.states)
    for k, ax in enumerate(axes):
        lost, cells, ends = ax.collections[:3]
        assert len(lost.get_offsets()) == 5
        where = {tuple(point): value for point, value in zip(cells.get_offsets(), cells.get_array(), strict=True)}
        for point, value in zip(adata.obsm["X_umap"][5:], found.mean[5:, k], strict=True):
            assert where[tuple(point.astype(float))] == pytest.approx(value, abs=1e-6)
        assert (cells.norm.vmin, cells.norm.vmax) == (0, 1)
        assert len(ends.get_offsets()) == len(found.terminal[found.states[k]])
    width = pictures.fate_probability(adata, "lineage_1", width=True).collections[1].get_array()
    assert_allclose(np.sort(width), np.sort((found.high - found.low)[:, 0]), atol=1e-6)


def test_a_picture_is_on_the_ax_given(fitted: Fitted) -> None:
    adata, found = with_fates(fitted)
    _, (one, two) = plt.subplots(1, 2)
    assert pictures.fate_probability(adata, "lineage_2", "X_umap", ax=one) is one
    assert pictures.fate_shares(fates.shares(found, adata.obs["clusters"]), ax=two) is two
    assert len(plt.get_fignums()) == 1


def test_shares_are_drawn_at_their_means_within_their_intervals(fitted: Fitted) -> None:
    adata, found = with_fates(fitted)
    shares = fates.shares(found, adata.obs["clusters"], cells=True)
    ax = pictures.fate_shares(shares)
    assert [bar.get_text() for bar in ax.get_yticklabels()] == [
        f"{group} (n = {n})" for group, n in zip(shares.groups, shares.n, strict=True)
    ]
    for k, (bars, lines) in enumerate(zip(ax.containers, ax.collections, strict=False)):
        assert_allclose([bar.get_width() for bar in bars], shares.mean[:, k])
        ends = np.array([segment[:, 0] for segment in lines.get_segments()])
        assert_allclose(ends, np.column_stack([shares.low[:, k], shares.high[:, k]]))
        assert bars[0].get_facecolor()[:3] == to_rgba(pictures.CATEGORY_COLORS[k])[:3]


@pytest.mark.parametrize(
    ("spoil", "match"),
    [
        (lambda adata: adata.uns[keys.UNS].pop("fates"), r"Expected 'fates' in adata.uns\['pyro_velo'\], which holds"),
        (lambda adata: adata.obsm.pop("fate_probabilities"), r"Expected 'fate_probabilities' in adata\.obsm"),
        (lambda adata: adata.obsm.pop("X_umap"), r"Expected 'X_umap' in adata\.obsm"),
        (lambda adata: adata.obs.pop("fate_terminal"), r"Expected 'fate_terminal' in adata\.obs"),
    ],
)
def test_a_missing_key_is_told(spoil: Callable, match: str, fitted: Fitted) -> None:
    adata, _ = with_fates(fitted)
    spoil(adata)
    with pytest.raises(InputError, match=match):
        pictures.fate_probability(adata, "lineage_1")
    assert plt.get_fignums() == []


def test_an_unknown_state_is_told(fitted: Fitted) -> None:
    with pytest.raises(InputError, match="one of the terminal states lineage_1, lineage_2; got 'Beta'"):
        pictures.fate_probability(with_fates(fitted)[0], "Beta")
