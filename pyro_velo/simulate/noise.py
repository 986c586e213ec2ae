"""What the measurement adds to the noise-free abundances: Gaussian noise, or counts with library sizes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, final

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from pyro_velo.simulate.checks import require, require_number

Array = NDArray[Any]


class Noise(ABC):
    """What the measurement does to the noise-free abundances."""

    @abstractmethod
    def library(self, n_cells: int, rng: Generator) -> Array:
        """Expected counts (cells,) per unit of abundance; 1 where abundances themselves are measured."""

    @abstractmethod
    def gates(self, n_genes: int) -> Array:
        """The probability (genes,) that a value of a gene is lost, and 0 is measured; zeros without zero inflation."""

    @abstractmethod
    def observe(self, mean: Array, rng: Generator) -> Array:
        """A measurement (cells, genes) whose noise-free value is `mean`, library size included."""


@final
@dataclass(frozen=True)
class Normal(Noise):
    """Gaussian noise of sd `level` times the gene's 99th percentile (of its noise-free values), clipped at zero."""

    level: float = 0.08

    def __post_init__(self) -> None:
        """Check the settings."""
        require_number("level", self.level, "[0, inf)", "Pass level=0.08, or 0 for no noise.")

    def library(self, n_cells: int, rng: Generator) -> Array:
        """Ones (cells,): abundances are measured as they are."""
        return np.ones(n_cells)

    def gates(self, n_genes: int) -> Array:
        """Zeros (genes,): nothing is lost."""
        return np.zeros(n_genes)

    def observe(self, mean: Array, rng: Generator) -> Array:
        """Noisy abundances (cells, genes), float64."""
        return np.clip(rng.normal(mean, self.level * np.percentile(mean, 99, axis=0)), 0, None)


@final
@dataclass(frozen=True)
class LibrarySize:
    """Expected counts per unit of abundance: LogNormal over cells, with mean `depth` and `sd` that of its logarithm."""

    depth: float = 5.0
    sd: float = 0.3

    def __post_init__(self) -> None:
        """Check the settings."""
        require_number("depth", self.depth, "(0, inf)", "Pass depth=5.0 or the like.")
        require_number("sd", self.sd, "[0, inf)", "Pass sd=0.3, or 0 for library sizes that are all equal.")

    def draw(self, n_cells: int, rng: Generator) -> Array:
        """Library sizes (cells,)."""
        return self.depth * np.exp(self.sd * rng.standard_normal(n_cells) - self.sd**2 / 2)


@dataclass(frozen=True)
class Counts(Noise):
    """Count noise: the mean is the library size times the abundance."""

    library_size: LibrarySize = field(default_factory=LibrarySize, kw_only=True)

    @final
    def library(self, n_cells: int, rng: Generator) -> Array:
        """Expected counts (cells,) per unit of abundance."""
        return self.library_size.draw(n_cells, rng)


def _check_counts(library_size: object, theta: object, gate: object) -> None:
    expected = "library_size to be a LibrarySize"
    require(isinstance(library_size, LibrarySize), expected, library_size, "Pass LibrarySize(depth=5.0).")
    require_number("theta", theta, "(0, inf)", "Pass an inverse dispersion such as 10.0, or use Poisson().")
    require_number("gate", gate, "[0, 1)", "Pass the probability that a count is lost, such as 0.2.")


def _negative_binomial(mean: Array, theta: float, rng: Generator) -> Array:
    return rng.negative_binomial(theta, theta / (theta + mean))


@final
@dataclass(frozen=True)
class Poisson(Counts):
    """Poisson counts: variance = mean."""

    def __post_init__(self) -> None:
        """Check the settings."""
        _check_counts(self.library_size, 1, 0)

    def gates(self, n_genes: int) -> Array:
        """Zeros (genes,): nothing is lost."""
        return np.zeros(n_genes)

    def observe(self, mean: Array, rng: Generator) -> Array:
        """Counts (cells, genes), int64."""
        return rng.poisson(mean)


@final
@dataclass(frozen=True)
class NegativeBinomial(Counts):
    """Overdispersed counts: variance = mean + mean^2 / `theta`."""

    theta: float = 10.0

    def __post_init__(self) -> None:
        """Check the settings."""
        _check_counts(self.library_size, self.theta, 0)

    def gates(self, n_genes: int) -> Array:
        """Zeros (genes,): nothing is lost."""
        return np.zeros(n_genes)

    def observe(self, mean: Array, rng: Generator) -> Array:
        """Counts (cells, genes), int64."""
        return _negative_binomial(mean, self.theta, rng)


@final
@dataclass(frozen=True)
class ZeroInflatedNegativeBinomial(Counts):
    """Negative binomial counts of which a fraction `gate` is lost, so that their mean is (1 - gate) times as large.

    Counts are lost in the first genes alone, a fraction `inflated` of them; genes are drawn in no order.
    """

    theta: float = 10.0
    gate: float = 0.2
    inflated: float = 1.0

    def __post_init__(self) -> None:
        """Check the settings."""
        _check_counts(self.library_size, self.theta, self.gate)
        require_number("inflated", self.inflated, "[0, 1]", "Pass a fraction of the genes, or 1 for all of them.")

    def gates(self, n_genes: int) -> Array:
        """`gate` for the first genes, 0 for the others (genes,)."""
        return np.where(np.arange(n_genes) < round(self.inflated * n_genes), self.gate, 0.0)

    def observe(self, mean: Array, rng: Generator) -> Array:
        """Counts (cells, genes), int64."""
        lost = rng.random(mean.shape) < self.gates(mean.shape[1])
        return np.where(lost, 0, _negative_binomial(mean, self.theta, rng))
