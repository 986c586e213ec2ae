r"""The splicing kinetics of one gene, in closed form: how unspliced and spliced RNA rise and fall.

$$du/dt = \alpha_k - \beta u, \qquad ds/dt = \beta u - \gamma s$$

Transcription is on ($\alpha_k = \alpha$) up to the switching time $t^s$ and off after it. Every function is exact
through $\gamma = \beta$ and broadcasts over leading dimensions; genes are the last one.

References: La Manno et al. 2018 (the ODE); Bergen et al. 2020, eq. 6-9; Gayoso et al. 2023 (veloVI), eq. 3-10.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

T_MAX = 20.0
"""The latest latent time (veloVI's convention); rates are per unit of it."""


class Rates(NamedTuple):
    """The kinetics of G genes: `alpha` in abundance/time, `beta`, `gamma` in 1/time, `switch_time` in [0, t_max]."""

    alpha: Tensor
    beta: Tensor
    gamma: Tensor
    switch_time: Tensor


def lag(beta: Tensor, gamma: Tensor, tau: Tensor) -> Tensor:
    r"""(e^{-beta tau} - e^{-gamma tau}) / (gamma - beta), smooth through gamma = beta, where it is tau e^{-beta tau}.

    Shapes: beta, gamma (G,) in 1/time; tau (..., G) in time; returns (..., G) in time.
    """
    gap = (gamma - beta).abs() * tau
    # The slower decay is factored out, so the exponent stays negative and nothing overflows.
    # Below 1e-3 the quotient's gradient would be a difference of equal numbers, so the series takes over.
    small, large = gap.clamp_max(1e-3), gap.clamp_min(1e-3)
    ratio = torch.where(gap > 1e-3, -torch.expm1(-large) / large, 1 - small / 2 * (1 - small / 3 * (1 - small / 4)))
    return tau * torch.exp(-torch.minimum(beta, gamma) * tau) * ratio


def induction(alpha: Tensor, beta: Tensor, gamma: Tensor, tau: Tensor) -> tuple[Tensor, Tensor]:
    r"""(u, s) a time `tau` after transcription was switched on in an empty cell (Bergen et al. 2020, eq. 6-7).

    $u = \frac{\alpha}{\beta}(1 - e^{-\beta\tau})$,
    $s = \frac{\alpha}{\gamma}(1 - e^{-\gamma\tau}) - \alpha\,\mathrm{lag}$.

    >>> u, s = induction(*map(torch.tensor, (0.85, 0.1, 0.05, 8.0)))
    >>> round(u.item(), 2), round(s.item(), 2)
    (4.68, 1.85)
    """
    u = -alpha / beta * torch.expm1(-beta * tau)
    s = -alpha / gamma * torch.expm1(-gamma * tau) - alpha * lag(beta, gamma, tau)
    return u, s


def repression(u0: Tensor, s0: Tensor, beta: Tensor, gamma: Tensor, tau: Tensor) -> tuple[Tensor, Tensor]:
    """(u, s) a time `tau` after transcription stopped at (u0, s0) (Bergen et al. 2020, eq. 6-7 with alpha = 0)."""
    u = u0 * torch.exp(-beta * tau)
    s = s0 * torch.exp(-gamma * tau) + beta * u0 * lag(beta, gamma, tau)
    return u, s


def trajectory(rates: Rates, t: Tensor) -> tuple[Tensor, Tensor]:
    """(u, s) at times `t` (..., G): induction up to the gene's switching time, repression after it."""
    alpha, beta, gamma, switch = rates
    u, s = induction(alpha, beta, gamma, torch.minimum(t, switch))
    return repression(u, s, beta, gamma, (t - switch).clamp_min(0))


def velocity(rates: Rates, u: Tensor, s: Tensor) -> Tensor:
    """ds/dt = beta u - gamma s, in abundance per unit of time."""
    return rates.beta * u - rates.gamma * s
