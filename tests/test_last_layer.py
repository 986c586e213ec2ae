"""The posterior of a decoder's last layer: Fisher's information to the letter, and intervals that cover the truth."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pyro
import pytest
import torch
from numpy.testing import assert_allclose

from pyro_velo import last_layer
from pyro_velo.clustering import TRAINING, fit_profiles
from pyro_velo.encoders import Encoder
from pyro_velo.last_layer import LastLayer
from pyro_velo.latent import converted
from pyro_velo.likelihoods import NB, PROFILE_LIKELIHOODS
from pyro_velo.models.vae import VAE
from pyro_velo.profiles import Profiles
from pyro_velo.train import Fitted

COUNTS = torch.arange(200.0)
"""Beyond which nothing here has any mass."""


@pytest.mark.parametrize("name", PROFILE_LIKELIHOODS)
def test_information_is_fishers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the sum over all x of p(x) (d log p / do)^2; of real numbers it is 1 / noise^2, in the gene's sds."""
    monkeypatch.setattr(last_layer, "DRAWS", 4000)
    torch.manual_seed(1)
    likelihood = PROFILE_LIKELIHOODS[name]()
    x = torch.poisson(torch.tensor([0.5, 3.0, 10.0]).expand(20, 3))
    real = Profiles((x > 2).float() if likelihood.binary else x)
    cells = Profiles.of_counts(x) if likelihood.counts else real
    with pyro.get_param_store().scope(), pyro.validation_enabled(False):
        decoding = VAE(likelihood, 2, ()).build(cells).decoding
        batch, z = cells.batch(torch.arange(20)), torch.randn(20, 2)
        found = last_layer._information(decoding, z, batch)
        if likelihood.counts or likelihood.binary:
            every = COUNTS if likelihood.counts else COUNTS[:2]
            outputs = decoding.outputs(z, batch)[:, None].expand(-1, len(every), -1, -1).clone().requires_grad_()
            log_p = decoding.emission(outputs, batch).log_prob(every[:, None, None].expand(-1, 20, 3))
            (score,) = torch.autograd.grad(log_p.sum(), outputs)
            expected = (log_p.exp() * score[0].square()).sum(0).detach()
        else:
            expected = (decoding.emission.noise**-2).expand(20, 3).detach()
    # The standard error of 4,000 draws of a squared score, whose kurtosis is that of rare counts at worst.
    assert_allclose(found.mean(0), expected.mean(0), rtol=0.06)


def fitted_and_cells(n: int = 300, genes: int = 30) -> tuple[Fitted, Profiles, torch.Tensor]:
    """Two batches whose rates differ by a factor a gene, and nothing else; the rates of the second."""
    torch.manual_seed(3)
    rate = torch.exp(torch.randn(genes))
    factor = torch.exp(0.5 * torch.randn(genes))
    batch = torch.arange(n) % 2
    x = torch.poisson(torch.where(batch[:, None] == 0, rate, rate * factor))
    cells = Profiles.of_counts(x, depth=False, covariates=torch.eye(2)[batch])
    model, settings = VAE(NB(), 2, (16,), interactions=False), replace(TRAINING, max_steps=250)
    return fit_profiles(model, Encoder((16,)), cells, settings=settings, progress=False), cells, rate * factor


@pytest.fixture(scope="module")
def fitted() -> tuple[Fitted, Profiles, torch.Tensor]:
    """One fit for all."""
    return fitted_and_cells()


def test_draws_scatter_by_the_inverse_of_the_precision(fitted) -> None:
    fit, cells, _ = fitted
    found = LastLayer.of(fit, cells)
    torch.manual_seed(0)
    drawn = found.draw(20_000)[:, :, 0].double().numpy()
    root = found.root[0].double().numpy()
    wanted = np.linalg.inv(root @ root.T)
    sd = np.sqrt(np.diag(wanted))
    assert_allclose(np.cov(drawn.T) / np.outer(sd, sd), wanted / np.outer(sd, sd), atol=0.05)
    assert_allclose(drawn.mean(0) / sd, 0, atol=5 / 20_000**0.5)


def test_a_sample_of_cells_stands_for_all(fitted, monkeypatch: pytest.MonkeyPatch) -> None:
    fit, cells, _ = fitted
    monkeypatch.setattr(last_layer, "DRAWS", 300)
    every = LastLayer.of(fit, cells)
    monkeypatch.setattr(last_layer, "CELLS", 90)
    some = LastLayer.of(fit, cells)
    # The information of the intercept: the sum over cells, of which a third is looked at.
    bias = len(every.axes.T)
    ratio = (some.root @ some.root.mT)[:, bias, bias] / (every.root @ every.root.mT)[:, bias, bias]
    assert_allclose(ratio.numpy(), 1, atol=0.15)


def test_a_fit_is_left_as_it_is_and_the_same_seed_gives_the_same(fitted) -> None:
    fit, cells, _ = fitted
    before = {name: value.clone() for name, value in fit.training.best.items()}
    state = torch.get_rng_state()
    one, other = LastLayer.of(fit, cells, seed=1), LastLayer.of(fit, cells, seed=1)
    assert torch.equal(one.root, other.root) and torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in fit.training.best.items())


def test_intervals_of_a_mean_cover_the_truth_as_those_of_z_alone_do_not(fitted) -> None:
    fit, cells, truth = fitted
    first = cells.among((cells.covariates[:, 0] == 1).nonzero().squeeze(1))
    others = torch.eye(2)[[1]].expand(len(first), 2)
    given = {"draws": 100, "mean": True}
    wide = converted(fit, first, others, last_layer=LastLayer.of(fit, cells), **given)
    narrow = converted(fit, first, others, **given)
    covered = [((each.q05 <= truth.numpy()) & (truth.numpy() <= each.q95)).mean() for each in (wide, narrow)]
    # Of 30 genes: .90 within three standard errors of a share; without the last layer next to none.
    assert covered[0] >= 0.73 and covered[1] < 0.5
    # As wide as 135 counts of each gene allow, and no wider: the square root of a Poisson mean's variance.
    sd = (wide.q95 - wide.q05) / (2 * 1.645)
    assert_allclose(np.median(sd / np.sqrt(truth.numpy() / 135)), 1, atol=0.3)
    assert_allclose(wide.mean, narrow.mean, rtol=0.1)
