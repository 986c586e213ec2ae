"""`preprocess.prepare` of a file that does not fit into memory: the same numbers, some cells or genes at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import sparse
from scipy.linalg import eigh

from pyro_velo.data import anndata_keys as keys
from pyro_velo.data.checks import check_adata, check_counts, check_neighbors, check_two, check_whole
from pyro_velo.data.matrices import sums
from pyro_velo.data.on_disk import blocks
from pyro_velo.data.output import check_output
from pyro_velo.data.results import copy_genes, new_file, new_layer, write_element, write_tables
from pyro_velo.data.stored import Stored, stored
from pyro_velo.disk import Columns
from pyro_velo.preprocess import (
    MIN_CELLS_SPECTRAL,
    PrepareSettings,
    averaging_weights,
    check_differ,
    enough_shared,
    factors_of,
    find_neighbours,
    log_normalised,
    most_variable,
    relative_to_neighbours,
    shared_counts,
    sizes,
    threads_kept,
    velocity_genes,
)

Array = NDArray[np.float64]

GENES_BYTES = 64 * 2**20
"""What all cells' numbers of the genes that are looked at together take as float32."""
WIDEST = 64
CELLS_A_CHUNK = 2048
BINS = 20
"""Of mean expression, within which dispersions are compared."""
RAW = (keys.SPLICED, keys.UNSPLICED)


@threads_kept()
def prepare_file(
    path: str | Path,
    output: str | Path,
    settings: PrepareSettings | None = None,
    *,
    layers: tuple[str, str] = RAW,
    overwrite: bool = False,
    scratch: str | Path | None = None,
) -> None:
    """Write what `prepare` makes of the counts in `path`, `.h5ad` or `.zarr`, to `output`, whole or not at all.

    `layers` are the raw ones, spliced and unspliced; `scratch` is a folder for 8 bytes a cell and chosen gene while it
    works (None: that of `output`). The components come from the covariance of the genes, summed over cells; all
    numbers are those of `prepare` to rounding.

    Memory: 16 bytes a pair of genes, some hundred bytes a cell for its neighbours, and what scanpy takes to find them.

    Raises `InputError` as `prepare` and `velocity_data_on_disk` do.
    """
    settings = settings or PrepareSettings()
    output = check_output(output, overwrite, source=path)
    with stored(path) as file:
        found = _counted(file, layers, settings)
        log = _LogSums.of(file, layers[0], found)
        check_differ(log.spread, file.shape[0])
        genes = np.flatnonzero(found.keep)
        if len(genes) > settings.n_top_genes:
            genes = genes[most_variable(normalised_dispersions(log.mean, log.variance), settings.n_top_genes)]
        folder = output.absolute().parent if scratch is None else Path(scratch)
        width = max(1, min(WIDEST, GENES_BYTES // (4 * file.shape[0])))
        counts = {name: Columns(file.shape[0], len(genes), width, folder) for name in RAW}
        tables = _graph(file, genes, settings, _kept(file, layers, genes, counts, found), counts[keys.SPLICED], found)
        with new_file(output, overwrite) as into:
            copy_genes(file, into, genes, dict(zip(RAW, layers, strict=True)), leave_out=(keys.MS, keys.MU))
            _write(into, file, tables, counts, found, settings)


@dataclass(frozen=True)
class _Found:
    """What the counts say before any is changed: `keep` (genes,), size `factors` (cells,) of each layer."""

    keep: NDArray[np.bool_]
    factors: dict[str, Array]


def _counted(file: Stored, layers: tuple[str, str], settings: PrepareSettings) -> _Found:
    """Every check that `prepare` makes, and what it needs of all cells."""
    check_adata(file.tables())
    check_two(*layers)
    n_cells, n_genes = file.shape
    check_neighbors(n_cells, settings.n_neighbors)
    of_genes, of_cells, shared = np.zeros((2, n_genes)), np.zeros((2, n_cells)), np.zeros(n_genes)
    for start, both in blocks(file, layers):
        for i, (name, layer) in enumerate(zip(layers, both, strict=True)):
            check_whole(layer, name)
            of_genes[i] += sums(layer, 0)
            of_cells[i, start : start + layer.shape[0]] = sums(layer, 1)
        shared += shared_counts(*both)
    check_counts(list(of_genes), list(of_cells), file.obs.index, layers, settings.max_unspliced_ratio)
    factors = {name: factors_of(totals) for name, totals in zip(RAW, of_cells, strict=True)}
    return _Found(enough_shared(shared, settings), factors)


def _logs(file: Stored, layer: str, genes: NDArray, found: _Found) -> Iterator[sparse.csr_matrix]:
    """Log1p of the scaled counts of some genes, block by block."""
    factors = found.factors[keys.SPLICED]
    for start, (counts,) in blocks(file, (layer,)):
        yield log_normalised(sparse.csr_matrix(counts)[:, genes], factors[start : start + counts.shape[0]])


@dataclass(frozen=True)
class _LogSums:
    """Of each kept gene: mean and variance of the scaled counts, and the range of their log1p."""

    mean: Array
    variance: Array
    spread: Array

    @classmethod
    def of(cls, file: Stored, layer: str, found: _Found) -> _LogSums:
        """From one pass over the spliced counts."""
        n, genes = file.shape[0], np.flatnonzero(found.keep)
        total, squares = np.zeros(len(genes)), np.zeros(len(genes))
        low, high = np.full(len(genes), np.inf), np.full(len(genes), -np.inf)
        for log in _logs(file, layer, genes, found):
            scaled = log.copy()
            scaled.data = np.expm1(scaled.data).astype(np.float64)
            total += sums(scaled, 0)
            squares += sums(scaled.multiply(scaled), 0)
            low = np.minimum(low, log.min(axis=0).toarray().ravel())
            high = np.maximum(high, log.max(axis=0).toarray().ravel())
        mean = total / n
        return cls(mean, (squares / n - mean**2) * n / (n - 1), high - low)


def normalised_dispersions(mean: Array, variance: Array) -> Array:
    r"""How much more genes vary than others of their mean: $\log(\sigma^2/\mu)$, standardised in bins of $\log(1+\mu)$.

    Shapes: mean, variance (genes,) of scaled counts; returns (genes,), NaN where a gene does not vary. A gene alone in
    its bin counts 1. Reference: Satija et al. 2015, as scanpy's `seurat` flavour has it.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        dispersion = np.where(variance > 0, np.log(variance / mean), np.nan)
    frame = pd.DataFrame({"dispersion": dispersion, "bin": pd.cut(np.log1p(mean), BINS)})
    of_bin = frame.groupby("bin", observed=True)["dispersion"].transform
    centre, spread = of_bin("mean"), of_bin("std")
    alone = spread.isna()
    centre, spread = centre.where(~alone, 0), spread.where(~alone, of_bin("mean"))
    return ((frame["dispersion"] - centre) / spread).to_numpy()


def _kept(
    file: Stored, layers: tuple[str, str], genes: NDArray, counts: dict[str, Columns], found: _Found
) -> tuple[Array, Array]:
    """Put the genes' counts by gene; the mean (genes,) and covariance (genes, genes) of their log1p."""
    n, total, products = file.shape[0], np.zeros(len(genes)), np.zeros((len(genes), len(genes)))
    for start, both in blocks(file, layers):
        for name, layer in zip(RAW, both, strict=True):
            some = layer[:, genes]
            counts[name].append(np.asarray(some.toarray() if sparse.issparse(some) else some, np.float32))
            if name == keys.SPLICED:
                factors = found.factors[name][start : start + layer.shape[0]]
                log = log_normalised(some, factors).toarray().astype(np.float64)
                total += log.sum(0)
                products += log.T @ log
    mean = total / n
    return mean, (products - n * np.outer(mean, mean)) / (n - 1)


def _graph(
    file: Stored,
    genes: NDArray,
    settings: PrepareSettings,
    of_log: tuple[Array, Array],
    counts: Columns,
    found: _Found,
) -> Any:
    """The tables of the chosen genes, with components, neighbours and, unless there is one, a UMAP."""
    tables = file.tables()[:, genes].copy()
    mean, covariance = of_log
    n_pcs = min(settings.n_pcs, tables.n_obs - 1, tables.n_vars - 1)
    values, vectors = eigh(covariance, subset_by_index=[len(genes) - n_pcs, len(genes) - 1])
    # Largest first, and each with the sign that scikit-learn gives it.
    values, vectors = values[::-1], vectors[:, ::-1]
    vectors = vectors * np.sign(vectors[np.abs(vectors).argmax(0), np.arange(n_pcs)])
    scores = np.tile(-(mean @ vectors), (tables.n_obs, 1))
    for block in counts.blocks:
        scaled = (found.factors[keys.SPLICED][:, None] * counts.read(block)).astype(np.float32)
        scores += np.log1p(scaled) @ vectors[block]
    tables.obsm["X_pca"], tables.varm["PCs"] = scores.astype(np.float32), vectors
    tables.uns["pca"] = {"variance": values, "variance_ratio": values / np.trace(covariance)}
    find_neighbours(tables, settings, n_pcs)
    if settings.umap and "X_umap" not in file.names("obsm"):
        import scanpy as sc

        init = "spectral" if tables.n_obs > MIN_CELLS_SPECTRAL else "random"
        sc.tl.umap(tables, init_pos=init, random_state=settings.seed)
    tables.uns[keys.UNS] = {keys.UNS_PREPARE: {**asdict(settings), "n_pcs": n_pcs}}
    return tables


def _write(
    into: Any, file: Stored, tables: Any, counts: dict[str, Columns], found: _Found, settings: PrepareSettings
) -> None:
    """The smoothed layers, gene by gene, and the tables."""
    weights, factors_of_layer = averaging_weights(tables.obsp["connectivities"]), found.factors
    if settings.depth == "neighbours":
        factors_of_layer = {name: relative_to_neighbours(each, weights) for name, each in found.factors.items()}
    spliced = counts[keys.SPLICED]
    smoothed = {
        out: new_layer(into, out, tables.shape, np.float32, CELLS_A_CHUNK, spliced.blocks[0].stop)
        for out in (keys.MS, keys.MU)
    }
    chosen = np.zeros(tables.n_vars, bool)
    for block in spliced.blocks:
        found_here = {}
        for out, name in zip(smoothed, RAW, strict=True):
            scaled = (factors_of_layer[name][:, None] * counts[name].read(block)).astype(np.float32)
            found_here[out] = np.asarray(weights @ scaled)
            smoothed[out][:, block] = found_here[out]
        chosen[block] = velocity_genes(found_here[keys.MS], found_here[keys.MU], settings.min_r2)
    for name, factors in factors_of_layer.items():
        tables.obs[keys.size_factor(name)] = sizes(factors)
    tables.var[keys.VELOCITY_GENES] = chosen
    for where in ("obsm", "varm", "obsp"):
        for name, value in getattr(tables, where).items():
            write_element(into[where], name, value)
    before = file.uns.get(keys.UNS, {})
    uns = file.uns | dict(tables.uns) | {keys.UNS: {**before, **tables.uns[keys.UNS]}}
    write_tables(into, tables.obs, tables.var, uns)
