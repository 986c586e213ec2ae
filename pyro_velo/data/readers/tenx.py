"""10x Genomics' `.h5`: HDF5 with one matrix of counts, genes x cells by column, in a group `matrix` or the genome's.

Reference: Cell Ranger's HDF5 feature-barcode matrix format, and that of its versions before 3.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pyro_velo.data.declared import check_claim, check_fits, explained, hdf5_claim
from pyro_velo.data.readers.names import unique_names
from pyro_velo.errors import InputError

if TYPE_CHECKING:
    from anndata import AnnData

PARTS = {"barcodes", "data", "indices", "indptr", "shape"}


def read_10x(path: Path) -> AnnData:
    """The AnnData, cells x genes, its counts in `X` (CSR) and gene ids in var `gene_ids`.

    Repeated gene names get their id appended. Of features of other kinds (antibodies, guides) none is read.

    Raises `InputError` for a file that isn't such a matrix, or one of several genomes.
    """
    import h5py

    claimed = hdf5_claim(path)
    check_claim(path, claimed=claimed, stored=path.stat().st_size)
    check_fits(path, claimed)
    with explained(path, "a 10x matrix"), h5py.File(path, "r") as file:
        groups = [name for name, item in file.items() if isinstance(item, h5py.Group) and set(item) >= PARTS]
        if len(groups) != 1:
            raise InputError(
                f"{path} isn't a 10x matrix: {len(groups)} of its groups hold {', '.join(sorted(PARTS))}, expected "
                "one; check the file, or write one genome to a file of its own."
            )
    import scanpy

    with explained(path, "a 10x matrix"):
        adata = scanpy.read_10x_h5(path)
        adata.var_names = unique_names(list(adata.var_names), list(adata.var["gene_ids"]))
    return adata
