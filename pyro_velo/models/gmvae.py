r"""The Gaussian-mixture variational autoencoder as a Pyro program (Grønbech et al. 2020; Dilokthanakul et al. 2016).

$$y_n \sim \mathrm{Cat}(\pi), \quad z_n \sim \mathcal N(\mu_{y_n}, \Sigma_{y_n}), \quad x_n \sim p(x \mid z_n, c_n)$$

| site | batch shape | event |
|---|---|---|
| sizes, with a `Dirichlet` prior | | K |
| y, where `enumerated` | (B, 1) | |
| z | (B, 1) | d |
| x | (B, G) | |

y is never sampled. x hangs on z alone, so by default y is summed out of the prior, $p(z) = \sum_y p(y)\,p(z \mid y)$:
one encoding and one decoding a cell, and p(y | z) is exact. With `enumerated` y is a site, for the guide of the paper,
q(y | x) q(z | x, y), and `TraceEnum_ELBO`: K decodings a cell.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import pyro
import pyro.distributions as dist
from torch import Tensor, nn

from pyro_velo.assignments import Assignment, Exact
from pyro_velo.cluster_sizes import Learned, Sizes
from pyro_velo.gaussian_mixture import GaussianMixture
from pyro_velo.likelihoods import NB, Likelihood
from pyro_velo.models.base import Model
from pyro_velo.models.decoding import Decoding, Latents
from pyro_velo.models.mixing import Components, check_clusters, draw, note_labels
from pyro_velo.profiles import ProfileBatch, Profiles


@dataclass(frozen=True)
class GMVAE(Model):
    """The recipe: how many clusters, how large they are, and the parts of a `VAE`.

    `correlated` clusters have a covariance each, and not only a variance in each latent dimension; `enumerated` makes y
    a site. `classify` is what a known label weighs against the bound, in nats for each nat of log q(y); `free_nats` of
    a cell's KL(q(y) || p(y)) cost nothing until the KL has come in; `interactions` as in `VAE`.

    >>> GMVAE(n_clusters=5).sizes
    Learned()
    """

    n_clusters: int = 10
    likelihood: Likelihood = field(default_factory=NB)
    sizes: Sizes = field(default_factory=Learned)
    assignment: Assignment = field(default_factory=Exact)
    n_latent: int = 10
    hidden: Sequence[int] = (128,)
    decoded: Sequence[str] = ()
    interactions: bool = True
    enumerated: bool = False
    correlated: bool = True
    classify: float = 1.0
    free_nats: float = 0.0

    def build(self, cells: Profiles) -> GMVAEProgram:
        """The program for these cells' genes; raises `InputError` for clusters that they can't have."""
        check_clusters(self.n_clusters, cells)
        return GMVAEProgram(self, cells)


class GMVAEProgram(nn.Module):
    """The generative story of a profile whose cell is of a cluster; see `forward`."""

    def __init__(self, recipe: GMVAE, cells: Profiles) -> None:
        super().__init__()
        self.recipe, self.n_genes = recipe, cells.n_genes
        self.sizes = recipe.sizes.build(recipe.n_clusters)
        self.components = Components(recipe.n_clusters, recipe.n_latent, correlated=recipe.correlated)
        self.decoding = Decoding(
            recipe.likelihood,
            cells,
            n_latent=recipe.n_latent,
            hidden=recipe.hidden,
            decoded=recipe.decoded,
            interactions=recipe.interactions,
        )
        self.latents = Latents(
            cells.n_genes + cells.n_covariates,
            cells.n_covariates,
            recipe.n_latent,
            n_clusters=recipe.n_clusters,
            heads=0 if recipe.enumerated else recipe.assignment.heads,
            sizes=self.sizes,
        )

    def forward(self, batch: ProfileBatch) -> None:
        """A cluster for each cell, a latent vector near the cluster's, and the profile that it stands for."""
        for name in ("sizes", "components"):
            pyro.module(name, getattr(self, name))
        mixture = self.mixture()
        with pyro.plate("cells", batch.n_cells, subsample=batch.index, dim=-2):
            z = self._one_by_one(mixture, batch) if self.recipe.enumerated else self._summed(mixture, batch)
            self.decoding.observe(z, batch)

    def mixture(self) -> GaussianMixture:
        """p(z); makes the site of the sizes where there is one."""
        return GaussianMixture(
            self.sizes.prior(), self.components.loc, self.components.log_scale.exp(), self.components.lower
        )

    def _summed(self, mixture: GaussianMixture, batch: ProfileBatch) -> Tensor:
        recipe = self.recipe
        return draw(mixture, batch, recipe.assignment, classify=recipe.classify, free_nats=recipe.free_nats)

    def _one_by_one(self, mixture: GaussianMixture, batch: ProfileBatch) -> Tensor:
        # What the guide says of y, where there is a guide.
        log_q = pyro.sample("log_q", dist.Delta(mixture.log_weights, event_dim=1).mask(False))
        if self.recipe.classify:
            note_labels(log_q, batch, self.recipe.classify)
        y = pyro.sample("y", dist.Categorical(logits=mixture.log_weights))
        return pyro.sample("z", mixture.component(y))

    def log_clusters(self, values: Mapping[str, Tensor], batch: ProfileBatch) -> Tensor:
        """Log q(y), (B, K), given a draw of the guide's sites (by name)."""
        if self.recipe.enumerated:
            return values["log_q"].squeeze(-2)
        return self.recipe.assignment.log_q(self.mixture(), values["z"], values.get("y", values["z"])).squeeze(-2)

    def mean(self, values: Mapping[str, Tensor], batch: ProfileBatch) -> Tensor:
        """The mean profile (B, G) that a draw of the latent sites stands for; log-odds where x is zeros and ones."""
        return self.decoding.mean(values["z"].squeeze(-2), batch)
