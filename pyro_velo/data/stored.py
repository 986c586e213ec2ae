"""An AnnData file that stays on the disk: its tables are read, its layers come some cells at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from pyro_velo.data.anndata_keys import SPLICED, UNSPLICED
from pyro_velo.data.checks import check_known
from pyro_velo.data.declared import check_claim, explained, folder_size, free_memory, hdf5_claim, zarr_claim
from pyro_velo.data.output import is_zarr
from pyro_velo.errors import InputError

if TYPE_CHECKING:
    from anndata import AnnData

BLOCK_BYTES = 32 * 2**20
"""What a block of cells takes as float32."""
RENAMED = {SPLICED: "mature", UNSPLICED: "nascent"}
"""Our names, and those of kb-python's nac workflow that stand for them."""
SHARE = 0.5
"""The share of the free memory above which a file is left on the disk."""
ROWS_OF = {"csr_matrix", "array"}
"""The ways to store a matrix of which rows can be read alone."""


class Matrix:
    """A layer of N cells x G genes in a file, dense or csr."""

    def __init__(self, held: Any, what: str) -> None:
        from anndata.io import sparse_dataset

        kind = held.attrs.get("encoding-type", "array")
        if kind not in ROWS_OF:
            raise InputError(
                f"{what} is stored as {kind}, expected rows that can be read alone (csr or dense); convert it "
                "(scipy.sparse.csr_matrix) and write the file again."
            )
        self.what, self.sparse = what, kind == "csr_matrix"
        self.dtype = (held["data"] if self.sparse else held).dtype
        self._held = sparse_dataset(held) if kind == "csr_matrix" else held
        self.shape = (int(self._held.shape[0]), int(self._held.shape[1]))
        chunks = None if kind == "csr_matrix" else getattr(held, "chunks", None)
        self._chunk = chunks[0] if chunks else 1

    def rows(self, start: int, stop: int) -> Any:
        """The cells from `start` to `stop`, an array or csr. Raises `InputError` for a file that is damaged."""
        with explained(Path(self.what), "AnnData"):
            return self._held[start:stop]

    def bounds(self) -> Iterator[tuple[int, int]]:
        """Where blocks of cells start and stop, with chunks left whole."""
        n_cells, n_genes = self.shape
        wanted = max(1, BLOCK_BYTES // (4 * max(1, n_genes)))
        size = wanted // self._chunk * self._chunk or wanted
        yield from ((start, min(start + size, n_cells)) for start in range(0, n_cells, size))


class Stored:
    """An open AnnData file: `obs`, `var` and `uns` in memory, all else by name from its `group`."""

    def __init__(self, path: Path, group: Any) -> None:
        self.path, self.group = path, group
        self.obs, self.var = (self.element(name) for name in ("obs", "var"))
        self.uns = self.element("uns") if "uns" in group else {}

    def element(self, name: str) -> Any:
        """What stands under a name such as `obsp/distances`, in memory; raises `InputError` where it is damaged."""
        from anndata.io import read_elem

        with explained(self.path, "AnnData"):
            return read_elem(self.group[name])

    def names(self, where: str) -> list[str]:
        """The names in obsm, layers, ...."""
        return list(self.group[where]) if where in self.group else []

    @property
    def shape(self) -> tuple[int, int]:
        """Cells and genes."""
        return len(self.obs), len(self.var)

    @property
    def layers(self) -> list[str]:
        """The names of the layers, ours for those of kb-python."""
        found = self.names("layers")
        ours = {theirs: ours for ours, theirs in RENAMED.items() if ours not in found}
        return [ours.get(name, name) for name in found]

    def held(self, name: str) -> Any:
        """What a layer is stored as. Raises `InputError` for one that isn't there."""
        check_known(name, self.layers, "Layer")
        layers = self.group["layers"]
        return layers[name if name in layers else RENAMED[name]]

    def layer(self, name: str) -> Matrix:
        """A layer. Raises `InputError` for one that isn't there, of another shape, or whose rows can't be read."""
        found = Matrix(self.held(name), f"{self.path}: layer {name!r}")
        if found.shape != self.shape:
            raise InputError(
                f"{found.what} has the shape {found.shape}, expected cells x genes {self.shape}; write the file again."
            )
        return found

    def matrix(self, layer: str | None) -> Matrix:
        """A layer, or X (None). Raises `InputError` as `layer`."""
        if layer is not None:
            return self.layer(layer)
        if "X" not in self.group or self.group["X"].attrs.get("encoding-type") == "null":
            raise InputError(f"{self.path} has no X, expected a matrix there; name a layer.")
        return Matrix(self.group["X"], f"{self.path}: X")

    def tables(self) -> AnnData:
        """An AnnData of all cells and genes that holds obs and var, and no matrix."""
        from anndata import AnnData

        return AnnData(obs=self.obs, var=self.var)

    def among(self, numbers: NDArray[np.int64], names: Sequence[str]) -> AnnData:
        """The cells at `numbers`, ascending, with the layers `names`, in memory."""
        from anndata import AnnData

        layers = {name: rows_among(self.layer(name), numbers) for name in names}
        return AnnData(obs=self.obs.iloc[numbers], var=self.var, layers=layers)


def rows_among(matrix: Matrix, numbers: NDArray[np.int64]) -> Any:
    """The cells at `numbers`, ascending, in memory."""
    parts = []
    for start, stop in matrix.bounds():
        wanted = numbers[np.searchsorted(numbers, start) : np.searchsorted(numbers, stop)] - start
        if len(wanted):
            parts.append(matrix.rows(start, stop)[wanted])
    return sparse.vstack(parts, format="csr") if sparse.issparse(parts[0]) else np.concatenate(parts)


@contextmanager
def stored(path: str | Path) -> Iterator[Stored]:
    """The AnnData file at `path`, `.h5ad` or `.zarr`, open to be read.

    Raises `InputError` for a path that isn't there or is no such file, and for one that is damaged or was cut short.
    """
    path = Path(path)
    with _group(path) as group:
        missing = {"obs", "var"} - set(group)
        if missing:
            raise InputError(f"{path} isn't an AnnData, expected 'obs' and 'var' in it; check the file.")
        yield Stored(path, group)


@contextmanager
def _group(path: Path) -> Iterator[Any]:
    import h5py
    import zarr

    check_claim(path, claimed=claim(path), stored=folder_size(path) if path.is_dir() else path.stat().st_size)
    if path.is_dir():
        with explained(path, "zarr"):
            group = zarr.open_group(path, mode="r")
        yield group
        return
    with explained(path, "HDF5"):
        file = h5py.File(path, "r")
    with file:
        yield file


def claim(path: Path) -> int:
    """Bytes that the file's arrays take in memory. Raises `InputError` for a path that is no `.h5ad` or `.zarr`."""
    if not path.exists():
        raise InputError(f"{path} doesn't exist, expected a file or folder to read; check the path.")
    if is_zarr(path):
        return zarr_claim(path)
    if path.is_file() and path.suffix.lower() == ".h5ad":
        return hdf5_claim(path)
    raise InputError(f"{path} can't be left on the disk, expected .h5ad or .zarr; convert it to one.")


def is_large(path: Path) -> bool:
    """Whether a file's arrays would take more than half of the memory that is free."""
    free = free_memory()
    kind = is_zarr(path) or (path.is_file() and path.suffix.lower() == ".h5ad")
    return kind and free is not None and claim(path) > SHARE * free


def state_of(path: Path) -> tuple[int, int]:
    """What changes when a file does: its bytes, and when it was last written, in ns."""
    files = [file.stat() for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path.stat()]
    return sum(file.st_size for file in files), max(file.st_mtime_ns for file in files)
