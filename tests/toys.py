"""Small worlds that several tests share: seed 000's three genes in four cells, and a few random cells."""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_velo.batch import Batch, Cells

SEED_U = ((0.8, 0.1, 0.5), (0.9, 0.2, 0.6), (0.2, 0.7, 0.1), (0.1, 0.8, 0.2))
SEED_S = ((0.2, 0.9, 0.5), (0.1, 0.8, 0.4), (0.7, 0.3, 0.9), (0.8, 0.2, 0.8))
SEED_TOP = 0.5
"""The seed calls two cells of four the top percentile."""


def seed_cells() -> Cells:
    """The table of seed 000: genes A, B, C in cells 1 to 4."""
    return Cells.of(torch.tensor(SEED_U), torch.tensor(SEED_S))


def some_cells(n_cells: int = 12, n_genes: int = 5, ratio: float = 0.7) -> Cells:
    """Cells without structure, min-max scaled."""
    return Cells.of(torch.rand(n_cells, n_genes), torch.rand(n_cells, n_genes), torch.linspace(ratio, 1.0, n_genes))


def whole(cells: Cells) -> Batch:
    """All cells as one batch."""
    return cells.batch(torch.arange(len(cells)))


def leaf(values: Tensor) -> Tensor:
    """A copy to differentiate by."""
    return values.detach().clone().requires_grad_()
