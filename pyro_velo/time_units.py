r"""The unit of each gene's time, where genes have times of their own: what the cells leave open of it, and say of it.

A gene whose rates are all faster by $e^\lambda$ and whose times are shorter by as much has the same curve, so that no
cell says what $\lambda_g$ is, and a fit finds some value. Known of it is what the priors of the rates say, and that
cells of which many genes say how old they are have an age: a gene that follows the clock of the others (`consensus`)
at a pace of $c_g$, which varies by $v_g$ of itself, is in the wrong unit by $\log c_g$,

$$q(\lambda_g) \propto p(\theta_g e^{\pm\lambda_g})\; e^{\pm\lambda_g}\; \mathcal{N}(\lambda_g;\, \log c_g,\, v_g^2)$$

on a grid. A gene that follows nobody has a wide one: the prior's. The shape of its curve is known as well as priors and
cells whose times are not known tell it (`curve_information`): a guide that holds the times still is too sure.
"""

from __future__ import annotations

import math
from copy import copy
from dataclasses import replace
from typing import NamedTuple

import pyro
import torch
from pyro import poutine
from pyro.distributions.torch_distribution import TorchDistribution
from pyro.infer.autoguide import AutoDelta
from torch import Tensor

from pyro_velo.consensus import WINDOWS, Consensus, consensus
from pyro_velo.curve_information import Looked, looked_at
from pyro_velo.disk import AnyCells
from pyro_velo.guides import AmortizedProgram
from pyro_velo.kinetics import POWERS
from pyro_velo.models.velocity import VelocityProgram
from pyro_velo.rescaled_rates import Marginal, RescaledRates, Shape
from pyro_velo.times import PerGene
from pyro_velo.train import Fitted, split

CELLS = 1000
"""Cells, at most, that genes agree about."""
DRAWS = 25
"""Of the rates, whose medians the times are taken at."""
LAMBDAS = torch.linspace(-3, 3, 1201, dtype=torch.float64)
FIXED = 1e-3
"""How far the unit moves with a shape."""
BEND, FLAT = 0.05, 0.04
"""By which logarithms are moved to see how sharp a prior is, and the precision below which it is flat there.

Also that of an improper prior: a logarithm is known to a factor of e^5."""
PRIOR_DRAWS = 4000
"""By which it is told how wide a prior is that is flat."""


def applies(fitted: Fitted) -> bool:
    """Whether genes have times of their own, whose unit is open, and rates that are not held at a point."""
    guide, times = fitted.guide, getattr(getattr(fitted.program, "recipe", None), "times", None)
    if not (isinstance(guide, AmortizedProgram) and isinstance(times, PerGene) and times.common_unit):
        return False
    return not isinstance(guide.rates, (AutoDelta, RescaledRates))


def in_common_unit(fitted: Fitted, cells: AnyCells, *, seed: int = 0) -> Fitted:
    """The same fit with every gene's rates and times in the unit of the clock that genes agree on, as far as they do.

    Any other than those to which it `applies` comes back as it is, and `fitted` stays as it is. The same seed gives the
    same units.
    """
    if not applies(fitted):
        return fitted
    noise = torch.random.fork_rng([cells.device] if cells.device.type == "cuda" else [])
    with fitted.parameters(), noise, pyro.validation_enabled(False), torch.no_grad():
        torch.manual_seed(seed)
        values = medians(fitted, cells)
        sites = tuple(name for name in POWERS if name in values)
        chosen, n_trained = _chosen(fitted, cells)
        looked = looked_at(fitted, cells, chosen, values, sites)
        found = consensus(looked.seen)
        units = Marginal.of(LAMBDAS.to(found.pace), log_density(fitted.program, values, found))
        prior = PriorShape.of(fitted.program, values, sites)
        shape = shape_of(looked, n_trained, prior, values, sites)
        guide, program = copy(fitted.guide), copy(fitted.program)
        # A module keeps its parts in a dictionary that a copy shares with it.
        guide._modules = {name: part for name, part in guide._modules.items() if name != "rates"}
        guide.rates = RescaledRates(fitted.guide.rates, shape, units, found.of_clock)
        program._modules = dict(program._modules)
        program.times = program.times.in_units_of(values["beta"], values["switch_time"])
    return replace(fitted, guide=guide, program=program)


def medians(fitted: Fitted, cells: AnyCells) -> dict[str, Tensor]:
    """Of the gene-level sites, by name."""
    batch = cells.batch(torch.arange(1, device=cells.device))
    traces = [poutine.trace(fitted.guide.rates).get_trace(batch) for _ in range(DRAWS)]
    names = [name for name, site in traces[0].nodes.items() if site["type"] == "sample" and site["cond_indep_stack"]]
    return {name: torch.stack([trace.nodes[name]["value"] for trace in traces]).median(0).values for name in names}


def _chosen(fitted: Fitted, cells: AnyCells) -> tuple[Tensor, int]:
    """Some of the training cells, and how many there are."""
    settings = fitted.training.settings
    train_index, _ = split(len(cells), settings.held_out, settings.seed)
    some = train_index[torch.randperm(len(train_index))[:CELLS]].sort().values
    return some.to(cells.device), len(train_index)


def shape_of(
    looked: Looked, n_cells: int, prior: PriorShape, values: dict[str, Tensor], sites: tuple[str, ...]
) -> Shape:
    """The Normal of a gene's rates around their values, beta held fixed; those who looked stand for `n_cells`.

    Beta is what tells the unit (`PerGeneProgram`).
    """
    information = looked.information * n_cells / len(looked.seen.time)
    beta = (torch.tensor([name == "beta" for name in sites]) / FIXED**2).to(information)
    covariance = torch.linalg.inv(information + torch.diag_embed(prior.precision.to(information) + beta))
    loc = torch.stack([values[name] for name in sites], -1)
    return Shape(sites, loc.log(), torch.linalg.cholesky(covariance).to(loc), prior.most.to(loc))


class PriorShape(NamedTuple):
    """How sharp priors of sites' logarithms are, `precision` (G, K), and the logarithms of their ends, `most` (K,)."""

    precision: Tensor
    most: Tensor

    @classmethod
    def of(cls, program: VelocityProgram, values: dict[str, Tensor], sites: tuple[str, ...]) -> PriorShape:
        """At the values of the sites.

        A prior that is not curved there (a uniform one, which is cut off at its ends) is as sharp as it is narrow.
        """
        found, most = [], []
        for name in sites:
            fn = _prior(program, values, name)
            low, at, high = (_log_density(fn, values[name] * math.exp(step)) for step in (-BEND, 0.0, BEND))
            curved = ((2 * at - low - high) / BEND**2).nan_to_num(0.0, posinf=0.0, neginf=0.0)
            found.append(torch.where(curved > FLAT, curved, _narrowness(fn)))
            most.append(float(torch.as_tensor(getattr(fn.support, "upper_bound", math.inf)).max().log()))
        return cls(torch.stack(found, -1), torch.tensor(most))


def _prior(program: VelocityProgram, values: dict[str, Tensor], name: str) -> TorchDistribution:
    """That of a site (G,), the others at their values."""
    with pyro.plate("genes", program.n_genes, dim=-1):
        trace = poutine.trace(poutine.condition(program.sample_genes, data=values)).get_trace()
    return trace.nodes[name]["fn"]


def _narrowness(prior: TorchDistribution) -> Tensor:
    """1 / the variance of a site's logarithm under its prior, (G,); `FLAT` for an improper one, which has no draws."""
    try:
        return prior.sample((PRIOR_DRAWS,)).log().var(0).reciprocal().nan_to_num(FLAT)
    except NotImplementedError:
        return torch.tensor(FLAT)


def _log_density(prior: TorchDistribution, value: Tensor) -> Tensor:
    """Of a site's logarithm, as a function of the site (..., G)."""
    return prior.log_prob(value).to(value) + value.log()


def log_density(program: VelocityProgram, values: dict[str, Tensor], found: Consensus) -> Tensor:
    """Of lambda on the grid (G, M), not normalised: the priors along the ray, and what the clock says."""
    grid = LAMBDAS.to(found.pace)
    total = torch.zeros(program.n_genes, len(grid)).to(grid)
    for name in (name for name in POWERS if name in values):
        along = values[name] * torch.exp(POWERS[name] * grid)[:, None]
        total = total + _log_density(_prior(program, values, name), along).mT
    precision = moderated(found.variation) ** -2
    return total - 0.5 * precision[:, None] * (grid - found.pace.log()[:, None]) ** 2


def moderated(variation: Tensor) -> Tensor:
    """Each gene's error, half its own and half the median's (squared): from a few windows it is not known well.

    Smyth 2004 (Linear models and empirical Bayes), with as many degrees of freedom before the data as in them: the sd
    of the t that the pace has then. A gene of which too little is known keeps an infinite one.
    """
    known = variation.isfinite()
    if not known.any():
        return variation
    freedom = 2 * (WINDOWS - 2)
    squared = (variation**2 + variation[known].square().median()) / 2
    return (squared * freedom / (freedom - 2)).sqrt()
