"""A fit in Python: from an AnnData and back, saved and loaded to the bit, and what it recovers."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pyro
import pytest
import torch
from numpy.testing import assert_array_equal
from scipy.sparse import csr_matrix
from scipy.stats import pearsonr, spearmanr
from small import GUIDE, MODEL, differing, leaves, settings, small_adata

import pyro_velo as pv
from pyro_velo import checkpoint, metrics
from pyro_velo.batch import Cells
from pyro_velo.data import anndata_keys as keys
from pyro_velo.errors import InputError
from pyro_velo.fitting import describe, in_words
from pyro_velo.flow import along_flow, order_before_a_fit
from pyro_velo.forensics import NonFiniteError
from pyro_velo.initial import SteadyState
from pyro_velo.ordering import by_phase, improved
from pyro_velo.train import train


def data(adata=None):
    return pv.velocity_data(small_adata() if adata is None else adata, as_is=True)


def small(adata=None, **options):
    options = {"settings": settings(), "data": data(adata), "progress": False} | options
    return pv.fit(MODEL, GUIDE, small_adata() if adata is None else adata, **options)


@pytest.fixture(scope="module")
def fit():
    return small()


def same_posterior(one, other):
    a, b = (dict(leaves(vars(f.posterior(draws=5)), "")) for f in (one, other))
    return [name for name in a if not np.array_equal(a[name], b[name])]


def test_load_of_save_gives_the_same_posterior_to_the_bit(fit, tmp_path):
    fit.save(tmp_path)
    loaded = pv.load(tmp_path, MODEL, GUIDE, small_adata(), as_is=True)
    assert differing(loaded.fitted.training, fit.fitted.training) == []
    assert same_posterior(loaded, fit) == []
    assert loaded.about(5, "expected") == fit.about(5, "expected")


def test_what_a_fit_saved_while_it_ran_is_what_it_returned(fit, tmp_path):
    small(save=tmp_path)
    assert same_posterior(pv.load(tmp_path, MODEL, GUIDE, small_adata(), as_is=True), fit) == []


def test_a_fit_goes_on_from_a_folder_to_the_bit(fit, tmp_path):
    # The schedule is that of the whole run, so the run is stopped, not shortened.
    stop_at(4, tmp_path)
    assert differing(small(resume=tmp_path).fitted.training, fit.fitted.training) == []
    longer = small(resume=tmp_path, settings=settings(max_epochs=12))
    assert longer.epochs == 12


def stop_at(epoch, folder):
    def stop(state):
        checkpoint.save(state, folder, about=describe(in_words(MODEL, GUIDE), data()))
        if state.epoch == epoch:
            raise KeyboardInterrupt

    train(MODEL, GUIDE, data().cells, settings=settings(), on_evaluation=stop, progress=False)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"seed": 1}, "Expected seed=0, with which the checkpoint was made; got 1"),
        ({"settings": settings(batch_size=7)}, "Expected batch_size=13, .*got 7"),
        ({"settings": settings(warmup=0.5)}, "Expected warmup=0.3, .*got 0.5"),
        ({"data": "fewer cells"}, "Expected the n_cells of the checkpoint .*40; got 30"),
        ({"data": "other genes"}, "Expected the genes of the checkpoint"),
    ],
)
def test_only_the_same_run_goes_on(fit, tmp_path, options, match):
    others = {"fewer cells": lambda: small_adata()[:30], "other genes": lambda: small_adata(n_genes=4)}
    fit.save(tmp_path)
    if "data" in options:
        options = {"data": data(others[options["data"]]())}
    with pytest.raises(InputError, match=match):
        small(resume=tmp_path, **options)


def test_another_model_does_not_load(fit, tmp_path):
    fit.save(tmp_path)
    with pytest.raises(InputError, match="Expected the model of the checkpoint"):
        pv.load(tmp_path, replace(MODEL, n_latent=3), GUIDE, small_adata(), as_is=True)
    with pytest.raises(InputError, match=r"Expected a checkpoint at .*nowhere.*; found none"):
        pv.load(tmp_path / "nowhere", MODEL, GUIDE, small_adata(), as_is=True)


def test_the_recipe_of_a_model_is_the_same_in_another_process():
    """A checkpoint compares it: an address in it would refuse every resume."""

    class Mine(pv.likelihoods.Normal):
        pass

    def recipe():
        priors = pv.Priors(beta=lambda start: pyro.distributions.LogNormal(start.log(), 1.0))
        return in_words(pv.VelocityModel(likelihood=Mine(), priors=priors), pv.guides.Amortized())

    assert recipe() == recipe() and "Mine" in recipe()
    assert not re.search(r"0x[0-9a-f]{4,}", recipe())


def test_write_fills_the_anndata_and_says_how(fit):
    adata = small_adata()
    fit.write(adata, draws=5)
    assert set(keys.LAYERS_OUT) <= set(adata.layers) and set(keys.VAR_OUT) <= set(adata.var)
    about = adata.uns[keys.UNS]
    assert (about["version"], about["seed"], about["interrupted"]) == (pv.__version__, 0, False)
    assert about["settings"]["batch_size"] == 13 and about["settings"]["draws"] == 5
    assert about["elbo_history"]["epoch"] == list(range(1, 9)) and "VelocityModel" in about["model"]
    assert about["held_out_elbo"] == max(about["elbo_history"]["held_out"])


def test_write_refuses_to_replace_and_then_changes_nothing(fit):
    adata = small_adata()
    fit.write(adata, draws=5)
    adata.layers[keys.VELOCITY][:] = 7.0
    with pytest.raises(InputError, match="holds a fit already"):
        fit.write(adata, draws=5)
    assert (adata.layers[keys.VELOCITY] == 7.0).all()
    fit.write(adata, draws=5, overwrite=True)
    assert not (adata.layers[keys.VELOCITY] == 7.0).any()


def test_write_refuses_other_cells_and_too_few_draws(fit):
    adata = small_adata()
    with pytest.raises(InputError, match="Expected the cells that were fitted"):
        fit.write(adata[::-1].copy(), draws=5)
    with pytest.raises(InputError, match="2 draws or more"):
        fit.write(adata, draws=1)
    assert not set(keys.LAYERS_OUT) & set(adata.layers)


def test_a_fit_leaves_its_anndata_as_it_is():
    adata = small_adata()
    before = {name: layer.copy() for name, layer in adata.layers.items()}
    small(adata)
    assert before.keys() == adata.layers.keys()
    assert all((adata.layers[name] == layer).all() for name, layer in before.items())
    assert list(adata.uns) == ["simulation"] and not adata.obsm


def test_nan_names_the_gene():
    spoilt = data()
    spoilt.cells.molecules[0, :, 3] = torch.nan
    with pytest.raises(NonFiniteError, match=r"step \d+, .*'molecules'.*, gene gene_3\."):
        small(data=spoilt)


@pytest.mark.parametrize(
    ("swap", "says"),
    [
        (lambda a: pv.VelocityModel(likelihood=pv.likelihoods.NB), "likelihood to be a Likelihood.*got the class NB"),
        (lambda a: pv.VelocityModel(times="shared"), "times to be a Times.*got 'shared'"),
        (lambda a: pv.guides.Amortized(rates=pv.rates.PerGene), "rates to be a RateGuide.*got the class PerGene"),
        (lambda a: pv.fit("tobit", None, a), "the model to be a Model"),
        (lambda a: pv.fit(None, pv.rates.PerGene(), a), "the guide to be a Guide.*rates=pv.rates.PerGene"),
        (lambda a: pv.fit(None, pv.guides.Amortized, a), "the guide to be a Guide.*got the class Amortized"),
        (lambda a: pv.fit(None, "amortized", a), "the guide to be a Guide"),
    ],
)
def test_what_is_no_part_is_refused_before_the_training(swap, says):
    with pytest.raises(InputError, match=says):
        swap(small_adata())


def test_the_default_model_and_guide_are_used_where_none_is_given():
    fit = pv.fit(None, None, small_adata(), settings=settings(max_epochs=1), data=data(), progress=False)
    assert fit.recipe == in_words(pv.VelocityModel(), pv.guides.Amortized())


def test_another_elbo_can_be_brought():
    fit = small(elbo=pyro.infer.Trace_ELBO(num_particles=3), settings=settings(max_epochs=2))
    assert fit.history["train"] != small(settings=settings(max_epochs=2)).history["train"]


# What is recovered


@pytest.fixture(scope="module")
def recovered():
    adata = small_adata(n_cells=300, n_genes=30)
    fit = pv.fit(None, None, adata, data=data(adata), settings=pv.TrainSettings(max_steps=600), progress=False)
    fit.write(adata, draws=20)
    return adata


def test_rates_are_recovered(recovered):
    var = recovered.var
    assert pearsonr(var.fit_gamma / var.fit_beta, var.true_gamma / var.true_beta).statistic > 0.8


def test_velocities_are_recovered(recovered):
    each = metrics.pearson(recovered.layers[keys.VELOCITY], recovered.layers[keys.TRUE_VELOCITY])
    assert np.median(each) > 0.95


def test_latent_times_are_recovered(recovered):
    time, true_time = recovered.layers[keys.FIT_T], recovered.obs[keys.TRUE_TIME].to_numpy()
    share = np.maximum(*(recovered.layers[name] / recovered.layers[name].max(0) for name in ("true_u", "true_s")))
    # Where a gene is next to silent its molecules do not tell before from after.
    told = [
        metrics.spearman(time[some, [j]][:, None], true_time[some][:, None])[0]
        for j, some in enumerate((share > 0.1).T)
    ]
    assert np.median(told) > 0.9
    assert metrics.spearman(recovered.obs[[keys.LATENT_TIME]], recovered.obs[[keys.TRUE_TIME]])[0] > 0.8


def test_the_layers_are_explained(recovered):
    for fitted, layer in ((keys.FIT_S, "true_s"), (keys.FIT_U, "true_u")):
        assert np.median(metrics.pearson(recovered.layers[fitted], recovered.layers[layer])) > 0.97
    assert_array_equal(recovered.var[keys.VELOCITY_GENES], True)


def test_the_velocities_of_all_draws_are_those_that_are_summarised(fit):
    draws = np.full((20, len(fit.data.cells), fit.data.cells.n_genes), np.nan, np.float32)

    def keep(cells, velocities):
        draws[:, cells] = velocities

    fit.velocities(keep, draws=20)
    summary = fit.posterior(draws=20)
    unit = fit.data.scaling.s_unit
    np.testing.assert_allclose(draws.mean(0), summary.velocity * unit, rtol=1e-4, atol=1e-5 * unit.max())
    np.testing.assert_allclose(draws.std(0, ddof=1), summary.velocity_sd * unit, rtol=1e-3, atol=1e-5 * unit.max())


def test_a_clock_that_genes_share_is_the_cells_latent_time():
    adata = small_adata()
    model = replace(MODEL, times=pv.times.Shared())
    pv.fit(model, GUIDE, adata, settings=settings(), data=data(adata), progress=False).write(adata, draws=5)
    t = adata.layers[keys.FIT_T][:, adata.var[keys.VELOCITY_GENES].to_numpy()]
    np.testing.assert_allclose(adata.obs[keys.LATENT_TIME], t[:, 0] / 20, rtol=1e-5)
    assert {"fit_onset", "fit_t_"} <= set(adata.var) and (adata.var["fit_onset"].dropna() > 0).all()


def test_the_order_before_a_fit_is_that_of_time_and_turns_with_it():
    noise = pv.simulate.NegativeBinomial()
    adata = pv.to_anndata(pv.simulate.simulate(300, 60, settings=pv.simulate.Settings(noise=noise), seed=0))
    pv.pp.prepare(adata, pv.pp.PrepareSettings(umap=False, depth="neighbours"))
    cells, graph, t = pv.velocity_data(adata).cells, adata.obsp["distances"], adata.obs["true_t"]
    order = order_before_a_fit(cells, graph)
    assert spearmanr(order, t).statistic > 0.9
    # The same cells with their molecules exchanged run backwards.
    turned = Cells(cells.molecules.flip(0) * torch.stack((1 / cells.ratio, cells.ratio))[:, None], cells.ratio)
    assert spearmanr(order_before_a_fit(turned, graph), t).statistic < -0.5


def test_a_shared_clock_starts_in_that_order():
    adata = small_adata()
    model = replace(MODEL, times=pv.times.Shared())
    fit = pv.fit(model, GUIDE, adata, settings=settings(), data=data(adata), progress=False)
    assert torch.equal(fit.data.cells.order, order_before_a_fit(fit.data.cells))
    batch = fit.data.cells.batch(torch.tensor([3, 1]))
    assert torch.equal(fit.fitted.program.rough_order(batch), fit.data.cells.order[[3, 1]])
    per_gene = pv.fit(MODEL, GUIDE, adata, settings=settings(), data=data(adata), progress=False)
    assert per_gene.data.cells.order is None


def test_neighbours_have_a_say_in_the_order_where_curves_fit_theirs_better():
    fork = pv.simulate.Settings(lineages=pv.simulate.Lineages(2))
    adata = pv.to_anndata(pv.simulate.simulate(300, 40, settings=fork, seed=3))
    cells, t = data(adata).cells, adata.obs["true_t"]
    # Each cell's neighbours are those next to it in time: nothing could know more.
    place = np.argsort(np.argsort(t.to_numpy()))
    graph = csr_matrix(np.abs(place[:, None] - place) <= 7, dtype=float)
    rates = SteadyState()(cells).rates
    flow, phase = along_flow(cells, rates, graph), by_phase(cells, rates)
    assert spearmanr(flow, t).statistic > spearmanr(phase, t).statistic
    assert torch.equal(order_before_a_fit(cells, graph), improved(cells, [flow], rates))
