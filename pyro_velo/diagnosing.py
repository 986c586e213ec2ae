"""Diagnose a fit: measure its course, its latent space, its bound and its genes, and judge what is found."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from pyro_velo import checkpoint
from pyro_velo.api import kept_fit, kept_parts, recipes
from pyro_velo.autoencoding import MODELS, ProfileFit
from pyro_velo.batch import Data
from pyro_velo.clustering import elbo_for
from pyro_velo.data import check_output, whole
from pyro_velo.diagnosis import Diagnosis, Parts
from pyro_velo.disk_profiles import AnyProfiles
from pyro_velo.doctor import sample
from pyro_velo.doctor.balance import balance
from pyro_velo.doctor.collapse import Collapse, collapse, state_use
from pyro_velo.doctor.course import course, encoder_moved
from pyro_velo.doctor.findings import PRIOR, THRESHOLDS, Measured, NotFinite, verdict
from pyro_velo.doctor.genes import Genes, genes, numbers
from pyro_velo.doctor.noise import noise_ratio
from pyro_velo.doctor.tightness import Tightness, tightness
from pyro_velo.errors import InputError
from pyro_velo.fitting import Fit, check_recipe, in_words
from pyro_velo.forensics import NonFiniteError
from pyro_velo.options import FitOptions
from pyro_velo.train import Fitted, split

AUTOENCODERS = tuple(MODELS.values())


def diagnose(fit: Fit | ProfileFit | NonFiniteError, *, seed: int = 0) -> Diagnosis:
    """Say what is wrong with a fit, with a remedy for each finding; none where nothing is that is looked for.

    The fit is of velocities or an autoencoder's. Of a fit that ended in NaN, pass the error. The figures and rules are
    those of `doctor`; nothing is written or changed, and the random numbers are those of `seed`. Without held-out cells
    nothing is said of the bound. It looks at a few hundred cells, whatever the data's size.

    Raises `NonFiniteError`, naming site and gene, where the parameters give NaN on these cells.
    """
    if isinstance(fit, NonFiniteError):
        return _of_failure(NotFinite(fit.culprit.what, fit.step, fit.gene_or_number, None))
    cells = fit.data.profiles if isinstance(fit, ProfileFit) else fit.data.cells
    return diagnosed(fit.fitted, cells, tuple(fit.data.gene_names), seed=seed)


def diagnosed(
    fitted: Fitted, cells: Data, names: tuple[str, ...], *, noise: float | None = None, seed: int = 0
) -> Diagnosis:
    """The same of a fit on `cells`, whose genes have these `names`; `noise` is its `noise_ratio`, where it is known."""
    settings = fitted.training.settings
    enough = len(split(len(cells), settings.held_out, settings.seed)[1]) > 1
    parts = Parts(
        history=asdict(fitted.training.history),
        collapse=collapse(fitted, cells, seed=seed),
        states=state_use(fitted, cells, seed=seed),
        tightness=tightness(fitted, cells, seed=seed) if enough else None,
        genes=genes(fitted, cells, seed=seed),
        gene_names=names,
    )
    told = measured(fitted, cells, parts, noise=noise, seed=seed)
    return Diagnosis(*verdict(told), told, parts)


def measured(fitted: Fitted, cells: Data, parts: Parts, *, noise: float | None = None, seed: int = 0) -> Measured:
    """The figures that the rules look at."""
    went, told = course(fitted.training, len(cells)), balance(fitted, cells, seed=seed)
    if noise is None:
        recipe = getattr(fitted.program, "recipe", None)
        elbo = elbo_for(recipe) if isinstance(recipe, AUTOENCODERS) else None
        noise = noise_ratio(fitted, cells, elbo, seed=seed)
    return Measured(
        numbers=numbers(cells) * cells.n_genes,
        looks=went.looks,
        rise=went.rise,
        rise_error=went.rise_error,
        swing=went.swing,
        fall=went.fall,
        train_rise=went.train_rise,
        kl_weight=went.kl_weight,
        ended=went.ended,
        encoder_moved=encoder_moved(fitted, cells),
        noise_ratio=noise,
        told_weight=told.weight,
        told_error=told.error,
        kinetic=not isinstance(cells, AnyProfiles),
        dead_states=math.nan if parts.states is None else float(parts.states.dead.mean()),
        **_of_latent(parts.collapse),
        **_of_bound(parts.tightness),
        **_of_genes(parts.genes, parts.gene_names),
    )


def _of_latent(found: Collapse | None) -> dict[str, Any]:
    return {} if found is None else {"dimensions": len(found.kl), "active": int(found.active.sum())}


def _of_bound(found: Tightness | None) -> dict[str, Any]:
    return {} if found is None else {"without_mean": found.without_mean, "iw_gap": float(found.gap.mean())}


def _of_genes(found: Genes, names: tuple[str, ...]) -> dict[str, Any]:
    most, seen = int(found.loss_share.argmax()), int(found.input_share.argmax())
    told: dict[str, Any] = {"loss_share": float(found.loss_share[most]), "loss_gene": names[most], "genes": len(names)}
    told |= {"input_share": float(found.input_share[seen]), "input_gene": names[seen]}
    told |= {"at_bound": found.at_bound}
    if len(found.noise):
        least = int(found.noise.argmin())
        told |= {"least_noise": float(found.noise[least]), "noise_gene": names[least]}
    if found.sites:
        worst = max(found.sites, key=lambda site: site.median)
        told |= {"prior_site": worst.name, "prior_distance": worst.median}
    # Of a switching time, what counts is whether it is at 0 or 20.
    near = [x for x in found.sites if x.median <= THRESHOLDS[PRIOR].value and x.name != "switch_time"]
    if near:
        furthest = max(near, key=lambda site: site.far)
        told |= {"far_site": furthest.name, "far_share": furthest.far}
    return told


def _of_failure(where: NotFinite) -> Diagnosis:
    told = Measured(not_finite=where)
    return Diagnosis(*verdict(told), told, None)


def diagnose_file(
    folder: Path,
    path: Path | None = None,
    parts: Mapping[str, Any] | None = None,
    *,
    json: Path | None = None,
    html: Path | None = None,
    overwrite: bool = False,
) -> Diagnosis:
    """Diagnose the fit that `pyro-velo fit --save` left in `folder`, on the AnnData that it wrote to `path`.

    Without `path`, by the cells that it kept in `folder`, which says the same. `parts` are options of `fit` by name,
    those that were not noted there. A fit that ended in NaN is diagnosed by what it left. Outputs are checked before
    the work. Raises `InputError` as `fitting.load`, and where no cells were kept.
    """
    if json is not None and json == html:
        raise InputError(f"Expected two files for --json and --html; got {json} for both. Name another.")
    for output, formats in ((json, ()), (html, (".html",))):
        if output is not None:
            check_output(output, overwrite, source=path, formats=formats)
    failed = checkpoint.failure(folder)
    if failed:
        found = _of_failure(NotFinite(**failed))
    else:
        options = replace(FitOptions(), **{**kept_parts(folder), **(parts or {})})
        found = _of_kept(folder, options) if path is None else diagnose(kept_fit(folder, path, options)[0])
    for output, text in ((json, found.to_json), (html, found.to_html)):
        if output is not None:
            with whole(output, overwrite, formats=()) as partial:
                partial.write_text(text(), encoding="utf-8")
    return found


def _of_kept(folder: Path, options: FitOptions) -> Diagnosis:
    """By the cells that were kept beside the checkpoint."""
    training, about = checkpoint.load(folder)
    model, guide = recipes(options)
    check_recipe(in_words(model, guide), about, folder)
    kept = sample.load(folder, about)
    fitted = sample.restored(model, guide, training, kept)
    return diagnosed(fitted, kept.cells, kept.gene_names, noise=kept.noise_ratio)
