"""How far draws spread: quantiles of each number, and how far the draws of a velocity agree on where it points."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor


def quantiles(draws: Tensor, levels: tuple[float, ...]) -> tuple[Tensor, ...]:
    """Quantiles over the leading axis, linearly interpolated, from one sort: (D, B, ...) to one (B, ...) a level."""
    found = draws.new_empty(len(levels), *draws.shape[1:])
    last = len(draws) - 1

    def some(rows: slice) -> None:
        # The draws of a number side by side, where NumPy sorts in vector registers: four times as fast as torch.
        ordered = np.sort(draws[:, rows].flatten(1).T.contiguous().cpu().numpy(), axis=-1)
        for into, level in zip(found, levels, strict=True):
            below = int(level * last)
            low, high = ordered[:, below], ordered[:, min(below + 1, last)]
            value = low + (high - low) * np.float32(level * last - below)
            into[rows] = torch.from_numpy(value.astype(low.dtype)).view(into[rows].shape)

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        list(pool.map(some, [slice(start, start + 8) for start in range(0, draws.shape[1], 8)]))
    return tuple(found)


def directional_uncertainty(draws: Tensor, mean: Tensor) -> Tensor:
    """Variance over draws of the cosine between a draw's velocity and the mean one: (D, B, G), (B, G) to (B,).

    A draw without any velocity points nowhere: its cosine counts 0.
    """
    along = torch.einsum("dbg,bg->db", draws, mean)
    lengths = torch.linalg.vector_norm(draws, dim=-1) * torch.linalg.vector_norm(mean, dim=-1)
    return torch.where(lengths > 0, along / lengths, 0.0).var(0)
