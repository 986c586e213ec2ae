r"""p(y): how large the clusters of a mixture are; uniform, given, learned, or with a Dirichlet prior of their own."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from pyro_velo.errors import InputError


class SizesProgram(nn.Module, ABC):
    """The shares of the clusters, as both programs need them."""

    @abstractmethod
    def prior(self) -> Tensor:
        """Log p(y), (K,); makes the model's site where there is one."""

    @abstractmethod
    def posterior(self) -> None:
        """Make the guide's site where there is one."""

    @abstractmethod
    def begin(self, shares: Tensor) -> None:
        """Start from these shares (K,), where there is something to start."""


class Sizes(ABC):
    """How the clusters' sizes are known."""

    @abstractmethod
    def build(self, n_clusters: int) -> SizesProgram:
        """The program for so many clusters."""


@dataclass(frozen=True)
class Uniform(Sizes):
    """All clusters are equally likely, 1/K."""

    def build(self, n_clusters: int) -> SizesProgram:
        """The program for so many clusters."""
        return _Fixed(torch.full((n_clusters,), 1 / n_clusters))


@dataclass(frozen=True)
class Given(Sizes):
    """The clusters' shares are known; they sum to one.

    Raises InputError for shares that no clusters have, or of another number of clusters.
    """

    shares: tuple[float, ...]

    def __post_init__(self) -> None:
        """Refuse what is no distribution."""
        if not all(share > 0 for share in self.shares) or not math.isclose(sum(self.shares), 1, abs_tol=1e-6):
            raise InputError(f"Expected shares > 0 that sum to 1; got {self.shares}. Divide them by their sum.")

    def build(self, n_clusters: int) -> SizesProgram:
        """The program for so many clusters."""
        if len(self.shares) != n_clusters:
            raise InputError(
                f"Expected a share for each of {n_clusters} clusters; got {len(self.shares)}. Give as many."
            )
        return _Fixed(torch.tensor(self.shares))


@dataclass(frozen=True)
class Learned(Sizes):
    """The shares are parameters, fitted as a point: a cluster that no cell wants shrinks to nothing."""

    def build(self, n_clusters: int) -> SizesProgram:
        """The program for so many clusters."""
        return _Learned(n_clusters)


@dataclass(frozen=True)
class Dirichlet(Sizes):
    r"""$\pi \sim \mathrm{Dirichlet}(\alpha)$, shared by all cells, with $q(\pi)$ a Dirichlet: below 1, few clusters."""

    alpha: float = 1.0

    def __post_init__(self) -> None:
        """Refuse a concentration that no Dirichlet has."""
        if not self.alpha > 0:
            raise InputError(f"Expected a Dirichlet concentration alpha > 0; got {self.alpha}. 1 is flat.")

    def build(self, n_clusters: int) -> SizesProgram:
        """The program for so many clusters."""
        return _Dirichlet(n_clusters, self.alpha)


SIZES: dict[str, type[Sizes]] = {"uniform": Uniform, "learned": Learned, "dirichlet": Dirichlet}
"""What the command line calls them."""


def inverse_softplus(y: Tensor) -> Tensor:
    """The x of which y > 0 is log(1 + e^x)."""
    return y + torch.log(-torch.expm1(-y))


class _Fixed(SizesProgram):
    def __init__(self, shares: Tensor) -> None:
        super().__init__()
        self.log_shares: Tensor
        self.register_buffer("log_shares", shares.log())

    def prior(self) -> Tensor:
        return self.log_shares

    def posterior(self) -> None:
        pass

    def begin(self, shares: Tensor) -> None:
        pass


class _Learned(SizesProgram):
    def __init__(self, n_clusters: int) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(n_clusters))

    def prior(self) -> Tensor:
        return self.logits.log_softmax(0)

    def posterior(self) -> None:
        pass

    def begin(self, shares: Tensor) -> None:
        with torch.no_grad():
            self.logits.copy_(shares.log())


class _Dirichlet(SizesProgram):
    SHARPNESS = 100.0
    """What the concentrations of q sum to at the start, in cells: as if so many had been counted."""

    def __init__(self, n_clusters: int, alpha: float) -> None:
        super().__init__()
        self.alpha = alpha
        self.outputs = nn.Parameter(torch.full((n_clusters,), self.SHARPNESS / n_clusters))

    def prior(self) -> Tensor:
        start = torch.full_like(self.outputs, self.alpha)
        # A share that underflows is taken for the least number there is.
        return pyro.sample("sizes", dist.Dirichlet(start)).clamp_min(torch.finfo(start.dtype).tiny).log()

    def posterior(self) -> None:
        pyro.sample("sizes", dist.Dirichlet(softplus(self.outputs) + 1e-3))

    def begin(self, shares: Tensor) -> None:
        with torch.no_grad():
            self.outputs.copy_(inverse_softplus(self.SHARPNESS * shares))
