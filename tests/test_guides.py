"""One table of laws for every pair of rate guide and state family: every parameter learns, and a cell stands alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import product

import pyro
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoDelta, AutoGuide, AutoGuideList, AutoNormal
from pyro.optim import ClippedAdam
from tolerances import assert_close
from toys import some_cells, whole

from pyro_velo.batch import CELLS_AT_ONCE, Batch, Cells
from pyro_velo.guides import Amortized, AmortizedProgram
from pyro_velo.models.velocity import VelocityModel, VelocityProgram
from pyro_velo.rates import RATE_GUIDES, RateGuide
from pyro_velo.states import STATE_FAMILIES, StateFamily
from pyro_velo.times import Shared
from pyro_velo.train import parameters

# Each rate guide with the default states, and each family with the default guide: test_grid.py crosses them all.
CROSS = [*product(RATE_GUIDES, ["collapsed"]), *product(["mean-field"], STATE_FAMILIES.keys() - {"collapsed"})]
PAIRS = [pytest.param(RATE_GUIDES[r], STATE_FAMILIES[s], id=f"{r}-{s}") for r, s in sorted(CROSS)]
everyone = pytest.mark.parametrize(("rates", "states"), PAIRS)


def programs(
    cells: Cells, rates: type[RateGuide], states: type[StateFamily]
) -> tuple[VelocityProgram, AmortizedProgram]:
    program = VelocityModel(states=states(), n_latent=3, hidden=(7,)).build(cells)
    return program, Amortized(rates=rates(), hidden=(8,), hidden_states=(6,))(program)


@everyone
def test_every_parameter_gets_a_finite_gradient(rates: type[RateGuide], states: type[StateFamily]) -> None:
    cells = some_cells()
    with pyro.get_param_store().scope():
        model, guide = programs(cells, rates, states)
        svi = SVI(model, guide, ClippedAdam({"lr": 1e-3}), Trace_ELBO())
        loss = svi.loss_and_grads(svi.model, svi.guide, whole(cells))
        assert torch.tensor(loss).isfinite()
        unconstrained = dict(pyro.get_param_store().named_parameters())
        for part in ("model", "encoder", "state_decoder", "Auto"):
            assert any(name.startswith(part) for name in unconstrained), part
        for name, parameter in unconstrained.items():
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name
            assert parameter.grad.abs().sum() > 0, name


@everyone
def test_a_step_moves_every_parameter_and_a_few_lower_the_loss(
    rates: type[RateGuide], states: type[StateFamily]
) -> None:
    cells = some_cells(30)
    with pyro.get_param_store().scope():
        model, guide = programs(cells, rates, states)
        svi = SVI(model, guide, ClippedAdam({"lr": 1e-2}), Trace_ELBO())
        losses = [svi.evaluate_loss(whole(cells))]
        before = parameters()
        losses.append(svi.step(whole(cells)))
        after = parameters()
        losses += [svi.step(whole(cells)) for _ in range(60)]
    assert before.keys() == after.keys()
    for name, value in after.items():
        assert value.isfinite().all() and (value != before[name]).any(), name
    assert sum(losses[-10:]) / 10 < losses[0]


@everyone
def test_every_parameter_of_both_modules_is_in_the_param_store(
    rates: type[RateGuide], states: type[StateFamily]
) -> None:
    cells = some_cells()
    with pyro.get_param_store().scope():
        model, guide = programs(cells, rates, states)
        Trace_ELBO().loss(model, guide, whole(cells))
        stored = {id(value.unconstrained()) for value in map(pyro.get_param_store().__getitem__, parameters())}
        assert stored, "nothing would be trained"
        networks = {**dict(model.named_parameters()), **dict(guide.encoder.named_parameters(prefix="encoder"))}
        networks |= dict(guide.state_decoder.named_parameters(prefix="state_decoder"))
        for name, value in networks.items():
            assert id(value) in stored, name


@everyone
def test_the_guide_draws_the_latent_sites_of_the_model(rates: type[RateGuide], states: type[StateFamily]) -> None:
    cells = some_cells()
    with pyro.get_param_store().scope():
        model, guide = programs(cells, rates, states)
        q = poutine.trace(guide).get_trace(whole(cells))
        p = poutine.trace(poutine.replay(model, trace=q)).get_trace(whole(cells))
    drawn = {name for name in q.stochastic_nodes if not q.nodes[name]["infer"].get("is_auxiliary")}
    assert drawn - {"genes", "cells"} == set(p.stochastic_nodes) - {"genes", "cells"}
    for name in drawn - {"genes", "cells"}:
        assert q.nodes[name]["value"].shape == p.nodes[name]["value"].shape, name
        # The same plates on both sides, or the KL would be weighted wrongly.
        frames = [{(f.name, f.dim, f.size) for f in t.nodes[name]["cond_indep_stack"]} for t in (p, q)]
        assert frames[0] == frames[1], name


def of_cells(guide: AmortizedProgram, batch: Batch) -> tuple[torch.Tensor, ...]:
    """Mean and sd of q(z), and what the network says of the states at the mean."""
    z = poutine.trace(guide).get_trace(batch).nodes["z"]["fn"].base_dist
    shape = (len(batch.index), 1, -1)
    at_mean = poutine.condition(guide, data={"z": z.loc})
    pi = poutine.trace(poutine.trace(at_mean)).get_trace(batch).nodes["pi"]
    # A Dirichlet, a Normal of logits, or a point.
    q = getattr(pi["fn"], "concentration", None)
    if q is None:
        q = getattr(getattr(pi["fn"], "base_dist", None), "loc", pi["value"])
    return z.loc.reshape(shape).detach(), z.scale.reshape(shape).detach(), q.detach()


@everyone
def test_what_is_said_of_a_cell_does_not_depend_on_its_neighbours_in_the_batch(
    rates: type[RateGuide], states: type[StateFamily], double: None
) -> None:
    cells = some_cells()
    with pyro.get_param_store().scope():
        _, guide = programs(cells, rates, states)
        among_all = of_cells(guide, whole(cells))
        for index in ([3], [3, 7], [11, 7, 3, 0]):
            among_few = of_cells(guide, cells.batch(torch.tensor(index)))
            for few, all_ in zip(among_few, among_all, strict=True):
                assert_close(few, all_[index])
    assert not torch.equal(among_all[0][3], among_all[0][7]), "cells that differ are told apart"


@pytest.mark.parametrize(("unit", "zero"), [(1e-3, 0.0), (40.0, 7.0)])
def test_what_is_said_of_a_cell_does_not_depend_on_the_units_that_covariates_are_in(
    unit: float, zero: float, double: None
) -> None:
    cells, told = some_cells(30, 4), torch.rand(30, 2)
    said = []
    for covariates in (told, zero + unit * told):
        torch.manual_seed(0)
        data = replace(cells, covariates=covariates)
        guide = Amortized()(VelocityModel().build(data))
        with pyro.get_param_store().scope():
            said.append(guide.encode(whole(data)))
    assert_close(said[1].mean, said[0].mean)
    assert_close(said[1].stddev, said[0].stddev)


def test_what_an_encoder_is_told_has_mean_0_and_sd_1_but_for_what_does_not_vary(double: None) -> None:
    molecules = torch.rand(2, CELLS_AT_ONCE + 3, 3)
    molecules[1, :, 2] = 0.3
    cells = Cells(molecules)
    seen = VelocityModel().build(cells).standardised(whole(cells).seen)
    assert_close(seen[:, :5].mean(0), 0.0)
    assert_close(seen[:, :5].std(0, correction=0), 1.0)
    assert (seen[:, 5] == seen[0, 5]).all()
    as_it_is = VelocityModel(times=Shared()).build(cells).standardised(whole(cells).seen)
    assert (as_it_is == whole(cells).seen).all()


def test_one_recipe_serves_any_number_of_fits() -> None:
    recipe = Amortized()
    few, many = (VelocityModel().build(some_cells(9, n_genes)) for n_genes in (2, 6))
    assert recipe(few).n_genes == 2 and recipe(many).n_genes == 6


def normal(program: VelocityProgram) -> AutoGuide:
    return AutoNormal(program)


def normal_and_point(program: VelocityProgram) -> AutoGuide:
    """At the collapsed family's `pi` stand parameters of a bound: a guide that spreads them would add their entropy."""
    guide = AutoGuideList(program)
    guide.append(AutoNormal(poutine.block(program, hide=["pi"])))
    guide.append(AutoDelta(poutine.block(program, expose=["pi"])))
    return guide


@pytest.mark.parametrize(
    ("states", "recipe"), [("dirichlet", normal), ("collapsed", normal), ("collapsed", normal_and_point)]
)
def test_a_guide_of_the_users_own_works(states: str, recipe: Callable[[VelocityProgram], AutoGuide]) -> None:
    """Pyro's autoguides in place of all of it: the model is an ordinary Pyro program."""
    cells = some_cells(6, 3)
    program = VelocityModel(states=STATE_FAMILIES[states](), n_latent=2, hidden=(5,)).build(cells)
    with pyro.get_param_store().scope():
        guide = recipe(program)
        svi = SVI(program, guide, ClippedAdam({"lr": 0.02}), Trace_ELBO())
        losses = [svi.step(whole(cells)) for _ in range(80)]
        log_weights = program.recipe.states.log_weights(guide.median(whole(cells))["pi"])
    assert torch.tensor(losses).isfinite().all()
    assert sum(losses[-20:]) < sum(losses[:20])
    assert (log_weights.logsumexp(0) <= 1e-5).all(), "the states' weights sum to one, or, in a bound, to less"
