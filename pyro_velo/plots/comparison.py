"""Which variant explains held-out cells best: each one's paired difference to the best, with its error."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes

from pyro_velo.errors import InputError

from .canvas import INK, PALE, QUIET, canvas, open_frame

CHOSEN, ERRORS = "#0072b2", 2.0


def comparison(
    differences: Mapping[str, tuple[float, float] | None],
    *,
    chosen: str | None = None,
    label: str = "nats per cell to the best",
    ax: Axes | None = None,
) -> Axes:
    """Draws each variant's difference to the best (mean, standard error) with a bar of 2 standard errors.

    The best is at 0; `chosen` stands out; a variant without a difference (None) has no point. The difference is
    written beside each, because one that is far off leaves the others little room.

    Raises InputError where no variant has a difference.
    """
    shown = {name: pair for name, pair in differences.items() if pair is not None}
    if not shown:
        raise InputError("Expected one difference or more to draw, got none. Look at the table for what went wrong.")
    ax = canvas(ax, 6.4, 0.9 + 0.36 * len(differences))
    for row, (name, pair) in enumerate(differences.items()):
        color = CHOSEN if name == chosen else INK
        if pair is None:
            _note(ax, row, "no fit", QUIET)
            continue
        mean, error = pair
        best = pair == (0.0, 0.0)
        ax.hlines(row, mean - ERRORS * error, mean + ERRORS * error, color=color, lw=1.8)
        ax.plot(mean, row, "o", ms=6, color=color, mfc="white" if best else color, mew=1.6)
        digits = max(0, 1 - math.floor(math.log10(error))) if error > 0 else 2
        _note(ax, row, "best" if best else f"{mean:,.{digits}f} ± {error:,.{digits}f}", color)
    ax.axvline(0, color=QUIET, lw=0.8, ls=":", zorder=0)
    names = list(differences)
    ax.set_yticks(range(len(names)), names, parse_math=False)
    for text, name in zip(ax.get_yticklabels(), names, strict=True):
        text.set_color(CHOSEN if name == chosen else INK)
    ax.set_ylim(len(names) - 0.5, -0.5)
    ax.set_xlabel(f"{label} (bars: {ERRORS:g} standard errors)", fontsize=9)
    ax.hlines(np.arange(1, len(names)) - 0.5, 0, 1, transform=ax.get_yaxis_transform(), color=PALE, lw=0.6, zorder=0)
    open_frame(ax)
    return ax


def _note(ax: Axes, row: int, text: str, color: str) -> None:
    ax.text(1.02, row, text, transform=ax.get_yaxis_transform(), va="center", fontsize=9, color=color)
