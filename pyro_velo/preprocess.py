"""From raw counts to the smoothed layers that the velocity model is fitted on, on scanpy alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, get_args

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy import sparse

from pyro_velo.data import anndata_keys as keys
from pyro_velo.data.checks import MAX_UNSPLICED_RATIO, check_neighbors, check_whole, checked_layers
from pyro_velo.errors import InputError
from pyro_velo.options import Depth

if TYPE_CHECKING:
    from scanpy import AnnData

LOG_NORMALISED = "_pyro_velo_log"
"""The layer that PCA reads; it exists only while `prepare` runs."""
EXTREME_PERCENTILE = 95
MIN_SLOPE = 0.01
MIN_GENES = 2
MIN_CELLS_SPECTRAL = 4
APPROXIMATE_FROM = 8192
"""Cells from which scanpy finds neighbours approximately."""
SAME = 1e-5
"""Differences of log counts in float32 below which cells are the same."""
CELLS_AT_ONCE = 2048
GENES_AT_ONCE = 256


@dataclass(frozen=True)
class PrepareSettings:
    """How `prepare` works.

    Attributes:
        min_shared_counts: counts that a gene needs in the cells where it is seen both spliced and unspliced.
        n_top_genes: highly variable genes to keep; all where there are fewer.
        n_pcs: principal components that neighbours are found on; fewer where the data has no more.
        n_neighbors: neighbours that are averaged, the cell itself among them.
        min_r2: see `velocity_genes`.
        max_unspliced_ratio: unspliced over spliced counts above which the layers are taken to be swapped.
        umap: compute `X_umap` unless it is there.
        seed: of PCA, neighbours and UMAP.
        depth: what a cell's counts are scaled to: the median total, or that of the cells around it.
    """

    min_shared_counts: int = 30
    n_top_genes: int = 2000
    n_pcs: int = 30
    n_neighbors: int = 30
    min_r2: float = 0.0
    max_unspliced_ratio: float = MAX_UNSPLICED_RATIO
    umap: bool = True
    seed: int = 0
    depth: Depth = "total"

    def __post_init__(self) -> None:
        """Raises `InputError` for a number that is too low to work with."""
        least = {"min_shared_counts": 0, "n_top_genes": MIN_GENES, "n_pcs": 1, "n_neighbors": 2, "seed": 0}
        if self.depth not in get_args(Depth):
            raise InputError(f"depth is {self.depth!r}, expected {' or '.join(get_args(Depth))}; choose one of them.")
        for name, low in least.items():
            if getattr(self, name) < low:
                raise InputError(f"{name} is {getattr(self, name)}, expected {low} or more; choose a larger number.")


class Counts(NamedTuple):
    """What `prepare` knows before it changes anything.

    Attributes:
        keep: (genes,) those that pass the shared-count filter.
        factors: the size factors (cells,) of each layer.
        log: (cells, kept genes) log1p of the scaled spliced counts.
    """

    keep: NDArray[np.bool_]
    factors: dict[str, NDArray[np.float64]]
    log: sparse.csr_matrix


@contextmanager
def threads_kept() -> Iterator[None]:
    """Give torch back the number of threads that it had: a library below scanpy takes every core for it."""
    threads = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@threads_kept()
def prepare(adata: AnnData, settings: PrepareSettings | None = None) -> None:
    r"""Filter, normalise and smooth the raw counts of `adata`, in place.

    Genes are kept by shared counts, then by dispersion (scanpy's seurat flavour). Each molecule is scaled to its median
    total per cell; neighbours are found on the PCA of log1p of the scaled spliced counts. With W the 0/1 graph of
    neighbours and self, rows summing to one, and n, m the totals per cell of spliced counts S and unspliced counts U,

    $$M_s = W\, \mathrm{diag}(\tilde n / n)\, S, \qquad M_u = W\, \mathrm{diag}(\tilde m / m)\, U.$$

    With `depth="neighbours"`, $W n$ stands for $\tilde n$ and $W m$ for $\tilde m$: how deeply a cell happened to be
    sequenced has no part in where it stands, but how much RNA a cell of its kind holds is part of the kinetics. Scaled
    to one total, all other genes fall where some rise, and nothing tells whether cells hold more unspliced RNA than
    they will. It is what counts want, and simulations in which most genes rise together.

    Written: layers `Ms`, `Mu` (dense float32); obs `size_spliced`, `size_unspliced` (n over
    its median, or over W n); var
    `velocity_genes`; `X_pca`, the neighbours, and `X_umap` unless it is
    there; uns `pyro_velo/prepare`. Raw layers keep their values and `X` is left alone; genes that fail leave `adata`.
    Memory besides `adata`: at first copies of both layers, later one of one layer (8 bytes a count) and, to stay,
    8 bytes a cell and gene.

    Raises `InputError`, with `adata` as it was, for whatever `checked_layers` refuses, no more cells than neighbours,
    counts that aren't whole, and no gene left.

    References: Bergen et al. 2020, methods; `filter_and_normalize` and `moments` of scVelo.
    """
    settings = settings or PrepareSettings()
    counts = _checked(adata, settings)
    if adata.is_view:
        adata._init_as_actual(adata.copy())
    # scanpy's own in-place subset: the public ways return another object, and the caller holds this one.
    adata._inplace_subset_var(counts.keep)
    n_pcs = _neighbour_graph(adata, settings, counts.log)
    weights = averaging_weights(adata.obsp["connectivities"])
    factors_of = counts.factors
    if settings.depth == "neighbours":
        factors_of = {name: relative_to_neighbours(factors, weights) for name, factors in counts.factors.items()}
    for out, name in ((keys.MS, keys.SPLICED), (keys.MU, keys.UNSPLICED)):
        adata.layers[out] = moments(adata.layers[name], weights, factors_of[name])
    for name, factors in factors_of.items():
        adata.obs[keys.size_factor(name)] = sizes(factors)
    adata.var[keys.VELOCITY_GENES] = velocity_genes(adata.layers[keys.MS], adata.layers[keys.MU], settings.min_r2)
    if settings.umap and "X_umap" not in adata.obsm:
        import scanpy as sc

        # The spectral start needs more cells than it has dimensions.
        init = "spectral" if adata.n_obs > MIN_CELLS_SPECTRAL else "random"
        sc.tl.umap(adata, init_pos=init, random_state=settings.seed)
    adata.uns[keys.UNS] = {**adata.uns.get(keys.UNS, {}), "prepare": {**asdict(settings), "n_pcs": n_pcs}}


def _checked(adata: AnnData, settings: PrepareSettings) -> Counts:
    """The counts, after every check; `adata` stays as it is."""
    layers = checked_layers(adata, max_unspliced_ratio=settings.max_unspliced_ratio)
    check_neighbors(adata.n_obs, settings.n_neighbors)
    for name, layer in zip((keys.SPLICED, keys.UNSPLICED), layers, strict=True):
        check_whole(layer, name)
    keep = enough_shared(shared_counts(*layers), settings)
    factors = {name: size_factors(layer) for name, layer in zip((keys.SPLICED, keys.UNSPLICED), layers, strict=True)}
    log = log_normalised(sparse.csr_matrix(layers.spliced)[:, keep], factors[keys.SPLICED])
    check_differ((log.max(axis=0) - log.min(axis=0)).toarray(), adata.n_obs)
    return Counts(keep, factors, log)


def enough_shared(shared: NDArray[np.float64], settings: PrepareSettings) -> NDArray[np.bool_]:
    """(genes,) which have enough shared counts; raises `InputError` where too few have."""
    keep = shared >= settings.min_shared_counts
    if keep.sum() < MIN_GENES:
        raise InputError(
            f"{int(keep.sum())} of {len(keep):,} genes have {settings.min_shared_counts} counts in cells that hold "
            f"both molecules (the most: {shared.max():.0f}), expected {MIN_GENES} or more; lower min_shared_counts, or "
            "check that the two layers come from the same genes."
        )
    return keep


def check_differ(spread: NDArray[Any], n_cells: int) -> None:
    """Raises `InputError` where no gene's range over cells, (genes,) of log1p of scaled counts, tells cells apart."""
    if spread.max() < SAME:
        raise InputError(
            f"All {n_cells:,} cells hold the same spliced counts but for their depth, expected cells that differ; "
            "check how the layer was made."
        )


def shared_counts(spliced: Any, unspliced: Any) -> NDArray[np.float64]:
    """Counts of both molecules in the cells where a gene is seen as both (scVelo's `min_shared_counts`); (genes,)."""
    s, u = sparse.csc_matrix(spliced), sparse.csc_matrix(unspliced)
    both = (s != 0).multiply(u != 0)
    return np.asarray(both.multiply(s).sum(axis=0) + both.multiply(u).sum(axis=0), dtype=np.float64).ravel()


def size_factors(counts: Any) -> NDArray[np.float64]:
    """Median total per cell over a cell's total, (cells,); 0 for an empty cell."""
    return factors_of(_row_sums(counts))


def factors_of(totals: NDArray[np.float64]) -> NDArray[np.float64]:
    """The median total over each cell's, (cells,); 0 for an empty cell."""
    return np.divide(np.median(totals), totals, out=np.zeros_like(totals), where=totals > 0)


def sizes(factors: NDArray[np.float64]) -> NDArray[np.float64]:
    """A cell's total over the median one, (cells,), from size factors; an empty cell counts as the smallest other."""
    found = np.divide(1.0, factors, out=np.full_like(factors, np.inf), where=factors > 0)
    smallest = found.min() if np.isfinite(found).any() else 1.0
    return np.where(np.isfinite(found), found, smallest)


def relative_to_neighbours(factors: NDArray[np.float64], weights: sparse.csr_matrix) -> NDArray[np.float64]:
    r"""Size factors $f_i = (W n)_i / n_i$ from $\tilde n / n_i$, then $f_i e^{-(W \log f)_i}$; 0 stays 0.

    W are the weights of `averaging_weights`. The neighbours of a cell at the end of a process lie to one side of it,
    and so does their mean total; once more, of the logarithms, takes off about half of that error.
    """
    counted = factors > 0
    totals = np.divide(1.0, factors, out=np.zeros_like(factors), where=counted)
    relative = np.asarray(weights @ totals) * factors
    logs = np.log(relative, out=np.zeros_like(relative), where=counted)
    return relative * np.exp(-np.asarray(weights @ logs))


def averaging_weights(graph: sparse.spmatrix | sparse.sparray) -> sparse.csr_matrix:
    """The 0/1 pattern of a neighbour graph with self, rows summing to one; (cells, cells) csr."""
    pattern = sparse.csr_matrix(graph) != 0
    pattern = sparse.csr_matrix(pattern + sparse.eye(pattern.shape[0], dtype=bool, format="csr"), dtype=np.float32)
    return sparse.csr_matrix(sparse.diags(1 / np.asarray(pattern.sum(axis=1)).ravel()) @ pattern, dtype=np.float32)


def moments(counts: Any, weights: sparse.csr_matrix, factors: ArrayLike) -> NDArray[np.float32]:
    """The size-normalised mean over each cell's neighbours, weights @ diag(factors) @ counts.

    Shapes: counts (cells, genes), weights (cells, cells); factors (cells,). Returns float32 (cells, genes).
    """
    scaled = sparse.csr_matrix(sparse.diags(np.asarray(factors)) @ sparse.csr_matrix(counts), dtype=np.float32)
    out = np.empty(scaled.shape, dtype=np.float32)
    for start in range(0, len(out), CELLS_AT_ONCE):
        rows = slice(start, start + CELLS_AT_ONCE)
        out[rows] = (weights[rows] @ scaled).toarray()
    return out


def most_variable(dispersions: NDArray[np.floating], n_top_genes: int) -> NDArray[np.int64]:
    """The numbers, ascending, of the genes with the highest of `dispersions` (genes,)."""
    # scanpy keeps every gene that ties with the last one; this keeps as many as asked for, NaN last.
    order = np.argsort(-dispersions, kind="stable")
    return np.sort(order[:n_top_genes])


def steady_state_slope(Mu: ArrayLike, Ms: ArrayLike) -> NDArray[np.float64]:
    r"""gamma/beta of each gene from the cells near its upper steady state (La Manno et al. 2018; Bergen et al. 2020).

    $\gamma_g = \sum_n u_{ng} s_{ng} / \sum_n s_{ng}^2$ over the cells whose $u/\max u + s/\max s$ is in the top 5 %.

    Shapes: Mu, Ms (cells, genes) in any units; returns (genes,), Mu per Ms, 0 where a gene has no spliced counts.
    """
    u, s = _same_shape(Mu, Ms)
    slopes = np.zeros(u.shape[1])
    for start in range(0, u.shape[1], GENES_AT_ONCE):
        block = slice(start, start + GENES_AT_ONCE)
        ub, sb = u[:, block].astype(np.float64), s[:, block].astype(np.float64)
        level = ub / _positive(ub.max(axis=0)) + sb / _positive(sb.max(axis=0))
        extreme = level >= np.percentile(level, EXTREME_PERCENTILE, axis=0)
        slopes[block] = _slope(ub * extreme, sb * extreme)
    return slopes


def velocity_genes(Ms: ArrayLike, Mu: ArrayLike, min_r2: float = 0.0) -> NDArray[np.bool_]:
    r"""Genes that carry dynamics: both molecules vary, the steady-state slope exceeds 0.01 and its $R^2$ `min_r2`.

    $R^2 = 1 - \sum_n (u - \gamma s)^2 / \sum_n (u - \bar u)^2$ with each molecule first scaled to [0, 1] per gene, so
    that a basal level isn't taken for noise: scVelo's `velocity_r2` on min-max scaled layers (Gayoso et al. 2023).

    Shapes: Ms, Mu (cells, genes); returns (genes,).
    """
    u, s = _same_shape(Mu, Ms)
    mask = np.zeros(u.shape[1], dtype=bool)
    for start in range(0, u.shape[1], GENES_AT_ONCE):
        block = slice(start, start + GENES_AT_ONCE)
        ub, sb = _unit_interval(u[:, block]), _unit_interval(s[:, block])
        slope = steady_state_slope(ub, sb)
        residual = ((ub - slope * sb) ** 2).sum(axis=0)
        total = ((ub - ub.mean(axis=0)) ** 2).sum(axis=0)
        mask[block] = (residual < (1 - min_r2) * total) & (slope > MIN_SLOPE)
    return mask


def _neighbour_graph(adata: AnnData, settings: PrepareSettings, log: sparse.csr_matrix) -> int:
    """Highly variable genes, PCA and neighbours, on a layer that goes away again; the number of components."""
    import scanpy as sc

    adata.layers[LOG_NORMALISED] = log
    try:
        if adata.n_vars > settings.n_top_genes:
            found = sc.pp.highly_variable_genes(adata, layer=LOG_NORMALISED, flavor="seurat", inplace=False)
            adata._inplace_subset_var(most_variable(found["dispersions_norm"].to_numpy(), settings.n_top_genes))
        # ARPACK needs fewer components than either side of the matrix.
        n_pcs = min(settings.n_pcs, adata.n_obs - 1, adata.n_vars - 1)
        # mask_var=None: a `highly_variable` column of the caller's does not narrow the genes a second time.
        sc.pp.pca(adata, n_pcs, layer=LOG_NORMALISED, svd_solver="arpack", mask_var=None, random_state=settings.seed)
    finally:
        del adata.layers[LOG_NORMALISED]
    find_neighbours(adata, settings, n_pcs)
    return n_pcs


def find_neighbours(adata: AnnData, settings: PrepareSettings, n_pcs: int) -> None:
    """Scanpy's neighbours on `X_pca`: exact ones, and from `APPROXIMATE_FROM` cells on pynndescent's."""
    import scanpy as sc

    approximate = None if adata.n_obs < APPROXIMATE_FROM else _Approximate(adata.n_obs, settings)
    sc.pp.neighbors(
        adata, settings.n_neighbors, n_pcs, use_rep="X_pca", random_state=settings.seed, transformer=approximate
    )


class _Approximate:
    """pynndescent with scanpy's settings; its csr_array as a matrix, because scanpy 1.11 asks it for `getnnz`."""

    def __init__(self, n_cells: int, settings: PrepareSettings) -> None:
        from pynndescent import PyNNDescentTransformer

        self._found = PyNNDescentTransformer(
            n_neighbors=settings.n_neighbors,
            metric="euclidean",
            random_state=settings.seed,
            n_trees=min(64, 5 + round(n_cells**0.5 / 20)),
            n_iters=max(5, round(np.log2(n_cells))),
        )

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """What scanpy asks for: the number of neighbours among them."""
        return dict(self._found.get_params(deep))

    def fit_transform(self, x: NDArray[Any]) -> sparse.csr_matrix:
        """Distances to the neighbours of each row, (cells, cells)."""
        return sparse.csr_matrix(self._found.fit_transform(x))


def log_normalised(counts: Any, factors: NDArray[np.float64]) -> sparse.csr_matrix:
    """Log1p of counts times their cells' factors, (cells, genes) float32."""
    scaled = sparse.csr_matrix(sparse.diags(factors) @ sparse.csr_matrix(counts), dtype=np.float32)
    scaled.data = np.log1p(scaled.data)
    return scaled


def _unit_interval(x: NDArray[Any]) -> NDArray[np.float64]:
    x = x.astype(np.float64)
    low = x.min(axis=0)
    return (x - low) / _positive(x.max(axis=0) - low)


def _slope(u: NDArray[np.float64], s: NDArray[np.float64]) -> NDArray[np.float64]:
    return (u * s).sum(axis=0) / _positive((s * s).sum(axis=0))


def _same_shape(Mu: ArrayLike, Ms: ArrayLike) -> tuple[NDArray[Any], NDArray[Any]]:
    u, s = np.asarray(Mu), np.asarray(Ms)
    if u.ndim != 2 or u.shape != s.shape or not len(u):
        raise InputError(
            f"Expected Mu and Ms of one shape (cells, genes); got {u.shape} and {s.shape}. Take both from one AnnData."
        )
    return u, s


def _row_sums(counts: Any) -> NDArray[np.float64]:
    return np.asarray(counts.sum(axis=1), dtype=np.float64).ravel()


def _positive(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """`x` with ones in the place of zeros, for a quotient whose numerator is zero there too."""
    return np.where(x > 0, x, 1.0)
