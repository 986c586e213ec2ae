r"""Pareto-smoothed importance sampling: how far each cell's importance weights, and what comes of them, can be trusted.

References: Vehtari et al. 2024, Pareto smoothed importance sampling, JMLR 25; Zhang and Stephens 2009 (the tail's fit).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy.special import logsumexp
from torch import Tensor

from pyro_velo import evidence
from pyro_velo.batch import Cells
from pyro_velo.errors import InputError
from pyro_velo.evidence import conditions, held_out
from pyro_velo.posterior import draw_rates
from pyro_velo.train import Fitted, split

Array = NDArray[np.float64]
UNRELIABLE = 0.7
"""The k-hat above which an importance estimate is not to be trusted, however many draws (Vehtari et al. 2024)."""
FEWEST_WEIGHTS = 25
"""Below it the tail of the weights is shorter than five of them, and has no shape."""


class Pareto(NamedTuple):
    r"""Generalised Pareto tails, $\Pr(X > x) = (1 + k x / \sigma)^{-1/k}$: shape `k` and scale `sigma`."""

    k: Array
    sigma: Array


def generalised_pareto(x: ArrayLike) -> Pareto:
    r"""Fit such a tail to each row of exceedances, ascending along the last axis: (..., M) to (...).

    With $b = -k/\sigma$ the shape is $k(b) = \frac1M \sum_i \log(1 - b x_i)$, and b its posterior mean over a grid,
    under a prior set by the first quartile and the largest exceedance; the profile likelihood is
    $M (\log(-b/k) - k - 1)$. For k > -1/2 the sd of the estimate is near $(1 + k)/\sqrt M$. A row without spread has
    no tail: k is -inf, sigma 0.

    Reference: Zhang and Stephens 2009, Technometrics 51, eq. 6-8 (their k has the other sign).
    """
    x = np.asarray(x, dtype=np.float64)
    n, largest = x.shape[-1], x[..., -1:]
    flat = ~(largest > 0)
    x = np.where(flat, np.linspace(1 / n, 1, n), x)
    largest = x[..., -1:]
    quartile = x[..., [max(0, math.floor(n / 4 + 0.5) - 1)]]
    quartile = np.where(quartile > 0, quartile, largest / n)
    size = 30 + math.isqrt(n)
    grid = 1 / largest + (1 - np.sqrt(size / (np.arange(size) + 0.5))) / (3 * quartile)
    shape = np.stack([np.log1p(-grid[..., [j]] * x).mean(-1) for j in range(size)], -1)
    profile = n * (np.log(-grid / shape) - shape - 1)
    b = (np.exp(profile - logsumexp(profile, -1, keepdims=True)) * grid).sum(-1)
    k = np.log1p(-b[..., None] * x).mean(-1)
    flat = flat[..., 0]
    return Pareto(np.where(flat, -np.inf, k), np.where(flat, 0.0, -k / b))


def pareto_smoothed(log_weights: ArrayLike) -> tuple[Array, Array]:
    r"""Each row of S log-weights with its largest smoothed, and k-hat: (..., S) to (..., S) and (...).

    The largest $M = \min(S/5, 3\sqrt S)$ weights become the quantiles, at $(i - 1/2)/M$, of the generalised Pareto that
    is fitted to them, none above the largest weight itself. $\hat k$ is drawn to 1/2 as ten more weights would draw it.
    An estimate's error falls as it should for $\hat k < 0.5$, is bearable up to 0.7, and is not to be trusted beyond.
    Weights that are all equal (to rounding) stay, with a k-hat of -inf.

    Raises `InputError` for fewer than 25 weights.

    Reference: Vehtari et al. 2024, Pareto smoothed importance sampling, JMLR 25, section 2 and appendix C.
    """
    log_weights = np.asarray(log_weights, dtype=np.float64)
    count = log_weights.shape[-1]
    if count < FEWEST_WEIGHTS:
        raise InputError(f"Expected {FEWEST_WEIGHTS} weights or more a cell; got {count}. Raise draws or particles.")
    tail = min(count // 5, math.ceil(3 * math.sqrt(count)))
    order = np.argsort(log_weights, axis=-1)
    ordered = np.take_along_axis(log_weights, order, -1)
    top = ordered[..., -1:]
    weights = np.exp(ordered - top)
    cut = weights[..., [-tail - 1]]
    beyond = weights[..., -tail:] - cut
    beyond = np.where(beyond[..., -1:] > 1e-10, beyond, 0.0)
    k, sigma = generalised_pareto(beyond)
    found = np.where(np.isfinite(k), (tail * k + 5) / (tail + 10), k)
    level = -np.log1p(-(np.arange(tail) + 0.5) / tail)
    # The quantile sigma (e^{k level} - 1) / k is sigma level at k = 0.
    shape = np.where(np.isfinite(found) & (found != 0), found, 1e-12)[..., None]
    smooth = np.log(np.minimum(cut + sigma[..., None] * np.expm1(shape * level) / shape, 1.0)) + top
    ordered[..., -tail:] = np.where(np.isfinite(found)[..., None], smooth, ordered[..., -tail:])
    smoothed = np.empty_like(ordered)
    np.put_along_axis(smoothed, order, ordered, -1)
    return smoothed, found


@dataclass(frozen=True)
class Reliability:
    """Cells `index`, the k-hat of each one's importance weights, and its predictive density in nats, (cells,) each.

    Of `importance`, the density is that of `Evidence.density`, the largest weights smoothed; of
    `leave_one_out`, see there.
    """

    index: NDArray[np.int64]
    k_hat: Array
    density: Array

    @property
    def flagged(self) -> NDArray[np.int64]:
        """The cells with a k-hat above 0.7, the worst first."""
        worst = np.argsort(-self.k_hat, kind="stable")
        return self.index[worst[self.k_hat[worst] > UNRELIABLE]]


@torch.no_grad()
def importance(
    fitted: Fitted, cells: Cells, *, particles: int = 200, draws: int = 5, seed: int = 0, index: Tensor | None = None
) -> Reliability:
    r"""How far q(z | x) of each held-out cell can be trusted: k-hat of $w_{rk} = p(x, z_k | \theta_r) / q(z_k | x)$.

    All `draws` x `particles` weights of a cell are taken together, as `density` takes them. A cell with a high k-hat is
    one whose encoder is too sure or misses a mode; its density is too low and so are its bounds. With few weights k-hat
    is uncertain itself, by $(1 + k)/\sqrt M$ for the M of `pareto_smoothed`: 0.15 for 1,000 weights.

    `index`: other cells than the held-out ones. Raises `InputError` as `evidence` does, and for fewer than 25 weights.

    Reference: Yao et al. 2018, Yes, but did it work?, ICML, section 2.
    """
    index = held_out(fitted, len(cells))[1] if index is None else index
    densities, tails = [], []
    for log_weights in _log_weights(fitted, cells, index, draws, particles, seed):
        smoothed, k_hat = pareto_smoothed(log_weights.flatten(1).numpy())
        densities.append(logsumexp(smoothed, -1) - math.log(smoothed.shape[-1]))
        tails.append(k_hat)
    return Reliability(index.numpy(), np.concatenate(tails), np.concatenate(densities))


@torch.no_grad()
def leave_one_out(
    fitted: Fitted, cells: Cells, *, particles: int = 50, draws: int = 100, seed: int = 0, index: Tensor | None = None
) -> Reliability:
    r"""The density of each training cell under rates that have not seen it, by PSIS-LOO over draws of the rates.

    $$p(x_n \mid x_{-n}) = \Big(E_{\theta}\big[p(x_n \mid \theta)^{-1}\big]\Big)^{-1}, \qquad
    p(x_n \mid \theta_r) \approx \frac1K \sum_k w_{rk}$$

    with $\theta \sim q(\theta)$ in the place of the posterior. z and $\pi$ belong to the cell and are integrated out,
    so what is left out is the cell's part in the gene-level sites alone. It stays in the encoder, which does not change
    the quantity but how well it is estimated, and in the decoders' weights, which are points: LOO is therefore
    optimistic by what they learned by heart. Held-out cells (`importance`, `evidence`) are the stronger test, and
    need no LOO. A k-hat above 0.7 says that the cell moves the rates by itself, or that `particles` are too few.

    `index`: other cells than the training ones. Raises `InputError` for rates that are held at a point, where no cell
    can be left out, and for fewer than 25 draws.

    References: Gelfand, Dey and Chang 1992; Vehtari, Gelman and Gabry 2017, eq. 4 and 10.
    """
    _check_spread(fitted, cells)
    index = _training_cells(fitted, len(cells)) if index is None else index
    densities, tails = [], []
    for log_weights in _log_weights(fitted, cells, index, draws, particles, seed):
        log_density = (log_weights.logsumexp(2) - math.log(particles)).numpy()
        smoothed, k_hat = pareto_smoothed(-log_density)
        densities.append(logsumexp(smoothed + log_density, -1) - logsumexp(smoothed, -1))
        tails.append(k_hat)
    return Reliability(index.numpy(), np.concatenate(tails), np.concatenate(densities))


def _log_weights(
    fitted: Fitted, cells: Cells, index: Tensor, draws: int, particles: int, seed: int
) -> Iterator[Tensor]:
    """The log-weights of one batch of cells after the other, (cells, draws, particles) float64; see `evidence`."""
    n_train, device = len(_training_cells(fitted, len(cells))), cells.molecules.device
    settings = fitted.training.settings
    steps = fitted.training.epoch * max(1, math.ceil(n_train / settings.batch_size))
    size = max(1, evidence.CELLS_GENES_AT_ONCE // (particles * cells.n_genes))
    with conditions(fitted, cells, seed):
        left_out = evidence.computed_sites(fitted, cells.batch(index[:1].to(device), n_train))
        for part in index.to(device).split(size):
            batch = cells.batch(part.repeat_interleave(particles), n_train)
            found = evidence.log_weights(fitted, batch, draws, left_out, steps)
            yield found.unflatten(1, (-1, particles)).movedim(1, 0).cpu()


def _training_cells(fitted: Fitted, n_cells: int) -> Tensor:
    """Their indices; a fit may have held out none, whose training cells can be scored all the same."""
    settings = fitted.training.settings
    return split(n_cells, settings.held_out, settings.seed)[0]


def _check_spread(fitted: Fitted, cells: Cells) -> None:
    with conditions(fitted, cells, 0):
        one, other = draw_rates(fitted, cells, 2)
    if all(torch.equal(one[name], other[name]) for name in one):
        raise InputError(
            "Expected a guide that spreads the rates, so that a cell can be left out of them; got one that holds them "
            "at a point. Fit with rates=MeanField(), or look at held-out cells with importance()."
        )
