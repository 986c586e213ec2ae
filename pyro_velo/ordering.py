r"""The order of the cells along one time for all genes, before any fit, and each gene's curve along it.

A fit of a shared time stays near the order that it starts in. `rough_order` looks at each cell alone, `flow` at
neighbours; `improved` takes the one whose curves miss least, and puts each cell where its genes' curves are nearest.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_velo.batch import Cells
from pyro_velo.kinetics import T_MAX, Rates, trajectory

BINS = 50
"""How many groups of cells, one after the other in time, are averaged before a curve is laid through them."""
ONSETS = tuple(T_MAX * share for share in (0.01, *(i / 10 for i in range(1, 9))))
SWITCHES = tuple(T_MAX * share for share in (0.05, *(i / 10 for i in range(1, 10))))
FASTER = (0.5, 1.0, 2.0, 4.0, 8.0)
STEEPER = (0.5, 1.0, 2.0)
ROUNDS = 3
REACH = 0.2
"""How far a cell may move in a round: where genes are off at the end as at the beginning, one looks like the other."""
ELEMENTS_AT_ONCE = 1 << 16
"""Bins x genes x curves that fit into a processor's cache."""
MIN_CELLS = 3
"""Through fewer no parabola goes."""
ENOUGH = 0.01
"""The share by which a round must lower the squares that curves miss, or it is the last."""


class Curves(NamedTuple):
    """Each gene's `rates` and `onset` (G,), and its curves at the middle of each bin of time: two times (bins, G)."""

    rates: Rates
    onset: Tensor
    unspliced: Tensor
    spliced: Tensor


def rough_order(u: Tensor, s: Tensor, rates: Rates) -> Tensor:
    r"""The cells' order in [0, 1] by their phase portraits, before any fit: u and s (B, G) in one unit; returns (B,).

    A cell above a gene's steady-state line is on the way up, as far as its spliced level, and below it on the way down.
    Genes count by their distance from the line: near it they don't know.
    """
    full_u = rates.alpha / rates.beta
    up, level = u / full_u, (s * rates.gamma / rates.alpha).clamp(0, 1)
    lead = up - s * rates.gamma / rates.alpha
    phase = torch.where(lead > 0, level, 2 - level)
    weight = lead.abs()
    return ranks((weight * phase).sum(-1) / weight.sum(-1).clamp_min(torch.finfo(u.dtype).tiny))


def ranks(values: Tensor) -> Tensor:
    """The ranks of values (N,), of equal ones in the order in which they come, from 0 to 1."""
    return values.argsort(stable=True).argsort().to(values) / max(1, len(values) - 1)


def by_phase(cells: Cells, start: Rates) -> Tensor:
    """`rough_order` of all cells, (N,)."""
    u, s = cells.scaled
    return rough_order(u * cells.ratio, s, start)


def improved(cells: Cells, orders: Sequence[Tensor], start: Rates) -> Tensor:
    """The best of some orders (N,), made better: in turns curves laid along it and cells moved closer to these.

    The squares by which cells miss the curves at their place never grow; both molecules count in units of their range.
    An order, and a round, take about 6 s of one core for 2,000 genes, whatever the number of cells.
    """
    if len(cells) < MIN_CELLS:
        return orders[0]
    scored = [_scored(cells, order, start) for order in orders]
    missed, order, curves = min(scored, key=lambda found: found[0])
    for _ in range(ROUNDS):
        now, moved, along = _scored(cells, nearest(cells, curves, order), start)
        if now >= missed:
            break
        last, missed, order, curves = missed, now, moved, along
        if now > (1 - ENOUGH) * last:
            break
    return order


def nearest(cells: Cells, curves: Curves, order: Tensor) -> Tensor:
    """The cells' order (N,) in [0, 1] by where genes' curves are nearest, within `REACH` of their place in `order`."""
    distances, n_bins = _distances(cells, curves), len(curves.spliced)
    place = (torch.arange(n_bins, device=order.device, dtype=order.dtype) + 0.5) / n_bins
    too_far = (place - order[:, None]).abs() > REACH
    middle = distances.masked_fill(too_far, float("inf")).argmin(1).clamp(1, n_bins - 2)
    before, at, after = (distances.gather(1, (middle + i)[:, None])[:, 0] for i in (-1, 0, 1))
    # The lowest point of the parabola through three neighbours.
    bend = (before - 2 * at + after).clamp_min(torch.finfo(at.dtype).tiny)
    return ranks(middle + (0.5 * (before - after) / bend).clamp(-1, 1))


def curves_along(cells: Cells, order: Tensor, start: Rates) -> Curves:
    """Each gene's best of a grid of curves, if `order` (N,) is the cells' order in a time that all genes share.

    The grid: `ONSETS`, `SWITCHES` after them, beta `FASTER` and gamma `STEEPER` than the start; alpha by least squares,
    both molecules in units of their range.
    """
    sequence = order.argsort(stable=True)
    u, s = (_in_bins(x[sequence]) for x in cells.scaled)
    t = T_MAX * (torch.arange(len(u), device=u.device, dtype=u.dtype)[:, None] + 0.5) / len(u)

    def laid(onset: Tensor, switch: Tensor, faster: Tensor, steeper: Tensor) -> tuple[Curves, Tensor]:
        """Curves of these shapes, (..., bins, G), and by how much they miss, (..., 1, G)."""
        beta, gamma = faster * start.beta, faster * steeper * start.gamma
        rates = Rates(torch.ones_like(beta), beta, gamma, switch.expand_as(beta))
        curve_u, curve_s = trajectory(rates, (t - onset).clamp_min(0))
        curve_u = curve_u / cells.ratio
        squares, common = (curve_u**2 + curve_s**2).sum(-2, keepdim=True), curve_u * u + curve_s * s
        # Curves of some height: a gene that is never seen has none to be laid through.
        alpha = (common.sum(-2, keepdim=True) / squares).clamp_min(1e-3)
        curve_u, curve_s = alpha * curve_u, alpha * curve_s
        curves = Curves(rates._replace(alpha=alpha), onset.expand_as(alpha), curve_u, curve_s)
        return curves, ((curve_u - u) ** 2 + (curve_s - s) ** 2).sum(-2, keepdim=True)

    grid = u.new_tensor([shape for shape in product(ONSETS, SWITCHES, FASTER, STEEPER) if shape[0] + shape[1] <= T_MAX])
    at_once = grid.split(max(1, ELEMENTS_AT_ONCE // u.numel()))
    missed = torch.cat([laid(*shapes.T[..., None, None])[1] for shapes in at_once])
    (rates, onset, *curves), _ = laid(*grid[missed[:, 0].argmin(0)].T[:, None])
    return Curves(Rates(*(rate[0] for rate in rates)), onset[0], *curves)


def _scored(cells: Cells, order: Tensor, start: Rates) -> tuple[float, Tensor, Curves]:
    """The squares by which all cells miss the curves along an order, each at its own place in it."""
    curves = curves_along(cells, order, start)
    distances, n_bins = _distances(cells, curves), len(curves.spliced)
    own = torch.arange(len(order), device=order.device).tensor_split(n_bins)
    bins = torch.cat([torch.full_like(part, i) for i, part in enumerate(own)])
    return distances[order.argsort(stable=True), bins].sum(dtype=torch.float64).item(), order, curves


def _distances(cells: Cells, curves: Curves) -> Tensor:
    """Squared, of every cell from every bin's point on all genes' curves: (N, bins)."""
    return sum(
        x.square().sum(1, keepdim=True) + curve.square().sum(1) - 2 * x @ curve.T
        for x, curve in zip(cells.scaled, (curves.unspliced, curves.spliced), strict=True)
    )


def _in_bins(values: Tensor) -> Tensor:
    """Means of `BINS` groups of consecutive rows, or fewer where there are fewer: (N, G) to (bins, G)."""
    return torch.stack([part.mean(0) for part in values.tensor_split(min(BINS, len(values)))])
