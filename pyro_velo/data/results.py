"""An AnnData file that grows out of another: what is copied goes through memory in pieces, and so does what is added.

Both are `.h5ad` or `.zarr`, whichever.
"""

from __future__ import annotations

import warnings
from collections.abc import Container, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pyro_velo.data import anndata_keys as keys
from pyro_velo.data.checks import check_free
from pyro_velo.data.declared import explained
from pyro_velo.data.output import categorical, whole
from pyro_velo.data.stored import Matrix, Stored

if TYPE_CHECKING:
    import pandas as pd

PIECE_BYTES = 16 * 2**20
CHUNK_BYTES = 2**20
GZIP = {"compression": "gzip", "compression_opts": 1}
SPARSE = {"csr_matrix", "csc_matrix"}
TABLES = ("obs", "var", "uns")
"""What is read, changed and written anew."""


@contextmanager
def new_file(path: str | Path, overwrite: bool = False) -> Iterator[Any]:
    """An empty AnnData file to fill, which appears at `path` whole or not at all; raises `InputError` as `whole`."""
    import h5py
    import zarr
    from anndata import settings

    with whole(path, overwrite) as partial, warnings.catch_warnings():
        # anndata 0.12 announces future defaults of its zarr format; none changes what is read back.
        warnings.simplefilter("ignore")
        if partial.suffix.lower() == ".zarr":
            group = zarr.open_group(partial, mode="w", zarr_format=settings.zarr_write_format)
            yield _marked(group)
        else:
            with h5py.File(partial, "w") as file:
                yield _marked(file)


def copy_all(file: Stored, into: Any, *, leave_out: Container[str] = ()) -> None:
    """Copy every element but `obs`, `var`, `uns` and those of `leave_out`, named as in `layers/velocity`."""
    with explained(file.path, "AnnData"):
        for name in file.group:
            if name not in (*TABLES, "layers"):
                _copy(file.group[name], into, name, name, leave_out)
        for name in file.layers:
            if f"layers/{name}" not in leave_out:
                _copy(file.held(name), into["layers"], name, f"layers/{name}", leave_out)


def write_tables(into: Any, obs: pd.DataFrame, var: pd.DataFrame, uns: dict[str, Any]) -> None:
    """Write what is known of cells, of genes, and of how."""
    for name, value in zip(TABLES, (categorical(obs), categorical(var), uns), strict=True):
        write_element(into, name, value)


def write_element(into: Any, name: str, value: Any) -> None:
    """Write what is in memory."""
    from anndata.io import write_elem

    write_elem(into, name, value)


def new_layer(into: Any, name: str, shape: tuple[int, int], dtype: Any, rows: int, columns: int | None = None) -> Any:
    """An empty layer, to be filled `rows` cells and `columns` genes (None: all) at a time."""
    return _new_array(into["layers"], name, shape, dtype, (min(rows, shape[0]), columns or shape[1]))


def copy_genes(
    file: Stored, into: Any, genes: NDArray[np.int64], layers: dict[str, str], *, leave_out: Container[str] = ()
) -> None:
    """Copy every element but `obs`, `var` and `uns`, of the genes at `genes` alone.

    `layers` gives those of the file's layers that get another name, by that name; layers in `leave_out` are not copied.
    """
    from anndata.io import read_elem

    with explained(file.path, "AnnData"):
        for name in ("obsm", "obsp", "raw"):
            if name in file.group:
                _copy(file.group[name], into, name, name, ())
        for name in file.names("varm"):
            write_element(into["varm"], name, read_elem(file.group["varm"][name])[genes])
        for name in file.names("varp"):
            write_element(into["varp"], name, read_elem(file.group["varp"][name])[genes][:, genes])
        held = {name: name for name in file.layers if name not in leave_out and name not in layers} | layers
        for name, theirs in held.items():
            _copy_genes(file.layer(theirs), into["layers"], name, genes)
        if "X" in file.group and file.group["X"].attrs.get("encoding-type") != "null":
            _copy_genes(Matrix(file.group["X"], f"{file.path}: X"), into, "X", genes)


class NewCSR:
    """A csr matrix of G genes in a file, to which cells are added; `close` it in the end."""

    def __init__(self, into: Any, name: str, n_genes: int, dtype: Any) -> None:
        self._group, self._n_genes = into.create_group(name), n_genes
        self._parts = {
            part: _new_array(self._group, part, (0,), kind, (CHUNK_BYTES // np.dtype(kind).itemsize,))
            for part, kind in (("data", dtype), ("indices", np.int32))
        }
        self._ends = [np.zeros(1, np.int64)]

    def append(self, cells: Any) -> None:
        """Add cells (B, G), csr."""
        stored = self._parts["data"].shape[0]
        for part, values in (("data", cells.data), ("indices", cells.indices)):
            self._parts[part].resize((stored + len(values),))
            self._parts[part][stored:] = values
        self._ends.append(self._ends[-1][-1] + cells.indptr[1:].astype(np.int64))

    def close(self) -> None:
        """Write where each cell starts, and of what shape the matrix is."""
        write_element(self._group, "indptr", np.concatenate(self._ends))
        _mark(self._group, "csr_matrix", "0.1.0")
        self._group.attrs["shape"] = [sum(map(len, self._ends)) - 1, self._n_genes]


def check_results(file: Stored, *, overwrite: bool = False) -> None:
    """Raises `InputError` if keys that a fit writes are in the file already and may not be replaced."""
    held = {where: list(file.group[where]) if where in file.group else [] for where in ("layers", "obsm")}
    check_free({**held, "obs": file.obs.columns, "var": file.var.columns}, file.uns, overwrite=overwrite)


def replaced(file: Stored) -> list[str]:
    """The elements of an earlier fit, which are not copied."""
    arrows = [f"obsm/{keys.velocity_embedding(name)}" for name in file.names("obsm")]
    return [*(f"layers/{name}" for name in keys.LAYERS_OUT), *(f"obsm/{name}" for name in keys.OBSM_OUT), *arrows]


def _copy(held: Any, into: Any, name: str, where: str, leave_out: Container[str]) -> None:
    from anndata.io import read_elem

    kind = held.attrs.get("encoding-type", "")
    if kind == "array" and held.ndim and held.dtype.kind in "biuf":
        _copy_array(held, _new_array(into, name, held.shape, held.dtype, _chunks(held)))
    elif kind in SPARSE:
        group = into.create_group(name)
        group.attrs.update({key: _plain(value) for key, value in held.attrs.items()})
        for part in ("data", "indices", "indptr"):
            array = _new_array(group, part, held[part].shape, held[part].dtype, _chunks(held[part]))
            _copy_array(held[part], array)
    elif kind in ("dict", "raw"):
        group = _folder(into, name, kind)
        for part in held:
            if f"{where}/{part}" not in leave_out:
                _copy(held[part], group, part, f"{where}/{part}", leave_out)
    else:
        write_element(into, name, read_elem(held))


def _copy_genes(matrix: Matrix, into: Any, name: str, genes: NDArray[np.int64]) -> None:
    if matrix.sparse:
        grown = NewCSR(into, name, len(genes), matrix.dtype)
        for start, stop in matrix.bounds():
            grown.append(matrix.rows(start, stop)[:, genes])
        grown.close()
        return
    shape = (matrix.shape[0], len(genes))
    chunks = (max(1, min(shape[0], CHUNK_BYTES // (matrix.dtype.itemsize * max(1, shape[1])))), max(1, shape[1]))
    array = _new_array(into, name, shape, matrix.dtype, chunks)
    for start, stop in matrix.bounds():
        array[start:stop] = matrix.rows(start, stop)[:, genes]


def _copy_array(held: Any, into: Any) -> None:
    rows = max(1, PIECE_BYTES // max(1, held.dtype.itemsize * int(np.prod(held.shape[1:]))))
    step = held.chunks[0] if held.chunks else 1
    rows = rows // step * step or rows
    for start in range(0, held.shape[0], rows):
        into[start : start + rows] = held[start : start + rows]


def _chunks(held: Any) -> tuple[int, ...]:
    """Rows that make about a chunk."""
    width = max(1, held.dtype.itemsize * int(np.prod(held.shape[1:])))
    return (max(1, min(held.shape[0], CHUNK_BYTES // width)), *(max(1, length) for length in held.shape[1:]))


def _new_array(into: Any, name: str, shape: Sequence[int], dtype: Any, chunks: tuple[int, ...]) -> Any:
    import zarr

    if isinstance(into, zarr.Group):
        found = into.create_array(name, shape=tuple(shape), dtype=dtype, chunks=chunks)
    else:
        # What is empty may grow. The bytes of floats are shuffled: it takes a third less time, and some less room.
        grows = {"maxshape": (None, *shape[1:])} if shape[0] == 0 else {}
        found = into.create_dataset(name, shape=tuple(shape), dtype=dtype, chunks=chunks, shuffle=True, **GZIP, **grows)
    _mark(found, "array", "0.2.0")
    return found


def _plain(value: Any) -> Any:
    """An attribute as JSON, in which zarr keeps them."""
    return value.tolist() if isinstance(value, (np.ndarray, np.generic)) else value


def _marked(group: Any) -> Any:
    """A new file that says what it is, with the folders of its matrices."""
    _mark(group, "anndata", "0.1.0")
    for name in ("layers", "obsm", "varm", "obsp", "varp"):
        _folder(group, name)
    return group


def _folder(into: Any, name: str, kind: str = "dict") -> Any:
    if name in into:
        return into[name]
    group = into.create_group(name)
    _mark(group, kind, "0.1.0")
    return group


def _mark(element: Any, kind: str, version: str) -> None:
    element.attrs["encoding-type"], element.attrs["encoding-version"] = kind, version
