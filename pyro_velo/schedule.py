"""What changes during a fit: the weight and the floor of the KL terms, the learning rate, and the end."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import pyro.distributions as dist
import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import kl_divergence

SMALLEST = 1e-6
"""Pyro refuses a scale of zero."""

MeanOverCells = Callable[[Tensor], Tensor]
"""What (B, ...) is on average over the cells of a batch, (...)."""


def mean_here(values: Tensor) -> Tensor:
    """The mean over the cells that are at hand."""
    return values.mean(0)


class KLWeight(Messenger):
    """Scales the KL terms of cells by `weight`, and penalties that are to be annealed by `penalty` (1 - weight).

    KL terms are the latent sites in the plate `cells`, in model and guide alike, and the sites marked `infer={"kl":
    True}` (a KL in closed form). Sites marked `infer={"penalty": annealed}` are not part of the ELBO: annealed ones
    fade as the KL comes in, the others keep their weight. Found by tracing, so it fits every model.
    """

    def __init__(self, weight: float | Tensor, penalty: float | Tensor | None = None) -> None:
        super().__init__()
        self.weight, self.penalty = weight, 1 - weight if penalty is None else penalty

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        infer = msg["infer"]
        if "penalty" in infer:
            if infer["penalty"]:
                msg["scale"] = msg["scale"] * _positive(self.penalty)
        elif infer.get("kl") or (not msg["is_observed"] and _of_cells(msg)):
            msg["scale"] = msg["scale"] * _positive(self.weight)


def _positive(scale: float | Tensor) -> float | Tensor:
    return scale.clamp_min(SMALLEST) if isinstance(scale, Tensor) else max(scale, SMALLEST)


class WithoutPenalties(Messenger):
    """The ELBO proper: every penalty masked out."""

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        if "penalty" in msg["infer"]:
            msg["mask"] = False


class LastingPenalties(Messenger):
    """Notes the `names` of penalties that are not annealed: what is climbed at the end is not the ELBO alone."""

    def __init__(self) -> None:
        super().__init__()
        self.names = set[str]()

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        if msg["infer"].get("penalty") is False:
            self.names.add(msg["name"])


def _of_cells(msg: dict[str, Any]) -> bool:
    return any(frame.name == "cells" for frame in msg["cond_indep_stack"])


class FreeBits(Messenger):
    r"""Lets each latent dimension of a cell cost `nats` before its KL counts (free bits; Kingma et al. 2016).

    $$\sum_j \max(\lambda,\ \tfrac1B\sum_n \mathrm{KL}(q(z_{nj} \mid x_n)\,\|\,p(z_{nj})))$$

    takes the place of the KL of the latent sites that are in the plate `cells` alone, B the cells of the batch. The KL
    of a Normal from a Normal is the closed form and not the sampled one, whose noise would pass the maximum on one side
    only; any other q counts as one group of its d dimensions, by its draw, with d lambda. A dimension below lambda has
    no gradient of its KL. To be entered around a run of the guide and then of the model. `mean` is over all cells of a
    batch of which there is but a part here (`processes.Team.mean`).
    """

    def __init__(self, nats: float, mean: MeanOverCells = mean_here) -> None:
        super().__init__()
        self.nats, self.mean, self.drawn_from = nats, mean, dict[str, Any]()

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        # A plate that is opened among cells is a site of its own.
        if (
            msg["is_observed"]
            or site_is_subsample(msg)
            or [frame.name for frame in msg["cond_indep_stack"]] != ["cells"]
        ):
            return
        if msg["name"] not in self.drawn_from:
            self.drawn_from[msg["name"]] = msg["fn"]
            msg["mask"] = False
            return
        q, p, z = self.drawn_from.pop(msg["name"]), msg["fn"], msg["value"]
        kl = normal_kl(q, p)
        if kl is None:
            size = p.event_shape.numel()
            cost = self.mean((q.log_prob(z) - p.log_prob(z)).flatten()).clamp_min(size * self.nats)
        else:
            cost = self.mean(kl.flatten(0, -2)).clamp_min(self.nats).sum()
        msg["fn"] = dist.Delta(z, log_density=-cost.expand(p.batch_shape), event_dim=p.event_dim)


def normal_kl(q: Any, p: Any) -> Tensor | None:
    """KL(q || p) of each dimension, (..., d), where both are independent Normals over d dimensions; else None."""
    if any(type(each) is not dist.Independent or each.reinterpreted_batch_ndims != 1 for each in (q, p)):
        return None
    if not all(isinstance(each.base_dist, torch.distributions.Normal) for each in (q, p)):
        return None
    return kl_divergence(q.base_dist, p.base_dist)


@dataclass(frozen=True)
class Warmup:
    """The KL weight rises linearly to `beta` over `steps` steps, in each of `cycles` cycles of `length` steps.

    Above 1, `beta` buys latent dimensions that are told apart for a worse reconstruction (Higgins et al. 2017);
    cycles let a decoder that has learnt to use z be regularised again (Fu et al. 2019). Penalties that are
    annealed fade in the first cycle, and stay away. `free_bits` as in `FreeBits`; 0 is the KL as it is drawn.
    """

    steps: int
    beta: float = 1.0
    cycles: int = 1
    length: int = 0
    free_bits: float = 0.0

    @property
    def settled(self) -> int:
        """The step from which the weight stays what it is."""
        return (self.cycles - 1) * self.length + self.steps

    def weight(self, step: int) -> float:
        """The weight at a step: beta/steps at a cycle's first, beta from its `steps - 1` on.

        >>> [Warmup(4).weight(step) for step in (0, 1, 3, 9)]
        [0.25, 0.5, 1.0, 1.0]
        >>> [Warmup(2, cycles=2, length=4).weight(step) for step in range(8)]
        [0.5, 1.0, 1.0, 1.0, 0.5, 1.0, 1.0, 1.0]
        """
        cycle = min(step // self.length, self.cycles - 1) if self.cycles > 1 else 0
        return self.beta * self._risen(step - cycle * self.length)

    def _risen(self, step: int) -> float:
        return min(1.0, (step + 1) / self.steps) if self.steps else 1.0

    def scales(self, step: int) -> tuple[float, float]:
        """By what a step scales KL terms, and penalties that are annealed."""
        return self.weight(step), 1 - self._risen(step)

    def at(self, step: int, mean: MeanOverCells = mean_here) -> AbstractContextManager[None]:
        """Within it, programs are scored at the step's weight; `mean` is that of `FreeBits`."""
        return self.scaled(*self.scales(step), mean)

    @contextmanager
    def scaled(
        self, weight: float | Tensor, penalty: float | Tensor, mean: MeanOverCells = mean_here
    ) -> Iterator[None]:
        """Within it, programs are scored at these `scales`."""
        floor = FreeBits(self.free_bits, mean) if self.free_bits else nullcontext()
        with KLWeight(weight, penalty), floor:
            yield

    @contextmanager
    def done(self) -> Iterator[None]:
        """Within it, programs are scored at weight 1, without penalties: the ELBO that is reported."""
        with WithoutPenalties():
            yield

    @property
    def ends_with_elbo(self) -> bool:
        """Whether the ELBO itself is climbed at the end, where no penalty stays: no beta, and no free bits."""
        return self.beta == 1 and not self.free_bits

    @contextmanager
    def settled_at(self) -> Iterator[None]:
        """Within it, programs are scored by the final objective: weight `beta`, `free_bits`, penalties that stay."""
        with self.scaled(self.beta, 0.0):
            yield


@dataclass
class Plateau:
    """Counts held-out evaluations without improvement: one plateau lowers the learning rate, the next ends the fit.

    `best` is of the final objective (`History.objective`).
    """

    patience: int = 15
    best: float = -math.inf
    waited: int = 0
    lowered: bool = False
    finished: bool = False

    def improves(self, objective: float, *, warm: bool) -> bool:
        """Whether this held-out objective is the best so far; waiting is only counted once the KL is in (`warm`)."""
        if objective > self.best:
            self.best, self.waited = objective, 0
            return True
        self.waited += warm
        if self.lowered and self.waited >= self.patience:
            self.finished = True
        return False

    def lower_rate(self, *, due: bool) -> bool:
        """Whether to lower the learning rate now: once, at the first plateau or when it is `due`."""
        if self.lowered or not (due or self.waited >= self.patience):
            return False
        self.lowered, self.waited = True, 0
        return True
