"""Matrix Market text in coordinate form, plain or gzipped, with one value an entry or, as in early STARsolo, three."""

from __future__ import annotations

import gzip
from collections.abc import Iterator
from pathlib import Path
from typing import IO, NamedTuple, cast

import numpy as np
import pandas as pd
from scipy import sparse

from pyro_velo.data.declared import check_fits, explained
from pyro_velo.errors import InputError

CHUNK = 2**20
"""Entries parsed at a time."""
MAX_DEFLATE = 1_032
"""How much larger than a gzip file its contents can be."""


class Header(NamedTuple):
    """What the first lines say: sizes, whether values are integers, lines before the first entry, values an entry."""

    n_rows: int
    n_columns: int
    n_entries: int
    integer: bool
    n_lines: int
    n_values: int


def read_coordinate(path: Path, *, shape: tuple[int, int], n_values: int = 1) -> list[sparse.coo_matrix]:
    """One coo matrix (rows, columns) for each value of an entry, int32 or float32.

    `shape` is what the lists of names beside the file say; the file has to agree. It takes 8 + 4 `n_values` bytes
    an entry.

    Raises `InputError` for a file that isn't Matrix Market, is cut short, claims more entries than it can hold, has
    another number of values an entry, or indices outside its shape.
    """
    header = read_header(path)
    _check_header(header, path, shape, n_values)
    rows = np.empty(header.n_entries, np.int32)
    columns = np.empty(header.n_entries, np.int32)
    values = np.empty((n_values, header.n_entries), np.int32 if header.integer else np.float32)
    filled = 0
    for chunk in _chunks(path, header):
        end = filled + len(chunk)
        if end > header.n_entries:
            raise InputError(f"{path} holds more than the {header.n_entries:,} entries it announces; write it again.")
        for i, place in enumerate((rows, columns, *values)):
            place[filled:end] = chunk[i].to_numpy()
        filled = end
    if filled < header.n_entries:
        raise InputError(
            f"{path} holds {filled:,} entries, expected the {header.n_entries:,} it announces; it was cut short, so "
            "copy or write it again."
        )
    _check_indices(rows, columns, path, shape)
    rows -= 1
    columns -= 1
    return [sparse.coo_matrix((value, (rows, columns)), shape=shape) for value in values]


def read_header(path: Path) -> Header:
    """The banner, the sizes, and the number of values in the first entry (1 if there are no entries)."""
    with explained(path, "Matrix Market"), _open(path) as text:
        banner = text.readline().lower().split()
        if banner[:1] != ["%%matrixmarket"] or banner[2:3] != ["coordinate"] or banner[4:5] != ["general"]:
            raise InputError(f"{path} isn't a general Matrix Market coordinate file, expected one; write it as such.")
        if banner[3] not in ("integer", "real"):
            raise InputError(f"{path} holds {banner[3]} values, expected integer or real ones; write counts.")
        n_lines, line = 2, text.readline()
        while line.startswith("%") or line.isspace():
            n_lines, line = n_lines + 1, text.readline()
        sizes = line.split()
        if len(sizes) != 3 or not all(size.isdecimal() for size in sizes):
            raise InputError(f"{path} has no line of rows, columns and entries after its banner; write it again.")
        first = text.readline().split()
    n_rows, n_columns, n_entries = map(int, sizes)
    return Header(n_rows, n_columns, n_entries, banner[3] == "integer", n_lines, max(1, len(first) - 2))


def _open(path: Path) -> IO[str]:
    return cast(IO[str], gzip.open(path, "rt") if path.suffix == ".gz" else open(path))


def _check_header(header: Header, path: Path, shape: tuple[int, int], n_values: int) -> None:
    if (header.n_rows, header.n_columns) != shape:
        raise InputError(
            f"{path} announces {header.n_rows:,} x {header.n_columns:,}, expected {shape[0]:,} x {shape[1]:,} as the "
            "lists of names beside it say; take all files from the same run."
        )
    if header.n_entries and header.n_values != n_values:
        raise InputError(
            f"{path} has {header.n_values} values an entry, expected {n_values}; take the output for velocity, not "
            "that for genes alone."
        )
    # The shortest entry is "1 1 1" and a newline, each further value at least two bytes.
    room = path.stat().st_size * (MAX_DEFLATE if path.suffix == ".gz" else 1) // (4 + 2 * n_values) + 1
    if header.n_entries > min(room, header.n_rows * header.n_columns):
        raise InputError(
            f"{path} announces {header.n_entries:,} entries, expected at most what its size and shape allow; it was "
            "cut short, so copy or write it again."
        )
    check_fits(path, header.n_entries * (8 + 4 * n_values))


def _chunks(path: Path, header: Header) -> Iterator[pd.DataFrame]:
    if header.n_entries == 0:
        return
    value = np.int32 if header.integer else np.float32
    kinds = {i: np.int32 if i < 2 else value for i in range(2 + header.n_values)}
    with (
        explained(path, "Matrix Market"),
        pd.read_csv(path, sep=r"\s+", header=None, skiprows=header.n_lines, dtype=kinds, chunksize=CHUNK) as chunks,
    ):
        yield from chunks


def _check_indices(rows: np.ndarray, columns: np.ndarray, path: Path, shape: tuple[int, int]) -> None:
    for name, indices, size in (("row", rows, shape[0]), ("column", columns, shape[1])):
        if indices.size and (indices.min() < 1 or indices.max() > size):
            raise InputError(
                f"{path} has {name} indices from {indices.min()} to {indices.max()}, expected 1 to {size}; write it "
                "again."
            )
