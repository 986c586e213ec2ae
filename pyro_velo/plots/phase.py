"""The phase portrait of a gene: its cells in the plane of spliced and unspliced RNA, with the fitted curve."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from pyro_velo.data import anndata_keys as keys
from pyro_velo.errors import InputError
from pyro_velo.kinetics import T_MAX

from .canvas import (
    INK,
    PALE,
    STATE_COLORS,
    STATES,
    TIME_MAP,
    canvas,
    categories_of,
    category_colors,
    colorbar,
    dot_area,
    legend,
    open_frame,
    shuffled,
)
from .curves import Array, GeneFit, fitted_curve, gene_fit, inside_probability, steady_state
from .lookup import Annotated, abundance, gene_column, gene_position, per_cell


def phase_portrait(
    adata: Annotated, gene: str, *, color: str = "state", band: float = 0.9, key: bool = True, ax: Axes | None = None
) -> Axes:
    """Draws Ms against Mu of one gene: cells, the fitted curve (induction solid, repression dashed), band and switch.

    The diamond is the switch, the star the steady state of induction, where cells of that state belong; one that lies
    beyond all cells and the curve is not drawn.

    The curve is `kinetics.trajectory` at the posterior mean rates, plus the offsets `fit_s0` and `fit_u0`. The band is
    where the curve passes with probability `band`, point by point, if the rates are independent LogNormals with the
    posterior's means and sds. So it concerns the curve and not the scatter of cells; and as a gene's rates are as a
    rule correlated, which is not stored, it can be wider (or narrower) than the posterior's own.

    `color` is "state" (the most likely of the four), "time" (the latent time of the gene in the cell, in [0, 20]) or a
    column of `obs`; `key` adds a legend or a colour bar.

    Raises InputError for an unknown or unfitted gene, or a layer or column that is not there.
    """
    if not 0 < band < 1:
        raise InputError(f"Expected a band between 0 and 1, got {band}. Use 0.9 for a 90 % band.")
    fit, position = gene_fit(adata, gene), gene_position(adata, gene)
    (s, s_name), (u, u_name) = abundance(adata, position)
    coloring = _coloring(adata, position, color)
    curve = fitted_curve(fit)
    ax = canvas(ax, 5.6 if key else 4.6, 3.8)
    _cells(ax, np.column_stack([s, u]), coloring, key=key)
    ax.set_xlim(*_limits(s, curve[..., 0]))
    ax.set_ylim(*_limits(u, curve[..., 1]))
    _band(ax, fit, band)
    for branch, style in zip(curve, ("-", "--"), strict=True):
        ax.plot(*branch.T, color=INK, lw=1.6, ls=style, zorder=4)
    ax.plot(*curve[0, -1], "D", ms=6, mfc="white", mec=INK, mew=1.4, zorder=5)
    ax.plot(*steady_state(fit), "*", ms=11, mfc="white", mec=INK, mew=1.2, zorder=5)
    ax.set(xlabel=f"spliced ({s_name})", ylabel=f"unspliced ({u_name})")
    ax.set_title(gene, fontsize=11, parse_math=False)
    open_frame(ax)
    return ax


@dataclass(frozen=True)
class Coloring:
    """A code (categories; -1 for none) or a value a cell, the categories' names and colours, the scale's limits."""

    values: Array
    label: str
    names: Sequence[str] = ()
    colors: Sequence[str] = ()
    limits: tuple[float | None, float | None] = (None, None)


def _limits(cells: Array, curve: Array) -> tuple[float, float]:
    """Room for all cells and the whole curve; the band may run out of the picture."""
    top = max(float(np.nanmax(cells)), float(curve.max())) or 1.0
    return -0.03 * top, 1.06 * top


def _band(ax: Axes, fit: GeneFit, level: float) -> None:
    tops = ax.get_xlim()[1], ax.get_ylim()[1]
    s, u = (np.linspace(start, top, 200) for start, top in zip(fit.offset, tops, strict=True))
    inside = np.ma.masked_invalid(inside_probability(fit, s, u))
    ax.contourf(s, u, inside, levels=[(1 - level) / 2, (1 + level) / 2], colors=[INK], alpha=0.16, zorder=3)


def _cells(ax: Axes, points: Array, coloring: Coloring, *, key: bool) -> None:
    order = shuffled(len(points))
    x, y = points[order].T
    look: dict[str, Any] = {"s": 1.6 * dot_area(len(points)), "linewidths": 0, "alpha": 0.75, "rasterized": True}
    values = coloring.values[order]
    if not coloring.names:
        low, high = coloring.limits
        drawn = ax.scatter(x, y, c=values, cmap=TIME_MAP, vmin=low, vmax=high, plotnonfinite=False, zorder=2, **look)
        if key:
            colorbar(ax, drawn, coloring.label)
        return
    shades = np.array([*coloring.colors, PALE])  # code -1, a missing value, takes the last
    ax.scatter(x, y, c=shades[values.astype(int)], zorder=2, **look)
    if key:
        legend(ax, coloring.names, coloring.colors, loc="upper left", bbox_to_anchor=(1.0, 1.0))


def _coloring(adata: Annotated, position: int, color: str) -> Coloring:
    if color == "state":
        return Coloring(gene_column(adata, keys.FIT_STATE, position), color, STATES, STATE_COLORS)
    if color == "time":
        return Coloring(gene_column(adata, keys.FIT_T, position), "latent time", limits=(0, T_MAX))
    values = per_cell(adata, color, "Colour by 'state', 'time' or one of these columns.")
    groups = categories_of(values)
    if groups is None:
        return Coloring(np.asarray(values, dtype=np.float64), color)
    names = [str(name) for name in groups.categories]
    return Coloring(np.asarray(groups.codes, dtype=np.float64), color, names, category_colors(adata, color, names))
