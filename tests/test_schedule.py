"""The KL weight, the penalties and the plateau."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

from pyro_velo.schedule import SMALLEST, KLWeight, Plateau, Warmup, WithoutPenalties


def program() -> None:
    """One site of each kind, each of log-density -1 a cell and gene."""
    minus = dist.Unit(torch.tensor(-1.0))
    genes, cells = pyro.plate("genes", 3, dim=-1), pyro.plate("cells", 4, dim=-2)
    nothing = torch.empty(0)
    pyro.sample("rate", dist.Delta(torch.tensor(1.0), log_density=-1.0))
    with genes:
        pyro.sample("always", minus, obs=nothing, infer={"penalty": False})
        pyro.sample("annealed", minus, obs=nothing, infer={"penalty": True})
    with cells:
        pyro.sample("z", dist.Delta(torch.tensor(1.0), log_density=-1.0))
        with genes:
            pyro.sample("pi", dist.Delta(torch.tensor(1.0), log_density=-1.0))
            pyro.sample("pi_kl", minus, obs=nothing, infer={"kl": True})
            pyro.sample("x", minus, obs=nothing)


def densities(handler) -> dict[str, float]:
    with handler:
        trace = poutine.trace(program).get_trace()
    trace.compute_log_prob()
    return {name: float(site["log_prob_sum"]) for name, site in trace.nodes.items() if "log_prob_sum" in site}


PLAIN = {"rate": -1, "always": -3, "annealed": -3, "z": -4, "pi": -12, "pi_kl": -12, "x": -12}


@pytest.mark.parametrize("weight", [0.25, 1.0, 0.0])
def test_only_the_kl_of_cells_is_weighted_and_annealed_penalties_fade(weight):
    found = densities(KLWeight(weight))
    kl, fading = max(weight, SMALLEST), max(1 - weight, SMALLEST)
    expected = PLAIN | {name: PLAIN[name] * kl for name in ("z", "pi", "pi_kl")} | {"annealed": -3 * fading}
    assert {name: found[name] for name in PLAIN} == pytest.approx(expected)


def test_the_elbo_that_is_compared_is_at_weight_one_without_penalties():
    found = densities(WithoutPenalties())
    assert {name: found[name] for name in PLAIN} == PLAIN | {"always": 0, "annealed": 0}
    with Warmup(1000).at(0):
        pass  # the weight of a step ends with it
    assert densities(Warmup(1000).done()) == found


@pytest.mark.parametrize("steps", [0, 1, 7])
def test_the_weight_rises_to_one_and_stays(steps):
    weights = [Warmup(steps).weight(step) for step in range(20)]
    assert weights == sorted(weights) and weights[max(steps - 1, 0) :] == [1.0] * (20 - max(steps - 1, 0))
    assert min(weights) > 0


def run(plateau: Plateau, values: list[float], *, warm: bool = True) -> list[tuple[bool, bool]]:
    """For every evaluation, whether it was the best and whether the rate was lowered."""
    return [(plateau.improves(value, warm=warm), plateau.lower_rate(due=False)) for value in values]


def test_one_plateau_lowers_the_rate_and_the_next_ends_the_fit():
    plateau = Plateau(patience=2)
    assert run(plateau, [1.0, 0.5]) == [(True, False), (False, False)]
    assert run(plateau, [0.9]) == [(False, True)] and not plateau.finished
    assert run(plateau, [0.9, 2.0, 1.0]) == [(False, False), (True, False), (False, False)]
    assert not plateau.finished
    assert run(plateau, [1.9]) == [(False, False)]
    assert plateau.finished and plateau.best == 2.0


def test_a_rate_that_is_due_is_lowered_once():
    plateau = Plateau(patience=5)
    assert [plateau.lower_rate(due=due) for due in (False, True, True)] == [False, True, False]


def test_nothing_is_waited_for_while_the_kl_comes_in():
    plateau = Plateau(patience=1)
    assert run(plateau, [3.0, 2.0, 1.0, 0.0], warm=False)[-1] == (False, False)
    assert plateau.waited == 0 and plateau.best == 3.0


def test_a_plateau_starts_below_every_number():
    assert Plateau().improves(-math.inf, warm=True) is False
    assert Plateau().improves(-1e300, warm=True) is True


# What the KL rises to, how often, and from where


def test_the_defaults_are_the_schedule_of_before():
    """Bit for bit: 1 at the end of one rise, and penalties that fade as it comes in."""
    for steps in (0, 1, 3, 750):
        for step in (0, 1, 2, 374, 749, 750, 2000):
            before = min(1.0, (step + 1) / steps) if steps else 1.0
            assert Warmup(steps).weight(step) == before
            with Warmup(steps).at(step), poutine.trace() as found:
                program()
            with KLWeight(before), poutine.trace() as expected:
                program()
            scales = [{n: s["scale"] for n, s in t.trace.nodes.items() if "scale" in s} for t in (found, expected)]
            assert scales[0] == scales[1]


def test_beta_is_what_the_weight_rises_to_and_penalties_fade_all_the_same():
    warmup = Warmup(4, beta=20.0)
    assert [warmup.weight(step) for step in (0, 1, 3, 50)] == [5.0, 10.0, 20.0, 20.0]
    with warmup.at(3), poutine.trace() as traced:
        program()
    traced.trace.compute_log_prob()
    found = {name: float(site["log_prob_sum"]) for name, site in traced.trace.nodes.items() if "log_prob_sum" in site}
    expected = {"z": -80, "pi": -240, "pi_kl": -240, "x": -12, "always": -3, "annealed": -3 * SMALLEST, "rate": -1}
    assert {name: found[name] for name in expected} == pytest.approx(expected)


@pytest.mark.parametrize(("cycles", "share"), [(4, 0.5), (3, 1.0), (5, 0.2)])
def test_cycles_are_those_of_the_paper(cycles, share):
    """Fu et al. 2019: tau = mod(t - 1, ceil(T/M)) / (T/M), linear up to 1 at tau = R; here the first step is not 0."""
    total = 60 * cycles
    length, rise = 60, round(share * 60)
    warmup = Warmup(rise, cycles=cycles, length=length)
    weights = [warmup.weight(step) for step in range(total)]
    tau = [(step % length) / length for step in range(total)]
    assert weights == pytest.approx([min(1.0, (t + 1 / length) / (rise / length)) for t in tau])
    assert weights[:60] * cycles == weights
    # From the last rise on it stays, and a run may be as long as it likes.
    assert warmup.settled == total - length + rise
    assert all(warmup.weight(step) == 1 for step in range(warmup.settled, 3 * total))


def test_a_penalty_that_has_faded_does_not_come_back_with_a_cycle():
    warmup, annealed = Warmup(2, cycles=2, length=4), []
    for step in range(8):
        with warmup.at(step), poutine.trace() as traced:
            program()
        annealed.append(traced.trace.nodes["annealed"]["scale"])
    assert annealed == [0.5, *[SMALLEST] * 7]


# Free bits

LOC = torch.tensor([[2.0, 0.1, 0.0], [-2.0, 0.3, 0.0]])
SCALE = torch.tensor([[0.3, 0.9, 1.0], [0.5, 1.1, 1.0]])


def two_cells():
    """A model of two cells out of ten with three latent dimensions, and its guide with leaves to differentiate by."""
    loc, scale = LOC.clone().requires_grad_(), SCALE.clone().requires_grad_()

    def model():
        with pyro.plate("cells", 10, subsample=torch.arange(2), dim=-2):
            z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=torch.zeros(2, 1))

    def guide():
        with pyro.plate("cells", 10, subsample=torch.arange(2), dim=-2):
            pyro.sample("z", dist.Normal(loc.unsqueeze(-2), scale.unsqueeze(-2)).to_event(1))

    return model, guide, loc, scale


def loss_of(model, guide, warmup, seed=0):
    torch.manual_seed(seed)
    with warmup.at(0), pyro.validation_enabled(False):
        return pyro.infer.Trace_ELBO().differentiable_loss(model, guide)


def reconstruction(model, guide, seed=0):
    torch.manual_seed(seed)
    drawn = poutine.trace(guide).get_trace()
    traced = poutine.trace(poutine.replay(model, trace=drawn)).get_trace()
    traced.compute_log_prob()
    return traced.nodes["x"]["log_prob_sum"]


def number(loss):
    return float(loss.detach())


KL = (LOC**2 + SCALE**2 - 1) / 2 - SCALE.log()


@pytest.mark.parametrize("nats", [0.05, 1.0, 50.0])
@pytest.mark.parametrize("beta", [1.0, 4.0])
def test_free_bits_are_the_formula(nats, beta):
    model, guide, *_ = two_cells()
    expected = -reconstruction(model, guide) + beta * 10 * KL.mean(0).clamp_min(nats).sum()
    assert number(loss_of(model, guide, Warmup(0, beta=beta, free_bits=nats))) == pytest.approx(
        number(expected), rel=1e-5
    )


def test_a_dimension_below_its_free_bits_has_no_gradient_of_its_kl():
    assert (KL.mean(0) > 0.05).tolist() == [True, False, False]
    model, guide, loc, scale = two_cells()
    loss = loss_of(model, guide, Warmup(0, free_bits=0.05))
    alone = -reconstruction(model, guide)
    with_kl, without = (torch.autograd.grad(each, [loc, scale]) for each in (loss, alone))
    for found, bare, slope in zip(with_kl, without, (LOC, SCALE - 1 / SCALE), strict=True):
        torch.testing.assert_close(found[:, 1:], bare[:, 1:])
        # The mean over 2 cells, of a KL that stands for 10.
        torch.testing.assert_close(found[:, 0] - bare[:, 0], 5 * slope[:, 0])


def test_where_every_dimension_costs_more_free_bits_are_the_kl_without_its_noise():
    model, guide, *_ = two_cells()
    nats = float(KL.mean(0)[1]) / 2
    cells = [model, guide]
    # The third dimension is the prior itself, at no cost: it costs its free bits.
    floor = 10 * nats
    free = [number(loss_of(*cells, Warmup(0, free_bits=nats), seed)) for seed in range(100)]
    plain = [number(loss_of(*cells, Warmup(0), seed)) for seed in range(100)]
    difference = torch.tensor(free) - torch.tensor(plain)
    assert abs(difference.mean() - floor) < 5 * difference.std() / 10
    assert torch.tensor(free).std() < torch.tensor(plain).std()


def test_a_correlated_posterior_is_one_group_of_its_dimensions():
    root = torch.tensor([[1.0, 0.0], [0.5, 0.8]])

    def model():
        with pyro.plate("cells", 4, dim=-1):
            pyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))

    def guide():
        with pyro.plate("cells", 4, dim=-1):
            pyro.sample("z", dist.MultivariateNormal(torch.zeros(4, 2), scale_tril=root))

    for nats, expected in ((10.0, 4 * 20.0), (1e-6, None)):
        torch.manual_seed(0)
        plain = float(pyro.infer.Trace_ELBO().loss(model, guide))
        found = float(loss_of(model, guide, Warmup(0, free_bits=nats)))
        assert found == pytest.approx(plain if expected is None else expected, rel=1e-5)


def test_the_states_and_the_rates_pay_for_every_bit():
    """Only latent sites of the cells alone are given any."""
    plain, free = densities(Warmup(0).at(0)), densities(Warmup(0, free_bits=100.0).at(0))
    assert {name for name in plain if plain[name] != free[name]} == {"z"}
