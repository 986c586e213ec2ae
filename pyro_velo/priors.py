r"""What is believed of the rates, times, noise and states before a cell is seen.

Each entry of `Priors` is a Pyro distribution, or a function from the data-driven start values to one (empirical Bayes).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

import pyro.distributions as dist
from pyro.distributions import Distribution
from torch import Tensor

from pyro_velo.errors import InputError
from pyro_velo.kinetics import T_MAX

Prior: TypeAlias = Distribution | Callable[[Tensor], Distribution]
"""A distribution over one gene's value, or a function of the start values (G,) that returns one of batch shape (G,)."""


@dataclass(frozen=True)
class Centered:
    r"""$\mathrm{LogNormal}(\log x_0, \mathrm{sd})$: the start value, known up to a factor of $e^{\pm\mathrm{sd}}$."""

    sd: float = 1.0

    def __call__(self, start: Tensor) -> Distribution:
        """The prior of batch shape (G,) around the start values (G,)."""
        return dist.LogNormal(start.log(), self.sd)


@dataclass(frozen=True)
class Priors:
    """The priors of the velocity model; swap one by name, as in `Priors(beta=dist.LogNormal(0.0, 0.5))`.

    `alpha`, `beta`, `gamma` in 1/time (alpha: scaled abundance/time), `switch_time` in [0, 20], `noise` the sd of
    scaled expression, `concentration` of the states' symmetric Dirichlet (veloVI: 0.25), `latent` of each coordinate
    of z.
    """

    alpha: Prior = field(default_factory=Centered)
    beta: Prior = field(default_factory=Centered)
    gamma: Prior = field(default_factory=Centered)
    switch_time: Prior = field(default_factory=lambda: dist.Uniform(0.0, T_MAX))
    noise: Prior = field(default_factory=Centered)
    concentration: float = 0.25
    latent: Distribution = field(default_factory=lambda: dist.Normal(0.0, 1.0))

    def __post_init__(self) -> None:
        """Refuse a concentration that no Dirichlet has."""
        if not self.concentration > 0:
            raise InputError(f"Expected a Dirichlet concentration > 0; got {self.concentration}. veloVI's is 0.25.")

    def of(self, name: str, start: Mapping[str, Tensor], *, kind: str | None = None) -> Distribution:
        """The prior of the gene-level site `name` at the start values; `kind` is its entry here where names differ."""
        prior = getattr(self, kind or name)
        return prior if isinstance(prior, Distribution) else prior(start[name])
