"""From settings and a seed to cells: draw the process, follow the kinetics, measure."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, final

import numpy as np
import torch
from numpy.random import Generator, SeedSequence
from numpy.typing import NDArray

from pyro_velo.kinetics import T_MAX, Rates, trajectory
from pyro_velo.simulate.checks import require, require_count
from pyro_velo.simulate.noise import Noise, Normal
from pyro_velo.simulate.process import Clock, Kinetics, Lineages, LogNormalRates, SharedTime

Array = NDArray[Any]


@final
@dataclass(frozen=True)
class Settings:
    """The parts of a simulation; the defaults are the recipe by which the field compares methods.

    `stationary=True` is a null: every cell stands at its genes' steady state, (alpha / beta, alpha / gamma), whatever
    its time.
    """

    kinetics: Kinetics = field(default_factory=LogNormalRates)
    clock: Clock = field(default_factory=SharedTime)
    lineages: Lineages = field(default_factory=Lineages)
    noise: Noise = field(default_factory=Normal)
    stationary: bool = False

    def __post_init__(self) -> None:
        """Check the settings."""
        for name, kind in {"kinetics": Kinetics, "clock": Clock, "lineages": Lineages, "noise": Noise}.items():
            part, expected = getattr(self, name), f"{name} to be a {kind.__name__} object"
            require(isinstance(part, kind), expected, part, "Pass an instance, as in Settings(noise=Poisson()).")
        branching = self.stationary and self.lineages.count > 1
        remedy = "Cells without dynamics have no lineages: leave out one of the two."
        require(not branching, "one lineage where stationary=True", self.lineages.count, remedy)


@final
@dataclass(frozen=True, eq=False)
class Simulation:
    """What was measured and what is true, for N cells, G genes and L lineages.

    `spliced`, `unspliced` (N, G): measured; abundances (Normal noise) or counts.
    `true_u`, `true_s` (N, G): noise-free abundances. `true_velocity` (N, G): ds/dt = beta u - gamma s, abundance/time.
    `true_alpha`, `true_beta`, `true_gamma` (G,). `true_onset`, `true_switch` (L, G): the times at which a gene comes on
    and goes off, see `Lineages`; NaN in a stationary simulation.
    `true_t` (N,): the cell's time in [0, T_MAX]; `true_gene_t` (N, G): its genes' times, None where they share it.
    `lineage` (N,): "trunk" before the branching, "lineage_1", ... after it; all "lineage_1" where there is but one.
    `library` (N,): counts per unit of abundance, 1 with Normal noise. The truth is in abundances: counts have mean
    `library[:, None] * true_u` (times 1 - gate with zero inflation) and ds/dt `library[:, None] * true_velocity`.
    """

    spliced: Array
    unspliced: Array
    true_u: Array
    true_s: Array
    true_velocity: Array
    true_alpha: Array
    true_beta: Array
    true_gamma: Array
    true_onset: Array
    true_switch: Array
    true_t: Array
    true_gene_t: Array | None
    lineage: Array
    library: Array
    settings: Settings
    seed: int


def simulate(n_cells: int = 1000, n_genes: int = 300, *, settings: Settings | None = None, seed: int = 0) -> Simulation:
    r"""Draw rates, times and lineages, follow the kinetics, and measure; the same seed gives the same bits.

    $$u_{ng}, s_{ng} = \mathrm{trajectory}_g(t_{ng}), \qquad v_{ng} = \beta_g u_{ng} - \gamma_g s_{ng}$$

    Cells stand at the times of a Poisson process scaled to [0, T_MAX], in random order. `n_genes` genes are drawn, of
    which the kinetics may keep fewer (see `LogNormalRates`). Each part draws from a random stream of its own, so that
    settings that differ only in the noise share their truth. Raises InputError for settings out of range.

    Reference for the defaults: the simulations of Bergen et al. 2020 and Gayoso et al. 2023.

    >>> simulation = simulate(50, 300, seed=1)
    >>> simulation.spliced.shape == (50, len(simulation.true_alpha)), float(simulation.true_t.max())
    (True, 20.0)
    """
    n_cells = require_count("n_cells", n_cells, 1, "Ask for one cell at least.")
    n_genes = require_count("n_genes", n_genes, 1, "Ask for one gene at least.")
    seed = require_count("seed", seed, 0, "Pass a seed such as 0.")
    settings = Settings() if settings is None else settings
    for_genes, for_cells, for_clock, for_noise = map(np.random.default_rng, SeedSequence(seed).spawn(4))

    rates = settings.kinetics.draw(n_genes, for_genes)
    onset, switch = settings.lineages.draw(len(rates), for_genes)
    t, lineage = _cells(n_cells, settings.lineages.count, for_cells)
    gene_t = settings.clock.gene_times(t, len(rates), for_clock)
    if settings.stationary:
        onset, switch = np.full_like(onset, np.nan), np.full_like(switch, np.nan)
        u, s, velocity = _steady(rates, n_cells)
    else:
        u, s, velocity = _follow(rates, onset[lineage], switch[lineage], t[:, None] if gene_t is None else gene_t)
    library = settings.noise.library(n_cells, for_noise)
    unspliced, spliced = (settings.noise.observe(library[:, None] * mean, for_noise) for mean in (u, s))
    alpha, beta, gamma = rates.T.copy()
    return Simulation(
        spliced=spliced,
        unspliced=unspliced,
        true_u=u,
        true_s=s,
        true_velocity=velocity,
        true_alpha=alpha,
        true_beta=beta,
        true_gamma=gamma,
        true_onset=onset,
        true_switch=switch,
        true_t=t,
        true_gene_t=gene_t,
        lineage=_labels(t, lineage, settings.lineages),
        library=library,
        settings=settings,
        seed=seed,
    )


def _cells(n_cells: int, n_lineages: int, rng: Generator) -> tuple[Array, Array]:
    """Times (cells,) in [0, T_MAX], shuffled so that the order of the cells tells nothing, and lineage numbers."""
    t = np.cumsum(rng.standard_exponential(n_cells))
    return rng.permutation(t / t[-1] * T_MAX), rng.integers(n_lineages, size=n_cells)


def _steady(rates: Array, n_cells: int) -> tuple[Array, Array, Array]:
    alpha, beta, gamma = rates.T
    u, s = (np.tile(level, (n_cells, 1)) for level in (alpha / beta, alpha / gamma))
    return u, s, np.zeros_like(s)


def _follow(rates: Array, onset: Array, switch: Array, t: Array) -> tuple[Array, Array, Array]:
    """u, s and ds/dt (cells, genes): nothing before the onset, induction up to the switch, repression after it."""
    alpha, beta, gamma = (torch.from_numpy(rate.copy()) for rate in rates.T)
    from_onset = Rates(alpha, beta, gamma, torch.from_numpy(switch - onset))
    u, s = (x.numpy() for x in trajectory(from_onset, torch.from_numpy(np.maximum(t - onset, 0))))
    return u, s, rates[:, 1] * u - rates[:, 2] * s


def _labels(t: Array, lineage: Array, lineages: Lineages) -> Array:
    labels = np.array([f"lineage_{number + 1}" for number in range(lineages.count)])[lineage]
    return labels if lineages.count == 1 else np.where(t < lineages.branch_at * T_MAX, "trunk", labels)
