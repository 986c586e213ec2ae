"""From settings and a seed to cells: draw the process, follow the kinetics, measure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple, final

import numpy as np
from numpy.random import Generator, SeedSequence
from numpy.typing import NDArray

from pyro_velo.kinetics import T_MAX
from pyro_velo.simulate.batches import Batches
from pyro_velo.simulate.checks import require, require_count
from pyro_velo.simulate.noise import Noise, Normal
from pyro_velo.simulate.process import Clock, Kinetics, Lineages, LogNormalRates, Process, SharedTime

Array = NDArray[Any]


@final
@dataclass(frozen=True)
class Settings:
    """The parts of a simulation; the defaults are the recipe by which the field compares methods.

    `lineages` is the process that cells follow: `Lineages`, or a `Cycle`. `stationary=True` is a null: every cell
    stands at its genes' steady state, (alpha / beta, alpha / gamma), whatever its time.
    """

    kinetics: Kinetics = field(default_factory=LogNormalRates)
    clock: Clock = field(default_factory=SharedTime)
    lineages: Process = field(default_factory=Lineages)
    noise: Noise = field(default_factory=Normal)
    batches: Batches = field(default_factory=Batches)
    stationary: bool = False

    def __post_init__(self) -> None:
        """Check the settings."""
        for name, kind in PARTS.items():
            part, expected = getattr(self, name), f"{name} to be a {kind.__name__} object"
            require(isinstance(part, kind), expected, part, "Pass an instance, as in Settings(noise=Poisson()).")
        one_path = isinstance(self.lineages, Lineages) and self.lineages.count == 1
        remedy = "Cells without dynamics follow no path: leave out one of the two."
        require(one_path or not self.stationary, "one lineage where stationary=True", self.lineages, remedy)


PARTS: dict[str, type] = {
    "kinetics": Kinetics,
    "clock": Clock,
    "lineages": Process,
    "noise": Noise,
    "batches": Batches,
}
"""What each entry of `Settings` must be."""


@final
@dataclass(frozen=True, eq=False)
class Simulation:
    """What was measured and what is true, for N cells, G genes, L lineages and B batches.

    `spliced`, `unspliced` (N, G): measured; abundances (Normal noise) or counts.
    `true_u`, `true_s` (N, G): noise-free abundances. `true_velocity` (N, G): ds/dt = beta u - gamma s, abundance/time.
    `true_alpha`, `true_beta`, `true_gamma` (G,). `true_onset`, `true_switch` (L, G): the times at which a gene comes on
    and goes off, see `Lineages` and `Cycle`; NaN in a stationary simulation.
    `true_t` (N,): the cell's time in [0, T_MAX]; `true_gene_t` (N, G): its genes' times, None where they share it.
    `lineage` (N,): "trunk" before the branching, "lineage_1", ... after it; all "lineage_1" where there is but one.
    `library` (N,): counts per unit of abundance, 1 with Normal noise. `batch` (N,): "batch_1", "batch_2", ....
    `true_capture_u`, `true_capture_s` (B, G): the share of the molecules that is captured, see `Batches`.
    `true_gate` (G,): the probability that a count is lost, 0 without zero inflation.
    The truth is in abundances, before capture: a cell n of batch b has counts of mean
    `library[n] * true_capture_u[b] * true_u[n]` (times `1 - true_gate`), and the ds/dt of its counts is
    `library[n] * true_capture_s[b] * true_velocity[n]`.
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
    true_capture_u: Array
    true_capture_s: Array
    true_gate: Array
    lineage: Array
    library: Array
    batch: Array
    settings: Settings
    seed: int


def simulate(n_cells: int = 1000, n_genes: int = 300, *, settings: Settings | None = None, seed: int = 0) -> Simulation:
    r"""Draw rates, times and lineages, follow the kinetics, and measure; the same seed gives the same bits.

    $$u_{ng}, s_{ng} = \mathrm{trajectory}_g(t_{ng}), \qquad v_{ng} = \beta_g u_{ng} - \gamma_g s_{ng}$$

    Cells stand at the times of a Poisson process scaled to [0, T_MAX], in random order. `n_genes` genes are drawn, of
    which the kinetics may keep fewer (see `LogNormalRates`). Each part draws from a random stream of its own, so that
    settings that differ only in the noise or the batches share their truth. Raises InputError for settings out of
    range.

    Reference for the defaults: the simulations of Bergen et al. 2020 and Gayoso et al. 2023.

    >>> simulation = simulate(50, 300, seed=1)
    >>> simulation.spliced.shape == (50, len(simulation.true_alpha)), float(simulation.true_t.max())
    (True, 20.0)
    """
    n_cells = require_count("n_cells", n_cells, 1, "Ask for one cell at least.")
    (whole,) = simulate_in_blocks(n_cells, n_genes, size=n_cells, settings=settings, seed=seed)
    return whole


def simulate_in_blocks(
    n_cells: int, n_genes: int, *, size: int, settings: Settings | None = None, seed: int = 0
) -> Iterator[Simulation]:
    """As `simulate`, `size` cells at a time (the last block may be smaller), all of the same genes.

    The truth is that of `simulate`; the noise of each block is drawn after that of the one before, and so are genes'
    own times. Normal noise is in units of the block's own percentile. Memory: that of a block, and 24 bytes a cell.
    """
    n_cells = require_count("n_cells", n_cells, 1, "Ask for one cell at least.")
    size = require_count("size", size, 1, "Ask for one cell at a time at least.")
    n_genes = require_count("n_genes", n_genes, 1, "Ask for one gene at least.")
    seed = require_count("seed", seed, 0, "Pass a seed such as 0.")
    settings = Settings() if settings is None else settings
    for_genes, for_cells, for_clock, for_noise, for_batches = map(np.random.default_rng, SeedSequence(seed).spawn(5))
    process = settings.lineages

    rates = settings.kinetics.draw(n_genes, for_genes)
    onset, switch = process.draw(len(rates), for_genes)
    t, path = _cells(n_cells, len(onset), for_cells)
    if settings.stationary:
        onset, switch = np.full_like(onset, np.nan), np.full_like(switch, np.nan)
    alpha, beta, gamma = rates.T.copy()
    batch = settings.batches.assign(n_cells, for_batches)
    capture_u, capture_s = settings.batches.capture(len(rates), for_batches)
    seen = _Seen(batch, capture_u, capture_s, settings.noise.library(n_cells, for_noise))
    for start in range(0, n_cells, size):
        rows = slice(start, start + size)
        gene_t = settings.clock.gene_times(t[rows], len(rates), for_clock)
        gene_t = None if gene_t is None else process.fold(gene_t)
        if settings.stationary:
            u, s = _steady(rates, len(t[rows]))
        else:
            times = t[rows, None] if gene_t is None else gene_t
            u, s = process.abundances(rates, onset[path[rows]], switch[path[rows]], times)
        yield Simulation(
            **seen.among(rows).measure(u, s, settings.noise, for_noise),
            true_u=u,
            true_s=s,
            # In the steady state the difference would be that of rounding.
            true_velocity=np.zeros_like(s) if settings.stationary else beta * u - gamma * s,
            true_alpha=alpha,
            true_beta=beta,
            true_gamma=gamma,
            true_onset=onset,
            true_switch=switch,
            true_t=t[rows],
            true_gene_t=gene_t,
            lineage=process.labels(t[rows], path[rows]),
            settings=settings,
            seed=seed,
        )


def _cells(n_cells: int, n_paths: int, rng: Generator) -> tuple[Array, Array]:
    """Times (cells,) in [0, T_MAX], shuffled so that the order of the cells tells nothing, and numbers of paths."""
    t = np.cumsum(rng.standard_exponential(n_cells))
    return rng.permutation(t / t[-1] * T_MAX), rng.integers(n_paths, size=n_cells)


def _steady(rates: Array, n_cells: int) -> tuple[Array, Array]:
    """The u and s (cells, genes) of cells that stand still."""
    alpha, beta, gamma = rates.T
    return np.tile(alpha / beta, (n_cells, 1)), np.tile(alpha / gamma, (n_cells, 1))


class _Seen(NamedTuple):
    """How cells are seen: the batch (N,) of each, what each batch captures (B, G), library sizes (N,)."""

    batch: Array
    capture_u: Array
    capture_s: Array
    library: Array

    def among(self, rows: slice) -> _Seen:
        """Of some cells."""
        return self._replace(batch=self.batch[rows], library=self.library[rows])

    def measure(self, u: Array, s: Array, noise: Noise, for_noise: Generator) -> dict[str, Array]:
        """What is seen of the abundances, and of which library size, batch, capture and gate it is."""
        library = self.library[:, None]
        return {
            "unspliced": noise.observe(library * self.capture_u[self.batch] * u, for_noise),
            "spliced": noise.observe(library * self.capture_s[self.batch] * s, for_noise),
            "library": self.library,
            "batch": np.array([f"batch_{number + 1}" for number in range(len(self.capture_u))])[self.batch],
            "true_capture_u": self.capture_u,
            "true_capture_s": self.capture_s,
            "true_gate": noise.gates(u.shape[1]),
        }
