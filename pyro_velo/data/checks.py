"""Bad input, found before any work is done: each check raises an `InputError` of one sentence, and changes nothing."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from pyro_velo.data.anndata_keys import LAYERS_OUT, OBS_OUT, OBSM_OUT, SPLICED, UNS, UNS_PREPARE, UNSPLICED, VAR_OUT
from pyro_velo.data.matrices import Matrix, checked_matrix, sums
from pyro_velo.errors import InputError

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData

MAX_UNSPLICED_RATIO = 4.0
"""Unspliced over spliced counts above which the two are taken to be swapped.

Cells have .1 to .5 (the pancreas .21, so 4.8 when swapped), nuclei 1 to 4."""
NO_LIMIT = float("inf")
LISTED = 20
"""How many of the names that are there an error lists."""


class Layers(NamedTuple):
    """The two layers of N cells x G genes, each dense or csr, float32 or integer."""

    spliced: Matrix
    unspliced: Matrix


def checked_layers(
    adata: AnnData,
    *,
    spliced: str = SPLICED,
    unspliced: str = UNSPLICED,
    max_unspliced_ratio: float = MAX_UNSPLICED_RATIO,
) -> Layers:
    """Copies of the two layers, after every check that they can fail; `adata`, a view or not, stays as it is.

    A gene without counts is no error (see `expressed_genes`), unless no gene has any; a cell without counts is.

    Raises `InputError` as `check_adata`, for a missing layer, for whatever `checked_matrix` refuses, for a layer of
    zeros alone, for unspliced counts above `max_unspliced_ratio` times the spliced ones (inf: never), for empty cells.
    """
    check_adata(adata)
    check_two(spliced, unspliced)
    for name in (spliced, unspliced):
        check_key(adata, "layers", name)
    layers = Layers(*(_checked_layer(adata, name) for name in (spliced, unspliced)))
    of_genes, of_cells = ([sums(layer, axis) for layer in layers] for axis in (0, 1))
    check_counts(of_genes, of_cells, adata.obs_names, (spliced, unspliced), max_unspliced_ratio)
    return layers


def check_counts(
    of_genes: Sequence[NDArray[np.float64]],
    of_cells: Sequence[NDArray[np.float64]],
    cell_names: pd.Index,
    names: tuple[str, str],
    max_ratio: float,
) -> None:
    """What `checked_layers` refuses, from the sums over cells (G,) and over genes (N,) of spliced and unspliced."""
    _check_totals([float(each.sum()) for each in of_genes], names, max_ratio)
    _check_cells(of_cells[0] + of_cells[1], cell_names)
    if not ((of_genes[0] > 0) & (of_genes[1] > 0)).any():
        raise InputError(
            f"No gene has counts in both layers {names[0]!r} and {names[1]!r}, expected at least one; check that both "
            "come from the same genes."
        )


def check_two(spliced: str, unspliced: str) -> None:
    """Raises `InputError` if both molecules are named after one layer."""
    if spliced == unspliced:
        raise InputError(f"Spliced and unspliced are both the layer {spliced!r}, expected two; name one for each.")


def expressed_genes(layers: Layers) -> NDArray[np.bool_]:
    """(G,) True where a gene has at least one spliced and one unspliced count; the others can't be fitted."""
    return (sums(layers.spliced, 0) > 0) & (sums(layers.unspliced, 0) > 0)


def check_adata(adata: AnnData) -> None:
    """Raises `InputError` unless `adata` is an AnnData in memory, of two cells or more, with unique names."""
    from anndata import AnnData

    if not isinstance(adata, AnnData):
        raise InputError(
            f"Expected an AnnData, got {type(adata).__name__}; read a file with pyro_velo.read(path) first."
        )
    if adata.isbacked:
        raise InputError(
            "The AnnData is backed by a file, expected one in memory; load it with adata = adata.to_memory()."
        )
    if adata.n_obs == 0 or adata.n_vars == 0:
        missing = "cells" if adata.n_obs == 0 else "genes"
        raise InputError(f"The data holds no {missing}, expected some; check the filter or the file it comes from.")
    if adata.n_obs == 1:
        raise InputError("The data holds one cell, expected many; pass all cells of the experiment together.")
    check_unique(adata.obs_names, "cell", "adata.obs_names_make_unique()")
    check_unique(adata.var_names, "gene", "adata.var_names_make_unique()")


def check_unique(names: pd.Index, kind: str, remedy: str) -> None:
    """Raises `InputError` with the first repeated name unless all are unique."""
    repeated = names.duplicated()
    if repeated.any():
        first = names[int(repeated.argmax())]
        raise InputError(
            f"{int(repeated.sum()):,} {kind} names are repeated (first: {first!r}), expected unique ones; make them so "
            f"with {remedy}."
        )


def check_neighbors(n_cells: int, n_neighbors: int) -> None:
    """Raises `InputError` unless there are as many cells as neighbours to average over (a cell counts as its own)."""
    if n_neighbors < 1:
        raise InputError(f"Expected at least one neighbour, got {n_neighbors}; choose a positive number.")
    if n_cells < n_neighbors:
        raise InputError(
            f"{n_neighbors} neighbours were asked for but there are {n_cells} cells, expected at least as many cells; "
            f"lower the number of neighbours to {n_cells} or fewer, or pass more cells."
        )


def check_known(name: str, present: Iterable[object], what: str) -> None:
    """Raises `InputError`, with the names that are there, unless `name` is among them.

    >>> check_known("umap", ["X_pca"], "Embedding")
    Traceback (most recent call last):
    pyro_velo.errors.InputError: Embedding 'umap' isn't there, expected one of: 'X_pca'; choose one of these or add it.
    """
    names = [str(other) for other in present]
    if name in names:
        return
    if not names:
        raise InputError(f"{what} {name!r} isn't there, and there are no others; add it.")
    listed = ", ".join(map(repr, names[:LISTED])) + (f" and {len(names) - LISTED} more" if len(names) > LISTED else "")
    raise InputError(f"{what} {name!r} isn't there, expected one of: {listed}; choose one of these or add it.")


def check_key(adata: AnnData, where: str, key: str) -> None:
    """Raises `InputError`, listing the keys that are there, unless `key` is in `adata.<where>` (obs, layers, ...)."""
    what = "Layer" if where == "layers" else f"{where} key"
    check_known(key, getattr(adata, where).keys(), what)


def checked_labels(adata: AnnData, key: str) -> NDArray[np.str_]:
    """(N,) the group of each cell, as text, from an obs column of strings, categories, booleans or numbers.

    Raises `InputError` for an unknown column and for cells without a label.
    """
    check_key(adata, "obs", key)
    column = adata.obs[key]
    missing = column.isna().to_numpy()
    if missing.any():
        raise InputError(
            f"obs column {key!r} holds {int(missing.sum()):,} missing labels (first cell: "
            f"{adata.obs_names[int(missing.argmax())]!r}), expected one a cell; fill them in or drop those cells."
        )
    return np.asarray(column.astype(str), dtype=np.str_)


def checked_basis(adata: AnnData, basis: str) -> NDArray[np.float64]:
    """(N, 2) the first two coordinates of an embedding, named with or without `X_`.

    Raises `InputError` for an unknown embedding, one of fewer than two columns, and NaN or inf in it.
    """
    key = basis if basis in adata.obsm else f"X_{basis}"
    check_known(key, adata.obsm.keys(), "Embedding")
    coordinates = np.asarray(adata.obsm[key])
    if coordinates.ndim != 2 or coordinates.shape[1] < 2:
        raise InputError(f"Embedding {key!r} has the shape {coordinates.shape}, expected two columns; choose another.")
    plane = coordinates[:, :2].astype(np.float64)
    lost = ~np.isfinite(plane).all(axis=1)
    if lost.any():
        raise InputError(
            f"Embedding {key!r} holds NaN or infinite coordinates for {int(lost.sum()):,} cells (first cell: "
            f"{adata.obs_names[int(lost.argmax())]!r}), expected finite ones; compute it again or drop those cells."
        )
    return plane


def check_output_keys(adata: AnnData, *, overwrite: bool = False) -> None:
    """Raises `InputError`, listing them, if keys that a fit writes are there already and may not be replaced."""
    held = {where: getattr(adata, where) for where in ("layers", "var", "obs", "obsm")}
    check_free(held, adata.uns, overwrite=overwrite)


def check_free(held: Mapping[str, Container[str]], uns: Mapping[str, Any], *, overwrite: bool = False) -> None:
    """As `check_output_keys`, of the keys that are `held` in layers, var, obs and obsm."""
    if overwrite:
        return
    written = {"layers": LAYERS_OUT, "var": VAR_OUT, "obs": OBS_OUT, "obsm": OBSM_OUT}
    taken = [f"{where}[{key!r}]" for where, keys in written.items() for key in keys if key in held[where]]
    # Preparing leaves a note of its own under the same key.
    if set(uns.get(UNS, ())) - {UNS_PREPARE}:
        taken.append(f"uns[{UNS!r}]")
    if taken:
        listed = ", ".join(taken[:LISTED]) + (f" and {len(taken) - LISTED} more" if len(taken) > LISTED else "")
        raise InputError(
            f"The AnnData holds a fit already ({listed}), expected none of these keys; pass overwrite to replace them, "
            "or take the data from before that fit."
        )


def _checked_layer(adata: AnnData, name: str) -> Matrix:
    return checked_matrix(
        adata.layers[name], f"Layer {name!r}", gene_names=adata.var_names, shape=(adata.n_obs, adata.n_vars)
    )


def _check_totals(totals: Sequence[float], names: tuple[str, str], max_ratio: float) -> None:
    for name, total in zip(names, totals, strict=True):
        if total == 0:
            raise InputError(
                f"Layer {name!r} holds zeros alone, expected counts in it; velocity needs spliced and unspliced, so "
                "quantify the reads with a tool that counts both."
            )
    ratio = totals[1] / totals[0]
    if ratio > max_ratio:
        raise InputError(
            f"Layer {names[1]!r} holds {ratio:.1f} times the counts of {names[0]!r}, expected at most {max_ratio:g} "
            "times; if the two are swapped, exchange their names, and if these are single nuclei, pass --nuclei (in "
            "Python: a higher max_unspliced_ratio)."
        )


def _check_cells(totals: NDArray[np.float64], names: pd.Index) -> None:
    empty = totals == 0
    if empty.any():
        raise InputError(
            f"{int(empty.sum()):,} of {len(names):,} cells have no counts at all (first cell: "
            f"{names[int(empty.argmax())]!r}), expected some in each; drop the empty cells (a raw/ folder "
            "holds every barcode: take filtered/)."
        )


def check_whole(layer: Any, name: str) -> None:
    """Raises `InputError` for a layer with numbers that are not whole, which are no raw counts."""
    values = layer.data if sparse.issparse(layer) else layer
    fractions = values[values != np.rint(values)]
    if fractions.size:
        raise InputError(
            f"Layer {name!r} holds {fractions.size:,} numbers that aren't whole (first: {fractions[0]:g}), expected "
            "raw counts; pass the layer from before it was normalised. What is no counts is fitted as it is by a "
            "likelihood of scaled layers (fit --as-is), profiles by a Normal (vae --likelihood normal)."
        )
