"""Fit several models to the same training cells, and score them on the same held-out ones."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from pyro_velo import preprocess
from pyro_velo.api import depth_for, recipes
from pyro_velo.comparison import CENSORED, COUNTS, SCALED, Comparison
from pyro_velo.data import check_output, read, whole
from pyro_velo.data.bridge import VelocityData, velocity_data
from pyro_velo.data.covariates import design
from pyro_velo.errors import FitError, InputError
from pyro_velo.evidence import Evidence, checked_split, evidence, steps_of
from pyro_velo.fitting import Fit, check_suits, fit
from pyro_velo.models.base import Model
from pyro_velo.models.velocity import VelocityModel
from pyro_velo.options import CompareOptions, FitOptions
from pyro_velo.train import Guide, Training, TrainSettings
from pyro_velo.verdict import Row, judge

if TYPE_CHECKING:
    from anndata import AnnData

Variant: TypeAlias = Model | tuple[Model, Guide | None]


def compare(
    variants: Mapping[str, Variant],
    adata: AnnData,
    *,
    seed: int = 0,
    settings: TrainSettings | None = None,
    progress: bool | None = None,
    **data: Any,
) -> Comparison:
    """Fit every variant to the same training cells of `adata`, and score it on the same held-out cells.

    A variant is a model, or a model with a guide. `data` is what `velocity_data` is told: `as_is`, `batch_key`,
    `covariates`, ...; whether it is counts, the likelihood says. A fit that fails becomes a row that says so. Ctrl-C
    ends the fit that runs, and leaves out those to come.

    The choice is the variant with the best importance-weighted bound, unless a simpler one is within two standard
    errors of it: with fewer gene-level sites, or else listed before it. Where a variant has no bound (see `Evidence`),
    its group is judged by the predictive density.

    Raises `InputError` before anything is fitted: for no variants, bad layers, or fewer than two held-out cells.
    """
    pairs = {name: _pair(name, variant) for name, variant in variants.items()}
    if not pairs:
        raise InputError("Expected one variant or more to compare; got none. Pass a mapping of names to models.")
    settings = replace(settings or TrainSettings(), seed=seed)
    kinds = {name: _numbers(model) for name, (model, _) in pairs.items()}
    counted = {kind == COUNTS for kind in kinds.values()}
    read_as = {counts: velocity_data(adata, counts=counts, **data) for counts in sorted(counted)}
    sources = {kind: read_as[kind == COUNTS] for kind in kinds.values()}
    for name, (model, _) in pairs.items():
        check_suits(model, sources[kinds[name]])
    train_index, index = checked_split(adata.n_obs, settings.held_out, seed)
    rows: dict[str, list[Row]] = {kind: [] for kind in sources}
    interrupted = ""
    for name, (model, guide) in pairs.items():
        kind = kinds[name]
        if interrupted:
            rows[kind].append(Row(name, warnings=(f"not fitted: {interrupted} was interrupted",)))
            continue
        row, stopped = _scored(name, model, guide, adata, settings, sources[kind], progress)
        rows[kind].append(row)
        interrupted = name if stopped else ""
    groups = tuple(judge(kind, found) for kind, found in rows.items())
    return Comparison(groups, settings, len(train_index), len(index))


def _pair(name: str, variant: Any) -> tuple[Model, Guide | None]:
    model, guide = variant if isinstance(variant, tuple) and len(variant) == 2 else (variant, None)
    if not isinstance(model, Model):
        raise InputError(
            f"Expected variant {name!r} to be a model, or (model, guide); got {variant!r}. "
            "Pass objects, as in pv.VelocityModel(likelihood=pv.likelihoods.NB())."
        )
    return model, guide


def _numbers(model: Model) -> str:
    """What a model gives a probability to: bounds of the same numbers can be compared."""
    if not isinstance(model, VelocityModel):
        return SCALED
    return COUNTS if model.likelihood.counts else CENSORED if model.likelihood.lump else SCALED


def _scored(
    name: str,
    model: Model,
    guide: Guide | None,
    adata: AnnData,
    settings: TrainSettings,
    data: VelocityData,
    progress: bool | None,
) -> tuple[Row, bool]:
    """One variant, fitted and scored; and whether Ctrl-C ended its fit."""
    began = time.perf_counter()
    try:
        fitted = fit(model, guide, adata, seed=settings.seed, settings=settings, data=data, progress=progress)
        seconds = time.perf_counter() - began
        found = evidence(fitted.fitted, data.cells, seed=settings.seed)
    except FitError as error:
        # One line, whatever the error holds, because it stands in a table.
        return Row(name, warnings=(f"failed: {' '.join(str(error).split())}",)), False
    steps = steps_of(fitted.fitted, len(data.cells))
    ms_per_step = 1000 * seconds / steps if steps else math.nan
    return Row(name, found, ms_per_step, fitted.epochs, tuple(_warnings(fitted, found))), fitted.interrupted


def _warnings(fitted: Fit, found: Evidence) -> Iterator[str]:
    if fitted.interrupted:
        yield f"interrupted at epoch {fitted.epochs}"
    if told := unconverged(fitted.fitted.training):
        yield told
    if found.no_kl:
        yield f"no bound, because {_some(found.no_kl)} held at a point or under a flat prior: compare its density"
    if found.left_out:
        yield f"{', '.join(found.left_out)} not scored: computed by the model, so no data"


def _some(names: Sequence[str]) -> str:
    """The first names and how many more, with the verb."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{', '.join(names[:3])}{more} {'is' if len(names) == 1 else 'are'}"


def unconverged(training: Training) -> str:
    """Where the best of the looks at the held-out cells is among their last tenth: that, and what this tenth gained.

    Nothing where a plateau ended the fit.
    """
    history = training.history
    looks = [(epoch, x) for epoch, x in zip(history.epoch, history.objective, strict=True) if not math.isnan(x)]
    last = max(1, len(looks) // 10)
    if training.plateau.finished or not looks:
        return ""
    best = max(range(len(looks)), key=lambda i: looks[i][1])
    if best < len(looks) - last:
        return ""
    earlier = [x for _, x in looks[:-last]]
    gain = f", {looks[best][1] - max(earlier):.2g} nats gained in the last tenth" if earlier else ""
    return f"not converged: best at epoch {looks[best][0]} of {history.epoch[-1]}{gain}"


def grid_of(grid: Mapping[str, Iterable[str]]) -> dict[str, FitOptions]:
    """Every combination of the grid's values, by a name that says it.

    >>> list(grid_of({"likelihood": ("nb",), "states": ("collapsed", "hard")}))
    ['likelihood=nb, states=collapsed', 'likelihood=nb, states=hard']
    """
    chosen: Iterator[dict[str, Any]] = (dict(zip(grid, each, strict=True)) for each in product(*grid.values()))
    return {", ".join(f"{name}={value}" for name, value in each.items()): FitOptions(**each) for each in chosen}


def compare_file(path: Path, options: CompareOptions) -> Comparison:
    """Read, prepare, compare, and write JSON and HTML where they are asked for; outputs are checked before the work."""
    outputs = {options.json: (), options.html: (".html",)}
    if options.json is not None and options.json == options.html:
        raise InputError(f"Expected two files for --json and --html; got {options.json} for both. Name another.")
    for output, formats in outputs.items():
        if output is not None:
            check_output(output, options.overwrite, source=path, formats=formats)
    variants = {name: recipes(each) for name, each in grid_of(options.grid).items()}
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    adata = read(path)
    # Before the preprocessing, which takes a while.
    design(adata, options.batch_key)
    if not options.as_is:
        depth = depth_for(*options.grid.get("likelihood", (FitOptions.likelihood,)))
        preprocess.prepare(adata, preprocess.PrepareSettings(seed=options.seed, depth=depth))
    given = {"max_epochs": options.max_epochs, "batch_size": options.batch_size}
    settings = replace(TrainSettings(), **{name: value for name, value in given.items() if value is not None})
    device = "cuda" if torch.cuda.is_available() else "cpu"
    found = compare(
        variants, adata, seed=options.seed, settings=settings,
        as_is=options.as_is, batch_key=options.batch_key, device=device,
    )  # fmt: skip
    for output, text in ((options.json, found.to_json), (options.html, found.to_html)):
        if output is not None:
            with whole(output, options.overwrite, formats=()) as partial:
                partial.write_text(text(), encoding="utf-8")
    return found
