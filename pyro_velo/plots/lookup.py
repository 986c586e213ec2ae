"""Finding what a picture needs in an AnnData, and saying what is there when it is not."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import sparse

from pyro_velo.data import anndata_keys as keys
from pyro_velo.errors import InputError

FIT = "Fit the model first: fit.write(adata), or `pyro-velo fit IN -o OUT.h5ad`."
PREPARE = "Prepare the layers first: pv.pp.prepare(adata)."


class Annotated(Protocol):
    """What pictures read of an AnnData: the tables of cells and genes, and the arrays beside them."""

    obs: Any
    var: Any
    layers: Any
    obsm: Any
    uns: Any
    var_names: Any


def missing(where: str, name: str, present: Iterable[object], remedy: str) -> InputError:
    """The error for a key that is not there: where it was sought, what is there, and the remedy."""
    listed = ", ".join(map(str, present)) or "nothing"
    return InputError(f"Expected {name!r} in adata.{where}, which holds {listed}. {remedy}")


def gene_position(adata: Annotated, gene: str) -> int:
    """The column of `gene`; an error names the genes that are spelled most alike."""
    found = np.flatnonzero(np.asarray(adata.var_names == gene))
    if len(found) == 1:
        return int(found[0])
    if len(found) > 1:
        raise InputError(
            f"Gene {gene!r} stands {len(found)} times in adata.var_names. Run adata.var_names_make_unique()."
        )
    alike = [name for name in adata.var_names if str(name).lower().startswith(gene[:2].lower())][:8]
    first = list(adata.var_names[:8])
    listed = alike if alike else first
    raise InputError(
        f"Expected gene {gene!r} among the {len(adata.var_names)} in adata.var_names, which holds "
        f"{', '.join(map(str, listed))}, ... . Choose one of adata.var_names."
    )


def gene_column(adata: Annotated, layer: str, position: int, remedy: str = FIT) -> NDArray[np.float64]:
    """One gene of a layer, dense, (cells,)."""
    if layer not in adata.layers:
        raise missing("layers", layer, adata.layers.keys(), remedy)
    column = adata.layers[layer][:, [position]]
    dense = column.toarray() if sparse.issparse(column) else np.asarray(column)
    return dense.ravel().astype(np.float64)


def abundance(adata: Annotated, position: int) -> tuple[tuple[NDArray[np.float64], str], ...]:
    """One gene of the layers that were fitted, spliced and unspliced, each with the layer's name."""
    names = keys.fitted_layers(adata.uns, adata.layers.keys())
    return tuple((gene_column(adata, name, position, PREPARE), name) for name in names)


def per_gene(adata: Annotated, name: str) -> NDArray[np.float64]:
    """A column of numbers of `var`, (genes,), NaN for genes that were not fitted."""
    if name not in adata.var:
        raise missing("var", name, adata.var.columns, FIT)
    return np.asarray(adata.var[name], dtype=np.float64)


def per_cell(adata: Annotated, name: str, remedy: str = FIT) -> pd.Series:
    """A column of `obs`, (cells,)."""
    if name not in adata.obs:
        raise missing("obs", name, adata.obs.columns, remedy)
    return adata.obs[name]


def coordinates(adata: Annotated, basis: str) -> NDArray[np.float64]:
    """The first two dimensions of an embedding, (cells, 2), in float64."""
    return _pair(adata, embedding_key(basis), "Compute it (scanpy: sc.tl.umap(adata)), or name another basis.")


def velocities(adata: Annotated, basis: str) -> NDArray[np.float64]:
    """The velocity on an embedding, (cells, 2), in float64: streamplot refuses float32 grids now and then."""
    return _pair(adata, keys.velocity_embedding(basis), f"Fit, or project again, once X_{bare_name(basis)} is there.")


def bare_name(basis: str) -> str:
    """`umap` for both `umap` and `X_umap`."""
    return basis.removeprefix("X_")


def shown_name(basis: str) -> str:
    """The name as readers know it: short ones are acronyms.

    >>> shown_name("X_umap"), shown_name("force")
    ('UMAP', 'force')
    """
    name = bare_name(basis)
    return name.upper() if len(name) <= 4 else name


def embedding_key(basis: str) -> str:
    """The obsm key of an embedding.

    >>> embedding_key("umap"), embedding_key("X_umap")
    ('X_umap', 'X_umap')
    """
    return f"X_{bare_name(basis)}"


def _pair(adata: Annotated, name: str, remedy: str) -> NDArray[np.float64]:
    if name not in adata.obsm:
        raise missing("obsm", name, adata.obsm.keys(), remedy)
    values = np.asarray(adata.obsm[name], dtype=np.float64)
    if values.ndim != 2 or values.shape[1] < 2:
        raise InputError(
            f"Expected two dimensions or more in adata.obsm[{name!r}], found shape {values.shape}. {remedy}"
        )
    return values[:, :2]
