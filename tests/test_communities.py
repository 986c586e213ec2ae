"""Groups by the graph of neighbours: what they maximise, and shapes that no mixture of Gaussians finds."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from scipy import sparse

from pyro_velo.agreement import agreement
from pyro_velo.clustering import TRAINING, Started
from pyro_velo.communities import communities, modularity, neighbour_graph, spread
from pyro_velo.encoders import Encoder
from pyro_velo.errors import InputError
from pyro_velo.profiles import UNKNOWN, Profiles
from pyro_velo.starts import StartSettings, mixture_start


def rings(rng: np.random.Generator, n: int = 400) -> tuple[np.ndarray, np.ndarray]:
    """Two circles around one centre: one mean, one covariance but for its scale."""
    label = np.arange(n) % 2
    angle, radius = rng.uniform(0, 2 * np.pi, n), np.where(label == 0, 1.0, 3.0) + 0.1 * rng.normal(size=n)
    return np.stack((radius * np.cos(angle), radius * np.sin(angle)), 1), label


def test_the_graph_counts_how_often_two_cells_are_near(rng: np.random.Generator) -> None:
    z = rng.normal(size=(30, 2))
    graph = neighbour_graph(z, 4).toarray()
    assert_allclose(graph, graph.T)
    assert set(np.unique(graph)) == {0, 1, 2} and graph.sum() == 2 * 4 * 30 and not graph.diagonal().any()


def test_modularity_is_newmans(rng: np.random.Generator) -> None:
    graph = sparse.csr_matrix(np.triu(rng.integers(0, 3, (12, 12)), 1))
    graph = (graph + graph.T).astype(float)
    groups = np.arange(12) % 3
    ends, twice = graph.toarray().sum(1), graph.sum()
    same = groups[:, None] == groups
    expected = ((graph.toarray() - np.outer(ends, ends) / twice) * same).sum() / twice
    assert_allclose(modularity(graph, groups), expected)
    assert_allclose(modularity(graph, np.zeros(12, np.int64)), 0, atol=1e-12)
    # c pieces of one size that no edge joins: 1 - 1/c, which nothing surpasses.
    apart = sparse.block_diag([np.ones((4, 4)) - np.eye(4)] * 3).tocsr()
    assert_allclose(modularity(apart, np.repeat(np.arange(3), 4)), 1 - 1 / 3)


def test_groups_are_found_whatever_their_shape_and_no_single_move_is_better(rng: np.random.Generator) -> None:
    z = np.concatenate([rng.normal(size=(n, 2)) + c for n, c in ((150, (0, 0)), (50, (7, 0)), (100, (0, 7)))])
    label = np.repeat(np.arange(3), (150, 50, 100))
    graph = neighbour_graph(z, 10)
    found = communities(graph, z, 3, inits=2, seed=0)
    assert agreement(label, found).accuracy > 0.99
    best = modularity(graph, found)
    for cell in range(0, 300, 29):
        for group in range(3):
            moved = found.copy()
            moved[cell] = group
            assert modularity(graph, moved) <= best + 1e-12
    assert set(communities(neighbour_graph(z[:8], 15), z[:8], 5, inits=1, seed=0)) == set(range(5))


def test_labels_spread_along_the_graph_and_no_further(rng: np.random.Generator) -> None:
    z, label = rings(rng)
    z, label = np.concatenate((z, rng.normal(size=(20, 2)) + 50)), np.concatenate((label, np.zeros(20, np.int64)))
    known = np.full(420, UNKNOWN)
    for k, n in ((0, 2), (1, 8)):
        known[rng.choice(np.flatnonzero(label[:400] == k), n, replace=False)] = k
    found = spread(neighbour_graph(z, 10), known, 2)
    assert (found[:400].argmax(1) == label[:400]).all() and not found[400:].any()
    assert_allclose(found[:400].sum(1), 1)
    graph = neighbour_graph(z[:400], 10)
    ends = graph.toarray().sum(1) ** -0.5
    given = np.stack([(known[:400] == k) / (known == k).sum() for k in (0, 1)], 1)
    exact = np.linalg.solve(np.eye(400) - 0.99 * ends[:, None] * graph.toarray() * ends, given)
    assert_allclose(spread(graph, known[:400], 2), exact / exact.sum(1, keepdims=True), atol=1e-4)


@pytest.mark.parametrize("correlated", [False, True])
def test_a_start_has_the_moments_of_its_groups(correlated: bool, rng: np.random.Generator) -> None:
    z, label = rings(rng)
    known = np.where(np.arange(400) < 40, label, UNKNOWN)
    begun = mixture_start(z, 2, correlated=correlated, labels=known, settings=StartSettings(neighbours=10))
    for k in (0, 1):
        covariance = np.cov(z[label == k].T, bias=True) + 1e-3 * z.var() * np.eye(2)
        wanted = covariance if correlated else np.diag(np.diag(covariance))
        assert_allclose((begun.root[k] @ begun.root[k].T).numpy(), wanted, rtol=1e-4, atol=1e-5)
        assert_allclose(begun.loc[k].numpy(), z[label == k].mean(0), atol=1e-5)
    # A cluster that nobody has labelled is not reached by any label: EM finds it.
    partly = np.where(known == 1, UNKNOWN, known)
    assert mixture_start(z, 2, labels=partly, settings=StartSettings(neighbours=10)).loc.shape == (2, 2)


def test_a_number_of_neighbours_below_none_is_refused() -> None:
    with pytest.raises(InputError, match="Expected neighbours of 0 or more; got -1"):
        StartSettings(neighbours=-1)


def test_the_surest_cells_are_taught_the_label_that_reached_them(rng: np.random.Generator) -> None:
    z, label = rings(rng)
    known = np.where(np.arange(400) < 20, label, UNKNOWN)
    cells = Profiles(torch.from_numpy(z).float(), labels=torch.from_numpy(known))
    for sure in (0.0, 0.5, 1.0):
        start = StartSettings(neighbours=10, sure=sure)
        begun = Started(cells, None, z, Encoder(), TRAINING, start)
        taught = begun._taught(2).labels.numpy()
        assert (taught[:20] == label[:20]).all() and (taught[taught != UNKNOWN] == label[taught != UNKNOWN]).all()
        assert_allclose((taught != UNKNOWN).sum(), 20 + sure * 380, atol=1)
