"""The cells that a diagnosis looks at, kept beside the checkpoint of a fit: a few hundred, however many there were.

With them, the start values that were read off all cells, and how noisy gradients were, the diagnosis of a kept fit is
that of the fit itself, and needs no AnnData.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from pyro.infer import Trace_ELBO
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save_file
from torch import Tensor

from pyro_velo import checkpoint
from pyro_velo.batch import Batch, Cells, Counts, Resident
from pyro_velo.disk import AnyCells
from pyro_velo.doctor import balance, collapse, tightness
from pyro_velo.doctor import draws as taken
from pyro_velo.doctor.noise import noise_ratio
from pyro_velo.errors import InputError
from pyro_velo.initial import Start
from pyro_velo.kinetics import Rates
from pyro_velo.models.velocity import VelocityModel, VelocityProgram
from pyro_velo.train import Fitted, Guide, Training, apart, load_parameters, per_cell, split

FILE = "diagnosis.safetensors"
FORMAT = 2
SEEN = ("seen_mean", "seen_sd")
"""What an encoder is told genes in units of, read off all cells."""


@dataclass(frozen=True)
class SomeCells(Resident[Batch]):
    """A data set of `n_all` cells of which some are there: `rows`, whose `numbers` (R,) among all are in order.

    A cell keeps its number. Raises `InputError` where another one is asked for.
    """

    rows: Cells
    numbers: Tensor
    n_all: int

    def __len__(self) -> int:
        """The number of all cells."""
        return self.n_all

    @property
    def n_genes(self) -> int:
        """The number of genes."""
        return self.rows.n_genes

    @property
    def device(self) -> torch.device:
        """Where they are."""
        return self.rows.device

    def batch(self, index: Tensor, n_cells: int | None = None) -> Batch:
        """The cells with the numbers `index` (B,); `n_cells` is what the batch stands for (all cells, if not said)."""
        place = torch.searchsorted(self.numbers, index).clamp_max(len(self.numbers) - 1)
        missing = index[self.numbers[place] != index]
        if len(missing):
            raise InputError(
                f"Expected cells that were kept; number {int(missing[0])} of {self.n_all} was not. Use the AnnData."
            )
        return replace(self.rows.batch(place, self.n_all if n_cells is None else n_cells), index=index)


@dataclass(frozen=True)
class Sample:
    """What a diagnosis needs of a fit besides its checkpoint; `about` is what the checkpoint says of its data."""

    cells: SomeCells
    start: Start
    order: Tensor | None
    seen_moments: tuple[Tensor, Tensor]
    noise_ratio: float
    about: dict[str, Any]

    @property
    def gene_names(self) -> tuple[str, ...]:
        """The names of the fitted genes."""
        return tuple(self.about["genes"])


def looked_at(n_cells: int, held_out: float, seed: int) -> Tensor:
    """The numbers, in order, of the cells that a diagnosis with the seed 0 looks at: 820 at most."""
    train_index, held_index = split(n_cells, held_out, seed)
    some = taken.chosen_cells(n_cells, collapse.MIXTURE_CELLS, 0)
    first = torch.arange(min(2, n_cells))
    return torch.cat((train_index[: balance.CELLS], held_index[: tightness.MAX_CELLS], some, first)).unique()


def save(fitted: Fitted, cells: AnyCells, folder: str | Path, *, about: dict[str, Any]) -> None:
    """Keep what a diagnosis of a fit on `cells` needs in `folder`, whole or not at all.

    Of 820 cells at most, 8 bytes a cell and fitted gene (16 of counts). Nothing is kept of another program than the
    velocity model's, nor of one whose cells have a q(z) of their own (`coupling`, `refinement`): these take all cells.
    """
    if not isinstance(fitted.program, VelocityProgram) or getattr(fitted.guide, "own", None) is not None:
        forget(folder)
        return
    settings = fitted.training.settings
    numbers = looked_at(len(cells), settings.held_out, settings.seed)
    program = fitted.program
    tensors = _flatten(cells, numbers) | {f"start/{name}": x for name, x in _of_start(program.start).items()}
    tensors |= {name: getattr(program, name) for name in SEEN}
    noise = noise_ratio(fitted, cells)
    header = {
        "format": FORMAT,
        "n_all": len(cells),
        "n_groups": cells.n_groups,
        "noise_ratio": noise if math.isfinite(noise) else None,
        "about": about,
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f".{FILE}.{os.getpid()}.partial"
    try:
        kept = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
        save_file(kept, partial, metadata={"pyro_velo": json.dumps(header)})
        checkpoint.put_in_place(partial, folder / FILE)
    finally:
        partial.unlink(missing_ok=True)


def forget(folder: str | Path) -> None:
    """Take away what an earlier fit has left."""
    (Path(folder) / FILE).unlink(missing_ok=True)


def load(folder: str | Path, about: dict[str, Any]) -> Sample:
    """What `save` kept, for the checkpoint that says `about`.

    Raises `InputError` where nothing was kept, or it can't be read or is of another fit.
    """
    path, remedy = Path(folder) / FILE, f"Name the AnnData that the fit wrote: pyro-velo diagnose {folder} IN."
    if not path.is_file():
        raise InputError(
            f"Expected the cells that a diagnosis looks at in {path}; found none: the fit was stopped before its end, "
            f"or is one that is diagnosed on all cells (a clock and rates that were coupled). {remedy}"
        )
    try:
        content = path.read_bytes()
        tensors = load_tensors(content)
        words = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        header = json.loads(words.get("__metadata__", {}).get("pyro_velo", "{}"))
        found = _sample(header, tensors) if header.get("format") == FORMAT else None
    except (SafetensorError, json.JSONDecodeError, OSError, KeyError, TypeError, AttributeError, ValueError) as error:
        raise InputError(f"{path} can't be read ({error}). {remedy}") from error
    if found is None or found.about != about:
        raise InputError(f"Expected the cells of the checkpoint beside {path}; got those of another fit. {remedy}")
    return found


def restored(model: VelocityModel, guide: Guide, training: Training, sample: Sample) -> Fitted:
    """The fit that the checkpoint and the sample are of, as far as a diagnosis asks.

    Raises `InputError` for parameters of another model or guide.
    """
    cells, seed = sample.cells, training.settings.seed
    with apart(cells, seed) as store:
        program = model.build(cells.rows)
        program.start, program.order = sample.start, sample.order
        program.seen_mean, program.seen_sd = sample.seen_moments
        made = guide(program)
        parts = [per_cell(part, len(cells)) for part in (program, made)]
        with torch.no_grad():
            # Guides create parameters lazily.
            Trace_ELBO().loss(*parts, cells.batch(cells.numbers[:2]))
        load_parameters(training.best)
    return Fitted(program, made, store, training)


def _flatten(cells: AnyCells, numbers: Tensor) -> dict[str, Tensor]:
    """The rows at `numbers`, and what all cells share."""
    some = cells.among(numbers.to(cells.device))
    found = {"numbers": numbers, "molecules": some.molecules, "ratio": torch.as_tensor(some.ratio)}
    if some.counts is not None:
        names = ("zero", "unit", "size_factors", "scaled")
        found |= {name: getattr(some.counts, name) for name in names}
    for name in ("covariates", "group"):
        if (value := getattr(some, name)) is not None:
            found[name] = value
    # Of every cell, 4 bytes each: programs look it up by number.
    return found if cells.order is None else found | {"order": cells.order}


def _of_start(start: Start) -> dict[str, Tensor]:
    switch = {"switch_unspliced": start.switch_unspliced, "switch_spliced": start.switch_spliced}
    return start.rates._asdict() | switch | {f"others/{name}": value for name, value in start.others.items()}


def _sample(header: dict[str, Any], tensors: dict[str, Tensor]) -> Sample:
    counts = (
        Counts(*(tensors[name] for name in ("size_factors", "zero", "unit", "scaled"))) if "unit" in tensors else None
    )
    rows = Cells(
        tensors["molecules"],
        tensors["ratio"],
        counts,
        tensors.get("covariates"),
        tensors.get("group"),
        header["n_groups"],
    )
    noise = header["noise_ratio"]
    return Sample(
        SomeCells(rows, tensors["numbers"], header["n_all"]),
        _start({name.removeprefix("start/"): x for name, x in tensors.items() if name.startswith("start/")}),
        tensors.get("order"),
        (tensors[SEEN[0]], tensors[SEEN[1]]),
        math.nan if noise is None else noise,
        header["about"],
    )


def _start(values: dict[str, Tensor]) -> Start:
    others = {name.removeprefix("others/"): x for name, x in values.items() if name.startswith("others/")}
    rates = Rates(*(values[name] for name in Rates._fields))
    return Start(rates, values["switch_unspliced"], values["switch_spliced"], others)
