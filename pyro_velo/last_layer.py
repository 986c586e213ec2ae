r"""What the data leave open of a decoder's last layer: its weights' posterior, where all else of a fit is a point.

A gene's output is linear in weights of its own, $o_{ng} = \phi_n^\top w_g$, with $\phi_n = (h(z_n, c_n), 1, c_n)$ of
the last hidden layer h. Around the weights of the fit,

$$w_g \sim \mathcal N\Bigl(\hat w_g, \bigl(I + \textstyle\sum_n i_{ng}\,\phi_n\phi_n^\top\bigr)^{-1}\Bigr), \qquad
i_{ng} = E_{x \sim p(x \mid o_{ng})}\left(\partial_o \log p(x \mid o_{ng})\right)^2,$$

the Laplace approximation of a last layer, with Fisher's information (Kristiadi et al. 2020; Daxberger et al. 2021). x
are drawn, and not those that were measured: squared scores of these are no information (Kunstner et al. 2019). h is
scaled to a mean square of 1 over cells, so that a priori what it does to an output has an sd of 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import pyro
import torch
from pyro import poutine
from torch import Tensor

from pyro_velo.disk_profiles import AnyProfiles
from pyro_velo.models.decoding import Decoding
from pyro_velo.profiles import ProfileBatch
from pyro_velo.train import Fitted, split

FEATURES = 50
"""Principal directions of h that are kept: a latent space has fewer dimensions, but h bends it."""
DRAWS = 8
"""Of x, by which a cell's information is taken."""
CELLS = 10_000
"""So many cells, at random, stand for all."""
CELLS_GENES_AT_ONCE = 512 * 1024


@dataclass(frozen=True)
class LastLayer:
    """The posterior of the last layer's weights.

    `axes` (H, P) are the directions of h that count; `root` (G, Q, Q) are the Cholesky factors of the precisions of
    each gene's weights, with Q = P + 1 + covariates.
    """

    axes: Tensor
    root: Tensor

    @classmethod
    def of(cls, fitted: Fitted, cells: AnyProfiles, *, seed: int = 0) -> LastLayer:
        """What `cells`, on which the fit was trained but for those held out, say of each gene's weights."""
        settings = fitted.training.settings
        # In random order.
        trained = split(len(cells), settings.held_out, settings.seed)[0].to(cells.device)
        index = trained[:CELLS]
        size = max(1, CELLS_GENES_AT_ONCE // cells.n_genes)
        decoding: Decoding = fitted.program.decoding
        noise = torch.random.fork_rng([cells.device] if cells.device.type == "cuda" else [])
        with fitted.parameters(), pyro.validation_enabled(False), noise:
            torch.manual_seed(seed)
            drawn = [(batch, _latent(fitted, batch)) for batch in cells.batches(index, size)]
            axes = _axes(torch.cat([_hidden(decoding, z, batch) for batch, z in drawn]))
            found = torch.zeros(())
            for batch, z in drawn:
                phi = _features(decoding, axes, z, batch)
                pairs = (phi[:, :, None] * phi[:, None]).flatten(1)
                found = found + (_information(decoding, z, batch).T @ pairs).double()
        q = phi.shape[1]
        every = found.unflatten(1, (q, q)) * (len(trained) / len(index))
        precision = every + torch.eye(q, dtype=torch.float64, device=cells.device)
        return cls(axes, torch.linalg.cholesky(precision).to(axes))

    def draw(self, draws: int) -> Tensor:
        """How far the weights are from those of the fit, (draws, Q, G)."""
        n_genes, q, _ = self.root.shape
        noise = torch.randn(n_genes, q, draws).to(self.root)
        return torch.linalg.solve_triangular(self.root.mT, noise, upper=True).permute(2, 1, 0)

    def outputs(self, decoding: Decoding, z: Tensor, batch: ProfileBatch, change: Tensor) -> Tensor:
        """The outputs (B, G) that stand for the mean, of z (B, d), with weights that are `change` (Q, G) away."""
        return decoding.outputs(z, batch)[0] + _features(decoding, self.axes, z, batch) @ change


@torch.no_grad()
def _latent(fitted: Fitted, batch: ProfileBatch) -> Tensor:
    """A draw of z, (B, d)."""
    return poutine.trace(fitted.guide).get_trace(batch).nodes["z"]["value"].squeeze(-2)


@torch.no_grad()
def _hidden(decoding: Decoding, z: Tensor, batch: ProfileBatch) -> Tensor:
    """The last hidden layer, (B, H)."""
    return decoding.decoder.trunk(batch.conditioned(z) if decoding.interactions else z)


def _axes(hidden: Tensor) -> Tensor:
    """The directions (H, P) in which h (N, H) is largest, scaled to a mean square of 1 in all."""
    values, vectors = torch.linalg.eigh((hidden.T.double() @ hidden.double()) / len(hidden))
    return (vectors[:, -FEATURES:] / values.sum().sqrt()).to(hidden)


def _features(decoding: Decoding, axes: Tensor, z: Tensor, batch: ProfileBatch) -> Tensor:
    """phi, (B, Q)."""
    h = _hidden(decoding, z, batch) @ axes
    return batch.conditioned(torch.cat((h, torch.ones_like(h[:, :1])), 1))


def _information(decoding: Decoding, z: Tensor, batch: ProfileBatch) -> Tensor:
    """i, (B, G), by draws of x."""
    with torch.no_grad():
        outputs = decoding.outputs(z, batch)[:, None].expand(-1, DRAWS, -1, -1)
        x = decoding.emission(outputs, batch).sample()
    output = outputs[0].clone().requires_grad_()
    log_p = decoding.emission(torch.cat((output[None], outputs[1:])), batch).log_prob(x).sum()
    (score,) = torch.autograd.grad(log_p, output)
    return score.square().mean(0)
