"""Laws of the splicing kinetics: they solve their equation, everywhere, and start and end where they should."""

from __future__ import annotations

from dataclasses import replace
from decimal import Decimal, localcontext

import pyro
import pytest
import torch
from pyro import poutine
from tolerances import TOLERANCES, assert_close
from torch import Tensor
from toys import SEED_TOP, leaf, seed_cells

from pyro_velo.initial import Constant
from pyro_velo.kinetics import T_MAX, Rates, induction, lag, repression, trajectory, velocity
from pyro_velo.models.velocity import SwitchPenalty

BETA = 0.3
GAPS = (0.0, 1e-12, 1e-9, 1e-8, 1e-7, 2e-7, 1e-6, 1e-5, 1e-4, 1e-3, 0.1)
"""|gamma - beta|, on both sides of where `lag` changes from its limit to its formula."""


def doubles(*values: float) -> tuple[Tensor, ...]:
    return tuple(torch.tensor(value, dtype=torch.float64) for value in values)


def genes() -> Rates:
    """gamma below, far below, above, far above, just beside and at beta; each with another switching time."""
    beta = torch.full((6,), BETA, dtype=torch.float64)
    gamma = beta * torch.tensor([0.7, 0.01, 1.5, 40.0, 1 + 1e-9, 1.0], dtype=torch.float64)
    alpha, switch = torch.linspace(0.2, 2.0, 6, dtype=torch.float64), torch.linspace(2.0, 17.0, 6, dtype=torch.float64)
    return Rates(alpha, beta, gamma, switch)


def times() -> Tensor:
    """Times (T, G) that are no gene's switching time."""
    return torch.linspace(0.01, T_MAX, 40, dtype=torch.float64)[:, None].repeat(1, 6)


def states(rates: Rates, tau: Tensor) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """(u, s, transcription) of each state, a time `tau` after its start."""
    alpha, beta, gamma, _ = rates
    zero = torch.zeros_like(tau)
    top = (alpha / beta, alpha / gamma)
    # A steady state is where the flow stands still: the same flows, from there.
    off, on = repression(*top, beta, gamma, tau), induction(alpha, beta, gamma, tau)
    return {
        "induction": (*on, alpha),
        "induction steady state": (off[0] + on[0], off[1] + on[1], alpha),
        "repression": (*repression(0.6 * top[0], 0.4 * top[1], beta, gamma, tau), zero),
        "repression steady state": (*repression(zero, zero, beta, gamma, tau), zero),
    }


def slope(values: Tensor, tau: Tensor) -> Tensor:
    return torch.autograd.grad(values.sum(), tau, retain_graph=True)[0]


@pytest.mark.parametrize("state", ["induction", "induction steady state", "repression", "repression steady state"])
def test_every_state_solves_the_ode(state: str) -> None:
    rates, tau = genes(), leaf(times())
    u, s, transcription = states(rates, tau)[state]
    assert_close(slope(u, tau), (transcription - rates.beta * u).detach(), slack=10)
    assert_close(slope(s, tau), velocity(rates, u, s).detach(), slack=10)


@pytest.mark.parametrize("at", [0, 1], ids=["steady", "empty"])
def test_a_steady_state_stands_still(at: int) -> None:
    rates, tau = genes(), times()
    name = ("induction steady state", "repression steady state")[at]
    u, s, _ = states(rates, tau)[name]
    assert_close(u, (rates.alpha / rates.beta * (1 - at)).expand_as(u))
    assert_close(s, (rates.alpha / rates.gamma * (1 - at)).expand_as(s))
    assert_close(velocity(rates, u, s), 0.0)


def exact_lag(beta: float, gamma: float, tau: float) -> tuple[float, float, float, float]:
    """The lag and its derivatives by beta, gamma and tau, in 60 digits."""
    with localcontext() as context:
        context.prec = 60
        b, g, t = Decimal(beta), Decimal(gamma), Decimal(tau)
        at_b, at_g, gap = (-b * t).exp(), (-g * t).exp(), g - b
        if gap == 0:
            return tuple(map(float, (t * at_b, -t * t * at_b / 2, -t * t * at_b / 2, at_b - b * t * at_b)))
        value = (at_b - at_g) / gap
        by_beta, by_gamma = (value - t * at_b) / gap, (t * at_g - value) / gap
        return tuple(map(float, (value, by_beta, by_gamma, (g * at_g - b * at_b) / gap)))


@pytest.mark.parametrize("side", [-1, 1])
@pytest.mark.parametrize("gap", GAPS)
@pytest.mark.parametrize("tau", [0.05, 8.0])
def test_lag_and_its_gradient_are_exact_through_gamma_equals_beta(tau: float, gap: float, side: int) -> None:
    arguments = tuple(map(leaf, doubles(BETA, BETA + side * gap, tau)))
    value = lag(*arguments)
    value.backward()
    exact = exact_lag(*(argument.item() for argument in arguments))
    assert_close(value.detach(), exact[0])
    # The limit's gradient is of first order in gap * tau, which is at most 1e-6 there.
    for argument, derivative in zip(arguments, exact[1:], strict=True):
        assert argument.grad.item() == pytest.approx(derivative, rel=1e-6)


@pytest.mark.parametrize("gap", GAPS)
def test_expression_beside_gamma_equals_beta_is_that_at_it(gap: float) -> None:
    alpha, beta, tau = doubles(0.85, BETA, 8.0)
    s = {g: induction(alpha, beta, beta + g, tau)[1] for g in (-gap, 0.0, gap)}
    # The function is smooth in gamma, so both sides are near the middle, in proportion to the gap.
    slope_bound = 2 * alpha * tau**2
    assert all((value - s[0.0]).abs() <= slope_bound * gap + 1e-14 for value in s.values())


@pytest.mark.parametrize("tau", [1e3, 1e6, 1e30])
@pytest.mark.parametrize("beta", [1e-3, 0.2, 1e3])
@pytest.mark.parametrize("gamma", [1e-3, 0.2, 1e3])
def test_single_precision_neither_overflows_nor_loses_its_gradient(tau: float, beta: float, gamma: float) -> None:
    arguments = tuple(leaf(torch.tensor(value)) for value in (0.85, beta, gamma, tau))
    on = induction(*arguments)
    off = repression(torch.tensor(4.0), torch.tensor(2.0), *arguments[1:])
    for value in (*on, *off):
        assert value.isfinite() and value >= 0
    sum((*on, *off)).backward()
    assert all(argument.grad.isfinite() for argument in arguments)


def test_single_precision_agrees_with_double() -> None:
    rates, t = genes(), times()
    single = trajectory(Rates(*(rate.float() for rate in rates)), t.float())
    for low, high in zip(single, trajectory(rates, t), strict=True):
        assert_close(low, high.float(), slack=10)


@pytest.mark.parametrize(("first", "second"), [(0.5, 3.0), (4.0, 9.0), (0.0, 2.0)])
def test_flows_compose(first: float, second: float) -> None:
    alpha, beta, gamma, _ = genes()
    first, second = doubles(first, second)

    def on(u: Tensor, s: Tensor, tau: Tensor) -> tuple[Tensor, Tensor]:
        # The equation is linear: what was there decays, what is new comes on top.
        old, new = repression(u, s, beta, gamma, tau), induction(alpha, beta, gamma, tau)
        return old[0] + new[0], old[1] + new[1]

    def off(u: Tensor, s: Tensor, tau: Tensor) -> tuple[Tensor, Tensor]:
        return repression(u, s, beta, gamma, tau)

    start = alpha / beta * 0.3, alpha / gamma * 0.8
    for flow in (on, off):
        for twice, once in zip(flow(*flow(*start, first), second), flow(*start, first + second), strict=True):
            assert_close(twice, once)
    for twice, once in zip(
        on(*induction(alpha, beta, gamma, first), second), induction(alpha, beta, gamma, first + second), strict=True
    ):
        assert_close(twice, once)


def test_induction_starts_empty_and_ends_in_the_steady_state() -> None:
    alpha, beta, gamma, _ = genes()
    u, s = induction(alpha, beta, gamma, torch.zeros_like(alpha))
    assert (u == 0).all() and (s == 0).all()
    tau = torch.tensor(1e-4, dtype=torch.float64)
    u, s = induction(alpha, beta, gamma, tau)
    # To leading order u = alpha tau and s = alpha beta tau^2 / 2; what is left out is of relative order gamma tau.
    assert ((u / (alpha * tau) - 1).abs() < beta * tau).all()
    assert ((s / (alpha * beta * tau**2 / 2) - 1).abs() < (beta + gamma) * tau).all()
    u, s = induction(alpha, beta, gamma, torch.tensor(2e4, dtype=torch.float64))
    assert_close(u, alpha / beta)
    assert_close(s, alpha / gamma)


def test_repression_starts_where_it_was_switched_off_and_ends_empty() -> None:
    alpha, beta, gamma, _ = genes()
    u0, s0 = alpha / beta * 0.5, alpha / gamma * 0.2
    u, s = repression(u0, s0, beta, gamma, torch.zeros_like(alpha))
    assert (u == u0).all() and (s == s0).all()
    for value in repression(u0, s0, beta, gamma, torch.tensor(2e4, dtype=torch.float64)):
        assert_close(value, 0.0)


def test_the_trajectory_is_continuous_at_the_switch_where_only_transcription_jumps() -> None:
    rates = genes()
    sides = []
    for step in (-1e-12, 0.0, 1e-12):
        t = leaf(rates.switch_time + step)
        u, s = trajectory(rates, t)
        sides.append((u.detach(), s.detach(), slope(u, t), slope(s, t)))
    before, at, after = sides
    at_switch = induction(*rates)
    for value, expected in zip(at[:2], at_switch, strict=True):
        assert (value == expected).all()
    for side in (before, after):
        for i in range(2):
            assert_close(side[i], at[i], slack=100)
    # The slope of u falls by alpha; that of s, the velocity, is continuous.
    assert_close(before[2] - after[2], rates.alpha, slack=100)
    assert_close(before[3], after[3], slack=100)


def test_the_velocity_is_the_slope_of_the_trajectory() -> None:
    rates, t = genes(), leaf(times())
    u, s = trajectory(rates, t)
    assert_close(slope(s, t), velocity(rates, u, s).detach(), slack=10)
    on = t < rates.switch_time
    assert (velocity(rates, u, s)[on] > 0).all(), "spliced RNA rises as long as its gene is on"


def test_seed_000_predicts_cell_1_gene_a() -> None:
    u, s = induction(*doubles(0.85, 0.1, 0.05, 8.0))
    assert (round(u.item(), 2), round(s.item(), 2)) == (4.68, 1.85)


def test_seed_000_switch_penalty(double: None) -> None:
    start = Constant(top=SEED_TOP)(seed_cells())
    # The seed takes u at the switch to be the steady state's 8.5: a switch that never comes.
    rates = start.rates._replace(switch_time=torch.full_like(start.rates.alpha, 1e4))
    start = replace(start, rates=rates, switch_spliced=rates.alpha / rates.gamma)
    with poutine.trace() as capture, pyro.plate("genes", 3, dim=-1):
        SwitchPenalty(weight=0.2)(rates, start, torch.ones(3), n_cells=4)
    capture.trace.compute_log_prob()
    penalty = capture.trace.nodes["switch_penalty"]["log_prob"]
    expected = torch.tensor([(8.5 - 0.85) ** 2, (7.5 - 0.75) ** 2, (5.5 - 0.55) ** 2])
    assert_close(penalty, -0.2 * 4 * expected)


def test_tolerances_say_how_exact_each_precision_is() -> None:
    for dtype, tolerance in TOLERANCES.items():
        assert tolerance["rtol"] > 10 * torch.finfo(dtype).eps
