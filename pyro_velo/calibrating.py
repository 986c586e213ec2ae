r"""Simulate from a model's own prior, fit the same model, and hold the posterior against the truth; many times.

Where truth and data come from the model, a correct posterior's intervals cover the truth as often as they say (Talts et
al. 2018). What falls short is the fit's: its guide, its length, its bound.
"""

from __future__ import annotations

import hashlib
import json as json_format
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from numpy.random import SeedSequence
from tqdm.auto import tqdm

from pyro_velo.api import recipes
from pyro_velo.batch import Cells
from pyro_velo.calibration import Calibration, Record
from pyro_velo.coupling import couple
from pyro_velo.data import check_output, whole
from pyro_velo.data.bridge import check_same
from pyro_velo.errors import FitError, InputError
from pyro_velo.fitting import Fit, in_words
from pyro_velo.guides import Amortized
from pyro_velo.models.velocity import VelocityModel
from pyro_velo.options import CALIBRATION_DRAWS, CALIBRATION_FITS, FitOptions
from pyro_velo.plots import calibration as pictures
from pyro_velo.posterior import OVER_STATES, OverStates, check_draws
from pyro_velo.prior_draws import Like, Simulated, draw_from_prior, reference, with_fixed_priors
from pyro_velo.time_units import in_common_unit
from pyro_velo.train import Guide, TrainSettings, train
from pyro_velo.truth import UNITS, measure, truth_of
from pyro_velo.version import __version__

if TYPE_CHECKING:
    from anndata import AnnData

ABOUT = "about.json"


@dataclass(frozen=True)
class CalibrationSettings:
    """How every fit is made, and what is asked of it.

    `over_states`: each draw's velocity and time are those of a state that is "drawn" from its posterior, which is what
    a fit writes, those of the most likely one, or the expectation over the four states ("expected"): only the first are
    draws of the posterior, and would be calibrated were it exact. `recentred`: let the fit read its prior off each
    simulated data set, as it does off real data, so that truth and fit do not share one.
    """

    train: TrainSettings = field(default_factory=TrainSettings)
    over_states: OverStates = OVER_STATES
    recentred: bool = False


def calibrate(
    model: VelocityModel | None,
    guide: Guide | None,
    data: Like,
    *,
    fits: int = CALIBRATION_FITS,
    draws: int = CALIBRATION_DRAWS,
    seed: int = 0,
    settings: CalibrationSettings | None = None,
    folder: str | Path | None = None,
    progress: bool | None = None,
) -> Calibration:
    """Fit `model` with `guide` (None: the defaults) to data from its own prior, `fits` times, and count what it covers.

    `data` is (cells, genes), or data of the size wanted: `Cells`, what `velocity_data` returns, or an AnnData with `Ms`
    and `Mu`. Priors that are centred on start values (`Centered`, the default) are no priors before data are seen:
    they are centred once, on these data or else on cells of a typical gene, and both truth and fits have them so.

    Rates are compared on the log scale. `folder` keeps each fit's counts, and what is there already is not fitted
    again; more `fits` go on from it. Ctrl-C keeps what is done. The same seed gives the same numbers.

    Raises `InputError` for improper priors, fewer than 2 draws or 1 fit, and a folder of another calibration.
    """
    check_draws(draws)
    if fits < 1:
        raise InputError(f"Expected 1 fit or more; got {fits}. The default is {CALIBRATION_FITS}.")
    model, settings = model or VelocityModel(), settings or CalibrationSettings()
    like, guide = reference(data, model), guide or Amortized()
    fixed = with_fixed_priors(model, like)
    first = draw_from_prior(fixed, like, seed=_seeds(seed, 0)[0])
    about = _about(model, guide, first, draws, seed, settings)
    kept = None if folder is None else _folder(Path(folder), about)
    fit_by = model if settings.recentred else fixed
    records: list[Record] = []
    failed: list[str] = []
    interrupted = False
    for i in tqdm(range(fits), desc="calibrate", unit="fit", disable=None if progress is None else not progress):
        path = None if kept is None else kept / f"fit_{i:04d}.json"
        try:
            if path is not None and path.exists():
                records.append(_record(path))
                continue
            found = _one(fixed, fit_by, guide, like, draws, _seeds(seed, i), settings)
            if path is not None:
                _write(path, found.to_plain())
            records.append(found)
        except FitError as error:
            failed.append(f"fit {i}: {' '.join(str(error).split())}")
        except KeyboardInterrupt:
            interrupted = True
            break
    if interrupted and not records:
        raise KeyboardInterrupt
    return Calibration(tuple(records), draws, UNITS, about, tuple(failed), interrupted)


def coverage_of(
    fit: Fit,
    adata: AnnData,
    *,
    draws: int = CALIBRATION_DRAWS,
    over_states: OverStates = OVER_STATES,
    progress: bool | None = None,
) -> Calibration:
    """Hold the fit of a simulated AnnData against its truth (`true_velocity`, `true_alpha`, ...), in layer units.

    A calibration of one fit: no error between fits, and ranks of one value each. With counts the truth is multiplied by
    the median library, which is what size factors leave of it, approximately.

    Raises `InputError` where `adata` has no truth, or other cells and genes than were fitted.
    """
    check_draws(draws)
    check_same(adata, fit.data)
    truth, unit, cells = truth_of(adata, fit.data.genes), fit.data.scaling.s_unit, fit.data.resident
    seed = fit.fitted.training.settings.seed
    record = measure(
        fit.told, cells, truth, draws=draws, seed=seed, over_states=over_states, unit=unit, progress=progress
    )
    return Calibration((record,), draws, UNITS, fit.about(draws, over_states))


def calibrate_file(
    options: FitOptions,
    *,
    cells: int,
    genes: int,
    fits: int = CALIBRATION_FITS,
    json: Path | None = None,
    picture: Path | None = None,
) -> Calibration:
    """Calibrate what `options` name at (cells, genes); write JSON and a picture where they are asked for.

    `options.save` is the folder of the fits. Outputs are checked before the work.
    """
    if json is not None and json == picture:
        raise InputError(f"Expected two files for --json and --picture; got {json} for both. Name another.")
    for output, formats in ((json, ()), (picture, pictures.FORMATS)):
        if output is not None:
            check_output(output, options.overwrite, formats=formats)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    given = {"max_epochs": options.max_epochs, "batch_size": options.batch_size}
    settings = replace(TrainSettings(), **{name: value for name, value in given.items() if value is not None})
    found = calibrate(
        *recipes(options), (cells, genes), fits=fits, draws=options.draws, seed=options.seed,
        settings=CalibrationSettings(settings), folder=options.save,
    )  # fmt: skip
    if json is not None:
        with whole(json, options.overwrite, formats=()) as partial:
            partial.write_text(found.to_json(), encoding="utf-8")
    if picture is not None:
        with whole(picture, options.overwrite, formats=pictures.FORMATS) as partial:
            pictures.calibration_panels(found).savefig(partial, dpi=144)
    return found


def _one(
    simulated_by: VelocityModel,
    fit_by: VelocityModel,
    guide: Guide,
    like: Cells,
    draws: int,
    seeds: tuple[int, int, int],
    settings: CalibrationSettings,
) -> Record:
    """One simulation, its fit, and what is counted of it; raises KeyboardInterrupt where Ctrl-C ended the training."""
    simulated = draw_from_prior(simulated_by, like, seed=seeds[0])
    options = replace(settings.train, seed=seeds[1])
    fitted = train(fit_by, guide, simulated.cells, settings=options, progress=False)
    if fitted.interrupted:
        raise KeyboardInterrupt
    fitted = couple(fitted, simulated.cells, seed=options.seed, progress=False)
    fitted = in_common_unit(fitted, simulated.cells, seed=options.seed)
    return measure(
        fitted, simulated.cells, simulated.truth,
        draws=draws, seed=seeds[2], over_states=settings.over_states, progress=False,
    )  # fmt: skip


def _seeds(seed: int, fit: int) -> tuple[int, int, int]:
    """Of the simulation, the fit and the draws: those of a fit do not depend on how many there are."""
    first, second, third = SeedSequence(seed, spawn_key=(fit,)).generate_state(3).tolist()
    return first, second, third


def _about(
    model: VelocityModel, guide: Guide, first: Simulated, draws: int, seed: int, settings: CalibrationSettings
) -> dict[str, Any]:
    """How the numbers are made; the first simulation stands for the priors, whose numbers no name shows."""
    print_of_first = hashlib.sha256(first.cells.molecules.cpu().numpy().tobytes()).hexdigest()[:16]
    return {
        "version": __version__,
        "model": in_words(model, guide),
        "cells": len(first.cells),
        "genes": first.cells.n_genes,
        "draws": draws,
        "seed": seed,
        "settings": asdict(settings),
        "first_simulation": print_of_first,
    }


def _folder(folder: Path, about: dict[str, Any]) -> Path:
    """The folder, made if it is missing; raises `InputError` where it is another calibration's."""
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / ABOUT).exists():
        was = _read(folder / ABOUT)
        for name, value in about.items():
            if name != "version" and was.get(name) != value:
                raise InputError(
                    f"Expected the {name} of the calibration in {folder}, {str(was.get(name))[:200]}; got "
                    f"{str(value)[:200]}. Name another folder."
                )
    else:
        _write(folder / ABOUT, about)
    return folder


def _record(path: Path) -> Record:
    try:
        return Record.from_plain(_read(path))
    except (KeyError, TypeError, AttributeError) as error:
        raise _unreadable(path, error) from error


def _read(path: Path) -> dict[str, Any]:
    try:
        return dict(json_format.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> InputError:
    return InputError(f"{path} can't be read ({error}), expected the counts of a fit. Remove it to fit again.")


def _write(path: Path, plain: Mapping[str, Any]) -> None:
    with whole(path, overwrite=True, formats=()) as partial:
        partial.write_text(json_format.dumps(plain), encoding="utf-8")
