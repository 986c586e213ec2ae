"""From a path to an AnnData: one reader a format, chosen by what the path is.

Memory, as measured on 10,000 cells x 5,000 genes: a sparse layer keeps 8 bytes per count that isn't zero, and reading
peaks at 12 (.h5ad, .zarr) to 17 (.loom, STARsolo) of them; a dense layer takes its 4 or 8 bytes per cell and gene.
`checked_layers` then adds 8 bytes per count, or 4 per cell and gene if dense. A loom file is never held dense.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from pyro_velo.data.anndata_keys import SPLICED, UNSPLICED
from pyro_velo.data.matrices import check_sparse
from pyro_velo.data.output import is_zarr
from pyro_velo.data.readers import alevin_fry, anndata_files, loom, starsolo, tenx
from pyro_velo.errors import InputError

if TYPE_CHECKING:
    from anndata import AnnData

RENAMED = {"mature": SPLICED, "nascent": UNSPLICED}
"""The names of kb-python's nac workflow, and ours."""


class Format(NamedTuple):
    """How a format is recognised, and how it is read."""

    recognises: Callable[[Path], bool]
    read: Callable[[Path], AnnData]


def _file(suffix: str) -> Callable[[Path], bool]:
    return lambda path: path.is_file() and path.suffix.lower() == suffix


FORMATS = {
    "AnnData .h5ad (also kb-python's)": Format(_file(".h5ad"), anndata_files.read_h5ad),
    "AnnData .zarr folder": Format(is_zarr, anndata_files.read_zarr),
    "velocyto .loom": Format(_file(".loom"), loom.read_loom),
    "10x .h5": Format(_file(".h5"), tenx.read_10x),
    "STARsolo Velocyto/ folder": Format(lambda path: starsolo.find(path) is not None, starsolo.read_starsolo),
    "alevin-fry quant folder": Format(lambda path: alevin_fry.find(path) is not None, alevin_fry.read_alevin_fry),
}


def read(path: str | Path) -> AnnData:
    """The AnnData of N cells x G genes at `path`, with the layers `spliced` and `unspliced` where the format has them.

    Formats: `.h5ad`, `.zarr`, velocyto `.loom`, a STARsolo `Velocyto/` folder (or one above it; `filtered/` before
    `raw/`), an alevin-fry folder in USA mode; 10x Genomics' `.h5`, which has one matrix, in `X`. kb-python's `mature`
    and `nascent` become `spliced` and `unspliced`; its `ambiguous` stays a layer of its own, while alevin-fry's is
    added to spliced, as its authors' velocity mode does. Repeated gene names of loom, STARsolo, alevin-fry and 10x get
    their gene id appended; those of an AnnData are left for `checked_layers` to refuse. The counts themselves are
    checked there too, not here.

    Raises `InputError` for a path that isn't there or has no known format, and for a file that is damaged, claims more
    than it holds, or doesn't fit into memory.
    """
    path = Path(path)
    if not path.exists():
        raise InputError(f"{path} doesn't exist, expected a file or folder to read; check the path.")
    for known in FORMATS.values():
        if known.recognises(path):
            with warnings.catch_warnings():
                # Old layouts still read, and repeated names are an error of their own later: no second message.
                warnings.simplefilter("ignore")
                return _finished(known.read(path), path)
    kind = "a folder" if path.is_dir() else "a file"
    raise InputError(f"{path} is {kind} of no known format, expected one of: {', '.join(FORMATS)}; convert it to one.")


def _finished(adata: AnnData, path: Path) -> AnnData:
    for name, matrix in [("X", adata.X), *adata.layers.items()]:
        check_sparse(matrix, f"{path}: {name}")
    for theirs, ours in RENAMED.items():
        if theirs in adata.layers and ours not in adata.layers:
            adata.layers[ours] = adata.layers.pop(theirs)
    return adata
