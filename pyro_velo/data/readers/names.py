"""Names of cells and genes, as the text files of the quantifiers list them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from pyro_velo.data.declared import explained


def unique_names(names: Sequence[str], ids: Sequence[str]) -> list[str]:
    """The names; those that are repeated get their id appended, those that are empty are replaced by it.

    >>> unique_names(["Ins1", "Pou5f1", "Pou5f1", ""], ["E1", "E2", "E3", "E4"])
    ['Ins1', 'Pou5f1_E2', 'Pou5f1_E3', 'E4']
    """
    times = Counter(names)
    return [
        identity if not name else f"{name}_{identity}" if times[name] > 1 else name
        for name, identity in zip(names, ids, strict=True)
    ]


def read_columns(path: Path) -> list[list[str]]:
    """The columns of a tab-separated text file without a header, plain or `.gz`, every cell as text."""
    if path.stat().st_size == 0:
        return [[]]
    with explained(path, "tab-separated text"):
        try:
            table = pd.read_csv(path, sep="\t", header=None, dtype=str, na_filter=False, quoting=3)
        except pd.errors.EmptyDataError:
            return [[]]
        return [table[column].tolist() for column in table.columns]


def plain_or_gz(folder: Path, name: str) -> Path | None:
    """`name` or `name.gz` in a folder, whichever is there."""
    return next((path for path in (folder / name, folder / f"{name}.gz") if path.is_file()), None)
