"""What a diagnosis saw: the KL of each latent dimension, the bound by importance samples, the loss by gene."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike

from pyro_velo.criticism import UNRELIABLE
from pyro_velo.errors import InputError

from .canvas import INK, PALE, QUIET, canvas, open_frame

STRONG, DOUBTFUL, OUTSTANDING = "#0072b2", "#e69f00", "#d55e00"
BESIDE = 20
"""Dimensions up to which each bar has its number."""


def kl_by_dimension(kl: ArrayLike, active: ArrayLike, *, ax: Axes | None = None) -> Axes:
    """Draws the mean KL of each latent dimension (d,), largest first, the active ones in colour.

    Raises InputError where there is none.
    """
    kl, active = np.asarray(kl, dtype=np.float64), np.asarray(active, dtype=bool)
    if not len(kl):
        raise InputError("Expected one latent dimension or more to draw; got none. Leave the picture out.")
    ax = canvas(ax, 5.4, 3.0)
    order = np.argsort(-kl, kind="stable")
    ax.bar(np.arange(len(kl)), kl[order], color=np.where(active[order], STRONG, PALE), width=0.8)
    ax.set(xlabel="latent dimension", ylabel="mean KL (nats)")
    if len(kl) <= BESIDE:
        ax.set_xticks(np.arange(len(kl)), [str(d) for d in order])
    else:
        ax.set_xlabel("latent dimensions, largest KL first")
    n = int(active.sum())
    keys = [Patch(color=STRONG, label=f"active ({n})"), Patch(color=PALE, label=f"idle ({len(kl) - n})")]
    ax.legend(handles=keys, frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    open_frame(ax)
    return ax


def bound_by_particles(particles: Sequence[int], bound: ArrayLike, *, ax: Axes | None = None) -> Axes:
    """Draws what K importance samples gain on the ELBO, mean over cells with 2 standard errors; `bound` (K, cells).

    Errors are of the difference to K = 1, cell by cell. Raises InputError unless there are two cells or more.
    """
    bound = np.asarray(bound, dtype=np.float64)
    if bound.shape[1] < 2:
        raise InputError(f"Expected the bounds of 2 cells or more; got {bound.shape[1]}. Score more cells.")
    ax = canvas(ax, 5.4, 3.0)
    gain = bound - bound[0]
    mean, error = gain.mean(1), 2 * gain.std(1, ddof=1) / np.sqrt(bound.shape[1])
    ax.errorbar(particles, mean, error, color=STRONG, marker="o", ms=5, lw=1.6, capsize=3)
    ax.set_xscale("log")
    ax.set_xticks(list(particles), [str(k) for k in particles])
    ax.minorticks_off()
    ax.axhline(0, color=QUIET, lw=0.8, ls=":", zorder=0)
    ax.set(xlabel="importance samples K", ylabel="gain on the ELBO\n(nats per cell)")
    open_frame(ax)
    return ax


def k_hat_histogram(k_hat: ArrayLike, *, ax: Axes | None = None) -> Axes:
    """Draws how many cells have which Pareto k-hat of their importance weights, with lines at 0.7 and at 1.

    Cells beyond -0.5 and 3 are counted in the outermost bars. Raises InputError for no cells.
    """
    values = np.asarray(k_hat, dtype=np.float64)
    if not len(values):
        raise InputError("Expected the k-hat of one cell or more; got none. Score some cells.")
    ax = canvas(ax, 5.4, 3.0)
    low, high = max(-0.5, np.floor(10 * values.min()) / 10), min(3.0, max(1.2, np.ceil(10 * values.max()) / 10))
    bins = np.linspace(low, high, round((high - low) / 0.1) + 1)
    counts, _ = np.histogram(values.clip(low, high), bins)
    middle = (bins[1:] + bins[:-1]) / 2
    colors = np.select([middle > 1, middle > UNRELIABLE], [OUTSTANDING, DOUBTFUL], STRONG)
    ax.bar(middle, counts, width=0.09, color=colors)
    # Room for two lines of words above the highest bar.
    ax.set_ylim(0, 1.25 * counts.max())
    ax.yaxis.set_major_locator(MaxNLocator(integer=True))
    for level, meaning in ((UNRELIABLE, "not to be\ntrusted"), (1.0, "no mean")):
        ax.axvline(level, color=INK, lw=0.9, ls=":")
        ax.annotate(meaning, (level, 1.0), (3, -2), xycoords=("data", "axes fraction"), textcoords="offset points",
                    va="top", fontsize=8, color=QUIET)  # fmt: skip
    ax.set(xlabel="Pareto k-hat of the importance weights", ylabel="held-out cells")
    open_frame(ax)
    return ax


def loss_by_gene(shares: Mapping[str, float], *, fair: float, ax: Axes | None = None) -> Axes:
    """Draws genes' shares of the loss as bars, in the order given; a dotted line at the `fair` share of each.

    One with more than half stands out. Raises InputError where there is none.
    """
    if not shares:
        raise InputError("Expected one gene or more to draw; got none. Leave the picture out.")
    ax = canvas(ax, 5.4, 1.0 + 0.24 * len(shares))
    names, widths = list(shares), np.fromiter(shares.values(), dtype=np.float64)
    rows = np.arange(len(names))
    ax.barh(rows, widths, color=np.where(widths > 0.5, OUTSTANDING, STRONG), height=0.7)
    ax.axvline(fair, color=INK, lw=0.9, ls=":", label="if all counted alike")
    ax.set_yticks(rows, names, parse_math=False)
    ax.set_ylim(len(names) - 0.4, -0.6)
    ax.set_xlabel("share of the loss")
    ax.legend(frameon=False, fontsize=9, loc="lower right")
    open_frame(ax)
    return ax
