"""The doctor on autoencoders: their bounds are the sum of their terms, and what is said of them is what they do."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pyro
import pytest
import torch
from numpy.testing import assert_allclose
from pyro.infer import TraceMeanField_ELBO
from tolerances import STANDARD_ERRORS, assert_close

import pyro_velo as pv
from pyro_velo.clustering import TRAINING
from pyro_velo.data.simulated import clusters_to_anndata
from pyro_velo.doctor.collapse import collapse
from pyro_velo.doctor.decomposition import decompose, draw_terms
from pyro_velo.doctor.findings import OF_PROFILES, REMEDIES
from pyro_velo.doctor.genes import genes
from pyro_velo.doctor.gradients import ELBO, gradient_flow, parameter_groups, term_gradients
from pyro_velo.doctor.terms import CELLS, DIMENSIONS, GENES, terms_of
from pyro_velo.evidence import conditions
from pyro_velo.profiles import Profiles
from pyro_velo.schedule import Warmup
from pyro_velo.simulate import ClusterSettings, simulate_clusters
from pyro_velo.starts import StartSettings
from pyro_velo.train import Fitted, Training, TrainSettings, per_cell

exact = pytest.mark.usefixtures("double")
N, G, K = 24, 5, 3
SMALL: dict[str, Any] = {"n_latent": 2, "hidden": (6,)}
NORMAL = pv.likelihoods.Normal()
MODELS = {
    "vae": pv.VAE(**SMALL),
    "vae, zinb, decoded": pv.VAE(pv.likelihoods.ZINB(), decoded=("gate",), **SMALL),
    "vae, normal": pv.VAE(NORMAL, **SMALL),
    "gmvae": pv.GMVAE(K, correlated=False, **SMALL),
    "gmvae, dirichlet, correlated": pv.GMVAE(K, sizes=pv.cluster_sizes.Dirichlet(0.7), **SMALL),
    "gmvae, entropy, labels, free nats": pv.GMVAE(K, assignment=pv.assignments.Entropy(), free_nats=0.1, **SMALL),
    "gmvae, enumerated": pv.GMVAE(K, enumerated=True, **SMALL),
    "cgmdvae": pv.CGMDVAE(K, **SMALL),
    "cgmdvae, per cell, learned style": pv.CGMDVAE(
        K, assignment=pv.assignments.PerCell(), learned_style=True, condition_clusters=True, **SMALL
    ),
}


def world(model: Any, labels: bool = True) -> tuple[Fitted, Profiles]:
    """A program and its guide with parameters that are not where they start, as a fit; and cells in two conditions."""
    torch.manual_seed(3)
    x = torch.poisson(4 * torch.rand(K, G)[torch.arange(N) % K] + 0.5)
    known = torch.where(torch.arange(N) % 4 == 0, torch.arange(N) % K, -1) if labels else None
    told = {"covariates": torch.eye(2)[torch.arange(N) % 2].to(x), "labels": known}
    cells = Profiles.of_counts(x, **told) if model.likelihood.counts else Profiles(x, **told)
    make = pv.encoders.PerCluster if getattr(model, "enumerated", False) else pv.encoders.Encoder
    with pyro.get_param_store().scope() as store:
        program = model.build(cells)
        guide = make((6,), (6,))(program)
        with torch.no_grad():
            drawn = pyro.poutine.trace(guide).get_trace(cells.batch(torch.arange(N)))
            pyro.poutine.replay(program, trace=drawn)(cells.batch(torch.arange(N)))
            for value in pyro.get_param_store().values():
                value.add_(0.2 * torch.randn_like(value))
    return Fitted(program, guide, store, Training(TrainSettings(held_out=0.25, batch_size=N))), cells


def some_batch(cells: Profiles) -> Any:
    """A part of the cells, that stands for more of them."""
    return cells.batch(torch.arange(1, 8), N - 3)


# Terms


@exact
@pytest.mark.parametrize("schedule", [Warmup(0), Warmup(0, beta=4.0), Warmup(0, beta=0.5, free_bits=0.3)], ids=str)
@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS.keys())
def test_the_terms_add_up_to_the_elbo_of_the_same_draw(model: Any, schedule: Warmup) -> None:
    fitted, cells = world(model)
    batch = some_batch(cells)
    program, guide = (per_cell(part, batch.n_cells) for part in (fitted.program, fitted.guide))
    with conditions(fitted, cells, 5), torch.no_grad(), schedule.settled_at():
        terms = draw_terms(fitted, batch)
    with conditions(fitted, cells, 5), torch.no_grad(), schedule.settled_at():
        # As `Trace_ELBO` has it, which warns of a y that could be enumerated.
        drawn = pyro.poutine.trace(guide).get_trace(batch)
        joint = pyro.poutine.trace(pyro.poutine.replay(program, trace=drawn)).get_trace(batch)
        elbo = float(joint.log_prob_sum() - drawn.log_prob_sum())
    assert float(terms.total) == pytest.approx(elbo, rel=1e-9)
    assert {"x", "kl_z"} <= set(terms.names)
    for term in (*terms.terms, *terms.grouped().terms):
        for axis, size in ((CELLS, 7), (GENES, G)):
            share = term.by(axis)
            if share is not None:
                assert_close(share.mean() if axis == CELLS else share.sum(), term.value)
                assert len(share) == size
    penalties = {term.name for term in terms.terms if term.kind == "penalty"}
    assert penalties == {name for name in terms.names if name.endswith("_penalty")}
    assert ("label_penalty" in penalties) == (not isinstance(model, pv.VAE))


@exact
@pytest.mark.parametrize("model", [m for m in MODELS.values() if not getattr(m, "enumerated", False)], ids=str)
def test_in_closed_form_they_add_up_to_the_mean_field_elbo(model: Any) -> None:
    """What autoencoders are fitted with, so what their history keeps."""
    fitted, cells = world(model)
    batch = some_batch(cells)
    parts = [per_cell(part, batch.n_cells) for part in (fitted.program, fitted.guide)]
    with conditions(fitted, cells, 5), torch.no_grad():
        loss = TraceMeanField_ELBO().loss(*parts, batch)
    with conditions(fitted, cells, 5), torch.no_grad():
        guide = pyro.poutine.trace(parts[1]).get_trace(batch)
        program = pyro.poutine.trace(pyro.poutine.replay(parts[0], trace=guide)).get_trace(batch)
        terms, drawn = terms_of(guide, program, closed=True), terms_of(guide, program)
    assert float(terms.total) == pytest.approx(-loss, rel=1e-9)
    if isinstance(model, pv.VAE):
        assert_close(terms.of("kl_z").by(DIMENSIONS), drawn.of("kl_z").expected)
        assert_close(terms.of("x").value, drawn.of("x").value)


# Gradients


@exact
@pytest.mark.parametrize("name", ["vae", "gmvae, dirichlet, correlated", "cgmdvae, per cell, learned style"])
def test_the_gradient_of_every_term_is_its_finite_difference(name: str) -> None:
    """Along a random direction in each group of parameters, with the noise held; a Dirichlet draw stays where it is."""
    fitted, cells = world(MODELS[name])
    batch, step = some_batch(cells), 1e-5

    def costs() -> dict[str, float]:
        with conditions(fitted, cells, 3), torch.no_grad():
            terms = draw_terms(fitted, batch).grouped().terms
        return {t.name: (-1 if t.kind == "reconstruction" else 1) * float(t.value) for t in terms}

    with conditions(fitted, cells, 3), torch.enable_grad():
        groups = parameter_groups(fitted, batch)
    with conditions(fitted, cells, 3), torch.enable_grad():
        found = term_gradients(fitted, batch)
    checked = 0
    for group, parts in groups.items():
        # The guide's Dirichlet has pathwise gradients, which hold on average and not draw by draw.
        if group == "sizes":
            continue
        with fitted.parameters():
            values = {part.parameter: pyro.get_param_store()[part.parameter] for part in parts}
        direction = {parameter: torch.randn_like(value) for parameter, value in values.items()}
        either = []
        for by in (step, -2 * step, step):
            with torch.no_grad():
                for parameter, value in values.items():
                    value.add_(by * direction[parameter])
            either.append(costs())
        for term in either[0]:
            own = found[term]
            slope = sum(float((own[n] * d).sum()) for n, d in direction.items() if n in own)
            difference = (either[0][term] - either[1][term]) / (2 * step)
            assert slope == pytest.approx(difference, rel=2e-5, abs=1e-6), (group, term)
            checked += slope != 0
    assert checked >= 3


@exact
def test_the_kl_reaches_the_encoder_and_the_prior_and_the_decoder_hears_from_reconstruction_alone() -> None:
    """Seed 003; of a mixture the clusters are moved by the KL of z, and by labels, and not by what is measured."""

    def reached(flow: Any, term: str) -> set[str]:
        return {group for group, hit in zip(flow.groups, flow.reaches[flow.terms.index(term)], strict=True) if hit}

    flow = gradient_flow(*world(MODELS["vae"]), draws=2)
    assert set(flow.groups) == {"encoder", "decoding"}
    assert reached(flow, "kl_z") == {"encoder"} and reached(flow, "x") == {"encoder", "decoding"}
    flow = gradient_flow(*world(MODELS["cgmdvae"]), draws=2)
    assert set(flow.groups) == {"encoder", "style_encoder", "decoding", "components", "style", "sizes"}
    assert reached(flow, "x") == {"encoder", "decoding"}
    assert "decoding" not in reached(flow, "kl_z") | reached(flow, "kl_w") | reached(flow, "label_penalty")
    assert {"encoder", "components", "style", "sizes"} <= reached(flow, "kl_z")
    assert reached(flow, ELBO) == set(flow.groups)


# Collapse and genes


@exact
@pytest.mark.parametrize("name", ["vae", "gmvae", "cgmdvae"])
def test_the_kl_of_the_latent_vector_is_that_of_its_terms(name: str) -> None:
    """Of z and w, and of nothing that a network merely says of a cell's cluster."""
    fitted, cells = world(MODELS[name], labels=False)
    found = collapse(fitted, cells)
    sites = ("z", "w") if name.startswith("cgmdvae") else ("z",)
    assert set(found.names) == set(sites) and len(found.kl) == 2 * len(sites)
    draws = []
    for seed in range(30):
        terms = decompose(fitted, cells, index=torch.arange(N), seed=seed)
        draws.append(sum(float(terms.of(f"kl_{site}").value) for site in sites))
    # Means over 4 draws and over 30.
    error = np.std(draws) * (1 / 4 + 1 / 30) ** 0.5
    assert abs(found.kl.sum() - np.mean(draws)) < STANDARD_ERRORS * error
    assert found.mean_kl == pytest.approx(found.information + found.gap, rel=1e-12)
    # A mixture is no product of dimensions.
    assert found.apart == (name == "vae")


@exact
def test_sizes_of_clusters_are_no_genes_and_noise_is_in_sds() -> None:
    found = genes(*world(MODELS["gmvae, dirichlet, correlated"]))
    assert found.sites == () and len(found.noise) == 0
    assert found.loss_share.sum() == pytest.approx(1) and found.input_share.sum() == pytest.approx(1)
    fitted, cells = world(MODELS["vae, normal"])
    assert_allclose(genes(fitted, cells).noise, fitted.program.decoding.emission.start["noise"].detach().exp())


# From a fit to its findings


def fit_of(model: Any, **changes: Any) -> pv.ProfileFit:
    settings = ClusterSettings(clusters=2, separation=2.0, markers=1.0)
    adata = clusters_to_anndata(simulate_clusters(120, 12, settings=settings, seed=10))
    plan = replace(TRAINING, **{"max_epochs": 12, "evaluate_steps": 1, "learning_rate": 1e-2, **changes})
    start = StartSettings(vae_steps=40, restarts=1)
    return pv.vae(model, pv.encoders.Encoder((8,)), adata, settings=plan, start=start, progress=False)


def test_a_fit_keeps_its_terms_and_is_diagnosed_like_any_other() -> None:
    fit = fit_of(pv.GMVAE(2, n_latent=2, hidden=(8,)), max_epochs=3)
    terms = fit.history["terms"]["held_out"]
    assert_allclose(np.subtract(terms["x"], terms["kl_z"]), fit.history["held_out"], rtol=1e-5)
    found = pv.diagnose(fit)
    assert found.codes == ("not-converged",) and found.findings[0].remedy == OF_PROFILES["not-converged"]
    assert found.measured.numbers == 12 and not found.measured.kinetic
    page = found.to_html()
    assert "loss by gene" in page and "What the ELBO is made of" in page and "no dimension a KL of its own" in page
    assert "Kinetic states" not in page and "Rates and priors" not in page


def test_a_heavy_kl_is_named_and_follows_from_a_fit_that_was_cut_short() -> None:
    found = pv.diagnose(fit_of(pv.VAE(n_latent=2, hidden=(8,)), beta=20.0, max_epochs=2))
    assert found.codes == ("not-converged",)
    assert "kl-too-strong" in [each.code for each in found.consequences] and found.measured.kl_weight == 20


def test_every_remedy_of_its_own_is_of_a_code() -> None:
    assert OF_PROFILES.keys() <= REMEDIES.keys()
