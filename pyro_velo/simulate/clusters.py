r"""Counts of cells that are of known clusters and under known conditions; and two data sets that have no clusters.

A gene's mean in a cell of cluster k under condition c is the cell's library size times

$$\exp(b_g + s\,m_{gk} + e\,f_{gc} + i\,h_{gkc})$$

with m, f and h standard Normal, m in a share of the genes alone, f and h 0 under the first condition; counts scatter
around it as a `Noise` says.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from pyro_velo.simulate.checks import require, require_count, require_number
from pyro_velo.simulate.noise import LibrarySize, Noise
from pyro_velo.simulate.noise import NegativeBinomial as NegativeBinomialNoise

Array = NDArray[Any]
RATES = tuple(float(rate) for rate in range(1, 11))
"""Those of the synthetic Poisson data of seed 001: ten genes."""


@dataclass(frozen=True)
class ClusterSettings:
    """What the cells are like.

    Attributes:
        clusters: how many; 1 is a null. separation: s, the sd of a marker's log mean over clusters. markers: the share
        of genes that differ between clusters. spread: the sd of b, over genes, around a mean of 1. concentration: of
        the symmetric Dirichlet that the clusters' shares are drawn from; inf: equal ones. conditions: how many, of
        equal shares. effect: e, the sd of a gene's log fold change under a condition. interaction: i, that of what is a
        cluster's own in it. noise: what the measurement adds, library sizes included.
    """

    clusters: int = 5
    separation: float = 1.0
    markers: float = 0.5
    spread: float = 1.0
    concentration: float = 20.0
    conditions: int = 1
    effect: float = 0.5
    interaction: float = 0.0
    noise: Noise = field(default_factory=lambda: NegativeBinomialNoise(library_size=LibrarySize(depth=2.0)))

    def __post_init__(self) -> None:
        """Check the settings."""
        require_count("clusters", self.clusters, 1, "Pass clusters=5, or 1 for cells without structure.")
        require_count("conditions", self.conditions, 1, "Pass conditions=2, or 1 for none.")
        for name, remedy in {
            "separation": "Pass separation=1.0.",
            "spread": "Pass spread=1.0, or 0 for genes of one mean.",
            "effect": "Pass effect=0.5, or 0 for none.",
            "interaction": "Pass interaction=0.0.",
        }.items():
            require_number(name, getattr(self, name), "[0, inf)", remedy)
        require_number("markers", self.markers, "[0, 1]", "Pass a share of the genes.")
        require_number("concentration", self.concentration, "(0, inf]", "Pass 20.0, or inf for equal shares.")
        require(isinstance(self.noise, Noise), "noise to be a Noise", self.noise, "Pass simulate.NegativeBinomial().")


@dataclass(frozen=True)
class ClusterSimulation:
    """Counts (cells, genes) and what is true of them.

    `label` and `condition` (cells,) are numbers; `log_mean` (clusters, conditions, genes) is that of a cell of library
    size 1; `library` (cells,) the cells' own.
    """

    counts: Array
    label: Array
    condition: Array
    library: Array
    log_mean: Array
    settings: ClusterSettings
    seed: int


def simulate_clusters(
    n_cells: int, n_genes: int, *, settings: ClusterSettings | None = None, seed: int = 0
) -> ClusterSimulation:
    """Draw cells; every cluster is under every condition. Raises InputError for counts below 1.

    >>> simulate_clusters(100, 20, settings=ClusterSettings(clusters=3), seed=0).counts.shape
    (100, 20)
    """
    settings, rng = settings or ClusterSettings(), np.random.default_rng(seed)
    require_count("n_cells", n_cells, 1, "Pass a number of cells.")
    require_count("n_genes", n_genes, 1, "Pass a number of genes.")
    log_mean = _log_means(n_genes, settings, rng)
    label = rng.choice(settings.clusters, n_cells, p=_shares(settings, rng))
    condition = rng.integers(settings.conditions, size=n_cells)
    library = settings.noise.library(n_cells, rng)
    counts = settings.noise.observe(library[:, None] * np.exp(log_mean[label, condition]), rng)
    return ClusterSimulation(counts, label, condition, library, log_mean, settings, seed)


def simulate_poisson(n_cells: int = 2000, rates: tuple[float, ...] = RATES, seed: int = 0) -> Array:
    """Independent Poisson counts (cells, genes), a rate for each gene and no structure at all (seed 001, 3.2)."""
    require_count("n_cells", n_cells, 1, "Pass a number of cells.")
    return np.random.default_rng(seed).poisson(np.asarray(rates), (n_cells, len(rates)))


def _log_means(n_genes: int, settings: ClusterSettings, rng: Generator) -> Array:
    """(clusters, conditions, genes)."""
    base = rng.normal(-(settings.spread**2) / 2, settings.spread, n_genes)
    marker = rng.permutation(n_genes) < round(settings.markers * n_genes)
    own = settings.separation * marker * rng.standard_normal((settings.clusters, 1, n_genes))
    own = own if settings.clusters > 1 else np.zeros_like(own)
    shared = settings.effect * rng.standard_normal((1, settings.conditions, n_genes))
    between = settings.interaction * rng.standard_normal((settings.clusters, settings.conditions, n_genes))
    shared[:, 0], between[:, 0] = 0, 0
    return base + own + shared + between


def _shares(settings: ClusterSettings, rng: Generator) -> Array:
    if np.isinf(settings.concentration):
        return np.full(settings.clusters, 1 / settings.clusters)
    return rng.dirichlet(np.full(settings.clusters, settings.concentration))
