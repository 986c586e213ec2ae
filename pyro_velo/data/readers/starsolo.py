"""STARsolo's `Velocyto/` output: genes x cells Matrix Market files beside `features.tsv` and `barcodes.tsv`.

STAR of 2.7.4 and later writes `spliced.mtx`, `unspliced.mtx` and `ambiguous.mtx`; before, one `matrix.mtx` held the
three counts as columns, in that order. Reference: Kaminow, Yunusov & Dobin 2021.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pyro_velo.data.anndata_keys import SPLICED, UNSPLICED
from pyro_velo.data.readers.matrix_market import read_coordinate
from pyro_velo.data.readers.names import plain_or_gz, read_columns, unique_names
from pyro_velo.errors import InputError

if TYPE_CHECKING:
    from anndata import AnnData

COUNTS = (SPLICED, UNSPLICED, "ambiguous")
WITHIN = tuple(
    f"{above}{kind}" for above in ("", "Velocyto/", "Solo.out/Velocyto/") for kind in ("", "filtered", "raw")
)
"""Where the files are looked for below the path, first come first."""


def find(path: Path) -> Path | None:
    """The folder at or below `path` that holds the matrices, or None."""
    return next((path / place for place in WITHIN if _is_quantified(path / place)), None)


def read_starsolo(path: Path) -> AnnData:
    """The AnnData, cells x genes, with the layers spliced, unspliced and ambiguous as csr.

    Genes are named by symbol (repeated ones with the gene id appended) and keep their id in var `gene_ids`.
    """
    import pandas as pd
    from anndata import AnnData

    folder = find(path)
    assert folder is not None
    barcodes, features = (read_columns(_list(folder, name)) for name in ("barcodes.tsv", "features.tsv"))
    ids, symbols = features[0], features[min(1, len(features) - 1)]
    shape = (len(ids), len(barcodes[0]))
    separate = {name: plain_or_gz(folder, f"{name}.mtx") for name in COUNTS}
    together = plain_or_gz(folder, "matrix.mtx")
    layers = {}
    if any(separate.values()):
        for name, file in separate.items():
            if file is not None:
                layers[name] = read_coordinate(file, shape=shape)[0].T.tocsr()
    elif together is not None:
        for name, matrix in zip(COUNTS, read_coordinate(together, shape=shape, n_values=3), strict=True):
            layers[name] = matrix.T.tocsr()
            layers[name].eliminate_zeros()
    return AnnData(
        obs=pd.DataFrame(index=pd.Index(barcodes[0], dtype=object)),
        var=pd.DataFrame({"gene_ids": ids}, index=pd.Index(unique_names(symbols, ids), dtype=object)),
        layers=layers,
    )


def _is_quantified(folder: Path) -> bool:
    files = [plain_or_gz(folder, name) for name in ("barcodes.tsv", "features.tsv")]
    return bool(any(files) and any(plain_or_gz(folder, f"{name}.mtx") for name in (*COUNTS, "matrix")))


def _list(folder: Path, name: str) -> Path:
    found = plain_or_gz(folder, name)
    if found is None:
        raise InputError(f"{folder} has no {name}, expected STARsolo's whole output; copy all its files together.")
    return found
