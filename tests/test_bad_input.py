"""Every bad input is told in one sentence that says what was expected, what came and the remedy; nothing is changed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from pyro_velo.data import (
    anndata_keys,
    check_key,
    check_known,
    check_neighbors,
    check_output,
    check_output_keys,
    check_writable,
    checked_basis,
    checked_labels,
    checked_layers,
    expressed_genes,
    read,
    whole,
    write_whole,
)
from pyro_velo.data.declared import free_memory
from pyro_velo.data.matrices import checked_matrix
from pyro_velo.errors import InputError

SPLICED = np.array([[3, 0, 1], [2, 5, 0], [0, 4, 2], [7, 1, 1]])
UNSPLICED = np.array([[1, 0, 0], [1, 2, 0], [0, 1, 1], [2, 0, 1]])
GENES = ["Ins1", "Gcg", "Sst"]


def make(spliced=SPLICED, unspliced=UNSPLICED, cells=None, genes=None, **others) -> anndata.AnnData:
    cells = cells or [f"c{i}" for i in range(spliced.shape[0])]
    genes = genes or GENES[: spliced.shape[1]]
    layers = {"spliced": spliced, "unspliced": unspliced}
    return anndata.AnnData(obs=pd.DataFrame(index=cells), var=pd.DataFrame(index=genes), layers=layers, **others)


def dense(matrix) -> np.ndarray:
    return matrix.toarray() if sparse.issparse(matrix) else np.asarray(matrix)


def changed(value, at=(1, 2), dtype=float) -> np.ndarray:
    counts = SPLICED.astype(dtype)
    counts[at] = value
    return counts


# ---- layers: what passes

DTYPES = [
    "int8",
    "int16",
    "int32",
    "int64",
    "uint8",
    "uint16",
    "uint32",
    "uint64",
    "float16",
    "float32",
    "float64",
    ">f8",
]
DENSE: dict[str, Callable] = {"array": np.asarray, "fortran": np.asfortranarray}
KINDS: dict[str, Callable] = {
    **DENSE,
    **{name: getattr(sparse, f"{name}_matrix") for name in ("csr", "csc", "coo", "lil", "dok", "bsr", "dia")},
    "csr_array": sparse.csr_array,
    "csc_array": sparse.csc_array,
    "coo_array": sparse.coo_array,
}


@pytest.mark.parametrize(
    ("kind", "dtype"),
    # scipy's sparse matrices hold neither half precision nor foreign byte orders
    [(kind, dtype) for kind in KINDS for dtype in DTYPES if kind in DENSE or dtype not in ("float16", ">f8")],
)
def test_every_kind_and_dtype_gives_the_same_layer(kind, dtype):
    matrix = checked_matrix(KINDS[kind](SPLICED.astype(dtype)), "Layer 'spliced'", gene_names=GENES, shape=(4, 3))
    np.testing.assert_array_equal(dense(matrix), SPLICED)
    assert matrix.dtype == (np.float32 if np.dtype(dtype).kind == "f" else np.int32)
    assert type(matrix) is (np.ndarray if kind in DENSE else sparse.csr_matrix)


@pytest.mark.parametrize("kind", ["array", "csr", "csc", "csr_array", "csc_array"])
@pytest.mark.parametrize("view", [False, True])
def test_checked_layers_are_copies(kind, view):
    parent = make(KINDS[kind](SPLICED), KINDS[kind](UNSPLICED), obsm={"X_umap": np.ones((4, 2))})
    before = parent.copy()
    adata = parent[[3, 1, 2], ["Sst", "Ins1"]] if view else parent
    expected = SPLICED[[3, 1, 2]][:, [2, 0]] if view else SPLICED
    layers = checked_layers(adata)
    np.testing.assert_array_equal(dense(layers.spliced), expected)
    for layer in layers:
        layer[0, 0] = 99
        layer *= 2
    assert adata.is_view is view
    for name in ("spliced", "unspliced"):
        np.testing.assert_array_equal(dense(parent.layers[name]), dense(before.layers[name]))


def test_counts_beyond_int32_stay_exact():
    large = changed(2**40, dtype=np.int64)
    matrix = checked_matrix(large, "Layer", gene_names=GENES)
    assert matrix.dtype == np.int64
    np.testing.assert_array_equal(matrix, large)


def test_a_sparse_layer_comes_out_canonical_and_the_input_keeps_its_duplicates():
    data, rows, columns = np.array([200, 100, 0, 4], np.uint8), [0, 0, 1, 2], [1, 1, 0, 2]
    coo = sparse.coo_matrix((data, (rows, columns)), shape=(4, 3))
    matrix = checked_matrix(coo, "Layer", gene_names=GENES)
    assert matrix[0, 1] == 300  # not 300 - 256
    assert matrix.nnz == 2 and matrix.has_canonical_format
    assert coo.nnz == 4


def test_a_gene_without_counts_is_not_expressed_and_no_error():
    spliced, unspliced = SPLICED.copy(), UNSPLICED.copy()
    spliced[:, 1] = 0
    unspliced[:, 2] = 0
    np.testing.assert_array_equal(expressed_genes(checked_layers(make(spliced, unspliced))), [True, False, False])


def test_nuclei_pass_when_the_limit_is_raised():
    adata = make(UNSPLICED, SPLICED * 5)
    with pytest.raises(InputError, match=r"14.4 times .* at most 4 times; if the two are swapped"):
        checked_layers(adata)
    checked_layers(adata, max_unspliced_ratio=float("inf"))


def test_other_layer_names():
    adata = make()
    adata.layers["Ms"] = SPLICED * 2.5
    np.testing.assert_array_equal(checked_layers(adata, spliced="Ms").spliced, SPLICED * 2.5)


# ---- layers: what doesn't

BAD: dict[str, tuple[Callable[[], anndata.AnnData], str]] = {
    "NaN": (lambda: make(changed(np.nan)), "'spliced' holds 1 NaN or infinite values \\(first gene: 'Sst'\\)"),
    "inf": (lambda: make(changed(np.inf)), "'spliced' holds 1 NaN or infinite values \\(first gene: 'Sst'\\)"),
    "-inf": (lambda: make(changed(-np.inf)), "'spliced' holds 1 NaN or infinite values \\(first gene: 'Sst'\\)"),
    "too large for float32": (lambda: make(changed(1e300)), "holds 1 NaN or infinite values"),
    "many NaN": (lambda: make(changed(np.nan, np.s_[:, 1:])), "holds 8 NaN or infinite values \\(first gene: 'Gcg'\\)"),
    "sparse NaN": (lambda: make(sparse.csr_matrix(changed(np.nan))), "holds 1 NaN .*'Sst'.*go back to the raw counts"),
    "csc NaN": (lambda: make(sparse.csc_matrix(changed(np.nan))), "holds 1 NaN .*'Sst'"),
    "NaN in unspliced": (lambda: make(unspliced=changed(np.nan)), "Layer 'unspliced' holds 1 NaN"),
    "masked": (
        lambda: make(np.ma.masked_array(SPLICED, mask=SPLICED == 7)),
        "'spliced' holds 1 NaN or infinite values \\(first gene: 'Ins1'\\)",
    ),
    "negative": (lambda: make(changed(-1)), "holds 1 negative values \\(first gene: 'Sst'\\).*before it was centred"),
    "sparse negative": (
        lambda: make(sparse.csr_matrix(changed(-1))),
        "holds 1 negative values \\(first gene: 'Sst'\\)",
    ),
    "negative integers": (lambda: make(changed(-3, dtype=int)), "holds 1 negative values"),
    "booleans": (lambda: make(SPLICED > 0), "'spliced' holds booleans .*expected abundances; pass the counts"),
    "sparse booleans": (lambda: make(sparse.csr_matrix(SPLICED > 0)), "'spliced' holds booleans"),
    "objects": (lambda: make(SPLICED.astype(object)), "has the dtype object, expected integers or floats; convert it"),
    "text": (lambda: make(SPLICED.astype(str)), "has the dtype <U21, expected integers or floats"),
    "complex": (lambda: make(SPLICED.astype(complex)), "has the dtype complex128"),
    "three dimensions": (
        lambda: make(np.ones((4, 3, 2))),
        "has the shape \\(4, 3, 2\\), expected cells x genes \\(4, 3\\)",
    ),
    "repeated cells": (
        lambda: make(cells=["a", "b", "a", "a"]),
        "2 cell names are repeated \\(first: 'a'\\), expected unique ones; .*obs_names_make_unique",
    ),
    "repeated genes": (
        lambda: make(genes=["a", "b", "b"]),
        "1 gene names are repeated \\(first: 'b'\\), expected unique ones; .*var_names_make_unique",
    ),
    "no cells": (lambda: make()[:0], "holds no cells, expected some; check the filter"),
    "no genes": (lambda: make()[:, :0], "holds no genes, expected some"),
    "one cell": (lambda: make()[:1], "holds one cell, expected many"),
    "empty cells": (
        lambda: make(*(np.vstack([counts, counts[:2] * 0]) for counts in (SPLICED, UNSPLICED))),
        "2 of 6 cells have no counts at all \\(first cell: 'c4'\\).*take filtered/",
    ),
    "no unspliced": (lambda: make(unspliced=UNSPLICED * 0), "'unspliced' holds zeros alone, expected counts"),
    "no spliced": (lambda: make(SPLICED * 0), "'spliced' holds zeros alone"),
    "no counts": (lambda: make(sparse.csr_matrix((4, 3)), sparse.csr_matrix((4, 3))), "'spliced' holds zeros alone"),
    "no gene with both": (
        lambda: make(SPLICED * [1, 0, 0] + 1 * np.eye(3)[[0]], UNSPLICED * [0, 1, 1]),
        "No gene has counts in both layers 'spliced' and 'unspliced'",
    ),
    "swapped": (lambda: make(UNSPLICED, SPLICED * 5), "'unspliced' holds 14.4 times the counts of 'spliced'.*exchange"),
}


def state(adata: anndata.AnnData) -> list:
    """Everything that a check could have touched, as comparable values."""
    layers = [(name, type(layer), layer.dtype, dense(layer).tobytes()) for name, layer in adata.layers.items()]
    return [adata.is_view, list(adata.obs_names), list(adata.var_names), adata.obs.to_dict(), list(adata.uns), *layers]


@pytest.mark.filterwarnings("ignore:.*names are not unique:UserWarning")  # anndata's own word on what is tested here
@pytest.mark.parametrize("case", BAD)
def test_bad_layers_are_told_in_one_line_and_stay_as_they_are(case):
    adata, message = BAD[case][0](), BAD[case][1]
    before = state(adata)
    with pytest.raises(InputError, match=message) as told:
        checked_layers(adata)
    assert "\n" not in str(told.value)
    assert str(told.value).endswith((".", ")."))
    assert state(adata) == before


@pytest.mark.parametrize("where", ["spliced", "unspliced"])
def test_a_missing_layer_lists_those_present(where):
    with pytest.raises(InputError, match="Layer 'counts' isn't there, expected one of: 'spliced', 'unspliced'"):
        checked_layers(make(), **{where: "counts"})


def test_no_layers_at_all():
    adata = make()
    adata.layers.clear()
    with pytest.raises(InputError, match="Layer 'spliced' isn't there, and there are no others"):
        checked_layers(adata)


def test_one_layer_can_not_be_both():
    with pytest.raises(InputError, match="are both the layer 'spliced', expected two"):
        checked_layers(make(), unspliced="spliced")


def test_something_else_than_an_anndata():
    with pytest.raises(
        InputError, match=r"Expected an AnnData, got str; read a file with pyro_velo.read\(path\) first"
    ):
        checked_layers("pancreas.h5ad")


def test_backed_data_is_told_to_be_loaded(tmp_path):
    path = tmp_path / "a.h5ad"
    make(X=SPLICED).write_h5ad(path)
    backed = anndata.read_h5ad(path, backed="r")
    with pytest.raises(InputError, match=r"backed by a file, expected one in memory; .*to_memory\(\)"):
        checked_layers(backed)
    backed.file.close()


def test_a_matrix_on_disk_is_told_to_be_loaded(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["spliced"] = SPLICED
        with pytest.raises(InputError, match=r"is a h5py.Dataset, expected a numpy array .*\.compute\(\) for dask"):
            checked_matrix(file["spliced"], "Layer 'spliced'", gene_names=GENES)


def test_a_damaged_sparse_layer_is_found_before_it_is_used():
    matrix = sparse.csr_matrix(SPLICED)
    matrix.indices[-1] = 1_000_000
    with pytest.raises(InputError, match="'spliced' is a damaged sparse matrix"):
        checked_layers(make(matrix))


def test_a_view_with_bad_values_leaves_its_parent_alone():
    parent = make(changed(np.nan))
    before = state(parent)
    with pytest.raises(InputError, match="first gene: 'Sst'"):
        checked_layers(parent[1:])
    assert state(parent) == before
    checked_layers(parent[:, :2])


# ---- neighbours, keys, labels, embeddings


@pytest.mark.parametrize(("n_cells", "n_neighbors"), [(30, 30), (31, 30), (2, 1)])
def test_enough_cells_for_the_neighbours(n_cells, n_neighbors):
    check_neighbors(n_cells, n_neighbors)


@pytest.mark.parametrize(
    ("n_cells", "n_neighbors", "message"),
    [
        (29, 30, "30 neighbours were asked for but there are 29 cells.*lower the number of neighbours to 29"),
        (29, 0, "Expected at least one neighbour, got 0"),
    ],
)
def test_too_few_cells_for_the_neighbours(n_cells, n_neighbors, message):
    with pytest.raises(InputError, match=message):
        check_neighbors(n_cells, n_neighbors)


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("obs", "obs key 'x' isn't there, expected one of: 'clusters', 'batch'"),
        ("var", "var key 'x' isn't there, and there are no others"),
        ("layers", "Layer 'x' isn't there, expected one of: 'spliced', 'unspliced'"),
        ("obsm", "obsm key 'x' isn't there, expected one of: 'X_pca'"),
        ("uns", "uns key 'x' isn't there, expected one of: 'a'"),
    ],
)
def test_an_unknown_key_lists_those_present(where, message):
    adata = make(obsm={"X_pca": np.ones((4, 2))}, uns={"a": 1})
    adata.obs["clusters"] = adata.obs["batch"] = "a"
    check_key(adata, "obs", "clusters")
    with pytest.raises(InputError, match=message):
        check_key(adata, where, "x")


def test_a_long_list_is_shortened():
    with pytest.raises(InputError, match="'19' and 80 more; choose"):
        check_known("x", map(str, range(100)), "Gene")


LABELS = {
    "text": ["a", "b", "a", "c"],
    "category": pd.Categorical(["a", "b", "a", "c"]),
    "pandas text": pd.array(["a", "b", "a", "c"], dtype="string"),
    "boolean": [True, False, True, True],
    "integer": [1, 2, 1, 3],
}
MISSING = {
    "text": ["a", np.nan, None, "c"],
    "category": pd.Categorical(["a", None, None, "c"]),
    "pandas text": pd.array(["a", None, None, "c"], dtype="string"),
    "boolean": pd.array([True, None, None, True], dtype="boolean"),
    "integer": pd.array([1, None, None, 3], dtype="Int64"),
    "float": [1.0, np.nan, np.nan, 3.0],
}


@pytest.mark.parametrize("kind", LABELS)
def test_labels_are_text(kind):
    adata = make()
    adata.obs["clusters"] = LABELS[kind]
    labels = checked_labels(adata, "clusters")
    assert labels.dtype.kind == "U"
    assert list(labels) == [str(label) for label in LABELS[kind]]


@pytest.mark.parametrize("kind", MISSING)
def test_missing_labels_are_counted(kind):
    adata = make()
    adata.obs["clusters"] = MISSING[kind]
    with pytest.raises(
        InputError, match=r"'clusters' holds 2 missing labels \(first cell: 'c1'\).*fill them in or drop"
    ):
        checked_labels(adata, "clusters")


@pytest.mark.parametrize("kind", MISSING)
@pytest.mark.parametrize("suffix", [".h5ad", ".zarr"])
def test_missing_labels_elsewhere_do_not_matter_and_are_kept(kind, suffix, tmp_path):
    adata = make()
    adata.obs["other"] = MISSING[kind]
    checked_layers(adata)
    dtype = adata.obs["other"].dtype
    write_whole(adata, tmp_path / f"a{suffix}")
    assert adata.obs["other"].dtype == dtype
    assert list(read(tmp_path / f"a{suffix}").obs["other"].isna()) == [False, True, True, False]


@pytest.mark.parametrize("name", ["umap", "X_umap"])
def test_an_embedding_goes_by_either_name(name):
    adata = make(obsm={"X_umap": np.arange(12, dtype=np.float32).reshape(4, 3)})
    plane = checked_basis(adata, name)
    assert plane.shape == (4, 2) and plane.dtype == np.float64


@pytest.mark.parametrize(
    ("basis", "message"),
    [
        ("tsne", "Embedding 'X_tsne' isn't there, expected one of: 'X_line', 'X_lost'"),
        ("line", "Embedding 'X_line' has the shape \\(4, 1\\), expected two columns"),
        ("lost", "holds NaN or infinite coordinates for 1 cells \\(first cell: 'c2'\\)"),
    ],
)
def test_a_bad_embedding(basis, message):
    lost = np.ones((4, 2))
    lost[2, 1] = np.nan
    with pytest.raises(InputError, match=message):
        checked_basis(make(obsm={"X_line": np.ones((4, 1)), "X_lost": lost}), basis)


@pytest.mark.parametrize(
    ("where", "key"),
    [
        ("layers", "velocity"),
        ("var", "fit_alpha"),
        ("obs", "latent_time"),
        ("obsm", "X_velocity_latent"),
        ("uns", "pyro_velo"),
    ],
)
def test_a_fit_is_not_replaced_unasked(where, key):
    adata = make()
    check_output_keys(adata)
    getattr(adata, where)[key] = SPLICED if where == "layers" else np.ones(adata.n_vars if where == "var" else 4)
    if where == "obsm":
        adata.obsm[key] = np.ones((4, 2))
    with pytest.raises(InputError, match=f"holds a fit already \\({where}\\['{key}'\\]\\).*pass overwrite"):
        check_output_keys(adata)
    check_output_keys(adata, overwrite=True)


def test_every_output_key_is_guarded():
    adata = make()
    for key in anndata_keys.LAYERS_OUT:
        adata.layers[key] = SPLICED
    with pytest.raises(InputError) as told:
        check_output_keys(adata)
    assert all(key in str(told.value) for key in anndata_keys.LAYERS_OUT)


# ---- outputs


def listing(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() if path.is_file() else b"" for path in folder.rglob("*")}


def put(path: Path, content: str = "precious") -> Path:
    path.write_text(content)
    return path


def folder(path: Path) -> Path:
    path.mkdir()
    put(path / "thesis.txt")
    return path


OUTPUTS: dict[str, tuple[Callable[[Path], dict], str]] = {
    "exists": (lambda f: {"path": put(f / "a.h5ad")}, "a.h5ad exists already, .*pass overwrite"),
    "zarr exists": (lambda f: {"path": write_whole(make(), f / "a.zarr")}, "a.zarr exists already"),
    "a link to nowhere": (lambda f: {"path": linked(f / "a.h5ad", f / "none")}, "a.h5ad exists already"),
    "no folder": (
        lambda f: {"path": f / "none" / "a.h5ad"},
        "none isn't a folder, expected one to write to; create it",
    ),
    "a file as folder": (lambda f: {"path": put(f / "x") / "a.h5ad"}, "x isn't a folder"),
    "the input": (
        lambda f: {"path": (p := put(f / "a.h5ad")), "source": p, "overwrite": True},
        "a.h5ad is the input itself",
    ),
    "the input by another way": (
        lambda f: {"path": linked(f / "b.h5ad", put(f / "a.h5ad")), "source": f / "a.h5ad", "overwrite": True},
        "b.h5ad is the input itself",
    ),
    "another suffix": (lambda f: {"path": f / "a.csv"}, "ends in '.csv', expected .h5ad or .zarr"),
    "no suffix": (lambda f: {"path": f / "a"}, "ends in '', expected .h5ad or .zarr"),
    "report suffix": (lambda f: {"path": f / "a.txt", "formats": (".html",)}, "expected .html; choose such a name"),
    "somebody's folder": (
        lambda f: {"path": folder(f / "a.zarr"), "overwrite": True},
        "a.zarr is a folder, expected a file or a zarr store",
    ),
}


def linked(path: Path, target: Path) -> Path:
    path.symlink_to(target)
    return path


@pytest.mark.parametrize("case", OUTPUTS)
def test_a_bad_output_is_told_before_the_work_and_nothing_is_written(case, tmp_path):
    make_arguments, message = OUTPUTS[case]
    arguments = make_arguments(tmp_path)
    before = listing(tmp_path)
    with pytest.raises(InputError, match=message) as told:
        check_output(**arguments)
    assert "\n" not in str(told.value)
    assert listing(tmp_path) == before


def test_a_folder_that_refuses_is_told(monkeypatch, tmp_path):
    def refuse(**_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pyro_velo.data.output.tempfile.TemporaryFile", refuse)
    with pytest.raises(InputError, match="can't be written to \\(Permission denied\\)"):
        check_output(tmp_path / "a.h5ad")


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs /proc, a folder that nobody can write to")
def test_a_folder_that_nobody_can_write_to():
    with pytest.raises(InputError, match="/proc/self can't be written to"):
        check_output("/proc/self/a.h5ad")


@pytest.mark.parametrize("suffix", [".h5ad", ".zarr"])
@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("view", [False, True])
def test_what_is_written_is_read_back_and_the_source_is_unchanged(suffix, overwrite, view, tmp_path):
    adata = make(X=SPLICED.astype(np.float32), obsm={"X_umap": np.ones((4, 2))}, uns={"settings": {"seed": 0}})
    adata.obs["clusters"] = ["a", "b", np.nan, "a"]
    adata.raw = adata.copy()
    adata = adata[[2, 0, 1]] if view else adata
    if overwrite:
        write_whole(make()[:2].copy(), tmp_path / f"a{suffix}")
    before = state(adata)
    written = write_whole(adata, tmp_path / f"a{suffix}", overwrite)
    assert [path.name for path in tmp_path.iterdir()] == [f"a{suffix}"]
    assert repr(state(adata)) == repr(before) and adata.obs["clusters"].dtype == object
    again = read(written)
    for name in ("spliced", "unspliced"):
        np.testing.assert_array_equal(dense(again.layers[name]), dense(adata.layers[name]))
    np.testing.assert_array_equal(again.X, adata.X)
    np.testing.assert_array_equal(again.raw.X, adata.raw.X)
    assert again.uns["settings"]["seed"] == 0 and again.obsm["X_umap"].shape == (adata.n_obs, 2)


@pytest.mark.parametrize("suffix", [".h5ad", ".zarr"])
@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, RuntimeError])
def test_an_interrupted_write_leaves_nothing_and_the_old_file_whole(suffix, existing, error, tmp_path, monkeypatch):
    path = tmp_path / f"a{suffix}"
    if existing:
        write_whole(make(), path)
    before = listing(tmp_path)

    def interrupted(self, partial, **_):
        partial.write_bytes(b"half")
        raise error

    monkeypatch.setattr(anndata.AnnData, f"write_{suffix[1:]}", interrupted)
    with pytest.raises(error):
        write_whole(make(), path, overwrite=True)
    assert listing(tmp_path) == before


@pytest.mark.parametrize("suffix", [".h5ad", ".zarr"])
def test_a_failing_rename_puts_the_old_output_back(suffix, tmp_path, monkeypatch):
    path = write_whole(make(), tmp_path / f"a{suffix}")
    before = listing(tmp_path)
    rename = os.rename

    def refuse(source, target):
        if Path(source).name == path.name and Path(target) == path:
            raise OSError(28, "No space left on device")
        rename(source, target)

    monkeypatch.setattr("pyro_velo.data.output.os.rename", refuse)
    monkeypatch.setattr("pyro_velo.data.output.os.replace", refuse)
    with pytest.raises(InputError, match="can't be written \\(No space left on device\\)"):
        write_whole(make()[:2], path, overwrite=True)
    assert listing(tmp_path) == before


def test_a_full_disk_is_told_in_one_line(tmp_path):
    message = r"a\.html can't be written \(No space left on device\)"
    with pytest.raises(InputError, match=message) as told, whole(tmp_path / "a.html", formats=(".html",)) as partial:
        partial.write_text("half")
        raise OSError(28, "No space left on device")
    assert "\n" not in str(told.value)
    assert not list(tmp_path.iterdir())


def test_ctrl_c_in_the_middle_of_a_real_write(tmp_path):
    code = (
        "import sys, time\nfrom pyro_velo.data import whole\n"
        "with whole(sys.argv[1], formats=()) as partial:\n"
        "    partial.write_text('half'); print('started', flush=True); time.sleep(60)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "out")]
    root = Path(__file__).resolve().parent.parent
    # A shell's background jobs ignore Ctrl-C, and hand that down.
    options = {"cwd": root, "preexec_fn": lambda: signal.signal(signal.SIGINT, signal.default_int_handler)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options) as process:
        assert process.stdout.readline() == b"started\n"
        assert any(tmp_path.iterdir())
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) != 0
    assert not list(tmp_path.iterdir())


UNWRITABLE = {
    "mixed text and numbers": ["a", 1, "b", "c"],
    "mixed categories": pd.Categorical(["a", 1, "a", 1]),
    "dates": pd.date_range("2020-01-01", periods=4),
    "lists": [[1], [2], [3], [4]],
    "objects": np.array([1, 2, 3, 4], dtype=object),
    "intervals": pd.cut([1, 2, 3, 4], 2),
}


@pytest.mark.parametrize("suffix", [".h5ad", ".zarr"])
@pytest.mark.parametrize("kind", UNWRITABLE)
def test_a_column_that_no_file_holds_is_found_before_anything_is_written(kind, suffix, tmp_path):
    adata = make()
    adata.obs["fine"] = ["a", "b", None, "c"]
    adata.obs["odd"] = UNWRITABLE[kind]
    with pytest.raises(
        InputError, match=r"obs column 'odd' can't be stored .*convert it \(for a column: .astype\(str\)"
    ):
        write_whole(adata, tmp_path / f"a{suffix}")
    assert not list(tmp_path.iterdir())
    adata.obs["odd"] = adata.obs["odd"].astype(str)
    write_whole(adata, tmp_path / f"a{suffix}")


def test_two_columns_of_one_name():
    adata = make()
    adata.obs = pd.DataFrame(np.ones((4, 2)), columns=["a", "a"], index=adata.obs_names)
    with pytest.raises(InputError, match=r"1 obs column names are repeated \(first: 'a'\)"):
        check_writable(adata)


def test_a_column_without_any_value_is_kept(tmp_path):
    adata = make()
    adata.obs["none"] = np.full(4, None, dtype=object)
    assert read(write_whole(adata, tmp_path / "a.h5ad")).obs["none"].isna().all()


def test_a_uns_key_that_no_file_holds():
    with pytest.raises(InputError, match="uns key 'model' can't be stored"):
        check_writable(make(uns={"fine": 1, "model": object()}))


def test_the_free_memory_is_known_here():
    free = free_memory()
    assert free is None or 2**20 < free < 2**50
