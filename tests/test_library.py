"""Laws of library sizes: taken as they are, or told apart from expression by cells of all times having the same."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pyro
import pytest
import torch
from pyro import poutine
from small import GUIDE, MODEL, settings

import pyro_velo as pv
from pyro_velo import simulate
from pyro_velo.errors import InputError
from pyro_velo.library import LEAST_SD, Inferred, Known, rough
from pyro_velo.posterior import stream, summarise
from pyro_velo.preprocess import PrepareSettings, prepare
from pyro_velo.prior_draws import typical_cells
from pyro_velo.train import train

NB = replace(MODEL, likelihood=pv.likelihoods.NB())
INFERRED = replace(NB, library=Inferred())


def test_what_is_known_stays_and_has_no_dimension() -> None:
    cells = typical_cells(30, 4, counts=True)
    program, batch = NB.build(cells), cells.batch(torch.arange(9))
    assert program.n_latent == NB.n_latent and Known().spread(cells.counts.size_factors) is None
    torch.testing.assert_close(program.size_factors({}, batch), batch.size_factors)


def test_the_last_dimension_is_the_library_whatever_the_prior_of_z(double: None) -> None:
    cells = typical_cells(30, 4, counts=True)
    for prior in (pyro.distributions.Normal(0.0, 1.0), pyro.distributions.Normal(1.0, 0.2)):
        program = replace(INFERRED, priors=pv.Priors(latent=prior)).build(cells)
        batch = cells.batch(torch.arange(30))
        assert program.n_latent == NB.n_latent + 1
        z = prior.sample((20_000, 1, program.n_latent))
        size = program.size_factors({"z": z}, batch)
        torch.testing.assert_close(size[0], size[1])
        # log l ~ Normal(0, sd), the median one.
        assert abs(size.log().mean()) < 0.01 and abs(size.log().std() / program.library_sd - 1) < 0.02
        # A guide that adds nothing starts at the rough sizes.
        start = torch.zeros(30, 1, program.n_latent)
        start[:, 0, -1:] = program.rough_library(batch)
        torch.testing.assert_close(program.size_factors({"z": start}, batch)[0].log(), rough(batch.size_factors))


def test_the_spread_is_that_of_the_rough_sizes_or_the_one_given() -> None:
    factors = torch.exp(0.4 * torch.randn(2, 5000, 1, generator=torch.Generator().manual_seed(0)))
    # The mean of two that are independent.
    assert abs(Inferred().spread(factors) - 0.4 / 2**0.5) < 0.01
    assert float(Inferred(sd=0.7).spread(factors)) == pytest.approx(0.7)
    assert float(Inferred().spread(torch.ones(2, 9, 1))) == pytest.approx(LEAST_SD)


def test_times_and_states_are_not_told_the_library() -> None:
    cells = typical_cells(30, 4, counts=True)
    program = INFERRED.build(cells)
    guide, batch = GUIDE(program), cells.batch(torch.arange(6))
    z = torch.randn(6, 1, program.n_latent)
    other = z + torch.tensor([0.0] * NB.n_latent + [1.0])

    def told(at: torch.Tensor) -> tuple[dict, object]:
        with pyro.validation_enabled(False):
            torch.manual_seed(0)
            genes = poutine.trace(program.sample_genes).get_trace()
            values = {name: genes.nodes[name]["value"] for name in genes.stochastic_nodes}
            cell = poutine.trace(guide.cells).get_trace(batch, pyro.distributions.Delta(at, event_dim=1))
        return cell.nodes["pi"]["value"], program.explain(values | {"z": at, "pi": cell.nodes["pi"]["value"]}, batch)

    (states, one), (same_states, two) = told(z), told(other)
    torch.testing.assert_close(states, same_states)
    torch.testing.assert_close(one.t[0], two.t[0])
    torch.testing.assert_close(one.u[0], two.u[0])
    assert not torch.allclose(one.log_joint[0], two.log_joint[0])


@pytest.mark.slow
def test_libraries_are_told_from_expression_where_totals_mix_them() -> None:
    """Genes of one process all rise, then fall: totals say that cells of some times were sequenced more than others."""
    chosen = simulate.Settings(noise=simulate.NegativeBinomial())
    adata = pv.to_anndata(simulate.simulate(600, 80, settings=chosen, seed=1))
    prepare(adata, PrepareSettings(depth="neighbours", umap=False))
    data = pv.velocity_data(adata, counts=True)
    model = pv.VelocityModel(likelihood=pv.likelihoods.NB(), times=pv.times.Shared(), library=Inferred())
    fit = pv.fit(model, pv.guides.Amortized(rates=pv.rates.PerGene()), adata, data=data, progress=False)
    batch, t = data.cells.batch(torch.arange(600)), adata.obs["true_t"].to_numpy()
    found = np.log(fit.posterior(draws=20).library)
    truth = np.log(adata.obs["true_library"] / adata.obs["true_library"].median()).to_numpy()

    def off(sizes: np.ndarray) -> tuple[float, float]:
        """How much cells are off, and how much the cells of a fifth of the time are together."""
        error = sizes - truth
        error -= np.median(error)
        return float(error.std()), max(abs(float(error[(t >= a) & (t < a + 4)].mean())) for a in range(0, 20, 4))

    started = off(rough(batch.size_factors)[:, 0].numpy().astype(float))
    assert np.less(off(found), np.multiply(started, 0.8)).all()


def test_scaled_layers_have_no_library() -> None:
    with pytest.raises(InputError, match=r"Expected a likelihood of counts.*got Tobit\(\).*Use NB\(\)"):
        replace(MODEL, library=Inferred())


@pytest.mark.parametrize("sd", [0.0, -1.0, float("nan"), float("inf")])
def test_a_spread_that_is_none_is_refused(sd: float) -> None:
    with pytest.raises(InputError, match="Expected sd, of log library sizes, above 0 and finite"):
        Inferred(sd)


def test_it_is_kept_refined_and_written(tmp_path) -> None:
    noise = simulate.NegativeBinomial()
    chosen = simulate.Settings(noise=noise, kinetics=simulate.LogNormalRates(drop=0))
    adata = pv.to_anndata(simulate.simulate(40, 5, settings=chosen))
    data = pv.velocity_data(adata, as_is=True, counts=True)
    fit = pv.fit(INFERRED, GUIDE, adata, settings=settings(), data=data, save=tmp_path, progress=False)
    again = pv.load(tmp_path, INFERRED, GUIDE, adata, as_is=True)
    np.testing.assert_array_equal(again.posterior(draws=3).velocity, fit.posterior(draws=3).velocity)
    assert np.isfinite(fit.refined(progress=False).posterior(draws=3).velocity).all()
    fit.write(adata, draws=3)
    assert adata.obsm["X_velocity_latent"].shape == (40, INFERRED.n_latent)
    np.testing.assert_array_equal(adata.obs["velocity_library_size"], fit.posterior(draws=3).library)
    with pytest.raises(InputError, match="holds a fit already"):
        fit.write(adata, draws=3)


def test_sizes_of_a_fit_are_those_of_the_mean_of_its_draws() -> None:
    cells = typical_cells(30, 4, counts=True)
    known, inferred = (
        train(model, GUIDE, cells, settings=settings(max_epochs=1), progress=False) for model in (NB, INFERRED)
    )
    assert summarise(known, cells, draws=2, progress=False).library is None
    found, means = summarise(inferred, cells, draws=5, progress=False), []
    stream(inferred, cells, lambda _, drawn: means.append(drawn.z), draws=5, progress=False)
    z = torch.cat(means)
    np.testing.assert_allclose(found.z, z[:, : NB.n_latent].numpy())
    np.testing.assert_allclose(np.log(found.library), (inferred.program.library_sd * z[:, -1]).numpy(), atol=1e-6)
