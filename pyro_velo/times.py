r"""How a cell's latent vector becomes the latent times of its genes: one a gene, one for all, or between the two.

A recipe builds a network from the latent vector to `Timed`. A new one is a recipe with its network.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from typing import NamedTuple

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_velo.compiled import fusible, spread
from pyro_velo.kinetics import T_MAX
from pyro_velo.nn import Decoder
from pyro_velo.priors import Centered, Prior


class Timed(NamedTuple):
    """Times since transcription went on (`on`) and since it went off (`off`), (B, G), each in its own state.

    `log_weights`: what the times say of the four states, (B, G) each; None where they say nothing.
    `shared` (B, 1) is the time of the cell, where there is one, and `own` (B, G) or (B, 1) that of its genes.
    """

    on: Tensor
    off: Tensor
    log_weights: tuple[Tensor, ...] | None = None
    shared: Tensor | None = None
    own: Tensor | None = None


class TimesProgram(nn.Module, ABC):
    """The network of a recipe."""

    def end(self, values: Mapping[str, Tensor]) -> Tensor | float:
        """When all times end, (G,) or one for all: the time of a gene that has come to rest after it was on."""
        return T_MAX

    @abstractmethod
    def forward(self, z: Tensor, switch: Tensor, values: Mapping[str, Tensor]) -> Timed:
        """Times of the cells with latent vectors `z` (B, d) and covariates; `switch` (G,), `values` the added sites."""


@dataclass(frozen=True)
class OrderPenalty:
    r"""$-w\,G\,(T_n - \hat T_n)^2 / 2$ in units of `width`, per cell, while the KL warms up: then it is gone.

    A time shared by all genes has two modes, forwards and backwards, and a fit stays in the one it starts in; this
    starts it in the order known before a fit: `Cells.order`, or what the phase portraits suggest (`rough_order`).
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
    switch_prior: Prior = dist.Uniform(0.0, T_MAX)
    """That of the switching times, where `Priors` leaves it open."""
    shared: bool = False
    """Whether cells have a time that their genes share, so that one order of the cells must do for all."""

    def start(self, switch: Tensor) -> dict[str, Tensor]:
        """Start values (G,) or (G, K) of the added sites."""
        return {}

    def width(self, site: str) -> int:
        """How many numbers K an added site holds for a gene; 0 for a single one, without an axis of its own."""
        return 0

    @abstractmethod
    def build(self, n_in: int, n_genes: int, hidden: Sequence[int]) -> TimesProgram:
        """The network from `n_in` numbers a cell."""


@dataclass(frozen=True)
class PerGene(Times):
    r"""Each gene has a time of its own: $t = \rho^{(1)} t^s$ or $t^s + \rho^{(3)}(20 - t^s)$ (Gayoso et al. 2023).

    No cell says what a unit of a gene's own time is. With `common_unit` a fit ends with each gene's rates and times in
    the unit of the clock that genes agree on, as far as they do (`time_units`); without it they stay in the one that
    the training came to, and intervals do not know that it is open.
    """

    common_unit: bool = True

    def build(self, n_in: int, n_genes: int, hidden: Sequence[int]) -> TimesProgram:
        """A decoder with two heads."""
        return PerGeneProgram(n_in, n_genes, hidden)


class PerGeneProgram(TimesProgram):
    """z to the scaled times rho of both states.

    With a `reference`, beta and the switching times (G,) of a fit, the times that shares are of are those of the
    reference, shorter as beta is larger: a gene whose rates are all faster has the same curve.
    """

    reference: tuple[Tensor, Tensor] | None = None

    def __init__(self, n_in: int, n_genes: int, hidden: Sequence[int]) -> None:
        super().__init__()
        self.decoder = Decoder(n_in, n_genes, hidden, heads=2)

    def forward(self, z: Tensor, switch: Tensor, values: Mapping[str, Tensor]) -> Timed:
        """Shares of the time before and after the switch."""
        if self.reference is None:
            return Timed(*shares_of_time(self.decoder(z), switch, T_MAX - switch))
        switched, unit = self.reference[1], self._unit(values)
        return Timed(*shares_of_time(self.decoder(z), switched * unit, (T_MAX - switched) * unit))

    def end(self, values: Mapping[str, Tensor]) -> Tensor | float:
        """20, in the unit of each gene."""
        return T_MAX if self.reference is None else T_MAX * self._unit(values)

    def _unit(self, values: Mapping[str, Tensor]) -> Tensor:
        assert self.reference is not None
        return self.reference[0] / values["beta"]

    def in_units_of(self, beta: Tensor, switch: Tensor) -> PerGeneProgram:
        """The same with the rates (G,) of a fit as its reference."""
        found = copy(self)
        found.reference = (beta, switch)
        return found


@fusible
def shares_of_time(outputs: Tensor, before: Tensor, after: Tensor) -> tuple[Tensor, Tensor]:
    """The sigmoids of outputs (2, B, G) as shares of the times before and after the switch (G,), (B, G) each."""
    rho_on, rho_off = map(torch.sigmoid, outputs)
    return rho_on * spread(before, rho_on), rho_off * spread(after, rho_off)


@dataclass(frozen=True)
class Shared(Times):
    r"""One time per cell for all genes, $T_n = 20\,\Phi(z_{n1})$: before any cell is seen, uniform on [0, 20].

    Genes come on at an `onset` of their own, before 0 where they were on already, and go off `switch_time` later. It
    identifies direction and time where all cells follow one process, and is wrong where lineages do not run in
    parallel. The unit of time is the one in which cells are uniform on [0, 20]. Were switching times uniform too, every
    gene would have a say in it: their prior is centred on the start values. `elsewhere`: by what the probability of the
    empty state is multiplied, in which a gene is that stays silent in a cell's lineage.
    """

    onset: float = 0.2
    elsewhere: float = 0.05
    sites = ("onset",)
    switch_prior = Centered()
    shared = True

    def start(self, switch: Tensor) -> dict[str, Tensor]:
        """Early for every gene."""
        return {"onset": torch.full_like(switch, self.onset)}

    def build(self, n_in: int, n_genes: int, hidden: Sequence[int]) -> TimesProgram:
        """Nothing to learn but the sites."""
        return SharedProgram(self.elsewhere)


class ClockProgram(TimesProgram):
    """Cells have a clock, the first latent dimension, and genes read it."""

    def __init__(self, elsewhere: float) -> None:
        super().__init__()
        self.elsewhere = elsewhere

    @abstractmethod
    def own(self, z: Tensor, values: Mapping[str, Tensor]) -> Tensor:
        """The times that genes read, (B, G), or (B, 1) where they all read the same."""

    def at(self, own: Tensor, switch: Tensor, values: Mapping[str, Tensor]) -> Timed:
        """What follows from the times that genes read."""
        return from_time(own, values["onset"], switch, self.elsewhere)

    def forward(self, z: Tensor, switch: Tensor, values: Mapping[str, Tensor]) -> Timed:
        """The genes' times, with that of the cell."""
        return self.at(self.own(z, values), switch, values)._replace(shared=cell_time(z))


class SharedProgram(ClockProgram):
    """Every gene reads the cell's clock as it is."""

    def own(self, z: Tensor, values: Mapping[str, Tensor]) -> Tensor:
        """The time of the cell."""
        return cell_time(z)


def cell_time(z: Tensor) -> Tensor:
    r"""$20\,\Phi(z_1)$ of latent vectors (B, d), as (B, 1)."""
    return T_MAX * torch.special.ndtr(z[:, :1])


@dataclass(frozen=True)
class Hierarchical(Times):
    r"""A time per cell, from which each gene deviates as far as the data pay for it.

    $t_{ng} = 20\,\Phi(z_{n1} + \sum_k w_{gk}\,\phi_k(z_n))$ with features $\phi$ of z in [-1, 1] that all genes
    share, and loadings $w_{gk}$ (site `deviation`) that have a prior around 0: what a gene needs to go its own way is K
    numbers, which are inferred as its rates are. Starts as `Shared`.
    """

    onset: float = 0.2
    elsewhere: float = 0.05
    features: int = 10
    sites = ("onset", "deviation")
    switch_prior = Centered()
    shared = True

    def start(self, switch: Tensor) -> dict[str, Tensor]:
        """Early, and next to no deviations."""
        return {
            "onset": torch.full_like(switch, self.onset),
            # Not zero, where the features would have no gradient.
            "deviation": switch.new_full((len(switch), self.features), 0.01),
        }

    def width(self, site: str) -> int:
        """A loading for each feature."""
        return self.features if site == "deviation" else 0

    def build(self, n_in: int, n_genes: int, hidden: Sequence[int]) -> TimesProgram:
        """A network to the features."""
        return HierarchicalProgram(n_in, hidden, self)


class HierarchicalProgram(ClockProgram):
    """z to the features by which genes deviate from the cell's clock."""

    def __init__(self, n_in: int, hidden: Sequence[int], recipe: Hierarchical) -> None:
        super().__init__(recipe.elsewhere)
        self.decoder = Decoder(n_in, recipe.features, hidden)

    def own(self, z: Tensor, values: Mapping[str, Tensor]) -> Tensor:
        """Every gene's own time."""
        deviations = torch.tanh(self.decoder(z)[0]) @ values["deviation"].mT
        return T_MAX * torch.special.ndtr(z[:, :1] + deviations)


def from_time(t: Tensor, onset: Tensor, switch: Tensor, elsewhere: float) -> Timed:
    """On from `onset` (G,) for a time `switch` (G,), then off: t (B, G) or (B, 1).

    The curve has no step at the switch, so that a hard one has its gradient; where both states were possible around it,
    every such cell would cost up to log 2, and slower rates would save it. A gene that is on approaches its steady
    state and is not said to be in it, where it would tell no time any more.
    """
    since = t - onset
    never, at_once = since.new_tensor(-math.inf), since.new_zeros(())
    on = since <= switch
    weights = (
        torch.where(on, at_once, never),
        never.expand_as(since),
        torch.where(on, never, at_once),
        torch.full_like(since, math.log(elsewhere)),
    )
    return Timed(torch.minimum(since.clamp_min(0), switch), (since - switch).clamp_min(0), weights, own=t)


TIMES: dict[str, type[Times]] = {"per-gene": PerGene, "shared": Shared, "hierarchical": Hierarchical}
"""What the command line calls them."""
