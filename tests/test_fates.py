"""Laws of fates: chains that are solved on paper, fields whose ends are known, intervals that mean what they say."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal
from scipy import sparse, stats
from scipy.spatial import cKDTree

from pyro_velo import directions, embedding, fates, macrostates, simulate, transitions
from pyro_velo.errors import InputError
from pyro_velo.posterior import directional_uncertainty
from pyro_velo.transitions import Transitions

Draws = np.ndarray


def graph_of(x: np.ndarray, k: int = 8) -> sparse.csr_matrix:
    """The k nearest neighbours of each point."""
    distance, index = cKDTree(x).query(x, k=k + 1)
    rows = np.repeat(np.arange(len(x)), k)
    return sparse.csr_matrix((distance[:, 1:].ravel(), (rows, index[:, 1:].ravel())), shape=(len(x), len(x)))


def streamed(draws: Draws, size: int = 7) -> transitions.Stream:
    """The draws (draws, cells, genes) in batches, the last cells first."""
    starts = range(0, draws.shape[1], size)

    def stream(receive: transitions.Receiver) -> None:
        for start in reversed(starts):
            cells = np.arange(start, min(start + size, draws.shape[1]))
            receive(cells, draws[:, cells])

    return stream


def lifted(plane: np.ndarray, genes: int = 12) -> np.ndarray:
    """Vectors of a plane (..., 2) among genes, by an isometry that leaves their mean over genes at zero."""
    basis = np.random.default_rng(1).normal(size=(2, genes))
    basis -= basis.mean(axis=1, keepdims=True)
    return plane @ np.linalg.qr(basis.T)[0].T


def band(n: int = 150) -> np.ndarray:
    """Cells in [-3, 3] x [0, 0.5]."""
    return np.random.default_rng(0).uniform((-3, 0), (3, 0.5), (n, 2))


FIELDS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "apart": lambda x: np.column_stack([np.sign(x[:, 0]), 0 * x[:, 0]]),
    "to the right": lambda x: np.column_stack([1 + 0 * x[:, 0], 0 * x[:, 0]]),
    "to the left": lambda x: np.column_stack([-1 + 0 * x[:, 0], 0 * x[:, 0]]),
}


def chain_of(*fields: str, x: np.ndarray | None = None) -> Transitions:
    """The transitions of fields on the band, a draw each."""
    x = band() if x is None else x
    draws = np.stack([lifted(FIELDS[name](x)) for name in fields])
    return transitions.transitions(streamed(draws), lifted(x), graph_of(x))


def ends_of(x: np.ndarray) -> dict[str, np.ndarray]:
    return {"left": x[:, 0] < -2.5, "right": x[:, 0] > 2.5}


def walk(n: int, up: float, stay: float = 0.0) -> sparse.csr_matrix:
    """A gambler with 0 to n coins, who wins one with probability `up` and may sit out a round."""
    steps = sparse.diags([np.full(n, (1 - up) * (1 - stay)), np.full(n, up * (1 - stay))], [-1, 1], format="lil")
    steps.setdiag(stay)
    for end in (0, n):
        steps[end] = 0
        steps[end, end] = 1
    return steps.tocsr()


# Chains


@pytest.mark.parametrize("stay", [0.0, 0.6])
@pytest.mark.parametrize("up", [0.5, 0.4, 0.7])
def test_absorption_is_the_gamblers_ruin(up: float, stay: float) -> None:
    n = 20
    probabilities, reached = fates.absorption(walk(n, up, stay), {"ruin": [0], "rich": [n]})
    coins, odds = np.arange(n + 1), (1 - up) / up
    expected = coins / n if up == 0.5 else (1 - odds**coins) / (1 - odds**n)
    assert_allclose(probabilities[:, 1], expected, atol=1e-7)
    assert_allclose(probabilities.sum(axis=1), 1, rtol=1e-12)
    assert_allclose(reached, 1, atol=1e-6)


def test_absorption_is_the_limit_of_many_steps(rng: np.random.Generator) -> None:
    matrix = rng.uniform(size=(30, 30)) ** 8
    matrix /= matrix.sum(axis=1, keepdims=True)
    terminal = {"a": [0, 4], "b": [7], "c": [20, 21]}
    probabilities, _ = fates.absorption(sparse.csr_matrix(matrix), terminal)
    held = matrix.copy()
    ends = [cell for cells in terminal.values() for cell in cells]
    held[ends] = np.eye(30)[ends]
    limit = np.linalg.matrix_power(held, 2**14)
    assert_allclose(probabilities, np.column_stack([limit[:, c].sum(axis=1) for c in terminal.values()]), atol=1e-6)


def test_a_fate_is_given_that_there_is_one() -> None:
    # From 0: half of the walks are lost in 3, and a quarter ends in each of 1 and 2. From 4 there is no way.
    matrix = np.array([[0, 0.25, 0.25, 0.5, 0], [0, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 0, 0.1, 0.9], [0, 0, 0, 1, 0]])
    probabilities, reached = fates.absorption(sparse.csr_matrix(matrix), {"a": [1], "b": [2]})
    assert_allclose(reached, [0.5, 1, 1, 0, 0], atol=1e-9)
    assert_allclose(probabilities[:3], [[0.5, 0.5], [1, 0], [0, 1]], atol=1e-12)
    assert np.isnan(probabilities[3:]).all()


def test_a_way_that_is_never_taken_is_none() -> None:
    """A trap that the chain leaves with a probability of 1e-36: floating point would make fates of rounding."""
    up = 1e-9
    matrix = walk(8, up).tolil()
    matrix[0] = 0
    matrix[0, 0], matrix[0, 1] = 1 - up, up
    probabilities, reached = fates.absorption(matrix.tocsr(), {"rich": [8]})
    assert np.isnan(probabilities[:5]).all() and (reached[:5] < fates.MIN_REACHED).all()


def test_transitions_are_the_softmax_of_the_cosines_of_the_embedding(rng: np.random.Generator) -> None:
    x, draws, unit = rng.normal(size=(40, 9)), rng.normal(size=(3, 40, 9)), rng.uniform(0.2, 3, 9)
    graph = graph_of(rng.normal(size=(40, 2)), 4)
    for steps in (1, 2):
        chain = transitions.transitions(streamed(draws), x, graph, unit=unit, steps=steps, scale=6.0)
        total = 0
        for i, draw in enumerate(draws):
            cosines = embedding.cosine_correlations(draw * unit, x * unit, graph, steps=steps)
            assert_array_equal(cosines.indices, chain.graph.indices)
            assert_allclose(chain.cosines[i], cosines.data, atol=1e-6)
            dense = np.where(cosines.toarray() != 0, np.exp(6.0 * cosines.toarray()), 0)
            expected = dense / dense.sum(axis=1, keepdims=True)
            assert_allclose(chain.matrix(i).toarray(), expected, atol=1e-6)
            total = total + expected / len(draws)
        assert_allclose(chain.mean().toarray(), total, atol=1e-6)


def test_the_mean_matrix_is_what_cellrank_takes(rng: np.random.Generator) -> None:
    """Of CellRank's `PrecomputedKernel`: a csr_matrix of float64, not negative, rows sum to one within 1e-12."""
    x = rng.normal(size=(50, 6))
    matrix = transitions.transitions(streamed(rng.normal(size=(7, 50, 6))), x, graph_of(x)).mean()
    assert isinstance(matrix, sparse.spmatrix) and matrix.dtype == np.float64 and (matrix.data > 0).all()
    assert_allclose(np.asarray(matrix.sum(axis=1)).ravel(), 1, rtol=1e-12)


def test_a_cell_without_neighbours_stays_and_has_no_fate() -> None:
    x = band()
    graph = graph_of(x).tolil()
    alone = int(np.abs(x[:, 0]).argmin())
    graph[alone], graph[:, alone] = 0, 0
    draws = np.stack([lifted(FIELDS["apart"](x))] * 2)
    chain = transitions.transitions(streamed(draws), lifted(x), graph.tocsr())
    assert chain.matrix(0)[alone, alone] == 1
    found = fates.absorb(chain, ends_of(x))
    assert np.isnan(found.mean[alone]).all() and np.isnan(found.draws[:, alone]).all() and found.reached[alone] == 0
    others = np.arange(len(x)) != alone
    assert_allclose(found.mean[others].sum(axis=1), 1, atol=1e-6)


# Fates


def test_cells_end_where_the_field_leads() -> None:
    x = band()
    found = fates.absorb(chain_of("apart", "apart", x=x), ends_of(x))
    assert found.states == ("left", "right")
    assert found.mean[x[:, 0] < -0.6, 0].min() > 0.99 and found.mean[x[:, 0] > 0.6, 1].min() > 0.99
    right = fates.absorb(chain_of("to the right", "to the right", x=x), ends_of(x))
    assert right.mean[(x[:, 0] > -2.3) & (x[:, 0] < 2.5), 1].min() > 0.99


def test_draws_that_disagree_make_wide_intervals_and_equal_ones_none() -> None:
    x = band()
    middle = np.abs(x[:, 0]) < 2
    split = fates.absorb(chain_of(*["to the left", "to the right"] * 5, x=x), ends_of(x), resample=False)
    assert_allclose(split.mean[middle], 0.5, atol=0.01)
    assert split.low[middle].max() < 0.01 and split.high[middle].min() > 0.99
    same = fates.absorb(chain_of(*["apart"] * 4, x=x), ends_of(x), resample=False)
    assert_array_equal(same.low, same.high)
    share = fates.shares(same, {"middle": middle})
    assert_allclose(share.high - share.low, 0, atol=1e-12)


def test_summaries_are_those_of_the_draws_with_a_way() -> None:
    x = band()
    found = fates.absorb(chain_of("apart", "to the left", "to the right", x=x), ends_of(x))
    assert_allclose(found.draws.sum(axis=2), 1, atol=1e-6)
    assert_allclose(found.mean, found.draws.mean(axis=0), atol=1e-6)
    assert_allclose(np.stack([found.low, found.high]), np.quantile(found.draws, (0.05, 0.95), axis=0), atol=1e-6)
    assert ((found.low <= found.mean + 1e-9) & (found.mean <= found.high + 1e-9)).all()
    draws = found.draws.copy()
    draws[1, 3], draws[:, 4] = np.nan, np.nan
    mean, low, high = fates._summaries(draws)
    assert_allclose(mean[3], draws[[0, 2], 3].mean(axis=0), atol=1e-6)
    assert np.isnan([mean[4], low[4], high[4]]).all()
    assert_allclose(mean[5:], found.mean[5:])


def test_true_velocities_lead_to_the_true_lineage() -> None:
    settings = simulate.Settings(kinetics=simulate.LogNormalRates(drop=0), lineages=simulate.Lineages(2))
    for seed in (0, 2):
        cells = simulate.simulate(120, 16, settings=settings, seed=seed)
        seen = np.ptp(cells.spliced, axis=0) > 0
        x, v, unit = cells.spliced[:, seen], cells.true_velocity[:, seen], 1 / np.ptp(cells.spliced[:, seen], axis=0)
        noise = 0.3 * v.std(axis=0) * np.random.default_rng(seed).normal(size=(10, *v.shape))
        chain = transitions.transitions(streamed(v + noise), x, graph_of(x * unit, 10), unit=unit)
        own = {name: cells.lineage == name for name in ("lineage_1", "lineage_2")}
        found = fates.absorb(chain, {name: mask & (cells.true_t > 17) for name, mask in own.items()})
        for k, mask in enumerate(own.values()):
            late = mask & (cells.true_t > 10) & (cells.true_t <= 17)
            assert late.sum() > 10 and found.mean[late, k].mean() > 0.9


# Shares


def made_up(draws: np.ndarray) -> fates.Fates:
    """Fates with the probabilities (draws, cells, states)."""
    names = {f"state {k}": np.array([k]) for k in range(draws.shape[2])}
    draws = draws.astype(np.float32)
    return fates.Fates(names, draws, *fates._summaries(draws), np.ones(draws.shape[1]), sparse.csr_matrix((1, 1)))


def test_a_share_is_the_mean_probability_of_each_draw(rng: np.random.Generator) -> None:
    draws = rng.dirichlet((1, 2, 3), size=(40, 30))
    labels = np.array(["early", "late"])[np.arange(30) % 2]
    found = fates.shares(made_up(draws), labels)
    assert found.groups == ("early", "late") and found.states == ("state 0", "state 1", "state 2")
    for row, start in enumerate((0, 1)):
        expected = draws[:, start::2].mean(axis=1)
        assert_allclose(found.mean[row], expected.mean(axis=0), atol=1e-6)
        assert_allclose([found.low[row], found.high[row]], np.quantile(expected, (0.05, 0.95), axis=0), atol=1e-6)
    assert_allclose(found.mean.sum(axis=1), 1, atol=1e-6)
    assert_array_equal(found.n, [15, 15])


def test_a_counted_share_of_equal_cells_is_binomial() -> None:
    draws = np.broadcast_to([0.3, 0.7], (100, 40, 2))
    expected, counted = (fates.shares(made_up(draws), {"all": np.arange(40)}, cells=cells) for cells in (False, True))
    assert_allclose(expected.low, expected.high, atol=1e-9)
    assert_allclose(expected.mean, counted.mean)
    low, high = stats.binom.ppf((0.05, 0.95), 40, 0.3) / 40
    # 5,000 counts: a quantile may be one cell off.
    assert abs(counted.low[0, 0] - low) <= 1 / 40 + 1e-9 and abs(counted.high[0, 0] - high) <= 1 / 40 + 1e-9
    assert_allclose(counted.low[0, 0], 1 - counted.high[0, 1], atol=1e-9)


def test_cells_whose_fate_is_sealed_add_no_chance() -> None:
    sealed = np.zeros((20, 10, 2))
    sealed[:, :4, 0], sealed[:, 4:, 1] = 1, 1
    found = fates.shares(made_up(sealed), {"all": np.ones(10, bool)}, cells=True)
    assert_array_equal(found.low, found.high)
    assert_allclose(found.mean, [[0.4, 0.6]], atol=1e-6)


def test_a_counted_share_varies_as_draws_and_cells_do(rng: np.random.Generator) -> None:
    """The law of total variance: that of the expected share, and the mean of the Poisson binomial's."""
    draws = rng.dirichlet((2, 3, 4), size=(60, 25))
    share = np.concatenate([fates._counted(each, rng) for each in np.repeat(draws, 20, axis=0)])
    expected = draws.mean(axis=1).var(axis=0) + (draws * (1 - draws)).sum(axis=1).mean(axis=0) / 25**2
    assert_allclose(share.mean(axis=0), draws.mean(axis=(0, 1)), atol=0.005)
    assert_allclose(share.var(axis=0), expected, rtol=0.05)
    assert_allclose(share.sum(axis=1), 1)


def test_cells_without_a_way_are_left_out_of_shares(rng: np.random.Generator) -> None:
    draws = rng.dirichlet((1, 1), size=(9, 12))
    draws[:, :3], draws[0, 3:6] = np.nan, np.nan
    groups = {"lost": np.arange(3), "both": np.arange(6), "found": np.arange(6, 12)}
    for cells in (False, True):
        found = fates.shares(made_up(draws), groups, cells=cells)
        assert_array_equal(found.n, [0, 3, 6])
        assert np.isnan(found.mean[0]).all() and np.isnan(found.low[0]).all()
        assert_allclose(found.mean[1], draws[1:, 3:6].mean(axis=(0, 1)), atol=1e-6)


# Macrostates


def blocks(sizes: tuple[int, ...], leave: tuple[float, ...], rng: np.random.Generator) -> np.ndarray:
    """A chain that is lumpable: each cell of a block leaves it with the block's probability, to anywhere else."""
    matrix, start = np.zeros((sum(sizes), sum(sizes))), 0
    for size, out in zip(sizes, leave, strict=True):
        rows = slice(start, start + size)
        matrix[rows] = out / (len(matrix) - size)
        inside = rng.uniform(size=(size, size))
        matrix[rows, rows] = (1 - out) * inside / inside.sum(axis=1, keepdims=True)
        start += size
    return matrix


# The last is above the size at which eigenvectors are sought without the whole matrix.
@pytest.mark.parametrize("sizes", [(20, 30), (12, 15, 25), (200, 320)])
def test_macrostates_of_a_lumpable_chain_are_its_blocks(sizes: tuple[int, ...], rng: np.random.Generator) -> None:
    leave = (0.02, 0.05, 0.03)[: len(sizes)]
    matrix = blocks(sizes, leave, rng)
    found = macrostates.macrostates(sparse.csr_matrix(matrix))
    block = np.repeat(range(len(sizes)), sizes)
    order = [int(found.membership[block == k].mean(axis=0).argmax()) for k in range(len(sizes))]
    assert sorted(order) == list(range(len(sizes)))
    assert_allclose(found.membership[:, order], np.eye(len(sizes))[block], atol=1e-6)
    assert_allclose(found.stability[order], 1 - np.array(leave), atol=1e-9)
    for k in range(len(sizes)):
        inside = block == k
        assert_allclose(found.visited[inside] @ matrix[np.ix_(inside, inside)], (1 - leave[k]) * found.visited[inside])
        assert_allclose(found.visited[inside].sum(), 1)
    states = macrostates.terminal_states(sparse.csr_matrix(matrix), cells=5, stability=0.96)
    assert [set(block[cells]) for cells in states.values()] == [{k} for k in np.argsort(leave) if leave[k] <= 0.04]
    assert all(len(cells) == 5 for cells in states.values())


def test_the_inner_simplex_has_the_corners_of_the_points(rng: np.random.Generator) -> None:
    for dims in (2, 3, 4):
        inside = rng.dirichlet(np.ones(dims), size=200)
        corners = rng.normal(size=(dims, dims)) * [[1], [30], [0.2], [5]][:dims]
        points = np.concatenate([inside, np.eye(dims)]) @ corners
        assert sorted(macrostates._inner_simplex(points)) == list(range(200, 200 + dims))


def test_the_ends_of_a_field_are_found() -> None:
    x = band()
    found = macrostates.terminal_states(chain_of("apart", "apart", x=x).mean(), 2, cells=10)
    sides = sorted(x[cells, 0].mean() for cells in found.values())
    assert len(sides) == 2 and sides[0] < -2 and sides[1] > 2
    (one,) = macrostates.terminal_states(chain_of("to the right", "to the right", x=x).mean(), 1, cells=10).values()
    assert x[one, 0].min() > 2


def test_a_cycle_has_no_two_macrostates() -> None:
    cycle = sparse.csr_matrix(np.roll(np.eye(12), 1, axis=1) * 0.9 + np.eye(12) * 0.1)
    with pytest.raises(InputError, match=r"part no complex pair; got 2\. Ask for 3"):
        macrostates.macrostates(cycle, 2)
    with pytest.raises(InputError, match=r"macrostates of stability 0\.999 or more; got \[.*Name the terminal states"):
        macrostates.terminal_states(cycle, 3, stability=0.999)


# Directions


@pytest.mark.parametrize("degrees", [0, 20, 75])
def test_vectors_about_their_mean_have_its_angle(degrees: float) -> None:
    angle = np.radians(degrees)
    around = np.array([[np.cos(angle), np.sin(angle)], [np.cos(angle), -np.sin(angle)]] * 5)[:, None]
    found = directions.directions(around * 7)
    assert_allclose(found.mean, np.cos(angle))
    assert_allclose(found.angle, degrees, atol=1e-5)
    assert_allclose([found.variance, found.low - np.cos(angle), found.high - np.cos(angle)], 0, atol=1e-12)


def test_draws_of_no_length_point_nowhere() -> None:
    found = directions.directions(np.zeros((4, 2, 3)))
    assert_array_equal(found.mean, 0)
    assert_array_equal(found.angle, 90)


def test_the_variance_is_the_one_that_a_fit_writes(rng: np.random.Generator) -> None:
    draws = torch.from_numpy(rng.normal(0.5, 1, size=(9, 20, 5)))
    expected = directional_uncertainty(draws, draws.mean(0))
    assert_allclose(directions.directions(draws.numpy()).variance, expected.numpy(), rtol=1e-12)


def noisy(sd: float, n: int = 60, genes: int = 60) -> tuple[np.ndarray, np.ndarray]:
    """Cells on a thick line, and 20 draws of a velocity along it with noise of `sd` times its length."""
    rng = np.random.default_rng(3)
    along = rng.normal(size=genes)
    along *= 4 / np.linalg.norm(along)
    x = rng.uniform(size=(n, 1)) * along + 0.15 * rng.normal(size=(n, genes))
    return x, along + sd * 4 / genes**0.5 * rng.normal(size=(20, n, genes))


def test_uncertainty_is_none_of_equal_draws_and_rises_with_their_spread() -> None:
    angles, variances = [], []
    for sd in (0.0, 0.3, 1.0, 3.0):
        x, draws = noisy(sd)
        found = directions.uncertainty(streamed(draws), x, graph_of(x))
        angles.append([each.angle.mean() for each in found])
        variances.append([each.variance.mean() for each in found])
        for each in found:
            assert ((each.low <= each.mean + 1e-12) & (each.mean <= each.high + 1e-12) & (each.high <= 1)).all()
    assert_allclose(angles[0], 0, atol=1e-3)
    assert_allclose(variances[0], 0, atol=1e-12)
    assert (np.diff(angles, axis=0) > 0).all() and (np.diff(variances, axis=0)[:3] > 0).all()


def test_the_extrinsic_direction_is_that_of_the_expected_step() -> None:
    x, draws = noisy(1.0)
    graph, unit = graph_of(x), np.linspace(0.5, 2, x.shape[1])
    chain = transitions.transitions(streamed(draws), x, graph, unit=unit)
    still = sparse.csr_matrix(chain.graph / 8.0)
    for undirected in (False, True):
        less = x if undirected else still @ x
        expected = directions.directions([(chain.matrix(i) @ x - less) * unit for i in range(len(draws))])
        found = directions.uncertainty(streamed(draws), x, graph, unit=unit, undirected=undirected)
        for one, other in zip(found.extrinsic, expected, strict=True):
            assert_allclose(one, other, atol=1e-3 if one is found.extrinsic.angle else 1e-5)
        assert_allclose(found.intrinsic.mean, directions.directions(draws).mean, rtol=1e-12)


def test_noise_alone_is_not_certain_once_the_undirected_walk_is_left_out() -> None:
    x, draws = noisy(1.0, genes=150)
    draws -= draws.mean(axis=0)
    without, kept = (
        directions.uncertainty(streamed(draws), x, graph_of(x), undirected=undirected).extrinsic.mean.mean()
        for undirected in (False, True)
    )
    assert without < 0.3 and kept > 0.9


# What must not happen


def test_nothing_is_modified() -> None:
    x, draws = noisy(0.5)
    graph, terminal = graph_of(x), {"a": np.arange(3), "b": np.arange(60) > 55}
    given = (x, draws, graph.data, graph.indices, terminal["b"])
    before = [each.copy() for each in given]
    chain = transitions.transitions(streamed(draws), x, graph)
    cosines = chain.cosines.copy()
    directions.uncertainty(streamed(draws), x, graph)
    found = fates.absorb(chain, terminal)
    probabilities = found.draws.copy()
    fates.shares(found, terminal, cells=True)
    macrostates.macrostates(found.matrix, 1)
    for one, other in zip(given, before, strict=True):
        assert_array_equal(one, other)
    assert_array_equal(chain.cosines, cosines)
    assert_array_equal(found.draws, probabilities)


LINE = walk(9, 0.5)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: fates.absorption(2 * LINE, {"a": [0]}), r"rows sum to one; got shape \(10, 10\), rows from 2 to 2"),
        (lambda: fates.absorption(np.nan * LINE, {"a": [0]}), "rows sum to one"),
        (lambda: fates.absorption(LINE, {}), "one terminal state or more; got none"),
        (lambda: fates.absorption(LINE, {"a": []}), "a mask of 10 cells, or some of their numbers, .*'a'"),
        (lambda: fates.absorption(LINE, {"a": [10]}), "some of their numbers"),
        (lambda: fates.absorption(LINE, {"a": np.ones(3, bool)}), r"got \(3,\) of bool"),
        (lambda: fates.absorption(LINE, {"a": [0, 1], "b": [1]}), "one terminal state at most; got cell 1 in 2"),
        (lambda: fates.shares(made_up(np.ones((2, 4, 1))), ["x"] * 3), r"a label for each of 4 cells; got \(3,\)"),
        (lambda: macrostates.macrostates(LINE, 9), "Expected 1 to 7 macrostates"),
        (lambda: transitions.transitions(streamed(np.ones((1, 10, 2))), np.ones((10, 2)), LINE), "2 or more draws"),
        (
            lambda: transitions.transitions(streamed(np.ones((2, 10, 3))), np.ones((10, 2)), LINE),
            "velocities of 2 genes",
        ),
        (
            lambda: transitions.transitions(lambda receive: None, np.ones((10, 2)), LINE),
            "a stream of velocities; got none",
        ),
        (lambda: transitions.transitions(streamed(np.ones((2, 9, 2))), np.ones((9, 2)), LINE), "a graph of 9 cells"),
        (
            lambda: transitions.transitions(streamed(np.ones((2, 10, 2))), np.full((10, 2), np.nan), LINE),
            "finite expression",
        ),
        (
            lambda: directions.uncertainty(streamed(np.ones((2, 10, 2))), np.ones((10, 2)), LINE, scale=0),
            "positive scale",
        ),
    ],
)
def test_bad_input_is_told_with_its_remedy(call: Callable[[], object], match: str) -> None:
    with pytest.raises(InputError, match=match):
        call()
