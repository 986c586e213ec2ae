"""What models with clusters share: where clusters lie, and the latent vector of a cell whose cluster is not sampled."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_velo.assignments import Assignment
from pyro_velo.disk_profiles import AnyProfiles
from pyro_velo.errors import InputError
from pyro_velo.gaussian_mixture import GaussianMixture
from pyro_velo.profiles import UNKNOWN, ProfileBatch


def check_clusters(n_clusters: int, cells: AnyProfiles) -> None:
    """Raises `InputError` for a number of clusters that the cells can't have, and labels beyond it."""
    if not 1 <= n_clusters <= len(cells):
        raise InputError(f"Expected 1 to {len(cells)} clusters, as there are cells; got {n_clusters}. Choose fewer.")
    if cells.labels is not None and int(cells.labels.max()) >= n_clusters:
        raise InputError(
            f"Expected {n_clusters} clusters to hold every label; got {int(cells.labels.max()) + 1} labels. "
            "Ask for as many clusters or more."
        )


class Components(nn.Module):
    """The clusters in the latent space: `loc` and `log_scale`, (K, d), and `lower` (K, d, d) where `correlated`."""

    def __init__(self, n_clusters: int, n_latent: int, *, correlated: bool) -> None:
        super().__init__()
        self.lower = nn.Parameter(torch.zeros(n_clusters, n_latent, n_latent)) if correlated else None
        self.loc = nn.Parameter(torch.randn(n_clusters, n_latent))
        self.log_scale = nn.Parameter(torch.zeros(n_clusters, n_latent))

    def begin(self, loc: Tensor, root: Tensor) -> None:
        """Start from these means (K, d) and Cholesky factors of covariances, (K, d, d)."""
        scale = root.diagonal(dim1=-2, dim2=-1)
        with torch.no_grad():
            self.loc.copy_(loc)
            if self.lower is None:
                self.log_scale.copy_(root.square().sum(-1).log() / 2)
            else:
                self.log_scale.copy_(scale.log())
                self.lower.copy_(torch.linalg.inv(root) * scale.unsqueeze(-2))


def draw(
    mixture: GaussianMixture, batch: ProfileBatch, assignment: Assignment, *, classify: float, free_nats: float
) -> Tensor:
    """The site `z` (B, 1, d) inside the cells' plate, y summed out by `assignment`; labels and free nats as penalties.

    The site `y` holds what the guide's network says of a cell's cluster, where there is such a network.
    """
    k = mixture.loc.shape[-2]
    outputs = mixture.loc.new_zeros(assignment.heads, k)
    if assignment.heads:
        outputs = pyro.sample("y", dist.Delta(outputs, event_dim=2).mask(False))
    allowed = batch.allowed(k)
    z = pyro.sample("z", assignment.prior(mixture, outputs, None if allowed is None else allowed[:, None]))
    log_q = assignment.log_q(mixture, z, outputs)
    if classify:
        note_labels(log_q, batch, classify)
    if free_nats:
        _free(log_q, mixture.log_weights, free_nats)
    return z


def note_labels(log_q: Tensor, batch: ProfileBatch, weight: float) -> None:
    """The penalty `label`: `weight` x log q(y) (B, 1, K) of the cells whose y is known (Kingma et al. 2014, eq. 9).

    It is no part of the bound: there a known cluster only takes the others out of the sum.
    """
    if batch.labels is None:
        return
    known = batch.labels[:, None] != UNKNOWN
    picked = log_q.squeeze(-2).gather(-1, batch.labels.clamp_min(0)[:, None])
    _penalty("label", weight * torch.where(known, picked, 0.0), annealed=False)


def _free(log_q: Tensor, log_weights: Tensor, nats: float) -> None:
    """The penalty `free_nats`: gives back what KL(q(y) || p(y)) costs, up to `nats`, until the KL has come in."""
    kl = (log_q.exp() * (log_q - log_weights)).sum(-1)
    _penalty("free_nats", kl.clamp_max(nats), annealed=True)


def _penalty(name: str, log_factor: Tensor, *, annealed: bool) -> None:
    empty = log_factor.new_empty(*log_factor.shape, 0)
    pyro.sample(name, dist.Unit(log_factor), obs=empty, infer={"penalty": annealed})
