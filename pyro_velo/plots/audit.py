"""Which edges between clusters run backwards, and which genes carry or oppose one of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from pyro_velo.errors import InputError

from .canvas import INK, PALE, QUIET, canvas, open_frame

FORWARD, BACKWARD = "#0072b2", "#d55e00"


def axes_for(n_edges: int, n_genes: int) -> tuple[Axes, Axes]:
    """Two axes side by side on a new figure, high enough for the rows of both."""
    height = 1.2 + 0.28 * max(n_edges, n_genes)
    left, right = plt.subplots(1, 2, figsize=(11, height), layout="constrained")[1]
    return left, right


def edge_directions(
    edges: Mapping[str, tuple[float, float, float, float]], *, shown: str | None = None, ax: Axes | None = None
) -> Axes:
    """Draws CBDir of every edge (mean, low, high, P(backward)) as a point with its interval; P is written beside it.

    An edge that runs backwards more likely than not is orange; the one whose genes are `shown` elsewhere is bold.

    Raises InputError where there is no edge.
    """
    _require_rows(len(edges), "edge")
    ax = canvas(ax, 6.4, 1.0 + 0.36 * len(edges))
    for row, (mean, low, high, p_backward) in enumerate(edges.values()):
        color = BACKWARD if p_backward > 0.5 else FORWARD
        ax.hlines(row, low, high, color=color, lw=2.2)
        ax.plot(mean, row, "o", ms=6, color=color)
        ax.text(
            1.02, row, f"{p_backward:.2f}", transform=ax.get_yaxis_transform(), va="center", fontsize=9, color=color
        )
    ax.text(1.02, 1.0, "P(backward)", transform=ax.transAxes, va="bottom", fontsize=9, color=QUIET)
    ax.set_xlabel("CBDir (90 % interval over draws)", fontsize=9)
    _rows(ax, list(edges), bold=() if shown is None else (shown,))
    return ax


def gene_contributions(
    genes: Mapping[str, tuple[float, float, float]],
    *,
    marked: Sequence[str] = (),
    edge: str | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draws what each gene adds to an edge's CBDir (mean, low, high) as a bar with its interval, in the order given.

    Blue carries the edge, orange opposes it; the names of `marked` genes, those that are called reversed, are orange.

    Raises InputError where there is no gene.
    """
    _require_rows(len(genes), "gene")
    ax = canvas(ax, 5.6, 1.0 + 0.28 * len(genes))
    mean, low, high = np.array(list(genes.values()), dtype=np.float64).T
    rows = np.arange(len(genes))
    ax.barh(rows, mean, height=0.62, color=np.where(mean < 0, BACKWARD, FORWARD), alpha=0.85)
    ax.hlines(rows, low, high, color=INK, lw=1.2)
    ax.set_xlabel(f"contribution to CBDir{'' if edge is None else f' of {edge}'}", fontsize=9, parse_math=False)
    _rows(ax, list(genes), colored=marked)
    if set(marked) & set(genes):
        ax.text(1.0, 1.0, "orange names: called reversed", transform=ax.transAxes, ha="right", va="bottom",
                fontsize=9, color=BACKWARD)  # fmt: skip
    return ax


def _rows(ax: Axes, names: Sequence[str], bold: Sequence[str] = (), colored: Sequence[str] = ()) -> None:
    """One row a name, from the top, about a line at zero."""
    ax.axvline(0, color=QUIET, lw=0.8, ls=":", zorder=0)
    ax.set_yticks(range(len(names)), names, parse_math=False)
    for text, name in zip(ax.get_yticklabels(), names, strict=True):
        text.set_fontweight("bold" if name in bold else "normal")
        text.set_color(BACKWARD if name in colored else INK)
    ax.set_ylim(len(names) - 0.5, -0.5)
    ax.hlines(np.arange(1, len(names)) - 0.5, 0, 1, transform=ax.get_yaxis_transform(), color=PALE, lw=0.6, zorder=0)
    open_frame(ax)


def _require_rows(count: int, what: str) -> None:
    if not count:
        raise InputError(f"Expected one {what} or more to draw; got none. Audit a fit with an edge first.")
