r"""Fewer clusters after a fit with too many: the nearest two made one, again and again, with nothing trained anew.

Clusters a and b with shares $\pi$, means $\mu$ and covariances $\Sigma$ become the Gaussian of their moments,

$$\pi = \pi_a + \pi_b, \quad \mu = \tfrac{\pi_a\mu_a + \pi_b\mu_b}{\pi}, \quad
\Sigma = \sum_{k \in \{a, b\}} \tfrac{\pi_k}{\pi}\left(\Sigma_k + (\mu_k - \mu)(\mu_k - \mu)^T\right).$$

The nearest are those that lose the least sum of squares (Ward 1963); one without cells goes first. All that the numbers
of clusters differ in is p(z), so their held-out bounds differ by that alone, and not by where a training ended.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import softplus

from pyro_velo.assignments import Exact
from pyro_velo.cluster_number import NumberOfClusters, judged
from pyro_velo.cluster_sizes import Given, inverse_softplus
from pyro_velo.clustering import TRAINING, Mixed, default_guide, fit_profiles
from pyro_velo.disk_profiles import AnyProfiles
from pyro_velo.errors import InputError
from pyro_velo.evidence import Evidence, evidence
from pyro_velo.latent import cluster_probabilities
from pyro_velo.models.base import Guide
from pyro_velo.moments import as_one, nearest
from pyro_velo.stages import Stages
from pyro_velo.starts import StartSettings
from pyro_velo.train import Fitted, TrainSettings, restore

Array = NDArray[np.float64]
Values = dict[str, Tensor]
LOC, LOG_SCALE, LOWER = (f"components$$${name}" for name in ("loc", "log_scale", "lower"))
STYLE = ("style$$$last.weight", "style$$$last.bias")
LOGITS, CONCENTRATIONS = "sizes$$$logits", "sizes$$$outputs"


def prune_clusters(
    model: Mixed,
    guide: Guide | None,
    cells: AnyProfiles,
    *,
    settings: TrainSettings | None = None,
    start: StartSettings | None = None,
    stages: Stages | None = None,
    progress: bool | None = None,
) -> NumberOfClusters:
    """Fit `model` with as many clusters as it has, then merge them, and judge each number by the held-out bound.

    One fit, and a score for each number: the smallest within a standard error of the best is chosen, as in
    `choose_clusters`.

    Raises `InputError` where clusters can't be merged: with labels, which say what they are, given sizes, a y that is a
    site or that a network infers; and as `fit_profiles`.
    """
    _check(model, cells)
    guide = guide or default_guide(model)
    fitted = fit_profiles(
        model, guide, cells, settings=settings or TRAINING, start=start, stages=stages, progress=progress
    )
    fits = {model.n_clusters: fitted}
    # A cluster that no cell is of has a share all the same, or its moments were none.
    shares = cluster_probabilities(fitted, cells).mean(0).clip(np.finfo(np.float64).tiny)
    while len(shares) > 1:
        shares, fitted = _fewer(fitted, model, guide, cells, shares)
        fits[len(shares)] = fitted
    fits = dict(sorted(fits.items()))
    scores: dict[int, Evidence] = {k: evidence(each, cells) for k, each in fits.items()}
    return judged({k: _of_its_own(each, scores[k]) for k, each in fits.items()}, scores)


def _check(model: Mixed, cells: AnyProfiles) -> None:
    wrong = {
        "no labels, which say what clusters are": cells.labels is not None,
        "sizes that are not given": isinstance(model.sizes, Given),
        "a y that is summed exactly": getattr(model, "enumerated", False) or not isinstance(model.assignment, Exact),
    }
    for expected, holds in wrong.items():
        if holds:
            raise InputError(
                f"Expected {expected}, to merge clusters; got {model!r}. Fit each number of them: candidates=."
            )


def _fewer(fitted: Fitted, model: Mixed, guide: Guide, cells: AnyProfiles, shares: Array) -> tuple[Array, Fitted]:
    """The fit with its nearest two clusters as one, which comes last; and the cells' shares then."""
    values = fitted.training.best
    shift, stretch = _style_at_rest(fitted, values)
    loc, log_scale = values[LOC] + shift, values[LOG_SCALE] + stretch
    root = log_scale.exp()[..., None] * torch.linalg.inv(_unit_lower(values, log_scale))
    pair = nearest(shares, loc.numpy(force=True))
    rest = np.delete(np.arange(len(shares)), pair)
    part = (shares[pair], loc[pair].double().numpy(force=True), (root @ root.mT)[pair].double().numpy(force=True))
    mean, covariance = as_one(*part)
    own = torch.from_numpy(shares[pair] / shares[pair].sum()).to(loc)

    def joined(value: Tensor, one: Tensor) -> Tensor:
        return torch.cat((value[rest], one.to(value)[None]))

    def averaged(value: Tensor) -> Tensor:
        return joined(value, torch.einsum("k,k...->...", own, value[pair]))

    changed = {LOC: joined(values[LOC], torch.from_numpy(mean).to(loc) - own @ shift[pair])}
    one_root = torch.linalg.cholesky(torch.from_numpy(covariance)).to(loc)
    scale = one_root.diagonal() if LOWER in values else torch.from_numpy(covariance).diagonal().sqrt().to(loc)
    changed[LOG_SCALE] = joined(values[LOG_SCALE], scale.log() - own @ stretch[pair])
    if LOWER in values:
        changed[LOWER] = joined(values[LOWER], torch.linalg.inv(one_root) * scale)
    if LOGITS in values:
        changed[LOGITS] = joined(values[LOGITS], values[LOGITS][pair].logsumexp(0))
    if CONCENTRATIONS in values:
        # Shares of a Dirichlet that are added are a Dirichlet's, of added concentrations.
        sums = softplus(values[CONCENTRATIONS][pair]).sum()
        changed[CONCENTRATIONS] = joined(values[CONCENTRATIONS], inverse_softplus(sums))
    for name in STYLE:
        if name in values:
            by_cluster = values[name].unflatten(0, (2, len(shares), -1)).transpose(0, 1)
            changed[name] = averaged(by_cluster).transpose(0, 1).flatten(0, 2)
    training = replace(fitted.training, best={**values, **changed}, parameters={**values, **changed}, optimizer={})
    fewer = restore(replace(model, n_clusters=len(rest) + 1), guide, cells, training)
    return np.append(shares[rest], shares[pair].sum()), replace(fewer, interrupted=fitted.interrupted)


def _style_at_rest(fitted: Fitted, values: Values) -> tuple[Tensor, Tensor]:
    """How a style of 0, of a cell of no condition, moves and stretches the clusters, (K, d) each."""
    style = getattr(fitted.program, "style", None)
    if style is None:
        return torch.zeros_like(values[LOC]), torch.zeros_like(values[LOC])
    with torch.no_grad():
        shift, stretch = style(values[LOC].new_zeros(style.n_in))
    return shift, stretch


def _unit_lower(values: Values, log_scale: Tensor) -> Tensor:
    """I + L of each cluster, (K, d, d); L is 0 where clusters have variances alone."""
    unit = torch.eye(log_scale.shape[-1]).to(log_scale)
    return unit + values[LOWER].tril(-1) if LOWER in values else unit.expand(len(log_scale), -1, -1)


def _of_its_own(fitted: Fitted, score: Evidence) -> Fitted:
    """The fit whose best held-out ELBO is that of its own number of clusters."""
    plateau = replace(fitted.training.plateau, best=float(score.elbo.mean()))
    return replace(fitted, training=replace(fitted.training, plateau=plateau))
