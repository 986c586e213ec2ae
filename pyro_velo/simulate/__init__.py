"""Cells and genes whose kinetics, or clusters, are known: what a method must recover, and nulls without either.

Each part of the story is an object that can be replaced: the rates (`Kinetics`), the cells' times (`Clock`), the path
they follow (`Lineages` that branch, or a `Cycle`), and what the measurement adds (`Noise`, `Batches`). No global random
state is read or written.

>>> counts = simulate(100, 50, settings=Settings(noise=Poisson(), lineages=Lineages(count=2)), seed=0)
>>> sorted(set(counts.lineage.tolist()))
['lineage_1', 'lineage_2', 'trunk']
"""

from __future__ import annotations

from pyro_velo.simulate.batches import Batches
from pyro_velo.simulate.clusters import ClusterSettings, ClusterSimulation, simulate_clusters, simulate_poisson
from pyro_velo.simulate.noise import (
    Counts,
    LibrarySize,
    NegativeBinomial,
    Noise,
    Normal,
    Poisson,
    ZeroInflatedNegativeBinomial,
)
from pyro_velo.simulate.process import (
    Clock,
    Cycle,
    GeneTime,
    GivenRates,
    Kinetics,
    Lineages,
    LogNormalRates,
    Process,
    SharedTime,
)
from pyro_velo.simulate.simulation import Settings, Simulation, simulate, simulate_in_blocks

NOISES: dict[str, type[Noise]] = {
    "normal": Normal,
    "poisson": Poisson,
    "nb": NegativeBinomial,
    "zinb": ZeroInflatedNegativeBinomial,
}
"""Every noise by the name that the command line gives it; the tests run over this table too."""

__all__ = [
    "NOISES",
    "Batches",
    "Clock",
    "ClusterSettings",
    "ClusterSimulation",
    "Counts",
    "Cycle",
    "GeneTime",
    "GivenRates",
    "Kinetics",
    "LibrarySize",
    "Lineages",
    "LogNormalRates",
    "NegativeBinomial",
    "Noise",
    "Normal",
    "Poisson",
    "Process",
    "Settings",
    "SharedTime",
    "Simulation",
    "ZeroInflatedNegativeBinomial",
    "simulate",
    "simulate_clusters",
    "simulate_in_blocks",
    "simulate_poisson",
]
