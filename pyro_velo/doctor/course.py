"""How training went, as figures: whether the held-out ELBO still rose, swung or fell, and if the encoder moved."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyro
import torch
from numpy.typing import NDArray
from torch import Tensor

from pyro_velo.batch import Data
from pyro_velo.doctor import draws as taken
from pyro_velo.evidence import conditions
from pyro_velo.guides import AmortizedProgram
from pyro_velo.train import Fitted, Training, TrainSettings, split

Array = NDArray[np.float64]

LAST = 1 / 3
"""The share of the looks at the held-out cells, at full KL weight and learning rate, that shows if the ELBO rises."""
FEWEST_LOOKS = 6
"""Below it a line through `LAST` of them has no error of its own."""


@dataclass(frozen=True)
class Course:
    """Figures of the looks at the held-out cells at full KL weight, in nats per cell; NaN where there are too few.

    What is looked at is the objective that is climbed in the end (`History.objective`): the ELBO, unless beta, free
    bits or labels say otherwise.

    `looks`: how many of them came before the learning rate was dropped, after which every curve is flat. Of these,
    `rise` is what a line through their last third gains over it, `rise_error` its standard error, and `swing` the sd
    of a look about the middle of its two neighbours; the noise is the same at every look, so that it is the parameters
    that swing. Of all looks, `fall`: from the best one to the mean of those after it, of the last third at
    most, and `train_rise` what the training ELBO gained in that time; `gap`: training less held-out ELBO at the end.
    `kl_weight`: the last epoch's. `ended`: whether a plateau ended the training.
    """

    looks: int
    rise: float
    rise_error: float
    swing: float
    fall: float
    train_rise: float
    gap: float
    kl_weight: float
    ended: bool


def course(training: Training, n_cells: int) -> Course:
    """Read the figures off the history of a run on `n_cells` cells."""
    history, held_out = training.history, np.asarray(training.history.objective, dtype=np.float64)
    train, weight = (np.asarray(column, dtype=np.float64) for column in (history.train, history.kl_weight))
    last_weight = float(weight[-1]) if len(weight) else math.nan
    seen = np.flatnonzero(np.isfinite(held_out) & (weight >= last_weight))
    looks = held_out[seen]
    fast = (
        looks[np.asarray(history.epoch)[seen] <= full_rate_epochs(training.settings, n_cells)] if len(seen) else looks
    )
    (rise, error), (fall, train_rise) = _rise(fast), _fall(looks, train[seen])
    return Course(
        looks=len(fast),
        rise=rise,
        rise_error=error,
        swing=_swing(fast),
        fall=fall,
        train_rise=train_rise,
        gap=float(train[seen[-1]] - looks[-1]) if len(looks) else math.nan,
        kl_weight=last_weight,
        ended=training.plateau.finished,
    )


def full_rate_epochs(settings: TrainSettings, n_cells: int) -> int:
    """The epochs before the learning rate drops at the latest."""
    n_train = len(split(n_cells, settings.held_out, settings.seed)[0])
    planned = settings.max_epochs or math.ceil(settings.max_steps / max(1, math.ceil(n_train / settings.batch_size)))
    return math.ceil(settings.drop * planned)


def _rise(looks: Array) -> tuple[float, float]:
    """What a line through the last looks gains from the first to the last of them, with its standard error.

    That is by the misses of these few, or by how all looks swing, which a curve does not raise: the larger one.
    """
    if len(looks) < FEWEST_LOOKS:
        return math.nan, math.nan
    y = looks[-max(4, math.ceil(LAST * len(looks))) :]
    x = np.linspace(-0.5, 0.5, len(y))
    slope = float((x * y).sum() / (x**2).sum())
    left = y - y.mean() - slope * x
    noise = max(math.sqrt(float((left**2).sum()) / (len(y) - 2)), _swing(looks))
    return slope, noise / math.sqrt(float((x**2).sum()))


def _swing(looks: Array) -> float:
    """From the second differences, of which independent noise has 6 times its variance; by their median size."""
    if len(looks) < 5:
        return math.nan
    normal = 0.6745
    return float(np.median(np.abs(np.diff(looks, 2)))) / normal / math.sqrt(6)


def _fall(looks: Array, train: Array) -> tuple[float, float]:
    if len(looks) < FEWEST_LOOKS:
        return math.nan, math.nan
    last, best = max(3, math.ceil(LAST * len(looks))), int(looks.argmax())
    last = min(last, max(1, len(looks) - 1 - best))
    return float(looks[best] - looks[-last:].mean()), float(train[-last:].mean() - train[best])


def encoder_moved(fitted: Fitted, cells: Data) -> float:
    """The share of the parameters that q(z | x) hangs on which ever had a gradient, by the optimiser's memory of g^2.

    0 where it hangs on none, NaN where cells have a q(z) of their own (`refinement`).
    """
    if isinstance(fitted.guide, AmortizedProgram) and fitted.guide.own is not None:
        return math.nan
    with conditions(fitted, cells, 0), torch.enable_grad():
        drawn = taken.draw(fitted, cells.batch(torch.arange(min(2, len(cells)), device=cells.device)))
        names = taken.latent_sites(drawn)
        store = pyro.get_param_store()
        named = {name: store[name].unconstrained() for name in store}
        q = [x for name in names for x in taken.moments(taken.bare(drawn.guide.nodes[name]["fn"]))]
        used = _used(q, list(named.values()))
    encoder = [name for name, hangs in zip(named, used, strict=True) if hangs]
    optimizer = fitted.training.optimizer
    with_gradient = sum(_with_gradient(optimizer[name]) for name in encoder if name in optimizer)
    return with_gradient / sum(named[name].numel() for name in encoder) if encoder else 0.0


def _used(outputs: Sequence[Tensor], parameters: Sequence[Tensor]) -> list[bool]:
    """Which parameters the outputs hang on."""
    free = [each.sum() for each in outputs if each.requires_grad]
    if not free:
        return [False] * len(parameters)
    gradients = torch.autograd.grad(sum(free[1:], free[0]), list(parameters), allow_unused=True)
    return [each is not None for each in gradients]


def _with_gradient(state: dict[str, Any]) -> int:
    """How many elements of a parameter ever had one."""
    slots = state["state"].get(0, {})
    return int((slots["exp_avg_sq"] > 0).sum()) if slots.get("step") else 0
