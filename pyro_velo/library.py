r"""How deeply a cell was sequenced: taken as known, or inferred with everything else.

Totals hold two things, how much RNA a cell has and how much of it was caught. Size factors read off totals take some of
the first for the second, and where most genes rise together they do so more at some times than at others.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_velo.errors import InputError

LEAST_SD = 0.05
"""Of the logarithms: cells of one size have some spread all the same."""


class Library(ABC):
    """A recipe for the library sizes of counts."""

    inferred: bool = False
    """Whether the last latent dimension of a cell is its library size."""

    @abstractmethod
    def spread(self, size_factors: Tensor) -> Tensor | None:
        """The sd of log library sizes, (), given rough ones (2, N, 1); None where these are taken as they are."""


@dataclass(frozen=True)
class Known(Library):
    """The size factors of each molecule are what they are said to be."""

    def spread(self, size_factors: Tensor) -> None:
        """None."""


@dataclass(frozen=True)
class Inferred(Library):
    r"""$\log l_n \sim \mathcal{N}(0, \sigma^2)$ for both molecules of a cell, the median library being one.

    Whatever time a cell is at, its library says nothing of it: that is what tells libraries and expression apart. It
    takes a clock that genes share: where each has its own, any library is explained by genes' times.
    `sd` is $\sigma$, by default that of the logarithms of the rough size factors, from which the inference starts.
    Raises `InputError` for an sd that is not positive and finite.

    Reference: Lopez et al. 2018 (scVI), the latent library size.
    """

    sd: float | None = None
    inferred = True

    def __post_init__(self) -> None:
        """Check the sd."""
        if self.sd is not None and not 0 < self.sd < math.inf:
            raise InputError(
                f"Expected sd, of log library sizes, above 0 and finite; got {self.sd}. 0.3 is usual; None reads it."
            )

    def spread(self, size_factors: Tensor) -> Tensor:
        """The sd that was given, or that of the rough size factors."""
        if self.sd is not None:
            return size_factors.new_tensor(self.sd)
        return rough(size_factors).std().clamp_min(LEAST_SD)


def rough(size_factors: Tensor) -> Tensor:
    """The log library sizes (cells, 1) that size factors (2, cells, 1) tell, the mean over both molecules."""
    return torch.log(size_factors).mean(0)


LIBRARIES: dict[str, type[Library]] = {"known": Known, "inferred": Inferred}
"""What the command line calls them."""
