r"""Where the clusters of a fit start: a Gaussian mixture in the latent space of a `VAE`.

Its components are found by EM, by the communities of a graph of neighbours, or by labels that spread along that graph.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import csr_matrix
from torch import Tensor

from pyro_velo.communities import communities, neighbour_graph, spread
from pyro_velo.errors import InputError
from pyro_velo.moments import as_one, nearest
from pyro_velo.profiles import UNKNOWN, Profiles

Array = NDArray[np.float64]
LEAST_VARIANCE = 1e-3
"""Of the whole: a smaller variance is that of cells which happen to coincide."""
COMPONENTS = 30
"""Principal components in which cells have neighbours besides those in the latent space."""


@dataclass(frozen=True)
class StartSettings:
    """How a fit with clusters starts.

    Attributes:
        vae_steps: gradient steps of the VAE. restarts: mixtures that are gone on from, each from means of its own; the
        held-out bound chooses. inits: EM runs for each of them, of which the likeliest is taken, or searches for
        communities, of which the one of the highest modularity is. over: components of EM for each cluster asked for;
        those too many are merged, nearest first (1: EM finds the clusters themselves).
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
    graph = graph_of(z, view, settings.neighbours)
    if labels is None:
        return communities(graph, z, n_clusters, inits=settings.inits, seed=seed)
    shares = spread(graph, labels, n_clusters)
    return np.where(shares.any(1), shares.argmax(1), UNKNOWN)


def graph_of(z: Array, view: Array | None, neighbours: int) -> csr_matrix:
    """The graph of neighbours (N, N) in z (N, d) and, where there is one, in another `view` (N, p)."""
    graph = neighbour_graph(z, neighbours)
    return graph if view is None else graph + neighbour_graph(view, neighbours)


def view_of(cells: Profiles, seed: int) -> Array:
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
