"""Fit an autoencoder to one matrix of an AnnData, and what the fit can say of its cells."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from pyro_velo import checkpoint, parts
from pyro_velo import latent as summaries
from pyro_velo.agreement import Agreement, agreement
from pyro_velo.cluster_number import NumberOfClusters, choose_clusters
from pyro_velo.cluster_sizes import SIZES
from pyro_velo.clustering import TRAINING, Mixed, default_guide, fit_profiles
from pyro_velo.data import check_output, check_writable, checked_labels, read, write_whole
from pyro_velo.data.profile_data import ProfileData, check_profile_keys, cluster_names, profile_data, write_profiles
from pyro_velo.data.profiles_on_disk import check_profile_results, profile_data_on_disk, profiles_file
from pyro_velo.data.stored import is_large, stored
from pyro_velo.errors import InputError
from pyro_velo.evidence import Evidence, evidence
from pyro_velo.fitting import in_words
from pyro_velo.forensics import NonFiniteError
from pyro_velo.last_layer import LastLayer
from pyro_velo.likelihoods import PROFILE_LIKELIHOODS
from pyro_velo.merging import prune_clusters
from pyro_velo.models.base import Guide
from pyro_velo.models.cgmdvae import CGMDVAE
from pyro_velo.models.gmvae import GMVAE
from pyro_velo.models.vae import VAE
from pyro_velo.options import VAEOptions
from pyro_velo.processes import dismiss, team
from pyro_velo.stages import Stages, check_stages
from pyro_velo.starts import StartSettings
from pyro_velo.train import Fitted, TrainSettings, restore
from pyro_velo.version import __version__

if TYPE_CHECKING:
    from anndata import AnnData

Array = NDArray[np.float64]

MODELS: dict[str, type[VAE | GMVAE | CGMDVAE]] = {"vae": VAE, "gmvae": GMVAE, "cgmdvae": CGMDVAE}
"""What the command line calls them."""
COVARIANCES: dict[str, bool] = {"diagonal": False, "full": True}
"""What it calls clusters that are `correlated`, or not."""

KIND = "autoencoder"


@dataclass(frozen=True)
class ProfileFit:
    """A fitted autoencoder, with the data that it was fitted on.

    `number` says why it has so many clusters, where it chose their number itself; `start` how those began.
    """

    fitted: Fitted
    data: ProfileData
    model: VAE | Mixed
    guide: Guide
    number: NumberOfClusters | None = None
    start: StartSettings | None = None

    @property
    def recipe(self) -> str:
        """What it is made of, in words."""
        return in_words(self.model, self.guide)

    @property
    def history(self) -> dict[str, list[float]]:
        """The ELBO per cell by epoch: `epoch`, `train`, `held_out` (NaN where it was not evaluated), `kl_weight`."""
        return asdict(self.fitted.training.history)

    @property
    def interrupted(self) -> bool:
        """Whether Ctrl-C ended it."""
        return self.fitted.interrupted

    @property
    def epochs(self) -> int:
        """The passes over the training cells that it was trained for."""
        return self.fitted.training.epoch

    @property
    def has_clusters(self) -> bool:
        """Whether the model has any."""
        return hasattr(self.fitted.program, "log_clusters")

    def latent(self) -> Array:
        """E[z] of each cell, (N, d)."""
        return summaries.latent_means(self.fitted, self.data.profiles)

    def cluster_probabilities(self, *, draws: int = summaries.DRAWS) -> Array:
        """The posterior probability of each cluster, (N, K); `InputError` for a model without clusters."""
        return summaries.cluster_probabilities(self.fitted, self.data.profiles, draws=draws, seed=self._seed)

    def clusters(self) -> NDArray[np.str_]:
        """The name of each cell's likeliest cluster, (N,)."""
        probabilities = self.cluster_probabilities()
        names = cluster_names(self.data.labels, probabilities.shape[1])
        return np.asarray(names)[probabilities.argmax(1)]

    def denoised(self, *, draws: int = summaries.DRAWS) -> NDArray[np.float32]:
        """The posterior mean of each cell's profile at the median depth, (N, fitted genes)."""
        return summaries.denoised(self.fitted, self.data.profiles, draws=draws, seed=self._seed)

    def converted(
        self,
        column: str,
        level: str,
        *,
        cells: NDArray[np.bool_] | None = None,
        mean: bool = False,
        draws: int = summaries.DRAWS,
    ) -> summaries.Interval:
        """The profiles of `cells` (a mask; None: all) as if obs[`column`] were `level`; see `latent.converted`.

        Intervals are those of expected profiles: of the latent sites' posterior and of that of the decoder's last layer
        (`last_layer`), on which counts of a few cells say less than one thinks.

        Raises `InputError` for a column that was not told to the fit, and an unknown level.
        """
        covariates, profiles = self.data.as_if(column, level), self.data.profiles
        if cells is not None:
            index = torch.from_numpy(np.flatnonzero(cells)).to(profiles.device)
            covariates, profiles = covariates[index], profiles.among(index)
        given: dict[str, Any] = {"last_layer": self._last_layer, "draws": draws, "seed": self._seed, "mean": mean}
        return summaries.converted(self.fitted, profiles, covariates, **given)

    def evidence(self, **options: Any) -> Evidence:
        """The scores of the held-out cells; see `evidence.evidence`."""
        return evidence(self.fitted, self.data.profiles, **options)

    def agreement(self, adata: AnnData, key: str) -> Agreement:
        """How well the clusters agree with obs[`key`]; `InputError` for a column with missing labels."""
        return agreement(checked_labels(adata, key), self.cluster_probabilities().argmax(1))

    def write(self, adata: AnnData | str | Path, *, denoised: bool = False, overwrite: bool = False) -> None:
        """Write latent means, clusters and, if asked for, denoised profiles into `adata`; see `anndata_keys`.

        Where the cells are on disk, `adata` is the path of a new file: a copy of the one that was fitted, with these in
        it.

        Raises `InputError` where `adata` is not of the cells and genes that were fitted, or holds such keys already
        (unless `overwrite`).
        """
        if isinstance(adata, (str, Path)):
            with profiles_file(self.data, adata, about=self.about(), overwrite=overwrite) as into:
                into.put(self.latent(), self.cluster_probabilities() if self.has_clusters else None)
                if denoised:
                    blocks = summaries.denoised_in_blocks(self.fitted, self.data.profiles, seed=self._seed)
                    into.denoise(blocks, summaries.CELLS_AT_ONCE)
            return
        check_profile_keys(adata, overwrite=overwrite)
        write_profiles(
            adata,
            self.data,
            latent=self.latent(),
            probabilities=self.cluster_probabilities() if self.has_clusters else None,
            denoised=self.denoised() if denoised else None,
            about=self.about(),
        )

    def save(self, folder: str | Path, *, overwrite: bool = False) -> None:
        """Keep the fit in a folder, whole or not at all, to `load_vae` it; of other numbers of clusters their bounds.

        Raises `InputError` where a fit is kept there already (unless `overwrite`).
        """
        folder = checkpoint.check_folder(folder, overwrite=overwrite)
        about = {
            "kind": KIND,
            "version": __version__,
            "interrupted": self.interrupted,
            "number": None if self.number is None else self.number.describe(),
            "start": None if self.start is None else asdict(self.start),
        }
        about |= _describe(self.data, self.model, self.guide)
        checkpoint.save(self.fitted.training, folder, about=about)

    def about(self) -> dict[str, Any]:
        """Everything needed to say how the numbers were made."""
        training = self.fitted.training
        about = {
            "version": __version__,
            "model": self.recipe,
            "layer": self.data.layer,
            "settings": {name: "" if value is None else value for name, value in asdict(training.settings).items()},
            "elbo_history": self.history,
            "held_out_elbo": self.fitted.held_out_elbo,
            "interrupted": self.interrupted,
        }
        if self.start is not None:
            about["start"] = asdict(self.start)
        if self.number is not None:
            told = self.number.describe()
            about["number_of_clusters"] = {name: told[name] for name in ("candidates", "bounds", "choice")}
        return about

    @cached_property
    def _last_layer(self) -> LastLayer:
        return LastLayer.of(self.fitted, self.data.profiles, seed=self._seed)

    @property
    def _seed(self) -> int:
        return self.fitted.training.settings.seed


def vae(
    model: VAE | Mixed | None,
    guide: Guide | None,
    adata: AnnData | str | Path,
    *,
    seed: int = 0,
    settings: TrainSettings | None = None,
    start: StartSettings | None = None,
    candidates: Sequence[int] | None = None,
    prune: bool = False,
    data: ProfileData | None = None,
    save: str | Path | None = None,
    resume: str | Path | None = None,
    progress: bool | None = None,
) -> ProfileFit:
    """Fit an autoencoder (None: a `VAE` of negative binomial counts) to `adata`, which stays as it is.

    `adata` may be the path of an `.h5ad` or `.zarr` file: its cells then stay on the disk (`profile_data_on_disk`).
    `data` says which matrix (see `data.profile_data.profile_data`; by default the counts in `X`); `settings` are by
    default `clustering.TRAINING`, with `seed` put in; `start` how a model with clusters starts. With `candidates` every
    number of clusters among them is fitted, and the held-out bound chooses; with `prune` the model is fitted with the
    clusters that it has, and those are merged that the held-out bound does not miss (see `merging`). `save` is a folder
    to keep the fit in, and its trainings as it runs, in place of what was kept there; `resume` one to go on from, to
    the bit, with the same data, parts, settings and seed. Where several processes train together (`processes.joined`)
    the first alone saves.

    Raises `InputError` for bad data, clusters that can't be, and a folder with the stages of another fit;
    `NonFiniteError`, naming the gene, for NaN in the fit.

    >>> import pyro_velo as pv
    >>> fit = pv.vae(pv.GMVAE(n_clusters=5), None, adata, seed=0)  # doctest: +SKIP
    """
    model = model or VAE()
    guide = guide or default_guide(model)
    data = data or _data_of(adata, seed, counts=model.likelihood.counts)
    wanted, start = replace(settings or TRAINING, seed=seed), start or StartSettings()
    save = save if team().leads else None
    stages = _stages(save, resume, _describe(data, model, guide) | {"start": asdict(start)})
    given: dict[str, Any] = {"settings": wanted, "start": start, "stages": stages, "progress": progress}
    number = None
    try:
        if candidates is None and not prune:
            fitted = fit_profiles(model, guide, data.profiles, **given)
        else:
            if isinstance(model, VAE):
                raise InputError("Expected a model with clusters to choose their number; got a VAE. Pass a GMVAE.")
            if candidates is None:
                number = prune_clusters(model, guide, data.profiles, **given)
            elif not prune:
                number = choose_clusters(model, guide, data.profiles, candidates, **given)
            else:
                raise InputError(f"Expected candidates or prune; got {candidates} and prune. Leave one of them out.")
            fitted, model = number.fitted, replace(model, n_clusters=number.choice)
    except NonFiniteError as error:
        raise error.named(data.gene_names) from None
    found = ProfileFit(fitted, data, model, guide, number, None if isinstance(model, VAE) else start)
    if save is not None:
        found.save(save, overwrite=True)
        if not found.interrupted:
            stages.clear()
    return found


def _stages(save: str | Path | None, resume: str | Path | None, about: dict[str, Any]) -> Stages:
    """Where the trainings of a run are kept and gone on with; those of another run are removed from where it writes."""
    write, read = (None if folder is None else Path(folder) for folder in (save, resume))
    if read is not None:
        check_stages(read)
    stages = Stages(write, read, about)
    if write is not None and (read is None or write.resolve() != read.resolve()):
        stages.clear()
    return stages


def load_vae(
    folder: str | Path,
    adata: AnnData | str | Path,
    *,
    model: VAE | Mixed | None = None,
    guide: Guide | None = None,
    device: str | torch.device = "cpu",
) -> ProfileFit:
    """The fit that `ProfileFit.save` or `vae(save=...)` left in a folder, to the bit; nothing is trained.

    `adata` must be the one that was fitted: its matrix is read again, as it was. The model and the guide are made from
    the names that are kept; parts of one's own have none, and are to be passed.

    Raises `InputError` where there is no such fit, or it is of other numbers, genes or parts.

    >>> import pyro_velo as pv
    >>> pv.vae(pv.GMVAE(n_clusters=5), None, adata, save="kept")  # doctest: +SKIP
    >>> fit = pv.load_vae("kept", adata)  # doctest: +SKIP
    """
    training, about = checkpoint.load(folder)
    if about.get("kind") != KIND:
        raise InputError(f"Expected an autoencoder in {folder}; got a fit of another kind. Load velocities by pv.load.")
    model, guide = (_part(name, given, about, folder) for name, given in (("model", model), ("guide", guide)))
    data = _data_of(adata, training.settings.seed, **about["data"], device=device)
    found = _describe(data, model, guide)
    compared = {"recipe": "model and guide", "n_cells": "cells", "genes": "genes", "labels": "labels"}
    for name, what in {**compared, "checksum": "numbers"}.items():
        if about[name] != found[name]:
            raise InputError(f"Expected the {what} that were fitted and kept in {folder}; got others. Pass the same.")
    fitted = replace(restore(model, guide, data.profiles, training), interrupted=about["interrupted"])
    number = None if about["number"] is None else NumberOfClusters.of(about["number"], fitted)
    start = None if about["start"] is None else StartSettings(**about["start"])
    return ProfileFit(fitted, data, model, guide, number, start)


def _data_of(adata: AnnData | str | Path, seed: int, **options: Any) -> ProfileData:
    """What is fitted, of an AnnData, or of a file whose cells stay on the disk."""
    if isinstance(adata, (str, Path)):
        return profile_data_on_disk(adata, seed=seed, **options)
    return profile_data(adata, **options)


def _part(name: str, given: Any, about: dict[str, Any], folder: str | Path) -> Any:
    """The model or the guide: what is given, or what the words of a file stand for."""
    if given is not None:
        return given
    if about[name] is None:
        raise InputError(f"Expected the {name} of {folder}, which has parts that have no name here; pass {name}=.")
    return parts.from_words(about[name])


def _describe(data: ProfileData, model: Any, guide: Any) -> dict[str, Any]:
    """What two runs must agree on, as JSON."""
    named = {
        name: parts.to_words(part) if parts.is_known(part) else None
        for name, part in (("model", model), ("guide", guide))
    }
    return named | {"recipe": in_words(model, guide)} | data.describe()


def vae_file(path: Path, output: Path, options: VAEOptions) -> ProfileFit:
    """Read, fit what the options name, and write the AnnData and the report; what can be checked is checked before.

    Ctrl-C during the training ends it, and the best parameters so far are written.
    """
    check_output(output, options.overwrite, source=path)
    if options.report is not None:
        check_output(options.report, options.overwrite, source=path, formats=(".html",))
    if options.save is not None:
        goes_on = checkpoint.is_same(options.save, options.resume)
        checkpoint.check_folder(options.save, overwrite=options.overwrite or goes_on)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    model, candidates = recipe(options)
    how: dict[str, Any] = {
        "layer": options.layer,
        "counts": model.likelihood.counts,
        "depth": options.depth,
        "condition_key": options.condition_key,
        "covariates": options.covariates,
        "label_key": options.label_key,
    }
    on_disk = options.on_disk or (options.on_disk is None and is_large(path))
    adata: Any = path if on_disk else read(path)
    if on_disk:
        _check_bears_disk(path, options)
        data = profile_data_on_disk(path, **how, scratch=output.absolute().parent, seed=options.seed)
    else:
        check_profile_keys(adata, overwrite=options.overwrite)
        check_writable(adata)
        data = profile_data(adata, **how)
    given = {"max_epochs": options.max_epochs, "batch_size": options.batch_size}
    training = replace(TRAINING, **{name: value for name, value in given.items() if value is not None})
    fit = vae(
        model, None, adata, seed=options.seed, settings=training, start=StartSettings(neighbours=options.neighbours),
        candidates=candidates, prune=options.prune, data=data, save=options.save, resume=options.resume,
    )  # fmt: skip
    dismiss()
    fit.write(output if on_disk else adata, denoised=options.denoised, overwrite=options.overwrite)
    if on_disk:
        return fit
    write_whole(adata, output, options.overwrite)
    if options.report is not None:
        from pyro_velo.profile_report import profile_report

        profile_report(adata, options.report)
    return fit


def _check_bears_disk(path: Path, options: VAEOptions) -> None:
    """Raises `InputError` for what takes all cells at once, and for results that are in the file already."""
    if options.report is not None:
        raise InputError(
            f"Expected no report of cells that stay on the disk; got {options.report}. Leave it out, or pass "
            "--in-memory."
        )
    with stored(path) as file:
        check_profile_results(file, overwrite=options.overwrite)


def recipe(options: VAEOptions) -> tuple[VAE | Mixed, Sequence[int] | None]:
    """The model that the options name, and the numbers of clusters to choose from, if none is given.

    Raises `InputError` for options that the model has no use for.
    """
    likelihood = PROFILE_LIKELIHOODS[options.likelihood]()
    if options.model == "vae":
        for name in ("clusters", "label_key", "prune", "sizes", "covariance", "neighbours"):
            if getattr(options, name) != getattr(VAEOptions, name):
                raise InputError(
                    f"Expected no {name.replace('_', '-')} for a model without clusters; got "
                    f"{getattr(options, name)!r}. Use --model gmvae or cgmdvae."
                )
        return VAE(likelihood, options.latent), None
    sizes = SIZES[options.sizes]()
    kind = {"gmvae": GMVAE, "cgmdvae": CGMDVAE}[options.model]
    n_clusters = options.clusters or (max(options.candidates) if options.prune else 1)
    correlated = COVARIANCES[options.covariance]
    model = kind(n_clusters, likelihood, sizes, n_latent=options.latent, correlated=correlated)
    return model, None if options.clusters or options.prune else options.candidates
