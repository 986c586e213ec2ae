"""Preparing a file in bounded memory: the numbers that `prepare` finds in memory, to rounding."""

from __future__ import annotations

import re

import numpy as np
import pytest
import scanpy as sc
from anndata import AnnData
from numpy.testing import assert_allclose, assert_array_equal
from scipy import sparse

import pyro_velo as pv
from pyro_velo import preparing, preprocess, simulate
from pyro_velo.data import stored as stored_module
from pyro_velo.data.output import write_whole
from pyro_velo.data.simulated import to_anndata, write_blocks
from pyro_velo.disk import Columns
from pyro_velo.errors import InputError
from pyro_velo.preparing import normalised_dispersions, prepare_file
from pyro_velo.preprocess import PrepareSettings, prepare

SETTINGS = PrepareSettings(min_shared_counts=20, n_top_genes=25, n_pcs=5, n_neighbors=8, umap=False)


@pytest.fixture(scope="module")
def adata() -> AnnData:
    settings = simulate.Settings(noise=simulate.Poisson(), kinetics=simulate.LogNormalRates(drop=0))
    found = to_anndata(simulate.simulate(150, 40, settings=settings, seed=3))
    found.layers["spliced"] = found.layers["spliced"].toarray()  # one dense, one csr
    found.obsm["X_umap"] = np.random.default_rng(0).normal(size=(150, 2))
    found.varp["of_genes"] = np.arange(found.n_vars**2, dtype=float).reshape(found.n_vars, -1)
    return found


@pytest.fixture(scope="module")
def path(adata, tmp_path_factory):
    return write_whole(adata, tmp_path_factory.mktemp("preparing") / "counts.h5ad")


@pytest.fixture(autouse=True)
def several_blocks(monkeypatch):
    monkeypatch.setattr(stored_module, "BLOCK_BYTES", 4 * 40 * 64)
    monkeypatch.setattr(preparing, "WIDEST", 7)


@pytest.mark.parametrize(
    ("suffix", "depth"),
    [(".h5ad", "neighbours"), pytest.param(".zarr", "total", marks=pytest.mark.slow)],
)
def test_the_file_holds_what_prepare_finds_in_memory(adata, path, suffix, depth, tmp_path):
    settings = PrepareSettings(**{**vars(SETTINGS), "depth": depth})
    prepare_file(path, tmp_path / f"out{suffix}", settings)
    found, expected = pv.read(tmp_path / f"out{suffix}"), adata.copy()
    prepare(expected, settings)
    assert list(found.var_names) == list(expected.var_names) and found.n_vars == 25
    assert set(found.layers) == set(expected.layers)
    for name in found.layers:
        one, other = (x.toarray() if sparse.issparse(x) else x for x in (found.layers[name], expected.layers[name]))
        assert_allclose(one, other, rtol=2e-5, atol=1e-6, err_msg=name)
    assert_allclose(found.obsm["X_pca"], expected.obsm["X_pca"], atol=1e-4)
    assert_allclose(np.abs(found.varm["PCs"]), np.abs(expected.varm["PCs"]), atol=1e-5)
    assert_allclose(found.uns["pca"]["variance"], expected.uns["pca"]["variance"], rtol=1e-4)
    assert_allclose(found.obsp["distances"].toarray(), expected.obsp["distances"].toarray(), atol=1e-3)
    assert_array_equal(found.var["velocity_genes"], expected.var["velocity_genes"])
    for name in ("size_spliced", "size_unspliced"):
        assert_allclose(found.obs[name], expected.obs[name], rtol=1e-5)
    assert_array_equal(found.obsm["X_umap"], adata.obsm["X_umap"])
    assert_array_equal(found.varp["of_genes"], expected.varp["of_genes"])
    assert_array_equal(found.X.toarray(), expected.X.toarray())
    assert found.uns["pyro_velo"]["prepare"] == expected.uns["pyro_velo"]["prepare"]
    assert list(tmp_path.glob(".*")) == []


def test_dispersions_are_scanpys(rng):
    counts = rng.poisson(rng.gamma(0.5, 4, (60, 200))).astype(np.float32)
    counts[:, 0], counts[:, 1] = 0, 2  # never seen; of no variance
    log = AnnData(sparse.csr_matrix(np.log1p(counts)))
    expected = sc.pp.highly_variable_genes(log, flavor="seurat", inplace=False)["dispersions_norm"]
    found = normalised_dispersions(counts.mean(0).astype(float), counts.var(0, ddof=1).astype(float))
    assert_allclose(found[2:], expected[2:], rtol=1e-3, atol=1e-4)
    assert np.isnan(found[:2]).all() and np.isnan(expected[:2]).all()


def test_columns_are_what_was_appended(tmp_path, rng):
    values = rng.normal(size=(50, 11)).astype(np.float32)
    columns = Columns(50, 11, 4, tmp_path)
    for start in (0, 20, 35):
        columns.append(values[start : {0: 20, 20: 35, 35: 50}[start]])
    assert [block.stop - block.start for block in columns.blocks] == [4, 4, 3]
    for block in columns.blocks:
        assert_array_equal(columns.read(block), values[:, block])


def test_layers_of_other_names_are_put_in_their_place(adata, path, tmp_path):
    swapped = adata.copy()
    swapped.layers["a"], swapped.layers["b"] = swapped.layers.pop("spliced"), swapped.layers.pop("unspliced")
    prepare_file(write_whole(swapped, tmp_path / "c.h5ad"), tmp_path / "named.h5ad", SETTINGS, layers=("a", "b"))
    prepare_file(path, tmp_path / "plain.h5ad", SETTINGS)
    one, other = pv.read(tmp_path / "named.h5ad"), pv.read(tmp_path / "plain.h5ad")
    assert_array_equal(one.layers["Ms"], other.layers["Ms"])
    assert_array_equal(one.layers["spliced"], other.layers["spliced"])


@pytest.mark.parametrize(
    "change",
    [
        lambda s, u: {"spliced": s, "unspliced": 100 * u},
        lambda s, u: {"spliced": s + 0.5 * (np.arange(150)[:, None] == 3), "unspliced": u},
        lambda s, u: {"spliced": np.where(np.arange(150)[:, None] == 140, 0, s), "unspliced": np.eye(150, 40)},
        lambda s, u: {"spliced": 0 * s, "unspliced": 0 * u},
        lambda s, u: {"spliced": s, "unspliced": 0 * u},
        lambda s, u: {"spliced": s * (np.arange(40) < 20), "unspliced": (u + 1) * (np.arange(40) >= 20)},
        lambda s, u: {"spliced": np.ones_like(s), "unspliced": np.ones_like(u)},
        lambda s, u: {"spliced": s},
    ],
    ids=["swapped", "halves", "empty cell", "no counts", "no unspliced", "not both", "all the same", "missing"],
)
def test_what_prepare_refuses_is_refused_in_the_same_words(adata, change, tmp_path):
    layers = change(adata.layers["spliced"], adata.layers["unspliced"].toarray())
    bad = AnnData(obs=adata.obs, var=adata.var, layers=layers)
    with pytest.raises(InputError) as expected:
        prepare(bad.copy(), SETTINGS)
    with pytest.raises(InputError, match=re.escape(str(expected.value))):
        prepare_file(write_whole(bad, tmp_path / "bad.h5ad"), tmp_path / "out.h5ad", SETTINGS)
    assert not (tmp_path / "out.h5ad").exists()


def test_blocks_of_a_simulation_share_genes_and_truth(tmp_path):
    settings = simulate.Settings(noise=simulate.Poisson(), lineages=simulate.Lineages(count=2))
    whole = simulate.simulate(70, 50, settings=settings, seed=1)
    parts = list(simulate.simulate_in_blocks(70, 50, size=30, settings=settings, seed=1))
    assert [len(part.spliced) for part in parts] == [30, 30, 10]
    for name in ("true_u", "true_s", "true_velocity", "true_t", "lineage", "library", "batch"):
        assert_array_equal(np.concatenate([getattr(part, name) for part in parts]), getattr(whole, name))
    for part in parts:
        assert_array_equal(part.true_alpha, whole.true_alpha)
    write_blocks(parts, tmp_path / "out.zarr")
    found, expected = pv.read(tmp_path / "out.zarr"), to_anndata(whole)
    assert_array_equal(found.layers["spliced"].toarray(), np.concatenate([part.spliced for part in parts]))
    assert list(found.obs_names) == list(expected.obs_names) and list(found.obs) == list(expected.obs)
    assert list(found.var_names) == list(expected.var_names)
    with pytest.raises(InputError, match="Expected counts"):
        write_blocks(simulate.simulate_in_blocks(5, 5, size=5), tmp_path / "abundances.h5ad")


@pytest.mark.slow
def test_approximate_neighbours_are_nearly_the_exact_ones(adata, monkeypatch):
    """scanpy takes them from 8,192 cells on."""
    exact, found = adata.copy(), adata.copy()
    prepare(exact, SETTINGS)
    monkeypatch.setattr(preprocess, "APPROXIMATE_FROM", 100)
    prepare(found, SETTINGS)
    one, other = (each.obsp["distances"].toarray() > 0 for each in (exact, found))
    assert (one & other).sum() > 0.95 * one.sum()
