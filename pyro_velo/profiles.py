"""A data set that is one matrix: the profile of each cell, for models of what is measured and not of how it changes."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pyro_velo.batch import Resident

UNKNOWN = -1
"""The label of a cell whose label nobody has given."""


@dataclass(frozen=True)
class ProfileBatch:
    """B cells x G genes out of `n_cells`: the profiles `x` (B, G); `index` (B,) says which cells.

    `size_factors` (B, 1) come with counts: how deeply a cell was sequenced, 1 the median. `covariates` (B, C) is what
    networks are told of a cell besides; `labels` (B,) int64 the number of its cluster where that is known, else
    `UNKNOWN`.
    """

    x: Tensor
    index: Tensor
    n_cells: int
    size_factors: Tensor | None = None
    covariates: Tensor | None = None
    labels: Tensor | None = None

    @property
    def measured(self) -> Tensor:
        """What a model explains: the profiles."""
        return self.x

    @property
    def site(self) -> str:
        """The name of the site at which they stand."""
        return "x"

    @property
    def seen(self) -> Tensor:
        """What an encoder looks at: the profile (counts: log1p of normalised ones) and the covariates, (B, G+C)."""
        x = self.x if self.size_factors is None else (self.x / self.size_factors).log1p_()
        return self.conditioned(x)

    def conditioned(self, z: Tensor) -> Tensor:
        """What a network starts from: vectors (..., B, d) with the covariates, (..., B, d+C)."""
        if self.covariates is None:
            return z
        return torch.cat((z, self.covariates.expand(*z.shape[:-1], -1)), -1)

    def allowed(self, n_clusters: int) -> Tensor | None:
        """Which clusters a cell may be of, (B, K): all, or the one it is known to be of; None without labels."""
        if self.labels is None:
            return None
        known = self.labels[:, None]
        return (known == UNKNOWN) | (known == torch.arange(n_clusters, device=known.device))


@dataclass(frozen=True)
class Profiles(Resident[ProfileBatch]):
    """N cells x G genes that are resident on one device: `x` (N, G), in the units that the likelihood wants.

    A batch is an index slice of it. `size_factors` (N, 1) are there where `x` are counts (1 where depth is part of what
    is to be explained); `covariates` (N, C) and `labels` (N,) as in `ProfileBatch`.
    """

    x: Tensor
    size_factors: Tensor | None = None
    covariates: Tensor | None = None
    labels: Tensor | None = None

    def __post_init__(self) -> None:
        """Check the shapes once, so that nobody else has to."""
        if self.x.ndim != 2:
            raise ValueError(f"Expected profiles of shape (cells, genes); got {tuple(self.x.shape)}.")
        for name in ("size_factors", "covariates", "labels"):
            given = getattr(self, name)
            if given is not None and len(given) != len(self.x):
                raise ValueError(f"Expected {name} of {len(self.x)} cells; got {len(given)}.")

    @classmethod
    def of_counts(cls, counts: Tensor, *, depth: bool = True, **told: Tensor | None) -> Profiles:
        """Raw counts (N, G) with their size factors: each cell's total over the median, or 1 (`depth=False`)."""
        x = counts.to(torch.get_default_dtype())
        totals = x.sum(1, keepdim=True, dtype=torch.float64)
        return cls(x, sizes_of(totals, totals).to(x) if depth else x.new_ones(len(x), 1), **told)

    def __len__(self) -> int:
        """The number of cells."""
        return len(self.x)

    @property
    def n_genes(self) -> int:
        """The number of genes."""
        return self.x.shape[1]

    @property
    def n_covariates(self) -> int:
        """The number of covariates a network is told, a category counting once for each of its levels."""
        return 0 if self.covariates is None else self.covariates.shape[1]

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self.x.device

    def told(self, covariates: Tensor) -> Profiles:
        """The same cells as if these were their covariates (N, C)."""
        return replace(self, covariates=covariates.to(self.x))

    def among(self, index: Tensor) -> Profiles:
        """The cells at `index` alone, as a data set of their own."""
        rest = {
            name: None if (given := getattr(self, name)) is None else given[index]
            for name in ("size_factors", "covariates", "labels")
        }
        return Profiles(self.x[index], **rest)

    def batch(self, index: Tensor, n_cells: int | None = None) -> ProfileBatch:
        """The cells at `index` (B,); `n_cells` is what the batch stands for (all cells, if not said)."""
        rest = (None if given is None else given[index] for given in (self.size_factors, self.covariates, self.labels))
        return ProfileBatch(self.x.index_select(0, index), index, len(self) if n_cells is None else n_cells, *rest)


def sizes_of(totals: Tensor, among: Tensor) -> Tensor:
    """Each total (N, 1) over the median of those `among` (M, 1) that are above 0; 1 where none is."""
    some = among[among > 0]
    if not len(some):
        return torch.ones_like(totals)
    # An empty cell counts as the smallest other one: any factor explains it.
    return totals.clamp_min(some.min().item()) / some.median()
