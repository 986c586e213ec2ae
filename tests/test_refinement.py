"""Refined cells: a higher bound, from any start the same one, and nothing else that moves."""

from __future__ import annotations

from copy import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from small import GUIDE, MODEL, differing, settings, small_adata

import pyro_velo as pv
from pyro_velo.errors import InputError
from pyro_velo.evidence import evidence
from pyro_velo.fitting import Fit
from pyro_velo.refinement import refine


@pytest.fixture(scope="module")
def fit() -> Fit:
    data = pv.velocity_data(small_adata(), as_is=True)
    return pv.fit(MODEL, GUIDE, small_adata(), settings=settings(), data=data, progress=False)


@pytest.fixture(scope="module")
def refined(fit: Fit) -> Fit:
    return fit.refined(steps=200, progress=False)


def bound(fit: Fit) -> float:
    return float(evidence(fit.fitted, fit.data.cells, particles=50).elbo.mean())


def test_the_bound_rises_and_further_steps_add_little(fit: Fit, refined: Fit) -> None:
    before, after, later = bound(fit), bound(refined), bound(refined.refined(steps=200, progress=False))
    # Two latent dimensions and a few genes leave little to gain, but more than the noise of the estimate.
    assert after > before + 0.2
    assert abs(later - after) < 0.2 * (after - before)


def test_where_the_encoder_put_a_cell_is_forgotten(fit: Fit, refined: Fit) -> None:
    loc, scale = refined.fitted.guide.own
    guide = copy(fit.fitted.guide)
    torch.manual_seed(0)
    guide.own = (loc + 0.3 * torch.randn_like(loc), 2 * scale)
    elsewhere = replace(fit, fitted=refine(replace(fit.fitted, guide=guide), fit.data.cells, steps=400, progress=False))
    assert bound(elsewhere) == pytest.approx(bound(refined), abs=0.3 * (bound(refined) - bound(fit)))


def test_nothing_else_moves_and_the_same_seed_gives_the_same_bits(fit: Fit, refined: Fit) -> None:
    before = {name: value.clone() for name, value in fit.fitted.training.best.items()}
    again = fit.refined(steps=200, progress=False)
    assert all(torch.equal(a, b) for a, b in zip(again.fitted.guide.own, refined.fitted.guide.own, strict=True))
    assert fit.fitted.guide.own is None and differing(refined.fitted.training, fit.fitted.training) == []
    assert all(torch.equal(value, fit.fitted.training.best[name]) for name, value in before.items())
    rates = [each.as_trained().posterior(draws=5).rates["alpha"] for each in (fit, refined)]
    np.testing.assert_array_equal(*rates)


def test_the_posterior_is_that_of_the_refined_cells(fit: Fit, refined: Fit) -> None:
    loc, scale = refined.fitted.guide.own
    z = refined.posterior(draws=200).z
    assert (np.abs(z - loc.numpy()) < 5 * scale.numpy() / np.sqrt(200)).mean() > 0.999
    adata = small_adata()
    refined.write(adata, draws=5)
    assert np.isfinite(adata.layers["velocity"][:, adata.var["velocity_genes"].to_numpy()]).all()


def test_what_cannot_be_refined_is_refused(fit: Fit) -> None:
    with pytest.raises(InputError, match="Expected 1 step or more; got 0"):
        fit.refined(steps=0)
    other = replace(fit.fitted, guide=torch.nn.Identity())
    with pytest.raises(InputError, match="Expected a guide with an encoder to refine; got Identity"):
        refine(other, fit.data.cells)
