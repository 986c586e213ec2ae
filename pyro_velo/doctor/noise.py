r"""How much of an optimiser's step is noise, at the parameters that a fit keeps.

Adam steps along $m / \sqrt{v}$, the running means of g and of g^2 (Kingma & Ba 2015). At parameters that stay, with
$s^2 = \overline{(E g)^2 / E g^2}$ over their elements, its size settles at

$$\overline{m^2 / v} = s^2 + (1 - s^2) \frac{1 - b}{1 + b}$$

for the memory b of m: 1 where gradients agree from step to step, and (1 - b) / (1 + b) where they are noise alone. The
optimiser's own m and v do not tell it: v remembers a thousand steps and m ten, so that gradients which shrink as a fit
gets better look like noise.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import pyro
import torch
from pyro.infer import ELBO, Trace_ELBO
from torch import Tensor

from pyro_velo.batch import Data
from pyro_velo.evidence import conditions
from pyro_velo.schedule import FreeBits, KLWeight
from pyro_velo.train import Fitted, per_cell, split

MEMORY = 0.9
"""What m keeps from step to step."""
DRAWS = 20


def noise_ratio(fitted: Fitted, cells: Data, elbo: ELBO | None = None, *, draws: int = DRAWS, seed: int = 0) -> float:
    r"""$\sqrt{\overline{m^2 / v}}$ of steps of the fit's size, from `draws` gradients, clipped as the optimiser does.

    The batches are training cells at random, as many as a step of the fit had; the objective is `elbo` (None:
    `Trace_ELBO`) at the KL weight of the last epoch, without penalties. Each element counts alike, whatever the size of
    its gradients; those without any are left out. (E g)^2 is estimated without the bias that noise would give it. NaN
    where no element has a gradient.
    """
    settings, elbo = fitted.training.settings, elbo or Trace_ELBO()
    train_index, _ = split(len(cells), settings.held_out, settings.seed)
    n_train = len(train_index)
    size = math.ceil(n_train / math.ceil(n_train / settings.batch_size))
    model, guide = (per_cell(part, n_train) for part in (fitted.program, fitted.guide))
    sums: dict[str, Tensor] = {}
    squares: dict[str, Tensor] = {}
    with conditions(fitted, cells, seed), torch.enable_grad():
        leaves = {name: value.unconstrained() for name, value in pyro.get_param_store().items()}
        for _ in range(draws):
            index = train_index[torch.randperm(n_train)[:size]].to(cells.device)
            with _climbed(fitted):
                loss = elbo.differentiable_loss(model, guide, cells.batch(index, n_train))
            if not loss.requires_grad:
                return math.nan
            found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
            for name, gradient in zip(leaves, found, strict=True):
                if gradient is not None:
                    g = gradient.double().clamp(-settings.clip, settings.clip)
                    sums[name] = sums[name] + g if name in sums else g
                    squares[name] = squares[name] + g**2 if name in squares else g**2
    return _ratio(sums, squares, draws)


@contextmanager
def _climbed(fitted: Fitted) -> Iterator[None]:
    """The objective of the last epoch."""
    settings, weight = fitted.training.settings, fitted.training.history.kl_weight
    floor = FreeBits(settings.free_bits) if settings.free_bits else nullcontext()
    with KLWeight(weight[-1] if weight else settings.beta, 0.0), floor:
        yield


def _ratio(sums: dict[str, Tensor], squares: dict[str, Tensor], draws: int) -> float:
    """From the sums of g and of g^2 over draws."""
    if not sums:
        return math.nan
    total, square = (torch.cat([each.flatten() for each in of.values()]) for of in (sums, squares))
    total, square = (each[square > 0] for each in (total, square))
    if not len(square):
        return math.nan
    # The square of a mean of n draws is (E g)^2 and an n-th of the variance.
    agreement = float(((total**2 / square - 1) / (draws - 1)).mean())
    alone = (1 - MEMORY) / (1 + MEMORY)
    return math.sqrt(max(0.0, agreement + (1 - agreement) * alone))
