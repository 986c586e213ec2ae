r"""The variational autoencoder as a Pyro program (Kingma & Welling 2014; of counts: Grønbech et al. 2020).

$$z_n \sim \mathcal N(0, I_d), \qquad x_{ng} \sim p(x \mid h_g(z_n, c_n), \text{size}_n, \theta_g)$$

| site | batch shape | event |
|---|---|---|
| z | (B, 1) | d |
| x | (B, G) | |

The genes' own parameters and the networks are points; c, what is known of a cell, is told to both networks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import pyro
import pyro.distributions as dist
from torch import Tensor, nn

from pyro_velo.likelihoods import NB, Likelihood
from pyro_velo.models.base import Model
from pyro_velo.models.decoding import Decoding, Latents
from pyro_velo.profiles import ProfileBatch, Profiles


@dataclass(frozen=True)
class VAE(Model):
    """The recipe: the likelihood, the size of z and of the decoder.

    `hidden=()` makes the decoder linear; `decoded` names parameters of the likelihood that the decoder gives for each
    cell, and not one for each gene. Without `interactions` what is known of a cell moves each gene alike in all cells
    (see `decoding.Decoding`), and the decoder's network is not told of it.

    >>> from pyro_velo.likelihoods import ZINB
    >>> VAE(likelihood=ZINB(), decoded=("gate",)).decoded
    ('gate',)
    """

    likelihood: Likelihood = field(default_factory=NB)
    n_latent: int = 10
    hidden: Sequence[int] = (128,)
    decoded: Sequence[str] = ()
    interactions: bool = True

    def build(self, cells: Profiles) -> VAEProgram:
        """The program for these cells' genes, its units read off the cells."""
        return VAEProgram(self, cells)


class VAEProgram(nn.Module):
    """The generative story of a profile; see `forward`."""

    def __init__(self, recipe: VAE, cells: Profiles) -> None:
        super().__init__()
        self.recipe, self.n_genes = recipe, cells.n_genes
        self.latents = Latents(cells.n_genes + cells.n_covariates, cells.n_covariates, recipe.n_latent)
        self.decoding = Decoding(
            recipe.likelihood,
            cells,
            n_latent=recipe.n_latent,
            hidden=recipe.hidden,
            decoded=recipe.decoded,
            interactions=recipe.interactions,
        )

    def forward(self, batch: ProfileBatch) -> None:
        """A latent vector for each cell, and the profile that it stands for."""
        with pyro.plate("cells", batch.n_cells, subsample=batch.index, dim=-2):
            zero = batch.x.new_zeros(self.recipe.n_latent)
            z = pyro.sample("z", dist.Normal(zero, zero + 1).to_event(1))
            self.decoding.observe(z, batch)

    def mean(self, values: Mapping[str, Tensor], batch: ProfileBatch) -> Tensor:
        """The mean profile (B, G) that a draw of the latent sites stands for; log-odds where x is zeros and ones."""
        return self.decoding.mean(values["z"].squeeze(-2), batch)
