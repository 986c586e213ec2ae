"""A step of Pyro's ClippedAdam for all parameters at once: one pass over each, without a program of Python for it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from pyro.optim.optim import PyroOptim
from torch import Tensor

SLOTS = ("exp_avg", "exp_avg_sq")
"""Where torch's Adams keep m and v."""


def step_together(optimizer: PyroOptim, parameters: Iterable[Tensor]) -> None:
    r"""What `optimizer(parameters)` does, to rounding, for the `optimizer` that `pyro.optim.ClippedAdam` makes.

    With the gradient g of each parameter x clamped to $\pm$`clip_norm` and `lr` multiplied by `lrd`,

    $$m \leftarrow b_1 m + (1 - b_1) g, \quad v \leftarrow b_2 v + (1 - b_2) g^2, \quad
    x \leftarrow x - \mathrm{lr}\,\frac{\sqrt{1 - b_2^t}}{1 - b_1^t}\,\frac{m}{\sqrt v + \epsilon}$$

    by torch's fused Adam, which adds $\epsilon$ to $\sqrt{v / (1 - b_2^t)}$ and is given one that is larger by as much.
    The states stay where Pyro keeps them, one torch optimiser a parameter, so that `get_state`, `set_state` and whoever
    changes a group's `lr` find them there. Reference: Kingma and Ba 2015, algorithm 1.
    """
    groups: dict[tuple, list[tuple[Tensor, Tensor, dict[str, Any]]]] = {}
    for parameter in parameters:
        own = optimizer.optim_objs.get(parameter)
        if own is None or parameter.grad is None or not _fusible(parameter, own):
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
        means, squares = ([state[slot] for state in states] for slot in SLOTS)
        for gradient in gradients:
            gradient.clamp_(-clip, clip)
        torch._fused_adam_(
            values, gradients, means, squares, [], [values[0].new_tensor(step, dtype=torch.float32)] * len(values),
            lr=lr, beta1=beta1, beta2=beta2, weight_decay=0.0, eps=eps / math.sqrt(1 - beta2**step),
            amsgrad=False, maximize=False,
        )  # fmt: skip


def _fusible(parameter: Tensor, own: torch.optim.Optimizer) -> bool:
    """Whether it has a state, nothing is asked for that Pyro's step adds on request, and all lies alike in memory.

    Torch's fused Adam takes what lies in another order for other elements, without a word.
    """
    settings, state = own.param_groups[0], own.state.get(parameter, {})
    plain = settings["weight_decay"] == 0 and not settings["centered_variance"]
    held = (parameter, parameter.grad, *(state.get(slot) for slot in SLOTS))
    return plain and all(each is not None and each.is_contiguous() for each in held)
