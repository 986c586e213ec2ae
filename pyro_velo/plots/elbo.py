"""How training went: the evidence lower bound, per cell, against the epoch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray

from pyro_velo.data import anndata_keys as keys
from pyro_velo.errors import InputError

from .canvas import INK, QUIET, canvas, open_frame
from .lookup import FIT, Annotated, missing

TRAIN, HELD_OUT = "#8a8a8a", "#0072b2"


def elbo_history(adata: Annotated) -> Mapping[str, Any]:
    """The ELBO history that `fit.write` keeps in `uns`; an InputError if there is none."""
    kept = adata.uns.get(keys.UNS)
    if not isinstance(kept, Mapping):
        raise missing("uns", keys.UNS, adata.uns.keys(), FIT)
    if not isinstance(kept.get("elbo_history"), Mapping):
        raise missing(f"uns[{keys.UNS!r}]", "elbo_history", kept.keys(), FIT)
    return kept["elbo_history"]


def best_epoch(history: Mapping[str, Any]) -> tuple[float, float] | None:
    """(epoch, held-out ELBO per cell) of the best look, by `objective` where that is kept; None if there was none.

    >>> best_epoch({"epoch": [1, 2, 3], "held_out": [-9.0, -4.0, -5.0]})
    (2.0, -4.0)
    """
    epoch, held_out = _series(history, "epoch"), _series(history, "held_out")
    if np.isnan(held_out).all():
        return None
    compared = _series(history, "objective") if len(history.get("objective", ())) else held_out
    best = int(np.nanargmax(compared))
    return float(epoch[best]), float(held_out[best])


def elbo(history: Mapping[str, Any] | Annotated, *, ax: Axes | None = None) -> Axes:
    """Draws the training and the held-out ELBO per cell (nats) against the epoch, and marks the best held-out epoch.

    `history` holds equally long `epoch`, `train`, `held_out` (NaN where not evaluated), or is an AnnData that a fit was
    written to. The vertical axis leaves out the first climb where it would flatten the rest.

    Raises InputError where a series is missing.
    """
    series = history if isinstance(history, Mapping) else elbo_history(history)
    epoch, train, held_out = (_series(series, name) for name in ("epoch", "train", "held_out"))
    ax = canvas(ax, 6, 3.6)
    seen = ~np.isnan(held_out)
    ax.plot(epoch, train, color=TRAIN, lw=1.2, label="training cells")
    ax.plot(epoch[seen], held_out[seen], color=HELD_OUT, lw=1.8, label="held-out cells")
    best = best_epoch(series)
    if best is not None:
        ax.axvline(best[0], color=QUIET, lw=0.8, ls=":", zorder=0)
        ax.plot(*best, "o", ms=7, mfc="white", mec=HELD_OUT, mew=1.8, label=f"best: epoch {best[0]:g}")
    _limit_climb(ax, np.concatenate([train, held_out[seen]]))
    ax.set(xlabel="epoch", ylabel="ELBO per cell (nats)")
    ax.legend(fontsize=9, loc="lower right", labelcolor=INK, facecolor="white", edgecolor="none", framealpha=0.9)
    open_frame(ax)
    return ax


def _limit_climb(ax: Axes, values: NDArray[np.float64]) -> None:
    values = values[np.isfinite(values)]
    if not len(values):
        return
    top, middle, bottom = values.max(), np.quantile(values, 0.1), values.min()
    if top - bottom > 4 * (top - middle) > 0:
        ax.set_ylim(top - 2.5 * (top - middle), top + 0.25 * (top - middle))


def _series(history: Mapping[str, Any], name: str) -> NDArray[np.float64]:
    if name not in history:
        raise InputError(
            f"Expected {name!r} in the ELBO history, which holds {', '.join(map(str, history)) or 'nothing'}. {FIT}"
        )
    return np.asarray(history[name], dtype=np.float64)
