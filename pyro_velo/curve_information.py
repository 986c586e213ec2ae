r"""What cells tell of a gene's curve, and it of their times, where every cell has a time of its own for each gene.

With $J = \partial (\bar u, \bar s)/\partial x$, x the logarithms of the rates and the switching time, $\dot m$ the
slopes in time, and V the variances of the molecules, a cell in a state tells of its time, and of x if its time is not
known,

$$\lambda = \dot m^T V^{-1} \dot m, \qquad J^T V^{-1} J - \frac{(J^T V^{-1} \dot m)(J^T V^{-1} \dot m)^T}{\lambda}$$

which is the Fisher information, its nuisance projected off (Cox and Reid 1987).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor

from pyro_velo.batch import Batch
from pyro_velo.consensus import VAGUE, Sightings
from pyro_velo.disk import AnyCells
from pyro_velo.kinetics import T_MAX, Rates
from pyro_velo.likelihoods import QuickStudentT
from pyro_velo.models.velocity import C_K, RATES, Given, VelocityProgram
from pyro_velo.state_posterior import of_draw, posterior_of_states
from pyro_velo.times import Timed
from pyro_velo.train import Fitted

STEP, RELATIVE_STEP = 0.05, 1e-2
"""By which times, and the logarithms of rates, are moved to see what that changes."""
CELLS_GENES_AT_ONCE = 256 * 1024
ON_THE_WAY = (0, 2)
"""The states in which time passes."""


class Looked(NamedTuple):
    """What genes say of the times of some cells, and these of x, the logarithms of K sites.

    `information` (G, K, K) in float64 is a sum over the cells.
    """

    seen: Sightings
    information: Tensor


class Curve(NamedTuple):
    """Means and variances of both molecules in a state, (2, B, G) each.

    Where tails are heavy it is the variance that a Normal of the same Fisher information about its mean would have.
    """

    mean: Tensor
    variance: Tensor


def looked_at(
    fitted: Fitted, cells: AnyCells, index: Tensor, values: Mapping[str, Tensor], sites: Sequence[str]
) -> Looked:
    """The cells at `index` and the logarithms of `sites`, at the means of q(z) and gene-level sites at `values`."""
    size = max(1, CELLS_GENES_AT_ONCE // cells.n_genes)
    parts = [_look(fitted, batch, values, sites) for batch in cells.batches(index, size)]
    time, precision, probability = (torch.cat(each) for each in zip(*(part.seen[:3] for part in parts), strict=True))
    seen = parts[0].seen._replace(time=time, precision=precision, probability=probability)
    information = torch.stack([part.information for part in parts]).sum(0)
    return Looked(seen, information)


def _look(fitted: Fitted, batch: Batch, values: Mapping[str, Tensor], sites: Sequence[str]) -> Looked:
    """The same of some cells."""
    guide, program = fitted.guide, fitted.program
    z = guide.encode(batch).mean
    drawn = poutine.trace(guide.cells).get_trace(batch, dist.Delta(z, event_dim=1))
    values = {**values, "z": z, "pi": drawn.nodes["pi"]["value"]}
    timed = program.times(batch.conditioned(program.of_kinetics(z.squeeze(-2))), values["switch_time"], values)
    probability, _ = posterior_of_states(program.explain_at(timed, values, batch, of_draw(program, values)).log_joint)
    equal = Given(log_weights=(torch.zeros_like(batch.u),) * len(C_K))
    fits = program.explain_at(timed, values, batch, equal).log_joint
    here = curves(program, timed, values, batch)
    slopes = _slopes(program, timed, values, batch)
    responses = [_responses(program, timed, values, batch, name) for name in sites]
    precision, information = [], torch.zeros(())
    for state, (at, weight) in enumerate(zip(here, probability, strict=False)):
        scale = at.variance.clamp_min(torch.finfo(at.variance.dtype).tiny).rsqrt()
        j = torch.stack([each[state] * scale for each in responses], -1)
        along = slopes[state] * scale
        known = along.square().sum(0)
        if state in ON_THE_WAY:
            precision.append(known)
            # A gene that does not move tells nothing of its time, and its time nothing of the curve.
            unit = along * torch.where(known > 0, known, 1.0).rsqrt()
            j = j - unit[..., None] * (unit[..., None] * j).sum(0)
        j = (j * weight.sqrt()[..., None]).double().flatten(0, 1).permute(1, 2, 0)
        information = information + j @ j.mT
    time = torch.stack((timed.on, values["switch_time"] + timed.off), -1)
    known, switch = torch.stack(precision, -1), values["switch_time"]
    low, high = (
        torch.stack(ends, -1)
        for ends in ((torch.zeros_like(switch), switch), (switch, torch.full_like(switch, math.inf)))
    )
    return Looked(Sightings(time, known, _of_times(fits, known), low, high), information)


def _of_times(fits: Sequence[Tensor], precision: Tensor) -> Tensor:
    """How probable the states on the way are (B, G, 2), their times not held at where they fit best (Laplace).

    `fits`: each state's log p(u, s) there. A gene that is silent is as well before its rise, in a short time, as at any
    late time. States are as likely as under their prior: the encoder's own weights have seen these molecules already.
    """
    width = ((2 * math.pi / precision.clamp_min(VAGUE)).sqrt() / T_MAX).clamp_max(1)
    on, off = (fits[k] + width[..., i].log() for i, k in enumerate(ON_THE_WAY))
    probability, _ = posterior_of_states((on, fits[1], off, fits[3]))
    return torch.stack([probability[k] for k in ON_THE_WAY], -1)


def curves(program: VelocityProgram, timed: Timed, values: Mapping[str, Tensor], batch: Batch) -> list[Curve]:
    """What is expected of the batch in the states that are not empty."""
    rates = Rates(*(values[name] for name in RATES))
    means, found = program.means(rates, values, timed, program.landmarks(rates, values)), []
    for u, s, scale in zip(means.u[:3], means.s[:3], C_K, strict=False):
        pair = [_normal(each) for each in program.likelihoods(u, s, values, batch, scale)]
        found.append(Curve(*(torch.stack([x.expand(batch.u.shape) for x in each]) for each in zip(*pair, strict=True))))
    return found


def _normal(molecule: Any) -> tuple[Tensor, Tensor]:
    """Mean and variance of a Normal with the Fisher information about the mean that a likelihood has."""
    if isinstance(molecule, QuickStudentT):
        # Lange et al. 1989, appendix B; its own moments need not exist.
        return molecule.loc, molecule.scale**2 * (molecule.df + 3) / (molecule.df + 1)
    return molecule.mean, molecule.variance


def _slopes(program: VelocityProgram, timed: Timed, values: Mapping[str, Tensor], batch: Batch) -> list[Tensor]:
    """In time, by central differences, and next to time 0 by those that there is room for."""
    before, after = (Timed((timed.on + step).clamp_min(0), (timed.off + step).clamp_min(0)) for step in (-STEP, STEP))
    low, high = (curves(program, each, values, batch) for each in (before, after))
    length = (after.on - before.on, torch.full_like(timed.on, 2 * STEP), after.off - before.off)
    return [(b.mean - a.mean) / apart for a, b, apart in zip(low, high, length, strict=True)]


def _responses(
    program: VelocityProgram, timed: Timed, values: Mapping[str, Tensor], batch: Batch, name: str
) -> list[Tensor]:
    """To the logarithm of a site, by central differences, times staying as they are."""
    factors = (1 - RELATIVE_STEP, 1 + RELATIVE_STEP)
    below, above = (curves(program, timed, {**values, name: values[name] * by}, batch) for by in factors)
    return [(b.mean - a.mean) / (2 * RELATIVE_STEP) for a, b in zip(below, above, strict=True)]
