r"""The guides of the autoencoders: networks that look at a cell's profile once and say what its latent sites are.

| guide | of | sites |
|---|---|---|
| `Encoder` | `VAE`, `GMVAE`, `CGMDVAE` | $q(z \mid x, c)$; $q(w \mid x, c)$ of a w; what a network of y says of z |
| `PerCluster` | `GMVAE(enumerated=True)` | $q(y \mid x, c)\, q(z \mid x, y, c)$, for `TraceEnum_ELBO` |
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_velo.models.base import Guide
from pyro_velo.models.decoding import Latents
from pyro_velo.nn import NormalEncoder, mlp
from pyro_velo.profiles import ProfileBatch

IMPOSSIBLE = -1e4
"""The logit of a cluster that a cell is known not to be of: its probability is 0 in float32, and 0 times it is 0."""


@dataclass(frozen=True)
class Encoder(Guide):
    """The recipe: the size of the network from a profile to z (and of another to w), and of the one from z to y."""

    hidden: Sequence[int] = (128,)
    hidden_clusters: Sequence[int] = (32,)

    def __call__(self, program: nn.Module) -> EncoderProgram:
        """The guide of an autoencoder's program."""
        return EncoderProgram(self, program)


class EncoderProgram(nn.Module):
    """z from the profile, w from the profile, y from z."""

    def __init__(self, recipe: Encoder, program: Any) -> None:
        super().__init__()
        latents: Latents = program.latents
        self.latents = latents
        self.encoder = NormalEncoder(latents.n_seen, latents.n_latent, recipe.hidden)
        self.style = NormalEncoder(latents.n_seen, latents.n_style, recipe.hidden) if latents.n_style else None
        self.clusters = Clusters(latents, recipe.hidden_clusters) if latents.heads else None

    def forward(self, batch: ProfileBatch) -> None:
        """Draw every latent site of the model."""
        if self.latents.sizes is not None:
            self.latents.sizes.posterior()
        with pyro.plate("cells", batch.n_cells, subsample=batch.index, dim=-2):
            z = pyro.sample("z", self._encoded("encoder", self.encoder, batch))
            if self.style is not None:
                pyro.sample("w", self._encoded("style_encoder", self.style, batch))
            if self.clusters is not None:
                pyro.module("clusters", self.clusters)
                pyro.sample("y", dist.Delta(self.clusters(z, batch), event_dim=2).mask(False))

    def _encoded(self, name: str, network: NormalEncoder, batch: ProfileBatch) -> dist.Distribution:
        pyro.module(name, network)
        loc, scale = network(batch.seen)
        return dist.Normal(loc.unsqueeze(-2), scale.unsqueeze(-2)).to_event(1)


class Clusters(nn.Module):
    """What a network says of a cell's cluster: z (B, 1, d) to (B, 1, heads, K).

    A quadric in z, which tells Gaussians apart, and what a network adds to it.
    """

    def __init__(self, latents: Latents, hidden: Sequence[int]) -> None:
        super().__init__()
        self.shape = (latents.heads, latents.n_clusters)
        n_out = latents.heads * latents.n_clusters
        self.quadric = nn.Linear(2 * latents.n_latent, n_out)
        last = nn.Linear(hidden[-1] if hidden else latents.n_latent + latents.n_told, n_out)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.network = nn.Sequential(mlp(latents.n_latent + latents.n_told, hidden), last)

    def forward(self, z: Tensor, batch: ProfileBatch) -> Tensor:
        """The outputs."""
        z = z.squeeze(-2)
        out = self.quadric(torch.cat((z, z * z), -1)) + self.network(batch.conditioned(z))
        return out.unflatten(-1, self.shape).unsqueeze(-3)

    def begin(self, loc: Tensor, scale: Tensor, shares: Tensor) -> None:
        """Start where Bayes' rule puts the cells of a mixture with these means and sds (K, d) and shares (K,)."""
        k, precision = len(shares), scale**-2
        constant = shares.log() - (loc**2 * precision / 2 + scale.log()).sum(-1)
        with torch.no_grad():
            self.quadric.weight[:k] = torch.cat((loc * precision, -precision / 2), -1)
            self.quadric.bias[:k] = constant


@dataclass(frozen=True)
class PerCluster(Guide):
    """The recipe of the paper's guide: y from the profile, and z from the profile and y, for every y."""

    hidden: Sequence[int] = (128,)
    hidden_clusters: Sequence[int] = (128,)

    def __call__(self, program: nn.Module) -> PerClusterProgram:
        """The guide of a `GMVAE(enumerated=True)`."""
        return PerClusterProgram(self, program)


class PerClusterProgram(nn.Module):
    """q(y | x, c) q(z | x, y, c); `TraceEnum_ELBO` sums over y."""

    def __init__(self, recipe: PerCluster, program: Any) -> None:
        super().__init__()
        latents: Latents = program.latents
        self.latents, n_last = latents, recipe.hidden_clusters[-1] if recipe.hidden_clusters else latents.n_seen
        self.clusters = nn.Sequential(
            mlp(latents.n_seen, recipe.hidden_clusters), nn.Linear(n_last, latents.n_clusters)
        )
        self.encoder = NormalEncoder(latents.n_seen + latents.n_clusters, latents.n_latent, recipe.hidden)

    def forward(self, batch: ProfileBatch) -> None:
        """Draw every latent site of the model, y in parallel."""
        pyro.module("clusters", self.clusters)
        pyro.module("encoder", self.encoder)
        if self.latents.sizes is not None:
            self.latents.sizes.posterior()
        logits = self.log_q(batch)
        allowed = batch.allowed(self.latents.n_clusters)
        if allowed is not None:
            logits = torch.where(allowed, logits, IMPOSSIBLE)
        with pyro.plate("cells", batch.n_cells, subsample=batch.index, dim=-2):
            # Before anybody's label: what is asked of a fit, and what labels are compared with.
            pyro.sample("log_q", dist.Delta(self.log_q(batch).unsqueeze(-2), event_dim=1).mask(False))
            y = pyro.sample("y", dist.Categorical(logits=logits.unsqueeze(-2)), infer={"enumerate": "parallel"})
            seen = batch.seen.unsqueeze(-2)
            one_hot = nn.functional.one_hot(y, self.latents.n_clusters).to(seen)
            leading = y.shape[: y.ndim - 2]
            shape = (*leading, *seen.shape[:-1])
            told = torch.cat((seen.expand(*shape, -1), one_hot.expand(*shape, -1)), -1)
            pyro.sample("z", dist.Normal(*self.encoder(told)).to_event(1))

    def log_q(self, batch: ProfileBatch) -> Tensor:
        """Log q(y | x, c), (B, K), whatever is known of y."""
        return self.clusters(batch.seen).log_softmax(-1)

    def mean_latent(self, batch: ProfileBatch) -> Tensor:
        """E[z], (B, d): the mean over y of each cluster's."""
        q = self.log_q(batch).exp()
        one_hot = torch.eye(self.latents.n_clusters, dtype=q.dtype, device=q.device)
        seen = batch.seen
        told = torch.cat((seen.expand(len(one_hot), *seen.shape), one_hot[:, None].expand(-1, len(seen), -1)), -1)
        loc, _ = self.encoder(told)
        return torch.einsum("bk,kbd->bd", q, loc)
