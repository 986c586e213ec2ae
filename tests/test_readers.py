"""Every format, written here in its official layout and read back equal; and every way a file can be broken."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
import zarr
from scipy import sparse

from pyro_velo.data import checked_layers, read
from pyro_velo.data.readers import FORMATS
from pyro_velo.data.readers.matrix_market import read_coordinate
from pyro_velo.data.readers.names import unique_names
from pyro_velo.errors import InputError


class Truth(NamedTuple):
    cells: list[str]
    genes: list[str]
    ids: list[str]
    spliced: np.ndarray
    unspliced: np.ndarray
    ambiguous: np.ndarray


@pytest.fixture
def truth(rng) -> Truth:
    """7 cells x 5 genes, two of which share a symbol; neither square nor symmetric, so a transpose shows."""
    counts = rng.poisson([[[3.0]], [[1.0]], [[0.5]]], size=(3, 7, 5))
    counts[:2, :, 0] = 1  # no gene, cell or layer is empty
    counts[:2, 0, :] = 2
    return Truth(
        [f"AACG{i}" for i in range(7)], ["Ins1", "Pou", "NA", "Pou", "Gcg"], [f"ENSG{i}" for i in range(5)], *counts
    )


UNIQUE = ["Ins1", "Pou_ENSG1", "NA", "Pou_ENSG3", "Gcg"]


def as_adata(truth: Truth, names=("spliced", "unspliced", "ambiguous"), kind=sparse.csr_matrix) -> anndata.AnnData:
    return anndata.AnnData(
        obs=pd.DataFrame(index=truth.cells),
        var=pd.DataFrame({"gene_ids": truth.ids}, index=UNIQUE),
        layers={name: kind(counts) for name, counts in zip(names, truth[3:], strict=True)},
    )


def write_h5ad(truth, folder, **options):
    path = folder / "data.h5ad"
    as_adata(truth, **options).write_h5ad(path)
    return path


def write_zarr(truth, folder, zarr_format=3):
    path = folder / "data.zarr"
    with anndata.settings.override(zarr_write_format=zarr_format):
        as_adata(truth).write_zarr(path)
    return path


def write_loom(truth, folder, kb=False, dtype="uint32"):
    path = folder / "data.loom"
    names = ("mature", "nascent", "ambiguous") if kb else ("spliced", "unspliced", "ambiguous")
    how = {"chunks": (2, 3), "compression": "gzip", "dtype": dtype}
    with h5py.File(path, "w") as file:
        file.create_dataset("matrix", data=sum(truth[3:]).T, **how)
        for name, counts in zip(names, truth[3:], strict=True):
            file.create_dataset(f"layers/{name}", data=counts.T, **how)
        text = h5py.string_dtype()
        file.create_dataset("row_attrs/" + ("gene_name" if kb else "Gene"), data=truth.genes, dtype=text)
        file.create_dataset("row_attrs/" + ("gene_id" if kb else "Accession"), data=truth.ids, dtype=text)
        file.create_dataset("col_attrs/" + ("barcode" if kb else "CellID"), data=truth.cells, dtype=text)
        file.create_dataset("col_attrs/Clusters", data=np.arange(7))
        file.create_dataset("col_attrs/TSNE", data=np.ones((7, 2)))
        for group in ("row_graphs", "col_graphs", "attrs"):
            file.create_group(group)
    return path


def matrix_market(path: Path, rows, columns, values, shape) -> None:
    lines = [" ".join(map(str, (i + 1, j + 1, *value))) for i, j, value in zip(rows, columns, values, strict=True)]
    kind = "integer" if np.asarray(values).dtype.kind in "iu" else "real"
    sizes = f"{shape[0]} {shape[1]} {len(lines)}"
    text = "\n".join([f"%%MatrixMarket matrix coordinate {kind} general", "%", sizes, *lines, ""])
    with gzip.open(path, "wt") if path.suffix == ".gz" else open(path, "w") as file:
        file.write(text)


def text_file(path: Path, lines) -> None:
    with gzip.open(path, "wt") if path.suffix == ".gz" else open(path, "w") as file:
        file.write("".join(f"{line}\n" for line in lines))


def write_starsolo(truth, folder, legacy=False, gz="", inside="Velocyto/raw", columns=3):
    place = folder / "Solo.out" / inside
    place.mkdir(parents=True)
    text_file(place / f"barcodes.tsv{gz}", truth.cells)
    text_file(place / f"features.tsv{gz}", [f"{i}\t{n}" for i, n in zip(truth.ids, truth.genes, strict=True)])
    stacked = np.stack(truth[3:], axis=-1).transpose(1, 0, 2)
    if legacy:
        at = np.nonzero(stacked.any(axis=-1))
        matrix_market(place / f"matrix.mtx{gz}", *at, stacked[at][:, :columns], stacked.shape[:2])
    else:
        for i, name in enumerate(("spliced", "unspliced", "ambiguous")):
            at = np.nonzero(stacked[..., i])
            matrix_market(place / f"{name}.mtx{gz}", *at, stacked[at][:, [i]], stacked.shape[:2])
    return folder / "Solo.out" / "Velocyto"


def write_alevin(truth, folder, metadata="quant.json", usa=True, symbols=False, gz=""):
    place = folder / "af_quant" / "alevin"
    place.mkdir(parents=True)
    (place.parent / metadata).write_text(json.dumps({"usa_mode": usa, "num_genes": 15, "num_quantified_cells": 7}))
    text_file(place / "quants_mat_rows.txt", truth.cells)
    text_file(place / "quants_mat_cols.txt", [f"{i}{suffix}" for suffix in ("", "-U", "-A") for i in truth.ids])
    if symbols:
        pairs = zip(truth.ids, truth.genes, strict=True)
        text_file(place.parent / "gene_id_to_name.tsv", [f"{i}\t{n}" for i, n in pairs])
    blocks = np.concatenate(truth[3:], axis=1).astype(float)
    at = np.nonzero(blocks)
    matrix_market(place / f"quants_mat.mtx{gz}", *at, blocks[at][:, None], blocks.shape)
    return place.parent


KB = {"names": ("mature", "nascent", "ambiguous")}
WRITERS: dict[str, Callable[[Truth, Path], Path]] = {
    "h5ad csr": write_h5ad,
    "h5ad csc": lambda t, f: write_h5ad(t, f, kind=sparse.csc_matrix),
    "h5ad dense": lambda t, f: write_h5ad(t, f, kind=np.asarray),
    "h5ad kb-python": lambda t, f: write_h5ad(t, f, **KB),
    "zarr 2": lambda t, f: write_zarr(t, f, zarr_format=2),
    "zarr 3": write_zarr,
    "loom": write_loom,
    "loom of floats": lambda t, f: write_loom(t, f, dtype="float64"),
    "loom kb-python": lambda t, f: write_loom(t, f, kb=True),
    "starsolo": write_starsolo,
    "starsolo gz": lambda t, f: write_starsolo(t, f, gz=".gz"),
    "starsolo legacy": lambda t, f: write_starsolo(t, f, legacy=True),
    "starsolo legacy gz": lambda t, f: write_starsolo(t, f, legacy=True, gz=".gz"),
    "starsolo filtered": lambda t, f: write_starsolo(t, f, inside="Velocyto/filtered") / "filtered",
    "alevin": write_alevin,
    "alevin gz": lambda t, f: write_alevin(t, f, gz=".gz"),
    "alevin before 0.4.1": lambda t, f: write_alevin(t, f, metadata="meta_info.json"),
    "simpleaf": lambda t, f: write_alevin(t, f, symbols=True).parent,
}


@pytest.fixture(params=WRITERS)
def written(request, truth, tmp_path):
    # anndata announces future defaults of the zarr format while writing it
    with pytest.warns(UserWarning) if request.param.startswith("zarr") else nullcontext():
        return request.param, WRITERS[request.param](truth, tmp_path)


def dense(matrix) -> np.ndarray:
    return matrix.toarray() if sparse.issparse(matrix) else np.asarray(matrix)


def test_what_was_written_is_read_back(written, truth):
    name, path = written
    adata = read(path)
    fry = name.startswith(("alevin", "simpleaf"))
    np.testing.assert_array_equal(dense(adata.layers["spliced"]), truth.spliced + (truth.ambiguous if fry else 0))
    np.testing.assert_array_equal(dense(adata.layers["unspliced"]), truth.unspliced)
    assert ("ambiguous" in adata.layers) is not fry
    assert list(adata.obs_names) == truth.cells
    assert list(adata.var_names) == (truth.ids if name.startswith("alevin") else UNIQUE)
    assert not {"mature", "nascent"} & set(adata.layers)


def test_what_is_read_passes_the_checks_and_stays_sparse(written):
    name, path = written
    adata = read(path)
    checked_layers(adata)
    for layer in adata.layers.values():
        assert sparse.issparse(layer) is ("dense" not in name)
        assert layer.dtype.kind in "if"  # an unsigned type would wrap around in u - s


def test_reading_writes_nothing(written, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    read(written[1])
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}


def test_a_path_may_be_text(truth, tmp_path):
    assert read(str(write_h5ad(truth, tmp_path))).shape == (7, 5)


def test_every_format_has_a_writer_here(truth, tmp_path):
    recognised = set()
    for i, write in enumerate(WRITERS.values()):
        folder = tmp_path / str(i)
        folder.mkdir()
        with nullcontext() if i not in (4, 5) else pytest.warns(UserWarning):
            path = write(truth, folder)
        kinds = [name for name, known in FORMATS.items() if known.recognises(path)]
        assert len(kinds) == 1
        recognised.update(kinds)
    # 10x Genomics' own has no layers; test_downloads.py writes it.
    assert recognised == set(FORMATS) - {"10x .h5"}


def test_loom_keeps_its_attributes_and_total(truth, tmp_path):
    adata = read(write_loom(truth, tmp_path))
    np.testing.assert_array_equal(adata.X.toarray(), sum(truth[3:]))
    assert list(adata.var["Accession"]) == truth.ids
    assert list(adata.obs["Clusters"]) == list(range(7))
    assert adata.obsm["TSNE"].shape == (7, 2)


def test_filtered_is_taken_before_raw(truth, tmp_path):
    write_starsolo(truth, tmp_path)
    few = truth._replace(cells=truth.cells[:3], **{name: getattr(truth, name)[:3] for name in Truth._fields[3:]})
    write_starsolo(few, tmp_path, inside="Velocyto/filtered")
    assert read(tmp_path / "Solo.out").n_obs == read(tmp_path).n_obs == 3
    assert read(tmp_path / "Solo.out" / "Velocyto" / "raw").n_obs == 7


def test_spliced_and_mature_together_stay_apart(truth, tmp_path):
    path = write_h5ad(truth, tmp_path, names=("spliced", "unspliced", "mature"))
    adata = read(path)
    assert set(adata.layers) == {"spliced", "unspliced", "mature"}
    np.testing.assert_array_equal(dense(adata.layers["spliced"]), truth.spliced)


@pytest.mark.parametrize(
    ("names", "ids", "expected"),
    [
        (["a", "b"], ["1", "2"], ["a", "b"]),
        (["a", "a", "b"], ["1", "2", "3"], ["a_1", "a_2", "b"]),
        (["", "b", ""], ["1", "2", "3"], ["1", "b", "3"]),
    ],
)
def test_unique_names_touches_repeated_and_empty_names_alone(names, ids, expected):
    assert unique_names(names, ids) == expected


def test_the_pancreas(pancreas_path):
    adata = read(pancreas_path)
    assert adata.shape == (3696, 2000)
    assert set(adata.obs["clusters"].cat.categories) >= {"Ductal", "Ngn3 low EP", "Alpha", "Epsilon"}
    layers = checked_layers(adata)
    for copy, name in zip(layers, ("spliced", "unspliced"), strict=True):
        assert copy.dtype == np.int32
        assert (copy != adata.layers[name]).nnz == 0
    with pytest.raises(InputError, match=r"'spliced' holds 4.8 times the counts of 'unspliced'.*swapped"):
        checked_layers(adata, spliced="unspliced", unspliced="spliced")


# ---- broken files: each case damages what a writer wrote, and says what has to be said


def cut(path: Path, keep: float = 0.5) -> Path:
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])
    return path


def claims_40_gb(folder: Path, name: str, shape=(100_000, 50_000)) -> Path:
    path = folder / name
    with h5py.File(path, "w") as file:
        file.create_dataset("matrix" if name.endswith("loom") else "X", shape=shape, dtype="f8", chunks=(1000, 1000))
        for group in ("obs", "var", "row_attrs", "col_attrs"):
            file.create_group(group)
    assert path.stat().st_size < 8000
    return path


def zarr_claims_40_gb(folder: Path) -> Path:
    group = zarr.open_group(folder / "big.zarr", mode="w", zarr_format=2)
    group.create_array("X", shape=(100_000, 50_000), chunks=(1000, 1000), dtype="f8", fill_value=1.0)
    for name in ("obs", "var"):
        group.create_group(name)
    return folder / "big.zarr"


def sparse_group(folder: Path, damage: Callable[[h5py.Group], None], truth: Truth) -> Path:
    path = write_h5ad(truth, folder)
    with h5py.File(path, "r+") as file:
        damage(file["layers/spliced"])
    return path


def replaced(group: h5py.Group, name: str, values) -> None:
    del group[name]
    group[name] = values


def set_shape(shape):
    return lambda group: group.attrs.modify("shape", np.array(shape))


def shorten(name):
    return lambda group: replaced(group, name, group[name][:-1])


def outside(group):
    indices = group["indices"][:]
    indices[-1] = 1_000_000
    replaced(group, "indices", indices)


def backwards(group):
    indptr = group["indptr"][:]
    indptr[1], indptr[2] = indptr[2], indptr[1]
    replaced(group, "indptr", indptr)


def longer(group):
    indptr = group["indptr"][:]
    indptr[-1] += 5
    replaced(group, "indptr", indptr)


def hdf5_without(folder, name, **datasets):
    path = folder / name
    with h5py.File(path, "w") as file:
        for key, value in datasets.items():
            file[key] = value
    return path


def not_a_file(folder: Path, name: str, content: bytes) -> Path:
    (folder / name).write_bytes(content)
    return folder / name


def named(path: Path, change: Callable[[Path], object]) -> Path:
    change(path)
    return path


def loom_with(truth, folder, key, values):
    path = write_loom(truth, folder)
    with h5py.File(path, "r+") as file:
        replaced(file, key, values)
    return path


def raw(truth, folder, **options) -> Path:
    return write_starsolo(truth, folder, **options) / "raw"


def edited(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


BROKEN: dict[str, tuple[Callable[[Truth, Path], Path], str]] = {
    "no such file": (lambda t, f: f / "none.h5ad", "doesn't exist, expected a file or folder"),
    "an empty folder": (lambda t, f: f, "is a folder of no known format, expected one of: AnnData .h5ad"),
    "another suffix": (lambda t, f: not_a_file(f, "a.csv", b"1,2"), "is a file of no known format"),
    "empty h5ad": (lambda t, f: not_a_file(f, "a.h5ad", b""), "isn't an HDF5 file"),
    "text h5ad": (lambda t, f: not_a_file(f, "a.h5ad", b"no" * 999), "isn't an HDF5 file"),
    "text loom": (lambda t, f: not_a_file(f, "a.loom", b"no" * 999), "isn't an HDF5 file"),
    "cut h5ad": (lambda t, f: cut(write_h5ad(t, f)), "can't be read as HDF5 .*truncated"),
    "cut loom": (lambda t, f: cut(write_loom(t, f)), "can't be read as HDF5 .*truncated"),
    "h5ad of 40 GB": (lambda t, f: claims_40_gb(f, "a.h5ad"), "claims 40 GB but holds [0-9.]+ kB"),
    "loom of 40 GB": (lambda t, f: claims_40_gb(f, "a.loom"), "claims 40 GB but holds [0-9.]+ kB"),
    "h5ad of many TB": (lambda t, f: claims_40_gb(f, "a.h5ad", (2**40, 2**40)), "claims 9,671,406,556,917 TB"),
    "zarr of 40 GB": (lambda t, f: zarr_claims_40_gb(f), "claims 40 GB but holds [0-9.]+ (kB|bytes)"),
    "h5ad without obs": (
        lambda t, f: hdf5_without(f, "a.h5ad", X=[1]),
        "isn't an AnnData: it holds 'X', expected 'obs'",
    ),
    "zarr without obs": (
        lambda t, f: named(f / "a.zarr", lambda p: zarr.open_group(p, mode="w").create_group("X")),
        "isn't an AnnData: it holds 'X'",
    ),
    "zarr with broken metadata": (
        lambda t, f: named(f / "a.zarr", lambda p: (p.mkdir(), (p / "zarr.json").write_text("{"))),
        "can't be read as zarr",
    ),
    "hdf5 named loom": (lambda t, f: hdf5_without(f, "a.loom", X=[1]), "isn't a loom file, expected matrix, row_attrs"),
    "csr of a huge shape": (
        lambda t, f: sparse_group(f, set_shape((10**10, 5)), t),
        "sparse matrix of the shape \\(10000000000, 5\\) whose arrays .* expected indptr 10000000001",
    ),
    "csr, short indptr": (lambda t, f: sparse_group(f, shorten("indptr"), t), "expected indptr 8"),
    "csr, short data": (lambda t, f: sparse_group(f, shorten("data"), t), "as many data as indices"),
    "csr, long indptr": (lambda t, f: sparse_group(f, longer, t), "indptr ends at \\d+, expected its \\d+ values"),
    "csr, indices outside": (lambda t, f: sparse_group(f, outside, t), "spliced is a damaged sparse matrix"),
    "csr, indptr backwards": (lambda t, f: sparse_group(f, backwards, t), "spliced is a damaged sparse matrix"),
    "csr without indices": (
        lambda t, f: sparse_group(f, lambda group: group.__delitem__("indices"), t),
        "sparse matrix without a shape, data, indices or indptr",
    ),
    "layer of another shape": (
        lambda t, f: sparse_group(f, lambda g: (set_shape((7, 6))(g), g["indices"]), t),
        "can't be read as AnnData .*shape",
    ),
    "loom layer of another shape": (
        lambda t, f: loom_with(t, f, "layers/spliced", np.ones((7, 5))),
        "layers/spliced has the shape \\(7, 5\\), expected \\(5, 7\\)",
    ),
    "loom names of another length": (
        lambda t, f: loom_with(t, f, "col_attrs/CellID", [b"a"]),
        "CellID has the shape \\(1,\\), expected 7 entries",
    ),
    "loom without names": (
        lambda t, f: named(write_loom(t, f), lambda p: h5py.File(p, "r+").__delitem__("col_attrs/CellID")),
        "names no cells: its attributes are 'Clusters', 'TSNE', expected one of 'CellID'",
    ),
    "starsolo Gene folder": (
        lambda t, f: raw(t, f, legacy=True, columns=1),
        "has 1 values an entry, expected 3; take the output for velocity",
    ),
    "starsolo without features": (
        lambda t, f: named(raw(t, f), lambda p: (p / "features.tsv").unlink()),
        "has no features.tsv",
    ),
    "starsolo without barcodes": (
        lambda t, f: named(raw(t, f), lambda p: (p / "barcodes.tsv").unlink()),
        "has no barcodes.tsv",
    ),
    "starsolo, fewer barcodes": (
        lambda t, f: named(raw(t, f), lambda p: text_file(p / "barcodes.tsv", t.cells[:-1])),
        "announces 5 x 7, expected 5 x 6",
    ),
    "starsolo, empty barcodes": (
        lambda t, f: named(raw(t, f), lambda p: text_file(p / "barcodes.tsv", [])),
        "announces 5 x 7, expected 5 x 0",
    ),
    "starsolo, cut": (
        lambda t, f: named(raw(t, f), lambda p: text_file(p / "spliced.mtx", read_lines(p / "spliced.mtx")[:-2])),
        "holds \\d+ entries, expected the \\d+ it announces; it was cut short",
    ),
    "starsolo, cut gz": (
        lambda t, f: named(raw(t, f, gz=".gz"), lambda p: cut(p / "spliced.mtx.gz", 0.7)),
        "spliced.mtx.gz can't be read as Matrix Market",
    ),
    "starsolo, not numbers": (
        lambda t, f: named(raw(t, f), lambda p: edited(p / "spliced.mtx", "\n1 1 2\n", "\n1 1 x\n")),
        "spliced.mtx can't be read as Matrix Market",
    ),
    "starsolo, index outside": (
        lambda t, f: named(raw(t, f), lambda p: edited(p / "spliced.mtx", "\n1 1 2\n", "\n9 1 2\n")),
        "has row indices from 1 to 9, expected 1 to 5",
    ),
    "starsolo, claims too much": (
        lambda t, f: named(raw(t, f), lambda p: text_file(p / "spliced.mtx", [BANNER, "5 7 30000000000", "1 1 1"])),
        "announces 30,000,000,000 entries, expected at most what its size and shape allow",
    ),
    "starsolo, no sizes": (
        lambda t, f: named(raw(t, f), lambda p: text_file(p / "spliced.mtx", [BANNER])),
        "no line of rows, columns and entries",
    ),
    "starsolo, another text": (
        lambda t, f: named(raw(t, f), lambda p: text_file(p / "spliced.mtx", ["gene,cell"])),
        "isn't a general Matrix Market coordinate file",
    ),
    "starsolo, pattern": (
        lambda t, f: named(raw(t, f), lambda p: edited(p / "spliced.mtx", "integer", "pattern")),
        "holds pattern values, expected integer or real",
    ),
    "alevin, not USA mode": (lambda t, f: write_alevin(t, f, usa=False), "was not quantified in USA mode"),
    "alevin without metadata": (
        lambda t, f: named(write_alevin(t, f), lambda p: (p / "quant.json").unlink()),
        "has no quant.json or meta_info.json",
    ),
    "alevin, broken metadata": (
        lambda t, f: named(write_alevin(t, f), lambda p: (p / "quant.json").write_text("")),
        "quant.json can't be read as JSON",
    ),
    "alevin without genes": (
        lambda t, f: named(write_alevin(t, f), lambda p: (p / "alevin/quants_mat_cols.txt").unlink()),
        "has no quants_mat_cols.txt",
    ),
    "alevin, one block": (
        lambda t, f: named(write_alevin(t, f), lambda p: text_file(p / "alevin/quants_mat_cols.txt", t.ids)),
        "lists 5 columns, expected every gene three times",
    ),
}
BANNER = "%%MatrixMarket matrix coordinate integer general"


def read_lines(path: Path) -> list[str]:
    return path.read_text().splitlines()


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_file_is_told_in_one_line(case, truth, tmp_path):
    make, message = BROKEN[case]
    path = make(truth, tmp_path)
    with pytest.raises(InputError, match=message) as told:
        read(path)
    assert "\n" not in str(told.value)
    assert path.name in str(told.value)


def test_data_larger_than_the_free_memory_is_not_read(truth, tmp_path, monkeypatch):
    path = write_h5ad(truth, tmp_path)
    monkeypatch.setattr("pyro_velo.data.declared.free_memory", lambda: 100)
    with pytest.raises(InputError, match=r"needs .* of memory but 100 bytes are free"):
        read(path)


def test_repeated_names_of_an_anndata_are_left_to_the_checks(truth, tmp_path):
    adata = as_adata(truth)
    adata.var_names = truth.genes
    adata.write_h5ad(tmp_path / "a.h5ad")
    again = read(tmp_path / "a.h5ad")
    with pytest.raises(InputError, match="1 gene names are repeated \\(first: 'Pou'\\)"):
        checked_layers(again)


@pytest.mark.parametrize("n_values", [1, 3])
@pytest.mark.parametrize("chunk", [1, 4, 1000])
def test_a_matrix_does_not_depend_on_the_chunks_it_is_parsed_in(truth, tmp_path, monkeypatch, chunk, n_values):
    monkeypatch.setattr("pyro_velo.data.readers.matrix_market.CHUNK", chunk)
    stacked = np.stack(truth[3:], axis=-1)[..., :n_values]
    at = np.nonzero(stacked.any(axis=-1))
    matrix_market(tmp_path / "m.mtx", *at, stacked[at], (7, 5))
    for i, matrix in enumerate(read_coordinate(tmp_path / "m.mtx", shape=(7, 5), n_values=n_values)):
        np.testing.assert_array_equal(matrix.toarray(), stacked[..., i])


@pytest.mark.parametrize("block", [1, 100, 2**25])
def test_loom_does_not_depend_on_the_blocks_it_is_read_in(truth, tmp_path, monkeypatch, block):
    monkeypatch.setattr("pyro_velo.data.readers.loom.BLOCK", block)
    np.testing.assert_array_equal(read(write_loom(truth, tmp_path)).layers["spliced"].toarray(), truth.spliced)


def test_memory_follows_the_counts_and_not_the_cells_times_genes(tmp_path, rng, monkeypatch):
    monkeypatch.setattr("pyro_velo.data.readers.loom.BLOCK", 2**18)
    n_cells, n_genes = 2_000, 3_000
    counts = sparse.random(n_genes, n_cells, density=0.01, format="csr", rng=rng, dtype=np.float64)
    counts.data[:] = np.ceil(counts.data * 5)
    with h5py.File(tmp_path / "a.loom", "w") as file:
        for name in ("matrix", "layers/spliced", "layers/unspliced"):
            file.create_dataset(name, data=counts.toarray(), dtype="uint16", chunks=(64, 64), compression="gzip")
        file["row_attrs/Gene"] = [f"g{i}" for i in range(n_genes)]
        file["col_attrs/CellID"] = [f"c{i}" for i in range(n_cells)]
    tracemalloc.start()
    adata = read(tmp_path / "a.loom")
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert adata.layers["spliced"].nnz == counts.nnz
    assert kept < 3 * counts.nnz * 8 * 1.5
    assert peak < 3 * n_cells * n_genes * 2 / 3  # a third of what the dense uint16 matrices would take


def test_importing_the_package_of_readers_is_light():
    code = "import sys, pyro_velo.data, pyro_velo.data.anndata_keys; print(*sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"anndata", "h5py", "numpy", "pandas", "scipy"} & set(found)


def test_a_file_is_closed_after_reading(truth, tmp_path):
    path = write_loom(truth, tmp_path)
    read(path)
    with h5py.File(path, "r+") as file:  # HDF5 locks: opening to write fails while a reader is open
        assert "matrix" in file
