"""The networks that models and guides are made of."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pyro_velo.compiled import compiling


def mlp(n_in: int, hidden: Sequence[int]) -> nn.Sequential:
    """Linear -> LayerNorm -> SiLU for each size in `hidden`: (..., n_in) to (..., hidden[-1]).

    LayerNorm, not batch norm: what a cell is told must not depend on which cells happen to share its minibatch.
    """
    layers: list[nn.Module] = []
    for n_out in hidden:
        layers += [nn.Linear(n_in, n_out), nn.LayerNorm(n_out), nn.SiLU()]
        n_in = n_out
    return nn.Sequential(*layers)


class NormalEncoder(nn.Module):
    """What is seen of a cell to the mean and sd of its latent vector: (..., n_in) to two times (..., d)."""

    def __init__(self, n_in: int, n_latent: int, hidden: Sequence[int]) -> None:
        super().__init__()
        self.trunk = mlp(n_in, hidden)
        n_last = hidden[-1] if hidden else n_in
        self.loc = nn.Linear(n_last, n_latent)
        self.log_scale = nn.Linear(n_last, n_latent)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and sd; the sd starts near exp(-1) and is bounded below by exp(-10), far under any that is reached."""
        h = self.trunk(x)
        return self.loc(h), torch.exp((self.log_scale(h) - 1).clamp(-10, 3))


class Decoder(nn.Module):
    """A latent vector to `heads` numbers a gene: (B, d) to (heads, B, G), genes contiguous.

    Without hidden layers it is linear, and `weight` (heads, d, G) holds each gene's loadings.
    """

    def __init__(self, n_latent: int, n_genes: int, hidden: Sequence[int], heads: int = 1) -> None:
        super().__init__()
        self.trunk = mlp(n_latent, hidden)
        n_last = hidden[-1] if hidden else n_latent
        bound = n_last**-0.5
        self.weight = nn.Parameter(torch.empty(heads, n_last, n_genes).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(heads, 1, n_genes).uniform_(-bound, bound))

    def forward(self, z: Tensor) -> Tensor:
        """Unconstrained outputs, one slice a head."""
        h = self.trunk(z)
        # One product for all heads: stacking the results of several would copy the largest tensor of the program.
        h = h.expand(len(self.weight), *h.shape)
        if compiling():
            # The bias is then added where the product is used, in the same pass.
            return torch.bmm(h, self.weight) + self.bias
        return torch.baddbmm(self.bias, h, self.weight)
