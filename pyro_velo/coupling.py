r"""The posterior of the rates and of a clock that all genes read, held together.

Time may be stretched or bent for all cells at once where all rates follow. A guide in which rates and cells are
independent knows how far each moves while the other stays, which is far less: its intervals are too narrow, and a fit
is slow to find its way along. Here both move with M bends $\phi$ of the clock,

$$x_g = \mu_g - R_g w + L_g \epsilon_g, \qquad z_{n1} = m_n + \phi(m_n) \cdot w + s_n \epsilon_n, \qquad
w \sim \mathcal{N}(0, S^{-1})$$

with x the rates of a gene on the unconstrained scale. From the scores $a = \partial \log p / \partial x_g$ and
$b = \partial \log p / \partial z_{n1}$ of each cell and gene, whose products average to the Fisher information,

$$A_g = \sum_n a a^T + P_g, \quad C_g = \sum_n a b \phi^T, \quad L_g L_g^T = A_g^{-1}, \quad R_g = A_g^{-1} C_g, \quad
S = \sum_n d_n \phi \phi^T - \sum_g C_g^T A_g^{-1} C_g, \quad d_n = 1 + \sum_g b^2$$

where P is the precision of the prior. Where library sizes are inferred, all rates follow two coordinates of a cell, and
w bends both along the clock: b and phi then have a component for each, and $s_n$ is a root of their covariance in that
cell, since where all genes fall the two can hardly be told apart. The means are moved by Newton steps on the ELBO,
its gradient taken at a few points around them. In the end cells get the moments of their own posterior, by
quadrature: a Normal of the highest bound is too narrow where the posterior is none.

References: Giordano, Broderick and Jordan 2018 (linear response: covariances from a mean-field optimum); Opper and
Archambeau 2009 (a Normal's ELBO has the gradient that is expected under it).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from copy import copy
from dataclasses import dataclass, replace

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor
from tqdm.auto import tqdm

from pyro_velo.batch import Batch
from pyro_velo.cell_scores import scores
from pyro_velo.coupled_rates import CoupledRates, Covariance, Genes, bends, bent
from pyro_velo.disk import AnyCells
from pyro_velo.guides import AmortizedProgram
from pyro_velo.kinetics import POWERS, T_MAX
from pyro_velo.quadrature import adaptive, cubature, moments
from pyro_velo.rates import AutoPerGene
from pyro_velo.state_posterior import posterior_of_states
from pyro_velo.times import ClockProgram
from pyro_velo.train import Fitted, split

WARPS, CELLS_A_WARP = 40, 10
"""Bends of the clock at most, and the cells that each must have."""
ROUNDS, LOOKS = 4, 12
"""Newton's steps between two looks at the bound, and such looks at most."""
ENOUGH = 0.02
"""The rise of the bound between two looks, in nats a cell, below which steps are halved."""
STRIDE, SHORTEST = 0.7, 0.15
"""The share of Newton's steps that is taken at first, and the least, at which the search ends."""
PAIRS = 4
"""Draws of rates and warps, each with its mirror image, that a bound is the mean of."""
CLOCKS, BETTER = 100, 1.0
"""Times, equally far apart, at which every cell is looked for, and by how many nats one must be better than its own."""
BY_CHANCE = 1e-3
"""How probable the narrowest gap is among uniform cells at which a clock may be turned."""
EDGE, LATEST = 1e-4, 0.99
"""Shares of the clock: how near to its ends a cell is put, and the latest switching time, when it is turned."""
CELLS_GENES_AT_ONCE = 128 * 1024
FARTHEST = 4.0
"""The factor by which a cell's variance may change in the end: points of quadrature reach no farther."""
LARGEST_STEP, LARGEST_STEPS = 0.3, 3.0
"""Of the clock in a round, in sds of its prior; and of rates, in their own."""


def applies(fitted: Fitted) -> bool:
    """Whether a fit has a clock that genes share, and rates with a covariance to couple it with."""
    guide, times = fitted.guide, getattr(fitted.program, "times", None)
    return (
        isinstance(guide, AmortizedProgram) and isinstance(guide.rates, AutoPerGene) and isinstance(times, ClockProgram)
    )


def couple(fitted: Fitted, cells: AnyCells, *, seed: int = 0, progress: bool | None = None) -> Fitted:
    """The same fit with rates and clock coupled, where `applies`; any other comes back as it is.

    Before the search every cell is looked for at all times (`Search.seek`).

    Rates are informed by the training cells alone. `fitted` stays as it is, and so does a fit that Newton's steps do
    not improve, with a warning. Memory does not grow with the number of cells, but for a few numbers each.
    """
    if not applies(fitted):
        return fitted
    noise = torch.random.fork_rng([cells.device] if cells.device.type == "cuda" else [])
    with fitted.parameters(), noise, pyro.validation_enabled(False):
        torch.manual_seed(seed)
        search = Search(fitted, cells)
        try:
            if search.climb(progress):
                search.settle()
                return replace(fitted, guide=search.guide_found())
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
            # Nor is there a covariance at the means.
            pass
    text = "Rates and clock could not be coupled: the intervals of this fit are too narrow. Train it for longer."
    warnings.warn(text, stacklevel=2)
    return fitted


@dataclass
class Information:
    """Sums over cells, float64: `rates` (G, K, K) A, `cross` (G, K, M) C, `warps` (M, M), and the gradients.

    `gradient` (G, K) of the rates, `gradient_warps` (M,); `log_joint` is the log-density that they are of.
    """

    rates: Tensor
    cross: Tensor
    warps: Tensor
    gradient: Tensor
    gradient_warps: Tensor
    log_joint: float

    def covariance(self) -> Covariance:
        """That of the Normal with this information."""
        return Covariance.of(self.rates, self.cross, self.warps)

    def __add__(self, other: Information) -> Information:
        return Information(*(getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__))

    def __mul__(self, factor: float) -> Information:
        return Information(*(getattr(self, name) * factor for name in self.__dataclass_fields__))


class Search:
    """Newton's steps from a fit to the optimum of the ELBO, and the covariance there."""

    def __init__(self, fitted: Fitted, cells: AnyCells) -> None:
        self.fitted, self.cells, self.program = fitted, cells, fitted.program
        settings, device = fitted.training.settings, cells.device
        train_index, _ = split(len(cells), settings.held_out, settings.seed)
        self.trained = torch.zeros(len(cells), dtype=torch.float64, device=device)
        self.trained[train_index.to(device)] = 1.0
        self.n_warps = max(2, min(WARPS, len(train_index) // CELLS_A_WARP))
        self.genes = Genes(self.program, fitted.guide.rates.marginals())
        self.x = self.genes.start()
        with torch.no_grad():
            parts = [fitted.guide.encode(batch).base_dist for batch in self._batches()]
            self.z = torch.cat([part.loc[:, 0] for part in parts])
            self.scale = torch.cat([part.scale[:, 0] for part in parts])
        self.shared = [0] if self.program.library_sd is None else [0, self.z.shape[1] - 1]
        self.place = self.z[:, self.shared].double()
        self.root = torch.diag_embed(self.scale[:, self.shared].double())
        self.covariance: Covariance | None = None
        self.stride = STRIDE

    def climb(self, progress: bool | None = None) -> bool:
        """Rounds from where the bound is highest, until short ones do not raise it either: whether that is elsewhere.

        If there is a gap in the clock then, it is turned, and the higher one of the two is taken. The covariance that
        is left is that at the means.
        """
        self.seek()
        start = self._bound()
        best, kept = self._ascend(start, progress), self._state()
        if self.turn():
            self.stride = STRIDE
            self.seek()
            found = self._ascend(self._bound(), progress)
            if found > best:
                best, kept = found, self._state()
            self.x, self.place, self.root, self.covariance = kept
        if best > start:
            self.covariance = self._at_means().covariance()
        return best > start

    def _ascend(self, best: float, progress: bool | None) -> float:
        """The highest bound that rounds lead to, where they leave the search."""
        kept, hidden = self._state(), None if progress is None else not progress
        for _ in tqdm(range(LOOKS), desc="coupling", disable=hidden, leave=False):
            found = self._after_rounds()
            if not found - best > ENOUGH * len(self.cells):
                self.stride /= 2
            if found > best:
                best, kept = found, self._state()
            self.x, self.place, self.root, self.covariance = kept
            if self.stride < SHORTEST:
                break
        return best

    def seek(self) -> None:
        """Put cells whose genes say, at the means of their rates, that they are elsewhere in time there.

        An encoder takes a cell for one that looks like it. At the end of a process all genes may be as silent as at its
        beginning, and from the wrong end no gradient leads to the right one: a few such cells, in a gap of time of
        their own, make all others' rates too fast.
        """
        clocks = torch.special.ndtri((torch.arange(CLOCKS).to(self.place) + 0.5) / CLOCKS)
        found = self.place.clone()
        with torch.no_grad():
            for batch in self._batches():
                here = self.place[batch.index]
                there = here.repeat(CLOCKS, 1, 1)
                there[..., 0] = clocks[:, None]
                log_joint = torch.stack([self._log_joint(place, batch) for place in (here, *there)])
                gain, best = (log_joint[1:] - log_joint[0]).max(0)
                nearest = there[best, torch.arange(len(best))]
                found[batch.index] = torch.where(gain[:, None] > BETTER, nearest, here)
        self.place = found

    def turn(self) -> bool:
        """Turn the clock to where no cell stands, and stretch it: whether there is a gap that chance does not leave.

        Where cells at the one end of time are taken for the other, one by one they have no way back: all others' rates
        and onsets have moved into the room that they left.
        """
        time = T_MAX * torch.special.ndtr(self.place[:, 0])
        ordered = time.sort().values
        gap, below = ordered.diff().max(0)
        # Of N cells that are uniform the widest gap is wider than this with a probability of `BY_CHANCE`.
        if gap < T_MAX * math.log(len(time) / BY_CHANCE) / len(time):
            return False
        start = ordered[below + 1]
        stretch = T_MAX / (T_MAX - gap)
        turned = stretch * torch.remainder(time - start, T_MAX) / T_MAX
        # Genes come on among most of the cells.
        onset = T_MAX - start if 2 * (below + 1) > len(time) else -start
        x = self.x.clone()
        for k, (name, each) in enumerate(self.genes.coupled.items()):
            value = each.transform(self.x[:, k])
            if name == "onset":
                value = stretch * (value + onset)
            elif name in POWERS:
                value = value * stretch ** -POWERS[name]
            if name == "switch_time":
                value = value.clamp_max(LATEST * T_MAX)
            x[:, k] = each.transform.inv(value)
        self.x, self.covariance, self.place = x, None, self.place.clone()
        self.place[:, 0] = torch.special.ndtri(turned.clamp(EDGE, 1 - EDGE))
        return True

    def _log_joint(self, place: Tensor, batch: Batch) -> Tensor:
        """Log p(u, s, place) of cells at the means of the rates, (B,) float64."""
        z, program = self._placed(place, batch), self.program
        drawn = poutine.trace(self.fitted.guide.cells).get_trace(batch, dist.Delta(z[:, None], event_dim=1))
        values = self.genes.values(self.x.to(z)) | {"pi": drawn.nodes["pi"]["value"], "z": z[:, None]}
        log_p = posterior_of_states(program.explain(values, batch).log_joint)[1]
        return log_p.sum(1, dtype=torch.float64) + self._log_prior(z)

    def _log_prior(self, z: Tensor) -> Tensor:
        """Of the places of cells with latent vectors z (B, d), (B,) float64."""
        return self.program.recipe.priors.latent.log_prob(z[:, self.shared]).sum(1, dtype=torch.float64)

    def _after_rounds(self) -> float:
        """The bound some rounds later."""
        try:
            for _ in range(ROUNDS):
                self.round()
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
            return -math.inf
        return self._bound()

    def _bound(self) -> float:
        """The bound; without a covariance, as far from an optimum, there is none."""
        try:
            return self.bound()
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
            return -math.inf

    def _state(self) -> tuple[Tensor, Tensor, Tensor, Covariance | None]:
        return self.x, self.place, self.root, self.covariance

    def round(self) -> None:
        """One step of the cells while the rates stay, one of the rates with the clock."""
        rates, place = torch.zeros_like(self.x), torch.zeros_like(self.place)
        self._move_cells(*self._either_side(rates, place)[1:])
        self.covariance = self._at_means().covariance() if self.covariance is None else self.covariance
        information = self._around()[0]
        self.covariance = information.covariance()
        self._move_together(information, self.covariance)

    def bound(self) -> float:
        """The ELBO of the training cells but for a constant, at the means as they are and the covariance there."""
        torch.manual_seed(0)
        before, self.covariance = self.covariance, self._at_means().covariance()
        expected = sum(self._around()[0].log_joint for _ in range(PAIRS)) / PAIRS
        entropy = self.covariance.log_size() + float((self.trained @ self.root.diagonal(dim1=1, dim2=2).log()).sum())
        self.covariance = before
        return expected + entropy

    def settle(self) -> None:
        """Give each cell the mean and the covariance that its posterior has, the rates at their means.

        The Normal of the highest bound is narrower than a posterior that is none, and where all genes are nearly silent
        no cell's is one.
        """
        points, found = adaptive(len(self.shared)), []
        with torch.no_grad():
            for batch in self._batches():
                place, root = self.place[batch.index], self.root[batch.index]
                looked = [self._log_joint(place + root @ point, batch) for point in points.at.to(place)]
                found.append(moments(points, torch.stack(looked)))
        mean, covariance = (torch.cat(each) for each in zip(*found, strict=True))
        values, axes = torch.linalg.eigh(covariance)
        covariance = (axes * values.clamp(1 / FARTHEST, FARTHEST)[:, None]) @ axes.mT
        self.place = self.place + (self.root @ mean.clamp(-1, 1)[..., None])[..., 0]
        self.root = torch.linalg.cholesky(self.root @ covariance @ self.root.mT)

    def guide_found(self) -> AmortizedProgram:
        """The guide of the fit, with coupled rates and each cell's own place."""
        assert self.covariance is not None
        guide, z, scale = copy(self.fitted.guide), self.z.clone(), self.scale.clone()
        z[:, self.shared] = self.place.to(z)
        if len(self.shared) == 1:
            scale[:, :1] = self.root[:, 0].to(z)
        else:
            # The clock and the library size of a cell hang together.
            scale = torch.diag_embed(scale)
            scale[:, torch.tensor(self.shared)[:, None], torch.tensor(self.shared)] = self.root.to(z)
        rates = CoupledRates(self.genes, self.x, self.covariance, z.dtype, self.shared)
        # A module keeps its parts in a dictionary that a copy shares with it.
        guide._modules = {name: part for name, part in guide._modules.items() if name != "rates"}
        guide.rates, guide.own = rates, (z, scale)
        return guide

    def _at_means(self) -> Information:
        """With all at their means but each cell by itself.

        Over draws of the rates there is more information. The bound is the same with either, to a nat in 140 rates,
        and of two Normals that it cannot tell apart the wider one covers more of the posterior.
        """
        return self._either_side(torch.zeros_like(self.x), torch.zeros_like(self.place))[0]

    def _around(self) -> tuple[Information, Tensor, Tensor]:
        """At a draw of all that is uncertain, and at its mirror image."""
        assert self.covariance is not None
        rates, w = self.covariance.draw()
        return self._either_side(rates, self._bent(w))

    def _bent(self, w: Tensor) -> Tensor:
        """How far w moves each cell, (N, C)."""
        return bent(self.place[:, 0], w, len(self.shared))

    def _either_side(self, rates: Tensor, place: Tensor) -> tuple[Information, Tensor, Tensor]:
        """Means over mirrored points: the information; gradient (N, C) and negative Hessian (N, C, C) of cells.

        The points lie off the means by `rates` (G, K) and `place` (N, C), to either side, and each cell by a point of
        `cubature` along the axes of its own Normal. Gradient and Hessian are in these axes, so that the Hessian is the
        identity where the Normal has settled.
        """
        side = torch.randn_like(self.place).sign()
        slope, curvature, total = torch.zeros_like(side), torch.zeros_like(self.root), []
        for point, sign, weight in cubature(len(self.shared)):
            s = torch.tensor(point).to(side) * side
            off = (self.root @ s[..., None])[..., 0]
            found, here = self._at(self.x + sign * rates, self.place + sign * place + off)
            total.append(found * weight)
            here = weight * (self.root.mT @ here[..., None])[..., 0]
            slope += here
            curvature -= here[..., None] * s[:, None]
        return sum(total[1:], total[0]), slope, (curvature + curvature.mT) / 2

    def _at(self, x: Tensor, place: Tensor) -> tuple[Information, Tensor]:
        """The information at a point, and the gradient of each cell's place (N, C)."""
        log_prior, gradient = self.genes.prior(x.to(self.z))
        n_genes, k = x.shape
        n = len(self.shared) * self.n_warps
        warps = torch.zeros(n, n).to(x)
        total = Information(
            self.genes.precision,
            torch.zeros(n_genes, k, n).to(x),
            warps,
            gradient,
            warps[0].clone(),
            log_prior,
        )
        slopes = []
        for batch in self._batches():
            found, slope = self._batch(x, place[batch.index], batch)
            total = total + found
            slopes.append(slope)
        return total, torch.cat(slopes)

    def _batch(self, x: Tensor, place: Tensor, batch: Batch) -> tuple[Information, Tensor]:
        """The same of some cells."""
        z = self._placed(place, batch)
        log_p, a, b = scores(self.program, self.fitted.guide, self.genes, x.to(z), z, batch)
        with torch.enable_grad():
            own = z[:, self.shared].clone().requires_grad_()
            log_latent = self.program.recipe.priors.latent.log_prob(own)
            (pull,) = torch.autograd.grad(log_latent.sum(), own)
        variance = float(self.program.recipe.priors.latent.variance)
        weight, phi = self.trained[batch.index], bends(self.place[batch.index, 0], self.n_warps)
        slope = b.sum(1, dtype=torch.float64) + pull.double()
        depth = (b.mT @ b).double() + torch.eye(len(self.shared)).to(self.place) / variance
        # The bends of a coordinate follow those of the one before.
        along = slope[..., None] * phi[:, None]
        across = torch.einsum("ncdm,nl->cmdl", (weight[:, None, None] * depth)[..., None] * phi[:, None, None], phi)
        a = (a * weight.to(a)[:, None, None]).permute(1, 2, 0)
        information = Information(
            (a @ a.mT).double(),
            torch.cat([(a * each.T[:, None]) @ phi.to(a) for each in b.unbind(-1)], -1).double(),
            across.reshape(2 * (phi.shape[1] * len(self.shared),)),
            a.sum(-1, dtype=torch.float64),
            weight @ along.flatten(1),
            float((weight * (log_p + log_latent.detach().double().sum(1))).sum()),
        )
        return information, slope

    def _placed(self, place: Tensor, batch: Batch) -> Tensor:
        """The latent vectors (B, d) of cells, the coordinates that all rates follow given."""
        z = self.z[batch.index]
        z[:, self.shared] = place.to(z)
        return z

    def _batches(self) -> Iterator[Batch]:
        size = max(1, CELLS_GENES_AT_ONCE // self.cells.n_genes)
        return self.cells.batches(torch.arange(len(self.cells), device=self.cells.device), size)

    def _move_cells(self, slope: Tensor, curvature: Tensor) -> None:
        """Each cell by a step of its own, of one sd at most; its precision as far, twofold at most."""
        values, axes = torch.linalg.eigh(curvature)
        precision = (axes * (1 + self.stride * (values - 1).clamp(-0.5, 1.0))[:, None]) @ axes.mT
        step = torch.linalg.solve(precision, slope)
        self.place = self.place + (self.root @ (self.stride * step).clamp(-1, 1)[..., None])[..., 0]
        self.root = torch.linalg.cholesky(self.root @ torch.linalg.inv(precision) @ self.root.mT)

    def _move_together(self, found: Information, covariance: Covariance) -> None:
        """Newton's step of rates and bends, shorter where it would move a cell by more than `LARGEST_STEP`."""
        root, response, warp_root = covariance
        gradient = found.gradient_warps - torch.einsum("gkm,gk->m", response, found.gradient)
        w = warp_root @ (warp_root.mT @ gradient)
        shift = self._bent(w)
        alone = root @ (root.mT @ found.gradient[..., None])
        share = min(self.stride, LARGEST_STEP / max(float(shift.abs().max()), 1e-12))
        # Where a gene tells next to nothing, a Newton step could go anywhere.
        bound = LARGEST_STEPS * torch.linalg.vector_norm(root, dim=-1)
        self.x = self.x + share * (alone[..., 0].clamp(-bound, bound) - response @ w)
        self.place = self.place + share * shift
