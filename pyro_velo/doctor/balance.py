r"""The weight that the KL had when a fit was made, as its own optimum tells it.

An encoder that maximises $E_q[\log p(x \mid z)] - \beta\,\mathrm{KL}$ has, along any way in which it can move, such as
all cells' $\log\sigma_d$ together,

$$\beta = \frac{\sum_n \partial E_q[\log p(x_n \mid z)] / \partial \log\sigma_d}
{\sum_n \partial \mathrm{KL}_n / \partial \log\sigma_d}$$

so that $\beta$ can be read off the fit, whatever its settings say: 1 at an optimum of the ELBO.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyro_velo.batch import Data, Minibatch
from pyro_velo.doctor import draws as taken
from pyro_velo.evidence import computed_sites, conditions
from pyro_velo.train import Fitted, split

CELLS, DRAWS = 256, 20


class Balance(NamedTuple):
    """The KL weight that the optimum tells, with its standard error over draws; both NaN where it tells none."""

    weight: float
    error: float


class Widened(Messenger):
    """Multiplies the sds of Normal sites by exp(log_factor), which has an entry a dimension."""

    def __init__(self, log_factors: dict[str, Tensor]) -> None:
        super().__init__()
        self.log_factors = log_factors

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        if msg["name"] in self.log_factors:
            fn = taken.bare(msg["fn"])
            wider = dist.Normal(fn.loc, fn.scale * self.log_factors[msg["name"]].exp())
            msg["fn"] = wider.to_event(msg["fn"].event_dim)


def balance(fitted: Fitted, cells: Data, *, draws: int = DRAWS, seed: int = 0) -> Balance:
    """Read the KL weight off up to `CELLS` training cells, by gradients of `draws` draws each.

    NaN where q(z | x) is no Normal, or is the prior, where the KL has no slope, and below 0, which no optimum has.
    """
    settings = fitted.training.settings
    index = split(len(cells), settings.held_out, settings.seed)[0]
    with conditions(fitted, cells, seed), torch.enable_grad():
        first = cells.batch(index[:1].to(cells.device), len(index))
        drawn, left_out = taken.draw(fitted, first), computed_sites(fitted, first)
        names = taken.latent_sites(drawn)
        normal = (isinstance(taken.bare(drawn.guide.nodes[name]["fn"]), dist.Normal) for name in names)
        if not names or not all(normal):
            return Balance(math.nan, math.nan)
        slopes = torch.zeros(draws, 2, dtype=torch.float64)
        for batch in taken.parts(cells, index[:CELLS], len(index)):
            for row in slopes:
                row += _slopes(fitted, batch, names, left_out)
    return _ratio(slopes)


def _slopes(fitted: Fitted, batch: Minibatch, names: Sequence[str], left_out: tuple[str, ...]) -> Tensor:
    """The slopes of the log-likelihood and of the KL, summed over cells and dimensions, of one draw: (2,)."""
    events = {name: _event(fitted, batch, name) for name in names}
    like = batch.measured
    factors = {name: like.new_zeros(event).requires_grad_() for name, event in events.items()}
    with Widened(factors):
        guide = poutine.trace(fitted.guide).get_trace(batch)
    drawn = taken.Draw(guide, poutine.trace(poutine.replay(fitted.program, trace=guide)).get_trace(batch))
    leaves = list(factors.values())
    # What the likelihood does not hang on, such as w of a `CGMDVAE`, has a slope of 0 there.
    explained = torch.autograd.grad(
        taken.log_likelihood(drawn, left_out).sum(), leaves, retain_graph=True, materialize_grads=True
    )
    kl = torch.autograd.grad(taken.cells_kl(drawn).sum(), leaves)
    return torch.stack([torch.cat([each.flatten() for each in part]).double().sum() for part in (explained, kl)]).cpu()


def _event(fitted: Fitted, batch: Minibatch, name: str) -> torch.Size:
    """The event shape of a site of the guide."""
    with torch.no_grad():
        return poutine.trace(fitted.guide).get_trace(batch).nodes[name]["fn"].event_shape


def _ratio(slopes: Tensor) -> Balance:
    """The ratio of mean slopes (draws, 2), with the standard error of a ratio of means; NaN unless the KL has one."""
    explained, kl = slopes.T
    weight = explained.mean() / kl.mean()
    root = math.sqrt(len(slopes))
    if weight < 0 or not abs(kl.mean()) > 3 * kl.std() / root:
        return Balance(math.nan, math.nan)
    return Balance(weight.item(), ((explained - weight * kl).std() / root / kl.mean().abs()).item())
