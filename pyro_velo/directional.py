r"""Whether a cell's velocity points anywhere: genes that know nothing of each other must agree on where.

Draws of one posterior agree with each other even on noise, so the evidence is sought among genes. Flipping the sign of
a gene's velocity in all cells at once changes nothing where genes point at random, and keeps what cells share: that is
the null. Arrays in, arrays out; laws in float64.

References: Hemerik & Goeman 2018 (false discoveries by flips, the identity among them); Storey 2002 (the share of
nulls); Efron 2008 (the local false discovery rate).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import isotonic_regression

from pyro_velo.errors import InputError
from pyro_velo.metrics import Graph
from pyro_velo.transitions import SCALE, Around, Array, Numbers, Stream

FLIPS = 400
FDR = 0.05
STEPS = 2
"""Neighbours' neighbours, as in `embedding.cosine_correlations`: among its nearest alone a cell sees mostly noise."""
CAUTION = 5.0
"""What the p-value of all cells together counts for, against the false discovery rate: see `Rates`."""
TAIL = 0.95
"""The quantile over cells that speaks for all of them together."""


class Rates(NamedTuple):
    r"""What statistics and their null say of each cell, (cells,) each, in [0, 1].

    `q`: the least false discovery rate at which a cell is among the discoveries, if all cells were null,

    $$q_i = \max\Big(\min_{t \le t_i} \frac{\mathrm{mean}_r\, \#\{j: t_j^{(r)} \ge t\}}{\#\{j: t_j \ge t\}},\ 5 p\Big)$$

    over the flips r, the identity among them. p is the share of flips in which one cell in twenty has as much evidence
    as in the data: cells of one process share genes, and so a chance agreement, which would make discoveries of all
    cells of one null data set in twenty; five times p makes that one in a hundred.

    `local`: the local false discovery rate $\pi_0 f_0(t_i) / f(t_i)$, falling in t (isotonic regression), and never
    below `q`.
    """

    q: Array
    local: Array


@dataclass(frozen=True, eq=False)
class Directional:
    """How probable it is that each cell's velocity points somewhere, (cells,) each.

    `probability` in [0, 1]: one less the local false discovery rate of its surroundings' flow, times `agreement`, the
    share of draws in which its own velocity goes along; never above 1 - 5 / (flips + 1). `q`: see `Rates`. `statistic`
    is what was compared with `null` (flips, cells), in which genes point at random. Cells whose probability is above
    1 - `fdr` are `called`.
    """

    probability: Array
    q: Array
    agreement: Array
    statistic: Array
    null: NDArray[np.float32]
    fdr: float

    @property
    def threshold(self) -> float:
        """The probability above which a cell is called directional."""
        return 1 - self.fdr

    @property
    def called(self) -> NDArray[np.bool_]:
        """Which cells are called directional, (cells,); at most a share `fdr` of them is expected to be wrong."""
        return self.probability > self.threshold

    @property
    def share(self) -> float:
        """The share of cells that are called directional."""
        return float(self.called.mean())


def directional(
    stream: Stream,
    expression: ArrayLike,
    neighbours: Graph,
    *,
    unit: ArrayLike = 1.0,
    flips: int = FLIPS,
    steps: int = STEPS,
    fdr: float = FDR,
    seed: int = 0,
) -> Directional:
    r"""Do genes agree on where the flow around a cell leads, and does the cell's own velocity go along?

    With $f_i$ the mean velocity of a cell and its k neighbours, $x$ their expression less its mean over them, both in
    units of `unit`, and $m_g = \sum_j x_{jg} \sum_{h \ne g} f_h x_{jh}$, where the other genes' flow would take gene g,

    $$t_i = \frac{\sum_g f_g m_g}{\sqrt{\sum_g (f_g m_g)^2 + \mathrm{Var}_d(\sum_g v^{(d)}_g m_g)}}$$

    The numerator is what one random half of the genes says of the direction that the other half chooses, summed over
    all halves; the variance is that between genes and that over the draws of the cell's own velocity. Mean velocities
    count less their mean over genes, so that depth of sequencing, which moves all genes together, is no agreement.

    The flow is that of the very cells whose spread it is compared with. A cell's own velocity would not do: noise in s
    lowers $\beta u - \gamma s$ where it raises s, and neighbours share noise, so that without any dynamics all genes
    agree that cells return to the middle of their surroundings. Over those, such pulls all but cancel.

    Shapes: expression (cells, genes) in the units of the stream's velocities; `unit` (genes,); neighbours
    (cells, cells) sparse, of whose pattern those within `steps` steps count. The stream is called twice, and must give
    the same draws. Memory: 4 bytes a cell and gene, and 12 a cell and flip.

    Raises `InputError` as `transitions`, for fewer genes than the flips need to differ (2^(genes - 1)), and for fewer
    flips than the false discovery rate needs.
    """
    around = Around.of(expression, neighbours, unit, SCALE, steps)
    n_cells, n_genes = around.expression.shape
    _check(n_genes, flips, fdr)
    signs = np.ones((n_genes, flips + 1))
    signs[:, 1:] = np.random.default_rng(seed).choice((-1.0, 1.0), (n_genes, flips))
    mean = _mean_velocities(stream, around)
    statistics, agreement = np.empty((flips + 1, n_cells), np.float32), np.empty(n_cells)

    def receive(cells: Numbers, velocities: NDArray) -> None:
        for i, drawn in zip(cells, velocities.swapaxes(0, 1), strict=True):
            here = np.append(around.graph.indices[around.pairs(i)], i)
            flow = mean[here].mean(axis=0, dtype=np.float64)
            spread = np.vstack((around.steps(i), np.zeros(n_genes)))
            statistics[:, i], agreement[i] = agreement_of_genes(flow, spread, _centred(drawn * around.unit), signs)

    stream(receive)
    statistic, null = statistics[0].astype(np.float64), statistics[1:]
    rates = false_discoveries(statistic, null)
    return Directional((1 - rates.local) * agreement, rates.q, agreement, statistic, null, fdr)


def agreement_of_genes(flow: Array, spread: Array, draws: Array, signs: Array) -> tuple[Array, float]:
    """The statistic of one cell under each column of signs, and the share of draws that go along under the first.

    Shapes: flow (genes,), spread (cells around it, genes), draws (draws, genes), signs (genes, flips); returns
    (flips,) and a number. The statistic is 0 where nothing flows. See `directional` for the equation.
    """
    x = spread - spread.mean(axis=0)
    flipped = flow[:, None] * signs
    towards = x.T @ (x @ flipped) - np.square(x).sum(axis=0)[:, None] * flipped
    each = flipped * towards
    spent = (draws - draws.mean(axis=0)) @ (signs * towards)
    sd = np.sqrt(np.square(each).sum(axis=0) + np.square(spent).mean(axis=0))
    statistic = np.divide(each.sum(axis=0), sd, out=np.zeros_like(sd), where=sd > 0)
    return statistic, float((draws @ (signs[:, 0] * towards[:, 0]) > 0).mean())


def false_discoveries(statistic: ArrayLike, null: ArrayLike) -> Rates:
    r"""The false discovery rates of statistics (cells,), given those under a null (flips, cells); see `Rates`.

    The share of nulls is that of the cells below the null's median, against the 5 % quantile over flips of how many
    are there (Storey 2002, with room for cells that depend on each other).

    >>> rates = false_discoveries([9.0, 8.0, 0.1, -1.0], np.random.default_rng(0).normal(size=(999, 4)))
    >>> (rates.q < 0.05).tolist()
    [True, True, False, False]
    """
    under = np.asarray(null)
    # As exact as the null, or a cell would not tie with itself among the flips.
    t = np.asarray(statistic, dtype=under.dtype)
    pool = np.vstack((t, under))
    n_flips, n_cells = pool.shape
    order, ascending = np.argsort(t, kind="stable"), np.sort(pool, axis=None)
    above = (pool.size - np.searchsorted(ascending, t[order])) / n_flips
    tail = np.minimum.accumulate(np.minimum(above / np.arange(n_cells, 0, -1), 1))
    q = np.maximum(tail, min(1.0, CAUTION * _all_together(pool)))
    # Of the cells and flips between one cell and the next, the share that are cells rises with t.
    weights = 1 + above - np.append(above[1:], 0)
    observed = isotonic_regression(1 / weights, weights=weights).x
    local = np.maximum(np.minimum(_share_of_nulls(pool) * (1 / observed - 1), 1), q)
    rank = np.argsort(order, kind="stable")
    return Rates(q[rank], local[rank])


def _all_together(pool: Array) -> float:
    """The share of flips, the first row among them, in which one cell in twenty has as much as in the first row."""
    upper = np.quantile(pool, TAIL, axis=1)
    return float((upper >= upper[0]).mean())


def _share_of_nulls(pool: Array) -> float:
    below = (pool <= np.median(pool)).sum(axis=1)
    expected = np.quantile(below, 1 - TAIL)
    return min(1.0, float((below[0] + 1) / expected)) if expected > 0 else 1.0


def _mean_velocities(stream: Stream, around: Around) -> NDArray[np.float32]:
    """Over draws, less the mean over genes, (cells, genes)."""
    mean = np.full(around.expression.shape, np.nan, np.float32)

    def receive(cells: Numbers, velocities: NDArray) -> None:
        around.check(velocities)
        mean[cells] = _centred(velocities.mean(axis=0, dtype=np.float64) * around.unit)

    stream(receive)
    if np.isnan(mean).any():
        raise InputError("Expected a stream of the velocities of all cells; got fewer. Draw as Fit.velocities does.")
    return mean


def _centred(velocities: Array) -> Array:
    """Vectors (..., genes) less their mean over genes."""
    return velocities - velocities.mean(axis=-1, keepdims=True)


def _check(n_genes: int, flips: int, fdr: float) -> None:
    if not 0 < fdr < 1:
        raise InputError(f"Expected a false discovery rate between 0 and 1; got {fdr}. The default is {FDR}.")
    least = int(np.ceil(CAUTION / fdr))
    if flips < least:
        raise InputError(f"Expected {least} flips or more for a rate of {fdr:g}; got {flips}. The default is {FLIPS}.")
    if n_genes < 1 + np.log2(flips):
        raise InputError(
            f"Expected {int(np.ceil(1 + np.log2(flips)))} genes or more, for {flips} flips that differ; got {n_genes}. "
            "Fit more genes: with so few nothing can be said of their agreement."
        )
