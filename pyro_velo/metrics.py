r"""How good is a velocity: its direction across cluster boundaries, its smoothness, and the honesty of its intervals.

References: Qiao & Huang 2021 (VeloAE, PNAS 118; CBDir, ICCoh); Bergen et al. 2020 (velocity confidence).
Smoothness is not correctness: coherence and confidence alone prove nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import sparse
from scipy.stats import rankdata

from pyro_velo.errors import InputError

Array = NDArray[np.float64]
Graph: TypeAlias = sparse.spmatrix | sparse.sparray


class Score(NamedTuple):
    """A score: `each` by edge or cluster, NaN where no cell can be scored, and the `mean` over the others."""

    each: dict[str, float]
    mean: float


def cross_boundary_direction(
    velocity: ArrayLike, positions: ArrayLike, neighbours: Graph, labels: ArrayLike, edges: Iterable[tuple[str, str]]
) -> Score:
    r"""Do cells of A that border on B move towards B? Cross-boundary direction correctness (Qiao & Huang 2021, CBDir).

    $$\mathrm{CBDir}(A \to B) = \mathrm{mean}_{i \in A,\ \mathcal N(i) \cap B \ne \emptyset}\
    \mathrm{mean}_{j \in \mathcal N(i) \cap B}\ \cos(x_j - x_i,\ v_i)$$

    in [-1, 1]; a step or a velocity of no length counts 0. The score is the mean over edges.

    Shapes: velocity, positions (cells, dims), of an embedding or of genes, columns with a NaN velocity dropped;
    neighbours (cells, cells) sparse; labels (cells,).

    Raises `InputError` for shapes that disagree, for no column without NaN, and for an edge to a label no cell has.
    """
    v, x, labels = _columns(velocity, positions, labels)
    graph = sparse.coo_matrix(neighbours)
    direct = graph.row != graph.col
    rows, cols = graph.row[direct], graph.col[direct]
    each = {}
    for source, target in edges:
        for name in (source, target):
            if not (labels == name).any():
                known = ", ".join(map(str, np.unique(labels)))
                raise InputError(
                    f"Expected clusters that exist in the edge {source}>{target}; no cell is {name!r}. Known: {known}."
                )
        across = (labels[rows] == source) & (labels[cols] == target)
        each[f"{source}>{target}"] = _mean_over_cells(rows[across], _step_cosines(v, x, rows[across], cols[across]))
    return Score(each, _finite_mean(each.values()))


def in_cluster_coherence(velocity: ArrayLike, neighbours: Graph, labels: ArrayLike) -> Score:
    r"""Do neighbours of one cluster move alike? In-cluster coherence (Qiao & Huang 2021, ICCoh), in [-1, 1].

    $$\mathrm{ICCoh}(A) = \mathrm{mean}_{i \in A}\ \mathrm{mean}_{j \in \mathcal N(i) \cap A}\ \cos(v_i, v_j)$$

    The score is the mean over clusters. Shapes and errors as in `cross_boundary_direction`.
    """
    v, _, labels = _columns(velocity, velocity, labels)
    graph = sparse.coo_matrix(neighbours)
    alike = (labels[graph.row] == labels[graph.col]) & (graph.row != graph.col)
    mean = _neighbour_mean_cosine(v, graph.row[alike], graph.col[alike])
    each = {str(name): _finite_mean(mean[labels == name]) for name in np.unique(labels)}
    return Score(each, _finite_mean(each.values()))


def confidence(velocity: ArrayLike, neighbours: Graph) -> Array:
    r"""How a cell's velocity agrees with its neighbours': mean Pearson correlation over genes, at least 0.

    $$c_i = \max(0,\ \mathrm{mean}_{j \in \mathcal N(i)}\ \mathrm{corr}(v_i, v_j))$$

    Shapes: velocity (cells, genes), genes with a NaN are dropped; neighbours (cells, cells) sparse; returns (cells,),
    NaN for a cell without neighbours. Reference: Bergen et al. 2020, `velocity_confidence` of scVelo.
    """
    v, _, _ = _columns(velocity, velocity, np.zeros(len(np.asarray(velocity))))
    v = v - v.mean(axis=1, keepdims=True)
    graph = sparse.coo_matrix(neighbours)
    away = graph.row != graph.col
    return np.clip(_neighbour_mean_cosine(v, graph.row[away], graph.col[away]), 0, None)


def coverage(truth: ArrayLike, low: ArrayLike, high: ArrayLike) -> float:
    """The share of true values within [low, high], NaN left out; a calibrated 90 % interval gives 0.9.

    >>> coverage([1.0, 2.0, 3.0, 4.0], low=[0.0, 0.0, 0.0, 5.0], high=[2.0, 2.0, 2.0, 6.0])
    0.5
    """
    t, lo, hi = (np.asarray(a, dtype=np.float64) for a in (truth, low, high))
    known = np.isfinite(t) & np.isfinite(lo) & np.isfinite(hi)
    if not known.any():
        raise InputError(
            "Expected at least one finite truth with a finite interval; got none. Check that genes and cells match."
        )
    return float(((lo <= t) & (t <= hi))[known].mean())


def pearson(a: ArrayLike, b: ArrayLike) -> Array:
    """Pearson correlation down each column of two (cells, genes) arrays; (genes,), NaN where a column is constant."""
    x, y = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    x, y = x - x.mean(axis=0), y - y.mean(axis=0)
    norm = np.sqrt((x * x).sum(axis=0) * (y * y).sum(axis=0))
    return np.divide((x * y).sum(axis=0), norm, out=np.full_like(norm, np.nan), where=norm > 0)


def spearman(a: ArrayLike, b: ArrayLike) -> Array:
    """Spearman's rank correlation down each column of two (cells, genes) arrays, ties averaged; (genes,)."""
    return pearson(rankdata(a, axis=0), rankdata(b, axis=0))


def _columns(velocity: ArrayLike, positions: ArrayLike, labels: ArrayLike) -> tuple[Array, Array, NDArray]:
    v, x, names = np.asarray(velocity), np.asarray(positions), np.asarray(labels)
    if v.ndim != 2 or v.shape != x.shape or len(names) != len(v):
        raise InputError(
            "Expected velocity and positions (cells, dims) of one shape and a label a cell; got "
            f"{v.shape}, {x.shape} and {names.shape}. Take all three from the same cells."
        )
    keep = np.isfinite(v).all(axis=0)
    if not keep.any():
        raise InputError(
            f"Expected a column with a finite velocity in every cell; got none of {v.shape[1]}. Fit the velocity first."
        )
    return v[:, keep].astype(np.float64), x[:, keep].astype(np.float64), names


def _step_cosines(v: Array, x: Array, rows: NDArray, cols: NDArray, block: int = 8192) -> Array:
    cosines = np.zeros(len(rows))
    for start in range(0, len(rows), block):
        i, j = rows[start : start + block], cols[start : start + block]
        step = x[j] - x[i]
        norm = np.linalg.norm(step, axis=1) * np.linalg.norm(v[i], axis=1)
        dot = np.einsum("ij,ij->i", step, v[i])
        cosines[start : start + block] = np.divide(dot, norm, out=np.zeros_like(norm), where=norm > 0)
    return cosines


def _mean_over_cells(rows: NDArray, values: Array) -> float:
    """The mean over cells of each cell's own mean, so that a cell with many neighbours counts once."""
    if not len(rows):
        return float("nan")
    counts = np.bincount(rows)
    sums = np.bincount(rows, values)
    return float((sums[counts > 0] / counts[counts > 0]).mean())


def _neighbour_mean_cosine(v: Array, rows: NDArray, cols: NDArray) -> Array:
    """(cells,) mean_j cos(v_i, v_j) over the given pairs, NaN for a cell without any."""
    norm = np.linalg.norm(v, axis=1, keepdims=True)
    unit = np.divide(v, norm, out=np.zeros_like(v), where=norm > 0)
    degree = np.bincount(rows, minlength=len(v)).astype(np.float64)
    weight = 1 / np.where(degree > 0, degree, 1)
    # The mean of cosines is the cosine with the mean of unit vectors: one sparse product instead of one dot a pair.
    average = sparse.csr_matrix((weight[rows], (rows, cols)), shape=(len(v), len(v))) @ unit
    return np.where(degree > 0, np.einsum("ij,ij->i", unit, average), np.nan)


def _finite_mean(values: Iterable[float]) -> float:
    finite = [value for value in values if np.isfinite(value)]
    return float(np.mean(finite)) if finite else float("nan")
