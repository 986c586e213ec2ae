"""What a minibatch is: the two molecules of some cells, and how many cells there are in all."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """B cells x G genes out of `n_cells`, genes contiguous.

    `molecules` (2, B, G) holds unspliced and spliced, in the units that the likelihood wants; `index` (B,) says which
    cells.
    """

    molecules: Tensor
    index: Tensor
    n_cells: int

    @property
    def u(self) -> Tensor:
        """Unspliced, (B, G)."""
        return self.molecules[0]

    @property
    def s(self) -> Tensor:
        """Spliced, (B, G)."""
        return self.molecules[1]


@dataclass(frozen=True)
class Cells:
    """A data set that is resident on one device: `molecules` (2, N, G), unspliced and spliced.

    A batch is an index slice of it, so nothing is copied but the cells that are asked for.
    """

    molecules: Tensor
    ratio: Tensor | float = 1.0
    """(G,) what one unit of scaled unspliced is in units of scaled spliced: the kinetics need both in one unit."""

    def __post_init__(self) -> None:
        """Check the shape once, so that nobody else has to."""
        if self.molecules.ndim != 3 or self.molecules.shape[0] != 2:
            raise ValueError(f"Expected molecules of shape (2, cells, genes); got {tuple(self.molecules.shape)}.")

    @classmethod
    def of(cls, u: Tensor, s: Tensor, ratio: Tensor | float = 1.0) -> Cells:
        """Stack unspliced and spliced, both (N, G)."""
        return cls(torch.stack((u, s)), ratio)

    def __len__(self) -> int:
        """The number of cells."""
        return self.molecules.shape[1]

    @property
    def n_genes(self) -> int:
        """The number of genes."""
        return self.molecules.shape[2]

    @property
    def u(self) -> Tensor:
        """Unspliced, (N, G)."""
        return self.molecules[0]

    @property
    def s(self) -> Tensor:
        """Spliced, (N, G)."""
        return self.molecules[1]

    def batch(self, index: Tensor, n_cells: int | None = None) -> Batch:
        """The cells at `index` (B,); `n_cells` is what the batch stands for (all cells, if not said)."""
        return Batch(self.molecules.index_select(1, index), index, len(self) if n_cells is None else n_cells)

    def batches(self, index: Tensor, size: int, n_cells: int | None = None) -> Iterator[Batch]:
        """The cells at `index`, in that order, `size` at a time; the last batch may be smaller."""
        for part in index.split(size):
            yield self.batch(part, n_cells)
