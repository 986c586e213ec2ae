"""Raw counts: what the model is given of them, and that depth and units are undone."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from scipy import sparse

import pyro_velo as pv
from pyro_velo import preprocess, simulate
from pyro_velo.data import anndata_keys as keys
from pyro_velo.data.bridge import AMBIENT
from pyro_velo.errors import InputError
from pyro_velo.kinetics import Rates, trajectory

N, G = 120, 20
NB = pv.VelocityModel(likelihood=pv.likelihoods.NB(), n_latent=2, hidden=(8,))
GUIDE = pv.guides.Amortized(hidden=(8,), hidden_states=(8,))


def counted(**changes):
    settings = simulate.Settings(noise=simulate.NegativeBinomial(), kinetics=simulate.LogNormalRates(drop=0), **changes)
    return pv.to_anndata(simulate.simulate(N, G, settings=settings, seed=1))


def dense(adata, name: str) -> np.ndarray:
    layer = adata.layers[name]
    return np.asarray(layer.toarray() if sparse.issparse(layer) else layer)


def prepared():
    adata = counted()
    pv.pp.prepare(adata, pv.pp.PrepareSettings(umap=False, n_neighbors=10, min_shared_counts=5))
    return adata


def fitted(adata, **options):
    data = pv.velocity_data(adata, counts=True, **options)
    settings = pv.TrainSettings(max_epochs=3, batch_size=40)
    return pv.fit(NB, GUIDE, adata, data=data, settings=settings, progress=False)


@pytest.mark.parametrize("as_is", [False, True])
def test_the_likelihood_is_given_the_counts_as_they_are(as_is: bool) -> None:
    adata = counted() if as_is else prepared()
    data = pv.velocity_data(adata, counts=True, as_is=as_is)
    assert_allclose(data.cells.s, dense(adata, "spliced")[:, data.genes])
    assert data.layers == ("spliced", "unspliced")


@pytest.mark.parametrize("as_is", [False, True])
def test_size_factors_zero_and_unit_give_the_counts_back_on_average(as_is: bool) -> None:
    adata = counted() if as_is else prepared()
    cells = pv.velocity_data(adata, counts=True, as_is=as_is).cells
    known = cells.counts
    mean = known.size_factors * (known.zero + known.unit * known.scaled)
    ratio = cells.molecules.sum(1) / mean.sum(1)
    # Smoothing moves counts between neighbours of different depth, and nothing else does.
    assert (ratio.log().abs() < 0.15).float().mean() > 0.9


@pytest.mark.parametrize("depth", ["total", "neighbours"])
def test_depth_is_what_preprocessing_saw_before_it_dropped_genes(depth: Literal["total", "neighbours"]) -> None:
    raw = counted()
    total = np.asarray(raw.layers["spliced"].sum(1)).ravel()
    pv.pp.prepare(raw, pv.pp.PrepareSettings(umap=False, n_neighbors=10, min_shared_counts=5, depth=depth))
    relative = total / np.median(total)
    if depth == "neighbours":
        weights = preprocess.averaging_weights(raw.obsp["connectivities"])
        relative = total / (weights @ total)
        relative = relative / np.exp(weights @ np.log(relative))
    assert_allclose(raw.obs[keys.size_factor("spliced")], relative, rtol=1e-5)
    cells = pv.velocity_data(raw, counts=True).cells
    assert_allclose(cells.counts.size_factors[1, :, 0], relative, rtol=1e-5)


def test_a_cell_without_counts_of_one_molecule_still_has_a_size() -> None:
    adata = counted()
    layer = np.array(
        adata.layers["unspliced"].toarray() if sparse.issparse(adata.layers["unspliced"]) else adata.layers["unspliced"]
    )
    layer[3] = 0
    adata.layers["unspliced"] = layer
    size = pv.velocity_data(adata, counts=True, as_is=True).cells.counts.size_factors
    assert (size > 0).all() and size.isfinite().all()


def test_an_encoder_sees_depth_no_more() -> None:
    cells = pv.velocity_data(counted(), counts=True, as_is=True).cells
    batch = cells.batch(torch.arange(10))
    expected = torch.log1p(batch.molecules / batch.size_factors)
    torch.testing.assert_close(batch.seen, torch.cat((expected[0], expected[1]), -1))


def test_results_are_normalised_abundances() -> None:
    adata = prepared()
    fit = fitted(adata)
    fit.write(adata, draws=5)
    genes = adata.var[keys.VELOCITY_GENES].to_numpy()
    ms, shown = adata.layers["Ms"][:, genes], adata.layers[keys.FIT_S][:, genes]
    assert np.isfinite(shown).all()
    assert 0.2 < np.median(shown.mean(0) / ms.mean(0)) < 5
    assert {"fit_dispersion_unspliced", "fit_dispersion_spliced"} <= set(adata.var)
    assert "fit_std_u" not in adata.var


@pytest.mark.parametrize(
    ("spoil", "says"),
    [(lambda x: x + 0.5, "aren't whole"), (lambda x: -x - 1, "negative"), (lambda x: x * np.nan, "NaN")],
)
def test_what_is_no_count_is_refused(spoil, says: str) -> None:
    adata = counted()
    adata.layers["spliced"] = spoil(dense(adata, "spliced").astype(float))
    with pytest.raises(InputError, match=says):
        pv.velocity_data(adata, counts=True, as_is=True)


def test_a_likelihood_is_given_what_it_expects_or_says_so() -> None:
    adata = prepared()
    with pytest.raises(InputError, match="expects raw counts; got scaled layers"):
        pv.fit(NB, GUIDE, adata, data=pv.velocity_data(adata), progress=False)
    with pytest.raises(InputError, match="expects scaled layers; got raw counts"):
        pv.fit(None, GUIDE, adata, data=pv.velocity_data(adata, counts=True), progress=False)
    short = pv.TrainSettings(max_epochs=1)
    assert pv.fit(NB, GUIDE, adata, settings=short, progress=False).data.cells.counts is not None


@pytest.mark.parametrize("seed", [0, 1])
def test_the_floor_of_counts_moves_gammas_by_little_of_their_sd(seed: int) -> None:
    """To first order, where cells' times and library sizes are known; a floor ten times as high moves them visibly."""
    noise = simulate.NegativeBinomial()
    true = simulate.simulate(1000, 60, settings=simulate.Settings(noise=noise), seed=seed)
    genes = np.stack([true.true_alpha, true.true_beta, true.true_gamma, true.true_switch[0] - true.true_onset[0]])
    t = torch.from_numpy(true.true_t - true.true_onset[0, 0])[:, None]
    assert np.ptp(true.true_onset) == 0

    def means(log_rates: torch.Tensor) -> torch.Tensor:
        return torch.stack(trajectory(Rates(*log_rates.exp()), t)) * torch.from_numpy(true.library)[:, None]

    x = torch.from_numpy(genes).log()
    mean = means(x)
    # Each gene's means have slopes in its own rates alone: a step for each of the four.
    steps = 1e-5 * torch.eye(4, dtype=x.dtype)[..., None]
    slopes = torch.stack([(means(x + step) - means(x - step)) / 2e-5 for step in steps])
    # What a gene shows at most, in counts of a cell of middling library.
    unit = torch.stack(trajectory(Rates(*x.exp()), t)).amax(1, keepdim=True) * float(np.median(true.library))
    expected = mean + AMBIENT * unit
    weight = 1 / (expected + expected**2 / noise.theta)
    information = torch.einsum("kmng,lmng,mng->gkl", slopes, slopes, weight)
    pull = torch.einsum("kmng,mng,mng->gk", slopes, weight, unit.expand_as(mean))
    per_floor = -torch.linalg.solve(information, pull) / torch.linalg.inv(information).diagonal(dim1=1, dim2=2).sqrt()
    moved = (per_floor[:, 2] * AMBIENT).abs().median()
    assert moved < 0.05
    assert 10 * moved > 0.1
