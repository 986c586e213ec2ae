"""The process that is simulated: the rates of genes, the times of cells, and the path that cells follow."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, final

import numpy as np
import torch
from numpy.random import Generator
from numpy.typing import NDArray

from pyro_velo.kinetics import T_MAX, Rates, periodic, trajectory
from pyro_velo.simulate.checks import require, require_count, require_number

Array = NDArray[Any]


class Kinetics(ABC):
    """Where the rates of the genes come from."""

    @abstractmethod
    def draw(self, n_genes: int, rng: Generator) -> Array:
        """Rates (genes, 3): alpha in abundance/time, beta and gamma in 1/time; fewer genes may stay than were drawn."""


@final
@dataclass(frozen=True)
class LogNormalRates(Kinetics):
    r"""Correlated rates, less the most extreme genes.

    $$(\alpha, d\,\beta, d\,\gamma) \sim \exp \mathrm{MVN}(\mathrm{mean}, \mathrm{sd}^2 R)$$

    `correlation` holds $(R_{12}, R_{13}, R_{23})$ and `divisor` is $d$. A gene is dropped when one of its three rates
    is among the largest `drop` (a fraction) of that rate: of 300 genes about 293 stay; with `drop=0` all of them do.
    """

    mean: tuple[float, float, float] = (1.0, 0.2, 0.05)
    sd: float = 0.4
    correlation: tuple[float, float, float] = (0.2, 0.2, 0.8)
    divisor: float = 3.0
    drop: float = 0.01

    def __post_init__(self) -> None:
        """Check the settings."""
        finite = len(self.mean) == 3 and bool(np.isfinite(self.mean).all())
        require(
            finite, "mean to be three finite logarithms", self.mean, "Pass (alpha, beta, gamma), as (1.0, 0.2, 0.05)."
        )
        valid = len(self.correlation) == 3 and bool(np.linalg.eigvalsh(self._matrix()).min() > 0)
        expected = "correlation to be (R12, R13, R23) of a positive definite matrix"
        require(valid, expected, self.correlation, "Pass three values nearer to zero.")
        require_number("sd", self.sd, "[0, inf)", "Pass the sd of the log-rates, such as 0.4.")
        require_number("divisor", self.divisor, "(0, inf)", "Pass divisor=3.0, or 1 for none.")
        require_number("drop", self.drop, "[0, 0.3)", "Pass drop=0.01 for the top 1 %, or 0 for none.")

    def _matrix(self) -> Array:
        r12, r13, r23 = self.correlation
        return np.array([[1.0, r12, r13], [r12, 1.0, r23], [r13, r23, 1.0]])

    def draw(self, n_genes: int, rng: Generator) -> Array:
        """Rates (genes, 3) of the genes that stay."""
        root = np.linalg.cholesky(self._matrix())
        rates = np.exp(np.array(self.mean) + self.sd * rng.standard_normal((n_genes, 3)) @ root.T)
        rates /= [1.0, self.divisor, self.divisor]
        n_dropped = int(n_genes * self.drop + 1e-9)  # 2900 * 0.01 is 28.999... in floating point
        rank = rates.argsort(axis=0).argsort(axis=0)
        return rates[(rank < n_genes - n_dropped).all(axis=1)]


@final
@dataclass(frozen=True)
class GivenRates(Kinetics):
    """Rates that are known already, those of a fit for instance: `alpha`, `beta`, `gamma`, one value a gene."""

    alpha: tuple[float, ...]
    beta: tuple[float, ...]
    gamma: tuple[float, ...]

    def __post_init__(self) -> None:
        """Check the settings."""
        lengths = [len(self.alpha), len(self.beta), len(self.gamma)]
        require(len(set(lengths)) == 1, "as many alpha as beta as gamma", lengths, "Pass one value a gene in each.")
        rates = np.array([self.alpha, self.beta, self.gamma], dtype=float)
        wrong = rates[~((rates > 0) & np.isfinite(rates))]
        require(len(wrong) == 0, "finite rates > 0", wrong[:1].tolist(), "Leave out the genes that have none.")

    def draw(self, n_genes: int, rng: Generator) -> Array:
        """The rates (genes, 3) as given; `n_genes` must be their number."""
        n_given = len(self.alpha)
        require(
            n_genes == n_given, f"n_genes to be {n_given}, the number of rates given", n_genes, "Change one of them."
        )
        return np.array([self.alpha, self.beta, self.gamma], dtype=float).T


class Clock(ABC):
    """How a cell's time becomes the times of its genes."""

    @abstractmethod
    def gene_times(self, t: Array, n_genes: int, rng: Generator) -> Array | None:
        """Times (cells, genes), given the cells' times `t` (cells,); None where genes share them.

        The process folds those outside [0, T_MAX] back into it.
        """


@final
@dataclass(frozen=True)
class SharedTime(Clock):
    """One time for all genes of a cell."""

    def gene_times(self, t: Array, n_genes: int, rng: Generator) -> None:
        """None: genes share the cell's time."""
        return None


@final
@dataclass(frozen=True)
class GeneTime(Clock):
    """Each gene of a cell is ahead of the cell's time or behind it by Normal(0, `sd`)."""

    sd: float = 3.0

    def __post_init__(self) -> None:
        """Check the settings."""
        require_number("sd", self.sd, "(0, inf)", "Pass a deviation in units of time such as 3.0, or use SharedTime().")

    def gene_times(self, t: Array, n_genes: int, rng: Generator) -> Array:
        """Times (cells, genes), unbounded."""
        return rng.normal(t[:, None], self.sd, (len(t), n_genes))


class Process(ABC):
    """The path or paths that cells follow: when genes come on and go off along them, and what abundances follow."""

    @abstractmethod
    def draw(self, n_genes: int, rng: Generator) -> tuple[Array, Array]:
        """Times (paths, genes) in [0, T_MAX] at which genes come on and go off."""

    @abstractmethod
    def fold(self, t: Array) -> Array:
        """Times, of any shape, folded back into [0, T_MAX]."""

    @abstractmethod
    def abundances(self, rates: Array, onset: Array, switch: Array, t: Array) -> tuple[Array, Array]:
        """Noise-free u and s, given `rates` (genes, 3) and the times, which broadcast to (cells, genes)."""

    @abstractmethod
    def labels(self, t: Array, path: Array) -> Array:
        """A name (cells,) for where each cell is, given the cells' times and the numbers of their paths."""


def _rates(rates: Array, time_on: Array) -> Rates:
    """Rates (genes, 3), and how long genes are on (cells, genes), as the kinetics take them."""
    alpha, beta, gamma = (torch.from_numpy(rate.copy()) for rate in rates.T)
    return Rates(alpha, beta, gamma, torch.from_numpy(time_on))


@final
@dataclass(frozen=True)
class Lineages(Process):
    """One path of all cells, or a trunk that divides at `branch_at` * T_MAX into `count` equally frequent lineages.

    Each gene goes off at U(`switch`) * T_MAX, the same in all lineages, but for a fraction `specific` of the genes.
    Those are alike in all lineages up to the branching and differ after it, one half each in one of two ways:
    a fate gene is silent in the trunk and comes on at the branching, in one lineage alone; a diverging gene is on from
    the start, and goes off at a time of its own in each lineage. Both go off U(`switch`) * T_MAX after the branching.
    Times are reflected at 0 and T_MAX.
    """

    count: int = 1
    branch_at: float = 0.3
    specific: float = 0.5
    switch: tuple[float, float] = (0.1, 0.5)

    def __post_init__(self) -> None:
        """Check the settings."""
        require_count("count", self.count, 1, "Pass count=1 for no branching.")
        require_number("branch_at", self.branch_at, "(0, 1)", "Pass a fraction of T_MAX, such as 0.3.")
        require_number("specific", self.specific, "[0, 1]", "Pass a fraction of the genes, such as 0.5.")
        ordered = len(self.switch) == 2 and 0 <= self.switch[0] <= self.switch[1] <= 1
        expected = "switch to be (low, high) within [0, 1]"
        require(ordered, expected, self.switch, "Pass fractions of T_MAX, such as (0.1, 0.5).")

    def draw(self, n_genes: int, rng: Generator) -> tuple[Array, Array]:
        """Times (lineages, genes) at which genes come on and go off; both T_MAX where a gene stays silent."""
        off = np.tile(rng.uniform(*self.switch, n_genes) * T_MAX, (self.count, 1))
        on = np.zeros_like(off)
        if self.count == 1:
            return on, off
        branch = self.branch_at * T_MAX
        later = np.minimum(branch + rng.uniform(*self.switch, off.shape) * T_MAX, T_MAX)
        order, n_specific = rng.permutation(n_genes), round(self.specific * n_genes)
        fate, diverging = order[: n_specific // 2], order[n_specific // 2 : n_specific]
        off[:, diverging] = later[:, diverging]
        own = np.arange(len(fate)) % self.count
        on[:, fate] = off[:, fate] = T_MAX
        on[own, fate], off[own, fate] = branch, later[own, fate]
        return on, off

    def fold(self, t: Array) -> Array:
        """Times reflected at 0 and T_MAX."""
        unfolded = np.mod(t, 2 * T_MAX)
        return np.minimum(unfolded, 2 * T_MAX - unfolded)

    def abundances(self, rates: Array, onset: Array, switch: Array, t: Array) -> tuple[Array, Array]:
        """Noise-free u and s (cells, genes): zero up to the onset, then induction, from the switch on repression."""
        since_onset = torch.from_numpy(np.maximum(t - onset, 0))
        u, s = trajectory(_rates(rates, switch - onset), since_onset)
        return u.numpy(), s.numpy()

    def labels(self, t: Array, path: Array) -> Array:
        """The trunk before the branching, "lineage_1", ... after it; all "lineage_1" where there is but one."""
        labels = np.array([f"lineage_{number + 1}" for number in range(self.count)])[path]
        return labels if self.count == 1 else np.where(t < self.branch_at * T_MAX, "trunk", labels)


@final
@dataclass(frozen=True)
class Cycle(Process):
    """The cell cycle: time is a circle of length T_MAX, on which each gene comes on and goes off for ever.

    A gene comes on anywhere, at U(0, 1) * T_MAX, and stays on for U(`on`) * T_MAX, past the end of the circle where it
    must: its switch is then before its onset. Cells have gone round so often that where they started is forgotten.
    Times beyond 0 and T_MAX go on at the other end.
    """

    on: tuple[float, float] = (0.2, 0.6)

    def __post_init__(self) -> None:
        """Check the settings."""
        ordered = len(self.on) == 2 and 0 < self.on[0] <= self.on[1] < 1
        require(ordered, "on to be (low, high) within (0, 1)", self.on, "Pass fractions of a cycle, as (0.2, 0.6).")

    def draw(self, n_genes: int, rng: Generator) -> tuple[Array, Array]:
        """Times (1, genes) at which genes come on and go off."""
        onset, time_on = rng.uniform(0, T_MAX, (1, n_genes)), rng.uniform(*self.on, (1, n_genes)) * T_MAX
        return onset, self.fold(onset + time_on)

    def fold(self, t: Array) -> Array:
        """Times modulo T_MAX."""
        return np.mod(t, T_MAX)

    def abundances(self, rates: Array, onset: Array, switch: Array, t: Array) -> tuple[Array, Array]:
        """Noise-free u and s (cells, genes): the periodic solution."""
        u, s = periodic(_rates(rates, self.fold(switch - onset)), torch.from_numpy(self.fold(t - onset)))
        return u.numpy(), s.numpy()

    def labels(self, t: Array, path: Array) -> Array:
        """All "lineage_1": a circle has no branches."""
        return np.full(len(t), "lineage_1")
