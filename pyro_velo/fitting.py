"""Fit a model to an AnnData, and what a fit can do: write itself into one, save itself, load itself."""

from __future__ import annotations

import platform
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyro
import torch
from pyro.infer import ELBO

from pyro_velo import checkpoint
from pyro_velo.data.bridge import VelocityData, velocity_data, write_posterior
from pyro_velo.data.checks import check_output_keys
from pyro_velo.errors import InputError
from pyro_velo.forensics import NonFiniteError
from pyro_velo.guides import Amortized
from pyro_velo.models.base import Model
from pyro_velo.models.velocity import VelocityModel
from pyro_velo.posterior import OverStates, Posterior, summarise
from pyro_velo.train import Fitted, Guide, Training, TrainSettings, train
from pyro_velo.version import __version__

if TYPE_CHECKING:
    from anndata import AnnData


@dataclass(frozen=True)
class Fit:
    """A fitted model, with the data that it was fitted on."""

    fitted: Fitted
    data: VelocityData
    recipe: str

    @property
    def history(self) -> dict[str, list[float]]:
        """The ELBO per cell by epoch: `epoch`, `train`, `held_out` (NaN where it was not evaluated), `kl_weight`."""
        return asdict(self.fitted.training.history)

    @property
    def interrupted(self) -> bool:
        """Whether Ctrl-C ended it."""
        return self.fitted.interrupted

    def posterior(self, *, draws: int = 100, over_states: OverStates = "expected") -> Posterior:
        """Summaries of the posterior in the units of the model; see `posterior.summarise`."""
        seed = self.fitted.training.settings.seed
        return summarise(self.fitted, self.data.cells, draws=draws, over_states=over_states, seed=seed)

    def write(
        self, adata: AnnData, *, draws: int = 100, over_states: OverStates = "expected", overwrite: bool = False
    ) -> None:
        """Write velocities, times and rates, each with its uncertainty, into `adata` under the keys of `anndata_keys`.

        Raises InputError where `adata` is not of the genes that were fitted, or holds a fit already (unless `overwrite`).
        """
        if adata.n_obs != len(self.data.cells) or adata.n_vars != len(self.data.genes):
            shape = (len(self.data.cells), len(self.data.genes))
            raise InputError(
                f"Expected the AnnData that was fitted, of shape {shape}; got {adata.shape}. Write into that one."
            )
        check_output_keys(adata, overwrite=overwrite)
        posterior = self.posterior(draws=draws, over_states=over_states)
        write_posterior(adata, self.data, posterior, about=self.about(draws, over_states))

    def about(self, draws: int, over_states: str) -> dict[str, Any]:
        """Everything needed to say how the numbers were made."""
        training = self.fitted.training
        settings = {name: "" if value is None else value for name, value in asdict(training.settings).items()}
        return {
            "version": __version__,
            "versions": {"torch": torch.__version__, "pyro": pyro.__version__, "python": platform.python_version()},
            "model": self.recipe,
            "seed": training.settings.seed,
            "settings": {**settings, "draws": draws, "over_states": over_states},
            "elbo_history": self.history,
            "held_out_elbo": training.plateau.best,
            "interrupted": self.interrupted,
        }

    def save(self, folder: str | Path) -> None:
        """Keep the fit in a folder, to `load` it or to go on from it."""
        checkpoint.save(self.fitted.training, folder, about=describe(self.recipe, self.data))


def fit(
    model: Model | None,
    guide: Guide | None,
    adata: AnnData,
    *,
    seed: int = 0,
    settings: TrainSettings | None = None,
    data: VelocityData | None = None,
    elbo: ELBO | None = None,
    save: str | Path | None = None,
    resume: str | Path | None = None,
    progress: bool | None = None,
) -> Fit:
    """Fit `model` with `guide` (None: the defaults) to the smoothed layers of `adata`, which stays as it is.

    `settings` is a `TrainSettings`, with `seed` put in; `data` says which layers (see `velocity_data`; by default `Ms` and
    `Mu`), `elbo` is any of Pyro's (default `Trace_ELBO`), `save` a folder for a checkpoint after every epoch, `resume` a
    folder to go on from, `progress` shows a bar (None: where stderr is a terminal).

    Raises InputError for bad layers or a checkpoint of other genes; NonFiniteError, naming the gene, for NaN in the fit.
    """
    model, guide = model or VelocityModel(), guide or Amortized()
    data = data or velocity_data(adata)
    recipe = f"{model!r} | {guide!r}"
    training = _resumed(resume, data, recipe, settings) if resume else None
    about = describe(recipe, data)
    keep = (lambda state: checkpoint.save(state, save, about=about)) if save else None
    try:
        fitted = train(
            model,
            guide,
            data.cells,
            settings=replace(settings or (training.settings if training else TrainSettings()), seed=seed),
            elbo=elbo,
            resume=training,
            on_epoch=keep,
            progress=progress,
        )
    except NonFiniteError as error:
        raise error.named(data.gene_names) from None
    return Fit(fitted, data, recipe)


def load(folder: str | Path, model: Model | None, guide: Guide | None, adata: AnnData, **layers: Any) -> Fit:
    """The fit that `Fit.save` or `fit(save=...)` left in a folder, with its best parameters; nothing is trained.

    `model`, `guide` and `adata` must be those of the fit, `layers` what `velocity_data` was told.
    Raises InputError where there is no such fit, or it is of other genes or another model.
    """
    model, guide = model or VelocityModel(), guide or Amortized()
    data = velocity_data(adata, **layers)
    recipe = f"{model!r} | {guide!r}"
    training = _resumed(folder, data, recipe, None)
    ended = replace(training, settings=replace(training.settings, max_epochs=max(1, training.epoch)))
    return Fit(train(model, guide, data.cells, resume=ended, progress=False), data, recipe)


def describe(recipe: str, data: VelocityData) -> dict[str, Any]:
    """What a checkpoint must agree on with the run that goes on from it."""
    return {"version": __version__, "model": recipe, "n_cells": len(data.cells), "genes": data.gene_names}


def _resumed(folder: str | Path, data: VelocityData, recipe: str, settings: TrainSettings | None) -> Training:
    """A checkpoint's state, if it is of these cells, genes and model, and was run with these settings."""
    training, about = checkpoint.load(folder)
    for name, value in describe(recipe, data).items():
        if name != "version" and about.get(name) != value:
            was, now = str(about.get(name))[:200], str(value)[:200]
            raise InputError(f"Expected the {name} of the checkpoint in {folder}, {was}; got {now}. Start without resume.")
    # Only the length may change: a run may be gone on with for longer.
    if settings is not None:
        free = {"max_epochs", "max_steps", "seed"}
        for name, value in asdict(settings).items():
            was = getattr(training.settings, name)
            if name not in free and was != value:
                raise InputError(
                    f"Expected {name}={was!r}, with which the checkpoint in {folder} was made; got {value!r}. "
                    "Give the same settings, or start without resume."
                )
    return training
