"""What changes during a fit: the weight of the KL terms, the learning rate, and the end."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from pyro.poutine.messenger import Messenger

SMALLEST = 1e-6
"""Pyro refuses a scale of zero."""


class KLWeight(Messenger):
    """Scales the KL terms of cells by `weight`, and penalties that are to be annealed by 1 - weight.

    KL terms are the latent sites in the plate `cells`, in model and guide alike, and the sites marked `infer={"kl":
    True}` (a KL in closed form). Sites marked `infer={"penalty": annealed}` are not part of the ELBO: annealed ones
    fade as the KL comes in, the others keep their weight. Found by tracing, so it fits every model.
    """

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.weight = weight

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        infer = msg["infer"]
        if "penalty" in infer:
            if infer["penalty"]:
                msg["scale"] = msg["scale"] * max(1 - self.weight, SMALLEST)
        elif infer.get("kl") or (not msg["is_observed"] and _of_cells(msg)):
            msg["scale"] = msg["scale"] * max(self.weight, SMALLEST)


class WithoutPenalties(Messenger):
    """The ELBO proper: every penalty masked out."""

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        if "penalty" in msg["infer"]:
            msg["mask"] = False


def _of_cells(msg: dict[str, Any]) -> bool:
    return any(frame.name == "cells" for frame in msg["cond_indep_stack"])


@dataclass(frozen=True)
class Warmup:
    """The KL weight rises linearly to 1 over `steps` steps."""

    steps: int

    def weight(self, step: int) -> float:
        """The weight at a step: 1/steps at the first, 1 from `steps - 1` on.

        >>> [Warmup(4).weight(step) for step in (0, 1, 3, 9)]
        [0.25, 0.5, 1.0, 1.0]
        """
        return min(1.0, (step + 1) / self.steps) if self.steps else 1.0

    @contextmanager
    def at(self, step: int) -> Iterator[None]:
        """Within it, programs are scored at the step's weight."""
        with KLWeight(self.weight(step)):
            yield

    @contextmanager
    def done(self) -> Iterator[None]:
        """Within it, programs are scored at weight 1, without penalties: the ELBO that is reported and compared."""
        with WithoutPenalties():
            yield


@dataclass
class Plateau:
    """Counts held-out evaluations without improvement: one plateau lowers the learning rate, the next ends the fit."""

    patience: int = 15
    best: float = -math.inf
    waited: int = 0
    lowered: bool = False
    finished: bool = False

    def improves(self, held_out: float, *, warm: bool) -> bool:
        """Whether this is the best held-out ELBO so far; waiting is only counted once the KL is in (`warm`)."""
        if held_out > self.best:
            self.best, self.waited = held_out, 0
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
