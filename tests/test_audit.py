"""The audit of direction: its sums and leave-one-outs by brute force, and what it says where the truth was turned."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import combinations
from types import SimpleNamespace

import numpy as np
import pytest
from anndata import AnnData
from matplotlib.figure import Figure
from numpy.testing import assert_allclose, assert_array_equal
from scipy import sparse
from scipy.sparse.csgraph import connected_components
from scipy.spatial import cKDTree
from small import GUIDE, MODEL, settings

import pyro_velo as pv
from pyro_velo import metrics, simulate
from pyro_velo.auditing import audit
from pyro_velo.audits import MAJORITY, MARGIN, Audit
from pyro_velo.contributions import (
    Agreement,
    Leaver,
    blocks,
    bootstrap,
    boundary,
    connectivity,
    contributions,
    discoveries,
    flow_without_each,
)
from pyro_velo.embedding import in_units_of_range, neighbourhoods
from pyro_velo.errors import InputError
from pyro_velo.plots.audit import edge_directions, gene_contributions
from pyro_velo.train import TrainSettings

CELLS, GENES, PLANTED = 200, 20, 4
STAGES = ("a", "b", "c", "d")


def graph_of(x: np.ndarray, k: int = 10) -> sparse.csr_matrix:
    _, index = cKDTree(x).query(x, k=k + 1)
    rows = np.repeat(np.arange(len(x)), k)
    return sparse.csr_matrix((np.ones(len(rows)), (rows, index[:, 1:].ravel())), shape=(len(x), len(x)))


@dataclass
class Field:
    """Random velocities on a random graph, some cells at rest, two cells in one place."""

    rng: np.random.Generator
    n: int = 60
    g: int = 7
    x: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.x, self.v = self.rng.normal(size=(2, self.n, self.g))
        self.labels = self.rng.choice(["A", "B"], self.n)
        self.graph = sparse.csr_matrix(graph_of(self.x, 8) + sparse.eye(self.n))
        self.border = boundary(self.x, self.graph, self.labels, "A", "B")
        first = self.border.cells[0]
        self.v[first] = 0
        there = next(j for j in self.graph[self.border.cells[1]].indices if self.labels[j] == "B")
        self.x[there] = self.x[self.border.cells[1]]
        self.border = boundary(self.x, self.graph, self.labels, "A", "B")

    def cbdir(self, genes: np.ndarray) -> float:
        v, x, edges = self.v[:, genes], self.x[:, genes], [("A", "B")]
        return metrics.cross_boundary_direction(v, x, self.graph, self.labels, edges).mean


@pytest.fixture
def some(rng: np.random.Generator) -> Field:
    return Field(rng)


# Sums and leave-one-outs, by brute force


def test_contributions_sum_to_the_direction_of_the_edge(some: Field) -> None:
    found = contributions(some.v[some.border.cells], some.border.toward())
    assert found.sum() == pytest.approx(some.cbdir(np.arange(some.g)), abs=1e-14)
    assert some.border.weights.sum() == pytest.approx(1, abs=1e-14)
    # Each one's share, by the definition.
    g, total = 2, 0.0
    for i in some.border.cells:
        near = [j for j in some.graph[i].indices if some.labels[j] == "B"]
        for j in near:
            length = np.linalg.norm(some.v[i]) * np.linalg.norm(some.x[j] - some.x[i])
            total += some.v[i, g] * (some.x[j, g] - some.x[i, g]) / length / len(near) if length > 0 else 0
    assert found[g] == pytest.approx(total / len(some.border.cells), abs=1e-14)


def test_leaving_a_gene_out_is_scoring_the_others_alone(some: Field) -> None:
    found = Leaver(some.border)(some.v[some.border.cells])
    expected = [some.cbdir(np.delete(np.arange(some.g), gene)) for gene in range(some.g)]
    assert_allclose(found, expected, atol=1e-13)


def test_nothing_is_left_without_the_only_gene_that_moves(some: Field) -> None:
    some.v[:, np.arange(some.g) != 3] = 0
    found = Leaver(some.border)(some.v[some.border.cells])
    assert found[3] == 0
    assert_allclose(np.delete(found, 3), [some.cbdir(np.delete(np.arange(some.g), k)) for k in (0, 1, 2, 4, 5, 6)])


def test_parts_of_a_boundary_sum_to_the_whole(some: Field, rng: np.random.Generator) -> None:
    sums = np.zeros((2, some.g))
    for cells in np.array_split(rng.permutation(some.n), 9):
        part, places = some.border.among(cells)
        v = some.v[cells][places]
        sums += [contributions(v, part.toward()), Leaver(part)(v) if len(v) else np.zeros(some.g)]
    whole = some.v[some.border.cells]
    assert_allclose(sums, [contributions(whole, some.border.toward()), Leaver(some.border)(whole)], atol=1e-13)


def test_the_flow_without_a_gene_is_that_of_the_others(some: Field) -> None:
    found = flow_without_each(some.v, some.x, some.graph, scale=3.0)
    near = neighbourhoods(some.graph)
    for gene in (0, 4):
        others = np.delete(np.arange(some.g), gene)
        for i in range(0, some.n, 7):
            steps = some.x[near[i].indices] - some.x[i]
            lengths = np.linalg.norm(steps[:, others], axis=1) * np.linalg.norm(some.v[i, others])
            cosine = steps[:, others] @ some.v[i, others] / np.where(lengths > 0, lengths, 1)
            weight = np.exp(3.0 * cosine)
            expected = (weight / weight.sum() - 1 / len(steps)) @ steps[:, gene]
            assert found[i, gene] == pytest.approx(expected, abs=1e-13)
    other = some.v.copy()
    other[:, 4] = -7 * other[::-1, 4]
    assert_allclose(flow_without_each(other, some.x, some.graph, scale=3.0)[:, 4], found[:, 4], atol=1e-10)


def test_connectivity_is_the_edges_that_are_there_by_those_expected(rng: np.random.Generator) -> None:
    graph, labels = graph_of(rng.normal(size=(90, 2)), 6), np.repeat(["x", "y", "z"], (20, 30, 40))
    names, share = connectivity(graph, labels)
    assert names == ["x", "y", "z"]
    edges = list(zip(*graph.nonzero(), strict=True))
    for a, b in combinations(range(3), 2):
        across = sum({labels[i], labels[j]} == {names[a], names[b]} for i, j in edges)
        leaving, size = ([count(names[k]) for k in (a, b)] for count in (
            lambda name: sum(labels[i] == name for i, _ in edges), lambda name: int((labels == name).sum())
        ))  # fmt: skip
        expected = (leaving[0] * size[1] + leaving[1] * size[0]) / (len(labels) - 1)
        assert share[a, b] == share[b, a] == pytest.approx(min(1, across / expected))
    apart = sparse.block_diag([graph_of(rng.normal(size=(20, 2)), 5)] * 2)
    assert_array_equal(connectivity(apart, np.repeat(["x", "y"], 20))[1], np.zeros((2, 2)))
    # Labels that have nothing to do with the graph: as many as expected, but for chance.
    assert connectivity(graph_of(rng.normal(size=(600, 2)), 10), rng.choice(["x", "y"], 600))[1][0, 1] > 0.95


def test_agreement_is_one_along_the_flow_and_minus_one_against_it(rng: np.random.Generator) -> None:
    change, weights = rng.normal(size=(50, 4)), rng.exponential(size=(3, 50))
    velocity = change * [2.0, -0.5, 0.0, 1.0]
    velocity[:, 3] = rng.normal(size=50)
    found = Agreement(change, weights)
    for cells in np.array_split(rng.permutation(50), 4):
        for draw in range(3):
            found.add(draw, cells, velocity[cells])
    score = found.score()
    assert_allclose(score[:, :3], np.tile([1.0, -1.0, 0.0], (3, 1)), atol=1e-14)
    v, d = velocity[:, 3], change[:, 3]
    assert_allclose(score[:, 3], [(w * v * d).sum() / np.sqrt((w * v * v).sum() * (w * d * d).sum()) for w in weights])


def test_blocks_are_of_neighbours_and_weigh_alike(rng: np.random.Generator) -> None:
    x = np.concatenate([rng.normal(size=(150, 2)), 100 + rng.normal(size=(50, 2))])
    graph = graph_of(x, 9)
    block = blocks(graph, rng)
    assert abs(block.max() + 1 - 20) <= 1
    _, component = connected_components(graph, directed=False)
    for number in range(block.max() + 1):
        inside = block == number
        assert len(set(component[inside])) == 1
        assert connected_components(graph[inside][:, inside], directed=False)[0] == 1
    weights = bootstrap(4000, graph, seed=1)
    for cells in (np.flatnonzero(block == block[0]), [199]):
        assert_allclose(weights[:, cells].mean(), 1, atol=0.1)
    assert len(np.unique(weights[0])) == len(np.unique(weights[1])) <= 21
    lonely = blocks(sparse.csr_matrix((5, 5)), rng)
    assert sorted(lonely) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("rate", [0.02, 0.1, 0.3])
def test_no_larger_set_keeps_the_rate_of_false_discoveries(rate: float, rng: np.random.Generator) -> None:
    probability = rng.beta(2, 0.4, 8)
    called = discoveries(probability, rate)
    assert not called.any() or (1 - probability[called]).mean() <= rate
    larger = combinations(range(8), int(called.sum()) + 1)
    assert called.all() or min((1 - probability[list(genes)]).mean() for genes in larger) > rate


# The audit, on draws that are known


@dataclass
class Known:
    """A fit whose draws (draws, cells, genes) are given, streamed some cells at a time."""

    adata: AnnData
    drawn: np.ndarray
    batch: int = 64

    def __post_init__(self) -> None:
        self.data = pv.velocity_data(self.adata, as_is=True)
        self.fitted = SimpleNamespace(training=SimpleNamespace(settings=TrainSettings(seed=0)))

    def velocities(self, receive, *, draws: int, over_states: str) -> None:
        assert draws == len(self.drawn) and over_states == "expected"
        for start in range(0, self.adata.n_obs, self.batch):
            cells = np.arange(start, min(start + self.batch, self.adata.n_obs))
            receive(cells, self.drawn[:, cells])


def cells_in_time(lineages: int = 1, seed: int = 0, level: float = 0.05) -> tuple[AnnData, np.ndarray]:
    """Simulated cells with a graph and four stages of time, and the planted genes."""
    parts = {"noise": simulate.Normal(level), "lineages": simulate.Lineages(lineages)}
    recipe = simulate.Settings(kinetics=simulate.LogNormalRates(drop=0), **parts)
    simulation = simulate.simulate(CELLS, GENES, settings=recipe, seed=seed)
    adata = pv.to_anndata(simulation)
    s = simulation.spliced
    adata.obsp["distances"] = graph_of(s / np.ptp(s, axis=0))
    adata.obs["stage"] = np.array(STAGES)[np.minimum(simulation.true_t // 5, 3).astype(int)]
    return adata, np.random.default_rng(seed).choice(GENES, PLANTED, replace=False)


def about(velocity: np.ndarray, draws: int = 40, spread: float = 0.1) -> np.ndarray:
    """Draws (draws, cells, genes) about a velocity: rates that are uncertain scale a gene's velocities."""
    scales = np.exp(spread * np.random.default_rng(1).standard_normal((draws, 1, velocity.shape[1])))
    return (scales * velocity).astype(np.float32)


def true_velocity(adata: AnnData, turned: np.ndarray) -> np.ndarray:
    velocity = adata.layers["true_velocity"].astype(np.float64)
    velocity[:, turned] *= -1
    return velocity


def score(adata: AnnData, v: np.ndarray, x: np.ndarray, edge: str) -> float:
    """CBDir of one edge by `metrics`."""
    edges = [tuple(edge.split(">"))]
    return metrics.cross_boundary_direction(v, x, adata.obsp["distances"], adata.obs["stage"], edges).mean


def audited(adata: AnnData, velocity: np.ndarray, edges=None, **others) -> Audit:
    drawn = velocity if velocity.ndim == 3 else about(velocity)
    fit = Known(adata, drawn, **others)
    return audit(fit, adata, "stage", edges, draws=len(drawn))


def test_genes_that_were_turned_are_named() -> None:
    hits = calls = 0
    for lineages, seed in ((1, 0), (1, 1), (2, 0), (2, 1)):
        adata, planted = cells_in_time(lineages, seed)
        found = audited(adata, true_velocity(adata, planted))
        hits += int(found.reversed[planted].sum())
        calls += int(found.reversed.sum())
        assert found.expected_fdr <= found.fdr
        assert set(found.reversed_genes) == {found.genes[g] for g in np.flatnonzero(found.reversed)}
        assert (found.agreement[planted] < -MARGIN).all()
    assert hits >= 0.8 * 4 * PLANTED and hits >= 0.8 * calls


def test_nothing_is_named_where_all_genes_agree_or_stand_still() -> None:
    adata, _ = cells_in_time()
    assert not audited(adata, true_velocity(adata, np.array([], int))).reversed.any()
    still = audited(adata, np.zeros(adata.shape))
    assert not still.reversed.any() and (still.agreement == 0).all() and np.isnan(still.consensus)
    assert {(edge.mean, edge.p_backward, edge.p_direction) for edge in still.edges} == {(0.0, 0.0, 0.5)}


def test_nothing_is_named_where_there_is_no_majority_to_judge_by(rng: np.random.Generator) -> None:
    adata, _ = cells_in_time()
    half = rng.choice(GENES, GENES // 2, replace=False)
    found = audited(adata, true_velocity(adata, half))
    assert discoveries(found.p_reversed, found.fdr).any()
    assert not found.reversed.any() and found.consensus < MAJORITY
    assert f"(consensus {found.consensus:.2f}, at least 0.67)" in found.table()


def test_edges_of_the_graph_are_found_in_the_order_of_time_and_against_it_if_all_is_turned() -> None:
    adata, _ = cells_in_time(level=0.02)
    velocity = true_velocity(adata, np.array([], int))
    ahead, back = audited(adata, velocity), audited(adata, -velocity)
    names = [edge.name for edge in ahead.edges]
    assert {"a>b", "b>c"} <= set(names)
    assert {edge.name for edge in back.edges} == {name[::-1] for name in names}
    for edge in ahead.edges:
        assert edge.p_direction == 1
    given = audited(adata, -velocity, [("a", "b"), ("b", "c")])
    for edge in given.edges:
        same = next(other for other in ahead.edges if other.name == edge.name)
        assert_allclose(edge.cbdir, -same.cbdir, atol=1e-12)
        assert (edge.p_backward, edge.p_direction, same.p_backward, same.p_direction) == (1, 0, 0, 1)


def test_the_probability_is_the_share_of_draws_and_batches_do_not_matter() -> None:
    adata, planted = cells_in_time(2)
    drawn = about(true_velocity(adata, planted), draws=10)
    drawn[:3] *= -1
    edges = [("a", "b"), ("b", "c")]
    found, other = audited(adata, drawn, edges), audited(adata, drawn, edges, batch=CELLS)
    span = np.ptp(adata.layers["spliced"].astype(np.float64), axis=0)
    x = adata.layers["spliced"] / span
    for edge, same in zip(found.edges, other.edges, strict=True):
        expected = [score(adata, v / span, x, edge.name) for v in drawn.astype(np.float64)]
        assert_allclose(edge.cbdir, expected, atol=1e-7)
        for gene in (0, 7):
            others = np.arange(GENES) != gene
            left = [score(adata, (v / span)[:, others], x[:, others], edge.name) for v in drawn.astype(np.float64)]
            assert edge.influence[gene] == pytest.approx(np.mean(expected) - np.mean(left), abs=1e-7)
        assert edge.p_backward == pytest.approx(0.3)
        assert edge.contribution.sum() == pytest.approx(edge.mean, abs=1e-12)
        for name in ("cbdir", "influence", "p_negative", "without"):
            assert_allclose(getattr(edge, name), getattr(same, name), atol=1e-12)
    assert_allclose(found.agreement, other.agreement, atol=1e-12)


def test_the_genes_responsible_are_just_enough_to_turn_the_edge() -> None:
    adata, _ = cells_in_time()
    # The genes that go the furthest from a to b, turned.
    forward = audited(adata, true_velocity(adata, np.array([], int)), [("a", "b")]).edges[0]
    turned = np.argsort(-forward.contribution)[:6]
    velocity = true_velocity(adata, turned)
    (edge,) = audited(adata, velocity, [("a", "b")]).edges
    assert edge.p_backward == 1 and edge.responsible == edge.opposing[: len(edge.responsible)]
    names = adata.var_names
    assert set(edge.responsible) <= set(names[turned])
    mean, x = in_units_of_range(about(velocity).mean(axis=0, dtype=np.float64), adata.layers["spliced"])

    def without(genes) -> float:
        kept = ~names.isin(genes)
        return score(adata, mean[:, kept], x[:, kept], "a>b")

    assert without(edge.responsible[:-1]) <= 0 < without(edge.responsible)
    assert edge.without.mean() == pytest.approx(without(edge.responsible), abs=0.02)
    # An edge that runs forwards needs no excuse.
    assert forward.responsible == ()
    assert_allclose(forward.without, forward.cbdir, atol=1e-12)


def test_without_the_reversed_genes_the_edge_is_that_of_the_others() -> None:
    adata, planted = cells_in_time()
    velocity = true_velocity(adata, planted)
    found = audited(adata, velocity, [("a", "b")])
    others = ~found.reversed
    mean, x = in_units_of_range(about(velocity).mean(axis=0, dtype=np.float64), adata.layers["spliced"])
    expected = score(adata, mean[:, others], x[:, others], "a>b")
    assert found.edges[0].without_reversed == pytest.approx(expected, abs=1e-12)
    assert expected > found.edges[0].mean


# What is said and drawn


@pytest.fixture(scope="module")
def found() -> Audit:
    adata, planted = cells_in_time()
    adata.var_names = [f"g|{g}" for g in range(GENES)]
    return audited(adata, true_velocity(adata, planted), [("b", "a"), ("b", "c")])


def test_the_tables_have_a_row_an_edge_and_a_row_a_reversed_gene(found: Audit) -> None:
    lines = str(found).splitlines()
    rows = [line.replace("\\|", "").split("|")[1:-1] for line in lines if line.startswith("|") and "---" not in line]
    assert {len(row) for row in rows} == {8, 3}
    assert [row[0].strip() for row in rows if len(row) == 8] == ["edge", "b>a", "b>c"]
    named = [row[0].strip() for row in rows if len(row) == 3][1:]
    assert named == [name.replace("|", "") for name in found.reversed_genes] and len(named) == PLANTED
    assert f"{found.edges[0].mean:.3f} [" in found.table() and "| 1.00 |" in found.table()
    frame = found.by_gene()
    assert_allclose(frame[["b>a", "b>c"]].sum(), [edge.mean for edge in found.edges], atol=1e-12)
    assert frame.index[frame["reversed"]].isin(found.reversed_genes).all()


def test_what_is_drawn_is_what_was_found(found: Audit) -> None:
    left, right = Figure().subplots(1, 2)
    assert found.plot(n_genes=6, axes=(left, right)) == (left, right)
    assert [line.get_xdata()[0] for line in left.lines if line.get_marker() == "o"] == [e.mean for e in found.edges]
    assert [text.get_text() for text in left.texts[:2]] == ["1.00", "0.00"]
    widths = [bar.get_width() for bar in right.patches]
    backward = found.edges[0].contribution
    assert widths == sorted(widths) and set(widths) == set(sorted(backward, key=abs)[-6:])
    _, chosen = found.plot("b>c", n_genes=GENES)
    assert sum(bar.get_width() for bar in chosen.patches) == pytest.approx(found.edges[1].mean)


def test_bad_input_is_refused(found: Audit) -> None:
    adata, _ = cells_in_time()
    fit = Known(adata, about(true_velocity(adata, np.array([], int))))
    for edges, complaint in (
        ([("a", "z")], r"'z' isn't there, expected one of: 'a', 'b'"),
        ([("a", "a")], r"two clusters; got a>a"),
        ([], r"one edge or more; got none"),
    ):
        with pytest.raises(InputError, match=complaint):
            audit(fit, adata, "stage", edges)
    with pytest.raises(InputError, match=r"fdr between 0 and 1; got 1"):
        audit(fit, adata, "stage", fdr=1)
    with pytest.raises(InputError, match=r"Expected the genes that were fitted"):
        audit(fit, adata[:, ::-1].copy(), "stage")
    with pytest.raises(InputError, match=r"finite velocities.*'gene_3'"):
        audited(adata, np.where(np.arange(GENES) == 3, np.nan, fit.drawn), [("a", "b")])
    apart = adata.copy()
    stage = adata.obs["stage"].to_numpy()
    pairs = adata.obsp["distances"].tocoo()
    kept = (stage[pairs.row] != "a") | (stage[pairs.col] != "b")
    apart.obsp["distances"] = sparse.csr_matrix((pairs.data[kept], (pairs.row[kept], pairs.col[kept])), pairs.shape)
    with pytest.raises(InputError, match=r"cells of 'a' that border on 'b'; got none"):
        audit(Known(apart, fit.drawn), apart, "stage", [("a", "b")])
    # The other way round there are some, and nothing to compare them with.
    (edge,) = audit(Known(apart, fit.drawn), apart, "stage", [("b", "a")], draws=40).edges
    assert edge.p_backward == 1 and edge.p_direction == 0
    del apart.obsp["distances"]
    with pytest.raises(InputError, match=r"obsp key 'distances' isn't there"):
        audit(fit, apart, "stage")
    with pytest.raises(InputError, match=r"Edge 'c>d' isn't there, expected one of: 'b>a', 'b>c'"):
        found.plot("c>d")
    for draw in (edge_directions, gene_contributions):
        with pytest.raises(InputError, match=r"or more to draw; got none"):
            draw({})


# On fits


def test_a_fit_is_audited_by_its_own_draws_and_nothing_is_written() -> None:
    adata, _ = cells_in_time()
    few = adata[:80].copy()
    few.obsp["distances"] = graph_of(few.layers["spliced"])
    data = pv.velocity_data(few, as_is=True)
    fit = pv.fit(MODEL, GUIDE, few, settings=settings(max_epochs=2), data=data, progress=False)
    keys = {where: set(getattr(few, where).keys()) for where in ("obs", "var", "layers", "obsm", "obsp", "uns")}
    found = audit(fit, few, "stage", [("a", "b")], draws=5)
    assert {where: set(getattr(few, where).keys()) for where in keys} == keys
    drawn = np.empty((5, 80, GENES))

    def keep(cells, velocities) -> None:
        drawn[:, cells] = velocities

    fit.velocities(keep, draws=5, over_states="expected")
    for cbdir, velocity in zip(found.edges[0].cbdir, drawn, strict=True):
        v, x = in_units_of_range(velocity, few.layers["spliced"])
        assert cbdir == pytest.approx(score(few, v, x, "a>b"), abs=1e-7)


def reflected(adata: AnnData, genes: np.ndarray) -> AnnData:
    r"""The same cells, with some genes' unspliced counts as if time ran backwards.

    In a film run backwards ds/dt changes its sign while s stays. The unspliced $u'$ of which that is so has
    $\beta u' - \gamma s = -(\beta u - \gamma s)$: it is u reflected about the steady-state line,
    $u' = 2 (\gamma/\beta) s - u$, where that is not negative, and none where it is.
    """
    turned = adata.copy()
    slope = (adata.var["true_gamma"] / adata.var["true_beta"]).to_numpy()[genes]
    u, s = (adata.layers[name][:, genes] for name in ("unspliced", "spliced"))
    turned.layers["unspliced"][:, genes] = np.clip(2 * slope * s - u, 0, None)
    return turned


def test_reflection_turns_the_velocity_of_noise_free_cells() -> None:
    adata, planted = cells_in_time(level=0.0)
    turned = reflected(adata, planted)
    beta, gamma = (adata.var[name].to_numpy() for name in ("true_beta", "true_gamma"))
    before, after = (beta * each.layers["unspliced"] - gamma * each.layers["spliced"] for each in (adata, turned))
    free = turned.layers["unspliced"][:, planted] > 0
    assert free.mean() > 0.4
    assert_allclose(after[:, planted][free], -before[:, planted][free], atol=1e-4)
    # Where it is clipped, the cell was rising, and is now seen falling or at rest.
    assert (before[:, planted][~free] > -1e-4).all() and (after[:, planted][~free] <= 0).all()
    others = np.setdiff1d(np.arange(GENES), planted)
    assert_array_equal(after[:, others], before[:, others])


@pytest.mark.slow
def test_genes_that_a_fit_sees_running_backwards_are_named() -> None:
    adata, planted = cells_in_time()
    turned = reflected(adata, planted)
    data, steps = pv.velocity_data(turned, as_is=True), TrainSettings(max_steps=400, batch_size=100)
    fit = pv.fit(None, None, turned, seed=0, settings=steps, data=data, progress=False)
    found = audit(fit, turned, "stage", draws=50)
    hits = found.reversed[planted].sum()
    assert hits >= 0.8 * PLANTED and hits >= 0.8 * found.reversed.sum()
