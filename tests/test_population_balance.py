"""Laws of population balance: what enters a cell passes it, and the cells along a way say how many take it."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from scipy import sparse

from pyro_velo import fates
from pyro_velo.population_balance import STIFFNESS, balanced, bootstrap, capacity, openness
from pyro_velo.transitions import Transitions, transitions
from tests.test_fates import graph_of, lifted, streamed

TRUNK, LENGTH, WIDTH = 4.0, 10.0, 0.1


def fork(up: int, down: int, speed_up: float = 1.0, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Places and velocities (cells, 2): `up` and `down` cells on ways of one length, and a trunk that feeds them."""
    rng = np.random.default_rng(seed)
    trunk = round((speed_up * up + down) * TRUNK / (LENGTH - TRUNK))
    along = [rng.uniform(*span, n) for span, n in (((0, TRUNK), trunk), ((TRUNK, LENGTH), up), ((TRUNK, LENGTH), down))]
    side = np.repeat([0, 1, -1], [len(each) for each in along])
    t = np.concatenate(along)
    x = np.column_stack((t, side * np.clip(t - TRUNK, 0, None))) + WIDTH * rng.normal(size=(len(t), 2))
    v = np.column_stack((np.ones_like(t), side)) * np.where(side == 1, speed_up, 1.0)[:, None]
    return x, v


def chain_of(x: np.ndarray, v: np.ndarray, draws: int = 2) -> Transitions:
    graph = graph_of(x, 12)
    return transitions(streamed(lifted(np.stack([v] * draws))), lifted(x), graph + graph.T)


def ends_of(x: np.ndarray) -> dict[str, np.ndarray]:
    return {"up": (x[:, 0] > 9) & (x[:, 1] > 0), "down": (x[:, 0] > 9) & (x[:, 1] < 0)}


def test_what_enters_a_cell_is_what_passes_but_for_the_price_of_stiffness(rng: np.random.Generator) -> None:
    x, v = fork(150, 50)
    chain = chain_of(x, v)
    ends, weights = np.logical_or(*ends_of(x).values()), bootstrap(len(x), rng)
    passing, free, matrix = capacity(chain, 0, weights), chain.matrix(0, weights), balanced(chain, 0, ends, weights)
    c = openness(free, passing, ends)
    inflow, free_inflow = (np.where(ends, 0, passing) @ each for each in (matrix, free))
    assert_allclose(inflow[~ends], (passing * c ** (1 - 1 / STIFFNESS))[~ends], rtol=0.02)
    off, free_off = (np.abs(np.log((flow / passing)[~ends])).mean() for flow in (inflow, free_inflow))
    assert off < free_off / 3
    assert_array_equal(c[ends], 1)
    expected = free.toarray() * c
    assert_allclose(matrix.toarray(), expected / expected.sum(axis=1, keepdims=True), atol=1e-12)


def test_where_everything_passes_the_velocities_decide() -> None:
    x, v = fork(60, 60)
    chain = chain_of(x, v)
    ends = np.ones(len(x), bool)
    assert_allclose(balanced(chain, 0, ends).toarray(), chain.matrix(0).toarray(), atol=1e-12)


@pytest.mark.parametrize(
    ("up", "down", "speed", "share"), [(200, 200, 1, 1 / 2), (300, 100, 1, 3 / 4), (200, 200, 3, 3 / 4)]
)
def test_at_a_fork_cells_times_speed_is_the_share(up: int, down: int, speed: float, share: float) -> None:
    """Mean over six samples of cells, each off by 0.1; by the velocities alone the two ways are alike."""
    found, free = [], []
    for seed in range(6):
        x, v = fork(up, down, speed, seed)
        chain, ends, trunk = chain_of(x, v), ends_of(x), x[:, 0] < TRUNK - 0.5
        for shares, balance in ((found, True), (free, False)):
            ways = fates.absorb(chain, ends, balance=balance, resample=False)
            shares.append(np.nanmean(ways.mean[trunk, 0]))
    error, free_error = (np.sqrt(np.mean((np.array(shares) - share) ** 2)) for shares in (found, free))
    assert abs(np.mean(found) - share) < 0.1
    assert error < 0.75 * free_error


@pytest.mark.slow
def test_the_interval_covers_the_share_of_the_cells_one_might_have_sampled() -> None:
    covered, widths = [], []
    for seed in range(8):
        x, v = fork(80, 40, seed=seed)
        found = fates.absorb(chain_of(x, v, draws=20), ends_of(x), seed=seed)
        share = fates.shares(found, {"trunk": x[:, 0] < TRUNK - 0.5})
        covered.append(share.low[0, 0] <= 2 / 3 <= share.high[0, 0])
        widths.append(share.high[0, 0] - share.low[0, 0])
    assert sum(covered) >= 6 and np.mean(widths) < 0.45


def test_a_cell_that_counts_twice_is_two_cells() -> None:
    x, v = fork(40, 40)
    ends = ends_of(x)
    twice = np.flatnonzero(x[:, 0] < 6)[::3]
    weights = np.ones(len(x))
    weights[twice] = 2
    graph = graph_of(x, 12)
    graph = sparse.csr_matrix(graph + graph.T)
    index = np.concatenate((np.arange(len(x)), twice))
    both = graph[index][:, index]
    one, two = (
        transitions(streamed(lifted(np.stack([v[i]] * 2))), lifted(x[i]), g)
        for i, g in ((np.arange(len(x)), graph), (index, both))
    )
    merge = sparse.csr_matrix((np.ones(len(index)), (np.arange(len(index)), index)))
    expected = one.matrix(0, weights).toarray()[index]
    assert_allclose((two.matrix(0) @ merge).toarray(), expected, atol=1e-6)
    assert_allclose((merge.T @ capacity(two, 0, np.ones(len(index)))), capacity(one, 0, weights), rtol=1e-5)
    stop = np.logical_or(*ends.values())
    assert_allclose(
        (balanced(two, 0, stop[index]) @ merge).toarray(), balanced(one, 0, stop, weights).toarray()[index], atol=1e-3
    )


def test_a_seed_gives_the_same_fates_and_cells_are_counted_once_on_average() -> None:
    x, v = fork(40, 40)
    one, same, other = (fates.absorb(chain_of(x, v), ends_of(x), seed=seed).draws for seed in (0, 0, 1))
    assert_array_equal(one, same)
    assert (one != other).any()
    assert abs(bootstrap(100_000, np.random.default_rng(0)).mean() - 1) < 0.02
