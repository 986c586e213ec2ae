"""Autoencoders of cells on disk: the fits, clusters and files of cells in memory."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from anndata import AnnData
from numpy.testing import assert_allclose, assert_array_equal
from scipy.sparse import csr_matrix
from small import differing

import pyro_velo as pv
from pyro_velo.cli import main
from pyro_velo.data import on_disk
from pyro_velo.data import stored as stored_module
from pyro_velo.data.output import write_whole
from pyro_velo.encoders import Encoder
from pyro_velo.errors import InputError
from pyro_velo.starts import StartSettings
from pyro_velo.train import TrainSettings

N_CELLS, N_GENES = 90, 8
GUIDE = Encoder((8,))
HOW = {"settings": TrainSettings(max_epochs=1, batch_size=41, evaluate_steps=1), "progress": False}
TOLD = {"condition_key": "batch", "covariates": ["depth"], "label_key": "kind"}


@pytest.fixture(scope="module")
def adata() -> AnnData:
    rng = np.random.default_rng(0)
    counts = rng.poisson(rng.gamma(1, 3, (N_CELLS, N_GENES))) + np.eye(N_CELLS, N_GENES, dtype=int)
    counts[:, 0], counts[:, 2] = 1, counts[:, 2] + 1  # a gene that does not vary; one that every cell shows
    obs = pd.DataFrame(index=[f"cell{i}" for i in range(N_CELLS)])
    obs["batch"], obs["depth"] = np.where(rng.random(N_CELLS) < 0.5, "a", "b"), rng.normal(size=N_CELLS)
    obs["kind"] = pd.Categorical(rng.choice(["x", "y", None], N_CELLS))
    return AnnData(csr_matrix(counts), obs=obs, layers={"again": counts.astype(np.float32)})


@pytest.fixture(scope="module")
def path(adata, tmp_path_factory):
    return write_whole(adata, tmp_path_factory.mktemp("profiles") / "counts.h5ad")


@pytest.fixture(autouse=True)
def several_blocks(monkeypatch):
    monkeypatch.setattr(stored_module, "BLOCK_BYTES", 4 * N_GENES * 32)


@pytest.mark.parametrize("options", [{}, {"depth": False}, {"layer": "again", **TOLD}, {"counts": False}])
def test_the_profiles_are_those_in_memory(adata, path, options):
    found, expected = pv.profile_data_on_disk(path, **options), pv.profile_data(adata, **options)
    index = torch.randperm(N_CELLS)
    assert differing(found.profiles.batch(index), expected.profiles.batch(index)) == []
    assert differing(found.profiles.sample, expected.profiles) == []
    assert differing(found.profiles.among(index), expected.profiles.among(index)) == []
    assert found.describe() == expected.describe() and found.gene_names == expected.gene_names
    assert len(found.gene_names) == N_GENES - 1


def test_the_median_depth_is_that_of_the_sample(adata, path, monkeypatch):
    monkeypatch.setattr(on_disk, "SAMPLE", 40)
    found = pv.profile_data_on_disk(path)
    some = pv.profile_data(adata[on_disk.sampled(N_CELLS, 0)].copy())
    assert torch.equal(found.profiles.sample.size_factors, some.profiles.size_factors)
    totals = np.asarray(adata.X[:, 1:].sum(1)).ravel()
    per_count = found.profiles.size_factors.squeeze().numpy() / totals
    assert_allclose(per_count, per_count[0], rtol=1e-6)


@pytest.mark.parametrize(
    ("model", "suffix"),
    [(pv.VAE(n_latent=2, hidden=(8,)), ".zarr"), (pv.GMVAE(2, n_latent=2, hidden=(8,)), ".h5ad")],
    ids=["vae", "gmvae"],
)
def test_a_fit_is_the_one_in_memory_and_so_is_its_file(adata, path, model, suffix, tmp_path):
    start = StartSettings(vae_steps=2, restarts=1, inits=1) if isinstance(model, pv.GMVAE) else None
    fit, resident = (pv.vae(model, GUIDE, given, start=start, **HOW) for given in (path, adata))
    assert differing(fit.fitted.training, resident.fitted.training) == []
    assert_array_equal(fit.latent(), resident.latent())
    expected = adata.copy()
    resident.write(expected, denoised=True)
    out = tmp_path / f"out{suffix}"
    fit.write(out, denoised=True)
    written = pv.read(out)
    for where in ("obsm", "layers"):
        one, other = getattr(written, where), getattr(expected, where)
        assert set(one) == set(other)
        for name in one:
            assert_array_equal(one[name], other[name])
    assert_array_equal(written.X.toarray(), adata.X.toarray())
    assert list(written.obs) == list(expected.obs)
    if isinstance(model, pv.GMVAE):
        assert_array_equal(written.obs.vae_cluster.astype(str), expected.obs.vae_cluster.astype(str))
    with pytest.raises(InputError, match="holds an autoencoder's results already"):
        replace(fit, data=pv.profile_data_on_disk(out)).write(tmp_path / "more.h5ad")
    assert not (tmp_path / "more.h5ad").exists()


def test_a_kept_fit_is_loaded_from_the_disk_or_from_memory(adata, path, tmp_path):
    model = pv.VAE(n_latent=2, hidden=(8,))
    fit = pv.vae(model, GUIDE, path, save=tmp_path / "kept", **HOW)
    for given in (path, adata):
        assert_array_equal(pv.load_vae(tmp_path / "kept", given).latent(), fit.latent())
    other = adata.copy()
    other.X = other.X + csr_matrix(np.eye(N_CELLS, N_GENES, k=1, dtype=int))
    with pytest.raises(InputError, match="Expected the numbers that were fitted"):
        pv.load_vae(tmp_path / "kept", write_whole(other, tmp_path / "other.h5ad"))


def test_smaller_windows_are_other_epochs_of_the_same_cells(path):
    data = pv.profile_data_on_disk(path)
    cells = replace(data.profiles, window=20)
    order = cells.shuffled(torch.arange(N_CELLS))
    assert torch.equal(order.sort().values, torch.arange(N_CELLS))
    read = torch.cat([batch.x for batch in cells.read(order.split(7))])
    assert torch.equal(read, data.profiles.batch(order).x)


def test_what_takes_all_cells_is_refused(path):
    model, start = pv.GMVAE(2, n_latent=2, hidden=(8,)), StartSettings(neighbours=5)
    with pytest.raises(InputError, match="Expected neighbours=0 for cells that stay on the disk"):
        pv.vae(model, GUIDE, path, start=start, **HOW)
    with pytest.raises(InputError, match="Expected the 90 cells in memory"):
        pv.profile_data_on_disk(path).resident.x.mean()


def test_the_command_line_leaves_cells_on_the_disk(path, tmp_path, capsys):
    command = ["vae", str(path), "--model", "vae", "--latent", "2", "--max-epochs", "1"]
    assert main([*command, "-o", str(tmp_path / "disk.h5ad"), "--on-disk"]) == 0
    assert main([*command, "-o", str(tmp_path / "memory.h5ad")]) == 0
    one, other = (pv.read(tmp_path / f"{name}.h5ad").obsm["X_vae"] for name in ("disk", "memory"))
    assert_array_equal(one, other)
    assert main([*command, "-o", str(tmp_path / "no.h5ad"), "--on-disk", "--report", str(tmp_path / "no.html")]) == 2
    assert "Expected no report" in capsys.readouterr().err
    assert sorted(each.name for each in tmp_path.iterdir()) == ["disk.h5ad", "memory.h5ad"]
