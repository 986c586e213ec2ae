"""A step of Pyro's ClippedAdam for all parameters at once: the same bits, without a program of Python for each."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from pyro.optim.optim import PyroOptim
from torch import Tensor


def step_together(optimizer: PyroOptim, parameters: Iterable[Tensor]) -> None:
    r"""What `optimizer(parameters)` does, to the bit, for the `optimizer` that `pyro.optim.ClippedAdam` makes.

    With the gradient g of each parameter x clamped to $\pm$`clip_norm` and `lr` multiplied by `lrd`,

    $$m \leftarrow b_1 m + (1 - b_1) g, \quad v \leftarrow b_2 v + (1 - b_2) g^2, \quad
    x \leftarrow x - \mathrm{lr}\,\frac{\sqrt{1 - b_2^t}}{1 - b_1^t}\,\frac{m}{\sqrt v + \epsilon}$$

    The states stay where Pyro keeps them, one torch optimiser a parameter, so that `get_state`, `set_state` and whoever
    changes a group's `lr` find them there. Reference: Kingma and Ba 2015, algorithm 1.
    """
    groups: dict[tuple, list[tuple[Tensor, Tensor, dict[str, Any]]]] = {}
    for parameter in parameters:
        own = optimizer.optim_objs.get(parameter)
        if own is None or parameter not in own.state or parameter.grad is None or not _plain(own.param_groups[0]):
            # Pyro's own step makes the state, takes the one that waits to be restored, or has nothing to do.
            optimizer([parameter])
            continue
        settings, state = own.param_groups[0], own.state[parameter]
        settings["lr"] *= settings["lrd"]
        state["step"] += 1
        numbers = (state["step"], settings["lr"], settings["clip_norm"], *settings["betas"], settings["eps"])
        alike = (parameter.dtype, parameter.device, *numbers)
        groups.setdefault(alike, []).append((parameter.data, parameter.grad.data, state))
    for (_, _, step, lr, clip, beta1, beta2, eps), members in groups.items():
        values, gradients, states = (list(each) for each in zip(*members, strict=True))
        means, squares = ([state[slot] for state in states] for slot in ("exp_avg", "exp_avg_sq"))
        torch._foreach_clamp_min_(gradients, -clip)
        torch._foreach_clamp_max_(gradients, clip)
        torch._foreach_mul_(means, beta1)
        torch._foreach_add_(means, gradients, alpha=1 - beta1)
        torch._foreach_mul_(squares, beta2)
        torch._foreach_addcmul_(squares, gradients, gradients, value=1 - beta2)
        scales = torch._foreach_sqrt(squares)
        torch._foreach_add_(scales, eps)
        rate = lr * math.sqrt(1 - beta2**step) / (1 - beta1**step)
        torch._foreach_addcdiv_(values, means, scales, value=-rate)


def _plain(settings: dict[str, Any]) -> bool:
    """Whether what Pyro's step adds on request is not asked for."""
    return settings["weight_decay"] == 0 and not settings["centered_variance"]
