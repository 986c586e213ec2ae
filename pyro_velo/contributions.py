r"""Which way cells go between clusters, which genes say so, and which genes run against all others.

All arithmetic is float64. Arrays in, arrays out; velocity and expression are (cells, genes) in units of each gene's
range (see `embedding.in_units_of_range`), one draw at a time; `neighbours` is any sparse (cells, cells) matrix whose
pattern is the graph.

References: Qiao & Huang 2021 (CBDir); Wolf et al. 2019 (PAGA); Bergen et al. 2020 (flow between neighbours).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import sparse
from scipy.sparse.csgraph import dijkstra

from pyro_velo.embedding import neighbourhoods
from pyro_velo.metrics import Graph

Array = NDArray[np.float64]
Index = NDArray[np.int64]
Way = tuple[str, str]

ROUNDING = 1e-12
"""The share of a squared length below which what is left of it, once a gene is taken out, is rounding alone."""


class Boundary(NamedTuple):
    r"""The C cells of a cluster that border on another one, and the P steps $x_j - x_i$ to their neighbours there.

    `cells` (C,) are their numbers; step p starts at `cells[owner[p]]`, and `owner` (P,) rises. `steps` (P, genes).
    `weights` (P,) are those of CBDir, 1 / (C x the steps of the cell), and sum to one.
    """

    cells: Index
    owner: Index
    steps: Array
    weights: Array

    def toward(self, genes: NDArray | slice = slice(None)) -> Array:
        r"""(C, genes) $a_i = \sum_j w_{ij}\,(x_j - x_i) / \|x_j - x_i\|$, so that CBDir is $\sum_i a_i v_i/\|v_i\|$.

        Of some of the genes alone, if given, with the lengths on these.
        """
        return self.summed(self.weights[:, None] * unit(self.steps[:, genes]))

    def summed(self, each: Array) -> Array:
        """Sums over the steps of each cell: (P, ...) to (C, ...)."""
        return np.add.reduceat(each, np.searchsorted(self.owner, np.arange(len(self.cells))), axis=0)

    def among(self, cells: Index) -> tuple[Boundary, Index]:
        """The part of it whose cells are among the `cells` (B,), and where they stand there; weights stay as they are.

        What is summed over cells is the sum over such parts.
        """
        _, own, places = np.intersect1d(self.cells, cells, return_indices=True)
        kept = np.isin(self.owner, own)
        owner = np.searchsorted(own, self.owner[kept])
        return Boundary(self.cells[own], owner, self.steps[kept], self.weights[kept]), places


def boundary(expression: Array, neighbours: Graph, labels: NDArray, source: str, target: str) -> Boundary:
    """The boundary of `source` with `target`; without cells where they do not border on each other.

    Shapes: expression (cells, genes), neighbours sparse (cells, cells), labels (cells,).
    """
    graph = sparse.csr_matrix(neighbours).tocoo()
    across = (labels[graph.row] == source) & (labels[graph.col] == target) & (graph.row != graph.col)
    order = np.lexsort((graph.col[across], graph.row[across]))
    rows, cols = graph.row[across][order].astype(np.int64), graph.col[across][order]
    cells, owner, counts = np.unique(rows, return_inverse=True, return_counts=True)
    return Boundary(cells, owner, expression[cols] - expression[rows], 1 / (len(cells) * counts[owner]))


def unit(vectors: Array) -> Array:
    """Rows of length one; a row without length stays zero."""
    length = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.divide(vectors, length, out=np.zeros_like(vectors), where=length > 0)


def contributions(velocity: Array, toward: Array) -> Array:
    r"""What each gene adds to CBDir, $c_g = \mathrm{mean}_i\,\mathrm{mean}_j\, v_{ig}(x_{jg}-x_{ig})/(|v_i||x_j-x_i|)$.

    They sum to `metrics.cross_boundary_direction` of the edge. Shapes: velocity (C, genes) of the boundary's cells,
    toward (C, genes) of `Boundary.toward`; returns (genes,).
    """
    return np.einsum("cg,cg->g", unit(velocity), toward)


class Leaver:
    r"""CBDir with one gene left out, for every gene at once, exactly: its term is taken from products and lengths.

    $$\cos_{-g} = \frac{v_i \cdot d_{ij} - v_{ig} d_{ijg}}
    {\sqrt{(\|v_i\|^2 - v_{ig}^2)(\|d_{ij}\|^2 - d_{ijg}^2)}}, \qquad d_{ij} = x_j - x_i$$

    What hangs on the steps alone is computed once for all draws: 16 bytes a step and gene.
    """

    def __init__(self, border: Boundary) -> None:
        self.border = border
        self.scaled = border.weights[:, None] * _inverse_lengths(border.steps)
        self.toward = border.summed(self.scaled * border.steps)

    def __call__(self, velocity: Array) -> Array:
        """(genes,) CBDir without each gene; velocity (C, genes) of the boundary's cells."""
        border = self.border
        along = np.einsum("pg,pg->p", velocity[border.owner], border.steps)
        rest = border.summed(along[:, None] * self.scaled) - velocity * self.toward
        return np.einsum("cg,cg->g", rest, _inverse_lengths(velocity))


def enough(velocity: Array, border: Boundary, ranked: NDArray[np.int64]) -> int:
    """How many of the ranked genes must go, the first ones first, until CBDir is positive; all of them if it never is.

    Shapes: velocity (C, genes) of the boundary's cells; ranked (K,) numbers of genes.
    """
    kept = np.ones(velocity.shape[1], bool)
    for count, gene in enumerate(ranked, 1):
        kept[gene] = False
        if contributions(velocity[:, kept], border.toward(kept)).sum() > 0:
            return count
    return len(ranked)


def surely_negative(draws: Array, probability: float) -> Index:
    """The columns of (draws, genes) that are negative on average and in that share of draws, the least mean first."""
    mean = draws.mean(axis=0)
    order = np.argsort(mean, kind="stable")
    return order[(mean[order] < 0) & ((draws < 0).mean(axis=0)[order] >= probability)]


def connectivity(neighbours: Graph, labels: NDArray) -> tuple[list[str], Array]:
    r"""How much more clusters border on each other than if the edges of the graph fell at random: PAGA.

    $$\phi_{ab} = \min\Big(1,\ \frac{\epsilon_{ab} + \epsilon_{ba}}{(\epsilon_a n_b + \epsilon_b n_a) / (n - 1)}\Big)$$

    with $\epsilon_{ab}$ the edges from a to b, $\epsilon_a$ all edges from a, and $n_a$ cells.

    Shapes: neighbours sparse (cells, cells), labels (cells,); returns the K names and (K, K), 0 on the diagonal.
    Reference: Wolf et al. 2019, supplementary note 1, the model v1.2 of scanpy's `tl.paga`.
    """
    names, number = np.unique(labels, return_inverse=True)
    graph = sparse.csr_matrix(neighbours).tocoo()
    between = np.zeros((len(names), len(names)))
    away = graph.row != graph.col
    np.add.at(between, (number[graph.row[away]], number[graph.col[away]]), 1.0)
    size, leaving = np.bincount(number).astype(np.float64), between.sum(axis=1)
    expected = (np.outer(leaving, size) + np.outer(size, leaving)) / (len(labels) - 1)
    both = between + between.T
    share = np.divide(both, expected, out=np.zeros_like(both), where=expected > 0).clip(max=1)
    np.fill_diagonal(share, 0)
    return [str(name) for name in names], share


def flow_without_each(
    velocity: ArrayLike, expression: ArrayLike, neighbours: Graph, *, scale: float = 10.0, steps: int = 2
) -> Array:
    r"""How each gene's expression changes along the flow that all other genes define.

    $$\Delta_{ig} = \sum_j \Big(T^{(-g)}_{ij} - \frac{1}{n_i}\Big)(x_{jg} - x_{ig}), \qquad
    T^{(-g)}_{ij} = \mathrm{softmax}_j\big(\sigma \cos_{-g}(v_i,\ x_j - x_i)\big)$$

    over the $n_i$ cells within `steps` steps; the cosine without gene g is exact, as in `Leaver`. The undirected walk
    is taken off, as Bergen et al. 2020 do on an embedding: the noise in a cell's own $x_{ig}$ then falls out, which
    its velocity shares.

    Shapes: velocity, expression (cells, genes) without NaN; `scale` is sigma. Returns (cells, genes), 0 for a cell
    without neighbours.
    """
    v, x = np.asarray(velocity, dtype=np.float64), np.asarray(expression, dtype=np.float64)
    graph = neighbourhoods(neighbours, steps)
    shorter = _inverse_lengths(v)
    change = np.zeros_like(x)
    for i, (start, stop) in enumerate(zip(graph.indptr[:-1], graph.indptr[1:], strict=True)):
        if start == stop:
            continue
        step = x[graph.indices[start:stop]] - x[i]
        product = v[i] * step
        cosine = (product.sum(axis=1, keepdims=True) - product) * _inverse_lengths(step) * shorter[i]
        weight = np.exp(scale * (cosine - cosine.max(axis=0)))
        weight /= weight.sum(axis=0)
        change[i] = ((weight - 1 / len(step)) * step).sum(axis=0)
    return change


class Agreement:
    r"""How well each gene's own velocity agrees with its change along the flow of the others, draw by draw.

    $$r_g = \frac{\sum_i w_i\, v_{ig} \Delta_{ig}}{\sqrt{\sum_i w_i v_{ig}^2\ \sum_i w_i \Delta_{ig}^2}} \in [-1, 1]$$

    The correlation is not centred: of a gene that only rises, the sign says the direction, not the variation.
    `weights` (draws, cells) are those of `bootstrap`, or ones.
    """

    def __init__(self, change: Array, weights: Array) -> None:
        self.change, self.weights = change, weights
        self.product, self.square = (np.zeros((len(weights), change.shape[1])) for _ in range(2))

    def add(self, draw: int, cells: NDArray[np.int64], velocity: Array) -> None:
        """Take in one draw's velocity (B, genes) of the cells (B,)."""
        weight = self.weights[draw, cells]
        self.product[draw] += weight @ (velocity * self.change[cells])
        self.square[draw] += weight @ np.square(velocity)

    def score(self) -> Array:
        """(draws, genes) of all that was taken in; 0 where the velocity or the change is zero in every cell."""
        length = np.sqrt(self.square * (self.weights @ np.square(self.change)))
        return np.divide(self.product, length, out=np.zeros_like(length), where=length > 0)


class Contributions:
    """Receives the draws of a `Fit`: what each gene adds to CBDir of each way, and the mean velocity.

    `found` holds (draws, genes) by way; `mean` is (cells, genes). `per_unit` (1, genes) turns a velocity into units of
    range.
    """

    def __init__(self, borders: dict[Way, Boundary], per_unit: Array, draws: int, shape: tuple[int, int]) -> None:
        self.borders, self.per_unit = borders, per_unit
        self.toward = {way: border.toward() for way, border in borders.items()}
        self.found = {way: np.zeros((draws, shape[1])) for way in borders}
        self.mean = np.zeros(shape)

    def __call__(self, cells: Index, velocities: NDArray[np.float32]) -> None:
        """Take in the velocities (draws, B, genes) of the cells (B,)."""
        self.mean[cells] = velocities.mean(axis=0, dtype=np.float64) * self.per_unit
        for way, border in self.borders.items():
            _, own, places = np.intersect1d(border.cells, cells, return_indices=True)
            toward = self.toward[way][own]
            for draw, velocity in enumerate(velocities):
                self.found[way][draw] += contributions(velocity[places] * self.per_unit, toward)


class Influences:
    """Receives the draws again: CBDir of each way without each gene and on the `kept` ones, and the genes' agreement.

    `left_out` holds (genes,) by way, the mean over draws; `without` (draws,). `kept` is a mask (genes,) a way.
    """

    def __init__(
        self,
        borders: dict[Way, Boundary],
        kept: dict[Way, NDArray[np.bool_]],
        per_unit: Array,
        draws: int,
        agreement: Agreement,
    ) -> None:
        self.borders, self.kept, self.per_unit, self.agreement = borders, kept, per_unit, agreement
        self.left_out = {way: np.zeros(per_unit.shape[-1]) for way in borders}
        self.without = {way: np.zeros(draws) for way in borders}

    def __call__(self, cells: Index, velocities: NDArray[np.float32]) -> None:
        """Take in the velocities (draws, B, genes) of the cells (B,)."""
        for way, border in self.borders.items():
            part, places = border.among(cells)
            if not len(places):
                continue
            leaver, kept = Leaver(part), self.kept[way]
            toward = part.toward(kept)
            for draw, velocity in enumerate(velocities):
                v = velocity[places] * self.per_unit
                self.left_out[way] += leaver(v) / len(velocities)
                self.without[way][draw] += contributions(v[:, kept], toward).sum()
        for draw, velocity in enumerate(velocities):
            self.agreement.add(draw, cells, velocity * self.per_unit)


def bootstrap(draws: int, neighbours: Graph, seed: int) -> Array:
    """Exponential weights (draws, cells) of the Bayesian bootstrap (Rubin 1981), one for each block of neighbours.

    Neighbours are not independent: they share counts once smoothed. So the graph is divided, by steps in it, among as
    many random centres as make blocks of a neighbourhood's size, and all cells of a block get one weight.
    """
    rng = np.random.default_rng(seed)
    block = blocks(neighbours, rng)
    return rng.standard_exponential((draws, block.max() + 1))[:, block]


def blocks(neighbours: Graph, rng: np.random.Generator) -> NDArray[np.int64]:
    """The number of each cell's block, (cells,); cells that no centre reaches are blocks of their own."""
    graph = sparse.csr_matrix(neighbours)
    n = graph.shape[0]
    centres = rng.choice(n, max(1, round(n / (graph.nnz / n + 1))), replace=False)
    steps = sparse.csr_matrix((np.ones(graph.nnz), graph.indices, graph.indptr), shape=graph.shape)
    _, _, nearest = dijkstra(
        steps, directed=False, indices=centres, unweighted=True, min_only=True, return_predecessors=True
    )
    # Where no centre is near, scipy says -9999.
    return np.unique(np.where(nearest < 0, n + np.arange(n), nearest), return_inverse=True)[1]


def discoveries(probability: Array, rate: float) -> NDArray[np.bool_]:
    """The most probable ones, as many as keep the posterior expected share of false ones among them within `rate`.

    That share is the mean of 1 - p over those called (Newton et al. 2004, section 3.2).

    >>> discoveries(np.array([0.2, 0.99, 0.93, 0.8]), rate=0.05).tolist()
    [False, True, True, False]
    """
    order = np.argsort(-probability, kind="stable")
    false = np.cumsum(1 - probability[order]) / np.arange(1, len(order) + 1)
    called = np.zeros(len(probability), bool)
    called[order[false <= rate]] = True
    return called


def consensus(agreement: Array, margin: float) -> float:
    """Of the genes that take a side, beyond `margin` or -`margin`, the share that agree; NaN where none does.

    >>> consensus(np.array([0.9, 0.5, 0.1, -0.6]), margin=0.3)
    0.6666666666666666
    """
    agree, against = int((agreement > margin).sum()), int((agreement < -margin).sum())
    return agree / (agree + against) if agree + against else float("nan")


def _inverse_lengths(vectors: Array) -> Array:
    """1 / the length of each row without each of its entries, of the same shape; 0 where nothing is left."""
    squares = np.square(vectors)
    total = squares.sum(axis=1, keepdims=True)
    rest = total - squares
    left = rest > ROUNDING * total
    return np.divide(1, np.sqrt(np.where(left, rest, 1)), out=np.zeros_like(rest), where=left)
