r"""Where the rates start: values per gene read off the data, or constants.

Seed 000 describes the first (alpha from the median unspliced of the cells in the top percentile) and the second
(beta = 0.1, gamma = 0.05, t^s = 10). All values are on the scaled data that the model sees.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pyro_velo.batch import Cells
from pyro_velo.kinetics import T_MAX, Rates


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
