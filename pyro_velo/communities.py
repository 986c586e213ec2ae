r"""Groups of cells that a graph of nearest neighbours holds together, whatever their shape in space.

A Gaussian mixture takes a bent or forked group for several, and two that touch along their length for one. In a graph
of nearest neighbours a group is where there are more edges than chance would make.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from scipy.sparse.linalg import cg

Array = NDArray[np.float64]
Labels = NDArray[np.int64]

PIECES = 15
"""Pieces for each group asked for, into which k-means cuts the cells before any are joined."""
SWEEPS = 50
"""Sweeps after which cells no longer move, settled or not."""
REACH = 0.99
"""The share of a cell's label that comes from its neighbours' (Zhou et al. 2004, section 4)."""


def neighbour_graph(z: Array, neighbours: int) -> sparse.csr_matrix:
    """(N, N), symmetric: 1 where one of two cells is among the nearest `neighbours` of the other, 2 where both are.

    z (N, d) are positions, which Euclidean distances compare.
    """
    from sklearn.neighbors import kneighbors_graph

    nearest = kneighbors_graph(z, min(neighbours, len(z) - 1), mode="connectivity")
    return (nearest + nearest.T).tocsr()


def modularity(graph: sparse.csr_matrix, groups: Labels) -> float:
    r"""$Q = \sum_c e_{cc} - a_c^2$: the share of edges within groups, less what chance would put there.

    $e_{cd}$ is the share of all edges that run from group c to d, $a_c = \sum_d e_{cd}$ (Newman & Girvan 2004, eq. 5).
    """
    links = _links(graph, groups, int(groups.max()) + 1)
    share = links / links.sum()
    return float(np.trace(share) - (share.sum(1) ** 2).sum())


def communities(graph: sparse.csr_matrix, z: Array, n_groups: int, *, inits: int, seed: int) -> Labels:
    """The group of each cell, (N,), 0 to `n_groups` - 1: of `inits` tries the one of the highest modularity.

    A try cuts the cells into small pieces by k-means of their positions z (N, d), joins at each step the two with the
    most edges for each that chance would make (average linkage: Bonald et al. 2018, Hierarchical graph clustering using
    node pair sampling), and then moves single cells to where they raise the modularity. Joining by modularity itself
    would cut large groups to make all of one size (its resolution limit: Fortunato & Barthelemy 2007).
    """
    from sklearn.cluster import KMeans

    n_pieces = max(n_groups, min(PIECES * n_groups, len(z) // 2))
    rng = np.random.default_rng(seed)
    tries = []
    for number in range(inits):
        pieces = KMeans(n_pieces, n_init=1, random_state=seed + number).fit_predict(z)
        groups = _joined(_links(graph, pieces, n_pieces), n_groups)[pieces]
        tries.append(_moved(graph, groups, n_groups, rng))
    return max(tries, key=lambda groups: modularity(graph, groups))


def spread(graph: sparse.csr_matrix, labels: Labels, n_groups: int) -> Array:
    r"""What reaches each cell of the labels of some, as shares (N, K) that sum to one; 0 where none does.

    $F = (I - \alpha S)^{-1} Y$ with $S = D^{-1/2} W D^{-1/2}$ (Zhou et al. 2004, eq. 4), in which each label weighs
    one, however many cells have it. `labels` (N,) are -1 where none is known.
    """
    root = sparse.diags_array(np.asarray(graph.sum(1)).ravel() ** -0.5)
    system = sparse.eye_array(len(labels)) - REACH * (root @ graph @ root)
    given = (labels[:, None] == np.arange(n_groups)).astype(np.float64)
    given /= np.maximum(given.sum(0), 1)
    reached = np.stack([cg(system, y, rtol=1e-6)[0] for y in given.T], 1).clip(0)
    total = reached.sum(1, keepdims=True)
    return np.divide(reached, total, out=np.zeros_like(reached), where=total > 0)


def _links(graph: sparse.csr_matrix, groups: Labels, n: int) -> Array:
    """The weight of all edges between groups, (n, n)."""
    among = _members(groups, n)
    return (among.T @ graph @ among).toarray()


def _members(groups: Labels, n: int) -> sparse.csr_matrix:
    """(N, n), 1 where a cell is of a group."""
    return sparse.csr_matrix((np.ones(len(groups)), (np.arange(len(groups)), groups)), (len(groups), n))


def _joined(links: Array, n_groups: int) -> Labels:
    """The group of each piece, (pieces,)."""
    groups = np.arange(len(links))
    while len(links) > n_groups:
        ends = links.sum(1)
        ratio = links / np.outer(ends, ends)
        np.fill_diagonal(ratio, -np.inf)
        i, j = sorted(np.unravel_index(ratio.argmax(), ratio.shape))
        links = links.copy()
        links[i] += links[j]
        links[:, i] += links[:, j]
        links = np.delete(np.delete(links, j, 0), j, 1)
        groups = np.where(groups == j, i, groups)
        groups = np.where(groups > j, groups - 1, groups)
    return groups


def _moved(graph: sparse.csr_matrix, groups: Labels, n_groups: int, rng: np.random.Generator) -> Labels:
    """The groups after cells have gone where their edges lead; none is left empty."""
    ends = np.asarray(graph.sum(1)).ravel()
    for _ in range(SWEEPS):
        among = _members(groups, n_groups)
        # A cell does not meet itself, so its own group is smaller by it.
        others = among.T @ ends - ends[:, None] * among.toarray()
        best = ((graph @ among).toarray() - ends[:, None] * others / ends.sum()).argmax(1)
        # Neighbours that all move at once would change places for ever.
        wanted = np.where(rng.random(len(groups)) < 0.5, best, groups)
        if (best == groups).all() or len(np.unique(wanted)) < n_groups:
            break
        groups = wanted
    return groups
