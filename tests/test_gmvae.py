"""Models with clusters: their bounds written out, the clusters they find, and how many they say there are."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import TraceEnum_ELBO
from tolerances import assert_close

from pyro_velo.agreement import agreement
from pyro_velo.assignments import ASSIGNMENTS
from pyro_velo.cluster_number import choose_clusters
from pyro_velo.cluster_sizes import Given, Uniform
from pyro_velo.clustering import TRAINING, Started, fit_profiles
from pyro_velo.encoders import Encoder, PerCluster
from pyro_velo.errors import InputError
from pyro_velo.evidence import evidence
from pyro_velo.latent import cluster_probabilities
from pyro_velo.likelihoods import NB, Normal, Poisson
from pyro_velo.models.cgmdvae import CGMDVAE
from pyro_velo.models.gmvae import GMVAE
from pyro_velo.profiles import UNKNOWN, Profiles
from pyro_velo.schedule import KLWeight
from pyro_velo.simulate import ClusterSettings, simulate_clusters
from pyro_velo.starts import Start, StartSettings, mixture_start
from pyro_velo.train import TrainSettings, train

exact = pytest.mark.usefixtures("double")


def clustered(n_cells: int = 300, clusters: int = 3, seed: int = 10, **more) -> tuple[Profiles, np.ndarray, np.ndarray]:
    """Counts of well-separated clusters, and the cells' clusters and conditions."""
    settings = ClusterSettings(clusters=clusters, separation=1.5, markers=1.0, **more)
    found = simulate_clusters(n_cells, 20, settings=settings, seed=seed)
    told = torch.eye(settings.conditions)[found.condition] if settings.conditions > 1 else None
    return Profiles.of_counts(torch.from_numpy(found.counts), covariates=told), found.label, found.condition


def some_profiles(labels: bool = False) -> Profiles:
    """Nine cells without structure."""
    known = torch.tensor([0, 1, 2] * 3) if labels else None
    return Profiles(torch.randn(9, 4), labels=known)


# Bounds


@exact
@pytest.mark.parametrize("weight", [1.0, 0.3])
@pytest.mark.parametrize("labels", [False, True])
def test_the_guide_of_the_paper_sums_over_every_cluster(weight: float, labels: bool) -> None:
    """Eq. 8 of seed 001, written out cluster by cluster, at the same draws of z."""
    cells = some_profiles(labels)
    model = GMVAE(3, Normal(), Given((0.2, 0.5, 0.3)), n_latent=2, hidden=(3,), enumerated=True, classify=0.0)
    with pyro.get_param_store().scope(), pyro.validation_enabled(False), torch.no_grad():
        program = model.build(cells)
        program.components.begin(torch.randn(3, 2), torch.tensor([[1.0, 0], [0.7, 0.5]]).expand(3, 2, 2))
        guide = PerCluster((5,), (5,))(program)
        batch = cells.batch(torch.arange(9))
        with KLWeight(weight):
            torch.manual_seed(5)
            found = -TraceEnum_ELBO(max_plate_nesting=2).loss(program, guide, batch)
        told = torch.cat((batch.seen.expand(3, 9, 4), torch.eye(3)[:, None].expand(3, 9, 3)), -1)
        torch.manual_seed(5)
        # The shape of the site: clusters, cells, genes' plate, event.
        q_z = dist.Normal(*(each.unsqueeze(-2) for each in guide.encoder(told)))
        z = q_z.rsample()
        q_y = torch.eye(3)[cells.labels] if labels else guide.log_q(batch).exp()
        mixture, total = program.mixture(), 0.0
        for y in range(3):
            log_x = program.decoding.emission(program.decoding.outputs(z[y, :, 0], batch), batch).log_prob(cells.x)
            kl_z = q_z.log_prob(z)[y, :, 0].sum(-1) - mixture.log_components(z[y, :, 0])[:, y]
            kl_y = torch.where(q_y[:, y] > 0, q_y[:, y].log(), 0.0) - mixture.log_weights[y]
            total += (q_y[:, y] * (log_x.sum(-1) - weight * (kl_z + kl_y))).sum()
    assert_close(torch.tensor(found), total)


@exact
def test_the_site_of_z_is_the_mixture_and_networks_of_y_keep_below_it() -> None:
    cells = some_profiles()
    for make in ASSIGNMENTS.values():
        with pyro.get_param_store().scope(), pyro.validation_enabled(False), torch.no_grad():
            program = GMVAE(3, Normal(), Uniform(), make(), n_latent=2, hidden=(3,)).build(cells)
            batch = cells.batch(torch.arange(9))
            drawn = poutine.trace(Encoder((5,))(program)).get_trace(batch)
            trace = poutine.trace(poutine.replay(program, trace=drawn)).get_trace(batch)
            site = trace.nodes["z"]
            found, exact_one = site["fn"].log_prob(site["value"]), program.mixture().log_prob(site["value"])
        assert found.shape == (9, 1)
        if make is ASSIGNMENTS["exact"]:
            assert_close(found, exact_one)
        else:
            assert (found < exact_one).all()


@exact
def test_labels_classify_outside_the_bound_and_free_nats_until_the_kl_is_in() -> None:
    cells = some_profiles(labels=True)
    with pyro.get_param_store().scope(), pyro.validation_enabled(False), torch.no_grad():
        program = GMVAE(3, Normal(), n_latent=2, hidden=(3,), classify=2.0, free_nats=0.1).build(cells)
        guide = Encoder((5,))(program)
        batch = cells.batch(torch.arange(9))
        drawn = poutine.trace(guide).get_trace(batch)
        trace = poutine.trace(poutine.replay(program, trace=drawn)).get_trace(batch)
        trace.compute_log_prob()
        values = {name: site["value"] for name, site in drawn.nodes.items() if site["type"] == "sample"}
        log_q = program.log_clusters(values, batch)
        sites = {name: trace.nodes[name] for name in ("label", "free_nats")}
    assert_close(sites["label"]["log_prob"].squeeze(1), 2 * log_q.gather(1, cells.labels[:, None]).squeeze(1))
    kl = (log_q.exp() * (log_q - program.mixture().log_weights)).sum(1)
    assert_close(sites["free_nats"]["log_prob"].squeeze(1), kl.clamp_max(0.1))
    assert [sites[name]["infer"]["penalty"] for name in ("label", "free_nats")] == [False, True]


@exact
def test_labels_teach_the_guide_of_the_paper_too() -> None:
    cells, losses = some_profiles(labels=True), []
    for weight in (0.0, 2.0):
        model = GMVAE(3, Normal(), n_latent=2, hidden=(3,), enumerated=True, classify=weight)
        with pyro.get_param_store().scope(), pyro.validation_enabled(False), torch.no_grad():
            torch.manual_seed(1)
            program = model.build(cells)
            guide, batch = PerCluster((5,), (5,))(program), cells.batch(torch.arange(9))
            torch.manual_seed(2)
            losses.append(TraceEnum_ELBO(max_plate_nesting=2).loss(program, guide, batch))
            expected = -2 * guide.log_q(batch).gather(1, cells.labels[:, None]).sum()
    assert_close(torch.tensor(losses[1] - losses[0]), expected)


@pytest.mark.parametrize("weight", [0.0, 5.0])
def test_known_labels_have_a_say_in_which_parameters_are_kept(weight: float) -> None:
    """What is climbed is the bound and `classify` log q(y): a look at the held-out cells is judged by both."""
    cells, label, _ = clustered(120)
    cells = replace(cells, labels=torch.from_numpy(np.where(np.arange(120) % 2 == 0, label, UNKNOWN)))
    model = GMVAE(3, NB(), n_latent=2, hidden=(8,), classify=weight)
    plan = TrainSettings(max_epochs=6, held_out=0.3, evaluate_steps=1)
    history = train(model, Encoder((8,)), cells, settings=plan, progress=False).training.history
    cost = np.array(history.terms["held_out"].get("label_penalty", 0.0))
    assert (cost > 0).all() == (weight > 0)
    np.testing.assert_allclose(history.objective, np.array(history.held_out) - cost, rtol=1e-5)


# Starts


def test_a_start_is_the_mixture_of_the_latent_means_and_keeps_the_numbers_of_labels() -> None:
    rng = np.random.default_rng(0)
    label = rng.integers(3, size=600)
    z = np.array([[-4.0, 0], [4, 0], [0, 6]])[label] + rng.normal(size=(600, 2)) * [0.5, 1.0]
    for over, correlated in ((1, False), (3, False), (1, True), (2, True)):
        begun = mixture_start(z, 3, correlated=correlated, settings=StartSettings(over=over))
        order = [int(((begun.loc - torch.tensor(c)) ** 2).sum(1).argmin()) for c in ([-4.0, 0], [4.0, 0], [0.0, 6])]
        assert sorted(order) == [0, 1, 2]
        np.testing.assert_allclose(begun.scale[order].mean(0), [0.5, 1.0], rtol=0.15)
        np.testing.assert_allclose(begun.shares[order], np.bincount(label) / 600, atol=0.02)
    known = np.where(rng.random(600) < 0.05, label, UNKNOWN)
    begun = mixture_start(z, 3, labels=known)
    np.testing.assert_allclose(begun.loc, [[-4, 0], [4, 0], [0, 6]], atol=0.3)


def test_a_fit_starts_where_it_is_told() -> None:
    cells = clustered()[0]
    started = Started.of(
        GMVAE(3), None, cells, settings=replace(TRAINING, max_steps=1), start=StartSettings(vae_steps=3), progress=False
    )
    begun = Start(torch.randn(3, 10), torch.diag_embed(torch.rand(3, 10) + 0.5), torch.tensor([0.2, 0.3, 0.5]))
    short = replace(started, settings=TrainSettings(max_epochs=1, learning_rate=1e-12))
    fitted = short._fit(GMVAE(3), begun, "one")
    assert_close(fitted.program.components.loc.detach(), begun.loc)
    assert_close(fitted.program.sizes.prior().detach().exp(), begun.shares)
    for one, other in ((fitted.program.decoding, started.vae.program.decoding),):
        for name, value in other.state_dict().items():
            assert_close(one.state_dict()[name], value)


# What they find


@pytest.fixture(scope="module")
def fast() -> dict:
    """Short fits: enough for clusters that lie far apart."""
    return {
        "settings": replace(TRAINING, max_steps=25, learning_rate=1e-2),
        "start": StartSettings(vae_steps=90, restarts=1),
        "progress": False,
    }


@pytest.mark.parametrize(
    "model",
    [
        GMVAE(3, NB(), n_latent=3, hidden=(32,)),
        GMVAE(3, NB(), Uniform(), ASSIGNMENTS["entropy"](), n_latent=3, hidden=(32,)),
        CGMDVAE(3, NB(), n_latent=3, hidden=(32,)),
        CGMDVAE(3, NB(), assignment=ASSIGNMENTS["per-cell"](), n_latent=3, hidden=(32,)),
    ],
    ids=["gmvae", "entropy", "cgmdvae", "per-cell"],
)
def test_clusters_that_lie_apart_are_found_and_every_fit_can_be_scored(model, fast: dict) -> None:
    cells, label, _ = clustered(200)
    fitted = fit_profiles(model, Encoder((32,)), cells, **fast)
    probabilities = cluster_probabilities(fitted, cells, draws=5)
    np.testing.assert_allclose(probabilities.sum(1), 1, rtol=1e-5)
    assert agreement(label, probabilities.argmax(1)).ari > 0.9
    found = evidence(fitted, cells, particles=5, draws=2)
    assert (found.elbo <= found.iw_bound + 1e-9).all() and np.isfinite(found.density).all()


def test_the_guide_of_the_paper_learns_too() -> None:
    cells, _, _ = clustered(100)
    model = GMVAE(3, Poisson(), n_latent=2, hidden=(16,), enumerated=True)
    fitted = train(
        model, PerCluster((16,), (16,)), cells, settings=TrainSettings(max_steps=40, evaluate_steps=5),
        elbo=TraceEnum_ELBO(max_plate_nesting=2), progress=False,
    )  # fmt: skip
    looked = [value for value in fitted.training.history.held_out if not np.isnan(value)]
    assert looked[-1] > looked[0]
    probabilities = cluster_probabilities(fitted, cells, draws=1)
    np.testing.assert_allclose(probabilities, fitted.guide.log_q(cells.batch(torch.arange(100))).exp().detach())


def test_a_few_labels_name_the_clusters(fast: dict) -> None:
    cells, label, _ = clustered()
    known = np.where(np.arange(300) % 10 == 0, label, UNKNOWN)
    cells = replace(cells, labels=torch.from_numpy(known))
    model = GMVAE(3, NB(), n_latent=3, hidden=(32,))
    fitted = fit_profiles(model, Encoder((32,)), cells, **fast)
    probabilities = cluster_probabilities(fitted, cells, draws=5)
    assert (probabilities.argmax(1) == label)[known == UNKNOWN].mean() > 0.95


@pytest.mark.slow
def test_cells_without_clusters_have_one(fast: dict) -> None:
    longer = fast | {"settings": replace(TRAINING, max_steps=150), "start": StartSettings(vae_steps=300, restarts=1)}
    cells = clustered(clusters=1)[0]
    found = choose_clusters(GMVAE(1, NB(), n_latent=3, hidden=(32,)), Encoder((32,)), cells, (1, 2, 3), **longer)
    assert found.choice == 1 and found.candidates == (1, 2, 3)
    assert found.fitted is found.fits[1] and "Choice: 1" in found.table()


@pytest.mark.slow
def test_cells_with_clusters_have_as_many(fast: dict) -> None:
    longer = fast | {"settings": replace(TRAINING, max_steps=150), "start": StartSettings(vae_steps=300, restarts=1)}
    cells = clustered(600)[0]
    found = choose_clusters(GMVAE(1, NB(), n_latent=3, hidden=(32,)), Encoder((32,)), cells, (1, 3, 5), **longer)
    assert found.choice == 3
    mean, error = found.differences[0]
    assert mean < -2 * error


def test_clusters_that_can_not_be_are_refused(fast: dict) -> None:
    cells = some_profiles(labels=True)
    for n, message in ((0, "Expected 1 to 9 clusters"), (10, "got 10"), (2, "Expected 2 clusters to hold every label")):
        for make in (GMVAE, CGMDVAE):
            with pytest.raises(InputError, match=message):
                make(n, Normal()).build(cells)
    with pytest.raises(InputError, match="Expected numbers of clusters to try"):
        choose_clusters(GMVAE(1), None, cells, (), **fast)
    with pytest.raises(InputError, match="Expected an Encoder"):
        fit_profiles(GMVAE(2, Normal()), PerCluster(), Profiles(torch.randn(9, 4)), **fast)
    with pytest.raises(InputError, match="Expected over of 1 or more"):
        StartSettings(over=0)
