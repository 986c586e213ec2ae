"""A layer as it comes, checked and copied: any dense or sparse kind and dtype in, float32 or integers out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from pyro_velo.errors import InputError

Matrix: TypeAlias = Any
"""Cells x genes: a numpy array or a scipy csr_matrix (scipy has no types)."""

INT32 = np.iinfo(np.int32)


def checked_matrix(
    matrix: object, what: str, *, gene_names: Sequence[str], shape: tuple[int, int] | None = None
) -> Matrix:
    """A copy of `matrix` that can be trusted: finite, non-negative, csr (sorted, no duplicates, no zeros) or C-ordered.

    Floats become float32; integers stay integers, int32 wherever they fit (an unsigned type would wrap in u - s).
    `what` names the matrix in the errors, e.g. "Layer 'spliced'".
    Shapes: (N, G) in, (N, G) out.

    Raises `InputError` for what isn't in memory, isn't numeric, has another shape, is NaN, infinite or negative, or is
    a sparse matrix whose indices point outside itself.
    """
    held = _held(matrix, what)
    if shape is not None and held.shape != shape:
        raise InputError(
            f"{what} has the shape {held.shape}, expected cells x genes {shape}; give it one row per cell and one "
            "column per gene."
        )
    if sparse.issparse(held):
        check_sparse(held, what)
    copy = _copy(held, what)
    _check_values(copy, what, gene_names)
    return copy


def check_sparse(matrix: Any, what: str) -> None:
    """Raises `InputError` if a csr or csc matrix points outside itself, which would crash or corrupt any arithmetic."""
    if isinstance(matrix, sparse.csr_matrix | sparse.csc_matrix | sparse.csr_array | sparse.csc_array):
        try:
            matrix.check_format(full_check=True)
        except ValueError as error:
            raise InputError(
                f"{what} is a damaged sparse matrix ({error}), expected indices inside its shape {matrix.shape}; "
                "write the file again from its source."
            ) from error


def entries(matrix: Matrix) -> NDArray:
    """The stored values: all of a dense matrix, those other than zero of a sparse one."""
    return matrix.data if sparse.issparse(matrix) else matrix


def sums(matrix: Matrix, axis: int) -> NDArray[np.float64]:
    """Sums over cells (axis 0: one a gene) or genes (axis 1: one a cell), in float64 and one-dimensional."""
    return np.asarray(matrix.sum(axis=axis, dtype=np.float64)).ravel()


def _held(matrix: Any, what: str) -> Any:
    """The matrix, if it is in memory; a masked entry counts as missing."""
    if isinstance(matrix, np.ma.MaskedArray):
        return np.ma.filled(matrix.astype(np.float32), np.nan)
    if isinstance(matrix, np.ndarray):
        return np.asarray(matrix)
    if sparse.issparse(matrix):
        return matrix if matrix.format in ("csr", "csc") else matrix.tocoo()
    kind = f"{type(matrix).__module__.split('.')[0]}.{type(matrix).__qualname__}"
    raise InputError(
        f"{what} is a {kind}, expected a numpy array or a scipy sparse matrix in memory; load it first "
        "(adata.to_memory(), or .compute() for dask)."
    )


def _copy(held: Any, what: str) -> Matrix:
    if not sparse.issparse(held):
        if held.dtype.kind not in "fiu":
            raise _not_numeric(held.dtype, what)
        with np.errstate(over="ignore"):  # what overflows float32 becomes inf, and is reported as such
            return np.array(held, dtype=_target(held), order="C", copy=True)
    if held.data.dtype.kind not in "fiu":
        raise _not_numeric(held.data.dtype, what)
    with np.errstate(over="ignore"):
        copy = sparse.csr_matrix(held.astype(_target(held.data), copy=True))
    copy.sum_duplicates()
    copy.eliminate_zeros()
    return copy


def _target(values: NDArray) -> type[np.generic]:
    if values.dtype.kind == "f":
        return np.float32
    fits = values.size == 0 or (values.min() >= INT32.min and values.max() <= INT32.max)
    return np.int32 if fits else np.int64


def _not_numeric(dtype: np.dtype, what: str) -> InputError:
    if dtype.kind == "b":
        return InputError(
            f"{what} holds booleans (detected or not), expected abundances; pass the counts that it was made from."
        )
    return InputError(
        f"{what} has the dtype {dtype}, expected integers or floats; convert it with .astype('float32') if it holds "
        "numbers."
    )


def _check_values(matrix: Matrix, what: str, gene_names: Sequence[str]) -> None:
    values = entries(matrix)
    if values.size == 0:
        return
    # min and max propagate NaN, so the common case costs no mask of the size of the data.
    low, high = values.min(), values.max()
    if not (np.isfinite(low) and np.isfinite(high)):
        count, gene = _where(matrix, ~np.isfinite(values), gene_names)
        raise InputError(
            f"{what} holds {count:,} NaN or infinite values (first gene: {gene!r}), expected finite ones; "
            "drop those genes or cells, or go back to the raw counts."
        )
    if low < 0:
        count, gene = _where(matrix, values < 0, gene_names)
        raise InputError(
            f"{what} holds {count:,} negative values (first gene: {gene!r}), expected counts or other abundances; "
            "pass the layer from before it was centred, scaled or corrected."
        )


def _where(matrix: Matrix, bad: NDArray[np.bool_], gene_names: Sequence[str]) -> tuple[int, str]:
    """How many entries are bad, and the first gene, in the order of the matrix, that has one."""
    columns = matrix.indices[bad] if sparse.issparse(matrix) else np.flatnonzero(bad.any(axis=0))
    return int(bad.sum()), str(gene_names[int(columns.min())])
