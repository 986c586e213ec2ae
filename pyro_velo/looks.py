"""Looks at the held-out cells of a training: their ELBO, what is climbed of it in the end, and its terms.

Every look has the same noise, whichever process looks, so that looks can be compared.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

import torch
from pyro import poutine
from pyro.infer import ELBO, SVI, Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.util import torch_item
from torch import Tensor

from pyro_velo.batch import Data, Minibatch
from pyro_velo.compiled import pays
from pyro_velo.doctor.terms import draws_together, terms_of
from pyro_velo.forensics import Culprit, NonFiniteError, blame
from pyro_velo.processes import Team
from pyro_velo.schedule import Warmup


class TakenApart(Enum):
    """How the terms of a bound are told: not at all, by its own draws, or with KLs in closed form."""

    NOT = "not"
    DRAWN = "drawn"
    CLOSED = "closed"


def how_taken_apart(elbo: ELBO, svi: SVI, batch: Minibatch) -> TakenApart:
    """How the terms of `elbo`, which `svi` climbs, can be told."""
    if type(elbo) not in (Trace_ELBO, TraceMeanField_ELBO) or elbo.num_particles > 1:
        return TakenApart.NOT
    if type(elbo) is Trace_ELBO:
        return TakenApart.DRAWN
    with torch.no_grad():
        return TakenApart.NOT if draws_together(svi.guide, svi.model, batch) else TakenApart.CLOSED


class Look(NamedTuple):
    """What is seen of the held-out cells: nats per cell, and by name those of each term, of them and of training cells.

    `objective` is what the schedule ends with.
    """

    elbo: float
    objective: float
    terms: dict[str, dict[str, float]]


@dataclass(frozen=True)
class Looks:
    """Takes looks at the cells of `held`, or where there are none at those of `train`.

    `ends_with_elbo`: whether it is the ELBO that the schedule ends with.
    """

    svi: SVI
    cells: Data
    train: Tensor
    held: Tensor
    batch_size: int
    seed: int
    warmup: Warmup
    ends_with_elbo: bool
    terms: TakenApart
    team: Team

    @property
    def n_cells(self) -> int:
        """How many cells a look goes through, those for the terms among them."""
        return 2 * (len(self.held) or len(self.train))

    def take(self, step: int) -> Look:
        """Look; raises `NonFiniteError` for the `step` that was the last where a loss is not finite."""
        own: dict[str, float] = {}
        with self.warmup.done():
            elbo = self._mean(step, lambda batch, share: self._loss(batch, own, share))
        terms = {}
        if self.terms is not TakenApart.NOT:
            terms["held_out"] = self._summed(own)
            terms["train"] = self._terms_of_training() if len(self.held) else terms["held_out"]
        if self.ends_with_elbo:
            return Look(elbo, elbo, terms)
        with self.warmup.settled_at():
            objective = self._mean(step, lambda batch, _: self.svi.loss(self.svi.model, self.svi.guide, batch))
        return Look(elbo, objective, terms)

    def _mean(self, step: int, loss_of: Callable[[Minibatch, float], float]) -> float:
        """The mean over held-out cells of what is climbed."""
        index, total, culprit = self.held if len(self.held) else self.train, 0.0, None
        for i, batch in self._turns(index.split(self.batch_size)):
            with self._with_noise(i):
                loss = loss_of(batch, len(batch.index) / len(index))
                if not math.isfinite(loss) and culprit is None:
                    culprit = blame(self.svi.model, self.svi.guide, batch, {})
                total += len(batch.index) * loss
        found: Culprit | None = self.team.first(culprit)
        if found is not None:
            raise NonFiniteError(found, step=step)
        return -sum(self.team.gathered(total)) / len(index)

    def _turns(self, parts: Sequence[Tensor]) -> Iterator[tuple[int, Minibatch]]:
        """The batches of a look that are this process's, each with its number."""
        turns = self.team.turns(len(parts))
        return zip(turns, self.cells.read([parts[i] for i in turns], len(self.train)), strict=True)

    @contextmanager
    def _with_noise(self, i: int) -> Iterator[None]:
        """With the noise of the i-th batch of a look, whichever process looks at it, and without gradients.

        But where steps are fused: what is compiled for them serves a look, too, and no gradient is asked for.
        """
        with own_noise(self.cells.device, self.seed + i), torch.set_grad_enabled(pays()):
            yield

    def _loss(self, batch: Minibatch, terms: dict[str, float], share: float) -> float:
        """The loss per cell of a batch, whose terms are added to the others with its share."""
        if self.terms is TakenApart.NOT:
            return self.svi.loss(self.svi.model, self.svi.guide, batch)
        # As the ELBO's own `loss` has it (`Trace_ELBO`'s to the bit), with the traces that it is made of.
        guide = poutine.trace(self.svi.guide).get_trace(batch)
        model = poutine.trace(poutine.replay(self.svi.model, trace=guide)).get_trace(batch)
        model.compute_log_prob()
        guide.compute_log_prob()
        found = terms_of(guide, model, closed=self.terms is TakenApart.CLOSED)
        for term in found.grouped().terms:
            terms[term.name] = terms.get(term.name, 0.0) + share * term.value.item()
        if self.terms is TakenApart.CLOSED:
            return -torch_item(found.total)
        return torch_item(guide.log_prob_sum()) - torch_item(model.log_prob_sum())

    def _terms_of_training(self) -> dict[str, float]:
        """The terms of as many training cells as are held out."""
        index, terms = self.train[: len(self.held)], dict[str, float]()
        for i, batch in self._turns(index.tensor_split(max(1, round(len(index) / self.batch_size)))):
            with self._with_noise(i), self.warmup.done():
                self._loss(batch, terms, len(batch.index) / len(index))
        return self._summed(terms)

    def _summed(self, terms: dict[str, float]) -> dict[str, float]:
        """The terms of all processes' batches; the first one has looked at some."""
        found = self.team.gathered(terms)
        return {name: sum(each.get(name, 0.0) for each in found) for name in found[0]}


@contextmanager
def own_noise(device: torch.device, seed: int) -> Iterator[None]:
    """Random numbers from `seed`; afterwards the generators go on as if nothing had been drawn."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
