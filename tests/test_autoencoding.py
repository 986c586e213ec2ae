"""From an AnnData and back: which matrix is fitted, what is written, and the command line."""

from __future__ import annotations

from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from io import StringIO
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
import torch
from anndata import AnnData
from numpy.testing import assert_allclose, assert_array_equal

import pyro_velo as pv
from pyro_velo.autoencoding import COVARIANCES, MODELS
from pyro_velo.cli import main
from pyro_velo.cluster_sizes import SIZES
from pyro_velo.clustering import TRAINING
from pyro_velo.data import anndata_keys as keys
from pyro_velo.data.simulated import clusters_to_anndata
from pyro_velo.errors import InputError
from pyro_velo.likelihoods import NB, PROFILE_LIKELIHOODS, Bernoulli, Normal
from pyro_velo.options import CovarianceName, ProfileLikelihoodName, SizesName, VAEModelName, VAEOptions
from pyro_velo.plots.profiles import latent_plane
from pyro_velo.profiles import UNKNOWN
from pyro_velo.simulate import ClusterSettings, simulate_clusters
from pyro_velo.starts import StartSettings

QUICK = {
    "settings": replace(TRAINING, max_steps=30),
    "start": StartSettings(vae_steps=80, restarts=1),
    "progress": False,
}


def simulated(n_cells: int = 120, **changes) -> AnnData:
    """Two clusters far apart."""
    settings = ClusterSettings(**({"clusters": 2, "separation": 2.0, "markers": 1.0} | changes))
    return clusters_to_anndata(simulate_clusters(n_cells, 12, settings=settings, seed=10))


def command(*arguments: str | Path) -> tuple[int, str, str]:
    """The command line in this process."""
    out, err = StringIO(), StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = main([*map(str, arguments)])
    return code, out.getvalue(), err.getvalue()


def test_the_command_lines_names_are_those_of_the_tables() -> None:
    for names, table in (
        (VAEModelName, MODELS),
        (ProfileLikelihoodName, PROFILE_LIKELIHOODS),
        (SizesName, SIZES),
        (CovarianceName, COVARIANCES),
    ):
        assert list(names.__args__) == list(table)
    for name, make in (("model", MODELS), ("likelihood", PROFILE_LIKELIHOODS), ("sizes", SIZES)):
        assert getattr(VAEOptions(), name) in make
    assert COVARIANCES[VAEOptions.covariance] == pv.GMVAE.correlated == pv.CGMDVAE.correlated
    assert VAEOptions.neighbours == StartSettings.neighbours


def test_the_data_are_the_genes_that_differ_as_they_stand() -> None:
    adata = simulated()
    adata.layers["counts"] = adata.layers["counts"].multiply(np.arange(12) != 3).tocsr()
    data = pv.profile_data(adata, layer="counts")
    assert data.genes.tolist() == [j != 3 for j in range(12)] and data.layer == "counts"
    assert_array_equal(data.profiles.x.numpy(), adata.layers["counts"][:, data.genes].toarray())
    totals = data.profiles.x.sum(1)
    assert_allclose(data.profiles.size_factors.squeeze(1), totals / totals.median(), rtol=1e-6)
    assert (pv.profile_data(adata, depth=False).profiles.size_factors == 1).all()
    assert pv.profile_data(adata, counts=False).profiles.size_factors is None


def test_labels_that_are_missing_are_unknown_and_conditions_are_told() -> None:
    adata = simulated(conditions=2)
    adata.obs["some"] = adata.obs["cluster"].where(np.arange(120) % 3 == 0)
    data = pv.profile_data(adata, label_key="some", condition_key="condition")
    assert data.labels == ("cluster_0", "cluster_1")
    known = data.profiles.labels.numpy()
    assert (known[np.arange(120) % 3 != 0] == UNKNOWN).all()
    assert_array_equal(known[::3], adata.obs["cluster"].cat.codes.to_numpy()[::3])
    assert_array_equal(data.profiles.covariates.argmax(1), adata.obs["condition"].cat.codes)
    told = data.as_if("condition", "condition_1")
    assert_array_equal(told, torch.tensor([[0.0, 1.0]]).expand(120, 2))
    for column, level, message in (("cluster", "a", r"\(condition\)"), ("condition", "a", "condition_0, condition_1")):
        with pytest.raises(InputError, match=message):
            data.as_if(column, level)


@pytest.mark.parametrize(
    ("spoil", "options", "message"),
    [
        (lambda a: a.layers.update(counts=a.X * 0.5), {"layer": "counts"}, "aren't whole"),
        (lambda a: a.layers.update(counts=a.X * 0 + 0), {"layer": "counts"}, "no counts at all for 120 of 120"),
        (lambda a: a.layers.update(counts=np.ones((120, 12))), {"layer": "counts"}, "the same in every cell"),
        (lambda a: None, {"layer": "spliced"}, "Layer 'spliced' isn't there"),
        (lambda a: None, {"label_key": "type"}, "obs key 'type' isn't there"),
        (lambda a: a.obs.insert(0, "none", None), {"label_key": "none"}, "missing in every cell"),
        (lambda a: setattr(a, "X", None), {}, "has no X"),
    ],
)
def test_bad_data_are_refused(spoil, options: dict, message: str) -> None:
    adata = simulated()
    spoil(adata)
    with pytest.raises(InputError, match=message):
        pv.profile_data(adata, **options)


@pytest.fixture(scope="module")
def written() -> tuple[AnnData, pv.ProfileFit]:
    """A fit with clusters and conditions, some labels known, in its AnnData."""
    adata = simulated(conditions=2)
    adata.obs["some"] = adata.obs["cluster"].where(np.arange(120) % 3 == 0)
    data = pv.profile_data(adata, label_key="some", condition_key="condition")
    model = pv.CGMDVAE(3, NB(), n_latent=2, hidden=(16,))
    fit = pv.vae(model, pv.encoders.Encoder((16,)), adata, data=data, **QUICK)
    fit.write(adata, denoised=True)
    return adata, fit


def test_what_is_written_is_what_the_fit_says(written) -> None:
    adata, fit = written
    assert_allclose(adata.obsm["X_vae"], fit.latent(), rtol=1e-5, atol=1e-6)
    probabilities = fit.cluster_probabilities()
    assert_allclose(adata.obsm["vae_cluster_probs"], probabilities, rtol=1e-5, atol=1e-6)
    assert adata.obs["vae_cluster"].cat.categories.tolist() == ["cluster_0", "cluster_1", "2"]
    assert_array_equal(adata.obs["vae_cluster"].astype(str), fit.clusters())
    assert_allclose(adata.layers["vae_denoised"], fit.denoised(), rtol=1e-4)
    assert fit.agreement(adata, "cluster").ari > 0.9
    about = adata.uns[keys.UNS_VAE]
    history = fit.fitted.training.history
    assert about["settings"]["seed"] == 0 and about["held_out_elbo"] == history.held_out[history.best]
    # Labels have a say in which parameters are kept.
    assert history.objective[history.best] == fit.fitted.training.plateau.best < about["held_out_elbo"]


def test_writing_again_needs_leave_and_another_anndata_is_refused(written) -> None:
    adata, fit = written
    with pytest.raises(InputError, match=r"obs\['vae_cluster'\], obsm\['X_vae'\].*pass overwrite"):
        fit.write(adata)
    fit.write(adata, overwrite=True)
    assert keys.VAE_DENOISED not in adata.layers
    with pytest.raises(InputError, match="Expected the AnnData that was fitted"):
        fit.write(adata[::-1].copy(), overwrite=True)
    fit.write(adata, denoised=True, overwrite=True)


def test_a_conversion_is_of_the_cells_that_are_asked_for(written) -> None:
    _, fit = written
    some = np.arange(120) < 7
    found = fit.converted("condition", "condition_1", cells=some, draws=5)
    assert found.mean.shape == (7, 12) and (found.q05 <= found.q95).all()


def test_real_numbers_and_zeros_and_ones_are_fitted_as_such() -> None:
    adata = pv.digits()[:150].copy()
    for likelihood in (Normal(), Bernoulli()):
        if likelihood.binary:
            adata.X = (adata.X > 8).astype(np.float32)
        fit = pv.vae(pv.VAE(likelihood, 2, (8,)), pv.encoders.Encoder((8,)), adata, **QUICK)
        assert fit.data.genes.sum() < 64 and not fit.has_clusters
        fit.write(adata, denoised=True, overwrite=True)
        layer = adata.layers["vae_denoised"]
        assert np.isnan(layer[:, ~fit.data.genes]).all() and np.isfinite(layer[:, fit.data.genes]).all()
        assert "vae_cluster" not in adata.obs
    with pytest.raises(InputError, match="Expected a model with clusters to choose"):
        pv.vae(pv.VAE(Bernoulli()), None, adata, candidates=(1, 2), **QUICK)


def test_the_command_writes_clusters_and_a_report(tmp_path: Path) -> None:
    source, output, page = (tmp_path / name for name in ("in.h5ad", "out.h5ad", "out.html"))
    adata = simulated(60)
    adata.write_h5ad(source)
    arguments = ["vae", source, "-o", output, "--layer", "counts", "--clusters", 2, "--latent", 2, "--max-epochs", 3]
    code, out, err = command(*arguments, "--denoised", "--report", page, "--seed", 1)
    assert (code, err.count("error")) == (0, 0) and f"Wrote {output} and {page}" in out
    made = anndata.read_h5ad(output)
    assert made.obsm["X_vae"].shape == (60, 2) and made.obsm["vae_cluster_probs"].shape == (60, 2)
    assert isinstance(made.obs["vae_cluster"].dtype, pd.CategoricalDtype)
    assert made.layers["vae_denoised"].shape == adata.shape and made.uns[keys.UNS_VAE]["settings"]["seed"] == 1
    text = page.read_text()
    assert text.count("data:image/png") == 3 and "What the ELBO is made of" in text and "<script" not in text
    code, _, err = command(*arguments)
    assert code == 2 and "exists already" in err and len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("options", "model", "neighbours"),
    [
        ([], pv.GMVAE(2, n_latent=2), StartSettings.neighbours),
        (["--covariance", "diagonal", "--neighbours", 0], pv.GMVAE(2, n_latent=2, correlated=False), 0),
        (["--neighbours", 7], pv.GMVAE(2, n_latent=2), 7),
    ],
)
def test_the_command_fits_what_its_options_say_of_clusters(
    tmp_path: Path, options: list, model: pv.GMVAE, neighbours: int
) -> None:
    source, output = tmp_path / "in.h5ad", tmp_path / "out.h5ad"
    adata = simulated(60)
    adata.write_h5ad(source)
    quick = ["--layer", "counts", "--clusters", 2, "--latent", 2, "--max-epochs", 2]
    code, _, err = command("vae", source, "-o", output, *quick, *options)
    assert code == 0, err
    made = anndata.read_h5ad(output)
    data, settings = pv.profile_data(adata, layer="counts"), replace(TRAINING, max_epochs=2)
    start = StartSettings(neighbours=neighbours)
    fit = pv.vae(model, None, adata, data=data, settings=settings, start=start, progress=False)
    assert_array_equal(made.obsm["vae_cluster_probs"], fit.cluster_probabilities().astype(np.float32))
    assert made.uns[keys.UNS_VAE]["start"]["neighbours"] == neighbours


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--model", "vae", "--covariance", "diagonal"], "Expected no covariance for a model without clusters"),
        (["--model", "vae", "--neighbours", 3], "Expected no neighbours for a model without clusters"),
        (["--neighbours", -1], "should be greater than or equal to 0"),
        (["--model", "vae", "--clusters", 2], "Expected no clusters for a model without clusters"),
        (["--model", "vae", "--label-key", "cluster"], "Expected no label-key"),
        (["--likelihood", "bernoulli"], "expects zeros and ones"),
        (["--layer", "nothing"], "Layer 'nothing' isn't there"),
        (["--condition-key", "nothing"], "obs key 'nothing' isn't there"),
        (["--clusters", 100], "Expected 1 to 60 clusters"),
        (["--model", "dvae"], "is not one of"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing_behind(tmp_path: Path, options: list, words: str) -> None:
    source, output = tmp_path / "in.h5ad", tmp_path / "out.h5ad"
    simulated(60).write_h5ad(source)
    code, out, err = command("vae", source, "-o", output, "--max-epochs", 1, *options)
    assert code == 2 and out == "" and words in err, err
    assert [line for line in err.splitlines() if line.startswith("pyro-velo: error")] == err.splitlines()[-1:]
    assert not output.exists()


def test_the_plane_is_that_of_the_largest_spread_and_one_dimension_is_enough(rng: np.random.Generator) -> None:
    z = rng.normal(size=(200, 4)) * [5.0, 0.1, 2.0, 0.1]
    drawn = np.asarray(latent_plane(z).collections[0].get_offsets())
    values = np.linalg.eigvalsh(np.cov(z.T))[::-1]
    assert_allclose(drawn.var(0, ddof=1), values[:2], rtol=1e-6)
    line = np.asarray(latent_plane(z[:, :1]).collections[0].get_offsets())
    assert_allclose(line.var(0), [z[:, 0].var(), 0])
    with pytest.raises(InputError, match="Expected latent means of 2 cells or more"):
        latent_plane(z[:1])
