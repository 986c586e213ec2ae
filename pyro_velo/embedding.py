r"""Velocity on an embedding: which neighbours a cell moves towards, and the arrow that follows from it.

All arithmetic is float64. Arrays in, arrays out; `neighbours` is any sparse (cells, cells) matrix whose pattern is the
graph, such as scanpy's `obsp['distances']`. Memory: 12 bytes a pair of cells in the graph of neighbours' neighbours.

References: La Manno et al. 2018; Bergen et al. 2020, methods (cosine correlations, transition
probabilities and their projection).
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import sparse
from scipy.sparse.linalg import lsqr
from scipy.spatial import cKDTree

from pyro_velo.errors import InputError

Array = NDArray[np.float64]

SELF_CONFIDENCE_PERCENTILE = 98


class Grid(NamedTuple):
    """A vector field on a regular grid: nodes `x` (nx,), `y` (ny,); arrows `u`, `v` and kernel `mass` (ny, nx).

    Arrows are NaN where there are no cells.
    """

    x: Array
    y: Array
    u: Array
    v: Array
    mass: Array


def complete_genes(velocity: ArrayLike, expression: ArrayLike) -> tuple[Array, Array]:
    """Velocity and expression (cells, genes) in float64 on the genes that have a finite velocity in every cell.

    Raises `InputError` where shapes disagree, no gene is left, or the expression of such a gene is not finite.
    """
    v, x = np.asarray(velocity), np.asarray(expression)
    if v.ndim != 2 or v.shape != x.shape:
        raise InputError(
            f"Expected velocity and expression of one shape (cells, genes); got {v.shape} and {x.shape}. "
            "Take both from the same cells and genes."
        )
    keep = np.isfinite(v).all(axis=0)
    if not keep.any():
        raise InputError(
            f"Expected at least one gene with a finite velocity in every cell; got none of {v.shape[1]}. "
            "Fit the velocity first, or keep genes that have one."
        )
    v, x = v[:, keep].astype(np.float64), x[:, keep].astype(np.float64)
    if not np.isfinite(x).all():
        raise InputError(
            "Expected finite expression in the velocity genes; got NaN or inf. Remove those genes or cells."
        )
    return v, x


def in_units_of_range(velocity: ArrayLike, expression: ArrayLike) -> tuple[Array, Array]:
    r"""Both arrays with each gene divided by its range of expression, $\max_n s_{ng} - \min_n s_{ng}$, in float64.

    Otherwise the few most abundant genes decide every cosine. veloVI scales its layers so, and so CBDir, ICCoh and
    confidence are comparable with those published for it. The velocity of a gene without range becomes NaN.

    Shapes: velocity, expression (cells, genes), and so are the two that are returned.
    """
    v, x = np.asarray(velocity, dtype=np.float64), np.asarray(expression, dtype=np.float64)
    low, high = x.min(axis=0), x.max(axis=0)
    span = np.where(high > low, high - low, np.nan)
    return v / span, (x - low) / np.where(high > low, high - low, 1.0)


def neighbourhoods(neighbours: sparse.spmatrix | sparse.sparray, steps: int = 2) -> sparse.csr_matrix:
    """The boolean graph of every cell reached in at most `steps` steps, the cell itself left out; (cells, cells)."""
    graph = sparse.csr_matrix(neighbours)
    if graph.shape[0] != graph.shape[1]:
        raise InputError(f"Expected a (cells, cells) neighbour graph; got {graph.shape}. Pass obsp['distances'].")
    direct = sparse.csr_matrix(graph != 0).astype(np.int32)
    reached = direct
    for _ in range(steps - 1):
        reached = reached + reached @ direct
    pairs = reached.tocoo()
    away = pairs.row != pairs.col
    found = np.ones(int(away.sum()), dtype=bool)
    return sparse.csr_matrix((found, (pairs.row[away], pairs.col[away])), shape=graph.shape)


def cosine_correlations(
    velocity: ArrayLike, expression: ArrayLike, neighbours: sparse.spmatrix | sparse.sparray, *, steps: int = 2
) -> sparse.csr_matrix:
    r"""Pearson correlation of a cell's velocity with the step to each of its neighbours (Bergen et al. 2020).

    $\pi_{ij} = \cos(\delta_{ij} - \bar\delta_{ij},\ v_i - \bar v_i)$ with $\delta_{ij} = s_j - s_i$ over the velocity
    genes.

    Shapes: velocity, expression (cells, genes), those of NaN velocity are dropped; neighbours sparse (cells, cells).
    Returns (cells, cells) csr on the cells within `steps` steps; 0 where the step or the velocity has no length.

    Raises `InputError` as `complete_genes`, and for a graph of other cells.
    """
    v, x = complete_genes(velocity, expression)
    graph = neighbourhoods(neighbours, steps)
    if graph.shape[0] != len(v):
        raise InputError(
            f"Expected a graph of {len(v)} cells, as the velocity has; got {graph.shape[0]}. Use the same cells."
        )
    x -= x.mean(axis=1, keepdims=True)
    values = _cosines(_centred(v), x, np.arange(len(x)), graph.indptr, graph.indices)
    return sparse.csr_matrix((values, graph.indices, graph.indptr), shape=graph.shape)


def cosine_correlations_in_blocks(
    velocity: Callable[[int, int], Array],
    expression: Callable[[NDArray[np.int64]], Array],
    neighbours: sparse.spmatrix | sparse.sparray,
    *,
    size: int,
    steps: int = 1,
) -> sparse.csr_matrix:
    """As `cosine_correlations`, of `size` cells at a time, whose numbers need not be in memory together.

    `velocity(start, stop)` gives those of some cells (B, genes), `expression(numbers)` that of any, (B, genes), both
    float64 and finite.
    """
    graph = neighbourhoods(neighbours, steps)
    values = np.zeros(graph.nnz)
    for start in range(0, graph.shape[0], size):
        stop = min(start + size, graph.shape[0])
        first, last = graph.indptr[start], graph.indptr[stop]
        near, place = np.unique(
            np.concatenate((graph.indices[first:last], np.arange(start, stop))), return_inverse=True
        )
        x = expression(near)
        x -= x.mean(axis=1, keepdims=True)
        v, indptr = _centred(velocity(start, stop)), graph.indptr[start : stop + 1] - first
        values[first:last] = _cosines(v, x, place[last - first :], indptr, place[: last - first])
    return sparse.csr_matrix((values, graph.indices, graph.indptr), shape=graph.shape)


def _centred(v: Array) -> Array:
    """Rows less their mean, of length one."""
    v = v - v.mean(axis=1, keepdims=True)
    return v / _positive(np.linalg.norm(v, axis=1, keepdims=True))


def _cosines(v: Array, x: Array, own: NDArray, indptr: NDArray, indices: NDArray) -> Array:
    """The correlation of each row of `v` with the steps from row `own` of `x` to the rows at its `indices`."""
    values = np.zeros(len(indices))
    for i, (start, stop) in enumerate(pairwise(indptr)):
        step = x[indices[start:stop]] - x[own[i]]
        values[start:stop] = step @ v[i] / _positive(np.sqrt(np.einsum("ij,ij->i", step, step)))
    return np.clip(values, -1, 1)


def potential(cosines: sparse.spmatrix | sparse.sparray) -> Array:
    r"""The time in [0, 1] that best agrees with the cosines: neighbours ahead are later, neighbours behind earlier.

    The least-squares potential of a flow on a graph (Jiang et al. 2011, HodgeRank, eq. 5),
    $\min_\phi \sum_{ij} (\phi_j - \phi_i - \pi_{ij})^2$, scaled to [0, 1]. Where the graph is in pieces, each
    has a zero of its own.

    Shapes: cosines sparse (cells, cells), of `cosine_correlations`; returns (cells,).
    """
    pairs = sparse.csr_matrix(cosines).tocoo()
    n, m = pairs.shape[0], pairs.nnz
    rows = np.arange(m)
    signs = np.concatenate((np.ones(m), -np.ones(m)))
    differences = sparse.csr_matrix(
        (signs, (np.concatenate((rows, rows)), np.concatenate((pairs.col, pairs.row)))), shape=(m, n)
    )
    phi = lsqr(differences, pairs.data, atol=1e-6, btol=1e-6, iter_lim=500)[0]
    span = np.ptp(phi)
    return (phi - phi.min()) / span if span > 0 else np.zeros(n)


def transition_matrix(
    velocity: ArrayLike,
    expression: ArrayLike,
    neighbours: sparse.spmatrix | sparse.sparray,
    *,
    scale: float = 10.0,
    steps: int = 2,
    signed: bool = True,
) -> sparse.csr_matrix:
    r"""Where each cell goes next, from its cosine correlations (Bergen et al. 2020).

    $$T_{ij} \propto \mathrm{sign}(\pi_{ij})\,(e^{\sigma|\pi_{ij}|} - 1), \qquad
    \pi_{ii} = \max(0,\ q_{98} - \max_j \pi_{ij})$$

    with $q_{98}$ the 98th percentile over cells of $\max_j \pi_{ij}$: a cell without a way to go stays. Rows sum to one
    in absolute value. With `signed=False` a backward step gets $e^{\sigma\pi_{ij}}$, and the rows are probabilities.

    Shapes as in `cosine_correlations`; `scale` is sigma. Returns (cells, cells) csr.
    """
    return transitions_of(
        cosine_correlations(velocity, expression, neighbours, steps=steps), scale=scale, signed=signed
    )


def transitions_of(cosines: sparse.csr_matrix, *, scale: float = 10.0, signed: bool = True) -> sparse.csr_matrix:
    """The transition matrix of `cosine_correlations`, see `transition_matrix`."""
    best = np.maximum(cosines.max(axis=1).toarray().ravel(), 0)
    stay = np.clip(np.percentile(best, SELF_CONFIDENCE_PERCENTILE) - best, 0, 1)
    weights = cosines.copy()
    if signed:
        weights.data = np.sign(cosines.data) * np.expm1(scale * np.abs(cosines.data))
    else:
        back = np.exp(scale * np.minimum(cosines.data, 0))
        weights.data = np.where(cosines.data > 0, np.expm1(scale * cosines.data), back)
    weights = sparse.csr_matrix(weights + sparse.diags(np.expm1(scale * stay)))
    total = np.asarray(abs(weights).sum(axis=1)).ravel()
    return sparse.csr_matrix(sparse.diags(1 / _positive(total)) @ weights)


def project(transitions: sparse.spmatrix | sparse.sparray, positions: ArrayLike) -> Array:
    r"""The expected displacement on an embedding, less that of an undirected walk (Bergen et al. 2020).

    $\tilde v_i = \sum_{j \ne i} (T_{ij} - \bar T_i)\,(x_j - x_i)/\|x_j - x_i\|$ with $\bar T_i$ the mean of $T_{ij}$
    over the neighbours.

    Shapes: transitions (cells, cells), positions (cells, dims); returns (cells, dims), in units of one step.
    """
    x = np.asarray(positions, dtype=np.float64)
    graph = sparse.coo_matrix(transitions)
    if x.ndim != 2 or graph.shape != (len(x), len(x)):
        raise InputError(
            f"Expected positions of {graph.shape[0]} cells, as the transitions have; got {x.shape}. Use the same cells."
        )
    away = (graph.row != graph.col) & (graph.data != 0)
    rows, cols, values = graph.row[away], graph.col[away], graph.data[away]
    degree = _positive(np.bincount(rows, minlength=len(x)))
    values = values - (np.bincount(rows, values, len(x)) / degree)[rows]
    arrows = np.zeros_like(x)
    step = x[cols] - x[rows]
    step *= (values / _positive(np.linalg.norm(step, axis=1)))[:, None]
    for dim in range(x.shape[1]):
        arrows[:, dim] = np.bincount(rows, step[:, dim], len(x))
    return arrows


def grid(
    positions: ArrayLike,
    arrows: ArrayLike,
    *,
    size: int = 50,
    smooth: float = 0.5,
    n_neighbours: int | None = None,
    min_mass: float = 1.0,
) -> Grid:
    r"""Arrows averaged on a regular float64 grid with a Gaussian kernel, for matplotlib's `streamplot` and `quiver`.

    `size` nodes a side, each the mean of its `n_neighbours` nearest cells (by default a fiftieth of them, 10 at least);
    the kernel's sd is `smooth` grid steps. A node whose kernel mass is below `min_mass` per cent of the 99th percentile
    holds NaN.

    Shapes: positions, arrows (cells, 2); cells with a NaN in either are left out.

    Raises `InputError` for other shapes and for fewer than two cells.
    """
    x, v = np.asarray(positions, dtype=np.float64), np.asarray(arrows, dtype=np.float64)
    if x.ndim != 2 or x.shape[1] != 2 or x.shape != v.shape:
        raise InputError(
            f"Expected positions and arrows of shape (cells, 2); got {x.shape} and {v.shape}. Take two columns of each."
        )
    valid = np.isfinite(x).all(axis=1) & np.isfinite(v).all(axis=1)
    x, v = x[valid], v[valid]
    if len(x) < 2:
        raise InputError(
            f"Expected at least two cells with a finite position and arrow; got {len(x)}. Check the embedding."
        )
    low, high = x.min(axis=0), x.max(axis=0)
    margin = 0.01 * _positive(high - low)
    axes = [np.linspace(low[d] - margin[d], high[d] + margin[d], size) for d in (0, 1)]
    points = np.stack(np.meshgrid(*axes), axis=-1).reshape(-1, 2)
    k = min(len(x), n_neighbours or max(len(x) // 50, 10))
    distance, index = cKDTree(x).query(points, k=k)
    sd = smooth * np.mean([a[1] - a[0] for a in axes])
    weight = np.exp(-0.5 * (distance.reshape(len(points), k) / sd) ** 2)
    mass = weight.sum(axis=1)
    field = np.einsum("pk,pkd->pd", weight, v[index.reshape(len(points), k)]) / _positive(mass)[:, None]
    field[mass < min_mass / 100 * np.percentile(mass, 99)] = np.nan
    u, w = field.reshape(size, size, 2).transpose(2, 0, 1).copy()
    return Grid(axes[0], axes[1], u, w, mass.reshape(size, size))


def _positive(x: ArrayLike) -> Array:
    """`x` with ones in the place of zeros, for a quotient whose numerator is zero there too."""
    x = np.asarray(x, dtype=np.float64)
    return np.where(x > 0, x, 1.0)
