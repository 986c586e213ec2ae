"""Profiles of cells that do not fit into memory: as `disk.DiskCells`, of one matrix."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pyro_velo.disk import OnDisk
from pyro_velo.profiles import ProfileBatch, Profiles


@dataclass(frozen=True, kw_only=True)
class DiskProfiles(OnDisk[ProfileBatch]):
    """A data set like `Profiles`, whose `x` is in `rows`; `sample` are some of its cells, resident.

    `size_factors` (N, 1), `covariates` (N, C) and `labels` (N,) are resident.
    """

    sample: Profiles
    size_factors: Tensor | None = None
    covariates: Tensor | None = None
    labels: Tensor | None = None

    @property
    def n_genes(self) -> int:
        """The number of genes."""
        return self.sample.n_genes

    @property
    def n_covariates(self) -> int:
        """The number of covariates a network is told, a category counting once for each of its levels."""
        return self.sample.n_covariates

    @property
    def device(self) -> torch.device:
        """Where batches are put."""
        return self.sample.device

    def told(self, covariates: Tensor) -> DiskProfiles:
        """The same cells as if these were their covariates (N, C)."""
        return replace(self, covariates=covariates.to(self.sample.x))

    def among(self, index: Tensor) -> Profiles:
        """The cells at `index` alone, resident, as a data set of their own."""
        some = self.batch(index)
        return Profiles(some.x, some.size_factors, some.covariates, some.labels)

    def _batch(self, values: Tensor, index: Tensor, n_cells: int | None) -> ProfileBatch:
        told = (self.size_factors, self.covariates, self.labels)
        rest = (None if given is None else given[index] for given in told)
        return ProfileBatch(values[0].to(self.device), index, len(self) if n_cells is None else n_cells, *rest)


AnyProfiles = Profiles | DiskProfiles
"""Profiles wherever they are, for what asks for one batch after the other."""
