r"""The four kinetic states of a gene in a cell, and the families of their posterior q(pi | z).

$\pi_{ng} \sim \mathrm{Dirichlet}(c)$ over induction, induction steady state, repression, repression steady state. A
family says what the model draws (`prior`), what the guide draws from the network's outputs (`posterior`), and what both
mean as log-weights of the mixture (`log_weights`). A new family is one class with these three methods.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor
from torch.nn.functional import softplus

from pyro_velo.special import digamma, log_gamma_and_digamma

STATES = ("induction", "induction steady state", "repression", "repression steady state")


class StateFamily(ABC):
    """How the probabilities of the states are drawn in the model and in the guide, at the site `pi` (B, G, 4)."""

    @abstractmethod
    def prior(self, concentration: float, like: Tensor) -> Tensor:
        """Draw `pi` in the model, inside the plates of `like` (B, G); return log-weights (4, B, G)."""

    @abstractmethod
    def posterior(self, outputs: Tensor) -> None:
        """Draw `pi` in the guide from the network's outputs (4, B, G)."""

    @abstractmethod
    def log_weights(self, pi: Tensor) -> Tensor:
        """The mixture's log-weights (4, B, G) that a value of the site stands for."""


def concentrations(outputs: Tensor) -> Tensor:
    """Concentrations (B, G, 4) from outputs (4, B, G), above the 1e-3 below which float32 draws become corners."""
    return (softplus(outputs) + 1e-3).movedim(0, -1)


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
        kl, expected_log = dirichlet_kl(q.movedim(-1, 0), concentration)
        pyro.sample("pi_kl", dist.Unit(-kl), infer={"kl": True}, obs=like.new_empty(*kl.shape, 0))
        return expected_log

    def posterior(self, outputs: Tensor) -> None:
        """Hand q's concentrations to the model: a point, without a density of its own."""
        pyro.sample("pi", Concentrations(concentrations(outputs), event_dim=1).mask(False))

    def log_weights(self, pi: Tensor) -> Tensor:
        """E_q[log pi_k] = digamma(q_k) - digamma(sum of q)."""
        q = pi.movedim(-1, 0)
        return digamma(q) - digamma(q.sum(0))


def dirichlet_kl(q: Tensor, concentration: float) -> tuple[Tensor, Tensor]:
    """KL(Dirichlet(q) || the symmetric one) over the leading axis, (K, ...) to (...); and E_q[log pi], (K, ...)."""
    k, total = len(q), q.sum(0)
    log_gamma, psi = log_gamma_and_digamma(q)
    log_gamma_total, psi_total = log_gamma_and_digamma(total)
    expected_log = psi - psi_total
    prior_norm = math.lgamma(k * concentration) - k * math.lgamma(concentration)
    kl = log_gamma_total - log_gamma.sum(0) - prior_norm + ((q - concentration) * expected_log).sum(0)
    return kl, expected_log


STATE_FAMILIES: dict[str, type[StateFamily]] = {"dirichlet": Dirichlet, "collapsed": Collapsed}
"""What the command line calls them."""
