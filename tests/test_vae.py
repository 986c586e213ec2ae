"""The variational autoencoder: its bound against known evidence, what it recovers, and what it is told."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from tolerances import STANDARD_ERRORS, assert_close, standard_error
from torch import Tensor

from pyro_velo.clustering import TRAINING, fit_profiles
from pyro_velo.doctor.tightness import tightness
from pyro_velo.encoders import Encoder
from pyro_velo.errors import InputError
from pyro_velo.evidence import evidence
from pyro_velo.latent import cluster_probabilities, converted, denoised, latent_means
from pyro_velo.likelihoods import PROFILE_LIKELIHOODS, Normal, Poisson
from pyro_velo.models.vae import VAE
from pyro_velo.profiles import Profiles
from pyro_velo.simulate import simulate_poisson
from pyro_velo.train import Fitted, Training, TrainSettings, train

exact = pytest.mark.usefixtures("double")


def factor_cells(n_cells: int = 60, n_genes: int = 4) -> tuple[Profiles, Tensor]:
    """Cells of two linear factors and a noise of half an sd, and the factors' loadings."""
    loadings = torch.randn(2, n_genes)
    return Profiles(torch.randn(n_cells, 2) @ loadings + 0.5 * torch.randn(n_cells, n_genes)), loadings


class Posterior(torch.nn.Module):
    """The exact posterior of z in a linear Normal program, `width` times as wide."""

    def __init__(self, program, width: float = 1.0) -> None:
        super().__init__()
        emission, decoder = program.decoding.emission, program.decoding.decoder
        self.shift = (emission.zero + emission.unit * decoder.bias[0, 0]).detach()
        self.weight = (decoder.weight[0] * emission.unit).detach()
        self.noise = (emission.start["noise"].exp() * emission.unit).detach()
        precision = torch.eye(len(self.weight)) + self.weight / self.noise**2 @ self.weight.T
        self.gain = torch.linalg.inv(precision) @ (self.weight / self.noise**2)
        self.root = width * torch.linalg.cholesky(torch.linalg.inv(precision))

    def forward(self, batch) -> None:
        loc = (batch.x - self.shift) @ self.gain.T
        with pyro.plate("cells", batch.n_cells, subsample=batch.index, dim=-2):
            pyro.sample("z", dist.MultivariateNormal(loc.unsqueeze(-2), scale_tril=self.root))

    def evidence(self, x: Tensor) -> Tensor:
        covariance = self.weight.T @ self.weight + torch.diag(self.noise**2)
        return dist.MultivariateNormal(self.shift, covariance).log_prob(x)


@exact
def test_with_the_exact_posterior_the_bound_is_the_evidence_and_else_below_it() -> None:
    cells, _ = factor_cells()
    program = VAE(Normal(), n_latent=2, hidden=()).build(cells)
    training = Training(TrainSettings(held_out=0.5))
    with pyro.get_param_store().scope() as store:
        pass
    for width in (1.0, 1.4):
        guide = Posterior(program, width)
        found = evidence(Fitted(program, guide, store, training), cells, particles=20, draws=2)
        order = torch.randperm(60, generator=torch.Generator().manual_seed(0))[:30]
        truth = guide.evidence(cells.x[order]).numpy()
        bounds = tightness(Fitted(program, guide, store, training), cells)
        assert (bounds.index == order.numpy()).all() and (np.diff(bounds.bound, axis=0) >= -1e-9).all()
        if width == 1.0:
            np.testing.assert_allclose(found.elbo, truth, rtol=1e-9)
            np.testing.assert_allclose(bounds.bound, np.tile(truth, (4, 1)), rtol=1e-9)
        else:
            assert found.elbo.mean() < found.iw_bound.mean() < truth.mean() + 0.02
        assert found.sites == () and found.no_kl == ()


@exact
def test_the_kl_in_closed_form_is_the_one_that_is_sampled_with_less_noise() -> None:
    cells, _ = factor_cells(20)
    batch = cells.batch(torch.arange(20))
    with pyro.get_param_store().scope(), pyro.validation_enabled(False), torch.no_grad():
        program = VAE(Normal(), n_latent=2, hidden=(4,)).build(cells)
        guide = Encoder((4,))(program)
        draws = [
            torch.tensor([elbo.loss(program, guide, batch) for _ in range(300)])
            for elbo in (Trace_ELBO(), TraceMeanField_ELBO())
        ]
    gap = draws[0].mean() - draws[1].mean()
    assert abs(gap) < STANDARD_ERRORS * torch.hypot(standard_error(draws[0]), standard_error(draws[1]))


@exact
def test_a_linear_one_finds_the_factors_and_the_noise() -> None:
    """Tipping and Bishop 1999: at the optimum the covariance of x is that of probabilistic PCA."""
    cells, _ = factor_cells(400)
    settings = TrainSettings(max_steps=250, learning_rate=2e-2, held_out=0)
    model, guide = VAE(Normal(), n_latent=2, hidden=()), Encoder(())
    fitted = train(model, guide, cells, settings=settings, elbo=TraceMeanField_ELBO(), progress=False)
    # Each gene has a noise of its own, so factor analysis is the judge.
    from sklearn.decomposition import FactorAnalysis

    best = FactorAnalysis(2, tol=1e-8, max_iter=5000).fit(cells.x.numpy()).score(cells.x.numpy())
    found = Posterior(fitted.program).evidence(cells.x).mean().item()
    assert best - 0.03 < found <= best + 1e-6


@pytest.fixture(scope="module")
def poisson() -> tuple[Fitted, Profiles, np.ndarray]:
    """Seed 001, 3.2: 2,000 cells x 10 genes of rates 1 to 10, a layer of seven and three latent dimensions."""
    counts = simulate_poisson(seed=10)
    cells = Profiles.of_counts(torch.from_numpy(counts), depth=False)
    model, settings = VAE(Poisson(), n_latent=3, hidden=(7,)), replace(TRAINING, max_steps=300)
    return fit_profiles(model, Encoder((7,)), cells, settings=settings, progress=False), cells, counts


def test_every_rate_of_the_synthetic_poisson_is_found(poisson) -> None:
    fitted, cells, counts = poisson
    rates = denoised(fitted, cells, draws=5).mean(0)
    assert np.abs(rates / counts.mean(0) - 1).max() < 0.01
    rate = np.arange(1, 11)
    assert (np.abs(rates - rate) < STANDARD_ERRORS * np.sqrt(rate / len(counts)) + 0.01 * rate).all()


def test_data_without_structure_leave_z_at_its_prior(poisson) -> None:
    fitted, cells, _ = poisson
    spread = latent_means(fitted, cells).std(0)
    assert (spread < 0.1).all()
    looked = [value for value in fitted.training.history.held_out if not np.isnan(value)]
    assert looked[-1] > looked[0]


@pytest.mark.parametrize("name", PROFILE_LIKELIHOODS)
@pytest.mark.parametrize("hidden", [(), (6, 5, 4)])
def test_every_likelihood_and_depth_learns(name: str, hidden: tuple[int, ...]) -> None:
    likelihood = PROFILE_LIKELIHOODS[name]()
    x = torch.poisson(3 * torch.rand(2, 5)[torch.arange(60) % 2] + 0.5)
    real = Profiles((x > 2).float() if likelihood.binary else x)
    cells = Profiles.of_counts(x) if likelihood.counts else real
    model = VAE(likelihood, 2, hidden, decoded=likelihood.parameters[:1])
    settings = TrainSettings(max_epochs=8, batch_size=30, evaluate_steps=1, learning_rate=1e-2)
    fitted = fit_profiles(model, Encoder(hidden), cells, settings=settings, progress=False)
    history = fitted.training.history
    assert max(history.held_out) > history.held_out[0]
    profile = denoised(fitted, cells, draws=2)
    assert profile.shape == x.shape and np.isfinite(profile).all()
    if likelihood.binary:
        assert ((profile > 0) & (profile < 1)).all()


def test_what_covariates_explain_is_left_to_them_and_a_conversion_gives_it_back() -> None:
    """Two batches whose means differ by a factor a gene, and nothing else: z has no need to say which is which."""
    batch = torch.arange(600) % 2
    factor = torch.tensor([[1.0, 1, 1, 1, 1, 1], [3.0, 0.4, 1, 2, 0.5, 1]])
    x = torch.poisson(4 * factor[batch])
    told = torch.eye(2)[batch]
    cells = Profiles.of_counts(x, depth=False, covariates=told)
    model, settings = VAE(Poisson(), 2, (16,)), replace(TRAINING, max_steps=200)
    fitted = fit_profiles(model, Encoder((16,)), cells, settings=settings, progress=False)
    z = latent_means(fitted, cells)
    # In units of the prior's sd.
    assert (np.abs(z[batch == 0].mean(0) - z[batch == 1].mean(0)) < 0.3).all()
    first = cells.among((batch == 0).nonzero().squeeze(1))
    found = converted(fitted, first, torch.eye(2)[[1]].expand(len(first), 2), draws=20, mean=True)
    np.testing.assert_allclose(found.mean, x[batch == 1].mean(0).numpy(), rtol=0.06)
    assert (found.q05 <= found.mean).all() and (found.mean <= found.q95).all()
    same = converted(fitted, first, first.covariates, draws=20, mean=True)
    np.testing.assert_allclose(same.mean, denoised(fitted, first, draws=20).mean(0), rtol=1e-5)


def test_what_has_no_clusters_or_covariates_says_so(poisson) -> None:
    fitted, cells, _ = poisson
    with pytest.raises(InputError, match="Expected a model with clusters"):
        cluster_probabilities(fitted, cells)
    with pytest.raises(InputError, match="Expected covariates of shape None"):
        converted(fitted, cells, torch.ones(2000, 1))


def test_depth_is_no_part_of_a_profile() -> None:
    """One profile at two depths: the counts differ tenfold, the denoised profiles not at all."""
    depth = torch.tensor([1.0, 10.0])[torch.arange(300) % 2]
    x = torch.poisson(depth[:, None] * torch.tensor([1.0, 2.0, 5.0, 8.0]))
    settings = replace(TRAINING, max_steps=120)
    fitted = fit_profiles(
        VAE(Poisson(), 2, (8,)), Encoder((8,)), Profiles.of_counts(x), settings=settings, progress=False
    )
    profile = denoised(fitted, Profiles.of_counts(x), draws=5)
    ratio = profile[depth == 10].mean(0) / profile[depth == 1].mean(0)
    assert_close(torch.from_numpy(ratio), torch.ones(4), slack=5e3)
