r"""Where a Markov chain settles: its slowest parts, and which of them are stable enough to be terminal states.

References: Reuter et al. 2018 (GPCCA); Weber 2002 (inner simplex); Lange et al. 2022 (CellRank: terminal states).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from scipy.sparse.linalg import eigs

from pyro_velo.errors import InputError
from pyro_velo.metrics import Graph
from pyro_velo.transitions import Array, Numbers

CANDIDATES, TERMINAL_CELLS, STABILITY = 10, 30, 0.96


class Macrostates(NamedTuple):
    """The n slowest parts of a chain, and how walks stay in them.

    `membership` (cells, n), rows sum to one; a cell is of the macrostate of its highest membership. `stability` (n,) is
    the probability that a walk that has stayed in one for long is still there after a step, and `visited` (cells,)
    where in it the walk is: the quasi-stationary distribution (Darroch & Seneta 1965), which sums to one in each.
    """

    membership: Array
    stability: Array
    visited: Array


def macrostates(matrix: Graph, n: int | None = None) -> Macrostates:
    r"""The n slowest parts of a chain, by GPCCA with the inner simplex algorithm (Reuter et al. 2018; Weber 2002).

    The n right eigenvectors X with the largest eigenvalues map cells into a simplex, whose corners c are the cells that
    are farthest apart: memberships are $\chi = X X_c^{-1}$, negative ones set to zero. Within the cells S of one
    macrostate, $q\, T_{SS} = \lambda q$ with the largest eigenvalue gives stability and distribution. The default of
    `n` is where the gap between successive eigenvalues is largest, among the first ten.

    Raises `InputError` for an `n` that is out of range or parts a complex pair of eigenvalues.
    """
    chain = sparse.csr_matrix(matrix, dtype=np.float64)
    most = min(CANDIDATES if n is None else n + 1, chain.shape[0] - 2)
    values, vectors = _leading(chain, most)
    if n is None:
        n = int(np.diff(values.real).argmin()) + 1 if most > 1 else 0
    if not 1 <= n < most or (abs(values[n - 1].imag) > 0 and np.isclose(values[n - 1], values[n].conj())):
        raise InputError(
            f"Expected 1 to {chain.shape[0] - 3} macrostates that part no complex pair; got {n}. Ask for {n + 1}, or "
            "leave n to the largest gap between eigenvalues."
        )
    basis = _orthonormal(values[:n], vectors[:, :n])
    membership = np.linalg.solve(basis[_inner_simplex(basis)].T, basis.T).T.clip(0)
    own, stability, visited = membership.argmax(axis=1), np.zeros(n), np.zeros(len(basis))
    for k in range(n):
        inside = np.flatnonzero(own == k)
        value, vector = _leading(chain[inside][:, inside].T, 1)
        stability[k], visited[inside] = value[0].real, abs(vector[:, 0]) / abs(vector[:, 0]).sum()
    return Macrostates(membership / membership.sum(axis=1, keepdims=True), stability, visited)


def terminal_states(
    matrix: Graph, n: int | None = None, *, cells: int = TERMINAL_CELLS, stability: float = STABILITY
) -> dict[str, Numbers]:
    """The macrostates of a chain that are stable, each with the `cells` cells in which walks that stay in it are most.

    They are named "1", "2", ... from the most stable on. The threshold of stability is CellRank's (Lange et al. 2022);
    cells are ranked by the stationary distribution as scVelo's end points are (Bergen et al. 2020), because memberships
    hardly differ within a basin.

    Raises `InputError` as `macrostates`, and where none is stable.
    """
    found = macrostates(matrix, n)
    order = [int(k) for k in np.argsort(-found.stability, kind="stable") if found.stability[k] >= stability]
    if not order:
        raise InputError(
            f"Expected macrostates of stability {stability:g} or more; got {np.sort(found.stability)[::-1].round(2)}. "
            "Name the terminal states, or lower the stability."
        )
    own, states = found.membership.argmax(axis=1), {}
    for name, k in enumerate(order, start=1):
        inside = np.flatnonzero(own == k)
        states[str(name)] = np.sort(inside[np.argsort(-found.visited[inside], kind="stable")][:cells])
    return states


def _leading(chain: Graph, k: int) -> tuple[NDArray, NDArray]:
    """The k eigenvalues of largest real part, in order, and their right eigenvectors (cells, k)."""
    if chain.shape[0] <= 500:
        values, vectors = np.linalg.eig(chain.toarray())
    else:
        # A start of its own: the constant vector is an eigenvector, from which no other is found.
        values, vectors = eigs(chain, k=k, which="LR", v0=np.random.default_rng(0).random(chain.shape[0]))
    order = np.lexsort((-values.imag, -values.real))[:k]
    return values[order], vectors[:, order]


def _orthonormal(values: NDArray, vectors: NDArray) -> Array:
    """An orthonormal basis (cells, n) of what real eigenvectors and complex pairs span, the constant vector first.

    It is there by name, because where a chain is in parts, any vector that is constant on each has the eigenvalue one.
    """
    real = np.where(values.imag < 0, vectors.imag, vectors.real)
    rest = np.linalg.svd(real - real.mean(axis=0), full_matrices=False)[0]
    return np.column_stack([np.full(len(real), len(real) ** -0.5), rest[:, : len(values) - 1]])


def _inner_simplex(points: Array) -> list[int]:
    """The rows of (cells, n) that are farthest apart: each is the farthest from the space of those before it."""
    corners = [int(np.linalg.norm(points, axis=1).argmax())]
    rest = points - points[corners[0]]
    for _ in range(points.shape[1] - 1):
        length = np.linalg.norm(rest, axis=1)
        corners.append(int(length.argmax()))
        along = rest[corners[-1]] / length.max()
        rest = rest - np.outer(rest @ along, along)
    return corners
