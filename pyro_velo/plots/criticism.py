"""What a fit fails to reproduce: replicated statistics, the tails of importance weights, permuted molecules."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from pyro_velo.criticism import UNRELIABLE, ZEROS, PermutationScore, PredictiveCheck, Reliability
from pyro_velo.errors import InputError

from .canvas import INK, PALE, QUIET, TIME_MAP, canvas, colorbar, dot_area, open_frame

OUT, DOUBTFUL = "#d55e00", 0.5
EXTREME = 0.05
WIDE = 30.0
"""The ratio of the largest number to the smallest above which axes are logarithmic."""
LABELS = {
    "mean_unspliced": "mean, unspliced",
    "mean_spliced": "mean, spliced",
    "variance_unspliced": "variance, unspliced",
    "variance_spliced": "variance, spliced",
    "covariance": "covariance of unspliced and spliced",
    "zeros_unspliced": "share of zeros, unspliced",
    "zeros_spliced": "share of zeros, spliced",
}


def predictive_check(
    check: PredictiveCheck, gene_names: Sequence[str], statistic: str, *, n_named: int = 5, ax: Axes | None = None
) -> Axes:
    """Draws a statistic of each gene against its replicates: their mean, with their range from 5 to 95 %.

    Genes on the diagonal are reproduced. Those with a p-value below 0.05 stand out, and of them the `n_named` with the
    most sds between data and replicates are named. Axes are logarithmic where all numbers are positive and far apart,
    but for shares of zeros.

    Raises InputError for an unknown statistic, and names of other genes.
    """
    row = check.of(statistic)
    _check_names(gene_names, check.observed.shape[1])
    x, y, low, high, p, z = (getattr(check, name)[row] for name in ("observed", "mean", "low", "high", "p_value", "z"))
    out = p < EXTREME
    ax = canvas(ax, 4.2, 3.9)
    numbers = np.concatenate((x, low, high))
    if statistic not in ZEROS and numbers.min() > 0 and numbers.max() > WIDE * numbers.min():
        ax.set(xscale="log", yscale="log")
        for axis in (ax.xaxis, ax.yaxis):
            axis.set_major_locator(LogLocator(subs=(1, 3)))
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axis.set_minor_locator(NullLocator())
    ax.plot(*2 * [[numbers.min(), numbers.max()]], color=QUIET, lw=0.8, ls=":", zorder=1)
    for shown, color in ((~out, INK), (out, OUT)):
        ax.vlines(x[shown], low[shown], high[shown], color=color, lw=1.0, alpha=0.45, zorder=2)
        ax.scatter(x[shown], y[shown], s=14, color=color, linewidths=0, zorder=3)
    worst = np.argsort(-np.abs(z), kind="stable")
    for j in worst[out[worst]][:n_named]:
        ax.annotate(
            gene_names[j], (x[j], y[j]), (4, 3), textcoords="offset points", fontsize=8, color=OUT, parse_math=False
        )
    ax.set_title(LABELS.get(statistic, statistic), fontsize=10)
    ax.set_xlabel("data", fontsize=9)
    ax.set_ylabel("replicates (mean, 5 to 95 %)", fontsize=9)
    open_frame(ax)
    return ax


def predictive_checks(check: PredictiveCheck, gene_names: Sequence[str], *, n_named: int = 5) -> Figure:
    """Every statistic of a check side by side, as `predictive_check` draws it, on a figure of its own."""
    count = len(check.statistics)
    columns = min(4, count)
    rows = -(-count // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(3.5 * columns, 3.3 * rows), layout="constrained", squeeze=False)
    for ax, name in zip(axes.flat, check.statistics, strict=False):
        predictive_check(check, gene_names, name, n_named=n_named, ax=ax)
    for ax in axes.flat[count:]:
        ax.set_axis_off()
    return figure


def k_hat(reliability: Reliability, *, ax: Axes | None = None) -> Axes:
    """Draws the k-hat of every cell in ascending order; above 0.7 its importance estimate is not to be trusted.

    A cell without a tail (k-hat of -inf) stands at the lower edge. Raises InputError for no cells.
    """
    values = np.sort(reliability.k_hat)
    if not len(values):
        raise InputError("Expected the k-hat of one cell or more, got none. Score some cells.")
    finite = values[np.isfinite(values)]
    floor = min(-0.2, float(finite.min())) if len(finite) else -0.2
    values = np.clip(np.nan_to_num(values, neginf=floor), floor, None)
    rank = (np.arange(len(values)) + 0.5) / len(values)
    bad = values > UNRELIABLE
    ax = canvas(ax, 4.8, 3.4)
    for shown, color in ((~bad, INK), (bad, OUT)):
        ax.scatter(rank[shown], values[shown], s=2 * dot_area(len(values)), color=color, linewidths=0, zorder=2)
    for level in (DOUBTFUL, UNRELIABLE):
        ax.axhline(level, color=QUIET, lw=0.8, ls=":", zorder=1)
        ax.annotate(f"{level:g}", (1.0, level), (3, 0), xycoords=("axes fraction", "data"),
                    textcoords="offset points", va="center", fontsize=8, color=QUIET)  # fmt: skip
    ax.set_title(f"{bad.sum():,} of {len(bad):,} cells above {UNRELIABLE:g}", fontsize=10)
    ax.set_xlabel("share of cells", fontsize=9)
    ax.set_ylabel("Pareto k-hat of the importance weights", fontsize=9)
    ax.set_xlim(-0.02, 1.02)
    open_frame(ax)
    return ax


def permutation(
    score: PermutationScore, gene_names: Sequence[str], *, n_genes: int = 40, ax: Axes | None = None
) -> Axes:
    """Draws the permutation score of each gene (columns) in each cell type (rows): 1 - observed / permuted error.

    The `n_genes` whose score is highest in some type, highest on the left. A type of one cell has none, and is grey.

    Raises InputError for names of other genes.
    """
    _check_names(gene_names, score.observed.shape[1])
    values = score.score
    best = np.argsort(-np.nan_to_num(values, nan=-np.inf).max(0), kind="stable")[:n_genes]
    ax = canvas(ax, 2.2 + 0.24 * len(best), 1.3 + 0.34 * len(score.types))
    ax.set_facecolor(PALE)
    drawn = ax.pcolormesh(np.ma.masked_invalid(values[:, best]), cmap=TIME_MAP, vmin=0, vmax=1, ec="white", lw=0.6)
    ax.set_xticks(np.arange(len(best)) + 0.5, [gene_names[j] for j in best], rotation=90, parse_math=False)
    ax.set_yticks(np.arange(len(score.types)) + 0.5, score.types, parse_math=False)
    ax.invert_yaxis()
    ax.tick_params(length=0, labelsize=8)
    for spine in ax.spines.values():
        spine.set_visible(False)
    extend = "min" if np.nanmin(values[:, best], initial=0) < 0 else "neither"
    colorbar(ax, drawn, "permutation score", extend=extend)
    return ax


def _check_names(gene_names: Sequence[str], n_genes: int) -> None:
    if len(gene_names) != n_genes:
        raise InputError(
            f"Expected the names of the {n_genes} fitted genes; got {len(gene_names)}. Pass fit.data.gene_names."
        )
