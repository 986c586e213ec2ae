"""The learning-rate range test: how far the loss falls at each rate, from rates that do nothing to ones that diverge.

Reference: Smith 2017, Cyclical learning rates for training neural networks, section 3.3.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from pyro.infer import SVI, Trace_ELBO
from pyro.optim import ClippedAdam

from pyro_velo.batch import Data
from pyro_velo.errors import InputError
from pyro_velo.models.base import Model
from pyro_velo.schedule import Warmup
from pyro_velo.train import Guide, TrainSettings, apart, per_cell, split

Array = NDArray[np.float64]

SMOOTHING = 0.9
"""What a loss keeps of the ones before it: the memory of ten steps, in which the rate does not double."""
ENOUGH = 0.05
"""The loss no longer falls once all but this share of its fall is done: beyond, it may be flat over many rates."""
BELOW = 4.0
"""The suggested rate is so many times below the one at which the loss no longer falls (Smith 2017: 3 to 4)."""
NOISE = 5.0
"""Standard deviations of a single loss by which the running mean must end above the first one to have diverged."""


@dataclass(frozen=True)
class RangeTest:
    """`losses` per cell of the steps taken at `rates`, and `smoothed` ones; `suggested` is a rate to train with.

    `diverged` is whether the running mean ended above where it began, or a loss was no number (then there are fewer
    steps than were asked for): a test that did not diverge has not seen the highest rate that can be trained with.
    """

    rates: Array
    losses: Array
    smoothed: Array
    suggested: float
    diverged: bool


def range_test(
    model: Model,
    guide: Guide,
    cells: Data,
    *,
    settings: TrainSettings | None = None,
    lowest: float = 1e-5,
    highest: float = 1.0,
    steps: int = 150,
) -> RangeTest:
    """Take one step at each of `steps` rates, from `lowest` up to `highest` in equal factors, from the start of a fit.

    Batches, clip, seed, beta and free bits are those of `settings`, whose learning rate goes unused; the KL has its
    full weight from the first step on. Nothing is kept of it but the numbers. The rate that is suggested is a quarter
    of the one at which the smoothed loss has come within 5 % of its fall from its lowest.

    Raises `InputError` for rates that do not rise from above 0, or fewer than ten steps.
    """
    settings = settings or TrainSettings()
    if not 0 < lowest < highest < math.inf or steps < 10:
        raise InputError(
            f"Expected 0 < lowest < highest and 10 steps or more; got {lowest}, {highest} and {steps}. "
            "Leave them out for the defaults."
        )
    rates = np.geomspace(lowest, highest, steps)
    losses = np.array(_climb(model, guide, cells, settings, rates))
    smoothed = _smoothed(losses)
    low, start = smoothed.min(), smoothed[0]
    reached = int((smoothed <= low + ENOUGH * (start - low)).argmax())
    # Where little is learnt yet, steps differ by the batches and draws alone.
    noise = np.diff(losses[: max(3, len(losses) // 4)]).std() / math.sqrt(2)
    diverged = len(losses) < steps or bool(smoothed[-1] - start > NOISE * noise)
    return RangeTest(rates[: len(losses)], losses, smoothed, float(rates[reached]) / BELOW, diverged)


def _climb(model: Model, guide: Guide, cells: Data, settings: TrainSettings, rates: Array) -> list[float]:
    """The loss per cell at each rate, until it is not finite."""
    train_index, _ = split(len(cells), settings.held_out, settings.seed)
    n_train, losses = len(train_index), list[float]()
    full = Warmup(0, settings.beta, free_bits=settings.free_bits)
    with apart(cells, settings.seed):
        program = model.build(cells)
        parts = [per_cell(part, n_train) for part in (program, guide(program))]
        optimizer = ClippedAdam({"lr": float(rates[0]), "clip_norm": settings.clip})
        svi = SVI(*parts, optimizer, Trace_ELBO())
        for rate in rates:
            for each in optimizer.optim_objs.values():
                each.param_groups[0]["lr"] = float(rate)
            index = train_index[torch.randperm(n_train)[: settings.batch_size]].to(cells.device)
            with full.at(0):
                loss = float(svi.step(cells.batch(index, n_train)))
            if not math.isfinite(loss):
                break
            losses.append(loss)
    return losses


def _smoothed(losses: Array) -> Array:
    """The running mean of the losses so far, each step's weight `SMOOTHING` times that of the next."""
    weights = SMOOTHING ** np.arange(len(losses))
    total, found = 0.0, np.empty(len(losses))
    for i, loss in enumerate(losses):
        total = SMOOTHING * total + loss
        found[i] = total / weights[: i + 1].sum()
    return found
