r"""How a cell's cluster y is inferred: summed exactly, or by a network, the probabilities of clusters integrated out.

The talk on c*GM$\Delta$VAE (Kolb 2023) gives each cell probabilities $d \sim \mathrm{Dir}(\alpha)$ of its own, with
$y \sim \mathrm{Cat}(d)$. One y says little of its d: p(y) = 1/K whatever $\alpha$ is.

| | q(y) | what stands for the terms of y and d, eqs. 15 and 16 |
|---|---|---|
| `Exact` | p(y \| z), exact | log p(y), summed out |
| `Entropy` | Cat(f(z)) | their maximum over q(d), an entropy regulariser |
| `PerCell` | Cat(f(z)) | E_q[log d_y] of q(d \| z) = Dir(g(z)), less KL(q(d) \|\| p(d)), plus the entropy of q(y) |
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.nn.functional import softplus

from pyro_velo.errors import InputError
from pyro_velo.gaussian_mixture import BoundedMixture, GaussianMixture
from pyro_velo.states import dirichlet_kl


class Assignment(ABC):
    """How q(y) is found. `heads` counts the numbers a cluster that the guide's network gives; 0: there is none."""

    heads: ClassVar[int]

    @abstractmethod
    def prior(self, mixture: GaussianMixture, outputs: Tensor, allowed: Tensor | None) -> TorchDistribution:
        """Log p(z), or a bound on it, as a distribution of z.

        Shapes: `outputs` (..., heads, K) of the network, `allowed` (..., K), where a cell's cluster is known.
        """

    @abstractmethod
    def log_q(self, mixture: GaussianMixture, z: Tensor, outputs: Tensor) -> Tensor:
        """Log q(y), (..., K), that nobody's label has been a part of."""


@dataclass(frozen=True)
class Exact(Assignment):
    r"""y summed out, $p(z) = \sum_y p(y)\,p(z \mid y)$: the tightest bound, and no network that could be wrong."""

    heads = 0

    def prior(self, mixture: GaussianMixture, outputs: Tensor, allowed: Tensor | None) -> TorchDistribution:
        """The mixture, of the clusters that are allowed."""
        if allowed is None:
            return mixture
        weights = torch.where(allowed, mixture.log_weights, -torch.inf)
        return mixture.weighted(weights)

    def log_q(self, mixture: GaussianMixture, z: Tensor, outputs: Tensor) -> Tensor:
        """Bayes' rule."""
        return mixture.log_joint(z).log_softmax(-1)


@dataclass(frozen=True)
class Entropy(Assignment):
    r"""q(y | z) = Cat(f(z)), and q(d) where it is best, $\mathrm{Dir}(\alpha + q(y))$.

    What is left of both is

    $$R_\alpha(q) = H(q) + \sum_k \log\frac{\Gamma(\alpha + q_k)}{\Gamma(\alpha)} - \log K\alpha,$$

    which is $-\log K$ for a cell that is sure of its cluster, and never above 0. A large $\alpha$ makes it the KL from
    equally likely clusters; a small one makes doubt dear.
    """

    alpha: float = 1.0
    heads = 1

    def __post_init__(self) -> None:
        """Refuse a concentration that no Dirichlet has."""
        _check(self.alpha)

    def prior(self, mixture: GaussianMixture, outputs: Tensor, allowed: Tensor | None) -> TorchDistribution:
        """The bound that q(y) gives."""
        q, entropy = _known(outputs[..., 0, :], allowed)
        return BoundedMixture(mixture, q, self.regulariser(q, entropy))

    def regulariser(self, q: Tensor, entropy: Tensor) -> Tensor:
        """R of probabilities (..., K) of that entropy (...,)."""
        k = q.shape[-1]
        ways = torch.lgamma(self.alpha + q).sum(-1) - k * math.lgamma(self.alpha)
        return entropy + ways - math.log(k * self.alpha)

    def log_q(self, mixture: GaussianMixture, z: Tensor, outputs: Tensor) -> Tensor:
        """What the network says."""
        return outputs[..., 0, :].log_softmax(-1)


@dataclass(frozen=True)
class PerCell(Assignment):
    r"""q(y | z) = Cat(f(z)) and q(d | z) = Dir(g(z)) by networks, as the talk has them (eqs. 9, 15 and 16).

    Both terms are closed forms: nothing but z and w is sampled. It is `Entropy` with a worse q(d).
    """

    alpha: float = 1.0
    heads = 2

    def __post_init__(self) -> None:
        """Refuse a concentration that no Dirichlet has."""
        _check(self.alpha)

    def prior(self, mixture: GaussianMixture, outputs: Tensor, allowed: Tensor | None) -> TorchDistribution:
        """The bound that q(y) and q(d) give."""
        q, entropy = _known(outputs[..., 0, :], allowed)
        kl, expected_log = dirichlet_kl((softplus(outputs[..., 1, :]) + 1e-3).movedim(-1, 0), self.alpha)
        rest = (q * expected_log.movedim(0, -1)).sum(-1) + entropy - kl
        return BoundedMixture(mixture, q, rest)

    def log_q(self, mixture: GaussianMixture, z: Tensor, outputs: Tensor) -> Tensor:
        """What the network says."""
        return outputs[..., 0, :].log_softmax(-1)


ASSIGNMENTS: dict[str, type[Assignment]] = {"exact": Exact, "entropy": Entropy, "per-cell": PerCell}
"""Every one by name; the tests run over this table."""


def _check(alpha: float) -> None:
    if not alpha > 0:
        raise InputError(f"Expected a Dirichlet concentration alpha > 0; got {alpha}. 1 is flat.")


def _known(logits: Tensor, allowed: Tensor | None) -> tuple[Tensor, Tensor]:
    """What a network says, q (..., K), and its entropy (...,): none where a single cluster is allowed."""
    log_q = logits.log_softmax(-1)
    # Not through log(q), whose gradient is infinite where a probability underflows.
    q = log_q.exp()
    entropy = -(q * log_q).sum(-1)
    if allowed is None:
        return q, entropy
    certain = allowed.sum(-1, keepdim=True) == 1
    return torch.where(certain, allowed.to(q), q), torch.where(certain.squeeze(-1), 0.0, entropy)
