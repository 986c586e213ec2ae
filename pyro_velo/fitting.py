"""Fit a model to an AnnData, and what a fit can do: write itself into one, save itself, load itself."""

from __future__ import annotations

import platform
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyro
import torch
from numpy.typing import NDArray
from pyro.infer import ELBO

from pyro_velo import checkpoint
from pyro_velo.coupling import couple
from pyro_velo.data.bridge import VelocityData, check_same, velocity_data, write_posterior
from pyro_velo.data.checks import check_output_keys
from pyro_velo.data.on_disk import velocity_data_on_disk
from pyro_velo.disk import AnyCells, DiskCells
from pyro_velo.doctor import sample
from pyro_velo.errors import InputError, check_part
from pyro_velo.flow import order_before_a_fit, summarise_cells
from pyro_velo.forensics import NonFiniteError
from pyro_velo.guides import Amortized
from pyro_velo.models import base
from pyro_velo.models.base import Model
from pyro_velo.models.velocity import VelocityModel
from pyro_velo.posterior import OVER_STATES, Draws, OverStates, Posterior, stream, summarise
from pyro_velo.processes import team
from pyro_velo.rates import RateGuide
from pyro_velo.refinement import refine
from pyro_velo.time_units import in_common_unit
from pyro_velo.train import Fitted, Guide, OnEvaluation, Training, TrainSettings, restore, train
from pyro_velo.version import __version__
from pyro_velo.writing import write_file

if TYPE_CHECKING:
    from anndata import AnnData


@dataclass(frozen=True)
class Fit:
    """A fitted model, with the data that it was fitted on.

    `interrupted` says whether Ctrl-C ended the training; the parameters are the best so far all the same.
    """

    fitted: Fitted
    data: VelocityData
    recipe: str

    @cached_property
    def told(self) -> Fitted:
        """The fit with genes' own times in a unit that they share (`time_units`): velocities, times and rates are its.

        Bounds, diagnoses and checks are of `fitted`, as it was trained: they gain nothing from a unit.
        """
        return in_common_unit(self.fitted, self.data.cells, seed=self.fitted.training.settings.seed)

    def as_trained(self) -> Fit:
        """The same fit, told in the units that the training came to: for what has no unit, such as a direction."""
        found = replace(self)
        found.__dict__["told"] = self.fitted
        return found

    @property
    def history(self) -> dict[str, Any]:
        """The ELBO per cell by epoch: `epoch`, `train`, `held_out` (NaN where it was not evaluated), `kl_weight`.

        `terms` has its summands at KL weight 1 by name, of the cells `held_out` and of as many of those in `train`.
        """
        return asdict(self.fitted.training.history)

    @property
    def interrupted(self) -> bool:
        """Whether Ctrl-C ended it."""
        return self.fitted.interrupted

    @property
    def epochs(self) -> int:
        """The passes over the training cells that it was trained for."""
        return self.fitted.training.epoch

    def posterior(
        self, *, draws: int = 100, over_states: OverStates = OVER_STATES, batch: str | None = None
    ) -> Posterior:
        """Summaries of the posterior in the units of the model; see `posterior.summarise`.

        `batch`: predict every cell as if it were of this experimental batch; raises `InputError` for an unknown one.
        """
        seed = self.fitted.training.settings.seed
        as_if = None if batch is None else self._in_batch(batch)
        return summarise(self.told, self.data.cells, draws=draws, over_states=over_states, seed=seed, as_if=as_if)

    def velocities(
        self,
        receive: Callable[[NDArray[np.int64], NDArray[np.float32]], None],
        *,
        draws: int = 100,
        over_states: OverStates = OVER_STATES,
        progress: bool | None = None,
    ) -> None:
        """Call `receive(cells, velocities)` for one batch of cells after the other, without ever holding all draws.

        `cells` (B,) are their numbers, `velocities` (draws, B, fitted genes) in the units of the spliced layer per unit
        of latent time. The i-th draws of all cells are one draw of the whole; they are those that `write` summarises.
        """
        unit = self.data.scaling.s_unit

        def scaled(index: NDArray[np.int64], drawn: Draws) -> None:
            receive(index, drawn.velocities.cpu().numpy() * unit)

        seed = self.fitted.training.settings.seed
        stream(self.told, self.data.cells, scaled, draws=draws, over_states=over_states, seed=seed, progress=progress)

    def _in_batch(self, batch: str) -> AnyCells:
        design = self.data.design
        if design is None or design.batch_key is None:
            raise InputError(f"Batch {batch!r} is unknown, because the fit has no batch key; expected one.")
        return self.data.cells.in_group(design.number_of(batch), design.columns[design.batch_key])

    def write(
        self,
        adata: AnnData | str | Path,
        *,
        draws: int = 100,
        over_states: OverStates = OVER_STATES,
        overwrite: bool = False,
    ) -> None:
        """Write velocities, times and rates, each with its uncertainty, into `adata` under the keys of `anndata_keys`.

        Where the cells are on disk, `adata` is the path of a new file, `.h5ad` or `.zarr`: a copy of the one that was
        fitted, with the results in it (see `writing.write_file`).

        Raises `InputError` where `adata` is not of the cells and genes that were fitted, or holds a fit already (unless
        `overwrite`).
        """
        one_clock = _one_clock(getattr(self.fitted.program, "recipe", None))
        if isinstance(adata, (str, Path)):
            write_file(
                self.told,
                self.data,
                adata,
                about=self.about(draws, over_states),
                shared_clock=one_clock,
                draws=draws,
                over_states=over_states,
                overwrite=overwrite,
            )
            return
        check_same(adata, self.data)
        check_output_keys(adata, overwrite=overwrite)
        posterior = self.posterior(draws=draws, over_states=over_states)
        write_posterior(adata, self.data, posterior, about=self.about(draws, over_states))
        summarise_cells(adata, shared_clock=one_clock)

    def about(self, draws: int, over_states: str) -> dict[str, Any]:
        """Everything needed to say how the numbers were made."""
        training = self.fitted.training
        settings = {name: "" if value is None else value for name, value in asdict(training.settings).items()}
        return {
            "version": __version__,
            "versions": {
                "torch": str(torch.__version__),
                "pyro": pyro.__version__,
                "python": platform.python_version(),
            },
            "model": self.recipe,
            "seed": training.settings.seed,
            "settings": {**settings, "draws": draws, "over_states": over_states},
            "elbo_history": self.history,
            "held_out_elbo": self.fitted.held_out_elbo,
            "interrupted": self.interrupted,
        }

    def refined(self, *, steps: int = 50, progress: bool | None = None) -> Fit:
        """The same fit, each cell's q(z) moved on from where the encoder put it; see `refinement.refine`.

        It is not part of what `save` keeps: refine again after `load`.
        """
        seed = self.fitted.training.settings.seed
        return replace(self, fitted=refine(self.fitted, self.data.cells, steps=steps, seed=seed, progress=progress))

    def save(self, folder: str | Path) -> None:
        """Keep the fit in a folder, to `load` it or to go on from it, with the cells that a diagnosis looks at."""
        about = describe(self.recipe, self.data)
        checkpoint.save(self.fitted.training, folder, about=about)
        sample.save(self.fitted, self.data.cells, folder, about=about)


def fit(
    model: Model | None,
    guide: Guide | None,
    adata: AnnData | str | Path,
    *,
    seed: int = 0,
    settings: TrainSettings | None = None,
    data: VelocityData | None = None,
    elbo: ELBO | None = None,
    save: str | Path | None = None,
    resume: str | Path | None = None,
    on_evaluation: OnEvaluation | None = None,
    progress: bool | None = None,
) -> Fit:
    """Fit `model` with `guide` (None: the defaults) to the smoothed layers of `adata`, which stays as it is.

    `adata` may be the path of an `.h5ad` or `.zarr` file: its cells then stay on the disk (`velocity_data_on_disk`).

    `settings` is a `TrainSettings`, with `seed` put in; `data` says which layers (see `velocity_data`; by default `Ms`
    and `Mu`), `elbo` is any of Pyro's (default `Trace_ELBO`), `save` a folder for a checkpoint after every look at the
    held-out cells (and, in the end, for the cells that a diagnosis looks at), `resume` a folder to go on from (with the
    settings and the seed it was made with; only its length may change), `on_evaluation` is called with the run's state
    after every such look (as a `GradientRecord` wants it), `progress` shows a bar (None: where stderr is a terminal). A
    fit with a clock that genes share and the rate guide `PerGene` ends with the two coupled (`coupling.couple`), unless
    it was interrupted. Where several processes train together (`processes.joined`) the first alone saves and couples.

    Raises `InputError` for bad layers or a checkpoint of another run; `NonFiniteError`, naming the gene, for NaN in the
    fit.
    """
    model, guide = model or VelocityModel(), guide or Amortized()
    check_parts(model, guide)
    data = data or _data_of(adata, seed, counts=_counts(model))
    check_suits(model, data)
    data = _in_order(model, data, adata)
    recipe = in_words(model, guide)
    wanted = replace(settings or TrainSettings(), seed=seed)
    training = _resumed(resume, data, recipe) if resume else None
    if training is not None:
        wanted = _same_settings(training, wanted if settings else replace(training.settings, seed=seed))
    about, leads = describe(recipe, data), team().leads
    save = save if leads else None
    if save:
        sample.forget(save)

    def looked(state: Training) -> None:
        if save:
            checkpoint.save(state, save, about=about)
        if on_evaluation is not None:
            on_evaluation(state)

    try:
        fitted = train(
            model,
            guide,
            data.cells,
            settings=wanted,
            elbo=elbo,
            resume=training,
            on_evaluation=looked,
            progress=progress,
        )
    except NonFiniteError as error:
        named = error.named(data.gene_names)
        if save:
            checkpoint.note_failure(named, save)
        raise named from None
    if leads and not fitted.interrupted:
        fitted = couple(fitted, data.cells, seed=seed, progress=progress)
    if save:
        sample.save(fitted, data.cells, save, about=about)
    return Fit(fitted, data, recipe)


def load(
    folder: str | Path, model: Model | None, guide: Guide | None, adata: AnnData | str | Path, **layers: Any
) -> Fit:
    """The fit that `Fit.save` or `fit(save=...)` left in a folder, with its best parameters; nothing is trained.

    `model`, `guide` and `adata` must be those of the fit, `layers` what `velocity_data` was told (or
    `velocity_data_on_disk`, where `adata` is a path).
    Raises `InputError` where there is no such fit, or it is of other genes or another model.
    """
    model, guide = model or VelocityModel(), guide or Amortized()
    seed = checkpoint.load(folder)[0].settings.seed
    data = _in_order(model, _data_of(adata, seed, counts=_counts(model), **layers), adata)
    recipe = in_words(model, guide)
    training = _resumed(folder, data, recipe)
    fitted = restore(model, guide, data.cells, training)
    return Fit(couple(fitted, data.cells, seed=seed), data, recipe)


def _data_of(adata: AnnData | str | Path, seed: int, **options: Any) -> VelocityData:
    """What is fitted, of an AnnData, or of a file whose cells stay on the disk."""
    if isinstance(adata, (str, Path)):
        return velocity_data_on_disk(adata, seed=seed, **options)
    return velocity_data(adata, **options)


def _in_order(model: Model, data: VelocityData, adata: AnnData | str | Path) -> VelocityData:
    """The same data; where genes share a clock, with the cells' order before a fit.

    Cells on disk start where each stands by its own phase portraits.
    """
    if isinstance(data.cells, DiskCells) or isinstance(adata, (str, Path)) or not _one_clock(model):
        return data
    if data.cells.order is not None:
        return data
    order = order_before_a_fit(data.cells, adata.obsp.get("distances"))
    return replace(data, cells=replace(data.cells, order=order))


def _counts(model: Model) -> bool:
    """Whether a model wants raw counts."""
    return isinstance(model, VelocityModel) and model.likelihood.counts


def _one_clock(model: Any) -> bool:
    """Whether a model gives each cell a time that its genes share."""
    return isinstance(model, VelocityModel) and model.times.shared


def check_parts(model: Any, guide: Any) -> None:
    """Raises `InputError` for a model that is none, and for a guide that is the recipe's class, or one of rates alone.

    Any other callable may be a guide, as Pyro's autoguides are.
    """
    check_part("the model", model, Model, "pv.VelocityModel()")
    alone = isinstance(guide, RateGuide) or (isinstance(guide, type) and issubclass(guide, (base.Guide, RateGuide)))
    if alone or not callable(guide):
        check_part("the guide", guide, base.Guide, "pv.guides.Amortized(rates=pv.rates.PerGene())")


def check_suits(model: Model, data: VelocityData) -> None:
    """Raises `InputError` where the model's likelihood wants counts and the data are scaled, or the reverse."""
    wants, has = _counts(model), data.cells.counts is not None
    if isinstance(model, VelocityModel) and wants != has:
        kinds = {True: "raw counts", False: "scaled layers"}
        raise InputError(
            f"{model.likelihood!r} expects {kinds[wants]}; got {kinds[has]}. Call velocity_data with counts={wants}."
        )


def in_words(model: Model, guide: Guide) -> str:
    """What a model and guide are made of, in words that are the same in every process: without addresses."""
    return re.sub(r"( object)? at 0x[0-9a-f]+", "", f"{model!r} | {guide!r}")


def describe(recipe: str, data: VelocityData) -> dict[str, Any]:
    """What a checkpoint must agree on with the run that goes on from it."""
    levels = {} if data.design is None else {name: list(known) for name, known in data.design.levels.items()}
    columns = [] if data.design is None else list(data.design.columns)
    about = {"version": __version__, "model": recipe, "n_cells": len(data.cells), "genes": data.gene_names}
    return about | {"covariates": columns, "levels": levels}


def _resumed(folder: str | Path, data: VelocityData, recipe: str) -> Training:
    """A checkpoint's state, if it is of these cells, genes and model."""
    training, about = checkpoint.load(folder)
    for name, value in describe(recipe, data).items():
        if name != "version":
            _check_same_as_kept(name, value, about, folder)
    return training


def check_recipe(recipe: str, about: dict[str, Any], folder: str | Path) -> None:
    """Raises `InputError` unless a model and guide, `in_words`, are those of the checkpoint that says `about`."""
    _check_same_as_kept("model", recipe, about, folder)


def _check_same_as_kept(name: str, value: Any, about: dict[str, Any], folder: str | Path) -> None:
    if about.get(name) != value:
        was, now = _where_they_differ(str(about.get(name)), str(value))
        raise InputError(
            f"Expected the {name} of the checkpoint in {folder}, {was}; got {now}. Pass what the fit was made of "
            "(where it is only looked at, the file that it wrote), or start without the checkpoint."
        )


def _where_they_differ(one: str, other: str, length: int = 200) -> tuple[str, str]:
    """Both texts, of long ones the part that shows what is different."""
    first = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), 0)
    start = 0 if first < length // 2 else first - length // 4
    part, dots = slice(start, start + length), "..." if start else ""
    return dots + one[part], dots + other[part]


def _same_settings(training: Training, wanted: TrainSettings) -> TrainSettings:
    """The settings wanted, if a run can go on with them: only its length may change."""
    for name, value in asdict(wanted).items():
        was = getattr(training.settings, name)
        if name not in {"max_epochs", "max_steps"} and was != value:
            raise InputError(
                f"Expected {name}={was!r}, with which the checkpoint was made; got {value!r}. "
                "Give the same settings and seed, or start without the checkpoint."
            )
    return wanted
