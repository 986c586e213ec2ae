r"""How a measured molecule scatters around what the kinetics say.

A new likelihood is one class: `parameters` names its per-gene parameters (each a site `{name}_{molecule}`, with the
prior of that kind), `__call__` maps a mean and those parameters to a distribution.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution, constraints
from torch import Tensor

from pyro_velo.densities import (
    censored_normal_log_density,
    negative_binomial_log_density,
    normal_log_density,
    poisson_log_density,
    student_t_log_density,
    zero_inflated,
)
from pyro_velo.errors import InputError

STARTS = {"noise": 0.1, "dispersion": 10.0, "gate": -3.0}
"""Where each kind of parameter starts: the sd of scaled expression, the dispersion, and the logit of the gate."""


class Likelihood(ABC):
    """The distribution of one molecule in one cell, given its mean."""

    parameters: ClassVar[tuple[str, ...]] = ()
    """The per-gene parameters; each has a prior of the same name in `Priors`."""
    counts: ClassVar[bool] = False
    """Whether it takes raw integer counts, or else smoothed and scaled expression."""
    binary: ClassVar[bool] = False
    """Whether it takes zeros and ones, and log-odds as their mean."""
    lump: ClassVar[bool] = False
    """Whether a zero of a scaled layer has a probability: bounds of densities can't be compared with it."""
    starts: ClassVar[Mapping[str, float]] = STARTS
    """A start value for each of `parameters`; a gate's is a logit, any real number."""

    @abstractmethod
    def __call__(
        self, mean: Tensor, parameters: Mapping[str, Tensor], scale: Tensor | float = 1.0
    ) -> TorchDistribution:
        """p(x | mean): mean (..., G), parameters (G,), `scale` multiplies the spread (the model's c_k).

        Where `counts`, the mean is the expected count, 0 or more, and `scale` goes unused: a count's spread follows
        its mean, so it vanishes in an empty state by itself.
        """


@dataclass(frozen=True)
class Normal(Likelihood):
    r"""$x \sim \mathcal{N}(\bar x, (c_k\sigma)^2)$ on smoothed, min-max scaled layers (Gayoso et al. 2023, eq. 13)."""

    parameters = ("noise",)

    def __call__(
        self, mean: Tensor, parameters: Mapping[str, Tensor], scale: Tensor | float = 1.0
    ) -> TorchDistribution:
        """Normal of sd `scale * noise`."""
        return QuickNormal(mean, parameters["noise"] * scale)


@dataclass(frozen=True)
class Tobit(Likelihood):
    r"""$x = \max(0, x^*)$ of a Normal $x^*$, on the same layers: a zero says that $x^* \le 0$ (Tobin 1958).

    Abundances can't be negative, and where a gene is silent half of its noise would be: taken for their very values,
    such zeros, and what noise is left above them, pull a gene's curve off its asymptote and its rates with it. It is
    the default. A cell in which a gene is silent says little of its time in that gene.
    """

    parameters = ("noise",)
    lump = True

    def __call__(
        self, mean: Tensor, parameters: Mapping[str, Tensor], scale: Tensor | float = 1.0
    ) -> TorchDistribution:
        """Normal of sd `scale * noise`, censored at zero."""
        return CensoredNormal(mean, parameters["noise"] * scale)


@dataclass(frozen=True)
class StudentT(Likelihood):
    r"""$x = \bar x + c_k\sigma t$ with $t \sim t_\nu$, on the same layers: an outlier costs $\log x$, not $x^2$.

    `df` is $\nu$: 4 has tails heavy enough for outliers and still a variance, $2 (c_k\sigma)^2$ (Lange et al. 1989).

    Raises InputError unless df > 0.

    >>> StudentT()
    StudentT(df=4.0)
    """

    df: float = 4.0
    parameters = ("noise",)

    def __post_init__(self) -> None:
        """Refuse degrees of freedom that no t has."""
        if not self.df > 0:
            raise InputError(f"Expected degrees of freedom df > 0; got {self.df}. The default is 4.")

    def __call__(
        self, mean: Tensor, parameters: Mapping[str, Tensor], scale: Tensor | float = 1.0
    ) -> TorchDistribution:
        """Student's t of scale `scale * noise`."""
        return QuickStudentT(self.df, mean, parameters["noise"] * scale)


@dataclass(frozen=True)
class Poisson(Likelihood):
    r"""$x \sim \mathrm{Poisson}(\bar x)$: molecules are caught one by one, and nothing else varies."""

    counts = True

    def __call__(
        self, mean: Tensor, parameters: Mapping[str, Tensor], scale: Tensor | float = 1.0
    ) -> TorchDistribution:
        """Poisson of that mean; `scale` goes unused."""
        return QuickPoisson(mean)


@dataclass(frozen=True)
class NB(Likelihood):
    r"""$x \sim \mathrm{NB}(\bar x, r)$, of variance $\bar x + \bar x^2/r$; Poisson where the dispersion r is large."""

    parameters = ("dispersion",)
    counts = True

    def __call__(
        self, mean: Tensor, parameters: Mapping[str, Tensor], scale: Tensor | float = 1.0
    ) -> TorchDistribution:
        """Negative binomial of that mean and dispersion; `scale` goes unused."""
        return NegativeBinomial(mean, parameters["dispersion"])


@dataclass(frozen=True)
class ZIP(Likelihood):
    """Poisson, but a count is lost, and 0, with the gene's probability sigmoid(gate); `mean` is that of the others."""

    parameters = ("gate",)
    counts = True

    def __call__(
        self, mean: Tensor, parameters: Mapping[str, Tensor], scale: Tensor | float = 1.0
    ) -> TorchDistribution:
        """Zero-inflated Poisson; `scale` goes unused."""
        return ZeroInflated(QuickPoisson(mean), parameters["gate"])


@dataclass(frozen=True)
class ZINB(Likelihood):
    """NB, but a count is lost, and 0, with the gene's probability sigmoid(gate); `mean` is that of the others."""

    parameters = ("dispersion", "gate")
    counts = True

    def __call__(
        self, mean: Tensor, parameters: Mapping[str, Tensor], scale: Tensor | float = 1.0
    ) -> TorchDistribution:
        """Zero-inflated negative binomial; `scale` goes unused."""
        return ZeroInflated(NegativeBinomial(mean, parameters["dispersion"]), parameters["gate"])


@dataclass(frozen=True)
class Bernoulli(Likelihood):
    r"""$x \sim \mathrm{Bernoulli}(\sigma(\bar x))$: a gene is on, 1, or off, 0. For whole profiles, not for velocity.

    The mean $\bar x$ is given as log-odds: a probability of 1 that is rounded would make a 0 impossible.
    """

    binary = True

    def __call__(
        self, mean: Tensor, parameters: Mapping[str, Tensor], scale: Tensor | float = 1.0
    ) -> TorchDistribution:
        """Bernoulli of those log-odds; `scale` goes unused."""
        return dist.Bernoulli(logits=mean)


class QuickNormal(dist.Normal):
    """Pyro's Normal, its density taken in half the passes over memory."""

    def log_prob(self, value: Tensor) -> Tensor:
        """The log-density at `value`."""
        return normal_log_density(value, self.loc, self.scale)


class CensoredNormal(TorchDistribution):
    r"""$\max(0, x)$ of a Normal x, of `loc` and `scale` that broadcast: the tobit model."""

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {
        "loc": constraints.real,
        "scale": constraints.positive,
    }
    support = constraints.nonnegative

    def __init__(self, loc: Tensor, scale: Tensor, validate_args: bool | None = None) -> None:
        self.loc, self.scale = loc, scale
        super().__init__(torch.broadcast_shapes(loc.shape, scale.shape), validate_args=validate_args)

    @property
    def mean(self) -> Tensor:
        r"""$m\,\Phi(m/\sigma) + \sigma\,\phi(m/\sigma)$."""
        return self._moments()[0]

    @property
    def variance(self) -> Tensor:
        r"""$(m^2 + \sigma^2)\,\Phi(m/\sigma) + m\sigma\,\phi(m/\sigma)$, less the squared mean."""
        mean, second = self._moments()
        return second - mean**2

    def _moments(self) -> tuple[Tensor, Tensor]:
        """E x and E x^2."""
        d = self.loc / self.scale
        above, at = torch.special.ndtr(d), torch.exp(-(d**2) / 2) / math.sqrt(2 * math.pi)
        mean = self.loc * above + self.scale * at
        return mean, (self.loc**2 + self.scale**2) * above + self.loc * self.scale * at

    def expand(self, batch_shape: torch.Size, _instance: None = None) -> CensoredNormal:
        """The same, broadcast to `batch_shape`."""
        return CensoredNormal(self.loc.expand(batch_shape), self.scale, validate_args=False)

    def log_prob(self, value: Tensor) -> Tensor:
        """The log-density at `value`, at 0 the log-probability of it; see `censored_normal_log_density`."""
        return censored_normal_log_density(value, self.loc, self.scale)

    def sample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
        """Draws of shape `sample_shape + batch_shape`."""
        with torch.no_grad():
            return dist.Normal(self.loc, self.scale, validate_args=False).sample(sample_shape).clamp_min(0)


class QuickPoisson(dist.Poisson):
    """Pyro's Poisson, its log-probability exact at large counts and finite at a rate of 0."""

    def log_prob(self, value: Tensor) -> Tensor:
        """The log-probability of the counts `value`; see `poisson_log_density`."""
        return poisson_log_density(value, self.rate)


class QuickStudentT(TorchDistribution):
    r"""Student's t of `df` (a number), `loc` and `scale` (tensors that broadcast), its gradient in closed form."""

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {
        "loc": constraints.real,
        "scale": constraints.positive,
    }
    support = constraints.real

    def __init__(self, df: float, loc: Tensor, scale: Tensor, validate_args: bool | None = None) -> None:
        self.df, self.loc, self.scale = df, loc, scale
        super().__init__(torch.broadcast_shapes(loc.shape, scale.shape), validate_args=validate_args)

    @property
    def mean(self) -> Tensor:
        """`loc`, which needs df > 1."""
        return (self.loc if self.df > 1 else self.loc * torch.nan).expand(self.batch_shape)

    @property
    def variance(self) -> Tensor:
        """scale^2 df / (df - 2), infinite for df <= 2."""
        factor = self.df / (self.df - 2) if self.df > 2 else torch.inf
        return (self.scale**2 * factor).expand(self.batch_shape)

    def expand(self, batch_shape: torch.Size, _instance: None = None) -> QuickStudentT:
        """The same, broadcast to `batch_shape`."""
        return QuickStudentT(self.df, self.loc.expand(batch_shape), self.scale, validate_args=False)

    def log_prob(self, value: Tensor) -> Tensor:
        """The log-density at `value`."""
        return student_t_log_density(value, self.df, self.loc, self.scale)

    def sample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
        """Draws of shape `sample_shape + batch_shape`."""
        with torch.no_grad():
            return dist.StudentT(self.df, self.loc, self.scale, validate_args=False).sample(sample_shape)


class NegativeBinomial(TorchDistribution):
    """Counts of mean `rate` and variance rate + rate^2 / dispersion, both tensors that broadcast."""

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {
        "rate": constraints.nonnegative,
        "dispersion": constraints.positive,
    }
    support = constraints.nonnegative_integer

    def __init__(self, rate: Tensor, dispersion: Tensor, validate_args: bool | None = None) -> None:
        self.rate, self.dispersion = rate, dispersion
        super().__init__(torch.broadcast_shapes(rate.shape, dispersion.shape), validate_args=validate_args)

    @property
    def mean(self) -> Tensor:
        """The expected count."""
        return self.rate.expand(self.batch_shape)

    @property
    def variance(self) -> Tensor:
        """That of a Poisson, rate, and what the Gamma of its rate adds, rate^2 / dispersion."""
        return self.rate + self.rate**2 / self.dispersion

    def expand(self, batch_shape: torch.Size, _instance: None = None) -> NegativeBinomial:
        """The same, broadcast to `batch_shape`."""
        # The dispersion keeps its shape: what depends on the gene alone is computed once a gene.
        return NegativeBinomial(self.rate.expand(batch_shape), self.dispersion, validate_args=False)

    def log_prob(self, value: Tensor) -> Tensor:
        """The log-probability of the counts `value`; see `negative_binomial_log_density`."""
        return negative_binomial_log_density(value, self.rate, self.dispersion)

    def sample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
        """Poisson of a Gamma of mean `rate`, `sample_shape + batch_shape`."""
        with torch.no_grad():
            # A rate of 0 is a Gamma of infinite rate, which is 0.
            rate = self.dispersion / self.rate
            return dist.GammaPoisson(self.dispersion, rate, validate_args=False).sample(sample_shape)


class ZeroInflated(TorchDistribution):
    r"""The counts of `base`, each replaced by 0 with probability $\pi = \sigma(g)$; `gate_logits` g of any size."""

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {"gate_logits": constraints.real}

    def __init__(self, base: TorchDistribution, gate_logits: Tensor, validate_args: bool | None = None) -> None:
        self.base, self.gate_logits = base, gate_logits
        super().__init__(torch.broadcast_shapes(base.batch_shape, gate_logits.shape), validate_args=validate_args)

    @property
    def support(self) -> constraints.Constraint:
        """That of the base."""
        return self.base.support

    @property
    def mean(self) -> Tensor:
        r"""$(1 - \pi)$ times the base's."""
        return torch.sigmoid(-self.gate_logits) * self.base.mean

    @property
    def variance(self) -> Tensor:
        r"""$(1 - \pi) (v + \pi m^2)$ of the base's mean m and variance v."""
        gate, mean = self.gate_logits, self.base.mean
        return torch.sigmoid(-gate) * (self.base.variance + torch.sigmoid(gate) * mean**2)

    def expand(self, batch_shape: torch.Size, _instance: None = None) -> ZeroInflated:
        """The same, broadcast to `batch_shape`."""
        return ZeroInflated(self.base.expand(batch_shape), self.gate_logits, validate_args=False)

    def log_prob(self, value: Tensor) -> Tensor:
        """The log-probability of the counts `value`; see `zero_inflated`."""
        return zero_inflated(self.base.log_prob(value), value, self.gate_logits)

    def sample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
        """The base's draws, some of them lost, `sample_shape + batch_shape`."""
        with torch.no_grad():
            drawn = self.base.expand(self.batch_shape).sample(sample_shape)
            return drawn * torch.bernoulli(torch.sigmoid(-self.gate_logits).expand(drawn.shape))


LIKELIHOODS: dict[str, type[Likelihood]] = {
    "normal": Normal,
    "tobit": Tobit,
    "studentt": StudentT,
    "poisson": Poisson,
    "nb": NB,
    "zip": ZIP,
    "zinb": ZINB,
}
"""What the command line calls them."""

PROFILE_LIKELIHOODS: dict[str, type[Likelihood]] = {
    **{name: LIKELIHOODS[name] for name in ("poisson", "nb", "zip", "zinb", "normal")},
    "bernoulli": Bernoulli,
}
"""Those of whole profiles, in which a molecule has no kinetics, by the same names."""
