"""Which term moves what: the seeds' claims, finite differences, and the record that the optimiser keeps."""

from __future__ import annotations

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from numpy.testing import assert_allclose
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal
from pyro.optim import ClippedAdam
from small import GUIDE, settings, small_cells, small_fit
from torch import Tensor, nn
from toys import SEED_TOP, seed_cells

import pyro_velo as pv
from pyro_velo.batch import Batch, Cells
from pyro_velo.doctor.decomposition import draw_terms
from pyro_velo.doctor.gradient_record import LEVELS, GradientRecord
from pyro_velo.doctor.gradients import (
    ELBO,
    GradientFlow,
    Groups,
    gradient_flow,
    parameter_groups,
    term_gradients,
)
from pyro_velo.errors import InputError
from pyro_velo.evidence import conditions
from pyro_velo.rates import RATE_GUIDES, Auto, RateGuide
from pyro_velo.schedule import KLWeight
from pyro_velo.train import Fitted, Training, TrainSettings, per_cell, train

exact = pytest.mark.usefixtures("double")
NETWORKS = ("encoder", "h_ind", "h_rep", "times", "pi_head")
RATES = ("rates", "switch_times")


def toy(rates: RateGuide | None = None, **parts) -> tuple[Fitted, Cells]:
    """The seed's three genes in four cells, with networks and rates somewhere off where they start."""
    cells = seed_cells()
    model = pv.VelocityModel(
        **({"n_latent": 2, "hidden": (5,), "initial": pv.initial.SteadyState(top=SEED_TOP)} | parts)
    )
    guide = pv.guides.Amortized(rates=rates or pv.rates.MeanField(), hidden=(5,), hidden_states=(5,))
    with pyro.get_param_store().scope() as store, torch.random.fork_rng():
        torch.manual_seed(2)
        program = model.build(cells)
        made = guide(program)
        with torch.no_grad():
            Trace_ELBO().loss(program, made, cells.batch(torch.arange(4)))
            for value in pyro.get_param_store().values():
                free = value.unconstrained()
                free += 0.1 * torch.randn_like(free)
    return Fitted(program, made, store, Training(TrainSettings(held_out=0.0, batch_size=4))), cells


def flow_of(rates: RateGuide | None = None, **parts) -> GradientFlow:
    return gradient_flow(*toy(rates, **parts), draws=4)


def reached(flow: GradientFlow, term: str) -> set[str]:
    return {group for group, hit in zip(flow.groups, flow.reaches[flow.terms.index(term)], strict=True) if hit}


# What the seeds claim


@exact
@pytest.mark.parametrize("states", [pv.states.Collapsed, pv.states.Dirichlet, pv.states.LogisticNormal])
def test_each_term_reaches_what_the_seeds_say(states) -> None:
    """Seeds 000 and 003, for the full model: reconstruction trains all, the KL of z the encoder alone."""
    flow = flow_of(states=states())
    assert set(flow.groups) == {*NETWORKS, *RATES, "noise"}
    assert reached(flow, "kl_z") == {"encoder"}
    assert reached(flow, "kl_pi") == {"encoder", "pi_head"}
    assert reached(flow, "switch_penalty") == set(RATES)
    assert reached(flow, "unspliced") | reached(flow, "spliced") == set(flow.groups)
    assert reached(flow, "kl_rates") == {"rates"} and reached(flow, "kl_noise") == {"noise"}
    assert reached(flow, ELBO) == set(flow.groups)


@exact
def test_with_flat_priors_and_a_point_the_noise_hears_from_reconstruction_alone() -> None:
    """VeloVI's model, which the seed describes: no priors on the rates and the noise."""
    flow = flow_of(pv.rates.Point(), priors=pv.Priors.flat())
    telling = {term for term in flow.terms if "noise" in reached(flow, term)}
    assert telling == {"unspliced", "spliced", ELBO}
    assert reached(flow, "kl_rates") == set()
    assert {term for term in flow.terms if "rates" in reached(flow, term)} == telling | {"switch_penalty"}


@exact
def test_the_noise_of_spliced_hears_nothing_of_unspliced() -> None:
    fitted, cells = toy()
    with conditions(fitted, cells, 0), torch.enable_grad():
        found = term_gradients(fitted, cells.batch(torch.arange(4)))
    name = "AutoNormal.locs.noise_spliced"
    assert name not in found["unspliced"] or not found["unspliced"][name].any()
    assert found["spliced"][name].abs().min() > 0


# Against finite differences


def costs(fitted: Fitted, cells: Cells) -> dict[str, float]:
    """What each term adds to the loss per cell, with the noise held."""
    with conditions(fitted, cells, 3), torch.no_grad():
        terms = draw_terms(fitted, cells.batch(torch.arange(4))).grouped().terms
    return {term.name: (-1 if term.kind == "reconstruction" else 1) * float(term.value) for term in terms}


def moved(fitted: Fitted, direction: dict[str, Tensor], by: float) -> None:
    with fitted.parameters(), torch.no_grad():
        for name, step in direction.items():
            free = pyro.get_param_store()[name].unconstrained()
            free += by * step


@exact
@pytest.mark.parametrize(
    ("rates", "states"),
    [(pv.rates.MeanField(), pv.states.Collapsed()), (pv.rates.PerGene(sd=0.1), pv.states.LogisticNormal())],
)
def test_the_gradient_of_every_term_is_its_finite_difference(rates, states) -> None:
    """Along a random direction in each group of parameters, with the noise held."""
    fitted, cells = toy(rates, states=states)
    batch = cells.batch(torch.arange(4))
    with conditions(fitted, cells, 3), torch.enable_grad():
        groups = parameter_groups(fitted, batch)
    with conditions(fitted, cells, 3), torch.enable_grad():
        found = term_gradients(fitted, batch)
    checked = 0
    for parts in groups.values():
        direction = {}
        for part in parts:
            with fitted.parameters():
                whole = torch.zeros_like(pyro.get_param_store()[part.parameter].unconstrained())
            whole[part.where] = torch.randn_like(whole[part.where])
            direction[part.parameter] = whole
        moved(fitted, direction, 1e-5)
        above = costs(fitted, cells)
        moved(fitted, direction, -2e-5)
        below = costs(fitted, cells)
        moved(fitted, direction, 1e-5)
        for term in above:
            gradient = sum(float((found[term][n] * step).sum()) for n, step in direction.items() if n in found[term])
            assert gradient == pytest.approx((above[term] - below[term]) / 2e-5, rel=2e-5, abs=1e-6), (term, parts)
            checked += gradient != 0
    assert checked > 15


@exact
def test_all_terms_together_are_the_gradient_that_is_climbed() -> None:
    """Where every site is reparameterised; penalties in it as they are at weight 1."""
    fitted, cells = toy(states=pv.states.LogisticNormal())
    batch = cells.batch(torch.arange(4))
    with conditions(fitted, cells, 3), torch.enable_grad():
        found = term_gradients(fitted, batch)
    parts = [per_cell(part, 4) for part in (fitted.program, fitted.guide)]
    with fitted.parameters(), KLWeight(1.0, penalty=1.0), torch.random.fork_rng():
        torch.manual_seed(3)
        Trace_ELBO().loss_and_grads(*parts, batch)
        for name in pyro.get_param_store():
            leaf = pyro.get_param_store()[name].unconstrained()
            ours = found[ELBO][name] + found["switch_penalty"].get(name, 0)
            torch.testing.assert_close(ours, leaf.grad)
            leaf.grad = None


# Groups


@pytest.mark.parametrize("name", [*RATE_GUIDES, "multivariate"])
def test_every_element_of_every_parameter_is_in_one_group(name: str) -> None:
    rates = Auto(AutoMultivariateNormal, init_scale=0.1) if name == "multivariate" else RATE_GUIDES[name]()
    for times in (pv.times.PerGene(), pv.times.Hierarchical()):
        fitted, cells = toy(rates, times=times)
        with conditions(fitted, cells, 0):
            groups = parameter_groups(fitted, cells.batch(torch.arange(4)))
        once = in_groups(groups, fitted)
        assert all((count == 1).all() for count in once.values()), name
        expected = {*NETWORKS, *RATES, "noise"} - (set() if times == pv.times.PerGene() else {"h_ind", "h_rep"})
        more = {"correlations"} if name == "per-gene" else set()
        assert set(groups) == expected | more | (set() if times == pv.times.PerGene() else {"deviations"})


def in_groups(groups: Groups, fitted: Fitted) -> dict[str, Tensor]:
    """In how many groups each element is."""
    with fitted.parameters():
        counts = {n: torch.zeros_like(v.unconstrained()) for n, v in pyro.get_param_store().items()}
    for parts in groups.values():
        for part in parts:
            counts[part.parameter][part.where] += 1
    return counts


@exact
@pytest.mark.parametrize("rates", [pv.rates.PerGene(sd=0.1), pv.rates.LowRank(sd=0.1)])
def test_the_parts_of_a_joint_guide_are_those_of_its_sites(rates) -> None:
    """Each site's own KL moves that site's entries of the mean that all of them share, and no others."""
    fitted, cells = toy(rates)
    batch = cells.batch(torch.arange(4))
    with conditions(fitted, cells, 0), torch.enable_grad():
        groups, found = parameter_groups(fitted, batch), term_gradients(fitted, batch)
    for group in ("rates", "switch_times", "noise"):
        own = [part for part in groups[group] if part.parameter.endswith(".loc")]
        gradient = found[f"kl_{group}"][own[0].parameter].clone()
        for part in own:
            assert (gradient[part.where] != 0).all()
            gradient[part.where] = 0
        assert not gradient.any()


class Program(nn.Module):
    """A VAE, whose parameters are grouped by what they are registered as."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder, self.bias = nn.Linear(2, 3), nn.Parameter(torch.zeros(3))

    def forward(self, batch: Batch) -> None:
        pyro.module("model", self)
        with pyro.plate("cells", batch.n_cells, subsample=batch.index, dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
            scale = pyro.param("spread", torch.ones(3), constraint=dist.constraints.positive)
            pyro.sample("x", dist.Normal(self.decoder(z) + self.bias, scale).to_event(1), obs=batch.u)


class Guide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Linear(3, 4)

    def forward(self, batch: Batch) -> None:
        pyro.module("encoder", self.network)
        loc, log_scale = self.network(batch.u).split(2, -1)
        with pyro.plate("cells", batch.n_cells, subsample=batch.index, dim=-1):
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))


@exact
def test_another_model_has_its_own_groups_and_the_same_laws() -> None:
    with pyro.get_param_store().scope() as store:
        program, guide = Program(), Guide()
        with torch.no_grad():
            Trace_ELBO().loss(program, guide, seed_cells().batch(torch.arange(4)))
    flow = gradient_flow(Fitted(program, guide, store, Training(TrainSettings(held_out=0.0))), seed_cells(), draws=3)
    assert set(flow.groups) == {"encoder", "decoder", "bias", "spread"} and flow.terms == ("kl_z", "x", ELBO)
    # Seed 003: the KL regularises the encoder, the reconstruction trains both.
    assert reached(flow, "kl_z") == {"encoder"} and reached(flow, "x") == set(flow.groups)


# Signal and noise


@exact
def test_the_ratio_of_a_known_gradient_is_known() -> None:
    r"""x ~ Normal(mu, 1), one cell a batch: gradients mu - x_n have mean mu - mean(x), and the variance of x."""

    class Line(nn.Module):
        def __init__(self):
            super().__init__()
            self.mu = nn.Parameter(torch.tensor(0.5))

        def forward(self, batch):
            pyro.module("line", self)
            with pyro.plate("cells", batch.n_cells, subsample=batch.index, dim=-1):
                pyro.sample("x", dist.Normal(self.mu, 1.0), obs=batch.u[:, 0])

    x = torch.randn(60)
    with pyro.get_param_store().scope() as store:
        program = Line()
        pyro.module("line", program)
    fitted = Fitted(program, lambda batch: None, store, Training(TrainSettings(held_out=0.0)))
    flow = gradient_flow(fitted, Cells.of(x[:, None], x[:, None]), draws=600, batch_size=1)
    norm, snr = flow.of("x", "line")
    mean, sd = float(0.5 - x.mean()), float(x.std())
    assert norm == pytest.approx(abs(mean), abs=5 * sd / 600**0.5)
    assert snr == pytest.approx(abs(mean) / sd, abs=0.2)
    # All cells at once: nothing is left to chance.
    exactly = gradient_flow(fitted, Cells.of(x[:, None], x[:, None]), draws=3, batch_size=60)
    assert exactly.of("x", "line")[0] == pytest.approx(abs(mean)) and exactly.of("x", "line")[1] > 1e6


@exact
def test_without_noise_the_ratio_is_large_and_without_a_gradient_there_is_none() -> None:
    flow = flow_of(pv.rates.Point())
    assert flow.of("switch_penalty", "rates")[1] > 1e6
    assert np.isnan(flow.of("switch_penalty", "encoder")[1]) and flow.of("switch_penalty", "encoder")[0] == 0
    noise, norm = flow.noise[flow.terms.index("kl_z")], flow.norm[flow.terms.index("kl_z")]
    assert noise[flow.groups.index("encoder")] > 0 and norm[flow.groups.index("encoder")] > 0


def gradients_of(fitted: Fitted) -> dict[str, Tensor]:
    """What stands with the parameters."""
    with fitted.parameters():
        return {name: value.unconstrained().grad.clone() for name, value in pyro.get_param_store().items()}


def test_the_same_seed_gives_the_same_matrix_and_leaves_all_as_it_was() -> None:
    cells = small_cells()
    fitted = small_fit(cells, settings=settings(max_epochs=1))
    with fitted.parameters():
        for value in pyro.get_param_store().values():
            value.unconstrained().grad = torch.randn_like(value.unconstrained())
    before, left = torch.get_rng_state(), gradients_of(fitted)
    one, other, third = (gradient_flow(fitted, cells, draws=2, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(before, torch.get_rng_state())
    assert_allclose(one.norm, other.norm, rtol=0)
    assert (one.norm != third.norm).any()
    assert all(torch.equal(gradient, left[name]) for name, gradient in gradients_of(fitted).items())
    with pytest.raises(InputError, match="Expected 2 draws and 1 cell or more; got 1 and 13"):
        gradient_flow(fitted, cells, draws=1)


# The record


def adams(gradients: list[Tensor], looks: list[int], clip: float = 10.0) -> list[Training]:
    """The states of a run whose gradients are known, at some of its steps."""
    with pyro.get_param_store().scope():
        value = pyro.param("net$$$w", torch.zeros(gradients[0].shape))
        optimizer, kept = ClippedAdam({"lr": 1e-3, "clip_norm": clip}), []
        for step, gradient in enumerate(gradients, start=1):
            value.grad = gradient.clone()
            optimizer([value])
            if step in looks:
                state = {name: _copied(of) for name, of in optimizer.get_state().items()}
                kept.append(Training(TrainSettings(), step, parameters={"net$$$w": value.detach()}, optimizer=state))
    return kept


def _copied(state: dict) -> dict:
    slots = {i: {k: v.clone() if torch.is_tensor(v) else v for k, v in of.items()} for i, of in state["state"].items()}
    return {"state": slots, "param_groups": state["param_groups"]}


def test_the_record_gives_the_gradients_of_the_steps_since_the_last_look() -> None:
    sizes = torch.tensor([3.0, 0.02, 1.0])
    signs = [torch.randint(0, 2, (40,)) * 2.0 - 1 for _ in range(60)]
    gradients = [sizes[step // 20] * sign for step, sign in enumerate(signs)]
    record = GradientRecord()
    for state in adams(gradients, [20, 40, 60]):
        record(state)
    assert record.epoch == [20, 40, 60]
    # Every element is as large as the others, and the norm is that of 40 of them.
    assert_allclose(10 ** record.of("net"), np.tile(sizes.numpy()[:, None], len(LEVELS)), rtol=1e-2)
    assert_allclose(10 ** np.array(record.norm["net"]), sizes.numpy() * 40**0.5, rtol=1e-2)
    assert record.troubles() == []


@pytest.mark.parametrize(
    ("sizes", "since"), [((1, 6, 1, 6, 7), 40), ((6, 6, 6), 10), ((6, 6, 1), None), ((1, 4, 4), None)]
)
def test_what_is_cut_off_is_named_if_it_still_is(sizes: tuple[int, ...], since: int | None) -> None:
    record, looks = GradientRecord(), [10 * (i + 1) for i in range(len(sizes))]
    for state in adams([torch.full((10,), float(size)) for size in sizes for _ in range(10)], looks):
        record(state)
    found = [(trouble.group, trouble.kind, trouble.since, trouble.bound) for trouble in record.troubles()]
    assert found == ([("net", "exploding", since, 5.0)] if since else [])


def test_what_vanishes_is_named_when_it_does() -> None:
    record = GradientRecord()
    for state in adams([torch.full((10,), 1e-9)] * 20, [10, 20]):
        record(state)
    (trouble,) = record.troubles()
    assert trouble[:3] == ("net", "vanishing", 10) and trouble.figure == pytest.approx(1e-9, rel=1e-3)
    assert trouble.bound == 1e-8


def test_a_fit_is_recorded_by_group_and_is_the_same_fit() -> None:
    record, plan = GradientRecord(), settings(max_epochs=3)
    fitted, plain = small_fit(settings=plan, on_evaluation=record), small_fit(settings=plan)
    for name, value in plain.training.parameters.items():
        assert torch.equal(value, fitted.training.parameters[name])
    assert set(record.quantiles) == {*NETWORKS, *RATES, "noise"}
    assert record.epoch == [1, 2, 3] and record.of("rates").shape == (3, len(LEVELS))
    assert (np.diff(record.of("rates"), axis=1) >= 0).all()
    # A gene of another scale than all others is a gradient that is cut off.
    cells = small_cells()
    molecules = cells.molecules.clone()
    molecules[:, :, 2] *= 1e4
    loud = GradientRecord()
    model = pv.VelocityModel(n_latent=2, hidden=(8,), priors=pv.Priors.weak())
    train(model, GUIDE, Cells(molecules, cells.ratio), settings=plan, on_evaluation=loud, progress=False)
    assert {trouble.kind for trouble in loud.troubles()} == {"exploding"}
