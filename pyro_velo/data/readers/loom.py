"""velocyto's `.loom`: HDF5 with dense genes x cells matrices and one attribute array a column of obs or var.

Reference: the loom file format specification, versions 2.0.1 and 3.0.0.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from pyro_velo.data.declared import check_claim, explained, hdf5_claim
from pyro_velo.data.readers.names import unique_names
from pyro_velo.errors import InputError

if TYPE_CHECKING:
    from anndata import AnnData

BLOCK = 2**25
"""Bytes of a dense matrix held at a time."""
CELL_NAMES = ("CellID", "obs_names", "barcode", "cell_names")
GENE_NAMES = ("Gene", "var_names", "gene_name", "target_name", "gene_names", "gene_id")
GENE_IDS = ("Accession", "gene_ids", "gene_id", "target_id")
"""Attributes that name cells and genes, velocyto's first, then those of scanpy and kb-python."""

Attributes = Mapping[str, NDArray[Any]]


def read_loom(path: Path) -> AnnData:
    """The AnnData, cells x genes, every matrix as csr of signed integers or float32; X is the file's `matrix`.

    Genes are named by `Gene`, repeated ones with their `Accession` appended. Dense blocks of 32 MiB are read and made
    sparse one by one, so that memory grows with the counts and not with cells x genes.

    Raises `InputError` for a file that isn't loom, and for matrices and attributes whose sizes disagree.
    """
    import h5py
    import pandas as pd
    from anndata import AnnData

    check_claim(path, claimed=hdf5_claim(path), stored=path.stat().st_size)
    with explained(path, "loom"), h5py.File(path, "r") as file:
        if not {"matrix", "row_attrs", "col_attrs"} <= set(file):
            raise InputError(f"{path} isn't a loom file, expected matrix, row_attrs and col_attrs; check the file.")
        shape = file["matrix"].shape
        genes, cells = (
            _attributes(file[f"{axis}_attrs"], path, n) for axis, n in zip(("row", "col"), shape, strict=True)
        )
        layers = {name: _cells_by_genes(data, path, shape) for name, data in file.get("layers", {}).items()}
        total = _cells_by_genes(file["matrix"], path, shape)
    cell_key, gene_key = _first(cells, CELL_NAMES, path, "cells"), _first(genes, GENE_NAMES, path, "genes")
    gene_names = list(map(str, genes[gene_key]))
    id_key = next((key for key in GENE_IDS if key in genes and key != gene_key), None)
    if id_key is not None:
        gene_names = unique_names(gene_names, list(map(str, genes[id_key])))
    return AnnData(
        X=total,
        obs=pd.DataFrame(_flat(cells, cell_key), index=pd.Index(cells[cell_key].astype(str), dtype=object)),
        var=pd.DataFrame(_flat(genes, gene_key), index=pd.Index(gene_names, dtype=object)),
        obsm={key: value for key, value in cells.items() if value.ndim == 2},
        layers=layers,
    )


def _cells_by_genes(dataset: Any, path: Path, shape: tuple[int, int]) -> sparse.csr_matrix:
    if dataset.shape != shape:
        raise InputError(
            f"{path}: {dataset.name} has the shape {dataset.shape}, expected {shape} as the matrix; write it again."
        )
    n_genes, n_cells = shape
    width = dataset.chunks[1] if dataset.chunks else 1
    step = max(1, BLOCK // max(1, n_genes * dataset.dtype.itemsize * width)) * width
    blocks = [sparse.csr_matrix(_signed(dataset[:, start : start + step]).T) for start in range(0, n_cells, step)] or [
        sparse.csr_matrix((0, n_genes), dtype=np.float32)
    ]
    return blocks[0] if len(blocks) == 1 else sparse.vstack(blocks, format="csr")


def _signed(block: NDArray[Any]) -> NDArray[Any]:
    """Unsigned counts wrap around when they are subtracted; doubles carry no more than floats here."""
    if block.dtype.kind == "f":
        return block.astype(np.float32)
    large = block.size and block.max() > np.iinfo(np.int32).max
    return block.astype(np.int64 if large else np.int32)


def _attributes(group: Any, path: Path, length: int) -> dict[str, NDArray[Any]]:
    found = {}
    for name, dataset in group.items():
        if dataset.shape[:1] != (length,):
            raise InputError(
                f"{path}: {dataset.name} has the shape {dataset.shape}, expected {length} entries as in the matrix; "
                "write it again."
            )
        found[name] = dataset.asstr()[()] if dataset.dtype.kind in "OS" else dataset[()]
    return found


def _first(attributes: Attributes, candidates: tuple[str, ...], path: Path, what: str) -> str:
    for name in candidates:
        if name in attributes:
            return name
    listed = ", ".join(map(repr, attributes)) or "none"
    raise InputError(
        f"{path} names no {what}: its attributes are {listed}, expected one of {', '.join(map(repr, candidates))}; "
        "rename the one that holds the names."
    )


def _flat(attributes: Attributes, names: str) -> dict[str, NDArray[Any]]:
    """The one-dimensional attributes, but for the names themselves."""
    return {key: value for key, value in attributes.items() if value.ndim == 1 and key != names}
