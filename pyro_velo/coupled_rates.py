"""The guide of rates that hang together with a clock: the sites of genes, their joint Normal, and how cells follow it.

`coupling` has the mathematics, and finds the numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor

from pyro_velo.batch import Batch
from pyro_velo.guides import WARP
from pyro_velo.rates import Marginal

PRIOR_DRAWS, FLATTEST = 500, 10.0
"""Draws that a prior's sd on the unconstrained scale is read off, and the largest that counts."""


def bends(z: Tensor, n: int) -> Tensor:
    r"""Bumps along $\Phi(z)$, (B,) to (B, n), which add up to one: a weighted sum of them is smooth in z."""
    place = torch.special.ndtr(z)[:, None]
    centres = torch.linspace(0, 1, n, dtype=z.dtype, device=z.device)
    bumps = torch.exp(-(((place - centres) * (n - 1)) ** 2) / 2)
    return bumps / bumps.sum(1, keepdim=True)


def bent(z: Tensor, w: Tensor, n: int) -> Tensor:
    """How far w (n M,) moves each of n coordinates of cells whose clocks stand at z (B,): (B, n)."""
    return bends(z, len(w) // n) @ w.view(n, -1).mT


class Covariance(NamedTuple):
    """`root` (G, K, K) is L, `response` (G, K, M) R, `warp_root` (M, M) a root of $S^{-1}$."""

    root: Tensor
    response: Tensor
    warp_root: Tensor

    @classmethod
    def of(cls, rates: Tensor, cross: Tensor, warps: Tensor) -> Covariance:
        """That of a Normal with this information: A (G, K, K), C (G, K, M), and (M, M) of the warps by themselves."""
        root = _root_of_inverse(rates)
        half = root.mT @ cross
        left = warps - torch.einsum("gkm,gkl->ml", half, half)
        return cls(root, root @ half, _root_of_inverse((left + left.mT) / 2))

    def log_size(self) -> float:
        """Half the log-determinant, summed over genes and warps."""
        roots = (self.root.diagonal(dim1=-2, dim2=-1), self.warp_root.diagonal())
        return float(sum(each.log().sum() for each in roots))

    def draw(self) -> tuple[Tensor, Tensor]:
        """Deviations of the rates from their means, (G, K), and w (M,)."""
        w = self.warp_root @ torch.randn(len(self.warp_root)).to(self.root)
        noise = torch.randn(self.root.shape[:2]).to(self.root)
        return torch.einsum("gij,gj->gi", self.root, noise) - self.response @ w, w


def _root_of_inverse(matrix: Tensor) -> Tensor:
    """The Cholesky root of the inverse of positive definite matrices (..., K, K)."""
    return torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(matrix)))


class Genes:
    """The gene-level sites of a program: those of one number a gene are coupled, others stay as the guide has them."""

    def __init__(self, program: Any, marginals: Mapping[str, Marginal]) -> None:
        self.coupled = {name: each for name, each in marginals.items() if each.loc.ndim == 1}
        self.others = {name: each for name, each in marginals.items() if each.loc.ndim > 1}
        with pyro.plate("genes", program.n_genes, dim=-1):
            trace = poutine.trace(program.sample_genes).get_trace()
        self.priors = {name: trace.nodes[name]["fn"] for name in self.coupled}
        self.precision = torch.diag_embed(torch.stack([self._precision(name) for name in self.coupled], -1)).double()

    def start(self) -> Tensor:
        """(G, K) float64, where the guide has them."""
        return torch.stack([each.loc for each in self.coupled.values()], -1).double()

    def values(self, x: Tensor) -> dict[str, Tensor]:
        """Each site's values at x (..., G, K), the others at their medians."""
        found = {name: each.transform(x[..., k]) for k, (name, each) in enumerate(self.coupled.items())}
        return found | {name: each.transform(each.loc) for name, each in self.others.items()}

    def prior(self, x: Tensor) -> tuple[float, Tensor]:
        """The log-density at x (G, K), and its gradient."""
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            log_density = self._log_density(x)
            (gradient,) = torch.autograd.grad(log_density, x)
        return float(log_density.detach()), gradient.double()

    def _precision(self, name: str) -> Tensor:
        """That of a Normal with the prior's variance, (G,): curvature alone has no bound where a prior is flat."""
        prior, each = self.priors[name], self.coupled[name]
        try:
            drawn = each.transform.inv(prior.expand(each.loc.shape).sample(torch.Size([PRIOR_DRAWS])))
        except NotImplementedError:
            return torch.full_like(each.loc, FLATTEST**-2)
        return 1 / drawn.var(0).clamp_max(FLATTEST**2)

    def _log_density(self, x: Tensor) -> Tensor:
        values, total = self.values(x), x.new_zeros(())
        for k, (name, each) in enumerate(self.coupled.items()):
            total = total + self.priors[name].log_prob(values[name]).sum()
            total = total + each.transform.log_abs_det_jacobian(x[..., k], values[name]).sum()
        return total


class CoupledRates:
    """Draws the gene-level sites, and w with them; called with a batch, as an autoguide is.

    `shared` are the latent dimensions that w bends: the clock, and the library size where that is inferred.
    """

    def __init__(
        self, genes: Genes, loc: Tensor, covariance: Covariance, dtype: torch.dtype, shared: Sequence[int]
    ) -> None:
        self.genes, self.shared = genes, shared
        self.loc = loc.to(dtype)
        self.covariance = Covariance(*(each.to(dtype) for each in covariance))

    def __call__(self, batch: Batch) -> dict[str, Tensor]:
        """Each site's draw, by name."""
        root, response, warp_root = self.covariance
        # No site of the model: it only says how the others hang together, and has no density of its own.
        unit = dist.Normal(self.loc.new_zeros(len(warp_root)), 1.0).to_event(1).mask(False)
        drawn = {WARP: pyro.sample(WARP, unit, infer={"is_auxiliary": True})}
        loc = self.loc - response @ (warp_root @ drawn[WARP])
        with pyro.plate("genes", len(loc), dim=-1):
            x = pyro.sample(
                "genes_unconstrained", dist.MultivariateNormal(loc, scale_tril=root), infer={"is_auxiliary": True}
            )
            for k, (name, each) in enumerate(self.genes.coupled.items()):
                value = each.transform(x[..., k])
                log_density = -each.transform.log_abs_det_jacobian(x[..., k], value)
                drawn[name] = pyro.sample(name, dist.Delta(value, log_density))
            for name, each in self.genes.others.items():
                # A transform may take a row of numbers for one event, or each number for itself.
                normal = dist.TransformedDistribution(dist.Normal(each.loc, each.sd), [each.transform])
                drawn[name] = pyro.sample(name, normal.to_event(1 - len(normal.event_shape)))
        return drawn

    def moved(self, latent: dist.Distribution, drawn: Mapping[str, Tensor]) -> dist.Distribution:
        """q(z) of a batch's cells, moved with the bends that were drawn."""
        loc = latent.mean.clone()
        loc[:, 0, self.shared] += bent(loc[:, 0, 0], self.covariance.warp_root @ drawn[WARP], len(self.shared))
        if isinstance(latent, dist.MultivariateNormal):
            return dist.MultivariateNormal(loc, scale_tril=latent.scale_tril)
        return dist.Normal(loc, latent.stddev).to_event(1)
