"""How far the draws of a posterior agree on each cell's direction: of its velocity, and of where that leads.

References: Gayoso et al. 2023 (veloVI: intrinsic and extrinsic uncertainty).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pyro_velo.metrics import Graph
from pyro_velo.transitions import LEVELS, SCALE, Around, Array, Numbers, Stream


class Directions(NamedTuple):
    """The cosine of each draw with the mean draw: its mean, variance, 5 % and 95 % quantile over draws, (cells,) each.

    `angle` is the mean angle in degrees, in [0, 180]. A draw of no length points nowhere: its cosine counts 0. The
    variance is small where all draws agree, and in many genes also where none does: the mean and the angle tell which.
    """

    mean: Array
    variance: Array
    low: Array
    high: Array
    angle: Array


class Uncertainty(NamedTuple):
    """How far draws agree on a cell's direction: `intrinsic` of the velocity, `extrinsic` of where it leads."""

    intrinsic: Directions
    extrinsic: Directions


def uncertainty(
    stream: Stream,
    expression: ArrayLike,
    neighbours: Graph,
    *,
    unit: ArrayLike = 1.0,
    scale: float = SCALE,
    steps: int = 1,
    undirected: bool = False,
) -> Uncertainty:
    r"""How far draws agree on direction: of the velocity itself, and of the way that the neighbours leave it.

    Intrinsic: the cosine of each draw's velocity with the mean one, in the units of the stream. Extrinsic: the same of
    the expected displacement, less that of an undirected walk as in `embedding.project`,

    $$\delta_i = \sum_j (T_{ij} - \tfrac1k)(s_j - s_i)$$

    over its k neighbours. With `undirected=True` that walk stays in, $\delta_i = \sum_j T_{ij} s_j - s_i$: every draw
    then pulls the cell to the middle of its neighbours, and one of no velocity at all passes for certain (a mean cosine
    of .99 on noise in 300 genes, where the velocities' own is .18).

    Shapes, units and errors as in `transitions`; nothing is kept of a batch but its statistics. Reference: Gayoso et
    al. 2023, who extrapolate the cell itself.
    """
    around = Around.of(expression, neighbours, unit, scale, steps)
    found = Uncertainty(*(Directions(*np.full((5, around.graph.shape[0]), np.nan)) for _ in range(2)))

    def receive(cells: Numbers, velocities: NDArray) -> None:
        around.check(velocities)
        for i, drawn in zip(cells, velocities.swapaxes(0, 1), strict=True):
            near = around.steps(i)
            weights = np.exp(scale * (around.cosines(drawn, near) - 1))
            weights /= weights.sum(axis=1, keepdims=True)
            displaced = (weights if undirected else weights - 1 / len(near)) @ near
            for into, vectors in zip(found, (drawn, displaced), strict=True):
                for column, value in zip(into, directions(vectors[:, None]), strict=True):
                    column[i] = value[0]

    stream(receive)
    return found


def directions(draws: ArrayLike) -> Directions:
    """The agreement of vectors (draws, cells, dims) with their mean over draws, cell by cell.

    >>> turned = directions([[[1.0, 1.0]], [[1.0, -1.0]]])
    >>> float(turned.angle[0]), float(turned.variance[0])
    (45.0, 0.0)
    """
    vectors = np.asarray(draws, dtype=np.float64)
    middle = vectors.mean(axis=0)
    along = np.einsum("dbg,bg->db", vectors, middle)
    lengths = np.linalg.norm(vectors, axis=-1) * np.linalg.norm(middle, axis=-1)
    cosines = np.divide(along, lengths, out=np.zeros_like(along), where=lengths > 0).clip(-1, 1)
    low, high = np.quantile(cosines, LEVELS, axis=0)
    angle = np.degrees(np.arccos(cosines)).mean(axis=0)
    return Directions(cosines.mean(axis=0), cosines.var(axis=0, ddof=1), low, high, angle)
