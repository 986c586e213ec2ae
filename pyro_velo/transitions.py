r"""A Markov chain on the neighbour graph for each posterior draw, along the way that its velocities point.

Arrays in, arrays out; laws in float64. A `Stream` hands over the draws batch by batch, so that draws x cells x genes is
never held: what is kept of a draw is one cosine a pair of neighbours and one speed a cell, 4 bytes each.

References: Bergen et al. 2020 (cosine correlations); Lange et al. 2022 (CellRank: softmax transitions).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import sparse

from pyro_velo.embedding import neighbourhoods
from pyro_velo.errors import InputError
from pyro_velo.metrics import Graph

Array = NDArray[np.float64]
Numbers = NDArray[np.int64]
Receiver: TypeAlias = Callable[[Numbers, NDArray], None]
Stream: TypeAlias = Callable[[Receiver], None]
"""Calls what it is given with the numbers of some cells (B,) and their velocities (draws, B, genes), batch by batch."""
SCALE = 10.0
LEVELS = (0.05, 0.95)
"""The quantiles over draws that stand for an interval of 90 %."""


@dataclass(frozen=True, eq=False)
class Transitions:
    r"""One transition matrix a draw, $T_{ij} \propto e^{\sigma \pi_{ij}}$ over the neighbours j of i.

    `graph` (cells, cells) csr is the pattern, without the cell itself unless it has no neighbours; `cosines`
    (draws, pairs) are pi, and `scale` is sigma (Lange et al. 2022). scVelo's weights (`embedding.transition_matrix`)
    jump at pi = 0: a step that is barely forward counts less there than one that is barely backward, which a chain of
    many steps would add up. `speeds` (draws, cells) are the lengths of the velocities and `lengths` (pairs,) those of
    the steps, in the units in which directions are compared.
    """

    graph: sparse.csr_matrix
    cosines: NDArray[np.float32]
    speeds: NDArray[np.float32]
    lengths: NDArray[np.float32]
    scale: float = SCALE

    def __len__(self) -> int:
        return len(self.cosines)

    def matrix(self, draw: int, weights: ArrayLike = 1.0) -> sparse.csr_matrix:
        """The probabilities of one draw, (cells, cells) csr in float64; rows sum to one.

        A cell to which a walk may go counts `weights` (cells,) times, all above zero.
        """
        counted = np.log(np.broadcast_to(np.asarray(weights, np.float64), self.graph.shape[:1]))
        return self._of(_softmax(self.scale * self.cosines[draw] + counted[self.graph.indices], self.graph.indptr))

    def mean(self) -> sparse.csr_matrix:
        """The mean over draws: the probability of the next step once the draws are averaged out.

        CellRank's `PrecomputedKernel` takes it as it is.
        """
        total = np.zeros(self.graph.nnz)
        for cosines in self.cosines:
            total += _softmax(self.scale * cosines, self.graph.indptr)
        return self._of(total / _repeated(np.add.reduceat(total, self.graph.indptr[:-1]), self.graph.indptr))

    def _of(self, values: Array) -> sparse.csr_matrix:
        return sparse.csr_matrix((values, self.graph.indices, self.graph.indptr), shape=self.graph.shape)


def transitions(
    stream: Stream,
    expression: ArrayLike,
    neighbours: Graph,
    *,
    unit: ArrayLike = 1.0,
    scale: float = SCALE,
    steps: int = 1,
) -> Transitions:
    r"""The cosine of every draw's velocity with the step to each neighbour, as in `embedding.cosine_correlations`.

    Shapes: expression (cells, genes) in the units of the stream's velocities; `unit` (genes,) turns both into those in
    which directions are compared; neighbours (cells, cells) sparse, whose pattern counts.

    Memory: 4 bytes a draw and pair, and as much a draw and cell. The default is the direct graph, `steps=1`: 100 draws
    of 30 neighbours take 12 KB a cell, and the graph of neighbours' neighbours some ten times as much.

    Raises `InputError` for shapes that disagree, numbers that are not finite, and a scale that is not positive.
    """
    around = Around.of(expression, neighbours, unit, scale, steps)
    kept: list[NDArray[np.float32]] = []
    lengths = np.zeros(around.graph.nnz, np.float32)

    def receive(cells: Numbers, velocities: NDArray) -> None:
        around.check(velocities)
        if not kept:
            kept.extend(np.zeros((len(velocities), n), np.float32) for n in (around.graph.nnz, around.graph.shape[0]))
        cosines, speeds = kept
        for i, drawn in zip(cells, velocities.swapaxes(0, 1), strict=True):
            pairs, ways = around.pairs(i), around.steps(i)
            cosines[:, pairs], lengths[pairs] = around.cosines(drawn, ways), _lengths(ways)
            speeds[:, i] = _lengths(drawn * around.unit)

    stream(receive)
    if not kept:
        raise InputError("Expected a stream of velocities; got none. Draw from a fit, as Fit.velocities does.")
    cosines, speeds = kept
    return Transitions(around.graph, cosines, speeds, lengths, scale)


@dataclass(frozen=True, eq=False)
class Around:
    """The neighbours of each cell, and the steps to them in the units in which directions are compared."""

    expression: NDArray
    graph: sparse.csr_matrix
    unit: Array
    scale: float

    @classmethod
    def of(cls, expression: ArrayLike, neighbours: Graph, unit: ArrayLike, scale: float, steps: int) -> Around:
        """Those within `steps` steps; see `transitions` for shapes and errors."""
        x = np.asarray(expression)
        if x.ndim != 2 or not np.isfinite(x).all():
            raise InputError(f"Expected finite expression (cells, genes); got shape {x.shape}. Leave out other genes.")
        graph = neighbourhoods(neighbours, steps)
        if graph.shape[0] != len(x):
            raise InputError(
                f"Expected a graph of {len(x)} cells, as the expression has; got {graph.shape[0]}. Use the same cells."
            )
        factors = np.broadcast_to(np.asarray(unit, np.float64), x.shape[1:])
        if not (0 < scale < np.inf and np.isfinite(factors).all()):
            raise InputError(f"Expected a positive scale and finite units; got scale {scale}. The default is {SCALE}.")
        # A cell without neighbours stays where it is.
        alone = sparse.diags((np.diff(graph.indptr) == 0).astype(np.float64))
        return cls(x, sparse.csr_matrix(graph + alone, dtype=bool), factors, scale)

    def check(self, velocities: NDArray) -> None:
        """Raises `InputError` for fewer than two draws, other genes, or velocities that are not finite."""
        draws, _, genes = velocities.shape
        if draws < 2 or genes != self.expression.shape[1] or not np.isfinite(velocities).all():
            raise InputError(
                f"Expected 2 or more draws of finite velocities of {self.expression.shape[1]} genes; got {draws} of "
                f"{genes} genes. Take draws of the genes that were fitted."
            )

    def pairs(self, cell: int) -> slice:
        """Where the pairs of a cell stand among all."""
        return slice(self.graph.indptr[cell], self.graph.indptr[cell + 1])

    def steps(self, cell: int) -> Array:
        """To each neighbour of a cell, (neighbours, genes)."""
        x = self.expression
        return (x[self.graph.indices[self.pairs(cell)]].astype(np.float64) - x[cell]) * self.unit

    def cosines(self, velocities: NDArray, steps: Array) -> Array:
        """(draws, neighbours), of the velocities (draws, genes) of one cell."""
        return (_unit_length(velocities * self.unit) @ _unit_length(steps).T).clip(-1, 1)


def _lengths(vectors: Array) -> Array:
    """Those of vectors (..., genes) less their mean over genes, (...)."""
    return np.linalg.norm(vectors - vectors.mean(axis=-1, keepdims=True), axis=-1)


def _unit_length(vectors: Array) -> Array:
    """Vectors (..., genes) less their mean over genes, at length one; those of no length stay."""
    centred, length = vectors - vectors.mean(axis=-1, keepdims=True), _lengths(vectors)[..., None]
    return centred / np.where(length > 0, length, 1)


def _softmax(logits: NDArray, indptr: NDArray) -> Array:
    """The softmax over each row of a csr matrix, none of which is empty, in float64."""
    values = logits.astype(np.float64)
    values = np.exp(values - _repeated(np.maximum.reduceat(values, indptr[:-1]), indptr))
    return values / _repeated(np.add.reduceat(values, indptr[:-1]), indptr)


def _repeated(rows: Array, indptr: NDArray) -> Array:
    return np.repeat(rows, np.diff(indptr))
