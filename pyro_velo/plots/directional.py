"""Which cells' velocities point somewhere: their probability on an embedding, and the evidence against its null."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize

from pyro_velo.data import anndata_keys as keys
from pyro_velo.directional import Directional
from pyro_velo.options import BASIS

from .canvas import FAINT, INK, PALE, QUIET, TIME_MAP, canvas, colorbar, dot_area, legend, open_frame, shuffled
from .lookup import Annotated, coordinates, missing, per_cell, shown_name

REMEDY = "Compute it first: pv.futures.directional(adata, fit)."
CALLED = "#d55e00"
BINS = 60


def p_directional(adata: Annotated, basis: str = BASIS, *, ax: Axes | None = None) -> Axes:
    """Draws the cells of an embedding coloured by the probability, in [0, 1], that their velocity points somewhere.

    The title says which share of them is called directional. Raises InputError for an embedding or probabilities that
    are not there.
    """
    points = coordinates(adata, basis)
    values = np.asarray(per_cell(adata, keys.P_DIRECTIONAL, REMEDY), dtype=np.float64)
    about = adata.uns.get(keys.UNS, {})
    if keys.UNS_DIRECTIONAL not in about:
        raise missing(f"uns[{keys.UNS!r}]", keys.UNS_DIRECTIONAL, about, REMEDY)
    threshold = float(about[keys.UNS_DIRECTIONAL]["threshold"])
    ax = canvas(ax, 5.0, 4.2)
    order = shuffled(len(points))
    look: dict[str, Any] = {"s": dot_area(len(points)), "linewidths": 0, "rasterized": True}
    (x, y), shown = points[order].T, values[order]
    drawn = ax.scatter(x, y, c=shown, cmap=TIME_MAP, norm=Normalize(0, 1), **look)
    ax.set(xticks=[], yticks=[], aspect="equal")
    ax.margins(0.04)
    ax.spines[:].set_visible(False)
    ax.set_title(f"{(values > threshold).mean():.0%} of {len(values):,} cells directional", fontsize=10, color=INK)
    ax.set_xlabel(f"{shown_name(basis)} 1", fontsize=8, color=INK, loc="left", parse_math=False)
    ax.set_ylabel(f"{shown_name(basis)} 2", fontsize=8, color=INK, loc="bottom", parse_math=False)
    colorbar(ax, drawn, f"P(directional), called above {threshold:g}")
    return ax


def directional_null(found: Directional, *, ax: Axes | None = None) -> Axes:
    """Draws how the evidence is spread over cells, beside its null, in which genes point at random.

    Both are densities. The evidence is how many standard errors genes agree by; that of cells that are called
    directional is filled. Bins reach from the least number to the largest, the null's rarest tenth of a per cent aside.
    """
    low, high = np.quantile(found.null, [0.001, 0.999])
    low, high = min(low, found.statistic.min()), max(high, found.statistic.max())
    edges = np.linspace(low, high if high > low else low + 1, BINS + 1)
    width, n_cells = edges[1] - edges[0], len(found.statistic)
    null = np.histogram(found.null, edges)[0] / (found.null.size * width)
    everyone, called = (
        np.histogram(values, edges)[0] / (n_cells * width)
        for values in (found.statistic, found.statistic[found.called])
    )
    ax = canvas(ax, 5.2, 3.4)
    ax.fill_between(edges, np.append(null, 0), step="post", color=FAINT, lw=0)
    ax.stairs(null, edges, color=QUIET, lw=1)
    ax.stairs(called, edges, color=CALLED, fill=True, alpha=0.45)
    ax.stairs(everyone, edges, color=INK, lw=1.2)
    ax.set_xlim(edges[0], edges[-1])
    ax.set_ylim(0, None)
    ax.set_xlabel("agreement of genes, standard errors", fontsize=9)
    ax.set_ylabel("density", fontsize=9)
    names = ("genes at random", "cells", f"called directional, {found.share:.0%}")
    legend(ax, names, (PALE, INK, CALLED), ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    open_frame(ax)
    return ax
