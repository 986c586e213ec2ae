"""What an autoencoder found: the plane in which the latent means spread most, and how many clusters there are."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from numpy.typing import ArrayLike

from pyro_velo.errors import InputError

from .canvas import CATEGORY_COLORS, QUIET, canvas, dot_area, legend, open_frame, shuffled

MEASURED, CHOSEN = "#0072b2", "#d55e00"


def latent_plane(z: ArrayLike, clusters: pd.Series | None = None, *, ax: Axes | None = None) -> Axes:
    """Draws latent means z (N, d) on their first two principal components, coloured by `clusters` (N,), if given.

    Where z has one dimension the second is 0. Raises InputError for fewer than two cells.
    """
    x = np.asarray(z, np.float64)
    if x.ndim != 2 or len(x) < 2 or not x.shape[1]:
        raise InputError(f"Expected latent means of 2 cells or more, (cells, dimensions); got {x.shape}. Fit more.")
    x = x - x.mean(0)
    if x.shape[1] == 1:
        x = np.hstack((x, np.zeros_like(x)))
    _, _, directions = np.linalg.svd(x, full_matrices=False)
    plane = x @ directions[:2].T
    ax, order = canvas(ax), shuffled(len(x))
    if clusters is None:
        colors = np.full(len(x), MEASURED, object)
    else:
        found = pd.Categorical(clusters)
        palette = np.array(CATEGORY_COLORS, object)
        colors = palette[found.codes % len(palette)]
        names = [str(name) for name in found.categories]
        legend(ax, names, [str(palette[k % len(palette)]) for k in range(len(names))], loc="upper left",
               bbox_to_anchor=(1.02, 1))  # fmt: skip
    ax.scatter(
        plane[order, 0], plane[order, 1], c=list(colors[order]), s=dot_area(len(x)), lw=0, alpha=0.8, rasterized=True
    )
    ax.set(xlabel="first component of E[z]", ylabel="second component")
    open_frame(ax)
    return ax


def clusters_by_number(candidates: ArrayLike, bounds: ArrayLike, choice: int, *, ax: Axes | None = None) -> Axes:
    """Draws the held-out bound per cell (nats) against the number of clusters, and marks the one that was chosen."""
    k, bound = np.asarray(candidates, float), np.asarray(bounds, float)
    ax = canvas(ax, 5.2, 3.2)
    ax.plot(k, bound, "o-", color=MEASURED, lw=1.4, ms=5)
    ax.plot(k[k == choice], bound[k == choice], "o", ms=9, mfc="white", mec=CHOSEN, mew=2, label=f"chosen: {choice}")
    ax.axvline(choice, color=QUIET, lw=0.8, ls=":", zorder=0)
    ax.set(xlabel="number of clusters", ylabel="held-out bound per cell (nats)", xticks=k)
    ax.legend(fontsize=9, frameon=False, loc="lower right")
    open_frame(ax)
    return ax
