"""A fit of cells on disk, written block by block: the file that a fit in memory leaves, whole or not at all."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from numpy.testing import assert_allclose, assert_array_equal
from scipy import sparse
from scipy.stats import rankdata
from sklearn.neighbors import kneighbors_graph
from small import GUIDE, MODEL, settings, small_adata

import pyro_velo as pv
from pyro_velo import embedding, posterior, simulate, writing
from pyro_velo.cli import main
from pyro_velo.data import anndata_keys as keys
from pyro_velo.data.output import write_whole
from pyro_velo.data.simulated import to_anndata
from pyro_velo.errors import InputError

N_CELLS, N_GENES, DRAWS = 90, 6, 4
OPTIONS = {"settings": settings(max_epochs=1, batch_size=41), "progress": False}


def prepared(neighbours: bool) -> AnnData:
    """Made-up smoothed layers and counts of one gene less that varies, with all that a file may hold besides."""
    adata, rng = small_adata(N_CELLS, N_GENES), np.random.default_rng(2)
    adata.layers["Ms"], adata.layers["Mu"] = adata.layers["spliced"].copy(), adata.layers["unspliced"].copy()
    adata.layers["Mu"][:, 1] = 1.0
    for name in ("spliced", "unspliced"):
        adata.layers[name] = sparse.csr_matrix(rng.poisson(3 * adata.layers[name]) + 1)
    adata.X = sparse.csc_matrix(adata.layers["spliced"])
    adata.obs["clusters"] = pd.Categorical(np.where(rng.random(N_CELLS) < 0.5, "a", "b"))
    adata.obs["text"] = [f"of {i}" for i in range(N_CELLS)]
    adata.obsm["X_umap"] = rng.normal(size=(N_CELLS, 2))
    adata.varm["loadings"] = rng.normal(size=(adata.n_vars, 3))
    adata.uns["colors"] = np.array(["#fff", "#000"])
    adata.raw = adata
    if neighbours:
        adata.obsp["distances"] = kneighbors_graph(adata.obsm["X_umap"], 5, mode="distance")
    return adata


@pytest.fixture(scope="module")
def adata() -> AnnData:
    return prepared(True)


@pytest.fixture(scope="module")
def path(adata, tmp_path_factory):
    return write_whole(adata, tmp_path_factory.mktemp("writing") / "prepared.h5ad")


@pytest.fixture(scope="module")
def fit(path):
    return pv.fit(MODEL, GUIDE, path, **OPTIONS)


@pytest.fixture(scope="module")
def resident(fit, adata):
    """The same parameters, and the cells in memory."""
    return replace(fit, data=pv.velocity_data(adata))


@pytest.fixture(autouse=True)
def several_blocks(monkeypatch):
    """Both ways the same blocks, whose draws are those of their own."""
    monkeypatch.setattr(posterior, "CELLS_GENES_AT_ONCE", 40 * N_GENES)
    monkeypatch.setattr("pyro_velo.writing.CELLS_GENES_AT_ONCE", 40 * N_GENES)
    monkeypatch.setattr("pyro_velo.writing.NEIGHBOURS_BYTES", 8 * N_GENES * 6 * 20)


def assert_same_elements(one, other, leave_out=()):
    for where in ("layers", "obsm", "varm", "obsp"):
        a, b = getattr(one, where), getattr(other, where)
        assert set(a) == set(b)
        for name in set(a) - set(leave_out):
            x, y = (m.toarray() if sparse.issparse(m) else np.asarray(m) for m in (a[name], b[name]))
            assert_allclose(x, y, rtol=1e-5, atol=1e-6, err_msg=name)
            assert type(a[name]) is type(b[name]), name
    for where in ("obs", "var"):
        a, b = getattr(one, where), getattr(other, where)
        pd.testing.assert_frame_equal(
            a.drop(columns=list(leave_out), errors="ignore"),
            b.drop(columns=list(leave_out), errors="ignore"),
            check_like=True,
            check_dtype=False,
            check_categorical=False,
            rtol=1e-4,
            atol=1e-5,
        )


@pytest.mark.parametrize("suffix", [".h5ad", pytest.param(".zarr", marks=pytest.mark.slow)])
def test_the_file_is_the_one_that_a_fit_in_memory_leaves(fit, resident, adata, tmp_path, suffix, monkeypatch):
    # In memory the neighbours of neighbours count too; here both take the direct ones.
    cosines = embedding.cosine_correlations
    monkeypatch.setattr(embedding, "cosine_correlations", lambda v, x, graph, steps=2: cosines(v, x, graph, steps=1))
    fit.write(tmp_path / f"out{suffix}", draws=DRAWS)
    written, expected = pv.read(tmp_path / f"out{suffix}"), adata.copy()
    resident.write(expected, draws=DRAWS)
    expected = pv.read(write_whole(expected, tmp_path / "expected.h5ad"))
    assert_same_elements(written, expected)
    assert_array_equal(written.layers[keys.FIT_STATE], expected.layers[keys.FIT_STATE])
    assert_array_equal(written.X.toarray(), adata.X.toarray())
    assert_array_equal(written.raw.X.toarray(), adata.raw.X.toarray())
    assert written.uns[keys.UNS]["elbo_history"].keys() == expected.uns[keys.UNS]["elbo_history"].keys()
    assert written.uns[keys.UNS]["layers"] == {"spliced": "Ms", "unspliced": "Mu"}
    assert_array_equal(written.uns["colors"], adata.uns["colors"])
    assert list(tmp_path.glob(".*")) == []


def test_without_neighbours_times_are_ranked(fit, tmp_path, monkeypatch):
    alone = prepared(False)
    fit = replace(fit, data=pv.velocity_data_on_disk(write_whole(alone, tmp_path / "alone.h5ad")))
    fit.write(tmp_path / "out.h5ad", draws=DRAWS)
    written = pv.read(tmp_path / "out.h5ad")
    genes, found = written.var.velocity_genes.to_numpy(), written.obs.latent_time
    times, sd = (written.layers[name][:, genes] for name in ("fit_t", "fit_t_sd"))
    weight = (written.var.fit_likelihood[genes] ** 2).to_numpy() / (1 + (sd / times.std(axis=0)) ** 2)
    mean = (rankdata(times, axis=0) * weight).sum(1) / weight.sum(1)
    assert_allclose(found, (mean - mean.min()) / np.ptp(mean), rtol=1e-4)
    monkeypatch.setattr("pyro_velo.writing.RANKED_AGAINST", 45)
    kept, rank = list[np.ndarray](), writing._mean_rank
    monkeypatch.setattr(writing, "_mean_rank", lambda found, *rest: kept.append(found.times) or rank(found, *rest))
    fit.write(tmp_path / "some.h5ad", draws=DRAWS)
    assert [times.shape for times in kept] == [(45, genes.sum())]
    assert kept[0].base is None, "a view would keep a whole batch in memory"
    among_half = pv.read(tmp_path / "some.h5ad").obs.latent_time
    assert np.corrcoef(among_half, found)[0, 1] > 0.98 and not np.allclose(among_half, found)


@pytest.mark.parametrize("as_is", [pytest.param(True, marks=pytest.mark.slow), False])
def test_counts_are_explained_as_in_memory(adata, path, as_is, tmp_path):
    model = pv.VelocityModel(likelihood=pv.likelihoods.Poisson(), times=pv.times.Shared(), n_latent=2, hidden=(8,))
    told = {"as_is": as_is, "counts": True}
    fit = pv.fit(model, GUIDE, path, data=pv.velocity_data_on_disk(path, **told), **OPTIONS)
    expected = adata.copy()
    fit.write(tmp_path / "out.h5ad", draws=DRAWS)
    replace(fit, data=pv.velocity_data(adata, **told)).write(expected, draws=DRAWS)
    written = pv.read(tmp_path / "out.h5ad")
    assert_same_elements(written, expected, leave_out=("velocity_umap", "text"))
    assert not np.isnan(written.obsm["velocity_umap"]).any()


def test_cosines_in_blocks_are_those_of_all_cells(rng):
    v, x = rng.normal(size=(2, 50, 7))
    graph = sparse.random(50, 50, 0.1, random_state=0)
    for size in (1, 13, 50):
        found = embedding.cosine_correlations_in_blocks(lambda a, b: v[a:b], lambda i: x[i], graph, size=size)
        assert_allclose(found.toarray(), embedding.cosine_correlations(v, x, graph, steps=1).toarray(), atol=1e-12)


def test_nothing_is_left_of_a_file_that_was_not_finished(fit, tmp_path, monkeypatch):
    monkeypatch.setattr(embedding, "potential", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        fit.write(tmp_path / "out.h5ad", draws=2)
    assert list(tmp_path.iterdir()) == []


def test_a_fit_is_not_overwritten_unless_asked_for(fit, path, tmp_path):
    out = tmp_path / "out.h5ad"
    fit.write(out, draws=2)
    with pytest.raises(InputError, match="exists already"):
        fit.write(out, draws=2)
    with pytest.raises(InputError, match="is the input itself"):
        fit.write(path, draws=2, overwrite=True)
    again = replace(fit, data=pv.velocity_data_on_disk(out))
    with pytest.raises(InputError, match="holds a fit already"):
        again.write(tmp_path / "other.h5ad", draws=2)
    again.write(tmp_path / "other.h5ad", draws=2, overwrite=True)
    assert_same_elements(pv.read(out), pv.read(tmp_path / "other.h5ad"))


def test_a_file_that_changed_since_is_refused(fit, adata, tmp_path):
    path = write_whole(adata, tmp_path / "prepared.h5ad")
    fit = replace(fit, data=pv.velocity_data_on_disk(path))
    path.touch()
    with pytest.raises(InputError, match="has changed since it was fitted"):
        fit.write(tmp_path / "out.h5ad", draws=2)


def test_a_fit_goes_where_its_cells_are(fit, resident, adata, tmp_path):
    with pytest.raises(InputError, match="Expected a fit of cells on disk"):
        resident.write(tmp_path / "out.h5ad")
    with pytest.raises(InputError, match="Expected the 90 cells in memory"):
        fit.write(adata.copy(), draws=2)


@pytest.mark.slow
def test_the_command_line_leaves_cells_on_the_disk(tmp_path, monkeypatch):
    settings = simulate.Settings(noise=simulate.Poisson(), kinetics=simulate.LogNormalRates(drop=0))
    counts = to_anndata(simulate.simulate(80, 20, settings=settings, seed=3))
    counts.obsm["X_umap"] = np.random.default_rng(0).normal(size=(80, 2))
    write_whole(counts, tmp_path / "counts.h5ad")
    short = ["--draws", "2", "--max-epochs", "1"]

    def fit(source, out, *options):
        return main(["fit", str(tmp_path / source), "-o", str(tmp_path / out), *short, *options])

    assert fit("counts.h5ad", "memory.h5ad", "--in-memory") == 0
    assert fit("counts.h5ad", "disk.h5ad", "--on-disk") == 0
    one, other = (pv.read(tmp_path / f"{name}.h5ad") for name in ("memory", "disk"))
    assert_allclose(one.layers["Ms"], other.layers["Ms"], rtol=1e-4)
    assert_allclose(one.var.fit_beta, other.var.fit_beta, rtol=1e-3)
    assert set(one.layers) == set(other.layers) and set(one.obs) == set(other.obs) and set(one.uns) <= set(other.uns)
    # What is prepared is not prepared again; and a file that is large for the memory there is stays where it is.
    monkeypatch.setattr("pyro_velo.data.stored.free_memory", lambda: 1000)
    monkeypatch.setattr("pyro_velo.api.prepare_file", None)
    assert fit("disk.h5ad", "again.zarr", "--overwrite") == 0
    assert_array_equal(pv.read(tmp_path / "again.zarr").var.fit_beta, other.var.fit_beta)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again.zarr", "counts.h5ad", "disk.h5ad", "memory.h5ad"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--report", "page.html"], "Expected no report of cells that stay on the disk"),
        (["--as-is", "--spliced-layer", "no"], "Layer 'no' isn't there"),
        (["--batch-key", "no"], "'no' isn't there"),
    ],
)
def test_what_the_command_line_refuses_leaves_nothing(path, tmp_path, monkeypatch, capsys, options, words):
    monkeypatch.chdir(tmp_path)
    assert main(["fit", str(path), "-o", "out.h5ad", "--on-disk", *options]) == 2
    assert words in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
