"""What a data set and a minibatch are to the training loop; and the two molecules of some cells, which are one."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, Protocol, Self, TypeVar

import torch
from torch import Tensor

CELLS_AT_ONCE = 4096
"""Of which moments are taken: no copy of all cells is made."""


class Minibatch(Protocol):
    """What the loop and the scores ask of a minibatch: some cells, and what was measured of them."""

    @property
    def index(self) -> Tensor:
        """Which cells they are, (B,)."""

    @property
    def n_cells(self) -> int:
        """How many cells they stand for."""

    @property
    def measured(self) -> Tensor:
        """What a model explains, (..., B, G), genes last."""

    @property
    def seen(self) -> Tensor:
        """What an encoder looks at, (B, ...): what was measured, molecule by molecule, then the covariates."""

    @property
    def site(self) -> str:
        """The name of the site at which it stands."""


class Data(Protocol):
    """What the loop and the scores ask of a data set, whether it is resident on one device or read from a disk."""

    def __len__(self) -> int:
        """The number of cells."""

    @property
    def n_genes(self) -> int:
        """The number of genes."""

    @property
    def device(self) -> torch.device:
        """Where it is."""

    @property
    def sample(self) -> Any:
        """Cells that are resident, which models read their start values off: all of them, or some at random."""

    def shuffled(self, index: Tensor) -> Tensor:
        """The cells at `index` in an order for one epoch, drawn from torch's generator."""

    def batch(self, index: Tensor, n_cells: int | None = None) -> Minibatch:
        """The cells at `index` (B,); `n_cells` is what the batch stands for (all cells, if not said)."""

    def read(self, parts: Sequence[Tensor], n_cells: int | None = None) -> Iterator[Minibatch]:
        """A batch of the cells at each of `parts`, one after the other."""

    def batches(self, index: Tensor, size: int, n_cells: int | None = None) -> Iterator[Minibatch]:
        """The cells at `index`, in that order, `size` at a time; the last batch may be smaller."""


def part_size(n_cells: int, size: int) -> int:
    """The size of equal parts of `n_cells`, of about `size` cells each."""
    return math.ceil(n_cells / math.ceil(n_cells / max(1, size)))


def equal_parts(n_cells: int, size: int) -> Iterator[tuple[Tensor, int]]:
    """Indices of about `size` cells, and how many of them are new: the last part is filled up with the last cell.

    All parts have one size, for which functions are compiled once.
    """
    size = part_size(n_cells, size)
    for start in range(0, n_cells, size):
        yield torch.arange(start, start + size).clamp_max(n_cells - 1), min(size, n_cells - start)


AnyBatch = TypeVar("AnyBatch", bound=Minibatch)


class Resident(ABC, Generic[AnyBatch]):
    """A data set in memory: it can be looked at as a whole, and any order of its cells costs the same."""

    @abstractmethod
    def batch(self, index: Tensor, n_cells: int | None = None) -> AnyBatch:
        """The cells at `index` (B,); `n_cells` is what the batch stands for (all cells, if not said)."""

    @property
    def sample(self) -> Self:
        """Where models read their start values: all cells."""
        return self

    def shuffled(self, index: Tensor) -> Tensor:
        """The cells at `index` in any order, drawn from torch's generator."""
        return index[torch.randperm(len(index))]

    def read(self, parts: Sequence[Tensor], n_cells: int | None = None) -> Iterator[AnyBatch]:
        """A batch of the cells at each of `parts`, one after the other."""
        for part in parts:
            yield self.batch(part, n_cells)

    def batches(self, index: Tensor, size: int, n_cells: int | None = None) -> Iterator[AnyBatch]:
        """The cells at `index`, in that order, `size` at a time; the last batch may be smaller."""
        yield from self.read(index.split(size), n_cells)


class Molecules:
    """What has unspliced and spliced stacked, in this order, at the head of `molecules`."""

    molecules: Tensor

    @property
    def measured(self) -> Tensor:
        """What a model explains: both molecules."""
        return self.molecules

    @property
    def site(self) -> str:
        """The name of the site at which they stand."""
        return "molecules"

    @property
    def device(self) -> torch.device:
        """Where they are."""
        return self.molecules.device

    @property
    def u(self) -> Tensor:
        """Unspliced, (cells, G)."""
        return self.molecules[0]

    @property
    def s(self) -> Tensor:
        """Spliced, (cells, G)."""
        return self.molecules[1]


@dataclass(frozen=True)
class Batch(Molecules):
    """B cells x G genes out of `n_cells`, genes contiguous.

    `molecules` (2, B, G) holds unspliced and spliced, in the units that the likelihood wants; `index` (B,) says which
    cells. `size_factors` (2, B, 1) come with counts: how deeply each molecule of a cell was sequenced, 1 the median.
    `covariates` (B, C) is what networks are told of a cell besides, `group` (B,) the number of its experimental batch.
    """

    molecules: Tensor
    index: Tensor
    n_cells: int
    size_factors: Tensor | None = None
    covariates: Tensor | None = None
    group: Tensor | None = None

    @property
    def seen(self) -> Tensor:
        """What an encoder looks at: both molecules (counts: log1p of normalised ones) and the covariates, (B, 2G+C)."""
        x = self.molecules if self.size_factors is None else torch.log1p(self.molecules / self.size_factors)
        return torch.cat((*x, *self._told), -1)

    def conditioned(self, z: Tensor) -> Tensor:
        """What a decoder starts from: a latent vector (B, d) with the covariates, (B, d+C)."""
        return torch.cat((z, *self._told), -1) if self._told else z

    @property
    def _told(self) -> tuple[Tensor, ...]:
        return () if self.covariates is None else (self.covariates,)


@dataclass(frozen=True)
class Counts:
    """What turns raw counts into abundances: count = size factor x (zero + unit x scaled abundance) on average.

    `size_factors` (2, N, 1); `zero` and `unit` (2, 1, G), the abundance at which a gene counts as empty and as full;
    `scaled` (2, N, G), abundances between the two as well as they can be told before a fit (smoothed, if possible).
    """

    size_factors: Tensor
    zero: Tensor
    unit: Tensor
    scaled: Tensor


@dataclass(frozen=True)
class Cells(Molecules, Resident[Batch]):
    """A data set that is resident on one device: `molecules` (2, N, G), unspliced and spliced.

    A batch is an index slice of it, so nothing is copied but the cells that are asked for. `counts` is there where the
    molecules are raw counts; `covariates` (N, C), `group` (N,) and `n_groups` where something is known of the cells.
    """

    molecules: Tensor
    ratio: Tensor | float = 1.0
    """(G,) what one unit of scaled unspliced is in units of scaled spliced: the kinetics need both in one unit."""
    counts: Counts | None = None
    covariates: Tensor | None = None
    group: Tensor | None = None
    n_groups: int = 0
    order: Tensor | None = None
    """(N,) in [0, 1]: where the cells stand in time as far as it can be told before a fit; None: by each alone."""

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
    def n_covariates(self) -> int:
        """The number of covariates a network is told, a category counting once for each of its levels."""
        return 0 if self.covariates is None else self.covariates.shape[1]

    @property
    def scaled(self) -> Tensor:
        """Abundances in units of each gene's range, (2, N, G), whatever the likelihood wants."""
        return self.molecules if self.counts is None else self.counts.scaled

    @property
    def seen_moments(self) -> tuple[Tensor, Tensor]:
        """Mean and sd (2G+C,) over cells of what an encoder looks at; 1 is the sd of what does not vary."""
        mean = self._mean_seen(lambda seen: seen)
        # In two passes: the difference of two large numbers would leave what does not vary a tiny sd.
        sd = self._mean_seen(lambda seen: (seen - mean).square()).sqrt()
        # A NaN must not spread from its cell to all others, or nobody could say where it is.
        known = sd.isfinite()
        return mean.where(known, 0.0).to(self.molecules), sd.where(known & (sd > 0), 1.0).to(self.molecules)

    def _mean_seen(self, of: Callable[[Tensor], Tensor]) -> Tensor:
        batches = self.batches(torch.arange(len(self), device=self.device), CELLS_AT_ONCE)
        return torch.stack([of(batch.seen.double()).sum(0) for batch in batches]).sum(0) / len(self)

    def in_group(self, group: int, columns: slice) -> Cells:
        """The same cells as if all were of one experimental batch, whose one-hot stands in `columns` of covariates."""
        assert self.covariates is not None and self.group is not None
        covariates = one_level(self.covariates, columns, group)
        return replace(self, covariates=covariates, group=torch.full_like(self.group, group))

    def among(self, index: Tensor) -> Cells:
        """The cells at `index` (B,) alone, as a data set of their own."""
        some, counts = self.batch(index), self.counts
        if counts is not None and some.size_factors is not None:
            counts = replace(counts, size_factors=some.size_factors, scaled=counts.scaled.index_select(1, index))
        order = None if self.order is None else self.order[index]
        return Cells(some.molecules, self.ratio, counts, some.covariates, some.group, self.n_groups, order)

    def batch(self, index: Tensor, n_cells: int | None = None) -> Batch:
        """The cells at `index` (B,); `n_cells` is what the batch stands for (all cells, if not said)."""
        return Batch(
            self.molecules.index_select(1, index),
            index,
            len(self) if n_cells is None else n_cells,
            None if self.counts is None else self.counts.size_factors.index_select(1, index),
            None if self.covariates is None else self.covariates[index],
            None if self.group is None else self.group[index],
        )


def one_level(covariates: Tensor, columns: slice, level: int) -> Tensor:
    """Covariates (N, C) of which those in `columns`, a one-hot, say that every cell is of the same level."""
    found = covariates.clone()
    found[:, columns] = 0
    found[:, columns.start + level] = 1
    return found
