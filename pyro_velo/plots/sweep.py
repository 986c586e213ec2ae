"""Many autoencoders in one picture: the held-out bound against the latent size."""

from __future__ import annotations

import pandas as pd
from matplotlib.axes import Axes

from pyro_velo.errors import InputError

from .canvas import CATEGORY_COLORS, INK, QUIET, canvas, open_frame

FORMATS = (".png", ".pdf", ".svg")
STYLES, MARKERS = ("-", "--", ":", "-."), "osD^vP*X"


def sweep_bounds(table: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Draws the held-out bound per cell (nats) of each trial against its latent size, the chosen one ringed.

    `table` is that of `Sweep.frame`: a colour a likelihood, a dash and a marker for each choice of layers. A line stops
    where a trial was given up or failed; how many were is written below. Of trials of one choice the best is drawn.
    Raises InputError where no trial came to its end.
    """
    done = table.dropna(subset="bound")
    if done.empty:
        raise InputError("Expected one trial or more with a bound; got none. Look at the table for what went wrong.")
    ax = canvas(ax, 7.2, 4.0)
    likelihoods, layers = (list(dict.fromkeys(table[name])) for name in ("likelihood", "hidden"))
    layers.sort(key=lambda name: (name.count("-"), len(name), name))
    sizes = sorted(set(table["n_latent"]))
    places = {size: place for place, size in enumerate(sizes)}
    for i, likelihood in enumerate(sorted(likelihoods)):
        for j, hidden in enumerate(layers):
            mine = done[(done["likelihood"] == likelihood) & (done["hidden"] == hidden)]
            if mine.empty:
                continue
            line = mine.groupby("n_latent")["bound"].max().reindex(sizes)
            ax.plot(
                range(len(sizes)),
                line,
                color=CATEGORY_COLORS[i % len(CATEGORY_COLORS)],
                ls=STYLES[j % len(STYLES)],
                marker=MARKERS[j % len(MARKERS)],
                lw=1.3,
                ms=4.5,
                label=f"{likelihood}, {hidden}",
            )
    chosen = done.loc[done["bound"].idxmax()]
    ax.plot(places[chosen["n_latent"]], chosen["bound"], "o", ms=13, mfc="none", mec=INK, mew=1.6, label="chosen")
    ax.set_xticks(range(len(sizes)), [str(size) for size in sizes])
    ax.margins(x=0.08)
    ax.set(xlabel="latent dimensions", ylabel="held-out bound per cell (nats)")
    ax.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1.01, 1.02))
    left = len(table) - len(done)
    if left:
        ax.set_title(f"{left} of {len(table)} trials given up early or failed", fontsize=9, color=QUIET, loc="left")
    open_frame(ax)
    return ax
