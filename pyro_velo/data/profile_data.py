"""One matrix of an AnnData to tensors, and what an autoencoder says of its cells back into it."""

from __future__ import annotations

import zlib
from collections.abc import Container, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse

from pyro_velo.data import anndata_keys as keys
from pyro_velo.data.bridge import Source
from pyro_velo.data.checks import check_adata, check_key, check_whole
from pyro_velo.data.covariates import Design, design
from pyro_velo.data.matrices import checked_matrix, entries
from pyro_velo.disk_profiles import AnyProfiles, DiskProfiles
from pyro_velo.errors import InputError
from pyro_velo.profiles import UNKNOWN, Profiles

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData

Array = NDArray[np.float32]
CELLS_AT_ONCE = 4096


@dataclass(frozen=True)
class ProfileData:
    """What is fitted: the profiles, which genes of the AnnData they are (`genes`, a mask), and what is told of cells.

    `layer` names what it was read from ("X" for `X`), `labels` the clusters that have a name, in their order; `options`
    is what `profile_data` was asked for; `source` the file of cells that are on disk.
    """

    profiles: AnyProfiles
    cell_names: pd.Index
    genes: NDArray[np.bool_]
    gene_names: list[str]
    layer: str
    design: Design | None = None
    labels: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    source: Source | None = None

    @property
    def resident(self) -> Profiles:
        """The cells, all of them in memory. Raises `InputError` where they are on disk."""
        if isinstance(self.profiles, Profiles):
            return self.profiles
        raise InputError(
            f"Expected the {len(self.profiles):,} cells in memory, because this looks at all of them at once; they are "
            "on disk. Read the file (pyro_velo.read) and fit that, or take fewer cells."
        )

    def describe(self) -> dict[str, Any]:
        """What two fits must agree on to be of the same data, as JSON; `checksum` is of every number (CRC-32)."""
        cells, checksum = self.profiles, 0
        every = cells.batches(torch.arange(len(cells), device=cells.device), CELLS_AT_ONCE)
        numbers = (batch.x for batch in every) if isinstance(cells, DiskProfiles) else (cells.x,)
        for each in (*numbers, cells.size_factors, cells.covariates, cells.labels):
            if each is not None:
                checksum = zlib.crc32(np.ascontiguousarray(each.cpu().numpy()).data, checksum)
        names = {"n_cells": len(self.cell_names), "genes": self.gene_names, "labels": list(self.labels)}
        return names | {"data": dict(self.options), "checksum": checksum}

    def as_if(self, column: str, level: str) -> torch.Tensor:
        """The covariates (N, C) as if every cell's category in a column of obs were `level`.

        Raises `InputError` for a column that is no category that was told to the networks, and for an unknown level.
        """
        known = {} if self.design is None else self.design.levels
        if column not in known:
            raise InputError(
                f"Expected a category that the fit was told ({', '.join(known) or 'none'}); got {column!r}. "
                "Fit with that condition or covariate."
            )
        if level not in known[column]:
            raise InputError(f"Expected a level of {column!r} ({', '.join(known[column])}); got {level!r}. Name one.")
        assert self.profiles.covariates is not None and self.design is not None
        covariates = self.profiles.covariates.clone()
        columns = self.design.columns[column]
        covariates[:, columns] = 0
        covariates[:, columns.start + known[column].index(level)] = 1
        return covariates


def profile_data(
    adata: AnnData,
    *,
    layer: str | None = None,
    counts: bool = True,
    depth: bool = True,
    condition_key: str | None = None,
    covariates: Sequence[str] = (),
    label_key: str | None = None,
    device: str | torch.device = "cpu",
) -> ProfileData:
    """The genes of `layer` (None: `X`) that differ between cells, as they stand; with `counts` they must be whole.

    Each cell's size factor is its total over the median, or 1 for all where depth is part of what is to be explained
    (`depth=False`). `condition_key` and `covariates` are columns of obs (see `data.covariates.design`); `label_key`
    is one in which a missing value is a cell whose label nobody knows.

    Memory: 4 bytes a cell and gene, and 4 more while it is made.

    Raises `InputError` for missing, malformed, NaN, infinite or negative values, counts that are not whole, cells
    without counts, labels that are missing in every cell, and where no gene differs between cells.
    """
    check_adata(adata)
    if layer is not None:
        check_key(adata, "layers", layer)
    name = "X" if layer is None else layer
    if layer is None and adata.X is None:
        raise InputError("The AnnData has no X, expected a matrix there; name a layer.")
    matrix = checked_matrix(
        adata.X if layer is None else adata.layers[layer], f"Layer {name!r}", gene_names=adata.var_names
    )
    if counts:
        check_whole(matrix, name)
        check_not_empty(matrix, adata.obs_names, name)
    genes = _vary(matrix)
    if not genes.any():
        raise InputError(f"Layer {name!r} is the same in every cell, expected genes that differ; pass another layer.")
    x = torch.from_numpy(dense(matrix[:, genes])).to(device)
    told = design(adata, condition_key, covariates)
    numbers, labels = numbered_labels(adata, label_key)
    known: dict[str, Any] = {
        "covariates": None if told is None else torch.from_numpy(told.matrix).to(device),
        "labels": None if numbers is None else torch.from_numpy(numbers).to(device),
    }
    profiles = Profiles.of_counts(x, depth=depth, **known) if counts else Profiles(x, **known)
    gene_names = adata.var_names[genes].tolist()
    options: dict[str, Any] = {"layer": layer, "counts": counts, "depth": depth, "condition_key": condition_key}
    options |= {"covariates": list(covariates), "label_key": label_key}
    return ProfileData(profiles, adata.obs_names, genes, gene_names, name, told, labels, options)


def numbered_labels(adata: AnnData, key: str | None) -> tuple[NDArray[np.int64] | None, tuple[str, ...]]:
    """Each cell's label as a number, `UNKNOWN` where it is missing, and the labels' names."""
    if key is None:
        return None, ()
    check_key(adata, "obs", key)
    column = adata.obs[key]
    missing = column.isna().to_numpy()
    if missing.all():
        raise InputError(f"obs[{key!r}] is missing in every cell, expected labels for some; leave it out.")
    names, codes = np.unique(column[~missing].astype(str).to_numpy(), return_inverse=True)
    numbers = np.full(len(column), UNKNOWN, np.int64)
    numbers[~missing] = codes
    return numbers, tuple(map(str, names))


def check_not_empty(matrix: Any, cell_names: pd.Index, name: str) -> None:
    """Raises `InputError`, naming the first of them, for cells without counts."""
    empty = np.asarray(matrix.sum(axis=1)).ravel() == 0
    if empty.any():
        raise InputError(
            f"Layer {name!r} holds no counts at all for {int(empty.sum()):,} of {len(cell_names):,} cells (first cell: "
            f"{cell_names[int(empty.argmax())]!r}), expected some in each; drop the empty cells."
        )


def _vary(matrix: Any) -> NDArray[np.bool_]:
    """(G,) whether a gene differs between cells."""
    if not len(entries(matrix)):
        return np.zeros(matrix.shape[1], bool)
    low, high = (np.asarray(dense(getattr(matrix, each)(axis=0))).ravel() for each in ("min", "max"))
    return np.asarray(high > low)


def dense(matrix: Any) -> Array:
    """A matrix as float32, C-ordered."""
    return np.ascontiguousarray(matrix.toarray() if sparse.issparse(matrix) else matrix, np.float32)


def check_profile_keys(adata: AnnData, *, overwrite: bool = False) -> None:
    """Raises `InputError`, listing them, if keys that an autoencoder writes are there and may not be replaced."""
    check_profiles_free({where: getattr(adata, where) for where in WRITTEN}, overwrite=overwrite)


WRITTEN = {"obs": (keys.VAE_CLUSTER,), "obsm": (keys.VAE, keys.VAE_PROBABILITIES), "layers": (keys.VAE_DENOISED,)}
"""Where an autoencoder writes what."""


def check_profiles_free(held: Mapping[str, Container[str]], *, overwrite: bool = False) -> None:
    """As `check_profile_keys`, of the keys that are `held` in obs, obsm and layers."""
    taken = [f"{where}[{key!r}]" for where, names in WRITTEN.items() for key in names if key in held[where]]
    if taken and not overwrite:
        raise InputError(
            f"The AnnData holds an autoencoder's results already ({', '.join(taken)}), expected none of these keys; "
            "pass overwrite to replace them."
        )


def write_profiles(
    adata: AnnData,
    data: ProfileData,
    *,
    latent: NDArray[Any],
    probabilities: NDArray[Any] | None,
    denoised: NDArray[Any] | None,
    about: dict[str, Any],
) -> None:
    """Put the latent means (N, d), the clusters' probabilities (N, K) and denoised profiles where `anndata_keys` says.

    Genes that are the same in every cell hold NaN in the denoised layer. Keys of an earlier fit that this one has
    nothing for are removed. Raises `InputError` where `adata` is not of the cells and genes that were fitted.
    """
    same = adata.shape == (len(data.cell_names), len(data.genes)) and adata.obs_names.equals(data.cell_names)
    if not same or adata.var_names[data.genes].tolist() != data.gene_names:
        raise InputError("Expected the AnnData that was fitted, its cells and genes in their order; got another.")
    if adata.is_view:
        adata._init_as_actual(adata.copy())
    for where, key in (("obs", keys.VAE_CLUSTER), ("obsm", keys.VAE_PROBABILITIES), ("layers", keys.VAE_DENOISED)):
        if key in getattr(adata, where):
            del getattr(adata, where)[key]
    put_cells(adata.obs, adata.obsm, data, latent, probabilities)
    if denoised is not None:
        layer = np.full(adata.shape, np.nan, np.float32)
        layer[:, data.genes] = denoised
        adata.layers[keys.VAE_DENOISED] = layer
    adata.uns[keys.UNS_VAE] = about


def put_cells(
    obs: pd.DataFrame,
    obsm: MutableMapping[str, Any],
    data: ProfileData,
    latent: NDArray[Any],
    probabilities: NDArray[Any] | None,
) -> None:
    """Put what each cell has but once into its tables."""
    import pandas as pd

    obsm[keys.VAE] = latent.astype(np.float32)
    if probabilities is not None:
        names = cluster_names(data.labels, probabilities.shape[1])
        obs[keys.VAE_CLUSTER] = pd.Categorical.from_codes(probabilities.argmax(1), list(names))
        obsm[keys.VAE_PROBABILITIES] = probabilities.astype(np.float32)


def cluster_names(labels: Sequence[str], n_clusters: int) -> tuple[str, ...]:
    """The labels' names, and numbers for the clusters that have none.

    >>> cluster_names(("Alpha", "Beta"), 4)
    ('Alpha', 'Beta', '2', '3')
    """
    return (*labels, *map(str, range(len(labels), n_clusters)))
