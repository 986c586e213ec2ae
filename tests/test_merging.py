"""Too many clusters: what merging keeps to the letter, and how many of ten are left where there are three."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
import torch
from test_gmvae import clustered

import pyro_velo as pv
from pyro_velo.agreement import agreement
from pyro_velo.assignments import Entropy
from pyro_velo.cluster_sizes import Dirichlet, Given, Learned, Uniform
from pyro_velo.clustering import TRAINING, fit_profiles
from pyro_velo.encoders import Encoder, PerCluster
from pyro_velo.errors import InputError
from pyro_velo.evidence import evidence
from pyro_velo.latent import cluster_probabilities
from pyro_velo.likelihoods import NB
from pyro_velo.merging import _fewer, prune_clusters
from pyro_velo.models.cgmdvae import CGMDVAE
from pyro_velo.models.gmvae import GMVAE
from pyro_velo.moments import as_one, nearest
from pyro_velo.starts import StartSettings
from pyro_velo.train import restore

GUIDE = Encoder((16,))
FAST = {
    "settings": replace(TRAINING, max_steps=20),
    "start": StartSettings(vae_steps=20, restarts=1, inits=1),
    "progress": False,
}
SMALL = {"n_latent": 3, "hidden": (16,)}


def test_one_cluster_has_the_moments_of_two(rng: np.random.Generator) -> None:
    weights, means = np.array([0.3, 0.1]), rng.normal(size=(2, 3))
    covariances = np.stack([a @ a.T for a in rng.normal(size=(2, 3, 3))])
    mean, covariance = as_one(weights, means, covariances)
    first = 0.75 * means[0] + 0.25 * means[1]
    second = sum(s * (c + np.outer(m, m)) for s, c, m in zip((0.75, 0.25), covariances, means, strict=True))
    np.testing.assert_allclose(mean, first)
    np.testing.assert_allclose(covariance, second - np.outer(first, first), rtol=1e-10)


def test_the_nearest_lose_the_least_and_one_without_cells_goes_first(rng: np.random.Generator) -> None:
    weights, means = rng.dirichlet(np.ones(5)), rng.normal(size=(5, 3))
    within = np.zeros((5, 3, 3))

    def lost(pair: tuple[int, int]) -> float:
        """The trace of what merging adds to the covariance within clusters."""
        index = list(pair)
        return weights[index].sum() * np.trace(as_one(weights[index], means[index], within[index])[1])

    assert tuple(nearest(weights, means)) == min(combinations(range(5), 2), key=lost)
    assert 3 in nearest(np.array([0.3, 0.3, 0.2, 1e-300, 0.2]), 10 * means)


@pytest.mark.parametrize(
    "model",
    [
        GMVAE(2, NB(), Learned(), correlated=False, **SMALL),
        GMVAE(2, NB(), Learned(), **SMALL),
        GMVAE(2, NB(), Dirichlet(0.5), **SMALL),
        CGMDVAE(2, NB(), Learned(), correlated=False, **SMALL),
        CGMDVAE(2, NB(), Learned(), **SMALL),
    ],
    ids=["diagonal", "correlated", "dirichlet", "style, diagonal", "style"],
)
def test_a_cluster_that_is_there_twice_is_merged_without_a_trace(model) -> None:
    """Half of a cluster and its other half are that cluster: the bound, and each cell's clusters, are as before."""
    cells = clustered(80, clusters=2)[0]
    two = fit_profiles(model, GUIDE, cells, **FAST)
    values = dict(two.training.best)
    for name, value in values.items():
        if name.startswith("components$$$"):
            values[name] = torch.cat((value, value[1:]))
        elif name.startswith("style$$$last"):
            by_cluster = value.unflatten(0, (2, 2, -1))
            values[name] = torch.cat((by_cluster, by_cluster[:, 1:]), 1).flatten(0, 2)
        elif name == "sizes$$$logits":
            half = value[1:] - np.log(2)
            values[name] = torch.cat((value[:1], half, half))
        elif name == "sizes$$$outputs":
            half = torch.log(torch.expm1(torch.nn.functional.softplus(value[1:]) / 2))
            values[name] = torch.cat((value[:1], half, half))
    state = replace(two.training, best=values, parameters=values, optimizer={})
    three = restore(replace(model, n_clusters=3), GUIDE, cells, state)
    shares = cluster_probabilities(three, cells, draws=5).mean(0)
    found_shares, found = _fewer(three, model, GUIDE, cells, shares)
    np.testing.assert_allclose(found_shares, [shares[0], shares[1] + shares[2]])
    for name, value in two.training.best.items():
        torch.testing.assert_close(found.training.best[name], value, rtol=1e-3, atol=1e-4, msg=name)
    before, after = (evidence(fit, cells, particles=20, draws=2).iw_bound for fit in (two, found))
    np.testing.assert_allclose(before, after, atol=1e-2)
    np.testing.assert_allclose(
        cluster_probabilities(two, cells, draws=5), cluster_probabilities(found, cells, draws=5), atol=1e-3
    )


def test_networks_are_left_alone_and_every_number_is_judged() -> None:
    cells = clustered(60)[0]
    found = prune_clusters(GMVAE(3, NB(), Uniform(), **SMALL), GUIDE, cells, **FAST)
    assert found.candidates == (1, 2, 3) and set(found.fits) == {1, 2, 3}
    for k, fit in found.fits.items():
        assert fit.program.recipe.n_clusters == k
        for name, value in fit.training.best.items():
            if not name.startswith(("components", "sizes")):
                assert torch.equal(value, found.fits[3].training.best[name])
        np.testing.assert_allclose(fit.training.plateau.best, evidence(fit, cells).elbo.mean())
    # One Gaussian of all cells' moments, whatever way it was reached.
    one = found.fits[1].program.components
    every = found.fits[3].program.components
    assert one.loc.shape == (1, 3) and (one.log_scale.exp() > every.log_scale.exp().min(0).values).all()


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))])
def test_ten_clusters_of_three_end_near_three(seed: int) -> None:
    cells, label, _ = clustered(250, seed=seed)
    settings = replace(TRAINING, max_steps=80, seed=seed)
    start = StartSettings(vae_steps=150, restarts=1, inits=2)
    model = GMVAE(10, NB(), n_latent=3, hidden=(32,))
    found = prune_clusters(model, Encoder((32,)), cells, settings=settings, start=start, progress=False)
    assert 3 <= found.choice <= 4
    assert agreement(label, cluster_probabilities(found.fitted, cells, draws=5).argmax(1)).ari > 0.9


def test_clusters_that_can_not_be_merged_are_refused() -> None:
    cells, label, _ = clustered(40)
    known = replace(cells, labels=torch.from_numpy(label))
    for model, of, guide, match in (
        (GMVAE(3), known, GUIDE, "Expected no labels"),
        (GMVAE(2, sizes=Given((0.5, 0.5))), cells, GUIDE, "Expected sizes that are not given"),
        (GMVAE(2, assignment=Entropy()), cells, GUIDE, "Expected a y that is summed exactly"),
        (GMVAE(2, enumerated=True), cells, PerCluster(), "Expected a y that is summed exactly"),
    ):
        with pytest.raises(InputError, match=match):
            prune_clusters(model, guide, of, **FAST)


def test_a_pruned_fit_is_written_kept_and_loaded(tmp_path) -> None:
    from test_autoencoding import simulated

    adata = simulated(60)
    fit = pv.vae(GMVAE(3, **SMALL), GUIDE, adata, prune=True, save=tmp_path, **FAST)
    assert fit.model.n_clusters == fit.number.choice
    loaded = pv.load_vae(tmp_path, adata)
    np.testing.assert_array_equal(loaded.cluster_probabilities(draws=3), fit.cluster_probabilities(draws=3))
    with pytest.raises(InputError, match="Expected candidates or prune"):
        pv.vae(GMVAE(3), GUIDE, adata, prune=True, candidates=(1, 2), **FAST)
    with pytest.raises(InputError, match="Expected a model with clusters"):
        pv.vae(pv.VAE(), GUIDE, adata, prune=True, **FAST)
    assert fit.about()["number_of_clusters"]["choice"] == fit.number.choice
