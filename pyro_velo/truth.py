"""The truth of simulated cells, and the draws of a fit held against it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.random import Generator
from numpy.typing import NDArray
from torch import Tensor

from pyro_velo.batch import Batch, Cells
from pyro_velo.calibration import Record
from pyro_velo.data import anndata_keys as keys
from pyro_velo.errors import InputError
from pyro_velo.kinetics import Rates
from pyro_velo.models.velocity import Explained, Given, Landmarks, VelocityProgram
from pyro_velo.posterior import OVER_STATES, Draws, OverStates, stream
from pyro_velo.tallies import Tally, ranks, tally
from pyro_velo.train import Fitted

if TYPE_CHECKING:
    from anndata import AnnData


Array = NDArray[np.float64]
LOGARITHMIC = ("alpha", "beta", "gamma", "gamma/beta")
UNITS = dict.fromkeys(LOGARITHMIC, "log") | {"switch_time": "time", "time": "time", "velocity": "abundance/time"}


class Truth(NamedTuple):
    """What is true: `values` (G,) of gene-level sites by name; `velocity`, `time` (N, G)."""

    values: Mapping[str, Array]
    velocity: Array
    time: Array


def measure(
    fitted: Fitted,
    cells: Cells,
    truth: Truth,
    *,
    draws: int,
    seed: int,
    over_states: OverStates = OVER_STATES,
    unit: Any = 1.0,
    progress: bool | None = None,
) -> Record:
    """Count the truth against the draws of a fit, batch by batch: never draws x cells x genes.

    `unit` (G,): what one unit of the model's abundance is in that of the truth. Draws are those of `posterior.stream`
    with this `seed`. A cell and a gene are chosen at random for the ranks that stand for the fit.
    """
    rng = np.random.default_rng(seed)
    chosen = (int(rng.integers(len(cells))), int(rng.integers(cells.n_genes)))
    tallies: dict[str, Tally] = {}
    rank: dict[str, int] = {}
    drawn: list[dict[str, Tensor]] = []
    for name, values, scale in (("velocity", truth.velocity, unit), ("time", truth.time, 1.0)):
        seen = _Counting(values, draws, scale, rng, chosen)
        asked = _Asked(fitted.program, time=name == "time")
        drawn = stream(
            replace(fitted, program=asked),
            cells,
            seen,
            draws=draws,
            over_states=over_states,
            seed=seed,
            progress=progress,
        )
        tallies[name] = seen.tally
        if seen.rank is not None:
            rank[name] = seen.rank
    sites = {name: torch.stack([each[name] for each in drawn]).double().cpu().numpy() for name in Rates._fields}
    sites["alpha"] = sites["alpha"] * unit
    true, taken = _rates(truth.values), _rates(sites)
    for name in true:
        found = tally(true[name], taken[name], rng)
        if found.n:
            tallies[name] = found
            known = np.flatnonzero(np.isfinite(true[name]))
            # Where lineages differ, the gene that was chosen may have no switching time that is the truth.
            gene = chosen[1] if chosen[1] in known else rng.choice(known)
            rank[name] = int(ranks(true[name][gene], taken[name][:, gene], rng))
    order = [name for name in UNITS if name in tallies]
    return Record({name: tallies[name] for name in order}, {name: rank[name] for name in order if name in rank})


def _rates(values: Mapping[str, Array]) -> dict[str, Array]:
    """What is compared of the rates, logarithms where they are positive without a bound."""
    found = {name: np.asarray(values[name], np.float64) for name in Rates._fields}
    found["gamma/beta"] = found["gamma"] / found["beta"]
    return {name: np.log(value) if name in LOGARITHMIC else value for name, value in found.items()}


class _Counting:
    """Receives batches of draws, and adds up their tallies."""

    def __init__(self, truth: Array, draws: int, unit: Any, rng: Generator, chosen: tuple[int, int]) -> None:
        self.truth, self.unit, self.rng, self.chosen = truth, unit, rng, chosen
        self.tally = Tally.empty(draws)
        self.rank: int | None = None

    def __call__(self, index: NDArray[np.int64], drawn: Draws) -> None:
        values = drawn.velocities.cpu().numpy() * self.unit
        self.tally += tally(self.truth[index], values, self.rng)
        cell, gene = self.chosen
        for row in np.flatnonzero(index == cell):
            if np.isfinite(self.truth[cell, gene]):
                self.rank = int(ranks(self.truth[cell, gene], values[:, row, gene], self.rng))


class _Asked:
    """A program that may be asked for times in the place of velocities."""

    def __init__(self, program: VelocityProgram, *, time: bool) -> None:
        self.program, self.recipe, self.time = program, program.recipe, time

    def landmarks(self, rates: Rates, values: Mapping[str, Tensor]) -> Landmarks:
        return self.program.landmarks(rates, values)

    def explain(self, values: Mapping[str, Tensor], batch: Batch, *given: Given) -> Explained:
        found = self.program.explain(values, batch, *given)
        return found._replace(velocity=found.t) if self.time else found


def truth_of(adata: AnnData, genes: NDArray[np.bool_]) -> Truth:
    """What a simulation left in an AnnData, of the fitted genes."""
    if keys.TRUE_VELOCITY not in adata.layers:
        raise InputError(
            f"Layer {keys.TRUE_VELOCITY!r} is missing; expected a simulation with its truth. Make one with to_anndata."
        )
    library = float(np.median(adata.obs[keys.TRUE_LIBRARY])) if keys.TRUE_LIBRARY in adata.obs else 1.0
    columns = (keys.TRUE_ALPHA, keys.TRUE_BETA, keys.TRUE_GAMMA, keys.TRUE_SWITCH)
    values = {
        name: adata.var[column].to_numpy(np.float64)[genes] if column in adata.var else np.full(genes.sum(), np.nan)
        for name, column in zip(Rates._fields, columns, strict=True)
    }
    values["alpha"] = values["alpha"] * library
    velocity = np.asarray(adata.layers[keys.TRUE_VELOCITY], np.float64)[:, genes] * library
    if keys.TRUE_TIME in adata.layers:
        time = np.asarray(adata.layers[keys.TRUE_TIME], np.float64)[:, genes]
    else:
        time = np.repeat(adata.obs[keys.TRUE_TIME].to_numpy(np.float64)[:, None], genes.sum(), axis=1)
    return Truth(values, velocity, time)
