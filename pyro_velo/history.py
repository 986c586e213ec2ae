"""What is kept of a fit's course: the ELBO of every epoch, and its summands whenever held-out cells were looked at."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass
class History:
    """The ELBO per cell by epoch: `train`, the mean of its steps, and `held_out`, NaN where it was not evaluated.

    `held_out` is at KL weight 1 without penalties; `train` is the objective that was climbed, at the weight
    `kl_weight`. `objective` is what looks are compared by, on the same cells with the same noise: the bound at the KL
    weight, with the free bits and with the penalties that the schedule ends with, whatever the weight was at that
    look; the same as `held_out` where these are 1, 0 and none. `terms` has the summands of the ELBO at weight 1 by
    name, of the `held_out` cells and of as many `train` cells (the same at every look): `kl_...` are taken off the
    others, `..._penalty` are no part of it. It is empty where the ELBO that was climbed is not one that `doctor.terms`
    takes apart: `Trace_ELBO` with one particle, or `TraceMeanField_ELBO` with a guide that draws each site by itself.
    """

    epoch: list[int] = field(default_factory=list)
    train: list[float] = field(default_factory=list)
    held_out: list[float] = field(default_factory=list)
    kl_weight: list[float] = field(default_factory=list)
    terms: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    objective: list[float] = field(default_factory=list)

    @property
    def best(self) -> int | None:
        """Which entry has the parameters that were kept: the first of the highest objective; None before any look."""
        seen = [i for i, value in enumerate(self.objective) if not math.isnan(value)]
        return max(seen, key=lambda i: self.objective[i], default=None)

    def copy(self) -> History:
        """What stands in it now."""
        columns = {name: list(column) for name, column in vars(self).items() if name != "terms"}
        terms = {cells: {name: list(column) for name, column in of.items()} for cells, of in self.terms.items()}
        return History(**columns, terms=terms)

    def note_terms(self, cells: str, terms: Mapping[str, float]) -> None:
        """Write down the terms of `cells` in the epoch to come, with NaN for those before in which nobody looked."""
        columns = self.terms.setdefault(cells, {})
        for name in {**columns, **terms}:
            column = columns.setdefault(name, [])
            column += [math.nan] * (len(self.epoch) - len(column))
            column.append(terms.get(name, math.nan))
