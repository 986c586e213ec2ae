"""Batches of cells that were measured differently: the same cells, of which more or fewer molecules were captured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, final

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from pyro_velo.simulate.checks import require, require_number

Array = NDArray[Any]


@final
@dataclass(frozen=True)
class Batches:
    r"""Cells come from batches at random, equally often; what is captured of a molecule differs between batches.

    $$c_{bmg} = c_{bm}\, e^{\sigma\epsilon_{bmg} - \sigma^2 / 2}, \qquad \epsilon_{bmg} \sim \mathcal{N}(0, 1)$$

    `unspliced` and `spliced` hold $c_{bm}$, one factor a batch: the share of the molecules that is captured, relative
    to a batch with factor 1. Genes scatter about it, with this mean, by $\sigma$, `spread`. The default is one batch,
    as it is; batches that do not differ are `Batches((1.0, 1.0), (1.0, 1.0))`.
    """

    unspliced: tuple[float, ...] = (1.0,)
    spliced: tuple[float, ...] = (1.0,)
    spread: float = 0.0

    def __post_init__(self) -> None:
        """Check the settings."""
        lengths = [len(self.unspliced), len(self.spliced)]
        agree = lengths[0] == lengths[1] > 0
        require(agree, "as many unspliced as spliced factors, one at least", lengths, "Pass one a batch in each.")
        for name in ("unspliced", "spliced"):
            for factor in getattr(self, name):
                require_number(f"each factor of {name}", factor, "(0, inf)", "Pass factors such as (1.0, 0.5).")
        require_number("spread", self.spread, "[0, inf)", "Pass the sd of the genes' log-factors, or 0 for none.")

    def assign(self, n_cells: int, rng: Generator) -> Array:
        """The number of each cell's batch (cells,), from 0."""
        return rng.integers(len(self.spliced), size=n_cells)

    def capture(self, n_genes: int, rng: Generator) -> Array:
        """The factors (2, batches, genes): of unspliced RNA, then of spliced."""
        factors = np.array([self.unspliced, self.spliced], dtype=float)[:, :, None]
        scatter = rng.standard_normal((*factors.shape[:2], n_genes))
        return factors * np.exp(self.spread * scatter - self.spread**2 / 2)
