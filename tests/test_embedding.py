"""Laws of the projection: fields that are known come back, and what must not matter doesn't."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pytest
from scipy import sparse
from scipy.spatial import cKDTree

from pyro_velo import embedding
from pyro_velo.errors import InputError


def graph_of(x: np.ndarray, k: int = 15) -> sparse.csr_matrix:
    """The k nearest neighbours of each point, as a 0/1 csr."""
    _, index = cKDTree(x).query(x, k=k + 1)
    rows = np.repeat(np.arange(len(x)), k)
    return sparse.csr_matrix((np.ones(len(rows)), (rows, index[:, 1:].ravel())), shape=(len(x), len(x)))


def disc(rng: np.random.Generator, n: int = 1500) -> np.ndarray:
    radius, angle = np.sqrt(rng.uniform(0, 1, n)), rng.uniform(0, 2 * np.pi, n)
    return np.column_stack([radius * np.cos(angle), radius * np.sin(angle)])


def lifted(rng: np.random.Generator, plane: np.ndarray, genes: int = 12) -> np.ndarray:
    """Rows of the plane in a space of genes, by an isometry that leaves the mean over genes at zero."""
    basis = rng.normal(size=(2, genes))
    basis -= basis.mean(1, keepdims=True)
    return plane @ np.linalg.qr(basis.T)[0].T


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)


FIELDS = {
    "rotation": lambda x: np.column_stack([-x[:, 1], x[:, 0]]),
    "outwards": lambda x: x,
    "shear": lambda x: np.column_stack([1 + 0 * x[:, 1], 0.5 * x[:, 0]]),
}


@pytest.mark.parametrize("field", FIELDS.values(), ids=FIELDS.keys())
def test_a_field_projected_on_its_own_coordinates_comes_back(field, rng: np.random.Generator) -> None:
    x = disc(rng)
    v, inner = field(x), np.linalg.norm(x, axis=1).round(6) < 0.8
    inner &= np.linalg.norm(v, axis=1) > 0.1
    space = lifted(np.random.default_rng(1), x), lifted(np.random.default_rng(1), v)
    transitions = embedding.transition_matrix(space[1], space[0], graph_of(x))
    agreement = cosines(embedding.project(transitions, x), v)[inner]
    assert agreement.min() > 0.9 and np.median(agreement) > 0.99


def test_a_reversed_field_gives_reversed_arrows(rng: np.random.Generator) -> None:
    x, v, graph = rng.normal(size=(300, 8)), rng.normal(size=(300, 8)), graph_of(rng.normal(size=(300, 2)))
    there, back = (embedding.cosine_correlations(sign * v, x, graph) for sign in (1, -1))
    np.testing.assert_allclose(there.toarray(), -back.toarray(), atol=1e-12)


def test_cosine_correlations_equal_pearson_by_brute_force(rng: np.random.Generator) -> None:
    x, v = rng.normal(size=(40, 9)), rng.normal(size=(40, 9))
    graph = graph_of(rng.normal(size=(40, 2)), 4)
    reach = ((graph + graph @ graph).toarray() > 0) & ~np.eye(40, dtype=bool)
    found = embedding.cosine_correlations(v, x, graph).toarray()
    assert ((found != 0) == reach).all()
    for i, j in np.argwhere(reach):
        np.testing.assert_allclose(found[i, j], np.corrcoef(x[j] - x[i], v[i])[0, 1], atol=1e-12)


def test_neighbourhoods_reach_as_far_as_their_steps() -> None:
    chain = sparse.diags([np.ones(9)], [1], shape=(10, 10))
    for steps in (1, 2, 3):
        expected = sum(np.eye(10, k=k) for k in range(1, steps + 1)) > 0
        np.testing.assert_array_equal(embedding.neighbourhoods(chain, steps).toarray(), expected)


def test_transitions_equal_their_formula(rng: np.random.Generator) -> None:
    x, v, graph = rng.normal(size=(60, 7)), rng.normal(size=(60, 7)), graph_of(rng.normal(size=(60, 2)), 5)
    c = embedding.cosine_correlations(v, x, graph).toarray()
    best = np.maximum(c.max(1), 0)
    for signed in (True, False):
        weights = np.sign(c) * np.expm1(10 * np.abs(c))
        if not signed:
            weights = np.where(c < 0, np.exp(10 * c), weights)
        weights += np.diag(np.expm1(10 * np.clip(np.percentile(best, 98) - best, 0, 1)))
        expected = weights / np.abs(weights).sum(1, keepdims=True)
        found = embedding.transition_matrix(v, x, graph, signed=signed)
        np.testing.assert_allclose(found.toarray(), expected, atol=1e-12)
        np.testing.assert_allclose(np.asarray(abs(found).sum(1)).ravel(), 1, rtol=1e-12)
    assert found.data.min() >= 0


def test_projection_equals_its_formula(rng: np.random.Generator) -> None:
    x = rng.normal(size=(30, 2))
    t = sparse.random(30, 30, 0.3, random_state=1, format="csr")
    expected = np.zeros((30, 2))
    for i in range(30):
        near = [j for j in range(30) if j != i and t[i, j] != 0]
        for j in near:
            step = (x[j] - x[i]) / np.linalg.norm(x[j] - x[i])
            expected[i] += (t[i, j] - np.mean([t[i, k] for k in near])) * step
    np.testing.assert_allclose(embedding.project(t, x), expected, atol=1e-12)


def test_equal_transitions_point_nowhere(rng: np.random.Generator) -> None:
    x = rng.normal(size=(200, 2))
    graph = graph_of(x)
    np.testing.assert_allclose(embedding.project(graph / 15, x), 0, atol=1e-12)


def test_scale_shift_and_genes_without_velocity_do_not_matter(rng: np.random.Generator) -> None:
    x, v, graph = rng.normal(size=(80, 6)), rng.normal(size=(80, 6)), graph_of(rng.normal(size=(80, 2)), 6)
    plain = embedding.transition_matrix(v, x, graph).toarray()
    speeds, shift = rng.uniform(0.1, 9, (80, 1)), rng.normal(size=6)
    np.testing.assert_allclose(
        embedding.transition_matrix(speeds * v, 3 * x + shift, graph).toarray(), plain, atol=1e-10
    )
    longer = np.column_stack([v, np.full(80, np.nan)]), np.column_stack([x, rng.normal(size=80)])
    np.testing.assert_allclose(embedding.transition_matrix(*longer, graph).toarray(), plain, atol=1e-12)
    order = rng.permutation(80)
    permuted = embedding.transition_matrix(v[order], x[order], graph[order][:, order]).toarray()
    np.testing.assert_allclose(permuted, plain[order][:, order], atol=1e-12)


def test_a_cell_that_rests_gets_no_arrow_and_twins_no_nan(rng: np.random.Generator) -> None:
    x, v = rng.normal(size=(50, 5)), rng.normal(size=(50, 5))
    positions = rng.normal(size=(50, 2))
    v[7], x[9], positions[9] = 0, x[8], positions[8]
    transitions = embedding.transition_matrix(v, x, graph_of(positions, 6))
    arrows = embedding.project(transitions, positions)
    assert np.isfinite(transitions.data).all() and np.isfinite(arrows).all()
    assert (arrows[7] == 0).all() and transitions[7, 7] == 1


def test_units_of_range_take_abundance_away(rng: np.random.Generator) -> None:
    x, v, units = rng.gamma(2, size=(40, 5)), rng.normal(size=(40, 5)), np.array([1e-3, 1, 10, 1e4, 7])
    scaled = embedding.in_units_of_range(v, x)
    for a, b in zip(scaled, embedding.in_units_of_range(v * units, x * units), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(np.ptp(scaled[1], axis=0), 1)
    x[:, 2] = 4.0
    v, x = embedding.in_units_of_range(v, x)
    assert np.isnan(v[:, 2]).all() and np.isfinite(np.delete(v, 2, axis=1)).all() and np.isfinite(x).all()


def test_the_grid_of_a_linear_field_is_that_field(rng: np.random.Generator) -> None:
    x = disc(rng, 4000)
    matrix = np.array([[0.3, -1.0], [0.8, 0.2]])
    found = embedding.grid(x, x @ matrix.T, size=30)
    nodes = np.stack(np.meshgrid(found.x, found.y), axis=-1)
    inner = np.linalg.norm(nodes, axis=-1) < 0.8
    expected = (nodes @ matrix.T)[inner]
    np.testing.assert_allclose(np.column_stack([found.u[inner], found.v[inner]]), expected, atol=0.08)
    assert np.isnan(found.u[0, 0]) and np.isnan(found.v[-1, -1])


def test_the_grid_of_a_constant_field_is_constant_and_streamplot_takes_float32(rng: np.random.Generator) -> None:
    x = disc(rng, 500).astype(np.float32) * 1e3 + 1e4
    v = np.tile(np.array([2.0, -1.0], dtype=np.float32), (500, 1))
    x[3], v[4] = np.nan, np.nan
    found = embedding.grid(x, v)
    here = np.isfinite(found.u)
    np.testing.assert_allclose(found.u[here], 2, rtol=1e-9)
    np.testing.assert_allclose(found.v[here], -1, rtol=1e-9)
    assert 0.2 < here.mean() < 0.9 and found.x.dtype == found.u.dtype == np.float64
    plt.subplots()[1].streamplot(found.x, found.y, found.u, found.v)


def test_bad_arrays_are_refused(rng: np.random.Generator) -> None:
    v, x, graph = rng.normal(size=(20, 3)), rng.normal(size=(20, 3)), graph_of(rng.normal(size=(20, 2)), 4)
    with pytest.raises(InputError, match=r"one shape.*\(20, 3\) and \(20, 2\)"):
        embedding.transition_matrix(v, x[:, :2], graph)
    with pytest.raises(InputError, match=r"at least one gene with a finite velocity.*none of 3"):
        embedding.transition_matrix(np.where(np.arange(20)[:, None] == 1, np.nan, v), x, graph)
    with pytest.raises(InputError, match=r"finite expression"):
        embedding.transition_matrix(v, np.where(x == x[1, 1], np.inf, x), graph)
    with pytest.raises(InputError, match=r"graph of 20 cells.*got 19"):
        embedding.transition_matrix(v, x, graph[:19, :19])
    with pytest.raises(InputError, match=r"neighbour graph.*\(20, 19\)"):
        embedding.neighbourhoods(graph[:, :19])
    with pytest.raises(InputError, match=r"positions of 20 cells.*\(19, 3\)"):
        embedding.project(graph, x[:19])
    with pytest.raises(InputError, match=r"\(cells, 2\).*\(20, 3\)"):
        embedding.grid(x, v)
    with pytest.raises(InputError, match=r"two cells.*got 0"):
        embedding.grid(np.full((5, 2), np.nan), np.ones((5, 2)))


def test_the_potential_of_a_line_is_its_order() -> None:
    x = np.sort(np.random.default_rng(0).uniform(size=40))
    near = sparse.csr_matrix((np.abs(x[:, None] - x) < 0.2) & ~np.eye(40, dtype=bool))
    rows, cols = near.nonzero()
    ahead = sparse.csr_matrix((x[cols] - x[rows], (rows, cols)), shape=near.shape)
    # Differences of a potential are recovered exactly, and scaled to [0, 1]; turned round, so is time.
    np.testing.assert_allclose(embedding.potential(ahead), (x - x.min()) / np.ptp(x), atol=1e-4)
    np.testing.assert_allclose(embedding.potential(-ahead), (x.max() - x) / np.ptp(x), atol=1e-4)
