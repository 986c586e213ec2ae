"""What single genes do to a fit: their share of the loss, how far their rates are from the prior, and bounds."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pyro import poutine
from torch import Tensor
from torch.distributions import biject_to

from pyro_velo.batch import Data
from pyro_velo.disk_profiles import AnyProfiles
from pyro_velo.doctor import draws as taken
from pyro_velo.evidence import computed_sites, conditions
from pyro_velo.kinetics import T_MAX
from pyro_velo.models.decoding import Decoding
from pyro_velo.train import Fitted

Array = NDArray[np.float64]

CELLS, DRAWS, PRIOR_DRAWS = 256, 20, 1000
AT_BOUND = 0.01
"""A switching time is at a bound where it is this near to 0 or to 20, as a share of the 20."""
FAR = 3.0
"""Prior sds from the prior's mean beyond which 0.3 % of a Normal lie."""


@dataclass(frozen=True)
class Site:
    """One gene-level site on its unconstrained scale, on which Normals are free: (values,), one or more a gene.

    `distance`: posterior mean less prior mean, in prior sds. `kl`: of Normals with the moments of posterior and prior,
    in nats.
    """

    name: str
    distance: Array
    kl: Array

    @property
    def median(self) -> float:
        """The median distance over genes, whichever way: how far the prior is off as a whole."""
        return float(abs(np.median(self.distance)))

    @property
    def far(self) -> float:
        """The share of values beyond three prior sds."""
        return float((np.abs(self.distance) > FAR).mean())


@dataclass(frozen=True)
class Genes:
    r"""Figures of the G fitted genes.

    `loss_share` (G,): of the mean absolute deviation of $\log p(x_{ng})$ over cells n, which no unit of a gene changes
    that its noise follows. `input_share` (G,): of the mean square of what an encoder sees, and so of the
    squared gradient of its first layer, which is that times the gradient of the layer's outputs. `sites`: those with a
    proper prior. `at_bound`: the share of switching times within 0.2 of 0 or of 20. `noise` (G,): the smaller sd of a
    gene's molecules, in units of its range, of a profile's gene in its sds; empty where the likelihood has none.
    """

    loss_share: Array
    input_share: Array
    sites: tuple[Site, ...]
    at_bound: float
    noise: Array


@torch.no_grad()
def genes(fitted: Fitted, cells: Data, *, seed: int = 0) -> Genes:
    """Measure the genes of a fit on up to `CELLS` of its `cells`, over `DRAWS` draws of what cells share."""
    index = taken.chosen_cells(len(cells), CELLS, seed)
    with conditions(fitted, cells, seed):
        first = cells.batch(index[:1].to(cells.device))
        left_out = computed_sites(fitted, first)
        looks = [
            taken.log_likelihood(taken.draw(fitted, batch), left_out) for batch in taken.parts(cells, index, len(cells))
        ]
        priors = taken.draw(fitted, first).program
        names = [name for name in taken.shared_values(taken.Draw(priors, priors)) if _of_genes(priors.nodes[name])]
        drawn = [poutine.trace(fitted.guide).get_trace(first).nodes for _ in range(DRAWS)] if names else []
        values = {name: torch.stack([each[name]["value"] for each in drawn]) for name in names}
        sites = [found for name, x in values.items() if (found := _site(name, x, priors.nodes[name]["fn"])) is not None]
    explained = torch.cat(looks)
    # Not the variance, which a few outlying cells of one gene would make up.
    spread = (explained - explained.mean(0)).abs().mean(0)
    batch = cells.batch(index.to(cells.device))
    seen = batch.seen[:, : numbers(cells) * cells.n_genes].double()
    squares = seen.square().mean(0).unflatten(0, (numbers(cells), -1)).sum(0)
    loss_share, input_share = ((each / each.sum()).cpu().numpy() for each in (spread, squares))
    return Genes(loss_share, input_share, tuple(sites), _at_bound(values), _noise(values, fitted.program))


def _of_genes(site: taken.Site) -> bool:
    return "genes" in taken.plates(site)


def numbers(cells: Data) -> int:
    """How many numbers are measured of a cell and gene: two molecules, or a profile."""
    return 1 if isinstance(cells, AnyProfiles) else 2


def _site(name: str, posterior: Tensor, prior: Any) -> Site | None:
    """A site's distance and KL; None for an improper prior."""
    try:
        drawn = prior.sample((PRIOR_DRAWS,))
    except NotImplementedError:
        return None
    free = biject_to(prior.support)
    (mean, sd), (prior_mean, prior_sd) = (_moments(free.inv(x).double()) for x in (posterior, drawn))
    narrow = sd / prior_sd
    distance = (mean - prior_mean) / prior_sd
    kl = (narrow**2 + distance**2 - 1) / 2 - narrow.log()
    # A point has no KL: infinite.
    return Site(name, *(x.flatten().cpu().numpy() for x in (distance, kl)))


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.mean(0), x.std(0)


def _at_bound(values: dict[str, Tensor]) -> float:
    if "switch_time" not in values:
        return math.nan
    share = values["switch_time"].mean(0) / T_MAX
    return float(((share < AT_BOUND) | (share > 1 - AT_BOUND)).float().mean())


def _noise(values: dict[str, Tensor], program: Any) -> Array:
    noise = [x.mean(0) for name, x in values.items() if name.startswith("noise_")]
    decoding = getattr(program, "decoding", None)
    if isinstance(decoding, Decoding) and (in_sds := decoding.emission.noise) is not None:
        noise = [in_sds]
    return torch.stack(noise).amin(0).double().cpu().numpy() if noise else np.zeros(0)
