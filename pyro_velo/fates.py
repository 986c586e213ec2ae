r"""Where cells end up: the probability of each terminal state, for each posterior draw, and the shares of groups.

References: Kemeny & Snell 1976 (absorption); Lange et al. 2022 (CellRank: fates).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import sparse
from scipy.sparse.linalg import splu

from pyro_velo.errors import InputError
from pyro_velo.metrics import Graph
from pyro_velo.population_balance import balanced, bootstrap
from pyro_velo.transitions import LEVELS, Array, Numbers, Transitions

LOST = 1e-10
"""The probability a step that a walk is given up: one of 10^10 steps would stand for a way that cells do not have."""
MIN_REACHED = 1e-3
"""Below this probability of arriving anywhere, a fate given that the cell arrives is no statement about the cell."""
COUNTS_A_DRAW = 50


@dataclass(frozen=True, eq=False)
class Fates:
    """The probability that a cell ends in each terminal state, given that it ends in one.

    `terminal` has the numbers of each state's cells. `draws` (draws, cells, states) sum to one over states; `mean`,
    `low` and `high` (cells, states) are their mean, 5 % and 95 % quantile over draws: the posterior interval of the
    probability, not of the one fate that a cell will have. `reached` (cells,) is the mean probability to end in any of
    the states. A draw in which that is below `MIN_REACHED` is NaN and left out of the summaries; a cell that has no way
    in any draw has NaN there too. `matrix` is the mean transition matrix.

    Noise that a draw has of its own in every gene and cell averages out over genes and along a walk, so it hardly
    widens the interval; what cells share in a draw, the rates of the genes, does, and which cells were sampled. Errors
    that all draws share are not in it: those of the model and of the choice of neighbours and sigma.
    """

    terminal: dict[str, Numbers]
    draws: NDArray[np.float32]
    mean: Array
    low: Array
    high: Array
    reached: Array
    matrix: sparse.csr_matrix

    @property
    def states(self) -> tuple[str, ...]:
        """The names of the terminal states, in the order of the last axis."""
        return tuple(self.terminal)


class Shares(NamedTuple):
    """The share of each group's cells that ends in each state: mean, 5 % and 95 % quantile, (groups, states) each.

    `n` (groups,) counts the cells that have a way; a group without any has NaN.
    """

    groups: tuple[str, ...]
    states: tuple[str, ...]
    n: Numbers
    mean: Array
    low: Array
    high: Array


def absorb(
    transitions: Transitions,
    terminal: Mapping[str, ArrayLike],
    *,
    balance: bool = True,
    resample: bool = True,
    seed: int = 0,
) -> Fates:
    """The fate of every cell in every draw; `terminal` has a mask (cells,) or the numbers of each state's cells.

    `balance`: as many walks enter a cell as pass through it, by which the cells along each way tell how many take it;
    see `population_balance`. Without, a walk takes at a fork whichever way the velocity before it happens to be nearer
    to. `resample`: each draw counts cells anew (Bayesian bootstrap), since other cells might have been sampled.

    One sparse factorisation a draw serves all states. Memory: 4 bytes a draw, cell and state.

    Raises `InputError` as `absorption`.
    """
    n_cells = transitions.graph.shape[0]
    states, rng = _numbers(terminal, n_cells), np.random.default_rng(seed)
    ends = np.isin(np.arange(n_cells), np.concatenate(list(states.values())))
    draws = np.empty((len(transitions), n_cells, len(states)), np.float32)
    reached, total = np.zeros(n_cells), sparse.csr_matrix((n_cells, n_cells))
    for i in range(len(transitions)):
        weights = bootstrap(n_cells, rng) if resample else np.ones(n_cells)
        matrix = balanced(transitions, i, ends, weights) if balance else transitions.matrix(i, weights)
        draws[i], arrived = absorption(matrix, states)
        reached += arrived / len(transitions)
        total = total + matrix
    return Fates(states, draws, *_summaries(draws), reached, _of_rows_one(total))


def absorption(matrix: Graph, terminal: Mapping[str, ArrayLike]) -> tuple[Array, Array]:
    r"""Where a chain ends, given that it ends (cells, states), and the probability that it ends at all (cells,).

    $$(I - (1 - \epsilon) Q)\, B = (1 - \epsilon) R, \qquad P = B / B1$$

    with Q the transitions among cells that are not terminal, R those into terminal states (Kemeny & Snell 1976, theorem
    3.3.7). A walk is given up with probability epsilon = `LOST` a step, so that the system can be solved where cells
    have no way, or one that takes 10^10 steps. They have NaN, see `MIN_REACHED`; rows of the others sum to one.

    Raises `InputError` for a matrix whose rows are not probabilities, for no terminal state, and for states that are
    empty, overlap, or name cells that are not there.
    """
    chain = sparse.csr_matrix(matrix, dtype=np.float64)
    sums = np.asarray(chain.sum(axis=1)).ravel()
    if chain.shape[0] != chain.shape[1] or (chain.data < 0).any() or not np.allclose(sums, 1, rtol=0, atol=1e-6):
        raise InputError(
            f"Expected a square matrix of probabilities whose rows sum to one; got shape {chain.shape}, rows from "
            f"{sums.min():g} to {sums.max():g}. Divide each row by its sum."
        )
    states = _numbers(terminal, chain.shape[0])
    ends = np.zeros((chain.shape[0], len(states)))
    for k, cells in enumerate(states.values()):
        ends[cells, k] = 1
    moving = ends.sum(axis=1) == 0
    if moving.any():
        onward = (1 - LOST) * chain[moving]
        system = sparse.csc_matrix(sparse.identity(int(moving.sum())) - onward[:, moving])
        # The diagonal dominates: no pivots are needed, and an ordering for symmetric patterns fills least.
        factors = splu(system, permc_spec="MMD_AT_PLUS_A", diag_pivot_thresh=0.0, options={"SymmetricMode": True})
        ends[moving] = factors.solve(onward[:, ~moving] @ ends[~moving]).clip(0)
    reached = ends.sum(axis=1)
    has_way = reached > MIN_REACHED
    probabilities = np.full_like(ends, np.nan)
    probabilities[has_way] = ends[has_way] / reached[has_way, None]
    return probabilities, reached.clip(0, 1)


def shares(fates: Fates, groups: ArrayLike | Mapping[str, ArrayLike], *, cells: bool = False, seed: int = 0) -> Shares:
    r"""What share of a group's cells ends in each state, with its 90 % interval over draws.

    $$m_{dk} = \tfrac1n \sum_{i \in \text{group}} P_{dik}$$

    is the expected share in draw d, and the interval that of m: what the posterior says of the group's mean
    probability, in which the errors of single cells average out. It is not the interval of a share that is counted,
    such as that of barcoded clones or of a simulation's labels: each of n cells takes one fate, so a count scatters
    about n m with the variance $\sum_i P_{dik} (1 - P_{dik})$ (Poisson binomial; binomial where all cells are alike).
    `cells=True` draws the cells' fates as well, and the interval is that of the count over n.

    Shapes: groups are labels (cells,) or a mask or numbers for each name. Cells without a way are left out. The mean is
    the same for both. Raises `InputError` for labels of other cells and for groups that are empty.
    """
    n_cells = len(fates.mean)
    named = groups if isinstance(groups, Mapping) else _by_label(groups, n_cells)
    rng = np.random.default_rng(seed)
    size, found = [], []
    for members in _numbers(named, n_cells, "group", disjoint=False).values():
        ways = fates.draws[:, members[np.isfinite(fates.mean[members, 0])]].astype(np.float64)
        size.append(ways.shape[1])
        found.append(_share(ways, rng if cells else None))
    mean, low, high = np.array(found).swapaxes(0, 1)
    return Shares(tuple(map(str, named)), fates.states, np.array(size), mean, low, high)


def _numbers(
    members: Mapping[str, ArrayLike], n_cells: int, what: str = "terminal state", disjoint: bool = True
) -> dict[str, Numbers]:
    """The cells' numbers for masks or numbers, by name."""
    if not members:
        raise InputError(f"Expected one {what} or more; got none. Name at least one, with its cells.")
    found: dict[str, Numbers] = {}
    for name, cells in members.items():
        given = np.asarray(cells)
        if given.dtype == bool:
            given = np.flatnonzero(given) if given.shape == (n_cells,) else np.array([n_cells])
        whole = given.ndim == 1 and given.size > 0 and np.issubdtype(given.dtype, np.integer)
        if not whole or given.min() < 0 or given.max() >= n_cells:
            raise InputError(
                f"Expected a mask of {n_cells} cells, or some of their numbers, for {what} {str(name)!r}; got "
                f"{np.asarray(cells).shape} of {np.asarray(cells).dtype}. Pass cells that are there."
            )
        found[str(name)] = np.unique(given)
    taken = np.bincount(np.concatenate(list(found.values())), minlength=n_cells)
    if disjoint and taken.max() > 1:
        raise InputError(
            f"Expected each cell in one {what} at most; got cell {int(taken.argmax())} in {taken.max()}. Take it out."
        )
    return found


def _of_rows_one(matrix: Graph) -> sparse.csr_matrix:
    """The matrix, each row over its sum."""
    chain = sparse.csr_matrix(matrix)
    chain.data /= np.repeat(np.asarray(chain.sum(axis=1)).ravel(), np.diff(chain.indptr))
    return chain


def _summaries(draws: NDArray[np.float32]) -> tuple[Array, Array, Array]:
    """Mean, 5 % and 95 % quantile over draws, NaN left out, of (draws, cells, states)."""
    found = np.full((3, *draws.shape[1:]), np.nan)
    known = np.isfinite(draws[..., 0])
    for cells, mean, quantile in (
        (known.all(axis=0), np.mean, np.quantile),
        (known.any(axis=0) & ~known.all(axis=0), np.nanmean, np.nanquantile),
    ):
        if cells.any():
            some = draws[:, cells].astype(np.float64)
            found[0, cells], found[1:, cells] = mean(some, axis=0), quantile(some, LEVELS, axis=0)
    mean, low, high = found
    return mean, low, high


def _by_label(labels: ArrayLike, n_cells: int) -> dict[str, Numbers]:
    given = np.asarray(labels).astype(str)
    if given.shape != (n_cells,):
        raise InputError(
            f"Expected a label for each of {n_cells} cells; got {given.shape}. Take them from one AnnData."
        )
    return {str(name): np.flatnonzero(given == name) for name in np.unique(given)}


def _share(ways: Array, rng: np.random.Generator | None) -> Array:
    """Mean, 5 % and 95 % quantile (3, states) of the share of the cells in (draws, cells, states)."""
    ways = ways[np.isfinite(ways[..., 0]).any(axis=1)]
    if not ways.size:
        return np.full((3, ways.shape[2]), np.nan)
    expected = np.nanmean(ways, axis=1)
    drawn = expected if rng is None else np.concatenate([_counted(each, rng) for each in ways])
    return np.vstack([expected.mean(axis=0), np.quantile(drawn, LEVELS, axis=0)])


def _counted(probabilities: Array, rng: np.random.Generator) -> Array:
    """Counted shares (counts, states) of cells that each take one fate with their probabilities (cells, states)."""
    known = probabilities[np.isfinite(probabilities[:, 0])]
    upper = known.cumsum(axis=1)[:, :-1]
    fate = (rng.random((COUNTS_A_DRAW, len(known), 1)) > upper).sum(axis=2)
    return np.stack([(fate == k).mean(axis=1) for k in range(probabilities.shape[1])], axis=1)
