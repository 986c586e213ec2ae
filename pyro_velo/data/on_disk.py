"""A file to cells that stay on the disk: ranges from a sample, then both layers, scaled, into rows that are read fast.

The layers of an AnnData file are compressed, in chunks of many cells, or sparse: a cell costs its whole chunk. So they
are decoded once, checked on the way, and kept as plain float32 rows in a file without a name.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pyro_velo.data import anndata_keys as keys
from pyro_velo.data.bridge import Source, VelocityData, relative, stacked, velocity_data
from pyro_velo.data.checks import check_adata, check_whole
from pyro_velo.data.covariates import Design, design
from pyro_velo.data.declared import in_words
from pyro_velo.data.matrices import checked_matrix, sums
from pyro_velo.data.stored import Stored, state_of, stored
from pyro_velo.disk import DiskCells, Rows
from pyro_velo.errors import InputError

SAMPLE = 20_000
"""Cells whose ranges and start values stand for those of all; the 99th percentile is then one of 98.9 to 99.1."""


def velocity_data_on_disk(
    path: str | Path,
    *,
    as_is: bool = False,
    counts: bool = False,
    layers: tuple[str, str] | None = None,
    batch_key: str | None = None,
    covariates: Sequence[str] = (),
    device: str | torch.device = "cpu",
    scratch: str | Path | None = None,
    seed: int = 0,
) -> VelocityData:
    """As `velocity_data` of a file, `.h5ad` or `.zarr`, whose cells stay on the disk.

    `layers` names others, spliced and unspliced. The genes that are fitted, their ranges and start values are those
    of `SAMPLE` cells drawn by `seed`, and so those of `velocity_data` where there are no more. `scratch` is a folder
    for the cells, 8 bytes a cell and fitted gene for as long as the data are held (None: that of the file).

    Memory: 16 bytes a sampled cell and gene, 32 with `counts`, and some hundred bytes a cell.

    Raises `InputError` as `velocity_data` does, for a file that is damaged or changes meanwhile, layers whose rows
    can't be read alone, and a folder without room.
    """
    path, state = Path(path), state_of(Path(path)) if Path(path).exists() else (0, 0)
    with stored(path) as file:
        tables = file.tables()
        check_adata(tables)
        raw = as_is or counts
        names = layers or ((keys.SPLICED, keys.UNSPLICED) if raw else (keys.MS, keys.MU))
        ranges = (keys.MS, keys.MU) if counts and not as_is else names
        for name in names:
            _check_layer(file, name)
        numbers = sampled(len(tables), seed)
        some = velocity_data(
            file.among(numbers, list(dict.fromkeys((*names, *ranges)))),
            as_is=as_is,
            counts=counts,
            spliced=names[0],
            unspliced=names[1],
            device=device,
        )
        told = design(tables, batch_key, covariates)
        folder = path.absolute().parent if scratch is None else Path(scratch)
        rows, totals = _spilled(file, some, folder, counts=counts, refuse_empty=as_is)
    sizes = _sizes(tables.obs, totals, numbers, noted=not as_is) if counts else None
    if state_of(path) != state:
        raise InputError(f"{path} changed while it was read, expected it to stay as it is; start again.")
    cells = _cells(rows, some, told, numbers, sizes)
    return replace(
        some, cells=cells, cell_names=tables.obs_names, design=told, source=Source(path.absolute(), state, ranges)
    )


def _check_layer(file: Stored, name: str) -> None:
    if name == keys.MS and name not in file.layers:
        raise InputError(
            f"{file.path} has no layer {keys.MS!r}; present: {file.layers}. Prepare it first "
            "(pyro_velo.pp.prepare), or fit the layers as they are with as_is=True."
        )
    file.layer(name)


def sampled(n_cells: int, seed: int) -> NDArray[np.int64]:
    """The numbers of the sampled cells, ascending."""
    if n_cells <= SAMPLE:
        return np.arange(n_cells)
    return np.sort(np.random.default_rng(seed).choice(n_cells, SAMPLE, replace=False))


def blocks(file: Stored, names: Sequence[str]) -> Iterator[tuple[int, list[Any]]]:
    """Where each block of cells starts, and its part of each of the layers `names`, checked."""
    matrices = [file.layer(name) for name in names]
    for start, stop in matrices[0].bounds():
        parts = zip(names, matrices, strict=True)
        yield (
            start,
            [
                checked_matrix(matrix.rows(start, stop), f"Layer {name!r}", gene_names=file.var.index)
                for name, matrix in parts
            ],
        )


def _spilled(
    file: Stored, some: VelocityData, folder: Path, *, counts: bool, refuse_empty: bool
) -> tuple[Rows, NDArray[np.float64]]:
    """All cells as the likelihood wants them, and the totals of their unspliced and spliced RNA, (2, N)."""
    n_cells, n_genes = file.shape[0], int(some.genes.sum())
    check_room(folder, 8 * n_cells * n_genes)
    rows, totals = Rows(2, n_genes, folder), np.empty((2, n_cells))
    for start, (s, u) in blocks(file, some.layers):
        for name, layer in zip(some.layers, (s, u), strict=True):
            if counts:
                check_whole(layer, name)
        part = totals[:, start : start + s.shape[0]]
        part[:] = sums(u, 1), sums(s, 1)
        empty = part.sum(0) == 0
        if refuse_empty and empty.any():
            raise InputError(
                f"{int(empty.sum()):,} cells have no counts at all (first cell: "
                f"{file.obs.index[start + int(empty.argmax())]!r}), expected some in each; drop the empty cells."
            )
        rows.append(stacked(u, s, some.genes, None if counts else some.scaling))
    return rows, totals


def check_room(folder: Path, needed: int) -> None:
    """Raises `InputError` for a folder without room for so many bytes."""
    if not folder.is_dir() or shutil.disk_usage(folder).free < needed:
        raise InputError(
            f"{folder} has no room for the cells, expected {in_words(needed)}; free some, or name another folder "
            "(scratch)."
        )


def _sizes(obs: Any, totals: NDArray[np.float64], numbers: NDArray[np.int64], *, noted: bool) -> torch.Tensor:
    """How deeply each molecule of each cell was sequenced, 1 the sample's median: what preprocessing noted, or totals.

    Shapes: totals (2, N); returns (2, N, 1).
    """
    found = []
    for molecule, total in zip((keys.UNSPLICED, keys.SPLICED), totals, strict=True):
        key = keys.size_factor(molecule)
        known = noted and key in obs
        found.append(obs[key].to_numpy(np.float32) if known else relative(total, total[numbers]))
    return torch.from_numpy(np.stack(found))[..., None]


def _cells(
    rows: Rows, some: VelocityData, told: Design | None, numbers: NDArray[np.int64], sizes: torch.Tensor | None
) -> DiskCells:
    """The rows with what is known of the cells besides, and the sampled ones with their part of it."""
    sample, at = some.cells.sample, torch.from_numpy(numbers)
    matrix, group = (None, None) if told is None else told.tensors(sample.device)
    if told is not None and matrix is not None:
        at = at.to(sample.device)
        own = None if group is None else group[at]
        sample = replace(sample, covariates=matrix[at], group=own, n_groups=len(told.batches))
    return DiskCells(
        rows=rows,
        sample=sample,
        size_factors=None if sizes is None else sizes.to(sample.device),
        covariates=matrix,
        group=group,
    )
