r"""How a cell's latent vector becomes the latent times of its genes: one a gene, one for all, or between the two.

A recipe builds a network from the latent vector to `Timed`. A new one is a recipe with its network.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from pyro_velo.kinetics import T_MAX
from pyro_velo.nn import Decoder


class Timed(NamedTuple):
    """Times since transcription went on (`on`) and since it went off (`off`), (B, G), each in its own state.

    `log_weights`: what the times say of the states, (B, G) for on and for off; None where they say nothing.
    `shared` (B, 1) is the time of the cell, where there is one, and `deviations` (B, G) how far its genes are from it.
    """

    on: Tensor
    off: Tensor
    log_weights: tuple[Tensor, Tensor] | None = None
    shared: Tensor | None = None
    deviations: Tensor | None = None


class TimesProgram(nn.Module, ABC):
    """The network of a recipe."""

    @abstractmethod
    def forward(self, z: Tensor, switch: Tensor, values: Mapping[str, Tensor]) -> Timed:
        """Times of the cells with latent vectors `z` (B, d) and covariates; `switch` (G,), `values` the added sites."""

    def regularise(self, timed: Timed, values: Mapping[str, Tensor]) -> None:
        """Say what is believed of the times themselves, inside the plates of cells and genes."""


@dataclass(frozen=True)
class OrderPenalty:
    r"""$-w\,G\,(T_n - \hat T_n)^2 / 2$ in units of `width`, per cell, while the KL warms up: then it is gone.

    A time shared by all genes has two modes, forwards and backwards, and a fit stays in the one it starts in; this
    starts it in the order that the phase portraits suggest (`initial.rough_order`).
    """

    weight: float = 1.0
    width: float = 3.0

    def __call__(self, shared: Tensor, order: Tensor, n_genes: int) -> None:
        """Add the factor, inside the cells' plate: the times of the cells (B, 1), and their order (B,) in [0, 1]."""
        miss = (shared - T_MAX * order[:, None]) / self.width
        factor = dist.Unit(-0.5 * self.weight * n_genes * miss**2)
        pyro.sample("order_penalty", factor, obs=miss.new_empty(*miss.shape, 0), infer={"penalty": True})


class Times(ABC):
    """A recipe for the times."""

    sites: tuple[str, ...] = ()
    """The gene-level sites it adds; each has a prior of the same name in `Priors`."""
    shared: bool = False
    """Whether cells have a time that their genes share, so that one order of the cells must do for all."""

    def start(self, switch: Tensor) -> dict[str, Tensor]:
        """Start values (G,) of the added sites."""
        return {}

    @abstractmethod
    def build(self, n_in: int, n_genes: int, hidden: Sequence[int]) -> TimesProgram:
        """The network from `n_in` numbers a cell."""


@dataclass(frozen=True)
class PerGene(Times):
    r"""Each gene has a time of its own: $t = \rho^{(1)} t^s$ or $t^s + \rho^{(3)}(20 - t^s)$ (Gayoso et al. 2023)."""

    def build(self, n_in: int, n_genes: int, hidden: Sequence[int]) -> TimesProgram:
        """A decoder with two heads."""
        return PerGeneProgram(n_in, n_genes, hidden)


class PerGeneProgram(TimesProgram):
    """z to the scaled times rho of both states."""

    def __init__(self, n_in: int, n_genes: int, hidden: Sequence[int]) -> None:
        super().__init__()
        self.decoder = Decoder(n_in, n_genes, hidden, heads=2)

    def forward(self, z: Tensor, switch: Tensor, values: Mapping[str, Tensor]) -> Timed:
        """Shares of the time before and after the switch."""
        rho_on, rho_off = torch.sigmoid(self.decoder(z))
        return Timed(rho_on * switch, rho_off * (T_MAX - switch))


@dataclass(frozen=True)
class Shared(Times):
    """One time per cell for all genes, which switch off at times of their own.

    It identifies direction and time where all cells follow one process, and is wrong where lineages branch. `blur`:
    how many units of time around its switch a gene may be in either state.
    """

    blur: float = 0.5
    shared = True

    def build(self, n_in: int, n_genes: int, hidden: Sequence[int]) -> TimesProgram:
        """A decoder to a single number."""
        return SharedProgram(n_in, hidden, self.blur)


class SharedProgram(TimesProgram):
    """z to the time of the cell."""

    def __init__(self, n_in: int, hidden: Sequence[int], blur: float) -> None:
        super().__init__()
        self.decoder, self.blur = Decoder(n_in, 1, hidden), blur

    def forward(self, z: Tensor, switch: Tensor, values: Mapping[str, Tensor]) -> Timed:
        """The same time for every gene."""
        shared = T_MAX * torch.sigmoid(self.decoder(z)[0])
        return from_time(shared, switch, self.blur)._replace(shared=shared)


@dataclass(frozen=True)
class Hierarchical(Times):
    r"""A time per cell, from which each gene deviates as far as the data pay for it.

    $t_{ng} = 20\,\sigma(\mathrm{logit}(T_n/20) + d_{ng})$ with $d_{ng} \sim \mathcal{N}(0, \tau_0^2 + \tau_g^2)$, where
    T and d are functions of z and $\tau_g$ (site `deviation`) is learned. $\tau_0$ (`least`) keeps the density of
    functions bounded. Starts as `Shared`: d = 0.
    """

    blur: float = 0.5
    deviation: float = 0.5
    least: float = 0.1
    sites = ("deviation",)
    shared = True

    def start(self, switch: Tensor) -> dict[str, Tensor]:
        """The same for every gene."""
        return {"deviation": torch.full_like(switch, self.deviation)}

    def build(self, n_in: int, n_genes: int, hidden: Sequence[int]) -> TimesProgram:
        """Two decoders: to a single number, and to one a gene."""
        return HierarchicalProgram(n_in, n_genes, hidden, self)


class HierarchicalProgram(TimesProgram):
    """z to the time of the cell and the deviations of its genes."""

    def __init__(self, n_in: int, n_genes: int, hidden: Sequence[int], recipe: Hierarchical) -> None:
        super().__init__()
        self.decoder, self.recipe = Decoder(n_in, 1, hidden), recipe
        self.deviations = Decoder(n_in, n_genes, hidden)
        nn.init.zeros_(self.deviations.weight)
        nn.init.zeros_(self.deviations.bias)

    def forward(self, z: Tensor, switch: Tensor, values: Mapping[str, Tensor]) -> Timed:
        """Every gene's own time."""
        logit, deviations = self.decoder(z)[0], self.deviations(z)[0]
        found = from_time(T_MAX * torch.sigmoid(logit + deviations), switch, self.recipe.blur)
        return found._replace(shared=T_MAX * torch.sigmoid(logit), deviations=deviations)

    def regularise(self, timed: Timed, values: Mapping[str, Tensor]) -> None:
        """The deviations' density: it decides how far a gene may go."""
        scale = torch.sqrt(values["deviation"] ** 2 + self.recipe.least**2)
        pyro.sample("deviations", dist.Normal(0.0, scale), obs=timed.deviations)


def from_time(t: Tensor, switch: Tensor, blur: float) -> Timed:
    """On before the switch, off after it, and either within `blur` of it: t (B, G) or (B, 1), switch (G,)."""
    early = (switch - t) / blur
    return Timed(torch.minimum(t, switch), (t - switch).clamp_min(0), (logsigmoid(early), logsigmoid(-early)))


TIMES: dict[str, type[Times]] = {"per-gene": PerGene, "shared": Shared, "hierarchical": Hierarchical}
"""What the command line calls them."""
