r"""How a gene is transcribed while it is on: at a constant rate, or at one that approaches another.

An object names the gene-level sites that it adds to alpha, beta, gamma and the switching time, and gives (u, s) during
induction. A new one is one class with these three methods.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_velo.kinetics import Rates, induction, ramp_induction


class Transcription(ABC):
    """Transcription of a gene that is on."""

    sites: tuple[str, ...] = ()
    """The gene-level sites it adds; each has a prior of the same name in `Priors`."""

    def start(self, rates: Rates) -> dict[str, Tensor]:
        """Start values (G,) of the added sites, from those of the rates."""
        return {}

    @abstractmethod
    def induction(self, rates: Rates, values: Mapping[str, Tensor], tau: Tensor) -> tuple[Tensor, Tensor]:
        """(u, s) a time `tau` after transcription was switched on in an empty cell."""

    @abstractmethod
    def full(self, rates: Rates, values: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """(u, s), each (G,), in the steady state that induction approaches."""


@dataclass(frozen=True)
class Constant(Transcription):
    """At the rate alpha (La Manno et al. 2018; Bergen et al. 2020)."""

    def induction(self, rates: Rates, values: Mapping[str, Tensor], tau: Tensor) -> tuple[Tensor, Tensor]:
        """The closed form of `kinetics.induction`."""
        return induction(rates.alpha, rates.beta, rates.gamma, tau)

    def full(self, rates: Rates, values: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """alpha/beta and alpha/gamma."""
        return rates.alpha / rates.beta, rates.alpha / rates.gamma


@dataclass(frozen=True)
class TimeDependent(Transcription):
    r"""At $\alpha(t) = \alpha_1 - (\alpha_1 - \alpha) e^{-\lambda t}$ (veloVI's time-dependent transcription).

    Sites: `alpha_1` in abundance/time, `ramp` ($\lambda$) in 1/time.
    """

    sites = ("alpha_1", "ramp")
    ramp: float = 0.5

    def start(self, rates: Rates) -> dict[str, Tensor]:
        """A constant rate: alpha_1 = alpha."""
        return {"alpha_1": rates.alpha.clone(), "ramp": torch.full_like(rates.alpha, self.ramp)}

    def induction(self, rates: Rates, values: Mapping[str, Tensor], tau: Tensor) -> tuple[Tensor, Tensor]:
        """The closed form of `kinetics.ramp_induction`."""
        return ramp_induction(rates.alpha, values["alpha_1"], values["ramp"], rates.beta, rates.gamma, tau)

    def full(self, rates: Rates, values: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """alpha_1/beta and alpha_1/gamma."""
        return values["alpha_1"] / rates.beta, values["alpha_1"] / rates.gamma


TRANSCRIPTIONS: dict[str, type[Transcription]] = {"constant": Constant, "time-dependent": TimeDependent}
"""What the command line calls them."""
