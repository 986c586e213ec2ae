r"""Where the rates start: values per gene read off the data, or constants.

Seed 000 describes the first (alpha from the median unspliced of the cells in the top percentile) and the second
(beta = 0.1, gamma = 0.05, t^s = 10). All values are on the scaled data that the model sees.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import product

import torch
from torch import Tensor

from pyro_velo.batch import Cells
from pyro_velo.kinetics import T_MAX, Rates, trajectory


@dataclass(frozen=True)
class Start:
    """Start values, all (G,): the rates, the empirical switch point (u*, s*), and what else the model has by site."""

    rates: Rates
    switch_unspliced: Tensor
    switch_spliced: Tensor
    others: Mapping[str, Tensor] = field(default_factory=dict)

    def sites(self) -> dict[str, Tensor]:
        """Start values by the name of the model's site."""
        return {**self.rates._asdict(), **self.others}


class Initialisation(ABC):
    """How the start values are found."""

    @abstractmethod
    def __call__(self, cells: Cells) -> Start:
        """Start values for the genes of `cells`."""


def top_median(values: Tensor, ranked_by: Tensor, top: float) -> Tensor:
    """Each gene's median of `values` (N, G) over the cells in the top share `top` of `ranked_by` (N, G): (G,)."""
    n_top = max(1, round(top * len(values)))
    ordered = values.gather(0, ranked_by.topk(n_top, dim=0).indices).sort(0).values
    # Tensor.median takes the lower of two middle values; seed 000's (0.8, 0.9) is 0.85.
    return (ordered[(n_top - 1) // 2] + ordered[n_top // 2]) / 2


@dataclass(frozen=True)
class SteadyState(Initialisation):
    r"""Rates from the upper steady state: gamma = beta * (slope of u on s), alpha = beta * (top cells' unspliced).

    `beta` fixes the unit of time: the relaxation time of unspliced RNA is 1/beta of the t_max = 20.
    """

    beta: float = 0.2
    switch_time: float = T_MAX / 2
    top: float = 0.05

    def __call__(self, cells: Cells) -> Start:
        """The slope is least squares through the origin over the top share of cells by u + s."""
        measured_u, s = cells.scaled
        u = measured_u * cells.ratio
        n_top = max(2, round(self.top * len(cells)))
        upper = (measured_u + s).topk(n_top, dim=0).indices
        u_top, s_top = u.gather(0, upper), s.gather(0, upper)
        # A gene without spliced RNA in its top cells has no slope: start it at gamma = beta.
        weight = (s_top * s_top).sum(0)
        slope = torch.where(weight > 0, (u_top * s_top).sum(0) / weight.clamp_min(torch.finfo(u.dtype).tiny), 1.0)
        gamma = self.beta * slope.clamp(0.02, 20.0)
        u_switch, s_switch = top_median(u, u, 0.01), top_median(s, u, 0.01)
        alpha = self.beta * u_switch.clamp_min(1e-3)
        full = torch.full_like
        rates = Rates(alpha, full(alpha, self.beta), gamma, full(alpha, self.switch_time))
        return Start(rates, u_switch, s_switch)


@dataclass(frozen=True)
class Constant(Initialisation):
    """The constants of seed 000: alpha the median unspliced of the top percentile; one beta, gamma and t^s for all."""

    beta: float = 0.1
    gamma: float = 0.05
    switch_time: float = T_MAX / 2
    top: float = 0.01

    def __call__(self, cells: Cells) -> Start:
        """Only alpha and the switch point look at the data."""
        u, s = cells.scaled
        u_switch, s_switch = top_median(u * cells.ratio, u, self.top), top_median(s, u, self.top)
        alpha, full = u_switch.clamp_min(1e-3), torch.full_like
        rates = Rates(alpha, full(alpha, self.beta), full(alpha, self.gamma), full(alpha, self.switch_time))
        return Start(rates, u_switch, s_switch)


def rough_order(u: Tensor, s: Tensor, rates: Rates) -> Tensor:
    r"""The cells' order in [0, 1] by their phase portraits, before any fit: u and s (B, G) in one unit; returns (B,).

    A cell above a gene's steady-state line is on the way up, as far as its spliced level, and below it on the way down.
    Genes count by their distance from the line: near it they don't know.
    """
    full_u = rates.alpha / rates.beta
    up, level = u / full_u, (s * rates.gamma / rates.alpha).clamp(0, 1)
    lead = up - s * rates.gamma / rates.alpha
    phase = torch.where(lead > 0, level, 2 - level)
    weight = lead.abs()
    mean = (weight * phase).sum(-1) / weight.sum(-1).clamp_min(torch.finfo(u.dtype).tiny)
    return mean.argsort().argsort().to(u.dtype) / max(1, len(mean) - 1)


BINS = 50
"""How many groups of cells, one after the other in time, are averaged before a curve is laid through them."""
ONSETS = tuple(T_MAX * share for share in (0.01, *(i / 10 for i in range(1, 9))))
SWITCHES = tuple(T_MAX * share for share in (0.05, *(i / 10 for i in range(1, 10))))
FASTER = (0.5, 1.0, 2.0, 4.0, 8.0)
STEEPER = (0.5, 1.0, 2.0)


def rates_by_order(cells: Cells, start: Rates) -> tuple[Rates, Tensor]:
    """Each gene's best of a grid of curves and onsets, if the order of the cells before a fit is a shared time.

    Without it a gene whose switch starts on the wrong side of the true one may stay there. The grid: `ONSETS`,
    `SWITCHES` after them, beta `FASTER` and gamma `STEEPER` than the start; alpha by least squares, both molecules in
    units of their range.
    """
    measured_u, s = cells.scaled
    order = rough_order(measured_u * cells.ratio, s, start) if cells.order is None else cells.order
    order = order.argsort()
    u, s = (_in_bins(x[order]) for x in (measured_u, s))
    t = T_MAX * (torch.arange(len(u), device=u.device, dtype=u.dtype)[:, None] + 0.5) / len(u)
    best, least = start, torch.full_like(start.alpha, float("inf"))
    best_onset = torch.full_like(start.alpha, ONSETS[0])
    for onset, switch, faster, steeper in product(ONSETS, SWITCHES, FASTER, STEEPER):
        if onset + switch > T_MAX:
            continue
        beta = faster * start.beta
        gamma = steeper * start.gamma * faster
        rates = Rates(torch.ones_like(beta), beta, gamma, torch.full_like(beta, switch))
        curve_u, curve_s = trajectory(rates, (t - onset).clamp_min(0))
        curve_u = curve_u / cells.ratio
        squares = (curve_u**2 + curve_s**2).sum(0)
        # Curves of some height: a gene that is never seen has none to be laid through.
        alpha = ((curve_u * u + curve_s * s).sum(0) / squares).clamp_min(1e-3)
        miss = ((alpha * curve_u - u) ** 2 + (alpha * curve_s - s) ** 2).sum(0)
        better = miss < least
        least = torch.where(better, miss, least)
        best_onset = torch.where(better, onset, best_onset)
        found = Rates(alpha, *rates[1:])
        best = Rates(*(torch.where(better, new, old) for new, old in zip(found, best, strict=True)))
    return best, best_onset


def _in_bins(values: Tensor) -> Tensor:
    """Means of `BINS` groups of consecutive rows, or fewer where there are fewer: (N, G) to (bins, G)."""
    return torch.stack([part.mean(0) for part in values.tensor_split(min(BINS, len(values)))])
