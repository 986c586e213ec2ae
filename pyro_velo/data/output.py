"""Outputs that appear whole or not at all: checked before the work, written beside their place, renamed into it."""

from __future__ import annotations

import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from pyro_velo.data.checks import check_unique
from pyro_velo.errors import InputError

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData

ADATA_FORMATS = (".h5ad", ".zarr")
"""What an AnnData is written to."""


def check_output(
    path: str | Path,
    overwrite: bool = False,
    *,
    source: str | Path | None = None,
    formats: Sequence[str] = ADATA_FORMATS,
) -> Path:
    """The path, if something can be written there; call it before the work, which may take minutes.

    `formats` are the suffixes that are allowed (none: any); `source` is the input, which is never overwritten.

    Raises `InputError` for another suffix, a path that exists (unless `overwrite`; a folder that isn't a zarr store is
    never replaced), the input itself, and a folder that is missing or can't be written to.
    """
    path = Path(path)
    if formats and path.suffix.lower() not in formats:
        raise InputError(f"{path} ends in {path.suffix!r}, expected {' or '.join(formats)}; choose such a name.")
    if source is not None and _same(path, Path(source)):
        raise InputError(f"{path} is the input itself, expected another path; choose another name for the output.")
    if os.path.lexists(path):
        if not overwrite:
            raise InputError(f"{path} exists already, expected a new path; choose another name or pass overwrite.")
        if path.is_dir() and not path.is_symlink() and not is_zarr(path):
            raise InputError(f"{path} is a folder, expected a file or a zarr store to replace; choose another name.")
    _check_folder(path.parent)
    return path


@contextmanager
def whole(path: str | Path, overwrite: bool = False, *, formats: Sequence[str] = ADATA_FORMATS) -> Iterator[Path]:
    """A temporary name beside `path`; what was written there takes its place when the block ends without an exception.

    On any exception, Ctrl-C included, the temporary is removed and `path` is as it was. Its bytes are on the disk
    (fsync) before the rename. Two writers of one path do not meet: the last rename wins, whole.

    Raises `InputError` as `check_output`, and where the disk refuses (full, read-only).
    """
    path = check_output(path, overwrite, formats=formats)
    folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent))
    partial = folder / path.name
    try:
        yield partial
        _sync(partial)
        _replace(partial, path, folder)
        _sync_one(path.parent)
    except OSError as error:
        reason = (error.strerror or str(error).splitlines()[0]).rstrip(".")
        raise InputError(
            f"{path} can't be written ({reason}), expected room and permission; free some or choose another place."
        ) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def write_whole(adata: AnnData, path: str | Path, overwrite: bool = False) -> Path:
    """Writes an AnnData to `.h5ad` or `.zarr`, whole or not at all, without changing it (anndata's own writer does).

    Raises `InputError` as `check_output` and `check_writable`.
    """
    path = check_output(path, overwrite)
    check_writable(adata)
    with whole(path, overwrite) as partial, warnings.catch_warnings():
        # anndata 0.12 announces future defaults of its zarr format; none changes what is read back.
        warnings.simplefilter("ignore")
        shallow = _shallow(adata)
        if path.suffix.lower() == ".zarr":
            shallow.write_zarr(partial)
        else:
            shallow.write_h5ad(partial, compression="gzip", compression_opts=1)
    return path


def check_writable(adata: AnnData) -> None:
    """Raises `InputError` naming the first obs or var column or uns key that no AnnData file can hold.

    Cells of mixed types and dates are such; each is tried in memory, since finding out after the fit would lose it.
    """
    import h5py
    import pandas as pd
    from anndata.io import write_elem

    for where, frame in (("obs", adata.obs), ("var", adata.var)):
        check_unique(frame.columns, f"{where} column", f"adata.{where}.rename(columns=...)")
    trials = [
        (f"{where} column {name!r}", pd.DataFrame({str(name): frame[name].array}))
        for where, frame in (("obs", adata.obs), ("var", adata.var))
        for name in frame.columns
    ]
    for what, trial in [*trials, *((f"uns key {name!r}", value) for name, value in adata.uns.items())]:
        with h5py.File.in_memory() as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                write_elem(file, "trial", categorical(trial) if isinstance(trial, pd.DataFrame) else trial)
            except Exception as error:
                raise InputError(
                    f"{what} can't be stored in an AnnData file, expected one type in it (text, numbers, booleans or "
                    "categories); convert it (for a column: .astype(str)) or drop it."
                ) from error


def is_zarr(path: Path) -> bool:
    """Whether a folder is a zarr store, of format 2 or 3."""
    return path.is_dir() and any((path / name).is_file() for name in (".zgroup", "zarr.json"))


def _shallow(adata: AnnData) -> AnnData:
    """The same arrays in another AnnData, since writing turns text columns into categories in place."""
    from anndata import AnnData

    raw = None if adata.raw is None else {"X": adata.raw.X, "var": adata.raw.var.copy(), "varm": dict(adata.raw.varm)}
    return AnnData(
        X=adata.X,
        obs=categorical(adata.obs),
        var=categorical(adata.var),
        uns=dict(adata.uns),
        obsm=dict(adata.obsm),
        varm=dict(adata.varm),
        layers=dict(adata.layers),
        raw=raw,
        obsp=dict(adata.obsp),
        varp=dict(adata.varp),
    )


def categorical(frame: pd.DataFrame) -> pd.DataFrame:
    """A copy with text as categories, which store a missing label as such."""
    import pandas as pd

    frame = frame.copy()
    for name in frame.columns:
        if pd.api.types.infer_dtype(frame[name], skipna=True) in ("string", "empty"):
            frame[name] = frame[name].astype("category")
    return frame


def _same(path: Path, source: Path) -> bool:
    try:
        return path.samefile(source)
    except OSError:  # one of them doesn't exist
        return path.absolute() == source.absolute()


def _check_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise InputError(f"{folder} isn't a folder, expected one to write to; create it first or choose another.")
    try:
        tempfile.TemporaryFile(dir=folder).close()  # permission bits say nothing to root or of a read-only disk
    except OSError as error:
        raise InputError(
            f"{folder} can't be written to ({error.strerror}), expected a folder with permission; choose another."
        ) from error


def _replace(partial: Path, path: Path, folder: Path) -> None:
    if not os.path.lexists(path) or not (partial.is_dir() or path.is_dir()):
        os.replace(partial, path)
        return
    old = folder / "old"  # a folder can't be renamed over what is there: that is set aside first
    os.rename(path, old)
    try:
        os.rename(partial, path)
    except BaseException:
        os.rename(old, path)
        raise


def _sync(path: Path) -> None:
    for each in [*path.rglob("*"), path] if path.is_dir() else [path]:
        _sync_one(each)


def _sync_one(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
