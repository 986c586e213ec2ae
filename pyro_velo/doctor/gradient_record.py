r"""How large gradients were over a fit, read off the optimiser's own second moments: at no cost and without a draw.

Adam keeps $v_t = \beta_2 v_{t-1} + (1 - \beta_2) g_t^2$ of each element (Kingma and Ba 2015, algorithm 1). Between two
looks, $\Delta$ steps apart, that is a mean square of the gradients of those steps alone, later ones weighing more:

$$\overline{g^2} = \frac{v_t - \beta_2^\Delta v_{t-\Delta}}{1 - \beta_2^\Delta}$$
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pyro_velo.doctor.gradients import Groups, Part, parts_by_name
from pyro_velo.train import Training

LEVELS = (0.05, 0.25, 0.5, 0.75, 0.95)
CLIPPED = 0.5
"""Of the clip: the root mean square of an element that is clipped in every fourth step and still in the others."""


class Trouble(NamedTuple):
    """A group whose gradient is too large or too small to be of use, since when, and by what bound."""

    group: str
    kind: str
    since: int
    figure: float
    bound: float


@dataclass
class GradientRecord:
    """Keeps, at every look at the held-out cells, how gradients were spread over the elements of each group.

    Pass it to `train` or `fit` as `on_evaluation`. `quantiles` (looks, levels) of each group are of the log10 of an
    element's root mean square since the look before, at `LEVELS`; `norm` (looks,) the log10 of the whole group's. Both
    are of the gradient of the loss per cell as the optimiser saw it, clipped; minus infinity is no gradient at all.
    `groups` are those of `parameter_groups`; by default as far as names tell them apart.

    Single precision resolves a root mean square down to about 1/500 of that of the thousand steps before.
    """

    groups: Groups = field(default_factory=dict)
    epoch: list[int] = field(default_factory=list)
    quantiles: dict[str, list[tuple[float, ...]]] = field(default_factory=dict)
    norm: dict[str, list[float]] = field(default_factory=dict)
    clip: float = np.inf
    eps: float = 0.0
    _before: dict[str, tuple[int, Tensor]] = field(default_factory=dict, repr=False)

    def __call__(self, training: Training) -> None:
        """Take in the state of a run."""
        squares = {name: self._mean_square(name, state) for name, state in training.optimizer.items()}
        groups = self.groups or _groups({name: value.shape for name, value in training.parameters.items()})
        self.epoch.append(training.epoch)
        for group, parts in groups.items():
            found = [squares[part.parameter][part.where].flatten() for part in parts if part.parameter in squares]
            elements = torch.cat(found).numpy() if found else np.zeros(1)
            with np.errstate(divide="ignore"):
                spread = np.log10(np.quantile(np.sqrt(elements), LEVELS))
                self.norm.setdefault(group, []).append(float(np.log10(np.sqrt(elements.sum()))))
            self.quantiles.setdefault(group, []).append(tuple(spread.tolist()))

    def of(self, group: str) -> NDArray[np.float64]:
        """The quantiles of a group, (looks, levels)."""
        return np.array(self.quantiles[group])

    def troubles(self) -> list[Trouble]:
        """The groups whose gradient explodes or vanishes at the last look, and the epoch since which it has done so.

        Early steps are often clipped, and no trouble if later ones are not.
        `exploding`: one element in twenty or more has a root mean square of at least `CLIPPED` times the clip.
        `vanishing`: that of half of the elements or more is below Adam's epsilon, beneath which its steps are no longer
        those of the learning rate (Kingma and Ba 2015, section 2.1).
        """
        found = []
        for group in self.quantiles:
            half, most = 10 ** self.of(group)[:, [LEVELS.index(0.5), LEVELS.index(0.95)]].T
            for kind, figures, bound, holds in (
                ("exploding", most, CLIPPED * self.clip, most >= CLIPPED * self.clip),
                ("vanishing", half, self.eps, half < self.eps),
            ):
                if holds[-1]:
                    since = len(holds) - int((~holds[::-1]).argmax()) if not holds.all() else 0
                    found.append(Trouble(group, kind, self.epoch[since], float(figures[-1]), bound))
        return found

    def _mean_square(self, name: str, state: Mapping[str, Any]) -> Tensor:
        """Of each element since the last look."""
        settings, slots = state["param_groups"][0], state["state"].get(0)
        self.clip, self.eps = settings.get("clip_norm", np.inf), settings["eps"]
        if slots is None:
            return torch.zeros(1, dtype=torch.float64)
        step, v, decay = int(slots["step"]), slots["exp_avg_sq"].detach().double().cpu(), settings["betas"][1]
        before, v_before = self._before.get(name, (0, torch.zeros_like(v)))
        self._before[name] = step, v
        faded = decay ** (step - before)
        return ((v - faded * v_before) / (1 - faded)).clamp_min(0) if step > before else torch.zeros_like(v)


def _groups(shapes: Mapping[str, torch.Size]) -> Groups:
    groups: dict[str, list[Part]] = {}
    for name, shape in shapes.items():
        for group, part in parts_by_name(name, shape):
            groups.setdefault(group, []).append(part)
    return {group: tuple(parts) for group, parts in groups.items()}
