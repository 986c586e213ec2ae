r"""The splicing kinetics of one gene, in closed form: how unspliced and spliced RNA rise and fall.

$$du/dt = \alpha_k - \beta u, \qquad ds/dt = \beta u - \gamma s$$

Transcription is on ($\alpha_k = \alpha$) up to the switching time $t^s$ and off after it; it may also rise or fall
gradually (`ramp_induction`), or go on and off for ever (`periodic`). Every function is exact through $\gamma = \beta$
and broadcasts over leading dimensions; genes are the last one.

References: La Manno et al. 2018 (the ODE); Bergen et al. 2020, eq. 6-9; Gayoso et al. 2023 (veloVI), eq. 3-10.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import factorial
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_velo.compiled import once

T_MAX = 20.0
"""The latest latent time (veloVI's convention); rates are per unit of it."""

POWERS: Mapping[str, int] = {"alpha": 1, "beta": 1, "gamma": 1, "alpha_1": 1, "ramp": 1, "switch_time": -1}
"""Of 1/time, in what a gene's curve is told by, by the names of its sites: what a change of the unit does to each."""


class Rates(NamedTuple):
    """The kinetics of G genes: `alpha` in abundance/time, `beta`, `gamma` in 1/time, `switch_time` in [0, t_max]."""

    alpha: Tensor
    beta: Tensor
    gamma: Tensor
    switch_time: Tensor


LAG_SERIES_BELOW = 0.1
"""Where `lag` takes the series: a difference of exponentials has lost three bits there, and its gradient six."""


def lag(beta: Tensor, gamma: Tensor, tau: Tensor) -> Tensor:
    r"""(e^{-beta tau} - e^{-gamma tau}) / (gamma - beta), smooth through gamma = beta, where it is tau e^{-beta tau}.

    Shapes: beta, gamma (G,) in 1/time; tau (..., G) in time; returns (..., G) in time.
    """
    # Compiled, expm1(x) is exp(x) - 1, and no better than a difference of exponentials, which there are already.
    return _lag(beta, gamma, tau, torch.exp(-beta * tau), torch.exp(-gamma * tau))


def _lag(beta: Tensor, gamma: Tensor, tau: Tensor, at_beta: Tensor, at_gamma: Tensor) -> Tensor:
    """The same, of exponentials that are known."""
    gap = (gamma - beta).abs() * tau
    small, large = gap.clamp_max(LAG_SERIES_BELOW), gap.clamp_min(LAG_SERIES_BELOW)
    series = torch.maximum(at_beta, at_gamma) * _mean_decay_series(small, 11 if gap.dtype == torch.float64 else 6)
    return tau * torch.where(gap < LAG_SERIES_BELOW, series, (at_beta - at_gamma).abs() / large)


def induction(alpha: Tensor, beta: Tensor, gamma: Tensor, tau: Tensor) -> tuple[Tensor, Tensor]:
    r"""(u, s) a time `tau` after transcription was switched on in an empty cell (Bergen et al. 2020, eq. 6-7).

    $u = \frac{\alpha}{\beta}(1 - e^{-\beta\tau})$,
    $s = \frac{\alpha}{\gamma}(1 - e^{-\gamma\tau}) - \alpha\,\mathrm{lag}$.

    >>> u, s = induction(*map(torch.tensor, (0.85, 0.1, 0.05, 8.0)))
    >>> round(u.item(), 2), round(s.item(), 2)
    (4.68, 1.85)
    """
    by_beta, by_gamma = torch.expm1(-beta * tau), torch.expm1(-gamma * tau)
    u = once(-alpha / beta) * by_beta
    s = once(-alpha / gamma) * by_gamma - alpha * _lag(beta, gamma, tau, by_beta + 1, by_gamma + 1)
    return u, s


def ramp_induction(
    alpha: Tensor, alpha_1: Tensor, lam: Tensor, beta: Tensor, gamma: Tensor, tau: Tensor
) -> tuple[Tensor, Tensor]:
    r"""(u, s) a time `tau` after a gene with time-dependent transcription was switched on in an empty cell.

    $\alpha(\tau) = \alpha_1 - (\alpha_1 - \alpha) e^{-\lambda\tau}$: it starts at `alpha` and nears `alpha_1`
    at the rate `lam`. With $(u_1, s_1)$ the induction at the constant rate $\alpha_1$,
    $u = u_1 - (\alpha_1 - \alpha)\,\mathrm{lag}(\beta, \lambda)$,
    $s = s_1 - (\alpha_1 - \alpha)\,\beta\,\mathrm{lag3}(\beta, \gamma, \lambda)$.

    Shapes: alpha, alpha_1 (G,) in abundance/time; lam >= 0, beta, gamma (G,) in 1/time; tau >= 0 (..., G) in time;
    returns (..., G) in abundance. With alpha_1 = alpha, lam = 0 or lam -> infinity it is `induction`, at alpha, alpha
    and alpha_1. Reference: Gayoso et al. 2023 (veloVI), the extension to time-dependent transcription.

    >>> alpha, beta, gamma, tau = map(torch.tensor, (0.85, 0.1, 0.05, 8.0))
    >>> u, s = ramp_induction(alpha, alpha / 2, torch.tensor(0.3), beta, gamma, tau)
    >>> round(u.item(), 2), round(s.item(), 2)
    (3.1, 1.37)
    """
    u, s = induction(alpha_1, beta, gamma, tau)
    rise = alpha_1 - alpha
    return u - rise * lag(beta, lam, tau), s - rise * beta * lag3(beta, gamma, lam, tau)


SERIES_BELOW = 0.5
"""Where `lag3` takes the series: quotients of differences have lost two bits there, their gradients four."""


def lag3(beta: Tensor, gamma: Tensor, lam: Tensor, tau: Tensor) -> Tensor:
    r"""The convolution of three decays, $e^{-\beta t} * e^{-\gamma t} * e^{-\lambda t}$ at tau; `lag` is that of two.

    It is the second divided difference of $x \mapsto e^{-x\tau}$ at the three rates, whose order does not matter, and
    smooth through any of them being equal; where all are, it is $\tau^2 e^{-\beta\tau} / 2$.

    Shapes: beta, gamma, lam >= 0 (G,) in 1/time; tau >= 0 (..., G) in time; returns (..., G) in time squared.
    """
    slow, middle, fast = torch.stack(torch.broadcast_tensors(beta, gamma, lam)).sort(0).values.unbind(0)
    p, q = (middle - slow) * tau, (fast - slow) * tau
    near = q < SERIES_BELOW
    # What is not taken is still computed: the series of zeros, and the quotient by one.
    series = _divided_difference(*(torch.where(near, gap, 0.0) for gap in (p, q)))
    difference = _mean_decay(p) - torch.exp(-p) * _mean_decay((fast - middle) * tau)
    quotient = difference / torch.where(near, 1.0, fast - slow)
    # The slowest decay is factored out, in two halves: tau^2 alone may overflow, and its gradient sooner.
    half = torch.exp(-slow * tau / 2)
    decay = tau * half
    return decay * torch.where(near, decay * series, half * quotient)


def _terms(like: Tensor) -> int:
    """How many terms of the series count in the precision of `like`: the first left out is below 1e-14, or 1e-8."""
    return 13 if like.dtype == torch.float64 else 8


def _mean_decay(gap: Tensor) -> Tensor:
    """(1 - e^{-gap}) / gap, the mean of e^{-x} over [0, gap], with a gradient good enough to be subtracted from."""
    small, large = gap.clamp_max(SERIES_BELOW), gap.clamp_min(SERIES_BELOW)
    series = _mean_decay_series(small, _terms(gap))
    return torch.where(gap < SERIES_BELOW, series, -torch.expm1(-large) / large)


def _mean_decay_series(gap: Tensor, terms: int) -> Tensor:
    """That many terms of (1 - e^{-gap}) / gap by Taylor's series."""
    series = torch.rsub(gap, 1, alpha=1 / terms)
    for n in range(terms - 1, 1, -1):
        series = torch.rsub(gap * series, 1, alpha=1 / n)
    return series


def _divided_difference(p: Tensor, q: Tensor) -> Tensor:
    r"""The second divided difference of $e^{-x}$ at 0, p and q in [0, 0.5], by Taylor's series about their mean.

    $e^{-m} \sum_k h_k / (k + 2)!$, with $h_k$ the complete homogeneous symmetric polynomial of the three $m - x$. As
    these add up to zero, $h_k = a h_{k-2} + b h_{k-3}$, and the sum is taken from its end as Horner's is:
    $y_k = 1 / (k + 2)! + a y_{k+2} + b y_{k+3}$ up to $y_0$. Reference: de Boor 2005, Divided differences.
    """
    a, b = (p * p - p * q + q * q) / 3, (p + q) * (2 * p - q) * (2 * q - p) / 27
    last = _terms(a) - 1
    y = {k: torch.full_like(a, 1 / factorial(k + 2)) for k in (last, last - 1)}
    y[last - 2] = a * y[last] + 1 / factorial(last)
    for k in (*range(last - 3, 1, -1), 0):
        y[k] = torch.addcmul((a * y[k + 2]).add_(1 / factorial(k + 2)), b, y[k + 3])
    return torch.exp(-(p + q) / 3) * y[0]


def repression(u0: Tensor, s0: Tensor, beta: Tensor, gamma: Tensor, tau: Tensor) -> tuple[Tensor, Tensor]:
    """(u, s) a time `tau` after transcription stopped at (u0, s0) (Bergen et al. 2020, eq. 6-7 with alpha = 0)."""
    at_beta, at_gamma = torch.exp(-beta * tau), torch.exp(-gamma * tau)
    u = u0 * at_beta
    s = s0 * at_gamma + beta * u0 * _lag(beta, gamma, tau, at_beta, at_gamma)
    return u, s


def trajectory(rates: Rates, t: Tensor) -> tuple[Tensor, Tensor]:
    """(u, s) at times `t` (..., G): induction up to the gene's switching time, repression after it."""
    alpha, beta, gamma, switch = rates
    u, s = induction(alpha, beta, gamma, torch.minimum(t, switch))
    return repression(u, s, beta, gamma, (t - switch).clamp_min(0))


def periodic(rates: Rates, phase: Tensor, period: float = T_MAX) -> tuple[Tensor, Tensor]:
    r"""(u, s) of a gene that comes on and goes off for ever, a time `phase` in [0, period] after it last came on.

    It is on for `switch_time` of each period. What a period leaves in a cell that was empty before it, $(u_P, s_P)$, on
    top of what is left of $(u_0, s_0)$, is $(u_0, s_0)$ again:
    $u_0 = \frac{u_P}{1 - e^{-\beta P}}$, $s_0 = \frac{s_P + \beta u_0\,\mathrm{lag}(P)}{1 - e^{-\gamma P}}$.

    Shapes: rates (G,), with switch_time in [0, period]; phase (..., G) in time; returns (..., G) in abundance.
    """
    _, beta, gamma, _ = rates
    whole = torch.full_like(beta, period)
    u_left, s_left = trajectory(rates, whole)
    u0 = -u_left / torch.expm1(-beta * whole)
    s0 = -(s_left + beta * u0 * lag(beta, gamma, whole)) / torch.expm1(-gamma * whole)
    old, new = repression(u0, s0, beta, gamma, phase), trajectory(rates, phase)
    return old[0] + new[0], old[1] + new[1]


def velocity(rates: Rates, u: Tensor, s: Tensor) -> Tensor:
    """ds/dt = beta u - gamma s, in abundance per unit of time."""
    return rates.beta * u - rates.gamma * s
