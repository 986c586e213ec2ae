r"""How well a fit explains cells that it was not trained on: two bounds and a predictive density, per cell.

Every draw takes the gene-level sites once and K latent vectors of each cell, each with its importance weight

$$w_{rk} = \frac{p(x_n, z_k \mid \theta_r)}{q(z_k \mid x_n, \theta_r)}, \qquad \theta_r \sim q(\theta), z_k \sim q(z)$$

Which sites are a cell's and which are shared is found by tracing: a cell's are those in the plate `cells`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from numpy.typing import NDArray
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_velo.batch import Data, Minibatch
from pyro_velo.errors import InputError
from pyro_velo.forensics import NonFiniteError, blame
from pyro_velo.schedule import WithoutPenalties
from pyro_velo.train import Fitted, split

Array = NDArray[np.float64]
Site = dict[str, Any]

PARTICLES, DRAWS = 50, 5
"""Latent vectors for each draw of the gene-level sites, and such draws."""
DRAWS_OF_GENES = 50
"""Draws of the gene-level KL, of which each costs one cell."""
CELLS_GENES_AT_ONCE = 256 * 1024
"""Cells x latent vectors x genes that are looked at together: some 100 MiB."""


@dataclass(frozen=True)
class Evidence:
    r"""Nats for each held-out cell, (cells,) each, at KL weight 1 and without penalties.

    | | with KL = KL(q(theta) \|\| p(theta)) and N training cells |
    |---|---|
    | `elbo` | $E_{rk}[\log w_{rk}] - \mathrm{KL}/N$ |
    | `iw_bound` | $E_r[\log\frac1K\sum_k w_{rk}] - \mathrm{KL}/N$ (Burda et al. 2016, eq. 8) |
    | `density` | $\log E_{rk}[w_{rk}]$: the log predictive density of the cell, given the training cells |

    So elbo <= iw_bound <= density - KL/N, to the bit, and `elbo` and `iw_bound` are below the log evidence. `sites` are
    the latent sites that all cells share. `no_kl` are those of them without a KL, because the guide holds them at a
    point or their prior is improper: then both bounds are none, and only `density` can be compared. `left_out` are
    observed sites whose value is computed from parameters: what the model says of itself, which is no data.
    """

    elbo: Array
    iw_bound: Array
    density: Array
    particles: int
    sites: tuple[str, ...]
    no_kl: tuple[str, ...]
    left_out: tuple[str, ...]


@torch.no_grad()
def evidence(fitted: Fitted, cells: Data, *, particles: int = PARTICLES, draws: int = DRAWS, seed: int = 0) -> Evidence:
    """Score the held-out cells of a fit on `cells`, with `draws` of the gene-level sites and `particles` a cell each.

    The noise is the same for the same seed. Memory does not grow with the number of cells.

    The states' families differ in how tight their bound is: `iw_bound` closes what the cells' sampled sites leave open,
    not the gap of a closed form (`Collapsed`).

    Raises `InputError` for fewer than two held-out cells, and `NonFiniteError`, naming site and gene, for NaN.
    """
    train_index, index = held_out(fitted, len(cells))
    device, n_train = cells.device, len(train_index)
    with conditions(fitted, cells, seed):
        genes = _look_at_genes(fitted, cells.batch(index[:1].to(device), n_train))
        size = max(1, CELLS_GENES_AT_ONCE // (particles * cells.n_genes))
        # The same cell K times in one batch: K draws of its own sites, for one draw of those that cells share.
        rows = (part.repeat_interleave(particles) for part in index.to(device).split(size))
        batches = (cells.batch(each, n_train) for each in rows)
        weights = (log_weights(fitted, batch, draws, genes.left_out, steps_of(fitted, len(cells))) for batch in batches)
        parts = [_estimates(each.unflatten(1, (-1, particles))) for each in weights]
    elbo, iw_bound, density = torch.cat(parts, 1).cpu().numpy()
    share = genes.kl / n_train
    return Evidence(elbo - share, iw_bound - share, density, particles, genes.sites, genes.no_kl, genes.left_out)


@contextmanager
def conditions(fitted: Fitted, cells: Data, seed: int) -> Iterator[None]:
    """Under which a fit is judged: its parameters, no penalties, no validation; random numbers from `seed`.

    Afterwards the generators go on as if nothing had been drawn.
    """
    noise = torch.random.fork_rng([cells.device] if cells.device.type == "cuda" else [])
    with fitted.parameters(), WithoutPenalties(), pyro.validation_enabled(False), noise:
        torch.manual_seed(seed)
        yield


def held_out(fitted: Fitted, n_cells: int) -> tuple[Tensor, Tensor]:
    """Indices of the cells that a fit was trained on, and of those that it was not; two of these at least."""
    settings = fitted.training.settings
    return checked_split(n_cells, settings.held_out, settings.seed)


def checked_split(n_cells: int, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """As `train.split`; raises `InputError` for fewer than two held-out cells, whose mean has no standard error."""
    train_index, index = split(n_cells, share, seed)
    if len(index) < 2:
        raise InputError(
            f"Expected 2 held-out cells or more to score; got {len(index)}, a share of {share} of {n_cells} cells. "
            "Raise held_out in TrainSettings, or pass more cells."
        )
    return train_index, index


def steps_of(fitted: Fitted, n_cells: int) -> int:
    """The gradient steps that a fit on `n_cells` cells was trained for."""
    n_train = len(held_out(fitted, n_cells)[0])
    return fitted.training.epoch * max(1, math.ceil(n_train / fitted.training.settings.batch_size))


@dataclass(frozen=True)
class _Genes:
    """What the shared sites are; see `Evidence`."""

    kl: float
    sites: tuple[str, ...]
    no_kl: tuple[str, ...]
    left_out: tuple[str, ...]


def _look_at_genes(fitted: Fitted, batch: Minibatch) -> _Genes:
    """The KL of the shared sites, in nats, and which of all sites are not what they seem: from one cell."""
    guide, program = _traces(fitted, batch)
    shared = {name: site for name, site in _sites(program) if not _cells_dim(site) and not site["is_observed"]}
    points, total = set(shared), 0.0
    for _ in range(DRAWS_OF_GENES):
        guide, program = _traces(fitted, batch)
        total += (_of_genes(guide) - _of_genes(program)).item()
        points -= {name for name in points if not torch.equal(program.nodes[name]["value"], shared[name]["value"])}
    improper = {name for name, site in shared.items() if _is_improper(site["fn"])}
    no_kl = tuple(name for name in shared if name in points | improper)
    return _Genes(total / DRAWS_OF_GENES, tuple(shared), no_kl, computed_sites(fitted, batch))


def computed_sites(fitted: Fitted, batch: Minibatch) -> tuple[str, ...]:
    """The observed sites of cells whose value hangs on a parameter: what the model says of itself, which is no data."""
    with torch.enable_grad():
        _, program = _traces(fitted, batch)
    observed = ((name, site) for name, site in _sites(program) if site["is_observed"] and _cells_dim(site))
    return tuple(name for name, site in observed if site["value"].requires_grad)


def log_weights(fitted: Fitted, batch: Minibatch, draws: int, left_out: tuple[str, ...], step: int) -> Tensor:
    r"""$\log w$ of each row of a batch under each of `draws` draws of the gene-level sites, (draws, rows) float64.

    A row is a cell with latent vectors of its own; `left_out` are sites that do not count (`computed_sites`). Call it
    under `conditions`. Raises `NonFiniteError`, naming site and gene, for NaN; `step` is for its message.
    """
    found = []
    for _ in range(draws):
        before = torch.get_rng_state()
        guide, program = _traces(fitted, batch)
        log_weight = _of_cells(program, left_out) - _of_cells(guide, left_out)
        if not torch.isfinite(log_weight).all():
            torch.set_rng_state(before)
            raise NonFiniteError(blame(fitted.program, fitted.guide, batch, {}), step=step)
        found.append(log_weight)
    return torch.stack(found)


def _estimates(log_weights: Tensor) -> Tensor:
    """ELBO, bound and density, without the genes' KL, (3, cells), from (draws, cells, particles)."""
    draws, _, particles = log_weights.shape
    elbo = log_weights.mean((0, 2))
    iw_bound = (log_weights.logsumexp(2) - math.log(particles)).mean(0)
    density = log_weights.logsumexp((0, 2)) - math.log(draws * particles)
    return torch.stack((elbo, iw_bound, density))


def _traces(fitted: Fitted, batch: Minibatch) -> tuple[poutine.Trace, poutine.Trace]:
    """Of the guide, and of the program at its draw."""
    guide = poutine.trace(fitted.guide).get_trace(batch)
    return guide, poutine.trace(poutine.replay(fitted.program, trace=guide)).get_trace(batch)


def _sites(trace: poutine.Trace) -> Iterator[tuple[str, Site]]:
    """Every sample site, but not the plates' own."""
    for name, site in trace.nodes.items():
        if site["type"] == "sample" and not site_is_subsample(site):
            yield name, site


def _cells_dim(site: Site) -> int | None:
    """The dimension of the plate `cells`, which is negative; None for a site that cells share."""
    return next((frame.dim for frame in site["cond_indep_stack"] if frame.name == "cells"), None)


def _log_density(site: Site) -> Tensor:
    """At weight 1: whatever a plate or a handler would scale it by is left away."""
    return scale_and_mask(site["fn"].log_prob(site["value"]), mask=site["mask"])


def _of_genes(trace: poutine.Trace) -> Tensor:
    """The log-density of what cells share."""
    shared = (site for _, site in _sites(trace) if not _cells_dim(site))
    return sum((_log_density(site).sum(dtype=torch.float64) for site in shared), torch.zeros(()))


def _of_cells(trace: poutine.Trace, left_out: tuple[str, ...]) -> Tensor:
    """The log-density of each cell's own sites, (rows,); summed in float64, because genes are many."""
    total = torch.zeros(())
    for name, site in _sites(trace):
        dim = _cells_dim(site)
        if dim is not None and name not in left_out:
            log_density = _log_density(site).movedim(dim, 0)
            total = total + log_density.reshape(len(log_density), -1).sum(1, dtype=torch.float64)
    return total


def _is_improper(fn: Any) -> bool:
    """Whether a prior is flat, whatever it is wrapped in."""
    while not isinstance(fn, dist.ImproperUniform) and hasattr(fn, "base_dist"):
        fn = fn.base_dist
    return isinstance(fn, dist.ImproperUniform)
