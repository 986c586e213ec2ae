"""Cells that do not fit into memory: what was measured of them lies in a file, from which batches are read ahead.

An epoch in memory goes through the cells in any order. Here blocks of neighbouring cells come in random order, and a
window of some blocks is shuffled and read at once, in long pieces, while the steps before it are taken. With a window
of all cells it is the epoch in memory, to the bit. Numbers are read and not mapped: a mapped page counts as memory of
the process, and a file that is cut short ends it without a word, where reading says what is missing.
"""

from __future__ import annotations

import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import accumulate, groupby, pairwise
from pathlib import Path
from threading import Lock
from typing import Generic
from weakref import finalize

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pyro_velo.batch import AnyBatch, Batch, Cells, Counts, one_level
from pyro_velo.errors import InputError

WINDOW_BYTES = 128 * 2**20
"""What is shuffled, and read, at once; twice that is held."""
BLOCKS = 64
"""Blocks of neighbouring cells in a window: cells that are alike often stand together in a file."""
PIECE_BYTES = 4 * 2**20
GAP_BYTES = 64 * 2**10
"""What is read although nobody asked for it, because a read of its own would take longer."""


class Rows:
    """The float32 numbers of cells in a file without a name, which vanishes with this object: K vectors of G for each.

    `folder` is where the file is; it takes 4 K G bytes a cell there. Several threads may read.
    """

    def __init__(self, vectors: int, n_genes: int, folder: str | Path) -> None:
        self.shape = (vectors, n_genes)
        self.row_bytes = 4 * vectors * n_genes
        self.folder = Path(folder)
        self.length = 0
        self._lock = Lock()
        self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115 (open as long as this object)
        finalize(self, self._file.close)

    def __len__(self) -> int:
        """The number of cells."""
        return self.length

    def append(self, values: Tensor) -> None:
        """Add cells, (K, B, G). Raises `InputError` where the disk refuses."""
        self.put(self.length, values)

    def put(self, start: int, values: Tensor) -> None:
        """Put cells (K, B, G) at the numbers from `start` on. Raises `InputError` where the disk refuses."""
        block = np.ascontiguousarray(values.movedim(0, 1).numpy(), np.float32).data.cast("B")
        try:
            with self._lock:
                self._file.seek(start * self.row_bytes)
                while block:
                    block = block[self._file.write(block) or 0 :]
        except OSError as error:
            raise InputError(
                f"Cells can't be kept in {self.folder} ({error.strerror}), expected room there for {self.row_bytes:,} "
                "bytes a cell; free some, or name another folder (scratch)."
            ) from error
        self.length = max(self.length, start + values.shape[1])

    def read(self, index: Tensor) -> Tensor:
        """The cells at `index` (B,), in that order: (K, B, G). Raises `InputError` where the file ends before one."""
        at = index.cpu().numpy()
        order = at.argsort(kind="stable")
        ordered = at[order]
        out = np.empty((self.shape[0], len(at), self.shape[1]), np.float32)
        for piece in self._pieces(ordered):
            first, last = int(ordered[piece.start]), int(ordered[piece.stop - 1])
            span = self.span(first, last + 1)
            out[:, order[piece]] = span[ordered[piece] - first].swapaxes(0, 1)
        return torch.from_numpy(out)

    def _pieces(self, ordered: NDArray[np.int64]) -> Iterator[slice]:
        """Slices of ascending numbers without wide gaps, each short enough to be read at once."""
        gap, most = max(1, GAP_BYTES // self.row_bytes), max(1, PIECE_BYTES // self.row_bytes)
        cuts = (np.diff(ordered) > gap) | (np.diff(ordered // most) > 0)
        ends = sorted({0, *(np.flatnonzero(cuts) + 1).tolist(), len(ordered)})
        yield from (slice(start, stop) for start, stop in pairwise(ends))

    def span(self, start: int, stop: int) -> NDArray[np.float32]:
        """The cells from `start` to `stop`, (B, K, G)."""
        out = np.empty((stop - start, *self.shape), np.float32)
        left = out.data.cast("B")
        with self._lock:
            self._file.seek(start * self.row_bytes)
            while left:
                read = self._file.readinto(left)
                if not read:
                    raise InputError(
                        f"The file of cells in {self.folder} ends before cell {stop - 1} of {self.length}, expected "
                        "all of them; the disk lost some, so start again."
                    )
                left = left[read:]
        return out


class Columns:
    """The float32 numbers of N cells x G genes in a file without a name, `width` genes together: as `Rows`, by gene."""

    def __init__(self, n_cells: int, n_genes: int, width: int, folder: str | Path) -> None:
        starts = range(0, n_genes, width)
        self.blocks = [slice(start, min(start + width, n_genes)) for start in starts]
        self._n_cells, self._filled, self._rows = n_cells, 0, Rows(1, 1, folder)

    def append(self, cells: NDArray[np.float32]) -> None:
        """Add cells (B, G). Raises `InputError` where the disk refuses."""
        for block in self.blocks:
            at = self._n_cells * block.start + self._filled * (block.stop - block.start)
            self._rows.put(at, torch.from_numpy(np.ascontiguousarray(cells[:, block]).reshape(1, -1, 1)))
        self._filled += len(cells)

    def read(self, block: slice) -> NDArray[np.float32]:
        """All cells' numbers of the genes of one of `blocks`, (N, genes)."""
        found = self._rows.span(self._n_cells * block.start, self._n_cells * block.stop)
        return found.reshape(self._n_cells, -1)


@dataclass(frozen=True, kw_only=True)
class OnDisk(ABC, Generic[AnyBatch]):
    """A data set of N cells whose numbers are in `rows`; `window` is how many cells are shuffled together."""

    rows: Rows
    window: int = 0

    def __post_init__(self) -> None:
        """Choose the window, where none is given."""
        if self.rows.shape[1] != self.n_genes:
            raise ValueError(f"Expected rows of {self.n_genes} genes, as in the sample; got {self.rows.shape[1]}.")
        if not self.window:
            object.__setattr__(self, "window", max(1, WINDOW_BYTES // self.rows.row_bytes))

    @property
    @abstractmethod
    def n_genes(self) -> int:
        """The number of genes."""

    @abstractmethod
    def _batch(self, values: Tensor, index: Tensor, n_cells: int | None) -> AnyBatch:
        """The cells at `index`, whose numbers (K, B, G) have been read."""

    def __len__(self) -> int:
        """The number of cells."""
        return len(self.rows)

    def shuffled(self, index: Tensor) -> Tensor:
        """The cells at `index`, blocks of neighbours in random order and shuffled within each window of them.

        Drawn from torch's generator; where one window holds all, as `Resident.shuffled` does.
        """
        if len(index) <= self.window:
            return index[torch.randperm(len(index))]
        blocks = index.sort().values.split(max(1, self.window // BLOCKS))
        order = torch.cat([blocks[i] for i in torch.randperm(len(blocks)).tolist()])
        return torch.cat([part[torch.randperm(len(part))] for part in order.split(self.window)])

    def batch(self, index: Tensor, n_cells: int | None = None) -> AnyBatch:
        """The cells at `index` (B,); `n_cells` is what the batch stands for (all cells, if not said)."""
        return self._batch(self.rows.read(index), index, n_cells)

    def read(self, parts: Sequence[Tensor], n_cells: int | None = None) -> Iterator[AnyBatch]:
        """A batch of the cells at each of `parts`; a thread reads those of a window while the one before is used."""
        by_window = groupby(zip(_bounds(parts), parts, strict=True), lambda found: found[0][0] // self.window)
        windows = [[part for _, part in found] for _, found in by_window]
        with ThreadPoolExecutor(1) as reader:
            ahead = [reader.submit(self.rows.read, torch.cat(window)) for window in windows[:1]]
            for window, following in zip(windows, [*windows[1:], None], strict=True):
                values = ahead.pop().result()
                if following is not None:
                    ahead.append(reader.submit(self.rows.read, torch.cat(following)))
                for part, (start, stop) in zip(window, _bounds(window), strict=True):
                    # A copy: a view would hold the whole window after its time.
                    yield self._batch(values[:, start:stop].clone(), part, n_cells)

    def batches(self, index: Tensor, size: int, n_cells: int | None = None) -> Iterator[AnyBatch]:
        """The cells at `index`, in that order, `size` at a time; the last batch may be smaller."""
        yield from self.read(index.split(size), n_cells)


def _bounds(parts: Sequence[Tensor]) -> Iterator[tuple[int, int]]:
    """Where each of several parts, one after the other, starts and stops."""
    return pairwise(accumulate((len(part) for part in parts), initial=0))


@dataclass(frozen=True, kw_only=True)
class DiskCells(OnDisk[Batch]):
    """A data set like `Cells`, whose molecules are in `rows` (unspliced and spliced of N cells x G genes).

    `sample` are some of its cells, resident, off which models read start values, ratio and units. `size_factors`
    (2, N, 1), `covariates` (N, C), `group` (N,) are resident.
    """

    sample: Cells
    size_factors: Tensor | None = None
    covariates: Tensor | None = None
    group: Tensor | None = None

    @property
    def n_genes(self) -> int:
        """The number of genes."""
        return self.sample.n_genes

    @property
    def device(self) -> torch.device:
        """Where batches are put."""
        return self.sample.device

    @property
    def ratio(self) -> Tensor | float:
        """(G,) what one unit of scaled unspliced is in units of scaled spliced."""
        return self.sample.ratio

    @property
    def n_groups(self) -> int:
        """The number of experimental batches."""
        return self.sample.n_groups

    @property
    def n_covariates(self) -> int:
        """The number of covariates a network is told, a category counting once for each of its levels."""
        return self.sample.n_covariates

    @property
    def order(self) -> Tensor | None:
        """Where the cells stand in time before a fit: not known of cells on disk."""
        return None

    @property
    def counts(self) -> Counts | None:
        """What turns raw counts into abundances, of the sample's cells."""
        return self.sample.counts

    def _batch(self, values: Tensor, index: Tensor, n_cells: int | None) -> Batch:
        return Batch(
            values.to(self.device),
            index,
            len(self) if n_cells is None else n_cells,
            None if self.size_factors is None else self.size_factors.index_select(1, index),
            None if self.covariates is None else self.covariates[index],
            None if self.group is None else self.group[index],
        )

    def among(self, index: Tensor) -> Cells:
        """The cells at `index` (B,) alone, resident; abundances before a fit are those of their own counts."""
        some, counts = self.batch(index), self.sample.counts
        if counts is not None and some.size_factors is not None:
            scaled = (some.molecules / some.size_factors - counts.zero) / counts.unit
            counts = replace(counts, size_factors=some.size_factors, scaled=scaled)
        return Cells(some.molecules, self.ratio, counts, some.covariates, some.group, self.n_groups)

    def in_group(self, group: int, columns: slice) -> DiskCells:
        """The same cells as if all were of one experimental batch, whose one-hot stands in `columns` of covariates."""
        assert self.covariates is not None and self.group is not None
        covariates = one_level(self.covariates, columns, group)
        return replace(self, covariates=covariates, group=torch.full_like(self.group, group))


AnyCells = Cells | DiskCells
"""Cells wherever they are, for what asks for one batch after the other."""
