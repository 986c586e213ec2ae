r"""Fits of models with clusters: where they start, which of several starts is kept, and how many clusters there are.

A mixture in a latent space that is being learned has poor optima everywhere: all cells in one component, or a cluster
in two. So a fit starts from a short `VAE`, in whose latent space a Gaussian mixture is found by EM, and goes on from
the networks of the one and the components of the other (Jiang et al. 2017, VaDE).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pyro.infer import ELBO, TraceEnum_ELBO, TraceMeanField_ELBO
from scipy.sparse import csr_matrix
from torch import Tensor, nn

from pyro_velo.communities import communities, neighbour_graph, spread
from pyro_velo.encoders import Encoder, PerCluster
from pyro_velo.errors import InputError
from pyro_velo.evidence import Evidence, evidence
from pyro_velo.latent import latent_means
from pyro_velo.models.base import Guide, Model
from pyro_velo.models.cgmdvae import CGMDVAE
from pyro_velo.models.gmvae import GMVAE
from pyro_velo.models.mixing import check_clusters
from pyro_velo.models.vae import VAE
from pyro_velo.moments import as_one, nearest
from pyro_velo.profiles import UNKNOWN, Profiles
from pyro_velo.stages import Stages
from pyro_velo.train import Fitted, TrainSettings

Array = NDArray[np.float64]
Mixed = GMVAE | CGMDVAE
TRAINING = TrainSettings(max_steps=1000, learning_rate=3e-3)
"""How autoencoders are trained, unless it is said."""
LEAST_VARIANCE = 1e-3
"""Of the whole: a smaller variance is that of cells which happen to coincide."""
COMPONENTS = 30
"""Principal components in which cells have neighbours besides those in the latent space."""
STANDARD_ERRORS = 1.0
"""Those of a paired difference within which fewer clusters are preferred (Breiman et al. 1984, 3.4.3)."""


@dataclass(frozen=True)
class StartSettings:
    """How a fit with clusters starts.

    Attributes:
        vae_steps: gradient steps of the VAE. restarts: mixtures that are gone on from, each from means of its own; the
        held-out bound chooses. inits: EM runs for each of them, of which the likeliest is taken. over: components of
        EM for each cluster asked for; those too many are merged, nearest first (1: EM finds the clusters themselves).
        neighbours: of each cell in the graph whose communities the clusters start from, or along which labels spread,
        in place of EM (0: EM); for groups that are no ellipses. It joins cells that are near in the latent space, and,
        where nothing else is told of them, in the principal components of what the encoder sees.
        sure: of the cells without a label, the share that is trained with the one that reaches them along the graph,
        the surest first (Lee 2013, Pseudo-label). passes: fits, each of which goes on from the networks of the one
        before and finds its clusters, and those cells, anew. warmup: the share of the epochs after the VAE, which has
        had a warm-up of its own, in which the KL rises again.
    """

    vae_steps: int = 800
    restarts: int = 2
    inits: int = 5
    over: int = 1
    neighbours: int = 0
    sure: float = 0.0
    passes: int = 1
    warmup: float = 0.0

    def __post_init__(self) -> None:
        """Refuse what no start can be made with."""
        for name in ("vae_steps", "restarts", "inits", "over", "passes"):
            if getattr(self, name) < 1:
                raise InputError(f"Expected {name} of 1 or more; got {getattr(self, name)}. Leave it out.")
        if self.neighbours < 0:
            raise InputError(f"Expected neighbours of 0 or more; got {self.neighbours}. 15 is usual, 0 is EM.")
        if not 0 <= self.sure <= 1:
            raise InputError(f"Expected a share of sure cells in [0, 1]; got {self.sure}. Leave it out.")


@dataclass(frozen=True)
class Start:
    """Where the clusters lie: means (K, d), Cholesky factors of covariances (K, d, d), shares (K,)."""

    loc: Tensor
    root: Tensor
    shares: Tensor

    @property
    def scale(self) -> Tensor:
        """The sds, (K, d)."""
        return self.root.square().sum(-1).sqrt()


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
    cells: Profiles,
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

    cells: Profiles
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
        cells: Profiles,
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
        view = _components(cells, settings.seed) if start.neighbours and cells.covariates is None else None
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

    def _taught(self, n_clusters: int) -> Profiles:
        """The cells, the surest of which have the label that reached them."""
        labels = self._labels()
        if labels is None or not self.start.sure or not self.start.neighbours:
            return self.cells
        shares = spread(_graph(self.z, self.view, self.start.neighbours), labels, n_clusters)
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


def mixture_start(
    z: Array,
    n_clusters: int,
    *,
    correlated: bool = False,
    labels: NDArray[np.int64] | None = None,
    settings: StartSettings | None = None,
    seed: int = 0,
    view: Array | None = None,
) -> Start:
    """A Gaussian mixture, fitted by EM to latent means z (N, d); with diagonal covariances unless `correlated`.

    Where some cells have `labels` (N,), each labelled cluster starts at its cells' mean, and keeps its number. With
    `settings.neighbours` the components are those of `communities`, or of the labels that `spread`, where every cluster
    has some, in the graph of z and, where there is one, of another `view` (N, p): neighbours in both weigh twice.
    """
    settings = settings or StartSettings()
    groups = _groups(z, n_clusters, labels, settings, seed, view)
    if groups is not None:
        weights, means, covariances = _moments(z, groups, n_clusters, correlated)
    else:
        components = min(settings.over * n_clusters, len(z)) if labels is None else n_clusters
        given = None if labels is None else _means_of(z, labels, n_clusters, seed)
        weights, means, covariances = _em(z, components, correlated, settings.inits, seed, given)
    while len(weights) > n_clusters:
        weights, means, covariances = _merged(weights, means, covariances)
    dtype = torch.get_default_dtype()
    return Start(*(torch.from_numpy(each).to(dtype) for each in (means, np.linalg.cholesky(covariances), weights)))


def _groups(
    z: Array,
    n_clusters: int,
    labels: NDArray[np.int64] | None,
    settings: StartSettings,
    seed: int,
    view: Array | None,
) -> NDArray[np.int64] | None:
    """The cluster of each cell by the graph of neighbours, (N,), -1 where nothing reaches it; None: ask EM."""
    known = labels is None or np.isin(np.arange(n_clusters), labels).all()
    if not settings.neighbours or n_clusters == 1 or not known:
        return None
    graph = _graph(z, view, settings.neighbours)
    if labels is None:
        return communities(graph, z, n_clusters, inits=settings.inits, seed=seed)
    shares = spread(graph, labels, n_clusters)
    return np.where(shares.any(1), shares.argmax(1), UNKNOWN)


def _graph(z: Array, view: Array | None, neighbours: int) -> csr_matrix:
    graph = neighbour_graph(z, neighbours)
    return graph if view is None else graph + neighbour_graph(view, neighbours)


def _components(cells: Profiles, seed: int) -> Array:
    """The first principal components of what an encoder sees of each cell, (N, p)."""
    from sklearn.decomposition import PCA

    seen = cells.batch(torch.arange(len(cells), device=cells.device)).seen.cpu().numpy()
    return PCA(min(COMPONENTS, *seen.shape), random_state=seed).fit_transform(seen).astype(np.float64)


def _moments(z: Array, groups: NDArray[np.int64], n_clusters: int, correlated: bool) -> tuple[Array, Array, Array]:
    """Shares (K,), means (K, d) and covariances (K, d, d) of groups."""
    members = [z[groups == k] for k in range(n_clusters)]
    spreads = np.stack([np.atleast_2d(np.cov(each.T, bias=True)) for each in members])
    least = LEAST_VARIANCE * float(z.var()) * np.eye(z.shape[1])
    shares = np.array([len(each) for each in members]) / (groups >= 0).sum()
    means = np.stack([each.mean(0) for each in members])
    return shares, means, (spreads if correlated else spreads * np.eye(z.shape[1])) + least


def _em(
    z: Array, components: int, correlated: bool, inits: int, seed: int, means: Array | None
) -> tuple[Array, Array, Array]:
    """Shares (K,), means (K, d) and covariances (K, d, d)."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.mixture import GaussianMixture

    found = GaussianMixture(
        components,
        covariance_type="full" if correlated else "diag",
        n_init=inits if means is None else 1,
        means_init=means,
        reg_covar=LEAST_VARIANCE * float(z.var()),
        random_state=seed,
        max_iter=200,
    )
    with warnings.catch_warnings():
        # A start need not have converged.
        warnings.simplefilter("ignore", ConvergenceWarning)
        found.fit(z)
    each = found.covariances_
    return found.weights_, found.means_, each if correlated else each[..., None] * np.eye(z.shape[1])


def _means_of(z: Array, labels: NDArray[np.int64], n_clusters: int, seed: int) -> Array:
    """The mean of each label's cells; for clusters without a label cells far from those, one after the other."""
    rng = np.random.default_rng(seed)
    means: dict[int, Array] = {k: z[labels == k].mean(0) for k in range(n_clusters) if (labels == k).any()}
    for k in range(n_clusters):
        if k not in means:
            away = np.min([((z - mean) ** 2).sum(1) for mean in means.values()] or [np.ones(len(z))], axis=0)
            means[k] = z[rng.choice(len(z), p=away / away.sum())]
    return np.stack([means[k] for k in range(n_clusters)])


def _merged(weights: Array, means: Array, covariances: Array) -> tuple[Array, Array, Array]:
    """The mixture with its two nearest components as one of their moments."""
    pair = nearest(weights, means)
    mean, covariance = as_one(weights[pair], means[pair], covariances[pair])
    rest = np.delete(np.arange(len(weights)), pair)
    return (
        np.append(weights[rest], weights[pair].sum()),
        np.vstack((means[rest], mean)),
        np.concatenate((covariances[rest], covariance[None])),
    )


@dataclass(frozen=True)
class NumberOfClusters:
    """Held-out bounds against the number of clusters, in nats per cell.

    `differences` are to the best number, paired by cell: mean and standard error, 0 for the best itself. `choice` is
    the smallest number within a standard error of it.
    """

    candidates: tuple[int, ...]
    bounds: tuple[float, ...]
    differences: tuple[tuple[float, float], ...]
    choice: int
    fits: Mapping[int, Fitted] = field(repr=False)

    @property
    def fitted(self) -> Fitted:
        """The fit that was chosen."""
        return self.fits[self.choice]

    def describe(self) -> dict[str, Any]:
        """Everything but the fits, as JSON."""
        found = {"candidates": self.candidates, "bounds": self.bounds, "differences": map(list, self.differences)}
        return {name: list(value) for name, value in found.items()} | {"choice": self.choice}

    @classmethod
    def of(cls, told: Mapping[str, Any], fitted: Fitted) -> NumberOfClusters:
        """What `describe` told, with the one fit that was chosen."""
        differences = tuple((mean, error) for mean, error in told["differences"])
        return cls(
            tuple(told["candidates"]), tuple(told["bounds"]), differences, told["choice"], {told["choice"]: fitted}
        )

    def table(self) -> str:
        """The same in words."""
        rows = zip(self.candidates, self.bounds, self.differences, strict=True)
        lines = [f"{k:8d}  {bound:10.2f}  {mean:+.3f} ± {error:.3f}" for k, bound, (mean, error) in rows]
        return "\n".join(("clusters  bound/cell  to the best", *lines, f"Choice: {self.choice}"))


def choose_clusters(
    model: Mixed,
    guide: Guide | None,
    cells: Profiles,
    candidates: Sequence[int] = tuple(range(1, 11)),
    *,
    settings: TrainSettings | None = None,
    start: StartSettings | None = None,
    stages: Stages | None = None,
    progress: bool | None = None,
) -> NumberOfClusters:
    """Fit `model` with each number of clusters, from one start, and judge by the importance-weighted held-out bound.

    `stages` as in `fit_profiles`.

    Raises `InputError` for no candidates, and as `evidence` for fewer than two held-out cells.
    """
    if not candidates:
        raise InputError("Expected numbers of clusters to try; got none. Pass candidates=range(1, 11).")
    settings, start = settings or TRAINING, start or StartSettings()
    begun = Started.of(model, guide, cells, settings=settings, start=start, stages=stages, progress=progress)
    fits: dict[int, Fitted] = {}
    for k in sorted(set(candidates)):
        fits[k] = begun.fit(replace(model, n_clusters=k))
        if fits[k].interrupted:
            # Whichever is chosen, others are missing.
            fits = {each: replace(fitted, interrupted=True) for each, fitted in fits.items()}
            break
    return judged(fits, {k: evidence(fitted, cells) for k, fitted in fits.items()})


def judged(fits: Mapping[int, Fitted], scores: Mapping[int, Evidence]) -> NumberOfClusters:
    """The smallest number of clusters whose bound is within a standard error of the best one's, paired by cell."""
    bounds = {k: score.iw_bound for k, score in scores.items()}
    best = max(bounds, key=lambda k: bounds[k].mean())
    gaps = {k: bound - bounds[best] for k, bound in bounds.items()}
    differences = {k: (float(g.mean()), float(g.std(ddof=1) / len(g) ** 0.5)) for k, g in gaps.items()}
    choice = min(k for k, (mean, error) in differences.items() if mean >= -STANDARD_ERRORS * error)
    return NumberOfClusters(
        tuple(fits), tuple(float(b.mean()) for b in bounds.values()), tuple(differences.values()), choice, fits
    )
