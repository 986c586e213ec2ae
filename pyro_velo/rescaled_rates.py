r"""The guide of the rates where every gene has a time of its own, in a unit that is known as far as genes agree on it.

With $(\alpha, \beta, \gamma)$ faster by $e^{\lambda}$ and all times shorter by as much, a gene's curve is the same. So
a gene has a shape and a unit, beta's, and its rates and switching time $\theta_g$ are drawn as

$$\log\theta_g = m_g + L_g \epsilon_g \pm (\lambda_g + \lambda), \qquad \epsilon \sim \mathcal{N}(0, I), \quad
\lambda_g \sim q_g, \quad \lambda \sim \mathcal{N}(0, v^2)$$

with $\lambda$ that of the clock by which genes are told their units. `time_units` finds the numbers.
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


class Shape(NamedTuple):
    """`loc` (G, K), the logarithms of `sites`, and a root of their covariance (G, K, K), the unit held fixed."""

    sites: tuple[str, ...]
    loc: Tensor
    root: Tensor


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
            powers = loc.new_tensor([POWERS[name] for name in self.shape.sites])
            normal = dist.MultivariateNormal(loc + powers * unit[:, None], scale_tril=root)
            x = pyro.sample("shape_unconstrained", normal, infer={"is_auxiliary": True})
            for name, log_value in zip(self.shape.sites, x.unbind(-1), strict=True):
                drawn[name] = pyro.sample(name, dist.Delta(log_value.exp(), -log_value))
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
