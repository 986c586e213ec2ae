"""Where cells end up: the probability of each fate on an embedding, and the shares of groups with their intervals."""

from __future__ import annotations

from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from numpy.typing import NDArray

from pyro_velo.data import anndata_keys as keys
from pyro_velo.errors import InputError
from pyro_velo.fates import Shares
from pyro_velo.options import BASIS

from .canvas import (
    CATEGORY_COLORS,
    FAINT,
    INK,
    PALE,
    TIME_MAP,
    UNCERTAINTY_MAP,
    canvas,
    colorbar,
    dot_area,
    legend,
    open_frame,
    shuffled,
)
from .lookup import Annotated, coordinates, missing, per_cell, shown_name

FATES = "Compute them first: pv.futures.fates(adata, fit)."
COLUMNS = 4


def fate_probability(
    adata: Annotated, state: str, basis: str = BASIS, *, width: bool = False, ax: Axes | None = None
) -> Axes:
    """Draws the cells of an embedding coloured by the mean probability, in [0, 1], that they end in one terminal state.

    With `width=True` the colour is the width of the 90 % interval instead. Cells of the terminal state are ringed;
    those without a way to any state are pale.

    Raises InputError for an embedding, fates or a state that is not there.
    """
    points, values = coordinates(adata, basis), _values(adata, state, width)
    ends = np.asarray(per_cell(adata, keys.FATE_TERMINAL, FATES).astype(str) == state)
    ax = canvas(ax, 5.0, 4.2)
    drawn = _panel(ax, points, values, ends, width)
    _captions(ax, state, basis)
    colorbar(ax, drawn, _label(width))
    return ax


def fate_probabilities(adata: Annotated, basis: str = BASIS, *, width: bool = False) -> NDArray[Any]:
    """Draws `fate_probability` of each terminal state on a new figure, four a row; returns the axes, one a state.

    All have one colour scale, whose bar stands beside the last. Raises InputError as `fate_probability`.
    """
    states, points = _states(adata), coordinates(adata, basis)
    ends = per_cell(adata, keys.FATE_TERMINAL, FATES).astype(str)
    values = [_values(adata, state, width) for state in states]
    columns = min(COLUMNS, len(states))
    rows = -(-len(states) // columns)
    figure, grid = plt.subplots(rows, columns, figsize=(4.2 * columns, 3.6 * rows), layout="constrained", squeeze=False)
    for spare in grid.ravel()[len(states) :]:
        figure.delaxes(spare)
    axes = grid.ravel()[: len(states)]
    for state, ax, shown in zip(states, axes, values, strict=True):
        drawn = _panel(ax, points, shown, np.asarray(ends == state), width)
        _captions(ax, state, basis)
    colorbar(axes[-1], drawn, _label(width))
    return axes


def fate_shares(shares: Shares, *, ax: Axes | None = None) -> Axes:
    """Draws the share of each group's cells that ends in each state as a bar, with its 90 % interval.

    The intervals are those of the `shares` given: of the expected share, or with `cells=True` of a counted one. The
    number of cells stands after a group's name; a group without a way has no bar.
    """
    n_states = len(shares.states)
    ax = canvas(ax, 6.0, 1.2 + (0.25 + 0.16 * n_states) * len(shares.groups))
    colors = [CATEGORY_COLORS[k % len(CATEGORY_COLORS)] for k in range(n_states)]
    thick = 0.8 / n_states
    rows = np.arange(len(shares.groups), dtype=np.float64)
    for k, color in enumerate(colors):
        y = rows + (k - (n_states - 1) / 2) * thick
        known = np.isfinite(shares.mean[:, k])
        ax.barh(y[known], shares.mean[known, k], 0.85 * thick, color=color, alpha=0.55, lw=0)
        ax.hlines(y[known], shares.low[known, k], shares.high[known, k], color=INK, lw=1.4)
    names = [f"{group} (n = {n})" for group, n in zip(shares.groups, shares.n, strict=True)]
    ax.set_yticks(rows, names, parse_math=False)
    ax.set_ylim(len(rows) - 0.5, -0.5)
    ax.set_xlim(0, 1)
    ax.set_xlabel("share of the group's cells: posterior mean and 90 % interval", fontsize=9)
    ax.grid(axis="x", color=PALE, lw=0.5)
    ax.set_axisbelow(True)
    legend(ax, shares.states, colors, ncols=min(4, n_states), loc="lower center", bbox_to_anchor=(0.5, 1.0))
    open_frame(ax)
    ax.tick_params(axis="y", length=0)
    return ax


def _states(adata: Annotated) -> list[str]:
    """The names of the terminal states, in the order of the columns of `obsm['fate_probabilities']`."""
    about = adata.uns.get(keys.UNS, {})
    if keys.UNS_FATES not in about:
        raise missing(f"uns[{keys.UNS!r}]", keys.UNS_FATES, about, FATES)
    return [str(name) for name in about[keys.UNS_FATES]["states"]]


def _values(adata: Annotated, state: str, width: bool) -> NDArray[np.float64]:
    """(cells,) the probability of one state, or the width of its interval."""
    states = _states(adata)
    if state not in states:
        raise InputError(f"Expected one of the terminal states {', '.join(states)}; got {state!r}. Name one of them.")
    wanted = (keys.FATE_PROBABILITIES_Q95, keys.FATE_PROBABILITIES_Q05) if width else (keys.FATE_PROBABILITIES,)
    for name in wanted:
        if name not in adata.obsm:
            raise missing("obsm", name, adata.obsm.keys(), FATES)
    columns = [np.asarray(adata.obsm[name], dtype=np.float64)[:, states.index(state)] for name in wanted]
    return columns[0] - columns[1] if width else columns[0]


def _panel(
    ax: Axes, points: NDArray[np.float64], values: NDArray[np.float64], ends: NDArray[np.bool_], width: bool
) -> Any:
    """The cells that carry colour; those without a value are below them, and rings around the ends above."""
    order = shuffled(len(points))
    area, known = dot_area(len(points)), np.isfinite(values[order])
    look: dict[str, Any] = {"s": area, "linewidths": 0, "rasterized": True}
    colours: dict[str, Any] = {"cmap": UNCERTAINTY_MAP if width else TIME_MAP, "norm": Normalize(0, 1)}
    (x, y), shown = points[order].T, values[order]
    ax.scatter(x[~known], y[~known], color=FAINT, **look)
    drawn = ax.scatter(x[known], y[known], c=shown[known], **colours, **look)
    ring: dict[str, Any] = {"s": 1.3 * area, "facecolors": "none", "edgecolors": INK, "linewidths": 0.5}
    ax.scatter(points[ends, 0], points[ends, 1], rasterized=True, **ring)
    return drawn


def _captions(ax: Axes, state: str, basis: str) -> None:
    """The state on top; no ticks (the axes of an embedding have no unit), and one scale for both axes."""
    ax.set(xticks=[], yticks=[], aspect="equal")
    ax.margins(0.04)
    ax.spines[:].set_visible(False)
    ax.set_title(state, fontsize=10, color=INK, parse_math=False)
    ax.set_xlabel(f"{shown_name(basis)} 1", fontsize=8, color=INK, loc="left", parse_math=False)
    ax.set_ylabel(f"{shown_name(basis)} 2", fontsize=8, color=INK, loc="bottom", parse_math=False)


def _label(width: bool) -> str:
    return "width of the 90 % interval" if width else "fate probability"
