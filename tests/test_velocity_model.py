"""Laws of the velocity model: its sites, its ELBO, what a draw of it says, and seed 000's first step."""

from __future__ import annotations

from itertools import product

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from pyro.optim import ClippedAdam
from tolerances import assert_close
from torch import Tensor, nn
from toys import SEED_TOP, seed_cells, some_cells, whole

from pyro_velo.batch import Batch, Cells
from pyro_velo.guides import Amortized
from pyro_velo.initial import Constant
from pyro_velo.kinetics import T_MAX, Rates, induction, repression
from pyro_velo.models.velocity import MOLECULES, RATES, Explained, SwitchPenalty, VelocityModel, VelocityProgram
from pyro_velo.priors import Priors
from pyro_velo.rates import RATE_GUIDES, Point
from pyro_velo.schedule import WithoutPenalties
from pyro_velo.states import STATE_FAMILIES, StateFamily

LATENT, GENE_LEVEL = 3, (*RATES, "noise_unspliced", "noise_spliced")
Values = dict[str, Tensor]
families = pytest.mark.parametrize("states", STATE_FAMILIES.values(), ids=STATE_FAMILIES.keys())
# Each rate guide with the default states, and each family with the default guide: test_grid.py crosses them all.
CROSS = [*product(RATE_GUIDES, ["collapsed"]), *product(["mean-field"], STATE_FAMILIES.keys() - {"collapsed"})]
PAIRS = [pytest.param(RATE_GUIDES[r], STATE_FAMILIES[s], id=f"{r}-{s}") for r, s in sorted(CROSS)]


def small(states: type[StateFamily] | None = None, **choices: object) -> VelocityModel:
    if states is not None:
        choices["states"] = states()
    return VelocityModel(n_latent=LATENT, hidden=(7,), **choices)


def draw(program: VelocityProgram, batch: Batch) -> Values:
    """A value of every latent site, away from the start: rates that differ, cells that differ."""
    n, g = batch.u.shape
    values = {name: start * (0.5 + torch.rand(g)) for name, start in program.start.sites().items()}
    pi = dist.Dirichlet(torch.ones(4)).sample((n, g))
    return {**values, "z": torch.randn(n, 1, LATENT), "pi": pi}


def scored(program: nn.Module, values: Values, batch: Batch) -> poutine.Trace:
    trace = poutine.trace(poutine.condition(program, data=values)).get_trace(batch)
    trace.compute_log_prob()
    return trace


def log_joint(program: nn.Module, values: Values, batch: Batch) -> Tensor:
    return scored(program, values, batch).log_prob_sum()


@families
def test_sites_and_shapes_are_those_of_the_table(states: type[StateFamily]) -> None:
    cells = some_cells(11, 5)
    index = torch.tensor([0, 3, 10, 4])
    trace = poutine.trace(small(states).build(cells)).get_trace(cells.batch(index))
    table = {name: ((5,), ()) for name in GENE_LEVEL}
    table |= {"z": ((4, 1), (LATENT,)), "pi": ((4, 5), (4,)), "molecules": ((4, 5), (2,))}
    for name, (batch_shape, event_shape) in table.items():
        fn = trace.nodes[name]["fn"]
        assert (tuple(fn.batch_shape), tuple(fn.event_shape)) == (batch_shape, event_shape), name
        assert trace.nodes[name]["value"].shape == (*batch_shape, *event_shape), name
    assert set(trace.stochastic_nodes) - {"genes", "cells"} == {*GENE_LEVEL, "z", "pi"}
    assert trace.nodes["molecules"]["is_observed"]
    # Cells stand for all cells; genes and what is theirs are not scaled.
    scale = {name: float(trace.nodes[name]["scale"]) for name in table}
    assert scale == {name: 11 / 4 if name in ("z", "pi", "molecules") else 1.0 for name in table}


@pytest.mark.parametrize("name", RATES)
def test_a_prior_that_is_passed_in_is_the_one_that_is_traced(name: str) -> None:
    mine = dist.Uniform(0.5, 2.0) if name == "switch_time" else dist.LogNormal(0.3, 0.1)
    trace = poutine.trace(small(priors=Priors(**{name: mine})).build(some_cells())).get_trace(whole(some_cells()))
    value = torch.tensor([0.6, 1.0, 1.2, 1.5, 1.9])
    for site in RATES:
        same = torch.equal(trace.nodes[site]["fn"].log_prob(value), mine.expand([5]).log_prob(value))
        assert same == (site == name)


def test_every_prior_reaches_its_site() -> None:
    priors = Priors(noise=dist.Exponential(3.0), latent=dist.StudentT(4.0), concentration=0.7)
    trace = poutine.trace(small(STATE_FAMILIES["dirichlet"], priors=priors).build(some_cells())).get_trace(
        whole(some_cells())
    )
    for molecule in MOLECULES:
        assert_close(trace.nodes[f"noise_{molecule}"]["fn"].mean, 1 / 3)
    assert isinstance(trace.nodes["z"]["fn"].base_dist, dist.StudentT)
    assert_close(trace.nodes["pi"]["fn"].concentration, 0.7)


@families
def test_minibatches_add_up_to_the_data(states: type[StateFamily], double: None) -> None:
    cells = some_cells(12)
    program = small(states).build(cells)
    values = draw(program, whole(cells))

    def part(index: Tensor) -> Tensor:
        mine = {name: v[index] if name in ("z", "pi") else v for name, v in values.items()}
        return log_joint(program, mine, cells.batch(index))

    parts = [part(index) for index in torch.randperm(12).split(3)]
    assert_close(torch.stack(parts).mean(0).detach(), log_joint(program, values, whole(cells)).detach())


@families
def test_permuting_the_cells_permutes_the_answer(states: type[StateFamily], double: None) -> None:
    cells, order = some_cells(), torch.randperm(12)
    program = small(states).build(cells)
    values = draw(program, whole(cells))
    again = {name: v[order] if name in ("z", "pi") else v for name, v in values.items()}
    one, other = scored(program, values, whole(cells)), scored(program, again, cells.batch(order))
    for name in ("z", "pi", "molecules"):
        p, q = (trace.nodes[name]["unscaled_log_prob"].detach().expand(12, -1) for trace in (one, other))
        assert_close(q, p[order])
    assert_close(other.log_prob_sum().detach(), one.log_prob_sum().detach())


N_GENES = 5


def permuted(value: Tensor, order: Tensor) -> Tensor:
    """Any tensor with its genes in another order; (u, s) side by side is an axis of 2 G. No other size is 5 or 10."""
    for axis, size in enumerate(value.shape):
        if size == N_GENES:
            value = value.index_select(axis, order)
        elif size == 2 * N_GENES:
            value = value.index_select(axis, torch.cat((order, order + N_GENES)))
    return value


# A low-rank posterior's factors run across genes, in an order of their own.
@pytest.mark.parametrize(("rates", "states"), [pair for pair in PAIRS if "low-rank" not in str(pair.id)])
def test_permuting_the_genes_permutes_the_elbo(rates: type, states: type[StateFamily], double: None) -> None:
    cells, order = some_cells(12, N_GENES), torch.tensor([3, 0, 4, 1, 2])
    other_cells = Cells(cells.molecules[..., order], cells.ratio[order])
    model, recipe = small(states), Amortized(rates=rates(), hidden=(8,), hidden_states=(6,))

    def elbo(of: Cells, load: Values | None, values: Values | None) -> tuple[Tensor, Values, Values]:
        with pyro.get_param_store().scope():
            program = model.build(of)
            guide = recipe(program)
            guide(whole(of))
            program(whole(of))
            store = pyro.get_param_store()
            mine = {name: store[name].unconstrained() for name in store}
            for name, value in (load or {}).items():
                mine[name].data.copy_(permuted(value, order))
            given = {name: permuted(value, order) for name, value in (values or {}).items()}
            q = poutine.trace(poutine.condition(guide, data=given)).get_trace(whole(of))
            drawn = {name: s["value"].detach() for name, s in q.nodes.items() if s["type"] == "sample"}
            drawn = {name: value for name, value in drawn.items() if name not in ("cells", "genes")}
            p = scored(program, drawn, whole(of))
            value = (p.log_prob_sum() - q.log_prob_sum()).detach()
            return value, {name: v.detach().clone() for name, v in mine.items()}, drawn

    one, learned, drawn = elbo(cells, None, None)
    other, _, _ = elbo(other_cells, learned, drawn)
    assert_close(other, one)
    unlike, _, _ = elbo(other_cells, None, None)
    assert (unlike - one).abs() > 1e-3, "other networks answer otherwise, so the law is not empty"


def rates_and_parts(explained: Explained, values: Values) -> tuple[Rates, list[Tensor]]:
    """The draw's rates, and u, s, velocity and t of every state, each (4, 12, 5)."""
    parts = (explained.u, explained.s, explained.velocity, explained.t)
    full = [torch.stack([torch.as_tensor(x).expand(12, 5) for x in part]).detach() for part in parts]
    return Rates(*(values[name].detach() for name in RATES)), full


@families
def test_explain_velocity(states: type[StateFamily], double: None) -> None:
    cells = some_cells()
    program = small(states).build(cells)
    values = draw(program, whole(cells))
    (alpha, beta, gamma, switch), (u, s, velocity, t) = rates_and_parts(program.explain(values, whole(cells)), values)
    assert u.shape == s.shape == velocity.shape == t.shape == (4, 12, 5)
    assert_close(velocity, beta * u - gamma * s)
    assert_close(velocity[1], 0.0)
    assert_close(velocity[3], 0.0)
    assert (velocity[0] > 0).all(), "in induction spliced RNA rises"
    assert_close(u[1], (alpha / beta).expand(12, 5))
    assert_close(s[1], (alpha / gamma).expand(12, 5))
    assert (u[3] == 0).all() and (s[3] == 0).all()
    assert ((t >= 0) & (t <= T_MAX)).all()
    assert (t[0] <= switch).all() and (t[1] == switch).all() and (t[2] >= switch).all()


@families
def test_explain_follows_the_kinetics_at_its_own_times(states: type[StateFamily], double: None) -> None:
    cells = some_cells()
    program = small(states).build(cells)
    values = draw(program, whole(cells))
    (alpha, beta, gamma, switch), (u, s, _, t) = rates_and_parts(program.explain(values, whole(cells)), values)
    on = induction(alpha, beta, gamma, t[0])
    off = repression(*induction(alpha, beta, gamma, switch), beta, gamma, t[2] - switch)
    for means, up, down in zip((u, s), on, off, strict=True):
        assert_close(means[0], up)
        assert_close(means[2], down, slack=10)


@families
def test_explain_scores_cells_as_the_model_does(states: type[StateFamily], double: None) -> None:
    cells = some_cells()
    program = small(states).build(cells)
    values = draw(program, whole(cells))
    molecules = scored(program, values, whole(cells)).nodes["molecules"]["unscaled_log_prob"]
    explained = torch.stack(program.explain(values, whole(cells)).log_joint)
    found = explained.amax(0) if states.hard else explained.logsumexp(0)
    assert_close(found.detach(), molecules.detach())


def test_c_k_narrows_the_empty_state_alone(double: None) -> None:
    cells = some_cells()
    program = small(STATE_FAMILIES["dirichlet"]).build(cells)
    values = draw(program, whole(cells))
    explained = program.explain(values, whole(cells))
    for k, c in enumerate((1.0, 1.0, 1.0, 0.1)):
        u = dist.Normal(explained.u[k] / program.ratio, c * values["noise_unspliced"]).log_prob(cells.u)
        s = dist.Normal(explained.s[k], c * values["noise_spliced"]).log_prob(cells.s)
        expected = values["pi"][..., k].log() + u + s
        assert_close(explained.log_joint[k].detach(), expected.detach())


@families
def test_the_switch_penalty_is_no_part_of_the_elbo(states: type[StateFamily], double: None) -> None:
    cells = some_cells()
    losses, with_penalty = [], []
    for weight in (0.0, 0.2, 5.0):
        torch.manual_seed(1)
        program = small(states, penalty=SwitchPenalty(weight=weight)).build(cells)
        values = draw(program, whole(cells))
        with_penalty.append(log_joint(program, values, whole(cells)).detach())
        with WithoutPenalties():
            losses.append(log_joint(program, values, whole(cells)).detach())
    assert_close(losses[1], losses[0])
    assert_close(losses[2], losses[0])
    assert_close(with_penalty[0], losses[0])
    assert with_penalty[2] < with_penalty[1] < with_penalty[0]


def test_the_penalty_is_its_formula_at_the_switch(double: None) -> None:
    cells = some_cells()
    program = small(penalty=SwitchPenalty(weight=0.3)).build(cells)
    values = draw(program, whole(cells))
    site = scored(program, values, whole(cells)).nodes["switch_penalty"]["log_prob"]
    u, s = induction(*(values[name] for name in RATES))
    start = program.start
    miss = ((u - start.switch_unspliced) / cells.ratio) ** 2 + (s - start.switch_spliced) ** 2
    assert_close(site, -0.3 * 12 * miss)


def seed_gradients(seed: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Seed 000's toy: the gradient of the loss by each gene-level value, and these values after one step."""
    torch.manual_seed(seed)
    cells, names = seed_cells(), GENE_LEVEL
    with pyro.get_param_store().scope():
        model = VelocityModel(initial=Constant(top=SEED_TOP)).build(cells)
        guide = Amortized(rates=Point())(model)
        svi = SVI(model, guide, ClippedAdam({"lr": 1e-2}), Trace_ELBO())
        svi.loss_and_grads(svi.model, svi.guide, whole(cells))
        # The logarithm has the sign of its gradient in common with the value itself.
        store = dict(pyro.get_param_store().named_parameters())
        at = {name: next(p for p in store if p.endswith(f".{name}")) for name in names}
        gradients = {name: store[at[name]].grad.clone() for name in names}
        svi.optim(store.values())
        moved = {name: pyro.get_param_store()[at[name]].detach().clone() for name in names}
    return gradients, moved


@pytest.mark.parametrize("seed", range(5))
def test_seed_000_alpha_falls_and_sigma_rises_first(seed: int, double: None) -> None:
    gradients, moved = seed_gradients(seed)
    assert (gradients["alpha"] > 10).all(), "large and positive: the loss falls with falling alpha"
    assert (moved["alpha"] < torch.tensor([0.85, 0.75, 0.55])).all()
    for molecule in MOLECULES:
        assert (gradients[f"noise_{molecule}"] < 0).all()
        assert (moved[f"noise_{molecule}"] > 0.1).all()


def test_building_leaves_no_parameters_behind() -> None:
    before = set(pyro.get_param_store().keys())
    VelocityModel().build(some_cells())
    assert set(pyro.get_param_store().keys()) == before
