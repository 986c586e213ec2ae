"""What each command does, from file to file: here, called from Python."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import anndata
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from sklearn.neighbors import kneighbors_graph

from pyro_velo import api, simulate
from pyro_velo.data import anndata_keys as keys
from pyro_velo.data.simulated import to_anndata
from pyro_velo.errors import InputError
from pyro_velo.options import FitOptions

QUICK = FitOptions(max_epochs=2, draws=4, device="cpu")


def counts(n_cells: int = 90, n_genes: int = 25) -> anndata.AnnData:
    """Simulated counts of two lineages, with an embedding and clusters of their own."""
    parts = simulate.Settings(noise=simulate.NOISES["poisson"](), lineages=simulate.Lineages(count=2))
    adata = to_anndata(simulate.simulate(n_cells, n_genes, settings=parts, seed=0))
    adata.obs["clusters"] = np.where(adata.obs[keys.TRUE_TIME] < 8, "early", "late")
    adata.obsm["X_umap"] = np.column_stack([adata.obs[keys.TRUE_TIME], np.arange(n_cells) % 7]).astype(np.float32)
    return adata


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("api") / "counts.h5ad"
    counts().write_h5ad(path)
    return path


@pytest.fixture(scope="module")
def output(source: Path) -> Path:
    """The whole way: prepared, fitted, projected and written."""
    path = source.parent / "out.h5ad"
    fit = api.fit_file(source, path, QUICK)
    assert fit.epochs == 2 and not fit.interrupted
    return path


def test_the_whole_way_writes_the_fit_beside_what_was_there(source: Path, output: Path) -> None:
    before, after = anndata.read_h5ad(source), anndata.read_h5ad(output)
    assert set(keys.LAYERS_OUT) | {keys.MS, keys.MU} <= set(after.layers)
    assert {*keys.OBSM_OUT, "X_umap", "X_pca", "velocity_umap"} <= set(after.obsm)
    assert_array_equal(after.obsm["X_umap"], before.obsm["X_umap"])
    assert np.isfinite(after.obsm["velocity_umap"]).all()
    assert set(after.uns[keys.UNS]) >= {"prepare", "layers", "settings", "elbo_history", "version"}


def test_the_scores_are_those_of_the_definitions(output: Path) -> None:
    edges = [("early", "late"), ("late", "early")]
    scores = api.score_file(output, "clusters", edges)
    assert scores.keys() == {"cbdir_umap", "cbdir_ms", "iccoh", "confidence", "edges"}
    for name in ("cbdir_umap", "cbdir_ms"):
        assert_allclose(scores[name], np.mean([edge[name] for edge in scores["edges"]]), atol=1e-4)
    assert [(edge["from"], edge["to"]) for edge in scores["edges"]] == edges
    assert all(-1 <= scores[name] <= 1 for name in ("cbdir_umap", "cbdir_ms", "iccoh", "confidence"))


def test_an_edge_without_a_boundary_is_null(output: Path) -> None:
    adata = anndata.read_h5ad(output)
    adata.obs["clusters"] = ["first", *["others"] * (adata.n_obs - 1)]
    graph = adata.obsp["distances"].tolil()
    graph[0] = 0
    adata.obsp["distances"] = graph.tocsr()
    scores = api.score(adata, "clusters", [("first", "others"), ("others", "first")])
    assert scores["edges"][0]["cbdir_ms"] is None
    assert scores["cbdir_ms"] == scores["edges"][1]["cbdir_ms"]


@pytest.mark.parametrize(
    ("spoil", "match"),
    [
        (lambda adata: adata.layers.pop("velocity"), "'velocity' is missing.*pyro-velo fit"),
        (lambda adata: adata.obsp.pop("distances"), r"obsp\['distances'\] is missing.*neighbors"),
        (lambda adata: adata.obsm.pop("X_umap"), "'X_umap' isn't there"),
        (lambda adata: adata.obs.pop("clusters"), "'clusters' isn't there"),
    ],
)
def test_scores_say_what_they_miss(output: Path, spoil, match: str) -> None:
    adata = anndata.read_h5ad(output)
    spoil(adata)
    with pytest.raises(InputError, match=match):
        api.score(adata, "clusters", [("early", "late")])


def test_layers_of_other_names_are_prepared_and_may_be_exchanged() -> None:
    named, exchanged = counts(), counts()
    named.layers["S"], named.layers["U"] = named.layers.pop("spliced"), named.layers.pop("unspliced")
    exchanged.layers["spliced"], exchanged.layers["unspliced"] = (
        exchanged.layers["unspliced"],
        exchanged.layers["spliced"],
    )
    plain = counts()
    api.fit_adata(plain, QUICK)
    api.fit_adata(named, replace(QUICK, spliced_layer="S", unspliced_layer="U"))
    api.fit_adata(exchanged, replace(QUICK, spliced_layer="unspliced", unspliced_layer="spliced"))
    assert_array_equal(named.layers["velocity"], plain.layers["velocity"])
    assert_array_equal(exchanged.layers["velocity"], plain.layers["velocity"])
    with pytest.raises(InputError, match="Layer 'nothing' isn't there, expected one of: 'spliced'"):
        api.fit_adata(counts(), replace(QUICK, spliced_layer="nothing"))


def test_nuclei_pass_when_they_are_called_so() -> None:
    def nuclei() -> anndata.AnnData:
        adata = counts()
        adata.layers["unspliced"] = adata.layers["unspliced"] * 40
        return adata

    with pytest.raises(InputError, match=r"if these are single nuclei, pass --nuclei \(in Python: .*max_unspliced"):
        api.fit_adata(nuclei(), QUICK)
    adata = nuclei()
    api.fit_adata(adata, replace(QUICK, nuclei=True))
    assert adata.uns[keys.UNS]["prepare"]["max_unspliced_ratio"] == np.inf
    api.fit_adata(nuclei(), replace(QUICK, as_is=True))


def test_as_it_is_the_layers_named_are_those_that_are_shown_and_scored(source: Path) -> None:
    """Also where Ms and Mu of something else stand beside them."""
    adata = counts()
    adata.layers["S"], adata.layers["U"] = adata.layers.pop("spliced"), adata.layers.pop("unspliced")
    adata.layers["Ms"] = np.zeros(adata.shape, np.float32)
    adata.obsp["distances"] = kneighbors_graph(adata.obsm["X_umap"], 8, mode="distance")
    adata.write_h5ad(path := source.parent / "named.h5ad")
    page, options = source.parent / "named.html", replace(QUICK, as_is=True, spliced_layer="S", unspliced_layer="U")
    api.fit_file(path, source.parent / "named-out.h5ad", replace(options, report=page))
    assert "<img" in page.read_text()
    scores = api.score_file(source.parent / "named-out.h5ad", "clusters", [("early", "late")])
    assert scores["cbdir_ms"] is not None


def test_a_report_needs_no_clusters(source: Path, output: Path) -> None:
    adata = anndata.read_h5ad(output)
    del adata.obs["clusters"]
    adata.write_h5ad(bare := source.parent / "bare.h5ad")
    api.report_file(bare, page := source.parent / "bare.html", basis="umap", color="clusters", overwrite=False)
    assert "<img" in page.read_text()
    with pytest.raises(InputError, match="'celltype'"):
        api.report_file(bare, page, basis="umap", color="celltype", overwrite=True)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"draws": 1}, "2 draws or more"),
        ({"report": Path("report.txt")}, r"expected \.html"),
        ({"device": "cuda"}, "torch sees none"),
    ],
)
def test_bad_options_are_told_before_the_work(source: Path, tmp_path: Path, options, match: str, monkeypatch) -> None:
    monkeypatch.setattr(api.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(api, "read", None)
    with pytest.raises(InputError, match=match):
        api.fit_file(source, tmp_path / "out.h5ad", replace(QUICK, **options))
    assert list(tmp_path.iterdir()) == []


def test_a_fit_that_is_there_needs_overwrite(output: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds a fit already"):
        api.fit_file(output, tmp_path / "again.h5ad", QUICK)
    api.fit_file(output, tmp_path / "again.h5ad", replace(QUICK, overwrite=True))


def test_the_simulated_file_holds_the_truth(tmp_path: Path) -> None:
    options = {"cells": 30, "genes": 8, "seed": 3, "likelihood": "nb", "stationary": True, "overwrite": False}
    api.simulate_file(tmp_path / "null.h5ad", **options)
    adata = anndata.read_h5ad(tmp_path / "null.h5ad")
    assert (adata.layers[keys.TRUE_VELOCITY] == 0).all() and adata.n_obs == 30
    assert np.issubdtype(adata.layers["spliced"].dtype, np.integer)


def test_counts_keep_what_the_cells_around_hold_unless_it_is_said() -> None:
    assert api.depth_for("normal", "studentt") == "total"
    assert api.depth_for("normal", "nb") == "neighbours"
