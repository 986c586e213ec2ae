r"""The conditional Gaussian-mixture Dirichlet autoencoder, c*GM$\Delta$VAE, as a Pyro program (Kolb 2023, eqs. 8-17).

$$w_n \sim p(w \mid c_n), \qquad d_n \sim \mathrm{Dir}(\alpha), \qquad y_n \sim \mathrm{Cat}(d_n),$$
$$z_n \sim \mathcal N(\mu(w_n, c_n)_{y_n}, \Sigma(w_n, c_n)_{y_n}), \qquad x_n \sim p(x \mid z_n, c_n)$$

| site | batch shape | event |
|---|---|---|
| sizes, with a `Dirichlet` prior | | K |
| w | (B, 1) | style |
| y, what the guide's network says of it, with `Entropy` and `PerCell` | (B, 1) | heads, K |
| z | (B, 1) | d |
| x | (B, G) | |

w is how cells of a cluster differ; the condition c is told to every network, so that neither y, z nor w need say it
again. y is summed exactly and d integrated out: see `assignments` for the ways to do so, of which the talk's is
`PerCell`. With `Exact`, `sizes` gives p(y): one d shared by all cells is `cluster_sizes.Dirichlet`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import pyro
import pyro.distributions as dist
from torch import Tensor, nn

from pyro_velo.assignments import Assignment, Exact
from pyro_velo.cluster_sizes import Dirichlet, Sizes
from pyro_velo.gaussian_mixture import GaussianMixture
from pyro_velo.likelihoods import NB, Likelihood
from pyro_velo.models.base import Model
from pyro_velo.models.decoding import Decoding, Latents
from pyro_velo.models.mixing import Components, check_clusters, draw
from pyro_velo.nn import NormalEncoder, mlp
from pyro_velo.profiles import ProfileBatch, Profiles


@dataclass(frozen=True)
class CGMDVAE(Model):
    """The recipe: how many clusters, how y and its probabilities are inferred, and the parts of a `VAE`.

    `n_style` is the size of w; `learned_style` makes its prior Normal(m(c), s(c)), and not Normal(0, 1);
    `condition_clusters` tells c to the network of p(z | w, y) too: then clusters may lie elsewhere in z under another
    condition, and z need no longer mean the same under both. `hidden_style` is the size of that network;
    `correlated`, `classify` and `free_nats` as in `GMVAE`; `interactions` as in `VAE`, but by default without: what is
    carried over to a cluster that was never seen under a condition is what all clusters show of it.

    >>> CGMDVAE(n_clusters=5).sizes
    Dirichlet(alpha=1.0)
    """

    n_clusters: int = 10
    likelihood: Likelihood = field(default_factory=NB)
    sizes: Sizes = field(default_factory=Dirichlet)
    assignment: Assignment = field(default_factory=Exact)
    n_latent: int = 10
    n_style: int = 2
    hidden: Sequence[int] = (128,)
    hidden_style: Sequence[int] = (32,)
    decoded: Sequence[str] = ()
    interactions: bool = False
    learned_style: bool = False
    condition_clusters: bool = False
    correlated: bool = True
    classify: float = 1.0
    free_nats: float = 0.0

    def build(self, cells: Profiles) -> CGMDVAEProgram:
        """The program for these cells' genes; raises `InputError` for clusters that they can't have."""
        check_clusters(self.n_clusters, cells)
        return CGMDVAEProgram(self, cells)


class CGMDVAEProgram(nn.Module):
    """The generative story of a profile whose cell is of a cluster and under a condition; see `forward`."""

    def __init__(self, recipe: CGMDVAE, cells: Profiles) -> None:
        super().__init__()
        self.recipe, self.n_genes = recipe, cells.n_genes
        self.sizes = recipe.sizes.build(recipe.n_clusters)
        self.components = Components(recipe.n_clusters, recipe.n_latent, correlated=recipe.correlated)
        told = cells.n_covariates if recipe.condition_clusters else 0
        self.style = Style(recipe.n_style + told, recipe.n_clusters, recipe.n_latent, recipe.hidden_style)
        learned = recipe.learned_style and cells.n_covariates > 0
        self.style_prior = NormalEncoder(cells.n_covariates, recipe.n_style, ()) if learned else None
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
            n_style=recipe.n_style,
            n_clusters=recipe.n_clusters,
            heads=recipe.assignment.heads,
            sizes=self.sizes,
        )

    def forward(self, batch: ProfileBatch) -> None:
        """A style for each cell, a latent vector near the cluster's as that style has it, and the profile."""
        for name in ("sizes", "components", "style"):
            pyro.module(name, getattr(self, name))
        log_sizes = self.sizes.prior()
        with pyro.plate("cells", batch.n_cells, subsample=batch.index, dim=-2):
            w = pyro.sample("w", self._styles(batch))
            recipe, mixture = self.recipe, self.mixture(log_sizes, w, batch)
            z = draw(mixture, batch, recipe.assignment, classify=recipe.classify, free_nats=recipe.free_nats)
            self.decoding.observe(z, batch)

    def _styles(self, batch: ProfileBatch) -> dist.Distribution:
        """p(w | c)."""
        zero = batch.x.new_zeros(self.recipe.n_style)
        if self.style_prior is None or batch.covariates is None:
            return dist.Normal(zero, zero + 1).to_event(1)
        pyro.module("style_prior", self.style_prior)
        loc, scale = self.style_prior(batch.covariates)
        return dist.Normal(loc.unsqueeze(-2), scale.unsqueeze(-2)).to_event(1)

    def mixture(self, log_sizes: Tensor, w: Tensor, batch: ProfileBatch) -> GaussianMixture:
        """p(z | w, c), its clusters (B, 1, K, d), of w (B, 1, style)."""
        told = batch.conditioned(w.squeeze(-2)) if self.recipe.condition_clusters else w.squeeze(-2)
        shift, stretch = (each.unsqueeze(-3) for each in self.style(told))
        loc, log_scale = self.components.loc + shift, self.components.log_scale + stretch
        return GaussianMixture(log_sizes, loc, log_scale.exp(), self.components.lower)

    def log_clusters(self, values: Mapping[str, Tensor], batch: ProfileBatch) -> Tensor:
        """Log q(y), (B, K), given a draw of the guide's sites (by name)."""
        mixture = self.mixture(self.sizes.prior(), values["w"], batch)
        return self.recipe.assignment.log_q(mixture, values["z"], values.get("y", values["z"])).squeeze(-2)

    def mean(self, values: Mapping[str, Tensor], batch: ProfileBatch) -> Tensor:
        """The mean profile (B, G) that a draw of the latent sites stands for; log-odds where x is zeros and ones."""
        return self.decoding.mean(values["z"].squeeze(-2), batch)


class Style(nn.Module):
    """How w moves and stretches each cluster: (..., n_in) to two times (..., K, d), 0 at the start."""

    def __init__(self, n_in: int, n_clusters: int, n_latent: int, hidden: Sequence[int]) -> None:
        super().__init__()
        self.n_in, self.shape = n_in, (2, n_clusters, n_latent)
        self.trunk = mlp(n_in, hidden)
        self.last = nn.Linear(hidden[-1] if hidden else n_in, 2 * n_clusters * n_latent)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, told: Tensor) -> tuple[Tensor, Tensor]:
        """The move of each cluster's mean, and of the logarithm of its sd."""
        move = self.last(self.trunk(told)).unflatten(-1, self.shape)
        return move.select(-3, 0), move.select(-3, 1)
