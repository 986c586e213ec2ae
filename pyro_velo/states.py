r"""The four kinetic states of a gene in a cell, and the families of their posterior q(pi | z).

$\pi_{ng} \sim \mathrm{Dirichlet}(c)$ over induction, induction steady state, repression, repression steady state. A
family says what the model draws (`prior`), what the guide draws from the network's outputs (`posterior`), and what both
mean as log-weights of the mixture (`log_weights`). A new family is one class with these three methods.

| family | site `pi` | weights | bound on log p(u, s) |
|---|---|---|---|
| `Dirichlet` | probabilities, sampled | sum to one | the ELBO |
| `Collapsed` | concentrations, a point | sum to less | below the one of `Dirichlet`, without its variance |
| `LogisticNormal` | logits, sampled | sum to one | the ELBO, under a prior of another shape |
| `Hard` | logits, a point | sum to less | one state explains a gene in a cell, the others nothing |
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor
from torch.autograd.function import once_differentiable

from pyro_velo.compiled import fusible
from pyro_velo.errors import InputError
from pyro_velo.special import digamma, log_gamma_and_digamma, softplus, trigamma

STATES = ("induction", "induction steady state", "repression", "repression steady state")


class StateFamily(ABC):
    """How the probabilities of the states are drawn in the model and in the guide, at the site `pi` (B, G, 4)."""

    heads: int = len(STATES)
    """How many numbers per cell and gene the guide's network gives to `posterior`."""

    hard: bool = False
    """Where True, the mixture takes the largest of its terms, log w_k + log p(u, s | k), and not their log-sum-exp."""

    @abstractmethod
    def prior(self, concentration: float, like: Tensor) -> Tensor:
        """Draw `pi` in the model, inside the plates of `like` (B, G); return log-weights (4, B, G)."""

    @abstractmethod
    def posterior(self, outputs: Tensor) -> None:
        """Draw `pi` in the guide from the network's outputs (heads, B, G)."""

    certain: bool = False
    """Whether `posterior` draws nothing: the network's outputs tell the weights, which `weights_of` gives."""

    def weights_of(self, outputs: Tensor) -> tuple[Tensor, ...]:
        """Where `certain`: each state's `expected_weights` (B, G), from the network's outputs (heads, B, G)."""
        raise NotImplementedError(f"{type(self).__name__} draws its weights.")

    @abstractmethod
    def log_weights(self, pi: Tensor) -> Tensor:
        """The mixture's log-weights (4, B, G) that a value of the site stands for."""

    def expected_weights(self, pi: Tensor) -> Tensor:
        """The log-probabilities (4, B, G) of states, as a value of the site says before the molecules are looked at.

        Where the mixture is a bound its weights are sharper than that.
        """
        return self.log_weights(pi)


def concentrations(outputs: Tensor) -> Tensor:
    """Concentrations (B, G, 4) from outputs (4, B, G), above the 1e-3 below which float32 draws become corners."""
    # Not moved where it is compiled: gradients would be copied to the order of the moved axes.
    return _positive(outputs).movedim(0, -1)


@fusible
def _positive(outputs: Tensor) -> Tensor:
    return softplus(outputs) + 1e-3


@dataclass(frozen=True)
class Dirichlet(StateFamily):
    """q(pi | z) = Dirichlet, sampled with pathwise gradients (Gayoso et al. 2023; seed 000)."""

    def prior(self, concentration: float, like: Tensor) -> Tensor:
        """Sample pi; its logarithm, states leading."""
        start = like.new_full((len(STATES),), concentration)
        return self.log_weights(pyro.sample("pi", dist.Dirichlet(start)))

    def posterior(self, outputs: Tensor) -> None:
        """Sample pi from Dirichlet(concentrations)."""
        pyro.sample("pi", dist.Dirichlet(concentrations(outputs)))

    def log_weights(self, pi: Tensor) -> Tensor:
        """Log pi, kept finite where a draw is in a corner."""
        return pi.clamp_min(torch.finfo(pi.dtype).tiny).log().movedim(-1, 0)


class Concentrations(dist.Delta):
    """A point that is known to be positive, so that a guide of the user's own keeps it so."""

    support = constraints.independent(constraints.positive, 1)


@dataclass(frozen=True)
class Collapsed(StateFamily):
    r"""q(pi | z) = Dirichlet, with pi integrated into a bound instead of sampled.

    $$\log p(u, s) \ge \log\sum_k e^{E_q[\log\pi_k]} p(u, s \mid k) - \mathrm{KL}(q(\pi)\,\|\,p(\pi))$$

    At the site `pi` stands the concentration of q, and the KL is a site of its own, `pi_kl`: no gamma draws, and less
    variance than the sampled family. Without a guide q is the prior, and the mixture has the prior's equal weights.
    A guide of your own wants a point at `pi` (AutoDelta): one that spreads it adds an entropy, and no bound is left.
    """

    def prior(self, concentration: float, like: Tensor) -> Tensor:
        """E_q[log pi]; adds -KL(q || p) to the bound."""
        start = like.new_full((len(STATES),), concentration)
        q = pyro.sample("pi", Concentrations(start, event_dim=1).mask(False))
        kl, expected_log = _dirichlet_kl_of_genes(q.movedim(-1, 0), concentration)
        pyro.sample("pi_kl", dist.Unit(-kl), infer={"kl": True}, obs=like.new_empty(*kl.shape, 0))
        return expected_log

    def posterior(self, outputs: Tensor) -> None:
        """Hand q's concentrations to the model: a point, without a density of its own."""
        pyro.sample("pi", Concentrations(concentrations(outputs), event_dim=1).mask(False))

    certain = True

    def weights_of(self, outputs: Tensor) -> tuple[Tensor, ...]:
        """Log E_q[pi_k], state by state, which is compiled into a single pass."""
        q = [_positive(each) for each in outputs]
        of_total = _total(q).log()
        return tuple(each.log() - of_total for each in q)

    def log_weights(self, pi: Tensor) -> Tensor:
        """E_q[log pi_k] = digamma(q_k) - digamma(sum of q)."""
        q = pi.movedim(-1, 0)
        return digamma(q) - digamma(q.sum(0))

    def expected_weights(self, pi: Tensor) -> Tensor:
        """Log E_q[pi_k]: a state that one cell is in takes nearly all of e^{E_q[log pi]}, and not of this."""
        q = pi.movedim(-1, 0)
        return q.log() - q.sum(0).log()


def dirichlet_kl(q: Tensor, concentration: float) -> tuple[Tensor, Tensor]:
    """KL(Dirichlet(q) || the symmetric one) over the leading axis, (K, ...) to (...); and E_q[log pi], (K, ...)."""
    return _DirichletKL.apply(q, concentration)


_dirichlet_kl_of_genes = fusible(dirichlet_kl)


class _DirichletKL(torch.autograd.Function):
    # Component by component: one fits into the processor's cache where all of them do not.
    @staticmethod
    def forward(ctx: Any, q: Tensor, concentration: float) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(q)
        ctx.concentration = concentration
        k, parts = len(q), q.unbind(0)
        log_gamma_total, psi_total = log_gamma_and_digamma(_total(parts))
        log_gammas, psis = zip(*map(log_gamma_and_digamma, parts), strict=True)
        expected_log = [psi - psi_total for psi in psis]
        prior_norm = math.lgamma(k * concentration) - k * math.lgamma(concentration)
        gaps = [(part - concentration) * each for part, each in zip(parts, expected_log, strict=True)]
        return log_gamma_total - _total(log_gammas) - prior_norm + _total(gaps), torch.stack(expected_log)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (q,), (by_kl, by_log) = ctx.saved_tensors, grads
        parts = q.unbind(0)
        # E[log pi_k] has the slopes psi'(q_k) - psi'(sum of q), and the KL those times q - c, summed.
        pulls = [torch.addcmul(by, by_kl, part - ctx.concentration) for by, part in zip(by_log, parts, strict=True)]
        of_total = _total(pulls) * trigamma(_total(parts))
        return torch.stack([pull * trigamma(part) - of_total for pull, part in zip(pulls, parts, strict=True)]), None


def _total(parts: Sequence[Tensor]) -> Tensor:
    return reduce(torch.add, parts)


SMALLEST_OUTPUT = -10.0
"""The network's output for the smallest sd of a logit, 5e-5: far under any that matters, and above zero in float32."""


@dataclass(frozen=True)
class LogisticNormal(StateFamily):
    r"""pi = softmax(logits), q(logits | z) Normal: sampled, without gamma functions.

    The prior is Normal(0, sd) for each of the four logits. Its sd is `scale`, or by default the one at which the
    log-ratios of two states spread as the Dirichlet's do:
    $\mathrm{Var}(\log\pi_i - \log\pi_j) = 2\,\mathrm{sd}^2 = 2\,\psi'(c)$. States are as likely as in the Dirichlet
    and log-ratios have its mean and variance; their tails are lighter. The sum of the logits says nothing of pi: there
    q can be the prior, at no cost.

    Reference: Aitchison and Shen 1980, Logistic-normal distributions.

    >>> LogisticNormal().sd(concentration=0.25), LogisticNormal(scale=2.0).sd(concentration=0.25)
    (4.147, 2.0)
    """

    scale: float | None = None
    heads = 2 * len(STATES)

    def __post_init__(self) -> None:
        """Refuse a scale that no Normal has."""
        if self.scale is not None and not 0 < self.scale < math.inf:
            raise InputError(
                f"Expected the logits' sd, scale, to be a number > 0; got {self.scale!r}. "
                "Leave it out for the one that matches the Dirichlet."
            )

    def sd(self, concentration: float) -> float:
        """The prior's sd of a logit."""
        if self.scale is not None:
            return self.scale
        return math.sqrt(torch.special.polygamma(1, torch.tensor(concentration, dtype=torch.float64)).item())

    def prior(self, concentration: float, like: Tensor) -> Tensor:
        """Sample the logits; log pi, states leading."""
        mean = like.new_zeros(len(STATES))
        return self.log_weights(pyro.sample("pi", dist.Normal(mean, self.sd(concentration)).to_event(1)))

    def posterior(self, outputs: Tensor) -> None:
        """Sample the logits from Normal, four outputs their means, four their sds."""
        mean, sd = outputs.movedim(0, -1).split(len(STATES), -1)
        pyro.sample("pi", dist.Normal(mean, softplus(sd.clamp_min(SMALLEST_OUTPUT))).to_event(1))

    def log_weights(self, pi: Tensor) -> Tensor:
        """Log softmax of the logits."""
        return pi.log_softmax(-1).movedim(-1, 0)


@dataclass(frozen=True)
class Hard(StateFamily):
    r"""Every gene is in one state in every cell: the sum over states becomes a maximum. An ablation.

    $$\log p(u, s) \ge \max_k \log\tfrac14 w_k\, p(u, s \mid k), \qquad w = \mathrm{softmax}(\mathrm{logits}(z))$$

    This is a bound of the same evidence as the other families', so that they can be compared: q(k) is a point at the
    maximum, where its KL from equally likely states is log 4, and w_k is at most one. The weights have no prior, and
    what they cost is gone once z alone tells the states apart. Without a guide all states have one weight. A guide of
    your own wants a point at `pi`, as in `Collapsed`.

    Reference: Celeux and Govaert 1992 (the classification EM algorithm).
    """

    hard = True
    certain = True

    def prior(self, concentration: float, like: Tensor) -> Tensor:
        """The guide's weights, or equal ones; the concentration is not used."""
        logits = like.new_zeros(len(STATES))
        return self.log_weights(pyro.sample("pi", dist.Delta(logits, event_dim=1).mask(False)))

    def posterior(self, outputs: Tensor) -> None:
        """Hand the logits to the model: a point, without a density of its own."""
        pyro.sample("pi", dist.Delta(outputs.movedim(0, -1), event_dim=1).mask(False))

    def weights_of(self, outputs: Tensor) -> tuple[Tensor, ...]:
        """Log softmax of the outputs, less log 4."""
        return tuple(outputs.log_softmax(0) - math.log(len(STATES)))

    def log_weights(self, pi: Tensor) -> Tensor:
        """Log softmax of the logits, less log 4."""
        return pi.log_softmax(-1).movedim(-1, 0) - math.log(len(STATES))


STATE_FAMILIES: dict[str, type[StateFamily]] = {
    "dirichlet": Dirichlet,
    "collapsed": Collapsed,
    "logistic-normal": LogisticNormal,
    "hard": Hard,
}
"""What the command line calls them."""
