"""Names written on the data, each at the middle of its cells, moved apart where they would collide."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.text import Text
from numpy.typing import NDArray

from .canvas import INK

HALO = [patheffects.withStroke(linewidth=3.4, foreground="white")]
STEPS, ROOM = 200, 1.15


def on_data(ax: Axes, points: NDArray[np.float64], codes: NDArray[np.int_], names: Sequence[str]) -> list[Text]:
    """Writes each name at the median of its cells; points (cells, 2), codes (cells,), -1 for none."""
    made = []
    for code, name in enumerate(names):
        if not (codes == code).any():
            continue
        centre = np.median(points[codes == code], axis=0)
        # The cell nearest to the median, so that the name of a ring or an arc lies on the cells.
        own = points[codes == code]
        x, y = own[np.square(own - centre).sum(axis=1).argmin()]
        made.append(
            ax.text(
                x,
                y,
                name,
                ha="center",
                va="center",
                fontsize=9.5,
                color=INK,
                zorder=6,
                path_effects=HALO,
                parse_math=False,
            )
        )
    move_apart(ax, made)
    return made


def move_apart(ax: Axes, texts: Sequence[Text]) -> None:
    """Shifts texts up and down, in pixels, until no two boxes overlap (or the steps are used up)."""
    if len(texts) < 2:
        return
    boxes = [text.get_window_extent() for text in texts]
    middle = np.array([[(box.x0 + box.x1) / 2, (box.y0 + box.y1) / 2] for box in boxes])
    size = np.array([[box.width, box.height] for box in boxes]) * ROOM
    for _ in range(STEPS):
        gap = middle[:, None] - middle[None]
        overlap = (size[:, None] + size[None]) / 2 - np.abs(gap)
        clash = (overlap > 0).all(axis=-1) & ~np.eye(len(texts), dtype=bool)
        if not clash.any():
            break
        upward = np.where(
            gap[..., 1] != 0, np.sign(gap[..., 1]), np.sign(np.subtract.outer(range(len(texts)), range(len(texts))))
        )
        middle[:, 1] += np.where(clash, upward * (overlap[..., 1] / 2 + 0.5), 0).sum(axis=1).clip(-8, 8)
    for text, place in zip(texts, middle, strict=True):
        text.set_position(tuple(ax.transData.inverted().transform(place)))
