"""One draw of a fit, taken apart: what it says of the data, of each cell's latent vector, and of what cells share.

Call all of it under `evidence.conditions`. Sites are found by tracing, so it fits every model.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions.torch_distribution import MaskedDistribution
from pyro.distributions.util import scale_and_mask
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_velo.batch import Data, Minibatch
from pyro_velo.train import Fitted

Site = dict[str, Any]

CELLS_GENES_AT_ONCE = 256 * 1024
"""Cells x genes that are looked at together."""


class Given(Messenger):
    """Puts the values of some sites in place of what would be drawn."""

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.values = values

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        if msg["name"] in self.values:
            msg["value"], msg["done"] = self.values[msg["name"]], True


class Draw(NamedTuple):
    """The guide's draw, and the program at it."""

    guide: poutine.Trace
    program: poutine.Trace


def draw(fitted: Fitted, batch: Minibatch, given: Mapping[str, Tensor] | None = None) -> Draw:
    """Every site of a batch, but those of `given` as they are."""
    with Given(given or {}):
        guide = poutine.trace(fitted.guide).get_trace(batch)
        return Draw(guide, poutine.trace(poutine.replay(fitted.program, trace=guide)).get_trace(batch))


def sites(trace: poutine.Trace) -> Iterator[tuple[str, Site]]:
    """Every sample site, but not the plates' own."""
    for name, site in trace.nodes.items():
        if site["type"] == "sample" and not site_is_subsample(site):
            yield name, site


def plates(site: Site) -> set[str]:
    """The names of the plates that a site stands in."""
    return {frame.name for frame in site["cond_indep_stack"]}


def shared_values(drawn: Draw) -> dict[str, Tensor]:
    """What cells share, by site."""
    return {
        name: site["value"]
        for name, site in sites(drawn.program)
        if not site["is_observed"] and "cells" not in plates(site)
    }


def latent_sites(drawn: Draw) -> tuple[str, ...]:
    """The continuous sites that a cell has of its own, not by gene: its latent vector, or several of them.

    What a network merely says of a cell, at a masked site such as `y` of `encoders.Encoder`, is none.
    """
    return tuple(
        name
        for name, site in sites(drawn.program)
        if not site["is_observed"]
        and plates(site) == {"cells"}
        and site["value"].is_floating_point()
        and not isinstance(site["fn"], MaskedDistribution)
    )


def values(drawn: Draw, names: Sequence[str]) -> Tensor:
    """The latent vector of each cell, (rows, d), the sites one beside the other."""
    return torch.cat([_rows(drawn.program.nodes[name]["value"], _of_cells(drawn, name)) for name in names], -1)


def of_dimensions(drawn: Draw, names: Sequence[str], z: Tensor) -> dict[str, Tensor]:
    """Latent vectors (rows, d) as values of the sites that they are made of."""
    found, first = {}, 0
    for name in names:
        value = drawn.program.nodes[name]["value"]
        width = _rows(value, _of_cells(drawn, name)).shape[-1]
        found[name] = z[:, first : first + width].reshape(value.shape)
        first += width
    return found


class Latent(NamedTuple):
    """q(z | x) and p(z) of each cell by dimension, from one draw, (rows, d) each.

    `loc` and `scale` of q, which are NaN where it is no Normal; `log_q` and `log_p` at the draw; `kl` in closed form
    where there is one, else log_q - log_p, of which each dimension has the same share.
    """

    loc: Tensor
    scale: Tensor
    log_q: Tensor
    log_p: Tensor
    kl: Tensor


def latent(drawn: Draw, names: Sequence[str]) -> Latent:
    """What both programs say of the latent vector; of dimensions that are not independent, each the mean over all."""
    parts = [_latent(drawn, name) for name in names]
    return Latent(*(torch.cat(columns, -1) for columns in zip(*parts, strict=True)))


def _latent(drawn: Draw, name: str) -> Latent:
    dim, site = _of_cells(drawn, name), drawn.program.nodes[name]
    value = site["value"]
    q, p = (bare(trace.nodes[name]["fn"]) for trace in drawn)
    log_q, log_p = (_spread(fn.log_prob(value), value) for fn in (q, p))
    try:
        kl = _spread(torch.distributions.kl_divergence(q, p), value)
    except NotImplementedError:
        # Where p is a mixture, dimensions have no KL of their own.
        kl = _spread((log_q - log_p).sum(-1), value)
    normal = isinstance(q, dist.Normal)
    loc, scale = (x.expand_as(value) if normal else torch.full_like(value, math.nan) for x in moments(q))
    return Latent(*(_rows(each, dim).double() for each in (loc, scale, log_q, log_p, kl)))


def has_dimensions(drawn: Draw, name: str) -> bool:
    """Whether the KL of a latent site is a sum over its dimensions: where both of its distributions are."""
    return all(bare(trace.nodes[name]["fn"]).event_shape.numel() == 1 for trace in drawn)


def bare(fn: Any) -> Any:
    """A distribution without its event dimensions, which are then dimensions of its batch."""
    while isinstance(fn, dist.Independent):
        fn = fn.base_dist
    return fn


def moments(fn: Any) -> tuple[Tensor, Tensor]:
    """The mean and sd of a Normal; of others, one number twice that goes unused."""
    return (fn.loc, fn.scale) if isinstance(fn, dist.Normal) else (torch.zeros(()), torch.zeros(()))


def _spread(number: Tensor, value: Tensor) -> Tensor:
    """A number a dimension; a number a cell is shared out among its dimensions."""
    if number.ndim < value.ndim:
        return (number.unsqueeze(-1) / value.shape[-1]).expand_as(value)
    return number.expand_as(value)


def data_sites(drawn: Draw, left_out: Sequence[str]) -> Iterator[tuple[str, Site]]:
    """The observed sites of cells that are data: neither a KL in closed form, nor a penalty, nor computed."""
    for name, site in sites(drawn.program):
        marked = site["infer"].get("kl") or "penalty" in site["infer"]
        if site["is_observed"] and "cells" in plates(site) and not marked and name not in left_out:
            yield name, site


def log_likelihood(drawn: Draw, left_out: Sequence[str] = ()) -> Tensor:
    """Log p(x | z, ...) of each cell and gene, (rows, G); one column where the data have no genes' plate."""
    total: Tensor | None = None
    for _, site in data_sites(drawn, left_out):
        dim = next(frame.dim for frame in site["cond_indep_stack"] if frame.name == "cells")
        found = log_density(site).movedim(dim, 0)
        found = found.flatten(1).double() if found.ndim > 1 else found[:, None].double()
        if "genes" not in plates(site):
            found = found.sum(1, keepdim=True)
        total = found if total is None else total + found
    assert total is not None
    return total


def cells_kl(drawn: Draw) -> Tensor:
    """Log q - log p of all that a cell has of its own, and its KLs in closed form: (rows,), one draw's KL."""
    total = torch.zeros((), dtype=torch.float64)
    for trace, sign in ((drawn.guide, 1), (drawn.program, -1)):
        for _, site in sites(trace):
            if "cells" in plates(site) and (not site["is_observed"] or site["infer"].get("kl")):
                dim = next(frame.dim for frame in site["cond_indep_stack"] if frame.name == "cells")
                found = log_density(site).movedim(dim, 0)
                total = total + sign * found.reshape(len(found), -1).sum(1, dtype=torch.float64)
    return total


def log_density(site: Site) -> Tensor:
    """At weight 1: whatever a plate or a handler would scale it by is left away."""
    return scale_and_mask(site["fn"].log_prob(site["value"]), mask=site["mask"])


def chosen_cells(n_cells: int, count: int, seed: int) -> Tensor:
    """The numbers of `count` cells, or of all of them, in random order."""
    return torch.randperm(n_cells, generator=torch.Generator().manual_seed(seed))[:count]


def parts(cells: Data, index: Tensor, n_train: int) -> Iterator[Any]:
    """The cells at `index` in batches of like size that fit into memory."""
    size = max(2, CELLS_GENES_AT_ONCE // cells.n_genes)
    for part in index.to(cells.device).tensor_split(math.ceil(len(index) / size)):
        yield cells.batch(part, n_train)


def _of_cells(drawn: Draw, name: str) -> int:
    """The dimension of the cells in a site's value."""
    site = drawn.program.nodes[name]
    dim = next(frame.dim for frame in site["cond_indep_stack"] if frame.name == "cells")
    return dim - site["fn"].event_dim


def _rows(value: Tensor, dim: int) -> Tensor:
    """A value with the cells first, the rest flat: (rows, d)."""
    value = value.movedim(dim, 0)
    return value.reshape(len(value), -1)
