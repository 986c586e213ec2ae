r"""The guide of the rates where every gene has a time of its own, in a unit that is known as far as genes agree on it.

With $(\alpha, \beta, \gamma)$ faster by $e^{\lambda}$ and all times shorter by as much, a gene's curve is the same. So
a gene has a shape and a unit, beta's, and its rates and switching time $\theta_g$ are drawn as

$$\log\theta_g = m_g + L_g \epsilon_g \pm (\lambda_g + \lambda), \qquad \epsilon \sim \mathcal{N}(0, I), \quad
\lambda_g \sim q_g, \quad \lambda \sim \mathcal{N}(0, v^2)$$

with $\lambda$ that of the clock by which genes are told their units. `time_units` finds the numbers. Where a
prior ends, as that of switching times does, the Normal of its site ends there, too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_velo.batch import Batch
from pyro_velo.guides import TIME_UNIT
from pyro_velo.kinetics import POWERS


class Marginal(NamedTuple):
    """A density of lambda on a grid: `grid` (M,), equally spaced, and each gene's distribution function (G, M)."""

    grid: Tensor
    cumulative: Tensor

    @classmethod
    def of(cls, grid: Tensor, log_density: Tensor) -> Marginal:
        """From its logarithm (G, M), which is not normalised."""
        cumulative = torch.softmax(log_density.double(), -1).cumsum(-1)
        return cls(grid, (cumulative / cumulative[:, -1:]).to(grid))

    def at(self, level: Tensor) -> Tensor:
        """The quantile of each gene's level (G,), in between linearly."""
        above = torch.searchsorted(self.cumulative, level[:, None]).clamp(1, len(self.grid) - 1)
        low, high = (self.cumulative.gather(1, each)[:, 0] for each in (above - 1, above))
        share = ((level - low) / (high - low).clamp_min(torch.finfo(low.dtype).tiny)).clamp(0, 1)
        return self.grid[above[:, 0] - 1] + share * (self.grid[1] - self.grid[0])


FAR = 5.0
"""Standard deviations from which on an end of a support cuts nothing off."""


class Shape(NamedTuple):
    """`loc` (G, K), the logarithms of `sites`, and a root of their covariance (G, K, K), the unit held fixed.

    `most` (K,): the logarithm of the most that a prior lets each site be (infinite: anything).
    """

    sites: tuple[str, ...]
    loc: Tensor
    root: Tensor
    most: Tensor

    def within(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Draws x (G, K) as those of Normals that end at `most`, and the logarithm of their slope, dx'/dx.

        A draw keeps its rank: q' = q Phi(end), with q its level and the end in standard deviations.
        """
        sd = self.root.square().sum(-1).sqrt().double()
        z, end = (x - self.loc) / sd, (self.most - self.loc) / sd
        share = torch.special.ndtr(end).clamp_min(torch.finfo(end.dtype).tiny)
        moved = torch.special.ndtri(torch.special.ndtr(z).clamp_min(torch.finfo(end.dtype).eps) * share)
        moved = torch.where(end < FAR, torch.minimum(moved, end), z)
        slope = torch.where(end < FAR, (moved.square() - z.square()) / 2 + share.log(), 0.0)
        return (self.loc + sd * moved).to(x), slope.to(x)


class RescaledRates:
    """Draws the rates by `shape` and `units`, other gene-level sites as `base` does; called with a batch like that."""

    def __init__(self, base: Callable[[Batch], Any], shape: Shape, units: Marginal, of_clock: Tensor) -> None:
        self.base, self.shape, self.units, self.of_clock = base, shape, units, of_clock

    def __call__(self, batch: Batch) -> dict[str, Tensor]:
        """Each site's draw, by name."""
        loc, root = self.shape.loc, self.shape.root
        # Its rates are hidden: the same names stand for those that are drawn here.
        with poutine.block():
            trace = poutine.trace(self.base).get_trace(batch)
        trace.compute_log_prob()
        # No level of exactly 0, which the grid's lower end has, however improbable.
        level = torch.rand_like(loc[:, 0]).clamp_min(torch.finfo(loc.dtype).eps)
        unit = self.units.at(level) + self.of_clock * torch.randn_like(loc[0, 0])
        drawn = {}
        with pyro.plate("genes", len(loc), dim=-1):
            # No site of the model: it says how the others hang together, and has no density of its own.
            unit = pyro.sample(TIME_UNIT, dist.Delta(unit).mask(False), infer={"is_auxiliary": True})
            x = pyro.sample(
                "shape_unconstrained", dist.MultivariateNormal(loc, scale_tril=root), infer={"is_auxiliary": True}
            )
            x, slope = self.shape.within(x)
            powers = loc.new_tensor([POWERS[name] for name in self.shape.sites])
            x = x + powers * unit[:, None]
            for name, log_value, by in zip(self.shape.sites, x.unbind(-1), slope.unbind(-1), strict=True):
                drawn[name] = pyro.sample(name, dist.Delta(log_value.exp(), -log_value - by))
            for name, site in trace.nodes.items():
                if _is_other(name, site, self.shape.sites):
                    density = dist.Delta(site["value"], site["log_prob"], event_dim=site["fn"].event_dim)
                    drawn[name] = pyro.sample(name, density)
        return drawn


def _is_other(name: str, site: Mapping[str, Any], sites: tuple[str, ...]) -> bool:
    """Whether it is a gene-level site of the model that is not among the rates."""
    if site["type"] != "sample" or site["is_observed"] or site_is_subsample(site) or name in sites:
        return False
    return not site["infer"].get("is_auxiliary") and bool(site["cond_indep_stack"])
