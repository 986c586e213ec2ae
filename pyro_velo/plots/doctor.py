"""What the ELBO is made of over a fit, which way its gradients flow, and which learning rates it bears."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from numpy.typing import NDArray

from pyro_velo.doctor.gradient_record import LEVELS, GradientRecord
from pyro_velo.doctor.gradients import GradientFlow
from pyro_velo.doctor.range_test import RangeTest
from pyro_velo.errors import InputError

from .canvas import CATEGORY_COLORS, INK, PALE, QUIET, canvas, colorbar, open_frame
from .elbo import HELD_OUT, TRAIN

GRADIENT_MAP = "YlGnBu"
SUGGESTED = "#d55e00"
COLUMNS = 4


def elbo_term(history: Mapping[str, Any], name: str, *, ax: Axes | None = None) -> Axes:
    """Draws one summand of the ELBO (nats per cell, at KL weight 1) against the epoch: held-out and training cells.

    `history` is `Fit.history`. The vertical axis leaves out the first climb where it would flatten the rest.
    Raises InputError where the history has no such term.
    """
    ax = canvas(ax, 3.2, 2.4)
    epoch, shown = np.asarray(history["epoch"], dtype=np.float64), []
    for cells, color, width, label in (
        ("train", TRAIN, 1.2, "training cells"),
        ("held_out", HELD_OUT, 1.6, "held-out cells"),
    ):
        values = _term(history, cells, name)
        seen = ~np.isnan(values)
        # One look alone makes no line.
        marker = "o" if seen.sum() == 1 else None
        ax.plot(epoch[: len(values)][seen], values[seen], color=color, lw=width, label=label, marker=marker, ms=4)
        shown.append(values[seen])
    _leave_out_the_start(ax, shown)
    ax.set_title(name, fontsize=9, parse_math=False)
    open_frame(ax)
    return ax


def elbo_terms(history: Mapping[str, Any]) -> Figure:
    """One picture of all summands, as `elbo_term` draws each, reconstruction first; what is taken off is a KL."""
    names = sorted(_known(history), key=lambda name: (name.endswith("_penalty"), name.startswith("kl_")))
    columns = min(COLUMNS, len(names))
    rows = -(-len(names) // columns)
    figure = Figure(figsize=(2.6 * columns, 2.1 * rows + 0.5), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for name, ax in zip(names, axes, strict=False):
        elbo_term(history, name, ax=ax)
    for ax in axes[len(names) :]:
        ax.set_axis_off()
    figure.legend(*axes[0].get_legend_handles_labels(), frameon=False, fontsize=9, loc="outside upper right", ncols=2)
    figure.supxlabel("epoch", fontsize=9)
    figure.supylabel("nats per cell", fontsize=9)
    return figure


def gradient_flow(flow: GradientFlow, *, ax: Axes | None = None) -> Axes:
    """Draws the norm of the gradient that each term (row) sends to each group of parameters (column).

    In each cell stands the norm, and below it the signal-to-noise ratio of one step's draw; a dot says that no gradient
    arrives. The colour is the norm on a log scale.
    """
    terms, groups = len(flow.terms), len(flow.groups)
    ax = canvas(ax, 1.9 + 0.78 * groups, 1.0 + 0.46 * terms)
    norm = np.where(flow.reaches & (flow.norm > 0), flow.norm, np.nan)
    size = np.log10(norm)
    known = size[~np.isnan(size)]
    high = known.max() if len(known) else 0.0
    # Beyond six orders of magnitude all is equally pale.
    scale = Normalize(min(max(known.min(initial=high), high - 6), high - 1), high, clip=True)
    drawn = ax.pcolormesh(np.arange(groups + 1), np.arange(terms + 1), size, norm=scale, cmap=GRADIENT_MAP)
    for row, column in np.ndindex(norm.shape):
        value, snr = float(norm[row, column]), float(flow.snr[row, column])
        if np.isnan(value):
            ax.text(column + 0.5, row + 0.5, "·", ha="center", va="center", color=QUIET)
            continue
        color = "white" if scale(np.log10(value)) > 0.55 else INK
        ax.text(column + 0.5, row + 0.34, _short(value), ha="center", va="center", fontsize=8.5, color=color)
        words = "exact" if snr > 1e4 else f"snr {_short(snr)}"
        ax.text(column + 0.5, row + 0.72, words, ha="center", va="center", fontsize=6.5, color=color)
    ax.set_xticks(np.arange(groups) + 0.5, flow.groups, rotation=35, ha="right", fontsize=9, parse_math=False)
    ax.set_yticks(np.arange(terms) + 0.5, flow.terms, fontsize=9, parse_math=False)
    ax.tick_params(length=0)
    ax.invert_yaxis()
    ax.spines[:].set_visible(False)
    colorbar(ax, drawn, "log10 of the mean gradient's norm (nats per cell)")
    return ax


def gradient_record(record: GradientRecord, *, ax: Axes | None = None) -> Axes:
    """Draws the root mean square of a median element's gradient (log scale) against the epoch, a line a group.

    Bands hold the middle half of a group's elements; the dotted lines are what the optimiser clips at, and the epsilon
    below which it no longer steps as far as the learning rate says.
    """
    ax = canvas(ax, 6.4, 3.8)
    for i, group in enumerate(record.quantiles):
        color, spread = CATEGORY_COLORS[i % len(CATEGORY_COLORS)], 10 ** record.of(group)
        low, middle, high = (spread[:, LEVELS.index(level)] for level in (0.25, 0.5, 0.75))
        ax.fill_between(record.epoch, low, high, color=color, alpha=0.08, lw=0)
        ax.plot(record.epoch, middle, color=color, lw=1.5, label=group)
    ax.set_yscale("log")
    bottom, top = ax.get_ylim()
    for name, bound in (("clip", record.clip), ("epsilon", record.eps)):
        # A bound far away from every line would flatten them.
        if bottom / 10 < bound < 10 * top:
            ax.axhline(bound, color=QUIET, lw=0.8, ls=":")
            ax.annotate(name, (0, bound), (2, 2), xycoords=("axes fraction", "data"), textcoords="offset points",
                        fontsize=8, color=QUIET)  # fmt: skip
    ax.set_xlabel("epoch", fontsize=9)
    ax.set_ylabel("gradient of an element, rms", fontsize=9)
    ax.legend(frameon=False, fontsize=8.5, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    open_frame(ax)
    return ax


def range_test(found: RangeTest, *, ax: Axes | None = None) -> Axes:
    """Draws the loss per cell, and its running mean, against the learning rate, and marks the rate that is suggested.

    The vertical axis leaves out losses that have climbed above where they began by more than they fell.
    """
    ax = canvas(ax, 5.2, 3.4)
    ax.plot(found.rates, found.losses, color=PALE, lw=1.0, label="each step")
    ax.plot(found.rates, found.smoothed, color=HELD_OUT, lw=1.8, label="running mean")
    ax.axvline(found.suggested, color=SUGGESTED, lw=1.2, ls="--", label=f"suggested: {found.suggested:.1e}")
    low, start = found.smoothed.min(), found.smoothed[0]
    fall = max(start - low, np.ptp(found.losses[: max(2, len(found.losses) // 4)]))
    ax.set_ylim(low - 0.3 * fall, start + fall)
    ax.set_xscale("log")
    ax.set_xlabel("learning rate", fontsize=9)
    ax.set_ylabel("loss per cell (nats)", fontsize=9)
    ax.legend(frameon=False, fontsize=8.5, loc="upper left")
    open_frame(ax)
    return ax


def _known(history: Mapping[str, Any]) -> Mapping[str, Any]:
    known = history.get("terms", {}).get("held_out", {})
    if not known:
        raise InputError(
            "Expected a history with the ELBO's terms; got one without. Fit with Trace_ELBO, which has them."
        )
    return known


def _term(history: Mapping[str, Any], cells: str, name: str) -> NDArray[np.float64]:
    known = _known(history)
    if name not in known:
        raise InputError(f"Expected one of the terms {', '.join(known)}; got {name!r}.")
    return np.asarray(history["terms"][cells][name], dtype=np.float64)


def _leave_out_the_start(ax: Axes, series: list[NDArray[np.float64]]) -> None:
    """Limits by the last three quarters of the looks, if the first quarter is far off."""
    late = np.concatenate([values[len(values) // 4 :] for values in series])
    late = late[np.isfinite(late)]
    if not len(late):
        return
    low, high = late.min(), late.max()
    margin = 0.15 * (high - low)
    every = np.concatenate(series)
    if margin > 0 and np.nanmax(every) - np.nanmin(every) > 3 * (high - low):
        ax.set_ylim(low - margin, high + margin)


def _short(value: float) -> str:
    """Two digits, without an exponent where that is as short."""
    if not np.isfinite(value):
        return "∞"
    return f"{value:.2g}" if 1e-2 <= abs(value) < 100 else f"{value:.0f}" if 100 <= abs(value) < 1e4 else f"{value:.0e}"
