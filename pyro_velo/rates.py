r"""Guides of the gene-level sites: the rates, the switching times and the likelihood's parameters.

Each maps the model's program to a Pyro autoguide over its sites in the plate `genes`, found by tracing, that starts at
the data-driven values (`program.start`). A new one is one class with one method. benchmarks/rates.py measures how far
each is from NUTS.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.distributions.util import sum_rightmost
from pyro.infer.autoguide import (
    AutoDelta,
    AutoGuide,
    AutoLowRankMultivariateNormal,
    AutoNormal,
    AutoNormalizingFlow,
)
from pyro.infer.autoguide.initialization import InitMessenger, init_to_value
from pyro.infer.autoguide.utils import helpful_support_errors
from pyro.nn import PyroParam
from torch import Tensor
from torch.distributions import Transform, biject_to

from pyro_velo.errors import InputError


class RateGuide(ABC):
    """The posterior of what a gene has of its own."""

    @abstractmethod
    def __call__(self, program: Any) -> AutoGuide:
        """An autoguide over the program's gene-level sites."""


def is_gene_level(message: dict) -> bool:
    """Whether a message is a latent site that belongs to genes, and not to cells."""
    plates = {frame.name for frame in message["cond_indep_stack"]}
    return message["type"] == "sample" and not message["is_observed"] and plates == {"genes"}


def gene_sites(program: Any) -> poutine.block:
    """The program with every other site hidden."""
    return poutine.block(program, expose_fn=lambda message: message["type"] == "sample" and is_gene_level(message))


def from_start(program: Any) -> Callable:
    """Pyro's `init_loc_fn` for the program's start values."""
    return init_to_value(values=program.start.sites())


@dataclass(frozen=True)
class Point(RateGuide):
    """The most probable value (MAP): the seed's point estimate, pulled by the priors."""

    def __call__(self, program: Any) -> AutoGuide:
        """AutoDelta, from the start values."""
        return AutoDelta(gene_sites(program), init_loc_fn=from_start(program))


@dataclass(frozen=True)
class MeanField(RateGuide):
    """Independent Normals on the unconstrained scale: LogNormal rates, logit-Normal switching times."""

    sd: float = 0.01

    def __call__(self, program: Any) -> AutoGuide:
        """AutoNormal, from the start values, with start sd `sd` on the unconstrained scale."""
        return AutoNormal(gene_sites(program), init_loc_fn=from_start(program), init_scale=self.sd)


@dataclass(frozen=True)
class PerGene(RateGuide):
    """A full covariance of each gene's own values on the unconstrained scale; genes are independent of each other.

    G genes with K values each cost O(G K^2) a draw. The rates of a gene are strongly correlated, because its cells fix
    their ratios better than their sizes; independent Normals are too narrow for that.
    """

    sd: float = 0.01

    def __call__(self, program: Any) -> AutoGuide:
        """`AutoPerGene`, from the start values, with start sd `sd` and no correlation on the unconstrained scale."""
        return AutoPerGene(gene_sites(program), init_loc_fn=from_start(program), init_scale=self.sd)


@dataclass(frozen=True)
class LowRank(RateGuide):
    r"""One Normal over all genes' values on the unconstrained scale: covariance $D + D^{1/2} W W^T D^{1/2}$.

    D is diagonal and W has `rank` columns. It sees what genes share, and needs a rank of the number of genes to see
    what each has of its own.
    """

    rank: int = 10
    sd: float = 0.01

    def __call__(self, program: Any) -> AutoGuide:
        """AutoLowRankMultivariateNormal, from the start values, W drawn at random such that the sds are about `sd`."""
        return AutoLowRankMultivariateNormal(
            gene_sites(program), init_loc_fn=from_start(program), init_scale=self.sd, rank=self.rank
        )


@dataclass(frozen=True, init=False, repr=False)
class Auto(RateGuide):
    """Any other autoguide of Pyro's, with its own options.

    It starts at the start values where it can be told to. A normalizing flow cannot: it starts at a standard Normal on
    the unconstrained scale. Raises `InputError` for what is no class of autoguides.

    >>> from pyro.infer.autoguide import AutoMultivariateNormal
    >>> Auto(AutoMultivariateNormal, init_scale=0.01)
    Auto(AutoMultivariateNormal, init_scale=0.01)
    """

    guide_class: type[AutoGuide]
    options: tuple[tuple[str, Any], ...]
    """By name, in alphabetical order."""

    def __init__(self, guide_class: type[AutoGuide], /, **options: Any) -> None:
        if not (isinstance(guide_class, type) and issubclass(guide_class, AutoGuide)):
            raise InputError(
                f"Expected a class of pyro.infer.autoguide; got {guide_class!r}. "
                "Pass the class and its options, as in Auto(AutoNormal, init_scale=0.1)."
            )
        object.__setattr__(self, "guide_class", guide_class)
        object.__setattr__(self, "options", tuple(sorted(options.items())))

    def __call__(self, program: Any) -> AutoGuide:
        """An autoguide of that class."""
        options, takes = dict(self.options), inspect.signature(self.guide_class.__init__).parameters
        if "init_loc_fn" in takes and not issubclass(self.guide_class, AutoNormalizingFlow):
            options = {"init_loc_fn": from_start(program)} | options
        return self.guide_class(gene_sites(program), **options)

    def __repr__(self) -> str:
        """The class and its options, the same in every process where theirs are."""
        options = (f"{name}={value!r}" for name, value in self.options)
        return f"Auto({', '.join((self.guide_class.__name__, *options))})"


class _Part(NamedTuple):
    """Where a site stands in its genes' vectors: the columns, the shape they have there, and the way to its support."""

    columns: slice
    shape: torch.Size
    transform: Transform
    event_dim: int


class Marginal(NamedTuple):
    """A Normal on the unconstrained scale, and the way from there to the support: `loc` and `sd` (G, ...)."""

    loc: Tensor
    sd: Tensor
    transform: Transform


class AutoPerGene(AutoGuide):
    r"""A Normal of each gene's K values on the unconstrained scale, those of sites with an event included.

    $$x_g = \mu_g + L_g (\sigma_g \odot \epsilon_g), \qquad \epsilon_g \sim \mathcal{N}(0, I_K)$$

    Parameters: `loc` $\mu$ and `scale` $\sigma > 0$, (G, K); `below` (G, K (K - 1) / 2), what stands below the diagonal
    of the unit lower triangular L, row by row. The columns are the sites in the order of the program. All sites of
    `model` must be in the plate `genes` alone.

    L's entries are slopes: about 1 where the cells fix the ratio of two rates, however well they do. With the scales on
    the other side of L, as in AutoMultivariateNormal, they grow with the correlation and are learnt more slowly: after
    a fit's 2,500 steps towards Normals in four dimensions, of sd 0.5 and correlation 0.99, the sds had come to 0.44 of
    the true ones in the median, here to 0.95.
    """

    def __init__(self, model: Callable, *, init_loc_fn: Callable, init_scale: float = 0.01) -> None:
        super().__init__(InitMessenger(init_loc_fn)(model))
        if not init_scale > 0:
            raise InputError(f"Expected a start sd > 0; got {init_scale}. Leave it out for the default.")
        self._init_scale = init_scale

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        super()._setup_prototype(*args, **kwargs)
        self._parts: dict[str, _Part] = {}
        columns, size = [], 0
        for name, site in self.prototype_trace.iter_stochastic_nodes():
            fn = site["fn"]
            with helpful_support_errors(site):
                transform = biject_to(fn.support)
            value = transform.inv(site["value"].detach())
            shape = value.shape[len(fn.batch_shape) :]
            self._parts[name] = _Part(slice(size, size + shape.numel()), shape, transform, fn.event_dim)
            columns.append(value.reshape(*fn.batch_shape, -1))
            size += shape.numel()
        loc = torch.cat(columns, -1)
        self.loc = PyroParam(loc, event_dim=1)
        self.scale = PyroParam(torch.full_like(loc, self._init_scale), constraints.softplus_positive, event_dim=1)
        self.below = PyroParam(loc.new_zeros(len(loc), size * (size - 1) // 2), event_dim=1)

    def get_posterior(self) -> dist.TransformedDistribution:
        """The genes' vectors on the unconstrained scale: batch shape (G,), event K."""
        loc = self.loc
        noise = dist.Normal(torch.zeros_like(loc), torch.ones_like(loc)).to_event(1)
        return dist.TransformedDistribution(noise, [Correlate(loc, self.scale, unit_lower(self.below, loc.shape[-1]))])

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Draw every gene's vector, and give each site its part of it."""
        if self.prototype_trace is None:
            self._setup_prototype(*args, **kwargs)
        drawn = {}
        with self._create_plates(*args, **kwargs)["genes"]:
            x = pyro.sample("genes_unconstrained", self.get_posterior(), infer={"is_auxiliary": True})
            for name, part in self._parts.items():
                unconstrained = _of(x, part)
                value = part.transform(unconstrained)
                log_jacobian = part.transform.log_abs_det_jacobian(unconstrained, value)
                log_density = -sum_rightmost(log_jacobian, log_jacobian.dim() - x.dim() + 1)
                drawn[name] = pyro.sample(name, dist.Delta(value, log_density, event_dim=part.event_dim))
        return drawn

    @torch.no_grad()
    def marginals(self) -> dict[str, Marginal]:
        """Each site by itself, on the unconstrained scale."""
        sd = torch.linalg.vector_norm(unit_lower(self.below, self.loc.shape[-1]) * self.scale.unsqueeze(-2), dim=-1)
        loc = self.loc
        return {name: Marginal(_of(loc, part), _of(sd, part), part.transform) for name, part in self._parts.items()}

    @torch.no_grad()
    def median(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """The posterior median by site."""
        return {name: part.transform(_of(self.loc, part)).clone() for name, part in self._parts.items()}

    @torch.no_grad()
    def quantiles(self, quantiles: list[float], *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """The posterior quantiles by site, the levels leading."""
        sd = Correlate(self.loc, self.scale, unit_lower(self.below, self.loc.shape[-1])).sd
        levels = torch.as_tensor(quantiles).to(sd)[:, None, None]
        x = dist.Normal(self.loc, sd).icdf(levels)
        return {name: part.transform(_of(x, part)) for name, part in self._parts.items()}


def _of(x: Tensor, part: _Part) -> Tensor:
    """A site's part of the vectors (..., K), on the unconstrained scale."""
    return x[..., part.columns].reshape(*x.shape[:-1], *part.shape)


def unit_lower(below: Tensor, size: int) -> Tensor:
    """Lower triangular matrices (..., K, K) with a unit diagonal, from what is below it, (..., K (K - 1) / 2)."""
    rows, columns = torch.tril_indices(size, size, -1, device=below.device)
    lower = torch.eye(size, dtype=below.dtype, device=below.device).repeat(*below.shape[:-1], 1, 1)
    lower[..., rows, columns] = below
    return lower


class Correlate(Transform):
    r"""$x = \mu + L (\sigma \odot \epsilon)$ on vectors, L unit lower triangular; it remembers the last $\epsilon$.

    So the density of what was just drawn costs no solve.
    """

    domain = codomain = constraints.real_vector
    bijective = True

    def __init__(self, loc: Tensor, scale: Tensor, lower: Tensor) -> None:
        super().__init__(cache_size=1)
        self.loc, self.scale, self.lower = loc, scale, lower

    @property
    def sd(self) -> Tensor:
        """The sd of each entry of x, where epsilon is standard Normal."""
        return torch.linalg.vector_norm(self.lower * self.scale.unsqueeze(-2), dim=-1)

    def _call(self, x: Tensor) -> Tensor:
        return self.loc + torch.einsum("...ij,...j->...i", self.lower, self.scale * x)

    def _inverse(self, y: Tensor) -> Tensor:
        apart = (y - self.loc).unsqueeze(-1)
        return (
            torch.linalg.solve_triangular(self.lower, apart, upper=False, unitriangular=True).squeeze(-1) / self.scale
        )

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Log of the scales' product: L has none of its own."""
        return self.scale.log().sum(-1)


RATE_GUIDES: dict[str, type[RateGuide]] = {
    "point": Point,
    "mean-field": MeanField,
    "per-gene": PerGene,
    "low-rank": LowRank,
}
"""What the command line calls them."""

__all__ = ["RATE_GUIDES", "Auto", "LowRank", "MeanField", "PerGene", "Point", "RateGuide", "gene_sites"]
