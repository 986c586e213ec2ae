r"""A mixture of Gaussians as the prior of a latent vector, and the bounds on it by which its component is inferred."""

from __future__ import annotations

import math
from typing import ClassVar

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution, constraints
from torch import Tensor


class GaussianMixture(TorchDistribution):
    r"""$p(z) = \sum_k \pi_k \mathcal N(z \mid \mu_k, \Sigma_k)$, k summed exactly.

    `log_weights` (..., K), `loc` and `scale` (..., K, d) broadcast; the event is z (d,). Weights need not sum to one:
    one of -inf takes its component away, as where a cell's cluster is known. With `lower` (K, d, d), of which what
    stands below the diagonal counts, $(I + L_k)(z - \mu_k)/\sigma_k$ is standard Normal; without, $\Sigma_k$ is
    diagonal.
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}
    support = constraints.real_vector

    def __init__(
        self,
        log_weights: Tensor,
        loc: Tensor,
        scale: Tensor,
        lower: Tensor | None = None,
        validate_args: bool | None = None,
    ) -> None:
        self.log_weights, self.loc, self.scale, self.lower = log_weights, loc, scale, lower
        batch = torch.broadcast_shapes(log_weights.shape[:-1], loc.shape[:-2], scale.shape[:-2])
        super().__init__(batch, loc.shape[-1:], validate_args=validate_args)

    def expand(self, batch_shape: torch.Size, _instance: None = None) -> GaussianMixture:
        """The same, broadcast to `batch_shape`."""
        weights = self.log_weights.expand(*batch_shape, self.log_weights.shape[-1])
        return GaussianMixture(weights, self.loc, self.scale, self.lower, validate_args=False)

    def weighted(self, log_weights: Tensor) -> GaussianMixture:
        """The same components with other weights (..., K)."""
        return GaussianMixture(log_weights, self.loc, self.scale, self.lower)

    def log_components(self, z: Tensor) -> Tensor:
        r"""$\log\mathcal N(z \mid \mu_k, \Sigma_k)$ of each component, (..., K), of z (..., d)."""
        d = (z.unsqueeze(-2) - self.loc) / self.scale
        if self.lower is not None:
            # The determinant of I + L is 1.
            d = d + torch.einsum("kij,...kj->...ki", self.lower.tril(-1), d)
        return -(d * d + math.log(2 * math.pi)).sum(-1) / 2 - self.scale.log().sum(-1)

    def log_joint(self, z: Tensor) -> Tensor:
        r"""$\log\pi_k + \log\mathcal N(z \mid \mu_k, \Sigma_k)$, (..., K)."""
        return self.log_weights + self.log_components(z)

    def component(self, k: Tensor) -> TorchDistribution:
        """p(z | k) of numbers k (...,), where components are the same for all: `loc` and `scale` (K, d)."""
        if self.lower is None:
            return dist.Normal(self.loc[k], self.scale[k]).to_event(1)
        unit = torch.eye(self.loc.shape[-1]).to(self.loc)
        root = torch.linalg.solve_triangular(unit + self.lower.tril(-1), unit, upper=False, unitriangular=True)
        return dist.MultivariateNormal(self.loc[k], scale_tril=(self.scale.unsqueeze(-1) * root)[k])

    def log_prob(self, z: Tensor) -> Tensor:
        """Log p(z), (...,)."""
        return self.log_joint(z).logsumexp(-1)

    def sample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
        """Draws of shape `sample_shape + batch_shape + (d,)`."""
        with torch.no_grad():
            shape = torch.Size(sample_shape) + self.batch_shape
            k = dist.Categorical(logits=self.log_weights.expand(*shape, -1)).sample()[..., None, None]
            pick = k.expand(*shape, 1, self.loc.shape[-1])
            loc, scale = (each.expand(*shape, *each.shape[-2:]).gather(-2, pick) for each in (self.loc, self.scale))
            noise = torch.randn_like(loc)
            if self.lower is not None:
                factor = (torch.eye(loc.shape[-1]).to(loc) + self.lower.tril(-1))[k.squeeze(-1).squeeze(-1)]
                noise = torch.linalg.solve_triangular(factor, noise.mT, upper=False, unitriangular=True).mT
            return (loc + scale * noise).squeeze(-2)


class BoundedMixture(TorchDistribution):
    r"""A mixture whose component was inferred by another: $\sum_k q_k \log\mathcal N(z \mid \mu_k, \sigma_k) + R$.

    With `q` (..., K) and R = -KL(q || weights) this is a bound on the mixture's log p(z) (Jensen), which is reached
    where q is the posterior of k. `rest` (...,) is R, whatever the weights' own posterior makes of it.
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}
    support = constraints.real_vector

    def __init__(self, mixture: GaussianMixture, q: Tensor, rest: Tensor, validate_args: bool | None = None) -> None:
        self.mixture, self.q, self.rest = mixture, q, rest
        batch = torch.broadcast_shapes(mixture.batch_shape, q.shape[:-1], rest.shape)
        super().__init__(batch, mixture.event_shape, validate_args=validate_args)

    def expand(self, batch_shape: torch.Size, _instance: None = None) -> BoundedMixture:
        """The same, broadcast to `batch_shape`."""
        return BoundedMixture(self.mixture.expand(batch_shape), self.q, self.rest, validate_args=False)

    def log_prob(self, z: Tensor) -> Tensor:
        """The bound on log p(z), (...,)."""
        return (self.q * self.mixture.log_components(z)).sum(-1) + self.rest

    def sample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
        """The mixture's own draws: q is no part of the generative story."""
        return self.mixture.sample(sample_shape)
