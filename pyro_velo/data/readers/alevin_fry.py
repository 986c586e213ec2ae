"""alevin-fry's quant folder in USA mode: cells x (spliced, unspliced, ambiguous) genes, three blocks side by side.

Reference: He et al. 2022, Nature Methods 19, 316-322.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from pyro_velo.data.anndata_keys import SPLICED, UNSPLICED
from pyro_velo.data.declared import explained
from pyro_velo.data.readers.matrix_market import read_coordinate
from pyro_velo.data.readers.names import plain_or_gz, read_columns, unique_names
from pyro_velo.errors import InputError

if TYPE_CHECKING:
    from anndata import AnnData

WITHIN = ("", "af_quant", "quant")
"""Where the folder that holds `alevin/` is looked for below the path; `af_quant` is simpleaf's."""
METADATA = ("quant.json", "meta_info.json")
"""Since alevin-fry 0.4.1, and before."""
SYMBOLS = "gene_id_to_name.tsv"
"""simpleaf's list of gene symbols, if it is there."""


def find(path: Path) -> Path | None:
    """The folder at or below `path` that holds `alevin/quants_mat.mtx`, or None."""
    places = [path / place for place in WITHIN] + ([path.parent] if path.name == "alevin" else [])
    return next((place for place in places if plain_or_gz(place / "alevin", "quants_mat.mtx")), None)


def read_alevin_fry(path: Path) -> AnnData:
    """The AnnData with spliced = S + A and unspliced = U, as csr: what the authors' loader calls velocity mode.

    Genes are named by id, or by symbol where simpleaf's `gene_id_to_name.tsv` is there; var `gene_ids` holds the ids.
    """
    import pandas as pd
    from anndata import AnnData

    folder = find(path)
    assert folder is not None
    barcodes, columns = (read_columns(_list(folder, f"quants_mat_{name}.txt"))[0] for name in ("rows", "cols"))
    ids = _genes(folder, columns)
    matrix = plain_or_gz(folder / "alevin", "quants_mat.mtx")
    assert matrix is not None
    blocks = read_coordinate(matrix, shape=(len(barcodes), len(columns)))[0].tocsc()
    spliced, unspliced, ambiguous = (blocks[:, i * len(ids) : (i + 1) * len(ids)].tocsr() for i in range(3))
    return AnnData(
        obs=pd.DataFrame(index=pd.Index(barcodes, dtype=object)),
        var=pd.DataFrame({"gene_ids": ids}, index=pd.Index(_names(folder, ids), dtype=object)),
        layers={SPLICED: spliced + ambiguous, UNSPLICED: unspliced},
    )


def _genes(folder: Path, columns: list[str]) -> list[str]:
    """The first block's names, once the metadata and the suffixes of the other two agree that there are three."""
    metadata = next((folder / name for name in METADATA if (folder / name).is_file()), None)
    if metadata is None:
        raise InputError(f"{folder} has no {' or '.join(METADATA)}, expected the whole output; copy all of it.")
    with explained(metadata, "JSON"):
        usa = bool(json.loads(metadata.read_text()).get("usa_mode", False))
    if not usa:
        raise InputError(
            f"{folder} was not quantified in USA mode, expected unspliced, spliced and ambiguous counts; run "
            "alevin-fry quant with a three-column transcript-to-gene map of a splici or spliceu index."
        )
    n_genes = len(columns) // 3
    ids = columns[:n_genes]
    if columns != [*ids, *(f"{name}-U" for name in ids), *(f"{name}-A" for name in ids)]:
        raise InputError(
            f"{folder}/alevin/quants_mat_cols.txt lists {len(columns)} columns, expected every gene three times: as it "
            "is, then with -U, then with -A; copy the whole output again."
        )
    return ids


def _names(folder: Path, ids: list[str]) -> list[str]:
    table = next((place / SYMBOLS for place in (folder, folder / "alevin") if (place / SYMBOLS).is_file()), None)
    if table is None:
        return ids
    columns = read_columns(table)
    symbol = dict(zip(columns[0], columns[-1], strict=True))
    return unique_names([symbol.get(identity, identity) for identity in ids], ids)


def _list(folder: Path, name: str) -> Path:
    found = plain_or_gz(folder / "alevin", name)
    if found is None:
        raise InputError(f"{folder}/alevin has no {name}, expected alevin-fry's whole output; copy all of it.")
    return found
