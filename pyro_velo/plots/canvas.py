"""The ax, its colours, legends and colour bars; nothing here touches matplotlib's global state."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.lines import Line2D

from .lookup import Annotated

INK, QUIET, PALE, FAINT = "#222222", "#777777", "#d5d5d5", "#e6e6e6"
STATES = ("induction", "induction, steady", "repression", "repression, steady")
# Okabe and Ito's palette, told apart with every common colour blindness: warm while on, cold while off.
STATE_COLORS = ("#e69f00", "#d55e00", "#56b4e9", "#0072b2")
# Petroff 2021 (arXiv:2107.02270), ten colours ordered for colour-blind readers.
CATEGORY_COLORS = (
    "#3f90da", "#ffa90e", "#bd1f01", "#94a4a2", "#832db6", "#a96b59", "#e76300", "#b9ac70", "#717581", "#92dadd",
)  # fmt: skip
TIME_MAP, UNCERTAINTY_MAP = "viridis", "cividis"


def canvas(ax: Axes | None, width: float = 5.0, height: float = 4.0) -> Axes:
    """The ax that was given, or one on a new figure of `width` x `height` inches."""
    if ax is not None:
        return ax
    return plt.subplots(figsize=(width, height), layout="constrained")[1]


def open_frame(ax: Axes) -> None:
    """Leaves the left and lower edge alone, so that the data carries the picture."""
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color(QUIET)
    ax.tick_params(color=QUIET, labelsize=9)


def category_colors(adata: Annotated, name: str, categories: Sequence[object]) -> list[str]:
    """One colour a category: scanpy's `uns[name + "_colors"]` where they fit, else a colour-blind-safe palette."""
    kept = adata.uns.get(f"{name}_colors")
    if kept is not None and len(kept) >= len(categories):
        return [to_hex(color) for color in kept[: len(categories)]]
    if len(categories) <= len(CATEGORY_COLORS):
        return list(CATEGORY_COLORS[: len(categories)])
    spread = mpl.colormaps["turbo"](np.linspace(0.03, 0.97, len(categories)))
    return [to_hex(color) for color in spread]


def categories_of(values: pd.Series) -> pd.Categorical | None:
    """The column as categories, or None if it is numeric (booleans and strings are categories)."""
    if isinstance(values.dtype, pd.CategoricalDtype):
        return pd.Categorical(values)
    if pd.api.types.is_numeric_dtype(values) and not pd.api.types.is_bool_dtype(values):
        return None
    return pd.Categorical(values.astype("string"))


def legend(ax: Axes, names: Sequence[str], colors: Sequence[str], **options: Any) -> None:
    """A legend of dots; names are set as plain text, so `_x` is not dropped and `$x$` is not typeset."""
    dots = [Line2D([], [], ls="", marker="o", ms=6, color=color) for color in colors]
    settings = {"frameon": False, "fontsize": 9, "handletextpad": 0.2, "labelspacing": 0.4, **options}
    made = ax.legend(dots, [str(i) for i in range(len(dots))], **settings)
    for text, name in zip(made.get_texts(), names, strict=True):
        text.set_parse_math(False)
        text.set_text(name)


def colorbar(ax: Axes, drawn: Any, label: str, *, below: bool = False, extend: str = "neither") -> None:
    """A slim colour bar right of `ax`, or below it at the right; inset, so that it keeps to an ax of equal aspect."""
    place = (0.5, -0.07, 0.45, 0.02) if below else (1.03, 0.1, 0.025, 0.8)
    direction = "horizontal" if below else "vertical"
    bar = ax.figure.colorbar(drawn, cax=ax.inset_axes(place), orientation=direction, extend=extend)
    bar.set_label(label, fontsize=9, parse_math=False)
    bar.ax.tick_params(labelsize=8, color=QUIET)
    bar.ax.locator_params(nbins=5)
    bar.outline.set_visible(False)


def dot_area(n_cells: int) -> float:
    """Points squared a cell: large where cells are few, never so large that they hide each other."""
    return float(np.clip(16000 / max(n_cells, 1), 1.5, 24))


def shuffled(n_cells: int) -> np.ndarray:
    """A fixed random order of drawing, so that no category lies on top of the others because it comes last."""
    return np.random.default_rng(0).permutation(n_cells)
