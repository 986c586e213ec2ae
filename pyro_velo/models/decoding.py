"""The half that all autoencoders share: from a latent vector to what is measured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import pyro
from torch import Tensor, nn

from pyro_velo.cluster_sizes import SizesProgram
from pyro_velo.emission import Emission
from pyro_velo.likelihoods import Likelihood
from pyro_velo.nn import Decoder
from pyro_velo.profiles import ProfileBatch, Profiles


class Latents(NamedTuple):
    """What a guide must draw, and from how many numbers.

    `n_seen` numbers are seen of a cell, `n_told` of them covariates; z has `n_latent` coordinates, w `n_style` (0: there
    is no w); the network of q(y) gives `heads` numbers for each of `n_clusters` (0: there is none).
    """

    n_seen: int
    n_told: int
    n_latent: int
    n_style: int = 0
    n_clusters: int = 1
    heads: int = 0
    sizes: SizesProgram | None = None


class Decoding(nn.Module):
    """p(x | z, c): a network, and the distribution that its outputs stand for."""

    def __init__(
        self, likelihood: Likelihood, cells: Profiles, *, n_latent: int, hidden: Sequence[int], decoded: Sequence[str]
    ) -> None:
        super().__init__()
        self.emission = Emission(likelihood, cells, decoded)
        self.decoder = Decoder(n_latent + cells.n_covariates, cells.n_genes, hidden, heads=self.emission.heads)
        # At the start every gene is at its mean in every cell, give or take.
        nn.init.zeros_(self.decoder.bias)

    def outputs(self, z: Tensor, batch: ProfileBatch) -> Tensor:
        """What the network says, (heads, ..., B, G), of z (..., B, d)."""
        told = batch.conditioned(z)
        return self.decoder(told.flatten(0, -2)).unflatten(1, told.shape[:-1])

    def mean(self, z: Tensor, batch: ProfileBatch) -> Tensor:
        """The mean of x (..., B, G) given z (..., B, d); log-odds where x is zeros and ones."""
        return self.emission.mean(self.outputs(z, batch)[0], batch)

    def observe(self, z: Tensor, batch: ProfileBatch) -> None:
        """The site `x`, inside the cells' plate, of z (..., B, 1, d)."""
        pyro.module("decoding", self)
        outputs = self.outputs(z.squeeze(-2), batch)
        with pyro.plate("genes", batch.x.shape[1], dim=-1):
            pyro.sample("x", self.emission(outputs, batch), obs=batch.x)
