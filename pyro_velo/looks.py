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
from pyro.poutine import Trace
from torch import Tensor

from pyro_velo.batch import Data, Minibatch, equal_parts
from pyro_velo.compiled import pays
from pyro_velo.doctor.terms import CELLS, draws_together, sites_of, terms_of
from pyro_velo.forensics import Culprit, NonFiniteError, blame
from pyro_velo.processes import ALONE, Noise, Team
from pyro_velo.recorded import Recorded
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


class Part(NamedTuple):
    """The cells that are looked at together: the first `n` of the batch."""

    batch: Minibatch
    n: int


class Look(NamedTuple):
    """What is seen of the held-out cells: nats per cell, and by name those of each term, of them and of training cells.

    `objective` is what the schedule ends with.
    """

    elbo: float
    objective: float
    terms: dict[str, dict[str, float]]


@dataclass
class Looks:
    """Takes looks at the cells of `held`, or where there are none at those of `train`.

    `ends_with_elbo`: whether it is the ELBO that the schedule ends with. `records`: whether looks are recorded, and
    compiled as a whole, which takes terms.
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
    records: bool = False

    def __post_init__(self) -> None:
        """Prepare to record."""
        self.recorded = Recorded(self._by_cell, "A look", slopes=False)
        self.names: list[str] = []
        self.signs: list[int] = []

    @property
    def plain_cells(self) -> int:
        """How many cells a look goes through without being recorded, those for the terms among them."""
        n = len(self.held) or len(self.train)
        return (0 if self._records else 2 * n) + (0 if self.ends_with_elbo else n)

    @property
    def _records(self) -> bool:
        return self.records and self.recorded.works and self.terms is not TakenApart.NOT

    def take(self, step: int) -> Look:
        """Look; raises `NonFiniteError` for the `step` that was the last where a loss is not finite."""
        own: dict[str, float] = {}
        with self.warmup.done():
            elbo = self._mean(step, lambda i, part, share: self._loss(i, part, own, share))
        terms = {}
        if self.terms is not TakenApart.NOT:
            terms["held_out"] = self._summed(own)
            terms["train"] = self._terms_of_training() if len(self.held) else terms["held_out"]
        if self.ends_with_elbo:
            return Look(elbo, elbo, terms)
        with self.warmup.settled_at():
            objective = self._mean(step, lambda _, part, __: self.svi.loss(self.svi.model, self.svi.guide, part.batch))
        return Look(elbo, objective, terms)

    def _mean(self, step: int, loss_of: Callable[[int, Part, float], float]) -> float:
        """The mean over held-out cells of what is climbed."""
        index, total, culprit = self.held if len(self.held) else self.train, 0.0, None
        for i, part in self._turns(index):
            with self._with_noise(i):
                loss = loss_of(i, part, part.n / len(index))
                if not math.isfinite(loss) and culprit is None:
                    culprit = blame(self.svi.model, self.svi.guide, part.batch, {})
                total += part.n * loss
        found: Culprit | None = self.team.first(culprit)
        if found is not None:
            raise NonFiniteError(found, step=step)
        return -sum(self.team.gathered(total)) / len(index)

    def _turns(self, index: Tensor) -> Iterator[tuple[int, Part]]:
        """The parts of a look that are this process's, each with its number."""
        every = [(index[places], n) for places, n in equal_parts(len(index), self.batch_size)]
        # What is recorded takes parts of one size; others need no cell twice.
        parts = [(cells if self._records else cells[:n], n) for cells, n in every]
        turns = self.team.turns(len(parts))
        batches = self.cells.read([parts[i][0] for i in turns], len(self.train))
        for i, batch in zip(turns, batches, strict=True):
            yield i, Part(batch, parts[i][1])

    @contextmanager
    def _with_noise(self, i: int) -> Iterator[None]:
        """With the noise of the i-th part of a look, whichever process looks at it, and without gradients.

        But where steps are fused: what is compiled for them serves a look, too, and no gradient is asked for.
        """
        with own_noise(self.cells.device, self.seed + i), torch.set_grad_enabled(pays()):
            yield

    def _loss(self, i: int, part: Part, terms: dict[str, float], share: float) -> float:
        """The loss per cell of a part, whose terms are added to the others with its share."""
        if self.terms is TakenApart.NOT:
            return self.svi.loss(self.svi.model, self.svi.guide, part.batch)
        if self._records:
            told = self.recorded(part.batch, (), Noise(ALONE, self.seed + i, self.cells.device))
            if told is not None:
                # Cells that a part is filled up with are no part of it.
                values = [value[: part.n].mean().item() if value.ndim else value.item() for value in told]
                _add(terms, self.names, values, share)
                return -sum(sign * value for sign, value in zip(self.signs, values, strict=True))
            part = Part(self.cells.batch(part.batch.index[: part.n], len(self.train)), part.n)
        guide, model = self._traces(part.batch)
        found = terms_of(guide, model, closed=self.terms is TakenApart.CLOSED)
        _add(terms, [term.group for term in found.terms], [term.value.item() for term in found.terms], share)
        if self.terms is TakenApart.CLOSED:
            return -torch_item(found.total)
        return torch_item(guide.log_prob_sum()) - torch_item(model.log_prob_sum())

    def _by_cell(self, batch: Minibatch) -> Sequence[Tensor]:
        """The terms: of what cells have of it, the nats of each (B,), of the others the value, ()."""
        guide, model = self._traces(batch)
        found = terms_of(guide, model, closed=self.terms is TakenApart.CLOSED).terms
        self.names, self.signs = [term.group for term in found], [term.sign for term in found]
        told = [term.by(CELLS) for term in found]
        of_cells = {name for name, site in sites_of(model) if CELLS in {f.name for f in site["cond_indep_stack"]}}
        for term, value in zip(found, told, strict=True):
            if value is None and not of_cells.isdisjoint(term.sites):
                raise NotImplementedError(f"{term.name} is not told by cell")
        return [term.value if value is None else value for term, value in zip(found, told, strict=True)]

    def _traces(self, batch: Minibatch) -> tuple[Trace, Trace]:
        """Those of guide and model, as the ELBO's own `loss` has it (`Trace_ELBO`'s to the bit)."""
        guide = poutine.trace(self.svi.guide).get_trace(batch)
        model = poutine.trace(poutine.replay(self.svi.model, trace=guide)).get_trace(batch)
        model.compute_log_prob()
        guide.compute_log_prob()
        return guide, model

    def _terms_of_training(self) -> dict[str, float]:
        """The terms of as many training cells as are held out."""
        index, terms = self.train[: len(self.held)], dict[str, float]()
        for i, part in self._turns(index):
            with self._with_noise(i), self.warmup.done():
                self._loss(i, part, terms, part.n / len(index))
        return self._summed(terms)

    def _summed(self, terms: dict[str, float]) -> dict[str, float]:
        """The terms of all processes' parts; the first one has looked at some."""
        found = self.team.gathered(terms)
        return {name: sum(each.get(name, 0.0) for each in found) for name in found[0]}


def _add(terms: dict[str, float], names: Sequence[str], values: Sequence[float], share: float) -> None:
    for name, value in zip(names, values, strict=True):
        terms[name] = terms.get(name, 0.0) + share * value


@contextmanager
def own_noise(device: torch.device, seed: int) -> Iterator[None]:
    """Random numbers from `seed`; afterwards the generators go on as if nothing had been drawn."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
