"""Scores of clusters against labels: what they are counted from, and what they do not depend on."""

from __future__ import annotations

from itertools import combinations, permutations

import numpy as np
import pytest
from numpy.testing import assert_allclose

from pyro_velo.agreement import agreement, contingency, silhouette
from pyro_velo.errors import InputError

LABELS = np.repeat(["a", "b", "c"], [5, 4, 3])


@pytest.fixture
def clusters(rng: np.random.Generator) -> np.ndarray:
    """Those labels, four of them wrong."""
    found = np.unique(LABELS, return_inverse=True)[1]
    found[[0, 5, 6, 11]] = [2, 0, 2, 1]
    return found


def test_the_rand_index_is_that_of_pairs_and_takes_away_what_chance_gives(clusters: np.ndarray) -> None:
    def rand(other) -> float:
        pairs = list(combinations(range(len(LABELS)), 2))
        return float(np.mean([(LABELS[i] == LABELS[j]) == (other[i] == other[j]) for i, j in pairs]))

    shuffles = [np.random.default_rng(seed).permutation(clusters) for seed in range(3000)]
    chance = np.mean([rand(shuffled) for shuffled in shuffles[:500]])
    assert_allclose(agreement(LABELS, clusters).ari, (rand(clusters) - chance) / (1 - chance), atol=0.02)
    assert abs(np.mean([agreement(LABELS, shuffled).ari for shuffled in shuffles])) < 0.01


def test_accuracy_is_the_best_of_all_namings(clusters: np.ndarray) -> None:
    right = [np.mean(np.array(names)[clusters] == LABELS) for names in permutations("abc")]
    assert_allclose(agreement(LABELS, clusters).accuracy, max(right))
    # With more clusters than labels some cells are in none that has a name; purity counts them.
    alone = np.arange(12)
    assert_allclose(agreement(LABELS, alone).accuracy, 3 / 12)
    assert agreement(LABELS, alone).purity == 1


def test_mutual_information_is_that_of_the_entropies(clusters: np.ndarray) -> None:
    def entropy(*columns) -> float:
        _, counts = np.unique(np.array([list(map(str, column)) for column in columns]).T, axis=0, return_counts=True)
        p = counts / counts.sum()
        return float(-(p * np.log(p)).sum())

    shared = entropy(LABELS) + entropy(clusters) - entropy(LABELS, clusters)
    assert_allclose(agreement(LABELS, clusters).nmi, 2 * shared / (entropy(LABELS) + entropy(clusters)))


def test_names_are_no_part_of_it_and_both_sides_are_alike(clusters: np.ndarray) -> None:
    renamed = np.array(["z", "x", "y"])[clusters]
    assert_allclose(agreement(LABELS, renamed), agreement(LABELS, clusters))
    one, other = agreement(LABELS, clusters), agreement(clusters, LABELS)
    assert_allclose((one.ari, one.nmi), (other.ari, other.nmi))
    assert contingency(LABELS, clusters).sum() == len(LABELS)


def test_groups_that_say_nothing() -> None:
    one = np.zeros(12)
    assert agreement(one, one) == (1, 1, 1, 1)
    assert agreement(LABELS, one)[:2] == (0, 0)
    assert_allclose(agreement(np.arange(12), np.arange(12)), 1)


def test_the_silhouette_is_that_of_distances(rng: np.random.Generator, clusters: np.ndarray) -> None:
    x = rng.normal(size=(12, 2)) + 3 * clusters[:, None]
    each = []
    for i in range(12):
        gap = np.linalg.norm(x - x[i], axis=1)
        mean = {k: gap[(clusters == k) & (np.arange(12) != i)].mean() for k in range(3)}
        a, b = mean.pop(clusters[i]), min(mean.values())
        each.append((b - a) / max(a, b))
    assert_allclose(silhouette(x, clusters), np.mean(each))


def test_what_can_not_be_scored_is_refused() -> None:
    for labels in ([], [[1]], [1, 2, 3]):
        with pytest.raises(InputError, match="Expected a label and a cluster a cell"):
            agreement(labels, [1, 2])
    with pytest.raises(InputError, match="Expected 2 clusters or more"):
        silhouette(np.ones((3, 2)), [1, 1, 1])
