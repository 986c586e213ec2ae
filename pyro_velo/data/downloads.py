"""Files that are fetched from elsewhere: checked by their sum, and in their place whole or not at all."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from pyro_velo.errors import InputError

if TYPE_CHECKING:
    from anndata import AnnData

NEURONS = "https://cf.10xgenomics.com/samples/cell-exp/1.3.0/1M_neurons"


@dataclass(frozen=True)
class Remote:
    """A file elsewhere: its address, and the MD5 of what is there."""

    url: str
    md5: str

    @property
    def name(self) -> str:
        """What it is called, there and here."""
        return self.url.rpartition("/")[2]


# The sums are those that Bioconductor's TENxBrainData and TENxBrainAnalysis were made from.
MOUSE_BRAIN_20K = Remote(f"{NEURONS}/1M_neurons_neuron20k.h5", "7696db0199a30a36f857e86a1ad1da8d")
MOUSE_BRAIN = Remote(f"{NEURONS}/1M_neurons_filtered_gene_bc_matrices_h5.h5", "f97b8c67e57a534816b9b2bccf31476b")
DATA_SETS = {"mouse-brain-20k": MOUSE_BRAIN_20K, "mouse-brain": MOUSE_BRAIN}
"""What the command line calls them."""


def mouse_brain(*, every: bool = False, folder: str | Path | None = None, progress: bool | None = None) -> AnnData:
    """Brain cells of embryonic mice (10x Genomics 2017): 20,000 of them, or `every` one of 1.3 million; 27,998 genes.

    Counts in `X` (CSR), gene ids in var `gene_ids`. The smaller file is that of seed 001 (its Table 1). All cells take
    some 30 GB of memory. `folder` and `progress` as in `download`.

    Raises `InputError` as `download`, and where the cells do not fit into memory.
    """
    from pyro_velo.data.readers import read

    return read(download(MOUSE_BRAIN if every else MOUSE_BRAIN_20K, folder, progress=progress))


def download(remote: Remote, folder: str | Path | None = None, *, progress: bool | None = None) -> Path:
    """Where the file is, in `folder` (None: the user's cache), fetched unless it is there already, whole and unchanged.

    What is fetched has another name until its sum is right: after Ctrl-C or a broken connection there is nothing, or
    what was there before. `progress` shows a bar (None: where stderr is a terminal).

    Raises `InputError` without pooch (`pip install 'pyro-velo[download]'`), without a connection, for a file that the
    server does not have, and where the sum of what came is not that of the file.
    """
    if find_spec("pooch") is None:
        raise InputError(
            "Expected pooch, which downloads; it is not installed. Run: pip install 'pyro-velo[download]'."
        )
    import pooch

    place = pooch.os_cache("pyro_velo") if folder is None else Path(folder)
    shown = sys.stderr.isatty() if progress is None else progress
    try:
        with _quiet(pooch):
            found = pooch.retrieve(remote.url, f"md5:{remote.md5}", remote.name, place, progressbar=shown)
    except ValueError as error:
        raise InputError(
            f"Expected a file of the MD5 {remote.md5} at {remote.url}; got another, and kept nothing of it: it was cut "
            "short, or has changed. Try again later."
        ) from error
    # What requests raises is an OSError too.
    except OSError as error:
        raise InputError(
            f"{remote.url} can't be fetched ({_first_line(error)}), expected a connection to it and room in {place}; "
            f"try again, or put the file at {place / remote.name} by other means."
        ) from error
    return Path(found)


@contextmanager
def _quiet(pooch: object) -> Iterator[None]:
    """Without pooch's own lines on stderr; afterwards its logger is as it was."""
    logger = pooch.get_logger()  # type: ignore[attr-defined]
    before = logger.level
    logger.setLevel("ERROR")
    try:
        yield
    finally:
        logger.setLevel(before)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
