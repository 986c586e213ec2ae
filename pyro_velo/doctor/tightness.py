r"""How far the ELBO of held-out cells is below their evidence, and whether more importance samples would tell.

$$\mathcal L_K = E\Big[\log\frac1K\sum_{k=1}^K w_k\Big], \qquad w_k = \frac{p(x, z_k)}{q(z_k \mid x)}$$

rises with K to log p(x) (Burda et al. 2016, theorem 1). Where $\hat k$ of a cell's weights is above 0.7 no K that can
be paid for gets there (Vehtari et al. 2024).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray

from pyro_velo.batch import Data
from pyro_velo.criticism import UNRELIABLE, pareto_smoothed
from pyro_velo.errors import InputError
from pyro_velo.evidence import CELLS_GENES_AT_ONCE, computed_sites, conditions, held_out, log_weights, steps_of
from pyro_velo.train import Fitted

Array = NDArray[np.float64]

PARTICLES = (1, 5, 50, 500)
DRAWS = 2
"""Draws of what cells share, each with the largest number of latent vectors a cell."""
MAX_CELLS = 50


@dataclass(frozen=True)
class Tightness:
    r"""Nats for each of the held-out cells `index` at KL weight 1, without the KL of what cells share.

    `bound` (len(particles), cells): $\mathcal L_K$, means over disjoint groups of the same draws, so that it rises with
    K in every cell. `k_hat` (cells,) of all weights; `variance` (cells,) of log w over latent vectors: that of an ELBO
    by one draw.
    """

    particles: tuple[int, ...]
    bound: Array
    k_hat: Array
    variance: Array
    index: NDArray[np.int64]

    @property
    def gap(self) -> Array:
        """What the bound with most particles gains on the ELBO, (cells,): a lower bound of KL(q(z|x) || p(z|x))."""
        return self.bound[-1] - self.bound[0]

    @property
    def unreliable(self) -> float:
        """The share of cells with a k-hat above 0.7."""
        return float((self.k_hat > UNRELIABLE).mean())

    @property
    def without_mean(self) -> float:
        """The share of cells with a k-hat above 1, whose weights have no mean for an average to come to."""
        return float((self.k_hat > 1).mean())


@torch.no_grad()
def tightness(
    fitted: Fitted,
    cells: Data,
    *,
    particles: tuple[int, ...] = PARTICLES,
    draws: int = DRAWS,
    max_cells: int = MAX_CELLS,
    seed: int = 0,
) -> Tightness:
    """The importance-weighted bounds of up to `max_cells` held-out cells of a fit on `cells`.

    Raises `InputError` unless `particles` start with 1 and each divides the next, for fewer than two held-out cells,
    and for fewer than 25 weights a cell; `NonFiniteError`, naming site and gene, for NaN.
    """
    pairs = pairwise(particles)
    if not particles or particles[0] != 1 or any(few >= many or many % few for few, many in pairs):
        raise InputError(f"Expected particles such as 1, 5, 50, each dividing the next; got {particles}.")
    train_index, index = held_out(fitted, len(cells))
    index, most = index[:max_cells], particles[-1]
    device, n_train, steps = cells.device, len(train_index), steps_of(fitted, len(cells))
    size = max(1, CELLS_GENES_AT_ONCE // (most * cells.n_genes))
    found = []
    with conditions(fitted, cells, seed):
        left_out = computed_sites(fitted, cells.batch(index[:1].to(device), n_train))
        for part in index.to(device).split(size):
            batch = cells.batch(part.repeat_interleave(most), n_train)
            found.append(log_weights(fitted, batch, draws, left_out, steps).unflatten(1, (-1, most)))
    weights = torch.cat(found, 1)
    bounds = [weights.unflatten(2, (-1, k)).logsumexp(3).sub(math.log(k)).mean((0, 2)) for k in particles]
    _, k_hat = pareto_smoothed(weights.movedim(1, 0).flatten(1).cpu().numpy())
    variance = weights.var(2).mean(0)
    return Tightness(particles, torch.stack(bounds).cpu().numpy(), k_hat, variance.cpu().numpy(), index.cpu().numpy())
