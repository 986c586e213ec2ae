r"""Do draws keep their word? Coverage of intervals, ranks of the truth among the draws, CRPS, sharpness; all as sums.

The tally of two parts is the sum of theirs, so that cells are counted batch by batch, and fits one by one. All
arithmetic is float64.

References: Talts et al. 2018 (simulation-based calibration); Säilynoja, Bürkner & Vehtari 2022 (the band);
Gneiting & Raftery 2007, eq. 20, and Ferro 2014 (CRPS); Betancourt 2018 (z-score and shrinkage).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.random import Generator
from numpy.typing import ArrayLike, NDArray
from scipy.special import gammaln
from scipy.stats import binom

from pyro_velo.errors import InputError
from pyro_velo.metrics import coverage

Array = NDArray[np.float64]
Counted = NDArray[np.int64]
LEVELS = (0.5, 0.8, 0.9, 0.95)
"""The central intervals that are looked at."""
BAND, POINTS = 0.95, 50
"""How sure the band of the ranks is, and at how many points it is looked at, at most."""
FARTHEST = 10.0
"""The largest z-score: farther truths count as so far, or one value whose draws hardly differ would outweigh all."""
NUMBERS_AT_ONCE = 2**21


@dataclass(frozen=True)
class Tally:
    """What is counted of `n` true values and their draws, as sums.

    Levels: how many truths are `covered`, and the interval's `width`. `ranks` (draws + 1,): how many truths have each
    rank. `crps`; `truth` and `squares` of it; `variance` of the draws. `z` and `z_squares` of the truth's z-scores,
    within +-`FARTHEST`, over the `spread` values whose draws differ.
    """

    covered: Array
    width: Array
    ranks: Counted
    n: int = 0
    crps: float = 0.0
    truth: float = 0.0
    squares: float = 0.0
    variance: float = 0.0
    z: float = 0.0
    z_squares: float = 0.0
    spread: int = 0

    @classmethod
    def empty(cls, draws: int) -> Tally:
        """Nothing counted yet of values with `draws` draws each."""
        return cls(np.zeros(len(LEVELS)), np.zeros(len(LEVELS)), np.zeros(draws + 1, np.int64))

    def __add__(self, other: Tally) -> Tally:
        """Both together."""
        return Tally(**{each.name: getattr(self, each.name) + getattr(other, each.name) for each in fields(Tally)})

    @property
    def coverage(self) -> dict[float, float]:
        """The share of the truths in each central interval, by its level."""
        return dict(zip(LEVELS, (self.covered / self.n).tolist(), strict=True))

    @property
    def widths(self) -> dict[float, float]:
        """The mean width of each central interval, by its level: how sharp the posterior is."""
        return dict(zip(LEVELS, (self.width / self.n).tolist(), strict=True))

    @property
    def mean_crps(self) -> float:
        """The mean CRPS, in the units of the values."""
        return self.crps / self.n

    @property
    def sd(self) -> float:
        """The standard deviation of the truths, pooled."""
        return math.sqrt(max(self.squares / self.n - (self.truth / self.n) ** 2, 0.0))

    @property
    def skill(self) -> float:
        r"""CRPS by the truths' sd: $1/\sqrt\pi = 0.56$ for draws that know no more than a Normal prior, 0 at best."""
        return self.mean_crps / self.sd if self.sd > 0 else math.nan

    @property
    def shrinkage(self) -> float:
        r"""$1 - \overline{\mathrm{var}}_\mathrm{posterior} / \mathrm{var}_\mathrm{truth}$: 0 nothing learned, 1 all."""
        return 1 - self.variance / self.n / self.sd**2 if self.sd > 0 else math.nan

    @property
    def bias(self) -> float:
        """The mean z-score of the truth, 0 where calibrated; NaN where draws do not differ."""
        return self.z / self.spread if self.spread else math.nan

    @property
    def overconfidence(self) -> float:
        """The root mean square of the z-scores: 1 where calibrated, 2 where posterior sds are half as large."""
        return math.sqrt(self.z_squares / self.spread) if self.spread else math.nan

    def to_plain(self) -> dict[str, Any]:
        """For JSON."""
        return {
            name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in asdict(self).items()
        }

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> Tally:
        """Back again, to the bit."""
        arrays: dict[str, type] = {"covered": np.float64, "width": np.float64, "ranks": np.int64}
        found: dict[str, Any] = {name: np.array(x, arrays[name]) if name in arrays else x for name, x in plain.items()}
        return cls(**found)


def tally(truth: ArrayLike, draws: ArrayLike, rng: Generator) -> Tally:
    """Count true values (...) against their draws (draws, ...); those that are not finite are left out.

    `rng` breaks ties of ranks, one number for each value, in their order.
    Raises `InputError` for shapes that disagree and for fewer than two draws.
    """
    y, x = np.asarray(truth, np.float64), np.asarray(draws)
    if x.ndim != y.ndim + 1 or x.shape[1:] != y.shape or len(x) < 2:
        raise InputError(
            f"Expected draws of shape (2 or more, *{y.shape}), as the truth has; got {x.shape}. Stack draws in front."
        )
    y, x, breaks = y.ravel(), x.reshape(len(x), -1), rng.random(y.size)
    at_once = max(1, NUMBERS_AT_ONCE // len(x))
    total = Tally.empty(len(x))
    for start in range(0, y.size, at_once):
        part = slice(start, start + at_once)
        known = np.isfinite(y[part]) & np.isfinite(x[:, part]).all(0)
        if known.any():
            total += _tally(y[part][known], x[:, part][:, known].astype(np.float64), breaks[part][known])
    return total


def _tally(y: Array, x: Array, breaks: Array) -> Tally:
    """Of finite values (n,), draws (draws, n) and random numbers in [0, 1) that break ties."""
    x = np.sort(x, axis=0)
    bounds = [central(x, level) for level in LEVELS]
    sd, mean = x.std(0, ddof=1), x.mean(0)
    # Where all draws are one number their sd is rounding.
    spread = x[-1] > x[0]
    z = np.clip((y[spread] - mean[spread]) / sd[spread], -FARTHEST, FARTHEST)
    return Tally(
        covered=np.array([coverage(y, low, high) * len(y) for low, high in bounds]).round(),
        width=np.array([(high - low).sum() for low, high in bounds]),
        ranks=np.bincount(_ranks(y, x, breaks), minlength=len(x) + 1),
        n=len(y),
        crps=float(_crps(y, x).sum()),
        truth=float(y.sum()),
        squares=float((y * y).sum()),
        variance=float((sd[spread] ** 2).sum()),
        z=float(z.sum()),
        z_squares=float((z * z).sum()),
        spread=int(spread.sum()),
    )


def central(ordered: Array, level: float) -> tuple[Array, Array]:
    r"""The central interval of draws (draws, ...) in ascending order: its ends, (...) each.

    The p-quantile stands at $p (D + 1)$ of D draws, because a new value falls below the i-th of them with probability
    $i / (D + 1)$: at any other place intervals of few draws are too narrow. Beyond the outermost draws it is these.

    >>> central(np.arange(1.0, 100.0), 0.9)
    (np.float64(5.0), np.float64(95.0))
    """
    last, ends = len(ordered) - 1, []
    for p in ((1 - level) / 2, (1 + level) / 2):
        place = min(max(p * (len(ordered) + 1) - 1, 0.0), float(last))
        below = int(place)
        ends.append(ordered[below] + (ordered[min(below + 1, last)] - ordered[below]) * (place - below))
    return ends[0], ends[1]


def ranks(truth: ArrayLike, draws: ArrayLike, rng: Generator) -> Counted:
    """How many draws (draws, ...) are below the truth (...), 0 to draws; ties are broken at random (Talts et al. 2018).

    Uniform where the truth is but another draw.
    """
    y, x = np.asarray(truth, np.float64), np.asarray(draws, np.float64)
    return _ranks(y, x, rng.random(y.shape))


def _ranks(y: Array, x: Array, breaks: Array) -> Counted:
    below, equal = (x < y).sum(0), (x == y).sum(0)
    return np.asarray(below + np.floor(breaks * (equal + 1)), np.int64)


def crps(truth: ArrayLike, draws: ArrayLike) -> Array:
    r"""The continuous ranked probability score of draws (D, ...) at the truth y (...), (...), 0 at best.

    $$\frac1D\sum_i |x_i - y| - \frac1{2D(D-1)}\sum_{ij} |x_i - x_j|$$

    It is fair: its mean is that of infinitely many draws (Ferro 2014). Draws that are one point give the absolute
    error. In the units of the values. Reference: Gneiting & Raftery 2007, eq. 20.

    >>> float(crps(1.0, [3.0, 3.0, 3.0]))
    2.0
    """
    return _crps(np.asarray(truth, np.float64), np.sort(np.asarray(draws, np.float64), axis=0))


def _crps(y: Array, ordered: Array) -> Array:
    n = len(ordered)
    # Of sorted numbers, each pair's difference is taken once.
    weights = (2 * np.arange(1, n + 1) - n - 1) / (n * max(n - 1, 1))
    return np.asarray(np.abs(ordered - y).mean(0) - np.tensordot(weights, ordered, 1))


class Ecdf(NamedTuple):
    """ECDF of ranks less that of the uniform distribution at `points` in (0, 1), and the band it ought to be in."""

    points: Array
    difference: Array
    low: Array
    high: Array

    @property
    def inside(self) -> bool:
        """Whether it is within the band everywhere."""
        # Both are quotients of the same whole numbers, but for rounding.
        return bool(((self.low - 1e-9 <= self.difference) & (self.difference <= self.high + 1e-9)).all())


def ecdf(histogram: ArrayLike, level: float = BAND) -> Ecdf:
    """The ranks' ECDF from how often each rank occurs, (draws + 1,); the band supposes that ranks are independent.

    Raises `InputError` where there is no rank.
    """
    counts = np.asarray(histogram, np.int64)
    n, size = int(counts.sum()), len(counts)
    if not n:
        raise InputError("Expected one rank or more; got none. Pass the histogram of the ranks of one fit or more.")
    cuts = np.unique(np.linspace(0, size, min(size, POINTS) + 1).round().astype(int))[1:-1]
    points = cuts / size
    low, high = band(n, tuple(points.tolist()), level)
    return Ecdf(points, counts.cumsum()[cuts - 1] / n - points, low / n - points, high / n - points)


@lru_cache(maxsize=64)
def band(n: int, points: tuple[float, ...], level: float = BAND) -> tuple[Counted, Counted]:
    r"""How many of `n` independent uniform numbers may be below each point, at all of them at once: a band.

    At each point the central interval of $\mathrm{Bin}(n, z_i)$ at one level $1 - \gamma$, with the largest $\gamma$
    such that a sample stays in all of them with probability `level` or more. That probability is exact: the counts at
    successive points are a Markov chain with binomial steps (Säilynoja et al. 2022, sections 3.1 and 3.2).
    """
    z, least, most = np.array(points), 0.0, 1 - level
    for _ in range(24):
        gamma = (least + most) / 2
        least, most = (gamma, most) if _stays(n, z, *_pointwise(n, z, gamma)) >= level else (least, gamma)
    return _pointwise(n, z, least)


def _pointwise(n: int, z: Array, gamma: float) -> tuple[Counted, Counted]:
    low, high = binom.ppf(gamma / 2, n, z), binom.ppf(1 - gamma / 2, n, z)
    return np.clip(low, 0, n).astype(np.int64), high.astype(np.int64)


def _stays(n: int, z: Array, low: Counted, high: Counted) -> float:
    """The probability that the counts of n uniform numbers below the points z stay within [low, high]."""
    log_factorial = gammaln(np.arange(n + 1) + 1.0)
    at, weight, before = np.zeros(1, np.int64), np.ones(1), 0.0
    for point, lowest, highest in zip(z, low, high, strict=True):
        to = np.arange(lowest, highest + 1)
        p, left, step = (point - before) / (1 - before), (n - at)[:, None], to - at[:, None]
        kept = np.where(step >= 0, step, 0)
        log_choose = log_factorial[left] - log_factorial[kept] - log_factorial[left - kept]
        chance = np.where(step >= 0, np.exp(log_choose + kept * math.log(p) + (left - kept) * math.log1p(-p)), 0.0)
        at, weight, before = to, weight @ chance, point
    return float(weight.sum())
