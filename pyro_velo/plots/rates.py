"""The kinetic rates of a few genes, with their intervals."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from pyro_velo.data import anndata_keys as keys
from pyro_velo.kinetics import T_MAX

from .canvas import PALE, canvas, legend, open_frame
from .curves import gene_fit
from .intervals import interval
from .lookup import Annotated

NAMES = ("transcription α", "splicing β", "degradation γ", "switching time")
COLORS = ("#e69f00", "#009e73", "#0072b2", "#cc79a7")
LEVEL = 0.9


def rates(adata: Annotated, genes: Sequence[str], *, level: float = LEVEL, ax: Axes | None = None) -> Axes:
    """Draws alpha, beta, gamma and the switching time of each gene as a point with its central interval of `level`.

    A point is the posterior mean; its interval that of the LogNormal with the posterior's mean and sd, so both are
    positive and the axis is logarithmic; the switching time ends at 20. Alpha is in units of the fitted layers (`Mu`,
    `Ms`) per unit of latent time, beta and gamma per unit of it, the switching time in units of it.

    Raises InputError for an unknown or unfitted gene.
    """
    chosen = [genes] if isinstance(genes, str) else list(genes)
    fits = [gene_fit(adata, gene) for gene in chosen]
    ax = canvas(ax, 6, 1.2 + 0.42 * len(chosen))
    rows = np.arange(len(chosen), dtype=np.float64)
    for i, (color, shift) in enumerate(zip(COLORS, (-0.27, -0.09, 0.09, 0.27), strict=True)):
        mean, sd = (np.array([getattr(fit, part)[i] for fit in fits]) for part in ("mean", "sd"))
        low, high = interval(mean, sd, level)
        if keys.RATES[i] == keys.FIT_SWITCH:
            high = np.maximum(high.clip(max=T_MAX), mean)
        ax.hlines(rows + shift, low, high, color=color, lw=1.8)
        ax.plot(mean, rows + shift, "o", ms=4.5, color=color)
    _finish(ax, chosen, f"posterior mean and {100 * level:g} % interval (latent time runs from 0 to {T_MAX:g})")
    return ax


def _finish(ax: Axes, genes: Sequence[str], label: str) -> None:
    ax.set_xscale("log")
    ax.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set_xlabel(label, fontsize=9)
    ax.set_yticks(range(len(genes)), genes, parse_math=False)
    ax.set_ylim(len(genes) - 0.5, -0.5)
    ax.hlines(np.arange(1, len(genes)) - 0.5, 0, 1, transform=ax.get_yaxis_transform(), color=PALE, lw=0.6, zorder=0)
    ax.grid(axis="x", color=PALE, lw=0.5)
    ax.set_axisbelow(True)
    legend(ax, NAMES, COLORS, ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.0), columnspacing=1.0)
    open_frame(ax)
