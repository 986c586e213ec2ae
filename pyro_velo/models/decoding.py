"""The half that all autoencoders share: from a latent vector to what is measured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import pyro
import torch
from torch import Tensor, nn

from pyro_velo.cluster_sizes import SizesProgram
from pyro_velo.compiled import fuses, fusible, pays
from pyro_velo.emission import Emission
from pyro_velo.likelihoods import Likelihood
from pyro_velo.mixture import Scored
from pyro_velo.nn import Decoder
from pyro_velo.profiles import ProfileBatch, Profiles


class Latents(NamedTuple):
    """What a guide must draw, and from how many numbers.

    `n_seen` numbers are seen of a cell, `n_told` of them covariates; z has `n_latent` coordinates, w `n_style` (0: no
    w); the network of q(y) gives `heads` numbers for each of `n_clusters` (0: there is none).
    """

    n_seen: int
    n_told: int
    n_latent: int
    n_style: int = 0
    n_clusters: int = 1
    heads: int = 0
    sizes: SizesProgram | None = None


class Decoding(nn.Module):
    r"""p(x | z, c): a network, and the distribution that its outputs stand for.

    $$o_g = h_g(z, c) + \textstyle\sum_j c_j f_{jg}$$

    Of counts f is a log fold change that all cells share. Without `interactions` it is all that c does, $h_g(z)$: what
    cells of one kind show of a condition is then taken to hold for those that were never seen under it.
    """

    def __init__(
        self,
        likelihood: Likelihood,
        cells: Profiles,
        *,
        n_latent: int,
        hidden: Sequence[int],
        decoded: Sequence[str],
        interactions: bool,
    ) -> None:
        super().__init__()
        self.emission = Emission(likelihood, cells, decoded)
        self.interactions = interactions
        n_told = cells.n_covariates if interactions else 0
        self.decoder = Decoder(n_latent + n_told, cells.n_genes, hidden, heads=self.emission.heads)
        n_told = cells.n_covariates
        self.fold = nn.Parameter(torch.zeros(self.emission.heads, n_told, cells.n_genes)) if n_told else None
        # At the start every gene is at its mean in every cell, give or take.
        nn.init.zeros_(self.decoder.bias)

    def outputs(self, z: Tensor, batch: ProfileBatch) -> Tensor:
        """What the network says, (heads, ..., B, G), of z (..., B, d)."""
        told = batch.conditioned(z) if self.interactions else z
        found = self.decoder(told.flatten(0, -2)).unflatten(1, told.shape[:-1])
        if self.fold is None or batch.covariates is None:
            return found
        shift = batch.covariates @ self.fold
        return found + shift.reshape(len(shift), *(1,) * (z.ndim - 2), *shift.shape[1:])

    def mean(self, z: Tensor, batch: ProfileBatch) -> Tensor:
        """The mean of x (..., B, G) given z (..., B, d); log-odds where x is zeros and ones."""
        return self.emission.mean(self.outputs(z, batch)[0], batch)

    def observe(self, z: Tensor, batch: ProfileBatch) -> None:
        """The site `x`, inside the cells' plate, of z (..., B, 1, d)."""
        pyro.module("decoding", self)
        outputs = self.outputs(z.squeeze(-2), batch)
        if fuses() or (pays() and self.emission.has_slopes):
            # No more than the density of each cell, at what was measured.
            scored = Scored(self.log_density(outputs, batch).unsqueeze(-1), batch.x.shape[-1:])
            pyro.sample("x", scored, obs=batch.x.unsqueeze(-2))
            return
        with pyro.plate("genes", batch.x.shape[1], dim=-1):
            pyro.sample("x", self.emission(outputs, batch), obs=batch.x)

    def log_density(self, outputs: Tensor, batch: ProfileBatch) -> Tensor:
        """Log p(x) of cells, (..., B), of outputs (heads, ..., B, G), in as few passes as there can be."""
        if self.emission.has_slopes:
            return self.emission.log_density_of_cells(outputs, batch)
        return self._log_density(outputs, batch)

    @fusible
    def _log_density(self, outputs: Tensor, batch: ProfileBatch) -> Tensor:
        return self.emission(outputs, batch).log_prob(batch.x).sum(-1)
