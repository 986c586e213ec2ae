"""Laws of the splicing kinetics: they solve their equation, everywhere, and start and end where they should."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from decimal import Decimal, localcontext
from itertools import permutations, product

import numpy as np
import pyro
import pytest
import torch
from pyro import poutine
from tolerances import TOLERANCES, assert_close
from torch import Tensor
from toys import SEED_TOP, leaf, seed_cells

from pyro_velo.initial import Constant
from pyro_velo.kinetics import (
    SERIES_BELOW,
    T_MAX,
    Rates,
    induction,
    lag,
    lag3,
    periodic,
    ramp_induction,
    repression,
    trajectory,
    velocity,
)
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


@pytest.mark.parametrize("gap", [*GAPS, 1.3e-4, 2e-4, 0.01, 0.0124, 0.0126, 0.03, 1.0])
def test_lag_and_its_gradient_keep_single_precision_through_gamma_equals_beta(gap: float) -> None:
    arguments = tuple(leaf(torch.tensor(value)) for value in (BETA, BETA + gap, 8.0))
    value = lag(*arguments)
    value.backward()
    exact = exact_lag(*(argument.item() for argument in arguments))
    assert value.item() == pytest.approx(exact[0], rel=3e-6)
    # Just above where the series ends the gradient by a rate is a difference that has lost six bits.
    for argument, derivative in zip(arguments, exact[1:], strict=True):
        assert argument.grad.item() == pytest.approx(derivative, rel=5e-5)


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
        SwitchPenalty(weight=0.2)(*induction(*rates), start, torch.ones(3), n_cells=4)
    capture.trace.compute_log_prob()
    penalty = capture.trace.nodes["switch_penalty"]["log_prob"]
    expected = torch.tensor([(8.5 - 0.85) ** 2, (7.5 - 0.75) ** 2, (5.5 - 0.55) ** 2])
    assert_close(penalty, -0.2 * 4 * expected)


# The lag of three decays


PATTERNS = {
    "two_slow": (0.0, 0.0, 1.0),
    "two_fast": (0.0, 1.0, 1.0),
    "three": (1.0, 0.0, 3.0),
    "two_and_one_far": (0.0, 1.0, 1e5),
    "one_far_and_two": (1e5, 0.0, 1e5 + 1.0),
}
"""How three rates lie, in units of a gap that may be zero; a far one is at least 5 away."""


def rate_triple(pattern: tuple[float, float, float], gap: float) -> list[float]:
    return [BETA + gap * place if place < 1e4 else BETA + 5.0 + gap * (place - 1e5) for place in pattern]


def divided_difference(nodes: Sequence[float], tau: float, by_tau: bool = False) -> float:
    """Of x -> e^{-x tau}, or of its derivative by tau, in 150 digits; nodes that are equal are taken 1e-30 apart."""
    with localcontext() as context:
        context.prec = 150
        t, x = Decimal(tau), [Decimal(node) + i * Decimal("1e-30") for i, node in enumerate(nodes)]
        row = [(-node * t).exp() * (-node if by_tau else 1) for node in x]
        for order in range(1, len(x)):
            row = [(row[i + 1] - row[i]) / (x[i + order] - x[i]) for i in range(len(row) - 1)]
        return float(row[0])


@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
@pytest.mark.parametrize("gap", [*GAPS, 0.06, 0.07, 1.0, 30.0])
@pytest.mark.parametrize("tau", [0.05, 8.0])
def test_lag3_and_its_gradient_are_exact_wherever_the_rates_lie(
    tau: float, gap: float, pattern: tuple[float, float, float]
) -> None:
    nodes = rate_triple(pattern, gap)
    *rates, time = map(leaf, doubles(*nodes, tau))
    value = lag3(*rates, time)
    value.backward()
    assert_close(value.detach() / divided_difference(nodes, tau), 1.0)
    # The derivative by a node is the divided difference with that node twice.
    for rate, node in zip(rates, nodes, strict=True):
        assert rate.grad.item() == pytest.approx(divided_difference([*nodes, node], tau), rel=1e-9)
    assert time.grad.item() == pytest.approx(divided_difference(nodes, tau, by_tau=True), rel=1e-9)


@pytest.mark.parametrize("slow", [0.0, 0.3])
@pytest.mark.parametrize("spread", [0.0, 1e-9, 0.999 * SERIES_BELOW, 1.001 * SERIES_BELOW, 4.0])
@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_lag3_passes_gradcheck(slow: float, spread: float, share: float) -> None:
    tau = torch.linspace(1.0, 1.2, 3, dtype=torch.float64)
    rates = doubles(slow, slow + share * spread, slow + spread)
    assert torch.autograd.gradcheck(lag3, tuple(map(leaf, (*rates, tau))))


def test_lag3_does_not_know_the_order_of_the_rates() -> None:
    tau = times()[:, :1]
    for nodes in ((0.1, 0.4, 3.0), (0.1, 0.1, 3.0), (0.2, 0.2 + 1e-9, 0.2)):
        first, *others = (lag3(*doubles(*order), tau) for order in permutations(nodes))
        assert all(torch.equal(first, other) for other in others)


def test_lag3_is_the_convolution_of_lag_with_a_decay() -> None:
    x, w = (torch.from_numpy(values) for values in np.polynomial.legendre.leggauss(80))
    for (beta, gamma, lam), tau in product(product(doubles(0.05, 0.4, 0.4 + 1e-9, 6.0), repeat=3), doubles(0.3, 9.0)):
        r = tau * (x + 1) / 2
        integral = tau / 2 * (w * torch.exp(-lam * (tau - r)) * lag(beta, gamma, r)).sum()
        assert_close(lag3(beta, gamma, lam, tau), integral)


def test_lag3_with_a_rate_of_zero_is_what_lag_adds_up_to() -> None:
    # s = alpha beta (1 * e^{-beta t} * e^{-gamma t}): a gene that is on is a decay that never decays.
    alpha, beta, gamma, _ = genes()
    _, s = induction(alpha, beta, gamma, times())
    assert_close(alpha * beta * lag3(beta, gamma, torch.zeros_like(beta), times()), s)


def random_rates(n: int = 40_000) -> tuple[Tensor, ...]:
    """Rates from 1e-3 to 1e3 and times from 1e-3 to 1e2, in single precision; of two thirds, two or three are close."""
    beta, gamma, lam = (10 ** (6 * torch.rand(3, n) - 3)).unbind()
    near = 1 + 10 ** (-8 * torch.rand(2, n))
    which = torch.arange(n) % 3
    gamma = torch.where(which > 0, beta * near[0], gamma)
    lam = torch.where(which > 1, beta * near[1], lam)
    return beta, gamma, lam, 10 ** (5 * torch.rand(n) - 3)


def test_lag3_in_single_precision_agrees_with_double() -> None:
    singles = tuple(map(leaf, random_rates()))
    exact = tuple(leaf(single.detach().double()) for single in singles)
    low, high = lag3(*singles), lag3(*exact)
    # Rounding x tau alone changes e^{-x tau} by a relative x tau eps.
    slowest = torch.stack(exact[:3]).min(0).values * exact[3]
    eps, kept = torch.finfo(torch.float32).eps, high > 1e-25
    assert kept.float().mean() > 0.5
    error = ((low - high) / high / (1 + slowest)).abs()[kept]
    assert error.max() < 20 * eps
    low.sum().backward()
    high.sum().backward()
    for single, double in zip(singles, exact, strict=True):
        assert single.grad.isfinite().all()
        # Over time lag3 rises and falls, and where it does neither the slope is a difference of terms like value / tau.
        size = double.grad.abs() + (high.detach() / double if double is exact[3] else 0)
        error = ((single.grad - double.grad) / size / (1 + slowest)).abs()[kept & (size > 1e-25)]
        assert error.max() < 100 * eps


@pytest.mark.parametrize("tau", [0.0, 1e-30, 1e3, 1e6, 1e30])
def test_lag3_in_single_precision_neither_overflows_nor_loses_its_gradient(tau: float) -> None:
    for nodes in product((1e-3, 0.2, 0.2 * (1 + 1e-6), 1e3), repeat=3):
        arguments = tuple(leaf(torch.tensor(value)) for value in (*nodes, tau))
        value = lag3(*arguments)
        value.backward()
        assert value.isfinite() and value >= 0
        assert all(argument.grad.isfinite() for argument in arguments)


# Time-dependent transcription


LAMBDAS = (0.0, 1e-9, 0.05, BETA, BETA * (1 + 1e-9), 0.7 * BETA, 7.0)


@pytest.mark.parametrize("factor", [0.0, 0.3, 1.0, 4.0])
@pytest.mark.parametrize("lam", LAMBDAS)
def test_the_ramp_solves_the_ode(lam: float, factor: float) -> None:
    (alpha, beta, gamma, _), tau = genes(), leaf(times())
    alpha_1, (lam,) = factor * alpha, doubles(lam)
    u, s = ramp_induction(alpha, alpha_1, lam, beta, gamma, tau)
    transcription = alpha_1 - (alpha_1 - alpha) * torch.exp(-lam * tau)
    assert_close(slope(u, tau), (transcription - beta * u).detach(), slack=10)
    assert_close(slope(s, tau), (beta * u - gamma * s).detach(), slack=10)


@pytest.mark.parametrize("lam", LAMBDAS)
def test_the_ramp_starts_empty_and_ends_in_its_last_steady_state(lam: float) -> None:
    alpha, beta, gamma, _ = genes()
    alpha_1, lam = 0.3 * alpha, torch.full_like(alpha, lam)
    u, s = ramp_induction(alpha, alpha_1, lam, beta, gamma, torch.zeros_like(alpha))
    assert (u == 0).all() and (s == 0).all()
    u, s = ramp_induction(alpha, alpha_1, lam, beta, gamma, torch.full_like(alpha, 1e-5))
    # To leading order transcription has not changed yet.
    assert_close(u / (alpha * 1e-5), 1.0, slack=1e6)
    if lam[0] > 1e-3:
        u, s = ramp_induction(alpha, alpha_1, lam, beta, gamma, torch.full_like(alpha, 2e4))
        assert_close(u, alpha_1 / beta)
        assert_close(s, alpha_1 / gamma)


@pytest.mark.parametrize("lam", LAMBDAS)
def test_a_ramp_that_goes_nowhere_is_the_induction(lam: float) -> None:
    alpha, beta, gamma, _ = genes()
    for ramp, constant in zip(
        ramp_induction(alpha, alpha, doubles(lam)[0], beta, gamma, times()),
        induction(alpha, beta, gamma, times()),
        strict=True,
    ):
        assert torch.equal(ramp, constant)


@pytest.mark.parametrize(("lam", "limit", "miss"), [(0.0, 1.0, 1e-13), (1e-9, 1.0, 1e-7), (1e9, 4.0, 1e-7)])
def test_a_slow_ramp_never_starts_and_a_fast_one_is_over_at_once(lam: float, limit: float, miss: float) -> None:
    alpha, beta, gamma, _ = genes()
    ramps = ramp_induction(alpha, 4 * alpha, doubles(lam)[0], beta, gamma, times())
    for ramp, constant in zip(ramps, induction(limit * alpha, beta, gamma, times()), strict=True):
        assert ((ramp - constant).abs() <= miss * (1 + constant)).all()


def test_ramps_add_up_and_stay_between_their_first_and_last_transcription() -> None:
    alpha, beta, gamma, _ = genes()
    (lam,) = doubles(0.2)

    def ramp(first: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
        return ramp_induction(first, last, lam, beta, gamma, times())

    for part, other, both in zip(
        ramp(alpha, 3 * alpha), ramp(alpha**2, 0 * alpha), ramp(alpha + alpha**2, 3 * alpha), strict=True
    ):
        assert_close(part + other, both)
    for low, between, high in zip(ramp(alpha, alpha), ramp(alpha, 3 * alpha), ramp(3 * alpha, 3 * alpha), strict=True):
        assert (low < between).all() and (between < high).all()


@pytest.mark.parametrize("lam", LAMBDAS)
def test_the_ramp_passes_gradcheck(lam: float) -> None:
    beta = BETA
    tau = torch.tensor([0.4, 3.0], dtype=torch.float64)
    for gamma in (BETA, 0.7 * BETA, 2.0):
        arguments = tuple(map(leaf, (*doubles(0.85, 0.3, lam + 1e-4, beta, gamma), tau)))
        assert torch.autograd.gradcheck(ramp_induction, arguments)


# A gene that goes on and off for ever


def test_the_periodic_solution_solves_the_ode_and_closes() -> None:
    rates, phase = genes(), leaf(times())
    u, s = periodic(rates, phase)
    transcription = torch.where(phase < rates.switch_time, rates.alpha, 0.0)
    assert_close(slope(u, phase), (transcription - rates.beta * u).detach(), slack=10)
    assert_close(slope(s, phase), velocity(rates, u, s).detach(), slack=10)
    ends = (periodic(rates, torch.full_like(rates.alpha, at)) for at in (0.0, T_MAX))
    for start, end in zip(*ends, strict=True):
        assert_close(start, end)


def test_a_period_makes_as_much_as_it_degrades() -> None:
    rates = genes()
    x, w = (torch.from_numpy(values)[:, None] for values in np.polynomial.legendre.leggauss(200))
    mean = [torch.zeros_like(rates.alpha), torch.zeros_like(rates.alpha)]
    for start, end in ((torch.zeros_like(rates.alpha), rates.switch_time), (rates.switch_time, T_MAX)):
        half = (end - start) / 2
        for i, values in enumerate(periodic(rates, start + half * (x + 1))):
            mean[i] = mean[i] + (half * w * values).sum(0) / T_MAX
    made = rates.alpha * rates.switch_time / T_MAX
    assert_close(mean[0], made / rates.beta, slack=100)
    assert_close(mean[1], made / rates.gamma, slack=100)


@pytest.mark.parametrize("period", [6.0, T_MAX])
def test_the_periodic_solution_is_where_every_start_ends_up(period: float) -> None:
    alpha, beta, gamma, switch = genes()
    rates = Rates(alpha, beta, gamma, switch * period / T_MAX)
    whole = torch.full_like(alpha, period)
    u, s = torch.zeros_like(alpha), torch.full_like(alpha, 5.0)
    for _ in range(int(12_000 / period)):
        old, new = repression(u, s, beta, gamma, whole), trajectory(rates, whole)
        u, s = old[0] + new[0], old[1] + new[1]
    for end, closed in zip((u, s), periodic(rates, torch.zeros_like(alpha), period), strict=True):
        assert_close(end, closed, slack=100)


def test_a_gene_that_is_never_off_stands_at_its_steady_state_and_one_never_on_is_empty() -> None:
    alpha, beta, gamma, _ = genes()
    for time_on, level in ((T_MAX, 1.0), (0.0, 0.0)):
        u, s = periodic(Rates(alpha, beta, gamma, torch.full_like(alpha, time_on)), times())
        assert_close(u, (level * alpha / beta).expand_as(u))
        assert_close(s, (level * alpha / gamma).expand_as(s))


def test_tolerances_say_how_exact_each_precision_is() -> None:
    for dtype, tolerance in TOLERANCES.items():
        assert tolerance["rtol"] > 10 * torch.finfo(dtype).eps
