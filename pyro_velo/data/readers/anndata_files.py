"""AnnData's own files, `.h5ad` and `.zarr`, which are also what kb-python and every Python peer write."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pyro_velo.data.declared import check_claim, check_fits, explained, folder_size, hdf5_claim, zarr_claim
from pyro_velo.errors import InputError

if TYPE_CHECKING:
    from anndata import AnnData


def read_h5ad(path: Path) -> AnnData:
    """The AnnData of an `.h5ad` file, checked for what it claims before it is read."""
    import anndata
    import h5py

    claimed = hdf5_claim(path)
    check_claim(path, claimed=claimed, stored=path.stat().st_size)
    check_fits(path, claimed)
    with explained(path, "HDF5"), h5py.File(path, "r") as file:
        _check_groups(path, set(file))
    with explained(path, "AnnData"):
        return anndata.read_h5ad(path)


def read_zarr(path: Path) -> AnnData:
    """The AnnData of a `.zarr` folder, checked for what it claims before it is read."""
    import anndata
    import zarr

    claimed = zarr_claim(path)
    check_claim(path, claimed=claimed, stored=folder_size(path))
    check_fits(path, claimed)
    with explained(path, "zarr"):
        _check_groups(path, set(zarr.open_group(path, mode="r")))
    with explained(path, "AnnData"):
        return anndata.read_zarr(path)


def _check_groups(path: Path, found: set[str]) -> None:
    if not {"obs", "var"} <= found:
        listed = ", ".join(map(repr, sorted(found)[:10])) or "nothing"
        raise InputError(f"{path} isn't an AnnData: it holds {listed}, expected 'obs' and 'var'; check the file.")
