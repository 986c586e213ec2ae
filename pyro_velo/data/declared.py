"""What a file claims, compared with what it holds, before anything of it is read.

A header of 2 kB can declare 40 GB of fill values, and a reader that believes it takes the machine down.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pyro_velo.errors import InputError

MAX_COMPRESSION = 2_000
"""No real file is smaller than what it declares by this much: deflate itself stops at 1,032."""
SLACK = 64 * 2**20
"""Bytes that a file may claim whatever its size."""


@contextmanager
def explained(path: Path, kind: str) -> Iterator[None]:
    """Turns whatever a damaged file makes a library raise into an `InputError` of one line."""
    try:
        yield
    except InputError:
        raise
    except MemoryError as error:
        raise InputError(f"{path} needs more memory than there is; read fewer cells or genes at a time.") from error
    except Exception as error:
        reason = (str(error).strip().splitlines() or [""])[0].rstrip(".")[:200]
        raise InputError(
            f"{path} can't be read as {kind} ({type(error).__name__}: {reason}), expected a complete one; "
            "copy or write it again."
        ) from error


def check_claim(path: Path, *, claimed: int, stored: int) -> None:
    """Raises `InputError` if `claimed` bytes can't come out of the `stored` ones by any compression of real data."""
    if claimed > stored * MAX_COMPRESSION + SLACK:
        raise InputError(
            f"{path} claims {in_words(claimed)} but holds {in_words(stored)}, expected data for what it claims; it was "
            "cut short or never filled, so write it again."
        )


def check_fits(path: Path, needed: int) -> None:
    """Raises `InputError` if `needed` bytes are more than the memory that is free."""
    free = free_memory()
    if free is not None and needed > free:
        raise InputError(
            f"{path} needs {in_words(needed)} of memory but {in_words(free)} are free, expected it to fit; store its "
            "layers sparse, or take fewer cells or genes."
        )


def free_memory() -> int | None:
    """Bytes that this process may still take: the machine's, or the control group's if less; None if unknown."""
    free = [_meminfo("MemAvailable:"), _cgroup()]
    return min((each for each in free if each is not None), default=None)


def hdf5_claim(path: Path) -> int:
    """Bytes that all datasets of an HDF5 file declare together.

    Raises `InputError` for a file that isn't HDF5, was cut short, or holds a csr or csc group that contradicts itself.
    """
    import h5py

    if path.stat().st_size == 0 or not h5py.is_hdf5(path):
        raise InputError(f"{path} isn't an HDF5 file, expected one; check the name, or copy or write it again.")
    claims: list[int] = []

    def visit(name: str, item: object) -> None:
        if isinstance(item, h5py.Dataset):
            claims.append(_bytes(item.shape, item.chunks, item.dtype.itemsize))
        elif isinstance(item, h5py.Group):
            check_csr(item, f"{path}: {name}")

    with explained(path, "HDF5"), h5py.File(path, "r") as file:
        file.visititems(visit)
    return sum(claims)


def zarr_claim(path: Path) -> int:
    """Bytes that all arrays of a zarr store declare together.

    Raises `InputError` for a folder that isn't a zarr store (zarr 3 itself refuses pickled arrays) and for a csr or csc
    group that contradicts itself.
    """
    import zarr

    claimed = 0
    with explained(path, "zarr"):
        for name, item in zarr.open_group(path, mode="r").members(max_depth=None):
            if isinstance(item, zarr.Group):
                check_csr(item, f"{path}: {name}")
                continue
            claimed += _bytes(item.shape, item.chunks, getattr(item.dtype, "itemsize", 16) or 16)
    return claimed


def folder_size(path: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def check_csr(group: Any, what: str) -> None:
    """Raises `InputError` if the arrays of a stored csr or csc matrix contradict each other or its shape.

    Scipy checks some of it, anndata none, and indices out of bounds read memory that isn't theirs.
    """
    attributes: Mapping[str, Any] = group.attrs
    kind = attributes.get("encoding-type", attributes.get("h5sparse_format", ""))
    if kind not in ("csr_matrix", "csc_matrix", "csr", "csc"):
        return
    shape = attributes.get("shape", attributes.get("h5sparse_shape"))
    parts = {name: group[name].shape for name in ("data", "indices", "indptr") if name in group}
    if shape is None or len(shape) != 2 or len(parts) != 3:
        raise InputError(f"{what} is a sparse matrix without a shape, data, indices or indptr; write it again.")
    major = int(shape[0] if kind.startswith("csr") else shape[1])
    if parts["indptr"] != (major + 1,) or parts["data"] != parts["indices"]:
        raise InputError(
            f"{what} is a sparse matrix of the shape {tuple(map(int, shape))} whose arrays have the lengths "
            f"{', '.join(f'{name} {length[0]}' for name, length in parts.items())}, expected indptr {major + 1} and as "
            "many data as indices; write it again."
        )
    if int(group["indptr"][-1]) != parts["data"][0]:
        raise InputError(
            f"{what} is a sparse matrix whose indptr ends at {int(group['indptr'][-1])}, expected its "
            f"{parts['data'][0]} values; write it again."
        )


def in_words(n_bytes: int) -> str:
    """Bytes in the unit that a person would choose.

    >>> in_words(40_000_000_000), in_words(2_048)
    ('40 GB', '2.05 kB')
    """
    for unit, size in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if n_bytes >= size:
            return f"{n_bytes / size:.3g} {unit}" if n_bytes < 1000 * size else f"{n_bytes // size:,} {unit}"
    return f"{n_bytes} bytes"


def _bytes(shape: tuple[int, ...] | None, chunks: tuple[int, ...] | None, itemsize: int) -> int:
    """What reading an array takes: all of it, or one chunk where that is more; None is an empty HDF5 dataspace."""
    return itemsize * max(math.prod(shape or (0,)) if shape != () else 1, math.prod(chunks or (0,)))


def _meminfo(field: str) -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:  # not Linux: the whole memory is the best bound there is without a further package
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(field)), None)


def _cgroup() -> int | None:
    folder = Path("/sys/fs/cgroup")
    try:
        limit, used = (int((folder / f"memory.{name}").read_text()) for name in ("max", "current"))
        statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # no control group, or "max"
        return None
    return max(0, limit - used + int(statistics.get("inactive_file", 0)))  # the file cache makes room when asked
