r"""Fits of models with clusters: from a short `VAE` on, and which of several starts is kept.

A mixture in a latent space that is being learned has poor optima everywhere: all cells in one component, or a cluster
in two. So a fit starts from a short `VAE`, in whose latent space clusters are found (`starts`), and goes on from the
networks of the one and the components of the other (Jiang et al. 2017, VaDE).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pyro.infer import ELBO, TraceEnum_ELBO, TraceMeanField_ELBO
from torch import Tensor, nn

from pyro_velo.communities import spread
from pyro_velo.disk_profiles import AnyProfiles, DiskProfiles
from pyro_velo.encoders import Encoder, PerCluster
from pyro_velo.errors import InputError
from pyro_velo.latent import latent_means
from pyro_velo.models.base import Guide, Model
from pyro_velo.models.cgmdvae import CGMDVAE
from pyro_velo.models.gmvae import GMVAE
from pyro_velo.models.mixing import check_clusters
from pyro_velo.models.vae import VAE
from pyro_velo.profiles import UNKNOWN, Profiles
from pyro_velo.stages import Stages
from pyro_velo.starts import Start, StartSettings, graph_of, mixture_start, view_of
from pyro_velo.train import Fitted, TrainSettings

Array = NDArray[np.float64]
Mixed = GMVAE | CGMDVAE
TRAINING = TrainSettings(max_steps=1000, learning_rate=3e-3, drop=0.7)
"""How autoencoders are trained, unless it is said."""


def elbo_for(model: Model) -> ELBO:
    """The estimator with the least noise: KLs in closed form, or y summed over where it is a site."""
    if getattr(model, "enumerated", False):
        return TraceEnum_ELBO(max_plate_nesting=2)
    return TraceMeanField_ELBO()


def default_guide(model: Model) -> Encoder | PerCluster:
    """The guide of a model for which none is named."""
    return PerCluster() if getattr(model, "enumerated", False) else Encoder()


def fit_profiles(
    model: VAE | Mixed,
    guide: Guide | None,
    cells: AnyProfiles,
    *,
    settings: TrainSettings | None = None,
    start: StartSettings | None = None,
    stages: Stages | None = None,
    progress: bool | None = None,
) -> Fitted:
    """Fit an autoencoder to `cells`; one with clusters from a start of its own, see `StartSettings`.

    `stages` says where its trainings are kept, and gone on with.

    Raises `InputError` as `Model.build` and for a guide that a model with clusters can't start; `NonFiniteError` as
    `train`.
    """
    settings, start, stages = settings or TRAINING, start or StartSettings(), stages or Stages()
    if isinstance(model, VAE):
        guide = guide or default_guide(model)
        return stages.train("vae", model, guide, cells, settings=settings, elbo=elbo_for(model), progress=progress)
    begun = Started.of(model, guide, cells, settings=settings, start=start, stages=stages, progress=progress)
    return begun.fit(model)


@dataclass(frozen=True)
class Started:
    """A short VAE of some cells, from which fits with any number of clusters can go on."""

    cells: AnyProfiles
    vae: Fitted
    z: Array
    guide: Encoder | PerCluster
    settings: TrainSettings
    start: StartSettings
    stages: Stages = field(default_factory=Stages)
    progress: bool | None = None
    view: Array | None = None
    """The first principal components of what the encoder sees, (N, at most 30), where a graph of them is asked for."""

    @classmethod
    def of(
        cls,
        model: Mixed,
        guide: Guide | None,
        cells: AnyProfiles,
        *,
        settings: TrainSettings,
        start: StartSettings,
        stages: Stages | None = None,
        progress: bool | None = None,
    ) -> Started:
        """Train the VAE that shares the networks of `model` and `guide`; `settings.max_epochs` holds for it too."""
        # At once, and not after a VAE.
        check_clusters(model.n_clusters, cells)
        enumerated = getattr(model, "enumerated", False)
        guide = guide or default_guide(model)
        if not isinstance(guide, PerCluster if enumerated else Encoder):
            wanted = "a PerCluster for an enumerated model" if enumerated else "an Encoder"
            raise InputError(f"Expected {wanted}, which can start from a VAE's; got {guide!r}. Or call train yourself.")
        vae = VAE(model.likelihood, model.n_latent, model.hidden, model.decoded, model.interactions)
        short, stages = replace(settings, max_steps=start.vae_steps), stages or Stages()
        encoder = Encoder(guide.hidden)
        fitted = stages.train("vae", vae, encoder, cells, settings=short, elbo=elbo_for(vae), progress=progress)
        if start.neighbours and isinstance(cells, DiskProfiles):
            raise InputError(
                f"Expected neighbours=0 for cells that stay on the disk; got {start.neighbours}: a graph takes all of "
                "them in memory. Leave it out, or read the file and fit that."
            )
        view = None
        if start.neighbours and isinstance(cells, Profiles) and cells.covariates is None:
            view = view_of(cells, settings.seed)
        return cls(cells, fitted, latent_means(fitted, cells), guide, settings, start, stages, progress, view)

    def fit(self, model: Mixed) -> Fitted:
        """The best of the restarts by the held-out bound, and what later passes make of it; see `StartSettings`.

        After Ctrl-C it is the best of those that there are.
        """
        fitted = self._best(model, f"clusters_{model.n_clusters}")
        for later in range(1, self.start.passes):
            if fitted.interrupted or model.n_clusters == 1:
                break
            again = replace(self, vae=fitted, z=latent_means(fitted, self.cells))
            fitted = again._best(model, f"clusters_{model.n_clusters}_pass_{later}")
        return fitted

    def _best(self, model: Mixed, name: str) -> Fitted:
        found: list[Fitted] = []
        for number, begun in enumerate(self._starts(model)):
            found.append(self._fit(model, begun, f"{name}_start_{number}"))
            if found[-1].interrupted or self.vae.interrupted:
                break
        best = max(found, key=lambda fitted: fitted.training.plateau.best)
        return replace(best, interrupted=self.vae.interrupted or found[-1].interrupted)

    def _starts(self, model: Mixed) -> Iterator[Start]:
        restarts = self.start.restarts if model.n_clusters > 1 else 1
        for number in range(restarts):
            yield mixture_start(
                self.z,
                model.n_clusters,
                correlated=model.correlated,
                labels=self._labels(),
                settings=self.start,
                seed=self.settings.seed + number,
                view=self.view,
            )

    def _labels(self) -> NDArray[np.int64] | None:
        labels = self.cells.labels
        return None if labels is None else labels.cpu().numpy()

    def _taught(self, n_clusters: int) -> AnyProfiles:
        """The cells, the surest of which have the label that reached them."""
        labels = self._labels()
        if labels is None or not self.start.sure or not self.start.neighbours:
            return self.cells
        shares = spread(graph_of(self.z, self.view, self.start.neighbours), labels, n_clusters)
        lead = np.diff(np.sort(shares, 1)[:, -2:], axis=1).squeeze(1)
        unknown = np.flatnonzero((labels == UNKNOWN) & shares.any(1))
        sure = unknown[np.argsort(-lead[unknown], kind="stable")][: round(self.start.sure * len(unknown))]
        taught = labels.copy()
        taught[sure] = shares[sure].argmax(1)
        return replace(self.cells, labels=torch.from_numpy(taught).to(self.cells.device))

    def _fit(self, model: Mixed, begun: Start, name: str) -> Fitted:
        decoding = {f"decoding.{name}": value for name, value in self.vae.program.decoding.state_dict().items()}
        encoder = {f"encoder.{name}": value for name, value in self.vae.guide.encoder.state_dict().items()}
        # What goes on from a VAE that was cut short is not what the whole run would have made.
        stages = Stages() if self.vae.interrupted else self.stages
        return stages.train(
            name,
            _ModelFrom(model, decoding, begun),
            _GuideFrom(self.guide, encoder, begun),
            self._taught(model.n_clusters),
            settings=replace(
                self.settings,
                warmup=self.start.warmup,
                max_epochs=1 if self.vae.interrupted else self.settings.max_epochs,
            ),
            elbo=elbo_for(model),
            progress=self.progress,
        )


@dataclass(frozen=True)
class _ModelFrom(Model):
    """A model whose program starts from parameters that are there already."""

    model: Mixed
    state: Mapping[str, Tensor] = field(repr=False)
    begun: Start = field(repr=False)

    def build(self, cells: Profiles) -> nn.Module:
        program = self.model.build(cells)
        _load(program, self.state)
        program.components.begin(self.begun.loc.to(cells.x), self.begun.root.to(cells.x))
        program.sizes.begin(self.begun.shares.to(cells.x))
        return program


@dataclass(frozen=True)
class _GuideFrom(Guide):
    """A guide whose networks start from parameters that are there already."""

    guide: Encoder | PerCluster
    state: Mapping[str, Tensor] = field(repr=False)
    begun: Start = field(repr=False)

    def __call__(self, program: nn.Module) -> nn.Module:
        made: Any = self.guide(program)
        if isinstance(self.guide, Encoder):
            _load(made, self.state)
            if made.clusters is not None:
                made.clusters.begin(self.begun.loc, self.begun.scale, self.begun.shares)
        return made


def _load(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Put in place what is there; the rest stays as it was drawn."""
    module.load_state_dict({**module.state_dict(), **state})
