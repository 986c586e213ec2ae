"""Whether posteriors keep their word: coverage against its level, the ranks' ECDF in its band, and the CRPS."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pyro_velo.calibration import Calibration
from pyro_velo.tallies import BAND, LEVELS

from .canvas import CATEGORY_COLORS, INK, PALE, QUIET, canvas, open_frame

FORMATS = (".png", ".pdf", ".svg")
ERRORS = 2.0
INSIDE, OUTSIDE, ALL = "#0072b2", "#d55e00", "#94a4a2"
MARKERS = "osD^vP*X"
KNOWS_NOTHING = 1 / math.sqrt(math.pi)
"""The CRPS of draws from a Normal prior itself, in units of its sd."""


def coverage(calibration: Calibration, *, ax: Axes | None = None) -> Axes:
    """Draws the share of truths that central intervals cover against their level, with bars of 2 standard errors.

    A line a quantity; calibrated ones are on the diagonal, too narrow intervals below it.
    """
    ax = canvas(ax, 5.2, 3.9)
    ax.plot([0, 1], [0, 1], color=QUIET, lw=0.8, ls=":", zorder=0)
    levels = np.array(LEVELS)
    for i, name in enumerate(calibration.totals):
        pairs = [calibration.coverage(name, level) for level in LEVELS]
        share, error = np.array(pairs).T
        color = CATEGORY_COLORS[i % len(CATEGORY_COLORS)]
        # Side by side, so that bars at one level do not hide each other.
        x = levels + 0.004 * (i - (len(calibration.totals) - 1) / 2)
        low, high = np.clip([share - ERRORS * error, share + ERRORS * error], 0, 1)
        ax.vlines(x, low, high, color=color, lw=1.2)
        ax.plot(x, share, color=color, lw=1.2, marker=MARKERS[i % len(MARKERS)], ms=5, label=name)
    ax.set_xlim(0.45, 1)
    ax.set_ylim(0, 1.02)
    ax.set_xticks(levels, [f"{level:.0%}" for level in levels])
    ax.set_xlabel("central interval", fontsize=9)
    ax.set_ylabel("share of true values within it", fontsize=9)
    ax.legend(frameon=False, fontsize=8.5, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    open_frame(ax)
    return ax


def ranks(calibration: Calibration, name: str, *, ax: Axes | None = None) -> Axes:
    """Draws the ECDF of a quantity's ranks less the uniform one: one rank a fit, in its simultaneous 95 % band.

    A line that rises and then falls below says that the posterior is too sure; one above that it is too high. The pale
    line has all cells and genes, whose ranks are no independent numbers: no band is theirs.
    """
    found = calibration.ecdf(name)
    ax = canvas(ax, 3.0, 2.4)
    x = np.concatenate([[0], found.points, [1]])
    low, high, difference = (np.pad(each, 1) for each in (found.low, found.high, found.difference))
    ax.fill_between(x, low, high, color=PALE, lw=0, label=f"{BAND:.0%} band")
    every = calibration.totals[name].ranks
    ax.plot(np.arange(len(every) + 1) / len(every), _difference(every), color=ALL, lw=1, label="all values")
    ax.plot(x, difference, color=INSIDE if found.inside else OUTSIDE, lw=1.6, label="one a fit")
    ax.axhline(0, color=QUIET, lw=0.8, ls=":")
    ax.set_title(f"{name}: {'inside' if found.inside else 'outside'}", fontsize=9, parse_math=False)
    ax.set_xlim(0, 1)
    ax.set_xticks([0, 0.5, 1], ["0", "0.5", "1"])
    open_frame(ax)
    return ax


def crps(calibration: Calibration, *, ax: Axes | None = None) -> Axes:
    """Draws each quantity's CRPS in units of the truths' sd, with bars of 2 standard errors: 0 at best.

    The dotted line is what the prior itself would get, were it Normal.
    """
    names = list(calibration.totals)
    ax = canvas(ax, 5.0, 0.9 + 0.3 * len(names))
    for row, name in enumerate(names):
        mean, error = calibration.crps(name)
        ax.hlines(row, mean - ERRORS * error, mean + ERRORS * error, color=INK, lw=1.8)
        ax.plot(mean, row, "o", ms=6, color=INK)
    ax.axvline(KNOWS_NOTHING, color=QUIET, lw=0.8, ls=":")
    ax.text(KNOWS_NOTHING, 1.01, "prior", transform=ax.get_xaxis_transform(), ha="center", fontsize=8.5, color=QUIET)
    ax.set_yticks(range(len(names)), names, parse_math=False)
    ax.set_ylim(len(names) - 0.5, -0.5)
    ax.set_xlim(left=0)
    ax.set_xlabel("CRPS, in units of the truth's sd", fontsize=9)
    open_frame(ax)
    return ax


def calibration_panels(calibration: Calibration) -> Figure:
    """All three on one figure: coverage and CRPS above, the ranks of each quantity below."""
    names = list(calibration.totals)
    columns = 4
    rows = len(names) // columns + 1
    figure = Figure(figsize=(10.5, 4.1 + 2.3 * rows), layout="constrained")
    parts: Any = figure.subfigures(2, 1, height_ratios=[4.1, 2.3 * rows])
    above, below = parts
    left, right = above.subplots(1, 2, width_ratios=[1.15, 1])
    coverage(calibration, ax=left)
    crps(calibration, ax=right)
    axes = below.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
    for name, ax in zip(names, axes, strict=False):
        ranks(calibration, name, ax=ax)
    for ax in axes[: len(names)][-columns:]:
        # Below these no ax is shown.
        ax.tick_params(labelbottom=True)
    for ax in axes[len(names) :]:
        ax.set_axis_off()
    # The key stands in the first free place.
    axes[len(names)].legend(*axes[0].get_legend_handles_labels(), frameon=False, fontsize=8.5, loc="upper left")
    below.supxlabel("rank of the truth among the draws, as a share", fontsize=9)
    below.supylabel("ECDF less uniform", fontsize=9)
    figure.suptitle(calibration.title, fontsize=10)
    return figure


def _difference(histogram: np.ndarray) -> np.ndarray:
    """The ECDF of all ranks less the uniform one, at both ends too, (ranks + 1,)."""
    share = np.concatenate([[0], histogram.cumsum() / histogram.sum()])
    return share - np.arange(len(share)) / len(histogram)
