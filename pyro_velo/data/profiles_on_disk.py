"""A file to profiles of cells that stay on the disk, and what an autoencoder says of them into a copy of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pyro_velo.data import anndata_keys as keys
from pyro_velo.data.bridge import Source
from pyro_velo.data.checks import check_adata, check_whole
from pyro_velo.data.covariates import design
from pyro_velo.data.matrices import checked_matrix
from pyro_velo.data.on_disk import check_room, sampled
from pyro_velo.data.profile_data import (
    WRITTEN,
    ProfileData,
    check_not_empty,
    check_profiles_free,
    dense,
    numbered_labels,
    profile_data,
    put_cells,
)
from pyro_velo.data.results import copy_all, new_file, new_layer, write_element, write_tables
from pyro_velo.data.stored import Stored, rows_among, state_of, stored
from pyro_velo.disk import Rows
from pyro_velo.disk_profiles import DiskProfiles
from pyro_velo.errors import InputError
from pyro_velo.profiles import Profiles, sizes_of


def profile_data_on_disk(
    path: str | Path,
    *,
    layer: str | None = None,
    counts: bool = True,
    depth: bool = True,
    condition_key: str | None = None,
    covariates: Sequence[str] = (),
    label_key: str | None = None,
    device: str | torch.device = "cpu",
    scratch: str | Path | None = None,
    seed: int = 0,
) -> ProfileData:
    """As `profile_data` of a file, `.h5ad` or `.zarr`, whose cells stay on the disk.

    The genes that are fitted, and the median of the totals, are those of `on_disk.SAMPLE` cells drawn by `seed`.
    `scratch` is a folder for 4 bytes a cell and fitted gene (None: that of the file).

    Raises `InputError` as `profile_data` and `velocity_data_on_disk` do.
    """
    from anndata import AnnData

    path, state = Path(path), state_of(Path(path)) if Path(path).exists() else (0, 0)
    name = "X" if layer is None else layer
    with stored(path) as file:
        tables = file.tables()
        check_adata(tables)
        numbers = sampled(len(tables), seed)
        some = rows_among(file.matrix(layer), numbers)
        of_sample = profile_data(
            AnnData(X=some, obs=file.obs.iloc[numbers], var=file.var), counts=counts, depth=depth, device=device
        )
        told = design(tables, condition_key, covariates)
        known, labels = numbered_labels(tables, label_key)
        folder = path.absolute().parent if scratch is None else Path(scratch)
        rows, totals = _spilled(file, layer, of_sample.genes, folder, counts=counts)
    if state_of(path) != state:
        raise InputError(f"{path} changed while it was read, expected it to stay as it is; start again.")
    at = torch.from_numpy(numbers).to(device)
    rest: dict[str, Any] = {
        "size_factors": _sizes(totals, numbers, depth=depth).to(device) if counts else None,
        "covariates": None if told is None else told.tensors(device)[0],
        "labels": None if known is None else torch.from_numpy(known).to(device),
    }
    own = {key: None if value is None else value[at] for key, value in rest.items()}
    sample = Profiles(of_sample.resident.x, **own)
    options: dict[str, Any] = {"layer": layer, "counts": counts, "depth": depth, "condition_key": condition_key}
    return replace(
        of_sample,
        profiles=DiskProfiles(rows=rows, sample=sample, **rest),
        cell_names=tables.obs_names,
        layer=name,
        design=told,
        labels=labels,
        options=options | {"covariates": list(covariates), "label_key": label_key},
        source=Source(path.absolute(), state, (name, name)),
    )


def _spilled(
    file: Stored, layer: str | None, genes: NDArray[np.bool_], folder: Path, *, counts: bool
) -> tuple[Rows, NDArray[np.float64]]:
    """All cells' profiles of `genes`, checked on the way, and their totals (N,)."""
    n_cells, n_genes, name = file.shape[0], int(genes.sum()), "X" if layer is None else layer
    check_room(folder, 4 * n_cells * n_genes)
    rows, totals, held = Rows(1, n_genes, folder), np.empty(n_cells), file.matrix(layer)
    for start, stop in held.bounds():
        block = checked_matrix(held.rows(start, stop), f"Layer {name!r}", gene_names=file.var.index)
        if counts:
            check_whole(block, name)
            check_not_empty(block, file.obs.index[start:stop], name)
        x = dense(block[:, genes])
        totals[start:stop] = x.sum(1, dtype=np.float64)
        rows.append(torch.from_numpy(x)[None])
    return rows, totals


def _sizes(totals: NDArray[np.float64], numbers: NDArray[np.int64], *, depth: bool) -> torch.Tensor:
    """Each cell's total over the median one of the sample, or 1 where depth is to be explained: (N, 1)."""
    every = torch.from_numpy(totals)[:, None]
    return (sizes_of(every, every[torch.from_numpy(numbers)]) if depth else torch.ones_like(every)).float()


def check_profile_results(file: Stored, *, overwrite: bool = False) -> None:
    """Raises `InputError` if keys that an autoencoder writes are in the file already and may not be replaced."""
    held = {"obs": file.obs.columns, "obsm": file.names("obsm"), "layers": file.names("layers")}
    check_profiles_free(held, overwrite=overwrite)


@contextmanager
def profiles_file(
    data: ProfileData, path: str | Path, *, about: dict[str, Any], overwrite: bool = False
) -> Iterator[ProfilesFile]:
    """A copy of the file that `data` were read from, to be filled; it appears at `path` whole or not at all.

    Raises `InputError` for cells in memory, a file that has changed since, or that holds an autoencoder's results.
    """
    source = data.source
    if source is None:
        raise InputError("Expected a fit of cells on disk, to write to a file; got cells in memory. Pass the AnnData.")
    source.check()
    with stored(source.path) as file:
        check_profile_results(file, overwrite=overwrite)
        with new_file(path, overwrite) as into:
            copy_all(file, into, leave_out=[f"{where}/{name}" for where, names in WRITTEN.items() for name in names])
            yield ProfilesFile(file, into, data)
            write_tables(into, file.obs, file.var, file.uns | {keys.UNS_VAE: about})
            source.check()


class ProfilesFile:
    """What an autoencoder says of cells, on its way into a file."""

    def __init__(self, file: Stored, into: Any, data: ProfileData) -> None:
        self._file, self._into, self._data = file, into, data

    def put(self, latent: NDArray[Any], probabilities: NDArray[Any] | None) -> None:
        """Latent means (N, d) and the clusters' probabilities (N, K)."""
        found: dict[str, Any] = {}
        self._file.obs.drop(columns=keys.VAE_CLUSTER, errors="ignore", inplace=True)
        put_cells(self._file.obs, found, self._data, latent, probabilities)
        for name, values in found.items():
            write_element(self._into["obsm"], name, values)

    def denoise(self, blocks: Iterator[NDArray[np.float32]], rows: int) -> None:
        """Denoised profiles, `rows` cells at a time; genes that are the same in every cell hold NaN."""
        layer, start = new_layer(self._into, keys.VAE_DENOISED, self._file.shape, np.float32, rows), 0
        for block in blocks:
            values = np.full((len(block), self._file.shape[1]), np.nan, np.float32)
            values[:, self._data.genes] = block
            layer[start : start + len(block)] = values
            start += len(block)
