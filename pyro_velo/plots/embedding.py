"""Cells on an embedding, and the direction in which they move: stream lines, arrows on a grid, arrows of cells."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, Normalize
from numpy.typing import NDArray

from pyro_velo.data import anndata_keys as keys
from pyro_velo.embedding import Grid
from pyro_velo.embedding import grid as smooth
from pyro_velo.errors import InputError
from pyro_velo.options import BASIS

from .canvas import (
    FAINT,
    INK,
    PALE,
    TIME_MAP,
    UNCERTAINTY_MAP,
    canvas,
    categories_of,
    category_colors,
    colorbar,
    dot_area,
    legend,
    shuffled,
)
from .labels import on_data
from .lookup import Annotated, coordinates, per_cell, shown_name, velocities

Array = NDArray[np.float64]
LABELS = ("on data", "beside", "none")
TITLES = {
    keys.LATENT_TIME: "latent time (0 first, 1 last)",
    keys.VELOCITY_UNCERTAINTY: "uncertainty of direction",
}
# Certain arrows are ink and uncertain ones fade, never to white.
FADE = LinearSegmentedColormap.from_list("fade", [INK, "#cfcfcf"])
LONG_ARROW = 0.05


def stream(
    adata: Annotated,
    basis: str = BASIS,
    *,
    color: str | None = None,
    shade: str | None = None,
    labels: str = "on data",
    density: float = 1.5,
    ax: Axes | None = None,
) -> Axes:
    """Draws stream lines of the velocity over the cells of an embedding; where lines are thicker, cells are faster.

    Reads obsm `X_<basis>` and `velocity_<basis>`, smooths them on a regular grid in float64 and leaves it empty where
    there are no cells. Cells are coloured by the column `color` of `obs`, its categories named "on data", "beside" or
    ("none") not at all; lines fade as the column `shade` rises, as a rule "velocity_uncertainty".

    Raises InputError for an embedding, its velocity or a column that is not there.
    """
    points, velocity = coordinates(adata, basis), velocities(adata, basis)
    fading = None if shade is None else _numbers(adata, shade)
    ax = _cells(adata, basis, color, labels, ax)
    x, y, dx, dy, _ = _smoothed(points, velocity)
    speed = np.nan_to_num(np.hypot(dx, dy))
    look: dict[str, Any] = {
        "linewidth": 0.5 + 1.2 * speed / (speed.max() or 1), "arrowsize": 1.0, "arrowstyle": "-|>", "zorder": 3,
    }  # fmt: skip
    if fading is None:
        ax.streamplot(x, y, dx, dy, density=density, color=INK, **look)
        return ax
    shades = _smoothed(points, np.column_stack([fading, fading])).u
    norm = _norm(fading)
    drawn = ax.streamplot(x, y, dx, dy, density=density, color=shades, cmap=FADE, norm=norm, **look)
    colorbar(ax, drawn.lines, TITLES.get(str(shade), str(shade)), below=True, extend="max")
    return ax


def grid(
    adata: Annotated,
    basis: str = BASIS,
    *,
    color: str | None = None,
    shade: str | None = None,
    labels: str = "on data",
    n: int = 30,
    ax: Axes | None = None,
) -> Axes:
    """Draws the smoothed velocity as arrows on an `n` x `n` grid over the cells; otherwise as `stream`.

    An arrow's length is in proportion to the speed; 95 of 100 are shorter than a twentieth of the embedding.
    """
    points, velocity = coordinates(adata, basis), velocities(adata, basis)
    fading = None if shade is None else _numbers(adata, shade)
    ax = _cells(adata, basis, color, labels, ax)
    x, y, dx, dy, _ = _smoothed(points, velocity, n)
    nodes = np.stack(np.meshgrid(x, y), axis=-1)
    shades = None if fading is None else _smoothed(points, np.column_stack([fading, fading]), n).u
    here = np.isfinite(dx) & np.isfinite(dy)
    _arrows(ax, nodes[here], np.column_stack([dx[here], dy[here]]), None if shades is None else shades[here], shade)
    return ax


def arrows(
    adata: Annotated,
    basis: str = BASIS,
    *,
    color: str | None = None,
    shade: str | None = None,
    labels: str = "on data",
    n_cells: int = 600,
    ax: Axes | None = None,
) -> Axes:
    """Draws an arrow a cell, for `n_cells` taken at random (always the same), not smoothed; otherwise as `grid`."""
    points, velocity = coordinates(adata, basis), velocities(adata, basis)
    fading = None if shade is None else _numbers(adata, shade)
    ax = _cells(adata, basis, color, labels, ax)
    order = shuffled(len(points))
    chosen = order[np.isfinite(velocity[order]).all(axis=1)][:n_cells]
    _arrows(ax, points[chosen], velocity[chosen], None if fading is None else fading[chosen], shade)
    return ax


def latent_time(adata: Annotated, basis: str = BASIS, *, ax: Axes | None = None) -> Axes:
    """Draws the cells of an embedding coloured by their latent time (`obs`), in [0, 1].

    Raises InputError for an embedding or a latent time that is not there.
    """
    return _cells(adata, basis, keys.LATENT_TIME, "none", ax)


def uncertainty(adata: Annotated, basis: str = BASIS, *, ax: Axes | None = None) -> Axes:
    """Draws the cells of an embedding coloured by `velocity_uncertainty`: how far draws disagree on direction.

    It is the variance over draws of the cosine to the mean draw, >= 0; the scale ends at the 98th percentile.

    Raises InputError for an embedding or an uncertainty that is not there.
    """
    return _cells(adata, basis, keys.VELOCITY_UNCERTAINTY, "none", ax)


def _cells(adata: Annotated, basis: str, color: str | None, labels: str, ax: Axes | None) -> Axes:
    """The ax with cells on it, coloured, and with their legend."""
    if labels not in LABELS:
        raise InputError(f"Expected labels to be one of {', '.join(map(repr, LABELS))}, got {labels!r}.")
    points = coordinates(adata, basis)
    values = None if color is None else per_cell(adata, color, "Name one of these columns, or color=None.")
    ax = canvas(ax, 5.6, 4.6)
    order = shuffled(len(points))
    x, y = points[order].T
    look: dict[str, Any] = {"s": dot_area(len(points)), "linewidths": 0, "rasterized": True, "zorder": 1}
    _bare(ax, points, basis)
    if values is None or color is None:
        ax.scatter(x, y, color=FAINT, **look)
        return ax
    groups = categories_of(values)
    if groups is None:
        numbers = _numbers(adata, color)
        uncertain = color == keys.VELOCITY_UNCERTAINTY
        norm = _norm(numbers) if uncertain else None
        shades = UNCERTAINTY_MAP if uncertain else TIME_MAP
        drawn = ax.scatter(x, y, c=numbers[order], cmap=shades, norm=norm, plotnonfinite=False, **look)
        colorbar(ax, drawn, TITLES.get(color, color), extend="max" if uncertain else "neither")
        return ax
    names, codes = [str(name) for name in groups.categories], np.asarray(groups.codes)
    colors = category_colors(adata, color, names)
    ax.scatter(x, y, c=np.array([*colors, PALE])[codes[order]], alpha=0.8, **look)
    if labels == "on data":
        on_data(ax, points, codes, names)
    elif labels == "beside":
        legend(ax, names, colors, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return ax


def _bare(ax: Axes, points: Array, basis: str) -> None:
    """No ticks (the axes of an embedding have no unit), one scale for both axes (so that directions are true)."""
    low, high = np.nanmin(points, axis=0), np.nanmax(points, axis=0)
    margin = 0.04 * np.maximum(high - low, 1e-9)
    ax.set(xlim=(low[0] - margin[0], high[0] + margin[0]), ylim=(low[1] - margin[1], high[1] + margin[1]))
    ax.set(xticks=[], yticks=[], aspect="equal")
    ax.spines[:].set_visible(False)
    name = shown_name(basis)
    ax.set_xlabel(f"{name} 1", fontsize=8, color=INK, loc="left", parse_math=False)
    ax.set_ylabel(f"{name} 2", fontsize=8, color=INK, loc="bottom", parse_math=False)


def _arrows(ax: Axes, tails: Array, moves: Array, shades: Array | None, shade: str | None) -> None:
    length = np.hypot(*moves.T)
    extent = max(np.ptp(ax.get_xlim()), np.ptp(ax.get_ylim()))
    long = float(np.quantile(length, 0.95)) if len(length) else 0.0
    look: dict[str, Any] = {
        "angles": "xy", "scale_units": "xy", "scale": (long or 1) / (LONG_ARROW * extent), "width": 0.0028,
        "headwidth": 4, "headlength": 4.5, "headaxislength": 4, "zorder": 3,
    }  # fmt: skip
    if shades is None:
        ax.quiver(*tails.T, *moves.T, color=INK, **look)
        return
    drawn = ax.quiver(*tails.T, *moves.T, shades, cmap=FADE, norm=_norm(shades), **look)
    colorbar(ax, drawn, TITLES.get(str(shade), str(shade)), below=True, extend="max")


def _norm(values: Array) -> Normalize:
    """From 0 (or the least, if negative) to the 98th percentile: a few extreme cells don't flatten the rest."""
    known = values[np.isfinite(values)]
    if not len(known):
        return Normalize(0, 1)
    low, high = min(0.0, float(known.min())), float(np.quantile(known, 0.98))
    return Normalize(low, high if high > low else low + 1)


def _smoothed(points: Array, values: Array, n: int | None = None) -> Grid:
    """Two fields on a regular grid, NaN where there are no cells, float64; coarser where there are few cells."""
    size = n or int(np.clip(np.sqrt(len(points)), 20, 60))
    return smooth(points, values, size=size, smooth=0.8, min_mass=5)


def _numbers(adata: Annotated, name: str) -> Array:
    values = per_cell(adata, name)
    if categories_of(values) is not None:
        raise InputError(f"Expected numbers in adata.obs[{name!r}], found {values.dtype}. Name a numeric column.")
    return np.asarray(values, dtype=np.float64)
