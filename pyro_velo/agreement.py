r"""How well clusters agree with known labels, and how far apart they lie.

Every score but the silhouette is read off the table of counts $n_{ij}$ of cells with label i in cluster j.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import linear_sum_assignment
from scipy.special import xlogy

from pyro_velo.errors import InputError

Array = NDArray[np.float64]


class Agreement(NamedTuple):
    """The scores of clusters against labels: 1 is best; `ari` and `nmi` of clusters at random are 0 on average."""

    ari: float
    nmi: float
    accuracy: float
    purity: float


def agreement(labels: ArrayLike, clusters: ArrayLike) -> Agreement:
    """All four scores. Shapes: both (cells,), of any type. Raises `InputError` for other shapes, and no cells.

    >>> agreement(["a", "a", "b", "b"], [1, 1, 0, 0])
    Agreement(ari=1.0, nmi=1.0, accuracy=1.0, purity=1.0)
    """
    table = contingency(labels, clusters)
    return Agreement(
        adjusted_rand_index(table), normalised_mutual_information(table), matched_accuracy(table), purity(table)
    )


def contingency(labels: ArrayLike, clusters: ArrayLike) -> Array:
    """The counts $n_{ij}$, (labels, clusters), of two groupings (cells,)."""
    a, b = np.asarray(labels), np.asarray(clusters)
    if a.ndim != 1 or a.shape != b.shape or not len(a):
        raise InputError(f"Expected a label and a cluster a cell; got {a.shape} and {b.shape}. Take both from one fit.")
    rows, i = np.unique(a, return_inverse=True)
    columns, j = np.unique(b, return_inverse=True)
    table = np.zeros((len(rows), len(columns)))
    np.add.at(table, (i, j), 1)
    return table


def adjusted_rand_index(table: Array) -> float:
    r"""$(\sum_{ij}\binom{n_{ij}}2 - e) / (\frac12(a + b) - e)$, e expected by chance (Hubert & Arabie 1985, eq. 5)."""

    def pairs(n: Array) -> float:
        return float((n * (n - 1) / 2).sum())

    same, a, b, all_pairs = pairs(table), pairs(table.sum(1)), pairs(table.sum(0)), pairs(table.sum(keepdims=True))
    # Both put every cell in one group, or each in its own: they agree.
    if all_pairs == 0 or (a == b and a in (0.0, all_pairs)):
        return 1.0
    expected = a * b / all_pairs
    return (same - expected) / ((a + b) / 2 - expected)


def normalised_mutual_information(table: Array) -> float:
    r"""$I(i; j) / \frac12(H(i) + H(j))$ (Strehl & Ghosh 2002, with the arithmetic mean)."""
    p = table / table.sum()
    rows, columns = p.sum(1), p.sum(0)
    entropies = -xlogy(rows, rows).sum() - xlogy(columns, columns).sum()
    if entropies == 0:
        return 1.0
    return float(2 * (1 + xlogy(p, p).sum() / entropies))


def matched_accuracy(table: Array) -> float:
    """The share of cells that are right when each cluster is named after one label, as well as can be (Kuhn 1955)."""
    i, j = linear_sum_assignment(-table)
    return float(table[i, j].sum() / table.sum())


def purity(table: Array) -> float:
    """The share of cells that are of their cluster's commonest label; it rises with the number of clusters."""
    return float(table.max(0).sum() / table.sum())


def silhouette(positions: ArrayLike, clusters: ArrayLike) -> float:
    r"""The mean over cells of $(b - a) / \max(a, b)$: a, b the mean distance to the own and the next cluster's cells.

    Shapes: positions (cells, dims), clusters (cells,). Raises `InputError` for fewer than two clusters, or as many as
    cells. Reference: Rousseeuw 1987, eq. 3.
    """
    from sklearn.metrics import silhouette_score

    names = np.unique(np.asarray(clusters))
    if not 2 <= len(names) < len(np.asarray(positions)):
        raise InputError(f"Expected 2 clusters or more, and fewer than cells; got {len(names)}. It has no value there.")
    return float(silhouette_score(np.asarray(positions), np.asarray(clusters)))
