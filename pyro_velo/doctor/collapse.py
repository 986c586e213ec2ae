r"""Posterior collapse: which dimensions of the latent vector say something of the cells, and which the decoder hears.

$$E_x[\mathrm{KL}(q(z \mid x)\,\|\,p(z))] = I_q(x; z) + \mathrm{KL}(q(z)\,\|\,p(z)), \qquad
q(z) = \tfrac1N \sum_n q(z \mid x_n)$$

References: Burda et al. 2016, Importance weighted autoencoders, section 5 (active units); Hoffman & Johnson 2016, ELBO
surgery: yet another way to carve up the variational evidence lower bound.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pyro_velo.batch import Data, Minibatch
from pyro_velo.doctor import draws as taken
from pyro_velo.errors import InputError
from pyro_velo.evidence import computed_sites, conditions
from pyro_velo.models.velocity import VelocityProgram
from pyro_velo.state_posterior import of_draw
from pyro_velo.train import Fitted, split

Array = NDArray[np.float64]

ACTIVE = 0.01
"""The variance of E[z_d | x] over cells above which dimension d is active (Burda et al. 2016, section 5)."""
MIXTURE_CELLS, DRAWS = 512, 4
"""Cells of the mixture q(z), each looked at from every other, and draws of each."""
SHUFFLED_CELLS = 256


@dataclass(frozen=True)
class Collapse:
    r"""What a latent vector of d dimensions holds, in nats a cell; see `collapse`.

    `activity` (d,): $\mathrm{Var}_n\,E[z_d \mid x_n]$. `kl` (d,): mean KL of q(z_d | x) to p(z_d). `information` is
    $I_q(x; z)$, at most log of the `cells` of the mixture, and `gap` $\mathrm{KL}(q(z)\,\|\,p(z))$; `mean_kl` is their
    sum. All three are by the same draws, and NaN where q(z | x) is no Normal. `use` (d,): log-likelihood lost where
    z_d is another cell's. `use_all`: where all of z is. `names`: the sites that z is made of. `apart`: whether each
    dimension has a KL of its own; else, as where p(z) is a mixture, each has the same share of it.
    """

    activity: Array
    kl: Array
    information: float
    gap: float
    mean_kl: float
    use: Array
    use_all: float
    cells: int
    names: tuple[str, ...]
    apart: bool = True

    @property
    def active(self) -> NDArray[np.bool_]:
        """Which dimensions are active, (d,)."""
        return self.activity > ACTIVE

    @property
    def share_used(self) -> Array:
        """`use` as a share of `use_all`, (d,); NaN where that is 0."""
        return self.use / (self.use_all or math.nan)


@torch.no_grad()
def collapse(fitted: Fitted, cells: Data, *, seed: int = 0) -> Collapse:
    """Measure the latent vector of a fit on `cells`; of many cells, on `MIXTURE_CELLS` of them at random.

    Cells change places among `SHUFFLED_CELLS`; what cells share, and the random numbers of the other sites, stay.
    The prior is taken to be the same for all cells. Raises `InputError` for a guide without latent vectors, and for
    fewer than two cells.
    """
    if len(cells) < 2:
        raise InputError(f"Expected 2 cells or more to tell what z says of them; got {len(cells)}. Pass more.")
    settings = fitted.training.settings
    n_train = len(split(len(cells), settings.held_out, settings.seed)[0])
    index = taken.chosen_cells(len(cells), MIXTURE_CELLS, seed)
    with conditions(fitted, cells, seed):
        first = cells.batch(index[:1].to(cells.device), n_train)
        drawn_first = taken.draw(fitted, first)
        names, left_out = taken.latent_sites(drawn_first), computed_sites(fitted, first)
        if not names:
            raise InputError("Expected a guide that draws a latent vector of each cell; got none. Pass another fit.")
        looks, drawn = [], []
        for batch in taken.parts(cells, index, n_train):
            several = [taken.draw(fitted, batch) for _ in range(DRAWS)]
            looks.append([taken.latent(each, names) for each in several])
            drawn.append(torch.stack([taken.values(each, names) for each in several]).double())
        z = torch.cat(drawn, 1)
        found = [taken.Latent(*(torch.cat(x) for x in zip(*each, strict=True))) for each in zip(*looks, strict=True)]
        use = [_use(fitted, b, names, left_out) for b in taken.parts(cells, index[:SHUFFLED_CELLS], n_train)]
    lost = torch.cat(use, 1).mean(1).cpu().numpy()
    known = found[0].loc.isfinite().all()
    means = found[0].loc if known else z.mean(0)
    information, mean_kl = _information(z, found) if known else (math.nan, math.nan)
    return Collapse(
        activity=means.var(0).cpu().numpy(),
        kl=torch.stack([each.kl for each in found]).mean((0, 1)).cpu().numpy(),
        information=information,
        gap=mean_kl - information,
        mean_kl=mean_kl,
        use=lost[:-1],
        use_all=float(lost[-1]),
        cells=len(index),
        names=names,
        apart=all(taken.has_dimensions(drawn_first, name) for name in names),
    )


def log_mixture(z: Tensor, loc: Tensor, scale: Tensor) -> Tensor:
    r"""$\log\frac1N\sum_n \mathcal N(z; \mu_n, \sigma_n)$ of points z (S, d), the components (N, d): (S,), float64."""
    precision = scale.double().pow(-2)
    # The square is multiplied out, so that no array of points x components x dimensions is made; centred first, or
    # digits would cancel.
    centre = loc.double().mean(0)
    z, loc = z.double() - centre, loc.double() - centre
    constant = (loc**2 * precision).sum(1) + 2 * scale.double().log().sum(1) + z.shape[1] * math.log(2 * math.pi)
    log_each = -0.5 * ((z**2) @ precision.T - 2 * z @ (loc * precision).T + constant)
    return log_each.logsumexp(1) - math.log(len(loc))


def _information(z: Tensor, found: list[taken.Latent]) -> tuple[float, float]:
    """I(x; z) and the mean KL, by the same draws (S, N, d)."""
    information = kl = 0.0
    for at, look in zip(z, found, strict=True):
        log_q = look.log_q.sum(1)
        information += (log_q - log_mixture(at, look.loc, look.scale)).mean().item() / len(found)
        kl += (log_q - look.log_p.sum(1)).mean().item() / len(found)
    return information, kl


def _use(fitted: Fitted, batch: Minibatch, names: tuple[str, ...], left_out: tuple[str, ...]) -> Tensor:
    """What each cell's log-likelihood loses where a dimension, and last where all of z, is another cell's: (d+1, B)."""
    drawn = taken.draw(fitted, batch)
    z, shared = taken.values(drawn, names), taken.shared_values(drawn)
    # Every cell gets another's: a cycle in random order leaves none in its place.
    order = torch.randperm(len(z), device=z.device)
    other = torch.empty_like(order)
    other[order] = order.roll(1)
    seed = int(torch.randint(2**62, ()))

    def explained(at: Tensor) -> Tensor:
        torch.manual_seed(seed)
        again = taken.draw(fitted, batch, shared | taken.of_dimensions(drawn, names, at))
        return taken.log_likelihood(again, left_out).sum(1)

    whole, lost = explained(z), []
    for d in range(z.shape[1]):
        at = z.clone()
        at[:, d] = z[other, d]
        lost.append(whole - explained(at))
    return torch.stack([*lost, whole - explained(z[other])])


DEAD = 0.01
"""The mean use below which a state is dead: it explains fewer than one in a hundred cells."""


@dataclass(frozen=True)
class StateUse:
    r"""How much each of K states explains: `share` (K, G), $\frac1N \sum_n p(k \mid u_{ng}, s_{ng})$, which sum to 1.

    `entropy` (G,) in nats, that of the mean use: log K where all are used alike, 0 where one explains all cells.
    """

    share: Array

    @property
    def entropy(self) -> Array:
        """Of the mean use of each gene, (G,)."""
        logs = np.log(np.where(self.share > 0, self.share, 1.0))
        return -(self.share * logs).sum(0)

    @property
    def dead(self) -> Array:
        """The share of dead states of each gene, (G,)."""
        return (self.share < DEAD).mean(0)

    @property
    def overall(self) -> Array:
        """The mean use over genes, (K,)."""
        return self.share.mean(1)


@torch.no_grad()
def state_use(fitted: Fitted, cells: Data, *, seed: int = 0) -> StateUse | None:
    """The states' use, over `DRAWS` draws of up to `MIXTURE_CELLS` cells; None for a model without kinetic states."""
    if not isinstance(fitted.program, VelocityProgram):
        return None
    index, total = taken.chosen_cells(len(cells), MIXTURE_CELLS, seed), torch.zeros(())
    with conditions(fitted, cells, seed):
        for batch in taken.parts(cells, index, len(cells)):
            for _ in range(DRAWS):
                drawn = taken.draw(fitted, batch)
                latent = {n: s["value"] for n, s in taken.sites(drawn.program) if not s["is_observed"]}
                explained = fitted.program.explain(latent, batch, of_draw(fitted.program, latent))
                log_joint = torch.stack(torch.broadcast_tensors(*explained.log_joint))
                total = total + log_joint.softmax(0).sum(1, dtype=torch.float64) / (DRAWS * len(index))
    return StateUse(total.cpu().numpy())
