"""A fit of cells on disk into a copy of their file, some cells at a time."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pyro_velo import embedding
from pyro_velo.batch import Batch, part_size
from pyro_velo.data import anndata_keys as keys
from pyro_velo.data.bridge import (
    LAYER_OF,
    OfGenes,
    VelocityData,
    gene_columns,
    noted,
    reliability,
    spread,
    stacked,
    unit_of,
)
from pyro_velo.data.output import check_output
from pyro_velo.data.results import check_results, copy_all, new_file, new_layer, replaced, write_element, write_tables
from pyro_velo.data.stored import Stored, stored
from pyro_velo.disk import DiskCells
from pyro_velo.errors import InputError
from pyro_velo.kinetics import T_MAX
from pyro_velo.posterior import (
    CELLS_GENES_AT_ONCE,
    LAYERS,
    Draws,
    OverStates,
    moments_of,
    of_batch,
    stream,
    with_library,
)
from pyro_velo.train import Fitted

Array = NDArray[np.float32]
NEIGHBOURS_BYTES = 64 * 2**20
"""What the cells around a block of cells take in float64."""
RANKED_AGAINST = 2_000
"""Cells among which each one's time is ranked, evenly spaced in the file: ranks are then off by 1 % (one sd)."""


def write_file(
    fitted: Fitted,
    data: VelocityData,
    path: str | Path,
    *,
    about: dict[str, Any],
    shared_clock: bool,
    draws: int,
    over_states: OverStates,
    overwrite: bool,
) -> None:
    """Write a copy of the file that `data` were read from to `path`, with what `Fit.write` adds to an AnnData.

    The latent time and the velocities on embeddings look at a cell's direct neighbours (in memory also at theirs);
    where there are none, a time is ranked among `RANKED_AGAINST` cells.

    Memory: some blocks of cells, 12 bytes a pair of neighbours (with their time 40), and what a cell has but once.

    Raises `InputError` as `data.results.new_file` does, where the file has changed since, or holds a fit already.
    """
    source, cells = data.source, data.cells
    if source is None or not isinstance(cells, DiskCells):
        raise InputError("Expected a fit of cells on disk, to write to a file; got cells in memory. Pass the AnnData.")
    check_output(path, overwrite, source=source.path)
    source.check()
    with stored(source.path) as file:
        check_results(file, overwrite=overwrite)
        with new_file(path, overwrite) as into:
            copy_all(file, into, leave_out=replaced(file))
            results = _Results(file, into, data, cells, fitted.program.n_latent)
            rates = stream(
                fitted, cells, results.add, draws=draws, over_states=over_states, seed=fitted.training.settings.seed
            )
            _write_rest(file, into, results, fitted, rates, about=about, shared_clock=shared_clock)
            source.check()


@dataclass
class _Results:
    """The layers of a fit, filled batch by batch, and what is summed up meanwhile."""

    file: Stored
    into: Any
    data: VelocityData
    cells: DiskCells
    n_latent: int
    layers: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        shape = (n_cells, _) = self.file.shape
        self.rows = part_size(n_cells, CELLS_GENES_AT_ONCE // self.cells.n_genes)
        self.layers = {name: new_layer(self.into, LAYER_OF[name], shape, np.float32, self.rows) for name in LAYERS}
        self.state = new_layer(self.into, keys.FIT_STATE, shape, np.uint8, self.rows)
        # In one piece each: small ones, kept from every batch, would lie where the next batch's large ones can't.
        self.uncertainty, self.median_time = np.empty(n_cells, np.float32), np.empty(n_cells, np.float32)
        self.z = np.empty((n_cells, self.n_latent), np.float32)
        self.every = -(-n_cells // RANKED_AGAINST)
        self.times = np.empty((-(-n_cells // self.every), self.cells.n_genes), np.float32)
        self.log_likelihood = np.zeros(self.cells.n_genes)
        self.fit = _Explained(self.cells.n_genes)
        spliced = self.cells.sample.molecules[1]
        self.low, self.high = (getattr(spliced, name)(0).cpu().numpy() for name in ("amin", "amax"))

    def add(self, index: NDArray[np.int64], drawn: Draws) -> None:
        """Write the summaries of the cells at `index`, which are neighbours in the file."""
        found, rows = of_batch(drawn), slice(int(index[0]), int(index[-1]) + 1)
        for name, values in found.layers.items():
            unit, zero = unit_of(name, self.data.scaling)
            self.layers[name][rows] = spread(values, self.data.genes, unit, zero)
        states = np.full((len(index), len(self.data.genes)), keys.NOT_FITTED, np.uint8)
        states[:, self.data.genes] = found.state
        self.state[rows] = states
        t = found.layers["t"]
        self.uncertainty[rows], self.median_time[rows] = found.uncertainty, np.median(t, axis=1)
        self.z[rows] = found.z
        chosen = np.flatnonzero(index % self.every == 0)
        self.times[index[chosen] // self.every] = t[chosen]
        self.log_likelihood += found.log_likelihood
        batch = self.cells.batch(torch.from_numpy(index).to(self.cells.device))
        u, s = self._measured(batch, rows)
        self.fit.add(u * self._ratio(), found.layers["u"], s, found.layers["s"])
        spliced = batch.s.cpu().numpy()
        self.low, self.high = np.minimum(self.low, spliced.min(0)), np.maximum(self.high, spliced.max(0))

    def _ratio(self) -> Any:
        ratio = self.cells.ratio
        return ratio.cpu().numpy() if isinstance(ratio, torch.Tensor) else ratio

    def _measured(self, batch: Batch, rows: slice) -> tuple[Array, Array]:
        """Unspliced and spliced (B, G), each in units of its range."""
        scale, source = self.data.scaling, self.data.source
        if batch.size_factors is None:
            u, s = batch.molecules
        elif source is not None and source.ranges == self.data.layers:
            zero, unit = (
                np.stack(pair)[:, None] for pair in ((scale.u_zero, scale.s_zero), (scale.u_unit, scale.s_unit))
            )
            u, s = ((batch.molecules / batch.size_factors).cpu() - torch.from_numpy(zero)) / torch.from_numpy(unit)
        else:
            assert source is not None
            layers = (self.file.layer(name).rows(rows.start, rows.stop) for name in source.ranges)
            s_range, u_range = layers
            u, s = stacked(u_range, s_range, self.data.genes, scale)
        return u.cpu().numpy(), s.cpu().numpy()


class _Explained:
    """How well u and s are explained, from sums over cells: residual squares, squares about the mean."""

    def __init__(self, n_genes: int) -> None:
        self.n, self.sums = 0, np.zeros((2, 3, n_genes))

    def add(self, u: Array, fitted_u: Array, s: Array, fitted_s: Array) -> None:
        """Take in some cells, (B, G) each."""
        self.n += len(u)
        for into, observed, fitted in zip(self.sums, (u, s), (fitted_u, fitted_s), strict=True):
            x = observed.astype(np.float64)
            into += np.stack([((x - fitted) ** 2).sum(0), x.sum(0), (x**2).sum(0)])

    def r2(self) -> Array:
        """1 - residual sum of squares / sum of squares about the mean, (G,): the lower of the two molecules'."""
        residual, total, squares = self.sums.swapaxes(0, 1)
        return np.asarray((1 - residual / (squares - total**2 / self.n)).min(0), np.float32)


def _write_rest(
    file: Stored,
    into: Any,
    results: _Results,
    fitted: Fitted,
    rates: list[dict[str, torch.Tensor]],
    *,
    about: dict[str, Any],
    shared_clock: bool,
) -> None:
    """What is known once all cells have been looked at."""
    data, obs, var = results.data, file.obs.copy(), file.var.copy()
    log_likelihood = (results.log_likelihood / len(results.cells)).astype(np.float32)
    columns = gene_columns(OfGenes(*moments_of(rates), log_likelihood, results.fit.r2()), data)
    for name, column in (columns | {keys.VELOCITY_GENES: data.genes}).items():
        var[name] = column
    z, library = with_library(fitted, results.z)
    write_element(into["obsm"], keys.LATENT, z)
    obs[keys.VELOCITY_UNCERTAINTY] = results.uncertainty
    if library is not None:
        obs[keys.LIBRARY_SIZE] = library
    if shared_clock:
        obs[keys.LATENT_TIME] = results.median_time / T_MAX
    if "distances" in file.names("obsp"):
        cosines = _cosines(results, file.element("obsp/distances"))
        if not shared_clock:
            obs[keys.LATENT_TIME] = embedding.potential(cosines)
        _write_arrows(file, into, cosines)
    elif not shared_clock:
        obs[keys.LATENT_TIME] = _mean_rank(results, log_likelihood)
    write_tables(into, obs, var, file.uns | {keys.UNS: noted(file.uns.get(keys.UNS, {}), about, data)})


def _cosines(results: _Results, graph: Any) -> Any:
    """The correlation of each cell's velocity with the steps to its neighbours, genes in units of their range."""
    cells, genes = results.cells, results.data.genes
    span = np.where(results.high > results.low, results.high - results.low, 1.0).astype(np.float64)
    unit = span * (results.data.scaling.s_unit if cells.sample.counts is None else 1)

    def velocity(start: int, stop: int) -> NDArray[np.float64]:
        return np.asarray(results.layers["velocity"][start:stop][:, genes] / unit, np.float64)

    def expression(numbers: NDArray[np.int64]) -> NDArray[np.float64]:
        return np.asarray(cells.rows.read(torch.from_numpy(numbers))[1].numpy() / span, np.float64)

    per_cell = 8 * cells.n_genes * (1 + graph.nnz / len(cells))
    size = max(1, int(NEIGHBOURS_BYTES / per_cell))
    return embedding.cosine_correlations_in_blocks(velocity, expression, graph, size=size)


def _write_arrows(file: Stored, into: Any, cosines: Any) -> None:
    """The velocity on every embedding of two dimensions."""
    transitions = embedding.transitions_of(cosines)
    for name in file.names("obsm"):
        held = file.group[f"obsm/{name}"]
        if name.startswith("X_") and name != keys.LATENT and getattr(held, "shape", ())[1:] == (2,):
            arrows = embedding.project(transitions, file.element(f"obsm/{name}"))
            write_element(into["obsm"], keys.velocity_embedding(name), arrows)


def _mean_rank(results: _Results, log_likelihood: Array) -> NDArray[np.float64]:
    """The mean rank over genes of the latent time, as `bridge.latent_time`, each rank among evenly spaced cells."""
    ordered = np.sort(results.times, axis=0)
    weights, mean = np.exp(log_likelihood - log_likelihood.max()), np.empty(len(results.cells))
    # Gene by gene in memory, which is searched in 160 ns where cell by cell it takes 260.
    scatter, known = ordered.std(axis=0), np.ascontiguousarray(ordered.T)
    for start in range(0, len(mean), results.rows):
        rows = slice(start, start + results.rows)
        t, t_sd = (results.layers[name][rows][:, results.data.genes] for name in ("t", "t_sd"))
        weight, total = weights * reliability(t_sd, scatter), np.zeros(len(t))
        for own, of_gene, each in zip(weight.T, known, np.ascontiguousarray(t.T), strict=True):
            # Cells of one time share the rank in their middle.
            total += own * (np.searchsorted(of_gene, each) + np.searchsorted(of_gene, each, side="right")) / 2
        mean[rows] = total / weight.sum(1)
    span = np.ptp(mean)
    return (mean - mean.min()) / span if span > 0 else np.zeros_like(mean)
