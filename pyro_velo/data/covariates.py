"""What is known of the cells besides their RNA, as numbers: categories as one-hot, continuous values standardised."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pyro_velo.data.checks import check_key
from pyro_velo.errors import InputError

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData


@dataclass(frozen=True)
class Design:
    """`matrix` (N, C) float32; `group` (N,), the number of each cell's experimental batch, with the names `batches`.

    `levels` lists the categories of each categorical column of obs, `columns` says where in `matrix` each stands.
    """

    matrix: NDArray[np.float32]
    group: NDArray[np.int64] | None = None
    batches: tuple[str, ...] = ()
    levels: dict[str, tuple[str, ...]] = field(default_factory=dict)
    columns: dict[str, slice] = field(default_factory=dict)
    batch_key: str | None = None

    def tensors(self, device: str | torch.device) -> tuple[Tensor, Tensor | None]:
        """The matrix and the groups as tensors."""
        group = None if self.group is None else torch.from_numpy(self.group).to(device)
        return torch.from_numpy(self.matrix).to(device), group

    def number_of(self, batch: str) -> int:
        """The number of an experimental batch; raises `InputError` for one that was not fitted."""
        if batch not in self.batches:
            known = ", ".join(self.batches) or "none: fit with a batch key"
            raise InputError(f"Batch {batch!r} is unknown, expected one that was fitted ({known}).")
        return self.batches.index(batch)


def design(adata: AnnData, batch_key: str | None = None, covariates: Sequence[str] = ()) -> Design | None:
    """The covariates in the columns `covariates` of obs, and the experimental batches in `batch_key`.

    Numbers count as continuous, everything else as categories. None where nothing is asked for.
    Raises `InputError` for a column that is absent, named twice, holds missing values, or is the same in every cell,
    and for fractions as experimental batches.
    """
    names = [*([batch_key] if batch_key else []), *covariates]
    if not names:
        return None
    if len(set(names)) < len(names):
        raise InputError(f"Covariates {names} name a column twice, expected each once; a batch key counts as one.")
    parts: list[NDArray[np.float32]] = []
    levels: dict[str, tuple[str, ...]] = {}
    columns: dict[str, slice] = {}
    group, width = None, 0
    for name in names:
        check_key(adata, "obs", name)
        column = adata.obs[name]
        if column.isna().any():
            raise InputError(
                f"obs[{name!r}] is missing for {int(column.isna().sum())} cells, expected a value in every one; "
                "leave these cells out, or name them a category of their own."
            )
        if name == batch_key and _fractional(column):
            raise InputError(
                f"obs[{name!r}] holds numbers that aren't whole ({column.iloc[0]:g}), expected the names or numbers of "
                "experimental batches; name a column of those, or take this one as a covariate."
            )
        if name == batch_key or not _continuous(column):
            codes, levels[name] = _codes(column, name)
            part = np.eye(len(levels[name]), dtype=np.float32)[codes]
            group = codes if name == batch_key else group
        else:
            part = _standardised(column, name)
        columns[name] = slice(width, width + part.shape[1])
        width += part.shape[1]
        parts.append(part)
    batches = levels[batch_key] if batch_key else ()
    return Design(np.concatenate(parts, 1), group, batches, levels, columns, batch_key)


def _continuous(column: pd.Series) -> bool:
    return column.dtype.kind in "fiu"


def _fractional(column: pd.Series) -> bool:
    return column.dtype.kind == "f" and bool((column != column.round()).any())


def _codes(column: pd.Series, name: str) -> tuple[NDArray[np.int64], tuple[str, ...]]:
    values = column.astype(str).to_numpy()
    found, codes = np.unique(values, return_inverse=True)
    if len(found) < 2:
        raise InputError(f"obs[{name!r}] is {found[0]!r} in every cell, expected two values or more; leave it out.")
    return codes.astype(np.int64), tuple(map(str, found))


def _standardised(column: pd.Series, name: str) -> NDArray[np.float32]:
    values = column.to_numpy(np.float64)
    if not np.isfinite(values).all():
        raise InputError(f"obs[{name!r}] holds infinite values, expected finite ones; mend or leave it out.")
    if np.ptp(values) == 0:
        raise InputError(f"obs[{name!r}] is {values[0]:g} in every cell, expected it to vary; leave it out.")
    return ((values - values.mean()) / values.std()).astype(np.float32)[:, None]
