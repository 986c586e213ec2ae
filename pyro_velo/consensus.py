r"""The clock that genes agree on, where each has a time of its own, and how fast each gene's time runs against it.

Of a cell n, gene g says that it is $t_{ng}$ after it came on, to a precision $\lambda_{ng}$: the Fisher information of
its molecules. If all genes follow one clock, one that comes on at $o_g$ and whose time runs $c_g$ times as fast says

$$t_{ng} \sim \mathcal{N}\big(c_g (T_n - o_g),\; \lambda_{ng}^{-1} + \sigma_g^2\big)$$

with a probability, and anything in [0, 20] else: a gene may follow the clock in some of the cells alone, those of a
lineage for instance, and the end of a gene's curve looks like its beginning. T, c, o and $\sigma$ are the most probable
ones, by expectation maximisation. The unit of T is that in which cells are spread as if they were uniform on [0, 20].

Once the clock is found, a gene's pace is read off the way up and the way down with an onset $o$ for each: how long a
gene stayed at its steady state in between no molecule tells. At the ends of both a gene's time has nowhere to go but
inwards, so that cells within an sd of them are left out.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_velo.kinetics import T_MAX

ASTRAY = 0.1
"""How likely it is beforehand that a gene does not follow the clock in a cell."""
ROUNDS, STEPS, STEPS_APART = 6, 5, 10
"""Rounds of cells and genes in turn; steps of the genes in each, and with the ways up and down apart at the end."""
PLACES = 51
"""Times, equally far apart, at which every cell is looked for."""
WINDOWS = 6
"""Parts of equal information of a gene's time, between which its pace is compared."""
PACES = (0.05, 20.0)
"""The slowest and the fastest time of a gene."""
SCATTERS = (0.03, 5.0)
"""The least and the most that a gene deviates from the clock, in units of time."""
START_SCATTER = 2.0
REACH = 0.9
"""The share of [0, 20] up to which a gene's own time is free to follow the clock: it ends at 20, and is 0 at first."""
DECISIVE = 0.99
"""The share of the clock from which on a gene is the clock, against which it can't be held."""
VAGUE = 1e-6
"""The least precision of a gene's time: a gene that has none does not tell the time."""


class Sightings(NamedTuple):
    """What genes say of cells' times, each of two states, on the way up and down: (N, G, 2).

    `time` since the gene came on, the `precision` of it, and the `probability` of the state; and between which times a
    gene is in the state, `low` and `high` (G, 2).
    """

    time: Tensor
    precision: Tensor
    probability: Tensor
    low: Tensor
    high: Tensor


class Pace(NamedTuple):
    """A gene's time against the clock: `pace` c (G,), each state's `onset` o (G, 2), and the sd `scatter` (G,)."""

    pace: Tensor
    onset: Tensor
    scatter: Tensor


class Consensus(NamedTuple):
    """The clock: `time` (N,) of cells, and `pace` (G,) of genes, its error in units of itself (`variation`).

    `variation` is infinite where too little is known, or a gene runs against the others. `of_clock` is the error of the
    clock's own unit, which is a matter of where cells happen to be: genes share it.
    """

    time: Tensor
    pace: Tensor
    variation: Tensor
    of_clock: Tensor


def consensus(seen: Sightings) -> Consensus:
    """The clock on which genes agree most."""
    time = T_MAX * _ranks(_ranks(_likeliest(seen)).mean(1))
    ones = torch.ones_like(seen.time[0, :, 0])
    genes = Pace(ones, torch.zeros_like(seen.time[0]), START_SCATTER * ones)
    for _ in range(ROUNDS):
        for _ in range(STEPS):
            genes = paced(seen, time, genes)
        time = in_unit(placed(seen, genes))
    for _ in range(STEPS):
        genes = paced(seen, time, genes)
    for _ in range(STEPS_APART):
        genes = paced(seen, time, genes, apart=True)
    weight, variance = _followed(seen, time, genes, inside=True)
    information = weight / variance
    # Both states' times as if they had come on at time 0.
    since = seen.time + genes.pace[:, None] * genes.onset
    own = (information * since).sum(-1) / information.sum(-1)
    of_clock = error_of_unit(time)
    varies, influence = variation(information.sum(-1), own, time), _influence(information, genes)
    varies = varies / (1 - influence)
    inside = (genes.pace > PACES[0]) & (genes.pace < PACES[1])
    # A gene that runs backwards, or hardly, follows no clock; nor does any where cells cannot be put in order.
    known = inside & of_clock.isfinite() & varies.isfinite() & (influence < DECISIVE)
    varies = torch.where(known, varies, math.inf)
    return Consensus(time, genes.pace, varies, of_clock.nan_to_num(0.0, posinf=0.0))


def paced(seen: Sightings, time: Tensor, genes: Pace, *, apart: bool = False) -> Pace:
    """One step of expectation maximisation of the genes, the time of the cells (N,) given.

    With `apart` the two states have onsets of their own, and cells at the ends of a state are left out.
    """
    weight, variance = _followed(seen, time, genes, inside=apart)
    information = weight / variance
    over = (0,) if apart else (0, 2)
    total = information.sum(over, keepdim=True)
    at = time[:, None, None]
    middle, own_middle = (
        ((information * each).sum(over, keepdim=True) / total).nan_to_num(0.0) for each in (at, seen.time)
    )
    off = at - middle
    pace = (information * off * (seen.time - own_middle)).sum((0, 2)) / (information * off**2).sum((0, 2))
    pace = pace.nan_to_num(1.0).clamp(*PACES)
    # A state that no cell is in has the onset of before.
    onset = torch.where(total > 0, middle - own_middle / pace[:, None], genes.onset)[0]
    # What is left is the gene's own deviation and an error of known variance: the first's expectation.
    miss = seen.time - pace[:, None] * (at - onset)
    share = genes.scatter[:, None] ** 2 / variance
    expected = share**2 * miss**2 + genes.scatter[:, None] ** 2 * (1 - share)
    scatter = ((weight * expected).sum((0, 2)) / weight.sum((0, 2))).sqrt().nan_to_num(START_SCATTER)
    return Pace(pace, onset, scatter.clamp(*SCATTERS))


def placed(seen: Sightings, genes: Pace) -> Tensor:
    """The most probable time of each cell (N,) in [0, 20], the genes given."""
    places, variance = torch.linspace(0, T_MAX, PLACES).to(seen.time), _variance(seen, genes)
    height, sharpness = seen.probability * _height(variance), -0.5 / variance
    astray = ASTRAY / T_MAX * seen.probability.sum(-1)

    def log_density(at: Tensor) -> Tensor:
        """Of what genes say, if all cells stand at one time: (N,)."""
        density = (height * torch.exp(sharpness * _miss(seen, at, genes) ** 2)).sum(-1) + astray
        return density.clamp_min(torch.finfo(density.dtype).tiny).log().sum(1)

    log_p = torch.stack([log_density(at) for at in places], 1)
    best = log_p.argmax(1).clamp(1, PLACES - 2)
    before, at, after = (log_p.gather(1, (best + i)[:, None])[:, 0] for i in (-1, 0, 1))
    # The top of the parabola through three neighbours.
    bend = (2 * at - before - after).clamp_min(torch.finfo(at.dtype).tiny)
    return places[best] + (places[1] - places[0]) * (0.5 * (after - before) / bend).clamp(-0.5, 0.5)


def in_unit(time: Tensor) -> Tensor:
    """The time (N,), stretched and moved to where cells are uniform on [0, 20]."""
    uniform, middle = T_MAX * _ranks(time), time.mean()
    off = time - middle
    stretch = (off @ uniform) / (off @ off).clamp_min(torch.finfo(off.dtype).tiny)
    return T_MAX / 2 + stretch * off


def error_of_unit(time: Tensor) -> Tensor:
    r"""The sd of the stretch of `in_unit`, from how far cells are from uniform.

    Of N cells that are uniform, ranks are off by a Brownian bridge. The slope that it has against time has the variance
    1/(5N), and what is left of it around that slope the mean square 1/(15N): a third.
    """
    return (3 * (T_MAX * _ranks(time) - time).square().mean()).sqrt() / T_MAX


def variation(information: Tensor, own: Tensor, time: Tensor) -> Tensor:
    """The error (sd) of the pace of times `own` (N, G) against `time` (N,), in units of it: (G,).

    The times of neighbouring cells go astray together, as curves do that have the wrong shape. So errors of the pace
    do not average out over cells, but over `WINDOWS` of equal `information` (N, G), in which the pace is compared.
    Infinite where there is too little of that.
    """
    order = time.argsort(stable=True)
    information, own, time = information[order], own[order].nan_to_num(0.0), time[order, None]
    window = (information.cumsum(0) / information.sum(0) * WINDOWS).nan_to_num(0.0).long().clamp(0, WINDOWS - 1)
    sums = information.new_zeros(3, WINDOWS, information.shape[1])
    for into, values in zip(sums, (information, information * time, information * own), strict=True):
        into.scatter_add_(0, window, values)
    steps, own_steps = (sums[1:] / sums[0]).diff(dim=1)
    length = steps / steps.sum(0)
    mean = (length * own_steps / steps).sum(0)
    spread = (length * (own_steps / steps - mean) ** 2).sum(0) / (WINDOWS - 2)
    error = 1 / (information * (time - time.mean()) ** 2).sum(0)
    found = torch.where(mean > 0, (spread + error).sqrt() / mean, math.inf)
    return found.nan_to_num(math.inf, posinf=math.inf)


def _influence(information: Tensor, genes: Pace) -> Tensor:
    """Which share of the clock that a gene is held against is its own, (G,): by 1 - this its misses are too small."""
    own = genes.pace**2 * information.sum(-1)
    share = own / own.sum(1, keepdim=True).clamp_min(torch.finfo(own.dtype).tiny)
    return ((own * share).sum(0) / own.sum(0)).nan_to_num(0.0)


def _followed(seen: Sightings, time: Tensor, genes: Pace, *, inside: bool = False) -> tuple[Tensor, Tensor]:
    """How probable it is that a gene is in a state and follows the clock, and the variance of its time then.

    `inside`: as far as it is an sd from the state's ends.
    """
    density, variance = _density(seen, time[:, None, None], genes)
    expected = genes.pace[:, None] * (time[:, None, None] - genes.onset)
    within = (expected > 0) & (expected < REACH * T_MAX)
    if inside:
        error = seen.precision.clamp_min(VAGUE).rsqrt()
        within = within & (expected > seen.low + error) & (expected < seen.high - error)
    return within * seen.probability * density / (density + ASTRAY / T_MAX), variance


def _density(seen: Sightings, time: Tensor, genes: Pace) -> tuple[Tensor, Tensor]:
    """Of the genes' times under the clock, and their variances, (N, G, 2)."""
    variance = _variance(seen, genes)
    return torch.exp(-0.5 * _miss(seen, time, genes) ** 2 / variance) * _height(variance), variance


def _variance(seen: Sightings, genes: Pace) -> Tensor:
    return 1 / seen.precision.clamp_min(VAGUE) + genes.scatter[:, None] ** 2


def _miss(seen: Sightings, time: Tensor, genes: Pace) -> Tensor:
    return seen.time - (genes.pace[:, None] * (time - genes.onset)).clamp(0, T_MAX)


def _height(variance: Tensor) -> Tensor:
    return (2 * math.pi * variance).rsqrt()


def _likeliest(seen: Sightings) -> Tensor:
    """The time in the likelier of the two states, (N, G)."""
    return seen.time.gather(-1, seen.probability.argmax(-1, keepdim=True))[..., 0]


def _ranks(values: Tensor) -> Tensor:
    """Ranks along the first axis, in (0, 1)."""
    ordered = values.argsort(dim=0, stable=True).argsort(dim=0)
    return (ordered.to(values.dtype) + 0.5) / len(values)
